"""Run folders of an attacker, given to every verb: none runs code, writes outside, hangs, or takes all memory.

Each verb runs in this process, which is quick; its resident memory and its time are measured. What is a stranger's is
the run folder with the model in it; the user's is the command line.
"""

import json
import os
import pickle
import shutil
import time
from pathlib import Path

import pytest
import torch
import yaml

from minisft.cli import main
from minisft.run_folder import RunFolder
from tests.end_to_end.test_untrusted_code import with_own_code
from tests.tiny import minisft, write_recipe

SECONDS = 20
BYTES = 2 << 30
HUGE = 5 << 29  # bytes of a sparse file, more than a verb may hold
VERBS = {
    "inspect": ["inspect", "RUN"],
    "evaluate": ["evaluate", "RUN"],
    "report": ["report", "RUN"],
    "export": ["export", "RUN", "OUT"],
    "chat": ["chat", "RUN", "--message", "tea"],
    "chat_model": ["chat", "RUN/model", "--message", "tea"],
    "inspect_recipe": ["inspect", "RUN/recipe.yaml"],
    "prepare": ["prepare", "RUN/recipe.yaml"],
    "plan": ["plan", "RUN/recipe.yaml", "--gpu", "h100"],
    "check": ["check", "--quick", "RUN/recipe.yaml"],
    "runs": ["runs", "RUN"],
    "watch": ["watch", "RUN"],
    "why": ["why", "RUN", "--step", "2"],
    "verify": ["verify", "RUN"],
    "resume": ["train", "RUN/recipe.yaml", "--resume"],
}
every_verb = pytest.mark.parametrize("verb", VERBS)


class Bomb:
    """What a pickle of it does when it is read: it makes the canary file."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (exec, (f"open({str(self.canary)!r}, 'w').close()",))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, conversations):
    """A run of 2 steps, evaluated, whose base model lies in it; checkpoint-1 has its optimizer's state."""
    from tests.tiny import write_tiny_model

    folder = tmp_path_factory.mktemp("hostile")
    model = write_tiny_model(folder / "base")
    settings = "{max_steps: 2, save_every: 1, keep_optimizer: all, precision: fp32}"
    recipe = write_recipe(folder, model, conversations, settings)
    recipe.write_text(recipe.read_text().replace("{max_new_tokens: 8}", "{max_new_tokens: 4, limit: 2}"))
    assert main(["train", str(recipe)]) == 0
    assert main(["evaluate", str(folder / "run")]) == 0
    return RunFolder(folder / "run")


@pytest.fixture
def run(trained, tmp_path):
    """A copy, which is the attacker's to change."""
    root = tmp_path / "run"
    shutil.copytree(trained.root, root)
    shutil.copytree(trained.root.parent / "base", tmp_path / "base")
    change_recipe(root, model=str(tmp_path / "base"), output=str(tmp_path / "elsewhere"))
    (root / "base_model.json").unlink()  # as an attacker would, whose model is another
    return RunFolder(root)


@pytest.fixture
def canary(tmp_path, monkeypatch):
    path = tmp_path / "canary"
    monkeypatch.setenv("CANARY", str(path))
    return path


def change_recipe(root, **keys):
    path = root / "recipe.yaml"
    mark, _, text = path.read_text().partition("\n")
    path.write_text(f"{mark}\n{yaml.safe_dump({**yaml.safe_load(text), **keys})}")


def unfinished(run):
    """Make it a run that stopped after its first step, so that `--resume` goes on."""
    shutil.rmtree(run.model)
    shutil.rmtree(run.checkpoints / "checkpoint-2")
    return run.checkpoints / "checkpoint-1"


def attempt(verb, run, capsys):
    """Run a verb; return its status and what it said. It held its bounds."""
    words = [
        word.replace("RUN", str(run.root)).replace("OUT", str(run.root.parent / "exported")) for word in VERBS[verb]
    ]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts over
    before, begun = resident("VmRSS"), time.monotonic()
    try:
        status = main(words)
    except (ValueError, KeyError, TypeError, OSError, RecursionError, AttributeError):
        status = 1  # as a process, a traceback
    assert time.monotonic() - begun < SECONDS
    assert resident("VmHWM") - before < BYTES
    printed = capsys.readouterr()
    assert not (run.root.parent / "elsewhere").exists(), "the run's own recipe says where to write"
    return status, printed.out + printed.err


