"""How fast training is, and how much memory it takes, against TRL and ms-swift in one run, on this machine's CPU.

    python benchmarks/train.py --source bench_mix.sharegpt.jsonl --rounds 5 --peers PEERS --overhead --json train.json

Every contender trains the same conversations once, in fp32 and in steps of 8, each time in a process of its own, in
turn. All of them build upon transformers' Trainer, so one callback measures all: from the beginning of training to the
end of its last step, without loading, preparation and saving. Supervised tokens are counted once, by MiniSFT. Medians
of all rounds are compared. The peers are installed under the folder that `--peers` names, for the next time too.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers import swift_python, trl_python
from prepare import CHATML, DEMO, usable_conversations, write_inputs

from minisft.data.conversation import Conversation
from minisft.data.preparation import prepare
from minisft.data.prepared import load_train
from minisft.models import load_tokenizer, resolve_model
from minisft.recipe import DataRecipe, Recipe
from minisft.training.batching import Sizes, balance_ranks, measure_lengths, steps_of_epoch

CONTENDERS = Path(__file__).resolve().parent / "contenders"
BATCH = 8
MOST_TOKENS = 1024  # of a conversation
PATIENCE = 3600  # seconds that a contender may take
TWO, IN_ORDER = "minisft, 2 processes", "minisft, 2 processes, shares in order"
OURS, INSIDE, PRODUCT = "minisft", "minisft, with timers inside", "matrix product"
TRL_SETTINGS: dict[str, dict[str, Any]] = {
    "TRL, default": {"per_device_train_batch_size": BATCH},
    "TRL, packed": {
        "per_device_train_batch_size": 1, "packing": True, "packing_strategy": "bfd", "max_length": 2048,
        "gradient_checkpointing": False,
    },
    "TRL, batch 1 x 8": {
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": BATCH, "gradient_checkpointing": False,
    },
}  # fmt: skip
SWIFT = "ms-swift, batch 1 x 8"


@dataclass(frozen=True)
class Work:
    """What every contender trains.

    Attributes:
        model: a plain model folder.
        run: a MiniSFT run folder, prepared from `sharegpt`.
        sharegpt: the conversations.
        messages: the same as role and content.
        template: a file with the chat template, ChatML.
        tokens: of all conversations.
        supervised: those of them that are learned.
    """

    model: Path
    run: Path
    sharegpt: Path
    messages: Path
    template: Path
    tokens: int
    supervised: int


@dataclass(frozen=True)
class Contender:
    """A name in the table, the command that trains it once, and the options that the command takes as JSON."""

    name: str
    command: tuple[str, ...]
    options: dict[str, Any]


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = resolve_model(arguments.model).folder
        balance = balance_of(arguments, folder / "balance", model)
        work = make_work(arguments, folder, model)
        print(
            f"{arguments.conversations} conversations, {work.tokens:,} tokens, {work.supervised:,} supervised, "
            f"{arguments.rounds} rounds, {arguments.threads} threads",
            flush=True,
        )
        found, left_out = contenders(arguments, work)
        rounds = measure_rounds(found, left_out, arguments, folder)
    summary = summarise_scores(rounds, work.supervised, work.tokens) | {"balance": balance, "left_out": left_out}
    report(summary)
    if arguments.json:
        kept = {"arguments": {key: str(value) for key, value in vars(arguments).items()}, **summary, "rounds": rounds}
        arguments.json.write_text(json.dumps(kept, indent=1) + "\n")


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default=str(DEMO), help="a file of conversations (default: the demo's)")
    parser.add_argument("--conversations", type=int, default=24, help="how many of them are trained")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of conversations")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--row-tokens", type=int, nargs="+", default=[], help="measure training.row_tokens, too")
    parser.add_argument("--peers", type=Path, metavar="FOLDER", help="measure TRL and ms-swift, installed there")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="peers to measure; others are left out")
    parser.add_argument("--overhead", action="store_true", help="also measure what a step spends on our own code")
    parser.add_argument("--balance", action="store_true", help="also measure two processes, dealt evenly and in order")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured there")
    return parser.parse_args(words)


# --- what is trained


def make_work(arguments: argparse.Namespace, folder: Path, model: Path) -> Work:
    conversations = choose(arguments, folder / "choice", model)
    sharegpt, messages = write_inputs(folder, conversations)
    template = folder / "chatml.jinja"
    template.write_text(CHATML)
    sizes = prepared_sizes(folder / "run", model, source=str(sharegpt), max_length=MOST_TOKENS, overflow="error")
    return Work(
        model, folder / "run", sharegpt, messages, template, int(sizes.tokens.sum()), int(sizes.supervised.sum())
    )


def choose(arguments: argparse.Namespace, folder: Path, model: Path) -> list[Conversation]:
    """Choose among the usable conversations of the source that are short enough.

    Those with tools are not among them, since ChatML has no form for them that all contenders share.
    """
    plain = [one for one in usable_conversations(arguments.source) if not has_tools(one)]
    folder.mkdir()
    sharegpt, _ = write_inputs(folder, plain)
    prepared_sizes(folder / "run", model, source=str(sharegpt), max_length=MOST_TOKENS, overflow="drop")
    lines = [int(location.rpartition(":")[2]) for location in load_train(folder / "run")["location"]]
    if len(lines) < arguments.conversations:
        sys.exit(f"{arguments.source}: {len(lines)} conversations can be used, {arguments.conversations} are wanted")
    chosen = random.Random(arguments.seed).sample(lines, arguments.conversations)
    return [plain[line - 1] for line in chosen]


def has_tools(conversation: Conversation) -> bool:
    return any(message.role == "tool" or message.tool_calls for message in conversation.messages)


def prepared_sizes(output: Path, model: Path, **data: Any) -> Sizes:
    """Prepare data under a run folder, all of it for training."""
    recipe = Recipe(model=str(model), output=str(output), data=DataRecipe(template="chatml", test_fraction=0, **data))
    prepare(recipe, load_tokenizer(model))
    return measure_lengths(load_train(output))


def balance_of(arguments: argparse.Namespace, folder: Path, model: Path) -> dict[str, float]:
    """Return how uneven an epoch of the whole source is on two processes, as a recipe's defaults prepare it.

    Returns:
        for our deal, the best there is, and shares in order: largest to mean tokens of a process, weighted by tokens.
    """
    sizes = prepared_sizes(folder, model, source=arguments.source, invalid="skip")
    steps = steps_of_epoch(sizes.tokens, global_batch=BATCH, pack_tokens=None, seed=0, epoch=0)
    lengths = [sizes.tokens[step].tolist() for step in steps]
    loads = {"dealt": dealt_load, "optimum": least_load, "in_order": load_in_order}
    return {name: imbalance(lengths, largest_load) for name, largest_load in loads.items()}


def imbalance(steps: list[list[int]], largest_load: Callable[[list[int]], int]) -> float:
    """Return largest to mean tokens of two processes over steps of such lengths, weighted by tokens."""
    return 2 * sum(map(largest_load, steps)) / sum(map(sum, steps))


def dealt_load(lengths: list[int]) -> int:
    return max(sum(lengths[at] for at in share) for share in balance_ranks(lengths, 2))


def load_in_order(lengths: list[int]) -> int:
    """Return the larger of two shares of as many conversations, as a sampler without lengths makes them."""
    half = -(-len(lengths) // 2)
    return max(sum(lengths[:half]), sum(lengths[half:]))


def least_load(lengths: list[int]) -> int:
    """Return the smaller of the largest loads that any split in two has."""
    sums = {0}
    for length in lengths:
        sums |= {one + length for one in sums}
    return min(max(one, sum(lengths) - one) for one in sums)


# --- who trains it


def contenders(arguments: argparse.Namespace, work: Work) -> tuple[list[Contender], dict[str, str]]:
    """List all that can be measured, and say of each other one why it cannot."""
    found = list(ours(arguments, work))
    left_out: dict[str, str] = {}
    if arguments.peers:
        for names, install, make in (
            (list(TRL_SETTINGS), trl_python, trl_contenders),
            ([SWIFT], swift_python, swift_contenders),
        ):
            if arguments.only and not set(names) & set(arguments.only):
                continue
            try:
                made = make(install(arguments.peers), work)
                found += [one for one in made if not arguments.only or one.name in arguments.only]
            except subprocess.CalledProcessError as error:
                left_out |= dict.fromkeys(names, f"it cannot be installed: {last_line(error.stderr)}")
    return found, left_out


def ours(arguments: argparse.Namespace, work: Work) -> Iterator[Contender]:
    command = (sys.executable, str(CONTENDERS / "with_minisft.py"))
    options = {
        "model": str(work.model), "run": str(work.run), "source": str(work.sharegpt), "batch_size": BATCH,
        "row_tokens": None, "inside": False,
    }  # fmt: skip
    yield Contender(OURS, command, options)
    for row_tokens in arguments.row_tokens:
        yield Contender(f"{OURS}, row_tokens {row_tokens}", command, options | {"row_tokens": row_tokens})
    if arguments.overhead:
        yield Contender(INSIDE, command, options | {"inside": True})
    if arguments.balance:
        launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        options = options | {"batch_size": BATCH // 2, "threads": max(1, arguments.threads // 2)}
        yield Contender(TWO, (*launcher, command[1]), options)
        yield Contender(IN_ORDER, (*launcher, command[1]), options | {"in_order": True})


def trl_contenders(python: Path, work: Work) -> list[Contender]:
    command = (str(python), str(CONTENDERS / "with_trl.py"))
    options = {"model": str(work.model), "messages": str(work.messages), "template": str(work.template)}
    return [Contender(name, command, options | {"settings": settings}) for name, settings in TRL_SETTINGS.items()]


def swift_contenders(python: Path, work: Work) -> list[Contender]:
    command = (str(python), str(CONTENDERS / "with_swift.py"))
    options = {
        "model": str(work.model), "messages": str(work.messages), "batch_size": BATCH, "max_length": 2 * MOST_TOKENS,
    }  # fmt: skip
    return [Contender(SWIFT, command, options)]


# --- the rounds


def measure_rounds(
    found: list[Contender],
    left_out: dict[str, str],
    arguments: argparse.Namespace,
    folder: Path,
    scripts: Path = CONTENDERS,
) -> dict[str, list[dict[str, Any]]]:
    """Measure each contender in each round; one that fails is left out from then on.

    Args:
        found: Contenders to measure.
        left_out: Reasons by name of contender; those that fail are added.
        arguments: Options of the command line: `rounds` and `threads`.
        folder: Folder for what the contenders write.
        scripts: Folder with the script `matrix_product.py`.

    Returns:
        by name, what was measured in each round; under `PRODUCT` the rate of the matrix product in the same rounds.
    """
    rounds: dict[str, list[dict[str, Any]]] = {PRODUCT: []}
    environment = on_the_cpu(arguments.threads, folder)
    for number in range(arguments.rounds):
        product = (sys.executable, str(scripts / "matrix_product.py"))
        rounds[PRODUCT].append(measured(product, folder / "result", environment, lambda result: str(result)))
        print(f"round {number + 1}: {PRODUCT}: {rounds[PRODUCT][-1]['flops'] / 1e9:.1f} GFLOP/s", flush=True)
        for one in [one for one in found if one.name not in left_out]:
            try:
                result = train_once(one, number, environment, folder)
            except (subprocess.SubprocessError, OSError) as error:
                left_out[one.name] = reason_of(error)
                print(f"round {number + 1}: {one.name}: left out: {left_out[one.name]}", flush=True)
                continue
            rounds.setdefault(one.name, []).append(result)
            print(f"round {number + 1}: {one.name}: {result['seconds']:.1f} s, {result['peak_mb']:,.0f} MB", flush=True)
    return {name: results for name, results in rounds.items() if name not in left_out}


def train_once(
    contender: Contender, number: int, environment: dict[str, str], folder: Path, patience: float = PATIENCE
) -> dict[str, Any]:
    """Train in a new process; the order of the conversations is that of the round's seed, so each round has another.

    Args:
        contender: Who trains.
        number: Number of the round.
        environment: Variables of the process.
        folder: Folder for what it writes.
        patience: Seconds that it may take.
    """
    with tempfile.TemporaryDirectory(dir=folder) as output:
        options = contender.options | {"seed": number, "output": output}
        return measured(
            contender.command,
            folder / "result",
            environment,
            lambda result: json.dumps(options | {"result": str(result)}),
            patience,
        )


def measured(
    command: tuple[str, ...],
    result: Path,
    environment: dict[str, str],
    argument: Callable[[Path], str],
    patience: float = PATIENCE,
) -> dict[str, Any]:
    """Run a command with the argument made of `result`, and return what it wrote into that file.

    Raises:
        subprocess.SubprocessError: it failed, or took too long.
        OSError: it wrote nothing.
    """
    result.unlink(missing_ok=True)
    subprocess.run(
        [*command, argument(result)], check=True, timeout=patience, env=environment, cwd=result.parent,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    return dict(json.loads(result.read_text()))


def on_the_cpu(threads: int, folder: Path) -> dict[str, str]:
    """Return the environment in which nobody sees a GPU or a hub, and what peers leave behind goes with `folder`."""
    return os.environ | {
        "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1",
        "MODELSCOPE_CACHE": str(folder / "modelscope"), "TMPDIR": str(folder),
    }  # fmt: skip


def reason_of(error: Exception) -> str:
    """Return what a contender that failed said last."""
    said = error.stderr if isinstance(error, subprocess.CalledProcessError) else ""
    return last_line(said) or str(error)


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


# --- what came out


def summarise_scores(rounds: dict[str, list[dict[str, Any]]], supervised: int, tokens: int) -> dict[str, Any]:
    """Return medians by contender, the matrix product's rate, and the shares of it and of a step that ours reach."""
    products = [one["flops"] for one in rounds[PRODUCT]]
    medians = {name: medians_of(results, supervised) for name, results in rounds.items() if name != PRODUCT}
    shares = {
        name: statistics.median(
            operations(one, supervised, tokens) / one["seconds"] / product
            for one, product in zip(results, products, strict=True)
        )
        for name, results in rounds.items()
        if "body_parameters" in results[0]
    }
    outside = [1 - one["inside_seconds"] / one["seconds"] for one in rounds.get(INSIDE, [])]
    return {
        "tokens": tokens, "supervised": supervised, "medians": medians, "product_flops": statistics.median(products),
        "share_of_product": shares, "outside": statistics.median(outside) if outside else None,
    }  # fmt: skip


