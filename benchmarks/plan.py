"""What `minisft plan` predicts against what is measured on this machine's CPU: peak memory of the largest process.

    python benchmarks/plan.py --results plan.jsonl --minutes 4     # as often as there is something left to measure
    python benchmarks/plan.py --results plan.jsonl --report
    python benchmarks/plan.py --time RUN                           # a finished run's time against its prediction

Three random models, four strategies, one and two processes, all weights and LoRA: each takes three times the heaviest
step of the demo's conversations. Memory is the largest resident size of the largest process, less what it had after the
imports. What was measured is kept in `--results`, and predictions are made anew for each report.
"""

import argparse
import dataclasses
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from minisft.data.preparation import prepare
from minisft.models import resolve_model
from minisft.planning.auto import try_strategy
from minisft.planning.machines import Machine
from minisft.planning.model_cost import ModelCosts
from minisft.planning.planner import job_of, predict_recipe, prepared_sizes
from minisft.planning.prediction import Job, Prediction
from minisft.recipe import STRATEGIES, DataRecipe, LoraRecipe, Recipe, TrainingRecipe
from minisft.run_folder import RunFolder, load_run
from minisft.run_start import open_run

DEMO = Path(__file__).resolve().parents[1] / "recipes" / "demo.sharegpt.jsonl"
STEPS = 3
SIZES: dict[str, dict[str, Any]] = {  # 40M has an output layer of its own; the others share it with the embedding
    "40M": {"hidden_size": 320, "intermediate_size": 960, "num_hidden_layers": 7, "num_attention_heads": 5,
            "num_key_value_heads": 5, "tie_word_embeddings": False},
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "tie_word_embeddings": True},
    "360M": {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15,
             "num_key_value_heads": 5, "tie_word_embeddings": True},
}  # fmt: skip
# Speeds do not matter for memory, so none are measured.
MACHINE = Machine(
    name="cpu", kind="cpu", memory=float(psutil.virtual_memory().total), flops={"fp32": 1e11}, utilisation=1.0,
    bandwidth=1e10, link=1e9, network=1e9, host_link=1e9, host_bandwidth=1e9, per_node=2, source="",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    size: str
    lora: bool
    processes: int
    strategy: str


def cases() -> Iterator[Case]:
    for size, lora, processes, strategy in itertools.product(SIZES, (False, True), (1, 2), STRATEGIES):
        yield Case(size, lora, processes, strategy)


def main() -> None:
    arguments = parse_arguments()
    if arguments.time is not None:
        report_time(arguments.time)
    elif arguments.report:
        report(read_results(arguments.results))
    else:
        measure_cases(arguments.results, arguments.minutes, arguments.only)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("plan.jsonl"), help="where measurements are kept")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no further measurement after so many")
    parser.add_argument("--only", default="", help="measure only cases that begin so, such as 135M-full-2")
    parser.add_argument("--report", action="store_true", help="print the table in place of measuring")
    parser.add_argument("--time", type=Path, metavar="RUN", help="compare a finished run's time with its prediction")
    return parser.parse_args()


def name_of(case: Case) -> str:
    return f"{case.size}-{'lora' if case.lora else 'full'}-{case.processes}-{case.strategy}"


# --- measuring ----------------------------------------------------------------------------------------------


def measure_cases(results: Path, minutes: float, only: str) -> None:
    done, begun = {name_of(case) for case, _ in read_results(results)}, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for case in cases():
            if name_of(case) in done or not name_of(case).startswith(only):
                continue
            if time.monotonic() - begun > 60 * minutes:
                return
            line = dataclasses.asdict(case) | measure_case(case, Path(folder))
            print(line, flush=True)
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
    print("all is measured", flush=True)


def measure_case(case: Case, folder: Path) -> dict[str, Any]:
    """Take the steps; return bytes, and the work that the prediction is for."""
    recipe = recipe_of(case, folder / case.size)
    if not (folder / case.size).exists():
        write_model(case.size, folder / case.size)
    with open_run(replace(recipe, output=str(folder / "run"))) as run:
        prepare(load_run(run.root))
        job = job_here(recipe, run)
        needed, free = needed_bytes(job, recipe), psutil.virtual_memory().available
        if needed > 0.9 * free:
            return {"not_run": f"{needed / 1e9:.0f} GB predicted, {free / 1e9:.0f} GB free"}
        trial = try_strategy(recipe, run, job, STEPS)
    return {"peak": trial.peak, "process": trial.process}


