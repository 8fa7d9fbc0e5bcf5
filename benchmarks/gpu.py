"""How fast training is on one GPU, against TRL at its best settings: models of 1 and 8 billion parameters in bf16.

    python benchmarks/gpu.py --peers PEERS     # as often as it takes until it prints: all is measured
    python benchmarks/gpu.py --report

The models are made here with random weights, in the shapes of Llama-3.2-1B and Llama-3.1-8B, and so is their tokenizer.
The conversations are the demo's, several of them joined to about 256 tokens or to about 8,192; a step has 16,384 tokens
of either. 1B is trained fully and with LoRA, 8B with LoRA. No model hub and no data are needed. The first steps warm up
and do not count. A further run of MiniSFT in each case is profiled: the share of the GPU's time by kind of kernel.

TFLOP/s are model operations as `minisft plan` counts them, with attention scores within each conversation, and with
logits for supervised tokens alone. Their share of the dense bf16 rate of the GPU's data sheet is model FLOP utilisation
(Chowdhery et al. 2022, arXiv 2204.02311, appendix B).

A call begins no further measurement after `--minutes`, and stops one that takes longer. What was measured is kept in
`--folder`, with the models. Without a GPU nothing can be measured; `--trial` then runs tiny models on the CPU to see
that everything works.
"""

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
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
from minisft.planning.model_cost import ModelCost, count_cost
from minisft.recipe import DataRecipe, LoraRecipe, Recipe
from minisft.training.batching import measure_lengths

LORA: dict[str, Any] = {"rank": 16, "alpha": 32}
_LLAMA: dict[str, Any] = {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8}
SHAPES: dict[str, dict[str, Any]] = {
    "1B": _LLAMA | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True,
    },
    "8B": _LLAMA | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "tie_word_embeddings": False,
    },
}  # fmt: skip
_TINY: dict[str, Any] = {
    "vocab_size": 4096, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2,
}  # fmt: skip
TUNINGS = {"1B": ("full", "LoRA"), "8B": ("LoRA",)}  # all weights of 8B take 18 bytes each, more than one GPU has
ROW_TOKENS = {"1B": None, "8B": 8192}  # a row of 16,384 tokens of 8B would have 90 GB of activations
OURS, PROFILED, TRL = "minisft", "minisft, profiled", "TRL"


@dataclass(frozen=True)
class Scale:
    """How large the measurement is.

    Attributes:
        shapes: Shape of each model.
        lengths: Tokens of a conversation, short and long.
        step_tokens: Tokens of a step.
        steps: Steps of a run.
        warm_up: First steps that do not count.
        precision: training.precision.
        making: Seconds that it takes at most to make a model.
    """

    shapes: dict[str, dict[str, Any]]
    lengths: dict[str, int]
    step_tokens: int
    steps: int
    warm_up: int
    precision: str
    making: float


FULL = Scale(SHAPES, {"short": 256, "long": 8192}, 16384, 12, 4, "bf16", making=90)
TRIAL = Scale({"1B": _TINY, "8B": _TINY}, {"short": 96, "long": 256}, 512, 3, 1, "fp32", making=5)


@dataclass(frozen=True)
class Case:
    """What is trained: the shape of the model, all weights or LoRA, short or long conversations."""

    shape: str
    tuning: str
    length: str

    def __str__(self) -> str:
        return f"{self.shape}, {self.tuning}, {self.length}"


def all_cases(shapes: list[str]) -> Iterator[Case]:
    for shape in shapes:
        for tuning, length in itertools.product(TUNINGS[shape], ("short", "long")):
            yield Case(shape, tuning, length)


