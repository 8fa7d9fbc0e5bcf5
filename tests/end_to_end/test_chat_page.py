"""The chat page of `minisft serve` in a real browser, in front of the real server of a small trained run."""

import json
import math
import os
import shutil
import signal
import subprocess
import urllib.request
from pathlib import Path

import pytest

from tests.command import run as command
from tests.served import Served

KEY = "a key that only the page's memory holds"
QUESTION = "12: two cups please"
HOSTILE = "it's \"$(touch /tmp/x)\" `id` \\ \\n %s {} 'q' '''x''' \"\"\" !! $HOME \u202e 🍵 é\nnext # line"
IDLE = "document.querySelector('#stop').hidden && document.querySelector('.answer .actions')"
MESSAGE = "document.querySelector('#note').textContent"


@pytest.fixture(scope="module")
def served(started_browser, scored_run, tmp_path_factory):
    """A server of a copy of the run, where there is a browser: the run's folder and the server's URL."""
    for name in ("fastapi", "uvicorn"):
        pytest.importorskip(name, reason="the server needs it")
    run = shutil.copytree(scored_run, tmp_path_factory.mktemp("served") / "tea")
    server = Served(run, "--api-key", KEY)
    yield run, server.ready().url + "/"
    server.stop()


@pytest.fixture
def page(started_browser, served):
    """The page, with the key given and 16 tokens for an answer; nothing but refusals without the key went wrong."""
    open_page(started_browser, served[1])
    set_field(started_browser, "max_tokens", 16)
    yield started_browser
    assert unexpected(started_browser) == []


def open_page(browser, url, **window):
    browser.open(url, **{"width": 1280, "fresh": True, **window})
    give_key(browser)


def give_key(browser):
    browser.wait_for("document.querySelector('#key-dialog').open")
    browser.send("Input.insertText", text=KEY)
    browser.press("Enter")
    browser.wait_for("document.querySelector('.head select')")


def unexpected(browser):
    def is_refusal(problem):
        entry = problem.get("entry", {}) if isinstance(problem, dict) else {}
        return entry.get("source") == "network" and " 401 " in entry.get("text", "")

    return [problem for problem in browser.problems if not is_refusal(problem)]


def set_field(browser, name, value):
    browser.run(
        f"(() => {{ const field = document.getElementById({json.dumps(name)}); field.value = {json.dumps(str(value))};"
        "field.dispatchEvent(new Event('input')); })()"
    )


def ask(browser, question):
    browser.type("#draft", question)
    browser.press("Enter")
    browser.wait_for(IDLE)


def answers(browser):
    """The texts of all answers, in the order of the page, where tokens are shown one by one."""
    browser.run("document.querySelector('#probabilities').checked || document.querySelector('#probabilities').click()")
    texts = "[...document.querySelectorAll('.answer .body')].map((node) => node.textContent.replaceAll('⏎', ''))"
    return browser.run(texts)


