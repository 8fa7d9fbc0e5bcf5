"""Shared pieces, against a count with Python's sets."""

import datasets
import numpy as np

from minisft.audit.similar_rows import pieces, similarities


def test_the_similarity_is_the_share_of_weighted_pieces():
    random = np.random.default_rng(0)
    rows = [random.integers(0, 5, random.integers(1, 30)).tolist() for _ in range(40)]
    query = random.integers(0, 5, 25).tolist()

    def triples(ids):
        return {tuple(ids[at : at + 3]) for at in range(len(ids) - 2)}

    asked = triples(query)
    weights = {
        one: max(0.0, np.log((len(rows) + 1) / (sum(one in triples(row) for row in rows) + 0.5))) for one in asked
    }
    expected = [sum(weights[one] for one in asked & triples(row)) / sum(weights.values()) for row in rows]
    data = datasets.Dataset.from_dict({"input_ids": rows})
    found = similarities(data, np.unique(pieces(np.asarray(query))))
    assert np.allclose(found, expected)


def test_short_rows_have_one_piece():
    assert len(pieces(np.array([1]))) == len(pieces(np.array([1, 2, 3]))) == 1
    assert pieces(np.array([1, 2, 3])) != pieces(np.array([3, 2, 1]))
