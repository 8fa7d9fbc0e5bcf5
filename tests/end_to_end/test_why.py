"""`minisft why`: a step replayed and its rows ranked, rows near a test row, and rows whose losses look wrong."""

import json
import math

import pytest

import minisft
from tests.command import refused, run
from tests.tiny import write_recipe


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model, conversations):
    """Return a run of 8 steps; of its checkpoints 2, 4, 6 and 8 only the last has its optimizer state."""
    from minisft.cli import main

    folder = tmp_path_factory.mktemp("explained")
    settings = "{epochs: 2, save_every: 2, learning_rate: 1.0e-2, precision: fp32}"
    assert main(["train", str(write_recipe(folder, tiny_model, conversations, settings))]) == 0
    return folder / "run"


def why(capsys, folder, *words):
    status, out, err = run(capsys, "why", folder, "--json", *words)
    assert status == 0, err
    return json.loads(out), err


def test_a_step_is_replayed_and_its_rows_are_ranked(capsys, whole):
    found, err = why(capsys, whole, "--step", 6)
    assert "replaying steps 1 to 6 from the beginning: about" in err
    assert "checkpoint-4 has no optimizer state any more; training.keep_optimizer: all keeps it" in err
    [line] = [line for line in minisft.load(whole).metrics if line["step"] == 6]
    assert (found["step"], found["replayed"], found["loss"]) == (6, True, line["loss"])
    losses = [row["loss"] for row in found["rows"]]
    assert losses == sorted(losses, reverse=True)
    records = minisft.load(whole).row_losses
    kept = records[records["step"] == 6]
    assert sorted(losses) == sorted(kept["loss"].tolist())
    for row in found["rows"]:
        assert row["id"] == f"talk-{int(row['location'].split(':')[1]) - 1}"
        assert row["grad_norm"] > 0


