"""`python -m benchmarks.cache`, in a small form: what it counts is what lies on the disk."""

import json

import pytest

from benchmarks import cache
from benchmarks.cache import main, read_cache, read_plain, write_cache, write_plain


def test_rates_are_of_the_bytes_of_the_files(tmp_path):
    index = write_cache(tmp_path / "cache", shards=3, rows=100, width=8, dtype="bfloat16")
    sizes = [shard.activations[0].bytes for shard in index.train]
    on_disk = [(tmp_path / "cache" / s.activations[0].file).stat().st_size for s in index.train]
    assert sizes == on_disk and all(size > 100 * 8 * 2 for size in sizes)
    assert write_plain(tmp_path / "plain", sizes) == read_plain(tmp_path / "plain") == sum(sizes)
    for batches in (False, True):
        assert read_cache(tmp_path / "cache", 200, 32, batches, verify=True) == sum(sizes)


def test_the_report_has_all_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cache, "peak_mib", lambda folder, together: (60.0, 50.0))
    arguments = ["--shards", "3", "--rows", "64", "--width", "8", "--rounds", "1", "--sizes", "2"]
    main([*arguments, "--folder", str(tmp_path), "--json", str(tmp_path / "found.json")])
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    measured, [memory] = found["cache"], found["memory"]
    assert 16 < measured["bytes_per_token"] < 200
    assert measured["activation_bytes_per_token"] == 16
    for name in ("write cache", "cold shards", "warm batches, verified"):
        [(wall, cpu)] = measured["rates"][name]
        assert wall > 0 and cpu > 0 and f"| {name} |" in printed
    assert memory["shards"] == 2 and (memory["peak_mib"], memory["opened_mib"]) == (60, 50)
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_cache(tmp_path):
    """Four times the shards, 192 MiB more of them, in processes of their own."""
    peaks = []
    for shards in (32, 128):
        write_cache(tmp_path / str(shards), shards, rows=1024, width=512, dtype="float32")
        peak, opened = cache.peak_mib(tmp_path / str(shards), 4096)
        assert peak > opened + 16  # two groups of 8 MiB
        peaks.append(peak)
    assert peaks[1] < peaks[0] + 64  # what the allocator keeps is a matter of chance
