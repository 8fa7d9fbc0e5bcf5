"""Measure generation against `model.generate` one prompt at a time, the first token of chat, and the report.

    python benchmarks/evaluate.py [conversations.jsonl] --model smollm2-135m

Without a file of conversations those of the demo are taken.

Everything is a ratio within one run, since machines differ. The result goes to stdout as JSON.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from minisft.chat.terminal import Session
from minisft.data.conversation import Message
from minisft.data.encoder import Encoder
from minisft.evaluation.generation import generate
from minisft.models import load_model, load_tokenizer, resolve_model
from minisft.recipe import EvaluationRecipe

DEMO = Path(__file__).resolve().parents[1] / "recipes" / "demo.sharegpt.jsonl"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def main() -> None:
    options = parse_arguments()
    folder = resolve_model(options.model).folder
    encoder = Encoder(load_tokenizer(folder), "auto")
    model = load_model(folder, dtype=torch.float32).eval()
    prompts = read_prompts(options.source, encoder, options.prompts)
    result = measure_generation(model, encoder, prompts, options)
    result["chat"] = measure_chat(model, encoder)
    result["report"] = measure_report()
    print(json.dumps(result, indent=1))


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="?", default=DEMO, help="ShareGPT conversations, JSONL")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--one-by-one", type=int, default=24, help="how many of them go one at a time too")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=EvaluationRecipe().batch_size)
    return parser.parse_args(words)


def read_prompts(source: Path, encoder: Encoder, wanted: int) -> list[list[int]]:
    """Prompt ids of the last answer of each conversation, spread over the file."""
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    prompts = []
    for row in rows[:: max(1, len(rows) // wanted)]:
        messages = [Message(ROLES[turn["from"]], turn["value"]) for turn in row["conversations"]]
        while messages and messages[-1].role != "assistant":
            messages.pop()
        if len(messages) > 1:
            prompts.append(encoder.encode_prompt(messages[:-1]))
    return prompts[:wanted]


def measure_generation(model: Any, encoder: Encoder, prompts: list[list[int]], options: Any) -> dict[str, Any]:
    stops = encoder.stop_token_ids
    places = list(range(0, len(prompts), max(1, len(prompts) // options.one_by_one)))[: options.one_by_one]
    half = len(places) // 2

    def one_by_one(some: list[int]) -> list[list[int]]:
        return [plain_answer(model, prompts[place], stops, options.new_tokens) for place in some]

    def together() -> list[list[int]]:
        answers = generate(
            model, prompts, stop_token_ids=stops, max_new_tokens=options.new_tokens, batch_size=options.batch_size
        )
        return [answer.ids for answer in answers]

    one_by_one(places[:1])
    # before and after, so that a machine that slows down or speeds up does not favour either
    before, first = timed(lambda: one_by_one(places[:half]))
    ours, answers = timed(together)
    after, second = timed(lambda: one_by_one(places[half:]))
    theirs = first + second
    same = sum(answers[place] == answer for place, answer in zip(places, theirs, strict=True))
    slow, fast = len(places) / (before + after), len(prompts) / ours
    return {
        "prompts": len(prompts),
        "prompt_tokens": sum(map(len, prompts)) / len(prompts),
        "answer_tokens": sum(map(len, answers)) / len(prompts),
        "one_by_one_per_second": round(slow, 3),
        "batched_per_second": round(fast, 3),
        "ratio": round(fast / slow, 2),
        "same": f"{same} of {len(places)}",
        "threads": torch.get_num_threads(),
    }


def plain_answer(model: Any, prompt: list[int], stops: tuple[int, ...], new_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens,
            eos_token_id=list(stops), pad_token_id=stops[0],
        )  # fmt: skip
    answer = out[0, len(prompt) :].tolist()
    return answer[:-1] if answer and answer[-1] in stops else answer


def measure_chat(model: Any, encoder: Encoder) -> dict[str, Any]:
    """Seconds to the first token: chat against a bare `generate`, and chat's second turn, which reuses the first."""
    question = Message("user", "Tell me about the sea. " * 20)
    prompt = encoder.encode_prompt([question])
    bare = min(timed(lambda: plain_answer(model, prompt, encoder.stop_token_ids, 1))[0] for _ in range(5))
    first, second = [], []
    for _ in range(5):
        session = Session(model, encoder, max_new_tokens=1, turns=[question])
        first.append(timed(lambda s=session: s.answer(lambda piece: None))[0])  # type: ignore[misc]
        session.turns.append(Message("user", "And more?"))
        second.append(timed(lambda s=session: s.answer(lambda piece: None))[0])  # type: ignore[misc]
    return {
        "prompt_tokens": len(prompt),
        "bare_seconds": round(bare, 4),
        "first_turn_ratio": round(min(first) / bare, 2),
        "second_turn_ratio": round(min(second) / bare, 2),
    }


def measure_report(checkpoints: int = 50, rows: int = 1000) -> dict[str, Any]:
    """Seconds and megabytes of the page of a made-up run."""
    from minisft.report.page import write_report

    with tempfile.TemporaryDirectory() as folder:
        make_run(Path(folder), checkpoints, rows)
        seconds, path = timed(lambda: write_report(Path(folder)))
        return {"seconds": round(seconds, 2), "megabytes": round(path.stat().st_size / 1e6, 2)}


def make_run(folder: Path, checkpoints: int, rows: int) -> None:
    score = {"score": 20.0, "low": 18.0, "high": 22.0, "mean": 20.0, "half_width": 2.0, "signature": "made up", "p": {}}
    entry = {"loss": 2.0, "perplexity": 7.4, "bleu": score, "chrf": score, "exact_match": 0.1, "seconds": 10.0}
    named = [{**entry, "checkpoint": f"checkpoint-{n}", "step": n} for n in range(1, checkpoints + 1)]
    results = {
        "base": {**entry, "step": 0}, "checkpoints": named, "best": "checkpoint-7", "failed": [], "answers": rows,
        "turns": "last", "max_new_tokens": 256, "constant": {**entry, "text": "Certainly."},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text("model: made-up\n", encoding="utf-8")
    steps = [{"step": n, "epoch": n / 100, "loss": 3 / n, "grad_norm": 1.0} for n in range(1, 20 * checkpoints)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps), encoding="utf-8")
    for name in ("base", *(c["checkpoint"] for c in named)):
        place = folder / "evaluation" / str(name)
        place.mkdir(parents=True)
        lines = [
            {"id": f"row{n}", "turn": 1, "prompt": "word " * 80, "reference": "word " * 30,
             "output": f"{name} {n} " + "word " * 30, "bleu": 10.0, "chrf": 10.0 + n % 7, "finish": "stop"}
            for n in range(rows)
        ]  # fmt: skip
        (place / "outputs.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")
    (folder / "evaluation" / "results.json").write_text(json.dumps(results), encoding="utf-8")


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = action()
    return time.perf_counter() - started, result


if __name__ == "__main__":
    main()
