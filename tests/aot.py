"""Compile the kernels ahead of time, for cards that are not there, and read off what came out.

Each case calls backend functions with meta tensors of a production shape under `record`; each
distinct launch is specialised as Triton's JIT would at the launch, and compiled for each target.

    python -m tests.aot --show      # compile, print a table, say what is wrong
    python -m tests.aot --update    # the same, and rewrite tests/golden/kernels.json

Without TRITON_INTERPRET, which turns kernels into Python functions. `test_aot` runs this.
"""

import argparse
import functools
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks import ahead
from benchmarks.ahead import VERSION, compiled, specialise, tool
from kronsae_kernels.step import Thresholds, TrainingStep
from kronsae_kernels.triton_impl import configs, operations
from kronsae_kernels.triton_impl.launch import Launch, record
from kronsae_kernels.triton_impl.operations import threshold as above

# Cases


@dataclass(frozen=True)
class Case:
    """A production shape, and the calls that launch its kernels."""

    name: str
    calls: Callable[[], Any]
    """Calls backend functions with meta tensors."""
    wgmma: tuple[str, ...] = ()
    """Kernels whose matrix products must be warp-group ones (HGMMA) on sm_90."""


def kron(
    dtype: torch.dtype,
    heads: int,
    m: int,
    n: int,
    d: int,
    k: int,
    *,
    composition: str = "mand",
    masked: bool = False,
    precision: str = "highest",
    tokens: int = 8192,
) -> None:
    """A Kron autoencoder's operations, forward and backward, the encoder in one pass too.

    precision: torch's for products of float32 matrices.
    """
    torch.set_float32_matmul_precision(precision)
    x, w_enc = _meta(dtype, tokens, d), _meta(dtype, m + n, heads, d).transpose(0, 1)
    b_enc = _meta(dtype, m + n, heads).t()
    mask = _meta(torch.bool, heads * m * n) if masked else None
    indices, base, extension = operations.encode(x, w_enc, b_enc, mask, m, k, composition)
    operations.encode_backward(base, extension, indices, x, w_enc, m, True, True)
    _decoder(dtype, heads * m * n, d, base, indices)
    if not masked and x.element_size() == 2:
        with configs.override("encode", ONE_PASS=1):
            operations.encode(x, w_enc, b_enc, None, m, k, composition)


def one_pass(heads: int, m: int, n: int, d: int, k: int, composition: str = "mand") -> None:
    """A Kron encoder in one pass."""
    x, w_enc = _meta(BF16, 8192, d), _meta(BF16, m + n, heads, d).transpose(0, 1)
    with configs.override("encode", ONE_PASS=1):
        operations.encode(x, w_enc, _meta(BF16, m + n, heads).t(), None, m, k, composition)


def dense(dtype: torch.dtype, size: int, d: int, k: int, tokens: int = 8192) -> None:
    """A TopK autoencoder's operations, forward and backward."""
    x, w_enc, b_enc = _meta(dtype, tokens, d), _meta(dtype, size, d), _meta(dtype, size)
    indices, values, none = operations.encode(x, w_enc, b_enc, None, None, k, "")
    operations.encode_backward(values, none, indices, x, w_enc, None, True, True)
    _decoder(dtype, size, d, values, indices)


def _decoder(dtype: torch.dtype, size: int, d: int, values: Tensor, indices: Tensor) -> None:
    w_dec, b_dec = _meta(dtype, size, d), _meta(dtype, d)
    out = operations.decode(values, indices, w_dec, b_dec)
    operations.decode_backward(out, values, indices, w_dec, None, True, True)


