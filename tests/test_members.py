"""Ranks that train each their own members of a sweep: all as in one process, bit for bit.

`ranks.py` says what two processes do, with three members; here it is compared.
"""

import json
import signal
import subprocess
import sys
import types

import pytest
import ranks
import torch
from rich.console import Console
from test_parallel import RUN, after_steps, start

import kronsae
from kronsae import InputError, SAEConfig, TrainConfig
from kronsae.model.ranks import ranks_of_one
from kronsae.system import checkpoint, parallel
from kronsae.system.files import read_checksummed
from kronsae.train import fit, fit_many, main
from kronsae.training.learner import why_not_fused
from kronsae.training.options import parse

pytestmark = pytest.mark.long

pytest.importorskip("triton")

MEMBERS = list(ranks.SWEEP)
OWNERS = {"kron": 0, "batchtopk": 1, "dense": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("members")


@pytest.fixture(scope="module")
def of_ranks(folder):
    return ranks.owned_results(folder)


@pytest.fixture(scope="module")
def alone(folder):
    """What one process gets, by job; its folders are "alone JOB"."""
    return {
        name: ranks.owned(folder / f"alone {name}", **given) for name, given in ranks.JOBS.items()
    }


def records(run):
    """The lines of metrics.jsonl, without what the clock says."""
    clocks = {"seconds", "tokens_per_s", "wait_share", "crc32"}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: v for name, v in line.items() if name not in clocks} for line in lines]


def state(folder):
    """The values of a checkpoint, without what the clock says, and the bytes of its tensors."""
    document = read_checksummed(folder / "state.json")
    values = document["state"]
    values.pop("metrics_bytes", None)
    stream = values.get("stream", {})
    for name in ("seconds", "random_states"):  # (torch's own generator stays)
        stream.pop(name, None)
    return values, document["sha256"], (folder / "state.safetensors").read_bytes()


def contents(sweep, checkpoints=slice(None)):
    """All that a sweep has written, but clocks; of some of its checkpoints."""
    found = {}
    for path in (sweep, *(sweep / name for name in MEMBERS)):
        for step in checkpoint.list_checkpoints(path / "checkpoints")[checkpoints]:
            found[f"{path.name if path != sweep else ''} {step.name}"] = state(step)
    for name in MEMBERS:
        saved = sweep / name / "sae"
        found[f"{name} sae"] = (saved / "sae.safetensors").read_bytes()
        found[f"{name} facts"] = read_checksummed(saved / "config.json")
        found[f"{name} records"] = records(sweep / name)
    members = read_checksummed(sweep / "sweep.json")["members"]
    found["table"] = {
        name: {key: value for key, value in each.items() if key != "step_ms"}
        for name, each in members.items()
    }
    return found


@pytest.mark.parametrize("job", ranks.JOBS)
def test_what_ranks_write_is_what_one_process_writes(job, of_ranks, alone, folder):
    """Weights, moments, counters, records, evaluations, endings: the same bits."""
    got, truth = contents(folder / job), contents(folder / f"alone {job}")
    assert got.keys() == truth.keys()
    for name, content in truth.items():
        assert got[name] == content, name
    assert len(checkpoint.list_checkpoints(folder / job / "checkpoints")) > 1
    # Nothing half-written is left.
    assert not [path for path in (folder / job).rglob(".*") if path.name != ".lock"]


@pytest.mark.parametrize("job", ranks.JOBS)
def test_each_rank_gets_all_results_and_its_own_saes(job, of_ranks, alone):
    for rank, done in enumerate(of_ranks):
        for name, got, truth in zip(MEMBERS, done[job], alone[job], strict=True):
            if OWNERS[name] == rank:
                weights = truth["sae"]
                assert got["sae"].keys() == weights.keys()
                assert all(torch.equal(got["sae"][key], x) for key, x in weights.items())
            else:
                assert got["sae"] is None
            for key in ("tokens", "metrics", "stopped_by", "failed"):
                assert got[key] == truth[key]
            assert [r["step"] for r in got["history"]] == [r["step"] for r in truth["history"]]
            assert got["step_ms"] > 0


