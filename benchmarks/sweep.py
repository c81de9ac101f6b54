"""What a sweep of eight SAEs costs, against its parts: `python -m benchmarks.sweep --json FILE`.

On the embedded language model: (1) the stream alone, which is the model reading text, (2) each SAE
alone on the batches of (1), (3) all eight in one sweep, from text to weights. The sweep is to take
less than 1.5 times (1) plus the steps of (2). (tests/test_sweep.py shows that it gives the same
bytes as (2).)
"""

from functools import partial
from itertools import islice
from typing import Any

import torch

from benchmarks.flags import command, save
from benchmarks.measure import describe, spent
from kronsae import DataConfig, SAEConfig, TrainConfig
from kronsae.data import LanguageModelActivations
from kronsae.sources import open_activations
from kronsae.training.fit import fit, fit_many

ALLOWED = 1.5
"""Times of the language model that a sweep may take beside its members' steps."""


def members(dict_size: int = 4096, k: int = 32) -> dict[str, SAEConfig]:
    """Eight SAEs of one dictionary size: both encoders, four splits of the heads, three k."""
    kron = partial(SAEConfig, dict_size=dict_size, k=k)
    splits = [(1, 4), (2, 4), (4, 4), (4, 8)]
    return {
        **{f"m{m}-n{n}": kron(m=m, n=n) for m, n in splits},
        **{f"k{other}": kron(m=4, n=4, k=other) for other in (k // 2, 2 * k)},
        "mul": kron(m=4, n=4, composition="mul"),
        "dense": kron(encoder="dense"),
    }


def open_stream(config: TrainConfig) -> LanguageModelActivations:
    buffer = min(65_536, config.tokens)  # it is filled before the first batch
    data = DataConfig(layer=2, buffer_tokens=buffer, heldout_tokens=4096)
    return open_activations(data, batch_size=config.batch_size, seed=0, device="cpu")


def measure(saes: dict[str, SAEConfig], tokens: int, batch_size: int = 1024) -> dict[str, Any]:
    """Seconds of the stream alone, of each SAE alone on its batches, and of the sweep."""
    config = TrainConfig(tokens=tokens, batch_size=batch_size, device="cpu")
    steps = -(-tokens // batch_size)
    batches, stream = spent(lambda: list(islice(open_stream(config), steps)))
    _, sweep = spent(
        lambda: fit_many(list(saes.values()), open_stream(config), config, names=list(saes))
    )
    alone = {name: spent(partial(fit, sae, batches, config))[1] for name, sae in saes.items()}
    return {
        "tokens": tokens,
        "batch_size": batch_size,
        "language_model_seconds": stream,
        "alone_seconds": alone,
        "sweep_seconds": sweep,
        "allowed_seconds": {
            clock: ALLOWED * stream[clock] + sum(each[clock] for each in alone.values())
            for clock in stream
        },
    }


def line(result: dict[str, Any], clock: str) -> str:
    model, sweep, allowed = (
        result[f"{part}_seconds"][clock] for part in ("language_model", "sweep", "allowed")
    )
    return (
        f"{clock:4}  the sweep: {sweep:.2f} s, {'less' if sweep < allowed else 'NOT less'} than "
        f"{ALLOWED} x {model:.2f} s (language model) + {allowed - ALLOWED * model:.2f} s (steps) "
        f"= {allowed:.2f} s"
    )


def main() -> None:
    options = command("sweep", __doc__).parse_args()
    result = measure(members(), tokens=100_000)
    for clock in ("wall", "cpu"):
        print(line(result, clock))
    save(options.json, {"where": describe(torch.device("cpu")), **result})


if __name__ == "__main__":
    main()
