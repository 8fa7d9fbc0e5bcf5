"""What the results of a run or of a comparison say, in a few sentences."""

from typing import Any

from minisft.report.run_data import RunFiles, metrics_of
from minisft.report.tables import format_p_value
from minisft.results import MIN_CONVERSATIONS, is_reliable, unreliability_reason

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
    reason = f" {unreliability_reason(results)}." if unreliability_reason(results) else ""
    return f"{first} {_against_constant(score, results['constant'][metric], name)}{reason}"


def _against_constant(score: dict[str, Any], constant: dict[str, Any], name: str) -> str:
    p = score.get("p", {}).get("constant")
    phrase = f"the constant baseline ({name} {constant['score']:.1f})"
    if score["score"] <= constant["score"]:
        return f"It does not beat {phrase}: that score is no proof of learning."
    if not is_reliable(score):
        return f"It scores above {phrase}."
    return f"It beats {phrase}{' beyond chance' if _sure(p) else ', which may be chance'}{_p(p)}."


def _sure(p: float | None) -> bool:
    return p is not None and p < SURE


def _p(p: float | None) -> str:
    return "" if p is None else f" (p = {format_p_value(p)})"


SAME_SPEED = 0.03  # times of a step that are this close are taken for equal: a machine does not repeat itself better


def comparison_verdict(found: dict[str, Any]) -> dict[str, Any]:
    """Return `verdict`, the sentences; `take`, the names of the variants to take; `coincide`, or None."""
    trained = [v for v in found["variants"] if v.get("steps") and is_trained(v)]
    groups = _groups(trained)
    sentences = [text for group in groups if (text := _coincidence(group, found["tolerance"]))]
    off = [v["against"]["parts_at"] for v in trained if v.get("against")]
    take: list[str] = []
    best = best_scored(trained) if len(groups) > 1 else None
    if best is not None:
        sentences.append(_best(best, trained))
        take.append(best["name"])
    group = next((g for g in groups if best in g), groups[0] if groups else [])
    if len(group) > 1:
        chosen = _choose(group)
        sentences += _advice(chosen, group)
        take = [chosen["name"]]
    sentences += [_failure(v) for v in found["variants"] if v["status"] == "failed"]
    waiting = [v["name"] for v in found["variants"] if v["status"] == "waiting"]
    if waiting:
        sentences.append(f"Not run yet: {', '.join(waiting)}.")
    return {"coincide": all(step is None for step in off) if off else None, "take": take, "verdict": sentences}


def is_trained(variant: dict[str, Any]) -> bool:
    """Say whether a variant took all its steps, whatever became of its evaluation."""
    return variant["status"] == "done" or variant["failed_at"] == "evaluate"


