"""A probe of the model before the first step: how is it called so that it computes what its author's code computes?

Padding-free rows leave three things to the model: that a conversation does not see the one before it in its row, that
no token sees a later one, and that windows are respected. A model whose layers run across the row (recurrent layers,
convolutions, linear attention) breaks the first; one that takes its causal mask or its window from a mask tensor alone
breaks the others, since transformers builds no mask for the attention that MiniSFT registers. Such models train without
an error, and wrongly. So the live model, in the precision and with the kernels of the training, is compared with
transformers' own attention on a few tokens: without a gradient and without a random number. Calls are tried in this
order, and the first that is right is the call of the training:

1. MiniSFT's attention on rows of several conversations;
2. the same, with the boundaries of the conversations passed to recurrent layers and convolutions;
3. MiniSFT's attention on rows of one conversation, which is right wherever 1 is wrong only for rows of several;
4. transformers' own attention on rows of one conversation.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from minisft.errors import UserError
from minisft.models import (
    forward_arguments,
    is_out_of_memory,
    model_class,
    transformers_attention,
    use_transformers_attention,
)
from minisft.text import first_line
from minisft.training.batching import pack_sequences
from minisft.training.loss import forward_row, unwrapped
from minisft.training.model_call import ModelCall
from minisft.training.sequence_parallel import WHERE, SequenceGroup

Verdict = Literal["right", "alone", "refused"]
# Largest relative difference of the logits of a position that rounding explains. In half precision that of a real model
# reaches 0.2 (SmolLM2-135M in bf16: 0.12), so a model with fp32 weights is compared in fp32 too.
FP32_TOLERANCE, HALF_TOLERANCE = 1e-3, 0.3
_TOKENS = 24  # of a conversation of the probe
_PADDING = 5  # tokens of padding of the reference
_BEYOND = 8  # tokens by which the long conversation exceeds a window
# Names under which configurations give the number of tokens that a token attends to.
_WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size", "window_size")


@dataclass(frozen=True)
class ProbeResult:
    """Relative differences of logits, each that of the position with the largest one; None: not measured.

    Attributes:
        call: The arguments that the model got.
        attention: The attention that it had: MiniSFT's, or `sdpa` or `eager` of transformers.
        tolerance: The largest difference that counts as equal.
        isolation: Of a conversation with another one before it in its row, and alone; None: rows of several were not
            tried, since the attention is transformers' own.
        exactness: Of a conversation alone, and padded with transformers' own attention.
        causality: Of the tokens before the last one, when the last one changes.
        window: Of a conversation longer than a window of the configuration, and with transformers' own attention.
        reason: Why a row holds one conversation, as the predicate of a sentence about the model; empty if it does not.
    """

    call: ModelCall
    attention: str
    tolerance: float
    isolation: float | None
    exactness: float
    causality: float
    window: float | None = None
    reason: str = ""

    @property
    def verdict(self) -> Verdict:
        """right: rows of several conversations; alone: rows of one conversation; refused: no row is right."""
        if self.problem is not None:
            return "refused"
        return "right" if self.isolation is not None and self.isolation <= self.tolerance else "alone"

    @property
    def problem(self) -> str | None:
        """What makes every row wrong, and by how much; None if a row of one conversation is right."""
        differences = {
            "a token changes the predictions of tokens before it": self.causality,
            "one conversation has other logits than with transformers' own attention": self.exactness,
            "a conversation longer than the model's window has other logits than with transformers' own attention": (
                self.window or 0.0
            ),
        }
        wrong = ((text, size) for text, size in differences.items() if size > self.tolerance)
        text, size = next(wrong, (None, 0.0))  # the first is the cause
        return None if text is None else f"{text} (relative difference {size:.2g})"

    def differences(self) -> list[float]:
        """Return the differences that were measured."""
        measured = [self.isolation, self.exactness, self.causality, self.window]
        return [size for size in measured if size is not None]

    def as_dict(self) -> dict[str, Any]:
        """Return the entry `probe` of environment.json."""
        differences = {"isolation": self.isolation, "exactness": self.exactness, "causality": self.causality}
        found = {"verdict": self.verdict, **differences, "window": self.window, "tolerance": self.tolerance}
        return found | {"attention": self.attention, "boundaries": self.call.boundaries, "reason": self.reason or None}


@dataclass(frozen=True)
class Probe:
    """What the probe needs of the training.

    Attributes:
        model: The model, or the wrapper of DDP or DeepSpeed around it, as the training step calls it.
        device: Device of the model.
        arithmetic: Returns the context manager of a forward (autocast, or none).
        half: Whether products are computed in half precision.
        max_length: Maximum number of tokens of a conversation; longer windows need no proof.
        weights_in_fp32: Returns the context in which the model has fp32 weights, if it has any.
    """

    model: Any
    device: torch.device
    arithmetic: Callable[[], Any]
    half: bool
    max_length: int
    weights_in_fp32: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext

    def run(self) -> ProbeResult | None:
        """Find the call with which the model is right; the model is left with the attention of that call.

        Logits are compared in the precision of the training and, if that is half precision and the weights are fp32, in
        fp32 too, where a small fault shows. With several processes each of them calls this: under ZeRO-3 a forward
        gathers weights. Gradients, random states and the mode of the model (training or evaluation) are left unchanged.

        Returns:
            The result of that call, or of the last one if none is right; None if logits are not finite, which shows in
            the loss of the first step.

        Raises:
            UserError: The model cannot be called as training calls it, with no attention.
        """
        inner = unwrapped(self.model)
        call, reason = ModelCall.of(inner), "has no other attention than transformers' own"
        # 1. MiniSFT's attention.
        if call.packed:
            try:
                result = self._compare(call)
            except Exception as error:  # a model may fail in any way
                if is_out_of_memory(error):
                    raise
                reason = f"cannot have MiniSFT's attention ({_message(error)})"
                self._forget_failed_forward()
            else:
                if result is None or result.verdict == "right":
                    return result
                if result.verdict == "alone":
                    return self._with_boundaries(replace(call, boundaries=True)) or result
                reason = f"is wrong with MiniSFT's attention: {result.problem}"
            use_transformers_attention(inner)
        # 2. Transformers' own attention.
        call = ModelCall.of(inner)
        try:
            result = self._compare(call)
        except Exception as error:  # as above
            if is_out_of_memory(error):
                raise
            problem = f"it cannot be called as training calls a model ({_message(error)})"
            raise UserError(model_class(inner).__name__, problem, "use another model, or report this one") from error
        return result and replace(result, reason=reason)

    def refuse_unshareable_model(self, call: ModelCall, group: SequenceGroup) -> None:
        """Check that the parts of a shared row have the logits of the complete row, on every process of the group.

        Recurrent layers, convolutions and whatever else mixes tokens outside of attention see only their own part.

        Raises:
            UserError: They differ, or the model has no attention of MiniSFT.
        """
        inner = unwrapped(self.model)
        name = model_class(inner).__name__
        fix = "leave it out, or use another model"
        if call.boundaries:
            raise UserError(WHERE, f"{name} has recurrent layers, which compute a row from its start", fix)
        if not call.packed:
            raise UserError(WHERE, f"{name} does not take MiniSFT's attention, which shares a row", fix)
        vocabulary = inner.config.get_text_config().vocab_size
        conversations = _ids(vocabulary, 1, _TOKENS), _ids(vocabulary, 5, _TOKENS + 1)
        arrays = [np.asarray(ids) for ids in conversations]
        row = pack_sequences([(ids, ids) for ids in arrays])
        part = group.part_of(row)
        own = (row.predict_at >= part.start) & (row.predict_at < part.start + part.input_ids.shape[1])
        training = inner.training
        self.model.eval()
        try:
            with torch.no_grad(), self.arithmetic():
                complete = forward_row(self.model, row.to(self.device), call)[0].float()[own.to(self.device)]
                shared = forward_row(self.model, part.to(self.device), call)[0].float()
        finally:
            self.model.train(training)
        difference = group.largest(_difference(shared, complete) if len(shared) else 0.0, self.device)
        if difference > (HALF_TOLERANCE if self.half else FP32_TOLERANCE):
            problem = f"{name} computes a row differently if processes share it (relative difference {difference:.2g})"
            raise UserError(WHERE, problem, fix)

    def _with_boundaries(self, call: ModelCall) -> ProbeResult | None:
        """Return the result with boundaries if rows of several are right with them; that needs the layers' kernels."""
        try:
            result = self._compare(call)
        except Exception as error:  # the reference implementation of the kernels raises one: it knows no boundaries
            if is_out_of_memory(error):
                raise
            self._forget_failed_forward()
            return None
        return result if result is not None and result.verdict == "right" else None

    def _forget_failed_forward(self) -> None:
        """Let ZeRO-3 release the weights that it gathered for a forward that failed in the middle."""
        if hasattr(self.model, "empty_partition_cache"):
            self.model.empty_partition_cache()

    def _compare(self, call: ModelCall) -> ProbeResult | None:
        """Return the worse result of the precisions; None if logits are not finite."""
        inner = unwrapped(self.model)
        results = [self._compare_in(call, self.arithmetic, HALF_TOLERANCE if self.half else FP32_TOLERANCE)]
        with self.weights_in_fp32():
            if self.half and next(inner.parameters()).dtype == torch.float32:
                in_fp32 = partial(without_autocast, inner, self.device)
                results.append(self._compare_in(call, in_fp32, FP32_TOLERANCE))
        if not all(math.isfinite(size) for result in results for size in result.differences()):
            return None
        return max(results, key=lambda result: ("right", "alone", "refused").index(result.verdict))

    def _compare_in(self, call: ModelCall, arithmetic: Callable[[], Any], tolerance: float) -> ProbeResult:
        inner = unwrapped(self.model)
        config = inner.config.get_text_config()
        first, second = (_ids(config.vocab_size, start, _TOKENS) for start in (1, 5))
        changed = [*first[:-1], (first[-1] + 1) % config.vocab_size]
        length = _longest_window(config, self.max_length)
        long = None if length is None else _ids(config.vocab_size, 1, length + _BEYOND)
        isolation = window = None
        training = inner.training
        self.model.eval()
        try:
            with torch.no_grad(), arithmetic():
                alone = self._logits(call, first)
                causality = _difference(self._logits(call, changed), alone)  # the last token predicts nothing
                if call.packed:
                    together, other = self._logits(call, first, second), self._logits(call, second)
                    isolation = _difference(together, torch.cat([alone, other]))
                with transformers_attention(inner):
                    exactness = _difference(self._padded_logits(first), alone)
                    expected = None if long is None else self._padded_logits(long)
                if expected is not None and long is not None:
                    window = _difference(expected, self._logits(call, long))
        finally:
            self.model.train(training)
        attention = inner.config._attn_implementation
        reason = "computes a conversation differently after another one in the same row"
        leaks = isolation is not None and isolation > tolerance
        return ProbeResult(call, attention, tolerance, isolation, exactness, causality, window, reason if leaks else "")

    def _logits(self, call: ModelCall, *conversations: list[int]) -> torch.Tensor:
        """Return the logits, (predicted tokens, vocabulary), of a row of conversations, each learned whole."""
        arrays = [np.asarray(ids) for ids in conversations]
        row = pack_sequences([(ids, ids) for ids in arrays]).to(self.device)
        found: torch.Tensor = forward_row(self.model, row, call)[0].float()
        if len(found) != len(row.targets):
            raise ValueError(f"it returns logits of {len(found)} positions, and {len(row.targets)} were asked for")
        return found

    def _padded_logits(self, ids: list[int]) -> torch.Tensor:
        """Return the same of a conversation that is padded on the right, without a line of MiniSFT's training."""
        taken = forward_arguments(unwrapped(self.model))
        tokens = torch.tensor([ids + [0] * _PADDING], device=self.device)
        mask = torch.tensor([[1] * len(ids) + [0] * _PADDING], device=self.device)
        options = {"attention_mask": mask, "use_cache": False}
        found = self.model(input_ids=tokens, **{name: one for name, one in options.items() if name in taken}).logits
        return found[0, : len(ids) - 1].float()  # type: ignore[no-any-return]


