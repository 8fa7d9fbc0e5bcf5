"""What a check is and what came of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from minisft.checking.context import CheckContext

Status = Literal["ok", "FAILED", "not run"]


class Failed(Exception):  # noqa: N818 (a result, no error of the program)
    """A check found something wrong.

    Args:
        problem: what is wrong.
        fix: what the user can do about it.
    """

    def __init__(self, problem: str, fix: str) -> None:
        self.problem = problem
        self.fix = fix
        super().__init__(problem, fix)


class NotRun(Exception):  # noqa: N818
    """A check does not apply here, or cannot be run; the text goes on after "because"."""


@dataclass(frozen=True)
class Check:
    """A named check.

    Args:
        name: group.name.
        description: what is true where it is ok.
        run: proves it; returns what was looked at.
        needs: the checks without which it says nothing.
        weights: whether it needs the model's weights.

    `run` raises `Failed` or `NotRun`; any other error of it is a failure too.
    """

    name: str
    description: str
    run: "Callable[[CheckContext], str]"
    needs: tuple[str, ...] = ()
    weights: bool = False


@dataclass(frozen=True)
class Result:
    """What came of a check.

    Args:
        name: the check's.
        description: the check's.
        status: ok, FAILED or not run.
        detail: what was looked at, what is wrong, or "because ...".
        fix: what to do where it failed.
        seconds: how long it took.
    """

    name: str
    description: str
    status: Status
    detail: str = ""
    fix: str = ""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        assert (self.status == "FAILED") == bool(self.fix), "a failure says what to do, and nothing else does"

    def as_dict(self) -> dict[str, Any]:
        """Return the fields under the names that check.json has for them."""
        return {
            "name": self.name,
            "claim": self.description,
            "status": self.status,
            "detail": self.detail,
            "mend": self.fix,
            "seconds": self.seconds,
        }
