"""Refined codes: `refine_codes` against float64 autograd, and SAEs that are trained with them."""

import dataclasses

import pytest
import torch
from implementations import ALL

from kronsae import SAE, SAEConfig, TrainConfig, load
from kronsae.errors import InputError
from kronsae.interop.stock import NoStockForm, stock_of
from kronsae.model.flops import flops_per_token
from kronsae.training.fit import fit
from kronsae.training.learner import Learner
from kronsae_kernels import SparseCodes, refine_codes

B, K, F, D = 9, 5, 24, 7


def inputs(dtype=torch.float64, steps=2):
    generator = torch.Generator().manual_seed(0)
    indices = torch.stack([torch.randperm(F, generator=generator)[:K] for _ in range(B)])
    values = torch.rand(B, K, generator=generator, dtype=torch.float64)
    values[0] = 0.0  # a token without an active latent
    values[1, 2:] = 0.0  # unused slots
    x, w_dec = (torch.randn(n, D, generator=generator, dtype=torch.float64) for n in (B, F))
    w_dec /= w_dec.norm(dim=1, keepdim=True)
    b_dec = torch.randn(D, generator=generator, dtype=torch.float64)
    rate = torch.tensor([0.5, 0.25], dtype=torch.float64)[:steps]
    leaves = [t.to(dtype).requires_grad_() for t in (values, x, w_dec, b_dec, rate)]
    return indices, leaves


def by_hand(indices, values, x, w_dec, b_dec, rate):
    """Token by token, as the formula is written."""
    rows = []
    for token in range(B):
        z, own = values[token], w_dec[indices[token]]
        active = z.detach() != 0
        for step in rate:
            refined = torch.relu(z + step * (own @ (x[token] - b_dec - z @ own)))
            z = torch.where(active, refined, z)
        rows.append(z)
    return torch.stack(rows)


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("steps", [1, 2])
def test_values_and_gradients_are_those_of_the_formula(impl, steps):
    dtype = torch.float32 if impl == "triton" else torch.float64
    indices, leaves = inputs(dtype, steps)
    values, *rest = leaves
    got = refine_codes(SparseCodes(values, indices), *rest[:3], rate=rest[3], impl=impl)
    _, exact = inputs(torch.float64, steps)
    expected = by_hand(indices, *exact)
    assert torch.equal(got.indices, indices)
    assert not got.values[0].any() and not got.values[1, 2:].any()
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {}
    torch.testing.assert_close(got.values, expected.to(dtype), **close)
    d_out = torch.randn(B, K, dtype=torch.float64)
    truth = torch.autograd.grad(expected, exact, d_out)
    ours = torch.autograd.grad(got.values, leaves, d_out.to(dtype))
    for name, a, b in zip("values x w_dec b_dec rate".split(), ours, truth, strict=True):
        torch.testing.assert_close(a, b.to(dtype), msg=lambda m, n=name: f"{n}: {m}", **close)


def test_a_step_makes_the_error_smaller():
    indices, (values, x, w_dec, b_dec, rate) = inputs()

    def errors(z):
        return (x - b_dec - (z[..., None] * w_dec[indices]).sum(1)).square().sum(1)

    got = refine_codes(SparseCodes(values, indices), x, w_dec, b_dec, rate=rate[1:])
    before, after = errors(values), errors(got.values)
    assert (after <= before + 1e-12).all() and after.sum() < 0.95 * before.sum()


def test_leading_dimensions_none_and_autocast():
    indices, (values, x, w_dec, b_dec, rate) = inputs(torch.float32)
    flat = refine_codes(SparseCodes(values, indices), x, w_dec, b_dec, rate=rate)
    cube = SparseCodes(values.view(3, 3, K), indices.view(3, 3, K))
    got = refine_codes(cube, x.view(3, 3, D), w_dec, b_dec, rate=rate)
    assert torch.equal(got.values, flat.values.view(3, 3, K))
    with torch.autocast("cpu", torch.bfloat16):
        inside = refine_codes(SparseCodes(values, indices), x, w_dec, b_dec, rate=rate)
    assert torch.equal(inside.values, flat.values)
    none = refine_codes(SparseCodes(values[:0], indices[:0]), x[:0], w_dec, b_dec, rate=rate)
    assert none.values.shape == (0, K)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(B, D + 1)}, "x: expected .* = .9, 7., got"),
        ({"x": torch.zeros(B, D, dtype=torch.int64)}, "x: .*float"),
        ({"rate": torch.zeros(())}, "rate: expected .N., got .."),
        ({"indices": torch.full((B, K), F)}, "indices: expected latents in .0, 24."),
        ({"indices": torch.zeros(B, K + 1, dtype=torch.int64)}, "indices"),
    ],
    ids=["width", "integers", "rate", "range", "shape"],
)
def test_arguments_are_checked(change, message):
    indices, (values, x, w_dec, b_dec, rate) = inputs(torch.float32)
    given = {"indices": indices, "x": x, "rate": rate} | change
    codes = SparseCodes(values, given["indices"])
    with pytest.raises(ValueError, match=message):
        refine_codes(codes, given["x"], w_dec, b_dec, rate=given["rate"])


