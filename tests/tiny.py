"""A tiny model and tiny conversations, made on the spot."""

import json
import os
import random
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from packaging.version import Version

# Versions of transformers below this one read a GGUF file without merges, Gemma 2 and Doge otherwise.
SINCE_TRANSFORMERS_5_20 = Version(version("transformers")) >= Version("5.20")

WORDS = [
    "tea",
    "milk",
    "sugar",
    "cup",
    "pot",
    "small",
    "large",
    "hot",
    "cold",
    "please",
    "thanks",
    "yes",
    "no",
    "one",
    "two",
    "three",
    "with",
    "without",
    "more",
    "less",
]


def write_tiny_model(folder: Path, seed: int = 0, tokenizer=None) -> Path:
    """A Llama of a few thousand parameters, with a byte-level tokenizer unless another is given."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer or byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def byte_tokenizer():
    """A byte-level BPE without merges: every text has an encoding, and none is surprising."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def word_tokenizer(more=()):
    """A tokenizer whose tokens are `WORDS`, `more` and the characters of templates, each with or without a space."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*WORDS, *more, "[", "]", "/", "INST", "<unk>"]
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *words, *(f" {word}" for word in words)])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+| ?[^\w]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


def write_conversations(path: Path, count: int, seed: int = 0) -> Path:
    choose = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            turns = []
            for _ in range(choose.randint(1, 3)):
                turns.append({"from": "human", "value": f"{number}: " + _words(choose)})
                turns.append({"from": "gpt", "value": _words(choose)})
            file.write(json.dumps({"id": f"talk-{number}", "conversations": turns}) + "\n")
    return path


def write_recipe(folder: Path, model: Path, conversations: Path, training: str) -> Path:
    """A recipe whose run goes into `folder`; `training` is its section, as YAML in one line."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model: {model}\noutput: {folder / 'run'}\n"
        f"data: {{source: {conversations}, template: mistral, max_length: 256}}\n"
        f"training: {training}\nevaluation: {{max_new_tokens: 8}}\n"
    )
    return recipe


def _words(choose: random.Random) -> str:
    return " ".join(choose.choices(WORDS, k=choose.randint(1, 6)))


def heed_ctrl_c() -> None:
    """As `preexec_fn`: a test run in a shell's background hands its children an ignored SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def minisft(*words: object, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
    """Run the command line as a user would, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "minisft", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )
