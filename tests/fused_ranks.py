"""Processes for `test_triton_ranks.py`: the fused step where ranks share the heads.

As in `ranks.py`, jobs are functions that take a mesh, and four processes do all of them in turn;
one of them also does them alone, for comparison. Kernels run in Triton's interpreter.
"""

import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  the interpreter, as fast as in the tests
import ranks
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from kronsae import SAEConfig, TrainConfig
from kronsae.model.ranks import SHARDED
from kronsae.system import parallel
from kronsae.system.parallel import ALONE, Group, Mesh
from kronsae.training.learner import Learner
from kronsae_kernels.step import NAMES, TrainingStep

CPU = torch.device("cpu")
X = torch.randn(40, 8, generator=torch.Generator().manual_seed(6))
LAYOUTS = {"2 heads": [[0, 1]], "4 heads": [[0, 1, 2, 3]]}
D, B, STEPS, NOT_FINITE = 8, 5, 7, 3
TRAIN = TrainConfig(
    tokens=B * STEPS,
    batch_size=B,
    lr=1e-2,
    warmup_fraction=0.2,
    weight_decay=0.01,
    encoder_lr_ratio=0.5,
    adam_beta2=0.9,
    max_grad_norm=0.3,
    dead_after_tokens=2 * B,
    auxk=3,
    auxk_fraction=0.5,
    fused_step="on",
    dtype="float32",
)
KRON = SAEConfig(d_model=D, heads=4, m=2, n=2, k=2, eps=1e-3)
POINTS: dict[str, tuple[SAEConfig, TrainConfig]] = {
    # Of whole numbers, with heads that are there twice.
    "ties": (replace(KRON, eps=0.0), replace(TRAIN, weight_decay=0.0)),
    # More latents a token than one of four ranks holds; and gradients that are not clipped.
    "wide k": (
        SAEConfig(d_model=D, encoder="dense", dict_size=12, k=4),
        replace(TRAIN, max_grad_norm=0.0, dead_after_tokens=B, auxk=5),
    ),
    "kron": (KRON, TRAIN),
    "transcoder": (replace(KRON, composition="mul", eps=0.0, d_target=7), TRAIN),
    # The derivative of mAND is 1 / (2 sqrt(eps)) near a product of 0: with a smaller eps the
    # rounding of a pre-latent there decides about the norm of the gradient.
    "bfloat16": (replace(KRON, eps=0.1), replace(TRAIN, dtype="bfloat16", moments="bfloat16")),
}
CASES = [("2 heads", "ties")]
OTHERS = [(layout, point) for layout in LAYOUTS for point in POINTS if (layout, point) not in CASES]


def batches(point: str) -> list[Tensor]:
    """[B, D] each, of which one has a NaN; fewer for four ranks, whose kernels take long here."""
    generator = torch.Generator().manual_seed(5)
    size = (6 if point == "wide k" else STEPS, B, D)
    if point == "ties":
        found = torch.randint(-2, 3, size, generator=generator).float()
    else:
        found = torch.randn(size, generator=generator)
    found[NOT_FINITE, 3, 4] = torch.nan
    return list(found)


