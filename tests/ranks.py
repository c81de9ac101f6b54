"""Processes for the tests of `kronsae.system.parallel`: four, started once, do all jobs in turn.

A job is a function of this module that takes a mesh and gives tensors and JSON values. `results`
starts the processes; each arranges itself in one mesh after the other, does the jobs there, and
hands back what it got. Tests then compare that with a single process.
"""

import os
import signal
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from kronsae import SAEConfig, TrainConfig
from kronsae.errors import InputError
from kronsae.model.ranks import SHARDED
from kronsae.model.sae import SAE
from kronsae.system import parallel
from kronsae.system.parallel import ALONE, Mesh
from kronsae.train import fit, fit_many
from kronsae.training.learner import Learner

CPU = torch.device("cpu")
LAYOUTS = {
    "2 data": [[0], [1]],
    "2 heads": [[0, 1]],
    "4 data": [[0], [1], [2], [3]],
    "4 heads": [[0, 1, 2, 3]],
    "2 x 2": [[0, 1], [2, 3]],
}
"""Meshes: ranks along data x ranks along heads."""

D = 12
BATCHES = [41, 41, 41, 41, 41, 41, 3]
"""Tokens of each batch: no multiple of any number of ranks, and in the end fewer than four."""
TRAIN = TrainConfig(
    tokens=sum(BATCHES),
    batch_size=41,
    lr=1e-2,
    warmup_fraction=0.2,
    weight_decay=0.01,
    encoder_lr_ratio=0.5,
    max_grad_norm=0.3,
    dead_after_tokens=60,
    auxk=5,
    auxk_fraction=0.6,
)
POINTS = {
    "kron": SAEConfig(d_model=D, heads=8, m=2, n=3, k=5, eps=1e-3),
    "relu_mul": SAEConfig(d_model=D, heads=8, m=2, n=3, k=5, composition="relu_mul"),
    "mul": SAEConfig(d_model=D, heads=8, m=2, n=3, k=5, composition="mul"),
    "dense": SAEConfig(d_model=D, encoder="dense", dict_size=48, k=5),
    # More latents a token than one of four ranks holds.
    "wide k": SAEConfig(d_model=D, encoder="dense", dict_size=16, k=6),
    "transcoder": SAEConfig(d_model=D, d_target=D, heads=8, m=2, n=3, k=5, skip=True),
}
"""Autoencoders whose heads can be shared out."""
OVER_TOKENS = {
    "batchtopk": SAEConfig(d_model=D, heads=8, m=2, n=3, k=5, selection="batchtopk"),
    "jumprelu": SAEConfig(d_model=D, heads=8, m=2, n=3, k=5, selection="jumprelu"),
    "matryoshka": SAEConfig(
        **{"d_model": D, "heads": 8, "m": 2, "n": 2, "k": 5},
        **{"objective": "matryoshka", "matryoshka_first": 8},
    ),
    "multi_topk": SAEConfig(d_model=D, heads=8, m=2, n=3, k=3, objective="multi_topk"),
    "hierarchical": SAEConfig(d_model=D, heads=8, m=2, n=3, k=5, objective="hierarchical"),
    "multi batch": SAEConfig(
        **{"d_model": D, "heads": 8, "m": 2, "n": 3, "k": 3},
        **{"selection": "batchtopk", "objective": "multi_topk"},
    ),
    "experts": SAEConfig(d_model=D, heads=8, m=2, n=3, k=5, experts=2),
}
"""Autoencoders that are trained by data-parallel ranks alone."""


def data() -> list[torch.Tensor]:
    """Batches [B, D] in float64, with rows that repeat or are 0, so that latents tie."""
    generator = torch.Generator().manual_seed(5)
    batches = [torch.randn(n, D, generator=generator, dtype=torch.float64) for n in BATCHES]
    for x in batches[:-1]:
        x[1::5] = x[0]
        x[2] = 0
    return batches


