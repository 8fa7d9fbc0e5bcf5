"""Training, from a prepared data set to checkpoints and the final model."""

import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisft.console import say
from minisft.data.encoder import Encoder
from minisft.errors import StoppedError, UserError
from minisft.manifest import record_files, refuse_foreign_files
from minisft.models import ResolvedModel, load_config, load_model, load_tokenizer, resolve_model
from minisft.optional_packages import not_installed
from minisft.output_filters import suppress_known_warnings
from minisft.recipe import Recipe, TrainingRecipe
from minisft.row_losses import truncate_row_losses
from minisft.run_folder import (
    RunFolder,
    delete_replaced_run,
    read_kernels,
    recorded_threads,
    step_of,
    trust_arguments,
    write_environment,
    write_resolved_recipe,
)
from minisft.training.callbacks import listen_for_stop
from minisft.training.checkpoints import (
    explain_failed_writes,
    is_last,
    last_step,
    prune,
    publish_final_model,
    read_metadata,
    remove_unfinished,
)
from minisft.training.device import (
    choose_precision,
    default_tokens_per_forward,
    describe_environment,
    explain_missing_kernels,
    keep_threads,
    on_cpu,
    prepare_cpu_memory,
    require_processes,
    use_deterministic_kernels,
    use_expandable_segments,
)
from minisft.training.distributed import is_joined, launch
from minisft.training.kernels import KernelChoice, require_kernels, use_kernels
from minisft.training.master_weights import uses_masters
from minisft.training.nodes import Nodes, local_processes, use_network_interface
from minisft.training.optimization import (
    clipping_norm,
    own_optimizer,
    require_optimizer,
    require_schedule,
    trainer_name,
)
from minisft.training.sequence_parallel import require_divisible
from minisft.training.step_metrics import start_counting
from minisft.training.zero import (
    COLLECTIVE_TIMEOUT,
    ZERO_STAGES,
    deepspeed_config,
    require_deepspeed,
    set_deepspeed_environment,
    start_communication,
)

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from minisft.training.checkpoint_scores import Scorer
    from minisft.training.held_out import EarlyStopping, HeldOutRows
    from minisft.training.trainer import SupervisedTokenTrainer


_WORKER = "minisft.training_worker"
PAUSE_OPTION = "--pause-at="  # of the worker
# Packages whose name is not that of the tracker.
# Reversible layers (Kitaev et al. 2020, arXiv 2001.04451): benchmarks/models.py found another gradient norm.
_OWN_BACKWARD = ("reformer",)
_TRACKER_PACKAGES = {
    "azure_ml": "azureml-core",
    "comet_ml": "comet-ml",
    "dagshub": "dagshub mlflow",
    "flyte": "flytekit",
}


def require_feasible(recipe: Recipe, nodes: Nodes | None = None) -> None:
    """Check what the recipe asks of this machine, before anything is read or written.

    Raises:
        UserError: The recipe asks for something that this machine or its libraries do not have.
    """
    training = recipe.training
    if nodes is not None and is_joined():
        raise UserError("--nodes", "another launcher started this process", "leave it out")
    if nodes is not None and training.strategy == "auto":
        fix = f"name a strategy; `minisft plan` with --nodes {nodes.count} says which one"
        raise UserError("training.strategy", "auto tries strategies on a single machine only", fix)
    set_deepspeed_environment(on_cpu())
    require_optimizer(training.optimizer)
    require_schedule(training)
    _check_trackers(training)
    choose_precision(training.precision)
    require_kernels(training.kernels, training.strategy, "cpu" if on_cpu() else "cuda")
    if training.lora is not None:
        from minisft.training.lora import require_quantisation

        require_quantisation(training.lora)
    if not is_joined():
        require_processes(local_processes(training.processes, nodes))
    if training.strategy in ZERO_STAGES:
        require_deepspeed(training.strategy, on_cpu())


