"""The decoding loop against transformers' own `generate`, one prompt at a time, in fp32."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from minisft.evaluation.generation import Generated, Sampling, draw_tokens, generate, inference_dtype, plan_batches
from minisft.evaluation.kv_cache import PromptCache, new_cache
from minisft.models import forward_arguments

VOCABULARY = 97


def tiny_model(seed=0, context=64):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=context, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def prompts_of(*lengths, seed=1):
    draws = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=draws).tolist() for n in lengths]


@pytest.fixture
def shapes(model):
    """The shapes of input_ids that the model is given during the test."""
    seen: list[tuple[int, ...]] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    yield seen
    hook.remove()


def reference_answer(model, prompt, stops, new):
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new,
        eos_token_id=list(stops), pad_token_id=0,
    )  # fmt: skip
    answer = out[0, len(prompt) :].tolist()
    return answer[:-1] if answer and answer[-1] in stops else answer


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize("stops", [(2,), (2, 5, 11, 40, 41, 42, 43, 60)])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_same_ids_as_generate_one_at_a_time(model, stops, batch_size):
    prompts = prompts_of(7, 3, 12, 3, 1, 20, 9, 5, 14, 2, 31)
    answers = generate(model, prompts, stop_token_ids=stops, max_new_tokens=24, batch_size=batch_size, pad_token_id=0)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.ids == reference_answer(model, prompt, stops, 24)
        assert answer.finish == ("length" if len(answer.ids) == 24 else "stop")
    if len(stops) > 1:
        assert len({len(answer.ids) for answer in answers}) > 2, "rows should end at different steps"


def test_a_beginning_that_all_prompts_share_is_computed_once(model, shapes):
    [system] = prompts_of(20, seed=5)
    prompts = [system + prompt for prompt in prompts_of(7, 3, 12, 1)]
    expected = [reference_answer(model, prompt, (2, 5, 40), 16) for prompt in prompts]
    shapes.clear()  # of the reference answers
    answers = generate(model, prompts, stop_token_ids=(2, 5, 40), max_new_tokens=16)
    assert shapes[:2] == [(1, 20), (4, 12)]
    assert [answer.ids for answer in answers] == expected
    assert generate(model, prompts, stop_token_ids=(2, 5, 40), max_new_tokens=16) == answers


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("mistral", {"sliding_window": 8}),
        ("gemma2", {"sliding_window": 8, "head_dim": 8, "attn_implementation": "eager"}),
        ("gpt_neox", {}),
        ("qwen3", {"head_dim": 8}),
        ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 2}),
    ],
)
def test_other_architectures_give_the_same_ids(kind, settings):
    torch.manual_seed(3)
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "eos_token_id": 2,
    }  # fmt: skip
    config = AutoConfig.for_model(kind, **{**sizes, **settings})
    model = AutoModelForCausalLM.from_config(config).eval()
    [system] = prompts_of(9, seed=6)
    prompts = [system + prompt for prompt in prompts_of(4, 13, 9, 2, 7, 5, 1, 8, 3, 6)]
    answers = generate(model, prompts, stop_token_ids=(2, 7, 9), max_new_tokens=20)
    assert [a.ids for a in answers] == [reference_answer(model, p, (2, 7, 9), 20) for p in prompts]


def test_never_beyond_the_context(model):
    prompts = prompts_of(60, 64, 70, 10)
    answers = generate(model, prompts, stop_token_ids=(), max_new_tokens=20)
    assert [len(a.ids) for a in answers] == [4, 0, 0, 20]
    assert [a.finish for a in answers] == ["context", "context", "context", "length"]


def test_finished_rows_leave_the_batch(model, shapes):
    generate(model, prompts_of(*range(1, 17)), stop_token_ids=range(0, 97, 4), max_new_tokens=20, prefill_rows=16)
    sizes = [rows for rows, _ in shapes]
    assert sizes[0] == 16
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] <= 2


def test_prompts_go_in_by_eights_and_are_decoded_together(model, shapes):
    prompts = prompts_of(*range(1, 20))
    expected = [reference_answer(model, prompt, (2, 5), 6) for prompt in prompts]
    shapes.clear()  # of the reference answers
    answers = generate(model, prompts, stop_token_ids=(2, 5), max_new_tokens=6)
    assert shapes[:4] == [(8, 19), (8, 11), (3, 3), (19, 1)]
    assert [answer.ids for answer in answers] == expected


def test_a_callback_sees_every_token(model):
    seen: dict[int, list[int]] = {}
    answers = generate(
        model, prompts_of(5, 2, 9), stop_token_ids=(2, 5, 11), max_new_tokens=12, batch_size=2,
        on_token=lambda row, token: seen.setdefault(row, []).append(token),
    )  # fmt: skip
    assert [seen.get(row, []) for row in range(3)] == [a.ids for a in answers]


def test_a_callback_ends_its_row(model):
    [answer] = generate(model, prompts_of(5), stop_token_ids=(), max_new_tokens=12, on_token=lambda row, token: True)
    assert answer == Generated(answer.ids, "interrupted")
    assert len(answer.ids) == 1


def test_the_second_turn_reuses_the_cache_of_the_first(model, shapes):
    kept = PromptCache([])
    [first_prompt, more] = prompts_of(15, 6)
    settings: dict[str, Any] = {"stop_token_ids": (2,), "max_new_tokens": 8}
    [first] = generate(model, [first_prompt], prompt_cache=kept, **settings)
    second_prompt = first_prompt + first.ids + more
    shapes.clear()
    [second] = generate(model, [second_prompt], prompt_cache=kept, **settings)
    assert shapes[0][1] <= len(more) + 1  # the last token of the first answer may not have gone through the model
    [edited] = generate(model, [first_prompt[:9] + more], prompt_cache=kept, **settings)
    again = [generate(model, [p], **settings)[0] for p in (second_prompt, first_prompt[:9] + more)]
    assert [second, edited] == again


def test_sampling_is_seeded_and_a_tiny_top_p_is_greedy(model):
    prompts = prompts_of(5, 8)
    settings: dict[str, Any] = {"stop_token_ids": (2,), "max_new_tokens": 10}
    greedy = generate(model, prompts, **settings)
    assert generate(model, prompts, sampling=Sampling(1.0, 1e-9), **settings) == greedy
    drawn = [generate(model, prompts, sampling=Sampling(2.0, 0.95, seed), **settings) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_is_drawn_does_not_depend_on_the_batch(model):
    prompts = prompts_of(7, 3, 12, 3, 1, 20, 9, 5)
    settings: dict[str, Any] = {
        "stop_token_ids": (2, 5, 11, 40, 41),
        "max_new_tokens": 16,
        "sampling": Sampling(1.5, 0.9, 3),
    }
    together = generate(model, prompts, **settings)
    assert generate(model, prompts, batch_size=3, **settings) == together
    assert [generate(model, [prompt], **settings)[0] for prompt in prompts[::-1]] == together[::-1]
    assert len({len(answer.ids) for answer in together}) > 2, "rows should end at different steps"


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8)])
def test_tokens_are_sampled_with_the_probabilities_of_the_model(temperature, top_p):
    """Against transformers' own temperature and nucleus, over 20,000 draws."""
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    torch.manual_seed(5)
    logits = 2 * torch.randn(1, 30)
    warped = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, logits))
    expected = torch.softmax(warped, dim=-1)[0]
    rows = 500
    sampling = Sampling(temperature, top_p)
    streams = [sampling.stream_of([row]) for row in range(rows)]
    picked = torch.cat([draw_tokens(logits.expand(rows, -1), sampling, streams) for _ in range(40)])
    drawn = torch.bincount(picked, minlength=30) / len(picked)
    assert not drawn[expected == 0].any()
    assert (drawn - expected).abs().max() < 0.012  # over three standard deviations of the likeliest