def main(words: list[str] | None = None) -> None:
    arguments = parse_arguments(words)
    if not (arguments.trial or arguments.report or torch.cuda.is_available()):
        print("there is no GPU here: nothing is measured; --trial runs tiny models on the CPU")
        return
    scale = TRIAL if arguments.trial else FULL
    if not arguments.report:
        measure(arguments, scale)
    report(read_results(arguments), scale)


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default=str(DEMO), help="ShareGPT conversations whose texts are taken")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=7.5, help="of this call")
    parser.add_argument("--folder", type=Path, default=Path("outputs/gpu-benchmark"), help="models, data and results")
    parser.add_argument("--peers", type=Path, metavar="FOLDER", help="measure TRL too, installed there")
    parser.add_argument("--trial", action="store_true", help="tiny models, on the CPU")
    parser.add_argument("--report", action="store_true", help="print what was measured, and measure nothing")
    return parser.parse_args(words)


# --- what is trained


def make_work(case: Case, scale: Scale, folder: Path, source: Path) -> Work:
    """Make model, data and a prepared run folder of a case, or find them made."""
    model, data, run = folder / case.shape, folder / case.length, folder / f"{case.shape}-{case.length}"
    if not (model / "config.json").exists():
        make_model(model, scale.shapes[case.shape])
    tokenizer = load_tokenizer(model)
    length = scale.lengths[case.length]
    sharegpt, messages, template = (
        data / name for name in ("rows.sharegpt.jsonl", "rows.messages.jsonl", "chatml.jinja")
    )
    if not template.exists():
        data.mkdir(exist_ok=True)
        write_conversations(source, sharegpt, messages, tokenizer, batch_size(case, scale) * scale.steps, length)
        template.write_text(CHATML)
    rows = DataRecipe(source=str(sharegpt), template="chatml", test_fraction=0, max_length=2 * length, overflow="error")
    prepare(Recipe(model=str(model), output=str(run), data=rows), tokenizer)
    sizes = measure_lengths(load_train(run))
    return Work(model, run, sharegpt, messages, template, int(sizes.tokens.sum()), int(sizes.supervised.sum()))


def batch_size(case: Case, scale: Scale) -> int:
    """Return the conversations of a step."""
    return max(1, scale.step_tokens // scale.lengths[case.length])


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
    # 8 billion numbers take minutes to draw, so a few million of them are repeated.
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config_of(shape))
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    model.tie_weights()
    drawn = 0.02 * torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).bfloat16()
    for weight in model.parameters():
        flat = weight.data.view(-1)
        if weight.dim() == 1:  # of a norm
            flat.fill_(1)
            continue
        for part in flat.split(len(drawn)):
            part.copy_(drawn[: len(part)])
    model.save_pretrained(folder)
    return folder


