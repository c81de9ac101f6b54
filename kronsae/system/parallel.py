"""Several processes that train together, started by torchrun: their `Mesh`, and its operations.

A mesh has two dimensions (torch.distributed's DeviceMesh). Along `data` ranks hold the same heads
and take different tokens of each batch; along `heads` they see the same tokens and each holds an
equal share of the heads (of a dense encoder: of the latents), with their decoder rows and moments.

All ranks read the same stream: batches, and their order, are those of a single process, whatever
the number of ranks. The work of the language model, which costs most, is divided: each rank runs it
on its part of the contexts, and receives the other parts from the others.

With `share` "members" a rank trains whole members of a sweep by itself (`owners`): ranks then
divide only the language model's work, and the first one writes the results of all.

A single process has the mesh `ALONE`, whose operations change nothing.
Letters: B tokens, d width, F latents, k selected latents a token, R ranks of a group.
"""

import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from kronsae.errors import InputError


class RankLost(RuntimeError):
    """Another process ended, or did not answer in time."""


@contextmanager
def _noticing_loss() -> Iterator[None]:
    """Raise RankLost for the error that torch raises when another rank is gone."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).split(". ")[0].strip()  # without advice about other programs
        reason = re.sub(r"^\[\S+:\d+\] ", "", reason)  # without a line of torch's own code
        raise RankLost(
            f"another process of this training ended or did not answer ({reason}): torchrun says "
            "which. --resume goes on from the last checkpoint"
        ) from error


class Group:
    """Ranks that work together. In a group of one, operations return their argument.

    Every rank of the group calls each operation, in the same order as the others.
    Raises RankLost if one does not.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    def sum(self, x: Tensor) -> Tensor:
        """Sum of all ranks' x, in place; the same bits on each."""
        return self._reduce(x, dist.ReduceOp.SUM)

    def count(self, own: int, device: torch.device) -> int:
        """Sum of a number that each rank has; tensors of the group are on `device`."""
        return own if self.size == 1 else int(self.sum(torch.tensor(own, device=device)))

    def max(self, x: Tensor) -> Tensor:
        """Elementwise largest of all ranks' x, in place."""
        return self._reduce(x, dist.ReduceOp.MAX)

    def min(self, x: Tensor) -> Tensor:
        """Elementwise smallest of all ranks' x, in place."""
        return self._reduce(x, dist.ReduceOp.MIN)

    def _reduce(self, x: Tensor, op: Any) -> Tensor:
        if self.size > 1:
            # nccl wants contiguous tensors: an encoder's gradient is one behind a transposition.
            strides = x.stride()
            stored = x.permute(sorted(range(x.ndim), key=lambda dim: -strides[dim]))
            dense = stored.contiguous()
            with _noticing_loss():
                dist.all_reduce(dense, op, group=self.group)
            if dense is not stored:
                stored.copy_(dense)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """All ranks' x, which have one shape: [R, *x.shape]."""
        if self.size == 1:
            return x[None]
        parts = list(x.new_empty(self.size, *x.shape))
        if x.numel():
            with _noticing_loss():
                dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.stack(parts)

    def gather_at(self, x: Tensor, ranks: Collection[int]) -> Tensor:
        """`gather` for some of the ranks; the others get [0, *x.shape]."""
        if len(ranks) == self.size:
            return self.gather(x)
        parts = [x.new_empty(0, *x.shape)]
        for receiver in sorted(ranks):
            own = receiver == self.rank
            into = list(x.new_empty(self.size, *x.shape)) if own else None
            with _noticing_loss():
                dist.gather(x.contiguous(), into, group=self.group, group_dst=receiver)
            if into is not None:
                parts = [torch.stack(into)]
        return parts[0]

    def whole(self, x: Tensor) -> Tensor:
        """All rows of a tensor whose rows are divided equally, on the CPU of rank 0.

        Other ranks get their own rows x.
        """
        if self.size == 1:
            return x.detach().to("cpu")
        x = x.detach().contiguous()
        if self.rank:
            with _noticing_loss():
                dist.send(x, group=self.group, group_dst=0)
            return x.to("cpu")
        whole = torch.empty(self.size * len(x), *x.shape[1:], dtype=x.dtype)
        for rank, rows in enumerate(whole.split(len(x))):
            if rank:  # one at a time: there may be no room for more
                with _noticing_loss():
                    dist.recv(x := torch.empty_like(x), group=self.group, group_src=rank)
            rows.copy_(x)
        return whole

    def to_first(self, x: Tensor, source: int) -> None:
        """Copy x of rank `source` into rank 0's x, of the same shape and dtype; these two call it.

        Both are contiguous, and on the group's device.
        """
        content = x.flatten().view(torch.uint8)  # the backend may not know the dtype
        if len(content):
            with _noticing_loss():
                if self.rank:
                    dist.send(content, group=self.group, group_dst=0)
                else:
                    dist.recv(content, group=self.group, group_src=source)

    def total(self, x: Tensor) -> Tensor:
        """Sum of all ranks' x; its derivative by this rank's x is 1.

        For a loss that every rank of the group computes from the same sum.
        """
        return x if self.size == 1 else _Total.apply(x, self)

    def as_part(self, x: Tensor) -> Tensor:
        """x / R with the derivative of x, for an x that is the same on all ranks."""
        return x if self.size == 1 else x - x.detach() * (1 - 1 / self.size)

    def share(self, count: int) -> slice:
        """This rank's part of `count` items in a row, divided equally (the last may have fewer)."""
        size = -(-count // self.size)
        return slice(min(count, self.rank * size), min(count, (self.rank + 1) * size))

    def map(self, compute: Callable[..., Tensor], *rows: Tensor | None) -> Tensor:
        """compute(*rows) [n, ...] of tensors [n, ...]; each rank computes its share of the rows."""
        [x] = self.map_all(lambda *rows: [compute(*rows)], rows)
        return x

    def map_all(
        self,
        compute: Callable[..., list[Tensor]],
        rows: Sequence[Tensor | None],
        receivers: Sequence[Collection[int]] | None = None,
    ) -> list[Tensor]:
        """`map` of a function that gives several tensors.

        receivers: of each tensor the ranks that get it; others get one of no rows. None: all do.
        """
        if self.size == 1:
            return compute(*rows)
        count = next(len(part) for part in rows if part is not None)
        share = self.share(count)
        # A rank without a share computes the first row, to know the shape of a row.
        span = share if share.stop > share.start else slice(1)
        found = []
        computed = compute(*(None if part is None else part[span] for part in rows))
        for number, x in enumerate(computed):
            padded = x.new_zeros(-(-count // self.size), *x.shape[1:])
            padded[: share.stop - share.start] = x[: share.stop - share.start]
            ranks = None if receivers is None else receivers[number]
            whole = self.gather(padded) if ranks is None else self.gather_at(padded, ranks)
            found.append(whole.flatten(0, 1)[:count])
        return found

    def exchange(self, value: Any) -> list[Any]:
        """The values (JSON) of all ranks, in their order."""
        if self.size == 1:
            return [value]
        own = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = self.gather(torch.tensor([len(own)])).flatten().tolist()
        padded = torch.nn.functional.pad(own, (0, max(lengths) - len(own)))
        texts = zip(self.gather(padded), lengths, strict=True)
        return [json.loads(bytes(text[:length].tolist())) for text, length in texts]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Context for work that each rank does by itself: an InputError of one is raised on all.

        Nothing inside may wait for other ranks.
        """
        if self.size == 1:
            yield
            return
        problem = None
        try:
            yield
        except InputError as error:
            problem = error
        for rank, message in enumerate(self.exchange(problem and str(problem))):
            if message is not None:
                raise InputError(f"rank {rank}: {message}" if rank else message) from problem


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        return group.sum(x.clone())

    @staticmethod
    def backward(ctx, d_total):
        return d_total, None


class Mesh(NamedTuple):
    """The groups of ranks that this process is in."""

    data: Group = Group()
    """Ranks with the same heads: each takes every R-th token of a batch."""
    heads: Group = Group()
    """Ranks with the same tokens: each holds 1/R of the heads."""
    world: Group = Group()
    """All ranks, for messages (tensors on the CPU)."""
    reading: Group = Group()
    """All ranks, for activations."""

    @property
    def first(self) -> bool:
        """True on the rank that writes files and prints for all."""
        return self.world.rank == 0

    def part(self, x: Tensor) -> Tensor:
        """This rank's tokens of a batch x [B, ...]."""
        return x[self.data.rank :: self.data.size]

    def batch(self, x: Tensor) -> Tensor:
        """The batch [B, w], in order, of whose `part` each rank has x; narrower ones are padded."""
        if self.data.size == 1:
            return x
        sizes = self.data.gather(torch.tensor(x.shape, device=x.device))
        (tokens, _), (rows, width) = sizes.sum(0).tolist(), sizes.amax(0).tolist()
        padded = torch.nn.functional.pad(x, (0, width - x.shape[1], 0, rows - x.shape[0]))
        return self.data.gather(padded).transpose(0, 1).flatten(0, 1)[:tokens]


ALONE = Mesh()


def ranks() -> int:
    """Number of processes that torchrun started; 1 without it."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """True in the process that prints for all."""
    return int(os.environ.get("RANK", "0")) == 0


def shape(tensor_parallel: int) -> tuple[int, int]:
    """(R along data, R along heads) of all ranks. Raises InputError if they cannot be arranged."""
    count = ranks()
    if tensor_parallel > 1 and count == 1:
        raise InputError(
            f"tensor_parallel {tensor_parallel}: this is a single process. Start it with torchrun "
            f"--nproc-per-node {tensor_parallel} -m kronsae.train, or give --tensor-parallel 1"
        )
    if count % tensor_parallel:
        raise InputError(
            f"tensor_parallel: {count} processes cannot be arranged in groups of {tensor_parallel}"
        )
    return count // tensor_parallel, tensor_parallel


def owners(members: Mapping[str, str], share: str, layout: tuple[int, int]) -> dict[str, int]:
    """The rank that trains each member of a sweep alone; empty if all ranks train all of them.

    members: the hookpoint of each, by name. Ranks take one member after another of a sweep at one
        hookpoint; of several hookpoints each rank has neighbours, so that it reads few of them.
    layout: (R along data, R along heads) of all ranks.
    Raises InputError if share is "members" and a rank would have none, or only some heads of one.
    """
    data, heads = layout
    if share == "tokens" or data * heads == 1:
        return {}
    if heads > 1:
        raise InputError(
            "share 'members': each autoencoder is trained by one process, but tensor_parallel is "
            f"{heads}: give --tensor-parallel 1, or --share tokens"
        )
    if len(members) < data:
        raise InputError(
            f"share 'members': {data} processes need at least {data} autoencoders, got "
            f"{len(members)}: start fewer processes, train more autoencoders, or give --share "
            "tokens"
        )
    hookpoints = list(dict.fromkeys(members.values()))
    if len(hookpoints) == 1:
        return {name: number % data for number, name in enumerate(members)}
    ordered = sorted(members, key=lambda name: hookpoints.index(members[name]))
    ranks = {name: number * data // len(ordered) for number, name in enumerate(ordered)}
    return {name: ranks[name] for name in members}


def join(tensor_parallel: int, device: torch.device, seconds: float) -> Mesh:
    """The mesh of all processes that torchrun started; `ALONE` without it.

    Ranks that hold one autoencoder's heads together are neighbours: on one machine, if they fit.
    seconds: a rank gives up when another one has not answered for so long.
    Uses nccl for tensors on a GPU, gloo for all others. Raises InputError if tensor_parallel does
    not divide the number of ranks.
    """
    data, heads = shape(tensor_parallel)
    if data * heads == 1:
        return ALONE
    timeout = timedelta(seconds=seconds)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        with _noticing_loss():
            dist.init_process_group(backend, timeout=timeout)
    mesh = arrange(torch.arange(data * heads).view(data, heads), device, timeout)
    assert mesh is not None  # the layout has all ranks
    return mesh


def leave() -> None:
    """Leave the other processes, when all of them are done."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def arrange(layout: Tensor, device: torch.device, timeout: timedelta) -> Mesh | None:
    """The mesh of the ranks in layout [R along data, R along heads]; None outside of it.

    All processes call it, those outside too.
    """
    inside, data, heads = dist.get_rank() in layout, layout.t().tolist(), layout.tolist()
    everyone = layout.flatten().tolist()
    along_data, _ = dist.new_subgroups_by_enumeration(data, timeout=timeout)
    along_heads, _ = dist.new_subgroups_by_enumeration(heads, timeout=timeout)
    world = dist.new_group(everyone, timeout=timeout, backend="gloo")
    reading = dist.new_group(everyone, timeout=timeout)
    if not inside:
        return None
    mesh = DeviceMesh.from_group(
        [along_data, along_heads], device.type, mesh=layout, mesh_dim_names=("data", "heads")
    )
    groups = mesh.get_group("data"), mesh.get_group("heads"), world, reading
    return Mesh(*(Group(group) for group in groups))
