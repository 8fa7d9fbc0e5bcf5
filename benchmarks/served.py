"""Does a server give a run's held-out answers? Any server with OpenAI's interface, asked as its users ask it.

    minisft serve outputs/demo &
    python benchmarks/served.py outputs/demo http://127.0.0.1:8000/v1 final
    transformers serve outputs/demo/model --port 8001 &
    python benchmarks/served.py outputs/demo http://127.0.0.1:8001/v1 outputs/demo/model

Compared with `evaluation/NAME/outputs.jsonl` of the run's last checkpoint: the texts of the greedy answers, and the
number of tokens of each prompt, which the server reports. Exit status 1: one differs.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from openai import OpenAI

from minisft.data.conversation import message_as_dict
from minisft.data.encoder import Encoder
from minisft.evaluation.examples import load_held_out
from minisft.models import load_tokenizer, resolve_model
from minisft.run_folder import RunFolder, load_run


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="an evaluated run folder")
    parser.add_argument("url", help="address of the server, with /v1")
    parser.add_argument("model", help="name of the model in requests")
    parser.add_argument("--limit", type=int, help="number of conversations; default: all")
    arguments = parser.parse_args()
    recipe = load_run(arguments.run)
    tokenizer = load_tokenizer(resolve_model(recipe.model, weights=False).folder)
    encoder = Encoder(tokenizer, recipe.data.template, recipe.data.template_options)
    held_out = load_held_out(arguments.run, encoder, recipe.evaluation.turns, arguments.limit)
    name = RunFolder(arguments.run).list_checkpoints()[-1].name
    lines = (arguments.run / "evaluation" / name / "outputs.jsonl").read_text(encoding="utf-8").splitlines()
    outputs = {(line["id"], line["turn"]): line["output"] for line in map(json.loads, lines)}
    client = OpenAI(base_url=arguments.url, api_key="none", timeout=600)
    equal = prompts = 0
    for example in held_out.examples:
        messages: Any = [message_as_dict(message) for message in example.messages]
        reply = client.chat.completions.create(
            model=arguments.model,
            messages=messages,
            temperature=0,
            max_tokens=recipe.evaluation.max_new_tokens,
        )
        text, usage = reply.choices[0].message.content or "", reply.usage
        prompts += usage is not None and usage.prompt_tokens == len(example.prompt_ids)
        if text.strip() == outputs[example.id, example.turn].strip():
            equal += 1
        else:
            print(f"{example.id}:\n  run:    {outputs[example.id, example.turn]!r}\n  server: {text!r}")
    count = len(held_out.examples)
    print(f"{equal} of {count} answers equal, {prompts} of {count} prompts of the same length")
    return 0 if equal == prompts == count else 1


if __name__ == "__main__":
    sys.exit(main())
