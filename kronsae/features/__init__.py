"""What single features say: of a text, by steering, and on a card to look at and share."""

from kronsae.features.card import Card, card
from kronsae.features.model import TargetModel, language_model
from kronsae.features.text import Features

__all__ = ["Card", "Features", "TargetModel", "card", "language_model"]
