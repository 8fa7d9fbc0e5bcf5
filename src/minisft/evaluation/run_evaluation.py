"""Evaluation of a run: score the base model and every checkpoint, and find the best checkpoint."""

import contextlib
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisft.console import console, say, warn
from minisft.data.encoder import Encoder
from minisft.errors import UserError
from minisft.evaluation.backends import ModelSpec, Workers, place_model
from minisft.evaluation.benchmarks import load_tasks, print_benchmarks, run_benchmarks
from minisft.evaluation.custom_metrics import CUSTOM, CustomMetric, RowMetric, as_row_metrics
from minisft.evaluation.evaluator import Evaluator, ScoredModel, SetScores
from minisft.evaluation.examples import HeldOutSet, load_held_out, load_prompts, train_answers
from minisft.evaluation.generation import Sampling, context_length, inference_dtype
from minisft.evaluation.judge import judge_answers, print_judge
from minisft.evaluation.judge_client import require_client
from minisft.evaluation.metrics import best_constant, p_value
from minisft.evaluation.monitor import models_to_score, wait_for_data
from minisft.evaluation.result_files import write_changes, write_side_by_side
from minisft.evaluation.retention import load_retained
from minisft.evaluation.row_metrics import load_row_metrics
from minisft.evaluation.score_tables import print_table
from minisft.evaluation.vllm_model import require_vllm
from minisft.files import hold_lock, write_atomically
from minisft.metric_names import LOSS, METRICS, higher_is_better, parse_metrics
from minisft.models import load_config, load_tokenizer, resolve_model, weights_fingerprint
from minisft.recipe import EvaluationRecipe, JudgeRecipe, Recipe
from minisft.results import results_path, withhold_unreliable
from minisft.run_folder import RunFolder, require_same_base_model
from minisft.text import dump_json

if TYPE_CHECKING:
    import torch


def evaluate(
    recipe: Recipe,
    output: Path,
    *,
    follow: bool = False,
    as_json: bool = False,
    draw: Callable[[Path], object] | None = None,
    dtype: "torch.dtype | None" = None,
    custom_metrics: Mapping[str, CustomMetric] | None = None,
    workers: Workers | None = None,
    sleep: Callable[[float], object] = time.sleep,
    others: Mapping[str, Path] | None = None,
) -> dict[str, Any]:
    """Score the base model and every checkpoint, write `<output>/evaluation` and print a table.

    Results that exist for the same weights, prompts and settings are read from the result cache.

    Args:
        recipe: The run's recipe.
        output: The run folder.
        follow: Continue until the training that writes into the folder has ended.
        as_json: Print results.json on stdout instead of the table.
        draw: Called with the run folder after each change of results.json (for the report's curves).
        dtype: Dtype of the weights; None: fp32 on a CPU or if the recipe trains in it, else bf16 or fp16.
        custom_metrics: The caller's own metrics by name: f(outputs, references, prompts) -> one number per answer.
            Their scores are in `custom` of each entry, with the number of each answer as `values`.
        workers: The processes to use; None: as many as the recipe says.
        sleep: Waits for so many seconds, under `follow`.
        others: Folders of models by name, NAME-STEP, to score beside the base model in place of the run's checkpoints.

    Returns:
        The content of results.json; `failed` lists the checkpoints that could not be scored.

    Raises:
        UserError: There are no checkpoints, or neither held-out rows nor prompts; the base model is not the run's;
            `max_new_tokens` leaves no room for a prompt; another evaluation is running in the folder; or a metric
            failed (the results without it are written).
    """
    # 1. Refuse what cannot work, before anything is waited for or computed.
    settings, run = recipe.evaluation, RunFolder(output)
    specs = parse_metrics(settings.metrics)
    row_metrics = [*load_row_metrics(specs), *as_row_metrics(custom_metrics or {}, [spec.key for spec in specs])]
    benchmarks = load_tasks(settings.benchmarks)
    if settings.judge is not None:
        require_client()
    if follow:
        wait_for_data(run, sleep)
    elif others is None and not run.list_checkpoints():
        raise UserError(run.checkpoints, "there are no checkpoints to evaluate", "train first: minisft train")
    with _exclusive(output / "evaluation"):
        # 2. Score one model after the other, and write results.json after each.
        with open_evaluator(recipe, output, row_metrics, dtype=dtype, workers=workers) as evaluator:
            if custom_metrics and not evaluator.held_out.examples:
                problem = "there are no held-out answers to score"
                raise UserError("metrics", problem, "set data.test_fraction above 0")
            base = evaluator.spec.weights
            models: Iterable[tuple[str, Path]] = (
                models_to_score(run, base, follow, sleep) if others is None else [("base", base), *others.items()]
            )
            scored_models, results = _score_models(recipe, run, evaluator, models, draw)
        _write_comparisons(evaluator, scored_models, results["best"])
        # 3. Run the benchmarks, and have the answers judged. No model takes memory any more: the judge may be here.
        if benchmarks:
            folders = others if others is not None else {folder.name: folder for folder in run.list_checkpoints()}
            scored = {"base": base} | {name: folder for name, folder in folders.items() if name in scored_models}
            found = run_benchmarks(benchmarks, scored, evaluator.spec, settings.batch_size, evaluator.folder)
            results = _write_results(run, {**results, "benchmarks": found})
        if settings.judge is not None:
            verdicts = _judge(settings.judge, evaluator, scored_models)
            results = _write_results(run, {**results, "judge": verdicts})
    _report(results, evaluator.folder, as_json)
    _require_all_metrics(evaluator)
    return results


