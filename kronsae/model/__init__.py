"""The autoencoder and what trains it: encoder, selection, objectives, and what each costs.

Importing it registers the kinds of encoders, selections and objectives that come with us.
"""

from kronsae.model import encoder, gated, hierarchical, mixed, objectives, relu, selection

__all__ = ["encoder", "gated", "hierarchical", "mixed", "objectives", "relu", "selection"]
