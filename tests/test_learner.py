"""One optimizer step: gradients, the decoder's norm, the schedule, dead latents."""

import copy

import pytest
import torch

from kronsae import InputError, SAEConfig, TrainConfig
from kronsae.config import MOMENTS
from kronsae.model.normalizer import Normalizer
from kronsae.model.objectives import auxk_loss
from kronsae.training.learner import SKIPS, Learner, learning_rate
from kronsae_kernels import sparse_decode

CPU = torch.device("cpu")
KRON = SAEConfig(d_model=16, heads=16, m=2, n=4, k=4)
DENSE = SAEConfig(d_model=16, encoder="dense", dict_size=128, k=4)


def learner(config=KRON, **settings) -> Learner:
    return Learner(config, TrainConfig(**{"tokens": 10_000, "batch_size": 100, **settings}), CPU)


def test_schedule_is_warmup_then_cosine():
    config = TrainConfig(tokens=100_000, batch_size=1000, lr=1e-3, lr_final=1e-6)
    rates = [learning_rate(1000 * step, config, 2**15, 1000) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == pytest.approx(1e-3) and rates[10] == pytest.approx(1e-3)
    middle = (10 + 99) / 2
    assert rates[int(middle)] == pytest.approx(5e-4, rel=0.03)
    assert rates[99] == pytest.approx(1e-6)
    assert all(a < b for a, b in zip(rates[:9], rates[1:10], strict=True))
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_rate_scales_with_dict_size_only_when_asked():
    plain = TrainConfig(warmup_fraction=0.0)
    scaled = TrainConfig(warmup_fraction=0.0, lr_scale_by_dict_size=True)
    assert learning_rate(0, plain, 2**17, 8192) == pytest.approx(8e-4)
    assert learning_rate(0, scaled, 2**17, 8192) == pytest.approx(4e-4)


@pytest.mark.parametrize("batch", [50, 100, 400])
def test_schedule_ends_with_the_budget_whatever_the_batches(batch):
    """Batches of another size than the configured one still run through the whole cosine."""
    subject = learner(tokens=4000, lr=1e-3, lr_final=1e-6)
    rates = [subject.step(torch.randn(batch, 16))["lr"] for _ in range(4000 // batch)]
    assert max(rates) == pytest.approx(1e-3, rel=0.01)
    assert rates[-1] == pytest.approx(1e-6, rel=0.01)
    assert all(rate > 1.2e-6 for rate in rates[:-1])  # and not before


@pytest.mark.parametrize(
    ("k_start", "expected"), [(12, [12, 10, 8, 6, 4, 4]), (2, [2, 2, 3, 4, 4, 4]), (0, [4] * 6)]
)
@pytest.mark.parametrize("selection", ["topk", "batchtopk"])
def test_k_goes_linearly_from_its_start(selection, k_start, expected):
    """In training: in use, and saved, the SAE has k."""
    config = SAEConfig(d_model=16, heads=16, m=2, n=4, k=4, selection=selection)
    subject = learner(config, tokens=1000, k_start=k_start, k_fraction=0.4 * bool(k_start))
    found = [subject.step(torch.randn(100, 16))["l0"] for _ in expected]
    assert found == expected
    assert subject.sae.config.k == 4 == subject.sae.folded(torch.zeros(16), 1.0).selection.k


def test_jumprelu_aims_at_the_k_of_the_step():
    config = SAEConfig(d_model=16, heads=16, m=2, n=4, k=4, selection="jumprelu")
    subject = learner(config, tokens=1000, k_start=12, k_fraction=0.4, warmup_fraction=1.0)
    x = torch.randn(100, 16)
    assert [round(subject.step(x)["l0"]) for _ in range(6)] == [12, 10, 8, 6, 4, 4]


@pytest.mark.parametrize(
    ("settings", "k_start", "words"),
    [
        ({}, 500, "k_start 500: k: expected 1 <= k <= dict_size = 128, got 500"),
        ({"experts": 4}, 40, "k_start 40: k: expected at most the 32 latents"),
        ({"objective": "multi_topk"}, 40, "k_start 40: .*selects 4 k = 160"),
    ],
)
def test_a_start_of_k_that_cannot_be_is_refused(settings, k_start, words):
    with pytest.raises(InputError, match=words):
        learner(SAEConfig(d_model=16, heads=16, m=2, n=4, k=4, **settings), k_start=k_start)


@pytest.mark.parametrize("decoder_norm", ["unit", "free"])
def test_decoder_norms(decoder_norm):
    subject = learner(decoder_norm=decoder_norm, lr=1e-2)
    for _ in range(3):
        subject.step(torch.randn(100, 16))
    norms = subject.sae.W_dec.norm(dim=1)
    assert torch.allclose(norms, torch.ones(128), atol=1e-5) == (decoder_norm == "unit")


@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
def test_tiny_batches_do_not_blow_up_the_auxiliary_loss(tokens):
    subject = learner(dead_after_tokens=1)
    subject.step(torch.randn(100, 16))
    metrics = subject.step(torch.randn(tokens, 16))
    assert metrics["auxk_loss"] < 100 and metrics["grad_norm"] < 100


def test_bfloat16_autocast_learns_like_float32():
    losses = {}
    for dtype in ("float32", "bfloat16"):
        subject = learner(dtype=dtype, lr=3e-3, warmup_fraction=0.0)
        torch.manual_seed(0)
        batches = torch.randn(40, 100, 4) @ torch.randn(4, 16)
        losses[dtype] = [subject.step(x)["loss"] for x in batches]
        assert all(p.dtype == torch.float32 for p in subject.sae.parameters())
    assert losses["bfloat16"] != losses["float32"]  # it does run in another precision
    assert losses["bfloat16"][-1] == pytest.approx(losses["float32"][-1], rel=0.05)
    assert losses["bfloat16"][-1] < 0.7 * losses["bfloat16"][0]


def test_normalizer_gives_zero_mean_and_squared_norm_d():
    x = torch.randn(4096, 16) * 7 + torch.arange(16.0)
    y = Normalizer.of(x)(x)
    torch.testing.assert_close(y.mean(0), torch.zeros(16), atol=1e-4, rtol=0)
    assert y.square().sum(1).mean().item() == pytest.approx(16, rel=1e-4)


@pytest.mark.parametrize("config", [KRON, DENSE], ids=["kron", "dense"])
def test_parallel_gradient_from_the_codes_is_the_rows_dot_product(config, monkeypatch):
    """What the codes say about the parallel component equals a pass over W_dec and its gradient."""
    import kronsae.training.learner as module

    subject, seen = learner(config, dead_after_tokens=150, auxk=16), []
    remove = module.remove_parallel_component

    def checked(w_dec, decoded):
        before = w_dec.grad.clone()
        remove(w_dec, decoded)
        expected = before - (before * w_dec).sum(1, keepdim=True) * w_dec
        torch.testing.assert_close(w_dec.grad, expected, rtol=1e-4, atol=1e-7)
        seen.append((len(decoded), (before - w_dec.grad).abs().max().item()))

    monkeypatch.setattr(module, "remove_parallel_component", checked)
    for _ in range(4):
        subject.step(torch.randn(100, 16))
    assert [count for count, _ in seen] == [1, 1, 2, 2]  # from step 2 on with the auxiliary loss
    assert all(removed > 0 for _, removed in seen)


def test_decoder_rows_have_unit_norm_after_every_step():
    subject = learner(lr=0.1)
    for _ in range(3):
        subject.step(torch.randn(100, 16))
        torch.testing.assert_close(subject.sae.W_dec.norm(dim=1), torch.ones(128))


def test_weights_move_as_with_plain_autograd():
    """One step equals autograd through the reference and torch's AdamW."""
    subject, x = learner(warmup_fraction=0.0, auxk_coefficient=0.0), torch.randn(100, 16)
    copies = {n: p.detach().clone().requires_grad_() for n, p in subject.sae.named_parameters()}
    from kronsae_kernels import reference

    codes = reference.fused_encode(x, copies["W_enc"], copies["b_enc"], m=2, k=4)
    x_hat = reference.sparse_decode(*codes, w_dec=copies["W_dec"], b_dec=copies["b_dec"])
    (x_hat - x).square().mean().backward()
    w_dec = copies["W_dec"]
    w_dec.grad -= (w_dec.grad * w_dec).sum(1, keepdim=True).detach() * w_dec.detach()
    torch.optim.AdamW(copies.values(), lr=8e-4, weight_decay=0.0).step()
    with torch.no_grad():
        w_dec /= w_dec.norm(dim=1, keepdim=True)
    subject.step(x)
    for name, parameter in subject.sae.named_parameters():
        # Adam's first step is lr * g / (|g| + 1e-8): where g is tiny, its rounding error shows.
        torch.testing.assert_close(parameter, copies[name], rtol=1e-4, atol=2e-5, msg=name)


def spoiled(size):
    x = torch.randn(100, 16)
    x[3, 3] = size
    return x


@pytest.mark.parametrize("size", [1e30, torch.inf, torch.nan])
def test_a_batch_whose_gradient_is_not_finite_changes_nothing(size):
    """But that it counts as seen: the next ones are learned from at the rate of their place."""
    subject = learner()
    subject.step(torch.randn(100, 16))
    before = copy.deepcopy(subject.state_dict())
    skipped = subject.step(spoiled(size))
    assert skipped.reason in ("gradient norm is nan", "gradient norm is inf")
    if size == 1e30:
        assert skipped.largest == pytest.approx(1e30)
    after = subject.state_dict()
    assert (before.pop("tokens"), after.pop("tokens")) == (100, 200)
    assert (before.pop("skipped"), after.pop("skipped")) == (0, 1)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert subject.step(torch.randn(100, 16))["loss"] < 2 and subject.skipped == 0


def test_what_is_never_finite_has_diverged():
    subject = learner()
    for _ in range(SKIPS - 1):
        subject.step(spoiled(1e30))
    with pytest.raises(FloatingPointError, match=f"{SKIPS} batches in a row: .* diverged"):
        subject.step(spoiled(1e30))


def test_one_enormous_token_does_not_set_the_scale():
    x = torch.randn(1000, 16) + 3
    usual, seen = Normalizer.of(x), Normalizer.of(torch.cat([x, torch.full((1, 16), 1e30)]))
    assert torch.equal(seen.mean, usual.mean) and seen.scale == usual.scale
    two = Normalizer.of(torch.cat([x, torch.full((1, 16), 1e30), torch.full((1, 16), -1e10)]))
    assert torch.equal(two.mean, usual.mean) and two.scale == usual.scale
    near = torch.cat([x, torch.full((1, 16), 12.0)])  # 9 times as far as half of the others
    assert Normalizer.of(near).scale < usual.scale
    assert Normalizer.of(near, 5.0).scale == usual.scale
    for multiple in (0.0, 1e9, 1e30):  # the scale is never that of massive activations
        far = torch.cat([x, torch.full((1, 16), 1e3)])
        assert Normalizer.of(far, multiple).scale == usual.scale
        radius = usual.radius * (multiple or 10) / 10
        assert Normalizer.of(far, multiple).radius == pytest.approx(radius)


def test_clipping_bounds_the_norm():
    subject, x = learner(max_grad_norm=1e-3), torch.randn(100, 16)
    norms = []
    step = subject.optimizer.step
    subject.optimizer.step = lambda: (
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in subject.sae.parameters()])),
        step(),
    )
    assert subject.step(x)["grad_norm"] > 1e-3
    assert norms[0].item() == pytest.approx(1e-3, rel=1e-3)


