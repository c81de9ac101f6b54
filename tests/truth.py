"""The truth that implementations are held to: values, indices and gradients, with error bounds.

It is written here once more, from the paper's formulas and by hand down to the gradients, so that
the reference is tested by it as the fast implementations are.

Tolerances are error bounds, not choices. u = eps / 2 is the unit roundoff. A sum of r terms in
float32 (float64 for float64) errs by at most (r + c) u of the sum of the terms' magnitudes, where
c counts the roundings inside a term; storing a result in dtype T adds u_T of its magnitude. `Sum`
carries a value with the bound. Inputs are integers (then pre-latents, products and the order of
latents are exact in every dtype, and ties abound) or random numbers.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kronsae_kernels import SparseCodes, dense_encode, fused_encode, sparse_decode

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


# Cases


class Case(NamedTuple):
    """Shapes, options, memory layouts and the seed of the numbers."""

    lead: tuple[int, ...]
    heads: int
    m: int
    n: int
    d: int
    k: int
    composition: str
    eps: float
    bias: bool
    mask: bool
    x_layout: str
    w_layout: str
    g_layout: str
    seed: int

    @property
    def size(self) -> int:
        return self.heads * self.m * self.n

    @property
    def tokens(self) -> int:
        return int(np.prod(self.lead, dtype=int))

    @property
    def shape(self) -> tuple:
        return (self.lead, self.heads, self.m, self.n, self.d, self.k)

    def corners(self) -> set[str]:
        """Which of CORNERS this is."""
        found = {f"{self.composition}, mask {self.mask}", f"eps {self.eps}", f"bias {self.bias}"}
        found |= {f"x {self.x_layout}", f"w {self.w_layout}", f"g {self.g_layout}"}
        found |= {f"{len(self.lead) + 1}-D x"}
        sizes = {"B": self.tokens, "k": self.k, "m": self.m, "n": self.n, "h": self.heads}
        sizes["d"] = self.d
        found |= {f"{name} = {size}" for name, size in sizes.items() if size < 2}
        found |= {"k = F"} if self.k == self.size else set()
        return found | ({"h >= 64 k, k > 1"} if self.heads >= 64 * self.k > 64 else set())


LAYOUTS = {
    "contiguous": lambda t: t.clone(memory_format=torch.contiguous_format),
    "reversed": lambda t: (
        t.permute(*range(t.ndim)[::-1]).contiguous().permute(*range(t.ndim)[::-1])
    ),
    "strided": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    "i-major": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
}
"""The same numbers, stored differently."""


class Numbers:
    """Draws the tensors of a case, in one dtype: integers in [-2, 2], or normal numbers.

    With integers every pre-latent is an integer below 4 * 12 + 2 = 50, every product below 2500
    and every partial sum of a gradient without a root is an integer far below 2^24: exact in
    float32 throughout; pre-latents are exact in bfloat16 (integers to 256) too.
    """

    def __init__(
        self, case: Case, dtype: torch.dtype, exact: bool, device: torch.device | None
    ) -> None:
        self.dtype, self.exact, self.device = dtype, exact, device
        self.generator = torch.Generator().manual_seed(case.seed)

    def __call__(self, *shape: int, layout: str = "contiguous", dtype=None) -> Tensor:
        dtype = dtype or self.dtype
        if layout == "expanded":  # as the gradient of a sum
            return self().to(dtype).expand(shape)
        if self.exact:
            drawn = torch.randint(-2, 3, shape, generator=self.generator).to(dtype)
        else:
            drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)
        drawn = drawn.to(self.device)
        return LAYOUTS[layout](drawn) if shape else drawn

    def mask(self, size: int, k: int) -> Tensor:
        """A random mask that leaves at least k latents, not contiguous."""
        kept = torch.randperm(size, generator=self.generator)[: (size + k + 1) // 2]
        mask = torch.zeros(size, dtype=torch.bool)
        mask[kept] = True
        return LAYOUTS["strided"](mask.to(self.device))


# Truth


class Sum(NamedTuple):
    """A float64 value, and how far from it a correct result may be before it is stored."""

    value: Tensor
    error: Tensor


def unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def step(dtype: torch.dtype) -> float:
    """Distance of the smallest numbers: 6e-8 in float16, beside which relative errors are lost."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def accumulated(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_sum(name: str, got: Tensor, truth: Sum, stored: torch.dtype) -> None:
    """`got` has dtype `stored` and is within the bound."""
    assert got.dtype == stored, f"{name}: {got.dtype}"
    assert got.shape == truth.value.shape, f"{name}: {got.shape}"
    allowed = truth.error + unit(stored) * (truth.value.abs() + truth.error) + step(stored)
    excess = ((got.double() - truth.value).abs() / allowed).nan_to_num(torch.inf)
    assert (excess <= 1).all(), f"{name}: error {excess.max():.2f} of what rounding explains"


