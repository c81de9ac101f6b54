"""Ablation, clamping and steering of latents in a language model while it runs or generates.

    model = LanguageModel.load("EleutherAI/pythia-160m", layer=6)
    with intervene(model, sae, [clamp(17, 5.0), ablate(3)]):
        model.model.generate(...)

An edit changes a latent from z to z', and the activations y (a transcoder's: of its target) to
y + (z' - z) W_dec[latent], which keeps the SAE's error; with keep_error=False the edited
reconstruction replaces y. Special tokens, the first position of a text and massive tokens (if the
SAE's metadata has the rule for them) are not changed, as SAEs are not trained on them.

Letters: n tokens, k active latents, e latents that are edited, d width.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kronsae.data import LanguageModel
from kronsae.errors import InputError
from kronsae.metrics.splicing import spliced
from kronsae.metrics.target_model import check_widths
from kronsae.metrics.usual import values_of
from kronsae.model.massive import rule_of
from kronsae.model.sae import SAE
from kronsae.system.documents import typed
from kronsae.system.tensors import as_values
from kronsae_kernels import SparseCodes

LARGEST_NORM = math.sqrt(torch.finfo(torch.float32).max)
"""Of activations whose squares a model can sum, as its norms do."""

SENSIBLE = "one to about ten times the latent's own maximum makes sense"
"""A value of a latent."""


class Edit(NamedTuple):
    """Change of a latent's value z on every token: z' = keep * z + add."""

    latent: int
    keep: float
    add: float


def ablate(latent: int) -> Edit:
    """Set the latent to z' = 0."""
    return Edit(latent, 0.0, 0.0)


def clamp(latent: int, value: float) -> Edit:
    """Set the latent to z' = value, also where it does not fire."""
    return Edit(latent, 0.0, value)


def steer(latent: int, amount: float) -> Edit:
    """Set the latent to z' = z + amount, which adds `amount` times its decoder row."""
    return Edit(latent, 1.0, amount)


def check_edits(sae: SAE, edits: Sequence[Edit]) -> None:
    """Raise InputError for a latent outside [0, F), and a value that is not finite or too large.

    It is too large if the square of the norm of what it adds to the activations is infinite.
    """
    sae.check_latents(edit.latent for edit in edits)
    for edit in edits:
        value = typed(edit.add, float, f"value of latent {edit.latent}")
        if not math.isfinite(value):
            raise InputError(f"value of latent {edit.latent}: expected a finite one, got {value}")
        most = LARGEST_NORM / max(1e-9, sae.W_dec[edit.latent].float().norm().item())
        if abs(value) > most:
            raise InputError(
                f"value of latent {edit.latent}: expected at most {most:.0e} in size, got "
                f"{value:g}: {SENSIBLE}"
            )


def change(sae: SAE, codes: SparseCodes, edits: Sequence[Edit]) -> Tensor:
    """Change [n, d_out] of the reconstruction of codes [n, k] by the edits.

    Several edits of one latent apply one after the other.
    """
    latents = list(dict.fromkeys(edit.latent for edit in edits))
    before = values_of(codes, latents, sae.dict_size)
    after = before.clone()
    for edit in edits:
        column = latents.index(edit.latent)
        after[:, column] = after[:, column] * edit.keep + edit.add
    return (after - before).to(sae.W_dec) @ sae.W_dec[latents]


@contextmanager
def intervene(
    model: LanguageModel, sae: SAE, edits: Sequence[Edit], *, keep_error: bool = True
) -> Iterator[None]:
    """While open, the edits apply in every forward pass of `model.model`, also in generation.

    sae: of raw activations at the model's hookpoint.
    Raises InputError for a latent outside [0, F), or widths that do not fit.
    """
    check_edits(sae, edits)
    check_widths(model, sae, sae.source or "edits")

    def replaced(x: Tensor, y: Tensor) -> Tensor:
        codes = sae.encode(x.to(sae.W_dec))
        base = y if keep_error else sae.decode(codes, x)
        return base + change(sae, codes, edits).to(base) if edits else base

    with spliced(model, replaced, **places_of(sae)):
        yield


@contextmanager
def displace(model: LanguageModel, sae: SAE, vector: Tensor) -> Iterator[None]:
    """While open, `vector` [d_out] is added to the activations wherever `intervene` changes them.

    They are those that the SAE reconstructs, in their own units.
    Raises InputError for another shape, or widths that do not fit.
    """
    check_widths(model, sae, sae.source or "vector")
    if vector.shape != (sae.config.d_out,):
        raise InputError(f"vector: expected [{sae.config.d_out}], got {list(vector.shape)}")
    with spliced(model, lambda _, y: y + vector.to(y), **places_of(sae)):
        yield


def places_of(sae: SAE) -> dict[str, Any]:
    """The tokens that `spliced` leaves as they are, because the SAE is not trained on them."""
    known = sae.metadata.get("data") or {}
    excluded = typed(known.get("exclude_tokens", ""), str, "data.exclude_tokens")
    return {"massive": rule_of(sae.metadata), "first": first_of(sae), "excluded": excluded}


def first_of(sae: SAE) -> int:
    """Positions at the start of a text that the SAE was not trained on."""
    known = sae.metadata.get("data") or {}
    return max(1, len(known.get("context_begin") or ()))


@torch.no_grad()
def edited(sae: SAE, x: Tensor, edits: Sequence[Edit]) -> Tensor:
    """Activations x [..., t, d] with the edits applied: for hooks of other libraries.

        hook = lambda x, hook: edited(sae, x, [steer(17, 5.0)])       # TransformerLens
        model.run_with_hooks(tokens, fwd_hooks=[("blocks.6.hook_resid_post", hook)])
        block.output[:] = edited(sae, block.output, [steer(17, 5.0)])   # nnsight

    The SAE's error is kept. The first positions are not changed, unless x is of one position alone,
    as in generation with a cache; nor are massive tokens. Token ids are not known here: other
    special tokens are changed.
    Raises InputError for a latent outside [0, F), a width that does not fit, and a transcoder.
    """
    check_edits(sae, edits)
    if sae.config.d_target:
        raise InputError("edited: a transcoder changes its target: use `intervene`")
    codes = sae.encode(as_values(x, "x").to(sae.W_dec))
    width = codes.values.shape[-1]
    flat = SparseCodes(*(part.reshape(-1, width) for part in codes))
    changed = change(sae, flat, edits).view(x.shape).to(x)
    if x.shape[-2] > 1:
        changed[..., : first_of(sae), :] = 0
    if (massive := rule_of(sae.metadata)) is not None:
        changed[massive(x.flatten(0, -2)).view(x.shape[:-1])] = 0
    return x + changed
