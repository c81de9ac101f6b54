"""The gated encoder: one affine map decides which latents are active, another gives values."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kronsae.config import SAEConfig, check_values, setting
from kronsae.errors import InputError
from kronsae.model.encoder import Encoder, EncoderKind, widened
from kronsae.model.objectives import part_of_mean
from kronsae.model.selection import Penalty
from kronsae.registry import ENCODERS
from kronsae.system.devices import as_double
from kronsae_kernels import SparseCodes, threshold_encode


@dataclass(frozen=True)
class GatedSettings:
    """Settings of encoder "gated"."""

    gate_coefficient: float = setting(
        1.0, "gated: weight of the reconstruction error of the gate's own values"
    )

    def __post_init__(self) -> None:
        check_values(self)


@ENCODERS.register("gated")
class Gated(EncoderKind):
    """relu(exp(r_mag) W_enc x + b_mag) where the gate W_enc x + b_enc is open (> 0), else 0.

    r_mag, b_mag: parameters [F]. The gate learns from an auxiliary loss, the error of decoding
    relu(gate), from which the decoder does not learn. The L1 penalty is that of relu(gate), so that
    it does not shrink values. [Rajamanoharan et al. 2024: Gated SAEs]
    Memory in training: O(B F).
    """

    title = "Gated SAE"
    usual_selection = "ReLU"
    Settings = GatedSettings

    def __init__(self, config: SAEConfig) -> None:
        super().__init__(config)
        self.r_mag = nn.Parameter(torch.zeros(config.dict_size))
        self.b_mag = nn.Parameter(torch.zeros(config.dict_size))

    @classmethod
    def check(cls, config: SAEConfig) -> None:
        if config.experts:
            raise InputError("encoder 'gated' has no experts: leave them out, or take 'dense'")

    def dense_form(self, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale, b_mag = self.r_mag.to(w).exp(), self.b_mag.to(b)
        # Open where the value's argument is greater than b_mag - exp(r_mag) b_enc.
        return w * scale[:, None], b_mag, b_mag - scale * b

    def above(
        self, x: Tensor, w: Tensor, b: Tensor, threshold: Tensor, impl: str | None
    ) -> SparseCodes:
        w, b, gate = self.dense_form(w, b)
        threshold = torch.maximum(threshold, gate.detach())
        return threshold_encode(x, w, b, threshold=threshold, impl=impl)

    def every(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        w_mag, b_mag, _ = self.dense_form(w, b)
        gate = nn.functional.linear(x.detach(), w.detach(), b.detach())
        return nn.functional.linear(x, w_mag, b_mag).relu() * (gate > 0)

    def encode(
        self, x: Tensor, w: Tensor, b: Tensor, *, k: int, mask: Tensor | None, impl: str | None
    ) -> SparseCodes:
        flat = x.reshape(-1, x.shape[-1])
        impl = impl if impl == "reference" else None
        values, indices = self.above(flat, w, b, b.new_zeros(len(b)), impl)
        if mask is not None:
            values = values.where(mask[indices], 0)
        order = values.detach().argsort(dim=1, descending=True, stable=True)[:, :k]
        values, indices = values.gather(1, order), indices.gather(1, order)
        if values.shape[1] < k:
            values, indices = widened(values, indices, k, len(b))
        shape = (*x.shape[:-1], k)
        return SparseCodes(values.view(shape), indices.view(shape))

    def _gate(self, sae: Encoder, x: Tensor) -> Tensor:
        return nn.functional.linear(x, sae.W_enc, sae.b_enc).relu()

    def l1(self, sae: Encoder, x: Tensor, codes: SparseCodes, weights: Tensor | None) -> Tensor:
        gate = self._gate(sae, x)
        return gate.sum() if weights is None else (gate * weights).sum()

    def penalties(self, sae: Any, x: Tensor, target: Tensor, tokens: int) -> dict[str, Penalty]:
        constant = sae.with_skip(sae.b_dec, x).detach()
        x_hat = self._gate(sae, x) @ sae.W_dec.detach() + constant
        error = part_of_mean(x_hat - target, tokens)
        return {"gate_loss": Penalty(error, self.config.encoder_settings.gate_coefficient)}

    def fold_(self, shift: Tensor, share: float | Tensor) -> None:
        self.b_mag.copy_((as_double(self.b_mag) - as_double(self.r_mag).exp() * shift) * share)
