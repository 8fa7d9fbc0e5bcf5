"""`minisft check`: the list of checks, in the order in which they run, and their results in the terminal."""

import contextlib
import platform
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from types import FrameType
from typing import Any

import torch
from rich.text import Text

from minisft.checking import data_checks, loss_checks, overfit_check, serving_checks, strategy_checks
from minisft.checking.context import CheckContext
from minisft.checking.result import Check, Failed, NotRun, Result
from minisft.checking.scratch import quiet_consoles, quiet_libraries
from minisft.console import console, waiting
from minisft.errors import StoppedError, UserError
from minisft.manifest import make_scratch_folder
from minisft.processes import handle_stop_signals
from minisft.recipe import Recipe, dump_recipe
from minisft.version import __version__

_FAILED = " failed"
_QUICK = "--quick loads no weights"
_PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "tokenizers", "datasets", "peft")


CHECKS = (
    Check("data.template", "the template says where answers end", data_checks.template_ends_answers),
    Check("data.source", "the source is conversations", data_checks.source_is_conversations, ("data.template",)),
    Check("data.system", "system prompts survive the template", data_checks.system_prompts_survive, ("data.source",)),
    Check("data.rows", "the rows are prepared", data_checks.rows_are_prepared, ("data.system",)),
    Check("data.tokens", "no token is lost", data_checks.tokens_are_conserved, ("data.rows",)),
    Check("data.bos", "there is one BOS, or none", data_checks.one_bos, ("data.rows",)),
    Check("data.control", "text stays text", data_checks.control_text_stays_text, ("data.rows",)),
    Check("data.terminators", "every answer's end is learned", data_checks.terminators_are_learned, ("data.rows",)),
    Check(
        "data.answers", "answers are learned, and nothing else", data_checks.answers_are_learned, ("data.terminators",)
    ),
    Check("data.split", "test rows are not train rows", data_checks.held_out_stays_out, ("data.rows",)),
    Check("data.shares", "sane shares are learned, cut, skipped", data_checks.shares_are_sane, ("data.rows",)),
    Check(
        "serve.prompts",
        "prompts sent at inference are those that were trained",
        serving_checks.prompts_are_those_trained,
        ("data.answers",),
    ),
    Check(
        "serve.stops", "generation stops where answers end", serving_checks.stops_are_those_trained, ("data.answers",)
    ),
    Check(
        "serve.template",
        "the saved template renders the same",
        serving_checks.saved_template_renders_the_same,
        ("serve.prompts",),
    ),
    Check("serve.vllm", "in vLLM's way too", serving_checks.vllm_renders_the_same, ("serve.template",)),
    Check(
        "loss.mask",
        "the mask reaches the loss",
        loss_checks.mask_reaches_the_loss,
        ("data.answers",),
        True,
    ),
    Check(
        "loss.padding",
        "padding-free equals padded",
        loss_checks.padding_changes_nothing,
        ("loss.mask",),
        True,
    ),
    Check(
        "loss.rows",
        "conversations in a row stay apart",
        loss_checks.rows_keep_conversations_apart,
        ("loss.padding",),
        True,
    ),
    Check(
        "loss.split",
        "a split batch equals a whole one",
        loss_checks.splitting_changes_nothing,
        ("loss.rows",),
        True,
    ),
    Check(
        "strategy.steps",
        "the strategy takes vanilla's steps",
        strategy_checks.strategy_takes_the_same_steps,
        ("loss.split",),
        True,
    ),
    Check(
        "checkpoint.plain",
        "a checkpoint loads anywhere",
        strategy_checks.checkpoint_loads_anywhere,
        ("strategy.steps",),
        True,
    ),
    Check(
        "checkpoint.resume",
        "resumed, the next step is the same",
        strategy_checks.resumed_steps_are_the_same,
        ("strategy.steps",),
        True,
    ),
    Check(
        "learning.recall",
        "a few rows can be overfitted",
        overfit_check.can_overfit_batch,
        ("loss.split", "serve.prompts", "serve.stops"),
        True,
    ),
    Check("spend.memory", "memory is as planned", strategy_checks.memory_is_as_planned, ("strategy.steps",), True),
    Check("spend.time", "time is as planned", strategy_checks.time_is_as_planned, ("strategy.steps",), True),
)


