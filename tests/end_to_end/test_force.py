"""What `--force` and other commands must never lose: the old run, inputs, files of others, what links lead to."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from minisft.cli import main
from minisft.files import hold_lock
from tests.command import refused, run
from tests.tiny import minisft, write_tiny_model


def tree(folder):
    return {
        str(path.relative_to(folder)): path.readlink() if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model, conversations):
    """A recipe and its trained run, to be copied: a run is what its marker says only where it was made."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model: {tiny_model}\noutput: {folder / 'run'}\n"
        f"data: {{source: {conversations}, template: mistral, max_length: 256}}\n"
        "training: {max_steps: 2, learning_rate: 1.0e-3, precision: fp32}\nevaluation: {max_new_tokens: 4}\n"
    )
    assert main(["train", str(recipe)]) == 0
    return recipe


@pytest.fixture
def recipe(tmp_path, trained):
    """A recipe in `tmp_path` whose run there is trained: the folder is moved, so that its marker holds."""
    text = trained.read_text().replace(str(trained.parent), str(tmp_path))
    (tmp_path / "recipe.yaml").write_text(text)
    spare = trained.parent / "spare"
    shutil.copytree(trained.parent / "run", spare)
    (trained.parent / "run").rename(tmp_path / "run")
    yield tmp_path / "recipe.yaml"
    if (tmp_path / "run").exists():
        shutil.rmtree(tmp_path / "run")
    spare.rename(trained.parent / "run")
    from minisft.manifest import write_marker

    write_marker(trained.parent / "run", "run")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["data.template=chatmll"], "template"),
        (["data.source=invalid.jsonl"], "invalid.jsonl"),
        (["training.optimizer=adamw_nowhere"], "optimizer"),
        (["data.max_length=1"], ""),
        (["training.keep_optimizer=all", "training.max_steps=200000", "training.save_every=1"], "free there"),
    ],
)
def test_force_keeps_the_run_where_the_new_one_cannot_start(capsys, recipe, tmp_path, monkeypatch, words, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "invalid.jsonl").write_text('{"conversations": [{"from": "gpt", "value": "a"}]}\n')
    before = tree(tmp_path / "run")
    assert named in refused(capsys, "train", recipe, "--force", *words)
    assert tree(tmp_path / "run") == before
    assert not list(tmp_path.glob("run.*"))


def test_force_names_what_it_replaces_and_keeps_files_of_others(capsys, recipe, tmp_path):
    (tmp_path / "run" / "notes.txt").write_text("mine")
    (tmp_path / "run" / "model" / "card.md").write_text("mine too")
    status, out, err = run(capsys, "train", recipe, "--force", "training.max_steps=1")
    said = out + err
    assert status == 0
    assert "--force replaces" in said
    assert "a trained run with 1 checkpoint" in said
    assert "notes.txt" in said
    assert {"notes.txt": b"mine", "model/card.md": b"mine too"}.items() <= tree(tmp_path / "run.old-1").items()
    assert not list(tmp_path.glob("run.old-1/**/*.safetensors"))
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-1").is_dir()


def test_the_old_run_is_restored_if_training_fails_before_its_first_step(capsys, recipe, tmp_path, tiny_model):
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_model, damaged)
    weights = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(weights[:-1000])  # found when the weights are loaded
    before = tree(tmp_path / "run")
    status, out, err = run(capsys, "train", recipe, f"model={damaged}", "--force")
    assert status == 2
    assert "it is kept until the new run has taken its first step" in out + err
    assert "is the earlier run again: the new one took no step" in out + err
    assert "the model cannot be loaded" in err
    assert tree(tmp_path / "run").items() >= {k: v for k, v in before.items() if k != ".minisft.json"}.items()
    assert not list(tmp_path.glob("run.*"))


