"""CPU times beside busy processes, with two allocators: `python -m benchmarks.busy`.

A busy process is one that adds numbers for ever. Each case is timed quiet, beside one of them and
beside two, in turn, in a process whose threads wait as those of commands do
(`kronsae.system.threads`); in one whose threads spin, as they do by default; and in one whose
allocator keeps memory. A ratio is of medians of wall time; within the quiet column it is of the
least CPU time, which other programs on the machine change least.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from benchmarks.flags import command, save
from benchmarks.measure import describe, products
from benchmarks.shapes import SHAPES, Shape, activations, batches
from benchmarks.steps import CONTENDERS, encoding
from kronsae import SAEConfig, TrainConfig
from kronsae.system.tables import markdown
from kronsae.system.threads import BRIEFLY, POLICIES
from kronsae.training.learner import Learner

CPU = torch.device("cpu")
SQUARES = [
    Shape(f"m = n = 32, d = {d}", d=d, heads=64, m=32, n=32, k=32, tokens=1024)
    for d in (256, 512, 768, 1536)
]
"""The narrower x, the more of an encode is selection."""
WIDE = Shape("F = 2^18", d=256, heads=2**14, m=4, n=4, k=32, tokens=512)
ENVIRONMENTS = {
    "brief": BRIEFLY,
    "spinning": {},
    "keeping": {
        **BRIEFLY,
        "MALLOC_MMAP_THRESHOLD_": str(2**32),
        "MALLOC_TRIM_THRESHOLD_": str(2**33),
    },
}
"""How threads wait, and whether glibc's allocator keeps what it has mapped."""
LEAST_SECONDS = 0.3
"""A measurement is of so many seconds, or of one call."""
GOALS: dict[str, tuple[tuple[str, str, int], tuple[str, str, int], float]] = {
    **{
        f"step {shape}, {busy} busy / quiet": (
            ("brief", f"step {shape}", busy),
            ("brief", f"step {shape}", 0),
            2.0 * busy,
        )
        for shape in ("S1", "S2")
        for busy in (1, 2)
    },
    "encode F = 2^18 / with an allocator that keeps memory": (
        ("brief", "encode F = 2^18", 0),
        ("keeping", "encode F = 2^18", 0),
        1.2,
    ),
    "JumpReLU / TopK, step S1": (
        ("brief", "trained jumprelu S1", 0),
        ("brief", "trained topk S1", 0),
        3.0,
    ),
    **{
        f"encode {shape.name} / its product": (
            ("brief", f"encode {shape.name}", 0),
            ("brief", f"product {shape.name}", 0),
            3.0,
        )
        for shape in SQUARES
    },
}
"""Ratios of two cases (environment, case, busy processes), and the most that each may be."""


def contender(name: str, shape: Shape) -> Callable[[], object]:
    """A training step of `benchmarks.steps`."""
    xs, step, count = batches(shape), CONTENDERS[name].make(shape, CPU), 0

    def call() -> object:
        nonlocal count
        count += 1
        return step(xs[count % len(xs)])

    return call


def training(selection: str, shape: Shape) -> Callable[[], object]:
    """A step of the trainer, with about k active latents a token.

    JumpReLU's thresholds are set as in its warm-up, and move no further (lr 1e-9).
    """
    scaled = [x * (shape.d**0.5 / x.norm(dim=1).mean()) for x in batches(shape)]
    parts = {"heads": shape.heads, "m": shape.m, "n": shape.n, "k": shape.k}
    sae = SAEConfig(d_model=shape.d, selection=selection, **parts)
    train = TrainConfig(tokens=10**9, batch_size=shape.tokens, lr=1e-9, warmup_fraction=0)
    learner = Learner(sae, train, CPU)
    learner.step(scaled[0])
    return lambda: learner.step(scaled[1])


def encoded(shape: Shape) -> Callable[[], object]:
    """Encode and select."""
    return encoding(shape, activations(shape))


def product(shape: Shape) -> Callable[[], object]:
    """The bare matrix product of the encoder."""
    return products(shape, activations(shape))["kron product"]