def medians_of(results: list[dict[str, Any]], supervised: int) -> dict[str, float]:
    rates = [supervised / one["seconds"] for one in results]
    return {
        "rate": statistics.median(rates), "lowest": min(rates), "highest": max(rates),
        "peak_mb": statistics.median(one["peak_mb"] for one in results),
        "tokens": results[0]["tokens"], "steps": results[0]["steps"],
    }  # fmt: skip


def operations(result: dict[str, Any], supervised: int, tokens: int) -> int:
    """Count those of all forwards and backwards: 6 for each weight that a token meets."""
    return int(6 * (result["body_parameters"] * tokens + result["head_parameters"] * supervised))


def report(summary: dict[str, Any]) -> None:
    ours = summary["medians"].get(OURS)
    if ours is None:
        sys.exit(f"{OURS} failed: {summary['left_out'][OURS]}")
    print(f"\n| | supervised tokens/s | lowest to highest | {OURS} is | peak MB | {OURS} takes | tokens | steps |")
    print("|---|---|---|---|---|---|---|---|")
    for name, one in summary["medians"].items():
        print(
            f"| {name} | {one['rate']:.1f} | {one['lowest']:.1f} to {one['highest']:.1f} "
            f"| {ours['rate'] / one['rate']:.2f} times as fast | {one['peak_mb']:,.0f} "
            f"| {ours['peak_mb'] / one['peak_mb']:.2f} of it | {one['tokens']:,} | {one['steps']} |"
        )
    print(f"\na large fp32 matrix product reaches {summary['product_flops'] / 1e9:.1f} GFLOP/s; of that")
    for name, share in summary["share_of_product"].items():
        print(f"  {name}: {share:.3f}")
    if summary["outside"] is not None:
        print(f"of a step, outside forward, backward and optimizer: {summary['outside']:.2%}")
    balance = summary["balance"]
    print(
        f"largest to mean tokens of 2 processes, steps of {BATCH}, whole source: {balance['dealt']:.4f}; "
        f"the optimum: {balance['optimum']:.4f}; shares in order: {balance['in_order']:.4f}"
    )
    for name, reason in summary["left_out"].items():
        print(f"left out: {name}: {reason}")


if __name__ == "__main__":
    main()
