"""Tables as text cells, for the terminal, the pages and Markdown alike: a run's scores, and a comparison."""

from collections.abc import Sequence
from typing import Any

from minisft.report.run_data import RunFiles, metrics_of
from minisft.results import best_label, is_below_base, is_reliable

_NAMES = {"bleu": "BLEU", "chrf": "chrF"}
_RIVALS = ("base", "constant", "best")  # of whom the differences are told


def score_table(run: RunFiles) -> tuple[list[str], list[tuple[list[str], bool]]]:
    """Return heads and rows of cells, with whether a row is the best: base, checkpoints and the constant answer.

    With too few held-out conversations there are no p-values; without any there are no scores, and no constant answer.
    """
    assert run.results is not None
    metrics, best = metrics_of(run), run.results["best"]
    rivals = _RIVALS if metrics and is_reliable(run.results) else ()
    scored = [
        *(_NAMES[metric] for metric in metrics),
        *(f"p: {rival}" for rival in rivals),
        *(["exact"] if metrics else []),
        *run.results["base"].get("custom", {}),
    ]
    everyone = [*run.systems, *([("constant", run.results["constant"])] if metrics else [])]
    below = f"{best} ({best_label(run.results)})" if is_below_base(run.results) else best
    rows = [
        (_score_cells(below if name == best else name, entry, metrics, rivals), name == best)
        for name, entry in everyone
    ]
    return ["", "step", "loss", "perplexity", *scored, "seconds"], rows


def _score_cells(label: str, entry: dict[str, Any], metrics: list[str], rivals: Sequence[str]) -> list[str]:
    chances = entry[metrics[0]].get("p", {}) if metrics else {}
    exact = [f"{100 * entry.get('exact_match', 0):.0f} %"] if metrics else []
    cells = [
        label, entry.get("step"), entry.get("loss"), entry.get("perplexity"),
        *(_score(entry[metric], True) for metric in metrics), *(chance(chances.get(rival)) for rival in rivals), *exact,
        *(_custom(score) for score in entry.get("custom", {}).values()),
        entry.get("seconds"),
    ]  # fmt: skip
    return [_cell(cell) for cell in cells]


def _custom(score: dict[str, Any]) -> str:
    interval = f" [{score['low']:.4g}, {score['high']:.4g}]" if is_reliable(score) else ""
    return f"{score['score']:.4g}{interval}"


def chance(p: float | None) -> str:
    """Return a p-value as text, to three places, or its first digit where it is smaller."""
    if p is None:
        return ""
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1g}"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


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
    cells["best"] = ["below base" if variant.get("below_base") else "" for variant in variants]
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


def _score(score: dict[str, Any] | None, interval: bool) -> str:
    if score is None:
        return ""
    told = interval and is_reliable(score)
    return f"{score['score']:.1f}" + (f" [{score['low']:.1f}, {score['high']:.1f}]" if told else "")


def _difference(against: dict[str, Any] | None) -> str:
    """The largest relative difference of loss and gradient norm from the first of the same trajectory."""
    return "" if against is None else f"{max(against['loss'], against['grad_norm']):.1e}"


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """Return the table in Markdown; a bar in a cell does not end it."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
