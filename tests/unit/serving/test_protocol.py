"""Bodies to checked requests; whatever a body holds, it is a request or an ApiError."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisft.evaluation.generation import Sampling
from minisft.serving.protocol import ApiError, chat_request, completion_request, read_json, tokenize_request
from minisft.serving.reply_bodies import as_json
from minisft.serving.server import Service
from tests.unit.serving.scripted import ScriptedPool, byte_encoder

MESSAGES = [{"role": "user", "content": "a"}]


def test_defaults_are_those_of_openai():
    options = chat_request({"model": "final", "messages": MESSAGES}).options
    assert (options.choices, options.max_tokens, options.stops, options.stream) == (1, None, (), False)
    assert options.top_logprobs is None
    assert options.sampling is not None
    assert (options.sampling.temperature, options.sampling.top_p) == (1.0, 1.0)
    assert completion_request({"model": "final", "prompt": "a"}).options.max_tokens == 16


def test_values_are_taken():
    body = {"model": "final", "messages": MESSAGES, "n": 2, "max_completion_tokens": 5, "stop": "x", "seed": -3,
            "temperature": 0.5, "top_p": 0.9, "logprobs": True, "stream": True, "stream_options": {"include_usage": True}}  # fmt: skip
    options = chat_request(body).options
    assert (options.choices, options.max_tokens, options.stops, options.top_logprobs) == (2, 5, ("x",), 0)
    assert options.sampling == Sampling(0.5, 0.9, -3)
    assert options.stream
    assert options.stream_usage
    assert chat_request({**body, "temperature": 0}).options.sampling is None
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert chat_request({**body, "messages": parts}).conversation.messages[0].content in ("ab", "a\n\nb", "a\nb")
    assert completion_request({"model": "m", "prompt": [[1, 2], [3]]}).prompts == ((1, 2), (3,))
    assert completion_request({"model": "m", "prompt": [1, 2]}).prompts == ((1, 2),)
    assert completion_request({"model": "m", "prompt": ["a", "b"], "logprobs": 0}).options.top_logprobs == 0


@pytest.mark.parametrize("key", ["temperature", "top_p"])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999", '"1"', "true", "-1", "9"])
def test_numbers_are_numbers(key, value):
    text = f'{{"model": "m", "messages": [{{"role": "user", "content": "a"}}], "{key}": {value}}}'
    with pytest.raises(ApiError) as refused:
        chat_request(read_json(text.encode()))
    assert refused.value.status == 400


def test_pictures_are_refused():
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]
    with pytest.raises(ApiError) as refused:
        chat_request({"model": "m", "messages": image})
    assert refused.value.status == 400


def refusal(read, data):
    try:
        read(read_json(data))
    except ApiError as error:
        return error
    return None


KEYS = ["model", "messages", "prompt", "n", "max_tokens", "stop", "seed", "temperature", "top_p", "stream", "logprobs",
        "top_logprobs", "tools", "tool_choice", "stream_options", "echo", "response_format", "other", "role", "content",
        "tool_calls", "function", "name", "arguments", "type"]  # fmt: skip
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["user", "tool", "final"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=8), st.booleans())
def test_any_body_is_a_request_or_a_refusal(body, whole):
    if whole:
        body = {"model": "final", "messages": MESSAGES, "prompt": "a"} | body
    for read in (chat_request, completion_request, tokenize_request):
        error = refusal(read, json.dumps(body).encode())
        assert error is None or error.status in (400, 422)
        assert error is None or json.loads(as_json(error.body()))["error"]["message"]


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_refused(data):
    error = refusal(chat_request, data)
    assert error is not None
    assert error.status == 400


def test_deep_nesting_is_refused():
    for text in (b"[" * 200000, b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}"):
        with pytest.raises(ApiError):
            chat_request(read_json(text))


# --- prompts ----------------------------------------------------------------------------------------------


def service(template=None):
    pool = ScriptedPool({"final": None})
    pool.encoder = byte_encoder(template)
    return Service(pool, None)  # type: ignore[arg-type]


def job(made, **body):
    return made.chat_job(chat_request({"model": "final", "messages": MESSAGES, **body}), print)


def test_tools_that_a_template_leaves_out_are_refused():
    tools = [{"type": "function", "function": {"name": "f"}}]
    made = service("{% if tools %}{% endif %}{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}")
    with pytest.raises(ApiError, match="has no tools"):
        job(made, tools=tools)
    assert job(made, tools=tools, tool_choice="none")
    written = job(service(), tools=tools)[0]  # a template without a form for tools gets them as a system prompt
    assert len(written.rows[0].prompt) > len(job(service())[0].rows[0].prompt)


def test_an_overflow_is_told_in_tokens():
    assert job(service())[0].rows[0].max_new_tokens == 4096 - 4
    with pytest.raises(ApiError, match="with max_tokens = 4093 that is 1 more than the context of 4096"):
        job(service(), max_tokens=4093)
    long = [{"role": "user", "content": "a" * 5000}]
    with pytest.raises(ApiError, match="the prompt has 5003 tokens; .* that is 908 more"):
        job(service(), messages=long)


def test_the_answers_of_one_prompt_differ_in_their_seed():
    rows = job(service(), n=3, seed=5)[0].rows
    assert [row.sampling.seed for row in rows if row.sampling] == [5, 6, 7]
