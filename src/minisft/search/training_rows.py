"""The prepared rows of trials: a data set for each combination of keys of `data`, with the same held-out rows."""

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisft.data.prepared import load_split
from minisft.errors import UserError
from minisft.models import ResolvedModel
from minisft.recipe import Recipe
from minisft.search.space import Axis, Choices, Range, Settings, checked, combinations

if TYPE_CHECKING:
    from minisft.data.preparation import Prepared
    from minisft.training.batching import Sizes


@dataclass(frozen=True)
class BaseModel:
    """The base model of all trials: where it is, and the fingerprint of its weights."""

    resolved: ResolvedModel
    fingerprint: str


def prepare_folder(recipe: Recipe, folder: Path, base: BaseModel, *, begun: bool) -> "Prepared":
    """Prepare a recipe's rows in a run folder, unless that is done.

    Args:
        recipe: The recipe.
        folder: The run folder, in place of the recipe's `output`.
        base: The base model.
        begun: Whether trials have been trained on the rows, which must then be the same.

    Raises:
        UserError: The data cannot be used, or are not those that the search began with.
    """
    from minisft.data.preparation import prepare
    from minisft.run_folder import record_base_model
    from minisft.run_start import open_run

    recipe = replace(recipe, output=str(folder))
    with open_run(recipe, prepares_only=True) as run:
        record_base_model(run, str(base.resolved), base.fingerprint)
        try:
            return prepare(recipe, model_folder=base.resolved.folder, begun=begun and run.dataset.exists())
        except UserError as error:
            if not begun:
                raise
            raise UserError(folder.parent, error.problem, "restore what changed, or choose another `output`") from None


@dataclass(frozen=True)
class TrainingRows:
    """The prepared rows of the trials of a search.

    Args:
        recipe: The recipe of the trials, whose test rows are the validation rows; its rows lie in `OUTPUT/data`.
        base: The base model.
        begun: Whether the search goes on.
    """

    recipe: Recipe
    base: BaseModel
    begun: bool
    _sizes: dict[Path, "Sizes"] = field(default_factory=dict)

    def require_same_validation(self, axes: Sequence[Axis]) -> None:
        """Prepare the rows of every combination of listed values of `data`, and of the ends of ranges.

        Raises:
            UserError: Values change the validation rows.
        """
        varied = [axis for axis in axes if axis.key.startswith("data.")]
        ends = [[(a.key, int(end)) for end in (a.low, a.high)] for a in varied if isinstance(a, Range)]
        for settings in combinations([axis for axis in varied if isinstance(axis, Choices)]):
            for chosen in itertools.product(*ends):
                self.folder(checked(self.recipe, settings | dict(chosen)))

    def folder(self, recipe: Recipe) -> Path:
        """Return the run folder that holds the prepared rows of a trial; they are prepared when first asked for.

        Raises:
            UserError: Its settings change the validation rows.
        """
        own = Path(self.recipe.output) / "data"
        if recipe.data == self.recipe.data:
            return own
        changed = {key: value for key, value in asdict(recipe.data).items() if value != asdict(self.recipe.data)[key]}
        digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:8]
        folder = own.with_name(f"data-{digest}")
        if folder not in self._sizes:
            prepared = prepare_folder(recipe, folder, self.base, begun=self.begun)
            self._refuse_other_rows(changed, own, folder, prepared.ledger)
            self._sizes[folder] = _measure(folder)
        return folder

    def sizes(self, recipe: Recipe) -> "Sizes":
        """Return the tokens of the train rows of a trial."""
        folder = self.folder(recipe)
        if folder not in self._sizes:
            self._sizes[folder] = _measure(folder)
        return self._sizes[folder]

    def _refuse_other_rows(self, changed: Settings, own: Path, folder: Path, ledger: dict[str, Any]) -> None:
        named = ", ".join(f"data.{key}={value}" for key, value in changed.items())
        fix = "give values that leave these rows as they are, or make a search for each value"
        counts = json.loads((own / "dataset" / "ledger.json").read_text(encoding="utf-8"))["rows"]
        if counts != ledger["rows"]:
            problem = (
                f"other rows are kept ({counts} otherwise, {ledger['rows']} here), which changes the validation rows"
            )
            raise UserError(f"--vary {named}", problem, fix)
        mine, theirs = load_split(own, "test"), load_split(folder, "test")
        columns = ("input_ids", "labels")
        pairs = zip(
            zip(*(mine[c] for c in columns), strict=True), zip(*(theirs[c] for c in columns), strict=True), strict=True
        )
        differ = sum(one != other for one, other in pairs)
        if differ:
            problem = (
                f"{differ} of {len(mine)} validation rows have other tokens, and trials are compared on the same ones"
            )
            raise UserError(f"--vary {named}", problem, fix)


def _measure(folder: Path) -> "Sizes":
    from minisft.training.batching import measure_lengths

    return measure_lengths(load_split(folder, "train"))
