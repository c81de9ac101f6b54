"""Exact selection of the k largest latents of a token, without the [B, F] scores.

One idea, three times: if a set of latents is cut into intervals of consecutive indices, the k
largest latents (ties: lowest index first) lie in the k intervals with the largest maxima (ties:
first interval first), since each of those holds a latent that precedes all of any other interval.
So: the k first heads of all, the k first (head, base) rows of those, the k first latents of those.
For a dense encoder, a "head" is a group of consecutive columns, and there are no rows.

Any superset of the k first intervals serves as well, so a cut stops as soon as what is left fits
into a list of `cap` places. Lists are in no particular order, and padded with -1.

Where a mask allows fewer than k latents, the places left over have index -1 and factors 0.

Scores compete as int32 keys (`device.key_of`). Pre-latents are [tokens, m + n, h] (i-major), or
[tokens, F] for a dense encoder. One program a token.
"""

import triton
import triton.language as tl

from kronsae_kernels.triton_impl.device import (
    LAST,
    MASKED,
    PADDING,
    factor,
    key_of,
    maximum,
    minimum,
)


@triton.jit
def _count(flags):
    return tl.sum(flags.to(tl.int32))


@triton.jit
def _middle(low, high):
    """Mean of two int32, rounded down, without overflow."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def _cut(keys, ids, low, high, k, cap):
    """(keys, low, bound, left): take keys > low, and those == low with id < bound: left, k to cap.

    In the keys that are returned, what is not taken of those == low is padding: take all >= low.
    `low` comes in as a key that at least k have or exceed, `high` as one that none exceeds.
    Bisection on the key, then, if ties at the cut leave more than `cap`, on the id: the k first
    are left.
    """
    high += 1
    left = _count(keys >= low)
    while (left > cap) & (low + 1 < high):
        middle = _middle(low, high)
        count = _count(keys >= middle)
        enough = count >= k
        left = tl.where(enough, count, left)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    bound = tl.full((), LAST, tl.int32)
    if left > cap:
        missing = k - _count(keys > low)
        below = tl.full((), 0, tl.int32)
        above = tl.max(ids) + 1
        while below + 1 < above:
            middle = _middle(below, above)
            fits = _count((keys == low) & (ids < middle)) <= missing
            below = tl.where(fits, middle, below)
            above = tl.where(fits, above, middle)
        bound = below
        left = k
        keys = tl.where((keys == low) & (ids >= bound), PADDING, keys)
    return keys, low, bound, left


@triton.jit
def _bounds(keys, k, enough):
    """(low, high): none of keys [C] exceeds high, and k or more have or exceed low.

    Where C maxima of groups are given, low is a key that k or more of the groups' members have or
    exceed, and few more than k. Three keys between the bounds are counted in one sum, until
    `enough` or fewer are left from low on. For C < k, low is that of masked latents.
    """
    bits: tl.constexpr = 10 if keys.shape[0] < 1024 else 20  # of a count
    dtype: tl.constexpr = tl.int32 if keys.shape[0] < 1024 else tl.int64
    high, low = tl.max(keys), tl.max(keys ^ -1) ^ -1  # x ^ -1 reverses the order
    possible = k <= keys.shape[0]
    left = tl.where(possible, enough + 1, 0)
    gap = (high - low).to(tl.uint32, bitcast=True)  # that of two int32 may be no int32
    while (left > enough) & (gap > 0):
        quarter = gap // 4 + 1
        half, most = tl.minimum(2 * quarter, gap), tl.minimum(3 * quarter, gap)
        first = (keys >= low + quarter.to(tl.int32, bitcast=True)).to(dtype)
        second = (keys >= low + half.to(tl.int32, bitcast=True)).to(dtype)
        third = (keys >= low + most.to(tl.int32, bitcast=True)).to(dtype)
        counts = tl.sum(first + (second << bits) + (third << 2 * bits))
        mask: tl.constexpr = 2**bits - 1
        one, two = (counts & mask).to(tl.int32), ((counts >> bits) & mask).to(tl.int32)
        three = (counts >> 2 * bits).to(tl.int32)
        below = tl.where(three >= k, most, tl.where(two >= k, half, quarter))
        above = tl.where(three >= k, gap, tl.where(two >= k, most - 1, half - 1))
        left = tl.where(three >= k, three, tl.where(two >= k, two, one))
        above = tl.where(one >= k, above, quarter - 1)
        below = tl.where(one >= k, below, 0)
        left = tl.where(one >= k, left, enough + 1)
        low += below.to(tl.int32, bitcast=True)
        gap = above - below
    return tl.maximum(tl.where(possible, low, MASKED), MASKED), high


@triton.jit
def _store_list(out, ids, take, left, CAP: tl.constexpr):
    """Write the ids [C] that are taken, `left` of them, to out [CAP], and -1 behind them."""
    chosen = take.to(tl.int32)
    tl.store(out + tl.cumsum(chosen, 0) - chosen, ids, mask=take)
    slot = tl.arange(0, CAP)
    tl.store(out + slot, tl.full([CAP], -1, tl.int32), mask=slot >= left)


@triton.jit
def _head_keys(pre, mask, h, head, M: tl.constexpr, N: tl.constexpr, SIGNED: tl.constexpr,
               WHOLE: tl.constexpr):  # fmt: skip
    """Key of the largest product of each head (any shape), from i-major pre-latents of a token.

    Rounding is monotone, so the product of the maxima is the maximum of the rounded products; of a
    product of signed factors, the largest is at a corner. With a mask (uint8 [m n, h]) all are
    formed. WHOLE: every head is below h.
    """
    inside = tl.full(head.shape, True, tl.int1) if WHOLE else head < h
    if mask is not None:
        key = tl.full(head.shape, MASKED, tl.int32)
        for i in tl.range(0, M):
            u = factor(tl.load(pre + i * h + head, mask=inside, other=0.0), SIGNED)
            for j in tl.range(0, N):
                v = factor(tl.load(pre + (M + j) * h + head, mask=inside, other=0.0), SIGNED)
                allowed = tl.load(mask + (i * N + j) * h + head, mask=inside, other=0) != 0
                key = tl.maximum(key, tl.where(allowed, key_of(u * v, SIGNED), MASKED))
    else:
        u = tl.load(pre + head, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(pre + M * h + head, mask=inside, other=0.0).to(tl.float32)
        u_low, v_low = u, v
        for i in tl.static_range(1, M):
            more = tl.load(pre + i * h + head, mask=inside, other=0.0).to(tl.float32)
            u = maximum(u, more)
            if SIGNED:
                u_low = minimum(u_low, more)
        for j in tl.static_range(1, N):
            more = tl.load(pre + (M + j) * h + head, mask=inside, other=0.0).to(tl.float32)
            v = maximum(v, more)
            if SIGNED:
                v_low = minimum(v_low, more)
        score = factor(u, SIGNED) * factor(v, SIGNED)
        if SIGNED:
            score = maximum(maximum(score, u_low * v_low), maximum(u * v_low, u_low * v))
        key = key_of(score, SIGNED)
    return tl.where(inside, key, PADDING)


@triton.jit
def _group_keys(pre, mask, size, head, GROUP: tl.constexpr):
    """Key of the largest of GROUP consecutive columns, for each group in `head` [A, B]."""
    column = head[:, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
    inside = column < size
    key = key_of(factor(tl.load(pre + column, mask=inside, other=0.0), False), False)
    if mask is not None:
        allowed = tl.load(mask + column, mask=inside, other=0) != 0
        key = tl.where(allowed, key, MASKED)
    return tl.max(tl.where(inside, key, PADDING), 2)


@triton.jit
def select_heads(pre, mask, heads, keys, stride, size, h, k, cap,
                 M: tl.constexpr, N: tl.constexpr, SIGNED: tl.constexpr, DENSE: tl.constexpr,
                 CAP: tl.constexpr, WHOLE: tl.constexpr, CHUNKS: tl.constexpr,
                 LANES: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """The k to cap first heads among CHUNKS * LANES of them: heads [tokens, splits, CAP].

    pre [tokens, stride]. DENSE: h groups of M columns, of `size` columns. keys: as heads, if
    there are several splits, else None. WHOLE: they are h heads together, none beyond. A lower
    bound is found among the maxima of GROUP * CHUNKS heads, those of a thread.
    Grid (tokens, splits).
    """
    token = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1) if keys is not None else 0
    chunk, lane = tl.arange(0, CHUNKS), tl.arange(0, LANES)
    ids = (split * CHUNKS + chunk[:, None]) * LANES + lane[None, :]
    if DENSE:
        key = _group_keys(pre + token * stride, mask, size, ids, M)
    else:
        key = _head_keys(pre + token * stride, mask, h, ids, M, N, SIGNED, WHOLE)
    # Of this split's heads, all may be wanted.
    here = tl.minimum(k, h - split * (CHUNKS * LANES))
    of_group = tl.max(tl.reshape(tl.max(key, 0), [LANES // GROUP, GROUP]), 1)
    low, high = _bounds(of_group, here, here + (cap - here) // 4)
    key, low, _, left = _cut(key, ids, low, high, here, cap)
    take = key >= low
    # Places: lane after lane, and within a lane chunk after chunk.
    chosen = take.to(tl.int32)
    in_lane = tl.sum(chosen, 0)
    to = (tl.cumsum(in_lane, 0) - in_lane)[None, :] + tl.cumsum(chosen, 0) - chosen
    out = (token * tl.num_programs(1) + split) * CAP
    tl.store(heads + out + to, ids, mask=take)
    slot = tl.arange(0, CAP)
    tl.store(heads + out + slot, tl.full([CAP], -1, tl.int32), mask=slot >= left)
    if keys is not None:
        tl.store(keys + out + to, key, mask=take)
        tl.store(keys + out + slot, tl.full([CAP], PADDING, tl.int32), mask=slot >= left)


@triton.jit
def _load_list(lists, keys, start, length, SIZE: tl.constexpr):
    """(key, id) of SIZE places of a list from `start` on."""
    entry = start + tl.arange(0, SIZE)
    key = tl.load(keys + entry, mask=entry < length, other=PADDING)
    return key, tl.load(lists + entry, mask=entry < length, other=-1)


@triton.jit
def merge_lists(lists, keys, kept, ranked, length, k, cap, CAP: tl.constexpr,
                CANDIDATES: tl.constexpr, PART: tl.constexpr):  # fmt: skip
    """The k to cap first of ids in lists [tokens, length] with keys: kept [tokens, CAP].

    Or, if that is None, the k first, as ranked [tokens, k] of `select_latents`. They are read
    twice, PART at a time when they are written: keys, ids, places and addresses of all do not fit
    into registers.
    """
    token = tl.program_id(0).to(tl.int64)
    lists += token * length
    keys += token * length
    every_key, every_id = _load_list(lists, keys, 0, length, CANDIDATES)
    low = tl.full((), MASKED, tl.int32)
    _, low, bound, left = _cut(every_key, every_id, low, tl.max(every_key), k, cap)
    written = tl.full((), 0, tl.int32)
    for start in range(0, length, PART):
        key, ids = _load_list(lists, keys, start, length, PART)
        take = (key > low) | ((key == low) & (ids < bound))
        chosen = take.to(tl.int32)
        if ranked is not None:
            _store_ranks(ranked + token * k + written, key, ids, take)
        else:
            to = written + tl.cumsum(chosen, 0) - chosen
            tl.store(kept + token * CAP + to, ids, mask=take)
        written += tl.sum(chosen)
    if ranked is None:
        slot = tl.arange(0, CAP)
        rest = tl.full([CAP], -1, tl.int32)
        tl.store(kept + token * CAP + slot, rest, mask=slot >= left)


@triton.jit
def _store_ranks(ranked, key, ids, take):
    """Write the key, then 2^31 - 1 - id, 32 bits each, of ids [C] that are taken, in no order."""
    chosen = take.to(tl.int32)
    rank = (key.to(tl.int64) << 32) | (ids ^ LAST).to(tl.int64)  # x ^ LAST: 2^31 - 1 - x
    tl.store(ranked + tl.cumsum(chosen, 0) - chosen, rank, mask=take)


@triton.jit
def _listed(lists, start, slot, size):
    """Entries of the list at `start` (None: 0 to size): (them or 0, whether they are there)."""
    if lists is None:
        listed = tl.where(slot < size, slot, -1)
    else:
        listed = tl.load(lists + start + slot)
    return tl.where(listed >= 0, listed, 0), listed >= 0


@triton.jit
def _row_keys(pre, mask, head, there, h,
              M: tl.constexpr, N: tl.constexpr, M_PADDED: tl.constexpr, N_PADDED: tl.constexpr,
              SIGNED: tl.constexpr):  # fmt: skip
    """(key, id) of the rows of heads [H], flattened; id = head * m + base."""
    i, j = tl.arange(0, M_PADDED), tl.arange(0, N_PADDED)
    of_base = there[:, None] & (i < M)[None, :]
    u = factor(tl.load(pre + i[None, :] * h + head[:, None], mask=of_base, other=0.0), SIGNED)
    ids = head[:, None] * M + i[None, :]
    if mask is not None:
        key = tl.full(ids.shape, MASKED, tl.int32)
        for extension in range(0, N):
            v = factor(tl.load(pre + (M + extension) * h + head, mask=there, other=0.0), SIGNED)
            allowed = tl.load(mask + ids * N + extension, mask=of_base, other=0) != 0
            key = tl.maximum(key, tl.where(allowed, key_of(u * v[:, None], SIGNED), MASKED))
    else:
        real, least = (j < N)[None, :], float("-inf")
        at = pre + (M + j)[None, :] * h + head[:, None]
        v = factor(tl.load(at, mask=there[:, None] & real, other=0.0), SIGNED)
        highest = tl.reduce(tl.where(real, v, least), 1, maximum)[:, None]
        score = u * highest
        if SIGNED:
            lowest = tl.reduce(tl.where(real, v, -least), 1, minimum)[:, None]
            score = maximum(score, u * lowest)
        key = key_of(score, SIGNED)
    key = tl.where(of_base, key, PADDING)
    return tl.reshape(key, [key.numel]), tl.reshape(ids, [ids.numel])


@triton.jit
def _latent_keys(pre, mask, listed, there, size, h,
                 M: tl.constexpr, N: tl.constexpr, M_PADDED: tl.constexpr, N_PADDED: tl.constexpr,
                 SIGNED: tl.constexpr, DENSE: tl.constexpr, OF_HEADS: tl.constexpr):  # fmt: skip
    """(key, latent) of the latents of heads (OF_HEADS) or rows [L], flattened."""
    i, j = tl.arange(0, M_PADDED), tl.arange(0, N_PADDED)
    of_base = there[:, None]
    if OF_HEADS:
        head = listed
        row = listed[:, None] * M + i[None, :]
        of_base = of_base & (i < M)[None, :]
    else:
        head = listed // M
        row = listed[:, None]
    ids = row[:, :, None] * N + j[None, None, :]
    inside = of_base[:, :, None] & (j < N)[None, None, :] & (ids < size)
    if DENSE:
        score = factor(tl.load(pre + ids, mask=inside, other=0.0), SIGNED)
    else:
        at = (row - head[:, None] * M) * h + head[:, None]
        u = factor(tl.load(pre + at, mask=of_base, other=0.0), SIGNED)
        at = (M + j)[None, :] * h + head[:, None]
        v = tl.load(pre + at, mask=there[:, None] & (j < N)[None, :], other=0.0)
        score = u[:, :, None] * factor(v, SIGNED)[:, None, :]
    key = key_of(score, SIGNED)
    if mask is not None:
        allowed = tl.load(mask + ids, mask=inside, other=0) != 0
        key = tl.where(allowed, key, MASKED)
    key = tl.where(inside, key, PADDING)
    return tl.reshape(key, [key.numel]), tl.reshape(ids, [ids.numel])


@triton.jit
def list_keys(pre, mask, lists, ids, keys, stride, size, h,
              M: tl.constexpr, N: tl.constexpr, M_PADDED: tl.constexpr, N_PADDED: tl.constexpr,
              SIGNED: tl.constexpr, DENSE: tl.constexpr, OF_ROWS: tl.constexpr,
              LISTED: tl.constexpr, PER: tl.constexpr, ENTRIES: tl.constexpr):  # fmt: skip
    """Keys and ids [tokens, LISTED * PER] of the rows of heads (OF_ROWS) or latents of rows listed.

    Where they are too many for the program that selects. Grid (tokens, LISTED / ENTRIES).
    """
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pre += token * stride
    slot = part * ENTRIES + tl.arange(0, ENTRIES)
    if OF_ROWS:
        listed, there = _listed(lists, token * LISTED, slot, h)
        key, id = _row_keys(pre, mask, listed, there, h, M, N, M_PADDED, N_PADDED, SIGNED)
    else:
        listed, there = _listed(lists, token * LISTED, slot, tl.cdiv(size, N))
        key, id = _latent_keys(pre, mask, listed, there, size, h, M, N, 1, N_PADDED, SIGNED, DENSE,
                               False)  # fmt: skip
    at = (token * LISTED + part * ENTRIES) * PER + tl.arange(0, ENTRIES * PER)
    tl.store(keys + at, key)
    tl.store(ids + at, id)


@triton.jit
def select_rows(pre, mask, heads, rows, stride, h, k, cap,
                M: tl.constexpr, N: tl.constexpr, M_PADDED: tl.constexpr, N_PADDED: tl.constexpr,
                SIGNED: tl.constexpr, HEADS: tl.constexpr, CAP: tl.constexpr):  # fmt: skip
    """The k to cap first (head, base) rows, head * m + base, of heads [tokens, HEADS].

    heads None: of all h. Result rows [tokens, CAP].
    """
    token = tl.program_id(0).to(tl.int64)
    head, there = _listed(heads, token * HEADS, tl.arange(0, HEADS), h)
    key, ids = _row_keys(pre + token * stride, mask, head, there, h, M, N, M_PADDED, N_PADDED,
                         SIGNED)  # fmt: skip
    key, low, _, left = _cut(key, ids, tl.full((), MASKED, tl.int32), tl.max(key), k, cap)
    take = key >= low
    _store_list(rows + token * CAP, ids, take, left, CAP)


@triton.jit
def select_latents(pre, mask, lists, ranked, indices, base, extension, stride, size, h, k,
                   M: tl.constexpr, N: tl.constexpr, M_PADDED: tl.constexpr,
                   N_PADDED: tl.constexpr, SIGNED: tl.constexpr, DENSE: tl.constexpr,
                   OF_HEADS: tl.constexpr, LISTED: tl.constexpr, RANK: tl.constexpr,
                   K_PADDED: tl.constexpr):  # fmt: skip
    """The k first latents in lists [tokens, LISTED] of heads (OF_HEADS) or of rows.

    ranked [tokens, k] int64, in no order: what comes first is larger. RANK: they are sorted at once
    (see `rank_latents`).
    DENSE: rows are groups of N columns, of `size`. lists None: all there are.
    """
    token = tl.program_id(0).to(tl.int64)
    pre += token * stride
    entries = h if OF_HEADS else tl.cdiv(size, N)
    listed, there = _listed(lists, token * LISTED, tl.arange(0, LISTED), entries)
    key, ids = _latent_keys(pre, mask, listed, there, size, h, M, N, M_PADDED, N_PADDED, SIGNED,
                            DENSE, OF_HEADS)  # fmt: skip
    key, low, _, _ = _cut(key, ids, tl.full((), MASKED, tl.int32), tl.max(key), k, k)
    ranked += token * k
    _store_ranks(ranked, key, ids, key >= low)
    if RANK:
        tl.debug_barrier()  # the program reads what it wrote
        out = token * k
        _rank(pre, ranked, indices + out, base + out, extension + out, h, k,
              M, N, SIGNED, DENSE, True, K_PADDED)  # fmt: skip


@triton.jit
def _rank(pre, ranked, indices, base, extension, h, k,
          M: tl.constexpr, N: tl.constexpr, SIGNED: tl.constexpr, DENSE: tl.constexpr,
          SORT: tl.constexpr, K_PADDED: tl.constexpr):  # fmt: skip
    """`rank_latents` of one token."""
    slot = tl.arange(0, K_PADDED)
    inside = slot < k
    rank = tl.load(ranked + slot, mask=inside, other=-(2**63))
    if SORT:
        rank = tl.sort(rank, descending=True)
    there = inside & ((rank >> 32).to(tl.int32) > MASKED)
    latent = tl.where(there, (rank & 0xFFFFFFFF).to(tl.int32) ^ LAST, 0)
    tl.store(indices + slot, tl.where(there, latent, -1).to(tl.int64), mask=inside)
    if DENSE:
        value = factor(tl.load(pre + latent, mask=there, other=0.0), SIGNED)
        tl.store(base + slot, value, mask=inside)
    else:
        row = latent // N
        head = row // M
        u = tl.load(pre + (row - head * M) * h + head, mask=there, other=0.0)
        v = tl.load(pre + (M + latent - row * N) * h + head, mask=there, other=0.0)
        tl.store(base + slot, factor(u, SIGNED), mask=inside)
        tl.store(extension + slot, factor(v, SIGNED), mask=inside)


@triton.jit
def rank_latents(pre, ranked, indices, base, extension, stride, h, k,
                 M: tl.constexpr, N: tl.constexpr, SIGNED: tl.constexpr, DENSE: tl.constexpr,
                 K_PADDED: tl.constexpr):  # fmt: skip
    """indices int64 and the two factors from sorted ranked [tokens, k], first latent first.

    A masked latent, which only comes where fewer than k are allowed, has index -1 and factors 0.
    DENSE: base is the value, extension is not written.
    """
    token = tl.program_id(0).to(tl.int64)
    out = token * k
    _rank(pre + token * stride, ranked + out, indices + out, base + out, extension + out, h, k,
          M, N, SIGNED, DENSE, False, K_PADDED)  # fmt: skip
