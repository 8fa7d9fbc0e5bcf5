"""Resuming under another strategy or number of processes than the one that wrote a checkpoint.

Every layout holds, for each trained parameter, an fp32 weight and AdamW's two moments, and the number of steps.
They are read here, a parameter at a time, from the memory-mapped files of vanilla or DeepSpeed, and copied into the
optimizer of the new layout. Nothing is written, and a process holds one more parameter than it would otherwise.
DeepSpeed's own way (`deepspeed.checkpoint.ds_to_universal`; Lian et al. 2024, "Universal Checkpointing") writes the
complete state to the disk twice, and does not support vanilla; the layout of its files is taken from there. Besides
`zero`, this is the only module that knows DeepSpeed's files.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch

from minisft.errors import UserError
from minisft.optional_packages import is_installed
from minisft.recipe import TrainingRecipe
from minisft.run_folder import step_of
from minisft.training.checkpoints import read_metadata
from minisft.training.zero import MOMENTS, ZERO_STAGES, fill_fp32_masters, fill_zero_engine, plain_zero_state

if TYPE_CHECKING:
    from transformers import Trainer

    from minisft.training.master_weights import MasterWeights


# Optimizers whose state is AdamW's two moments in fp32.
_OPTIMIZERS = ("adamw", "adamw_torch", "adamw_torch_fused")
_WEIGHT = "weight"


def same_layout(checkpoint: Path, strategy: str, processes: int) -> bool:
    """Return whether a strategy on a number of processes can load the state of a checkpoint without conversion.

    Vanilla stores it complete, so any number of processes can load it; DeepSpeed stores shards.
    """
    wrote, count = read_metadata(checkpoint)
    return strategy == wrote and (strategy == "vanilla" or processes == count)


def require_reshardable(checkpoint: Path, training: TrainingRecipe, precision: str) -> None:
    """Refuse a checkpoint that can be resumed neither directly nor by conversion, before anything starts.

    Args:
        checkpoint: Checkpoint to resume from.
        training: Settings to resume with; `auto` takes the strategy that wrote the checkpoint.
        precision: Precision to resume in: fp32, bf16 or fp16.

    Raises:
        UserError: The message gives the reason and the layout that can resume it.
    """
    wrote, count = read_metadata(checkpoint)
    strategy = wrote if training.strategy == "auto" else training.strategy
    if same_layout(checkpoint, strategy, training.processes):
        return
    reason = _obstacle(wrote, training, precision)
    if reason is not None:
        raise UserError(
            checkpoint,
            f"its optimizer state is that of {wrote} on {count} process(es), which {strategy} on "
            f"{training.processes} cannot take over: {reason}",
            f"resume with training.strategy={wrote} training.processes={count} and the batch_size it had",
        )


def _obstacle(wrote: str, training: TrainingRecipe, precision: str) -> str | None:
    if training.optimizer not in _OPTIMIZERS:
        return f"only AdamW's state is converted, and the optimizer is {training.optimizer}"
    if precision == "fp16":
        return "the loss scale of fp16 is not converted"
    if wrote in ZERO_STAGES and not is_installed("deepspeed"):
        return "DeepSpeed, which is not installed, must read it"
    return None


def reshard_state(trainer: "Trainer", checkpoint: Path, masters: "MasterWeights | None") -> None:
    """Load weights, optimizer and schedule of another layout into a trainer that is ready for its first step.

    Args:
        trainer: Trainer whose optimizer or engine is made and has taken no step; every process calls this.
        checkpoint: Checkpoint written under another layout; it is not changed.
        masters: The weights in fp32 that the optimizer updates; None if it updates the model's own, or under ZeRO.

    Raises:
        UserError: The parameters of the checkpoint are not those of the trainer.
    """
    model: Any = trainer.model
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    wrote, processes = read_metadata(checkpoint)
    state: SavedState
    if wrote in ZERO_STAGES:
        state = ShardedState(checkpoint, ZERO_STAGES[wrote], processes)
    else:
        state = UnshardedState(checkpoint, _in_order_of_optimizer(trainer, trained))
    _require_names(checkpoint, state.names(), set(trained))
    if trainer.is_deepspeed_enabled:
        fill_zero_engine(
            trainer.model_wrapped, trained, state.read, state.weight, adam_steps=state.steps, steps=step_of(checkpoint)
        )
    else:
        updated = trained if masters is None else {name: masters.of(weight) for name, weight in trained.items()}
        _fill_optimizer(trainer.optimizer, updated, state)
        if masters is not None:
            masters.round()
    _continue_schedule(trainer, checkpoint)


def restore_fp32_weights(trainer: "Trainer", folder: Path) -> None:
    """Start a new run under ZeRO in half precision with the fp32 weights of its model folder, as vanilla does.

    Args:
        trainer: Trainer whose engine is made and has taken no step; every process calls this.
        folder: Model folder. Weights that are not in fp32 there, or have another name, stay as DeepSpeed rounded them.
    """
    model: Any = trainer.model
    rounded = {
        name: weight
        for name, weight in model.named_parameters()
        if weight.requires_grad and weight.dtype != torch.float32
    }
    if rounded:
        files = _weight_files(folder)
        fill_fp32_masters(trainer.model_wrapped, rounded, lambda name: _weight_in_fp32(files, name))


def _weight_in_fp32(files: dict[str, Path], name: str) -> torch.Tensor | None:
    from safetensors import safe_open

    if name not in files:
        return None
    with safe_open(files[name], "pt") as file:
        if file.get_slice(name).get_dtype() != "F32":
            return None
        weight: torch.Tensor = file.get_tensor(name)
    return weight.flatten()


def _in_order_of_optimizer(trainer: "Trainer", trained: dict[str, Any]) -> list[str]:
    """Return the names of the parameters in the order of the Trainer's optimizer: with decay, then without."""
    decayed = set(trainer.get_decay_parameter_names(trainer.model))  # type: ignore[arg-type]  # of a model, not None
    return sorted(trained, key=lambda name: name not in decayed)  # a stable sort