@contextlib.contextmanager
def without_autocast(model: Any, device: torch.device) -> Iterator[None]:
    """Compute in the format of the weights within the context.

    accelerate puts autocast into the forward of a prepared model, and keeps the forward without it.
    """
    prepared, original = vars(model).get("forward"), getattr(model, "_original_forward", None)
    if prepared is not None and original is not None:
        model.forward = original
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if prepared is not None:
            model.forward = prepared


def refuse_wrong_model(name: str, result: ProbeResult) -> None:
    """Refuse a model that is wrong for every row.

    Raises:
        UserError: The verdict is `refused`; the message names the largest difference.
    """
    if result.problem is not None:
        problem = f"{result.problem}: MiniSFT would train it wrongly"
        raise UserError(f"the model {name}", problem, "use another model, or report this one")


def _message(error: Exception) -> str:
    return error.problem if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"


def _ids(vocabulary: int, start: int, count: int) -> list[int]:
    """Return fixed token ids that differ between neighbours, without a random number."""
    return [(start + 7 * number) % vocabulary for number in range(count)]


def _longest_window(config: Any, max_length: int) -> int | None:
    """Return the longest window or chunk of the configuration that a conversation of `max_length` tokens exceeds."""
    windows = [getattr(config, name, None) for name in _WINDOWS]
    reached = [size for size in windows if isinstance(size, int) and 0 < size < max_length]
    return max(reached, default=None)


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest relative difference of a position: the norms are those over the vocabulary."""
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)).max())
