"""Attention over a padding-free row: causal within each conversation, by a GPU kernel if one is verified.

Without a mask, transformers would build a dense block-diagonal one of (tokens, tokens) for a row of several
conversations. The function here runs causal attention on each conversation instead: by a kernel of the GPU for rows of
several conversations, or by scaled-dot-product attention on one conversation after the other.

FlashAttention 3 (Shah et al. 2024, arXiv 2407.08608) where the package `flash_attn_interface` is installed,
FlashAttention 2 (Dao 2023, arXiv 2307.08691) where `flash-attn` is, else torch's own variable-length attention, which
has the kernels of the second built in. Which of them is available, and what it supports, depends on versions and on the
GPU. So each is tested on a small row first, and one that fails, or differs from plain
attention on each conversation alone, is not used.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from minisft.errors import UserError
from minisft.training.sequence_parallel import SequenceGroup

PADDING_FREE = "minisft_padding_free"


def register() -> None:
    """Make the attention known to transformers as `attn_implementation=PADDING_FREE`.

    It is not entered in the mask registry on purpose: transformers then builds no mask.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(PADDING_FREE, padding_free_attention)


def padding_free_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    conversation_lengths: tuple[int, ...] | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sequence_group: SequenceGroup | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each conversation of a row.

    Args:
        module: Attention layer that calls this function.
        query: (1, heads, tokens, head size); key and value may have fewer heads (grouped-query attention).
        key: (1, key heads, tokens, head size).
        value: like key.
        attention_mask: Always None.
        dropout: Probability of dropping an attention weight.
        scaling: Factor on the scores; None is 1 / sqrt(head size).
        conversation_lengths: Number of tokens of each conversation; an argument of the model's forward.
        sliding_window: Number of tokens that a token attends to, itself included.
        softcap: Bound of the scores, which become softcap * tanh(scores / softcap).
        s_aux: (heads,) Attention sinks: a further score of each head, which takes probability and has no value.
        sequence_group: The processes that share the row; queries, keys and values are then those of this process's
            tokens, and `conversation_lengths` those of the complete row.
        **kwargs: Further arguments of the model to its attention.

    Returns:
        (1, tokens, heads, head size), and None for the weights, which are not computed.

    Raises:
        UserError: The model needs a feature of attention that this function does not have.
    """
    _refuse(module, attention_mask, conversation_lengths, kwargs)
    lengths = tuple(conversation_lengths or ())
    query, key, value = in_autocast_type(query, key, value)
    if sequence_group is not None:
        if query.shape[1] % sequence_group.size:
            problem = f"{sequence_group.size} processes cannot share its {query.shape[1]} attention heads"
            raise UserError(type(module).__name__, problem, "set training.sequence_parallel to a divisor of them")
        key, value = (sequence_group.repeat_key_heads(one, query.shape[1]) for one in (key, value))
        query, key, value = (sequence_group.gather_tokens(one) for one in (query, key, value))
        s_aux = None if s_aux is None else sequence_group.own_part(s_aux)
    output = _attend(query, key, value, lengths, dropout, scaling, sliding_window, softcap, s_aux)
    return output if sequence_group is None else sequence_group.gather_heads(output), None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: torch.Tensor | None,
) -> torch.Tensor:
    """Attend within each conversation of a complete row, with all heads or some of them; see above."""
    window = sliding_window if sliding_window is not None and max(lengths) > sliding_window else None
    shape = Shape(query.shape[1], key.shape[1], query.shape[3], query.dtype, query.device, scaling, window, softcap)
    rows = [one[0].transpose(0, 1) for one in (query, key, value)]  # (tokens, heads, head size)
    kernel = select_kernel(shape, dropout) if value.shape == key.shape and s_aux is None else None
    if kernel is None:
        return per_conversation_attention(rows[0], rows[1], rows[2], lengths, shape, dropout, s_aux)[None]
    return kernel(rows[0], rows[1], rows[2], lengths, shape)[None]


def in_autocast_type(*heads: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return queries, keys and values in the number format of autocast, in which a GPU's kernels compute.

    Rotary embeddings and norms return fp32 queries and keys under autocast, beside bf16 values, and no kernel takes
    those. On a CPU they stay as they are: attention is computed in fp32 there.
    """
    device = heads[0].device.type
    if device == "cpu" or not torch.is_autocast_enabled(device):
        return heads
    return tuple(one.to(torch.get_autocast_dtype(device)) for one in heads)


def _refuse(
    module: torch.nn.Module,
    mask: torch.Tensor | None,
    lengths: tuple[int, ...] | None,
    kwargs: dict[str, Any],
) -> None:
    fix = "use another model, or report this one"
    name = type(module).__name__
    if lengths is None:
        raise UserError(name, "this model does not pass the lengths of a row to its attention", fix)
    if mask is not None:
        raise UserError(name, "this model makes an attention mask of its own", fix)
    if kwargs.get("position_bias") is not None:
        raise UserError(name, "this model needs a bias on its attention scores", fix)


_PROBED_LENGTHS, _PROBED_WINDOW = (37, 1, 150, 20), 64


