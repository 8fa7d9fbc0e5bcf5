"""The strategies as DeepSpeed configurations."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from minisft.errors import StoppedError
from minisft.training import zero
from minisft.training.zero import (
    compile_in_subprocess,
    deepspeed_config,
    set_deepspeed_environment,
    start_communication,
)

SETTINGS: dict[str, Any] = {"precision": "bf16", "max_grad_norm": 1.0, "batch_size": 4}


def zero_config(strategy, offload, on_cpu=False):
    config = deepspeed_config(strategy, **SETTINGS, offload=offload, on_cpu=on_cpu)
    assert config is not None
    return config["zero_optimization"]


def test_vanilla_needs_no_deepspeed():
    assert deepspeed_config("vanilla", **SETTINGS, offload=None, on_cpu=True) is None


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_stays_on_the_gpu_and_what_goes_to_the_host(stage):
    assert zero_config(f"zero{stage}", None)["stage"] == stage
    assert not any("offload" in key for key in zero_config(f"zero{stage}", None))
    assert zero_config(f"zero{stage}", "optimizer")["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert "offload_param" not in zero_config(f"zero{stage}", "optimizer")


def test_parameters_go_with_the_optimizer_and_a_cpu_pins_nothing():
    found = zero_config("zero3", "parameters", on_cpu=True)
    assert found["offload_optimizer"] == found["offload_param"] == {"device": "cpu", "pin_memory": False}


@pytest.mark.parametrize("stage", [2, 3])
def test_gradients_are_reduced_beside_the_backward_on_a_gpu_alone(stage):
    assert zero_config(f"zero{stage}", None)["overlap_comm"] is True
    assert zero_config(f"zero{stage}", None, on_cpu=True)["overlap_comm"] is False


@pytest.mark.parametrize(
    ("strategy", "precision", "expected"),
    [("zero1", "bf16", None), ("zero2", "bf16", "fp32"), ("zero3", "bf16", "fp32"), ("zero2", "fp16", None),
     ("zero3", "fp32", None)],
)  # fmt: skip
def test_the_rows_of_a_step_are_summed_in_fp32_where_the_sums_are_sharded(strategy, precision, expected):
    config = deepspeed_config(strategy, **(SETTINGS | {"precision": precision}), offload=None, on_cpu=False)
    assert config is not None
    assert config.get("data_types", {}).get("grad_accum_dtype") == expected


@pytest.fixture
def extensions(tmp_path, monkeypatch) -> Path:
    """The folder of compiled operations, with DeepSpeed's communication built in it."""
    monkeypatch.setenv("MINISFT_CACHE", str(tmp_path))
    for name in ("TORCH_EXTENSIONS_DIR", "DS_ACCELERATOR", "DS_LOG_LEVEL", "LOG_LEVEL"):
        monkeypatch.setenv(name, "")  # so that it is set back afterwards
        monkeypatch.delenv(name)
    set_deepspeed_environment(on_cpu=True)
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    assert tmp_path in folder.parents
    op = folder / "deepspeed_shm_comm"
    op.mkdir(parents=True)
    (op / "deepspeed_shm_comm.so").touch()
    return folder


def test_a_lock_left_by_a_killed_build_is_removed(extensions):
    left_over = extensions / "deepspeed_shm_comm" / "lock"
    left_over.touch()
    zero._compile_communication("training.strategy=zero2")
    assert not left_over.exists()


def test_nobody_takes_the_lock_of_a_process_that_is_loading(extensions, monkeypatch):
    """As torch's baton: made before an op is loaded, and removed after it."""
    lock, lost = extensions / "deepspeed_shm_comm" / "lock", []
    deepspeed = pytest.importorskip("deepspeed")
    started = threading.Barrier(3)

    def load() -> None:
        lock.touch(exist_ok=False)
        time.sleep(0.01)
        lost.append(not lock.exists())
        lock.unlink(missing_ok=True)

    def worker() -> None:
        started.wait()
        start_communication(on_cpu=True, load_op=load)

    def another_job() -> None:
        started.wait()
        for _ in range(20):
            zero._compile_communication("training.strategy=zero2")

    monkeypatch.setattr(deepspeed, "init_distributed", lambda *_, **__: None)
    threads = [threading.Thread(target=target) for target in (worker, worker, another_job)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert lost == [False, False]


def test_a_compilation_is_stopped_with_what_it_started(tmp_path):
    """The compilers have process groups of their own, as ninja gives them."""
    child, cleaned = tmp_path / "child", []
    code = (
        "import subprocess, time; from pathlib import Path; "
        f"made = subprocess.Popen(['sleep', '600'], start_new_session=True); Path({str(child)!r}).write_text(str(made.pid)); "
        "time.sleep(600)"
    )
    threading.Thread(target=stop_when, args=(child,)).start()
    begun = time.monotonic()
    with pytest.raises(StoppedError, match="SIGTERM"):
        compile_in_subprocess(lambda: cleaned.append(True), command=("-c", code))
    assert time.monotonic() - begun < 60
    assert cleaned == [True]
    assert ended(int(child.read_text()))


def ended(pid):
    """Say whether a process ends soon; it may stay a zombie where nobody waits for orphans."""
    for _ in range(200):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def stop_when(path):
    while not (path.exists() and path.read_text()):
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGTERM)


def test_the_reason_of_a_failed_compilation_is_its_last_line():
    command = ("-c", "print('c++: not today'); raise SystemExit(3)")
    assert compile_in_subprocess(lambda: None, command) == "c++: not today"
