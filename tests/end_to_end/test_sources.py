"""Loss by source: metrics.jsonl, TensorBoard and the page of a run on two sources."""

import json
import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.command import run
from tests.tiny import write_conversations, write_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    write_tiny_model(folder / "model")
    for seed, name in enumerate(("one", "<b>two")):
        write_conversations(folder / f"{name}.jsonl", 12 + 4 * seed, seed=seed)
    return folder


def train(capsys, folder, name, *words):
    recipe = folder / "recipe.yaml"
    sources = ", ".join(f'{{path: "{folder / source}"}}' for source in ("one.jsonl", "<b>two.jsonl"))
    recipe.write_text(
        f"model: {folder / 'model'}\noutput: {folder / name}\ndata: {{source: [{sources}], template: mistral}}\n"
        "training: {max_steps: 3, batch_size: 8, precision: fp32}\n"
    )
    status, _, err = run(capsys, "train", recipe, *words)
    assert status == 0, err
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def test_the_sources_of_a_step_add_up_to_its_loss_under_every_split(capsys, folder):
    whole = train(capsys, folder, "whole")
    names = [str(folder / "one.jsonl"), str(folder / "<b>two.jsonl")]
    for step in whole:
        assert list(step["sources"]) == names
        tokens = sum(one["supervised_tokens"] for one in step["sources"].values())
        assert tokens == step["supervised_tokens"]
        mean = sum(one["loss_sum"] for one in step["sources"].values()) / tokens
        assert math.isclose(mean, step["loss"], rel_tol=1e-6)
    for number, words in enumerate(
        (["training.row_tokens=1"], ["training.processes=2", "training.batch_size=4"], ["training.strategy=zero2"])
    ):
        for step, other in zip(whole, train(capsys, folder, f"split-{number}", *words), strict=True):
            for name in names:
                one, two = step["sources"][name], other["sources"][name]
                assert one["supervised_tokens"] == two["supervised_tokens"]
                assert math.isclose(one["loss_sum"], two["loss_sum"], rel_tol=1e-4)


def test_tensorboard_and_the_page_show_each_source(capsys, folder):
    train(capsys, folder, "shown")
    events = EventAccumulator(str(folder / "shown" / "tensorboard"))
    events.Reload()
    assert sum("loss_by_source" in tag for tag in events.Tags()["scalars"]) == 2
    status, _, err = run(capsys, "report", folder / "shown")
    assert status == 0, err
    page = (folder / "shown" / "report.html").read_text()
    assert "Loss by source" in page
    assert "&lt;b&gt;two.jsonl" in page
    assert "<b>two" not in page
    assert "The model was probed before the first step" in page
