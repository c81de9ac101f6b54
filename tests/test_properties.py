"""Properties of latents, against loops over every token of small texts."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import CAUSAL, FAMILIES

from kronsae import SAE, SAEConfig
from kronsae.errors import InputError, Notice
from kronsae.properties import (
    MeasureConfig,
    Stored,
    gates,
    load_properties,
    logit_effects,
    measure,
    nearest_rows,
    save_properties,
    summarise,
)
from kronsae.properties import gather as gather_module
from kronsae.properties import store as store_module
from kronsae.properties import token_mass as token_mass_module
from kronsae.properties.examples import (
    INTERVALS,
    WINDOW,
    Examples,
    IndexedText,
    IntervalExamples,
    random_scores,
)
from kronsae.properties.gather import pre_latents
from kronsae.properties.geometry import kinship, mean_cosines
from kronsae.properties.histogram import BINS, Histograms
from kronsae.properties.token_mass import REGISTERS, TokenMass

KRON = SAEConfig(d_model=6, heads=4, m=2, n=3, k=4)
CONFIGS = {
    "kron": KRON,
    "product": SAEConfig(d_model=6, heads=4, m=2, n=3, k=4, composition="relu_mul"),
    "dense": SAEConfig(d_model=6, encoder="dense", dict_size=20, k=4),
    "experts": SAEConfig(d_model=6, heads=4, m=2, n=3, k=4, experts=2),
}
LENGTH, TOKENS = 40, 9


def an_sae(config: SAEConfig) -> SAE:
    return SAE(config, generator=torch.Generator().manual_seed(0)).eval()


def a_text(contexts: int = 10):
    """Token ids and masks [c, L], and activations of the tokens in the mask."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(TOKENS, (contexts, LENGTH), generator=generator)
    mask = torch.rand(contexts, LENGTH, generator=generator) > 0.2
    mask[0] = False
    mask[0, 7] = True
    mask[3:4] = False
    of_token = torch.randn(TOKENS, 6, generator=generator)
    x = of_token[ids] + 0.5 * torch.randn(contexts, LENGTH, 6, generator=generator)
    return ids, mask, x[mask]


def batches(text, size):
    ids, mask, x = text
    rows = x.split([int(part.sum()) for part in mask.split(size)])
    return list(zip(ids.split(size), mask.split(size), rows, strict=True))


def activations_of(sae, text):
    """Each latent's and each pre-latent's activation [c, L, N], 0 where it does not fire."""
    ids, mask, x = text
    out = []
    codes = sae.encode(x)
    post = torch.zeros(len(x), sae.dict_size)
    for row in range(len(x)):
        for value, latent in zip(codes.values[row], codes.indices[row], strict=True):
            post[row, latent] += value
    families = [post]
    if sae.config.encoder == "kron":
        families.append(pre_latents(sae, x))
    for family in families:
        full = torch.zeros(*ids.shape, family.shape[1])
        full[mask] = family
        out.append(full.detach().double().numpy())
    return out


SETTINGS = MeasureConfig(tokens=10**6, top=3, sample=5, intervals=2, correlation_tokens=10**6)


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_loops_over_every_token(name):
    sae, text = an_sae(CONFIGS[name]), a_text()
    found = measure(sae, batches(text, 3), TOKENS, SETTINGS)
    assert found.tokens == len(text[2]) and found.contexts == 10
    fired = 0
    for examined, values in zip((found.post, found.pre), activations_of(sae, text), strict=False):
        for latent in range(values.shape[2]):
            fired += check_latent(examined, latent, values[..., latent], text)
    assert fired > 10
    np.testing.assert_array_equal(found.text, text[0])
    assert (found.pre is None) == (name == "dense")


