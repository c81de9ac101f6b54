"""Selections against brute force over all scores [B, F]."""

import pytest
import torch
from synthetic import SyntheticActivations
from torch import Tensor

import kronsae
from kronsae import SAE, InputError, SAEConfig, SparseCodes, TrainConfig
from kronsae.model import selection
from kronsae.model.normalizer import Normalizer
from kronsae.training.learner import Learner
from kronsae_kernels import jump, reference
from kronsae_kernels.batch_topk import CANDIDATES_PER_K

D, F, K = 6, 24, 3
POINTS = {
    "kron": {"heads": 4, "m": 2, "n": 3},
    "mul": {"heads": 4, "m": 2, "n": 3, "composition": "mul"},
    "kron eps": {"heads": 4, "m": 2, "n": 3, "eps": 1e-3},
    "dense": {"encoder": "dense", "dict_size": F},
}


@pytest.fixture(params=POINTS.values(), ids=POINTS)
def point(request):
    return request.param


def make(point: dict, **settings) -> SAE:
    sae = SAE(
        SAEConfig(d_model=D, **{"k": K, **point, **settings}),
        generator=torch.Generator().manual_seed(0),
    )
    with torch.no_grad():
        sae.W_enc.normal_()
        sae.b_enc.normal_()
    return sae


def all_latents(sae: SAE, x: Tensor) -> Tensor:
    """Every latent of every token, [B, F], differentiable, from the definition."""
    pre = x @ sae.W_enc.flatten(0, -2).t() + sae.b_enc.flatten()
    if sae.config.encoder == "dense":
        return pre.relu()
    pre = pre.view(len(x), sae.config.heads, -1)
    base, extension = pre.split([sae.config.m, sae.config.n], -1)
    product = reference.products(base, extension, sae.config.composition)
    return reference.compose(product, sae.config.composition, sae.config.eps).flatten(1)


def written_out(codes: SparseCodes) -> Tensor:
    """Codes [B, w] as [B, F]."""
    dense = torch.zeros(len(codes.values), F, dtype=codes.values.dtype)
    return dense.scatter_add(1, codes.indices, codes.values)


def batch_top(scores: Tensor, count: int, silent: float) -> Tensor:
    """The `count` largest of scores [B, F], the earlier first; only those above `silent`."""
    chosen = scores.detach().flatten().sort(descending=True, stable=True).indices[:count]
    keep = torch.zeros(scores.numel(), dtype=torch.bool)
    keep[chosen] = True
    return scores.where(keep.view_as(scores) & (scores > silent), 0)


def assert_well_formed(sae: SAE, codes: SparseCodes) -> None:
    """Largest first, then unused slots; no wider than needed; indices in range, none twice."""
    fired = sae.fired(codes)
    counts = fired.sum(1)
    assert codes.values.shape[1] == max(1, counts.max())
    assert (fired == (torch.arange(fired.shape[1]) < counts[:, None])).all()
    assert (codes.values[~fired] == 0).all()
    assert (codes.values[:, 1:] <= codes.values[:, :-1]).all()
    for row, of_row in zip(codes.indices, fired, strict=True):
        assert len(set(row[of_row].tolist())) == of_row.sum()
    assert codes.indices.min() >= 0 and codes.indices.max() < F


@pytest.mark.parametrize("spread", [1.0, 30.0], ids=["even", "uneven"])
def test_batchtopk_is_the_top_of_the_batch(point, spread):
    """Exactly the k B largest, though one token may hold far more than k of them."""
    sae = make(point, selection="batchtopk")
    x = torch.randn(16, D)
    x[::5] *= spread
    codes = sae.encode(x)
    expected = batch_top(all_latents(sae, x), 16 * K, sae.silent_value)
    torch.testing.assert_close(written_out(codes), expected, rtol=1e-5, atol=1e-5)
    assert_well_formed(sae, codes)
    if spread > 1:
        assert codes.values.shape[1] > CANDIDATES_PER_K * K  # it looked again


