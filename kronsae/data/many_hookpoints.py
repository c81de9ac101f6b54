"""A language model that is read at several hookpoints in one forward pass."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kronsae.config import DataConfig
from kronsae.data.language_model import EMBEDDED_LAYER, LanguageModel
from kronsae.embedded import EMBEDDED_MODEL
from kronsae.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Self


class ManyHookpoints(LanguageModel):
    """A loaded language model with several `points`, at which one forward pass is read.

    points: the same loaded model, read at each hookpoint (`LanguageModel.at`).
    Raises InputError if two of them are the same.
    """

    points: tuple[LanguageModel, ...] = ()

    receivers: Sequence[Collection[int]] | None = None
    """For each point the `ranks` that get its activations; None: all get those of all points."""

    def __init__(self, points: Sequence[LanguageModel]) -> None:
        vars(self).update(vars(points[0]))  # it is the same model
        self.points = tuple(points)
        names = [" -> ".join(point._names) for point in points]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"hookpoint {twice!r} is named twice: leave it out once")
        self.hookpoint = ", ".join(names)

    @classmethod
    def load_all(cls, configs: Sequence[DataConfig], device: torch.device | str = "cpu") -> "Self":
        """The model of the configurations, which differ in their hookpoints alone, loaded once.

        Raises InputError as `LanguageModel.load` does, or for a hookpoint that is named twice.
        """
        first = LanguageModel.of(configs[0], device)
        names = ("layer", "hookpoint", "target_hookpoint")
        others = [
            first.at(**{name: getattr(config, name) for name in names}) for config in configs[1:]
        ]
        return cls([first, *others])

    @classmethod
    def load_at(
        cls,
        data: DataConfig,
        layers: Sequence[int],
        hookpoints: Sequence[str],
        device: torch.device | str = "cpu",
    ) -> "Self":
        """The model of `data`, read after the blocks `layers` and at the modules `hookpoints`."""
        layers = default_layers(data, layers, hookpoints)
        places = [*((layer, None) for layer in layers), *((None, name) for name in hookpoints)]
        return cls.load_all(
            [dataclasses.replace(data, layer=layer, hookpoint=name) for layer, name in places],
            device,
        )

    @torch.no_grad()
    def activations_of_points(self, input_ids: Tensor) -> list[Tensor]:
        """[b, t, d_model + d_target] of each point, for token ids [b, t].

        The forward pass ends after the last hookpoint. If several `ranks` share the work, all call
        this with the same contexts; a rank that is no receiver of a point gets [0, t, d] for it.
        """
        with self.lock, self._interruptible():
            return self.ranks.map_all(self._outputs, [input_ids], self.receivers)

    def _outputs(self, input_ids: Tensor) -> list[Tensor]:
        names = dict.fromkeys(name for point in self.points for name in point._names)
        outputs = self._read(list(names), input_ids, None)
        return [point._joined(outputs) for point in self.points]


def default_layers(
    data: DataConfig, layers: Sequence[int], hookpoints: Sequence[str]
) -> tuple[int, ...]:
    """`layers`, or the embedded model's default if nothing is named."""
    alone = not layers and not hookpoints and data.model == EMBEDDED_MODEL
    return (EMBEDDED_LAYER,) if alone else tuple(layers)
