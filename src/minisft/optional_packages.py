"""Packages that only some features need: the check that one is installed, and the command that installs it."""

import importlib.util
from dataclasses import dataclass

from minisft.errors import UserError


@dataclass(frozen=True)
class OptionalPackage:
    """A package that `pip install minisft` alone does not bring.

    Args:
        title: Name by which its users know it.
        requirement: What `pip install` takes: an extra of MiniSFT, where there is one.
    """

    title: str
    requirement: str


PACKAGES = {  # by the name under which Python imports them
    "bitsandbytes": OptionalPackage("bitsandbytes", "minisft[quantized]"),
    "deepspeed": OptionalPackage("DeepSpeed", "minisft[deepspeed]"),
    "fastapi": OptionalPackage("FastAPI", "minisft[serve]"),
    "lm_eval": OptionalPackage("lm-evaluation-harness", "minisft[benchmarks]"),
    "openai": OptionalPackage("openai", "minisft[judge]"),
    "optuna": OptionalPackage("Optuna", "minisft[search]"),
    "rouge_score": OptionalPackage("rouge-score", "minisft[rouge]"),
    "uvicorn": OptionalPackage("Uvicorn", "minisft[serve]"),
    "vllm": OptionalPackage("vLLM", "vllm"),  # its version decides which torch is installed, so it is no extra
}


def is_installed(module: str) -> bool:
    """Return whether a top-level module can be found; it is not imported."""
    return importlib.util.find_spec(module) is not None


def require_package(where: str, module: str, alternative: str = "") -> None:
    """Check that one of `PACKAGES` is installed, without importing it.

    Args:
        where: The command, or the key of the recipe, that needs it.
        module: Name under which Python imports it.
        alternative: What the user can do in place of installing it, such as "use strategy vanilla".

    Raises:
        UserError: It is not installed.
    """
    if not is_installed(module):
        package = PACKAGES[module]
        raise not_installed(where, package.title, package.requirement, alternative)


def not_installed(where: str, title: str, requirement: str, alternative: str = "") -> UserError:
    """Return the error that a package is missing; the arguments are those of the class and function above."""
    quoted = f"'{requirement}'" if "[" in requirement else requirement  # brackets are a pattern to a shell
    return UserError(
        where, f"{title} is not installed", f"pip install {quoted}{f', or {alternative}' if alternative else ''}"
    )
