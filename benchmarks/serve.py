"""Measure `minisft serve`: 16 clients at once against one at a time, and the first token against `model.generate`.

    python benchmarks/serve.py --model smollm2-135m [--other NAME=http://HOST:PORT/MODEL]

The prompts are those of the demo's conversations, greedy, with 48 new tokens. Another OpenAI-compatible server that
is already running, such as `transformers serve`, is measured by the same requests with `--other`; repeatable.

Everything is a ratio within one run, since machines differ; the two sides of a ratio take turns. The table goes to
stderr, and the result to stdout as JSON.
"""

import argparse
import contextlib
import http.client
import json
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from rich.console import Console
from rich.table import Table

from minisft.data.conversation import Message
from minisft.data.encoder import Encoder
from minisft.models import load_model, load_tokenizer, resolve_model

DEMO = Path(__file__).resolve().parents[1] / "recipes" / "demo.sharegpt.jsonl"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
Conversation = list[dict[str, str]]


@dataclass(frozen=True)
class Endpoint:
    """A server and a model that it has."""

    name: str
    host: str
    port: int
    model: str

    def reply(self, messages: Conversation, new_tokens: int) -> str:
        """Return a greedy answer.

        Raises:
            RuntimeError: The request failed.
        """
        return "".join(self._pieces(messages, new_tokens))

    def first_token(self, messages: Conversation, new_tokens: int) -> float:
        """Return the seconds from the request to the first text of a stream; the rest is read as well."""
        began = time.perf_counter()
        seconds = None
        for _ in self._pieces(messages, new_tokens):
            seconds = seconds or time.perf_counter() - began
        assert seconds is not None, "the answer is empty"
        return seconds

    def _pieces(self, messages: Conversation, new_tokens: int) -> Iterator[str]:
        body = {"model": self.model, "messages": messages, "max_tokens": new_tokens, "temperature": 0, "stream": True}
        with contextlib.closing(http.client.HTTPConnection(self.host, self.port, timeout=600)) as connection:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise RuntimeError(f"{self.name}: {response.status} {response.read()[:500]!r}")
            for line in response:
                data = line.decode().removeprefix("data: ").strip()
                if not line.startswith(b"data: ") or data == "[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise RuntimeError(f"{self.name}: {event}")
                for choice in event["choices"]:
                    if text := choice["delta"].get("content"):
                        yield text


def main() -> None:
    options = parse_arguments()
    folder = resolve_model(options.model).folder
    conversations = read_conversations(options.source, options.clients)
    with serving(options.model) as ours:
        result: dict[str, Any] = {"processor": processor(), "threads": torch.get_num_threads(), "model": options.model}
        result["minisft serve"] = measure_replies(ours, conversations, options)
        result["first_token"] = measure_first_token(ours, folder, conversations[: options.first_tokens], options)
        for other in options.other:
            result[other.name] = measure_replies(other, conversations, options)
            result[other.name]["same_text"] = same_texts(ours, other, conversations, options)
            ratio = result["minisft serve"]["together_per_second"] / result[other.name]["together_per_second"]
            result[other.name]["minisft_replies_ratio"] = round(ratio, 2)
    show(result, options)
    print(json.dumps(result, indent=1))


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="?", default=DEMO, help="ShareGPT conversations, JSONL")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2, help="how often both sides of the ratio are measured")
    parser.add_argument("--first-tokens", type=int, default=8, help="prompts of which the first token is timed")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--other", type=as_endpoint, action="append", default=[], metavar="NAME=URL/MODEL")
    return parser.parse_args(words)


def as_endpoint(text: str) -> Endpoint:
    name, _, url = text.partition("=")
    parts = urlsplit(url)
    return Endpoint(name, parts.hostname or "127.0.0.1", parts.port or 80, parts.path[1:])


