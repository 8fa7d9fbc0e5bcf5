"""The proof of an export: what holds passes, and each planted fault is found and named."""

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minisft.exporting.answer_comparison import Tolerance, divergence
from minisft.exporting.export import ExportOptions, export
from minisft.exporting.proof import VERIFIED, ExportedModel, prove
from minisft.run_folder import RunFolder, load_run


def exported(run, folder, **options):
    export(load_run(run), folder, ExportOptions(engine="none", **options))
    return folder


def problem(run, folder, base=None, dtype=None):
    """What plain transformers, on a folder, is found to do otherwise than the run's model."""
    model = ExportedModel(folder, RunFolder(run).model, base, dtype)
    return prove(model, load_run(run), "transformers", None, None).problem


def names_a_token(problem):
    """Return whether a message says at which token, with its text, an answer differs."""
    return bool(
        re.search(
            r"(first at token \d+: .* in place of|the log-probability of token \d+ of the answer, \d+ ')", problem
        )
    )


def change_json(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def change_text(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def change_tensor(folder, name, change):
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_an_intact_export_is_verified(answering_run, tmp_path, capsys):
    export(load_run(answering_run), tmp_path / "out", ExportOptions(engine="transformers"))
    entry = json.loads((tmp_path / "out" / VERIFIED).read_text())["engine"]["transformers"]
    assert (entry["status"], entry["reason"]) == ("ok", "")
    assert entry["prompts"] == entry["prompt_ids_equal"] == entry["answers_equal"] == 6
    assert entry["max_logprob_difference"] < 1e-4
    assert entry["mean_kl"] < 1e-6
    assert "6 of 6 prompts" in capsys.readouterr().out


def test_an_export_without_verification_says_so(answering_run, tmp_path):
    entries = json.loads((exported(answering_run, tmp_path / "out") / VERIFIED).read_text())["engine"]
    assert {entry["status"] for entry in entries.values()} == {"not run"}
    assert {entry["reason"] for entry in entries.values()} == {"--engine none"}


def test_a_missing_bos_is_found(answering_run, tmp_path):
    folder = exported(answering_run, tmp_path / "out")
    change_text(folder / "chat_template.jinja", "{{ bos_token }}", "")
    assert "differs from the trained one, first at token 0" in problem(answering_run, folder)


def test_a_second_bos_is_found(answering_run, tmp_path):
    folder = exported(answering_run, tmp_path / "out")
    change_text(folder / "chat_template.jinja", "{{ bos_token }}", "{{ bos_token }}{{ bos_token }}")
    assert "first at token 1: 0 '<s>' in place of" in problem(answering_run, folder)


def test_another_bos_is_found(answering_run, tmp_path):
    folder = exported(answering_run, tmp_path / "out")
    change_json(folder / "tokenizer_config.json", bos_token="</s>")
    assert "first at token 0: 1 '</s>' in place of 0 '<s>'" in problem(answering_run, folder)


def test_another_template_is_found(answering_run, tmp_path):
    folder = exported(answering_run, tmp_path / "out")
    change_text(folder / "chat_template.jinja", "'['", "'{'")
    assert "in place of" in problem(answering_run, folder)


def test_another_terminator_is_found(answering_run, tmp_path):
    folder = exported(answering_run, tmp_path / "out")
    change_json(folder / "generation_config.json", eos_token_id=5)
    change_json(folder / "config.json", eos_token_id=5)
    assert "does not stop at the terminator 1 '</s>'" in problem(answering_run, folder)


def test_a_terminator_too_many_is_found(answering_run, tmp_path):
    folder = exported(answering_run, tmp_path / "out")
    letter = RunFolder(answering_run).model / "tokenizer.json"
    token = json.loads(letter.read_text())["model"]["vocab"]["y"]  # "aye" and "nay" have it
    change_json(folder / "generation_config.json", eos_token_id=[1, token])
    assert "answers differ" in problem(answering_run, folder)


def test_a_default_that_changes_answers_is_found(answering_run, tmp_path):
    folder = exported(answering_run, tmp_path / "out")
    change_json(folder / "generation_config.json", min_new_tokens=7)
    assert "in place of 1 '</s>'" in problem(answering_run, folder)


def test_a_transposed_tensor_is_found(answering_run, tmp_path):
    folder = exported(answering_run, tmp_path / "out")
    change_tensor(folder, "model.layers.0.self_attn.q_proj.weight", lambda tensor: tensor.T)
    found = problem(answering_run, folder)
    assert names_a_token(found)


def test_adapters_that_are_merged_twice_are_found(lora_run, tmp_path):
    folder = exported(lora_run, tmp_path / "out")
    base = lora_run.parent / "model"
    assert problem(lora_run, folder, base) == ""
    before = load_file(base / "model.safetensors")
    for name in [name for name in before if "proj" in name]:
        change_tensor(folder, name, lambda tensor, name=name: tensor + (tensor - before[name]))
    found = problem(lora_run, folder, base)
    assert names_a_token(found)


def test_a_theta_that_is_lost_is_found(answering_run, tmp_path):
    folder = exported(answering_run, tmp_path / "out")
    change_json(folder / "config.json", rope_parameters=None, rope_theta=3.0)
    assert names_a_token(problem(answering_run, folder))


def test_a_refused_export_leaves_nothing(answering_run, tmp_path, monkeypatch, capsys):
    from minisft.errors import UserError
    from minisft.exporting import export as module

    def faulty(folder, name):
        change_json(folder / "config.json", rope_parameters=None, rope_theta=3.0)

    monkeypatch.setattr(module, "make_readable", faulty)
    with pytest.raises(UserError, match="not served as the model was trained"):
        export(load_run(answering_run), tmp_path / "out", ExportOptions(engine="transformers"))
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.iterdir()) == []
    options = ExportOptions(engine="transformers", allow_unverified=True)
    export(load_run(answering_run), tmp_path / "out", options)
    assert json.loads((tmp_path / "out" / VERIFIED).read_text())["engine"]["transformers"]["status"] == "failed"


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_half_precision_is_within_its_bound(answering_run, tmp_path, dtype):
    export(load_run(answering_run), tmp_path / "out", ExportOptions(engine="transformers", dtype=dtype))
    entry = json.loads((tmp_path / "out" / VERIFIED).read_text())["engine"]["transformers"]
    assert 0 < entry["max_logprob_difference"] <= Tolerance.of(dtype).logprob


@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_the_divergence_is_a_lower_bound(seed, kept):
    random = np.random.default_rng(seed)
    p, q = (random.dirichlet(np.ones(20) * shape) * 0.999 + 0.001 / 20 for shape in (0.5, 3))
    reference = {int(token): float(np.log(p[token])) for token in p.argsort()[-kept:]}
    other = {int(token): float(np.log(q[token])) for token in range(len(p))}
    whole = torch.nn.functional.kl_div(torch.tensor(np.log(q)), torch.tensor(p), reduction="sum").item()
    assert -1e-9 <= divergence(reference, other) <= whole + 1e-9
    full = {token: float(np.log(value)) for token, value in enumerate(p)}
    assert divergence(full, other) == pytest.approx(whole, abs=1e-9)
