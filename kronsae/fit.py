"""`fit`: train one SAE on a stream of activations, with logging, checkpoints and evaluation."""

import dataclasses
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from kronsae.config import SAEConfig, TrainConfig
from kronsae.data import (
    ActivationSource,
    IterableActivations,
    TensorActivations,
    split_target,
)
from kronsae.errors import InputError
from kronsae.evaluate import Heldout, evaluate, evaluate_cross_entropy
from kronsae.learner import Learner, Normalizer
from kronsae.logs import Log, check_packages
from kronsae.run import RunFolder
from kronsae.sae import SAE

NORMALIZER_TOKENS = 8192
"""How many of the first activations give the mean and the scale of all."""


@dataclasses.dataclass(frozen=True)
class FitResult:
    """What a training run gives."""

    sae: SAE
    """The trained SAE, of raw activations."""
    tokens: int
    """Tokens trained on."""
    metrics: dict[str, float]
    """Final figures on held-out activations; empty without any."""
    history: list[dict[str, Any]]
    """The logged records of this call, as in metrics.jsonl."""
    stopped_by: int | None
    """Number of the signal that ended the run early, or None."""


Activations = (
    Tensor | tuple[Tensor, Tensor] | ActivationSource | Iterable[Tensor | tuple[Tensor, Tensor]]
)


def fit(
    sae_config: SAEConfig,
    activations: Activations,
    train_config: TrainConfig | None = None,
    *,
    heldout: Heldout | Tensor | tuple[Tensor, Tensor] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    settings: dict[str, Any] | None = None,
    on_record: Callable[[dict[str, Any]], None] | None = None,
) -> FitResult:
    """Train an SAE on activations; see the fields of `SAEConfig` and `TrainConfig`.

    activations: [N, d] (shuffled each epoch), or an iterable of [B, d] tensors taken as they come,
        or any `kronsae.data.ActivationSource`.
        For a transcoder: a pair (inputs [N, d], targets [N, d_target]), or an iterable of pairs.
    heldout: activations to evaluate on, never trained on: [t, d], or a pair, or a `Heldout`.
    out: run folder (see `kronsae.run`); None keeps everything in memory.
    resume: go on from the newest checkpoint in `out`; batches and weights are, bit for bit, those
        of an uninterrupted run (on a CPU; an iterable must give the same batches again).
    settings: what else config.json shall hold.  on_record: called with each logged record.

    On SIGTERM or SIGINT the step in progress is finished, a checkpoint saved, and the result
    returned with `stopped_by`. Raises InputError if the data ends before the budget, is not finite,
    or does not fit the configuration; with `out`, the last good checkpoint is kept.
    """
    config = train_config or TrainConfig()
    device = resolve_device(config.device)
    source = _as_source(activations, config)
    sae_config = _with_widths(sae_config, source)
    if isinstance(heldout, Tensor):
        heldout = (heldout,)
    if isinstance(heldout, tuple):
        flat = [part.detach().reshape(-1, part.shape[-1]) for part in heldout]
        heldout = Heldout(flat[0], targets=flat[1] if len(flat) == 2 else None)
    if heldout is not None:
        _check_heldout(heldout, sae_config)
    settings = {
        "config": {
            "sae": dataclasses.asdict(sae_config),
            "data": None,
            "train": dataclasses.asdict(config),
        },
        "data": source.describe(),
        **(settings or {}),
    }
    check_packages(config)
    session = _Session(Learner(sae_config, config, device), source, config)
    run, state = _open_run(out, resume, settings)
    if state is not None:
        session.load_state_dict(state)
    log = Log(run, config, settings)
    history: list[dict[str, Any]] = []

    def record(kind: str, values: dict[str, float]) -> None:
        entry = {"kind": kind, **session.position(), **values}
        history.append(entry)
        log(entry)
        if on_record:
            on_record(entry)

    def save() -> None:
        if run is not None:
            run.save_checkpoint(
                session.learner.step_count, session.state_dict(), config.keep_checkpoints
            )

    def finish(metrics: dict[str, float]) -> SAE:
        sae = session.sae()
        if run is not None:
            facts = {**settings, "tokens": session.learner.tokens, "metrics": metrics}
            sae.save(run.sae, facts)
        return sae

    metrics: dict[str, float] = {}
    try:
        with _signals() as stop:
            _train(session, config, heldout, record, save, stop)
        if stop.received is None and heldout is not None:
            sae = session.sae()
            metrics = evaluate(sae, heldout) | evaluate_cross_entropy(sae, heldout)
            record("final", metrics)
    except InputError as error:
        if run is None or not session.learner.step_count:
            raise
        finish(metrics)
        raise InputError(
            f"{error}\nWhat was learned in {session.learner.tokens:,} tokens is in {run.sae}"
        ) from error
    finally:
        log.close()
        if run is not None:
            run.release()
    return FitResult(finish(metrics), session.learner.tokens, metrics, history, stop.received)


