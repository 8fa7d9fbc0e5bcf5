"""Padding-free batches: which conversations make which optimizer step, on which process, in which forward.

A step is a fixed set of conversations, whatever the number of processes and the split of the batch: the
epoch's permutation, cut into global batches; with packing, the epoch's packs, cut in the same way. Every process
computes the same plan from the lengths alone, so nothing has to be communicated: the conversations of a step
are distributed over the processes by length, and each process concatenates its share in rows of at most
`row_tokens` tokens, one forward and backward each.
"""

import bisect
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

IGNORED = -100

_Partition = list[tuple[int, list[int]]]  # tokens and positions of the share of each process, largest first


@dataclass(frozen=True)
class PackedRow:
    """Conversations concatenated for one forward, without padding.

    Attributes:
        input_ids: (1, tokens).
        position_ids: (1, tokens), restarting at 0 at the start of each conversation.
        lengths: tokens of each conversation, in order; they sum to `tokens`.
        predict_at: (supervised,) positions in the row whose next token is supervised.
        targets: (supervised,) ids of those next tokens.
        indexes: Dataset rows of the conversations, for messages about them.
        shards: Number of processes that share the row's tokens (`training.sequence_parallel`). With several, `tokens`
            and `predict_at` are those of this process's part, and `lengths` those of the complete row.
        start: Position in the complete row at which the part starts.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    lengths: tuple[int, ...]
    predict_at: torch.Tensor
    targets: torch.Tensor
    indexes: tuple[int, ...]
    shards: int = 1
    start: int = 0

    def __post_init__(self) -> None:
        assert self.input_ids.shape == self.position_ids.shape == (1, sum(self.lengths) // self.shards)
        assert sum(self.lengths) % self.shards == 0
        assert self.predict_at.shape == self.targets.shape
        # On a GPU the answer would have to be waited for; a row is made on the CPU, where it is checked.
        assert self.targets.device.type != "cpu" or IGNORED not in self.targets

    def pin_memory(self) -> "PackedRow":
        """Return the row in memory from which a GPU copies while the CPU goes on."""
        return replace(
            self, input_ids=self.input_ids.pin_memory(), position_ids=self.position_ids.pin_memory(),
            predict_at=self.predict_at.pin_memory(), targets=self.targets.pin_memory(),
        )  # fmt: skip

    def to(self, device: torch.device) -> "PackedRow":
        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        return replace(
            self, input_ids=move(self.input_ids), position_ids=move(self.position_ids),
            predict_at=move(self.predict_at), targets=move(self.targets),
        )  # fmt: skip


@dataclass(frozen=True)
class RowPlan:
    """The conversations of one forward, and those and the totals of the optimizer step it belongs to."""

    indexes: tuple[int, ...]
    step_rows: tuple[int, ...]
    step_tokens: int
    step_supervised: int


@dataclass(frozen=True)
class StepBatch:
    """The rows of one process in one optimizer step; its conversations and totals are those of all processes."""

    rows: tuple[PackedRow, ...]
    step_rows: tuple[int, ...]
    step_tokens: int
    step_supervised: int

    def pin_memory(self) -> "StepBatch":
        """Return the batch with pinned rows; torch's DataLoader calls this."""
        return replace(self, rows=tuple(row.pin_memory() for row in self.rows))


@dataclass(frozen=True)
class Sizes:
    """Number of tokens and of supervised tokens of every conversation: all that planning a step needs."""

    tokens: np.ndarray
    supervised: np.ndarray

    def __post_init__(self) -> None:
        assert self.tokens.shape == self.supervised.shape
        assert (self.supervised > 0).all(), "a conversation without supervised tokens cannot be trained on"

    def __len__(self) -> int:
        return len(self.tokens)


def measure_lengths(dataset: Any) -> Sizes:
    """Count the tokens of a `datasets.Dataset` with the columns input_ids and labels.

    A label on the first token of a conversation cannot be predicted, so it does not count.
    """
    tokens, supervised = [], []
    for chunk in dataset.data.column("labels").chunks:
        offsets = chunk.offsets.to_numpy()
        labels = chunk.values.to_numpy()
        counted = np.concatenate([[0], np.cumsum(labels != IGNORED)])
        first = np.where(offsets[1:] > offsets[:-1], labels[np.minimum(offsets[:-1], len(labels) - 1)], IGNORED)
        tokens.append(np.diff(offsets))
        supervised.append(counted[offsets[1:]] - counted[offsets[:-1]] - (first != IGNORED))
    return Sizes(np.concatenate(tokens).astype(np.int64), np.concatenate(supervised).astype(np.int64))


def balance_ranks(lengths: Sequence[int], processes: int) -> list[list[int]]:
    """Distribute the items of `lengths` over `processes` so that the largest sum is small; return their positions.

    The differencing method (Karmarkar and Karp 1982, for more than two parts as in Korf 2009): the two partial
    distributions whose sums differ most are merged, the largest share of one with the smallest of the other.
    """
    heap: list[tuple[int, int, _Partition]] = []
    for position, length in enumerate(lengths):
        heap.append((-length, position, [(length, [position]), *[(0, [])] * (processes - 1)]))
    heapq.heapify(heap)
    while len(heap) > 1:
        _, number, one = heapq.heappop(heap)
        _, _, other = heapq.heappop(heap)
        joined = [(a + b, mine + theirs) for (a, mine), (b, theirs) in zip(one, reversed(other), strict=True)]
        joined.sort(key=lambda share: -share[0])
        heapq.heappush(heap, (joined[-1][0] - joined[0][0], number, joined))
    return [sorted(share) for _, share in heap[0][2]] if heap else [[] for _ in range(processes)]


