"""benchmarks/structure.py counts what it says, on a tree of a few lines."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def structure(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("structure")


@pytest.fixture
def measure(structure, tmp_path):
    """Write files by name into a package and measure it."""

    def measure_files(files):
        for name, text in {"__init__.py": "", **files}.items():
            path = tmp_path / "tree" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return structure.measure(tmp_path / "tree")

    return measure_files


@pytest.mark.parametrize(
    ("text", "once"),
    [
        ("def _f(): ...\n_f()", 1),
        ("def _f(): ...\n_f()\n_f()", 0),
        ("def _f(): ...", 0),
        ("def _f(): ...\nmap(_f, [])", 1),  # passed as a value
        ("def _f(): return _f()\n_f()", 1),  # recursion is no call site
        ("def _f(): ...\nclass A:\n    call = _f", 1),
        ("class A:\n    def _f(self): ...\n    def g(self): self._f()", 1),
        ("class A:\n    def _f(self): ...\n    def g(self): self._f() or self._f()", 0),
        ("class A:\n    def __f__(self): ...\nA().__f__()", 0),  # a dunder name is not private
        ("def _f():\n    def _g(): ...\n    return _g()\n_f()", 2),  # a nested function is a function
        ("@_f\ndef g(): ...\ndef _f(h): ...", 1),
    ],
)
def test_private_functions_with_one_call_site(measure, text, once):
    assert measure({"a.py": text}).private_one_call == once


def test_private_functions_of_one_name_in_two_files_have_call_sites_of_their_own(measure):
    found = measure({"a.py": "def _f(): ...\n_f()", "b.py": "def _f(): ...\n_f()"})
    assert (found.private_one_call, found.private_one_call_by_name) == (2, 0)


def test_a_private_function_that_another_file_imports_has_call_sites_there(measure):
    assert measure({"a.py": "def _f(): ...\n_f()", "b.py": "from tree.a import _f\n_f()"}).private_one_call == 0


def test_public_functions_count_in_the_whole_tree_and_imports_are_no_call_sites(measure):
    found = measure({"a.py": "def f(): ...\ndef g(): ...", "b.py": "from .a import f, g\nf()"})
    assert (found.one_call, found.private_one_call) == (1, 0)


def test_cycles_with_type_checking_and_function_level_imports(measure):
    found = measure(
        {
            "a.py": "import typing\nfrom tree import b\nif typing.TYPE_CHECKING:\n    from tree.c import C",
            "b.py": "import os",
            "c.py": "from . import a",
            "d.py": "def f():\n    from tree.e import g",
            "e.py": "import tree.d",
        }
    )
    assert found.cycles == [["tree.a", "tree.c"]]
    assert found.all_cycles == [["tree.a", "tree.c"], ["tree.d", "tree.e"]]


def test_a_cycle_of_three_is_one_cycle(measure):
    found = measure({"a.py": "import tree.b", "b.py": "import tree.c", "c.py": "import tree.a"})
    assert found.cycles == [["tree.a", "tree.b", "tree.c"]]


def test_the_import_of_a_packages_file_is_not_one_of_the_package(measure):
    files = {"p/__init__.py": "from tree.p.a import f", "p/a.py": "from tree.p import b", "p/b.py": ""}
    assert measure(files).cycles == []
    assert measure({"p/b.py": "from tree.p import f"}).cycles == [["tree.p", "tree.p.a", "tree.p.b"]]


def test_a_relative_import_begins_at_the_package(measure):
    found = measure(
        {
            "p/__init__.py": "",
            "p/a.py": "from .b import f",
            "p/b.py": "from ..a import f",
            "a.py": "from .p.a import f",
        }
    )
    assert found.cycles == [["tree.a", "tree.p.a", "tree.p.b"]]


def test_the_closure_of_train_has_packages_and_no_type_checking_imports(structure, measure):
    found = measure(
        {
            "p/__init__.py": "import tree.c",
            "p/a.py": "from typing import TYPE_CHECKING\n"
            "def f():\n    import tree.b\nif TYPE_CHECKING:\n    import tree.d",
            "b.py": "",
            "c.py": "",
            "d.py": "",
        }
    )
    closure = structure.import_closure(structure.read_tree(found.tree), ["tree.p.a"])
    assert closure == ["tree", "tree.b", "tree.c", "tree.p", "tree.p.a"]


def test_long_functions_and_lengths(measure):
    long = "@staticmethod\ndef long():\n" + "    pass\n" * 60
    found = measure({"a.py": long + "def short(): ...\n", "b.py": "def not_long():\n" + "    pass\n" * 59})
    assert found.lengths == [1, 60, 61]
    assert found.long_functions == [("a.py", "long", 61)]


def test_comments_and_docstrings(measure):
    found = measure(
        {
            "a.py": '"""Two\nlines."""\n\nx = 1  # after code\n# alone\ny = "# no comment"\n',
            "b.py": 'def f():\n    """One line."""\n    z = """\n# no comment either\n"""\n',
        }
    )
    assert (found.comment_lines, found.docstring_lines, found.full_lines) == (2, 3, 5 + 5)


