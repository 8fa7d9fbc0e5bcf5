"""MiniSFT: supervised fine-tuning with exact tokens, exact loss and every checkpoint scored.

The Python API; each name is imported when it is first used, so that `import minisft` costs next to nothing.
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 - pip refuses to install it there, but a clone can be on the path
    _old = f"Python {sys.version_info[0]}.{sys.version_info[1]} is too old\n  Fix: use Python 3.10 or newer"
    if sys.argv[:1] == ["-m"]:  # python -m minisft
        sys.stderr.write("minisft: " + _old + "\n")
        sys.exit(2)
    raise ImportError(_old)

from minisft.version import __version__

TYPE_CHECKING = False  # a type checker takes it for true; importing it from typing would take longer than all the rest
if TYPE_CHECKING:
    from minisft.api import (
        Run,
        check,
        contamination,
        evaluate,
        export,
        init,
        learning_rate_range,
        load,
        plan,
        prepare,
        push,
        runs,
        schema,
        search,
        serve,
        submit,
        train,
        verify,
        watch,
        why,
    )
    from minisft.data.prepared_data import PreparedData
    from minisft.errors import StoppedError, UserError, WorkerError
    from minisft.recipe import Recipe

__all__ = [
    "PreparedData",
    "Recipe",
    "Run",
    "StoppedError",
    "UserError",
    "WorkerError",
    "__version__",
    "check",
    "contamination",
    "evaluate",
    "export",
    "init",
    "learning_rate_range",
    "load",
    "plan",
    "prepare",
    "push",
    "runs",
    "schema",
    "search",
    "serve",
    "submit",
    "train",
    "verify",
    "watch",
    "why",
]

_MODULES = {
    **dict.fromkeys(
        (
            "train",
            "prepare",
            "evaluate",
            "export",
            "init",
            "learning_rate_range",
            "plan",
            "check",
            "contamination",
            "load",
            "push",
            "runs",
            "schema",
            "search",
            "serve",
            "submit",
            "verify",
            "watch",
            "why",
            "Run",
        ),
        "api",
    ),
    "PreparedData": "data.prepared_data",
    **dict.fromkeys(("UserError", "StoppedError", "WorkerError"), "errors"),
    "Recipe": "recipe",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'minisft' has no attribute {name!r}")
    import importlib

    found = getattr(importlib.import_module(f"minisft.{_MODULES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
