"""Nothing of the data is lost in silence: it is read, or refused, or counted and said."""

import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.command import refused, run
from tests.tiny import write_conversations


def prepared(capsys, recipe_file, *words):
    """What `prepare` says on stdout and stderr, and the ledger."""
    status, out, err = run(capsys, "prepare", recipe_file, *words)
    assert status == 0, err
    ledger = json.loads((recipe_file.parent / "run" / "dataset" / "ledger.json").read_text())
    assert ledger["rows"]["read"] == sum(ledger["rows"][name] for name in ("train", "test", "skipped"))
    return out, err, ledger


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def talk(number, **extra):
    turns = [{"role": "user", "content": f"Question {number}?"}, {"role": "assistant", "content": f"Answer {number}."}]
    return {"messages": turns, **extra}


def talks(count, **extra):
    return [talk(number, **extra) for number in range(count)]


# --- reasoning, media, columns ----------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["mistral", "chatml", "llama3", "zephyr"])
@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_that_the_template_drops_is_reported(capsys, recipe_file, tmp_path, template, key):
    rows = talks(12)
    for row in rows[:5]:
        row["messages"][1][key] = "Let me think."
    source = write(tmp_path / "a.jsonl", rows)
    out, err, ledger = prepared(capsys, recipe_file, f"data.source={source}", f"data.template={template}")
    assert ledger["findings"]["reasoning_dropped"] == 5
    assert "reasoning_dropped 5" in out
    assert "warning: 5 rows hold reasoning that the template" in err
    assert "warning: 5 rows" in prepared(capsys, recipe_file, f"data.source={source}", f"data.template={template}")[1]


BAD = {
    "images": (talk(1, images=["a.png"]), "media_unsupported", "the row has 'images', and only text is trained on"),
    "image": (talk(1, image="a.png"), "media_unsupported", "the row has 'image'"),
    "audio": (talk(1, audios=[{"path": "a.wav"}]), "media_unsupported", "the row has 'audios'"),
    "video of a turn": (
        {"messages": [{"role": "user", "content": "<video> What?", "videos": ["a"]}, talk(1)["messages"][1]]},
        "media_unsupported", "turn 1 has 'videos'",
    ),
    "part": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, talk(1)["messages"][1]]},
        "media_unsupported", "turn 1 has a content part of type 'image_url'",
    ),
    "system": (talk(1, system=7), "content_not_text", "the system column has a content that is a number"),
    "sharegpt's system": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": 7},
        "content_not_text", "the system column has a content that is a number",
    ),
    "tools": (talk(1, tools=7), "bad_tools", "'tools' is a number"),
    "reasoning": (
        {"messages": [talk(1)["messages"][0], {"role": "assistant", "content": "b", "reasoning_content": {"a": 1}}]},
        "content_not_text", "turn 2's reasoning_content has a content that is an object",
    ),
    "name": (
        {"messages": [{"role": "user", "content": "a", "name": ["Ann"]}, talk(1)["messages"][1]]},
        "content_not_text", "turn 1's name has a content that is a list",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_learned_is_an_invalid_row(capsys, recipe_file, tmp_path, name):
    row, reason, words = BAD[name]
    good = talks(4)
    if "conversations" in row:
        good = [
            {"conversations": [{"from": "human", "value": f"{n}"}, {"from": "gpt", "value": "b"}]} for n in range(4)
        ]
    source = write(tmp_path / "a.jsonl", [*good, row])
    said = refused(capsys, "prepare", recipe_file, f"data.source={source}")
    assert f"a.jsonl:5: {words}" in said
    _, _, ledger = prepared(capsys, recipe_file, f"data.source={source}", "data.invalid=skip")
    assert ledger["skipped"] == {reason: 1}


def test_empty_media_columns_are_no_media(capsys, recipe_file, tmp_path):
    source = write(tmp_path / "a.jsonl", talks(6, images=[], image=None, video=""))
    assert prepared(capsys, recipe_file, f"data.source={source}")[2]["ignored_columns"] == {}


def test_a_system_column_counts_under_every_format(capsys, recipe_file, tmp_path):
    rows = [*talks(3, system="Be kind."), talk(3)]
    rows[2]["messages"].insert(0, {"role": "system", "content": "Be kind."})  # the same again is no second one
    source = write(tmp_path / "a.jsonl", rows)
    assert prepared(capsys, recipe_file, f"data.source={source}")[2]["turns"]["system"] == 3


def test_columns_that_nobody_reads_are_named(capsys, recipe_file, tmp_path):
    rows = [*talks(3, lang="en", score=0, output="x"), *talks(3, lang="", empty=None)]
    rows[4]["messages"][0] |= {"timestamp": 5, "role": "user"}
    source = write(tmp_path / "a.jsonl", rows)
    out, _, ledger = prepared(capsys, recipe_file, f"data.source={source}")
    assert ledger["ignored_columns"] == {"lang": 3, "output": 3, "score": 3, "turns.timestamp": 1}
    assert "ignored    columns that are not read, and in how many rows: lang 3, output 3, score 3" in out


def test_any_number_of_columns_is_named_in_bounds(capsys, recipe_file, tmp_path):
    rows = [talk(n, **{f"column-{n}-{i}": "x" for i in range(30)}, **{"y" * 5000: 1}) for n in range(600)]
    out, _, ledger = prepared(capsys, recipe_file, f"data.source={write(tmp_path / 'a.jsonl', rows)}")
    assert sum(ledger["ignored_columns"].values()) == 31 * 600
    assert len(ledger["ignored_columns"]) <= 202
    assert len(out) < 5000


# --- files ------------------------------------------------------------------------------------------------


def test_suffixes_in_capitals_are_read(capsys, recipe_file, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "A.JSONL", talks(3))
    write(folder / "b.jsonl", talks(4))
    (folder / "C.Jsonl.GZ").write_bytes(gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in talks(2))))
    assert "9 read" in prepared(capsys, recipe_file, f"data.source={folder}")[0]


