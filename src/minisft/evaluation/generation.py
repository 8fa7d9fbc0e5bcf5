"""The only decoding loop: evaluation and chat call `generate`, which also samples and streams.

Prompts of similar length share a batch, padded on the left. Finished rows leave the batch, so that a few long
answers do not cost as much as a full batch. Decoding is greedy unless a `Sampling` is given.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from minisft.evaluation.kv_cache import PreallocatedLayer, PromptCache, common_prefix, merged, new_cache, repeated
from minisft.models import forward_arguments

# Logits divided by a smaller temperature overflow in fp32. At this one the likeliest token already has probability 1.
_LOWEST_TEMPERATURE = 1e-30


@dataclass(frozen=True)
class Sampling:
    """Draw the next token instead of taking the likeliest one.

    Args:
        temperature: Divides the logits; above 0. Near 0 the likeliest token is taken, as without sampling.
        top_p: Draw from the smallest set of tokens with this much probability (nucleus sampling, Holtzman et al. 2020).
        seed: Determines every draw, together with the prompt.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0 or not 0 < self.top_p <= 1:
            raise ValueError("sampling needs a temperature above 0 and a top_p above 0 and at most 1")

    def seed_of(self, prompt: Sequence[int]) -> int:
        """Return the seed for one prompt; its draws then depend neither on the batch nor on the process."""
        digest = hashlib.sha256(json.dumps([self.seed, list(prompt)]).encode()).digest()
        return int.from_bytes(digest[:4], "big")


class TokenSampler:
    """Draws the next tokens; each row has a stream of random numbers of its own.

    Args:
        sampling: The sampling settings.
        prompts: Token ids of each row, by row number.
    """

    def __init__(self, sampling: Sampling, prompts: Mapping[int, Sequence[int]]) -> None:
        self.sampling = sampling
        self.streams = {row: torch.Generator().manual_seed(sampling.seed_of(prompt)) for row, prompt in prompts.items()}

    def pick(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """Draw the next ids [rows] from logits [rows, vocabulary], by the inverse of their cumulative distribution."""
        scaled = logits.float() / max(self.sampling.temperature, _LOWEST_TEMPERATURE)
        probabilities, order = torch.softmax(scaled, dim=-1).sort(descending=True, stable=True)
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= self.sampling.top_p, 0)
        reached = probabilities.cumsum(dim=-1)
        uniform = torch.stack([torch.rand((), generator=self.streams[row]) for row in rows]).to(logits.device)
        place = (reached <= (uniform * reached[:, -1])[:, None]).sum(dim=-1, keepdim=True)
        last = (probabilities > 0).sum(dim=-1, keepdim=True) - 1
        return order.gather(1, torch.minimum(place, last))[:, 0]


Finish = Literal["stop", "length", "context", "interrupted"]

# The most key-value positions (rows times longest row) of a batch, even if `batch_size` allows more.
CACHE_POSITIONS = 65536
# A prefix that all prompts of a batch share is computed only once if it has at least this many tokens.
SHARED_AT_LEAST = 8


@dataclass(frozen=True)
class Generated:
    """One answer.

    Args:
        ids: The generated ids, without the terminator.
        finish: Why it ended. "stop": the model generated a terminator; "length": `max_new_tokens` reached;
            "context": the model's context is full (without ids: the prompt alone fills it); "interrupted": `on_token`
            returned True.
    """

    ids: list[int]
    finish: Finish


