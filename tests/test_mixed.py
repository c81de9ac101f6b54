"""The mixed encoder: dense latents, and those of heads, against a matrix of all latents."""

import pytest
import torch

import kronsae
from kronsae import InputError, SAEConfig
from kronsae.model.flops import flops_per_token
from kronsae_kernels import reference


def mixed(dense=24, m=3, n=2, size=60, k=7, factor=0.5, **more):
    """A mixed SAE and activations, all small whole numbers, so that many latents are equal."""
    settings = {"dense_latents": dense, "head_m": m, "head_n": n, "dense_factor": factor}
    config = SAEConfig(
        d_model=16, dict_size=size, k=k, encoder="mixed", encoder_settings=settings, **more
    )
    sae = kronsae.SAE(config, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        sae.W_enc.copy_(torch.randint(-2, 3, sae.W_enc.shape, generator=generator))
        sae.b_enc.copy_(torch.randint(-1, 2, sae.b_enc.shape, generator=generator))
    return sae, torch.randint(-1, 2, (50, 16), generator=generator).float()


def test_mixed_latents_are_dense_ones_and_those_of_heads():
    """By hand, from the rows in the order that the docstring gives; largest first, then lowest."""
    sae, x = mixed()
    assert sae.W_enc.shape == (24 + 6 * 5, 16) and sae.config.encoder_rows == 54
    pre = (x @ sae.W_enc.T + sae.b_enc).relu()
    dense, heads = pre[:, :24], pre[:, 24:].view(50, 5, 6)
    products = heads[:, :3, None] * heads[:, None, 3:]  # [50, m, n, h]
    expected = torch.cat([dense / 2, products.sqrt().permute(0, 3, 1, 2).flatten(1)], 1)
    torch.testing.assert_close(sae.kind.every(x, sae.W_enc, sae.b_enc), expected)
    for k in (1, 7, 30, 60):
        codes, order = sae.encode(x, k=k), reference.largest(expected, k)
        torch.testing.assert_close(codes.values, expected.gather(1, order))
        assert codes.indices.equal(order)
    leading = sae.encode(x.view(5, 10, 16))
    assert leading.values.view(50, 7).equal(sae.encode(x).values)


@pytest.mark.parametrize("allowed", [range(60), range(24), range(24, 60), range(20, 28)])
def test_mixed_latents_among_a_mask(allowed):
    sae, x = mixed()
    mask = torch.zeros(60, dtype=torch.bool)
    mask[list(allowed)] = True
    codes = sae.encode(x, k=7, mask=mask)
    expected = sae.kind.every(x, sae.W_enc, sae.b_enc).where(mask, 0)
    torch.testing.assert_close(codes.values, expected.topk(7).values)
    assert mask[codes.indices[codes.values > 0]].all()


def test_gradients_of_mixed_latents():
    """Those of the same latents taken from the matrix of all."""
    sae, x = mixed()
    with torch.no_grad():
        sae.W_enc.add_(torch.randn(sae.W_enc.shape, generator=torch.Generator().manual_seed(2)))
    codes = sae.encode(x)
    weights = torch.randn(codes.values.shape, generator=torch.Generator().manual_seed(3))
    every = sae.kind.every(x, sae.W_enc, sae.b_enc).gather(1, codes.indices)
    found, expected = (
        torch.autograd.grad((values * weights)[values > 0].sum(), (sae.W_enc, sae.b_enc))
        for values in (codes.values, every)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dense": 25}, "dense_latents 25: the other 35 of dict_size = 60 .* works is 24"),
        ({"dense": 60}, "dense_latents 60: the other 0 of .* at least one: .* works is 54"),
        (
            {"dense": 0, "m": 8, "n": 8},
            "dict_size 60: .* head_n = 64 latents and at least 1 dense: ",
        ),
        ({"m": 0}, "head_m: expected >= 1, got 0"),
        ({"factor": 0}, "dense_factor: expected 0.01 to 100, got 0"),
        ({"experts": 2}, "encoder 'mixed' has no experts"),
        (
            {"size": 64, "dense": 22, "objective": "matryoshka", "matryoshka_first": 16},
            "dense_latents 22: the nested prefix of 32 latents would split a head .* works is 34",
        ),
        (
            {"size": 64, "m": 8, "n": 7, "dense": 0, "objective": "matryoshka"},
            "dict_size 64: .* head_n = 56 latents and at least 32 dense, as a nested prefix ends",
        ),
    ],
)
def test_mixed_saes_that_cannot_be(given, message):
    with pytest.raises(InputError, match=message):
        mixed(**given)


@pytest.mark.parametrize("size", [64, 96, 320, 512, 4096])
@pytest.mark.parametrize("shape", [(2, 3), (4, 4), (8, 8)])
@pytest.mark.parametrize("groups", [1, 3, 5])
def test_no_nested_prefix_splits_a_head_by_default(size, shape, groups):
    """The nearest number of dense latents to a third that splits none, of all that there are."""
    first, of_head = size >> groups, shape[0] * shape[1]
    ends = [first << i for i in range(groups + 1)]
    fits = [
        dense
        for dense in range(1, size)
        if all((end - dense) % of_head == 0 for end in ends if end > dense)
    ]
    settings = {"head_m": shape[0], "head_n": shape[1]}
    given = {"objective": "matryoshka", "matryoshka_first": first, "encoder_settings": settings}
    if not fits:
        with pytest.raises(InputError, match=f"dict_size {size}: .* needs a head of"):
            SAEConfig(dict_size=size, k=1, encoder="mixed", **given)
        return
    dense = SAEConfig(dict_size=size, k=1, encoder="mixed", **given).encoder_settings.dense_latents
    assert dense in fits
    assert abs(dense - size / 3) == min(abs(other - size / 3) for other in fits)


def test_a_mixed_encoder_costs_half_of_a_dense_one_unless_told():
    config = SAEConfig(d_model=64, dict_size=8192, k=32, encoder="mixed")
    own = config.encoder_settings
    assert (own.dense_latents, own.head_m, own.head_n) == (2752, 8, 8)
    rows, pairs = 2752 + 85 * 16, 85 * 64
    assert config.encoder_rows == rows == 4112
    assert flops_per_token(config) == 64 * rows + pairs + 32 * 64
