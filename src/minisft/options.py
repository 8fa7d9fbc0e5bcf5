"""The parser and the options of each command; `cli` has the functions that the commands call."""

import argparse
import re
from collections.abc import Callable, Sequence

from minisft.errors import UserError

Arguments = argparse.Namespace

_DATA_HELP = "a file, a folder, a pattern such as 'data/*.jsonl', or a hub id; several are trained on together"
_WORDS_HELP = "followed by keys of the recipe to change, such as training.epochs=3"


class Verb:
    """A verb with its help; `options` are small functions that add options to a parser.

    Args:
        run: The function of `cli` that carries it out.
        summary: What it does, in a line.
        words: Names of its arguments, for the help; "" if it has none.
        *options: Functions that add options to a parser.
        reads_keys: Whether a recipe or a run is named and keys of the recipe may follow; otherwise `options` add the
            arguments too.
    """

    def __init__(
        self,
        run: Callable[[Arguments], int | None],
        summary: str,
        words: str,
        *options: Callable[["Parser"], None],
        reads_keys: bool = True,
    ) -> None:
        self.run = run
        self.summary = summary
        self.words = words
        self.options = options
        self.reads_keys = reads_keys

    def parser(self, name: str) -> "Parser":
        usage = ["minisft", name, self.words, "[key=value ...]" if self.reads_keys else "", "[options]"]
        parser = Parser(
            prog=f"minisft {name}",
            usage=" ".join(filter(None, usage)),
            description=self.summary,
            allow_abbrev=False,  # `--forc` must not delete a run
        )
        if self.reads_keys:
            nargs = "+" if self.words else "*"
            parser.add_argument("words", nargs=nargs, metavar=self.words or "key=value", help=_WORDS_HELP)
        else:
            parser.set_defaults(words=[])
        for option in self.options:
            option(parser)
        return parser