def make_ties(learner: Learner) -> None:
    """Weights of whole eighths, so that products are exact; the last half of the heads again."""
    sae, group, generator = learner.sae, learner.mesh.heads, torch.Generator().manual_seed(6)
    heads, m, n = sae.config.heads, sae.config.m, sae.config.n
    w_enc = torch.randint(-4, 5, (heads // 2, m + n, D), generator=generator) / 8
    rows = torch.randn(heads // 2 * m * n, D, generator=generator)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([w_enc, w_enc])[group.share(heads)])
        sae.W_dec.copy_(torch.cat([rows, rows])[group.share(sae.dict_size)])
        sae.normalize_decoder()


def learn(mesh: Mesh, point: str) -> dict[str, Any]:
    """All steps of a learner: metrics, what each process has of b_dec, every tensor whole."""
    learner = Learner(*POINTS[point], CPU, mesh)
    assert learner.fused is not None
    if point == "ties":
        make_ties(learner)
    metrics: list[Any] = []
    for number, x in enumerate(batches(point)):
        target = x[:, :7].flip(1) if learner.sae.config.d_target else None
        figures = learner.step(x, target, log=number % 3 != 1)
        metrics.append(tuple(figures) if isinstance(figures, tuple) else figures)
    assert learner.settle() is None

    def whole(name: str, tensor: Tensor) -> Tensor:
        return (mesh.heads if name in SHARDED else ALONE.heads).whole(tensor)

    state = learner.state_dict()
    return {
        "metrics": metrics,
        "steps": learner.step_count,
        "weights": {name: whole(name, tensor) for name, tensor in state["weights"].items()},
        "silent": mesh.heads.whole(learner.tokens_since_fired),
        "b_dec": [learner.sae.b_dec.detach(), *state["moments"]["b_dec"].values()],
    }


def drawn_step(number: int, group: Group) -> tuple[TrainingStep, Tensor, Tensor | None, int]:
    """This rank's part of an autoencoder of small whole numbers, so that latents tie exactly; with
    activations, a mask of the own latents, and k."""
    generator = torch.Generator().manual_seed(number)

    def whole(*shape: int) -> Tensor:
        return torch.randint(-1, 2, shape, generator=generator).float()

    dense, heads, m, n = number % 3 == 2, 4, 2, 2
    size = heads * m * n
    rows = size if dense else heads
    w_enc = whole(size, D) if dense else whole(m + n, heads, D).transpose(0, 1)
    b_enc, w_dec, own = whole(*w_enc.shape[:-1]), whole(size, D), group.share(rows)
    # Few are allowed, on some ranks none.
    mask = torch.rand(size, generator=generator) < (0.1, 0.5)[number % 2]
    step = TrainingStep(
        w_enc[own].clone(memory_format=torch.preserve_format) if dense else _stored(w_enc[own]),
        b_enc[own].clone(),
        w_dec[group.share(size)].clone(),
        whole(D),
        k=3,
        m=None if dense else m,
        composition=("mand", "mul")[number % 2],
        eps=0.25,
        ranks=group,
    )
    k = (1, 3, 7, 12, size)[number % 5]
    return step, whole(2, D), mask[group.share(size)] if number % 4 > 1 else None, k


def _stored(w_enc: Tensor) -> Tensor:
    """A copy as `TrainingStep` wants it."""
    return w_enc.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)


def select(mesh: Mesh) -> list[dict[str, Tensor]]:
    """Of drawn steps: values [B, F] of what is selected, NaN elsewhere, and what all have alike."""
    group, found = mesh.heads, []
    for number in range(12):
        step, x, mask, k = drawn_step(number, group)
        out = step.accumulate(x, mask=mask, k=k, weight=0.5)
        there = out.codes.indices >= 0
        place = out.codes.indices.where(there, step.dict_size)
        values = torch.full((len(x), step.dict_size + 1), torch.nan)
        values.scatter_(1, place, out.codes.values)
        values = group.gather(values[:, :-1]).transpose(0, 1).flatten(1)
        found.append({"values": values, "loss": out.loss, "residual": out.residual})
    return found


def overflow(mesh: Mesh) -> dict[str, Any]:
    """A gradient that is infinite on the last rank alone: its base row is tiny, its extension huge.

    Errors are finite. Returns the norm, how many steps were left out, and whether weights changed.
    """
    group, heads = mesh.heads, 4
    w_enc = torch.zeros(heads, 2, D)
    w_enc[:, :, 0] = 1.0
    w_enc[-1, :, 0] = torch.tensor([1e-30, 1e30])
    given = {
        "w_enc": _stored(w_enc[group.share(heads)]),
        "b_enc": torch.zeros(heads, 2)[group.share(heads)].clone(),
        "w_dec": torch.eye(heads, D)[group.share(heads)].clone(),
        "b_dec": torch.ones(D),
    }
    step = TrainingStep(**given, k=4, m=1, composition="relu_mul", ranks=group)
    before = {name: weight.clone() for name, weight in step.weights.items()}
    out = step.accumulate(torch.ones(3, D), weight=1e10)
    assert out.loss.isfinite()
    norm = step.apply(1e-2, max_norm=1.0)
    same = all(torch.equal(step.weights[name], before[name]) for name in NAMES)
    return {"norm": norm, "skips": step.skips.tolist(), "same": same}


RUN_TRAIN = replace(TRAIN, tokens=30, log_every=1, checkpoint_every=2, max_grad_norm=0.0)
CHAIN = {"4 heads": 3, "2 heads": 5}
"""A run, begun and ended by a single process: who goes on with it, up to which step."""
ROUNDED = replace(RUN_TRAIN, tokens=20, moments="bfloat16", dtype="bfloat16")


def run(out: Path, mesh: Mesh = ALONE, train: TrainConfig = RUN_TRAIN, **how: Any) -> None:
    ranks.run(out, mesh, sae=KRON, train=train, x=X, **how)


def runs(folder: Path, rank: int, meshes: dict[str, Mesh]) -> None:
    """Runs that go on with other processes, or with the same."""
    if rank == 3:
        run(folder / "alone")
        run(folder / "chain", stop_after=1)
    if "2 heads" in meshes:
        mesh = meshes["2 heads"]
        run(folder / "rounded", mesh, ROUNDED)
        run(folder / "resumed", mesh, ROUNDED, stop_after=2)
        run(folder / "resumed", mesh, ROUNDED, resume=True)
    dist.barrier()
    for name, stop_after in CHAIN.items():
        if name in meshes:
            run(folder / "chain", meshes[name], stop_after=stop_after, resume=True)
        dist.barrier()
    if rank == 3:
        run(folder / "chain", resume=True)


def _work(rank: int, folder: Path, cases: list[tuple[str, str]], slow: bool) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=600)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=4, timeout=timeout)
    meshes = {
        name: parallel.arrange(torch.tensor(layout), CPU, timeout)
        for name, layout in LAYOUTS.items()
    }
    meshes |= {"alone": ALONE if rank == 3 else None}
    meshes = {name: mesh for name, mesh in meshes.items() if mesh is not None}
    done: dict[str, Any] = {name: {"overflow": overflow(mesh)} for name, mesh in meshes.items()}
    points = dict.fromkeys(point for _, point in cases)
    for name, point in [*(("alone", point) for point in points), *cases]:
        if name in meshes:
            done[name][point] = learn(meshes[name], point)
    if not slow:
        for name, mesh in meshes.items():
            done[name]["select"] = select(mesh)
        runs(folder, rank, meshes)
    torch.save(done, folder / f"rank-{rank}.pt")
    dist.barrier()


def results(
    folder: Path, cases: list[tuple[str, str]], slow: bool
) -> list[dict[str, dict[str, Any]]]:
    """What each rank got, by layout and job; run folders are in `folder`.

    cases: layouts and points to learn.  slow: these alone; other jobs are left out.
    """
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"  # the processes have it when they import the kernels
    try:
        mp.spawn(_work, (folder, cases, slow), nprocs=4)
    finally:
        del os.environ["TRITON_INTERPRET"]
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(4)]
