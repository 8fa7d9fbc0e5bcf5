"""Evaluation of a run: score the base model and every checkpoint, and find the best checkpoint."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from minisft.console import console, say, warn
from minisft.data.encoder import Encoder
from minisft.errors import UserError
from minisft.evaluation.backends import ModelSpec, Workers, default_processes, require_vllm
from minisft.evaluation.benchmarks import LoadedTask, load_tasks, print_benchmarks, run_benchmarks
from minisft.evaluation.custom_metrics import CustomMetric, check_custom_metrics, score_custom
from minisft.evaluation.evaluator import Evaluator, ScoredModel
from minisft.evaluation.examples import load_held_out, load_prompts, train_answers
from minisft.evaluation.generation import Sampling, context_length, inference_dtype
from minisft.evaluation.judge import judge_answers, print_judge
from minisft.evaluation.judge_client import require_client
from minisft.evaluation.metrics import best_constant, p_value
from minisft.evaluation.monitor import models_to_score, wait_for_data
from minisft.evaluation.result_files import write_changes, write_side_by_side
from minisft.files import hold_lock, write_atomically
from minisft.models import load_config, load_tokenizer, resolve_model, weights_fingerprint
from minisft.recipe import METRICS, EvaluationRecipe, JudgeRecipe, Recipe
from minisft.results import (
    METRIC_NAMES,
    best_label,
    is_reliable,
    results_path,
    unreliability_reason,
    withhold_unreliable,
)
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
        workers: The processes to use; None: as many as the recipe says.
        sleep: Waits for so many seconds, under `follow`.

    Returns:
        The content of results.json; `failed` lists the checkpoints that could not be scored.

    Raises:
        UserError: There are no checkpoints, or neither held-out rows nor prompts; the base model is not the run's;
            `max_new_tokens` leaves no room for a prompt; or another evaluation is running in the folder.
    """
    custom = check_custom_metrics(custom_metrics or {})
    if recipe.evaluation.judge is not None:
        require_client()
    benchmarks = load_tasks(recipe.evaluation.benchmarks) if recipe.evaluation.benchmarks else []
    run = RunFolder(output)
    if follow:
        wait_for_data(run, sleep)
    elif not run.list_checkpoints():
        raise UserError(run.checkpoints, "there are no checkpoints to evaluate", "train first: minisft train")
    with _exclusive(output / "evaluation"):
        # 1. Load the examples, which are the same for every model.
        base = _find_base(recipe, run)
        with workers or Workers(recipe.evaluation.processes or default_processes()) as pool:
            evaluator, constant = _load_examples(recipe, output, base, dtype, pool)
            constant = _with_custom("constant", constant, evaluator, custom)
            # 2. Score one model after the other, and write results.json after each.
            models = models_to_score(run, base, follow, sleep)
            scored_models, results = _score_models(recipe, run, evaluator, constant, models, draw, custom)
        # 3. Write the comparisons.
        _write_comparisons(evaluator, scored_models, results["best"])
        # 4. Run the benchmarks.
        if benchmarks:
            results = _run_benchmarks(benchmarks, run, base, evaluator, results)
        # 5. Have the answers judged, when no model takes memory any more: the judge may be on this machine.
        if recipe.evaluation.judge is not None:
            results = _judge(recipe.evaluation.judge, run, evaluator, scored_models, results)
    _report(results, evaluator.folder, as_json)
    return results


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Lock the folder of an evaluation: two processes must not write the same result cache."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as lock:
        try:
            lock.enter_context(hold_lock(folder / ".lock"))
        except BlockingIOError:
            raise UserError(folder, "another evaluation is running here", "wait for it to end") from None
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


