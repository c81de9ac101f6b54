"""What a piece of code asks of torch and of the device: operations, kernels, synchronisations."""

import collections
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from kronsae_kernels.triton_impl import launch

FREE = {
    *("alias", "as_strided", "detach", "expand", "lift_fresh", "permute", "reshape", "select"),
    *("slice", "split", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "_unsafe_view"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
}
"""Operations that launch nothing: views, and memory that is not written."""

WAITS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "unique_dim"}
"""Operations whose result the host must have: it waits until the device is there."""


class Counts:
    """operations: by name, what launches something.  kernels: names, in order.  waits: names."""

    def __init__(self) -> None:
        self.operations: collections.Counter[str] = collections.Counter()
        self.kernels: list[str] = []
        self.waits: list[str] = []


class _Mode(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indexed = name in ("index", "index_put_", "index_put") and any(
            index is not None and index.dtype.itemsize == 1 for index in args[1]
        )
        if name in WAITS or indexed:
            self.counts.waits.append(name)
        if name not in FREE:
            self.counts.operations[name] += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Counts]:
    """Count what happens inside. What Triton's interpreter does for a kernel is not counted."""
    counts, start = Counts(), launch.start

    def noted(one: launch.Launch) -> None:
        counts.kernels.append(one.kernel.fn.__name__)
        with _disable_current_modes():
            start(one)

    tolist = Tensor.tolist

    def read(tensor: Tensor) -> list[Any]:  # which is no operation on a CPU
        counts.waits.append("tolist")
        return tolist(tensor)

    launch.start, Tensor.tolist = noted, read
    try:
        with _Mode(counts):
            yield counts
    finally:
        launch.start, Tensor.tolist = start, tolist
