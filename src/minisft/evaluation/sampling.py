"""Drawing the next token: temperature and nucleus, from a stream of random numbers of each prompt's own."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Logits divided by less overflow in fp32. Down here the likeliest token has all of the probability already.
_LOWEST = 1e-30


@dataclass(frozen=True)
class Sampling:
    """Draw the next token instead of taking the likeliest one.

    Args:
        temperature: above 0; divides the logits. Near 0 the likeliest token is taken, as without sampling.
        top_p: the smallest set of tokens with this much probability is kept (Holtzman et al. 2020).
        seed: with the prompt it decides every draw.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0 or not 0 < self.top_p <= 1:
            raise ValueError("sampling needs a temperature above 0 and a top_p above 0 and at most 1")

    def seed_of(self, prompt: Sequence[int]) -> int:
        """A seed for one prompt: what is drawn depends neither on the batch nor on the process it is in."""
        digest = hashlib.sha256(json.dumps([self.seed, list(prompt)]).encode()).digest()
        return int.from_bytes(digest[:4], "big")


class Draws:
    """A stream of random numbers for each row.

    Args:
        sampling: how to draw.
        prompts: token ids of each row, by its number.
    """

    def __init__(self, sampling: Sampling, prompts: Mapping[int, Sequence[int]]) -> None:
        self.sampling = sampling
        self.streams = {row: torch.Generator().manual_seed(sampling.seed_of(prompt)) for row, prompt in prompts.items()}

    def pick(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """Next ids [rows] from logits [rows, vocabulary], by the inverse of their cumulative distribution."""
        scaled = logits.float() / max(self.sampling.temperature, _LOWEST)
        probabilities, order = torch.softmax(scaled, dim=-1).sort(descending=True, stable=True)
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= self.sampling.top_p, 0)
        reached = probabilities.cumsum(dim=-1)
        uniform = torch.stack([torch.rand((), generator=self.streams[row]) for row in rows]).to(logits.device)
        place = (reached <= (uniform * reached[:, -1])[:, None]).sum(dim=-1, keepdim=True)
        last = (probabilities > 0).sum(dim=-1, keepdim=True) - 1
        return order.gather(1, torch.minimum(place, last))[:, 0]