def run_checks(
    context: CheckContext, *, quick: bool, on_result: Callable[[Result], None], checks: Sequence[Check] = CHECKS
) -> list[Result]:
    """Run the checks on a recipe.

    Args:
        context: The recipe and its run folder, which this process has locked.
        quick: True skips the checks that need the model's weights.
        on_result: Called with each result when the check ends.
        checks: The checks, each after those that it needs.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt  # so that the scratch folder is removed on SIGTERM too

    make_scratch_folder(context.scratch)
    results: dict[str, Result] = {}
    try:
        with handle_stop_signals(stop), quiet_libraries():
            for check in checks:
                reason = _missing_prerequisite(check, results) or (_QUICK if quick and check.weights else None)
                if reason is not None:
                    result = Result(check.name, check.description, "not run", f"because {reason}")
                else:
                    started = time.perf_counter()
                    with waiting(f"{check.name}: {check.description}"):
                        result = _run_check(check, context)
                    result = replace(result, seconds=round(time.perf_counter() - started, 2))
                results[check.name] = result
                on_result(result)
    finally:
        context.clear()
    return list(results.values())


def _missing_prerequisite(check: Check, earlier: Mapping[str, Result]) -> str | None:
    """Return why a check cannot be run: a check that it needs failed, or was not run because another check failed."""
    for name in check.needs:
        if earlier[name].status == "FAILED":
            return f"{name}{_FAILED}"
        if earlier[name].status == "not run" and earlier[name].detail.endswith(_FAILED):
            return earlier[name].detail.removeprefix("because ")
    return None


def _run_check(check: Check, context: CheckContext) -> Result:
    """Run one check, and turn every error into a result."""
    try:
        with quiet_consoles():
            return Result(check.name, check.description, "ok", check.run(context))
    except NotRun as reason:
        return Result(check.name, check.description, "not run", f"because {reason}")
    except Failed as failure:
        return Result(check.name, check.description, "FAILED", failure.problem, failure.fix)
    except UserError as error:
        return Result(check.name, check.description, "FAILED", f"{error.where}: {error.problem}", error.fix)
    except StoppedError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        # This process holds all weights, without a strategy: a model that needs ZeRO does not fit, which is no failure.
        context.free_model()
        return Result(check.name, check.description, "not run", f"because one process is too small for it ({error})")
    except Exception as error:  # a model, a template or a library may raise anything, and the other checks still run
        where = traceback.extract_tb(error.__traceback__)[-1]
        problem = f"{type(error).__name__}: {str(error).strip() or 'no message'} ({where.name}, line {where.lineno})"
        return Result(check.name, check.description, "FAILED", problem, "if the message does not help, report it")


def as_report(recipe: Recipe, results: Iterable[Result], *, quick: bool) -> dict[str, Any]:
    """Return the content of `check.json`."""
    listed = list(results)
    versions = {"minisft": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "status": "FAILED" if any(result.status == "FAILED" for result in listed) else "ok",
        "quick": quick,
        "seconds": round(sum(result.seconds for result in listed), 2),
        "checks": [result.as_dict() for result in listed],
        "recipe": dump_recipe(recipe),
        "versions": versions,
        "machine": f"{platform.machine()} {platform.system()}",
    }


_STYLES = {"ok": "green", "FAILED": "bold red", "not run": "yellow"}
_INDENT = " " * 28


def show(result: Result) -> None:
    """Print one result."""
    line = Text.assemble(
        (f"{result.status:<8} ", _STYLES[result.status]),
        f"{result.name:<18} ",
        f"{result.seconds:>5.1f} s  " if result.status != "not run" else " " * 9,
        result.description,
    )
    console.print(line)
    console.print(Text(f"{_INDENT}{result.detail}", style="dim" if result.status == "ok" else ""))
    if result.fix:
        console.print(Text(f"{_INDENT}Fix: {result.fix}"))


def summary(results: Sequence[Result]) -> str:
    """Return how many checks have which status, in one line."""
    counts = {status: sum(result.status == status for result in results) for status in _STYLES}
    seconds = sum(result.seconds for result in results)
    return f"{counts['ok']} ok, {counts['FAILED']} FAILED, {counts['not run']} not run, in {seconds:.0f} s"
