"""Which causal language models of transformers train right: the table of docs/models.md.

    python benchmarks/models.py                             # every class, without ZeRO-3
    python benchmarks/models.py --only llama --settings zero3  # some model types, under ZeRO-3
    python benchmarks/models.py --settings                  # the verdict only
    python benchmarks/models.py --write docs/models.md      # replace the table of the page
    python benchmarks/models.py --settings bf16 --results bf16.jsonl --write docs/models.md  # one column of it

Every class of transformers' mapping gets a tiny configuration and random weights that are large enough for a leak
between conversations to show. `make_trainer` and `take_steps`, which `minisft train` calls, take one step with it. Its
loss and its gradients are compared with those of a plain loop: transformers' own attention, one padded conversation at
a time. Each class is tested in a process of its own, limited in time and memory. With `--results`, the next call judges
only the classes that the file does not have. Exit status 1: a class is WRONG, or a step ended in an error that is no
message for the user.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import resource
import shutil
import socket
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from minisft import api
from minisft.errors import UserError
from minisft.recipe import DataRecipe, LoraRecipe, Recipe, TrainingRecipe
from minisft.run_folder import RunFolder
from minisft.training.run_training import make_trainer, take_steps
from minisft.training.zero import set_deepspeed_environment

SECONDS, MEMORY = 180, 8 << 30  # limits of one class
LARGEST = 20_000_000  # parameters of a model that counts as tiny
TOLERANCE, GRADIENT_TOLERANCE, HALF_TOLERANCE = 2e-4, 5e-3, 2e-2  # relative differences
CONVERSATIONS = 5
BEGIN, END = "<!-- table of benchmarks/models.py -->", "<!-- end of the table -->"
# Sizes under every name that configurations give them; a configuration takes those that it knows. Windows and chunks
# are shorter than the conversations, so that a window that is ignored shows.
TINY: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 258),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim_model", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("attention_hidden_size", "lru_width", "block_dim", "conv_dim"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim"), 64),
    **dict.fromkeys(("intermediate_size_mlp", "ffn_hidden_size", "mamba_d_ssm", "d_inner", "d_ff"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_mem_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "rotary_dim", "time_step_rank"), 4),
    **dict.fromkeys(("num_key_value_heads", "multi_query_group_num", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "kv_channels", "d_kv", "global_head_dim", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "qk_head_dim", "moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("expert_ffn_hidden_size", "sliding_window", "attention_window_size"), 16),
    **dict.fromkeys(("attention_chunk_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "index_n_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "mamba_n_groups"), 1),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_n_heads", "mamba_d_head"), 8),
    **dict.fromkeys(("mamba_d_state", "mamba_num_heads", "mamba_head_dim", "ssm_state_size", "state_size"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"), 512),
    **{"linear_num_value_heads": 4, "n_groups": 1, "index_topk": 256, "is_decoder": True},
    **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
}
# What the sizes above leave wrong, by model type.
ADJUSTMENTS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},  # by default all layers are of one kind
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "big_bird": {"attention_type": "original_full"},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0, 0.0],
        "intermediate_size": [64, 64],
    },
    "gemma4_text": {"num_kv_shared_layers": 0},
    "gemma4_unified_text": {"num_kv_shared_layers": 0},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "local"], "attention_head_size": 8},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_dt_rank": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "adapter_rank": 4,
        "use_mamba_kernels": False,
    },
    "zaya": {"num_experts_per_tok": 1},
    "xmod": {"default_language": "en_XX"},
}
EXTRAS: dict[str, dict[str, Any]] = {
    "lora": {"lora": LoraRecipe(rank=2, alpha=4.0)},
    "checkpointing": {"gradient_checkpointing": True},
    "packing": {"packing": True},
    "bf16": {"precision": "bf16"},
    "zero3": {"strategy": "zero3"},
}


@dataclass(frozen=True)
class Row:
    """A row of the table: verdict and why, and yes, no or n/a with the reason for each further setting."""

    kind: str
    name: str
    verdict: str
    detail: str = ""
    lora: str = "not run"
    checkpointing: str = "not run"
    packing: str = "not run"
    bf16: str = "not run"
    zero3: str = "not run"

    @property
    def failed(self) -> bool:
        """Whether training was wrong, or ended in an error that is no message for the user."""
        return any(str(value).startswith(("WRONG", "TRACEBACK")) for value in asdict(self).values())


@dataclass(frozen=True)
class Step:
    """A step's loss, gradient norm and gradients by name; the verdict of the probe and the attention it chose."""

    loss: float
    norm: float
    gradients: Mapping[str, torch.Tensor]
    verdict: str = ""
    attention: str = ""


