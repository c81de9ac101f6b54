"""The largest latents of a whole batch, among candidates of each token: BatchTopK.

Candidates are codes [B, w]: each token's w largest latents, largest first.
"""

import triton
import triton.language as tl

from kronsae_kernels.triton_impl.device import compose

INFINITY = tl.constexpr(float("inf"))


@triton.jit
def code_values(base, extension, values, size, eps, ROOT: tl.constexpr,
                ENTRIES: tl.constexpr):  # fmt: skip
    """values [size] of codes with these factors. Grid (size / ENTRIES,)."""
    at = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    real = at < size
    p = tl.load(base + at, mask=real, other=0.0)
    q = tl.load(extension + at, mask=real, other=0.0)
    tl.store(values + at, compose(p * q, eps, ROOT), mask=real)


@triton.jit
def keep_first(ranked, order, indices, narrow, count, size, width, silent,
               WHOLE: tl.constexpr, ENTRIES: tl.constexpr):  # fmt: skip
    """indices [size] = -1 but for the first `count` in order; and for values that are not active.

    ranked, order [size]: the values, largest first, and where they come from. NaN stays.
    narrow: a float32 scalar, 1 if a token keeps its last candidate, so that more of its latents may
    be among the first (not WHOLE: there are more). Numbers that are not finite say nothing about
    that, and no step is made with them. Grid (size / ENTRIES,).
    """
    rank = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    real = rank < size
    value = tl.load(ranked + rank, mask=real, other=0.0)
    code = tl.load(order + rank, mask=real, other=0)
    active = value > silent
    kept = (rank < count) & (active | (value != value))
    tl.store(indices + code, tl.zeros([ENTRIES], tl.int64) - 1, mask=real & (kept == 0))
    if not WHOLE:
        more = real & kept & active & (value < INFINITY) & (code.to(tl.int32) % width == width - 1)
        tl.store(narrow + code * 0, tl.zeros([ENTRIES], tl.float32) + 1.0, mask=more)
