"""Configurations of published models, which are files of the tests; each is counted once for all tests."""

import functools
from pathlib import Path

from minisft.planning.model_cost import ModelCosts, read_config

MODELS = Path(__file__).parent / "models"


@functools.cache
def model_costs(name: str) -> ModelCosts:
    return ModelCosts(read_config(MODELS / name))
