"""The strategies as DeepSpeed configurations."""

from typing import Any

import pytest

from minisft.training.strategies import deepspeed_config

SETTINGS: dict[str, Any] = {"precision": "bf16", "max_grad_norm": 1.0, "batch_size": 4}


def zero(strategy, offload, on_cpu=False):
    config = deepspeed_config(strategy, **SETTINGS, offload=offload, on_cpu=on_cpu)
    assert config is not None
    return config["zero_optimization"]


def test_vanilla_needs_no_deepspeed():
    assert deepspeed_config("vanilla", **SETTINGS, offload=None, on_cpu=True) is None


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_stays_on_the_gpu_and_what_goes_to_the_host(stage):
    assert zero(f"zero{stage}", None)["stage"] == stage
    assert not any("offload" in key for key in zero(f"zero{stage}", None))
    assert zero(f"zero{stage}", "optimizer")["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert "offload_param" not in zero(f"zero{stage}", "optimizer")


def test_parameters_go_with_the_optimizer_and_a_cpu_pins_nothing():
    found = zero("zero3", "parameters", on_cpu=True)
    assert found["offload_optimizer"] == found["offload_param"] == {"device": "cpu", "pin_memory": False}
