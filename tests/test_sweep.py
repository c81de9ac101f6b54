"""Sweeps: many SAEs on one stream, each as if alone; members, names, saving and going on."""

import dataclasses
import json
import shutil
import signal
import sys
import types

import pytest
import torch
from synthetic import SyntheticActivations

import kronsae
from kronsae import InputError, SAEConfig, TrainConfig
from kronsae.registry import LOGS
from kronsae.runs.sweep import check_names, name_of
from kronsae.system import checkpoint
from kronsae.train import fit, fit_many

X = SyntheticActivations(24, num_groups=12, batch_size=4000, seed=1).draw()[0]
HELDOUT = SyntheticActivations(24, num_groups=12, batch_size=300, seed=1)
HELDOUT.generator.manual_seed(99)
HELDOUT = HELDOUT.draw()[0]
TRAIN = TrainConfig(
    tokens=3000, batch_size=100, lr=3e-3, log_every=10, eval_every=15, checkpoint_every=8
)
SAES = {
    "small": SAEConfig(heads=16, m=2, n=4, k=4),
    "long": SAEConfig(heads=8, m=2, n=8, k=8, composition="mul"),
    "dense": SAEConfig(encoder="dense", dict_size=96, k=4),
}
TRAINS = {
    "small": TRAIN,
    "long": dataclasses.replace(TRAIN, lr=5e-3, dead_after_tokens=300),
    "dense": dataclasses.replace(TRAIN, seed=5),
}
TIMES = ("seconds", "tokens_per_s", "wait_share", "model_wait_share", "crc32")


def sweep(saes=SAES, trains=TRAINS, activations=X, **options):
    results = fit_many(
        list(saes.values()), activations, list(trains.values()), names=list(saes), **options
    )
    return dict(zip(saes, results, strict=True))


def timeless(records):
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records]


def files(folder, names=SAES):
    """What a sweep gives: each member's weights, and its records without the times."""
    return {
        name: (
            (folder / name / "sae" / "sae.safetensors").read_bytes(),
            timeless(map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())),
        )
        for name in names
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The files of an uninterrupted sweep."""
    out = tmp_path_factory.mktemp("whole") / "sweep"
    sweep(heldout=HELDOUT, out=out)
    return out


@pytest.mark.parametrize("name", SAES)
def test_each_member_is_what_it_is_alone(name, whole, tmp_path):
    """The same bytes and records, trained alone with the settings in the member's config.json."""
    config = json.loads((whole / name / "config.json").read_text())["config"]
    train = TrainConfig(**config["train"])
    assert train.seed == TRAINS[name].seed and train.stream_seed == 0
    alone = fit(SAEConfig(**config["sae"]), X, train, heldout=HELDOUT, out=tmp_path / "run")
    weights, records = files(whole)[name]
    assert (tmp_path / "run" / "sae" / "sae.safetensors").read_bytes() == weights
    assert timeless(alone.history) == records


def test_order_and_company_do_not_matter():
    names = ["dense", "small"]
    some = sweep(
        {n: SAES[n] for n in names}, {n: dataclasses.replace(TRAINS[n], data_seed=0) for n in names}
    )
    every = sweep()
    for name in names:
        for a, b in zip(some[name].sae.parameters(), every[name].sae.parameters(), strict=True):
            assert torch.equal(a, b)


def test_the_source_is_read_once():
    given = []

    def batches():
        for x in X[:3000].split(100):
            given.append(len(x))
            yield x

    results = sweep(activations=batches())
    assert sum(given) == 3000 and all(r.tokens == 3000 for r in results.values())


def test_sweep_folder(whole):
    assert {p.name for p in whole.iterdir()} == {
        *(".lock", "sweep.json", "comparison.md", "checkpoints", *SAES)
    }
    index = json.loads((whole / "sweep.json").read_text())
    assert list(index["members"]) == list(SAES)
    table = (whole / "comparison.md").read_text()
    for name, each in index["members"].items():
        run = whole / name
        assert {p.name for p in run.iterdir()} == {
            *("config.json", "metrics.jsonl", "checkpoints", "sae")
        }
        sae = kronsae.load(run)
        assert sae.metadata["metrics"] == each["metrics"] and each["tokens"] == 3000
        assert f"{each['metrics']['explained_variance']:.4f}" in table and f"| {name} |" in table
        steps = [p.name for p in checkpoint.list_checkpoints(run / "checkpoints")]
        assert steps == ["step-00000024", "step-00000030"]
    shared = checkpoint.list_checkpoints(whole / "checkpoints")
    assert [p.name for p in shared] == steps


def test_a_finished_sweep_that_is_resumed_stays_as_it_is(whole, tmp_path):
    out = tmp_path / "sweep"
    shutil.copytree(whole, out)
    members = json.loads((whole / "sweep.json").read_text())["members"]
    assert all(member["step_ms"] > 0 for member in members.values())
    sweep(heldout=HELDOUT, out=out, resume=True)
    assert json.loads((out / "sweep.json").read_text())["members"] == members
    assert (out / "comparison.md").read_text() == (whole / "comparison.md").read_text()
    with pytest.raises(InputError, match="is a sweep: name one of its runs"):
        kronsae.load(out)


