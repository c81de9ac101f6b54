"""Training by the fused step: the same run as by autograd and torch's AdamW."""

import pytest
import torch

from kronsae import SAEConfig, TrainConfig
from kronsae.errors import InputError
from kronsae.learner import Learner, why_not_fused

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KRON = SAEConfig(d_model=12, heads=4, m=2, n=3, k=3)
DENSE = SAEConfig(d_model=12, encoder="dense", dict_size=24, k=3)
SETTINGS = {"tokens": 100, "batch_size": 10, "lr": 1e-2, "dtype": "float32", "weight_decay": 0.01}


def learner(config: SAEConfig, fused_step: str, **settings) -> Learner:
    return Learner(
        config, TrainConfig(**{**SETTINGS, "fused_step": fused_step, **settings}), DEVICE
    )


def batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 12, generator=generator).to(DEVICE) for _ in range(count)]


def assert_same(one: Learner, other: Learner) -> None:
    for name, parameter in one.sae.named_parameters():
        expected = dict(other.sae.named_parameters())[name]
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "config, decoder_norm",
    [(KRON, "unit"), (DENSE, "unit"), (KRON, "free")],
    ids=["kron", "dense", "kron-free"],
)
def test_fused_and_torch_steps_give_the_same_run(config, decoder_norm):
    """Metrics and weights, with the auxiliary loss, weight decay and clipping."""
    settings = {"dead_after_tokens": 8, "auxk": 4, "max_grad_norm": 0.5, "auxk_fraction": 0.5}
    settings |= {"adam_beta2": 0.9, "decoder_norm": decoder_norm}
    runs = [learner(config, fused_step, **settings) for fused_step in ("on", "off")]
    for x in batches(4):
        ours, theirs = (run.step(x) for run in runs)
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert ours["auxk_loss"] > 0 and ours["dead_share"] > 0
    assert runs[0].fused is not None and runs[1].fused is None
    assert_same(*runs)


def test_a_run_goes_on_with_the_other_step():
    whole, first = learner(KRON, "off"), learner(KRON, "on")
    xs = batches(4)
    for x in xs[:2]:
        whole.step(x), first.step(x)
    second, third = learner(KRON, "off"), learner(KRON, "on")
    second.load_state_dict(first.state_dict())
    whole.step(xs[2]), second.step(xs[2])
    third.load_state_dict(second.state_dict())
    whole.step(xs[3]), third.step(xs[3])
    assert_same(third, whole)


def test_not_finite_activations_leave_the_weights_as_they_were():
    subject, (x,) = learner(KRON, "on"), batches(1)
    subject.step(x)
    before = {name: p.detach().clone() for name, p in subject.sae.named_parameters()}
    x[3, 4] = torch.nan
    assert "gradient norm is nan" in subject.step(x).reason
    for name, parameter in subject.sae.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_choice_of_the_step():
    assert "off" in why_not_fused(KRON, TrainConfig(fused_step="off"), DEVICE)
    auto = why_not_fused(KRON, TrainConfig(fused_step="auto"), DEVICE)
    assert auto is None if DEVICE.type == "cuda" else "GPU" in auto
    wide = SAEConfig(d_model=10_000, heads=4, m=2, n=3, k=3)
    with pytest.raises(InputError, match="10000"):
        learner(wide, "on")
    with pytest.raises(InputError, match="fused_step"):
        TrainConfig(fused_step="yes")