def test_tokens_since_fired():
    subject = learner(dead_after_tokens=150)
    for step in (1, 2):
        x = torch.randn(100, 16)
        with torch.no_grad():
            codes = subject.sae.encode(x)
        fired = torch.zeros(128, dtype=torch.bool)
        fired[codes.indices[codes.values > 0]] = True
        before = subject.tokens_since_fired.clone()
        subject.step(x)
        expected = torch.where(fired, 0, before + 100)
        assert torch.equal(subject.tokens_since_fired, expected)
        assert subject.tokens == 100 * step
    assert torch.equal(subject.dead, subject.tokens_since_fired >= 150)


def _silence(sae, latents: slice) -> None:
    """Make latents too weak to be selected, though their products stay positive."""
    with torch.no_grad():
        sae.W_enc[latents] *= 1e-3


@pytest.mark.parametrize("config", [KRON, DENSE], ids=["kron", "dense"])
def test_auxk_gradient_reaches_dead_rows_alone(config):
    """Base rows, extension rows and decoder rows of dead latents get a gradient; others none."""
    subject = learner(config)
    sae, x = subject.sae, torch.randn(64, 16)
    dead = torch.zeros(128, dtype=torch.bool)
    dead[64:] = True  # heads 8 to 15 of the Kron encoder
    x_hat = sae(x).x_hat
    loss, codes = auxk_loss(sae, x, x_hat, dead, k=8)
    assert dead[codes.indices].all()
    loss.backward()
    rows = sae.W_enc.grad.flatten(0, -2).norm(dim=1).view(2, -1)
    assert not rows[0].any() and rows[1].any()
    decoder = sae.W_dec.grad.norm(dim=1).view(2, 64)
    assert not decoder[0].any() and decoder[1].any()
    assert sae.b_dec.grad is None  # the bias takes no part
    if config is KRON:
        base, extension = sae.W_enc.grad[8:].split([2, 4], dim=1)
        assert (base.norm(dim=2) > 0).double().mean() > 0.9
        assert (extension.norm(dim=2) > 0).double().mean() > 0.9


