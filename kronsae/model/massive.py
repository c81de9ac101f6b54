"""Massive tokens: activations so far from the mean that a few hold most of the variance.

Language models keep attention sinks on some tokens, such as one after a blank line at the start of
a context, with activations a hundred times as far from the mean as others. [Sun et al. 2024,
"Massive Activations in Large Language Models"] A few of them decide what explained variance says,
and what an SAE learns. They are left out of training and of figures of merit, and pass unchanged
where an SAE is spliced into the model.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kronsae.config import TrainConfig
from kronsae.errors import InputError
from kronsae.system.devices import as_double

DEFAULT_MULTIPLE = TrainConfig.massive_multiple
"""Tokens farther from the mean than so many times the median distance are massive."""

MOST = 0.1
"""Share of a sample above which activations beyond a multiple of the median are no exceptions, but
the half below it is unusually small: the distance that this share exceeds then counts instead."""

CENTRE_ROWS = 1024
"""Rows whose median, coordinate by coordinate, is the first guess at the mean."""


class Sphere(NamedTuple):
    """A mean, and the distance from it beyond which activations are massive."""

    mean: Tensor
    """[d]"""
    radius: float
    """In the units of the activations; infinite if none are massive."""

    @classmethod
    def of(cls, x: Tensor, multiple: float) -> tuple["Sphere", Tensor]:
        """The sphere of sample activations x [N, d], and those of them that its mean is of.

        These are within `multiple`, at most 10, times the median distance from the sample's median,
        which no outlier moves; the radius is `multiple` times their median distance from the mean
        (but see MOST).
        """
        usual = min(multiple, DEFAULT_MULTIPLE)
        distances, radius = _within(x, x[:CENTRE_ROWS].median(0).values, usual)
        near = x[distances <= radius]
        mean = near.mean(0)
        _, radius = _within(near, mean, usual)
        return cls(mean, radius * (multiple / usual) or math.inf), near

    def excludes(self, x: Tensor) -> Tensor:
        """Mask [n] of the activations x [n, d] that are massive."""
        mean = self.mean.to(x.device, torch.float32)
        return torch.linalg.vector_norm(x.float() - mean, dim=1) > self.radius


def _within(x: Tensor, centre: Tensor, multiple: float) -> tuple[Tensor, float]:
    """Distances [N] of x [N, d] from a centre [d], and the radius that they give."""
    distances = torch.linalg.vector_norm(x - centre, dim=1)
    usual, large = distances.quantile(distances.new_tensor([0.5, 1 - MOST])).tolist()
    if (distances > multiple * usual).double().mean() > MOST:
        usual = large
    return distances, multiple * usual


class MassiveTokens(NamedTuple):
    """The rule that tells massive tokens, from a sample of activations.

    A transcoder's token is massive if its input or its target is: an MLP may write a massive
    activation where it reads none.
    """

    multiple: float
    of_input: Sphere
    of_target: Sphere | None = None

    @classmethod
    def of(
        cls, x: Tensor, target: Tensor | None = None, multiple: float = DEFAULT_MULTIPLE
    ) -> "MassiveTokens":
        """The rule for sample activations x [N, d] and, of a transcoder, their targets."""
        of_input, _ = Sphere.of(as_double(x), multiple)
        of_target = None if target is None else Sphere.of(as_double(target), multiple)[0]
        return cls(multiple, of_input, of_target)

    def __call__(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        """Mask [n] of massive tokens among activations x [n, d]. target: of a transcoder."""
        massive = self.of_input.excludes(x)
        if target is not None and self.of_target is not None:
            massive |= self.of_target.excludes(target)
        return massive

    def facts(self) -> dict[str, Any]:
        """The rule as JSON values, for the metadata of an SAE."""
        facts: dict[str, Any] = {"multiple": self.multiple}
        for name, sphere in (("", self.of_input), ("target_", self.of_target)):
            if sphere is not None:
                bounded = math.isfinite(sphere.radius)
                facts[f"{name}radius"] = sphere.radius if bounded else None
                facts[f"{name}mean"] = sphere.mean.float().tolist()
        return facts

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> "MassiveTokens":
        """The inverse of `facts`. Raises ValueError, KeyError or TypeError for anything else."""
        spheres = []
        for name in ("", "target_"):
            if f"{name}mean" in facts:
                radius = facts[f"{name}radius"]
                mean = torch.tensor(facts[f"{name}mean"], dtype=torch.float32)
                spheres.append(Sphere(mean, math.inf if radius is None else float(radius)))
        return cls(float(facts["multiple"]), *spheres)


def without(mask: Tensor, massive: Tensor) -> Tensor:
    """A mask [b, t] of n tokens without those that are massive, [n] bool."""
    ordinary = mask.clone()
    ordinary[mask] = ~massive.to(mask.device)
    return ordinary


METADATA = "massive_tokens"
"""Key of the rule in the metadata of an SAE: null if it was trained on all tokens."""


def rule_of(metadata: Mapping[str, Any]) -> MassiveTokens | None:
    """The rule in an SAE's metadata; None if there is none, or if it was trained on all tokens.

    Raises InputError if it is damaged.
    """
    facts = metadata.get(METADATA)
    try:
        return None if facts is None else MassiveTokens.from_facts(facts)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"metadata of the SAE: its {METADATA} cannot be read ({error!r}): expected what "
            "kronsae writes"
        ) from error


def check_rule(metadata: Mapping[str, Any], d_model: int, d_target: int) -> None:
    """Raise InputError unless the rule in an SAE's metadata is for activations of its widths."""
    rule = rule_of(metadata)
    for sphere, width in ((rule.of_input, d_model), (rule.of_target, d_target)) if rule else ():
        if sphere is not None and sphere.mean.shape != (width,):
            raise InputError(
                f"metadata of the SAE: {METADATA}: expected a mean of {width} numbers, got "
                f"{list(sphere.mean.shape)}"
            )