def _train(
    session: "_Session",
    config: TrainConfig,
    heldout: Heldout | None,
    record: Callable[[str, dict[str, float]], None],
    save: Callable[[], None],
    stop: "_Stop",
) -> None:
    """The loop: batch, step, log, evaluate, checkpoint, until the budget is used or a signal."""
    saved_at = session.learner.step_count
    learner = session.learner
    while learner.tokens < config.tokens and stop.received is None:
        try:
            x = session.next_batch()
            values = session.step(x)
        except DataEnded:
            if learner.step_count > saved_at:
                save()
            raise
        except FloatingPointError as error:  # the weights are still those of the step before
            raise InputError(str(error)) from error
        step = learner.step_count
        done = learner.tokens >= config.tokens
        if step % config.log_every == 0 or done:
            record("train", values)
        if heldout is not None and config.eval_every and step % config.eval_every == 0 and not done:
            record("heldout", evaluate(session.sae(), heldout))
        if config.checkpoint_every and step % config.checkpoint_every == 0 and not done:
            save()
            saved_at = step
    if learner.step_count > saved_at:
        save()


def _is_finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())


class DataEnded(InputError):
    """The activations ended before the budget was used."""


class _Session:
    """A learner with its stream of normalised batches, and the clock."""

    def __init__(self, learner: Learner, source: ActivationSource, config: TrainConfig) -> None:
        self.learner = learner
        self.source = source
        self.config = config
        self.d_target = learner.sae.config.d_target
        self.normalizer: Normalizer | None = None
        self.target_normalizer: Normalizer | None = None
        self.pending: list[Tensor] = []  # batches that the normalizer saw, not yet trained on
        self.batches: Iterator[Tensor] | None = None
        self.seconds = 0.0  # of earlier sessions
        self.started = time.monotonic()
        self.waited = 0.0  # for data, since the last record
        self.last_record = (self.started, 0)

    def next_batch(self) -> Tensor:
        """The next batch [B, d], cut to the budget. Raises InputError if there is none."""
        began = time.monotonic()
        if self.batches is None:
            self.batches = iter(self.source)
        if self.normalizer is None:
            self._measure_normalizer()
        x = self.pending.pop(0) if self.pending else next(self.batches, None)
        self.waited += time.monotonic() - began
        if x is None:
            raise DataEnded(
                f"the data ended after {self.learner.tokens:,} of {self.config.tokens:,} tokens: "
                "give more text, more --epochs, or fewer --tokens"
            )
        if not _is_finite(x):
            bad = int((~torch.isfinite(x)).any(1).sum())
            raise InputError(
                f"batch {self.learner.step_count}: {bad} of {x.shape[0]} activations hold NaN or "
                "infinity"
            )
        return x[: self.config.tokens - self.learner.tokens]

    def _measure_normalizer(self) -> None:
        """From the first batches, which are kept to be trained on (and to be judged) in turn."""
        tokens = 0
        while tokens < min(NORMALIZER_TOKENS, self.config.tokens):
            x = next(self.batches, None)
            if x is None:
                break
            self.pending.append(x)
            if not _is_finite(x):
                break
            tokens += x.shape[0]
        good = [x for x in self.pending if _is_finite(x)]
        if good:
            x, target = split_target(torch.cat(good), self.d_target)
            self.normalizer = Normalizer.of(x).to(self.learner.device)
            if target is not None:
                self.target_normalizer = Normalizer.of(target).to(self.learner.device)

    def step(self, x: Tensor) -> dict[str, float]:
        """One optimizer step on raw activations [B, d (+ d_target)]; its metrics and rates."""
        x, target = split_target(x.to(self.learner.device, torch.float32), self.d_target)
        if target is not None:
            target = self.target_normalizer(target)
        values = self.learner.step(self.normalizer(x), target)
        now, (before, tokens) = time.monotonic(), self.last_record
        rates = {
            "tokens_per_s": (self.learner.tokens - tokens) / max(1e-9, now - before),
            "data_wait_share": min(1.0, self.waited / max(1e-9, now - before)),
        }
        if self.learner.step_count % self.config.log_every == 0:
            self.last_record, self.waited = (now, self.learner.tokens), 0.0
        return values | rates

    def position(self) -> dict[str, Any]:
        return {
            "step": self.learner.step_count,
            "tokens": self.learner.tokens,
            "seconds": round(self.seconds + time.monotonic() - self.started, 3),
        }

    def sae(self) -> SAE:
        """The SAE as it stands, of raw activations."""
        if self.normalizer is None:
            raise InputError("no step was made: there is no SAE to save")
        of_target = self.target_normalizer
        return self.learner.sae.folded(
            self.normalizer.mean,
            self.normalizer.scale,
            None if of_target is None else (of_target.mean, of_target.scale),
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "learner": self.learner.state_dict(),
            "normalizer": self.normalizer.state_dict(),
            "target_normalizer": self.target_normalizer and self.target_normalizer.state_dict(),
            "source": self.source.state_dict(),
            "pending": self.pending,
            "torch_random_state": torch.get_rng_state(),
            "seconds": self.position()["seconds"],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state["learner"])
        self.normalizer = Normalizer(**state["normalizer"]).to(self.learner.device)
        of_target = state.get("target_normalizer")  # older runs have none
        if of_target is not None:
            self.target_normalizer = Normalizer(**of_target).to(self.learner.device)
        self.source.load_state_dict(state["source"])
        self.pending = state["pending"]
        torch.set_rng_state(state["torch_random_state"])
        self.seconds = state["seconds"]
        self.last_record = (self.started, self.learner.tokens)


