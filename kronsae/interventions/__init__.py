"""Changes of latents in a running language model, and their effects on its output."""

from kronsae.interventions.hooks import Edit, ablate, change, clamp, edited, intervene, steer
from kronsae.metrics.splicing import spliced

__all__ = ["Edit", "ablate", "change", "clamp", "edited", "intervene", "spliced", "steer"]
