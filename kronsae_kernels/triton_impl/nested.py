"""Reconstructions from nested prefixes of the dictionary, and their gradients by the codes.

Prefix g of G holds the latents below bounds[g], which ascend. A latent's group is the first prefix
that holds it; latents that none holds are group G. Codes are first put in the order of their
groups: then the reconstruction from a prefix is a running sum, and each row of the table is
gathered and added once, however many prefixes hold it.

`values` and `columns` are [tokens, k], `table` [F, d], `bounds` [G] int32. Sums are float32, in a
fixed order.
"""

import triton
import triton.language as tl

from kronsae_kernels.triton_impl.device import compose, rounded

BEYOND = tl.constexpr(2**31 - 1)  # no latent has this index


@triton.jit
def group_codes(values, extension, columns, bounds, starts, slots, of_slot, by_group, weights, k,
                prefixes, eps, ROOT: tl.constexpr, ROWS: tl.constexpr,
                PLACES: tl.constexpr):  # fmt: skip
    """Codes in the order of their groups, stably: group g has places starts[g] to starts[g + 1].

    starts [tokens, G + 1]; by_group [tokens, k] the columns, slots [tokens, k] where they come
    from, all int32. weights [tokens, k] float32: the values, if there are any (composed of two
    factors, if there is an extension). ROWS: of_slot [tokens, k], for each code as it was given,
    token G + its group (G - 1 for those of no prefix). A column of -1 is in no prefix.
    Grid (tokens,).
    """
    token = tl.program_id(0).to(tl.int64)
    at = token * k
    s = tl.arange(0, PLACES)
    first = tl.full((), 0, tl.int32)
    low = first
    for group in range(0, prefixes + 1):
        tl.store(starts + token * (prefixes + 1) + group, first)
        last = tl.minimum(group, prefixes - 1)
        high = tl.where(group < prefixes, tl.load(bounds + last), BEYOND)
        for start in range(0, k, PLACES):
            slot = start + s
            column = tl.load(columns + at + slot, mask=slot < k, other=BEYOND).to(tl.int32)
            column = tl.where(column < 0, BEYOND - 1, column)
            here = (column >= low) & (column < high)
            chosen = here.to(tl.int32)
            to = at + first + tl.cumsum(chosen, 0) - chosen
            tl.store(by_group + to, column, mask=here)
            tl.store(slots + to, slot, mask=here)
            if values is not None:
                value = tl.load(values + at + slot, mask=here, other=0.0)
                if extension is not None:
                    other = tl.load(extension + at + slot, mask=here, other=0.0)
                    value = compose(value * other, eps, ROOT)
                tl.store(weights + to, value.to(tl.float32), mask=here)
            if ROWS:
                row = tl.zeros([PLACES], tl.int32) + (token * prefixes + last).to(tl.int32)
                tl.store(of_slot + at + slot, row, mask=here)
            first += tl.sum(chosen)
        low = high


@triton.jit
def _add_rows(total, weights, by_group, start, end, table, c, columns, d, ROWS: tl.constexpr):
    """total + sum of weight * table[column] over places start to end; c < columns are real."""
    for at in range(start, end, ROWS):
        for s in tl.static_range(ROWS):
            entry = tl.minimum(at + s, end - 1)
            columns_of_row = tl.where(at + s < end, columns, 0)
            column = tl.load(by_group + entry).to(tl.int64)
            row = tl.load(table + column * d + c, mask=c < columns_of_row, other=0.0)
            total += row.to(tl.float32) * tl.load(weights + entry)
    return total


