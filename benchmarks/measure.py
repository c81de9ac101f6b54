"""Checks before timing, and timing: interleaved rounds, so that a drift of the machine hits all."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.shapes import Shape
from benchmarks.steps import (
    ENCODERS,
    STEPS,
    dense_loss,
    dense_parameters,
    kron_loss,
    kron_parameters,
)

CHECKED_TOKENS = 64


class WrongResult(AssertionError):
    """What was to be timed does not compute the right thing."""


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe(device: torch.device) -> dict[str, str | int]:
    """Where a time was measured."""
    cuda = device.type == "cuda"
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "threads": torch.get_num_threads(),
    }


def require_close(name: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Norm of the difference over norm of the expected, at most `tolerance`; else WrongResult."""
    error = float((got - expected).detach().norm() / expected.detach().norm())
    if not error <= tolerance:
        raise WrongResult(f"{name}: relative error {error:.1e}, allowed {tolerance:.1e}")


def check_gradients(shape: Shape, x: Tensor) -> None:
    """Loss and gradients of our operations equal the reference's, on a few tokens.

    Both compute in float32, in another order. A gradient is a sum of at most B k = 64 * 50 terms
    (of d in the products that precede it), so rounding is of the order of sqrt(3200) eps = 7e-6,
    if terms are of one size; 1e-4 leaves room for cancellation, and none for a wrong latent.
    """
    for loss_of, parameters_of in (kron_loss, kron_parameters), (dense_loss, dense_parameters):
        parameters = parameters_of(shape, x.device)
        found = []
        for impl in (None, "reference"):
            loss = loss_of(shape, x[:CHECKED_TOKENS], *parameters, impl=impl)
            found.append([loss, *torch.autograd.grad(loss, parameters)])
        names = ("loss", "w_enc", "b_enc", "w_dec", "b_dec")
        for name, got, expected in zip(names, *found, strict=True):
            require_close(f"{loss_of.__name__} {shape.name} {name}", got, expected, 1e-4)


def check_losses(shape: Shape, losses: dict[str, list[float]]) -> None:
    """Steps of one model, started from the same weights, have the same losses, step by step.

    Rounding differs and AdamW magnifies what it does to gradients near 0, so by 1e-3 at most.
    """
    for name, found in losses.items():
        for other, expected in losses.items():
            if ENCODERS[name] == ENCODERS[other]:
                pairs = zip(found, expected, strict=False)
                worst = max((abs(a - b) / b for a, b in pairs), default=0.0)
                if not worst <= 1e-3:
                    raise WrongResult(f"{shape.name}: losses of {name} and {other}: {worst:.1e}")


class Timing(NamedTuple):
    """Milliseconds of a repeated call."""

    times_ms: list[float]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.times_ms)

    @property
    def quartiles_ms(self) -> tuple[float, float]:
        return quartiles(self.times_ms)


def quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def interleaved(
    calls: dict[str, Callable[[], object]], rounds: int, warmup: int, device: torch.device
) -> dict[str, Timing]:
    """Times of each call, one of each a round, after `warmup` rounds without a clock.

    Before the timed call stands one without a clock, since a training step follows another of its
    own kind: it finds its weights in the cache and its memory with the allocator, not what another
    contender left there.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(warmup + rounds):
        for name, call in calls.items():
            call()
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            if round_ >= warmup:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: Timing(found) for name, found in times.items()}


def products(shape: Shape, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The bare matrix products x w^T of the two encoders."""
    kron = torch.randn(shape.columns, shape.d, device=x.device)
    dense = torch.randn(shape.dict_size, shape.d, device=x.device)
    return {"kron product": lambda: x @ kron.T, "dense product": lambda: x @ dense.T}


def compare_steps(shape: Shape, x: Tensor, rounds: int, warmup: int = 2) -> dict[str, Timing]:
    """Times of all STEPS and of the encoders' bare matrix products, checked."""
    check_gradients(shape, x)
    losses: dict[str, list[float]] = {name: [] for name in STEPS}

    def recorded(name: str) -> Callable[[], None]:
        step = STEPS[name](shape, x)
        return lambda: losses[name].append(float(step()))

    calls = {name: recorded(name) for name in STEPS}
    timings = interleaved({**calls, **products(shape, x)}, rounds, warmup, x.device)
    check_losses(shape, losses)
    return timings
