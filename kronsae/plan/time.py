"""Time of a run, measured by a few training steps and forward passes of the language model.

Steps run on random activations, with batch and dictionary as configured. The language model has
meaningless weights, so that nothing is downloaded. Tokenising, shuffling, evaluations and
checkpoints are not counted.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from kronsae.config import DataConfig, RunConfig
from kronsae.data.activations import overlaps
from kronsae.data.amount import about
from kronsae.plan.memory import shortage
from kronsae.plan.outline import NoOutline, Outline, forward_pass
from kronsae.system.devices import model_dtype
from kronsae.system.progress import duration
from kronsae.training.learner import Learner

ROUNDS = 3

ROUND_SECONDS = 10.0
"""Time after which no other round of a measurement begins."""


def step_seconds(config: RunConfig, device: torch.device) -> float:
    """Seconds of a training step of one SAE while no latent is dead."""
    sae, train = config.sae, config.train
    x = torch.randn(train.batch_size, sae.d_model, device=device)
    target = torch.randn(train.batch_size, sae.d_target, device=device) if sae.d_target else None
    learner = Learner(sae, train, device)
    return _timed(lambda: learner.step(x, target), device)


def model_seconds(data: DataConfig, model: Outline, device: torch.device) -> float:
    """Seconds per token of the language model up to the hookpoint. Raises NoOutline."""
    if data.activations is not None:  # a cache is read while steps run
        return 0.0
    contexts = data.contexts_per_batch
    dtype = model_dtype(data.model_dtype, device, model.checkpoint)
    run = forward_pass(data, contexts, model.context_length, device, dtype)
    return _timed(run, device) / (contexts * model.context_length)


def run_time(
    plan: dict[str, Any],
    members: Mapping[str, RunConfig],
    data: DataConfig,
    model: Outline,
    available: int | None = None,
) -> str:
    """The time of a run or a sweep, in words. plan: of `make_plan`.

    data, model: of the last hookpoint.
    available: tokens to train on, where a run ends even if more are configured; None if it is not
        known.
    For several processes it counts computation alone, not their waiting for each other.
    """
    if shortage(plan) is not None:
        return "not measured: it does not fit into memory"
    kernels = {plan["kernels"], *(member["training_step"] for member in plan["members"].values())}
    if plan["device"] == "cpu" and kernels & {"triton", "fused"}:
        return "not measured: Triton's interpreter is for tests, not for runs"
    if plan["ranks"][1] > 1:
        return "not measured: several processes share the heads"
    train = next(iter(members.values())).train
    device, model_device = torch.device(plan["device"]), torch.device(plan["model_device"])
    processes = math.prod(plan["ranks"])
    measured: dict[str, float] = {}  # those at other hookpoints take as long
    steps = {}
    for name, member in members.items():
        kind = repr((member.sae, replace(member.train, seed=0)))
        if kind not in measured:
            measured[kind] = step_seconds(member, device)
        steps[name] = measured[kind]
    share = 1 if train.share == "members" else processes
    learning = max(sum(steps[name] for name in names) for names in plan["parts"])
    learning /= train.batch_size * share
    try:
        reading = model_seconds(data, model, model_device) / processes
    except NoOutline as error:
        return f"not measured: {error}"
    parallel = overlaps(data, model_device) and model_device != device
    token = max(reading, learning) if parallel else reading + learning
    tokens = train.tokens if available is None else min(train.tokens, available)
    of_fewer = f" for {about(tokens)} tokens, all of the text" if tokens < train.tokens else ""
    return (
        f"{duration(tokens * token)}{of_fewer}: a token takes {short_duration(reading)} in the "
        f"language model and {short_duration(learning)} in optimizer steps (measured here, without "
        "evaluations, checkpoints and the auxiliary loss of dead latents)"
    )


def short_duration(seconds: float) -> str:
    """Seconds with two significant digits, in a fitting unit: "1.5 s", "12 ms", "0.85 us"."""
    units = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
    unit = next((unit for unit, size in units.items() if seconds >= 0.995 * size), "us")
    count = seconds / units[unit]
    return f"{count:,.0f} {unit}" if count >= 9.95 else f"{count:.2g} {unit}"


def _timed(call: Callable[[], Any], device: torch.device) -> float:
    """Median seconds of ROUNDS calls after a first one; of fewer, if they take long."""
    seconds: list[float] = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
        if sum(seconds) > ROUND_SECONDS and (len(seconds) > 1 or device.type == "cpu"):
            break
    return statistics.median(seconds[1:] or seconds)
