"""The command line: one function for each command. They import the API when they are called, so that --help is fast."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisft import options
from minisft.errors import StoppedError, UserError, WorkerError
from minisft.options import Arguments, Verb
from minisft.text import dump_json
from minisft.version import __version__

if TYPE_CHECKING:
    from minisft.recipe import Recipe


def main(argv: Sequence[str] | None = None) -> int:
    """Run `minisft COMMAND ...`; return the exit status: 0 done, 2 the user can fix it, 1 anything else."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        try:
            print(_overview(), flush=True)
        except BrokenPipeError:
            return _end_without_reader()
        return 0
    from minisft.files import WRITE_ERRNOS
    from minisft.output_filters import escape_library_output, suppress_known_warnings
    from minisft.text import printable

    escape_library_output()
    suppress_known_warnings()
    try:
        return _run(words)
    except UserError as error:
        print(f"minisft: {printable(str(error))}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, StoppedError, WorkerError) as stop:
        print(f"minisft: {printable(str(stop)) or 'stopped'}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return _end_without_reader()
    except OSError as error:
        if error.errno not in WRITE_ERRNOS:
            raise
        print(f"minisft: {printable(str(_refused(error)))}", file=sys.stderr)
        return 2


def _end_without_reader() -> int:
    """Return the exit status where the reader of stdout, such as `head`, has seen enough; the rest goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _refused(error: OSError) -> UserError:
    """Return the error of a refused write; Arrow's errors name no file, but have the reason in their text."""
    where = error.filename or "writing"
    reason = os.strerror(error.errno) if error.errno else str(error)
    fix = "free some space, or change the permissions, and run the command again"
    return UserError(where, f"the file system refused: {reason}", fix)


def _run(words: list[str]) -> int:
    if words[0] == "--version":
        print(f"minisft {__version__}")
        return 0
    verb = VERBS.get(words[0])
    if verb is None:
        raise UserError(words[0], "there is no such command", _nearest_verb(words[0]))
    os.environ.setdefault("DS_LOG_LEVEL", "error")  # DeepSpeed reads it when peft or accelerate imports it
    arguments = verb.parser(words[0]).parse(words[1:])
    arguments.verb = words[0]
    return verb.run(arguments) or 0


# --- verbs ------------------------------------------------------------------------------------------------


def prepare(arguments: Arguments) -> None:
    from minisft import api

    with _json_alone(arguments) as print_json:
        print_json(api.prepare(_load(arguments), force=arguments.force).ledger)


def inspect(arguments: Arguments) -> None:
    from minisft import api

    with _json_alone(arguments) as print_json:
        rows = api.inspect(
            _recipe_or_run(arguments),
            split=arguments.split,
            rows=arguments.row,
            ids=arguments.id,
            worst=arguments.worst,
            only_findings=arguments.findings,
            count=arguments.count,
            html=arguments.html,
        )
        print_json({"rows": [asdict(row) for row in rows]})


def check(arguments: Arguments) -> None:
    from minisft import api

    results = api.check(_load(arguments), quick=arguments.quick, as_json=arguments.json)
    failed = [result for result in results if result.status == "FAILED"]
    if failed:
        raise UserError(
            ", ".join(result.name for result in failed),
            f"{len(failed)} of {len(results)} checks failed",
            failed[0].fix,
        )


def plan(arguments: Arguments) -> None:
    from minisft import api

    made = api.plan(
        _load(arguments), gpu=arguments.gpu, count=arguments.count, nodes=arguments.nodes, dry_run=arguments.dry_run,
        as_json=arguments.json,
    )  # fmt: skip
    if made.dry_run is not None and (faults := made.dry_run.faults):
        raise UserError(faults[0].where, f"{faults[0].problem} ({len(faults)} fault(s) in the dry run)", faults[0].fix)


def train(arguments: Arguments) -> None:
    from minisft import api

    api.train(
        _load(arguments),
        resume=arguments.resume,
        force=arguments.force,
        dry_run=arguments.dry_run,
        nodes=arguments.nodes,
        node_rank=arguments.node_rank,
        rendezvous=arguments.rendezvous,
    )
    if not arguments.dry_run:
        api.leave_launched_process()


def submit(arguments: Arguments) -> None:
    from minisft import api

    names = ("nodes", "time", "partition", "gpus_per_node", "cpus_per_task", "sbatch", "script", "resume", "evaluate",
             "now", "force")  # fmt: skip
    with _json_alone(arguments) as print_json:
        written = api.submit(_load(arguments), **{name: getattr(arguments, name) for name in names})
        print_json({name: str(value) if isinstance(value, Path) else value for name, value in asdict(written).items()})


def evaluate(arguments: Arguments) -> None:
    from minisft import api

    api.evaluate(_recipe_or_run(arguments), follow=arguments.follow, as_json=arguments.json)


def contamination(arguments: Arguments) -> None:
    from minisft import api

    api.contamination(_recipe_or_run(arguments), arguments.against, as_json=arguments.json)


def compare(arguments: Arguments) -> int:
    from minisft import api

    path, *overrides = arguments.words
    if Path(path).is_file():  # else it is refused
        _announce(arguments, path)
    with _json_alone(arguments) as print_json:
        return api.compare(
            path,
            overrides,
            strategies=arguments.strategies,
            vary=arguments.vary,
            evaluate=arguments.evaluate,
            force=arguments.force,
            trust_remote_code=arguments.trust_remote_code,
            on_result=print_json,
        )


def search(arguments: Arguments) -> None:
    from minisft import api

    names = ("vary", "budget", "validation", "workers", "storage", "seed", "resume", "defaults", "objective")
    with _json_alone(arguments) as print_json:
        if arguments.range_test:
            _refuse_beside_range_test(arguments)
            print_json(asdict(api.learning_rate_range(_load(arguments))))
        else:
            print_json(api.search(_load(arguments), **{name: getattr(arguments, name) for name in names}))


def _refuse_beside_range_test(arguments: Arguments) -> None:
    for name in ("vary", "budget", "validation", "storage", "resume"):
        if getattr(arguments, name):
            raise UserError("--lr-range", f"--{name} is of a search", f"leave out --{name}, or leave out --lr-range")
    if arguments.objective != "loss":
        raise UserError("--lr-range", "--objective is of a search", "leave out --objective, or leave out --lr-range")


def report(arguments: Arguments) -> None:
    from minisft import api

    with _json_alone(arguments) as print_json:
        page, results = api.report(_recipe_or_run(arguments), to=arguments.to)
        print_json({"page": str(page), "results": str(results)})


def export(arguments: Arguments) -> None:
    from minisft import api
    from minisft.files import expand_user_path

    if len(arguments.words) < 2 or "=" in arguments.words[1]:
        raise UserError("export", "no folder to write is named", "write: minisft export RUN FOLDER")
    folder = expand_user_path(arguments.words.pop(1), "the folder to write")
    with _json_alone(arguments) as print_json:
        api.export(
            _recipe_or_run(arguments),
            folder,
            to=arguments.to,
            merge=arguments.merge,
            llama_cpp=arguments.llama_cpp,
            max_kl=arguments.max_kl,
            force=arguments.force,
            **_export_options(arguments),
        )
        print_json({"folder": str(folder), **api.read_verification(folder)})


def push(arguments: Arguments) -> None:
    from minisft import api

    if len(arguments.words) < 2 or "=" in arguments.words[1]:
        raise UserError("push", "no repository is named", "write: minisft push RUN ORG/NAME")
    name = arguments.words.pop(1)
    with _json_alone(arguments) as print_json:
        address = api.push(
            _recipe_or_run(arguments),
            name,
            private=arguments.private,
            dry_run=arguments.dry_run,
            **_export_options(arguments),
        )
        print_json({"folder" if arguments.dry_run else "address": address})


def _export_options(arguments: Arguments) -> dict[str, Any]:
    """Return the options that export and push share."""
    names = ("checkpoint", "dtype", "engine", "allow_unverified", "license")
    return {name: getattr(arguments, name) for name in names}


def chat(arguments: Arguments) -> None:
    from minisft import api

    path, trusted = _model_to_use(arguments)
    api.chat(
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


def serve(arguments: Arguments) -> None:
    from minisft import api

    path, trusted = _model_to_use(arguments)
    api.serve(
        path,
        host=arguments.host,
        port=arguments.port,
        api_key=arguments.api_key,
        memory=arguments.memory,
        backend=arguments.backend,
        trust_remote_code=trusted,
    )
    api.leave_server()


def init(arguments: Arguments) -> None:
    from minisft import api

    if keys := [word for word in arguments.data if "=" in word and not Path(word).exists()]:
        fix = f"leave it out, and change the key in the recipe that init writes ({arguments.output_recipe})"
        raise UserError(keys[0], "init takes data, and no keys of a recipe", fix)
    data = arguments.data if len(arguments.data) > 1 else arguments.data[0]
    _announce(arguments, " ".join(arguments.data), arguments.output_recipe)
    api.init(
        data,
        model=arguments.model,
        output_recipe=arguments.output_recipe,
        gpu=arguments.gpu,
        count=arguments.count,
        trust_remote_code=arguments.trust_remote_code,
    )


def runs(arguments: Arguments) -> None:
    from minisft import api

    api.show_runs(arguments.folder, as_json=arguments.json)


def watch(arguments: Arguments) -> int:
    from minisft import api

    try:
        return 0 if api.watch(arguments.run) else 1
    except KeyboardInterrupt:  # the end of a look at it, and of nothing else
        return 0


def why(arguments: Arguments) -> None:
    from minisft import api

    _announce(arguments, arguments.run)
    with _json_alone(arguments) as print_json:
        found = api.why(
            arguments.run, step=arguments.step, row=arguments.row, trust_remote_code=arguments.trust_remote_code
        )
        print_json(found.as_dict())


def verify(arguments: Arguments) -> None:
    from minisft import api

    _announce(arguments, arguments.run)
    with _json_alone(arguments) as print_json:
        found = api.verify(arguments.run, steps=arguments.steps, trust_remote_code=arguments.trust_remote_code)
        print_json(found.as_dict())
    if not found.ok:
        first, others = found.changed[0], len(found.changed) - 1
        more = f", and {others} more" if others else ""
        fix = "restore it from a copy; the run as it is cannot be vouched for"
        raise UserError(arguments.run, f"the run has changed since it ended: {first.what}: {first.where}{more}", fix)


def schema(arguments: Arguments) -> None:
    from minisft import api

    print(dump_json(api.schema(), indent=2))


def completion(arguments: Arguments) -> None:
    from minisft.completion import completion_script

    print(completion_script(arguments.shell, VERBS))


def demo(arguments: Arguments) -> None:
    from minisft import api

    recipe = api.read_recipe("demo", api.built_in_recipe("demo"), arguments.words)
    _announce(arguments, "", recipe.output)
    api.demo(recipe, force=arguments.force)


# --- shared by the commands -------------------------------------------------------------------------------


def _load(arguments: Arguments, takes_run: bool = False) -> "Recipe":
    """Read the recipe, or that of the run folder given in its place, with its overrides; announce the command."""
    from minisft import api

    path, *overrides = arguments.words
    is_run = takes_run and Path(path).is_dir()
    trusted = getattr(arguments, "trust_remote_code", False)
    recipe = api.read_recipe(arguments.verb, path, overrides, trust_remote_code=trusted, takes_run=takes_run)
    _announce(arguments, path, "" if is_run else recipe.output)
    return recipe


def _recipe_or_run(arguments: Arguments) -> "Recipe":
    return _load(arguments, takes_run=True)


def _model_to_use(arguments: Arguments) -> tuple[Path, bool]:
    """Return the run folder or model that the words name, and whether its own code may run; announce the command."""
    from minisft import api

    folder, *overrides = arguments.words
    path, trusted = Path(folder), arguments.trust_remote_code
    if path.suffix in (".yaml", ".yml"):
        recipe = _load(arguments)
        return Path(recipe.output), recipe.trust_remote_code
    if others := [word for word in overrides if "=" not in word]:
        raise UserError(others[0], f"{arguments.verb} takes a folder, or a recipe and its overrides", "leave it out")
    if overrides:
        api.note_unread(arguments.verb, overrides)
    if path.is_dir():  # else it is refused
        _announce(arguments, folder)
    return path, trusted


@contextlib.contextmanager
def _json_alone(arguments: Arguments) -> Iterator[Callable[[Any], None]]:
    """Yield a function that prints a value on stdout under --json, where everything else then goes to stderr.

    Without --json the function does nothing.
    """
    if not arguments.json:
        yield lambda value: None
        return
    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        yield lambda value: print(dump_json(value, indent=1), file=stdout)


def _announce(arguments: Arguments, subject: str, output: str = "") -> None:
    """Print the command and its subject before heavy libraries are imported, which takes several seconds.

    If stdout is for another program, the line goes to stderr. Of the processes
    that a launcher started, the first one prints it.
    """
    from minisft.text import printable

    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
        return
    for_programs = getattr(arguments, "json", False) or arguments.verb in ("chat", "plan", "serve")
    line = " ".join(filter(None, ["minisft", arguments.verb, subject, f"-> {output}" if output else ""]))
    print(printable(line), file=sys.stderr if for_programs else sys.stdout, flush=True)


# --- the table of verbs -----------------------------------------------------------------------------------


VERBS = {
    "demo": Verb(demo, "the main job on the built-in recipe: fine-tune, score, show answers", "", options.force),
    "init": Verb(
        init,
        "look at your data, model and machine, and write a commented recipe",
        "DATA",
        options.init,
        options.trust,
        reads_keys=False,
    ),
    "prepare": Verb(
        prepare,
        "conversations to token ids and labels, with a ledger",
        "RECIPE.yaml",
        options.force,
        options.prints_json,
        options.trust,
    ),
    "inspect": Verb(
        inspect,
        "show what the model learns from: tokens coloured by supervised or not",
        "RUN|RECIPE.yaml",
        options.inspect,
        options.prints_json,
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
        "memory, time and the strategy to take, before training",
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
    "submit": Verb(
        submit,
        "write or send the SLURM job that trains a recipe, resumes after preemption and scores the run",
        "RECIPE.yaml",
        options.submit,
        options.trust,
    ),
    "evaluate": Verb(
        evaluate,
        "generate with and score the base model and every checkpoint",
        "RUN|RECIPE.yaml",
        options.evaluate,
        options.trust,
    ),
    "contamination": Verb(
        contamination,
        "find test rows that the train rows nearly hold, and benchmarks in the data; scores without them",
        "RUN|RECIPE.yaml",
        options.contamination,
        options.trust,
    ),
    "compare": Verb(
        compare,
        "the same recipe under several strategies or settings: curves, speed, memory, scores",
        "RECIPE.yaml",
        options.compare,
        options.prints_json,
        options.trust,
    ),
    "search": Verb(
        search,
        "find the best settings within a budget: trials that pause, and a winner that needs no second run",
        "RECIPE.yaml",
        options.search,
        options.prints_json,
        options.trust,
    ),
    "report": Verb(
        report, "write one self-contained HTML page of a run", "RUN|RECIPE.yaml", options.report, options.prints_json
    ),
    "export": Verb(
        export,
        "write a run's model for other tools, verified with their engines: a folder, GGUF or Ollama",
        "RUN|RECIPE.yaml FOLDER",
        options.export,
        options.prints_json,
        options.trust,
    ),
    "push": Verb(
        push,
        "publish a run's model and its model card on the Hugging Face hub",
        "RUN|RECIPE.yaml ORG/NAME",
        options.push,
        options.prints_json,
        options.trust,
    ),
    "chat": Verb(
        chat, "talk to a run's model, or to any model folder", "RUN|MODEL|RECIPE.yaml", options.chat, options.trust
    ),
    "serve": Verb(
        serve,
        "OpenAI-compatible server and chat page: final model, checkpoints and base",
        "RUN|MODEL|RECIPE.yaml",
        options.serve,
        options.trust,
    ),
    "runs": Verb(
        runs, "list the runs below a folder: state, steps, best score, size", "[FOLDER]", options.runs, reads_keys=False
    ),
    "watch": Verb(
        watch, "show a training of another process or machine until it ends", "RUN", options.watch, reads_keys=False
    ),
    "why": Verb(
        why,
        "which rows made a step's loss or are near a bad answer, and which rows look wrong",
        "RUN",
        options.why,
        options.prints_json,
        options.trust,
        reads_keys=False,
    ),
    "verify": Verb(
        verify,
        "compare a run with its certificate, and replay some of its steps",
        "RUN",
        options.verify,
        options.prints_json,
        options.trust,
        reads_keys=False,
    ),
    "completion": Verb(
        completion,
        "print the script that completes commands, options and keys in a shell",
        "bash|zsh|fish",
        options.completion,
        reads_keys=False,
    ),
    "schema": Verb(schema, "print the JSON Schema of a recipe, for editors and agents", "", reads_keys=False),
}


def _overview() -> str:
    import shutil
    import textwrap

    column, width = 2 + max(map(len, VERBS)) + 2, min(shutil.get_terminal_size().columns, 120)

    def entry(name: str, summary: str) -> str:
        first = f"  {name}".ljust(column)
        return textwrap.fill(summary, width, initial_indent=first, subsequent_indent=" " * column)

    lines = [entry(name, verb.summary) for name, verb in VERBS.items()]
    return "\n".join(
        [
            textwrap.fill(
                "MiniSFT: supervised fine-tuning with exact tokens, exact loss and every checkpoint scored", width
            ),
            "",
            "usage: minisft COMMAND RECIPE.yaml [key=value ...]",
            "",
            *lines,
            "",
            "`minisft COMMAND --help` explains each. A first result: `minisft demo`.",
        ]
    )


def _nearest_verb(word: str) -> str:
    import difflib

    close = difflib.get_close_matches(word, VERBS, n=1)
    return f"did you mean `{close[0]}`?" if close else f"use one of {', '.join(VERBS)}"


if __name__ == "__main__":
    sys.exit(main())