def train(
    recipe: Recipe,
    run: RunFolder,
    resume_from: Path | None = None,
    nodes: Nodes | None = None,
    callbacks: Sequence["TrainerCallback"] = (),
    pause_at: int | None = None,
    scorer: "Scorer | None" = None,
) -> None:
    """Train in this process, with the caller's own `callbacks`, or in processes that this one starts.

    Args:
        recipe: The recipe.
        run: The run folder, with its prepared data.
        resume_from: The checkpoint to resume from.
        nodes: The machines that train together; None: this one alone.
        callbacks: Callbacks of the Trainer.
        pause_at: Step after which to end with a checkpoint, from which a later call resumes; None: train to the end.
        scorer: Scores checkpoints, for early stopping by a metric; started processes make their own.

    Raises:
        UserError: The model or the data cannot be trained with this recipe.
        StoppedError: SIGINT or SIGTERM came, and a checkpoint was written.
    """
    if resume_from is not None and _is_finished(resume_from, recipe.training, scorer):
        _certify_and_publish(run)  # the process ended before this was done
        return
    training = recipe.training
    if training.processes == 1 and training.strategy not in ZERO_STAGES:
        train_in_this_process(recipe, run, resume_from, callbacks, pause_at, scorer)
        return
    arguments = [str(run.root), *([str(resume_from)] if resume_from else []), *trust_arguments(recipe)]
    arguments += [] if pause_at is None else [f"{PAUSE_OPTION}{pause_at}"]
    if nodes is not None:
        use_network_interface(nodes)
    launch(_WORKER, arguments, local_processes(training.processes, nodes), nodes)
    if not run.is_trained() and (pause_at is None or step_of(run.list_checkpoints()[-1]) < pause_at):
        raise _stopped(run)


def _is_finished(checkpoint: Path, training: TrainingRecipe, scorer: "Scorer | None") -> bool:
    from minisft.training.checkpoint_scores import early_stopping_of

    return is_last(checkpoint, early_stopping_of(training, scorer), last_step(checkpoint, training))


def extend_run(recipe: Recipe, run: RunFolder, checkpoint: Path, scorer: "Scorer | None" = None) -> None:
    """Write a recipe that has more epochs or steps than the run; `model/` is removed, and written again at the new end.

    Nothing is lost: `model/` is a copy of the last checkpoint. If the process is killed between the two, the run is in
    the state that it had before its end.
    """
    if _is_finished(checkpoint, recipe.training, scorer):
        return
    refuse_foreign_files(run.model)
    if run.model.exists():
        shutil.rmtree(run.model.resolve())  # a link stays, and leads to the new model
    write_resolved_recipe(run, recipe)


def train_in_this_process(
    recipe: Recipe,
    run: RunFolder,
    resume_from: Path | None,
    callbacks: Sequence["TrainerCallback"] = (),
    pause_at: int | None = None,
    scorer: "Scorer | None" = None,
) -> None:
    """Train in this process to the end, and make `model/` from the last checkpoint; or only to the step `pause_at`.

    Raises:
        UserError: The model or the data cannot be trained with this recipe.
        StoppedError: SIGINT or SIGTERM came, and a checkpoint was written.
    """
    import torch

    from minisft.training.checkpoint_scores import early_stopping_of

    trainer = run_steps(recipe, run, resume_from, callbacks, pause_at, scorer)
    trainer.accelerator.wait_for_everyone()
    stopped = trainer.state.global_step < trainer.state.max_steps and not trainer.ended_early
    if trainer.ended_early and trainer.is_world_process_zero():
        say(f"stopped early at step {trainer.state.global_step}: {early_stopping_of(recipe.training, scorer)}")
    if trainer.args.should_save and not stopped:
        _certify_and_publish(run)
    trainer.accelerator.wait_for_everyone()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if stopped and trainer.state.global_step != pause_at:
        raise _stopped(run)


def _certify_and_publish(run: RunFolder) -> None:
    """Write the certificate, and make `model/`: a run that is trained has its certificate."""
    from minisft.training.certificate import write_certificate

    with explain_failed_writes(run.model):
        write_certificate(run)
        publish_final_model(run)


def _stopped(run: RunFolder) -> StoppedError:
    return StoppedError(
        f"stopped as asked; {run.list_checkpoints()[-1]} holds the complete state, and --resume continues from it"
    )


