"""How fast data preparation is, against the tokenizer alone and (optionally) against TRL, in one run.

    python benchmarks/prepare.py --source bench_mix.sharegpt.jsonl --times 4 --trl
    python benchmarks/prepare.py --scale 100000 1000000

With `--scale` it is instead measured how time and memory grow: so many short conversations are made up, and each
number of them is prepared in a process of its own.

Every contender gets the same rows: those of `--source` that `invalid: skip` keeps, `--times` over. Rounds are taken in
turn, and the best of each is compared, so that other work on the machine touches all alike.
"""

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers import trl_python

from minisft.data.conversation import Conversation
from minisft.data.formats import RowError, check_order, detect_format, to_conversation
from minisft.data.preparation import prepare
from minisft.data.sources import Source, read_source
from minisft.models import load_tokenizer, resolve_model
from minisft.recipe import DataRecipe, Recipe

DEMO = Path(__file__).resolve().parents[1] / "recipes" / "demo.sharegpt.jsonl"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}"
    "{{ m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
)
TRL_PROGRAM = """
import json, sys, time
import datasets
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer
source, tokenizer, template, processes, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(tokenizer)
tokenizer.chat_template = open(template).read()
config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                     num_attention_heads=1, num_key_value_heads=1)
arguments = SFTConfig(output_dir=out, assistant_only_loss=True, max_length=None, dataset_num_proc=int(processes),
                      report_to=[], use_cpu=True, bf16=False)
datasets.disable_caching()
datasets.disable_progress_bars()
started = time.perf_counter()
data = datasets.load_dataset("json", data_files=source, split="train", cache_dir=out)
trainer = SFTTrainer(LlamaForCausalLM(config), arguments, train_dataset=data, processing_class=tokenizer)
seconds = time.perf_counter() - started
print(json.dumps({"tokens": sum(map(len, trainer.train_dataset["input_ids"])), "seconds": seconds}))
"""

SCALE_PROGRAM = """
import json, resource, sys, time
from minisft.data.preparation import prepare
from minisft.models import load_tokenizer, resolve_model
from minisft.recipe import DataRecipe, Recipe
source, output, model = sys.argv[1:]
tokenizer = load_tokenizer(resolve_model(model, weights=False).folder)
started = time.perf_counter()
data = DataRecipe(source=source, template="chatml")
ledger = prepare(Recipe(model=model, output=output, data=data), tokenizer).ledger
seconds = time.perf_counter() - started
peaks = [resource.getrusage(who).ru_maxrss // 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print(json.dumps({"tokens": ledger["tokens"]["kept"], "seconds": seconds, "peaks": peaks}))
"""


def main() -> None:
    arguments = parse_arguments()
    if arguments.scale:
        measure_scale(arguments.scale, arguments.model)
    else:
        measure_speed(arguments)


def measure_speed(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        conversations = usable_conversations(arguments.source) * arguments.times
        sharegpt, messages = write_inputs(folder, conversations)
        model = resolve_model(arguments.model, weights=False).folder
        tokenizer = load_tokenizer(model)
        contenders: dict[str, Callable[[], tuple[int, float]]] = {
            "tokenizers.encode_batch alone": lambda: encode_alone(tokenizer, conversations),
            "minisft prepare": lambda: run_prepare(sharegpt, folder, tokenizer, verify=True),
            "minisft prepare, verify: false": lambda: run_prepare(sharegpt, folder, tokenizer, verify=False),
        }
        if arguments.trl:
            python = trl_python(folder)
            for processes in (1, 2):
                contenders[f"TRL, {processes} processes"] = lambda n=processes: run_trl(  # type: ignore[misc]
                    python, messages, model, folder, n
                )
        best = measure_contenders(contenders, arguments.rounds)
    report(best, len(conversations))


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default=str(DEMO), help="a file of conversations (default: the demo's)")
    parser.add_argument("--times", type=int, default=4, help="how many times over its rows are taken")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="smollm2-135m", help="whose tokenizer is used")
    parser.add_argument("--scale", type=int, nargs="+", metavar="ROWS", help="measure time and memory for so many rows")
    parser.add_argument("--trl", action="store_true", help="also measure TRL, installed in an environment of its own")
    return parser.parse_args(words)


def measure_scale(sizes: list[int], model: str) -> None:
    print(
        f"{'rows':>10} {'tokens':>12} {'seconds':>8} {'rows/s':>9} {'peak MB, main process':>22} {'largest worker':>15}"
    )
    for rows in sizes:
        with tempfile.TemporaryDirectory() as name:
            source = Path(name) / "rows.jsonl"
            write_short_conversations(source, rows)
            command = [sys.executable, "-c", SCALE_PROGRAM, str(source), f"{name}/run", model]
            finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        result = json.loads(finished.stdout.strip().splitlines()[-1])
        main_peak, worker_peak = result["peaks"]
        print(
            f"{rows:>10,} {result['tokens']:>12,} {result['seconds']:>8.1f} {rows / result['seconds']:>9,.0f} "
            f"{main_peak:>22,} {worker_peak:>15,}",
            flush=True,
        )