def _load_examples(
    recipe: Recipe, output: Path, base: Path, dtype: "torch.dtype | None", workers: Workers
) -> tuple[Evaluator, ScoredModel]:
    """Return the evaluator, which has the same examples for every model, and the scored constant baseline."""
    settings = recipe.evaluation
    encoder = Encoder(
        load_tokenizer(base, recipe.trust_remote_code), recipe.data.template, recipe.data.template_options
    )
    prompts = load_prompts(settings.prompts, encoder)
    evaluator = Evaluator(
        settings,
        encoder,
        load_held_out(output, encoder, settings.turns, settings.limit, required=not prompts),
        prompts,
        output / "evaluation",
        ModelSpec(
            base,
            dtype or inference_dtype(recipe.training.precision),
            recipe.trust_remote_code,
            tuple(encoder.stop_token_ids),
            settings.max_new_tokens,
            Sampling(settings.temperature, settings.top_p, recipe.seed) if settings.temperature > 0 else None,
            settings.backend,
            base,
            settings.tensor_parallel_size,
            settings.gpu_memory_utilization,
        ),
        workers,
    )
    return evaluator, evaluator.score_constant(best_constant(train_answers(output, encoder, settings.turns)))


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
    constant: ScoredModel,
    models: Iterable[tuple[str, Path]],
    draw: Callable[[Path], object] | None,
    custom: Mapping[str, CustomMetric],
) -> tuple[dict[str, ScoredModel], dict[str, Any]]:
    """Return the scored models by name and results.json, which is written after each; `failed` lists the others."""
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
        else:  # outside the `try`: an error of a custom metric does not mean that the checkpoint is damaged
            scored_models[name] = _with_custom(name, scored_models[name], evaluator, custom)
        results = withhold_unreliable(
            summarise_scores(scored_models, constant, recipe.evaluation) | _describe(recipe, evaluator, failed)
        )
        write_atomically(results_path(run.root), dump_json(results, indent=1) + "\n")
        if draw is not None:
            draw(run.root)
    return scored_models, results


def _with_custom(
    name: str, scored: ScoredModel, evaluator: Evaluator, custom: Mapping[str, CustomMetric]
) -> ScoredModel:
    """Return the scored model with the scores of the custom metrics in its entry, under `custom`."""
    if not custom:
        return scored
    examples = evaluator.held_out.examples
    scores = score_custom(custom, name, scored.outputs, evaluator.references, [example.prompt for example in examples])
    return replace(scored, entry={**scored.entry, "custom": scores})


