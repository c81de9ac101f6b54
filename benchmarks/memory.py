"""Bytes that live during a training step, without a GPU: `python -m benchmarks.memory --shape P3`.

The step runs on meta tensors, and its kernels' launches are noted, not made; each storage counts
from its allocation until nothing holds it. On a GPU, what its allocator saw of the same step stands
beside that. What libraries take inside a call (cuBLAS, a sort) has no tensor and is not counted.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.flags import command, save
from benchmarks.measure import Memory, describe, reason
from benchmarks.report import memory_table
from benchmarks.shapes import SHAPES, Shape, activations
from benchmarks.steps import CONTENDERS, LOSSES, Step

DTYPE = torch.bfloat16
"""Dtype of matrix products, as on a GPU."""
GENERATION = "sm_90"
"""Card generation whose kernels' configurations are taken (they decide how segments are cut)."""
COUNTED = ("kron fused", "dense fused", "kron", "dense")
"""The contenders of `steps` that can be counted: ours."""


class Allocation(NamedTuple):
    """A storage that was made."""

    size_bytes: int
    operator: str
    shape: tuple[int, ...]


class Live(TorchDispatchMode):
    """Counts the bytes of all storages made inside it that something still holds."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self.allocations: list[Allocation] = []
        self._known: set[int] = set()

    def begin(self) -> None:
        """Count peak and allocations from here on."""
        self.peak_bytes, self.allocations = self.live_bytes, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = self.call(func, args, kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor, str(func))
        return result

    def call(self, func, args, kwargs):
        return func(*args, **kwargs)

    def _note(self, tensor: Tensor, operator: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        weakref.finalize(storage, self._forget, key, size)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        self.allocations.append(Allocation(size, operator, tuple(tensor.shape)))

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live_bytes -= size


class LiveKernels(Live):
    """`Live` for operations whose kernels are not there: on meta tensors, launches noted alone."""

    def __init__(self, launches: list) -> None:
        super().__init__()
        self.launches = launches

    def call(self, func, args, kwargs):
        from kronsae_kernels.rules import OPERATORS

        self.launches.clear()  # they hold their arguments
        if func.namespace != "kronsae":
            return super().call(func, args, kwargs)
        # Do its work here: on meta tensors the operator itself only shapes its results.
        with self:
            return OPERATORS[func._schema.name.split("::")[1]].compute(*args)


@contextmanager
def counting() -> Iterator[Live]:
    """Inside, Triton operations run on meta tensors, and what they allocate is counted."""
    from kronsae_kernels.triton_impl.launch import record

    with record(GENERATION) as launches, LiveKernels(launches) as live:
        yield live


def autograd_step(encoder: str, shape: Shape) -> Step:
    """`steps.unfused` on meta tensors, which know neither autocast nor the fused AdamW.

    So casts are written out, and of AdamW there are the moments: it allocates nothing else.
    """
    loss_of, parameters_of = LOSSES[encoder]
    parameters = parameters_of(shape, torch.device("meta"))
    moments = [torch.zeros_like(p) for p in parameters for _ in range(2)]

    def step(x: Tensor) -> Tensor:
        w_enc, b_enc, w_dec, b_dec = parameters
        low = [tensor.to(DTYPE) for tensor in (x, w_enc, b_enc)]
        loss = loss_of(shape, *low, w_dec, b_dec, impl="triton")
        del low
        loss.backward()
        torch._foreach_mul_(moments, 0.9)
        for parameter in parameters:
            parameter.grad = None
        return loss.detach()

    return step


class Count(NamedTuple):
    """Memory of one step."""

    state_bytes: int
    """Held before it: weights, moments, copies of weights, the batch."""
    peak_bytes: int
    """Held in it at most, with all that."""
    largest: list[Allocation]
    """Its allocations, largest first."""


def count(shape: Shape, contender: str) -> Count:
    """Count the second step of a contender of ours (the first one makes copies that stay)."""
    encoder, *fused = contender.split()
    with counting() as live:
        if fused:
            step = CONTENDERS[contender].make(shape, torch.device("meta"))
        else:
            step = autograd_step(encoder, shape)
        x = torch.empty(shape.tokens, shape.d, device="meta")
        step(x)
        live.begin()
        before = live.live_bytes
        step(x)
        largest = sorted(live.allocations, key=lambda one: -one.size_bytes)
        return Count(before, live.peak_bytes, largest)


def measured_bytes(shape: Shape, contender: str, device: torch.device) -> int:
    """Peak of a GPU's allocator in the second step, with all that the step needs."""
    memory = Memory(device)
    step, x = CONTENDERS[contender].make(shape, device), activations(shape, device)
    step(x)
    torch.cuda.reset_peak_memory_stats(device)
    step(x)
    return memory.peak_bytes


def record_of(shape: Shape, contender: str, device: torch.device) -> dict[str, Any]:
    """Counted and (on a GPU) measured bytes of a step."""
    counted = count(shape, contender)
    figures = {
        "shape": shape._asdict(),
        "contender": contender,
        "state_bytes": counted.state_bytes,
        "counted_bytes": counted.peak_bytes,
        "largest": [one._asdict() for one in counted.largest[:5]],
        "measured_bytes": None,
    }
    if device.type == "cuda":
        try:
            figures["measured_bytes"] = measured_bytes(shape, contender, device)
        except Exception as broken:  # the others still tell something
            figures["skipped"] = reason(broken)
    return figures


def main(arguments: list[str] | None = None) -> None:
    parser = command("memory", __doc__, shape=["P3"], device="auto")
    parser.add_argument("--contender", nargs="+", default=list(COUNTED[:2]), choices=COUNTED)
    options = parser.parse_args(arguments)
    result = {"where": describe(options.device), "memory": []}
    for name in options.shape:
        for contender in options.contender:
            result["memory"].append(record_of(SHAPES[name], contender, options.device))
            save(options.json, result)
    print(memory_table(result))


if __name__ == "__main__":
    main()
