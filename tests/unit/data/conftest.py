import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.unit.data.toys import bpe_tokenizer, sentencepiece_tokenizer

settings.register_profile("data", deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
settings.load_profile("data")


@pytest.fixture(scope="session")
def chat_bpe():
    """A byte-level BPE with the ChatML markers as special tokens, and no BOS."""
    return bpe_tokenizer(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), eos="<|im_end|>")


@pytest.fixture(scope="session")
def plain_bpe():
    """A byte-level BPE that knows no markers at all, as GPT-NeoX's."""
    return bpe_tokenizer(("<|endoftext|>",), eos="<|endoftext|>")


@pytest.fixture(scope="session")
def llama_like():
    """A SentencePiece-like tokenizer: a space before a text that starts, and a BOS of its own."""
    return sentencepiece_tokenizer()


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of larger data sets, where MINISFT_TEST_DATA names one."""
    folder = os.environ.get("MINISFT_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("MINISFT_TEST_DATA does not name the folder of test data sets")
    return Path(folder)
