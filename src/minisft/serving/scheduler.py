"""The one thread that decodes: rows of all requests, those of one model together.

Other threads only submit and cancel jobs. What is decoded is delivered through the job's callback.
"""

import threading
import traceback
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from minisft.console import warn
from minisft.errors import UserError
from minisft.evaluation.generation import CACHE_POSITIONS, Decoder, DecodingRequest, TokenScores
from minisft.models import is_out_of_memory
from minisft.serving.answer_text import AnswerText, Piece
from minisft.serving.model_pool import LoadedModel, ModelPool, ServedModel
from minisft.serving.protocol import ApiError
from minisft.text import first_line

ROWS_TOGETHER = 64  # the most rows that are decoded together
ROWS_WAITING = 256  # the most rows of all requests, decoded and waiting; further requests are refused
RETRY_SECONDS = 5
_EXPECTED_TOKENS = 1024  # an answer is taken to need at most so many positions of the cache


@dataclass(eq=False)
class Job:
    """The rows of one request.

    Args:
        model: The model to ask.
        rows: The prompts, one for each answer.
        texts: The text of each answer.
        deliver: Called from the decoding thread with (row, what is new), the last time with a `finish`, or with
            (0, error) once if the request failed.
    """

    model: ServedModel
    rows: tuple[DecodingRequest, ...]
    texts: tuple[AnswerText, ...]
    deliver: Callable[[int, Piece | ApiError], None]
    over: bool = False  # ended, cancelled or failed: nothing more is delivered
    unfinished: int = 0

    def __post_init__(self) -> None:
        self.unfinished = len(self.rows)


@dataclass
class _Group:
    """The decoder of a model that is loaded, and whose row each of its rows is."""

    decoder: Decoder
    rows: dict[int, tuple[Job, int]] = field(default_factory=dict)

    def takes(self, requests: Sequence[DecodingRequest], request: DecodingRequest) -> bool:
        """Return whether a further row may join, after the `requests` that are about to."""
        if not self.decoder.takes_rows:
            return False
        others = [*requests, *(job.rows[row] for job, row in self.rows.values())]
        longest = max(len(r.prompt) + min(r.max_new_tokens, _EXPECTED_TOKENS) for r in (*others, request))
        return not others or (len(others) < ROWS_TOGETHER and (len(others) + 1) * longest <= CACHE_POSITIONS)


