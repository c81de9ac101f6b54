"""Training steps side by side, in one run: `python -m benchmarks.compare --shape S1 S2`.

All contenders that can run here, other libraries among them, and the bare matrix product of each
encoder beside encode and selection. On a CPU all take turns; a ratio is the median of the rounds'
ratios, and its range their quartiles, so a load that comes and goes does not favour one. On a GPU
each is alone, in a process that is replaced if one breaks it. What fails costs only itself.
"""

import argparse
import json
import time
from functools import partial
from typing import Any, NamedTuple

import torch

from benchmarks import floors
from benchmarks.flags import output_file, positive, positive_seconds, usable_device
from benchmarks.floors import Ceilings, assumed_ceilings, measure_ceilings
from benchmarks.measure import (
    Apart,
    Comparison,
    Timing,
    compare_steps,
    describe,
    here,
    quartiles,
    reason,
)
from benchmarks.shapes import GOAL_SHAPES, SHAPES, Shape
from benchmarks.steps import CONTENDERS, best_of_ours


class Goal(NamedTuple):
    """A ratio of times that is to be reached."""

    over: str
    """What is divided: a contender, or "ours"."""
    under: str
    """By what: a contender, "ours", or "floor"."""
    most: float | None
    least: float | None = None

    def __str__(self) -> str:
        bound = f"at most {self.most}" if self.most else f"at least {self.least}"
        return f"{self.over} / {self.under} {bound}"


GOALS = (
    Goal("kron encode", "kron product", floors.ENCODE_GOAL),
    Goal("ours", "floor", floors.STEP_GOAL),
    Goal("eai-sparsify", "ours", None, floors.SPARSIFY_GOAL),
    Goal("topk", "ours", None, floors.DENSE_GOAL),
)
"""Ours: the fused step, as a CUDA graph where there is one; topk: the dense
SAE in plain PyTorch, bfloat16."""
OURS = ("kron graphed", "kron fused", "kron")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("benchmarks.compare", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shape", nargs="+", default=["S1", "S2"], choices=SHAPES, help="default: S1 S2"
    )
    parser.add_argument("--rounds", type=positive, default=7, help="default: 7")
    parser.add_argument("--device", type=usable_device, default="auto", help="default: auto")
    parser.add_argument(
        "--seconds",
        type=positive_seconds,
        default=float("inf"),
        help="nothing new is started after so many",
    )
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write all times here")
    options = parser.parse_args(arguments)
    device = options.device
    end = time.monotonic() + options.seconds
    where = describe(device)
    call = Apart() if device.type == "cuda" else here
    ceilings, assumed = call(measure_ceilings, device), assumed_ceilings(device)
    print(", ".join(f"{key} {value}" for key, value in where.items() if value is not None))
    print(rates("measured", ceilings))
    if assumed:
        print(rates("assumed", assumed))
    result = {"where": where, "ceilings": ceilings._asdict(), "shapes": []}
    result["assumed"] = assumed._asdict() if assumed else None
    report = result["shapes"]

    def tell(shape: Shape, found: Comparison) -> None:
        report[-1] = record(shape, found, ceilings, assumed, device)
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n")

    for place, name in enumerate(options.shape):
        left = (end - time.monotonic()) / (len(options.shape) - place)
        if left < 0:
            print(f"\n{name}: no time left")
            continue
        shape = SHAPES[name]
        report.append({"shape": shape._asdict(), "failed": "stopped"})
        try:
            settings = options.rounds, 2, left, call
            found = compare_steps(shape, device, *settings, partial(tell, shape))
            print(f"\n{shape}\n{table(shape, found, device)}", flush=True)
            print("".join(f"{goal}\n" for goal in report[-1]["goals"]), end="", flush=True)
        except Exception as broken:  # the other shapes still tell something
            report[-1]["failed"] = reason(broken)
            print(f"\n{shape}: {reason(broken)}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def rates(kind: str, ceilings: Ceilings) -> str:
    return (
        f"{kind} ceilings: {ceilings.multiply_adds_per_s / 1e12:.3g} T multiply-adds/s, "
        f"{ceilings.bytes_per_s / 1e9:.4g} GB/s copied, "
        f"{ceilings.cached_bytes_per_s / 1e9:.4g} GB/s within the cache"
    )


def pairs_to_compare(timings: dict[str, Timing], device: torch.device) -> list[tuple[str, str]]:
    """(a, b) for time of a over time of b: all against our KronSAE, TopK against our TopK."""
    kron, dense = (best_of_ours(encoder, device) for encoder in ("kron", "dense"))
    pairs = [(name, kron) for name in CONTENDERS if name not in (kron, dense)]
    pairs += [(name, dense) for name, it in CONTENDERS.items() if it.encoder == "dense"]
    pairs += [(dense, kron), (kron, "kron product"), (dense, "dense product")]
    pairs += [("kron encode", "kron product")]
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
    lines.append(f"\n{'time / time':34}{'ratio':>9}{'quartiles':>20}")
    for a, b in pairs_to_compare(found.timings, device):
        middle, low, high = ratio(found.timings, a, b)
        lines.append(f"{f'{a} / {b}':34}{middle:9.2f}{f'{low:.2f} .. {high:.2f}':>20}")
    return "\n".join(lines + [f"{name}: {why}" for name, why in found.skipped.items()])


def verdicts(found: Comparison, floor_ms: float) -> list[str]:
    """Each goal: what was reached, and whether that is enough."""
    ours = next((name for name in OURS if name in found.timings), "")
    medians = {name: timing.median_ms for name, timing in found.timings.items()}
    lines = []
    for goal in GOALS:
        over, under = (ours if name == "ours" else name for name in (goal.over, goal.under))
        if over not in medians or under not in {**medians, "floor": 0}:
            lines.append(f"{goal}: not measured")
            continue
        if under == "floor":
            reached = medians[over] / floor_ms
        else:
            reached = ratio(found.timings, over, under)[0]
        met = reached <= goal.most if goal.most else reached >= goal.least
        lines.append(f"{goal}: {reached:.2f} ({over}), {'reached' if met else 'MISSED'}")
    return lines


def record(
    shape: Shape,
    found: Comparison,
    ceilings: Ceilings,
    assumed: Ceilings | None,
    device: torch.device,
) -> dict[str, Any]:
    """The same as `table`, for machines; times in ms, a step's floor beside them."""
    floor = {
        kind: {
            encoder: floors.step_floor_ms(shape, encoder, rates, device)
            for encoder in ("kron", "dense")
        }
        for kind, rates in (("measured", ceilings), ("assumed", assumed))
        if rates
    }
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
        "floor_ms": floor["measured"],
        "assumed_floor_ms": floor.get("assumed"),
        "goals": verdicts(found, floor.get("assumed", floor["measured"])["kron"])
        if device.type == "cuda" and shape.name in GOAL_SHAPES
        else [],
        # Float32 weights and two moments: what no such step can do without.
        "state_bytes": {encoder: 12 * shape.parameters(encoder) for encoder in encoders},
    }


if __name__ == "__main__":
    main()