def test_files_of_a_folder_that_are_not_read_are_named(capsys, recipe_file, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "a.jsonl", talks(3))
    (folder / "b.tsv").write_text("mine")
    (folder / ".hidden").write_text("mine")
    said = prepared(capsys, recipe_file, f"data.source={folder}")[0]
    assert "not read" in said
    assert "b.tsv" in said
    assert ".hidden" not in said


PACKED = {
    "a.json": (gzip.compress, "its content is gzip, and its name says .json", "rename it to a.json.gz"),
    "a.jsonl": (gzip.compress, "its content is gzip", "rename it to a.jsonl.gz"),
    "a.csv": (lambda data: pa.compress(data, "zstd", asbytes=True), "its content is zstd", "rename it to a.csv.zst"),
    "a.jsonl.gz": (lambda data: pa.compress(data, "zstd", asbytes=True), "content is zstd", "rename it to a.jsonl.zst"),
    "b.json": (lambda data: b"PAR1\x15\x04" + data, "its content is Parquet", "rename it to b.parquet"),
    "b.parquet": (gzip.compress, "its content is gzip", "unpack it"),
    "c.jsonl": (lambda data: b"PK\x03\x04" + data, "its content is zip", "unpack it"),
}


@pytest.mark.parametrize("name", PACKED)
def test_a_file_that_is_packed_under_another_name(capsys, recipe_file, tmp_path, name):
    pack, words, fix = PACKED[name]
    (tmp_path / name).write_bytes(pack(json.dumps(talk(1)).encode()))
    said = refused(capsys, "prepare", recipe_file, f"data.source={tmp_path / name}")
    assert words in said
    assert fix in said


def test_a_csv_row_with_too_many_cells(capsys, recipe_file, tmp_path):
    source = tmp_path / "a.csv"
    rows = "".join(f"Question {n},Answer {n}\n" for n in range(4))
    source.write_text(f"instruction,output\n{rows}Tea, coffee or milk,Milk\n")
    said = refused(capsys, "prepare", recipe_file, f"data.source={source}")
    assert "a.csv:6: the row has 3 cells, and the header names 2 columns; put a text with a comma" in said
    _, _, ledger = prepared(capsys, recipe_file, f"data.source={source}", "data.invalid=skip")
    assert ledger["skipped"] == {"too_many_cells": 1}
    source.write_text("instruction,output,output\na,b,c\n")
    assert "the header names the column 'output' twice" in refused(
        capsys, "prepare", recipe_file, f"data.source={source}"
    )