def _require_all_metrics(evaluator: Evaluator) -> None:
    """Check that no metric failed; the scores of all others are computed and written.

    Raises:
        UserError: One failed; the message names the further ones.
    """
    if evaluator.failures:
        first, *further = evaluator.failures.values()
        more = f" ({len(further)} more failed: {', '.join(error.where for error in further)})" if further else ""
        raise UserError(first.where, first.problem + more, first.fix) from first.__cause__


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Lock the folder of an evaluation: two processes must not write the same result cache."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as lock:
        try:
            lock.enter_context(hold_lock(folder / ".lock"))
        except BlockingIOError:
            problem = "another evaluation is running here, or a training is scoring a checkpoint"
            raise UserError(folder, problem, "wait for it to end") from None
        yield


def _find_base(recipe: Recipe, run: RunFolder) -> Path:
    """Return the folder of the base model, after checking that the run began with it and that its context is enough."""
    resolved = resolve_model(recipe.model, recipe.trust_remote_code)
    require_same_base_model(run, str(resolved), weights_fingerprint(resolved.folder))
    if recipe.evaluation.backend == "vllm":
        require_vllm()
    max_new_tokens = recipe.evaluation.max_new_tokens
    context = context_length(load_config(resolved.folder, recipe.trust_remote_code))
    if context is not None and max_new_tokens >= context:
        raise UserError(
            "evaluation.max_new_tokens",
            f"{max_new_tokens} tokens leave no room for a prompt in the model's context of {context}",
            "give a smaller number",
        )
    return resolved.folder