def top(scores: Tensor, k: int) -> Tensor:
    """Positions of the k largest of each row: larger first, then lower position first."""
    return torch.from_numpy(np.argsort(-scores.numpy(), axis=1, kind="stable")[:, :k])


def projection(x: Tensor, w: Tensor, b: Tensor | None, dtype, impl: str | None) -> Sum:
    """x w^T + b for x [B, d], w [N, d]; `impl` None: exact (integers).

    A sum of d + 1 terms, stored once. The reference's `linear` stores the product first and adds
    the bias then, if x is not contiguous and has 3 dimensions.
    """
    b = w.new_zeros(len(w)) if b is None else b
    product = x.double() @ w.double().T
    value = product + b.double()
    if impl is None:
        return Sum(value, torch.zeros_like(value))
    magnitude = x.double().abs() @ w.double().abs().T + b.double().abs()
    error = (x.shape[1] + 1) * unit(accumulated(dtype)) * magnitude
    stored = value.abs() + (product.abs() if impl == "reference" else 0)
    return Sum(value, error + unit(dtype) * (stored + 2 * error) + step(dtype))


class Kron(NamedTuple):
    """The truth of a Kron encoder: its pre-latents and products, with error bounds."""

    pre: Sum  # [B, h, m + n]
    product: Sum  # [B, F]

    @staticmethod
    def of(case: Case, pre: Sum, u: float) -> "Kron":
        heads, m = case.heads, case.m
        pre, error = (part.unflatten(1, (heads, m + case.n)) for part in pre)
        factor = pre if case.composition == "mul" else pre.clamp(min=0)
        base, extension = factor[..., :m, None], factor[..., None, m:]
        d_base, d_extension = error[..., :m, None], error[..., None, m:]
        product = base * extension
        spread = d_base * extension.abs() + base.abs() * d_extension + d_base * d_extension
        if error.any():
            spread = spread + u * (product.abs() + spread)
        return Kron(Sum(pre, error), Sum(product.flatten(1), spread.flatten(1)))


def kron_gradients(
    case: Case,
    truth: Kron,
    indices: Tensor,
    g: Tensor,
    x: Tensor,
    w: Tensor,
    u: float,
    split: float,
) -> dict[str, Sum]:
    """Gradients of sum(g * values) for the latents at `indices` [B, k], by hand.

    z = sqrt(p q + eps): dz/dp = q / (2 z), else dz/dp = q; 0 where the product is 0. Relative
    errors e of p and q change it by at most e_p / 2 + e_q at first order, and by less than
    1.1 (e_p + e_q) if both are below 1/16, where `g` must be 0 otherwise (see `robust`).
    split: relative error of a gradient of a pre-latent that multiplies x (see `split_error`).
    """
    head, i, j = indices // (case.m * case.n), indices // case.n % case.m, indices % case.n
    tokens = torch.arange(len(indices))[:, None].expand_as(head)
    pre = truth.pre.value
    p, q = pre[tokens, head, i], pre[tokens, head, case.m + j]
    product = truth.product.value.gather(1, indices)
    slope = torch.where(product != 0, g.double(), 0.0)
    if case.composition == "mand":
        slope = slope * torch.where(product != 0, 0.5 / (product + case.eps).sqrt(), 0.0)
    d_pre, spread, magnitude = (torch.zeros_like(pre) for _ in range(3))
    uncertain = (1.1 * relative_error(case, truth, indices).sum(0)).clamp(max=1.0)
    for row, term in (i, slope * q), (case.m + j, slope * p):
        at = tokens, head, row
        d_pre.index_put_(at, term, accumulate=True)
        spread.index_put_(at, term.abs() * uncertain, accumulate=True)
        magnitude.index_put_(at, term.abs(), accumulate=True)
    # 8 roundings inside a term; integers without a root have none, and their sums are exact.
    exact = not truth.pre.error.any() and case.composition != "mand"
    of_x = 0 if exact else 8 + 2 * case.k
    of_row = 0 if exact else 8 + len(x) * max(case.m, case.n)
    once = torch.ones(len(x), 1, dtype=torch.float64)
    return {
        "x": linear_sum("bhr,hrd->bd", d_pre, spread, magnitude, w, of_x * u),
        "w_enc": linear_sum("bhr,bd->hrd", d_pre, spread, magnitude, x, of_row * u + split),
        "b_enc": linear_sum("bhr,bd->hr", d_pre, spread, magnitude, once, of_row * u),
    }


