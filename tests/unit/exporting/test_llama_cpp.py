"""llama.cpp's own tools, and its server on our files.

The real ones are those of $MINISFT_ENGINES/llama.cpp/bin; without it their tests are skipped.
"""

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import time
import unicodedata
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from gguf import GGUFReader

from minisft.data.conversation import Message
from minisft.data.encoder import Encoder
from minisft.errors import UserError
from minisft.exporting.gguf_writer import write_adapter_gguf, write_gguf
from minisft.exporting.llama_cpp import find_program, write_any_gguf
from minisft.models import load_tokenizer
from tests.unit.data import mistral
from tests.unit.data.toys import bpe_tokenizer, sentencepiece_tokenizer
from tests.unit.exporting.families import CASES, logits_of, write_adapter, write_family

ENGINES = os.environ.get("MINISFT_ENGINES")
SERVER = Path(ENGINES) / "llama.cpp" / "bin" / "llama-server" if ENGINES else None
DATA = os.environ.get("MINISFT_TEST_DATA")
needs_server = pytest.mark.skipif(
    SERVER is None or not SERVER.is_file(), reason="MINISFT_ENGINES names no folder with llama.cpp/bin/llama-server"
)
IDS = [(7 * i) % 251 + 3 for i in range(37)]
# llama.cpp computes Gemma's activation from a table in f16.
BOUNDS = {"gemma": 5e-3, "gemma2": 5e-3, "gemma3": 5e-3}
TEXTS = (
    *("a", "the", " ", "  ", "\n", "\n\n", "\t", "1", "23", "4567", "é", "日本", "🙂", "'s", "'LL", "don't", ".", "!?"),
    *("--", "_", "\u00a0", "\r\n", "e\u0301", "नमस्ते", "x" * 20, " Hello", " world", "{", "<", "[INST]", "a  b   c"),
)


