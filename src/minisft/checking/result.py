"""What a check is and what came of it."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from minisft.checking.context import Subject

Status = Literal["ok", "FAILED", "not run"]


class Failed(Exception):  # noqa: N818 (a result, no error of the program)
    """A check found something wrong.

    Args:
        what: what is wrong.
        mend: what the user can do about it.
    """

    def __init__(self, what: str, mend: str) -> None:
        self.what = what
        self.mend = mend
        super().__init__(what, mend)


class NotRun(Exception):  # noqa: N818
    """A check does not apply here, or cannot be run; the text goes on after "because"."""


@dataclass(frozen=True)
class Check:
    """A named check.

    Args:
        name: group.name.
        claim: what is true where it is ok.
        run: proves it; returns what was looked at.
        needs: the checks without which it says nothing.
        weights: whether it needs the model's weights.

    `run` raises `Failed` or `NotRun`; any other error of it is a failure too.
    """

    name: str
    claim: str
    run: "Callable[[Subject], str]"
    needs: tuple[str, ...] = ()
    weights: bool = False


@dataclass(frozen=True)
class Result:
    """What came of a check.

    Args:
        name: the check's.
        claim: the check's.
        status: ok, FAILED or not run.
        detail: what was looked at, what is wrong, or "because ...".
        mend: what to do where it failed.
        seconds: how long it took.
    """

    name: str
    claim: str
    status: Status
    detail: str = ""
    mend: str = ""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        assert (self.status == "FAILED") == bool(self.mend), "a failure says what to do, and nothing else does"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