# SAEs


KRON = {"heads": 8, "m": 2, "n": 2}
DENSE = {"encoder": "dense", "dict_size": 32}


def config(**given):
    kind = {} if "encoder" in given else KRON
    return SAEConfig(**{"d_model": 12, "k": 4, "refine": 1, **kind, **given})


def activations(count=2048, d=12):
    generator = torch.Generator().manual_seed(1)
    codes = torch.rand(count, 40, generator=generator)
    codes = codes * (codes > 0.9)
    return codes @ torch.randn(40, d, generator=generator)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "given",
    [
        KRON,
        DENSE,
        KRON | {"selection": "batchtopk"},
        DENSE | {"selection": "jumprelu"},
        KRON | {"objective": "matryoshka", "matryoshka_first": 16},
        KRON | {"objective": "multi_topk"},
        KRON | {"experts": 2},
        DENSE | {"selection": "relu", "k": 0},
        KRON | {"eps": 1e-5},
    ],
    ids=lambda given: "-".join(map(str, given.values())),
)
def test_training_refines(given, tmp_path):
    """It learns its rate, explains more than its unrefined form, and is the same after a load."""
    sae_config, x = config(**given), activations()
    train = TrainConfig(tokens=4096, batch_size=256, lr=1e-2, device="cpu")
    result = fit(sae_config, x, train, heldout=x[:512], out=tmp_path)
    sae = result.sae
    assert sae.refine_rate.shape == (1,) and sae.refine_rate.item() != 0.5
    again = load(tmp_path)
    assert again.config.refine == 1
    torch.testing.assert_close(again(x[:64]).x_hat, sae(x[:64]).x_hat)
    plain = again.unrefined()
    assert plain.W_dec is again.W_dec and not plain(x[:2]).x_hat.requires_grad
    assert again.refine_rate is not None and "refine_rate" not in plain.state_dict()
    assert plain.config == dataclasses.replace(sae.config, refine=0)
    errors = [(s(x).x_hat - x).square().mean().item() for s in (sae, plain)]
    assert errors[0] < errors[1]
    codes, selected = sae.encode(x[:64]), plain.encode(x[:64])
    assert (codes.values.diff(dim=-1) <= 0).all()
    fired = [set(s.indices[0][s.values[0] > 0].tolist()) for s in (codes, selected)]
    assert fired[0] <= fired[1]


def test_gradients_of_a_step_are_those_of_float64_autograd():
    """All parameters, through selection, refinement, decode and the parallel component."""
    train = TrainConfig(device="cpu", auxk_coefficient=0.0)
    learner = Learner(config(refine=2), train, torch.device("cpu"))
    sae, x = learner.sae, activations(64)
    with torch.no_grad():
        sae.b_enc.fill_(0.05)
    wide = SAE(sae.config).double()
    wide.load_state_dict(sae.state_dict())
    learner._adamw = lambda lr: None  # leave the gradients as they are
    learner.step(x)
    values, indices = wide.selection(wide, x.double(), 4)
    for rate in wide.refine_rate:
        own = wide.W_dec[indices]
        error = x.double() - wide.b_dec - (values[..., None] * own).sum(1)
        moved = torch.relu(values + rate * (own * error[:, None]).sum(-1))
        values = torch.where(values.detach() > 0, moved, values)
    x_hat = (values[..., None] * wide.W_dec[indices]).sum(1) + wide.b_dec
    (x_hat - x.double()).square().mean().backward()
    along = (wide.W_dec.grad * wide.W_dec).sum(1, keepdim=True)
    wide.W_dec.grad -= along * wide.W_dec.detach()
    for name, parameter in wide.named_parameters():
        got = dict(sae.named_parameters())[name].grad
        torch.testing.assert_close(
            got, parameter.grad.float(), rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_folding_keeps_the_rate_and_scales_the_reconstruction():
    x = activations(64)
    sae, mean = SAE(config()).eval(), torch.randn(12)
    with torch.no_grad():
        sae.b_enc.fill_(0.1)
    folded = sae.folded(mean, 0.5)
    expected = sae((x - mean) * 0.5).x_hat / 0.5 + mean
    torch.testing.assert_close(folded(x).x_hat, expected, rtol=1e-4, atol=1e-4)


def test_it_is_counted_named_and_refused_where_it_cannot_be():
    plain, refined = config(refine=0), config(refine=2)
    assert flops_per_token(refined) - flops_per_token(plain) == 2 * 2 * 4 * 12
    assert "Refined KronSAE" in repr(SAE(refined))
    with pytest.raises(InputError, match="refine: its steps need what is reconstructed"):
        config(d_target=5)
    with pytest.raises(InputError, match="composition 'mul' has negative"):
        config(composition="mul")
    with pytest.raises(InputError, match="'hierarchical' trains one set of values"):
        config(objective="hierarchical")
    with pytest.raises(NoStockForm, match="this SAE refines them: use --to kronsae, sae_lens or"):
        stock_of(SAE(config(**DENSE)), "sparsify")
