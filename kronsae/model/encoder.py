"""The encoder of an SAE: its projections, and the two ways in which selections ask for latents.

Letters: d width, F latents, h heads of m base and n extension pre-latents, w width of the codes.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from kronsae.config import SAEConfig
from kronsae.errors import InputError
from kronsae.model.ranks import check_heads, largest
from kronsae.model.router import Router
from kronsae.system.parallel import ALONE, Mesh
from kronsae_kernels import SparseCodes, dense_encode, fused_encode, threshold_encode
from kronsae_kernels.reference import compose


class Encoder(nn.Module):
    """What turns activations into latents, without a selection; `SAE` adds that, and the decoder.

    W_enc: [h, m + n, d] (Kron) or [F, d] (dense)      b_enc: [h, m + n] or [F]
    router: of experts (`kronsae.model.router`), or None

    mesh: of the processes that share it: see `SAE`.
    """

    def __init__(
        self, config: SAEConfig, device: torch.device | str | None = None, mesh: Mesh = ALONE
    ) -> None:
        super().__init__()
        if config.d_model < 1:
            raise InputError(f"d_model: expected >= 1, got {config.d_model}")
        check_heads(config, mesh.heads.size)
        self.config = config
        self.mesh = mesh
        d = config.d_model
        if config.encoder == "kron":
            # Stored row-major over heads, which the kernels read fastest.
            heads = config.heads // mesh.heads.size
            w_enc = torch.empty(config.m + config.n, heads, d, device=device).transpose(0, 1)
        else:
            w_enc = torch.empty(self.own_latents, d, device=device)
        self.W_enc = nn.Parameter(w_enc)
        self.b_enc = nn.Parameter(torch.zeros(w_enc.shape[:-1], device=device))
        self.router = Router(config.experts, d, device) if config.experts else None

    @property
    def dict_size(self) -> int:
        return self.config.dict_size

    @property
    def d_model(self) -> int:
        return self.config.d_model

    @property
    def latents_per_token(self) -> int:
        return self.config.latents_per_token

    @property
    def own_latents(self) -> int:
        """Latents that this process holds: all of them, or an equal share."""
        return self.config.dict_size // self.mesh.heads.size

    def _drawn(self, weight: Tensor, generator: torch.Generator | None) -> Tensor:
        """N(0, 1) for a weight: its rows of what is drawn for the whole dictionary."""
        group, (rows, *columns) = self.mesh.heads, weight.shape
        device = None if generator is None else generator.device
        whole = torch.randn(rows * group.size, *columns, generator=generator, device=device)
        return whole[group.rank * rows : (group.rank + 1) * rows]

    def largest(
        self, x: Tensor, k: int, *, mask: Tensor | None = None, impl: str | None = None
    ) -> SparseCodes:
        """The k largest latents of x [..., d], among `mask` [F] (bool) if given.

        With experts: of the token's expert, times the router's probability; fewer (unused slots)
        where the mask leaves an expert fewer.
        """
        kron = self.config.encoder == "kron"
        encode = functools.partial(fused_encode, **self._gate) if kron else dense_encode
        x = self._as_weights(x)
        if self.mesh.heads.size > 1:
            return self._largest_of_ranks(x, k, mask, impl)
        if self.router is None:
            return encode(x, self.W_enc, self.b_enc, k=k, mask=mask, impl=impl)
        weights, biases = (p.split(len(p) // self.config.experts) for p in (self.W_enc, self.b_enc))
        masks = mask.split(self.latents_per_token) if mask is not None else None

        def of_expert(expert: int, rows: Tensor) -> SparseCodes:
            allowed = masks[expert] if masks else None
            count = k if allowed is None else min(k, int(allowed.sum()))
            if count:
                values, indices = encode(
                    rows, weights[expert], biases[expert], k=count, mask=allowed, impl=impl
                )
            else:
                values = self.W_enc.new_zeros(len(rows), 0)
                indices = values.long()
            return widened(values, indices + expert * self.latents_per_token, k, self.dict_size)

        codes = self.router.dispatch(x.reshape(-1, x.shape[-1]), of_expert)
        shape = (*x.shape[:-1], codes.values.shape[1])
        return SparseCodes(codes.values.view(shape), codes.indices.view(shape))

    def _largest_of_ranks(
        self, x: Tensor, k: int, mask: Tensor | None, impl: str | None
    ) -> SparseCodes:
        """`largest` of a dictionary whose heads are shared out; mask is that of the own latents."""
        config, size = self.config, self.own_latents
        flat = x.reshape(-1, x.shape[-1])
        count = min(k, size if mask is None else int(mask.sum()))
        options = {"k": count, "mask": mask, "impl": impl}
        if not count:
            found = SparseCodes(
                self.W_enc.new_zeros(len(flat), 0), x.new_zeros(len(flat), 0).long()
            )
        elif config.encoder == "dense":
            found = dense_encode(flat, self.W_enc, self.b_enc, **options)
        else:
            # Latents compete by their product: it is composed to their value afterwards.
            product = "mul" if config.composition == "mul" else "relu_mul"
            options |= {"m": config.m, "composition": product}
            found = fused_encode(flat, self.W_enc, self.b_enc, **options)
        values, indices = largest(found, k, self.mesh.heads, size)
        if config.encoder == "kron":
            values = compose(values, config.composition, config.eps)
        return SparseCodes(values.view(*x.shape[:-1], k), indices.view(*x.shape[:-1], k))

    def above(self, x: Tensor, threshold: Tensor, *, impl: str | None = None) -> SparseCodes:
        """Every latent of x [..., d] above its threshold [F], padded (`threshold_encode`)."""
        return threshold_encode(
            self._as_weights(x),
            self.W_enc,
            self.b_enc,
            threshold=threshold,
            impl=impl if impl == "reference" else None,
            **self._gate,
        )

    @property
    def _gate(self) -> dict[str, Any]:
        """How a Kron encoder makes latents, for the kernels; nothing for a dense one."""
        config = self.config
        if config.encoder == "dense":
            return {}
        return {"m": config.m, "composition": config.composition, "eps": config.eps}

    def _as_weights(self, x: Tensor) -> Tensor:
        autocast = torch.is_autocast_enabled(x.device.type)
        return x if autocast else x.to(self.W_enc.dtype)

    @property
    def silent_value(self) -> float:
        """Value of a latent whose product is 0."""
        return self.config.eps**0.5 if self.config.composition == "mand" else 0.0

    def fired(self, codes: SparseCodes) -> Tensor:
        """Which of the codes are active latents (bool [..., k]): their product is not 0."""
        return codes.values.abs() > self.silent_value


def widened(values: Tensor, indices: Tensor, width: int, size: int) -> SparseCodes:
    """Codes [B, w] of `size` latents with unused slots up to `width`.

    Their indices are spread over all latents: one latent in all of them would have a long list of
    entries that mean nothing, which slows its decoder row's gradient down.
    """
    shape = len(values), width - values.shape[1]
    spread = torch.arange(shape[0] * shape[1], device=indices.device) % size
    return SparseCodes(
        nn.functional.pad(values, (0, shape[1])), torch.cat([indices, spread.view(shape)], 1)
    )