def step(
    dtype: torch.dtype,
    heads: int,
    m: int | None,
    n: int,
    d: int,
    k: int,
    *,
    composition: str = "mand",
    moments: str = "float32",
    bounds: list[int] | None = None,
    prefixes: list[int] | None = None,
    width: int | None = None,
    jumps: bool = False,
    tokens: int = 8192,
) -> None:
    """The fused step of a Kron autoencoder, or (m None) of a dense one of heads * n latents.

    Clipped, so that sums are made without an update, too.
    """
    size = heads * (m or 1) * n
    if m is None:
        w_enc, b_enc = _meta(F32, size, d), _meta(F32, size)
    else:
        w_enc, b_enc = _meta(F32, m + n, heads, d).transpose(0, 1), _meta(F32, heads, m + n)
    training = TrainingStep(
        w_enc, b_enc, _meta(F32, size, d), _meta(F32, d), m=m, k=k, composition=composition,
        dtype=dtype, moments=moments, silent=_meta(torch.int64, size),
        thresholds=Thresholds(_meta(F32, size), 0.1, 1.0) if jumps else None,
    )  # fmt: skip
    if jumps:
        training.set_thresholds(_meta(dtype, tokens, d), width=width)
    training.accumulate(_meta(dtype, tokens, d), bounds=bounds, prefixes=prefixes, width=width)
    training.apply(lr=1e-3, max_norm=1.0)


def nested(
    dtype: torch.dtype, size: int, d: int, k: int, bounds: list[int], tokens: int = 8192
) -> None:
    """A Matryoshka decoder's operations, forward and backward."""
    values, indices = _meta(F32, tokens, k), _meta(torch.int64, tokens, k)
    w_dec, b_dec = _meta(dtype, size, d), _meta(dtype, d)
    out = operations.decode(values, indices, w_dec, b_dec, bounds)
    operations.decode_backward(out, values, indices, w_dec, bounds, True, True)


def hierarchical(dtype: torch.dtype, size: int, d: int, k: int, tokens: int = 8192) -> None:
    """The loss of all prefixes of the codes, with its gradients."""
    values, indices = _meta(F32, tokens, k), _meta(torch.int64, tokens, k)
    w_dec, target = _meta(dtype, size, d), _meta(F32, tokens, d)
    operations.hierarchical(values, indices, w_dec, target, range(1, k + 1), True)


def auxiliary(heads: int, m: int, n: int, d: int, k: int, tokens: int = 96) -> None:
    """The pass among dead latents: few tokens, a mask, a target and a weight on the device."""
    size = heads * m * n
    w_enc, b_enc = _meta(F32, m + n, heads, d).transpose(0, 1), _meta(F32, heads, m + n)
    training = TrainingStep(
        w_enc, b_enc, _meta(F32, size, d), _meta(F32, d), m=m, k=50, dtype=BF16
    )  # fmt: skip
    training.accumulate(
        _meta(BF16, tokens, d), target=_meta(F32, tokens, d), k=k, mask=_meta(torch.bool, size),
        bias=False, weight=_meta(F32),
    )  # fmt: skip


def threshold(
    dtype: torch.dtype, heads: int, m: int | None, n: int, *, composition: str = "mand"
) -> None:
    """Latents above thresholds, of a Kron encoder or (m None) of a dense one of heads * n latents.

    The widths are not known without numbers: one that is sorted in a program, and one that is not.
    """
    size, tokens = heads * (m or 1) * n, 4096
    shape = torch.Size((heads, (m or 0) + n, 8))
    limits = above.Limits.of(_meta(F32, size), m, shape, composition, 1e-5)
    pre = _meta(dtype, tokens, size if m is None else heads * (m + n))
    counts = above.count_above(pre, limits)
    for width in (64, 256, 1000):
        above.select_above(pre, limits, counts, width, begin=4096)