def split_error(impl: str, dtype: torch.dtype) -> float:
    """Relative error of float32 numbers as the kernels give them to matrix units.

    To multiply with bfloat16, they become a sum of two numbers of 8 bits: 2^-9 2^-9, and as much
    again for luck with exponents. With float16, three products of TF32: 2^-11 2^-11 and the same.
    """
    if impl != "triton":
        return 0.0
    return {torch.bfloat16: 2.0**-17, torch.float16: 2.0**-20}.get(dtype, 0.0)


def linear_sum(
    equation: str, value: Tensor, spread: Tensor, magnitude: Tensor, b: Tensor, relative: float
) -> Sum:
    """einsum(equation, value, b), where value errs by `spread` and the sum by `relative`."""
    b = b.double()
    error = torch.einsum(equation, spread + relative * (magnitude + spread), b.abs())
    return Sum(torch.einsum(equation, value, b), error)


def relative_error(case: Case, truth: Kron, indices: Tensor) -> Tensor:
    """Of both factors of each selected latent, [2, B, k]; 0 for integers."""
    head, i, j = indices // (case.m * case.n), indices // case.n % case.m, indices % case.n
    relative = (truth.pre.error / truth.pre.value.abs()).nan_to_num(0.0).flatten(1)
    rows = case.m + case.n
    return torch.stack(
        [relative.gather(1, head * rows + i), relative.gather(1, head * rows + case.m + j)]
    )


# Checks


def check_order(values: Tensor, indices: Tensor) -> None:
    """Largest first, and of equal values the lower index first: so no index comes twice."""
    assert (values[:, 1:] <= values[:, :-1]).all()
    tied = values[:, 1:] == values[:, :-1]
    assert (indices[:, 1:] > indices[:, :-1])[tied].all()


def check_selection(
    scores: Tensor, indices: Tensor, truth: Sum, mask: Tensor | None, exact: bool, slack: Tensor
) -> None:
    """`scores` [B, k] at `indices` are the k largest of truth [B, F].

    If each of the F scores errs by at most delta, the k-th largest does; and each returned score
    is that of its index. `slack`: error of `scores` as derived from the values, relative.
    """
    k = indices.shape[1]
    candidates = truth.value if mask is None else truth.value.masked_fill(~mask, -torch.inf)
    if exact:
        assert torch.equal(indices, top(candidates, k))
    if mask is not None:
        assert mask[indices].all()
    assert all(len(set(row)) == k for row in indices.tolist())
    best = candidates.sort(dim=1, descending=True).values[:, :k]
    delta = truth.error.amax(1, keepdim=True) if len(indices) else truth.error[:, :1]
    assert ((scores - best).abs() <= delta + slack).all()
    there = (scores - truth.value.gather(1, indices)).abs()
    assert (there <= truth.error.gather(1, indices) + slack).all()


