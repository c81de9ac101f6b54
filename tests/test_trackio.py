"""trackio, against a stand-in of its API and, where it is installed, for real."""

import contextvars
import dataclasses
import json
import sys
import types
from collections import Counter

import pytest
import torch

from kronsae.config import SAEConfig, TrainConfig
from kronsae.errors import InputError
from kronsae.registry import LOGS
from kronsae.train import fit, fit_many

X = torch.randn(400, 12, generator=torch.Generator().manual_seed(0))
SAE = SAEConfig(d_model=12, heads=4, m=2, n=2, k=3)
TRAIN = TrainConfig(
    tokens=400, batch_size=50, log_every=1, checkpoint_every=3, device="cpu", trackio="project"
)
SWEEP = [SAE, dataclasses.replace(SAE, k=2)]


@pytest.fixture
def runs(monkeypatch):
    """The runs of a stand-in that finishes a context's run before it opens another one."""
    current = contextvars.ContextVar("current", default=None)
    made = []

    class Run:
        def __init__(self, name, options):
            self.name, self.id, self.options = name, len(made), options
            self.rows, self.finished = [], False

        def log(self, figures, step):
            assert not self.finished
            self.rows.append({**figures, "step": step, "timestamp": "now"})

        def finish(self):
            self.finished = True

    def init(*, project, name, resume, **options):
        if project == "registry-p":
            raise ValueError("that name is reserved")
        if current.get():
            current.get().finish()
        run = next((r for r in made if r.name == name and resume == "allow"), None)
        if run is None:
            run = Run(name, options)
            made.append(run)
        run.finished = False
        current.set(run)
        return run

    def get_logs(project, run, run_id):
        return made[run_id].rows

    storage = types.SimpleNamespace(SQLiteStorage=types.SimpleNamespace(get_logs=get_logs))
    monkeypatch.setitem(sys.modules, "trackio", types.SimpleNamespace(init=init))
    monkeypatch.setitem(sys.modules, "trackio.sqlite_storage", storage)
    monkeypatch.setattr(LOGS["trackio"], "package", None)
    return made


def stopped_and_resumed(out):
    """Run a sweep that stops after step 5 and goes on from the checkpoint of step 3."""

    def stop(record):
        if record["step"] == 5:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fit_many(SWEEP, X, TRAIN, names=["a", "b"], out=out, on_record=lambda _, r: stop(r))
    fit_many(SWEEP, X, TRAIN, names=["a", "b"], out=out, resume=True)


def hold(rows, folder):
    """What metrics.jsonl has is there, once."""
    counts = Counter((row["step"], name) for row in rows for name in row if "/" in name)
    assert set(counts.values()) == {1}
    losses = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert losses == {r["step"]: r["loss"] for r in records if r["kind"] == "train"}
    assert len(losses) == 8


def test_a_sweep_that_is_resumed_goes_on_in_its_runs(runs, tmp_path):
    stopped_and_resumed(tmp_path / "night")
    assert [run.name for run in runs] == ["night-a", "night-b"]
    for run in runs:
        assert run.finished and run.options["group"] == "night"
        assert run.options["config"]["config"]["train"]["trackio"] == "project"
        hold(run.rows, tmp_path / run.name.replace("-", "/"))


def test_another_folder_of_the_same_name_is_another_run(runs, tmp_path):
    for parent in ("x", "y"):
        fit(SAE, X, TRAIN, out=tmp_path / parent / "run")
        hold(runs[-1].rows, tmp_path / parent / "run")
    assert [run.name for run in runs] == ["run", "run"]


def test_a_project_that_trackio_refuses(runs, tmp_path):
    train = dataclasses.replace(TRAIN, trackio="registry-p")
    with pytest.raises(InputError, match="--trackio registry-p: that name is reserved"):
        fit(SAE, X, train, out=tmp_path / "run")


def test_with_trackio_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    stopped_and_resumed(tmp_path / "night")
    records = SQLiteStorage.get_run_records("project")
    assert sorted(record["name"] for record in records) == ["night-a", "night-b"]
    for record in records:
        rows = SQLiteStorage.get_logs("project", record["name"], run_id=record["id"])
        hold(rows, tmp_path / record["name"].replace("-", "/"))