def ask_server(url, model, *messages, **settings):
    """What the server itself answers to a conversation: the message, and its tokens with their probabilities."""
    roles = ("user", "assistant")
    turns = [{"role": roles[place % 2], "content": text} for place, text in enumerate(messages)]
    body = {"model": model, "messages": turns, "max_tokens": 16, "temperature": 0, **settings}
    body |= {"logprobs": True, "top_logprobs": 5}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    request = urllib.request.Request(f"{url}v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        choice = json.load(response)["choices"][0]
    return choice["message"]["content"], choice["logprobs"]["content"]


def clipboard(browser):
    return browser.run("navigator.clipboard.readText()")


def copied_answer(browser):
    browser.run("document.querySelector('#note').textContent = ''")
    browser.click(".copy")
    browser.wait_for(f"{MESSAGE}.startsWith('The answer')")
    return clipboard(browser)


def messages_of_requests(browser):
    """Note the requests of the page from here on; the result reads them."""
    browser.run(
        "window.sent = []; (() => { const real = window.fetch; window.fetch = (path, options) => {"
        "if (options.body) window.sent.push(JSON.parse(options.body)); return real(path, options); }; })()"
    )
    return lambda: browser.run("window.sent")


def slow_down(browser):
    """Let answers arrive in pieces of 300 bytes, ten milliseconds apart; the result lets them arrive as they come."""
    browser.run(
        "window.real = window.fetch; window.fetch = async (path, options) => { const response = await real(path, options);"
        "const slow = new TransformStream({async transform(chunk, controller) {"
        "for (let start = 0; start < chunk.length; start += 300) { await new Promise((done) => setTimeout(done, 10));"
        "controller.enqueue(chunk.slice(start, start + 300)); } }});"
        "return new Response(response.body.pipeThrough(slow), response); }; 0"
    )
    return lambda: browser.run("window.fetch = window.real; 0")


def answer_with(browser, *events, end=True):
    """Answer the next requests of the page with these events instead of the server's."""
    text = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + ("data: [DONE]\n\n" if end else "")
    browser.run(f"window.fetch = async () => new Response({json.dumps(text)})")


# --- the conversation ---------------------------------------------------------------------------------------


def test_models_answer_side_by_side_what_the_server_answers(page, served):
    set_field(page, "max_tokens", 32)
    restore = slow_down(page)
    page.type("#draft", QUESTION)
    page.press("Enter")
    body = "document.querySelector('.answer .body').textContent"
    page.wait_for(f"{body}.trim() && !document.querySelector('#stop').hidden")
    early = page.run(f"{body}.length")
    page.wait_for(IDLE)
    assert page.run(f"{body}.length") > early  # it was streamed
    restore()
    set_field(page, "max_tokens", 16)

    page.click("#add")  # the base model catches up with the conversation
    page.wait_for(IDLE)
    ask(page, "more tea")
    names = page.run("[...document.querySelectorAll('.head select')].map((node) => node.value)")
    assert names == ["final", "base"]
    shown = page.run("[...document.querySelectorAll('.turn')].map((turn) => turn.querySelectorAll('.answer').length)")
    assert shown == [2, 2]
    first, base, second, base_second = answers(page)
    url = served[1]
    [long, _] = ask_server(url, "final", QUESTION, max_tokens=32)
    assert base == ask_server(url, "base", QUESTION)[0]
    assert base_second == ask_server(url, "base", QUESTION, base, "more tea")[0]
    assert second == ask_server(url, "final", QUESTION, long, "more tea")[0]
    assert first == long

    page.click(".head:last-child .remove")
    assert page.run("document.querySelectorAll('.answer').length") == 2
    set_field(page, "max_tokens", 8)
    page.run(
        "(() => { const s = document.querySelector('.head select'); s.value = 'checkpoint-2';"
        "s.dispatchEvent(new Event('change')); })()"
    )
    page.wait_for(IDLE)
    assert answers(page)[0] == ask_server(url, "checkpoint-2", QUESTION, max_tokens=8)[0]


def test_an_edited_message_cuts_the_conversation_and_is_answered(page, served):
    page.type("#system", "Be brief.")
    ask(page, QUESTION)
    ask(page, "more tea")
    sent = messages_of_requests(page)
    page.click(".turn:first-child .edit-question")
    page.type(".edit", "hot milk\nplease")
    page.press("Enter")
    page.wait_for(IDLE)
    assert page.run("document.querySelectorAll('.turn').length") == 1
    assert page.text(".said") == "hot milk\nplease"
    expected = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hot milk\nplease"}]
    assert [body["messages"] for body in sent()] == [expected]
    page.click(".edit-question")
    page.press("Escape")  # leaves the editor, and the message as it was
    assert page.text(".said") == "hot milk\nplease"


def test_another_answer_has_the_next_seed(page, served, tmp_path):
    page.allow(served[1].rstrip("/"), tmp_path)
    set_field(page, "temperature", 1)
    set_field(page, "seed", 5)
    ask(page, QUESTION)
    first = copied_answer(page)
    page.click(".again")
    page.wait_for(IDLE)
    second = copied_answer(page)
    assert first == ask_server(served[1], "final", QUESTION, temperature=1, top_p=1, seed=5)[0]
    assert second == ask_server(served[1], "final", QUESTION, temperature=1, top_p=1, seed=6)[0]
    assert first != second


def test_escape_stops_an_answer_and_keeps_what_there_is(page):
    set_field(page, "max_tokens", 400)
    restore = slow_down(page)
    page.type("#draft", QUESTION)
    page.press("Enter")
    page.wait_for("document.querySelector('.answer .body').textContent.length > 3")
    page.press("Escape")
    page.wait_for(IDLE)
    assert "stopped" in page.text(".figures")
    [kept] = answers(page)
    assert 0 < len(kept) < 400
    restore()
    sent = messages_of_requests(page)
    set_field(page, "max_tokens", 4)
    ask(page, "go on")
    assert [message["content"] for message in sent()[0]["messages"]][1:] == [kept, "go on"]


def test_the_servers_error_is_shown_and_can_be_tried_again(page):
    set_field(page, "max_tokens", 100_000)
    ask(page, QUESTION)
    assert "100000" in page.text(".failure").replace(",", "")
    page.problems.clear()  # the browser's own note of the status 400
    page.run("document.querySelector('#note').textContent = ''")
    set_field(page, "max_tokens", 4)
    page.click(".again")
    page.wait_for("document.querySelector('.figures')")
    assert page.run("document.querySelector('.failure')") is None


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("() => Promise.reject(new TypeError('gone'))", "Is `minisft serve` still running?"),
        ("async () => new Response('<b>no</b>', {status: 502})", "status 502. <b>no</b>"),
        ('async () => new Response(\'data: {"error": {"message": "out of memory"}}\\n\\n\')', "out of memory"),
        (
            'async () => new Response(\'data: {"choices": [{"delta": {"content": "Ye"}}]}\\n\\n\')',
            "The connection ended",
        ),
        ("async () => new Response('data: {nonsense\\n\\n')", "could not be read"),
    ],
)
def test_what_goes_wrong_on_the_way_is_said_in_the_column(page, script, said):
    page.run(f"window.fetch = {script}; 0")
    ask(page, QUESTION)
    assert said in page.text(".failure")
    assert page.run("document.querySelectorAll('.failure b').length") == 0


