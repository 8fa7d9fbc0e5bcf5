"""A run's page in a real browser: it draws, searches and switches, loads nothing, and runs nothing that a model wrote."""

import json

import pytest

from minisft.report.page import write_report
from tests.browser import Browser, find_browser
from tests.unit.report.test_page import NASTY, make_run

PROGRAM = find_browser()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium here; MINISFT_BROWSER names one")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("run") / "run", rows=30)
    for name in ("base", "checkpoint-9"):
        line = {"id": "prompt-1", "prompt": f"Mine? {NASTY}", "output": f"{name} says", "finish": "stop", "tokens": 2}
        (folder / "evaluation" / name / "prompts.jsonl").write_text(json.dumps(line) + "\n")
    return write_report(folder)


@pytest.fixture(scope="module")
def started():
    assert PROGRAM is not None
    browser = Browser(PROGRAM)
    yield browser
    browser.close()


@pytest.fixture
def browser(started, page):
    started.open(page)
    yield started
    assert started.problems == []


def test_hovering_shows_the_values_of_a_step(browser):
    browser.hover("#loss svg", 0.5, 0.5)
    tip = browser.text("#loss .tip").split("\n")
    step = int(tip[0].removeprefix("step "))
    assert 2000 < step < 3000
    assert float(tip[1].removeprefix("training: ")) == pytest.approx(3 / step, rel=0.01)
    browser.hover("#bleu svg", 0.97, 0.5)
    assert browser.text("#bleu .tip") == "step 9\nBLEU: 20.00 [18, 22]"
    browser.mouse("mouseMoved", 2, 2)
    assert browser.run("getComputedStyle(document.querySelector('#bleu .tip')).display") == "none"


def test_the_loss_is_drawn_logarithmic_and_smoothed_on_request(browser):
    shape = "document.querySelector('#loss svg path').getAttribute('d')"
    plain = browser.run(shape)
    browser.click("#log")
    logarithmic = browser.run(shape)
    assert logarithmic != plain
    browser.run(
        "(() => { const s = document.querySelector('#smooth'); s.value = 90; s.dispatchEvent(new Event('input')); })()"
    )
    assert browser.run(shape) not in (plain, logarithmic)


def test_the_switcher_walks_through_the_examples(browser):
    assert browser.text("#position") == "1 of 31"
    assert browser.text("#asked") == f"Mine? {NASTY}"
    assert browser.run("document.querySelector('#known').hidden") is True
    browser.click("#next")
    assert browser.text("#position") == "2 of 31"
    assert browser.run("document.querySelector('#known').hidden") is False
    answers = "[...document.querySelectorAll('#cards pre')].map((node) => node.textContent)"
    assert browser.run(answers) == [f"base 0 {NASTY}", f"checkpoint-9 0 {NASTY}"]
    browser.click("#previous")
    browser.click("#previous")
    assert browser.text("#position") == "31 of 31"
    browser.run(
        "(() => { const p = document.querySelector('#pick'); p.value = '3'; p.dispatchEvent(new Event('change')); })()"
    )
    assert browser.text("#position") == "4 of 31"


def test_the_search_narrows_the_examples(browser):
    browser.type("#search", "checkpoint-9 17 ")
    assert browser.text("#position") == "1 of 1"
    assert browser.run("document.querySelector('#pick').textContent").startswith("row17, answer 1")
    browser.type("#search", "nowhere")
    assert browser.text("#position") == "nothing found"
    assert browser.run("document.querySelectorAll('#cards .card').length") == 0


def test_a_script_that_a_model_wrote_stays_text(browser):
    assert browser.run("document.querySelectorAll('script').length") == 2
    assert browser.run("document.querySelectorAll('img').length") == 0
    assert "<script>alert(1)</script>" in browser.text("#asked")
    assert "<script>alert(1)</script>" in browser.text("#recipe ~ details")
    assert "<script>alert(1)</script>" in browser.text(".tokens")


@pytest.mark.parametrize(("width", "dark"), [(390, False), (1100, True)])
def test_nothing_is_cut_off_on_a_phone_or_in_the_dark(browser, page, width, dark):
    browser.open(page, width, dark)
    assert browser.run("document.documentElement.scrollWidth") <= width
    colors = browser.run("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
    light = [sum(map(int, color[4:-1].split(","))) for color in colors]
    assert (light[0] > light[1]) == dark
