"""SAEs compared pair by pair on the tokens of a cache that they have not read."""

import dataclasses

import cached
import pytest
import torch

import kronsae
from benchmarks import paired
from kronsae.cache import CacheActivations
from kronsae.train import main

FLAGS = [
    *("--batch-size", "50", "--buffer-tokens", "100"),
    *("--dict-size", "64", "--k", "4", "--eval-every", "0", "--log-every", "1"),
]
SAES = {
    "a": ["--layer", "2"],
    "b": ["--layer", "2", "--seed", "1"],
    "permuted": ["--layer", "2"],
    "other-layer": ["--layer", "1"],
    "transcoder": ["--hookpoint", "gpt_neox.layers.1", "--target-hookpoint", "gpt_neox.layers.2"],
    "long": ["--layer", "2"],
    "first": ["--layer", "2", "--activations-tokens", "700", "--epochs", "3"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two caches, and SAEs: SAES of the first, one that went on from a, and one of the second."""
    folder = tmp_path_factory.mktemp("paired")
    with pytest.MonkeyPatch.context() as patch:
        cached.make(patch, folder / "cache")
        cached.make(patch, folder / "second", seed=1)

    def train(name, *flags, cache="cache"):
        order = "global" if name == "permuted" else "stream"
        tokens = {"long": "1500", "first": "1100"}.get(name, "300")
        given = ["--activations", str(folder / cache), "--activations-order", order, *FLAGS]
        assert main([*given, "--tokens", tokens, *flags, "--out", str(folder / name)]) == 0

    for name, flags in SAES.items():
        train(name, *flags)
    train("went-on", "--layer", "2", "--finetune", str(folder / "a"))
    train("of-second", "--layer", "2", cache="second")
    return folder


def cache_of(folder):
    return CacheActivations(folder / "cache", layer=2, batch_size=1)


def table(folder, names, beside):
    """The line above the table, and the cells of its rows."""
    paths = [[str(folder / name) for name in side.split()] for side in (names, beside)]
    size, _, _, _, *rows = paired.compare(*paths, str(folder / "cache")).splitlines()
    return size, [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]


def rows_after(folder, tokens, sae):
    """Rows of whole shards after the first tokens, without those that an SAE leaves out."""
    cache = cache_of(folder)
    shards = [rows for _, _, rows in cache.text_in_order()][len(cache.index.heldout) :]
    before = [sum(map(len, shards[:number])) for number in range(len(shards))]
    x = torch.cat([rows for rows, read in zip(shards, before, strict=True) if read >= tokens])
    return x[~paired.rule_of(sae.metadata)(x)]


def test_figures_are_those_of_the_tokens_after_the_training(folder):
    saes = [kronsae.load(folder / name) for name in "ab"]
    x = rows_after(folder, 400, saes[0])
    outs = [sae(x) for sae in saes]
    wrong = [(out.x_hat - x).double().square().sum() for out in outs]
    ours, theirs = (float(1 - w / (x - x.mean(0)).double().square().sum()) for w in wrong)
    l0s = [(out.codes.values > 0).sum(1).double().mean() for out in outs]
    size, (pair, mean) = table(folder, "a", "b")
    assert size.startswith(f"{len(x):,} tokens in ")
    assert pair[1:3] == [f"{ours:.4f} (L0 {l0s[0]:.1f})", f"{theirs:.4f} (L0 {l0s[1]:.1f})"]
    assert pair[3] == f"{ours - theirs:+.4f}"
    assert mean[1:] == pair[1:]


def test_the_mean_is_over_the_pairs_and_an_sae_differs_from_itself_by_nothing(folder, monkeypatch):
    assert table(folder, "a", "b")[1][0][4] == "too few documents"
    monkeypatch.setattr(paired, "LEAST_DOCUMENTS", 2)
    _, (first, same, mean) = table(folder, "a b", "b b")
    assert same[3:] == ["+0.0000", "+0.0000 to +0.0000"]
    assert float(first[3]) != 0 and abs(float(mean[3]) - float(first[3]) / 2) <= 1e-4


def test_what_one_sae_leaves_out_is_left_out_in_any_order(folder, monkeypatch):
    whole, _ = table(folder, "a", "b")

    def rule_of(metadata):
        return (lambda x: x[:, 0] > 0) if metadata["config"]["train"]["seed"] else None

    monkeypatch.setattr(paired, "rule_of", rule_of)
    size, (pair, _) = table(folder, "a", "b")
    swapped_size, (swapped, _) = table(folder, "b", "a")
    assert size == swapped_size != whole
    assert pair[1:3] == swapped[2:0:-1]


def test_the_buffer_holds_two_batches_at_least(folder):
    sae, cache = kronsae.load(folder / "a"), cache_of(folder)
    assert paired.tokens_read(sae, cache) == 300 + 100
    sae.metadata["data"]["batch_size"] = 70
    assert paired.tokens_read(sae, cache) == 300 + 140


def test_no_token_is_read_beyond_those_that_were_given(folder):
    assert paired.tokens_read(kronsae.load(folder / "first"), cache_of(folder)) == 700
    assert table(folder, "first", "first")[0] != table(folder, "a", "a")[0]


def test_a_cache_that_has_grown_since_can_be_compared_on(tmp_path, monkeypatch):
    cached.make(monkeypatch, tmp_path / "cache", tokens=600)
    given = ["--activations", str(tmp_path / "cache"), "--activations-order", "stream", *FLAGS]
    assert main([*given, "--layer", "2", "--tokens", "600", "--out", str(tmp_path / "a")]) == 0
    cached.make(monkeypatch, tmp_path / "cache", tokens=1200)
    size, _ = table(tmp_path, "a", "a")
    left = rows_after(tmp_path, 600, kronsae.load(tmp_path / "a"))
    assert size.startswith(f"{len(left):,} tokens in ") and len(left) > 400


def test_a_document_ends_at_a_special_token(folder):
    """The text of the cache has 40 documents, joined into contexts; some are held out."""
    rows, documents = map(torch.cat, zip(*paired.unseen(cache_of(folder), 0), strict=True))
    assert len(rows) == len(documents) == cache_of(folder).index.train_rows
    assert (documents.diff() >= 0).all()
    assert 30 <= len(documents.unique()) <= 40


@pytest.mark.parametrize("length", [7, 16])
def test_a_special_token_that_is_first_in_a_context_ends_a_document(length, tmp_path, monkeypatch):
    data = dataclasses.replace(cached.DATA, context_length=length)
    cached.make(monkeypatch, tmp_path / "cache", data=data)
    cache = CacheActivations(tmp_path / "cache", layer=2, batch_size=1)
    shards = list(cache.text_in_order())[len(cache.index.heldout) :]
    ids = torch.cat([ids.flatten() for ids, _, _ in shards])
    mask = torch.cat([mask.flatten() for _, mask, _ in shards])
    separators = (ids == 0).cumsum(0)  # <|endoftext|>
    documents = torch.cat([document for _, document in paired.unseen(cache, 0)])
    assert (ids.view(-1, length)[:, 0] == 0).any()
    assert documents.tolist() == separators[mask].tolist()


def test_what_begins_a_context_ends_no_document(tmp_path, monkeypatch):
    data = dataclasses.replace(cached.DATA, bos="import os\n")
    index = cached.make(monkeypatch, tmp_path / "cache", data=data)
    assert len(index.begin["context_begin"]) > 1
    parts = paired.unseen(CacheActivations(tmp_path / "cache", layer=2, batch_size=1), 0)
    documents = torch.cat([document for _, document in parts])
    assert 30 <= len(documents.unique()) <= 40 < sum(shard.contexts for shard in index.train)


@pytest.mark.parametrize(("setting", "value"), [("exclude_tokens", "="), ("join_documents", False)])
def test_a_cache_whose_masks_do_not_tell_documents_apart_is_refused(
    setting, value, folder, tmp_path, monkeypatch
):
    data = dataclasses.replace(cached.DATA, **{setting: value})
    cached.make(monkeypatch, tmp_path / "cache", data=data)
    saes = {"a": kronsae.load(folder / "a")}
    with pytest.raises(paired.InputError, match=f"harvested with {setting} {value!r}"):
        paired.opened(str(tmp_path / "cache"), saes)


def test_the_interval_of_equal_documents_has_no_width_and_of_others_has():
    ones = torch.ones(50, dtype=torch.float64)
    assert paired.interval(0.1 * ones, ones) == pytest.approx((0.1, 0.1))
    gains = torch.linspace(-1, 1, 50, dtype=torch.float64)
    low, high = paired.interval(gains, ones)
    # of a mean: 1.96 standard deviations, 0.589, by the root of 50
    assert -low == pytest.approx(0.163, abs=0.02) and high == pytest.approx(0.163, abs=0.02)


@pytest.mark.parametrize(
    ("ours", "beside", "said"),
    [
        ("a", "permuted", "with --activations-order stream"),
        ("a", "a b", "as many SAEs --beside, 1; got 2"),
        ("a", "other-layer", "expected SAEs of one hookpoint"),
        ("transcoder", "transcoder", "expected an autoencoder, got a transcoder"),
        ("a", "went-on", "it went on from another SAE"),
        ("of-second", "of-second", "was trained from another cache"),
        ("a", "long", "no whole shard is left: train on fewer --tokens"),
    ],
)
def test_what_cannot_be_compared_is_refused(ours, beside, said, folder, capsys):
    paths = [str(folder / name) for name in beside.split()]
    with pytest.raises(SystemExit) as ended:
        paired.main(["--cache", str(folder / "cache"), str(folder / ours), "--beside", *paths])
    assert ended.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())
