"""The command line: one function a verb. What is heavy is imported inside them, so that --help is instant."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minisft import __version__, options
from minisft.errors import StoppedError, UserError, WorkerError
from minisft.files import WRITE_ERRNOS, expand_user_path
from minisft.library_output import escape_library_output
from minisft.options import Arguments, Verb
from minisft.runner import dry_run_training, prepare_run, train_in_launched_process, train_run, train_secondary_node
from minisft.text import dump_json, printable

if TYPE_CHECKING:
    from minisft.recipe import Recipe
    from minisft.run_folder import RunFolder


def main(argv: Sequence[str] | None = None) -> int:
    """Run `minisft VERB ...`; return the exit status: 0 done, 2 the user can fix it, 1 anything else."""
    words = list(sys.argv[1:] if argv is None else argv)
    escape_library_output()
    try:
        return _run(words)
    except UserError as error:
        print(f"minisft: {printable(str(error))}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, StoppedError, WorkerError) as stop:
        print(f"minisft: {printable(str(stop)) or 'stopped'}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in WRITE_ERRNOS:
            raise
        print(f"minisft: {printable(str(_refused(error)))}", file=sys.stderr)
        return 2


def _refused(error: OSError) -> UserError:
    """Say what the file system did not let us do: Arrow's errors name no file, but have the reason in their text."""
    where = error.filename or "writing"
    reason = os.strerror(error.errno) if error.errno else str(error)
    return UserError(where, f"the file system refused: {reason}", "make room, or see to the permissions; then go on")


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        print(f"minisft {__version__}")
        return 0
    verb = VERBS.get(words[0])
    if verb is None:
        raise UserError(f"minisft {words[0]}", "there is no such verb", _nearest_verb(words[0]))
    os.environ.setdefault("DS_LOG_LEVEL", "error")  # DeepSpeed reads it when peft or accelerate imports it
    arguments = verb.parser(words[0]).parse_intermixed_args(words[1:])
    arguments.verb = words[0]
    return verb.run(arguments) or 0


# The keys of the recipe that a verb reads, or whose section it reads; a verb that is not here reads all.
_READ = {
    "prepare": ("model", "output", "seed", "trust_remote_code", "data"),
    "inspect": ("model", "output", "seed", "trust_remote_code", "data"),
    "check": ("model", "output", "seed", "trust_remote_code", "data", "training"),
    "plan": ("model", "output", "seed", "trust_remote_code", "data", "training"),
    "evaluate": (
        "model", "output", "seed", "trust_remote_code", "data.template", "training.precision", "evaluation",
    ),
    "report": ("output",),
    "export": ("model", "output", "trust_remote_code"),
    "chat": ("output",),
}  # fmt: skip


def _with_overrides(arguments: Arguments, load: Callable[[Sequence[str]], "Recipe"]) -> "Recipe":
    """Load a recipe with the overrides that the verb reads; the others are checked and named, and change nothing."""
    place, *overrides = arguments.words
    recipe = load(overrides)
    unread = _unread(arguments.verb, overrides, is_folder=Path(place).is_dir())
    if not unread:
        return recipe
    _note_unread(arguments.verb, unread)
    try:
        return load([word for word in overrides if word not in unread])
    except UserError:  # such as an `eval_every` of the file, beside which the data's overrides are impossible
        return recipe


def _unread(verb: str, overrides: Sequence[str], is_folder: bool) -> list[str]:
    """The overrides that change nothing that the verb reads; the output of a folder is the folder itself."""
    if verb not in _READ:
        return []
    read = [key for key in _READ[verb] if not (is_folder and key == "output")]
    keys = {word: word.partition("=")[0] for word in overrides}
    return [word for word, key in keys.items() if not any(_within(key, one) or _within(one, key) for one in read)]


def _note_unread(verb: str, overrides: Sequence[str]) -> None:
    keys = ", ".join(word.partition("=")[0] for word in overrides)
    print(printable(f"note: {verb} does not read {keys}"), file=sys.stderr)


def _within(key: str, section: str) -> bool:
    return key == section or key.startswith(f"{section}.")


# --- verbs ------------------------------------------------------------------------------------------------

# Each reads its recipe first, which prints a line, and imports what takes seconds after that.


def prepare(arguments: Arguments) -> None:
    recipe = _load(arguments)
    from minisft.data.sources import require_sources
    from minisft.run_folder import delete_replaced_run
    from minisft.run_start import start_run

    require_sources(recipe.data)
    with start_run(recipe, force=arguments.force, prepares_only=True) as started:
        prepare_run(started.recipe, with_weights=False, output=Path(recipe.output))
        started.replace_old_run()
        delete_replaced_run(started.run)


