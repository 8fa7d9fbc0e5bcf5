"""How easily a Python source tree can be read: sizes, call sites, import cycles, and which files a path enters.

    python benchmarks/structure.py                        # this project
    python benchmarks/structure.py ~/nanochat/nanochat    # any other tree, measured in the same way
    python benchmarks/structure.py --walk                 # also: which files run, from a row to its loss and a score

Only the standard library is needed, except for `--walk`, which trains and scores a tiny model on the spot. Tests are
left out: folders named `test` or `tests`, and files named `test_*.py`, `*_test.py` and `conftest.py`.

Definitions:

- **Function**: every `def` and `async def`, methods and nested ones included. Its length is the number of lines from
  `def` to its last line; its docstring counts, its decorators do not.
- **Private**: a name with a leading underscore that is no dunder name.
- **Call site**: a place that refers to the function's name, as a name that is read or as an attribute (`self.name`,
  `module.name`). A function that is passed as a value has a call site there. Imports, the definition itself and
  recursion inside it are none. A private name is looked for in its own file and in files that import that name from
  it: `_read` of two files are two functions. A public name is looked for in the whole tree. This is name matching, and
  so an approximation: two methods of one name share their call sites, and a call that a framework makes is not seen.
- **One call site**: the share of all functions, so that trees with few private functions come out low. Dunder methods
  are among all functions, and never among those with one call site.
- **Comment line**: a line with a comment, alone or after code, as a share of the lines that are not blank. Docstrings
  are no comments; their lines are given apart.
- **Import cycle**: files of the tree that import each other, directly or through others. An import of a package
  stands for its `__init__` unless what is imported is a file of its own.
- **Returns to a file** (`--walk`): calls from one of our files to another that ran before. A row or an answer that
  comes again repeats its calls, so the number of different pairs of calling and called function stands beside it.
- **Closure of `train`**: the files that are imported, at the top of a file or inside a function, from those of
  `TRAIN`, through any number of others, with the `__init__` of their packages. Type-checking imports do not count.

At commit 4807146 these definitions give 132 files, 18,483 lines and 32 % private functions with one call site. The line
"by name" looks for private names in the whole tree too, where functions of one name share their call sites.
"""

import argparse
import ast
import contextlib
import dis
import importlib
import inspect
import io
import math
import os
import statistics
import sys
import tempfile
import threading
import tokenize
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
OURS = REPOSITORY / "src" / "minisft"

# --- names that have to follow the moves and renames of the project ----------------------------------------

TRAIN = ("minisft.training.run_training",)  # the file or files that implement `minisft train`
OPENS_SOURCE = "minisft.data.readers:read_files"  # its first call is the first read of a row
LOSS = "minisft.training.loss:row_loss"  # its first return is the loss of the first step, which has one row
LOADS_MODEL = "minisft.evaluation.backends:TransformersModel.__init__"  # called for the base and each checkpoint
PAGE = "minisft.report.page:write_report"  # from its call to its return, the page is made

# -----------------------------------------------------------------------------------------------------------

