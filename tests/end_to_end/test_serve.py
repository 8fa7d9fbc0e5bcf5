"""`minisft serve` through the command line, asked with OpenAI's own client and with bare HTTP."""

import json
import random
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import psutil
import pytest

from tests.command import refused, run
from tests.served import Served, say
from tests.tiny import byte_tokenizer, write_tiny_model

KEY = "a-key-of-the-test"
# Writes tools and calls as Qwen's and Hermes' templates do.
TEMPLATE = (
    "{%- if messages[0].role == 'assistant' %}{{ raise_exception('A user must begin.') }}{% endif %}"
    "{%- if tools %}<|im_start|>system\nTools:{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}<|im_end|>\n"
    "{% endif %}{%- for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{%- for call in message.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{%- endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a place",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
        },
    }
]


@pytest.fixture(scope="module")
def started(scored_run, tmp_path_factory):
    """Three servers, started together: of the run, of a model with tools that asks for a key, and one to be stopped."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = TEMPLATE
    folder = write_tiny_model(tmp_path_factory.mktemp("tools") / "model", 1, tokenizer)
    servers = {"run": Served(scored_run), "keyed": Served(folder, "--api-key", KEY), "third": Served(scored_run)}
    yield servers
    for served in servers.values():
        if served.process.poll() is None:
            assert served.stop(signal.SIGTERM)[0] == 0, served.errors


@pytest.fixture(scope="module")
def server(started):
    return started["run"].ready()


@pytest.fixture(scope="module")
def keyed(started):
    return started["keyed"].ready()


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


# --- the openai client ------------------------------------------------------------------------------------


def test_the_models_are_the_final_one_the_base_and_the_checkpoints(client):
    assert [model.id for model in client.models.list()] == ["final", "base", "checkpoint-4", "checkpoint-2"]
    assert client.models.retrieve("checkpoint-2").id == "checkpoint-2"
    with pytest.raises(openai.NotFoundError, match="there are: final, base, checkpoint-4, checkpoint-2"):
        client.models.retrieve("checkpoint-3")


def test_a_greedy_answer_is_that_of_minisft_chat(client, scored_run, capsys):
    request = say("3: tea with milk", max_tokens=24)
    answer = client.chat.completions.create(**request)
    done = run(capsys, "chat", scored_run, "--message", "3: tea with milk", "--max-new-tokens", 24)
    assert done.status == 0, done.err
    assert answer.choices[0].message.content == done.out.removesuffix("\n")
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_has_the_same_text_in_chunks(client):
    request = say("3: tea with milk", max_tokens=24)
    whole = client.chat.completions.create(**request)
    chunks = list(client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == whole.choices[0].finish_reason
    assert all(c.choices[0].finish_reason is None for c in chunks[:-2])
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_log_probabilities_have_the_likeliest_tokens_and_bytes(client):
    answer = client.chat.completions.create(**say("1: cup", logprobs=True, top_logprobs=3))
    entries = answer.choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == answer.choices[0].message.content
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob  # greedy: the likeliest
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob >= entry.top_logprobs[2].logprob
    streamed = client.chat.completions.create(**say("1: cup", logprobs=True, top_logprobs=3), stream=True)
    found = [e for c in streamed if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert [(e.token, e.bytes) for e in found] == [(e.token, e.bytes) for e in entries]


def test_completions_continue_texts_and_ids(client):
    settings = {"model": "base", "max_tokens": 6, "temperature": 0, "logprobs": 2}
    answer = client.completions.create(prompt=["tea", "milk"], n=2, **settings)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text == answer.choices[1].text
    probabilities = answer.choices[0].logprobs
    assert "".join(probabilities.tokens) == answer.choices[0].text
    assert [len(top) for top in probabilities.top_logprobs] == [2] * 6
    assert probabilities.text_offset == [0, 1, 2, 3, 4, 5]
    ids = [byte_tokenizer()("tea")["input_ids"]]
    by_ids = client.completions.create(prompt=ids, **settings)
    assert by_ids.choices[0].text == answer.choices[0].text
    streamed = client.completions.create(prompt=ids, stream=True, **settings)
    assert "".join(chunk.choices[0].text for chunk in streamed) == answer.choices[0].text


def test_a_seed_gives_the_same_sample_and_another_seed_another(client):
    def sample(seed):
        answer = client.chat.completions.create(**say("5: pot", temperature=1.5, top_p=0.95, seed=seed, n=3))
        return [choice.message.content for choice in answer.choices]

    assert sample(1) == sample(1) != sample(2)
    assert len(set(sample(1))) == 3


def test_an_answer_ends_before_a_stop_text(client):
    whole = client.chat.completions.create(**say("3: tea", model="base")).choices[0].message.content
    stop = whole[5:7]
    cut = whole[: whole.index(stop)]
    for stops in (stop, ["never in it", stop]):
        answer = client.chat.completions.create(**say("3: tea", model="base", stop=stops))
        assert answer.choices[0].message.content == cut
        assert answer.choices[0].finish_reason == "stop"
        streamed = client.chat.completions.create(**say("3: tea", model="base", stop=stops), stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == cut


def test_sixteen_at_once_get_the_answers_that_they_get_one_at_a_time(client):
    choose = random.Random(0)
    models = ["final", "base", "checkpoint-2", "checkpoint-4"]
    requests = [say(f"{n}: tea " * choose.randint(1, 6), model=models[n % 4], max_tokens=16) for n in range(16)]

    def ask(request):
        return client.chat.completions.create(**request).choices[0].message.content

    alone = [ask(request) for request in requests]
    with ThreadPoolExecutor(16) as threads:
        assert list(threads.map(ask, requests)) == alone


def test_tools_are_rendered_by_a_template_that_has_them(keyed):
    asked: Any = openai.OpenAI(base_url=f"{keyed.url}/v1", api_key=KEY, max_retries=0)
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Bonn"}'}}
    messages: Any = [
        {"role": "user", "content": "How is it in Bonn?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Rain"},
    ]
    settings: Any = {"model": "final", "messages": messages, "max_tokens": 4, "temperature": 0}
    with_tools = asked.chat.completions.create(**settings, tools=TOOLS)
    without = asked.chat.completions.create(**settings, tools=TOOLS, tool_choice="none")
    assert with_tools.usage.prompt_tokens > without.usage.prompt_tokens
    body = {"model": "final", "messages": messages, "tools": TOOLS}
    _, rendered = keyed.ask("/tokenize", body, Authorization=f"Bearer {KEY}")
    text = "".join(rendered["pieces"])
    assert '"name": "weather"' in text
    assert '<tool_call>\n{"name": "weather", "arguments": {"place": "Bonn"}}\n</tool_call>' in text
    messages = [{"role": role, "content": "a"} for role in ("assistant", "user")]
    with pytest.raises(openai.BadRequestError, match="template refuses"):
        asked.chat.completions.create(model="final", messages=messages)
    assert text.endswith("<|im_start|>tool\nRain<|im_end|>\n<|im_start|>assistant\n")


# --- what is refused --------------------------------------------------------------------------------------

REFUSED = [
    ("not JSON", 400, b"{"),
    ("UTF-8", 400, b'{"model": "\xff"}'),
    ("not a JSON object", 400, []),
    ("model is missing", 400, {"messages": [{"role": "user", "content": "a"}]}),
    ("messages is missing", 400, {"model": "final"}),
    ("there are: final, base", 404, say("a", model="gpt-4")),
    ("n:", 400, say("a", n=17)),
    ("n:", 400, say("a", n=0)),
    ("temperature", 400, say("a", temperature=-1)),
    ("top_p", 400, say("a", top_p=0)),
    ("max_tokens", 400, say("a", max_tokens="many")),
    ("differ", 400, say("a", max_completion_tokens=3)),
    ("stop", 400, say("a", stop=[""])),
    ("top_logprobs", 400, say("a", top_logprobs=2)),
    ("top_logprobs", 400, say("a", logprobs=True, top_logprobs=21)),
    ("stream_options", 400, say("a", stream_options={"include_usage": True})),
    ("unknown role", 400, say("a", messages=[{"role": "wizard", "content": "a"}])),
    ("nothing to answer", 400, say("a", messages=[{"role": "assistant", "content": "a"}])),
    ("surrogate", 400, b'{"model": "final", "messages": [{"role": "user", "content": "a"}], "stop": "\\ud800"}'),
    ("frequency_penalty is not supported", 422, say("a", frequency_penalty=1.5)),
    ("response_format is not supported", 422, say("a", response_format={"type": "json_object"})),
    ("top_k is not supported", 422, say("a", top_k=5)),
    ("tool_choice", 422, say("a", tools=TOOLS, tool_choice="required")),
    ("is 16 more than the context of 512", 400, say("1", max_tokens=512)),
    ("more than the context of 512", 400, say("tea " * 200)),
]


@pytest.mark.parametrize(("expected", "status", "body"), REFUSED, ids=[f"{row[1]}-{row[0]}" for row in REFUSED])
def test_bad_requests_get_an_error_in_openais_form(server, expected, status, body):
    got, answer = server.ask("/v1/chat/completions", body)
    assert got == status
    assert set(answer) == {"error"}
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert expected in answer["error"]["message"]
    assert "Traceback" not in str(answer)


def test_parameters_that_change_nothing_are_accepted(server):
    body = say("a", frequency_penalty=0, presence_penalty=0.0, logit_bias={}, user="me", response_format={"type": "text"},
               metadata={"a": "b"}, store=False, top_k=None, max_completion_tokens=12)  # fmt: skip
    assert server.ask("/v1/chat/completions", body)[0] == 200


def test_paths_methods_and_types(server):
    assert server.ask("/v1/unknown")[0] == 404
    assert server.ask("/v1/chat/completions")[0] == 405
    assert server.ask("/v1/chat/completions", say("a"), Content_Type="text/plain")[0] == 415
    assert server.ask("/v1/completions", {"model": "final", "prompt": ""})[0] == 400
    assert server.ask("/v1/completions", {"model": "final", "prompt": [99999]})[0] == 400
    assert server.ask("/v1/completions", {"model": "final", "prompt": "a", "echo": True})[0] == 422


def test_a_large_body_is_refused_with_and_without_its_length(server):
    large = b'{"model": "' + b"a" * (5 << 20) + b'"}'
    assert server.ask("/v1/chat/completions", large)[0] == 413
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost:%d\r\nContent-Type: application/json\r\n"
        connection.sendall((head % server.port + "Transfer-Encoding: chunked\r\n\r\n").encode())
        try:
            for _ in range(80):
                connection.sendall(b"10000\r\n" + b"a" * 0x10000 + b"\r\n")
        except OSError:
            pass  # the server has answered and closed the connection
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413")


def test_foreign_hosts_and_origins_are_refused(server):
    for host in ("evil.example", f"evil.example:{server.port}", "127.0.0.1:1", "", f"127.0.0.1.evil:{server.port}"):
        assert server.ask("/v1/models", Host=host)[0] == 403, host
    for host in (f"localhost:{server.port}", f"127.0.0.1:{server.port}", f"[::1]:{server.port}"):
        assert server.ask("/v1/models", Host=host)[0] == 200, host
        assert server.ask("/v1/models", Host=host, Origin=f"http://{host}")[0] == 200, host
    for origin in (
        "http://evil.example",
        "null",
        "http://localhost:1",
        "file://",
        f"http://a@localhost:{server.port}x",
    ):
        status, answer = server.ask("/v1/chat/completions", say("a"), Origin=origin)
        assert (status, set(answer)) == (403, {"error"}), origin
    status, headers, _ = server.raw("/v1/models", method="OPTIONS", Origin=server.url)
    assert not [name for name in headers if name.lower().startswith("access-control")]


def test_the_page_takes_nothing_from_elsewhere(server):
    status, headers, body = server.raw("/")
    assert status == 200
    assert body.startswith(b"<!doctype html>")
    assert "default-src 'none'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


def test_a_key_is_asked_for(keyed):
    assert keyed.ask("/health")[0] == keyed.ask("/")[0] == 200
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": f"Basic {KEY}"}):
        for path, body in (("/v1/models", None), ("/v1/chat/completions", say("a")), ("/tokenize", b"{")):
            status, answer = keyed.ask(path, body, **headers)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
    assert keyed.ask("/v1/models", Authorization=f"Bearer {KEY}")[0] == 200


def test_random_bodies_never_break_the_server(server):
    choose = random.Random(3)
    junk: list[object] = [
        None,
        True,
        -1,
        0,
        1e308,
        "",
        "a",
        "\ud800",
        [],
        {},
        [[]],
        [{"role": 1}],
        {"a": {}},
        2**70,
        "final",
        ["", 3],
    ]
    keys = [*say("a", n=1, stop=None, stream=True, logprobs=True, top_logprobs=1, seed=1, top_p=1, tools=TOOLS,
                 tool_choice="auto", stream_options={}, prompt="a", user="b", frequency_penalty=0)]  # fmt: skip
    for number in range(150):
        body = {**say("tea", max_tokens=2), "prompt": "tea"}
        for _ in range(choose.randint(1, 3)):
            body[choose.choice(keys)] = choose.choice(junk)
        data = json.dumps(body).encode()
        if number % 5 == 0:
            place = choose.randrange(len(data))
            data = data[:place] + bytes(choose.randrange(256) for _ in range(3)) + data[place + 2 :]
        path = choose.choice(["/v1/chat/completions", "/v1/completions", "/tokenize"])
        status, answer = server.ask(path, data)
        assert status in (200, 400, 404, 422), (status, answer, data)
        assert status == 200 or set(answer["error"]) == {"message", "type", "param", "code"}
    server.wait_until_idle()
    assert "Traceback" not in server.errors


# --- clients that leave, and the end ----------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_rows_at_once(server, stream):
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        body = json.dumps(say("tea", model="base", max_tokens=480, n=16, temperature=2, stream=stream)).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost:{server.port}\r\nContent-Type: application/json\r\n"
        )
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until = time.monotonic() + 10
        while server.unfinished() == 0 and time.monotonic() < until:
            time.sleep(0.005)
        if stream:
            assert connection.recv(1000)
    server.wait_until_idle(1.0)


def test_ctrl_c_ends_the_server_within_two_seconds_also_while_it_answers(started):
    served = started["third"].ready()
    seen = []

    def read():
        asked = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        try:
            for chunk in asked.chat.completions.create(**say("a", model="base", n=16, max_tokens=490), stream=True):
                seen.append(chunk)
        except openai.APIError as error:
            seen.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    while len(seen) < 3:
        time.sleep(0.01)
    status, seconds = served.stop(signal.SIGINT)
    thread.join(10)
    assert status == 0, served.errors
    assert seconds < 2
    assert isinstance(seen[-1], openai.APIError)
    assert "Traceback" not in served.errors


def test_wrong_uses_are_refused(capsys, scored_run, server, tmp_path, monkeypatch):
    assert "--api-key" in refused(capsys, "serve", scored_run, "--host", "0.0.0.0")
    assert "--api-key" in refused(capsys, "serve", scored_run, "--api-key", "")
    assert "--memory" in refused(capsys, "serve", scored_run, "--memory", "-1")
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "fastapi", None)
        assert "pip install 'minisft[serve]'" in refused(capsys, "serve", scored_run)
    assert "--port" in refused(capsys, "serve", scored_run, "--port", "99999")
    assert "in use" in refused(capsys, "serve", scored_run, "--port", server.port)
    assert refused(capsys, "serve", tmp_path / "nothing", "--port", 0)


# --- endurance --------------------------------------------------------------------------------------------


def one_of_many(server, number):
    """Send one request of a random kind; return whether it was a valid one, which was answered."""
    choose = random.Random(number)
    stream, rows = choose.random() < 0.5, choose.randint(1, 4)
    body = say(f"{number}: tea " * choose.randint(1, 8), model=choose.choice(["final", "base", "checkpoint-2"]),
               max_tokens=choose.randint(1, 40), n=rows, stream=stream, temperature=choose.choice([0, 1.5]))  # fmt: skip
    kind = choose.choice(["valid", "valid", "leaves", "leaves", "half", "malformed", "wrong"])
    if kind == "malformed":
        data = json.dumps(body).encode()
        assert server.ask("/v1/chat/completions", data[: choose.randrange(len(data))])[0] == 400
        return False
    if kind == "wrong":
        body |= choose.choice([{"n": -1}, {"model": "none"}, {"stop": [1]}, {"max_tokens": 600}, {"messages": "a"}])
        assert server.ask("/v1/chat/completions", body)[0] in (400, 404)
        return False
    if kind == "valid":
        status, answer = server.ask("/v1/chat/completions", body)
        while status == 503 and answer["error"]["code"] == "overloaded":
            time.sleep(0.5)
            status, answer = server.ask("/v1/chat/completions", body)
        assert status == 200, answer
        assert answer.rstrip().endswith(b"data: [DONE]") if stream else answer["choices"][-1]["finish_reason"], answer
        return True
    data = json.dumps(body | {"max_tokens": 300}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost:{server.port}\r\nContent-Type: application/json\r\n"
        )
        whole = f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data
        connection.sendall(whole[: choose.randrange(len(whole))] if kind == "half" else whole)
        if kind == "leaves":
            time.sleep(choose.random() * 0.2)
    return False


@pytest.mark.long
def test_a_thousand_requests_of_all_kinds_leave_nothing_behind(scored_run):
    with Served(scored_run) as served:
        process = psutil.Process(served.process.pid)
        memory = []
        with ThreadPoolExecutor(16) as threads:
            for begin in range(0, 1400, 200):  # the first 400 are for the libraries' own caches
                numbers = range(begin, begin + 200)
                assert sum(threads.map(lambda number: one_of_many(served, number), numbers)) > 30
                served.wait_until_idle(60)
                memory.append(process.memory_info().rss)
        assert max(memory[2:]) <= 1.05 * memory[1], [size >> 20 for size in memory]
        assert served.ask("/v1/chat/completions", say("tea"))[0] == 200
        assert served.stop()[0] == 0
        assert "Traceback" not in served.errors
