"""Sums of gathered rows: the decoder, its gradient by the codes, and both at once for training.

`coefficients` and `columns` are [tokens, r], `table` [N, d]; a program works on one token. Sums are
float32, in a fixed order. Addresses in the table are int64.
"""

import triton
import triton.language as tl

from kronsae_kernels.triton_impl.device import compose, number, rounded, slope


@triton.jit
def combine(coefficients, columns, table, bias, out, r, d,
            ROWS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """out[b] = sum_s coefficients[b, s] table[columns[b, s]] + bias. Grid (tokens, d / WIDTH).

    Columns of -1 take no part. Sums over rows are elementwise until the end.
    """
    token = tl.program_id(0).to(tl.int64)
    s, c = tl.arange(0, ROWS), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    real = c < d
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in tl.range(0, r, ROWS, num_stages=STAGES):
        entry = start + s < r
        at = token * r + start + s
        row = tl.load(columns + at, mask=entry, other=-1).to(tl.int64)[:, None]
        weight = tl.load(coefficients + at, mask=entry, other=0.0).to(tl.float32)
        part = tl.load(table + row * d + c[None, :], mask=(row >= 0) & real[None, :], other=0.0)
        total += part.to(tl.float32) * weight[:, None]
    result = tl.sum(total, 0)
    if bias is not None:
        result += tl.load(bias + c, mask=real, other=0.0).to(tl.float32)
    tl.store(out + token * d + c, rounded(result, out.dtype.element_ty), mask=real)


@triton.jit
def pair_dots(y, columns, table, out, r, d,
              ROWS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """out[b, s] = y[b] . table[columns[b, s]], 0 for a column of -1. Grid (tokens, r / ROWS)."""
    token = tl.program_id(0).to(tl.int64)
    s, c = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    entry = s < r
    row = tl.load(columns + token * r + s, mask=entry, other=-1).to(tl.int64)[:, None]
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in tl.range(0, d, WIDTH, num_stages=STAGES):
        real = c < d - start
        of_token = tl.load(y + token * d + start + c, mask=real, other=0.0).to(tl.float32)
        part = tl.load(
            table + row * d + start + c[None, :], mask=(row >= 0) & real[None, :], other=0.0
        )
        total += part.to(tl.float32) * of_token[None, :]
    tl.store(out + token * r + s, rounded(tl.sum(total, 1), out.dtype.element_ty), mask=entry)


@triton.jit
def _slopes(d_value, p, q, eps, ROOT: tl.constexpr, SIGNED: tl.constexpr, DENSE: tl.constexpr):
    """Derivatives by both pre-latents, from that by a value."""
    if DENSE:
        d_p = d_value if SIGNED else tl.where(p > 0.0, d_value, 0.0)
        d_q = d_p
    else:
        product = p * q
        d_product = d_value * slope(product, compose(product, eps, ROOT), ROOT)
        d_p, d_q = d_product * q, d_product * p
        if not SIGNED:
            d_p = tl.where(p > 0.0, d_p, 0.0)
            d_q = tl.where(q > 0.0, d_q, 0.0)
    return d_p, d_q


@triton.jit
def _codes(columns, base, extension, at, real, eps, ROOT: tl.constexpr, DENSE: tl.constexpr):
    """(row, value, p, q) of codes; where there is none, the row is -1 and the rest 0."""
    row = tl.load(columns + at, mask=real, other=-1)
    there = row >= 0
    p = tl.load(base + at, mask=there, other=0.0)
    q = p
    value = p
    if not DENSE:
        q = tl.load(extension + at, mask=there, other=0.0)
        value = tl.where(there, compose(p * q, eps, ROOT), 0.0)
    return row.to(tl.int64), value, p, q


@triton.jit
def _store_codes(columns, base, extension, values, scaled, along, d_base, d_extension, at, real,
                 d_value, scale, eps,
                 ROOT: tl.constexpr, SIGNED: tl.constexpr, DENSE: tl.constexpr):  # fmt: skip
    """Write codes and gradients from d_value, not yet scaled; returns 0 if those are finite."""
    _, value, p, q = _codes(columns, base, extension, at, real, eps, ROOT, DENSE)
    d_value *= scale
    d_p, d_q = _slopes(d_value, p, q, eps, ROOT, SIGNED, DENSE)
    tl.store(values + at, value, mask=real)
    tl.store(scaled + at, value * scale, mask=real)
    tl.store(along + at, value * d_value, mask=real)
    tl.store(d_base + at, d_p, mask=real)
    if not DENSE:
        tl.store(d_extension + at, d_q, mask=real)
    return tl.sum(tl.where(real, d_p * 0.0 + d_q * 0.0, 0.0))


@triton.jit
def decode_and_loss(x, columns, base, extension, table, bias, scale, residual, sums, values, scaled,
                    along, d_base, d_extension, tokens, d, k, eps,
                    ROOT: tl.constexpr, SIGNED: tl.constexpr, DENSE: tl.constexpr,
                    ON_DEVICE: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr,
                    WIDTH: tl.constexpr, TOGETHER: tl.constexpr,
                    STAGES: tl.constexpr):  # fmt: skip
    """Decoder, residual, squared error and gradients of the codes, with one gather of the rows.

    The squared error is a sum over columns, so a chunk of columns of the k rows serves the sum
    over k (forward) and the dot products with the residual (backward) while it is in registers.
    It is held as BLOCKS tiles of ROWS x WIDTH, so that sums over tiles are within a thread and
    fewer than ROWS rows are idle; the next chunks are on their way. A program of one warp meets no
    barrier. Of a dot product, TOGETHER columns are summed at once (those of a thread), the rest at
    the end.

    residual [tokens, d] = x_hat - x; sums [2, tokens]: its squared norm, and 0 if that times
    scale, d_base and d_extension are finite, else NaN. values [tokens, k], scaled = values *
    scale; with L = scale * squared norm / 2: along = values dL/dvalues, d_base, d_extension by the
    pre-latents. scale: as in `number`. k <= BLOCKS * ROWS. Grid (tokens,).
    """
    token = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, WIDTH)
    rows, weights, dots = (), (), ()
    for block in tl.static_range(BLOCKS):
        s = block * ROWS + tl.arange(0, ROWS)
        row, weight, _, _ = _codes(columns, base, extension, token * k + s, s < k, eps, ROOT, DENSE)
        rows = rows + (row * d,)
        weights = weights + (weight,)
        dots = dots + (tl.zeros([ROWS, WIDTH // TOGETHER], tl.float32),)
    total = tl.zeros([WIDTH], tl.float32)
    for start in tl.range(0, d, WIDTH, num_stages=STAGES):
        real = c < d - start
        parts = ()
        for block in tl.static_range(BLOCKS):
            start_of_row = rows[block][:, None]
            part = tl.load(
                table + start_of_row + start + c[None, :],
                mask=(start_of_row >= 0) & real[None, :],
                other=0.0,
            )
            parts = parts + (part,)
        at = token * d + start + c
        wanted = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
        if bias is not None:
            wanted -= tl.load(bias + start + c, mask=real, other=0.0).to(tl.float32)
        decoded = tl.zeros([ROWS, WIDTH], tl.float32)
        for block in tl.static_range(BLOCKS):
            decoded += parts[block].to(tl.float32) * weights[block][:, None]
        error = tl.sum(decoded, 0) - wanted
        tl.store(residual + at, rounded(error, residual.dtype.element_ty), mask=real)
        total += error * error
        more = ()
        for block in tl.static_range(BLOCKS):
            product = parts[block].to(tl.float32) * error[None, :]
            product = tl.reshape(product, [ROWS, WIDTH // TOGETHER, TOGETHER])
            more = more + (dots[block] + tl.sum(product, 2),)
        dots = more
    square, times = tl.sum(total), number(scale, ON_DEVICE)
    finite = square * times * 0.0
    for block in tl.static_range(BLOCKS):
        s = block * ROWS + tl.arange(0, ROWS)
        finite += _store_codes(
            columns, base, extension, values, scaled, along, d_base, d_extension, token * k + s,
            s < k, tl.sum(dots[block], 1), times, eps, ROOT, SIGNED, DENSE,
        )  # fmt: skip
    tl.store(sums + token, square)
    tl.store(sums + tokens + token, finite)


@triton.jit
def code_gradients(base, extension, d_values, columns, squares, scale, values, scaled, along,
                   d_base, d_extension, finite, k, eps,
                   ROOT: tl.constexpr, SIGNED: tl.constexpr, DENSE: tl.constexpr,
                   ON_DEVICE: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """The last part of `decode_and_loss` alone, from d_values [tokens, k] and squares [tokens].

    Grid (tokens,).
    """
    token = tl.program_id(0).to(tl.int64)
    times = number(scale, ON_DEVICE)
    total = tl.load(squares + token) * times * 0.0
    for start in range(0, k, WIDTH):
        s = start + tl.arange(0, WIDTH)
        at = token * k + s
        total += _store_codes(
            columns, base, extension, values, scaled, along, d_base, d_extension, at, s < k,
            tl.load(d_values + at, mask=s < k, other=0.0), times, eps, ROOT, SIGNED, DENSE,
        )  # fmt: skip
    tl.store(finite + token, total)
