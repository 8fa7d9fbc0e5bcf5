"""A row of random words and a row with another row's answer, planted among 400, show in the losses of training."""

import random

import pytest

import minisft
from minisft.audit.findings import Findings
from tests.tiny import WORDS, word_tokenizer, write_tiny_model

_ROWS = 400
_SEEDS = 20


def planted(seed):
    """Return 400 rows in which an answer follows from the topic of its prompt, but for the two that were planted."""
    choose = random.Random(seed)
    answers = {topic: choose.choices(WORDS, k=8) for topic in WORDS}
    rows = []
    for number in range(_ROWS):
        topic = choose.choice(WORDS)
        prompt = " ".join([*choose.choices(WORDS, k=3), "about", topic])
        rows.append({"id": f"row-{number}", "prompt": prompt, "completion": " ".join(answers[topic])})
    noise, swapped = choose.sample(range(_ROWS), 2)
    rows[noise]["completion"] = " ".join(choose.choices(WORDS, k=8))
    topic = rows[swapped]["prompt"].split()[-1]
    rows[swapped]["completion"] = " ".join(answers[choose.choice([other for other in WORDS if other != topic])])
    return rows, f"row-{noise}", f"row-{swapped}"


@pytest.mark.long
def test_planted_rows_have_the_highest_losses(tmp_path):
    first = near = 0
    for seed in range(_SEEDS):
        folder = tmp_path / str(seed)
        model = write_tiny_model(folder / "model", seed=seed, tokenizer=word_tokenizer(["about"]))
        rows, noise, swapped = planted(seed)
        overrides = {
            "seed": seed, "data.template": "mistral", "data.test_fraction": 0.0, "training.epochs": 6,
            "training.batch_size": 16, "training.learning_rate": 1e-2, "training.precision": "fp32",
        }  # fmt: skip
        run = minisft.train(None, overrides, model=str(model), data=rows, output=str(folder / "run"))
        found = minisft.why(run)
        assert isinstance(found, Findings)
        hardest = [row.id for row in found.hardest]
        first += noise == hardest[0]
        near += swapped in hardest
    assert (first >= 19, near >= 15) == (True, True), f"first {first}, among the ten {near} of {_SEEDS}"