def config_of(shape: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(**shape, max_position_embeddings=16384, bos_token_id=0, eos_token_id=2, pad_token_id=0)


def write_conversations(source: Path, sharegpt: Path, messages: Path, tokenizer: Any, count: int, length: int) -> None:
    """Join dialogues, over and over, to conversations of nearly `length` tokens; write ShareGPT and messages."""
    dialogues = [json.loads(line)["conversations"] for line in source.read_text(encoding="utf-8").splitlines()]
    sizes = [sum(len(tokenizer.encode(turn["value"])) + 6 for turn in dialogue) for dialogue in dialogues]
    usable = [number for number, size in enumerate(sizes) if size <= length]
    roles = {"human": "user", "gpt": "assistant"}
    upcoming = itertools.cycle(usable)
    with sharegpt.open("w") as first, messages.open("w") as second:
        for number in range(count):
            turns: list[dict[str, str]] = []
            size = 0
            while size + sizes[at := next(upcoming)] <= length:
                turns += [turn for turn in dialogues[at] if turn["from"] != "system"]
                size += sizes[at]
            turns[0] = turns[0] | {"value": f"{number}: {turns[0]['value']}"}
            first.write(json.dumps({"conversations": turns}) + "\n")
            second.write(json.dumps({"messages": [{"role": roles[t["from"]], "content": t["value"]} for t in turns]}))
            second.write("\n")


# --- who trains it


def contenders(case: Case, scale: Scale, work: Work, peers: Path | None) -> Iterator[Contender]:
    """Yield MiniSFT, MiniSFT under the profiler, and TRL where its folder is named."""
    command = (sys.executable, str(CONTENDERS / "with_minisft.py"))
    settings: dict[str, Any] = {"precision": scale.precision} | ({"lora": LORA} if case.tuning == "LoRA" else {})
    options: dict[str, Any] = {
        "model": str(work.model), "run": str(work.run), "source": str(work.sharegpt), "settings": settings,
        "batch_size": batch_size(case, scale), "row_tokens": ROW_TOKENS[case.shape], "inside": False,
    }  # fmt: skip
    yield Contender(OURS, command, options)
    yield Contender(PROFILED, command, options | {"profile_after": scale.warm_up})
    if peers is not None:
        command = (str(trl_python(peers)), str(CONTENDERS / "with_trl.py"))
        options = {"model": str(work.model), "messages": str(work.messages), "template": str(work.template)}
        if case.tuning == "LoRA":
            options["lora"] = {"r": LORA["rank"], "lora_alpha": LORA["alpha"], "target_modules": "all-linear"}
        yield Contender(TRL, command, options | {"settings": trl_settings(case, scale)})


def trl_settings(case: Case, scale: Scale) -> dict[str, Any]:
    """Return TRL's fastest settings: Liger, and packed rows with FlashAttention, as far as they are installed.

    Without FlashAttention, packed conversations would need a dense mask, so batches of whole conversations are padded.
    """
    length = scale.lengths[case.length]
    settings: dict[str, Any] = {"gradient_checkpointing": False, "max_length": 2 * length}
    if scale.precision == "bf16":
        # Frozen weights in bf16, and otherwise fp32 weights under autocast, as MiniSFT's masters are fp32.
        dtype = "bfloat16" if case.tuning == "LoRA" else "float32"
        settings |= {"bf16": True, "use_cpu": False, "model_init_kwargs": {"dtype": dtype}}
        settings |= {"use_liger_kernel": importlib.util.find_spec("liger_kernel") is not None}
    if scale.precision == "bf16" and has_flash_attention():
        packed = max(8192, length)
        settings["model_init_kwargs"]["attn_implementation"] = "flash_attention_2"
        return settings | {
            "packing": True, "max_length": packed, "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": scale.step_tokens // packed,
        }  # fmt: skip
    batch = batch_size(case, scale)
    each = max(1, min(batch, 4096 // length))
    return settings | {"per_device_train_batch_size": each, "gradient_accumulation_steps": batch // each}


def has_flash_attention() -> bool:
    from transformers.utils import is_flash_attn_2_available

    return bool(is_flash_attn_2_available())


# --- the rounds


def results_file(arguments: argparse.Namespace) -> Path:
    return Path(arguments.folder) / ("trial.jsonl" if arguments.trial else "results.jsonl")


def read_results(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what was measured: case, contender, round, and result or `failed`."""
    path = results_file(arguments)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def measure(arguments: argparse.Namespace, scale: Scale) -> None:
    """Measure what is missing, one round of all cases after the other, until the time of this call is over."""
    ends = time.monotonic() + 60 * arguments.minutes
    folder = Path(arguments.folder).absolute() / ("trial" if arguments.trial else "full")
    folder.mkdir(parents=True, exist_ok=True)
    done = {(one["case"], one["contender"], one["round"]) for one in read_results(arguments)}
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "" if arguments.trial else "0", "HF_HUB_OFFLINE": "1"}
    for number, case in itertools.product(range(arguments.rounds), all_cases(arguments.shapes)):
        names = [
            name for name in (OURS, PROFILED, *([TRL] if arguments.peers else [])) if number == 0 or name != PROFILED
        ]
        missing = [name for name in names if (str(case), name, number) not in done]
        if not missing:
            continue
        if ends - time.monotonic() < scale.making:
            print("there is more to measure: call it again", flush=True)
            return
        work = make_work(case, scale, folder, Path(arguments.source))
        for one in contenders(case, scale, work, arguments.peers):
            if one.name not in missing:
                continue
            left = ends - time.monotonic()
            if left <= 0:
                print("there is more to measure: call it again", flush=True)
                return
            line: dict[str, Any] = {"case": str(case), "contender": one.name, "round": number, "tokens": work.tokens,
                    "supervised": work.supervised, "squares": squares_of(work)}  # fmt: skip
            try:
                line["result"] = train_once(one, number, environment, folder, patience=left)
            except subprocess.TimeoutExpired:
                print(f"{case}: {one.name}: stopped at the end of this call", flush=True)
                return
            except (subprocess.SubprocessError, OSError) as error:
                line["failed"] = reason_of(error)
            print(
                f"{case}: {one.name}: {line.get('failed') or format(line['result']['seconds'], '.1f') + ' s'}",
                flush=True,
            )
            with results_file(arguments).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
    print("all is measured", flush=True)


def squares_of(work: Work) -> int:
    """Return the sum of the squared lengths of all conversations."""
    return int((measure_lengths(load_train(work.run)).tokens.astype("int64") ** 2).sum())


# --- what came out


def summarise(lines: list[dict[str, Any]], warm_up: int) -> dict[str, float]:
    """Return the medians over rounds of one contender; rates are those of the steps after the warm-up."""
    rates = []
    for line in lines:
        stamps = line["result"]["stamps"]
        skipped = min(warm_up, len(stamps) - 1)
        share = 1 - skipped / len(stamps)  # steps are of nearly equal size
        rates.append(share / (stamps[-1] - (stamps[skipped - 1] if skipped else 0.0)))
    rate = statistics.median(rates)  # of the data, a second
    results = [line["result"] for line in lines]
    return {
        **{f"{name}_per_second": rate * lines[0][name] for name in ("tokens", "supervised", "squares")},
        "peak_gb": statistics.median(one.get("gpu_peak_mb", one["peak_mb"]) for one in results) / 1e3,
        "steps": len(results[0]["stamps"]),
    }


def report(lines: list[dict[str, Any]], scale: Scale) -> None:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: the figures mean nothing"
    dense = machine_named(None, 1, "bf16").flops["bf16"] if torch.cuda.is_available() else None
    print(f"\n{gpu}\n\n| | | tokens/s | TFLOP/s | share of the dense rate | peak GB | steps |\n{'|---' * 7}|")
    for case in all_cases(list(scale.shapes)):
        for name in (OURS, TRL):
            measured = [one for one in lines if (one["case"], one["contender"]) == (str(case), name)]
            good = [one for one in measured if "result" in one]
            if not good:
                for one in measured:
                    print(f"| {case} | {name} | failed: {one['failed']} | | | | |")
                continue
            found = summarise(good, scale.warm_up)
            operations = operations_a_second(case_cost(case, scale), found)
            share = f"{operations / dense:.2f}" if dense else "-"
            print(
                f"| {case} | {name} | {found['tokens_per_second']:,.0f} | {operations / 1e12:.3g} | {share} "
                f"| {found['peak_gb']:.1f} | {found['steps']:.0f} |"
            )
    print("\n| MiniSFT | share of the time by kind of kernel |\n|---|---|")
    for one in lines:
        if one["contender"] == PROFILED:
            kinds = one["result"]["kinds"] if "result" in one else {}
            said = ", ".join(f"{kind} {share:.1%}" for kind, share in sorted(kinds.items(), key=lambda kind: -kind[1]))
            print(f"| {one['case']} | {said or one['failed']} |")


def case_cost(case: Case, scale: Scale) -> ModelCost:
    return count_cost(
        config_of(scale.shapes[case.shape]), "half", LoraRecipe(**LORA) if case.tuning == "LoRA" else None
    )


def operations_a_second(cost: ModelCost, rates: dict[str, float]) -> float:
    """Return the model's operations: of attention 6 products of its 7, as one of them only computes scores again."""
    return (
        cost.step_flops(checkpointing=False) * rates["tokens_per_second"]
        + cost.head_flops(rates["supervised_per_second"])
        + cost.attention_flops(rates["squares_per_second"], checkpointing=False) * 6 / 7
    )


if __name__ == "__main__":
    main()
