"""Sources of activations: a language model read live, a cache, or a registered class.

`--activations NAME:REST` chooses a class that is registered as NAME:

    @SOURCES.register("mine")
    class Mine(Source):
        @classmethod
        def open(cls, data, *, batch_size, seed, device): ...
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, BinaryIO

import torch

from kronsae.cache import CacheActivations, CacheIndex
from kronsae.cache.index import DESCRIBED, so_far
from kronsae.cache.reader import hookpoint_numbers
from kronsae.cache.remote import is_url
from kronsae.config import DataConfig
from kronsae.data.activations import (
    LanguageModelActivations,
    open_model,
    resolve_context_length,
)
from kronsae.data.common import check_batch_size
from kronsae.data.frames import FrameActivations, connect, standard_input
from kronsae.data.images import open_documents
from kronsae.data.many_hookpoints import ManyHookpoints
from kronsae.data.text import check_text
from kronsae.errors import InputError
from kronsae.registry import SOURCES
from kronsae.system.parallel import ALONE, Mesh, ranks

Receivers = Mapping[str, Collection[int]] | None
"""For each hookpoint the ranks that train on it; None: all do."""


class Source(ABC):
    """A source of activations, which `DataConfig.activations` names."""

    @classmethod
    def decided(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Settings of `DataConfig` that the source fixes; config.json records them.

        given: the user's settings, with `activations`.
        """
        name = given["activations"]
        return {"model": name, "dataset": name, "layer": None, "hookpoint": "activations"}

    @classmethod
    @abstractmethod
    def open(cls, data: DataConfig, *, batch_size: int, seed: int, device: Any) -> Any:
        """An `ActivationSource` whose `heldout_activations()` [t, d] are never among its batches.

        If it also has `language_model`, `heldout_contexts()` and `heldout_mask()`, they are passed
        to `kronsae.metrics.HeldoutText`. Raises InputError if it cannot be opened.
        """

    @classmethod
    def open_all(
        cls,
        configs: Mapping[str, DataConfig],
        *,
        mesh: Mesh = ALONE,
        receivers: Receivers = None,
        **common: Any,
    ) -> dict[str, Any]:
        """`open` of each hookpoint, by name; batches of all of them have the same tokens.

        A process reads those alone that it iterates over. See `open_hookpoints`.
        """
        return {name: cls.open(config, **common) for name, config in configs.items()}

    @classmethod
    def describe(cls, source: Any, data: DataConfig) -> str:
        """One line about a source that `open` returned."""
        return f"{data.activations} (d = {source.d_model:,})"


def source_of(activations: str | None) -> type[Source]:
    """The class that `DataConfig.activations` names by NAME:REST; `Cache` for a folder or a URL.

    Raises InputError for an unknown NAME.
    """
    if activations is None:
        return Live
    name, colon, _ = activations.partition(":")
    if not colon and name in SOURCES and not os.path.exists(name):
        raise InputError(f"activations {name!r}: expected '{name}:', with a colon")
    if colon and name in SOURCES:
        return SOURCES[name]
    if colon and not is_url(activations) and not os.path.exists(activations):
        raise InputError(
            f"activations {activations!r}: there is no such folder, and no source {name!r} is "
            "registered (a source of your own is registered by --plugin FILE)"
        )
    return Cache


def open_activations(
    config: DataConfig, *, batch_size: int, seed: int, device: torch.device | str
) -> Any:
    """The source that `config` names, with batches on `device`; see `DataConfig.model_device`.

    Raises InputError if they cannot be used.
    """
    [source] = open_hookpoints(
        {"": config}, batch_size=batch_size, seed=seed, device=device
    ).values()
    return source


def open_hookpoints(
    configs: Mapping[str, DataConfig],
    *,
    batch_size: int,
    seed: int,
    device: torch.device | str,
    mesh: Mesh = ALONE,
    receivers: Receivers = None,
) -> dict[str, Any]:
    """The sources of several hookpoints, by name, which one pass of the language model feeds.

    configs: they differ in the hookpoint alone.
    mesh: of the processes that share the language model's work.
    receivers: for each hookpoint the ranks that train on it (None: all do).
    Raises InputError if they cannot be used.
    """
    kind = source_of(next(iter(configs.values())).activations)
    common: Any = {"batch_size": batch_size, "seed": seed, "device": torch.device(device)}
    if len(configs) > 1:
        sources = kind.open_all(configs, mesh=mesh, receivers=receivers, **common)
    else:
        [(name, config)] = configs.items()
        sources = {name: kind.open(config, **common)}
        if hasattr(sources[name], "language_model"):
            sources[name].language_model.ranks = mesh.reading
    for source in sources.values():
        if not hasattr(source, "heldout_activations"):
            raise InputError(
                f"{kind.__name__}.open: expected `heldout_activations`, got {source!r}"
            )
    return sources


