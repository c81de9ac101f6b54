"""Gradients of weights as sums over the entries of each row, and AdamW in the same kernel.

An entry is a (token, latent) pair of the sparse codes. Entries are sorted by latent, stably, so
that a latent's, and a head's, lie together: row f owns entries offsets[f] to offsets[f + 1] (a head
of G latents: offsets[G head] to offsets[G (head + 1)]).

The sorted list is cut into segments of LENGTH entries, whatever rows they belong to. The sum over a
segment that lies wholly in one row is made first; the row then adds its other entries, of which
there are fewer than 2 LENGTH, and the sums of its whole segments, in order: no atomics, the same
bits in every run.

MODE of the last kernels: GRADIENT writes the gradient; MEASURE only its squared norm; UPDATE makes
the AdamW step, with the gradient in registers alone.
"""

import triton
import triton.language as tl

from kronsae_kernels.triton_impl.device import (
    GRADIENT_SCALE,
    PROCEED,
    adamw,
    adamw_numbers,
    dot,
    if_proceeds,
    rounded,
)

GRADIENT = tl.constexpr(0)
MEASURE = tl.constexpr(1)
UPDATE = tl.constexpr(2)


# Entries


@triton.jit
def _sorted(coefficient, code, real, to):
    tl.store(to, tl.load(coefficient + code, mask=real, other=0.0).to(tl.float32), mask=real)


