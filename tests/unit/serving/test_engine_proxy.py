"""An engine's server behind MiniSFT's page: what is forwarded, what is refused, and what is told when it is gone."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from fastapi.testclient import TestClient

from minisft import api
from minisft.errors import UserError
from minisft.serving.engine_proxy import make_proxy
from tests.served import say


class Engine(BaseHTTPRequestHandler):
    """Answers every request with its own body, in two parts."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.wfile.write(b"data: " + body + b"\n\n")
        self.wfile.flush()
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *words):
        pass


@pytest.fixture
def engine():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Engine)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def ask(app, path, body=None):
    """Return the status, the headers and the body of a response."""
    client = TestClient(app, base_url="http://127.0.0.1")
    reply = client.get(path) if body is None else client.post(path, json=body)
    return reply.status_code, reply.headers, reply.content


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_request_is_forwarded_as_it_is(engine, path):
    body = say("tea", stream=True)
    status, headers, text = ask(make_proxy(engine, "my-run"), path, body)
    assert (status, headers["content-type"].partition(";")[0]) == (200, "text/event-stream")
    first, last = text.decode().strip().split("\n\n")
    assert json.loads(first.removeprefix("data: ")) == body
    assert last == "data: [DONE]"


def test_the_page_has_a_policy_and_the_name_of_the_run(engine):
    status, headers, text = ask(make_proxy(engine, "my-run"), "/")
    assert (status, b"my-run" in text) == (200, True)
    assert "default-src 'none'" in headers["content-security-policy"]


def test_one_model_is_there(engine):
    app = make_proxy(engine, "my-run")
    assert [model["id"] for model in json.loads(ask(app, "/v1/models")[2])["data"]] == ["final"]
    status, _, text = ask(app, "/v1/chat/completions", say("tea", model="base"))
    assert status == 404
    assert json.loads(text)["error"]["message"] == "there is no model 'base'; there are: final"


def test_an_engine_that_is_gone_is_told():
    status, _, text = ask(make_proxy("http://127.0.0.1:9", "my-run"), "/v1/chat/completions", say("tea"))
    assert status == 502
    assert "the engine does not answer" in json.loads(text)["error"]["message"]


def test_an_engine_that_is_not_installed_is_named(scored_run, tmp_path, monkeypatch):
    monkeypatch.setenv("MINISFT_ENGINES", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="this engine is not installed"):
        api.serve(scored_run, port=0, backend="llama.cpp")


def test_memory_is_refused_where_an_engine_loads_the_model(scored_run):
    with pytest.raises(UserError, match=r"--memory: vllm loads the model itself"):
        api.serve(scored_run, port=0, backend="vllm", memory=1.0)
