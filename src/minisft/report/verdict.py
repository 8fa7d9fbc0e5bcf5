"""What a run's results say, in a sentence or two."""

from typing import Any

from minisft.claims import is_reliable, why_withheld
from minisft.report.run_files import RunFiles, metrics_of
from minisft.report.tables import chance

SURE = 0.05  # the p-value below which a difference counts as more than chance


def verdict(run: RunFiles) -> str:
    """Which checkpoint to take, by how much it beats the base model, and whether that is more than chance."""
    results = run.results
    if results is None:
        return "Not evaluated yet: minisft evaluate scores the base model and every checkpoint."
    if not metrics_of(run):
        return "There are no held-out conversations, so nothing is scored; the answers to your own prompts are below."
    best = next((entry for name, entry in run.systems if name == results["best"]), None)
    if best is None:
        return "No checkpoint could be scored."
    metric, name = ("bleu", "BLEU") if "bleu" in best else ("chrf", "chrF")
    score, base = best[metric], results["base"][metric]
    gain = score["score"] - base["score"]
    p = score.get("p", {}).get("base")
    interval = f" (95 % interval {score['low']:.1f} to {score['high']:.1f})" if is_reliable(score) else ""
    where = f"{name} {score['score']:.1f}{interval}"
    above = f"{gain:.1f} above the base model"
    if gain > 0 and not is_reliable(score):
        first = f"{results['best']} is best with {where}, {above}."
    elif gain > 0 and _sure(p):
        first = f"Take {results['best']}: {where}, {above}, which is more than chance{_p(p)}."
    elif gain > 0:
        first = f"{results['best']} is best with {where}, {above}, but that may be chance{_p(p)}."
    else:
        first = (
            f"No checkpoint beats the base model ({name} {base['score']:.1f}); best is {results['best']} with {where}."
        )
    reason = f" {why_withheld(results)}." if why_withheld(results) else ""
    return f"{first} {_against_constant(score, results['constant'][metric], name)}{reason}"


def _against_constant(score: dict[str, Any], constant: dict[str, Any], name: str) -> str:
    p = score.get("p", {}).get("constant")
    phrase = f"the best stock phrase ({name} {constant['score']:.1f})"
    if score["score"] <= constant["score"]:
        return f"It does not beat {phrase}: that score is no proof of learning."
    if not is_reliable(score):
        return f"It scores above {phrase}."
    return f"It beats {phrase}{' beyond chance' if _sure(p) else ', which may be chance'}{_p(p)}."


def _sure(p: float | None) -> bool:
    return p is not None and p < SURE


def _p(p: float | None) -> str:
    return "" if p is None else f" (p = {chance(p)})"
