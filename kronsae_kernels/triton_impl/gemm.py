"""The encoder's matrix product and the selection of heads in one pass: no pre-latent is written
but those of heads that may hold one of their token's k first latents.

The other way is `torch.addmm` (cuBLAS), which writes all of them, and `select_heads`; which is
faster is for measurements to say (ONE_PASS of "encode" in configs.json).

A program of `encode_heads` owns a block of tokens and a range of the heads, whose tiles it makes
one after the other. For each of its tokens it keeps a list of heads, in ascending order: a head is
appended where its key (`select._head_keys`) exceeds the token's bound. When one more tile might
not fit into the fullest list, all lists are cut to the k to `cap` first of their heads, and the
key of the last of these is the new bound: k heads of lower index have it or exceed it, so of all
heads that follow, one that does not exceed it comes after those k (ties: lowest index first). So
a list always has the k first heads of those seen, whatever the numbers and their order, and never
overflows. About k ln(h / k) heads are appended; where the keys ascend, all are, and lists are cut
every few tiles: slow, as exact.

`gather_heads` takes the k first of a token's lists, one from each range of heads. Their pre-latents
are those of an encoder with k heads, from which the k first latents are selected as from any other;
`name_latents` gives these the indices they have among all heads.

What it costs on a Hopper, by what it compiles to (nothing is measured). A tile of T tokens and C
columns is T C d multiply-adds, of which an SM makes 2048 a cycle, and reads 2 (T + C) d bytes of
operands through the L2 cache: 53 bytes a cycle for T = 128 and C = 192, 48 for C = 256, where
cuBLAS, which sends a tile to two SMs at once, needs 32. What follows a tile's product, 1,600 to
1,900 instructions of each of 8 warps, is 3,300 to 3,700 cycles more, which no product hides: a
tenth of a tile at d = 2304. So the other way is the default.
"""

import triton
import triton.language as tl

from kronsae_kernels.triton_impl.device import (
    MASKED,
    PADDING,
    dot,
    factor,
    key_of,
    maximum,
    minimum,
    rounded,
)

KEYS, IDS, PRE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Planes of a program's lists, each int32 [TOKENS, CAPACITY]: keys, heads, pre-latents by two."""


