"""The page of a search, read as HTML and opened in a browser."""

import json
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from minisft.errors import UserError
from minisft.search.page import search_verdict, write_search_page
from tests.browser import Browser, find_browser
from tests.unit.search.study import write_study

KEYS = ("training.learning_rate", "training.epochs", "training.lora.target_modules")
NASTY = "</script><script>alert(1)</script>\"><img src=x onerror=alert(1)>'&\u2028"


class Page(HTMLParser):
    """The elements of a page with their attributes, the text of its title elements, and its data."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_data(self, text):
        self.texts.append((self.open[-1] if self.open else "", text))

    def all(self, tag, **wanted):
        return [found for name, found in self.elements if name == tag and wanted.items() <= found.items()]

    @property
    def data(self):
        return json.loads(next(text for tag, text in self.texts if tag == "script"))

    @property
    def ids(self):
        return {found["id"] for _, found in self.elements if "id" in found}


def circles(page):
    return sorted(found["class"] for found in page.all("circle"))


def test_the_page_has_the_verdict_the_recipe_the_charts_and_the_trials(tmp_path):
    write_study(tmp_path, keys=KEYS, importance={"training.learning_rate": 0.8, "training.epochs": 0.2})
    path = write_search_page(tmp_path)
    page, text = Page(path), path.read_text(encoding="utf-8")
    assert path == tmp_path / "search.html"
    assert {"recipe", "test", "slices", "importance", "parallel", "curves", "loss", "grad_norm", "trials"} <= page.ids
    assert "training: {learning_rate: 5.6e-5}" in text
    assert "Trial 3 is best" in text
    assert "out of memory" in text
    assert len(page.all("path")) == 7  # the parallel plot: a line for each trial with an objective
    assert circles(page) == sorted(["dot c0 wide1", "dot c1", *["dot c7 faint hollow"] * 5] * 3)  # three slices


def test_the_recipe_is_closed_and_below_the_charts_and_no_path_of_the_search_is_shown(tmp_path):
    study = write_study(
        tmp_path, best={"number": 3, "settings": {"training.lora.target_modules": ["q_proj"]}, "recipe": "best.yaml"}
    )
    study["trials"][7]["error"] = f"{tmp_path}/trials/7/model: the loss is not finite"
    (tmp_path / "search.json").write_text(json.dumps(study), encoding="utf-8")
    (tmp_path / "best.yaml").write_text(f"model: {tmp_path}-models/m\noutput: {tmp_path}/best\n", encoding="utf-8")
    path = write_search_page(tmp_path)
    page, text = Page(path), path.read_text(encoding="utf-8")
    assert page.all("details") == [{}]  # without `open`
    assert text.index('id="recipe"') > text.index('id="slices"')
    assert "<code>&#x27;training.lora.target_modules=[&quot;q_proj&quot;]&#x27;</code>" in text
    assert "output: best\n" in text
    assert f"model: {tmp_path}-models/m" in text  # it lies outside
    assert ">trials/7/model: the loss is not finite<" in text


def test_a_metric_is_named_with_its_direction_and_two_digits(tmp_path):
    study = write_study(tmp_path, objective="bleu", higher_is_better=True)
    study["test"]["best"]["rouge"] = {"score": 0.31, "low": 0.2, "high": 0.4}
    (tmp_path / "search.json").write_text(json.dumps(study), encoding="utf-8")
    text = write_search_page(tmp_path).read_text(encoding="utf-8")
    assert "BLEU 1.31 [1.28, 1.34]" in text
    assert "higher is better" in text
    assert ">0.3100 [0.2000, 0.4000]</td>" in text


def test_the_curves_of_the_best_trial_are_drawn_last_and_are_the_widest(tmp_path):
    write_study(tmp_path)
    data = Page(write_search_page(tmp_path)).data
    assert data["names"][-2:] == ["trial 4", "trial 3"]
    assert data["styles"][-2:] == ["c1", "c0 wide1"]
    assert len(data["names"]) == 8
    assert [len(curve) for curve in data["curves"]["loss"]][-2:] == [24, 24]
    assert data["curves"]["loss"][data["names"].index("trial 7")] == []  # its losses are not finite


def test_a_slice_shows_each_trial_at_its_value_and_loss(tmp_path):
    """The marks of a logarithmic axis: equal factors have equal distances, and a lower loss is lower on the page."""
    study = write_study(tmp_path, failed=())
    page = Page(write_search_page(tmp_path))
    dots = page.all("circle")
    positions = sorted(float(dot["cx"]) for dot in dots)
    gaps = {round(b - a) for a, b in pairwise(positions)}
    assert max(gaps) - min(gaps) <= 1
    by_x = sorted(dots, key=lambda dot: float(dot["cx"]))
    losses = [trial["objective"] for trial in study["trials"]]
    heights = [float(dot["cy"]) for dot in by_x]
    assert sorted(range(8), key=lambda n: -heights[n]) == sorted(range(8), key=lambda n: losses[n])


def test_the_ends_of_a_logarithmic_axis_have_their_labels(tmp_path):
    """Matplotlib's powers of ten are rounded: its 1e-5 is below 1e-5."""
    study = write_study(tmp_path, failed=())
    for trial, rate in zip(study["trials"], (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 4e-4, 7e-4, 1e-3), strict=True):
        trial["settings"]["training.learning_rate"] = rate
    (tmp_path / "search.json").write_text(json.dumps(study), encoding="utf-8")
    page = Page(write_search_page(tmp_path))
    assert {"1e-5", "0.0001", "0.001"} <= {text for tag, text in page.texts if tag == "title"}


