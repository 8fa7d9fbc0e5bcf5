"""Attention over a padding-free row: causal, within each conversation alone.

Without a mask, transformers would build a dense block-diagonal one of (tokens, tokens) for a row of several
conversations. The function here runs causal scaled-dot-product attention on each conversation instead.
"""

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from minisft.errors import UserError

PADDING_FREE = "minisft_padding_free"


def register() -> None:
    """Make the attention known to transformers as `attn_implementation=PADDING_FREE`.

    It is not entered in the mask registry on purpose: transformers then builds no mask at all.
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
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each conversation of a row.

    Args:
        module: the attention layer that calls.
        query: (1, heads, tokens, head size); key and value may have fewer heads (grouped queries).
        key: (1, key heads, tokens, head size).
        value: like key.
        attention_mask: always None.
        dropout: probability of dropping an attention weight.
        scaling: factor on the scores; None is 1 / sqrt(head size).
        conversation_lengths: tokens of each conversation; handed through the model's forward.
        sliding_window: how many tokens back a token sees, itself included.
        **kwargs: what else the model hands to its attention.

    Returns:
        (1, tokens, heads, head size), and None for the weights, which are not computed.

    Raises:
        UserError: the model needs something of its attention that this function does not do.
    """
    _refuse(module, attention_mask, conversation_lengths, kwargs)
    lengths = list(conversation_lengths or ())
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True):
        mask = _window_mask(q, sliding_window)
        causal = mask is None
        outputs.append(scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scaling, enable_gqa=grouped))
    return torch.cat(outputs, 2).transpose(1, 2), None


def _refuse(
    module: torch.nn.Module,
    mask: torch.Tensor | None,
    lengths: tuple[int, ...] | None,
    kwargs: dict[str, Any],
) -> None:
    mend = "take another model, or tell us of this one"
    name = type(module).__name__
    if lengths is None:
        raise UserError(name, "this model does not hand the lengths of a row to its attention", mend)
    if mask is not None:
        raise UserError(name, "this model makes an attention mask of its own", mend)
    for option, meaning in (
        ("softcap", "a soft cap on"),
        ("s_aux", "a sink in"),
        ("position_bias", "a bias on"),
    ):
        if kwargs.get(option) is not None:
            raise UserError(name, f"this model needs {meaning} its attention scores", mend)


def _window_mask(query: torch.Tensor, window: int | None) -> torch.Tensor | None:
    """Return the (tokens, tokens) mask of a sliding window, or None where causal attention is the same."""
    tokens = query.shape[2]
    if window is None or tokens <= window:
        return None
    at = torch.arange(tokens, device=query.device)
    back = at[:, None] - at[None, :]
    return (back >= 0) & (back < window)
