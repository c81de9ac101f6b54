"""Training steps side by side, in one run: `python -m benchmarks.compare --shape S1 S2`.

All contenders that can run here, other libraries among them, and the bare matrix product of each
encoder beside encode and selection. On a CPU all take turns; a ratio is the median of the rounds'
ratios, and its range their quartiles, so a load that comes and goes does not favour one. On a GPU
each is alone, in a process that is replaced if one breaks it. What fails costs only itself.
"""

import math
import time
from functools import partial
from typing import Any, NamedTuple

import torch

from benchmarks import floors
from benchmarks.flags import command, save
from benchmarks.floors import Ceilings
from benchmarks.measure import Comparison, Timing, about, caller, compare_steps, quartiles, reason
from benchmarks.report import steps_table, where
from benchmarks.shapes import GOAL_SHAPES, SHAPES, Shape
from benchmarks.steps import CONTENDERS, OURS, best_of_ours
from kronsae.system.tables import markdown

LEGEND = """\
kron, dense: our KronSAE and TopK SAE; fused: our explicit step; graphed: that as a CUDA graph;
listing, topk: KronSAE and TopK SAE in plain PyTorch; product: an encoder's bare matrix product.
"""


class Goal(NamedTuple):
    """A ratio of times that is to be reached."""

    over: str
    """Dividend: a contender, or "ours"."""
    under: str
    """Divisor: a contender, "ours", or "floor"."""
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


def main(arguments: list[str] | None = None) -> None:
    parser = command(
        "compare", __doc__, shape=["S1", "S2"], rounds=7, device="auto", seconds=math.inf
    )
    options = parser.parse_args(arguments)
    device = options.device
    end = time.monotonic() + options.seconds
    call = caller(device)
    facts = about(device, call)
    print(f"{where(facts)}\n{LEGEND}")
    ceilings, assumed = (
        facts[kind] and Ceilings(**facts[kind]) for kind in ("ceilings", "assumed")
    )
    shapes: list[dict[str, Any]] = []
    result = {**facts, "shapes": shapes}

    def tell(shape: Shape, comparison: Comparison) -> None:
        shapes[-1] = record(shape, comparison, ceilings, assumed, device)
        save(options.json, result)

    for index, name in enumerate(options.shape):
        left = (end - time.monotonic()) / (len(options.shape) - index)
        shape, ratios = SHAPES[name], ""
        shapes.append({"shape": shape._asdict(), "failed": "no time left"})
        if left > 0:
            shapes[-1]["failed"] = "stopped"
            try:
                settings = options.rounds, 2, left, call
                comparison = compare_steps(shape, device, *settings, partial(tell, shape))
                ratios = ratio_table(comparison.timings, device)
            except Exception as broken:  # the other shapes still tell something
                shapes[-1]["failed"] = reason(broken)
        print(f"{steps_table({'shapes': [shapes[-1]]})}\n\n{ratios}\n", flush=True)
    save(options.json, result)


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


def ratio_table(timings: dict[str, Timing], device: torch.device) -> str:
    """Markdown: the rounds' ratios of two times."""
    rows = []
    for a, b in pairs_to_compare(timings, device):
        middle, low, high = ratio(timings, a, b)
        rows.append((f"{a} / {b}", f"{middle:.2f}", f"{low:.2f} … {high:.2f}"))
    return markdown(("time / time", "ratio", "quartiles"), rows, numeric=True)


def verdicts(comparison: Comparison, floor_ms: float) -> list[str]:
    """Each goal: what was reached, and whether that is enough."""
    ours = next((name for name in OURS if name in comparison.timings), "")
    medians = {name: timing.median_ms for name, timing in comparison.timings.items()}
    lines = []
    for goal in GOALS:
        over, under = (ours if name == "ours" else name for name in (goal.over, goal.under))
        if over not in medians or under not in {**medians, "floor": 0}:
            lines.append(f"{goal}: not measured")
            continue
        if under == "floor":
            reached = medians[over] / floor_ms
        else:
            reached = ratio(comparison.timings, over, under)[0]
        met = reached <= goal.most if goal.most else reached >= goal.least
        lines.append(f"{goal}: {reached:.2f} ({over}), {'reached' if met else 'MISSED'}")
    return lines


def record(
    shape: Shape,
    comparison: Comparison,
    ceilings: Ceilings,
    assumed: Ceilings | None,
    device: torch.device,
) -> dict[str, Any]:
    """All that was measured, as JSON values: times in ms, a step's floor beside them."""
    floor = {
        kind: {
            encoder: floors.step_floor_ms(shape, encoder, rates, device)
            for encoder in ("kron", "dense")
        }
        for kind, rates in (("measured", ceilings), ("assumed", assumed))
        if rates
    }
    timings = comparison.timings
    return {
        "shape": shape._asdict(),
        "times_ms": {name: timing.times_ms for name, timing in timings.items()},
        "median_ms": {name: timing.median_ms for name, timing in timings.items()},
        "ratios": {
            f"{a} / {b}": ratio(timings, a, b)[0] for a, b in pairs_to_compare(timings, device)
        },
        "peak_bytes": comparison.peak_bytes,
        "skipped": comparison.skipped,
        "floor_ms": floor["measured"],
        "assumed_floor_ms": floor.get("assumed"),
        "goals": verdicts(comparison, floor.get("assumed", floor["measured"])["kron"])
        if device.type == "cuda" and shape.name in GOAL_SHAPES
        else [],
    }


if __name__ == "__main__":
    main()
