"""Rows that join a running batch, against the same prompts decoded one at a time."""

import random
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from minisft.evaluation.generation import Decoder, DecodingRequest, Generated, Sampling, generate
from tests.unit.evaluation.test_generation import VOCABULARY, prompts_of, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model(context=256)


def alone(model, request):
    [answer] = generate(
        model, [request.prompt], stop_token_ids=request.stop_token_ids, max_new_tokens=request.max_new_tokens,
        sampling=request.sampling,
    )  # fmt: skip
    return answer


def decode_all(decoder, numbers, first=None):
    answers = dict(first or {})
    while decoder.busy:
        answers |= decoder.step()
    return [answers[number] for number in numbers]


@pytest.mark.parametrize("seed", range(3))
def test_rows_that_join_at_any_time_get_the_answers_that_they_get_alone(model, seed):
    choose = random.Random(seed)
    requests = []
    for prompt in prompts_of(*(choose.randint(1, 40) for _ in range(24)), seed=seed):
        sampling = choose.choice([None, None, Sampling(1.3, 0.9, choose.randint(0, 9)), Sampling(0.8, 0.7, 1)])
        stops = frozenset(choose.sample(range(VOCABULARY), choose.choice([0, 1, 8])))
        requests.append(DecodingRequest(prompt, stops, choose.randint(1, 40), sampling))
    decoder = Decoder(model)
    numbers: list[int] = []
    answers: dict[int, Generated] = {}
    waiting = list(requests)
    while waiting or decoder.busy:
        if waiting and choose.random() < 0.3:
            some = [waiting.pop(0) for _ in range(min(len(waiting), choose.randint(1, 6)))]
            numbers += decoder.add(some)
        answers |= decoder.step()
    assert [answers[number] for number in numbers] == [alone(model, request) for request in requests]


def test_every_row_has_its_own_limits_and_callback(model):
    prompts = prompts_of(5, 9, 3)
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}

    def note(row, until):
        def tell(token, scores):
            seen[row].append(token)
            return len(seen[row]) == until

        return tell

    limits = [(4, None), (12, 3), (7, None)]
    requests = [
        DecodingRequest(prompts[row], frozenset(), most, on_token=note(row, until))
        for row, (most, until) in enumerate(limits)
    ]
    decoder = Decoder(model)
    answers = decode_all(decoder, decoder.add(requests))
    assert [(len(a.ids), a.finish) for a in answers] == [(4, "length"), (3, "interrupted"), (7, "length")]
    assert [seen[row] for row in range(3)] == [a.ids for a in answers]


def test_scores_are_the_log_probabilities_of_the_raw_logits(model):
    [prompt, other] = prompts_of(6, 11)
    scores: list[Any] = []
    wanted = DecodingRequest(
        prompt, frozenset(), 5, Sampling(0.5, 0.6, 3), 4, on_token=lambda token, s: scores.append((token, s))
    )
    decoder = Decoder(model)
    silent: list[Any] = []
    quiet = DecodingRequest(other, frozenset(), 5, on_token=lambda token, s: silent.append(s))
    [answer, _] = decode_all(decoder, decoder.add([wanted, quiet]))
    with torch.inference_mode():
        logprobs = model(torch.tensor([prompt + answer.ids])).logits[0].log_softmax(dim=-1)
    assert silent == [None] * 5
    for place, (token, score) in enumerate(scores):
        row = logprobs[len(prompt) - 1 + place]
        assert score.logprob == pytest.approx(float(row[token]), abs=1e-4)
        values, ids = row.topk(4)
        assert [id for id, _ in score.top] == ids.tolist()
        assert [value for _, value in score.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_a_cancelled_row_leaves_at_once_and_the_others_go_on(model):
    requests = [DecodingRequest(prompt, frozenset(), 12) for prompt in prompts_of(5, 30, 8)]
    decoder = Decoder(model)
    numbers = decoder.add(requests)
    first = decoder.step()
    decoder.cancel([numbers[1]])
    assert len(decoder.rows) == 2
    assert decode_all(decoder, [numbers[0], numbers[2]], first) == [
        alone(model, requests[0]),
        alone(model, requests[2]),
    ]
    decoder.cancel(numbers)  # they have ended
    assert not decoder.busy


def test_the_cache_does_not_grow_with_the_number_of_rows_that_came_and_went(model):
    decoder = Decoder(model)
    widths = []
    for prompt in prompts_of(*[10] * 40):
        decoder.add([DecodingRequest(prompt, frozenset(), 8)])
        for _ in range(4):
            decoder.step()
        widths.append(decoder._mask.shape[1])
    assert max(widths) <= 10 + 8 + 1


def test_a_prompt_without_room_ends_at_the_next_step(model):
    decoder = Decoder(model)
    [number] = decoder.add([DecodingRequest([5] * 256, frozenset(), 8)])
    assert decoder.busy
    assert decoder.step() == {number: Generated([], "context")}
    assert not decoder.busy


@pytest.mark.parametrize("kind", ["mistral", "falcon_h1"])
def test_other_caches_take_no_rows_while_they_are_in_use(kind):
    torch.manual_seed(0)
    settings = {"sliding_window": 8} if kind == "mistral" else {
        "head_dim": 8, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1
    }  # fmt: skip
    config = AutoConfig.for_model(
        kind, vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, **settings,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    requests = [DecodingRequest(prompt, frozenset(), 9) for prompt in prompts_of(5, 20, 8)]
    decoder = Decoder(model)
    assert decoder.takes_rows
    numbers = decoder.add(requests)
    decoder.step()
    assert not decoder.takes_rows
    decoder.cancel([numbers[0]])
    answers = decode_all(decoder, numbers[1:])
    assert answers == [alone(model, request) for request in requests[1:]]
    assert decoder.takes_rows