class KeepGradients(TrainerCallback):
    """Keep the gradients and the adapters of a step before the optimizer uses them."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}
        self.weights: dict[str, torch.Tensor] = {}
        self.transposed: set[str] = set()  # layers that store (in, out)
        self.shared: set[str] = set()  # layers whose weight other layers use too, each with adapters of its own

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Copy them."""
        layers = {name: layer for name, layer in kwargs["model"].named_modules() if name.endswith("base_layer")}
        uses = Counter(id(layer.weight) for layer in layers.values())
        self.transposed = {name for name, layer in layers.items() if isinstance(layer, Conv1D)}
        self.shared = {name for name, layer in layers.items() if uses[id(layer.weight)] > 1}
        for name, weight in kwargs["model"].named_parameters():
            if weight.grad is not None:
                self.gradients[name] = weight.grad.detach().float().clone()
            if "lora_" in name:
                self.weights[name] = weight.detach().float().clone()


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(1)  # a process that is forked must not inherit a pool of threads
    transformers.logging.set_verbosity_error()
    names = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    kinds = options.only or sorted(names)
    unknown = sorted(set(kinds) - set(names))
    if unknown:
        sys.exit(f"not in transformers' causal mapping: {', '.join(unknown)}")
    judged = {row.kind: row for row in read_rows(options.results)}
    writing = threading.Lock()
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder)
        in_child(prepare_data, SECONDS, prepared)

        def judge(kind: str) -> Row:
            if kind in judged:
                return judged[kind]
            found = in_child(judge_class, SECONDS, kind, prepared, options.settings)
            name = str(names[kind])
            row = Row(**found) if isinstance(found, dict) else Row(kind, name, "TRACEBACK", str(found))
            print(" | ".join(asdict(row).values()), file=sys.stderr, flush=True)
            if options.results:
                with writing, options.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(row)) + "\n")
            return row

        with ThreadPoolExecutor(options.jobs) as pool:
            rows = list(pool.map(judge, kinds))
    command = " ".join(["python benchmarks/models.py", *sys.argv[1:]])
    if options.write:
        page = options.write.read_text(encoding="utf-8")
        kept = [name for name in EXTRAS if name not in options.settings]
        table = render_table(keep_columns(rows, page, kept), command, kept)
        options.write.write_text(replace_table(page, table), encoding="utf-8")
    else:
        print(render_table(rows, command))
    sys.exit(any(row.failed for row in rows))


def read_rows(results: Path | None) -> list[Row]:
    """Return the rows that earlier calls judged."""
    if results is None or not results.exists():
        return []
    return [Row(**json.loads(line)) for line in results.read_text(encoding="utf-8").splitlines()]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="model types, such as llama; all if left out")
    without = [name for name in EXTRAS if name != "zero3"]
    help = "settings with which the step is repeated; ZeRO-3 runs on one process"
    parser.add_argument("--settings", nargs="*", choices=EXTRAS, metavar="NAME", default=without, help=help)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="replace the columns of this page that were run")
    parser.add_argument("--results", type=Path, metavar="FILE", help="keep what was judged, and judge the rest only")
    parser.add_argument("--jobs", type=int, default=2, help="classes that are tested at the same time")
    return parser.parse_args()