def test_files_of_one_name_and_long_files(measure):
    found = measure({"table.py": "x = 1\n" * 401, "p/__init__.py": "", "p/table.py": "x = 1\n" * 400})
    assert found.collisions == {"table.py": ["p/table.py", "table.py"]}
    assert found.long_files == [("table.py", 401)]


def test_tests_are_left_out(measure):
    files = {"a.py": "", "test_a.py": "def f(): ...", "conftest.py": "", "tests/b.py": "", "b_test.py": ""}
    assert measure(files).files == 2  # a and __init__


def test_web_files_have_lines_of_their_own(measure):
    assert measure({"page.html": "<p>\n</p>\n"}).web_lines == {".html": 2, ".js": 0, ".css": 0, ".j2": 0}


def test_a_tree_that_is_no_package_is_measured_from_its_root(structure, tmp_path):
    (tmp_path / "a.py").write_text("import b")
    (tmp_path / "b.py").write_text("import a")
    assert structure.measure(tmp_path).cycles == [["a", "b"]]


def test_a_file_that_python_cannot_parse_is_named(measure, capsys):
    assert measure({"a.py": "print 1"}).files == 1
    assert "a.py" in capsys.readouterr().err


def test_a_window_counts_files_and_returns_to_them(structure, tmp_path):
    """What runs through an import and each further value of a generator are no calls."""
    texts = {
        "one": "def start():\n    import two\n    return list(two.values())\ndef number():\n    return 7\n",
        "two": "import one\none.number()\ndef values():\n    yield 1\n    yield one.number()\n    yield 3\n",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
    sys.path.insert(0, str(tmp_path))
    try:
        one = importlib.import_module("one")
        window = structure.Window(is_open=True)
        with structure.Tracer(tmp_path, [window], {}, {}).tracing():
            assert one.start() == [1, 7, 3]
    finally:
        sys.path.remove(str(tmp_path))
        for name in texts:
            sys.modules.pop(name, None)
    assert [Path(file).name for file in window.files] == ["one.py", "two.py"]
    assert (window.returns, len(window.pairs)) == (1, 1)  # values calls number


def test_a_name_that_does_not_exist_is_named(structure):
    with pytest.raises(SystemExit, match=r"pathlib:Path\.nothing does not exist"):
        structure.code_of("pathlib:Path.nothing")


def test_the_names_of_the_walk_exist(structure):
    for name in (structure.OPENS_SOURCE, structure.LOSS, structure.LOADS_MODEL, structure.PAGE):
        structure.code_of(name)


def test_the_script_prints_this_projects_figures():
    command = [sys.executable, str(BENCHMARKS / "structure.py")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "private, one call site" in printed
    assert "files in the closure of train" in printed


def test_no_modules_of_this_project_import_each_other(structure):
    found = structure.measure(BENCHMARKS.parent / "src" / "minisft")
    assert found.cycles == found.all_cycles == []
