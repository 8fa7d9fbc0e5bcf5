"""The application and its routes, and the start and stop of the server."""

import asyncio
import contextlib
import json
import secrets
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from minisft.data.conversation import Conversation
from minisft.data.renderers.base import RefusedError
from minisft.errors import UserError
from minisft.evaluation.generation import DecodingRequest
from minisft.serving.answer_text import AnswerText, Piece
from minisft.serving.chat_page import page_html, page_policy
from minisft.serving.guards import Guard, Receive, Scope, Send, read_body
from minisft.serving.model_pool import ModelPool, ServedModel
from minisft.serving.preferences import FILE_NAME, add_preferences_route
from minisft.serving.protocol import (
    AnswerOptions,
    ApiError,
    ChatRequest,
    CompletionRequest,
    chat_request,
    completion_request,
    read_json,
    tokenize_request,
)
from minisft.serving.reply_bodies import DONE, Reply, as_json, event
from minisft.serving.scheduler import Job, Scheduler

Delivered = tuple[int, Piece | ApiError]

_UNLIMITED_TOKENS = 4096  # of an answer, where neither the request nor the model has a limit
_STOP_SECONDS = 1


class Service:
    """What the routes do: from a checked request to a job, and from the job's pieces to a response."""

    def __init__(self, pool: ModelPool, scheduler: Scheduler) -> None:
        self.pool, self.scheduler = pool, scheduler
        self.encoding = ThreadPoolExecutor(1, "encode")  # the encoder is for one thread at a time

    def model(self, name: str) -> ServedModel:
        """Return the model of a name.

        Raises:
            ApiError: There is none; the message lists those that exist.
        """
        models = self.pool.models()
        if name not in models:
            known = ", ".join(models)
            raise ApiError(404, f"there is no model {name[:100]!r}; there are: {known}", "model", "model_not_found")
        return models[name]

    def rendered(self, conversation: Conversation) -> list[int]:
        """Return the token ids of a conversation's prompt, as evaluation and `minisft chat` render it.

        Raises:
            ApiError: The template refuses the conversation, or has no tools.
        """
        if conversation.messages[-1].role not in ("user", "tool"):
            raise ApiError(400, "the last message is not of the user or a tool: there is nothing to answer", "messages")
        try:
            ids = self.pool.encoder.encode_prompt(conversation.messages, conversation.tools)
            if conversation.tools and ids == self.pool.encoder.encode_prompt(conversation.messages):
                raise ApiError(400, "the model's chat template has no tools: leave them out", "tools")
        except RefusedError as refusal:
            raise ApiError(400, f"the model's chat template refuses this: {refusal.problem}", "messages") from None
        return ids

    def text_ids(self, prompt: str | tuple[int, ...], vocabulary: int) -> list[int]:
        """Return the token ids of a text as its tokenizer encodes it, or the given ids."""
        if not isinstance(prompt, str):
            if not all(0 <= token < vocabulary for token in prompt):
                raise ApiError(400, f"a token id is not between 0 and {vocabulary - 1}", "prompt")
            return list(prompt)
        ids = self.pool.encoder.tokenizer(prompt)["input_ids"]
        if not ids:
            raise ApiError(400, "the prompt has no tokens", "prompt")
        return list(ids)

    def chat_job(self, request: ChatRequest, deliver: Callable[[int, Piece | ApiError], None]) -> tuple[Job, Reply]:
        """Return the job of a chat request, and the form of its reply.

        Raises:
            ApiError: The request cannot be answered.
        """
        model = self.model(request.options.model)
        tools = _tool_names(request) if request.use_tools else None
        return self._job(model, request.options, [self.rendered(request.conversation)], deliver, chat=True, tools=tools)

    def completion_job(
        self, request: CompletionRequest, deliver: Callable[[int, Piece | ApiError], None]
    ) -> tuple[Job, Reply]:
        """Return the job of a completion request, and the form of its reply.

        Raises:
            ApiError: The request cannot be answered.
        """
        model = self.model(request.options.model)
        vocabulary = len(self.pool.encoder.tokenizer)
        prompts = [self.text_ids(prompt, vocabulary) for prompt in request.prompts]
        return self._job(model, request.options, prompts, deliver, chat=False)

    def _job(
        self,
        model: ServedModel,
        options: AnswerOptions,
        prompts: list[list[int]],
        deliver: Callable[[int, Piece | ApiError], None],
        *,
        chat: bool,
        tools: frozenset[str] | None = None,
    ) -> tuple[Job, Reply]:
        encoder, rows = self.pool.encoder, []
        context = self.pool.context(model)
        for prompt in prompts:
            most = _room(len(prompt), options.max_tokens, context)
            for choice in range(options.choices):
                sampling = options.sampling and replace(options.sampling, seed=options.sampling.seed + choice)
                rows.append(
                    DecodingRequest(prompt, frozenset(encoder.stop_token_ids), most, sampling, options.top_logprobs)
                )
        texts = tuple(AnswerText(encoder, options.stops, splits=chat, tools=tools) for _ in rows)
        scored = options.top_logprobs is not None
        reply = Reply(chat, model.name, sum(map(len, prompts)), scored, options.stream_usage)
        return Job(model, tuple(rows), texts, deliver), reply

    # --- responses ----------------------------------------------------------------------------------------

    async def respond(
        self,
        make: Callable[[Callable[[int, Piece | ApiError], None]], tuple[Job, Reply]],
        stream: bool,
        receive: Receive,
    ) -> Response:
        """Submit a job and return its response; if the client leaves, its rows are freed at once."""
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[Delivered]()

        def deliver(row: int, piece: Piece | ApiError) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(pieces.put_nowait, (row, piece))

        job, reply = await loop.run_in_executor(self.encoding, make, deliver)
        self.scheduler.submit(job)
        answers = _answers(pieces, len(job.rows))
        cancel = lambda: self.scheduler.cancel(job)  # noqa: E731
        if stream:
            first = await _unless_left(anext(answers), receive, cancel)
            return EventStream(_events(reply, first, answers, len(job.rows)), cancel)
        collected: list[list[Piece]] = [[] for _ in job.rows]

        async def collect() -> None:
            async for row, piece in answers:
                collected[row].append(piece)

        await _unless_left(collect(), receive, cancel)
        return Response(as_json(reply.whole(collected)), media_type="application/json")


