"""`fit` and `fit_many`: train SAEs on one stream of activations, with logs and checkpoints."""

import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from kronsae import checkpoint
from kronsae.config import DataConfig, SAEConfig, TrainConfig
from kronsae.data import (
    ActivationSource,
    IterableActivations,
    TensorActivations,
)
from kronsae.data.common import Interrupted, digest
from kronsae.errors import InputError
from kronsae.evaluate import Heldout, evaluate, evaluate_cross_entropy
from kronsae.learner import Learner, Skipped, check_step
from kronsae.logs import Log, check_packages
from kronsae.parallel import ALONE, Mesh, RankLost, join, owners
from kronsae.run import SINGLE, RunFolder, SweepFolder, open_to_resume
from kronsae.sae import SAE, load, made_of
from kronsae.stream import DataEnded, Stream, is_finite
from kronsae.sweep import check_names, markdown, one_stream


@dataclasses.dataclass(frozen=True)
class FitResult:
    """What a training run gives."""

    sae: SAE | None
    """The trained SAE, of raw activations. None where another process has trained it alone (`share`
    "members"): it is in the run folder."""
    tokens: int
    """Tokens trained on."""
    metrics: dict[str, float]
    """Final figures on held-out activations; empty without any."""
    history: list[dict[str, Any]]
    """The logged records of this call, as in metrics.jsonl."""
    stopped_by: int | None
    """Number of the signal that ended the run early, or None."""
    failed: str | None = None
    """Why this member of a sweep ended before the others, or None."""
    step_ms: float = 0.0
    """Mean time of an optimizer step of this SAE alone, in this call."""


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
    mesh: Mesh | None = None,
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
    mesh: of the processes that train together; by default that of torchrun (`kronsae.parallel`).
        Each of them calls this with the same arguments, and takes its own part of the batches, or,
        with `share` "members", of the SAEs of `fit_many`. The first one alone writes, and calls
        `on_record`.

    On SIGTERM or SIGINT the step in progress is finished, a checkpoint saved, and the result
    returned with `stopped_by`. A batch whose gradient is not finite is skipped, and logged as such.
    Raises InputError if that happens `learner.SKIPS` times in a row, and if the data ends before
    the budget, is not finite, or does not fit the configuration; with `out`, the last good
    checkpoint is kept.
    """
    [result] = _fit(
        [_Plan(SINGLE, sae_config, train_config or TrainConfig(), settings or {})],
        activations,
        heldout,
        out,
        resume,
        (lambda _, entry: on_record(entry)) if on_record else None,
        mesh,
        sweep=False,
    )
    return result


def fit_many(
    sae_configs: Sequence[SAEConfig],
    activations: Tensor | ActivationSource | Iterable[Tensor],
    train_configs: TrainConfig | Sequence[TrainConfig] | None = None,
    *,
    names: Sequence[str] | None = None,
    heldout: Heldout | Tensor | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    settings: Sequence[dict[str, Any]] | None = None,
    on_record: Callable[[str, dict[str, Any]], None] | None = None,
    mesh: Mesh | None = None,
) -> list[FitResult]:
    """Train any number of SAEs on the same batches, each as `fit` alone would, bit for bit.

    train_configs: one for all, or one each; they may differ in what `kronsae.sweep.OWN` names. The
        order of the data is the first member's, `seed` draws each member's weights.
    names: of the members, and of their run folders in `out` (default: "sae-0", "sae-1", ...).
    out: sweep folder (see `kronsae.run`).  settings: for each, as in `fit`.
    on_record: called with the member's name and each logged record.
    Of several processes each trains all SAEs on its part of the tokens or heads, or, with `share`
    "members", every R-th SAE on all tokens.
    The rest is as in `fit`. Every step, each SAE in turn learns from the batch; the mean and scale
    of the activations, and what does not depend on an SAE in the evaluation, is computed once.

    A member with `learner.SKIPS` gradients in a row that are not finite ends there, with the
    weights of the last step (its result has `failed`), and the others go on. Returns the results in
    order. Raises InputError as `fit` does, if the members cannot share a stream, or if all of them
    failed.
    """
    count = len(sae_configs)
    if train_configs is None or isinstance(train_configs, TrainConfig):
        train_configs = [train_configs or TrainConfig()] * count
    names = [f"sae-{i}" for i in range(count)] if names is None else list(names)
    settings = [{}] * count if settings is None else settings
    lengths = {len(train_configs), len(names), len(settings)}
    if not count or lengths != {count}:
        raise InputError(
            f"fit_many: expected one SAE or more, and as many of everything, got {count} SAEs, "
            f"{len(train_configs)} train_configs, {len(names)} names, {len(settings)} settings"
        )
    check_names(names)
    members = zip(names, sae_configs, one_stream(train_configs), settings, strict=True)
    plans = [_Plan(*member) for member in members]
    return _fit(plans, activations, heldout, out, resume, on_record, mesh, sweep=True)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is to be made: one member."""

    name: str
    sae: SAEConfig
    train: TrainConfig
    settings: dict[str, Any]


