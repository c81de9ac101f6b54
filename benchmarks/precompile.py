"""Compile kernels before they are needed: `python -m benchmarks.precompile --shape G1 G2`.

What a benchmark launches is found on meta tensors, and each distinct kernel is compiled in one of
several processes, none of which uses the GPU. What comes out lies in Triton's own cache on disk,
under the key that a launch looks for, so every process that begins later finds it there.
"""

import functools
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch

from benchmarks import ahead, check, tune
from benchmarks.flags import command, positive, save
from benchmarks.measure import CHECKED_TOKENS, reason
from benchmarks.memory import LiveKernels, autograd_step
from benchmarks.shapes import GOAL_SHAPES, SHAPES, Shape
from benchmarks.steps import CONTENDERS, LOSSES
from kronsae_kernels.triton_impl import configs
from kronsae_kernels.triton_impl.launch import Launch
from tests import aot

META = torch.device("meta")
FUSED = ("kron fused", "dense fused", "kron fused + aux")
AUTOGRAD = ("kron", "dense")


def step(shape: Shape, contender: str) -> None:
    """A contender's step, as `benchmarks.compare` times it."""
    if contender in AUTOGRAD:
        call = autograd_step(contender, shape)
    else:
        call = CONTENDERS[contender].make(shape, META)
    call(torch.empty(shape.tokens, shape.d, device=META))


def gradients(shape: Shape, encoder: str) -> None:
    """Launch what `measure.check_gradients` launches."""
    loss_of, parameters_of = LOSSES[encoder]
    x = torch.empty(CHECKED_TOKENS, shape.d, device=META)
    loss_of(shape, x, *parameters_of(shape, META), impl="triton").backward()


def alternatives(shape: Shape) -> None:
    """Launch the alternatives that `benchmarks.tune` tries."""
    data = tune.Data(shape, META)
    for kernel, (call, changes) in tune.KERNELS.items():
        for one in changes:
            with configs.override(kernel, **one):
                call(data)


def cases(shapes: list[Shape], checks: bool, tuning: bool) -> Iterator[aot.Case]:
    """Calls on meta tensors that launch what the benchmarks will."""

    def case(name: str, calls: Callable[..., Any], *values: Any) -> aot.Case:
        def traced() -> None:
            with LiveKernels([]):  # operators do on meta tensors what they would on a GPU
                calls(*values)

        return aot.Case(name, traced)

    for shape in shapes:
        for contender in (*FUSED, *AUTOGRAD):
            yield case(f"{shape.name} {contender}", step, shape, contender)
        for encoder in LOSSES:
            yield case(f"{shape.name} gradients {encoder}", gradients, shape, encoder)
        if tuning:
            yield case(f"{shape.name} tuning", alternatives, shape)
    for one in (*check.GOALS, *check.CASES) if checks else ():
        for kron in (True, False) if one in check.CASES else (True,):
            settings = one, kron, META
            yield case(f"check {one}", check.results, *settings, "triton", one.dtype)
            yield case(f"check {one} step", check.results_of_step, *settings)


def compile_launch(launch: Launch, target: str) -> None:
    """Compile into Triton's cache: the kernel, and what some versions need to start it."""
    binary = ahead.compiled(ahead.specialise(launch, target), target)
    if torch.version.cuda:
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(binary.src, binary.metadata)


WORKS: list[Any] = []
"""Kernels to compile; set before the fork, so that forked processes have them."""


def _compile(index: int, target: str) -> tuple[str, float, str | None]:
    work, began = WORKS[index], time.perf_counter()
    why = work.error
    try:
        if why is None:
            compile_launch(work.launch, target)
    except Exception as broken:  # the others are compiled
        why = reason(broken)
    return work.kernel, time.perf_counter() - began, why


def card_here() -> str | None:
    """The generation of the GPU, found in another process: one that used it must not fork."""
    code = "import torch; from kronsae_kernels.triton_impl.configs import generation_of as of; "
    code += "print(of(torch.device('cuda')) if torch.cuda.is_available() else '')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.stdout.strip() or None


def main(arguments: list[str] | None = None) -> None:
    parser = command("precompile", __doc__, shape=GOAL_SHAPES)
    parser.add_argument("--checks", action="store_true", help="also for benchmarks.check")
    parser.add_argument("--tuning", action="store_true", help="also for benchmarks.tune")
    parser.add_argument("--target", choices=ahead.TARGETS, help="default: the card that is here")
    parser.add_argument("--workers", type=positive, default=min(12, os.cpu_count() or 1))
    parser.add_argument("--most", type=positive, default=10_000, help="kernels at most")
    options = parser.parse_args(arguments)
    target = options.target or card_here()
    if target not in ahead.TARGETS:
        parser.error(f"no target for this machine's card ({target}): give one")
    began = time.perf_counter()
    calls = cases([SHAPES[name] for name in options.shape], options.checks, options.tuning)
    WORKS[:] = aot.collect(list(calls), target)[: options.most]
    print(f"{len(WORKS)} kernels found in {time.perf_counter() - began:.0f} s", flush=True)
    results: list[dict[str, Any]] = []
    build = functools.partial(_compile, target=target)
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("fork")) as pool:
        for done in as_completed([pool.submit(build, index) for index in range(len(WORKS))]):
            kernel, seconds, why = done.result()
            results.append({"kernel": kernel, "seconds": seconds, "error": why})
            if why:
                print(f"{kernel}: {why}", flush=True)
    errors = {one["kernel"]: one["error"] for one in results if one["error"]}
    save(options.json, {"target": target, "compiled": results, "errors": errors})
    print(f"{len(results)} compiled for {target} in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
