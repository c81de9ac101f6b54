"""Bytes that live during a training step, without a GPU: `python -m benchmarks.memory --shape P3`.

The step runs on meta tensors, and its kernels' launches are noted, not made; each storage counts
from its allocation until nothing holds it. Beside the peak stands a formula, term by term, and on a
GPU what its allocator saw of the same step. What libraries take inside a call (cuBLAS, a sort) has
no tensor and is not counted.
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
from benchmarks.shapes import SHAPES, Shape, activations
from benchmarks.steps import CONTENDERS, LOSSES, Step
from kronsae.system.tables import markdown
from kronsae_kernels import torch_impl

DTYPE = torch.bfloat16
WIDTH = DTYPE.itemsize
"""Bytes of a number in matrix products, as on a GPU."""
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
        """From here on: peak and allocations."""
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
        from kronsae_kernels.triton_impl import operations

        self.launches.clear()  # they hold their arguments
        if func.namespace != "kronsae":
            return super().call(func, args, kwargs)
        # What such an operator does, where on meta tensors it only shapes its results.
        name = func._schema.name.split("::")[1]
        with self:
            results = getattr(operations, name)(*args[:-1])
        # The operators of the encoders return the indices last.
        return (*results[1:], results[0]) if name in ("encode", "dense_encode") else results


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
    """What one step holds."""

    state_bytes: int
    """Before it: weights, moments, copies of weights, the batch."""
    peak_bytes: int
    """In it, with all that."""
    largest: list[Allocation]
    """What it allocates, largest first."""


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


# The formula


def state_terms(shape: Shape, contender: str) -> dict[str, int]:
    """Bytes between steps."""
    encoder, *fused = contender.split()
    rows, size, d = shape.rows(encoder), shape.dict_size, shape.d
    terms = {
        "weights": 4 * shape.parameters(encoder),
        "moments": 8 * shape.parameters(encoder),
        "batch": 4 * shape.tokens * d,
    }
    if fused:
        terms["copies of weights"] = WIDTH * (rows + size) * d
    return terms


def moments_of_step(shape: Shape, contender: str) -> dict[str, dict[str, int]]:
    """Bytes beside the state, at the moments of a step in which it may hold most.

    A partial sum for each segment of so many codes as the kernels' configurations say.
    """
    from kronsae_kernels.triton_impl.configs import config_of

    encoder, *fused = contender.split()
    kron, d, rows, size = encoder == "kron", shape.d, shape.rows(encoder), shape.dict_size
    codes, of_batch = shape.tokens * shape.k, shape.tokens * d
    factors = 2 if kron else 1  # base and extension, or the value
    chunk = min(torch_impl.chunk_tokens(WIDTH * rows, torch.device("cuda")), shape.tokens)
    lengths = config_of("segments", GENERATION).blocks
    of_decoder = of_encoder = codes // lengths["ROW_LENGTH"] * 4 * d
    if kron:
        of_encoder = codes // lengths["HEAD_LENGTH"] * (1 + shape.n) * 4 * d
    # Sorted by latent: int32 token and latent; where each latent's begin.
    entries = 8 * codes + 4 * size
    batch = {"batch in low precision": WIDTH * of_batch}
    encode = {
        **batch,
        "pre-latents of a chunk": WIDTH * rows * chunk,
        # int64 index and float32 factors; of a chunk, its unsorted ranks, too.
        "codes": (8 + 4 * factors) * codes + 8 * shape.k * chunk,
    }
    if fused:
        update = {
            **batch,
            "residual": WIDTH * of_batch,
            # int64 index; value and three derivatives, and all of these sorted.
            "codes": (8 + 16 + 16) * codes + entries,
            "partial sums": max(of_decoder, of_encoder),
        }
        return {"encode": encode, "update": update}
    low = {"encoder in low precision": WIDTH * rows * (d + 1)}
    low_gradient = {"encoder's gradient in low precision": WIDTH * rows * (d + 1)}
    decoder = {"gradient of the decoder": 4 * size * d}
    of_decoding = {
        "derivative by the reconstruction": 4 * of_batch,
        # int64 index; factors, product, value, its derivative, and that sorted.
        "codes": (8 + 4 * factors + 4 * (factors - 1) + 12) * codes + entries,
        "partial sums": of_decoder,
    }
    # int64 index; factors, their derivatives, and these sorted.
    of_encoding = {"codes": (8 + 12 * factors) * codes + entries, "partial sums": of_encoder}
    return {
        "encode": {**encode, **low},
        "decoder's gradient": {**decoder, **batch, **low, **of_decoding},
        "encoder's gradient": {**decoder, **batch, **low, **low_gradient, **of_encoding},
        "last": {**decoder, **low_gradient, "gradient of the encoder": 4 * rows * (d + 1)},
    }


def formula(shape: Shape, contender: str) -> dict[str, int]:
    """Terms whose sum is the peak of a step."""
    moments = moments_of_step(shape, contender).values()
    return state_terms(shape, contender) | max(moments, key=lambda terms: sum(terms.values()))


# On a GPU, and the command


def measured_bytes(shape: Shape, contender: str, device: torch.device) -> int:
    """Peak of a GPU's allocator in the second step, with all that the step needs."""
    memory = Memory(device)
    step, x = CONTENDERS[contender].make(shape, device), activations(shape, device)
    step(x)
    torch.cuda.reset_peak_memory_stats(device)
    step(x)
    return memory.peak_bytes