def in_child(function: Any, seconds: float, *arguments: Any) -> Any:
    """Return what a function returns in a forked process, or a sentence about the end of that process."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        found = receiver.recv() if receiver.poll(seconds) else f"no result after {seconds:g} s"
    except EOFError:
        process.join()
        found = f"the process ended with exit code {process.exitcode}"
    process.kill()
    process.join()
    return found


def _answer(sender: Connection, function: Any, arguments: tuple[Any, ...]) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):  # noqa: PTH123
        try:
            sender.send(function(*arguments))
        except Exception as error:
            sender.send(describe(error))


def describe(error: Exception) -> str:
    """Return an error in one short line without the bars of a table."""
    text = error.problem if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split()).replace("|", "/")[:240]


# --- tiny models


def shrink(kind: str) -> Any:
    """Return a tiny configuration of a model type, with one layer of every kind that its default has.

    Raises:
        Exception: That of transformers, for a class whose sizes do not fit each other.
    """
    return _shrunk(CONFIG_MAPPING[kind], ADJUSTMENTS.get(kind, {}))


def _shrunk(config_class: Any, adjustments: dict[str, Any]) -> Any:
    default = config_class()
    known = default.to_dict()
    other = dict(getattr(config_class, "attribute_map", {}))  # a configuration's own names of the usual ones

    def settable(name: str) -> bool:
        own = getattr(config_class, other.get(name, name), None)
        return not isinstance(own, property) or own.fset is not None

    def takes(name: str) -> bool:
        return settable(name) and other.get(name, name) in known and not isinstance(known[other.get(name, name)], dict)

    found = {name: size for name, size in TINY.items() if takes(name)}
    for name, value in known.items():
        if isinstance(value, float) and any(word in name for word in ("drop", "jitter")):
            found[name] = 0.0
    if hasattr(default, "kv_lora_rank") and "num_key_value_heads" in found:
        found["num_key_value_heads"] = found["num_attention_heads"]  # latent attention has no groups
    types = known.get("layer_types")
    if types and settable("layer_types"):
        kept = list(dict.fromkeys(types))
        kept = kept if len(kept) > 1 else kept * 2
        found |= {"layer_types": kept, "num_hidden_layers": len(kept)}
    for name, part in vars(default).items():
        if isinstance(part, transformers.PreTrainedConfig):
            found[name] = _shrunk(type(part), ADJUSTMENTS.get(part.model_type, {})).to_dict()
    return config_class(**found | adjustments)


def write_model(kind: str, folder: Path) -> str:
    """Write a tiny random model and its tokenizer; return the name of its class."""
    config = shrink(kind)
    with torch.device("meta"):
        size = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"the configuration could not be made small: {size:,} parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.2)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return type(model).__name__


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer without merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


# --- a step of the project, and the same step without it


def recipe_of(model: Path, output: Path, **training: Any) -> Recipe:
    """Return a recipe of one step that learns all conversations without clipping."""
    settings: dict[str, Any] = {"precision": "fp32", "max_steps": 1, "max_grad_norm": None, "warmup_ratio": 0.0}
    data = DataRecipe(source=str(output.parent / "rows.jsonl"), template="mistral", max_length=256, test_fraction=0.0)
    steps = TrainingRecipe(**{**settings, "batch_size": CONVERSATIONS, **training})
    return Recipe(model=str(model), output=str(output), data=data, training=steps)


def prepare_data(folder: Path) -> None:
    """Prepare the conversations once, with the tokenizer that all models have."""
    choose = random.Random(0)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for number in range(CONVERSATIONS):
            turns = [{"from": who, "value": f"{choose.random():.{3 + 4 * number}f}"} for who in ("human", "gpt")]
            file.write(json.dumps({"conversations": turns}) + "\n")
    write_model("llama", folder / "model")
    api.prepare(recipe_of(folder / "model", folder / "prepared"))


def take_step(model: Path, prepared: Path, folder: Path, **training: Any) -> tuple[Step, KeepGradients]:
    """Take a step as `minisft train` does."""
    run = RunFolder(folder)
    shutil.copytree(prepared / "prepared", run.root)
    recipe = replace(recipe_of(model, run.root, **training), data=recipe_of(model, prepared / "prepared").data)
    trainer = make_trainer(recipe, run)
    trainer.args.save_strategy = "no"  # type: ignore[assignment]
    kept = KeepGradients()
    trainer.add_callback(kept)
    take_steps(trainer, run)
    logged = json.loads(run.metrics.read_text().splitlines()[0])
    probe = json.loads(run.environment.read_text()).get("probe") or {}
    verdict, attention = probe.get("verdict", "not probed"), probe.get("attention", "")
    return Step(logged["loss"], logged["grad_norm"], kept.gradients, verdict, attention), kept


def plain_step(model_folder: Path, dataset: Path) -> Step:
    """Return the same step of transformers alone: one padded conversation at a time, its own attention, every logit."""
    from datasets import load_from_disk

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).train()
    rows = [(row["input_ids"], row["labels"]) for row in load_from_disk(str(dataset))]
    supervised = sum(label != -100 for _, labels in rows for label in labels[1:])
    total = 0.0
    for ids, labels in rows:
        padded = torch.tensor([ids + [1] * 5])
        mask = torch.tensor([[1] * len(ids) + [0] * 5])
        logits = model(input_ids=padded, attention_mask=mask, use_cache=False).logits[0, : len(ids) - 1]
        loss = cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum") / supervised
        loss.backward()
        total += float(loss)
    gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    return Step(total, float(torch.stack([one.norm() for one in gradients.values()]).norm()), gradients)


def difference(found: Step, expected: Step, tolerance: float = TOLERANCE) -> str:
    """Return how a step differs from the expected one; empty if it does not."""
    for word, one, other in (("loss", found.loss, expected.loss), ("gradient norm", found.norm, expected.norm)):
        if not abs(one - other) <= tolerance * abs(other):
            return f"{word} {one:.6g}, and {other:.6g} by transformers"
    floor = 1e-5 * expected.norm  # of gradients that are zero but for rounding
    for name, gradient in expected.gradients.items():
        got = found.gradients.get(name, torch.zeros_like(gradient)) if found.gradients else gradient
        error = float((got - gradient).norm() / (gradient.norm() + floor))
        if not error <= max(GRADIENT_TOLERANCE, tolerance):
            return f"gradient of {name} differs by {error:.2g}"
    return ""


def lora_difference(found: Step, kept: KeepGradients, expected: Step, scale: float) -> str:
    """Compare adapters with the weights' own gradients: B begins at 0, so that dL/dB is scale * dL/dW @ A^T."""
    if not abs(found.loss - expected.loss) <= TOLERANCE * expected.loss:
        return f"loss {found.loss:.6g}, and {expected.loss:.6g} by transformers"
    for name, gradient in found.gradients.items():
        if "lora_B" not in name:
            continue
        weight = name.removeprefix("base_model.model.").replace(".lora_B.default", "")
        layer = name.replace("lora_B.default.weight", "base_layer")
        of_weight = None if layer in kept.shared else expected.gradients.get(weight)
        first = kept.weights[name.replace("lora_B", "lora_A")]
        if of_weight is None or of_weight.ndim != 2:
            continue
        if layer in kept.transposed:
            of_weight = of_weight.T
        wanted = scale * of_weight @ first.T
        error = float((gradient - wanted).norm() / (wanted.norm() + 1e-5 * expected.norm))
        if not error <= GRADIENT_TOLERANCE:
            return f"gradient of {name} differs by {error:.2g}"
    return ""


