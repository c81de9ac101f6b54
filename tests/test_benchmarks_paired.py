"""SAEs compared pair by pair on the tokens of a cache that they have not read."""

import cached
import pytest
import torch

import kronsae
from benchmarks import paired
from kronsae.cache import CacheActivations
from kronsae.train import main

FLAGS = [
    *("--layer", "2", "--tokens", "300", "--batch-size", "50", "--buffer-tokens", "100"),
    *("--dict-size", "64", "--k", "4", "--eval-every", "0", "--log-every", "1"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A cache, and SAEs trained on it: seeds 0 and 1 (a, b), and one in permuted order (c)."""
    folder = tmp_path_factory.mktemp("paired")
    with pytest.MonkeyPatch.context() as patch:
        cached.make(patch, folder / "cache")
    for name, seed, order in (("a", "0", "stream"), ("b", "1", "stream"), ("c", "0", "global")):
        flags = ["--seed", seed, "--activations-order", order, "--out", str(folder / name)]
        assert main(["--activations", str(folder / "cache"), *FLAGS, *flags]) == 0
    return folder


def opened(folder):
    return CacheActivations(folder / "cache", layer=2, batch_size=1)


def test_figures_are_those_of_the_tokens_after_the_training(folder):
    names = [str(folder / name) for name in ("a", "b")]
    shards = [
        rows
        for number, (_, _, rows) in enumerate(opened(folder).text_in_order())
        if number >= len(opened(folder).index.heldout)
    ]
    read = [sum(map(len, shards[:number])) for number in range(len(shards))]
    x = torch.cat([rows for rows, before in zip(shards, read, strict=True) if before >= 400])
    saes = [kronsae.load(name) for name in names]
    x = x[~paired.rule_of(saes[0].metadata)(x)]
    wrong = [(sae(x).x_hat - x).double().square().sum() for sae in saes]
    ours, theirs = (float(1 - w / (x - x.mean(0)).double().square().sum()) for w in wrong)
    size, _, _, _, pair, mean = paired.compare(names[:1], names[1:], opened(folder)).splitlines()
    assert size.startswith(f"{len(x):,} tokens in ")
    assert pair.startswith(f"| {names[0]} | {ours:.4f} | {theirs:.4f} | {ours - theirs:+.4f} | ")
    assert mean.split("|")[2:] == pair.split("|")[2:]


def test_the_mean_is_over_the_pairs_and_an_sae_differs_from_itself_by_nothing(folder):
    a, b = str(folder / "a"), str(folder / "b")
    *_, first, same, mean = paired.compare([a, b], [b, b], opened(folder)).splitlines()
    assert same.endswith("| +0.0000 | +0.0000 to +0.0000 |")
    more = [float(line.split("|")[4]) for line in (first, mean)]
    assert more[0] != 0 and abs(more[1] - more[0] / 2) <= 1e-4


def test_a_document_ends_at_a_special_token(folder):
    """The text of the cache has 40 documents, joined into contexts; some are held out."""
    rows, documents = map(torch.cat, zip(*paired.unseen(opened(folder), 0), strict=True))
    assert len(rows) == len(documents) == opened(folder).index.train_rows
    assert (documents.diff() >= 0).all()
    assert 30 <= len(documents.unique()) <= 40


def test_the_interval_of_equal_documents_has_no_width_and_of_others_has():
    ones = torch.ones(50, dtype=torch.float64)
    assert paired.interval(0.1 * ones, ones) == pytest.approx((0.1, 0.1))
    gains = torch.linspace(-1, 1, 50, dtype=torch.float64)
    low, high = paired.interval(
        gains, ones
    )  # of a mean: 1.96 deviations of 0.589, by the root of 50
    assert -low == pytest.approx(0.163, abs=0.02) and high == pytest.approx(0.163, abs=0.02)


@pytest.mark.parametrize(
    ("ours", "beside", "said"),
    [
        ("a", "c", "trained with --activations-order stream"),
        ("a", "a b", "as many SAEs --beside, 1; got 2"),
    ],
)
def test_what_cannot_be_compared_is_refused(ours, beside, said, folder, capsys):
    paths = [str(folder / name) for name in beside.split()]
    given = ["--cache", str(folder / "cache"), "--layer", "2", str(folder / ours), "--beside"]
    with pytest.raises(SystemExit) as ended:
        paired.main([*given, *paths])
    assert ended.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())
