"""Caches of activations against plain files, in one run: `python -m benchmarks.cache`.

No language model: shards of random numbers, written and read by the code that harvests and trains.
Beside them plain files of the same sizes, written and read from end to end, a mebibyte at a time,
into memory that is used again. The two take turns; a ratio is the median of the rounds' ratios.

The page cache is made the same for both: "cold" asks the system to drop the files' pages before
they are read (posix_fadvise; a host's own cache below a virtual disk stays as it is), "warm" reads
files that were read just before. Every write ends in fsync.
"""

import os
import shutil
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.flags import command, save
from benchmarks.measure import describe, spent
from kronsae.cache import CacheActivations, CacheIndex, Hookpoint
from kronsae.cache.index import INDEX_NAME, Shard, file_name, write_tensors
from kronsae.config import DataConfig
from kronsae.system.files import write_file, write_json
from kronsae.system.tables import markdown

BLOCK = 2**20
CONTEXT = 1024
BATCH = 4096
GROUP = 2
"""Shards that are shuffled together: few, beside the cache, as in use. The memory that two groups
take is touched once, which costs more than to read into it again."""


class Size(NamedTuple):
    """Size of a cache of random numbers."""

    shards: int = 96
    rows: int = 2048
    """Tokens of a shard."""
    width: int = 768
    dtype: str = "bfloat16"


def write_cache(folder: Path, size: Size) -> CacheIndex:
    contexts = -(-size.rows // (CONTEXT - 1))
    tokens = {
        "contexts": torch.zeros(contexts, CONTEXT, dtype=torch.int32),
        "mask": torch.ones(contexts, CONTEXT, dtype=torch.bool),
    }
    rows = torch.randn(size.rows, size.width).to(getattr(torch, size.dtype))

    def shard(number: int) -> Shard:
        marks = [
            write_tensors(folder / file_name("train", number, part), tensors)
            for part, tensors in (("tokens", tokens), (0, {"activations": rows}))
        ]
        return Shard(contexts, size.rows, marks[0], (marks[1],))

    folder.mkdir()
    index = CacheIndex(
        hookpoints=(Hookpoint("random", size.width),),
        dtype=size.dtype,
        context_length=CONTEXT,
        data=DataConfig(context_length=CONTEXT),
        model={"weights": "none", "parameters": 0},
        tokenizer="none",
        text="none",
        seed=0,
        heldout=(),
        train=tuple(shard(number) for number in range(size.shards)),
    )
    write_json(folder / INDEX_NAME, index.json())
    return index


def write_plain(folder: Path, sizes: Sequence[int]) -> int:
    """Write files of these sizes, from end to end; returns the bytes."""
    block = os.urandom(BLOCK)
    folder.mkdir()

    def write(path: Path, size: int) -> None:
        with open(path, "wb", buffering=0) as file:
            for start in range(0, size, BLOCK):
                file.write(block[: size - start])

    for number, size in enumerate(sizes):
        write_file(folder / f"{number:06d}", lambda path, size=size: write(path, size))
    return sum(sizes)


def read_plain(folder: Path) -> int:
    """Read all files, from end to end; returns the bytes."""
    block, size = bytearray(BLOCK), 0
    for path in sorted(folder.iterdir()):
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(block):
                size += count
    return size


def read_cache(folder: Path, together: int, batches: bool, verify: bool) -> int:
    """One epoch: its batches, or only the groups of shards that they are drawn from."""
    source = CacheActivations(folder, batch_size=BATCH, buffer_tokens=together, verify=verify)
    for _ in source if batches else source._groups():
        pass
    return sum(shard.activations[0].bytes for shard in source.index.train)


def drop(folder: Path) -> None:
    """Ask the system to forget the contents of the files."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Rate(NamedTuple):
    """Bytes a second of wall time, and of processor time (of all threads)."""

    wall: float
    cpu: float


def rate(size: int, seconds: dict[str, float]) -> Rate:
    """Rate of `size` bytes in the seconds that `measure.spent` gives."""
    return Rate(size / seconds["wall"], size / seconds["cpu"])


def compare(folder: Path, size: Size, rounds: int) -> dict[str, Any]:
    """Rates over rounds, by name, and the bytes of the cache."""
    rates: dict[str, list[Rate]] = defaultdict(list)
    cache, plain = folder / "cache", folder / "plain"
    for _ in range(rounds):
        for path in (cache, plain):
            shutil.rmtree(path, ignore_errors=True)
        index, seconds = spent(partial(write_cache, cache, size))
        rates["write cache"].append(rate(index.bytes, seconds))
        sizes = [file.bytes for shard in index.train for file in shard.files]
        rates["write plain"].append(rate(*spent(partial(write_plain, plain, sizes))))
    # Token ids are not read to train.
    shutil.rmtree(plain)
    write_plain(plain, [shard.activations[0].bytes for shard in index.train])
    of_cache = partial(read_cache, cache, GROUP * size.rows)
    readers = {
        "plain": partial(read_plain, plain),
        "shards": partial(of_cache, batches=False, verify=False),
        "batches": partial(of_cache, batches=True, verify=False),
        "batches, verified": partial(of_cache, batches=True, verify=True),
    }
    for state in ("cold", "warm"):
        for turn in range(rounds + (state == "warm")):
            for name, read in readers.items():
                if state == "cold":
                    drop(plain if name == "plain" else cache)
                measured = rate(*spent(read))
                if state == "cold" or turn:  # the first turn warms
                    rates[f"{state} {name}"].append(measured)
    return {
        **size._asdict(),
        "batch_size": BATCH,
        "shards_together": GROUP,
        "bytes": index.bytes,
        "bytes_per_token": index.bytes / index.train_rows,
        "rates": rates,
    }


def ratio(rates: dict[str, list[Rate]], name: str, plain: str, of: str) -> float:
    """Median over rounds of the ratio of two rates. of: "wall" or "cpu"."""
    pairs = zip(rates[name], rates[plain], strict=True)
    return statistics.median(getattr(a, of) / getattr(b, of) for a, b in pairs)


def report(figures: dict[str, Any]) -> str:
    rates, rows = figures["rates"], []
    for name, values in rates.items():
        state, of = name.split(" ", 1)
        cells = [name]
        for kind in Rate._fields:
            cells.append(f"{statistics.median(getattr(v, kind) for v in values) / 1e6:,.0f}")
            times = ratio(rates, name, f"{state} plain", kind)
            cells.append("" if of == "plain" else f"×{times:.2f}")
        rows.append(cells)
    return (
        f"{figures['shards']} shards of {figures['rows']:,} tokens, d = {figures['width']:,}, "
        f"{figures['dtype']}: {figures['bytes'] / 2**20:,.0f} MiB, "
        f"{figures['bytes_per_token']:,.1f} bytes a token; "
        f"batches of {figures['batch_size']:,} in float32\n\n"
    ) + markdown(("", "MB/s", "to plain files", "MB a CPU second", "to plain files"), rows)


def main(arguments: list[str] | None = None) -> None:
    parser = command("cache", __doc__, rounds=7)
    parser.add_argument("--folder", type=Path, help="where the disk is (default: temporary files)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        figures = compare(Path(folder), Size(), options.rounds)
    print(report(figures))
    save(options.json, {"where": describe(torch.device("cpu")), "cache": figures})


if __name__ == "__main__":
    main()
