"""Questions to the judge's server, by the openai client: at once, repeated after a wait, within a budget of requests.

The server is not trusted: a reply has a largest size and a longest time, redirects are not followed, and its text is
returned as it is, to be parsed elsewhere.
"""

import contextlib
import email.utils
import importlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

from minisft.errors import UserError
from minisft.optional_packages import require_package
from minisft.recipe import JudgeRecipe

API_KEY = "MINISFT_JUDGE_API_KEY"
WHERE = "evaluation.judge"
MOST_BYTES = 4 << 20  # of one reply; those of real judges have a few thousand
LONGEST_WAIT = 300.0  # seconds; a server that asks for a longer wait is left
_MOST_REFUSED = 20  # questions in a row that a server that can be reached does not answer
_FIRST_WAIT, _MOST_WAIT = 0.5, 30.0  # seconds of back-off, doubled after each attempt
_WRONG_SETTINGS = (401, 403, 404)  # these would refuse every other question too
_REPEATED = (408, 409, 429)  # besides 500 and above


class _StoppedError(Exception):
    """No more questions are asked: the budget is spent, the server is of no use, or the user has stopped it."""


class _UnansweredError(Exception):
    """A question has no answer; the text says why.

    Args:
        problem: What is wrong.
        refused: Whether the server answered, and only not as it should.
    """

    def __init__(self, problem: str, refused: bool) -> None:
        super().__init__(problem)
        self.refused = refused


def require_client() -> Any:
    """Return the openai package.

    Raises:
        UserError: It is not installed.
    """
    require_package(WHERE, "openai")
    import openai

    return openai


class Asking:
    """One round of questions, and why it ended early.

    Args:
        settings: The recipe's `evaluation.judge`.
        sleep: Waits for so many seconds; None: until then or until the round is stopped.

    Attributes:
        requests: Number of requests that were sent.
        problem: Why some questions have no answer, and how to fix it; None while all have one.
    """

    def __init__(self, settings: JudgeRecipe, sleep: Callable[[float], object] | None = None) -> None:
        self._openai = require_client()
        self.settings = settings
        self.requests = 0
        self.problem: UserError | None = None
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._sleep = sleep or self._stop.wait
        self._failures = 0  # questions without an answer, since the last one with an answer

    def ask(self, questions: Mapping[str, str], on_reply: Callable[[str, str, str], str | None]) -> None:
        """Ask all questions, `concurrency` at once.

        Args:
            questions: The questions by key, in the order in which they are asked.
            on_reply: Called with the key, the reply and its finish reason; never by two threads at once, and before the
                thread asks its next question. It returns None, or why no more questions are worth asking.
        """
        key = os.environ.get(API_KEY, "").strip()
        http_client = self._openai.DefaultHttpxClient(
            timeout=self.settings.timeout,
            follow_redirects=False,
            event_hooks={"response": [_bounded_reply(self._openai, self.settings.timeout)]},
        )
        client = self._openai.OpenAI(
            base_url=self.settings.base_url,
            api_key=key or "none",  # servers of one's own, such as `minisft serve`, take any
            max_retries=0,  # openai would repeat requests beyond the budget
            timeout=self.settings.timeout,
            http_client=http_client,
        )

        def work(key: str, question: str) -> None:
            with contextlib.suppress(_StoppedError):
                try:
                    text, finish = self._reply(client, question)
                except _UnansweredError as problem:
                    self._count_failure(str(problem), _MOST_REFUSED if problem.refused else self.settings.concurrency)
                    return
                with self._lock:
                    self._failures = 0
                    if reason := on_reply(key, text, finish):
                        self._end(reason, "choose another evaluation.judge.model, and evaluate again")

        with client, ThreadPoolExecutor(self.settings.concurrency, "judge") as pool:
            futures = [pool.submit(work, key, question) for key, question in questions.items()]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)  # such as a disk that is full
                for future in futures:
                    if future.done():
                        future.result()
            finally:
                self._stop.set()
                pool.shutdown(cancel_futures=True)

    def _reply(self, client: Any, question: str) -> tuple[str, str]:
        """Return the text of the judge's reply, and its finish reason; a request that fails in passing is repeated."""
        for attempt in range(self.settings.max_retries + 1):
            self._take_request()
            try:
                body = client.chat.completions.with_raw_response.create(
                    model=self.settings.model, messages=[{"role": "user", "content": question}], **self._limits()
                ).http_response.json()
                return _content(body)
            except self._openai.APIStatusError as error:
                problem = f"it refused with status {error.status_code}: {_short(_message(error))}"
                if error.status_code in _WRONG_SETTINGS:
                    raise self._ended(problem, _settings_fix(error.status_code)) from None
                if error.status_code not in _REPEATED and error.status_code < 500:
                    raise _UnansweredError(problem, refused=True) from None
                seconds = self._retry_after(error.response.headers)
            except self._openai.APIConnectionError as error:  # timeouts too
                problem = f"it cannot be reached ({_short(str(error.__cause__ or error) or type(error).__name__)})"
                seconds = None
            except (ValueError, RecursionError, self._openai.OpenAIError) as error:
                problem = f"its answer is not a chat completion ({_short(str(error))})"
                raise _UnansweredError(problem, refused=True) from None
            if attempt < self.settings.max_retries:
                backoff = min(_MOST_WAIT, _FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1.0)
                self._sleep(backoff if seconds is None else seconds)
        raise _UnansweredError(f"{problem}, after {self.settings.max_retries + 1} requests", refused=False)

    def _limits(self) -> dict[str, Any]:
        limits = {"temperature": self.settings.temperature, "max_tokens": self.settings.max_tokens}
        return {name: value for name, value in limits.items() if value is not None}

    def _take_request(self) -> None:
        """Count a request that is about to be sent."""
        with self._lock:
            if self._stop.is_set():
                raise _StoppedError
            if self.requests >= self.settings.max_requests:
                problem = f"the budget of {self.requests:,} requests is spent"
                self._end(problem, "raise evaluation.judge.max_requests, or evaluate again: the verdicts are kept")
                raise _StoppedError
            self.requests += 1

    def _retry_after(self, headers: Mapping[str, str]) -> float | None:
        """Return the seconds that the server asks to wait; None if it does not say."""
        text = headers.get("retry-after", "")
        try:
            seconds = float(text)
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
            except (ValueError, TypeError, OverflowError):
                return None
        if not seconds <= LONGEST_WAIT:  # also true for nan
            fix = f"evaluate again then, or lower evaluation.judge.concurrency ({self.settings.concurrency})"
            raise self._ended(f"it asks to wait {seconds:,.0f} seconds", fix)
        return max(0.0, seconds)

    def _count_failure(self, problem: str, most: int) -> None:
        """Note a question without an answer; `most` of them in a row end the round."""
        with self._lock:
            self._failures += 1
            fix = "check evaluation.judge.base_url and the server, and evaluate again: the verdicts are kept"
            self.problem = self.problem or UserError(self._server, problem, fix)
            if self._failures >= most:
                self._end(problem, fix)

    def _ended(self, problem: str, fix: str) -> _StoppedError:
        with self._lock:
            self._end(problem, fix)
        return _StoppedError()

    def _end(self, problem: str, fix: str) -> None:
        """Ask no more questions; the caller holds the lock."""
        if not self._stop.is_set():
            self.problem = UserError(self._server, problem, fix)
            self._stop.set()

    @property
    def _server(self) -> str:
        return f"{WHERE}: {self.settings.base_url}"