def test_a_dry_run_writes_nothing(capsys, recipe, tmp_path):
    before = tree(tmp_path)
    status, out, err = run(capsys, "train", recipe, "--force", "--dry-run")
    said = out + err
    assert status == 0
    assert "nothing was written" in said
    assert "would replace" in said
    status, out, err = run(capsys, "train", recipe, f"output={tmp_path / 'new'}", "--dry-run")
    said = out + err
    assert status == 0
    assert "template" in refused(capsys, "train", recipe, "--force", "--dry-run", "data.template=chatmll")
    assert "trained already" in refused(capsys, "train", recipe, "--dry-run")
    assert tree(tmp_path) == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("key", ["model", "data.source", "data.test"])
def test_an_input_inside_the_output_is_refused(capsys, recipe, tmp_path, conversations, key):
    inside = tmp_path / "run" / "model"
    if key != "model":
        inside = tmp_path / "run" / "mine.jsonl"
        shutil.copy(conversations, inside)
    before = tree(tmp_path / "run")
    assert "lies in the `output` folder" in refused(capsys, "train", recipe, f"{key}={inside}", "--force")
    assert tree(tmp_path / "run") == before


@pytest.mark.parametrize("pattern", ["", "/**/*.jsonl", "/**"])
def test_an_output_inside_the_data_folder_is_refused(capsys, recipe, tmp_path, conversations, pattern):
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(conversations, data / "talks.jsonl")
    said = refused(capsys, "prepare", recipe, f"data.source={data}{pattern}", f"output={data / 'run'}")
    assert "would be read as data" in said
    assert [path.name for path in data.iterdir()] == ["talks.jsonl"]


@pytest.mark.parametrize("verb", ["prepare", "train"])
@pytest.mark.parametrize("force", [[], ["--force"]])
def test_a_copied_recipe_does_not_make_a_folder_a_run(capsys, recipe, tmp_path, verb, force):
    mine = tmp_path / "mine"
    for name in ("dataset/precious.txt", "model/weights.bin"):
        (mine / name).parent.mkdir(parents=True)
        (mine / name).write_text("precious")
    shutil.copy(tmp_path / "run" / "recipe.yaml", mine / "recipe.yaml")
    before = tree(mine)
    refused(capsys, verb, mine / "recipe.yaml", f"output={mine}", *force)
    assert tree(mine) == before


def test_a_copy_of_a_run_is_read_but_not_replaced(capsys, recipe, tmp_path):
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert run(capsys, "inspect", tmp_path / "copy", "--count", "1")[0] == 0
    assert run(capsys, "report", tmp_path / "copy")[0] == 0
    before = tree(tmp_path / "copy")
    assert "it is a copy" in refused(capsys, "train", recipe, f"output={tmp_path / 'copy'}", "--force")
    assert tree(tmp_path / "copy") == before


@pytest.mark.parametrize("name", ["dataset", "model", "evaluation", "tensorboard"])
def test_force_replaces_a_run_with_linked_folders_and_leaves_what_they_lead_to(capsys, recipe, tmp_path, name):
    disk = tmp_path / "disk"
    (tmp_path / "run" / name).rename(disk)
    (tmp_path / "run" / name).symlink_to(disk)
    before = tree(disk)
    status, out, err = run(capsys, "prepare", recipe, "--force")
    said = out + err
    assert status == 0, said
    assert tree(disk) == before
    assert (tmp_path / "run" / "dataset" / "ledger.json").is_file()
    assert (tmp_path / "run.old-1" / name).is_symlink()


@pytest.mark.parametrize("name", [".lock", ".dataset.lock"])
def test_a_lock_is_not_opened_through_a_link(capsys, recipe, tmp_path, name):
    new = tmp_path / "new"
    assert run(capsys, "prepare", recipe, f"output={new}")[0] == 0
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (new / name).unlink()
    (new / name).symlink_to(precious)
    assert "lock file" in refused(capsys, "prepare", recipe, f"output={new}", "data.max_length=128")
    assert precious.read_text() == "precious"