def _meta(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def case(name: str, calls: Callable[..., Any], *values: Any, wgmma: Any = (), **named: Any) -> Case:
    return Case(name, functools.partial(calls, *values, **named), tuple(wgmma))


GEMM = ("encode_heads",)
BF16, F32, F16 = torch.bfloat16, torch.float32, torch.float16
CASES: list[Case] = [
    case("kron_32k", kron, BF16, 2048, 4, 4, 1536, 50, wgmma=GEMM),
    case("kron_64k", kron, BF16, 8192, 2, 4, 1536, 50, wgmma=GEMM),
    case("kron_128k", kron, BF16, 8192, 4, 4, 2304, 50, wgmma=GEMM),
    case("kron_1m", kron, BF16, 16384, 8, 8, 4096, 64, wgmma=GEMM),
    case("one_pass_2x4", one_pass, 8192, 2, 4, 2304, 50, wgmma=GEMM),
    case("one_pass_mul", one_pass, 4096, 4, 4, 2304, 50, composition="mul", wgmma=GEMM),
    case("kron_f32", kron, F32, 8192, 4, 4, 2304, 50),
    case("kron_tf32", kron, F32, 8192, 4, 4, 2304, 50, precision="high"),
    case("kron_f16", kron, F16, 2048, 4, 4, 1536, 50),
    case("kron_mul_masked", kron, BF16, 2048, 4, 4, 1536, 50, composition="mul", masked=True),
    case("topk_64k", dense, BF16, 65536, 1536, 50),
    case("step_64k", step, BF16, 8192, 2, 4, 1536, 50),
    case("step_128k", step, BF16, 8192, 4, 4, 2304, 50),
    case("step_1m", step, BF16, 16384, 8, 8, 4096, 64),
    case("step_1m_moments", step, BF16, 16384, 8, 8, 4096, 64, moments="bfloat16"),
    case("step_f32", step, F32, 2048, 4, 4, 1536, 50, composition="mul"),
    case("step_topk_64k", step, BF16, 8192, None, 8, 1536, 50),
    case("step_wide", step, BF16, 8192, 2, 4, 8192, 128),
    case("threshold_64k", threshold, BF16, 8192, 2, 4),
    case("threshold_1m", threshold, BF16, 16384, 8, 8),
    case("threshold_mul_f32", threshold, F32, 2048, 4, 4, composition="mul"),
    case("threshold_topk_64k", threshold, BF16, 8192, None, 8),
    case("nested_64k", nested, BF16, 65536, 2304, 50, [4096, 8192, 16384, 32768, 65536]),
    case("nested_f32", nested, F32, 65536, 2304, 50, [4096, 8192, 16384, 32768, 65536]),
    case("nested_wide", nested, BF16, 2**20, 4096, 512, [2**i for i in range(10, 21)]),
    case("aux_64k_2x4", auxiliary, 8192, 2, 4, 2304, 1152),
    case("aux_64k_4x4", auxiliary, 4096, 4, 4, 2304, 1152),
    case("aux_1m", auxiliary, 16384, 8, 8, 4096, 2048),
    case("step_nested_64k", step, BF16, 8192, 2, 4, 2304, 50, bounds=[2**i for i in range(11, 17)]),
    case("step_batch_64k", step, BF16, 8192, 2, 4, 2304, 50, width=100),
    case("step_batch_wide", step, BF16, 8192, None, 8, 1536, 50, width=400),
    case("step_jump_64k", step, BF16, 8192, 2, 4, 2304, 50, width=100, jumps=True),
    case("step_jump_topk", step, BF16, 8192, None, 8, 1536, 50, width=400, jumps=True),
    case("step_nested_f32", step, F32, 4096, None, 8, 1536, 50, bounds=[2**i for i in range(16)]),
    case("hierarchical_f32", hierarchical, F32, 65536, 2304, 64),
    case("step_hierarchical_64k", step, BF16, 8192, 2, 4, 2304, 50, prefixes=[*range(1, 51)]),
    case("step_hierarchical_wide", step, BF16, 8192, 2, 4, 8192, 128, prefixes=[64, 128]),
]

# What a card allows, and what is expected of a kernel


TARGETS = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
"""Card generation: bytes of shared memory that a block may have."""
MAX_THREADS = 1024
MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_TENSOR_MEMORY = 512
"""Columns of a Blackwell SM's tensor memory."""

MAX_SECONDS = 120
"""A kernel that takes longer to compile is wrong: registers far beyond what there are, mostly."""

GOLDEN = Path(__file__).with_name("golden") / "kernels.json"
TOLERANCE = 0.1
COMPARED = ("registers", "instructions")


@dataclass(frozen=True)
class Compiled:
    """What one kernel became on one target."""

    kernel: str
    """Case and kernel, as "kron_bf16/select_heads"."""
    target: str
    warps: int = 0
    stages: int = 0
    registers: int = 0
    spills: int = 0
    """Bytes of stack and local memory (cuda); spilled vector registers, bytes of scratch (hip)."""
    shared: int = 0
    tensor_memory: int = 0
    threads: int = 0
    grid: tuple[int, ...] = ()
    """The largest it is launched with, in each dimension."""
    instructions: int = 0
    matrix: dict[str, int] = field(default_factory=dict)
    """Matrix instructions, by kind: "HMMA", "HGMMA", "UTCHMMA", "v_mfma"."""
    dots: int = 0
    """Matrix products in the source that belong on the matrix units."""
    wgmma: bool = False
    seconds: float = 0.0
    error: str | None = None

    @property
    def key(self) -> str:
        return f"{self.kernel}/{self.target}"


def problems(found: Compiled, spills: int = 0) -> list[str]:
    """What is wrong with a compiled kernel, each naming the kernel, the expected and the found.

    spills: what it may have: what the golden table says of this Triton, whose ptxas is its own.
    """
    if found.error is not None:
        return [f"{found.key}: does not compile: {found.error}"]
    limit = TARGETS[found.target]
    matrix = " ".join(found.matrix) or "none"
    checks = [
        (found.spills <= spills, f"spills: expected {spills}", found.spills),
        (found.shared <= limit, f"shared memory: expected at most {limit}", found.shared),
        (
            found.tensor_memory <= MAX_TENSOR_MEMORY,
            f"tensor memory: expected at most {MAX_TENSOR_MEMORY} columns",
            found.tensor_memory,
        ),
        (found.threads <= MAX_THREADS, f"threads: expected at most {MAX_THREADS}", found.threads),
        (
            all(size <= most for size, most in zip(found.grid, MAX_GRID, strict=False)),
            f"grid: expected at most {MAX_GRID}",
            found.grid,
        ),
        (
            found.dots == 0 or len(found.matrix) > 0,
            f"{found.dots} matrix products: expected matrix instructions",
            matrix,
        ),
        (
            not (found.wgmma and found.target == "sm_90") or "HGMMA" in found.matrix,
            "matrix instructions: expected HGMMA",
            matrix,
        ),
    ]
    return [f"{found.key}: {what}, found {value}" for good, what, value in checks if not good]


def differences(found: Compiled, golden: dict[str, int]) -> list[str]:
    """Where a compiled kernel is far from its line of the golden table."""
    return [
        f"{found.key}: {name}: expected {golden[name]} within {TOLERANCE:.0%}, found {value}"
        f" ({value / golden[name] - 1:+.0%}; if this is meant: python -m tests.aot --update)"
        for name, value in ((name, getattr(found, name)) for name in COMPARED)
        if abs(value - golden[name]) > TOLERANCE * golden[name]
    ]


# The golden table: {"3.9": {"case/kernel/target": {"registers": ..., ...}}}

Table = dict[str, dict[str, dict[str, int]]]


def read_golden() -> Table:
    return json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {}


def write_golden(table: Table) -> None:
    """One line for each kernel and target."""
    parts = []
    for version, part in sorted(table.items()):
        lines = [f"{json.dumps(key)}: {json.dumps(line)}" for key, line in sorted(part.items())]
        parts.append(f"{json.dumps(version)}: {{\n" + ",\n".join(lines) + "\n}")
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def updated(table: Table, found: list[Compiled]) -> Table:
    """`table` with the lines of this Triton and the targets in `found` replaced."""
    targets = {one.target for one in found}
    part = {
        key: line
        for key, line in table.get(VERSION, {}).items()
        if key.rpartition("/")[2] not in targets
    }
    for one in found:
        if one.error is None:
            part[one.key] = {name: getattr(one, name) for name in (*COMPARED, "spills", "shared")}
            part[one.key] |= one.matrix
    return {**table, VERSION: part}


# Compile


def compile_launch(launch: Launch, target: str) -> Compiled:
    """Compile one launch for a target (a key of TARGETS) and read off what came out.

    Raises what the compiler raises.
    """
    start = time.perf_counter()
    binary = compiled(specialise(launch, target), target)
    read = _read_cubin if "cubin" in binary.asm else _read_amdgcn
    warps = getattr(binary.metadata, "num_warps", launch.num_warps)
    return Compiled(
        kernel=_name(launch),
        target=target,
        warps=warps,
        stages=launch.num_stages,
        shared=binary.metadata.shared,
        tensor_memory=getattr(binary.metadata, "tmem_size", None) or 0,
        threads=warps * ahead.TARGETS[target].warp_size,
        grid=launch.grid,
        dots=_matrix_products(binary.asm["ttir"]),
        **read(binary.asm),
        seconds=round(time.perf_counter() - start, 1),
    )


def _name(launch: Launch) -> str:
    return launch.kernel.__name__.strip("_")


def _matrix_products(ttir: str) -> int:
    """Products on the matrix units' types: float32 in full precision and float64 are not."""
    products = [line for line in ttir.splitlines() if re.search(r"\btt\.dot(_scaled)? ", line)]
    exact = re.compile(r"xf64>|xf32[^>]*> \* tensor<[^>]*xf32")
    split = re.compile(r"inputPrecision = (?!ieee)")
    return sum(bool(not exact.search(line) or split.search(line)) for line in products)


def _read_cubin(asm: dict[str, Any]) -> dict[str, Any]:
    """From the resource usage and the disassembly."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(asm["cubin"])
        usage = tool("cuobjdump", "--dump-resource-usage", file)
        listing = tool("nvdisasm", "-c", file)
    sizes = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}
    line = r"^\s*/\*[0-9a-f]+\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)"
    names = Counter(re.findall(line, listing, re.MULTILINE))
    del names["NOP"]  # padding
    return {
        "registers": sizes["REG"],
        "spills": sizes["STACK"] + sizes["LOCAL"],
        "instructions": names.total(),
        "matrix": {name: n for name, n in sorted(names.items()) if name.endswith("MMA")},
    }


def _read_amdgcn(asm: dict[str, Any]) -> dict[str, Any]:
    """From the assembly and the metadata at its end."""
    text = asm["amdgcn"]
    names = Counter(re.findall(r"^\t((?:s|v|ds|buffer|global|flat|scratch)_\w+)", text, re.M))
    del names["s_nop"]
    size = {name: int(value) for name, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", text, re.M)}
    matrix = sum(n for name, n in names.items() if name.startswith(("v_mfma", "v_smfma")))
    return {
        "registers": size["vgpr_count"],
        "spills": size["vgpr_spill_count"] + size["private_segment_fixed_size"],
        "instructions": names.total(),
        "matrix": {"v_mfma": matrix} if matrix else {},
    }


# All of them


@dataclass
class _Work:
    """One kernel to compile."""

    kernel: str
    target: str
    launch: Launch | None
    wgmma: bool
    grid: tuple[int, ...]
    error: str | None = None


def collect(cases: list[Case], target: str) -> list[_Work]:
    """The distinct launches of the cases on a target, each named after the first that makes it.

    A case's second form of a kernel is "case/kernel#2". A case that fails gives one with an error.
    """
    works: dict[Any, _Work] = {}
    for case in cases:
        count: Counter[str] = Counter()
        torch.set_float32_matmul_precision("highest")
        with record(target) as launches:
            error = None
            try:
                case.calls()
            except Exception as exception:  # reported as this case's result
                error = f"{type(exception).__name__}: {exception}"
        if error is not None or not launches:
            works[case.name] = _Work(
                f"{case.name}/(calls)", target, None, False, (), error or "launches nothing"
            )
        for launch in launches:
            name = _name(launch)
            try:
                key = specialise(launch, target).key
            except Exception as exception:
                works[case.name, name] = _Work(
                    f"{case.name}/{name}", target, launch, False, (), _short(exception)
                )
                continue
            if key not in works:
                count[name] += 1
                label = name if count[name] == 1 else f"{name}#{count[name]}"
                works[key] = _Work(f"{case.name}/{label}", target, launch, False, launch.grid)
            work = works[key]
            work.wgmma |= name in case.wgmma
            work.grid = tuple(map(max, work.grid, launch.grid))
    return list(works.values())


def case_of(kernel: str) -> str:
    """Name of the case that a kernel is named after."""
    return kernel.partition("/")[0]


def compile_all(works: list[_Work], workers: int) -> Iterator[Compiled]:
    """Compile, each in a process of its own: a compiler that crashes or hangs stops no other."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(reversed(works)), {}
    while waiting or running:
        while waiting and len(running) < workers:
            work = waiting.pop()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_compile, args=(work, sender))
            process.start()
            sender.close()
            running[receiver] = work, process, time.monotonic() + MAX_SECONDS
        ready = multiprocessing.connection.wait(list(running), timeout=1)
        for receiver, (work, process, end) in list(running.items()):
            if receiver in ready:
                yield _receive(receiver, work, process)
            elif time.monotonic() > end:
                os.killpg(process.pid, signal.SIGKILL)
                error = f"not done after {MAX_SECONDS} s"
                yield Compiled(work.kernel, work.target, error=error)
            else:
                continue
            process.join()
            del running[receiver]