def context_length(config: PretrainedConfig) -> int | None:
    """Return the most positions that a model of this config supports; None if the config names no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def inference_dtype(precision: str = "auto", compute_capability: tuple[int, int] | None = None) -> torch.dtype:
    """Return the dtype of weights that are not trained: fp32 on a CPU, else bf16 if the GPU supports it, else fp16.

    Args:
        precision: The recipe's `training.precision`; "fp32" gives fp32 on a GPU too.
        compute_capability: Of the GPU; None: of this machine's GPU, if it has one.
    """
    if compute_capability is None and torch.cuda.is_available():
        compute_capability = torch.cuda.get_device_capability()
    if precision == "fp32" or compute_capability is None:
        return torch.float32
    return torch.bfloat16 if compute_capability[0] >= 8 else torch.float16


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
    prefill_rows: int = 8,
) -> list[Generated]:
    """Return the answers to `prompts`, in their order.

    Args:
        model: A causal language model in eval mode.
        prompts: Token ids of each prompt; no prompt is empty.
        stop_token_ids: A row ends at the first of these ids.
        max_new_tokens: The most tokens of an answer; it also ends when the model's context is full.
        batch_size: Number of rows decoded together; the batches depend on the prompts' lengths only.
        pad_token_id: Fills short rows. It is masked, so any id of the vocabulary works.
        sampling: Sampling settings; None: greedy decoding.
        on_token: Called with (index of the prompt, id) for every id except the terminator; True ends that row.
        prompt_cache: Keys and values to reuse, updated in place; for a single prompt only.
        prefill_rows: Number of prompts that go through the model together before decoding, in order of length.

    Returns:
        One `Generated` per prompt.
    """
    assert prompt_cache is None or len(prompts) == 1
    rules = _Rules(frozenset(stop_token_ids), max_new_tokens, pad_token_id, sampling, on_token, prefill_rows)
    answers: dict[int, Generated] = {}
    for indices in plan_batches([len(prompt) for prompt in prompts], batch_size, max_new_tokens):
        batch = _Batch(model, rules, {index: prompts[index] for index in indices})
        answers |= dict(zip(indices, batch.decode(prompt_cache), strict=True))
    return [answers[index] for index in range(len(prompts))]


def plan_batches(lengths: Sequence[int], batch_size: int, new_tokens: int) -> list[list[int]]:
    """Return batches of prompt indices, similar lengths together; longest first, so that memory runs out at once."""
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
    prefill_rows: int


class _Batch:
    """The rows of one batch while they are decoded: the unfinished rows, and the ids of each so far.

    `rows` holds the prompts' indices in the order of the tensors: `tokens` [rows, new], `mask` [rows, all].
    """

    def __init__(self, model: PreTrainedModel, rules: _Rules, prompts: dict[int, list[int]]) -> None:
        self.model, self.rules, self.prompts = model, rules, prompts
        self.draws = TokenSampler(rules.sampling, prompts) if rules.sampling is not None else None
        context = context_length(model.config)
        self.rooms = {  # the most tokens that each row may still generate
            row: rules.max_new_tokens if context is None else max(0, min(rules.max_new_tokens, context - len(prompt)))
            for row, prompt in prompts.items()
        }
        self.ids: dict[int, list[int]] = {row: [] for row in prompts}
        self.finish: dict[int, Finish] = {row: "context" for row, room in self.rooms.items() if room == 0}
        self.rows = [row for row in prompts if row not in self.finish]

    @torch.inference_mode()
    def decode(self, kept: PromptCache | None) -> list[Generated]:
        if self.rows:
            logits = self._prefill() if kept is None else self._prefill_from(kept)
        while self.rows:
            # 1. Take the next token of each row.
            picked = self.draws.pick(logits, self.rows) if self.draws else logits.argmax(dim=-1)
            if kept is not None:  # the cache has seen all ids except the token just picked
                kept.cache, kept.ids = self.cache, self.prompts[self.rows[0]] + self.ids[self.rows[0]]
            # 2. Append it to the row, and decide whether the row ends.
            for row, token in zip(self.rows, picked.tolist(), strict=True):
                if row in self.finish:
                    continue
                if token in self.rules.stops:
                    self.finish[row] = "stop"
                    continue
                self.ids[row].append(token)
                if self.rules.on_token is not None and self.rules.on_token(row, token):
                    self.finish[row] = "interrupted"
                elif len(self.ids[row]) >= self.rooms[row]:
                    self.finish[row] = "length" if self.rooms[row] == self.rules.max_new_tokens else "context"
            # 3. Drop finished rows, and run the model on the picked tokens.
            self._advance(picked)
            if self.rows:
                logits = _forward(self.model, self.tokens, self.mask, self.cache)
        return [Generated(self.ids[row], self.finish[row]) for row in self.prompts]

    def _prefill(self) -> Tensor:
        """Run the prompts through the model, and return the logits [rows, vocabulary] of their last tokens.

        Only a few rows of similar length at a time: padding costs as much as text here, but nothing when decoding.
        """
        prompts = [self.prompts[row] for row in self.rows]
        start = new_cache(self.model)
        mergeable = all(type(layer) is PreallocatedLayer for layer in start.layers)
        # 1. The prefix that all prompts share (a system prompt, say), computed only once. Padding then stands between
        #    the prefix and the rest, and a sliding window, which counts columns, would lose real tokens to it.
        shared = min(common_prefix(prompts[0], prompt[:-1]) for prompt in prompts)
        if mergeable and len(prompts) > 1 and shared >= SHARED_AT_LEAST:
            prefix = torch.tensor([prompts[0][:shared]], device=self.model.device)
            _forward(self.model, prefix, torch.ones_like(prefix), start)
        else:
            shared = 0
        # 2. The rest of each prompt.
        size = self.rules.prefill_rows if mergeable else len(prompts)
        logits, masks, caches = [], [], []
        for place in range(0, len(prompts), size):
            some = prompts[place : place + size]
            cache = repeated(start, len(some)) if mergeable else start
            tokens, mask = _left_padded(some, shared, self.rules.pad, self.model.device)
            logits.append(_forward(self.model, tokens, mask, cache))
            masks.append(mask)
            caches.append(cache)
        # 3. Masks and caches of all rows as one, right-aligned.
        width = max(mask.shape[1] for mask in masks)
        self.mask = torch.cat([torch.nn.functional.pad(mask, (width - mask.shape[1], 0)) for mask in masks])
        self.cache = merged(caches, width) if len(caches) > 1 else caches[0]
        return torch.cat(logits)

    def _prefill_from(self, kept: PromptCache) -> Tensor:
        """Do the same for the one prompt of a chat, starting from its longest prefix in `kept`."""
        prompt = self.prompts[self.rows[0]]
        shared = kept.reuse(prompt)
        self.cache = kept.cache if kept.cache is not None else new_cache(self.model)
        kept.ids, kept.cache = [], None  # after an exception in `_forward` ids and cache would disagree
        tokens, self.mask = _left_padded([prompt], shared, self.rules.pad, self.model.device)
        return _forward(self.model, tokens, self.mask, self.cache)

    def _advance(self, picked: Tensor) -> None:
        """Make the picked ids [rows] the next input, and drop finished rows where that is worth copying the cache."""
        unfinished = [place for place, row in enumerate(self.rows) if row not in self.finish]
        enough = len(self.rows) - len(unfinished) >= max(1, len(self.rows) // 8)
        # Recurrent states have no way to drop rows, also where a layer has them beside keys and values (Falcon-H1).
        if not unfinished or (enough and not any(hasattr(layer, "recurrent_states") for layer in self.cache.layers)):
            self.rows = [self.rows[place] for place in unfinished]
            keep = torch.tensor(unfinished, dtype=torch.long, device=self.model.device)
            picked, self.mask = picked[keep], self.mask[keep]
            if unfinished:
                self.cache.batch_select_indices(keep)
        self.tokens = picked[:, None]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.rows), 1)], dim=1)


def _left_padded(prompts: list[list[int]], shared: int, pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the ids [rows, longest] after the first `shared` ones, and the mask [rows, shared + longest] of all."""
    rest = [prompt[shared:] for prompt in prompts]
    gaps = [max(map(len, rest)) - len(ids) for ids in rest]
    padded = [[pad] * gap + ids for gap, ids in zip(gaps, rest, strict=True)]
    real = [[1] * shared + [0] * gap + [1] * len(ids) for gap, ids in zip(gaps, rest, strict=True)]
    return torch.tensor(padded, device=device), torch.tensor(real, device=device)


def _forward(model: PreTrainedModel, tokens: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
    """Return the logits [rows, vocabulary] of each row's last token, given tokens [rows, new] and mask [rows, all]."""
    accepted = forward_arguments(model)
    extra: dict[str, Any] = {}
    if "position_ids" in accepted:
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        extra["position_ids"] = positions[:, -tokens.shape[1] :]
    if "logits_to_keep" in accepted:
        extra["logits_to_keep"] = 1
    output = model(input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True, **extra)
    return output.logits[:, -1]
