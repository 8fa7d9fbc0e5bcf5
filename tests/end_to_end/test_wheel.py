"""A wheel, installed into an empty environment, has all that the demo and the API need."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SNIPPET = """
import minisft
from pathlib import Path
assert Path(minisft.__file__).is_relative_to(Path({environment!r})), minisft.__file__
rows = [{{"messages": [{{"role": "user", "content": f"{{n}}"}}, {{"role": "assistant", "content": "yes"}}]}} for n in range(20)]
run = minisft.train(model={model!r}, data=rows, output="run", overrides={{
    "data.template": "mistral", "data.max_length": 256, "training.max_steps": 2, "evaluation.max_new_tokens": 4}})
scores = run.evaluate(metrics={{"length": lambda outputs, references, prompts: [len(text) for text in outputs]}})
run.report(), run.chat("Hi!", max_new_tokens=4), run.metrics, run.checkpoints
assert minisft.load("run").results == scores
"""


@pytest.mark.long
def test_an_installed_wheel_runs_the_demo_and_the_api_from_another_folder(tmp_path, tiny_model):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}  # the checkout is not seen

    def call(*words):
        done = subprocess.run(
            [*map(str, words)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stdout + done.stderr

    call(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path / "dist", ROOT)
    [wheel] = (tmp_path / "dist").glob("minisft-*.whl")
    call(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    # torch comes first and with its version, as in `make setup`: an open range may take a build of several GB.
    constraints = ROOT / "constraints.txt"
    for package in ("torch", wheel):
        call(python, "-m", "pip", "install", "--quiet", "--constraint", constraints, package)
    minisft = tmp_path / "venv" / "bin" / "minisft"
    call(minisft, "schema")
    few = ("training.max_steps=1", "data.limit=24", "evaluation.max_new_tokens=4", f"model={tiny_model}")
    call(minisft, "demo", "data.template=mistral", "output=demo", *few)
    assert (tmp_path / "demo" / "evaluation" / "results.json").is_file()
    call(python, "-c", SNIPPET.format(environment=str(tmp_path / "venv"), model=str(tiny_model)))
    assert (tmp_path / "run" / "report.html").is_file()