# --- what a model writes ------------------------------------------------------------------------------------


def test_what_a_model_writes_stays_text(page):
    nasty = "</script><script>window.hit = 1</script><img src=x onerror='window.hit = 1'>"
    text = f"# {nasty}\n\n**{nasty}** and `{nasty}`\n- {nasty}\n2. two\n\n```html\n{nasty}\n```\n[a](javascript:hit=1) {nasty}"
    call = {"index": 0, "id": "1", "function": {"name": nasty, "arguments": json.dumps({"a": nasty})}}
    answer_with(
        page,
        {"choices": [{"delta": {"reasoning_content": f"Think {nasty}"}}]},
        {"choices": [{"delta": {"content": text, "tool_calls": [call]}}]},
        {"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": None},
    )
    ask(page, nasty)
    assert page.run("window.hit") is None
    assert page.run("document.querySelectorAll('#turns script, #turns img, #turns a').length") == 0
    assert page.text(".said") == nasty
    for selector in ("h3", "strong", "p code", "ul li", "pre code"):
        assert page.text(f".body {selector}") == nasty
    assert page.text(".body ol li") == "two"
    assert page.run("document.querySelector('.body ol').start") == 2
    assert page.run("document.querySelector('.reasoning').open") is False
    assert page.text(".reasoning div") == f"Think {nasty}"
    assert page.text(".call code") == nasty
    assert json.loads(page.text(".call pre")) == {"a": nasty}


def test_hover_and_focus_show_the_probabilities_of_a_token(page, served):
    page.click("#probabilities")
    ask(page, QUESTION)
    _, tokens = ask_server(served[1], "final", QUESTION)
    assert page.run("document.querySelectorAll('.token').length") == len(tokens)
    for place in (0, 3):
        page.hover(f".token:nth-child({place + 1})", 0.5, 0.5)
        rows = page.run("[...document.querySelectorAll('#tip tr')].map((row) => row.children[1].textContent)")
        wanted = [f"{100 * math.exp(other['logprob']):.1f} %" for other in tokens[place]["top_logprobs"]]
        assert rows == wanted
        chosen = page.text("#tip .chosen td:nth-child(2)")
        assert chosen == f"{100 * math.exp(tokens[place]['logprob']):.1f} %"
    page.mouse("mouseMoved", 2, 2)
    assert page.run("document.querySelector('#tip').hidden") is True

    # One stop of the Tab key for all tokens; the arrow keys go on from there.
    page.run("document.querySelector('.token').focus()")
    page.press("ArrowRight")
    label = page.run("document.activeElement.getAttribute('aria-label')")
    assert label.endswith(f", {100 * math.exp(tokens[1]['logprob']):.1f} %")
    assert page.run("document.querySelector('#tip').hidden") is False
    assert page.run("document.querySelectorAll('.token[tabindex=\"0\"]').length") == 1

    page.click("#probabilities")
    assert page.run("document.querySelectorAll('.token').length") == 0