def test_auxk_target_is_detached_and_normalised():
    sae, x = learner().sae, torch.randn(64, 16)
    dead = torch.ones(128, dtype=torch.bool)
    x_hat = torch.randn(64, 16, requires_grad=True)
    loss, codes = auxk_loss(sae, x, x_hat, dead, k=8)
    loss.backward()
    assert x_hat.grad is None
    target = (x - x_hat).detach()
    error = (sparse_decode(codes, w_dec=sae.W_dec) - target).square().mean()
    torch.testing.assert_close(loss, error / (target - target.mean(0)).square().mean())
    few = torch.zeros(128, dtype=torch.bool)
    few[:4] = True  # fewer dead latents than k: scaled down in proportion
    part, codes = auxk_loss(sae, x, x_hat, few, k=8)
    assert codes.values.shape == (64, 4) and part.item() < 0.6


@pytest.mark.parametrize(
    "config",
    [pytest.param(KRON, id="kron"), pytest.param(DENSE, id="dense", marks=pytest.mark.slow)],
)
def test_dead_latents_come_back_to_life(config):
    """48 features, 3/4 of 128 latents silenced: the auxiliary loss wakes those that are needed."""
    revived, explained = {}, {}
    for coefficient in (0.0, 1 / 32):
        torch.manual_seed(0)
        subject = learner(
            config,
            tokens=120_000,
            dead_after_tokens=300,
            auxk_coefficient=coefficient,
            auxk=2,
            lr=3e-3,
        )
        _silence(subject.sae, slice(4, 16) if config is KRON else slice(32, 128))
        directions = torch.randn(48, 16)
        for _ in range(600):
            features = torch.rand(200, 48) * (torch.rand(200, 48) < 0.05)
            metrics = subject.step(Normalizer(torch.zeros(16), 2.0)(features @ directions))
        revived[coefficient] = 1 - subject.dead[32:].double().mean().item()
        explained[coefficient] = metrics["explained_variance"]
    assert revived[1 / 32] > revived[0.0] + 0.15, revived
    assert explained[1 / 32] > explained[0.0] + 0.02, explained


@pytest.mark.parametrize("moments", MOMENTS)
def test_state_continues_bit_for_bit(moments):
    if moments == "8bit":
        pytest.importorskip("bitsandbytes")
    batches = torch.randn(8, 100, 16)
    whole, first, second = (learner(moments=moments, seed=seed) for seed in (0, 0, 5))
    for x in batches:
        whole.step(x)
    for x in batches[:5]:
        first.step(x)
    state = first.state_dict()
    dtype = torch.uint8 if moments == "8bit" else getattr(torch, moments)
    assert state["moments"]["W_dec"]["exp_avg_sq"].dtype == dtype
    second.load_state_dict(state)
    for x in batches[5:]:
        second.step(x)
    for name, parameter in whole.sae.named_parameters():
        assert torch.equal(parameter, dict(second.sae.named_parameters())[name]), name
    assert torch.equal(whole.tokens_since_fired, second.tokens_since_fired)
