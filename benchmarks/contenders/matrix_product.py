"""Measure what a large fp32 matrix product reaches: python matrix_product.py RESULT."""

import json
import statistics
import sys
import time
from pathlib import Path

import torch

SIZE, WARM_UP, TIMED = 2048, 2, 7


def main() -> None:
    left, right = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)
    product = torch.empty(SIZE, SIZE)
    seconds = []
    for _ in range(WARM_UP + TIMED):
        started = time.perf_counter()
        torch.mm(left, right, out=product)
        seconds.append(time.perf_counter() - started)
    Path(sys.argv[1]).write_text(json.dumps({"flops": 2 * SIZE**3 / statistics.median(seconds[WARM_UP:])}))


if __name__ == "__main__":
    main()
