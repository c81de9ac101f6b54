"""Switch against a loop over tokens."""

import pytest
import torch

from kronsae import SAE, SAEConfig
from kronsae.model.flops import flops_per_token
from kronsae_kernels import dense_encode, fused_encode

D, F, E, K = 6, 48, 4, 3
KRON = SAEConfig(d_model=D, heads=8, m=2, n=3, k=K, experts=E)
DENSE = SAEConfig(d_model=D, encoder="dense", dict_size=F, k=K, experts=E)


@pytest.fixture(params=[KRON, DENSE], ids=["kron", "dense"])
def sae(request):
    made = SAE(request.param, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
        made.router.bias.zero_()
    return made


def of_token(sae: SAE, x, k, mask=None):
    """Values and indices of one token [d], from the weights of its expert alone."""
    p = (sae.router.weight @ x + sae.router.bias).softmax(0)
    expert = int(p.argmax())
    per_expert = F // E
    mask = None if mask is None else mask[expert * per_expert :][:per_expert]
    rows = len(sae.W_enc) // E
    w, b = (t[expert * rows : (expert + 1) * rows] for t in (sae.W_enc, sae.b_enc))
    k = k if mask is None else min(k, int(mask.sum()))
    if not k:
        return torch.zeros(0), torch.zeros(0, dtype=torch.int64), expert
    if sae.config.encoder == "kron":
        codes = fused_encode(x, w, b, m=2, k=k, mask=mask)
    else:
        codes = dense_encode(x, w, b, k=k, mask=mask)
    return codes.values * p[expert], codes.indices + expert * per_expert, expert


def test_equals_a_loop_over_tokens(sae):
    x = torch.randn(100, D)
    out = sae(x)
    codes = [of_token(sae, row, K) for row in x]
    assert len({expert for *_, expert in codes}) == E
    torch.testing.assert_close(out.codes.values, torch.stack([values for values, *_ in codes]))
    assert torch.equal(out.codes.indices, torch.stack([indices for _, indices, _ in codes]))
    x_hat = torch.stack([v @ sae.W_dec[i] + sae.b_dec for v, i, _ in codes])
    torch.testing.assert_close(out.x_hat, x_hat)
    got = torch.autograd.grad(out.loss, list(sae.parameters()))
    truth = torch.autograd.grad((x_hat - x).square().mean(), list(sae.parameters()))
    for (name, _), a, b in zip(sae.named_parameters(), got, truth, strict=True):
        torch.testing.assert_close(a, b, msg=name)
        assert b.any(), name


def test_mask_leaves_some_experts_less(sae):
    """Fewer latents than k, or none, in an expert: its tokens have unused slots."""
    x, mask = torch.randn(40, D), torch.ones(F, dtype=torch.bool)
    mask[:12], mask[13:23] = False, False  # none of expert 0, two of expert 1
    codes = sae.encode(x, k=K, mask=mask)
    assert codes.values.shape == (40, K)
    for row, values, indices in zip(x, *codes, strict=True):
        expected, latents, _ = of_token(sae, row, K, mask)
        torch.testing.assert_close(values[: len(expected)], expected)
        assert torch.equal(indices[: len(expected)], latents)
        assert not values[len(expected) :].any()


def test_leading_dimensions_and_experts_without_tokens(sae):
    x = torch.randn(4, D)
    flat, cube = sae(x), sae(x.view(2, 2, D))
    assert torch.equal(cube.x_hat.view(4, D), flat.x_hat)
    assert torch.equal(cube.codes.indices.view(4, K), flat.codes.indices)
    torch.testing.assert_close(sae(x[0]).x_hat, flat.x_hat[0])
    assert sae.encode(x[:0]).values.shape == (0, K)


def test_balance_loss_is_the_formula(sae):
    x = torch.randn(40, D)
    p = sae.router(x)
    torch.testing.assert_close(p.sum(1), torch.ones(40))
    share = torch.tensor([(p.argmax(1) == e).double().mean() for e in range(E)])
    expected = E * sum(share[e] * p[:, e].double().mean() for e in range(E))
    torch.testing.assert_close(sae.router.balance_loss(x).double(), expected)
    with torch.no_grad():
        sae.router.weight.zero_()
        sae.router.bias.copy_(torch.tensor([50.0, 0, 0, 0]))
    assert sae.router.balance_loss(x).item() == pytest.approx(E)


def test_starts_with_all_experts_used_about_evenly():
    config = SAEConfig(d_model=64, heads=64, m=2, n=2, k=4, experts=8)
    sae = SAE(config, generator=torch.Generator().manual_seed(0))
    shares = sae.router(torch.randn(4000, 64)).argmax(1).bincount(minlength=8) / 4000
    assert shares.min() > 0.03 and shares.max() < 0.4


def test_flops_are_of_one_expert_and_the_router():
    config = SAEConfig(d_model=10, heads=4, m=2, n=4, k=5, experts=2)
    assert flops_per_token(config) == (10 * 24 + 32) // 2 + 20 + 50
