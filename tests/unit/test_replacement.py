"""`--force` on random folders, with a failure at any file operation: nothing foreign changes, and one run is whole."""

import errno
import io
import os
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minisft.errors import UserError
from minisft.files import hold_lock, write_atomically, write_folder_atomically
from minisft.manifest import MARKER, foreign_files, read_marker, record_files
from minisft.recipe import DataRecipe, Recipe
from minisft.run_folder import RunFolder, delete_replaced_run
from minisft.run_start import open_run, restore_replaced_run, start_run

WRITTEN = ("recipe.yaml", "metrics.jsonl", "dataset/ledger.json", "dataset/train/data.arrow", "model/config.json",
           "checkpoints/checkpoint-4/model.safetensors", "evaluation/results.json")  # fmt: skip
OPERATIONS = 150  # more than a replacement takes
CHANGING = ("rename", "replace", "unlink", "rmdir", "mkdir", "open", "write", "symlink", "link")


class Killed(BaseException):
    """The process is gone: nothing that it would do afterwards happens."""


@contextmanager
def failing(at, killed):
    """Let the file operation number `at` fail: once with an error, or for good as when the process is killed."""
    real = {name: getattr(os, name) for name in CHANGING}
    real_open, count = io.open, 0

    def guarded(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == at or (killed and count > at):
                raise Killed if killed else OSError(errno.EIO, os.strerror(errno.EIO), str(args[0]))
            return function(*args, **kwargs)

        return call

    for name, function in real.items():
        setattr(os, name, guarded(function))
    io.open = guarded(real_open)
    try:
        yield
    finally:
        for name, function in real.items():
            setattr(os, name, function)
        io.open = real_open


def train(recipe, version, force=False):
    """What a command does with a run folder, but for the training itself."""
    with start_run(recipe, force=force) as started:
        with write_folder_atomically(started.run.dataset) as aside:
            (aside / "train").mkdir()
            (aside / "train" / "data.arrow").write_text(version)
            (aside / "ledger.json").write_text(version)
        started.replace_old_run()
        run = started.run
        delete_replaced_run(run)  # the first step is taken
        record_files(run.metrics)
        run.metrics.write_text(version)
        with write_folder_atomically(run.checkpoints / "checkpoint-4") as aside:
            (aside / "model.safetensors").write_text(version)
        with write_folder_atomically(run.model) as aside:
            (aside / "config.json").write_text(version)
    write_atomically(run.root / "evaluation" / "results.json", version)


def content(root, names=WRITTEN):
    return {name: (root / name).read_bytes() for name in names if (root / name).is_file()}


def tree(root):
    """Everything under a folder by name: bytes of files, targets of links."""
    found: dict[str, str | bytes] = {}
    for parent, folders, names in os.walk(root):
        for name in [*names, *folders]:
            path = Path(parent, name)
            if path.is_symlink():
                found[str(path.relative_to(root))] = str(path.readlink())
            elif path.is_file():
                found[str(path.relative_to(root))] = path.read_bytes()
    return found


def took_first_step(root):
    """Whether the folder holds the new run, and nothing that it still has to replace."""
    marker = read_marker(root) if root.exists() else None
    return marker is not None and not marker.replaces and content(root, WRITTEN[3:4]) == {WRITTEN[3]: b"new"}


NAMES = st.sampled_from(
    ["notes.txt", "model/mine.md", "checkpoints/checkpoint-4/notes", "checkpoints/best/x", "dataset/train/extra.arrow",
     "dataset/precious.txt", "evaluation/by_hand.json", "deep/er/file", "compare/notes.md", "logs/.lock",
     "metrics.jsonl.bak", ".hidden", "model/config.json.orig"]
)  # fmt: skip


@st.composite
def folders(draw):
    """What others put into a run folder: files, links to files and folders elsewhere, and a run of its own."""
    files = draw(st.dictionaries(NAMES, st.binary(max_size=8), max_size=5))
    links = draw(st.dictionaries(st.sampled_from(["link", "model/link", "evaluation/big", "dataset/link"]),
                                 st.sampled_from(["elsewhere", "elsewhere/file", "nowhere"]), max_size=3))  # fmt: skip
    return files, links, draw(st.booleans())


def fill(root, elsewhere, folder):
    files, links, nested = folder
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    for name, target in links.items():
        (root / name).symlink_to(elsewhere.parent / target)
    if nested:
        train(Recipe(model="m", output=str(root / "inner"), data=DataRecipe(source="d")), "inner")
    return {name: data for name, data in tree(root).items() if name in foreign_files(root)}


def places(root):
    return [root, *sorted(root.parent.glob(f"{root.name}.*-*"))]


def force_with_a_failure(folder, at, killed):
    """Replace a run that holds `folder`, fail at file operation `at`, and look at everything; say whether it ended."""
    base = Path(tempfile.mkdtemp())
    try:
        root, elsewhere = base / "run", base / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / "file").write_bytes(b"theirs")
        recipe = Recipe(model="m", output=str(root), data=DataRecipe(source="d"))
        train(recipe, "old")
        foreign = fill(root, elsewhere, folder)
        old, new, outside = content(root), dict.fromkeys(WRITTEN[1:], b"new"), tree(elsewhere)

        def require_nothing_foreign_changed():
            assert tree(elsewhere) == outside
            found = [tree(place) for place in places(root)]
            for name, data in foreign.items():
                assert [one.get(name) for one in found].count(data) == 1, name

        try:
            with failing(at, killed):
                train(recipe, "new", force=True)
            ended = True
        except (Killed, OSError, UserError):
            ended = False
        require_nothing_foreign_changed()
        olds = [place for place in places(root) if content(place) == old]
        assert olds or took_first_step(root)
        if ended:
            assert content(root, WRITTEN[1:]) == new
        elif not killed and not took_first_step(root):
            assert olds[0] == root, "an error before the first step leaves the old run where it was"

        # The same command again goes through, whatever the first one left.
        train(recipe, "new", force=True)
        assert content(root, WRITTEN[1:]) == new
        require_nothing_foreign_changed()
        return ended
    finally:
        shutil.rmtree(base)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(folders(), st.integers(1, OPERATIONS), st.booleans())