def inspect(arguments: Arguments) -> None:
    recipe = _recipe_or_run(arguments)
    from minisft.data.inspect import inspect as show_rows
    from minisft.run_folder import RunFolder, is_same_run
    from minisft.run_start import open_run

    if not is_same_run(RunFolder(Path(recipe.output)), recipe):
        with open_run(recipe, prepares_only=True):
            prepare_run(recipe, with_weights=False)
    show_rows(
        recipe,
        split=arguments.split,
        rows=arguments.row,
        ids=arguments.id,
        worst=arguments.worst,
        only_findings=arguments.findings,
        count=arguments.count,
        html=None if arguments.html is None else expand_user_path(arguments.html, "--html"),
    )


def check(arguments: Arguments) -> None:
    recipe = _load(arguments)
    from minisft.console import say
    from minisft.files import write_atomically
    from minisft.run_start import open_run
    from minisft.training.device import on_cpu
    from minisft.training.zero import set_deepspeed_environment

    set_deepspeed_environment(on_cpu())  # before transformers is imported
    if not arguments.quick:
        from minisft.training.run_training import require_feasible

        require_feasible(recipe)
    from minisft.checking.run_checks import as_report, run_checks, show, summary

    with open_run(recipe, prepares_only=True) as run:
        results = run_checks(recipe, run, quick=arguments.quick, on_result=(lambda _: None) if arguments.json else show)
        report = as_report(recipe, results, quick=arguments.quick)
        write_atomically(run.check, dump_json(report, indent=1))
    if arguments.json:
        print(dump_json(report, indent=1))
    else:
        say(f"{summary(results)}; written: {run.check}")
    failed = [result for result in results if result.status == "FAILED"]
    if failed:
        raise UserError(
            ", ".join(result.name for result in failed),
            f"{len(failed)} of {len(results)} checks failed",
            failed[0].fix,
        )


def plan(arguments: Arguments) -> None:
    recipe = _load(arguments)
    from minisft.planning.plan_table import plan_as_json, show_plan
    from minisft.planning.planner import PlanOptions, plan_for

    made = plan_for(recipe, PlanOptions(arguments.gpu, arguments.count, arguments.nodes))
    if arguments.json:
        print(dump_json(plan_as_json(made), indent=1))
    else:
        show_plan(made)


def train(arguments: Arguments) -> None:
    recipe = _load(arguments)
    from minisft.processes import hard_exit
    from minisft.training.distributed import adopt_slurm, is_joined
    from minisft.training.nodes import parse_nodes

    adopt_slurm()
    nodes = parse_nodes(arguments.nodes, arguments.node_rank, arguments.rendezvous)
    if nodes is not None and recipe.training.strategy == "auto":
        fix = f"name a strategy; `minisft plan {arguments.words[0]} --nodes {nodes.count}` says which"
        raise UserError("training.strategy", "auto tries strategies on one machine alone", fix)
    if arguments.dry_run:
        dry_run_training(recipe, force=arguments.force, resume=arguments.resume, nodes=nodes)
    elif is_joined():
        if nodes is not None:
            raise UserError("--nodes", "another launcher started this process", "leave the machines to it")
        train_in_launched_process(recipe, force=arguments.force, resume=arguments.resume)
        hard_exit(0)
    elif nodes is not None and nodes.rank > 0:
        train_secondary_node(recipe, nodes, resume=arguments.resume)
    else:
        run = train_run(recipe, force=arguments.force, resume=arguments.resume, nodes=nodes)
        _say_what_next(run)


def evaluate(arguments: Arguments) -> None:
    _evaluate(_recipe_or_run(arguments), follow=arguments.follow, as_json=arguments.json)


def compare(arguments: Arguments) -> int:
    path, *overrides = arguments.words
    if Path(path).is_file():  # else it is refused
        _announce(arguments, path)
    from minisft.comparison.compare import CompareOptions
    from minisft.comparison.compare import compare as compare_variants

    return compare_variants(
        CompareOptions(
            Path(path),
            (*overrides, *_consent(arguments)),
            strategies=arguments.strategies,
            varied=tuple(arguments.vary),
            evaluate=arguments.evaluate,
            force=arguments.force,
        )
    )


