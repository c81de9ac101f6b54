"""`fit` and `fit_many`: train SAEs on one stream of activations, with logs and checkpoints."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from kronsae.config import SAEConfig, TrainConfig
from kronsae.data import ActivationSource, IterableActivations, TensorActivations
from kronsae.data.activations import Pair
from kronsae.data.common import BadImage, Interrupted, digest
from kronsae.errors import InputError
from kronsae.metrics.heldout import (
    Heldout,
    as_heldout,
    check_heldout,
    evaluate,
    evaluate_cross_entropy,
)
from kronsae.model.ranks import check_heads
from kronsae.model.sae import SAE
from kronsae.registry import command_line
from kronsae.runs.folder import RUN, SINGLE, SweepFolder
from kronsae.runs.logs import check_packages
from kronsae.runs.resume import open_folder
from kronsae.runs.sweep import check_names, one_stream
from kronsae.system import checkpoint
from kronsae.system.devices import resolve_device
from kronsae.system.documents import to_json, typed
from kronsae.system.files import finite, usable_path
from kronsae.system.parallel import Mesh, join, owners
from kronsae.system.tensors import check_room
from kronsae.training.learner import check_step
from kronsae.training.session import Diverged, FitResult, Member, MemberPlan, Session
from kronsae.training.signals import Stop, note_signals
from kronsae.training.start import check_start
from kronsae.training.stream import DataEnded, Stream

Activations = Tensor | Pair | ActivationSource | Iterable[Tensor | Pair]
HeldoutActivations = Heldout | Tensor | Pair


def fit(
    sae: SAEConfig | SAE,
    activations: Activations,
    train_config: TrainConfig | None = None,
    *,
    heldout: HeldoutActivations | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    settings: dict[str, Any] | None = None,
    on_record: Callable[[dict[str, Any]], None] | None = None,
    mesh: Mesh | None = None,
) -> FitResult:
    """Train an SAE on activations; see the fields of `SAEConfig` and `TrainConfig`.

    sae: a configuration, whose weights are drawn, or an SAE of raw activations (such as `load`
        gives) that is trained on: a copy of it, which starts out computing the same.
    activations: [N, d] (shuffled each epoch), or an iterable of [B, d] tensors taken as they come,
        or any `kronsae.data.ActivationSource`. Arrays of numpy will do for tensors.
        For a transcoder: a pair (inputs [N, d], targets [N, d_target]), or an iterable of pairs.
    heldout: activations to evaluate on, never trained on: [t, d], or a pair, or a `Heldout`.
    out: run folder (see `kronsae.runs.folder`); None keeps everything in memory.
    resume: go on from the newest checkpoint in `out`; batches and weights are, bit for bit, those
        of an uninterrupted run (on a CPU; an iterable must give the same batches again). Once there
        is a checkpoint, a configuration will do in place of the SAE that it started from.
    settings: more entries of config.json.  on_record: called with each logged record.
    mesh: the processes that train together; by default those of torchrun
        (`kronsae.system.parallel`). All of them call this with the same arguments. Each takes its
        part of the batches, or, with `share` "members", of the SAEs of `fit_many`. Only the first
        one writes files and calls `on_record`.

    On SIGTERM, SIGINT or SIGHUP the step in progress is finished, a checkpoint saved, and the
    result returned with `stopped_by`. A batch whose gradient is not finite is skipped, and logged
    as such. Raises Diverged if that happens `learner.SKIPS` times in a row; training that diverged
    with finite gradients ends with a result that has `failed`.
    Raises InputError if the data ends before the budget, is not finite, or does not fit the
    configuration; with `out`, the last good checkpoint is kept. Arguments that cannot work, and an
    SAE that does not fit the free memory, raise it before anything is allocated or written.
    """
    typed(on_record, Callable | None, "on_record")
    [result] = fit_members(
        [MemberPlan.of(SINGLE, sae, train_config or TrainConfig(), settings or {})],
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
    saes: Sequence[SAEConfig | SAE],
    activations: Activations | Mapping[str, Activations],
    train_configs: TrainConfig | Sequence[TrainConfig] | None = None,
    *,
    names: Sequence[str] | None = None,
    hookpoints: Sequence[str] | None = None,
    heldout: HeldoutActivations | Mapping[str, HeldoutActivations] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    settings: Sequence[dict[str, Any]] | None = None,
    on_record: Callable[[str, dict[str, Any]], None] | None = None,
    mesh: Mesh | None = None,
) -> list[FitResult]:
    """Train any number of SAEs on the same batches, each as `fit` alone would, bit for bit.

    train_configs: one for all, or one each; they may differ in the settings that
        `kronsae.runs.sweep.own_settings` lists. The order of the data is the first member's; `seed`
        draws each member's weights.
    names: of the members, and of their run folders in `out` (default: "sae-0", "sae-1", ...).
    hookpoints: for a suite, which has activations of several hookpoints: `activations` and
        `heldout` are mappings then, by names, and these are the names that each SAE learns from.
        In every step each hookpoint gives a batch of the same tokens. (Tensors of as many rows are
        shuffled alike.)
    out: sweep folder (see `kronsae.runs.folder`).  settings: for each, as in `fit`.
    on_record: called with the member's name and each logged record.
    With several processes each trains all SAEs on its part of the tokens or heads, or, with `share`
    "members", every R-th SAE on all tokens.
    The rest is as in `fit`. In every step each SAE in turn learns from the batch. The mean and
    scale of activations, and figures that depend on no SAE, are computed once.

    A member with `learner.SKIPS` gradients in a row that are not finite ends there, with the
    weights of the last step made (its result has `failed`), and the others go on. Returns the
    results in order. Raises InputError as `fit` does, if the members cannot share a stream, or if
    all of them failed.
    """
    count = len(typed(saes, list, "saes"))
    if train_configs is None or isinstance(train_configs, TrainConfig):
        train_configs = [train_configs or TrainConfig()] * count
    train_configs = list(typed(train_configs, list, "train_configs"))
    default = [f"sae-{i}" for i in range(count)]
    names = default if names is None else typed(names, list[str], "names")
    settings = [{}] * count if settings is None else typed(settings, list, "settings")
    hookpoints = [""] * count if hookpoints is None else typed(hookpoints, list[str], "hookpoints")
    lists = {
        "train_configs": train_configs,
        "names": names,
        "settings": settings,
        "hookpoints": hookpoints,
    }
    lengths = {name: len(each) for name, each in lists.items()}
    if not count or set(lengths.values()) != {count}:
        raise InputError(
            f"fit_many: expected one SAE or more, and as many {', '.join(lists)}, got {count} "
            f"SAEs, {', '.join(f'{length} {name}' for name, length in lengths.items())}"
        )
    plans = list(map(MemberPlan.of, names, saes, train_configs, settings, hookpoints))
    return fit_members(plans, activations, heldout, out, resume, on_record, mesh, sweep=True)


def fit_members(
    plans: list[MemberPlan],
    activations: Activations | Mapping[str, Activations],
    heldout: HeldoutActivations | Mapping[str, HeldoutActivations] | None,
    out: str | Path | None,
    resume: bool,
    on_record: Callable[[str, dict[str, Any]], None] | None,
    mesh: Mesh | None,
    sweep: bool,
    on_judged: Callable[[int, int], None] = lambda done, total: None,
) -> list[FitResult]:
    """`fit` or `fit_many`, which differ only in the folders that they write.

    on_record: called with the member's name and each logged record.  on_judged: called in the
    final evaluation with how many batches of contexts are done, and their total.
    """
    if out is not None:
        out = usable_path(out, "out")
    for plan in plans:
        for name, given, kind in (("sae", plan.sae, SAEConfig), ("train", plan.train, TrainConfig)):
            typed(given, kind, f"{name}_config")
        typed(plan.settings, dict, "settings")
        if plan.start is not None:
            check_start(plan.start, plan.sae, plan.train)
    typed(mesh, Mesh | None, "mesh")
    typed(on_record, Callable | None, "on_record")
    if sweep:
        check_names([plan.name for plan in plans])
        check_names([name for name in {plan.hookpoint for plan in plans} if name])
    trains = one_stream([plan.train for plan in plans])
    plans = [dataclasses.replace(p, train=train) for p, train in zip(plans, trains, strict=True)]
    config = plans[0].train
    device = resolve_device(config.device)
    for plan in plans:
        check_heads(plan.sae, config.tensor_parallel if mesh is None else mesh.heads.size)
    mesh = mesh or join(config.tensor_parallel, device, config.rank_timeout)
    layout = mesh.data.size, mesh.heads.size
    owned = owners({plan.name: plan.hookpoint for plan in plans}, config.share, layout)
    sources = _sources(activations, plans, config)
    plans = [_complete(plan, sources[plan.hookpoint]) for plan in plans]
    own = [plan for plan in plans if owned.get(plan.name, mesh.world.rank) == mesh.world.rank]
    own_sources = {plan.hookpoint: sources[plan.hookpoint] for plan in own}
    width = sum(x.d_model + getattr(x, "d_target", 0) for x in own_sources.values())
    _check_room(own, config.batch_size * width, device, mesh)
    ranks = (1, 1) if owned else layout
    not_fused = [check_step(plan.sae, plan.train, device, ranks) for plan in plans]
    judged_on = None if heldout is None else _heldouts(heldout, own)
    check_packages(config)
    _check_same([plan.settings for plan in plans], mesh)
    folder, state = open_folder(
        *(out, resume, {p.name: p.settings for p in plans}, sweep, mesh, owned),
        hookpoints={p.name: p.hookpoint for p in plans},
    )
    streams = {
        name: Stream(x, config.tokens, device, config.massive_multiple)
        for name, x in own_sources.items()
    }
    session = Session(
        streams, config, folder, mesh, bool(owned), any(not_fused), judged_on, on_judged
    )
    try:
        for plan in plans:
            owner = owned.get(plan.name)
            stream = streams.get(plan.hookpoint, session.stream)
            session.members[plan.name] = Member(
                plan, device, folder, on_record, mesh, owner, stream
            )
        if state is not None:
            session.load_state_dict(state)
        _train_and_judge(session)
    finally:
        session.close()
    return list(session.results.values())


def _train_and_judge(session: Session) -> None:
    """Train all members, evaluate them, and save them, even after an error."""
    try:
        with note_signals(session.interrupt, session.folder is not None) as stop:
            _train(session, stop)
        stopped_by = session.signal(stop)
        for stream in session.streams.values():
            stream.close()
        if stopped_by is None and session.heldout is not None:
            session.sync()
            for member in session.live:
                member.save()
            if session.config.final_evaluation:
                _judge(session)
            for member in session.own:
                if member.metrics:
                    member.record("final", member.metrics)
        if stopped_by is None:
            for member in session.own:
                member.judge()
        session.sync()
        for member in session.live:
            member.finish(stopped_by)
        session.note()
    except InputError as error:
        kind = Diverged if isinstance(error, Diverged) else InputError
        raise kind("\n".join([str(error), *_rescue(session, error)])) from error


def _judge(session: Session) -> None:
    """The final evaluation of all members, one hookpoint after another."""
    for done, hookpoint in enumerate(session.streams):
        heldout = session.judged_on(hookpoint)
        if session.config.final_tokens:
            heldout = heldout.first(session.config.final_tokens)
        members = [member for member in session.own if member.hookpoint == hookpoint]
        for member in members:
            member.metrics = finite(evaluate(member.sae(), heldout))

        def judged(batch: int, batches: int, before: int = done) -> None:
            session.on_judged(before * batches + batch, len(session.streams) * batches)

        losses = evaluate_cross_entropy({m.name: m.sae for m in members}, heldout, judged)
        for member in members:
            member.metrics = finite(member.metrics | losses[member.name])


def _rescue(session: Session, error: InputError) -> list[str]:
    """Save what was learned before an error, if possible; returns lines that say how to go on."""
    stream, folder = session.stream, session.folder
    saved, learned = True, 0
    try:
        if stream.steps:
            session.sync()
            for member in session.live:
                member.finish()
        learned = max((result.tokens for result in session.results.values()), default=0)
        if learned:
            session.note()
    except InputError:  # the disk is full, say, and that was the first error, too
        saved = False
    if folder is None:
        return []
    lines = []
    if saved and learned:
        where = folder.path if isinstance(folder, SweepFolder) else folder.sae
        lines.append(f"What was learned in the first {learned:,} tokens is in {where}")
    # No command where a resumed run would end alike, or where the folder is gone.
    if isinstance(error, BadImage):
        lines.append("Then start again: a run does not go on with other images")
    elif folder.index.exists() and not isinstance(error, DataEnded | Diverged):
        command = command_line("train", "--resume", str(folder.path))
        if next(iter(session.members.values())).settings["config"]["data"] is None:
            command = f"fit(..., out={str(folder.path)!r}, resume=True)"
        checkpoints = checkpoint.list_checkpoints(folder.checkpoints)
        start = "the start"
        if checkpoints:
            start = f"the checkpoint of step {checkpoint.step_of(checkpoints[-1]):,}"
        if not saved:
            lines.append(f"What was learned since {start} could not be saved")
        lines.append(f"When that is solved, go on from {start}:\n  {command}")
    return lines


def _train(session: Session, stop: Stop) -> None:
    """The loop: batch, steps, log, evaluate, checkpoint, until the budget is used or a signal."""
    stream, config = session.stream, session.config
    saved_at = stream.steps
    # After a signal at least one step is made, so that there is something to save.
    while not stream.done and (not stream.steps or session.signal(stop) is None):
        try:
            batches = session.next()
        except Interrupted:
            break
        except DataEnded:
            if stream.steps > saved_at:
                session.save()
            raise
        log = stream.due(config.log_every) or stream.done
        if log or session.waits:
            session.check()
        for member in session.own:
            member.step(*batches[member.hookpoint], log)
        if log:
            rates = session.rates()
            for member in session.own:
                if member.figures:  # the batch was not skipped
                    member.record("train", member.figures | rates[member.hookpoint])
        if session.heldout is not None and stream.due(config.eval_every) and not stream.done:
            for member in session.own:
                figures = evaluate(member.sae(), session.judged_on(member.hookpoint))
                member.record("heldout", figures)
        if session.is_sync_step:
            session.sync()
            session.check_live()
        if stream.due(config.checkpoint_every) and not stream.done:
            session.save()
            saved_at = stream.steps
    if stream.steps > saved_at:
        session.save()


def _complete(plan: MemberPlan, source: ActivationSource) -> MemberPlan:
    """The plan with the width of the activations, and all entries of config.json."""
    widths = source.d_model, getattr(source, "d_target", 0)
    sae = plan.sae.with_widths(*widths, starts=plan.start is not None)
    config = {
        "sae": dataclasses.asdict(sae),
        "data": None,
        "train": dataclasses.asdict(plan.train),
    }
    settings = {"config": config, "data": source.describe(), **plan.settings}
    to_json(typed(settings, RUN, "settings"), "settings")
    return dataclasses.replace(plan, sae=sae, settings=settings)


def _check_same(settings: list[dict[str, Any]], mesh: Mesh) -> None:
    """Raise InputError unless all processes were given the same activations and settings."""
    if len(set(mesh.world.exchange(digest(settings)))) > 1:
        raise InputError(
            "the processes of this training were given different activations or settings: give "
            "all of them the same, each takes its own part of the batches"
        )


def _sources(
    activations: Activations | Mapping[str, Activations],
    plans: list[MemberPlan],
    config: TrainConfig,
) -> dict[str, ActivationSource]:
    """The sources by hookpoint, each of which some of the SAEs learn from."""
    if not isinstance(activations, Mapping):
        activations = {"": activations}
    _check_names_of_hookpoints("activations", activations, plans)
    sources = {name: _as_source(each, config) for name, each in activations.items()}
    rows = {name: x.count for name, x in sources.items() if isinstance(x, TensorActivations)}
    if len(set(rows.values())) > 1:
        counts = ", ".join(f"{name!r} {count:,}" for name, count in rows.items())
        raise InputError(
            "activations: expected as many rows for each hookpoint, those of the same tokens, got "
            f"{counts}"
        )
    return sources


def _heldouts(
    heldout: HeldoutActivations | Mapping[str, HeldoutActivations], plans: list[MemberPlan]
) -> dict[str, Heldout]:
    """Held-out activations by hookpoint. Raises InputError if SAEs cannot be evaluated on them."""
    if not isinstance(heldout, Mapping):
        heldout = {"": heldout}
    _check_names_of_hookpoints("heldout", heldout, plans)
    judged_on = {name: as_heldout(each) for name, each in heldout.items()}
    for plan in plans:
        check_heldout(judged_on[plan.hookpoint], plan.sae)
    return judged_on


def _check_names_of_hookpoints(
    what: str, given: Mapping[str, Any], plans: list[MemberPlan]
) -> None:
    """Raise InputError unless there is something for each hookpoint that SAEs learn from."""
    wanted = list(dict.fromkeys(plan.hookpoint for plan in plans))
    if not given.keys() >= set(wanted):
        named = wanted if wanted != [""] else "none: fit_many names them in `hookpoints`"
        raise InputError(
            f"{what}: expected a mapping with the hookpoints that SAEs learn from ({named}), got "
            + ("one that has " + str(list(given)) if set(given) != {""} else "no mapping")
        )


def _as_source(activations: Activations, config: TrainConfig) -> ActivationSource:
    if isinstance(activations, str | bytes | Path):
        raise InputError(
            f"activations: expected tensors or a source of them, got {activations!r}: "
            "kronsae.cache.CacheActivations reads a cache"
        )
    is_pair = isinstance(activations, tuple) and len(activations) == 2
    first: Any = cast(Pair, activations)[0] if is_pair else activations
    if isinstance(first, (Tensor, np.ndarray)):
        rows = cast(Tensor | Pair, activations)
        return TensorActivations(rows, config.batch_size, config.stream_seed)
    if hasattr(activations, "state_dict") and hasattr(activations, "d_model"):
        return cast(ActivationSource, activations)
    return IterableActivations(cast(Iterable[Tensor | Pair], activations))


def _check_room(plans: list[MemberPlan], batch: int, device: torch.device, mesh: Mesh) -> None:
    """Raise InputError if weights, moments and a batch alone are more than the free memory.

    plans: those that this process trains. `kronsae.plan.memory` plans all that a run takes.
    batch: numbers in it.
    """
    numbers = 0
    for plan in plans:
        copies = 2 if plan.train.moments == "bfloat16" else 3  # a weight, and its two moments
        numbers += copies * plan.sae.matrix_entries // mesh.heads.size
    with mesh.world.together():
        check_room(
            numbers + batch,
            device,
            "weights, AdamW's moments and a batch",
            "take a smaller dict_size (or heads), a smaller batch_size, or fewer SAEs",
        )