class Live(Source):
    """A language model that reads text while the autoencoder learns."""

    @classmethod
    def open(
        cls, data: DataConfig, *, batch_size: int, seed: int, device: torch.device
    ) -> LanguageModelActivations:
        # Cheap checks come first; the model checks its names before it reads weights.
        check_batch_size(batch_size)
        check_text(data)
        model, data = open_model(data, data.model_device or device)
        return LanguageModelActivations(
            model, open_documents(data, seed), data, batch_size, seed, device
        )

    @classmethod
    def open_all(
        cls,
        configs: Mapping[str, DataConfig],
        *,
        mesh: Mesh = ALONE,
        receivers: Receivers = None,
        **common: Any,
    ) -> dict[str, Any]:
        batch_size, seed, device = (common[name] for name in ("batch_size", "seed", "device"))
        check_batch_size(batch_size)
        first = next(iter(configs.values()))
        check_text(first)
        model = ManyHookpoints.load_all(list(configs.values()), first.model_device or device)
        data = replace(first, context_length=resolve_context_length(model, first))
        model.ranks, own = mesh.reading, None
        if receivers is not None:
            model.receivers = [receivers[name] for name in configs]
            own = [n for n, ranks in enumerate(model.receivers) if mesh.world.rank in ranks]
        reader = LanguageModelActivations(
            model, open_documents(data, seed), data, batch_size, seed, device, own
        )
        return dict(zip(configs, reader.hookpoints, strict=True))

    @classmethod
    def describe(cls, source: LanguageModelActivations, data: DataConfig) -> str:
        model = source.language_model
        reads = _reads(model.hookpoint, model.target_hookpoint)
        return (
            f"{data.model}, {model.parameters / 1e6:,.1f} M parameters in {_dtype(model, data)}; "
            f"reads out {reads} (d = {source.d_model:,})"
        )


def _dtype(model: Any, data: DataConfig) -> str:
    """The dtype in which the language model runs, and why if the user did not choose it."""
    name = str(model.dtype).removeprefix("torch.")
    if data.model_dtype != "auto" or model.dtype == torch.float32:
        return name
    on = "a GPU" if model.device.type != "cpu" else "a processor with instructions for it"
    return f"{name} (auto: on {on})"


class Cache(Source):
    """A folder that `kronsae harvest` wrote."""

    @classmethod
    def decided(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Model, text, hookpoint and, unless it is given, the number of tokens.

        Raises InputError if the hookpoint or so many tokens were not harvested.
        """
        index = CacheIndex.open(given["activations"])
        layer, name, target = map(given.get, ("layer", "hookpoint", "target_hookpoint"))
        hookpoint = index.hookpoints[hookpoint_numbers(index, layer, name, target)[0]]
        decided = {name: getattr(index.data, name) for name in DESCRIBED}
        if not given.get("activations_tokens"):
            decided["activations_tokens"] = index.train_rows
        if name is None and hookpoint.layer is not None:
            return decided | {"layer": hookpoint.layer}
        return decided | {"layer": None, "hookpoint": hookpoint.name}

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
            tokens=data.activations_tokens,
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
            f"(d = {source.d_model:,}) are in {data.activations}{so_far(source.index)}"
        )


class Frames(Source):
    """Activations that another process sends; see `kronsae.data.frames`."""

    @classmethod
    @abstractmethod
    def stream(cls, rest: str) -> BinaryIO:
        """The stream that REST names, in `--activations NAME:REST`."""

    @classmethod
    def open(
        cls, data: DataConfig, *, batch_size: int, seed: int, device: torch.device
    ) -> FrameActivations:
        if ranks() > 1:
            raise InputError(
                f"activations {data.activations!r} reach one process: train in one, or harvest a "
                "cache for several"
            )
        stream = cls.stream((data.activations or "").partition(":")[2])
        return FrameActivations(stream, data, batch_size, seed, device)


@SOURCES.register("socket")
class Socket(Frames):
    """`socket:HOST:PORT`, where a sender listens; without HOST, on this computer."""

    @classmethod
    def stream(cls, rest: str) -> BinaryIO:
        return connect(rest)


@SOURCES.register("stdin")
class StandardInput(Frames):
    """`stdin:`, what is piped into this process."""

    @classmethod
    def stream(cls, rest: str) -> BinaryIO:
        if rest:
            raise InputError(f"activations 'stdin:{rest}': expected 'stdin:'")
        return standard_input()


def _reads(hookpoint: str, target_hookpoint: str | None) -> str:
    return f"{hookpoint} and, to predict it, {target_hookpoint}" if target_hookpoint else hookpoint