@triton.jit
def group_entries(order, latents, of_code, one, two, three, four, tokens, coefficients, offsets,
                  k, size, rows,
                  HAS_TOKENS: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """tokens [E] and coefficients [COUNT, E] in the order of the entries, and offsets [rows + 1].

    order, latents [E]: of the stable sort of the codes.  of_code [E]: token of each code (where not
    HAS_TOKENS, there are k codes a token).  one to four [E]: COUNT coefficients, by code.
    Grid (E / WIDTH + (rows + 1) / WIDTH,): the first programs move entries, the others search.
    """
    block, lanes = tl.program_id(0), tl.arange(0, WIDTH)
    moving = tl.cdiv(size, WIDTH)
    if block < moving:
        entry = block * WIDTH + lanes
        real = entry < size
        code = tl.load(order + entry, mask=real, other=0)
        if HAS_TOKENS:
            token = tl.load(of_code + code, mask=real, other=0)
        else:
            token = code.to(tl.int32) // k
        tl.store(tokens + entry, token, mask=real)
        to = coefficients + entry
        if COUNT > 0:
            _sorted(one, code, real, to)
        if COUNT > 1:
            _sorted(two, code, real, to + size)
        if COUNT > 2:
            _sorted(three, code, real, to + size + size)
        if COUNT > 3:
            _sorted(four, code, real, to + size + size + size)
    else:
        # How many entries precede those of each row: halves of what is left, in step for all rows.
        row = (block - moving) * WIDTH + lanes
        before = tl.zeros([WIDTH], tl.int32)
        left = size
        while left > 0:
            half = (left + 1) // 2
            smaller = tl.load(latents + before + half - 1) < row
            before = tl.where(smaller, before + half, before)
            left -= half
        tl.store(offsets + row, before, mask=row <= rows)


@triton.jit
def _whole_segments(start, end, LENGTH: tl.constexpr):
    """(first, beyond): the segments that lie wholly within entries start to end."""
    first = (start + (LENGTH - 1)) // LENGTH
    return first, tl.maximum(end // LENGTH, first)


@triton.jit
def _row_of_segment(latents, segment, LENGTH: tl.constexpr, LATENTS: tl.constexpr):
    """(row, whether the segment lies wholly in it), for rows of LATENTS latents."""
    row = tl.load(latents + segment * LENGTH) // LATENTS
    return row, row == tl.load(latents + segment * LENGTH + (LENGTH - 1)) // LATENTS


# Rows. A program holds PIECES x WIDTH columns, as a tuple: no tile is padded to a power of two, and
# WIDTH is what its threads take with one load each.


@triton.jit
def _zeros(PIECES: tl.constexpr, WIDTH: tl.constexpr):
    pieces = ()
    for _ in tl.static_range(PIECES):
        pieces = pieces + (tl.zeros([WIDTH], tl.float32),)
    return pieces


@triton.jit
def _load(row, columns, PIECES: tl.constexpr, WIDTH: tl.constexpr):
    """The first `columns` numbers of a row, float32; 0 beyond."""
    c = tl.arange(0, WIDTH)
    pieces = ()
    for i in tl.static_range(PIECES):
        piece = tl.load(row + i * WIDTH + c, mask=c < columns - i * WIDTH, other=0.0)
        pieces = pieces + (piece.to(tl.float32),)
    return pieces


@triton.jit
def _store(row, pieces, columns, PIECES: tl.constexpr, WIDTH: tl.constexpr):
    c = tl.arange(0, WIDTH)
    for i in tl.static_range(PIECES):
        value = rounded(pieces[i], row.dtype.element_ty)
        tl.store(row + i * WIDTH + c, value, mask=c < columns - i * WIDTH)


@triton.jit
def _add(one, other, factor, PIECES: tl.constexpr):
    """one + factor * other, piece by piece."""
    pieces = ()
    for i in tl.static_range(PIECES):
        pieces = pieces + (one[i] + factor * other[i],)
    return pieces


@triton.jit
def _scaled(row, factor, PIECES: tl.constexpr):
    pieces = ()
    for i in tl.static_range(PIECES):
        pieces = pieces + (row[i] * factor,)
    return pieces


@triton.jit
def _row_sum(coefficients, along, tokens, y, start, count, gap_at, gap, columns, d,
             ALONG: tl.constexpr, ENTRIES: tl.constexpr, PIECES: tl.constexpr,
             WIDTH: tl.constexpr):  # fmt: skip
    """Sums of coefficient * y[token], of coefficients and of `along` over `count` entries.

    They begin at start; from entry gap_at on, `gap` entries are left out. ENTRIES rows of y are on
    their way at once.
    """
    total = _zeros(PIECES, WIDTH)
    of_bias, parallel = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    beyond = start + count
    for done in range(0, count, ENTRIES):
        weights, rows = (), ()
        for j in tl.static_range(ENTRIES):
            at = start + done + j
            real = at < beyond
            at += tl.where(at >= gap_at, gap, 0)
            token = tl.load(tokens + at, mask=real, other=0).to(tl.int64)
            weights = weights + (tl.load(coefficients + at, mask=real, other=0.0),)
            if ALONG:
                parallel += tl.load(along + at, mask=real, other=0.0)
            rows = rows + (_load(y + token * d, tl.where(real, columns, 0), PIECES, WIDTH),)
        for j in tl.static_range(ENTRIES):
            total = _add(total, rows[j], weights[j], PIECES)
            of_bias += weights[j]
    return total, of_bias, parallel


@triton.jit
def sum_row_segments(coefficients, tokens, latents, y, partial, d,
                     LENGTH: tl.constexpr, ENTRIES: tl.constexpr,
                     WIDTH: tl.constexpr):  # fmt: skip
    """partial [E / LENGTH, d]: `_row_sum` of each segment that lies in one row.

    Grid (E / LENGTH, d / WIDTH).
    """
    segment = tl.program_id(0)
    _, whole = _row_of_segment(latents, segment, LENGTH, 1)
    if whole:
        at, start = tl.program_id(1) * WIDTH, segment * LENGTH
        total, _, _ = _row_sum(
            coefficients, None, tokens, y + at, start, LENGTH, start + LENGTH, 0, d - at, d,
            False, ENTRIES, 1, WIDTH,
        )  # fmt: skip
        _store(partial + segment.to(tl.int64) * d + at, total, d - at, 1, WIDTH)


@triton.jit
def _sum(numbers, start, end, MANY: tl.constexpr):
    e = tl.arange(0, MANY)
    total = tl.zeros([MANY], tl.float32)
    for at in range(start, end, MANY):
        total += tl.load(numbers + at + e, mask=at + e < end, other=0.0)
    return tl.sum(total)


@triton.jit
def _whole_row_sum(coefficients, along, tokens, y, partial, start, end, columns, d,
                   BIAS: tl.constexpr, ALONG: tl.constexpr, LENGTH: tl.constexpr,
                   ENTRIES: tl.constexpr, PIECES: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """`_row_sum` of all entries start to end: those in no whole segment, then whole segments."""
    first, beyond = _whole_segments(start, end, LENGTH)
    gap = (beyond - first) * LENGTH
    total, of_bias, parallel = _row_sum(
        coefficients, along, tokens, y, start, end - start - gap, first * LENGTH, gap, columns, d,
        ALONG, ENTRIES, PIECES, WIDTH,
    )  # fmt: skip
    partial += first.to(tl.int64) * d
    for _ in range(first, beyond):
        total = _add(total, _load(partial, columns, PIECES, WIDTH), 1.0, PIECES)
        partial += d
    if beyond > first:
        if BIAS:
            of_bias += _sum(coefficients, first * LENGTH, beyond * LENGTH, WIDTH)
        if ALONG:
            parallel += _sum(along, first * LENGTH, beyond * LENGTH, WIDTH)
    return total, of_bias, parallel


@triton.jit
def row_gradients(coefficients, tokens, y, offsets, partial, out, out_bias, d,
                  HAS_BIAS: tl.constexpr, LENGTH: tl.constexpr, ENTRIES: tl.constexpr,
                  WIDTH: tl.constexpr):  # fmt: skip
    """out[f] = sum of coefficient * y[token], out_bias[f] = sum of coefficients, over f's entries.

    Grid (rows, d / WIDTH).
    """
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH
    start, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    total, of_bias, _ = _whole_row_sum(
        coefficients, None, tokens, y + at, partial + at, start, end, d - at, d,
        HAS_BIAS, False, LENGTH, ENTRIES, 1, WIDTH,
    )  # fmt: skip
    _store(out + row * d + at, total, d - at, 1, WIDTH)
    if HAS_BIAS:
        if at == 0:
            tl.store(out_bias + row, rounded(of_bias, out_bias.dtype.element_ty))


@triton.jit
def update_rows(coefficients, along, tokens, y, offsets, partial,
                weight, shadow, first, second, bias, bias_first, bias_second, squares,
                hyper, bias_hyper, d,
                MODE: tl.constexpr, UNIT_NORM: tl.constexpr, HAS_SHADOW: tl.constexpr,
                HAS_BIAS: tl.constexpr, LENGTH: tl.constexpr, ENTRIES: tl.constexpr,
                PIECES: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """AdamW step of weight [rows, d] (and bias [rows]), each row's gradient in registers.

    UNIT_NORM: what would only change the row's norm is taken out of its gradient (its product with
    the row is the sum of `along`), and the row is scaled to unit norm afterwards.
    shadow: weight rounded to another dtype.  squares [rows]: squared norm of the gradient.
    d <= PIECES * WIDTH. Grid (rows,).
    """
    row = tl.program_id(0).to(tl.int64)
    start, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    # Weights and moments are on their way while the gradient's terms are gathered.
    weight, first, second = weight + row * d, first + row * d, second + row * d
    if MODE == UPDATE or UNIT_NORM:
        w = _load(weight, d, PIECES, WIDTH)
    if MODE == UPDATE:
        one, two = _load(first, d, PIECES, WIDTH), _load(second, d, PIECES, WIDTH)
        numbers = adamw_numbers(hyper)
    scale, proceed = tl.load(hyper + GRADIENT_SCALE), tl.load(hyper + PROCEED) != 0.0
    gradient, of_bias, parallel = _whole_row_sum(
        coefficients, along, tokens, y, partial, start, end, d, d,
        HAS_BIAS, UNIT_NORM, LENGTH, ENTRIES, PIECES, WIDTH,
    )  # fmt: skip
    of_bias *= scale
    parallel *= scale
    c = tl.arange(0, WIDTH)
    square, norm = tl.zeros([WIDTH], tl.float32), tl.zeros([WIDTH], tl.float32)
    of_w, of_one, of_two = (), (), ()
    for i in tl.static_range(PIECES):
        along_row = gradient[i] * scale
        if UNIT_NORM:
            along_row -= w[i] * parallel
        square += along_row * along_row
        if MODE == UPDATE:
            new, new_one, new_two = adamw(w[i], along_row, one[i], two[i], numbers)
            of_w, of_one, of_two = of_w + (new,), of_one + (new_one,), of_two + (new_two,)
            if UNIT_NORM:
                norm += tl.where(c < d - i * WIDTH, new * new, 0.0)
    if MODE == UPDATE and UNIT_NORM:
        square, norm = tl.split(tl.sum(tl.join(square, norm), 0))
        inverse = 1.0 / tl.maximum(tl.sqrt_rn(norm), 1.1754943508222875e-38)
    else:
        square = tl.sum(square)
    tl.store(squares + row, square + (of_bias * of_bias if HAS_BIAS else 0.0))
    if MODE == UPDATE:
        if proceed:
            if UNIT_NORM:
                of_w = _scaled(of_w, inverse, PIECES)
            _store(weight, of_w, d, PIECES, WIDTH)
            _store(first, of_one, d, PIECES, WIDTH)
            _store(second, of_two, d, PIECES, WIDTH)
            if HAS_SHADOW:
                _store(shadow + row * d, of_w, d, PIECES, WIDTH)
            if HAS_BIAS:
                b, b_one, b_two = adamw(
                    tl.load(bias + row), of_bias, tl.load(bias_first + row),
                    tl.load(bias_second + row), adamw_numbers(bias_hyper),
                )  # fmt: skip
                tl.store(bias + row, b)
                tl.store(bias_first + row, b_one)
                tl.store(bias_second + row, b_two)


# Heads


@triton.jit
def _head_sum(total, of_bias, d_base, d_extension, latents, tokens, x, head, start, count, gap_at,
              gap, d, c, real,
              M: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, ENTRIES: tl.constexpr,
              SPLIT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Add A x[token] over `count` entries from start, A [m + n, entries] built in registers.

    From entry gap_at on, `gap` entries are left out.

    Each entry has d_base in its base's row and d_extension in its extension's. One load of a
    token's activation serves all m + n rows. SPLIT: A as the sum of two numbers of x's dtype, so
    that coefficients keep 16 bits or more on bfloat16 matrix units.
    """
    r, e = tl.arange(0, ROWS), tl.arange(0, ENTRIES)
    for done in range(0, count, ENTRIES):
        entry = done + e < count
        at = start + done + e
        at = tl.where(at >= gap_at, at + gap, at)
        latent = tl.load(latents + at, mask=entry, other=0) - head * (M * N)
        of_base = tl.load(d_base + at, mask=entry, other=0.0)
        of_extension = tl.load(d_extension + at, mask=entry, other=0.0)
        base = latent // N
        extension = M + latent - base * N
        a = tl.where(r[:, None] == base[None, :], of_base[None, :], 0.0)
        a += tl.where(r[:, None] == extension[None, :], of_extension[None, :], 0.0)
        of_bias += tl.sum(a, 1)
        token = tl.load(tokens + at, mask=entry, other=0).to(tl.int64)
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
def sum_head_segments(d_base, d_extension, latents, tokens, x, partial, partial_bias, d,
                      M: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr,
                      PRECISION: tl.constexpr, LENGTH: tl.constexpr, ENTRIES: tl.constexpr,
                      WIDTH: tl.constexpr):  # fmt: skip
    """partial [E / LENGTH, m + n, d], partial_bias [E / LENGTH, m + n]: of segments in one head.

    Grid (E / LENGTH, d / WIDTH).
    """
    segment = tl.program_id(0)
    head, whole = _row_of_segment(latents, segment, LENGTH, M * N)
    if whole:
        r, c = tl.arange(0, ROWS), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        real = c < d
        start = segment * LENGTH
        total = tl.zeros([ROWS, WIDTH], tl.float32)
        of_bias = tl.zeros([ROWS], tl.float32)
        total, of_bias = _head_sum(
            total, of_bias, d_base, d_extension, latents, tokens, x, head, start, LENGTH,
            start + LENGTH, 0, d, c, real, M, N, ROWS, ENTRIES, SPLIT, PRECISION,
        )  # fmt: skip
        row = segment.to(tl.int64) * (M + N) + r
        of_row = r < M + N
        tl.store(
            partial + row[:, None] * d + c[None, :], total, mask=of_row[:, None] & real[None, :]
        )
        if tl.program_id(1) == 0:
            tl.store(partial_bias + row, of_bias, mask=of_row)


@triton.jit
def head_gradients(d_base, d_extension, latents, tokens, x, offsets, partial, partial_bias,
                   weight, shadow, first, second, bias, bias_first, bias_second,
                   squares, hyper, bias_hyper, bias_of_row, bias_of_head, d, h,
                   M: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr,
                   PRECISION: tl.constexpr, MODE: tl.constexpr, HAS_SHADOW: tl.constexpr,
                   LENGTH: tl.constexpr, ENTRIES: tl.constexpr,
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
    start = tl.load(offsets + head * (M * N))
    end = tl.load(offsets + (head + 1) * (M * N))
    first_part, beyond = _whole_segments(start, end, LENGTH)
    gap = (beyond - first_part) * LENGTH
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    of_bias = tl.zeros([ROWS], tl.float32)
    total, of_bias = _head_sum(
        total, of_bias, d_base, d_extension, latents, tokens, x, head, start, end - start - gap,
        first_part * LENGTH, gap, d, c, real, M, N, ROWS, ENTRIES, SPLIT, PRECISION,
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
        w, one, two = adamw(w, gradient, one, two, adamw_numbers(hyper))
        tl.store(weight + at, w, mask=mask)
        tl.store(first + at, one, mask=mask)
        tl.store(second + at, two, mask=mask)
        if HAS_SHADOW:
            tl.store(shadow + at, rounded(w, shadow.dtype.element_ty), mask=mask)
        if chunk == 0:
            b = tl.load(bias + of_head, mask=of_row, other=0.0)
            b_one = tl.load(bias_first + of_head, mask=of_row, other=0.0)
            b_two = tl.load(bias_second + of_head, mask=of_row, other=0.0)
            b, b_one, b_two = adamw(b, of_bias, b_one, b_two, adamw_numbers(bias_hyper))
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
    g = scale * tl.load(gradient + c, mask=real, other=0.0)
    w, one, two = adamw(w, g, one, two, adamw_numbers(hyper))
    tl.store(weight + c, w, mask=real)
    tl.store(first + c, one, mask=real)
    tl.store(second + c, two, mask=real)
