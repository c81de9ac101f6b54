"""`nested_decode`: the reconstructions from nested prefixes of the dictionary, in one pass."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from kronsae_kernels import backends, reference
from kronsae_kernels.common import SparseCodes, as_integer, is_integer, require, shown
from kronsae_kernels.decode import check_decode, check_range
from kronsae_kernels.rules import has_values


def nested_decode(
    codes: SparseCodes,
    bounds: Iterable[int],
    w_dec: Tensor,
    b_dec: Tensor | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """Reconstruction from the latents below each bound: [..., G, d] for G bounds.

    Equals `reference.nested_decode`: out[..., g, :] is `sparse_decode` of the latents in
    [0, bounds[g]). [Bussmann et al. 2025: Matryoshka SAEs] Each decoder row of a token is gathered
    once, for all G prefixes, forward and backward.

    codes: values [..., k] and indices [..., k] in [0, F).  bounds: ascending, in [1, F]; latents
    from the last bound on take no part.  w_dec: [F, d].  b_dec: [d] or None.
    impl, results, gradients and errors: as of `sparse_decode`.
    """
    require(
        isinstance(codes, (tuple, list)) and len(codes) == 2,
        lambda: f"codes: expected (values, indices), got {shown(codes)}",
    )
    values, indices = codes
    indices = check_decode(values, indices, w_dec, b_dec)
    bounds = check_bounds(bounds, w_dec.shape[0])
    name = backends.choose(impl, w_dec.device, w_dec.dtype)
    if name == "reference":
        if has_values(indices):
            check_range(indices, w_dec.shape[0])
        return reference.nested_decode(values, indices, bounds, w_dec=w_dec, b_dec=b_dec)
    shape = math.prod(values.shape[:-1]), values.shape[-1]
    out = torch.ops.kronsae.decode(
        values.reshape(shape), indices.reshape(shape), w_dec, b_dec, bounds, name
    )
    return out.view(*values.shape[:-1], *out.shape[1:])


def check_bounds(
    bounds: Iterable[int], size: int, name: str = "bounds", letter: str = "F"
) -> list[int]:
    """The bounds of nested prefixes of F = size latents. Raises ValueError if they are none.

    name, letter: what the message calls them, and their largest.
    """
    if isinstance(bounds, Tensor) and not bounds.is_meta:
        bounds = bounds.tolist()
    if isinstance(bounds, Iterable):
        bounds = [as_integer(bound) for bound in bounds]
    right, previous = isinstance(bounds, Sequence) and len(bounds) > 0, 0
    for bound in bounds if right else ():  # (older torch.compile cannot trace all())
        right = right and is_integer(bound) and previous < bound <= size
        previous = bound if right else size
    require(
        right,
        lambda: (
            f"{name}: expected a list of ascending integers in [1, {letter}] = [1, {size}], "
            f"got {shown(bounds)}"
        ),
    )
    return bounds
