"""The language model of a cache: read at several hookpoints, or only if it is needed."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kronsae.cache.index import CacheIndex, Hookpoint
from kronsae.config import DataConfig
from kronsae.data.common import digest
from kronsae.data.language_model import EMBEDDED_LAYER, LanguageModel, check_layer
from kronsae.data.loading import load_tokenizer, quiet
from kronsae.embedded import EMBEDDED_MODEL
from kronsae.errors import InputError
from kronsae.system.devices import compute_dtype


class ManyHookpoints(LanguageModel):
    """A language model whose `activations` are those of several hookpoints, side by side.

    hookpoints: with their widths, in that order; see `load_at`.
    """

    hookpoints: tuple[Hookpoint, ...] = ()

    @classmethod
    def load_at(
        cls,
        data: DataConfig,
        layers: Sequence[int],
        hookpoints: Sequence[str],
        device: torch.device | str = "cpu",
    ) -> "ManyHookpoints":
        """The model of `data`, read after the blocks `layers`, then at the modules `hookpoints`.

        Raises InputError as `LanguageModel.load` does, or if two of them are one.
        """
        device = torch.device(device)
        layers = default_layers(data, layers, hookpoints)
        first = {"layer": layers[0]} if layers else {"hookpoint": next(iter(hookpoints), None)}
        model = cls.load(
            data.model,
            **first,
            revision=data.revision,
            dtype=compute_dtype(data.model_dtype, device),
            device=device,
            trust_remote_code=data.trust_remote_code,
        )
        for layer in layers:
            check_layer(data.model, model.model.config, layer)
        blocks = model.hookpoint.rpartition(".")[0]
        places = [(f"{blocks}.{layer}", layer) for layer in layers]
        places += [(name, None) for name in hookpoints]
        names = [name for name, _ in places]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"hookpoint {twice!r} is asked for twice: leave it out once")
        parts = model.activations_at(names, torch.arange(1, 7).view(2, 3))
        model.hookpoints = tuple(
            Hookpoint(name, part.shape[-1], layer)
            for (name, layer), part in zip(places, parts, strict=True)
        )
        model.hookpoint = ", ".join(names)
        model.d_model, _ = model._probe()  # now all of them run
        return model

    def activations(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[b, t, sum of widths] for token ids [b, t]; the forward pass ends after the last one."""
        if not self.hookpoints:  # not yet looked at
            return super().activations(input_ids, attention_mask)
        names = [each.name for each in self.hookpoints]
        return torch.cat(self.activations_at(names, input_ids), -1)


def default_layers(
    data: DataConfig, layers: Sequence[int], hookpoints: Sequence[str]
) -> tuple[int, ...]:
    """layers, or the embedded model's own where nothing is named."""
    alone = not layers and not hookpoints and data.model == EMBEDDED_MODEL
    return (EMBEDDED_LAYER,) if alone else tuple(layers)


class ModelByName:
    """The language model that a cache was harvested from: loaded by its name when it is needed.

    It has what an evaluation asks of a `LanguageModel`. `missing` says why it cannot be had: no
    network, say, or other weights than those that made the cache.

    read: the hookpoint and, for a transcoder, the target; their places in the cache.
    """

    def __init__(
        self,
        index: CacheIndex,
        read: Sequence[int],
        device: torch.device | str,
        trust_remote_code: bool,
    ) -> None:
        names = [index.hookpoints[place].name for place in read]
        self.index = index
        self.hookpoint, self.target_hookpoint = names[0], names[1] if len(names) == 2 else None
        self.on = torch.device(device)
        self.trust_remote_code = trust_remote_code

    @cached_property
    def _loaded(self) -> LanguageModel | str:
        """The model, or why there is none."""
        data = self.index.data
        try:
            model = LanguageModel.load(
                data.model,
                hookpoint=self.hookpoint,
                target_hookpoint=self.target_hookpoint,
                revision=data.revision,
                dtype=compute_dtype(data.model_dtype, self.on),
                device=self.on,
                trust_remote_code=self.trust_remote_code,
            )
        except InputError as error:
            return str(error)
        found, expected = model.weights, self.index.model["weights"]
        if found != expected:
            return f"the weights of {data.model} are not those that the cache was made with"
        return model

    @property
    def missing(self) -> str | None:
        """Why the model cannot be had, or None."""
        return self._loaded if isinstance(self._loaded, str) else None

    @property
    def has_cross_entropy(self) -> bool:
        return self.missing is None and self._loaded.has_cross_entropy

    def __getattr__(self, name: str) -> Any:
        """All else is the loaded model's."""
        if self.missing is not None:
            raise AttributeError(self.missing)
        return getattr(self._loaded, name)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's, or None if it cannot be had or is another than the cache was made with."""
        data = self.index.data
        common = {"revision": data.revision, "trust_remote_code": self.trust_remote_code}
        try:
            with quiet():
                tokenizer = load_tokenizer(data.model, common)
        except InputError:
            return None
        return tokenizer if tokenizer_digest(tokenizer) == self.index.tokenizer else None


def tokenizer_digest(tokenizer: Any) -> str:
    """Identifies a tokenizer by its tokens."""
    return digest(*sorted(tokenizer.get_vocab().items()))
