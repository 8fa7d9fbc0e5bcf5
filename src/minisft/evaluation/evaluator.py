"""Answers and held-out loss of one model, read from the result cache if they were computed before."""

import functools
import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from minisft.console import answer_progress, waiting, warn
from minisft.data.encoder import Encoder
from minisft.errors import UserError
from minisft.evaluation.backends import AnswerTask, LossTask, ModelSpec, Workers
from minisft.evaluation.examples import EvalExample, HeldOutSet
from minisft.evaluation.generation import plan_batches
from minisft.evaluation.metrics import CorpusScore, exact_match, loss_batches, mean_loss
from minisft.evaluation.result_files import ResultCache, write_examples, write_outputs, write_prompts
from minisft.models import is_adapter, weights_fingerprint
from minisft.recipe import METRICS, EvaluationRecipe

VERSION = 2  # of the decoding and the loss: raise it when their results change, so that cached ones are not used
# vLLM schedules its own batches from one queue, which should not run empty.
_VLLM_BATCH = 1024


@dataclass(frozen=True)
class ScoredModel:
    """The base model, a checkpoint or the constant baseline, with its answers to all examples.

    Args:
        entry: Its fields in results.json, still without the scores.
        outputs: Its answers to the held-out examples.
        scores: BLEU and chrF of the answers, as far as the recipe names them.
        prompted: Its answers to the user's own prompts.
    """

    entry: dict[str, Any]
    outputs: list[str]
    scores: dict[str, CorpusScore]
    prompted: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluator:
    """Scores one model after the other on the same examples.

    Args:
        settings: The recipe's `evaluation`.
        encoder: Encoder of the run's template.
        held_out: The examples that have a reference.
        prompts: The user's own prompts, which have no reference.
        folder: `<output>/evaluation`.
        spec: Generation settings; `evaluate_model` replaces its `weights` by those of each model.
        workers: The processes that generate and compute losses.
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
        """Score the constant baseline, whose every answer is `text`."""
        outputs = [text] * len(self.references)
        return ScoredModel({"text": text, **self._exact_match(outputs)}, outputs, self._score(outputs))

    def evaluate_model(self, name: str, weights: Path) -> ScoredModel:
        """Compute what the result cache lacks of one model's loss and answers, and write the model's files.

        Of a checkpoint that was removed, everything must be in the cache.

        Raises:
            UserError: The model is damaged or incomplete, or was removed before everything was computed.
        """
        path = self.folder / name / "journal.jsonl"
        if not weights.exists():
            cache = ResultCache(path, None, _settings_hash(self.spec))
            prompts = [example.prompt_ids for example in (*self.held_out.examples, *self.prompts)]
            if cache.has_loss(self.held_out.rows_fingerprint) and all(cache.has_answer(ids) for ids in prompts):
                return self._write(name, cache)
            problem = "it was removed before all of it was scored"
            raise UserError(weights, problem, "keep more: training.keep_checkpoints")
        spec = replace(self.spec, weights=weights)
        cache = ResultCache(path, _cache_key(spec), _settings_hash(spec))
        with waiting(f"{name}: computing the held-out loss"):
            self._compute_loss(spec, cache)
        # prompts that are also held-out examples are answered only once
        held_out = {tuple(example.prompt_ids) for example in self.held_out.examples}
        own = [prompt for prompt in self.prompts if tuple(prompt.prompt_ids) not in held_out]
        tasks = self._missing(self.held_out.examples, cache) + self._missing(own, cache)
        with answer_progress(name, sum(len(task.prompts) for task in tasks)) as advance:
            for outcome in self.workers.perform(spec, tasks):
                batch = tasks[outcome.task].prompts
                cache.add_answers(batch, outcome.value, outcome.seconds)
                advance(len(batch))
        return self._write(name, cache)

    def _compute_loss(self, spec: ModelSpec, cache: ResultCache) -> None:
        rows = self.held_out.rows_fingerprint
        if cache.has_loss(rows):
            return
        tasks = [LossTask(batch) for batch in loss_batches(self.held_out.rows)]
        done = {outcome.task: outcome for outcome in self.workers.perform(replace(spec, backend="transformers"), tasks)}
        # summed in the order of the batches, so that the loss has the same bits for any number of processes
        loss, _ = mean_loss(done[number].value for number in range(len(tasks)))
        seconds = sum(outcome.seconds for outcome in done.values())
        cache.add_loss(rows, loss if math.isfinite(loss) else None, seconds)

    def _missing(self, examples: Sequence[EvalExample], cache: ResultCache) -> list[AnswerTask]:
        """Return batches of the prompts without a cached answer, each prompt once.

        All prompts are batched before the answered ones are left out: a resumed evaluation has the same batches.
        """
        prompts = list({tuple(example.prompt_ids): example.prompt_ids for example in examples}.values())
        size = _VLLM_BATCH if self.spec.backend == "vllm" else self.settings.batch_size
        batches = plan_batches([len(prompt) for prompt in prompts], size, self.settings.max_new_tokens)
        left = [[prompts[i] for i in batch if not cache.has_answer(prompts[i])] for batch in batches]
        return [AnswerTask(batch) for batch in left if batch]

    def _write(self, name: str, cache: ResultCache) -> ScoredModel:
        examples, folder = self.held_out.examples, self.folder / name
        answers = [cache.answer(example.prompt_ids) for example in examples]
        split = [self.encoder.split_answer(answer.ids) for answer in answers]
        reasoning, outputs = [thought for thought, _ in split], [output for _, output in split]
        scores = self._score(outputs)
        write_outputs(folder, examples, answers, outputs, reasoning, scores)
        write_examples(folder, examples[: self.settings.examples], outputs, reasoning)
        prompted = [cache.answer(example.prompt_ids) for example in self.prompts]
        split_replies = [self.encoder.split_answer(answer.ids) for answer in prompted]
        replies = [reply for _, reply in split_replies]
        write_prompts(folder, self.prompts, prompted, replies, [thought for thought, _ in split_replies])
        # the model's entry of results.json
        rows = self.held_out.rows_fingerprint
        prompts = [example.prompt_ids for example in (*examples, *self.prompts)]
        loss = cache.loss(rows)
        entry: dict[str, Any] = {"checkpoint": name} if name != "base" else {}
        entry |= {
            "step": int(name.rpartition("-")[2]) if name != "base" else 0,
            "loss": loss,
            "perplexity": math.exp(loss) if loss is not None and loss < 700 else None,  # e^710 overflows
            "seconds": round(cache.seconds(rows, prompts), 3),
            "finish": dict(Counter(answer.finish for answer in answers)),
            "empty": sum(not output.strip() for output in outputs),
            "mean_tokens": sum(len(answer.ids) for answer in answers) / len(answers) if answers else None,
            **self._exact_match(outputs),
        }
        # warnings of what a reader of the scores should know
        if answers and loss is None:
            warn(f"{name}: the loss on the held-out rows is not a finite number")
        if answers and entry["empty"] == len(answers):
            warn(f"{name}: every answer is empty, so BLEU is 0")
        elif cut := entry["finish"].get("context", 0):
            warn(f"{name}: {cut} of {len(answers)} answers end, or are empty, because the model's context is full")
        return ScoredModel(entry, outputs, scores, replies)

    def _exact_match(self, outputs: list[str]) -> dict[str, float]:
        return {"exact_match": exact_match(outputs, self.references)} if outputs else {}

    def _score(self, outputs: list[str]) -> dict[str, CorpusScore]:
        """Return the scores of the recipe's metrics; none if there are no held-out answers."""
        wanted = [metric for metric in METRICS if metric in self.settings.metrics and outputs]
        return {metric: CorpusScore(metric, outputs, self.references) for metric in wanted}


def _cache_key(spec: ModelSpec) -> str:
    """Return a hash of everything that an answer depends on besides its prompt."""
    settings = _settings(spec)
    if spec.base is not None and is_adapter(spec.weights):
        settings.append(_base_fingerprint(spec.base))
    return _hash([VERSION, weights_fingerprint(spec.weights), *settings])


def _settings_hash(spec: ModelSpec) -> str:
    """Return a hash of the same without the weights."""
    return _hash([VERSION, *_settings(spec)])


def _settings(spec: ModelSpec) -> list[Any]:
    sampling = (spec.sampling.temperature, spec.sampling.top_p, spec.sampling.seed) if spec.sampling else None
    return [spec.stop_token_ids, spec.max_new_tokens, str(spec.dtype), sampling, spec.backend]


def _hash(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


@functools.cache
def _base_fingerprint(base: Path) -> str:
    """Return the fingerprint of an adapter's base model; cached, since all checkpoints have the same base."""
    return weights_fingerprint(base)