LONG_FUNCTION, LONG_FILE = 60, 400  # lines
WEB = (".html", ".js", ".css", ".j2")
TARGETS = {"row": 26, "page": 16, "closure": 40}  # files, for this project
RECIPE = """\
model: model
output: run
data: {source: talks.jsonl, template: mistral, max_length: 256, test_fraction: 0.25, processes: 1}
training: {max_steps: 1, learning_rate: 1.0e-3, precision: fp32}
evaluation: {max_new_tokens: 8, processes: 1}
"""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", nargs="?", type=Path, default=OURS, help="folder to measure (default: this project's)")
    parser.add_argument("--walk", action="store_true", help="also run MiniSFT and list the files that it enters")
    arguments = parser.parse_args()
    if not arguments.tree.is_dir():
        parser.error(f"{arguments.tree} is no folder")
    tree = arguments.tree.resolve()
    print("\n".join(as_text(measure(tree))))
    if arguments.walk:
        print("\n".join(walk(tree)))


# --- reading a tree ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A reference to a name.

    Args:
        name: What is referred to, without the object that an attribute is of.
        module: Dotted name of the file that it stands in.
        inside: The functions around it, the outermost first.
    """

    name: str
    module: str
    inside: tuple[Function, ...]


@dataclass(frozen=True)
class Import:
    """An import of one file of the tree by another.

    Args:
        target: Dotted name of the imported file.
        name: The name that `from target import name` takes out of it; empty where the file itself is imported.
        kind: "top" of the file, "typing" under `if TYPE_CHECKING`, or "inside" a function.
    """

    target: str
    name: str
    kind: str


@dataclass
class Module:
    """A parsed file."""

    name: str
    path: Path
    text: str
    functions: list[Function] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    imports: list[Import] = field(default_factory=list)


def read_tree(tree: Path) -> dict[str, Module]:
    """Parse the Python files of a tree, tests excluded.

    Returns:
        The files by dotted name; a package has the name of its folder. What Python cannot parse is left out, and named
        on stderr.
    """
    modules: dict[str, Module] = {}
    parsed: dict[str, ast.Module] = {}
    for path in sorted(tree.rglob("*.py")):
        if is_test(path.relative_to(tree)):
            continue
        name = dotted_name(tree, path)
        try:
            with tokenize.open(path) as file:
                text = file.read()
            parsed[name] = ast.parse(text)
        except (SyntaxError, UnicodeDecodeError) as error:
            print(f"left out: {path}: {error}", file=sys.stderr)
            continue
        modules[name] = Module(name, path, text)
    for name, module in modules.items():
        scan(parsed[name], module, modules, (), "top")
    return modules


def is_test(path: Path) -> bool:
    """Say whether a path, relative to its tree, belongs to tests."""
    in_folder = any(part in ("test", "tests") for part in path.parts[:-1])
    return in_folder or path.name == "conftest.py" or path.name.startswith("test_") or path.name.endswith("_test.py")


def dotted_name(tree: Path, path: Path) -> str:
    """Return the name by which the tree's own files import this one."""
    root = tree
    while (root / "__init__.py").exists():
        root = root.parent
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def scan(node: ast.AST, module: Module, modules: Mapping[str, Module], inside: tuple[Function, ...], kind: str) -> None:
    """Collect the functions, references and imports under a node."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            module.functions.append(child)
            scan(child, module, modules, (*inside, child), "inside")
            continue
        if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Load):
            module.places.append(Place(child.id, module.name, inside))
        elif isinstance(child, ast.Attribute):
            module.places.append(Place(child.attr, module.name, inside))
        elif isinstance(child, ast.Import | ast.ImportFrom):
            module.imports.extend(own_imports(child, module, modules, kind))
        if isinstance(child, ast.If) and is_type_checking(child.test):
            for statement in child.body:
                scan(ast.Module([statement], []), module, modules, inside, "typing")
            scan(ast.Module(child.orelse, []), module, modules, inside, kind)
        else:
            scan(child, module, modules, inside, kind)


def is_type_checking(test: ast.expr) -> bool:
    return "TYPE_CHECKING" in (getattr(test, "id", ""), getattr(test, "attr", ""))


def own_imports(
    node: ast.Import | ast.ImportFrom, module: Module, modules: Mapping[str, Module], kind: str
) -> Iterator[Import]:
    """The files of the tree that an import statement names."""
    if isinstance(node, ast.Import):
        names = [(alias.name, "") for alias in node.names]
    else:
        base = node.module or ""
        if node.level:
            package = module.name.split(".") + (["__init__"] if module.path.name == "__init__.py" else [])
            base = ".".join(filter(None, [*package[: -node.level], base]))
        names = [(base, alias.name) for alias in node.names]
    for base, name in names:
        whole = f"{base}.{name}" if base else name
        if name and whole in modules:
            yield Import(whole, "", kind)
        elif base in modules:
            yield Import(base, name, kind)


# --- figures -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """What is measured of a tree.

    Args:
        tree: The folder.
        files: Number of Python files.
        lines: Their lines.
        web_lines: Lines of each kind of web file.
        lengths: Length of every function in lines, in ascending order.
        long_functions: (file, function, lines) of those over `LONG_FUNCTION`.
        one_call: Functions with one call site, private and public.
        private_one_call: The private ones of them.
        private_one_call_by_name: As before, but any function of that name in the whole tree shares the call sites.
        comment_lines: Lines with a comment.
        docstring_lines: Lines of docstrings.
        full_lines: Lines that are not blank.
        cycles: Import cycles, each as its members; function-level imports do not count, type-checking ones do.
        all_cycles: The same with function-level imports.
        collisions: Base names that several files have, with those files.
        long_files: (file, lines) of those over `LONG_FILE`.
        closure: The files that `minisft train` imports; empty for another tree.
    """

    tree: Path
    files: int
    lines: int
    web_lines: dict[str, int]
    lengths: list[int]
    long_functions: list[tuple[str, str, int]]
    one_call: int
    private_one_call: int
    private_one_call_by_name: int
    comment_lines: int
    docstring_lines: int
    full_lines: int
    cycles: list[list[str]]
    all_cycles: list[list[str]]
    collisions: dict[str, list[str]]
    long_files: list[tuple[str, int]]
    closure: list[str]


def measure(tree: Path) -> Figures:
    """Measure a source tree."""
    modules = read_tree(tree)
    sites = CallSites(modules)
    functions = [(module, function) for module in modules.values() for function in module.functions]
    once = [(module, function) for module, function in functions if sites.count(module, function) == 1]
    by_name = [function for _, function in functions if sites.count_by_name(function) == 1]
    sizes = {relative(tree, module): len(module.text.splitlines()) for module in modules.values()}
    ours = set(TRAIN) <= modules.keys()
    return Figures(
        tree=tree,
        files=len(modules),
        lines=sum(sizes.values()),
        web_lines=web_lines(tree),
        lengths=sorted(length(function) for _, function in functions),
        long_functions=[
            (relative(tree, module), function.name, length(function))
            for module, function in functions
            if length(function) > LONG_FUNCTION
        ],
        one_call=sum(not is_dunder(function) for _, function in once),
        private_one_call=sum(is_private(function) for _, function in once),
        private_one_call_by_name=sum(is_private(function) for function in by_name),
        comment_lines=sum(count_comment_lines(module.text) for module in modules.values()),
        docstring_lines=sum(count_docstring_lines(module.text) for module in modules.values()),
        full_lines=sum(bool(line.strip()) for module in modules.values() for line in module.text.splitlines()),
        cycles=import_cycles(modules, ("top", "typing")),
        all_cycles=import_cycles(modules, ("top", "typing", "inside")),
        collisions=colliding_names([relative(tree, module) for module in modules.values()]),
        long_files=[(name, size) for name, size in sizes.items() if size > LONG_FILE],
        closure=import_closure(modules, TRAIN) if ours else [],
    )


def relative(tree: Path, module: Module) -> str:
    return module.path.relative_to(tree).as_posix()


def length(function: Function) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def is_dunder(function: Function) -> bool:
    return function.name.startswith("__") and function.name.endswith("__")


def is_private(function: Function) -> bool:
    return function.name.startswith("_") and not is_dunder(function)


class CallSites:
    """How often each function of a tree is referred to; see the top of this file for what counts."""

    def __init__(self, modules: Mapping[str, Module]) -> None:
        self._places: dict[str, list[Place]] = {}
        for module in modules.values():
            for place in module.places:
                self._places.setdefault(place.name, []).append(place)
        self._taken = {
            (module.name, taken.target, taken.name) for module in modules.values() for taken in module.imports
        }

    def count(self, module: Module, function: Function) -> int:
        """The call sites of a function of a file."""
        return sum(
            function not in place.inside
            and (
                not is_private(function)
                or place.module == module.name
                or (place.module, module.name, function.name) in self._taken
            )
            for place in self._places.get(function.name, [])
        )

    def count_by_name(self, function: Function) -> int:
        """The references to its name in the whole tree, whichever function of that name is meant."""
        return sum(function not in place.inside for place in self._places.get(function.name, []))


def web_lines(tree: Path) -> dict[str, int]:
    found = dict.fromkeys(WEB, 0)
    for path in tree.rglob("*"):
        if path.suffix in WEB and path.is_file() and not is_test(path.relative_to(tree)):
            found[path.suffix] += len(path.read_text(encoding="utf-8", errors="replace").splitlines())
    return found


def count_comment_lines(text: str) -> int:
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return len({token.start[0] for token in tokens if token.type == tokenize.COMMENT})


def count_docstring_lines(text: str) -> int:
    lines = 0
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | Function) and ast.get_docstring(node) is not None:
            lines += (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
    return lines


def import_cycles(modules: Mapping[str, Module], kinds: Iterable[str]) -> list[list[str]]:
    """The largest groups of files in which each imports each other one, directly or through others."""
    reached = {name: set(reach(modules, [name], kinds)) - {name} for name in modules}
    groups = {
        tuple(sorted([name, *(other for other in others if name in reached[other])]))
        for name, others in reached.items()
    }
    return sorted(list(group) for group in groups if len(group) > 1)


def reach(modules: Mapping[str, Module], start: Sequence[str], kinds: Iterable[str]) -> dict[str, None]:
    """The files to which imports of these kinds lead, `start` among them."""
    found, waiting, kinds = dict.fromkeys(start), list(start), tuple(kinds)
    while waiting:
        for imported in modules[waiting.pop()].imports:
            if imported.kind in kinds and imported.target not in found:
                found[imported.target] = None
                waiting.append(imported.target)
    return found


def import_closure(modules: Mapping[str, Module], start: Sequence[str]) -> list[str]:
    """The files that are imported from `start`, with the `__init__` files that Python imports on the way."""
    found: set[str] = set()
    waiting = list(start)
    while waiting:
        for name in reach(modules, [waiting.pop()], ("top", "inside")):
            parts = name.split(".")
            names = {".".join(parts[:number]) for number in range(1, len(parts) + 1)} & modules.keys()
            waiting.extend(names - found - {name})
            found |= names
    return sorted(found)


def colliding_names(paths: Sequence[str]) -> dict[str, list[str]]:
    names = Counter(Path(path).name for path in paths)
    return {
        name: [path for path in paths if Path(path).name == name]
        for name, number in sorted(names.items())
        if number > 1 and name != "__init__.py"
    }


# --- print -------------------------------------------------------------------------------------------------


def as_text(found: Figures) -> list[str]:
    """The figures as lines to print."""
    number = len(found.lengths)
    rows = [
        ("Python files", f"{found.files:,}"),
        ("lines, Python", f"{found.lines:,}"),
        *((f"lines, {kind}", f"{lines:,}") for kind, lines in found.web_lines.items() if lines),
        ("functions", f"{number:,}"),
    ]
    if number:
        rows += [
            ("  length, median", f"{statistics.median(found.lengths):g} lines"),
            ("  length, 90th percentile", f"{found.lengths[math.ceil(number * 0.9) - 1]} lines"),
            ("  of at most 10 lines", share(sum(lines <= 10 for lines in found.lengths), number)),
            ("  of at most 40 lines", share(sum(lines <= 40 for lines in found.lengths), number)),
            (f"  over {LONG_FUNCTION} lines", f"{len(found.long_functions)}"),
            ("  private, one call site", share(found.private_one_call, number)),
            ("  private, one call site, by name", share(found.private_one_call_by_name, number)),
            ("  private or public, one call site", share(found.one_call, number)),
        ]
    if found.full_lines:
        rows += [
            ("lines with a comment", share(found.comment_lines, found.full_lines)),
            ("lines of docstrings", share(found.docstring_lines, found.full_lines)),
        ]
    rows += [
        ("import cycles, top of files and type checking", f"{len(found.cycles)}"),
        ("import cycles, inside functions too", f"{len(found.all_cycles)}"),
        ("file names that occur more than once", f"{len(found.collisions)}"),
        (f"files over {LONG_FILE} lines", f"{len(found.long_files)}"),
    ]
    if found.closure:
        rows.append(("files in the closure of train", f"{len(found.closure)} (target {TARGETS['closure']})"))
    return [
        f"{found.tree}",
        *(f"  {name:<49}{value}" for name, value in rows),
        *listed("Functions over 60 lines", (f"{path}: {name}, {n} lines" for path, name, n in found.long_functions)),
        *listed("Import cycles, top of files and type checking", map(" ".join, found.cycles)),
        *listed("Import cycles, inside functions too", map(" ".join, found.all_cycles)),
        *listed("File names that occur more than once", map(" ".join, found.collisions.values())),
        *listed("Files over 400 lines", (f"{path}, {n} lines" for path, n in found.long_files)),
        *listed("Closure of train", found.closure),
    ]


def share(part: int, whole: int) -> str:
    return f"{part:,} ({part / whole:.1%})"


def listed(title: str, items: Iterable[str]) -> list[str]:
    """A heading and its items; nothing where there are none."""
    lines = [f"  {item}" for item in items]
    return ["", title, *lines] if lines else []


# --- the walk ----------------------------------------------------------------------------------------------


@dataclass
class Window:
    """Which files run while it is open.

    A file runs when one of its functions is called, is resumed (a generator), or calls into another of our files. Code
    that runs because a file is imported does not count. A return is a call from one file to another that ran before.
    """

    is_open: bool = False
    files: dict[str, None] = field(default_factory=dict)
    returns: int = 0
    pairs: set[tuple[CodeType, CodeType]] = field(default_factory=set)

    def enter(self, caller: FrameType | None, called: CodeType, begins: bool) -> None:
        """Note a call, or that a generator goes on (`begins` is false)."""
        if not self.is_open:
            return
        if caller is not None:
            self.files[caller.f_code.co_filename] = None
            if begins and caller.f_code.co_filename != called.co_filename and called.co_filename in self.files:
                self.returns += 1
                self.pairs.add((caller.f_code, called))
        self.files[called.co_filename] = None


class Tracer:
    """Notes in windows which functions of a folder are called.

    Args:
        folder: Whose code is traced.
        windows: What notes it.
        on_call: By code, what is done before such a call is noted; it is given the frame.
        on_return: By code, what is done after it returned.
    """

    def __init__(
        self,
        folder: Path,
        windows: Sequence[Window],
        on_call: Mapping[CodeType, Callable[[FrameType], None]],
        on_return: Mapping[CodeType, Callable[[], None]],
    ) -> None:
        self._prefix = f"{folder}{os.sep}"
        self._windows = windows
        self._on_call, self._on_return = on_call, on_return

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """Trace this thread, and those that start meanwhile."""
        threading.setprofile(self._see)
        sys.setprofile(self._see)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]

    def _see(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if not code.co_filename.startswith(self._prefix):
            return
        if event == "return" and code in self._on_return:
            self._on_return[code]()
        elif event == "call" and not self._imports(frame):
            if code in self._on_call:
                self._on_call[code](frame)
            for window in self._windows:
                window.enter(self._own_caller(frame), code, begins=is_beginning(frame))

    def _imports(self, frame: FrameType) -> bool:
        """Whether the frame runs because one of our files is imported."""
        around: FrameType | None = frame
        while around is not None:
            if around.f_code.co_name == "<module>" and around.f_code.co_filename.startswith(self._prefix):
                return True
            around = around.f_back
        return False

    def _own_caller(self, frame: FrameType) -> FrameType | None:
        around = frame.f_back
        while around is not None and not around.f_code.co_filename.startswith(self._prefix):
            around = around.f_back
        return around


def is_beginning(frame: FrameType) -> bool:
    """Say whether a call begins the body of a function: a generator is called again for each value.

    Since Python 3.11 a call that only makes the generator is seen too; it is none.
    """
    if not frame.f_code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
        return True
    for step in dis.get_instructions(frame.f_code):
        if step.opname == "RETURN_GENERATOR" and frame.f_lasti < step.offset:
            return False
        if step.opname in ("YIELD_VALUE", "YIELD_FROM", "SEND"):
            return frame.f_lasti < step.offset
    return True


def walk(tree: Path) -> list[str]:
    """Train and score a tiny model by the command line; list which files run.

    Raises:
        SystemExit: The tree is not MiniSFT, a name at the top of this script does not exist, or a command fails.
    """
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    sys.path[:0] = [str(tree.parent), str(REPOSITORY)]
    package = importlib.import_module("minisft")
    if Path(str(package.__file__)).parent != tree:
        raise SystemExit(f"--walk measures MiniSFT alone, and {tree} is not the minisft that Python imports")
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed says there that it finds no GPU
                make_inputs()
            return [*walk_to_loss(tree), *walk_to_page(tree)]
        finally:
            os.chdir(here)


def make_inputs() -> None:
    """Write a tiny random model, eight conversations and their recipe into the working directory."""
    from tests.tiny import write_conversations, write_tiny_model

    write_tiny_model(Path("model"))
    write_conversations(Path("talks.jsonl"), 8)
    Path("recipe.yaml").write_text(RECIPE, encoding="utf-8")


def walk_to_loss(tree: Path) -> list[str]:
    """`minisft train`: which files run from the command to the loss of the first step."""
    command, row = Window(is_open=True), Window()
    imported: list[str] = []

    def begin(frame: FrameType) -> None:
        row.is_open = not imported

    def end() -> None:
        command.is_open = row.is_open = False
        imported[:] = imported or sorted(name for name in sys.modules if name.split(".")[0] == tree.name)

    tracer = Tracer(tree, [command, row], {code_of(OPENS_SOURCE): begin}, {code_of(LOSS): end})
    with tracer.tracing():
        run_command("train", "recipe.yaml")
    require_met(row.files and imported, OPENS_SOURCE, LOSS)
    return [
        *listed_window("From the command `minisft train` to the loss of the first step", tree, command),
        *listed_window(f"Of these, from the first read of a row (target {TARGETS['row']} files)", tree, row),
        *listed(f"Files imported by then: {len(imported)}", imported),
    ]


def walk_to_page(tree: Path) -> list[str]:
    """`minisft evaluate` and `minisft report`: which files run from the checkpoint to its scores on the page."""
    command, score, apart = Window(is_open=True), Window(), Window()

    def begin(frame: FrameType) -> None:
        if any("checkpoint-" in str(value) for value in frame.f_locals.values()):  # it is not the base model
            score.is_open = apart.is_open = True

    def begin_page(frame: FrameType) -> None:
        apart.is_open = score.is_open

    pages: list[Path] = []

    def end() -> None:
        command.is_open = score.is_open = apart.is_open = False
        pages.append(Path("run", "report.html"))

    on_call = {code_of(LOADS_MODEL): begin, code_of(PAGE): begin_page}
    with Tracer(tree, [command, score, apart], on_call, {code_of(PAGE): end}).tracing():
        run_command("evaluate", "run")
        apart.is_open = False
        run_command("report", "run")
    require_met(score.files and pages and pages[0].exists(), LOADS_MODEL, PAGE)
    return [
        *listed_window("From the command `minisft evaluate` to report.html, by `minisft report`", tree, command),
        *listed_window("Of these, from the load of the checkpoint", tree, score),
        *listed_window(f"Of these, without the start of `report` (target {TARGETS['page']} files)", tree, apart),
    ]


def code_of(name: str) -> CodeType:
    """Return the code of a function, named as module:function or module:class.function.

    Raises:
        SystemExit: There is none of that name.
    """
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
        return inspect.unwrap(found).__code__
    except (ImportError, AttributeError) as error:
        raise SystemExit(f"{name} does not exist ({error}): update the names at the top of {__file__}") from None


def run_command(*words: str) -> None:
    """Run a command in this process, without its output.

    Raises:
        SystemExit: It failed; with its output.
    """
    cli = importlib.import_module("minisft.cli")
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = cli.main(list(words))
    if status:
        raise SystemExit(f"minisft {' '.join(words)} ended with {status}:\n{output.getvalue()}")


def require_met(met: object, *names: str) -> None:
    if not met:
        raise SystemExit(f"{' or '.join(names)} was not called: update the names at the top of {__file__}")


def listed_window(title: str, tree: Path, window: Window) -> list[str]:
    files = [Path(file).relative_to(tree).as_posix() for file in window.files]
    returns = f"  {window.returns:,} returns to a file that ran before, by {len(window.pairs):,} pairs of functions"
    return ["", f"{title}: {len(files)} files", returns, *(f"{n:>4}  {file}" for n, file in enumerate(files, 1))]


if __name__ == "__main__":
    main()
