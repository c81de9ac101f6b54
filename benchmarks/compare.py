"""Training steps side by side, in one run: `python -m benchmarks.compare --shape S1 S2`.

All steps, and the bare matrix product of each encoder, take turns. A ratio is the median of the
rounds' ratios, and its range their quartiles, so a load that comes and goes does not favour one.
"""

import argparse
import json
from pathlib import Path

import torch

from benchmarks.measure import Timing, compare_steps, describe, quartiles
from benchmarks.shapes import SHAPES, Shape, activations
from benchmarks.steps import ENCODERS

RATIOS = (
    ("listing", "kron"),
    ("topk", "kron"),
    ("topk", "dense"),
    ("kron", "kron product"),
    ("dense", "dense product"),
)
"""(a, b): time of a over time of b."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("benchmarks.compare", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", default=["S1", "S2"], choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times here")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    where = describe(device)
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    report = []
    for name in options.shape:
        shape = SHAPES[name]
        timings = compare_steps(shape, activations(shape, device), options.rounds)
        print(f"\n{shape}\n{table(shape, timings)}", flush=True)
        report.append(record(shape, timings))
    if options.json:
        options.json.write_text(json.dumps({"where": where, "shapes": report}, indent=1) + "\n")


def ratio(timings: dict[str, Timing], a: str, b: str) -> tuple[float, float, float]:
    """Median, lower and upper quartile of the rounds' ratios a / b."""
    pairs = zip(timings[a].times_ms, timings[b].times_ms, strict=True)
    ratios = Timing([of_a / of_b for of_a, of_b in pairs])
    return ratios.median_ms, *quartiles(ratios.times_ms)


def table(shape: Shape, timings: dict[str, Timing]) -> str:
    lines = [f"{'':24}{'ms':>9}{'quartiles':>20}{'tokens/s':>11}"]
    for name, timing in timings.items():
        low, high = timing.quartiles_ms
        rate = shape.tokens / timing.median_ms * 1e3
        lines.append(
            f"{name:24}{timing.median_ms:9.1f}{f'{low:.1f} .. {high:.1f}':>20}{rate:11,.0f}"
        )
    for a, b in RATIOS:
        middle, low, high = ratio(timings, a, b)
        lines.append(f"{f'{a} / {b}':24}{middle:9.2f}{f'{low:.2f} .. {high:.2f}':>20}")
    return "\n".join(lines)


def record(shape: Shape, timings: dict[str, Timing]) -> dict[str, object]:
    """The same as `table`, for machines."""
    return {
        "shape": shape._asdict(),
        "times_ms": {name: timing.times_ms for name, timing in timings.items()},
        "median_ms": {name: timing.median_ms for name, timing in timings.items()},
        "ratios": {f"{a} / {b}": ratio(timings, a, b)[0] for a, b in RATIOS},
        "flops_per_token": {name: shape.flops_per_token(ENCODERS[name]) for name in ENCODERS},
        "step_bytes": {name: shape.step_bytes(ENCODERS[name]) for name in ENCODERS},
    }


if __name__ == "__main__":
    main()
