"""Where decoder rows point: to each other, and to the language model's next tokens.

Letters: F latents, d width, h heads of m base and n extension, V tokens.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kronsae.model.sae import SAE

NEIGHBOURS_ON_CPU = 2**42
"""Most multiply-adds, F^2 d, for which nearest rows are searched on a CPU (minutes)."""

AT_ONCE = 2**24
"""Cosines or logits that exist at a time."""

NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "final_norm", "norm_f")
"""Names that transformers' models give to the norm before their head."""


def mean_cosines(w_dec: Tensor, heads: int, m: int, n: int) -> dict[str, float]:
    """Mean cosines of pairs of decoder rows [F, d] of unit norm, by what the two share.

    same_base: the base (so the head) of both, same_extension, same_head: only the head;
    other_head: not even that. Exact over all pairs: the sum of all cosines in a set of rows is the
    squared norm of their sum. nan where there are no such pairs. [KronSAE, Fig. 19]
    """
    rows = torch.nn.functional.normalize(w_dec.double(), dim=1).view(heads, m, n, -1)

    def pairs(sums: Tensor) -> float:
        """Cosines of all ordered pairs within each set, a row with itself included."""
        return sums.square().sum().item()

    itself = pairs(rows)
    base, extension = pairs(rows.sum(2)) - itself, pairs(rows.sum(1)) - itself
    head = pairs(rows.sum((1, 2))) - itself
    everything = pairs(rows.sum((0, 1, 2))) - itself
    size = heads * m * n
    sums = {
        "same_base": (base, size * (n - 1)),
        "same_extension": (extension, size * (m - 1)),
        "same_head": (head - base - extension, size * (m - 1) * (n - 1)),
        "other_head": (everything - head, size * (size - m * n)),
    }
    return {name: total / count if count else torch.nan for name, (total, count) in sums.items()}


class Nearest(NamedTuple):
    """The rows with the largest cosine to each row, itself left out."""

    latents: np.ndarray
    """[F, s] int64"""
    cosines: np.ndarray
    """[F, s] largest first."""


@torch.no_grad()
def nearest_rows(w_dec: Tensor, size: int) -> Nearest | None:
    """The nearest `size` (at most F - 1) of decoder rows [F, d]; None if that takes too long.

    Memory: O(AT_ONCE + F s), never [F, F].
    """
    count, d = w_dec.shape
    if w_dec.device.type == "cpu" and count * count * d > NEIGHBOURS_ON_CPU:
        return None
    rows = torch.nn.functional.normalize(w_dec.float(), dim=1)
    size = min(size, count - 1)
    parts = []
    step = max(1, AT_ONCE // count)
    for start in range(0, count, step):
        cosines = rows[start : start + step] @ rows.T
        cosines[torch.arange(len(cosines)), torch.arange(start, start + len(cosines))] = -torch.inf
        largest = cosines.topk(size, 1)
        parts.append((largest.indices.cpu().numpy(), largest.values.cpu().numpy()))
    return Nearest(*map(np.concatenate, zip(*parts, strict=True)))


def kinship(nearest: Nearest, m: int, n: int) -> dict[str, float]:
    """Shares of the nearest row of each latent that are in its head, and share its base or its
    extension."""
    own, other = np.arange(len(nearest.latents)), nearest.latents[:, 0]
    head = own // (m * n) == other // (m * n)
    base, extension = own // n == other // n, head & (own % n == other % n)
    shares = {"same_head": head, "same_base": base, "same_extension": extension}
    return {name: float(values.mean()) for name, values in shares.items()}


class LogitEffects(NamedTuple):
    """Next tokens that each decoder row, added to the residual stream, makes more or less likely.

    Direct: as if no later block read it. A row of W_dec is centred (if the norm does so), takes the
    weight of the model's last norm, and is multiplied with the unembedding; the norm's division by
    the length of the whole residual stream is left out, so effects of one latent compare with each
    other and their unit is open. The mean over tokens is taken away, which changes no probability.
    """

    raised: np.ndarray
    """[F, s] tokens, largest effect first."""
    raised_by: np.ndarray
    lowered: np.ndarray
    """[F, s] tokens, lowest effect first."""
    lowered_by: np.ndarray
    norm: str
    """The norm that was taken into account; "" if none was found."""


@torch.no_grad()
def logit_effects(sae: SAE, model: Any, size: int) -> LogitEffects | None:
    """Effects of an SAE's decoder rows on the logits of a transformers model.

    None if the model predicts no next token, or if rows are of another width than its residual
    stream. Memory: O(AT_ONCE + F s) and the unembedding, never [F, V].
    """
    head = model.get_output_embeddings()
    rows = sae.W_dec.detach()
    if head is None or head.weight.shape[1] != rows.shape[1]:
        return None
    name, direction = _through_norm(model, rows.to(head.weight.device).float())
    unembed = head.weight.detach().float()
    unembed = unembed - unembed.mean(0)
    size = min(size, len(unembed))
    parts = []
    step = max(1, AT_ONCE // len(unembed))
    for part in direction.split(step):
        effects = part @ unembed.T
        highest, lowest = effects.topk(size, 1), effects.topk(size, 1, largest=False)
        extremes = highest.indices, highest.values, lowest.indices, lowest.values
        parts.append([tensor.cpu().numpy() for tensor in extremes])
    raised, raised_by, lowered, lowered_by = map(np.concatenate, zip(*parts, strict=True))
    return LogitEffects(raised, raised_by, lowered, lowered_by, name)


def _through_norm(model: Any, rows: Tensor) -> tuple[str, Tensor]:
    """Name of the model's last norm, and rows [F, d] as they leave it, up to a factor."""
    for name, module in model.base_model.named_modules():
        if name.rpartition(".")[2] not in NORMS or getattr(module, "weight", None) is None:
            continue
        weight = module.weight.detach().float()
        if weight.shape != rows.shape[1:] or _in_a_block(name):
            continue
        if isinstance(module, torch.nn.LayerNorm):
            return name, (rows - rows.mean(1, keepdim=True)) * weight
        # RMS norms differ in what they multiply with (Gemma: 1 + weight): ones show it.
        return name, rows * module(torch.ones_like(weight, dtype=module.weight.dtype)).float()
    return "", rows


def _in_a_block(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))
