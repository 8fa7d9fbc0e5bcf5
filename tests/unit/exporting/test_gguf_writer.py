"""GGUF files: read back by gguf's own reader and by transformers, and served by the real llama.cpp where it is."""

import json
import os
import shutil

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize

from minisft.errors import UserError
from minisft.exporting.gguf_vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from minisft.exporting.gguf_writer import write_adapter_gguf, write_gguf
from tests.tiny import byte_tokenizer
from tests.unit.data.toys import bpe_tokenizer, sentencepiece_tokenizer
from tests.unit.exporting.families import CASES, logits_of, write_adapter, write_family

READ_BY_TRANSFORMERS = ("llama", "mistral", "qwen2", "qwen3")  # its reader of the others differs from the models
IDS = [(7 * i) % 251 + 3 for i in range(37)]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WITH_BOS = "{{ bos_token }}{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return a function that gives the folder of a family's model; it is written once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = write_family(tmp_path_factory.mktemp(name) / "model", name)
        return made[name]

    return get


def written(folder, tmp_path, dtype="f32"):
    target = tmp_path / "model.gguf"
    write_gguf(folder, target, dtype)
    return GGUFReader(target)


def numbers(reader):
    """The tensors in fp32, with torch's order of dimensions."""
    return {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}


def value(reader, key):
    return reader.fields[key].contents()


