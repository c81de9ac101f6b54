"""Autoencoders that learn together from one stream: what each has, and what they share."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kronsae.config import SAEConfig, TrainConfig
from kronsae.errors import InputError
from kronsae.interop.load import load
from kronsae.model.sae import SAE, made_of
from kronsae.runs.folder import RunFolder, SweepFolder
from kronsae.runs.logs import Log
from kronsae.runs.sweep import markdown
from kronsae.system import checkpoint
from kronsae.system.devices import Clock
from kronsae.system.parallel import ALONE, Mesh
from kronsae.training.learner import Learner, Skipped
from kronsae.training.signals import Stop
from kronsae.training.stream import Stream


class Diverged(InputError):
    """No member has a finite gradient any more."""


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


@dataclasses.dataclass(frozen=True)
class MemberPlan:
    """What is to be made: one member."""

    name: str
    sae: SAEConfig
    train: TrainConfig
    settings: dict[str, Any]


class Member:
    """One SAE that learns: its learner, its run folder, its log, and in the end its result.

    owner: the rank that trains it alone, of which the others hear in `Session.sync`; None if all
        ranks of the mesh train it together.
    """

    def __init__(
        self,
        plan: MemberPlan,
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
        self.clock = Clock(device)
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


class Session:
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
        self.members: dict[str, Member] = {}

    @property
    def live(self) -> list[Member]:
        """The members that still learn, as far as this rank knows."""
        return [m for m in self.members.values() if m.result is None and m.failed is None]

    @property
    def own(self) -> list[Member]:
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

    def signal(self, stop: Stop) -> int | None:
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