def _fit(
    plans: list[_Plan],
    activations: Tensor | ActivationSource | Iterable[Tensor],
    heldout: Heldout | Tensor | None,
    out: str | Path | None,
    resume: bool,
    on_record: Callable[[str, dict[str, Any]], None] | None,
    mesh: Mesh | None,
    sweep: bool,
) -> list[FitResult]:
    """`fit` and `fit_many`: they differ in the folders that they write, and in nothing else."""
    config = plans[0].train  # what all share
    device = resolve_device(config.device)
    mesh = mesh or join(config.tensor_parallel, device, config.rank_timeout)
    layout = mesh.data.size, mesh.heads.size
    owned = owners([plan.name for plan in plans], config.share, layout)
    for plan in plans:
        mesh.check(plan.sae)
    source = _as_source(activations, config)
    if isinstance(heldout, Tensor):
        heldout = (heldout,)
    if isinstance(heldout, tuple):
        flat = [part.detach().reshape(-1, part.shape[-1]) for part in heldout]
        heldout = Heldout(flat[0], targets=flat[1] if len(flat) == 2 else None)
    plans = [_complete(plan, source) for plan in plans]
    of_one = (1, 1) if owned else layout
    not_fused = [check_step(plan.sae, plan.train, device, of_one) for plan in plans]
    if heldout is not None:
        _check_heldout(heldout, plans[0].sae)
    check_packages(config)
    _check_same([plan.settings for plan in plans], mesh)
    folder, state = _open(out, resume, {p.name: p.settings for p in plans}, sweep, mesh, owned)
    stream = Stream(source, config.tokens, device)
    session = _Session(stream, config, folder, mesh, bool(owned), any(not_fused))
    try:
        for plan in plans:
            owner = owned.get(plan.name)
            session.members[plan.name] = _Member(plan, device, folder, on_record, mesh, owner)
        if state is not None:
            session.load_state_dict(state)
        _train_and_judge(session, heldout)
    finally:
        session.close()
    return [member.result for member in session.members.values()]


def _train_and_judge(session: "_Session", heldout: Heldout | None) -> None:
    """Train all members, evaluate them, and save what they have learned, whatever happens."""
    stream = session.stream
    try:
        with _signals(session.interrupt) as stop:
            _train(session, heldout, stop)
        stopped_by = session.signal(stop)
        stream.close()
        if stopped_by is None and heldout is not None:
            for member in session.own:
                member.metrics = _judge(member.sae(stream), heldout)
                member.record("final", member.metrics, stream)
        session.sync()
        for member in session.live:
            member.finish(stream, stopped_by)
        session.note()
    except InputError as error:
        raise InputError("\n".join([str(error), *_rescue(session, error)])) from error


class Diverged(InputError):
    """No member has a finite gradient any more."""


