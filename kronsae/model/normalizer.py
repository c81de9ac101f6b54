"""Normalisation of activations to units that do not depend on the language model."""

import math
from typing import Any

import torch
from torch import Tensor

from kronsae.errors import InputError
from kronsae.model.massive import DEFAULT_MULTIPLE, Sphere
from kronsae.system.devices import as_double
from kronsae.system.documents import Keys, Number, typed

SMALLEST = 1e-30
"""Smallest variance of activations, and 1 over the largest: latents are products of two."""

SAMPLE_TOKENS = 8192
"""Number of activations, the first ones, that determine mean, scale and radius."""


_STATE = Keys(
    {"mean": Tensor, "scale": Number(float, SMALLEST, 1 / SMALLEST)},
    {"radius": Number(float, 0, math.inf, null=True)},
)


class Normalizer:
    """Centres activations and scales them so that their mean squared norm is d.

    The SAE then learns in units that do not depend on the model; `SAE.folded` undoes it.
    radius: activations farther from the mean are massive (`kronsae.model.massive`); None if it is
        not known, or none are.
    """

    def __init__(self, mean: Tensor, scale: float, radius: float | None = None) -> None:
        self.mean = mean
        self.scale = scale
        self.radius = radius

    @classmethod
    def of(cls, x: Tensor, multiple: float = DEFAULT_MULTIPLE) -> "Normalizer":
        """The normalizer of sample activations [N, d]. Raises InputError if they are all the same.

        Those farther from the mean than 10 times the median distance are left out: a single one may
        scale all others to almost nothing.
        multiple: of the median distance, beyond which activations are massive (0: 10, to count
            them).
        """
        sphere, near = Sphere.of(as_double(x), multiple or DEFAULT_MULTIPLE)
        variance = (near - sphere.mean).square().mean().item()
        if not math.isfinite(variance) or variance <= 0:
            raise InputError(
                f"the first {x.shape[0]} activations have variance {variance}: "
                "expected vectors that are finite and not all equal"
            )
        if not SMALLEST <= variance <= 1 / SMALLEST:
            raise InputError(
                f"the first {x.shape[0]} activations have variance {variance:.3g}: expected one "
                f"from {SMALLEST:g} to {1 / SMALLEST:g}, for float32 to hold products of them: "
                "multiply all activations by a constant first"
            )
        scale = variance**-0.5
        radius = sphere.radius if math.isfinite(sphere.radius) else None
        return cls(sphere.mean.float(), scale, radius)

    def __call__(self, x: Tensor) -> Tensor:
        return (x - self.mean).mul_(self.scale)

    @property
    def sphere(self) -> Sphere:
        """Mean and radius."""
        return Sphere(self.mean, math.inf if self.radius is None else self.radius)

    def to(self, device: torch.device) -> "Normalizer":
        return Normalizer(self.mean.to(device), self.scale, self.radius)

    @classmethod
    def of_state(cls, state: Any, name: str) -> "Normalizer":
        """The inverse of `state_dict`. Raises InputError, which names the key inside `name`."""
        state = typed(state, _STATE, name)
        return cls(state["mean"], state["scale"], state.get("radius"))

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "scale": self.scale, "radius": self.radius}