def run_steps(
    recipe: Recipe,
    run: RunFolder,
    resume_from: Path | None,
    callbacks: Sequence["TrainerCallback"] = (),
    pause_at: int | None = None,
    scorer: "Scorer | None" = None,
) -> "SupervisedTokenTrainer":
    """Take the steps of a run and write its checkpoints; return the trainer, which holds the model."""
    from minisft.training.checkpoint_scores import CheckpointScores, early_stopping_of

    early_stopping = early_stopping_of(recipe.training, scorer)
    trainer = make_trainer(recipe, run, resume_from, early_stopping=early_stopping)
    trainer.pause_at = pause_at
    for callback in callbacks:
        trainer.add_callback(callback)
    if scorer is not None and early_stopping is not None:
        scores = CheckpointScores(trainer, scorer, early_stopping, recipe.training)
        if resume_from is not None and scores.ends_with(resume_from):
            return trainer
        trainer.add_callback(scores)
    take_steps(trainer, run, resume_from)
    return trainer


def make_trainer(
    recipe: Recipe,
    run: RunFolder,
    resume_from: Path | None = None,
    build: Callable[..., Any] | None = None,
    early_stopping: "EarlyStopping | None" = None,
) -> "SupervisedTokenTrainer":
    """Load the model and make the trainer for the data of a run folder.

    1. communication  2. arguments  3. model and tokenizer  4. trainer

    Args:
        recipe: The recipe.
        run: The run folder, with prepared data.
        resume_from: The checkpoint from which training will go on.
        build: Makes the model from its folder, with the arguments of `load_model`, and needs no weights; None loads it.
        early_stopping: What ends the run before its last step.
    """
    import torch

    suppress_known_warnings()
    prepare_cpu_memory(recipe.training.strategy, choose_precision(recipe.training.precision), on_cpu())
    use_expandable_segments(on_cpu())
    use_deterministic_kernels(recipe.training.deterministic)
    start_counting()
    if recipe.training.strategy in ZERO_STAGES and not torch.distributed.is_initialized():
        start_communication(on_cpu())
    arguments = _arguments(recipe, run)
    resolved = resolve_model(recipe.model, recipe.trust_remote_code, weights=build is None)
    tokenizer = load_tokenizer(resolved.folder, recipe.trust_remote_code)
    encoder = Encoder(tokenizer, recipe.data.template, recipe.data.template_options)
    if recipe.training.sequence_parallel > 1:
        config = load_config(resolved.folder, recipe.trust_remote_code)
        require_divisible(config, recipe.training.sequence_parallel, arguments.world_size)
    model = _load_for_training(recipe, resolved, arguments.device, build or load_model)
    kernels = KernelChoice(recipe.training.kernels)
    if build is None:  # without weights nothing can be compared
        resumed = None if resume_from is None else read_kernels(run)
        kernels = use_kernels(model, recipe.training, arguments.device, resumed)
    model = _with_adapters(recipe, model, resolved)
    tokenizer.chat_template = encoder.chat_template
    begun_at = _start_step(resume_from)
    trainer = _trainer(recipe, run, model, encoder, arguments, begun_at, resolved.folder, early_stopping)
    trainer.kernels = kernels
    if kernels.reason and not on_cpu() and trainer.is_world_process_zero():
        say(f"note: training.kernels is none: {kernels.reason}")
    return trainer


def take_steps(trainer: "SupervisedTokenTrainer", run: RunFolder, resume_from: Path | None = None) -> None:
    """Train, from the beginning or from a checkpoint, until the last step or until asked to stop."""
    from minisft.training.callbacks import OnFirstStep, ShowProgress, truncate_metrics

    if resume_from is not None and read_metadata(resume_from)[1] == trainer.args.world_size:
        keep_threads(recorded_threads(run))
    progress = ShowProgress(f"training {run.root}")
    if trainer.is_world_process_zero():
        trainer.add_callback(progress)
    if trainer.args.should_save:
        remove_unfinished(run.checkpoints)
        trainer.add_callback(OnFirstStep(partial(delete_replaced_run, run)))
        truncate_metrics(run.metrics, _start_step(resume_from))
        truncate_row_losses(run.row_losses, _start_step(resume_from))
        environment = describe_environment(trainer.precision) | {"kernels": trainer.kernels.as_dict()}
        write_environment(run, environment)
        trainer.on_probed = lambda result: write_environment(
            run, environment | {"probe": result.as_dict() | {"frozen": list(trainer.frozen)}}
        )
    with (
        progress.shown(),
        explain_failed_writes(run.root),
        explain_missing_kernels(),
        listen_for_stop() as trainer.stop,
    ):
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)


