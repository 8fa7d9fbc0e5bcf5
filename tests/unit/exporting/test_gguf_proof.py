"""The proof of a GGUF file by the real llama.cpp: what holds passes, and each planted fault is found and named.

Skipped where MINISFT_ENGINES names no folder with llama.cpp; `make engines` fills one.
"""

import json
import shutil

import gguf
import numpy as np
import pytest

from minisft.api import load
from minisft.exporting.engines import find_llama_cpp
from minisft.exporting.export import ADAPTER_GGUF, GGUF, ExportOptions, export
from minisft.exporting.proof import VERIFIED, ExportedModel, prove
from minisft.run_folder import RunFolder, load_run
from tests.served import Served, say
from tests.unit.exporting.test_verification import names_a_token

pytestmark = pytest.mark.skipif(find_llama_cpp() is None, reason="llama.cpp is not installed: make engines")


@pytest.fixture(scope="module")
def intact(answering_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf") / "out"
    export(load_run(answering_run), folder, ExportOptions(to="gguf", engine="none"))
    return folder


@pytest.fixture
def folder(intact, tmp_path):
    """Return a copy of an export, for a test to damage."""
    return shutil.copytree(intact, tmp_path / "out")


def problem(run, folder):
    model = ExportedModel(folder, RunFolder(run).model, None, "f32", gguf=GGUF)
    return prove(model, load_run(run), "llama.cpp", None, None).problem


def set_number(folder, key, value):
    reader = gguf.GGUFReader(folder / GGUF, "r+")
    field = reader.fields[key]
    field.parts[field.data[0]][:] = value
    del reader


def set_text(folder, key, old, new):
    """Change a text of a GGUF file to another one of the same length."""
    assert len(old) == len(new)
    reader = gguf.GGUFReader(folder / GGUF, "r+")
    part = reader.fields[key].parts[reader.fields[key].data[0]]
    text = bytes(part)
    assert old.encode() in text
    part[:] = np.frombuffer(text.replace(old.encode(), new.encode()), np.uint8)
    del reader


def entry_of(folder, engine="llama.cpp"):
    return json.loads((folder / VERIFIED).read_text())["engine"][engine]


@pytest.mark.parametrize(("dtype", "bound"), [("f32", 1e-3), ("bf16", 5e-2), ("q8_0", None)])
def test_an_intact_file_is_verified(answering_run, tmp_path, dtype, bound):
    export(load_run(answering_run), tmp_path / "out", ExportOptions(to="gguf", dtype=dtype))
    for engine in ("llama.cpp", "transformers"):
        entry = entry_of(tmp_path / "out", engine)
        assert (entry["status"], entry["prompt_ids_equal"], entry["prompts"]) == ("ok", 6, 6), entry
        assert entry["answers_equal"] >= (6 if bound else 4)
        assert bound is None or entry["max_logprob_difference"] <= bound


def test_another_bos_is_found(answering_run, folder):
    set_number(folder, "tokenizer.ggml.bos_token_id", 1)
    assert "the engine's prompt differs from the trained one, first at token 0" in problem(answering_run, folder)


def test_another_template_is_found(answering_run, folder):
    set_text(folder, "tokenizer.chat_template", "'['", "'{'")
    assert "in place of" in problem(answering_run, folder)


def test_another_terminator_is_found(answering_run, folder):
    # llama.cpp takes </s> for a terminator by its name, whatever the file says: a terminator too many shows.
    letter = json.loads((RunFolder(answering_run).model / "tokenizer.json").read_text())["model"]["vocab"]["y"]
    set_number(folder, "tokenizer.ggml.eos_token_id", letter)
    assert "the end of the answer in place of" in problem(answering_run, folder)


def test_a_terminator_too_many_is_found_in_a_quantised_file(answering_run, tmp_path):
    export(load_run(answering_run), tmp_path / "out", ExportOptions(to="gguf", dtype="q8_0", engine="none"))
    letter = json.loads((RunFolder(answering_run).model / "tokenizer.json").read_text())["model"]["vocab"]["a"]
    set_number(tmp_path / "out", "tokenizer.ggml.eos_token_id", letter)
    model = ExportedModel(tmp_path / "out", RunFolder(answering_run).model, None, "q8_0", gguf=GGUF)
    found = prove(model, load_run(answering_run), "llama.cpp", None, None).problem
    assert "the end of the answer in place of" in found


def test_a_transposed_tensor_is_found(answering_run, folder):
    reader = gguf.GGUFReader(folder / GGUF, "r+")
    tensor = next(tensor for tensor in reader.tensors if tensor.name == "blk.0.attn_output.weight")
    tensor.data[:] = tensor.data.T.copy()
    del reader
    found = problem(answering_run, folder)
    assert names_a_token(found)


def test_a_base_file_with_its_adapter_is_verified(lora_run, tmp_path):
    export(load_run(lora_run), tmp_path / "out", ExportOptions(to="gguf", merge=False))
    assert (tmp_path / "out" / ADAPTER_GGUF).is_file()
    entry = entry_of(tmp_path / "out")
    assert (entry["status"], entry["prompt_ids_equal"], entry["answers_equal"]) == ("ok", 6, 6)


def test_an_adapter_of_another_scale_is_found(lora_run, tmp_path):
    export(load_run(lora_run), tmp_path / "out", ExportOptions(to="gguf", merge=False, engine="none"))
    model = ExportedModel(
        tmp_path / "out",
        RunFolder(lora_run).model,
        lora_run.parent / "model",
        "f32",
        merged=False,
        gguf=GGUF,
        adapter_gguf=ADAPTER_GGUF,
    )
    reader = gguf.GGUFReader(tmp_path / "out" / ADAPTER_GGUF, "r+")
    alpha = reader.fields["adapter.lora.alpha"]
    alpha.parts[alpha.data[0]][:] *= 2
    del reader
    found = prove(model, load_run(lora_run), "llama.cpp", None, None).problem
    assert names_a_token(found)


def test_the_real_llama_cpp_answers_behind_the_page(answering_run):
    server = Served(answering_run, "--backend", "llama.cpp").ready()
    try:
        status, reply = server.ask("/v1/chat/completions", say("0?", max_tokens=8))
        assert (status, reply["model"]) == (200, "final")
        assert reply["choices"][0]["message"]["content"] == load(answering_run).chat("0?", max_new_tokens=8)
        assert server.ask("/v1/chat/completions", say("0?"), Origin="http://evil.example")[0] == 403
        assert b"<html" in server.ask("/")[1]
    finally:
        status, seconds = server.stop()
    assert status == 0
    assert seconds < 5
