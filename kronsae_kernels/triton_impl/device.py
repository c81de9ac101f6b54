"""Functions that kernels call: order of scores, compositions and their slopes, rounding, AdamW."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# Keys: int32 that order as scores do. Padding comes after everything, masked latents before it.
PADDING = tl.constexpr(-(2**31))
MASKED = tl.constexpr(-(2**31) + 1)
NAN = tl.constexpr(2**31 - 2)  # before everything, and one may be added
LAST = tl.constexpr(2**31 - 1)

# Fields of a row of `hyper`, the float32 numbers of one AdamW step (see step.py).
DECAY = tl.constexpr(0)
BETA1_REST = tl.constexpr(1)
BETA2 = tl.constexpr(2)
BETA2_REST = tl.constexpr(3)
STEP_SIZE = tl.constexpr(4)
ROOT_SCALE = tl.constexpr(5)
ADAM_EPS = tl.constexpr(6)
GRADIENT_SCALE = tl.constexpr(7)
PROCEED = tl.constexpr(8)
STEP = tl.constexpr(9)  # its number, from 1


@triton.jit
def number(value, ON_DEVICE: tl.constexpr):
    """A float32 scalar that was given as itself, or (ON_DEVICE) by a pointer to it."""
    if ON_DEVICE:
        value = tl.load(value)
    return value


@triton.jit
def maximum(a, b):
    """The larger; NaN if either is (torch's amax, and ReLU, do so too)."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def minimum(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def factor(pre, SIGNED: tl.constexpr):
    """A factor of a product, float32, from a pre-latent: its ReLU, or itself if SIGNED."""
    value = pre.to(tl.float32)
    if not SIGNED:
        value = maximum(value, 0.0)
    return value


@triton.jit
def key_of(score, SIGNED: tl.constexpr = True):
    """Key of a float32 score: larger scores have larger keys, -0 that of 0, NaN the largest.

    SIGNED: some may be below 0.
    """
    if SIGNED:
        score = tl.where(score == 0.0, 0.0, score)
        bits = score.to(tl.int32, bitcast=True)
        key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    else:
        key = score.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.where(score == score, key, NAN)


@triton.jit
def compose(product, eps, ROOT: tl.constexpr):
    """Value of a latent from its product: `reference.compose`."""
    zero = product == 0.0
    if ROOT:
        value = tl.sqrt_rn(tl.where(zero, eps, product + eps))
    else:
        value = tl.where(zero, 0.0, product)
    return value


@triton.jit
def slope(product, value, ROOT: tl.constexpr):
    """Derivative of `compose` by the product; 0 where the product is 0."""
    if ROOT:
        there = tl.where(product == 0.0, 1.0, value)
        result = 0.5 / there
    else:
        result = product * 0.0 + 1.0
    return tl.where(product == 0.0, 0.0, result)


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """float32 in another dtype, to the nearest even (which the interpreter has to be taught)."""
    if INTERPRETED:
        if dtype == tl.bfloat16:
            bits = value.to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
            value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    return value.to(dtype)


@triton.jit
def hashed(number):
    """32 bits that look random, from 32 bits (uint32): one to one."""
    number = (number ^ (number >> 16)) * 0x7FEB352D
    number = (number ^ (number >> 15)) * 0x846CA68B
    return number ^ (number >> 16)


@triton.jit
def key_of_row(SEED: tl.constexpr, hyper, row):
    """uint32 [1] from which the noise of a row of a weight is drawn, in this step alone."""
    key = hashed(tl.full([1], SEED, tl.uint32))
    key = hashed(key + tl.load(hyper + STEP).to(tl.uint32))
    return hashed(key + row.to(tl.uint32))


@triton.jit
def rounded_by_chance(value, noise):
    """float32 in bfloat16: up or down, with a chance that makes the mean right.

    noise: uint32, of which 16 bits are used: they are added below the bits that stay.
    """
    bits = value.to(tl.uint32, bitcast=True) + (noise & 0xFFFF)
    high = tl.where(value == value, bits >> 16, 0x7FC0)
    return high.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def dot(a, b, accumulator):
    """accumulator + a b on the matrix units (in float32 under the interpreter)."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def if_proceeds(size, hyper):
    """`size`, or 0 where this row of `hyper` says that no step is made: a mask then is empty.

    (The interpreter cannot have a scalar truth value in the mask itself.)
    """
    return tl.where(tl.load(hyper + PROCEED) != 0.0, size, 0)


@triton.jit
def adamw_numbers(hyper):
    """Numbers that `adamw` takes from a row of `hyper`, loaded once for many calls."""
    return (
        tl.load(hyper + DECAY),
        tl.load(hyper + BETA1_REST),
        tl.load(hyper + BETA2),
        tl.load(hyper + BETA2_REST),
        tl.load(hyper + STEP_SIZE),
        tl.load(hyper + ROOT_SCALE),
        tl.load(hyper + ADAM_EPS),
    )


@triton.jit
def adamw(w, gradient, first, second, numbers):
    """One AdamW step: (w, first, second) afterwards, as torch.optim.AdamW computes them."""
    decay, beta1_rest, beta2, beta2_rest, step_size, root_scale, eps = numbers
    first = first + (gradient - first) * beta1_rest
    second = second * beta2 + gradient * gradient * beta2_rest
    root = tl.sqrt(second) * root_scale + eps
    w = w * decay - step_size * (first / root)
    return w, first, second
