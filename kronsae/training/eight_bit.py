"""AdamW with moments of 8 bits, by bitsandbytes."""

import functools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from kronsae.errors import InputError, require
from kronsae_kernels.torch_impl import spans

BLOCK = 256
"""Entries that share a scale in bitsandbytes' 8-bit optimizers."""

BYTES = 16
"""Memory for each entry of a chunk: copies of weight, gradient and moments in float32."""


def check(device: torch.device, heads: int) -> None:
    """Raise InputError where moments of 8 bits cannot be had. heads: processes that share them."""
    require("bitsandbytes", "--moments 8bit")
    if device.type not in ("cpu", "cuda"):
        raise InputError(
            f"moments '8bit': bitsandbytes has them on a CPU and on CUDA, not on {device.type}: "
            "use bfloat16"
        )
    if heads > 1:
        raise InputError(
            f"moments '8bit': a block of {BLOCK} entries has one scale, and would be cut where "
            f"{heads} processes share the heads: use bfloat16, or leave --tensor-parallel out"
        )


def new_state(weight: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a matrix before its first step: moments, and scales of their blocks."""
    blocks = math.ceil(weight.numel() / BLOCK)
    moments = {name: torch.zeros_like(weight, dtype=torch.uint8) for name in _MAPS}
    scales = {f"{name}_scale": torch.zeros(blocks, device=weight.device) for name in _MAPS}
    return {"step": torch.zeros((), device=weight.device), **moments, **scales}


def state_bytes(entries: int) -> int:
    """Bytes of the moments of a matrix, with their scales."""
    return len(_MAPS) * (entries + 4 * math.ceil(entries / BLOCK))


def adamw_(
    weight: Tensor,
    gradient: Tensor,
    state: Mapping[str, Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float = 0.0,
    adam_eps: float = 1e-8,
) -> None:
    """One step of AdamW on a matrix, in place.

    weight: float32 [..., d], contiguous, or so with its first two dimensions exchanged.
    """
    from bitsandbytes import functional

    tensors = [gradient, weight.detach(), *(state[name] for name in _MAPS)]
    if not weight.is_contiguous():  # a Kron encoder's
        tensors = [tensor.transpose(0, 1) for tensor in tensors]
    flat = [tensor.reshape(-1) for tensor in tensors]
    state["step"].add_(1)
    step = int(state["step"])
    for span in spans(len(state["exp_avg_scale"]), BYTES * BLOCK, weight.device, least=1):
        entries = slice(span.start * BLOCK, span.stop * BLOCK)
        g, w, first, second = (tensor[entries] for tensor in flat)
        functional.optimizer_update_8bit_blockwise(
            "adam",
            g,
            w,
            first,
            second,
            beta1=betas[0],
            beta2=betas[1],
            beta3=0.0,
            alpha=0.0,
            eps=adam_eps,
            step=step,
            lr=lr,
            qmap1=_map("exp_avg", weight.device),
            qmap2=_map("exp_avg_sq", weight.device),
            absmax1=state["exp_avg_scale"][span],
            absmax2=state["exp_avg_sq_scale"][span],
            weight_decay=weight_decay,
        )


_MAPS = {"exp_avg": True, "exp_avg_sq": False}
"""Whether a moment has a sign, which decides the numbers that its 8 bits stand for."""


@functools.cache
def _map(name: str, device: torch.device) -> Tensor:
    from bitsandbytes import functional

    return functional.create_dynamic_map(signed=_MAPS[name]).to(device)