def _describe(recipe: Recipe, evaluator: Evaluator, failed: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the fields of results.json besides the scores: number of examples, generation settings, failures."""
    settings, sampling = recipe.evaluation, evaluator.spec.sampling
    return {
        "answers": len(evaluator.held_out.examples),
        "conversations": evaluator.held_out.conversations,
        "prompts": len(evaluator.prompts),
        "turns": settings.turns,
        "max_new_tokens": settings.max_new_tokens,
        "sampling": None if sampling is None else asdict(sampling),
        "backend": settings.backend,
        "failed": failed,
    }


def summarise_scores(
    scored_models: dict[str, ScoredModel], constant: ScoredModel, settings: EvaluationRecipe
) -> dict[str, Any]:
    """Return the content of results.json: scores, intervals and p-values of every model.

    Args:
        scored_models: The base model and the checkpoints, by name.
        constant: The constant baseline.
        settings: The recipe's `evaluation`; the first of `METRICS` that it names decides which checkpoint is best.
    """
    systems = {**scored_models, "constant": constant}
    checkpoints = sorted(
        (name for name in scored_models if name != "base"), key=lambda name: int(name.rpartition("-")[2])
    )
    judge = next(metric for metric in METRICS if metric in settings.metrics)
    with_scores = [name for name in checkpoints if judge in scored_models[name].scores]
    best = max(with_scores, key=lambda name: scored_models[name].scores[judge].score, default=None)
    rivals = {"base": "base", "constant": "constant", **({"best": best} if best else {})}
    entries = {}
    for name, system in systems.items():
        entries[name] = dict(system.entry)
        for metric, score in system.scores.items():
            p_values = {
                role: p_value(score, systems[rival].scores[metric]) for role, rival in rivals.items() if rival != name
            }
            entries[name][metric] = {**score.interval().as_dict(), "p": p_values}
    return {
        "base": entries["base"],
        "checkpoints": [entries[name] for name in checkpoints],
        "best": best,
        "constant": entries["constant"],
    }


def _run_benchmarks(
    tasks: list[LoadedTask], run: RunFolder, base: Path, evaluator: Evaluator, results: dict[str, Any]
) -> dict[str, Any]:
    """Return results.json with the benchmarks of the base model and of the checkpoints that still exist."""
    checkpoints = {entry["checkpoint"]: run.checkpoints / entry["checkpoint"] for entry in results["checkpoints"]}
    models = {"base": base, **{name: path for name, path in checkpoints.items() if path.exists()}}
    found = run_benchmarks(tasks, models, evaluator.spec, evaluator.settings.batch_size, evaluator.folder)
    results = {**results, "benchmarks": found}
    write_atomically(results_path(run.root), dump_json(results, indent=1) + "\n")
    return results


def _judge(
    settings: JudgeRecipe,
    run: RunFolder,
    evaluator: Evaluator,
    scored_models: dict[str, ScoredModel],
    results: dict[str, Any],
) -> dict[str, Any]:
    """Return results.json with the verdicts of the judge on held-out answers and the user's own prompts."""
    names = ["base", *(entry["checkpoint"] for entry in results["checkpoints"])]
    outputs = {name: [*scored_models[name].outputs, *scored_models[name].prompted] for name in names}
    examples = [*evaluator.held_out.examples, *evaluator.prompts]
    results = {**results, "judge": judge_answers(settings, examples, outputs, evaluator.folder / "judge")}
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


_WIDE = 100  # characters; a narrower terminal shows neither perplexity nor seconds


def print_table(results: dict[str, Any]) -> None:
    """Print the scores of all models, the best one marked, with 95 % intervals if there are enough conversations."""
    if not results["answers"]:
        say("There are no held-out conversations, so nothing is scored.")
        for failure in results["failed"]:
            say(f"{failure['checkpoint']}: {_failure(failure)}", style="yellow")
        return
    rows = [("base", results["base"]), *((c["checkpoint"], c) for c in results["checkpoints"])]
    rows.append(("constant", results["constant"]))
    metrics = [metric for metric in METRIC_NAMES if metric in results["base"]]
    columns = ["loss", "perplexity", *metrics, *results["base"].get("custom", {}), "exact", "seconds"]
    if console.width < _WIDE:
        columns = [column for column in columns if column not in ("perplexity", "seconds")]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for column in columns:
        table.add_column(METRIC_NAMES.get(column, column), justify="right", no_wrap=True)
    for name, entry in rows:
        best = name == results["best"]
        cells = [f"{name} ({best_label(results)})" if best else name, *(_cell(column, entry) for column in columns)]
        table.add_row(*map(Text, cells), style="bold" if best else "")
    for failure in results["failed"]:
        table.add_row(Text(failure["checkpoint"]), Text(_failure(failure)), style="yellow")
    turns = "the last answer of each conversation" if results["turns"] == "last" else "all answers"
    console.print(f"{results['answers']} held-out replies ({turns}){', 95 % intervals' * is_reliable(results)}:")
    console.print(table)
    if reason := unreliability_reason(results):
        say(f"{reason}.")
    console.print(Text.assemble("constant: always ", repr(results["constant"]["text"])))


def _failure(failure: dict[str, Any]) -> str:
    return "removed" if failure.get("removed") else "damaged"


def _cell(column: str, entry: dict[str, Any]) -> str:
    """Return the text of a model's score in one column."""
    if column in METRIC_NAMES:
        score = entry[column]
        interval = f" [{score['low']:.1f}, {score['high']:.1f}]" if is_reliable(score) else ""
        return f"{score['score']:.1f}{interval}"
    if column in entry.get("custom", {}):
        score = entry["custom"][column]
        return f"{score['score']:.4g}" + (f" [{score['low']:.4g}, {score['high']:.4g}]" if is_reliable(score) else "")
    if column == "exact":
        return f"{100 * entry['exact_match']:.0f} %"
    value = entry.get(column)
    return "" if value is None else f"{value:,.{ {'loss': 4, 'perplexity': 2, 'seconds': 1}[column] }f}"