def test_a_csv_answer_that_looks_like_a_list_is_text(capsys, recipe_file, tmp_path):
    source = tmp_path / "a.csv"
    source.write_text("instruction,output\n" + "".join(f'Count to {n},"[1, 2]"\n' for n in range(4)))
    assert prepared(capsys, recipe_file, f"data.source={source}")[2]["rows"]["kept"] == 4


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_text_columns_that_spell_a_conversation(capsys, recipe_file, tmp_path, kind, column):
    table = pa.table({column: [json.dumps(row["messages"]) for row in talks(6)], "id": list(range(6))})
    source = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(table, source)
    else:
        with pa.OSFile(str(source), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    assert "6 read = 5 train + 1 test" in prepared(capsys, recipe_file, f"data.source={source}")[0]


# --- patterns ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    (folder / "more" / ".hidden").mkdir(parents=True)
    for place, name in enumerate(("b.jsonl", "a.jsonl", "more/c.jsonl", "more/.hidden/d.jsonl", ".e.jsonl")):
        write(folder / name, [talk(100 * place + n) for n in range(4)])
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.parametrize(
    ("pattern", "rows"),
    [
        ("data/*.jsonl", 8),
        ("data/**/*.jsonl", 12),
        ("data/**", 12),
        ("data/[a].jsonl", 4),
        ("[{path: 'data/?.jsonl', limit: 3}, data/more/*.jsonl]", 7),
    ],
)
def test_patterns_of_files(capsys, recipe_file, folder, pattern, rows):
    assert f"{rows} read" in prepared(capsys, recipe_file, f"data.source={pattern}")[0]


def test_a_pattern_is_resolved_beside_the_recipe(capsys, recipe_file, folder, monkeypatch):
    odd = recipe_file.parent / "odd [folder]"
    odd.mkdir()
    moved = odd / "recipe.yaml"
    moved.write_text(recipe_file.read_text())
    write(odd / "z.jsonl", talks(5))
    monkeypatch.chdir(folder / "more")
    status, out, _ = run(capsys, "prepare", moved, "data.source=z*.jsonl")
    assert (status, "5 read" in out) == (0, True)


def test_a_pattern_follows_its_files(capsys, recipe_file, folder):
    assert "8 read" in prepared(capsys, recipe_file, "data.source=data/*.jsonl")[0]
    assert "(prepared before)" in prepared(capsys, recipe_file, "data.source=data/*.jsonl")[0]
    write(folder / "c.jsonl", [talk(n) for n in range(50, 55)])
    assert "13 read" in prepared(capsys, recipe_file, "data.source=data/*.jsonl")[0]
    (folder / "c.jsonl").rename(folder / "0.jsonl")  # the order of the rows is another now
    assert "(prepared before)" not in prepared(capsys, recipe_file, "data.source=data/*.jsonl")[0]


def test_a_file_whose_name_is_a_pattern_is_that_file(capsys, recipe_file, folder):
    write(folder / "[a].jsonl", talks(7))
    assert "7 read" in prepared(capsys, recipe_file, "data.source=data/[a].jsonl")[0]


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("data/*.json", "no file matches this pattern"),
        ("data/m*", "no file matches"),
        ("data/*", "its type is unknown"),
    ],
)
def test_a_pattern_of_no_data(capsys, recipe_file, folder, pattern, words):
    (folder / "notes.txt").write_text("hello")
    assert words in refused(capsys, "prepare", recipe_file, f"data.source={pattern}")


# --- the test side ----------------------------------------------------------------------------------------


@pytest.fixture
def two(folder):
    path = write(folder / "two.jsonl", [talk(n) for n in range(500, 530)])
    (folder / "link.jsonl").symlink_to("two.jsonl")
    os.link(path, folder / "hard.jsonl")
    return path


@pytest.mark.parametrize("verb", ["prepare", "train"])
def test_the_test_source_is_the_training_source(capsys, recipe_file, two, verb):
    said = refused(capsys, verb, recipe_file, f"data.source={two}", f"data.test=[{two}]")
    assert "data.test: " in said
    assert "is a training source too" in said


