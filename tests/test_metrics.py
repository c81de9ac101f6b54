"""Each figure of merit against a case worked by hand, or the formula written out."""

import math

import pytest
import torch

from kronsae.metrics.figures import (
    FiringMetrics,
    ReconstructionMetrics,
    cross_entropy,
    cross_entropy_recovered,
    density_histogram,
    gini,
    kl_divergence,
    pearson,
    probability_of_silence,
    spearman,
)

X = torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]])
X_HAT = torch.tensor([[3.0, 0.0], [0.0, 3.0], [1.0, 0.0]])


@pytest.mark.parametrize("parts", [[3], [2, 1], [1, 1, 1]], ids=str)
def test_reconstruction_by_hand(parts):
    metrics = ReconstructionMetrics(2)
    for x, x_hat in zip(X.split(parts), X_HAT.split(parts), strict=True):
        metrics.update(x, x_hat)
    found = metrics.compute()
    # Errors 16 + 1 + 1; mean (1, 2), so distances from it 8 + 1 + 5.
    assert found["fvu"] == pytest.approx(18 / 14)
    assert found["explained_variance"] == pytest.approx(1 - 18 / 14)
    assert found["mse"] == pytest.approx(18 / 6)
    assert found["cosine"] == pytest.approx((3 / 5 + 1 + 0) / 3)
    assert found["relative_norm"] == pytest.approx((3 / 5 + 3 / 2) / 2)


def test_batch_form_by_hand():
    metrics = ReconstructionMetrics(2)
    metrics.update(X, X_HAT)
    expected = (1 - 16 / 8 + 1 - 1 / 1 + 1 - 1 / 5) / 3
    assert metrics.compute()["explained_variance_batch"] == pytest.approx(expected)


def test_sums_are_in_float64():
    """A float32 sum of a million terms around 1e4 would lose the variance."""
    x = torch.full((1000, 1), 1e4)
    x[::2] += 0.125
    metrics = ReconstructionMetrics(1)
    for _ in range(100):
        metrics.update(x, x - 0.0625 * torch.ones_like(x) * (x > 1e4))
    assert metrics.compute()["fvu"] == pytest.approx(0.0625**2 / 2 / (0.125**2 / 4), rel=1e-5)


