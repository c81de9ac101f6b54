"""The cost of 16 M latents and 100 B tokens on many GPUs: `python -m benchmarks.scale`.

A model on paper, all of it an estimate. The stages of a step and what they move are those of
`floors`, on the part of the dictionary that a rank owns, at the rates of H200. Heads are split over
all ranks (tensor parallel, as in `kronsae`'s), so that every rank sees every token of a batch and
no gradient is ever sent. Its language model reads its share of the tokens.

--write puts the tables into docs/scale.md.
"""

import argparse
import itertools
from pathlib import Path
from typing import NamedTuple

from benchmarks.floors import ASSUMED, Ceilings, stages
from benchmarks.shapes import Shape
from kronsae.system.tables import markdown

DOCUMENT = Path(__file__).parents[1] / "docs" / "scale.md"
BEGIN, END = "<!-- tables: python -m benchmarks.scale --write -->", "<!-- end -->"

SHAPE = Shape("16M", d=4096, heads=2**18, m=8, n=8, k=64, tokens=8192)
TOKENS = 100_000_000_000
GPUS = (8, 64, 512)
BATCHES = (8192, 65_536)


class Machine(NamedTuple):
    """A card and its surroundings."""

    ceilings: Ceilings
    memory_bytes: float
    """Memory of a card."""
    link_bytes_per_s: float
    """Between the cards of a node, each way."""
    network_bytes_per_s: float
    """Between nodes, each way: all adapters of a node together."""
    cards: int
    """Cards of a node."""


H200 = Machine(
    ASSUMED["H200"],
    memory_bytes=141e9,
    link_bytes_per_s=450e9,
    network_bytes_per_s=8 * 50e9,
    cards=8,
)
"""Ceilings: assumed, 790 TFLOP/s in bfloat16 and 4.3 TB/s of memory seen on such a card, 5.5 TB/s
from its cache. Memory and NVLink (900 GB/s, both ways together): NVIDIA's data sheet of the H200.
Network: an adapter of 400 Gbit/s for each of 8 cards."""

MODEL_MULTIPLY_ADDS = 16 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14_336)
"""A token in the first 16 blocks of Llama-3.1-8B, by its config.json: queries and outputs, keys and
values of 8 heads of 128, and the three products of the MLP. (Attention's own products, 2 percent of
it at 1,024 tokens, left out.)"""

BYTES = 2
"""Bytes of a number that is multiplied or sent: bfloat16."""
STATE = {"float32": 12 + BYTES, "bfloat16": 4 + 2 + 2 + BYTES}
"""Bytes a weight by the moments' dtype: the weight, two moments, a copy for products."""
BISECTIONS = 31
"""Steps of a bisection: the bits of a positive float32."""
LATENCY = 20e-6
"""Seconds of a small all-reduce: assumed."""


def step(shape: Shape, ranks: int, machine: Machine) -> dict[str, float]:
    """A step's milliseconds on each rank, by what limits them. Nothing overlaps: floors add up.

    "optimizer": the backward pass, fused with AdamW over the rank's weights. "exchange": x,
    reconstructions and residuals. "maxima": what makes the selection exact across ranks.
    """
    part = shape._replace(heads=shape.heads / ranks, k=shape.k / ranks)
    ms = {
        name: machine.ceilings.floor_ms(work) for name, work in stages(part, "kron", BYTES).items()
    }
    model = shape.tokens * MODEL_MULTIPLY_ADDS / ranks / machine.ceilings.multiply_adds_per_s
    # All-gather of x, reduce-scatter of float32 sums, all-gather of residuals.
    exchanged = shape.tokens * shape.d * (BYTES + 4 + BYTES)
    return {
        "language model": 1e3 * model,
        "encode": ms["encode"],
        "select": ms["select"] + ms["group"],
        "decode": ms["decode"],
        "optimizer": ms["decoder update"] + ms["encoder update"],
        "exchange": 1e3 * gather_seconds(exchanged, ranks, machine),
        "maxima": 1e3 * min(maxima_seconds(shape, ranks, machine)),
    }


