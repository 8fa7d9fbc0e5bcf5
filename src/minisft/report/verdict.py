"""What the results of a run or of a comparison say, in a few sentences."""

from typing import Any

from minisft.metric_names import LOSS, METRIC_NAMES, metric_title
from minisft.report.run_data import RunFiles, metrics_of
from minisft.report.tables import format_metric
from minisft.results import MIN_CONVERSATIONS, chosen_by, format_p_value, is_reliable, unreliability_reason

SIGNIFICANCE = 0.05  # the p-value below which a difference counts as more than chance
SAME_SPEED = 0.03  # step times that differ by at most this share count as equal: repeated runs differ as much


def verdict(run: RunFiles) -> str:
    """Return which checkpoint to take, by how much it beats the base model, and whether that is more than chance."""
    results = run.results
    if results is None:
        return "Not evaluated yet: minisft evaluate scores the base model and every checkpoint."
    if not metrics_of(run):
        return "There are no held-out conversations, so nothing is scored; the answers to your own prompts are below."
    best = run.best
    metric, higher = chosen_by(results)
    if best is None:
        failed = any(one["metric"] == metric for one in results.get("failed_metrics", ()))
        return f"No checkpoint is best: {metric} failed." if failed else "No checkpoint could be scored."
    if metric == LOSS:
        return _loss_verdict(results["best"], best["loss"], results["base"].get("loss"))
    name, label, digits = metric_title(metric), results["best"], ".1f" if metric in METRIC_NAMES else ".4g"
    score, base, constant = best[metric], results["base"][metric], results["constant"][metric]
    sign = 1 if higher else -1  # of an improvement

    # 1. Against the base model.
    gain = sign * (score["score"] - base["score"])
    p = score.get("p", {}).get("base")
    interval = f" (95 % interval {score['low']:{digits}} to {score['high']:{digits}})" if is_reliable(score) else ""
    reached = f"{name} {score['score']:{digits}}{interval}"
    above = f"{gain:{digits}} {'above' if higher else 'below'} the base model"
    if gain <= 0:
        beaten = f"the base model ({name} {base['score']:{digits}})"
        first = f"No checkpoint beats {beaten}; best is {label} with {reached}."
    elif not is_reliable(score):
        first = f"{label} is best with {reached}, {above}."
    elif _is_significant(p):
        first = f"Take {label}: {reached}, {above}, which is more than chance{_in_brackets(p)}."
    else:
        first = f"{label} is best with {reached}, {above}, but that may be chance{_in_brackets(p)}."

    # 2. Against the constant baseline.
    p = score.get("p", {}).get("constant")
    baseline = f"the constant baseline ({name} {constant['score']:{digits}})"
    if sign * (score["score"] - constant["score"]) <= 0:
        second = f"It does not beat {baseline}: that score is not evidence of learning."
    elif not is_reliable(score):
        second = f"It scores {'above' if higher else 'below'} {baseline}."
    else:
        chance = " beyond chance" if _is_significant(p) else ", which may be chance"
        second = f"It beats {baseline}{chance}{_in_brackets(p)}."

    # 3. Why no interval is given.
    reason = unreliability_reason(results)
    return f"{first} {second} {reason}." if reason else f"{first} {second}"


def _loss_verdict(label: str, loss: float, base: float | None) -> str:
    """Return the verdict where the held-out loss chose the best checkpoint: it has no p-value."""
    if base is None:
        return f"{label} has the lowest held-out loss, {loss:.4f}; that of the base model is not a finite number."
    if loss >= base:
        return f"No checkpoint has a lower held-out loss than the base model ({base:.4f}); best is {label}: {loss:.4f}."
    return f"{label} has the lowest held-out loss, {loss:.4f}, {base - loss:.4f} below the base model."


def _is_significant(p: float | None) -> bool:
    return p is not None and p < SIGNIFICANCE


