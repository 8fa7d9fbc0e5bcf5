"""The pipeline: the identities of the ledger, the split, the cache, and the files."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest

from minisft.data import sources
from minisft.data.conversation import Conversation, messages_from_rows
from minisft.data.encoder import Encoder
from minisft.data.formats import to_conversation
from minisft.data.preparation import prepare
from minisft.data.prepared import load_split, load_test, load_train
from minisft.data.readers import Chunk
from minisft.data.split import choose_test
from minisft.data.stats import ledger_lines
from minisft.data.verification import VerificationError
from minisft.errors import UserError
from minisft.recipe import DataRecipe, Recipe, make_recipe
from tests.unit.data.helpers import many, prepare_source, talk, write_rows
from tests.unit.data.toys import bpe_tokenizer


def odd_rows(count, seed=0):
    """Conversations of one to five exchanges, some with a system prompt, of very different lengths."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        texts = [
            " ".join(rng.choices(["one", "two", "[INST]", "four"], k=rng.randint(1, 30)))
            for _ in range(2 * rng.randint(1, 5))
        ]
        texts[0] = f"{i % 40} {texts[0]}"
        rows.append(talk(*texts, system="Be kind" if i % 3 else None, id=f"row-{i}"))
    return rows


def assert_identities(ledger):
    rows, tokens = ledger["rows"], ledger["tokens"]
    assert rows["read"] == rows["kept"] + rows["skipped"] == rows["train"] + rows["test"] + rows["skipped"]
    assert rows["skipped"] == sum(ledger["skipped"].values())
    assert tokens["rendered"] == tokens["kept"] + tokens["cut"]


@pytest.mark.parametrize("overflow", ["turns", "cut", "drop"])
@pytest.mark.parametrize("template", ["chatml", "mistral", "llama3", "zephyr"])
def test_the_ledger_agrees_with_the_files(template, overflow, tmp_path, chat_bpe):
    path = write_rows(tmp_path / "talks.jsonl", [*odd_rows(60), {"conversations": []}])
    options = {"template": template, "overflow": overflow, "invalid": "skip", "max_length": 150}
    prepared = prepare_source(path, tmp_path / "run", chat_bpe, **options)
    ledger = prepared.ledger
    assert_identities(ledger)
    assert ledger["skipped"]["empty_conversation"] == 1
    encoder = Encoder(chat_bpe, template)
    train, test = load_train(tmp_path / "run"), load_test(tmp_path / "run")
    assert (
        (len(train), len(test))
        == (prepared.train_rows, prepared.test_rows)
        == (ledger["rows"]["train"], ledger["rows"]["test"])
    )
    rows = [*train, *test]
    assert sum(len(row["input_ids"]) for row in rows) == ledger["tokens"]["kept"]
    assert sum(label >= 0 for row in rows for label in row["labels"]) == ledger["tokens"]["supervised"]
    assert max(len(row["input_ids"]) for row in rows) <= 150
    assert ledger["tokens"]["cut"] > 0 or overflow == "drop"
    for row in test:
        whole = encoder.encode(Conversation(messages_from_rows(row["messages"])))
        assert whole.input_ids[: len(row["input_ids"])] == row["input_ids"]
        assert whole.labels[: len(row["labels"])] == row["labels"]
    assert "\n".join(ledger_lines(ledger)).count("\n") >= 5


def test_rendered_is_the_sum_of_the_full_renderings(tmp_path, chat_bpe):
    rows = odd_rows(50)
    path = write_rows(tmp_path / "talks.jsonl", rows)
    full = prepare_source(path, tmp_path / "a", chat_bpe, max_length=100_000).ledger["tokens"]
    short = prepare_source(path, tmp_path / "b", chat_bpe, max_length=120).ledger
    assert full["cut"] == 0
    assert short["rows"]["skipped"] == 0
    assert short["tokens"]["rendered"] == full["rendered"] == full["kept"]


def test_overflow_error_names_the_rows(tmp_path, chat_bpe):
    path = write_rows(tmp_path / "talks.jsonl", [*many(3), talk("Hi", "word " * 100)])
    with pytest.raises(UserError, match=r"talks.jsonl:4: .* tokens, more than data.max_length 50"):
        prepare_source(path, tmp_path / "run", chat_bpe, overflow="error", max_length=50)


