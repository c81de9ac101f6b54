"""`threshold_encode`: every latent above a threshold of its own, as JumpReLU needs them."""

import torch
from torch import Tensor

from kronsae_kernels import backends, reference
from kronsae_kernels.common import (
    COMPOSITIONS,
    SparseCodes,
    accumulate_dtype,
    check_choice,
    check_number,
    check_same,
    check_shape,
    check_tensors,
    dict_size,
    without_autocast,
)
from kronsae_kernels.encode import Selected, check_encoder
from kronsae_kernels.operator import operator


def threshold_encode(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None = None,
    *,
    threshold: Tensor,
    m: int | None = None,
    composition: str = "mand",
    eps: float = 0.0,
    impl: str | None = None,
) -> SparseCodes:
    """Every latent whose value exceeds its threshold, and is not silent; padded to [..., w].

    Equals `reference.threshold_encode`. A latent is silent if its product is 0 (dense: if it is 0),
    or for composition "mul" not positive. [Rajamanoharan et al. 2024: JumpReLU]
    w is the largest number of such latents on one token (at least 1). Tokens with fewer fill up at
    the end: value 0, at the index of some latent, without gradient. So does a row with NaN.

    x: [..., d].  w_enc: [h, m + n, d] with m given (Kron), or [F, d] without (dense).
    b_enc: [h, m + n] or [F], or None.  threshold: [F], of the latents' values; no gradient.
    composition, eps, impl, order of the latents, gradients and errors: as in `fused_encode`.
    Memory: O(B w) and one chunk of tokens' scores [b, F], forward alone.
    """
    x, w_enc, b_enc = check_encoder(x, w_enc, b_enc, None, rank=2 if m is None else 3)
    check_tensors(threshold=threshold)
    check_shape("threshold", threshold, (dict_size(w_enc, m),), "[F]")
    check_same("device", x=x, threshold=threshold)
    check_choice("composition", composition, COMPOSITIONS)
    check_number("eps", eps, 0)
    name = backends.choose(impl, x.device, x.dtype)
    if name == "reference":
        return reference.threshold_encode(
            x, w_enc, b_enc, threshold=threshold, m=m, composition=composition, eps=eps
        )
    flat = x.reshape(-1, x.shape[-1])
    base, extension, indices, counts = torch.ops.kronsae.threshold_encode(
        flat, w_enc, b_enc, threshold.detach(), m, eps, composition, name
    )
    values = base if m is None else reference.compose(base * extension, composition, eps)
    values = values.where(torch.arange(values.shape[1], device=x.device) < counts[:, None], 0)
    shape = (*x.shape[:-1], values.shape[1])
    return SparseCodes(values.view(shape), indices.view(shape))


@operator("threshold_encode")
class ThresholdEncode(Selected):
    @staticmethod
    def compute(
        x: Tensor,
        w_enc: Tensor,
        b_enc: Tensor | None,
        threshold: Tensor,
        m: int | None,
        eps: float,
        composition: str,
        impl: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with without_autocast(x):
            return backends.module(impl).threshold_encode(
                x, w_enc, b_enc, threshold, m, eps, composition
            )

    @staticmethod
    def fake(x, w_enc, b_enc, threshold, m, eps, composition, impl):
        width = torch.library.get_ctx().new_dynamic_size()
        factor = x.new_empty(x.shape[0], width, dtype=accumulate_dtype(x.dtype))
        indices = torch.empty_like(factor, dtype=torch.int64)
        return factor, torch.empty_like(factor), indices, indices.new_empty(x.shape[0])