def test_the_jobs_are_what_they_are_for(alone, folder):
    """A member diverges in a step after which ranks exchange nothing."""
    wild = {name: each["failed"] for name, each in zip(MEMBERS, alone["wild"], strict=True)}
    assert "training has diverged" in wild.pop("batchtopk") and not any(wild.values())
    assert alone["wild"][1]["tokens"] == 8 * 40
    kinds = {r["kind"]: r["step"] for r in records(folder / "alone wild" / "batchtopk")}
    assert kinds["skipped"] == 8  # it ends in step 9, which is no multiple of 7 or 5
    assert kinds["diverged"] == 9
    assert alone["whole"][0]["metrics"]["explained_variance"] > 0


@pytest.mark.parametrize("name, job", [("chain", "whole"), ("wild chain", "wild")])
def test_a_sweep_goes_on_with_any_number_of_processes(name, job, of_ranks, alone, folder):
    """One process, then two; of "chain" one again, after a signal to one of the two."""
    if name == "chain":
        assert all(r["stopped_by"] == signal.SIGTERM for done in of_ranks for r in done[name])
        assert all(done[name][1]["history"][-1]["step"] == 9 for done in of_ranks)
        ranks.owned(folder / name, resume=True)
    last = slice(-1, None)
    assert contents(folder / name, last) == contents(folder / f"alone {job}", last)


def test_one_process_goes_on_after_a_member_of_another_rank_failed(of_ranks, alone, folder):
    for done in of_ranks:
        stopped = done["wild back"]
        assert stopped[1]["failed"] and stopped[0]["stopped_by"] == signal.SIGTERM
    ranks.owned(folder / "wild back", resume=True, **ranks.JOBS["wild"])
    last = slice(-1, None)
    assert contents(folder / "wild back", last) == contents(folder / "alone wild", last)
    with_failed = [done["wild chain"][1] for done in of_ranks]
    assert all("diverged" in each["failed"] for each in with_failed)
    assert [each["sae"] is None for each in with_failed] == [True, False]


def test_what_was_learned_is_saved_where_the_data_ends(of_ranks, folder):
    truth = ranks.cut_short(folder / "alone ended")
    assert "What was learned in the first 280 tokens" in truth
    for done in of_ranks:
        assert done["ended"] == truth.replace("alone ended", "ended")
    assert contents(folder / "ended") == contents(folder / "alone ended")


def test_what_was_learned_is_saved_where_the_first_rank_cannot_write(of_ranks, folder):
    """Which is a step in which not all records are the same as in one process."""
    for done in of_ranks:
        assert "the disk is full" in done["full"]
        assert "What was learned in the first 160 tokens" in done["full"]
    assert {kronsae.load(folder / "full" / n).metadata["tokens"] for n in MEMBERS} == {160}


def test_ranks_exchange_something_only_where_something_is_logged_or_saved(of_ranks):
    for done in of_ranks:
        few, many = done["exchanges"]
        assert few == many > 0


def test_what_stops_one_rank_stops_all(of_ranks):
    for done in of_ranks:
        diverged, few, heads = done["refusals"]
        assert diverged.count("training has diverged") == 3
        assert "2 processes need at least 2 autoencoders, got 1" in few
        assert "--share tokens" in few and "start fewer processes" in few
        assert "give --tensor-parallel 1, or --share tokens" in heads


def test_one_process_has_all_members():
    """Whatever `share` says: nothing is shared out."""
    assert parallel.owners({"a": ""}, "members", (1, 1)) == {}
    assert parallel.owners({"a": "", "b": ""}, "tokens", (2, 1)) == {}
    at_one = dict.fromkeys("abc", "")
    assert parallel.owners(at_one, "members", (2, 1)) == {"a": 0, "b": 1, "c": 0}
    at_two = {"a1": "x", "b1": "y", "a2": "x", "b2": "y"}
    assert parallel.owners(at_two, "members", (2, 1)) == {"a1": 0, "b1": 1, "a2": 0, "b2": 1}
    train = TrainConfig(tokens=80, batch_size=40)
    config = SAEConfig(heads=4, m=2, n=2, k=2)
    one, other = (
        fit(config, ranks.X, TrainConfig(**{**vars(train), "share": share})).sae.W_enc
        for share in ("tokens", "members")
    )
    assert torch.equal(one, other)