@triton.jit
def _tile_of_x(x, token, c, tokens, d,
               TOKENS: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """Columns from c of the tokens from `token`: [TOKENS, WIDTH], 0 outside."""
    if TMA:
        part = x.load([token, c])
    else:
        row, column = token + tl.arange(0, TOKENS), c + tl.arange(0, WIDTH)
        at = x + row.to(tl.int64)[:, None] * d + column[None, :]
        part = tl.load(at, mask=(row < tokens)[:, None] & (column < d)[None, :], other=0.0)
    return part


@triton.jit
def _tile_of_weight(weight, first, rows, head, c, h, d, PADDED: tl.constexpr,
                    HEADS: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """Rows `first` to `first` + PADDED of the heads from `head`: [PADDED * HEADS, WIDTH].

    The first `rows` are meant; the others hold anything. 0 outside of the weight.
    """
    if TMA:
        part = tl.reshape(weight.load([first, head, c]), [PADDED * HEADS, WIDTH])
    else:
        line, column = tl.arange(0, PADDED * HEADS), c + tl.arange(0, WIDTH)
        real = (line // HEADS < rows) & (head + line % HEADS < h)
        at = weight + ((first + line // HEADS).to(tl.int64) * h + head + line % HEADS)[:, None] * d
        at += column[None, :]
        part = tl.load(at, mask=real[:, None] & (column < d)[None, :], other=0.0)
    return part


@triton.jit
def _pre_latents(product, bias, PADDED: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
                 dtype: tl.constexpr):  # fmt: skip
    """product [T, PADDED * HEADS] + bias [ROWS * HEADS], rounded, as [T, PADDED, HEADS]."""
    if bias is not None:
        line = tl.arange(0, PADDED * HEADS)
        of_line = tl.load(bias + line, mask=line < ROWS * HEADS, other=0.0)
        product += of_line.to(tl.float32)[None, :]
    return tl.reshape(rounded(product, dtype), [product.shape[0], PADDED, HEADS])


@triton.jit
def _extreme(pre, ROWS: tl.constexpr, SIGNED: tl.constexpr, LOWEST: tl.constexpr):
    """Largest (or smallest) factor of each head [T, HEADS], from pre [T, PADDED, HEADS]."""
    value = pre.to(tl.float32)
    real = (tl.arange(0, pre.shape[1]) < ROWS)[None, :, None]
    if LOWEST:
        result = tl.reduce(tl.where(real, value, float("inf")), 1, minimum)
    else:
        result = tl.reduce(tl.where(real, value, float("-inf")), 1, maximum)
    return factor(result, SIGNED)


@triton.jit
def _store_pre_latents(planes, place, pre, keep, ROWS: tl.constexpr, PLANE: tl.constexpr):
    """Store pre [T, PADDED, HEADS] of the heads in `keep` [T, HEADS], two rows in each plane."""
    bits = pre.to(tl.uint16, bitcast=True).to(tl.int32)
    row = tl.arange(0, pre.shape[1])[None, :, None]
    for pair in tl.static_range((ROWS + 1) // 2):
        word = tl.sum(tl.where(row == 2 * pair, bits, 0), 1)
        if 2 * pair + 1 < ROWS:
            word |= tl.sum(tl.where(row == 2 * pair + 1, bits, 0), 1) << 16
        tl.store(planes + pair * PLANE + place, word, mask=keep)


@triton.jit
def _count(flags):
    """Flags set along the last axis: a sum of float32, as LLVM packs integer flags into bits."""
    return tl.sum(tl.where(flags, 1.0, 0.0), 1).to(tl.int32)


@triton.jit
def _first(keys, low, k, cap):
    """(low, take): the k to cap first of keys [T, C], and a key that k of them have or exceed.

    `low` [T] comes in as such a key. Of equal keys, those on the left come first.
    """
    high = tl.max(keys, 1) + 1
    left = _count(keys >= low[:, None])
    while tl.max(((left > cap) & (low + 1 < high)).to(tl.int32)) > 0:
        middle = (low & high) + ((low ^ high) >> 1)
        count = _count(keys >= middle[:, None])
        enough = count >= k
        left = tl.where(enough, count, left)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    take = keys >= low[:, None]
    if tl.max(left) > cap:
        # Fewer than k exceed `low` where more than cap are left: there the first of the equal go.
        equal = (keys == low[:, None]).to(tl.int32)
        room = cap - (left - tl.sum(equal, 1))
        take = take & ((equal == 0) | (tl.cumsum(equal, 1) <= room[:, None]))
    return low, take


@triton.jit
def _cut_lists(lists, counts, k, cap, PLANES: tl.constexpr, TOKENS: tl.constexpr,
               CAPACITY: tl.constexpr, CUT: tl.constexpr):  # fmt: skip
    """Cut each of a program's lists to the k to cap first; counts [2, TOKENS] follow.

    What is left moves to the front, in order, CUT tokens at a time.
    """
    for start in range(0, TOKENS, CUT):
        row, slot = start + tl.arange(0, CUT), tl.arange(0, CAPACITY)
        inside = slot[None, :] < tl.load(counts + row)[:, None]
        at = row[:, None] * CAPACITY + slot[None, :]
        key = tl.load(lists + at, mask=inside, other=PADDING)
        low, take = _first(key, tl.load(counts + TOKENS + row), k, cap)
        chosen = take.to(tl.int32)
        to = row[:, None] * CAPACITY + tl.cumsum(chosen, 1) - 1
        to = tl.where(take & (to < at), to, -1)
        for plane in tl.range(PLANES):
            of_plane = lists + plane * (TOKENS * CAPACITY)
            value = tl.load(of_plane + at, mask=to >= 0, other=0)
            tl.debug_barrier()  # what is overwritten was read
            tl.store(of_plane + to, value, mask=to >= 0)
        tl.store(counts + row, tl.sum(chosen, 1))
        tl.store(counts + TOKENS + row, low)


@triton.jit
def encode_heads(x, p_weight, q_weight, bias, lists, counts, tokens, d, h, splits, tiles, k,
                 cap, M: tl.constexpr, N: tl.constexpr, M_PADDED: tl.constexpr,
                 N_PADDED: tl.constexpr, SIGNED: tl.constexpr, DTYPE: tl.constexpr,
                 TOKENS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
                 CAPACITY: tl.constexpr, CUT: tl.constexpr, TMA: tl.constexpr,
                 FLATTEN: tl.constexpr):  # fmt: skip
    """Lists of heads, among which are the k first, of x [tokens, d] weight^T + bias.

    weight [m + n, h, d], bias [tiles in all, m + n, HEADS]. With TMA, x, p_weight and q_weight are
    descriptors of tiles of x and of the weight; else pointers, the latter two the same.
    lists [programs, planes, TOKENS, CAPACITY] int32; counts [programs, 2, TOKENS]: of its heads,
    and bound, a key that k of them have or exceed; program = block * splits + range.
    `tiles` of HEADS heads are one range. Grid (blocks of TOKENS tokens * splits,).
    """
    PLANE: tl.constexpr = TOKENS * CAPACITY
    OF_Q: tl.constexpr = PRE + (M + 1) // 2
    PLANES: tl.constexpr = OF_Q + (N + 1) // 2
    program = tl.program_id(0)
    token = program // splits * TOKENS
    tile = program % splits * tiles
    end = tl.minimum(tile + tiles, tl.cdiv(h, HEADS))
    lists += program.to(tl.int64) * (PLANES * PLANE)
    row = tl.arange(0, TOKENS)
    counts += program * (2 * TOKENS)
    count = tl.zeros([TOKENS], tl.int32)
    bound = tl.full([TOKENS], MASKED, tl.int32)
    while tile < end:
        fullest = tl.max(count)
        if fullest > CAPACITY - HEADS:
            # A cut starts from a key that k have. Before the first one, every head is in the list.
            tl.store(counts + row, count)
            tl.store(counts + TOKENS + row, bound)
            tl.debug_barrier()
            _cut_lists(lists, counts, k, cap, PLANES, TOKENS, CAPACITY, CUT)
            tl.debug_barrier()
            count = tl.load(counts + row)
            bound = tl.load(counts + TOKENS + row)
            fullest = tl.max(count)
        # As many tiles as are sure to fit: one pipelined loop without another in it.
        next_tile = tl.minimum(tile + (CAPACITY - fullest) // HEADS, end)
        for at in tl.range(tile, next_tile, flatten=FLATTEN):
            start = at * HEADS
            of_p = tl.zeros([TOKENS, M_PADDED * HEADS], tl.float32)
            of_q = tl.zeros([TOKENS, N_PADDED * HEADS], tl.float32)
            for c in range(0, d, WIDTH):
                part = _tile_of_x(x, token, c, tokens, d, TOKENS, WIDTH, TMA)
                of_base = _tile_of_weight(
                    p_weight, 0, M, start, c, h, d, M_PADDED, HEADS, WIDTH, TMA
                )
                of_extension = _tile_of_weight(
                    q_weight, M, N, start, c, h, d, N_PADDED, HEADS, WIDTH, TMA
                )
                of_p = dot(part, of_base.T, of_p)
                of_q = dot(part, of_extension.T, of_q)
            of_tile = bias
            if bias is not None:
                of_tile += at * ((M + N) * HEADS)
            p = _pre_latents(of_p, of_tile, M_PADDED, M, HEADS, DTYPE)
            if bias is not None:
                of_tile += M * HEADS
            q = _pre_latents(of_q, of_tile, N_PADDED, N, HEADS, DTYPE)
            u, v = _extreme(p, M, SIGNED, False), _extreme(q, N, SIGNED, False)
            score = u * v
            if SIGNED:
                u_low, v_low = _extreme(p, M, SIGNED, True), _extreme(q, N, SIGNED, True)
                score = maximum(maximum(score, u_low * v_low), maximum(u * v_low, u_low * v))
            head = start + tl.arange(0, HEADS)
            key = tl.where((head < h)[None, :], key_of(score, SIGNED), PADDING)
            keep = key > bound[:, None]
            so_far = tl.cumsum(keep.to(tl.int32), 1)
            entry = (row * CAPACITY + count)[:, None] + so_far - 1
            tl.store(lists + KEYS * PLANE + entry, key, mask=keep)
            heads = tl.broadcast_to(head[None, :], key.shape)
            tl.store(lists + IDS * PLANE + entry, heads, mask=keep)
            _store_pre_latents(lists + PRE * PLANE, entry, p, keep, M, PLANE)
            _store_pre_latents(lists + OF_Q * PLANE, entry, q, keep, N, PLANE)
            count += tl.max(so_far, 1)
        tile = next_tile
    tl.store(counts + row, count)
    tl.store(counts + TOKENS + row, bound)


@triton.jit
def gather_heads(lists, counts, heads, pre, splits, k, M: tl.constexpr, N: tl.constexpr,
                 TOKENS: tl.constexpr, CAPACITY: tl.constexpr,
                 CANDIDATES: tl.constexpr):  # fmt: skip
    """The k first heads of the lists of `encode_heads`, ascending: heads [tokens, k] int32.

    pre [tokens, m + n, k]: their pre-latents. One program a token.
    """
    PLANE: tl.constexpr = TOKENS * CAPACITY
    OF_Q: tl.constexpr = PRE + (M + 1) // 2
    PLANES: tl.constexpr = OF_Q + (N + 1) // 2
    token = tl.program_id(0)
    row = token % TOKENS
    candidate = tl.arange(0, CANDIDATES)
    slot, split = candidate % CAPACITY, candidate // CAPACITY
    program = token // TOKENS * splits + split
    of_list = counts + program * (2 * TOKENS) + row
    count = tl.load(of_list, mask=split < splits, other=0)
    inside = slot < count
    at = lists + program.to(tl.int64) * (PLANES * PLANE) + (row * CAPACITY + slot)
    key = tl.load(at + KEYS * PLANE, mask=inside, other=PADDING)
    head = tl.load(at + IDS * PLANE, mask=inside, other=0)
    # A key that k of one range have or exceed, k of all have or exceed.
    bound = tl.load(of_list + TOKENS, mask=split < splits, other=MASKED)
    # Ranges of heads follow each other, and a list ascends: so do all candidates.
    _, take = _first(key[None, :], tl.max(bound[None, :], 1), k, k)
    take = tl.reshape(take, [CANDIDATES])
    column = tl.cumsum(take.to(tl.int32), 0) - 1
    tl.store(heads + token.to(tl.int64) * k + column, head, mask=take)
    out = pre + token.to(tl.int64) * ((M + N) * k) + column
    for i in tl.static_range(M + N):
        if i < M:
            plane, high = PRE + i // 2, i % 2
        else:
            plane, high = OF_Q + (i - M) // 2, (i - M) % 2
        word = tl.load(at + plane * PLANE, mask=take, other=0) >> (16 * high)
        value = word.to(tl.int16).to(pre.dtype.element_ty, bitcast=True)
        tl.store(out + i * k, value, mask=take)


@triton.jit
def name_latents(indices, heads, size, k, LATENTS: tl.constexpr, WIDTH: tl.constexpr):
    """Rename latents of the gathered heads [tokens, k], LATENTS each, as those of all heads.

    indices int64, `size` = tokens * k of them, changed in place.
    """
    at = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    inside = at < size
    index = tl.load(indices + at, mask=inside, other=0)
    slot = index // LATENTS
    head = tl.load(heads + at // k * k + slot, mask=inside, other=0).to(tl.int64)
    tl.store(indices + at, head * LATENTS + (index - slot * LATENTS), mask=inside)