def write_short_conversations(path: Path, rows: int) -> None:
    """Write `rows` conversations of one or two exchanges in made-up sentences."""
    words = DEMO.read_text(encoding="utf-8").replace('"', " ").replace("\\", " ").split()[:5000]
    choose = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            texts = [" ".join(choose.choices(words, k=choose.randint(4, 16))) for _ in range(choose.choice((2, 2, 4)))]
            texts[0] = f"{number}: {texts[0]}"
            turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
            file.write(json.dumps({"conversations": turns}, ensure_ascii=False) + "\n")


def usable_conversations(source: str) -> list[Conversation]:
    found = []
    for chunk in read_source(Source(source), 0):
        for location, row in chunk.parsed():
            try:
                conversation = to_conversation(row, location, detect_format(row) or "sharegpt")
                check_order(conversation.messages)
            except RowError:
                continue
            found.append(Conversation(conversation.messages))
    return found


def write_inputs(folder: Path, conversations: list[Conversation]) -> tuple[Path, Path]:
    """The same rows as ShareGPT and as messages."""
    sharegpt, messages = folder / "rows.sharegpt.jsonl", folder / "rows.messages.jsonl"
    names = {"user": "human", "assistant": "gpt"}
    with sharegpt.open("w") as first, messages.open("w") as second:
        for conversation in conversations:
            turns = [(message.role, message.text) for message in conversation.messages]
            shared = [{"from": names.get(role, role), "value": text} for role, text in turns]
            first.write(json.dumps({"conversations": shared}, ensure_ascii=False) + "\n")
            listed = [{"role": role, "content": text} for role, text in turns]
            second.write(json.dumps({"messages": listed}, ensure_ascii=False) + "\n")
    return sharegpt, messages


def encode_alone(tokenizer: Any, conversations: list[Conversation]) -> tuple[int, float]:
    texts = [
        "".join(f"<|im_start|>{m.role}\n{m.text}<|im_end|>\n" for m in conversation.messages)
        for conversation in conversations
    ]
    started = time.perf_counter()
    encoded = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    tokens = sum(len(encoding.ids) for encoding in encoded)
    return tokens, time.perf_counter() - started


def run_prepare(source: Path, folder: Path, tokenizer: Any, verify: bool) -> tuple[int, float]:
    output = folder / "run"
    shutil.rmtree(output, ignore_errors=True)
    data = DataRecipe(source=str(source), template="chatml", max_length=10**6, verify=verify)
    started = time.perf_counter()
    prepared = prepare(Recipe(model="benchmark", output=str(output), data=data), tokenizer)
    return prepared.ledger["tokens"]["kept"], time.perf_counter() - started


def run_trl(python: Path, source: Path, tokenizer: Path, folder: Path, processes: int) -> tuple[int, float]:
    template = folder / "chatml.jinja"
    template.write_text(CHATML)
    out = folder / "trl-out"
    shutil.rmtree(out, ignore_errors=True)
    command = [str(python), "-c", TRL_PROGRAM, str(source), str(tokenizer), str(template), str(processes), str(out)]
    finished = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    )
    result = json.loads(finished.stdout.strip().splitlines()[-1])
    return result["tokens"], result["seconds"]


def measure_contenders(
    contenders: dict[str, Callable[[], tuple[int, float]]], rounds: int
) -> dict[str, tuple[int, float]]:
    """The best round of each: tokens and seconds."""
    best: dict[str, tuple[int, float]] = {}
    for number in range(rounds):
        for name, run in contenders.items():
            tokens, seconds = run()
            print(f"round {number + 1}: {name}: {tokens:,} tokens in {seconds:.2f} s", flush=True)
            if name not in best or seconds < best[name][1]:
                best[name] = (tokens, seconds)
    return best


def report(best: dict[str, tuple[int, float]], rows: int) -> None:
    tokens, seconds = best["tokenizers.encode_batch alone"]
    alone = tokens / seconds
    print(f"\n{rows:,} rows on {os.cpu_count()} cores; the best round of each\n")
    print(f"{'':<32} {'tokens':>11} {'tokens/s':>11} {'of the tokenizer alone':>24}")
    for name, (tokens, seconds) in best.items():
        print(f"{name:<32} {tokens:>11,} {tokens / seconds:>11,.0f} {tokens / seconds / alone:>23.0%}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"\npeak memory of this process: {peak:,} MB")


if __name__ == "__main__":
    main()
