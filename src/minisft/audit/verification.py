"""Whether a run is what it was when it ended: its files against certificate.json, and steps taken again."""

import itertools
import json
import os
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minisft.audit.replay import (
    Replay,
    Start,
    announcement,
    layout_of,
    list_starts,
    replay,
    rows_of_step,
    scratch_run,
)
from minisft.console import say, waiting
from minisft.data.prepared import load_split
from minisft.errors import UserError
from minisft.files import hash_files
from minisft.models import resolve_model, weights_fingerprint
from minisft.recipe import Recipe
from minisft.row_losses import read_row_losses
from minisft.run_folder import RunFolder, read_metrics, run_identity
from minisft.training.certificate import (
    SPLITS,
    Certificate,
    ListHashes,
    changed_files,
    code_hash,
    describe_machine,
    hash_folder,
    hash_log,
    hash_row_losses,
    hash_split,
    hash_text,
    log_lines,
    read_certificate,
    template_hash,
)
from minisft.training.checkpoints import is_of_model
from minisft.training.device import describe_environment, threads_of_a_process
from minisft.training.zero import ZERO_STAGES

REACH = 10  # steps after a start among which the steps to replay are chosen
# Largest relative difference of a replayed loss or gradient norm where the bits may differ: on another kind of
# processor, on a GPU, in half precision, or with other versions of the libraries.
BOUND, HALF_BOUND = 1e-3, 5e-2
_COMPARED = ("loss", "grad_norm", "learning_rate")
_MOST_CHANGES = 20  # of one kind that are listed


