"""SAEs that train with equal FLOPs on a model's activations: ours, plain PyTorch, other libraries.

`pytest benchmarks/ --benchmark-only` times them. The command finds the learning rates that they
train with: each of some rates once, on a seed of its own; RATES_FILE keeps what each reached.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from benchmarks import peers
from benchmarks.baselines import KronListing, TopKSAE
from benchmarks.flags import command, save
from benchmarks.measure import describe, release
from benchmarks.shapes import Shape
from benchmarks.steps import EPS, autocast, autograd_step
from kronsae.config import DataConfig, SAEConfig, TrainConfig
from kronsae.experiments.activations import collect
from kronsae.experiments.report import TUNING_SEED
from kronsae.experiments.variants import sae_config
from kronsae.metrics.figures import ReconstructionMetrics
from kronsae.model.flops import flops_per_token
from kronsae.model.normalizer import Normalizer
from kronsae.model.sae import SAE
from kronsae.sources import open_activations
from kronsae.training.fit import fit
from kronsae.training.learner import learning_rate, warmup_steps

RATES_FILE = Path(__file__).parent / "isoflop_rates.json"
LAYER = 2
"""Residual stream of the embedded model after this block."""
SEEDS = 2
"""Trainings of a row in the table."""
RATES = (0.004, 0.008, 0.016, 0.032)
BATCH_TOKENS = 4096
"""Tokens per batch of the held-out figures."""

Reconstruct = Callable[[Tensor], Tensor]


class Budget(NamedTuple):
    """FLOPs that each training spends: those of a TopK SAE on `tokens` tokens. [KronSAE, eq. 7]"""

    dict_size: int
    tokens: int
    """That TopK sees: a cheaper encoder sees more."""
    heldout: int
    k: int = 32
    batch: int = 1024
    d: int = 256
    """Width of the embedded model."""

    def of(self, tokens: int) -> "Budget":
        """The same for another number of TopK's tokens."""
        return self._replace(tokens=tokens, heldout=min(self.heldout, tokens))

    @property
    def multiply_adds(self) -> int:
        return self.tokens * flops_per_token(self.topk)

    @property
    def topk(self) -> SAEConfig:
        return SAEConfig(encoder="dense", **self._sizes)

    def variant(self, name: str) -> SAEConfig:
        """An SAE of the experiments by its name."""
        return replace(sae_config(name, self.dict_size, self.k), d_model=self.d)

    def kron(self, m: int, n: int, **more: float) -> SAEConfig:
        return SAEConfig(m=m, n=n, **self._sizes, **more)

    @property
    def _sizes(self) -> dict[str, int]:
        return {"d_model": self.d, "dict_size": self.dict_size, "k": self.k}

    def tokens_of(self, sae: SAEConfig) -> int:
        """Tokens that an SAE sees, in whole batches."""
        return self.batch * max(1, round(self.multiply_adds / flops_per_token(sae) / self.batch))

    def __str__(self) -> str:
        giga = self.multiply_adds / 1e9
        return f"{giga:.3g} G multiply-adds each, d {self.d}, F {self.dict_size:,}, k {self.k}"


def default_budget(device: torch.device) -> Budget:
    if device.type == "cuda":
        return Budget(dict_size=16_384, tokens=500_000, heldout=32_768)
    return Budget(dict_size=4096, tokens=65_536, heldout=16_384)


class Row(NamedTuple):
    """A way to train an SAE."""

    sae: Callable[[Budget], SAEConfig]
    train: Callable[[SAEConfig, Tensor, TrainConfig], Reconstruct]
    """Trains on activations [N, d] in their order: one epoch."""
    why_not: Callable[[], str | None] = lambda: None
    """Why it cannot run here, or None if it can."""


class Data(NamedTuple):
    """Activations, centred and scaled so that their mean squared norm is d."""

    x: Tensor
    heldout: Tensor


def read(budget: Budget, device: torch.device) -> Data:
    """Activations for the longest training, and others to judge by."""
    tokens = max(budget.tokens_of(row.sae(budget)) for row in ROWS.values())
    config = DataConfig(
        model="embedded",
        layer=LAYER,
        buffer_tokens=min(65_536, tokens),
        heldout_tokens=budget.heldout,
    )
    source = open_activations(config, batch_size=budget.batch, seed=0, device=device)
    heldout, x = source.heldout_activations().cpu(), collect(source, tokens)
    normalizer = Normalizer.of(x[:8192])
    return Data(normalizer(x).to(device), normalizer(heldout).to(device))


def ours(config: SAEConfig, x: Tensor, recipe: TrainConfig) -> Reconstruct:
    """kronsae's trainer: `kronsae.fit`, as `kronsae train` runs it."""
    sae = fit(config, x, recipe).sae
    assert sae is not None
    sae = sae.to(x.device)
    return lambda x: sae(x)[0]


