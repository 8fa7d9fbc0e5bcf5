"""Each kind of bad input and the message that it gets."""

import gzip
import json
import os
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minisft.errors import UserError
from tests.unit.data.helpers import many, prepare_source, talk, write_rows

GOOD = many(4)
PAIR = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]

BAD_ROWS = {
    "empty_conversation": ({"conversations": []}, "no turns"),
    "missing_keys": ({"id": 1}, "no key 'conversations'"),
    "null_content": ({"conversations": [{"from": "human", "value": None}]}, "turn 1 has the content null"),
    "content_not_text": ({"conversations": [{"from": "human", "value": 5}]}, "a content that is a number"),
    "unknown_role": ({"conversations": [{"from": "wizard", "value": "Hi"}]}, "unknown role 'wizard'"),
    "starts_without_user": ({"conversations": PAIR[1:] + PAIR}, "starts with the assistant's turn"),
    "same_role_twice": ({"conversations": PAIR[:1] + PAIR}, "turn 2 is the user's again"),
    "unanswered_end": ({"conversations": PAIR + PAIR[:1]}, "ends with the user's turn"),
    "empty_answer": (talk("Hi", " \n"), "turn 2 is an empty answer"),
    "system_not_first": ({"conversations": [*PAIR, {"from": "system", "value": "x"}, *PAIR]}, "is a system prompt"),
    "nul_character": (talk("Hi", "a\0b"), "NUL"),
    "lone_surrogate": (talk("Hi", "a\ud800b"), "lone surrogate"),
    "not_an_object": ([PAIR], "the row is a list"),
    "nothing_supervised": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes", "weight": 0}]},
        "none of its answers is trained on",
    ),
    "bad_tools": ({"conversations": PAIR, "tools": "[not json"}, "'tools' is a text that is not JSON"),
    "bad_tool_call": (
        {"conversations": [PAIR[0], {"from": "gpt", "value": "", "tool_calls": [{"no": 1}]}]},
        "a call without a function's name",
    ),
}  # fmt: skip
BAD_LINES = {
    "not_json": (b'{"conversations": [', "not JSON"),
    "wrong_encoding": ('{"conversations": "né"}'.encode("latin-1"), "not UTF-8"),
    "duplicate_key": (b'{"conversations": [], "conversations": [1]}', "'conversations' is given twice"),
    "nested_too_deeply": (b'{"conversations": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
}


@pytest.mark.parametrize("reason", [*BAD_ROWS, *BAD_LINES])
def test_a_bad_row_is_named_with_its_line_and_its_fix(reason, tmp_path, chat_bpe):
    line, words = (json.dumps(BAD_ROWS[reason][0]).encode(), BAD_ROWS[reason][1]) if reason in BAD_ROWS else BAD_LINES[reason]  # fmt: skip
    path = tmp_path / "talks.jsonl"
    path.write_bytes(
        b"\n".join([json.dumps(row).encode() for row in GOOD[:2]] + [line] + [json.dumps(GOOD[2]).encode()])
    )
    with pytest.raises(UserError) as caught:
        prepare_source(path, tmp_path / "run", chat_bpe)
    message = str(caught.value)
    shown = next(text for text in message.splitlines() if "talks.jsonl:3: " in text)
    assert words in shown
    assert "Fix:" in message
    assert "skip (loses 1 rows)" in message
    assert not (tmp_path / "run" / "dataset").exists()


@pytest.mark.parametrize("reason", [*BAD_ROWS, *BAD_LINES])
def test_skip_counts_the_row_under_its_reason(reason, tmp_path, chat_bpe):
    line = json.dumps(BAD_ROWS[reason][0]).encode() if reason in BAD_ROWS else BAD_LINES[reason][0]
    path = tmp_path / "talks.jsonl"
    path.write_bytes(b"\n".join([*(json.dumps(row).encode() for row in GOOD), line]))
    ledger = prepare_source(path, tmp_path / "run", chat_bpe, invalid="skip").ledger
    counted = "not_json" if reason == "nested_too_deeply" else reason
    assert ledger["skipped"] == {counted: 1}
    assert ledger["rows"]["read"] == 5
    assert ledger["rows"]["kept"] == 4


def test_repair_saves_the_number_of_rows_in_the_message(tmp_path, chat_bpe):
    bad = [BAD_ROWS[name][0] for name in BAD_ROWS]
    path = write_rows(tmp_path / "talks.jsonl", [*GOOD, *bad])
    with pytest.raises(UserError) as caught:
        prepare_source(path, tmp_path / "run", chat_bpe)
    ledger = prepare_source(path, tmp_path / "run", chat_bpe, invalid="repair").ledger
    saved = ledger["rows"]["kept"] - len(GOOD)
    assert saved == 5
    assert f"repair (saves {saved} of them)" in str(caught.value)
    assert ledger["repaired"] == {
        "characters_replaced": 2, "leading_answers_trimmed": 1, "same_role_joined": 1, "unanswered_end_trimmed": 1,
    }  # fmt: skip


def test_twenty_problems_are_shown_and_all_counted(tmp_path, chat_bpe):
    path = write_rows(tmp_path / "talks.jsonl", [*GOOD, *[{"conversations": []}] * 50])
    with pytest.raises(UserError) as caught:
        prepare_source(path, tmp_path / "run", chat_bpe)
    message = str(caught.value)
    assert "50 of 54 rows cannot be used (empty_conversation 50)" in message
    assert message.count("the conversation has no turns") == 20
    assert "and 30 more" in message


def bad_files(folder):
    """(name, part of the message) of each file that is no data at all."""
    rows = "".join(json.dumps(row) + "\n" for row in GOOD).encode()
    (folder / "empty.jsonl").write_bytes(b"")
    (folder / "empty.json").write_bytes(b"")
    (folder / "no_rows.json").write_bytes(b"[]")
    (folder / "prose.json").write_bytes(b"This data is bad!")
    (folder / "prose.jsonl").write_bytes(b"This data is bad!\nSo is this.\n")
    (folder / "number.json").write_bytes(b"12")
    (folder / "cut.json").write_bytes(json.dumps(GOOD).encode()[:-20])
    (folder / "comma.json").write_bytes(b'[{"conversations": []}\n {"conversations": []}]')
    (folder / "trailing.json").write_bytes(json.dumps(GOOD).encode() + b" x")
    (folder / "utf16.jsonl").write_bytes(rows.decode().encode("utf-16"))
    (folder / "latin.json").write_bytes('[{"conversations": "né"}]'.encode("latin-1"))
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(rows * 50)[:-30])
    (folder / "false.jsonl.gz").write_bytes(rows)
    (folder / "false.jsonl.zst").write_bytes(rows)
    pq.write_table(pa.Table.from_pylist(GOOD), folder / "whole.parquet")
    (folder / "cut.parquet").write_bytes((folder / "whole.parquet").read_bytes()[:-40])
    (folder / "false.arrow").write_bytes(rows)
    (folder / "unknown.jsonl").write_bytes(b'{"text": "a", "label": 1}\n')
    (folder / "letters.txt").write_bytes(rows)
    (folder / "loop.jsonl").symlink_to(folder / "loop.jsonl")
    (folder / "nothing").mkdir()
    return {
        "empty.jsonl": "no rows", "empty.json": "empty", "no_rows.json": "no rows", "prose.json": "not JSON",
        "prose.jsonl": "not JSON", "number.json": "first row is not an object", "cut.json": "not JSON",
        "comma.json": "json:2: not JSON: expected ','", "trailing.json": "more text after the end",
        "utf16.jsonl": "UTF-16", "latin.json": "not UTF-8", "cut.jsonl.gz": "damaged", "false.jsonl.gz": "damaged",
        "false.jsonl.zst": "cannot be read", "cut.parquet": "not a complete .parquet file",
        "false.arrow": "not a complete .arrow file", "unknown.jsonl": "keys text, label", "letters.txt": "type is unknown",
        "loop.jsonl": "leads nowhere", "nothing": "holds no data", "absent.jsonl": "there is no such file",
    }  # fmt: skip


