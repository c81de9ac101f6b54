"""Arguments of a training step (weights, AdamW's state, thresholds, settings) and their checks.

Checks raise ValueError, which names what is wrong.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kronsae_kernels.common import (
    COMPOSITIONS,
    DTYPES,
    check_choice,
    check_floating,
    check_matrix,
    check_number,
    check_same,
    check_shape,
    check_tensors,
    dict_size,
    require,
    shape_of,
    shown,
)
from kronsae_kernels.nested import check_bounds
from kronsae_kernels.ranks import Ranks

NAMES = ("w_enc", "b_enc", "w_dec", "b_dec")
MOMENTS = ("float32", "bfloat16")
SEEDS = {"w_enc": 1, "w_dec": 2}
"""Weights whose moments may be in bfloat16, and seeds of the noise that rounds these."""


class Thresholds(NamedTuple):
    """Thresholds of a JumpReLU, which selects every latent above its own, and how they are trained.

    [Rajamanoharan et al. 2024: JumpReLU SAEs]
    """

    log: Tensor
    """float32 [F], contiguous: logarithms of the thresholds, which are trained in place."""
    bandwidth: float
    """Width of the pseudo-derivatives by a threshold t: for a value v with |v - t| < bandwidth / 2,
    that of the JumpReLU is -t / bandwidth, that of the number of active latents -1 / bandwidth."""
    l0_coefficient: float
    """Weight of (L0 / k - 1)^2, L0 the mean number of active latents of the tokens of a pass."""


def new_state(
    weights: Mapping[str, Tensor], moments: str = "float32"
) -> dict[str, dict[str, Tensor]]:
    """AdamW's state before its first step, for each weight, as torch.optim.AdamW makes it.

    moments: as in `TrainingStep`.
    """
    return {
        name: {
            "step": torch.zeros((), device=weight.device),
            **{
                moment: torch.zeros_like(
                    weight.detach(),
                    dtype=_dtype_of_moments(name, weight.dtype, moments),
                    memory_format=torch.preserve_format,
                )
                for moment in ("exp_avg", "exp_avg_sq")
            },
        }
        for name, weight in weights.items()
    }


def _dtype_of_moments(name: str, weight: torch.dtype, moments: str) -> torch.dtype:
    return torch.bfloat16 if moments == "bfloat16" and name in SEEDS else weight


def check_state(
    state: Mapping[str, Mapping[str, Tensor]], weights: Mapping[str, Tensor], moments: str
) -> None:
    require(isinstance(state, Mapping), lambda: f"state: expected a mapping, got {shown(state)}")
    for name, weight in weights.items():
        of_weight = state.get(name, {})
        if not isinstance(of_weight, Mapping):
            raise ValueError(f"state: {name}: expected a mapping, got {shown(of_weight)}")
        missing = {"step", "exp_avg", "exp_avg_sq"} - of_weight.keys()
        require(not missing, f"state: {name}: expected a step and both moments, not {missing}")
        step = of_weight["step"]
        require(
            isinstance(step, Tensor)
            and step.dtype == torch.float32
            and step.numel() == 1
            and step.device == weight.device,
            f"state: {name}: step: expected a float32 scalar tensor on {weight.device}, "
            f"got {step!r}",
        )
        expected = _dtype_of_moments(name, torch.float32, moments)
        for moment in ("exp_avg", "exp_avg_sq"):
            tensor, what = of_weight[moment], f"state: {name}: {moment}"
            check_tensors(**{what: tensor})
            right = tensor.dtype == expected and tensor.device == weight.device
            require(
                right and _layout(tensor) == _layout(weight),
                f"{what}: expected {expected} (moments={moments!r}), in the shape, strides and "
                f"device of the weight, {_layout(weight)} on {weight.device}, got {tensor.dtype}, "
                f"{_layout(tensor)} on {tensor.device}",
            )


def _layout(x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape, and strides where they matter."""
    return tuple(x.shape), tuple(x.stride(dim) for dim in range(x.ndim) if x.shape[dim] > 1)


def check_thresholds(thresholds: Thresholds, w_dec: Tensor, eps: float) -> None:
    require(
        isinstance(thresholds, Thresholds),
        lambda: f"thresholds: expected `Thresholds`, got {shown(thresholds)}",
    )
    check_of_latents("thresholds.log", thresholds.log, torch.float32, w_dec)
    check_number("thresholds.bandwidth", thresholds.bandwidth, 0)
    require(thresholds.bandwidth > 0, "thresholds.bandwidth: expected a number > 0, got 0")
    check_number("thresholds.l0_coefficient", thresholds.l0_coefficient, 0)
    require(eps == 0, f"eps: expected 0 with thresholds, got {eps!r}")


def check_of_latents(name: str, numbers: Tensor, dtype: torch.dtype, w_dec: Tensor) -> None:
    """A number for each latent: contiguous [F], beside the weights."""
    check_tensors(**{name: numbers})
    check_shape(name, numbers, (len(w_dec),), "[F]")
    check_same("device", **{name: numbers, "w_dec": w_dec})
    require(
        numbers.dtype == dtype and numbers.is_contiguous(),
        lambda: (
            f"{name}: expected contiguous {dtype}, "
            f"got {numbers.dtype} with stride {numbers.stride(0)}"
        ),
    )


