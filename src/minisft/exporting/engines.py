"""The engines that an export is proven with: transformers in this process, llama.cpp and vLLM as servers of their own.

llama.cpp (`llama-server`) and vLLM (`vllm serve`) are asked over HTTP on this machine, as their users ask them. They
are found in the folder that MINISFT_ENGINES names, else in `.engines` beside the source code, or on the PATH;
`make engines` installs them.
"""

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisft.exporting.answer_comparison import TOP, EngineAnswer, HeldOutPrompt, Position
from minisft.processes import exit_with_parent, handle_stop_signals
from minisft.text import first_line

SERVED_NAME = "final"  # of the model, in requests
ENGINES = ("transformers", "llama.cpp", "vllm")
_START = 600.0  # seconds that a server may take to load the model
_REPLY = 600.0  # seconds for one answer
_BATCH = 16  # the most prompts that transformers decodes together
_LOGITS = 1 << 28  # the most logits of a batch, since transformers keeps those of every step


class EngineError(Exception):
    """An engine did not start, or refused a request; its text says why."""


class EngineStartError(EngineError):
    """An engine did not start for a reason that need not be the model: its version, its options, the memory."""


def engines_folder() -> Path:
    """Return the folder of the engines: what MINISFT_ENGINES names, else `.engines` beside the source code.

    Never one of the current folder, which may be someone else's run: its programs would run.
    """
    return Path(os.environ.get("MINISFT_ENGINES") or Path(__file__).parents[3] / ".engines")


def find_llama_cpp(folder: Path | None = None) -> Path | None:
    """Return the path of llama.cpp's server; None if there is none. `folder` is one that the user named."""
    return find_program("llama-server", "llama.cpp", folder)


def find_vllm() -> Path | None:
    """Return the path of the program `vllm`; None if there is none."""
    beside = Path(sys.executable).with_name("vllm")
    return find_program("vllm", "vllm") or (beside if beside.exists() else None)


def find_program(name: str, engine: str, named: Path | None = None) -> Path | None:
    """Return the path of an engine's program: in the folder that the user named, among the engines, or on the PATH."""
    for folder in (named, engines_folder() / engine):
        for path in (folder / "bin" / name, folder / "build" / "bin" / name, folder / name) if folder else ():
            if path.is_file() and os.access(path, os.X_OK):
                return path.absolute()
    found = shutil.which(name)
    return Path(found) if found else None


