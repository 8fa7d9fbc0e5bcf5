"""The comparison: each variant trained and scored by the ordinary commands, then measured side by side."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from minisft.comparison.variants import FOLDER, Variant, choose_variants, read_axes, refuse_other_run, trajectory
from minisft.console import console, say, warn
from minisft.errors import UserError
from minisft.files import hold_lock, write_atomically
from minisft.manifest import record_files, record_folder, record_scratch_folder
from minisft.processes import CompletedVerb, run_verb
from minisft.recipe import load_recipe
from minisft.replacement import KEPT_REASON
from minisft.report.comparison import Entry, write_comparison
from minisft.report.tables import comparison_table
from minisft.results import read_results
from minisft.run_folder import RunFolder
from minisft.run_start import refuse_foreign_folder, restore_replaced_run, start_run

_BASE_JOURNAL = Path("evaluation") / "base" / "journal.jsonl"


@dataclass(frozen=True)
class CompareOptions:
    """What is asked for.

    Args:
        path: the recipe file.
        overrides: `key=value` words that hold for all variants.
        strategies: such as "vanilla,zero2"; None: all four, unless something else is varied.
        varied: `key=value1,value2` words; every combination is a variant.
        evaluate: score each variant's checkpoints too.
        force: run all variants anew.
    """

    path: Path
    overrides: tuple[str, ...] = ()
    strategies: str | None = None
    varied: tuple[str, ...] = ()
    evaluate: bool = True
    force: bool = False


def compare(options: CompareOptions) -> int:
    """Run every variant that is not done yet, one after the other, and write what they measured.

    Returns:
        The exit status: 0 where all variants succeeded, 2 where the user can fix every failure, else 1.

    Raises:
        UserError: the output folder is another's, or a variant's folder holds a run with other settings.
        StoppedError: SIGINT or SIGTERM came; the variant under way has saved its work.
    """
    variants = choose_variants(options.path, options.overrides, read_axes(options.strategies, options.varied))
    output = Path(load_recipe(options.path, options.overrides).output)
    refuse_foreign_folder(RunFolder(output))
    (output / FOLDER).mkdir(parents=True, exist_ok=True)
    with _exclusive(output):
        if not options.force:
            _refuse_other_runs(variants)
        _warn_early(variants)
        entries = [Entry(v.name, f"{FOLDER}/{v.name}", v.overrides, trajectory(v)) for v in variants]
        statuses = []
        for place, variant in enumerate(variants):
            status, entries[place] = _VariantRun(options, variant, output).execute(entries[place], entries[:place])
            statuses.append(status)
            found = write_comparison(output, entries)
        print_comparison(found)
    say(f"written: {output / 'comparison.html'} (and .json, .md, .png beside it)")
    return 1 if 1 in statuses else max(statuses)


@contextlib.contextmanager
def _exclusive(output: Path) -> Iterator[None]:
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(hold_lock(output / FOLDER / ".lock"))
        except BlockingIOError:
            raise UserError(output, "another comparison is at work here", "wait for it to end") from None
        yield


def _refuse_other_runs(variants: Sequence[Variant]) -> None:
    for variant in variants:
        if variant.recipe is not None:
            refuse_other_run(variant)


def _warn_early(variants: Sequence[Variant]) -> None:
    """Say before anything is spent what will not run, and what will show nothing."""
    for variant in variants:
        if variant.recipe is None:
            warn(f"{variant.name} cannot be run, and the others go on: {variant.error}")
    settings = [variant.recipe.training for variant in variants if variant.recipe is not None]
    if any(training.strategy != "vanilla" and training.processes == 1 for training in settings):
        say("note: training.processes is 1, so the ZeRO stages have nobody to share with")


@dataclass(frozen=True)
class _VariantRun:
    """One variant on its way: trained, then scored, each by a verb in a process of its own."""

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
    def record_files(self) -> Path:
        """Holds the evaluation settings of the last whole evaluation."""
        return self.run.root.with_name(f"{self.variant.name}.json")

    def execute(self, entry: Entry, earlier: Sequence[Entry]) -> tuple[int, Entry]:
        """Do what is left to do; return the exit status of what failed, or 0, and the entry with how it went."""
        if self.variant.recipe is None:
            return self._failed(entry, "recipe", 2, self.variant.error or "")
        try:
            self._begin(earlier)
        except UserError as error:
            return self._failed(entry, "start", 2, str(error))
        for stage, is_done in (("train", self.run.is_trained), ("evaluate", self._is_evaluated)):
            if stage == "evaluate" and not self.options.evaluate:
                continue
            if is_done():
                say(f"{self.variant.name}: {stage} is done already")
                continue
            ended = self._run_verb(stage)
            if ended.status:
                restore_replaced_run(self.run)
                return self._failed(entry, stage, ended.status, ended.error)
        if self.options.evaluate:
            write_atomically(self.record_files, self._evaluation_settings())
        return 0, replace(entry, status="done")

    def _failed(self, entry: Entry, stage: str, status: int, error: str) -> tuple[int, Entry]:
        warn(f"{self.variant.name}: {stage} failed: {error}")
        return (2 if status == 2 else 1), replace(entry, status="failed", failed_at=stage, error=error)

    def _begin(self, earlier: Sequence[Entry]) -> None:
        """Make the run folder, and put into it what an earlier variant computed and this one needs too.

        Whether it does, the preparation and the evaluation find out: both check what they find by a hash.
        """
        assert self.variant.recipe is not None
        if self.options.force:
            self.record_files.unlink(missing_ok=True)
        with start_run(self.variant.recipe, force=self.options.force, prepares_only=True) as started:
            started.replace_old_run()
            for other in reversed([self.output / entry.folder for entry in earlier]):
                share(other / "dataset", self.run.dataset)
                share(other / _BASE_JOURNAL, self.run.root / _BASE_JOURNAL)

    def _run_verb(self, verb: str) -> CompletedVerb:
        words = [verb, str(self.options.path), *self.options.overrides, *self.variant.overrides]
        words.append(f"output={json.dumps(str(self.run.root))}")
        if verb == "train" and self.run.has_begun():
            words.append("--resume")
        say(f"{self.variant.name}: {verb}, {self.log} tells more")
        with _following(self.variant.name) as follow:
            return run_verb(words, self.log, follow)

    def _evaluation_settings(self) -> str:
        assert self.variant.recipe is not None
        return json.dumps(asdict(self.variant.recipe.evaluation), indent=1)

    def _is_evaluated(self) -> bool:
        results = read_results(self.run.root)
        if results is None or not self.record_files.is_file():
            return False
        scored = {entry["checkpoint"] for entry in results["checkpoints"]}
        same = self.record_files.read_text(encoding="utf-8") == self._evaluation_settings()
        return same and {path.name for path in self.run.list_checkpoints()} <= scored


@contextlib.contextmanager
def _following(name: str) -> Iterator[Callable[[str], object]]:
    """Show what a child prints last: in one line of a terminal, else the lines of its progress; always what stays."""
    if not console.is_terminal:
        yield lambda line: say(f"  {name}: {line}") if line.startswith("step ") or KEPT_REASON in line else None
        return
    from rich.text import Text

    with console.status(Text(name)) as status:

        def show(line: str) -> None:
            if KEPT_REASON in line:
                say(f"  {name}: {line}")
            status.update(Text(f"{name}: {line}", overflow="ellipsis", no_wrap=True))

        yield show


def share(source: Path, target: Path) -> None:
    """Give `target` the content of `source` where there is one and no target yet; whole or absent.

    Files are linked where the file system can: neither is ever written in place.
    """
    if target.exists() or not source.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    record_scratch_folder(temporary)
    if source.is_dir():
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(source, temporary, copy_function=_link_or_copy)
        record_folder(temporary, target)
    else:
        shutil.copyfile(source, temporary)
        record_files(target)
    temporary.replace(target)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)


_WIDE = 120  # characters; a narrower terminal gets scores without their intervals
_NAME = 20  # characters that a variant's name has at least


def print_comparison(found: dict[str, Any]) -> None:
    """Print the verdict's sentences and the table, the variant to take in bold."""
    heads, rows, takes = comparison_table(found, intervals=console.width >= _WIDE)
    for columns in _split(heads, rows, takes):
        console.print(_table(columns, heads, rows, takes))
    for sentence in found["verdict"]:
        say(sentence)


def _split(heads: list[str], rows: list[list[str]], takes: list[bool]) -> list[list[int]]:
    """The columns of each table: as many as the terminal has room for, and the names again before the next ones."""
    tables = [[0]]
    for column in range(1, len(heads)):
        wider = [*tables[-1], column]
        if len(wider) > 2 and _width(_table(wider, heads, rows, takes)) > console.width:
            wider = [0, column]
            tables.append(wider)
        tables[-1] = wider
    return tables


def _width(table: Table) -> int:
    """The characters that a table takes where nothing has to be cut."""
    return console.measure(table, options=console.options.update(max_width=10_000)).maximum


def _table(columns: list[int], heads: list[str], rows: list[list[str]], takes: list[bool]) -> Table:
    """Figures are never cut; long names are broken where they take more than a third of the terminal."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        if column == 0:
            shown.add_column(heads[0], overflow="fold", max_width=max(_NAME, console.width // 3))
        else:
            shown.add_column(heads[column], justify="right", no_wrap=True)
    for row, take in zip(rows, takes, strict=True):
        shown.add_row(*(Text(row[column]) for column in columns), style="bold" if take else "")
    return shown