def _rescue(session: "_Session", error: InputError) -> list[str]:
    """Save what was learned before an error, if that works; says where it is, and how to go on."""
    stream, folder = session.stream, session.folder
    problem = None
    try:
        if stream.steps:
            session.sync()
            for member in session.live:
                member.finish(stream)
        learned = max((m.result.tokens for m in session.members.values() if m.result), default=0)
        if learned:
            session.note()
    except InputError as other:  # the disk is full, say, and that was the first error, too
        problem = other
    if folder is None:
        return []
    where = folder.path if isinstance(folder, SweepFolder) else folder.sae
    saved = problem is None and learned
    lines = [f"What was learned in {learned:,} tokens is in {where}"] if saved else []
    if not isinstance(error, DataEnded | Diverged):  # to go on would end alike
        alone = next(iter(session.members.values())).settings["config"]["data"] is None
        command = f"python -m kronsae.train --resume {folder.path}"
        if alone:
            command = f"fit(..., out={str(folder.path)!r}, resume=True)"
        found = checkpoint.list_checkpoints(folder.checkpoints)
        place = (
            f"the checkpoint of step {checkpoint.step_of(found[-1]):,}" if found else "the start"
        )
        if problem is not None:
            lines.append(f"What was learned since {place} could not be saved")
        lines.append(f"When that is solved, go on from {place}:\n  {command}")
    return lines


def _train(session: "_Session", heldout: Heldout | None, stop: "_Stop") -> None:
    """The loop: batch, steps, log, evaluate, checkpoint, until the budget is used or a signal."""
    stream, config = session.stream, session.config
    saved_at = stream.steps
    # A signal before the first step waits for it: there would be nothing to save.
    while not stream.done and (not stream.steps or session.signal(stop) is None):
        try:
            batch = stream.next()
        except Interrupted:
            break
        except DataEnded:
            if stream.steps > saved_at:
                session.save()
            raise
        step = stream.steps
        log = step % config.log_every == 0 or stream.done
        if log or session.waits:
            stream.check()
        for member in session.own:
            member.step(*batch, stream, log)
        if log:
            rates = stream.rates()
            for member in session.own:
                if member.figures:  # the batch was not skipped
                    member.record("train", member.figures | rates, stream)
        evaluated = heldout is not None and config.eval_every and step % config.eval_every == 0
        if evaluated and not stream.done:
            for member in session.own:
                member.record("heldout", evaluate(member.sae(stream), heldout), stream)
        if session.is_sync_step:
            session.sync()
            session.check_live()
        if config.checkpoint_every and step % config.checkpoint_every == 0 and not stream.done:
            session.save()
            saved_at = step
    if stream.steps > saved_at:
        session.save()


def _judge(sae: SAE, heldout: Heldout) -> dict[str, float]:
    return evaluate(sae, heldout) | evaluate_cross_entropy(sae, heldout)


