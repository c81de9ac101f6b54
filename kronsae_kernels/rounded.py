"""AdamW with bfloat16 moments, in torch: as the kernels of `TrainingStep` compute it.

Moments are computed in float32 and rounded by chance. To the nearest, a second moment would stay
where it is: it changes by 0.1 % a step, and bfloat16 numbers are 0.4 to 0.8 % apart.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from kronsae_kernels.torch_impl import spans

BYTES = 16
"""Memory for each entry of a chunk: two moments in float32, noise, and one more of its size."""


@torch.no_grad()
def adamw_(
    weight: Tensor,
    gradient: Tensor,
    state: Mapping[str, Tensor],
    *,
    seed: int,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float = 0.0,
    adam_eps: float = 1e-8,
) -> None:
    """One step of torch.optim.AdamW on a matrix, in place; then the moments are rounded by chance.

    weight: float32 or float64 [..., d], contiguous, or so with its first two dimensions exchanged.
    state: its "step", "exp_avg" and "exp_avg_sq", the last two bfloat16, all changed in place.
    seed: of the noise, as in `reference.rounded_moments`: of `step_arguments.SEEDS`.
    """
    tensors = [weight.detach(), gradient, state["exp_avg"], state["exp_avg_sq"]]
    if not weight.is_contiguous():  # a Kron encoder's
        tensors = [tensor.transpose(0, 1) for tensor in tensors]
    rows = [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
    device, (count, d) = weight.device, rows[0].shape
    step = int(state["step"]) + 1
    start = _key(seed, step)
    columns = torch.arange(d, dtype=torch.int32, device=device)
    for span in spans(count, BYTES * d, device, least=1):
        w, g, first, second = (tensor[span] for tensor in rows)
        one, two = first.to(w.dtype), second.to(w.dtype)
        adamw(
            *([w], [g], [one], [two], [], [state["step"].clone()]),
            fused=True,
            amsgrad=False,
            beta1=betas[0],
            beta2=betas[1],
            lr=lr,
            weight_decay=weight_decay,
            eps=adam_eps,
            maximize=False,
        )
        index = torch.arange(span.start, span.start + len(w), dtype=torch.int32, device=device)
        noise = _hashed(_hashed(index + start)[:, None] + columns)
        _round(one.float(), noise & 0xFFFF, first)
        _round(two.float(), noise.bitwise_right_shift_(16).bitwise_and_(0xFFFF), second)
    state["step"].add_(1)


def _key(seed: int, step: int) -> int:
    """The int32 from which the noise of a step is drawn."""
    return int(_hashed(_hashed(torch.tensor([seed], dtype=torch.int32)) + step))


def _hashed(number: Tensor) -> Tensor:
    """32 bits that look random, from 32 bits (int32, changed in place): one to one."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32)):
        number.bitwise_xor_((number >> shift).bitwise_and_((1 << 32 - shift) - 1)).mul_(factor)
    return number.bitwise_xor_((number >> 16).bitwise_and_(0xFFFF))


def _round(value: Tensor, noise: Tensor, out: Tensor) -> None:
    """Write finite float32 numbers as bfloat16: up or down, with a chance that keeps the mean.

    value: changed.  noise: int32 of 16 bits, which are added below the bits that stay.
    """
    bits = value.view(torch.int32).add_(noise).bitwise_right_shift_(16)
    out.view(torch.int16).copy_(bits)
