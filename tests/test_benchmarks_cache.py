"""`python -m benchmarks.cache`, in a small form: what it counts is what lies on the disk."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import cache
from benchmarks.cache import Size, main, read_cache, read_plain, write_cache, write_plain
from benchmarks.measure import Apart
from kronsae.cache import CacheActivations


def test_rates_are_of_the_bytes_of_the_files(tmp_path):
    index = write_cache(tmp_path / "cache", Size(shards=3, rows=100, width=8))
    sizes = [shard.activations[0].bytes for shard in index.train]
    on_disk = [(tmp_path / "cache" / s.activations[0].file).stat().st_size for s in index.train]
    assert sizes == on_disk and all(size > 100 * 8 * 2 for size in sizes)
    assert write_plain(tmp_path / "plain", sizes) == read_plain(tmp_path / "plain") == sum(sizes)
    for batches in (False, True):
        assert read_cache(tmp_path / "cache", 200, batches, verify=True) == sum(sizes)


def test_the_report_has_all_figures(tmp_path, monkeypatch, capsys):
    small = Size(shards=3, rows=64, width=8)
    monkeypatch.setattr(cache, "Size", lambda: small)
    main(["--rounds", "1", "--folder", str(tmp_path), "--json", str(tmp_path / "found.json")])
    printed = capsys.readouterr().out
    measured = json.loads((tmp_path / "found.json").read_text())["cache"]
    assert 16 < measured["bytes_per_token"] < 200
    for name in ("write cache", "cold shards", "warm batches, verified"):
        [(wall, cpu)] = measured["rates"][name]
        assert wall > 0 and cpu > 0 and f"| {name} |" in printed
    assert not (tmp_path / "cache").exists()


def peak_mib(folder: Path, epochs: int) -> float:
    """This process's peak memory once it has read a cache so many times."""
    for _ in CacheActivations(folder, batch_size=4096, buffer_tokens=4096, epochs=epochs):
        pass
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def peak_mib_apart(folder: Path, epochs: int) -> float:
    call = Apart()
    peak = call(peak_mib, folder, epochs, seconds=600)
    call.close()
    return peak


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_cache(tmp_path):
    """Four times the shards, 192 MiB more of them, in processes of their own."""
    peaks = []
    for shards in (32, 128):
        folder = tmp_path / str(shards)
        write_cache(folder, Size(shards, rows=1024, width=512, dtype="float32"))
        peak, opened = (peak_mib_apart(folder, epochs) for epochs in (1, 0))
        assert peak > opened + 16  # two groups of 8 MiB
        peaks.append(peak)
    assert peaks[1] < peaks[0] + 64  # what the allocator keeps is a matter of chance
