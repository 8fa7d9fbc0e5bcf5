"""The only decoding loop, with sampling: evaluation, and chat with its streaming, go through `generate`.

Prompts of similar length share a batch, padded on the left. Rows that finished leave the batch, so that the
long answers alone do not pay for the short ones. Greedy unless a `Sampling` is given.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from minisft.evaluation.kv_cache import PreallocatedLayer, PromptCache, common_prefix, merged, new_cache, repeated

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


class TokenSampler:
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


Finish = Literal["stop", "length", "context", "interrupted"]

# A batch holds at most so many key-value positions (rows times longest row), whatever `batch_size` says.
CACHE_POSITIONS = 65536
# Prompts go through the model so many at a time, in order of length.
PREFILL_ROWS = 8
# A beginning that a batch shares is computed once from this many tokens on.
SHARED_AT_LEAST = 8


@dataclass(frozen=True)
class Generated:
    """One answer.

    Args:
        ids: the generated ids, without the terminator.
        finish: "stop": the model ended by itself; "length": `max_new_tokens` reached; "context": the model's
            context is full (with no ids: the prompt alone fills it); "interrupted": `on_token` said so.
    """

    ids: list[int]
    finish: Finish


def context_length(config: PretrainedConfig) -> int | None:
    """The most positions that a model of this config was built for; None where it names no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def inference_dtype(precision: str = "auto") -> torch.dtype:
    """What weights are held in when nothing is trained: fp32 on a CPU or where `precision`, as in the recipe, says
    so; else bf16 where the GPU has it, and fp16 where not.
    """
    if precision == "fp32" or not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float16


def generate(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    *,
    stop_token_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int = 32,
    pad_token_id: int = 0,
    sampling: Sampling | None = None,
    on_token: Callable[[int, int], bool | None] | None = None,
    prompt_cache: PromptCache | None = None,
) -> list[Generated]:
    """Answers to `prompts`, in their order.

    Args:
        model: a causal language model in eval mode.
        prompts: token ids, none of them empty.
        stop_token_ids: a row ends at the first of these.
        max_new_tokens: per row; a row also ends where the model's context does.
        batch_size: rows decoded together; the batches depend on the prompts' lengths only.
        pad_token_id: fills short rows; masked, so any id of the vocabulary will do.
        sampling: None for greedy.
        on_token: called with (index of the prompt, id) for every id but the terminator; True ends that row.
        prompt_cache: for one prompt only; taken from and left behind.

    Returns:
        One `Generated` per prompt.
    """
    assert prompt_cache is None or len(prompts) == 1
    rules = _Rules(frozenset(stop_token_ids), max_new_tokens, pad_token_id, sampling, on_token)
    answers: dict[int, Generated] = {}
    for indices in plan_batches([len(prompt) for prompt in prompts], batch_size, max_new_tokens):
        batch = _Batch(model, rules, {index: prompts[index] for index in indices})
        answers |= dict(zip(indices, batch.decode(prompt_cache), strict=True))
    return [answers[index] for index in range(len(prompts))]