class Parser(argparse.ArgumentParser):
    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse words; an option that does not exist is reported before one that is missing, which it may be meant for.

        Raises:
            UserError: The words are not what the command takes.
        """
        for word in words:
            if word == "--":
                break
            if word.startswith("--") and " " not in word and word.partition("=")[0] not in self._option_string_actions:
                self.error(f"unrecognized arguments: {word}")
        return self.parse_intermixed_args(words)

    def error(self, message: str) -> None:  # type: ignore[override]
        near = self._nearest(message)
        raise UserError(
            self.prog.removeprefix("minisft "),
            message,
            f"{f'did you mean `{near}`? ' if near else ''}see `{self.prog} --help`",
        )

    def _nearest(self, message: str) -> str | None:
        """Return the option or the choice that is most like the one that argparse refuses, if one is."""
        if unknown := re.match(r"unrecognized arguments: .*?(--?[^\s=]+)", message):
            known = [name for action in self._actions for name in action.option_strings]
        elif unknown := re.search(r"invalid choice: '(.*?)' \(", message):
            known = [str(choice) for action in self._actions for choice in action.choices or ()]
        else:
            return None
        import difflib  # only now: it takes time that --help does not have

        return next(iter(difflib.get_close_matches(unknown[1], known, n=1)), None)


def trust(parser: Parser) -> None:
    problem = "run code that comes with the model; the recipe of a run folder never consents for you"
    parser.add_argument("--trust-remote-code", action="store_true", help=problem)


def prints_json(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON, and all else on stderr")


def _at_least_1(text: str) -> int:
    return _at_least(1, text)


def _at_least_0(text: str) -> int:
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, and is {text!r}") from None
    if number < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, and is {number}")
    return number


def init(parser: Parser) -> None:
    parser.add_argument("data", nargs="+", metavar="DATA", help=_DATA_HELP)
    parser.add_argument(
        "--model", default="smollm2-135m", metavar="NAME",
        help="a hub id, a folder, a .gguf file or smollm2-135m, the default, which a CPU can train",
    )  # fmt: skip
    parser.add_argument(
        "--output-recipe", default="recipe.yaml", metavar="FILE", help="file to write (default recipe.yaml)"
    )
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        help="a GPU, such as h100, b200, a100-pcie, l40s or 4090, or cpu; default: this machine",
    )
    parser.add_argument(
        "--count", type=_at_least_1, metavar="N", help="number of GPUs; default: 1, or all that are here"
    )
    parser.add_argument("--yes", action="store_true", help="accepted for scripts: init asks nothing")


def inspect(parser: Parser) -> None:
    parser.add_argument("--split", "--side", choices=("train", "test"), default="train", help="which split to show")
    parser.add_argument("--row", type=int, action="append", default=[], metavar="N", help="a row by number; repeatable")
    parser.add_argument("--id", action="append", default=[], metavar="ID", help="a conversation by id; repeatable")
    parser.add_argument(
        "--worst", choices=("length", "cut", "share"), help="show the rows with the highest value of this"
    )
    parser.add_argument("--findings", action="store_true", help="only rows with findings, such as repaired or cut ones")
    parser.add_argument("--count", type=_at_least_1, default=3, metavar="N", help="number of rows (default 3)")
    parser.add_argument("--html", metavar="FILE", help="write a page instead of printing")


def check(parser: Parser) -> None:
    parser.add_argument("--quick", action="store_true", help="only the checks that need no weights; takes seconds")
    parser.add_argument("--json", action="store_true", help="print check.json instead of a table")


def plan(parser: Parser) -> None:
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        help="a GPU, such as h100, b200, a100-pcie, l40s or 4090, or cpu; default: this machine",
    )
    parser.add_argument(
        "--count", type=int, metavar="N", help="GPUs or processes of a machine; default: training.processes"
    )
    parser.add_argument("--nodes", type=int, default=1, metavar="M", help="number of machines (default 1)")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="execute steps of the trainer on those GPUs, which need not be there, and show what goes wrong",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON instead of tables")


def runs(parser: Parser) -> None:
    parser.add_argument("folder", nargs="?", default="outputs", metavar="FOLDER", help="default: outputs")
    parser.add_argument("--json", action="store_true", help="print the runs as JSON instead of a table")


def completion(parser: Parser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))


def watch(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", help="run folder, the output of the recipe that is being trained")


def why(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", help="run folder, the output of a recipe that was trained")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--step", type=_at_least_1, metavar="N", help="replay this step, and rank its rows by loss and gradient norm"
    )
    which.add_argument(
        "--row", metavar="ID", help="show the training rows that share the most with this test row; without --step "
        "and --row, show the rows whose losses look wrong",
    )  # fmt: skip


def verify(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", help="run folder, the output of a recipe that was trained")
    parser.add_argument(
        "--steps", type=_at_least_0, default=2, metavar="N", help="steps to replay (default 2); 0 compares hashes only"
    )


def report(parser: Parser) -> None:
    parser.add_argument("--to", metavar="FOLDER", help="folder to write to, in place of the run folder")


def chat(parser: Parser) -> None:
    parser.add_argument(
        "--template", metavar="NAME|FILE", default="auto",
        help="mistral, mistral-v1 (v2, v3, v7, v11, v13), chatml, llama3, zephyr or a .jinja file; "
        "default: the model's own",
    )  # fmt: skip
    parser.add_argument("--message", metavar="TEXT", help="print the answer to this message and end")
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument(
        "--max-new-tokens", type=int, default=512, metavar="N", help="maximum length of an answer (default 512)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy decoding"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="probability mass of nucleus sampling (default 1.0)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of sampling (default 0)")


def serve(parser: Parser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="address to bind to (default 127.0.0.1, this machine only)")
    parser.add_argument("--port", type=_port, default=8000, metavar="N", help="default 8000; 0 takes a free one")
    parser.add_argument(
        "--api-key", metavar="KEY", help="key that requests must have; needed for another host than this machine"
    )
    parser.add_argument(
        "--memory", type=_gigabytes, metavar="GB", help="most memory for weights; default: most of what is free"
    )
    parser.add_argument(
        "--backend", choices=("transformers", "vllm", "llama.cpp"), default="transformers",
        help="vllm and llama.cpp serve a verified export of a run's final model, behind the same page",
    )  # fmt: skip


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 65535, and is {text!r}")
    return int(text)


def _gigabytes(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, and is {text!r}")
    return number


def evaluate(parser: Parser) -> None:
    parser.add_argument("--follow", action="store_true", help="score checkpoints while a training run writes them")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of a table")


def contamination(parser: Parser) -> None:
    parser.add_argument(
        "--against", action="append", default=[], metavar="FILE",
        help="a benchmark or other texts to look for in the data: .txt with an item in each line, or a type of "
        "data.source; repeatable",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead of text")


def compare(parser: Parser) -> None:
    parser.add_argument(
        "--strategies", metavar="A,B", help="strategies to compare; default: all, unless --vary is given"
    )
    parser.add_argument(
        "--vary", action="append", default=[], metavar="KEY=V1,V2", help="a key and its values; repeatable"
    )
    parser.add_argument("--no-evaluate", dest="evaluate", action="store_false", help="train only")
    parser.add_argument(
        "--force",
        action="store_true",
        help="train the variants again; each earlier run is kept until the first step of the new one",
    )


def search(parser: Parser) -> None:
    parser.add_argument(
        "--vary", action="append", default=[], metavar="KEY=LOW..HIGH|KEY=A,B",
        help="a key of `training`, seed, data.max_length or data.overflow, and its range or values; repeatable; "
        "default: learning rate, epochs, batch size",
    )  # fmt: skip
    parser.add_argument(
        "--objective", default="loss", metavar="NAME",
        help="what chooses the best trial: loss (default), or a metric of the validation answers, such as bleu",
    )  # fmt: skip
    parser.add_argument(
        "--budget", metavar="30m|3x|20",
        help="a time, a multiple of one full run, or a number of trials; default: every combination of listed values, "
        "or 8 trials where a range is varied",
    )  # fmt: skip
    parser.add_argument(
        "--validation", type=float, metavar="F",
        help="fraction of the train conversations on which trials are compared (default 0.1)",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=_at_least_1, default=1, metavar="N", help="trials that run at the same time (default 1)"
    )
    parser.add_argument(
        "--storage", metavar="URL",
        help="Optuna's storage, such as postgresql://... or journal:FILE; default: a file in the output folder",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the sampler (default 0)")
    parser.add_argument("--resume", action="store_true", help="go on with the search in the output folder")
    parser.add_argument(
        "--lr-range", dest="range_test", action="store_true",
        help="only train for a few steps with a rising learning rate, and suggest a range to vary it in",
    )  # fmt: skip
    parser.add_argument(
        "--no-defaults", dest="defaults", action="store_false",
        help="do not train the recipe's own settings to the end for the comparison on the test rows",
    )  # fmt: skip


def export(parser: Parser) -> None:
    parser.add_argument(
        "--to", choices=("folder", "gguf", "ollama"), default="folder",
        help="a model folder (default), model.gguf for llama.cpp, or model.gguf and a Modelfile for Ollama",
    )  # fmt: skip
    parser.add_argument(
        "--merge",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="add adapters to the weights of the base model (default), or write them without merging",
    )
    _exported_model(parser, ("f32", "fp32", "f16", "fp16", "bf16", "q8_0", "q4_k_m"))
    parser.add_argument(
        "--max-kl", type=float, metavar="NATS",
        help="largest accepted mean KL divergence of a quantised model, in nats per token (default 0.05 for q8_0, "
        "0.5 for q4_k_m)",
    )  # fmt: skip
    parser.add_argument(
        "--llama-cpp", metavar="FOLDER", help="a folder of llama.cpp, for its converter, quantiser and server"
    )
    parser.add_argument("--force", action="store_true", help="replace the model that an earlier export wrote there")


def push(parser: Parser) -> None:
    _exported_model(parser, ("f32", "fp32", "f16", "fp16", "bf16"))
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument("--dry-run", action="store_true", help="write the folder that would be sent, and send nothing")


def _exported_model(parser: Parser, dtypes: tuple[str, ...]) -> None:
    """Add the options that export and push share."""
    parser.add_argument("--checkpoint", metavar="NAME", help="such as checkpoint-96, or best; default: the final model")
    quantised = "; q8_0 and q4_k_m only for gguf and ollama" if "q8_0" in dtypes else ""
    parser.add_argument("--dtype", choices=dtypes, help=f"number format of the weights{quantised}; default: unchanged")
    parser.add_argument(
        "--engine", choices=("auto", "none", "transformers", "llama.cpp", "vllm"), default="auto",
        help="engine that must give the same prompts, probabilities and stops as the trained model on held-out "
        "conversations; default: all that are installed",
    )  # fmt: skip
    parser.add_argument("--verify", action="store_const", const="auto", dest="engine", help="the same as --engine auto")
    parser.add_argument(
        "--no-verify", action="store_const", const="none", dest="engine", help="the same as --engine none"
    )
    parser.add_argument(
        "--allow-unverified", action="store_true", help="keep an export that an engine does not serve as trained"
    )
    parser.add_argument("--license", metavar="ID", help="the model's licence, such as apache-2.0, for the model card")


def force(parser: Parser) -> None:
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace the run in the output folder; it is kept until the new one has taken its first step",
    )


def resume(parser: Parser) -> None:
    parser.add_argument(
        "--resume",
        action="store_true",
        help="resume from the newest complete checkpoint; with a constant learning rate also for more epochs or steps",
    )


def dry_run(parser: Parser) -> None:
    parser.add_argument(
        "--dry-run", action="store_true", help="make every check, prepare the data in a temporary folder, write nothing"
    )


def submit(parser: Parser) -> None:
    parser.add_argument(
        "--nodes", type=_at_least_1, default=1, metavar="N",
        help="number of machines (default 1); training.processes counts the processes of all of them",
    )  # fmt: skip
    parser.add_argument(
        "--time", required=True, metavar="T",
        help="time limit in SLURM's formats: 8:00:00 is 8 hours, 90 is 90 minutes, 2-12 is 2 days and 12 hours; at its "
        "end the run is saved and requeued",
    )  # fmt: skip
    parser.add_argument("--partition", metavar="P", help="partition; default: the cluster's own")
    parser.add_argument(
        "--gpus-per-node", metavar="[TYPE:]N",
        help="default: one for each process of a machine; 0 trains on CPUs",
    )  # fmt: skip
    parser.add_argument(
        "--cpus-per-task", type=_at_least_1, metavar="N",
        help="cores of each machine; default: 4 for each process with a GPU, 1 for each without",
    )  # fmt: skip
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION",
        help="another option of sbatch without its dashes, such as account=NAME; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--script", metavar="FILE", help="script to write; default: OUTPUT.sbatch beside the run folder"
    )
    parser.add_argument("--now", action="store_true", help="submit the jobs, and print their ids")
    parser.add_argument("--resume", action="store_true", help="resume an unfinished run")
    parser.add_argument(
        "--no-evaluate", dest="evaluate", action="store_false", help="without the job that scores the run"
    )
    parser.add_argument("--force", action="store_true", help="replace scripts that exist")
    prints_json(parser)


def machines(parser: Parser) -> None:
    parser.add_argument(
        "--nodes", type=int, default=1, metavar="M", help="number of machines that train together (default 1)"
    )
    parser.add_argument("--node-rank", type=int, metavar="R", help="rank of this machine, from 0")
    parser.add_argument("--rendezvous", metavar="HOST:PORT", help="address of machine 0, the same on all machines")