def test_train_on_last_supervises_the_last_answer_alone(tmp_path, chat_bpe):
    path = write_rows(tmp_path / "talks.jsonl", [talk("a", "First answer", "b", "Second answer")] * 3)
    prepare_source(path, tmp_path / "run", chat_bpe, train_on="last", test_fraction=0)
    labels = load_train(tmp_path / "run")[0]["labels"]
    assert chat_bpe.decode([label for label in labels if label >= 0]) == "Second answer<|im_end|>"


# --- the split --------------------------------------------------------------------------------------------


def test_the_split_is_seeded_and_stable_under_reordering(tmp_path, chat_bpe):
    rows = [row | {"id": str(i)} for i, row in enumerate(many(50))]
    shuffled = random.Random(1).sample(rows, len(rows))
    chosen = []
    for name, order, seed in (("a", rows, 0), ("b", shuffled, 0), ("c", rows, 1)):
        path = write_rows(tmp_path / f"{name}.jsonl", order)
        data = DataRecipe(source=str(path), template="chatml")
        prepare(Recipe(model="toy", output=str(tmp_path / name), data=data, seed=seed), chat_bpe)
        chosen.append({row["id"] for row in load_test(tmp_path / name)})
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(chosen[0]) == 5


def test_rows_with_one_first_prompt_are_in_one_split(tmp_path, chat_bpe):
    rows = [talk(f"Prompt {i % 10}", f"Answer {i}", "More", f"Answer {i}") for i in range(100)]
    rows += [talk(" prompt  3 ", "Otherwise spelled")]
    prepared = prepare_source(write_rows(tmp_path / "a.jsonl", rows), tmp_path / "run", chat_bpe, test_fraction=0.2)
    tested = {row["messages"][0]["content"].strip().lower() for row in load_test(tmp_path / "run")}
    trained = {chat_bpe.decode(row["input_ids"][3:6]) for row in load_train(tmp_path / "run")}
    assert len(tested) == 2
    assert prepared.test_rows in (20, 21)
    assert not {prompt.split()[-1] for prompt in tested} & {text.split()[-1] for text in trained}
    assert prepared.ledger["overlap"]["test_rows_with_a_train_prompt"] == 0


@pytest.mark.parametrize("count", [1, 2, 3, 10, 1000])
@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.1, 0.5, 0.99])
def test_sizes_of_the_split(count, fraction):
    keys = np.random.default_rng(count).integers(0, 2**63, count).astype(np.uint64)
    chosen = int(choose_test(keys, fraction).sum())
    if fraction == 0 or count == 1:
        assert chosen == 0
    else:
        assert chosen == min(max(round(fraction * count), 1), count - 1)


def test_a_test_source_of_its_own_and_its_overlap(tmp_path, chat_bpe):
    long = "word " + " ".join(f"{i}" for i in range(30))
    path = write_rows(tmp_path / "a.jsonl", [talk("Same prompt", long), *many(5)])
    test = write_rows(tmp_path / "b.jsonl", [talk("Same prompt", long), talk("Other", "Not the same at all")])
    prepared = prepare_source(path, tmp_path / "run", chat_bpe, test=str(test))
    assert (prepared.train_rows, prepared.test_rows) == (6, 2)
    overlap = prepared.ledger["overlap"]
    assert overlap["test_rows_with_a_train_prompt"] == 1
    assert overlap["test_rows_half_in_train"] == 1
    assert overlap["also_in_train"] > 10


def test_duplicates_are_counted(tmp_path, chat_bpe):
    path = write_rows(tmp_path / "a.jsonl", [*many(5), *many(3)])
    assert prepare_source(path, tmp_path / "run", chat_bpe).ledger["duplicates"] == 3


# --- the cache --------------------------------------------------------------------------------------------


