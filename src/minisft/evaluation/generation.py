"""The only decoding loop: `Decoder`. Evaluation and chat call `generate`, which uses it; the server adds rows to it.

Rows of one batch are padded on the left. Finished rows leave the batch, so that a few long answers do not cost as much
as a full batch, and new rows may join it while others decode (continuous batching, as in Orca, Yu et al. 2022). Each
row has its own limits, and is decoded greedily unless it has a `Sampling`.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from minisft.evaluation.kv_cache import (
    PreallocatedLayer,
    PromptCache,
    common_prefix,
    merged,
    new_cache,
    repeated,
    select_rows,
    without_first_positions,
)
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

    def stream_of(self, prompt: Sequence[int]) -> torch.Generator:
        """Return the stream of random numbers for one prompt."""
        return torch.Generator().manual_seed(self.seed_of(prompt))


def draw_tokens(logits: Tensor, sampling: Sampling, streams: Sequence[torch.Generator]) -> Tensor:
    """Draw the next ids [rows] from logits [rows, vocabulary], by the inverse of their cumulative distribution.

    Args:
        logits: The model's logits.
        sampling: The sampling settings; its seed is in the streams.
        streams: A stream of random numbers for each row.
    """
    scaled = logits.float() / max(sampling.temperature, _LOWEST_TEMPERATURE)
    probabilities, order = torch.softmax(scaled, dim=-1).sort(descending=True, stable=True)
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities = probabilities.masked_fill(before >= sampling.top_p, 0)
    reached = probabilities.cumsum(dim=-1)
    uniform = torch.stack([torch.rand((), generator=stream, dtype=torch.float32) for stream in streams]).to(
        logits.device
    )
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


@dataclass(frozen=True)
class TokenScores:
    """Log-probabilities at one place of an answer, from the model's logits before temperature and top_p.

    Args:
        logprob: Natural logarithm of the probability of the token that was taken.
        top: The likeliest tokens and their log-probabilities, the likeliest first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class DecodingRequest:
    """A prompt, and how its answer is decoded.

    Args:
        prompt: Token ids, at least one.
        stop_token_ids: The row ends at the first of these ids.
        max_new_tokens: The most tokens of the answer; it also ends when the model's context is full.
        sampling: Sampling settings; None: greedy decoding.
        top_logprobs: Number of the likeliest tokens to report with each token; None: report no probabilities.
        on_token: Called with every id except the terminator, and its scores (None unless `top_logprobs` asks for
            them); True ends the row.
    """

    prompt: list[int]
    stop_token_ids: frozenset[int]
    max_new_tokens: int
    sampling: Sampling | None = None
    top_logprobs: int | None = None
    on_token: Callable[[int, TokenScores | None], bool | None] | None = None


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
    most_rows: Callable[[int], int] | None = lambda longest: CACHE_POSITIONS // longest,
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
        most_rows: As for `plan_batches`.

    Returns:
        One `Generated` per prompt.
    """
    assert prompt_cache is None or len(prompts) == 1
    stops = frozenset(stop_token_ids)
    answers: dict[int, Generated] = {}
    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    for indices in plan_batches(lengths, batch_size, most_rows):
        decoder = Decoder(model, pad_token_id=pad_token_id, prefill_rows=prefill_rows, prompt_cache=prompt_cache)
        requests = []
        for index in indices:
            tell = None if on_token is None else lambda token, _, index=index: on_token(index, token)
            requests.append(DecodingRequest(prompts[index], stops, max_new_tokens, sampling, None, tell))
        index_of = dict(zip(decoder.add(requests), indices, strict=True))
        while decoder.busy:
            answers |= {index_of[row]: generated for row, generated in decoder.step().items()}
    return [answers[index] for index in range(len(prompts))]


def plan_batches(
    lengths: Sequence[int], batch_size: int, most_rows: Callable[[int], int] | None = None
) -> list[list[int]]:
    """Return batches of row indices, similar lengths together; longest first, so that memory runs out at once.

    Args:
        lengths: Positions that each row needs.
        batch_size: The most rows of a batch.
        most_rows: Returns the most rows of a batch whose longest row has so many positions; at least one row is taken.
    """
    batches: list[list[int]] = []
    rows = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or len(batches[-1]) >= rows:
            batches.append([])
            rows = max(1, batch_size if most_rows is None else min(batch_size, most_rows(lengths[index])))
        batches[-1].append(index)
    return batches


@dataclass
class _Row:
    """An answer while it is decoded: `room` is the most tokens that it may have; `ids` are those so far."""

    number: int
    request: DecodingRequest
    room: int
    stream: torch.Generator | None  # of random numbers, where the row is sampled
    ids: list[int] = field(default_factory=list)
    finish: Finish | None = None

    def take(self, token: int, scores: TokenScores | None) -> None:
        """Append the next token, and decide whether the row ends."""
        if self.finish is not None:  # it still has a place in the tensors
            return
        if token in self.request.stop_token_ids:
            self.finish = "stop"
            return
        self.ids.append(token)
        if self.request.on_token is not None and self.request.on_token(token, scores):
            self.finish = "interrupted"
        elif len(self.ids) >= self.room:
            self.finish = "length" if self.room == self.request.max_new_tokens else "context"


class Decoder:
    """The rows of one model that are decoded together, one token each per step. Not for several threads at once.

    Args:
        model: A causal language model in eval mode.
        pad_token_id: Fills short rows. It is masked, so any id of the vocabulary works.
        prefill_rows: Number of prompts that go through the model together before they are decoded.
        prompt_cache: Keys and values to reuse, updated in place; for a decoder of a single row only.

    Attributes:
        rows: The rows in the order of the tensors `_logits` [rows, vocabulary] of the next tokens, and `_mask`
            [rows, positions], which is 0 where the cache holds padding.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        pad_token_id: int = 0,
        prefill_rows: int = 8,
        prompt_cache: PromptCache | None = None,
    ) -> None:
        self.model, self.pad, self.prefill_rows, self.kept = model, pad_token_id, prefill_rows, prompt_cache
        self.rows: list[_Row] = []
        self._logits = self._mask = torch.empty(0)
        self._cache = new_cache(model)
        self._context = context_length(model.config)
        self._ended: dict[int, Generated] = {}  # rows that step() has still to return
        self._added = 0
        self._plain = all(type(layer) is PreallocatedLayer for layer in self._cache.layers)

    @property
    def busy(self) -> bool:
        """Whether there is a row that `step` has not yet returned."""
        return bool(self.rows or self._ended)

    @property
    def takes_rows(self) -> bool:
        """Whether rows may be added now: a cache with a sliding window or a recurrent state cannot be extended."""
        return self._plain or not self.rows

    @torch.inference_mode()
    def add(self, requests: Sequence[DecodingRequest]) -> list[int]:
        """Run the prompts through the model; return a number for each request, under which `step` returns its answer.

        The rows join those that are decoded already, which needs `takes_rows`.
        """
        assert self.takes_rows
        numbers = list(range(self._added, self._added + len(requests)))
        self._added += len(requests)
        rows = []
        for number, request in zip(numbers, requests, strict=True):
            room = request.max_new_tokens
            if self._context is not None:
                room = max(0, min(room, self._context - len(request.prompt)))
            if room == 0:
                self._ended[number] = Generated([], "context")
                continue
            stream = request.sampling.stream_of(request.prompt) if request.sampling is not None else None
            rows.append(_Row(number, request, room, stream))
        if not rows:
            return numbers
        rows.sort(key=lambda row: -len(row.request.prompt))  # similar lengths together
        prompts = [row.request.prompt for row in rows]
        prefilled = self._prefill(prompts) if self.kept is None else self._prefill_from(prompts, self.kept)
        self._join(rows, *prefilled)
        return numbers

    @torch.inference_mode()
    def step(self) -> dict[int, Generated]:
        """Decode one more token of every row; return the answers that have ended, by row number."""
        if self.rows:
            # 1. Take the next token of each row.
            picked = self._pick()
            if self.kept is not None:  # the cache has seen all ids except the token just picked
                self.kept.cache, self.kept.ids = self._cache, self.rows[0].request.prompt + self.rows[0].ids
            # 2. Append it to the row, and decide whether the row ends.
            scores = self._scores(picked)
            for place, token in enumerate(picked.tolist()):
                row, ongoing = self.rows[place], self.rows[place].finish is None
                row.take(token, scores.get(place))
                if ongoing and row.finish is not None:
                    self._ended[row.number] = Generated(row.ids, row.finish)
            # 3. Drop finished rows, and run the model on the picked tokens.
            tokens = self._advance(picked)
            if self.rows:
                self._logits = last_logits(self.model, tokens, self._mask, self._cache)
        ended, self._ended = self._ended, {}
        return ended

    @torch.inference_mode()
    def cancel(self, numbers: Sequence[int]) -> None:
        """End some rows at once, which `step` then does not return; numbers of rows that have ended do nothing."""
        for row in self.rows:
            if row.number in numbers and row.finish is None:
                row.finish = "interrupted"
        for number in numbers:
            self._ended.pop(number, None)
        if self.rows:
            self._drop_finished()

    def _prefill(self, prompts: list[list[int]]) -> tuple[Tensor, Tensor, DynamicCache]:
        """Run prompts through the model; return the logits [rows, vocabulary] of their last tokens, mask and cache.

        Only a few rows of similar length at a time: padding costs as much as text here, but nothing when decoding.
        """
        start = new_cache(self.model)
        # 1. The prefix that all prompts share (a system prompt, say), computed only once. Padding then stands between
        #    the prefix and the rest, and a sliding window, which counts columns, would lose real tokens to it.
        shared = min(common_prefix(prompts[0], prompt[:-1]) for prompt in prompts)
        if self._plain and len(prompts) > 1 and shared >= SHARED_AT_LEAST:
            prefix = torch.tensor([prompts[0][:shared]], device=self.model.device)
            last_logits(self.model, prefix, torch.ones_like(prefix), start)
        else:
            shared = 0
        # 2. The rest of each prompt.
        size = self.prefill_rows if self._plain else len(prompts)
        logits, masks, caches = [], [], []
        for place in range(0, len(prompts), size):
            some = prompts[place : place + size]
            cache = repeated(start, len(some)) if self._plain else start
            tokens, mask = _left_padded(some, shared, self.pad, self.model.device)
            logits.append(last_logits(self.model, tokens, mask, cache))
            masks.append(mask)
            caches.append(cache)
        # 3. Masks and caches of all rows as one, right-aligned.
        mask = _right_aligned(masks)
        return torch.cat(logits), mask, merged(caches, mask.shape[1]) if len(caches) > 1 else caches[0]

    def _prefill_from(self, prompts: list[list[int]], kept: PromptCache) -> tuple[Tensor, Tensor, DynamicCache]:
        """Do the same for the one prompt of a chat, starting from its longest prefix in `kept`."""
        [prompt] = prompts
        shared = kept.reuse(prompt)
        cache = kept.cache if kept.cache is not None else new_cache(self.model)
        kept.ids, kept.cache = [], None  # after an exception in `last_logits` ids and cache would disagree
        tokens, mask = _left_padded([prompt], shared, self.pad, self.model.device)
        return last_logits(self.model, tokens, mask, cache), mask, cache

    def _join(self, rows: list[_Row], logits: Tensor, mask: Tensor, cache: DynamicCache) -> None:
        """Add rows that have gone through the model to those that are decoded, right-aligned."""
        if self.rows:
            self._drop_finished()
        if not self.rows:
            self.rows, self._logits, self._mask, self._cache = rows, logits, mask, cache
            return
        # Positions that are padding in every row are left out: each is there because of a row that has ended.
        surplus = int(self._mask.any(dim=0).to(torch.uint8).argmax())
        without_first_positions(self._cache, surplus)
        self.rows, self._logits = self.rows + rows, torch.cat([self._logits, logits])
        self._mask = _right_aligned([self._mask[:, surplus:], mask])
        self._cache = merged([self._cache, cache], self._mask.shape[1])

    def _pick(self) -> Tensor:
        """Return the next id [rows] of each row. Rows with the same settings are sampled together."""
        groups: dict[tuple[float, float], list[int]] = {}
        for place, row in enumerate(self.rows):
            if row.request.sampling is not None:
                settings = (row.request.sampling.temperature, row.request.sampling.top_p)
                groups.setdefault(settings, []).append(place)
        picked = self._logits.argmax(dim=-1)
        for (temperature, top_p), places in groups.items():
            streams = [stream for place in places if (stream := self.rows[place].stream) is not None]
            picked[places] = draw_tokens(self._logits[places], Sampling(temperature, top_p), streams)
        return picked

    def _scores(self, picked: Tensor) -> dict[int, TokenScores]:
        """Return the scores of the picked ids [rows], by place, for the rows that ask for them."""
        wanted = {
            p: row.request.top_logprobs for p, row in enumerate(self.rows) if row.request.top_logprobs is not None
        }
        if not wanted:
            return {}
        places = list(wanted)
        logprobs = self._logits[places].float().log_softmax(dim=-1)
        taken = logprobs.gather(1, picked[places][:, None])[:, 0].tolist()
        values, ids = (tensor.tolist() for tensor in logprobs.topk(max(1, *wanted.values())))
        return {
            place: TokenScores(taken[i], tuple(zip(ids[i], values[i], strict=True))[: wanted[place]])
            for i, place in enumerate(places)
        }

    def _advance(self, picked: Tensor) -> Tensor:
        """Drop finished rows where that is worth copying the cache; return the next input [rows, 1]."""
        ended = sum(row.finish is not None for row in self.rows)
        if ended == len(self.rows) or ended >= max(1, len(self.rows) // 8):
            kept = self._drop_finished()
            picked = picked[kept] if kept is not None else picked
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self.rows), 1)], dim=1)
        return picked[:, None]

    def _drop_finished(self) -> Tensor | None:
        """Drop finished rows from the tensors, and return the places of the others; None if nothing was dropped."""
        unfinished = [place for place, row in enumerate(self.rows) if row.finish is None]
        # Recurrent states have no way to drop rows, also where a layer has them beside keys and values (Falcon-H1).
        recurrent = any(hasattr(layer, "recurrent_states") for layer in self._cache.layers)
        if len(unfinished) == len(self.rows) or (unfinished and recurrent):
            return None
        self.rows = [self.rows[place] for place in unfinished]
        keep = torch.tensor(unfinished, dtype=torch.long, device=self.model.device)
        self._mask, self._logits = self._mask[keep], self._logits[keep]
        if unfinished:
            select_rows(self._cache, keep)
        elif self.kept is None:
            self._cache = new_cache(self.model)  # frees the memory
        return keep


