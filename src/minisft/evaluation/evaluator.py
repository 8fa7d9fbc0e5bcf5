"""Answers and held-out loss of one model, taken from the result cache where they are there."""

import functools
import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from minisft.console import answer_progress, warn
from minisft.data.encoder import Encoder
from minisft.errors import UserError
from minisft.evaluation.backends import AnswerTask, LossTask, ModelSpec, Workers
from minisft.evaluation.examples import EvalExample, HeldOutSet
from minisft.evaluation.generation import Generated, plan_batches
from minisft.evaluation.metrics import CorpusScore, exact_match, loss_batches, mean_loss
from minisft.evaluation.result_files import ResultCache, write_examples, write_outputs, write_prompts
from minisft.models import is_adapter, weights_fingerprint
from minisft.recipe import METRICS, EvaluationRecipe

VERSION = 2  # of the decoding and the loss: raise it where they give other results, and all is computed anew
# vLLM fills the GPU from one queue: it is handed more at a time.
_VLLM_BATCH = 1024


@dataclass(frozen=True)
class ScoredModel:
    """What gives answers to all the questions: the base model, a checkpoint or the constant answer.

    Args:
        entry: its fields in results.json, its scores not yet among them.
        outputs: its answers.
        scores: BLEU and chrF of them, as far as the recipe asks for these.
        prompted: its answers to the prompts of the user's own.
    """

    entry: dict[str, Any]
    outputs: list[str]
    scores: dict[str, CorpusScore]
    prompted: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluator:
    """Asks one model after the other.

    Args:
        settings: of the evaluation.
        encoder: of the run's template.
        held_out: the questions with a reference.
        prompts: the user's own, without.
        folder: `<output>/evaluation`.
        spec: how models answer; its `weights` are each model's in turn.
        workers: who does the work.
    """

    settings: EvaluationRecipe
    encoder: Encoder
    held_out: HeldOutSet
    prompts: list[EvalExample]
    folder: Path
    spec: ModelSpec
    workers: Workers

    @property
    def references(self) -> list[str]:
        return [example.reference for example in self.held_out.examples]

    def score_constant(self, text: str) -> ScoredModel:
        """The system that always says `text`."""
        outputs = [text] * len(self.references)
        return ScoredModel({"text": text, **self._exact_match(outputs)}, outputs, self._score(outputs))

    def evaluate_model(self, name: str, weights: Path) -> ScoredModel:
        """Answers and loss of one model, computed where the journal lacks them, and written.

        Of a checkpoint that is gone, what the journal has.

        Raises:
            UserError: the model is damaged or unfinished, or went before all was computed.
        """
        path = self.folder / name / "journal.jsonl"
        if not weights.exists():
            return self._load_cached(name, weights, ResultCache(path, None, _settings_hash(self.spec)))
        spec = replace(self.spec, weights=weights)
        cache = ResultCache(path, _cache_key(spec), _settings_hash(spec))
        self._compute_loss(spec, cache)
        self._compute_answers(name, spec, cache)
        return self._write(name, cache)

    def _load_cached(self, name: str, weights: Path, cache: ResultCache) -> ScoredModel:
        asked = [example.prompt_ids for example in (*self.held_out.examples, *self.prompts)]
        if cache.has_loss(self.held_out.rows_fingerprint) and all(cache.has_answer(ids) for ids in asked):
            return self._write(name, cache)
        raise UserError(weights, "it was removed before all of it was scored", "keep more: training.keep_checkpoints")

    def _compute_loss(self, spec: ModelSpec, cache: ResultCache) -> None:
        rows = self.held_out.rows_fingerprint
        if cache.has_loss(rows):
            return
        tasks = [LossTask(batch) for batch in loss_batches(self.held_out.rows)]
        done = {outcome.task: outcome for outcome in self.workers.perform(replace(spec, backend="transformers"), tasks)}
        loss, _ = mean_loss(done[number].value for number in range(len(tasks)))
        seconds = sum(outcome.seconds for outcome in done.values())
        cache.add_loss(rows, loss if math.isfinite(loss) else None, seconds)

    def _compute_answers(self, name: str, spec: ModelSpec, cache: ResultCache) -> None:
        asked = {tuple(example.prompt_ids) for example in self.held_out.examples}
        own = [prompt for prompt in self.prompts if tuple(prompt.prompt_ids) not in asked]
        tasks = self._missing(self.held_out.examples, cache) + self._missing(own, cache)
        with answer_progress(name, sum(len(task.prompts) for task in tasks)) as advance:
            for outcome in self.workers.perform(spec, tasks):
                prompts = tasks[outcome.task].prompts
                cache.add_answers(prompts, outcome.value, outcome.seconds)
                advance(len(prompts))

    def _missing(self, examples: Sequence[EvalExample], cache: ResultCache) -> list[AnswerTask]:
        """Batches over all questions, each prompt once, less what the journal has: resumed, they are the same ones."""
        prompts = list({tuple(example.prompt_ids): example.prompt_ids for example in examples}.values())
        size = _VLLM_BATCH if self.spec.backend == "vllm" else self.settings.batch_size
        batches = plan_batches([len(prompt) for prompt in prompts], size, self.settings.max_new_tokens)
        left = [[prompts[i] for i in batch if not cache.has_answer(prompts[i])] for batch in batches]
        return [AnswerTask(batch) for batch in left if batch]

    def _write(self, name: str, cache: ResultCache) -> ScoredModel:
        examples, folder = self.held_out.examples, self.folder / name
        answers = [cache.answer(example.prompt_ids) for example in examples]
        outputs = [self.encoder.decode_answer(answer.ids) for answer in answers]
        scores = self._score(outputs)
        write_outputs(folder, examples, answers, outputs, scores)
        write_examples(folder, examples[: self.settings.examples], outputs)
        prompted = [cache.answer(example.prompt_ids) for example in self.prompts]
        replies = [self.encoder.decode_answer(answer.ids) for answer in prompted]
        write_prompts(folder, self.prompts, prompted, replies)
        entry = self._entry(name, cache, answers, outputs)
        _warn_of_anomalies(name, entry, len(answers))
        return ScoredModel(entry, outputs, scores, replies)

    def _entry(self, name: str, cache: ResultCache, answers: list[Generated], outputs: list[str]) -> dict[str, Any]:
        rows = self.held_out.rows_fingerprint
        asked = [example.prompt_ids for example in (*self.held_out.examples, *self.prompts)]
        named: dict[str, Any] = {"checkpoint": name} if name != "base" else {}
        return named | {
            "step": int(name.rpartition("-")[2]) if name != "base" else 0,
            "loss": cache.loss(rows),
            "perplexity": _perplexity(cache.loss(rows)),
            "seconds": round(cache.seconds(rows, asked), 3),
            "finish": dict(Counter(answer.finish for answer in answers)),
            "empty": sum(not output.strip() for output in outputs),
            "mean_tokens": sum(len(answer.ids) for answer in answers) / len(answers) if answers else None,
            **self._exact_match(outputs),
        }

    def _exact_match(self, outputs: list[str]) -> dict[str, float]:
        return {"exact_match": exact_match(outputs, self.references)} if outputs else {}

    def _score(self, outputs: list[str]) -> dict[str, CorpusScore]:
        """Without held-out answers there is nothing to score."""
        wanted = [metric for metric in METRICS if metric in self.settings.metrics and outputs]
        return {metric: CorpusScore(metric, outputs, self.references) for metric in wanted}


