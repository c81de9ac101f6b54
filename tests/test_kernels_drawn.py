"""500 drawn autoencoders through every operation and transform, against float64.

Numbers are small integers times a power of two, so that float32 products and sums are exact, ties
are ties in both, and denormal products stay exact. Roots, and what follows from them, are rounded.
"""

import random

import pytest
import torch
from torch.func import grad, jvp, vmap

from kronsae_kernels import (
    SparseCodes,
    batch_topk_encode,
    dense_encode,
    expert_encode,
    fused_encode,
    nested_decode,
    sparse_decode,
    threshold_encode,
)

FAMILIES, USUAL, DRAWS = 20, 12, 25
"""Families of shapes; those of them that are not slow; draws of each."""


def strided(tensor: torch.Tensor, draw: random.Random) -> torch.Tensor:
    """The same numbers in another memory layout."""
    how = draw.randrange(4)
    if how == 0:
        return tensor
    if how == 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), 7)
    view = wide[..., : tensor.shape[-1]] if how == 2 else wide[..., 1::2]
    return view.copy_(tensor)


class Family:
    """Shapes, an encoder, a decoder, and memory layouts: what torch.compile sees."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        self.layouts = draw.randrange(2**30)
        self.d, self.tokens = draw.randint(1, 6), draw.randint(1, 5)
        self.h, self.m, self.n = 2 * draw.randint(1, 3), draw.randint(1, 3), draw.randint(1, 3)
        self.encoder = ["fused", "dense", "threshold", "batch", "expert"][seed % 5]
        self.kron = self.encoder == "fused" or (self.encoder != "dense" and draw.random() < 0.6)
        self.composition = draw.choice(["mand", "relu_mul", "mul"])
        self.size = self.h * (self.m * self.n if self.kron else 1)
        self.k = draw.randint(1, self.size // 2)
        self.nested = draw.random() < 0.4
        self.masked = draw.choice(["no", "all", "tokens"])
        self.cut = draw.randint(1, self.k)

    def tensors(self, seed: int) -> list[torch.Tensor]:
        """x, w_enc, b_enc, codes' factors, w_dec, b_dec: differentiable, float32."""
        draw, torch_draw = random.Random(self.layouts), torch.Generator().manual_seed(seed)
        rows = (self.h, self.m + self.n) if self.kron else (self.size,)
        shapes = [
            (self.tokens, self.d),
            (*rows, self.d),
            rows,
            (self.tokens, 1),
            (self.size, self.d),
            (self.d,),
        ]
        tensors = [torch.randint(-2, 3, s, generator=torch_draw).float() for s in shapes]
        tiny = 2.0 ** random.Random(seed).choice(
            [0, 0, -70, -74]
        )  # products of 2^-148 are denormal
        tensors[0] *= tiny
        tensors[2] *= tiny
        return [strided(t, draw) if t.ndim > 1 else t for t in tensors]

    def mask(self, seed: int) -> torch.Tensor | None:
        generator = torch.Generator().manual_seed(seed + 1)
        shape = {"no": None, "all": (self.size,), "tokens": (self.tokens, self.size)}[self.masked]
        if shape is None or self.encoder in ("threshold", "expert"):
            return None
        if self.encoder == "batch":
            shape = (self.size,)
        mask = torch.rand(shape, generator=generator) < 0.7
        mask[..., : self.k] = True
        return mask

    def reconstruct(self, impl, mask, experts, x, w_enc, b_enc, factor, w_dec, b_dec):
        gate = {"m": self.m, "composition": self.composition} if self.kron else {}
        if self.encoder == "fused":
            codes = fused_encode(x, w_enc, b_enc, k=self.k, mask=mask, impl=impl, **gate)
        elif self.encoder == "dense":
            codes = dense_encode(x, w_enc, b_enc, k=self.k, mask=mask, impl=impl)
        elif self.encoder == "threshold":
            threshold = x.new_full((), 0.0 if self.composition == "mul" else 2.0**-75)
            codes = threshold_encode(x, w_enc, b_enc, threshold=threshold, impl=impl, **gate)
        elif self.encoder == "batch":
            codes = batch_topk_encode(x, w_enc, b_enc, k=self.k, mask=mask, impl=impl, **gate)
        else:
            own = {"expert": experts, "experts": 2, "k": self.cut, **gate}
            codes = expert_encode(x, w_enc, b_enc, impl=impl, **own)
        values, indices = codes.values * factor, codes.indices
        if self.encoder in ("fused", "dense"):  # strided codes
            values, indices = values[:, : self.cut], indices[:, : self.cut]
        if self.nested:
            bounds = sorted({1, self.size // 2, self.size})
            return nested_decode(SparseCodes(values, indices), bounds, w_dec, b_dec, impl=impl)
        return sparse_decode(values, indices, w_dec, b_dec, impl=impl)


def close(got, expected):
    """Up to float32's roundings, which are relative (and to a few of its smallest numbers)."""
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.float32
        scale = float(b.abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(a.double(), b, rtol=3e-6, atol=3e-6 * scale + 2.0**-146)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "seed",
    [pytest.param(i, marks=() if i < USUAL else pytest.mark.slow) for i in range(FAMILIES)],
)
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_drawn_autoencoders(seed):
    family = Family(seed)
    torch._dynamo.reset()
    transforms = {
        "value": lambda f, t: [f(*t)],
        "gradients": lambda f, t: grad(lambda *t: (f(*t) * 3).sum(), argnums=tuple(range(6)))(*t),
        "tangent": lambda f, t: [jvp(f, tuple(t), tuple(s.flip(0) for s in t))[1]],
    }
    experts = torch.arange(family.tokens) % 2
    mask = family.mask(seed)

    def function(impl):
        return lambda *tensors: family.reconstruct(impl, mask, experts, *tensors)

    compiled = torch.compile(function("torch"), fullgraph=True, backend="aot_eager", dynamic=False)
    for number in range(DRAWS):
        tensors = family.tensors(1000 * seed + number)
        wide = [t.double() for t in tensors]
        for transform in transforms.values():
            close(transform(function("torch"), tensors), transform(function("reference"), wide))
        expected = transforms["value"](function("reference"), wide)
        close([compiled(*tensors)], expected)
        if mask is None or mask.ndim == 1:
            pairs = [torch.stack([t, t.flip(0)]) for t in tensors]
            each = vmap(function("torch"))(*pairs)
            other = function("reference")(*(t.flip(0) for t in wide))
            close(each, [expected[0], other])
