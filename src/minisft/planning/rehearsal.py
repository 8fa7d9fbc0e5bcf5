"""How fast this machine's CPU trains layers of the model that is planned: two of them, with random weights."""

import time
from dataclasses import replace
from typing import Any

import torch

from minisft.models import lay_out_model
from minisft.planning.counting import count_footprint, shortened
from minisft.planning.machines import Machine
from minisft.training.attention import PADDING_FREE, register

_LAYERS = 2
_LENGTHS = (128, 128, 128)  # tokens of a row's conversations
_ROUNDS = 5
_MOST_PARAMETERS = 1e8  # more take too long, and their products are so large that little else counts
# A step is slower than its layers by the output layer, whose gradient is as large as the vocabulary; in half precision
# that is summed in fp32, into memory that is new for every row.
_UTILISATION = {"fp32": 0.95, "bf16": 0.65}


def with_rate_of_layers(machine: Machine, config: Any, precision: str, processes: int) -> Machine:
    """Return a measured CPU with the rate at which it trains layers of a model, in place of its products'.

    What stands between the products (casts, norms, attention, the adding of gradients) takes a share that depends on
    the processor and on the size of the layers: of the rate of a large product, a 135M model's layers reached 0.55 in
    fp32 and 0.13 in bf16 on a processor with AMX, and a whole step 0.73 in fp32 on one with AVX2.

    Args:
        machine: for each of `processes`. It is returned as it is where the model has larger layers than can be tried
            in a second, or is none that trains without padding.
        config: the model's.
        precision: fp32 or bf16.
        processes: that share the machine.
    """
    try:
        rate = _rate_of_layers(config, precision)
    except Exception:  # anything that a model's code raises; training or `check` says what it is
        return machine
    if rate is None:
        return machine
    return replace(
        machine, flops={precision: rate / processes}, utilisation=_UTILISATION[precision],
        source=f"{rate / 1e9:.0f} GFLOP/s measured on layers of this model, on {machine.per_node} cores",
    )  # fmt: skip


def _rate_of_layers(config: Any, precision: str) -> float | None:
    """Return operations a second, as `Footprint` counts them, of forward and backward; None: the layers are large."""
    config = _small(config)
    half = precision != "fp32"
    footprint = count_footprint(config, "autocast" if half else "fp32")
    if footprint.parameters > _MOST_PARAMETERS:
        return None
    tokens, squares = sum(_LENGTHS), float(sum(length**2 for length in _LENGTHS))
    operations = tokens * footprint.step_flops(checkpointing=False) + footprint.attention_flops(squares, False)
    return operations / _seconds(_model(config), half)


def _small(config: Any) -> Any:
    """Return the configuration with two layers and hardly a vocabulary: the output layer is not part of this."""
    config = shortened(config, _LAYERS)
    text = config.get_text_config()
    text.vocab_size = 128
    text.pad_token_id = None
    return config


def _model(config: Any) -> torch.nn.Module:
    register()
    with torch.random.fork_rng():
        model = lay_out_model(config, attn_implementation=PADDING_FREE, dtype=torch.float32)
    return model.base_model.train()  # type: ignore[no-any-return]


def _seconds(body: torch.nn.Module, half: bool) -> float:
    """Return the shortest time of a row, forward and backward; the first one makes gradients and kernels."""
    ids = torch.zeros((1, sum(_LENGTHS)), dtype=torch.long)
    positions = torch.cat([torch.arange(length) for length in _LENGTHS])[None]
    seconds = []
    for _ in range(_ROUNDS + 1):
        begun = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            given = body(input_ids=ids, position_ids=positions, conversation_lengths=_LENGTHS, use_cache=False)
        given.last_hidden_state.sum().backward()
        seconds.append(time.perf_counter() - begun)
    return min(seconds[1:])
