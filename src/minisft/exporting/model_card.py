"""The model card of an export: README.md with the metadata of the Hugging Face hub.

It names sources and models as a hub does: of a local path, only the last part is written.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisft.exporting.model_folder import public_name
from minisft.files import write_atomically
from minisft.metric_names import metric_title
from minisft.models import weights_fingerprint
from minisft.recipe import Recipe
from minisft.report.markdown import as_text
from minisft.report.plots import draw_curves
from minisft.report.run_data import RunFiles, metrics_of, read_run
from minisft.report.tables import markdown_table, score_table
from minisft.report.verdict import verdict
from minisft.run_folder import RunFolder
from minisft.text import printable
from minisft.version import __version__

if TYPE_CHECKING:
    from minisft.exporting.proof import ExportedModel

_CURVE = "loss.png"
_KEYS = (
    "epochs", "max_steps", "batch_size", "gradient_accumulation", "processes", "strategy", "learning_rate",
    "weight_decay", "optimizer", "scheduler", "warmup_ratio", "max_grad_norm", "precision",
)  # fmt: skip


def write_card(
    folder: Path,
    recipe: Recipe,
    exported: "ExportedModel",
    engines: Mapping[str, Mapping[str, Any]],
    license_id: str | None = None,
) -> None:
    """Write README.md, and the picture of the loss curve, into an exported folder.

    Args:
        folder: The exported folder.
        recipe: The run's recipe.
        exported: What was exported.
        engines: The entries of verified.json.
        license_id: Identifier of the model's licence on the hub; None: that of the base model's card, if it has one.
    """
    run = read_run(RunFolder(Path(recipe.output)).root)
    name, source = folder_name(recipe.output), exported.source
    if source.parent.name != "checkpoints":  # the final model is the last checkpoint
        source = (RunFolder(run.root).list_checkpoints() or [source])[-1]
    parts = [f"# {as_text(name)}", _summary(run, recipe, exported.source)]
    parts += _training(run, recipe, folder)
    parts += _scores(run)
    parts += ["## Verified", _verified_table(engines)]
    parts += ["## Use", *_usage(exported)]
    parts += ["## Hashes", _hashes(run, exported.source)]
    metadata = card_metadata(run, recipe, name, source.name, exported, license_id)
    write_atomically(folder / "README.md", printable(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))


def folder_name(path: str) -> str:
    return Path(path).resolve().name


def card_metadata(
    run: RunFiles, recipe: Recipe, name: str, checkpoint: str, exported: "ExportedModel", license_id: str | None
) -> Any:
    """Return the card's metadata as huggingface_hub's `ModelCardData`, with the scores of the exported checkpoint.

    The specification is https://github.com/huggingface/hub-docs/blob/main/modelcard.md.
    """
    from huggingface_hub import EvalResult, ModelCardData

    scores = dict(run.systems).get(checkpoint, {})
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out conversations",
            dataset_name="held-out conversations",
            metric_type=metric,
            metric_name=metric_title(metric),
            metric_value=round(scores[metric]["score"], 4),
        )
        for metric in (metrics_of(run) if run.results else [])
        if scores.get(metric)
    ]
    is_adapter = bool(recipe.training.lora) and not exported.merged
    base = hub_name(recipe.model)
    return ModelCardData(
        model_name=name,
        base_model=base,
        base_model_relation=("adapter" if is_adapter else "finetune") if base else None,
        license=license_id or license_of_base(recipe.model),
        library_name="gguf" if exported.gguf else "peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["minisft", "sft"],
        eval_results=results or None,
    )


def hub_name(model: str) -> str | None:
    """Return the hub id of a model, if it has one."""
    from minisft.models import SMOLLM2_HUB_ID
    from minisft.recipe import BUILT_IN_MODELS

    if model in BUILT_IN_MODELS:
        return SMOLLM2_HUB_ID
    return model if model.count("/") == 1 and not Path(model).expanduser().exists() else None


def license_of_base(model: str) -> str | None:
    """Return the licence in the model card of a local base model; None where there is none."""
    from huggingface_hub import ModelCard

    from minisft.recipe import BUILT_IN_MODELS

    if model in BUILT_IN_MODELS:
        return "apache-2.0"
    card = Path(model).expanduser() / "README.md"
    if not card.is_file():
        return None
    try:
        found = ModelCard.load(card, ignore_metadata_errors=True).data.get("license")
    except Exception:  # someone else's file, in any state
        return None
    return found if isinstance(found, str) else None


def _summary(run: RunFiles, recipe: Recipe, source: Path) -> str:
    base = as_text(public_name(recipe.model))
    how = "LoRA adapters" if recipe.training.lora else "All weights"
    steps = f" (`{source.name}`)" if source.name.startswith("checkpoint-") else ""
    return (
        f"{base}, fine-tuned on conversations with MiniSFT {__version__}{steps}. {how} were trained; only answers were "
        f"learned. {as_text(verdict(run)) if run.results else ''}".rstrip()
    )


def _training(run: RunFiles, recipe: Recipe, folder: Path) -> list[str]:
    """Return what the model was trained on, the settings, and the curve."""
    parts = ["## Training"]
    if run.ledger is not None:
        rows, tokens = run.ledger["rows"], run.ledger["tokens"]
        names = sorted({public_name(name) for listed in run.ledger["source_names"].values() for name in listed})
        parts.append(
            f"Data: {as_text(', '.join(names))}. {rows['train']:,} conversations for training, {rows['test']:,} held "
            f"out, {rows['skipped']:,} skipped of {rows['read']:,}; {tokens['supervised']:,} of {tokens['kept']:,} "
            f"tokens supervised. Template: {as_text(run.ledger['template'])}."
        )
    values = {key: getattr(recipe.training, key) for key in _KEYS}
    settings = [[f"`{key}`", f"`{value}`"] for key, value in values.items() if value is not None]
    if recipe.training.lora:
        settings.append(["`lora`", f"`rank {recipe.training.lora.rank}, alpha {recipe.training.lora.alpha}`"])
    parts.append(markdown_table(["setting", "value"], settings).rstrip())
    drawn = draw_curves(run.root, folder)  # into the export: the run may be read-only
    curve = next((path for path in drawn if path.name == _CURVE), None)
    if curve is not None:
        curve.replace(folder / _CURVE)
        shutil.rmtree(curve.parent)
        parts.append(f"![training and held-out loss by step]({_CURVE})")
    return parts


def _scores(run: RunFiles) -> list[str]:
    if run.results is None:
        return ["## Scores", "The run was not evaluated."]
    heads, rows = score_table(run)
    cells = [[f"**{as_text(row[0])}**" if best else as_text(row[0]), *row[1:]] for row, best in rows]
    return [
        "## Scores",
        "On the held-out conversations, with 95 % bootstrap intervals; `constant` repeats the one training answer that "
        "scores best.",
        markdown_table(heads, cells).rstrip(),
    ]


def _verified_table(engines: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, entry in engines.items():
        if entry["status"] == "not run":
            rows.append([name, f"not run: {as_text(entry['reason'])}", "", "", ""])
            continue
        count = entry["prompts"]
        rows.append(
            [
                name,
                entry["status"],
                "weights only" if entry["prompt_ids_equal"] is None else f"{entry['prompt_ids_equal']} of {count}",
                f"{entry['answers_equal']} of {count}",
                "" if entry["max_logprob_difference"] is None else f"{entry['max_logprob_difference']:.1e}",
            ]
        )
    heads = ["engine", "status", "prompts equal", "greedy answers equal", "largest difference of a log-probability"]
    return markdown_table(heads, rows).rstrip()


def _usage(exported: "ExportedModel") -> list[str]:
    """Return the commands that use the model, FOLDER being where the reader has it."""
    if not exported.gguf and not exported.merged:
        return [
            "```python\nfrom peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer\n\n"
            'model = AutoPeftModelForCausalLM.from_pretrained("FOLDER")\n'
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n```'
        ]
    if not exported.gguf:
        return [
            "```python\nfrom transformers import pipeline\n\n"
            'chat = pipeline("text-generation", "FOLDER")\n'
            'print(chat([{"role": "user", "content": "Hello"}])[0]["generated_text"][-1]["content"])\n```',
            "```\nvllm serve FOLDER\ntransformers serve FOLDER\n```",
            "For llama.cpp and Ollama, export it again with `--to gguf` or `--to ollama`, or convert it with "
            "llama.cpp's `convert_hf_to_gguf.py`.",
        ]
    lora = f" --lora {exported.adapter_gguf}" if exported.adapter_gguf else ""
    is_for_ollama = (exported.folder / "Modelfile").is_file()
    ollama = ["```\nollama create my-model -f Modelfile\nollama run my-model\n```"] if is_for_ollama else []
    return [f"```\nllama-server -m model.gguf{lora} --jinja\n```", *ollama]


def _hashes(run: RunFiles, source: Path) -> str:
    """Return the hashes of the data, the template, the base model and the trained weights (SHA-256)."""
    made_from = (run.ledger or {}).get("made_from", {})
    rows = [
        [f"data: {as_text(public_name(name))}", f"`{value}`"] for name, value in made_from.get("sources", {}).items()
    ]
    rows += [["tokenizer", f"`{made_from['tokenizer']}`"]] if "tokenizer" in made_from else []
    template = source / "chat_template.jinja"
    if template.is_file():
        rows.append(["chat template", f"`{hashlib.sha256(template.read_bytes()).hexdigest()}`"])
    rows += [["code of the preparation", f"`{made_from['program']}`"]] if "program" in made_from else []
    base = RunFolder(run.root).base_model
    if base.is_file():
        rows.append(["base model", f"`{json.loads(base.read_text(encoding='utf-8'))['fingerprint']}`"])
    certificate = RunFolder(run.root).certificate
    if certificate.is_file():
        rows.append(["certificate.json of the run", f"`{hashlib.sha256(certificate.read_bytes()).hexdigest()}`"])
    rows.append(["trained weights, configuration and tokenizer", f"`{weights_fingerprint(source)}`"])
    return markdown_table(["what", "SHA-256"], rows).rstrip()