def _right_aligned(masks: list[Tensor]) -> Tensor:
    """Return masks [rows, positions] of several widths as one, the shorter ones padded on the left."""
    width = max(mask.shape[1] for mask in masks)
    return torch.cat([torch.nn.functional.pad(mask, (width - mask.shape[1], 0)) for mask in masks])


def _left_padded(prompts: list[list[int]], shared: int, pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the ids [rows, longest] after the first `shared` ones, and the mask [rows, shared + longest] of all."""
    rest = [prompt[shared:] for prompt in prompts]
    gaps = [max(map(len, rest)) - len(ids) for ids in rest]
    padded = [[pad] * gap + ids for gap, ids in zip(gaps, rest, strict=True)]
    real = [[1] * shared + [0] * gap + [1] * len(ids) for gap, ids in zip(gaps, rest, strict=True)]
    return torch.tensor(padded, device=device), torch.tensor(real, device=device)


def last_logits(model: PreTrainedModel, tokens: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
    """Return the logits [rows, vocabulary] of each row's last token, given tokens [rows, new] and mask [rows, all]."""
    accepted = forward_arguments(model)
    extra: dict[str, Any] = {}
    if "position_ids" in accepted:
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        extra["position_ids"] = positions[:, -tokens.shape[1] :]
    if "logits_to_keep" in accepted:
        extra["logits_to_keep"] = 1
    # transformers 5.24 gave this argument a new name, and 5.40 will not accept the earlier one.
    renamed = "cache" in accepted and "past_key_values" not in accepted
    extra["cache" if renamed else "past_key_values"] = cache
    output = model(input_ids=tokens, attention_mask=mask, use_cache=True, **extra)
    return output.logits[:, -1]
