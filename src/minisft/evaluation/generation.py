"""The only decoding loop: evaluation, and chat with its streaming, go through `generate`.

Prompts of similar length share a batch, padded on the left. Rows that finished leave the batch, so that the
long answers alone do not pay for the short ones. Greedy unless a `Sampling` is given.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

Finish = Literal["stop", "length", "context", "interrupted"]

# A batch holds at most so many key-value positions (rows times longest row), whatever `batch_size` says.
CACHE_POSITIONS = 65536
# Key-value buffers grow by so many positions at a time.
CACHE_BLOCK = 64
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


@dataclass(frozen=True)
class Sampling:
    """Draw the next token instead of taking the likeliest one.

    Args:
        temperature: above 0; divides the logits.
        top_p: the smallest set of tokens with this much probability is kept.
        seed: of the generator, one per call of `generate`.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0 or not 0 < self.top_p <= 1:
            raise ValueError("sampling needs a temperature above 0 and a top_p above 0 and at most 1")


@dataclass
class PromptCache:
    """Keys and values of the last prompt and answer: the next turn of a chat computes its new part only."""

    ids: list[int]
    cache: DynamicCache | None = None

    def reuse(self, prompt: list[int]) -> int:
        """Crops the cache to what `prompt` shares with it, at least one id less, and returns that length."""
        shared = min(_common_prefix(self.ids, prompt), len(prompt) - 1)
        surplus = len(self.ids) - shared
        if self.cache is None or shared == 0 or (surplus > 0 and not _crop(self.cache, surplus)):
            self.cache, shared = None, 0
        self.ids = prompt[:shared]
        return shared


def context_length(model: PreTrainedModel) -> int | None:
    """The most positions that the model was built for; None where its config names no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


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
    on_batch: Callable[[list[int], list[Generated]], None] | None = None,
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
        on_batch: called with (indices, answers) as soon as a batch is done.
        prompt_cache: for one prompt only; taken from and left behind.

    Returns:
        One `Generated` per prompt.
    """
    assert prompt_cache is None or len(prompts) == 1
    rules = _Rules(frozenset(stop_token_ids), max_new_tokens, pad_token_id, sampling, on_token)
    draws = torch.Generator(model.device).manual_seed(sampling.seed) if sampling is not None else None
    answers: dict[int, Generated] = {}
    for indices in plan_batches([len(prompt) for prompt in prompts], batch_size, max_new_tokens):
        batch = _Batch(model, rules, {index: prompts[index] for index in indices}, draws)
        done = batch.decode(prompt_cache)
        answers |= dict(zip(indices, done, strict=True))
        if on_batch is not None:
            on_batch(indices, done)
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

    def __init__(
        self,
        model: PreTrainedModel,
        rules: _Rules,
        prompts: dict[int, list[int]],
        draws: torch.Generator | None,
    ) -> None:
        self.model, self.rules, self.prompts, self.draws = model, rules, prompts, draws
        self.rooms = {row: _room(model, prompt, rules.max_new_tokens) for row, prompt in prompts.items()}
        self.ids: dict[int, list[int]] = {row: [] for row in prompts}
        self.finish: dict[int, Finish] = {row: "context" for row, room in self.rooms.items() if room == 0}
        self.rows = [row for row in prompts if row not in self.finish]

    @torch.inference_mode()
    def decode(self, kept: PromptCache | None) -> list[Generated]:
        if self.rows:
            logits = self._prefill() if kept is None else self._prefill_from(kept)
        while self.rows:
            picked = _pick(logits, self.rules.sampling, self.draws)
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
        start = _new_cache(self.model)
        mergeable = all(type(layer) is _RoomyLayer for layer in start.layers)
        shared = _prefill_shared(self.model, start, prompts) if mergeable else 0
        size = PREFILL_ROWS if mergeable else len(prompts)
        logits, masks, caches = [], [], []
        for place in range(0, len(prompts), size):
            some = prompts[place : place + size]
            cache = _repeated(start, len(some)) if mergeable else start
            tokens, mask = _left_padded(some, shared, self.rules.pad, self.model.device)
            logits.append(_forward(self.model, tokens, mask, cache))
            masks.append(mask)
            caches.append(cache)
        self.mask = _right_aligned(masks)
        self.cache = _merged(caches, self.mask.shape[1]) if len(caches) > 1 else caches[0]
        return torch.cat(logits)

    def _prefill_from(self, kept: PromptCache) -> Tensor:
        """The same for the one prompt of a chat, from what `kept` holds of it."""
        prompt = self.prompts[self.rows[0]]
        shared = kept.reuse(prompt)
        self.cache = kept.cache if kept.cache is not None else _new_cache(self.model)
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


