"""BLEU and chrF by sacrebleu, means over answers, bootstrap intervals, held-out loss, and the constant baseline.

Every BLEU and chrF equals that of sacrebleu's command line on files with one answer per line (a line break within
an answer becomes a space): `sacrebleu refs.txt -i outputs.txt -m bleu chrf --confidence`.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.metrics.helpers import extract_all_word_ngrams
from transformers import PreTrainedModel

from minisft.data.encoder import IGNORED
from minisft.evaluation.placement import is_divided
from minisft.evaluation.resampling import RESAMPLES, SEED, percentile_interval, resampled_rows
from minisft.models import forward_arguments

_ORDER = 4  # the order of BLEU's longest n-grams


@dataclass(frozen=True)
class Interval:
    """A corpus score (0 to 100) and its 95 % interval: `mean` of the resamples plus or minus `half`."""

    score: float
    mean: float
    half: float
    signature: str

    @property
    def low(self) -> float:
        return max(0.0, self.mean - self.half)

    @property
    def high(self) -> float:
        return min(100.0, self.mean + self.half)

    def as_dict(self) -> dict[str, Any]:
        return {
            "score": self.score,
            "low": self.low,
            "high": self.high,
            "mean": self.mean,
            "half_width": self.half,
            "signature": self.signature,
        }


def _sacrebleu_metric(name: str) -> Any:
    metric: Any = {"bleu": BLEU, "chrf": CHRF}[name]()
    metric._force = True  # else sacrebleu warns of tokenised text if many answers end in " ."
    return metric


class CorpusScore:
    """A corpus metric of outputs against their references, computed from sacrebleu's counts of each row.

    Args:
        metric: "bleu" or "chrf".
        outputs: One text per row.
        references: One text per row.
    """

    def __init__(self, metric: str, outputs: Sequence[str], references: Sequence[str]) -> None:
        assert len(outputs) == len(references) > 0
        self._metric = _sacrebleu_metric(metric)
        rows = self._metric._extract_corpus_statistics(
            [one_line(text) for text in outputs], [[one_line(text) for text in references]]
        )
        self.counts = np.array(rows, dtype="int64")  # [rows, counts]

    @classmethod
    def from_counts(cls, metric: str, counts: np.ndarray) -> "CorpusScore":
        """Return the score whose `counts` were kept, int64 [rows, counts]."""
        score = cls.__new__(cls)
        score._metric, score.counts = _sacrebleu_metric(metric), counts
        return score

    @cached_property
    def score(self) -> float:
        return self._of(self.counts.sum(0))

    @cached_property
    def resamples(self) -> np.ndarray:
        """Scores [1000] of seeded resamples; they draw the same rows for every system with the same number of rows."""
        counts = self.counts.astype("float32")  # as in sacrebleu, so that the bits are the same
        draws = resampled_rows(len(counts))
        return np.array([self._metric._compute_score_from_stats(counts[rows].sum(0)).score for rows in draws])

    def rows(self) -> list[float]:
        """Return each row's own score; BLEU of one sentence is noisy, so use it only to find examples."""
        return [self._of(counts) for counts in self.counts]

    def interval(self) -> Interval:
        """Return the score with its 95 % bootstrap interval, as `sacrebleu --confidence` computes it."""
        low, high = percentile_interval(self.resamples)
        self._metric.n_bootstrap, self._metric.seed = RESAMPLES, SEED
        signature = str(self._metric.get_signature())
        return Interval(self.score, float(np.sort(self.resamples).mean()), 0.5 * (high - low), signature)

    def __len__(self) -> int:
        return len(self.counts)

    def _of(self, counts: np.ndarray) -> float:
        return float(self._metric._compute_score_from_stats(counts).score)


@dataclass(frozen=True)
class MeanInterval:
    """A mean over rows, and the percentiles (2.5 and 97.5) of its resamples; an interval never leaves their range."""

    score: float
    low: float
    high: float
    mean: float
    signature: str

    def as_dict(self) -> dict[str, Any]:
        return {
            "score": self.score,
            "low": self.low,
            "high": self.high,
            "mean": self.mean,
            "half_width": 0.5 * (self.high - self.low),
            "signature": self.signature,
        }


class MeanScore:
    """The mean over rows of a number for each row.

    Args:
        values: One finite number per row.
        signature: What the numbers are.
    """

    def __init__(self, values: Sequence[float], signature: str) -> None:
        assert len(values) > 0
        self.values = np.array(values, dtype="float64")  # [rows]
        self.signature = f"{signature}|bs:{RESAMPLES}|seed:{SEED}"

    def __len__(self) -> int:
        return len(self.values)

    @cached_property
    def score(self) -> float:
        return float(self.values.mean())

    @cached_property
    def resamples(self) -> np.ndarray:
        """Means [1000] of seeded resamples, which draw the same rows as those of `CorpusScore`."""
        return np.array(self.values[resampled_rows(len(self.values))].mean(axis=1))

    def rows(self) -> list[float]:
        """Return each row's number."""
        return [float(value) for value in self.values]

    def interval(self) -> MeanInterval:
        """Return the mean with its 95 % bootstrap interval."""
        low, high = percentile_interval(self.resamples)
        return MeanInterval(self.score, low, high, float(self.resamples.mean()), self.signature)


class Score(Protocol):
    """What `CorpusScore` and `MeanScore` share."""

    @property
    def score(self) -> float: ...
    @property
    def resamples(self) -> np.ndarray: ...
    def __len__(self) -> int: ...
    def rows(self) -> list[float]: ...
    def interval(self) -> Interval | MeanInterval: ...