def _in_brackets(p: float | None) -> str:
    return "" if p is None else f" (p = {format_p_value(p)})"


def comparison_verdict(comparison: dict[str, Any]) -> dict[str, Any]:
    """Return what a comparison shows.

    Args:
        comparison: comparison.json without the keys that this function returns.

    Returns:
        `verdict`: the sentences; `take`: the names of the variants to take; `coincide`: whether all variants of one
        trajectory took the same steps, or None if no two can be compared.
    """
    variants = comparison["variants"]
    trained = [v for v in variants if v.get("steps") and is_trained(v)]
    trajectories = list(dict.fromkeys(v["trajectory"] for v in trained))
    groups = [[v for v in trained if v["trajectory"] == trajectory] for trajectory in trajectories]
    take: list[str] = []

    # 1. Do the curves of one trajectory coincide?
    sentences = [_coincidence(group, comparison["tolerance"]) for group in groups if len(group) > 1]
    parted = [v["against"]["parts_at"] is not None for v in trained if v.get("against")]

    # 2. Which setting scores best?
    best = None
    if len(groups) > 1 and (setting := _best_setting(trained)) is not None:
        best, sentence = setting
        sentences.append(sentence)
        take = [best["name"]]

    # 3. Which strategy is fastest, among the variants of the best trajectory?
    group = next((group for group in groups if best in group), groups[0] if groups else [])
    if len(group) > 1:
        # Of the variants that are as fast as the fastest, the one that needs least memory.
        fastest = min(v["seconds_per_step"] for v in group)
        fast = [v for v in group if v["seconds_per_step"] <= fastest * (1 + SAME_SPEED)]
        chosen = min(fast, key=lambda v: v["peak_memory_mb"] or 0)
        sentences += _costs(chosen, group)
        take = [chosen["name"]]

    # 4. What failed, and what has not run yet?
    for v in variants:
        if v["status"] == "failed":
            error = " ".join((v["error"] or "").split()).replace(" Fix:", ". Fix:")  # the fix stood on its own line
            sentences.append(f"{v['name']} failed ({v['failed_at']}): {error}")
    waiting = [v["name"] for v in variants if v["status"] == "waiting"]
    if waiting:
        sentences.append(f"Not run yet: {', '.join(waiting)}.")
    return {"coincide": not any(parted) if parted else None, "take": take, "verdict": sentences}


def is_trained(variant: dict[str, Any]) -> bool:
    """Return whether a variant took all its steps, even if its evaluation failed."""
    return variant["status"] == "done" or variant["failed_at"] == "evaluate"


def _coincidence(group: list[dict[str, Any]], tolerance: float) -> str:
    """Return whether the curves of one trajectory coincide with those of its first variant, or where they part."""
    first, *others = group
    parted = [v for v in others if v["against"]["parts_at"] is not None]
    if not parted:
        *names, last = [v["name"] for v in others]
        listed = f"{', '.join(names)} and {last}" if names else last
        loss, norm = (max(v["against"][key] for v in others) for key in ("loss", "grad_norm"))
        steps = min(v["against"]["steps"] for v in others)
        return (
            f"The curves coincide within {_scientific(tolerance)}: over {steps} steps the losses of {listed} differ "
            f"from those of {first['name']} by at most {_scientific(loss)} of their size, the gradient norms by at "
            f"most {_scientific(norm)}."
        )
    sentences = []
    for v in parted:
        against = v["against"]
        sentences.append(
            f"{v['name']} parts from {first['name']} at step {against['parts_at']}: in {against['apart']} of "
            f"{against['steps']} steps loss or gradient norm differ by more than {_scientific(tolerance)} of their "
            f"size; the losses differ by at most {_scientific(against['loss'])}, the gradient norms by at most "
            f"{_scientific(against['grad_norm'])}."
        )
    # Gradients are rounded for every row or once a step, so half precision cannot show coinciding curves.
    half = [name for name in ("bf16", "fp16") if any(v.get("precision") == name for v in group)]
    if half:
        sentences.append(
            f"In {' and '.join(half)} rounding alone parts them, since the strategies round at different places; "
            "training.precision=fp32 shows whether the curves coincide."
        )
    return " ".join(sentences)