@pytest.mark.parametrize("verb", ["prepare", "train"])
def test_a_run_that_evaluate_reads_is_not_replaced(capsys, recipe, tmp_path, verb):
    (tmp_path / "run" / "evaluation").mkdir(exist_ok=True)
    (tmp_path / "run" / "evaluation" / ".lock").touch()
    before = tree(tmp_path / "run")
    with hold_lock(tmp_path / "run" / "evaluation" / ".lock"):
        assert "another process is at work" in refused(capsys, verb, recipe, "--force")
    assert tree(tmp_path / "run") == before


def test_a_mount_point_is_not_replaced(capsys, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "run")
    before = tree(tmp_path / "run")
    assert "mount point" in refused(capsys, "train", recipe, "--force")
    assert tree(tmp_path / "run") == before


@pytest.mark.parametrize("output", ["/dev/null", "{file}/below", "{file}", "x" * 300, "{nowhere}"])
def test_an_output_that_cannot_be_a_folder_is_refused(capsys, recipe, tmp_path, output):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    named = output.format(file=tmp_path / "file", nowhere=tmp_path / "dangling")
    assert "output" in refused(capsys, "prepare", recipe, f"output={named}")
    assert (tmp_path / "file").read_bytes() == b""


def test_an_untrusted_run_with_links_that_lead_out_is_not_written_to(capsys, recipe, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "results.json").write_text("theirs")
    strangers = tmp_path / "strangers"
    shutil.copytree(tmp_path / "run", strangers)
    shutil.rmtree(strangers / "evaluation", ignore_errors=True)
    (strangers / "evaluation").symlink_to(outside)
    for words in (["evaluate", strangers], ["report", strangers]):
        assert "leads out of the run folder" in refused(capsys, *words)
    assert tree(outside) == {"results.json": b"theirs"}


# --- export -----------------------------------------------------------------------------------------------


def test_export_replaces_only_a_model_that_it_wrote(capsys, recipe, tmp_path):
    folder = tmp_path / "exported"
    assert run(capsys, "export", tmp_path / "run", folder)[0] == 0
    (folder / "mine.md").write_text("mine")
    assert "not empty" in refused(capsys, "export", tmp_path / "run", folder)
    status, out, err = run(capsys, "export", tmp_path / "run", folder, "--force", "--dtype", "bf16")
    said = out + err
    assert status == 0
    assert "mine.md" in said
    assert tree(tmp_path / "exported.old-1")["mine.md"] == b"mine"
    assert "bfloat16" in (folder / "config.json").read_text()


def test_export_leaves_a_project_that_has_a_config_json_alone(capsys, recipe, tmp_path):
    project = tmp_path / "project"
    (project / "src").mkdir(parents=True)
    (project / "config.json").write_text("{}")
    (project / "src" / "index.js").write_text("precious")
    before = tree(project)
    assert "--force replaces only" in refused(capsys, "export", tmp_path / "run", project, "--force")
    assert tree(project) == before


def test_export_does_not_replace_a_folder_that_holds_the_run(capsys, recipe, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    before = tree(tmp_path)
    assert "the run is in this folder" in refused(capsys, "export", tmp_path / "run", tmp_path, "--force")
    assert tree(tmp_path) == before


def test_export_expands_the_home_folder(capsys, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "export", "run", "~/exported")[0] == 0
    assert (tmp_path / "home" / "exported" / "config.json").is_file()
    assert not (tmp_path / "~").exists()


def test_export_onto_a_full_disk_leaves_what_was_there(recipe, tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no right to mount a small file system")
    try:
        done = minisft("export", tmp_path / "run", folder / "exported")
        assert done.returncode == 2
        assert "No space left" in done.stderr
        assert "Traceback" not in done.stderr
        assert list(folder.iterdir()) == []
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_an_adapters_base_model_is_not_replaced_by_its_export(capsys, recipe, tmp_path):
    base = write_tiny_model(tmp_path / "base")
    before = tree(base)
    refused(capsys, "export", tmp_path / "run", base, "--force", f"model={base}")
    assert tree(base) == before
