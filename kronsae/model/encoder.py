"""The encoder of an SAE: its projections, and the ways in which selections ask for latents.

`Encoder` is the part of `SAE` that holds them; an `EncoderKind` says what latents they make: Kron,
dense, or another one that is registered (`kronsae.registry.ENCODERS`).
Letters: d width, F latents, h heads of m base and n extension pre-latents, w width of the codes.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kronsae.config import SAEConfig
from kronsae.errors import InputError
from kronsae.model.ranks import check_heads, largest
from kronsae.model.router import Router
from kronsae.registry import ENCODERS, Kind
from kronsae.system.parallel import ALONE, Mesh
from kronsae_kernels import (
    SparseCodes,
    dense_encode,
    fused_encode,
    reference,
    threshold_encode,
)


class EncoderKind(Kind, nn.Module):
    """How projections W_enc x + b_enc become latents; parameters of its own are `sae.kind.…`.

    Methods get weights w [.., d] and biases b [..] of all latents, or of one expert's.
    """

    title: ClassVar[str] = "SAE"
    """What an SAE with it is called."""
    usual_selection: ClassVar[str | None] = None
    """Title of the selection that its name need not mention."""
    factored: ClassVar[bool] = False
    """Whether it has heads of base and extension pre-latents."""

    def __init__(self, config: SAEConfig) -> None:
        super().__init__()
        self.config = config

    def encode(
        self, x: Tensor, w: Tensor, b: Tensor, *, k: int, mask: Tensor | None, impl: str | None
    ) -> SparseCodes:
        """The k largest latents of x [..., d], among `mask` (bool, one a latent) if given."""
        raise NotImplementedError

    def above(
        self, x: Tensor, w: Tensor, b: Tensor, threshold: Tensor, impl: str | None
    ) -> SparseCodes:
        """Every latent of x [..., d] above its threshold, padded (`threshold_encode`)."""
        raise NotImplementedError

    def every(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        """All latents of x [..., d], [..., F]: 0 where they are not active."""
        raise NotImplementedError

    def products(
        self, x: Tensor, w: Tensor, b: Tensor, *, k: int, mask: Tensor | None, impl: str | None
    ) -> SparseCodes:
        """`encode`, with values by which latents of several processes compete; see `of_product`."""
        return self.encode(x, w, b, k=k, mask=mask, impl=impl)

    def of_product(self, values: Tensor) -> Tensor:
        """The values of latents, from those that `products` gives."""
        return values

    def decoder_rows(self, w: Tensor) -> Tensor:
        """A direction [F, d] for each latent, for its decoder row to start at."""
        return w

    def fold_(self, shift: Tensor, share: float) -> None:
        """Follow `SAE.folded`, which makes (W_enc x + b_enc - shift) * share of W_enc x + b_enc.

        shift: float64, one a row of W_enc.
        """

    @property
    def silent_value(self) -> float:
        """Value of a latent that is not active."""
        return 0.0

    @property
    def of_degree_two(self) -> bool:
        """Whether latents grow like the product of two projections, and not like one."""
        return False

    def l1(self, sae: "Encoder", x: Tensor, codes: SparseCodes, weights: Tensor | None) -> Tensor:
        """What an L1 penalty sums over tokens and latents (scalar).

        codes: of x [B, d].  weights: [F], what each latent counts (None: 1).
        """
        values, indices = codes
        return values.abs().sum() if weights is None else (values.abs() * weights[indices]).sum()

    def penalties(self, sae: Any, x: Tensor, target: Tensor, tokens: int) -> dict[str, Any]:
        """Losses of its own on x [b, d], part of a batch of so many tokens, by name (`Penalty`)."""
        return {}

    def dense_form(self, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """W [F, d], b [F] and, unless it is 0, a threshold [F] of relu(W x + b) that give the same
        latents; None if there are none."""
        return None


@ENCODERS.register("kron")
class Kron(EncoderKind):
    """Heads whose base and extension pre-latents meet in a gate. [KronSAE, eq. 2-4]"""

    title = "KronSAE"
    usual_selection = "TopK"
    factored = fused = shares_heads = True

    @property
    def _gate(self) -> dict[str, Any]:
        config = self.config
        return {"m": config.m, "composition": config.composition, "eps": config.eps}

    def encode(self, x, w, b, *, k, mask, impl):
        return fused_encode(x, w, b, k=k, mask=mask, impl=impl, **self._gate)

    def above(self, x, w, b, threshold, impl):
        return threshold_encode(x, w, b, threshold=threshold, impl=impl, **self._gate)

    def every(self, x, w, b):
        config = self.config
        product = reference.latents(x, w, b, config.m, config.composition)
        return reference.compose(product, config.composition, config.eps).where(product > 0, 0)

    def products(self, x, w, b, *, k, mask, impl):
        product = "mul" if self.config.composition == "mul" else "relu_mul"
        gate = {"m": self.config.m, "composition": product}
        return fused_encode(x, w, b, k=k, mask=mask, impl=impl, **gate)

    def of_product(self, values):
        return reference.compose(values, self.config.composition, self.config.eps)

    def decoder_rows(self, w):
        base, extension = w.split([self.config.m, self.config.n], dim=1)
        return (base[:, :, None] + extension[:, None, :]).flatten(0, 2)

    @property
    def silent_value(self):
        return self.config.eps**0.5 if self.config.composition == "mand" else 0.0

    @property
    def of_degree_two(self):
        return self.config.composition != "mand"


@ENCODERS.register("dense")
class Dense(EncoderKind):
    """A projection for each latent: relu(W_enc x + b_enc)."""

    fused = shares_heads = True

    def encode(self, x, w, b, *, k, mask, impl):
        return dense_encode(x, w, b, k=k, mask=mask, impl=impl)

    def above(self, x, w, b, threshold, impl):
        return threshold_encode(x, w, b, threshold=threshold, impl=impl)

    def every(self, x, w, b):
        return reference.latents(x, w, b, None, "")

    def dense_form(self, w, b):
        return w, b, None


class Encoder(nn.Module):
    """What turns activations into latents, without a selection; `SAE` adds that, and the decoder.

    W_enc: [h, m + n, d] (with heads) or [F, d]        b_enc: [h, m + n] or [F]
    kind: what latents they make (`EncoderKind`)
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
        if ENCODERS[config.encoder].factored:
            # Stored row-major over heads, which the kernels read fastest.
            heads = config.heads // mesh.heads.size
            w_enc = torch.empty(config.m + config.n, heads, d, device=device).transpose(0, 1)
        else:
            w_enc = torch.empty(self.own_latents, d, device=device)
        self.W_enc = nn.Parameter(w_enc)
        self.b_enc = nn.Parameter(torch.zeros(w_enc.shape[:-1], device=device))
        self.router = Router(config.experts, d, device) if config.experts else None
        self.kind: EncoderKind = ENCODERS[config.encoder](config).to(device)

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
        encode = self.kind.encode
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
        size = self.own_latents
        flat = x.reshape(-1, x.shape[-1])
        count = min(k, size if mask is None else int(mask.sum()))
        if count:
            found = self.kind.products(flat, self.W_enc, self.b_enc, k=count, mask=mask, impl=impl)
        else:
            found = SparseCodes(
                self.W_enc.new_zeros(len(flat), 0), x.new_zeros(len(flat), 0).long()
            )
        values, indices = largest(found, k, self.mesh.heads, size)
        values = self.kind.of_product(values)
        return SparseCodes(values.view(*x.shape[:-1], k), indices.view(*x.shape[:-1], k))

    def above(self, x: Tensor, threshold: Tensor, *, impl: str | None = None) -> SparseCodes:
        """Every latent of x [..., d] above its threshold [F], padded (`threshold_encode`)."""
        impl = impl if impl == "reference" else None
        return self.kind.above(self._as_weights(x), self.W_enc, self.b_enc, threshold, impl)

    def every(self, x: Tensor) -> SparseCodes:
        """All latents of x [B, d] as codes [B, F], each at its place, 0 where it is not active.

        Memory: O(B F). For training that no selection makes sparse: see `is_every`.
        """
        values = self.kind.every(self._as_weights(x), self.W_enc, self.b_enc)
        indices = torch.arange(values.shape[-1], device=values.device)
        return SparseCodes(values, indices.expand_as(values))

    def _as_weights(self, x: Tensor) -> Tensor:
        autocast = torch.is_autocast_enabled(x.device.type)
        return x if autocast else x.to(self.W_enc.dtype)

    @property
    def silent_value(self) -> float:
        """Value of a latent whose product is 0."""
        return self.kind.silent_value

    def fired(self, codes: SparseCodes) -> Tensor:
        """Which of the codes are active latents (bool [..., k]): their product is not 0."""
        return codes.values.abs() > self.silent_value


def is_every(codes: SparseCodes) -> bool:
    """Whether codes are what `Encoder.every` gives: a matrix, that is, and best taken for one."""
    return codes.indices.ndim == 2 and codes.indices.stride(0) == 0


def add_per_latent_(out: Tensor, codes: SparseCodes, of_codes: Tensor) -> None:
    """Add to out [F], for each latent, what its entries in codes [B, w] have in of_codes [B, w]."""
    if is_every(codes):
        out.add_(of_codes.sum(0))
    else:
        out.index_add_(0, codes.indices.flatten(), of_codes.flatten())


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
