"""Sequence parallelism: the processes of a group share the tokens of each row.

DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv 2309.14509): every process computes its part of a row's tokens, and only
attention needs the others. Before it an all-to-all exchanges parts of the tokens for parts of the heads, so that each
process attends over the complete row with some of the heads; behind it another one exchanges them back. A process
keeps the activations of tokens / N, and the loss of a row is the sum over the group, exactly.

The exchange is torch's, with a backward of its own. DeepSpeed's wrapper for transformers
(`deepspeed.runtime.sequence_parallel.ulysses_sp`, Arctic Long Sequence Training, arXiv 2506.13996) takes one attention
implementation of transformers for the complete process, and rows as its own loader divides them; MiniSFT's attention
takes the lengths of the conversations of a row. Gradients need nothing more than the mean over all processes that DDP
and every ZeRO stage compute anyway, so each of them works with it, and ZeRO-3 shards over all processes.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from minisft.errors import UserError
from minisft.training.batching import PackedRow

WHERE = "training.sequence_parallel"
# Rotary embeddings whose frequencies depend on the longest position of a forward, which differs between the parts.
_VARIABLE_ROTARY = ("dynamic", "longrope")


@dataclass(frozen=True)
class SequenceGroup:
    """The processes that share the tokens of a row.

    Attributes:
        group: Their process group.
        size: Number of processes.
        rank: Rank of this process among them.
    """

    group: Any
    size: int
    rank: int

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size

    def part_of(self, row: PackedRow) -> PackedRow:
        """Return this process's part of a complete row.

        A row is filled up to a multiple of `size` with a conversation without supervised tokens, which changes nothing
        for the others.
        """
        missing = -row.input_ids.shape[1] % self.size
        ids, positions, lengths = row.input_ids, row.position_ids, row.lengths
        if missing:
            filling = torch.arange(missing)[None]
            ids = torch.cat([ids, torch.zeros_like(filling)], 1)
            positions = torch.cat([positions, filling], 1)
            lengths = (*lengths, missing)
        share = ids.shape[1] // self.size
        start = self.rank * share
        own = (row.predict_at >= start) & (row.predict_at < start + share)
        return replace(
            row,
            input_ids=ids[:, start : start + share].contiguous(),
            position_ids=positions[:, start : start + share].contiguous(),
            lengths=lengths,
            predict_at=row.predict_at[own] - start,
            targets=row.targets[own],
            shards=self.size,
            start=start,
        )

    def gather_tokens(self, heads: torch.Tensor) -> torch.Tensor:
        """Return some heads of all tokens, (1, heads / size, tokens, head size).

        Args:
            heads: All heads of this process's tokens, (1, heads, tokens / size, head size).
        """
        _, count, tokens, width = heads.shape
        parts = heads[0].reshape(self.size, count // self.size, tokens, width)
        received: torch.Tensor = _Exchange.apply(parts, self.group)  # (size, heads / size, tokens / size, head size)
        return received.transpose(0, 1).reshape(1, count // self.size, self.size * tokens, width)

    def gather_heads(self, output: torch.Tensor) -> torch.Tensor:
        """Return all heads of this process's tokens, (1, tokens / size, heads, head size).

        Args:
            output: Some heads of all tokens, (1, tokens, heads / size, head size).
        """
        _, tokens, count, width = output.shape
        parts = output[0].reshape(self.size, tokens // self.size, count, width)
        received: torch.Tensor = _Exchange.apply(parts, self.group)  # (size, tokens / size, heads / size, head size)
        return received.transpose(0, 1).reshape(1, tokens // self.size, self.size * count, width)

    def own_part(self, per_head: torch.Tensor) -> torch.Tensor:
        """Return the values of this process's heads, (heads / size,), of those of all heads, (heads,)."""
        return per_head.chunk(self.size)[self.rank]

    def repeat_key_heads(self, states: torch.Tensor, heads: int) -> torch.Tensor:
        """Return keys or values, (1, key heads, tokens, head size), with as few copies as divide among the processes.

        Args:
            states: Keys or values.
            heads: Number of query heads, a multiple of `size` and of the key heads.
        """
        key_heads = states.shape[1]
        divide = (
            times
            for times in range(1, heads // key_heads + 1)
            if key_heads * times % self.size == 0 and heads % (key_heads * times) == 0
        )
        times = next(divide)  # at the latest that which gives every query head its own
        return states if times == 1 else states.repeat_interleave(times, 1)

    def largest(self, value: float, device: torch.device) -> float:
        """Return the largest value of the group's processes."""
        found = torch.tensor([value], device=device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=self.group)
        return float(found)


class _Exchange(torch.autograd.Function):
    """All-to-all of equal parts, (size, ...): part p goes to process p. It is its own transpose."""

    @staticmethod
    def forward(ctx: Any, parts: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return _exchange(parts, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return _exchange(gradient, ctx.group), None


def _exchange(parts: torch.Tensor, group: Any) -> torch.Tensor:
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    torch.distributed.all_to_all_single(received, parts, group=group)
    return received


def make_group(size: int) -> SequenceGroup | None:
    """Return the group of this process, of `size` consecutive ranks; None for 1. Every process calls it."""
    if size == 1:
        return None
    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    groups = [torch.distributed.new_group(list(range(first, first + size))) for first in range(0, processes, size)]
    return SequenceGroup(groups[rank // size], size, rank % size)


def require_divisible(config: Any, size: int, processes: int) -> None:
    """Check that `size` of so many processes can share the rows of a model, as far as its configuration says.

    Raises:
        UserError: The processes or the heads cannot be divided, or a position depends on the complete row.
    """
    if size == 1:
        return
    if processes % size:  # another launcher may start more or fewer than the recipe says
        problem = f"{size} does not divide the {processes} processes of this launch"
        raise UserError(WHERE, problem, "give a divisor of their number")
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    if isinstance(heads, int) and heads % size:
        largest = next(number for number in range(size, 0, -1) if heads % number == 0)
        problem = f"{size} processes cannot share the {heads} attention heads of the model"
        raise UserError(WHERE, problem, f"give a divisor of {heads}, such as {largest}")
    rotary = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds = [one.get("rope_type") for one in (rotary, *rotary.values()) if isinstance(one, dict)]
    variable = next((kind for kind in kinds if kind in _VARIABLE_ROTARY), None)
    if variable is not None:
        problem = f"the rotary embedding of the model ({variable}) depends on the longest position of a forward"
        raise UserError(WHERE, problem, "leave it out")
