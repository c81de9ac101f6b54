"""The numbers of a training step and its counters: small kernels, so that no step asks the host.

A step begins with `prepare_update`, which decides whether it is made at all, and ends with
`finish_update`, which says how it went. Numbers of AdamW are computed in float64, as torch does.
"""

import triton
import triton.language as tl

from kronsae_kernels.triton_impl.device import (
    DECAY,
    GRADIENT_SCALE,
    PROCEED,
    ROOT_SCALE,
    STEP,
    STEP_SIZE,
)

FIELDS = tl.constexpr(10)
IN_A_ROW = tl.constexpr(0)
LONGEST = tl.constexpr(1)
COUNT = tl.constexpr(2)
LARGEST = tl.constexpr(3)
INFINITY = tl.constexpr(float("inf"))
MOST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _power(base, exponent):
    """base^exponent of a float64 and a whole number below 2^24, by squaring."""
    result = base * 0.0 + 1.0
    for _ in range(24):
        result = tl.where(exponent % 2 == 1, result * base, result)
        base *= base
        exponent = exponent // 2
    return result


@triton.jit
def _corrected(hyper, steps, lr, adamw):
    """Write the step's number, its size and the scale of the second moment's root, corrected."""
    tl.store(hyper + STEP, steps.to(tl.float32))
    one = tl.full((), 1.0, tl.float64)
    first = one - _power(tl.load(adamw), steps)
    second = one - _power(tl.load(adamw + 1), steps)
    tl.store(hyper + STEP_SIZE, (lr / first).to(tl.float32))
    tl.store(hyper + ROOT_SCALE, (one / tl.sqrt(second)).to(tl.float32))


@triton.jit
def prepare_update(sums, missed, size, lr, adamw, hyper, steps_w_enc, steps_b_enc, steps_w_dec,
                   steps_b_dec, steps_more):  # fmt: skip
    """The numbers of an AdamW step, and its place in the count of steps. Grid (1,).

    sums [2] float32: the sum of `size` squared errors, and a number that is finite if all is that
    an update would use. No step is made unless both are, and the square of the mean squared error,
    too: second moments are squares of gradients, and infinity would stay in them. Nor is one made
    unless both numbers of `missed` are 0 (see `finish_update`).
    lr: a scalar.  adamw [4] float64: both betas; of w_enc, the weight decay and what lr is
    multiplied by.
    hyper [2, 10]: those of w_enc, and those of the others; see `device`.
    steps_*: float32 scalars, how many steps each weight has made; one more afterwards.
    """
    error, rest = tl.load(sums) / size, tl.load(sums + 1)
    doubt = error * error * 0.0 + rest * 0.0
    narrow = tl.load(missed) + tl.load(missed + 1)
    proceed = tl.where((doubt == 0.0) & (narrow == 0.0), 1.0, 0.0)
    rate = tl.load(lr).to(tl.float64)
    one = tl.full((), 1.0, tl.float64)
    of_w_enc, of_w_dec = tl.load(steps_w_enc), tl.load(steps_w_dec)
    own_rate = rate * tl.load(adamw + 3)
    tl.store(hyper + DECAY, (one - own_rate * tl.load(adamw + 2)).to(tl.float32))
    _corrected(hyper, of_w_enc.to(tl.int32) + 1, own_rate, adamw)
    _corrected(hyper + FIELDS, of_w_dec.to(tl.int32) + 1, rate, adamw)
    for row in tl.static_range(2):
        tl.store(hyper + row * FIELDS + GRADIENT_SCALE, 1.0)
        tl.store(hyper + row * FIELDS + PROCEED, proceed)
    tl.store(steps_w_enc, of_w_enc + proceed)
    tl.store(steps_b_enc, tl.load(steps_b_enc) + proceed)
    tl.store(steps_w_dec, of_w_dec + proceed)
    tl.store(steps_b_dec, tl.load(steps_b_dec) + proceed)
    if steps_more is not None:
        tl.store(steps_more, tl.load(steps_more) + proceed)


@triton.jit
def note_active(values, indices, silent, hyper, tokens, size, threshold,
                ENTRIES: tl.constexpr):  # fmt: skip
    """silent[f] = -tokens for every latent f with a value above the threshold in magnitude.

    values, indices: [size] flat codes.  silent: int64 [F], to which `finish_update` adds `tokens`.
    Many programs write the same number to the same place. Grid (size / ENTRIES,).
    """
    at = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    real = at < size
    value = tl.load(values + at, mask=real, other=0.0)
    latent = tl.load(indices + at, mask=real, other=0)
    proceed = tl.load(hyper + PROCEED)
    active = (tl.abs(value) * proceed > threshold) & real
    tl.store(silent + latent, tl.zeros([ENTRIES], tl.int64) - tokens, mask=active)


@triton.jit
def finish_update(square, norm, skips, missed, x, silent, hyper, size, latents, tokens,
                  MANY: tl.constexpr):  # fmt: skip
    """How a step went: the gradient's norm, and counters of steps that were not made.

    square: scalar, the gradient's squared norm.  norm: scalar, NaN where no step was made.
    skips [4] float32: steps in a row, the last ones, that were not made; the most that there were
    in a row; all of them; and the largest magnitude in x (of `size` numbers) at the first. Whoever
    reads the last three sets them to 0.
    missed [2] float32: whether candidates were too few in this step, which is set to 0, and how
    many steps were not made since they first were. Those are no part of `skips`.
    silent: int64 [F], tokens since each latent was active: `tokens` more, if a step was made.
    Grid (latents / MANY,), at least one.
    """
    program, e = tl.program_id(0), tl.arange(0, MANY)
    proceed = tl.load(hyper + PROCEED)
    if program == 0:
        root = tl.sqrt_rn(tl.load(square))
        tl.store(norm, tl.where(proceed != 0.0, root, float("nan")))
        earlier = tl.load(missed + 1)
        narrow = tl.load(missed) + earlier != 0.0
        tl.store(missed, 0.0)
        tl.store(missed + 1, tl.where(narrow, earlier + 1.0, 0.0))
        in_a_row, count = tl.load(skips + IN_A_ROW), tl.load(skips + COUNT)
        spoiled = tl.where(narrow, 0.0, 1.0 - proceed)
        first = tl.where((spoiled != 0.0) & (count == 0.0), size, 0)
        largest = tl.zeros([MANY], tl.float32)
        for start in range(0, first, MANY):
            at = start + e
            part = tl.abs(tl.load(x + at, mask=at < size, other=0.0).to(tl.float32))
            largest = tl.maximum(largest, tl.where(part == part, part, INFINITY))
        magnitude = tl.minimum(tl.max(largest, 0), MOST)
        tl.store(skips + LARGEST, tl.where(first > 0, magnitude, tl.load(skips + LARGEST)))
        in_a_row = tl.where(spoiled != 0.0, in_a_row + 1.0, tl.where(narrow, in_a_row, 0.0))
        tl.store(skips + IN_A_ROW, in_a_row)
        tl.store(skips + LONGEST, tl.maximum(tl.load(skips + LONGEST), in_a_row))
        tl.store(skips + COUNT, count + spoiled)
    if silent is not None:
        at = program * MANY + e
        real = at < latents
        since = tl.load(silent + at, mask=real, other=0)
        tl.store(silent + at, since + tl.where(proceed != 0.0, tokens, 0), mask=real)
