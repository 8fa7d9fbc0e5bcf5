"""A run whose model has learned to answer and to stop, and another one with LoRA."""

import json

import pytest

from minisft.cli import main
from tests.tiny import WORDS, write_recipe, write_tiny_model

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '[' + message['role'] + ']' }}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


@pytest.fixture(scope="session")
def merging_tokenizer():
    """Return a byte-level BPE tokenizer with merges, without which llama.cpp loads none."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def short_answers(tmp_path_factory):
    """Return a ShareGPT file of 60 dialogues with short answers."""
    path = tmp_path_factory.mktemp("short") / "talks.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(60):
            turns = [{"from": "human", "value": f"{number}?"}, {"from": "gpt", "value": ["aye", "nay"][number % 2]}]
            file.write(json.dumps({"id": f"talk-{number}", "conversations": turns}) + "\n")
    return path


def train(folder, tokenizer, data, training, *overrides):
    """Train a tiny model in `folder`, and return the folder of the run."""
    recipe = write_recipe(folder, write_tiny_model(folder / "model", tokenizer=tokenizer), data, training)
    assert main(["train", str(recipe), *overrides]) == 0
    return folder / "run"


@pytest.fixture(scope="session")
def answering_run(tmp_path_factory, short_answers, merging_tokenizer):
    """Return the folder of a run whose answers end by the terminator."""
    folder = tmp_path_factory.mktemp("answering")
    template = folder / "template.jinja"
    template.write_text(TEMPLATE, encoding="utf-8")
    training = "{max_steps: 60, save_every: 60, learning_rate: 1.0e-2, precision: fp32}"
    return train(folder, merging_tokenizer, short_answers, training, f"data.template={template}")


@pytest.fixture(scope="session")
def lora_run(tmp_path_factory, short_answers, merging_tokenizer):
    """Return the folder of a run that trained adapters."""
    training = "{max_steps: 30, save_every: 30, learning_rate: 2.0e-2, precision: fp32, lora: {rank: 4}}"
    return train(tmp_path_factory.mktemp("lora"), merging_tokenizer, short_answers, training)