def learn(mesh: Mesh, config: SAEConfig) -> dict[str, Any]:
    """All steps of a learner in float64: metrics, codes, and in the end every tensor whole."""
    torch.set_default_dtype(torch.float64)
    try:
        learner = Learner(config, TRAIN, CPU, mesh)
        metrics, codes = [], []
        for x in data():
            target = x.flip(1) if config.d_target else None
            with torch.no_grad():
                if config.selection == "topk":
                    codes.append(mesh.batch(learner.sae.encode(mesh.part(x)).indices))
            metrics.append(learner.step(x, target))
    finally:
        torch.set_default_dtype(torch.float32)
    whole = {
        name: (mesh.heads if name in SHARDED else ALONE.heads).whole(tensor)
        for name, tensor in learner.sae.state_dict().items()
    }
    silent = mesh.heads.whole(learner.tokens_since_fired)
    return {"metrics": metrics, "codes": codes, "weights": whole, "silent": silent}


def learn_rounded(mesh: Mesh) -> dict[str, Any]:
    """Losses, weights and moments of a learner in float32 with bfloat16 moments."""
    learner = Learner(POINTS["kron"], replace(TRAIN, moments="bfloat16"), CPU, mesh)
    losses = [learner.step(x.float())["loss"] for x in data()]
    state = learner.state_dict()
    return {"losses": losses, "weights": state["weights"], **state["moments"]}


SWEEP = {name: (POINTS | OVER_TOKENS)[name] for name in ("kron", "batchtopk", "dense")}
"""Members of which two ranks train each its own."""
SWEEP_TRAIN = TrainConfig(
    **{"tokens": 480, "batch_size": 40, "lr": 1e-2, "share": "members", "dead_after_tokens": 80},
    **{"log_every": 3, "eval_every": 4, "checkpoint_every": 5, "keep_checkpoints": 9},
)
FUSED = {"tokens": 8, "batch_size": 4, "log_every": 2, "checkpoint_every": 1, "eval_every": 0}
"""Few steps: the kernels run in an interpreter."""
WILD = {"lr": 1e30, "max_grad_norm": 0.0}
"""A member that diverges."""


def owned(
    out: Path,
    mesh: Mesh = ALONE,
    stop_after: int | None = None,
    resume: bool = False,
    common: dict[str, Any] | None = None,
    batchtopk: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """`fit_many` of `SWEEP`, each rank its own members: the results, as each rank gets them.

    common, batchtopk: settings of all, and of that member.  Rank 0 gets a signal, if any.
    """

    def stop(name, record):
        if (name, record["kind"], record["step"]) == ("kron", "train", stop_after):
            signal.raise_signal(signal.SIGTERM)

    torch.manual_seed(0)  # checkpoints have its state
    config = replace(SWEEP_TRAIN, **(common or {}))
    results = fit_many(
        list(SWEEP.values()),
        X,
        [replace(config, **(batchtopk or {})) if n == "batchtopk" else config for n in SWEEP],
        names=list(SWEEP),
        heldout=X[:100],
        out=out,
        resume=resume,
        on_record=stop,
        mesh=mesh,
    )
    return [{**vars(r), "sae": r.sae and dict(r.sae.state_dict())} for r in results]


def cut_short(out: Path, mesh: Mesh = ALONE, full: bool = False) -> str:
    """What is said where the data ends early, or (full) where a record cannot be written."""

    def on_record(name, record):
        if full and (name, record["step"]) == ("batchtopk", 4):
            raise InputError("the disk is full")

    torch.manual_seed(0)
    common = {"names": list(SWEEP), "out": out, "heldout": X[:100], "mesh": mesh}
    try:
        fit_many(
            list(SWEEP.values()), [*X.split(40)][:7], SWEEP_TRAIN, on_record=on_record, **common
        )
    except InputError as error:
        return str(error)


def exchanges(mesh: Mesh) -> list[int]:
    """How often ranks exchange anything in 6 and in 24 steps, of which the last alone logs."""
    counts, gather = [], dist.all_gather
    for tokens in (240, 960):
        calls = []
        dist.all_gather = lambda *given, calls=calls, **more: calls.append(gather(*given, **more))
        rarely = {"log_every": tokens, "eval_every": 0, "checkpoint_every": 0}
        fit_many([POINTS["dense"]] * 2, X, replace(SWEEP_TRAIN, tokens=tokens, **rarely), mesh=mesh)
        counts.append(len(calls))
    dist.all_gather = gather
    return counts


def owned_refusals(mesh: Mesh) -> list[str]:
    """What ranks say when all members diverge, and of settings that cannot be."""
    messages = []
    heads = mesh._replace(data=mesh.heads, heads=mesh.data)
    for count, more, layout in ((3, WILD | {"eval_every": 0}, mesh), (1, {}, mesh), (1, {}, heads)):
        try:
            saes = list(SWEEP.values())[:count]
            fit_many(saes, X, replace(SWEEP_TRAIN, **more), mesh=layout)
        except InputError as error:
            messages.append(str(error))
    return messages


JOBS = {
    "whole": {},
    "wild": {"common": {"tokens": 640, "eval_every": 0, "log_every": 7}, "batchtopk": WILD},
    "fused": {"common": FUSED, "batchtopk": {"fused_step": "on"}},
}
"""Sweeps that are trained by one process, and by two: arguments of `owned`."""


def _work_owned(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=100)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timeout)
    mesh = parallel.arrange(torch.tensor(LAYOUTS["2 data"]), CPU, timeout)
    done = {name: owned(folder / name, mesh, **given) for name, given in JOBS.items()}
    done["chain"] = owned(folder / "chain", mesh, stop_after=9, resume=True)
    done["wild chain"] = owned(folder / "wild chain", mesh, resume=True, **JOBS["wild"])
    done["wild back"] = owned(folder / "wild back", mesh, stop_after=14, **JOBS["wild"])
    done["ended"] = cut_short(folder / "ended", mesh)
    done["full"] = cut_short(folder / "full", mesh, full=True)
    done["exchanges"] = exchanges(mesh)
    done["refusals"] = owned_refusals(mesh)
    torch.save(done, folder / f"rank-{rank}.pt")
    dist.destroy_process_group()


