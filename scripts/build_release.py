"""Build the wheel and the source distribution in dist/, check them, and say how to publish them.

    python scripts/build_release.py

The wheel must hold every file of the package and every recipe, and is installed into an empty environment without its
dependencies, where its command prints the version. Nothing is published.
"""

import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"


def main() -> None:
    shutil.rmtree(DIST, ignore_errors=True)
    call(sys.executable, "-m", "build", "--outdir", DIST, ROOT)
    [wheel], [source] = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    call(sys.executable, "-m", "twine", "check", "--strict", wheel, source)
    missing = missing_files(wheel)
    if missing:
        sys.exit(f"{wheel.name} lacks {', '.join(missing)}")
    version = installed_version(wheel)
    if f"-{version}-" not in wheel.name:
        sys.exit(f"{wheel.name} installs version {version}")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    if f"## {version}, unreleased" in changes:
        print(f"note: CHANGELOG.md still calls {version} unreleased")
    print(f"built {wheel.name} and {source.name} in dist/")
    print("to publish: python -m twine upload dist/*")


def call(*words: object) -> str:
    """Return what a command prints; exit with its output if it fails."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def missing_files(wheel: Path) -> list[str]:
    """Return the files of the package and the recipes that the wheel does not hold."""
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        [metadata] = [name for name in held if name.endswith(".dist-info/METADATA")]
        fields = Parser().parsestr(archive.read(metadata).decode())
    wanted = {f"minisft/recipes/{file.name}" for file in (ROOT / "recipes").iterdir() if file.is_file()}
    for file in (ROOT / "src" / "minisft").rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts:
            wanted.add(str(file.relative_to(ROOT / "src")))
    described = ("Summary", "License-Expression", "Classifier", "Keywords")
    return sorted(wanted - held) + [name for name in described if name not in fields]


def installed_version(wheel: Path) -> str:
    """Return what `minisft --version` prints in an environment that holds the wheel alone, from another folder."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        call(Path(folder, "bin", "python"), "-m", "pip", "install", "--quiet", "--no-deps", wheel)
        return call(Path(folder, "bin", "minisft"), "--version").split()[-1]


if __name__ == "__main__":
    main()
