"""Train sparse autoencoders with very large dictionaries on language-model activations.

`SAE`, its configs, and `load`; training is `kronsae.train.fit`, or `python -m kronsae.train`.
"""

from kronsae.system.threads import wait_briefly

wait_briefly()  # before torch is loaded

# ruff: noqa: E402, I001
from kronsae.config import DataConfig, RunConfig, SAEConfig, TrainConfig
from kronsae.errors import InputError
from kronsae.features import language_model
from kronsae.interop.load import load
from kronsae.model.sae import SAE, SAEOutput
from kronsae.registry import load_installed_plugins
from kronsae_kernels import SparseCodes, __version__

__all__ = [
    "DataConfig",
    "InputError",
    "RunConfig",
    "SAE",
    "SAEConfig",
    "SAEOutput",
    "SparseCodes",
    "TrainConfig",
    "__version__",
    "language_model",
    "load",
]

load_installed_plugins()
