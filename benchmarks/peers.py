"""Environments for the tools that MiniSFT is measured against, each of its own; run as a script it does nothing."""

import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

TRL = "trl==1.16.0"
SWIFT = "ms-swift==4.6.0"
_READY = "ready"  # a file that is there when all is installed


def trl_python(folder: Path) -> Path:
    """Return the interpreter of an environment with TRL under `folder`, which borrows all else from this one."""
    return _environment(folder / "trl", [["--no-deps", "--ignore-installed", TRL]], borrowing=True)


def swift_python(folder: Path) -> Path:
    """Return the interpreter of an environment with ms-swift under `folder`: whole, since it needs older libraries.

    Only torch is of the release that is measured here, so that both calculate alike.
    """
    torch = importlib.metadata.version("torch").split("+")[0]
    return _environment(folder / "swift", [[f"torch=={torch}"], [f"torch=={torch}", SWIFT]], borrowing=False)


def _environment(folder: Path, installs: list[list[str]], *, borrowing: bool) -> Path:
    """Make a virtual environment by one `pip install` after the other, or find it made.

    Raises:
        subprocess.CalledProcessError: with what pip said in `stderr`.
    """
    python = folder.absolute() / "bin" / "python"
    if (folder / _READY).exists():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    _run([sys.executable, "-m", "venv", str(folder)])
    if borrowing:
        ours = next(path for path in sys.path if path.endswith("site-packages"))
        theirs = next(folder.glob("lib/python*/site-packages"))
        (theirs / "borrowed.pth").write_text(ours + "\n")
    for install in installs:
        _run([str(python), "-m", "pip", "install", "--quiet", *install])
    (folder / _READY).touch()
    return python


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
