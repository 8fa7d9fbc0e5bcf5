"""What every command prints and writes, recorded, so that a refactoring can be shown to change nothing.

    python benchmarks/behaviour.py record before --source /tmp/old/src
    python benchmarks/behaviour.py record after
    python benchmarks/behaviour.py compare before after --reword intended.txt

`record` runs the real command line, `python -m minisft` of the given source tree, on a tiny random model and a few
conversations that are made on the spot: in fp32, on the CPU, with a fixed seed. Of each command it keeps the exit
status, stdout, stderr and every file that the command wrote, changed or removed. It takes a few minutes.

What is another value at each run is replaced by a word in angle brackets: times, dates, memory, speed, process ids, and
the paths of the temporary folder, of the source tree and of Python. Arrow data sets are kept as one JSON line a row,
safetensors as SHA-256, HTML with a tag a line, and pictures and pickles as their names. A command that reports what is
measured on the machine (`loose`) is kept without its numbers.

`compare` prints a unified diff of each command whose record differs, and ends with exit status 1 where there is one.
`--reword FILE` names a file of lines `old => new`, where `old` is a regular expression and `new` its replacement as
`re.sub` has it; they are applied to the first record, line by line and in the order of the file, so that an intended
rewording drops out of the diff. Lines that begin with # are comments.
"""

import argparse
import contextlib
import difflib
import fcntl
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
VERBS = (
    "demo", "init", "prepare", "inspect", "check", "plan", "train", "evaluate", "compare", "report", "export", "push",
    "serve", "chat", "runs", "watch", "why", "verify", "schema", "completion", "submit", "contamination",
    "search",
)  # fmt: skip
WORK = "minisft-behaviour"  # folder under the one for temporary files
TIMEOUT = 300  # seconds that a command may take


def main() -> None:
    parser = make_parser()
    arguments = parser.parse_args()
    if arguments.action == "record":
        record(arguments.folder, arguments.source.resolve(), arguments.only)
    elif arguments.action == "compare":
        rewordings = read_rewordings(arguments.reword) if arguments.reword else []
        sys.exit(compare(arguments.before, arguments.after, rewordings))
    else:
        parser.print_help()


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action")
    recording = actions.add_parser("record", help="run all commands and keep what they print and write")
    recording.add_argument("folder", type=Path, help="folder to write the record into; it must not exist")
    recording.add_argument("--source", type=Path, default=REPOSITORY / "src", help="folder that holds minisft")
    recording.add_argument("--only", default="", metavar="REGEX", help="keep only commands whose name matches")
    comparing = actions.add_parser("compare", help="print how two records differ")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    comparing.add_argument("--reword", type=Path, metavar="FILE", help="lines `old => new`, applied to `before`")
    return parser


