"""Attention over a padding-free row: causal, within each conversation alone.

Without a mask, transformers would build a dense block-diagonal one of (tokens, tokens) for a row of several
conversations. The function here runs causal attention on each conversation instead: by a kernel of the GPU for rows of
several conversations, or by scaled-dot-product attention on one conversation after the other.
"""

from typing import Any

import torch

from minisft.errors import UserError
from minisft.training.kernels import Shape, plain, usable

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
    lengths = tuple(conversation_lengths or ())
    window = sliding_window if sliding_window is not None and max(lengths) > sliding_window else None
    shape = Shape(query.shape[1], key.shape[1], query.shape[3], query.dtype, query.device, scaling, window)
    rows = [one[0].transpose(0, 1) for one in (query, key, value)]  # (tokens, heads, head size)
    kernel = usable(shape, dropout) if value.shape == key.shape else None
    if kernel is None:
        return plain(rows[0], rows[1], rows[2], lengths, shape, dropout)[None], None
    return kernel(rows[0], rows[1], rows[2], lengths, shape)[None], None


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