@triton.jit
def nested_sums(weights, by_group, starts, table, bias, out, k, d, prefixes,
                ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """out[b, g] = sum of weight * table[column] over the codes of groups up to g, + bias.

    out [tokens, G, d]; codes as `group_codes` leaves them. ROWS rows are on their way at once.
    Grid (tokens, d / WIDTH).
    """
    token = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    if bias is not None:
        total = tl.load(bias + c, mask=c < d, other=0.0).to(tl.float32)
    weights += token * k
    by_group += token * k
    starts += token * (prefixes + 1)
    out += token * prefixes * d
    start = tl.load(starts)
    for group in range(0, prefixes):
        end = tl.load(starts + group + 1)
        total = _add_rows(total, weights, by_group, start, end, table, c, d, d, ROWS)
        tl.store(out + c, rounded(total, out.dtype.element_ty), mask=c < d)
        out += d
        start = end


@triton.jit
def nested_errors(weights, by_group, starts, table, bias, x, suffixes, sums, tokens, k, d,
                  PREFIXES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """`nested_sums` minus x, and `suffix_sums` of that: of the errors only their sums are written.

    suffixes [tokens, PREFIXES, d].  sums [3, tokens]: squared norm of all errors of a token, and
    (the last) of that with all latents; the other row is left as it is. Grid (tokens,).
    """
    token = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, WIDTH)
    weights += token * k
    by_group += token * k
    starts += token * (PREFIXES + 1)
    x += token * d
    suffixes += token * PREFIXES * d
    of_all = tl.zeros([WIDTH], tl.float32)
    of_last = of_all
    for begin in range(0, d, WIDTH):
        columns = d - begin
        total = -tl.load(x + begin + c, mask=c < columns, other=0.0).to(tl.float32)
        if bias is not None:
            total += tl.load(bias + begin + c, mask=c < columns, other=0.0).to(tl.float32)
        errors = ()
        start = tl.load(starts)
        for group in tl.static_range(PREFIXES):
            end = tl.load(starts + group + 1)
            total = _add_rows(
                total, weights, by_group, start, end, table + begin, c, columns, d, ROWS
            )
            errors = errors + (total,)
            of_all += total * total
            start = end
        of_last += total * total
        suffix = tl.zeros([WIDTH], tl.float32)
        for step in tl.static_range(PREFIXES):
            suffix += errors[PREFIXES - 1 - step]
            into = suffixes + (PREFIXES - 1 - step) * d + begin + c
            tl.store(into, rounded(suffix, suffixes.dtype.element_ty), mask=c < columns)
    tl.store(sums + token, tl.sum(of_all))
    tl.store(sums + 2 * tokens + token, tl.sum(of_last))


@triton.jit
def suffix_sums(d_out, suffixes, d, prefixes, PREFIXES: tl.constexpr, WIDTH: tl.constexpr):
    """suffixes[b, g] = sum of d_out[b, g'] over g' >= g: [tokens, G, d] float32.

    That is what a latent of group g gets from all prefixes that hold it. PREFIXES are on their way
    at once. Grid (tokens, d / WIDTH).
    """
    token = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    for last in range(prefixes - 1, -1, -PREFIXES):
        for step in tl.static_range(PREFIXES):
            columns = tl.where(last >= step, d, 0)
            at = (token * prefixes + tl.maximum(last - step, 0)) * d + c
            total += tl.load(d_out + at, mask=c < columns, other=0.0).to(tl.float32)
            tl.store(suffixes + at, total, mask=c < columns)


@triton.jit
def nested_dots(suffixes, by_group, slots, of_slot, starts, table, d_values, k, d, prefixes,
                ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """d_values[b, s] = suffixes[of_slot[b, s]] . table[columns[b, s]]; 0 where no prefix holds it.

    Codes are taken in the order of their groups, so that neighbours read the same suffix.
    Grid (tokens, k / ROWS).
    """
    token = tl.program_id(0).to(tl.int64)
    entry, c = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = entry < k
    held = entry < tl.load(starts + token * (prefixes + 1) + prefixes)
    slot = tl.load(slots + token * k + entry, mask=inside, other=0)
    row = tl.load(by_group + token * k + entry, mask=held, other=0).to(tl.int64)
    of_code = tl.load(of_slot + token * k + slot, mask=held, other=0).to(tl.int64)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, d, WIDTH):
        mask = held[:, None] & (c < d - start)[None, :]
        at = start + c[None, :]
        part = tl.load(table + row[:, None] * d + at, mask=mask, other=0.0)
        suffix = tl.load(suffixes + of_code[:, None] * d + at, mask=mask, other=0.0)
        total += part.to(tl.float32) * suffix.to(tl.float32)
    dots = rounded(tl.sum(total, 1), d_values.dtype.element_ty)
    tl.store(d_values + token * k + slot, dots, mask=inside)