def judge_class(kind: str, prepared: Path, extras: Sequence[str]) -> dict[str, str]:
    """Return the row of a model type.

    1. a tiny model  2. the step, and the same without MiniSFT  3. the step with each further setting
    """
    name = str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = folder / "model"
        try:
            name = write_model(kind, model)
            expected = plain_step(model, prepared / "prepared" / "dataset" / "train")
        except Exception as error:
            return asdict(Row(kind, name, "cannot be built", describe(error)))
        try:
            found, _ = take_step(model, prepared, folder / "run")
        except UserError as error:
            return asdict(Row(kind, name, "refused", describe(error)))
        except Exception as error:
            return asdict(Row(kind, name, "TRACEBACK", describe(error)))
        wrong = difference(found, expected)
        if wrong:
            return asdict(Row(kind, name, "WRONG", wrong))
        verdict = {"alone": "right alone"}.get(found.verdict, found.verdict)
        further = {extra: _with_setting(extra, model, prepared, folder / extra, expected) for extra in extras}
        return asdict(Row(kind, name, verdict, found.attention, **further))


def _with_setting(extra: str, model: Path, prepared: Path, folder: Path, expected: Step) -> str:
    try:
        if extra == "zero3":
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            set_deepspeed_environment(True)
        found, kept = take_step(model, prepared, folder, **EXTRAS[extra])
    except UserError as error:
        return f"no: {describe(error)}"
    except Exception as error:
        return f"TRACEBACK: {describe(error)}"
    if extra == "lora":
        wrong = lora_difference(found, kept, expected, scale=2.0)
    elif extra == "bf16":  # gradients of random weights are not comparable in half precision
        apart = abs(found.loss - expected.loss) / expected.loss
        wrong = "" if apart <= HALF_TOLERANCE else f"loss {found.loss:.6g}, and {expected.loss:.6g} in fp32"
    else:
        wrong = difference(replace(found, gradients={}) if extra == "zero3" else found, expected)
    if wrong:
        return f"WRONG: {wrong}"
    return "one by one" if extra == "packing" and found.verdict == "alone" else "yes"


