"""Caches of activations on the disk: format, writer and reader."""

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