def _bounded_reply(openai: Any, seconds: float) -> Callable[[Any], None]:
    """Return a hook of the HTTP client that ends a reply which is too large, or not complete after `seconds`."""
    # openai builds on httpx, since version 3 on httpx2; both have the same classes
    http: Any = importlib.import_module(openai.DefaultHttpxClient.__mro__[1].__module__.partition(".")[0])

    class Bounded(http.SyncByteStream):  # type: ignore[misc,name-defined]
        def __init__(self, stream: Any) -> None:
            self.stream, self.until = stream, time.monotonic() + seconds

        def __iter__(self) -> Iterator[bytes]:
            size = 0
            for part in self.stream:
                size += len(part)
                if size > MOST_BYTES:
                    raise http.ReadError(f"its reply is larger than {MOST_BYTES >> 20} MiB")
                if time.monotonic() > self.until:
                    raise http.ReadTimeout(f"its reply was not complete after {seconds:g} seconds")
                yield part

        def close(self) -> None:
            self.stream.close()

    def bound(response: Any) -> None:
        response.stream = Bounded(response.stream)

    return bound


def _content(body: Any) -> tuple[str, str]:
    """Return the text and the finish reason of a chat completion.

    Raises:
        ValueError: It is none.
    """
    try:
        choice = body["choices"][0]
        content = choice["message"]["content"]
    except (TypeError, KeyError, IndexError):
        raise ValueError("it has no choices[0].message.content") from None
    if not isinstance(content, str):
        raise ValueError("choices[0].message.content is not text")
    return content, str(choice.get("finish_reason"))


def _message(error: Any) -> str:
    """Return what the server says in an error, in OpenAI's form or as plain text."""
    body = error.body
    return str(body["message"] if isinstance(body, dict) and "message" in body else body or error.message)


def _settings_fix(status: int) -> str:
    if status == 404:
        return "check evaluation.judge.model and evaluation.judge.base_url, which usually ends in /v1"
    return f"set the environment variable {API_KEY} to a key of this server"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 200 else f"{text[:200]} ..."