class _Member:
    """One SAE that learns: its learner, its run folder, its log, and in the end its result.

    owner: the rank that trains it alone, of which the others hear in `_Session.sync`; None if all
        ranks of the mesh train it together.
    """

    def __init__(
        self,
        plan: _Plan,
        device: torch.device,
        folder: RunFolder | SweepFolder | None,
        on_record: Callable[[str, dict[str, Any]], None] | None,
        mesh: Mesh,
        owner: int | None,
    ) -> None:
        self.mesh = mesh
        self.owner = owner
        self.name = plan.name
        self.settings = plan.settings
        self.on_record = on_record
        self.run = folder.runs[plan.name] if folder else None
        group = folder.path.name if isinstance(folder, SweepFolder) else None
        self.log = Log(self.run, plan.train, plan.settings, group) if mesh.first else None
        self.mine = owner in (None, mesh.world.rank)
        self.learner: Learner | None = None
        if self.mine:
            self.learner = Learner(plan.sae, plan.train, device, mesh if owner is None else ALONE)
        self.figures: dict[str, float] = {}  # of the last step
        self.metrics: dict[str, float] = {}  # final ones
        self.history: list[dict[str, Any]] = []
        self.unsent: list[dict[str, Any]] = []  # records that other ranks lack
        self.clock = _Clock(device)
        self.failed: str | None = None
        self.result: FitResult | None = None

    def step(self, x: Tensor, target: Tensor | None, stream: Stream, log: bool) -> None:
        """One optimizer step on a normalised batch; it has `failed` if it diverges.

        log: whether its figures are to be logged.
        """
        if log:
            self.settle(stream)
            if self.failed is not None:
                return
        try:
            with self.clock:
                figures = self.learner.step(x, target, log)
        except FloatingPointError as error:  # the weights are still those of the step before
            self.failed = str(error)
            return
        if isinstance(figures, Skipped):
            self.record("skipped", figures._asdict(), stream)
            self.figures = {}
        else:
            self.figures = figures or {}
        # The next member's gradients take the place of these.
        self.learner.optimizer.zero_grad(set_to_none=True)

    def settle(self, stream: Stream) -> None:
        """Record batches that were skipped without a word; it has `failed` if it diverged."""
        try:
            skipped = self.learner.settle()
        except FloatingPointError as error:
            self.failed = str(error)
            return
        if skipped is not None:
            self.record("skipped", skipped._asdict(), stream)

    def record(self, kind: str, values: dict[str, float], stream: Stream) -> None:
        entry = {"kind": kind, **stream.position(), **values}
        if self.owner is None:
            with self.mesh.world.together():
                self.write([entry])
        else:
            self.unsent.append(entry)

    def write(self, entries: list[dict[str, Any]]) -> None:
        """Take records into the history; the first rank also logs them."""
        self.history += entries
        for entry in entries if self.mesh.first else ():
            self.log(entry)
            if self.on_record:
                self.on_record(self.name, entry)

    def sae(self, stream: Stream) -> SAE:
        """The SAE as it stands, of raw activations."""
        of_target = stream.target_normalizer
        self.learner.confirm()
        return self.learner.sae.folded(
            stream.normalizer.mean,
            stream.normalizer.scale,
            None if of_target is None else (of_target.mean, of_target.scale),
        )

    def finish(self, stream: Stream, stopped_by: int | None = None) -> None:
        """Save the SAE, make the result, and let go of the learner; all ranks do so together."""
        if stream.normalizer is None:
            raise InputError("no step was made: there is no SAE to save")
        sae, ending = None, None
        if self.mine:
            sae = self.sae(stream)
            ending = {
                "tokens": self.learner.tokens,
                "metrics": self.metrics,
                "step_ms": self.clock.mean_ms,
            }
        ending = self._save(sae, ending)
        self.result = FitResult(
            sae, history=self.history, stopped_by=stopped_by, failed=self.failed, **ending
        )
        self.learner = None

    def _save(self, sae: SAE | None, ending: dict[str, Any] | None) -> dict[str, Any]:
        """Write the SAE that its owner has to the run folder, if there is one; gives `ending`."""
        if self.owner is not None:
            if sae is not None:
                parts = {"config": dataclasses.asdict(sae.config), "weights": sae.state_dict()}
                ending |= parts if self.run is not None else {}
            ending = checkpoint.state_of(self.owner, ending, self.mesh.world)
            config, weights = ending.pop("config", None), ending.pop("weights", None)
        if self.run is None:
            return ending
        facts = {**self.settings, "tokens": ending["tokens"], "metrics": ending["metrics"]}
        facts |= {"failed": self.failed} if self.failed else {}
        if self.owner is None:
            sae.save(self.run.sae, facts)
            return ending
        with self.mesh.world.together():
            if self.mesh.first:
                sae = sae or made_of(SAEConfig(**config), weights, self.run.sae)
                sae.save(self.run.sae, facts)
        return ending

    def restore_failed(self, message: str) -> None:
        """Take over the result of an earlier session, in which this member failed."""
        with self.mesh.world.together():
            sae = load(self.run.sae)
        sae, tokens = sae if self.mine else None, sae.metadata["tokens"]
        self.result = FitResult(sae, tokens, {}, [], None, message)
        self.learner = None