def check_kron(
    case: Case, dtype: torch.dtype, exact: bool, impl: str, device: torch.device | None = None
) -> None:
    draw, (h, m, d, k) = Numbers(case, dtype, exact, device), (case.heads, case.m, case.d, case.k)
    x = draw(*case.lead, d, layout=case.x_layout).requires_grad_()
    w = draw(h, m + case.n, d, layout=case.w_layout).requires_grad_()
    b = draw(h, m + case.n, layout="reversed").requires_grad_() if case.bias else None
    mask = draw.mask(case.size, k) if case.mask else None
    g = draw(case.tokens, k, layout=case.g_layout, dtype=accumulated(dtype))
    u = unit(accumulated(dtype))
    rows, weight = x.detach().cpu().reshape(-1, d), w.detach().cpu()
    bias = None if b is None else b.detach().cpu().flatten()
    pre = projection(rows, weight.flatten(0, 1), bias, dtype, None if exact else impl)
    truth = Kron.of(case, pre, u)
    options = {"m": m, "k": k, "eps": case.eps, "impl": impl, "mask": mask}
    codes = fused_encode(x, w, b, composition=case.composition, **options)
    assert codes.values.shape == codes.indices.shape == (*case.lead, k)
    values, indices = (part.detach().cpu().view(-1, k) for part in codes)
    scores = values.double()
    if case.composition == "mand":
        # A square and a root apart: at most 4 roundings.
        scores, slack = scores.square() - case.eps, 4 * u * scores.square()
        by_product = fused_encode(x, w, b, composition="relu_mul", **options)
        assert torch.equal(codes.indices, by_product.indices)
        check_order(by_product.values.detach().cpu().view(-1, k), indices)
    else:
        slack = torch.zeros_like(scores)
        check_order(values, indices)
    mask = None if mask is None else mask.cpu()
    check_selection(scores, indices, truth.product, mask, exact, slack)
    if exact:
        product = truth.product.value.gather(1, indices)
        if case.composition == "mand":
            product = (product + case.eps).sqrt()
        assert_sum("values", values, Sum(product, 2 * u * product.abs()), accumulated(dtype))
    if differentiates(impl, dtype):
        robust = (relative_error(case, truth, indices) < 1 / 16).all(0)
        kept = g if exact else g * robust.to(device)
        split = 0.0 if exact else split_error(impl, dtype)
        gradients = kron_gradients(case, truth, indices, kept.cpu(), rows, weight, u, split)
        check_gradients(codes.values.reshape(-1, k), kept, gradients, x=x, w_enc=w, b_enc=b)


def differentiates(impl: str, dtype: torch.dtype) -> bool:
    """Autograd rounds the reference's gradients of pre-latents to 16 bits: not ours."""
    return impl != "reference" or dtype in (torch.float64, torch.float32)


def check_gradients(out: Tensor, g: Tensor, truth: dict[str, Sum], **leaves: Tensor | None) -> None:
    leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    found = torch.autograd.grad(out, list(leaves.values()), g)
    for (name, leaf), got in zip(leaves.items(), found, strict=True):
        assert got.shape == leaf.shape
        expected = Sum(*(part.reshape(leaf.shape) for part in truth[name]))
        assert_sum(f"gradient of {name}", got.cpu(), expected, leaf.dtype)


def check_dense(
    case: Case, dtype: torch.dtype, exact: bool, impl: str, device: torch.device | None = None
) -> None:
    draw, size, k, d = Numbers(case, dtype, exact, device), case.size, case.k, case.d
    x = draw(*case.lead, d, layout=case.x_layout).requires_grad_()
    w = draw(size, d, layout=case.w_layout).requires_grad_()
    b = draw(size, layout="strided").requires_grad_() if case.bias else None
    mask = draw.mask(size, k) if case.mask else None
    g = draw(case.tokens, k, layout=case.g_layout, dtype=accumulated(dtype))
    u = unit(accumulated(dtype))
    rows, weight = x.detach().cpu().reshape(-1, d), w.detach().cpu()
    bias = None if b is None else b.detach().cpu()
    pre, error = projection(rows, weight, bias, dtype, None if exact else impl)
    truth = Sum(pre.clamp(min=0), error)
    codes = dense_encode(x, w, b, k=k, impl=impl, mask=mask)
    assert codes.values.dtype == accumulated(dtype)
    assert codes.values.shape == codes.indices.shape == (*case.lead, k)
    values, indices = (part.detach().cpu().view(-1, k) for part in codes)
    mask = None if mask is None else mask.cpu()
    check_order(values, indices)
    check_selection(values.double(), indices, truth, mask, exact, torch.zeros(()))
    if not differentiates(impl, dtype):
        return
    robust = (pre.abs() > error).gather(1, indices)
    kept = g if exact else g * robust.to(device)
    term = torch.where(pre.gather(1, indices) > 0, kept.cpu().double(), 0.0)
    d_pre = torch.zeros_like(pre).scatter_add(1, indices, term)
    none, once = torch.zeros_like(pre), torch.ones(len(rows), 1, dtype=torch.float64)
    of_x, of_row = (0, 0) if exact else (2 + k, 2 + len(rows))
    gradients = {
        "x": linear_sum("bf,fd->bd", d_pre, none, d_pre.abs(), weight, of_x * u),
        "w_enc": linear_sum("bf,bd->fd", d_pre, none, d_pre.abs(), rows, of_row * u),
        "b_enc": linear_sum("bf,bd->f", d_pre, none, d_pre.abs(), once, of_row * u),
    }
    check_gradients(codes.values.reshape(-1, k), kept, gradients, x=x, w_enc=w, b_enc=b)