@pytest.fixture(autouse=True)
def no_tools_on_the_path(monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")


# --- finding and running the tools ------------------------------------------------------------------------


def tool(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def no_engines(tmp_path, monkeypatch):
    monkeypatch.setenv("MINISFT_ENGINES", str(tmp_path / "none"))


def test_q4_k_m_without_llama_quantize_is_refused(tmp_path, no_engines):
    folder = write_family(tmp_path / "model", "llama")
    with pytest.raises(UserError, match="llama-quantize") as error:
        write_any_gguf(folder, tmp_path / "model.gguf", "q4_k_m")
    assert "--llama-cpp FOLDER" in error.value.fix
    with pytest.raises(UserError, match="no such number format"):
        write_any_gguf(folder, tmp_path / "model.gguf", "q5_1")


@pytest.mark.parametrize("place", [".", "bin", "build/bin"])
def test_q4_k_m_is_made_from_our_file(tmp_path, place):
    folder = write_family(tmp_path / "model", "llama")
    tool(tmp_path / "llama" / place / "llama-quantize", '#!/bin/sh\ncp "$1" "$2"\nprintf %s "$3" >> "$2"\n')
    (tmp_path / "out").mkdir()
    assert write_any_gguf(folder, tmp_path / "out" / "m.gguf", "q4_k_m", tmp_path / "llama").endswith("llama-quantize")
    write_gguf(folder, tmp_path / "exact.gguf", "f32")
    assert (tmp_path / "out" / "m.gguf").read_bytes() == (tmp_path / "exact.gguf").read_bytes() + b"Q4_K_M"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["m.gguf"]


def test_a_quantiser_that_fails_leaves_nothing(tmp_path):
    folder = write_family(tmp_path / "model", "llama")
    tool(tmp_path / "llama" / "llama-quantize", '#!/bin/sh\necho half > "$2"\necho it is broken >&2\nexit 3\n')
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"status 3 \(it is broken\)"):
        write_any_gguf(folder, tmp_path / "out" / "m.gguf", "q4_k_m", tmp_path / "llama")
    assert list((tmp_path / "out").iterdir()) == []


def test_another_family_goes_to_the_converter(tmp_path, no_engines):
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(vocab_size=99, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2)
    OPTForCausalLM(config).save_pretrained(tmp_path / "model")
    target = tmp_path / "model.gguf"
    with pytest.raises(UserError, match="not opt") as error:
        write_any_gguf(tmp_path / "model", target, "f16")
    assert "--llama-cpp FOLDER" in error.value.fix
    script = (
        "import os, sys\nopen(sys.argv[3], 'w').write(' '.join([sys.argv[1], sys.argv[5], os.environ['PYTHONPATH']]))"
    )
    tool(tmp_path / "llama" / "convert_hf_to_gguf.py", script)
    assert write_any_gguf(tmp_path / "model", target, "f16", tmp_path / "llama") == "convert_hf_to_gguf.py"
    said = target.read_text()
    assert said.startswith(f"{tmp_path / 'model'} f16 {tmp_path / 'llama' / 'gguf-py'}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "model", "model.gguf"]


def test_a_quantiser_on_the_path_is_found(tmp_path, monkeypatch, no_engines):
    assert find_program("llama-quantize", "llama.cpp", None) is None
    path = tool(tmp_path / "llama-quantize", "#!/bin/sh\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (
        find_program("llama-quantize", "llama.cpp", None)
        == find_program("llama-quantize", "llama.cpp", tmp_path / "other")
        == path
    )


# --- the real llama.cpp -----------------------------------------------------------------------------------


@contextlib.contextmanager
def serve(model, *words):
    """Yield a function that posts JSON to llama-server, which has the model, with keys and values in fp32."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = f"http://127.0.0.1:{port}"
    command = [str(SERVER), "-m", str(model), "--port", str(port), "-c", "512", "-t", "1", "--jinja", "--no-webui"]
    command += ["-ctk", "f32", "-ctv", "f32", "-fa", "off", *map(str, words)]
    with Path(f"{model}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"{base}/health", timeout=5)
                break
            assert process.poll() is None, Path(f"{model}.log").read_text()[-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.05)

        def post(path, **body):
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{base}{path}", json.dumps(body).encode(), headers)
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)

        yield post
    finally:
        process.kill()
        process.wait()


def largest_difference(post, folder):
    """Return by how much the log-probabilities of the next token differ from transformers', at most."""
    import torch

    letters = {id for text, id in load_tokenizer(folder).get_vocab().items() if len(text) == 1 and text.isascii()}
    ids = list(IDS)
    while int((row := torch.log_softmax(logits_of(folder, ids)[-1], -1)).argmax()) not in letters:
        ids.pop()  # the server shows no probabilities of a token that ends the text or is a part of a letter
    found = post("/completion", prompt=ids, n_predict=1, temperature=0, n_probs=len(row), cache_prompt=False)
    listed = found["completion_probabilities"][0]["top_logprobs"]
    assert len(listed) > 200
    return max(abs(entry["logprob"] - float(row[entry["id"]])) for entry in listed)


@needs_server
@pytest.mark.parametrize("name", CASES)
def test_the_engine_computes_the_same_model(tmp_path, name):
    folder = write_family(tmp_path / "model", name)
    write_gguf(folder, tmp_path / "model.gguf", "f32")
    with serve(tmp_path / "model.gguf") as post:
        assert largest_difference(post, folder) < BOUNDS.get(name, 1e-4)


@needs_server
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_the_engine_adds_an_adapter(tmp_path, name):
    folder = write_family(tmp_path / "model", name)
    adapter, merged = write_adapter(tmp_path, folder, use_rslora=True)
    write_gguf(folder, tmp_path / "model.gguf", "f32")
    write_adapter_gguf(adapter, folder, tmp_path / "adapter.gguf")
    with serve(tmp_path / "model.gguf", "--lora", tmp_path / "adapter.gguf") as post:
        assert largest_difference(post, merged) < BOUNDS.get(name, 2e-4)


def tokenizers():
    chatml = ("<s>", "<|im_start|>", "<|im_end|>")
    return {
        "byte-level": (bpe_tokenizer(chatml, "<|im_end|>", "<s>"), "chatml"),
        "SentencePiece": (sentencepiece_tokenizer(), "mistral"),
        "Mistral v1": (mistral.fast_tokenizer("v1"), "mistral-v1"),
        "Mistral v3": (mistral.fast_tokenizer("v3"), "mistral-v3"),
        "tekken": (mistral.fast_tokenizer("tekken-v3"), "mistral-v3"),
    }


@needs_server
@pytest.mark.parametrize("name", ["byte-level", "SentencePiece", "Mistral v1", "Mistral v3", "tekken", "stories260K"])
def test_the_engine_has_the_same_ids(tmp_path, name):
    if name == "stories260K":
        if not DATA or not (Path(DATA) / "models" / "stories260K-hf").is_dir():
            pytest.skip("MINISFT_TEST_DATA names no folder with models/stories260K-hf")
        folder = shutil.copytree(Path(DATA) / "models" / "stories260K-hf", tmp_path / "model")
        tokenizer, template = load_tokenizer(folder), "mistral"
        tokenizer.chat_template = Encoder(tokenizer, template).chat_template
        folder.chmod(0o755)
        (folder / "chat_template.jinja").write_text(str(tokenizer.chat_template))
    else:
        tokenizer, template = tokenizers()[name]
        tokenizer.chat_template = Encoder(tokenizer, template).chat_template
        folder = write_family(tmp_path / "model", "llama", tokenizer)
    encoder = Encoder(load_tokenizer(folder), template)
    write_gguf(folder, tmp_path / "model.gguf", "q8_0")
    choose = random.Random(0)
    # llama.cpp's own form of tekken's regular expression has no combining marks.
    texts = [text for text in TEXTS if name != "tekken" or all(unicodedata.category(c)[0] != "M" for c in text)]
    with serve(tmp_path / "model.gguf") as post:
        for _ in range(100):
            text = "".join(choose.choices(texts, k=choose.randint(1, 12)))
            theirs = post("/tokenize", content=text, add_special=False, parse_special=True)["tokens"]
            assert theirs == encoder.tokenizer.encode(text, add_special_tokens=False), repr(text)
        for turns in ([("user", "one")], [("system", "a b"), ("user", "c"), ("assistant", "d e"), ("user", "f 12")]):
            messages = [{"role": role, "content": text} for role, text in turns]
            prompt = post("/apply-template", messages=messages)["prompt"]
            theirs = post("/tokenize", content=prompt, add_special=True, parse_special=True)["tokens"]
            assert theirs == encoder.encode_prompt([Message(role, text) for role, text in turns])


@needs_server
def test_the_engine_stops_at_each_trained_stop_token(tmp_path):
    """A model that always says one token, a stop token under another key each time."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = bpe_tokenizer(("<s>", "<end>", "<stop>", "<over>"), "<end>", "<s>")
    stops = [tokenizer.get_vocab()[name] for name in ("<end>", "<stop>", "<over>")]
    for said in (*stops, tokenizer.get_vocab()["a"]):
        folder = write_family(tmp_path / str(said), "llama", tokenizer, tie_word_embeddings=False)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            model.model.norm.weight.fill_(0.0)
            model.model.norm.weight[0] = 1.0
            model.model.embed_tokens.weight[:, 0] = 30.0
            model.lm_head.weight.fill_(0.0)
            model.lm_head.weight[said, 0] = 30.0
        model.generation_config.eos_token_id = stops
        model.save_pretrained(folder)
        write_gguf(folder, tmp_path / f"{said}.gguf", "f32")
        with serve(tmp_path / f"{said}.gguf") as post:
            found = post("/completion", prompt=IDS[:5], n_predict=4, temperature=0, return_tokens=True)
        assert (found["stop_type"] == "eos") is (said in stops), found


@needs_server
def test_the_real_quantiser_takes_our_file(tmp_path):
    assert SERVER is not None
    folder = write_family(tmp_path / "model", "llama", hidden_size=256, intermediate_size=256)
    write_any_gguf(folder, tmp_path / "model.gguf", "q4_k_m", SERVER.parent)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == "Q4_K"
    with serve(tmp_path / "model.gguf") as post:
        assert post("/completion", prompt=IDS, n_predict=1)["tokens_evaluated"] == len(IDS)
