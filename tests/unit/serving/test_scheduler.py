"""The decoding thread with models that say what they are told."""

import contextlib
import time

import pytest

from minisft.errors import UserError
from minisft.serving.protocol import ApiError
from minisft.serving.scheduler import ROWS_TOGETHER, ROWS_WAITING
from tests.unit.serving.scripted import Asked, ScriptedModel, ids_of, started

HELLO = ids_of("Hello there")


@contextlib.contextmanager
def scheduler_of(models, **settings):
    scheduler = started(models, **settings)
    try:
        yield scheduler
    finally:
        assert scheduler.stop(5)


def wait_until(true, seconds=5):
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_jobs_that_come_while_others_decode_join_them():
    model = ScriptedModel(HELLO, 3, seconds=0.01)
    with scheduler_of({"final": model}) as scheduler:
        first = Asked(scheduler, "final", 3)
        first.events.get(timeout=10)
        second = Asked(scheduler, "final", 2)
        assert second.answers() == ["Hello there"] * 2
        wait_until(lambda: scheduler.unfinished == 0)
    assert max(model.rows) == 5


def test_no_more_rows_than_the_limit_are_decoded_together_and_all_are_answered():
    model = ScriptedModel(HELLO, 3)
    with scheduler_of({"final": model}) as scheduler:
        asked = [Asked(scheduler, "final", 16) for _ in range(10)]
        assert [one.answers() for one in asked] == [["Hello there"] * 16] * 10
    assert max(model.rows) == ROWS_TOGETHER


def test_a_cancelled_job_frees_its_rows_and_gets_nothing_more():
    model = ScriptedModel(HELLO * 100, 3, seconds=0.005)
    with scheduler_of({"final": model}) as scheduler:
        asked, other = Asked(scheduler, "final", 4, most=1000), Asked(scheduler, "final", most=30)
        asked.events.get(timeout=10)
        scheduler.cancel(asked.job)
        wait_until(lambda: scheduler.unfinished <= 1, 1)
        assert other.answers() == [("Hello there" * 3)[:30]]
        scheduler.cancel(other.job)  # it has ended
        time.sleep(0.05)
        assert scheduler.unfinished == 0
        assert all(piece.finish is None for _, piece in list(asked.events.queue))
    assert model.rows[-1] == 1


def test_a_waiting_job_can_be_cancelled():
    model = ScriptedModel(HELLO * 10, 3, seconds=0.002)
    with scheduler_of({"final": model}) as scheduler:
        running = Asked(scheduler, "final", ROWS_TOGETHER)
        waiting = Asked(scheduler, "final", 2)
        scheduler.cancel(waiting.job)
        assert len(running.answers(30)) == ROWS_TOGETHER
        assert scheduler.unfinished == 0
        assert waiting.events.empty()


def test_too_many_rows_are_refused_with_a_time_to_wait():
    model = ScriptedModel(HELLO * 100, 3, seconds=0.01)
    with scheduler_of({"final": model}) as scheduler:
        asked = Asked(scheduler, "final", ROWS_WAITING)
        with pytest.raises(ApiError) as refused:
            Asked(scheduler, "final")
        assert refused.value.status == 503
        assert int(refused.value.headers["Retry-After"]) > 0
        scheduler.cancel(asked.job)
        wait_until(lambda: scheduler.unfinished == 0)
        assert Asked(scheduler, "final", most=5).answers() == ["Hello"]


def test_an_error_while_decoding_ends_its_jobs_and_no_others():
    broken = ScriptedModel(HELLO, 3, seconds=0.002, failing_at=4)
    models = {"final": broken, "base": ScriptedModel(HELLO, 3, seconds=0.002)}
    with scheduler_of(models) as scheduler:
        failing, fine = Asked(scheduler, "final", 2), Asked(scheduler, "base")
        error = failing.answers()
        assert isinstance(error, ApiError)
        assert error.status == 500
        assert "planted" not in error.message
        assert fine.answers() == ["Hello there"]
        assert Asked(scheduler, "final").answers() == ["Hello there"]
        assert scheduler.unfinished == 0


def test_models_are_loaded_when_asked_and_the_least_recently_used_is_evicted():
    models = {name: ScriptedModel(ids_of(name), 3) for name in ("final", "base", "checkpoint-1")}
    with scheduler_of(models, limit=2) as scheduler:
        for name in ("final", "base", "final", "checkpoint-1"):
            assert Asked(scheduler, name).answers() == [name]
        wait_until(lambda: list(scheduler.pool.loaded) == ["final", "checkpoint-1"])
        assert scheduler.pool.evicted == ["base"]
        assert Asked(scheduler, "base").answers() == ["base"]
        assert scheduler.pool.evicted == ["base", "final"]


def test_a_model_that_is_in_use_is_not_evicted_and_no_request_waits_for_ever():
    models = {"final": ScriptedModel(HELLO * 9, 3, seconds=0.003), "base": ScriptedModel(HELLO, 3)}
    with scheduler_of(models, limit=1) as scheduler:
        running = Asked(scheduler, "final", most=60)
        running.events.get(timeout=10)
        other, later = Asked(scheduler, "base"), Asked(scheduler, "final", most=5)
        assert running.answers() != []
        assert other.answers() == ["Hello there"]
        assert later.answers() == ["Hello"]  # it came after the one that waited for memory, and so it waited too
        assert scheduler.pool.evicted == ["final", "base"]


def test_other_models_decode_while_one_loads_and_a_failed_load_is_told():
    missing = UserError("checkpoint-9", "it is damaged", "delete it")
    models = {"final": ScriptedModel(HELLO, 3), "checkpoint-9": missing}
    with scheduler_of(models) as scheduler:
        assert Asked(scheduler, "final").answers() == ["Hello there"]
        scheduler.pool.seconds = 0.5
        failing = Asked(scheduler, "checkpoint-9")
        begin = time.monotonic()
        assert Asked(scheduler, "final").answers() == ["Hello there"]
        assert time.monotonic() - begin < 0.4
        error = failing.answers()
        assert isinstance(error, ApiError)
        assert "it is damaged" in error.message
        assert scheduler.unfinished == 0


def test_stopping_ends_every_job():
    scheduler = started({"final": ScriptedModel(HELLO * 100, 3, seconds=0.005)})
    running, waiting = Asked(scheduler, "final", ROWS_TOGETHER, most=900), Asked(scheduler, "final")
    running.events.get(timeout=10)
    assert scheduler.stop(5)
    for asked in (running, waiting):
        error = asked.answers()
        assert isinstance(error, ApiError)
        assert error.status == 503
    with pytest.raises(ApiError):
        Asked(scheduler, "final")
