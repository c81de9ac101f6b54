"""Sums of gathered rows: the decoder, its gradient by the codes, and both at once for training.

`coefficients` and `columns` are [tokens, r], `table` [N, d]; a program works on one token. Sums are
float32, in a fixed order. Addresses in the table are int64.
"""

import triton
import triton.language as tl

from kronsae_kernels.triton_impl.device import compose, rounded, slope


@triton.jit
def combine(coefficients, columns, table, bias, out, r, d,
            HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """out[b] = sum_s coefficients[b, s] table[columns[b, s]] + bias. Grid (tokens, d / WIDTH)."""
    token = tl.program_id(0).to(tl.int64)
    s, c = tl.arange(0, ROWS), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    real = c < d
    total = tl.zeros([WIDTH], tl.float32)
    for start in range(0, r, ROWS):
        entry = start + s < r
        at = token * r + start + s
        row = tl.load(columns + at, mask=entry, other=0).to(tl.int64)
        weight = tl.load(coefficients + at, mask=entry, other=0.0).to(tl.float32)
        part = tl.load(
            table + row[:, None] * d + c[None, :], mask=entry[:, None] & real[None, :], other=0.0
        )
        total += tl.sum(part.to(tl.float32) * weight[:, None], 0)
    if HAS_BIAS:
        total += tl.load(bias + c, mask=real, other=0.0).to(tl.float32)
    tl.store(out + token * d + c, rounded(total, out.dtype.element_ty), mask=real)


@triton.jit
def pair_dots(y, columns, table, out, r, d, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """out[b, s] = y[b] . table[columns[b, s]]. Grid (tokens, r / ROWS)."""
    token = tl.program_id(0).to(tl.int64)
    s, c = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    entry = s < r
    row = tl.load(columns + token * r + s, mask=entry, other=0).to(tl.int64)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, d, WIDTH):
        real = c < d - start
        of_token = tl.load(y + token * d + start + c, mask=real, other=0.0).to(tl.float32)
        part = tl.load(
            table + row[:, None] * d + start + c[None, :],
            mask=entry[:, None] & real[None, :],
            other=0.0,
        )
        total += part.to(tl.float32) * of_token[None, :]
    tl.store(out + token * r + s, rounded(tl.sum(total, 1), out.dtype.element_ty), mask=entry)


@triton.jit
def _slopes(d_value, p, q, eps, ROOT: tl.constexpr, SIGNED: tl.constexpr, DENSE: tl.constexpr):
    """Derivatives by both pre-latents, from that by a value."""
    if DENSE:
        d_p = tl.where(p > 0.0, d_value, 0.0)
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
def _value(p, q, eps, ROOT: tl.constexpr, DENSE: tl.constexpr):
    if DENSE:
        value = p
    else:
        value = compose(p * q, eps, ROOT)
    return value


@triton.jit
def decode_and_loss(x, columns, base, extension, table, bias, residual, squares, values, along,
                    d_base, d_extension, d, k, eps,
                    ROOT: tl.constexpr, SIGNED: tl.constexpr, DENSE: tl.constexpr,
                    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Decoder, residual, squared error and gradients of the codes, with one gather of the rows.

    The squared error is a sum over columns, so a chunk of columns of the k rows serves the sum
    over k (forward) and the dot products with the residual (backward) while it is in registers.

    residual [tokens, d] = x_hat - x; squares [tokens] its squared norm. With L = squares / 2:
    values [tokens, k], along = values dL/dvalues, d_base, d_extension by the pre-latents.
    k <= ROWS. Grid (tokens,).
    """
    token = tl.program_id(0).to(tl.int64)
    s, c = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    entry = s < k
    row = tl.load(columns + token * k + s, mask=entry, other=0).to(tl.int64)
    p = tl.load(base + token * k + s, mask=entry, other=0.0)
    q = p
    if not DENSE:
        q = tl.load(extension + token * k + s, mask=entry, other=0.0)
    value = tl.where(entry, _value(p, q, eps, ROOT, DENSE), 0.0)
    d_value = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([WIDTH], tl.float32)
    for start in range(0, d, WIDTH):
        real = c < d - start
        part = tl.load(
            table + row[:, None] * d + start + c[None, :],
            mask=entry[:, None] & real[None, :],
            other=0.0,
        ).to(tl.float32)
        error = tl.sum(part * value[:, None], 0)
        if HAS_BIAS:
            error += tl.load(bias + start + c, mask=real, other=0.0).to(tl.float32)
        at = token * d + start + c
        error -= tl.load(x + at, mask=real, other=0.0).to(tl.float32)
        low = rounded(error, residual.dtype.element_ty)
        tl.store(residual + at, low, mask=real)
        d_value += tl.sum(part * error[None, :], 1)
        total += error * error
    tl.store(squares + token, tl.sum(total))
    d_p, d_q = _slopes(d_value, p, q, eps, ROOT, SIGNED, DENSE)
    at = token * k + s
    tl.store(values + at, value, mask=entry)
    tl.store(along + at, value * d_value, mask=entry)
    tl.store(d_base + at, d_p, mask=entry)
    if not DENSE:
        tl.store(d_extension + at, d_q, mask=entry)


@triton.jit
def code_gradients(base, extension, d_values, values, along, d_base, d_extension, size, eps,
                   ROOT: tl.constexpr, SIGNED: tl.constexpr, DENSE: tl.constexpr,
                   WIDTH: tl.constexpr):  # fmt: skip
    """The last part of `decode_and_loss` alone, from d_values; all [size]. Grid (size / WIDTH,)."""
    at = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    real = at < size
    p = tl.load(base + at, mask=real, other=0.0)
    q = p
    if not DENSE:
        q = tl.load(extension + at, mask=real, other=0.0)
    d_value = tl.load(d_values + at, mask=real, other=0.0)
    value = _value(p, q, eps, ROOT, DENSE)
    d_p, d_q = _slopes(d_value, p, q, eps, ROOT, SIGNED, DENSE)
    tl.store(values + at, value, mask=real)
    tl.store(along + at, value * d_value, mask=real)
    tl.store(d_base + at, d_p, mask=real)
    if not DENSE:
        tl.store(d_extension + at, d_q, mask=real)