def report(arguments: Arguments) -> None:
    output = Path(_recipe_or_run(arguments).output)
    from minisft.console import say
    from minisft.report.markdown import write_results
    from minisft.report.page import require_target, write_report
    from minisft.run_start import refuse_untrusted_links

    to = None if arguments.to is None else expand_user_path(arguments.to, "--to")
    if to is None:
        refuse_untrusted_links(output)
    else:
        require_target(to)
    try:
        written = [write_report(output, to), write_results(output, to)]
    except OSError as error:
        if error.errno not in WRITE_ERRNOS:
            raise
        fix = "make room there, or see to the permissions"
        if to is None:
            fix = f"write the report elsewhere: minisft report {output} --to FOLDER"
        raise UserError(to or output, f"the report cannot be written there ({error.strerror})", fix) from None
    for path in written:
        say(f"written: {path}")


def export(arguments: Arguments) -> None:
    if len(arguments.words) < 2 or "=" in arguments.words[1]:
        raise UserError("minisft export", "no folder to write is named", "write: minisft export RUN FOLDER")
    folder = expand_user_path(arguments.words.pop(1), "the folder to write")
    recipe = _recipe_or_run(arguments)
    from minisft.console import say
    from minisft.model_export import export as export_model

    source = export_model(
        recipe,
        folder,
        checkpoint=arguments.checkpoint,
        merge=arguments.merge,
        dtype=arguments.dtype,
        force=arguments.force,
    )
    say(f"written: {folder}, from {source}")


def chat(arguments: Arguments) -> None:
    folder, *overrides = arguments.words
    path, trusted = Path(folder), arguments.trust_remote_code
    if path.suffix in (".yaml", ".yml"):
        recipe = _load(arguments)
        path, trusted = Path(recipe.output), recipe.trust_remote_code
    elif others := [word for word in overrides if "=" not in word]:
        raise UserError(others[0], "chat takes a folder, or a recipe and its overrides", "leave it out")
    else:
        if overrides:
            _note_unread(arguments.verb, overrides)
        if path.is_dir():  # else it is refused
            _announce(arguments, folder)
    from minisft.chat.terminal import chat as start_chat

    start_chat(
        path,
        trust_remote_code=trusted,
        template=arguments.template,
        message=arguments.message,
        system=arguments.system,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )


def demo(arguments: Arguments) -> None:
    from minisft.recipe import load_recipe
    from minisft.run_folder import RunFolder, is_same_run

    recipe = load_recipe(built_in_recipe("demo"), arguments.words)
    _announce(arguments, "", recipe.output)
    from minisft.console import say
    from minisft.demo import show_demo

    run = RunFolder(Path(recipe.output))
    if not arguments.force and is_same_run(run, recipe) and run.is_trained():
        say(f"{run.root} is trained already; `minisft demo --force` trains it anew.")
    else:
        resume = not arguments.force and is_same_run(run, recipe) and run.has_begun()
        train_run(recipe, force=arguments.force, resume=resume)
    _evaluate(recipe, shown=show_demo)


# --- what verbs share -------------------------------------------------------------------------------------


def _load(arguments: Arguments) -> "Recipe":
    """Read the recipe with its overrides; one that lies in a run folder is that run's, and carries no consent."""
    from minisft.recipe import load_recipe
    from minisft.run_folder import DISTRUST_OVERRIDE, came_with_run, load_run, run_of_recipe

    path = arguments.words[0]
    root = run_of_recipe(Path(path))

    def load(overrides: Sequence[str]) -> "Recipe":
        words = [*overrides, *_consent(arguments)]
        if root is not None and not any(word.startswith("output=") for word in words):
            return load_run(root, words)
        return load_recipe(Path(path), [DISTRUST_OVERRIDE, *words] if came_with_run(Path(path)) else words)

    recipe = _with_overrides(arguments, load)
    _announce(arguments, path, recipe.output)
    return recipe


def _consent(arguments: Arguments) -> list[str]:
    """Return the override that `--trust-remote-code` stands for, where it was given."""
    from minisft.run_folder import TRUST_OVERRIDE

    return [TRUST_OVERRIDE] if getattr(arguments, "trust_remote_code", False) else []


def _recipe_or_run(arguments: Arguments) -> "Recipe":
    """Read the recipe, or that of the run folder given in its place; overrides hold for both."""
    from minisft.run_folder import load_run

    path = arguments.words[0]
    if not Path(path).is_dir():
        return _load(arguments)
    consent = _consent(arguments)
    recipe = _with_overrides(arguments, lambda overrides: load_run(Path(path), [*overrides, *consent]))
    _announce(arguments, path)
    return recipe


