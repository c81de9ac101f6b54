"""Trainings with equal FLOPs: what they spend, that each learns, and how the table is set up."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def root_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture
def isoflop():
    from benchmarks import isoflop

    return isoflop


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_each_row_spends_the_budget_to_within_a_batch(isoflop, kind):
    from kronsae.model.flops import flops_per_token

    budget = isoflop.default_budget(torch.device(kind))
    for row in isoflop.ROWS.values():
        sae = row.sae(budget)
        spent = budget.tokens_of(sae) * flops_per_token(sae)
        assert abs(spent - budget.multiply_adds) <= budget.batch * flops_per_token(sae)
    more = isoflop.ROWS["KronSAE 4x4, ours"].sae(budget)
    assert budget.tokens_of(more) > 1.5 * budget.tokens


def test_each_row_learns(isoflop):
    """On sums of few directions; the training's SAEs differ by their seeds alone."""
    budget = isoflop.Budget(dict_size=128, tokens=1024, heldout=512, k=4, batch=64, d=16)
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(32, 16, generator=generator)
    x = directions[torch.randint(32, (4096, 2), generator=generator)].sum(1) / 2**0.5
    for name in [name for name, row in isoflop.ROWS.items() if row.why_not() is None]:
        reconstruct = isoflop.train(budget, name, x, 0, 0.02)
        explained = isoflop.explained_variance(reconstruct, x[-512:])
        assert 0.4 < explained < 1, (name, explained)
    seeds = 0, 0, 1
    one, again, other = (isoflop.train(budget, name, x, seed, 0.02) for seed in seeds)
    with torch.no_grad():
        assert one(x).equal(again(x)) and not one(x).equal(other(x))


def test_rates_are_the_best_of_those_tried(isoflop):
    tried = json.loads(isoflop.RATES_FILE.read_text())["explained_variance"]
    assert tried.keys() == isoflop.ROWS.keys()
    for row, found in tried.items():
        assert found[f"{isoflop.rate_of(row):g}"] == max(found.values())


@pytest.mark.parametrize(
    "given, width, shown",
    [
        (None, 100, ["median", "iqr"]),
        (None, 80, ["median"]),
        (["min", "ops"], 80, ["min", "ops"]),
    ],
)
def test_columns_fit_the_terminal_unless_they_are_asked_for(given, width, shown, monkeypatch):
    from benchmarks import conftest

    monkeypatch.setenv("COLUMNS", str(width))
    config = SimpleNamespace(option=SimpleNamespace(benchmark_columns=given))
    conftest.pytest_configure(config)
    assert config.option.benchmark_columns == shown
