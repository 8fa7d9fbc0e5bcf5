"""The page of a run: its sections, and that nothing a model wrote can act on it."""

import json
import re
import runpy
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from minisft.errors import UserError
from minisft.report.gains import changes
from minisft.report.markdown import write_results
from minisft.report.page import write_report
from minisft.report.run_data import read_run
from minisft.report.verdict import verdict
from minisft.results import format_p_value

NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)> [/INST] &amp;"


def score(value, **p):
    return {"score": value, "low": value - 2, "high": value + 2, "mean": value, "signature": "s", "p": p}


def entry(value, step, **fields):
    scores = {"bleu": score(value, base=0.001, constant=0.2), "chrf": score(value + 5)}
    return {"step": step, "loss": 2.0, "perplexity": 7.4, "exact_match": 0.1, "seconds": 1.0, **scores, **fields}


def make_run(folder, best=20.0, rows=4, conversations=40):
    checkpoint = entry(best, 9, checkpoint="checkpoint-9")
    results = {
        "base": entry(3.0, 0), "checkpoints": [checkpoint], "best": "checkpoint-9",
        "answers": conversations, "conversations": conversations,
        "constant": {"text": NASTY, "exact_match": 0.0, "bleu": score(10.0), "chrf": score(12.0)},
        "failed": [{"checkpoint": "checkpoint-10", "error": NASTY}], "turns": "last",
    }  # fmt: skip
    for name in ("base", "checkpoint-9"):
        place = folder / "evaluation" / name
        place.mkdir(parents=True)
        lines = [
            {"id": f"row{n}", "turn": 1, "prompt": NASTY, "reference": "yes", "output": f"{name} {n} {NASTY}",
             "bleu": 1.0, "chrf": n * (2.0 if name == "base" else 3.0)}
            for n in range(rows)
        ]  # fmt: skip
        (place / "outputs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "evaluation/results.json").write_text(json.dumps(results))
    (folder / "recipe.yaml").write_text(f"model: tiny  # {NASTY}\n")
    steps = [{"step": n, "loss": 3 / n, "seconds": 2.0, "tokens": 50, "supervised_tokens": 20, "peak_memory_mb": 900}
             for n in range(1, 5000)]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (folder / "dataset").mkdir()
    ledger = {"rows": {"read": 50, "kept": 50}, "tokens": {"kept": 900}, "skipped": {}, "turns": {"user": 90},
              "lengths": {"histogram": {"16": 40, "32": 10}}}  # fmt: skip
    (folder / "dataset/ledger.json").write_text(json.dumps(ledger))
    preview = {"title": "train row 0", "tokens": [["Hi", 0], [NASTY, 0], ["yes\n", 1]], "left_out": 7}
    (folder / "dataset/preview.json").write_text(json.dumps({"rows": [preview]}))
    packages = {"torch": "2.99"}
    found = {"precision": "bf16", "python": "3.99", "system": "Plan 9", "cores": 2, "devices": [], "packages": packages}
    (folder / "environment.json").write_text(json.dumps(found))
    return folder


class Elements(HTMLParser):
    """All elements of a page with their attributes, and the text of its data element."""

    def __init__(self, page):
        super().__init__()
        self.found, self.inside, self.data = [], None, ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self.inside = dict(attributes).get("id") if tag == "script" else None

    def handle_data(self, text):
        if self.inside == "data":
            self.data += text
            self.inside = None


def test_what_a_model_wrote_stays_text(tmp_path):
    page = write_report(make_run(tmp_path)).read_text()
    elements = Elements(page)
    assert [tag for tag, _ in elements.found].count("script") == 2
    assert "img" not in [tag for tag, _ in elements.found]
    data = json.loads(elements.data)
    assert data["examples"][0]["texts"][0] == f"base 0 {NASTY}"
    assert not re.search(r"innerHTML\s*=|insertAdjacentHTML|document\.write", page)


def test_the_page_loads_nothing(tmp_path):
    page = write_report(make_run(tmp_path)).read_text()
    elements = Elements(page)
    assert not [a for _, a in elements.found if "src" in a]
    ids = {a["id"] for _, a in elements.found if "id" in a}
    links = [a["href"] for _, a in elements.found if "href" in a]
    assert links
    assert {link[1:] for link in links} <= ids
    assert all(link.startswith("#") for link in links)
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in page


def test_the_page_holds_every_section(tmp_path):
    page = write_report(make_run(tmp_path)).read_text()
    ids = {attributes["id"] for _, attributes in Elements(page).found if "id" in attributes}
    assert {"curves", "scores", "examples", "ledger", "preview", "speed", "recipe", "loss", "bleu", "chrf"} <= ids
    assert "Trained with bf16 arithmetic, Python 3.99 on Plan 9, 2 cores, no GPU; torch 2.99." in page
    assert '<span class="learned">yes⏎\n</span> ... and 7 tokens more' in page
    assert "p: constant" in page
    assert "minisft chat" in page
    assert f"<code>minisft serve {tmp_path}</code>" in page
    assert "checkpoint-10 could not be scored" in page
    data = json.loads(Elements(page).data)
    assert len(data["train"]) <= 2000


def test_the_overview_comes_first_with_score_loss_time_cost_and_data(tmp_path):
    folder = make_run(tmp_path)
    (folder / "recipe.yaml").write_text("model: tiny\ntraining: {processes: 3}\n")
    ledger = json.loads((folder / "dataset/ledger.json").read_text())
    ledger["rows"] |= {"train": 1045, "test": 5}
    (folder / "dataset/ledger.json").write_text(json.dumps(ledger))
    page = write_report(folder).read_text()
    found = re.findall(r'<div><dt>(.*?)</dt><dd class="figure">(.*?)</dd>((?:<dd>.*?</dd>)*)</div>', page)
    assert [(name, figure) for name, figure, _ in found] == [
        ("BLEU of checkpoint-9", "20.0"), ("held-out loss", "2"), ("training time", "2 h 46 min"),
        ("process hours", "8.3"), ("conversations to learn", "1,045"),
    ]  # fmt: skip
    notes = [re.findall(r"<dd>(.*?)</dd>", more) for _, _, more in found]
    assert notes[0] == ["95 %: 18.0 to 22.0", "base 3.0, constant 10.0"]
    assert notes[2] == ["4,999 steps", "10 supervised tokens/s"]
    assert page.index('verdict">') < page.index('tiles">') < page.index('id="scores"') < page.index('id="examples"')


def test_the_worst_answers_of_the_best_checkpoint_come_before_all_others(tmp_path):
    data = json.loads(Elements(write_report(make_run(tmp_path, rows=40)).read_text()).data)
    numbers = [row["number"] for row in data["examples"]]
    assert numbers[:5] == [0, 1, 2, 3, 4]  # chrF of the checkpoint is 3 n, of the base model 2 n
    assert numbers[5:10] == [39, 38, 37, 36, 35]  # none is worse than the base model's; these improved most
    assert sorted(numbers) == list(range(40))
    assert numbers[10:] != sorted(numbers[10:])  # the others in a random order, the same each time
    again = json.loads(Elements(write_report(tmp_path).read_text()).data)
    assert [row["number"] for row in again["examples"]] == numbers


def test_a_metric_that_this_version_does_not_know_has_its_column_its_figure_and_its_rows(tmp_path):
    folder = make_run(tmp_path)
    path = folder / "evaluation/results.json"
    results = json.loads(path.read_text())
    for place in (results["base"], *results["checkpoints"], results["constant"]):
        place["new_metric"] = score(0.5)
    path.write_text(json.dumps(results))
    for name in ("base", "checkpoint-9"):
        outputs = folder / "evaluation" / name / "outputs.jsonl"
        lines = [
            json.loads(line) | {"new_metric": 1 - n / 8} for n, line in enumerate(outputs.read_text().splitlines())
        ]
        outputs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report(folder).read_text()
    data = json.loads(Elements(page).data)
    assert list(data["scores"]) == ["bleu", "chrf", "new_metric"]
    assert ("figure", {"id": "score-new_metric"}) in Elements(page).found
    assert '<th scope="col">new_metric</th>' in page
    assert data["examples"][0]["scores"]["new_metric"] == [1.0, 1.0]


def test_the_worst_answers_by_a_metric_whose_lower_score_is_better_are_the_highest(tmp_path):
    path = make_run(tmp_path, rows=40) / "evaluation/results.json"
    results = json.loads(path.read_text())
    path.write_text(json.dumps(results | {"lower_is_better": ["chrf"]}))
    data = json.loads(Elements(write_report(tmp_path).read_text()).data)
    assert [row["number"] for row in data["examples"]][:5] == [39, 38, 37, 36, 35]
    assert (data["scores"]["chrf"]["lower"], data["scores"]["bleu"]["lower"]) == (True, False)


def test_each_source_has_its_loss_at_the_beginning_and_at_the_end(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: tiny\n")
    steps = [
        {"step": n, "loss": 1.0, "sources": {"d/a.jsonl": {"loss_sum": 4.0 * (41 - n), "supervised_tokens": 4},
                                             "d/b.jsonl": {"loss_sum": 0.0, "supervised_tokens": n % 2}}}
        for n in range(1, 41)
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    page = write_report(tmp_path).read_text()
    first, second = json.loads(Elements(page).data)["sources"]
    assert (first["short"], first["tokens"], first["first"], first["last"]) == ("a.jsonl", 160, 38.5, 2.5)
    assert (second["tokens"], second["first"], second["last"]) == (20, 0.0, 0.0)
    assert '<td data-head="source">d/a.jsonl</td><td data-head="supervised tokens">160</td>' in page


@pytest.mark.parametrize(
    ("best", "said"),
    [
        (20.0, "Take checkpoint-9: BLEU 20.0 (95 % interval 18.0 to 22.0), 17.0 above the base model, which is more "
               "than chance (p = 0.001). It beats the constant baseline (BLEU 10.0), which may be chance (p = 0.200)."),
        (5.0, "It does not beat the constant baseline (BLEU 10.0): that score is not evidence of learning."),
        (2.0, "No checkpoint beats the base model (BLEU 3.0); best is checkpoint-9 with BLEU 2.0"),
    ],
)  # fmt: skip
def test_the_verdict_compares_with_base_and_constant_baseline(tmp_path, best, said):
    assert said in verdict(read_run(make_run(tmp_path, best)))


def test_a_run_that_is_not_evaluated_has_a_page(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: tiny\n")
    assert "Not evaluated yet" in write_report(tmp_path).read_text()


def test_a_trained_run_without_results_has_its_curve_ledger_and_speed(tmp_path):
    make_run(tmp_path)
    shutil.rmtree(tmp_path / "evaluation")
    page = write_report(tmp_path).read_text()
    elements = Elements(page)
    ids = {attributes["id"] for _, attributes in elements.found if "id" in attributes}
    assert {"curves", "ledger", "speed", "recipe", "loss"} <= ids
    assert not {"scores", "examples", "bleu", "chrf"} & ids
    data = json.loads(elements.data)
    assert len(data["train"]) > 1000
    assert (data["test"], data["scores"], data["examples"], data["best"]) == ([], None, [], None)
    assert "Not evaluated yet" in page


def test_a_run_without_any_scored_checkpoint_has_a_page(tmp_path):
    path = make_run(tmp_path) / "evaluation/results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"checkpoints": [], "best": None}))
    assert "No checkpoint could be scored." in write_report(tmp_path).read_text()


def test_the_users_own_prompts_come_first(tmp_path):
    folder = make_run(tmp_path)
    for name in ("base", "checkpoint-9"):
        line = {"id": "prompt-1", "prompt": "Mine?", "output": name, "finish": "stop", "tokens": 2}
        (folder / "evaluation" / name / "prompts.jsonl").write_text(json.dumps(line) + "\n")
    first, second, *_ = json.loads(Elements(write_report(folder).read_text()).data)["examples"]
    assert first == {
        "title": "your prompt-1", "prompt": "Mine?", "reference": None, "texts": ["base", "checkpoint-9"],
        "outputs": [0, 1], "scores": {},
    }  # fmt: skip
    assert second["title"] == "row0, answer 1"


def test_results_md_holds_verdict_table_curves_and_examples(tmp_path):
    text = write_results(make_run(tmp_path / "my_run")).read_text()
    assert text.startswith("# my\\_run\n\nTake checkpoint-9: BLEU 20.0")
    assert "| **checkpoint-9** | 9 | 2 | 7.4 | 20.0 [18.0, 22.0] |" in text
    assert "![scores](evaluation/scores.png)" in text
    assert (tmp_path / "my_run/evaluation/scores.png").exists()
    assert (tmp_path / "my_run/evaluation/loss.png").exists()
    assert "checkpoint-10 could not be scored" in text
    assert "\\<script\\>" in text
    assert "<script>" not in text.replace("\\<", "")
    assert text.count("| yes |") == 3


def test_a_run_that_is_not_evaluated_has_its_verdict_as_markdown(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: tiny\n")
    assert "Not evaluated yet" in write_results(tmp_path).read_text()


def test_fifty_checkpoints_and_a_thousand_rows_give_a_small_page_quickly(tmp_path):
    script = Path(__file__).parents[3] / "benchmarks" / "evaluate.py"
    runpy.run_path(str(script))["make_run"](tmp_path, 50, 1000)
    started = time.process_time()
    path = write_report(tmp_path)
    assert time.process_time() - started < 10
    assert path.stat().st_size < 3_000_000
    assert len(json.loads(Elements(path.read_text()).data)["examples"]) > 100


def test_a_folder_that_is_not_a_run_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("p", "text"), [(None, ""), (1.0, "1.000"), (0.0324, "0.032"), (0.000999, "0.001"), (0.0001, "0.0001")]
)
def test_p_values_have_three_decimals_or_one_digit(p, text):
    assert format_p_value(p) == text


def test_benchmarks_have_a_table_with_the_difference_to_the_base_model(tmp_path):
    make_run(tmp_path)
    path = tmp_path / "evaluation/results.json"
    figures = {NASTY: {"acc": {"score": 0.25, "stderr": 0.0712}, "chrf": {"score": 6.5, "stderr": None}}}
    tuned = {NASTY: {"acc": {"score": 0.5, "stderr": 0.08, "difference": 0.25, "difference_stderr": 0.1},
                     "chrf": {"score": 6.0, "stderr": None, "difference": -0.5, "difference_stderr": None}}}  # fmt: skip
    models = {"base": figures, "checkpoint-9": tuned}
    path.write_text(json.dumps({**json.loads(path.read_text()), "benchmarks": {"harness": "0.4", "models": models}}))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    section = re.sub(r"<td[^>]*>", "<td>", page[page.index('<h2 id="benchmarks">') :])
    assert "<td>0.25 ± 0.071</td><td>0.5 ± 0.08 (+0.25)</td>" in section
    assert "<td>6.5</td><td>6 (-0.5)</td>" in section
    assert NASTY not in page


def test_benchmarks_are_among_what_was_gained_and_lost(tmp_path):
    path = make_run(tmp_path) / "evaluation" / "results.json"
    names = {"acc": True, "perplexity": False, "f1": True, "length": None}
    base = {name: {"score": 1.0, "stderr": 0.1, "higher_is_better": better} for name, better in names.items()}

    def tuned(name, difference, stderr):
        return base[name] | {"score": 1 + difference, "difference": difference, "difference_stderr": stderr}

    figures = {"acc": tuned("acc", 0.25, 0.1), "perplexity": tuned("perplexity", 2.0, 1.5),
               "f1": tuned("f1", 0.5, None), "length": tuned("length", 3.0, 0.1)}  # fmt: skip
    benchmarks = {"harness": "0.4", "models": {"base": {"t": base}, "checkpoint-9": {"t": figures}}}
    path.write_text(json.dumps({**json.loads(path.read_text()), "benchmarks": benchmarks}))
    found = {one.name: one for one in changes(read_run(tmp_path))}
    assert found["t acc"].cells == ["t acc", "1 to 1.25", "+0.25", "± 0.1"]
    assert found["t perplexity"].cells == ["t perplexity", "1 to 3", "+2", "± 1.5: may be chance"]
    assert found["t f1"].cells == ["t f1", "1 to 1.5", "+0.5", "no standard error"]
    assert [found[f"t {name}"].better for name in ("acc", "perplexity", "f1")] == [True, False, True]
    assert "t length" not in found
    page, text = write_report(tmp_path).read_text(), write_results(tmp_path).read_text()
    assert page.index(">Gained<") < page.index(">t acc<") < page.index(">Lost<") < page.index(">t perplexity<")
    assert text.index("## Gained") < text.index("| t acc |") < text.index("## Lost") < text.index("| t perplexity |")


@pytest.mark.parametrize(
    "part",
    [{"judge": {"model": "m", "reliable": True, "pairs": [{"model": "a"}]}}, {"judge": {"pairs": []}},
     {"benchmarks": {"harness": "0.4", "models": {}}}, {"failed_metrics": [{"metric": "a"}]},
     {"benchmarks": {"harness": "0.4", "models": {"base": {"t": {"acc": {"score": "x", "stderr": None}}}}}}],
)  # fmt: skip
def test_results_with_an_incomplete_part_are_refused(tmp_path, part):
    path = make_run(tmp_path) / "evaluation" / "results.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **part}))
    with pytest.raises(UserError, match="this file is damaged"):
        write_report(tmp_path)


def test_the_markdown_has_the_verdicts_and_the_benchmarks(tmp_path):
    path = make_run(tmp_path) / "evaluation" / "results.json"
    figure = {"score": 0.5, "stderr": 0.05}
    tuned = figure | {"difference": 0.125, "difference_stderr": 0.07}
    pair = {"model": "checkpoint-9", "rival": "base", "wins": 12, "ties": 2, "losses": 6, "order_decided": 1,
            "identical": 0, "invalid": 0, "unjudged": 0, "win_rate": 0.65, "low": 0.5, "high": 0.8, "p": 0.04}  # fmt: skip
    added = {
        "benchmarks": {
            "harness": "0.4",
            "models": {"base": {"t": {"acc": figure}}, "checkpoint-9": {"t": {"acc": tuned}}},
        },
        "judge": {"model": NASTY, "pairs": [pair], "reliable": True},
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | added))
    text = write_results(tmp_path).read_text()
    assert "## A judge's verdicts" in text
    assert "| checkpoint-9 | base | 65.0 \\[50.0, 80.0\\] | 0.040 | 12 / 2 / 6 | 1 | 0 |" in text
    assert "| t acc | 0.5 ± 0.05 | 0.5 ± 0.05 (+0.125) |" in text
    assert "<script>" not in text, "the name of the judge is text"
    order = [text.index(f"## {title}") for title in ("A judge's verdicts", "Benchmarks", "Examples")]
    assert order == sorted(order)
