"""What a sweep of eight SAEs costs, against its parts: `python -m benchmarks.sweep --json FILE`.

On the embedded language model: (1) the stream alone, which is the model reading text, (2) each SAE
alone on the batches of (1), (3) all eight in one sweep, from text to weights. The sweep is to take
less than 1.5 times (1) plus the steps of (2), and to give the same bytes as (2).
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.flags import output_file
from benchmarks.measure import describe
from kronsae import DataConfig, SAEConfig, TrainConfig
from kronsae.data import LanguageModelActivations
from kronsae.sources import open_activations
from kronsae.training.fit import fit, fit_many
from kronsae.training.session import FitResult

ALLOWED = 1.5
"""Times of the language model that a sweep may take beside its members' steps."""


def members(dict_size: int, k: int) -> dict[str, SAEConfig]:
    """Eight SAEs of one dictionary size: both encoders, four splits of the heads, three k."""
    splits = [(1, 4), (2, 4), (4, 4), (4, 8)]
    found = {f"m{m}-n{n}": SAEConfig(m=m, n=n, dict_size=dict_size, k=k) for m, n in splits}
    found |= {
        f"k{other}": SAEConfig(m=4, n=4, dict_size=dict_size, k=other) for other in (k // 2, 2 * k)
    }
    found["mul"] = SAEConfig(m=4, n=4, dict_size=dict_size, k=k, composition="mul")
    found["dense"] = SAEConfig(encoder="dense", dict_size=dict_size, k=k)
    return found


def open_stream(config: TrainConfig) -> LanguageModelActivations:
    buffer = min(65_536, config.tokens)  # it is filled before the first batch
    data = DataConfig(layer=2, buffer_tokens=buffer, heldout_tokens=4096)
    return open_activations(data, batch_size=config.batch_size, seed=0, device="cpu")


def read(source: LanguageModelActivations, tokens: int) -> Iterator[Tensor]:
    """Batches until there are `tokens`."""
    for x in source:
        yield x
        tokens -= len(x)
        if tokens <= 0:
            return


def weights(result: FitResult, folder: Path) -> bytes:
    """The bytes of sae.safetensors."""
    return (result.sae.save(folder) / "sae.safetensors").read_bytes()


class Clock:
    """Seconds on the wall, and of this process's processors, which others cannot lengthen."""

    def __init__(self) -> None:
        self.began = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        wall, cpu = self.began
        return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def measure(saes: dict[str, SAEConfig], config: TrainConfig) -> dict[str, Any]:
    """Seconds of the stream alone, of each SAE alone on its batches, and of the sweep.

    Raises AssertionError if a member of the sweep is not, byte for byte, what it is alone.
    """
    source = open_stream(config)
    clock = Clock()
    batches = list(read(source, config.tokens))
    stream = clock.read()
    source = open_stream(config)
    clock = Clock()
    together = fit_many(list(saes.values()), source, config, names=list(saes))
    sweep = clock.read()
    alone = {}
    with tempfile.TemporaryDirectory() as folder:
        for (name, sae), swept in zip(saes.items(), together, strict=True):
            clock = Clock()
            result = fit(sae, batches, config)
            alone[name] = clock.read()
            same = weights(result, Path(folder) / "alone") == weights(swept, Path(folder) / "swept")
            assert same, f"{name}: the sweep's weights are not those of the SAE alone"
            print(f"{name:8} {alone[name]['cpu']:7.2f} s alone, the same bytes", flush=True)
    steps = {clock: sum(each[clock] for each in alone.values()) for clock in stream}
    return {
        "tokens": config.tokens,
        "batch_size": config.batch_size,
        "language_model_seconds": stream,
        "alone_seconds": alone,
        "sweep_seconds": sweep,
        "allowed_seconds": {clock: ALLOWED * stream[clock] + steps[clock] for clock in stream},
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("benchmarks.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--dict-size", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the figures here")
    options = parser.parse_args(arguments)
    config = TrainConfig(tokens=options.tokens, batch_size=options.batch_size, device="cpu")
    result = measure(members(options.dict_size, options.k), config)
    result["where"] = describe(torch.device("cpu"))
    for clock in ("wall", "cpu"):
        print(line(result, clock))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


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
