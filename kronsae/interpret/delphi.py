"""For eai-delphi: encoders by hookpoint, as its `LatentCache` takes them."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from kronsae.interop.load import load
from kronsae.model.sae import SAE


def encoders(
    saes: Mapping[str, SAE | str | Path], device: torch.device | str = "cpu"
) -> dict[str, Callable[[Tensor], Tensor]]:
    """{hookpoint: encode}, where encode makes dense latents [b, t, F] of activations [b, t, d].

    saes: SAEs, or what `kronsae.load` takes, by the hookpoint's name in the model that delphi
    reads. The first position of each context gives zeros: SAEs are not trained on it.
    """
    return {
        hookpoint: _encoder(sae if isinstance(sae, SAE) else load(sae, device=device))
        for hookpoint, sae in saes.items()
    }


def _encoder(sae: SAE) -> Callable[[Tensor], Tensor]:
    @torch.no_grad()
    def encode(x: Tensor) -> Tensor:
        values, indices = sae.encode(x.to(sae.W_dec))
        dense = values.new_zeros(*x.shape[:-1], sae.dict_size)
        dense.scatter_add_(-1, indices, values)  # unused slots add 0
        dense[..., 0, :] = 0
        return dense

    return encode
