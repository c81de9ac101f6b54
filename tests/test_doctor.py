"""The doctor: what it finds is so, what is amiss it says, and its exit status tells."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from kronsae import doctor
from kronsae_kernels import backends

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():  # the interpreter is slow, and has tests of its own
            patch.setattr(doctor, "IMPLS", ("torch",))
        return doctor.examine(tmp_path_factory.mktemp("runs"), rates=False)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def screen(findings):
    console = Console(width=100, color_system=None)
    with console.capture() as captured:
        console.print(doctor.render(findings))
    return captured.get()


def test_all_is_well_here(found, no_network):
    assert found["problems"] == []
    assert torch.__version__.startswith(found["versions"]["torch"].split("+")[0])
    assert {(c["impl"], c["encoder"]) for c in found["checks"] if c["device"] == "cpu"} >= {
        ("torch", "kron"),
        ("torch", "dense"),
    }
    assert all(one["right"] and 0 < one["largest_error"] < 1e-2 for one in found["checks"])
    shown = screen(found)
    assert "All is well" in shown and "values and gradients right" in shown
    assert json.loads(json.dumps(found)) == found


def test_reasons_are_the_backends_own(found):
    kernels = found["kernels"]["cpu"]
    assert kernels["default"] == backends.choose(None, CPU)
    assert kernels["why_not"] == {name: backends.why_not(name, CPU) for name in backends.NAMES}


@pytest.mark.parametrize("what", ["values", "gradients", "an exception"])
def test_a_wrong_kernel_is_found(what, monkeypatch, tmp_path):
    """One latent too small, one gradient doubled, or a compiler that fails."""
    monkeypatch.setattr(doctor, "IMPLS", ("torch",))
    real = doctor.sparse_decode

    def decode_or_break(codes, *, w_dec, b_dec, impl):
        if impl == "reference":
            return real(codes, w_dec=w_dec, b_dec=b_dec, impl=impl)
        if what == "an exception":
            raise RuntimeError("ptxas died")
        values, indices = codes
        if what == "values":
            values = values * 1.001
        else:
            values = values * 2 - values.detach()
        return real(values, indices, w_dec=w_dec, b_dec=b_dec, impl=impl)

    monkeypatch.setattr(doctor, "sparse_decode", decode_or_break)
    findings = doctor.examine(tmp_path, rates=False)
    assert findings["problems"]
    assert not any(one["right"] for one in findings["checks"])
    words = {"values": "decoded off by", "gradients": "d x off by", "an exception": "ptxas died"}
    assert words[what] in "\n".join(findings["problems"])
    assert "There are problems" in screen(findings)


def test_what_is_amiss_is_said(found):
    healthy = json.loads(json.dumps(found))
    old = {**healthy, "versions": {**healthy["versions"], "transformers": "4.2", "datasets": None}}
    lines = doctor.problems(old)
    assert "transformers 4.48 or newer is needed, 4.2 is installed" in lines[0]
    assert "datasets 3.0 or newer is needed, none is installed" in lines[1] and len(lines) == 2
    gpu = {**healthy, "kernels": {"cuda:0": {"why_not": {"triton": "no triton"}}}}
    assert doctor.problems(gpu) == ["cuda:0: the GPU's kernels cannot run, torch's will: no triton"]
    full = {**healthy, "disk": {**healthy["disk"], "free_bytes": 1000}}
    assert "0.0 GiB are free" in doctor.problems(full)[0]
    closed = {**healthy, "disk": {**healthy["disk"], "writable": False}}
    assert "cannot be written to" in doctor.problems(closed)[0]


def test_rates_are_of_work_that_was_done(monkeypatch):
    monkeypatch.setattr(doctor, "RATE_SECONDS", 0.01)
    rates = doctor.device_rates(CPU)
    assert set(rates) == {
        *("float32_multiply_adds_per_s", "bfloat16_multiply_adds_per_s", "bytes_per_s")
    }
    assert all(1e7 < rate < 1e15 for rate in rates.values())


def test_the_hub_is_read_from_settings_alone(no_network, monkeypatch, tmp_path):
    from huggingface_hub import constants

    (tmp_path / "models--some--model").mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    state = doctor.hub()
    assert state["offline"] and state["cached_models"] == 1 and state["cached_datasets"] == 0


def test_exit_status(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(doctor, "IMPLS", ("torch",))
    out = ["--no-rates", "--out", str(tmp_path)]
    assert doctor.main([*out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []
    monkeypatch.setattr(doctor, "LITTLE_DISK", 2**60)
    assert doctor.main(out) == 1
    assert "There are problems" in capsys.readouterr().out
    assert doctor.main(["--jsno"]) == 2
    assert "did you mean --json" in capsys.readouterr().err


def test_as_a_command(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "kronsae.doctor", "--json", "--no-rates"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "not" / "there")],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(doctor.__file__).parents[1],
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    findings = json.loads(done.stdout)
    if not torch.cuda.is_available():
        assert "Triton needs a GPU" in findings["kernels"]["cpu"]["why_not"]["triton"]
        assert {one["impl"] for one in findings["checks"]} == {"torch"}
    assert not (tmp_path / "not").exists()
