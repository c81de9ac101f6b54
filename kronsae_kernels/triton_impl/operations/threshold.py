"""Latents above thresholds of their own: kernels of `triton_impl.threshold`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kronsae_kernels import torch_impl
from kronsae_kernels.triton_impl import threshold as kernels
from kronsae_kernels.triton_impl.configs import Config
from kronsae_kernels.triton_impl.launch import cdiv, configure, launch, next_power_of_2
from kronsae_kernels.triton_impl.operations.select import MAX_SORTED


def threshold_encode(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None,
    threshold: Tensor,
    m: int | None,
    eps: float,
    composition: str,
    width: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Same as `torch_impl.threshold_encode`, in `width` places a token if that is given.

    width None: the host reads the width of each chunk of tokens. Given, the host reads nothing, and
    a token with more latents, as its count shows, has some of them left out.
    """
    if threshold.shape[0] >= 2**31 and width is None:
        return torch_impl.threshold_encode(x, w_enc, b_enc, threshold, m, eps, composition)
    limits = Limits.of(threshold, m, w_enc.shape, composition, eps)
    parts, begin = [], 0
    for pre in torch_impl.projections(x, w_enc, b_enc, scratch=0):
        counts = count_above(pre, limits)
        widest = max(1, int(counts.sum(1).max())) if width is None else width
        parts.append(select_above(pre, limits, counts, widest, begin))
        begin += len(pre)
    if len(parts) == 1:
        return parts[0]
    if width is not None:
        return torch_impl.concatenate(parts, x, width, ())
    width = max((part[0].shape[1] for part in parts), default=1)
    base = x.new_zeros(x.shape[0], width, dtype=torch.float32)
    spread = torch.arange(base.numel(), device=x.device).remainder_(limits.size)
    whole = base, torch.zeros_like(base), spread.view(base.shape), spread.new_empty(x.shape[0])
    begin = 0
    for *part, counts in parts:
        rows = slice(begin, begin + len(counts))
        whole[-1][rows] = counts
        for into, columns in zip(whole, part, strict=False):
            into[rows, : columns.shape[1]] = columns
        begin = rows.stop
    return whole


class Jumped(NamedTuple):
    """Results of `jump`."""

    active: Tensor
    """[B] float32: latents of each token above their threshold."""
    slopes: Tensor
    """[B, w] float32: threshold / bandwidth for values near their threshold, else 0."""
    threshold: Tensor
    """[F] float32: the thresholds."""


def jump(
    base: Tensor,
    extension: Tensor,
    indices: Tensor,
    counts: Tensor,
    threshold: Tensor,
    bandwidth: float,
    composition: str,
    narrow: Tensor,
) -> Jumped:
    """JumpReLU of codes [B, w], counts [B] of them a token: `threshold.jump`, which changes them.

    composition: as of `decode_and_loss`, with eps = 0.
    narrow: float32 scalar, set to 1 where a token has more than w.
    """
    tokens, width = indices.shape
    jumped = Jumped(base.new_empty(tokens), torch.empty_like(base), threshold)
    launch(
        kernels.jump,
        (tokens,),
        configure("jump", base.device).capped(WIDTH=next_power_of_2(width)),
        base=base,
        extension=extension,
        indices=indices,
        counts=counts,
        narrow=narrow,
        width=width,
        bandwidth=bandwidth,
        ROOT=composition == "mand",
        DENSE=composition == "dense",
        **jumped._asdict(),
    )
    return jumped


def jump_gradients(
    d_values: Tensor,
    indices: Tensor,
    jumped: Jumped,
    scale: float | Tensor,
    d_active: Tensor,
) -> Tensor:
    """dL by the logarithms of thresholds, of each code [B, w]: `threshold.jump_gradients`."""
    out = torch.empty_like(jumped.slopes)
    launch(
        kernels.jump_gradients,
        lambda blocks: (cdiv(out.numel(), blocks["ENTRIES"]),),
        d_values=d_values,
        indices=indices,
        slopes=jumped.slopes,
        threshold=jumped.threshold,
        scale=scale,
        d_active=d_active,
        out=out,
        size=out.numel(),
        ON_DEVICE=isinstance(scale, Tensor),
    )
    return out


