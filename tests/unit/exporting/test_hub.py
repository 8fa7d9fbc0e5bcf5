"""Publishing, against a stand-in of the hub's HTTP interface on this machine, and the model card."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import yaml

from minisft import api
from minisft.exporting.model_card import license_of_base
from tests.tiny import minisft

FILES = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "verified.json", "chat_template.jinja"}


class HubServer(ThreadingHTTPServer):
    """What was sent to the stand-in of the hub."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Hub)
        self.files: dict[str, bytes] = {}
        self.created: dict[str, Any] = {}
        self.tokens: set[str | None] = set()
        self.refuses = False


class Hub(BaseHTTPRequestHandler):
    """Takes a repository's creation and one commit, as huggingface_hub sends them."""

    server: HubServer

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        hub = self.server
        hub.tokens.add(self.headers.get("Authorization"))
        address = f"http://127.0.0.1:{hub.server_port}/me/mine"
        if hub.refuses:
            self.answer(403, {"error": "You don't have the rights to create a model under the namespace me"})
        elif self.path.endswith("/preupload/main"):
            named = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self.answer(200, {"files": named})
        elif self.path.endswith("/commit/main"):
            lines = [json.loads(line) for line in body.splitlines()]
            hub.files = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            self.answer(200, {"success": True, "commitOid": "0" * 40, "commitUrl": f"{address}/commit/{'0' * 40}"})
        else:
            hub.created = json.loads(body) if self.path == "/api/repos/create" else hub.created
            self.answer(200, {"url": address, "name": "me/mine", "id": "1"})

    def do_GET(self):
        refused = self.server.refuses and self.path.startswith("/api/models/")
        self.answer(*((404, {"error": "Repository not found"}) if refused else (200, {})))

    def answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words):
        pass


@pytest.fixture
def hub():
    server = HubServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def push(hub, run, *words):
    settings: Any = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_TOKEN": "hf_secret",
        "HF_HUB_OFFLINE": "0",
    }
    return minisft("push", run, "me/mine", "--engine", "transformers", *words, **settings)


def test_a_verified_export_and_its_card_are_sent(hub, answering_run):
    done = push(hub, answering_run, "--private", "--license", "mit")
    assert done.returncode == 0, done.stderr
    assert "verified with transformers: 6 of 6 prompts" in done.stdout
    assert f"published: http://127.0.0.1:{hub.server_port}/me/mine/commit/{'0' * 40}" in done.stdout
    assert hub.created["name"] == "mine"
    assert hub.created["organization"] == "me"
    # huggingface-hub 1 and 2 say it in different ways
    assert hub.created.get("visibility") == "private" or hub.created.get("private") is True
    assert "Bearer hf_secret" in hub.tokens
    assert hub.files.keys() > FILES
    assert not [name for name in hub.files if name.startswith(".minisft")]
    assert json.loads(hub.files["verified.json"])["engine"]["transformers"]["status"] == "ok"
    assert not answering_run.with_name("run.push").exists()
    card = hub.files["README.md"].decode()
    assert yaml.safe_load(card.split("---")[1])["license"] == "mit"
    assert "hf_secret" not in card + done.stdout + done.stderr


def test_a_dry_run_sends_nothing(hub, answering_run):
    done = push(hub, answering_run, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert (hub.created, hub.files) == ({}, {})
    folder = answering_run.with_name("run.push")
    assert {path.name for path in folder.iterdir()} > FILES
    assert "nothing was sent" in done.stdout
    assert push(hub, answering_run, "--dry-run").returncode == 0  # it replaces its own folder


def test_what_the_hub_refuses_is_told(hub, answering_run):
    hub.refuses = True
    done = push(hub, answering_run)
    assert done.returncode == 2
    assert "the hub refuses it" in done.stderr
    assert "hf auth login" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_hub_that_cannot_be_reached_is_told(answering_run):
    settings: Any = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_secret", "HF_HUB_OFFLINE": "0"}
    done = minisft("push", answering_run, "me/mine", "--engine", "none", **settings)
    assert done.returncode == 2, done.stderr
    assert "cannot be reached" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["mine", "me/mine/more", "me/mi ne", "../x", ""])
def test_a_name_that_is_none_is_refused(answering_run, name):
    from minisft.errors import UserError

    with pytest.raises(UserError, match="not the name of a repository"):
        api.push(answering_run, name, dry_run=True)


def test_the_card_of_a_scored_run(scored_run, tmp_path):
    folder = api.export(scored_run, tmp_path / "out", engine="none", checkpoint="best")
    card = (folder / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["library_name"] == "transformers"
    [result] = metadata["model-index"][0]["results"]
    assert {metric["type"] for metric in result["metrics"]} == {"bleu", "chrf"}
    for part in ("## Training", "## Scores", "## Verified", "## Use", "## Hashes", "| constant |", "talks.jsonl",
                 "certificate.json of the run"):  # fmt: skip
        assert part in card, part
    assert (folder / "loss.png").stat().st_size > 1000
    assert str(scored_run.parent) not in card


@pytest.mark.parametrize(
    ("text", "found"),
    [("---\nlicense: mit\n---\n", "mit"), ("no metadata", None), ("---\nlicense: [a, b]\n---\n", None)],
)
def test_the_licence_of_a_local_base_model(tmp_path, text, found):
    (tmp_path / "README.md").write_text(text)
    assert license_of_base(str(tmp_path)) == found