def test_bad_settings_are_refused():
    with pytest.raises(InputError, match="share: one of .*not 'heads'"):
        TrainConfig(share="heads")
    with pytest.raises(InputError, match="share: the members of a sweep"):
        configs = [TrainConfig(), TrainConfig(share="members")]
        fit_many([SAEConfig(heads=4)] * 2, ranks.X, configs)


def test_the_command_line(monkeypatch, capsys):
    flags = ["--share", "members", "--k", "2", "4"]
    assert {m.train.share for m in parse(flags).members.values()} == {"members"}
    for world, more, problem in (
        ("3", [], "3 processes need at least 3 autoencoders, got 2"),
        ("2", ["--tensor-parallel", "2"], "give --tensor-parallel 1"),
    ):
        monkeypatch.setenv("WORLD_SIZE", world)
        assert main([*flags, *more, "--plan"]) == 2
        assert problem in capsys.readouterr().err


def test_the_fused_step_is_off_where_ranks_share_tokens_and_it_says_what_helps(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    sae, device = SAEConfig(d_model=16, heads=4, m=2, n=2, k=2), torch.device("cpu")
    reasons = [
        why_not_fused(sae, train, device, ranks_of_one(train))
        for share in ("tokens", "members")
        for train in [TrainConfig(share=share, fused_step="on")]
    ]
    assert "--share members" in reasons[0] and reasons[1] is None


@pytest.mark.parametrize("status", [0, 3, 130])
def test_no_process_fails_before_all_are_done(status, tmp_path, monkeypatch):
    """torchrun would stop the first one, which may be writing the reports."""
    waited = []
    world = types.SimpleNamespace(rank=1, size=2, exchange=lambda v: waited.append(v) or [v])
    monkeypatch.setattr(sys.modules[main.__module__], "_train", lambda *_: status)
    request = types.SimpleNamespace(resume=None, out=tmp_path / "run")
    mesh = parallel.ALONE._replace(world=world)
    assert sys.modules[main.__module__].train(request, Console(), mesh) == status
    assert waited == [str(request.out), *([None] if status else [])]


# The command line, under torchrun itself


@pytest.mark.slow
def test_torchrun_trains_each_member_in_one_process(tmp_path):
    """Stopped by a signal and gone on with: reports of all are there, and one process's figures.

    With 2 processes the language model reads other contexts at once, which rounds otherwise.
    """
    flags = [*RUN, "--k", "2", "8", "--share", "members"]  # and the k that RUN has
    sweep, log = tmp_path / "sweep", tmp_path / "log"
    process = start(2, *flags, "--out", sweep, log=log)
    after_steps(7, sweep / "k4", process, log)
    process.send_signal(signal.SIGTERM)
    process.wait(900)
    assert "Stopped by SIGTERM after" in log.read_text()
    again = start(2, "--resume", sweep, log=log)
    try:
        assert again.wait(900) == 0, log.read_text()
    except subprocess.TimeoutExpired:
        again.kill()
        raise
    assert "by 2 processes: each trains" in " ".join(log.read_text().split())
    assert main([*flags, "--out", str(tmp_path / "alone")]) == 0
    for name in ("k2", "k4", "k8"):
        assert (sweep / name / "report.html").exists()
        assert f"| {name} |" in (sweep / "comparison.md").read_text()
        got, truth = (
            kronsae.load(path / name).metadata["metrics"] for path in (sweep, tmp_path / "alone")
        )
        assert got == pytest.approx(truth, rel=1e-2, abs=1e-3)
