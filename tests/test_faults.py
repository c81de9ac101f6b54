"""Faults happen to short runs, and must lose nothing: `benchmarks.faults`.

Here a few of each kind are tried; the slow test tries all of them, with 58 kills.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def try_faults(out: Path, *flags: str) -> dict[str, list[dict]]:
    """What came of each fault, by its name."""
    command = [sys.executable, "-m", "benchmarks.faults", "--out", str(out), *flags]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    outcomes = json.loads((out / "faults.json").read_text())["outcomes"]
    assert not any(each["lost"] for each in outcomes)
    found: dict[str, list[dict]] = {}
    for each in outcomes:
        found.setdefault(each["fault"], []).append(each)
    return found


def test_faults_cost_nothing(tmp_path):
    kinds = ("live", "2 ranks")
    found = try_faults(tmp_path, "--scale", "0", "--seed", "1", "--kinds", *kinds)
    words = ("kill -9 at", "SIGTERM", "RLIMIT_FSIZE", "one of two ranks", "a bit flipped", "NaN")
    for word in words:
        assert sum(e["hit"] for name in found if word in name for e in found[name]), word
    [torn] = found["a bit flipped: config.json"]
    assert "  cp RUN/checkpoints/step-N/config.json RUN/config.json" in torn["messages"][0]
    assert all(each["hit"] for each in found["an outlier token of 1e30"])
    table = (tmp_path / "faults.md").read_text()
    assert "what was lost: nothing" in table and table.count("\n|") > len(found)


@pytest.mark.slow
def test_all_faults(tmp_path):
    found = try_faults(tmp_path)
    kills = [e for name in found if name.startswith("kill -9 at a random") for e in found[name]]
    assert sum(each["hit"] for each in kills) >= 50
    assert {e["kind"] for e in kills} >= {"live", "streamed", "cache", "sweep", "2 ranks"}