def _groups(variants: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Variants of one trajectory each, in the order of their first ones."""
    keys = dict.fromkeys(variant["trajectory"] for variant in variants)
    return [[variant for variant in variants if variant["trajectory"] == key] for key in keys]


# --- are the curves one -----------------------------------------------------------------------------------


def _coincidence(group: list[dict[str, Any]], tolerance: float) -> str | None:
    first, *others = group
    if not others:
        return None
    off = [other for other in others if other["against"]["parts_at"] is not None]
    if off:
        return " ".join(_parting(other, first["name"], tolerance) for other in off) + _rounding(group)
    loss, norm = (max(other["against"][key] for other in others) for key in ("loss", "grad_norm"))
    steps = min(other["against"]["steps"] for other in others)
    return (
        f"The curves coincide within {_power(tolerance)}: over {steps} steps the losses of {_listed(others)} differ "
        f"from those of {first['name']} by at most {_power(loss)} of their size, the gradient norms by at most "
        f"{_power(norm)}."
    )


def _rounding(group: list[dict[str, Any]]) -> str:
    """Say what curves in half precision cannot show: DeepSpeed rounds weights and gradients where autocast does not."""
    half = [name for name in ("bf16", "fp16") if any(variant.get("precision") == name for variant in group)]
    if not half:
        return ""
    return (
        f" In {' and '.join(half)} rounding alone parts them, since the strategies round at different places; "
        "whether the curves are one shows with training.precision=fp32."
    )


def _parting(variant: dict[str, Any], first: str, tolerance: float) -> str:
    against = variant["against"]
    return (
        f"{variant['name']} parts from {first} at step {against['parts_at']}: in {against['apart']} of "
        f"{against['steps']} steps loss or gradient norm differ by more than {_power(tolerance)} of their size; at "
        f"most the losses by {_power(against['loss'])}, the norms by {_power(against['grad_norm'])}."
    )


# --- which strategy ---------------------------------------------------------------------------------------


def _choose(group: list[dict[str, Any]]) -> dict[str, Any]:
    """The fastest; of those that are as fast, the one that needs least memory."""
    fastest = min(variant["seconds_per_step"] for variant in group)
    fast = [variant for variant in group if variant["seconds_per_step"] <= fastest * (1 + SAME_SPEED)]
    return min(fast, key=lambda variant: variant["peak_memory_mb"] or 0)


def _advice(chosen: dict[str, Any], group: list[dict[str, Any]]) -> list[str]:
    others = [variant for variant in group if variant is not chosen]
    slower = [f"{v['name']} takes {_times(v, chosen, 'seconds_per_step')}" for v in others]
    sentences = [
        f"Use {chosen['name']} here: no other that ran is faster, {chosen['seconds_per_step']:.2f} s a step; "
        f"{', '.join(slower)} as long."
    ]
    if all(variant["peak_memory_mb"] for variant in group):
        sentences.append(_memory(chosen, min(group, key=lambda variant: variant["peak_memory_mb"])))
    if all(variant["communication_mb"] for variant in group):
        sent = [f"{v['name']} {_amount(v['communication_mb'])}" for v in group]
        sentences.append(f"MB that a process sends in a step: {', '.join(sent)}.")
    return sentences


def _memory(chosen: dict[str, Any], leanest: dict[str, Any]) -> str:
    mine = chosen["peak_memory_mb"]
    if leanest is chosen:
        return f"It also needs least memory, {mine / 1000:.2f} GB a process at its peak."
    saved = 1 - leanest["peak_memory_mb"] / mine
    return (
        f"Where memory is short, {leanest['name']} needs {leanest['peak_memory_mb'] / 1000:.2f} GB a process at its "
        f"peak instead of {mine / 1000:.2f} ({100 * saved:.0f} % less), for "
        f"{_times(leanest, chosen, 'seconds_per_step')} the time of a step."
    )


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _times(variant: dict[str, Any], chosen: dict[str, Any], key: str) -> str:
    return f"{variant[key] / chosen[key]:.2f} times"


# --- which setting ----------------------------------------------------------------------------------------


def best_scored(variants: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the variant with the best score, by test loss where there are no scores; None where neither is."""
    for metric in ("bleu", "chrf"):
        scored = [variant for variant in variants if metric in variant]
        if scored:
            return max(scored, key=lambda variant: variant[metric]["score"])
    judged = [variant for variant in variants if variant.get("test_loss") is not None]
    return min(judged, key=lambda variant: variant["test_loss"], default=None)


def _best(best: dict[str, Any], variants: list[dict[str, Any]]) -> str:
    metric = next((metric for metric in ("bleu", "chrf") if metric in best), None)
    if metric is None:
        return f"{best['name']} has the lowest test loss, {best['test_loss']:.4f}."
    name = {"bleu": "BLEU", "chrf": "chrF"}[metric]
    below = ", which is below its base model" if best.get("below_base") else ""
    text = f"{best['name']} scores best: {name} {_interval(best[metric])}, with {best['best']}{below}"
    rivals = [v for v in variants if metric in v and v["trajectory"] != best["trajectory"]]
    second = max(rivals, key=lambda variant: variant[metric]["score"], default=None)
    if second is None:
        return text + "."
    return (
        f"{text}; next is {second['name']} with {_interval(second[metric])}: {_chance(best[metric], second[metric])}."
    )


def _chance(best: dict[str, Any], second: dict[str, Any]) -> str:
    if not (is_reliable(best) and is_reliable(second)):
        return f"it may be chance, since fewer than {MIN_CONVERSATIONS} held-out conversations were scored"
    apart = best["low"] > second["high"]
    return "the intervals do not meet" if apart else "the intervals overlap, so it may be chance"


def _interval(score: dict[str, Any]) -> str:
    interval = f" [{score['low']:.1f}, {score['high']:.1f}]" if is_reliable(score) else ""
    return f"{score['score']:.1f}{interval}"


# --- what went wrong --------------------------------------------------------------------------------------


def _failure(variant: dict[str, Any]) -> str:
    error = " ".join((variant["error"] or "").split()).replace(" Fix:", ". Fix:")  # on a line of its own
    return f"{variant['name']} failed ({variant['failed_at']}): {error}"


def _power(value: float) -> str:
    """0.0002 as 2e-4."""
    return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-") if value else "0"


def _listed(variants: list[dict[str, Any]]) -> str:
    *most, last = [variant["name"] for variant in variants]
    return f"{', '.join(most)} and {last}" if most else last
