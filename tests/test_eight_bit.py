"""AdamW with moments of 8 bits: what bitsandbytes' own optimizer computes, and its refusals."""

import signal
from importlib import metadata

import pytest
import torch

from kronsae import InputError, SAEConfig, TrainConfig
from kronsae.train import fit
from kronsae.training import eight_bit
from kronsae.training.learner import check_step
from kronsae_kernels import torch_impl

KRON = SAEConfig(d_model=16, heads=16, m=2, n=4, k=4)
EIGHT = TrainConfig(tokens=2000, batch_size=100, moments="8bit", lr=3e-3, log_every=1)
CPU = torch.device("cpu")


@pytest.mark.parametrize("chunk", [1, 2**23], ids=["blocks", "whole"])
@pytest.mark.parametrize("kron", [False, True], ids=["rows", "heads"])
def test_steps_are_those_of_bitsandbytes(kron, chunk, monkeypatch):
    """To the bit, of a matrix whose last block is not full, whatever the chunks."""
    optim = pytest.importorskip("bitsandbytes").optim
    monkeypatch.setitem(torch_impl.CHUNK_BYTES, "cpu", chunk)
    shape = (7, 23, 32) if kron else (161, 32)
    stored = torch.randn(shape)
    weight = stored.clone().transpose(0, 1) if kron else stored.clone()
    truth, state = torch.nn.Parameter(stored), eight_bit.new_state(weight)
    settings = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1}
    optimizer = optim.AdamW8bit([truth], **settings)
    for _ in range(3):
        truth.grad = torch.randn(shape)
        gradient = truth.grad.transpose(0, 1).contiguous() if kron else truth.grad.clone()
        eight_bit.adamw_(weight, gradient, state, **settings)
        optimizer.step()
    theirs = optimizer.state[truth]
    assert torch.equal(weight.transpose(0, 1) if kron else weight, truth)
    for ours, name in (("exp_avg", "state1"), ("exp_avg_sq", "state2")):
        moment = state[ours].transpose(0, 1) if kron else state[ours]
        assert torch.equal(moment, theirs[name])
        assert torch.equal(state[f"{ours}_scale"], theirs[name.replace("state", "absmax")])


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path):
    pytest.importorskip("bitsandbytes")
    x = torch.randn(1000, 16)

    def stop(record):
        if record["step"] == 8:
            signal.raise_signal(signal.SIGTERM)

    whole = fit(KRON, x, EIGHT)
    assert fit(KRON, x, EIGHT, out=tmp_path / "run", on_record=stop).stopped_by
    rest = fit(KRON, x, EIGHT, out=tmp_path / "run", resume=True)
    for name, weight in whole.sae.state_dict().items():
        assert torch.equal(rest.sae.state_dict()[name], weight), name


@pytest.mark.parametrize(
    ("device", "ranks", "words"),
    [
        ("mps", (1, 1), "not on mps: use bfloat16"),
        ("cpu", (1, 2), "would be cut where 2 processes share the heads"),
    ],
)
def test_where_they_cannot_be(device, ranks, words, monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda package: "1")
    with pytest.raises(InputError, match=words):
        check_step(KRON, EIGHT, torch.device(device), ranks)
    assert "8-bit" in check_step(KRON, EIGHT, CPU, (1, 1))


def test_without_bitsandbytes(monkeypatch):
    def missing(package):
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(InputError, match="--moments 8bit needs the package bitsandbytes"):
        check_step(KRON, EIGHT, CPU, (1, 1))
