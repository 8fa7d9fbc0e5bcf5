"""The comparison: every variant is trained and scored by the ordinary commands, then all are measured side by side."""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from minisft.comparison.shared_files import begin_variant
from minisft.comparison.variants import FOLDER, Variant, choose_variants, read_axes, refuse_other_run, trajectory
from minisft.console import console, display, redraws, say, warn
from minisft.errors import UserError
from minisft.files import hold_lock, write_atomically
from minisft.processes import run_verb
from minisft.recipe import load_recipe
from minisft.replacement import KEPT_REASON
from minisft.report.comparison import Entry, write_comparison
from minisft.report.tables import comparison_table
from minisft.results import read_results
from minisft.run_folder import RunFolder
from minisft.run_start import refuse_foreign_folder, restore_replaced_run

_BASE_RESULT_CACHE = "evaluation/base/journal.jsonl"
_WIDE = 120  # characters; on a narrower terminal, scores are printed without their intervals
_MIN_NAME_WIDTH = 20  # characters; longer names are wrapped if they take more than a third of the terminal


@dataclass(frozen=True)
class CompareOptions:
    """The options of `minisft compare`.

    Args:
        path: Path of the recipe file.
        overrides: `key=value` words that hold for all variants.
        strategies: Such as "vanilla,zero2"; None means all four, unless something else is varied.
        varied: `key=value1,value2` words; every combination is a variant.
        evaluate: Whether each variant's checkpoints are scored too.
        force: whether finished variants run again.
    """

    path: Path
    overrides: tuple[str, ...] = ()
    strategies: str | None = None
    varied: tuple[str, ...] = ()
    evaluate: bool = True
    force: bool = False


def compare(options: CompareOptions, on_result: Callable[[dict[str, Any]], object] | None = None) -> int:
    """Run every variant that is not done yet, one after the other, and write what they measured.

    Args:
        options: What to compare.
        on_result: Called with the content of comparison.json at the end.

    Returns:
        The exit status: 0 if all variants succeeded, 2 if the user can fix every failure, else 1.

    Raises:
        UserError: MiniSFT did not write the output folder, or a variant's folder holds a run with other settings.
        StoppedError: SIGINT or SIGTERM arrived; the variant that was running has saved its work.
    """
    # 1. Read the recipes of the variants, and take the output folder.
    variants = choose_variants(options.path, options.overrides, read_axes(options.strategies, options.varied))
    recipes = [variant.recipe for variant in variants if variant.recipe is not None]
    output = Path(load_recipe(options.path, options.overrides).output)
    refuse_foreign_folder(RunFolder(output))
    (output / FOLDER).mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hold_lock(output / FOLDER / ".lock"))
        except BlockingIOError:
            raise UserError(output, "another comparison is writing into this folder", "wait for it to end") from None

        # 2. Refuse or warn before any time is spent.
        for variant in variants:
            if variant.recipe is not None and not options.force:
                refuse_other_run(variant)
        for variant in variants:
            if variant.recipe is None:
                warn(f"{variant.name} cannot run, and the others continue: {variant.error}")
        if any(recipe.training.strategy != "vanilla" and recipe.training.processes == 1 for recipe in recipes):
            say("note: training.processes is 1, so the ZeRO stages have no other process to share with")

        # 3. Run the variants; the files of the comparison are written again after each.
        entries = [Entry(v.name, f"{FOLDER}/{v.name}", v.overrides, trajectory(v)) for v in variants]
        statuses = []
        for index, variant in enumerate(variants):
            status, entries[index] = _VariantRun(options, variant, output).execute(entries[index], entries[:index])
            statuses.append(status)
            comparison = write_comparison(output, entries)
        print_comparison(comparison)
    if on_result is not None:
        on_result(comparison)
    say(f"written: {output / 'comparison.html'} (and .json, .md, .png beside it)")
    return 1 if 1 in statuses else max(statuses)