def test_data_are_cached_until_a_byte_of_the_source_changes(tmp_path, chat_bpe, plain_bpe):
    path = write_rows(tmp_path / "a.jsonl", many(20))
    run = tmp_path / "run"
    assert not prepare_source(path, run, chat_bpe).cached
    assert prepare_source(path, run, chat_bpe).cached
    assert not prepare_source(path, run, chat_bpe, max_length=99).cached
    assert not prepare_source(path, run, plain_bpe, max_length=99).cached
    before = path.stat()
    path.write_bytes(path.read_bytes().replace(b"number 7", b"number 8"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not prepare_source(path, run, plain_bpe, max_length=99).cached
    assert prepare_source(path, run, plain_bpe, max_length=99).cached
    (run / "dataset" / "ledger.json").write_text("{torn")
    assert not prepare_source(path, run, plain_bpe, max_length=99).cached


def test_data_of_another_version_of_the_program_are_prepared_again_unless_a_run_has_begun(tmp_path, chat_bpe):
    path, ledger_file = write_rows(tmp_path / "a.jsonl", many(20)), tmp_path / "run" / "dataset" / "ledger.json"
    ledger = prepare_source(path, tmp_path / "run", chat_bpe).ledger
    ledger["made_from"]["program"] = "another"
    ledger_file.write_text(json.dumps(ledger))
    assert prepare_source(path, tmp_path / "run", chat_bpe, begun=True).cached
    assert not prepare_source(path, tmp_path / "run", chat_bpe).cached


def test_the_data_of_a_run_that_has_begun_must_be_those_that_it_began_with(tmp_path, chat_bpe, plain_bpe):
    path, run = write_rows(tmp_path / "a.jsonl", many(20)), tmp_path / "run"
    first = prepare_source(path, run, chat_bpe, begun=True)
    assert not first.cached
    assert prepare_source(path, run, chat_bpe, begun=True).cached
    path.write_bytes(path.read_bytes().replace(b"number 7", b"number 8"))
    with pytest.raises(UserError) as caught:
        prepare_source(path, run, chat_bpe, begun=True)
    assert f"changed since then: {path}" in str(caught.value)
    assert "--force" in caught.value.fix
    assert json.loads((run / "dataset" / "ledger.json").read_text()) == first.ledger
    path.write_bytes(path.read_bytes().replace(b"Question number 8?", b"Question number 7?", 1))
    with pytest.raises(UserError, match="the tokenizer"):
        prepare_source(write_rows(path, many(20)), run, plain_bpe, begun=True)
    assert prepare_source(path, run, chat_bpe, begun=True).cached


class Hub:
    """A hub whose data set changes with its revision; None: it does not answer."""

    def __init__(self, monkeypatch):
        self.revision: str | None = "a" * 40
        monkeypatch.setattr(sources, "newest_revision", lambda path, revision: revision or self.revision)
        monkeypatch.setattr(sources, "read_hub", self.read)

    def read(self, path, split, subset, revision, index):
        for i, row in enumerate(many(20, start=ord(revision[0]))):
            yield Chunk(index, path, rows=((f"{split}:{i}", row),))


def test_a_data_set_of_the_hub_counts_by_its_revision(tmp_path, chat_bpe, monkeypatch):
    hub, run = Hub(monkeypatch), tmp_path / "run"
    first = prepare_source("org/name", run, chat_bpe)
    assert first.ledger["made_from"]["sources"] == {"org/name": "a" * 40}
    assert prepare_source("org/name", run, chat_bpe).cached
    hub.revision = None
    assert prepare_source("org/name", run, chat_bpe).cached
    hub.revision = "b" * 40
    assert prepare_source("org/name", run, chat_bpe, begun=True).cached
    second = prepare_source("org/name", run, chat_bpe)
    assert not second.cached
    assert second.ledger["made_from"]["sources"] == {"org/name": "b" * 40}
    pinned = [{"path": "org/name", "revision": "a" * 40}]
    assert prepare_source(pinned, run, chat_bpe).ledger["made_from"]["sources"] == {"org/name": "a" * 40}


class UnusableTokenizer:
    """A tokenizer that must not be used."""

    def __getattr__(self, name):
        pytest.fail(f"the tokenizer's {name} was used")


def test_cached_data_are_found_by_the_files_of_the_tokenizer_without_using_it(tmp_path, chat_bpe):
    folder, run = tmp_path / "model", tmp_path / "run"
    chat_bpe.save_pretrained(folder)
    path = write_rows(tmp_path / "a.jsonl", many(20))
    recipe = Recipe(model=str(folder), output=str(run), data=DataRecipe(source=str(path), template="chatml"))
    assert not prepare(recipe).cached
    assert prepare(recipe).cached
    assert prepare(recipe, UnusableTokenizer(), model_folder=folder).cached  # type: ignore[arg-type]
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=7))
    assert prepare(recipe).cached  # other bytes, the same tokenizer


