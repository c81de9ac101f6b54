"""`refine_codes`: gradient steps on the values of selected latents."""

import math

import torch
from torch import Tensor

from kronsae_kernels import backends, reference
from kronsae_kernels.common import (
    SparseCodes,
    check_floating,
    check_number,
    check_same,
    check_shape,
    check_tensors,
    require,
    shown,
)
from kronsae_kernels.decode import check_decode, check_range, sparse_decode
from kronsae_kernels.rules import has_values


def refine_codes(
    codes: SparseCodes,
    x: Tensor,
    w_dec: Tensor,
    b_dec: Tensor | None = None,
    *,
    rate: Tensor,
    silent: float = 0.0,
    impl: str | None = None,
) -> SparseCodes:
    """The codes after gradient steps on their values, which make the reconstruction error smaller.

    Equals `reference.refine_codes`. A step is z <- ReLU(z + rate D (x - b_dec - sum_s z_s D_s)), of
    which D [k, d] are the decoder rows of the token's codes: the gradient of half the squared
    error. Latents stay the same ones, in the same places: values are no longer sorted.

    codes: values [..., k] and indices [..., k] in [0, F).  x: [..., d], what is reconstructed.
    w_dec: [F, d].  b_dec: [d] or None.  rate: [N], one for each of N steps.
    silent: values of at most this magnitude are of latents that are not active, and stay.

    Gradients of all tensors but indices. Each step reads the k rows twice, forward, and writes no
    [B, k, d]. Raises as `sparse_decode` does.
    """
    require(
        isinstance(codes, (tuple, list)) and len(codes) == 2,
        lambda: f"codes: expected (values, indices), got {shown(codes)}",
    )
    values, indices = codes
    indices = check_decode(values, indices, w_dec, b_dec)
    check_tensors(x=x, rate=rate)
    check_floating(x=x, rate=rate)
    check_shape("x", x, (*values.shape[:-1], w_dec.shape[1]), "[..., d]")
    require(rate.ndim == 1, lambda: f"rate: expected [N], got {list(rate.shape)}")
    check_same("device", x=x, w_dec=w_dec, rate=rate)
    check_same("dtype", x=x, w_dec=w_dec)
    check_number("silent", silent, 0)
    name = backends.choose(impl, w_dec.device, w_dec.dtype)
    if name == "reference":
        if has_values(indices):
            check_range(indices, w_dec.shape[0])
        return reference.refine_codes(
            values, indices, x, w_dec=w_dec, b_dec=b_dec, rate=rate, silent=silent
        )
    shape = math.prod(values.shape[:-1]), values.shape[-1]
    flat, rows = values.reshape(shape), indices.reshape(shape)
    x = x.reshape(shape[0], w_dec.shape[1])
    active = flat.detach().abs() > silent
    for step in rate.unbind():
        error = x - sparse_decode(flat, rows, w_dec, b_dec, impl=name)
        products, _ = torch.ops.kronsae.decode_backward(
            error, flat.detach(), rows, w_dec, None, True, False, name
        )
        flat = flat.where(~active, (flat + step * products).relu())
    return SparseCodes(flat.view(values.shape), indices)