@dataclass(frozen=True)
class _VariantRun:
    """The run of one variant: trained, then scored, each by a command in a process of its own."""

    options: CompareOptions
    variant: Variant
    output: Path

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.output / FOLDER / self.variant.name)

    @property
    def log(self) -> Path:
        return self.run.root.with_name(f"{self.variant.name}.log")

    @property
    def settings_file(self) -> Path:
        """The file that holds the evaluation settings of the last complete evaluation."""
        return self.run.root.with_name(f"{self.variant.name}.json")

    def execute(self, entry: Entry, earlier: Sequence[Entry]) -> tuple[int, Entry]:
        """Run the stages that are not done yet.

        Args:
            entry: The variant's entry in the comparison.
            earlier: The entries of the variants before it, whose data and base model's answers may be shared.

        Returns:
            The exit status of the stage that failed, or 0, and the entry with the outcome.
        """
        # 1. Make the run folder.
        if self.variant.recipe is None:
            return self._failed(entry, "recipe", 2, self.variant.error or "")
        try:
            self._start(earlier)
        except UserError as error:
            return self._failed(entry, "start", 2, str(error))

        # 2. Train and evaluate it.
        for stage in ("train", "evaluate") if self.options.evaluate else ("train",):
            is_done = self.run.is_trained() if stage == "train" else self._is_evaluated()
            if is_done:
                say(f"{self.variant.name}: {stage} is done already")
                continue
            words = [stage, str(self.options.path), *self.options.overrides, *self.variant.overrides]
            words.append(f"output={json.dumps(str(self.run.root))}")
            if stage == "train" and self.run.has_begun():
                words.append("--resume")
            say(f"{self.variant.name}: {stage}, with its output in {self.log}")
            with _progress_display(self.variant.name) as show_line:
                ended = run_verb(words, self.log, show_line)
            if ended.status:
                restore_replaced_run(self.run)
                return self._failed(entry, stage, ended.status, ended.error)

        # 3. Record the settings that the scores belong to.
        if self.options.evaluate:
            write_atomically(self.settings_file, self._evaluation_settings())
        return 0, replace(entry, status="done")

    def _failed(self, entry: Entry, stage: str, status: int, error: str) -> tuple[int, Entry]:
        warn(f"{self.variant.name}: {stage} failed: {error}")
        return (2 if status == 2 else 1), replace(entry, status="failed", failed_at=stage, error=error)

    def _start(self, earlier: Sequence[Entry]) -> None:
        """Make the run folder, and share into it the prepared data and the base model's answers of earlier variants.

        They need not fit this variant: the preparation and the evaluation use them only if their fingerprints match.
        """
        assert self.variant.recipe is not None
        if self.options.force:
            self.settings_file.unlink(missing_ok=True)
        folders = [self.output / entry.folder for entry in reversed(earlier)]
        begin_variant(self.variant.recipe, folders, ("dataset", _BASE_RESULT_CACHE), force=self.options.force)

    def _evaluation_settings(self) -> str:
        assert self.variant.recipe is not None
        return json.dumps(asdict(self.variant.recipe.evaluation), indent=1)

    def _is_evaluated(self) -> bool:
        """Return whether all checkpoints were scored with the present evaluation settings."""
        results = read_results(self.run.root)
        if results is None or not self.settings_file.is_file():
            return False
        scored = {entry["checkpoint"] for entry in results["checkpoints"]}
        same_settings = self.settings_file.read_text(encoding="utf-8") == self._evaluation_settings()
        return same_settings and {path.name for path in self.run.list_checkpoints()} <= scored


@contextlib.contextmanager
def _progress_display(name: str) -> Iterator[Callable[[str], object]]:
    """Show the lines that a child process prints: the newest one in a terminal, else the lines of its steps.

    Lines on files that were kept instead of deleted are always printed.
    """
    with display(waiting_for=name) as shown:

        def show_line(line: str) -> None:
            if KEPT_REASON in line or (line.startswith("step ") and not redraws()):
                say(f"  {name}: {line}")
            shown.waiting_for = f"{name}: {line}"

        yield show_line


def print_comparison(comparison: dict[str, Any]) -> None:
    """Print the table, with the variant to take in bold, and the sentences of the verdict.

    Args:
        comparison: The content of comparison.json.
    """
    heads, rows, takes = comparison_table(comparison, intervals=console.width >= _WIDE)
    # Each table gets as many columns as the terminal has room for, the first of them always the names.
    tables = [[0]]
    unlimited = console.options.update(max_width=10_000)
    for column in range(1, len(heads)):
        wider = [*tables[-1], column]
        width = console.measure(_make_table(wider, heads, rows, takes), options=unlimited).maximum
        if len(wider) > 2 and width > console.width:
            tables.append([0, column])
        else:
            tables[-1] = wider
    for columns in tables:
        console.print(_make_table(columns, heads, rows, takes))
    for sentence in comparison["verdict"]:
        say(sentence)


def _make_table(columns: list[int], heads: list[str], rows: list[list[str]], takes: list[bool]) -> Table:
    """Make a table of some columns; figures are never cut, and long names are wrapped."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        if column == 0:
            table.add_column(heads[0], overflow="fold", max_width=max(_MIN_NAME_WIDTH, console.width // 3))
        else:
            table.add_column(heads[column], justify="right", no_wrap=True)
    for row, take in zip(rows, takes, strict=True):
        table.add_row(*(Text(row[column]) for column in columns), style="bold" if take else "")
    return table
