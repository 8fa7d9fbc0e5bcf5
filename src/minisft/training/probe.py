"""A probe of the model before the first step: does it compute what its author's code computes?

Padding-free rows leave three things to the model: that a conversation does not see the one before it in its row, that
no token sees a later one, and that windows are respected. A model whose layers run across the row (recurrent layers,
convolutions, linear attention) breaks the first; one that takes its causal mask or its window from a mask tensor alone
breaks the others, since transformers builds no mask for the attention that MiniSFT registers. Such models train without
an error, and wrongly. So the live model, in the precision and with the kernels of the training, is compared with
transformers' own attention on a few tokens: without a gradient and without a random number.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from minisft.errors import UserError
from minisft.text import first_line
from minisft.training.batching import pack_sequences
from minisft.training.loss import forward_row, unwrapped

Verdict = Literal["right", "alone", "refused"]
# Largest relative difference of the logits of a position that rounding explains. In half precision that of a real model
# reaches 0.2 (SmolLM2-135M in bf16: 0.12), so a model with fp32 weights is compared in fp32 too.
FP32_TOLERANCE, HALF_TOLERANCE = 1e-3, 0.3
_TOKENS = 24  # of a conversation of the probe
_BEYOND = 8  # tokens by which the long conversation exceeds a window
# Names under which configurations give the number of tokens that a token attends to.
_WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size", "window_size")


@dataclass(frozen=True)
class ProbeResult:
    """Relative differences of logits, each that of the position with the largest one; None: not measured.

    Attributes:
        tolerance: The largest difference that counts as equal.
        isolation: Of a conversation with another one before it in its row, and alone.
        exactness: Of a conversation alone, and with transformers' own attention.
        causality: Of the tokens before the last one, when the last one changes.
        window: Of a conversation longer than a window of the configuration, and with transformers' own attention.
    """

    tolerance: float
    isolation: float
    exactness: float
    causality: float
    window: float | None = None

    @property
    def verdict(self) -> Verdict:
        """right: rows of several conversations; alone: rows of one conversation; refused: no row is right."""
        if max(self.exactness, self.causality, self.window or 0.0) > self.tolerance:
            return "refused"
        return "right" if self.isolation <= self.tolerance else "alone"

    def differences(self) -> list[float]:
        """Return the differences that were measured."""
        return [self.isolation, self.exactness, self.causality, *([] if self.window is None else [self.window])]

    def as_dict(self) -> dict[str, Any]:
        """Return the entry `probe` of environment.json."""
        differences = {"isolation": self.isolation, "exactness": self.exactness, "causality": self.causality}
        return {"verdict": self.verdict, **differences, "window": self.window, "tolerance": self.tolerance}


def probe_model(
    model: Any, device: torch.device, arithmetic: Callable[[], Any], *, half: bool, max_length: int
) -> ProbeResult | None:
    """Compare the logits of the model with one another and with transformers' own attention; return the worse result.

    They are computed in the precision of the training and, if that is half precision and the weights are fp32, in fp32
    too, where a small fault shows. With several processes each of them calls this: under ZeRO-3 a forward gathers
    weights. Gradients, random states and the mode of the model (training or evaluation) are left as they were.

    Args:
        model: The model, or the wrapper of DDP or DeepSpeed around it, as the training step calls it.
        device: Device of the model.
        arithmetic: Returns the context manager of a forward (autocast, or none).
        half: Whether products are computed in half precision.
        max_length: Maximum number of tokens of a conversation; longer windows need no proof.

    Returns:
        The result; None if logits are not finite, which shows in the loss of the first step.

    Raises:
        UserError: The model cannot be called as training calls it, or not with transformers' own attention.
    """
    results = [_compare(model, device, arithmetic, HALF_TOLERANCE if half else FP32_TOLERANCE, max_length)]
    if half and next(unwrapped(model).parameters()).dtype == torch.float32:
        in_fp32 = partial(without_autocast, unwrapped(model), device)
        results.append(_compare(model, device, in_fp32, FP32_TOLERANCE, max_length))
    if not all(math.isfinite(size) for result in results for size in result.differences()):
        return None
    return max(results, key=lambda result: ("right", "alone", "refused").index(result.verdict))


def _compare(
    model: Any, device: torch.device, arithmetic: Callable[[], Any], tolerance: float, max_length: int
) -> ProbeResult:
    inner = unwrapped(model)
    config = inner.config.get_text_config()
    first, second = (_ids(config.vocab_size, start, _TOKENS) for start in (1, 5))
    changed = [*first[:-1], (first[-1] + 1) % config.vocab_size]
    length = _longest_window(config, max_length)

    def logits(*conversations: list[int]) -> torch.Tensor:
        arrays = [np.asarray(ids) for ids in conversations]
        row = pack_sequences([(ids, ids) for ids in arrays]).to(device)
        found = forward_row(model, row)[0].float()
        if len(found) != len(row.targets):
            raise ValueError(f"it returns logits of {len(found)} positions, and {len(row.targets)} were asked for")
        return found

    def plain_logits(ids: list[int]) -> torch.Tensor:
        tokens = torch.tensor([ids], device=device)
        return model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits[0, :-1].float()

    training = inner.training
    model.eval()
    try:
        with torch.no_grad(), arithmetic():
            together, alone = logits(first, second), logits(first)
            isolation = max(
                _difference(together[: len(alone)], alone), _difference(together[len(alone) :], logits(second))
            )
            causality = _difference(logits(changed), alone)  # the last token predicts nothing
            long = None if length is None else _ids(config.vocab_size, 1, length + _BEYOND)
            with transformers_attention(inner):
                exactness = _difference(plain_logits(first), alone)
                plain = None if long is None else plain_logits(long)
            window = None if long is None or plain is None else _difference(plain, logits(long))
    except UserError:
        raise
    except Exception as error:  # a model may fail in any way
        problem = f"it cannot be called as training calls a model ({type(error).__name__}: {first_line(error)})"
        raise UserError(type(inner).__name__, problem, "use another model, or report this one") from error
    finally:
        model.train(training)
    return ProbeResult(tolerance, isolation, exactness, causality, window)


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


@contextlib.contextmanager
def transformers_attention(model: Any) -> Iterator[None]:
    """Give the model transformers' own attention within the context: `sdpa`, or `eager` if it has no other."""
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("sdpa")
    except ValueError:
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def refuse_wrong_model(name: str, result: ProbeResult) -> None:
    """Refuse a model that is wrong for every row.

    Raises:
        UserError: The verdict is `refused`; the message names the largest difference.
    """
    if result.verdict != "refused":
        return
    differences = {
        "a token changes the predictions of tokens before it": result.causality,
        "one conversation has other logits than with transformers' own attention": result.exactness,
        "a conversation longer than the model's window has other logits than with transformers' own attention": (
            result.window or 0.0
        ),
    }
    problem, size = next(
        (text, size)
        for text, size in differences.items()
        if size > result.tolerance  # the first is the cause
    )
    problem = f"{problem} (relative difference {size:.2g}): MiniSFT would train it wrongly"
    raise UserError(f"the model {name}", problem, "use another model, or report this one")


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
