"""What is refused before a request is read: foreign hosts and origins, missing keys, bodies that are too large.

Any web page that a user visits can send requests to a server on the user's machine. A foreign page is known by its
`Origin`, and a name that was rebound to this machine (DNS rebinding) by its `Host`.
"""

import hashlib
import hmac
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from minisft.serving.protocol import ApiError
from minisft.serving.reply_bodies import as_json

MOST_BYTES = 4 << 20  # of a body
_OPEN_PATHS = ("/", "/health")  # without a key: they tell nothing about the models
_LOCAL = ("localhost", "127.0.0.1", "::1")
_ANY = ("0.0.0.0", "::", "")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Guard:
    """An ASGI application around another one, which refuses requests and adds security headers to every response.

    Args:
        app: The application.
        host: The address that the server is bound to.
        port: Its port.
        api_key: The key that requests must have; None: no key.
    """

    def __init__(self, app: Any, host: str, port: int, api_key: str | None) -> None:
        self.app, self.port = app, port
        self.key = None if api_key is None else hashlib.sha256(api_key.encode()).digest()
        self.names = {*_LOCAL, host.lower()} - {*_ANY}
        self.everywhere = host in _ANY
        if self.everywhere:
            self.names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                extra = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"),
                         (b"x-frame-options", b"DENY"), (b"cache-control", b"no-store")]  # fmt: skip
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        try:
            self.check(scope["path"], dict(reversed(scope["headers"])))
        except ApiError as error:
            await send_error(send_with_headers, error)
            return
        await self.app(scope, receive, send_with_headers)

    def check(self, path: str, headers: dict[bytes, bytes]) -> None:
        """Refuse a request by its headers.

        Raises:
            ApiError: Its host or origin is foreign, its key is missing or wrong, or its body is too large.
        """
        host = headers.get(b"host", b"").decode("latin-1")
        if not self.is_own(host):
            raise ApiError(403, "the request names another host: use the address that the server printed", code="host")
        origin = headers.get(b"origin")
        if origin is not None:
            scheme, _, rest = origin.decode("latin-1").partition("://")
            if scheme not in ("http", "https") or not self.is_own(rest):
                raise ApiError(403, "requests from other web pages are refused", code="origin")
        if self.key is not None and path not in _OPEN_PATHS:
            kind, _, key = headers.get(b"authorization", b"").partition(b" ")
            given = hashlib.sha256(key.strip()).digest()  # of equal length: the comparison tells nothing about the key
            if kind.lower() != b"bearer" or not hmac.compare_digest(given, self.key):
                message = "the API key is missing or wrong: send it as `Authorization: Bearer KEY`"
                raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > MOST_BYTES:
            raise too_large()

    def is_own(self, address: str) -> bool:
        """Return whether a host with its port is this server.

        Bound to all addresses, it is also reached under its numbers, which no name server can rebind, and behind
        another port, as from a container.
        """
        match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\[\]:/@]+)(?::(\d{1,5}))?", address)
        if not match:
            return False
        name, port = match[1].strip("[]").lower(), int(match[2] or 80)
        if self.everywhere:
            return name in self.names or _is_number(name)
        return name in self.names and port == self.port


def too_large() -> ApiError:
    """Return the error for a body above the limit."""
    return ApiError(413, f"the body is larger than {MOST_BYTES >> 20} MiB", code="body_too_large")


async def read_body(scope: Scope, receive: Receive) -> bytes:
    """Return the body of a JSON request.

    Raises:
        ApiError: Its type is not JSON, or it is too large, also where no length was announced.
    """
    kind = dict(scope["headers"]).get(b"content-type", b"").decode("latin-1")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the content type is not application/json", code="content_type")
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(400, "the client has left")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MOST_BYTES:
            raise too_large()
        more = message.get("more_body", False)
    return b"".join(parts)


async def send_error(send: Send, error: ApiError) -> None:
    """Send an error as the whole response."""
    body = as_json(error.body())
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    listed = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": listed})
    await send({"type": "http.response.body", "body": body})


def _is_number(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