def check_decode(
    case: Case, dtype: torch.dtype, exact: bool, impl: str, device: torch.device | None = None
) -> None:
    """Indices may come twice in a token here; values may have another dtype than w_dec."""
    draw, size, k, d = Numbers(case, dtype, exact, device), case.size, case.k, case.d
    of_values = DTYPES[case.seed % 4]
    values = draw(*case.lead, k, layout=case.x_layout, dtype=of_values).requires_grad_()
    indices = torch.randint(size, (*case.lead, k), generator=draw.generator)
    w = draw(size, d, layout=case.w_layout).requires_grad_()
    b = draw(d, layout="strided").requires_grad_() if case.bias else None
    g = draw(case.tokens, d, layout=case.g_layout)
    u = unit(accumulated(dtype))
    v = values.detach().cpu().reshape(-1, k).double()
    rows = w.detach().cpu().double()[indices.view(-1, k)]
    bias = torch.zeros(d) if b is None else b.detach().cpu().double()
    out = torch.einsum("bk,bkd->bd", v, rows) + bias
    magnitude = torch.einsum("bk,bkd->bd", v.abs(), rows.abs()) + bias.abs()
    # 2 roundings in a term: float64 values become float32, and the product.
    expected = Sum(out, (0 if exact else k + 3) * u * magnitude)
    upstream = g.cpu().double()
    one_hot = torch.nn.functional.one_hot(indices.view(-1, k), size).double()
    of_v = torch.einsum("bd,bkd->bk", upstream, rows)
    v_magnitude = torch.einsum("bd,bkd->bk", upstream.abs(), rows.abs())
    of_w = torch.einsum("bkf,bk,bd->fd", one_hot, v, upstream)
    w_magnitude = torch.einsum("bkf,bk,bd->fd", one_hot, v.abs(), upstream.abs())
    terms = one_hot.sum((0, 1))[:, None]
    gradients = {
        "values": Sum(of_v, (0 if exact else d + 2) * u * v_magnitude),
        "w_dec": Sum(of_w, (0.0 if exact else terms + 3) * u * w_magnitude),
        "b_dec": Sum(upstream.sum(0), (0 if exact else len(v)) * u * upstream.abs().sum(0)),
    }
    indices = indices.to(device)
    got = sparse_decode(values, indices, w, b, impl=impl)
    again = sparse_decode(SparseCodes(values, indices), w_dec=w, b_dec=b, impl=impl)
    assert torch.equal(got, again)
    assert got.shape == (*case.lead, d)
    assert_sum("output", got.detach().cpu().reshape(-1, d), expected, dtype)
    if differentiates(impl, dtype):
        flat = got.reshape(-1, d)
        check_gradients(flat, g, gradients, values=values, w_dec=w, b_dec=b)


CHECKS: dict[str, Callable[..., None]] = {
    "fused_encode": check_kron,
    "dense_encode": check_dense,
    "sparse_decode": check_decode,
}
"""By operation: check(case, dtype, exact, impl, device)."""
