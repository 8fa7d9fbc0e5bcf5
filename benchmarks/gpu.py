"""How fast training is on one GPU, against TRL at its best setting: a model of a billion parameters in bf16.

    python benchmarks/gpu.py --peers PEERS --json gpu.json

The model is made here with random weights, in the shape of Llama-3.2-1B, and so is its tokenizer; the conversations
are the demo's, several of them joined to about 1,000 tokens. Full fine-tuning and LoRA; no model hub and no data are
needed. The first steps warm up and do not count. MFU is model FLOP utilisation (Chowdhery et al. 2022, arXiv
2204.02311, appendix B): the operations that `minisft plan` counts, without attention scores, over the dense bf16 rate
of the GPU's data sheet.

Without a GPU nothing can be measured; `--trial` then runs a tiny model on the CPU to see that everything works.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peers import trl_python
from prepare import CHATML, DEMO
from train import CONTENDERS, Contender, Work, reason_of, train_once
from transformers import LlamaConfig

from minisft.data.preparation import prepare
from minisft.data.prepared import load_train
from minisft.models import load_tokenizer
from minisft.planning.machines import machine_named
from minisft.planning.model_cost import count_cost
from minisft.recipe import DataRecipe, LoraRecipe, Recipe
from minisft.training.batching import measure_lengths

BATCH = 16
LENGTH = 1024
LORA: dict[str, Any] = {"rank": 16, "alpha": 32}
SHAPE: dict[str, Any] = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
TINY = SHAPE | {
    "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def main() -> None:
    arguments = parse_arguments()
    if not (arguments.trial or torch.cuda.is_available()):
        print("there is no GPU here: nothing is measured; --trial runs a tiny model on the CPU")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work = make_work(arguments, folder, TINY if arguments.trial else SHAPE)
        found = [*ours(work, arguments.trial), *theirs(work, arguments)]
        measured = measure_rounds(found, arguments.rounds, folder)
    summary = {name: summarise_scores(runs, work, arguments) for name, runs in measured.items()}
    report(summary)
    if arguments.json:
        arguments.json.write_text(json.dumps(summary, indent=1) + "\n")


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default=str(DEMO), help="ShareGPT conversations whose texts are taken")
    parser.add_argument("--steps", type=int, default=12, help="steps of each run")
    parser.add_argument("--warm-up", type=int, default=4, help="first steps that do not count")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peers", type=Path, metavar="FOLDER", help="measure TRL too, installed there")
    parser.add_argument("--trial", action="store_true", help="a tiny model, on the CPU")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(words)


# --- what is trained


def make_work(arguments: argparse.Namespace, folder: Path, shape: dict[str, Any]) -> Work:
    model = make_model(folder / "model", shape)
    tokenizer = load_tokenizer(model)
    source = Path(arguments.source)
    sharegpt, messages = write_conversations(source, folder, tokenizer, BATCH * arguments.steps)
    template = folder / "chatml.jinja"
    template.write_text(CHATML)
    data = DataRecipe(source=str(sharegpt), template="chatml", test_fraction=0, max_length=2 * LENGTH, overflow="error")
    prepare(Recipe(model=str(model), output=str(folder / "run"), data=data), tokenizer)
    sizes = measure_lengths(load_train(folder / "run"))
    return Work(
        model, folder / "run", sharegpt, messages, template, int(sizes.tokens.sum()), int(sizes.supervised.sum())
    )


def make_model(folder: Path, shape: dict[str, Any]) -> Path:
    """Save a random Llama in bf16, and a byte-level BPE that was trained on the demo's texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=4000, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(DEMO.read_text(encoding="utf-8").splitlines(), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(**shape, bos_token_id=0, eos_token_id=2, pad_token_id=0)
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def write_conversations(source: Path, folder: Path, tokenizer: Any, count: int) -> tuple[Path, Path]:
    """Join dialogues, over and over, to conversations of nearly `LENGTH` tokens; write ShareGPT and messages."""
    dialogues = [json.loads(line)["conversations"] for line in source.read_text(encoding="utf-8").splitlines()]
    sizes = [sum(len(tokenizer.encode(turn["value"])) + 6 for turn in dialogue) for dialogue in dialogues]
    sharegpt, messages = folder / "rows.sharegpt.jsonl", folder / "rows.messages.jsonl"
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    at = 0
    with sharegpt.open("w") as first, messages.open("w") as second:
        for number in range(count):
            turns: list[dict[str, str]] = []
            size = 0
            while size + sizes[at % len(sizes)] <= LENGTH:
                turns += [turn for turn in dialogues[at % len(sizes)] if turn["from"] != "system"]
                size += sizes[at % len(sizes)]
                at += 1
            turns[0] = turns[0] | {"value": f"{number}: {turns[0]['value']}"}
            first.write(json.dumps({"conversations": turns}) + "\n")
            second.write(json.dumps({"messages": [{"role": roles[t["from"]], "content": t["value"]} for t in turns]}))
            second.write("\n")
    return sharegpt, messages


