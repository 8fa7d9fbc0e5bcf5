"""Comparison of an engine with the trained model: the same prompts, probabilities and stop.

The reference is the run's own model with the run's own renderer, in fp32. Both sides decode greedily. Up to the first
token at which they differ they have seen the same context, so that their probabilities can be compared.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from minisft.text import printable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from minisft.data.encoder import Encoder

PROMPTS = 64  # the most held-out conversations that are compared
TOP = 20  # the likeliest tokens of each position whose probabilities are compared
# The largest difference of a token's log-probability that is accepted, in nats, by number format.
_QUANTISED_TIE = 0.25  # nats: what quantisation may change about where an answer ends
BOUNDS = {"f32": 1e-3, "f16": 5e-2, "bf16": 5e-2}
MAX_KL = {"q8_0": 0.05, "q4_k_m": 0.5}  # the same for the mean KL divergence, in nats per token
Status = Literal["ok", "failed", "not run"]


@dataclass(frozen=True)
class HeldOutPrompt:
    """The messages before a held-out answer.

    Args:
        id: Id of the row.
        messages: As clients send them.
        tools: The functions on offer, as clients send them.
        ids: Token ids of the prompt as MiniSFT renders it.
        spells_marker: Whether a text spells a control token: MiniSFT writes it as text, and engines do not.
    """

    id: str
    messages: list[dict[str, Any]]
    tools: list[Any]
    ids: list[int]
    spells_marker: bool = False


@dataclass(frozen=True)
class Position:
    """The model's prediction of one token.

    Args:
        token: The id that was generated.
        top: Log-probabilities of the likeliest ids; the generated one is among them.
    """

    token: int
    top: Mapping[int, float]


@dataclass(frozen=True)
class EngineAnswer:
    """What an engine made of a prompt.

    Args:
        prompt_ids: Ids of the prompt, rendered and tokenized by the engine.
        positions: The generated tokens; of the reference with the terminator, of an engine with or without it.
        stopped: Whether the answer ended by a terminator, and not at its maximum length.
    """

    prompt_ids: list[int]
    positions: list[Position]
    stopped: bool


class Engine(Protocol):
    """An engine that serves an exported model."""

    def answer(self, prompts: Sequence[HeldOutPrompt], max_new_tokens: int) -> list[EngineAnswer]:
        """Return the greedy answers, each of at most `max_new_tokens` tokens."""


@dataclass(frozen=True)
class Tolerance:
    """What is accepted as the same.

    Args:
        logprob: The largest difference of a generated token's log-probability, in nats; None: not limited.
        mean_kl: The largest mean of the KL divergence, in nats per token; None: not limited.
    """

    logprob: float | None = None
    mean_kl: float | None = None

    @classmethod
    def of(cls, dtype: str, max_kl: float | None = None) -> "Tolerance":
        """Return the tolerance of a number format, such as f16 or q8_0; `max_kl` replaces that of a quantised one."""
        if dtype in BOUNDS:
            return cls(logprob=BOUNDS[dtype])
        return cls(mean_kl=MAX_KL[dtype] if max_kl is None else max_kl)


@dataclass
class Comparison:
    """How the answers of an engine compare with the reference.

    Args:
        prompts: Number of prompts that were compared.
        with_markers: Number of further prompts whose text spells a control token; they are not compared.
        prompt_ids_equal: Number of prompts with the same ids.
        answers_equal: Number of answers with the same tokens and the same stop.
        max_logprob_difference: Largest difference of a generated token's log-probability, in nats.
        mean_kl: Mean of the KL divergence of the engine's distribution from the reference, in nats per token. Beyond
            the likeliest tokens, all others count as one, so that it is a lower bound.
        problem: The first fault, as a sentence; "": none.
        first_difference: The first log-probability beyond the tolerance, as a clause; "": none.
    """

    prompts: int = 0
    with_markers: int = 0
    prompt_ids_equal: int = 0
    answers_equal: int = 0
    max_logprob_difference: float = 0.0
    mean_kl: float = 0.0
    problem: str = ""
    first_difference: str = ""
    _divergences: list[float] = field(default_factory=list, repr=False)

    def as_report(self) -> dict[str, Any]:
        """Return the entry of an engine in verified.json."""
        status: Status = "failed" if self.problem else "ok" if self.prompts else "not run"
        return {
            "status": status,
            "reason": self.problem or ("" if self.prompts else "the text of every prompt spells a control token"),
            "prompts": self.prompts,
            "prompts_with_markers": self.with_markers,
            "prompt_ids_equal": self.prompt_ids_equal,
            "answers_equal": self.answers_equal,
            "max_logprob_difference": self.max_logprob_difference,
            "mean_kl": self.mean_kl,
        }


def not_run(reason: str) -> dict[str, Any]:
    """Return the entry in verified.json of an engine that compared nothing."""
    return {
        "status": "not run", "reason": reason, "prompts": 0, "prompts_with_markers": 0, "prompt_ids_equal": 0,
        "answers_equal": 0, "max_logprob_difference": None, "mean_kl": None,
    }  # fmt: skip


def held_out_prompts(output: Path, encoder: "Encoder") -> list[HeldOutPrompt]:
    """Return the prompts of the last answers of the first held-out conversations of a run.

    Raises:
        UserError: The prepared data is missing or damaged.
    """
    from minisft.data.conversation import message_as_dict
    from minisft.data.encoder import tool_lines
    from minisft.evaluation.examples import load_held_out

    prompts = []
    for example in load_held_out(output, encoder, "last", PROMPTS, required=False).examples:
        messages = [message_as_dict(message) for message in example.messages]
        tools = [_parsed(line) for line in tool_lines(example.tools)]
        spells = encoder.spells_marker(example.messages)
        prompts.append(HeldOutPrompt(example.id, messages, tools, example.prompt_ids, spells))
    return prompts


def _parsed(line: str) -> Any:
    import json

    return json.loads(line)


def reference_answers(
    model: "PreTrainedModel", encoder: "Encoder", prompts: Sequence[HeldOutPrompt], max_new_tokens: int
) -> list[EngineAnswer]:
    """Return the greedy answers of the trained model, each token with its log-probabilities.

    Args:
        model: The run's model in fp32, in eval mode, adapters unmerged.
        encoder: The run's encoder.
        prompts: The prompts.
        max_new_tokens: The most tokens of an answer.
    """
    import torch

    from minisft.evaluation.generation import generate

    generated = generate(
        model,
        [prompt.ids for prompt in prompts],
        stop_token_ids=encoder.stop_token_ids,
        max_new_tokens=max_new_tokens,
    )
    answers = []
    for prompt, answer in zip(prompts, generated, strict=True):
        # One more position than tokens: it predicts the terminator, where the answer has one.
        ids = torch.tensor([prompt.ids + answer.ids], device=model.device)
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt.ids) - 1 :]
        positions = positions_of(logits, answer.ids, encoder.stop_token_ids)
        stopped = answer.finish == "stop"
        answers.append(EngineAnswer(prompt.ids, positions if stopped else positions[:-1], stopped))
    return answers


def positions_of(logits: Any, ids: Sequence[int], stops: Sequence[int]) -> list[Position]:
    """Return the positions of an answer from its logits [len(ids) + 1, vocabulary].

    The last position has the likeliest terminator.
    """
    import torch

    logprobs = torch.log_softmax(logits.float(), dim=-1)
    values, indices = logprobs.topk(min(TOP, logprobs.shape[-1]), dim=-1)
    end = max(stops, key=lambda stop: float(logprobs[-1, stop]))
    positions = []
    for place, token in enumerate([*ids, end]):
        top = dict(zip(indices[place].tolist(), values[place].tolist(), strict=True))
        positions.append(Position(token, top | {token: float(logprobs[place, token])}))
    return positions


def compare(
    prompts: Sequence[HeldOutPrompt],
    reference: Sequence[EngineAnswer],
    answers: Sequence[EngineAnswer],
    encoder: "Encoder",
    tolerance: Tolerance,
) -> Comparison:
    """Compare an engine's answers with those of the trained model.

    Args:
        prompts: The prompts.
        reference: The trained model's answers.
        answers: The engine's answers.
        encoder: The run's encoder.
        tolerance: What counts as the same.
    """
    result = Comparison()
    stops = set(encoder.stop_token_ids)
    for prompt, expected, given in zip(prompts, reference, answers, strict=True):
        if prompt.spells_marker:
            result.with_markers += 1
            continue
        result.prompts += 1
        problem = _different_prompt(prompt, given, encoder)
        if problem:
            result.problem = result.problem or problem
            continue
        result.prompt_ids_equal += 1
        problem = _compare_answer(prompt, expected, given, stops, encoder, tolerance, result)
        result.problem = result.problem or problem
    if result.prompt_ids_equal and not result._divergences:
        result.problem = result.problem or "the engine generated no token"
    if result._divergences:
        result.mean_kl = sum(result._divergences) / len(result._divergences)
    if not result.problem and tolerance.logprob is not None and result.max_logprob_difference > tolerance.logprob:
        result.problem = (
            f"{result.first_difference}; the log-probabilities differ by up to "
            f"{result.max_logprob_difference:.2g} nats, and at most {tolerance.logprob:g} is accepted"
        )
    if not result.problem and tolerance.mean_kl is not None and result.mean_kl > tolerance.mean_kl:
        result.problem = (
            f"the mean KL divergence is {result.mean_kl:.2g} nats per token, and at most {tolerance.mean_kl:g} is "
            "accepted"
        )
    return result


def _different_prompt(prompt: HeldOutPrompt, given: EngineAnswer, encoder: "Encoder") -> str:
    """Return a sentence about the first token at which the engine's prompt differs from the rendering; "": none."""
    if given.prompt_ids == prompt.ids:
        return ""
    pairs = enumerate(zip(prompt.ids, given.prompt_ids, strict=False))
    place = next((index for index, (a, b) in pairs if a != b), min(len(prompt.ids), len(given.prompt_ids)))
    ours, theirs = (_token_text(ids[place : place + 1], encoder) for ids in (prompt.ids, given.prompt_ids))
    return (
        f"row {prompt.id}: the engine's prompt differs from the trained one, first at token {place}: {theirs} in place "
        f"of {ours}"
    )