@dataclass(frozen=True)
class Shape:
    """The properties of an attention call that decide whether a kernel can be used.

    Attributes:
        heads: Number of query heads.
        key_heads: Number of key and value heads; a divisor of `heads`.
        head_size: Dimension of a head.
        dtype: Number format of queries, keys and values.
        device: Their device.
        scaling: Factor on the scores; None is 1 / sqrt(head_size).
        window: Number of tokens that a token attends to, itself included; None for all.
        soft_cap: Bound of the scores; None for none.
    """

    heads: int
    key_heads: int
    head_size: int
    dtype: torch.dtype
    device: torch.device
    scaling: float | None
    window: int | None
    soft_cap: float | None = None

    def __post_init__(self) -> None:
        assert self.heads % self.key_heads == 0
        assert self.window is None or self.window > 0


# Takes queries, keys and values as (tokens, heads, head size), and the lengths of the conversations.
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, ...], Shape], torch.Tensor]


def flash_attn_3(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: tuple[int, ...], shape: Shape
) -> torch.Tensor:
    """Attend with the kernels for Hopper GPUs, which come as a package of their own."""
    from flash_attn_interface import flash_attn_varlen_func

    return _flash_attention(flash_attn_varlen_func, q, k, v, lengths, shape)


def flash_attn(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: tuple[int, ...], shape: Shape
) -> torch.Tensor:
    """Attend with the kernels of the package `flash-attn`."""
    from flash_attn import flash_attn_varlen_func

    return _flash_attention(flash_attn_varlen_func, q, k, v, lengths, shape)


def _flash_attention(
    attend: Callable[..., Any],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: tuple[int, ...],
    shape: Shape,
) -> torch.Tensor:
    """Attend by `flash_attn_varlen_func`, which both packages have with these arguments."""
    ends, longest = _ends(lengths, shape.device), max(lengths)
    found = attend(
        q, k, v, ends, ends, longest, longest, softmax_scale=shape.scaling, causal=True,
        # tokens before and after itself to which a token attends; -1 is all
        window_size=(-1, -1) if shape.window is None else (shape.window - 1, 0),
        deterministic=torch.are_deterministic_algorithms_enabled(),  # the backward adds up atomically otherwise
    )  # fmt: skip
    # Earlier versions of FlashAttention 3 return the log-sum-exp too.
    return found[0] if isinstance(found, tuple) else found  # type: ignore[no-any-return]


def torch_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: tuple[int, ...], shape: Shape
) -> torch.Tensor:
    """Attend with torch's kernel, which shares a key head among several heads in newer versions."""
    return _torch_varlen(q, k, v, lengths, shape, enable_gqa=True)


def torch_varlen_repeated(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: tuple[int, ...], shape: Shape
) -> torch.Tensor:
    """Attend with torch's kernel of older versions, with a copy of the key head for each head."""
    times = shape.heads // shape.key_heads
    return _torch_varlen(q, k.repeat_interleave(times, 1), v.repeat_interleave(times, 1), lengths, shape)


def _torch_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: tuple[int, ...], shape: Shape, **options: bool
) -> torch.Tensor:
    from torch.nn.attention import varlen

    attend: Any = varlen.varlen_attn  # its options differ between versions of torch
    ends, longest = _ends(lengths, shape.device), max(lengths)
    window = (-1 if shape.window is None else shape.window - 1, 0)
    return attend(  # type: ignore[no-any-return]
        q, k, v, ends, ends, longest, longest, scale=shape.scaling, window_size=window, **options
    )


KERNELS: tuple[Kernel, ...] = (flash_attn_3, flash_attn, torch_varlen, torch_varlen_repeated)