@pytest.mark.parametrize(
    "test",
    ["./data/two.jsonl", "[data/two.jsonl]", "{path: data/two.jsonl}", "data/link.jsonl", "data/hard.jsonl", "data",
     "data/tw*.jsonl", "{path: data/two.jsonl, limit: 3}"],
)  # fmt: skip
def test_no_other_name_hides_it(capsys, recipe_file, two, test):
    assert "data.test" in refused(capsys, "prepare", recipe_file, "data.source=data/two.jsonl", f"data.test={test}")
    assert not (recipe_file.parent / "run").exists()


def test_train_rows_in_another_test_file_are_a_warning(capsys, recipe_file, two, folder):
    rows = [talk(n) for n in range(520, 545)]
    rows[-1]["messages"][1]["content"] = "Something else."
    rows[0]["messages"][1]["content"] = "Something else."
    test = write(folder / "test.jsonl", rows)
    out, err, ledger = prepared(capsys, recipe_file, f"data.source={two}", f"data.test={test}")
    assert ledger["overlap"]["test_rows_in_train"] == 9
    assert ledger["overlap"]["test_rows_with_a_train_prompt"] == 10
    assert "10 of 25 test rows begin with a train row's prompt, 9 are train rows" in out
    assert "warning: 9 of 25 test rows are train rows too" in err


@pytest.mark.parametrize(
    ("rows", "fraction", "words"),
    [
        (30, 0.1, "3 held-out rows are too few"),
        (10, 0.1, "1 held-out row is too few"),
        (30, 0.0, "no rows are held out: evaluate has nothing to score"),
        (200, 0.1, ""),
    ],
)
def test_training_warns_of_a_small_test_split(capsys, recipe_file, tmp_path, rows, fraction, words):
    source = write(tmp_path / "a.jsonl", talks(rows))
    out, _, ledger = prepared(capsys, recipe_file, f"data.source={source}", f"data.test_fraction={fraction}")
    assert ledger["rows"]["test"] == round(rows * fraction)
    assert ("test       " + words in out) == bool(words)
    assert ("held out" in out or "held-out" in out) == bool(words)


# --- weights ----------------------------------------------------------------------------------------------


def test_a_source_of_which_the_weight_leaves_nothing(capsys, recipe_file, tmp_path):
    source = write(tmp_path / "a.jsonl", talks(5))
    weighted = f"data.source={{path: {source}, weight: 0.000001}}"
    said = refused(capsys, "prepare", recipe_file, weighted)
    assert "the weight 1e-06 leaves out every row, of 5" in said
    said = refused(capsys, "prepare", recipe_file, weighted, "data.format=messages")
    assert "left_out_by_weight 5" in said
    assert "raise the source's weight" in said


def test_a_small_weight_of_a_large_file_finds_the_format(capsys, recipe_file, tmp_path):
    source = write(tmp_path / "a.jsonl", [talk(n, id="x" * 3000) for n in range(2000)])
    _, _, ledger = prepared(capsys, recipe_file, f"data.source={{path: {source}, weight: 0.001}}")
    assert ledger["rows"]["read"] == 2000
    assert 0 < ledger["rows"]["kept"] < 10


def test_answers_that_are_all_left_out(capsys, recipe_file, tmp_path):
    rows = talks(5)
    for row in rows:
        row["messages"][1]["weight"] = 0
    source = write(tmp_path / "a.jsonl", rows)
    assert "weight, train, loss or trainable is 0 or false on each" in refused(
        capsys, "prepare", recipe_file, f"data.source={source}"
    )
    said = refused(capsys, "prepare", recipe_file, f"data.source={source}", "data.invalid=skip")
    assert "every answer is left out" in said


def test_conversations_of_the_fixture_lose_nothing(capsys, recipe_file, tmp_path):
    source = write_conversations(tmp_path / "a.jsonl", 210)
    out, err, ledger = prepared(capsys, recipe_file, f"data.source={source}")
    assert err == ""
    assert ledger["ignored_columns"] == {}
    assert "ignored" not in out