def test_hostile_settings_and_errors_are_text(tmp_path):
    study = write_study(tmp_path, keys=(NASTY, "training.epochs"), importance={NASTY: 1.0})
    for trial in study["trials"]:
        trial["settings"][NASTY] = [NASTY] if trial["number"] % 2 else NASTY
    study["trials"][7]["error"] = study["trials"][2]["run"] = study["objective"] = NASTY
    study["test"] = {NASTY: {"loss": 1.0}}
    (tmp_path / "search.json").write_text(json.dumps(study), encoding="utf-8")
    (tmp_path / "best.yaml").write_text(NASTY, encoding="utf-8")
    page = Page(write_search_page(tmp_path))
    assert page.all("img") == []
    assert len(page.all("script")) == 2
    assert not any(name.startswith("on") for _, found in page.elements for name in found)


@pytest.mark.parametrize(
    ("more", "sentences"),
    [
        ({"indistinguishable": []}, ["Every other trial that was scored is worse than it by more than chance."]),
        ({}, ["Trial 4 cannot be told apart from it. None of these is cheaper than the best one."]),
        ({"validation_rows": 12}, ["Only 12 rows were held out: fewer than 20 do not support an interval."]),
        ({"indistinguishable": [4, 2]}, ["2 trials cannot be told apart from it: 2, 4."]),
        ({"best": None}, ["No trial has finished.", "8 trials: 2 ran to the end, 5 stopped early, 1 failed."]),
    ],
    ids=["clear", "tie", "few-rows", "ties", "none"],
)
def test_the_verdict_in_words(tmp_path, more, sentences):
    text = " ".join(search_verdict(write_study(tmp_path, **more)))
    assert all(sentence in text for sentence in sentences), text


def test_the_cheapest_of_the_best_settings_is_named_by_the_time_of_its_whole_run(tmp_path):
    """Trial 2 stopped at a quarter of its run, which had taken a tenth of the time of the best one's whole run."""
    study = write_study(tmp_path, indistinguishable=[2, 4])
    study["trials"][2]["seconds"] = 24.0
    text = " ".join(search_verdict(study))
    assert "Of these, trial 2 is the cheapest, with training.learning_rate=3.162e-5: a whole run takes 40% of" in text


def test_the_test_scores_are_in_a_table_with_their_intervals(tmp_path):
    write_study(tmp_path)
    text = write_search_page(tmp_path).read_text(encoding="utf-8")
    for cell in ("3.1000 [3.0000, 3.2000]", "1.4000 [1.3000, 1.5000]", "9.1 [8.0, 9.9]"):
        assert f">{cell}</td>" in text
    assert ">defaults</td>" not in text


def test_held_out_losses_at_the_rungs_are_drawn_with_their_intervals(tmp_path):
    write_study(tmp_path)
    rungs = Page(write_search_page(tmp_path)).data["rungs"]
    assert len(rungs) == 7  # the failed trial has reached none
    assert (rungs[-1]["name"], len(rungs[-1]["points"])) == ("trial 3", 4)
    assert rungs[-1]["points"][0][0] == 3


def test_a_search_under_way_has_a_page(tmp_path):
    study = write_study(tmp_path, best=None, indistinguishable=[])
    study["trials"][3]["state"] = "running"
    (tmp_path / "search.json").write_text(json.dumps(study), encoding="utf-8")
    assert "1 not at their end yet" in write_search_page(tmp_path).read_text(encoding="utf-8")


def test_a_study_in_which_nothing_was_measured_has_a_page(tmp_path):
    write_study(tmp_path, trials=4, failed=range(4), best=None, indistinguishable=[], test=None)
    page = Page(write_search_page(tmp_path))
    assert page.ids & {"slices", "parallel", "recipe", "test", "trials"} == {"trials"}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "there is no search in this folder"),
        ("{", "this file is damaged"),
        ('{"objective": "loss", "trials": [{"number": 0}], "best": null, "indistinguishable": []}', "trial 0 lacks"),
        ('{"objective": "loss", "trials": [], "best": {"number": 1}, "indistinguishable": []}', "none of its trials"),
    ],
)
def test_a_missing_or_damaged_study_is_refused(tmp_path, content, problem):
    if content is not None:
        (tmp_path / "search.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=problem):
        write_search_page(tmp_path)


@pytest.mark.skipif(find_browser() is None, reason="there is no Chromium here; MINISFT_BROWSER names one")
def test_in_a_browser_the_curves_are_drawn_and_a_phone_needs_no_sideways_scrolling(tmp_path):
    write_study(tmp_path, trials=40, failed=(7, 12), keys=(*KEYS, NASTY))
    path = write_search_page(tmp_path)
    browser = Browser(find_browser())
    try:
        browser.open(path)
        assert browser.run("document.querySelectorAll('#loss path').length") == 38
        assert browser.run("document.querySelectorAll('#rungs circle').length") == 2 * 4 + 36 * 2
        browser.hover("#loss svg", 0.9, 0.5)
        assert "trial 3: " in browser.text("#loss .tip")
        browser.open(path, width=390, mobile=True)
        assert browser.run("document.documentElement.scrollWidth") <= 390
        assert browser.problems == []
    finally:
        browser.close()