class _Clock:
    """Mean time of what runs inside, on a device that may be behind the host.

    On a card the time between two events of its own: nobody waits for it before somebody asks.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds, self.count = 0.0, 0
        self.began: Any = None
        self.pending: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def __enter__(self) -> None:
        self.began = self._now()

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is not None:
            return
        self.count += 1
        if self.device.type != "cuda":
            self.seconds += time.monotonic() - self.began
            return
        self.pending.append((self.began, self._now()))
        while self.pending and self.pending[0][1].query():
            self._take()

    def _take(self) -> None:
        began, ended = self.pending.pop(0)
        self.seconds += began.elapsed_time(ended) / 1e3

    @property
    def mean_ms(self) -> float:
        if self.pending:
            self.pending[-1][1].synchronize()
        while self.pending:
            self._take()
        return 1e3 * self.seconds / max(1, self.count)


class _Session:
    """The stream and all members, and how they are saved together.

    owned: whether each member has one rank that trains it alone. Such ranks `sync` in some steps.
    waits: whether the steps of any member wait for the device.
    """

    def __init__(
        self,
        stream: Stream,
        config: TrainConfig,
        folder: RunFolder | SweepFolder | None,
        mesh: Mesh,
        owned: bool,
        waits: bool,
    ) -> None:
        self.mesh = mesh
        self.owned = owned
        self.waits = waits
        self.stream = stream
        self.config = config
        self.folder = folder
        self.members: dict[str, _Member] = {}

    @property
    def live(self) -> list[_Member]:
        """The members that still learn, as far as this rank knows."""
        return [m for m in self.members.values() if m.result is None and m.failed is None]

    @property
    def own(self) -> list[_Member]:
        """Those of them that this rank trains, alone or with others."""
        return [member for member in self.live if member.mine]

    @property
    def is_sync_step(self) -> bool:
        """Whether all ranks exchange something after this step."""
        config = self.config
        every = config.log_every, config.eval_every, config.checkpoint_every
        due = any(self.stream.steps % steps == 0 for steps in every if steps)
        return due or self.stream.done or not self.owned

    def sync(self) -> None:
        """Finish the members that have failed. Ranks with members of their own first exchange what
        happened: records, which the first one writes, and failures."""
        if self.owned:
            sent = {m.name: [m.unsent, m.failed] for m in self.members.values() if m.mine}
            received: dict[str, Any] = {}
            for of_rank in self.mesh.world.exchange(sent):
                received |= of_rank
            for name, member in self.members.items():
                member.unsent, member.failed = [], received[name][1]
            with self.mesh.world.together():
                for name, member in self.members.items():
                    member.write(received[name][0])
        for member in self.members.values():
            if member.failed is not None and member.result is None:
                member.finish(self.stream)

    def signal(self, stop: "_Stop") -> int | None:
        """The signal that any process has received, so that all stop after the same step."""
        if not self.is_sync_step:
            return None
        return int(self.mesh.world.max(torch.tensor(stop.received or 0))) or None

    def interrupt(self) -> None:
        """Let the stream wait no longer; among processes each would be left at another place."""
        if self.mesh.world.size == 1:
            self.stream.interrupt()

    def check_live(self) -> None:
        """Raise Diverged if no member learns any more."""
        if not self.live:
            raise Diverged("\n".join(m.result.failed for m in self.members.values()))

    def save(self) -> None:
        """Write a checkpoint, of steps that are known to be good."""
        self.stream.check()
        for member in self.own:
            member.settle(self.stream)
        self.sync()
        self.check_live()
        if self.folder is not None:
            state = {
                "stream": self.stream.state_dict(),
                "members": {
                    member.name: member.learner.state_dict() if member.mine else None
                    for member in self.live
                },
                "failed": {
                    name: member.result.failed
                    for name, member in self.members.items()
                    if member.result is not None
                },
            }
            self.folder.save_checkpoint(self.stream.steps, state, self.config.keep_checkpoints)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state["stream"])
        for name, own in state["members"].items():
            if self.members[name].mine:
                self.members[name].learner.load_state_dict(own)
        for name, message in state["failed"].items():
            self.members[name].restore_failed(message)

    def note(self) -> None:
        """Write a sweep's table, once all members have ended."""
        if isinstance(self.folder, SweepFolder) and self.mesh.first:
            endings = {
                name: {
                    "config": member.settings["config"],
                    "tokens": member.result.tokens,
                    "metrics": member.result.metrics,
                    "step_ms": member.result.step_ms,
                    "stopped_by": member.result.stopped_by,
                    "failed": member.result.failed,
                }
                for name, member in self.members.items()
            }
            self.folder.note(endings, markdown(endings))

    def close(self) -> None:
        self.stream.close()
        for member in self.members.values():
            if member.log is not None:
                member.log.close()
        if self.folder is not None:
            self.folder.release()


