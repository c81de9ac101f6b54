"""The mixed encoder: some latents have a projection each, the others are those of Kron heads."""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from kronsae.config import SAEConfig, check_values, setting
from kronsae.errors import InputError
from kronsae.model.encoder import EncoderKind, largest_allowed
from kronsae.registry import ENCODERS, OBJECTIVES
from kronsae_kernels import SparseCodes, dense_encode, fused_encode, reference


@dataclass(frozen=True)
class MixedSettings:
    """Settings of encoder "mixed"."""

    dense_latents: int = setting(
        0,
        "mixed: number of latents that have a projection each; all others are in heads (0: about a "
        "third of dict_size, or more where nested prefixes need it)",
    )
    head_m: int = setting(8, "mixed: base pre-latents per head", least=1)
    head_n: int = setting(8, "mixed: extension pre-latents per head", least=1)
    dense_factor: float = setting(0.8, "mixed: factor of the dense latents", least=0.01, most=100)

    def __post_init__(self) -> None:
        check_values(self)


@ENCODERS.register("mixed")
class Mixed(EncoderKind):
    """First `dense_latents` latents, dense_factor * relu(W x + b). Then the latents of heads, each
    of head_m base and head_n extension pre-latents, combined by mAND [KronSAE, eq. 2-4].

    W_enc: [R, d], b_enc: [R]; the rows of the dense latents come first, then the base and extension
    pre-latents of all heads: the first of each head, the second of each, …
    With heads of 8 by 8 and a third of the latents dense it has about F / 2 rows. The factor makes
    up for the size of a dense latent: a projection that is u > 0 exceeds the root of uv wherever
    v < u, so that dense latents would be selected too often, and those of heads die. [ours]
    """

    title = "mixed SAE"
    usual_selection = "TopK"
    Settings = MixedSettings

    @classmethod
    def check(cls, config: SAEConfig) -> None:
        if config.experts:
            raise InputError("encoder 'mixed' has no experts: leave them out, or take 'kron'")
        own, size = config.encoder_settings, config.dict_size
        of_head = own.head_m * own.head_n
        ends = config.prefixes if OBJECTIVES[config.objective].nested else ()
        # A prefix that no whole number of heads completes has to end among the dense latents.
        least = max((end for end in ends if (size - end) % of_head), default=1)
        most = (size - least) // of_head
        if most < 1:
            cause = ", as a nested prefix ends there" if least > 1 else ""
            raise InputError(
                f"dict_size {size}: encoder 'mixed' needs a head of head_m * head_n = {of_head} "
                f"latents and at least {least} dense{cause}: take smaller heads, or more latents"
            )

        def dense_beside(in_heads: float) -> int:
            return size - of_head * min(most, max(1, round(in_heads / of_head)))

        dense = own.dense_latents or dense_beside(2 * size / 3)
        if not 0 < dense < size or (size - dense) % of_head:
            raise InputError(
                f"dense_latents {dense}: the other {max(0, size - dense)} of dict_size = {size} "
                f"latents must form heads of head_m * head_n = {own.head_m} * {own.head_n}, at "
                f"least one: the nearest number that works is {dense_beside(size - dense)}"
            )
        if dense < least:
            raise InputError(
                f"dense_latents {dense}: the nested prefix of {least} latents would split a head "
                f"of {of_head}: the nearest number that works is {dense_beside(size - dense)}"
            )
        object.__setattr__(config, "encoder_settings", replace(own, dense_latents=dense))

    @classmethod
    def pairs(cls, config: SAEConfig) -> int:
        return config.dict_size - config.encoder_settings.dense_latents

    @classmethod
    def rows(cls, config: SAEConfig) -> int:
        own = config.encoder_settings
        heads = cls.pairs(config) // (own.head_m * own.head_n)
        return own.dense_latents + heads * (own.head_m + own.head_n)

    def _parts(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Weights or biases of the dense latents [dense_latents, …], and of heads [h, m + n, …]."""
        own = self.config.encoder_settings
        dense, heads = w.split([own.dense_latents, len(w) - own.dense_latents])
        return dense, heads.unflatten(0, (own.head_m + own.head_n, -1)).transpose(0, 1)

    def encode(
        self, x: Tensor, w: Tensor, b: Tensor, *, k: int, mask: Tensor | None, impl: str | None
    ) -> SparseCodes:
        own, flat = self.config.encoder_settings, x.reshape(-1, x.shape[-1])
        (w_dense, w_heads), (b_dense, b_heads) = self._parts(w), self._parts(b)
        sizes = own.dense_latents, self.config.dict_size - own.dense_latents
        of_dense, of_heads = (None, None) if mask is None else mask.split(sizes)
        encode_heads = partial(fused_encode, m=own.head_m)
        few = [min(k, size) for size in sizes]
        parts = (
            largest_allowed(dense_encode, flat, w_dense, b_dense, few[0], of_dense, impl),
            largest_allowed(encode_heads, flat, w_heads, b_heads, few[1], of_heads, impl),
        )
        values = torch.cat([parts[0].values * own.dense_factor, parts[1].values], 1)
        indices = torch.cat([parts[0].indices, parts[1].indices + sizes[0]], 1)
        # Both are sorted, and the dense latents are the first ones: so equal values stay in order.
        order = values.detach().argsort(dim=1, descending=True, stable=True)[:, :k]
        shape = (*x.shape[:-1], k)
        return SparseCodes(
            values.gather(1, order).view(shape), indices.gather(1, order).view(shape)
        )

    def every(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        (w_dense, w_heads), (b_dense, b_heads) = self._parts(w), self._parts(b)
        own = self.config.encoder_settings
        dense = nn.functional.linear(x, w_dense, b_dense).relu() * own.dense_factor
        product = reference.latents(x, w_heads, b_heads, own.head_m, "mand")
        heads = reference.compose(product, "mand", 0.0).where(product > 0, 0)
        return torch.cat([dense, heads], -1)

    def decoder_rows(self, w: Tensor) -> Tensor:
        own = self.config.encoder_settings
        dense, heads = self._parts(w)
        base, extension = heads.split([own.head_m, own.head_n], dim=1)
        return torch.cat([dense, (base[:, :, None] + extension[:, None]).flatten(0, 2)])
