"""Metrics of SAEs, and the held-out text and activations on which they are measured."""

from kronsae.metrics.figures import (
    MEANING,
    FiringMetrics,
    ReconstructionMetrics,
    cross_entropy,
    cross_entropy_recovered,
    density_histogram,
    kl_divergence,
)
from kronsae.metrics.heldout import Heldout, HeldoutText, evaluate, evaluate_cross_entropy

__all__ = [
    "MEANING",
    "FiringMetrics",
    "Heldout",
    "HeldoutText",
    "ReconstructionMetrics",
    "cross_entropy",
    "cross_entropy_recovered",
    "density_histogram",
    "evaluate",
    "evaluate_cross_entropy",
    "kl_divergence",
]
