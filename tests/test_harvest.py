"""`kronsae harvest`: the command line, its plan, and kills at random moments."""

import contextlib
import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple

import cached
import pytest
import torch
from tiny_models import save_model

from kronsae import harvest
from kronsae.cache import CacheIndex, HarvestConfig
from kronsae.cache.index import damaged, resume_command
from kronsae.cache.writer import Progress
from kronsae.data.many_hookpoints import ManyHookpoints
from kronsae.errors import InputError
from kronsae.harvest import make_plan, parse
from kronsae.system.files import read_checksummed
from kronsae.system.progress import duration

SMALL = [
    *("--layer", "1", "2", "--context-length", "32", "--contexts-per-batch", "16"),
    *("--heldout-tokens", "1024", "--tokens", "20000", "--shard-tokens", "500"),
]


def start(*arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "kronsae.harvest", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )


def interrupt(folder, shards, number, delay, *arguments):
    """Start a harvest, and send it a signal some time after it has so many shards."""
    process = start(*SMALL, "--out", folder, *arguments)
    end = time.monotonic() + 120
    while len(list(folder.glob("train-*.tokens.*"))) < shards:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(number)
    return process.communicate()[1], process.returncode


@pytest.fixture
def shared(monkeypatch):
    """The embedded model, loaded once for all tests here, and a small text."""
    cached.give_text(monkeypatch)
    cached.give_model(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted harvest."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    assert harvest.main([*SMALL, "--out", str(folder)]) == 0
    return folder


@pytest.mark.long
def test_signals_and_kills_leave_the_same_bytes(whole, tmp_path):
    """SIGTERM says how to go on, kill -9 nothing; in the end nobody can tell."""
    folder = tmp_path / "cache"
    err, status = interrupt(folder, 2, signal.SIGTERM, 0.01)
    assert status == 128 + signal.SIGTERM and f"resume by kronsae harvest --resume {folder}" in err
    _, status = interrupt(folder, 9, signal.SIGKILL, 0.02)
    assert status == -signal.SIGKILL
    held = CacheIndex.open(folder)
    assert len(held.train) >= 8 and held.planned == 20_000 and damaged(folder, held) == []
    assert harvest.main(["--resume", str(folder)]) == 0
    assert cached.contents(folder) == cached.contents(whole)


def start_ranks(count, folder, log):
    """`torchrun -m kronsae.harvest`, in the background."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]  # a free port
    return subprocess.Popen(
        [*command, "-m", "kronsae.harvest", *SMALL, "--out", str(folder)],
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )


def ranks_of(process):
    """Process ids of the ranks that torchrun has started."""
    found = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
    )
    return [int(pid) for pid in found.stdout.split()]


@pytest.mark.slow
def test_ranks_leave_the_same_bytes_also_after_a_kill(whole, tmp_path):
    folder, log = tmp_path / "cache", tmp_path / "log"
    process, end = start_ranks(2, folder, log), time.monotonic() + 200
    while len(list(folder.glob("train-*.tokens.*"))) < 6:
        assert process.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.01)
    os.kill(ranks_of(process)[-1], signal.SIGKILL)
    assert process.wait(200) != 0
    held = CacheIndex.open(folder)
    assert 4 <= len(held.train) < len(CacheIndex.open(whole).train)
    assert damaged(folder, held) == []
    assert start_ranks(2, folder, log).wait(200) == 0, log.read_text()
    assert log.read_text().count("tokens to train on, ") == 1  # one speaks for all
    assert cached.contents(folder) == cached.contents(whole)


@pytest.mark.slow
def test_ten_kills_leave_the_same_bytes(whole, tmp_path):
    folder, drawn = tmp_path / "cache", random.Random(0)
    shards = len(CacheIndex.open(whole).train)
    for kill in range(10):
        interrupt(folder, kill * shards // 11, signal.SIGKILL, 0.1 * drawn.random())
        assert not (folder / "index.json").exists()
        with contextlib.suppress(InputError):  # there may be no shard yet
            assert damaged(folder, CacheIndex.open(folder)) == []
    assert harvest.main([*SMALL, "--out", str(folder)]) == 0
    assert cached.contents(folder) == cached.contents(whole)


def test_progress_is_a_line_at_each_tenth(shared, tmp_path, capsys, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(harvest.time, "monotonic", lambda: float(next(clock)))
    config = ["--layer", "2", "--dataset", "given", "--context-length", "16"]
    config += ["--contexts-per-batch", "4", "--heldout-tokens", "64", "--tokens", "1100"]
    assert harvest.main([*config, "--out", str(tmp_path / "cache")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "of 1,1" in line]
    held = CacheIndex.open(tmp_path / "cache")
    planned = held.heldout_rows + 1100
    assert 10 <= len(lines) <= 11 and lines[0].endswith(f" of {planned:,} tokens")
    passes = [[int(word.replace(",", "")) for word in re.findall(r"[\d,]*\d", x)] for x in lines]
    rows, total, rate = passes[4][:3]
    assert total == planned and 0.4 * planned <= rows < 0.5 * planned + 60
    assert 50 <= rate <= 60  # a forward pass of 59 tokens a second, by this clock
    assert lines[4].endswith(f"tokens/s, {duration((planned - rows) / rate)} left")
    assert lines[-1].startswith(f"{planned:,} of") and lines[-1].endswith("tokens/s")


def test_progress_without_a_total_is_a_line_every_ten_minutes(shared, tmp_path, capsys):
    shown = harvest.Shown(harvest.Console(highlight=False, soft_wrap=True))
    with pytest.MonkeyPatch.context() as patch:
        for now in range(1000, 3000, 100):
            patch.setattr(harvest.time, "monotonic", lambda now=now: float(now))
            shown(Progress(50 * now, None))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["50,000 tokens", "80,000 tokens, 50 tokens/s"] and len(lines) == 4


def test_a_bar_on_a_terminal(shared):
    out = io.StringIO()
    shown = harvest.Shown(harvest.Console(file=out, force_terminal=True, width=120))
    with shown:
        shown(Progress(500, 1000))
        shown(Progress(900, 1000))
        shown.bar.refresh()
    assert "900 of 1,000 tokens" in out.getvalue() and "\x1b[" in out.getvalue()


def test_a_harvest_goes_on_when_nobody_reads_what_it_prints(shared, tmp_path, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    arguments = ["--layer", "2", "--dataset", "given", "--context-length", "16", "--tokens", "300"]
    arguments += ["--contexts-per-batch", "4", "--heldout-tokens", "64"]
    with os.fdopen(write, "w") as unread:
        monkeypatch.setattr(sys, "stdout", unread)
        assert harvest.main([*arguments, "--out", str(tmp_path / "cache")]) == 0
        unread.flush()  # as Python does at its end
    assert CacheIndex.open(tmp_path / "cache").planned is None


def test_verify_says_what_is_damaged_and_the_same_command_repairs(shared, tmp_path, capsys):
    out = tmp_path / "cache"
    arguments = ["--out", str(out), "--layer", "2", "--tokens", "300", "--dataset", "given"]
    arguments += ["--context-length", "16", "--contexts-per-batch", "4", "--heldout-tokens", "64"]
    assert harvest.main(arguments) == 0
    assert f"kronsae train --activations {out}" in capsys.readouterr().out
    before = cached.contents(out)
    assert harvest.main(["--verify", str(out)]) == 0
    assert "All files have the SHA-256 of the index" in capsys.readouterr().out
    path = out / "train-00000.0.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert harvest.main(["--verify", str(out)]) == 2
    assert f"{path} is damaged" in capsys.readouterr().err
    assert harvest.main(arguments) == 0 and cached.contents(out) == before
    path.unlink()
    assert harvest.main(["--resume", str(out)]) == 0 and cached.contents(out) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "expected one of --out DIR, --resume DIR, --verify DIR, got none"),
        (["--out", "x", "--verify", "y"], "got ['out', 'verify']"),
        (["--out", "x", "--layr", "1"], "unknown argument '--layr': did you mean --layer"),
        (["--out", "x", "--buffer-tokens", "9"], "unknown argument '--buffer-tokens'"),
        (["--out", "x", "--layer", "9"], "0 to 3"),
        (["--out", "x", "--hookpoint", "gpt_neox.layer.1"], "gpt_neox.layers.1"),
        (["--out", "x", "--model", "/nowhere/at/all", "--layer", "1"], "no such folder"),
        (["--out", "x", "--tokens", "-1"], "tokens: expected >= 0, got -1"),
        (["--out", "x", "--dtype", "int4"], "invalid choice: 'int4'"),
        (["--out", "x", "--revision", "main"], "--revision has no effect with model 'embedded'"),
        (["--resume", "x", "--layer", "1"], "takes everything from the folder: no --layer"),
        (["--resume", "x"], "holds no harvest"),
        (["--verify", "x", "--device", "cpu"], "--verify takes everything from the folder"),
        (["--verify", "x"], "is not a cache of activations"),
        (
            ["--out", "x", "--layer", "1", "--hookpoint", "gpt_neox.layers.1"],
            "'gpt_neox.layers.1' is named twice",
        ),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said(arguments, words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert harvest.main(arguments) == 2
    assert words in capsys.readouterr().err


def test_a_harvest_that_was_refused_leaves_room_for_another(tmp_path, capsys):
    out = ["--out", str(tmp_path / "cache"), *SMALL, "--tokens", "1000"]
    assert harvest.main([*out, "--hookpoint", "*.attn_z", "blocks.1.attn.hook_z"]) == 2
    assert "is named twice" in capsys.readouterr().err
    assert harvest.main([*out, "--hookpoint", "1.attn_z", "--heldout-tokens", "300"]) == 0


def test_the_disk_is_checked_before_the_model_is_loaded(monkeypatch, capsys, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 0, 2**30))
    monkeypatch.setattr(ManyHookpoints, "load_at", None)
    out = tmp_path / "cache"
    arguments = ["--out", str(out), "--layer", "1", "2", "--tokens", "1_000_000"]
    assert harvest.main(arguments) == 2
    err = capsys.readouterr().err
    assert "of disk are needed (2,053 bytes a token), and 1,024 MiB are free" in err
    assert not out.exists()
    assert harvest.main([*arguments, "--plan"]) == 0
    assert "It would be refused" in capsys.readouterr().out and not out.exists()


def test_the_plan_of_a_model_that_has_no_default_layer(capsys, tmp_path):
    save_model(tmp_path / "model", "gpt2")
    (tmp_path / "text.txt").write_text("w1 w2 w3 " * 2000)
    given = ["--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "text.txt")]
    given += ["--layer", "0", "1", "--tokens", "1000", "--context-length", "64", "--plan"]
    assert harvest.main([*given, "--out", str(tmp_path / "cache")]) == 0
    assert "layer 0 (d = 32), layer 1 (d = 32)" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["auto", "int8"])
def test_the_plan_is_what_then_lies_on_the_disk(dtype, monkeypatch, tmp_path):
    held = cached.make(monkeypatch, tmp_path / "cache", tokens=1000, dtype=dtype)
    config = cached.dataclasses.replace(cached.CONFIG, tokens=held.train_rows, dtype=dtype)
    plan = make_plan(config, tmp_path / "cache")
    assert plan["disk_mib"] * 2**20 == pytest.approx(held.bytes, rel=0.05)
    assert plan["disk_there_mib"] * 2**20 == held.bytes
    assert list(plan["hookpoints"].values()) == [256, 256]


def test_the_plan_of_a_longer_harvest_counts_what_is_there(shared, monkeypatch, capsys, tmp_path):
    out = tmp_path / "cache"
    held = cached.make(monkeypatch, out, tokens=251)
    arguments = ["--resume", str(out), "--tokens", "1_000_000_000"]
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 0, 2**30))
    assert harvest.main(arguments) == 2
    assert "MiB of disk are needed" in capsys.readouterr().err
    assert harvest.main([*arguments[:3], "400"]) == 0
    assert f"to train on, {held.heldout_rows:,} held out" in capsys.readouterr().out
    assert CacheIndex.open(out).train_rows >= 400
    assert harvest.main([*arguments[:3], "300"]) == 2
    assert "only --tokens may change, to more" in capsys.readouterr().err


def test_verify_says_that_a_harvest_is_incomplete(monkeypatch, capsys, tmp_path):
    out = tmp_path / "cache"
    held = cached.make(monkeypatch, out, tokens=400)
    (out / "index.json").unlink()
    assert harvest.main(["--verify", str(out)]) == 2
    printed, err = capsys.readouterr()
    assert f"{held.train_rows:,} tokens to train on so far (of 400: the harvest is" in printed
    assert err == f"error: the harvest is incomplete; resume it: {resume_command(out)}\n"
    (out / "train-00000.0.safetensors").unlink()
    assert harvest.main(["--verify", str(out)]) == 2
    assert "train-00000.0.safetensors is missing" in capsys.readouterr().err


def test_code_from_a_hub_is_not_trusted_by_a_file(tmp_path, shared):
    """Whoever made the folder cannot turn it on; who goes on with it can."""
    out = str(tmp_path / "cache")
    config = HarvestConfig(data=cached.dataclasses.replace(cached.DATA, trust_remote_code=True))
    assert "trust" not in json.dumps(config.to_dict())
    harvest.harvest(config, out)
    assert not parse(["--resume", out])[0].data.trust_remote_code
    assert parse(["--resume", out, "--trust-remote-code"])[0].data.trust_remote_code
    document = read_checksummed(tmp_path / "cache" / "harvest.json")
    document["config"]["data"]["trust_remote_code"] = True
    (tmp_path / "cache" / "harvest.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match="unknown settings"):
        parse(["--resume", out])


def test_every_flag_arrives():
    config, folder, plan = parse(
        shlex.split(
            "--out x --layer 1 2 --hookpoint gpt_neox --tokens 5_000 --dtype float16 --seed 3 "
            "--shard-tokens 9 --device cpu --dataset a.txt --heldout-tokens 7 --plan"
        )
    )
    assert (config.layers, config.hookpoints) == ((1, 2), ("gpt_neox",))
    assert (config.tokens, config.dtype, config.seed) == (5000, "float16", 3)
    assert (config.shard_tokens, config.device, str(folder), plan) == (9, "cpu", "x", True)
    assert (config.data.dataset, config.data.heldout_tokens) == ("a.txt", 7)


def test_settings_without_effect_are_refused():
    data = cached.dataclasses.replace(cached.DATA, buffer_tokens=99)
    with pytest.raises(InputError, match="buffer_tokens 99 has no effect on a harvest"):
        HarvestConfig(data=data)


def test_another_process_keeps_out(shared, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    harvest.harvest(cached.CONFIG, tmp_path / "cache")
    with open(tmp_path / "cache" / ".lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="is being harvested by another process"):
            harvest.harvest(cached.CONFIG, tmp_path / "cache")