def _require_names(checkpoint: Path, found: set[str], wanted: set[str]) -> None:
    if found == wanted:
        return
    example = sorted(found ^ wanted)[0]
    raise UserError(
        checkpoint,
        f"its optimizer state is not of this model's parameters: {example} is in one of them only",
        "resume with the strategy and the number of processes that wrote it",
    )


def _fill_optimizer(optimizer: Any, trained: dict[str, Any], state: "SavedState") -> None:
    """Copy state into torch's AdamW, and weights into the parameters that it updates."""
    for name, weight in trained.items():
        weight.data.copy_(state.weight(name).view_as(weight))
        moments = {kind: state.read(name, kind).view_as(weight).to(weight.device) for kind in MOMENTS}
        steps = torch.tensor(state.steps, dtype=torch.float32, device=weight.device)
        optimizer.state[weight] = {"step": steps, **moments}


def _continue_schedule(trainer: "Trainer", checkpoint: Path) -> None:
    """Load the schedule, and set its learning rate in the optimizer.

    It holds lists with an entry for each group of parameters. The entries are equal, but their number differs between
    layouts, since DeepSpeed leaves out an empty group, such as the one without decay in LoRA.
    """
    schedule, optimizer = cast(Any, trainer.lr_scheduler), cast(Any, trainer.optimizer)
    groups = optimizer.param_groups
    saved = torch.load(checkpoint / "scheduler.pt", weights_only=True)
    schedule.load_state_dict(
        {key: value[:1] * len(groups) if isinstance(value, list) else value for key, value in saved.items()}
    )
    for group, rate in zip(groups, schedule.get_last_lr(), strict=True):
        group["lr"] = rate


# --- the state in a checkpoint, by the name of the parameter


class SavedState(Protocol):
    """AdamW's state of each trained parameter, flat and in fp32 on the CPU; the caller may change the tensors."""

    steps: float

    def names(self) -> set[str]: ...

    def read(self, name: str, moment: str) -> torch.Tensor: ...

    def weight(self, name: str) -> torch.Tensor: ...


