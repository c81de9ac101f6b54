"""Gradients of weights as sums over the entries of each row, and AdamW in the same kernel.

An entry is a (token, latent) pair of the sparse codes. Entries are sorted by latent, stably, so
that a latent's, and a head's, lie together: row f owns entries offsets[f] to offsets[f + 1]. Sums
run in that order. Rows with many entries are cut into segments, whose partial sums are made first
and added in order: no atomics, the same bits in every run.

MODE of the last kernels: GRADIENT writes the gradient; MEASURE only its squared norm; UPDATE makes
the AdamW step, with the gradient in registers alone.
"""

import triton
import triton.language as tl

from kronsae_kernels.triton_impl.device import (
    GRADIENT_SCALE,
    adamw,
    dot,
    if_proceeds,
    rounded,
)

GRADIENT = tl.constexpr(0)
MEASURE = tl.constexpr(1)
UPDATE = tl.constexpr(2)


@triton.jit
def _row_of_segment(segment, first_segment, rows):
    """Largest row with first_segment[row] <= segment: the one that it belongs to."""
    low = tl.full((), 0, tl.int32)
    high = low + rows
    while low + 1 < high:
        middle = (low + high) // 2
        before = tl.load(first_segment + middle) <= segment
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def _segment(offsets, first_segment, segment, rows, length):
    """(row, start, end): which entries a segment holds."""
    row = _row_of_segment(segment, first_segment, rows)
    start = tl.load(offsets + row) + (segment - tl.load(first_segment + row)) * length
    return row, start, tl.minimum(start + length, tl.load(offsets + row + 1))


@triton.jit
def _row_sum(coefficients, tokens, y, start, end, d, c, real,
             WIDTH: tl.constexpr, ENTRIES: tl.constexpr):  # fmt: skip
    """Sum of coefficient * y[token] over entries start to end, for columns c."""
    e = tl.arange(0, ENTRIES)
    total = tl.zeros([WIDTH], tl.float32)
    for at in range(start, end, ENTRIES):
        entry = at + e < end
        token = tl.load(tokens + at + e, mask=entry, other=0).to(tl.int64)
        weight = tl.load(coefficients + at + e, mask=entry, other=0.0)
        part = tl.load(
            y + token[:, None] * d + c[None, :], mask=entry[:, None] & real[None, :], other=0.0
        )
        total += tl.sum(part.to(tl.float32) * weight[:, None], 0)
    return total


@triton.jit
def _scalar_sum(coefficients, start, end, MANY: tl.constexpr):
    e = tl.arange(0, MANY)
    total = tl.zeros([MANY], tl.float32)
    for at in range(start, end, MANY):
        total += tl.load(coefficients + at + e, mask=at + e < end, other=0.0)
    return tl.sum(total)


