"""Language models for caches: read at several hookpoints, or loaded only when needed."""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from kronsae.cache.index import CacheIndex
from kronsae.data.common import digest
from kronsae.data.language_model import LanguageModel
from kronsae.data.loading import find_tokenizer
from kronsae.errors import InputError


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
        self.index = index
        self.hookpoints = [index.hookpoints[number] for number in numbers]
        self.hookpoint, *others = (hookpoint.name for hookpoint in self.hookpoints)
        self.target_hookpoint = others[0] if others else None
        self.name = index.data.model
        widths = [hookpoint.width for hookpoint in self.hookpoints]
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
        for name, hookpoint in zip(("site", "target_site"), self.hookpoints, strict=False):
            known |= {name: hookpoint.site} if hookpoint.site else {}
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
        tokenizer = find_tokenizer(data.model, common)
        return tokenizer if tokenizer_digest(tokenizer) == self.index.tokenizer else None


def tokenizer_digest(tokenizer: Any) -> str:
    """Hash of a tokenizer's vocabulary; without a tokenizer, of none."""
    return digest(*sorted(tokenizer.get_vocab().items() if tokenizer else ()))
