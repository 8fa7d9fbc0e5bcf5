"""A judge's server on loopback, whose replies a test chooses; it counts what it is asked."""

import contextlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class JudgeServer:
    """A server of chat completions.

    Args:
        reply: Called with the question; returns the text of the reply, or (status, headers, body as bytes).
        seconds: How long each reply takes.
    """

    def __init__(self, reply, seconds=0.0):
        self.questions: list[str] = []
        self.keys: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.at_once = self.most_at_once = 0
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                question = body["messages"][-1]["content"]
                with lock:
                    outer.questions.append(question)
                    outer.bodies.append(body)
                    outer.keys.append(self.headers["Authorization"])
                    outer.at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer.at_once)
                time.sleep(seconds)
                given = reply(question)
                with lock:
                    outer.at_once -= 1
                if isinstance(given, str):
                    message = {"role": "assistant", "content": given}
                    choice = {"index": 0, "message": message, "finish_reason": "stop"}
                    fields = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
                    given = (200, {}, json.dumps(fields).encode())
                status, headers, text = given
                with contextlib.suppress(OSError):  # a client that was killed
                    self.send_response(status)
                    for name, value in {"Content-Type": "application/json", **headers}.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(text)))
                    self.end_headers()
                    self.wfile.write(text)

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *_):
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


def answers_of(question):
    """Return the texts between the markers of a question, by name."""
    mark = question.partition("which end in ")[2].partition(",")[0]
    found = re.findall(rf"^\[begin ([\w ]+) {mark}\]\n(.*?)\n\[end \1 {mark}\]$", question, re.DOTALL | re.MULTILINE)
    return dict(found)


def prefer(wanted):
    """Return a judge that prefers the answer which holds `wanted`, in either place."""

    def reply(question):
        texts = answers_of(question)
        held = [wanted in texts["answer 1"], wanted in texts["answer 2"]]
        return "So:\nVERDICT: " + ("TIE" if held[0] == held[1] else "1" if held[0] else "2")

    return reply
