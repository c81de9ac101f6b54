"""A toy model with known correlations: whose decoder shows them? [KronSAE, section 5.1, App. B]

256 features with a block-structured covariance S = L Lᵀ give data x̄ = L TopK(ReLU(x)), x ~ N(0, I).
An autoencoder x̂ = ReLU(Wᵀ W x̄ + b) squeezes them into 64 hidden units, and SAEs with 256 latents
learn from those. The correlations that an SAE has learned are C = W_dec W_decᵀ, its latents being
put in the order of the features by the best match of C with the autoencoder's Wᵀ W (the quadratic
assignment problem, by FAQ); C is then compared with S.

The paper does not say, and we chose: the covariances (`SETUPS`), how many features are active (32,
with which the autoencoder's own RV coefficient is near the paper's; that figure does not depend on
any SAE), L (Cholesky), the lengths and rates of the trainings, and the definitions of
`effective_rank`, `mean_correlation` and rank difference. A KronSAE's decoder starts from sums of
encoder rows, so latents of a head are alike before anything is learned. Two controls show how much
of the result that is: the same figures *before* training, and after a training that started from an
*untied* decoder of independent random rows. RV with latents matched to S itself is a third view.
"""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kronsae.config import SAEConfig, TrainConfig, setting
from kronsae.data import TensorActivations
from kronsae.errors import require
from kronsae.experiments.experiment import EXPERIMENTS, Experiment, Run, axis
from kronsae.experiments.report import Spread, markdown, picture
from kronsae.experiments.training import fit_whole, product
from kronsae.experiments.variants import sae_config
from kronsae.metrics.heldout import Heldout
from kronsae.model.normalizer import Normalizer
from kronsae.model.sae import SAE
from kronsae.system.devices import resolve_device
from kronsae.training.learner import Learner
from kronsae.training.stream import SAMPLE_TOKENS

FEATURES, HIDDEN, LATENTS, K = 256, 64, 256, 8
VARIANTS = ("topk", "h2m4n32", "h4m2n32", "h4m8n8", "h8m2n16")
PAPER_RV = {
    "autoencoder": "0.59 ± 0.17",
    "topk": "0.12 ± 0.02",
    "h2m4n32": "0.22 ± 0.07",
    "h4m2n32": "0.30 ± 0.12",
    "h4m8n8": "0.23 ± 0.08",
    "h8m2n16": "0.17 ± 0.04",
}


class Setup(NamedTuple):
    """A covariance of features that come in groups."""

    sizes: tuple[int, ...]
    """Sizes of the groups, taken in turn until all features are in one."""
    between: float
    """Correlation of a group's factor with that of its partner: the blocks off the diagonal."""
    within: float = 0.8
    """Correlation of two features of a group: the blocks on the diagonal."""


SETUPS = tuple(
    Setup(sizes, between)
    for sizes in ((2, 4, 6, 8), (4, 8, 12, 16), (8, 16, 24, 32), (2, 4, 8, 16, 32, 64))
    for between in (0.3, 0.7)
)


COLUMNS = {
    "RV": ("rv", 2),
    "RV, before training": ("before_training.rv", 2),
    "RV, untied start": ("untied.rv", 2),
    "RV matched to S": ("rv_direct", 2),
    "so, before training": ("before_training.rv_direct", 2),
    "so, untied start": ("untied.rv_direct", 2),
    "effective rank": ("effective_rank", 0),
    "mean correlation": ("mean_correlation", 3),
    "rank difference": ("rank_difference", 0),
    "explained variance": ("explained_variance", 3),
}
"""Heading: name of a figure, digits."""