def test_batches_hold_similar_lengths_and_every_prompt_once():
    batches = plan_batches([5, 100, 7, 90, 6], batch_size=2)
    assert batches == [[1, 3], [2, 4], [0]]
    assert plan_batches([40000, 30000], 8, lambda longest: 65536 // longest) == [[0], [1]]


class RenamedCacheLlama(LlamaForCausalLM):
    """A model whose forward names its cache as transformers does from 5.24 on, and refuses the earlier name."""

    def forward(self, input_ids, attention_mask, position_ids, cache, use_cache, logits_to_keep):
        hidden = self.model(input_ids, attention_mask, position_ids, cache, use_cache=use_cache).last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(hidden[:, -logits_to_keep:]))


def test_the_cache_is_passed_under_the_name_that_the_model_has_for_it(model):
    renamed = RenamedCacheLlama(model.config).eval()
    renamed.load_state_dict(model.state_dict())
    prompts = prompts_of(7, 3, 12)
    settings: dict[str, Any] = {"stop_token_ids": (2,), "max_new_tokens": 8, "batch_size": 2, "pad_token_id": 0}
    assert generate(renamed, prompts, **settings) == generate(model, prompts, **settings)


def test_the_preallocated_cache_gives_the_logits_of_the_plain_one(model):
    preallocated: Any = new_cache(model)
    plain: Any = DynamicCache(config=model.config)
    cache_name = "past_key_values" if "past_key_values" in forward_arguments(model) else "cache"
    for ids in prompts_of(5, 1, 1, 70, 1):
        tokens = torch.tensor([ids, ids[::-1]])
        with torch.inference_mode():
            left, right = (model(tokens, **{cache_name: c}, use_cache=True).logits for c in (preallocated, plain))
        assert torch.equal(left, right)
    for cache in (preallocated, plain):
        cache.crop(-3)
        cache.batch_select_indices(torch.tensor([1]))
    assert torch.equal(preallocated.layers[1].keys, plain.layers[1].keys)


def test_inference_uses_bf16_only_on_gpus_that_support_it():
    for capability, dtype in (((7, 5), torch.float16), ((8, 0), torch.bfloat16)):
        assert inference_dtype(compute_capability=capability) is dtype
        assert inference_dtype("fp32", capability) is torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_inference_uses_fp32_without_a_gpu():
    assert inference_dtype() is torch.float32


def test_rows_that_end_early_do_not_disturb_recurrent_states_beside_keys_and_values():
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "falcon_h1", vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8,
        mamba_d_state=8, mamba_n_groups=1, bos_token_id=0, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.2)
    prompts = prompts_of(7, 3, 12, 5)
    stops = tuple(range(2, 40))
    answers = generate(model, prompts, stop_token_ids=stops, max_new_tokens=12, batch_size=4, pad_token_id=0)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.ids == reference_answer(model, prompt, stops, 12)
    assert len({len(answer.ids) for answer in answers}) > 1, "rows should end at different steps"