def test_batchtopk_gradients_are_those_of_brute_force(point):
    sae = make(point, selection="batchtopk")
    x = torch.randn(16, D)
    x[::5] *= 30
    target = torch.randn(16, F)
    parameters = sae.W_enc, sae.b_enc
    expected = batch_top(all_latents(sae, x), 16 * K, sae.silent_value)
    truth = torch.autograd.grad((expected * target).sum(), parameters)
    got = torch.autograd.grad((written_out(sae.encode(x)) * target).sum(), parameters)
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_batchtopk_ties_go_to_the_earlier_token(tokens):
    """Whole numbers from 0 to 3: almost everything ties."""
    sae = SAE(SAEConfig(d_model=F, encoder="dense", dict_size=F, k=K, selection="batchtopk"))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(F))
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randint(0, 4, (tokens, F), generator=generator).float()
        codes = sae.encode(x)
        assert torch.equal(written_out(codes), batch_top(x, K * tokens, 0.0))
    flat = torch.ones(tokens, F)
    expected = torch.zeros(tokens * F)
    expected[: K * tokens] = 1
    assert torch.equal(written_out(sae.encode(flat)), expected.view(tokens, F))
    nothing = sae.encode(torch.zeros(tokens, F))
    assert nothing.values.shape == (tokens, 1) and not sae.fired(nothing).any()


def test_batchtopk_threshold(point):
    """In inference every latent from the threshold on, whatever the batch."""
    sae = make(point, selection="batchtopk").eval()
    x = torch.randn(16, D)
    x[::5] *= 30
    with pytest.raises(ValueError, match="no threshold yet"):
        sae.encode(x)
    scores = all_latents(sae, x)
    for share in (0.02, 0.3, 0.9):
        threshold = scores.detach().flatten().quantile(1 - share).clamp(min=1e-6)
        sae.selection.threshold.copy_(threshold)
        expected = scores.where((scores >= threshold) & (scores > sae.silent_value), 0)
        codes = sae.encode(x)
        torch.testing.assert_close(written_out(codes), expected, rtol=1e-5, atol=1e-5)
        assert_well_formed(sae, codes)
        alone = sae.encode(x[5])
        torch.testing.assert_close(alone.values, written_out(codes)[5][alone.indices])
        cube = sae.encode(x.view(2, 8, D))
        assert torch.equal(cube.values.view(codes.values.shape), codes.values)


def test_batchtopk_threshold_follows_the_smallest_value():
    sae = make(POINTS["kron"], selection="batchtopk")
    values = torch.tensor([[5.0, 2.0], [4.0, 0.0]]), torch.tensor([[3.0, 1.0], [9.0, 8.0]])
    indices = torch.zeros(2, 2, dtype=torch.int64)
    sae.selection.update(sae, SparseCodes(values[0], indices))
    assert sae.selection.threshold == 2.0  # the unused slot does not count
    sae.selection.update(sae, SparseCodes(values[1], indices))
    assert sae.selection.threshold.item() == pytest.approx(2.0 - selection.THRESHOLD_RATE)
    before = sae.selection.threshold.clone()
    sae.selection.update(sae, SparseCodes(torch.zeros(2, 2), indices))
    assert torch.equal(sae.selection.threshold, before)


def test_batchtopk_keeps_nan_in_its_row(point):
    sae = make(point, selection="batchtopk").eval()
    sae.selection.threshold.fill_(0.5)
    x = torch.randn(4, D)
    clean = sae(x).x_hat
    x[2, 0] = torch.nan
    out = sae(x).x_hat
    assert out[2].isnan().all()
    others = torch.tensor([0, 1, 3])
    torch.testing.assert_close(out[others], clean[others])


def test_batchtopk_without_tokens():
    sae = make(POINTS["kron"], selection="batchtopk")
    assert sae.encode(torch.zeros(0, D)).values.shape == (0, 1)


def test_k_and_mask_ask_for_the_largest(point):
    """`encode(x, k=...)` is TopK, whatever the selection."""
    sae, plain = make(point, selection="batchtopk"), make(point)
    plain.load_state_dict({n: t for n, t in sae.state_dict().items() if "." not in n})
    x = torch.randn(5, D)
    for options in ({"k": 4}, {"mask": torch.arange(F) % 2 == 0}):
        for a, b in zip(sae.encode(x, **options), plain.encode(x, **options), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["batchtopk", "jumprelu"])
