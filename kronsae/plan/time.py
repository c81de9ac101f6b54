"""How long things take here: short runs of the very code that training runs, for `--plan`.

A step is timed on the SAE and batch as configured, or, where that would take seconds, on a smaller
batch, and extrapolated: its time is affine in the batch, as AdamW's pass over the weights costs the
same for any. Of an SAE that is too large to be made for this, a smaller one stands in, and the time
is affine in the dictionary, too. A language model is timed by one of its blocks
with random weights, and the multiply-adds of the whole.

A clock gives seconds. Time on a machine that has other work to do is best told by the processor's
own (`time.process_time`), with one thread.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kronsae.config import DataConfig, SAEConfig, TrainConfig
from kronsae.data.buffer import ShuffleBuffer
from kronsae.model import flops
from kronsae.plan.outline import NoOutline, Outline, time_block
from kronsae.system.devices import compute_dtype
from kronsae.training.learner import Learner
from kronsae.training.stream import Stream

Clock = Callable[[], float]

ROUNDS = 3
WORK = {"cpu": 4e9, "cuda": 2e12}
"""Multiply-adds that one timed call may have; more is extrapolated."""
WEIGHTS = {"cpu": 2**25, "cuda": 2**30}
"""Weights that a timed SAE may have."""
SAMPLE_CHARACTERS = 200_000


class TokenTimes(NamedTuple):
    """Seconds that a token takes, by who works on it."""

    text: float
    """Tokenising and packing."""
    model: float
    """The forward pass of the language model up to its hookpoint."""
    buffer: float
    """Masking, shuffling, checking and normalising activations."""
    steps: dict[str, float]
    """An optimizer step of each SAE, while no latent is dead."""
    reviving: dict[str, float]
    """The same while as many latents are dead as the auxiliary loss takes."""
    judging: dict[str, float]
    """A held-out token in each SAE's evaluation."""


def measure(
    data: DataConfig,
    model: Outline,
    members: dict[str, tuple[SAEConfig, TrainConfig]],
    device: torch.device,
    model_device: torch.device,
    clock: Clock = time.perf_counter,
) -> TokenTimes:
    """All of them, in a few seconds."""
    each = {name: step_seconds(*member, device, clock) for name, member in members.items()}
    batch = next(iter(members.values()))[1].batch_size
    live = data.activations is None  # a cache is read by a thread, beside the steps
    return TokenTimes(
        text_seconds(model.context_length, clock) if live else 0.0,
        model_seconds(data, model, model_device, clock) if live else 0.0,
        buffer_seconds(model, data.buffer_tokens, batch, device, clock),
        *({name: times[i] for name, times in each.items()} for i in range(3)),
    )


def timed(call: Callable[[], Any], device: torch.device, clock: Clock, warmup: int = 1) -> float:
    """Seconds of a call, the median of ROUNDS, once it has run."""
    for _ in range(warmup):
        call()
    times = []
    for _ in range(ROUNDS):
        _finish(device)
        began = clock()
        call()
        _finish(device)
        times.append(clock() - began)
    return statistics.median(times)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def text_seconds(context_length: int, clock: Clock) -> float:
    """Of a token: to be tokenised and packed. By the embedded model's tokenizer, on this file's
    own text: others of the same kind (byte-level BPE in Rust) are about as fast."""
    from kronsae.data.loading import load_tokenizer, quiet
    from kronsae.data.packing import Packer
    from kronsae.data.stdlib import stdlib_documents
    from kronsae.embedded import EMBEDDED_MODEL

    with quiet():
        packer = Packer(load_tokenizer(EMBEDDED_MODEL, {}), context_length)
    sample = _beginning(stdlib_documents(heldout=True))

    def pack() -> int:
        return sum(len(ids) for text in sample for ids in packer.add(text))

    tokens = max(1, pack())
    return timed(pack, torch.device("cpu"), clock) / tokens


def _beginning(documents: list[dict[str, str]]) -> list[str]:
    texts, characters = [], 0
    for document in documents:
        texts.append(document["text"])
        characters += len(texts[-1])
        if characters > SAMPLE_CHARACTERS:
            break
    return texts


def model_seconds(data: DataConfig, model: Outline, device: torch.device, clock: Clock) -> float:
    """Of a token in the language model, up to the hookpoint."""
    tokens, work = model.context_length, WORK[device.type]
    contexts = data.contexts_per_batch
    dtype = compute_dtype(data.model_dtype, device)
    try:
        block = time_block(
            data, contexts, tokens, device, dtype, lambda call: timed(call, device, clock), work
        )
    except NoOutline:  # which leaves the rate of a product as wide as its own
        size = model.hidden_size
        rows = max(1, min(contexts * tokens, int(work / size**2)))
        x, w = (torch.randn(n, size, device=device).to(dtype) for n in (rows, size))
        seconds = timed(lambda: x @ w, device, clock)
        return seconds / rows * model.flops_per_token / size**2
    seconds = block.seconds / (block.contexts * tokens)
    return seconds * model.flops_per_token / block.flops_per_token


