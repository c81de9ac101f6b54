"""KronSAE against a dense TopK SAE of the same F and k on the embedded model's activations.

    python -m benchmarks.quality                     # a table as in benchmarks/results/
    python -m benchmarks.quality --tokens 40000      # a quick look

Each learns at equal tokens, and KronSAE also at equal FLOPs [KronSAE, eq. 7]: its encoder is
cheaper, so it sees more tokens. Each at several learning rates, because in short runs the learning
rate matters more than the architecture; the best of each is what is compared. Explained variance is
measured on held-out files that neither the language model nor the SAE was trained on.
"""

import argparse
import itertools
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kronsae import DataConfig, SAEConfig, TrainConfig
from kronsae.metrics.heldout import Heldout
from kronsae.model.flops import equal_budget, flops_per_token
from kronsae.sources import open_activations
from kronsae.training.fit import fit

RESULTS = Path(__file__).parent / "results"
LEARNING_RATES = (8e-4, 2e-3, 4e-3, 8e-3)


def harvest(tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Activations [tokens, d] of the embedded model, shuffled, and held-out ones [t, d]."""
    config = DataConfig(layer=2, buffer_tokens=65_536, heldout_tokens=32_768)
    source = open_activations(config, batch_size=4096, seed=seed, device="cpu")
    x, filled = torch.empty(tokens, source.d_model), 0
    for batch in source:
        taken = min(batch.shape[0], tokens - filled)
        x[filled : filled + taken] = batch[:taken]
        filled += taken
        if filled == tokens:
            return x, source.heldout_activations()
    raise SystemExit(f"the standard library has {filled:,} tokens to train on, not {tokens:,}")


def measure(sae: SAEConfig, x: Tensor, heldout: Tensor, **settings: Any) -> dict[str, Any]:
    """Train on all of x once; the settings and the figures of the result."""
    config = TrainConfig(tokens=x.shape[0], eval_every=0, **settings)
    began = time.perf_counter()
    metrics = fit(sae, x, config, heldout=Heldout(heldout)).metrics
    return {
        "tokens": x.shape[0],
        "lr": config.lr,
        "seed": config.seed,
        "explained_variance": metrics["explained_variance"],
        "dead_share": metrics["dead_share"],
        "seconds": time.perf_counter() - began,
    }


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """All runs: {"settings": …, "runs": [{"what", "lr", "explained_variance", …}]}."""
    size = {"d_model": 256, "dict_size": arguments.dict_size, "k": arguments.k}
    kron = SAEConfig(m=arguments.m, n=arguments.n, **size)
    dense = SAEConfig(encoder="dense", **size)
    tokens = arguments.tokens
    more = equal_budget(tokens, flops_per_token(dense), flops_per_token(kron))
    x, heldout = harvest(max(tokens, more), seed=0)
    plan = [
        ("TopK", dense, tokens),
        ("KronSAE, equal tokens", kron, tokens),
        ("KronSAE, equal FLOPs", kron, more),
    ]
    runs = []
    for (what, sae, count), lr, seed in itertools.product(
        plan, arguments.learning_rates, range(arguments.seeds)
    ):
        settings = {"batch_size": 1024, "auxk_coefficient": arguments.auxk_coefficient}
        run = measure(sae, x[:count], heldout, lr=lr, seed=seed, **settings)
        run = {"what": what, "flops_per_token": flops_per_token(sae), **run}
        runs.append(run)
        print(
            f"{what:22} lr {lr:<7g} seed {seed}  {count:>9,} tokens  "
            f"EV {run['explained_variance']:.4f}  dead {run['dead_share']:.1%}  "
            f"{run['seconds']:.0f} s",
            flush=True,
        )
    settings = {k: v for k, v in vars(arguments).items() if k != "out"}
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return {"settings": {**settings, "dtype": "float32"}, "versions": versions, "runs": runs}


def table(result: dict[str, Any]) -> str:
    """Markdown: explained variance by learning rate (mean over seeds), best in bold."""
    rates = result["settings"]["learning_rates"]
    lines = [
        "| | tokens | G multiply-adds | " + " | ".join(f"lr {lr:g}" for lr in rates) + " |",
        "|---|---|---|" + "---|" * len(rates),
    ]
    for what, group in itertools.groupby(result["runs"], key=lambda run: run["what"]):
        runs = list(group)
        means = []
        for lr in rates:
            values = [run["explained_variance"] for run in runs if run["lr"] == lr]
            means.append(sum(values) / len(values))
        cells = [f"**{ev:.4f}**" if ev == max(means) else f"{ev:.4f}" for ev in means]
        flops = runs[0]["tokens"] * runs[0]["flops_per_token"] / 1e9
        lines.append(
            f"| {what} | {runs[0]['tokens']:,} | {flops:,.0f} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--dict-size", type=int, default=4096)
    parser.add_argument("--m", type=int, default=4)
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=LEARNING_RATES)
    parser.add_argument("--auxk-coefficient", type=float, default=1 / 32)
    parser.add_argument("--out", type=Path, help="folder for quality.json and quality.md")
    arguments = parser.parse_args(argv)
    result = compare(arguments)
    text = table(result)
    print("\n" + text)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "quality.json").write_text(json.dumps(result, indent=1) + "\n")
        (arguments.out / "quality.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
