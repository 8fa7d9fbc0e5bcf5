"""The command line, called in this process."""

from typing import NamedTuple

from minisft.cli import main


class Finished(NamedTuple):
    """The exit status of a command and what it printed."""

    status: int
    out: str
    err: str


def run(capsys, *words):
    """Run `minisft WORDS` and return its exit status, stdout and stderr."""
    capsys.readouterr()
    status = main([str(word) for word in words])
    return Finished(status, *capsys.readouterr())


def refused(capsys, *words):
    """Run a command that must be refused with a message that a user can act on; return its stderr."""
    status, _, err = run(capsys, *words)
    assert status == 2, err
    assert "minisft: " in err
    assert "Fix: " in err
    assert "Traceback" not in err
    assert len(err) < 3000
    return err
