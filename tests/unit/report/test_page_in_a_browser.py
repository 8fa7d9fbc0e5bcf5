"""A run's page in a real browser: it draws, searches and switches, loads nothing, and runs nothing that a model wrote."""

import json
import os
import re
import time
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import pytest

from minisft.report.page import write_report
from tests.unit.report.test_page import NASTY, make_run


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("run") / "run", rows=30)
    for name in ("base", "checkpoint-9"):
        line = {"id": "prompt-1", "prompt": f"Mine? {NASTY}", "output": f"{name} says", "finish": "stop", "tokens": 2}
        (folder / "evaluation" / name / "prompts.jsonl").write_text(json.dumps(line) + "\n")
    return write_report(folder)


@pytest.fixture
def browser(started_browser, page):
    started_browser.open(page)
    yield started_browser
    assert started_browser.problems == []


def choose(browser, selector, value):
    browser.run(
        f"(() => {{ const list = document.querySelector('{selector}'); list.value = '{value}';"
        "list.dispatchEvent(new Event('change')); })()"
    )


def shown_ids(browser):
    """The ids of the rows in their order, without the scores behind them."""
    titles = browser.run("[...document.querySelectorAll('#pick option')].map((option) => option.textContent)")
    return [title.partition(",")[0] for title in titles]


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
    choose(browser, "#pick", 3)
    assert browser.text("#position") == "4 of 31"


def test_the_search_narrows_the_examples(browser):
    browser.type("#search", "checkpoint-9 17 ")
    assert browser.text("#position") == "1 of 1"
    assert browser.run("document.querySelector('#pick').textContent").startswith("row17, answer 1")
    browser.type("#search", "nowhere")
    assert browser.text("#position") == "nothing found"
    assert browser.run("document.querySelectorAll('#cards .card').length") == 0


def test_the_rows_come_in_the_chosen_order(browser):
    """chrF of row n is 3 n for the checkpoint and 2 n for the base model; one's own prompt is always first."""
    assert shown_ids(browser) == ["your prompt-1", *(f"row{n}" for n in range(30))]
    choose(browser, "#order", "improved")
    assert shown_ids(browser)[:3] == ["your prompt-1", "row29", "row28"]
    assert browser.text("#pick option:nth-child(2)") == "row29, answer 1: chrF 87 (+29)"
    choose(browser, "#system", "base")
    assert browser.text("#pick option:nth-child(2)") == "row0, answer 1: chrF 0"
    choose(browser, "#order", "file")
    assert shown_ids(browser)[1:4] == ["row0", "row1", "row2"]


def test_where_a_lower_score_is_better_the_highest_is_the_worst(started_browser, tmp_path):
    path = make_run(tmp_path, rows=30) / "evaluation/results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lower_is_better": ["chrf"]}))
    started_browser.open(write_report(tmp_path))
    assert shown_ids(started_browser)[:2] == ["row29", "row28"]
    choose(started_browser, "#order", "improved")
    assert shown_ids(started_browser)[0] == "row0"
    assert started_browser.problems == []


def test_a_score_of_the_table_and_a_point_of_a_figure_lead_to_the_worst_rows_behind_them(browser):
    browser.type("#search", "checkpoint-9 17 ")
    choose(browser, "#order", "improved")
    links = "[...document.querySelectorAll('.scroll td a')].map((link) => link.title)"
    assert browser.run(links) == [
        f"The worst answers of {name} by {metric}" for name in ("base", "checkpoint-9") for metric in ("BLEU", "chrF")
    ]
    state = "['system', 'metric', 'order', 'search'].map((id) => document.getElementById(id).value)"
    browser.click(".scroll tbody tr:first-child td a")
    assert browser.run(state) == ["base", "bleu", "worst", ""]
    assert browser.text("#position") == "1 of 31"
    browser.click("#chrf circle.dot:last-of-type")
    assert browser.run(state) == ["checkpoint-9", "chrf", "worst", ""]
    assert abs(browser.run("document.querySelector('#examples').getBoundingClientRect().top")) < 100


WORDS = "Booked, Tom: <b>Friday</b> at 10:30 am, $30."


@pytest.fixture(scope="module")
def marked_page(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("marked") / "run", rows=1)
    answers = {"base": "Tom? Friday at noon", "checkpoint-9": WORDS.replace("Friday", "Monday").replace("$30", "$45")}
    for name, output in answers.items():
        path = folder / "evaluation" / name / "outputs.jsonl"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"reference": WORDS, "output": output}) + "\n")
    return write_report(folder)


def test_words_that_differ_from_the_reference_or_from_the_base_model_are_marked(started_browser, marked_page):
    browser = started_browser
    browser.open(marked_page)

    def words(selector):
        return browser.run(f"[...document.querySelectorAll('{selector}')].map((node) => node.textContent)")

    assert words("#cards .card:last-child del") == ["Monday", "45"]
    assert words("#wanted ins") == ["Friday", "30"]
    assert words("#cards .card:first-child del") == []
    assert browser.text("#wanted") == WORDS
    choose(browser, "#against", "base")
    assert words("#wanted ins") == []
    assert "".join(words("#cards .card:last-child del")).replace(" ", "") == "Booked,:<b>Monday</b>10:30am,$45."
    choose(browser, "#against", "nothing")
    assert words("#cards del, #wanted ins") == []
    assert browser.problems == []


