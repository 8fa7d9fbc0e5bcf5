"""The certificate of a run: hashes of what it was made from and of what it made, written before `model/`.

`minisft verify` computes them again. A list of things, such as the rows of the data, has a short digest for each thing,
so that a change can be named. The certificate is not signed: it shows that nothing has changed since it was written,
and the replay of steps shows that data, base model and log belong together.
"""

import hashlib
import itertools
import json
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minisft.console import waiting
from minisft.data.prepared import load_split
from minisft.errors import UserError
from minisft.files import hash_files, read_json, write_atomically
from minisft.recipe import Recipe
from minisft.row_losses import read_row_losses
from minisft.run_folder import CHECKPOINT, RunFolder, load_run, run_identity
from minisft.training.device import PACKAGES, describe_environment
from minisft.version import __version__

SPLITS = ("train", "test")
_DIGEST_SIZE = 4  # bytes of the digest that names a change; SHA-256 of all of them finds it
_MOST_DIGESTS = 100_000  # of a list: above that, one stands for several things
_THREADS = 4  # files that are hashed at once
_CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class ListHashes:
    """The hashes of a list of things, in order.

    Args:
        count: Number of things.
        block: Number of things that share a digest.
        sha256: SHA-256 of all things.
        digests: The digests, 8 hexadecimal characters each.
    """

    count: int
    block: int
    sha256: str
    digests: str

    def __post_init__(self) -> None:
        numbers, texts = (self.count, self.block), (self.sha256, self.digests)
        if not (all(type(one) is int for one in numbers) and all(type(one) is str for one in texts)):
            raise TypeError("a list of hashes is not one")
        if self.count < 0 or self.block < 1:
            raise TypeError("a list of hashes has an impossible length")

    @classmethod
    def of(cls, things: Iterable[bytes], count: int) -> "ListHashes":
        """Hash `count` things."""
        block = max(1, -(-count // _MOST_DIGESTS))
        total, digests, digest = hashlib.sha256(), [], hashlib.blake2b(digest_size=_DIGEST_SIZE)
        for number, thing in enumerate(things, 1):
            sized = len(thing).to_bytes(8, "little") + thing
            total.update(sized)
            digest.update(sized)
            if number % block == 0 or number == count:
                digests.append(digest.hexdigest())
                digest = hashlib.blake2b(digest_size=_DIGEST_SIZE)
        return cls(count, block, total.hexdigest(), "".join(digests))

    def changed(self, now: "ListHashes") -> list[range]:
        """Return the numbers of the things, from 0, whose digests differ in `now`; [] if nothing differs.

        Things that were added or removed are at the end. Where lists of different lengths have different blocks, all
        things may have changed.
        """
        if self == now:
            return []
        if self.block != now.block:
            return [range(max(self.count, now.count))]
        width = 2 * _DIGEST_SIZE
        pairs = [
            (self.digests[start : start + width], now.digests[start : start + width])
            for start in range(0, max(len(self.digests), len(now.digests)), width)
        ]
        most = max(self.count, now.count)
        found = [number for number, (before, after) in enumerate(pairs) if before != after]
        ranges = [range(number * self.block, min((number + 1) * self.block, most)) for number in found]
        return ranges or [range(most)]


@dataclass(frozen=True)
class Certificate:
    """The hashes of a run, and the machine that its replay is compared with.

    Args:
        minisft: Version of MiniSFT.
        code: SHA-256 of its Python files.
        packages: Versions of the libraries.
        machine: Processor, its instructions, threads of a process, devices and precision.
        recipe: SHA-256 of the keys that identify the run.
        base_model: Hash of the base model, as base_model.json has it; "" if that is not recorded.
        ledger: SHA-256 of dataset/ledger.json.
        template: SHA-256 of the template that is used, with its name.
        rows: Hashes of the token ids of each row, by split.
        masks: Hashes of the labels of each row, by split.
        data_files: SHA-256 of the data files of each split.
        log: Hashes of the lines of metrics.jsonl.
        row_losses: Hashes of the records of each step in row_losses.bin.
        checkpoints: SHA-256 of each file, by its path in the checkpoint, by the name of the checkpoint.
    """

    minisft: str
    code: str
    packages: dict[str, str]
    machine: dict[str, Any]
    recipe: str
    base_model: str
    ledger: str
    template: str
    rows: dict[str, ListHashes]
    masks: dict[str, ListHashes]
    data_files: dict[str, str]
    log: ListHashes
    row_losses: ListHashes
    checkpoints: dict[str, dict[str, str]]

    def __post_init__(self) -> None:
        texts = (self.minisft, self.code, self.recipe, self.base_model, self.ledger, self.template)
        tables = (self.packages, self.machine, self.data_files, *self.checkpoints.values())
        if not (all(type(one) is str for one in texts) and all(type(one) is dict for one in tables)):
            raise TypeError("a field has another type")
        if any(set(table) != set(SPLITS) for table in (self.rows, self.masks, self.data_files)):
            raise TypeError("the hashes of a split are missing")
        if not self.checkpoints or not all(CHECKPOINT.fullmatch(name) for name in self.checkpoints):
            raise TypeError("the names of its checkpoints are not names of checkpoints")
        if not {"precision", "devices"} <= set(self.machine):
            raise TypeError("the machine is missing")


def write_certificate(run: RunFolder) -> None:
    """Write certificate.json of a run whose last checkpoint is complete; `model/` is going to be a copy of that."""
    with waiting("hashing the run for its certificate"):
        found = certify(run, load_run(run.root))
        write_atomically(run.certificate, json.dumps(asdict(found), indent=1) + "\n")


def read_certificate(run: RunFolder) -> Certificate:
    """Read certificate.json.

    Raises:
        UserError: The run has not ended, an earlier version trained it, or the file is damaged.
    """
    if not (run.certificate.is_file() and run.is_trained()):
        state = "an earlier version of MiniSFT trained this run" if run.is_trained() else "this run has not ended"
        fix = "train again with --force, or into another `output`" if run.is_trained() else "resume it with --resume"
        raise UserError(run.certificate, f"there is no certificate: {state}", fix)
    fix = "restore it from a copy: without it nothing shows that the run is unchanged"
    content = read_json(run.certificate, fix, checkpoints=dict, rows=dict, masks=dict, log=dict, row_losses=dict)
    try:
        for name in ("rows", "masks"):
            content[name] = {split: ListHashes(**hashes) for split, hashes in content[name].items()}
        for name in ("log", "row_losses"):
            content[name] = ListHashes(**content[name])
        return Certificate(**content)
    except (TypeError, AttributeError) as error:
        raise UserError(run.certificate, f"this certificate is damaged ({error})", fix) from None


def certify(run: RunFolder, recipe: Recipe) -> Certificate:
    """Compute the certificate of a run from its files as they are now.

    Raises:
        UserError: The prepared data or the losses are missing or damaged.
    """
    data = {split: hash_split(run, split) for split in SPLITS}
    return Certificate(
        minisft=__version__,
        code=code_hash(),
        packages={name: found for name, found in describe_environment("")["packages"].items() if name in PACKAGES},
        machine=describe_machine(precision_of(run)),
        recipe=hash_text(json.dumps(run_identity(recipe), sort_keys=True, default=str)),
        base_model=recorded_base_model(run),
        ledger=hash_files([run.dataset / "ledger.json"]),
        template=template_hash(recipe, run.list_checkpoints()[-1]),
        rows={split: found.rows for split, found in data.items()},
        masks={split: found.masks for split, found in data.items()},
        data_files={split: found.files for split, found in data.items()},
        log=hash_log(run),
        row_losses=hash_row_losses(run),
        checkpoints={checkpoint.name: hash_folder(checkpoint) for checkpoint in run.list_checkpoints()},
    )


@dataclass(frozen=True)
class SplitHashes:
    """The hashes of one split of the prepared data: token ids and labels of each row, and the data files."""

    rows: ListHashes
    masks: ListHashes
    files: str


def hash_split(run: RunFolder, split: str) -> SplitHashes:
    data = load_split(run.root, split)
    rows, masks = (ListHashes.of(_row_bytes(data, column), len(data)) for column in ("input_ids", "labels"))
    return SplitHashes(rows, masks, hash_files(sorted((run.dataset / split).glob("*.arrow"))))


def log_lines(run: RunFolder) -> list[bytes]:
    """Return the lines of metrics.jsonl."""
    return run.metrics.read_bytes().splitlines() if run.metrics.is_file() else []


def hash_log(run: RunFolder) -> ListHashes:
    lines = log_lines(run)
    return ListHashes.of(lines, len(lines))


def hash_row_losses(run: RunFolder) -> ListHashes:
    """Hash the records of each step; a run that an earlier version began may have none."""
    steps = step_bytes(run.row_losses) if run.row_losses.exists() else []
    return ListHashes.of(steps, len(steps))


def recorded_base_model(run: RunFolder) -> str:
    """Return the hash of the base model with which the run began; "" if it is not recorded."""
    if not run.base_model.is_file():
        return ""
    found = read_json(run.base_model, "restore it from a copy", fingerprint=str)
    return str(found["fingerprint"])


def template_hash(recipe: Recipe, checkpoint: Path) -> str:
    """Return a hash of the template's name, of its file where it is one, and of the chat template of a checkpoint."""
    parts = [recipe.data.template]
    for path in (Path(recipe.data.template), checkpoint / "chat_template.jinja"):
        parts.append(hash_files([path]) if path.suffix == ".jinja" and path.is_file() else "")
    return hash_text("\0".join(parts))


def hash_folder(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a folder, by its path in it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(_THREADS) as pool:
        hashes = pool.map(lambda path: hash_files([path]), paths)
    return {path.relative_to(folder).as_posix(): digest for path, digest in zip(paths, hashes, strict=True)}


def step_bytes(path: Path) -> list[bytes]:
    """Return the records of row_losses.bin of each step, in order."""
    records = read_row_losses(path)
    starts = np.flatnonzero(np.diff(records["step"].astype(np.int64))) + 1
    return [part.tobytes() for part in np.split(records, starts)] if len(records) else []


def describe_machine(precision: str) -> dict[str, Any]:
    """Return what the bits of a replayed step depend on; nothing in it identifies a person or a host."""
    environment = describe_environment(precision)
    return {
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "devices": environment["devices"],
        "precision": precision,
    }


def code_hash() -> str:
    """Return the SHA-256 of MiniSFT's Python files."""
    folder = Path(__file__).parents[1]
    return hash_files(sorted(folder.rglob("*.py")))


def _processor(cpu_info: Path = _CPU_INFO) -> str:
    try:
        lines = cpu_info.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def precision_of(run: RunFolder) -> str:
    if not run.environment.is_file():
        return "unknown"
    return str(read_json(run.environment, "restore it from a copy", precision=str)["precision"])


def _row_bytes(data: Any, column: str) -> Iterator[bytes]:
    for chunk in data.data.column(column).chunks:
        offsets, values = chunk.offsets.to_numpy(), chunk.values.to_numpy()
        for start, end in itertools.pairwise(offsets):
            yield values[start:end].tobytes()


def hash_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def changed_files(before: Mapping[str, str], now: Mapping[str, str], names: Sequence[str] | None = None) -> list[str]:
    """Return the paths of files that were changed, removed or added, each with what happened to it.

    Args:
        before: Hashes by path.
        now: Hashes by path.
        names: The paths to compare; None: all of both.
    """
    found = []
    for name in sorted({*before, *now}) if names is None else names:
        if before.get(name) != now.get(name):
            what = "missing" if name not in now else "added" if name not in before else "changed"
            found.append(f"{name}: {what}")
    return found
