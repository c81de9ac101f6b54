"""Every operation in plain PyTorch: the specification that the fast implementations are held to.

Readable rather than fast: these write the [B, F] scores, and autograd differentiates them.
Shapes and letters as in `common`; arguments as in the public functions of the same name.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding

from kronsae_kernels.common import SparseCodes, accumulate_dtype

BITS = 0xFFFFFFFF


def products(base: Tensor, extension: Tensor, composition: str) -> Tensor:
    """Product of every base with every extension pre-latent of a head, by which latents compete.

    base [..., m], extension [..., n] before the ReLU; returns [..., m, n] float32 (float64 for
    float64): ReLU(u) ReLU(v), or u v for composition "mul". [KronSAE, eq. 2-4]
    """
    if composition != "mul":
        base, extension = base.relu(), extension.relu()
    dtype = accumulate_dtype(base.dtype)
    return base.to(dtype)[..., :, None] * extension.to(dtype)[..., None, :]


def compose(product: Tensor, composition: str, eps: float) -> Tensor:
    """Value of a latent from its product p q; the derivative where the product is 0 is 0.

    "mand": sqrt(p q + eps) for p q > 0, else sqrt(eps). [KronSAE, eq. 3; eps: App. H]
    "relu_mul", "mul": the product itself. [KronSAE, Table 1]
    """
    zero = product == 0
    if composition == "mand":
        return torch.where(zero, eps**0.5, _root(torch.where(zero, 1.0, product) + eps))
    return torch.where(zero, 0.0, product)


def _root(x: Tensor) -> Tensor:
    """Square root rounded to the nearest, as GPUs give it.

    torch's own of float32 numbers on a CPU may be one unit off, which would decide where a value
    equals its threshold.
    """
    if x.dtype == torch.float32 and x.device.type == "cpu":
        return x.double().sqrt().float()
    return x.sqrt()


def largest(scores: Tensor, k: int) -> Tensor:
    """Positions [..., k] of the k largest scores, largest first; ties: lowest position first."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def latents(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None,
    m: int | None,
    composition: str,
) -> Tensor:
    """Scores [..., F] by which latents are selected: a Kron encoder's products, or the ReLU (for
    composition "linear": what it is taken of)."""
    bias = None if b_enc is None else b_enc.flatten()
    pre_latents = torch.nn.functional.linear(x, w_enc.flatten(0, -2), bias)
    if m is None:
        pre_latents = pre_latents if composition == "linear" else pre_latents.relu()
        return pre_latents.to(accumulate_dtype(x.dtype))
    pre_latents = pre_latents.unflatten(-1, w_enc.shape[:2])
    return products(pre_latents[..., :m], pre_latents[..., m:], composition).flatten(-3)


def fused_encode(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None = None,
    *,
    m: int,
    k: int,
    composition: str = "mand",
    eps: float = 0.0,
    mask: Tensor | None = None,
    scale: Tensor | None = None,
) -> SparseCodes:
    """The k largest post-latents of a Kron encoder. [KronSAE, eq. 2-4]"""
    product = latents(x, w_enc, b_enc, m, composition)
    indices = largest(_competing(product, mask, scale), k)
    return SparseCodes(compose(product.gather(-1, indices), composition, eps), indices)


def dense_encode(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None = None,
    *,
    k: int,
    mask: Tensor | None = None,
    scale: Tensor | None = None,
    relu: bool = True,
) -> SparseCodes:
    """The k largest of ReLU(w_enc x + b_enc): a TopK SAE's encoder. [Gao et al. 2024]"""
    values = latents(x, w_enc, b_enc, None, "" if relu else "linear")
    indices = largest(_competing(values, mask, scale), k)
    return SparseCodes(values.gather(-1, indices), indices)


def batch_topk_encode(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None = None,
    *,
    k: int,
    m: int | None = None,
    composition: str = "mand",
    eps: float = 0.0,
    mask: Tensor | None = None,
) -> SparseCodes:
    """The k B largest active latents of B tokens; unused slots have value 0. [Bussmann et al.]"""
    product = latents(x, w_enc, b_enc, m, composition)
    size = product.shape[-1]
    order = largest(_competing(product, mask, None), size)
    allowed = torch.ones_like(order, dtype=torch.bool)
    if mask is not None:  # latents outside it come last, also after -inf
        order = order.gather(-1, largest(mask[order].int(), size))
        allowed = mask[order]
    values = product.gather(-1, order)
    values = values if m is None else compose(values, composition, eps)
    silent = eps**0.5 if m is not None and composition == "mand" else 0.0
    scores = values.detach().masked_fill(~allowed, -torch.inf)
    broken = ~(scores[..., :1] < torch.inf)  # competes with none, goes on as it is
    scores = scores.masked_fill(broken, -torch.inf)
    selected = torch.zeros_like(allowed).flatten()
    selected[largest(scores.flatten(), k * values[..., 0].numel())] = True
    selected = selected.view_as(allowed) & (scores > silent)
    selected[..., :k] |= (broken & allowed)[..., :k]
    width = max(1, int(selected.sum(-1).max()) if selected.numel() else 0)
    return SparseCodes(values.where(selected, 0)[..., :width], order[..., :width])


