"""`expert_encode`: the largest latents of one part of the dictionary, as Switch SAEs need them."""

from typing import Any

import torch
from torch import Tensor

from kronsae_kernels import backends, reference
from kronsae_kernels.common import (
    COMPOSITIONS,
    SparseCodes,
    as_integer,
    as_number,
    check_choice,
    check_count,
    check_integers,
    check_number,
    check_same,
    check_shape,
    check_tensors,
    dict_size,
    require,
    without_autocast,
)
from kronsae_kernels.encode import Selected, check_encoder, codes_of
from kronsae_kernels.rules import has_values, operator


def expert_encode(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None = None,
    *,
    expert: Tensor,
    experts: int,
    k: int,
    m: int | None = None,
    composition: str = "mand",
    eps: float = 0.0,
    impl: str | None = None,
    layout: str = "head-major",
) -> SparseCodes:
    """The k largest latents of each token's expert, one of E equal parts of the dictionary.

    Equals `reference.expert_encode`. Expert e owns the latents [e F / E, (e + 1) F / E), and their
    rows of w_enc; only a token's own expert is computed. [Mudide et al. 2025: Switch SAEs]

    x: [..., d].  expert: [...] integers in [0, E).  experts: E, which divides F, and h.
    w_enc: [h, m + n, d] with m given (Kron), or [F, d] without (dense).  b_enc, composition, eps,
    impl, layout, results, order, gradients and errors: as in `fused_encode`.
    """
    rank = 2 if m is None else 3
    x, w_enc, b_enc = check_encoder(x, w_enc, b_enc, None, rank=rank, layout=layout)
    m, k, experts = as_integer(m), as_integer(k), as_integer(experts)
    eps = as_number(eps)
    size = dict_size(w_enc, m)
    check_tensors(expert=expert)
    check_shape("expert", expert, tuple(x.shape[:-1]), "one for each token, [...]")
    check_integers(expert=expert)
    check_same("device", x=x, expert=expert)
    check_count("experts", experts, 1, len(w_enc), "of which each owns as many rows of w_enc")
    require(
        len(w_enc) % experts == 0,
        f"experts: expected a divisor of the {len(w_enc)} rows of w_enc, got {experts}",
    )
    own = size // experts
    check_count("k", k, 1, own, f"1 <= k <= F / E = {own}")
    check_choice("composition", composition, COMPOSITIONS)
    check_number("eps", eps, 0)
    expert = expert.long()
    gate: dict[str, Any] = {"m": m, "composition": composition, "eps": eps}
    name = backends.choose(impl, x.device, x.dtype)
    if name == "reference":
        if has_values(expert):
            _check_expert(expert, experts)
        return reference.expert_encode(x, w_enc, b_enc, expert=expert, experts=experts, k=k, **gate)
    results = torch.ops.kronsae.encode_experts(
        *(x.reshape(-1, x.shape[-1]), w_enc, b_enc, m, composition, name),
        *(k, expert.reshape(-1), experts),
    )
    return codes_of(x, *results, **gate)


def _check_expert(expert: Tensor, experts: int) -> None:
    """Raise ValueError for experts outside [0, E), where they are on a CPU."""
    if expert.device.type == "cpu" and expert.numel():
        low, high = (int(bound) for bound in torch.aminmax(expert))
        require(
            low >= 0 and high < experts,
            f"expert: expected integers in [0, {experts}), got [{low}, {high}]",
        )


@operator("encode_experts")
class EncodeExperts(Selected):
    @staticmethod
    def compute(
        x: Tensor,
        w_enc: Tensor,
        b_enc: Tensor | None,
        m: int | None,
        composition: str,
        impl: str,
        k: int,
        expert: Tensor,
        experts: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        _check_expert(expert, experts)
        weights = w_enc.chunk(experts)
        biases = [None] * experts if b_enc is None else b_enc.chunk(experts)
        own = dict_size(w_enc, m) // experts
        order = expert.argsort(stable=True)
        counts = expert.bincount(minlength=experts).tolist()
        parts = []
        with without_autocast(x):
            for e, rows in enumerate(x[order].split(counts)):
                indices, *factors = backends.module(impl).encode(
                    rows, weights[e], biases[e], None, m, k, composition
                )
                parts.append((indices + e * own, *factors))
        indices, base, extension = (torch.cat(column) for column in zip(*parts, strict=True))
        back = order.argsort()
        return base[back], extension if m is None else extension[back], indices[back]

    @staticmethod
    def flops(x, w_enc, b_enc, m, composition, impl, k, expert, experts):
        return 2 * x.shape[0] * w_enc.numel() // experts

    @staticmethod
    def rows(*args):
        return 0, 7
