"""Models that do not fit one GPU, and how many rows fit into memory."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from minisft.errors import UserError
from minisft.evaluation.backends import TransformersModel, place_model
from minisft.evaluation.batch_memory import CacheSize, LayerSize, cache_budget
from minisft.evaluation.generation import Sampling
from minisft.evaluation.placement import (
    Placement,
    count_weights,
    device_map_options,
    gpus_for,
    load_for_inference,
    place_copies,
)
from minisft.models import load_model
from minisft.recipe import EvaluationRecipe

GB = 10**9
H100 = 80 * GB


def test_weights_are_counted_from_the_headers_of_files(tiny_model):
    model = load_model(Path(tiny_model), dtype=torch.float32)
    assert count_weights(Path(tiny_model)) == sum(weight.numel() for weight in model.parameters())


def test_a_model_gets_as_many_gpus_as_its_weights_need():
    assert gpus_for(16 * GB, [H100] * 8) == 1
    assert gpus_for(100 * GB, [H100] * 8) == 2
    assert gpus_for(141 * GB, [H100] * 8) == 4  # 70B in bf16: two GPUs would have no memory left for keys and values
    assert gpus_for(810 * GB, [H100] * 8) == 8
    assert gpus_for(141 * GB, [H100] * 3) == 3


def test_copies_fill_the_gpus_of_the_machine():
    assert place_copies(16 * GB, [H100] * 8) == Placement(8, 1)
    assert place_copies(141 * GB, [H100] * 8) == Placement(2, 4)
    assert place_copies(141 * GB, [H100]) == Placement(1, 1)  # the rest stays in the memory of the host
    assert place_copies(16 * GB, [H100] * 8, gpus_each=2) == Placement(4, 2)
    assert place_copies(16 * GB, [H100] * 2, processes=4) == Placement(4, 1)
    assert place_copies(16 * GB, []) == Placement(1, 1)
    assert place_copies(16 * GB, [], processes=3) == Placement(3, 1)


def test_more_copies_than_the_gpus_hold_are_refused():
    with pytest.raises(
        UserError, match="evaluation.processes: 8 copies of a model with 141.0 GB of weights need 32 GPU"
    ):
        place_copies(141 * GB, [H100] * 8, processes=8)
    with pytest.raises(UserError, match="evaluation.tensor_parallel_size: it asks for 4 GPUs, and this machine has 2"):
        place_copies(16 * GB, [H100] * 2, gpus_each=4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_on_a_cpu_one_process_evaluates_with_all_cores(tiny_model):
    assert place_model(Path(tiny_model), torch.float32, EvaluationRecipe()) == Placement(1, 1)


def test_only_a_model_that_does_not_fit_the_first_gpu_is_divided():
    assert device_map_options(60 * GB, [H100, H100], host=0) is None
    options = device_map_options(100 * GB, [H100, H100], host=10 * GB)
    assert options is not None
    assert options["device_map"] == "auto"
    assert options["max_memory"] == {0: 64 * GB, 1: 64 * GB, "cpu": 8 * GB}
    with pytest.raises(UserError, match="its weights need 200.0 GB; 2 GPUs have 160.0 GB free, and the host 10.0 GB"):
        device_map_options(200 * GB, [H100, H100], host=10 * GB)


@pytest.fixture(scope="module")
def divided(tiny_model, tmp_path_factory):
    """Load the tiny model with its second layer on another device than the first: accelerate's "disk"."""
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    folder = str(tmp_path_factory.mktemp("offloaded"))
    load: Any = partial(load_model, device_map={**places, "model.layers.1": "disk"}, offload_folder=folder)
    return TransformersModel(Path(tiny_model), torch.float32, False, load=load)


def test_a_divided_model_gives_the_answers_and_losses_of_the_undivided_one(tiny_model, divided):
    whole = TransformersModel(Path(tiny_model), torch.float32, False)
    assert {str(weight.device) for weight in divided.model.parameters()} == {"cpu", "meta"}
    prompts = [[5, 6, 7, 8], list(range(30, 60)), [9, 10, 11, 12, 13, 14], [40, 41]]
    settings: Any = {"stop_token_ids": (1, 40), "max_new_tokens": 12, "sampling": Sampling(1.5, 0.9, 7)}
    expected = whole.answer(prompts, **settings)
    assert len({tuple(answer.ids) for answer in expected}) == 4
    assert divided.answer(prompts, **settings) == expected
    rows = [(list(range(3, 40)), [-100] * 10 + list(range(13, 40))), ([7, 8, 9], [-100, 8, 9])]
    assert divided.sum_of_losses(rows) == whole.sum_of_losses(rows)


def test_the_cache_of_a_model_is_measured_whatever_its_architecture():
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    mamba = {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
    measured = {
        config.model_type: CacheSize.measure(AutoModelForCausalLM.from_config(config).eval())
        for config in (
            AutoConfig.for_model("llama", **sizes, **heads),
            AutoConfig.for_model("gemma2", **sizes, **heads, sliding_window=16),
            AutoConfig.for_model("falcon_h1", **sizes, **heads, **mamba, pad_token_id=0),
        )
    }
    position = 2 * 2 * 8 * 4  # keys and values of two heads of size 8, in fp32
    cpu = torch.device("cpu")
    assert measured["llama"].row_bytes(100) == {cpu: 2 * 100 * position}
    windowed = measured["gemma2"].row_bytes(100)[cpu]
    assert windowed == (100 + 16) * position
    hybrid = measured["falcon_h1"]
    assert hybrid.row_bytes(100)[cpu] - hybrid.row_bytes(50)[cpu] == 2 * 50 * position
    assert all(layer.state_bytes > 0 for layer in hybrid.layers)


def test_as_many_rows_are_decoded_together_as_the_fullest_device_holds():
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    size = CacheSize((LayerSize(first, 10, 0, None), LayerSize(second, 10, 5, None), LayerSize(second, 10, 0, 50)))
    assert size.row_bytes(100) == {first: 1000, second: 1505}
    assert size.most_rows(100, {first: 9999, second: 4600}) == 3
    assert size.most_rows(100, {first: 2999, second: 9999}) == 2
    assert size.most_rows(100, {first: 10, second: 10}) == 1


def test_the_budget_of_a_process_is_its_share_of_free_memory():
    size = CacheSize((LayerSize(torch.device("cpu"), 10, 0, None),))
    [whole], [half] = cache_budget(size).values(), cache_budget(size, 0.5).values()
    assert 0 < half < whole


def test_little_memory_makes_smaller_batches_and_the_same_answers(tiny_model):
    prompts = [[5, 6, 7, number] for number in range(10, 22)]
    settings: Any = {"stop_token_ids": (1,), "max_new_tokens": 6, "sampling": Sampling(1.5, 0.9, 7)}
    expected = TransformersModel(Path(tiny_model), torch.float32, False).answer(prompts, **settings)
    small = TransformersModel(Path(tiny_model), torch.float32, False, memory_share=1e-12)
    assert small._rows(10) == 1
    assert small.answer(prompts, **settings) == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_model_for_inference_is_on_the_cpu_without_a_gpu(tiny_model):
    model = load_for_inference(Path(tiny_model), dtype=torch.float32, trust_remote_code=False)
    assert (model.device.type, model.training) == ("cpu", False)
