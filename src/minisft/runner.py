"""From a recipe to a prepared and a trained run folder, for several commands.

Heavy libraries are imported inside the functions, so that `minisft --help` is fast.
"""

import contextlib
import gc
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from minisft.errors import UserError

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from minisft.recipe import Recipe
    from minisft.run_folder import RunFolder
    from minisft.training.checkpoint_scores import Scorer
    from minisft.training.nodes import Nodes


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Show that libraries are being imported; for the first of them, the garbage collector pauses.

    It would visit their objects many times, although all of them stay: a fifth of the processor time of a start. Later
    calls in the same process change nothing, since a trainer that the caller has dropped must still be collected.
    """
    from minisft.console import waiting

    pauses = gc.isenabled() and "torch" not in sys.modules
    if pauses:
        gc.collect()  # what is garbage now would stay, too
        gc.disable()
    try:
        with waiting("importing torch and transformers"):
            yield
    finally:
        if pauses:
            gc.freeze()
            gc.enable()


def prepare_run(
    recipe: "Recipe", with_weights: bool = True, output: Path | None = None, fingerprint: str | None = None
) -> Path:
    """Prepare the data if that has not been done; return the folder of the base model.

    Args:
        recipe: Recipe; its `output` is the folder to prepare in.
        with_weights: Resolve the weights of the model too, and record their fingerprint.
        output: Path to print in messages, if the run will be renamed to it.
        fingerprint: Fingerprint of the weights, where the caller has computed it already.
    """
    from minisft.console import row_progress, say
    from minisft.run_folder import RunFolder, record_base_model

    with importing():
        from minisft.data.inspect import write_preview
        from minisft.data.preparation import prepare as prepare_data
        from minisft.data.stats import ledger_lines
        from minisft.models import resolve_model, weights_fingerprint

    run = RunFolder(Path(recipe.output))
    resolved = resolve_model(recipe.model, recipe.trust_remote_code, weights=with_weights)
    say(f"model {resolved}")
    if with_weights:
        record_base_model(run, str(resolved), fingerprint or weights_fingerprint(resolved.folder))
    with row_progress() as progress:
        prepared = prepare_data(recipe, progress=progress, model_folder=resolved.folder, begun=run.has_begun())
    write_preview(run.root, resolved.folder, recipe.trust_remote_code)
    say(f"data {(output or run.root) / 'dataset'}" + (" (prepared before)" if prepared.cached else ""))
    for line in ledger_lines(prepared.ledger):
        say(f"  {line}")
    return resolved.folder


def train_run(
    recipe: "Recipe",
    *,
    force: bool,
    resume: bool,
    nodes: "Nodes | None" = None,
    callbacks: Sequence["TrainerCallback"] = (),
    pause_at: int | None = None,
    fingerprint: str | None = None,
) -> "RunFolder":
    """Prepare and train, on this machine or as the first of several; return the run folder.

    Args:
        recipe: The recipe.
        force: Replace the run in the output folder.
        resume: Resume an unfinished run.
        nodes: The machines that train together; None: this one alone.
        callbacks: Callbacks that join the Trainer of a run that takes place in this process.
        pause_at: Step after which the run ends with a checkpoint, to be resumed later; None: train to the end.
        fingerprint: Fingerprint of the base model's weights, where the caller has computed it already.

    Raises:
        UserError: The recipe, the data, the model or the machine does not allow it.
        StoppedError: SIGINT or SIGTERM was received, and a checkpoint was written.
    """
    from minisft.run_start import start_run

    with importing():
        from minisft.data.sources import require_sources
        from minisft.models import resolve_model
        from minisft.report.plots import draw_curves
        from minisft.training.disk import require_disk
        from minisft.training.run_training import extend_run, require_feasible
        from minisft.training.run_training import train as start_training

        require_feasible(recipe, nodes)
    resolve_model(recipe.model, recipe.trust_remote_code)  # before --force deletes anything
    require_sources(recipe.data)
    with start_run(recipe, force=force, resume=resume) as started:
        model = prepare_run(started.recipe, output=Path(recipe.output), fingerprint=fingerprint)
        checkpoint = _checkpoint_to_resume(recipe, started.run, resume)
        started.recipe, checkpoint = _resolve_auto_strategy(started.recipe, started.run, checkpoint)
        require_disk(started.recipe, started.run, model, checkpoint, freed_bytes=started.freed_bytes)
        scorer = _checkpoint_scorer(started.recipe, started.run)
        if checkpoint is not None:
            extend_run(started.recipe, started.run, checkpoint, scorer)
        started.replace_old_run()
        start_training(started.recipe, started.run, checkpoint, nodes, callbacks, pause_at, scorer)
    if pause_at is None:
        draw_curves(started.run.root)
    return started.run


def dry_run_training(recipe: "Recipe", *, force: bool, resume: bool, nodes: "Nodes | None" = None) -> None:
    """Make every check that `train` makes before its first step, and write nothing that stays.

    Raises:
        UserError: what `train` would raise.
    """
    import tempfile

    from minisft.console import say
    from minisft.manifest import size_of_written_files
    from minisft.run_folder import RunFolder, describe_run
    from minisft.run_start import open_run, refuse_start

    with importing():
        from minisft.data.sources import require_sources
        from minisft.models import resolve_model
        from minisft.training.disk import require_disk
        from minisft.training.run_training import require_feasible

        require_feasible(recipe, nodes)
    resolve_model(recipe.model, recipe.trust_remote_code)
    require_sources(recipe.data)
    refuse_start(recipe, force=force, resume=resume)
    run = RunFolder(Path(recipe.output))
    replaced = force and run.is_run()
    checkpoint = _checkpoint_to_resume(recipe, run, resume)
    with tempfile.TemporaryDirectory(prefix="minisft-") as folder:
        elsewhere = replace(recipe, output=str(Path(folder) / "run"))
        with open_run(elsewhere) as trial:
            model = prepare_run(elsewhere, output=run.root)
            freed_bytes = size_of_written_files(run.root.resolve()) if replaced else 0
            require_disk(recipe, trial, model, checkpoint, freed_bytes=freed_bytes, place=run.root)
    say(f"dry run: every check passed, and nothing was written to {run.root}")
    if replaced:
        say(f"--force would replace {describe_run(run)}")


def train_secondary_node(recipe: "Recipe", nodes: "Nodes", *, resume: bool) -> None:
    """Train as one of several machines, once the first has prepared; the run folder is the first's to write."""
    from minisft.console import say
    from minisft.models import resolve_model
    from minisft.run_folder import RunFolder
    from minisft.training.nodes import wait_for_first_node
    from minisft.training.run_training import require_feasible
    from minisft.training.run_training import train as start_training

    require_feasible(recipe, nodes)
    resolve_model(recipe.model, recipe.trust_remote_code)
    run = RunFolder(Path(recipe.output))
    wait_for_first_node(nodes, run)
    checkpoint = _checkpoint_to_resume(recipe, run, resume)
    start_training(recipe, run, checkpoint, nodes, scorer=_checkpoint_scorer(recipe, run))
    say(f"machine {nodes.rank} of {nodes.count}: done; machine 0 has the results")


