"""Spend: what the steps took beside what `plan` says, and what the whole run will take."""

from minisft.checking.result import Failed
from minisft.checking.steps import read_metrics
from minisft.checking.subject import Subject

MOST_OFF = 2.0  # a prediction that is off by more than this factor is none
MOST_SLOWER, SLOW = 5.0, 1.0  # times as planned; seconds: of a shorter step most is not arithmetic
_PLAN = "do not rely on `minisft plan` for this model, and report it"
_BUSY = f"see whether other programs keep the machine busy; if none does, {_PLAN}"


def memory_is_as_planned(subject: Subject) -> str:
    """Compare the peak memory of the scratch steps with the prediction for them, and the run's with the machine."""
    small, whole = subject.predictions
    measured = max(line["peak_memory_mb"] for line in read_metrics(subject.chosen_run)) * 1e6
    predicted = small.process_bytes + small.peak_memory_bytes
    needed = whole.process_bytes + whole.peak_memory_bytes
    if not 1 / MOST_OFF <= measured / predicted <= MOST_OFF:
        raise Failed(f"the steps took {_gb(measured)}, the plan says {_gb(predicted)}", _PLAN)
    if not whole.fits:
        mend = "see `minisft plan` for what fits; training.row_tokens, gradient_checkpointing, lora and ZeRO need less"
        raise Failed(f"the run needs {_gb(needed)} a process, and there are {_gb(whole.usable_bytes)}", mend)
    there = f"{_gb(needed)} planned of {_gb(whole.usable_bytes)} a process"
    return f"steps: {_gb(measured)}, planned {_gb(predicted)}; the run: {there}"


def time_is_as_planned(subject: Subject) -> str:
    """Compare the time of a scratch step with the prediction for it, and scale that of the whole run by it."""
    small, whole = subject.predictions
    later = [line["seconds"] for line in read_metrics(subject.chosen_run)[1:]]
    measured = sum(later) / len(later)
    factor = measured / small.step_seconds
    assert whole.total_seconds is not None, "its data is prepared"
    left = whole.total_seconds * factor
    if measured > MOST_SLOWER * small.step_seconds and measured > SLOW:
        raise Failed(f"a step takes {measured:.1f} s, the plan says {small.step_seconds:.1f} s", _BUSY)
    return (
        f"a step of the check: {measured:.2f} s, planned {small.step_seconds:.2f} s; the run: {whole.steps:,} steps of "
        f"about {whole.step_seconds * factor:.1f} s, {_duration(left)}, planned {_duration(whole.total_seconds)}"
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 90 else f"{hours:.1f} h"