def read_conversations(source: Path, wanted: int) -> list[Conversation]:
    """The messages before the last answer of each conversation, spread over the file."""
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    found = []
    for row in rows[:: max(1, len(rows) // wanted)]:
        messages = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
        if len(messages) > 1:
            found.append(messages[:-1])
    return found[:wanted]


@contextlib.contextmanager
def serving(model: str) -> Iterator[Endpoint]:
    """Start `minisft serve` on a free port, and stop it at the end."""
    words = [sys.executable, "-m", "minisft", "serve", model, "--port", "0"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        parts = urlsplit(line.removeprefix("serving "))
        assert parts.port, line
        yield Endpoint("minisft serve", parts.hostname or "", parts.port, "final")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def measure_replies(server: Endpoint, conversations: Sequence[Conversation], options: Any) -> dict[str, Any]:
    """Replies a second with one client, and with all clients at once."""

    def ask(messages: Conversation) -> str:
        return server.reply(messages, options.new_tokens)

    ask(conversations[0])  # loads the model
    alone, together, same = 0.0, 0.0, 0
    for _ in range(options.rounds):  # by turns, so that a machine that slows down does not favour one side
        began = time.perf_counter()
        one_by_one = [ask(messages) for messages in conversations]
        alone += time.perf_counter() - began
        with ThreadPoolExecutor(len(conversations)) as clients:
            began = time.perf_counter()
            at_once = list(clients.map(ask, conversations))
            together += time.perf_counter() - began
        same = sum(left == right for left, right in zip(one_by_one, at_once, strict=True))
    replies = len(conversations) * options.rounds
    return {
        "clients": len(conversations),
        "alone_per_second": round(replies / alone, 3),
        "together_per_second": round(replies / together, 3),
        "ratio": round(alone / together, 2),
        "same_text": f"{same} of {len(conversations)}",
    }


def measure_first_token(
    server: Endpoint, folder: Path, conversations: Sequence[Conversation], options: Any
) -> dict[str, Any]:
    """Seconds to the first text of a lone request, against a bare `generate` of one token of the same prompt."""
    encoder = Encoder(load_tokenizer(folder), "auto")
    model = load_model(folder, dtype=torch.float32).eval()
    served, bare = [], []
    for repeat in range(3):
        for messages in conversations:
            prompt = encoder.encode_prompt([Message(turn["role"], turn["content"]) for turn in messages])
            ids = torch.tensor([prompt])
            began = time.perf_counter()
            with torch.inference_mode():
                model.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=1, pad_token_id=0
                )
            seconds = time.perf_counter() - began
            first = server.first_token(messages, 2)
            if repeat:  # the first round warms both up
                served.append(first)
                bare.append(seconds)
    return {
        "served_seconds": round(statistics.median(served), 4),
        "bare_seconds": round(statistics.median(bare), 4),
        "ratio": round(statistics.median(s / b for s, b in zip(served, bare, strict=True)), 2),
    }


def same_texts(ours: Endpoint, other: Endpoint, conversations: Sequence[Conversation], options: Any) -> str:
    """Of how many conversations two servers give the same answer."""
    texts = [[server.reply(c, options.new_tokens).strip() for c in conversations] for server in (ours, other)]
    return f"{sum(left == right for left, right in zip(*texts, strict=True))} of {len(conversations)}"


def processor() -> str:
    """The name of the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def show(result: dict[str, Any], options: Any) -> None:
    table = Table(title=f"{result['model']} on {result['processor']}, {result['threads']} threads")
    for column in ("", "one at a time", f"{options.clients} at once", "ratio"):
        table.add_column(column)
    for name in ("minisft serve", *(other.name for other in options.other)):
        row = result[name]
        table.add_row(
            f"{name}: replies/s", f"{row['alone_per_second']}", f"{row['together_per_second']}", f"{row['ratio']}"
        )
    first = result["first_token"]
    served = f"{first['served_seconds']} s against {first['bare_seconds']} s bare"
    table.add_row("first token of a lone request", served, "", f"{first['ratio']}")
    Console(stderr=True).print(table)


if __name__ == "__main__":
    main()