@lru_cache(maxsize=8)
def _ends(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return the start of each conversation and the end of the row, (conversations + 1,); cached for all layers."""
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    # Pinned, so that the copy is put in the GPU's queue and the CPU does not wait for what the GPU still computes.
    return ends.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ends.to(device)


def select_kernel(shape: Shape, dropout: float) -> Kernel | None:
    """Return the kernel for this attention; None if there is none, on a CPU, in fp32, with dropout or a soft cap."""
    half = shape.dtype in (torch.float16, torch.bfloat16)
    if shape.device.type != "cuda" or not half or dropout > 0 or shape.soft_cap is not None:
        return None
    return _verified_kernel(shape)


@lru_cache
def _verified_kernel(shape: Shape) -> Kernel | None:
    return first_verified(KERNELS, shape)


def first_verified(kernels: Sequence[Kernel], shape: Shape) -> Kernel | None:
    """Return the first kernel whose outputs and gradients equal those of plain attention; None if there is none.

    A sliding window is tested with a short one, so that a short row shows its effect.
    """
    shape = replace(shape, window=None if shape.window is None else _PROBED_WINDOW)
    generator = torch.Generator(shape.device).manual_seed(0)  # training's random state stays as it is

    def numbers(heads: int) -> torch.Tensor:
        size = (sum(_PROBED_LENGTHS), heads, shape.head_size)
        return torch.randn(size, generator=generator, device=shape.device).to(shape.dtype)

    inputs = [numbers(shape.heads), numbers(shape.key_heads), numbers(shape.key_heads)]
    direction = numbers(shape.heads)
    exact = _results(per_conversation_attention, [one.float() for one in inputs], direction.float(), shape)
    for kernel in kernels:
        try:
            found = _results(kernel, inputs, direction, shape)
        except Exception:  # any error of a package that is missing, too old, or not built for this GPU
            continue
        if all(_close(one, other) for one, other in zip(found, exact, strict=True)):
            return kernel
    return None


def _results(
    kernel: Kernel, inputs: list[torch.Tensor], direction: torch.Tensor, shape: Shape
) -> tuple[torch.Tensor, ...]:
    with torch.enable_grad(), torch.autocast(shape.device.type, enabled=False):
        leaves = [one.detach().clone().requires_grad_() for one in inputs]
        output = kernel(leaves[0], leaves[1], leaves[2], _PROBED_LENGTHS, shape)
        return output.detach(), *torch.autograd.grad(output, leaves, direction)


def _close(found: torch.Tensor, exact: torch.Tensor) -> bool:
    """Return whether two tensors are equal up to half precision: no element differs by a tenth of the typical one."""
    difference = (found.float() - exact).abs().max() / exact.square().mean().sqrt()
    return found.shape == exact.shape and bool(difference < 0.1)


def per_conversation_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: tuple[int, ...],
    shape: Shape,
    dropout: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend within each conversation by torch's scaled-dot-product attention, on any device and in any format.

    Soft caps and sinks, which that function does not have, are computed with all scores of a conversation in memory.

    In half precision on a CPU it is computed in fp32: as fast for long conversations, and with many short ones a step
    took 0.86 of the time.
    """
    if q.device.type == "cpu" and (torch.is_autocast_enabled("cpu") or v.dtype in (torch.bfloat16, torch.float16)):
        with torch.autocast("cpu", enabled=False):
            return per_conversation_attention(
                q.float(), k.float(), v.float(), lengths, shape, dropout, None if sinks is None else sinks.float()
            ).to(v.dtype)
    grouped, outputs = shape.heads != shape.key_heads, []
    parts = [one.transpose(0, 1)[None].split(list(lengths), 2) for one in (q, k, v)]
    for query, key, value in zip(*parts, strict=True):
        if shape.soft_cap is not None or sinks is not None:
            outputs.append(_attention_by_scores(query, key, value, shape, dropout, sinks))
            continue
        mask = _window_mask(query, shape.window)
        sharing = grouped and _shares_key_heads(shape, mask)
        if grouped and not sharing:
            key, value = (one.repeat_interleave(shape.heads // shape.key_heads, 1) for one in (key, value))
        outputs.append(
            scaled_dot_product_attention(
                query, key, value, mask, dropout, mask is None, scale=shape.scaling, enable_gqa=sharing
            )
        )
    # Contiguous in this order, as some models need it.
    return torch.cat([output.transpose(1, 2) for output in outputs], 1)[0]


def _shares_key_heads(shape: Shape, mask: torch.Tensor | None) -> bool:
    """Return whether scaled-dot-product attention shares a key head among several heads without slow arithmetic.

    On a GPU only FlashAttention does: in half precision, without a mask, on GPUs from capability 8 on. Otherwise torch
    would take its reference implementation, whose memory grows with the square of the conversation, and not the
    memory-efficient kernel, which needs as many key heads as heads (torch: sdp_utils.cpp, `supports_gqa`).
    """
    if shape.device.type != "cuda":
        return True
    half = shape.dtype in (torch.float16, torch.bfloat16)
    return half and mask is None and torch.cuda.get_device_capability(shape.device)[0] >= 8


def _attention_by_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    shape: Shape,
    dropout: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attend within one conversation, (1, heads, tokens, head size), with soft caps (Gemma 2) and sinks (GPT-OSS)."""
    tokens, groups = query.shape[2], shape.heads // shape.key_heads
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (shape.head_size**-0.5 if shape.scaling is None else shape.scaling)
    if shape.soft_cap is not None:
        scores = shape.soft_cap * torch.tanh(scores / shape.soft_cap)
    mask = _window_mask(query, shape.window)
    if mask is None:
        mask = torch.ones((tokens, tokens), dtype=torch.bool, device=query.device).tril()
    scores = scores.float().masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().reshape(1, -1, 1, 1).expand(1, -1, tokens, 1)], 3)
    weights = scores.softmax(3)[..., :tokens].to(value.dtype)
    return torch.nn.functional.dropout(weights, dropout) @ value


def _window_mask(query: torch.Tensor, window: int | None) -> torch.Tensor | None:
    """Return the (tokens, tokens) mask of a sliding window, or None where causal attention is the same."""
    tokens = query.shape[2]
    if window is None or tokens <= window:
        return None
    at = torch.arange(tokens, device=query.device)
    back = at[:, None] - at[None, :]
    return (back >= 0) & (back < window)