@triton.jit
def sum_row_segments(coefficients, tokens, y, offsets, first_segment, partial, rows, length, d,
                     ENTRIES: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """partial [segments, d]: `_row_sum` of each segment. Grid (segments at most, d / WIDTH)."""
    segment = tl.program_id(0)
    if segment < tl.load(first_segment + rows):
        c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        real = c < d
        _, start, end = _segment(offsets, first_segment, segment, rows, length)
        total = _row_sum(coefficients, tokens, y, start, end, d, c, real, WIDTH, ENTRIES)
        tl.store(partial + segment.to(tl.int64) * d + c, total, mask=real)


@triton.jit
def _whole_row_sum(coefficients, tokens, y, offsets, first_segment, partial, row, d, c, real,
                   WIDTH: tl.constexpr, ENTRIES: tl.constexpr):  # fmt: skip
    """Of all entries of a row, or of its segments' partial sums."""
    first, beyond = tl.load(first_segment + row), tl.load(first_segment + row + 1)
    start, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    end = tl.where(beyond > first, start, end)
    total = _row_sum(coefficients, tokens, y, start, end, d, c, real, WIDTH, ENTRIES)
    partial += first.to(tl.int64) * d
    for _ in range(first, beyond):
        total += tl.load(partial + c, mask=real, other=0.0)
        partial += d
    return total


@triton.jit
def row_gradients(coefficients, tokens, y, offsets, first_segment, partial, out, out_bias, d,
                  HAS_BIAS: tl.constexpr, ENTRIES: tl.constexpr, WIDTH: tl.constexpr,
                  MANY: tl.constexpr):  # fmt: skip
    """out[f] = sum of coefficient * y[token], out_bias[f] = sum of coefficients, over f's entries.

    Grid (rows, d / WIDTH).
    """
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    real = c < d
    total = _whole_row_sum(
        coefficients, tokens, y, offsets, first_segment, partial, row, d, c, real, WIDTH, ENTRIES
    )
    tl.store(out + row * d + c, rounded(total, out.dtype.element_ty), mask=real)
    if HAS_BIAS:
        if tl.program_id(1) == 0:
            start, end = tl.load(offsets + row), tl.load(offsets + row + 1)
            of_bias = _scalar_sum(coefficients, start, end, MANY)
            tl.store(out_bias + row, rounded(of_bias, out_bias.dtype.element_ty))


@triton.jit
def update_rows(coefficients, along, tokens, y, offsets, first_segment, partial,
                weight, shadow, first, second, bias, bias_first, bias_second, squares,
                hyper, bias_hyper, d,
                MODE: tl.constexpr, UNIT_NORM: tl.constexpr, HAS_SHADOW: tl.constexpr,
                HAS_BIAS: tl.constexpr, ENTRIES: tl.constexpr, WIDTH: tl.constexpr,
                MANY: tl.constexpr):  # fmt: skip
    """AdamW step of weight [rows, d] (and bias [rows]), each row's gradient in registers.

    UNIT_NORM: what would only change the row's norm is taken out of its gradient (its product with
    the row is the sum of `along`), and the row is scaled to unit norm afterwards.
    shadow: weight rounded to another dtype.  squares [rows]: squared norm of the gradient.
    d <= WIDTH. Grid (rows,).
    """
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, WIDTH)
    columns = if_proceeds(d, hyper)
    real = c < columns
    at = row * d + c
    scale = tl.load(hyper + GRADIENT_SCALE)
    gradient = scale * _whole_row_sum(
        coefficients, tokens, y, offsets, first_segment, partial, row, d, c, real, WIDTH, ENTRIES
    )
    start, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    parallel = 0.0
    if UNIT_NORM:
        parallel = scale * _scalar_sum(along, start, end, MANY)
    of_bias = 0.0
    if HAS_BIAS:
        of_bias = scale * _scalar_sum(coefficients, start, end, MANY)
    w = tl.load(weight + at, mask=real, other=0.0)
    if UNIT_NORM:
        gradient -= w * parallel
    tl.store(squares + row, tl.sum(gradient * gradient) + of_bias * of_bias)
    if MODE == UPDATE:
        one = tl.load(first + at, mask=real, other=0.0)
        two = tl.load(second + at, mask=real, other=0.0)
        w, one, two = adamw(w, gradient, one, two, hyper)
        if UNIT_NORM:
            norm = tl.sqrt_rn(tl.sum(tl.where(real, w * w, 0.0)))
            w = w / tl.maximum(norm, 1.1754943508222875e-38)
        tl.store(weight + at, w, mask=real)
        tl.store(first + at, one, mask=real)
        tl.store(second + at, two, mask=real)
        if HAS_SHADOW:
            tl.store(shadow + at, rounded(w, shadow.dtype.element_ty), mask=real)
        if HAS_BIAS:
            b = tl.load(bias + row)
            one_ = tl.load(bias_first + row)
            two_ = tl.load(bias_second + row)
            b, one_, two_ = adamw(b, of_bias, one_, two_, bias_hyper)
            tl.store(bias + row, b, mask=columns > 0)
            tl.store(bias_first + row, one_, mask=columns > 0)
            tl.store(bias_second + row, two_, mask=columns > 0)