def gather_seconds(size: float, ranks: int, machine: Machine) -> float:
    """Seconds until each rank has (or has given) all `size` bytes; each holds an equal part.

    Rings through the nodes: a node's adapters work side by side, its cards pass on what came.
    """
    nodes = max(1, ranks // machine.cards)
    inside = size * (ranks - 1) / ranks / machine.link_bytes_per_s
    between = size * (nodes - 1) / nodes / machine.network_bytes_per_s
    return max(inside, between)


def maxima_seconds(shape: Shape, ranks: int, machine: Machine) -> tuple[float, float]:
    """Two exact ways to agree on the k heads with the largest maxima over all ranks.

    Each rank's own k are gathered, as float32 and int32. Or ranks add up how many of their maxima
    lie above a threshold, a count a token, once for each step of a bisection on its bits.
    """
    if ranks == 1:
        return 0.0, 0.0
    gathered = gather_seconds(8 * shape.tokens * shape.k * ranks, ranks, machine)
    # An all-reduce moves what a reduce-scatter and an all-gather do.
    count = LATENCY + 2 * gather_seconds(4 * shape.tokens, ranks, machine)
    return gathered, BISECTIONS * count


def memory_bytes(shape: Shape, ranks: int, moments: str) -> float:
    """A rank's bytes: weights, moments, when latents fired, and what a step makes of all tokens."""
    weights = shape.parameters("kron") / ranks * STATE[moments] + 8 * shape.dict_size / ranks
    pre_latents = BYTES * shape.tokens * shape.columns / ranks
    rows = shape.tokens * shape.d * (BYTES + 4 + BYTES)
    return weights + pre_latents + rows


def fits(shape: Shape, ranks: int, machine: Machine) -> str:
    """The moments' dtype with which a rank's part fits into nine tenths of its card, or "no"."""
    limit = 0.9 * machine.memory_bytes
    return next((name for name in STATE if memory_bytes(shape, ranks, name) <= limit), "no")


def run_table() -> str:
    """Markdown of the run: sizes of its autoencoder, language model and activations."""
    shape, weights = SHAPE, SHAPE.parameters("kron")
    state = f"{12 * weights / 1e12:,.2f} TB"
    activations = f"activations of {TOKENS / 1e9:,.0f} G tokens, in bfloat16"
    facts = {
        "latents F, of width d": f"{shape.dict_size:,}, {shape.d:,}",
        "heads × m × n, k": f"{shape.heads:,} × {shape.m} × {shape.n}, {shape.k}",
        "weights": f"{weights / 1e9:,.1f} G",
        "weights and moments in float32": state,
        "the same, a checkpoint": state,
        "multiply-adds a token: language model": f"{MODEL_MULTIPLY_ADDS / 1e9:,.1f} G",
        "encoder, KronSAE": f"{shape.d * shape.columns / 1e9:,.1f} G",
        "encoder, dense TopK of as many latents": f"{shape.d * shape.dict_size / 1e9:,.1f} G",
        activations: f"{TOKENS * shape.d * BYTES / 1e12:,.0f} TB",
    }
    return markdown(("", ""), facts.items())


def tables() -> str:
    """All tables, as Markdown."""
    memory, steps, heads = [], [], []
    for ranks, batch in itertools.product(GPUS, BATCHES):
        shape = SHAPE._replace(tokens=batch)
        where = ranks, f"{batch:,}"
        sizes = (f"{memory_bytes(shape, ranks, kind) / 2**30:,.1f}" for kind in STATE)
        memory.append((*where, *sizes, fits(shape, ranks, H200)))
        parts = step(shape, ranks, H200)
        total, largest = sum(parts.values()), max(parts, key=parts.get)
        days = f"{TOKENS / batch * total / 1e3 / 86_400:,.1f}"
        cells = (f"{ms:,.2f}" for ms in parts.values())
        steps.append((*where, *cells, f"{total:,.1f}", largest, days))
        ways = maxima_seconds(shape, ranks, H200)
        heads.append((*where, *(f"{1e3 * seconds:,.2f}" for seconds in ways)))
    where = "GPUs", "batch"
    sizes = "GiB, moments in float32", "in bfloat16", "fits a card with moments in"
    ways = "each rank's k maxima gathered", "counts, by bisection"
    return "\n\n".join(
        [
            "**The run** (estimate)",
            run_table(),
            "**A rank's memory** (estimate)",
            markdown((*where, *sizes), memory),
            "**A step, ms on each rank** (estimate: floors)",
            markdown((*where, *parts, "sum", "largest", "days for all tokens"), steps),
            "**Agreeing on the heads, ms** (estimate)",
            markdown((*where, *ways), heads),
        ]
    )


def put(document: str, text: str) -> str:
    """The document with these tables in the place of those that it has."""
    before, rest = document.split(BEGIN)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.scale", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scale.md")
    text = tables()
    if parser.parse_args().write:
        DOCUMENT.write_text(put(DOCUMENT.read_text(encoding="utf-8"), text), encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
