"""The least work of a training step, stage by stage, and the rates of the machine.

A floor is the time of the scarcest resource at its measured rate: multiply-adds, bytes of memory,
bytes gathered through the cache. Stages follow one another, so a step's floor is their sum.
"""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks.shapes import Shape

ENCODE_GOAL, STEP_GOAL = 1.15, 1.25
"""On a GPU, at GOAL_SHAPES: encode and selection take at most so many times the bare product, and a
step at most so many times its floor."""
SPARSIFY_GOAL, DENSE_GOAL = 3.0, 4.5
"""There a step is at least so many times as fast as eai-sparsify's, and as that of a dense TopK SAE
in plain PyTorch."""


class Work(NamedTuple):
    """The work that a stage cannot do without."""

    multiply_adds: int = 0
    moved_bytes: int = 0
    """Bytes that memory has to deliver or take."""
    gathered_bytes: int = 0
    """Bytes gathered by index: rows that come again and again, from the cache at best."""


class Ceilings(NamedTuple):
    """Rates measured on the device at hand; see `measure_ceilings`."""

    multiply_adds_per_s: float
    bytes_per_s: float
    cached_bytes_per_s: float

    def floor_ms(self, work: Work) -> float:
        """Milliseconds that the work takes at least."""
        return 1e3 * max(
            work.multiply_adds / self.multiply_adds_per_s,
            work.moved_bytes / self.bytes_per_s,
            work.gathered_bytes / self.cached_bytes_per_s,
        )


ASSUMED = {
    "H200": Ceilings(395e12, 4.3e12, 5.5e12),
    "H100": Ceilings(395e12, 3.0e12, 5.5e12),
    "A100": Ceilings(125e12, 1.75e12, 3.5e12),
    "B200": Ceilings(900e12, 7.0e12, 9.0e12),
}
"""Rates by a word of the card's name, as `benchmarks.predict` assumes (H100: less memory rate)."""


def assumed_ceilings(device: torch.device) -> Ceilings | None:
    """The fixed rates of this card, beside which measured ones are read; None if unknown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((rates for word, rates in ASSUMED.items() if word in name), None)


def compute_bytes(device: torch.device) -> int:
    """Bytes of a number in matrix products: bfloat16 on a GPU, float32 elsewhere."""
    return 2 if device.type == "cuda" else 4


def stages(shape: Shape, encoder: str, width: int, moment: int = 4) -> dict[str, Work]:
    """The stages of a step that writes neither [B, F] nor gradients. `width`: `compute_bytes`.

    A weight is read and written with its two moments, of `moment` bytes each (24 bytes in all for
    4), and its copy in compute precision is written where there is one. Of the decoder, the rows
    that B k uniform draws hit are read.
    """
    tokens, d, k, size = shape.tokens, shape.d, shape.k, shape.dict_size
    rows = shape.rows(encoder)
    batch, gathered = width * tokens * d, width * tokens * k * d
    pre_latents = width * tokens * rows
    hit = round(-size * math.expm1(-tokens * k / size))
    codes = 12 * tokens * k  # float32 value, int64 index
    update = 8 + 4 * moment + (width if width < 4 else 0)
    # A Kron latent sends gradient to a base and an extension row, a dense one to its own.
    rows_a_latent = 2 if encoder == "kron" else 1
    return {
        "encode": Work(tokens * d * rows, batch + width * rows * d + pre_latents),
        "select": Work(moved_bytes=pre_latents + codes),
        "decode": Work(2 * tokens * k * d, width * hit * d + 2 * batch + codes, gathered),
        "group": Work(moved_bytes=2 * codes),
        "decoder update": Work(tokens * k * d, update * size * d + batch + codes, gathered),
        "encoder update": Work(
            rows_a_latent * tokens * k * d, update * rows * d + batch + codes, gathered
        ),
    }


def step_floor_ms(shape: Shape, encoder: str, ceilings: Ceilings, device: torch.device) -> float:
    works = stages(shape, encoder, compute_bytes(device)).values()
    return sum(ceilings.floor_ms(work) for work in works)


def measure_ceilings(device: torch.device, rounds: int = 5) -> Ceilings:
    """Best of some rounds: a square product, a copy beyond the cache, reads or copies within it.

    A copy reads and writes each byte. bfloat16 on a GPU, float32 on a CPU. Within a GPU's cache one
    kernel reads 16 MiB over and over: a copy of so little would mostly be its launch.
    """
    gpu = device.type == "cuda"
    side = 8192 if gpu else 1536
    dtype = torch.bfloat16 if gpu else torch.float32
    a, b, out = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))
    product = _best_seconds(lambda: torch.mm(a, b, out=out), device, rounds)
    large, small = (2**30, 2**24) if gpu else (2**27, 2**18)
    source = torch.zeros(large, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    copy = _best_seconds(lambda: target.copy_(source), device, rounds)
    near, repeats = source[:small], 64

    def copies() -> None:
        for _ in range(repeats):
            target[:small].copy_(near)

    if gpu:
        from benchmarks.cached_reads import read_again

        seconds = _best_seconds(lambda: read_again(near, repeats), device, rounds)
        moved = small * repeats
    else:
        seconds, moved = _best_seconds(copies, device, rounds), 2 * small * repeats
    return Ceilings(side**3 / product, 2 * large / copy, moved / seconds)


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph: kernels follow one another without the launching process."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _best_seconds(call: Callable[[], object], device: torch.device, rounds: int) -> float:
    def once() -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    return min(once() for _ in range(rounds))
