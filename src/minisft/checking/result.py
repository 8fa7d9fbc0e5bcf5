"""A check, and its result."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from minisft.checking.context import CheckContext

Status = Literal["ok", "FAILED", "not run"]


class Failed(Exception):  # noqa: N818 (a result of a check, not an error of the program)
    """A check found something wrong.

    Args:
        problem: What is wrong.
        fix: What the user can do about it.
    """

    def __init__(self, problem: str, fix: str) -> None:
        self.problem = problem
        self.fix = fix
        super().__init__(problem, fix)


class NotRun(Exception):  # noqa: N818
    """A check does not apply to the recipe, or cannot be run; its text follows the word "because"."""


@dataclass(frozen=True)
class Check:
    """A named check.

    Args:
        name: Group and name, joined by a dot.
        description: What holds where the check is ok.
        run: Proves it, and returns what was compared. It raises `Failed` or `NotRun`; any other error is a failure too.
        needs: Names of the checks that must be ok before this one says anything.
        weights: True where it needs the model's weights.
    """

    name: str
    description: str
    run: "Callable[[CheckContext], str]"
    needs: tuple[str, ...] = ()
    weights: bool = False


@dataclass(frozen=True)
class Result:
    """The result of a check.

    Args:
        name: Name of the check.
        description: Description of the check.
        status: ok, FAILED or not run.
        detail: What was compared, what is wrong, or "because ...".
        fix: What the user can do, where the check failed.
        seconds: Duration of the check.
    """

    name: str
    description: str
    status: Status
    detail: str = ""
    fix: str = ""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        assert (self.status == "FAILED") == bool(self.fix), "a failure has a fix, and no other result has one"

    def as_dict(self) -> dict[str, Any]:
        """Return the fields under their names in check.json, which other programs read."""
        return {
            "name": self.name,
            "claim": self.description,
            "status": self.status,
            "detail": self.detail,
            "mend": self.fix,
            "seconds": self.seconds,
        }
