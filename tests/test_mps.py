"""What a device without float64, such as mps, asks for."""

import pytest
import torch
from no_doubles import no_doubles

from kronsae.config import SAEConfig, TrainConfig
from kronsae.errors import InputError
from kronsae.metrics.figures import (
    FiringMetrics,
    ReconstructionMetrics,
    cross_entropy,
    kl_divergence,
)
from kronsae.system.devices import as_double, compute_dtype, of_doubles, resolve_device, with_index
from kronsae.training.fit import fit

X = torch.randn(2048, 16, generator=torch.Generator().manual_seed(0))


def test_the_stand_in_has_no_doubles_and_mixes_no_devices():
    with no_doubles() as device:
        x = X.to(device)
        assert x.device == device and x.sum().item() == X.sum().item()
        with pytest.raises(TypeError, match="no float64"):
            x.double()
        with pytest.raises(RuntimeError, match="on one device"):
            x + X
        assert as_double(x).device.type == "cpu" and torch.equal(as_double(x), X.double())


def test_names():
    if not torch.backends.mps.is_available():
        with pytest.raises(InputError, match="device 'mps' cannot be used"):
            resolve_device("mps")
    mps = torch.device("mps")
    assert of_doubles(mps) == torch.device("cpu")
    assert compute_dtype("auto", mps) == torch.float32
    assert with_index(mps) == with_index(torch.device("mps", 0))


def test_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="'mps' cannot be used: torchrun's processes"):
        resolve_device("mps")


def test_figures_are_those_of_the_cpu():
    logits, other = X[:64], X[64:128]
    targets = torch.arange(64) % 16
    with no_doubles() as device:
        figures = []
        for place in (torch.device("cpu"), device):
            reconstruction = ReconstructionMetrics(16)
            reconstruction.update(X.to(place), 0.9 * X.to(place))
            firing = FiringMetrics(8, place)
            indices = torch.tensor([[0, 1], [1, 2]]).to(place)
            firing.update(indices, torch.ones_like(indices, dtype=torch.bool))
            figures.append((reconstruction.compute(), firing.compute()))
            losses = cross_entropy(logits.to(place), targets.to(place))
            assert torch.equal(losses, cross_entropy(logits, targets))
            divergence = kl_divergence(logits.to(place), other.to(place))
            assert torch.equal(divergence, kl_divergence(logits, other))
    assert figures[0] == figures[1]


KINDS = {
    "kron": {"encoder": "kron", "m": 2, "n": 2},
    "topk": {"encoder": "dense"},
    "batchtopk": {"encoder": "dense", "selection": "batchtopk"},
    "jumprelu": {"encoder": "dense", "selection": "jumprelu"},
    "gated": {"encoder": "gated", "selection": "relu", "k": 0},
    "matryoshka": {"encoder": "dense", "objective": "matryoshka", "matryoshka_first": 16},
    "switch": {"encoder": "dense", "experts": 4},
}


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_that_of_the_cpu(kind, monkeypatch):
    sae = SAEConfig(**{"dict_size": 64, "k": 4, **KINDS[kind]})
    train = TrainConfig(
        tokens=2048, batch_size=256, eval_every=4, lr=1e-3, dead_after_tokens=512, device="cpu"
    )
    expected = fit(sae, X, train, heldout=X[:256])
    with no_doubles() as device:
        monkeypatch.setattr("kronsae.training.fit.resolve_device", lambda name: device)
        result = fit(sae, X, train, heldout=X[:256])
        assert result.sae.W_enc.device == device
        weights = result.sae.cpu().state_dict()
    for name, weight in expected.sae.state_dict().items():
        assert torch.allclose(weights[name], weight, atol=1e-6), name