def weights_of(folder):
    from safetensors.torch import load_file

    return {name: tensor.numpy() for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def changed_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- tensors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", READ_BY_TRANSFORMERS)
def test_transformers_reads_the_same_model_back(models, name, tmp_path):
    folder = models(name)
    write_gguf(folder, tmp_path / "model.gguf", "f32")
    ours, theirs = logits_of(folder, IDS), logits_of(tmp_path, IDS, gguf_file="model.gguf")
    assert ours.std() > 0.1
    assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3"])
def test_gemma_has_its_norms_plus_one_and_all_else_as_it_is(models, name, tmp_path):
    places = {
        "gemma": {"post_attention_layernorm": "ffn_norm"},
        "gemma2": {
            "post_attention_layernorm": "post_attention_norm",
            "pre_feedforward_layernorm": "ffn_norm",
            "post_feedforward_layernorm": "post_ffw_norm",
        },
    }
    places["gemma3"] = places["gemma2"] | {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
    parts = {f"self_attn.{p}_proj": f"attn_{n}" for p, n in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output"))}
    parts |= {f"mlp.{p}_proj": f"ffn_{p}" for p in ("gate", "up", "down")} | {"input_layernorm": "attn_norm"}
    expected = {}
    for key, tensor in weights_of(models(name)).items():
        key = key.removeprefix("model.").removesuffix(".weight")
        top = {"embed_tokens": "token_embd", "norm": "output_norm"}
        _, _, rest = key.partition(".")
        number, _, part = rest.partition(".")
        new = top.get(key) or f"blk.{number}.{(parts | places[name])[part]}"
        expected[f"{new}.weight"] = tensor + 1 if key.endswith("norm") else tensor
    found = numbers(written(models(name), tmp_path))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        np.testing.assert_array_equal(found[key], tensor, err_msg=key)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_a_format_rounds_the_matrices_and_keeps_the_vectors(models, dtype, tmp_path):
    folder = models("llama-untied")
    (tmp_path / "exact").mkdir()
    exact = numbers(written(folder, tmp_path / "exact"))
    reader = written(folder, tmp_path, dtype)
    rounded = numbers(reader)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert exact.keys() == rounded.keys()
    assert {kinds[name] for name, tensor in exact.items() if tensor.ndim == 1} == {"F32"}
    assert {kinds[name] for name, tensor in exact.items() if tensor.ndim == 2} == {dtype.upper()}
    for name, tensor in exact.items():
        error = np.abs(rounded[name] - tensor)
        if tensor.ndim == 1:
            assert error.max() == 0
        elif dtype == "q8_0":  # half a step of the block's scale, which is itself rounded to f16
            scale = np.abs(tensor.reshape(-1, 32)).max(1, keepdims=True) / 127
            assert (error.reshape(-1, 32) <= scale * (0.5 + 127 * 2**-11)).all()
        else:
            assert (error <= np.abs(tensor) * (2**-11 if dtype == "f16" else 2**-8) + 1e-7).all()
            assert error.max() > 0


def test_rows_that_are_no_whole_blocks_are_f16_in_q8_0(tmp_path):
    folder = write_family(tmp_path / "model", "llama", intermediate_size=72)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in written(folder, tmp_path, "q8_0").tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert kinds["blk.0.ffn_up.weight"] == kinds["token_embd.weight"] == "Q8_0"


def test_a_model_in_several_files_is_the_same(models, tmp_path):
    from transformers import AutoModelForCausalLM

    (tmp_path / "one").mkdir()
    one = numbers(written(models("llama-untied"), tmp_path / "one"))
    parts = shutil.copytree(models("llama-untied"), tmp_path / "parts")
    (parts / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(models("llama-untied")).save_pretrained(parts, max_shard_size="100KB")
    assert len(list(parts.glob("*.safetensors"))) > 1
    several = numbers(written(parts, tmp_path))
    assert all(np.array_equal(one[name], several[name]) for name in one)
    assert one.keys() == several.keys()


def test_the_factors_of_llama3_divide_the_frequencies(models, tmp_path):
    factors = numbers(written(models("llama-llama3"), tmp_path))["rope_freqs.weight"]
    # Llama 3.1's rule: short waves stay, long ones are stretched by the factor, and between them it is interpolated.
    frequencies = 10000.0 ** (-np.arange(0, 32, 2) / 32)
    waves = 2 * np.pi / frequencies
    smooth = np.clip((64 / waves - 1) / (4 - 1), 0, 1)
    np.testing.assert_allclose(factors, 1 / ((1 - smooth) / 8 + smooth), rtol=1e-4)
    assert factors[0] == 1
    assert factors[-1] == 8


# --- metadata ---------------------------------------------------------------------------------------------


def test_the_configuration_is_all_there(models, tmp_path):
    reader = written(models("llama"), tmp_path, "q8_0")
    expected = {
        "general.architecture": "llama",
        "general.file_type": 7,
        "llama.vocab_size": 261,
        "llama.context_length": 512,
        "llama.embedding_length": 64,
        "llama.block_count": 3,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 32,
        "llama.attention.value_length": 32,
        "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {key: value(reader, key) for key in expected} == expected
    assert "output.weight" not in numbers(reader)


def test_a_scaling_of_positions_is_written(models, tmp_path):
    linear = written(models("llama-linear"), tmp_path)
    assert value(linear, "llama.rope.scaling.type") == "linear"
    assert value(linear, "llama.rope.scaling.factor") == 2.0
    assert value(linear, "llama.rope.freq_base") == 50000.0
    yarn = written(models("llama-yarn"), tmp_path)
    assert value(yarn, "llama.rope.scaling.type") == "yarn"
    assert value(yarn, "llama.rope.scaling.original_context_length") == 64


def test_a_window_that_the_engine_lacks_bounds_the_context(tmp_path):
    reader = written(write_family(tmp_path / "model", "mistral", sliding_window=128), tmp_path)
    assert value(reader, "llama.context_length") == 128


def test_gemma_has_its_window_and_its_soft_caps(models, tmp_path):
    reader = written(models("gemma2"), tmp_path)
    assert value(reader, "gemma2.attention.sliding_window") == 16
    assert value(reader, "gemma2.attention.sliding_window_pattern") == [True, False, True]
    assert value(reader, "gemma2.attn_logit_softcapping") == 50.0
    assert value(reader, "gemma2.final_logit_softcapping") == 30.0
    reader = written(models("gemma3"), tmp_path)
    assert value(reader, "gemma3.attention.sliding_window_pattern") == [True] * 5 + [False, True]
    assert value(reader, "gemma3.rope.freq_base") == 1e6
    assert value(reader, "gemma3.rope.freq_base_swa") == 1e4


def test_tokens_have_their_text_and_kind(tmp_path):
    tokenizer = bpe_tokenizer(("<|im_start|>", "<|im_end|>"), "<|im_end|>", ordinary=("<think>",))
    reader = written(write_family(tmp_path / "model", "llama", tokenizer), tmp_path)
    tokens, types = value(reader, "tokenizer.ggml.tokens"), value(reader, "tokenizer.ggml.token_type")
    vocabulary = tokenizer.get_vocab()
    assert all(tokens[id] == text for text, id in vocabulary.items())
    kinds = {text: types[vocabulary[text]] for text in ("<|im_start|>", "<|im_end|>", "<think>", "a")}
    assert kinds == {"<|im_start|>": CONTROL, "<|im_end|>": CONTROL, "<think>": USER_DEFINED, "a": NORMAL}
    assert {id for id, kind in enumerate(types) if kind == UNUSED} == {*range(len(types))} - {*vocabulary.values()}
    assert len(set(tokens)) == len(tokens) == len(vocabulary) + 3
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert value(reader, "tokenizer.ggml.merges") == [" ".join(merge) for merge in merges]


def test_sentencepiece_has_scores_in_the_order_of_its_merges(tmp_path):
    tokenizer = sentencepiece_tokenizer()
    reader = written(write_family(tmp_path / "model", "llama", tokenizer), tmp_path)
    assert value(reader, "tokenizer.ggml.model") == "llama"
    assert value(reader, "tokenizer.ggml.add_space_prefix") is True
    scores, types = value(reader, "tokenizer.ggml.scores"), value(reader, "tokenizer.ggml.token_type")
    vocabulary = tokenizer.get_vocab()
    merges = [tuple(pair) for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
    made = [scores[vocabulary[left + right]] for left, right in merges]
    assert made == sorted(made, reverse=True)
    assert made[0] > made[-1]
    assert [types[vocabulary[name]] for name in ("<unk>", "<s>", "<0x0A>")] == [UNKNOWN, CONTROL, BYTE]


# --- the prompt and its end -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "adds_bos", "expected"), [(CHATML, True, False), (WITH_BOS, False, True), (None, True, True)]
)
def test_bos_is_added_where_the_trained_prompts_have_it(tmp_path, template, adds_bos, expected):
    tokenizer = bpe_tokenizer(("<s>", "<|im_start|>", "<|im_end|>"), "<|im_end|>", "<s>", adds_bos=adds_bos)
    tokenizer.chat_template = template
    reader = written(write_family(tmp_path / "model", "llama", tokenizer), tmp_path)
    assert value(reader, "tokenizer.ggml.add_bos_token") is expected
    if template:
        assert value(reader, "tokenizer.chat_template") == template


def test_a_bos_that_opens_every_turn_is_not_added(tmp_path):
    tokenizer = bpe_tokenizer(("<|im_start|>", "<|im_end|>"), "<|im_end|>", "<|im_start|>")  # as SmolLM2 has it
    tokenizer.chat_template = CHATML
    reader = written(write_family(tmp_path / "model", "llama", tokenizer), tmp_path)
    assert value(reader, "tokenizer.ggml.add_bos_token") is False


def test_all_trained_stop_tokens_end_a_generation(tmp_path):
    tokenizer = bpe_tokenizer(("<s>", "<end>", "<stop>", "<over>", "<|im_end|>"), "<end>", "<s>")
    folder = write_family(tmp_path / "model", "llama", tokenizer)
    ids = [tokenizer.get_vocab()[name] for name in ("<end>", "<|im_end|>", "<stop>", "<over>")]
    changed_json(folder / "generation_config.json", eos_token_id=ids)
    reader = written(folder, tmp_path)
    keys = [value(reader, f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    assert keys == [ids[0], ids[2], ids[3]]  # llama.cpp knows <|im_end|> by its text
    changed_json(folder / "generation_config.json", eos_token_id=[*ids, tokenizer.get_vocab()["a"]])
    with pytest.raises(UserError, match="room for three"):
        write_gguf(folder, tmp_path / "model.gguf", "f32")


# --- refusals ---------------------------------------------------------------------------------------------


def pre_tokenizer(tokenizer, change):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    change(state)
    core = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)


def another_regex(state):
    split = {"type": "Split", "pattern": {"Regex": r"\d+|\D+"}, "behavior": "Isolated", "invert": False}
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, bytes_only]}


def lower_case(state):
    state["normalizer"] = {"type": "Lowercase"}


def with_a_space(state):
    state["pre_tokenizer"]["add_prefix_space"] = True


def no_pre_tokenizer(state):
    state["pre_tokenizer"] = None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (another_regex, r"none that is known.*\\\\d\+"),
        (lower_case, "Lowercase"),
        (with_a_space, "add_prefix_space"),
        (no_pre_tokenizer, "neither byte-level nor one of SentencePiece"),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(tmp_path, change, said):
    folder = write_family(tmp_path / "model", "llama", pre_tokenizer(byte_tokenizer(), change))
    with pytest.raises(UserError, match=said):
        write_gguf(folder, tmp_path / "model.gguf", "f32")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def swap_merges(state):
    merges = state["model"]["merges"]
    made = ["".join(pair) for pair in merges]
    several = next(place for place in range(1, len(made)) if made.count(made[place]) > 1 and len({*made[place]}) > 1)
    merges.append(merges.pop(several))


def drop_merge(state):
    state["model"]["merges"].pop(3)


@pytest.mark.parametrize(("change", "said"), [(swap_merges, "alternate"), (drop_merge, "SentencePiece would")])
def test_merges_that_no_scores_give_are_refused(tmp_path, change, said):
    folder = write_family(tmp_path / "model", "llama", pre_tokenizer(sentencepiece_tokenizer(), change))
    with pytest.raises(UserError, match=said):
        write_gguf(folder, tmp_path / "model.gguf", "f32")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "opt"}, "opt"),
        ({"hidden_act": "relu"}, "relu"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
        ({"num_hidden_layers": 4}, "lack model.layers.3"),
        ({"intermediate_size": 100}, "shape"),
        ({"vocab_size": 200}, "no row"),
    ],
)
def test_a_model_that_is_not_what_the_engine_computes_is_refused(models, tmp_path, changes, said):
    folder = shutil.copytree(models("llama"), tmp_path / "model")
    changed_json(folder / "config.json", **changes)
    with pytest.raises(UserError, match=said):
        write_gguf(folder, tmp_path / "model.gguf", "f32")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_number_too_large_for_f16_is_refused(models, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(models("llama"), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    write_gguf(folder, tmp_path / "model.gguf", "bf16")
    before = (tmp_path / "model.gguf").read_bytes()
    with pytest.raises(UserError, match="f16 cannot hold"):
        write_gguf(folder, tmp_path / "model.gguf", "f16")
    assert (tmp_path / "model.gguf").read_bytes() == before  # the earlier file stays
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.gguf"]


def test_a_full_disk_leaves_nothing(models, tmp_path, monkeypatch):
    def refuse(handle):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space"):
        write_gguf(models("llama"), tmp_path / "model.gguf", "f32")
    assert list(tmp_path.iterdir()) == []


# --- planted faults ---------------------------------------------------------------------------------------


def another_bos(folder):
    changed_json(folder / "tokenizer_config.json", bos_token="</s>")


def another_template(folder):
    (folder / "chat_template.jinja").write_text(WITH_BOS.replace("eos_token", "'!'"))


def another_stop(folder):
    changed_json(folder / "generation_config.json", eos_token_id=5)


def another_theta(folder):
    changed_json(folder / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 12345.0})


def transposed(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    weights[name] = weights[name].T.reshape(weights[name].shape).contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("plant", [another_bos, another_template, another_stop, another_theta, transposed])
def test_a_planted_fault_is_in_the_file(models, tmp_path, plant):
    folder = shutil.copytree(models("llama"), tmp_path / "model")
    (folder / "chat_template.jinja").write_text(WITH_BOS)
    write_gguf(folder, tmp_path / "right.gguf", "f32")
    write_gguf(folder, tmp_path / "again.gguf", "f32")
    plant(folder)
    write_gguf(folder, tmp_path / "wrong.gguf", "f32")
    right, again, wrong = ((tmp_path / f"{name}.gguf").read_bytes() for name in ("right", "again", "wrong"))
    assert right == again != wrong


# --- adapters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"k_proj": 3}},
        {"target_modules": ["q_proj", "v_proj"]},
    ],
    ids=["plain", "rslora", "patterns", "two modules"],
)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_a_base_file_and_its_adapter_are_the_merged_model(models, tmp_path, family, options):
    base = models(family)
    adapter, merged = write_adapter(tmp_path, base, **options)
    write_adapter_gguf(adapter, base, tmp_path / "adapter.gguf")
    reader = GGUFReader(tmp_path / "adapter.gguf")
    assert value(reader, "general.type") == "adapter"
    assert value(reader, "adapter.type") == "lora"
    matrices, alpha = numbers(reader), value(reader, "adapter.lora.alpha")
    whole = numbers(written(base, tmp_path))
    expected = numbers(written(merged, tmp_path))
    for name in [name.removesuffix(".lora_a") for name in matrices if name.endswith(".lora_a")]:
        a, b = matrices[f"{name}.lora_a"], matrices[f"{name}.lora_b"]
        whole[name] = whole[name] + alpha / a.shape[0] * b @ a
    for name, tensor in expected.items():
        np.testing.assert_allclose(whole[name], tensor, atol=2e-5, err_msg=name)


def test_adapters_that_are_no_plain_lora_are_refused(models, tmp_path):
    dora, _ = write_adapter(tmp_path, models("llama"), use_dora=True)
    with pytest.raises(UserError, match="DoRA"):
        write_adapter_gguf(dora, models("llama"), tmp_path / "adapter.gguf")
    assert not list(tmp_path.glob("*.gguf"))


# --- every family, by name --------------------------------------------------------------------------------


def test_every_case_is_a_family_of_the_writer():
    from minisft.exporting.gguf_writer import ARCHITECTURES

    assert {model_type for model_type, _ in CASES.values()} == {*ARCHITECTURES}