# --- commands ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """A command to record.

    Args:
        name: What it is called in the record.
        line: The words after `minisft`, quoted as a shell wants it.
        loose: It reports what is measured on this machine, so that no number is kept.
        spread: Several processes write to its stderr, in any order: its lines are sorted.
    """

    name: str
    line: str
    loose: bool = False
    spread: bool = False


def all_commands() -> list[Command]:
    """The commands in the order in which they run: later ones use what earlier ones wrote."""
    return [*helps(), *preparing(), *training(), *using(), *mistakes()]


def helps() -> list[Command]:
    return [
        Command("help", "--help"),
        Command("help-nothing", ""),
        Command("version", "--version"),
        *(Command(f"help-{verb}", f"{verb} --help") for verb in VERBS),
    ]


def preparing() -> list[Command]:
    return [
        Command("init", "init talks.jsonl --model model --gpu h100 --output-recipe made.yaml"),
        Command("init-exists", "init talks.jsonl --model model --gpu h100 --output-recipe made.yaml"),
        Command("prepare", "prepare recipe.yaml"),
        Command("prepare-again", "prepare recipe.yaml"),
        Command("prepare-mixed", "prepare mixed.yaml"),
        Command("prepare-skip", "prepare mixed.yaml data.invalid=skip data.overflow=cut output=skipped"),
        Command("prepare-drop", "prepare mixed.yaml data.overflow=drop data.train_on=last output=dropped"),
        Command("prepare-chatml", "prepare recipe.yaml data.template=chatml output=chatml data.test=held.jsonl"),
        Command("inspect", "inspect recipe.yaml"),
        Command("inspect-findings", "inspect mixed.yaml --findings --count 2"),
        Command("inspect-worst", "inspect mixed.yaml --side test --worst length --count 1"),
        Command("inspect-html", "inspect mixed.yaml --row 0 --row 1 --html inspected.html"),
        Command("plan", "plan recipe.yaml", loose=True),
        Command("plan-gpu", "plan recipe.yaml --gpu h100 --count 8"),
        Command("plan-json", "plan recipe.yaml --gpu a100 --count 8 --nodes 2 --json"),
    ]


def training() -> list[Command]:
    constant = "train recipe.yaml output=resumed training.scheduler=constant"
    two = "training.strategy=zero2 training.processes=2 training.batch_size=4 training.max_steps=2"
    lora = "training.max_steps=2 training.packing=true training.eval_every=1 'training.lora={rank: 4}'"
    return [
        Command("train-dry-run", "train recipe.yaml output=dry --dry-run"),
        Command("train", "train recipe.yaml"),
        Command("train-exists", "train recipe.yaml"),
        Command("train-short", f"{constant} training.max_steps=4 training.save_every=3"),
        Command("train-resume", f"{constant} training.max_steps=6 training.save_every=3 --resume"),
        Command("train-zero2", f"train recipe.yaml output=zero2 {two}", spread=True),
        Command("train-lora", f"train recipe.yaml output=lora {lora}"),
        Command("train-force-dry-run", f"train recipe.yaml output=lora {lora} --force --dry-run"),
        Command("train-force", "train recipe.yaml output=resumed training.max_steps=1 --force"),
    ]


def using() -> list[Command]:
    return [
        Command("evaluate", "evaluate recipe.yaml 'evaluation.prompts=[One cup of tea, please.]'"),
        Command("evaluate-again-json", "evaluate run 'evaluation.prompts=[One cup of tea, please.]' --json"),
        Command("evaluate-all-sampled", "evaluate lora evaluation.turns=all evaluation.temperature=0.7 seed=0"),
        Command("report", "report run"),
        Command("report-to", "report lora --to reported"),
        Command("export", "export run exported"),
        Command("export-best", "export run exported-best --checkpoint best --dtype bf16"),
        Command("export-lora", "export lora exported-lora"),
        Command("export-adapters", "export lora exported-adapters --no-merge"),
        Command("chat", "chat run --message 'One cup of tea, please.' --max-new-tokens 8"),
        Command("chat-model", "chat model --template mistral --message Hello --system Short. --max-new-tokens 4"),
        Command("check-quick", "check recipe.yaml --quick"),
        Command("check", "check recipe.yaml output=checked", loose=True),
        Command("check-json", "check recipe.yaml --quick --json output=checked"),
        Command(
            "compare",
            "compare recipe.yaml output=compared training.max_steps=40 --vary training.learning_rate=1e-3,1e-4",
        ),
    ]


def mistakes() -> list[Command]:
    """What a user gets wrong: each a message with a place, a problem and a fix."""
    lines = {
        "verb": "trian recipe.yaml",
        "option": "train recipe.yaml --forc",
        "no-recipe": "train",
        "missing-recipe": "train nothing.yaml",
        "key": "prepare recipe.yaml training.epoch=3",
        "key-in-file": "prepare unknown-key.yaml",
        "type": "prepare recipe.yaml data.max_length=long",
        "type-in-file": "prepare wrong-type.yaml",
        "yaml": "prepare no-yaml.yaml",
        "impossible": "train recipe.yaml training.early_stopping=2 output=new",
        "fraction": "train recipe.yaml data.test_fraction=1.2 output=new",
        "missing-source": "train recipe.yaml data.source=nothing.jsonl output=new",
        "malformed-line": "prepare recipe.yaml data.source=malformed.jsonl output=new",
        "empty-source": "prepare recipe.yaml data.source=empty.jsonl output=new",
        "same-role": "prepare recipe.yaml data.source=same-role.jsonl output=new",
        "no-format": "prepare recipe.yaml data.source=no-format.jsonl output=new",
        "file-type": "prepare recipe.yaml data.source=recipe.yaml output=new",
        "missing-model": "train recipe.yaml model=nothing/at-all output=new",
        "template": "prepare recipe.yaml data.template=mistrall output=new",
        "optimizer": "train recipe.yaml training.optimizer=adamm output=new",
        "scheduler": "train recipe.yaml training.scheduler=lineal output=new",
        "tracker": "train recipe.yaml training.report_to=[nowhere] output=new",
        "foreign-output": "train recipe.yaml output=foreign",
        "other-run": "train recipe.yaml training.learning_rate=1 --resume",
        "inspect-row": "inspect recipe.yaml --row 4000",
        "inspect-choice": "inspect recipe.yaml --worst best",
        "plan-gpu": "plan recipe.yaml --gpu h1000",
        "evaluate-untrained": "evaluate recipe.yaml output=mixed",
        "evaluate-room": "evaluate run evaluation.max_new_tokens=4000",
        "report-nothing": "report nothing",
        "report-no-run": "report model",
        "export-checkpoint": "export run exported-2 --checkpoint checkpoint-7",
        "export-exists": "export run exported",
        "export-nowhere": "export run",
        "compare-vary": "compare recipe.yaml output=compared --vary training.learning_rate",
        "compare-strategy": "compare recipe.yaml output=compared --strategies zero4",
        "chat-nothing": "chat nothing --message Hi",
        "chat-overrides": "chat run word --message Hi",
    }
    return [Command(f"mistake-{name}", line) for name, line in lines.items()]


# --- inputs ------------------------------------------------------------------------------------------------

RECIPE = """\
model: model
output: run
data:
  source: talks.jsonl
  template: mistral
  max_length: 256
  test_fraction: 0.5
  processes: 1
