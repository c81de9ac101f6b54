"""Which activations a configuration means: a language model read live, a cache, or one of yours.

A source is a class that is registered; `--activations NAME:REST` then means yours:

    @SOURCES.register("mine")
    class Mine(Source):
        @classmethod
        def open(cls, data, *, batch_size, seed, device): ...
"""

from typing import Any

import torch

from kronsae.cache import CacheActivations, CacheIndex
from kronsae.cache.index import DESCRIBED
from kronsae.cache.reader import places_of
from kronsae.config import DataConfig
from kronsae.data.activations import LanguageModelActivations, check_batch_size, open_model
from kronsae.data.text import check_text, open_text
from kronsae.errors import InputError
from kronsae.registry import SOURCES


class Source:
    """A kind of place that activations come from, which `DataConfig.activations` names."""

    @classmethod
    def decided(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Settings of `DataConfig` that it has decided, so that config.json records them.

        given: settings as the user gave them, `activations` among them.
        """
        where = given["activations"]
        return {"model": where, "dataset": where, "layer": None, "hookpoint": "activations"}

    @classmethod
    def open(cls, data: DataConfig, *, batch_size: int, seed: int, device: Any) -> Any:
        """An `ActivationSource` whose `heldout_activations()` [t, d] are never among its batches.

        `language_model`, `heldout_contexts()` and `heldout_mask()`, if it has them, are those that
        `kronsae.metrics.HeldoutText` takes. Raises InputError if it cannot be had.
        """
        raise NotImplementedError

    @classmethod
    def describe(cls, source: Any, data: DataConfig) -> str:
        """A line about what `open` gave."""
        return f"{data.activations} (d = {source.d_model:,})"


def source_of(activations: str | None) -> type[Source]:
    """The kind of source that `DataConfig.activations` names: NAME:REST, else a cache's folder."""
    if activations is None:
        return Live
    name, colon, _ = activations.partition(":")
    return SOURCES[name] if colon and name in SOURCES else Cache


def open_activations(
    config: DataConfig, *, batch_size: int, seed: int, device: torch.device | str
) -> Any:
    """The activations that `config` names, given on `device`; see `DataConfig.model_device`.

    Raises InputError if they cannot be used.
    """
    kind = source_of(config.activations)
    return kind.open(config, batch_size=batch_size, seed=seed, device=torch.device(device))


class Live(Source):
    """A language model that reads text while the autoencoder learns."""

    @classmethod
    def open(
        cls, data: DataConfig, *, batch_size: int, seed: int, device: torch.device
    ) -> LanguageModelActivations:
        # What is cheap to check comes first; the model checks its names before it reads weights.
        check_batch_size(batch_size)
        check_text(data)
        model, data = open_model(data, torch.device(data.model_device or device))
        return LanguageModelActivations(
            model, open_text(data, seed), data, batch_size, seed, device
        )

    @classmethod
    def describe(cls, source: LanguageModelActivations, data: DataConfig) -> str:
        model = source.language_model
        parameters = sum(p.numel() for p in model.model.parameters())
        reads = _reads(model.hookpoint, model.target_hookpoint)
        return (
            f"{data.model}, {parameters / 1e6:,.1f} M parameters; reads out {reads} "
            f"(d = {source.d_model:,})"
        )


class Cache(Source):
    """A folder that `kronsae harvest` wrote."""

    @classmethod
    def decided(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Model, text and hookpoint. Raises InputError if the hookpoint was not harvested."""
        index = CacheIndex.open(given["activations"])
        names = ("layer", "hookpoint", "target_hookpoint")
        read = index.hookpoints[places_of(index, *(given.get(name) for name in names))[0]]
        decided = {name: getattr(index.data, name) for name in DESCRIBED}
        if given.get("hookpoint") is None and read.layer is not None:
            return decided | {"layer": read.layer}
        return decided | {"layer": None, "hookpoint": read.name}

    @classmethod
    def open(
        cls, data: DataConfig, *, batch_size: int, seed: int, device: torch.device
    ) -> CacheActivations:
        if data.activations is None:
            raise InputError("activations: expected the folder of a cache, got None")
        return CacheActivations(
            data.activations,
            layer=data.layer,
            hookpoint=data.hookpoint,
            target_hookpoint=data.target_hookpoint,
            batch_size=batch_size,
            seed=seed,
            epochs=data.epochs,
            buffer_tokens=data.buffer_tokens,
            order=data.activations_order,
            device=device,
            trust_remote_code=data.trust_remote_code,
        )

    @classmethod
    def describe(cls, source: CacheActivations, data: DataConfig) -> str:
        model = source.language_model
        reads = _reads(model.hookpoint, model.target_hookpoint)
        return (
            f"{data.model}, not loaded: {source.index.train_rows:,} tokens of {reads} "
            f"(d = {source.d_model:,}) are in {data.activations}"
        )


def _reads(hookpoint: str, target_hookpoint: str | None) -> str:
    return f"{hookpoint} and, to predict it, {target_hookpoint}" if target_hookpoint else hookpoint
