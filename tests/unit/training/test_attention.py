"""Attention over a padding-free row equals attention over each conversation alone."""

import contextlib
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from minisft.errors import UserError
from minisft.training.attention import PADDING_FREE, in_autocast_type, padding_free_attention, register

LENGTHS = (5, 1, 9, 3)


def models():
    from transformers import Gemma2Config, GPTNeoXConfig, GptOssConfig, LlamaConfig, MistralConfig, Qwen2Config

    common: Any = dict(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    grouped: Any = dict(num_key_value_heads=2)
    return {
        "llama": LlamaConfig(**common, **grouped),
        "qwen2": Qwen2Config(**common, **grouped),
        "mistral with a window of 4": MistralConfig(**common, **grouped, sliding_window=4),
        "gpt-neox (pythia)": GPTNeoXConfig(**common),
        "gemma 2 with a soft cap": Gemma2Config(**common, **grouped, head_dim=8, attn_logit_softcapping=0.5),
        "gpt-oss with sinks": GptOssConfig(**common, **grouped, head_dim=8, num_local_experts=4, sliding_window=4),
    }


@pytest.mark.parametrize("name", models())
def test_a_row_gives_the_logits_of_its_conversations(name):
    from transformers import AutoModelForCausalLM

    register()
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(models()[name], attn_implementation="eager").eval()
    ours = AutoModelForCausalLM.from_config(models()[name], attn_implementation=PADDING_FREE).eval()
    with torch.no_grad():
        for weight in reference.parameters():  # large enough for a soft cap and a sink to show
            weight.normal_(0, 0.2)
    ours.load_state_dict(reference.state_dict())
    ids = torch.randint(0, 60, (1, sum(LENGTHS)))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    row = ours(ids, position_ids=positions, conversation_lengths=LENGTHS, use_cache=False).logits
    alone = torch.cat([reference(part).logits for part in ids.split(LENGTHS, 1)], 1)
    torch.testing.assert_close(row, alone, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize(
    ("options", "meaning"),
    [({"position_bias": torch.zeros(1)}, "a bias"), ({"conversation_lengths": None}, "lengths")],
)
def test_what_it_does_not_do_is_refused_by_name(options, meaning):
    heads = torch.zeros(1, 2, 4, 8)
    options = {"conversation_lengths": (4,), **options}
    with pytest.raises(UserError, match=meaning):
        padding_free_attention(torch.nn.Identity(), heads, heads, heads, None, **options)


@pytest.mark.parametrize(("device", "autocast", "expected"), [
    ("cuda", True, [torch.bfloat16] * 3),
    ("cuda", False, [torch.float32, torch.float32, torch.bfloat16]),
    ("cpu", True, [torch.float32, torch.float32, torch.bfloat16]),
])  # fmt: skip
def test_on_a_gpu_queries_and_keys_of_rotary_embeddings_take_the_format_of_autocast(device, autocast, expected):
    """With tensors that have a device and no memory, since the test must run without a GPU."""
    with FakeTensorMode(), autocast_switched(device, autocast):
        heads = [
            torch.empty(1, 2, 4, 8, device=device, dtype=dtype) for dtype in (*[torch.float32] * 2, torch.bfloat16)
        ]
        assert [one.dtype for one in in_autocast_type(*heads)] == expected


@contextlib.contextmanager
def autocast_switched(device, on):
    """Switch autocast for a device that is not here; `torch.autocast` switches itself off for such a device."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, on)
    torch.set_autocast_dtype(device, torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])