def test_force_loses_nothing_of_any_folder(folder, at, killed):
    force_with_a_failure(folder, at, killed)


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_failure_at_every_file_operation_loses_nothing(killed):
    folder = ({"notes.txt": b"n", "dataset/precious.txt": b"p"}, {"model/link": "elsewhere"}, False)
    ended = [force_with_a_failure(folder, at, killed) for at in range(1, OPERATIONS)]
    assert not ended[0]
    assert ended[-1], "the operations are more than OPERATIONS"


@pytest.fixture
def recipe(tmp_path):
    return Recipe(model="m", output=str(tmp_path / "run"), data=DataRecipe(source="d"))


def test_without_foreign_files_nothing_of_the_old_run_stays(recipe, tmp_path):
    train(recipe, "old")
    train(recipe, "new", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert content(tmp_path / "run", ("metrics.jsonl",)) == {"metrics.jsonl": b"new"}


def test_foreign_files_stay_and_are_named(recipe, tmp_path, capsys):
    train(recipe, "old")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    train(recipe, "new", force=True)
    assert "notes.txt" in capsys.readouterr().err
    assert tree(tmp_path / "run.old-1")["notes.txt"] == b"mine"
    assert content(tmp_path / "run.old-1") == {}


def test_the_old_run_is_restored_if_the_new_one_takes_no_step(recipe, tmp_path):
    train(recipe, "old")
    before = content(tmp_path / "run")
    with pytest.raises(RuntimeError), start_run(recipe, force=True) as started:  # noqa: PT012
        started.replace_old_run()
        assert content(tmp_path / "run.old-1") == before
        raise RuntimeError
    assert content(tmp_path / "run") == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_old_run_has_its_name_until_all_is_checked(recipe, tmp_path):
    train(recipe, "old")
    before = content(tmp_path / "run")
    with start_run(recipe, force=True):
        assert content(tmp_path / "run") == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("name", ["dataset", "model", "evaluation", "checkpoints"])
def test_a_linked_folder_stays_with_what_is_behind_the_link(recipe, tmp_path, name):
    train(recipe, "old")
    disk = tmp_path / "disk"
    (tmp_path / "run" / name).rename(disk)
    (tmp_path / "run" / name).symlink_to(disk)
    before = tree(disk)
    train(recipe, "new", force=True)
    assert tree(disk) == before
    assert content(tmp_path / "run", WRITTEN[1:]) == dict.fromkeys(WRITTEN[1:], b"new")
    assert not (tmp_path / "run" / name).is_symlink()
    assert (tmp_path / "run.old-1" / name).is_symlink()


def test_a_linked_output_leads_to_the_new_run(recipe, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk" / "real")
    (tmp_path / "disk" / "real").mkdir()
    train(recipe, "old")
    train(recipe, "new", force=True)
    assert (tmp_path / "run").is_symlink()
    assert content(tmp_path / "disk" / "real", ("metrics.jsonl",)) == {"metrics.jsonl": b"new"}
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real"]


def test_a_comparison_beside_the_run_stays_in_its_place(recipe, tmp_path):
    train(recipe, "old")
    inner = replace(recipe, output=str(tmp_path / "run" / "compare" / "zero1"))
    train(inner, "inner")
    (tmp_path / "run" / "comparison.json").write_text("{}")
    train(recipe, "new", force=True)
    assert content(tmp_path / "run" / "compare" / "zero1", ("metrics.jsonl",)) == {"metrics.jsonl": b"inner"}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("lock", [".lock", "evaluation/.lock", "compare/.lock"])
def test_a_run_that_another_command_works_in_is_not_replaced(recipe, tmp_path, lock):
    train(recipe, "old")
    (tmp_path / "run" / lock).parent.mkdir(exist_ok=True)
    before = content(tmp_path / "run")
    with hold_lock(tmp_path / "run" / lock), pytest.raises(UserError, match="another process is at work"):
        train(recipe, "new", force=True)
    assert content(tmp_path / "run") == before


def test_a_marker_copied_into_another_folder_is_ignored(recipe, tmp_path):
    train(recipe, "old")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert read_marker(tmp_path / "run") is not None
    assert read_marker(tmp_path / "copy") is None
    before = tree(tmp_path / "copy")
    with pytest.raises(UserError, match="it is a copy"):
        train(replace(recipe, output=str(tmp_path / "copy")), "new", force=True)
    assert tree(tmp_path / "copy") == before


def test_a_moved_run_is_still_replaced(recipe, tmp_path):
    train(recipe, "old")
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = replace(recipe, output=str(tmp_path / "moved"))
    train(moved, "new", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]


def test_a_hostile_manifest_leads_nowhere(recipe, tmp_path):
    train(recipe, "old")
    (tmp_path / "precious").write_text("theirs")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious").write_text("theirs")
    with (tmp_path / "run" / ".minisft.files").open("a") as file:
        file.write('"../precious"\n"../folder/"\n"/etc/hosts"\n"./"\n"/"\n""\n17\n{"torn\n')
        file.write(f'"{tmp_path}/folder/"\n')
    train(recipe, "new", force=True)
    assert (tmp_path / "precious").read_text() == "theirs"
    assert (tmp_path / "folder" / "precious").read_text() == "theirs"


def test_a_process_killed_after_the_renames_leaves_the_old_run_for_a_successor_to_delete(recipe, tmp_path):
    train(recipe, "old")
    before = content(tmp_path / "run")

    def killed():
        with start_run(recipe, force=True) as started:
            started.replace_old_run()
            os._exit(0)

    if (child := os.fork()) == 0:
        killed()
    os.waitpid(child, 0)
    assert content(tmp_path / "run.old-1") == before
    run = RunFolder(tmp_path / "run")
    with open_run(recipe):
        pass
    restore_replaced_run(run)
    assert content(tmp_path / "run") == before
    assert (tmp_path / "run" / MARKER).exists()


def test_a_damaged_manifest_lists_less_and_deletes_less(recipe, tmp_path):
    train(recipe, "old")
    (tmp_path / "run" / ".minisft.files").write_bytes(b'\x93\xff\x00garbage\n"metrics.jsonl"\n')
    train(recipe, "new", force=True)
    assert content(tmp_path / "run", WRITTEN[1:]) == dict.fromkeys(WRITTEN[1:], b"new")
    assert content(tmp_path / "run.old-1", ("model/config.json", "metrics.jsonl")) == {"model/config.json": b"old"}
