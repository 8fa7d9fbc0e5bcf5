"""Each file of a run damaged in turn: every verb that reads a run works, or ends with 2 and a message that helps."""

import shutil

import pytest

from minisft.cli import main
from tests.tiny import write_recipe

DAMAGES = {
    "emptied": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "garbage": lambda content: b"\x93\xff\x00 no such thing {[\n" * 9,
    "other JSON": lambda content: b"[7]\n",
}
VERBS = {
    "inspect": ("inspect", "RUN", "--count", "1"),
    "evaluate": ("evaluate", "RUN"),
    "report": ("report", "RUN"),
    "export": ("export", "RUN", "OUT", "--checkpoint", "best", "--force"),
    "chat": ("chat", "RUN", "--message", "hi", "--max-new-tokens", "2"),
}
# Written again by whoever comes by, or read by nobody.
UNREAD = (".lock", ".png", ".html", ".md", ".txt")


def holds(capsys, run, verb):
    """Run a verb on the run: it works, or is refused as a user can understand; any other exception fails the test."""
    words = [{"RUN": str(run), "OUT": str(run.parent / "exported")}.get(word, word) for word in VERBS[verb]]
    capsys.readouterr()
    status = main(words)
    said = capsys.readouterr().err
    assert status in (0, 2), said
    if status == 2:
        assert "Fix: " in said
        assert "Traceback" not in said
    return status, said


def files_of(run):
    return sorted(
        str(path.relative_to(run))
        for path in run.rglob("*")
        if path.is_file() and not path.name.endswith(UNREAD) and "tensorboard" not in path.parts
    )


# The file, the verb that reads it, and what the message must say; None where the verb works without it.
READ = [
    ("evaluation/results.json", "report", "minisft evaluate"),
    ("evaluation/results.json", "export", "minisft evaluate"),
    ("evaluation/results.json", "evaluate", None),
    ("evaluation/base/journal.jsonl", "evaluate", None),
    ("evaluation/base/outputs.jsonl", "report", "minisft evaluate"),
    ("dataset/ledger.json", "evaluate", "minisft inspect"),
    ("dataset/ledger.json", "report", "minisft inspect"),
    ("dataset/ledger.json", "inspect", "dataset"),
    ("dataset/preview.json", "report", "delete it"),
    ("dataset/train/data-00000-of-00001.arrow", "inspect", "minisft inspect"),
    ("dataset/test/data-00000-of-00001.arrow", "evaluate", "minisft inspect"),
    ("dataset/train/state.json", "evaluate", "minisft inspect"),
    ("environment.json", "report", "delete it"),
    ("base_model.json", "evaluate", "restore it from a copy"),
    ("metrics.jsonl", "report", "delete the damaged lines"),
    ("model/model.safetensors", "chat", "model"),
    ("model/tokenizer.json", "chat", "tokenizer"),
    ("model/config.json", "chat", "model"),
    ("checkpoints/checkpoint-2/model.safetensors", "evaluate", "checkpoint-2"),
]


@pytest.mark.parametrize(("name", "verb", "help"), READ)
def test_a_damaged_file_is_named_with_what_to_do(run_folder, capsys, name, verb, help):
    path = run_folder / name
    content = path.read_bytes()
    path.write_bytes(DAMAGES["garbage"](content))
    status, said = holds(capsys, run_folder, verb)
    assert status == (0 if help is None else 2)
    if help is not None:
        assert help in said
        assert path.name in said or path.parent.name in said


@pytest.mark.parametrize("name", sorted({name for name, _, _ in READ}))
def test_a_truncated_file_is_refused_or_read_without_a_traceback(run_folder, capsys, name):
    path = run_folder / name
    path.write_bytes(DAMAGES["truncated"](path.read_bytes()))
    for verb in sorted({verb for read, verb, _ in READ if read == name}):
        holds(capsys, run_folder, verb)


@pytest.mark.long
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_file_every_damage_every_verb(scored_run, tmp_path, capsys, verb, damage):
    for number, name in enumerate(files_of(scored_run)):
        run = shutil.copytree(scored_run, tmp_path / f"copied-{number}")
        (run / name).write_bytes(DAMAGES[damage]((run / name).read_bytes()))
        holds(capsys, run, verb)
        shutil.rmtree(run)


def test_damaged_data_are_prepared_again_with_the_command_of_the_message(run_folder, capsys):
    path = run_folder / "dataset/test/data-00000-of-00001.arrow"
    path.write_bytes(DAMAGES["truncated"](path.read_bytes()))
    status, said = holds(capsys, run_folder, "evaluate")
    assert status == 2
    assert f"delete {run_folder / 'dataset'} and run `minisft inspect {run_folder}`" in said
    shutil.rmtree(run_folder / "dataset")
    assert holds(capsys, run_folder, "inspect")[0] == 0
    assert holds(capsys, run_folder, "evaluate")[0] == 0


@pytest.mark.parametrize("damage", ["truncated", "other JSON"])
@pytest.mark.parametrize("name", ["written_by.json", "trainer_state.json"])
def test_a_checkpoint_that_cannot_be_resumed_from_is_named(tmp_path, tiny_model, conversations, capsys, name, damage):
    recipe = write_recipe(tmp_path, tiny_model, conversations, "{max_steps: 2, save_every: 1, precision: fp32}")
    run = tmp_path / "run"
    assert main(["train", str(recipe)]) == 0
    shutil.rmtree(run / "model")
    path = run / "checkpoints/checkpoint-2" / name
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    capsys.readouterr()
    assert main(["train", str(recipe), "--resume"]) == 2
    said = capsys.readouterr().err
    assert "checkpoint-2" in said
    assert name in said
    assert "restore the file, or train again" in said


@pytest.mark.parametrize("verb", ["evaluate", "train"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_base_model_is_named(run_folder, tiny_model, tmp_path, conversations, capsys, name, verb):
    model = shutil.copytree(tiny_model, tmp_path / "base")
    (model / name).write_bytes(DAMAGES["truncated"]((model / name).read_bytes()))
    if verb == "train":
        words = [str(write_recipe(tmp_path, model, conversations, "{max_steps: 1, precision: fp32}"))]
    else:
        (run_folder / "base_model.json").unlink()
        words = [str(run_folder), f"model={model}"]
    capsys.readouterr()
    assert main([verb, *words]) == 2
    assert str(model) in capsys.readouterr().err