def expert_encode(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None = None,
    *,
    expert: Tensor,
    experts: int,
    k: int,
    m: int | None = None,
    composition: str = "mand",
    eps: float = 0.0,
) -> SparseCodes:
    """The k largest latents of the part of the dictionary that is each token's expert."""
    product = latents(x, w_enc, b_enc, m, composition)
    owner = torch.arange(product.shape[-1], device=x.device) // (product.shape[-1] // experts)
    expert = embedding(expert, owner[:: len(owner) // experts, None])[..., 0]  # checks its range
    indices = largest(_competing(product, owner == expert[..., None], None), k)
    product = product.gather(-1, indices)
    return SparseCodes(product if m is None else compose(product, composition, eps), indices)


def threshold_encode(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None = None,
    *,
    threshold: Tensor,
    m: int | None = None,
    composition: str = "mand",
    eps: float = 0.0,
) -> SparseCodes:
    """All latents above their threshold that are not silent; unused slots have value 0."""
    product = latents(x, w_enc, b_enc, m, composition)
    values = product if m is None else compose(product, composition, eps)
    active = (values > threshold) & (product > 0)
    indices = largest(product.detach().masked_fill(~active, -torch.inf), values.shape[-1])
    width = max(1, int(active.sum(-1).max()) if active.numel() else 0)
    indices = indices[..., :width]
    return SparseCodes(values.where(active, 0).gather(-1, indices), indices)


def sparse_decode(
    values: Tensor, indices: Tensor, *, w_dec: Tensor, b_dec: Tensor | None = None
) -> Tensor:
    """Sum of the selected decoder rows times their values, plus b_dec, in w_dec's dtype."""
    dtype = accumulate_dtype(w_dec.dtype)
    rows = embedding(indices, w_dec)  # w_dec[indices], but no index may be negative
    # Not a matrix product, which autocast would round.
    out = (values.to(dtype)[..., None] * rows.to(dtype)).sum(-2)
    if b_dec is not None:
        out = out + b_dec.to(dtype)
    return out.to(w_dec.dtype)


def nested_decode(
    values: Tensor,
    indices: Tensor,
    bounds: Sequence[int],
    *,
    w_dec: Tensor,
    b_dec: Tensor | None = None,
) -> Tensor:
    """`sparse_decode` of the latents below each bound: [..., G, d]."""
    parts = [
        sparse_decode(values.where(indices < bound, 0), indices, w_dec=w_dec, b_dec=b_dec)
        for bound in bounds
    ]
    return torch.stack(parts, -2)


def refine_codes(
    values: Tensor,
    indices: Tensor,
    x: Tensor,
    *,
    w_dec: Tensor,
    b_dec: Tensor | None = None,
    rate: Tensor,
    silent: float = 0.0,
) -> SparseCodes:
    """Steps z <- ReLU(z + rate D (x - b_dec - z D)) on the active values; D: the codes' rows."""
    dtype = accumulate_dtype(w_dec.dtype)
    rows, active = embedding(indices, w_dec).to(dtype), values.detach().abs() > silent
    for step in rate:
        x_hat = sparse_decode(values, indices, w_dec=w_dec, b_dec=b_dec)
        products = (rows * (x - x_hat).to(dtype)[..., None, :]).sum(-1)
        values = values.where(~active, (values + step * products.to(values.dtype)).relu())
    return SparseCodes(values, indices)


def hierarchical_loss(
    values: Tensor,
    indices: Tensor,
    prefixes: Sequence[int],
    *,
    w_dec: Tensor,
    b_dec: Tensor | None = None,
    target: Tensor,
) -> tuple[Tensor, Tensor]:
    """Squared error of the reconstruction from as many first codes of each token as a prefix has,
    summed over tokens, mean over prefixes (scalar); and the residual [..., d] of the last prefix.
    """
    dtype = accumulate_dtype(w_dec.dtype)
    rows = embedding(indices, w_dec).to(dtype)
    x_hats = (values.to(dtype)[..., None] * rows).cumsum(-2)
    if b_dec is not None:
        x_hats = x_hats + b_dec.to(dtype)
    residuals = x_hats[..., [end - 1 for end in prefixes], :] - target.to(dtype)[..., None, :]
    return residuals.square().sum() / len(prefixes), residuals[..., -1, :].detach()


def rounded_moments(first: Tensor, second: Tensor, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """AdamW's moments [rows, d] (float32) in bfloat16, rounded by chance after a step (from 1).

    seed: of the weight.  The noise depends on it, on the step, and on an element's row and column.
    """
    rows, d = first.shape
    key = hashed(hashed(torch.tensor([seed])) + step & BITS)
    key = hashed(key + torch.arange(rows) & BITS)[:, None]
    noise = hashed(key + torch.arange(d) & BITS)
    return rounded_by_chance(first, noise), rounded_by_chance(second, noise >> 16)


def hashed(number: Tensor) -> Tensor:
    """32 bits that look random, from 32 bits: one to one. number: int64, below 2^32."""
    number = ((number ^ (number >> 16)) * 0x7FEB352D) & BITS
    number = ((number ^ (number >> 15)) * 0x846CA68B) & BITS
    return number ^ (number >> 16)


def rounded_by_chance(value: Tensor, noise: Tensor) -> Tensor:
    """Finite float32 numbers in bfloat16: up or down, with a chance that makes the mean right.

    noise: int64, of which 16 bits are used: they are added below the bits that stay.
    """
    bits = (value.view(torch.int32).long() & BITS) + (noise & 0xFFFF)
    bits = bits & 0xFFFF0000
    return torch.where(bits >= 2**31, bits - 2**32, bits).int().view(torch.float32).bfloat16()


def _competing(scores: Tensor, mask: Tensor | None, scale: Tensor | None) -> Tensor:
    """What latents [..., F] are selected by."""
    scores = scores.detach() if scale is None else scores.detach() * scale
    return scores if mask is None else scores.masked_fill(~mask, -torch.inf)
