"""`evaluation.judge` through the command line: judged by a real `minisft serve`, shown, refused where it must be."""

import json
import re
from itertools import pairwise

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from minisft import load
from minisft.cli import main
from minisft.manifest import foreign_files, write_marker
from tests.command import refused, run
from tests.judge_server import JudgeServer, prefer
from tests.served import Served
from tests.tiny import byte_tokenizer

VERDICT = "VERDICT: 1"


def write_judge(folder):
    """A model of one-hot embeddings that continues every prompt with VERDICT: each token names its successor."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.content }}"
        "{% if message.role == 'assistant' %}{{ eos_token }}{% else %}]{% endif %}{% endfor %}"
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=264, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=8192, bos_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    ids = [tokenizer("]").input_ids[-1], *tokenizer(VERDICT, add_special_tokens=False).input_ids, 1]
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(len(tokenizer), 264))
        model.model.norm.weight.fill_(1.0)
        for token, successor in pairwise(ids):
            model.lm_head.weight[successor, token] = 1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def two_models(run_folder):
    """The run, whose last checkpoint answers otherwise than the base model: equal answers are not asked about."""
    write_judge(run_folder / "checkpoints" / "checkpoint-4")
    return run_folder


def judged_by(url, **fields):
    return [f"evaluation.judge.{key}={value}" for key, value in {"base_url": url, "model": "m", **fields}.items()]


def results_of(folder):
    return json.loads((folder / "evaluation/results.json").read_text())


def test_a_served_model_judges_a_run(tmp_path, two_models, capsys):
    """The judge always prefers the first answer, so the order decides every pair."""
    with Served(write_judge(tmp_path / "judge")) as server:
        names = json.loads(server.raw("/v1/models")[2])["data"]
        words = judged_by(f"{server.url}/v1", model=names[0]["id"])
        status, printed, said = run(capsys, "evaluate", two_models, *words)
    assert status == 0, said
    judge = results_of(two_models)["judge"]
    assert [(pair["model"], pair["rival"]) for pair in judge["pairs"]] == [
        ("checkpoint-2", "base"), ("checkpoint-4", "base"), ("checkpoint-4", "checkpoint-2"),
    ]  # fmt: skip
    asked = 0
    for pair in judge["pairs"]:
        assert (pair["ties"], pair["invalid"], pair["win_rate"]) == (3, 0, 0.5)
        assert pair["order_decided"] == 3 - pair["identical"]
        asked += pair["order_decided"]
    assert asked > 0
    assert "0 / 3 / 0" in printed
    assert "Fewer than 20 conversations were judged" in printed
    # the verdicts are kept: the server is gone
    assert run(capsys, "evaluate", two_models, *words).status == 0
    assert results_of(two_models)["judge"] == {**judge, "requests": 0}
    found = load(two_models).results
    assert found is not None
    assert found["judge"]["pairs"] == judge["pairs"]


def test_the_page_shows_the_verdicts(two_models, capsys):
    nasty = "<script>alert(1)</script>"
    with JudgeServer(prefer("")) as server:
        words = judged_by(server.url, pairwise="base", model=nasty, max_requests=3, concurrency=1)
        assert "the budget of 3 requests is spent" in refused(capsys, "evaluate", two_models, *words)
    assert main(["report", str(two_models)]) == 0
    page = (two_models / "report.html").read_text()
    section = page[page.index('<h2 id="judge">') : page.index('<h2 id="examples">')]
    assert "<td>checkpoint-4</td><td>base</td>" in re.sub(r"<td[^>]*>", "<td>", section)
    assert "the budget of 3 requests is spent" in section
    assert nasty not in page.replace("page", "")
    assert "&lt;script&gt;alert(1)" in section


def test_scores_are_there_although_the_judge_is_not(two_models, capsys):
    (two_models / "evaluation/results.json").unlink()
    words = judged_by("http://127.0.0.1:9/v1", max_retries=0, concurrency=1)
    said = refused(capsys, "evaluate", two_models, *words)
    assert "evaluation.judge: http://127.0.0.1:9/v1: it cannot be reached" in said
    assert "all else is scored" in said
    assert results_of(two_models)["best"]
    assert main(["report", str(two_models)]) == 0


def test_the_files_of_the_judge_belong_to_the_run(two_models, capsys):
    """`--force` replaces the run, so MiniSFT knows that it wrote them."""
    (two_models / ".minisft.json").unlink()
    write_marker(two_models, "run")  # the marker of a copy is not valid
    with JudgeServer(prefer("")) as server:
        assert run(capsys, "evaluate", two_models, *judged_by(server.url)).status == 0
    assert foreign_files(two_models / "evaluation" / "judge") == []


@pytest.mark.parametrize("as_file", [False, True])
def test_a_run_folder_cannot_send_answers_and_keys_elsewhere(two_models, capsys, monkeypatch, as_file):
    """A judge on another machine, which only the recipe of a run folder names, is refused before anything is sent."""
    monkeypatch.setenv("MINISFT_JUDGE_API_KEY", "sk-secret")
    recipe = two_models / "recipe.yaml"
    text = recipe.read_text().replace("  judge: null", "  judge: {base_url: 'http://192.0.2.1/v1', model: m}")
    assert "192.0.2.1" in text
    recipe.write_text(text)
    said = refused(capsys, "evaluate", recipe if as_file else two_models)
    assert "the recipe of a run folder names http://192.0.2.1/v1, and would send answers and your key to it" in said
    assert run(capsys, "evaluate", two_models, "evaluation.judge=null").status == 0
    with JudgeServer(prefer("")) as server:
        assert run(capsys, "evaluate", two_models, f"evaluation.judge.base_url={server.url}").status == 0
    assert run(capsys, "report", two_models).status == 0


def test_a_recipe_names_the_judge(recipe_file, capsys):
    with JudgeServer(prefer("")) as server:
        with recipe_file.open("a") as file:
            file.write(f"  judge:\n    base_url: {server.url}\n    model: m\n    pairwise: base\n")
        for verb in ("train", "evaluate"):
            assert run(capsys, verb, recipe_file, "training.max_steps=2").status == 0
    assert results_of(recipe_file.parent / "run")["judge"]["pairs"][0]["rival"] == "base"
