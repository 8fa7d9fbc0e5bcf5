"""Base and every checkpoint of a run, scored on the held-out conversations: which one is best, and by how much."""

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisft.console import console, error_console, say, warn
from minisft.data.encoding import Encoder
from minisft.errors import UserError
from minisft.evaluation.examples import write_changes, write_examples, write_outputs
from minisft.evaluation.following import models_to_score, wait_for_data
from minisft.evaluation.generation import context_length, generate, inference_dtype
from minisft.evaluation.journal import Journal
from minisft.evaluation.loss import held_out_loss
from minisft.evaluation.questions import HeldOut, load_held_out, train_answers
from minisft.evaluation.scoring import CorpusScore, best_constant, exact_match, p_value
from minisft.evaluation.table import print_table
from minisft.files import write_atomically
from minisft.models import load_model, load_tokenizer, resolve_model, weights_fingerprint
from minisft.recipe import METRICS, EvaluationRecipe, Recipe
from minisft.runs import RunFolder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

VERSION = 1  # of the decoding and the loss: raise it where they give other results, and all is computed anew


@dataclass(frozen=True)
class System:
    """What gives answers to all the questions: the base model, a checkpoint or the constant answer.

    Args:
        entry: its fields in results.json, its scores not yet among them.
        outputs: its answers.
        scores: BLEU and chrF of them, as far as the recipe asks for these.
    """

    entry: dict[str, Any]
    outputs: list[str]
    scores: dict[str, CorpusScore]