@contextlib.contextmanager
def open_evaluator(
    recipe: Recipe,
    output: Path,
    row_metrics: Sequence[RowMetric] | None = None,
    *,
    folder: Path | None = None,
    dtype: "torch.dtype | None" = None,
    workers: Workers | None = None,
) -> Iterator[Evaluator]:
    """Yield the evaluator of a run, which has the same examples for every model; its processes end with the block.

    Args:
        recipe: The run's recipe.
        output: The run folder, with prepared data.
        row_metrics: The metrics besides BLEU and chrF; None: those of the recipe.
        folder: Folder for the answers and the result cache; None: that of the run.
        dtype: Dtype of the weights; None: fp32 on a CPU or if the recipe trains in it, else bf16 or fp16.
        workers: The processes that generate and compute losses; None: as many as the recipe says.

    Raises:
        UserError: The base model is not the run's; there are neither held-out rows nor prompts; the template refuses
            one; `max_new_tokens` leaves no room for a prompt; or a metric cannot be loaded.
    """
    settings = recipe.evaluation
    if row_metrics is None:
        row_metrics = load_row_metrics(parse_metrics(settings.metrics))
    base = _find_base(recipe, RunFolder(output))
    dtype = dtype or inference_dtype(recipe.training.precision)
    if workers is None:
        placement = place_model(base, dtype, settings)
        workers = Workers(placement.processes, placement.gpus_each)
    encoder = Encoder(
        load_tokenizer(base, recipe.trust_remote_code), recipe.data.template, recipe.data.template_options
    )
    prompts = load_prompts(settings.prompts, encoder)
    retained = None
    if settings.retain is not None:
        context = context_length(load_config(base, recipe.trust_remote_code))
        retained = load_retained(settings.retain, encoder, min(recipe.data.max_length, context or sys.maxsize))
    spec = ModelSpec(
        base,
        dtype,
        recipe.trust_remote_code,
        tuple(encoder.stop_token_ids),
        settings.max_new_tokens,
        Sampling(settings.temperature, settings.top_p, recipe.seed) if settings.temperature > 0 else None,
        settings.backend,
        base,
        workers.gpus_each,
        settings.gpu_memory_utilization,
    )
    held_out = load_held_out(output, encoder, settings.turns, settings.limit, required=not prompts)
    with workers:
        yield Evaluator(
            settings, encoder, held_out, prompts, folder or output / "evaluation", spec, workers, row_metrics, retained
        )


def score_model(
    recipe: Recipe, output: Path, name: str, weights: Path, folder: Path
) -> tuple[ScoredModel, dict[str, UserError]]:
    """Score one model on a run's held-out conversations, beside any evaluation of the run: results.json stays as it is.

    Args:
        recipe: The run's recipe, with the metrics to compute.
        output: The run folder, whose held-out conversations are answered.
        name: Name of the model, NAME-STEP.
        weights: Its folder.
        folder: Folder for its answers, in a folder of its name, and for the result cache.

    Returns:
        Its scores, and the errors of metrics that failed, by key.

    Raises:
        UserError: As of `open_evaluator`; or the model is damaged.
    """
    with open_evaluator(recipe, output, folder=folder) as evaluator:
        return evaluator.evaluate_model(name, weights), evaluator.failures


def _write_comparisons(evaluator: Evaluator, scored_models: dict[str, ScoredModel], best: str | None) -> None:
    """Write `changes.txt` and `prompts.txt`."""
    if best is not None:
        answers = (("base", scored_models["base"].outputs), (best, scored_models[best].outputs))
        write_changes(evaluator.folder, *answers, evaluator.held_out.examples)
    prompted = {name: scored.prompted for name, scored in scored_models.items()}
    write_side_by_side(evaluator.folder, evaluator.prompts, prompted)


def _score_models(
    recipe: Recipe,
    run: RunFolder,
    evaluator: Evaluator,
    models: Iterable[tuple[str, Path]],
    draw: Callable[[Path], object] | None,
) -> tuple[dict[str, ScoredModel], dict[str, Any]]:
    """Score the models, and write results.json after each; its `failed` lists those that could not be scored.

    Returns:
        The scored models by name, the base model first and then by their steps, and the content of results.json.
    """
    answers = train_answers(run.root, evaluator.encoder, recipe.evaluation.turns)
    constant = evaluator.score_constant(best_constant(answers))
    scored_models: dict[str, ScoredModel] = {}
    failed: list[dict[str, Any]] = []
    results: dict[str, Any] = {}
    for name, weights in models:
        try:
            scored_models[name] = evaluator.evaluate_model(name, weights)
        except (UserError, FileNotFoundError) as error:
            if name == "base" or (isinstance(error, FileNotFoundError) and weights.exists()):
                raise
            problem = error.problem if isinstance(error, UserError) else "it was removed meanwhile"
            failed.append({"checkpoint": name, "error": problem, **({} if weights.exists() else {"removed": True})})
            warn(f"{name} cannot be scored and is left out: {problem}")
        scores = summarise_scores(
            scored_models, constant, recipe.evaluation, evaluator.row_metrics, evaluator.failures
        )  # fmt: skip
        results = _write_results(run, withhold_unreliable(scores | _describe(recipe, evaluator, failed)))
        if draw is not None:
            draw(run.root)
    names = ["base", *(entry["checkpoint"] for entry in results["checkpoints"])]
    return {name: scored_models[name] for name in names}, results