def check_latent(examined, latent, z, text):
    """Compare one latent's properties with those of its activations z [c, L]."""
    ids, mask = text[0].numpy(), text[1].numpy()
    active = z > 0
    assert examined.count[latent] == active.sum()
    if not active.any():
        assert examined.mean[latent] == 0 and math.isnan(examined.entropy[latent])
        assert (examined.top.places[latent] == -1).all()
        assert (examined.top_tokens[latent] == -1).all()
        return 0
    assert examined.mean[latent] == pytest.approx(z[active].mean(), rel=1e-5)
    mass = np.array([z[ids == token].sum() for token in range(TOKENS)])
    shares = mass[mass > 0] / mass.sum()
    assert examined.entropy[latent] == pytest.approx(-(shares * np.log(shares)).sum(), abs=1e-5)
    top = np.argsort(-mass, kind="stable")[:8]
    few = (mass > 0).sum()
    np.testing.assert_allclose(
        examined.top_shares[latent][:few], mass[top][:few] / mass.sum(), rtol=1e-5
    )
    ratios = [row.sum() / kept.sum() for row, kept in zip(active, mask, strict=True) if row.any()]
    assert examined.multitoken[latent] == pytest.approx(np.mean(ratios))
    edges = np.linspace(0, examined.histogram_top[latent], BINS + 1)
    assert examined.histogram_top[latent] / 2 <= z.max() < examined.histogram_top[latent]
    # float32 activations at an edge may fall on either side of it in float64
    expected = np.histogram(z[active].astype(np.float32), edges)[0]
    np.testing.assert_array_equal(examined.histogram[latent], expected)
    check_top(examined.top, latent, z, ids)
    check_sample(examined.sample, latent, z, ids)
    if examined.intervals is not None:
        check_intervals(examined, latent, z, ids)
    return 1


def check_top(examples, latent, z, ids):
    peaks = sorted((-z[c].max(), c, z[c].argmax()) for c in range(len(z)) if z[c].any())[:3]
    there = examples.places[latent] >= 0
    assert there.sum() == len(peaks)
    for slot, (value, context, position) in enumerate(peaks):
        assert examples.scores[latent, slot] == pytest.approx(-value, rel=1e-5)
        assert examples.places[latent, slot] == context * LENGTH + position
        check_window(examples, latent, slot, z, ids)


def check_sample(examples, latent, z, ids):
    """It is the events with the highest random numbers, all of them if they are few."""
    events = np.flatnonzero(z.ravel() > 0)
    there = examples.places[latent] >= 0
    assert there.sum() == min(5, len(events))
    assert set(examples.places[latent][there]) <= set(events.tolist())
    assert len(set(examples.places[latent][there])) == there.sum()
    for slot in np.flatnonzero(there):
        check_window(examples, latent, slot, z, ids)


def check_intervals(examined, latent, z, ids):
    """Every interval has its share of the histogram's activations, as many as fit."""
    examples, top = examined.intervals, examined.histogram_top[latent]
    counts = examined.histogram[latent].reshape(INTERVALS, -1).sum(1)
    for interval, count in enumerate(counts):
        row = latent * INTERVALS + interval
        places = examples.places[row][examples.places[row] >= 0]
        assert len(set(places)) == len(places) == min(2, count)
        inside = z.ravel()[places].astype(np.float32) / np.float32(top) * INTERVALS
        assert ((interval <= inside) & (inside < interval + 1)).all()
        for slot in range(len(places)):
            check_window(examples, row, slot, z, ids)


def check_window(examples, latent, slot, z, ids):
    context, position = divmod(int(examples.places[latent, slot]), LENGTH)
    for place in range(WINDOW):
        at = position + place - WINDOW // 2
        inside = 0 <= at < LENGTH
        assert examples.tokens[latent, slot, place] == (ids[context, at] if inside else -1)
        expected = z[context, at] if inside else 0
        assert examples.values[latent, slot, place] == pytest.approx(expected, rel=1e-5)


def test_does_not_depend_on_batches(monkeypatch):
    sae, text = an_sae(KRON), a_text()
    one = measure(sae, batches(text, 10), TOKENS, SETTINGS)
    monkeypatch.setattr(gather_module, "CHUNK_TOKENS", 1)
    other = measure(sae, batches(text, 4), TOKENS, SETTINGS)
    for first, second in ((one.post, other.post), (one.pre, other.pre)):
        np.testing.assert_array_equal(first.count, second.count)
        np.testing.assert_array_equal(first.histogram, second.histogram)
        np.testing.assert_allclose(first.entropy, second.entropy, atol=1e-6)
        for kind in ("top", "sample", "intervals"):
            if getattr(first, kind) is None:
                continue
            one_kind, other_kind = getattr(first, kind), getattr(second, kind)
            np.testing.assert_array_equal(one_kind.places, other_kind.places)
            np.testing.assert_array_equal(one_kind.tokens, other_kind.tokens)
            np.testing.assert_allclose(one_kind.values, other_kind.values, atol=1e-5)
    other_seed = MeasureConfig(**{**vars(SETTINGS), "seed": 1})
    third = measure(sae, batches(text, 10), TOKENS, other_seed)
    assert (third.post.sample.places != one.post.sample.places).any()
    np.testing.assert_array_equal(third.post.top.places, one.post.top.places)


