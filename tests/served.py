"""`minisft serve` in a process of its own, and requests to it."""

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time

from tests.tiny import heed_ctrl_c


class Served:
    """A server that is starting; after `ready`, `url` is the address that it printed."""

    def __init__(self, *words, **environment):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "minisft", "serve", *map(str, words), "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=heed_ctrl_c,
            env={**os.environ, **environment},
        )
        self.errors = ""
        threading.Thread(target=self._read_errors, daemon=True).start()

    def __enter__(self):
        try:
            return self.ready()
        except BaseException:
            self.process.kill()
            raise

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def ready(self):
        """Wait until the server accepts requests."""
        if hasattr(self, "url"):
            return self
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("serving http://"), self.errors
        self.url = line.removeprefix("serving ").strip()
        self.port = int(self.url.rpartition(":")[2])
        return self

    def _read_errors(self):
        for line in self.process.stderr or ():
            self.errors += line

    def stop(self, number=signal.SIGINT):
        """Ask the server to stop; return its exit status and the seconds it took."""
        begin = time.monotonic()
        self.process.send_signal(number)
        return self.process.wait(30), time.monotonic() - begin

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def ask(self, path, body=None, method=None, **headers):
        """Return the status and the body of a response, the body read as JSON if it is."""
        status, _, text = self.raw(path, body, method, **headers)
        return status, json.loads(text) if text.startswith(b"{") else text

    def raw(self, path, body=None, method=None, **headers):
        with contextlib.closing(self.connect()) as connection:
            data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            sent = {} if data is None else {"Content-Type": "application/json"}
            sent |= {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method or ("GET" if data is None else "POST"), path, data, sent)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()

    def unfinished(self):
        return self.ask("/health")[1]["unfinished"]

    def wait_until_idle(self, seconds=20):
        until = time.monotonic() + seconds
        while self.unfinished():
            assert time.monotonic() < until, "a request is stuck"
            time.sleep(0.05)


def say(text, **options):
    """Return the body of a greedy chat request."""
    messages = [{"role": "user", "content": text}]
    return {"model": "final", "messages": messages, "temperature": 0, "max_tokens": 12, **options}
