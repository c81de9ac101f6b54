"""Changes of latents in a running language model, and their effects on its output."""

from kronsae.interventions.hooks import (
    Edit,
    ablate,
    change,
    clamp,
    displace,
    edited,
    intervene,
    steer,
)
from kronsae.interventions.steering import (
    Calibration,
    Continuations,
    calibrated,
    continuations,
    difference_of_texts,
    mean_difference,
    perplexity,
)
from kronsae.metrics.splicing import spliced
from kronsae.metrics.usual import Usual, usual_values

__all__ = [
    "Calibration",
    "Continuations",
    "Edit",
    "Usual",
    "ablate",
    "calibrated",
    "change",
    "clamp",
    "continuations",
    "difference_of_texts",
    "displace",
    "edited",
    "intervene",
    "mean_difference",
    "perplexity",
    "spliced",
    "steer",
    "usual_values",
]