def test_samples_of_intervals_are_uniform(monkeypatch):
    """Of each interval's events all are kept equally often, however often the range doubled."""
    count, size = 1000, 3
    values = np.concatenate([np.linspace(0.1, top, 8) for top in (0.9, 3.0, 12.0, 14.9)])
    gathered = IntervalExamples(count, size)
    text = IndexedText(np.zeros((1, len(values)), np.int32), np.ones((1, len(values)), bool))
    for place, value in enumerate(values):
        rows, latents = np.full(count, place), np.arange(count)
        scores = random_scores(0, latents, rows)
        gathered.add(
            *(text, latents, rows, np.full(count, value), scores),
            lambda latents, rows: np.zeros(rows.shape),
        )
    assert (gathered.top == 16).all()
    kept = np.bincount(gathered.examples.places.clip(0).ravel(), minlength=len(values))
    intervals = (values / 2).astype(int)
    for interval in set(intervals):
        places = np.flatnonzero(intervals == interval)
        places = places[places > 0]  # as 0 stands for no example above
        expected = count * min(1, size / (intervals == interval).sum())
        assert np.abs(kept[places] - expected).max() < 5 * math.sqrt(expected)
    monkeypatch.setattr(gather_module, "INTERVAL_BYTES", 264 * INTERVALS * 50)
    assert gather_module._interval_size(20) == 2 and gather_module._interval_size(10**6) == 1


def test_text_is_kept_while_it_is_short(monkeypatch):
    sae, text = an_sae(KRON), a_text()
    monkeypatch.setattr(gather_module, "TEXT_TOKENS", 10 * LENGTH - 1)
    assert measure(sae, batches(text, 3), TOKENS, SETTINGS).text is None


def test_stops_after_enough_tokens():
    sae, text = an_sae(KRON), a_text()
    few = measure(sae, batches(text, 1), TOKENS, MeasureConfig(tokens=40, sample=1))
    assert few.contexts == 3  # contexts of 1, 32 and about 32 tokens
    with pytest.raises(InputError, match="no text"):
        measure(sae, [], TOKENS, SETTINGS)
    with pytest.raises(InputError, match="tokens: expected >= 1, got 0"):
        MeasureConfig(tokens=0)


