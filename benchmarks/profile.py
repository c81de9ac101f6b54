"""Where a step's time goes, beside the floor of each stage: `python -m benchmarks.profile`.

Kernel times of torch.profiler, summed by stage; the step as a whole by events. What the kernels'
sum lacks of it is time in which the GPU waits for launches. `--predicted FILE` puts beside each
kernel what `python -m benchmarks.predict --json FILE` expected of it. `--once` trains twice and
measures nothing: for profilers that watch from outside, as ncu.
"""

import json
import math
import re
import time
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.flags import command, save
from benchmarks.floors import Ceilings, Work, compute_bytes, stages
from benchmarks.measure import about, alone, caller, reason, release, rotating, synchronize
from benchmarks.report import profile_table
from benchmarks.shapes import GOAL_SHAPES, SHAPES, Shape, batches
from benchmarks.steps import CONTENDERS, best_of_ours

STAGE_OF_KERNEL = (
    ("select", r"select_|merge_lists|list_keys|rank_latents|gather_heads|name_latents|topk"),
    ("encode", r"encode_heads|gemm|cutlass|nvjet|xmma|addmm|aten::mm"),
    ("decode", r"decode_and_loss|combine|pair_dots|embedding_bag"),
    ("encoder update", r"head"),
    ("decoder update", r"row"),
    ("group", r"group_entries|[sS]ort|[sS]can|[hH]istogram|bincount|searchsorted|cumsum"),
    ("optimizer", r"[aA]dam|multi_tensor"),
)
"""Stage, and what the names of its kernels look like; the first that fits."""
STEPS = 5


def stage_of(kernel: str) -> str:
    return next((s for s, pattern in STAGE_OF_KERNEL if re.search(pattern, kernel)), "other")


def kernel_times(call, device: torch.device) -> dict[str, float]:
    """Milliseconds a call spends in each kernel (on a CPU: in each operator)."""
    gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as profiler:
        for _ in range(STEPS):
            call()
        synchronize(device)
    times = {}
    for event in profiler.key_averages():
        if gpu and event.device_type != DeviceType.CUDA:
            continue
        microseconds = event.self_device_time_total if gpu else event.self_cpu_time_total
        times[event.key] = microseconds / 1e3 / STEPS
    return times


def measure(
    shape: Shape,
    name: str,
    ceilings: Ceilings,
    device: torch.device,
    predicted: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Times of a contender's stages and kernels in ms."""
    release(device)
    call = rotating(CONTENDERS[name].make(shape, device), batches(shape, device, count=2))
    timing = alone(call, rounds=20, warmup=10, device=device)
    times = kernel_times(call, device)
    works = stages(shape, CONTENDERS[name].encoder, compute_bytes(device))
    summed = dict.fromkeys(works, 0.0)
    for kernel, taken in times.items():
        stage = stage_of(kernel)
        summed[stage] = summed.get(stage, 0.0) + taken
    largest = sorted(times.items(), key=lambda item: -item[1])[:20]
    return {
        "shape": shape._asdict(),
        "contender": name,
        "step_ms": timing.median_ms,
        "quartiles_ms": timing.quartiles_ms,
        "stages": {
            stage: {"ms": taken, "floor_ms": ceilings.floor_ms(works.get(stage, Work()))}
            for stage, taken in summed.items()
        },
        "kernels_ms": {kernel[:80]: taken for kernel, taken in largest},
        "predicted": beside(times, predicted),
    }


def beside(times: dict[str, float], predicted: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Each kernel of a prediction: {"kernel", "expected_ms", "floor_ms", "ms"}."""
    rows = predicted["rows"] if predicted else []
    return [
        {name: row[name] for name in ("kernel", "expected_ms", "floor_ms")}
        | {"ms": sum(ms for kernel, ms in times.items() if row["kernel"] in kernel)}
        for row in rows
    ]


def main(arguments: list[str] | None = None) -> None:
    shapes = GOAL_SHAPES if torch.cuda.is_available() else ["S1"]
    parser = command("profile", __doc__, shape=shapes, device="auto", seconds=math.inf)
    parser.add_argument(
        "--contender", nargs="+", choices=CONTENDERS, help="default: our fastest KronSAE"
    )
    parser.add_argument("--predicted", type=Path, metavar="FILE", help="of benchmarks.predict")
    parser.add_argument("--once", action="store_true", help="train twice, measure nothing")
    options = parser.parse_args(arguments)
    device = options.device
    end = time.monotonic() + options.seconds
    contenders = options.contender or [best_of_ours("kron", device)]
    pairs = [(SHAPES[name], contender) for name in options.shape for contender in contenders]
    if options.once:
        for shape, contender in pairs:
            call = rotating(CONTENDERS[contender].make(shape, device), batches(shape, device, 2))
            print(shape, contender, float(call()), float(call()))
        return
    call = caller(device)
    facts = about(device, call)
    ceilings = Ceilings(**(facts["assumed"] or facts["ceilings"]))
    result: dict[str, Any] = {**facts, "profiles": []}
    predictions = {}
    if options.predicted and options.predicted.exists():
        shapes = json.loads(options.predicted.read_text())["shapes"]
        predictions = {one["shape"]["name"]: one for one in shapes}
    for shape, contender in pairs:
        if time.monotonic() > end:
            print(f"{shape.name}, {contender}: no time left")
            continue
        if why := CONTENDERS[contender].why_not(device):
            print(f"{shape.name}, {contender}: {why}")
            continue
        prediction = predictions.get(shape.name) if contender == "kron fused" else None
        try:
            row = call(measure, shape, contender, ceilings, device, prediction)
        except Exception as broken:  # the others still tell something
            row = {"shape": shape._asdict(), "contender": contender, "skipped": reason(broken)}
        result["profiles"].append(row)
        print(profile_table({"profiles": [row]}) + "\n", flush=True)
        save(options.json, result)


if __name__ == "__main__":
    main()
