"""The table of a comparison as text cells, for the terminal, the page and Markdown alike."""

from typing import Any

_NAMES = {"bleu": "BLEU", "chrf": "chrF"}


def comparison_table(found: dict[str, Any], intervals: bool = True) -> tuple[list[str], list[list[str]], list[bool]]:
    """Return heads, rows of cells, and which rows are the ones to take; columns without a figure are left out."""
    columns = {
        "s/step": ("seconds_per_step", "{:.2f}", 1),
        "tokens/s": ("supervised_tokens_per_second", "{:,.0f}", 1),
        "GB": ("peak_memory_mb", "{:.2f}", 1e-3),
        "MB sent": ("communication_mb", "{:,.1f}", 1),
        "final loss": ("final_loss", "{:.4f}", 1),
        "test loss": ("test_loss", "{:.4f}", 1),
    }
    variants = found["variants"]
    cells = {
        head: [_figure(variant.get(key), form, scale) for variant in variants]
        for head, (key, form, scale) in columns.items()
    }
    cells |= {name: [_score(variant.get(metric), intervals) for variant in variants] for metric, name in _NAMES.items()}
    cells["differs"] = [_difference(variant.get("against")) for variant in variants]
    kept = {head: column for head, column in cells.items() if any(column)}
    names = [_name(variant) for variant in variants]
    rows = [list(row) for row in zip(names, *kept.values(), strict=True)]
    return ["", *kept], rows, [variant["name"] in found["take"] for variant in variants]


def _name(variant: dict[str, Any]) -> str:
    if variant["status"] == "done":
        return str(variant["name"])
    return f"{variant['name']} ({variant['status']})"


def _figure(value: float | None, form: str, scale: float) -> str:
    return "" if value is None else form.format(value * scale)


def _score(score: dict[str, float] | None, interval: bool) -> str:
    if score is None:
        return ""
    return f"{score['score']:.1f}" + (f" [{score['low']:.1f}, {score['high']:.1f}]" if interval else "")


def _difference(against: dict[str, Any] | None) -> str:
    """The largest relative difference of loss and gradient norm from the first of the same trajectory."""
    return "" if against is None else f"{max(against['loss'], against['grad_norm']):.1e}"


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """Return the table in Markdown; a bar in a cell does not end it."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
