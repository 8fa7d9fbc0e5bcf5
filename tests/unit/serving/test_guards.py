"""Which hosts and origins are this server's own."""

import pytest

from minisft.serving.guards import Guard
from minisft.serving.protocol import ApiError


def guard(host="127.0.0.1", key=None):
    return Guard(None, host, 8000, key)


@pytest.mark.parametrize(
    ("bound", "address", "own"),
    [
        ("127.0.0.1", "127.0.0.1:8000", True),
        ("127.0.0.1", "LOCALHOST:8000", True),
        ("127.0.0.1", "[::1]:8000", True),
        ("127.0.0.1", "127.0.0.1", False),
        ("127.0.0.1", "127.0.0.1:80", False),
        ("127.0.0.1", "192.168.0.2:8000", False),
        ("127.0.0.1", "localhost.evil.example:8000", False),
        ("127.0.0.1", "evil@localhost:8000", False),
        ("127.0.0.1", "localhost:8000/x", False),
        ("127.0.0.1", "localhost:99999999", False),
        ("192.168.0.2", "192.168.0.2:8000", True),
        ("192.168.0.2", "localhost:8000", True),
        ("192.168.0.2", "192.168.0.3:8000", False),
        ("0.0.0.0", "192.168.0.3:8000", True),
        ("0.0.0.0", "192.168.0.3:9999", True),
        ("0.0.0.0", "[fe80::1]:8000", True),
        ("0.0.0.0", "evil.example:8000", False),
        ("::", "evil.example:8000", False),
    ],
)
def test_own_hosts(bound, address, own):
    assert guard(bound).is_own(address) is own


def refusal(guard, **headers):
    given = {b"host": b"localhost:8000"} | {name.encode(): value for name, value in headers.items()}
    try:
        guard.check("/v1/models", given)
    except ApiError as error:
        return error.status
    return None


def test_origins_keys_and_lengths():
    assert refusal(guard()) is None
    assert refusal(guard(), origin=b"http://localhost:8000") is None
    assert refusal(guard(), origin=b"https://evil.example") == 403
    assert refusal(guard(), origin=b"null") == 403
    assert refusal(guard(), origin=b"") == 403
    assert refusal(guard(), **{"content-length": b"4194304"}) is None
    assert refusal(guard(), **{"content-length": b"4194305"}) == 413
    assert refusal(guard(), **{"content-length": b"-1"}) == 413
    assert refusal(guard(key="k\u00e9y"), authorization="Bearer k\u00e9y".encode()) is None
    assert refusal(guard(key="key"), authorization=b"bearer  key ") is None
    assert refusal(guard(key="key"), authorization=b"Bearer ke") == 401
    assert refusal(guard(key="key")) == 401