def test_thresholds_are_folded_and_saved(point, name, tmp_path):
    sae = make(point, selection=name)
    x = 3 * torch.randn(50, D) + 2
    mean, scale = x.mean(0), 0.3
    with torch.no_grad():
        if name == "batchtopk":
            sae.selection.threshold.fill_(0.9)
        else:
            sae.selection.log_threshold.normal_()
    inside = sae.eval()((x - mean) * scale)
    folded = sae.folded(mean, scale)
    outside = folded(x)
    assert torch.equal(sae.fired(inside.codes), folded.fired(outside.codes))
    torch.testing.assert_close(outside.x_hat, inside.x_hat / scale + mean, rtol=1e-3, atol=1e-3)
    folded.save(tmp_path / "sae")
    loaded = kronsae.load(tmp_path)
    assert not loaded.training
    assert torch.equal(loaded(x).x_hat, outside.x_hat)


# JumpReLU


def test_jump_and_its_derivatives_are_the_formulas():
    """z, H and their pseudo-derivatives, latent by latent. [Rajamanoharan et al. 2024]"""
    width = 0.5
    values = torch.tensor([0.1, 0.9, 1.1, 1.24, 1.26, 3.0, 0.0, 0.1])
    thresholds = torch.tensor([1.0] * 6 + [0.2, 0.2]).requires_grad_()
    values.requires_grad_()
    z, active = jump(values, thresholds, width, values.detach() > 0)
    assert z.tolist() == pytest.approx([0, 0, 1.1, 1.24, 1.26, 3.0, 0, 0])
    assert active.tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    d_z, d_active = torch.randn(8), torch.randn(8)
    d_values, d_thresholds = torch.autograd.grad([z, active], [values, thresholds], [d_z, d_active])
    for i in range(8):
        v, t = values[i].item(), thresholds[i].item()
        inside = abs(v - t) / width < 0.5 and v > 0
        by_z, by_active = (-t / width, -1 / width) if inside else (0.0, 0.0)
        expected = by_z * d_z[i].item() + by_active * d_active[i].item()
        assert d_thresholds[i].item() == pytest.approx(expected, abs=1e-6), i
        assert d_values[i].item() == pytest.approx(d_z[i].item() if v > t else 0.0), i
    assert (d_thresholds != 0).tolist() == [False, True, True, True, False, False, False, True]


def test_jumprelu_is_its_formula_over_all_latents(point):
    """Codes, L0 and gradients of encoder and thresholds, against all scores [B, F] written out."""
    sae, x = make(point, selection="jumprelu", jumprelu_bandwidth=0.8), torch.randn(16, D)
    with torch.no_grad():
        sae.selection.log_threshold.normal_()
    codes, l0 = sae.selection.codes_and_l0(sae, x)
    scores, thresholds = all_latents(sae, x), sae.selection.log_threshold.exp().expand(16, F)
    z, active = jump(scores, thresholds, 0.8, scores > sae.silent_value)
    torch.testing.assert_close(written_out(codes), z)
    torch.testing.assert_close(l0, active.sum(1).mean())
    weight, parameters = torch.randn(16, F), (sae.W_enc, sae.b_enc, sae.selection.log_threshold)
    got = torch.autograd.grad((written_out(codes) * weight).sum() + 3 * l0, parameters)
    truth = torch.autograd.grad((z * weight).sum() + 3 * active.sum(1).mean(), parameters)
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert truth[2].any()
    codes = sae.eval().encode(x)
    torch.testing.assert_close(written_out(codes), z)
    assert_well_formed(sae, codes)


def test_jumprelu_starts_with_k_latents_a_token(point):
    sae, x = make(point, selection="jumprelu"), torch.randn(64, D)
    sae.selection.prepare(sae, x)
    codes = sae.eval().encode(x)
    assert sae.fired(codes).sum().item() == 64 * K


