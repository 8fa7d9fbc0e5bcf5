"""What `inspect` shows, on a tokenizer folder without weights."""

import json
import re

import pytest

from minisft.console import console
from minisft.data.inspect import as_html, choose_rows, inspect, token_texts
from minisft.data.preparation import prepare
from minisft.data.prepared import load_split
from minisft.errors import UserError
from minisft.models import load_tokenizer
from minisft.recipe import DataRecipe, Recipe
from tests.unit.data.helpers import talk, write_rows
from tests.unit.data.mistral import fast_tokenizer

ROWS = [
    talk("Hello", "Hi there", id="short"),
    talk("What [/INST] now?", "</script><b>Nothing</b> <|im_end|>", "x", "word " * 60, id="long"),
    talk("Say é 你", "☕", id="letters"),
]


@pytest.fixture
def recipe(tmp_path, chat_bpe):
    chat_bpe.save_pretrained(tmp_path / "tokenizer")
    source = write_rows(tmp_path / "talks.jsonl", ROWS)
    data = DataRecipe(source=str(source), template="chatml", test_fraction=0, max_length=60)
    return Recipe(model=str(tmp_path / "tokenizer"), output=str(tmp_path / "run"), data=data)


def test_what_was_prepared_is_shown_and_not_prepared_again(recipe, tmp_path):
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    ledger = tmp_path / "run" / "dataset" / "ledger.json"
    assert not prepare(recipe, tokenizer).cached
    written = ledger.stat().st_mtime_ns
    inspect(recipe, count=1)
    assert ledger.stat().st_mtime_ns == written
    assert prepare(recipe).cached
    tokenizer.chat_template = "{{ messages }}"  # as training sets one
    tokenizer(["Hello", "Hello there"], padding=True, truncation=True, max_length=8)
    assert prepare(recipe, tokenizer).cached


def test_rows_by_number_id_and_measure(recipe):
    inspect(recipe, count=1)
    data = load_split(recipe.output, "train")
    assert choose_rows(data, rows=[2, 0]) == [2, 0]
    assert choose_rows(data, ids=["long"]) == [1]
    assert choose_rows(data, worst="length", count=1) == [1]
    assert choose_rows(data, worst="cut", count=1) == [1]
    assert choose_rows(data, worst="share", count=3)[0] != 1
    assert choose_rows(data, only_findings=True) == [1]
    for wrong in ({"rows": [3]}, {"ids": ["none"]}, {"worst": "best"}):
        with pytest.raises(UserError):
            choose_rows(data, **wrong)


def test_the_terminal_shows_every_token_and_no_markup_is_taken_from_it(recipe):
    with console.capture() as capture:
        shown = inspect(recipe, ids=["long", "letters"])
    printed = capture.get()
    assert "What [/INST] now?" in printed.replace("\n", "")
    assert "id long, talks.jsonl:2" in printed
    assert {"spells_control", "cut_turns"} & set(shown[0].findings)
    learned = "".join(token.text for token in shown[0].tokens if token.supervised)
    assert learned.startswith("</script><b>Nothing</b>")


def test_the_page_is_self_contained_and_holds_the_rows(recipe, tmp_path):
    shown = inspect(recipe, rows=[0, 1, 2], html=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page == as_html(shown)
    assert not re.search(r"(src|href)=|https?://", page)
    data = re.search(r'<script type="application/json" id="rows">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    rows = json.loads(data[1])
    assert [row["id"] for row in rows] == ["short", "long", "letters"]
    assert "".join(token[1] for token in rows[1]["tokens"] if token[2]).startswith("</script>")


def test_texts_of_tokens_join_to_the_text(chat_bpe):
    for tokenizer in (chat_bpe, fast_tokenizer("v3")):
        text = "Hello there, what is 6 x 7?\nYes"
        assert "".join(token_texts(tokenizer.encode(text, add_special_tokens=False), tokenizer)).strip() == text
    assert token_texts(chat_bpe.encode("é"), chat_bpe) == ["Ã", "©"]