def _announce(arguments: Arguments, subject: str, output: str = "") -> None:
    """Print what is done on what, before anything heavy is imported, which takes several seconds.

    Where stdout is what another program reads, it goes to stderr. Of the processes
    that a launcher started, the first one prints it.
    """
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
        return
    for_programs = getattr(arguments, "json", False) or arguments.verb in ("chat", "plan")
    line = " ".join(filter(None, ["minisft", arguments.verb, subject, f"-> {output}" if output else ""]))
    print(printable(line), file=sys.stderr if for_programs else sys.stdout, flush=True)


def _evaluate(
    recipe: "Recipe",
    *,
    follow: bool = False,
    as_json: bool = False,
    shown: Callable[[Path], object] | None = None,
) -> None:
    """Score the run, call `shown` with its folder, and only then refuse checkpoints that are damaged."""
    from minisft.evaluation.run_evaluation import evaluate as score_checkpoints
    from minisft.evaluation.run_evaluation import require_all_scored
    from minisft.report.plots import draw_curves
    from minisft.run_folder import RunFolder
    from minisft.run_start import refuse_untrusted_links

    output = Path(recipe.output)
    refuse_untrusted_links(output)
    results = score_checkpoints(recipe, output, follow=follow, as_json=as_json, draw=draw_curves)
    if shown is not None:
        shown(output)
    require_all_scored(results, RunFolder(output))


def _say_what_next(run: "RunFolder") -> None:
    from minisft.console import say

    say(f"trained: {run.model} (checkpoints beside it, curve in {run.root / 'evaluation' / 'loss.png'})")
    say(f"next: minisft evaluate {run.root}    or: minisft chat {run.root}")


def built_in_recipe(name: str) -> Path:
    """Return a recipe that comes with MiniSFT: inside the installed package, or at the root of a checkout."""
    package = Path(__file__).parent
    for folder in (package / "recipes", package.parents[1] / "recipes"):
        if (folder / f"{name}.yaml").exists():
            return folder / f"{name}.yaml"
    raise UserError(name, "the built-in recipe is missing", "install MiniSFT again")


# --- the table of verbs ----------------------------------------------------------------------------------


VERBS = {
    "demo": Verb(demo, "the main job on the built-in recipe: fine-tune, score, show answers", "", options.force),
    "prepare": Verb(
        prepare, "conversations to token ids and labels, with a ledger", "RECIPE.yaml", options.force, options.trust
    ),
    "inspect": Verb(
        inspect,
        "show what the model learns from: tokens coloured by supervised or not",
        "RUN|RECIPE.yaml",
        options.inspect,
        options.trust,
    ),
    "check": Verb(
        check,
        "prove, on this recipe, model and machine, that training does what it promises",
        "RECIPE.yaml",
        options.check,
        options.trust,
    ),
    "plan": Verb(
        plan,
        "memory, time and the strategy to take, before anything is spent",
        "RECIPE.yaml",
        options.plan,
        options.trust,
    ),
    "train": Verb(
        train,
        "train a recipe: vanilla or ZeRO-1/2/3, one process or many",
        "RECIPE.yaml",
        options.resume,
        options.force,
        options.dry_run,
        options.machines,
        options.trust,
    ),
    "evaluate": Verb(
        evaluate,
        "generate with and score the base model and every checkpoint",
        "RUN|RECIPE.yaml",
        options.evaluate,
        options.trust,
    ),
    "compare": Verb(
        compare,
        "the same recipe under several strategies or settings: curves, speed, memory, scores",
        "RECIPE.yaml",
        options.compare,
        options.trust,
    ),
    "report": Verb(report, "write one self-contained HTML page of a run", "RUN|RECIPE.yaml", options.report),
    "export": Verb(
        export,
        "write a run's model for other tools: a plain folder, adapters merged",
        "RUN|RECIPE.yaml FOLDER",
        options.export,
        options.trust,
    ),
    "chat": Verb(
        chat, "talk to a run's model, or to any model folder", "RUN|MODEL|RECIPE.yaml", options.chat, options.trust
    ),
}


def _overview() -> str:
    lines = [f"  {name:<10}{verb.summary}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "MiniSFT: supervised fine-tuning with exact tokens, exact loss and every checkpoint scored",
            "",
            "usage: minisft VERB RECIPE.yaml [key=value ...]",
            "",
            *lines,
            "",
            "`minisft VERB --help` explains each. A first result: `minisft demo`.",
        ]
    )


def _nearest_verb(word: str) -> str:
    import difflib

    close = difflib.get_close_matches(word, VERBS, n=1)
    return f"did you mean `{close[0]}`?" if close else f"use one of {', '.join(VERBS)}"


if __name__ == "__main__":
    sys.exit(main())