# --- what leaves the page -----------------------------------------------------------------------------------


def test_a_saved_conversation_is_a_row_that_prepare_takes(page, served, recipe_file, conversations, tmp_path, capsys):
    downloads, data = tmp_path / "downloads", tmp_path / "data"
    downloads.mkdir()
    data.mkdir()
    page.allow(served[1].rstrip("/"), downloads)
    page.type("#system", "You serve tea.")
    ask(page, QUESTION)
    ask(page, HOSTILE)
    first, second = answers(page)
    page.click(".head .save")
    saved = wait_for_file(downloads)
    [line] = saved.read_text(encoding="utf-8").splitlines()
    row = json.loads(line)
    assert row["id"].startswith("chat-final-")
    assert row["conversations"] == [
        {"from": "system", "value": "You serve tea."},
        {"from": "human", "value": QUESTION}, {"from": "gpt", "value": first},
        {"from": "human", "value": HOSTILE}, {"from": "gpt", "value": second},
    ]  # fmt: skip
    shutil.copy(saved, data / "saved.jsonl")
    shutil.copy(conversations, data / "talks.jsonl")
    status, _, err = command(capsys, "prepare", recipe_file, f"data.source={data}")
    assert status == 0, err
    ledger = json.loads((tmp_path / "run" / "dataset" / "ledger.json").read_text())
    assert ledger["rows"]["read"] == len(conversations.read_text().splitlines()) + 1
    assert ledger["skipped"] == {}
    assert ledger["turns"]["system"] == 1


def wait_for_file(folder):
    for _ in range(500):
        if found := [path for path in folder.iterdir() if path.suffix == ".jsonl" and path.stat().st_size]:
            return found[0]
        signal.sigtimedwait([], 0.01)
    raise AssertionError("nothing was downloaded")


