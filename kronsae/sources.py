"""Which activations a configuration means."""

import torch

from kronsae.cache import CacheActivations
from kronsae.config import DataConfig
from kronsae.data.activations import LanguageModelActivations, check_batch_size, open_model
from kronsae.data.text import check_text, open_text


def open_activations(
    config: DataConfig, *, batch_size: int, seed: int, device: torch.device | str
) -> LanguageModelActivations | CacheActivations:
    """The activations that `config` names, given on `device`; see `DataConfig.model_device`.

    Raises InputError if they cannot be used.
    """
    if config.activations is not None:
        return CacheActivations(
            config.activations,
            layer=config.layer,
            hookpoint=config.hookpoint,
            target_hookpoint=config.target_hookpoint,
            batch_size=batch_size,
            seed=seed,
            epochs=config.epochs,
            buffer_tokens=config.buffer_tokens,
            order=config.activations_order,
            device=device,
            trust_remote_code=config.trust_remote_code,
        )
    device = torch.device(device)
    # What is cheap to check comes first; the model checks its names before it reads weights.
    check_batch_size(batch_size)
    check_text(config)
    model, config = open_model(config, torch.device(config.model_device or device))
    text = open_text(config, seed)
    return LanguageModelActivations(model, text, config, batch_size, seed, device)
