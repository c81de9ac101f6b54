"""Every latent above a threshold of its own, without the [B, F] values.

A value grows with its product, so each threshold is turned, once a call, into a limit of products:
a latent is active if and only if its product exceeds its limit. A head's largest product shows at
once whether any of its latents can be active, and most heads have none.

Counted first, then written: token t's split of HEADS heads has places of its own, from the counts
of the splits before it. The order of the writes does not matter, as the latents are then sorted.
Pre-latents are [tokens, m + n, h] (i-major), or [tokens, h] for a dense encoder, h its latents.
"""

import triton
import triton.language as tl

from kronsae_kernels.triton_impl.device import LAST, compose, factor, key_of, number

INFINITY_BITS = tl.constexpr(0x7F800000)


@triton.jit
def product_limits(threshold, limits, size, eps, ROOT: tl.constexpr, WIDTH: tl.constexpr):
    """limits [size]: the largest float32 >= 0 whose value is not above threshold (float64).

    Infinity for a NaN, 0 where every product > 0 is above. Roots are rounded to the nearest, as
    torch's are on a GPU. Bisection on the bits of the float32 numbers >= 0, which order as the
    numbers do. Grid (size / WIDTH,).
    """
    f = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    least = tl.load(threshold + f, mask=f < size, other=0.0)
    # Products with these bits: from `high` on they are above, at `low` they are not (or it is 0).
    low = tl.zeros([WIDTH], tl.int32)
    high = low + (INFINITY_BITS + 1)
    for _ in range(31):
        middle = low + (high - low) // 2
        value = compose(middle.to(tl.float32, bitcast=True), eps, ROOT)
        above = value.to(tl.float64) > least
        high = tl.where(above, middle, high)
        low = tl.where(above, low, middle)
    limit = tl.where(least == least, low, INFINITY_BITS).to(tl.float32, bitcast=True)
    tl.store(limits + f, limit, mask=f < size)


@triton.jit
def _candidates(pre, lowest, h, head, M: tl.constexpr, N: tl.constexpr, SIGNED: tl.constexpr):
    """Whether a head's largest product exceeds the lowest of its limits. NaN counts as nothing.

    A positive product has factors of one sign, so that of the largest two or of the smallest two
    is at least as large.
    """
    inside = head < h
    limit = tl.load(lowest + head, mask=inside, other=float("inf"))
    u = tl.zeros(head.shape, tl.float32)
    v = tl.zeros(head.shape, tl.float32)
    u_low, v_low = u, v
    for i in tl.static_range(M):
        more = factor(tl.load(pre + i * h + head, mask=inside, other=0.0), SIGNED)
        u, u_low = tl.where(more > u, more, u), tl.where(more < u_low, more, u_low)
    for j in tl.static_range(N):
        more = factor(tl.load(pre + (M + j) * h + head, mask=inside, other=0.0), SIGNED)
        v, v_low = tl.where(more > v, more, v), tl.where(more < v_low, more, v_low)
    candidate = u * v > limit
    if SIGNED:
        candidate = candidate | (u_low * v_low > limit)
    return candidate


@triton.jit
def count_above(pre, limits, lowest, counts, stride, h, splits,
                M: tl.constexpr, N: tl.constexpr, SIGNED: tl.constexpr, DENSE: tl.constexpr,
                HEADS: tl.constexpr):  # fmt: skip
    """counts [tokens, splits]: active latents of HEADS heads.

    limits [m n, h] (dense: [h]) of the latents' products, lowest [h] of each head's.
    Grid (tokens splits,).
    """
    token, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    head = split * HEADS + tl.arange(0, HEADS)
    inside = head < h
    pre += token.to(tl.int64) * stride
    count = tl.zeros([HEADS], tl.int32)
    if DENSE:
        product = factor(tl.load(pre + head, mask=inside, other=0.0), SIGNED)
        limit = tl.load(limits + head, mask=inside, other=float("inf"))
        count += (product > limit).to(tl.int32)
    else:
        candidate = _candidates(pre, lowest, h, head, M, N, SIGNED)
        if tl.sum(candidate.to(tl.int32)) > 0:
            for i in tl.range(0, M):
                u = factor(tl.load(pre + i * h + head, mask=inside, other=0.0), SIGNED)
                for j in tl.range(0, N):
                    v = factor(tl.load(pre + (M + j) * h + head, mask=inside, other=0.0), SIGNED)
                    of_pair = limits + (i * N + j) * h + head
                    limit = tl.load(of_pair, mask=inside, other=float("inf"))
                    count += (u * v > limit).to(tl.int32)
    tl.store(counts + tl.program_id(0), tl.sum(count))


@triton.jit
def _append(ranked, first, width, product, active, latent):
    """Write the ranks of the active latents from slot `first` on; returns the next free slot.

    What would lie beyond `width` is left out.
    """
    chosen = active.to(tl.int32)
    slot = first + tl.cumsum(chosen, 0) - chosen
    # The key, then 2^31 - 1 - index, 32 bits each: what comes first is larger.
    rank = (key_of(product).to(tl.int64) << 32) | (latent ^ LAST).to(tl.int64)
    tl.store(ranked + slot, rank, mask=active & (slot < width))
    return first + tl.sum(chosen)


