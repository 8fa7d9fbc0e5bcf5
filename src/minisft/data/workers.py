"""Chunks to results, by several processes and in order."""

import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain

from minisft.data.chunks import ChunkResult, Task, process_chunk
from minisft.data.encoding import Encoder
from minisft.data.readers import Chunk
from minisft.processes import die_with_parent

_POOL_FROM = 3  # chunks; fewer are done sooner than processes start
_shared: tuple[Encoder, Task] | None = None  # what forked workers inherit


def process_chunks(chunks: Iterator[Chunk], encoder: Encoder, task: Task) -> Iterator[ChunkResult]:
    """Results in the order of the chunks, by several processes where there are enough of them."""
    first = [chunk for _, chunk in zip(range(_POOL_FROM), chunks, strict=False)]
    workers = task.data.processes or len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    if len(first) < _POOL_FROM or workers == 1:
        yield from (process_chunk(chunk, encoder, task) for chunk in chain(first, chunks))
        return
    yield from _in_pool(chain(first, chunks), encoder, task, workers)


def _in_pool(chunks: Iterable[Chunk], encoder: Encoder, task: Task, workers: int) -> Iterator[ChunkResult]:
    global _shared
    _shared = (encoder, task)
    waiting: deque[Future[ChunkResult]] = deque()
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_work, chunk))
                if len(waiting) > 2 * workers:  # enough to keep all busy, few enough for memory to stay flat
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            _shared = None


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores already
    # A worker whose parent was killed would wait for ever: its siblings hold the pipe open. The kernel ends it.
    die_with_parent()


def _work(chunk: Chunk) -> ChunkResult:
    assert _shared is not None
    encoder, task = _shared
    return process_chunk(chunk, encoder, task)