@pytest.mark.parametrize("stop_after", [1, 9, 29])
def test_a_signal_saves_all_and_resume_is_bit_for_bit(stop_after, whole, tmp_path):
    def interrupt(name, record):
        if record["step"] == stop_after and name == "long":
            signal.raise_signal(signal.SIGTERM)

    every_step = {n: dataclasses.replace(t, log_every=1) for n, t in TRAINS.items()}
    part = sweep(trains=every_step, heldout=HELDOUT, out=tmp_path, on_record=interrupt)
    for name, result in part.items():
        assert result.stopped_by == signal.SIGTERM and result.tokens == 100 * stop_after
        assert kronsae.load(tmp_path / name).metadata["tokens"] == 100 * stop_after
    rest = sweep(heldout=HELDOUT, out=tmp_path, resume=True)
    for name in SAES:
        weights, records = files(whole)[name]
        assert files(tmp_path)[name][0] == weights
        assert rest[name].metrics.items() <= records[-1].items()


@pytest.mark.parametrize("written", [0, 1, 2, 3])
def test_a_checkpoint_that_was_interrupted_never_happened(written, whole, tmp_path, monkeypatch):
    """Ended after `written` of the three members' parts of step 16: step 8 counts, for all."""
    save, calls = checkpoint.save_state, []

    class Killed(BaseException):
        pass

    def killed(folder, state, *others, **copies):
        if folder.name == "step-00000016":
            calls.append(folder)
            if len(calls) > written:
                raise Killed
        return save(folder, state, *others, **copies)

    monkeypatch.setattr(checkpoint, "save_state", killed)
    with pytest.raises(Killed):
        sweep(heldout=HELDOUT, out=tmp_path)
    monkeypatch.undo()
    assert not (tmp_path / "checkpoints" / "step-00000016").exists()
    seen = []
    sweep(
        heldout=HELDOUT, out=tmp_path, resume=True, on_record=lambda *r: seen.append(r[1]["step"])
    )
    assert min(seen) == 10  # the first logged step after 8
    assert files(tmp_path) == files(whole)


def test_resume_goes_back_to_a_step_that_all_members_have(whole, tmp_path):
    sweep(heldout=HELDOUT, out=tmp_path)
    for file in (folder := tmp_path / "dense" / "checkpoints" / "step-00000030").iterdir():
        file.unlink()
    folder.rmdir()
    steps = []
    sweep(
        heldout=HELDOUT, out=tmp_path, resume=True, on_record=lambda *r: steps.append(r[1]["step"])
    )
    assert min(steps) == 30 and files(tmp_path) == files(whole)


@pytest.fixture
def diverging(monkeypatch):
    """The member `long` has a gradient that is not finite at step 12."""
    from kronsae.training.learner import Learner

    step = Learner.step

    def fails(self, x, target, log):
        if self.sae.config.composition == "mul" and self.step_count == 12:
            raise FloatingPointError("gradient norm is nan at step 12")
        return step(self, x, target, log)

    monkeypatch.setattr(Learner, "step", fails)


def test_a_member_that_diverges_ends_and_the_others_go_on(diverging, whole, tmp_path):
    results = sweep(heldout=HELDOUT, out=tmp_path)
    failed = results["long"]
    assert failed.failed.startswith("step 13: gradient norm is nan at step 12; try a smaller lr")
    assert failed.tokens == 1200
    assert not failed.metrics and all(p.isfinite().all() for p in failed.sae.parameters())
    metadata = kronsae.load(tmp_path / "long").metadata
    assert metadata["tokens"] == 1200 and metadata["failed"] == failed.failed
    for name in ("small", "dense"):
        assert results[name].failed is None
        assert files(tmp_path)[name] == files(whole)[name]
    assert "long (diverged after 1,200 tokens)" in (tmp_path / "comparison.md").read_text()
    index = json.loads((tmp_path / "sweep.json").read_text())["members"]
    assert index["long"]["failed"] == failed.failed and index["small"]["failed"] is None


@pytest.mark.parametrize("stop_after", [9, 13, 20])
def test_resume_with_a_member_that_diverged(stop_after, diverging, whole, tmp_path):
    def interrupt(name, record):
        if record["step"] == stop_after and name == "small":
            signal.raise_signal(signal.SIGTERM)

    every_step = {n: dataclasses.replace(t, log_every=1) for n, t in TRAINS.items()}
    sweep(trains=every_step, heldout=HELDOUT, out=tmp_path, on_record=interrupt)
    results = sweep(heldout=HELDOUT, out=tmp_path, resume=True)
    assert "gradient norm is nan at step 12" in results["long"].failed
    assert results["long"].tokens == 1200
    for name in ("small", "dense"):
        assert files(tmp_path)[name][0] == files(whole)[name][0]


