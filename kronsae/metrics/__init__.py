"""Metrics of SAEs, and the held-out text and activations on which they are measured."""

from kronsae.metrics.absorption import FirstLetters
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
from kronsae.metrics.probing import ClassProbes, labelled_text

__all__ = [
    "MEANING",
    "ClassProbes",
    "FiringMetrics",
    "FirstLetters",
    "Heldout",
    "HeldoutText",
    "ReconstructionMetrics",
    "cross_entropy",
    "cross_entropy_recovered",
    "density_histogram",
    "evaluate",
    "evaluate_cross_entropy",
    "kl_divergence",
    "labelled_text",
]