def evaluate(
    recipe: Recipe,
    output: Path,
    *,
    follow: bool = False,
    as_json: bool = False,
    draw: Callable[[Path], object] | None = None,
    dtype: "torch.dtype | None" = None,
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

    Returns:
        The content of results.json.

    Raises:
        UserError: no checkpoints, no held-out rows, or `max_new_tokens` leaves no room for a prompt.
    """
    run = RunFolder(output)
    if follow:
        wait_for_data(run)
    else:
        _require_checkpoints(run)
    # 1. the same questions for all
    base = resolve_model(recipe.model, recipe.trust_remote_code).folder
    examiner, constant = _set_questions(recipe, output, base, dtype)
    # 2. a model after the other, the results written after each
    systems, results = _score_models(recipe, run, examiner, constant, models_to_score(run, base, follow), draw)
    # 3. what changed for the better and the worse, and the summary
    if (best := results["best"]) is not None:
        answers = (("base", systems["base"].outputs), (best, systems[best].outputs))
        write_changes(examiner.folder, *answers, examiner.held_out.questions)
    _report(results, examiner.folder, as_json)
    return results


def _set_questions(recipe: Recipe, output: Path, base: Path, dtype: "torch.dtype | None") -> tuple["_Examiner", System]:
    """What asks every model the same questions, and the constant answer's scores on them."""
    settings = recipe.evaluation
    encoder = Encoder(load_tokenizer(base, recipe.trust_remote_code), recipe.data.template)
    examiner = _Examiner(
        settings,
        encoder,
        load_held_out(output, encoder, settings.turns, settings.limit),
        output / "evaluation",
        dtype or inference_dtype(recipe.training.precision),
        recipe.trust_remote_code,
    )
    return examiner, examiner.repeat(best_constant(train_answers(output, encoder, settings.turns)))


def _score_models(
    recipe: Recipe,
    run: RunFolder,
    examiner: "_Examiner",
    constant: System,
    models: Iterable[tuple[str, Path]],
    draw: Callable[[Path], object] | None,
) -> tuple[dict[str, System], dict[str, Any]]:
    """Every model by name, and results.json, which is written after each; what cannot be scored stands in `failed`."""
    systems: dict[str, System] = {}
    failed: list[dict[str, str]] = []
    results: dict[str, Any] = {}
    for name, weights in models:
        try:
            systems[name] = examiner.examine(name, weights)
        except UserError as error:
            if name == "base":
                raise
            failed.append({"checkpoint": name, "error": f"{error.what}"})
            warn(f"{name} cannot be scored and is left out: {error.what}")
        results = summarise(systems, constant, recipe.evaluation) | {"failed": failed}
        write_atomically(examiner.folder / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        if draw is not None:
            draw(run.root)
    return systems, results


def summarise(systems: dict[str, System], constant: System, settings: EvaluationRecipe) -> dict[str, Any]:
    """The content of results.json: scores, intervals and significance of every system."""
    everyone = {**systems, "constant": constant}
    checkpoints = [name for name in systems if name != "base"]
    judge = next(metric for metric in METRICS if metric in settings.metrics)
    best = max(checkpoints, key=lambda name: systems[name].scores[judge].score, default=None)
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
        "answers": len(constant.outputs),
        "turns": settings.turns,
        "max_new_tokens": settings.max_new_tokens,
    }


def _significance(name: str, metric: str, everyone: dict[str, System], rivals: dict[str, str]) -> dict[str, float]:
    """The p-values of a system against each rival but itself."""
    mine = everyone[name].scores[metric]
    return {role: p_value(mine, everyone[rival].scores[metric]) for role, rival in rivals.items() if rival != name}


@dataclass
class _Examiner:
    settings: EvaluationRecipe
    encoder: Encoder
    held_out: HeldOut
    folder: Path
    dtype: "torch.dtype"
    trust_remote_code: bool

    def __post_init__(self) -> None:
        self._questions_key = self.held_out.fingerprint()
        self._references = [question.reference for question in self.held_out.questions]

    def repeat(self, text: str) -> System:
        """The system that always says `text`."""
        outputs = [text] * len(self._references)
        entry = {"text": text, "exact_match": exact_match(outputs, self._references)}
        return System(entry, outputs, self._score(outputs))

    def _score(self, outputs: list[str]) -> dict[str, CorpusScore]:
        wanted = [metric for metric in METRICS if metric in self.settings.metrics]
        return {metric: CorpusScore(metric, outputs, self._references) for metric in wanted}

    def examine(self, name: str, weights: Path) -> System:
        """Answers and loss of one model, from its journal as far as they are there.

        Raises:
            UserError: the model is damaged or unfinished.
        """
        journal = Journal(self.folder / name / "journal.jsonl", self._key(weights))
        missing = [i for i in range(len(self.held_out.questions)) if i not in journal.answers]
        if missing or not journal.has_loss:
            self._compute(name, self._load(weights), journal, missing)
        return self._write(name, journal)

    def _key(self, weights: Path) -> str:
        stops, new = self.encoder.stop_token_ids, self.settings.max_new_tokens
        parts = [VERSION, weights_fingerprint(weights), self._questions_key, stops, new, str(self.dtype)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _compute(self, name: str, model: "PreTrainedModel", journal: Journal, missing: list[int]) -> None:
        _require_room(model, self.settings.max_new_tokens)
        started = time.perf_counter()
        if not journal.has_loss:
            loss, _ = held_out_loss(model, self.held_out.rows)
            journal.add_loss(loss if math.isfinite(loss) else None, time.perf_counter() - started)
        prompts = [self.held_out.questions[index].prompt_ids for index in missing]
        with _Progress(name, len(prompts)) as advance:
            clock = time.perf_counter()

            def note(rows: list[int], answers: list[Any]) -> None:
                nonlocal clock
                now = time.perf_counter()
                journal.add_answers([missing[row] for row in rows], answers, now - clock)
                clock = now
                advance(len(rows))

            generate(
                model,
                prompts,
                stop_token_ids=self.encoder.stop_token_ids,
                max_new_tokens=self.settings.max_new_tokens,
                batch_size=self.settings.batch_size,
                on_batch=note,
            )

    def _load(self, weights: Path) -> "PreTrainedModel":
        import torch
        from safetensors import SafetensorError

        try:
            model = load_model(weights, dtype=self.dtype, trust_remote_code=self.trust_remote_code)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            if _is_out_of_memory(error):
                raise
            first = str(error).strip().split("\n")[0]
            raise UserError(weights, f"{type(error).__name__}: {first}", "train anew or delete it") from error
        return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()  # type: ignore[arg-type]

    def _write(self, name: str, journal: Journal) -> System:
        answers = [journal.answers[index] for index in range(len(self.held_out.questions))]
        outputs = [self.encoder.decode_answer(answer.ids) for answer in answers]
        scores = self._score(outputs)
        write_outputs(self.folder / name, self.held_out.questions, answers, outputs, scores)
        write_examples(self.folder / name, self.held_out.questions[: self.settings.examples], outputs)
        entry: dict[str, Any] = {"checkpoint": name} if name != "base" else {}
        entry |= {
            "step": int(name.rpartition("-")[2]) if name != "base" else 0,
            "loss": journal.loss,
            "perplexity": _perplexity(journal.loss),
            "seconds": round(journal.seconds, 3),
            "finish": dict(Counter(answer.finish for answer in answers)),
            "empty": sum(not output.strip() for output in outputs),
            "mean_tokens": sum(len(answer.ids) for answer in answers) / len(answers),
            "exact_match": exact_match(outputs, self._references),
        }
        _mark(name, entry, len(answers))
        return System(entry, outputs, scores)


def _require_checkpoints(run: RunFolder) -> None:
    if not run.list_checkpoints():
        raise UserError(run.checkpoints, "there are no checkpoints to evaluate", "train first: minisft train")


def _require_room(model: "PreTrainedModel", max_new_tokens: int) -> None:
    context = context_length(model)
    if context is not None and max_new_tokens >= context:
        raise UserError(
            "evaluation.max_new_tokens",
            f"{max_new_tokens} tokens leave no room for a prompt in the model's context of {context}",
            "give a smaller number",
        )


def _is_out_of_memory(error: Exception) -> bool:
    """Whether the machine failed, and not the file; torch has no class of its own for that on a CPU."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _perplexity(loss: float | None) -> float | None:
    return math.exp(loss) if loss is not None and loss < 700 else None


def _mark(name: str, entry: dict[str, Any], answers: int) -> None:
    """Says what should not pass unseen."""
    if entry["loss"] is None:
        warn(f"{name}: the loss on the held-out rows is not a finite number")
    if entry["empty"] == answers:
        warn(f"{name}: every answer is empty, so BLEU is 0")
    elif cut := entry["finish"].get("context", 0):
        warn(f"{name}: {cut} of {answers} answers end, or are empty, because the model's context is full")


class _Progress:
    """A bar on a terminal; elsewhere a line now and then."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.done, self.printed = name, total, 0, time.monotonic()

    def __enter__(self) -> Callable[[int], None]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self.bar = Progress(*columns, console=error_console, transient=True, disable=not error_console.is_terminal)
        self.task = self.bar.add_task(self.name, total=self.total)
        self.bar.start()
        return self.advance

    def advance(self, rows: int) -> None:
        self.done += rows
        self.bar.update(self.task, advance=rows)
        if not error_console.is_terminal and (self.done == self.total or time.monotonic() - self.printed > 10):
            self.printed = time.monotonic()
            error_console.print(f"{self.name}: {self.done} of {self.total} answers", markup=False)

    def __exit__(self, *error: object) -> None:
        self.bar.stop()


def _report(results: dict[str, Any], folder: Path, as_json: bool) -> None:
    if as_json:
        console.file.write(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        return
    print_table(results)
    say(f"All answers and examples: {folder}")
