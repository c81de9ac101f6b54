"""The benchmarks run, at a toy shape, and refuse to time what is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if name != "TRITON_INTERPRET" and not name.startswith("PYTEST_")
}
"""As a user's: without the interpreter that the tests have, and no worker of pytest-xdist."""


@pytest.fixture(autouse=True)
def root_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def test_benchmarks_run_at_a_toy_shape(tmp_path):
    file = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "--shapes", "toy", "--benchmark-only", "-q"]
        + [f"--benchmark-json={file}", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    report = json.loads(file.read_text())["benchmarks"]
    assert len(report) >= 15
    for one in report:
        info = one["extra_info"]
        assert info["tokens_per_s"] == pytest.approx(64 / one["stats"]["median"])
        share = info["floor_ms"] / 1e3 / one["stats"]["median"]
        assert info["share_of_ceiling"] == pytest.approx(share)
        assert info["flops"] > 0
        assert info["moved_bytes"] > 0
        assert info["torch"] == torch.__version__
        assert "toy" in one["group"]


def test_comparison_at_a_toy_shape(capsys, tmp_path):
    from benchmarks import compare

    compare.main(["--shape", "toy", "--rounds", "3", "--json", str(tmp_path / "times.json")])
    printed = capsys.readouterr().out
    for words in ("toy: d 16, F 64", "listing / kron ", "topk / kron ", "kron / kron product"):
        assert words in printed
    (of_shape,) = json.loads((tmp_path / "times.json").read_text())["shapes"]
    times = of_shape["times_ms"]
    assert {len(found) for found in times.values()} == {3}
    ratios = sorted(a / b for a, b in zip(times["listing"], times["kron"], strict=True))
    assert of_shape["ratios"]["listing / kron"] == pytest.approx(ratios[1])


def test_wrong_step_reports_no_time(monkeypatch):
    """A step with another loss, and an operation with another result, are found out."""
    from benchmarks import measure, steps
    from benchmarks.shapes import SHAPES, batches

    shape = SHAPES["toy"]
    xs = batches(shape)
    kron = steps.CONTENDERS["kron"]
    with monkeypatch.context() as patch:
        other = kron._replace(make=lambda shape, device: kron.make(shape._replace(k=3), device))
        patch.setitem(steps.CONTENDERS, "kron", other)
        with pytest.raises(measure.WrongResult, match="losses of"):
            measure.compare_steps(shape, xs, rounds=1)

    def wrong(*arguments, impl):
        return steps.kron_loss(*arguments, impl=impl) * (1 if impl else 1.01)

    monkeypatch.setitem(steps.LOSSES, "kron", (wrong, steps.kron_parameters))
    with pytest.raises(measure.WrongResult, match="toy loss"):
        measure.check_gradients(shape, xs[0])


@pytest.mark.parametrize("name", ["eai-sparsify", "sae-lens", "dictionary-learning"])
def test_peer_is_checked_and_trains(name, monkeypatch):
    """It reconstructs what our TopK SAE does, its step changes that; and a wrong one is found."""
    from benchmarks import measure, peers, steps
    from benchmarks.shapes import SHAPES, batches

    if reason := peers.why_not(name):
        pytest.skip(reason)
    shape = SHAPES["toy"]
    xs = batches(shape)
    measure.check_peer(name, shape, xs[0])
    weights = [p.detach() for p in steps.dense_parameters(shape, xs[0].device)]
    peer = peers.PEERS[name].make(shape, *weights)
    with torch.no_grad():
        before = peer.reconstruct(xs[0]).clone()
    for x in xs:
        assert torch.isfinite(peer.step(x))
    with torch.no_grad():
        assert not torch.allclose(peer.reconstruct(xs[0]), before, atol=1e-7)

    library = peers.PEERS[name]
    wrong = library._replace(make=lambda shape, *w: library.make(shape._replace(k=3), *w))
    monkeypatch.setitem(peers.PEERS, name, wrong)
    with pytest.raises(measure.WrongResult, match="reconstruction"):
        measure.check_peer(name, shape, xs[0])


def test_absent_peers_say_how_to_install_them(monkeypatch):
    from benchmarks import measure, peers
    from benchmarks.shapes import SHAPES, batches

    monkeypatch.setattr(peers, "version", lambda name: None)
    found = measure.compare_steps(SHAPES["toy"], batches(SHAPES["toy"]), rounds=1, warmup=0)
    for name in peers.PEERS:
        assert "kronsae[peers]" in found.skipped[name]


def test_peer_that_cannot_be_imported_costs_only_itself(monkeypatch):
    from benchmarks import measure, peers, steps
    from benchmarks.shapes import SHAPES, batches

    def broken(shape, *weights):
        raise ImportError("torchvision is amiss")

    name = "sae-lens"
    monkeypatch.setitem(peers.PEERS, name, peers.PEERS[name]._replace(make=broken))
    there = steps.CONTENDERS[name]._replace(why_not=lambda device: None)
    monkeypatch.setitem(steps.CONTENDERS, name, there)
    found = measure.compare_steps(SHAPES["toy"], batches(SHAPES["toy"]), rounds=1, warmup=0)
    assert "torchvision is amiss" in found.skipped[name]
    assert {"kron", "topk"} <= found.timings.keys()
    assert name not in found.timings


def test_interpreter_is_never_timed(monkeypatch):
    """Where kernels are interpreted, the fused step could run on a CPU, but is no contender."""
    from benchmarks import steps
    from kronsae_kernels.step import why_not

    launch = pytest.importorskip("kronsae_kernels.triton_impl.launch")
    monkeypatch.setattr(launch, "interpreted", lambda: True)
    cpu = torch.device("cpu")
    assert why_not(cpu) is None
    assert steps.best_of_ours("kron", cpu) == "kron"
    for name in ("kron fused", "dense fused", "kron graphed", "dense graphed"):
        assert steps.CONTENDERS[name].why_not(cpu) is not None


def test_flops_are_those_of_the_paper():
    """[KronSAE, eq. 7]: d h (m + n) + m n h + k d and d F + k d."""
    from benchmarks.shapes import Shape

    shape = Shape("", d=1536, heads=4096, m=2, n=4, k=50, tokens=1)
    assert shape.dict_size == 32768
    assert shape.flops_per_token("kron") == 1536 * 4096 * 6 + 2 * 4 * 4096 + 50 * 1536
    assert shape.flops_per_token("dense") == 1536 * 32768 + 50 * 1536


def test_floors_of_the_stages():
    """Formulas by hand: the encoder's product, what is multiplied sparsely, AdamW's traffic."""
    from benchmarks.floors import Ceilings, stages, total
    from benchmarks.shapes import Shape

    shape = Shape("", d=8, heads=4, m=2, n=4, k=3, tokens=100)
    works = stages(shape, "kron", width=2)
    assert works["encode"].multiply_adds == 100 * 8 * 24
    assert works["encode"].moved_bytes == 2 * (100 * 8 + 24 * 8 + 100 * 24)
    update = works["decoder update"].moved_bytes
    assert update == 26 * 32 * 8 + 2 * 100 * 8 + 12 * 100 * 3
    ceilings = Ceilings(1e6, 1e9, 1e9)
    assert ceilings.floor_ms(works["encode"]) == pytest.approx(19.2)
    assert total(works).multiply_adds == 100 * 8 * (24 + (2 + 1 + 2) * 3)


def test_kernels_are_counted_where_they_belong():
    from benchmarks.profile import stage_of

    found = {
        "select_heads": "select",
        "merge_lists": "select",
        "select_rows": "select",
        "encode_gemm": "encode",
        "nvjet_tst_128x256_64x4_coopB_bz_TNT": "encode",
        "decode_and_loss": "decode",
        "sum_head_segments": "encoder update",
        "group_entries": "group",
        "update_rows": "decoder update",
        "void at::native::radixSortKVInPlace<...>": "group",
        "void at::native::vectorized_elementwise_kernel<...>": "other",
    }
    assert {kernel: stage_of(kernel) for kernel in found} == found


def test_rehearsal_of_the_script_for_a_gpu(tmp_path):
    """Each part runs on the CPU at a toy shape, and what they wrote becomes a summary."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.on_gpu", "--out", str(tmp_path), "--smallest"]
        + ["--seconds", "500", "--only", "profile", "memory", "isoflop", "tests"],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "summary.json").read_text())
    assert {run["status"] for run in figures["runs"]} == {"ok"}
    assert figures["stages"][0]["ms_and_floor"]["encode"][0] > 0
    assert figures["memory"][0]["contender"] == "kron fused"
    text = (tmp_path / "summary.md").read_text()
    for words in ("| profile | ok |", "all kernels", "tokens for equal FLOPs", "toy: d 16"):
        assert words in text
    for words in ("| memory | ok |", "memory of a step, toy, dense fused"):
        assert words in text


def test_part_that_runs_long_is_stopped(tmp_path):
    from benchmarks.on_gpu import Part, run

    sleep = Part("sleep", [sys.executable, "-c", "import time; print('on it'); time.sleep(60)"], 60)
    done = run(sleep, 1.5, tmp_path)
    assert done.status.startswith("stopped")
    assert done.seconds < 10
    assert run(Part("fail", [sys.executable, "-c", "1 / 0"], 9), 9, tmp_path).status == (
        "exit status 1"
    )


def test_report_makes_tables_and_pictures(tmp_path):
    from benchmarks import compare, report

    compare.main(["--shape", "toy", "--rounds", "2", "--json", str(tmp_path / "steps.json")])
    cell = {"d": 64, "dict_size": 2**13, "encoder": "kron"}
    timed = {"ms": 2.0, "tokens_per_s": 5e5, "equal_flops_tokens": 2e8, "equal_flops_hours": 0.11}
    grid = {"m": 4, "n": 4, "k": 8, "tokens": 1000, "name": "cpu"}
    cells = [
        {**cell, "contender": "kron", **timed},
        {**cell, "contender": "topk", "skipped": "does not fit in memory"},
    ]
    result = {"where": {}, "grid": grid, "budget_tokens": 10**8, "cells": cells}
    (tmp_path / "isoflop.json").write_text(json.dumps(result))
    report.main([str(tmp_path), "--no-pictures"])
    text = (tmp_path / "report.md").read_text()
    assert "| KronSAE, the paper's listing |" in text
    assert "| 2^13 | 64 | KronSAE, kronsae_kernels | 2.00 | 500,000 | 200 M | 6.60 |" in text
    assert "does not fit in memory" in text

    pytest.importorskip("matplotlib")
    report.write(tmp_path)
    for name in ("steps.png", "isoflop.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_sweep_costs_little_more_than_its_steps():
    """Less than 1.5 times the language model beside the steps, and the same bytes (it asserts)."""
    from benchmarks import sweep
    from kronsae import TrainConfig

    config = TrainConfig(tokens=30_000, batch_size=1024, device="cpu")
    result = sweep.measure(sweep.members(4096, 32), config)
    assert result["sweep_seconds"]["cpu"] < result["allowed_seconds"]["cpu"]
    assert "less than 1.5 x" in sweep.line(result, "cpu")


def test_sweep_of_the_smallest(capsys):
    from benchmarks import sweep

    sweep.main(["--tokens", "256", "--batch-size", "128", "--dict-size", "64", "--k", "4"])
    assert capsys.readouterr().out.count("the same bytes") == 8