def test_a_changed_template_file_makes_it_new(tmp_path, chat_bpe):
    path = write_rows(tmp_path / "a.jsonl", many(20))
    template = tmp_path / "mine.jinja"
    text = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    template.write_text(text)
    assert not prepare_source(path, tmp_path / "run", chat_bpe, template=str(template)).cached
    assert prepare_source(path, tmp_path / "run", chat_bpe, template=str(template)).cached
    template.write_text(text.replace("{{ m.role }}", "{{ m.role | upper }}").replace("assistant", "ASSISTANT"))
    assert not prepare_source(path, tmp_path / "run", chat_bpe, template=str(template)).cached


def test_a_changed_template_in_the_home_folder_makes_it_new(tmp_path, chat_bpe, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write_rows(tmp_path / "a.jsonl", many(20))
    text = Encoder(chat_bpe, "chatml").chat_template.replace("{# minisft: chatml #}", "")
    (tmp_path / "mine.jinja").write_text(text)
    assert not prepare_source(path, tmp_path / "run", chat_bpe, template="~/mine.jinja").cached
    assert prepare_source(path, tmp_path / "run", chat_bpe, template="~/mine.jinja").cached
    (tmp_path / "mine.jinja").write_text(text + "{# changed #}")
    assert not prepare_source(path, tmp_path / "run", chat_bpe, template="~/mine.jinja").cached


def test_a_template_may_be_a_long_text_and_a_long_name_is_refused(tmp_path, chat_bpe):
    path = write_rows(tmp_path / "a.jsonl", many(20))
    text = Encoder(chat_bpe, "chatml").chat_template + "{# " + "long " * 2000 + "#}"
    assert prepare_source(path, tmp_path / "run", chat_bpe, template=text).train_rows == 18
    for name, words in (("x" * 300, "there is no template"), ("~nobody-of-that-name/x.jinja", "home folder")):
        with pytest.raises(UserError, match=words):
            prepare_source(path, tmp_path / "run", chat_bpe, template=name)


def test_the_own_template_counts_where_it_is_in_use(tmp_path):
    tokenizer = bpe_tokenizer(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), eos="<|im_end|>")
    path = write_rows(tmp_path / "a.jsonl", many(20))
    text = Encoder(tokenizer, "chatml").chat_template
    for template, cached in ((text, False), (text, True), (text + "{# changed #}", False)):
        tokenizer.chat_template = template
        assert prepare_source(path, tmp_path / "run", tokenizer, template="auto").cached is cached


def test_files_of_a_killed_preparation_are_removed(tmp_path, chat_bpe):
    path = write_rows(tmp_path / "a.jsonl", many(20))
    for cached in (False, True):
        left = tmp_path / "run" / ".dataset.123"
        left.mkdir(parents=True)
        (left / "source.arrow").write_bytes(b"unfinished")
        assert prepare_source(path, tmp_path / "run", chat_bpe).cached is cached
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".dataset.lock", "dataset"]


def test_a_failed_preparation_leaves_the_one_before_as_it_was(tmp_path, chat_bpe):
    path = write_rows(tmp_path / "a.jsonl", many(20))
    prepare_source(path, tmp_path / "run", chat_bpe)
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    bad = write_rows(tmp_path / "bad.jsonl", [*many(20), {"conversations": []}])
    with pytest.raises(UserError):
        prepare_source(bad, tmp_path / "run", chat_bpe)
    assert before == {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}


PROGRAM = """
import sys
from tests.unit.data.helpers import prepare_source
from tests.unit.data.toys import bpe_tokenizer
tokenizer = bpe_tokenizer(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), eos="<|im_end|>")
print("started", flush=True)
prepare_source(sys.argv[1], sys.argv[2], tokenizer)
"""


def start(source, output):
    command = [sys.executable, "-c", PROGRAM, str(source), str(output)]
    return subprocess.Popen(command, cwd=Path(__file__).parents[3], stdout=subprocess.PIPE)


