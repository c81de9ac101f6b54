"""A run on one page that needs no network: every head, base, extension and latent to look into."""

from kronsae.explore.write import write_explorer

__all__ = ["write_explorer"]
