"""The hashes of a list: which things differ."""

import pytest

from minisft.training import certificate
from minisft.training.certificate import ListHashes, changed_files


def hashes(*things):
    return ListHashes.of(things, len(things))


@pytest.mark.parametrize(
    ("now", "changed"),
    [
        ((b"a", b"b", b"c"), []),
        ((b"a", b"x", b"c"), [range(1, 2)]),
        ((b"a", b"b"), [range(2, 3)]),
        ((b"a", b"b", b"c", b"d"), [range(3, 4)]),
        ((b"ab", b"", b"c"), [range(1), range(1, 2)]),  # the same bytes, cut elsewhere
        ((), [range(1), range(1, 2), range(2, 3)]),
    ],
)
def test_the_things_that_differ_are_named(now, changed):
    assert hashes(b"a", b"b", b"c").changed(hashes(*now)) == changed


def test_long_lists_share_digests(monkeypatch):
    monkeypatch.setattr(certificate, "_MOST_DIGESTS", 2)
    before = hashes(*[b"x"] * 5)
    assert (before.block, len(before.digests)) == (3, 16)
    assert before.changed(hashes(*[b"x"] * 4, b"y")) == [range(3, 5)]
    assert before.changed(hashes(b"x")) == [range(5)]  # another length of a block


def test_files_are_changed_missing_or_added():
    assert changed_files({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "4", "d": "5"}) == [
        "b: changed", "c: missing", "d: added",
    ]  # fmt: skip
