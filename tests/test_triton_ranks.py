"""The fused step of ranks that share the heads learns what that of one process does.

`fused_ranks.py` says what they do, here it is compared. Ranks add up float32 numbers in another
order, which errs by about 2^-24 of the sum of their magnitudes; AdamW divides by a gradient's own
size, which keeps that, but where terms cancel: 1e-4 of a weight's norm leaves room for ten steps.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

import kronsae

pytest.importorskip("triton")

import fused_ranks

from kronsae_kernels import step as fused
from kronsae_kernels.ranks import keep_largest_of_all
from kronsae_kernels.step import GraphedStep, TrainingStep

pytestmark = pytest.mark.long

LAYOUTS = list(fused_ranks.LAYOUTS)
CASES = fused_ranks.CASES


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def of_ranks(folder) -> list[dict[str, Any]]:
    return fused_ranks.results(folder, CASES, slow=False)


@pytest.fixture(scope="module")
def of_others(tmp_path_factory) -> list[dict[str, Any]]:
    return fused_ranks.results(tmp_path_factory.mktemp("others"), fused_ranks.OTHERS, slow=True)


@pytest.fixture(scope="module")
def alone(of_ranks) -> dict[str, Any]:
    return of_ranks[3]["alone"]


def taking_part(of_ranks: list[dict[str, Any]], layout: str, job: str) -> list[Any]:
    found = [done[layout][job] for done in of_ranks if layout in done]
    assert len(found) == len(fused_ranks.LAYOUTS[layout][0])
    return found


def check_conditions(truth: dict[str, Any]) -> None:
    """Dead latents, clipping and a skipped batch are there, or equality would say nothing."""
    metrics = truth["metrics"]
    figures = [m for m in metrics if isinstance(m, dict)]
    assert any(m["auxk_loss"] > 0 and m["dead_share"] > 0 for m in figures)
    assert any(m["grad_norm"] > fused_ranks.TRAIN.max_grad_norm for m in figures)
    assert metrics[fused_ranks.NOT_FINITE][0] == "gradient norm is nan"
    assert truth["steps"] == len(metrics) - 1


def check_equal(found: list[dict[str, Any]], truth: dict[str, Any], rel: float) -> None:
    """Metrics, weights, dead latents; what all ranks have, to the bit."""
    for got in found:
        assert got["steps"] == truth["steps"]
        assert got["metrics"] == found[0]["metrics"]
        for before, after in zip(truth["metrics"], got["metrics"], strict=True):
            if isinstance(before, dict):
                assert after == pytest.approx(before, rel=rel, abs=1e-6)
            else:
                assert after == before
        # Its moments and number of steps, too: nobody ever sends it to the others.
        assert all(map(torch.equal, got["b_dec"], found[0]["b_dec"]))
    got = found[0]  # rank 0 has gathered them
    assert torch.equal(got["silent"], truth["silent"])
    assert got["weights"].keys() == truth["weights"].keys()
    for name, weight in truth["weights"].items():
        error = float((got["weights"][name] - weight).norm() / weight.norm())
        assert error <= rel, f"{name}: relative error {error:.2e}, expected at most {rel:.0e}"


@pytest.mark.parametrize("layout, point", CASES)
def test_ranks_learn_what_one_process_learns(layout, point, of_ranks, alone):
    check_conditions(alone[point])
    check_equal(taking_part(of_ranks, layout, point), alone[point], 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("layout, point", fused_ranks.OTHERS)
def test_ranks_of_other_kinds_learn_what_one_process_learns(layout, point, of_others):
    """In bfloat16, pre-latents are rounded; and so are moments, by another noise."""
    truth = of_others[3]["alone"][point]
    check_conditions(truth)
    rel = 1e-2 if point == "bfloat16" else 1e-4
    check_equal(taking_part(of_others, layout, point), truth, rel)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_selection_is_exact(layout, of_ranks, alone):
    """With ties, masks that leave few or none on a rank, and any k up to all latents."""
    for found in zip(alone["select"], *taking_part(of_ranks, layout, "select"), strict=True):
        truth, *of_each = found
        for got in of_each:
            assert torch.equal(got["values"].isnan(), truth["values"].isnan())
            assert torch.equal(got["values"].nan_to_num(), truth["values"].nan_to_num())
            torch.testing.assert_close(got["loss"], truth["loss"], rtol=1e-6, atol=0)
            for name in ("loss", "residual"):
                assert torch.equal(got[name], of_each[0][name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_not_finite_on_one_rank_alone_stops_all(layout, of_ranks, alone):
    for got in [alone["overflow"], *taking_part(of_ranks, layout, "overflow")]:
        assert got["norm"].isnan() and got["same"] and got["skips"] == [1, 1, 1, 1]


def test_a_run_goes_on_with_any_number_of_ranks(of_ranks, folder):
    """Alone, by 4, by 2, and alone again: one run."""
    chain, whole = (kronsae.load(folder / name) for name in ("chain", "alone"))
    metrics = whole.metadata["metrics"]
    assert chain.metadata["metrics"] == pytest.approx(metrics, rel=1e-4)
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(chain.state_dict()[name], weight, rtol=1e-3, atol=1e-4)


def test_a_run_with_bfloat16_moments_goes_on_to_the_same_bits(of_ranks, folder):
    resumed, whole = (kronsae.load(folder / name) for name in ("resumed", "rounded"))
    assert resumed.metadata["tokens"] == whole.metadata["tokens"] == 20
    for name, weight in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight), name


class Alone:
    """One of two ranks, of which the other has nothing to say."""

    rank, size = 1, 2

    def sum(self, x):
        return x

    def gather(self, x):
        return torch.stack([torch.full_like(x, -torch.inf), x])


def step_of_two(**settings: Any) -> TrainingStep:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = {"w_enc": (5, 3), "b_enc": (5,), "w_dec": (5, 3), "b_dec": (3,)}
    weights = {name: torch.ones(shape, device=device) for name, shape in shapes.items()}
    return TrainingStep(**weights, **{"k": 6, "ranks": Alone(), **settings})


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"k: .* \[1, 10\] .*F = 10 of 2 ranks"):
        step_of_two(k=11)
    step = step_of_two()
    x = torch.ones(2, 3, device=step.device)
    for given in ({"width": 6}, {"bounds": [5]}):
        with pytest.raises(ValueError, match="prefixes, width: ranks select .* expected None"):
            step.accumulate(x, **given)
    with pytest.raises(RuntimeError, match="2 ranks exchange"):
        GraphedStep(step)
    assert "2 ranks exchange" in fused.why_not_graphed(torch.device("cuda"), 2)


def test_of_equal_latents_the_lowest_rank_has_the_first():
    """NaN comes before all, and places without a latent after all."""

    class Other(Alone):
        def gather(self, x):
            return torch.stack([torch.tensor([[2.0, 1.0, -torch.inf]]), x])

    indices, ones = torch.tensor([[4, 0, 2]]), torch.ones(1, 3)
    for scores, k, kept in (
        ([2.0, 1.0, 1.0], 1, []),
        ([2.0, 1.0, 1.0], 2, [4]),
        ([2.0, 1.0, 1.0], 3, [4]),
        ([2.0, 1.0, 1.0], 4, [4, 0]),
        ([torch.nan, 0.0, -1.0], 1, [4]),
        ([2.0, 1.0, -3.0], 5, [4, 0, 2]),
    ):
        got = keep_largest_of_all(indices, torch.tensor([scores]), ones, k, Other())
        assert got.tolist() == [kept + [-1] * (3 - len(kept))], (scores, k)