def record_of(shape: Shape, contender: str, device: torch.device) -> dict[str, Any]:
    """Counted, computed and (on a GPU) measured bytes of a step."""
    counted, terms = count(shape, contender), formula(shape, contender)
    found = {
        "shape": shape._asdict(),
        "contender": contender,
        "terms_bytes": terms,
        "formula_bytes": sum(terms.values()),
        "state_bytes": counted.state_bytes,
        "counted_bytes": counted.peak_bytes,
        "largest": [one._asdict() for one in counted.largest[:5]],
        "measured_bytes": None,
    }
    if device.type == "cuda":
        try:
            found["measured_bytes"] = measured_bytes(shape, contender, device)
        except Exception as broken:  # the others still tell something
            found["skipped"] = reason(broken)
    return found


def table(found: dict[str, Any]) -> str:
    """The terms of the formula, the counted peak, and the largest allocations, in MiB."""
    shape, measured = Shape(**found["shape"]), found["measured_bytes"]
    sizes = found["terms_bytes"] | {"**formula**": found["formula_bytes"]}
    sizes |= {"**counted**": found["counted_bytes"]} | (
        {"**measured**": measured} if measured else {}
    )
    largest = [(one["shape"], f"{one['size_bytes'] / 2**20:,.1f}") for one in found["largest"]]
    rows = [(name, f"{size / 2**20:,.1f}") for name, size in sizes.items()]
    latents = f"{shape.tokens * shape.dict_size / 2**20:,.0f} MiB"
    return "\n\n".join(
        [
            f"**{shape}**, {found['contender']}",
            markdown(("bytes of a step", "MiB"), rows),
            f"largest allocations in the step (one [B, F] of a byte an element: {latents})",
            markdown(("shape", "MiB"), largest),
            found.get("skipped", ""),
        ]
    )


def main(arguments: list[str] | None = None) -> None:
    parser = command("memory", __doc__, shape=["P3"], device="auto")
    parser.add_argument("--contender", nargs="+", default=list(COUNTED[:2]), choices=COUNTED)
    options = parser.parse_args(arguments)
    device = options.device
    result = {"where": describe(device), "memory": []}
    for name in options.shape:
        for contender in options.contender:
            result["memory"].append(record_of(SHAPES[name], contender, device))
            print(table(result["memory"][-1]), flush=True)
            save(options.json, result)


if __name__ == "__main__":
    main()