# --- who trains it


def ours(work: Work, trial: bool) -> Iterator[Contender]:
    command = (sys.executable, str(CONTENDERS / "with_minisft.py"))
    options = {
        "model": str(work.model), "run": str(work.run), "source": str(work.sharegpt), "batch_size": BATCH,
        "row_tokens": None, "inside": False,
    }  # fmt: skip
    precision = {"precision": "fp32" if trial else "bf16"}
    yield Contender("minisft, full", command, options | {"settings": precision})
    yield Contender("minisft, LoRA", command, options | {"settings": precision | {"lora": LORA}})


def theirs(work: Work, arguments: argparse.Namespace) -> Iterator[Contender]:
    """TRL at its best: packed rows of 8,192 tokens in bf16 with FlashAttention where it is installed, else batches."""
    if not arguments.peers:
        return
    command = (str(trl_python(arguments.peers)), str(CONTENDERS / "with_trl.py"))
    options = {"model": str(work.model), "messages": str(work.messages), "template": str(work.template)}
    settings: dict[str, Any] = {"gradient_checkpointing": False, "max_length": 2 * LENGTH}
    if arguments.trial:
        settings |= {"per_device_train_batch_size": BATCH}
    elif has_flash_attention():
        settings |= {
            "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "packing": True, "max_length": 8192,
            "bf16": True, "use_cpu": False,
            "model_init_kwargs": {"dtype": "float32", "attn_implementation": "flash_attention_2"},
        }  # fmt: skip
    else:
        settings |= {
            "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "bf16": True, "use_cpu": False,
            "model_init_kwargs": {"dtype": "float32"},
        }  # fmt: skip
    yield Contender("TRL, full", command, options | {"settings": settings})
    lora = {"r": LORA["rank"], "lora_alpha": LORA["alpha"], "target_modules": "all-linear"}
    yield Contender("TRL, LoRA", command, options | {"settings": settings, "lora": lora})


def has_flash_attention() -> bool:
    from transformers.utils import is_flash_attn_2_available

    return bool(is_flash_attn_2_available())


# --- the rounds, and what came out


def measure_rounds(found: list[Contender], rounds: int, folder: Path) -> dict[str, list[dict[str, Any]]]:
    measured: dict[str, list[dict[str, Any]]] = {one.name: [] for one in found}
    for number in range(rounds):
        for one in found:
            try:
                measured[one.name].append(train_once(one, number, dict(os.environ), folder))
            except (subprocess.SubprocessError, OSError) as error:
                print(f"round {number + 1}: {one.name}: failed: {reason_of(error)}", flush=True)
                continue
            print(f"round {number + 1}: {one.name}: {measured[one.name][-1]['seconds']:.1f} s", flush=True)
    return {name: runs for name, runs in measured.items() if runs}


def summarise_scores(runs: list[dict[str, Any]], work: Work, arguments: argparse.Namespace) -> dict[str, float]:
    """Return the medians over rounds; tokens a second are those of the steps after the warm-up."""
    rates = []
    for run in runs:
        stamps = run["stamps"]
        skipped = min(arguments.warm_up, len(stamps) - 1)
        share = 1 - skipped / len(stamps)  # steps are of nearly equal size
        rates.append(work.tokens * share / (stamps[-1] - (stamps[skipped - 1] if skipped else 0.0)))
    return {
        "tokens_per_second": statistics.median(rates),
        "supervised_per_second": statistics.median(rates) * work.supervised / work.tokens,
        "peak_gb": statistics.median(run.get("gpu_peak_mb", run["peak_mb"]) for run in runs) / 1e3,
        "steps": len(runs[0]["stamps"]),
    }


def report(summary: dict[str, dict[str, float]]) -> None:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: the figures mean nothing"
    print(f"\n{gpu}\n\n| | tokens/s | supervised tokens/s | MFU | peak GB | steps |\n|---|---|---|---|---|---|")
    for name, one in summary.items():
        utilisation = "-"
        if torch.cuda.is_available():
            rate = machine_named(None, 1, "bf16").flops["bf16"]
            operations = operations_a_second(one["tokens_per_second"], one["supervised_per_second"], "LoRA" in name)
            utilisation = f"{operations / rate:.2f}"
        print(
            f"| {name} | {one['tokens_per_second']:,.0f} | {one['supervised_per_second']:,.0f} | {utilisation} "
            f"| {one['peak_gb']:.1f} | {one['steps']:.0f} |"
        )


def operations_a_second(tokens: float, supervised: float, lora: bool) -> float:
    """Return those that a rate of tokens takes; logits are counted for supervised tokens alone, for TRL's too."""
    footprint = count_cost(LlamaConfig(**SHAPE), "half", LoraRecipe(**LORA) if lora else None)
    return footprint.step_flops(checkpointing=False) * tokens + footprint.head_flops(supervised)


if __name__ == "__main__":
    main()
