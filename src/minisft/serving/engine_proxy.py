"""Serving by vLLM or llama.cpp: a verified export of the run, the engine's own server, and the chat page before it.

The engine is reachable on this machine only, at a free port; all requests pass through MiniSFT's
guard, which knows hosts, origins and the user's key.
"""

import contextlib
import http.client
import json
import secrets
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from minisft.errors import UserError
from minisft.exporting.engines import EngineError, LlamaCppEngine, VllmEngine, find_llama_cpp, find_vllm, served_by
from minisft.exporting.export import GGUF, ExportOptions, export
from minisft.recipe import Recipe
from minisft.serving.chat_page import page_html, page_policy
from minisft.serving.guards import Guard, read_body
from minisft.serving.model_pool import FINAL
from minisft.serving.protocol import ApiError, read_json
from minisft.serving.reply_bodies import as_json
from minisft.serving.server import bind, handle_errors, listen

_PATHS = ("/v1/chat/completions", "/v1/completions")
_TIMEOUT = 600.0  # seconds between two parts of an answer


def serve_with_engine(recipe: Recipe, backend: str, *, host: str, port: int, api_key: str | None) -> None:
    """Export a run's model, prove it with the engine, and serve it until SIGINT or SIGTERM.

    Args:
        recipe: The run's recipe.
        backend: "vllm" or "llama.cpp".
        host: Address to bind to.
        port: Port to bind to; 0 takes a free one.
        api_key: Key that requests must have; None: none.

    Raises:
        UserError: The engine is not installed, does not start or does not serve the model as it was trained, or the
            address cannot be used.
    """
    if (find_vllm() if backend == "vllm" else find_llama_cpp()) is None:
        fix = "install it with `make engines`, name its folder in MINISFT_ENGINES, or leave --backend out"
        raise UserError(f"--backend {backend}", "this engine is not installed", fix)
    with bind(host, port) as listening, tempfile.TemporaryDirectory(prefix="minisft-") as name:
        folder = Path(name) / FINAL
        to = "folder" if backend == "vllm" else "gguf"
        with contextlib.redirect_stdout(sys.stderr):  # stdout has one line: that the server is ready
            export(recipe, folder, ExportOptions(to=to, engine=backend))
        try:
            with served_by(_engine(backend, folder, recipe)) as engine:
                app = make_proxy(engine.address, Path(recipe.output).resolve().name)
                port = int(listening.getsockname()[1])
                listen(Guard(app, host, port, api_key), listening, host, engine.stop)
        except EngineError as error:
            raise UserError(f"--backend {backend}", str(error), "see its own documentation") from None


def _engine(backend: str, folder: Path, recipe: Recipe) -> LlamaCppEngine | VllmEngine:
    from minisft.evaluation.generation import context_length
    from minisft.models import load_config, resolve_model

    config = load_config(resolve_model(recipe.model, recipe.trust_remote_code, weights=False).folder)
    wanted = recipe.data.max_length + recipe.evaluation.max_new_tokens
    context = min(wanted, context_length(config) or wanted)
    if backend == "vllm":
        program = find_vllm()
        assert program is not None
        return VllmEngine(program, folder, context, proof=False, trust_remote_code=recipe.trust_remote_code)
    server = find_llama_cpp()
    assert server is not None
    return LlamaCppEngine(server, folder / GGUF, context, proof=False)


def make_proxy(address: str, title: str) -> FastAPI:
    """Return the application: the chat page, and the engine's answers.

    Args:
        address: http://HOST:PORT of the engine.
        title: Name of the run, for people.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/")
    async def show_page() -> Response:
        nonce = secrets.token_urlsafe(16)
        page = page_html(nonce, title, preferences=False)
        return Response(page, media_type="text/html", headers={"Content-Security-Policy": page_policy(nonce)})

    @app.get("/health")
    async def health() -> Response:
        return Response(as_json({"status": "ok"}), media_type="application/json")

    @app.get("/v1/models")
    async def list_models() -> Response:
        entry = {"id": FINAL, "object": "model", "created": 0, "owned_by": "minisft"}
        return Response(as_json({"object": "list", "data": [entry]}), media_type="application/json")

    async def forward(request: Request) -> Response:
        body = read_json(await read_body(request.scope, request.receive))
        if body.get("model") != FINAL:
            message = f"there is no model {str(body.get('model'))[:100]!r}; there are: {FINAL}"
            raise ApiError(404, message, "model", "model_not_found")
        reply, close = await run_in_threadpool(_ask, address, request.url.path, body)
        kind = reply.getheader("Content-Type", "application/json")
        return StreamingResponse(_parts(reply, close), reply.status, media_type=kind)

    for path in _PATHS:
        app.post(path)(forward)
    handle_errors(app)
    return app


def _ask(address: str, path: str, body: dict[str, Any]) -> tuple[http.client.HTTPResponse, Callable[[], None]]:
    """Send a request to the engine; return its response, whose body is not yet read, and what closes it.

    Raises:
        ApiError: The engine does not answer.
    """
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=_TIMEOUT)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        return connection.getresponse(), connection.close
    except (OSError, http.client.HTTPException) as error:
        connection.close()
        raise ApiError(502, f"the engine does not answer ({error})") from None


def _parts(reply: http.client.HTTPResponse, close: Callable[[], None]) -> Iterator[bytes]:
    """Yield the body of a response as it arrives; the engine stops answering when the client leaves."""
    with contextlib.closing(reply):
        try:
            while part := reply.read1(1 << 16):
                yield part
        finally:
            close()