def _describe(recipe: Recipe, evaluator: Evaluator, failed: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the fields of results.json besides the scores: number of examples, generation settings, failures."""
    settings, sampling, held_out = recipe.evaluation, evaluator.spec.sampling, evaluator.held_out
    sets: dict[str, Any] = {}
    if held_out.test_sets:
        sets = {
            "test_sets": {name: _sizes(one) for name, one in held_out.test_sets.items()},
            "together": _sizes(held_out),
        }
    errors = [
        {"metric": key.removeprefix(CUSTOM), "where": error.where, "error": error.problem}
        for key, error in evaluator.failures.items()
    ]
    return {
        **_sizes(held_out.first),
        **sets,
        **({} if evaluator.retained is None else {"retain": evaluator.retained.as_dict()}),
        **({"failed_metrics": errors} if errors else {}),
        **_directions(evaluator.row_metrics),
        "prompts": len(evaluator.prompts),
        "turns": settings.turns,
        "max_new_tokens": settings.max_new_tokens,
        "sampling": None if sampling is None else asdict(sampling),
        "backend": settings.backend,
        "failed": failed,
    }


def _directions(row_metrics: Sequence[RowMetric]) -> dict[str, list[str]]:
    """Return the metrics of which a lower score is better, and those of which neither is, as far as there are any."""
    named = [metric for metric in row_metrics if not metric.key.startswith(CUSTOM)]
    found = {
        "lower_is_better": [metric.key for metric in named if metric.higher_is_better is False],
        "no_direction": [metric.key for metric in named if metric.higher_is_better is None],
    }
    return {name: keys for name, keys in found.items() if keys}


def _sizes(held_out: HeldOutSet) -> dict[str, int]:
    return {"answers": len(held_out.examples), "conversations": held_out.conversations}


def summarise_scores(
    scored_models: dict[str, ScoredModel],
    constant: ScoredModel,
    settings: EvaluationRecipe,
    row_metrics: Sequence[RowMetric] = (),
    left_out: Collection[str] = (),
) -> dict[str, Any]:
    """Return the content of results.json: scores, intervals and p-values of every model.

    Args:
        scored_models: The base model and the checkpoints, by name.
        constant: The constant baseline.
        settings: The recipe's `evaluation`; see `best_by`.
        row_metrics: The metrics besides BLEU and chrF, for the direction of each.
        left_out: Keys of metrics that failed.
    """
    systems = {**scored_models, "constant": constant}
    checkpoints = sorted(
        (name for name in scored_models if name != "base"), key=lambda name: int(name.rpartition("-")[2])
    )
    # 1. The best checkpoint.
    judge, higher = best_by(settings, row_metrics)
    worth = {name: value for name in checkpoints if (value := _worth(scored_models[name], judge, higher)) is not None}
    best = None if judge in left_out else max(worth, key=lambda name: worth[name], default=None)
    # 2. The scores of every model, on the first test set, on each of several, and on all of these together.
    rivals = {"base": "base", "constant": "constant", **({"best": best} if best else {})}
    entries = {}
    for name, system in systems.items():
        against = {role: systems[rival] for role, rival in rivals.items() if rival != name}
        entries[name] = _entry(system, against, left_out)
        if system.together is not None:
            sets = {
                key: _entry(one, {role: rival.test_sets[key] for role, rival in against.items()}, left_out)
                for key, one in system.test_sets.items()
            }
            together = {role: rival.together for role, rival in against.items() if rival.together is not None}
            entries[name] |= {"test_sets": sets, "together": _entry(system.together, together, left_out)}
        if system.retained is not None:
            base = None if name == "base" else scored_models["base"].retained
            entries[name]["retain"] = system.retained.as_dict(base)
    return {
        "base": entries["base"],
        "checkpoints": [entries[name] for name in checkpoints],
        "best": best,
        "best_by": {"metric": judge, "higher_is_better": higher},
        "constant": entries["constant"],
    }


def best_by(settings: EvaluationRecipe, row_metrics: Sequence[RowMetric] = ()) -> tuple[str, bool]:
    """Return the metric that decides which checkpoint is best, and whether a higher score is better.

    It is `evaluation.best_by`, or else BLEU, chrF, or the first named metric of which a higher or a lower score is
    better; the held-out loss if there is none.
    """
    directions = {metric.key: metric.higher_is_better for metric in row_metrics if not metric.key.startswith(CUSTOM)}
    named = [spec.key for spec in parse_metrics(settings.metrics)]
    candidates = [settings.best_by] if settings.best_by else [*(m for m in METRICS if m in named), *directions]
    for metric in candidates:
        higher = directions.get(metric, higher_is_better(metric))
        if higher is not None:
            return metric, higher
    return LOSS, False


def _worth(system: ScoredModel, metric: str, higher: bool) -> float | None:
    """Return a checkpoint's score by the metric, negated if a lower one is better; None if it has none."""
    score = (
        system.entry.get("loss") if metric == LOSS else system.scores[metric].score if metric in system.scores else None
    )
    return score if score is None or higher else -score


def _entry(
    system: ScoredModel | SetScores, rivals: Mapping[str, ScoredModel | SetScores], left_out: Collection[str]
) -> dict[str, Any]:
    """Return the fields of a model with its scores, each with its p-values against the rivals, by their role."""
    entry, custom = dict(system.entry), {}
    for metric, score in system.scores.items():
        if metric in left_out:
            continue
        scored = score.interval().as_dict()
        scored["p"] = {role: p_value(score, rival.scores[metric]) for role, rival in rivals.items()}
        if metric.startswith(CUSTOM):
            scored["values"] = score.rows()
            custom[metric.removeprefix(CUSTOM)] = scored
        else:
            entry[metric] = scored
    return {**entry, "custom": custom} if custom else entry


def _judge(settings: JudgeRecipe, evaluator: Evaluator, models: Mapping[str, ScoredModel]) -> dict[str, Any]:
    """Return the verdicts of the judge on the models' answers to held-out rows and to the user's own prompts."""
    outputs = {name: [*model.outputs, *model.prompted] for name, model in models.items()}
    examples = [*evaluator.held_out.examples, *evaluator.prompts]
    return judge_answers(settings, examples, outputs, evaluator.folder / "judge")


def _write_results(run: RunFolder, results: dict[str, Any]) -> dict[str, Any]:
    """Write results.json, and return its content."""
    write_atomically(results_path(run.root), dump_json(results, indent=1) + "\n")
    return results


def require_all_scored(results: dict[str, Any], run: RunFolder) -> None:
    """Check that an evaluation scored every checkpoint that still exists.

    Checkpoints that were removed, as `training.keep_checkpoints` does, do not count.

    Raises:
        UserError: Some checkpoints are damaged or incomplete; all others are scored, and results.json is written.
    """
    damaged = [failure for failure in results["failed"] if not failure.get("removed")]
    if not damaged:
        return
    names = ", ".join(failure["checkpoint"] for failure in damaged)
    them, noun = ("it", "checkpoint is") if len(damaged) == 1 else ("them", "checkpoints are")
    raise UserError(
        f"{run.checkpoints}: {names}",
        f"{len(damaged)} {noun} damaged and not scored; all others are ({damaged[0]['error']})",
        f"restore {them} from a copy or delete {them}, then evaluate again: only what is new is computed",
    )


def _report(results: dict[str, Any], folder: Path, as_json: bool) -> None:
    if as_json:
        console.file.write(dump_json(results, indent=1) + "\n")
        return
    print_table(results)
    if "benchmarks" in results:
        print_benchmarks(results["benchmarks"])
    if "judge" in results:
        print_judge(results["judge"])
    say(f"All answers and examples: {folder}")
    say(f"next: minisft report {folder.parent}    or: minisft chat {folder.parent}")
