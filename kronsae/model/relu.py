"""The ReLU selection: every latent above 0 is active, and an L1 penalty keeps them few."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kronsae.config import SAEConfig, TrainConfig, check_values, setting
from kronsae.errors import InputError
from kronsae.model.encoder import Encoder
from kronsae.model.selection import Penalty, Selection
from kronsae.registry import SELECTIONS
from kronsae_kernels import SparseCodes


@dataclass(frozen=True)
class ReLUSettings:
    """Settings of selection "relu"."""

    l1_coefficient: float = setting(
        3.0,
        "relu: weight of the sum of a token's latents beside its squared error, both in units of "
        "activations whose mean squared norm is d_model, as in SAELens",
    )
    l1_warmup_fraction: float = setting(
        0.1, "relu: share of the training in which that weight grows from 0", most=1
    )

    def __post_init__(self) -> None:
        check_values(self)


@SELECTIONS.register("relu")
class ReLU(Selection):
    """Every latent above 0 of each token; the L1 penalty decides how many there are.

    loss = mean over tokens of (squared error + l1_coefficient * sum of latents) / d_model, where
    each latent is multiplied by the norm of its decoder row. [Bricken et al. 2023; Conerly et al.
    2024] Memory: in training O(B F), as most latents are active at its start.
    """

    title = "ReLU"
    Settings = ReLUSettings
    aims_at_k = False
    is_rowwise = True

    @classmethod
    def check(cls, config: SAEConfig) -> None:
        if config.experts:
            raise InputError(
                "selection 'relu' takes all latents above 0, but a token has those of one expert "
                "alone: leave out experts, or take --selection topk"
            )

    @classmethod
    def widest(cls, config: SAEConfig) -> int:
        return config.dict_size // 2

    @classmethod
    def describe(cls, config: SAEConfig) -> str:
        coefficient = config.selection_settings.l1_coefficient
        if not coefficient:
            return "active where they are above 0"
        return f"kept sparse by an L1 penalty of {coefficient:g}"

    def forward(self, sae: Encoder, x: Tensor, k: int, impl: str | None = None) -> SparseCodes:
        return sae.above(x, sae.b_enc.new_full((sae.dict_size,), sae.silent_value), impl=impl)

    def codes_and_penalties(
        self, sae: Any, x: Tensor, config: TrainConfig, progress: float
    ) -> tuple[SparseCodes, dict[str, Penalty]]:
        settings = self.config.selection_settings
        values, indices = codes = sae.every(x)
        norms = None if config.decoder_norm == "unit" else sae.decoder_norms()
        tokens = sae.mesh.data.count(len(x), x.device)
        loss = sae.kind.l1(sae, x, codes, norms) / (tokens * sae.d_model)
        warm = settings.l1_warmup_fraction
        grown = min(1.0, progress / warm) if warm else 1.0
        # A separate node: the retained gradient of decoded values has no part of the penalty's.
        codes = SparseCodes(values.view_as(values), indices)
        return codes, {"l1_loss": Penalty(loss, grown * settings.l1_coefficient)}

    def activity_threshold(self) -> Tensor:
        return torch.zeros(self.config.dict_size)

    @classmethod
    def can_have(cls, threshold: Tensor | None) -> bool:
        return threshold is not None and not threshold.any()
