"""MiniSFT: supervised fine-tuning with exact tokens, exact loss and every checkpoint scored."""

__version__ = "0.1.0"
