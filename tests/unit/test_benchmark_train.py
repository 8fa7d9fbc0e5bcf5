"""The arithmetic of benchmarks/train.py, and what it does with a peer that fails."""

import importlib
import sys
from argparse import Namespace
from pathlib import Path

import pytest

WRITES = "import json, sys; o = json.loads(sys.argv[1]); open(o['result'], 'w').write(json.dumps(o['measured']))"


@pytest.fixture
def train(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("train")


@pytest.mark.parametrize(
    ("steps", "dealt", "optimum"),
    [
        ([[5, 3, 2], [4, 4]], 1.0, 1.0),
        ([[6, 2], [4, 4]], (6 + 4) * 2 / 16, (6 + 4) * 2 / 16),
        ([[3, 3, 2, 2, 2]], 7 * 2 / 12, 1.0),  # longest first to the least loaded: 3 + 2 + 2
    ],
)
def test_imbalance_is_weighted_by_tokens(train, steps, dealt, optimum):
    assert train.imbalance(steps, train.least_load) == optimum
    assert optimum <= train.imbalance(steps, train.dealt_load) <= dealt


def test_shares_in_order_have_as_many_conversations(train):
    assert train.imbalance([[5, 3, 2], [4, 4]], train.load_in_order) == (8 + 4) * 2 / 18


def test_two_processes_share_the_batch_and_the_cores_that_one_has(train, tmp_path):
    arguments = Namespace(row_tokens=[], overhead=True, balance=True, threads=2)
    work = train.Work(tmp_path, tmp_path, tmp_path, tmp_path, tmp_path, tokens=1, supervised=1)
    options = {one.name: one.options for one in train.ours(arguments, work)}
    alone, shared = (train.OURS, train.INSIDE), (train.TWO, train.IN_ORDER)
    assert {options[name]["batch_size"] for name in alone} == {8}
    assert {options[name]["batch_size"] for name in shared} == {4}
    assert [options[name].get("threads") for name in (train.OURS, train.TWO)] == [None, 1]


def test_medians_and_shares_are_those_of_all_rounds(train):
    sizes = {"tokens": 100, "steps": 3, "body_parameters": 10, "head_parameters": 5}
    ours = [{"seconds": seconds, "peak_mb": 50.0, **sizes} for seconds in (2.0, 4.0, 5.0)]
    products = [{"flops": flops} for flops in (6000.0, 3000.0, 6000.0)]
    timed = [one | {"inside_seconds": one["seconds"] * 0.75} for one in ours]
    found = train.summarise_scores({train.PRODUCT: products, train.OURS: ours, train.INSIDE: timed}, 40, 100)
    assert found["medians"][train.OURS] == {
        "rate": 10.0, "lowest": 8.0, "highest": 20.0, "peak_mb": 50.0, "tokens": 100, "steps": 3
    }  # fmt: skip
    operations = 6 * (10 * 100 + 5 * 40)
    assert found["share_of_product"][train.OURS] == operations / 2.0 / 6000  # that of rounds 1 and 2; round 3: less
    assert found["outside"] == 0.25


def test_a_peer_that_fails_is_named_and_the_others_continue(train, tmp_path):
    (tmp_path / "matrix_product.py").write_text("import sys; open(sys.argv[1], 'w').write('{\"flops\": 1}')")
    python = (sys.executable, "-c")
    sizes = {"seconds": 1.0, "peak_mb": 2.0, "tokens": 4, "steps": 1}
    found = [
        train.Contender("first", (*python, "raise OSError('no wheel for you')"), {}),
        train.Contender("silent", (*python, "pass"), {}),
        train.Contender("last", (*python, WRITES), {"measured": sizes}),
    ]
    left_out: dict[str, str] = {}
    rounds = train.measure_rounds(found, left_out, Namespace(rounds=2, threads=1), tmp_path, scripts=tmp_path)
    assert left_out["first"] == "OSError: no wheel for you"
    assert "result" in left_out["silent"]
    assert rounds == {train.PRODUCT: [{"flops": 1}] * 2, "last": [sizes] * 2}


def test_the_operations_of_the_gpu_benchmark(train):
    """6 for each weight of a Llama-3.2-1B and token; what LoRA leaves frozen, 4; the head for supervised tokens alone.

    Attention has 12 for each unit of width, layer and earlier token (Chowdhery et al. 2022, appendix B), half of them
    masked.
    """
    gpu = importlib.import_module("gpu")
    body, head = 973_078_528, 2048 * 128256
    cost, adapted = (gpu.case_cost(gpu.Case("1B", tuning, "long"), gpu.FULL) for tuning in ("full", "LoRA"))

    def a_second(cost, tokens=0, supervised=0, squares=0):
        rates = {"tokens_per_second": tokens, "supervised_per_second": supervised, "squares_per_second": squares}
        return gpu.operations_a_second(cost, rates)

    assert a_second(cost, tokens=10) == pytest.approx(6 * body * 10, rel=0.001)
    assert a_second(cost, supervised=7) == 6 * head * 7
    assert a_second(cost, squares=100**2) == pytest.approx(12 * 100**2 / 2 * 2048 * 16)
    assert 4 * body * 10 < a_second(adapted, tokens=10) < 4.2 * body * 10


def test_the_first_steps_of_the_gpu_benchmark_do_not_count(train):
    gpu = importlib.import_module("gpu")
    result = {"stamps": [50.0, 60.0, 61.0, 62.0], "peak_mb": 2000.0}
    found = gpu.summarise([{"result": result, "tokens": 400, "supervised": 100, "squares": 4000}], warm_up=2)
    assert found == {
        "tokens_per_second": 100.0, "supervised_per_second": 25.0, "squares_per_second": 1000.0, "peak_gb": 2.0,
        "steps": 4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NTN", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "matrix products"),
        ("void flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits", "attention"),
        ("_rms_norm_backward_kernel", "Triton"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add", "element by element"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel", "optimizer"),
        ("Memcpy HtoD (Pinned -> Device)", "copies and zeros"),
    ],
)
def test_the_kind_of_a_kernel(train, monkeypatch, kernel, kind):
    monkeypatch.syspath_prepend(str(Path(train.__file__).parent / "contenders"))
    assert importlib.import_module("profiling").kind_of(kernel) == kind
