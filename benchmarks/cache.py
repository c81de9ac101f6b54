"""Caches of activations against plain files, in one run: `python -m benchmarks.cache`.

No language model: shards of random numbers, written and read by the code that harvests and trains.
Beside them plain files of the same sizes, written and read from end to end, a mebibyte at a time,
into memory that is used again. The two take turns; a ratio is the median of the rounds' ratios.

The page cache is made the same for both: "cold" asks the system to drop the files' pages before
they are read (posix_fadvise; a host's own cache below a virtual disk stays as it is), "warm" reads
files that were read just before. Every write ends in fsync.

Peak memory is that of processes that read caches of several sizes once, from end to end.
"""

import os
import re
import shutil
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.flags import command, positive, save
from benchmarks.measure import Apart, describe, spent
from kronsae.cache import CacheActivations, CacheIndex, Hookpoint
from kronsae.cache.index import INDEX_NAME, Shard, file_name, write_tensors
from kronsae.config import DataConfig
from kronsae.system.files import write_file, write_json
from kronsae.system.tables import markdown

BLOCK = 2**20
CONTEXT = 1024
GROUP = 2
"""Shards that are shuffled together: few, beside the cache, as in use. The memory that two groups
take is touched once, which costs more than to read into it again."""


def write_cache(folder: Path, shards: int, rows: int, width: int, dtype: str) -> CacheIndex:
    """A cache of random numbers: `shards` shards of `rows` tokens."""
    contexts = -(-rows // (CONTEXT - 1))
    tokens = {
        "contexts": torch.zeros(contexts, CONTEXT, dtype=torch.int32),
        "mask": torch.ones(contexts, CONTEXT, dtype=torch.bool),
    }
    activations = {"activations": torch.randn(rows, width).to(getattr(torch, dtype))}

    def shard(section: str, number: int) -> Shard:
        marks = [
            write_tensors(folder / file_name(section, number, part), tensors)
            for part, tensors in (("tokens", tokens), (0, activations))
        ]
        return Shard(contexts, rows, marks[0], (marks[1],))

    folder.mkdir()
    index = CacheIndex(
        hookpoints=(Hookpoint("random", width),),
        dtype=dtype,
        context_length=CONTEXT,
        data=DataConfig(context_length=CONTEXT),
        model={"weights": "none", "parameters": 0},
        tokenizer="none",
        text="none",
        seed=0,
        heldout=(),
        train=tuple(shard("train", number) for number in range(shards)),
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
    """Of so many bytes in the seconds that `measure.spent` gives."""
    return Rate(size / seconds["wall"], size / seconds["cpu"])


def read_cache(folder: Path, together: int, batch_size: int, batches: bool, verify: bool) -> int:
    """One epoch: its batches, or only the groups of shards that they are drawn from."""
    source = CacheActivations(folder, batch_size=batch_size, buffer_tokens=together, verify=verify)
    for _ in source if batches else source._groups():
        pass
    return sum(shard.activations[0].bytes for shard in source.index.train)


READERS = {
    "shards": (False, False),
    "shards, verified": (False, True),
    "batches": (True, False),
    "batches, verified": (True, True),
}
"""Whether batches are made, and checksums compared."""


def compare(folder: Path, how: dict[str, Any], batch_size: int, rounds: int) -> dict[str, Any]:
    """Rates over rounds, by name, and the size of the cache. how: as of `write_cache`."""
    rates: dict[str, list[Rate]] = defaultdict(list)
    cache, plain = folder / "cache", folder / "plain"
    for _ in range(rounds):
        for path in (cache, plain):
            shutil.rmtree(path, ignore_errors=True)
        index, seconds = spent(lambda: write_cache(cache, **how))
        rates["write cache"].append(rate(index.bytes, seconds))
        sizes = [file.bytes for shard in index.train for file in shard.files]
        rates["write plain"].append(rate(*spent(partial(write_plain, plain, sizes))))
    # Token ids are not read to train.
    shutil.rmtree(plain)
    write_plain(plain, [shard.activations[0].bytes for shard in index.train])
    readers: dict[str, tuple[Path, Callable[[], int]]] = {
        "plain": (plain, partial(read_plain, plain))
    }
    for name, options in READERS.items():
        read = partial(read_cache, cache, GROUP * how["rows"], batch_size, *options)
        readers[name] = cache, read
    for state in ("cold", "warm"):
        for turn in range(rounds + (state == "warm")):
            for name, (files, read) in readers.items():
                if state == "cold":
                    drop(files)
                found = rate(*spent(read))
                if state == "cold" or turn:  # the first turn warms
                    rates[f"{state} {name}"].append(found)
    return {
        **how,
        "batch_size": batch_size,
        "shards_together": GROUP,
        "bytes": index.bytes,
        "bytes_per_token": index.bytes / index.train_rows,
        "activation_bytes_per_token": how["width"] * getattr(torch, how["dtype"]).itemsize,
        "rates": rates,
    }


def ratio(rates: dict[str, list[Rate]], name: str, plain: str, of: str) -> float:
    """Median over rounds. of: "wall" or "cpu"."""
    pairs = zip(rates[name], rates[plain], strict=True)
    return statistics.median(getattr(a, of) / getattr(b, of) for a, b in pairs)


def peak_mib(folder: Path, together: int) -> tuple[float, float]:
    """Peak memory of a process that reads a cache once, and of one that only opens it."""
    found = []
    for epochs in (1, 0):
        call = Apart()
        found.append(call(peak_of_reading, folder, together, epochs, seconds=600))
        call.close()
    return found[0], found[1]


def peak_of_reading(folder: Path, together: int, epochs: int) -> float:
    """This process's peak memory, in MiB, once it has read a cache so many times."""
    for _ in CacheActivations(folder, batch_size=4096, buffer_tokens=together, epochs=epochs):
        pass
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def report(found: dict[str, Any]) -> str:
    cache, rates = found["cache"], found["cache"]["rates"]
    rows = []
    for name, values in rates.items():
        state, of = name.split(" ", 1)
        cells = [name]
        for kind in Rate._fields:
            cells.append(f"{statistics.median(getattr(v, kind) for v in values) / 1e6:,.0f}")
            times = ratio(rates, name, f"{state} plain", kind)
            cells.append("" if of == "plain" else f"×{times:.2f}")
        rows.append(cells)
    memory = [
        (
            row["shards"],
            f"{row['cache_mib']:,.0f}",
            f"{row['peak_mib']:,.0f}",
            f"{row['peak_mib'] - row['opened_mib']:,.0f}",
        )
        for row in found["memory"]
    ]
    where = found["where"].items()
    return "\n\n".join(
        [
            ", ".join(f"{key} {value}" for key, value in where if value is not None)
            + f"\n{cache['shards']} shards of {cache['rows']:,} tokens, d = {cache['width']:,}, "
            f"{cache['dtype']}: {cache['bytes'] / 2**20:,.0f} MiB, {cache['bytes_per_token']:,.1f} "
            f"bytes a token ({cache['activation_bytes_per_token']:,} of them activations); "
            f"batches of {cache['batch_size']:,} in float32",
            markdown(("", "MB/s", "to plain files", "MB a CPU second", "to plain files"), rows),
            markdown(("shards", "cache MiB", "peak MiB", "above one that only opens it"), memory),
        ]
    )


def main(arguments: list[str] | None = None) -> None:
    parser = command("cache", __doc__, rounds=7)
    parser.add_argument("--shards", type=positive, default=96)
    parser.add_argument("--rows", type=positive, default=2048, help="tokens a shard")
    parser.add_argument("--width", type=positive, default=768)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--batch-size", type=positive, default=4096)
    parser.add_argument(
        "--sizes", type=positive, nargs="+", default=[32, 128, 512], help="shards, for memory"
    )
    parser.add_argument("--folder", type=Path, help="where the disk is (default: temporary files)")
    options = parser.parse_args(arguments)
    how = {name: getattr(options, name) for name in ("shards", "rows", "width", "dtype")}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measured = compare(Path(folder), how, options.batch_size, options.rounds)
    memory = []
    for shards in options.sizes:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            size = write_cache(Path(folder) / "cache", **{**how, "shards": shards}).bytes / 2**20
            peak, opened = peak_mib(Path(folder) / "cache", GROUP * options.rows)
        memory.append({"shards": shards, "cache_mib": size, "peak_mib": peak, "opened_mib": opened})
    found = {"where": describe(torch.device("cpu")), "cache": measured, "memory": memory}
    print(report(found))
    save(options.json, found)


if __name__ == "__main__":
    main()
