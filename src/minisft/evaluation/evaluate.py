"""Base and every checkpoint of a run, scored on the held-out conversations: which one is best, and by how much."""

import fcntl
import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisft.console import console, error_console, say, warn
from minisft.data.encoding import Encoder
from minisft.errors import UserError
from minisft.evaluation.examples import write_changes, write_examples, write_outputs
from minisft.evaluation.generation import context_length, generate
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
_POLL_SECONDS = 5.0


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
        UserError: no checkpoints, no held-out rows, no metrics, or `max_new_tokens` leaves no room for a prompt.
    """
    run = RunFolder(output)
    folder = output / "evaluation"
    if not recipe.evaluation.metrics:
        raise UserError("evaluation.metrics", "there is none", f"name some of {', '.join(METRICS)}")
    if not follow:
        _require_checkpoints(run)
    # 1. the same questions for all
    model = resolve_model(recipe.model, recipe.trust_remote_code)
    encoder = Encoder(load_tokenizer(model.folder, recipe.trust_remote_code), recipe.data.template)
    held_out = load_held_out(output, encoder, recipe.evaluation.turns, recipe.evaluation.limit)
    examiner = _Examiner(
        recipe.evaluation, encoder, held_out, folder, dtype or _choose_dtype(recipe), recipe.trust_remote_code
    )
    constant = examiner.repeat(best_constant(train_answers(output, encoder, recipe.evaluation.turns)))
    # 2. a model after the other, the results written after each
    systems: dict[str, System] = {}
    failed: list[dict[str, str]] = []
    results: dict[str, Any] = {}
    for name, weights in _models(run, model.folder, follow):
        try:
            systems[name] = examiner.examine(name, weights)
        except UserError as error:
            if name == "base":
                raise
            failed.append({"checkpoint": name, "error": f"{error.what}"})
            warn(f"{name} cannot be scored and is left out: {error.what}")
        results = summarise(systems, constant, recipe.evaluation) | {"failed": failed}
        write_atomically(folder / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        if draw is not None:
            draw(output)
    # 3. what changed for the better and the worse, and the summary
    if (best := results["best"]) is not None:
        answers = (("base", systems["base"].outputs), (best, systems[best].outputs))
        write_changes(folder, *answers, held_out.questions)
    _report(results, folder, as_json)
    return results


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
            try:
                self._compute(name, weights, journal, missing)
            except UserError:
                raise
            except Exception as error:  # a damaged file fails in as many ways as there are libraries
                first = str(error).strip().split("\n")[0]
                raise UserError(weights, f"{type(error).__name__}: {first}", "train anew or delete it") from error
        return self._write(name, journal)

    def _key(self, weights: Path) -> str:
        stops, new = self.encoder.stop_token_ids, self.settings.max_new_tokens
        parts = [VERSION, weights_fingerprint(weights), self._questions_key, stops, new, str(self.dtype)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _compute(self, name: str, weights: Path, journal: Journal, missing: list[int]) -> None:
        model = self._load(weights)
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

        model = load_model(weights, dtype=self.dtype, trust_remote_code=self.trust_remote_code)
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


def _models(run: RunFolder, base: Path, follow: bool) -> Iterator[tuple[str, Path]]:
    """The base model, then the checkpoints by number; under `follow` also those still to come."""
    yield "base", base
    seen: set[Path] = set()
    began = False
    while True:
        goes_on = follow and _is_locked(run)
        began = began or goes_on
        # looked at before listing, so that nothing comes after; training that died ends the wait too
        ended = not follow or run.is_trained() or (began and not goes_on)
        for checkpoint in _checkpoints(run):
            if checkpoint not in seen:
                seen.add(checkpoint)
                yield checkpoint.name, checkpoint
        if ended:
            return
        time.sleep(_POLL_SECONDS)


def _is_locked(run: RunFolder) -> bool:
    """Whether training is at work in the run folder."""
    lock = run.root / ".lock"
    if not lock.exists():
        return False
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _checkpoints(run: RunFolder) -> list[Path]:
    folders = [
        path for path in run.checkpoints.glob("checkpoint-*") if path.is_dir() and path.name.partition("-")[2].isdigit()
    ]
    return sorted(folders, key=lambda path: int(path.name.partition("-")[2]))


def _require_checkpoints(run: RunFolder) -> None:
    if not _checkpoints(run):
        raise UserError(run.checkpoints, "there are no checkpoints to evaluate", "train first: minisft train")


def _require_room(model: "PreTrainedModel", max_new_tokens: int) -> None:
    context = context_length(model)
    if context is not None and max_new_tokens >= context:
        raise UserError(
            "evaluation.max_new_tokens",
            f"{max_new_tokens} tokens leave no room for a prompt in the model's context of {context}",
            "give a smaller number",
        )


def _choose_dtype(recipe: Recipe) -> "torch.dtype":
    import torch

    if recipe.training.precision == "fp32" or not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float16


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
