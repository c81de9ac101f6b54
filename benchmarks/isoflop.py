"""Kron against TopK for equal FLOPs, over F and d: `python -m benchmarks.isoflop --json FILE`.

The grid of the paper's Fig. 8 on a GPU; on a CPU a smaller one that takes about two minutes. Each
cell times the full training step. A KronSAE then gets the FLOPs [KronSAE, eq. 7] that a TopK SAE
of the same F and k spends on the token budget, so it sees more tokens; what remains is how long
either takes for them.
"""

import itertools
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.flags import command, save
from benchmarks.measure import about, alone, reason, release, rotating
from benchmarks.report import isoflop_table
from benchmarks.shapes import Shape, batches
from benchmarks.steps import CONTENDERS, best_of_ours
from kronsae.model.flops import equal_budget

M = N = 4
BUDGET_TOKENS = 125_000_000
"""The tokens that the TopK SAE sees: the paper's smallest budget. [KronSAE, App. A.1]"""


class Grid(NamedTuple):
    """What is measured: dictionary sizes F, widths d, tokens B a step."""

    dict_sizes: tuple[int, ...]
    widths: tuple[int, ...]
    tokens: int
    k: int


GRIDS = {
    "cuda": Grid((2**15, 2**16, 2**17), (1024, 2048, 4096, 8192), 8192, 50),
    "cpu": Grid((2**13, 2**14, 2**15), (256, 512), 512, 32),
    "smallest": Grid((64,), (16, 32), 64, 4),
}


def measure(shape: Shape, name: str, xs: list[Tensor], seconds: float) -> dict[str, Any]:
    """One cell: {"ms", "tokens_per_s", …}, or {"skipped": why}.

    xs: batches to rotate.  seconds: what a cell may take, once it is built and has run twice.
    """
    device = xs[0].device
    flops = shape.flops_per_token(CONTENDERS[name].encoder)
    cell = {"d": shape.d, "dict_size": shape.dict_size, "contender": name}
    release(device)
    try:
        call = rotating(CONTENDERS[name].make(shape, device), xs)
        call()
        timing = alone(call, rounds=9, warmup=1, device=device, seconds=seconds)
    except Exception as broken:  # the others still tell something
        return {**cell, "skipped": reason(broken)}
    rate = 1e3 * shape.tokens / timing.median_ms
    tokens = equal_budget(BUDGET_TOKENS, shape.flops_per_token("dense"), flops)
    return {
        **cell,
        "ms": timing.median_ms,
        "tokens_per_s": rate,
        "equal_flops_tokens": tokens,
        "equal_flops_hours": tokens / rate / 3600,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = command("isoflop", __doc__, device="auto", seconds=120.0)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--grid", choices=GRIDS, default=default)
    options = parser.parse_args(arguments)
    device, grid = options.device, GRIDS[options.grid]
    end = time.monotonic() + options.seconds
    result = {
        **about(device),
        "grid": {**grid._asdict(), "m": M, "n": N, "name": options.grid},
        "budget_tokens": BUDGET_TOKENS,
        "cells": [],
    }
    names = [*(best_of_ours(encoder, device) for encoder in ("kron", "dense")), "topk"]
    plan = list(itertools.product(grid.widths, grid.dict_sizes, names))
    xs: list[Tensor] = []
    for place, (d, size, name) in enumerate(plan):
        shape = Shape(f"F{size}-d{d}", d, size // (M * N), M, N, grid.k, grid.tokens)
        left = end - time.monotonic()
        if left > 0:
            if not xs or xs[0].shape[1] != d:
                xs = batches(shape, device, count=2)
            cell = measure(shape, name, xs, seconds=left / (len(plan) - place) / 2)
        else:
            cell = {"d": d, "dict_size": size, "contender": name, "skipped": "no time left"}
        result["cells"].append(cell)
        print(f"{shape}, {name}: {cell.get('skipped') or format(cell['ms'], '.2f') + ' ms'}")
        save(options.json, result)
    print(isoflop_table(result))


if __name__ == "__main__":
    main()
