"""What a sweep of eight SAEs costs, against its parts: `python -m benchmarks.sweep --json FILE`.

On the embedded language model: (1) the stream alone, which is the model reading text, (2) each SAE
alone on the batches of (1), (3) all eight in one sweep, from text to weights. The sweep is to take
less than 1.5 times (1) plus the steps of (2), and to give the same bytes as (2).
"""

import tempfile
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.flags import command, positive, save
from benchmarks.measure import describe, spent
from kronsae import DataConfig, SAEConfig, TrainConfig
from kronsae.data import LanguageModelActivations
from kronsae.sources import open_activations
from kronsae.training.fit import fit, fit_many
from kronsae.training.session import FitResult

ALLOWED = 1.5
"""Times of the language model that a sweep may take beside its members' steps."""


def members(dict_size: int, k: int) -> dict[str, SAEConfig]:
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


def weights(result: FitResult, folder: Path) -> bytes:
    """The bytes of sae.safetensors."""
    return (result.sae.save(folder) / "sae.safetensors").read_bytes()


def measure(saes: dict[str, SAEConfig], config: TrainConfig) -> dict[str, Any]:
    """Seconds of the stream alone, of each SAE alone on its batches, and of the sweep.

    Raises AssertionError if a member of the sweep is not, byte for byte, what it is alone.
    """
    steps = -(-config.tokens // config.batch_size)
    batches, stream = spent(lambda: list(islice(open_stream(config), steps)))
    swept, sweep = spent(
        lambda: fit_many(list(saes.values()), open_stream(config), config, names=list(saes))
    )
    alone = {}
    with tempfile.TemporaryDirectory() as folder:
        for (name, sae), member in zip(saes.items(), swept, strict=True):
            result, alone[name] = spent(lambda sae=sae: fit(sae, batches, config))
            found = weights(result, Path(folder) / "alone"), weights(member, Path(folder) / "swept")
            assert found[0] == found[1], f"{name}: the sweep's weights are not those of it alone"
            print(f"{name:8} {alone[name]['cpu']:7.2f} s alone, the same bytes", flush=True)
    allowed = {
        clock: ALLOWED * stream[clock] + sum(each[clock] for each in alone.values())
        for clock in stream
    }
    return {
        "tokens": config.tokens,
        "batch_size": config.batch_size,
        "language_model_seconds": stream,
        "alone_seconds": alone,
        "sweep_seconds": sweep,
        "allowed_seconds": allowed,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = command("sweep", __doc__)
    sizes = {"tokens": 100_000, "batch-size": 1024, "dict-size": 4096, "k": 32}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=positive, default=size)
    options = parser.parse_args(arguments)
    config = TrainConfig(tokens=options.tokens, batch_size=options.batch_size, device="cpu")
    result = measure(members(options.dict_size, options.k), config)
    result["where"] = describe(torch.device("cpu"))
    for clock in ("wall", "cpu"):
        print(line(result, clock))
    save(options.json, result)


def line(result: dict[str, Any], clock: str) -> str:
    alone = result["alone_seconds"].values()
    model, sweep, allowed = (
        result[f"{part}_seconds"][clock] for part in ("language_model", "sweep", "allowed")
    )
    return (
        f"{clock:4}  the sweep of {len(alone)}: {sweep:.2f} s, "
        f"{'less' if sweep < allowed else 'NOT less'} than {ALLOWED} x {model:.2f} s (language "
        f"model) + {sum(each[clock] for each in alone):.2f} s (steps) = {allowed:.2f} s"
    )


if __name__ == "__main__":
    main()