def _scientific(value: float) -> str:
    """Return a number such as 0.0002 as 2e-4."""
    return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-") if value else "0"


def _costs(chosen: dict[str, Any], group: list[dict[str, Any]]) -> list[str]:
    """Return sentences on time, memory and communication of a trajectory's variants, compared with the chosen one."""
    times = {v["name"]: f"{v['seconds_per_step'] / chosen['seconds_per_step']:.2f} times" for v in group}
    slower = [f"{v['name']} takes {times[v['name']]}" for v in group if v is not chosen]
    sentences = [
        f"Use {chosen['name']} here: no variant that ran is more than {100 * SAME_SPEED:.0f} % faster "
        f"({chosen['seconds_per_step']:.2f} s a step); {', '.join(slower)} as long."
    ]
    if all(v["peak_memory_mb"] for v in group):
        leanest = min(group, key=lambda v: v["peak_memory_mb"])
        least, memory = leanest["peak_memory_mb"], chosen["peak_memory_mb"]
        if leanest is chosen:
            sentences.append(f"It also needs the least memory, {memory / 1000:.2f} GB a process at its peak.")
        else:
            sentences.append(
                f"Where memory is short, {leanest['name']} needs {least / 1000:.2f} GB a process at its peak instead "
                f"of {memory / 1000:.2f} ({100 * (1 - least / memory):.0f} % less), for {times[leanest['name']]} the "
                "time of a step."
            )
    if all(v["communication_mb"] for v in group):
        sent = [(v["name"], v["communication_mb"]) for v in group]
        listed = ", ".join(f"{name} {mb:,.0f}" if mb >= 10 else f"{name} {mb:.2g}" for name, mb in sent)
        sentences.append(f"MB that a process sends in a step: {listed}.")
    return sentences


def _best_setting(variants: list[dict[str, Any]]) -> tuple[dict[str, Any], str] | None:
    """Return the variant with the best score, or else with the lowest test loss, and a sentence on it.

    The metric is the one that chose the best checkpoints. The sentence says whether the interval of its score overlaps
    that of the next trajectory.
    """
    chosen: dict[str, Any] = next((v["best_by"] for v in variants if v.get("best_by")), {"metric": LOSS})
    metric, higher = str(chosen["metric"]), bool(chosen.get("higher_is_better"))
    scored = [v for v in variants if metric in v.get("scores", {})]
    if not scored:
        with_loss = [v for v in variants if v.get("test_loss") is not None]
        if not with_loss:
            return None
        best = min(with_loss, key=lambda v: v["test_loss"])
        return best, f"{best['name']} has the lowest test loss, {best['test_loss']:.4f}."
    scored.sort(key=lambda v: v["scores"][metric]["score"], reverse=higher)
    best, score = scored[0], scored[0]["scores"][metric]
    below = ", which its base model beats" if best.get("below_base") else ""
    text = (
        f"{best['name']} scores best: {metric_title(metric)} {format_metric(metric, score)}, with {best['best']}{below}"
    )
    second = next((v for v in scored if v["trajectory"] != best["trajectory"]), None)
    if second is None:
        return best, f"{text}."
    next_score = second["scores"][metric]
    if not (is_reliable(score) and is_reliable(next_score)):
        chance = f"it may be chance, since fewer than {MIN_CONVERSATIONS} held-out conversations were scored"
    elif (score["low"] > next_score["high"]) if higher else (score["high"] < next_score["low"]):
        chance = "the intervals do not overlap"
    else:
        chance = "the intervals overlap, so it may be chance"
    return best, f"{text}; next is {second['name']} with {format_metric(metric, next_score)}: {chance}."
