"""Comparison of an SAE with its export, as loaded by another library, on the same tokens.

Letters: t tokens, d width.
"""

import dataclasses
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kronsae.config import DataConfig, from_dict, stored, untrusted
from kronsae.errors import InputError
from kronsae.metrics.figures import ReconstructionMetrics
from kronsae.metrics.heldout import Heldout, evaluate
from kronsae.metrics.target_model import as_evaluated
from kronsae.model.massive import rule_of
from kronsae.model.sae import SAE
from kronsae.registry import FORMATS
from kronsae.system.documents import part_of

BATCH_TOKENS = 1024
"""Tokens at a time; other libraries make dense latents [t, F]."""
EXPLAINED_VARIANCE_TOLERANCE = 1e-4
L0_TOLERANCE = 1e-3
"""Relative tolerance: rounding can move a latent over a threshold."""


class Figures(NamedTuple):
    """Metrics of an SAE as one library computes it."""

    library: str
    explained_variance: float
    l0: float


class Verification(NamedTuple):
    """Metrics of an SAE before and after its export to another library."""

    before: Figures
    after: Figures
    tokens: int
    largest_difference: float
    """Largest difference of a reconstruction's coordinate, in standard deviations of the target."""

    @property
    def agrees(self) -> bool:
        before, after = self.before, self.after
        moved = abs(after.explained_variance - before.explained_variance)
        return moved <= EXPLAINED_VARIANCE_TOLERANCE and (
            abs(after.l0 - before.l0) <= L0_TOLERANCE * before.l0
        )


def check_installed(library: str) -> None:
    """Raise InputError if the library that `verify` would load an export in is not installed."""
    package = FORMATS[library].package
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError as error:
        raise _needed(package, "it is not installed") from error


def _needed(package: str, reason: object) -> InputError:
    return InputError(
        f"--verify needs {package} ({reason}): pip install {package}, or leave out --verify"
    )


@torch.no_grad()
def verify(
    sae: SAE, folder: Path, library: str, x: Tensor, target: Tensor | None = None
) -> Verification:
    """Load `folder` in `library` (a name in `kronsae.registry.FORMATS`) and compare with `sae`.

    x: [t, d] activations.  target: [t, d_out] of a transcoder.
    Raises InputError if the library cannot be imported.
    """
    metrics = evaluate(sae, Heldout(x, targets=target))
    before = Figures("kronsae", metrics["explained_variance"], metrics["l0"])
    form = FORMATS[library]
    name = form.package
    try:
        theirs = form.reader(folder, sae)
    except ImportError as error:
        raise _needed(name, error) from error
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
    """Held-out activations of the SAE's run, targets, and a description.

    About `tokens` at most, from the first held-out contexts. None if the SAE is not of a run with a
    language model. Raises InputError if model or text cannot be loaded.
    """
    from kronsae.data import split_target
    from kronsae.sources import open_activations

    saved = part_of(sae.metadata, "config", "data")
    if not saved:
        return None
    saved = as_evaluated(stored(DataConfig, untrusted(saved)), part_of(sae.metadata, "data"))
    config = from_dict(DataConfig, saved, "the SAE's metadata").live()
    config = dataclasses.replace(
        config,
        heldout_tokens=min(tokens, config.heldout_tokens),
        trust_remote_code=trust_remote_code,
    )
    source = open_activations(config, batch_size=1024, seed=0, device=device)
    d_target = getattr(source, "d_target", 0)
    x, target = split_target(source.heldout_activations()[:tokens].cpu(), d_target)
    of = f"held-out tokens of {config.dataset} in {config.model}"
    rule = rule_of(sae.metadata)
    if rule is not None and (massive := rule(x, target)).any():
        x, target = x[~massive], None if target is None else target[~massive]
        of += ", without massive ones"
    return x, target, of


def random_tokens(sae: SAE, tokens: int) -> tuple[Tensor, Tensor | None, str]:
    """Random normal vectors around the decoder's bias, to compare two libraries."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, sae.d_model, generator=generator)
    if sae.config.d_target:
        return x, torch.randn(tokens, sae.config.d_out, generator=generator), "random vectors"
    return x + sae.b_dec.detach().cpu(), None, "random vectors"
