"""`kronsae train` with several autoencoders: flags, files, folders, kill and resume."""

import json
import random
import re
import time

import pytest
from test_train import SMALL, _same_result, _wait_for, finish, start

import kronsae
from kronsae import InputError
from kronsae.system.checkpoint import list_checkpoints
from kronsae.train import main
from kronsae.training.options import parse

NAMES = ("k4", "k8")
SWEEP = [*SMALL, "--tokens", "6000", "--k", "4"]  # SMALL has --k 8


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted sweep of two: its folder and what it printed."""
    out = tmp_path_factory.mktemp("whole") / "sweep"
    status, printed, err = finish(*SWEEP, "--out", out)
    assert status == 0, err
    return out, printed


def test_everything_is_there(whole):
    out, printed = whole
    assert {p.name for p in out.iterdir()} == {
        *(".lock", "sweep.json", "comparison.md", "report.html", "checkpoints", *NAMES)
    }
    for name in NAMES:
        assert {p.name for p in (out / name).iterdir()} == {
            *("config.json", "metrics.jsonl", "checkpoints", "sae", "report.html")
        }
        assert kronsae.load(out / name).config.k == int(name[1:])
        assert name in printed
    assert "recovered" in printed and str(out) in printed


@pytest.mark.slow
def test_a_members_config_repeats_it_alone(whole, tmp_path):
    out, _ = whole
    config = str(out / "k4" / "config.json")
    status, _, err = finish("--config", config, "--out", tmp_path / "run")
    assert status == 0, err
    _same_result(tmp_path / "run", out / "k4")


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_kill_9_and_resume(count, whole, tmp_path):
    """Killed around a checkpoint, which has several parts, and resumed: the same files."""
    out = tmp_path / "sweep"
    process = start(*SWEEP, "--out", out)
    _wait_for(lambda: len(list_checkpoints(out / "k8" / "checkpoints")) >= count, process)
    time.sleep(0.02 * random.Random(count).random())
    process.kill()
    process.communicate()
    status, _, err = finish("--resume", out)
    assert status == 0, err
    for name in NAMES:
        _same_result(out / name, whole[0] / name)


def test_resume_takes_no_other_settings(whole, capsys):
    out = str(whole[0])
    for arguments, words in (
        (["--lr", "1"], "--lr cannot change when a run is resumed"),
        (["--k", "4", "8"], "--k cannot change when a run is resumed"),
        (["--sweep", "x.json"], "leave out --sweep"),
        (["--iso-flops-of", "topk"], "leave out --iso-flops-of"),
    ):
        assert main(["--resume", out, *arguments]) == 2
        assert words in capsys.readouterr().err
    assert main(["--resume", str(whole[0] / "k4")]) == 2
    assert "is a member of a sweep and goes on with all of it" in capsys.readouterr().err


# Who the members are


def write(folder, entries):
    path = folder / "sweep.json"
    path.write_text(json.dumps(entries))
    return str(path)


def test_flags_with_several_values_are_multiplied():
    request = parse(["--k", "16", "32", "--m", "2", "--m", "4", "--lr", "0.01"])
    assert request.sweep
    found = {name: (c.sae.k, c.sae.m, c.train.lr) for name, c in request.members.items()}
    assert found == {
        "k16-m2": (16, 2, 0.01),
        "k16-m4": (16, 4, 0.01),
        "k32-m2": (32, 2, 0.01),
        "k32-m4": (32, 4, 0.01),
    }
    assert all(c.sae.dict_size == 4096 for c in request.members.values())
    assert not parse(["--k", "16"]).sweep and list(parse([]).members) == ["sae"]


def test_a_file_gives_members_and_flags_multiply_them(tmp_path):
    entries = [{"encoder": "dense"}, {"name": "thin", "m": 2, "lr": 1e-3}, {}]
    request = parse(["--sweep", write(tmp_path, entries), "--n", "8", "--k", "8", "16"])
    assert list(request.members) == ["dense-k8", "dense-k16", "thin-k8", "thin-k16", "k8", "k16"]
    dense, thin = request.members["dense-k8"], request.members["thin-k16"]
    assert dense.sae.encoder == "dense" and dense.sae.dict_size == 4096 and dense.sae.k == 8
    assert (thin.sae.m, thin.sae.n, thin.sae.k, thin.train.lr) == (2, 8, 16, 1e-3)
    [(name, config)] = parse(["--sweep", write(tmp_path, [{}])]).members.items()
    assert name == "base" and config.sae.k == 32


def test_seeds_draw_weights_and_the_stream_stays():
    request = parse(["--seed", "3", "4"])
    assert {n: (c.train.seed, c.train.stream_seed) for n, c in request.members.items()} == {
        "seed3": (3, 3),
        "seed4": (4, 3),
    }
    request = parse(["--seed", "3", "4", "--data-seed", "9"])
    assert {c.train.stream_seed for c in request.members.values()} == {9}


@pytest.mark.parametrize(
    ("entries", "arguments", "words"),
    [
        ([{"batch_size": 64}], [], "batch_size must be the same for all members"),
        ([{"tokens": 64}], [], "tokens must be the same"),
        ([{"data_seed": 1}], [], "data_seed must be the same"),
        ([{"context_length": 64}], [], "context_length must be the same"),
        ([{"model": "gpt2"}], [], "model must be the same"),
        ([{"wings": 1}], [], "entry 0: there is no setting 'wings'"),
        ([{}, {"m": "two"}], [], "member {'m': 'two'} of the sweep: m: expected a whole number"),
        ([{"k": 5000}], [], "k: expected 1 <= k <= dict_size"),
        ([{"encoder": "dense", "m": 2}], [], "--m has no effect with encoder 'dense'"),
        ([{"m": 2}, {"m": 2}], [], "two members of the sweep have the name 'm2'"),
        ([{"name": "../x"}], [], "'../x' cannot be the name"),
        ([{"name": 3}], [], "name: expected a string that is not empty, got 3"),
        ([{"k": 4}], ["--k", "8", "16"], "k has several values and is in the sweep file, too"),
        ([], [], "expected a JSON list of objects"),
        ({"m": 2}, [], "expected a JSON list of objects"),
        ([3], [], "entry 0: expected an object"),
        (None, ["--k", "8", "8"], "--k: 8 is given twice: leave one out"),
        (None, ["--batch-size", "64", "128"], "--batch-size takes one value, which all members"),
        (None, ["--sweep", "none.json"], "--sweep none.json cannot be read"),
        (None, ["--plan", "--no-memory-check"], "--no-memory-check has no effect with --plan"),
    ],
)
def test_bad_sweeps(entries, arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = [] if entries is None else ["--sweep", write(tmp_path, entries)]
    assert main([*file, *arguments]) == 2
    message = capsys.readouterr().err
    assert words in message and message.startswith("error: ")
    assert {p.name for p in tmp_path.iterdir()} <= {"sweep.json"}


# Budgets of equal FLOPs


def test_iso_flops_of_topk_by_hand():
    """[KronSAE, eq. 7] on d = 256: a dense SAE's FLOPs on T tokens, spent by the Kron encoder."""
    request = parse(["--iso-flops-of", "topk", "--tokens", "100000"]).at_widths({"": (256, 0)})
    dense, kron = 256 * 4096 + 32 * 256, 256 * 256 * 8 + 4096 + 32 * 256
    assert request.config.train.tokens == round(100_000 * dense / kron)
    note = request.notes["sae"]["iso_flops_of"]
    assert note["tokens"] == 100_000 and note["sae"]["encoder"] == "dense"
    assert request.at_widths({"": (256, 0)}).config.train.tokens == request.config.train.tokens


