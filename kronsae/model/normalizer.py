"""Normalisation of activations to units that do not depend on the language model."""

import math
from typing import Any

import torch
from torch import Tensor

from kronsae.errors import InputError

OUTLIER_FACTOR = 100
"""Activations at more than so many times the usual distance from the median are left out."""


class Normalizer:
    """Centres activations and scales them so that their mean squared norm is d.

    The SAE then learns in units that do not depend on the model; `SAE.folded` undoes it.
    """

    def __init__(self, mean: Tensor, scale: float) -> None:
        self.mean = mean
        self.scale = scale

    @classmethod
    def of(cls, x: Tensor) -> "Normalizer":
        """The normalizer of sample activations [N, d]. Raises InputError if they are all the same.

        Outliers are left out: activations OUTLIER_FACTOR times as far from the median as nine
        tenths are. A single enormous one would otherwise scale all others to almost nothing.
        """
        x = x.double()
        distances = (x - x[:1024].median(0).values).square().mean(1)
        usual = distances.sort().values[len(x) * 9 // 10]
        if usual > 0:
            x = x[distances <= OUTLIER_FACTOR**2 * usual]
        mean = x.mean(0)
        variance = (x - mean).square().mean().item()
        if not math.isfinite(variance) or variance <= 0:
            raise InputError(
                f"the first {x.shape[0]} activations have variance {variance}: "
                "expected vectors that are finite and not all equal"
            )
        return cls(mean.float(), variance**-0.5)

    def __call__(self, x: Tensor) -> Tensor:
        return (x - self.mean).mul_(self.scale)

    def to(self, device: torch.device) -> "Normalizer":
        return Normalizer(self.mean.to(device), self.scale)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "scale": self.scale}