CASES: dict[str, Callable[[], Callable[[], object]]] = {
    **{f"step {name}": partial(contender, "kron", SHAPES[name]) for name in ("S1", "S2")},
    "trained topk S1": partial(training, "topk", SHAPES["S1"]),
    "trained jumprelu S1": partial(training, "jumprelu", SHAPES["S1"]),
    **{
        f"{name} {shape.name}": partial(make, shape)
        for shape in (WIDE, *SQUARES)
        for name, make in {"encode": encoded, "product": product}.items()
    },
}
"""Calls to time. Other steps of `benchmarks.steps` are those of --contender."""
CONTENDERS_AT = {
    f"{name} {shape}": partial(contender, name, at)
    for name in CONTENDERS
    for shape, at in {**SHAPES, WIDE.name: WIDE}.items()
}


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU milliseconds of a call, each a mean over at least LEAST_SECONDS."""
    count, wall, cpu = 0, time.perf_counter(), time.process_time()
    while count == 0 or time.perf_counter() - wall < LEAST_SECONDS:
        call()
        count += 1
    spent = time.perf_counter() - wall, time.process_time() - cpu
    return 1e3 * spent[0] / count, 1e3 * spent[1] / count


def work(names: list[str], rounds: int) -> dict[str, list[list[tuple[float, float]]]]:
    """Times of each case, for 0, 1 and 2 busy processes: one of each round."""
    times: dict[str, list[list[tuple[float, float]]]] = {name: [[], [], []] for name in names}
    for name in names:
        call = {**CONTENDERS_AT, **CASES}[name]()
        call()
        for _ in range(rounds):
            for busy in range(3):
                with ExitStack() as planted:
                    for _ in range(busy):
                        process = subprocess.Popen([sys.executable, "-c", "while True: 1 + 1"])
                        planted.enter_context(process)
                        planted.callback(process.kill)
                    times[name][busy].append(timed(call))
    return times


def in_environment(added: dict[str, str], names: list[str], rounds: int) -> dict[str, Any]:
    """`work` in a process of its own, with nothing else that says how threads wait."""
    own = {name: value for name, value in os.environ.items() if name not in POLICIES}
    call = f"print(json.dumps(busy.work({names}, {rounds})))"
    done = subprocess.run(
        [sys.executable, "-c", f"import json; from benchmarks import busy; {call}"],
        env={**own, **added},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def wall(times: dict[str, Any], environment: str, name: str, busy: int) -> float:
    """Median milliseconds."""
    return statistics.median(wall for wall, _ in times[environment][name][busy])


def ratio(times: dict[str, Any], over: tuple, under: tuple) -> float:
    """Of medians of wall time; of two quiet cases, of their least CPU time."""
    if over[2] == under[2] == 0:
        least = [min(cpu for _, cpu in times[env][name][0]) for env, name, _ in (over, under)]
        return least[0] / least[1]
    return wall(times, *over) / wall(times, *under)


def main(arguments: list[str] | None = None) -> None:
    parser = command("busy", __doc__, rounds=5)
    parser.add_argument("--case", nargs="*", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument(
        "--contender",
        nargs="+",
        choices=CONTENDERS_AT,
        default=[],
        metavar="CASE",
        help="a step of benchmarks.steps at a shape: 'topk S2'",
    )
    parser.add_argument("--environment", nargs="+", choices=ENVIRONMENTS, default=[*ENVIRONMENTS])
    options = parser.parse_args(arguments)
    names = [*options.case, *options.contender]
    times = {
        environment: in_environment(ENVIRONMENTS[environment], names, options.rounds)
        for environment in options.environment
    }
    save(options.json, {**describe(CPU), "times": times})
    rows = []
    for name in names:
        for environment in times:
            quiet, *others = (wall(times, environment, name, busy) for busy in range(3))
            cells = [cell for ms in others for cell in (f"{ms:.1f}", f"×{ms / quiet:.1f}")]
            rows.append((f"{name}, {environment}", f"{quiet:.1f}", *cells))
    head = ("case, environment", "quiet, ms", "one busy", "to quiet", "two busy", "to quiet")
    print(markdown(head, rows, numeric=True))
    for goal, (over, under, most) in GOALS.items():
        if all(env in times and name in names for env, name, _ in (over, under)):
            reached = ratio(times, over, under)
            verdict = "reached" if reached <= most else "MISSED"
            print(f"{goal}: {reached:.2f}, at most {most:g}: {verdict}")


if __name__ == "__main__":
    main()
