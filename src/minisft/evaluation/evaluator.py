"""Answers and held-out loss of one model, read from the result cache if they were computed before."""

import functools
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from minisft.console import answer_progress, waiting, warn
from minisft.data.encoder import Encoder
from minisft.errors import UserError
from minisft.evaluation.backends import AnswerTask, LossTask, ModelSpec, Workers
from minisft.evaluation.custom_metrics import CUSTOM, RowMetric
from minisft.evaluation.examples import EvalExample, HeldOutSet
from minisft.evaluation.generation import Generated, plan_batches
from minisft.evaluation.metrics import CorpusScore, Score, exact_match, loss_batches, mean_loss
from minisft.evaluation.result_files import ResultCache, write_examples, write_outputs, write_prompts
from minisft.evaluation.retention import RetainedLoss, RetainedTexts
from minisft.metric_names import METRICS, parse_metrics
from minisft.models import is_adapter, weights_fingerprint
from minisft.recipe import EvaluationRecipe

VERSION = 2  # of the decoding and the loss: raise it when their results change, so that cached ones are not used
# vLLM schedules its own batches from one queue, which should not run empty.
_VLLM_BATCH = 1024


@dataclass(frozen=True)
class SetScores:
    """One model's scores on one test set, or on all of them together.

    Args:
        entry: Its fields in results.json, still without the scores.
        scores: The scores of the recipe's metrics and of the caller's, by key.
    """

    entry: dict[str, Any]
    scores: dict[str, Score]


