"""Correlations of latents within their head and with all others. [KronSAE, section 5.2]

Pearson correlations of latents after selection, over tokens. Latents that never fire there (or
always alike) have no correlation, and are left out.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kronsae.errors import InputError
from kronsae.model.sae import SAE
from kronsae_kernels import SparseCodes


class Correlations(NamedTuple):
    """Mean correlations of each latent that fires [a], a <= F."""

    head: Tensor
    """Mean correlation with the other latents of the head that fire; nan if there are none."""
    others: Tensor
    """Mean correlation with all other latents that fire."""
    latents: Tensor
    """Numbers of the latents [a], int64."""


@torch.no_grad()
def correlations_of(sae: SAE, x: Tensor) -> Correlations:
    """Correlations of a Kron SAE's latents over x [t, d]."""
    parts = [active_codes(sae, part) for part in x.split(4096)]
    return mean_correlations(joined(parts), sae.config.heads, sae.config.m * sae.config.n)


def active_codes(sae: SAE, x: Tensor) -> SparseCodes:
    """Codes of x [B, d], on the CPU, with value 0 where no latent is active.

    Raises InputError if some are NaN or infinite.
    """
    codes = sae.encode(x.to(sae.W_dec))
    if not torch.isfinite(codes.values).all():
        raise InputError(
            "the SAE's outputs are not finite on this text, as after training that diverged: there "
            "is nothing to measure"
        )
    return SparseCodes(codes.values.where(sae.fired(codes), 0).cpu(), codes.indices.cpu())


def joined(parts: Sequence[SparseCodes]) -> SparseCodes:
    """Codes [t, k] of batches that need not have the same k."""
    width = max(part.values.shape[1] for part in parts)
    padded = [
        [nn.functional.pad(entries, (0, width - entries.shape[1])) for entries in part]
        for part in parts
    ]
    return SparseCodes(*map(torch.cat, zip(*padded, strict=True)))


def mean_correlations(codes: SparseCodes, heads: int, size: int) -> Correlations:
    """From codes [t, k] of latents in `heads` heads of `size`; no [F, F] or [t, F] tensor is made.

    With each latent's activations ẑ_i centred and scaled to norm 1 over the tokens, the sum of its
    correlations with a set of latents is ẑ_i · Σ_j ẑ_j, and ẑ_i sums to 0: so the activations need
    not be centred in the second factor.
    """
    tokens = codes.values.shape[0]
    count = heads * size
    values, latents = codes.values.double(), codes.indices.long()
    sums, squares = (
        torch.zeros(count, dtype=torch.float64).index_add_(0, latents.flatten(), terms.flatten())
        for terms in (values, values.square())
    )
    variance = squares - sums.square() / tokens
    fires = variance > 1e-12 * squares  # rounding leaves less than that of a constant
    scale = torch.where(fires, variance, 1).rsqrt() * fires
    scaled = values * scale[latents]

    def summed(group: Tensor, groups: int) -> Tensor:
        """For each latent its correlation with all of its group, itself included. group: [F]."""
        together = torch.zeros(count, dtype=torch.float64)
        rows = max(1, 2**24 // groups)
        for z, index in zip(scaled.split(rows), latents.split(rows), strict=True):
            of = group[index]  # [rows, k]
            total = torch.zeros(len(z), groups, dtype=torch.float64).scatter_add_(1, of, z)
            together.index_add_(0, index.flatten(), (z * total.gather(1, of)).flatten())
        means = torch.zeros(groups, dtype=torch.float64).index_add_(0, group, sums * scale)
        return together - sums * scale * means[group] / tokens

    def mean_of_others(group: Tensor, groups: int) -> Tensor:
        alive = torch.zeros(groups, dtype=torch.float64).index_add_(0, group, fires.double())
        return ((summed(group, groups) - 1) / (alive[group] - 1))[fires]

    of_head = torch.arange(count) // size
    return Correlations(
        mean_of_others(of_head, heads),
        mean_of_others(torch.zeros_like(of_head), 1),
        fires.nonzero().squeeze(1),
    )
