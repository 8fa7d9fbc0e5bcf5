"""GGUF files that need llama.cpp's own tools: families that our writer does not know, and q4_k_m.

`convert_hf_to_gguf.py` and `llama-quantize` run as processes of their own, from the folder that the user names or from
the installed engines; the quantiser also from the PATH.
"""

import os
import subprocess
import sys
from pathlib import Path

from minisft.errors import UserError
from minisft.exporting.engines import engines_folder, find_program
from minisft.exporting.gguf_writer import ARCHITECTURES, DTYPES, write_gguf
from minisft.manifest import record_files
from minisft.models import load_config

QUANTISED_DTYPES = ("q4_k_m",)  # by llama-quantize only
_CONVERTER, _QUANTISER = "convert_hf_to_gguf.py", "llama-quantize"


def write_any_gguf(folder: Path, target: Path, dtype: str, llama_cpp: Path | None = None) -> str:
    """Write a model folder to one GGUF file, completely or not at all, with llama.cpp's tools where they are needed.

    Args:
        folder: Plain model folder.
        target: Path of the file, in a folder that exists.
        dtype: One of `gguf_writer.DTYPES`, or q4_k_m.
        llama_cpp: Folder with convert_hf_to_gguf.py, llama-quantize (there or in bin or build/bin), or both.

    Returns:
        What wrote it: "minisft", "convert_hf_to_gguf.py", or either "with llama-quantize".

    Raises:
        UserError: A tool is needed and not there, or it failed; or the model cannot be translated.
        OSError: The file cannot be written.
    """
    if dtype not in (*DTYPES, *QUANTISED_DTYPES):
        known = ", ".join((*DTYPES, *QUANTISED_DTYPES))
        raise UserError(f"--dtype {dtype}", "there is no such number format for GGUF", f"choose among {known}")
    if dtype in DTYPES:
        return _write_unquantised(folder, target, dtype, llama_cpp)
    quantiser = find_program(_QUANTISER, "llama.cpp", llama_cpp)
    if quantiser is None:
        problem = f"{dtype} is made by llama.cpp's {_QUANTISER}, and there is none"
        fix = f"pass --llama-cpp FOLDER, with a folder that holds {_QUANTISER}, or use --dtype q8_0"
        raise UserError(f"--dtype {dtype}", problem, fix)
    whole, quantised = (_beside(target, part) for part in ("f32", "quantised"))
    try:
        writer = _write_unquantised(folder, whole, "f32", llama_cpp)
        _run([str(quantiser), str(whole), str(quantised), dtype.upper()], {})
        _replace(quantised, target)
    finally:
        whole.unlink(missing_ok=True)
        quantised.unlink(missing_ok=True)
    return f"{writer} with {_QUANTISER}"


def find_converter(llama_cpp: Path | None) -> Path | None:
    """Return llama.cpp's converter: in the folder that the user names, or among the installed engines."""
    folders = [folder for folder in (llama_cpp, engines_folder() / "llama.cpp") if folder]
    return next((folder / _CONVERTER for folder in folders if (folder / _CONVERTER).is_file()), None)


def _write_unquantised(folder: Path, target: Path, dtype: str, llama_cpp: Path | None) -> str:
    """Write one of the writer's number formats; a family that it does not know goes to llama.cpp's converter."""
    family = load_config(folder).model_type
    if family in ARCHITECTURES:
        write_gguf(folder, target, dtype)
        return "minisft"
    converter = find_converter(llama_cpp)
    if converter is None:
        problem = f"the GGUF writer knows {', '.join(ARCHITECTURES)}, and not {family}"
        raise UserError(folder, problem, f"pass --llama-cpp FOLDER, with a folder that holds {_CONVERTER}")
    converted = _beside(target, "converted")
    try:
        # llama.cpp's own version of the package gguf comes with its converter.
        paths = [str(converter.parent / "gguf-py"), os.environ.get("PYTHONPATH", "")]
        words = [sys.executable, str(converter), str(folder), "--outfile", str(converted), "--outtype", dtype]
        _run(words, {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"})
        _replace(converted, target)
    finally:
        converted.unlink(missing_ok=True)
    return _CONVERTER


def _beside(target: Path, part: str) -> Path:
    path = target.with_name(f".{target.name}.{part}.{os.getpid()}")
    record_files(path)
    return path


def _replace(made: Path, target: Path) -> None:
    """Give a finished file its name, once it is on the disk."""
    with made.open("rb") as file:
        os.fsync(file.fileno())
    record_files(target)
    made.replace(target)


def _run(words: list[str], environment: dict[str, str]) -> None:
    """Run one of llama.cpp's tools.

    Raises:
        UserError: It failed; the message has the last line that it wrote.
    """
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
        check=False,
    )
    if done.returncode:
        lines = [line for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip()]
        said = lines[-1].strip() if lines else "it wrote nothing"
        name = next(Path(word).name for word in words if word != sys.executable)
        raise UserError(name, f"it ended with status {done.returncode} ({said})", f"run it by hand: {' '.join(words)}")
