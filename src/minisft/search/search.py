"""The search: trials pause at rungs, the better half goes on, and the winner is an ordinary run that is complete.

Everything that is decided follows from the losses on disk and from the settings in Optuna's storage. A search that was
killed replays its decisions from them, and goes on with what is missing.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisft.comparison.shared_files import begin_variant
from minisft.console import say, warn
from minisft.errors import UserError
from minisft.files import hold_lock, write_atomically
from minisft.optional_packages import require_package
from minisft.recipe import Recipe, dump_recipe
from minisft.run_folder import RunFolder, run_identity
from minisft.search.budget import (
    BRACKET,
    RUNGS,
    Budget,
    affordable_trials,
    bracket_sizes,
    read_budget,
    trials_cost,
)
from minisft.search.halving import best_and_ties, decide
from minisft.search.page import write_search_page
from minisft.search.progress import SearchProgress
from minisft.search.rung_losses import read_losses, read_seconds, rung_steps
from minisft.search.space import (
    Axis,
    Choices,
    Range,
    Settings,
    checked,
    combinations,
    count_combinations,
    default_options,
    holds,
    own_settings,
    read_axes,
)
from minisft.search.statistics import RowLosses, estimate
from minisft.search.study import Study, default_storage
from minisft.search.trial_pool import Job, TrialPool
from minisft.text import duration

if TYPE_CHECKING:
    from minisft.training.batching import Sizes

RESULT = "search.json"
_DEFAULT_VALIDATION = 0.1
_MOST_PROBES = 3  # trials that are tried to measure the time of a run
_ENOUGH_ROWS = 20
_SHARED = ("dataset", "base_model.json")


@dataclass(frozen=True)
class SearchOptions:
    """The options of `minisft search`.

    Args:
        varied: `KEY=LOW..HIGH` and `KEY=A,B,C` words; none: learning rate, epochs, batch size and LoRA's rank.
        budget: `30m`, `3x` or `20`; None: every combination of listed values, or 8 trials if a range is varied.
        validation: Fraction of the train conversations on which trials are compared; None: the recipe's
            `data.validation_fraction`, or 0.1.
        workers: Number of processes that train trials at the same time.
        storage: URL of Optuna's storage; None: a SQLite file in the output folder.
        seed: Seed of the sampler and of the bootstrap.
        resume: Go on with the search in the output folder.
        defaults: Whether the recipe's own settings are trained to the end too, to be scored beside the winner.
    """

    varied: tuple[str, ...] = ()
    budget: str | None = None
    validation: float | None = None
    workers: int = 1
    storage: str | None = None
    seed: int = 0
    resume: bool = False
    defaults: bool = True

    def __post_init__(self) -> None:
        if self.validation is not None and not 0 < self.validation < 1:
            problem = f"must be above 0 and below 1, and is {self.validation:g}"
            raise UserError("--validation", problem, "give a fraction of the train conversations such as 0.1")
        if self.seed < 0:
            raise UserError("--seed", f"{self.seed} is below zero", "give zero or more")


def search(
    recipe: Recipe, options: SearchOptions, on_result: Callable[[dict[str, Any]], object] | None = None
) -> dict[str, Any]:
    """Search the best settings of a recipe; return the content of search.json.

    Args:
        recipe: The recipe; its `output` is the folder of the search.
        options: What to vary, and for how long.
        on_result: Called with the content of search.json at the end.

    Raises:
        UserError: The options, the recipe, the data or the storage do not allow it, or all trials failed.
        StoppedError: SIGINT or SIGTERM arrived; the trials that were running have saved their work.
    """
    # 1. Refuse before anything is written.
    require_package("minisft search", "optuna")
    budget = None if options.budget is None else read_budget(options.budget)
    axes = read_axes(options.varied or _default_axes(recipe), recipe)
    _require_feasible(recipe, axes)
    output = Path(recipe.output)
    _refuse_folder(output, resume=options.resume)
    with _only_search(output), TrialPool(options.workers, output / "processes.log") as pool:
        # 2. Open the study, and prepare the data: validation rows for the trials, test rows for the end.
        study = Study(options.storage or default_storage(output), f"minisft {output.name}", axes, options.seed)
        trials_recipe = _with_validation(recipe, options.validation)
        begun = bool(study.settings)
        _refuse_other_study(study, _identity(trials_recipe, options, axes), output, resume=options.resume)
        fingerprint = _prepare(recipe, trials_recipe, output, begun=begun)
        # 3. Train the trials.
        made = _Search(trials_recipe, options, axes, study, pool, fingerprint, _read_sizes(output))
        made.run(budget)
        # 4. Score the winner on the test rows, once.
        result = made.finish(recipe)
    if on_result is not None:
        on_result(result)
    return result


class _Search:
    """A search under way.

    Args:
        recipe: The recipe of the trials, whose test rows are the validation rows.
        options: The options of the command.
        axes: What is varied.
        study: The trials in Optuna's storage.
        pool: The processes.
        fingerprint: Fingerprint of the base model's weights.
        sizes: Tokens of the train rows.
    """

    def __init__(
        self,
        recipe: Recipe,
        options: SearchOptions,
        axes: Sequence[Axis],
        study: Study,
        pool: TrialPool,
        fingerprint: str,
        sizes: "Sizes",
    ) -> None:
        self.recipe, self.options, self.axes, self.study, self.pool = recipe, options, axes, study, pool
        self.fingerprint, self.sizes = fingerprint, sizes
        self.output = Path(recipe.output)
        self.losses: dict[int, list[RowLosses]] = {}  # of each trial, at the rungs that it has reached
        self.steps: dict[int, list[int]] = {}  # of each trial, the steps of all rungs
        self.stopped: dict[int, str] = {}
        self.failed: dict[int, str] = {}
        self.test: dict[str, Any] | None = None
        self.earlier = _read_result(self.output)
        self.progress = SearchProgress(self.output)
        for folder in ("trials", "losses"):
            (self.output / folder).mkdir(exist_ok=True)

    # --- the trials

    def run(self, budget: Budget | None) -> None:
        """Train the trials of all brackets, and write search.json after every rung.

        Raises:
            UserError: The budget is too small, or all trials failed.
        """
        trials = self._number_of_trials(budget)
        brackets: list[int] = list(self.study.facts.get("brackets", []))
        brackets += bracket_sizes(trials - sum(brackets))
        self.study.record("brackets", brackets)
        self.study.expect(sum(brackets))
        self.progress.total = sum(trials_cost(size) for size in brackets)
        start = 0
        for size in brackets:
            self._run_bracket(range(start, start + size))
            start += size
        if self._best_and_ties() is None:
            first = min(self.failed)
            count = f"all {start}" if len(self.failed) == start else f"{len(self.failed)} of {start}"
            problem = f"{count} trials failed, and none reached its end; the first: {self.failed[first]}"
            raise UserError(self.output, problem, f"see {self._log(first)}; vary other values, or other keys")

    def _run_bracket(self, numbers: Sequence[int]) -> None:
        for _ in range(len(self.study.settings), numbers[-1] + 1):
            if not self._add_trial():
                break
        size = len(numbers)
        numbers = [number for number in numbers if number < len(self.study.settings)]
        alive = [number for number in numbers if self._load(number)]
        stopped: dict[int, str] = {}  # at the rung before: kept until enough others have reached this one
        for rung, fraction in enumerate(RUNGS):
            # 1. Train; the place of a trial that fails goes to the best of those that were stopped at the rung before.
            self._train(alive, rung)
            spare = sorted(stopped, key=lambda number: self.losses[number][-1].loss)
            while spare and sum(len(self.losses[number]) > rung for number in numbers) < len(alive):
                self._train([spare[0]], rung)
                stopped.pop(spare.pop(0))
            for number, reason in stopped.items():
                self._stop(number, reason)
            # 2. Decide.
            reached = [[self.losses[n][r] for n in numbers if len(self.losses[n]) > r] for r in range(rung + 1)]
            if not reached[rung]:
                return
            decision = decide(size, rung, reached, self.options.seed)
            alive, stopped = decision.going_on, dict(decision.stopped)
            if fraction == 1:
                for number in alive:
                    self.study.finish(number, "complete", self.losses[number][-1].loss)
            self.write()

    def _add_trial(self) -> bool:
        """Add a trial; the first one has the recipe's own settings, unless every combination is tried in order."""
        own = own_settings(self.recipe, self.axes)
        is_first = not self.study.settings and any(isinstance(axis, Range) for axis in self.axes)
        return self.study.add_trial(own if is_first and holds(self.axes, own) else None) is not None

    def _load(self, number: int) -> bool:
        """Read what is known of a trial, and make its run folder; return whether it can be trained."""
        self.losses.setdefault(number, [])
        if number in self.steps:
            return True
        try:
            recipe = self._recipe_of(number)
            begin_variant(recipe, [self.output / "data"], _SHARED)
        except UserError as error:
            self._fail(number, str(error))
            return False
        self.steps[number] = rung_steps(self.sizes, recipe)
        return True

    def _train(self, numbers: Sequence[int], rung: int) -> None:
        """Train trials to a rung, and read their losses there."""
        jobs = {}
        for number in numbers:
            if self._losses_file(number, rung).exists():
                self._reach(number, rung)
            elif self._failure_file(number).exists():  # at this rung: it reached the ones before
                self.failed[number] = str(json.loads(self._failure_file(number).read_text())["error"])
                self.study.finish(number, "failed")
            else:
                jobs[number] = self._job(number, rung)
        self.progress.show(self.study.settings, self.result()["trials"], jobs.values(), rung, self.steps)
        with self.progress.waiting():
            for job, outcome in self.pool.perform(list(jobs.values()), self.progress.refresh):
                assert job.trial is not None
                if outcome.status == 0:
                    self._reach(job.trial, rung)
                    self.progress.done += RUNGS[rung] - (RUNGS[rung - 1] if rung else 0.0)
                    self.progress.reached(self.result()["trials"][job.trial], RUNGS[rung])
                else:
                    self._fail(job.trial, outcome.error)
                self.write()

    def _job(self, number: int, rung: int) -> Job:
        recipe, steps = self._recipe_of(number), self.steps[number]
        is_last = rung == len(RUNGS) - 1
        return Job(
            "train",
            recipe.output,
            str(self._log(number)),
            losses=str(self._losses_file(number, rung)),
            trial=number,
            step=None if is_last else steps[rung],
            temporary_steps=tuple(step for step in steps[:-1] if not self._is_saved_anyway(recipe, step)),
            fingerprint=self.fingerprint,
            trust_remote_code=recipe.trust_remote_code,
        )

    def _is_saved_anyway(self, recipe: Recipe, step: int) -> bool:
        """Return whether an ordinary run of the recipe has a checkpoint of this step."""
        training = recipe.training
        if training.save_every != "epoch":
            return step % int(training.save_every) == 0
        batch = training.global_batch
        return not training.packing and step % -(-len(self.sizes) // batch) == 0

    def _reach(self, number: int, rung: int) -> None:
        """Read the losses of a trial at a rung, and report the loss to Optuna."""
        if len(self.losses[number]) > rung:
            return
        self.losses[number].append(read_losses(self._losses_file(number, rung), number))
        self.study.report(number, rung, self.losses[number][rung].loss)

    def _fail(self, number: int, error: str) -> None:
        warn(f"trial {number} failed, and the others go on: {error}")
        write_atomically(self._failure_file(number), json.dumps({"error": error}) + "\n")
        self.failed[number] = error
        self.study.finish(number, "failed")

    def _stop(self, number: int, reason: str) -> None:
        from minisft.training.checkpoints import drop_optimizer_states

        self.stopped[number] = reason
        self.study.finish(number, "pruned")
        if not (self.options.defaults and self._is_own(number)):
            folder = RunFolder(self.output / "trials" / str(number)).checkpoints
            drop_optimizer_states(folder, keep=folder)  # none is kept: this trial does not go on

    # --- the budget

    def _number_of_trials(self, budget: Budget | None) -> int:
        """Return how many trials the budget pays for.

        Raises:
            UserError: It pays for less than one.
        """
        listed = count_combinations(self.axes)
        if budget is None:
            only_lists = listed is not None and all(isinstance(axis, Choices) for axis in self.axes)
            trials = listed if only_lists and listed is not None else BRACKET
        elif budget.kind == "trials":
            trials = int(budget.amount)
        else:
            runs = budget.amount
            if budget.kind == "seconds":
                seconds = self._seconds_of_run()
                runs /= seconds
                if runs < 1:
                    problem = f"one run of this recipe takes about {duration(seconds)} here, and no trial would end"
                    fix = f"give at least {1 + int(seconds / 60)}m, and --resume: the trial that was begun goes on"
                    raise UserError("--budget", problem, fix)
            trials = max(1, affordable_trials(runs / self._relative_length()))
        return trials if listed is None else min(trials, listed)

    def _relative_length(self) -> float:
        """Return the mean length of a trial, in runs of the recipe: only varied epochs and steps change it."""
        for axis in self.axes:
            if axis.key in ("training.epochs", "training.max_steps"):
                own = own_settings(self.recipe, [axis])[axis.key]
                values = [axis.low, axis.high] if isinstance(axis, Range) else [axis.value(t) for t in axis.texts]
                if own and all(isinstance(value, int | float) for value in values):
                    return sum(map(float, values)) / len(values) / float(own)
        return 1.0

    def _seconds_of_run(self) -> float:
        """Return the seconds of a full run with its validation, measured once with the first rung of a trial."""
        known = self.study.facts.get("seconds_of_run")
        if known is not None:
            return float(known)
        for number in range(_MOST_PROBES):
            if len(self.study.settings) <= number and not self._add_trial():
                break
            if self._load(number):
                self._train([number], 0)
            if self.losses[number]:
                training = _training_seconds(RunFolder(self.output / "trials" / str(number)), self.steps[number][0])
                validation = read_seconds([self._losses_file(number, 0)])
                length = self.steps[number][-1] / self.steps[number][0]
                seconds = (training * length + validation * len(RUNGS)) / self._relative_length()
                self.study.record("seconds_of_run", seconds)
                return seconds
        problem = f"the first trials failed, so the time of a run is unknown: {next(iter(self.failed.values()), '')}"
        raise UserError("--budget", problem, "give a number of trials, or fix what made them fail")

    # --- the end

    def finish(self, recipe: Recipe) -> dict[str, Any]:
        """Write the winner's recipes, score it beside the base model and the recipe's own settings, write the page.

        Args:
            recipe: The recipe as the user gave it, with its test rows.
        """
        found = self._best_and_ties()
        assert found is not None
        best, settings = found[0], self.study.settings[found[0]]
        own = replace(self._recipe_of(best), output=str(self.output / "best"))
        every = replace(checked(recipe, settings), output=str(self.output / "best_all_data"))
        write_atomically(
            self.output / "best.yaml",
            f"# Gives the weights of trials/{best} bit for bit: trained without the validation rows.\n"
            + dump_recipe(own),
        )
        write_atomically(
            self.output / "best_all_data.yaml",
            "# The best settings on all train rows. This is a second run, with other weights than the winner's.\n"
            + dump_recipe(every),
        )
        self.test = self._score(best)
        self.write()
        result = self.result()
        self.progress.print_verdict(result)
        say(f"written: {write_search_page(self.output)}")
        return result

    def _score(self, best: int) -> dict[str, Any] | None:
        """Score base, defaults and best on the test rows; once for each winner."""
        root = self.output / "test"
        ledger = json.loads((root / "dataset" / "ledger.json").read_text(encoding="utf-8"))
        if ledger["rows"]["test"] == 0:
            warn(
                "there are no test rows, so the winner is not scored on rows that chose nothing: set data.test_fraction"
            )
            return None
        scored = self.earlier.get("test")
        if scored and self.earlier["best"]["number"] == best and (scored["defaults"] or not self.options.defaults):
            return dict(scored)
        winner = RunFolder(self.output / "trials" / str(best))
        defaults = self._train_defaults(best)
        models = {f"best-{_last_step(winner)}": str(winner.model)}
        if defaults is not None and defaults != winner:
            models = {f"defaults-{_last_step(defaults)}": str(defaults.model), **models}
        say("scoring on the test rows, which nothing has read until now: " + ", ".join(["base", *models]))
        job = Job(
            "score",
            str(root),
            str(self.output / "test.log"),
            losses=str(self.output / "losses"),
            trust_remote_code=self.recipe.trust_remote_code,
            models=models,
        )
        with self.progress.waiting("scoring on the test rows"):
            for _, outcome in self.pool.perform([job], lambda: None):
                if outcome.status:
                    raise UserError(root, f"scoring failed: {outcome.error}", f"see {job.log}, and pass --resume")
        results = json.loads((root / "evaluation" / "results.json").read_text(encoding="utf-8"))
        entries = {entry["checkpoint"].partition("-")[0]: entry for entry in results["checkpoints"]}
        entries["base"] = results["base"]
        if defaults == winner:
            entries["defaults"] = entries["best"]
        return {name: self._test_entry(entries, name) for name in ("base", "defaults", "best")}

    def _test_entry(self, entries: dict[str, Any], name: str) -> dict[str, Any] | None:
        if name not in entries:
            return None
        file = "best" if entries[name] is entries["best"] else name
        rows = read_losses(self.output / "losses" / f"test-{file}.npz", 0)
        loss = estimate(rows, self.options.seed)
        scores = {key: entries[name][key] for key in ("bleu", "chrf") if key in entries[name]}
        return {"loss": loss.value, "low": loss.low, "high": loss.high, "rows": len(rows.sums), **scores}

    def _train_defaults(self, best: int) -> RunFolder | None:
        """Train the recipe's own settings to the end, from the trial that has them if there is one."""
        if not self.options.defaults:
            return None
        trial = next((number for number in range(len(self.study.settings)) if self._is_own(number)), None)
        if trial is not None and trial in self.failed:
            return None
        root = self.output / ("defaults" if trial is None else f"trials/{trial}")
        run = RunFolder(root)
        if run.is_trained():
            return run
        say("training the recipe's own settings to the end, to compare the winner with them")
        recipe = replace(self.recipe, output=str(root))
        if trial is None:
            begin_variant(recipe, [self.output / "data"], _SHARED)
        job = Job(
            "train",
            str(root),
            str(self._log(trial)) if trial is not None else str(self.output / "defaults.log"),
            trial=trial,
            fingerprint=self.fingerprint,
            trust_remote_code=recipe.trust_remote_code,
        )
        with self.progress.waiting("training the recipe's own settings"):
            for _, outcome in self.pool.perform([job], lambda: None):
                if outcome.status:
                    warn(f"the recipe's own settings failed, and are not scored: {outcome.error}")
                    return None
        return run

    def _best_and_ties(self) -> tuple[int, list[int]] | None:
        sound = {number: reached for number, reached in self.losses.items() if number not in self.failed}
        return best_and_ties(sound, self.options.seed)

    # --- what is written

    def write(self) -> None:
        """Write search.json, complete or not at all."""
        write_atomically(self.output / RESULT, json.dumps(self.result(), indent=1) + "\n")

    def result(self) -> dict[str, Any]:
        """Return the content of search.json."""
        found = self._best_and_ties()
        best = None
        if found is not None:
            best = {
                "number": found[0],
                "settings": self.study.settings[found[0]],
                "run": f"trials/{found[0]}",
                "recipe": "best.yaml",
                "recipe_all_data": "best_all_data.yaml",
            }
        return {
            "objective": "loss",
            "rungs": list(RUNGS),
            "vary": [str(axis) for axis in self.axes],
            "validation_rows": next((len(reached[0].sums) for reached in self.losses.values() if reached), None),
            "trials": [self._entry(number, settings) for number, settings in enumerate(self.study.settings)],
            "best": best,
            "indistinguishable": found[1] if found is not None else [],
            "importance": self.study.importance() if found is not None else {},
            "test": self.test,
        }

    def _entry(self, number: int, settings: Settings) -> dict[str, Any]:
        reached = self.losses.get(number, [])
        rungs = []
        for rung, rows in enumerate(reached):
            loss = estimate(rows, self.options.seed)
            step = self.steps[number][rung]
            rungs.append(
                {"fraction": RUNGS[rung], "step": step, "objective": loss.value, "low": loss.low, "high": loss.high}
            )
        last: dict[str, Any] = rungs[-1] if rungs else {}
        state = "failed" if number in self.failed else "pruned" if number in self.stopped else "running"
        if state == "running" and len(rungs) == len(RUNGS):
            state = "complete"
        entry = {
            "number": number,
            "settings": settings,
            "state": state,
            "steps": last.get("step", 0),
            "objective": last.get("objective"),
            "low": last.get("low"),
            "high": last.get("high"),
            "run": f"trials/{number}",
            "rungs": rungs,
            "seconds": _training_seconds(RunFolder(self.output / "trials" / str(number)), last.get("step", 0)),
        }
        if number in self.failed:
            entry["error"] = self.failed[number]
        if number in self.stopped:
            entry["stopped"] = self.stopped[number]
        return entry

    # --- paths and recipes

    def _recipe_of(self, number: int) -> Recipe:
        recipe = checked(self.recipe, self.study.settings[number])
        return replace(recipe, output=str(self.output / "trials" / str(number)))

    def _is_own(self, number: int) -> bool:
        return self.study.settings[number] == own_settings(self.recipe, self.axes)

    def _losses_file(self, number: int, rung: int) -> Path:
        return self.output / "losses" / f"trial-{number}-rung-{rung}.npz"

    def _failure_file(self, number: int) -> Path:
        return self.output / "losses" / f"trial-{number}-failed.json"

    def _log(self, number: int) -> Path:
        return self.output / "trials" / f"{number}.log"


# --- before the first trial -------------------------------------------------------------------------------


def _default_axes(recipe: Recipe) -> list[str]:
    from minisft.models import load_config, resolve_model

    resolved = resolve_model(recipe.model, recipe.trust_remote_code)
    config = load_config(resolved.folder, recipe.trust_remote_code).get_text_config()
    options = default_options(recipe, int(config.hidden_size))
    say("nothing is named, so these are varied: " + " ".join(f"--vary {option}" for option in options))
    return options


def _require_feasible(recipe: Recipe, axes: Sequence[Axis]) -> None:
    """Check every listed value on this machine: an optimizer may be missing, or a schedule refuse its arguments."""
    from minisft.training.run_training import require_feasible

    require_feasible(recipe)
    for axis in axes:
        if isinstance(axis, Choices):
            for settings in combinations([axis]):
                require_feasible(checked(recipe, settings))


def _refuse_folder(output: Path, *, resume: bool) -> None:
    """Refuse an output folder that is no new one, or under --resume none of a search."""
    is_search = (output / RESULT).exists() or (output / ".search.lock").exists()
    if resume and not is_search:
        raise UserError(output, "there is no search to resume", "leave --resume out")
    if is_search and not resume and (output / RESULT).exists():
        raise UserError(output, "holds a search already", "pass --resume to go on with it, or choose another `output`")
    if not is_search and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(output, "this is neither a new folder nor that of a search", "name a new folder as `output`")


@contextlib.contextmanager
def _only_search(output: Path) -> Iterator[None]:
    """Create the output folder, and hold its lock."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"this `output` folder cannot be made ({error.strerror})"
        raise UserError(output, problem, "name another folder") from None
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hold_lock(output / ".search.lock"))
        except BlockingIOError:
            raise UserError(output, "another search is writing into this folder", "wait for it to end") from None
        yield


def _with_validation(recipe: Recipe, fraction: float | None) -> Recipe:
    """Return the recipe of the trials: its test rows are validation rows, taken from the train rows."""
    data = recipe.data
    share = fraction or data.validation_fraction or _DEFAULT_VALIDATION
    if data.test is not None or data.test_fraction == 0:
        return replace(recipe, data=replace(data, test=None, test_fraction=share, validation_fraction=None))
    return replace(recipe, data=replace(data, validation_fraction=share))


def _identity(recipe: Recipe, options: SearchOptions, axes: Sequence[Axis]) -> dict[str, Any]:
    """Return what must stay the same when a search goes on."""
    varied = {axis.key for axis in axes}
    kept = {key: value for key, value in run_identity(recipe).items() if key not in varied}
    return json.loads(json.dumps({**kept, "--vary": [str(axis) for axis in axes], "--seed": options.seed}, default=str))


def _refuse_other_study(study: Study, identity: dict[str, Any], output: Path, *, resume: bool) -> None:
    """Record the identity of a new study; refuse a storage that holds another one.

    Raises:
        UserError: The message names what differs.
    """
    earlier = study.facts.get("identity")
    if earlier is None or not study.settings:
        study.record("identity", identity)
        return
    changed = [key for key in {**earlier, **identity} if earlier.get(key) != identity.get(key)]
    if changed:
        key = changed[0]
        values = f"{key} is {earlier.get(key)!r} there, {identity.get(key)!r} here"
        problem = f"the storage holds the study of another search: {values}"
        raise UserError(output, problem, "restore what changed, or choose another `output`")
    if not resume:
        raise UserError(output, "the storage holds this search already", "pass --resume, or choose another `output`")


def _prepare(recipe: Recipe, trials_recipe: Recipe, output: Path, *, begun: bool) -> str:
    """Prepare the rows of the trials and the test rows; return the fingerprint of the base model.

    Raises:
        UserError: The data cannot be used, hold no validation row, or are not those that the search began with.
    """
    from minisft.data.preparation import prepare
    from minisft.models import resolve_model, weights_fingerprint
    from minisft.run_folder import record_base_model
    from minisft.run_start import open_run

    resolved = resolve_model(recipe.model, recipe.trust_remote_code)
    fingerprint = weights_fingerprint(resolved.folder)
    tested = replace(recipe, data=replace(recipe.data, validation_fraction=None))
    for name, one in (("data", trials_recipe), ("test", tested)):
        folder = replace(one, output=str(output / name))
        with open_run(folder, prepares_only=True) as run:
            record_base_model(run, str(resolved), fingerprint)
            try:
                prepared = prepare(folder, model_folder=resolved.folder, begun=begun and run.dataset.exists())
            except UserError as error:
                if not begun:
                    raise
                raise UserError(output, error.problem, "restore what changed, or choose another `output`") from None
        if name == "data":
            if prepared.test_rows == 0:
                problem = f"no conversation is left to validate on, of {prepared.train_rows:,}"
                raise UserError("--validation", problem, "give more conversations with different first prompts")
            if prepared.test_rows < _ENOUGH_ROWS:
                warn(f"{prepared.test_rows} validation rows tell few settings apart: raise --validation")
            say(f"data: {prepared.train_rows:,} train rows, {prepared.test_rows:,} validation rows")
    return fingerprint


def _read_sizes(output: Path) -> "Sizes":
    from minisft.data.prepared import load_split
    from minisft.training.batching import measure_lengths

    return measure_lengths(load_split(output / "data", "train"))


# --- reading runs -----------------------------------------------------------------------------------------


def _read_result(output: Path) -> dict[str, Any]:
    path = output / RESULT
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _training_seconds(run: RunFolder, step: int) -> float:
    """Return the seconds of the steps of a run up to a step."""
    if not run.metrics.exists():
        return 0.0
    lines = (json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines() if line.endswith("}"))
    return round(sum(line["seconds"] for line in lines if line["step"] <= step), 3)


def _last_step(run: RunFolder) -> int:
    from minisft.run_folder import step_of

    return step_of(run.list_checkpoints()[-1])