def test_sample_is_as_large_as_the_papers_where_it_fits(monkeypatch):
    sae, text = an_sae(KRON), a_text(2)
    found = measure(sae, batches(text, 2), TOKENS, MeasureConfig(tokens=100))
    assert found.post.sample.scores.shape == (24, 384)
    monkeypatch.setattr(gather_module, "SAMPLE_BYTES", 100_000)
    found = measure(sae, batches(text, 2), TOKENS, MeasureConfig(tokens=100))
    assert found.post.sample.scores.shape == (24, 100_000 // ((24 + 20) * 264))


def test_relations_equal_loops():
    sae, text = an_sae(KRON), a_text()
    found = measure(sae, batches(text, 4), TOKENS, SETTINGS)
    post, pre = activations_of(sae, text)
    each = gates(sae, found)
    for latent in range(24):
        head, i, j = latent // 6, latent // 3 % 2, latent % 3
        p, q = pre[..., head * 5 + i] > 0, pre[..., head * 5 + 2 + j] > 0
        tokens = len(text[2])
        assert each["both"][head, i, j] == pytest.approx((p & q).sum() / tokens)
        assert each["base_blocks"][head, i, j] == pytest.approx((~p & q).sum() / tokens)
        assert each["extension_blocks"][head, i, j] == pytest.approx((p & ~q).sum() / tokens)
        selected = (post[..., latent] > 0).sum() / max(1, (p & q).sum())
        assert each["selected"][head, i, j] == pytest.approx(selected)
    summary = summarise(sae, found)
    decides = [
        each["base_blocks"].ravel()[f] > each["extension_blocks"].ravel()[f]
        for f in range(24)
        if found.post.count[f]
    ]
    assert summary["gate"]["base_decides"] == pytest.approx(np.mean(decides))
    assert summary["groups"]["base"]["count"] == 8
    assert summary["groups"]["extension"]["count"] == 12
    # correlations, from the matrix
    rows = post[text[1].numpy()]
    alive = rows.std(0) > 0
    matrix = np.corrcoef(rows[:, alive].T)
    np.testing.assert_allclose(
        found.other_correlation[alive],
        (matrix.sum(1) - 1) / (alive.sum() - 1),
        atol=1e-5,
    )
    assert np.isnan(found.other_correlation[~alive]).all()
    of_head = np.arange(24)[alive] // 6
    for place, latent in enumerate(np.flatnonzero(alive)):
        same = of_head == latent // 6
        if same.sum() > 1:
            mean = (matrix[place, same].sum() - 1) / (same.sum() - 1)
            assert found.head_correlation[latent] == pytest.approx(mean, abs=1e-5)


def test_histograms_of_a_stream_equal_those_of_its_end():
    rng = np.random.default_rng(0)
    histograms, seen = Histograms(3), [[], [], []]
    for size in (1, 30, 4, 200):
        latents = rng.integers(0, 2, size)  # the third never fires
        values = rng.exponential(2.0, size) * 4.0 ** rng.integers(-2, 3, size)
        values[0] = 2.0 ** rng.integers(-3, 6)  # on an edge
        histograms.add(latents, values)
        for latent, value in zip(latents, values, strict=True):
            seen[latent].append(value)
    for latent in range(2):
        top = histograms.top[latent]
        assert top / 2 <= max(seen[latent]) < top
        expected = np.histogram(seen[latent], np.linspace(0, top, BINS + 1))[0]
        np.testing.assert_array_equal(histograms.counts[latent], expected)
    assert histograms.top[2] == 0 and not histograms.counts[2].any()


def mass_events(count=40, vocabulary=500):
    """Latents of different breadth: latent i fires on about 2^(i / 5) tokens."""
    rng = np.random.default_rng(0)
    latents = rng.integers(0, count - 1, 40_000)  # the last never fires
    tokens = rng.integers(0, 2 ** (latents / 5.0) + 1).astype(np.int64) % vocabulary
    return latents, tokens, rng.exponential(1.0, len(latents))


@pytest.mark.parametrize("pairs", [10**6, 500])
def test_token_mass_without_a_table(pairs, monkeypatch):
    """Pairs are exact; the sketch that follows them errs as little as it says."""
    latents, tokens, values = mass_events()
    table = TokenMass(40, 500)
    table.add(latents, tokens, values)
    monkeypatch.setattr(token_mass_module, "TABLE_ENTRIES", 0)
    monkeypatch.setattr(token_mass_module, "PAIRS", pairs)
    mass = TokenMass(40, 500)
    for start in range(0, len(latents), 1000):
        part = slice(start, start + 1000)
        mass.add(latents[part], tokens[part], values[part])
    assert table.exact and mass.exact == (pairs == 10**6)
    error = mass.entropy() - table.entropy()
    assert np.isnan(error[-1]) and np.isfinite(error[:-1]).all()
    if mass.exact:
        np.testing.assert_allclose(error[:-1], 0, atol=1e-9)
        for found, expected in zip(mass.top(5), table.top(5), strict=True):
            np.testing.assert_allclose(found, expected)
    else:
        said = math.sqrt(3 / REGISTERS)
        assert np.abs(error[:-1]).max() < 4 * said
        assert np.sqrt(np.square(error[:-1]).mean()) < 1.5 * said
        assert_estimated(mass.top(5), table)


def assert_estimated(found, exact):
    """Tokens with a clear share are found, and shares are about the true ones."""
    true_tokens, true_shares = exact.top(5)
    tokens, shares = found
    for latent, (first, second) in enumerate(true_shares[:, :2]):
        if first > second + 0.05:
            assert tokens[latent, 0] == true_tokens[latent, 0]
    of_all = exact.table / exact.table.sum(0).clip(min=1e-9)
    there = tokens >= 0
    true = of_all[tokens, np.arange(len(tokens))[:, None]][there]
    assert there.any() and np.abs(shares[there] - true).max() < 0.02 and (shares[~there] == 0).all()
    assert (np.diff(shares, axis=1) <= 0).all()


def test_token_mass_of_dense_activations(monkeypatch):
    rng = np.random.default_rng(0)
    tokens, values = rng.integers(0, 30, 200), rng.exponential(1.0, (200, 7)).astype(np.float32)
    exact = TokenMass(7, 30)
    exact.add_dense(tokens, values)
    rows, latents = values.nonzero()
    events = TokenMass(7, 30)
    events.add(latents, tokens[rows], values[rows, latents])
    np.testing.assert_allclose(exact.table, events.table, rtol=1e-6)
    monkeypatch.setattr(token_mass_module, "TABLE_ENTRIES", 0)
    sketch = TokenMass(7, 30)
    sketch.add_dense(tokens, values)
    assert not sketch.exact
    assert np.abs(sketch.entropy() - exact.entropy()).max() < 4 * math.sqrt(3 / REGISTERS)
    assert_estimated(sketch.top(5), exact)


def test_top_tokens_where_the_sums_are_a_sketch(monkeypatch):
    """They are those of all activations, and not of the strongest examples alone."""
    sae, text = an_sae(KRON), a_text()
    exact = measure(sae, batches(text, 3), TOKENS, SETTINGS)
    monkeypatch.setattr(token_mass_module, "TABLE_ENTRIES", 0)
    monkeypatch.setattr(token_mass_module, "PAIRS", 10)
    found = measure(sae, batches(text, 3), TOKENS, SETTINGS)
    assert found.exact_entropy == {"post": False, "pre": False}
    for estimated, true in ((found.post, exact.post), (found.pre, exact.pre)):
        clear = true.top_shares[:, 0] > true.top_shares[:, 1] + 0.05
        assert clear.any()
        assert (estimated.top_tokens[clear, 0] == true.top_tokens[clear, 0]).all()
        np.testing.assert_allclose(
            estimated.top_shares[clear, 0], true.top_shares[clear, 0], atol=0.03
        )


def test_sample_is_uniform():
    """Of 60 events of each of 2,000 latents, those of every place are kept equally often."""
    count, events, size = 2000, 60, 12
    examples = Examples(count, size)

    text = IndexedText(np.zeros((1, events), np.int32), np.ones((1, events), bool))

    def activations(latents, rows):
        return np.zeros(rows.shape)

    for start in range(0, events, 20):
        places = np.repeat(np.arange(start, start + 20), count)
        latents = np.tile(np.arange(count), 20)
        scores = random_scores(0, latents, places)
        examples.add(text, latents, places, scores, activations)
    assert (examples.places >= 0).all()
    kept = np.bincount(examples.places.ravel(), minlength=events)
    expected = count * size / events
    spread = math.sqrt(expected * (1 - size / events))
    assert np.abs(kept - expected).max() < 4.5 * spread


def test_sample_of_dense_activations_is_uniform():
    """Over 400 seeds, of 60 tokens where a latent fires, each is kept equally often."""
    ids, mask = torch.zeros(1, 64).long().numpy(), torch.ones(1, 64).bool().numpy()
    dense = np.ones((64, 2), np.float32)
    dense[:4, 0] = 0
    kept = np.zeros(64)
    for seed in range(400):
        gathered = gather_module._Sums(2, 1, 1, 12, seed)
        gathered.add_dense(gather_module.IndexedText(ids, mask, 0), dense)
        kept += np.bincount(gathered.sample.places[0], minlength=64)
    assert not kept[:4].any() and kept.sum() == 400 * 12
    expected = 400 * 12 / 60
    assert np.abs(kept[4:] - expected).max() < 4.5 * math.sqrt(expected * (1 - 12 / 60))


def test_mean_cosines_equal_loops():
    generator = torch.Generator().manual_seed(0)
    heads, m, n = 3, 2, 4
    rows = torch.randn(24, 5, generator=generator)
    found = mean_cosines(rows, heads, m, n)
    sums = {name: [] for name in found}
    cosines = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)
    for a in range(24):
        for b in range(24):
            if a == b:
                continue
            if a // 8 != b // 8:
                name = "other_head"
            elif a // n == b // n:
                name = "same_base"
            else:
                name = "same_extension" if a % n == b % n else "same_head"
            sums[name].append(cosines[a, b].item())
    for name, values in sums.items():
        assert found[name] == pytest.approx(np.mean(values), abs=1e-6)
    assert math.isnan(mean_cosines(rows, 24, 1, 1)["same_base"])


