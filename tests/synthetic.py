"""Synthetic activations from sparse, correlated ground-truth features."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kronsae.errors import InputError


class SyntheticActivations:
    """Endless batches of sums of a few ground-truth features, for tests without a model.

    There are `num_groups` groups of `group_size` features. A group is on for a token with
    probability `group_density`, and then each of its features with probability `within`, so that
    features of a group fire together. Amplitudes are uniform in (0.5, 1.5), directions (features:
    [num_groups * group_size, d]) are random unit vectors.

    Raises InputError for a size below 1, or for probabilities outside [0, 1].
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_groups: int = 32,
        group_size: int = 4,
        group_density: float = 0.05,
        within: float = 0.5,
        batch_size: int = 1024,
        seed: int = 0,
    ) -> None:
        self.settings = {
            "d_model": d_model,
            "num_groups": num_groups,
            "group_size": group_size,
            "group_density": group_density,
            "within": within,
            "batch_size": batch_size,
            "seed": seed,
        }
        for name in ("d_model", "num_groups", "group_size", "batch_size"):
            if self.settings[name] < 1:
                raise InputError(f"{name}: expected >= 1, got {self.settings[name]}")
        for name in ("group_density", "within"):
            if not 0 <= self.settings[name] <= 1:
                raise InputError(f"{name}: expected a probability, got {self.settings[name]}")
        self.d_model, self.batch_size = d_model, batch_size
        self.groups = (num_groups, group_size)
        self.group_density, self.within = group_density, within
        drawn = torch.Generator().manual_seed(seed)
        features = torch.randn(num_groups * group_size, d_model, generator=drawn)
        self.features = features / features.norm(dim=1, keepdim=True)
        self.generator = torch.Generator().manual_seed(seed + 1)

    def draw(self) -> tuple[Tensor, Tensor]:
        """One batch: activations [B, d], and the features' amplitudes [B, num features]."""
        num_groups, group_size = self.groups
        group_on = self._uniform(num_groups, 1) < self.group_density
        on = group_on & (self._uniform(num_groups, group_size) < self.within)
        amplitudes = (on * (0.5 + self._uniform(num_groups, group_size))).flatten(1)
        return amplitudes @ self.features, amplitudes

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(self.batch_size, *shape, generator=self.generator)

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield self.draw()[0]

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])

    def describe(self) -> dict[str, Any]:
        return {"source": "synthetic", **self.settings}