def _start_step(resume_from: Path | None) -> int:
    return step_of(resume_from) if resume_from else 0


def _check_trackers(training: TrainingRecipe) -> None:
    """Make sure that the trackers of a recipe are installed."""
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    here = get_available_reporting_integrations()
    for name in training.report_to:
        if name in here:
            continue
        if name in INTEGRATION_TO_CALLBACK:
            raise not_installed("training.report_to", name, _TRACKER_PACKAGES.get(name, name), f"leave {name} out")
        fix = f"use one of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
        raise UserError("training.report_to", f"there is no tracker {name!r}", fix)


def _arguments(recipe: Recipe, run: RunFolder) -> Any:
    """Translate the recipe into TrainingArguments; made before the model, so that ZeRO-3 shards its loading."""
    from transformers import TrainingArguments

    training = recipe.training
    precision = choose_precision(training.precision)
    masters = uses_masters(training.strategy, precision, lora=training.lora is not None)
    arguments = TrainingArguments(
        output_dir=str(run.checkpoints),
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=1,  # the split of a step happens inside training_step
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        optim=trainer_name(training.optimizer),
        lr_scheduler_type=training.scheduler,
        lr_scheduler_kwargs=dict(training.scheduler_args),
        warmup_steps=training.warmup_ratio,  # below 1 it is a fraction of all steps
        max_grad_norm=clipping_norm(training),
        bf16=precision == "bf16" and not masters,  # autocast, or DeepSpeed's bf16 weights
        fp16=precision == "fp16",
        save_strategy="epoch" if training.save_every == "epoch" else "steps",
        save_steps=500 if training.save_every == "epoch" else training.save_every,  # 500: unused default
        logging_strategy="steps",
        logging_steps=training.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would hide a loss that is not finite
        seed=recipe.seed,
        report_to=training.report_to or "none",
        use_cpu=on_cpu(),
        ddp_backend=("gloo" if on_cpu() else "nccl") if is_joined() else None,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # buffers are constants here, such as the frequencies of rotary embeddings
        ddp_timeout=int(COLLECTIVE_TIMEOUT.total_seconds()),
        remove_unused_columns=False,
        disable_tqdm=True,
        deepspeed=deepspeed_config(
            training.strategy,
            precision=precision,
            max_grad_norm=clipping_norm(training),
            batch_size=training.batch_size,
            offload=training.offload,
            on_cpu=on_cpu(),
        ),
    )
    arguments.device  # noqa: B018 (it counts the GPUs)
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs in one process would mean DataParallel
    return arguments


def _load_for_training(recipe: Recipe, resolved: ResolvedModel, device: Any, load: Callable[..., Any]) -> Any:
    """Load fp32 weights: those that the optimizer updates are fp32 in every precision."""
    import torch
    from transformers import set_seed

    from minisft.training import attention
    from minisft.training.lora import frozen_dtype, quantised_loading

    lora, precision = recipe.training.lora, choose_precision(recipe.training.precision)
    set_seed(recipe.seed)
    attention.register()
    dtype, options = torch.float32, {}
    if lora is not None:
        dtype, options = frozen_dtype(precision), quantised_loading(lora, precision, device)
    model = load(
        resolved.folder,
        dtype=dtype,
        attention=attention.PADDING_FREE,
        trust_remote_code=recipe.trust_remote_code,
        **options,
    )
    if model.config.model_type in _OWN_BACKWARD:
        problem = (
            f"the layers of {type(model).__name__} have a backward of their own, whose gradients differ in training"
        )
        raise UserError("model", problem, "use another model")
    if recipe.training.gradient_checkpointing and not model.supports_gradient_checkpointing:
        problem = f"{type(model).__name__} of transformers does not support it"
        raise UserError("training.gradient_checkpointing", problem, "set it to false")
    if recipe.training.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and recipe.data.max_length > limit:
        say(f"note: the model knows {limit} positions, and data.max_length allows {recipe.data.max_length}")
    return model


