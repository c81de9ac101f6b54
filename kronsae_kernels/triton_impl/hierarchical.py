"""Errors of the reconstructions from a token's first codes, and their gradients by the codes.

Prefix g of G holds a token's first codes, one of more codes than the last. What a code gets is the
sum of the errors of all prefixes that hold it: of all codes between two ends the same.

`weights` and `columns` are [tokens, k], `table` [F, d]. Sums are float32, in a fixed order.
"""

import triton
import triton.language as tl

from kronsae_kernels.triton_impl.device import rounded


@triton.jit
def _row_of(columns, at, table, c, d):
    """A code's row, float32; 0 where its column is -1."""
    column = tl.load(columns + at).to(tl.int64)
    columns_of_row = tl.where(column >= 0, d, 0)
    row = tl.load(table + column * d + c, mask=c < columns_of_row, other=0.0)
    return row.to(tl.float32)


@triton.jit
def hierarchical_errors(weights, columns, ends, table, bias, x, suffixes, d_values, sums, tokens, k,
                        d, prefixes, WIDTH: tl.constexpr):  # fmt: skip
    """Errors of all prefixes, of which only sums are written; each code's product with its sum.

    A program holds whole rows. It adds up the k rows of its token, and then takes them off again
    from the last one on, when they are in the cache: so no number of prefixes is too large.

    ends [k] int32: 1 for the last code of a prefix.  suffixes [tokens, G, d]: [b, g] the sum of the
    errors of prefixes g to G - 1.  d_values [tokens, k] = that of the code's prefix . its row.
    sums [3, tokens]: as of `nested_errors`. WIDTH >= d. Grid (tokens,).
    """
    token = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, WIDTH)
    real = c < d
    error = -tl.load(x + token * d + c, mask=real, other=0.0).to(tl.float32)
    if bias is not None:
        error += tl.load(bias + c, mask=real, other=0.0).to(tl.float32)
    squares = tl.zeros([WIDTH], tl.float32)
    at = token * k
    for slot in range(0, k):
        error += _row_of(columns, at + slot, table, c, d) * tl.load(weights + at + slot)
        squares += tl.where(tl.load(ends + slot) != 0, error * error, 0.0)
    tl.store(sums + token, tl.sum(squares))
    tl.store(sums + 2 * tokens + token, tl.sum(error * error))
    into = suffixes + (token + 1) * prefixes * d + c
    suffix = tl.zeros([WIDTH], tl.float32)
    for step in range(0, k):
        slot = k - 1 - step
        if tl.load(ends + slot) != 0:
            suffix += error
            into -= d
            tl.store(into, rounded(suffix, suffixes.dtype.element_ty), mask=real)
        row = _row_of(columns, at + slot, table, c, d)
        tl.store(d_values + at + slot, tl.sum(row * suffix))
        error -= row * tl.load(weights + at + slot)
