"""Where rows come from, in what order, and by what name they are called."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minisft.data.prepared import load_test, load_train
from minisft.data.sources import Source, read_source
from tests.unit.data.helpers import many, prepare_source, talk, write_rows

ROWS = many(6)
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def locations(path, **keys):
    return [location for chunk in read_source(Source(str(path), **keys), 0) for location, _ in chunk.parsed()]


def rows(path, **keys):
    return [row for chunk in read_source(Source(str(path), **keys), 0) for _, row in chunk.parsed()]


def write_arrow(path, opener):
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as file, opener(file, table.schema) as writer:
        writer.write_table(table)


def write_zst(path):
    with pa.CompressedOutputStream(str(path), "zstd") as file:
        file.write(LINES)


WRITERS = {
    "a.jsonl": lambda path: path.write_bytes(LINES),
    "bom.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf" + LINES),
    "list.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "lines.json": lambda path: path.write_bytes(LINES),
    "wrapped.json": lambda path: path.write_text(json.dumps({"version": 1, "data": ROWS})),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "a.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "a.jsonl.zst": write_zst,
    "a.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
    "stream.arrow": lambda path: write_arrow(path, pa.ipc.new_stream),
    "file.arrow": lambda path: write_arrow(path, pa.ipc.new_file),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rows_in_order(name, tmp_path):
    WRITERS[name](tmp_path / name)
    assert rows(tmp_path / name) == ROWS


def test_csv_rows(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('instruction,input,output,history\n"Say, hi",,"Hi\nthere",\nMore,x,Yes,"[[""a"", ""b""]]"\n')
    assert rows(path) == [
        {"instruction": "Say, hi", "input": "", "output": "Hi\nthere", "history": ""},
        {"instruction": "More", "input": "x", "output": "Yes", "history": [["a", "b"]]},
    ]
    assert locations(path) == ["a.csv:3", "a.csv:4"]


def test_one_object_in_a_json_file_is_one_row(tmp_path):
    path = tmp_path / "one.json"
    path.write_text(json.dumps(ROWS[0], indent=2))
    assert rows(path) == ROWS[:1]


def test_rows_are_called_by_file_and_line(tmp_path):
    path = tmp_path / "talks.jsonl"
    path.write_bytes(b"\n\n" + LINES)
    assert locations(path)[:2] == ["talks.jsonl:3", "talks.jsonl:4"]
    nested = tmp_path / "list.json"
    nested.write_text("[\n" + ",\n\n".join(json.dumps(row) for row in ROWS[:3]) + "]")
    assert locations(nested) == ["list.json:2", "list.json:4", "list.json:6"]


def test_a_large_json_list_is_read_piece_by_piece(tmp_path):
    path = tmp_path / "list.json"
    long = [talk("EvalExample é" * 40_000, f"Answer {i}") for i in range(8)]
    path.write_text(json.dumps(long, ensure_ascii=False), encoding="utf-8")
    assert rows(path) == long


def test_a_folder_is_all_its_files_by_name(tmp_path):
    (tmp_path / "more").mkdir()
    write_rows(tmp_path / "b.jsonl", ROWS[:2])
    write_rows(tmp_path / "a.jsonl", ROWS[2:4])
    write_rows(tmp_path / "more" / "c.jsonl", ROWS[4:])
    (tmp_path / "README.md").write_text("not data")
    assert locations(tmp_path) == [
        "a.jsonl:1",
        "a.jsonl:2",
        "b.jsonl:1",
        "b.jsonl:2",
        "more/c.jsonl:1",
        "more/c.jsonl:2",
    ]


def test_limit_and_weight(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", many(1000))
    assert len(rows(path, limit=3)) == 3
    assert rows(path, weight=2.0)[:4] == [row for row in many(2) for _ in range(2)]
    some = rows(path, weight=0.25)
    assert 200 < len(some) < 300
    assert some == rows(path, weight=0.25)


def test_a_list_of_sources_is_read_in_order_and_each_in_its_format(tmp_path, chat_bpe):
    first = write_rows(tmp_path / "talks.jsonl", ROWS)
    second = tmp_path / "alpaca.json"
    second.write_text(json.dumps([{"instruction": f"Do {i}", "input": "", "output": f"Done {i}"} for i in range(4)]))
    source = [{"path": str(first), "limit": 3}, {"path": str(second), "weight": 2}]
    prepared = prepare_source(source, tmp_path / "run", chat_bpe, test_fraction=0.0)
    assert prepared.ledger["formats"] == {str(first): "sharegpt", str(second): "alpaca"}
    assert prepared.ledger["rows"] == {"read": 11, "kept": 11, "skipped": 0, "train": 11, "test": 0}
    assert load_train(tmp_path / "run")["location"][:5] == [
        "talks.jsonl:1", "talks.jsonl:2", "talks.jsonl:3", "alpaca.json:1", "alpaca.json:1",
    ]  # fmt: skip
    assert load_test(tmp_path / "run") == []


def test_rows_that_a_weight_leaves_out_are_counted(tmp_path, chat_bpe):
    path = write_rows(tmp_path / "a.jsonl", many(100))
    ledger = prepare_source([{"path": str(path), "weight": 0.5}], tmp_path / "run", chat_bpe).ledger
    assert ledger["rows"]["read"] == 100
    assert ledger["skipped"] == {"left_out_by_weight": ledger["rows"]["skipped"]}
    assert 30 < ledger["rows"]["kept"] < 70