@EXPERIMENTS.register("toy")
@dataclasses.dataclass(frozen=True)
class Toy(Experiment):
    """The default is of the paper's size."""

    figure = "Fig. 5, Table 7"
    statement = "Kron decoders match the correlations of a toy model's features better than TopK's."
    smallest = {"setups": 1, "seeds": 2, "autoencoder_steps": 20, "tokens": 2560}

    setups: int = axis(len(SETUPS), "covariance set-ups, of the 8")
    seeds: int = axis(2, "seeds of each set-up")
    active: int = setting(32, "features active in a sample")
    autoencoder_steps: int = setting(500, "optimizer steps of the autoencoder")
    autoencoder_lr: float = setting(5e-3, "its peak learning rate (Adam, cosine)")
    tokens: int = setting(102_400, "hidden states that an SAE is trained on")
    batch_size: int = setting(256, "hidden states an optimizer step")
    lr: float = setting(1.6e-2, "peak learning rate of the SAEs")

    def cells(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        return product(setup=range(len(SETUPS))[: self.setups], seed=range(self.seeds))

    def prepare(self) -> None:
        require("scipy", "this experiment")

    def run(self, shared: None, cell: dict[str, Any]) -> dict[str, Any]:
        """An autoencoder, and an SAE of each variant on its hidden states; all figures of each."""
        generator = torch.Generator().manual_seed(1_000 * cell["setup"] + cell["seed"])
        truth = covariance(SETUPS[cell["setup"]], seed=cell["setup"])
        root = torch.linalg.cholesky(truth).float()
        w, fvu = self.train_autoencoder(root, generator, resolve_device(self.device))
        own = (w.T @ w).double()
        hidden = samples(root, self.tokens, self.active, generator) @ w.T
        heldout = samples(root, 4096, self.active, generator) @ w.T
        figures: dict[str, Any] = {
            "truth": shape_figures(truth, truth),
            "autoencoder": {"rv": rv_coefficient(truth, own), "fvu": fvu}
            | shape_figures(own, truth),
        }
        config = TrainConfig(
            tokens=self.tokens,
            batch_size=self.batch_size,
            lr=self.lr,
            seed=cell["seed"],
            device=self.device,
            eval_every=0,
        )
        for variant in VARIANTS:
            sae = dataclasses.replace(sae_config(variant, LATENTS, K), d_model=HIDDEN)
            result = fit_whole(sae, hidden, config, Heldout(heldout))
            assert result.sae is not None
            before = initial(sae, cell["seed"])
            figures[variant] = {
                "explained_variance": result.metrics["explained_variance"],
                "dead_share": result.metrics["dead_share"],
                **decoder_figures(result.sae.W_dec, own, truth),
                "before_training": decoder_figures(before.W_dec, own, truth),
            }
            if sae.encoder == "kron":
                untied = train_untied(sae, hidden, config)
                figures[variant]["untied"] = decoder_figures(untied.W_dec, own, truth)
        return figures

    def train_autoencoder(
        self, root: Tensor, generator: torch.Generator, device: torch.device
    ) -> tuple[Tensor, float]:
        """W [64, 256] of x̂ = ReLU(Wᵀ W x̄ + b), and its share of variance unexplained on new x̄."""
        w = torch.randn(HIDDEN, FEATURES, generator=generator) / FEATURES**0.5
        w = w.to(device).requires_grad_()
        b = torch.zeros(FEATURES, device=device, requires_grad=True)
        optimizer = torch.optim.Adam([w, b], lr=self.autoencoder_lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.autoencoder_steps)

        def errors(x: Tensor) -> Tensor:
            return ((x @ w.T @ w + b).relu() - x).square()

        for _ in range(self.autoencoder_steps):
            x = samples(root, 256, self.active, generator).to(device)
            optimizer.zero_grad()
            errors(x).mean().backward()
            optimizer.step()
            schedule.step()
        x = samples(root, 4096, self.active, generator).to(device)
        with torch.no_grad():
            fvu = errors(x).sum() / (x - x.mean(0)).square().sum()
        return w.detach().cpu(), fvu.item()

    def conclude(self, runs: Sequence[Run]) -> tuple[str, str]:
        rows = []
        for name in ("truth", "autoencoder", *VARIANTS):
            figures = [(by_setup(runs, name, key), digits) for key, digits in COLUMNS.values()]
            cells = [Spread.of(of.values()).to(digits) if of else "" for of, digits in figures]
            rows.append([name, PAPER_RV.get(name, ""), *cells])
        rv = {
            name: Spread.of(by_setup(runs, name, "rv").values())
            for name in ("autoencoder", *VARIANTS)
        }
        topk, krons = rv["topk"], VARIANTS[1:]
        on_average = [name for name in krons if rv[name].mean > topk.mean]
        line = (
            f"RV of the autoencoder {rv['autoencoder'].to(2)} (paper: {PAPER_RV['autoencoder']}), "
            f"of TopK {topk.to(2)} (paper: {PAPER_RV['topk']}), of the KronSAEs "
            f"{', '.join(rv[name].to(2) for name in krons)} (paper: "
            f"{', '.join(PAPER_RV[name] for name in krons)}). On average above TopK: "
            f"{', '.join(on_average) or 'none'} (paper: all four). Above it in "
            f"{above(runs, 'rv', 'rv')} of {len({run['setup'] for run in runs})} set-ups; from an "
            f"untied start in {above(runs, 'untied.rv', 'rv')}; before any training in "
            f"{above(runs, 'before_training.rv', 'before_training.rv')}; with latents matched to S "
            f"itself in {above(runs, 'rv_direct', 'rv_direct')} (the paper does not say)."
        )
        return markdown(["", "RV, paper", *COLUMNS], rows), line

    def draw(self, runs: Sequence[Run], path: Path) -> None:
        """RV over the set-ups, with the controls, beside the paper's."""
        names = ["autoencoder", *VARIANTS]
        series = {
            label: {n: Spread.of(of.values()) for n in names if (of := by_setup(runs, n, key))}
            for label, key in (
                ("trained", "rv"),
                ("trained from an untied decoder", "untied.rv"),
                ("before training", "before_training.rv"),
            )
        }
        series["paper"] = {
            name: Spread(*map(float, text.split(" ± "))) for name, text in PAPER_RV.items()
        }
        with picture(path, size=(9.5, 3.8)) as (axes,):
            for shift, (label, spreads) in enumerate(series.items()):
                places = [names.index(name) + 0.2 * shift - 0.3 for name in spreads]
                means, deviations = zip(*spreads.values(), strict=True)
                axes.errorbar(places, means, deviations, fmt="o", capsize=3, label=label)
            axes.set_xticks(range(len(names)), names)
            axes.set_ylabel("RV coefficient with S")
            axes.set_ylim(0, None)


def by_setup(runs: Sequence[Run], name: str, key: str) -> dict[int, float]:
    """A figure of each set-up, the mean of its seeds; empty where there is none.

    key: of the figure in a run, with a dot between levels ("untied.rv").
    """
    figures: dict[int, list[float]] = {}
    for run in runs:
        value = run[name]
        for part in key.split("."):
            value = value.get(part, {})
        if value != {}:
            figures.setdefault(run["setup"], []).append(value)
    return {setup: statistics.fmean(values) for setup, values in figures.items()}


def above(runs: Sequence[Run], key: str, baseline: str) -> str:
    """Number of set-ups in which the figure of each KronSAE is above TopK's."""
    topk = by_setup(runs, "topk", baseline)
    counts = [
        sum(value > topk[setup] for setup, value in by_setup(runs, name, key).items())
        for name in VARIANTS[1:]
    ]
    return ", ".join(map(str, counts))


# Training


def initial(config: SAEConfig, seed: int) -> SAE:
    """The SAE that a training with this seed starts from."""
    return SAE(config, generator=torch.Generator().manual_seed(seed))


def train_untied(config: SAEConfig, x: Tensor, train_config: TrainConfig) -> SAE:
    """Trained as `fit` does, but from decoder rows that know nothing of the encoder's."""
    learner = Learner(config, train_config, resolve_device(train_config.device))
    sae = learner.sae
    generator = torch.Generator().manual_seed(train_config.seed)
    with torch.no_grad():
        sae.W_dec.copy_(torch.randn(sae.W_dec.shape, generator=generator))
    sae.normalize_decoder()
    normalizer = Normalizer.of(x[:SAMPLE_TOKENS])
    for batch in TensorActivations(x, train_config.batch_size, train_config.seed, epochs=1):
        learner.step(normalizer(batch).to(learner.device))
    return sae


# The data


def covariance(setup: Setup, seed: int) -> Tensor:
    """S [256, 256] float64, of unit diagonal, positive definite.

    Two features of a group correlate by `within`. Groups stand in a random order, and are paired at
    random: features of partners correlate by within * between, which makes a rectangular block off
    the diagonal.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes: list[int] = []
    for size in itertools.cycle(setup.sizes):
        sizes.append(min(size, FEATURES - sum(sizes)))
        if sum(sizes) == FEATURES:
            break
    order = torch.randperm(len(sizes), generator=generator)
    group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)[order])
    partners = torch.randperm(len(sizes), generator=generator).tolist()
    factors = torch.eye(len(sizes), dtype=torch.float64)
    for a, b in zip(partners[::2], partners[1::2], strict=False):
        factors[a, b] = factors[b, a] = setup.between
    s = setup.within * factors[group][:, group]
    return s.fill_diagonal_(1.0)


def samples(root: Tensor, count: int, active: int, generator: torch.Generator) -> Tensor:
    """x̄ = L TopK(ReLU(x)) with x ~ N(0, I): [count, 256] float32."""
    x = torch.randn(count, len(root), generator=generator).relu()
    values, indices = x.topk(active)
    return torch.zeros_like(x).scatter_(1, indices, values) @ root.T


# Figures of correlation matrices, all [n, n] float64


def rv_coefficient(s: Tensor, c: Tensor) -> float:
    """tr(S C) / sqrt(tr(S²) tr(C²)) of symmetric matrices: 1 if one is a multiple of the other."""
    return ((s * c).sum() / (s.square().sum() * c.square().sum()).sqrt()).item()


def match(target: Tensor, c: Tensor) -> Tensor:
    """C with rows and columns permuted alike, so that tr(target C) is large.

    The quadratic assignment problem, by FAQ (Vogelstein et al. 2015) from its usual start, the flat
    doubly stochastic matrix: a local optimum, the same each time.
    """
    from scipy.optimize import quadratic_assignment

    options = {"maximize": True}
    result = quadratic_assignment(target.numpy(), c.numpy(), method="faq", options=options)
    order = torch.from_numpy(result.col_ind)
    return c[order][:, order]


def effective_rank(c: Tensor) -> float:
    """exp of the entropy of the eigenvalues' shares, of a positive semi-definite C.

    (Roy and Vetterli 2007.) Between 1 and n: how many directions C spreads over.
    """
    eigenvalues = torch.linalg.eigvalsh(c).clamp(min=0)
    shares = eigenvalues / eigenvalues.sum()
    return math.exp(torch.special.entr(shares).sum().item())


def mean_correlation(c: Tensor) -> float:
    """Mean absolute entry off the diagonal, with C scaled to a unit diagonal (0 where it is 0)."""
    scale = c.diagonal().clamp(min=torch.finfo(c.dtype).tiny).rsqrt()
    scaled = (c * scale * scale[:, None]).abs()
    n = len(c)
    return ((scaled.sum() - scaled.diagonal().sum()) / (n * (n - 1))).item()


def shape_figures(c: Tensor, truth: Tensor) -> dict[str, float]:
    """Figures that no permutation changes; rank_difference is |effective rank - that of S|."""
    rank = effective_rank(c)
    return {
        "effective_rank": rank,
        "mean_correlation": mean_correlation(c),
        "rank_difference": abs(rank - effective_rank(truth)),
    }


def decoder_figures(w_dec: Tensor, own: Tensor, truth: Tensor) -> dict[str, float]:
    """Figures of C = W_dec W_decᵀ, from W_dec [256, 64].

    rv: latents matched to the autoencoder's `own` = Wᵀ W.  rv_direct: matched to S itself.
    """
    w_dec = w_dec.detach().cpu().double()
    c = w_dec @ w_dec.T
    return {
        "rv": rv_coefficient(truth, match(own, c)),
        "rv_direct": rv_coefficient(truth, match(truth, c)),
        **shape_figures(c, truth),
    }