class Limits(NamedTuple):
    """Limits that products of latents exceed if the latents are active."""

    of_latent: Tensor
    """[m n, h] float32; of a dense encoder [F]."""
    of_head: Tensor
    """[h] float32: the lowest of each head; of a dense encoder as `of_latent`."""
    shape: dict[str, Any]
    """M, N, SIGNED and DENSE of the kernels."""

    @property
    def size(self) -> int:
        return self.of_latent.numel()

    @property
    def heads(self) -> int:
        return self.of_head.numel()

    @classmethod
    def of(
        cls, threshold: Tensor, m: int | None, shape: torch.Size, composition: str, eps: float
    ) -> "Limits":
        """Limits from thresholds [F] of the latents' values; shape: that of w_enc."""
        limits = torch.empty_like(threshold, dtype=torch.float32)
        launch(
            kernels.product_limits,
            lambda blocks: (cdiv(limits.numel(), blocks["WIDTH"]),),
            threshold=threshold.double().contiguous(),
            limits=limits,
            size=limits.numel(),
            eps=float(eps),
            ROOT=m is not None and composition == "mand",
        )
        if m is None:
            return cls(limits, limits, {"M": 1, "N": 1, "SIGNED": False, "DENSE": True})
        heads, n = shape[0], shape[1] - m
        by_head = limits.view(heads, m * n)
        how = {"M": m, "N": n, "SIGNED": composition == "mul", "DENSE": False}
        return cls(by_head.t().contiguous(), by_head.amin(1), how)


def count_above(pre: Tensor, limits: Limits) -> Tensor:
    """Active latents of each split of the heads, [b, splits] int32, from pre-latents of a chunk."""
    tokens, stride = pre.shape
    config = configure("count_above", pre.device)
    splits = cdiv(limits.heads, config.blocks["HEADS"])
    counts = pre.new_empty(tokens, splits, dtype=torch.int32)
    launch(
        kernels.count_above,
        (tokens * splits,),
        config,
        pre=pre,
        limits=limits.of_latent,
        lowest=limits.of_head,
        counts=counts,
        stride=stride,
        h=limits.heads,
        splits=splits,
        **limits.shape,
    )
    return counts


def select_above(
    pre: Tensor, limits: Limits, counts: Tensor, width: int, begin: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """base, extension, indices [b, width], counts [b] of a chunk whose first token is `begin`.

    counts: of `count_above`; width: of the token that has most.
    """
    (tokens, stride), splits = pre.shape, counts.shape[1]
    starts = counts.new_zeros(tokens, splits + 1)
    torch.cumsum(counts, 1, dtype=torch.int32, out=starts[:, 1:])
    sort = width <= MAX_SORTED
    shared = {"pre": pre, "stride": stride, "h": limits.heads, "width": width, **limits.shape}
    ranked = pre.new_full((tokens, width), -(2**63), dtype=torch.int64)
    launch(
        kernels.write_above,
        (tokens * splits,),
        configure("write_above", pre.device, **configure("count_above", pre.device).blocks),
        limits=limits.of_latent,
        starts=starts,
        ranked=ranked,
        splits=splits,
        **shared,
    )
    if not sort:
        ranked = ranked.sort(dim=1, descending=True).values
    counts, indices = starts[:, -1].long(), torch.empty_like(ranked)
    base = pre.new_empty(ranked.shape, dtype=torch.float32)
    extension = torch.empty_like(base)
    config = configure("rank_above", pre.device)
    block = next_power_of_2(width) if sort else MAX_SORTED
    launch(
        kernels.rank_above,
        (tokens, cdiv(width, block)),
        Config(min(config.num_warps, max(1, block // 64)), config.num_stages, {"WIDTH": block}),
        ranked=ranked,
        counts=counts,
        indices=indices,
        base=base,
        extension=extension,
        size=limits.size,
        begin=begin,
        SORT=sort,
        **shared,
    )
    return base, extension.copy_(base) if limits.shape["DENSE"] else extension, indices, counts