class Scheduler:
    """Decodes jobs in a thread of its own, from the creation until `stop`.

    Args:
        pool: The models; only this thread changes which are in memory.
    """

    def __init__(self, pool: ModelPool) -> None:
        self.pool = pool
        self._lock = threading.Lock()  # guards the two lists and the count
        self._submitted: list[Job] = []
        self._cancelled: list[Job] = []
        self._count = 0  # rows that are not finished
        self._signal = threading.Event()
        self._stopping = False
        self._waiting: list[tuple[Job, int]] = []
        self._groups: dict[str, _Group] = {}
        self._loading: dict[str, tuple[int, Future[LoadedModel]]] = {}  # sizes in bytes, and what is being loaded
        self._one_load = threading.Lock()  # transformers changes global state while it loads
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)
        self._thread.start()

    # --- for other threads --------------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
            ApiError: There are too many already, or the server is stopping.
        """
        with self._lock:
            if self._stopping:
                raise ApiError(503, "the server is stopping")
            if self._count + len(job.rows) > ROWS_WAITING:
                message = f"{self._count} answers are being generated or waited for: try again later"
                raise ApiError(503, message, code="overloaded", headers={"Retry-After": str(RETRY_SECONDS)})
            self._count += len(job.rows)
            self._submitted.append(job)
        self._signal.set()

    def cancel(self, job: Job) -> None:
        """End a job whose answers nobody waits for any more; a job that has ended is left alone.

        It no longer counts from now on; its rows are freed before the next token.
        """
        if self._close(job):
            with self._lock:
                self._cancelled.append(job)
            self._signal.set()

    @property
    def unfinished(self) -> int:
        """Number of answers that are being generated or waited for."""
        return self._count

    def stop(self, timeout: float) -> bool:
        """End all jobs and the thread; return whether it ended within `timeout` seconds: a step is not interrupted."""
        self._stopping = True
        self._signal.set()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # --- the thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping:
            decoding = any(group.decoder.busy for group in self._groups.values())
            admissible = self._waiting and not self._loading  # with nothing to decode, any row may begin
            if not decoding and not admissible:
                self._signal.wait()
            try:
                self._turn()
            except Exception:  # a defect of this module: no request may wait for ever because of it
                warn(f"the decoding thread failed, and goes on:\n{traceback.format_exc()}")
                self._fail_all(ApiError(500, "the answer could not be generated"))
        self._fail_all(ApiError(503, "the server is stopping"))

    def _turn(self) -> None:
        """Take new jobs, free cancelled ones, and decode one token of every row."""
        self._signal.clear()
        with self._lock:
            submitted, self._submitted = self._submitted, []
            cancelled, self._cancelled = self._cancelled, []
        self._waiting += [(job, row) for job in submitted for row in range(len(job.rows))]
        if cancelled:
            self._free(set(cancelled))
        self._finish_loading()
        self._admit()
        for name, group in list(self._groups.items()):
            if group.decoder.busy:
                self._guarded(name, self._step)

    def _fail_all(self, error: ApiError) -> None:
        with self._lock:
            jobs, self._submitted = {*self._submitted, *(job for job, _ in self._waiting)}, []
        jobs |= {job for group in self._groups.values() for job, _ in group.rows.values()}
        self._waiting = []
        self._groups = {name: _Group(Decoder(group.decoder.model)) for name, group in self._groups.items()}
        for job in jobs:
            self._fail(job, error)

    def _free(self, jobs: Collection[Job]) -> None:
        """Free the rows of jobs that have been cancelled."""
        self._waiting = [(job, row) for job, row in self._waiting if job not in jobs]
        for group in self._groups.values():
            numbers = [number for number, (job, _) in group.rows.items() if job in jobs]
            if numbers:
                group.decoder.cancel(numbers)
                for number in numbers:
                    del group.rows[number]

    def _admit(self) -> None:
        """Let waiting rows join the rows of their model, in the order of their arrival."""
        joining: dict[str, list[tuple[Job, int]]] = {}
        waiting, full = [], set()
        for place, (job, row) in enumerate(self._waiting):
            name = job.model.name
            if job.over:
                continue
            if name not in self._groups and name not in self._loading and not self._start_loading(job, joining):
                # It waits for memory, and so does all that came later: else it might wait for ever.
                waiting += [entry for entry in self._waiting[place:] if not entry[0].over]
                break
            group = self._groups.get(name)
            if group is not None and name not in full:
                before = [j.rows[r] for j, r in joining.get(name, ())]
                if group.takes(before, job.rows[row]):
                    joining.setdefault(name, []).append((job, row))
                    continue
                full.add(name)
            waiting.append((job, row))
        self._waiting = waiting
        for name, rows in joining.items():
            self.pool.use(name)
            self._guarded(name, self._join, rows)

    def _join(self, group: _Group, rows: Sequence[tuple[Job, int]]) -> None:
        requests = [replace(job.rows[row], on_token=self._teller(job, row)) for job, row in rows]
        numbers = group.decoder.add(requests)
        group.rows |= dict(zip(numbers, rows, strict=True))

    def _teller(self, job: Job, row: int) -> Callable[[int, TokenScores | None], bool]:
        def tell(token: int, scores: TokenScores | None) -> bool:
            text = job.texts[row]
            piece = text.push(token, scores)
            if not piece.empty and not job.over:
                job.deliver(row, piece)
            return text.stopped or job.over

        return tell

    def _step(self, group: _Group, _: Sequence[tuple[Job, int]]) -> None:
        for number, generated in group.decoder.step().items():
            job, row = group.rows[number]
            piece = job.texts[row].finish(generated.finish)
            del group.rows[number]
            with self._lock:
                if job.over:  # cancelled since this step began
                    continue
                self._count -= 1
                job.unfinished -= 1
                job.over = job.unfinished == 0
            job.deliver(row, piece)

    def _guarded(self, name: str, action: Callable[..., None], rows: Sequence[tuple[Job, int]] = ()) -> None:
        """Do something with a model's group; an error ends all its jobs, and the next ones get a new decoder."""
        group = self._groups[name]
        try:
            action(group, rows)
        except Exception as error:
            status, what = (503, "out of memory") if is_out_of_memory(error) else (500, type(error).__name__)
            warn(f"{name}: {what}: {first_line(error)}")
            jobs = {job for job, _ in (*group.rows.values(), *rows)}
            self._groups[name] = _Group(Decoder(group.decoder.model))
            for job in jobs:
                self._fail(job, ApiError(status, f"the answer could not be generated: {what}"))

    # --- models -------------------------------------------------------------------------------------------

    def _start_loading(self, job: Job, joining: Collection[str]) -> bool:
        """Load a job's model in another thread, after evicting others; return whether that could begin.

        The models that rows are `joining` are in use, as are those with rows.
        """
        name = job.model.name
        try:
            size = self.pool.size(job.model)
        except (UserError, OSError, ValueError) as error:
            self._fail(job, ApiError(503, _as_text(error)))
            return True
        busy = [name for name, group in self._groups.items() if group.rows or name in joining]
        evicted = self.pool.evictable(size, sum(size for size, _ in self._loading.values()), busy)
        if evicted is None:
            return False
        for other in evicted:
            del self._groups[other]
            self.pool.evict(other)
        future: Future[LoadedModel] = Future()
        self._loading[name] = (size, future)
        threading.Thread(target=self._load, args=(job.model, future), name="load", daemon=True).start()
        return True

    def _load(self, model: ServedModel, future: "Future[LoadedModel]") -> None:
        try:
            with self._one_load:
                future.set_result(self.pool.load(model))
        except BaseException as error:
            future.set_exception(error)
        self._signal.set()

    def _finish_loading(self) -> None:
        """Take the models that have been loaded; where one could not be, its jobs fail."""
        for name, (_, future) in list(self._loading.items()):
            if not future.done():
                continue
            del self._loading[name]
            try:
                loaded = future.result()
            except Exception as error:
                status = 503 if is_out_of_memory(error) else 500
                for job in {job for job, _ in self._waiting if job.model.name == name}:
                    self._fail(job, ApiError(status, f"{name} could not be loaded: {_as_text(error)}"))
                continue
            self.pool.add(loaded)
            self._groups[name] = _Group(Decoder(loaded.model))

    def _fail(self, job: Job, error: ApiError) -> None:
        if self._close(job):
            job.deliver(0, error)

    def _close(self, job: Job) -> bool:
        """Mark a job as over, so that its rows no longer count; return whether it was not over before."""
        with self._lock:
            if job.over:
                return False
            job.over = True
            self._count -= job.unfinished
            return True


def _as_text(error: Exception) -> str:
    if isinstance(error, UserError):
        return f"{error.where}: {error.problem}; {error.fix}"
    return first_line(error)