def _token_text(ids: Sequence[int], encoder: "Encoder") -> str:
    if not ids:
        return "nothing"
    return f"{ids[0]} {printable(str(encoder.tokenizer.convert_ids_to_tokens(ids[0])))!r}"


def _compare_answer(
    prompt: HeldOutPrompt,
    expected: EngineAnswer,
    given: EngineAnswer,
    stops: set[int],
    encoder: "Encoder",
    tolerance: Tolerance,
    result: Comparison,
) -> str:
    """Compare one answer, and add it to `result`; return a sentence about its first fault, or ""."""
    # An engine may report the terminator or leave it out: without it, its probability is unknown.
    for place, position in enumerate(expected.positions):
        if place >= len(given.positions):
            break
        other = given.positions[place]
        if position.token in other.top:
            ours, theirs = position.top[position.token], other.top[position.token]
            result.max_logprob_difference = max(result.max_logprob_difference, abs(ours - theirs))
            if tolerance.logprob is not None and abs(ours - theirs) > tolerance.logprob and not result.first_difference:
                result.first_difference = (
                    f"row {prompt.id}: the log-probability of token {place} of the answer, "
                    f"{_token_text([position.token], encoder)}, is {theirs:.4f} in place of {ours:.4f}"
                )
        result._divergences.append(divergence(position.top, other.top))
        if other.token != position.token:
            return _different_token(prompt, place, position, other.token, encoder, tolerance)
    ends = len(expected.positions) - (1 if expected.stopped else 0)
    tokens = [position.token for position in given.positions]
    answer = tokens[:-1] if given.stopped and tokens and tokens[-1] in stops else tokens
    if given.stopped == expected.stopped and len(answer) == ends:
        result.answers_equal += 1
        return ""
    if given.stopped and len(answer) < ends:  # where it stopped, the trained model continued
        position = expected.positions[len(answer)]
        return _different_token(prompt, len(answer), position, None, encoder, tolerance)
    wanted = _token_text([expected.positions[-1].token], encoder)
    return f"row {prompt.id}: the engine does not stop at the terminator {wanted}, token {ends} of the answer"