def fill_bins(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Put the items of `lengths` into rows of at most `row_tokens`, longest first; a longer item gets a row of its own.

    Best-fit decreasing: into the row with the least sufficient space (Johnson 1973: at most 11/9 of the
    minimum number of rows). The number of rows depends on the lengths alone, not on their order.
    """
    rows: list[list[int]] = []
    rooms: list[int] = []  # free space of the rows, ascending
    rows_with: dict[int, list[int]] = {}
    for position in sorted(range(len(lengths)), key=lambda at: (-lengths[at], at)):
        length = lengths[position]
        fitting = bisect.bisect_left(rooms, length)
        if fitting == len(rooms):
            row, room = len(rows), row_tokens
            rows.append([])
        else:
            room = rooms[fitting]
            row = rows_with[room].pop()
            if not rows_with[room]:
                del rooms[fitting]
        rows[row].append(position)
        left = room - length
        if left > 0:
            if not rows_with.setdefault(left, []):
                bisect.insort(rooms, left)
            rows_with[left].append(row)
    return rows


def steps_of_epoch(
    lengths: np.ndarray, *, global_batch: int, pack_tokens: int | None, seed: int, epoch: int
) -> list[np.ndarray]:
    """Return the conversations of each step of an epoch.

    Args:
        lengths: (conversations,) number of tokens of each.
        global_batch: Number of conversations of a step, or of packs if rows are packed.
        pack_tokens: Maximum number of tokens of a pack; None does not pack.
        seed: Seed of the order.
        epoch: Number of the epoch, from 0; each has its own order.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    if pack_tokens is None:
        return [order[start : start + global_batch] for start in range(0, len(order), global_batch)]
    packs = fill_bins(lengths[order].tolist(), pack_tokens)  # of equal lengths the permutation decides
    shuffled = [order[packs[at]] for at in random.permutation(len(packs))]
    return [np.concatenate(shuffled[at : at + global_batch]) for at in range(0, len(shuffled), global_batch)]


class StepSampler:
    """Batch sampler of one process: the rows of every optimizer step of an epoch.

    Every process runs the same number of forwards in a step (ZeRO gathers or reduces in each), so one with
    less to do gets empty rows.
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        global_batch: int,
        row_tokens: int,
        processes: int,
        rank: int,
        seed: int,
        pack_tokens: int | None = None,
    ) -> None:
        assert 0 <= rank < processes
        self.sizes = sizes
        self.global_batch = global_batch
        self.pack_tokens = pack_tokens
        self.row_tokens = row_tokens
        self.processes = processes
        self.rank = rank
        self.seed = seed
        self.epoch = 0
        self._steps = len(self._steps_of_epoch())

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[list[RowPlan]]:
        for step in self._steps_of_epoch():
            yield self.plan(step)

    def forwards_per_epoch(self) -> int:
        """Return the number of forwards of this process in the current epoch."""
        return sum(len(self.plan(step)) for step in self._steps_of_epoch())

    def _steps_of_epoch(self) -> list[np.ndarray]:
        return steps_of_epoch(
            self.sizes.tokens,
            global_batch=self.global_batch,
            pack_tokens=self.pack_tokens,
            seed=self.seed,
            epoch=self.epoch,
        )

    def plan(self, step: np.ndarray) -> list[RowPlan]:
        """Return the rows of this process in the step with the conversations `step`."""
        lengths = self.sizes.tokens[step].tolist()
        shares = balance_ranks(lengths, self.processes)
        filled = [fill_bins([lengths[at] for at in share], self.row_tokens) for share in shares]
        own = [tuple(int(step[shares[self.rank][at]]) for at in row) for row in filled[self.rank]]
        own += [()] * (max(map(len, filled)) - len(own))
        totals = int(self.sizes.tokens[step].sum()), int(self.sizes.supervised[step].sum())
        rows = tuple(step.tolist())
        return [RowPlan(indexes, rows, *totals) for indexes in own]


class RowDataset(Dataset):  # type: ignore[type-arg]
    """Conversations as packed rows: the key of an item is its `RowPlan`."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset.with_format("numpy", columns=["input_ids", "labels"])

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, plan: RowPlan) -> tuple[PackedRow, RowPlan]:
        if not plan.indexes:
            # One token without a target: ZeRO gathers or reduces in every forward, so every process has as many.
            nothing = torch.zeros(0, dtype=torch.int64)
            token = torch.zeros((1, 1), dtype=torch.int64)
            return PackedRow(token, token, (1,), nothing, nothing, ()), plan
        items = [self.dataset[index] for index in plan.indexes]
        return pack_sequences([(item["input_ids"], item["labels"]) for item in items], plan.indexes), plan


def pack_sequences(conversations: Sequence[tuple[np.ndarray, np.ndarray]], indexes: tuple[int, ...] = ()) -> PackedRow:
    """Concatenate conversations, each (input_ids, labels), in a row."""
    lengths = tuple(len(ids) for ids, _ in conversations)
    # Nothing precedes the first token of a conversation, so nothing can predict it.
    labels = np.concatenate([np.concatenate([[IGNORED], labels[1:]]) for _, labels in conversations])
    supervised = np.flatnonzero(labels != IGNORED)
    return PackedRow(
        input_ids=_tensor(np.concatenate([ids for ids, _ in conversations]))[None],
        position_ids=_tensor(np.concatenate([np.arange(length) for length in lengths]))[None],
        lengths=lengths,
        predict_at=_tensor(supervised - 1),
        targets=_tensor(labels[supervised]),
        indexes=indexes,
    )


def collate(rows: Sequence[tuple[PackedRow, RowPlan]]) -> StepBatch:
    """Collate the rows of one step."""
    plan = rows[0][1]
    return StepBatch(tuple(row for row, _ in rows), plan.step_rows, plan.step_tokens, plan.step_supervised)


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.int64))
