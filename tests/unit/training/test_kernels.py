"""A kernel for rows of several conversations is taken only where it gives what plain attention gives.

Without a GPU the kernels are played by explicit sums over a mask, with the arguments that the real ones document.
"""

import sys
import types
from dataclasses import replace

import pytest
import torch

from minisft.training import attention
from minisft.training.attention import (
    KERNELS,
    PADDING_FREE,
    Shape,
    first_verified,
    flash_attn,
    flash_attn_3,
    per_conversation_attention,
    register,
    select_kernel,
    torch_varlen,
    torch_varlen_repeated,
)

SHAPE = Shape(4, 2, 16, torch.float32, torch.device("cpu"), None, None)
SHAPES = [SHAPE, replace(SHAPE, key_heads=4), replace(SHAPE, window=3000), replace(SHAPE, scaling=0.7)]


def explicit(q, k, v, ends, scale, back, *, grouped=True):
    """Attend in one dense product; `back` is how many tokens before its own a token sees, -1 for all."""
    if not grouped and q.shape[1] != k.shape[1]:
        raise RuntimeError("as many key heads as heads are needed")
    k, v = (one.repeat_interleave(q.shape[1] // one.shape[1], 1) for one in (k, v))
    at = torch.arange(len(q))
    owner = torch.bucketize(at, ends[1:-1], right=True)
    distance = at[:, None] - at[None, :]
    seen = (owner[:, None] == owner[None, :]) & (distance >= 0)
    if back >= 0:
        seen &= distance <= back
    scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or q.shape[2] ** -0.5)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def right(q, k, v, lengths, shape):
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return explicit(q, k, v, ends, shape.scaling, -1 if shape.window is None else shape.window - 1)


def leaking(q, k, v, lengths, shape):
    return right(q, k, v, (sum(lengths),), shape)


def one_too_far(q, k, v, lengths, shape):
    return right(q, k, v, lengths, replace(shape, window=shape.window + 1))


def other_scale(q, k, v, lengths, shape):
    return right(q, k, v, lengths, replace(shape, scaling=1.1 * (shape.scaling or 0.25)))


def without_a_gradient(q, k, v, lengths, shape):
    return right(q, k.detach() + 0 * k, v, lengths, shape)


def absent(q, k, v, lengths, shape):
    raise ImportError("no such package")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("wrong", [leaking, other_scale, without_a_gradient, absent])
def test_the_first_that_is_right_is_taken(shape, wrong):
    assert first_verified([wrong, right], shape) is right
    assert first_verified([wrong], shape) is None


def test_a_window_that_is_one_too_long_is_seen():
    assert first_verified([one_too_far], replace(SHAPE, window=4096)) is None


def test_half_precision_is_close_enough():
    assert first_verified([right], replace(SHAPE, dtype=torch.bfloat16)) is right


@pytest.mark.parametrize("shape", SHAPES)
def test_the_package_is_called_as_it_documents(shape, monkeypatch):
    def function(q, k, v, cu_q, cu_k, max_q, max_k, *, softmax_scale, causal, window_size, deterministic):
        assert causal
        assert not deterministic
        assert cu_q.dtype == torch.int32
        assert torch.equal(cu_q, cu_k)
        assert max_q == max_k == int((cu_q[1:] - cu_q[:-1]).max())
        return explicit(q, k, v, cu_q, softmax_scale, window_size[0])

    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=function))
    assert first_verified(KERNELS, shape) is flash_attn


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_sums", [False, True], ids=["output alone", "with the log-sum-exp"])
def test_flash_attention_3_comes_first(shape, with_sums, monkeypatch):
    """Its second version returns the output alone, the first one a tuple (hopper/flash_attn_interface.py)."""

    def function(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, *, window_size=(-1, -1), deterministic=False,
    ):  # fmt: skip
        assert causal
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert cu_seqlens_q.dtype == torch.int32
        assert max_seqlen_q == max_seqlen_k
        output = explicit(q, k, v, cu_seqlens_q, softmax_scale, window_size[0])
        return (output, None) if with_sums else output

    def of_another_gpu(*_, **__):
        raise RuntimeError("FlashAttention 3 needs a Hopper GPU")

    def second(q, k, v, ends, *_, softmax_scale, window_size, **__):
        return explicit(q, k, v, ends, softmax_scale, window_size[0])

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=second))
    package = types.SimpleNamespace(flash_attn_varlen_func=function)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    assert first_verified(KERNELS, shape) is flash_attn_3
    package.flash_attn_varlen_func = of_another_gpu
    assert first_verified(KERNELS, shape) is flash_attn


