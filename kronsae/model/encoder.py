"""The encoder of an SAE: its projections, and the ways in which selections ask for latents.

`Encoder`, the base class of `SAE`, holds the projections. An `EncoderKind` computes latents from
them: Kron, dense, or another one that is registered (`kronsae.registry.ENCODERS`).
Letters: d width, F latents, h heads of m base and n extension pre-latents, w width of the codes.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kronsae.config import SAEConfig
from kronsae.errors import InputError
from kronsae.model.ranks import check_heads, largest
from kronsae.model.router import Router
from kronsae.registry import ENCODERS, Kind
from kronsae.system.documents import typed
from kronsae.system.parallel import ALONE, Mesh
from kronsae.system.tensors import as_values, check_room
from kronsae_kernels import (
    SparseCodes,
    dense_encode,
    expert_encode,
    fused_encode,
    reference,
    threshold_encode,
)
from kronsae_kernels.batch_topk import encode_batch, spread


class EncoderKind(Kind, nn.Module):
    """The map from projections W_enc x + b_enc to latents; its parameters are `sae.kind.…`.

    A kind of your own has to define `every`; `encode` and `above` follow from it, and may be
    defined to save memory. They get weights w [.., d] and biases b [..] of all latents, or of one
    expert's: a kind with parameters for each latent refuses experts in `check`.
    """

    title: ClassVar[str] = "SAE"
    """Name of an SAE with this encoder."""
    usual_selection: ClassVar[str | None] = None
    """Title of the selection that this name leaves out."""
    factored: ClassVar[bool] = False
    """True if it has heads of base and extension pre-latents."""

    def __init__(self, config: SAEConfig) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def rows(cls, config: SAEConfig) -> int:
        """Number of projections, which are the rows of W_enc: by default one for each latent."""
        return config.dict_size

    @classmethod
    def pairs(cls, config: SAEConfig) -> int:
        """Number of latents that are made from two projections."""
        return 0

    def encode(
        self, x: Tensor, w: Tensor, b: Tensor, *, k: int, mask: Tensor | None, impl: str | None
    ) -> SparseCodes:
        """The k largest latents of x [..., d], among `mask` (bool, one a latent) if given.

        By default from `every`, in O(B F) memory.
        """
        values = self.every(x, w, b)
        if mask is not None:
            values = values.where(mask, 0)
        order = reference.largest(values.detach(), k)
        return SparseCodes(values.gather(-1, order), order)

    def above(
        self, x: Tensor, w: Tensor, b: Tensor, threshold: Tensor, impl: str | None
    ) -> SparseCodes:
        """Every latent of x [..., d] above its threshold [F], padded (`threshold_encode`).

        By default from `every`, in O(B F) memory.
        """
        values = self.every(x, w, b)
        values = values.where((values > threshold) & (values > self.silent_value), 0)
        active = (values.detach() > 0).sum(-1)
        width = max(1, int(active.max()) if active.numel() else 0)
        order = reference.largest(values.detach(), width)
        return SparseCodes(values.gather(-1, order), order)

    def of_batch(
        self, x: Tensor, w: Tensor, b: Tensor, *, k: int, threshold: Tensor | None, impl: str | None
    ) -> SparseCodes | None:
        """The k B largest latents of a batch x [..., d], or all of at least a threshold (scalar).

        None by default: BatchTopK then goes by `encode`, which torch.compile does not take whole.
        """
        return None

    def of_experts(
        self, x: Tensor, w: Tensor, b: Tensor, expert: Tensor, *, k: int, impl: str | None
    ) -> SparseCodes | None:
        """The k largest latents of each token's expert [B], x [B, d].

        None by default: it then goes by `encode`, as with `of_batch`.
        """
        return None

    @abstractmethod
    def every(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        """All latents of x [..., d] as a matrix [..., F], 0 where they are not active."""

    def products(
        self, x: Tensor, w: Tensor, b: Tensor, *, k: int, mask: Tensor | None, impl: str | None
    ) -> SparseCodes:
        """`encode`, but with values by which processes compare their latents; see `of_product`."""
        return self.encode(x, w, b, k=k, mask=mask, impl=impl)

    def of_product(self, values: Tensor) -> Tensor:
        """Values of latents from the values that `products` gives."""
        return values

    def decoder_rows(self, w: Tensor) -> Tensor:
        """Directions [F, d] at which the decoder's rows start."""
        return w

    def fold_(self, shift: Tensor, share: float | Tensor) -> None:
        """Adapt own parameters when the SAE shall take raw activations in place of normalised ones.

        `SAE.folded` calls it. W_enc stays, b_enc becomes (b_enc - shift) * share; with W_enc
        multiplied by `share`, too, all latents come out multiplied by `share`. A second bias b
        with weights r W_enc would become (b - r * shift) * share.
        shift: float64, one value for each row of W_enc.  share: may be one for each row, too, if
        each latent has a row.
        """

    @property
    def silent_value(self) -> float:
        """Value of a latent that is not active."""
        return 0.0

    @property
    def of_degree_two(self) -> bool:
        """True if latents grow like the product of two projections, not like one."""
        return False

    def l1(self, sae: "Encoder", x: Tensor, codes: SparseCodes, weights: Tensor | None) -> Tensor:
        """L1 norm of the latents of x [b, d], summed over tokens (scalar).

        A selection with an L1 penalty takes this, so that an encoder can say what is penalised (a
        gated one: the gate).
        codes: those of x.  weights: [F], by which latents are multiplied (None: 1).
        """
        values, indices = codes
        return values.abs().sum() if weights is None else (values.abs() * weights[indices]).sum()

    def penalties(self, sae: Any, x: Tensor, target: Tensor, tokens: int) -> dict[str, Any]:
        """The encoder's own losses by name (`Penalty`), called once a step.

        sae: the `SAE`.  x: [b, d], this process's part of a batch of `tokens` tokens, by which a
        mean divides.  target: [b, d_out], what the reconstruction is held against (x itself,
        but for a transcoder).
        """
        return {}

    def dense_form(self, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """W [F, d], b [F] and a threshold [F] (None: 0) such that relu(W x + b) above the threshold
        are the same latents.

        None if there are no such: formats of other libraries then cannot hold it.
        """
        return None


@ENCODERS.register("kron")
class Kron(EncoderKind):
    """Latents from each pair of base and extension pre-latents of a head. [KronSAE, eq. 2-4]"""

    title = "KronSAE"
    usual_selection = "TopK"
    factored = fused = shares_heads = True

    @classmethod
    def rows(cls, config):
        return config.heads * (config.m + config.n)

    @classmethod
    def pairs(cls, config):
        return config.dict_size

    @property
    def _gate(self) -> dict[str, Any]:
        config = self.config
        return {"m": config.m, "composition": config.composition, "eps": config.eps}

    def encode(self, x, w, b, *, k, mask, impl):
        return fused_encode(x, w, b, k=k, mask=mask, impl=impl, **self._gate)

    def above(self, x, w, b, threshold, impl):
        return threshold_encode(x, w, b, threshold=threshold, impl=impl, **self._gate)

    def of_batch(self, x, w, b, *, k, threshold, impl):
        return encode_batch(x, w, b, k=k, threshold=threshold, impl=impl, **self._gate)

    def of_experts(self, x, w, b, expert, *, k, impl):
        experts = self.config.experts
        return expert_encode(x, w, b, expert=expert, experts=experts, k=k, impl=impl, **self._gate)

    def every(self, x, w, b):
        config = self.config
        product = reference.latents(x, w, b, config.m, config.composition)
        return reference.compose(product, config.composition, config.eps).where(product > 0, 0)

    def products(self, x, w, b, *, k, mask, impl):
        product = "mul" if self.config.composition == "mul" else "relu_mul"
        return fused_encode(
            x, w, b, m=self.config.m, k=k, composition=product, mask=mask, impl=impl
        )

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
    """One projection for each latent: relu(W_enc x + b_enc)."""

    fused = shares_heads = True

    def encode(self, x, w, b, *, k, mask, impl):
        return dense_encode(x, w, b, k=k, mask=mask, impl=impl)

    def above(self, x, w, b, threshold, impl):
        return threshold_encode(x, w, b, threshold=threshold, impl=impl)

    def of_batch(self, x, w, b, *, k, threshold, impl):
        return encode_batch(x, w, b, k=k, threshold=threshold, impl=impl)

    def of_experts(self, x, w, b, expert, *, k, impl):
        experts = self.config.experts
        return expert_encode(x, w, b, expert=expert, experts=experts, k=k, impl=impl)

    def every(self, x, w, b):
        return reference.latents(x, w, b, None, "")

    def dense_form(self, w, b):
        return w, b, None


class Encoder(nn.Module):
    """Projections of activations, and the latents that they make; `SAE` adds selection and decoder.

    W_enc: [h, m + n, d] (with heads) or [R, d], R the kind's `rows`   b_enc: [h, m + n] or [R]
    kind: the `EncoderKind` that computes latents from them
    router: chooses experts (`kronsae.model.router`), or None
    mesh: the processes that share it, see `SAE`
    """

    def __init__(
        self, config: SAEConfig, device: torch.device | str | None = None, mesh: Mesh = ALONE
    ) -> None:
        super().__init__()
        typed(config, SAEConfig, "config")
        if config.d_model < 1:
            raise InputError(f"d_model: expected >= 1, got {config.d_model}")
        check_heads(config, mesh.heads.size)
        needed = config.matrix_entries // mesh.heads.size
        check_room(needed, device, "the SAE's weights", "take a smaller dict_size (or heads)")
        self.config = config
        self.mesh = mesh
        d = config.d_model
        if ENCODERS[config.encoder].factored:
            # Stored row-major over heads, which the kernels read fastest.
            heads = config.heads // mesh.heads.size
            w_enc = torch.empty(config.m + config.n, heads, d, device=device).transpose(0, 1)
        else:
            w_enc = torch.empty(config.encoder_rows // mesh.heads.size, d, device=device)
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
        """Number of latents that this process holds: all of them, or an equal share."""
        return self.config.dict_size // self.mesh.heads.size

    def _drawn(self, weight: Tensor, generator: torch.Generator | None) -> Tensor:
        """N(0, 1) in the shape of a weight: this process's rows of a draw for all processes."""
        group, (rows, *columns) = self.mesh.heads, weight.shape
        device = None if generator is None else generator.device
        whole = torch.randn(rows * group.size, *columns, generator=generator, device=device)
        return whole[group.rank * rows : (group.rank + 1) * rows]

    def largest(
        self, x: Tensor, k: int, *, mask: Tensor | None = None, impl: str | None = None
    ) -> SparseCodes:
        """The k largest latents of x [..., d], among `mask` [F] (bool) if given.

        With experts: of the token's expert, times the router's probability; fewer (unused slots)
        where the mask leaves an expert fewer. With a mesh, mask is that of the own latents.
        """
        x = self._as_weights(x)
        if self.mesh.heads.size == 1 and self.router is None:
            return self.kind.encode(x, self.W_enc, self.b_enc, k=k, mask=mask, impl=impl)
        flat = x.reshape(-1, x.shape[-1])
        if self.router is not None:
            values, indices = self._largest_of_experts(self.router, flat, k, mask, impl)
        else:
            size = self.own_latents
            own = largest_allowed(
                self.kind.products, flat, self.W_enc, self.b_enc, min(k, size), mask, impl
            )
            products, indices = largest(own, k, self.mesh.heads, size)
            values = self.kind.of_product(products)
        shape = (*x.shape[:-1], values.shape[1])
        return SparseCodes(values.view(shape), indices.view(shape))

    def _largest_of_experts(
        self, router: Router, x: Tensor, k: int, mask: Tensor | None, impl: str | None
    ) -> SparseCodes:
        probability, expert = router(x).max(-1)
        if mask is None:
            weights = self.W_enc, self.b_enc
            codes = self.kind.of_experts(x, *weights, expert, k=k, impl=impl)
            if codes is not None:
                return SparseCodes(codes.values * probability[:, None], codes.indices)
        weights, biases = (p.split(len(p) // self.config.experts) for p in (self.W_enc, self.b_enc))
        masks = mask.split(self.latents_per_token) if mask is not None else None

        def encode_expert(expert: int, rows: Tensor) -> SparseCodes:
            values, indices = largest_allowed(
                self.kind.encode,
                *(rows, weights[expert], biases[expert]),
                *(k, masks[expert] if masks else None, impl),
            )
            return widened(values, indices + expert * self.latents_per_token, k, self.dict_size)

        return router.dispatch(x, probability, expert, encode_expert)

    def of_batch(
        self, x: Tensor, k: int, threshold: Tensor | None, *, impl: str | None = None
    ) -> SparseCodes | None:
        """The k B largest latents of a batch x [..., d], or all of at least a threshold (scalar).

        None where they have to be found among those of experts, processes, or other kinds.
        """
        shared = self.mesh.heads.size > 1 or (threshold is None and self.mesh.data.size > 1)
        if shared or self.router is not None or impl == "reference":
            return None
        x, threshold = self._as_weights(x), None if threshold is None else threshold.detach()
        return self.kind.of_batch(x, self.W_enc, self.b_enc, k=k, threshold=threshold, impl=impl)

    def above(self, x: Tensor, threshold: Tensor, *, impl: str | None = None) -> SparseCodes:
        """Every latent of x [..., d] above its threshold [F], padded (`threshold_encode`).

        Without experts: a selection that calls this, or `every`, refuses them in `check`.
        """
        impl = impl if impl == "reference" else None
        return self.kind.above(self._as_weights(x), self.W_enc, self.b_enc, threshold, impl)

    def every(self, x: Tensor) -> SparseCodes:
        """All latents of x [B, d] as codes [B, F], in their order, 0 where they are not active.

        Memory: O(B F). For the training of a selection without k, where so many latents are active
        that a matrix is faster (see `is_every`).
        """
        values = self.kind.every(self._as_weights(x), self.W_enc, self.b_enc)
        indices = torch.arange(values.shape[-1], device=values.device)
        return SparseCodes(values, indices.expand_as(values))

    def _as_weights(self, x: Tensor) -> Tensor:
        x = as_values(x, "x")
        autocast = torch.is_autocast_enabled(x.device.type)
        return x if autocast else x.to(self.W_enc.dtype)

    @property
    def silent_value(self) -> float:
        """Value of a latent whose product is 0."""
        return self.kind.silent_value

    def fired(self, codes: SparseCodes) -> Tensor:
        """Mask (bool [..., k]) of the codes that are active latents: their product is not 0."""
        return codes.values.abs() > self.silent_value


def largest_allowed(
    encode: Callable[..., SparseCodes],
    x: Tensor,
    w: Tensor,
    b: Tensor,
    k: int,
    mask: Tensor | None,
    impl: str | None,
) -> SparseCodes:
    """Codes of x [B, d] by `encode`: the k largest, or as many as the mask allows, even none."""
    count = k if mask is None else min(k, int(mask.sum()))
    if count:
        return encode(x, w, b, k=count, mask=mask, impl=impl)
    values = w.new_zeros(len(x), 0)
    return SparseCodes(values, values.long())


def is_every(codes: SparseCodes) -> bool:
    """True for the codes that `Encoder.every` gives, whose values are a matrix [B, F]."""
    return codes.indices.ndim == 2 and codes.indices.stride(0) == 0


def add_per_latent_(out: Tensor, codes: SparseCodes, values: Tensor) -> None:
    """Add to out [F], for each latent, the values [B, w] at its entries in codes [B, w]."""
    if is_every(codes):
        out.add_(values.sum(0))
    else:
        out.index_add_(0, codes.indices.flatten(), values.flatten())


def widened(values: Tensor, indices: Tensor, width: int, size: int) -> SparseCodes:
    """Codes [B, w] of `size` latents, filled up with unused slots to `width`."""
    unused = spread(indices.new_empty(len(values), width - values.shape[1]), size)
    return SparseCodes(
        nn.functional.pad(values, (0, unused.shape[1])), torch.cat([indices, unused], 1)
    )
