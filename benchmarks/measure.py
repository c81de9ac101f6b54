"""Checks before timing, and timing: interleaved rounds, so that a drift of the machine hits all."""

import functools
import gc
import multiprocessing.connection
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.floors import assumed_ceilings, compute_bytes, graphed, measure_ceilings
from benchmarks.shapes import Shape, batches
from benchmarks.steps import CONTENDERS, LOSSES, Step, autocast, dense_parameters, encoding
from kronsae_kernels import dense_encode, sparse_decode

CHECKED_TOKENS = 64
PLAIN = ("topk", "listing", *peers.PEERS)
"""Contenders that none of our operations serve."""


class WrongResult(AssertionError):
    """A call that was to be timed computes the wrong thing."""


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reason(broken: Exception) -> str:
    """Why something was not measured, in a line."""
    if isinstance(broken, torch.OutOfMemoryError):
        return "does not fit in memory"
    if isinstance(broken, Failed):
        return str(broken)
    return f"{type(broken).__name__}: {broken}".splitlines()[0][:300]


def describe(device: torch.device) -> dict[str, str | int | None]:
    """Where a time was measured, with which versions (None: not installed)."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "compute": "bfloat16" if cuda else "float32",
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: peers.version(name) for name in ("triton", "kronsae", *peers.PEERS)},
    }


def thousands(number: float) -> str:
    """To three digits, in thousands or millions: 8.1k, 65.5k, 131k, 1.07M."""
    if number >= 999_500:
        return f"{number / 1e6:,.2f}M"
    return f"{number / 1000:.1f}k" if number < 99_950 else f"{number / 1000:.0f}k"


def _processor() -> str:
    try:
        match = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match.group(1) if match else platform.processor()


# Checks


@functools.lru_cache(maxsize=1)
def _batches(shape: Shape, device: torch.device) -> list[Tensor]:
    return batches(shape, device)


def require_close(name: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Norm of the difference over norm of the expected, at most `tolerance`; else WrongResult."""
    error = float((got - expected).detach().norm() / expected.detach().norm())
    if not error <= tolerance:
        raise WrongResult(f"{name}: relative error {error:.1e}, allowed {tolerance:.1e}")


def check_gradients(shape: Shape, encoder: str, device: torch.device) -> None:
    """Loss and gradients of our operations equal the reference's, on a few tokens.

    Both compute in float32, in another order. A gradient is a sum of at most B k = 64 * 50 terms
    (of d in the products that precede it), so rounding is of the order of sqrt(3200) eps = 7e-6,
    if terms are of one size; 1e-4 leaves room for cancellation, and none for a wrong latent.
    """
    loss_of, parameters_of = LOSSES[encoder]
    x, parameters = _batches(shape, device)[0], parameters_of(shape, device)
    results = []
    for impl in (None, "reference"):
        loss = loss_of(shape, x[:CHECKED_TOKENS], *parameters, impl=impl)
        results.append([loss, *torch.autograd.grad(loss, parameters)])
    names = ("loss", "w_enc", "b_enc", "w_dec", "b_dec")
    for name, got, expected in zip(names, *results, strict=True):
        require_close(f"{encoder} {shape.name} {name}", got, expected, 1e-4)


@torch.no_grad()
def reference_loss(shape: Shape, encoder: str, device: torch.device) -> float:
    """The loss of a model before its first step by the reference, a few tokens at a time."""
    loss_of, parameters_of = LOSSES[encoder]
    x, parameters = _batches(shape, device)[0], parameters_of(shape, device)
    parts = x.split(4 * CHECKED_TOKENS)
    losses = [loss_of(shape, part, *parameters, impl="reference") * len(part) for part in parts]
    return float(sum(losses) / len(x))


