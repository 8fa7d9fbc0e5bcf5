"""The Python API: a function for each command, and a run as an object. The command line calls these functions.

Every function prints the lines of its command, and raises `UserError` for a mistake of the user. Heavy libraries are
imported inside the functions, after the recipe is read, so that a wrong recipe is refused at once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisft.errors import UserError
from minisft.files import WRITE_ERRNOS, expand_user_path
from minisft.recipe_argument import (
    built_in_recipe,
    change_recipe,
    note_unread,
    read_recipe,
    set_library_environment,
)
from minisft.runner import (
    dry_run_training,
    importing,
    prepare_run,
    refuse_callbacks_elsewhere,
    train_in_launched_process,
    train_run,
    train_secondary_node,
)
from minisft.text import dump_json

if TYPE_CHECKING:
    import numpy as np
    from transformers import TrainerCallback

    from minisft.audit.findings import Findings
    from minisft.audit.similar_rows import SimilarRows
    from minisft.audit.step_rows import StepReport
    from minisft.audit.verification import Verification
    from minisft.checking.result import Result
    from minisft.data.inspect import InspectedRow
    from minisft.data.prepared_data import PreparedData
    from minisft.monitoring.run_list import RunSummary
    from minisft.planning.planner import Plan
    from minisft.recipe import Recipe
    from minisft.search.learning_rate_range import LearningRateRange
    from minisft.slurm import Submission

__all__ = ["Run", "built_in_recipe", "check", "contamination", "evaluate", "export", "init", "learning_rate_range",
           "load", "note_unread", "plan", "prepare", "push", "read_recipe", "runs", "schema", "search", "serve",
           "submit", "train", "verify", "watch", "why"]  # fmt: skip

Overrides = Mapping[str, Any] | Sequence[str] | None
# Takes outputs, references and prompts of all held-out answers, in order, and returns one number for each.
Metric = Callable[[list[str], list[str], list[str]], Sequence[float]]


@dataclass(frozen=True)
class Run:
    """A run folder. Nothing is cached: every attribute reads the folder when it is accessed.

    Args:
        folder: Path of the run folder, the `output` of a recipe.
        trust_remote_code: Consent to run code that comes with the model; a run folder never consents.
    """

    folder: Path
    trust_remote_code: bool = field(default=False, repr=False)

    @property
    def recipe(self) -> "Recipe":
        """The resolved recipe. Raises UserError if the folder is not a run."""
        from minisft.run_folder import load_run

        return load_run(self.folder, trust_remote_code=self.trust_remote_code)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, one dict for each logged step; loss in nats per supervised token."""
        from minisft.run_folder import RunFolder, read_metrics

        return read_metrics(RunFolder(self.folder))

    @property
    def row_losses(self) -> "np.ndarray":
        """The losses of all training rows at all steps: a structured array with the fields step, row and loss.

        The loss is the mean over the row's supervised tokens in nats, before the update of the step. `row` is the
        number of the row in `data.train`. Raises UserError if the run has none.
        """
        from minisft.row_losses import read_row_losses
        from minisft.run_folder import RunFolder

        return read_row_losses(RunFolder(self.folder).row_losses)

    @property
    def checkpoints(self) -> list[Path]:
        """The checkpoint folders, in the order of their steps."""
        from minisft.run_folder import RunFolder

        return RunFolder(self.folder).list_checkpoints()

    @property
    def model(self) -> Path | None:
        """The folder of the final model, for `from_pretrained`; None if training has not ended."""
        from minisft.run_folder import RunFolder

        run = RunFolder(self.folder)
        return run.model if run.is_trained() else None

    @property
    def results(self) -> dict[str, Any] | None:
        """The content of evaluation/results.json; None if the run is not evaluated."""
        from minisft.results import read_results

        return read_results(self.folder)

    @property
    def data(self) -> "PreparedData":
        """The prepared data."""
        from minisft.data.prepared_data import PreparedData

        return PreparedData(self.folder, self.trust_remote_code)

    @property
    def ledger(self) -> dict[str, Any]:
        """The content of dataset/ledger.json: the number of rows and tokens that were kept, cut or skipped, and why."""
        return self.data.ledger

    def evaluate(
        self, overrides: Overrides = None, *, follow: bool = False, metrics: Mapping[str, Metric] | None = None
    ) -> dict[str, Any]:
        """Score the base model and every checkpoint; see `minisft.evaluate`."""
        return evaluate(self, overrides, follow=follow, metrics=metrics)

    def report(self, to: str | Path | None = None) -> Path:
        """Write report.html and results.md into the run folder, or into the folder `to`; return the page's path.

        Raises:
            UserError: The folder is not a run, or the report cannot be written.
        """
        return report(self, to=to)[0]

    def export(self, folder: str | Path, **options: Any) -> Path:
        """Write the run's model into `folder` for other tools; for the options see `minisft.export`."""
        return export(self, folder, **options)

    def chat(
        self,
        message: str | Sequence[Mapping[str, str]],
        *,
        system: str | None = None,
        template: str = "auto",
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        """Return the answer of the run's model, or of its newest checkpoint while it trains; each call loads the model.

        Args:
            message: One message, or a conversation of {"role", "content"} dicts that ends with a message of the user.
            system: System prompt.
            template: Name of a template or path of a .jinja file; auto: the template that the run was trained with.
            max_new_tokens: Maximum number of tokens of the answer.
            temperature: 0 is greedy decoding, above 0 samples.
            top_p: Probability mass of nucleus sampling, above 0 and at most 1.
            seed: Seed of sampling.

        Raises:
            UserError: There is no model yet, an argument is out of range, or the conversation is too long.
        """
        from minisft.chat.single_answer import answer_once

        return answer_once(
            self.folder,
            message,
            system=system,
            template=template,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            trust_remote_code=self.trust_remote_code,
        )

    def _repr_html_(self) -> str:
        from minisft.notebook import run_as_html

        return run_as_html(self.folder)


# --- the functions of the package ----------------------------------------------------------------------------------


def load(folder: str | Path, *, trust_remote_code: bool = False) -> Run:
    """Return the run in a folder; `trust_remote_code` consents to run code that comes with its model.

    Raises:
        UserError: The folder is not a run folder.
    """
    run = Run(expand_user_path(str(folder), "the run folder"), trust_remote_code)
    run.recipe  # noqa: B018 (it refuses a folder that is not a run)
    return run


def prepare(
    recipe: "str | Path | Recipe | None" = None,
    overrides: Overrides = None,
    *,
    model: str | Path | None = None,
    data: Any = None,
    test: Any = None,
    output: str | Path | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
) -> "PreparedData":
    """Turn conversations into token ids and labels in the folder `dataset` of the run, without loading weights.

    Args:
        recipe: Path of a recipe, a `Recipe`, or None with `model`, `data` and `output` in its place.
        overrides: Values of other keys of the recipe by dotted key, such as {"data.max_length": 512}.
        model: Value of the recipe's key `model`.
        data: Rows (dicts or a `datasets.Dataset`), or a value of the recipe's key `data.source`.
        test: Held-out rows, in the same forms as `data`, or test sets as a dict of names to such rows; None: a part of
            `data` is held out.
        output: Path of the run folder to write.
        force: Replace the run in the folder.
        trust_remote_code: Run code that comes with the model.

    Raises:
        UserError: The recipe, the data or the folder cannot be used.
    """
    found = _recipe("prepare", recipe, overrides, trust_remote_code, model, data, test, output)
    from minisft.data.prepared_data import PreparedData
    from minisft.data.sources import require_sources
    from minisft.run_folder import delete_replaced_run
    from minisft.run_start import start_run

    require_sources(found.data)
    with start_run(found, force=force, prepares_only=True) as started:
        prepare_run(started.recipe, with_weights=False, output=Path(found.output))
        started.replace_old_run()
        delete_replaced_run(started.run)
    return PreparedData(Path(found.output), found.trust_remote_code)


def train(
    recipe: "str | Path | Recipe | None" = None,
    overrides: Overrides = None,
    *,
    model: str | Path | None = None,
    data: Any = None,
    test: Any = None,
    output: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    dry_run: bool = False,
    nodes: int = 1,
    node_rank: int | None = None,
    rendezvous: str | None = None,
    callbacks: Sequence["TrainerCallback"] = (),
    trust_remote_code: bool = False,
) -> Run:
    """Train a recipe; its data is prepared first if that has not been done.

    Args:
        recipe: Path of a recipe, a `Recipe`, or None with `model`, `data` and `output` in its place.
        overrides: Values of other keys of the recipe by dotted key, such as {"training.epochs": 3}.
        model: Value of the recipe's key `model`.
        data: Rows (dicts or a `datasets.Dataset`), or a value of the recipe's key `data.source`.
        test: Held-out rows, in the same forms as `data`, or test sets as a dict of names to such rows; None: a part of
            `data` is held out.
        output: Path of the run folder to write.
        resume: Resume from the newest complete checkpoint.
        force: Replace the run in the folder; it is kept until the new one has taken its first step.
        dry_run: Make every check and write nothing.
        nodes: Number of machines that train together.
        node_rank: Rank of this machine, from 0.
        rendezvous: HOST:PORT of machine 0.
        callbacks: Callbacks of transformers' Trainer; only for one process without ZeRO.
        trust_remote_code: Run code that comes with the model.

    Raises:
        UserError: The recipe, the data, the model or the machine does not allow it.
        StoppedError: SIGINT or SIGTERM was received, and a checkpoint was written.
        WorkerError: A process of the run failed or was killed.
    """
    found = _recipe("train", recipe, overrides, trust_remote_code, model, data, test, output)
    with importing():
        from minisft.training.distributed import adopt_slurm, is_joined
        from minisft.training.nodes import parse_nodes

    machines = parse_nodes(nodes, node_rank, rendezvous)
    if machines is None:
        adopt_slurm()
    refuse_callbacks_elsewhere(found, machines, callbacks)
    if dry_run:
        dry_run_training(found, force=force, resume=resume, nodes=machines)
    elif is_joined():
        train_in_launched_process(found, force=force, resume=resume, nodes=machines)
    elif machines is not None and machines.rank > 0:
        train_secondary_node(found, machines, resume=resume)
    else:
        trained = train_run(found, force=force, resume=resume, nodes=machines, callbacks=callbacks)
        from minisft.console import say

        say(f"trained: {trained.model} (checkpoints beside it, curve in {trained.root / 'evaluation' / 'loss.png'})")
        trackers = "".join(f"; {name}" for name in found.training.report_to)
        say(f"metrics: {trained.metrics}; tensorboard --logdir {trained.tensorboard}{trackers}")
        say(f"next: minisft evaluate {trained.root}    or: minisft chat {trained.root}")
    return Run(Path(found.output), found.trust_remote_code)


def evaluate(
    run: "str | Path | Run | Recipe",
    overrides: Overrides = None,
    *,
    follow: bool = False,
    as_json: bool = False,
    metrics: Mapping[str, Metric] | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Generate with and score the base model and every checkpoint of a run; cached results are not computed again.

    Args:
        run: A `Run`, the path of a run folder or of a recipe, or a `Recipe`.
        overrides: Values of the recipe's section `evaluation` by dotted key.
        follow: Score checkpoints while a training run writes them.
        as_json: Print the results as JSON in place of the table.
        metrics: Your own metrics by name: f(outputs, references, prompts) returns one number for each answer. Their
            means, 95 % bootstrap intervals and p-values are in `custom` of each model in the results. The recipe's
            `evaluation.metrics` names others.
        trust_remote_code: Run code that comes with the model.

    Returns:
        The content of evaluation/results.json. BLEU and chrF go from 0 to 100, losses are in nats per token.

    Raises:
        UserError: There is nothing to score; or a metric failed or a checkpoint is damaged (all others are scored).
    """
    found = _recipe_or_run("evaluate", run, overrides, trust_remote_code)
    return _evaluate(found, follow=follow, as_json=as_json, metrics=metrics)


def contamination(
    run: "str | Path | Run | Recipe",
    against: Sequence[str | Path] = (),
    overrides: Overrides = None,
    *,
    as_json: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Find test rows that the train rows nearly hold, and items of benchmarks in the data; score without such rows.

    Args:
        run: A `Run`, the path of a run folder or of a recipe, or a `Recipe`; its data must be prepared.
        against: Paths of files to look for in the data: .txt with an item in each line, or a type of `data.source`.
        overrides: Values of the recipe by dotted key.
        as_json: Print the result as JSON in place of text.
        trust_remote_code: Run code that comes with the model.

    Returns:
        The content of evaluation/contamination.json; see docs/contamination.md.

    Raises:
        UserError: The data are not prepared, or a file cannot be read.
    """
    found = _recipe_or_run("contamination", run, overrides, trust_remote_code)
    files = [expand_user_path(str(path), "--against") for path in against]
    from minisft.run_start import refuse_untrusted_links

    with importing():
        from minisft.evaluation.contamination import measure_contamination, print_contamination

    refuse_untrusted_links(Path(found.output))
    result = measure_contamination(found, Path(found.output), files)
    if as_json:
        print(dump_json(result, indent=1))
    else:
        print_contamination(result)
    return result


def export(
    run: "str | Path | Run | Recipe",
    folder: str | Path,
    overrides: Overrides = None,
    *,
    to: str = "folder",
    checkpoint: str | None = None,
    merge: bool = True,
    dtype: str | None = None,
    engine: str = "auto",
    llama_cpp: str | Path | None = None,
    max_kl: float | None = None,
    allow_unverified: bool = False,
    license: str | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """Write a run's model into `folder` for other tools, and verify it with their engines; return that folder.

    `verified.json` in the folder says what each engine gave, README.md is the model card.

    Args:
        run: A `Run`, the path of a run folder or of a recipe, or a `Recipe`.
        folder: Path of a new or empty folder, or with `force` of an earlier export.
        overrides: Values of the recipe by dotted key.
        to: "folder": a model folder; "gguf": model.gguf; "ollama": model.gguf and a Modelfile.
        checkpoint: Name of a checkpoint, or "best"; None: the final model.
        merge: Add adapters to the weights of the base model; False writes them without merging.
        dtype: Number format of the weights: "f32", "f16" or "bf16" ("fp32", "fp16"), and "q8_0" or "q4_k_m" for GGUF;
            None: unchanged.
        engine: "auto": every engine that is installed; "none"; or "transformers", "llama.cpp" or "vllm".
        llama_cpp: A folder of llama.cpp, for its converter, quantiser and server.
        max_kl: The largest accepted mean KL divergence of a quantised model, in nats per token; None: that of the
            format.
        allow_unverified: Keep an export that an engine does not serve as trained.
        license: Identifier of the model's licence on the hub, for the model card.
        force: Replace the model that an earlier export wrote there.
        trust_remote_code: Run code that comes with the model.

    Raises:
        UserError: There is no such checkpoint, the folder is in use, the base model is not the run's, this model has no
            such form, or an engine does not serve the export as the model was trained.
    """
    target = expand_user_path(str(folder), "the folder to write")
    found = _recipe_or_run("export", run, overrides, trust_remote_code)
    from minisft.console import say

    with importing():
        from minisft.exporting.export import ExportOptions
        from minisft.exporting.export import export as export_model

    tools = None if llama_cpp is None else expand_user_path(str(llama_cpp), "--llama-cpp")
    options = ExportOptions(
        to, checkpoint, merge, dtype, engine, tools, max_kl, allow_unverified, license, force
    )  # in the order of its fields
    source = export_model(found, target, options)
    say(f"written: {target}, from {source}")
    return target


def init(
    data: Any,
    *,
    model: str | Path = "smollm2-135m",
    output_recipe: str | Path = "recipe.yaml",
    gpu: str | None = None,
    count: int | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Look at data, model and machine, and write a recipe in which each value has its reason; return its path.

    Args:
        data: Rows (dicts or a `datasets.Dataset`), or a value of the recipe's key `data.source`.
        model: Value of the recipe's key `model`.
        output_recipe: Path of the YAML file to write; it must not exist.
        gpu: A name of `minisft.planning.machines.GPUS`, such as "h100", or "cpu"; None: this machine.
        count: Number of GPUs; None: one of `gpu`, or all of this machine.
        trust_remote_code: Run code that comes with the model.

    Raises:
        UserError: The data are no conversations, the model or the machine is unknown, or the recipe exists or cannot be
            written.
    """
    set_library_environment()
    path = expand_user_path(str(output_recipe), "--output-recipe")
    from minisft.data.in_memory import source_of
    from minisft.new_recipe.init import InitOptions
    from minisft.new_recipe.init import init as write_new_recipe

    return write_new_recipe(InitOptions(source_of(data), str(model), path, gpu, count, trust_remote_code))


def plan(
    recipe: "str | Path | Recipe | None" = None,
    overrides: Overrides = None,
    *,
    model: str | Path | None = None,
    data: Any = None,
    test: Any = None,
    output: str | Path | None = None,
    gpu: str | None = None,
    count: int | None = None,
    nodes: int = 1,
    dry_run: bool = False,
    as_json: bool = False,
    trust_remote_code: bool = False,
) -> "Plan":
    """Predict memory and time of every strategy, and choose one, before anything is trained.

    Args:
        recipe: Path of a recipe, a `Recipe`, or None with `model`, `data` and `output` in its place.
        overrides: Values of other keys of the recipe by dotted key.
        model: Value of the recipe's key `model`.
        data: Rows, or a value of the recipe's key `data.source`.
        test: Held-out rows, in the same forms as `data`.
        output: Path of the run folder.
        gpu: A name of `minisft.planning.machines.GPUS`, such as "h100", or "cpu"; None: this machine.
        count: Number of GPUs or processes of a node; None: the recipe's `training.processes`.
        nodes: Number of machines.
        dry_run: Execute steps of the trainer on the GPUs, which need not be there; the result is in `Plan.dry_run`.
        as_json: Print everything as JSON in place of tables.
        trust_remote_code: Run code that comes with the model.

    Raises:
        UserError: The machine or the count is impossible, or the configuration of the model cannot be used.
    """
    found = _recipe("plan", recipe, overrides, trust_remote_code, model, data, test, output)
    from minisft.console import waiting

    with waiting("computing memory and time"):
        from minisft.planning.plan_table import plan_as_json, show_plan
        from minisft.planning.planner import PlanOptions, plan_for

        made = plan_for(found, PlanOptions(gpu, count, nodes, dry_run))
    if as_json:
        print(dump_json(plan_as_json(made), indent=1))
    else:
        show_plan(made)
    return made


def check(
    recipe: "str | Path | Recipe | None" = None,
    overrides: Overrides = None,
    *,
    model: str | Path | None = None,
    data: Any = None,
    test: Any = None,
    output: str | Path | None = None,
    quick: bool = False,
    as_json: bool = False,
    trust_remote_code: bool = False,
) -> "list[Result]":
    """Check on this recipe, model and machine that training keeps its promises; write check.json.

    Args:
        recipe: Path of a recipe, a `Recipe`, or None with `model`, `data` and `output` in its place.
        overrides: Values of other keys of the recipe by dotted key.
        model: Value of the recipe's key `model`.
        data: Rows, or a value of the recipe's key `data.source`.
        test: Held-out rows, in the same forms as `data`.
        output: Path of the run folder.
        quick: Leave out the checks that need the weights of the model.
        as_json: Print check.json in place of a table.
        trust_remote_code: Run code that comes with the model.

    Returns:
        One result for each check; its `status` is "FAILED" where a promise does not hold, which raises nothing here.

    Raises:
        UserError: The checks cannot be made.
    """
    found = _recipe("check", recipe, overrides, trust_remote_code, model, data, test, output)
    from minisft.console import say
    from minisft.files import write_atomically
    from minisft.run_start import open_run
    from minisft.training.device import on_cpu
    from minisft.training.zero import set_deepspeed_environment

    set_deepspeed_environment(on_cpu())  # before transformers is imported
    with importing():
        if not quick:
            from minisft.training.run_training import require_feasible

            require_feasible(found)
        from minisft.checking.context import CheckContext
        from minisft.checking.run_checks import as_report, run_checks, show, summary

    with open_run(found, prepares_only=True) as run:
        on_result = (lambda _: None) if as_json else show
        results = run_checks(CheckContext(found, run), quick=quick, on_result=on_result)
        as_dict = as_report(found, results, quick=quick)
        write_atomically(run.check, dump_json(as_dict, indent=1))
    if as_json:
        print(dump_json(as_dict, indent=1))
    else:
        say(f"{summary(results)}; written: {run.check}")
    return results


def schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe (draft 2020-12): keys, types, choices, defaults and descriptions.

    Raises:
        UserError: The installation is incomplete.
    """
    from minisft.recipe_schema import recipe_schema

    return recipe_schema()


def runs(folder: str | Path = "outputs") -> "list[RunSummary]":
    """Return the runs in a folder and below it, in the order of their last change; broken ones too, with the reason.

    Nothing is loaded or changed, and no run is trusted.

    Args:
        folder: Path of a folder of run folders, or of one run.

    Raises:
        UserError: There is no such folder.
    """
    from minisft.monitoring.run_list import list_runs

    return list_runs(expand_user_path(str(folder), "the folder of the runs"))


def watch(folder: str | Path) -> bool:
    """Show the training of another process until it ends; return whether the run is trained.

    Args:
        folder: Path of its run folder, which may be on a file system shared with another machine.

    Raises:
        UserError: It is not a run folder, or no training begins in it.
    """
    from minisft.monitoring.run_watch import watch as watch_run

    return watch_run(expand_user_path(str(folder), "the run folder"))


# --- the other verbs of the command line ------------------------------------------------------------------


def inspect(
    run: "str | Path | Run | Recipe",
    overrides: Overrides = None,
    *,
    split: str = "train",
    rows: Sequence[int] = (),
    ids: Sequence[str] = (),
    worst: str | None = None,
    only_findings: bool = False,
    count: int = 3,
    html: str | Path | None = None,
    trust_remote_code: bool = False,
) -> "list[InspectedRow]":
    """Show rows with supervised tokens coloured; the data is prepared first if that has not been done."""
    found = _recipe_or_run("inspect", run, overrides, trust_remote_code)
    from minisft.data.inspect import inspect as show_rows
    from minisft.run_folder import RunFolder, is_same_run
    from minisft.run_start import open_run

    if not is_same_run(RunFolder(Path(found.output)), found):
        with open_run(found, prepares_only=True):
            prepare_run(found, with_weights=False)
    return show_rows(
        found,
        split=split,
        rows=rows,
        ids=ids,
        worst=worst,
        only_findings=only_findings,
        count=count,
        html=None if html is None else expand_user_path(str(html), "--html"),
    )


def compare(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    strategies: str | None = None,
    vary: Sequence[str] = (),
    evaluate: bool = True,
    force: bool = False,
    trust_remote_code: bool = False,
    on_result: Callable[[dict[str, Any]], object] | None = None,
) -> int:
    """Run a recipe under several strategies or settings; return the exit status of the command line.

    `on_result` is called with the content of comparison.json.
    """
    from minisft.comparison.compare import CompareOptions
    from minisft.comparison.compare import compare as compare_variants
    from minisft.run_folder import TRUST_OVERRIDE

    words = (*overrides, *([TRUST_OVERRIDE] if trust_remote_code else []))
    return compare_variants(
        CompareOptions(Path(recipe), words, strategies=strategies, varied=tuple(vary), evaluate=evaluate, force=force),
        on_result,
    )


def search(
    recipe: "str | Path | Recipe | None" = None,
    overrides: Overrides = None,
    *,
    model: str | Path | None = None,
    data: Any = None,
    test: Any = None,
    output: str | Path | None = None,
    vary: Sequence[str] = (),
    budget: str | None = None,
    validation: float | None = None,
    workers: int = 1,
    storage: str | None = None,
    seed: int = 0,
    resume: bool = False,
    defaults: bool = True,
    objective: str = "loss",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Search the best settings of a recipe; return the content of search.json.

    Args:
        recipe: Path of a recipe, a `Recipe`, or None with `model`, `data` and `output` in its place.
        overrides: Values of other keys of the recipe by dotted key.
        model: Value of the recipe's key `model`.
        data: Rows, or a value of the recipe's key `data.source`.
        test: Held-out rows, in the same forms as `data`.
        output: Path of the search's folder.
        vary: `KEY=LOW..HIGH` and `KEY=A,B,C` texts; none: learning rate, epochs, batch size and LoRA's rank.
        budget: "30m", "3x" (three times one full run) or "20" trials; None: every combination of listed values, or 8.
        validation: Fraction of the train conversations on which trials are compared; None: 0.1.
        workers: Number of trials that run at the same time.
        storage: URL of Optuna's storage; None: a SQLite file in the folder.
        seed: Seed of the sampler and of the bootstrap.
        resume: Go on with the search in the folder.
        defaults: Train the recipe's own settings to the end too, to score them beside the winner.
        objective: What chooses the best trial: "loss", or a metric of the answers to the validation rows.
        trust_remote_code: Run code that comes with the model.

    Raises:
        UserError: The options, the recipe, the data or the storage do not allow it, or all trials failed.
        StoppedError: SIGINT or SIGTERM was received, and the trials under way have saved their work.
    """
    found = _recipe("search", recipe, overrides, trust_remote_code, model, data, test, output)
    with importing():
        from minisft.search.search import SearchOptions
        from minisft.search.search import search as search_settings

    options = SearchOptions(tuple(vary), budget, validation, workers, storage, seed, resume, defaults, objective)
    return search_settings(found, options)


def learning_rate_range(
    recipe: "str | Path | Recipe | None" = None,
    overrides: Overrides = None,
    *,
    model: str | Path | None = None,
    data: Any = None,
    output: str | Path | None = None,
    steps: int | None = None,
    trust_remote_code: bool = False,
) -> "LearningRateRange":
    """Train for a few steps with a rising learning rate, and suggest a range to search; the output is not touched.

    Args:
        recipe: Path of a recipe, a `Recipe`, or None with `model`, `data` and `output` in its place.
        overrides: Values of other keys of the recipe by dotted key.
        model: Value of the recipe's key `model`.
        data: Rows, or a value of the recipe's key `data.source`.
        output: Value of the recipe's key `output`.
        steps: Number of steps; None: as many as fit into about 80 seconds, from 16 to 100.
        trust_remote_code: Run code that comes with the model.

    Raises:
        UserError: The recipe, its data or its model cannot be trained.
        StoppedError: SIGINT or SIGTERM was received.
    """
    found = _recipe("search", recipe, overrides, trust_remote_code, model, data, None, output)
    from minisft.console import say

    with importing():
        from minisft.search.learning_rate_range import learning_rate_range as run_range_test
        from minisft.search.learning_rate_range import range_lines

    result = run_range_test(found, steps=steps)
    for line in range_lines(result):
        say(line)
    return result


def report(
    run: "str | Path | Run | Recipe", overrides: Overrides = None, *, to: str | Path | None = None
) -> list[Path]:
    """Write report.html and results.md of a run, into it or into the folder `to`; return both paths."""
    output = Path(_recipe_or_run("report", run, overrides, False).output)
    from minisft.console import say, waiting
    from minisft.report.markdown import write_results
    from minisft.report.page import require_target, write_report
    from minisft.run_start import refuse_untrusted_links

    target = None if to is None else expand_user_path(str(to), "--to")
    if target is None:
        refuse_untrusted_links(output)
    else:
        require_target(target)
    try:
        with waiting("writing the report"):
            written = [write_report(output, target), write_results(output, target)]
    except OSError as error:
        if error.errno not in WRITE_ERRNOS:
            raise
        fix = "free some space there, or change the permissions"
        if target is None:
            fix = f"write the report elsewhere: minisft report {output} --to FOLDER"
        problem = f"the report cannot be written there ({error.strerror})"
        raise UserError(target or output, problem, fix) from None
    for path in written:
        say(f"written: {path}")
    return written


def why(
    run: "str | Path | Run", *, step: int | None = None, row: str | None = None, trust_remote_code: bool = False
) -> "StepReport | SimilarRows | Findings":
    """Find the rows that made the loss of a step, that are near a row, or whose losses look wrong.

    Nothing is written to the run. A step is replayed from the nearest checkpoint with optimizer state before it, or
    from the beginning.

    Args:
        run: A `Run`, or the path of a run folder.
        step: Number of the step to replay.
        row: Id of a row of the test or train split.
        trust_remote_code: Run code that comes with the model.

    Returns:
        With `step` a `StepReport`, with `row` the `SimilarRows`, otherwise the `Findings` about all training rows.

    Raises:
        UserError: There is no such step or row, or this machine cannot replay the step.
    """
    if step is not None and row is not None:
        raise UserError("minisft.why", "`step` and `row` are two questions", "give one of them")
    recipe = _recipe_of_run("why", run, trust_remote_code)
    with importing():
        from minisft.audit import display
        from minisft.audit.findings import find_suspicious_rows
        from minisft.audit.similar_rows import find_similar_rows
        from minisft.audit.step_rows import explain_step

    if step is not None:
        explained = explain_step(recipe, step)
        display.show_step(explained)
        return explained
    if row is not None:
        similar = find_similar_rows(recipe, row)
        display.show_similar(similar)
        return similar
    found = find_suspicious_rows(Path(recipe.output))
    display.show_findings(found)
    return found


def verify(run: "str | Path | Run", *, steps: int = 2, trust_remote_code: bool = False) -> "Verification":
    """Compare a run with its certificate, and replay steps chosen at random; nothing is written to the run.

    Args:
        run: A `Run`, or the path of a run folder.
        steps: Number of steps to replay; 0 compares hashes only.
        trust_remote_code: Run code that comes with the model.

    Returns:
        A `Verification`: `ok`, `changed` (each with `what` and `where`), `replayed` and `notes`.

    Raises:
        UserError: The folder is not a run, has not ended, or was trained by a version without certificates.
    """
    if steps < 0:
        raise UserError("steps", f"must be at least 0, and is {steps}", "give a number of steps to replay")
    recipe = _recipe_of_run("verify", run, trust_remote_code)
    with importing():
        from minisft.audit.verification import show_verification
        from minisft.audit.verification import verify as verify_run

    found = verify_run(recipe, steps)
    show_verification(found)
    return found


def show_runs(folder: str | Path, *, as_json: bool = False) -> None:
    """Print the runs in a folder as a table or as JSON; see `runs`."""
    found = runs(folder)
    if as_json:
        print(dump_json({"folder": str(folder), "runs": [run.as_dict() for run in found]}, indent=1))
        return
    from minisft.monitoring.run_list import show_runs as print_table

    print_table(found, Path(folder))


def read_verification(folder: Path) -> dict[str, Any]:
    """Return the content of verified.json of an export: what each engine gave."""
    from minisft.files import read_json

    return read_json(folder / "verified.json", "export again", engine=dict)


def push(
    run: "str | Path | Run | Recipe",
    name: str,
    overrides: Overrides = None,
    *,
    private: bool = False,
    dry_run: bool = False,
    trust_remote_code: bool = False,
    **options: Any,
) -> str:
    """Publish a run's model with its model card on the Hugging Face hub; return the address of the commit.

    Args:
        run: A `Run`, the path of a run folder or of a recipe, or a `Recipe`.
        name: ORG/NAME of the repository.
        overrides: Values of the recipe by dotted key.
        private: Create a private repository.
        dry_run: Write the folder that would be sent, return its path, and send nothing.
        trust_remote_code: Run code that comes with the model.
        **options: Options of `minisft.export`, such as `checkpoint`.

    Raises:
        UserError: The export is refused, or the hub refuses it or cannot be reached.
    """
    found = _recipe_or_run("push", run, overrides, trust_remote_code)
    with importing():
        from minisft.exporting.export import ExportOptions
        from minisft.exporting.hub import push as push_model

    return push_model(found, name, ExportOptions(**options), private=private, dry_run=dry_run)


def chat(folder: str | Path, **options: Any) -> None:
    """Chat in the terminal with the model of a run or of a model folder; for the options see `chat.terminal.chat`."""
    set_library_environment()
    with importing():
        import minisft.evaluation.generation  # noqa: F401 (every answer needs it)
        from minisft.chat.terminal import chat as start_chat

    start_chat(folder, **options)


def serve(
    folder: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    memory: float | None = None,
    backend: str = "transformers",
    trust_remote_code: bool = False,
) -> None:
    """Serve the models of a run, or any model folder, in OpenAI's interface, until SIGINT or SIGTERM.

    Args:
        folder: Run folder, model folder or any other model name.
        host: Address to bind to; another one than this machine's own needs `api_key`.
        port: Port to bind to; 0 takes a free one. The line "serving http://HOST:PORT" says when it is ready.
        api_key: Key that requests must have.
        memory: Most memory for weights, in GB (1e9 bytes); None: most of what is free.
        backend: "transformers"; or "vllm" or "llama.cpp", which serve a verified export of a run's final model.
        trust_remote_code: Run code that comes with the model.

    Raises:
        UserError: There is no such model, the address cannot be used, or FastAPI is not installed.
    """
    if host not in ("127.0.0.1", "localhost", "::1") and not api_key:
        fix = "add --api-key KEY, which every request must then have, or leave --host out"
        raise UserError("--host", f"{host} can be reached from other machines", fix)
    if api_key is not None and (not api_key or api_key != api_key.strip()):
        raise UserError("--api-key", "the key is empty, or begins or ends with a space", "give another key")
    set_library_environment()
    from minisft.optional_packages import require_package

    for module in ("fastapi", "uvicorn"):
        require_package("minisft serve", module)
    if backend != "transformers":
        if memory is not None:
            fix = "leave --memory out: the engine has its own options"
            raise UserError("--memory", f"{backend} loads the model itself", fix)
        from minisft.run_folder import load_run
        from minisft.serving.engine_proxy import serve_with_engine

        recipe = load_run(Path(folder), trust_remote_code=trust_remote_code)
        serve_with_engine(recipe, backend, host=host, port=port, api_key=api_key)
        return
    from minisft.serving.server import serve_folder

    serve_folder(str(folder), host=host, port=port, api_key=api_key, memory=memory, trust_remote_code=trust_remote_code)


def submit(
    recipe: "str | Path | Recipe | None" = None,
    overrides: Overrides = None,
    *,
    model: str | Path | None = None,
    data: Any = None,
    test: Any = None,
    output: str | Path | None = None,
    nodes: int = 1,
    time: str,
    partition: str | None = None,
    gpus_per_node: str | int | None = None,
    cpus_per_task: int | None = None,
    sbatch: Sequence[str] = (),
    script: str | Path | None = None,
    resume: bool = False,
    evaluate: bool = True,
    now: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
) -> "Submission":
    """Write the SLURM scripts that train a recipe and score its run, and submit them if that is wanted.

    When its time ends or it is preempted, the job saves a checkpoint, goes back to the queue, and resumes.

    Args:
        recipe: Path of a recipe, a `Recipe`, or None with `model`, `data` and `output` in its place.
        overrides: Values of other keys of the recipe by dotted key.
        model: Value of the recipe's key `model`.
        data: Rows, or a value of the recipe's key `data.source`.
        test: Held-out rows, in the same forms as `data`.
        output: Path of the run folder; all machines must have access to it.
        nodes: Number of machines; `training.processes` counts the processes of all of them.
        time: Time limit of the job in one of SLURM's formats, such as "8:00:00".
        partition: Name of the partition; None: the cluster's default.
        gpus_per_node: N or "TYPE:N"; None: one for each process of a machine; 0: none, to train on CPUs.
        cpus_per_task: Cores of each machine; None: 4 for each process with a GPU, 1 for each without.
        sbatch: Other options of sbatch, such as "account=NAME".
        script: Path of the script to write; None: that of the run folder with the ending .sbatch.
        resume: Resume an unfinished run.
        evaluate: Also write a job that scores the run after training, and writes its report.
        now: Submit the jobs.
        force: Replace scripts that exist.
        trust_remote_code: Run code that comes with the model.

    Returns:
        A `Submission`: the files that were written, and the ids of the jobs.

    Raises:
        UserError: The recipe or an option is impossible, a script exists, or SLURM is not there or refuses the job.
    """
    found = _recipe("submit", recipe, overrides, trust_remote_code, model, data, test, output)
    from minisft.slurm import SlurmOptions
    from minisft.slurm import submit as submit_job

    gpus = None if gpus_per_node is None else str(gpus_per_node)
    options = SlurmOptions(nodes, time, partition, gpus, cpus_per_task, tuple(sbatch), resume, evaluate)
    path = None if script is None else expand_user_path(str(script), "--script")
    return submit_job(found, options, path, now=now, force=force)


def demo(recipe: "Recipe", *, force: bool = False) -> None:
    """Train and score the built-in recipe and show the results; finished work is not repeated."""
    set_library_environment()
    from minisft.console import say
    from minisft.demo import show_demo
    from minisft.run_folder import RunFolder, is_same_run

    run = RunFolder(Path(recipe.output))
    if not force and is_same_run(run, recipe) and run.is_trained():
        say(f"{run.root} is trained already; `minisft demo --force` trains it again.")
    else:
        resume = not force and is_same_run(run, recipe) and run.has_begun()
        train_run(recipe, force=force, resume=resume)
    _evaluate(recipe, shown=show_demo)


def leave_server() -> None:
    """End this process at once after a server has stopped: nothing is left to save, and torch takes a second to end."""
    from minisft.processes import hard_exit

    hard_exit(0)


def leave_launched_process() -> None:
    """End this process at once if a launcher started it: at a normal exit its libraries may wait for others."""
    from minisft.processes import hard_exit
    from minisft.training.distributed import is_joined

    if is_joined():
        hard_exit(0)


# --- shared by the functions above ------------------------------------------------------------------------


def _recipe(
    verb: str,
    recipe: "str | Path | Recipe | None",
    overrides: Overrides,
    trust_remote_code: bool,
    model: Any,
    data: Any,
    test: Any,
    output: Any,
) -> "Recipe":
    """Return the recipe from the arguments of a function: a recipe, or model, data and output."""
    set_library_environment()
    keys: dict[str, Any] = {"model": model, "data": data, "test": test, "output": output}
    given = [name for name, value in keys.items() if value is not None]
    if recipe is not None:
        if given:
            problem = "a recipe is given, and " + ", ".join(f"`{name}`" for name in given) + " too"
            raise UserError(f"minisft.{verb}", problem, "give the one or the other; overrides change a recipe's keys")
        return _read(verb, recipe, overrides, trust_remote_code, takes_run=False)
    missing = [name for name in ("model", "data", "output") if keys[name] is None]
    if missing:
        problem = "no recipe is given, nor " + ", ".join(f"`{name}`" for name in missing)
        raise UserError(f"minisft.{verb}", problem, "give a recipe, or model=, data= and output=")
    from minisft.data.in_memory import source_of, test_of
    from minisft.recipe import make_recipe
    from minisft.recipe_argument import as_overrides

    words: list[Any] = [("model", model), ("output", output), ("data.source", source_of(data))]
    if test is not None:
        words.append(("data.test", test_of(test)))
    changes = as_overrides(overrides)
    if trust_remote_code:
        changes.append(("trust_remote_code", True))
    return make_recipe([*words, *changes])


def _recipe_or_run(
    verb: str, run: "str | Path | Run | Recipe", overrides: Overrides, trust_remote_code: bool
) -> "Recipe":
    set_library_environment()
    if isinstance(run, Run):
        trust_remote_code = trust_remote_code or run.trust_remote_code
        run = run.folder
        if not run.is_dir():
            raise UserError(run, "there is no such run folder", "train first: minisft train")
    return _read(verb, run, overrides, trust_remote_code, takes_run=True)


def _recipe_of_run(verb: str, run: "str | Path | Run", trust_remote_code: bool) -> "Recipe":
    """Return the recipe of a run folder."""
    from minisft.run_folder import load_run

    set_library_environment()
    if not isinstance(run, Run | str | Path):
        problem = f"a value of the type {type(run).__name__} is not a run"
        raise UserError(f"minisft.{verb}", problem, "give the path of a run folder, or a Run")
    if isinstance(run, Run):
        return load_run(run.folder, trust_remote_code=trust_remote_code or run.trust_remote_code)
    return load_run(expand_user_path(str(run), "the run folder"), trust_remote_code=trust_remote_code)


def _read(verb: str, recipe: Any, overrides: Overrides, trust_remote_code: bool, *, takes_run: bool) -> "Recipe":
    from minisft.recipe import Recipe

    if isinstance(recipe, Recipe):
        return change_recipe(verb, recipe, overrides, trust_remote_code=trust_remote_code)
    if not isinstance(recipe, str | Path):
        problem = f"a value of the type {type(recipe).__name__} is not a recipe"
        raise UserError(f"minisft.{verb}", problem, "give the path of a recipe, or a Recipe")
    path = expand_user_path(str(recipe), "the recipe")
    return read_recipe(verb, path, overrides, trust_remote_code=trust_remote_code, takes_run=takes_run)


def _evaluate(
    recipe: "Recipe",
    *,
    follow: bool = False,
    as_json: bool = False,
    metrics: Mapping[str, Metric] | None = None,
    shown: Callable[[Path], object] | None = None,
) -> dict[str, Any]:
    """Score the run, call `shown` with its folder, and then refuse checkpoints that are damaged."""
    from minisft.run_folder import RunFolder
    from minisft.run_start import refuse_untrusted_links

    with importing():
        from minisft.evaluation.judge import require_all_judged
        from minisft.evaluation.run_evaluation import evaluate as score_checkpoints
        from minisft.evaluation.run_evaluation import require_all_scored
        from minisft.report.plots import draw_curves

    output = Path(recipe.output)
    refuse_untrusted_links(output)
    results = score_checkpoints(
        recipe, output, follow=follow, as_json=as_json, draw=draw_curves, custom_metrics=metrics or {}
    )
    if shown is not None:
        shown(output)
    require_all_scored(results, RunFolder(output))
    require_all_judged(results)
    return results
