"""The cost of a training step on a card, from its compiled kernels: `python -m benchmarks.predict`.

Needs no GPU. Every kernel that a fused step launches at a shape is compiled for the card; from its
machine code follow three bounds, and from these a time:

    issue    instructions of all warps, at 4 a cycle and multiprocessor
    bytes    the floor of `benchmarks.floors`: multiply-adds, memory or cache, at the card's rates;
             for numbers gathered one by one, SECTOR bytes each
    latency  time of one program (simulated, `benchmarks.sass`) times the rounds of programs that
             are resident together
    expected (issue^4 + bytes^4 + latency^4)^(1/4), which is near the largest where one dominates,
             and RAMP_MS a launch

The rates and latencies were chosen before the kernels were tuned, and only a measurement on a card
may change them: kernels move, not their judge. A matrix product by cuBLAS, a sort and the small
operations have formulas of their own (`product_ms`, `sort_ms`, `small_ms`). The auxiliary pass is
counted with what it adds to the update. `python -m benchmarks.profile --predicted FILE` puts what
--json wrote beside the times of a card.
"""

import argparse
import json
import linecache
import math
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from textwrap import indent
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import sass
from benchmarks.ahead import VERSION, compiled, specialise, tool
from benchmarks.flags import command, save
from benchmarks.floors import (
    ASSUMED,
    DENSE_GOAL,
    ENCODE_GOAL,
    SPARSIFY_GOAL,
    STEP_GOAL,
    Ceilings,
    Work,
    stages,
)
from benchmarks.sass import Instruction, Latencies
from benchmarks.shapes import GOAL_SHAPES, SHAPES, Shape
from kronsae.config import SAEConfig, TrainConfig
from kronsae.model import objectives
from kronsae.system.tables import markdown
from kronsae_kernels.step import MOMENTS, TrainingStep
from kronsae_kernels.triton_impl.launch import Launch, record


class Card(NamedTuple):
    """Sizes and rates of a card. An H200's rates were measured on one; the others' are from data
    sheets, at the same share of the peak."""

    name: str
    processors: int
    """Streaming multiprocessors."""
    hertz: float
    shared: int
    """Bytes of shared memory of a multiprocessor."""
    ceilings: Ceilings


CARDS = {
    "sm_80": Card("A100", 108, 1.41e9, 164 * 1024, ASSUMED["A100"]),
    "sm_90": Card("H200", 132, 1.755e9, 228 * 1024, ASSUMED["H200"]),
    "sm_100": Card("B200", 148, 1.85e9, 228 * 1024, ASSUMED["B200"]),
}
LATENCIES = Latencies(
    first_level=40, cached=500, memory=800, shared=33, barrier=10, other=25, read=20
)
ISSUED = 4
"""Warp instructions a cycle and multiprocessor."""
REGISTERS, WARPS, BLOCKS = 65536, 64, 32
"""Registers, warps and programs that a multiprocessor holds at most."""
RAMP_MS = 0.0035
"""Overhead of a launch: until its programs run everywhere, and until the last has ended."""
SECTOR = 64
"""Bytes that memory delivers at least for a number that is gathered by itself."""
SMALL_MS = 0.0024
"""Time of a small operation of torch: its launch is most of it."""
SORT_MS_A_MILLION = 0.25
"""Time of a stable sort of a million int32 keys with their positions."""
PRODUCT_EFFICIENCY = 0.92
"""Share of the product's rate that cuBLAS reaches on full rounds of 128 x 256 tiles."""
PRODUCT_TILE = 128, 256
SPARSIFY_MS, DENSE_MS = 16.9, 25.1
"""Estimates for one step at F = 65,536, d = 2304, k = 50, B = 8192 on an H200 (sm_90):
eai-sparsify's, and a dense TopK SAE's in bfloat16."""
GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "predicted.json"
JUDGED = [*GOAL_SHAPES, "P3", "P4"]
"""Shapes that are held to the goals; where a step has less to do, launches are most of it."""


# What a kernel does