training:
  max_steps: 160
  save_every: 80
  learning_rate: 1.0e-2
  precision: fp32
evaluation:
  max_new_tokens: 24
"""
REPLIES = ("yes, one cup of hot tea", "no, cold milk with sugar", "two small pots, thanks")
MIXED = """\
model: model
output: mixed
data:
  source: [talks.jsonl, long.jsonl, repairs.jsonl, alpaca.json, pairs.csv]
  template: mistral-v1
  max_length: 128
  invalid: repair
  processes: 1
training: {precision: fp32}
"""
TEXTS = {
    "recipe.yaml": RECIPE,
    "mixed.yaml": MIXED,
    "unknown-key.yaml": RECIPE.replace("max_length", "max_lenght"),
    "wrong-type.yaml": RECIPE.replace("max_steps: 160", "max_steps: four"),
    "no-yaml.yaml": "model: [model\noutput: run\n",
    "empty.jsonl": "",
    "pairs.csv": "prompt,completion\nTea or milk?,Tea\nHot or cold?,Cold\n",
    "foreign/notes.txt": "not by MiniSFT\n",
}


def make_inputs(folder: Path) -> None:
    """Write a tiny random model, conversations, faulty ones and recipes."""
    sys.path.insert(0, str(REPOSITORY))
    from tests.tiny import write_tiny_model

    write_tiny_model(folder / "model")
    write_talks(folder / "talks.jsonl", 48, seed=0)
    write_talks(folder / "held.jsonl", 6, seed=1)
    for name, text in TEXTS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    long = [("human", "one two " * 6), ("gpt", "three " * 8)] * 4
    lines = {
        "long.jsonl": [sharegpt(long), sharegpt([("human", "Hi"), ("gpt", "more " * 60)])],
        "repairs.jsonl": [
            sharegpt([("system", "Be short."), ("human", "Tea?"), ("human", "Now!"), ("gpt", "Yes."), ("human", "Ok")]),
            sharegpt([("gpt", "Welcome."), ("human", "[INST] Hot?"), ("gpt", "Cold.")]),
            sharegpt([("human", "Nobody answers.")]),
            sharegpt([("human", ""), ("gpt", "Yes.")]),
        ],
        "same-role.jsonl": [sharegpt([("human", "Tea?"), ("human", "Now!"), ("gpt", "Yes.")])],
        "malformed.jsonl": [sharegpt([("human", "Tea?"), ("gpt", "Yes.")]), '{"conversations": [', "[1, 2]"],
        "no-format.jsonl": ['{"question": "Tea?", "reply": "Yes."}'],
        "alpaca.json": [json.dumps([{"instruction": "Pour.", "input": "tea", "output": "Poured."}] * 2)],
    }
    for name, rows in lines.items():
        (folder / name).write_text("\n".join(rows) + "\n", encoding="utf-8")


def write_talks(path: Path, count: int, seed: int) -> None:
    """Write conversations with three different replies, so that a tiny model learns something that BLEU sees."""
    choose = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            turns = []
            for _ in range(choose.randint(1, 3)):
                asked = " ".join(choose.choices(("tea", "milk", "hot", "cold", "small", "please", "now"), k=5))
                turns += [("human", f"{number}: {asked}"), ("gpt", choose.choice(REPLIES))]
            file.write(sharegpt(turns) + "\n")


def sharegpt(turns: Sequence[tuple[str, str]]) -> str:
    return json.dumps({"conversations": [{"from": role, "value": text} for role, text in turns]})


# --- record ------------------------------------------------------------------------------------------------


def record(folder: Path, source: Path, only: str = "") -> None:
    """Run all commands with the MiniSFT of a source tree, and keep what they print and write.

    Args:
        folder: Where the record goes, a folder for each command.
        source: The folder that holds the package `minisft`.
        only: Of which commands, as a regular expression on their names; all run.

    Raises:
        SystemExit: The folder exists, another `record` is at work, or Python imports another MiniSFT than that of
            `source`.
    """
    if folder.exists():
        raise SystemExit(f"{folder} exists: name a folder that does not")
    with work_folder() as work:
        environment = make_environment(work, source)
        require_source(source, environment)
        (work / "here").mkdir()
        make_inputs(work / "here")
        plain = Plain(work, source)
        began = time.monotonic()
        before = look(work / "here")
        for number, command in enumerate(all_commands()):
            if only and not re.search(only, command.name):
                continue
            started = time.monotonic()
            finished = run(command, work / "here", environment)
            after = look(work / "here")
            write_record(folder / f"{number:03}-{command.name}", command, finished, before, after, plain, work / "here")
            before = after
            print(f"{command.name}: exit {finished.returncode}, {time.monotonic() - started:.1f} s", flush=True)
        print(f"{time.monotonic() - began:.0f} s in all")


@contextlib.contextmanager
def work_folder() -> Iterator[Path]:
    """Give an empty folder of always the same path, since hashes that MiniSFT records depend on paths.

    Raises:
        SystemExit: Another `record` is at work in it.
    """
    work = Path(tempfile.gettempdir()).resolve() / WORK
    with work.with_name(f"{WORK}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"another `record` is at work in {work}: wait for it to end") from None
        shutil.rmtree(work, ignore_errors=True)  # a killed one left it
        work.mkdir()
        try:
            yield work
        finally:
            shutil.rmtree(work)


def make_environment(work: Path, source: Path) -> dict[str, str]:
    """The environment of all commands: a user with nothing set, one thread, no hub, no GPU."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH")}
    (work / "temporary").mkdir()
    return {
        **kept,
        "PYTHONPATH": str(source),
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "COLUMNS": "160",
        "TERM": "dumb",
        "TMPDIR": str(work / "temporary"),
        "MINISFT_CACHE": str(work / "cache"),
    }


