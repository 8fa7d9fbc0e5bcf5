"""Whatever stands in a file, the answer is rows and counts, or a message: never a traceback."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisft.data.encoder import Encoder
from minisft.data.formats import FORMATS, detect_format
from minisft.data.pipeline import ChunkTask, process_chunk
from minisft.data.sources import Source, read_source
from minisft.errors import UserError
from minisft.recipe import DataRecipe

KEYS = [
    "conversations", "conversation", "messages", "from", "value", "role", "content", "instruction", "input", "output",
    "history", "system", "tools", "prompt", "completion", "response", "id", "tool_calls", "function", "name",
    "arguments", "weight", "train", "reasoning_content", "type", "text", "tool_call_id", "loss",
]  # fmt: skip
WORDS = [
    "human", "gpt", "user", "assistant", "system", "tool", "function_call", "observation", "text", "", " ", "Hi",
    "<|im_end|>", "\0", "\ud800", "[INST]", "[]", "{}", '{"name": "f"}', '{"name": "f", "arguments": {}}', "é", "\ue000",
]  # fmt: skip
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from(WORDS), st.text(max_size=5))
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.sampled_from(KEYS), st.text(max_size=3)), inner, max_size=4),
    ),
    max_leaves=12,
)
turn = st.fixed_dictionaries(
    {"from": st.one_of(st.sampled_from(WORDS[:8]), values), "value": st.one_of(st.sampled_from(WORDS), values)},
    optional=dict.fromkeys(("weight", "tool_calls", "name", "reasoning_content"), values),
)
rows = st.one_of(
    values,
    st.fixed_dictionaries(
        {"conversations": st.lists(turn, max_size=5)}, optional={"tools": values, "system": values, "id": values}
    ),
    st.fixed_dictionaries({"instruction": values, "output": values}, optional={"history": values, "input": values}),
    st.fixed_dictionaries({"prompt": values, "completion": st.one_of(values, st.lists(turn, max_size=3))}),
)
files = st.one_of(
    st.binary(max_size=60),
    st.lists(st.one_of(rows.map(lambda row: json.dumps(row).encode()), st.binary(max_size=10)), max_size=4).map(
        b"\n".join
    ),
    st.lists(rows, max_size=3).map(lambda found: json.dumps(found).encode()),
    st.lists(rows, max_size=3).map(lambda found: json.dumps(found).encode()[:-3]),
)
suffixes = st.sampled_from([".jsonl", ".json", ".csv", ".jsonl.gz", ".parquet", ".arrow", ".jsonl.zst"])


def assert_counts_or_message(content, suffix, invalid, folder, encoder):
    path = folder / f"fuzz{suffix}"
    path.write_bytes(content)
    try:
        chunks = list(read_source(Source(str(path)), 0))
    except UserError:
        return
    for chunk in chunks:
        found = next((name for _, row in chunk.parsed() if (name := detect_format(row))), None)
        for format in [found] if found else FORMATS:
            data = DataRecipe(source=str(path), invalid=invalid, max_length=40)
            result = process_chunk(chunk, encoder, ChunkTask(data, (format,), 0))
            assert result.stats.count("rows", "read") == len(chunk) == len(result.keys) + result.stats.skipped


@settings(max_examples=200)
@given(content=files, suffix=suffixes, invalid=st.sampled_from(["skip", "repair"]))
def test_no_input_gives_a_traceback(content, suffix, invalid, tmp_path_factory, chat_encoder):
    assert_counts_or_message(content, suffix, invalid, tmp_path_factory.getbasetemp(), chat_encoder)


@pytest.mark.long
@settings(max_examples=20_000)
@given(content=files, suffix=suffixes, invalid=st.sampled_from(["skip", "repair"]))
def test_no_input_in_twenty_thousand_gives_a_traceback(content, suffix, invalid, tmp_path_factory, chat_encoder):
    assert_counts_or_message(content, suffix, invalid, tmp_path_factory.getbasetemp(), chat_encoder)


@pytest.fixture(scope="session")
def chat_encoder(chat_bpe):
    return Encoder(chat_bpe, "chatml")
