"""The same tokens through an SAE of ours and through what another library makes of its export.

Letters: t tokens, d width.
"""

import dataclasses
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kronsae.config import DataConfig, from_dict, untrusted
from kronsae.errors import InputError
from kronsae.interop.stock import part_of
from kronsae.metrics.figures import ReconstructionMetrics
from kronsae.metrics.heldout import Heldout, evaluate
from kronsae.model.sae import SAE
from kronsae.registry import FORMATS

BATCH_TOKENS = 1024
"""Other libraries make dense latents [t, F]."""
EXPLAINED_VARIANCE_TOLERANCE = 1e-4
L0_TOLERANCE = 1e-3
"""Relative. Another order of additions moves a latent over a threshold, now and then."""


class Figures(NamedTuple):
    """How good an SAE is, as one library computes it."""

    library: str
    explained_variance: float
    l0: float


class Verification(NamedTuple):
    """An SAE before and after it went to another library."""

    before: Figures
    after: Figures
    tokens: int
    largest_difference: float
    """Of a coordinate of the reconstruction, in standard deviations of the target."""

    @property
    def agrees(self) -> bool:
        before, after = self.before, self.after
        moved = abs(after.explained_variance - before.explained_variance)
        return moved <= EXPLAINED_VARIANCE_TOLERANCE and (
            abs(after.l0 - before.l0) <= L0_TOLERANCE * before.l0
        )


@torch.no_grad()
def verify(
    sae: SAE, folder: Path, library: str, x: Tensor, target: Tensor | None = None
) -> Verification:
    """Load `folder` in `library` (a name in `kronsae.registry.FORMATS`) and compare it with `sae`.

    x: [t, d] activations.  target: [t, d_out] of a transcoder.
    Raises InputError if the library is not installed.
    """
    metrics = evaluate(sae, Heldout(x, targets=target))
    before = Figures("kronsae", metrics["explained_variance"], metrics["l0"])
    form = FORMATS[library]
    name = form.package
    try:
        theirs = form.reader(folder, sae)
    except ImportError as error:
        raise InputError(
            f"verifying needs {name} ({error}): pip install {name}, or leave out --verify"
        ) from error
    judged = ReconstructionMetrics(sae.config.d_out)
    target = x if target is None else target
    spread = target.double().std().item()
    active, largest = 0.0, 0.0
    for rows, wanted in zip(x.split(BATCH_TOKENS), target.split(BATCH_TOKENS), strict=True):
        count, x_hat = theirs(rows)
        judged.update(wanted, x_hat)
        active += count.double().sum().item()
        largest = max(largest, (x_hat - sae(rows).x_hat).abs().max().item())
    after = Figures(
        f"{name} {metadata.version(name)}",
        judged.compute()["explained_variance"],
        active / len(x),
    )
    return Verification(before, after, len(x), largest / spread)


def heldout_tokens(
    sae: SAE, tokens: int, device: str = "cpu", trust_remote_code: bool = False
) -> tuple[Tensor, Tensor | None, str] | None:
    """Held-out activations of the run that the SAE is of, targets, and what they are.

    At most about `tokens` of them, from the first held-out contexts. None if it is of no run with a
    language model. Raises InputError if model or text cannot be had.
    """
    from kronsae.data import split_target
    from kronsae.sources import open_activations

    stored = part_of(sae.metadata, "config", "data")
    if not stored:
        return None
    config = from_dict(DataConfig, untrusted(stored), "the SAE's metadata").live()
    config = dataclasses.replace(
        config,
        heldout_tokens=min(tokens, config.heldout_tokens),
        trust_remote_code=trust_remote_code,
    )
    source = open_activations(config, batch_size=1024, seed=0, device=device)
    x, target = split_target(source.heldout_activations().cpu(), source.d_target)
    return x, target, f"held-out tokens of {config.dataset} in {config.model}"


def random_tokens(sae: SAE, tokens: int) -> tuple[Tensor, Tensor | None, str]:
    """Normal vectors around the decoder's bias: they show whether two libraries agree, no more."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, sae.d_model, generator=generator)
    if sae.config.d_target:
        return x, torch.randn(tokens, sae.config.d_out, generator=generator), "random vectors"
    return x + sae.b_dec.detach().cpu(), None, "random vectors"