def plan_batches(lengths: Sequence[int], batch_size: int, new_tokens: int) -> list[list[int]]:
    """Indices of prompts in batches of similar length, longest first: what does not fit shows at once."""
    batches: list[list[int]] = []
    rows = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or len(batches[-1]) >= rows:
            batches.append([])
            rows = max(1, min(batch_size, CACHE_POSITIONS // (lengths[index] + new_tokens)))
        batches[-1].append(index)
    return batches


@dataclass(frozen=True)
class _Rules:
    stops: frozenset[int]
    max_new_tokens: int
    pad: int
    sampling: Sampling | None
    on_token: Callable[[int, int], bool | None] | None


class _Batch:
    """The rows of one batch while they are decoded: which are still in it, and what each has so far.

    `rows` holds the prompts' indices in the order of the tensors: `tokens` [rows, new], `mask` [rows, all].
    """

    def __init__(self, model: PreTrainedModel, rules: _Rules, prompts: dict[int, list[int]]) -> None:
        self.model, self.rules, self.prompts = model, rules, prompts
        self.draws = TokenSampler(rules.sampling, prompts) if rules.sampling is not None else None
        self.rooms = {row: _room(model, prompt, rules.max_new_tokens) for row, prompt in prompts.items()}
        self.ids: dict[int, list[int]] = {row: [] for row in prompts}
        self.finish: dict[int, Finish] = {row: "context" for row, room in self.rooms.items() if room == 0}
        self.rows = [row for row in prompts if row not in self.finish]

    @torch.inference_mode()
    def decode(self, kept: PromptCache | None) -> list[Generated]:
        if self.rows:
            logits = self._prefill() if kept is None else self._prefill_from(kept)
        while self.rows:
            picked = self.draws.pick(logits, self.rows) if self.draws else logits.argmax(dim=-1)
            if kept is not None:  # what has gone through the model by now: all but the token just picked
                kept.cache, kept.ids = self.cache, self.prompts[self.rows[0]] + self.ids[self.rows[0]]
            for row, token in zip(self.rows, picked.tolist(), strict=True):
                if row not in self.finish:
                    self._note(row, token)
            self._advance(picked)
            if self.rows:
                logits = _forward(self.model, self.tokens, self.mask, self.cache)
        return [Generated(self.ids[row], self.finish[row]) for row in self.prompts]

    def _prefill(self) -> Tensor:
        """Sends the prompts through the model; gives the logits [rows, vocabulary] of their last tokens.

        A few rows of nearly one length at a time: padding costs as much as text here, and nothing later.
        """
        prompts = [self.prompts[row] for row in self.rows]
        start = new_cache(self.model)
        mergeable = all(type(layer) is PreallocatedLayer for layer in start.layers)
        shared = _prefill_shared(self.model, start, prompts) if mergeable else 0
        size = PREFILL_ROWS if mergeable else len(prompts)
        logits, masks, caches = [], [], []
        for place in range(0, len(prompts), size):
            some = prompts[place : place + size]
            cache = repeated(start, len(some)) if mergeable else start
            tokens, mask = _left_padded(some, shared, self.rules.pad, self.model.device)
            logits.append(_forward(self.model, tokens, mask, cache))
            masks.append(mask)
            caches.append(cache)
        self.mask = _right_aligned(masks)
        self.cache = merged(caches, self.mask.shape[1]) if len(caches) > 1 else caches[0]
        return torch.cat(logits)

    def _prefill_from(self, kept: PromptCache) -> Tensor:
        """The same for the one prompt of a chat, from what `kept` holds of it."""
        prompt = self.prompts[self.rows[0]]
        shared = kept.reuse(prompt)
        self.cache = kept.cache if kept.cache is not None else new_cache(self.model)
        kept.ids, kept.cache = [], None  # an exception on the way must not leave a cache that lies
        tokens, self.mask = _left_padded([prompt], shared, self.rules.pad, self.model.device)
        return _forward(self.model, tokens, self.mask, self.cache)

    def _note(self, row: int, token: int) -> None:
        """Takes the row's next token and sees whether that ends it."""
        if token in self.rules.stops:
            self.finish[row] = "stop"
            return
        self.ids[row].append(token)
        if self.rules.on_token is not None and self.rules.on_token(row, token):
            self.finish[row] = "interrupted"
        elif len(self.ids[row]) >= self.rooms[row]:
            self.finish[row] = "length" if self.rooms[row] == self.rules.max_new_tokens else "context"

    def _advance(self, picked: Tensor) -> None:
        """The picked ids [rows] come next; finished rows leave where that is worth copying the cache."""
        going = [place for place, row in enumerate(self.rows) if row not in self.finish]
        if not going or _worth_compacting(len(going), len(self.rows), self.cache):
            self.rows = [self.rows[place] for place in going]
            keep = torch.tensor(going, dtype=torch.long, device=self.model.device)
            picked, self.mask = picked[keep], self.mask[keep]
            if going:
                self.cache.batch_select_indices(keep)
        self.tokens = picked[:, None]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.rows), 1)], dim=1)


def _prefill_shared(model: PreTrainedModel, cache: DynamicCache, prompts: list[list[int]]) -> int:
    """Puts what all prompts begin with (a system prompt, say) into the cache, computed once; returns its length.

    Padding then stands between it and the rest, which a sliding window, counting columns, would not bear.
    """
    shared = min(common_prefix(prompts[0], prompt[:-1]) for prompt in prompts)
    if len(prompts) < 2 or shared < SHARED_AT_LEAST:
        return 0
    prefix = torch.tensor([prompts[0][:shared]], device=model.device)
    _forward(model, prefix, torch.ones_like(prefix), cache)
    return shared


def _left_padded(prompts: list[list[int]], shared: int, pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids [rows, longest] of what follows the first `shared` ids, and the mask [rows, shared + longest] of all."""
    rest = [prompt[shared:] for prompt in prompts]
    gaps = [max(map(len, rest)) - len(ids) for ids in rest]
    padded = [[pad] * gap + ids for gap, ids in zip(gaps, rest, strict=True)]
    real = [[1] * shared + [0] * gap + [1] * len(ids) for gap, ids in zip(gaps, rest, strict=True)]
    return torch.tensor(padded, device=device), torch.tensor(real, device=device)


def _right_aligned(masks: list[Tensor]) -> Tensor:
    """Masks [rows, width] of several widths as one, the shorter ones padded on the left."""
    width = max(mask.shape[1] for mask in masks)
    return torch.cat([torch.nn.functional.pad(mask, (width - mask.shape[1], 0)) for mask in masks])


def _forward(model: PreTrainedModel, tokens: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
    """Logits [rows, vocabulary] of each row's last token, given tokens [rows, new] and mask [rows, all]."""
    accepted = forward_arguments(model)
    extra: dict[str, Any] = {}
    if "position_ids" in accepted:
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        extra["position_ids"] = positions[:, -tokens.shape[1] :]
    if "logits_to_keep" in accepted:
        extra["logits_to_keep"] = 1
    output = model(input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True, **extra)
    return output.logits[:, -1]


def forward_arguments(model: PreTrainedModel) -> set[str]:
    """What the model's forward takes; not every architecture takes positions or skips logits."""
    return set(inspect.signature(model.forward).parameters)


def _room(model: PreTrainedModel, prompt: list[int], max_new_tokens: int) -> int:
    context = context_length(model.config)
    return max_new_tokens if context is None else max(0, min(max_new_tokens, context - len(prompt)))


def _worth_compacting(going: int, rows: int, cache: DynamicCache) -> bool:
    """One row in eight has finished, and every layer can drop rows (recurrent states cannot)."""
    return rows - going >= max(1, rows // 8) and all(hasattr(layer, "batch_select_indices") for layer in cache.layers)
