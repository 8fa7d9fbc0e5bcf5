"""Evaluation of a run: the base model and every checkpoint scored, and which checkpoint is best."""

import contextlib
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
from minisft.evaluation.custom_metrics import CustomMetric, check_custom_metrics, score_custom
from minisft.evaluation.evaluator import Evaluator, ScoredModel
from minisft.evaluation.examples import load_held_out, load_prompts, train_answers
from minisft.evaluation.generation import Sampling, context_length, inference_dtype
from minisft.evaluation.metrics import best_constant, p_value
from minisft.evaluation.monitor import models_to_score, wait_for_data
from minisft.evaluation.result_files import write_changes, write_side_by_side
from minisft.files import hold_lock, write_atomically
from minisft.models import load_config, load_tokenizer, resolve_model, weights_fingerprint
from minisft.recipe import METRICS, EvaluationRecipe, Recipe
from minisft.results import best_label, is_reliable, results_path, unreliability_reason, withhold_unreliable
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
) -> dict[str, Any]:
    """Score the base model and every checkpoint, write `<output>/evaluation` and print a table.

    What was computed before for the same weights, prompts and settings is taken from there.

    Args:
        recipe: the run's recipe.
        output: the run folder.
        follow: go on until the training that writes into the folder has ended.
        as_json: print results.json on stdout in place of the table.
        draw: called with the run folder whenever results.json has changed (the report's curves).
        dtype: of the weights; None: fp32 on a CPU or where the recipe trains in it, else bf16 or fp16.
        custom_metrics: the caller's own metrics by name, f(outputs, references, prompts) -> a number for each answer.

    Returns:
        The content of results.json; checkpoints that could not be scored stand in `failed`.

    Raises:
        UserError: no checkpoints, neither held-out rows nor prompts of the user's own, a base model that is not the
            run's, `max_new_tokens` that leave no room for a prompt, or another evaluation at work in the folder.
    """
    custom = check_custom_metrics(custom_metrics or {})
    run = RunFolder(output)
    if follow:
        wait_for_data(run)
    else:
        _require_checkpoints(run)
    with _exclusive(output / "evaluation"):
        # 1. the same questions for all
        base = _find_base(recipe, run)
        with Workers(recipe.evaluation.processes or default_processes()) as workers:
            evaluator, constant = _load_examples(recipe, output, base, dtype, workers)
            constant = _with_custom("constant", constant, evaluator, custom)
            # 2. a model after the other, the results written after each
            scored_models, results = _score_models(
                recipe, run, evaluator, constant, models_to_score(run, base, follow), draw, custom
            )
        # 3. what changed for the better and the worse, the user's own prompts, and the summary
        _write_comparisons(evaluator, scored_models, results["best"])
    _report(results, evaluator.folder, as_json)
    return results


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Hold the folder of an evaluation: two would write one journal."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(hold_lock(folder / ".lock"))
        except BlockingIOError:
            raise UserError(folder, "another evaluation is at work here", "wait for it to end") from None
        yield


def _find_base(recipe: Recipe, run: RunFolder) -> Path:
    """The folder of the base model, which must be what the run began with and have room for answers."""
    resolved = resolve_model(recipe.model, recipe.trust_remote_code)
    require_same_base_model(run, str(resolved), weights_fingerprint(resolved.folder))
    if recipe.evaluation.backend == "vllm":
        require_vllm()
    _require_context(resolved.folder, recipe.evaluation.max_new_tokens, recipe.trust_remote_code)
    return resolved.folder


def _load_examples(
    recipe: Recipe, output: Path, base: Path, dtype: "torch.dtype | None", workers: Workers
) -> tuple[Evaluator, ScoredModel]:
    """What asks every model the same questions, and the constant answer's scores on them."""
    settings = recipe.evaluation
    encoder = Encoder(load_tokenizer(base, recipe.trust_remote_code), recipe.data.template)
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
        ),
        workers,
    )
    return evaluator, evaluator.score_constant(best_constant(train_answers(output, encoder, settings.turns)))


def _write_comparisons(evaluator: Evaluator, scored_models: dict[str, ScoredModel], best: str | None) -> None:
    if best is not None:
        answers = (("base", scored_models["base"].outputs), (best, scored_models[best].outputs))
        write_changes(evaluator.folder, *answers, evaluator.held_out.examples)
    prompted = {name: system.prompted for name, system in scored_models.items()}
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
    """Every model by name, and results.json, which is written after each; what cannot be scored stands in `failed`."""
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
        else:  # an error of the caller's own metric is no fault of the checkpoint
            scored_models[name] = _with_custom(name, scored_models[name], evaluator, custom)
        results = withhold_unreliable(
            summarise_scores(scored_models, constant, recipe.evaluation) | _facts(recipe, evaluator, failed)
        )
        write_atomically(results_path(run.root), dump_json(results, indent=1) + "\n")
        if draw is not None:
            draw(run.root)
    return scored_models, results