def test_loss_without_the_worst_row_and_gradients_are_those_of_transformers(capsys, whole, tiny_model):
    """The first step has the base weights: each row's loss and gradient norm can be computed in another way."""
    import torch
    from transformers import AutoModelForCausalLM

    found, _ = why(capsys, whole, "--step", 1)
    data = minisft.load(whole).data.train
    by_id = {row.id: row for row in data}
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    sums, tokens = [], []
    for row in found["rows"]:
        prepared = by_id[row["id"]]
        model.zero_grad()
        loss = model(torch.tensor([prepared.ids]), labels=torch.tensor([prepared.labels])).loss
        loss.backward()
        norm = math.sqrt(sum(float((one.grad**2).sum()) for one in model.parameters() if one.grad is not None))
        assert row["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)
        tokens.append(sum(label >= 0 for label in prepared.labels[1:]))
        sums.append(float(loss.detach()) * tokens[-1])
    assert found["loss_without_worst"] == pytest.approx(sum(sums[1:]) / sum(tokens[1:]), rel=1e-5)


def test_a_terminal_shows_the_tokens_of_the_worst_rows(capsys, whole):
    status, out, _ = run(capsys, "why", whole, "--step", 2)
    assert status == 0
    assert "the same bits" in out
    assert "highest losses: " in out
    assert "[INST] " in out
    assert "\x1b" not in out  # no terminal, so no colours


def test_the_steps_of_a_lora_run_are_explained_with_the_gradients_of_its_adapters(
    capsys, tmp_path, tiny_model, conversations
):
    settings = "{max_steps: 4, save_every: 2, precision: fp32, learning_rate: 1.0e-2, keep_optimizer: all"
    recipe = write_recipe(tmp_path, tiny_model, conversations, settings + ", lora: {rank: 4, alpha: 8}}")
    assert run(capsys, "train", recipe).status == 0
    found, err = why(capsys, tmp_path / "run", "--step", 4)
    assert "replaying steps 3 to 4 from checkpoint-2" in err
    assert found["replayed"]
    assert all(row["grad_norm"] > 0 for row in found["rows"])


def test_a_step_whose_loss_was_not_finite_is_replayed(capsys, recipe_file, tmp_path):
    words = ["training.learning_rate=1e30", "training.warmup_ratio=0"]
    status, _, err = run(capsys, "train", recipe_file, *words)
    assert (status, "the loss is nan" in err) == (2, True)
    step = int(minisft.load(tmp_path / "run").row_losses["step"].max())
    found, err = why(capsys, tmp_path / "run", "--step", step)
    assert f"the gradient norm of step {step - 1} is nan" in err
    assert found["replayed"]
    assert found["loss"] is None
    assert found["rows"][0]["loss"] is None


def test_a_changed_log_is_not_the_replayed_step(capsys, whole, tmp_path):
    import shutil

    copy = shutil.copytree(whole, tmp_path / "copy")
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    lines[1]["loss"] += 1e-6
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert not why(capsys, copy, "--step", 2)[0]["replayed"]


def test_the_training_rows_nearest_to_a_test_row_share_its_words(capsys, tmp_path, tiny_model):
    words = ["red", "green", "blue", "black", "white"]
    rows = [
        {"id": f"{word}-{number}", "conversations": [
            {"from": "human", "value": f"{number}: tell me of {word}"},
            {"from": "gpt", "value": f"the {word} one is number {number}"},
        ]}
        for word in words
        for number in range(6)
    ]  # fmt: skip
    test = [{"id": "asked", "conversations": [
        {"from": "human", "value": "say something of green"}, {"from": "gpt", "value": "a green one"},
    ]}]  # fmt: skip
    overrides = {"data.template": "mistral", "training.max_steps": 2, "training.precision": "fp32"}
    minisft.train(None, overrides, model=str(tiny_model), data=rows, test=test, output=str(tmp_path / "run"))
    found, _ = why(capsys, tmp_path / "run", "--row", "asked")
    assert {row["id"].split("-")[0] for row in found["rows"][:6]} == {"green"}
    shares = [row["similarity"] for row in found["rows"]]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < shares[0] <= 1.0
    others = [row["id"] for row in why(capsys, tmp_path / "run", "--row", "blue-3")[0]["rows"]]
    assert "blue-3" not in others
    assert sum(id.startswith("blue") for id in others) == 5
    out = run(capsys, "why", tmp_path / "run", "--row", "asked").out
    assert "gradients are not compared" in out
    assert "give an id such as asked" in refused(capsys, "why", tmp_path / "run", "--row", "aske")


def test_contradictory_answers_are_found_with_the_rows_of_the_highest_loss(capsys, tmp_path, tiny_model):
    rows = [{"prompt": f"question {number}", "completion": f"answer {number}"} for number in range(20)]
    rows += [{"prompt": "question 3", "completion": "another one"}, dict(rows[5])]
    overrides = {"data.template": "mistral", "data.test_fraction": 0.0, "training.max_steps": 6,
                 "training.precision": "fp32"}  # fmt: skip
    minisft.train(None, overrides, model=str(tiny_model), data=rows, output=str(tmp_path / "run"))
    found, _ = why(capsys, tmp_path / "run")
    [group] = found["contradictions"]
    assert len(group) == 2
    excess = [row["excess"] for row in found["rows"]]
    assert len(excess) == 10
    assert excess == sorted(excess, reverse=True)
    assert "different answers to the same prompt: 1 prompts" in run(capsys, "why", tmp_path / "run").out


def test_questions_that_have_no_answer_are_refused(capsys, whole, tmp_path):
    assert "this run took no step 9" in refused(capsys, "why", whole, "--step", 9)
    assert "must be at least 1" in refused(capsys, "why", whole, "--step", 0)
    assert "not allowed with" in refused(capsys, "why", whole, "--step", 1, "--row", "talk-1")
    assert "this is not a run folder" in refused(capsys, "why", tmp_path, "--step", 1)
    with pytest.raises(minisft.UserError, match="two questions"):
        minisft.why(whole, step=1, row="talk-1")
