"""The run folder of a variant, which shares files with the variants before it; `compare` and `search` use it."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from minisft.manifest import record_files, record_folder, record_scratch_folder
from minisft.recipe import Recipe
from minisft.run_start import start_run


def begin_variant(recipe: Recipe, earlier: Sequence[Path], shared: Sequence[str], *, force: bool = False) -> None:
    """Make the run folder of a variant, and share files of earlier run folders into it, from the first that has them.

    They need not fit this variant: the preparation and the evaluation use them only if their fingerprints match.

    Args:
        recipe: The variant's recipe; its `output` is the folder.
        earlier: Run folders.
        shared: Files and folders to share, as paths relative to a run folder.
        force: Begin a new run in place of the one in the folder.

    Raises:
        UserError: The folder is not a run, is in use, or holds another recipe's run.
    """
    with start_run(recipe, force=force, prepares_only=True) as started:
        started.replace_old_run()
        for folder in earlier:
            for name in shared:
                share(folder / name, Path(recipe.output) / name)


def share(source: Path, target: Path) -> None:
    """Give `target` the content of the file or folder `source`, if that exists and the target does not.

    The target is complete or absent. Files of a folder are linked if the file system can: neither is ever changed in
    place.
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
    except OSError:  # the file system has no hard links
        shutil.copy2(source, target)
