"""The encoder's matrix product with head maxima in its epilogue: pre-latents and their head keys.

The other way to get them is `torch.addmm` (cuBLAS) and maxima in `select_heads`; which is faster
is for measurements to say (`encode` in configs.json).
"""

import triton
import triton.language as tl

from kronsae_kernels.triton_impl.device import dot, factor, key_of, maximum, minimum, rounded


@triton.jit
def _extreme(pre, rows, SIGNED: tl.constexpr, LOWEST: tl.constexpr,
             ROWS_PADDED: tl.constexpr, HEADS: tl.constexpr):  # fmt: skip
    """Largest (or smallest) factor of each head from pre [tokens, ROWS_PADDED * HEADS]."""
    value = tl.reshape(factor(pre, SIGNED), [pre.shape[0], ROWS_PADDED, HEADS])
    real = (tl.arange(0, ROWS_PADDED) < rows)[None, :, None]
    if LOWEST:
        result = tl.reduce(tl.where(real, value, float("inf")), 1, minimum)
    else:
        result = tl.reduce(tl.where(real, value, float("-inf")), 1, maximum)
    return result


@triton.jit
def encode_gemm(x, weight, bias, pre, head_keys, tokens, d, h,
                M: tl.constexpr, N: tl.constexpr, M_PADDED: tl.constexpr, N_PADDED: tl.constexpr,
                SIGNED: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
                TOKENS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
                GROUP: tl.constexpr):  # fmt: skip
    """pre [tokens, m + n, h] = x weight^T + bias, head_keys [tokens, h] int32.

    weight [m + n, h, d], bias [m + n, h]. A program makes TOKENS x HEADS heads of it; programs go
    in groups of GROUP blocks of tokens, so that weights are found in the L2 cache.
    """
    blocks, per_block = tl.cdiv(tokens, TOKENS), tl.cdiv(h, HEADS)
    program = tl.program_id(0)
    first = program // (GROUP * per_block) * GROUP
    count = tl.minimum(blocks - first, GROUP)
    within = program % (GROUP * per_block)
    token = (first + within % count) * TOKENS + tl.arange(0, TOKENS)
    head_start = within // count * HEADS
    real_token = (token < tokens)[:, None]
    # Column c of a tile is row c // HEADS of head head_start + c % HEADS.
    p, q = tl.arange(0, M_PADDED * HEADS), tl.arange(0, N_PADDED * HEADS)
    p_head, q_head = head_start + p % HEADS, head_start + q % HEADS
    p_real, q_real = (p // HEADS < M) & (p_head < h), (q // HEADS < N) & (q_head < h)
    p_row = (p // HEADS).to(tl.int64) * h + p_head
    q_row = (M + q // HEADS).to(tl.int64) * h + q_head
    c = tl.arange(0, WIDTH)
    x_at = x + token.to(tl.int64)[:, None] * d + c[None, :]
    p_at = weight + p_row[None, :] * d + c[:, None]
    q_at = weight + q_row[None, :] * d + c[:, None]
    of_p = tl.zeros([TOKENS, M_PADDED * HEADS], tl.float32)
    of_q = tl.zeros([TOKENS, N_PADDED * HEADS], tl.float32)
    for start in range(0, d, WIDTH):
        real = c < d - start
        part = tl.load(x_at + start, mask=real_token & real[None, :], other=0.0)
        p_weight = tl.load(p_at + start, mask=p_real[None, :] & real[:, None], other=0.0)
        q_weight = tl.load(q_at + start, mask=q_real[None, :] & real[:, None], other=0.0)
        of_p = dot(part, p_weight, of_p, PRECISION)
        of_q = dot(part, q_weight, of_q, PRECISION)
    if HAS_BIAS:
        of_p += tl.load(bias + p_row, mask=p_real, other=0.0).to(tl.float32)[None, :]
        of_q += tl.load(bias + q_row, mask=q_real, other=0.0).to(tl.float32)[None, :]
    p_pre, q_pre = rounded(of_p, pre.dtype.element_ty), rounded(of_q, pre.dtype.element_ty)
    out = pre + token.to(tl.int64)[:, None] * ((M + N) * h)
    tl.store(out + p_row[None, :], p_pre, mask=real_token & p_real[None, :])
    tl.store(out + q_row[None, :], q_pre, mask=real_token & q_real[None, :])
    u = _extreme(p_pre, M, SIGNED, False, M_PADDED, HEADS)
    v = _extreme(q_pre, N, SIGNED, False, N_PADDED, HEADS)
    score = u * v
    if SIGNED:
        u_low = _extreme(p_pre, M, SIGNED, True, M_PADDED, HEADS)
        v_low = _extreme(q_pre, N, SIGNED, True, N_PADDED, HEADS)
        score = maximum(maximum(score, u_low * v_low), maximum(u * v_low, u_low * v))
    head = head_start + tl.arange(0, HEADS)
    at = token.to(tl.int64)[:, None] * h + head[None, :]
    tl.store(head_keys + at, key_of(score), mask=real_token & (head < h)[None, :])
