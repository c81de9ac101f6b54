"""SAEs that train with equal FLOPs: time, tokens, and how much they explain of what is held out."""

from itertools import count
from statistics import mean

import pytest

from benchmarks import isoflop
from benchmarks.measure import describe, synchronize, thousands
from kronsae.model.flops import flops_per_token


@pytest.fixture(scope="session")
def budget(request, device):
    budget = isoflop.default_budget(device)
    tokens = request.config.getoption("--iso-tokens")
    return budget.of(tokens) if tokens else budget


@pytest.fixture(scope="session")
def data(budget, device):
    return isoflop.read(budget, device)


@pytest.mark.parametrize("name", isoflop.ROWS)
def test_equal_flops(request, benchmark, device, budget, name):
    row = isoflop.ROWS[name]
    if why := row.why_not():
        pytest.skip(why)
    data, rate, seeds, trained = request.getfixturevalue("data"), isoflop.rate_of(name), count(), []
    # What is imported or compiled first is no part of the time.
    isoflop.train(budget._replace(tokens=2 * budget.batch), name, data.x, 0, rate)

    def run():
        trained.append(isoflop.train(budget, name, data.x, next(seeds), rate))
        synchronize(device)

    benchmark.group = f"equal FLOPs: {budget}"
    benchmark.pedantic(run, rounds=isoflop.SEEDS)
    explained = [isoflop.explained_variance(one, data.heldout) for one in trained]
    assert mean(explained) > 0, f"explained variance {explained}: it learns nothing"
    if benchmark.stats is not None:  # None under --benchmark-disable
        tokens = budget.tokens_of(row.sae(budget))
        speed = tokens / benchmark.stats.stats.median
        benchmark.stats.name = (
            f"{name}: explains {mean(explained):.3f}, {thousands(tokens)} tokens, "
            f"{thousands(speed)}/s"
        )
        benchmark.extra_info.update(
            describe(device),
            budget=budget._asdict(),
            multiply_adds=tokens * flops_per_token(row.sae(budget)),
            learning_rate=rate,
            tokens=tokens,
            tokens_per_s=speed,
            explained_variance=explained,
        )
