"""Every row of the larger data sets in every native template, with `verify` on.

The folder is the one that MINISFT_TEST_DATA names; without it these tests are skipped by name.
"""

import pytest

from minisft.data.preparation import prepare
from minisft.errors import UserError
from minisft.recipe import DataRecipe, Recipe
from tests.unit.data.mistral import fast_tokenizer

SETS = [
    "bench_mix.sharegpt.jsonl",
    "taskmaster4/tm4_all.sharegpt.jsonl",
    "oasst/en_all_paths.sharegpt.jsonl",
    "oasst/oaast_sft_zh.json",
    "glaive/glaive_toolcall_en_demo.json",
    "identity.json",
]


@pytest.mark.long
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("template", ["chatml", "mistral", "llama3", "zephyr", "mistral-v1", "mistral-v3"])
def test_every_row_is_verified_and_in_the_ledger(template, name, test_data, tmp_path, chat_bpe):
    tokenizer = fast_tokenizer(template[-2:]) if template.startswith("mistral-v") else chat_bpe
    data = DataRecipe(source=str(test_data / name), template=template, invalid="skip", max_length=1024)
    ledger = prepare(Recipe(model="toy", output=str(tmp_path), data=data), tokenizer).ledger
    rows, tokens = ledger["rows"], ledger["tokens"]
    assert rows["read"] == rows["train"] + rows["test"] + rows["skipped"]
    assert tokens["rendered"] == tokens["kept"] + tokens["cut"]
    assert rows["kept"] > 0
    allowed = {"unanswered_end", "same_role_twice", "nothing_left_to_learn", "starts_without_user", "empty_answer"}
    assert set(ledger["skipped"]) <= allowed


def test_prompts_without_answers_are_refused_as_training_data(test_data, tmp_path, chat_bpe):
    data = DataRecipe(source=str(test_data / "mt_bench_question.jsonl"), template="chatml")
    with pytest.raises(
        UserError, match="the format is unknown: its first row has the keys question_id, category, turns"
    ):
        prepare(Recipe(model="toy", output=str(tmp_path), data=data), chat_bpe)


@pytest.mark.parametrize(
    "name",
    [
        "blns.json", "conversation.json", "conversation.missingturns.json", "empty_data.json", "malformatted_data.json",
        "multi_turn_chat.jsonl", "multi_turn_chat_conversations.jsonl", "qwen35_tokenize_data.jsonl",
        "single_turn_chat.jsonl", "twitter_complaints_small.arrow", "twitter_complaints_small.json",
        "twitter_complaints_small.parquet",
    ],
)  # fmt: skip
def test_broken_files_give_rows_or_a_message(name, test_data, tmp_path, chat_bpe):
    data = DataRecipe(source=str(test_data / "broken" / name), template="chatml", invalid="skip")
    try:
        kept = prepare(Recipe(model="toy", output=str(tmp_path), data=data), chat_bpe).ledger["rows"]["kept"]
    except UserError as error:
        where, kept = error.where, 0
    assert kept > 0 or name in where
