"""A training session: a stream, and the members (SAEs) that learn from it together."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from kronsae.config import SAEConfig, TrainConfig
from kronsae.errors import InputError
from kronsae.interop.load import load
from kronsae.metrics.figures import HOPELESS, massive_warning
from kronsae.metrics.heldout import Heldout
from kronsae.model.massive import METADATA
from kronsae.model.sae import SAE, load_metadata, made_of, save_metadata
from kronsae.runs.folder import RunFolder, SweepFolder
from kronsae.runs.logs import Log
from kronsae.runs.sweep import markdown
from kronsae.system import checkpoint
from kronsae.system.devices import Clock
from kronsae.system.documents import Keys, typed
from kronsae.system.files import finite
from kronsae.system.parallel import ALONE, Mesh
from kronsae.training.learner import Learner, Metrics, Skipped
from kronsae.training.signals import Stop
from kronsae.training.start import config_of, normalised, note_of
from kronsae.training.stream import DataEnded, Stream

ENDING = ("tokens", "metrics", "step_ms", "stopped_by", "failed")
"""Fields of a member's result that sweep.json has."""


class Diverged(InputError):
    """Every member has diverged."""


@dataclasses.dataclass(frozen=True)
class FitResult:
    """Result of a training run."""

    sae: SAE | None
    """The trained SAE, of raw activations. None if another process trained it alone (`share`
    "members"): then it is in the run folder."""
    tokens: int
    """Tokens trained on."""
    metrics: dict[str, Any]
    """Final figures on held-out activations (`kronsae.metrics.figures.finite`); empty without any.
    """
    history: list[dict[str, Any]]
    """The logged records of this call, as in metrics.jsonl."""
    stopped_by: int | None
    """Number of the signal that ended the run early, or None."""
    failed: str | None = None
    """A sentence about how training diverged, for which a member of a sweep may have ended before
    the others; None if it did not."""
    step_ms: float = 0.0
    """Mean time of an optimizer step of this SAE alone, in this call."""


@dataclasses.dataclass(frozen=True)
class MemberPlan:
    """Name and settings of a member."""

    name: str
    sae: SAEConfig
    train: TrainConfig
    settings: dict[str, Any]
    """Content of its config.json."""
    hookpoint: str = ""
    """Name of the stream that it learns from; "" if there is one alone."""
    start: SAE | None = None
    """An SAE of raw activations, from whose weights it starts; None: from random ones."""

    @classmethod
    def of(
        cls,
        name: str,
        sae: SAEConfig | SAE,
        train: TrainConfig,
        settings: dict[str, Any],
        hookpoint: str = "",
    ) -> "MemberPlan":
        """A plan to train from random weights, or, given an SAE, from its own."""
        if not isinstance(sae, SAE):
            return cls(name, sae, train, settings, hookpoint)
        settings = {**typed(settings, dict, "settings"), "finetune": note_of(sae)}
        return cls(name, config_of(sae), train, settings, hookpoint, sae)