class UnshardedState:
    """The state that vanilla writes: moments by number, in the optimizer's order, and weights in a plain folder."""

    def __init__(self, checkpoint: Path, order: list[str]) -> None:
        saved = torch.load(checkpoint / "optimizer.pt", map_location="cpu", mmap=True, weights_only=True)
        numbers = [number for group in saved["param_groups"] for number in group["params"]]
        if len(numbers) != len(order):
            problem = f"its optimizer holds {len(numbers)} parameters, and {len(order)} are trained"
            raise UserError(checkpoint, problem, "resume with training.strategy=vanilla")
        # A parameter that never had a gradient has no state.
        self._moments = {name: saved["state"].get(number) for name, number in zip(order, numbers, strict=True)}
        self._files = _weight_files(checkpoint)
        steps = {float(one["step"]) for one in saved["state"].values()}
        if len(steps) != 1:  # DeepSpeed has one number for all parameters
            problem = f"its parameters have taken different numbers of steps, {min(steps):.0f} to {max(steps):.0f}"
            raise UserError(checkpoint, problem, "resume with training.strategy=vanilla")
        [self.steps] = steps

    def names(self) -> set[str]:
        return {name for name in self._moments if _saved_name(name) in self._files}

    def read(self, name: str, moment: str) -> torch.Tensor:
        moments = self._moments[name]
        return torch.zeros_like(self.weight(name)) if moments is None else moments[moment].flatten().float().clone()

    def weight(self, name: str) -> torch.Tensor:
        from safetensors import safe_open

        with safe_open(self._files[_saved_name(name)], "pt") as file:
            saved: torch.Tensor = file.get_tensor(_saved_name(name))
        return saved.flatten().float()


def _weight_files(checkpoint: Path) -> dict[str, Path]:
    """Return the file of each weight of a model folder, or of a folder of adapters."""
    from safetensors import safe_open

    files = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            files.update(dict.fromkeys(file.keys(), path))
    return files


def _saved_name(name: str) -> str:
    """Return the name under which peft saves a weight: without the name of the adapter."""
    return name.replace(".default.", ".") if ".lora_" in name else name


# Tensors of a shard by kind, and the offset and length of the piece of a parameter in them.
_Piece = tuple[dict[str, torch.Tensor], int, int]


class ShardedState:
    """The state that DeepSpeed writes: on each process, pieces of the parameters, concatenated in flat tensors."""

    def __init__(self, checkpoint: Path, stage: int, processes: int) -> None:
        [folder] = checkpoint.glob("global_step*")
        self._pieces: dict[str, list[_Piece]] = {}
        for rank in range(processes):
            for name, piece in _pieces_of_stage_3(folder, rank, processes) if stage == 3 else _pieces(folder, rank):
                self._pieces.setdefault(name, []).append(piece)
        self.steps = max(float(piece[0]["step"]) for pieces in self._pieces.values() for piece in pieces)

    def names(self) -> set[str]:
        return set(self._pieces)

    def read(self, name: str, moment: str) -> torch.Tensor:
        return torch.cat([flat[moment][start : start + size] for flat, start, size in self._pieces[name]]).float()

    def weight(self, name: str) -> torch.Tensor:
        return self.read(name, _WEIGHT)


def _pieces(folder: Path, rank: int) -> Iterator[tuple[str, _Piece]]:
    """Yield the pieces of a shard of stage 1 or 2, which contains a table of them."""
    state = _load_shard(folder, rank, "optim")["optimizer_state_dict"]
    moments = state["base_optimizer_state"]["state"]
    groups = zip(state["param_slice_mappings"], state["single_partition_of_fp32_groups"], strict=True)
    for number, (table, weights) in enumerate(groups):
        for name, piece in table.items():
            yield name, ({_WEIGHT: weights, **moments[number]}, piece.start, piece.numel)


def _pieces_of_stage_3(folder: Path, rank: int, processes: int) -> Iterator[tuple[str, _Piece]]:
    """Yield the pieces of a shard of stage 3: each parameter is split into equal parts, the last one padded."""
    state = _load_shard(folder, rank, "optim")["optimizer_state_dict"]
    shapes = _load_shard(folder, rank, "model")["param_shapes"]
    moments = state["optimizer_state_dict"]["state"]
    for number, (group, weights) in enumerate(zip(shapes, state["fp32_flat_groups"], strict=True)):
        start = 0
        for name, shape in group.items():
            part = math.ceil(shape.numel() / processes)
            size = max(0, min(part, shape.numel() - rank * part))
            yield name, ({_WEIGHT: weights, **moments[number]}, start, size)
            start += part


def _load_shard(folder: Path, rank: int, kind: str) -> dict[str, Any]:
    [path] = folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt")
    with plain_zero_state():
        loaded: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return loaded