class Spec(NamedTuple):
    """How to follow a kernel's code, and which stage of `floors.stages` it does the work of."""

    stage: str | None
    """None: what it does belongs to another kernel's stage."""
    trips: Callable[[dict[str, Any], Shape], dict[str, float]] = lambda arguments, shape: {}
    """From a launch's arguments: the trips of each loop, by its source line (`sass.Trips`)."""
    memory: tuple[str, ...] = ()
    """Arrays (by the name in the kernel) that come from memory, besides MEMORY; or their loads of
    a width, as "row.128"."""
    gathered: Callable[[dict[str, Any], Shape], int] = lambda arguments, shape: 0
    """Numbers that a program gathers one by one."""


MEMORY = ("weight", "first", "second", "table", "pre")
"""Arrays too large for the cache, by their name in the kernels."""


def _entries(arguments: dict[str, Any], owners: int) -> float:
    """Rounds of a loop over the entries of a row (or head) of average length."""
    return arguments["tokens"].numel() / owners / arguments["ENTRIES"] + 0.5


CUT = {"while (left > cap)": 0, "if left > cap": 0, "while below + 1 < above": 0}
"""Lists that one cut shortens enough, without ties at the cut."""


def _rounds(bisections: int, **others: int) -> dict[str, float]:
    """Rounds of a cut as counted on the products of normal random pre-latents."""
    return {**CUT, "while (left > cap)": bisections, "while (left > enough)": 4, **others}


