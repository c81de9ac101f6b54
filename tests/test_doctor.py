"""The doctor: what it finds is so, what is amiss it says, and its exit status tells."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kronsae import doctor
from kronsae.system import threads
from kronsae_kernels import backends

CPU = torch.device("cpu")


def refuse(*args, **kwargs):
    raise AssertionError("the network was touched")


@pytest.fixture(scope="module")
def found():
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():  # the interpreter is slow, and has tests of its own
            patch.setattr(doctor, "IMPLS", ("torch",))
        for name in ("connect", "connect_ex"):  # it uses no network
            patch.setattr(socket.socket, name, refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        return doctor.examine()


def test_all_is_well_here(found):
    assert found["problems"] == []
    assert torch.__version__.startswith(found["versions"]["torch"].split("+")[0])
    assert {(c["impl"], c["encoder"]) for c in found["checks"] if c["device"] == "cpu"} >= {
        ("torch", "kron"),
        ("torch", "dense"),
    }
    assert all(not one["wrong"] and 0 < one["largest_error"] < 1e-2 for one in found["checks"])
    shown = doctor.render(found)
    assert "All is well" in shown and "values and gradients right" in shown
    assert json.loads(json.dumps(found)) == found


def test_reasons_are_the_backends_own(found):
    kernels = found["kernels"]["cpu"]
    assert kernels["default"] == backends.choose(None, CPU)
    assert kernels["why_not"] == {name: backends.why_not(name, CPU) for name in backends.NAMES}


@pytest.mark.parametrize("what", ["values", "gradients", "an exception"])
def test_a_wrong_kernel_is_found(what, monkeypatch):
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
    findings = doctor.examine()
    assert findings["problems"]
    assert all(one["wrong"] for one in findings["checks"])
    words = {"values": "decoded off by", "gradients": "d x off by", "an exception": "ptxas died"}
    assert words[what] in "\n".join(findings["problems"])
    assert "There are problems" in doctor.render(findings)


def test_what_is_amiss_is_said(found):
    healthy = json.loads(json.dumps(found))
    old = {**healthy, "versions": {**healthy["versions"], "transformers": "4.2", "datasets": None}}
    lines = doctor.problems(old)
    assert "transformers 4.48 or newer is needed, 4.2 is installed" in lines[0]
    assert "datasets 3.0 or newer is needed, none is installed" in lines[1] and len(lines) == 2
    gpu = {**healthy, "kernels": {"cuda:0": {"why_not": {"triton": "no triton"}}}}
    assert doctor.problems(gpu) == ["cuda:0: the GPU's kernels cannot run, torch's will: no triton"]


def test_threads_that_have_too_few_processors(found):
    cpu = {**found["devices"]["cpu"], "threads": 8, "processors": 2.5}
    shown = doctor.render({**found, "devices": {"cpu": cpu}})
    assert "8 threads share 2.5 processors: set OMP_NUM_THREADS=2" in shown
    assert "share" not in doctor.render({**found, "devices": {"cpu": {**cpu, "threads": 2}}})


def test_exit_status(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "IMPLS", ("torch",))
    assert doctor.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []
    monkeypatch.setitem(doctor.NEEDED, "torch", "99")
    assert doctor.main([]) == 1
    assert "There are problems" in capsys.readouterr().out
    assert doctor.main(["--jsno"]) == 2
    assert "did you mean --json" in capsys.readouterr().err


def test_as_a_command():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("TRITON_INTERPRET", *threads.POLICIES):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-m", "kronsae.doctor", "--json"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(doctor.__file__).parents[1],
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    findings = json.loads(done.stdout)
    assert findings["devices"]["cpu"]["waiting"] == "OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=2000"
    assert findings["devices"]["cpu"]["threads"] == 1
    if not torch.cuda.is_available():
        assert "Triton needs a GPU" in findings["kernels"]["cpu"]["why_not"]["triton"]
        assert {one["impl"] for one in findings["checks"]} == {"torch"}
