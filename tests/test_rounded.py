"""AdamW with bfloat16 moments, in torch: the bits of its specification, and why it draws."""

import pytest
import torch

from kronsae_kernels import reference, rounded, torch_impl

SETTINGS = {"lr": 0.01, "betas": (0.9, 0.999), "weight_decay": 0.1}


def new_state(weight):
    moments = (torch.zeros_like(weight, dtype=torch.bfloat16) for _ in range(2))
    return dict(zip(("exp_avg", "exp_avg_sq", "step"), [*moments, torch.zeros(())], strict=True))


@pytest.mark.parametrize("chunk", [1, 2**10, 2**23], ids=["rows", "chunks", "whole"])
@pytest.mark.parametrize("kron", [False, True], ids=["rows", "heads"])
def test_steps_are_torchs_with_moments_rounded_as_specified(kron, chunk, monkeypatch):
    """To the bit, whatever the chunks. Noise goes by the order in which a weight is stored."""
    monkeypatch.setitem(torch_impl.CHUNK_BYTES, "cpu", chunk)
    weight = torch.randn(3, 7, 16).transpose(0, 1) if kron else torch.randn(21, 16)
    truth = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.AdamW([truth], fused=True, **SETTINGS)
    state = new_state(weight)
    for step in range(1, 4):
        truth.grad = torch.randn_like(weight)
        rounded.adamw_(weight, truth.grad.clone(), state, seed=2, **SETTINGS)
        optimizer.step()
        exact = optimizer.state[truth]
        stored = [
            (x.transpose(0, 1) if kron else x).flatten(0, -2)
            for x in (exact["exp_avg"], exact["exp_avg_sq"], state["exp_avg"], state["exp_avg_sq"])
        ]
        assert torch.equal(weight, truth) and state["step"] == step
        for found, expected in zip(
            stored[2:], reference.rounded_moments(*stored[:2], 2, step), strict=True
        ):
            assert torch.equal(found, expected)
        for name in ("exp_avg", "exp_avg_sq"):  # the next step starts from what is stored
            exact[name].copy_(state[name])


@pytest.mark.parametrize("start, gradient", [(0.5, 1.0), (1.0, 0.0)], ids=["grows", "decays"])
def test_second_moments_follow_where_rounding_to_the_nearest_stays(start, gradient, monkeypatch):
    """100 steps of one gradient each change a second moment by 0.1 % or less."""
    settings, weight = {"lr": 0.0, "betas": (0.9, 0.999)}, torch.zeros(8, 64)

    def second_moments():
        state = new_state(weight)
        state["exp_avg_sq"].fill_(start)
        for _ in range(100):
            rounded.adamw_(weight, torch.full_like(weight, gradient), state, seed=1, **settings)
        return state["exp_avg_sq"].double()

    exact = gradient + (start - gradient) * 0.999**100
    assert second_moments().mean() == pytest.approx(exact, rel=0.005) != start
    monkeypatch.setattr(rounded, "_round", lambda value, noise, out: out.copy_(value))
    assert second_moments().eq(start).all()
