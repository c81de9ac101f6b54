"""Streams of activations: a language model that reads text, a tensor, an iterable."""

from kronsae.data.activations import (
    ActivationSource,
    IterableActivations,
    LanguageModelActivations,
    TensorActivations,
    split_target,
)
from kronsae.data.language_model import LanguageModel
from kronsae.data.text import TextSource, open_text

__all__ = [
    "ActivationSource",
    "IterableActivations",
    "LanguageModel",
    "LanguageModelActivations",
    "TensorActivations",
    "TextSource",
    "open_text",
    "split_target",
]
