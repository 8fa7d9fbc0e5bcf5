"""The command line in one of several processes that share a GPU: `python -m tests.gpu.gloo_on_one_gpu WORDS`.

NCCL refuses two processes of one GPU ("Duplicate GPU detected"), so gloo sends the tensors, through the memory of the
host. The process joins the others as if a launcher had started it.
"""

import sys
from typing import Any

import torch

from minisft.cli import main

if __name__ == "__main__":
    plain = torch.distributed.init_process_group

    def by_gloo(backend: str | None = None, **options: Any) -> None:
        plain("gloo", **options)

    torch.distributed.init_process_group = by_gloo  # type: ignore[assignment]
    sys.exit(main(sys.argv[1:]))