def owned_results(folder: Path) -> list[dict[str, Any]]:
    """What each of two ranks got, by job; run folders are in `folder`."""
    owned(folder / "chain", stop_after=3)
    owned(folder / "wild chain", stop_after=14, **JOBS["wild"])
    mp.spawn(_work_owned, (folder,), nprocs=2)
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(2)]


RUN = SAEConfig(heads=8, m=2, n=3, k=5)
RUN_TRAIN = TrainConfig(
    tokens=1000, batch_size=50, lr=1e-2, log_every=1, checkpoint_every=10, dead_after_tokens=200
)
X = torch.randn(600, D, generator=torch.Generator().manual_seed(6))


def edges(mesh: Mesh) -> list[torch.Tensor]:
    """Codes of latents whose products differ by one bit, and whose roots are equal; with NaN."""
    sae = SAE(SAEConfig(d_model=1, heads=8, m=1, n=1, k=3), mesh=mesh)
    low = torch.tensor(1.5)
    high = torch.nextafter(low, torch.tensor(2.0))
    assert low.sqrt() == high.sqrt()
    base = torch.stack([low, low, low, high, low, high, low, low])  # each has extension 1
    rows = torch.stack([base, torch.ones(8)], 1)[..., None]
    with torch.no_grad():
        sae.W_enc.copy_(rows[mesh.heads.share(8)])
    codes = sae.encode(torch.tensor([[1.0], [torch.nan], [-1.0]]))
    return [codes.indices[[0, 2]], codes.values.isnan().any(1), sae.decode(codes).isnan().any(1)]


def mapped(mesh: Mesh) -> list[list[int]]:
    """Squares of so many numbers, of which each rank computes its share."""
    seen = []

    def square(x, nothing):
        seen.append(len(x))
        return x**2

    return [mesh.reading.map(square, torch.arange(n), None).tolist() for n in (1, 3, 8)] + [seen]


CHAIN = {"2 x 2": 8, "4 heads": 11, "2 heads": 14, "4 data": 17}
"""One run, begun and ended by a single process: who goes on with it, and after which step it is
stopped."""


