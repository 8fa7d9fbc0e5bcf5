"""The end of a search: the winner's recipes, and the scores on the test rows, which are read only here."""

import json
from dataclasses import replace
from typing import Any

from minisft.comparison.shared_files import begin_variant
from minisft.console import say, warn
from minisft.errors import UserError
from minisft.files import write_atomically
from minisft.recipe import Recipe, dump_recipe
from minisft.results import score_keys
from minisft.run_folder import RunFolder, step_of
from minisft.search.rung_losses import read_losses
from minisft.search.space import checked
from minisft.search.statistics import estimate
from minisft.search.trial_pool import Job
from minisft.search.trial_runner import TrialRunner
from minisft.search.trials import SHARED_FILES, Trials


def write_best_recipes(trials: Trials, best: int, recipe: Recipe) -> None:
    """Write best.yaml, which reproduces the best trial, and best_all_data.yaml, which trains on all train rows.

    Args:
        trials: The trials.
        best: Number of the best one.
        recipe: The recipe as the user gave it, with its test rows.
    """
    own = replace(trials.recipe_of(best), output=str(trials.output / "best"))
    every = replace(checked(recipe, trials.study.settings[best]), output=str(trials.output / "best_all_data"))
    write_atomically(
        trials.output / "best.yaml",
        f"# Gives the weights of trials/{best} bit for bit: trained without the validation rows.\n" + dump_recipe(own),
    )
    write_atomically(
        trials.output / "best_all_data.yaml",
        "# The best settings on all train rows. This is a second run, with other weights than the winner's.\n"
        + dump_recipe(every),
    )


def score_on_test_rows(
    runner: TrialRunner, best: int, earlier: dict[str, Any], *, defaults: bool
) -> dict[str, Any] | None:
    """Score base, defaults and best on the test rows, once for each winner; None if there are no test rows.

    Args:
        runner: Trains the recipe's own settings to the end, if no trial has done so.
        best: Number of the best trial.
        earlier: The content of search.json when this command began.
        defaults: Whether the recipe's own settings are scored too.

    Returns:
        The field `test` of search.json.

    Raises:
        UserError: The scoring failed.
    """
    trials = runner.trials
    root = trials.output / "test"
    ledger = json.loads((root / "dataset" / "ledger.json").read_text(encoding="utf-8"))
    if ledger["rows"]["test"] == 0:
        warn("there are no test rows, so the winner is not scored on rows that chose nothing: set data.test_fraction")
        return None
    scored = earlier.get("test")
    if scored and earlier["best"]["number"] == best and (scored["defaults"] or not defaults):
        return dict(scored)
    # 1. The models.
    winner = trials.run(best)
    own = _train_defaults(runner) if defaults else None
    models = {f"best-{_last_step(winner)}": str(winner.model)}
    if own is not None and own != winner:
        models = {f"defaults-{_last_step(own)}": str(own.model), **models}
    # 2. Their scores, in a process of the pool.
    say("scoring on the test rows, which nothing has read until now: " + ", ".join(["base", *models]))
    job = Job(
        "score",
        str(root),
        str(trials.output / "test.log"),
        losses=str(trials.output / "losses"),
        trust_remote_code=trials.recipe.trust_remote_code,
        models=models,
    )
    with runner.progress.waiting("scoring on the test rows"):
        for _, outcome in runner.pool.perform([job], lambda: None):
            if outcome.status:
                raise UserError(root, f"scoring failed: {outcome.error}", f"see {job.log}, and pass --resume")
    # 3. What search.json says of them.
    results = json.loads((root / "evaluation" / "results.json").read_text(encoding="utf-8"))
    entries = {entry["checkpoint"].partition("-")[0]: entry for entry in results["checkpoints"]}
    entries["base"] = results["base"]
    if own == winner:
        entries["defaults"] = entries["best"]
    return {name: _test_entry(trials, entries, name) for name in ("base", "defaults", "best")}


def _test_entry(trials: Trials, entries: dict[str, Any], name: str) -> dict[str, Any] | None:
    if name not in entries:
        return None
    file = "best" if entries[name] is entries["best"] else name
    rows = read_losses(trials.output / "losses" / f"test-{file}.npz", 0)
    loss = estimate(rows, trials.seed)
    scores = {key: entries[name][key] for key in score_keys(entries[name])}
    return {"loss": loss.value, "low": loss.low, "high": loss.high, "rows": len(rows.sums), **scores}


def _train_defaults(runner: TrialRunner) -> RunFolder | None:
    """Train the recipe's own settings to the end, from the trial that has them if there is one; None if they fail."""
    trials = runner.trials
    trial = next(filter(trials.is_own, range(len(trials))), None)
    if trial is not None and trial in trials.failed:
        return None
    run = RunFolder(trials.output / "defaults") if trial is None else trials.run(trial)
    if run.is_trained():
        return run
    say("training the recipe's own settings to the end, to compare the winner with them")
    recipe = replace(trials.recipe, output=str(run.root))
    if trial is None:
        begin_variant(recipe, [trials.output / "data"], SHARED_FILES)
    job = Job(
        "train",
        str(run.root),
        str(trials.output / "defaults.log" if trial is None else trials.log(trial)),
        trial=trial,
        fingerprint=trials.rows.base.fingerprint,
        trust_remote_code=recipe.trust_remote_code,
    )
    with runner.progress.waiting("training the recipe's own settings"):
        for _, outcome in runner.pool.perform([job], lambda: None):
            if outcome.status:
                warn(f"the recipe's own settings failed, and are not scored: {outcome.error}")
                return None
    return run


def _last_step(run: RunFolder) -> int:
    return step_of(run.list_checkpoints()[-1])
