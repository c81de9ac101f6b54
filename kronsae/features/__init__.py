"""From text to features in Python: `language_model(sae).features(text)`, and steering by them."""

from kronsae.features.model import TargetModel, language_model
from kronsae.features.text import Features

__all__ = ["Features", "TargetModel", "language_model"]