@dataclass(frozen=True)
class TransformersEngine:
    """Plain transformers: `from_pretrained`, `apply_chat_template` and `generate`, without any code of MiniSFT.

    Args:
        folder: The exported folder.
        gguf: Name of a GGUF file in the folder, which transformers reads; "": a model folder.
        weights_only: Take the ids of the prompts as they are: transformers reads the SentencePiece vocabulary of a
            GGUF file differently from llama.cpp, so that its ids say nothing.
        stop_token_ids: The trained terminators, for a GGUF file, beside which there is no generation config.
        base: Folder of the base model, for a folder of adapters.
        trust_remote_code: Run code from the folder.
    """

    folder: Path
    gguf: str = ""
    weights_only: bool = False
    stop_token_ids: tuple[int, ...] = ()
    base: Path | None = None
    trust_remote_code: bool = False

    def answer(self, prompts: Sequence[HeldOutPrompt], max_new_tokens: int) -> list[EngineAnswer]:
        """Return the greedy answers, computed in fp32 from the exported weights, whatever their format."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

        from minisft.models import hide_gguf_progress, is_adapter, quiet_loading

        options: dict[str, Any] = {"gguf_file": self.gguf} if self.gguf else {}
        options["trust_remote_code"] = self.trust_remote_code
        device: Any = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.float32
        try:
            with quiet_loading(), hide_gguf_progress():
                tokenizer: Any = AutoTokenizer.from_pretrained(self.folder, **options)
                if is_adapter(self.folder):
                    from peft import PeftModel

                    base = AutoModelForCausalLM.from_pretrained(str(self.base), dtype=dtype, **options)
                    model: Any = PeftModel.from_pretrained(base, self.folder)
                    model.generation_config = GenerationConfig.from_pretrained(self.folder)
                else:
                    model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=dtype, **options)
                if self.gguf:
                    model.generation_config = GenerationConfig(eos_token_id=list(self.stop_token_ids))
            model = model.to(device).eval()
            vocabulary = model.get_output_embeddings().weight.shape[0]
            batch = max(1, min(_BATCH, _LOGITS // (vocabulary * max_new_tokens)))
            answers: list[EngineAnswer] = []
            for start in range(0, len(prompts), batch):
                some = prompts[start : start + batch]
                rendered = [prompt.ids if self.weights_only else _rendered(tokenizer, prompt) for prompt in some]
                answers += _generate(model, rendered, tokenizer.pad_token_id or 0, max_new_tokens)
        except Exception as error:  # transformers raises any exception for a folder that it cannot read
            raise EngineError(f"transformers refuses it: {type(error).__name__}: {first_line(error)}") from error
        return answers


def _rendered(tokenizer: Any, prompt: HeldOutPrompt) -> list[int]:
    """Return the ids of a prompt by transformers' own template and tokenizer."""
    return list(
        tokenizer.apply_chat_template(
            prompt.messages, tools=prompt.tools or None, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    )


def _generate(model: Any, rendered: list[list[int]], pad: int, max_new_tokens: int) -> list[EngineAnswer]:
    """Return the answers of transformers' own `generate` to the ids of a batch of prompts, padded on the left."""
    import torch

    width = max(map(len, rendered))
    padded = [[pad] * (width - len(ids)) + ids for ids in rendered]
    real = [[0] * (width - len(ids)) + [1] * len(ids) for ids in rendered]
    output = model.generate(
        input_ids=torch.tensor(padded, device=model.device),
        attention_mask=torch.tensor(real, device=model.device),
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        output_logits=True,
        return_dict_in_generate=True,
    )
    stops = model.generation_config.eos_token_id
    ends = {stops} if isinstance(stops, int) else set(stops or ())
    sequences = output.sequences[:, width:]
    rows: list[list[Position]] = [[] for _ in rendered]
    for step, logits in enumerate(output.logits):
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        found = logprobs.topk(min(TOP, logprobs.shape[-1]), dim=-1)
        chosen = logprobs.gather(1, sequences[:, step : step + 1])[:, 0].tolist()
        for row, (indices, values) in enumerate(zip(found.indices.tolist(), found.values.tolist(), strict=True)):
            token = int(sequences[row, step])
            rows[row].append(Position(token, dict(zip(indices, values, strict=True)) | {token: chosen[row]}))
    answers = []
    for prompt_ids, positions in zip(rendered, rows, strict=True):
        end = next((place for place, position in enumerate(positions) if position.token in ends), None)
        answers.append(EngineAnswer(prompt_ids, positions if end is None else positions[: end + 1], end is not None))
    return answers


@dataclass(frozen=True)
class LlamaCppEngine:
    """llama.cpp's server, with keys and values in f32.

    Args:
        server: Path of `llama-server`.
        model: Path of the GGUF file.
        context: Number of tokens of the context.
        adapter: Path of a LoRA adapter as GGUF; None: none.
        proof: One request at a time and keys and values in f32; False: the server's own settings.
    """

    server: Path
    model: Path
    context: int
    adapter: Path | None = None
    proof: bool = True

    def words(self, port: int) -> list[str]:
        """Return the command that serves the model on a port."""
        words = [
            str(self.server), "--model", str(self.model), "--host", "127.0.0.1", "--port", str(port),
            "--ctx-size", str(self.context), "--jinja", "--no-webui", "--alias", SERVED_NAME,
        ]  # fmt: skip
        if self.proof:
            words += ["--parallel", "1", "--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off"]
        return words + (["--lora", str(self.adapter)] if self.adapter else [])

    @property
    def settings(self) -> dict[str, str]:
        """The environment variables of the server."""
        return {}

    def answer(self, prompts: Sequence[HeldOutPrompt], max_new_tokens: int) -> list[EngineAnswer]:
        """Return the greedy answers.

        Raises:
            EngineError: The server does not start, or refuses a request.
        """
        with served_by(self) as server:
            return [self.ask(server.address, prompt, max_new_tokens) for prompt in prompts]

    def ask(self, url: str, prompt: HeldOutPrompt, max_new_tokens: int) -> EngineAnswer:
        """Return the greedy answer of the running server to one prompt."""
        body = _chat_body(prompt, max_new_tokens)
        text = _post(f"{url}/apply-template", body)["prompt"]
        # As the server tokenizes the prompt of a chat (tools/server/server-context.cpp).
        tokenized = _post(f"{url}/tokenize", {"content": text, "add_special": True, "parse_special": True})
        reply = _post(f"{url}/v1/chat/completions", body)
        return _engine_answer(tokenized["tokens"], reply, lambda entry: int(entry["id"]))


@dataclass(frozen=True)
class VllmEngine:
    """vLLM's server.

    Args:
        program: Path of `vllm`.
        folder: The model folder.
        context: Number of tokens of the context.
        proof: Compute in fp32, as it is written; False: vLLM's own settings.
        trust_remote_code: Run code from the folder.
    """

    program: Path
    folder: Path
    context: int
    proof: bool = True
    trust_remote_code: bool = False

    def words(self, port: int) -> list[str]:
        """Return the command that serves the model on a port."""
        words = [
            str(self.program), "serve", str(self.folder), "--served-model-name", SERVED_NAME, "--host", "127.0.0.1",
            "--port", str(port), "--max-model-len", str(self.context), "--max-logprobs", str(TOP),
        ]  # fmt: skip
        if self.proof:
            words += ["--dtype", "float32", "--enforce-eager"]
        return words + (["--trust-remote-code"] if self.trust_remote_code else [])

    @property
    def settings(self) -> dict[str, str]:
        """The environment variables of the server."""
        return {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "4"),  # GiB
            # Its own programs, such as ninja, are beside it.
            "PATH": os.pathsep.join([str(self.program.parent), os.environ.get("PATH", "")]),
        }

    def answer(self, prompts: Sequence[HeldOutPrompt], max_new_tokens: int) -> list[EngineAnswer]:
        """Return the greedy answers.

        Raises:
            EngineError: The server does not start, or refuses a request.
        """
        with served_by(self) as server:
            return [self.ask(server.address, prompt, max_new_tokens) for prompt in prompts]

    def ask(self, url: str, prompt: HeldOutPrompt, max_new_tokens: int) -> EngineAnswer:
        """Return the greedy answer of the running server to one prompt."""
        body = _chat_body(prompt, max_new_tokens) | {"model": SERVED_NAME, "return_tokens_as_token_ids": True}
        if prompt.tools:
            body["tool_choice"] = "none"  # the tools stay in the prompt; a parser of calls is not set
        asked = {key: body[key] for key in ("model", "messages", "tools") if key in body}
        tokenized = _post(f"{url}/tokenize", asked | {"add_generation_prompt": True})
        reply = _post(f"{url}/v1/chat/completions", body)
        return _engine_answer(tokenized["tokens"], reply, lambda entry: int(entry["token"].removeprefix("token_id:")))