@dataclass(frozen=True)
class Change:
    """Something that differs from the certificate or the log.

    Args:
        what: The kind: row, mask, data, log line, row losses, template, weights, checkpoint, recipe, base model, step.
        where: Which one, and how it differs.
    """

    what: str
    where: str


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Args:
        changed: What differs.
        replayed: Number of chosen steps that were replayed.
        notes: What could not be compared, and what differs without being a change of the run.
    """

    changed: tuple[Change, ...]
    replayed: int
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.changed

    def as_dict(self) -> dict[str, Any]:
        changed = [{"what": change.what, "where": change.where} for change in self.changed]
        return {"ok": self.ok, "changed": changed, "replayed": self.replayed, "notes": list(self.notes)}


def verify(recipe: Recipe, steps: int = 2) -> Verification:
    """Compare a run with its certificate, and replay steps chosen at random.

    Steps are replayed only if no file has changed. They are chosen among the `REACH` steps after each checkpoint with
    optimizer state, and after step 0.

    Args:
        recipe: Recipe of the run folder `recipe.output`.
        steps: Number of steps to replay.

    Raises:
        UserError: The run has no certificate.
        StoppedError: SIGINT or SIGTERM came.
    """
    run = RunFolder(Path(recipe.output))
    certificate = read_certificate(run)
    with waiting("hashing the run"):
        changed = compare_files(run, recipe, certificate)
    notes = _differences_of_program(certificate)
    if changed:
        return Verification(tuple(changed), 0, (*notes, "no step was replayed, since files have changed"))
    if steps == 0:
        return Verification((), 0, tuple(notes))
    chosen = choose_steps(run, steps)
    if not chosen:
        return Verification((), 0, (*notes, "no step was replayed: no step was logged after a point to start from"))
    found: list[Change] = []
    count = 0
    for start, numbers in chosen.items():
        last = max(numbers)
        say(announcement(run, start, last))
        try:
            with scratch_run(run) as scratch, waiting("replaying"):
                replayed = replay(run, recipe, scratch, start, last)
        except UserError as error:
            which = "no further step" if count else "no step"
            notes.append(f"{which} was replayed: {error.where}: {error.problem}")
            break
        count += len(numbers)
        exact = gives_same_bits(run, certificate, last)
        found += compare_steps(run, replayed, exact=exact, half=certificate.machine["precision"] != "fp32")
        if not exact:
            notes.append(f"steps {start.step + 1} to {last} were compared within a bound, not bit for bit")
    return Verification(tuple(found), count, tuple(notes))


# --- files ------------------------------------------------------------------------------------------------


def compare_files(run: RunFolder, recipe: Recipe, before: Certificate) -> list[Change]:
    """Return what differs between a certificate and the files of a run, and its base model."""
    changed: list[Change] = []
    for split in SPLITS:
        changed += _compare_split(run, split, before)
    if not _is_same(lambda: hash_files([run.dataset / "ledger.json"]), before.ledger):
        changed.append(Change("data", "dataset/ledger.json"))
    changed += _compare_log(run, before.log)
    changed += _compare_row_losses(run, before.row_losses)
    if hash_text(json.dumps(run_identity(recipe), sort_keys=True, default=str)) != before.recipe:
        changed.append(Change("recipe", "recipe.yaml: a key that identifies the run"))
    changed += _compare_checkpoints(run, recipe, before)
    changed += _compare_base_model(recipe, before.base_model)
    return changed


def _is_same(hash_now: Any, before: str) -> bool:
    try:
        return bool(hash_now() == before)
    except (OSError, UserError):
        return False


def _compare_split(run: RunFolder, split: str, before: Certificate) -> list[Change]:
    folder = f"dataset/{split}"
    try:
        now = hash_split(run, split)
        data = load_split(run.root, split)
    except UserError as error:
        return [Change("data", f"{folder}: {error.problem}")]
    changed = []
    for what, old, new in (("row", before.rows[split], now.rows), ("mask", before.masks[split], now.masks)):
        changed += _listed(what, (f"{folder}: {_rows_text(data, numbers)}" for numbers in old.changed(new)))
    if not changed and now.files != before.data_files[split]:
        changed.append(Change("data", f"{folder}: a column other than input_ids and labels"))
    return changed


def _rows_text(data: Any, numbers: range) -> str:
    if len(numbers) > 1:
        return f"rows {numbers[0]} to {numbers[-1]}"
    number = numbers[0]
    return f"row {number} (id {data[number]['id']})" if number < len(data) else f"row {number} is missing"


def _compare_log(run: RunFolder, before: ListHashes) -> list[Change]:
    lines = log_lines(run)
    changed = itertools.chain.from_iterable(before.changed(hash_log(run)))
    return _listed(
        "log line", (f"metrics.jsonl: line {number + 1}{_step_of_line(lines, number)}" for number in changed)
    )


def _step_of_line(lines: list[bytes], number: int) -> str:
    if number >= len(lines):
        return " is missing"
    try:
        return f" (step {json.loads(lines[number])['step']})"
    except (ValueError, KeyError, TypeError):
        return " is not a line of the log"


def _compare_row_losses(run: RunFolder, before: ListHashes) -> list[Change]:
    try:
        ranges = before.changed(hash_row_losses(run))
    except UserError as error:
        return [Change("row losses", f"row_losses.bin: {error.problem}")]
    steps = itertools.chain.from_iterable(ranges)
    return _listed("row losses", (f"row_losses.bin: step {number + 1}" for number in steps))


def _compare_checkpoints(run: RunFolder, recipe: Recipe, before: Certificate) -> list[Change]:
    changed = []
    for name, files in before.checkpoints.items():
        folder = run.checkpoints / name
        if not folder.is_dir():
            changed.append(Change("checkpoint", f"checkpoints/{name}: missing"))
            continue
        changed += [_file_change(f"checkpoints/{name}", path) for path in changed_files(files, hash_folder(folder))]
    last = list(before.checkpoints)[-1]  # model/ is a copy of it
    expected = {path: digest for path, digest in before.checkpoints[last].items() if is_of_model(path)}
    found = hash_folder(run.model)
    changed += [_file_change("model", path) for path in changed_files(expected, found)]
    is_file = recipe.data.template.endswith(".jinja")
    saved = any(change.where.startswith(f"checkpoints/{last}") for change in changed)
    if is_file and not saved and template_hash(recipe, run.checkpoints / last) != before.template:
        changed.append(Change("template", f"{recipe.data.template}: changed or missing"))
    return changed


def _file_change(folder: str, path: str) -> Change:
    name = path.rpartition(":")[0]
    if name.endswith(".jinja"):
        return Change("template", f"{folder}/{path}")
    return Change("weights" if name.endswith(".safetensors") else "checkpoint", f"{folder}/{path}")


def _compare_base_model(recipe: Recipe, before: str) -> list[Change]:
    if not before:
        return []
    try:
        now = weights_fingerprint(resolve_model(recipe.model, recipe.trust_remote_code).folder, read_again=True)
    except UserError as error:
        return [Change("base model", f"{recipe.model}: {error.problem}")]
    return [] if now == before else [Change("base model", f"{recipe.model}: weights, configuration or tokenizer")]


def _listed(what: str, places: Iterable[str]) -> list[Change]:
    """Return a change for each of the first places; there may be very many."""
    first = list(itertools.islice(places, _MOST_CHANGES + 1))
    return [Change(what, place) for place in first[:_MOST_CHANGES] + (["and more"] if first[_MOST_CHANGES:] else [])]


def _differences_of_program(before: Certificate) -> list[str]:
    notes = []
    if code_hash() != before.code:
        notes.append(f"another version of MiniSFT trained this run ({before.minisft})")
    now = describe_environment("")["packages"]
    other = [f"{name} {version}" for name, version in before.packages.items() if now.get(name) != version]
    if other:
        notes.append(f"the run was trained with {', '.join(other)}")
    return notes


# --- replayed steps ---------------------------------------------------------------------------------------


def choose_steps(run: RunFolder, count: int) -> dict[Start, list[int]]:
    """Choose steps at random among those within `REACH` of a start; return them by the start before them."""
    taken = set(read_row_losses(run.row_losses)["step"].tolist()) if run.row_losses.exists() else set()
    starts = list_starts(run)
    ends = [start.step for start in starts[1:]] + [max(taken, default=0)]
    choices = [
        (start, step)
        for start, end in zip(starts, ends, strict=True)
        for step in range(start.step + 1, min(start.step + REACH, end) + 1)
        if step in taken
    ]
    chosen: dict[Start, list[int]] = {}
    for start, step in sorted(random.sample(choices, min(count, len(choices))), key=lambda choice: choice[1]):
        chosen.setdefault(start, []).append(step)
    return chosen


def gives_same_bits(run: RunFolder, certificate: Certificate, step: int) -> bool:
    """Return whether a replay on this machine must give the bits of the run: on a CPU of the same kind, in fp32."""
    before, layout = certificate.machine, layout_of(run, step)
    if layout is None:
        return False
    strategy, processes = layout
    now = describe_machine(before["precision"])
    if processes > 1 or strategy in ZERO_STAGES:  # as `launch` sets it
        now["threads"] = int(os.environ.get("OMP_NUM_THREADS", threads_of_a_process(processes)))
    packages = describe_environment("")["packages"]
    same_torch = packages.get("torch") == certificate.packages.get("torch")
    return now == before and same_torch and not before["devices"] and before["precision"] == "fp32"


def compare_steps(run: RunFolder, replayed: Replay, *, exact: bool, half: bool) -> list[Change]:
    """Return the replayed steps that differ from the log, or whose rows have other losses."""
    bound = 0.0 if exact else HALF_BOUND if half else BOUND
    logged = {line["step"]: line for line in read_metrics(run)}
    kept = read_row_losses(run.row_losses)
    changed = []
    for step in sorted(set(replayed.row_losses["step"].tolist())):
        old, new = logged.get(step), replayed.metrics.get(step)
        for name in _COMPARED:
            before, now = (old or {}).get(name), (new or {}).get(name)
            if before is not None and now is not None and abs(now - before) > bound * abs(before):
                changed.append(Change("step", f"step {step}: {name} {before!r} in metrics.jsonl, {now!r} replayed"))
        changed += _compare_rows(step, rows_of_step(kept, step), replayed.rows_of(step), bound)
    return _listed("step", [change.where for change in changed])


def _compare_rows(step: int, before: np.ndarray, now: np.ndarray, bound: float) -> list[Change]:
    if not np.array_equal(before["row"], now["row"]):
        return [Change("step", f"step {step}: it has other rows in row_losses.bin")]
    old, new = before["loss"].astype(float), now["loss"].astype(float)
    differs = ~(np.abs(new - old) <= bound * np.maximum(np.abs(old), 1.0)) & ~(np.isnan(old) & np.isnan(new))
    if not differs.any():
        return []
    first = int(np.flatnonzero(differs)[0])
    count = int(differs.sum())
    return [
        Change(
            "step",
            f"step {step}: {count} of {len(old)} rows have another loss, such as row {before['row'][first]}: "
            f"{old[first]:.9g} in row_losses.bin, {new[first]:.9g} replayed",
        )
    ]


def show_verification(found: Verification) -> None:
    """Print what was found."""
    for note in found.notes:
        say(f"note: {note}")
    for change in found.changed:
        say(f"changed  {change.what:<11} {change.where}", style="bold red")
    if found.ok:
        steps = f"{found.replayed} replayed step{'' if found.replayed == 1 else 's'} gave what was logged"
        only = "no step was replayed, so hashes alone were compared"
        say(f"ok: the run is unchanged; {steps if found.replayed else only}", style="green")