def resident(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def content_of(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


# --- code -------------------------------------------------------------------------------------------------


@every_verb
def test_pickles_do_not_run(run, canary, capsys, verb):
    checkpoint = unfinished(run) if verb == "resume" else run.checkpoints / "checkpoint-2"
    (checkpoint / "global_step1").mkdir()
    for folder in (checkpoint, run.root.parent / "base", run.model):
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "training_args.bin",
                     "pytorch_model.bin", "adapter_model.bin", "global_step1/mp_rank_00_model_states.pt",
                     "global_step1/zero_pp_rank_0_mp_rank_00_optim_states.pt"):  # fmt: skip
            if (folder / name).parent.is_dir():
                torch.save({"state": Bomb(canary)}, folder / name)
                if name in ("scheduler.pt", "training_args.bin"):
                    (folder / name).write_bytes(pickle.dumps(Bomb(canary)))  # not even torch's container
    status, said = attempt(verb, run, capsys)
    assert not canary.exists()
    if verb == "resume":
        assert status == 2, said
        assert "damaged" in said or "could run code" in said


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_among_a_checkpoints_own_is_named(run, canary, capsys, name):
    checkpoint = unfinished(run)
    torch.save({"state": Bomb(canary)}, checkpoint / name)
    status, said = attempt("resume", run, capsys)
    assert not canary.exists()
    assert status == 2, said
    assert "exec" in said
    assert "checkpoint-1" in said


def test_shards_of_zero_are_converted_without_running_them(run, canary, capsys):
    """A checkpoint that says it is ZeRO's, resumed under vanilla: our own reading of DeepSpeed's files."""
    checkpoint = unfinished(run)
    (checkpoint / "written_by.json").write_text('{"strategy": "zero2", "processes": 1}')
    (checkpoint / "global_step1").mkdir()
    (checkpoint / "latest").write_text("global_step1")
    torch.save(
        {"optimizer_state_dict": Bomb(canary)},
        checkpoint / "global_step1" / "zero_pp_rank_0_mp_rank_00_optim_states.pt",
    )
    status, said = attempt("resume", run, capsys)
    assert not canary.exists()
    assert status == 2, said
    assert "could run code" in said


def test_deepspeed_reads_no_more_than_that(canary, tmp_path):
    """The loader that DeepSpeed resumes with, and the classes that its own checkpoints hold."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    from minisft.training.zero import plain_zero_state

    scale = DynamicLossScaler(2**16, 2.0, 1000, 1.0, 2, False, dtype=torch.float16)
    state = [LossScaler(1.0), scale, ZeroStageEnum(2), fragment_address(numel=3, start=5), torch.ones(2)]
    torch.save(state, tmp_path / "own.pt")
    torch.save([Bomb(canary)], tmp_path / "evil.pt")
    engine = TorchCheckpointEngine()
    with plain_zero_state():
        static, dynamic, stage, address, tensor = engine.load(tmp_path / "own.pt")
        with pytest.raises(pickle.UnpicklingError, match="exec"):
            engine.load(tmp_path / "evil.pt")
    assert not canary.exists()
    assert (static.cur_scale, dynamic.cur_scale, stage, address.start) == (1.0, 2**16, 2, 5)
    assert torch.equal(tensor, torch.ones(2))
    engine.load(tmp_path / "evil.pt")  # outside the block it is DeepSpeed's own again: the bomb is a real one
    assert canary.exists()


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
@pytest.mark.parametrize("kind", ["model", "optim"])
def test_no_shard_of_zero_runs_on_resume(tmp_path, tiny_model, conversations, canary, strategy, kind):
    settings = (
        f"{{strategy: {strategy}, processes: 2, batch_size: 4, max_steps: 2, save_every: 1, keep_optimizer: all}}"
    )
    recipe = write_recipe(tmp_path, tiny_model, conversations, settings)
    assert minisft("train", recipe).returncode == 0
    run = RunFolder(tmp_path / "run")
    [folder] = unfinished(run).glob("global_step*")
    for path in folder.glob(f"*{kind}_states.pt"):
        torch.save({**torch.load(path, weights_only=False), "more": Bomb(canary)}, path)
    done = minisft("train", run.recipe, "--resume", CANARY=str(canary))
    assert not canary.exists()
    assert done.returncode == 2, done.stderr
    assert "could run code" in done.stderr
    assert "Traceback" not in done.stderr


@every_verb
def test_code_beside_the_weights_does_not_run(run, canary, capsys, verb):
    if verb == "resume":
        unfinished(run)
    for folder in (run.root.parent / "base", run.model, *run.list_checkpoints()):
        if folder.is_dir():
            with_own_code(folder, "own_hostile")
    change_recipe(run.root, trust_remote_code=True)
    status, said = attempt(verb, run, capsys)
    assert not canary.exists()
    if verb not in ("report", "export", "runs", "watch", "verify"):  # which load no model of it
        assert status == 2, said
        assert "--trust-remote-code" in said


# --- links ------------------------------------------------------------------------------------------------


def link_outside(run, outside, paths):
    """Put files of a run outside, and links to them in their places."""
    for number, path in enumerate(paths):
        target = outside / f"{number}-{path.name}"
        if path.exists():
            shutil.move(path, target)
        else:
            target.write_text("precious")
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(target)


@every_verb
def test_nothing_is_written_through_a_link(run, tmp_path, capsys, verb):
    if verb == "resume":
        unfinished(run)
    files = [path for path in run.root.rglob("*") if path.is_file() and "base" not in path.parts]
    written = [run.root / name for name in ("report.html", "results.md", "check.json", "base_model.json", "new")]
    outside = tmp_path / "outside"
    outside.mkdir()
    locks = (".lock", ".dataset.lock")
    link_outside(run, outside, [path for path in {*files, *written} if path.name not in locks])
    (run.root / "nowhere").symlink_to(outside / "made")
    before = content_of(outside)
    attempt(verb, run, capsys)
    assert content_of(outside) == before


def test_metrics_that_link_to_nowhere_make_no_file_there(run, tmp_path, capsys):
    unfinished(run)
    run.metrics.unlink()
    run.metrics.symlink_to(tmp_path / "made")
    status, said = attempt("resume", run, capsys)
    assert status == 2
    assert "leads out of the run folder" in said
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(("verb", "name"), [("resume", "checkpoints/.unfinished"), ("check", ".check")])
def test_scratch_folders_that_link_outside_are_not_written_to(run, tmp_path, capsys, verb, name):
    if verb == "resume":
        unfinished(run)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "tokenizer").write_text("precious")
    (run.root / name).symlink_to(outside)
    before = content_of(outside)
    status, said = attempt(verb, run, capsys)
    assert status == 2
    assert "leads out of the run folder" in said
    assert content_of(outside) == before


@pytest.mark.parametrize(
    ("verb", "lock"), [("prepare", ".lock"), ("prepare", ".dataset.lock"), ("evaluate", "evaluation/.lock")]
)
def test_a_lock_that_links_outside_empties_nothing(run, tmp_path, capsys, verb, lock):
    outside = tmp_path / "outside"
    outside.mkdir()
    (run.root / lock).unlink(missing_ok=True)
    link_outside(run, outside, [run.root / lock])
    attempt(verb, run, capsys)
    assert [path.read_text() for path in outside.iterdir()] == ["precious"]


# --- bombs and huge files ---------------------------------------------------------------------------------

YAML_BOMB = "a: &a {k: x}\n" + "".join(
    f"{new}: &{new} {{{', '.join(f'k{n}: *{old}' for n in range(9))}}}\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize("text", [YAML_BOMB, "model: &x {a: *x}\n"], ids=["aliases", "recursion"])
def test_a_recipe_that_is_a_bomb_is_refused(run, tmp_path, text):
    """In a process that may be ended: a bomb that goes off takes this one with it."""
    mark = run.recipe.read_text().partition("\n")[0]
    run.recipe.write_text(f"{mark}\n{text}")
    done = minisft("inspect", run.root, timeout=8)
    assert done.returncode == 2, done.stderr[-300:]
    assert "Traceback" not in done.stderr


@every_verb
def test_templates_that_are_bombs_are_stopped(run, capsys, monkeypatch, verb):
    monkeypatch.setattr("minisft.data.renderers.jinja_limits.SECONDS", 1.0)
    if verb == "resume":
        unfinished(run)
    if verb == "prepare":  # else it stops at what is prepared already
        shutil.rmtree(unfinished(run))
        run.metrics.unlink()
    bomb = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{{ 'x' * 10**9 }}"
    for folder in (run.root.parent / "base", run.model, *run.list_checkpoints()):
        if folder.is_dir():
            (folder / "chat_template.jinja").write_text(bomb)
    recipe = yaml.safe_load(run.recipe.read_text())
    change_recipe(run.root, data={**recipe["data"], "template": "auto"})
    status, said = attempt(verb, run, capsys)
    if verb == "resume":
        assert status == 2, said
        assert "the tokenizer" in said, "it is another than the data was prepared with"
    # the others render nothing, or say that the data cannot be prepared
    elif verb not in ("report", "export", "plan", "runs", "watch"):
        assert status == 2, said
        assert "template" in said


HUGE_FILES = ("recipe.yaml", "metrics.jsonl", "base_model.json", "dataset/ledger.json", "evaluation/results.json",
              "evaluation/base/outputs.jsonl", "evaluation/base/journal.jsonl", "model/config.json",
              "model/tokenizer.json", "model/tokenizer_config.json", "model/chat_template.jinja",
              "model/generation_config.json", "base/config.json", "base/tokenizer.json",
              "checkpoints/checkpoint-2/trainer_state.json")  # fmt: skip
OFTEN = ("recipe.yaml", "evaluation/results.json", "base/tokenizer.json", "model/config.json")


def make_huge(path):
    path.parent.mkdir(exist_ok=True)
    text = path.read_text() if path.exists() else ""
    with path.open("w") as file:
        file.write(text.split("\n")[0] + "\n")  # a recipe keeps the mark of a run
        file.truncate(HUGE)


@every_verb
@pytest.mark.parametrize(
    "name", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.long) for name in HUGE_FILES]
)
def test_a_file_that_is_huge_is_not_read(run, capsys, verb, name):
    make_huge((run.root.parent if name.startswith("base/") else run.root) / name)
    attempt(verb, run, capsys)


@every_verb
def test_values_that_are_nested_without_end_are_no_harm(run, capsys, verb):
    deep = "[" * 100_000
    for name in ("model/config.json", "model/tokenizer_config.json", "base/config.json", "base_model.json",
                 "evaluation/results.json", "dataset/ledger.json"):  # fmt: skip
        ((run.root.parent if name.startswith("base/") else run.root) / name).write_text(deep)
    attempt(verb, run, capsys)


# --- escapes ----------------------------------------------------------------------------------------------


@every_verb
def test_text_of_a_run_is_no_control(run, capsys, verb):
    evil = "\x1b]0;owned\x07\x9b2J\u202e"
    results = run.root / "evaluation" / "results.json"
    found = json.loads(results.read_text())
    found["constant"]["text"] = evil
    found["failed"] = [{"checkpoint": evil, "error": evil}]
    found["checkpoints"][0]["checkpoint"] = evil
    results.write_text(json.dumps(found))
    for path in run.root.glob("evaluation/*/outputs.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({**line, "output": evil, "prompt": evil}) + "\n" for line in lines))
    config = json.loads((run.model / "config.json").read_text())
    (run.model / "config.json").write_text(json.dumps({**config, "model_type": evil}))
    change_recipe(run.root, model=f"{run.root / 'base'}{evil}")
    _, said = attempt(verb, run, capsys)
    written = [path for name in ("results.md", "examples.txt") for path in run.root.rglob(name)]
    for text in (said, *(path.read_text(encoding="utf-8") for path in written)):
        assert not set("\x1b\x07\x9b\u202e") & set(text)


@pytest.mark.long
@every_verb
def test_as_processes_with_limits_of_the_system(run, canary, verb):
    """Everything at once, in a process whose memory the system bounds and reports."""
    import resource
    import subprocess
    import sys

    for folder in (run.root.parent / "base", run.model):
        with_own_code(folder, "own_hostile")
    change_recipe(run.root, trust_remote_code=True)
    words = [word.replace("RUN", str(run.root)).replace("OUT", str(run.root.parent / "out")) for word in VERBS[verb]]
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "minisft", *words], capture_output=True, text=True, timeout=60,
        stdin=subprocess.DEVNULL, env={**os.environ, "CANARY": str(canary)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 28, 1 << 28)),
    )  # fmt: skip
    assert done.returncode in (0, 2), done.stderr
    assert time.monotonic() - begun < SECONDS
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < BYTES
    assert not canary.exists()
