"""What a search costs and whether it finds what running every setting to its end finds.

    python benchmarks/search.py --model smollm2-135m --data tm4_all.sharegpt.jsonl --output outputs/search-study

1. A search over `--rates`, without the run of the recipe's own settings.
2. Every rate trained to its end on the same rows by `minisft train`.
3. The search's winner against the best of all, row by row; the winner's weights against its own plain run, by hash; the
   time of the search against that of one full run, and the part of it that no step and no validation took.

It can be killed and called again: parts that are done are not repeated, and result.json has what is known so far. The
time of a search that was killed is that of its last part only, so it is marked. Only the times of the search and of
the winner's own run are used, so the other rates may be trained before, on a busy machine (`--full-runs-only`).
"""

import argparse
import hashlib
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from minisft.data.prepared import load_split
from minisft.models import resolve_model
from minisft.recipe import Recipe, dump_recipe, load_recipe, make_recipe
from minisft.run_folder import RunFolder, read_metrics
from minisft.search.rung_losses import compute_row_losses, read_losses, read_seconds, write_losses
from minisft.search.search_setup import with_validation
from minisft.search.statistics import RowLosses, clearly_worse, estimate

RATE = "training.learning_rate"
RATES = "1e-5,2e-5,5e-5,1e-4,2e-4,4e-4,7e-4,1e-3"


def main() -> None:
    """Take the parts that are missing, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", required=True, help="conversations")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rates", default=RATES)
    parser.add_argument("--limit", type=int, help="number of conversations")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--validation", type=float, default=0.1, help="fraction of the train conversations")
    parser.add_argument("--template", default="auto")
    parser.add_argument("--full-runs-only", metavar="RATES", help="train these rates to their end, without a search")
    parser.add_argument("--defaults", action="store_true", help="score the recipe's own settings too, at the end")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    result_file = options.output / "result.json"
    result: dict[str, Any] = json.loads(result_file.read_text()) if result_file.exists() else {}

    # 1. The search.
    keys = [
        ("model", options.model), ("output", str(options.output / "search")), ("data.source", options.data),
        ("data.limit", options.limit), ("data.template", options.template), ("data.invalid", "repair"),
        ("training.epochs", options.epochs), ("training.precision", "fp32"),
    ]  # fmt: skip
    recipe_file = options.output / "recipe.yaml"
    recipe_file.write_text(dump_recipe(make_recipe(keys)))
    trial_recipe = with_validation(load_recipe(recipe_file), options.validation)
    if options.full_runs_only:
        for rate in options.full_runs_only.split(","):
            train_to_the_end(trial_recipe, float(rate), options.output / "full", options.rates.split(",").index(rate))
        return
    words = [sys.executable, "-m", "minisft", "search", str(recipe_file), "--vary", f"{RATE}={options.rates}"]
    words += ["--validation", str(options.validation)]
    if "search_seconds" not in result:
        resumed = (options.output / "search" / "search.json").exists()
        started = time.perf_counter()
        subprocess.run([*words, "--no-defaults", *(["--resume"] if resumed else [])], check=True)
        result |= {"search_seconds": time.perf_counter() - started, "search_was_resumed": resumed}
        result_file.write_text(json.dumps(result, indent=1))
    found = json.loads((options.output / "search" / "search.json").read_text())

    # 2. Every rate to its end; the winner first, since its time is compared with that of the search.
    rows: dict[int, RowLosses] = {}
    for trial in sorted(found["trials"], key=lambda one: bool(one["number"] != found["best"]["number"])):
        number = trial["number"]
        rows[number] = train_to_the_end(trial_recipe, trial["settings"][RATE], options.output / "full", number)
    if options.defaults and not found["test"]["defaults"]:
        subprocess.run([*words, "--resume"], check=True)
        found = json.loads((options.output / "search" / "search.json").read_text())

    # 3. The comparison.
    result |= compare(options.output, found, [rows[number] for number in sorted(rows)])
    result_file.write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


def train_to_the_end(recipe: Recipe, rate: float, folder: Path, number: int) -> RowLosses:
    """Train with a rate by `minisft train` unless that is done, and return the losses of the validation rows."""
    run = RunFolder(folder / str(number))
    recipe = replace(recipe, output=str(run.root), training=replace(recipe.training, learning_rate=rate))
    folder.mkdir(exist_ok=True)
    recipe_file, losses = folder / f"{number}.yaml", folder / f"{number}.npz"
    recipe_file.write_text(dump_recipe(recipe))
    if not run.is_trained():
        resume = ["--resume"] if run.has_begun() else []
        subprocess.run([sys.executable, "-m", "minisft", "train", str(recipe_file), *resume], check=True)
    if not losses.exists():
        base, test = resolve_model(recipe.model).folder, load_split(run.root, "test")
        precision = recipe.training.precision
        write_losses(
            losses, compute_row_losses(run.model, test, precision=precision, trust_remote_code=False, base=base), 0.0
        )
    return read_losses(losses, number)


def compare(output: Path, found: dict[str, Any], rows: list[RowLosses]) -> dict[str, Any]:
    """Return the figures of the study."""
    winner = found["best"]["number"]
    best = min(rows, key=lambda one: one.loss).trial
    runs = [RunFolder(output / "full" / str(one.trial)) for one in rows]
    full_seconds = sum(line["seconds"] for line in read_metrics(runs[winner]))
    trials = [RunFolder(output / "search" / trial["run"]) for trial in found["trials"]]
    steps = sum(line["seconds"] for run in trials for line in read_metrics(run))
    validation = read_seconds(sorted((output / "search" / "losses").glob("trial-*.npz")))
    return {
        "full_losses": {
            f"{trial['settings'][RATE]:g}": vars(estimate(one))
            for trial, one in zip(found["trials"], rows, strict=True)
        },
        "winner": found["best"]["settings"][RATE],
        "best_of_all": found["trials"][best]["settings"][RATE],
        "winner_is_best_or_tied": winner not in clearly_worse(rows),
        "same_weights_as_its_plain_run": weights_hash(trials[winner]) == weights_hash(runs[winner]),
        "seconds_of_a_full_run": full_seconds,
        "steps_in_full_runs": steps / full_seconds,
        "validation_in_full_runs": validation / full_seconds,
        "steps_seconds": steps,
        "validation_seconds": validation,
        "test": found["test"],
    }


def weights_hash(run: RunFolder) -> str:
    """Return the SHA-256 of a run's final weights."""
    digest = hashlib.sha256()
    for path in sorted(run.model.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
