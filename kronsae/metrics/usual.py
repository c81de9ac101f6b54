"""Values of chosen latents, and what is usual for them on a text.

Letters: n tokens, k active latents, e chosen latents.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kronsae.metrics.heldout import HeldoutText
from kronsae.model.sae import SAE
from kronsae.system.devices import as_double
from kronsae_kernels import SparseCodes


def values_of(codes: SparseCodes, latents: Sequence[int], dict_size: int) -> Tensor:
    """Values [n, e] of some distinct latents in codes [n, k], 0 if they are not active."""
    column = torch.full((dict_size,), len(latents), device=codes.indices.device)
    column[list(latents)] = torch.arange(len(latents), device=column.device)
    out = codes.values.new_zeros(len(codes.values), len(latents) + 1)
    return out.scatter_add_(1, column[codes.indices], codes.values)[:, :-1]


class Usual(NamedTuple):
    """How often a latent fires on a text, and its values (of raw activations) where it does."""

    tokens: int
    """On which it fires."""
    read: int
    """Tokens of the text."""
    mean: float
    """Over the tokens on which it fires; 0 if there is none."""
    maximum: float


@torch.no_grad()
def usual_values(sae: SAE, text: HeldoutText, latents: Sequence[int]) -> dict[int, Usual]:
    """What is usual for latents on a text, by latent. One pass of the model up to the hookpoint.

    Raises InputError for a latent outside [0, F).
    """
    sae.check_latents(latents)
    chosen = list(dict.fromkeys(latents))
    read = 0
    fired = torch.zeros(len(chosen), dtype=torch.int64)
    total, most = torch.zeros(2, len(chosen), dtype=torch.float64)
    for _, _, x in text.read():
        if not len(x):
            continue
        values = as_double(values_of(sae.encode(x.to(sae.W_dec)), chosen, sae.dict_size)).cpu()
        read += len(x)
        fired += (values.abs() > sae.silent_value).sum(0)
        total += values.sum(0)
        most = torch.maximum(most, values.amax(0))
    means = total / fired.clamp(min=1)
    figures = zip(fired.tolist(), means.tolist(), most.tolist(), strict=True)
    return {
        latent: Usual(count, read, mean, maximum)
        for latent, (count, mean, maximum) in zip(chosen, figures, strict=True)
    }