def _read(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_two_processes_of_which_one_is_killed_leave_a_complete_data_set(tmp_path, chat_bpe):
    path = write_rows(tmp_path / "a.jsonl", many(6000))
    run = tmp_path / "run"
    first, second = start(path, run), start(path, run)
    killed = start(path, tmp_path / "killed")
    killed.stdout.readline()
    time.sleep(0.3)
    killed.send_signal(signal.SIGKILL)
    assert (first.wait(), second.wait()) == (0, 0)
    killed.wait()
    assert not [
        name for name in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path / "killed").encode() in _read(name)
    ]
    assert len(load_train(run)) + len(load_test(run)) == 6000
    assert prepare_source(path, run, chat_bpe).cached
    whole = (tmp_path / "killed" / "dataset" / "ledger.json").exists()
    assert whole or not (tmp_path / "killed" / "dataset").exists()
    assert prepare_source(path, tmp_path / "killed", chat_bpe).train_rows == 5400


# --- processes and verification ---------------------------------------------------------------------------


def test_several_processes_give_the_rows_of_one(tmp_path, chat_bpe):
    path = write_rows(tmp_path / "a.jsonl", odd_rows(4000))
    one = prepare_source(path, tmp_path / "one", chat_bpe, processes=1, invalid="skip")
    two = prepare_source(path, tmp_path / "two", chat_bpe, processes=2, invalid="skip")
    assert one.ledger == two.ledger
    assert load_train(tmp_path / "one")[:] == load_train(tmp_path / "two")[:]


class ShiftedMask(Encoder):
    """An encoder that supervises each token after a supervised one as well."""

    def encode_rendered(self, rendered, conversations):
        batch = super().encode_rendered(rendered, conversations)
        batch.labels[1:] = np.where(batch.labels[:-1] >= 0, batch.ids[1:], batch.labels[1:])
        return batch


class WrongToken(Encoder):
    """An encoder that replaces the first supervised token of a batch by the one after it."""

    def encode_rendered(self, rendered, conversations):
        batch = super().encode_rendered(rendered, conversations)
        place = int(np.flatnonzero(batch.labels >= 0)[0])
        batch.ids[place] = batch.labels[place] = batch.ids[place + 1]
        return batch


class WrongWhenCut(Encoder):
    """An encoder that puts EOS at place 49 of a row that is encoded alone, as rows are that have to be cut."""

    def encode(self, conversation, train_on="assistant"):
        encoded = super().encode(conversation, train_on)
        encoded.input_ids[49] = encoded.labels[49] = self.tokenizer.eos_token_id
        return encoded


def test_verification_detects_a_wrong_mask(tmp_path, chat_bpe):
    path = write_rows(tmp_path / "a.jsonl", many(5))
    with pytest.raises(VerificationError, match="outside the answers"):
        prepare_source(path, tmp_path / "run", chat_bpe, encoder=ShiftedMask(chat_bpe, "chatml"))


def test_verification_detects_an_answer_that_decodes_to_another_text(tmp_path, chat_bpe):
    path = write_rows(tmp_path / "a.jsonl", many(5))
    with pytest.raises(VerificationError, match="the supervised tokens read"):
        prepare_source(path, tmp_path / "run", chat_bpe, encoder=WrongToken(chat_bpe, "chatml"))


@pytest.mark.parametrize("template", ["chatml", "mistral", "zephyr"])
def test_cut_rows_are_verified_wherever_the_cut_falls(template, tmp_path, chat_bpe, llama_like):
    rows = [talk("Hi", "é 你 ☺ \U0001f600 <|im_end|> end", "x", "☺" * 9, system="Be kind")]
    path = write_rows(tmp_path / "a.jsonl", rows)
    options: dict = {"template": template, "overflow": "cut", "test_fraction": 0, "invalid": "skip"}
    for tokenizer in (chat_bpe, llama_like):
        whole = len(Encoder(tokenizer, template).encode(to_conversation(rows[0], "", "sharegpt")).input_ids)
        for limit in range(whole - 12, whole):
            ledger = prepare_source(path, tmp_path / "run", tokenizer, max_length=limit, **options).ledger
            assert ledger["tokens"]["kept"] == limit


