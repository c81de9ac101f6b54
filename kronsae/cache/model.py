"""Language models for caches: read at several hookpoints, or loaded only when needed."""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kronsae.cache.index import CacheIndex, Hookpoint
from kronsae.config import DataConfig
from kronsae.data.common import digest
from kronsae.data.language_model import EMBEDDED_LAYER, PROBE, LanguageModel, check_layer
from kronsae.data.loading import load_tokenizer, quiet
from kronsae.embedded import EMBEDDED_MODEL
from kronsae.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Self


class ManyHookpoints(LanguageModel):
    """A language model whose `activations` are those of several hookpoints, side by side.

    Create it by `load_at`.
    """

    hookpoints: tuple[Hookpoint, ...] = ()

    @classmethod
    def load_at(
        cls,
        data: DataConfig,
        layers: Sequence[int],
        hookpoints: Sequence[str],
        device: torch.device | str = "cpu",
    ) -> "Self":
        """The model of `data`, read after the blocks `layers` and at the modules `hookpoints`.

        Raises InputError as `LanguageModel.load` does, or for a hookpoint that is named twice.
        """
        layers = default_layers(data, layers, hookpoints)
        layer = next(iter(layers), None)
        hookpoint = next(iter(hookpoints), None) if layer is None else None
        model = cls.of(dataclasses.replace(data, layer=layer, hookpoint=hookpoint), device)
        for layer in layers:
            check_layer(data.model, model.model.config, layer)
        blocks = model.hookpoint.rpartition(".")[0]
        names = [*(f"{blocks}.{layer}" for layer in layers), *hookpoints]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"hookpoint {twice!r} is named twice: leave it out once")
        outputs = model.activations_at(names, PROBE)
        layer_of: dict[str, int] = dict(zip(names, layers, strict=False))
        model.hookpoints = tuple(
            Hookpoint(name, output.shape[-1], layer_of.get(name))
            for name, output in zip(names, outputs, strict=True)
        )
        model.hookpoint = ", ".join(names)
        model.d_model, _ = model._probe()  # of all hookpoints
        return model

    def activations(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[b, t, sum of widths] for token ids [b, t]; the forward pass ends after the last one."""
        if not self.hookpoints:  # while `load` probes the first one
            return super().activations(input_ids, attention_mask)
        names = [hookpoint.name for hookpoint in self.hookpoints]
        return torch.cat(self.activations_at(names, input_ids), -1)


def default_layers(
    data: DataConfig, layers: Sequence[int], hookpoints: Sequence[str]
) -> tuple[int, ...]:
    """`layers`, or the embedded model's default if nothing is named."""
    alone = not layers and not hookpoints and data.model == EMBEDDED_MODEL
    return (EMBEDDED_LAYER,) if alone else tuple(layers)


class ModelByName:
    """The language model of a cache, loaded by its name when an evaluation first needs it.

    Other attributes are those of the `LanguageModel`. `missing` says why it cannot be loaded: no
    network, for example, or weights that differ from those of the harvest.

    numbers: of the hookpoint and, for a transcoder, the target, among the cache's hookpoints.
    """

    def __init__(
        self,
        index: CacheIndex,
        numbers: Sequence[int],
        device: torch.device | str,
        trust_remote_code: bool,
    ) -> None:
        names = [index.hookpoints[number].name for number in numbers]
        self.index = index
        self.hookpoint, self.target_hookpoint = names[0], names[1] if len(names) == 2 else None
        self.name = index.data.model
        widths = [index.hookpoints[number].width for number in numbers]
        self.d_model, self.d_target = widths[0], sum(widths[1:])
        self.device = torch.device(device)
        self.trust_remote_code = trust_remote_code

    @cached_property
    def _loaded(self) -> LanguageModel | str:
        """The model, or why it cannot be loaded."""
        data = dataclasses.replace(
            self.index.data,
            layer=None,
            hookpoint=self.hookpoint,
            target_hookpoint=self.target_hookpoint,
            trust_remote_code=self.trust_remote_code,
        )
        try:
            model = LanguageModel.of(data, self.device)
        except InputError as error:
            return str(error)
        if model.weights != self.index.model["weights"]:
            return f"the weights of {data.model} are not those that the cache was harvested with"
        return model

    def describe(self) -> dict[str, Any]:
        """`LanguageModel.describe`, from the cache."""
        known = {key: value for key, value in self.index.model.items() if key != "parameters"}
        target = {"target_hookpoint": self.target_hookpoint} if self.target_hookpoint else {}
        return {**known, "hookpoint": self.hookpoint, "d_model": self.d_model, **target}

    @property
    def missing(self) -> str | None:
        """Why the model cannot be loaded, or None."""
        return self._loaded if isinstance(self._loaded, str) else None

    @property
    def no_cross_entropy(self) -> str | None:
        """Why there is no cross-entropy: that of the model, or why it cannot be loaded."""
        loaded = self._loaded
        return loaded if isinstance(loaded, str) else loaded.no_cross_entropy

    @property
    def has_cross_entropy(self) -> bool:
        return self.no_cross_entropy is None

    def __getattr__(self, name: str) -> Any:
        """Attributes of the loaded model."""
        if self.missing is not None:
            raise AttributeError(self.missing)
        return getattr(self._loaded, name)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer; None if it cannot be loaded or is not that of the harvest."""
        data = self.index.data
        common = {"revision": data.revision, "trust_remote_code": self.trust_remote_code}
        try:
            with quiet():
                tokenizer = load_tokenizer(data.model, common)
        except InputError:
            return None
        return tokenizer if tokenizer_digest(tokenizer) == self.index.tokenizer else None


def tokenizer_digest(tokenizer: Any) -> str:
    """Hash of a tokenizer's vocabulary."""
    return digest(*sorted(tokenizer.get_vocab().items()))
