"""The chat page as a document, and the thumbs' file: what a browser or a stranger sends cannot do harm."""

import errno
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from typing import Any

import pytest

from minisft.errors import UserError
from minisft.files import hold_lock
from minisft.manifest import foreign_files, mark_new_folder
from minisft.serving import preferences
from minisft.serving.chat_page import page_html, page_policy
from minisft.serving.preferences import add_preferences_route, append_preference, read_preference
from tests.unit.report.test_page import NASTY, Elements

NONCE = "bm9uY2U"
PAGE = page_html(NONCE, title=f"run {NASTY}")
GOOD: dict[str, Any] = {
    "model": "checkpoint-4",
    "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Tea?\n\u2028 {NASTY} 🍵"}],
    "answer": "Yes.\nWith milk.",
    "rating": "up",
    "settings": {"temperature": 0.5, "max_tokens": 16},
}


# --- the page -----------------------------------------------------------------------------------------------


def test_the_page_is_one_document_that_loads_nothing():
    elements = Elements(PAGE).found
    assert {tag for tag, a in elements if {"src", "srcset", "action", "background", "data", "poster"} & set(a)} == set()
    links = [(tag, a["href"]) for tag, a in elements if "href" in a]
    assert [tag for tag, _ in links] == ["link"]
    assert links[0][1].startswith("data:image/svg+xml,")
    assert set(re.findall(r"https?://[^\s\"'<]+", PAGE)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"@import|url\(", (files("minisft.serving") / "chat.css").read_text())


def test_the_page_keeps_to_its_policy():
    elements = Elements(PAGE).found
    assert [a["nonce"] for tag, a in elements if tag in ("script", "style")] == [NONCE, NONCE]
    assert [name for _, a in elements for name in a if name == "style" or name.startswith("on")] == []
    script = (files("minisft.serving") / "chat.js").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", script)
    assert not re.search(r"""setAttribute\(["'](style|on)|style: ?["'`]""", script)
    assert "localStorage" not in script
    policy = dict(part.split(" ", 1) for part in page_policy(NONCE).split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == f"'nonce-{NONCE}'"
    assert policy["connect-src"] == "'self'"


def test_the_name_of_a_run_stays_text():
    elements = Elements(PAGE).found
    tags = [tag for tag, _ in elements]
    assert tags.count("script") == 1
    assert "img" not in tags
    assert "run &lt;/script&gt;&lt;script&gt;alert(1)" in PAGE


def test_every_control_has_a_name():
    elements = Elements(PAGE).found
    named = {a["for"] for tag, a in elements if tag == "label" and "for" in a}
    fields = [a for tag, a in elements if tag in ("input", "textarea", "select")]
    assert len(fields) >= 8
    assert [a["id"] for a in fields if a["id"] not in named] == ["probabilities"]  # its label holds it
    assert '<label class="switch"><input type="checkbox" id="probabilities">' in PAGE


def test_the_thumbs_are_left_out_where_there_is_no_run():
    assert '<body data-preferences="yes">' in PAGE
    assert '<body data-preferences="no">' in page_html(NONCE, preferences=False)


# --- preferences --------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    mark_new_folder(folder, "run")
    return folder


def lines(run):
    return [json.loads(line) for line in (run / preferences.FILE_NAME).read_bytes().split(b"\n")[:-1]]


def test_a_preference_becomes_a_line_that_the_manifest_knows(run):
    for rating in ("up", "down"):
        append_preference(run / preferences.FILE_NAME, read_preference(json.dumps({**GOOD, "rating": rating}).encode()))
    first, second = lines(run)
    assert first.pop("time") <= second.pop("time")
    assert (first, second) == (GOOD, {**GOOD, "rating": "down"})
    assert foreign_files(run) == []


def test_preferences_that_arrive_together_are_all_complete(run):
    entries = [{**GOOD, "answer": str(number) * 20_000} for number in range(24)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda entry: append_preference(run / preferences.FILE_NAME, entry), entries))
    assert sorted(line["answer"] for line in lines(run)) == sorted(entry["answer"] for entry in entries)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"model": NaN}', "not JSON"),
        (b'{"answer": "\\ud800"}', "not JSON of valid text"),
        (b"9" * 5000, "not JSON"),
        (b"[]", "not a JSON object"),
        (b" " * (preferences.LARGEST_ENTRY + 1), "more than 1,048,576 bytes"),
        ({"model": None}, "preference: model"),
        ({"model": ""}, "preference: model"),
        ({"model": "m" * 301}, "preference: model"),
        ({"messages": []}, "preference: messages"),
        ({"messages": "hi"}, "preference: messages"),
        ({"messages": [{"role": "user", "content": "x"}] * 1001}, "preference: messages"),
        ({"messages": ["hi"]}, "message 1"),
        ({"messages": [GOOD["messages"][0], {"role": "root", "content": "x"}]}, "message 2"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "message 1"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "message 1"),
        ({"messages": [{"role": "user", "content": "x", "deep": json.loads("[" * 50 + "]" * 50)}]}, "message 1"),
        ({"answer": 5}, "preference: answer"),
        ({"rating": "sideways"}, "preference: rating"),
        ({"rating": ["up"]}, "preference: rating"),
        ({"settings": []}, "preference: settings"),
        ({"settings": {"a": {"b": 1}}}, "preference: settings"),
        ({"settings": {str(number): 1 for number in range(33)}}, "preference: settings"),
        (json.dumps(GOOD).replace("0.5", "1e999").encode(), "preference: settings"),
        ({"path": "/etc/passwd"}, "'path'"),
        ({"rating": ...}, "preference: rating"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_hostile_preference_is_refused_by_name(body, named):
    if isinstance(body, dict):
        body = json.dumps({key: value for key, value in {**GOOD, **body}.items() if value is not ...}).encode()
    with pytest.raises(UserError) as caught:
        read_preference(body)
    assert named in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("kind", ["link", "broken link", "hard link", "pipe", "folder"])
def test_nothing_is_written_through_what_has_the_name(run, tmp_path, kind):
    outside, path = tmp_path / "outside", run / preferences.FILE_NAME
    if kind != "broken link":
        outside.write_text("mine")
    make = {
        "link": lambda: path.symlink_to(outside), "broken link": lambda: path.symlink_to(outside),
        "hard link": lambda: os.link(outside, path), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir,
    }  # fmt: skip
    make[kind]()
    with pytest.raises(UserError, match="something else has it"):
        append_preference(path, GOOD)
    assert (outside.read_text() if kind != "broken link" else outside.exists()) == (
        "mine" if kind != "broken link" else False
    )


def test_a_run_from_elsewhere_with_links_that_lead_out_is_left_alone(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "dataset").symlink_to(tmp_path)
    with pytest.raises(UserError, match="leads out of the run folder"):
        append_preference(run / preferences.FILE_NAME, GOOD)
    assert sorted(path.name for path in run.iterdir()) == ["dataset"]


def test_the_line_after_half_a_line_is_complete(run):
    append_preference(run / preferences.FILE_NAME, GOOD)
    with (run / preferences.FILE_NAME).open("ab") as file:
        file.write(b'{"time": "20')
    append_preference(run / preferences.FILE_NAME, GOOD)
    raw = (run / preferences.FILE_NAME).read_bytes().split(b"\n")
    assert len(raw) == 4
    assert json.loads(raw[0])["answer"] == json.loads(raw[2])["answer"] == GOOD["answer"]


def test_a_full_disk_leaves_no_half_line(run, monkeypatch):
    append_preference(run / preferences.FILE_NAME, GOOD)
    before, write = (run / preferences.FILE_NAME).read_bytes(), os.pwrite
    calls = []

    def fill(handle, data, offset):
        calls.append(data)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, data[:10], offset)

    monkeypatch.setattr(os, "pwrite", fill)
    with pytest.raises(UserError, match="No space left on device"):
        append_preference(run / preferences.FILE_NAME, GOOD)
    assert len(calls) == 2
    assert (run / preferences.FILE_NAME).read_bytes() == before