def _with_adapters(recipe: Recipe, model: Any, resolved: ResolvedModel) -> Any:
    """Return the model with adapters, if the recipe has LoRA."""
    from minisft.training.lora import add_lora, modules_without_adapters

    lora = recipe.training.lora
    if lora is None:
        return model
    excluded = modules_without_adapters(model) if lora.target_modules == "all-linear" else None
    if excluded is not None:
        say(f"note: no adapters for {', '.join(excluded)}: the kernels of Mamba layers would not read them")
    return add_lora(model, lora, base_name=resolved.loads_as, seed=recipe.seed)


def _trainer(
    recipe: Recipe,
    run: RunFolder,
    model: Any,
    encoder: Encoder,
    arguments: Any,
    begun_at: int,
    base_model_folder: Path,
    early_stopping: "EarlyStopping | None",
) -> "SupervisedTokenTrainer":
    from transformers.integrations import TensorBoardCallback

    from minisft.data.prepared import load_split, read_ledger
    from minisft.training.batching import StepSampler, measure_lengths
    from minisft.training.callbacks import MetricsFile
    from minisft.training.source_losses import sources_of
    from minisft.training.trainer import SupervisedTokenTrainer

    training = recipe.training
    dataset = load_split(run.root, "train")
    sizes = measure_lengths(dataset)
    shards = training.sequence_parallel
    replicas, replica = arguments.world_size // shards, arguments.process_index // shards
    row_tokens = training.row_tokens or default_tokens_per_forward(on_cpu()) * shards
    sources = sources_of(dataset, read_ledger(run.root / "dataset"), sizes.supervised)
    sampler = StepSampler(
        sizes,
        global_batch=training.batch_size * replicas * training.gradient_accumulation,
        row_tokens=row_tokens,
        processes=replicas,
        rank=replica,
        seed=recipe.seed,
        pack_tokens=recipe.data.max_length if training.packing else None,
    )
    trainer = SupervisedTokenTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        processing_class=encoder.tokenizer,
        sampler=sampler,
        strategy=training.strategy,
        precision=choose_precision(training.precision),
        stop_token_ids=encoder.stop_token_ids,
        describe_rows=lambda rows: ", ".join(str(dataset[row].get("id", row)) for row in rows),
        on_saved=partial(prune, run, training, early_stopping),
        base_model_folder=base_model_folder,
        held_out=_held_out(recipe, run, row_tokens, replicas, replica),
        eval_every=training.eval_every,
        early_stopping=early_stopping,
        optimizer_cls_and_kwargs=own_optimizer(training.optimizer, training.learning_rate),
        row_losses=run.row_losses,
        sources=sources,
        sequence_parallel=shards,
        callbacks=[MetricsFile(run.metrics, sources)],
    )
    if trainer.is_world_process_zero():
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(run.tensorboard), purge_step=begun_at + 1)
        record_files(*run.tensorboard.glob(f"events.out.tfevents.*.{os.getpid()}.*"))
        trainer.add_callback(TensorBoardCallback(writer))
    return trainer


def _held_out(recipe: Recipe, run: RunFolder, row_tokens: int, replicas: int, replica: int) -> "HeldOutRows | None":
    """Return the held-out rows of one of `replicas` copies of the model, if the recipe asks for their loss."""
    from minisft.data.prepared import load_split
    from minisft.training.held_out import HeldOutRows

    if recipe.training.eval_every is None:
        return None
    dataset = load_split(run.root, "test")
    if len(dataset) == 0:
        problem = "there are no held-out conversations to compute a loss on"
        raise UserError("training.eval_every", problem, "set data.test_fraction above 0, or data.test, and train again")
    return HeldOutRows(dataset, row_tokens=row_tokens, processes=replicas, rank=replica)