def _resolve_auto_strategy(recipe: "Recipe", run: "RunFolder", checkpoint: Path | None) -> tuple["Recipe", Path | None]:
    """Settle on a strategy where the recipe leaves it open; a checkpoint goes on with its own."""
    from minisft.planning.auto import settle_strategy
    from minisft.run_folder import write_resolved_recipe
    from minisft.training.checkpoints import read_metadata

    if recipe.training.strategy != "auto":
        return recipe, checkpoint
    if checkpoint is None:
        return settle_strategy(recipe, run), None
    recipe = replace(recipe, training=replace(recipe.training, strategy=read_metadata(checkpoint)[0]))  # type: ignore[arg-type]
    write_resolved_recipe(run, recipe)
    return recipe, checkpoint


def refuse_callbacks_elsewhere(recipe: "Recipe", nodes: "Nodes | None", callbacks: Sequence["TrainerCallback"]) -> None:
    """Refuse Trainer callbacks for a run whose steps are taken in other processes, which they cannot be sent to.

    Raises:
        UserError: The recipe trains in several processes, on several machines or with ZeRO.
    """
    from minisft.training.distributed import is_joined

    several = nodes is not None or is_joined() or recipe.training.processes > 1
    if callbacks and (several or recipe.training.strategy != "vanilla"):
        problem = "callbacks exist only in this process, and cannot be sent to the processes that train"
        fix = "leave them out, or train with training.strategy vanilla and training.processes 1 on one machine"
        raise UserError("callbacks", problem, fix)