def _tool_names(request: ChatRequest) -> frozenset[str]:
    tools = json.loads(request.conversation.tools or "[]")
    functions = [tool.get("function", tool) for tool in tools if isinstance(tool, dict)]
    return frozenset(str(function.get("name")) for function in functions if isinstance(function, dict))


def _room(prompt: int, wanted: int | None, context: int | None) -> int:
    """Return the most tokens of an answer.

    Raises:
        ApiError: Prompt and answer are longer than the context.
    """
    if context is None:
        return wanted or _UNLIMITED_TOKENS
    over = prompt + (wanted or 1) - context
    if over > 0:
        answer = f"max_tokens = {wanted}" if wanted else "an answer of at least 1"
        message = f"the prompt has {prompt} tokens; with {answer} that is {over} more than the context of {context}"
        param = "max_tokens" if prompt < context else "messages"
        raise ApiError(400, message, param, "context_length_exceeded")
    return wanted or context - prompt


class LeftError(Exception):
    """The client has closed the connection."""


async def _unless_left(work: Awaitable[Any], receive: Receive, cancel: Callable[[], None]) -> Any:
    """Return the result of `work`, or cancel the job and raise LeftError when the client closes the connection."""
    working, left = asyncio.ensure_future(work), asyncio.ensure_future(_until_left(receive))
    try:
        await asyncio.wait({working, left}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise LeftError
    finally:
        if not working.done() or working.cancelled() or working.exception() is not None:
            cancel()
        for task in (working, left):
            task.cancel()


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _answers(pieces: "asyncio.Queue[Delivered]", rows: int) -> AsyncIterator[tuple[int, Piece]]:
    """Yield (row, piece) until all rows have ended.

    Raises:
        ApiError: The job failed.
    """
    while rows:
        row, piece = await pieces.get()
        if isinstance(piece, ApiError):
            raise piece
        rows -= piece.finish is not None
        yield row, piece


async def _events(
    reply: Reply, first: tuple[int, Piece], answers: AsyncIterator[tuple[int, Piece]], rows: int
) -> AsyncIterator[bytes]:
    """Yield the server-sent events of a stream; an error in the middle is one too."""
    begun, counts = set(), [0] * rows

    def chunks(row: int, piece: Piece) -> Iterator[bytes]:
        if row not in begun:
            begun.add(row)
            if (head := reply.first_chunk(row)) is not None:
                yield head
        counts[row] = piece.count
        yield from reply.chunks(row, piece)

    try:
        for chunk in chunks(*first):
            yield chunk
        async for row, piece in answers:
            for chunk in chunks(row, piece):
                yield chunk
    except ApiError as error:
        yield event(error.body())
        return
    if (last := reply.last_chunk(counts)) is not None:
        yield last
    yield DONE


class EventStream(Response):
    """Server-sent events; `cancel` is called if the client leaves before their end."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], cancel: Callable[[], None]) -> None:
        super().__init__(b"")
        self.events, self.cancel = events, cancel
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def pump() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for chunk in self.events:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        with contextlib.suppress(LeftError):
            await _unless_left(pump(), receive, self.cancel)


# --- the application --------------------------------------------------------------------------------------


def make_app(service: Service) -> FastAPI:
    """Return the application, without its guard."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    run = service.pool.run
    if run is not None:
        add_preferences_route(app, run.root / FILE_NAME)

    @app.get("/")
    async def show_page() -> Response:
        nonce = secrets.token_urlsafe(16)
        page = page_html(nonce, service.pool.title, preferences=run is not None)
        return Response(page, media_type="text/html", headers={"Content-Security-Policy": page_policy(nonce)})

    @app.get("/health")
    async def health() -> Response:
        return _json({"status": "ok", "unfinished": service.scheduler.unfinished})

    @app.get("/v1/models")
    async def list_models() -> Response:
        return _json({"object": "list", "data": [_entry(service, model) for model in service.pool.models().values()]})

    @app.get("/v1/models/{name}")
    async def one_model(name: str) -> Response:
        return _json(_entry(service, service.model(name)))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked = chat_request(await _body(request))
        return await service.respond(
            lambda deliver: service.chat_job(asked, deliver), asked.options.stream, request.receive
        )

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        asked = completion_request(await _body(request))
        return await service.respond(
            lambda deliver: service.completion_job(asked, deliver), asked.options.stream, request.receive
        )

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        name, conversation = tokenize_request(await _body(request))
        service.model(name)
        loop = asyncio.get_running_loop()
        ids = await loop.run_in_executor(service.encoding, service.rendered, conversation)
        pieces = [spelling.decode("utf-8", "replace") for spelling in service.pool.encoder.spellings(ids)]
        return _json({"ids": ids, "pieces": pieces})

    handle_errors(app)
    return app


def _json(value: Any) -> Response:
    return Response(as_json(value), media_type="application/json")


async def _body(request: Request) -> dict[str, Any]:
    return read_json(await read_body(request.scope, request.receive))


def _entry(service: Service, model: ServedModel) -> dict[str, Any]:
    loaded = model.name in service.pool.loaded
    return {"id": model.name, "object": "model", "created": model.created, "owned_by": "minisft", "loaded": loaded}


def handle_errors(app: FastAPI) -> None:
    """Give every error a body in OpenAI's form, and none a traceback."""

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return Response(as_json(error.body()), error.status, error.headers, "application/json")

    async def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = "there is no such path" if error.status_code == 404 else str(error.detail)
        message = f"{request.method} {request.url.path[:100]}: {what}"
        return await refused(request, ApiError(error.status_code, message, headers=error.headers))

    async def unusable(request: Request, error: Exception) -> Response:
        assert isinstance(error, UserError)
        return await refused(request, ApiError(500, f"{error.where}: {error.problem}; {error.fix}"))

    async def left(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it

    async def failed(request: Request, error: Exception) -> Response:
        return await refused(request, ApiError(500, f"the server failed ({type(error).__name__}); its output says why"))

    app.add_exception_handler(ApiError, refused)
    app.add_exception_handler(HTTPException, unknown)
    app.add_exception_handler(UserError, unusable)
    app.add_exception_handler(LeftError, left)
    app.add_exception_handler(Exception, failed)


# --- start and stop ---------------------------------------------------------------------------------------


class _Server(uvicorn.Server):
    """uvicorn's server, which says when it accepts requests and leaves the signals to `serve`."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve_folder(
    name: str, *, host: str, port: int, api_key: str | None, memory: float | None, trust_remote_code: bool
) -> None:
    """Serve the models of a run or folder until SIGINT or SIGTERM; see `minisft.api.serve`.

    Raises:
        UserError: There is no such model, or the address cannot be used.
    """
    with bind(host, port) as listening:
        pool = ModelPool(name, None if memory is None else int(memory * 1e9), trust_remote_code)
        serve(pool, listening, host=host, api_key=api_key)


def serve(pool: ModelPool, listening: socket.socket, *, host: str, api_key: str | None) -> None:
    """Serve the models on a bound socket until SIGINT or SIGTERM."""
    scheduler = Scheduler(pool)
    service = Service(pool, scheduler)
    app = Guard(make_app(service), host, listening.getsockname()[1], api_key)
    listen(app, listening, host, lambda: scheduler.stop(0))  # ends all answers, so that their streams end too
    service.encoding.shutdown(wait=False, cancel_futures=True)
    scheduler.stop(_STOP_SECONDS / 2)  # a step that takes longer is not waited for: the thread is a daemon


def listen(app: Any, listening: socket.socket, host: str, on_stop: Callable[[], object] = lambda: None) -> None:
    """Answer requests on a bound socket until SIGINT or SIGTERM, which call `on_stop`."""
    port = listening.getsockname()[1]
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, lifespan="off", ws="none",
        timeout_graceful_shutdown=_STOP_SECONDS,
    )  # fmt: skip
    shown = f"[{host}]" if ":" in host else host
    server = _Server(config, lambda: print(f"serving http://{shown}:{port}", flush=True))
    asyncio.run(_until_stopped(server, listening, on_stop))


async def _until_stopped(server: _Server, listening: socket.socket, on_stop: Callable[[], object]) -> None:
    def stop() -> None:
        server.should_exit = True
        on_stop()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    await server.serve(sockets=[listening])


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address.

    Raises:
        UserError: The address is in use or not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(2048)
    except OSError as error:
        fix = "stop the program that uses it, or give another port: --port 0 takes a free one"
        problem = f"the server cannot use this address ({error.strerror or error})"
        raise UserError(f"{host}:{port}", problem, fix) from None
    return bound
