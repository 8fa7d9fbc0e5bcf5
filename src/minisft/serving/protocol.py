"""JSON bodies of OpenAI's interface to checked requests, and errors in its form.

The pydantic types stay in this module: the rest of the server works on the frozen dataclasses below.
Source: the OpenAI API reference, "Create chat completion" and "Create completion".
"""

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from minisft.data.conversation import Conversation
from minisft.data.formats import RowError, to_conversation
from minisft.evaluation.generation import Sampling

MOST_CHOICES = 16  # the largest n
MOST_ROWS = 128  # prompts times n of one request
MOST_STOPS = 16
MOST_TOP_LOGPROBS = 20
COMPLETION_TOKENS = 16  # max_tokens of /v1/completions where none is given, as at OpenAI
MOST_TOKENS = 1 << 20  # max_tokens above this is no number of tokens of any model


class ApiError(Exception):
    """A refused request.

    Args:
        status: The HTTP status.
        message: What is wrong, and what to do.
        param: The parameter that is wrong, if it is one.
        code: OpenAI's word for the error, if there is one.
        headers: Further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the error in OpenAI's form."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class AnswerOptions:
    """How answers are generated and returned.

    Args:
        model: Name of the model.
        choices: Number of answers to each prompt.
        max_tokens: The most tokens of an answer; None: as many as the context holds.
        stops: Texts at which an answer ends.
        sampling: Sampling settings; None: greedy decoding.
        top_logprobs: Number of likeliest tokens to report with each token; None: no probabilities.
        stream: Send the answer in chunks.
        stream_usage: Send the number of tokens in a last chunk.
    """

    model: str
    choices: int
    max_tokens: int | None
    stops: tuple[str, ...]
    sampling: Sampling | None
    top_logprobs: int | None
    stream: bool
    stream_usage: bool


@dataclass(frozen=True)
class ChatRequest:
    """A conversation to answer; `use_tools`: calls of its tools are looked for in the answer."""

    options: AnswerOptions
    conversation: Conversation
    use_tools: bool = False


@dataclass(frozen=True)
class CompletionRequest:
    """Texts or token ids to continue."""

    options: AnswerOptions
    prompts: tuple[str | tuple[int, ...], ...] = field(default=())


# --- the types of the bodies ------------------------------------------------------------------------------


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: StrictBool | None = None
    include_obfuscation: StrictBool | None = None


_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_Positive = Annotated[int, Field(strict=True, ge=1, le=MOST_TOKENS)]


class _Body(BaseModel):
    """What both kinds of requests have; other keys are checked by `_refuse_unsupported`."""

    model_config = ConfigDict(extra="allow")
    model: StrictStr
    n: Annotated[int, Field(strict=True, ge=1, le=MOST_CHOICES)] | None = None
    max_tokens: _Positive | None = None
    stop: StrictStr | Annotated[list[StrictStr], Field(max_length=MOST_STOPS)] | None = None
    seed: Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)] | None = None
    temperature: Annotated[_Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[_Number, Field(gt=0, le=1)] | None = None
    stream: StrictBool | None = None
    stream_options: _StreamOptions | None = None


class _ChatBody(_Body):
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: _Positive | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[int, Field(strict=True, ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None


class _CompletionBody(_Body):
    prompt: StrictStr | list[StrictInt] | list[StrictStr] | list[list[StrictInt]]
    logprobs: Annotated[int, Field(strict=True, ge=0, le=MOST_TOP_LOGPROBS)] | None = None


class _TokenizeBody(BaseModel):
    model_config = ConfigDict(extra="forbid")
    model: StrictStr
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    tools: list[dict[str, Any]] | None = None


# Parameters that change nothing of an answer here, with any value.
_WITHOUT_EFFECT = {"user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier",
                   "prompt_cache_key", "prompt_cache_retention", "verbosity"}  # fmt: skip
# Parameters that are not supported, and the values that ask for nothing.
_NEUTRAL: dict[str, Callable[[Any], bool]] = {
    "frequency_penalty": lambda value: value == 0,
    "presence_penalty": lambda value: value == 0,
    "logit_bias": lambda value: value == {},
    "response_format": lambda value: value == {"type": "text"},
    "modalities": lambda value: value == ["text"],
    "functions": lambda value: value == [],
    "echo": lambda value: value is False,
    "suffix": lambda value: value == "",
    "best_of": lambda value: value == 1,
}


def read_json(body: bytes) -> dict[str, Any]:
    """Return the JSON object of a request's body.

    Raises:
        ApiError: It is no JSON object.
    """
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 ({error.reason} at byte {error.start})") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body is not a JSON object")
    return value


def chat_request(body: dict[str, Any]) -> ChatRequest:
    """Return the checked request of a body of /v1/chat/completions.

    Raises:
        ApiError: A value is missing, of a wrong type, out of range or not supported.
    """
    checked = _checked(_ChatBody, body)
    if checked.max_tokens is not None and checked.max_completion_tokens not in (None, checked.max_tokens):
        raise ApiError(400, "max_tokens and max_completion_tokens differ: give one of them", "max_completion_tokens")
    if checked.top_logprobs is not None and not checked.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
    choice = checked.tool_choice
    if choice not in (None, "auto", "none"):
        message = 'tool_choice can be "auto" or "none" here: the model itself decides whether it calls a function'
        raise ApiError(422, message, "tool_choice", "unsupported_value")
    if choice == "auto" and not checked.tools:
        raise ApiError(400, "tool_choice needs tools", "tool_choice")
    options = _options(
        checked,
        checked.max_completion_tokens if checked.max_tokens is None else checked.max_tokens,
        (checked.top_logprobs or 0) if checked.logprobs else None,
    )
    tools = checked.tools if choice != "none" else None
    return ChatRequest(options, read_conversation(checked.messages, tools), bool(tools))


def completion_request(body: dict[str, Any]) -> CompletionRequest:
    """Return the checked request of a body of /v1/completions.

    Raises:
        ApiError: A value is missing, of a wrong type, out of range or not supported.
    """
    checked = _checked(_CompletionBody, body)
    given: Any = checked.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    prompts = tuple(prompt if isinstance(prompt, str) else tuple(prompt) for prompt in given)
    if not prompts or not all(prompts):
        raise ApiError(400, "the prompt is empty: a model needs at least one token to continue", "prompt")
    for prompt in prompts:
        if isinstance(prompt, str):
            _require_unicode(prompt, "prompt")
    options = _options(checked, checked.max_tokens or COMPLETION_TOKENS, checked.logprobs)
    if len(prompts) * options.choices > MOST_ROWS:
        message = f"{len(prompts)} prompts with n = {options.choices} are more than {MOST_ROWS} answers"
        raise ApiError(400, f"{message}: send fewer in one request", "prompt")
    return CompletionRequest(options, prompts)


def tokenize_request(body: dict[str, Any]) -> tuple[str, Conversation]:
    """Return the model's name and the conversation of a body of /tokenize.

    Raises:
        ApiError: A value is missing or of a wrong type.
    """
    checked = _validated(_TokenizeBody, body)
    return checked.model, read_conversation(checked.messages, checked.tools)


def read_conversation(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> Conversation:
    """Return the conversation of a request, read as a row of training data in the same form is.

    Raises:
        ApiError: The messages are no conversation of text.
    """
    row = {"messages": messages, **({"tools": tools} if tools else {})}
    try:
        return to_conversation(row, "the request", "messages")
    except RowError as error:
        param = "tools" if error.reason == "bad_tools" else "messages"
        raise ApiError(400, f"{error.problem}: {error.fix}", param) from None


def _checked(kind: Any, body: dict[str, Any]) -> Any:
    checked = _validated(kind, body)
    _refuse_unsupported(checked.model_extra or {})
    return checked


def _validated(kind: Any, body: dict[str, Any]) -> Any:
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        names = [str(part) for part in first["loc"]]
        key = names[0] if names else None
        where = key or "the body"
        if first["type"] == "missing":
            raise ApiError(400, f"{where} is missing", key, "missing_required_parameter") from None
        raise ApiError(400, f"{where}: {first['msg'][:300]}", key, "invalid_value") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None


def _refuse_unsupported(extra: Mapping[str, Any]) -> None:
    """Refuse what would change the answer and is not supported; nothing that a client asks for is ignored."""
    for key, value in extra.items():
        if value is None or key in _WITHOUT_EFFECT or (key in _NEUTRAL and _NEUTRAL[key](value)):
            continue
        name = key[:60]
        known = "with this value " if key in _NEUTRAL else ""
        raise ApiError(422, f"{name} is not supported {known}here: leave it out", name, "unsupported_parameter")


def _options(checked: Any, max_tokens: int | None, top_logprobs: int | None) -> AnswerOptions:
    stops = (checked.stop,) if isinstance(checked.stop, str) else tuple(checked.stop or ())
    for stop in stops:
        _require_unicode(stop, "stop")
    if not all(stops):
        raise ApiError(400, "a stop text is empty", "stop")
    if checked.stream_options is not None and not checked.stream:
        raise ApiError(400, "stream_options needs stream: true", "stream_options")
    temperature = 1.0 if checked.temperature is None else checked.temperature
    seed = random.SystemRandom().getrandbits(32) if checked.seed is None else checked.seed
    sampling = Sampling(temperature, 1.0 if checked.top_p is None else checked.top_p, seed) if temperature > 0 else None
    return AnswerOptions(
        model=checked.model,
        choices=checked.n or 1,
        max_tokens=max_tokens,
        stops=stops,
        sampling=sampling,
        top_logprobs=top_logprobs,
        stream=bool(checked.stream),
        stream_usage=bool(checked.stream_options and checked.stream_options.include_usage),
    )


def _require_unicode(text: str, param: Literal["prompt", "stop"]) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ApiError(400, f"{param} holds half of a surrogate pair, which is no text", param) from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