def test_each_kind_of_file_that_is_no_data_is_named(tmp_path, chat_bpe):
    for name, words in bad_files(tmp_path).items():
        with pytest.raises(UserError) as caught:
            prepare_source(tmp_path / name, tmp_path / "run", chat_bpe)
        assert words in str(caught.value), str(caught.value)
        assert name in caught.value.where, str(caught.value)
        assert not (tmp_path / "run" / "dataset").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_named(tmp_path, chat_bpe):
    path = write_rows(tmp_path / "talks.jsonl", GOOD)
    path.chmod(0)
    with pytest.raises(UserError, match="cannot be read"):
        prepare_source(path, tmp_path / "run", chat_bpe)


def test_a_long_turn_and_many_turns_take_bounded_time(tmp_path, chat_bpe):
    rows = [talk("Hi", "x" * 400_000), talk("Hi " * 130_000, "Yes"), talk(*["Well?", "Yes."] * 250), *GOOD]
    started = time.monotonic()
    ledger = prepare_source(write_rows(tmp_path / "talks.jsonl", rows), tmp_path / "run", chat_bpe).ledger
    assert time.monotonic() - started < 20
    assert ledger["rows"]["kept"] == 6
    assert ledger["skipped"] == {"nothing_left_to_learn": 1}
    assert ledger["overflow"] == {"turns": 1, "cut": 1}


def test_a_source_of_a_wrong_kind_is_named(tmp_path, chat_bpe):
    for source, words in (
        ([], "list of sources is empty"),
        ([5], "5 is not a source"),
        ({"path": "x.jsonl", "wieght": 2}, "unknown key 'wieght'"),
        ({"path": "x.jsonl", "weight": -1}, "must be a number above 0 and at most 1000, and is -1"),
        ({"path": "x.jsonl", "limit": 0}, "must be a whole number above 0, and is 0"),
        ("x" * 300, "cannot be opened"),
        ("x/" * 3000, "cannot be opened"),
        ("~nobody-of-that-name/x.jsonl", "a home folder that does not exist"),
    ):
        with pytest.raises(UserError, match=words):
            prepare_source(source, tmp_path / "run", chat_bpe)


def test_a_bad_row_of_the_test_source_is_named(tmp_path, chat_bpe):
    good = write_rows(tmp_path / "good.jsonl", GOOD)
    bad = write_rows(tmp_path / "bad.jsonl", [*GOOD, {"conversations": []}])
    with pytest.raises(UserError, match="bad.jsonl:5"):
        prepare_source(good, tmp_path / "run", chat_bpe, test=str(bad))