class Member:
    """One SAE in training: its learner, its run folder, its log, and in the end its result.

    owner: the rank that trains it alone, whose records the others get in `Session.sync`; None if
        all ranks of the mesh train it together.
    stream: what it learns from. (On ranks without it any other one, which is at the same step.)
    """

    def __init__(
        self,
        plan: MemberPlan,
        device: torch.device,
        folder: RunFolder | SweepFolder | None,
        on_record: Callable[[str, dict[str, Any]], None] | None,
        mesh: Mesh,
        owner: int | None,
        stream: Stream,
    ) -> None:
        self.mesh = mesh
        self.stream = stream
        self.hookpoint = plan.hookpoint
        self.owner = owner
        self.name = plan.name
        self.advice = _advice_of(plan)
        self.settings = plan.settings
        self.on_record = on_record
        self.run = folder.runs[plan.name] if folder else None
        group = folder.path.name if isinstance(folder, SweepFolder) else None
        self.log = Log(self.run, plan.train, plan.settings, group) if mesh.first else None
        self.mine = owner in (None, mesh.world.rank)
        self.start = plan.start if self.mine else None
        self._new_learner = functools.partial(
            Learner, config=plan.train, device=device, mesh=mesh if owner is None else ALONE
        )
        self._learner = self._new_learner(plan.sae) if self.mine else None
        self.figures: Metrics = {}  # of the last step
        self.metrics: dict[str, Any] = {}  # final ones
        self.history: list[dict[str, Any]] = []
        self.unsent: list[dict[str, Any]] = []  # records that other ranks lack
        self.clock = Clock(device)
        self.saved = False
        """Whether the run folder has the SAE's weights of now."""
        self.hopeless = False
        """Whether the last batch that was logged is explained worse than `HOPELESS`, or skipped
        like the one before it."""
        self.failed: str | None = None
        self.result: FitResult | None = None

    @property
    def learner(self) -> Learner:
        """The learner, on the ranks whose member it is, until there is a result."""
        assert self._learner is not None
        return self._learner

    def step(self, x: Tensor, target: Tensor | None, log: bool) -> None:
        """One optimizer step on a normalised batch; sets `failed` if it diverges.

        log: True if its figures are to be logged.
        """
        if self.start is not None:
            self._begin(self.start)
        if log:
            self.settle()
            if self.failed is not None:
                return
        try:
            with self.clock:
                figures = self.learner.step(x, target, log)
        except FloatingPointError as error:  # the weights are still those of the step before
            self.diverge(str(error))
            return
        if isinstance(figures, Skipped):
            self.record("skipped", figures._asdict())
            self.figures = {}
            self.hopeless |= self.learner.skipped > 1
        else:
            self.figures = figures or {}
            explained = self.figures.get("explained_variance")
            if explained is not None and len(x) >= self.learner.batch:  # the last one may be cut
                self.hopeless = not explained >= HOPELESS
        # The next member's gradients take the place of these.
        self.learner.optimizer.zero_grad(set_to_none=True)

    def _begin(self, start: SAE) -> None:
        """Take the weights to start from, now that the stream has its normalizers."""
        of_input, of_target = self.stream.normalizer, self.stream.target_normalizer
        assert of_input is not None  # it has given a batch
        sae = normalised(start, self.learner.config, of_input, of_target)
        self._set_eps(sae.config.eps)
        self.learner.start_from(sae)
        self.start = None

    def _set_eps(self, eps: float) -> None:
        """Make the learner anew if its eps has to follow the scale of the activations."""
        config = self.learner.sae.config
        if config.eps != eps:
            self._learner = self._new_learner(dataclasses.replace(config, eps=eps))

    def settle(self) -> None:
        """Record batches skipped in steps that did not log; sets `failed` if it diverged."""
        try:
            skipped = self.learner.settle()
        except FloatingPointError as error:
            self.diverge(str(error))
            return
        if skipped is not None:
            self.record("skipped", skipped._asdict())

    def check(self) -> None:
        """Set `failed` if the weights are not finite; all ranks that train it call this."""
        if not self.learner.is_finite:
            self.diverge("some weights are NaN or infinite: training has diverged")

    def judge(self) -> None:
        """Set `failed` if the SAE is `HOPELESS` in the end, though its gradients were finite.

        Held-out text alone does not decide: a row of it may be enormous.
        """
        explained = self.metrics.get("explained_variance")
        if self.hopeless and (explained is None or explained < HOPELESS):
            told = "" if explained is None else f" (explained variance {explained:,.4g})"
            words = "the last batches" + (f" and held-out text{told}" if self.metrics else "")
            reason = f"{words} are explained no better than by noise: training has diverged"
            self.diverge(reason)

    def diverge(self, reason: str) -> None:
        """Set `failed`, and log it."""
        self.failed = f"step {self.stream.steps:,}: {reason}; try {self.advice}"
        self.record("diverged", {"reason": self.failed})

    def record(self, kind: str, values: Mapping[str, Any]) -> None:
        """Log a record of this step, now or in the next `Session.sync`."""
        entry = {"kind": kind, **self.stream.position(), **finite(values)}
        if self.owner is None:
            with self.mesh.world.together():
                self.write([entry])
        else:
            self.unsent.append(entry)

    def write(self, entries: list[dict[str, Any]]) -> None:
        """Add records to the history; the first rank also logs them."""
        self.history += entries
        if self.log is None:
            return
        for entry in entries:
            self.log(entry)
            if self.on_record:
                self.on_record(self.name, entry)

    def sae(self) -> SAE:
        """The SAE at this point of the training, of raw activations."""
        normalizer, of_target = self.stream.normalizer, self.stream.target_normalizer
        assert normalizer is not None  # once a step was made
        self.learner.confirm()
        target = None if of_target is None else (of_target.mean, of_target.scale)
        return self.learner.sae.folded(normalizer.mean, normalizer.scale, target)

    def finish(self, stopped_by: int | None = None) -> None:
        """Save the SAE, make the result, and drop the learner; all ranks call this together."""
        if self.stream.normalizer is None:
            raise InputError("no step was made: there is no SAE to save")
        sae, ending = self.save()
        self.result = FitResult(
            sae, history=self.history, stopped_by=stopped_by, failed=self.failed, **ending
        )
        self._learner = None

    def save(self) -> tuple[SAE | None, dict[str, Any]]:
        """Save the SAE in the run folder, if there is one; all ranks call this together.

        Gives the SAE, where this rank trains it, and the `_ending`. After the first call it writes
        the metadata alone.
        """
        sae, ending = None, {}
        if self.mine:
            ending = self._ending()
            if self.learner.is_finite:  # else there is nothing to keep
                sae = self.sae()
                sae.metadata = self._facts(ending, self._massive())
        if self.owner is not None:
            return sae, self._save_owned(self.owner, sae, ending)
        if self.run is not None and sae is not None:
            if self.saved:
                with self.mesh.world.together():
                    if self.mesh.first:
                        save_metadata(self.run.sae, sae.metadata)
            else:
                sae.save(self.run.sae)
            self.saved = True
        return sae, ending

    def _save_owned(self, owner: int, sae: SAE | None, ending: dict[str, Any]) -> dict[str, Any]:
        """The ending of a member with an owner, whose SAE the first rank saves."""
        state: dict[str, Any] = {"ending": ending, METADATA: self._massive()}
        if sae is not None and self.run is not None and not self.saved:
            state |= {"config": dataclasses.asdict(sae.config), "weights": sae.state_dict()}
        state = checkpoint.state_of(owner, state, self.mesh.world)
        ending = state["ending"]
        if self.run is not None:
            facts = self._facts(ending, state[METADATA])
            with self.mesh.world.together():
                if self.mesh.first and self.saved:
                    save_metadata(self.run.sae, facts)
                elif self.mesh.first and "config" in state:
                    config = SAEConfig(**state["config"])
                    whole = sae or made_of(config, state["weights"], self.run.sae)
                    whole.save(self.run.sae, facts)
            self.saved = True
        return ending

    def _ending(self) -> dict[str, Any]:
        """Fields of the result that its owner knows."""
        return {
            "tokens": self.learner.tokens,
            "metrics": self.metrics,
            "step_ms": self.clock.mean_ms,
        }

    def _massive(self) -> dict[str, Any] | None:
        """The rule for massive tokens, for the metadata."""
        return None if self.stream.massive is None else self.stream.massive.facts()

    def _facts(self, ending: dict[str, Any], massive: dict[str, Any] | None) -> dict[str, Any]:
        """Metadata of the saved SAE."""
        facts = {
            **self.settings,
            "tokens": ending["tokens"],
            "metrics": ending["metrics"],
            METADATA: massive,
        }
        return facts | ({"failed": self.failed} if self.failed else {})

    def state_dict(self) -> dict[str, Any]:
        """The state of its learner, and what `judge` has to know."""
        eps = self.learner.sae.config.eps
        return {**self.learner.state_dict(), "hopeless": self.hopeless, "eps": eps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        name = f"members.{self.name}"
        self.start = None
        # Which older checkpoints lack, as "hopeless".
        self._set_eps(typed(state.get("eps", self.learner.sae.config.eps), float, f"{name}.eps"))
        self.learner.load_state_dict(state, name)
        self.hopeless = typed(state.get("hopeless", False), bool, f"{name}.hopeless")

    def restore_metrics(self) -> None:
        """Take over the final figures of an earlier session, after which nothing was trained."""
        assert self.run is not None  # it was resumed
        if self.run.sae.exists():
            self.metrics = load_metadata(self.run.sae).get("metrics", {})

    def restore_failed(self, message: str) -> None:
        """Take over the result of an earlier session, in which this member failed."""
        assert self.run is not None  # it was resumed
        with self.mesh.world.together():
            sae = load(self.run.sae) if self.run.sae.exists() else None  # if it was finite
        tokens = sae.metadata["tokens"] if sae else 0
        self.result = FitResult(sae if self.mine else None, tokens, {}, [], None, message)
        self._learner = None


_ENLARGING = {
    "sae": ("eps", "init_scale"),
    "sae.selection_settings": ("l1_coefficient", "gate_coefficient"),
    "train": ("weight_decay", "l0_coefficient", "auxk_coefficient", "balance_coefficient"),
}
"""Settings that make training diverge if they are enormous, by part; at most 3 by default."""


def _advice_of(plan: MemberPlan) -> str:
    """What to try if this training diverges."""
    settings = {
        name: getattr(attrgetter(part)(plan), name, 0)
        for part, names in _ENLARGING.items()
        for name in names
    }
    suspects = {name: value for name, value in settings.items() if value > 3}
    suspects["lr"] = plan.train.lr
    return ", or ".join(f"a smaller {name} than {value:g}" for name, value in suspects.items())


_STATE = Keys(
    {"members": dict[str, Any], "failed": dict[str, str]},
    {"stream": Any, "streams": dict[str, Any]},
)


@dataclasses.dataclass
class Session:
    """The streams and all members, and how they are saved together.

    All streams give as many batches, of the same tokens at each hookpoint.
    """

    streams: dict[str, Stream]
    """By hookpoint; with several processes those alone that this one's members learn from."""
    config: TrainConfig
    folder: RunFolder | SweepFolder | None
    mesh: Mesh
    owned: bool
    """True if each member has one rank that trains it alone. Ranks then `sync` in some steps."""
    waits: bool
    """True if the steps of any member wait for the device."""
    heldout: dict[str, Heldout] | None = None
    """By hookpoint."""
    on_judged: Callable[[int, int], None] = lambda done, total: None
    members: dict[str, Member] = dataclasses.field(default_factory=dict)

    @property
    def stream(self) -> Stream:
        """One of the streams, for what is the same in all of them: steps, tokens, the clock."""
        return next(iter(self.streams.values()))

    def next(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        """The next batch of each hookpoint; see `Stream.next`."""
        batches: dict[str, tuple[Tensor, Tensor | None]] = {}
        for name, stream in self.streams.items():
            try:
                batches[name] = stream.next()
            except DataEnded as error:
                if batches:
                    raise InputError(
                        f"hookpoint {name}: {error}, but others go on: give as many for each"
                    ) from error
                raise
        counts = {name: stream.tokens for name, stream in self.streams.items()}
        if len(set(counts.values())) > 1:
            raise InputError(
                f"step {self.stream.steps}: expected batches of the same tokens at each hookpoint, "
                f"got {counts} tokens so far"
            )
        return batches

    def rates(self) -> dict[str, dict[str, float]]:
        """`Stream.rates` by hookpoint; waiting for activations is that for all of them."""
        rates = {name: stream.rates() for name, stream in self.streams.items()}
        waited = min(1.0, sum(each["wait_share"] for each in rates.values()))
        return {name: each | {"wait_share": waited} for name, each in rates.items()}

    def judged_on(self, hookpoint: str) -> Heldout:
        """The held-out activations, of which figures leave out massive ones, as training does."""
        assert self.heldout is not None
        heldout = self.heldout[hookpoint]
        if heldout.counted is None and heldout.massive is None:
            stream = self.streams[hookpoint]
            heldout = self.heldout[hookpoint] = heldout.leaving_out(stream.massive, stream.counted)
        return heldout

    @property
    def live(self) -> list[Member]:
        """The members that still learn, as far as this rank knows."""
        return [m for m in self.members.values() if m.result is None and m.failed is None]

    @property
    def own(self) -> list[Member]:
        """The live members that this rank trains, alone or with others."""
        return [member for member in self.live if member.mine]

    @property
    def results(self) -> dict[str, FitResult]:
        """The results of the members that have ended."""
        return {name: m.result for name, m in self.members.items() if m.result is not None}

    @property
    def is_sync_step(self) -> bool:
        """True if all ranks exchange something after this step."""
        stream, config = self.stream, self.config
        every = config.log_every, config.eval_every, config.checkpoint_every
        return any(map(stream.due, every)) or stream.done or not self.owned

    def sync(self) -> None:
        """Finish the members that have failed. Ranks with members of their own first exchange
        records, which the first one writes, and failures."""
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
                member.finish()

    def signal(self, stop: Stop) -> int | None:
        """The signal that any process has received, so that all stop after the same step."""
        if not self.is_sync_step:
            return None
        return int(self.mesh.world.max(torch.tensor(stop.received or 0))) or None

    def interrupt(self) -> None:
        """Interrupt the stream. Not with several processes, which would stop at different steps."""
        if self.mesh.world.size == 1:
            self.stream.interrupt()

    def check_live(self) -> None:
        """Raise Diverged if no member learns any more."""
        if not self.live:
            prefix = "{}: " if isinstance(self.folder, SweepFolder) or len(self.members) > 1 else ""
            lines = (prefix.format(n) + str(r.failed) for n, r in self.results.items())
            raise Diverged("\n".join(lines))

    def check(self) -> None:
        """Raise InputError if a batch of any stream was not finite; see `Stream.check`."""
        for stream in self.streams.values():
            stream.check()

    def save(self) -> None:
        """Write a checkpoint, once all steps are known to be good."""
        self.check()
        for member in self.own:
            member.settle()
            if member.failed is None:
                member.check()
        self.sync()
        self.check_live()
        if self.folder is not None:
            streams = {name: stream.state_dict() for name, stream in self.streams.items()}
            state = {
                **({"stream": streams[""]} if "" in streams else {"streams": streams}),
                "members": {
                    member.name: member.state_dict() if member.mine else None
                    for member in self.live
                },
                "failed": {name: result.failed for name, result in self.results.items()},
            }
            self.folder.save_checkpoint(self.stream.steps, state, self.config.keep_checkpoints)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the newest checkpoint's state. Raises InputError, which names a wrong key."""
        assert self.folder is not None  # it was resumed
        try:
            self._load(typed(state, _STATE, ""))
        except InputError as error:
            place = checkpoint.list_checkpoints(self.folder.checkpoints)[-1]
            raise InputError(f"checkpoint {place} cannot be gone on from: {error}") from error

    def _load(self, state: dict[str, Any]) -> None:
        if {*state["members"], *state["failed"]} != self.members.keys():
            raise InputError(
                f"members: expected {list(self.members)}, got {list(state['members'])}"
            )
        streams = state.get("streams", {"": state.get("stream")})
        for name, stream in self.streams.items():
            stream.load_state_dict(streams.get(name))
        for name, own in state["members"].items():
            if self.members[name].mine:
                self.members[name].load_state_dict(own)
                if self.stream.done and not self.config.final_evaluation:
                    self.members[name].restore_metrics()
        for name, message in state["failed"].items():
            self.members[name].restore_failed(message)

    def note(self) -> None:
        """Write a sweep's table, once all members have ended."""
        if isinstance(self.folder, SweepFolder) and self.mesh.first:
            endings = {}
            for name, result in self.results.items():
                ending = {field: getattr(result, field) for field in ENDING}
                before = self.folder.document["members"][name].get("step_ms", 0.0)
                ending["step_ms"] = result.step_ms or before  # resumed, and no step was left
                endings[name] = {"config": self.members[name].settings["config"], **ending}
            warnings = (massive_warning(result.metrics) for result in self.results.values())
            warning = next(filter(None, warnings), None)
            self.folder.note(endings, markdown(endings, warning))

    def close(self) -> None:
        for stream in self.streams.values():
            stream.close()
        for member in self.members.values():
            if member.log is not None:
                member.log.close()
        if self.folder is not None:
            self.folder.release()