def check_peer(name: str, shape: Shape, x: Tensor) -> None:
    """A peer reconstructs what our TopK SAE with the same weights does, on a few tokens.

    In float32 both take the same latents but where two differ by rounding, at most at the k-th
    place of a token, so 1e-3 of the norm; in bfloat16 (8 bits) values and more of those places
    differ, so 2e-2.
    """
    x = x[:CHECKED_TOKENS]
    w_enc, b_enc, w_dec, b_dec = (p.detach() for p in dense_parameters(shape, x.device))
    with torch.no_grad(), autocast(x.device):
        codes = dense_encode(x, w_enc, b_enc, k=shape.k)
        expected = sparse_decode(codes, w_dec=w_dec, b_dec=b_dec)
        got = peers.PEERS[name].make(shape, w_enc, b_enc, w_dec, b_dec).reconstruct(x)
    tolerance = 2e-2 if x.device.type == "cuda" else 1e-3
    require_close(f"{name} {shape.name} reconstruction", got.float(), expected.float(), tolerance)


def check_losses(
    shape: Shape, name: str, losses: dict[str, list[float]], expected: float, device: torch.device
) -> None:
    """A contender's first loss is the reference's, the next those of others of its recipe.

    Rounding differs and AdamW magnifies what it does to gradients near 0: by 1e-3 at most in
    float32, by 2e-2 in bfloat16, in which pre-latents have 8 bits. A peer's loss has its own unit
    (`check_peer` looks at what it computes).
    """
    if name in peers.PEERS:
        return
    tolerance = 2e-2 if device.type == "cuda" else 1e-3
    kind = CONTENDERS[name].encoder, CONTENDERS[name].recipe
    others = [o for o in losses if (CONTENDERS[o].encoder, CONTENDERS[o].recipe) == kind]
    pairs = [("the reference", losses[name][0], expected)]
    pairs += [(o, *both) for o in others for both in zip(losses[name], losses[o], strict=False)]
    for other, one, two in pairs:
        if not abs(one - two) <= tolerance * abs(two):
            raise WrongResult(f"{shape.name}: losses of {name} and {other}: {one} and {two}")


# Timing


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


class Flush:
    """Overwrites a GPU's L2 cache, so that a call finds there what a training run would leave."""

    def __init__(self, device: torch.device) -> None:
        self.buffer = None
        if device.type == "cuda":
            size = torch.cuda.get_device_properties(device).L2_cache_size
            self.buffer = torch.empty(max(2 * size, 2**26), dtype=torch.uint8, device=device)

    def __call__(self) -> None:
        if self.buffer is not None:
            self.buffer.zero_()


def timed_ms(call: Callable[[], object], device: torch.device, flush: Flush) -> float:
    """Milliseconds of one call: by CUDA events, the cache flushed; on a CPU by its clock."""
    synchronize(device)
    flush()
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begin)