def plain(config: SAEConfig, x: Tensor, recipe: TrainConfig) -> Reconstruct:
    """Plain PyTorch: KronSAE as in the paper's listing, or a TopK SAE, with torch's AdamW."""
    w_enc, b_enc, w_dec, b_dec = initial(config, x.device, recipe.seed)
    if config.heads:
        module = KronListing(config.d_model, config.heads, config.m, config.n, config.k)
        encoder = {"W_enc": w_enc.flatten(0, 1).T, "b_enc": b_enc.flatten()}
    else:
        module = TopKSAE(config.d_model, config.dict_size, config.k)
        encoder = {"encoder.weight": w_enc, "encoder.bias": b_enc}
    module.load_state_dict({**encoder, "W_dec": w_dec, "b_dec": b_dec})
    module.to(x.device)
    rates = (
        learning_rate(seen, recipe, config.dict_size, recipe.batch_size)
        for seen in range(0, recipe.tokens, recipe.batch_size)
    )
    step = autograd_step(lambda x: mse_loss(module(x), x), module.parameters(), x.device, rates)
    follow(step, x, recipe)
    return module


def peer(name: str, config: SAEConfig, x: Tensor, recipe: TrainConfig) -> Reconstruct:
    """Another library's trainer, at our learning rate, warm-up and number of steps."""
    batch = recipe.batch_size
    shape = Shape(name, config.d_model, config.dict_size, 1, 1, config.k, batch)
    steps = peers.Recipe(recipe.lr, recipe.tokens // batch, warmup_steps(recipe, batch))
    trainer = peers.PEERS[name].make(shape, *initial(config, x.device, recipe.seed), steps)
    follow(trainer.step, x, recipe)
    return trainer.reconstruct


def initial(config: SAEConfig, device: torch.device, seed: int) -> list[Tensor]:
    """W_enc, b_enc, W_dec, b_dec, drawn as kronsae's trainer draws them."""
    sae = SAE(config, generator=torch.Generator().manual_seed(seed)).to(device)
    return [p.detach() for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)]


def follow(step: Callable[[Tensor], Tensor], x: Tensor, recipe: TrainConfig) -> None:
    """Take a step on each batch, in the order that the seed gives."""
    order = torch.randperm(recipe.tokens, generator=torch.Generator().manual_seed(recipe.seed))
    for batch in order.to(x.device).split(recipe.batch_size):
        step(x[batch])


ROWS = {
    "KronSAE 4x4, ours": Row(lambda budget: budget.kron(4, 4), ours),
    "KronSAE 2x4, ours": Row(lambda budget: budget.kron(2, 4), ours),
    "KronSAE 4x4 refined": Row(lambda budget: budget.kron(4, 4, refine=1), ours),
    "mixed encoder, ours": Row(lambda budget: budget.variant("topk-mixed"), ours),
    "TopK, ours": Row(lambda budget: budget.topk, ours),
    "TopK, F / 2, ours": Row(lambda budget: budget.variant("topk-half"), ours),
    "KronSAE 4x4, listing": Row(lambda budget: budget.kron(4, 4, eps=EPS), plain),
    "TopK, plain PyTorch": Row(lambda budget: budget.topk, plain),
    **{
        f"TopK, {name.replace('dictionary', 'dict')}": Row(
            lambda budget: budget.topk, partial(peer, name), partial(peers.why_not, name)
        )
        for name in peers.PEERS
    },
}
"""By the name in the table."""


def train(budget: Budget, row: str, x: Tensor, seed: int, lr: float) -> Reconstruct:
    """Train an SAE of a row for the budget: linear warm-up, then a cosine."""
    sae = ROWS[row].sae(budget)
    recipe = TrainConfig(
        tokens=budget.tokens_of(sae),
        batch_size=budget.batch,
        lr=lr,
        seed=seed,
        device=str(x.device),
        eval_every=0,
    )
    return ROWS[row].train(sae, x[: recipe.tokens], recipe)


@torch.no_grad()
def explained_variance(reconstruct: Reconstruct, heldout: Tensor) -> float:
    figures = ReconstructionMetrics(heldout.shape[1])
    with autocast(heldout.device):
        for x in heldout.split(BATCH_TOKENS):
            figures.update(x, reconstruct(x))
    return figures.compute()["explained_variance"]


def rate_of(row: str) -> float:
    """The learning rate at which the row explained most."""
    tried = json.loads(RATES_FILE.read_text())["explained_variance"][row]
    return float(max(tried, key=tried.get))


def try_rates(budget: Budget, data: Data, row: str, rates: Iterable[float]) -> dict[str, float]:
    """Explained variance of a row at each rate."""
    tried = {}
    for rate in rates:
        reconstruct = train(budget, row, data.x, TUNING_SEED, rate)
        tried[f"{rate:g}"] = round(explained_variance(reconstruct, data.heldout), 4)
        release(data.x.device)
    return tried


def main(arguments: list[str] | None = None) -> None:
    parser = command("isoflop", __doc__, device="auto")
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="learning rates")
    options = parser.parse_args(arguments)
    budget = default_budget(options.device)
    data, tried = read(budget, options.device), {}
    for name, row in ROWS.items():
        if why := row.why_not():
            print(f"{name}: {why}")
            continue
        tried[name] = try_rates(budget, data, name, options.rates)
        print(name, *(f"{rate}: {found}" for rate, found in tried[name].items()), flush=True)
        found = {"where": describe(options.device), "budget": budget._asdict(), "seed": TUNING_SEED}
        save(options.json, {**found, "explained_variance": tried})


if __name__ == "__main__":
    main()