def _receive(
    receiver: multiprocessing.connection.Connection,
    work: _Work,
    process: multiprocessing.process.BaseProcess,
) -> Compiled:
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        error = f"the compiler died (exit status {process.exitcode})"
        return Compiled(work.kernel, work.target, error=error)


def _compile(work: _Work, sender: multiprocessing.connection.Connection) -> None:
    os.setsid()  # so that the assembler it starts can be stopped with it
    error = work.error
    if error is None:
        try:
            found = compile_launch(work.launch, work.target)
            sender.send(replace(found, kernel=work.kernel, wgmma=work.wgmma, grid=work.grid))
            return
        except Exception as exception:
            error = _short(exception)
    sender.send(Compiled(work.kernel, work.target, error=error))


def _short(exception: BaseException) -> str:
    """The end of the innermost compiler error: the line of the kernel, and what is wrong there."""
    innermost: BaseException = exception
    while isinstance(innermost.__cause__, type(exception)):
        innermost = innermost.__cause__
    return f"{type(innermost).__name__}: {str(innermost).strip()[-500:]}"


# Command line


def show(found: list[Compiled]) -> str:
    """A table of all kernels."""
    titles = ["kernel", "target", "warps", "stages", "regs", "spills", "shared", "instr", "matrix"]
    rows = [
        [one.kernel, one.target, one.warps, one.stages, one.registers, one.spills, one.shared]
        + [one.instructions, " ".join(f"{name}:{n}" for name, n in one.matrix.items()) or "-"]
        + [f"{one.seconds:.1f}"]
        for one in sorted(found, key=lambda one: (one.kernel, list(TARGETS).index(one.target)))
        if one.error is None
    ]
    table = [[str(cell) for cell in row] for row in ([*titles, "seconds"], *rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    )


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 1 if a kernel does not compile or breaks a rule (the golden table apart)."""
    parser = argparse.ArgumentParser(prog="python -m tests.aot", description="Compile all kernels.")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--cases", default="", help="regular expression of the cases' names: only "
                        "kernels that are named after one are compiled")  # fmt: skip
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--show", action="store_true", help="print a table")
    parser.add_argument("--update", action="store_true", help="rewrite the golden table")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    if options.update and options.cases:
        parser.error("--update needs all cases")

    start = time.perf_counter()
    works = [work for target in options.targets for work in collect(CASES, target)]
    works = [work for work in works if re.search(options.cases, case_of(work.kernel))]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # nothing comes from an earlier run
        found = list(compile_all(works, options.workers))
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in found]), encoding="utf-8")
    if options.update:
        write_golden(updated(read_golden(), found))
    if options.show:
        print(show(found))
    wrong = [line for one in found for line in problems(one)]
    print(*wrong, sep="\n")
    seconds = time.perf_counter() - start
    print(f"{len(found)} kernels, {len(wrong)} problems, {seconds:.0f} s, Triton {VERSION}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