def _complete(plan: _Plan, source: ActivationSource) -> _Plan:
    """With the width of the activations, and everything that config.json holds."""
    sae = _with_widths(plan.sae, source)
    config = {
        "sae": dataclasses.asdict(sae),
        "data": None,
        "train": dataclasses.asdict(plan.train),
    }
    settings = {"config": config, "data": source.describe(), **plan.settings}
    return dataclasses.replace(plan, sae=sae, settings=settings)


def _check_same(settings: list[dict[str, Any]], mesh: Mesh) -> None:
    """Raise InputError unless all processes were given the same activations and settings."""
    if len(set(mesh.world.exchange(digest(settings)))) > 1:
        raise InputError(
            "the processes of this training were given different activations or settings: each "
            "has to get the same, and takes its own part of the batches"
        )


@dataclasses.dataclass
class _Stop:
    received: int | None = None


@contextmanager
def _signals(interrupt: Callable[[], None]) -> Iterator[_Stop]:
    """Note the first SIGTERM or SIGINT, and interrupt, instead of dying; a second acts as usual."""
    stop = _Stop()
    earlier: dict[int, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        stop.received = number
        interrupt()
        for each, handler in earlier.items():
            signal.signal(each, handler)
        name = signal.Signals(number).name
        words = f"\n{name}: finishing this step and saving (again to stop at once)"
        with suppress(RuntimeError):  # it came in the middle of another print
            print(words, file=sys.stderr)

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            earlier[number] = signal.signal(number, handle)
    except ValueError:  # not in the main thread: signals are somebody else's business
        pass
    try:
        yield stop
    except RankLost:
        usual = earlier.get(stop.received)
        if signal.SIGTERM in earlier:  # torchrun now ends the others: let them say why first
            earlier[signal.SIGTERM] = signal.SIG_IGN
        if callable(usual):  # the others were stopped at once, and so is this one
            usual(stop.received, None)
        raise
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _open(
    out: str | Path | None,
    resume: bool,
    settings: dict[str, dict[str, Any]],
    sweep: bool,
    mesh: Mesh,
    owned: dict[str, int],
) -> tuple[RunFolder | SweepFolder | None, dict[str, Any] | None]:
    """The folder to train in, locked by the first process, and the state to go on from.

    owned: which rank trains a member alone, and needs its state.
    """
    if out is None:
        if resume:
            raise InputError("resume needs the run folder: give `out`")
        return None, None
    folder, state = None, None
    try:
        for turn in (True, False):  # the others find what the first one leaves
            with mesh.world.together():
                if mesh.first is turn:
                    folder = (
                        _claim(out, resume, settings, sweep) if turn else open_to_resume(out)[0]
                    )
                    folder.share(mesh, owned)
                    state = folder.load_checkpoint() if resume else None
    except InputError:
        if folder is not None:
            folder.release()
        raise
    return folder, state


def _claim(
    out: str | Path, resume: bool, settings: dict[str, dict[str, Any]], sweep: bool
) -> RunFolder | SweepFolder:
    """The folder, made or found, and locked. Raises InputError if it was made otherwise."""
    if not resume:
        made = SweepFolder.create(out, settings) if sweep else None
        folder = made or RunFolder.create(out, settings[SINGLE])
        folder.lock()
        return folder
    folder, found = open_to_resume(out)
    folder.lock()
    try:
        if found.keys() != settings.keys():
            raise InputError(
                f"{folder.path} has the members {list(found)}, and cannot go on with "
                f"{list(settings)}"
            )
        changed = {name: _other_dtype(each, settings[name]) for name, each in found.items()}
        for name, each in found.items():
            each["data"] = each["data"] | changed[name]
            # A run of an older version lacks the settings that came later: it had their defaults.
            for part, cls in (("sae", SAEConfig), ("data", DataConfig), ("train", TrainConfig)):
                if each["config"][part] is None:  # no language model
                    continue
                defaults = {spec.name: spec.default for spec in dataclasses.fields(cls)}
                each["config"][part] = {**defaults, **each["config"][part]}
        differences = [
            line
            for name in found
            for part in ("config", "data")
            for line in _differences(
                found[name][part], settings[name][part], part, f"{name}: " if sweep else ""
            )
        ]
        if differences:
            raise InputError(
                f"{folder.path} was made with other settings:\n  " + "\n  ".join(differences)
            )
        for name, data in changed.items():
            if data:
                folder.change(name, settings[name]["config"], data)
        return folder
    except InputError:
        folder.release()
        raise


def _other_dtype(found: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """What describes a run's data from now on, if it is resumed with another --model-dtype.

    After NaN in float16, say. Empty if it is not.
    """
    was, now = (each["config"].get("data") for each in (found, given))
    if not was or not now or was.get("model_dtype") == now["model_dtype"]:
        return {}
    # "weights" is a digest of them in the model's dtype.
    return {name: given["data"][name] for name in ("dtype", "weights") if name in given["data"]}


FREE_TO_CHANGE = {
    *(
        f"config.train.{name}"
        for name in (
            *("device", "fused_step", "cuda_graph", "tensor_parallel", "share", "rank_timeout"),
            *("log_every", "eval_every", "checkpoint_every", "keep_checkpoints"),
            *("tensorboard", "wandb"),
        )
    ),
    *(
        f"config.data.{name}"
        for name in (
            "activations",  # the contents are compared, not the place
            *("model_device", "model_dtype", "overlap", "trust_remote_code"),
        )
    ),
}
"""Settings that a run may go on with others of."""


def _differences(found: Any, given: Any, name: str, member: str = "") -> list[str]:
    """Lines "name: was X, is Y" where two nested dicts disagree in what decides the result."""
    if isinstance(found, dict) and isinstance(given, dict):
        keys = sorted(found.keys() | given.keys())
        return [
            line
            for key in keys
            for line in _differences(found.get(key), given.get(key), f"{name}.{key}", member)
        ]
    if found == given or name in FREE_TO_CHANGE:
        return []
    return [f"{member}{name}: was {found!r}, is {given!r}"]


def resolve_device(name: str) -> torch.device:
    """The device of a name; "auto" is cuda where there is one. Raises InputError if it is not."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("expected cpu or cuda")
        if device == torch.device("cuda") and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))  # torchrun's: one each
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
        if not is_finite(x):
            raise InputError(f"heldout: some {name} are NaN or infinite")
        if (x == x[0]).all():
            raise InputError(f"heldout: all {name} are equal, so nothing can be explained")


def _as_source(activations: Activations, config: TrainConfig) -> ActivationSource:
    pair = isinstance(activations, tuple) and len(activations) == 2
    if isinstance(activations, Tensor) or pair and isinstance(activations[0], Tensor):
        return TensorActivations(activations, config.batch_size, config.stream_seed)
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