def interleaved(
    calls: dict[str, Callable[[], object]], rounds: int, warmup: int, device: torch.device
) -> dict[str, Timing]:
    """Times of each call, one of each a round, after `warmup` rounds without a clock.

    Before the timed call stands one without a clock, since a training step follows another of its
    own kind: it finds its weights in the cache and its memory with the allocator, not what another
    contender left there.
    """
    flush = Flush(device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(warmup + rounds):
        for name, call in calls.items():
            call()
            taken = timed_ms(call, device, flush)
            if round_ >= warmup:
                times[name].append(taken)
    return {name: Timing(ms) for name, ms in times.items()}


def alone(
    call: Callable[[], object],
    rounds: int,
    warmup: int,
    device: torch.device,
    seconds: float = float("inf"),
) -> Timing:
    """Times of one call after `warmup` calls without a clock; fewer when `seconds` are up."""
    flush, end = Flush(device), time.monotonic() + seconds
    for _ in range(warmup):
        call()
    times: list[float] = []
    while len(times) < rounds and (not times or time.monotonic() < end):
        times.append(timed_ms(call, device, flush))
    return Timing(times)


def spent(call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """A call's result; its seconds on the wall, and those of all processors it used."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return result, {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def release(device: torch.device) -> None:
    """Give back memory that nothing needs any more, so that what comes next finds it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Memory:
    """Peak of a GPU's memory above what was taken when this was made; None on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        release(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)

    @property
    def peak_bytes(self) -> int | None:
        if self.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self.device) - self.before


def rotating(step: Step, batches: list[Tensor]) -> Callable[[], Tensor]:
    """The step as a call without arguments, each on the next batch."""
    order: Iterator[Tensor] = cycle(batches)
    return lambda: step(next(order))


def products(shape: Shape, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The bare matrix products x w^T of the two encoders, in compute precision."""
    dtype = torch.bfloat16 if compute_bytes(x.device) == 2 else torch.float32
    x = x.to(dtype)

    def product(rows: int) -> Callable[[], Tensor]:
        w = torch.randn(rows, shape.d, device=x.device, dtype=dtype)
        return lambda: x @ w.T

    return {"kron product": product(shape.columns), "dense product": product(shape.dict_size)}


# Contenders


class Apart:
    """Calls functions in a process of its own, which is replaced where a call killed its device.

    After an invalid access a process can never use its GPU again, and what is measured next must
    not pay for that. Functions and arguments are pickled. A call raises Failed.
    """

    process = None

    def __call__(self, function: Callable[..., Any], *arguments: Any, seconds: float = 120) -> Any:
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, other = context.Pipe()
            self.process = context.Process(target=_serve, args=(other,), daemon=True)
            self.process.start()
            other.close()
        lost = True
        try:
            self.pipe.send((function, arguments))
            why: str | None = f"not done after {seconds:.0f} s"
            if self.pipe.poll(seconds):
                result, why, lost = self.pipe.recv()
        except (EOFError, OSError):
            why = "its process died"
        if lost:
            self.close()
        if why is not None:
            raise Failed(why)
        return result

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


class Failed(Exception):
    """A call in another process failed, or did not end in time."""


def here(function: Callable[..., Any], *arguments: Any, seconds: float = 0) -> Any:
    """The call, in this process."""
    return function(*arguments)


def caller(device: torch.device) -> Callable[..., Any]:
    """Caller of functions that measure: on a GPU, in a process of its own."""
    return Apart() if device.type == "cuda" else here


def about(device: torch.device, call: Callable[..., Any] = here) -> dict[str, Any]:
    """Where something is measured: versions; ceilings, measured now, and assumed of such a card."""
    ceilings, assumed = call(measure_ceilings, device), assumed_ceilings(device)
    return {
        "where": describe(device),
        "ceilings": ceilings._asdict(),
        "assumed": assumed and assumed._asdict(),
    }


def _serve(pipe: multiprocessing.connection.Connection) -> None:
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            result = function(*arguments), None, False
        except Exception as broken:
            result = None, reason(broken), not _device_works()
        pipe.send(result)


def _device_works() -> bool:
    try:
        return not torch.cuda.is_initialized() or torch.cuda.synchronize() is None
    except RuntimeError:
        return False


def encoders(shape: Shape, x: Tensor) -> dict[str, Callable[[], object]]:
    """The bare products, and what a Kron encoder makes of one: encode and selection."""
    return {"kron encode": encoding(shape, x), **products(shape, x)}


@torch.no_grad()
def measure_encoders(
    shape: Shape, device: torch.device, rounds: int, warmup: int
) -> dict[str, Timing]:
    """`encoders` in turns, on a GPU as CUDA graphs: a ratio of theirs is of one run."""
    calls = encoders(shape, _batches(shape, device)[0])
    if device.type == "cuda":
        calls = {name: graphed(call) for name, call in calls.items()}
    return interleaved(calls, rounds, warmup, device)


def prepare(
    shape: Shape, name: str, losses: dict[str, list[float]], expected: float, device: torch.device
) -> Callable[[], Tensor]:
    """A contender as a call; its first two losses are checked, and put into `losses`."""
    xs = _batches(shape, device)
    if name in peers.PEERS:
        check_peer(name, shape, xs[0])
    call = rotating(CONTENDERS[name].make(shape, device), xs)
    first = [float(call()) for _ in range(2)]
    check_losses(shape, name, {**losses, name: first}, expected, device)
    losses[name] = first
    return call


def measure_contender(
    shape: Shape,
    name: str,
    losses: dict[str, list[float]],
    expected: float,
    device: torch.device,
    rounds: int,
    warmup: int,
    seconds: float,
) -> tuple[Timing, int | None, list[float]]:
    """A contender alone in memory: its times, its peak, its first losses."""
    _batches(shape, device)
    memory = Memory(device)
    call = prepare(shape, name, losses, expected, device)
    return alone(call, rounds, warmup, device, seconds), memory.peak_bytes, losses[name]


class Comparison(NamedTuple):
    """Results of timing several contenders at a shape."""

    timings: dict[str, Timing]
    peak_bytes: dict[str, int]
    """Peaks of memory of those measured on a GPU."""
    skipped: dict[str, str]
    """Why a contender was not timed, by its name."""


def attempt(
    call: Callable[..., Any], reasons: dict[str, str], name: str, function: Callable, *settings: Any
) -> Any:
    """The call's result; None where it fails, and `reasons` says why."""
    try:
        return call(function, *settings)
    except Exception as broken:
        reasons[name] = reason(broken)


def compare_steps(
    shape: Shape,
    device: torch.device,
    rounds: int,
    warmup: int = 2,
    seconds: float = float("inf"),
    call: Callable[..., Any] = here,
    tell: Callable[[Comparison], None] = lambda comparison: None,
) -> Comparison:
    """Times of all contenders' steps and of the encoders' bare matrix products, checked.

    On a CPU all take turns. On a GPU, where they do not fit side by side and the clock is steady,
    one after the other, each alone in memory; what does not fit, or comes after `seconds`, is
    skipped. What fails is skipped as well, with the reason: the others still tell something.
    call: where to measure, `here` or an `Apart`.  tell: called with what there is, after each.
    """
    end = time.monotonic() + seconds
    comparison = Comparison({}, {}, {})
    wrong: dict[str, str] = {}
    references = {
        encoder: attempt(call, wrong, encoder, reference_loss, shape, encoder, device)
        for encoder in LOSSES
    }
    for encoder in [name for name in LOSSES if name not in wrong]:
        attempt(call, wrong, encoder, check_gradients, shape, encoder, device)
    ready: dict[str, float] = {}
    for name, contender in CONTENDERS.items():
        encoder = contender.encoder
        if why := contender.why_not(device):
            comparison.skipped[name] = why
        # A red check speaks against our operations, a reference that fails against all.
        elif encoder in wrong and (references[encoder] is None or name not in PLAIN):
            comparison.skipped[name] = f"{encoder}: {wrong[encoder]}"
        else:
            ready[name] = references[encoder]
    if device.type == "cpu" and call is here:
        _in_turns(comparison, shape, ready, device, rounds, warmup)
        tell(comparison)
    else:
        _one_by_one(comparison, shape, ready, device, rounds, warmup, end, call, tell)
    return comparison


def _in_turns(
    comparison: Comparison,
    shape: Shape,
    ready: dict[str, float],
    device: torch.device,
    rounds: int,
    warmup: int,
) -> None:
    """Put times into `comparison`.  ready: by contender, the reference's first loss."""
    losses: dict[str, list[float]] = {}
    calls = encoders(shape, _batches(shape, device)[0])
    for name, expected in ready.items():
        settings = shape, name, losses, expected, device
        if step := attempt(here, comparison.skipped, name, prepare, *settings):
            calls[name] = step
    comparison.timings.update(interleaved(calls, rounds, warmup, device))


def _one_by_one(
    comparison: Comparison,
    shape: Shape,
    ready: dict[str, float],
    device: torch.device,
    rounds: int,
    warmup: int,
    end: float,
    call: Callable[..., Any],
    tell: Callable[[Comparison], None],
) -> None:
    """Put times of each call alone, and peaks, into `comparison`; nothing begins after `end`."""
    losses: dict[str, list[float]] = {}
    settings = shape, device, rounds, warmup
    encode = attempt(call, comparison.skipped, "kron encode", measure_encoders, *settings)
    comparison.timings.update(encode or {})
    for name, expected in ready.items():
        left = end - time.monotonic()
        if left < 0:
            comparison.skipped[name] = "no time left"
            continue
        settings = shape, name, losses, expected, device, rounds, warmup, left
        if done := attempt(call, comparison.skipped, name, measure_contender, *settings):
            comparison.timings[name], peak, losses[name] = done
            if peak is not None:
                comparison.peak_bytes[name] = peak
        tell(comparison)