def _cache_key(spec: ModelSpec) -> str:
    """Return a hash of everything but the prompt that an answer depends on."""
    how = _settings(spec)
    if spec.base is not None and is_adapter(spec.weights):
        how.append(_fingerprint(spec.base))
    return _hash([VERSION, weights_fingerprint(spec.weights), *how])


def _settings_hash(spec: ModelSpec) -> str:
    """A hash of the same without the weights."""
    return _hash([VERSION, *_settings(spec)])


def _settings(spec: ModelSpec) -> list[Any]:
    sampling = (spec.sampling.temperature, spec.sampling.top_p, spec.sampling.seed) if spec.sampling else None
    return [spec.stop_token_ids, spec.max_new_tokens, str(spec.dtype), sampling, spec.backend]


def _hash(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


@functools.cache
def _fingerprint(base: Path) -> str:
    """Of the base model of all adapters of a run: read once."""
    return weights_fingerprint(base)


def _perplexity(loss: float | None) -> float | None:
    return math.exp(loss) if loss is not None and loss < 700 else None


def _warn_of_anomalies(name: str, entry: dict[str, Any], answers: int) -> None:
    """Says what should not pass unseen."""
    if answers == 0:
        return
    if entry["loss"] is None:
        warn(f"{name}: the loss on the held-out rows is not a finite number")
    if entry["empty"] == answers:
        warn(f"{name}: every answer is empty, so BLEU is 0")
    elif cut := entry["finish"].get("context", 0):
        warn(f"{name}: {cut} of {answers} answers end, or are empty, because the model's context is full")