KERNELS: dict[str, Spec] = {
    "select_heads": Spec(
        "select",
        lambda a, s: _rounds(
            0 if a["cap"] > a["k"] else 9,
            **{"for i in tl.range(0, M)": s.m, "for j in tl.range(0, N)": s.n},
        ),
    ),
    "merge_lists": Spec(
        None,
        lambda a, s: _rounds(
            24 if a["cap"] == a["k"] else 10,
            **{"for start in range(0, length, PART)": -(-a["length"] // a["PART"])},
        ),
    ),
    "list_keys": Spec(
        None,
        lambda a, s: {"for extension in range(0, N)": s.n},
        gathered=lambda a, s: a["ENTRIES"] * (s.m + s.n if a["OF_ROWS"] else 1 + s.n),
    ),
    "select_rows": Spec(
        None,
        lambda a, s: _rounds(12, **{"for extension in range(0, N)": s.n}),
        gathered=lambda a, s: a["HEADS"] * (s.m + s.n),
    ),
    "select_latents": Spec(
        None,
        lambda a, s: _rounds(14),
        gathered=lambda a, s: (
            a["LISTED"] * (s.m + s.n if a["OF_HEADS"] else 1 + s.n) + 2 * a["k"] * a["RANK"]
        ),
    ),
    "rank_latents": Spec(None, gathered=lambda a, s: 2 * a["k"]),
    "combine": Spec(
        "decode", lambda a, s: {"for start in tl.range(0, r, ROWS": a["r"] / a["ROWS"]}
    ),
    "pair_dots": Spec(
        "decode", lambda a, s: {"for start in tl.range(0, d, WIDTH": s.d / a["WIDTH"]}
    ),
    "code_gradients": Spec(
        None, lambda a, s: {"for start in range(0, k, WIDTH)": -(-a["k"] // a["WIDTH"])}
    ),
    "decode_and_loss": Spec(
        "decode", lambda a, s: {"for start in tl.range(0, d, WIDTH": s.d / a["WIDTH"]}, ("x",)
    ),
    "group_entries": Spec(None, lambda a, s: {"while left > 0": 19}),
    "sum_row_segments": Spec(None, lambda a, s: {"for ": 0, "if whole": 0}),
    "sum_head_segments": Spec(None, lambda a, s: {"for ": 0, "if whole": 0}),
    "update_rows": Spec(
        "decoder update",
        lambda a, s: {
            "for _ in range(0, tl.where(resume < end, 2, 1))": 1,
            "for at in range(low, high, ENTRIES)": _entries(a, s.dict_size),
            "for _ in range(first, beyond)": 0,
            "if beyond > first": 0,
            "for at in range(start, end, MANY)": 0,
        },
        ("row.128",),  # of weights; an activation's numbers are half as wide
    ),
    "head_gradients": Spec(
        "encoder update",
        lambda a, s: {
            "for i in range(0, M)": s.m,
            "for _ in range(0, tl.where(resume < end, 2, 1))": 1,
            "for at in range(low, high, ENTRIES)": _entries(a, s.heads * s.m),
            "for _ in range(first_segment, beyond)": 0,
            "if chunk == 0": 0,
            "for at in range(start, end, MANY)": 0,
        },
        ("row.128",),  # of weights; an activation's numbers are half as wide
    ),
    "update_vector": Spec(None),
    "prepare_update": Spec(None, lambda a, s: {"for _ in range(24)": 24}),
    "finish_update": Spec(None, lambda a, s: {"for start in range(0, first, MANY)": 0}),
}


# Recording a step


class Operation(NamedTuple):
    """An operation of torch."""

    name: str
    bytes: int
    """Bytes of its tensors."""
    size: tuple[int, ...]
    """Shape of its (first) result."""
    item: int
    """Bytes of one number of it."""


VIEWS = (
    "view", "_unsafe_view", "slice", "select", "t", "transpose", "permute", "expand", "unsqueeze",
    "squeeze", "as_strided", "detach", "alias", "unbind", "split", "empty", "empty_like",
    "new_empty", "empty_strided", "_reshape_alias", "flatten", "lift_fresh",
)  # fmt: skip
PRODUCTS = ("addmm", "mm")


class Operations(TorchDispatchMode):
    """Notes the operations of torch that run on a card: not views, and not allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[Operation] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        name = function.overloadpacket.__name__
        if name not in VIEWS:
            tensors = [t for t in tree_leaves((arguments, result)) if isinstance(t, Tensor)]
            moved = sum(t.numel() * t.element_size() for t in tensors)
            first = next(t for t in tree_leaves(result) if isinstance(t, Tensor))
            self.noted.append(Operation(name, moved, tuple(first.shape), first.element_size()))
        return result


class Pass(NamedTuple):
    """A part of a step: its launches and operations."""

    launches: list[Launch]
    operations: list[Operation]

    def __add__(self, other: "Pass") -> "Pass":
        return Pass(self.launches + other.launches, self.operations + other.operations)


def auxiliary_of(shape: Shape) -> Shape:
    """The pass among dead latents, as training has it by default: its k, and its tokens."""
    sae = SAEConfig(d_model=shape.d, heads=shape.heads, m=shape.m, n=shape.n, k=shape.k)
    config = TrainConfig()
    tokens = objectives.auxk_tokens(sae, config, shape.tokens)
    return shape._replace(k=objectives.auxk_latents(sae, config), tokens=tokens)


def passes(
    shape: Shape, card: str, moments: str, auxiliary: bool, refine: int = 0
) -> tuple[Pass, Pass, Pass]:
    """A fused step in parts: forward and backward, the same among dead latents, update.

    auxiliary: whether there is a second part; as `kronsae.training.learner` makes it.
    refine: steps that refine values.
    """

    def meta(dtype: torch.dtype, *size: int) -> Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    single, rows = torch.float32, shape.m + shape.n
    x = meta(torch.bfloat16, shape.tokens, shape.d)
    silent, dying = meta(torch.int64, shape.dict_size), auxiliary_of(shape)
    parts: list[Pass] = []

    def note(call: Callable[[], Any]) -> Any:
        with record(card) as launches, Operations() as operations:
            result = call()
        parts.append(Pass(list(launches), operations.noted))
        return result

    def revive() -> None:
        dead, target = silent >= 1, -residual[: dying.tokens].float()
        share = dead.sum().clamp_(max=dying.k) * 1.0
        weight = share / (target.var(0, correction=0).mean() + 1.0)
        step.accumulate(
            x[: dying.tokens], target=target, k=dying.k, mask=dead, bias=False, weight=weight
        )

    with record(card):
        step = TrainingStep(
            meta(single, rows, shape.heads, shape.d).transpose(0, 1),
            meta(single, shape.heads, rows),
            meta(single, shape.dict_size, shape.d),
            meta(single, shape.d),
            m=shape.m,
            k=shape.k,
            dtype=torch.bfloat16,
            moments=moments,
            refine=meta(single, refine) if refine else None,
        )
    for _ in range(2):
        parts.clear()
        residual = note(lambda: step.accumulate(x)).residual
        note(revive if auxiliary else lambda: None)
        note(lambda: step.apply(lr=1e-3))
    return parts[0], parts[1], parts[2]


# Formulas


class Program(NamedTuple):
    """A compiled kernel as the formulas see it."""

    warps: int
    registers: int
    shared: int
    """Bytes of shared memory."""
    spills: int
    """Bytes of stack and local memory."""
    instructions: int
    """Instructions that one warp issues."""
    cycles: float
    """Cycles from its first instruction to its last."""
    barriers: int = 0
    """Barriers that one warp passes."""


def resident(program: Program, card: Card) -> int:
    """Programs that a multiprocessor holds at a time."""
    of_warp = -(-max(1, program.registers) * 32 // 256) * 256
    return max(
        1,
        min(
            REGISTERS // (of_warp * program.warps),
            card.shared // (program.shared + 1024),
            WARPS // program.warps,
            BLOCKS,
        ),
    )


def issue_ms(program: Program, programs: int, card: Card) -> float:
    issued = program.instructions * program.warps * programs
    return 1e3 * issued / (ISSUED * card.processors * card.hertz)


def latency_ms(program: Program, programs: int, card: Card) -> float:
    rounds = max(1.0, programs / (card.processors * resident(program, card)))
    return 1e3 * rounds * program.cycles / card.hertz


def together(*bounds_ms: float) -> float:
    """The expected time from the bounds."""
    return sum(bound**4 for bound in bounds_ms) ** 0.25


def product_ms(rows: int, columns: int, d: int, card: Card) -> float:
    """A product [rows, d] x [d, columns] by cuBLAS: full rounds of tiles at a share of the rate."""
    high, wide = PRODUCT_TILE
    rounds = -(-(-(-rows // high) * -(-columns // wide)) // card.processors)
    multiply_adds = rounds * card.processors * high * wide * d
    return 1e3 * multiply_adds / card.ceilings.multiply_adds_per_s / PRODUCT_EFFICIENCY


def sort_ms(operation: Operation) -> float:
    """Time of a sort, in proportion to the bytes of a key."""
    return math.prod(operation.size) / 1e6 * SORT_MS_A_MILLION * operation.item / 4


def small_ms(operation: Operation, card: Card) -> float:
    return max(SMALL_MS, 1e3 * operation.bytes / card.ceilings.bytes_per_s)


# Reading a kernel


def level_of(spec: Spec) -> Callable[[Instruction], str]:
    """A function that names the latency of a loading instruction, by the array in its line."""

    def level(one: Instruction) -> str:
        lines = [linecache.getline(one.file, one.line + offset) for offset in range(-2, 3)]
        here = "".join(lines[2:] if "load" in lines[2] else lines)
        names = re.findall(r"load\(\s*(\w+)", here)
        array = names[0] if names else ""
        if "hyper" in array:
            return "first_level"
        wide = f"{array}.{one.name.rpartition('.')[2]}"  # as "row.128"
        return "memory" if {array, wide} & {*MEMORY, *spec.memory} else "cached"

    return level


def read(launch: Launch, card: str, shape: Shape) -> Program:
    """A launch compiled for a card, its loops running as often as at a shape.

    Raises KeyError for a kernel that KERNELS does not have, and sass.UnknownLoop.
    """
    binary = compiled(specialise(launch, card), card)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(binary.asm["cubin"])
        usage = tool("cuobjdump", "--dump-resource-usage", file)
        code = sass.parse(tool("nvdisasm", "-c", "-hex", "-g", file))
    sizes = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}
    spec = KERNELS[launch.kernel.__name__]
    trips = {part: round(count) for part, count in spec.trips(launch.arguments, shape).items()}
    order = sass.path(code, trips)
    return Program(
        launch.num_warps,
        sizes["REG"],
        binary.metadata.shared,
        sizes["STACK"] + sizes["LOCAL"],
        len(order),
        sass.simulate(code, order, LATENCIES, level_of(spec)).cycles,
        sum(code.instructions[at].operation == "BAR" for at in order),
    )


def kernel_rows(
    launches: list[Launch], shape: Shape, card: str, works: dict[str, Work]
) -> list[dict[str, Any]]:
    """A row for each kernel: the `Program` of its last launch, and the times of all its launches.

    works: of `floors.stages`.  floor_ms: of the stage whose work it does; 0 where that is another
    kernel's.
    """
    machine, rows = CARDS[card], []
    for name in dict.fromkeys(launch.kernel.__name__ for launch in launches):
        mine = [launch for launch in launches if launch.kernel.__name__ == name]
        spec, issue, latency, gathered = KERNELS[name], 0.0, 0.0, 0
        for launch in mine:
            programs = math.prod(launch.grid)
            program = read(launch, card, shape)
            gathered += programs * spec.gathered(launch.arguments, shape) * SECTOR
            issue += issue_ms(program, programs, machine)
            latency += latency_ms(program, programs, machine)
        floor = machine.ceilings.floor_ms(works[spec.stage]) if spec.stage else 0.0
        moved = max(floor, machine.ceilings.floor_ms(Work(moved_bytes=gathered)))
        rows.append(
            {
                "kernel": name,
                "launches": len(mine),
                "programs": sum(math.prod(launch.grid) for launch in mine),
                **program._asdict(),
                "resident": resident(program, machine),
                "issue_ms": issue,
                "latency_ms": latency,
                "bytes_ms": moved,
                "floor_ms": floor,
                "expected_ms": together(issue, latency, moved) + RAMP_MS * len(mine),
            }
        )
    return rows


def other_rows(
    operations: list[Operation], shape: Shape, card: str, works: dict[str, Work]
) -> list[dict[str, Any]]:
    """Rows of what is not a kernel of ours: products by cuBLAS, sorts and small operations."""
    machine = CARDS[card]
    times: dict[str, list[float]] = {"product (cuBLAS)": [], "sort": [], "operations of torch": []}
    for one in operations:
        small = small_ms(one, machine)
        if one.name in PRODUCTS:
            product = product_ms(*one.size, shape.d, machine)
            times["product (cuBLAS)"].append(max(product, small))
        elif one.name == "sort":
            times["sort"].append(sort_ms(one))
        else:
            times["operations of torch"].append(small)
    stage = {"product (cuBLAS)": "encode", "sort": "group"}
    return [
        {
            "name": name,
            "count": len(ms),
            "floor_ms": machine.ceilings.floor_ms(works[stage[name]]) if name in stage else 0.0,
            "expected_ms": sum(ms),
        }
        for name, ms in times.items()
        if ms
    ]


def estimate(part: Pass, shape: Shape, card: str, works: dict[str, Work]) -> dict[str, Any]:
    """A part of a step, as JSON values; "step_ms": expected of all its rows."""
    rows = kernel_rows(part.launches, shape, card, works)
    others = other_rows(part.operations, shape, card, works)
    return {
        "rows": rows,
        "others": others,
        "launches": len(part.launches),
        "operations": len(part.operations),
        "step_ms": sum(one["expected_ms"] for one in (*rows, *others)),
    }


def predict(
    shape: Shape, card: str, moments: str = "float32", auxiliary: bool = False, refine: int = 0
) -> dict[str, Any]:
    """Rows, totals and goals of a shape on a card, as JSON values.

    moments: of AdamW. auxiliary: also what the pass that revives dead latents adds. refine: steps
    that refine values, for which the floor is that of a step without.
    """
    machine = CARDS[card]
    first, _, update = passes(shape, card, moments, auxiliary=False, refine=refine)
    works = stages(shape, "kron", 2, getattr(torch, moments).itemsize)
    step = estimate(first + update, shape, card, works)
    product = product_ms(shape.tokens, shape.columns, shape.d, machine)
    names = ("select", "merge", "rank", "encode", "finish")
    selection = [row for row in step["rows"] if row["kernel"].startswith(names)]
    selection += [one for one in step["others"] if one["name"].startswith("product")]
    figures = {
        "shape": shape._asdict(),
        "card": card,
        "triton": triton.__version__,
        "moments": moments,
        "refine": refine,
        **step,
        "floor_ms": sum(machine.ceilings.floor_ms(work) for work in works.values()),
        "product_ms": product,
        "encode_and_select_ms": sum(one["expected_ms"] for one in selection),
    }
    if auxiliary:
        dying = auxiliary_of(shape)
        _, second, longer = passes(shape, card, moments, auxiliary=True, refine=refine)
        revived = estimate(second, dying, card, stages(dying, "kron", 2))
        alone, both = (estimate(one, shape, card, works)["step_ms"] for one in (update, longer))
        figures["auxiliary"] = {
            "shape": dying._asdict(),
            **revived,
            "update_ms": both - alone,
            "total_ms": revived["step_ms"] + both - alone,
        }
    return figures


# Printing


LEGEND = """\
programs           of all launches, times the warps of one
regs               registers of a thread
fit                programs that a multiprocessor holds at a time
syncs              barriers that a warp passes
spills             bytes that do not fit in the registers of a thread
issue, latency     bounds: instructions of all warps; a program's time by the rounds of programs
bytes              bound: the floor, or the numbers that are gathered one by one
floor              of the stage whose work the kernel does: multiply-adds or bytes
time               expected: a little above the largest bound, and the launches
ratio              time / floor
"""
"""Legend of the tables' columns."""
COLUMNS = ("kernel", "programs", "regs", "fit", "syncs", "spills", "issue", "latency", "bytes")
COLUMNS += ("floor", "time", "ratio")


def table(figures: dict[str, Any]) -> str:
    """Markdown of one shape, with the goals below; and of its auxiliary pass, if there is one."""
    card = f"{figures['card']} ({CARDS[figures['card']].name}), Triton {figures['triton']}"
    if figures["moments"] != "float32":
        card += f", moments in {figures['moments']}"
    if figures["refine"]:
        card += f", values refined by {_many(figures['refine'], 'step')}"
    step = figures["step_ms"]
    total = "**step**", _counts(figures), figures["floor_ms"], step
    parts = [
        f"## {Shape(**figures['shape'])}, {card}",
        _rows(figures, [total]),
        "\n".join(f"- {line}" for line in verdicts(figures)),
    ]
    if "auxiliary" in figures:
        more = figures["auxiliary"]
        dying = Shape(**more["shape"])
        longer = "longer update", "", 0.0, more["update_ms"]
        total = "**auxiliary pass**", _counts(more), 0.0, more["total_ms"]
        share = f"- {more['total_ms'] / step:.1%} of the step's time"
        parts += [
            f"### Auxiliary pass: {dying.k} dead latents of each of {dying.tokens} tokens",
            _rows(more, [longer, total]),
            share + ", at most 15 %" * (dying.name in JUDGED),
        ]
    return "\n\n".join(parts) + "\n"


def _counts(figures: dict[str, Any]) -> str:
    return f"{figures['launches']} launches, {_many(figures['operations'], 'operation')}"


def _many(count: int, what: str) -> str:
    return f"{count} {what}" + "s" * (count != 1)


def _rows(figures: dict[str, Any], totals: list[tuple[str, str, float, float]]) -> str:
    """A line for each kernel and for what is not one of ours; totals: name, count, floor, time."""

    def ending(floor: float, time: float) -> tuple[str, str, str]:
        return f"{floor:.3f}", f"{time:.3f}", f"{time / floor:.2f}" if floor > 0.01 else ""

    rows: list[tuple[Any, ...]] = []
    for row in figures["rows"]:
        size = f"{row['programs']} x {row['warps']}"
        counts = (row[name] for name in ("registers", "resident", "barriers", "spills"))
        bounds = (f"{row[f'{kind}_ms']:.3f}" for kind in ("issue", "latency", "bytes"))
        end = ending(row["floor_ms"], row["expected_ms"])
        rows.append((row["kernel"], size, *counts, *bounds, *end))
    lines = [
        (one["name"], _many(one["count"], "call"), one["floor_ms"], one["expected_ms"])
        for one in figures["others"]
    ]
    for name, count, *times in lines + totals:
        rows.append((name, count, *7 * [""], *ending(*times)))
    return markdown(COLUMNS, rows)


def verdicts(figures: dict[str, Any]) -> list[str]:
    """The step beside its goals, where it has some, a sentence each."""
    shape, step = Shape(**figures["shape"]), figures["step_ms"]
    goal = f", at most {STEP_GOAL}" if shape.name in JUDGED else ""
    lines = [f"step: {step / figures['floor_ms']:.2f} of the floor{goal}"]
    there = shape.dict_size, shape.d, shape.k, shape.tokens, figures["card"]
    if there == (65536, 2304, 50, 8192, "sm_90"):
        lines += [
            f"step: {SPARSIFY_MS / step:.2f} times as fast as sparsify, at least {SPARSIFY_GOAL}",
            f"step: {DENSE_MS / step:.2f} times as fast as dense, at least {DENSE_GOAL}",
        ]
    both, product = figures["encode_and_select_ms"], figures["product_ms"]
    goal = f", at most {ENCODE_GOAL}" if shape.name in JUDGED else ""
    lines.append(
        f"encode and selection: {both:.2f} ms, {both / product:.2f} of the product alone, in one "
        f"piece ({product:.2f} ms){goal}"
    )
    return lines


def read_golden() -> dict[str, dict[str, dict[str, float]]]:
    """Expected milliseconds by Triton version, shape, and kernel ("step": the whole)."""
    return json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}


def write_golden(results: list[dict[str, Any]]) -> None:
    """Replace this Triton's part."""
    part = {
        one["shape"]["name"]: {
            **{row["kernel"]: round(row["expected_ms"], 4) for row in one["rows"]},
            "step": round(one["step_ms"], 4),
        }
        for one in results
    }
    table = dict(sorted({**read_golden(), VERSION: part}.items()))
    GOLDEN.write_text(json.dumps(table, indent=1) + "\n")


def make_parser() -> argparse.ArgumentParser:
    parser = command("predict", __doc__, shape=GOAL_SHAPES)
    parser.description = __doc__
    parser.epilog = f"columns of the tables (times in milliseconds):\n\n{indent(LEGEND, '    ')}"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    cards = ", ".join(f"{name} ({card.name})" for name, card in CARDS.items())
    parser.add_argument(
        "--card", choices=CARDS, default="sm_90", metavar="CARD",
        help=f"of {cards}; default: sm_90",
    )  # fmt: skip
    parser.add_argument(
        "--moments", choices=MOMENTS, default="float32", help="of AdamW; default: float32"
    )
    parser.add_argument(
        "--auxiliary", action="store_true", help="also what the pass that revives latents adds"
    )
    parser.add_argument(
        "--refine", type=int, default=0, metavar="N", help="steps that refine values; default: 0"
    )
    parser.add_argument("--update", action="store_true", help="rewrite tests/golden/predicted.json")
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(arguments)
    held = GOAL_SHAPES, "sm_90", "float32", 0
    if options.update and (options.shape, options.card, options.moments, options.refine) != held:
        parser.error(
            f"--update: the file has {' and '.join(GOAL_SHAPES)} on sm_90 with float32 moments: "
            "leave out --shape, --card, --moments and --refine"
        )
    if triton.knobs.runtime.interpret:
        parser.error("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    print(f"Estimates; times in milliseconds.\n\n{indent(LEGEND, '    ')}")
    results = []
    for name in options.shape:
        settings = options.card, options.moments, options.auxiliary, options.refine
        results.append(predict(SHAPES[name], *settings))
        print(table(results[-1]), flush=True)
    if options.update:
        write_golden(results)
    save(options.json, {"triton": VERSION, "shapes": results})


if __name__ == "__main__":
    sys.exit(main())