@triton.jit
def write_above(pre, limits, starts, ranked, stride, h, splits, width,
                M: tl.constexpr, N: tl.constexpr, SIGNED: tl.constexpr, DENSE: tl.constexpr,
                HEADS: tl.constexpr):  # fmt: skip
    """ranked [tokens, width] int64: key and index of each active latent, at its split's places.

    starts [tokens, splits + 1]: where the splits' places begin. What has no latent is left as it
    is. Grid (tokens splits,).
    """
    token, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    at = starts + token * (splits + 1) + split
    first = tl.load(at)
    if tl.load(at + 1) > first:
        head = split * HEADS + tl.arange(0, HEADS)
        inside = head < h
        pre += token.to(tl.int64) * stride
        ranked += token.to(tl.int64) * width
        if DENSE:
            product = factor(tl.load(pre + head, mask=inside, other=0.0), SIGNED)
            limit = tl.load(limits + head, mask=inside, other=float("inf"))
            _append(ranked, first, width, product, product > limit, head)
        else:
            for i in tl.range(0, M):
                u = factor(tl.load(pre + i * h + head, mask=inside, other=0.0), SIGNED)
                for j in tl.range(0, N):
                    v = factor(tl.load(pre + (M + j) * h + head, mask=inside, other=0.0), SIGNED)
                    of_pair = limits + (i * N + j) * h + head
                    limit = tl.load(of_pair, mask=inside, other=float("inf"))
                    latent = head * (M * N) + i * N + j
                    first = _append(ranked, first, width, u * v, u * v > limit, latent)


@triton.jit
def rank_above(pre, ranked, counts, indices, base, extension, stride, h, width, size, begin,
               M: tl.constexpr, N: tl.constexpr, SIGNED: tl.constexpr, DENSE: tl.constexpr,
               SORT: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """indices int64 and the two factors from ranked [tokens, width], first latent first.

    counts [tokens]: places from there on are unused: factors 0, indices spread over all `size`
    latents, as those of token `begin` on. SORT: ranked is in no order, and width <= WIDTH. DENSE:
    base is the value, extension is not written. Grid (tokens, width / WIDTH).
    """
    token = tl.program_id(0).to(tl.int64)
    pre += token * stride
    slot = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    used = slot < tl.minimum(tl.load(counts + token), width)
    rank = tl.load(ranked + token * width + slot, mask=used, other=-(2**63))
    if SORT:
        rank = tl.sort(rank, descending=True)
    latent = tl.where(used, (rank & 0xFFFFFFFF).to(tl.int32) ^ LAST, 0)
    at = token * width + slot
    spread = ((begin + token) * width + slot) % size
    there = slot < width
    tl.store(indices + at, tl.where(used, latent.to(tl.int64), spread), mask=there)
    if DENSE:
        value = factor(tl.load(pre + latent, mask=used, other=0.0), SIGNED)
        tl.store(base + at, value, mask=there)
    else:
        row = latent // N
        head = row // M
        u = tl.load(pre + (row - head * M) * h + head, mask=used, other=0.0)
        v = tl.load(pre + (M + latent - row * N) * h + head, mask=used, other=0.0)
        tl.store(base + at, factor(u, SIGNED), mask=there)
        tl.store(extension + at, factor(v, SIGNED), mask=there)


@triton.jit
def jump(base, extension, indices, counts, threshold, slopes, active, narrow, width, bandwidth,
         ROOT: tl.constexpr, DENSE: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """JumpReLU of latents above (threshold - bandwidth / 2): which are active, and which near it.

    base, extension, indices [tokens, width] are changed: factors are 0 where a value is not above
    its threshold, and the index is -1 where it is not near it either, or there is no latent.
    counts [tokens]: so many latents there are; if they are more than `width`, `narrow` becomes 1.
    threshold [F].  slopes [tokens, width]: threshold / bandwidth near the threshold, else 0.
    active [tokens] float32: number of latents above their threshold. Grid (tokens,).
    """
    token = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + token)
    above_in_all = 0
    for start in tl.range(0, width, WIDTH):
        slot = start + tl.arange(0, WIDTH)
        there = slot < width
        used = there & (slot < count)
        at = token * width + slot
        latent = tl.load(indices + at, mask=used, other=0)
        p = tl.load(base + at, mask=used, other=0.0)
        value = p
        if not DENSE:
            q = tl.load(extension + at, mask=used, other=0.0)
            value = compose(p * q, 0.0, ROOT)
        least = tl.load(threshold + latent, mask=used, other=0.0)
        above = used & (value > least)
        near = used & (tl.abs(value - least) < bandwidth / 2)
        tl.store(base + at, tl.where(above, p, 0.0), mask=there)
        if not DENSE:
            tl.store(extension + at, tl.where(above, q, 0.0), mask=there)
        tl.store(indices + at, tl.where(above | near, latent, -1), mask=there)
        tl.store(slopes + at, tl.where(near, least / bandwidth, 0.0), mask=there)
        above_in_all += tl.sum(above.to(tl.int32))
    tl.store(active + token, above_in_all.to(tl.float32))
    tl.store(narrow, 1.0, mask=count > width)


@triton.jit
def jump_gradients(d_values, indices, slopes, threshold, scale, d_active, out, size,
                   ON_DEVICE: tl.constexpr, ENTRIES: tl.constexpr):  # fmt: skip
    """out [size] = dL by the logarithm of its threshold, for each code of `jump`.

    d_values: dL/dvalues / scale.  d_active: scalar, dL by the number of active latents. With t the
    threshold and w the bandwidth: dL/dt = -(t dL/dvalue + d_active) / w near it, and times t.
    Grid (size / ENTRIES,).
    """
    at = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    real = at < size
    slope = tl.load(slopes + at, mask=real, other=0.0)
    near = slope > 0.0
    latent = tl.load(indices + at, mask=near, other=0)
    least = tl.load(threshold + latent, mask=near, other=0.0)
    d_value = tl.load(d_values + at, mask=near, other=0.0) * number(scale, ON_DEVICE)
    tl.store(out + at, -slope * (least * d_value + tl.load(d_active)), mask=real)