def require_source(source: Path, environment: Mapping[str, str]) -> None:
    program = "import minisft; print(minisft.__file__)"
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, env=dict(environment), capture_output=True, text=True, check=False).stdout.strip()
    if Path(found) != source / "minisft" / "__init__.py":
        raise SystemExit(f"Python imports {found or 'no minisft'}, not that of {source}")


def run(command: Command, folder: Path, environment: Mapping[str, str]) -> "subprocess.CompletedProcess[bytes]":
    """Run a command as a user would.

    Raises:
        subprocess.TimeoutExpired: It takes longer than `TIMEOUT`.
    """
    words = [sys.executable, "-m", "minisft", *shlex.split(command.line)]
    return subprocess.run(
        words,
        cwd=folder,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=TIMEOUT,
        check=False,
    )


def look(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Every file of a folder by relative name, with what changes when it is written."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() or path.is_symlink():
            status = path.lstat()
            found[path.relative_to(folder).as_posix()] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found


def write_record(
    folder: Path,
    command: Command,
    finished: "subprocess.CompletedProcess[bytes]",
    before: Mapping[str, object],
    after: Mapping[str, object],
    plain: "Plain",
    work: Path,
) -> None:
    """Write what a command did into a folder of its own."""
    written = sorted(name for name, state in after.items() if before.get(name) != state)
    removed = sorted(before.keys() - after.keys())
    texts = {
        "command.txt": f"minisft {command.line}\nexit status {finished.returncode}\n",
        "stdout.txt": plain.printed(finished.stdout.decode(errors="replace"), command),
        "stderr.txt": plain.printed(finished.stderr.decode(errors="replace"), command),
        "files.txt": "".join(
            f"{what} {name}\n"
            for what, names in (("written", written), ("removed", removed))
            for name in sorted({plain.file_name(name) for name in names})
        ),
    }
    for name in written:
        texts[f"files/{plain.file_name(name)}"] = plain.file(work / name, command.loose)
    for name, text in texts.items():
        if text:
            path = folder / (f"{name}.txt" if name.startswith("files/") else name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


# --- what is the same at every run -------------------------------------------------------------------------

_NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[-+]?\d+)?"
# Keys of JSON whose values are measured, random, or depend on folders and on the source tree.
_VOLATILE = re.compile(
    r"seconds|(^|_)(time|times|timestamp|date|started|ended|created)$|_mb$|_gb$|memory|rate$|per_second|speed|inode|"
    r"^pid$|^host|fingerprint|flops|free|_runtime$"
)
_SOURCE_HASH = "made_from.program"  # of the source code
_KEPT = ("learning_rate", "warmup_rate", "memory_limit_gb")  # keys that only look like these
_TEXT = [
    (re.compile(rf'("seconds": ){_NUMBER}'), r"\1<time>"),
    (re.compile(r"\[?\d{4}-\d\d-\d\d[ T]\d\d:\d\d(:\d\d)?([.,]\d+)?(Z|[+-]\d\d:?\d\d)?\]?"), "<date>"),
    (re.compile(r"\d{4}-\d\d-\d\d"), "<date>"),
    (re.compile(r"\b[WIE]\d{4} \d\d:\d\d:\d\d\.\d+ \d+ "), "<date> "),
    (re.compile(r"\bevents\.out\.tfevents\.[\w.-]+"), "events.out.tfevents.<run>"),
    (re.compile(r"(\.py):\d+"), r"\1:<line>"),
    (re.compile(r"(?<=[A-Za-z]\.)\d{2,}(?=[\"/\s]|$)", re.MULTILINE), "<process>"),  # .recipe.yaml.4711, for a moment
    (
        re.compile(rf"{_NUMBER} ?(?:\w+ )?(?:tokens|answers|rows|steps|examples|replies)(?:/s| a second| per second)"),
        "<speed>",
    ),
    (re.compile(rf"{_NUMBER}(?:k|M)? ?/s\b"), "<speed>"),
    (re.compile(r"\b\d+:\d\d(:\d\d)?\b|-:--:--"), "<time>"),
    (re.compile(rf"\b{_NUMBER}(?: |&nbsp;)?(?:µs|ms|s|sec|seconds?|min|minutes?|h|hours?)\b"), "<time>"),
    (re.compile(rf"\b{_NUMBER} ?(?:[kMGT]i?B|bytes)\b"), "<size>"),
]
_LOOSE = re.compile(rf"(?<!\w)(?<![A-Za-z]-){_NUMBER}")  # neither that of zero2 nor that of checkpoint-2
_COLUMNS = ("seconds", "s/step", "tokens/s", "GB")  # heads of tables over what is measured
_PASSING = re.compile(r"\d+%\||\(load [\d.]+ ")  # a bar of tqdm; that the machine is busy
_STEP = re.compile(r"\bstep (\d+)/(\d+)  epoch ")  # a line every few seconds
_SPENT = re.compile(r"(<td>[^<]*\b(?:seconds?|memory|[MG]B)\b[^<]*</td>\n<td>)[^<]*\d[^<]*")
_BAR = re.compile(r'(<rect class="bar"[^>]* width=")[^"]*("[^>]*>\n<text x=")[^"]*("[^>]*>)[^<]*')
_TILE = re.compile(r"<dt>(?:training time|(?:process|GPU) hours)</dt>.*?</div>", re.DOTALL)
_RULES = re.compile(r"([─━═╌-])\1{3,}")


def without_passing(lines: Iterable[str]) -> Iterator[str]:
    """Leave out progress: bars, that the machine is busy, and steps but for the first and the last of a training."""
    running = False
    for line in lines:
        step = _STEP.search(line)
        if _PASSING.search(line) or (step and running and step[1] != step[2]):
            continue
        running = step[1] != step[2] if step else running
        yield line


def without_columns(lines: Sequence[str], between: str) -> list[str]:
    """Replace the cells under heads that say what is measured, in tables of text.

    Args:
        lines: Of a text, in which a blank line ends a table. Cells are counted from the right: a row without its last
            cells loses others than those under such a head, but the same at each run.
        between: What separates two cells.
    """
    made, places = [], set[int]()
    for line in lines:
        cells = line.split(between)
        found = {place - len(cells) for place, cell in enumerate(cells) if cell.strip() in _COLUMNS}
        if found:
            places = found
        elif not line.strip():
            places = set()
        elif places and len(cells) > 1:
            for place in places:
                if -place <= len(cells) and re.search(r"\d", cells[place]):
                    cells[place] = re.sub(r"\S(.*\S)?", "<number>", cells[place])
        made.append(between.join(cells))
    return made


def without_html_columns(table: "re.Match[str]") -> str:
    """The same for a table of HTML, whose rows have all cells, and whose first row is its head."""
    before, head, *rows = re.split(r"(?=<tr)", table[0])
    heads = re.findall(r"<t[dh][^>]*>([^<]*)</t[dh]>", head)
    places = [place for place, cell in enumerate(heads) if cell in _COLUMNS]
    for number, row in enumerate(rows):
        parts = re.split(r"(<td[^>]*>)([^<]*)(?=</td>)", row)  # before, tag, text, before, tag, text ...
        for place in places:
            if 3 * place + 2 < len(parts) and re.search(r"\d", parts[3 * place + 2]):
                parts[3 * place + 2] = "<number>"
        rows[number] = "".join(parts)
    return "".join([before, head, *rows])


class Plain:
    """Replaces what is another value at each run.

    Args:
        work: The temporary folder.
        source: The source tree.
    """

    def __init__(self, work: Path, source: Path) -> None:
        self._paths = [
            (str(work / "here"), "<here>"),
            (str(work), "<work>"),
            (str(source), "<source>"),
            (str(REPOSITORY), "<repository>"),
            (str(Path(sys.prefix).resolve()), "<python>"),
            (sys.prefix, "<python>"),
            (str(Path.home()), "<home>"),
        ]

    def text(self, text: str, loose: bool = False) -> str:
        """Replace paths, dates, times, sizes and speeds in a text; `loose` replaces every number."""
        for path, word in self._paths:
            text = text.replace(path, word)
        text = re.sub(r"(<work>/temporary/[a-z-]+)\w+", r"\1<random>", text)
        for pattern, word in _TEXT:
            text = pattern.sub(word, text)
        return _LOOSE.sub("<number>", text) if loose else text

    def printed(self, text: str, command: Command) -> str:
        """What a command printed: without progress bars, and in columns that do not depend on a number's width."""
        lines = list(without_passing(line for whole in text.split("\n") for line in whole.split("\r")))
        if not command.name.startswith("help"):
            lines = [re.sub(r"(?<=\S) {2,}", "  ", line).rstrip() for line in lines]
            lines = [re.sub(r"^ {3,}", "   ", _RULES.sub(r"\1\1\1", line)) for line in lines]
            lines = [self.text(line, command.loose) for line in without_columns(lines, "  ")]
        if command.spread:
            lines = sorted(line for line in lines if line)
        return "\n".join(lines)

    def file_name(self, name: str) -> str:
        return self.text(name)

    def file(self, path: Path, loose: bool) -> str:
        """The content of a file as text."""
        if path.is_symlink():
            return f"link to {self.text(str(path.readlink()))}\n"
        kinds: dict[str, Callable[[Path, bool], str]] = {
            ".json": self._json,
            ".jsonl": self._json_lines,
            ".html": self._html,
            ".arrow": self._arrow,
            ".safetensors": lambda path, _: f"SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}\n",
        }
        if path.suffix in kinds:
            return kinds[path.suffix](path, loose)
        if path.name == ".minisft.files":
            return "".join(sorted(set(self.text(path.read_text(encoding="utf-8")).splitlines(keepends=True))))
        try:
            text = path.read_text(encoding="utf-8")
            if path.suffix == ".log":
                text = "\n".join(without_passing(text.splitlines())) + "\n"
            if path.suffix == ".md":
                text = "\n".join(without_columns(text.splitlines(), "|")) + "\n"
            return self.text(text, loose) or "empty\n"
        except UnicodeDecodeError:
            return "binary\n"

    def _json(self, path: Path, loose: bool) -> str:
        text = path.read_text(encoding="utf-8")
        try:
            value = json.loads(text)
        except ValueError:
            return self.text(text, loose)
        return json.dumps(self._value(value, loose), indent=1, ensure_ascii=False) + "\n"

    def _json_lines(self, path: Path, loose: bool) -> str:
        lines = path.read_text(encoding="utf-8").splitlines()
        return "".join(json.dumps(self._value(json.loads(line), loose), ensure_ascii=False) + "\n" for line in lines)

    def _value(self, value: Any, loose: bool, key: str = "") -> Any:
        name = key.rpartition(".")[2]
        volatile = (_VOLATILE.search(name) and name not in _KEPT) or key.endswith(_SOURCE_HASH)
        if isinstance(value, dict):
            return {self.text(name): self._value(one, loose, f"{key}.{name}") for name, one in value.items()}
        if isinstance(value, list):
            return [self._value(one, loose, key) for one in value]
        if isinstance(value, bool) or value is None:
            return value
        if isinstance(value, int | float):
            return "<number>" if loose or volatile else value
        return "<text>" if volatile else self.text(value, loose)

    def _html(self, path: Path, loose: bool) -> str:
        """A tag a line, and the data of the page's script as JSON."""
        text = path.read_text(encoding="utf-8")
        text = re.sub(r"(data:[\w/+.-]+;base64,)[A-Za-z0-9+/=]+", r"\1<data>", text)

        def data(found: "re.Match[str]") -> str:
            value = self._value(json.loads(found[2].replace("<\\/", "</")), loose)
            return f"{found[1]}\n{json.dumps(value, indent=1, ensure_ascii=False)}\n{found[3]}"

        text = re.sub(r'(<script type="application/json"[^>]*>)(.*?)(</script>)', data, text, flags=re.DOTALL)
        text = text.replace("><", ">\n<")
        text = re.sub(r"<table>.*?</table>", without_html_columns, text, flags=re.DOTALL)
        text = _BAR.sub(r"\1<number>\2<number>\3<number>", _SPENT.sub(r"\1<number>", text))
        text = _TILE.sub(lambda tile: re.sub(r">[^<]*\d[^<]*<", "><number><", tile[0]), text)
        return self.text(text, loose)

    def _arrow(self, path: Path, loose: bool) -> str:
        import pyarrow

        with pyarrow.memory_map(str(path)) as file:
            rows = pyarrow.ipc.open_stream(file).read_all().to_pylist()
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# --- compare -----------------------------------------------------------------------------------------------

Rewording = tuple["re.Pattern[str]", str]


def read_rewordings(path: Path) -> list[Rewording]:
    """Read lines `old => new`.

    Raises:
        SystemExit: A line is none, or `old` is no regular expression.
    """
    rewordings = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        old, arrow, new = line.partition(" => ")
        try:
            rewordings.append((re.compile(old), new))
        except re.error as error:
            raise SystemExit(f"{path}:{number}: {old} is no regular expression: {error}") from None
        if not arrow:
            raise SystemExit(f"{path}:{number}: write it as `old => new`")
    return rewordings


def compare(before: Path, after: Path, rewordings: Sequence[Rewording] = ()) -> int:
    """Print how the records differ, command by command; return the exit status."""
    for folder in (before, after):
        if not folder.is_dir():
            raise SystemExit(f"{folder} is no record")
    names = sorted({path.name for folder in (before, after) for path in folder.iterdir()})
    differing = 0
    for name in names:
        lines = list(differences(texts_of(before / name, rewordings), texts_of(after / name)))
        differing += bool(lines)
        print(f"{name}: {'DIFFERENT' if lines else 'identical'}")
        for line in lines:
            print(f"    {line}")
    print(f"{len(names)} commands, {differing} of them different")
    return 1 if differing else 0


def texts_of(folder: Path, rewordings: Sequence[Rewording] = ()) -> dict[str, list[str]]:
    """The lines of each file of a command's record, reworded, and the names too."""

    def reworded(line: str) -> str:
        for old, new in rewordings:
            line = old.sub(new, line)
        return line

    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        reworded(path.relative_to(folder).as_posix()): list(map(reworded, path.read_text("utf-8").splitlines()))
        for path in paths
    }


def differences(before: Mapping[str, Sequence[str]], after: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """A unified diff of the files of a command's record."""
    for name in sorted({*before, *after}):
        yield from difflib.unified_diff(
            before.get(name, []), after.get(name, []), f"before/{name}", f"after/{name}", lineterm="", n=1
        )
        if (name in before) != (name in after) and not before.get(name) and not after.get(name):
            yield f"only {'before' if name in before else 'after'}: {name}"


if __name__ == "__main__":
    main()