# --- the table


def keep_columns(rows: Iterable[Row], page: str, columns: Sequence[str]) -> list[Row]:
    """Return rows with the columns that a page has of the same class, if its verdict is the same."""
    lines = [line.strip().strip("|").strip() for line in page.splitlines() if line.startswith("| ")]
    cells = [line.split(" | ") for line in lines]
    before = {found[0]: Row(*found) for found in cells if len(found) == len(fields(Row))}
    return [
        replace(row, **{name: getattr(before[row.kind], name) for name in columns})
        if row.kind in before and before[row.kind].verdict == row.verdict
        else row
        for row in rows
    ]


def render_table(rows: Iterable[Row], command: str, kept: Sequence[str] = ()) -> str:
    """Return the table in Markdown, sorted by model type, with the command and the versions that made it.

    Args:
        rows: Its rows.
        command: The command that judged them.
        kept: Columns that are those of an earlier command.
    """
    rows = sorted(rows, key=lambda row: row.kind)
    counts = Counter(row.verdict for row in rows)
    built = len(rows) - counts["cannot be built"]
    good = counts["right"] + counts["right alone"]
    lines = [
        f"Made by `{command}` with transformers {transformers.__version__}, torch {torch.__version__} and Python "
        f"{platform.python_version()}: {len(rows)} classes, "
        + ", ".join(f"{number} {verdict}" for verdict, number in counts.most_common())
        + f". Of the {built} that can be built, {good} train ({good / max(built, 1):.0%})."
        + (f" The settings {', '.join(kept)} were run by an earlier command." if kept else ""),
        "",
        "| model type | class | verdict | attention, or why | LoRA | checkpointing | packing | bf16 | ZeRO-3 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += ["| " + " | ".join(asdict(row).values()) + " |" for row in rows]
    return "\n".join(lines)


def replace_table(page: str, table: str) -> str:
    """Return a page with the text between the two markers replaced.

    Raises:
        ValueError: The page does not hold each marker once, in their order.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise ValueError(f"the page must hold {BEGIN} and, after it, {END}, each once")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


if __name__ == "__main__":
    main()
