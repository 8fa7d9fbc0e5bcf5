"""The metrics that a recipe names: what they are called, what they take, and whether a higher score is better."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minisft.errors import UserError

METRICS = ("bleu", "chrf")  # of the corpus, by sacrebleu: 0 to 100
# Metrics that are means over answers, with whether a higher score is better; None: neither.
ROW_METRICS: dict[str, bool | None] = {
    "rouge": True,
    "exact_match": True,
    "json_valid": True,
    "json_match": True,
    "tool_call_match": True,
    "regex": True,
    "length": None,
    "refusal": False,
}
PARAMETERS = {"rouge": ("rougeL", "rouge1", "rouge2", "rougeLsum"), "length": ("words", "characters")}
LOSS = "loss"  # `best_by` takes it like a metric
METRIC_NAMES = {"bleu": "BLEU", "chrf": "chrF"}  # as the field writes them
# Fields of results.json and of outputs.jsonl, and columns of the tables: no metric can have such a name.
RESERVED_NAMES = (
    *METRICS, *ROW_METRICS, LOSS, "perplexity", "seconds", "step", "checkpoint", "finish", "empty", "mean_tokens",
    "text", "custom", "retain", "test_sets", "together", "exact", "p", "id", "turn", "prompt", "reference", "output",
    "reasoning", "tokens", "test_set", "judge", "benchmarks",
)  # fmt: skip
_WHERE = "evaluation.metrics"
_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class MetricSpec:
    """One entry of `evaluation.metrics`.

    Args:
        key: Its key in results.json: the metric, unless the entry gives a `name`.
        metric: One of METRICS or ROW_METRICS, or `module:function`.
        parameter: What the metric takes: the pattern of `regex`, the variant of `rouge`, the unit of `length`.
    """

    key: str
    metric: str
    parameter: str | None = None

    @property
    def is_function(self) -> bool:
        return ":" in self.metric


def parse_metrics(entries: Sequence[str | Mapping[str, Any]]) -> list[MetricSpec]:
    """Return the entries of `evaluation.metrics`.

    Raises:
        UserError: An entry is no metric, lacks its parameter or has a wrong one, or two have the same key.
    """
    if not entries:
        raise UserError(_WHERE, "the list is empty", f"name some of {', '.join((*METRICS, *ROW_METRICS))}")
    specs = [_parse_metric(entry) for entry in entries]
    keys = [spec.key for spec in specs]
    for spec in specs:
        if keys.count(spec.key) > 1:
            fix = f"name each metric once, or give a name: {{{spec.metric}: ..., name: {spec.metric}_2}}"
            raise UserError(_WHERE, f"a metric is named twice: {spec.key}", fix)
    return specs


def _parse_metric(entry: str | Mapping[str, Any]) -> MetricSpec:
    fields = {entry: None} if isinstance(entry, str) else dict(entry)
    name = fields.pop("name", None)
    if len(fields) != 1:
        fix = "write a metric's name, module:function, or {METRIC: PARAMETER, name: KEY}, such as {regex: '^yes'}"
        raise UserError(_WHERE, f"{entry!r} does not name one metric", fix)
    [(metric, parameter)] = fields.items()
    # 1. The metric.
    if metric not in (*METRICS, *ROW_METRICS) and not _FUNCTION.fullmatch(str(metric)):
        problem = f"there is no metric {metric!r}"
        fix = f"choose among {', '.join((*METRICS, *ROW_METRICS))}, or write module:function"
        raise UserError(_WHERE, problem, fix)
    # 2. Its parameter.
    if metric == "regex":
        _require_pattern(parameter)
    elif metric in PARAMETERS:
        if parameter not in (None, *PARAMETERS[metric]):
            fix = f"choose among {', '.join(PARAMETERS[metric])}"
            raise UserError(_WHERE, f"{metric} has no variant {parameter!r}", fix)
    elif parameter is not None:
        raise UserError(_WHERE, f"{metric} takes no parameter, and is given {parameter!r}", f"write {metric}")
    # 3. Its key.
    if name is not None and metric in METRICS:
        raise UserError(_WHERE, f"{metric} keeps its name, and is named {name!r}", f"write {metric}")
    if name is not None and (not isinstance(name, str) or not name.isidentifier()):
        raise UserError(_WHERE, f"the name {name!r} is not an identifier", "use letters, digits and underscores")
    if name in RESERVED_NAMES and name != metric:
        raise UserError(_WHERE, f"the name {name!r} is that of another score or field", "choose another name")
    return MetricSpec(metric if name is None else name, metric, parameter)


def _require_pattern(parameter: Any) -> None:
    if not isinstance(parameter, str) or not parameter:
        raise UserError(_WHERE, "regex has no pattern", "write {regex: PATTERN}, such as {regex: '^(yes|no)$'}")
    try:
        re.compile(parameter)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(_WHERE, f"the pattern {parameter!r} is not valid ({error})", "correct the pattern") from None


def require_best_by(best_by: str | None, specs: Sequence[MetricSpec]) -> None:
    """Check `evaluation.best_by` against the metrics of the recipe.

    Raises:
        UserError: The recipe does not name the metric, or neither a higher nor a lower score of it is better.
    """
    if best_by is None or best_by == LOSS:
        return
    spec = next((spec for spec in specs if spec.key == best_by), None)
    if spec is None:
        known = ", ".join([LOSS, *(spec.key for spec in specs)])
        raise UserError("evaluation.best_by", f"evaluation.metrics has no {best_by!r}", f"choose among {known}")
    if higher_is_better(spec.metric) is None and not spec.is_function:
        problem = f"neither a higher nor a lower {spec.metric} is better"
        raise UserError("evaluation.best_by", problem, f"choose {LOSS} or another metric")


def higher_is_better(metric: str) -> bool | None:
    """Return whether a higher score of a metric with a name is better; None: neither is, or the metric has no name."""
    if metric == LOSS:
        return False
    return True if metric in METRICS else ROW_METRICS.get(metric)


def metric_title(key: str) -> str:
    """Return a metric's name for people, from its key in results.json."""
    return METRIC_NAMES.get(key, key)
