"""The Hugging Face Trainer with padding-free batches and the supervised-token loss.

The loss of an optimizer step is the sum of the cross-entropies of its supervised tokens divided by their
number, over all forwards and all processes. It does not depend on how the batch is split.
"""

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers import GenerationConfig, PrinterCallback, Trainer, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from minisft.console import say, waiting
from minisft.errors import UserError
from minisft.files import apply_umask
from minisft.models import model_class
from minisft.row_losses import append_row_losses, make_records, sync_row_losses
from minisft.training.batching import PackedRow, RowDataset, StepBatch, StepSampler, collate
from minisft.training.callbacks import RestoreSampler, StopRequest
from minisft.training.checkpoints import (
    WriteErrors,
    checkpoints_left,
    publish,
    remove_unfinished,
    staging_folder,
    sync_folder,
    write_error,
    write_metadata,
)
from minisft.training.frozen import unreached_parameters
from minisft.training.held_out import EVAL_LOSS, EarlyStopping, HeldOutRows, is_due
from minisft.training.integrity import explain_damage, forbid_pickled_code
from minisft.training.kernels import KernelChoice
from minisft.training.lora import has_adapters, save_adapters
from minisft.training.loss import EmbeddingLookups, accumulate_embedding_gradient, row_loss, row_losses, unwrapped
from minisft.training.master_weights import MasterWeights, uses_masters
from minisft.training.model_call import PADDING_FREE_CALL, ModelCall
from minisft.training.optimization import clip_gradients
from minisft.training.probe import Probe, ProbeResult, refuse_wrong_model, without_autocast
from minisft.training.resharding import reshard_state, restore_fp32_weights, same_layout
from minisft.training.sequence_parallel import make_group
from minisft.training.source_losses import SourceLosses
from minisft.training.step_metrics import StepMetrics, bytes_sent, peak_memory_mb
from minisft.training.step_row_losses import RowLossBuffer, StepRowLosses
from minisft.training.zero import plain_zero_state, zero_loss_scale, zero_writes_through

_NAMED = 3  # names of frozen parameters in a message
_NEW_RUN = "that makes another run, which needs --force or another `output`"