@triton.jit
def _head_sum(total, of_bias, d_base, d_extension, latents, tokens, x, head, start, end, d, c, real,
              M: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, ENTRIES: tl.constexpr,
              SPLIT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Add A x[token] over entries start to end of a head, A [m + n, entries] built in registers.

    Each entry has d_base in its base's row and d_extension in its extension's. One load of a
    token's activation serves all m + n rows. SPLIT: A as the sum of two numbers of x's dtype, so
    that coefficients keep 16 bits or more on bfloat16 matrix units.
    """
    r, e = tl.arange(0, ROWS), tl.arange(0, ENTRIES)
    for at in range(start, end, ENTRIES):
        entry = at + e < end
        latent = tl.load(latents + at + e, mask=entry, other=0) - head * (M * N)
        of_base = tl.load(d_base + at + e, mask=entry, other=0.0)
        of_extension = tl.load(d_extension + at + e, mask=entry, other=0.0)
        base = latent // N
        extension = M + latent - base * N
        a = tl.where(r[:, None] == base[None, :], of_base[None, :], 0.0)
        a += tl.where(r[:, None] == extension[None, :], of_extension[None, :], 0.0)
        of_bias += tl.sum(a, 1)
        token = tl.load(tokens + at + e, mask=entry, other=0).to(tl.int64)
        part = tl.load(
            x + token[:, None] * d + c[None, :], mask=entry[:, None] & real[None, :], other=0.0
        )
        if SPLIT:
            high = rounded(a, part.dtype)
            total = dot(high, part, total, PRECISION)
            rest = rounded(a - high.to(tl.float32), part.dtype)
            total = dot(rest, part, total, PRECISION)
        else:
            total = dot(a, part.to(tl.float32), total, PRECISION)
    return total, of_bias


@triton.jit
def sum_head_segments(d_base, d_extension, latents, tokens, x, offsets, first_segment, partial,
                      partial_bias, heads, length, d,
                      M: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr,
                      PRECISION: tl.constexpr, ENTRIES: tl.constexpr,
                      WIDTH: tl.constexpr):  # fmt: skip
    """partial [segments, m + n, d], partial_bias [segments, m + n]: `_head_sum` of each segment.

    offsets [heads + 1]: of heads. Grid (segments at most, d / WIDTH).
    """
    segment = tl.program_id(0)
    if segment < tl.load(first_segment + heads):
        r, c = tl.arange(0, ROWS), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        real = c < d
        head, start, end = _segment(offsets, first_segment, segment, heads, length)
        total = tl.zeros([ROWS, WIDTH], tl.float32)
        of_bias = tl.zeros([ROWS], tl.float32)
        total, of_bias = _head_sum(
            total, of_bias, d_base, d_extension, latents, tokens, x, head, start, end, d, c, real,
            M, N, ROWS, ENTRIES, SPLIT, PRECISION,
        )  # fmt: skip
        row = segment.to(tl.int64) * (M + N) + r
        of_row = r < M + N
        tl.store(
            partial + row[:, None] * d + c[None, :], total, mask=of_row[:, None] & real[None, :]
        )
        if tl.program_id(1) == 0:
            tl.store(partial_bias + row, of_bias, mask=of_row)


@triton.jit
def head_gradients(d_base, d_extension, latents, tokens, x, offsets, first_segment, partial,
                   partial_bias, weight, shadow, first, second, bias, bias_first, bias_second,
                   squares, hyper, bias_hyper, bias_of_row, bias_of_head, d, h,
                   M: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr,
                   PRECISION: tl.constexpr, MODE: tl.constexpr, HAS_SHADOW: tl.constexpr,
                   ENTRIES: tl.constexpr,
                   WIDTH: tl.constexpr):  # fmt: skip
    """Gradient, or AdamW step, of a Kron encoder's weight [m + n, h, d] and its bias.

    bias_of_row, bias_of_head: strides of the bias, [m + n, h] or [h, m + n].

    MODE GRADIENT: it is written to weight and bias, which hold nothing else; the other tensors
    from shadow on are not used. squares [h, d / WIDTH]: squared norm of each program's part.
    Grid (h, d / WIDTH).
    """
    head, chunk = tl.program_id(0), tl.program_id(1)
    r, c = tl.arange(0, ROWS), chunk * WIDTH + tl.arange(0, WIDTH)
    columns, rows = d, M + N
    scale = 1.0
    if MODE != GRADIENT:
        columns, rows = if_proceeds(d, hyper), if_proceeds(M + N, hyper)
        scale = tl.load(hyper + GRADIENT_SCALE)
    real = c < columns
    first_part, beyond = tl.load(first_segment + head), tl.load(first_segment + head + 1)
    start, end = tl.load(offsets + head), tl.load(offsets + head + 1)
    end = tl.where(beyond > first_part, start, end)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    of_bias = tl.zeros([ROWS], tl.float32)
    total, of_bias = _head_sum(
        total, of_bias, d_base, d_extension, latents, tokens, x, head, start, end, d, c, real,
        M, N, ROWS, ENTRIES, SPLIT, PRECISION,
    )  # fmt: skip
    of_row = r < rows
    mask = of_row[:, None] & real[None, :]
    partial += first_part.to(tl.int64) * ((M + N) * d)
    partial_bias += first_part.to(tl.int64) * (M + N)
    for _ in range(first_part, beyond):
        total += tl.load(partial + r[:, None] * d + c[None, :], mask=mask, other=0.0)
        of_bias += tl.load(partial_bias + r, mask=of_row, other=0.0)
        partial += (M + N) * d
        partial_bias += M + N
    gradient, of_bias = total * scale, of_bias * scale
    at = (r.to(tl.int64) * h + head)[:, None] * d + c[None, :]
    of_head = r * bias_of_row + head * bias_of_head
    if MODE == GRADIENT:
        tl.store(weight + at, rounded(gradient, weight.dtype.element_ty), mask=mask)
        if chunk == 0:
            tl.store(bias + of_head, rounded(of_bias, bias.dtype.element_ty), mask=of_row)
    else:
        square = tl.sum(gradient * gradient)
        square += tl.where(chunk == 0, tl.sum(of_bias * of_bias), 0.0)
        tl.store(squares + head.to(tl.int64) * tl.num_programs(1) + chunk, square)
    if MODE == UPDATE:
        w = tl.load(weight + at, mask=mask, other=0.0)
        one = tl.load(first + at, mask=mask, other=0.0)
        two = tl.load(second + at, mask=mask, other=0.0)
        w, one, two = adamw(w, gradient, one, two, hyper)
        tl.store(weight + at, w, mask=mask)
        tl.store(first + at, one, mask=mask)
        tl.store(second + at, two, mask=mask)
        if HAS_SHADOW:
            tl.store(shadow + at, rounded(w, shadow.dtype.element_ty), mask=mask)
        if chunk == 0:
            b = tl.load(bias + of_head, mask=of_row, other=0.0)
            b_one = tl.load(bias_first + of_head, mask=of_row, other=0.0)
            b_two = tl.load(bias_second + of_head, mask=of_row, other=0.0)
            b, b_one, b_two = adamw(b, of_bias, b_one, b_two, bias_hyper)
            tl.store(bias + of_head, b, mask=of_row)
            tl.store(bias_first + of_head, b_one, mask=of_row)
            tl.store(bias_second + of_head, b_two, mask=of_row)


@triton.jit
def update_vector(gradient, weight, first, second, hyper, size, WIDTH: tl.constexpr):
    """AdamW step of weight [size] from its gradient. Grid (size / WIDTH,)."""
    c = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    real = c < if_proceeds(size, hyper)
    scale = tl.load(hyper + GRADIENT_SCALE)
    w = tl.load(weight + c, mask=real, other=0.0)
    one = tl.load(first + c, mask=real, other=0.0)
    two = tl.load(second + c, mask=real, other=0.0)
    w, one, two = adamw(w, scale * tl.load(gradient + c, mask=real, other=0.0), one, two, hyper)
    tl.store(weight + c, w, mask=real)
    tl.store(first + c, one, mask=real)
    tl.store(second + c, two, mask=real)