def test_jumprelu_comes_to_its_l0():
    """From thresholds that are all too high to k, within 2 %."""
    config = SAEConfig(d_model=16, heads=16, m=2, n=4, k=6, selection="jumprelu")
    learner = Learner(
        config, TrainConfig(tokens=80_000, batch_size=200, lr=1e-2), torch.device("cpu")
    )
    learner.sae.selection.prepare = lambda sae, x: None
    with torch.no_grad():
        learner.sae.selection.log_threshold.fill_(-1.0)
    batches = iter(SyntheticActivations(16, group_density=0.1, batch_size=200))
    normalize = Normalizer.of(next(batches))
    found = [learner.step(normalize(next(batches)))["l0"] for _ in range(400)]
    assert found[0] < 5 and max(found) > 6.5
    assert sum(found[-50:]) / 50 == pytest.approx(6, rel=0.02)


def test_all_thresholds_of_a_jumprelu_move_together_towards_k(point):
    """Up if more latents are active, down if fewer; not at all if a step gave no codes.

    By no step if `l0_rate` is 0, as in runs of older versions.
    """
    sae, x = make(point, selection="jumprelu"), torch.randn(64, D)
    sae.selection.prepare(sae, x)
    log = sae.selection.log_threshold
    codes = sae.encode(x)
    fired = sae.fired(codes)
    few = SparseCodes(codes.values * (fired.cumsum(1) <= K // 2), codes.indices)
    none = SparseCodes(torch.zeros_like(codes.values), codes.indices)
    for given, direction in ((few, -1), (none, 0)):
        before = log.detach().clone()
        sae.selection.update(sae, given)
        assert ((log - before).sign() == direction).all() and len((log - before).unique()) <= 2
    before = log.detach().clone()
    sae.selection.k = 1
    sae.selection.update(sae, codes)
    assert ((log - before) > 0).all()
    still = Learner(sae.config, TrainConfig(l0_rate=0.0), torch.device("cpu")).sae
    still.selection.update(still, codes)
    assert not still.selection.log_threshold.any()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"selection": "best"}, "selection: one of"),
        ({"jumprelu_bandwidth": 0.1}, "jumprelu_bandwidth has no effect with selection 'topk'"),
        ({"objective": "multi_topk", "k": 7}, "selects 4 k = 28 latents, more than the 24"),
        ({"experts": 3}, "experts: 4 heads cannot be spread evenly over 3 experts"),
        ({"experts": 1}, "expected 0 .no Switch. or at least 2, got 1"),
        ({"experts": 4, "k": 7}, "at most the 6 latents of one of 4 experts, got 7"),
        ({"experts": 4, "eps": 1e-5}, "eps could not tell"),
        ({"experts": 4, "objective": "multi_topk"}, "selects 4 k = 8 latents, more than the 6"),
        ({"skip": True}, "skip needs a target"),
        ({"objective": "nested"}, "objective: one of"),
        ({"matryoshka_first": 6}, "matryoshka_first has no effect with objective 'plain'"),
        ({"objective": "matryoshka", "matryoshka_first": 7}, "7 times a power of two"),
        ({"objective": "matryoshka", "matryoshka_first": 48}, "48 times a power of two"),
        (
            {"objective": "matryoshka", "matryoshka_first": 3},
            "straddle the border of a group of 3. These would fit: m 1, n 3, heads 8; m 1, n 1",
        ),
    ],
)
def test_config_refuses(settings, words):
    with pytest.raises(InputError, match=words):
        SAEConfig(d_model=8, heads=4, m=2, n=3, **{"k": 2, **settings})


def test_matryoshka_groups_are_the_papers():
    config = SAEConfig(encoder="dense", dict_size=2**15, objective="matryoshka")
    assert config.prefixes == (2048, 4096, 8192, 16384, 32768)
    small = SAEConfig(dict_size=256, m=2, n=2, k=4, objective="matryoshka")
    assert small.matryoshka_first == 16
    assert small.prefixes == (16, 32, 64, 128, 256)