@dataclasses.dataclass
class _Stop:
    received: int | None = None


@contextmanager
def _signals() -> Iterator[_Stop]:
    """Note the first SIGTERM or SIGINT instead of dying; a second one acts as usual."""
    stop = _Stop()
    earlier: dict[int, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        stop.received = number
        for each, handler in earlier.items():
            signal.signal(each, handler)
        name = signal.Signals(number).name
        print(f"\n{name}: finishing this step and saving (again to stop at once)", file=sys.stderr)

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            earlier[number] = signal.signal(number, handle)
    except ValueError:  # not in the main thread: signals are somebody else's business
        pass
    try:
        yield stop
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _open_run(
    out: str | Path | None, resume: bool, settings: dict[str, Any]
) -> tuple[RunFolder | None, dict[str, Any] | None]:
    if out is None:
        if resume:
            raise InputError("resume needs the run folder: give `out`")
        return None, None
    if not resume:
        run = RunFolder.create(out, settings)
        run.lock()
        return run, None
    run, found = RunFolder.open(out)
    run.lock()
    for part, cls in (("sae", SAEConfig), ("train", TrainConfig)):
        # A run of an older version lacks the settings that came later: it had their defaults.
        defaults = {spec.name: spec.default for spec in dataclasses.fields(cls)}
        found["config"][part] = {**defaults, **found["config"][part]}
    for part in ("config", "data"):
        differences = _differences(found[part], settings[part], part)
        if differences:
            raise InputError(
                f"{run.path} was made with other settings:\n  " + "\n  ".join(differences)
            )
    return run, run.load_checkpoint()


FREE_TO_CHANGE = {
    f"config.train.{name}"
    for name in (
        "device",
        "log_every",
        "eval_every",
        "checkpoint_every",
        "keep_checkpoints",
        "tensorboard",
        "wandb",
    )
}


def _differences(found: Any, given: Any, name: str) -> list[str]:
    """Lines "name: was X, is Y" where two nested dicts disagree in what decides the result."""
    if isinstance(found, dict) and isinstance(given, dict):
        keys = sorted(found.keys() | given.keys())
        return [
            line
            for key in keys
            for line in _differences(found.get(key), given.get(key), f"{name}.{key}")
        ]
    return (
        [] if found == given or name in FREE_TO_CHANGE else [f"{name}: was {found!r}, is {given!r}"]
    )


def resolve_device(name: str) -> torch.device:
    """The device of a name; "auto" is cuda where there is one. Raises InputError if it is not."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("expected cpu or cuda")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _check_heldout(heldout: Heldout, config: SAEConfig) -> None:
    if (heldout.targets is None) != (config.d_target == 0):
        raise InputError(
            "heldout: expected inputs with their targets, as in training"
            if config.d_target
            else "heldout: expected no targets, as training has none"
        )
    widths = {"activations": (heldout.activations, config.d_model)}
    if heldout.targets is not None:
        widths["targets"] = heldout.targets, config.d_target
        if len(heldout.targets) != len(heldout.activations):
            raise InputError(
                f"heldout: expected a target for each of {len(heldout.activations)} activations, "
                f"got {len(heldout.targets)}"
            )
    for name, (x, width) in widths.items():
        if x.ndim != 2 or x.shape[1] != width or x.shape[0] < 2 or not x.is_floating_point():
            raise InputError(
                f"heldout: expected floating {name} [t, {width}], at least two of them, got "
                f"{list(x.shape)} {x.dtype}"
            )
        if not _is_finite(x):
            raise InputError(f"heldout: some {name} are NaN or infinite")
        if (x == x[0]).all():
            raise InputError(f"heldout: all {name} are equal, so nothing can be explained")


def _as_source(activations: Activations, config: TrainConfig) -> ActivationSource:
    pair = isinstance(activations, tuple) and len(activations) == 2
    if isinstance(activations, Tensor) or pair and isinstance(activations[0], Tensor):
        return TensorActivations(activations, config.batch_size, config.seed)
    if hasattr(activations, "state_dict") and hasattr(activations, "d_model"):
        return activations
    return IterableActivations(activations)


def _with_widths(config: SAEConfig, source: ActivationSource) -> SAEConfig:
    found = {"d_model": source.d_model, "d_target": getattr(source, "d_target", 0)}
    for name, width in found.items():
        configured = getattr(config, name)
        if configured not in (0, width):
            raise InputError(f"{name}: {configured} is configured, the data has {width or 'none'}")
    return dataclasses.replace(config, **found)