def train_in_launched_process(recipe: "Recipe", *, force: bool, resume: bool, nodes: "Nodes | None" = None) -> None:
    """Train as one process of a launch under way: the first prepares, the others wait for it."""
    from minisft.data.sources import require_sources
    from minisft.run_folder import RunFolder
    from minisft.run_start import start_run
    from minisft.training.checkpoints import latest_resumable
    from minisft.training.disk import require_disk
    from minisft.training.distributed import join_launch, world_size
    from minisft.training.run_training import extend_run, require_feasible, train_in_this_process

    recipe = replace(recipe, training=replace(recipe.training, processes=world_size()))
    if recipe.training.strategy == "auto":
        problem = "a launch under way cannot try strategies"
        raise UserError("training.strategy", problem, "name the one that `minisft plan RECIPE` chooses")
    require_feasible(recipe, nodes)
    run = RunFolder(Path(recipe.output))
    with contextlib.ExitStack() as held:

        def begin() -> None:
            require_sources(recipe.data)
            started = held.enter_context(start_run(recipe, force=force, resume=resume))
            model = prepare_run(started.recipe, output=Path(recipe.output))
            checkpoint = latest_resumable(run.checkpoints) if resume else None
            require_disk(started.recipe, started.run, model, checkpoint, freed_bytes=started.freed_bytes)
            if checkpoint is not None:
                extend_run(started.recipe, started.run, checkpoint, _checkpoint_scorer(started.recipe, started.run))
            started.replace_old_run()

        join_launch(recipe.training.strategy, begin)
        checkpoint = _checkpoint_to_resume(recipe, run, resume)
        train_in_this_process(recipe, run, checkpoint, scorer=_checkpoint_scorer(recipe, run))


def train_as_worker(
    root: Path, resume_from: Path | None, trust_remote_code: bool = False, pause_at: int | None = None
) -> None:
    """Train as a process that `train` started: the recipe is in the run folder, the consent in the arguments."""
    from minisft.run_folder import RunFolder, load_run
    from minisft.training.device import on_cpu
    from minisft.training.run_training import train_in_this_process
    from minisft.training.zero import set_deepspeed_environment

    set_deepspeed_environment(on_cpu())
    recipe, run = load_run(root, trust_remote_code=trust_remote_code), RunFolder(root)
    scorer = _checkpoint_scorer(recipe, run)
    train_in_this_process(recipe, run, resume_from, pause_at=pause_at, scorer=scorer)


def _checkpoint_scorer(recipe: "Recipe", run: "RunFolder") -> "Scorer | None":
    """Return what scores the checkpoints of a run with prepared data, if the recipe stops early by a metric."""
    if recipe.training.early_stopping_by == "loss":
        return None
    from minisft.evaluation.checkpoint_scorer import CheckpointScorer

    return CheckpointScorer(recipe, run.root)


def _checkpoint_to_resume(recipe: "Recipe", run: "RunFolder", resume: bool) -> Path | None:
    from minisft.console import say
    from minisft.training.checkpoints import latest_resumable, read_metadata
    from minisft.training.device import choose_precision
    from minisft.training.integrity import require_intact
    from minisft.training.resharding import require_reshardable

    if not resume:
        return None
    checkpoint = latest_resumable(run.checkpoints)
    if checkpoint is None and run.is_trained():
        problem = "this run has ended, and no checkpoint is left with the optimizer state that going on needs"
        raise UserError(run.checkpoints, problem, "train again with --force, or into another `output`")
    if checkpoint is None:
        say("no checkpoint to resume from: from the beginning")
        return None
    require_intact(checkpoint)
    require_reshardable(checkpoint, recipe.training, choose_precision(recipe.training.precision))
    strategy, processes = read_metadata(checkpoint)
    say(f"resuming from {checkpoint}, of {strategy} on {processes} process(es)")
    return checkpoint
