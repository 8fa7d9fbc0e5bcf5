"""The error that a user can fix, and the end of a run that was asked to stop."""


class UserError(Exception):
    """A mistake that the user can fix; the command line prints it and exits with status 2.

    Args:
        where: The file, line, row, key or option that has the problem.
        problem: What is wrong, as a statement.
        fix: What the user can do, as an imperative without a full stop.
    """

    def __init__(self, where: object, problem: str, fix: str) -> None:
        self.where = str(where)
        self.problem = problem
        self.fix = fix
        super().__init__(self.where, problem, fix)  # all three, since an exception is pickled by its args

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}\n  Fix: {self.fix}"


class StoppedError(Exception):
    """A run stopped because it was asked to, with its work saved; the command line says so and exits with status 1."""


class WorkerError(RuntimeError):
    """A process of the run failed or was killed, and its own output says why; the command line exits with status 1."""
