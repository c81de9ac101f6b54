"""The benchmarks run, at a toy shape, and refuse to time what is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def root_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def test_benchmarks_run_at_a_toy_shape(tmp_path):
    file = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "--shapes", "toy", "--benchmark-only", "-q"]
        + [f"--benchmark-json={file}", "-p", "no:cacheprovider"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    report = json.loads(file.read_text())["benchmarks"]
    assert len(report) >= 12
    for one in report:
        info = one["extra_info"]
        assert info["tokens_per_s"] == pytest.approx(64 / one["stats"]["median"])
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
    from benchmarks.shapes import SHAPES, activations

    shape = SHAPES["toy"]
    x = activations(shape)
    kron = steps.STEPS["kron"]
    with monkeypatch.context() as patch:
        patch.setitem(steps.STEPS, "kron", lambda shape, x: kron(shape._replace(k=3), x))
        with pytest.raises(measure.WrongResult, match="losses of"):
            measure.compare_steps(shape, x, rounds=1)

    def wrong(*arguments, impl):
        return kron_loss(*arguments, impl=impl) * (1 if impl else 1.01)

    kron_loss = measure.kron_loss
    monkeypatch.setattr(measure, "kron_loss", wrong)
    with pytest.raises(measure.WrongResult, match="toy loss"):
        measure.check_gradients(shape, x)


def test_flops_are_those_of_the_paper():
    """[KronSAE, eq. 7]: d h (m + n) + m n h + k d and d F + k d."""
    from benchmarks.shapes import Shape

    shape = Shape("", d=1536, heads=4096, m=2, n=4, k=50, tokens=1)
    assert shape.dict_size == 32768
    assert shape.flops_per_token("kron") == 1536 * 4096 * 6 + 2 * 4 * 4096 + 50 * 1536
    assert shape.flops_per_token("dense") == 1536 * 32768 + 50 * 1536
