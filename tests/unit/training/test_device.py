"""What a CPU's process does with memory, and attention in half precision there."""

import os

import pytest
import torch

from minisft.errors import UserError
from minisft.training.attention import Shape, per_conversation_attention
from minisft.training.device import (
    describe_environment,
    explain_missing_kernels,
    keep_threads,
    keeps_freed_memory,
    prepare_cpu_memory,
    use_deterministic_kernels,
    use_expandable_segments,
)

CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


@pytest.fixture
def prepare(monkeypatch):
    """Prepare memory without telling this process's allocator; returns whether it would have been told."""
    for name in CACHES:
        monkeypatch.setenv(name, "")  # so that it is set back afterwards
        monkeypatch.delenv(name)

    def prepared(strategy, precision, cpu=True):
        told = []
        prepare_cpu_memory(strategy, precision, cpu, keep_freed_memory=lambda: told.append(True))
        return bool(told)

    return prepared


@pytest.mark.parametrize(
    ("strategy", "precision", "keeps", "capacity"),
    [("vanilla", "fp32", True, None), ("vanilla", "bf16", False, "64"), ("zero2", "fp32", False, None),
     ("zero3", "bf16", False, "64")],
)  # fmt: skip
def test_memory_is_kept_where_it_is_used_again(prepare, strategy, precision, keeps, capacity):
    assert prepare(strategy, precision) == keeps == keeps_freed_memory(strategy, half=precision != "fp32")
    assert [os.environ.get(name) for name in CACHES] == [capacity, capacity]


def test_a_users_own_number_of_kernels_stays(prepare, monkeypatch):
    monkeypatch.setenv(CACHES[1], "7")
    prepare("vanilla", "bf16")
    assert [os.environ[name] for name in CACHES] == ["64", "7"]


@pytest.fixture
def threads(monkeypatch):
    """Let this process compute with one thread, and set its number back afterwards."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(1)
    yield torch.get_num_threads
    torch.set_num_threads(before)


def test_a_resumed_run_keeps_its_number_of_threads(threads):
    keep_threads(2)
    assert threads() == 2 == describe_environment("fp32")["threads"]


def test_a_run_without_a_record_leaves_the_threads_alone(threads):
    keep_threads(None)
    assert threads() == 1


def test_a_users_other_number_of_threads_is_refused(threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(UserError, match="trained with 2 threads a process, and would go on with 1") as refused:
        keep_threads(2)
    assert refused.value.fix == "set it to 2"
    assert threads() == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpus_process_is_left_alone(prepare, precision):
    assert not prepare("vanilla", precision, cpu=False)
    assert not {*CACHES} & {*os.environ}


@pytest.fixture
def allocator(monkeypatch):
    """The names of the allocator's settings, neither of which is set."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return names


@pytest.mark.parametrize(("version", "name"), [("2.13.0", 0), ("2.8.0", 1)])
def test_blocks_of_a_gpus_memory_grow(allocator, monkeypatch, version, name):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    use_expandable_segments(cpu=False)
    assert {one: os.environ.get(one) for one in allocator} == {
        allocator[name]: "expandable_segments:True", allocator[1 - name]: None
    }  # fmt: skip


@pytest.mark.parametrize("name", [0, 1])
def test_a_users_own_settings_of_the_allocator_stay(allocator, monkeypatch, name):
    monkeypatch.setenv(allocator[name], "max_split_size_mb:64")
    use_expandable_segments(cpu=False)
    assert os.environ[allocator[name]] == "max_split_size_mb:64"
    assert allocator[1 - name] not in os.environ


def test_a_cpus_process_has_no_settings_of_a_gpu(allocator):
    use_expandable_segments(cpu=True)
    assert not {*allocator} & {*os.environ}


@pytest.mark.parametrize("autocast", [False, True])
def test_attention_in_half_precision_is_computed_in_fp32(autocast):
    """Autocast would round queries and keys that rotary positions have made fp32, and DeepSpeed's model is in half."""
    torch.manual_seed(0)
    lengths, shape = (5, 7), Shape(4, 2, 16, torch.bfloat16, torch.device("cpu"), None, None)
    rows = [torch.randn(12, heads, 16).bfloat16() for heads in (4, 2, 2)]
    given = [rows[0].float(), rows[1].float(), rows[2]] if autocast else rows
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = per_conversation_attention(given[0], given[1], given[2], lengths, shape)
    exact = per_conversation_attention(rows[0].float(), rows[1].float(), rows[2].float(), lengths, shape)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, exact.bfloat16(), rtol=0, atol=0)


def test_an_operation_without_a_deterministic_kernel_is_named(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # a value that the user set stays
    use_deterministic_kernels(True)
    try:
        named = r"training\.deterministic: torch has no deterministic kernel of put_"
        with pytest.raises(UserError, match=named), explain_missing_kernels():
            torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    finally:
        use_deterministic_kernels(False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_another_error_stays_as_it_is():
    with pytest.raises(RuntimeError, match="another"), explain_missing_kernels():
        raise RuntimeError("another")