def _chat_body(prompt: HeldOutPrompt, max_new_tokens: int) -> dict[str, Any]:
    """Return the request of a greedy answer with log-probabilities, as OpenAI's clients send it."""
    body: dict[str, Any] = {
        "messages": prompt.messages,
        "temperature": 0,
        "max_tokens": max_new_tokens,
        "logprobs": True,
        "top_logprobs": TOP,
    }
    return body | ({"tools": prompt.tools} if prompt.tools else {})


def _engine_answer(
    prompt_ids: list[int], reply: dict[str, Any], id_of: Callable[[dict[str, Any]], int]
) -> EngineAnswer:
    """Return a reply in OpenAI's form with the ids of its tokens, which each engine writes in its own way."""
    choice = reply["choices"][0]
    positions = []
    for entry in (choice.get("logprobs") or {}).get("content") or []:
        top = {id_of(one): float(one["logprob"]) for one in (*entry["top_logprobs"], entry)}
        positions.append(Position(id_of(entry), top))
    return EngineAnswer(prompt_ids, positions, choice["finish_reason"] != "length")


# --- servers on this machine ------------------------------------------------------------------------------


def free_port() -> int:
    """Return a port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class RunningServer:
    """An engine's server: its address, http://HOST:PORT, and its process."""

    address: str
    process: "subprocess.Popen[bytes]"

    def stop(self) -> None:
        """End the server and the processes that it started, which are all in its session."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1 if number == signal.SIGTERM else 20)


@contextlib.contextmanager
def served_by(engine: "LlamaCppEngine | VllmEngine") -> Iterator["RunningServer"]:
    """Start an engine's server, wait until it has loaded the model, and yield it; it is stopped at the end.

    SIGTERM ends the block as Ctrl-C does: a server's own processes would outlive this one.

    Raises:
        EngineError: It ended, or was not ready in time.
    """
    port = free_port()
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log,
        handle_stop_signals(signal.default_int_handler),
    ):
        process = subprocess.Popen(
            engine.words(port), stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            env={**os.environ, **engine.settings}, start_new_session=True, preexec_fn=exit_with_parent,
        )  # fmt: skip
        try:
            _wait_until_ready(process, f"http://127.0.0.1:{port}", log)
            yield RunningServer(f"http://127.0.0.1:{port}", process)
        finally:
            RunningServer("", process).stop()


def _wait_until_ready(process: "subprocess.Popen[bytes]", url: str, log: Any) -> None:
    end = time.monotonic() + _START
    while time.monotonic() < end:
        if process.poll() is not None:
            log.seek(0)
            lines = [line.strip() for line in log.read().splitlines() if line.strip()]
            wrong = [line for line in lines if "rror" in line] or lines or ["it said nothing"]
            refused = [line for line in wrong if "error loading model" in line]  # llama.cpp's words
            if refused:
                raise EngineError(f"the server refuses the model: {refused[0][:300]}")
            raise EngineStartError(f"the server ended with status {process.returncode}: {wrong[-1][:300]}")
        with contextlib.suppress(OSError), _opener().open(f"{url}/health", timeout=5) as reply:
            if reply.status == 200:
                return
        time.sleep(0.2)
    raise EngineStartError(f"the server was not ready after {_START:.0f} seconds")


def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy


def _post(url: str, body: dict[str, Any]) -> Any:
    """Send a JSON request, and return the JSON reply.

    Raises:
        EngineError: The server refuses the request, or does not answer.
    """
    request = urllib.request.Request(
        url, json.dumps(body).encode("utf-8"), {"Content-Type": "application/json"}, method="POST"
    )
    try:
        with _opener().open(request, timeout=_REPLY) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        told = error.read().decode("utf-8", "replace")[:300]
        raise EngineError(f"the server refuses {url.rsplit('/', 1)[-1]} ({error.code}): {told}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise EngineError(f"the server does not answer ({first_line(error)})") from None
