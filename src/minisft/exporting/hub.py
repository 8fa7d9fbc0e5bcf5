"""Publishing a run's model on the Hugging Face hub: a verified export and its model card, by huggingface_hub."""

import shutil
from dataclasses import replace
from pathlib import Path

from minisft.console import say
from minisft.errors import UserError
from minisft.exporting.export import ExportOptions, export
from minisft.recipe import Recipe
from minisft.text import first_line

# Files that MiniSFT keeps for itself in an exported folder.
_OWN_FILES = (".minisft.json", ".minisft.files")
_TOKEN = "run `hf auth login`, or set HF_TOKEN, with a token that may write to this repository"


def push(recipe: Recipe, name: str, options: ExportOptions, *, private: bool = False, dry_run: bool = False) -> str:
    """Export a run's model beside the run folder, and send it to a repository of the hub, which is created if needed.

    Args:
        recipe: Recipe of the run.
        name: ORG/NAME of the repository.
        options: What to export, and how.
        private: Create a private repository.
        dry_run: Write the folder that would be sent, and send nothing.

    Returns:
        The address of the commit; of a dry run, the path of the folder.

    Raises:
        UserError: The name is not valid, the export is refused, or the hub refuses the files or cannot be reached.
    """
    _require_name(name)
    folder = Path(recipe.output).resolve()
    folder = folder.with_name(f"{folder.name}.push")
    export(recipe, folder, replace(options, force=True))
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in _OWN_FILES)
    for path in files:
        say(f"  {path.relative_to(folder)}  {path.stat().st_size:,} bytes")
    if dry_run:
        say(f"nothing was sent; {folder} is what would be sent to {name}")
        return str(folder)
    address = _send(folder, name, private)
    shutil.rmtree(folder)  # `export` has just written all of it
    say(f"published: {address}")
    return address


def _require_name(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        if name.count("/") != 1:
            raise HFValidationError("it has no organisation or user before a slash")
    except HFValidationError as error:
        problem = f"this is not the name of a repository ({first_line(error)})"
        raise UserError(name, problem, "write ORG/NAME, such as my-name/my-model") from None


def _send(folder: Path, name: str, private: bool) -> str:
    """Create the repository if it does not exist, and send the folder in one commit; return the commit's address."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message="Model, verification and model card, written by minisft push",
            ignore_patterns=list(_OWN_FILES),
        )
    except LocalTokenNotFoundError:
        raise UserError(name, "no token of the hub is set here", _TOKEN) from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        fix = _TOKEN if status in (401, 403) else f"push again; the export is kept in {folder}"
        raise UserError(name, f"the hub refuses it ({first_line(error)})", fix) from None
    except Exception as error:
        # The errors of its HTTP library, httpx or its successor, have no common class with those of the system.
        if not isinstance(error, OSError | RuntimeError) and not type(error).__module__.startswith("httpx"):
            raise
        fix = f"check the network, and push again; the export is kept in {folder}"
        raise UserError(name, f"the hub cannot be reached ({first_line(error)})", fix) from None
    return str(commit.commit_url)