def test_verification_detects_a_cut_row_that_decodes_to_another_text(tmp_path, chat_bpe):
    path = write_rows(tmp_path / "a.jsonl", [talk("Hi", "word " * 100)] * 3)
    with pytest.raises(VerificationError, match="the supervised tokens read"):
        prepare_source(path, tmp_path / "run", chat_bpe, encoder=WrongWhenCut(chat_bpe, "chatml"), max_length=50)


def test_a_test_split_without_rows_is_a_data_set(tmp_path, chat_bpe):
    path = write_rows(tmp_path / "a.jsonl", many(5))
    for options in (
        {"test_fraction": 0},
        {"test": str(write_rows(tmp_path / "b.jsonl", [talk("a")])), "invalid": "skip"},
    ):
        assert prepare_source(path, tmp_path / "run", chat_bpe, **options).test_rows == 0
        test = datasets.load_from_disk(str(tmp_path / "run" / "dataset" / "test"))
        assert (len(test), test.column_names[-2:]) == (0, ["messages", "tools"])
        assert test.features["input_ids"].feature.dtype == "int32"
        assert load_test(tmp_path / "run") == []


def test_columns_are_plain_lists_of_int32(tmp_path, chat_bpe):
    prepare_source(write_rows(tmp_path / "a.jsonl", many(20)), tmp_path / "run", chat_bpe)
    train = datasets.load_from_disk(str(tmp_path / "run" / "dataset" / "train"))
    assert train.column_names == ["input_ids", "labels", "id", "location", "rendered", "findings", "source"]
    assert train.features["input_ids"].feature.dtype == train.features["labels"].feature.dtype == "int32"
    assert sorted(path.name for path in (tmp_path / "run" / "dataset").iterdir()) == ["ledger.json", "test", "train"]
    assert json.loads((tmp_path / "run" / "dataset" / "ledger.json").read_text())["rows"]["read"] == 20


def test_validation_rows_are_train_rows_and_the_test_rows_are_held_back(tmp_path, tiny_model, conversations):
    keys = {"model": str(tiny_model), "data.source": str(conversations), "data.template": "mistral"}
    plain = make_recipe([*keys.items(), ("output", str(tmp_path / "plain")), ("data.test_fraction", 0.2)])
    held = make_recipe([("output", str(tmp_path / "held")), ("data.validation_fraction", 0.25)], plain)
    ledgers = [prepare(recipe).ledger for recipe in (plain, held)]
    ids = {
        (name, split): [row["id"] for row in load_split(tmp_path / name, split)]
        for name in ("plain", "held")
        for split in ("train", "test")
    }
    assert set(ids["held", "train"]) | set(ids["held", "test"]) == set(ids["plain", "train"])
    assert not set(ids["held", "train"]) & set(ids["held", "test"])
    assert len(ids["held", "test"]) == round(0.25 * len(ids["plain", "train"]))
    rows, tokens = ledgers[1]["rows"], ledgers[1]["tokens"]
    assert rows["skipped"] == ledgers[1]["skipped"]["held_back"] == ledgers[0]["rows"]["test"]
    kept = [row for split in ("train", "test") for row in load_split(tmp_path / "held", split)]
    assert tokens["kept"] == sum(len(row["input_ids"]) for row in kept)
    assert tokens["supervised"] == sum(label >= 0 for row in kept for label in row["labels"])


def test_with_a_seed_of_the_data_the_seed_changes_no_split(tmp_path, tiny_model, conversations):
    keys = {"model": str(tiny_model), "data.source": str(conversations), "data.template": "mistral"}
    plain = make_recipe([*keys.items(), ("output", str(tmp_path / "plain"))])
    ids = {}
    for name, changed in (("plain", {}), ("other", {"seed": 7}), ("fixed", {"seed": 7, "data.seed": 0})):
        recipe = make_recipe([("output", str(tmp_path / name)), *changed.items()], plain)
        prepare(recipe)
        ids[name] = [row["id"] for row in load_split(tmp_path / name, "test")]
    assert ids["fixed"] == ids["plain"] != ids["other"]
    again = make_recipe([("seed", 7), ("data.seed", 0)], plain)
    assert prepare(again).cached  # in the folder of `plain`, whose data set is the same