def buffer_seconds(
    model: Outline, buffer_tokens: int, batch: int, device: torch.device, clock: Clock
) -> float:
    """Of a token between the language model and the step."""
    width = model.d_model + model.d_target
    capacity = max(2 * batch, min(buffer_tokens, 2**24 // width))
    contexts = torch.randn(max(1, capacity // 8), width, device=device)
    mask = torch.ones(len(contexts), dtype=torch.bool, device=device)
    source = _Rows(model, ShuffleBuffer(_masked(contexts, mask), capacity, batch, 0, device))
    stream = Stream(source, 10**15, device)
    steps = max(1, capacity // 2 // batch)  # from one fill to the next

    def cycle() -> None:
        for _ in range(steps):
            stream.next()

    return timed(cycle, device, clock) / (steps * batch)


def _masked(x: Tensor, mask: Tensor) -> Iterator[Tensor]:
    """What `LanguageModelActivations` does to the output of a forward pass."""
    while True:
        rows = x[mask].float()
        torch.isfinite(rows).all().item()
        yield rows


class _Rows:
    """A source of activations as wide as a model's."""

    def __init__(self, model: Outline, buffer: ShuffleBuffer) -> None:
        self.d_model, self.d_target, self.buffer = model.d_model, model.d_target, buffer

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.buffer)


def step_seconds(
    sae: SAEConfig, train: TrainConfig, device: torch.device, clock: Clock
) -> tuple[float, float, float]:
    """Of a token in an optimizer step, in one that revives dead latents, and in an evaluation."""
    batch, size = train.batch_size, sae.dict_size
    shape = {"heads": sae.heads, "m": sae.m, "n": sae.n}
    work = flops.training_step(sae.d_model, size, sae.k, batch, **shape).total * batch
    part = 1
    while (sae.encoder_rows + size) * sae.d_model > part * WEIGHTS[device.type]:
        part *= 2
    smaller = _shrunk(sae, part)
    fits = WORK[device.type] / max(1.0, work * smaller.dict_size / size)
    rows = [batch] if fits >= 1 else [max(min(batch, 64), int(batch * fits))]
    if rows[0] < batch:
        rows.append(rows[0] // 2)
    kinds = [smaller] if smaller is sae else [smaller, _shrunk(smaller, 2)]
    times = [[_time_steps(kind, train, device, clock, b) for b in rows] for kind in kinds]
    found = []
    for i in range(3):
        whole = [_line(rows, [t[i] for t in each], batch) for each in times]
        found.append(_line([kind.dict_size for kind in kinds], whole, size) / batch)
    return tuple(found)


def _line(places: list[int], times: list[float], place: int) -> float:
    """On the line through one or two points; no less than the first, which is nearest."""
    if len(set(places)) == 1:
        return times[0]
    slope = (times[0] - times[1]) / (places[0] - places[1])
    return max(times[0], times[0] + slope * (place - places[0]))


def _shrunk(sae: SAEConfig, part: int) -> SAEConfig:
    """The same SAE with fewer heads, or latents, if it has so many."""
    while part > 1:
        size = sae.dict_size // part
        enough = size >= max(64, 8 * sae.k, sae.d_model) and sae.dict_size % part == 0
        if enough and sae.heads % part == 0:
            own = {"dict_size": size, "heads": sae.heads // part}
            if sae.matryoshka_first:
                own["matryoshka_first"] = 0
            try:
                return dataclasses.replace(sae, **own)
            except ValueError:  # experts, or nested parts, that do not divide
                pass
        part //= 2
    return sae


def kill(learner: Learner) -> None:
    """Have latents from all over the dictionary dead, as many as the auxiliary loss takes."""
    silent = learner.tokens_since_fired
    count = min(len(silent), learner.auxk)
    silent[torch.arange(count, device=silent.device) * (len(silent) // count)] = 2**60
    learner.quiet_until = 0


def _time_steps(
    sae: SAEConfig, train: TrainConfig, device: torch.device, clock: Clock, batch: int
) -> tuple[float, float, float]:
    """Seconds of a step on `batch` tokens, of a reviving one, and of an evaluation."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, sae.d_model, generator=generator).to(device)
    target = None
    if sae.d_target:
        target = torch.randn(batch, sae.d_target, generator=generator).to(device)
    settings = dataclasses.replace(train, batch_size=batch, dead_after_tokens=2**60)
    learner = Learner(sae, settings, device)
    plain = timed(lambda: learner.step(x, target), device, clock)
    reviving = plain
    if train.auxk_coefficient and train.auxk_fraction:

        def revive() -> None:
            kill(learner)
            learner.step(x, target)

        reviving = timed(revive, device, clock)
    with torch.no_grad():
        judging = timed(lambda: learner.sae(x), device, clock)
    return plain, reviving, judging