def test_the_unmarked_words_are_a_longest_common_subsequence(started_browser, marked_page):
    """Compared with brute force over all lists of words that both texts contain in this order."""
    started_browser.open(marked_page)
    for one, other in (("a b c d a b", "b a d b"), ("x", "y"), ("", "a"), ("a a a", "a"), ("a, b. c", "b c. a")):
        nodes = started_browser.run(
            f"marked({json.dumps(one)}, {json.dumps(other)}, 'del').map((node) => "
            "typeof node === 'string' ? [node, false] : [node.textContent, true])"
        )
        assert "".join(text for text, _ in nodes) == one
        kept = split(" ".join(text for text, is_marked in nodes if not is_marked))
        assert is_subsequence(kept, split(other))
        common = [c for k in range(len(split(one)) + 1) for c in combinations(split(one), k)]
        assert len(kept) == max(len(c) for c in common if is_subsequence(c, split(other)))


def split(text):
    return re.findall(r"\w+|[^\w\s]", text)


def is_subsequence(words, of):
    rest = iter(of)
    return all(word in rest for word in words)


def test_a_figure_is_saved_as_a_picture_of_its_own(browser, page, tmp_path):
    browser.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    browser.click("#bleu .save")
    path = tmp_path / "bleu-by-step-with-95-intervals.svg"
    for _ in range(200):
        if path.is_file() and path.read_text().endswith("</svg>"):
            break
        time.sleep(0.02)
    picture = ElementTree.fromstring(path.read_text())
    texts = [node.text for node in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"BLEU by step, with 95 % intervals", "\u25cf BLEU", "constant baseline"} <= set(texts)
    [curve] = picture.iter("{http://www.w3.org/2000/svg}path")
    assert "stroke: rgb(" in curve.attrib["style"]  # it needs no style sheet


@pytest.mark.parametrize(("width", "mobile"), [(1280, False), (390, True)])
def test_the_save_button_covers_no_name_of_a_constant_baseline(started_browser, tmp_path, width, mobile):
    """From the top of the figure, 22, to where the name has enough room above its line."""
    for baseline in (22.0, 21.0, 20.0, 19.0, 18.0):
        folder = make_run(tmp_path / str(baseline))
        path = folder / "evaluation/results.json"
        results = json.loads(path.read_text())
        results["constant"]["bleu"]["score"] = baseline
        path.write_text(json.dumps(results))
        started_browser.open(write_report(folder), width, mobile=mobile)
        box = "document.querySelector('#bleu {}').getBoundingClientRect().{}"
        button, name = (
            [started_browser.run(box.format(selector, end)) for end in ("bottom", "left", "top", "right")]
            for selector in (".save", ".level")
        )
        assert button[0] <= name[2] or name[3] <= button[1], f"baseline {baseline}"
        assert started_browser.problems == []


def test_paper_shows_the_worst_rows_and_no_controls(browser):
    browser.send("Emulation.setEmulatedMedia", media="print")
    try:
        visible = "(selector) => [...document.querySelectorAll(selector)].filter((node) => node.offsetParent).length"
        assert browser.run(f"({visible})('#printed section')") == 5
        assert browser.run(f"({visible})('.controls, nav, .save, #cards .card')") == 0
        assert browser.run("document.querySelector('#printed section:nth-child(2) h3').textContent").startswith("row0,")
        color = "getComputedStyle(document.body).backgroundColor"
        assert browser.run(color) == "rgb(255, 255, 255)"
    finally:
        browser.send("Emulation.setEmulatedMedia", media="")


def test_a_phone_shows_each_row_of_the_scores_as_a_block(browser, page):
    browser.open(page, 390, mobile=True)
    cell = "document.querySelector('.scroll tbody tr:nth-child(2) td:nth-child(3)')"
    assert browser.run(f"getComputedStyle({cell}, '::before').content") == '"loss"'
    box = f"(() => {{ const box = {cell}.getBoundingClientRect(); return [box.left, box.right]; }})()"
    left, right = browser.run(box)
    assert 0 <= left < right <= 390


@pytest.mark.skipif("MINISFT_AXE" not in os.environ, reason="MINISFT_AXE names no axe.min.js of axe-core")
@pytest.mark.parametrize(
    "window", [{"width": 1280}, {"width": 390, "mobile": True}, {"width": 1280, "dark": True}], ids=str
)
def test_axe_finds_nothing_serious(started_browser, page, marked_page, window):
    for one in (page, marked_page):
        started_browser.open(one, **window)
        started_browser.run(Path(os.environ["MINISFT_AXE"]).read_text(encoding="utf-8") + "; 0")
        found = started_browser.run(
            "axe.run().then(({violations}) => violations.map((one) => [one.impact, one.id, one.nodes[0].html]))"
        )
        assert [one for one in found if one[0] in ("serious", "critical")] == []


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