class SupervisedTokenTrainer(Trainer):
    """Trainer whose batches are the `StepBatch`es of a `StepSampler`.

    To the Trainer an optimizer step is one batch: the split into rows happens inside `training_step`, so its
    own accumulation stays at 1.
    """

    def __init__(
        self,
        *args: Any,
        sampler: StepSampler,
        strategy: str,
        precision: str,
        stop_token_ids: tuple[int, ...],
        describe_rows: Callable[[tuple[int, ...]], str],
        on_saved: Callable[[Path], None],
        base_model_folder: Path | None = None,
        row_losses: Path | None = None,
        sources: SourceLosses | None = None,
        held_out: HeldOutRows | None = None,
        eval_every: str | int | None = None,
        early_stopping: EarlyStopping | None = None,
        sequence_parallel: int = 1,
        **kwargs: Any,
    ) -> None:
        self.sampler = sampler
        self.strategy = strategy
        self.precision = precision
        self.masters: MasterWeights | None = None
        self.stop_token_ids = stop_token_ids
        self.describe_rows = describe_rows
        self.on_saved = on_saved
        self.base_model_folder = base_model_folder
        self.on_probed: Callable[[ProbeResult], None] = lambda result: None
        self.row_losses = row_losses
        self.sources = sources
        self.held_out = held_out
        self.call = PADDING_FREE_CALL
        self.kernels = KernelChoice()
        self.frozen: tuple[str, ...] = ()
        self.saves_invalid_weights = False  # a replay looks at them
        self._staging: str | None = None
        self._writing = WriteErrors()
        super().__init__(*args, **kwargs)
        assert self.args.gradient_accumulation_steps == 1
        if self.accelerator.ddp_handler is not None:
            self.accelerator.ddp_handler.gradient_as_bucket_view = True  # spares DDP two copies of each gradient
        self.sequence_group = make_group(sequence_parallel)
        self._step = StepMetrics()
        self._row_losses = RowLossBuffer()
        self._norm: Any = None
        self.stop = StopRequest()
        self.stops_here = False
        self.pause_at: int | None = None
        self.ended_early = False
        self._mean_loss = math.nan
        self.remove_callback(PrinterCallback)
        self.add_callback(RestoreSampler(sampler))
        self.add_callback(HeldOutLoss(self, eval_every, early_stopping))
        self.add_callback(StopAtStepEnd(self))

    # --- resuming

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """Load the state of a checkpoint as the Trainer does, or convert it if another layout wrote it.

        Raises:
            UserError: The checkpoint is damaged, or holds objects other than plain state, which could run code.
        """
        self.prepare_weights()  # DDP and DeepSpeed choose the parameters of their buckets when they wrap the model
        with explain_damage(resume_from_checkpoint):
            ready = self._prepare_or_resume(max_steps, train_dataloader, resume_from_checkpoint)
        forwards = self.sampler.forwards_per_epoch()
        result = self.probe()
        if result is not None and result.verdict == "alone" and self.is_world_process_zero():
            name = model_class(unwrapped(self._model())).__name__
            say(
                f"note: {name} {result.reason}, so each conversation has its own row: "
                f"{self.sampler.forwards_per_epoch()} forwards an epoch in place of {forwards}"
            )
        return ready

    def prepare_weights(self) -> None:
        """Freeze what no loss can reach, and in bf16 keep fp32 masters; a second call changes nothing."""
        self._freeze_unreached()
        if uses_masters(self.strategy, self.precision, lora=has_adapters(self._model())) and self.masters is None:
            self.masters = MasterWeights(self._model())

    def weights_in_fp32(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the model has its masters; a model without masters keeps its weights."""
        return contextlib.nullcontext() if self.masters is None else self.masters.in_fp32()

    @contextlib.contextmanager
    def arithmetic_of_fp32(self) -> Iterator[None]:
        """Inside the block the model, as vanilla trains it, computes in fp32 with its exact weights."""
        with self.weights_in_fp32(), without_autocast(self._model(), self.args.device):
            yield

    def trained_parameters(self) -> list[torch.nn.Parameter]:
        """Return the parameters that the optimizer updates; without DeepSpeed, `training_step` gives them gradients."""
        trained = [weight for weight in self._model().parameters() if weight.requires_grad]
        return trained if self.masters is None else [self.masters.of(weight) for weight in trained]

    def clear_gradients(self) -> None:
        """Drop the gradients of the trained parameters."""
        for weight in self.trained_parameters():
            weight.grad = None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimizer of the masters, if there are any, and of the model's weights otherwise."""
        if self.masters is None:
            return super().create_optimizer(model)
        with self.masters.in_fp32():
            optimizer = super().create_optimizer(model)
        self.masters.update_with(optimizer)
        return optimizer

    def _freeze_unreached(self) -> None:
        """Freeze the trainable parameters that no loss can reach, and name them.

        ZeRO-3 has sharded the weights by now, so no forward is possible; it trains with such parameters.
        """
        names = [] if self.strategy == "zero3" else unreached_parameters(self._model())
        for name in names:
            self._model().get_parameter(name).requires_grad_(False)
        self.frozen += tuple(names)
        if names and self.is_world_process_zero():
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            shown = ", ".join(names[:_NAMED]) + more
            say(f"note: the loss does not reach these parameters, so they are frozen: {shown}")

    def probe(self) -> ProbeResult | None:
        """Find how the model, as it will train, is right: its attention, its call, and the conversations of a row.

        Raises:
            UserError: The model is wrong for every row, or cannot be called as training calls it.
        """
        name = model_class(unwrapped(self._model())).__name__
        probe = Probe(
            self.model_wrapped,
            self.args.device,
            arithmetic=self.compute_loss_context_manager,
            half=self.precision != "fp32",
            max_length=int(self.sampler.sizes.tokens.max()),
            weights_in_fp32=self.weights_in_fp32,
        )
        result = probe.run()
        if result is None:
            self.call = replace(ModelCall.of(unwrapped(self._model())), sequence_group=self.sequence_group)
            return None
        self.on_probed(result)
        refuse_wrong_model(name, result)
        self.call = replace(result.call, sequence_group=self.sequence_group)
        if self.sequence_group is not None:
            probe.refuse_unshareable_model(self.call, self.sequence_group)
        if result.verdict == "alone":
            self.sampler.row_tokens = 1
            if self.held_out is not None:
                self.held_out.separate_rows()
        return result

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        with explain_damage(resume_from_checkpoint), forbid_pickled_code(folder), self.weights_in_fp32():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.masters is not None:
            self.masters.round()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Warn of weights that a checkpoint lacks, except for tied weights, which are saved once."""
        tied = set(getattr(self._model(), "_tied_weights_keys", None) or ())
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        refusing = forbid_pickled_code(Path(checkpoint)) if checkpoint else contextlib.nullcontext()
        with explain_damage(checkpoint), refusing:
            super()._load_rng_state(checkpoint)

    def _prepare_or_resume(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        checkpoint = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        if checkpoint is None:
            ready = super()._prepare_for_training(max_steps, train_dataloader, None)
            if self.is_deepspeed_enabled and self.base_model_folder is not None:
                restore_fp32_weights(self, self.base_model_folder)
            return ready
        plain = plain_zero_state() if self.is_deepspeed_enabled else contextlib.nullcontext()
        with plain, forbid_pickled_code(checkpoint):
            if same_layout(checkpoint, self.strategy, self.args.world_size):
                return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
            ready = super()._prepare_for_training(max_steps, train_dataloader, None)
            reshard_state(self, checkpoint, self.masters)
            return ready

    # --- batches

    def get_train_dataloader(self) -> DataLoader:  # type: ignore[type-arg]
        """Return a loader of one `StepBatch` per optimizer step; accelerate must not shard it a second time."""
        return DataLoader(
            RowDataset(self.train_dataset),
            batch_sampler=self.sampler,
            collate_fn=collate,
            pin_memory=self.args.device.type == "cuda",
        )

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], None]:
        """Return the batches unchanged: each has its own count of supervised tokens."""
        return list(itertools.islice(epoch_iterator, num_batches)), None

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: the Trainer's estimate knows neither packed rows nor the supervised positions."""
        return 0

    # --- the step

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Run forward and backward of one optimizer step; return the share of this process in the loss.

        The share is multiplied by the number of processes, since gradients and logged losses are averaged
        over them.
        """
        batch: StepBatch = inputs
        started, sent_before = time.perf_counter(), bytes_sent()
        model.train()
        total = torch.zeros((), device=self.args.device)
        self._row_losses.start_step(self.state.global_step + 1, batch.step_rows, self.args.device)
        # DeepSpeed collects the gradients of every backward itself, so those of the embedding are not accumulated.
        deepspeed = self.is_deepspeed_enabled
        lookup = contextlib.nullcontext(EmbeddingLookups()) if deepspeed else accumulate_embedding_gradient(model)
        options = {"scale_wrt_gas": False} if deepspeed else {}  # accelerate must not scale the loss a second time
        mean = self.args.world_size / batch.step_supervised
        backward_factor = self.loss_scale() * mean
        with lookup as lookups:
            for number, row in enumerate(map(self.own_part, batch.rows), 1):
                lookups.last = last = number == len(batch.rows)
                with self._reduction(model, last):
                    with self.compute_loss_context_manager():
                        on_device = row.to(self.args.device)
                        loss, losses = row_losses(model, on_device, self.call, backward_factor=backward_factor)
                    self._row_losses.add(row, losses)
                    loss = loss * mean
                    total += loss.detach()
                    if last:  # DeepSpeed steps inside the last backward
                        self._synchronise_step(total, batch)
                    self.accelerator.backward(loss, **options)
        if self.masters is not None and self.masters.reducing:
            self.masters.collect_reduced()
        if self._row_losses.is_full:
            self._write_row_losses()
        self._step = StepMetrics(batch.step_tokens, batch.step_supervised, started, sent_before)
        return total

    def own_part(self, row: PackedRow) -> PackedRow:
        """Return the part of a row that this process computes: all of it, unless several processes share its tokens."""
        return row if self.sequence_group is None else self.sequence_group.part_of(row)

    def loss_scale(self) -> float:
        """Return the factor by which the next backward multiplies the loss: in fp16 the loss scale, otherwise 1."""
        if not self.args.fp16:
            return 1.0
        if self.is_deepspeed_enabled:
            return zero_loss_scale(self.model_wrapped)
        return float(self.accelerator.scaler.get_scale())

    def _synchronise_step(self, share: torch.Tensor, batch: StepBatch) -> None:
        """Agree over all processes whether one was asked to stop, and whether the loss of the step is finite.

        Raises:
            UserError: The loss is not finite, and has not reached the weights; the message names the step and the rows.
        """
        asked = share.new_tensor(float(self.stop.asked()))
        everyone = self.accelerator.gather(torch.stack([share, asked])[None].float())  # (processes, 2)
        mean_loss, stops = everyone.mean(0).tolist()  # one copy, for which the CPU waits once a step
        self.stops_here, self._mean_loss = stops > 0, mean_loss
        if math.isfinite(mean_loss):
            return
        self._write_row_losses()
        rows = self.describe_rows(tuple(index for row in batch.rows for index in row.indexes))
        raise UserError(
            f"step {self.state.global_step + 1}",
            f"the loss is {mean_loss}; rows of the step: {rows}; {checkpoints_left(Path(str(self.args.output_dir)))}",
            f"look at those rows, or lower training.learning_rate or use precision fp32 or bf16; {_NEW_RUN}",
        )

    @contextlib.contextmanager
    def _reduction(self, model: Any, last: bool) -> Any:
        """Reduce gradients over the processes, and let DeepSpeed step, only in the last backward of a step."""
        self.accelerator.gradient_state._set_sync_gradients(last)
        if self.masters is not None:
            self.masters.reducing = last and self.args.world_size > 1
        if last or self.is_deepspeed_enabled:
            yield
        else:
            with self.accelerator.no_sync(model):
                yield

    # --- the loss on held-out rows

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Log the mean loss over the supervised tokens of the held-out rows, which the processes share."""
        assert self.held_out is not None
        started = time.perf_counter()
        with waiting("computing the held-out loss"), self.compute_loss_context_manager():
            share = self.held_out.sum_of_losses(
                self.model_wrapped,
                lambda model, row: row_loss(model, self.own_part(row).to(self.args.device), self.call),
            )
        total = float(self.accelerator.gather(share.reshape(1).to(self.args.device)).sum())
        logs = {EVAL_LOSS: total / self.held_out.supervised, "eval_seconds": time.perf_counter() - started}
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    # --- what is logged

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the fields of `metrics.jsonl` to the log of a step; the loss is that of the step alone."""
        if "loss" in logs:
            logs["loss"] = self._mean_loss
            logs.update(self._step.as_logs(), peak_memory_mb=self._largest(peak_memory_mb()))
            newest = self._write_row_losses()
            if self.sources is not None and newest is not None:
                logs.update(self.sources.log(newest))
        super().log(logs, start_time)

    def _write_row_losses(self) -> StepRowLosses | None:
        """Append the losses of the rows since the last call to their file; return the newest step, if there is one."""
        steps = self._row_losses.collect(self.accelerator.gather)
        if steps and self.args.should_save and self.row_losses is not None:
            supervised = self.sampler.sizes.supervised
            records = [make_records(one.step, one.rows, one.sums / supervised[one.rows]) for one in steps]
            append_row_losses(self.row_losses, np.concatenate(records))
        return steps[-1] if steps else None

    def _largest(self, value: float) -> float:
        """Return the largest value of all processes."""
        if self.args.world_size == 1:
            return value
        return float(self.accelerator.gather(torch.tensor([value], device=self.args.device)).max())

    def _clip_grad_norm(self, model: Any) -> Any:
        if self.args.device.type == "cpu" and not (self.is_deepspeed_enabled or self.args.fp16):
            return clip_gradients(self.trained_parameters(), self.args.max_grad_norm)
        if self.masters is not None:
            return torch.nn.utils.clip_grad_norm_(self.trained_parameters(), self.args.max_grad_norm)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        self._norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self._norm

    # --- checkpoints: complete or absent

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write to a temporary folder, and rename it when every process has written its part.

        Raises:
            UserError: The gradient of the step was not finite, so the weights are invalid; or the file system refused.
        """
        # fp16 skips such a step.
        accepted = self._norm is None or self.args.fp16 or self.saves_invalid_weights
        if not (accepted or math.isfinite(float(self._norm))):
            left = checkpoints_left(Path(str(self.args.output_dir)))
            raise UserError(
                f"step {self.state.global_step}",
                f"the gradient norm is {float(self._norm)}, so no checkpoint was written of this step; {left}",
                f"lower training.learning_rate or use precision fp32; {_NEW_RUN}",
            )
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder = Path(str(self.args.output_dir))
        staging = staging_folder(folder)
        self._staging, self._writing = str(staging), WriteErrors()
        self._write_row_losses()
        with waiting(f"saving {name}"):
            try:
                with self._writing:
                    super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            self._synchronise_write_errors(name)  # every process has written its part
            if self.args.should_save:
                self._writing(write_metadata, staging / name, self.strategy, self.args.world_size)
                self._writing(apply_umask, staging / name)
                self._writing(sync_folder, staging / name)
                if self.row_losses is not None:
                    self._writing(sync_row_losses, self.row_losses)
                self._writing(publish, staging / name, folder / name)
            self._synchronise_write_errors(name)
            if self.args.should_save:
                self.on_saved(folder / name)

    def _synchronise_write_errors(self, name: str) -> None:
        """Agree over all processes whether the file system refused one of them a write.

        Raises:
            UserError: It did; the unfinished checkpoint is deleted.
        """
        failed = torch.tensor([float(self._writing.failure is not None)], device=self.args.device)
        if not self.accelerator.gather(failed).any():
            return
        folder = Path(str(self.args.output_dir))
        if self.args.should_save:
            remove_unfinished(folder)
        reasons = gather_object([self._writing.failure])
        reason = next(str(one) for one in reasons if one is not None)
        raise write_error(folder / name, "the checkpoint could not be written", reason)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        engine = self.model_wrapped if self.is_deepspeed_enabled else None
        with zero_writes_through(engine, self._writing):
            super()._save_optimizer_and_scheduler(output_dir)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; under ZeRO-1 and ZeRO-2 only the process that writes copies the weights, which all have."""
        if self.args.should_save or self.strategy not in ("zero1", "zero2"):
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            self._writing(self._save_plain, output_dir, state_dict)

    def _save_plain(self, output_dir: str | None, state_dict: dict[str, Any] | None) -> None:
        """Save a plain folder: the model, or its adapters alone, with tokenizer and the trained terminators."""
        folder = Path(str(output_dir))
        # The Trainer has set the EOS of the tokenizer, which may differ from the trained terminator.
        set_stop_tokens(self._model(), self.stop_token_ids)
        self._model().config.use_cache = True  # it was switched off for training
        if has_adapters(self._model()):
            save_adapters(self._model(), folder, state_dict)
            cast(Any, self.processing_class).save_pretrained(folder)
            return
        with self.weights_in_fp32():
            super()._save(output_dir, self._without_tied(state_dict))
        # Its pickled arguments contain paths of this machine, and nothing reads them.
        Path(folder, TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _without_tied(self, state_dict: dict[str, Any] | None) -> dict[str, Any] | None:
        """Remove the second copy of tied weights, which ZeRO-1 and ZeRO-2 would write."""
        if state_dict is None or not getattr(self._model().config, "tie_word_embeddings", False):
            return state_dict
        tied = set(getattr(self._model(), "_tied_weights_keys", None) or ())
        return {name: weight for name, weight in state_dict.items() if name not in tied}

    def _model(self) -> Any:
        assert self.model is not None
        return self.model


def set_stop_tokens(model: Any, stop_token_ids: tuple[int, ...]) -> None:
    """Set a greedy generation config whose stop tokens are the trained terminators."""
    pad = model.generation_config.pad_token_id if model.generation_config else None
    stop = list(stop_token_ids)
    model.generation_config = GenerationConfig(
        bos_token_id=getattr(model.config.get_text_config(), "bos_token_id", None),  # not every class has one
        eos_token_id=stop if len(stop) > 1 else stop[0],
        pad_token_id=pad if pad is not None else stop[0],
    )


class HeldOutLoss(TrainerCallback):
    """Compute the held-out loss when it is due, in the log of its step, and end the run when it no longer falls."""

    def __init__(
        self, trainer: SupervisedTokenTrainer, every: str | int | None, early_stopping: EarlyStopping | None
    ) -> None:
        self.trainer, self.every, self.early_stopping = trainer, every, early_stopping

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        epoch_steps = len(self.trainer.sampler)
        if is_due(state.global_step, every=self.every, epoch_steps=epoch_steps, last=state.max_steps):
            control.should_evaluate = control.should_log = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rule = self.early_stopping
        if rule is not None and rule.key == EVAL_LOSS and rule.ends(state.log_history):
            self.trainer.ended_early = True
            control.should_save = control.should_training_stop = True


class StopAtStepEnd(TrainerCallback):
    """Save and end at the step of a pause, or where the processes agreed to stop; an epoch's end saves no more."""

    def __init__(self, trainer: SupervisedTokenTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.trainer.pause_at:
            self.trainer.stops_here = True
        if self.trainer.stops_here:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.stops_here or self.trainer.ended_early:
            control.should_save = False