def test_iso_flops_of_a_run_is_what_the_run_records(whole, tmp_path):
    """From a run's config.json, an SAE's, or their folder; the budget is in the new config.json."""
    of = whole[0] / "k4"
    common = [*SMALL, "--tokens", "512", "--m", "2", "--iso-flops-of"]
    budgets = {
        parse([*common, str(path)]).at_widths({"": (256, 0)}).config.train.tokens
        for path in (of, of / "config.json", of / "sae", of / "sae" / "config.json")
    }
    [tokens] = budgets
    reference, own = 256 * 16 * 8 + 256 + 4 * 256, 256 * 32 * 6 + 256 + 8 * 256
    assert tokens == round(512 * reference / own) < 512
    assert main([*common, str(of), "--out", str(tmp_path / "run")]) == 0
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["config"]["train"]["tokens"] == tokens
    assert settings["iso_flops_of"]["tokens"] == 512
    assert kronsae.load(tmp_path / "run").metadata["tokens"] == tokens


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--iso-flops-of", "topk"], "--iso-flops-of needs --tokens"),
        (["--tokens", "99", "--encoder", "dense", "--iso-flops-of", "topk"], "has no effect"),
        (
            ["--tokens", "99", "--iso-flops-of", "topk", "--m", "2", "4"],
            "different numbers of tokens",
        ),
        (["--tokens", "99", "--iso-flops-of", "no.json"], "--iso-flops-of no.json cannot be read"),
        (["--tokens", "99", "--iso-flops-of", "list.json"], "expected the config.json of a run"),
    ],
)
def test_bad_iso_flops(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.json").write_text("[]")
    assert main(["--plan", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_iso_flops_of_another_width():
    with pytest.raises(InputError, match="d_model: 256 is configured, the data has 512"):
        parse(["--d-model", "256"]).at_widths({"": (512, 0)})


DIVERGING = ["--lr", "1e25", "--tokens", "4000"]
HOPELESS = ["--lr", "1e2", "--tokens", "4000"]


@pytest.mark.parametrize("flags", [DIVERGING, pytest.param(HOPELESS, marks=pytest.mark.slow)])
def test_a_run_that_diverges_says_so_in_a_sentence(flags, tmp_path):
    """Its gradients overflow; or they do not, and it ends with an explained variance of -20,000."""
    out = tmp_path / "run"
    for attempt in (SMALL + flags + ["--out", out], ["--resume", out]):
        status, printed, err = finish(*attempt)
        assert status == 1 and "Traceback" not in err
        [said] = [line for line in err.splitlines() if line.startswith("error: step ")]
        assert "training has diverged; try a smaller" in said
    assert f"Before it is resumed: {said.removeprefix('error: ')}" in printed
    assert "This run is of no use" in (out / "report.html").read_text()


@pytest.mark.slow
def test_a_sweep_of_which_one_diverges(tmp_path):
    """lr 1e25 beside a healthy one, which ends as it does alone, and one that ends hopeless."""
    flags = [*SMALL, "--tokens", "4000"]
    sweep, alone = tmp_path / "sweep", tmp_path / "alone"
    status, printed, err = finish(*flags, "--lr", "1e25", "1e2", "1e-3", "--out", sweep)
    assert status == 3 and "Traceback" not in err
    for name in ("lr1e25", "lr100"):
        assert re.search(rf"^{name}: step .*training has diverged", printed, re.MULTILINE)
        assert f"- {name}: step " in (sweep / "comparison.md").read_text()
    assert finish(*flags, "--lr", "1e-3", "--out", alone)[0] == 0
    saved = [run / "sae" / "sae.safetensors" for run in (alone, sweep / "lr0.001")]
    assert saved[0].read_bytes() == saved[1].read_bytes()
    assert finish(*flags, "--lr", "1e25", "2e25", "--out", tmp_path / "all")[0] == 1