def test_thumbs_append_to_the_runs_preferences(page, served):
    run, _ = served
    ask(page, QUESTION)
    page.click(".up")
    page.wait_for(f"{MESSAGE} === 'Saved to preferences.jsonl.'")
    page.click(".down")
    page.wait_for("document.querySelector('.down').getAttribute('aria-pressed') === 'true'")
    assert page.run("document.querySelector('.up').getAttribute('aria-pressed')") == "false"
    [shown] = answers(page)
    lines = [json.loads(line) for line in (run / "preferences.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["rating"] for line in lines] == ["up", "down"]
    for line in lines:
        assert (line["model"], line["answer"]) == ("final", shown)
        assert line["messages"] == [{"role": "user", "content": QUESTION}]
        assert line["settings"] == {"temperature": 0, "top_p": 1, "max_tokens": 16}


def test_a_copied_request_is_quoted_for_the_shell_and_for_python(page, served, tmp_path, capsys, monkeypatch):
    page.allow(served[1].rstrip("/"), tmp_path)
    page.type("#system", HOSTILE)
    ask(page, HOSTILE)
    [shown] = answers(page)
    assert copied_answer(page) == shown

    # As curl: the shell passes exactly the request, and runs nothing that the text holds.
    page.click(".curl")
    page.wait_for(f"{MESSAGE}.endsWith('curl.')")
    copied = clipboard(page)
    assert KEY not in copied
    shell = subprocess.run(
        [shutil.which("bash") or "bash", "-c", 'curl() { printf "%s\\0" "$@"; }\n' + copied],
        capture_output=True, env={"PATH": "/nowhere", "MINISFT_API_KEY": KEY}, check=True,
    )  # fmt: skip
    words = shell.stdout.decode().split("\0")
    assert shell.stderr == b""
    assert words[0] == f"{served[1]}v1/chat/completions"
    assert f"Authorization: Bearer {KEY}" in words
    body = json.loads(words[words.index("-d") + 1])
    messages = [{"role": "system", "content": HOSTILE}, {"role": "user", "content": HOSTILE}]
    assert body == {"model": "final", "messages": messages, "temperature": 0, "top_p": 1, "max_tokens": 16}

    # As Python: the openai client gets the same answer.
    pytest.importorskip("openai", reason="the copied Python needs the openai client")
    page.click(".python")
    page.wait_for(f"{MESSAGE}.endsWith('Python.')")
    copied = clipboard(page)
    assert KEY not in copied
    assert "\u202e" not in copied
    monkeypatch.setenv("MINISFT_API_KEY", KEY)
    exec(compile(copied, "copied", "exec"), {})
    assert capsys.readouterr().out == shown + "\n"


# --- the page itself ----------------------------------------------------------------------------------------


def test_drafts_and_the_conversation_survive_a_reload_and_the_key_does_not(page):
    page.type("#system", "Be brief.")
    ask(page, QUESTION)
    [before] = answers(page)
    page.type("#draft", "half")
    page.press("Enter", shift=True)
    page.send("Input.insertText", text="a quest")
    page.reload()
    assert page.run("document.querySelector('#draft').value") == "half\na quest"
    assert page.run("document.querySelector('#system').value") == "Be brief."
    assert page.run("document.querySelector('#max_tokens').value") == "16"
    assert KEY not in page.run("JSON.stringify([{...sessionStorage}, {...localStorage}, document.cookie])")
    give_key(page)
    assert answers(page) == [before]
    page.click("#new")
    assert page.run("document.querySelectorAll('.turn').length") == 0


def test_every_answer_of_the_server_has_a_nonce_of_its_own(served):
    nonces = set()
    for _ in range(2):
        with urllib.request.urlopen(served[1], timeout=60) as response:
            policy, text = response.headers["Content-Security-Policy"], response.read().decode()
        nonce = policy.partition("script-src 'nonce-")[2].partition("'")[0]
        assert text.count(f'nonce="{nonce}"') == 2
        nonces.add(nonce)
    assert len(nonces) == 2


def test_without_the_key_the_column_says_so(started_browser, served):
    started_browser.open(served[1], width=1280, fresh=True)
    started_browser.wait_for("document.querySelector('#key-dialog').open")
    started_browser.send("Input.insertText", text="wrong")
    started_browser.press("Enter")
    started_browser.wait_for("document.querySelector('#key-problem').textContent.includes('not take')")
    started_browser.click("#key-cancel")
    started_browser.wait_for("document.querySelector('.failure')")
    assert unexpected(started_browser) == []


def test_a_phone_shows_one_model_at_a_time(started_browser, served):
    open_page(started_browser, served[1], width=390, height=844, mobile=True)
    started_browser.click("#show-settings")
    set_field(started_browser, "max_tokens", 8)
    started_browser.press("Escape")
    ask(started_browser, QUESTION)
    started_browser.click("#add")
    started_browser.wait_for(IDLE)
    visible = "[...document.querySelectorAll('.answer')].map((node) => node.offsetWidth > 0)"
    assert started_browser.run(visible) == [False, True]
    started_browser.click("#tabs button")
    assert started_browser.run(visible) == [True, False]
    assert started_browser.run("document.documentElement.scrollWidth") <= 390
    assert unexpected(started_browser) == []


def test_the_page_is_dark_where_the_reader_wants_it(started_browser, served):
    for dark in (False, True):
        open_page(started_browser, served[1], dark=dark)
        colors = started_browser.run(
            "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
        )
        light = [sum(map(int, color[4:-1].split(","))) for color in colors]
        assert (light[0] > light[1]) == dark
    assert unexpected(started_browser) == []


@pytest.mark.skipif("MINISFT_AXE" not in os.environ, reason="MINISFT_AXE names no axe.min.js of axe-core")
@pytest.mark.parametrize(
    "window", [{"width": 1280}, {"width": 390, "mobile": True}, {"width": 1280, "dark": True}], ids=str
)
def test_axe_finds_nothing_serious(started_browser, served, window):
    open_page(started_browser, served[1], **window)
    set_field(started_browser, "max_tokens", 8)
    ask(started_browser, QUESTION)
    started_browser.click("#add")
    started_browser.wait_for(IDLE)
    started_browser.run("document.querySelector('#probabilities').click()")
    set_field(started_browser, "max_tokens", 100_000)
    ask(started_browser, "too long")
    started_browser.run(Path(os.environ["MINISFT_AXE"]).read_text(encoding="utf-8") + "; 0")
    found = started_browser.run(
        "axe.run().then(({violations}) => violations.map((one) => [one.impact, one.id, one.nodes[0].html]))"
    )
    assert [one for one in found if one[0] in ("serious", "critical")] == []
    started_browser.problems.clear()