def _with_custom(
    name: str, scored: ScoredModel, evaluator: Evaluator, custom: Mapping[str, CustomMetric]
) -> ScoredModel:
    """Return the scores of a model with those of the caller's own metrics in its entry, under `custom`."""
    if not custom:
        return scored
    examples = evaluator.held_out.examples
    scores = score_custom(custom, name, scored.outputs, evaluator.references, [example.prompt for example in examples])
    return replace(scored, entry={**scored.entry, "custom": scores})


def summarise_scores(
    scored_models: dict[str, ScoredModel], constant: ScoredModel, settings: EvaluationRecipe
) -> dict[str, Any]:
    """The content of results.json: scores, intervals and significance of every system."""
    everyone = {**scored_models, "constant": constant}
    checkpoints = sorted(
        (name for name in scored_models if name != "base"), key=lambda name: int(name.rpartition("-")[2])
    )
    judge = next(metric for metric in METRICS if metric in settings.metrics)
    scored = [name for name in checkpoints if judge in scored_models[name].scores]
    best = max(scored, key=lambda name: scored_models[name].scores[judge].score, default=None)
    rivals = {"base": "base", "constant": "constant", **({"best": best} if best else {})}
    entries = {
        name: {
            **system.entry,
            **{
                metric: {**score.interval().as_dict(), "p": _significance(name, metric, everyone, rivals)}
                for metric, score in system.scores.items()
            },
        }
        for name, system in everyone.items()
    }
    return {
        "base": entries["base"],
        "checkpoints": [entries[name] for name in checkpoints],
        "best": best,
        "constant": entries["constant"],
    }


def _facts(recipe: Recipe, evaluator: Evaluator, failed: list[dict[str, Any]]) -> dict[str, Any]:
    """What else results.json says: how the answers came about, and what has none."""
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


def _significance(name: str, metric: str, everyone: dict[str, ScoredModel], rivals: dict[str, str]) -> dict[str, float]:
    """The p-values of a system against each rival but itself."""
    mine = everyone[name].scores[metric]
    return {role: p_value(mine, everyone[rival].scores[metric]) for role, rival in rivals.items() if rival != name}


def require_all_scored(results: dict[str, Any], run: RunFolder) -> None:
    """Say which checkpoints an evaluation could not score because they are damaged or unfinished.

    Checkpoints that were removed, as `training.keep_checkpoints` does, are none of these.

    Raises:
        UserError: there are some; all others are scored, and results.json is written.
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


def _require_checkpoints(run: RunFolder) -> None:
    if not run.list_checkpoints():
        raise UserError(run.checkpoints, "there are no checkpoints to evaluate", "train first: minisft train")


def _require_context(base: Path, max_new_tokens: int, trust_remote_code: bool) -> None:
    context = context_length(load_config(base, trust_remote_code))
    if context is not None and max_new_tokens >= context:
        raise UserError(
            "evaluation.max_new_tokens",
            f"{max_new_tokens} tokens leave no room for a prompt in the model's context of {context}",
            "give a smaller number",
        )


def _report(results: dict[str, Any], folder: Path, as_json: bool) -> None:
    if as_json:
        console.file.write(dump_json(results, indent=1) + "\n")
        return
    print_table(results)
    say(f"All answers and examples: {folder}")


_NAMES = {"bleu": "BLEU", "chrf": "chrF"}
_WIDE = 100  # characters; a narrower terminal gets neither perplexity nor seconds


def print_table(results: dict[str, Any]) -> None:
    """Base, checkpoints and constant, the best one marked; 95 % intervals, where they do not claim too much."""
    if not results["answers"]:
        say("There are no held-out conversations, so nothing is scored.")
        _say_failures(results)
        return
    rows = [("base", results["base"]), *((c["checkpoint"], c) for c in results["checkpoints"])]
    rows.append(("constant", results["constant"]))
    metrics = [metric for metric in _NAMES if metric in results["base"]]
    columns = ["loss", "perplexity", *metrics, *results["base"].get("custom", {}), "exact", "seconds"]
    if console.width < _WIDE:
        columns = [column for column in columns if column not in ("perplexity", "seconds")]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for column in columns:
        table.add_column(_NAMES.get(column, column), justify="right", no_wrap=True)
    for name, entry in rows:
        best = name == results["best"]
        cells = [f"{name} ({best_label(results)})" if best else name, *(_cell(column, entry) for column in columns)]
        table.add_row(*map(Text, cells), style="bold" if best else "")
    for failure in results["failed"]:
        table.add_row(Text(failure["checkpoint"]), Text(_failure(failure)), style="yellow")
    which = "the last answer of each conversation" if results["turns"] == "last" else "all answers"
    console.print(f"{results['answers']} held-out replies ({which}){', 95 % intervals' * is_reliable(results)}:")
    console.print(table)
    if reason := unreliability_reason(results):
        say(f"{reason}.")
    console.print(Text.assemble("constant: always ", repr(results["constant"]["text"])))


def _say_failures(results: dict[str, Any]) -> None:
    for failure in results["failed"]:
        say(f"{failure['checkpoint']}: {_failure(failure)}", style="yellow")


def _failure(failure: dict[str, Any]) -> str:
    return "removed" if failure.get("removed") else "damaged"


def _cell(column: str, entry: dict[str, Any]) -> str:
    if column in _NAMES:
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