def run(
    out: Path,
    mesh: Mesh = ALONE,
    stop_after: int | None = None,
    resume: bool = False,
    sae: SAEConfig = RUN,
    train: TrainConfig = RUN_TRAIN,
    x: torch.Tensor = X,
) -> list[dict[str, Any]]:
    """`fit` in a run folder: the final metrics, and its records. Rank 0 gets a signal, if any."""

    def stop(record):
        if record["kind"] == "train" and record["step"] == stop_after:
            signal.raise_signal(signal.SIGTERM)

    result = fit(sae, x, train, heldout=x[:100], out=out, resume=resume, on_record=stop, mesh=mesh)
    return [{**result.metrics, "stopped_by": result.stopped_by}, *result.history]


def sweep(out: Path, mesh: Mesh = ALONE) -> list[dict[str, float]]:
    """`fit_many`: the final metrics of two members, stopped once and gone on with."""

    def stop(name, record):
        if record["step"] == 7 and name == "kron":
            signal.raise_signal(signal.SIGTERM)

    members = [POINTS["kron"], POINTS["dense"]]
    common = {"names": ["kron", "dense"], "heldout": X[:100], "out": out, "mesh": mesh}
    fit_many(members, X, RUN_TRAIN, **common, on_record=stop)
    return [result.metrics for result in fit_many(members, X, RUN_TRAIN, **common, resume=True)]


def refusals(mesh: Mesh, folder: Path) -> list[str]:
    """What ranks say of different data, of a folder that is not free, and when they diverge."""
    messages = []
    folder.mkdir(exist_ok=True)
    (folder / "mine").write_text("")
    x = X if mesh.first else X + 1
    diverging = replace(RUN_TRAIN, lr=1e30)
    for activations, out, config in (
        (x, folder / "new", RUN_TRAIN),
        (X, folder, RUN_TRAIN),
        (X, folder / "diverged", diverging),
    ):
        try:
            fit(RUN, activations, config, out=out, mesh=mesh)
        except InputError as error:
            messages.append(str(error))
    return messages


def _work(rank: int, folder: Path, cases: list[tuple[str, str]]) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=60)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=4, timeout=timeout)
    meshes = {
        name: parallel.arrange(torch.tensor(ranks), CPU, timeout) for name, ranks in LAYOUTS.items()
    }
    meshes = {name: mesh for name, mesh in meshes.items() if mesh is not None}
    done: dict[str, dict[str, Any]] = {}
    for name, mesh in meshes.items():
        points = [point for layout, point in cases if layout == name]
        done[name] = {point: learn(mesh, (POINTS | OVER_TOKENS)[point]) for point in points}
        done[name]["rounded"] = learn_rounded(mesh)
        done[name]["run"] = run(folder / name, mesh)
        done[name]["edges"] = edges(mesh)
        done[name]["mapped"] = mapped(mesh)
    for name, stop_after in CHAIN.items():
        if name in meshes:
            done[name]["chain"] = run(folder / "chain", meshes[name], stop_after, resume=True)
        dist.barrier()
    done["refusals"] = refusals(meshes["2 x 2"], folder / "refused")
    done["sweep"] = sweep(folder / "sweep", meshes["2 x 2"])
    done["lost"] = lost(meshes["4 data"], rank)
    torch.save(done, folder / f"rank-{rank}.pt")
    os._exit(0)  # without a word to the others, as if killed


def lost(mesh: Mesh, rank: int) -> str:
    """What a rank says that waits for one that is gone. The last one goes."""
    try:
        if rank < 3:
            mesh.world.sum(torch.ones(1))
    except parallel.RankLost as error:
        return str(error)
    return ""


def results(folder: Path, cases: list[tuple[str, str]]) -> list[dict[str, dict[str, Any]]]:
    """What each rank got, by mesh and job; run folders are in `folder`, by the mesh's name.

    cases: meshes and points to learn.
    """
    run(folder / "chain", stop_after=5)
    mp.spawn(_work, (folder, cases), nprocs=4)
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(4)]