def test_nearest_rows(monkeypatch):
    rows = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("kronsae.properties.geometry.AT_ONCE", 24 * 7)  # several parts
    found = nearest_rows(rows, 4)
    cosines = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)
    cosines.fill_diagonal_(-2)
    np.testing.assert_allclose(found.cosines, cosines.topk(4).values, atol=1e-6)
    near = cosines.gather(1, torch.from_numpy(found.latents))
    np.testing.assert_allclose(near, found.cosines, atol=1e-6)
    kin = kinship(found, 2, 4)
    own, other = np.arange(24), found.latents[:, 0]
    assert kin["same_head"] == pytest.approx((own // 8 == other // 8).mean())
    assert kin["same_base"] + kin["same_extension"] <= kin["same_head"]
    monkeypatch.setattr("kronsae.properties.geometry.NEIGHBOURS_ON_CPU", 24 * 24 * 5 - 1)
    assert nearest_rows(rows, 4) is None


@pytest.mark.parametrize("family", CAUSAL)
def test_logit_effects_are_those_of_the_models_own_head(family):
    """A long residual stream in the direction of a row: what its logits are above their mean."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    sae = SAE(SAEConfig(d_model=32, heads=2, m=2, n=2, k=2))
    norm = dict(model.base_model.named_modules())[logit_effects(sae, model, 3).norm]
    with torch.no_grad():
        norm.weight.add_(torch.rand_like(norm.weight))
    found = logit_effects(sae, model, 3)
    with torch.no_grad():
        logits = model.get_output_embeddings()(norm(1e3 * sae.W_dec))
        zero = model.get_output_embeddings()(norm(torch.zeros_like(sae.W_dec)))
    effects = logits - zero  # a norm's bias adds the same to all
    effects = effects - effects.mean(1, keepdim=True)
    np.testing.assert_array_equal(found.raised, effects.topk(3).indices)
    np.testing.assert_array_equal(found.lowered, effects.topk(3, largest=False).indices)
    ratio = torch.from_numpy(found.raised_by) / effects.topk(3).values
    torch.testing.assert_close(ratio, ratio[:, :1].expand(-1, 3), rtol=1e-3, atol=1e-4)


def test_no_logit_effects_without_a_head_or_of_another_width():
    model = FAMILIES["llama"]().eval()
    narrow = SAE(SAEConfig(d_model=8, heads=2, m=2, n=2, k=2))
    assert logit_effects(narrow, model, 3) is None
    wide = SAE(SAEConfig(d_model=32, heads=2, m=2, n=2, k=2))
    assert logit_effects(wide, model.base_model, 3) is None


@pytest.mark.parametrize("name", ["kron", "dense"])
def test_kept_as_files(name, tmp_path, monkeypatch):
    sae, text = an_sae(CONFIGS[name]), a_text()
    found = measure(sae, batches(text, 3), TOKENS, SETTINGS)
    nearest = nearest_rows(sae.W_dec.detach(), 2)
    stored = Stored(found, nearest, None, {"summary": summarise(sae, found)})
    save_properties(stored, tmp_path / "properties")
    again = load_properties(tmp_path / "properties")
    [latent] = again.properties.post.count.argmax(keepdims=True)
    usual = again.usual([latent])[latent]
    assert usual.maximum >= usual.mean > 0
    assert usual.maximum == again.properties.post.top.scores[latent, 0]
    assert again.properties.tokens == found.tokens and again.logits is None
    np.testing.assert_array_equal(again.nearest.cosines, nearest.cosines)
    np.testing.assert_array_equal(again.properties.post.entropy, found.post.entropy)
    np.testing.assert_array_equal(again.properties.post.top.tokens, found.post.top.tokens)
    intervals = again.properties.post.intervals
    np.testing.assert_array_equal(intervals.places, found.post.intervals.places)
    np.testing.assert_array_equal(again.properties.text, found.text)
    assert (again.properties.pre is None) == (name == "dense")
    assert again.facts["summary"] == stored.facts["summary"]
    old = found._replace(text=None, post=replace(found.post, intervals=None))
    monkeypatch.setattr(store_module, "FORMAT_VERSION", 1)
    save_properties(stored._replace(properties=old), tmp_path / "properties")
    again = load_properties(tmp_path / "properties").properties
    assert again.text is None and again.post.intervals is None and again.tokens == found.tokens
    np.testing.assert_array_equal(again.post.top_tokens, found.post.top_tokens)
    monkeypatch.setattr(store_module, "FORMAT_VERSION", 2)
    estimated = found._replace(exact_entropy=dict.fromkeys(found.exact_entropy, False))
    save_properties(stored._replace(properties=estimated), tmp_path / "properties")
    with pytest.warns(Notice, match="left out until you measure again"):
        again = load_properties(tmp_path / "properties").properties
    assert (again.post.top_tokens == -1).all() and not again.post.top_shares.any()
    path = tmp_path / "properties" / "properties.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="damaged"):
        load_properties(tmp_path / "properties")
    with pytest.raises(InputError, match="cannot be read"):
        load_properties(tmp_path)