def _different_token(
    prompt: HeldOutPrompt,
    place: int,
    position: Position,
    token: int | None,
    encoder: "Encoder",
    tolerance: Tolerance,
) -> str:
    """Return a sentence about an answer's first different token; "" where rounding explains the difference.

    Two tokens are a tie if the reference gives them log-probabilities closer than twice the tolerance.
    """
    if tolerance.logprob is None and token is not None:
        return ""  # a quantised model: its mean KL divergence decides
    limit = _QUANTISED_TIE if tolerance.logprob is None else tolerance.logprob
    other = position.top.get(token, -math.inf) if token is not None else -math.inf
    if token is None:
        other = max((position.top.get(stop, -math.inf) for stop in encoder.stop_token_ids), default=-math.inf)
    if position.top[position.token] - other <= 2 * limit:
        return ""
    theirs = "the end of the answer" if token is None else _token_text([token], encoder)
    return (
        f"row {prompt.id}: the answers differ, first at token {place}: {theirs} in place of "
        f"{_token_text([position.token], encoder)}"
    )


def divergence(reference: Mapping[int, float], other: Mapping[int, float]) -> float:
    """Return the KL divergence of `other` from `reference`, in nats, over their common tokens and the rest as one.

    Merging outcomes never increases a KL divergence (data processing inequality), so that it is a lower bound.
    """
    common = reference.keys() & other.keys()
    pairs = [(math.exp(reference[token]), math.exp(other[token])) for token in common]
    rest = [max(1 - sum(column), 1e-12) for column in zip(*pairs, strict=True)] if pairs else [1.0, 1.0]
    return max(0.0, sum(p * math.log(p / max(q, 1e-30)) for p, q in [*pairs, (rest[0], rest[1])] if p > 0))