def recipe_of(case: Case, model: Path) -> Recipe:
    training = TrainingRecipe(
        strategy=case.strategy, processes=case.processes, batch_size=4 // case.processes,  # type: ignore[arg-type]
        precision="fp32", lora=LoraRecipe() if case.lora else None,
    )  # fmt: skip
    data = DataRecipe(source=str(DEMO), template="chatml", max_length=512)
    return Recipe(model=str(model), output="", data=data, training=training)


def job_here(recipe: Recipe, run: RunFolder) -> Job:
    return job_of(recipe, MACHINE, sizes=prepared_sizes(replace(recipe, output=str(run.root))))


def needed_bytes(job: Job, recipe: Recipe) -> float:
    prediction = predict_recipe(recipe, job)
    return job.processes * (prediction.peak_memory_bytes + prediction.process_bytes)


def config_of(size: str) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(vocab_size=49152, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, **SIZES[size])


def write_model(size: str, folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(config_of(size)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve_model("smollm2-135m", weights=False).folder).save_pretrained(folder)


# --- reporting ----------------------------------------------------------------------------------------------


def read_results(path: Path) -> list[tuple[Case, dict[str, Any]]]:
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        found.append((Case(**{key.name: entry.pop(key.name) for key in dataclasses.fields(Case)}), entry))
    return found


def report(results: list[tuple[Case, dict[str, Any]]]) -> None:
    print("| model | trained | processes | strategy | predicted GB | measured GB | off by |")
    print("|---|---|---|---|---|---|---|")
    off: list[float] = []
    models = {size: ModelCosts(config_of(size)) for size in SIZES}
    with tempfile.TemporaryDirectory() as folder:
        jobs = dict(jobs_of(Path(folder)))
        for case, measured in sorted(results, key=lambda result: list(cases()).index(result[0])):
            recipe = recipe_of(case, Path(folder))
            job = replace(jobs[case.processes], model=models[case.size])
            prediction = predict_recipe(recipe, job)
            words = [case.size, "LoRA" if case.lora else "all", str(case.processes), case.strategy]
            words.append(f"{prediction.peak_memory_bytes / 1e9:.2f}")
            words += compared(prediction, measured, off)
            print(f"| {' | '.join(words)} |")
    print(f"\n{len(off)} measured, {sum(abs(x) <= 0.2 for x in off)} within 20 %, worst {max(map(abs, off)):.0%}")


def compared(prediction: Prediction, measured: dict[str, Any], off: list[float]) -> list[str]:
    if "not_run" in measured:
        return ["not run", measured["not_run"]]
    actual = measured["peak"] - measured["process"]
    off.append(prediction.peak_memory_bytes / actual - 1)
    return [f"{actual / 1e9:.2f}", f"{off[-1]:+.0%}"]


def jobs_of(folder: Path) -> Iterator[tuple[int, Job]]:
    """Prepare the demo's conversations; the work is the same for every model, since they share a tokenizer."""
    config_of("40M").save_pretrained(folder)
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(resolve_model("smollm2-135m", weights=False).folder).save_pretrained(folder)
    for processes in (1, 2):
        recipe = replace(recipe_of(Case("40M", False, processes, "vanilla"), folder), output=str(folder / "run"))
        with open_run(recipe) as run:
            prepare(recipe)
        yield processes, job_here(recipe, run)


def report_time(root: Path) -> None:
    """Compare the wall time of a finished run's steps with what is predicted now, on this machine."""
    from minisft.planning.planner import predict_run

    lines = [json.loads(line) for line in (root / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    actual, prediction = sum(line["seconds"] for line in lines), predict_run(load_run(root))
    assert prediction.steps is not None
    steps = prediction.steps * prediction.step_seconds
    print(f"{len(lines)} steps: measured {actual:.0f} s, predicted {steps:.0f} s ({steps / actual - 1:+.0%})")


if __name__ == "__main__":
    main()
