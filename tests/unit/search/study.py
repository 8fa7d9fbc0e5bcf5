"""A folder as `minisft search` writes it: search.json, and a run folder for each trial."""

import json
import math
from typing import Any


def write_study(folder, trials=8, failed=(7,), keys=("training.learning_rate",), **more):
    """Write a study in which trial 3 is best and trial 4 cannot be told apart from it; return its search.json."""
    values = {
        "training.learning_rate": lambda number: 1e-5 * 10 ** (number / 4),
        "training.epochs": lambda number: 1 + number % 3,
        "training.lora.target_modules": lambda number: ["q_proj", "v_proj"][: 1 + number % 2],
    }
    entries = []
    for number in range(trials):
        loss = 1.3 + 0.05 * abs(number - 3.2)
        steps = 24 if number in (3, 4) else 6
        scores = {"objective": loss, "low": loss - 0.03, "high": loss + 0.03}
        entry: dict[str, Any] = {
            "number": number,
            "settings": {key: values[key](number) if key in values else key for key in keys},
            "state": "complete" if steps == 24 else "pruned",
            "steps": steps,
            "run": f"trials/{number}",
            **scores,
        }
        entry["seconds"] = 10.0 * steps
        entry["rungs"] = [
            {"fraction": step / 24, "step": step, "objective": loss + 1 / step, "low": loss, "high": loss + 2 / step}
            for step in (3, 6, 12, 24)
            if step <= steps
        ]
        if number in failed:
            entry |= {"state": "failed", "objective": None, "low": None, "high": None, "error": "out of memory"}
            entry["rungs"] = []
        run = folder / "trials" / str(number)
        run.mkdir(parents=True)
        lines = [
            {"step": step, "loss": None if number in failed else loss + math.exp(-step), "grad_norm": 1.0}
            for step in range(1, steps + 1)
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        entries.append(entry)
    (folder / "best.yaml").write_text("model: m\ntraining: {learning_rate: 5.6e-5}\n", encoding="utf-8")
    settings = entries[3]["settings"]
    study = {
        "objective": "loss",
        "rungs": [3, 6, 12, 24],
        "trials": entries,
        "best": {"number": 3, "settings": settings, "run": "trials/3", "recipe": "best.yaml"},
        "indistinguishable": [4],
        "validation_rows": 40,
        "test": {
            "base": {"loss": 3.1, "low": 3.0, "high": 3.2, "rows": 50, "bleu": {"score": 0.4, "low": 0.1, "high": 0.8}},
            "defaults": None,
            "best": {"loss": 1.4, "low": 1.3, "high": 1.5, "rows": 50, "bleu": {"score": 9.1, "low": 8.0, "high": 9.9}},
        },
        **more,
    }
    (folder / "search.json").write_text(json.dumps(study), encoding="utf-8")
    return study