def test_a_file_that_would_fill_the_disk_is_left(run, monkeypatch):
    monkeypatch.setattr(preferences, "LARGEST_FILE", 500)
    append_preference(run / preferences.FILE_NAME, GOOD)
    with pytest.raises(UserError, match="more than 500 bytes"):
        append_preference(run / preferences.FILE_NAME, GOOD)
    assert len(lines(run)) == 1


def test_a_lock_that_is_never_released_is_said(run, monkeypatch):
    monkeypatch.setattr(preferences, "_PATIENCE", 0.1)
    with hold_lock(run / f".{preferences.FILE_NAME}.lock"), pytest.raises(UserError, match="another process"):
        append_preference(run / preferences.FILE_NAME, GOOD)


def test_the_route_saves_and_refuses(run):
    pytest.importorskip("fastapi", reason="the server needs fastapi")
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    from minisft.serving.protocol import ApiError

    app = FastAPI()
    add_preferences_route(app, run / preferences.FILE_NAME)
    client = TestClient(app)
    assert client.post("/preferences", json=GOOD).json() == {"saved": True}
    json_type = {"Content-Type": "application/json"}
    huge = b" " * (preferences.LARGEST_ENTRY + 1)
    for body, headers, status in ((b"{", json_type, 422), (huge, json_type, 413), (b"{}", {}, 415)):
        with pytest.raises(ApiError) as refused:
            client.post("/preferences", content=body, headers=headers)
        assert refused.value.status == status
    assert len(lines(run)) == 1
    (run / preferences.FILE_NAME).unlink()
    (run / preferences.FILE_NAME).mkdir()
    with pytest.raises(ApiError, match="something else has it") as refused:
        client.post("/preferences", json=GOOD)
    assert refused.value.status == 409
