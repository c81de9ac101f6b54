"""Training steps side by side, in one run: `python -m benchmarks.compare --shape S1 S2`.

All contenders that can run here, other libraries among them, and the bare matrix product of each
encoder. On a CPU all take turns; a ratio is the median of the rounds' ratios, and its range their
quartiles, so a load that comes and goes does not favour one.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from benchmarks import floors
from benchmarks.floors import Ceilings, measure_ceilings
from benchmarks.measure import Comparison, Timing, compare_steps, describe, quartiles
from benchmarks.shapes import SHAPES, Shape, batches
from benchmarks.steps import CONTENDERS, best_of_ours


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("benchmarks.compare", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", default=["S1", "S2"], choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no more then")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times here")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    end = time.monotonic() + options.seconds
    where = describe(device)
    ceilings = measure_ceilings(device)
    print(", ".join(f"{key} {value}" for key, value in where.items() if value is not None))
    print(rates(ceilings))
    report = []
    for name in options.shape:
        left = end - time.monotonic()
        if left < 0:
            print(f"\n{name}: no time left")
            continue
        shape = SHAPES[name]
        found = compare_steps(shape, batches(shape, device), options.rounds, seconds=left)
        print(f"\n{shape}\n{table(shape, found, device)}", flush=True)
        report.append(record(shape, found, ceilings, device))
        if options.json:
            result = {"where": where, "ceilings": ceilings._asdict(), "shapes": report}
            options.json.write_text(json.dumps(result, indent=1) + "\n")


def rates(ceilings: Ceilings) -> str:
    return (
        f"measured ceilings: {ceilings.multiply_adds_per_s / 1e12:.3g} T multiply-adds/s, "
        f"{ceilings.bytes_per_s / 1e9:.4g} GB/s copied, "
        f"{ceilings.cached_bytes_per_s / 1e9:.4g} GB/s within the cache"
    )


def pairs_to_compare(timings: dict[str, Timing], device: torch.device) -> list[tuple[str, str]]:
    """(a, b) for time of a over time of b: all against our KronSAE, TopK against our TopK."""
    kron, dense = (best_of_ours(encoder, device) for encoder in ("kron", "dense"))
    pairs = [(name, kron) for name in CONTENDERS if name not in (kron, dense)]
    pairs += [(name, dense) for name, it in CONTENDERS.items() if it.encoder == "dense"]
    pairs += [(dense, kron), (kron, "kron product"), (dense, "dense product")]
    return [(a, b) for a, b in pairs if a != b and a in timings and b in timings]


def ratio(timings: dict[str, Timing], a: str, b: str) -> tuple[float, float, float]:
    """Median, lower and upper quartile of the rounds' ratios a / b."""
    pairs = zip(timings[a].times_ms, timings[b].times_ms, strict=False)
    ratios = Timing([of_a / of_b for of_a, of_b in pairs])
    return ratios.median_ms, *quartiles(ratios.times_ms)


def table(shape: Shape, found: Comparison, device: torch.device) -> str:
    lines = [f"{'':34}{'ms':>9}{'quartiles':>20}{'tokens/s':>13}{'peak GiB':>10}"]
    for name, timing in found.timings.items():
        low, high = timing.quartiles_ms
        rate = shape.tokens / timing.median_ms * 1e3
        peak = found.peak_bytes.get(name)
        lines.append(
            f"{name:34}{timing.median_ms:9.2f}{f'{low:.2f} .. {high:.2f}':>20}{rate:13,.0f}"
            + (f"{peak / 2**30:10.2f}" if peak else "")
        )
    for a, b in pairs_to_compare(found.timings, device):
        middle, low, high = ratio(found.timings, a, b)
        lines.append(f"{f'{a} / {b}':34}{middle:9.2f}{f'{low:.2f} .. {high:.2f}':>20}")
    return "\n".join(lines + [f"{name}: {why}" for name, why in found.skipped.items()])


def record(
    shape: Shape, found: Comparison, ceilings: Ceilings, device: torch.device
) -> dict[str, object]:
    """The same as `table`, for machines; times in ms, a step's floor beside them."""
    timings, encoders = found.timings, ("kron", "dense")
    return {
        "shape": shape._asdict(),
        "times_ms": {name: timing.times_ms for name, timing in timings.items()},
        "median_ms": {name: timing.median_ms for name, timing in timings.items()},
        "ratios": {
            f"{a} / {b}": ratio(timings, a, b)[0] for a, b in pairs_to_compare(timings, device)
        },
        "peak_bytes": found.peak_bytes,
        "skipped": found.skipped,
        "flops_per_token": {encoder: shape.flops_per_token(encoder) for encoder in encoders},
        "floor_ms": {
            encoder: floors.step_floor_ms(shape, encoder, ceilings, device) for encoder in encoders
        },
        # Float32 weights and two moments: what no such step can do without.
        "state_bytes": {encoder: 12 * shape.parameters(encoder) for encoder in encoders},
    }


if __name__ == "__main__":
    main()