def test_all_members_diverge(diverging, tmp_path):
    with pytest.raises(InputError, match="nan at step 12.*\nWhat .* in the first 1,200 tokens"):
        sweep({"long": SAES["long"]}, {"long": TRAINS["long"]}, out=tmp_path / "sweep")
    with pytest.raises(InputError, match="nan at step 12.*\nWhat .* in the first 1,200 tokens"):
        fit(SAES["long"], X, TRAINS["long"], out=tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 50}, "batch_size: .* cannot differ in it .got 100 and 50."),
        ({"tokens": 2000}, "tokens: .* cannot differ"),
        ({"data_seed": 3}, "data_seed: .* .got 0 and 3."),
        ({"device": "cpu"}, "device: .* cannot differ"),
        ({"checkpoint_every": 9}, "checkpoint_every: .* cannot differ"),
    ],
)
def test_what_decides_the_stream_cannot_differ(change, words):
    trains = TRAINS | {"dense": dataclasses.replace(TRAIN, **change)}
    with pytest.raises(InputError, match=words):
        sweep(trains=trains)


def test_bad_sweeps(tmp_path):
    with pytest.raises(InputError, match="expected one SAE or more"):
        fit_many([], X)
    with pytest.raises(
        InputError,
        match="as many train_configs, names, .* got 3 SAEs, 1 tr",
    ):
        fit_many(list(SAES.values()), X, [TRAIN])
    for names, words in (
        (["a", "b", "a"], "two members of the sweep have the name 'a'"),
        (["a", "b", "A"], "two members of the sweep have the name 'a' .capitals"),
        (["a", "b", "Checkpoints"], "'Checkpoints' cannot be the name"),
        (["a", "b", "checkpoints"], "'checkpoints' cannot be the name"),
        (["a", "b", "../c"], "'../c' cannot be the name"),
    ):
        with pytest.raises(InputError, match=words):
            fit_many(list(SAES.values()), X, TRAIN, names=names, out=tmp_path / "sweep")
    with pytest.raises(InputError, match="d_model: 8 is configured"):
        fit_many([SAES["dense"], SAEConfig(d_model=8, heads=4, k=2)], X, TRAIN)
    assert list(tmp_path.iterdir()) == []


def test_what_is_resumed_must_be_what_was_made(whole):
    with pytest.raises(InputError, match="small: config.train.lr: was 0.003, is 0.1"):
        sweep(trains=TRAINS | {"small": dataclasses.replace(TRAIN, lr=0.1)}, out=whole, resume=True)
    with pytest.raises(InputError, match="has the members .'small', 'long', 'dense'."):
        sweep({"small": SAES["small"]}, {"small": TRAIN}, out=whole, resume=True)
    with pytest.raises(InputError, match="has the members"):
        fit(SAES["small"], X, TRAIN, out=whole, resume=True)
    with pytest.raises(InputError, match="is a member of a sweep and goes on with all of it"):
        fit(SAES["small"], X, TRAIN, out=whole / "small", resume=True)
    with pytest.raises(InputError, match="exists already: --resume"):
        sweep(out=whole)


def test_members_are_logged_side_by_side(tmp_path, monkeypatch):
    """wandb gets a run for each, whose name and id no other sweep's member has."""

    class Run:
        def __init__(self, **options):
            self.options, self.records, self.finished = options, [], False
            runs.append(self)

        def log(self, record, step):
            self.records.append((step, record["train/loss"]))

        def finish(self):
            self.finished = True

    runs = []
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=Run))
    monkeypatch.setattr(LOGS["wandb"], "package", None)
    trains = {n: dataclasses.replace(t, wandb="project") for n, t in TRAINS.items()}
    results = sweep(trains=trains, out=tmp_path / "night")
    assert [run.options["id"] for run in runs] == [f"night-{name}" for name in SAES]
    for run, result in zip(runs, results.values(), strict=True):
        assert run.options["group"] == "night" and run.options["reinit"] == "create_new"
        assert run.records == [(r["step"], r["loss"]) for r in result.history] and run.finished


def test_data_that_ends_early_keeps_the_work_of_all(tmp_path):
    with pytest.raises(InputError, match="ended after 1,700 of 3,000 tokens"):
        sweep(activations=list(X[:1700].split(100)), out=tmp_path)
    for name in SAES:
        assert kronsae.load(tmp_path / name).metadata["tokens"] == 1700
    shared = [p.name for p in checkpoint.list_checkpoints(tmp_path / "checkpoints")]
    assert shared == ["step-00000016", "step-00000017"]


def test_names_of_settings_are_names_of_folders():
    names = [name_of(own) for own in ({"lr": 1e25}, {"lr": 1e-25}, {"encoder": "dense", "k": 4})]
    assert names == ["lr1e25", "lr1e-25", "dense-k4"]
    check_names(names)
