"""Settings drawn from Optuna depend on the seed, the number and the trials before, not on when a search was killed."""

import pytest

pytest.importorskip("optuna")

from minisft.errors import UserError
from minisft.search.space import read_axis
from minisft.search.study import Study, default_storage

AXES = [read_axis("training.learning_rate=1e-5..1e-2"), read_axis("training.epochs=1,2,3")]


def make(folder, seed=0, axes=AXES, url=None):
    folder.mkdir(exist_ok=True)
    return Study(url or default_storage(folder), "study", axes, seed)


def test_a_study_that_is_opened_again_draws_the_same(tmp_path):
    once = make(tmp_path / "a")
    together = [once.add_trial() for _ in range(6)]
    apart = []
    for _ in range(6):
        apart.append(make(tmp_path / "b").add_trial())
    assert apart == together == make(tmp_path / "b").settings
    assert [make(tmp_path / "c", seed=1).add_trial() for _ in range(6)] != together
    assert all(1e-5 <= settings["training.learning_rate"] <= 1e-2 for settings in together)


def test_results_lead_later_trials_and_the_same_ones_lead_to_the_same(tmp_path):
    drawn = []
    for name in ("a", "b", "without"):
        study = make(tmp_path / name)
        for number in range(8):
            study.add_trial()
            if name != "without":
                study.report(number, 0, float(number))
                study.finish(number, "pruned")
                study.finish(number, "failed")  # an end is recorded once
        drawn.append([study.add_trial() for _ in range(4)])
    assert drawn[0] == drawn[1] != drawn[2]


def test_all_combinations_are_tried_in_order_where_the_budget_pays_for_them(tmp_path):
    axes = [read_axis("training.epochs=1,2"), read_axis("training.lora={rank: 8},null")]
    study = make(tmp_path / "a", axes=axes)
    study.expect(4)
    drawn = [study.add_trial() for _ in range(5)]
    assert [(one["training.epochs"], one["training.lora"]) for one in drawn[:4]] == [
        (1, {"rank": 8}), (1, None), (2, {"rank": 8}), (2, None),
    ]  # fmt: skip
    assert drawn[4] is None


def test_no_settings_are_drawn_twice(tmp_path):
    study = make(tmp_path / "a", axes=[read_axis("training.batch_size=1..6")])
    drawn = [study.add_trial()["training.batch_size"] for _ in range(6)]
    assert sorted(drawn) == [1, 2, 3, 4, 5, 6]


def test_a_journal_file_is_a_storage(tmp_path):
    url = f"journal:{tmp_path / 'study.log'}"
    first = make(tmp_path, url=url).add_trial()
    assert make(tmp_path, url=url).settings == [first]


@pytest.mark.parametrize("url", ["sqlite:////nowhere/at/all/study.db", "nosuch://x", "study.db", "journal:/nowhere/x"])
def test_a_storage_that_cannot_be_written_is_refused(tmp_path, url):
    with pytest.raises(UserError) as refused:
        make(tmp_path, url=url)
    assert refused.value.where == f"--storage {url}"
    assert "leave --storage out" in refused.value.fix


def test_importance_names_the_key_that_matters(tmp_path):
    study = make(tmp_path / "a")
    for number in range(8):
        rate = study.add_trial()["training.learning_rate"]
        study.report(number, 0, rate)
    shares = study.importance()
    assert shares["training.learning_rate"] > shares["training.epochs"]
    assert make(tmp_path / "b").importance() == {}
