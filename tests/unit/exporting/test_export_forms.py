"""`minisft export` through the command line: the forms, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import gguf
import pytest

from minisft.exporting.proof import VERIFIED
from tests.command import refused, run


def statuses(folder):
    return {name: entry["status"] for name, entry in json.loads((folder / VERIFIED).read_text())["engine"].items()}


def test_a_gguf_file_is_written_and_verified(capsys, answering_run, tmp_path):
    done = run(capsys, "export", answering_run, tmp_path / "out", "--to", "gguf", "--engine", "transformers")
    assert done.status == 0, done.err
    assert "verified with transformers: 6 of 6 prompts, 6 of 6 answers equal" in done.out
    assert {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")} == {
        "model.gguf", "verified.json", "README.md", "loss.png"
    }  # fmt: skip
    assert statuses(tmp_path / "out") == {"transformers": "ok", "llama.cpp": "not run", "vllm": "not run"}
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    assert "[assistant]" in reader.fields["tokenizer.chat_template"].contents()


def test_merged_adapters_become_a_quantised_file_for_ollama(capsys, lora_run, tmp_path):
    words = ("--to", "ollama", "--dtype", "q8_0", "--engine", "transformers")
    done = run(capsys, "export", lora_run, tmp_path / "out", *words)
    assert done.status == 0, done.err
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert text.startswith("FROM ./model.gguf\n")
    assert 'PARAMETER stop "</s>"' in text
    assert "[INST]" in text
    assert statuses(tmp_path / "out")["transformers"] == "ok"


@pytest.mark.parametrize("form", ["gguf", "folder"])
def test_adapters_without_merging_leave_the_base_model_as_it_is(capsys, lora_run, tmp_path, form):
    base = lora_run.parent / "model"
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    done = run(capsys, "export", lora_run, tmp_path / "out", "--no-merge", "--to", form)
    assert done.status == 0, done.err
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    assert run(capsys, "export", lora_run, tmp_path / "again", "--no-verify").status == 0  # the base is the run's still
    if form == "folder":
        assert "verified with transformers: 6 of 6 prompts, 6 of 6 answers equal" in done.out
        assert "library_name: peft" in (tmp_path / "out" / "README.md").read_text()


def test_a_run_without_its_data_is_exported_unverified(capsys, answering_run, tmp_path):
    copied = shutil.copytree(answering_run, tmp_path / "run")
    shutil.rmtree(copied / "dataset")
    done = run(capsys, "export", copied, tmp_path / "out")
    assert done.status == 0, done.err
    assert "not verified with transformers: the run has no prepared data" in done.err
    assert set(statuses(tmp_path / "out").values()) == {"not run"}


def test_a_checkpoint_of_a_run_is_exported_without_verification(capsys, answering_run, tmp_path):
    words = ("--to", "gguf", "--no-verify", "--checkpoint", "checkpoint-60", "--dtype", "f16")
    done = run(capsys, "export", answering_run, tmp_path / "out", *words)
    assert done.status == 0, done.err
    assert set(statuses(tmp_path / "out").values()) == {"not run"}


def test_a_template_without_a_go_form_is_refused(capsys, answering_run, tmp_path):
    said = refused(capsys, "export", answering_run, tmp_path / "out", "--to", "ollama")
    assert "no Go form" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--dtype", "q8_0"), "a model folder has no quantised number format"),
        (("--to", "gguf", "--dtype", "f16", "--max-kl", "0.1"), "a quantised model"),
        (("--to", "gguf", "--dtype", "q8_0", "--max-kl", "-1"), "a positive limit"),
        (("--to", "ollama", "--no-merge"), "one merged model"),
        (("--engine", "llama.cpp"), "it reads GGUF files only"),
        (("--to", "gguf", "--engine", "vllm"), "complete model folders only"),
    ],
)
def test_options_that_contradict_each_other_are_refused(capsys, answering_run, tmp_path, words, said):
    assert said in refused(capsys, "export", answering_run, tmp_path / "out", *words)
    assert list(tmp_path.iterdir()) == []


def test_engines_that_are_not_installed_are_named(capsys, answering_run, tmp_path, monkeypatch):
    monkeypatch.setenv("MINISFT_ENGINES", str(tmp_path / "none"))
    monkeypatch.setenv("PATH", "")
    done = run(capsys, "export", answering_run, tmp_path / "out", "--to", "gguf")
    assert done.status == 0, done.err
    assert "not verified with llama.cpp: llama-server is not installed" in done.err
    said = refused(capsys, "export", answering_run, tmp_path / "more", "--to", "gguf", "--engine", "llama.cpp")
    assert "llama-server is not installed" in said
    said = refused(capsys, "export", answering_run, tmp_path / "more", "--to", "gguf", "--dtype", "q4_k_m")
    assert "llama-quantize" in said
    assert not (tmp_path / "more").exists()


def test_a_quantised_model_that_differs_too_much_is_refused(capsys, answering_run, tmp_path):
    words = ("--to", "gguf", "--dtype", "q8_0", "--engine", "transformers", "--max-kl", "1e-12")
    said = refused(capsys, "export", answering_run, tmp_path / "out", *words)
    assert "mean KL divergence" in said
    assert list(tmp_path.iterdir()) == []


def test_a_signal_ends_the_engine_with_its_own_processes(answering_run, tmp_path):
    program = tmp_path / "engines" / "llama.cpp" / "bin" / "llama-server"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\nsleep 300 &\necho $! > {tmp_path / 'started'}\nwait\n")
    program.chmod(0o755)
    process = subprocess.Popen(
        [sys.executable, "-m", "minisft", "export", answering_run, tmp_path / "out", "--to", "gguf", "--engine",
         "llama.cpp"],
        env={**os.environ, "MINISFT_ENGINES": str(tmp_path / "engines")},
    )  # fmt: skip
    until = time.monotonic() + 120
    while not (tmp_path / "started").exists() or not (tmp_path / "started").read_text().strip():
        assert time.monotonic() < until
        time.sleep(0.05)
    process.terminate()
    assert process.wait(60) == 1
    status = Path("/proc", (tmp_path / "started").read_text().strip(), "status")
    assert not status.exists() or "State:\tZ" in status.read_text()  # dead, if not yet reaped
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("out.new-*"))