@dataclass(frozen=True)
class ScoredModel:
    """The base model, a checkpoint or the constant baseline, with its answers to all examples.

    Args:
        entry: Its fields in results.json, still without the scores; of the first test set.
        outputs: Its answers to the held-out examples of all test sets.
        scores: The scores on the first test set, by key.
        prompted: Its answers to the user's own prompts.
        test_sets: Its scores on each test set; {} if `data.test` names none.
        together: Its scores on all test sets together.
        retained: Its losses on the texts of `evaluation.retain`.
    """

    entry: dict[str, Any]
    outputs: list[str]
    scores: Mapping[str, Score]
    prompted: list[str] = field(default_factory=list)
    test_sets: dict[str, SetScores] = field(default_factory=dict)
    together: SetScores | None = None
    retained: RetainedLoss | None = None


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
        row_metrics: The metrics besides BLEU and chrF.
        retained: The texts of `evaluation.retain`.
        failures: The errors of metrics that failed, by key; filled while models are scored. A metric that failed on one
            model is not computed for others.
    """

    settings: EvaluationRecipe
    encoder: Encoder
    held_out: HeldOutSet
    prompts: list[EvalExample]
    folder: Path
    spec: ModelSpec
    workers: Workers
    row_metrics: Sequence[RowMetric] = ()
    retained: RetainedTexts | None = None
    failures: dict[str, UserError] = field(default_factory=dict)

    @property
    def references(self) -> list[str]:
        return [example.reference for example in self.held_out.examples]

    def score_constant(self, text: str) -> ScoredModel:
        """Score the constant baseline, whose every answer is `text`."""
        outputs = [text] * len(self.references)
        scored = {name: self._score_set("constant", one, own, {}) for name, one, own in self._sets(outputs)}
        together = scored.pop("")
        first = next(iter(scored.values()), together)
        entry = {"text": text, **first.entry}
        return ScoredModel(entry, outputs, first.scores, test_sets=scored, together=together if scored else None)

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
            if self._has_losses(cache) and all(cache.has_answer(ids) for ids in prompts):
                return self._write(name, cache)
            problem = "it was removed before all of it was scored"
            raise UserError(weights, problem, "keep more: training.keep_checkpoints")
        spec = replace(self.spec, weights=weights)
        cache = ResultCache(path, _cache_key(spec), _settings_hash(spec))
        with waiting(f"{name}: computing the held-out loss"):
            for one in self.held_out.test_sets.values() or [self.held_out]:
                self._compute_loss(one, spec, cache)
        if self.retained is not None:
            with waiting(f"{name}: computing the loss on {self.retained.path.name}"):
                self.retained.compute(self.workers, replace(spec, backend="transformers"), cache)
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

    def _has_losses(self, cache: ResultCache) -> bool:
        sets = self.held_out.test_sets.values() or [self.held_out]
        has_all = all(cache.has_loss(one.rows_fingerprint) for one in sets)
        return has_all and (self.retained is None or self.retained.is_in(cache))

    def _compute_loss(self, held_out: HeldOutSet, spec: ModelSpec, cache: ResultCache) -> None:
        rows = held_out.rows_fingerprint
        if cache.has_loss(rows):
            return
        tasks = [LossTask(batch) for batch in loss_batches(held_out.rows)]
        done = {outcome.task: outcome for outcome in self.workers.perform(replace(spec, backend="transformers"), tasks)}
        # summed in the order of the batches, so that the loss has the same bits for any number of processes
        loss, _ = mean_loss(done[number].value for number in range(len(tasks)))
        seconds = sum(outcome.seconds for outcome in done.values())
        cache.add_loss(rows, loss if math.isfinite(loss) else None, seconds)

    def _missing(self, examples: Sequence[EvalExample], cache: ResultCache) -> list[AnswerTask]:
        """Return batches of the prompts without a cached answer, each prompt once; a process divides them if it must.

        All prompts are batched before the answered ones are left out: a resumed evaluation has the same batches.
        """
        prompts = list({tuple(example.prompt_ids): example.prompt_ids for example in examples}.values())
        size = _VLLM_BATCH if self.spec.backend == "vllm" else self.settings.batch_size
        batches = plan_batches([len(prompt) for prompt in prompts], size)
        left = [[prompts[i] for i in batch if not cache.has_answer(prompts[i])] for batch in batches]
        return [AnswerTask(batch) for batch in left if batch]

    def _write(self, name: str, cache: ResultCache) -> ScoredModel:
        examples, folder = self.held_out.examples, self.folder / name
        answers = [cache.answer(example.prompt_ids) for example in examples]
        split = [self.encoder.split_answer(answer.ids) for answer in answers]
        reasoning, outputs = [thought for thought, _ in split], [output for _, output in split]
        losses = self._losses(cache)
        scored = {
            set_name: self._score_set(name, one, own, _describe_answers(losses[set_name], given, own))
            for (set_name, one, own), (_, _, given) in zip(self._sets(outputs), self._sets(answers), strict=True)
        }
        together = scored.pop("")
        first = next(iter(scored.values()), together)
        rows = {key: score for key, score in together.scores.items() if not key.startswith(CUSTOM)}
        write_outputs(folder, examples, answers, outputs, reasoning, rows)
        write_examples(folder, examples[: self.settings.examples], outputs, reasoning)
        prompted = [cache.answer(example.prompt_ids) for example in self.prompts]
        split_replies = [self.encoder.split_answer(answer.ids) for answer in prompted]
        replies = [reply for _, reply in split_replies]
        write_prompts(folder, self.prompts, prompted, replies, [thought for thought, _ in split_replies])
        # the model's entry of results.json
        prompts = [example.prompt_ids for example in (*examples, *self.prompts)]
        sets = self.held_out.test_sets.values() or [self.held_out]
        entry: dict[str, Any] = {"checkpoint": name} if name != "base" else {}
        entry |= {
            "step": int(name.rpartition("-")[2]) if name != "base" else 0,
            "seconds": round(cache.seconds([one.rows_fingerprint for one in sets], prompts), 3),
            **first.entry,
        }
        # warnings of what a reader of the scores should know
        if answers and together.entry["loss"] is None:
            warn(f"{name}: the loss on the held-out rows is not a finite number")
        if answers and together.entry["empty"] == len(answers):
            warn(f"{name}: every answer is empty, so BLEU is 0")
        elif cut := together.entry["finish"].get("context", 0):
            warn(f"{name}: {cut} of {len(answers)} answers end, or are empty, because the model's context is full")
        retained = None if self.retained is None else self.retained.loss(cache)
        if retained is not None and retained.as_dict()["loss"] is None:
            warn(f"{name}: the loss on {self.settings.retain} is not a finite number")
        return ScoredModel(
            entry, outputs, first.scores, replies, scored, together if scored else None, retained
        )  # fmt: skip

    def _losses(self, cache: ResultCache) -> dict[str, float | None]:
        """Return the loss on each test set and, under "", on all together: a mean over tokens."""
        losses = {name: cache.loss(one.rows_fingerprint) for name, one in self.held_out.test_sets.items()}
        if not losses:
            return {"": cache.loss(self.held_out.rows_fingerprint)}
        total = 0.0
        for name, loss in losses.items():
            total += math.nan if loss is None else loss * self.held_out.test_sets[name].supervised
        return {**losses, "": None if math.isnan(total) else total / self.held_out.supervised}

    def _sets(self, given: Sequence[Any]) -> "Iterator[tuple[str, HeldOutSet, list[Any]]]":
        """Yield name, test set and its part of something that is given for each example; last "", and all of it."""
        start = 0
        for name, one in self.held_out.test_sets.items():
            yield name, one, list(given[start : start + len(one.examples)])
            start += len(one.examples)
        yield "", self.held_out, list(given)

    def _score_set(self, system: str, held_out: HeldOutSet, outputs: list[str], entry: dict[str, Any]) -> SetScores:
        """Return the scores of the answers to one test set; none if there are no held-out answers."""
        if not outputs:
            return SetScores(entry, {})
        references = [example.reference for example in held_out.examples]
        prompts = [example.prompt for example in held_out.examples]
        named = [spec.metric for spec in parse_metrics(self.settings.metrics)]
        scores: dict[str, Score] = {
            metric: CorpusScore(metric, outputs, references) for metric in METRICS if metric in named
        }
        for metric in self.row_metrics:
            if metric.key in self.failures:
                continue
            try:
                scores[metric.key] = metric.score(system, outputs, references, prompts)
            except UserError as error:
                self.failures[metric.key] = error
                warn(f"{error.where}: {error.problem}. The other metrics go on without it.")
        return SetScores(entry | {"exact_match": exact_match(outputs, references)}, scores)


def _describe_answers(loss: float | None, answers: Sequence[Generated], outputs: Sequence[str]) -> dict[str, Any]:
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss is not None and loss < 700 else None,  # e^710 overflows
        "finish": dict(Counter(answer.finish for answer in answers)),
        "empty": sum(not output.strip() for output in outputs),
        "mean_tokens": sum(len(answer.ids) for answer in answers) / len(answers) if answers else None,
    }


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