def test_nothing_and_no_variance():
    with pytest.raises(ValueError, match="no tokens"):
        ReconstructionMetrics(2).compute()
    metrics = ReconstructionMetrics(2)
    metrics.update(torch.ones(3, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="all activations are equal"):
        metrics.compute()


def test_firing_by_hand():
    metrics = FiringMetrics(20)
    with pytest.raises(ValueError, match="no tokens"):
        metrics.compute()
    indices = torch.tensor([[0, 1], [1, 2], [0, 1], [1, 3], [1, 4]])
    fired = torch.ones(5, 2, dtype=torch.bool)
    fired[4, 1] = False  # an unused slot at the index of latent 4
    metrics.update(indices[:2], fired[:2])
    metrics.update(indices[2:], fired[2:])
    assert metrics.counts.tolist() == [2, 5, 1, 1] + [0] * 16
    assert metrics.densities[:3].tolist() == [0.4, 1.0, 0.2]
    # Latent 2 and 3 fire on 20 % of tokens: four latents are above a tenth.
    assert metrics.compute() == {
        "l0": 9 / 5,
        "dead_share": 16 / 20,
        "dense_share": 4 / 20,
        # Counts 1, 1, 2, 5 at ranks 17 to 20: (13 + 15 + 2 * 17 + 5 * 19) / (20 * 9).
        "firing_gini": pytest.approx(157 / 180),
        "largest_share": 5 / 9,
        "heldout_tokens": 5,
    }


@pytest.mark.parametrize(
    ("counts", "by_hand"),
    [
        ([3, 3, 3, 3], 0.0),
        ([0, 8, 0, 0], 3 / 4),
        ([5, 0, 3], 5 / 12),  # pairs differ by 5, 2 and 3, twice each: 20 / (2 * 3 * 8)
        ([0, 0], 0.0),
    ],
)
def test_gini_by_hand(counts, by_hand):
    assert gini(torch.tensor(counts)) == pytest.approx(by_hand)


def test_density_histogram_by_hand():
    counts = torch.tensor([0, 0, 1, 2, 9, 10, 99, 100, 999, 1000])
    found = density_histogram(counts, 1000, bins_a_decade=1)
    assert found == {"log10_edges": [-3, -2, -1, 0], "latents": [3, 2, 3], "dead": 2}
    fine = density_histogram(counts, 1000)
    assert len(fine["latents"]) == 12 and len(fine["log10_edges"]) == 13
    assert sum(fine["latents"]) + fine["dead"] == len(counts)


def test_density_histogram_of_one_token():
    found = density_histogram(torch.tensor([0, 1]), 1, bins_a_decade=1)
    assert found == {"log10_edges": [-1, 0], "latents": [1], "dead": 1}


def test_cross_entropy_and_divergence_by_hand():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
    logits, other = p.log() + 3, q.log() - 2  # softmax takes the shifts away
    assert cross_entropy(logits, torch.tensor([2])).item() == pytest.approx(math.log(4))
    assert kl_divergence(logits, other).item() == pytest.approx(0.25 * math.log(2), rel=1e-6)
    assert kl_divergence(logits, logits).item() == 0
    assert kl_divergence(logits, other).dtype == torch.float64
    barred = torch.tensor([[0.0, 0.0, -math.inf]])
    assert kl_divergence(barred, other).item() == pytest.approx(math.log(2), rel=1e-6)


def test_what_is_not_finite_is_never_perfect():
    logits = torch.randn(2, 5)
    other = torch.stack([torch.full((5,), math.nan), logits[1]])
    first, second = kl_divergence(logits, other).tolist()
    assert math.isnan(first) and second == 0
    assert kl_divergence(other, logits).isnan().tolist() == [True, False]
    metrics = ReconstructionMetrics(2)
    metrics.update(X, torch.where(X == 4, math.nan, X_HAT))
    found = metrics.compute()
    assert all(map(math.isnan, found.values())), found


def test_recovered_by_hand():
    assert cross_entropy_recovered(2.0, 3.0, 6.0) == 0.75
    assert cross_entropy_recovered(2.0, 2.0, 6.0) == 1
    assert cross_entropy_recovered(2.0, 6.0, 6.0) == 0
    assert cross_entropy_recovered(2.0, 2.0, 2.0) == 1


def test_correlations():
    assert pearson([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert pearson([1, 2, 3], [1, 0, 2]) == pytest.approx(0.5)
    assert math.isnan(pearson([1, 2], [5, 5]))
    assert spearman([1, 2, 3, 4], [1, 10, 100, 1000]) == pytest.approx(1)
    # Ranks 1.5, 1.5, 3 against 1, 2, 3.
    assert spearman([7, 7, 9], [1, 2, 3]) == pytest.approx(math.sqrt(0.75))
    stats = pytest.importorskip("scipy.stats")
    x, y = torch.randn(2, 50).mul(3).round()
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y)[0])
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y)[0])


def test_dead_latents_are_compared_at_equal_numbers_of_tokens():
    """The share on 10,000 of many tokens is that of texts of 10,000, on average."""
    density = torch.logspace(-6, -2, 400, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    fires = torch.rand(40_000, 400, generator=generator, dtype=torch.float64) < density
    whole = FiringMetrics(400)
    of_parts = []
    for part in fires.split(10_000):
        indices = torch.arange(400).expand(len(part), -1)
        whole.update(indices, part)
        metrics = FiringMetrics(400)
        metrics.update(indices, part)
        of_parts.append(metrics.compute())
        assert of_parts[-1]["dead_share"] == pytest.approx(of_parts[-1]["dead_share_10k"])
    found = whole.compute()
    assert found["heldout_tokens"] == 40_000 and found["dead_share"] < found["dead_share_10k"] - 0.1
    mean = sum(part["dead_share"] for part in of_parts) / 4
    assert found["dead_share_10k"] == pytest.approx(mean, abs=0.01)
    exact = [math.comb(12 - count, 5) / math.comb(12, 5) for count in range(13)]
    silent = probability_of_silence(torch.arange(13), 12, 5)
    torch.testing.assert_close(silent, torch.tensor(exact, dtype=torch.float64))