def check_settings(
    composition: str,
    eps: float,
    dtype: torch.dtype,
    betas: tuple[float, float],
    adam_eps: float,
    weight_decay: float,
    unit_norm: bool,
) -> None:
    check_choice("composition", composition, COMPOSITIONS)
    check_bool("unit_norm", unit_norm)
    allowed = tuple(kind for kind in DTYPES if kind != torch.float64)
    require(dtype in allowed, lambda: f"dtype: expected one of {allowed}, got {shown(dtype)}")
    check_number("eps", eps, 0)
    require(
        isinstance(betas, tuple | list) and len(betas) == 2,
        lambda: f"betas: expected two numbers, got {shown(betas)}",
    )
    for index, beta in enumerate(betas):
        check_number(f"betas[{index}]", beta, 0, 1)
    check_number("adam_eps", adam_eps, 0)
    check_number("weight_decay", weight_decay, 0)


def check_bool(name: str, value: bool) -> None:
    require(isinstance(value, bool), lambda: f"{name}: expected True or False, got {shown(value)}")


def check_scalar(name: str, value: float | Tensor, device: torch.device, low: float | None) -> None:
    """A number, or a scalar on the device, of which the value is not known here."""
    if not isinstance(value, Tensor):
        check_number(name, value, low)
        return
    require(
        value.numel() == 1 and value.is_floating_point() and value.device == device,
        lambda: (
            f"{name}: expected a number or a floating scalar on {device}, got {shape_of(value)} "
            f"{value.dtype} on {value.device}"
        ),
    )


def check_weights(weights: dict[str, Tensor], m: int | None) -> None:
    check_tensors(**weights)
    check_same("device", **weights)
    for name, weight in weights.items():
        require(weight.dtype == torch.float32, f"{name}: expected float32, got {weight.dtype}")
    w_enc, w_dec = weights["w_enc"], weights["w_dec"]
    check_matrix("w_dec", w_dec, 2, "[F, d_target]")
    size, d_target = w_dec.shape
    rank, layout = (2, "[F, d]") if m is None else (3, "[h, m + n, d]")
    check_matrix("w_enc", w_enc, rank, layout)
    latents, stored = dict_size(w_enc, m), w_enc.transpose(0, rank - 2)
    require(latents == size, f"w_dec: expected F = {latents} rows as of w_enc, got {size}")
    check_shape("b_enc", weights["b_enc"], tuple(w_enc.shape[:-1]), layout.replace(", d", ""))
    check_shape("b_dec", weights["b_dec"], (d_target,), "[d_target]")
    require(
        stored.is_contiguous() and all(weights[n].is_contiguous() for n in NAMES[1:]),
        "weights: expected contiguous tensors, and w_enc [h, m + n, d] stored row-major over "
        "heads: torch.empty(m + n, h, d).transpose(0, 1)",
    )


def check_ranks(ranks: Ranks | None, thresholds: Thresholds | None) -> None:
    require(
        ranks is None or all(hasattr(ranks, n) for n in ("rank", "size", "sum", "gather")),
        lambda: f"ranks: expected rank, size, sum and gather (`Ranks`), got {shown(ranks)}",
    )
    require(
        ranks is None or ranks.size == 1 or thresholds is None,
        "thresholds: ranks select the k latents of each token; expected None",
    )


def check_refine(
    refine: Tensor,
    weights: dict[str, Tensor],
    thresholds: Thresholds | None,
    ranks: Ranks | None,
) -> None:
    check_tensors(refine=refine)
    check_same("device", refine=refine, w_dec=weights["w_dec"])
    require(
        refine.ndim == 1 and len(refine) > 0 and refine.dtype == torch.float32,
        lambda: f"refine: expected float32 [N], N >= 1, got {refine.dtype} {shape_of(refine)}",
    )
    require(
        thresholds is None and (ranks is None or ranks.size == 1),
        "refine: expected neither thresholds nor several ranks beside it",
    )
    d, d_target = weights["w_enc"].shape[-1], weights["w_dec"].shape[1]
    require(d == d_target, f"refine: expected rows of w_dec as wide as x, {d}, got {d_target}")


def check_target(target: Tensor | None, x: Tensor, d_target: int) -> None:
    check_floating(target=target)
    require(
        target is not None or x.shape[1] == d_target,
        f"target: expected [B, {d_target}], as w_dec's rows are no x [B, {x.shape[1]}]",
    )
    check_shape("target", target, (x.shape[0], d_target), "[B, d_target]")


def check_prefixes(bounds: Sequence[int], size: int, most: int) -> list[int]:
    """The bounds of up to `most` nested prefixes, the last of which holds all F = size latents."""
    checked = check_bounds(bounds, size)
    require(
        checked[-1] == size and len(checked) <= most,
        f"bounds: expected at most {most} prefixes, of which the last ends at "
        f"F = {size}, got {checked}",
    )
    return checked
