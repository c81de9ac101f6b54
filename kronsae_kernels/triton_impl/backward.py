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
    hashed,
    if_proceeds,
    key_of_row,
    rounded,
    rounded_by_chance,
)

GRADIENT = tl.constexpr(0)
MEASURE = tl.constexpr(1)
UPDATE = tl.constexpr(2)


# Entries


@triton.jit
def _sorted(coefficient, code, real, to):
    tl.store(to, tl.load(coefficient + code, mask=real, other=0.0).to(tl.float32), mask=real)


@triton.jit
def group_entries(order, latents, of_code, one, two, three, four, five, tokens, coefficients,
                  offsets, k, size, rows,
                  COUNT: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """tokens [E] and coefficients [COUNT, E] in the order of the entries, and offsets [rows + 1].

    order, latents [E]: of the stable sort of the codes.  of_code [E]: token of each code (None:
    there are k codes a token).  one to five [E]: COUNT coefficients, by code.
    Grid (E / WIDTH + (rows + 1) / WIDTH,): the first programs move entries, the others search.
    """
    block, lanes = tl.program_id(0), tl.arange(0, WIDTH)
    moving = tl.cdiv(size, WIDTH)
    if block < moving:
        entry = block * WIDTH + lanes
        real = entry < size
        code = tl.load(order + entry, mask=real, other=0)
        if of_code is not None:
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
        if COUNT > 4:
            _sorted(five, code, real, to + size + size + size + size)
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
def _cut(start, end, LENGTH: tl.constexpr):
    """(first, beyond, stop, resume): segments wholly within entries start to end, and the others.

    These are entries start to stop and resume to end (none, if there is no whole segment).
    """
    first = (start + (LENGTH - 1)) // LENGTH
    beyond = tl.maximum(end // LENGTH, first)
    whole = beyond > first
    return (
        first,
        beyond,
        tl.where(whole, first * LENGTH, end),
        tl.where(whole, beyond * LENGTH, end),
    )


@triton.jit
def _row_of_segment(latents, segment, LENGTH: tl.constexpr, LATENTS: tl.constexpr):
    """(row, whether the segment lies wholly in it), for rows of LATENTS latents.

    Segments of entries without a latent (-1) never do: their sums are not wanted.
    """
    first = tl.load(latents + segment * LENGTH)
    row = first // LATENTS
    last = tl.load(latents + segment * LENGTH + (LENGTH - 1))
    return row, (first >= 0) & (row == last // LATENTS)


@triton.jit
def _sum(numbers, start, end, MANY: tl.constexpr):
    e = tl.arange(0, MANY)
    total = tl.zeros([MANY], tl.float32)
    for at in range(start, end, MANY):
        total += tl.load(numbers + at + e, mask=at + e < end, other=0.0)
    return tl.sum(total)


@triton.jit
def sum_entries(coefficients, offsets, out, MANY: tl.constexpr):
    """out[f] = sum of the coefficients of f's entries. Grid (F,)."""
    row = tl.program_id(0)
    total = _sum(coefficients, tl.load(offsets + row), tl.load(offsets + row + 1), MANY)
    tl.store(out + row, total)


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
def _store_moments(first, second, one, two, key, start, columns, PIECES: tl.constexpr,
                   WIDTH: tl.constexpr):  # fmt: skip
    """Store the moments of a row's columns from `start` on, bfloat16 ones rounded by chance.

    key: `key_of_row`; each column has 32 bits of noise, of which each moment takes half.
    """
    c = tl.arange(0, WIDTH)
    for i in tl.static_range(PIECES):
        real = c < columns - i * WIDTH
        new_one, new_two = one[i], two[i]
        if first.dtype.element_ty == tl.bfloat16:
            noise = hashed(key + (start + i * WIDTH + c).to(tl.uint32))
            new_one = rounded_by_chance(new_one, noise)
            new_two = rounded_by_chance(new_two, noise >> 16)
        tl.store(first + i * WIDTH + c, new_one, mask=real)
        tl.store(second + i * WIDTH + c, new_two, mask=real)


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
def _row_sum(coefficients, along, tokens, y, start, stop, resume, end, columns, d,
             ALONG: tl.constexpr, ENTRIES: tl.constexpr, PIECES: tl.constexpr,
             WIDTH: tl.constexpr):  # fmt: skip
    """Sums of coefficient * y[token], of coefficients and of `along`.

    Over entries start to stop and resume to end. ENTRIES rows of y are on their way at once.
    """
    total = _zeros(PIECES, WIDTH)
    of_bias, parallel = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    low, high = start, stop
    for _ in range(0, tl.where(resume < end, 2, 1)):
        for at in range(low, high, ENTRIES):
            weights, rows = (), ()
            for j in tl.static_range(ENTRIES):
                real = at + j < high
                token = tl.load(tokens + at + j, mask=real, other=0).to(tl.int64)
                weights = weights + (tl.load(coefficients + at + j, mask=real, other=0.0),)
                if ALONG:
                    parallel += tl.load(along + at + j, mask=real, other=0.0)
                rows = rows + (_load(y + token * d, tl.where(real, columns, 0), PIECES, WIDTH),)
            for j in tl.static_range(ENTRIES):
                total = _add(total, rows[j], weights[j], PIECES)
                of_bias += weights[j]
        low, high = resume, end
    return total, of_bias, parallel


@triton.jit
def sum_row_segments(coefficients, tokens, latents, y, partial, d,
                     LENGTH: tl.constexpr, ENTRIES: tl.constexpr,
                     WIDTH: tl.constexpr):  # fmt: skip
    """partial [E / LENGTH, d]: `_row_sum` of each segment that lies in one row.

    Grid (E / LENGTH, d / WIDTH).
    """
    segment = tl.program_id(0)
    row, whole = _row_of_segment(latents, segment, LENGTH, 1)
    if whole:
        at, start = tl.program_id(1) * WIDTH, segment * LENGTH
        end = start + LENGTH
        total, of_bias, parallel = _row_sum(
            coefficients, None, tokens, y + at, start, end, end, end, d - at, d,
            False, ENTRIES, 1, WIDTH,
        )  # fmt: skip
        _store(partial + segment.to(tl.int64) * d + at, total, d - at, 1, WIDTH)


@triton.jit
def _whole_row_sum(coefficients, along, tokens, y, partial, start, end, columns, d,
                   BIAS: tl.constexpr, ALONG: tl.constexpr, LENGTH: tl.constexpr,
                   ENTRIES: tl.constexpr, PIECES: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """`_row_sum` of all entries start to end: those in no whole segment, then whole segments."""
    first, beyond, stop, resume = _cut(start, end, LENGTH)
    total, of_bias, parallel = _row_sum(
        coefficients, along, tokens, y, start, stop, resume, end, columns, d,
        ALONG, ENTRIES, PIECES, WIDTH,
    )  # fmt: skip
    partial += first.to(tl.int64) * d
    for _ in range(first, beyond):
        total = _add(total, _load(partial, columns, PIECES, WIDTH), 1.0, PIECES)
        partial += d
    if beyond > first:
        if BIAS:
            of_bias += _sum(coefficients, stop, resume, WIDTH)
        if ALONG:
            parallel += _sum(along, stop, resume, WIDTH)
    return total, of_bias, parallel


@triton.jit
def row_gradients(coefficients, tokens, y, offsets, partial, out, out_bias, d,
                  LENGTH: tl.constexpr, ENTRIES: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """out[f] = sum of coefficient * y[token], out_bias[f] = sum of coefficients, over f's entries.

    Grid (rows, d / WIDTH).
    """
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH
    start, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    total, of_bias, _ = _whole_row_sum(
        coefficients, None, tokens, y + at, partial + at, start, end, d - at, d,
        out_bias is not None, False, LENGTH, ENTRIES, 1, WIDTH,
    )  # fmt: skip
    _store(out + row * d + at, total, d - at, 1, WIDTH)
    if out_bias is not None:
        if at == 0:
            tl.store(out_bias + row, rounded(of_bias, out_bias.dtype.element_ty))


@triton.jit
def update_rows(coefficients, along, tokens, y, offsets, partial,
                weight, shadow, first, second, bias, bias_first, bias_second, squares,
                hyper, bias_hyper, d,
                MODE: tl.constexpr, UNIT_NORM: tl.constexpr, SEED: tl.constexpr,
                LENGTH: tl.constexpr, ENTRIES: tl.constexpr, PIECES: tl.constexpr,
                WIDTH: tl.constexpr):  # fmt: skip
    """AdamW step of weight [rows, d] (and bias [rows]), each row's gradient in registers.

    UNIT_NORM: what would only change the row's norm is taken out of its gradient (its product with
    the row is the sum of `along`), and the row is scaled to unit norm afterwards.
    first, second: moments, of which bfloat16 ones are rounded by chance, drawn from SEED.
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
        bias is not None, UNIT_NORM, LENGTH, ENTRIES, PIECES, WIDTH,
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
    tl.store(squares + row, square + (of_bias * of_bias if bias is not None else 0.0))
    if MODE == UPDATE:
        if proceed:
            if UNIT_NORM:
                of_w = _scaled(of_w, inverse, PIECES)
            _store(weight, of_w, d, PIECES, WIDTH)
            key = key_of_row(SEED, hyper, row)
            _store_moments(first, second, of_one, of_two, key, 0, d, PIECES, WIDTH)
            if shadow is not None:
                _store(shadow + row * d, of_w, d, PIECES, WIDTH)
            if bias is not None:
                b, b_one, b_two = adamw(
                    tl.load(bias + row), of_bias, tl.load(bias_first + row),
                    tl.load(bias_second + row), adamw_numbers(bias_hyper),
                )  # fmt: skip
                tl.store(bias + row, b)
                tl.store(bias_first + row, b_one)
                tl.store(bias_second + row, b_two)


# Heads. Entries of a head are sorted by base: a run of entries belongs to one base row, and each of
# them to an extension row beside. A run's tokens are loaded once for all of these rows.


@triton.jit
def _zero_rows(ROWS: tl.constexpr, PIECES: tl.constexpr, WIDTH: tl.constexpr):
    rows = ()
    for _ in tl.static_range(ROWS):
        rows = rows + (_zeros(PIECES, WIDTH),)
    return rows


@triton.jit
def _zero_sums(SUMS: tl.constexpr):
    sums = ()
    for _ in tl.static_range(SUMS):
        sums = sums + (tl.full((), 0.0, tl.float32),)
    return sums


@triton.jit
def _entries(d_base, d_extension, latents, tokens, at, end, ENTRIES: tl.constexpr):
    """Token, latent, d_base and d_extension of entries at, at + 1, ...; 0 from `end` on."""
    token, latent, of_base, of_extension = (), (), (), ()
    for j in tl.static_range(ENTRIES):
        real = at + j < end
        token = token + (tl.load(tokens + at + j, mask=real, other=0),)
        latent = latent + (tl.load(latents + at + j, mask=real, other=0),)
        of_base = of_base + (tl.load(d_base + at + j, mask=real, other=0.0),)
        of_extension = of_extension + (tl.load(d_extension + at + j, mask=real, other=0.0),)
    return token, latent, of_base, of_extension


@triton.jit
def _run_sum(rows, d_base, d_extension, latents, tokens, x, extension, start, stop, resume, end,
             columns, d,
             EXTENSIONS: tl.constexpr, ENTRIES: tl.constexpr, PIECES: tl.constexpr,
             WIDTH: tl.constexpr):  # fmt: skip
    """Add coefficient * x[token] to rows over entries start to stop and resume to end of a run.

    The first row is the base's, with d_base; the others are those of latents extension,
    extension + 1, ... of the run, with d_extension. Numbers of the next ENTRIES entries are on
    their way while those of x are.
    """
    low, high = start, stop
    for _ in range(0, tl.where(resume < end, 2, 1)):
        token, latent, of_base, of_extension = _entries(
            d_base, d_extension, latents, tokens, low, high, ENTRIES
        )
        for at in range(low, high, ENTRIES):
            part = ()
            for j in tl.static_range(ENTRIES):
                there = tl.where(at + j < high, columns, 0)
                part = part + (_load(x + token[j].to(tl.int64) * d, there, PIECES, WIDTH),)
            following = _entries(d_base, d_extension, latents, tokens, at + ENTRIES, high, ENTRIES)
            for j in tl.static_range(ENTRIES):
                new = (_add(rows[0], part[j], of_base[j], PIECES),)
                for r in tl.static_range(EXTENSIONS):
                    coefficient = tl.where(latent[j] == extension + r, of_extension[j], 0.0)
                    new = new + (_add(rows[r + 1], part[j], coefficient, PIECES),)
                rows = new
            token, latent, of_base, of_extension = following
        low, high = resume, end
    return rows


@triton.jit
def _run_bias(sums, d_base, d_extension, latents, extension, start, end,
              EXTENSIONS: tl.constexpr, MANY: tl.constexpr):  # fmt: skip
    """Add coefficients of a run's entries start to end to sums, as `_run_sum` does to rows."""
    e = tl.arange(0, MANY)
    for at in range(start, end, MANY):
        real = at + e < end
        new = (sums[0] + tl.sum(tl.load(d_base + at + e, mask=real, other=0.0)),)
        latent = tl.load(latents + at + e, mask=real, other=0)
        coefficient = tl.load(d_extension + at + e, mask=real, other=0.0)
        for r in tl.static_range(EXTENSIONS):
            mine = tl.where(latent == extension + r, coefficient, 0.0)
            new = new + (sums[r + 1] + tl.sum(mine),)
        sums = new
    return sums


@triton.jit
def _place(d, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """(row, group, chunk) of a program of grid (rows * GROUPS * d / WIDTH,)."""
    chunks = tl.cdiv(d, WIDTH)
    program = tl.program_id(0)
    row = program // chunks
    return row // GROUPS, row % GROUPS, program % chunks


@triton.jit
def sum_head_segments(d_base, d_extension, latents, tokens, x, partial, d,
                      N: tl.constexpr, EXTENSIONS: tl.constexpr, LENGTH: tl.constexpr,
                      ENTRIES: tl.constexpr, PIECES: tl.constexpr,
                      WIDTH: tl.constexpr):  # fmt: skip
    """partial [E / LENGTH, 1 + n, d]: `_run_sum` of each segment that lies in one run.

    Grid (E / LENGTH * n / EXTENSIONS * d / (PIECES * WIDTH),).
    """
    GROUPS: tl.constexpr = (N + EXTENSIONS - 1) // EXTENSIONS
    segment, group, chunk = _place(d, GROUPS, PIECES * WIDTH)
    run, whole = _row_of_segment(latents, segment, LENGTH, N)
    if whole:
        at, start = chunk * (PIECES * WIDTH), segment * LENGTH
        end = start + LENGTH
        rows = _run_sum(
            _zero_rows(EXTENSIONS + 1, PIECES, WIDTH), d_base, d_extension, latents, tokens, x + at,
            run * N + group * EXTENSIONS, start, end, end, end, d - at, d,
            EXTENSIONS, ENTRIES, PIECES, WIDTH,
        )  # fmt: skip
        to = segment.to(tl.int64) * (N + 1)
        for r in tl.static_range(EXTENSIONS + 1):
            row = r if r == 0 else group * EXTENSIONS + r
            if row <= N:
                _store(partial + (to + row) * d + at, rows[r], d - at, PIECES, WIDTH)


@triton.jit
def _add_segment(rows, partial, group, columns, d,
                 N: tl.constexpr, EXTENSIONS: tl.constexpr, PIECES: tl.constexpr,
                 WIDTH: tl.constexpr):  # fmt: skip
    """Add a segment's sums, from `sum_head_segments`, to rows."""
    new = (_add(rows[0], _load(partial, columns, PIECES, WIDTH), 1.0, PIECES),)
    for r in tl.static_range(1, EXTENSIONS + 1):
        row = group * EXTENSIONS + r
        there = tl.where(row <= N, columns, 0)  # the last program of a head may have fewer rows
        part = _load(partial + row.to(tl.int64) * d, there, PIECES, WIDTH)
        new = new + (_add(rows[r], part, 1.0, PIECES),)
    return new


@triton.jit
def _update(index, start, d, gradient, w, one, two, weight, shadow, first, second, columns,
            numbers, hyper,
            MODE: tl.constexpr, SEED: tl.constexpr, PIECES: tl.constexpr,
            WIDTH: tl.constexpr):  # fmt: skip
    """Write a gradient, or make its AdamW step, in row `index` from column `start` on.

    Returns its squares [WIDTH].
    """
    row = index * d + start
    square = tl.zeros([WIDTH], tl.float32)
    of_w, of_one, of_two = (), (), ()
    for i in tl.static_range(PIECES):
        square += gradient[i] * gradient[i]
        if MODE == UPDATE:
            new, new_one, new_two = adamw(w[i], gradient[i], one[i], two[i], numbers)
            of_w, of_one, of_two = of_w + (new,), of_one + (new_one,), of_two + (new_two,)
    if MODE == GRADIENT:
        _store(weight + row, gradient, columns, PIECES, WIDTH)
    if MODE == UPDATE:
        _store(weight + row, of_w, columns, PIECES, WIDTH)
        _store_moments(
            first + row, second + row, of_one, of_two, key_of_row(SEED, hyper, index), start,
            columns, PIECES, WIDTH,
        )  # fmt: skip
        if shadow is not None:
            _store(shadow + row, of_w, columns, PIECES, WIDTH)
    return square


@triton.jit
def _update_bias(at, gradient, bias, first, second, hyper, MODE: tl.constexpr):
    if MODE == GRADIENT:
        tl.store(bias + at, rounded(gradient, bias.dtype.element_ty))
    if MODE == UPDATE:
        b, one, two = tl.load(bias + at), tl.load(first + at), tl.load(second + at)
        b, one, two = adamw(b, gradient, one, two, adamw_numbers(hyper))
        if tl.load(hyper + PROCEED) != 0.0:
            tl.store(bias + at, b)
            tl.store(first + at, one)
            tl.store(second + at, two)


@triton.jit
def _row_of_weight(weight, first, second, row, columns, MODE: tl.constexpr, PIECES: tl.constexpr,
                   WIDTH: tl.constexpr):  # fmt: skip
    """Weight and moments at offset `row`, where they are needed."""
    w, one, two = (), (), ()
    if MODE == UPDATE:
        w = _load(weight + row, columns, PIECES, WIDTH)
        one = _load(first + row, columns, PIECES, WIDTH)
        two = _load(second + row, columns, PIECES, WIDTH)
    return w, one, two


@triton.jit
def head_gradients(d_base, d_extension, latents, tokens, x, offsets, partial,
                   weight, shadow, first, second, bias, bias_first, bias_second,
                   squares, hyper, bias_hyper, bias_of_row, bias_of_head, d, h,
                   M: tl.constexpr, N: tl.constexpr, EXTENSIONS: tl.constexpr, MODE: tl.constexpr,
                   SEED: tl.constexpr, LENGTH: tl.constexpr, ENTRIES: tl.constexpr,
                   PIECES: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Gradient, or AdamW step, of a Kron encoder's weight [m + n, h, d] and its bias.

    bias_of_row, bias_of_head: strides of the bias, [m + n, h] or [h, m + n].

    first, second: moments, of which bfloat16 ones are rounded by chance, drawn from SEED.
    MODE GRADIENT: it is written to weight and bias, which hold nothing else; the other tensors
    from shadow on are not used. squares: squared norm of each program's part.
    Grid (h * n / EXTENSIONS * d / (PIECES * WIDTH),): a program has EXTENSIONS extension rows of a
    head, and the first of a head the base rows.
    """
    GROUPS: tl.constexpr = (N + EXTENSIONS - 1) // EXTENSIONS
    head, group, chunk = _place(d, GROUPS, PIECES * WIDTH)
    at = chunk * (PIECES * WIDTH)
    columns = d - at
    stored, scale, numbers = columns, 1.0, (0.0,)
    if MODE != GRADIENT:
        scale = tl.load(hyper + GRADIENT_SCALE)
    if MODE == UPDATE:
        stored, numbers = if_proceeds(columns, hyper), adamw_numbers(hyper)
    of_head = head * bias_of_head
    x += at
    square, square_of_bias = tl.zeros([WIDTH], tl.float32), tl.full((), 0.0, tl.float32)
    rows, sums = _zero_rows(EXTENSIONS + 1, PIECES, WIDTH), _zero_sums(EXTENSIONS + 1)
    end = tl.load(offsets + head * (M * N))
    following = tl.load(offsets + (head * M + 1) * N)
    for i in range(0, M):
        # The row and the end of the next run are on their way while this one is gathered.
        start, end = end, following
        following = tl.load(offsets + tl.minimum(head * M + i + 2, h * M) * N)
        index = (i * h + head).to(tl.int64)
        row = index * d + at
        of_base = columns if GROUPS == 1 else tl.where(group == 0, columns, 0)
        w, one, two = _row_of_weight(weight, first, second, row, of_base, MODE, PIECES, WIDTH)
        first_segment, beyond, stop, resume = _cut(start, end, LENGTH)
        extension = (head * M + i) * N + group * EXTENSIONS
        rows = _run_sum(
            rows, d_base, d_extension, latents, tokens, x, extension, start, stop, resume, end,
            columns, d, EXTENSIONS, ENTRIES, PIECES, WIDTH,
        )  # fmt: skip
        of_segment = partial + first_segment.to(tl.int64) * (N + 1) * d + at
        for _ in range(first_segment, beyond):
            rows = _add_segment(rows, of_segment, group, columns, d, N, EXTENSIONS, PIECES, WIDTH)
            of_segment += (N + 1) * d
        if chunk == 0:
            sums = _run_bias(
                sums, d_base, d_extension, latents, extension, start, end, EXTENSIONS, WIDTH
            )
        if group == 0:
            square += _update(
                index, at, d, _scaled(rows[0], scale, PIECES), w, one, two, weight, shadow, first,
                second, stored, numbers, hyper, MODE, SEED, PIECES, WIDTH,
            )  # fmt: skip
            if chunk == 0:
                of_bias = sums[0] * scale
                square_of_bias += of_bias * of_bias
                _update_bias(
                    of_head + i * bias_of_row, of_bias, bias, bias_first, bias_second, bias_hyper,
                    MODE,
                )  # fmt: skip
        rows = _zero_rows(1, PIECES, WIDTH) + rows[1:]
        sums = _zero_sums(1) + sums[1:]
    # The numbers of an extension row are on their way while the row before is updated.
    i = M + group * EXTENSIONS
    index = (i * h + head).to(tl.int64)
    row = index * d + at
    w, one, two = _row_of_weight(weight, first, second, row, columns, MODE, PIECES, WIDTH)
    for r in tl.static_range(EXTENSIONS):
        next_row = row + h.to(tl.int64) * d
        there = tl.where(i + r + 1 < M + N, columns, 0)
        if r + 1 < EXTENSIONS:
            ahead = _row_of_weight(weight, first, second, next_row, there, MODE, PIECES, WIDTH)
        if i + r < M + N:
            square += _update(
                index, at, d, _scaled(rows[r + 1], scale, PIECES), w, one, two, weight, shadow,
                first, second, stored, numbers, hyper, MODE, SEED, PIECES, WIDTH,
            )  # fmt: skip
            if chunk == 0:
                of_bias = sums[r + 1] * scale
                square_of_bias += of_bias * of_bias
                _update_bias(
                    of_head + (i + r) * bias_of_row, of_bias, bias, bias_first, bias_second,
                    bias_hyper, MODE,
                )  # fmt: skip
        if r + 1 < EXTENSIONS:
            row, index = next_row, index + h
            w, one, two = ahead
    if MODE != GRADIENT:
        tl.store(squares + tl.program_id(0), tl.sum(square) + square_of_bias)


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