GPU = torch.device("cuda")


@pytest.mark.parametrize(
    ("changes", "capability", "key_heads"),
    [
        ({}, 9, 4),
        ({"window": 2}, 9, 4),
        ({"dtype": torch.bfloat16}, 9, 2),
        ({"dtype": torch.bfloat16, "window": 2}, 9, 4),
        ({"dtype": torch.float16}, 7, 4),
        ({"device": torch.device("cpu")}, 9, 2),
        ({"device": torch.device("cpu"), "window": 2}, 9, 2),
        ({"key_heads": 4}, 9, 4),
    ],
)
def test_key_heads_are_repeated_where_no_fast_kernel_shares_them(changes, capability, key_heads, monkeypatch):
    """On a GPU that is not there: the tensors that reach torch's attention have the shapes that its kernels take."""
    shape = replace(SHAPE, device=GPU) if "device" not in changes else SHAPE
    shape, lengths, seen = replace(shape, **changes), (7, 3), []
    exact = torch.nn.functional.scaled_dot_product_attention

    def attend(query, key, value, mask, dropout, causal, *, scale, enable_gqa):
        assert enable_gqa == (key.shape[1] != query.shape[1])
        seen.append((key.shape[1], value.shape[1]))
        return exact(query, key, value, mask, dropout, causal, scale=scale, enable_gqa=enable_gqa)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", attend)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (capability, 0))
    torch.manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), heads, 16) for heads in (4, shape.key_heads, shape.key_heads))
    found = per_conversation_attention(q, k, v, lengths, shape)
    assert seen == [(key_heads, key_heads)] * 2
    torch.testing.assert_close(found, right(q, k, v, lengths, shape))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("shares_heads", "taken"), [(True, torch_varlen), (False, torch_varlen_repeated)])
def test_torchs_own_is_called_as_it_documents(shape, shares_heads, taken, monkeypatch):
    def new(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
        assert cu_q.dtype == torch.int32
        assert torch.equal(cu_q, cu_k)
        assert max_q == max_k
        assert window_size[1] == 0  # causal
        return explicit(q, k, v, cu_q, scale, window_size[0], grouped=enable_gqa)

    def old(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size):
        return new(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window_size)

    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", new if shares_heads else old)
    assert first_verified(KERNELS, shape) is taken


@pytest.mark.parametrize(
    ("shape", "dropout"), [(SHAPE, 0.0), (replace(SHAPE, dtype=torch.bfloat16), 0.0)], ids=["fp32", "bf16"]
)
def test_a_cpu_has_none(shape, dropout):
    assert select_kernel(shape, dropout) is None


@pytest.mark.parametrize("window", [None, 4])
def test_a_model_gives_the_same_logits_with_a_kernel(window, monkeypatch):
    from transformers import AutoModelForCausalLM, MistralConfig

    config = MistralConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=window,
    )  # fmt: skip
    register()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=PADDING_FREE).eval()
    lengths = (5, 1, 9, 3)
    ids = torch.randint(0, 60, (1, sum(lengths)))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]

    def logits():
        return model(ids, position_ids=positions, conversation_lengths=lengths, use_cache=False).logits

    expected, windows = logits(), set()

    def right_everywhere(shape, dropout):
        windows.add(shape.window)
        return right

    monkeypatch.setattr(attention, "select_kernel", right_everywhere)
    torch.testing.assert_close(logits(), expected, atol=2e-5, rtol=2e-4)
    assert windows == {window}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shape", SHAPES)
def test_a_gpu_has_one(shape):
    shape = replace(shape, dtype=torch.bfloat16, device=torch.device("cuda"), head_size=64)
    assert select_kernel(shape, 0.0) is not None
    assert select_kernel(shape, 0.1) is None
    assert select_kernel(replace(shape, dtype=torch.float32), 0.0) is None
