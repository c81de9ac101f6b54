"""Multiply-adds that an SAE costs for a token: the paper's count, and that of our training step.

d width of the activations      F = h m n latents, k of them active      rows of the encoder: F, or
h heads of m base and n extension pre-latents (0 for a dense encoder)       h (m + n)
"""

from typing import NamedTuple

from kronsae.config import SAEConfig
from kronsae.errors import InputError
from kronsae.registry import ENCODERS

ADAMW = 8
"""Operations on one parameter: two averages, bias corrections, root, division, update."""


def forward(
    d: int,
    dict_size: int,
    k: int,
    *,
    heads: int = 0,
    m: int = 0,
    n: int = 0,
    experts: int = 0,
    d_out: int | None = None,
    skip: bool = False,
    refine: int = 0,
) -> int:
    """Multiply-adds of one token's forward pass. [KronSAE, eq. 7]

    dF + kd for a dense encoder (heads = 0), dh(m + n) + mnh + kd for a Kron encoder. With experts:
    those of the router and of one expert. d_out: width of a transcoder's target. refine: steps that
    each decode once more, and multiply the k rows with the error.
    """
    encode = d * heads * (m + n) + m * n * heads if heads else d * dict_size
    return _forward(encode, d, k, experts, d if d_out is None else d_out, skip, refine)


def flops_per_token(sae: SAEConfig) -> int:
    """`forward` of a configuration."""
    encode = sae.d_model * sae.encoder_rows + ENCODERS[sae.encoder].pairs(sae)
    return _forward(encode, sae.d_model, sae.k, sae.experts, sae.d_out, sae.skip, sae.refine)


def _forward(encode: int, d: int, k: int, experts: int, d_out: int, skip: bool, refine: int) -> int:
    return encode // max(1, experts) + d * experts + (1 + 2 * refine) * k * d_out + skip * d * d_out


class Step(NamedTuple):
    """Multiply-adds of a training step for each token of the batch, by purpose."""

    encode: float
    """The encoder's matrix product: all rows."""
    select: float
    """Products of pre-latents: one for each head's maximum, and all in the k heads kept."""
    decode: float
    """The sum of k decoder rows."""
    decoder_backward: float
    """Gradients of the codes and of the decoder: the k active rows, twice."""
    encoder_backward: float
    """Gradient of the encoder: the live pre-latents alone, at most 2k (Kron) or k (dense)."""
    auxk: float
    """The auxiliary loss on its share of the batch; 0 while no latent is dead."""
    optimizer: float
    """AdamW, the decoder's unit norm, and its gradient's parallel part; shared by the batch."""

    @property
    def total(self) -> float:
        return sum(self)


def training_step(
    d: int,
    dict_size: int,
    k: int,
    batch: int,
    *,
    heads: int = 0,
    m: int = 0,
    n: int = 0,
    auxk: int = 0,
    auxk_fraction: float = 0.0,
) -> Step:
    """Multiply-adds that our step on `batch` tokens takes for each of them.

    auxk: dead latents in the auxiliary loss, which is measured on `auxk_fraction` of the batch.
    It encodes once more, and forms all F products of a Kron encoder.
    """
    kron = heads > 0
    rows = heads * (m + n) if kron else dict_size
    live = 2 if kron else 1  # encoder rows behind an active latent
    aux = 0
    if auxk:
        aux = d * rows + (dict_size if kron else 0) + auxk * d * (1 + 2 + live)
    parameters = rows * (d + 1) + dict_size * d + d
    # The norm takes one pass over the decoder, the division one, the parallel part one.
    optimizer = ADAMW * parameters + 3 * dict_size * d
    return Step(
        encode=d * rows,
        select=heads + min(k, heads) * m * n if kron else 0,
        decode=k * d,
        decoder_backward=2 * k * d,
        encoder_backward=live * k * d,
        auxk=auxk_fraction * aux,
        optimizer=optimizer / batch,
    )


def equal_budget(tokens: int, reference: int, own: int) -> int:
    """Number of tokens that cost as much at `own` FLOPs each as `tokens` at `reference` each.

    This is the iso-FLOP rule: a cheaper encoder sees more tokens. [KronSAE, eq. 7]
    Raises InputError unless all are at least 1.
    """
    for name, value in (("tokens", tokens), ("reference", reference), ("own", own)):
        if value < 1:
            raise InputError(f"{name}: expected >= 1, got {value}")
    return max(1, round(tokens * reference / own))