class _RoomyLayer(DynamicLayer):
    """A layer of keys and values [rows, heads, positions, width] that grows in place, a block at a time.

    `DynamicLayer` copies everything for every new token.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
            self._buffers: list[Tensor] = []
        assert self.keys is not None
        assert self.values is not None
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        if not self._buffers or self._buffers[0].shape[-2] < end:
            self._buffers = [_roomy(self.keys, end), _roomy(self.values, end)]
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., start:end, :] = new
        self.keys, self.values = (buffer[..., :end, :] for buffer in self._buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._buffers = []

    @classmethod
    def holding(cls, keys: Tensor | None, values: Tensor | None, rows: int) -> "_RoomyLayer":
        """A layer that starts with the keys and values [1, heads, positions, width], if any, in each of its rows."""
        layer = cls()
        if keys is not None and values is not None:
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = (states.expand(rows, -1, -1, -1) for states in (keys, values))
            layer._buffers = []
        return layer

    def take(self, keys: list[Tensor], values: list[Tensor], width: int) -> None:
        """Takes the rows of several layers, each right-aligned in `width` positions."""
        self.lazy_initialization(keys[0], values[0])
        self._buffers = [_aligned(states, width) for states in (keys, values)]
        self.keys, self.values = (buffer[..., :width, :] for buffer in self._buffers)


def _aligned(parts: list[Tensor], width: int) -> Tensor:
    """A buffer of all rows with room for a block more; what is not filled is zero, since the mask multiplies it."""
    rows = sum(len(part) for part in parts)
    _, heads, _, size = parts[0].shape
    buffer = parts[0].new_zeros(rows, heads, width + CACHE_BLOCK, size)
    for part, place in zip(parts, _starts(parts), strict=True):
        buffer[place : place + len(part), :, width - part.shape[-2] : width] = part
    return buffer


def _starts(parts: list[Tensor]) -> list[int]:
    ends = list(accumulate(len(part) for part in parts))
    return [0, *ends[:-1]]


def _roomy(states: Tensor, positions: int) -> Tensor:
    """A buffer with room for `positions` and a block more, that starts with `states`."""
    rows, heads, length, width = states.shape
    buffer = states.new_empty(rows, heads, positions + CACHE_BLOCK, width)
    buffer[..., :length, :] = states
    return buffer


def _new_cache(model: PreTrainedModel) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    cache.layers = [_RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _prefill_shared(model: PreTrainedModel, cache: DynamicCache, prompts: list[list[int]]) -> int:
    """Puts what all prompts begin with (a system prompt, say) into the cache, computed once; returns its length.

    Padding then stands between it and the rest, which a sliding window, counting columns, would not bear.
    """
    shared = min(_common_prefix(prompts[0], prompt[:-1]) for prompt in prompts)
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


def _repeated(cache: DynamicCache, rows: int) -> DynamicCache:
    """A copy of a cache of one row, for `rows` rows."""
    copy = DynamicCache()
    layers: list[Any] = cache.layers
    copy.layers = [_RoomyLayer.holding(layer.keys, layer.values, rows) for layer in layers]
    return copy


def _right_aligned(masks: list[Tensor]) -> Tensor:
    """Masks [rows, width] of several widths as one, the shorter ones padded on the left."""
    width = max(mask.shape[1] for mask in masks)
    return torch.cat([torch.nn.functional.pad(mask, (width - mask.shape[1], 0)) for mask in masks])


def _merged(caches: list[DynamicCache], width: int) -> DynamicCache:
    """Caches of several widths as one of `width` positions, the shorter ones padded on the left."""
    merged = DynamicCache()
    merged.layers = []
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        layer = _RoomyLayer()
        if layers[0].keys is not None:  # a layer may use another one's
            layer.take([one.keys for one in layers], [one.values for one in layers], width)
        merged.layers.append(layer)
        for one in layers:  # so that no more than one layer is there twice
            one.keys = one.values = None
    return merged


def _crop(cache: DynamicCache, surplus: int) -> bool:
    """Drops the last positions; False where a layer cannot (a sliding window has forgotten them)."""
    try:
        cache.crop(-surplus)
    except (RuntimeError, ValueError, AttributeError, NotImplementedError):
        return False
    return True


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


def _pick(logits: Tensor, sampling: Sampling | None, random: torch.Generator | None) -> Tensor:
    """Next ids [rows] from logits [rows, vocabulary]."""
    if sampling is None:
        return logits.argmax(dim=-1)
    probabilities, order = torch.softmax(logits.float() / sampling.temperature, dim=-1).sort(descending=True)
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities = probabilities.masked_fill(before >= sampling.top_p, 0)
    drawn = torch.multinomial(probabilities, 1, generator=random)
    return order.gather(1, drawn)[:, 0]


def _room(model: PreTrainedModel, prompt: list[int], max_new_tokens: int) -> int:
    context = context_length(model)
    return max_new_tokens if context is None else max(0, min(max_new_tokens, context - len(prompt)))


def _worth_compacting(going: int, rows: int, cache: DynamicCache) -> bool:
    """One row in eight has finished, and every layer can drop rows (recurrent states cannot)."""
    return rows - going >= max(1, rows // 8) and all(hasattr(layer, "batch_select_indices") for layer in cache.layers)


def _common_prefix(left: list[int], right: list[int]) -> int:
    differs = (place for place, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)
    return next(differs, min(len(left), len(right)))