def p_value(system: Score, baseline: Score) -> float:
    """Return the p-value of the difference of two systems on the same rows, by paired bootstrap (Koehn 2004).

    Two-sided, as `sacrebleu --paired-bs` computes it, except that it is 1 if the two never differ: sacrebleu gives the
    smallest possible p then.
    """
    assert len(system) == len(baseline)
    gaps = np.abs(system.resamples - baseline.resamples)
    if not gaps.any():
        return 1.0
    beyond = np.sum(gaps - gaps.mean() > abs(system.score - baseline.score))
    return float((beyond + 1) / (len(gaps) + 1))


def exact_match(outputs: Sequence[str], references: Sequence[str]) -> float:
    """Return the share (0 to 1) of outputs that equal their reference, ignoring white space at both ends."""
    hits = (a.strip() == b.strip() for a, b in zip(outputs, references, strict=True))
    return sum(hits) / len(outputs)


def one_line(text: str) -> str:
    """Return the text as one line, as sacrebleu's command line reads it."""
    return " ".join(text.splitlines())


def best_constant(answers: Sequence[str]) -> str:
    """Return the answer that, repeated for every row, has the highest corpus BLEU against `answers` themselves.

    The search over all distinct answers is exact: the matches of an n-gram over all rows follow from the number of rows
    that contain it at least once, at least twice and so on. Of equal scores the most frequent answer wins, then the
    first.
    """
    metric = BLEU()
    lines = [metric._preprocess_segment(one_line(answer)) for answer in answers]
    grams = {line: extract_all_word_ngrams(line, 1, _ORDER) for line in dict.fromkeys(lines)}
    frequency = Counter(lines)
    holders: Counter[tuple[tuple[str, ...], int]] = Counter()
    for line, times in frequency.items():
        for gram, count in grams[line][0].items():
            for at_least in range(1, count + 1):
                holders[gram, at_least] += times
    reference_length = sum(grams[line][1] * times for line, times in frequency.items())

    def score(line: str) -> float:
        counts, length = grams[line]
        correct = [0] * _ORDER
        for gram, count in counts.items():
            correct[len(gram) - 1] += sum(holders[gram, at_least] for at_least in range(1, count + 1))
        total = [len(lines) * max(0, length - order) for order in range(_ORDER)]
        return metric._compute_score_from_stats([len(lines) * length, reference_length, *correct, *total]).score

    candidates = sorted(grams, key=lambda line: -frequency[line])  # stable: the first of equals stays first
    return answers[lines.index(max(candidates, key=score))]


LossRow = tuple[Sequence[int], Sequence[int]]  # input ids, and labels: unshifted, -100 where not supervised
# Tokens per batch, padding included; their logits in fp32 over a vocabulary of 49,152 take 400 MB.
BATCH_TOKENS = 2048


def mean_loss(sums: Iterable[tuple[float, int]]) -> tuple[float, int]:
    """Return the mean negative log-likelihood, in nats per supervised token, and the number of these tokens.

    Args:
        sums: (Sum of losses, number of tokens) of each batch, in order.
    """
    total, count = 0.0, 0
    for loss, tokens in sums:
        total, count = total + loss, count + tokens
    return (total / count if count else float("nan")), count


def loss_batches(rows: Sequence[LossRow], batch_tokens: int = BATCH_TOKENS) -> list[list[LossRow]]:
    """Return batches of rows of similar length, longest first.

    Args:
        rows: The rows.
        batch_tokens: The most tokens of a batch of several rows, padding included.
    """
    batches: list[list[LossRow]] = []
    room = 0
    for row in sorted(rows, key=lambda row: -len(row[0])):
        if not batches or len(batches[-1]) >= room:
            batches.append([])
            room = max(1, batch_tokens // len(row[0]))
        batches[-1].append(row)
    return batches


@torch.inference_mode()
def sum_of_losses(model: PreTrainedModel, rows: Sequence[LossRow]) -> tuple[float, int]:
    """Return the summed loss of a batch's supervised tokens, and their number; the first row must be the longest."""
    longest = len(rows[0][0])
    ids = torch.tensor([[*i, *[0] * (longest - len(i))] for i, _ in rows], device=model.device)
    labels = torch.tensor([[*label, *[IGNORED] * (longest - len(label))] for _, label in rows], device=model.device)
    mask = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i, _ in rows], device=model.device)
    targets = labels[:, 1:]
    wanted = (targets != IGNORED).any(dim=0).nonzero()[:, 0]  # positions whose logits at least one row needs
    if len(wanted) == 0:
        return 0.0, 0
    logits = logits_of(model, ids, mask, wanted.tolist())
    targets = targets[:, wanted]
    kept = targets != IGNORED
    loss = torch.nn.functional.cross_entropy(logits[kept].float(), targets[kept], reduction="sum")
    return loss.item(), int(kept.sum())


def logits_of(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, positions: list[int]) -> torch.Tensor:
    """Return the logits [rows, positions, vocabulary] of some positions, given ids and mask [rows, all positions]."""
    if "logits_to_keep" not in forward_arguments(model):
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, positions]
    # Numbers suit the last layer on whatever GPU it is; accelerate would move a tensor to the first GPU.
    keep: Any = positions if is_divided(model) else torch.tensor(positions, device=ids.device)
    return model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=keep).logits
