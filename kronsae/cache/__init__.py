"""Activations harvested once, to train on many times: the format, the writer, the reader."""

from kronsae.cache.index import CacheIndex, Damaged, Hookpoint
from kronsae.cache.reader import CacheActivations
from kronsae.cache.writer import HarvestConfig, harvest

__all__ = [
    "CacheActivations",
    "CacheIndex",
    "Damaged",
    "HarvestConfig",
    "Hookpoint",
    "harvest",
]
