"""`threshold_encode`: every latent above a threshold of its own, as JumpReLU needs them."""

from typing import Any

import torch
from torch import Tensor

from kronsae_kernels import backends, reference
from kronsae_kernels.common import (
    COMPOSITIONS,
    INTEGERS,
    SparseCodes,
    accumulate_dtype,
    as_integer,
    as_number,
    check_choice,
    check_floating,
    check_number,
    check_same,
    check_shape,
    check_tensors,
    dict_size,
    require,
    shape_of,
    without_autocast,
)
from kronsae_kernels.encode import SelectedAnyWidth, check_encoder, codes_of
from kronsae_kernels.rules import operator


def threshold_encode(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None = None,
    *,
    threshold: Tensor | float,
    m: int | None = None,
    composition: str = "mand",
    eps: float = 0.0,
    impl: str | None = None,
    layout: str = "head-major",
    bandwidth: float | None = None,
) -> SparseCodes:
    """Every latent whose value exceeds its threshold, and is not silent; padded to [..., w].

    Equals `reference.threshold_encode`. A latent is silent if its product is 0 (dense: if it is 0),
    or for composition "mul" not positive. [Rajamanoharan et al. 2024: JumpReLU]
    w is the largest number of such latents on one token (at least 1). Tokens with fewer fill up at
    the end: value 0, at the index of some latent, without gradient. So does a row with NaN.

    x: [..., d].  w_enc: [h, m + n, d] with m given (Kron), or [F, d] without (dense).
    b_enc: [h, m + n] or [F], or None.  threshold: [F], where no value exceeds NaN; or
    a finite number for all latents.
    bandwidth: None, or that of the pseudo-derivatives (`jump`) by which a threshold learns. Codes
        then contain the latents less than half of it below their threshold, too, with value 0: for
        the gradient. Without it thresholds get none.
    composition, eps, impl, layout, order of the latents, gradients and errors: as in
    `fused_encode`.
    Memory: O(B w) and one chunk of tokens' pre-latents (dense: scores [b, F]), forward alone.
    """
    rank = 2 if m is None else 3
    x, w_enc, b_enc = check_encoder(x, w_enc, b_enc, None, rank=rank, layout=layout)
    m, eps, bandwidth = as_integer(m), as_number(eps), as_number(bandwidth)
    threshold = _check_threshold(threshold, x, dict_size(w_enc, m))
    check_choice("composition", composition, COMPOSITIONS)
    check_number("eps", eps, 0)
    if bandwidth is not None:
        _check_bandwidth(bandwidth)
    lowest = threshold.detach() - (0.0 if bandwidth is None else bandwidth / 2)
    gate: dict[str, Any] = {"m": m, "composition": composition, "eps": eps}
    name = backends.choose(impl, x.device, x.dtype)
    if name == "reference":
        values, indices = reference.threshold_encode(x, w_enc, b_enc, threshold=lowest, **gate)
    else:
        *results, counts = torch.ops.kronsae.threshold_encode(
            x.reshape(-1, x.shape[-1]), w_enc, b_enc, m, composition, name, lowest, eps
        )
        values, indices = codes_of(x, *results, counts=counts, **gate)
    if bandwidth is not None:  # (a latent of value 0 is an unused slot)
        values, _ = jump(values, threshold[indices], bandwidth, used=values != 0)
    return SparseCodes(values, indices)


def jump(
    values: Tensor, threshold: Tensor | float, bandwidth: float, used: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """JumpReLU z = v H(v - t) and activity H(v - t) of values v with thresholds t, elementwise.

    Derivatives by t: dz/dt = -(t / w) K((v - t) / w) and dH/dt = -(1 / w) K((v - t) / w), with the
    rectangle K(u) = 1 for |u| < 1/2 and w the bandwidth. By v: dz/dv = H(v - t) and dH/dv = 0.
    used: False in unused slots, where all of these are 0. [Rajamanoharan et al. 2024]
    threshold: as values, or what can be expanded to them: [F] for values [..., F], or a number.
    """
    check_floating(values=values)
    bandwidth = as_number(bandwidth)
    _check_bandwidth(bandwidth)
    if not isinstance(threshold, Tensor):
        number = as_number(threshold)
        check_number("threshold", number, None)
        threshold = values.new_tensor(number)
    if threshold.dtype in INTEGERS:
        threshold = threshold.to(values.dtype)
    check_floating(threshold=threshold)
    if threshold.ndim > 0:
        check_same("device", values=values, threshold=threshold)
        sizes = zip(reversed(threshold.shape), reversed(values.shape), strict=False)
        require(
            threshold.ndim <= values.ndim and all(size in (1, whole) for size, whole in sizes),
            lambda: (
                f"threshold: expected a shape that can be expanded to {shape_of(values)}, that of "
                f"values, got {shape_of(threshold)}"
            ),
        )
    if used is not None:
        check_tensors(used=used)
        require(used.dtype == torch.bool, f"used: expected torch.bool, got {used.dtype}")
        check_shape("used", used, tuple(values.shape), "the shape of values")
    active, near = values > threshold, (values - threshold).abs() < bandwidth / 2
    if used is not None:
        active, near = active & used, near & used
    fixed = threshold.detach()
    step = torch.where(near, threshold - fixed, 0) / -bandwidth  # 0, with the derivative of H
    z = values.where(active, 0) + torch.where(near, fixed, 0) * step
    return z, active.to(values.dtype) + step


def _check_threshold(threshold: Tensor | float, x: Tensor, size: int) -> Tensor:
    """A threshold for each of F = size latents."""
    if not isinstance(threshold, Tensor):
        number = as_number(threshold)
        check_number("threshold", number, None)
        threshold = x.new_tensor(number, dtype=accumulate_dtype(x.dtype))
    if threshold.dtype in INTEGERS:
        threshold = threshold.to(accumulate_dtype(x.dtype))
    check_floating(threshold=threshold)
    if threshold.ndim == 0:
        threshold = threshold.expand(size)
    check_shape("threshold", threshold, (size,), "[F], or a single number")
    check_same("device", x=x, threshold=threshold)
    return threshold


def _check_bandwidth(bandwidth: float) -> None:
    check_number("bandwidth", bandwidth, 0)
    require(bandwidth > 0, f"bandwidth: expected > 0, got {bandwidth}")


@operator("threshold_encode")
class ThresholdEncode(SelectedAnyWidth):
    @staticmethod
    def compute(
        x: Tensor,
        w_enc: Tensor,
        b_enc: Tensor | None,
        m: int | None,
        composition: str,
        impl: str,
        threshold: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with without_autocast(x):
            return backends.module(impl).threshold_encode(
                x, w_enc, b_enc, threshold, m, eps, composition
            )
