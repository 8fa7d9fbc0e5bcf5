"""Arrows run one way: who may import whom, at module level or inside functions."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "minisft"
LEAVES = {
    "errors",
    "text",
    "files",
    "lock_files",
    "hash_cache",
    "manifest",
    "replacement",
    "processes",
    "yaml_tree",
    "recipe",
    "metric_names",
    "run_folder",
    "run_start",
    "results",
    "models",
    "optional_packages",
    "console",
    "output_filters",
    "row_losses",
    "version",
}
MAY_IMPORT = {
    "errors": set(),
    "version": set(),
    "text": set(),
    "manifest": {"errors"},
    "lock_files": {"errors", "manifest"},
    "files": {"errors", "manifest", "lock_files"},
    "hash_cache": {"files"},
    "replacement": {"errors", "files", "manifest"},
    "processes": {"errors"},
    "yaml_tree": {"errors"},
    "metric_names": {"errors"},
    "recipe": {"errors", "text", "files", "yaml_tree", "metric_names"},
    "options": {"errors"},
    "optional_packages": {"errors"},
    "console": {"text"},
    "output_filters": {"text"},
    "models": {"errors", "text", "recipe", "files", "hash_cache", "console"},
    "run_folder": {"errors", "recipe", "manifest", "files", "replacement", "console"},
    "run_start": {"errors", "recipe", "manifest", "files", "replacement", "console", "run_folder"},
    "results": {"errors", "recipe", "files", "metric_names"},
    "row_losses": {"errors", "manifest"},
    "data": LEAVES,
    "training": LEAVES | {"data", "monitoring"},
    "evaluation": LEAVES | {"data"},
    "report": LEAVES - {"models"},
    "checking": LEAVES | {"data", "training", "evaluation", "planning", "chat"},
    "audit": LEAVES | {"data", "training", "checking"},
    "planning": LEAVES | {"data", "training"},
    "new_recipe": LEAVES | {"data", "training", "planning"},
    "comparison": LEAVES | {"report"},
    "search": LEAVES
    | {"data", "training", "evaluation", "report", "comparison", "runner", "monitoring", "recipe_schema"},
    "demo": LEAVES,
    "slurm": LEAVES | {"data"},
    "runner": LEAVES | {"data", "training", "evaluation", "planning", "report"},
    "training_worker": {"run_folder", "runner", "training"},
    "exporting": LEAVES | {"data", "training", "evaluation", "report"},
    "serving": LEAVES | {"data", "evaluation", "exporting"},
    "chat": LEAVES | {"data", "evaluation"},
    "recipe_schema": {"errors", "recipe"},
    "completion": {"options", "recipe_schema"},
    "monitoring": LEAVES - {"models"},
    "recipe_argument": {"errors", "text", "metric_names", "processes", "recipe", "run_folder"},
    "notebook": {"errors", "report"},
    # The command line parses words and prints errors; all else is the API's. It takes the recipe for a type only.
    "cli": {
        "",
        "version",
        "api",
        "options",
        "console",
        "errors",
        "text",
        "files",
        "output_filters",
        "recipe",
        "completion",
    },
}
# The API may import everything but the command line.
MAY_IMPORT["api"] = {*MAY_IMPORT, "console", "output_filters"} - {"cli", "options"}
LIGHT = (
    "cli",
    "api",
    "recipe_argument",
    "recipe_schema",
    "monitoring/run_list",
    "monitoring/run_progress",
    "runner",
    "slurm",
    "options",
    "processes",
    "errors",
    "recipe",
    "yaml_tree",
    "run_folder",
    "run_start",
    "manifest",
    "replacement",
    "files",
    "__init__",
    "__main__",
)
HEAVY = {"torch", "transformers", "datasets", "rich", "numpy", "matplotlib", "sacrebleu", "jinja2", "deepspeed"}


def imports_of(path, top_level_only=False):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def part_of(path):
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def modules():
    return sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_run_one_way(path):
    part = part_of(path)
    if part in ("__main__", "__init__"):
        return
    for name in imports_of(path):
        if name.split(".")[0] == "minisft":
            target = name.split(".")[1] if "." in name else ""
            assert target == part or target in MAY_IMPORT[part], f"{path} imports {name}"


@pytest.mark.parametrize(
    "path", [p for p in modules() if part_of(p) in ("report", "monitoring")], ids=lambda path: path.stem
)
def test_the_report_and_the_monitoring_import_no_torch(path):
    assert not {name.split(".")[0] for name in imports_of(path)} & {"torch", "transformers", "deepspeed"}


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_import_nothing_heavy(name):
    assert not {module.split(".")[0] for module in imports_of(SOURCE / f"{name}.py", True)} & HEAVY


def test_the_servers_libraries_are_known_in_its_package():
    for library in ("fastapi", "uvicorn", "starlette", "pydantic"):
        knowing = {part_of(path) for path in modules() if any(n.split(".")[0] == library for n in imports_of(path))}
        assert knowing <= {"serving"}


def test_pydantic_is_known_at_the_border_only():
    knowing = [path.name for path in modules() if any(n.split(".")[0] == "pydantic" for n in imports_of(path))]
    assert knowing == ["protocol.py"]


def test_deepspeed_is_known_in_one_place():
    knowing = [path.name for path in modules() if any(n.split(".")[0] == "deepspeed" for n in imports_of(path))]
    assert knowing == ["zero.py"]
