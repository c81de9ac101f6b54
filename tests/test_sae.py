"""The SAE: initialisation, folding, saving and loading, and what is refused."""

import dataclasses

import pytest
import torch

import kronsae
from kronsae import SAE, InputError, SAEConfig
from kronsae.model.flops import flops_per_token
from kronsae.model.normalizer import Normalizer
from kronsae.system.files import read_checksummed, write_checksummed
from kronsae_kernels import fused_encode, sparse_decode

KRON = SAEConfig(d_model=12, heads=6, m=2, n=3, k=4)
CONFIGS = {
    "kron": KRON,
    "kron eps": dataclasses.replace(KRON, eps=1e-5),
    "relu_mul": dataclasses.replace(KRON, composition="relu_mul"),
    "mul": dataclasses.replace(KRON, composition="mul"),
    "dense": SAEConfig(d_model=12, encoder="dense", dict_size=36, k=4),
}


def make(config: SAEConfig, seed: int = 0) -> SAE:
    """An SAE with every parameter drawn, biases too."""
    generator = torch.Generator().manual_seed(seed)
    sae = SAE(config, generator=generator)
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(sae.W_enc.shape, generator=generator))
        sae.b_enc.copy_(torch.randn(sae.b_enc.shape, generator=generator))
        sae.b_dec.copy_(torch.randn(sae.b_dec.shape, generator=generator))
    return sae


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def config(request):
    return request.param


def test_paper_initialisation():
    config = SAEConfig(d_model=64, heads=128, m=2, n=4, k=4)
    sae = SAE(config, generator=torch.Generator().manual_seed(0))
    assert sae.W_enc.std().item() == pytest.approx((2 * 1024) ** -0.5, rel=0.02)
    assert not sae.b_enc.any() and not sae.b_dec.any()
    head, i, j = 77, 1, 2
    row = sae.W_enc[head, i] + sae.W_enc[head, 2 + j]
    torch.testing.assert_close(sae.W_dec[head * 8 + i * 4 + j], row / row.norm())
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(1024))


def test_init_scale_multiplies_the_encoder_alone():
    config = SAEConfig(d_model=8, heads=4, m=2, n=4, k=2)
    wide = dataclasses.replace(config, init_scale=4.0)
    one, other = (SAE(c, generator=torch.Generator().manual_seed(3)) for c in (config, wide))
    torch.testing.assert_close(other.W_enc, 4 * one.W_enc)
    torch.testing.assert_close(other.W_dec, one.W_dec)


def test_base_and_extension_change_places():
    """A gate is symmetric: with m and n swapped the same latents come, in another order."""
    h, m, n, d, k = 5, 2, 4, 12, 6
    sae = SAE(SAEConfig(d_model=d, heads=h, m=m, n=n, k=k))
    swapped = SAE(SAEConfig(d_model=d, heads=h, m=n, n=m, k=k))
    with torch.no_grad():
        swapped.W_enc.copy_(sae.W_enc.roll(n, dims=1))
        rows = sae.W_dec.view(h, m, n, d).transpose(1, 2)
        swapped.W_dec.copy_(rows.reshape(h * m * n, d))
    x = torch.randn(9, d)
    one, other = sae.encode(x), swapped.encode(x)
    torch.testing.assert_close(one.values, other.values)
    head, i, j = one.indices // (m * n), one.indices // n % m, one.indices % n
    assert torch.equal(other.indices, head * m * n + j * m + i)
    torch.testing.assert_close(sae(x).x_hat, swapped(x).x_hat)


def test_dense_decoder_starts_as_the_encoders_transpose():
    sae = SAE(CONFIGS["dense"], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sae.W_dec, sae.W_enc / sae.W_enc.norm(dim=1, keepdim=True))


def test_seed_decides_the_weights(config):
    first, again, other = (
        SAE(config, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first.W_enc, again.W_enc)
    assert not torch.equal(first.W_enc, other.W_enc)


def test_is_two_calls_of_the_kernels():
    sae, x = make(KRON), torch.randn(5, 12)
    codes = fused_encode(x, sae.W_enc, sae.b_enc, m=2, k=4)
    out = sae(x)
    assert torch.equal(out.codes.indices, codes.indices)
    x_hat = sparse_decode(codes, w_dec=sae.W_dec, b_dec=sae.b_dec)
    torch.testing.assert_close(out.x_hat, x_hat)
    torch.testing.assert_close(out.loss, ((x_hat - x) ** 2).mean())


def test_folded_takes_raw_activations(config):
    """Same latents, reconstruction undone to raw units, rows still of unit norm."""
    x = torch.randn(64, 12) * 3 + 5 * torch.randn(12)
    normalizer = Normalizer.of(x)
    sae = make(config)
    inside = sae(normalizer(x))
    outside = sae.folded(normalizer.mean, normalizer.scale)(x)
    assert (inside.codes.indices == outside.codes.indices).double().mean() > 0.99
    expected = inside.x_hat / normalizer.scale + normalizer.mean
    torch.testing.assert_close(outside.x_hat, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        outside.codes.values, inside.codes.values / normalizer.scale, rtol=1e-3, atol=1e-4
    )


def test_save_and_load(config, tmp_path):
    sae = make(config)
    sae.save(tmp_path / "sae", {"model": "tiny"})
    for source in (tmp_path / "sae", str(tmp_path)):  # the folder itself, and a run folder
        loaded = kronsae.load(source)
        assert loaded.config == config
        assert loaded.metadata == {"model": "tiny"}
        for name, parameter in sae.named_parameters():
            assert torch.equal(dict(loaded.named_parameters())[name], parameter)
        x = torch.randn(3, 12)
        assert torch.equal(loaded(x).x_hat, sae(x).x_hat)
    assert sorted(p.name for p in (tmp_path / "sae").iterdir()) == [
        "config.json",
        "sae.safetensors",
    ]


def test_saved_layout_is_the_documented_one(tmp_path):
    from safetensors.torch import load_file

    sae = make(KRON)
    tensors = load_file(sae.save(tmp_path / "sae") / "sae.safetensors")
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    assert shapes == {"W_enc": (6, 5, 12), "b_enc": (6, 5), "W_dec": (36, 12), "b_dec": (12,)}
    assert torch.equal(tensors["W_enc"], sae.W_enc)


def test_save_replaces_what_was_there(tmp_path):
    make(KRON, seed=1).save(tmp_path / "sae")
    second = make(KRON, seed=2)
    second.save(tmp_path / "sae")
    assert torch.equal(kronsae.load(tmp_path).W_dec, second.W_dec)
    assert [p.name for p in tmp_path.iterdir()] == ["sae"]


def test_save_never_removes_other_files(tmp_path):
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds .'thesis.txt'., which would be lost"):
        make(KRON).save(tmp_path / "sae")
    assert [p.name for p in (tmp_path / "sae").iterdir()] == ["thesis.txt"]
    assert [p.name for p in tmp_path.iterdir()] == ["sae"]


def test_metadata_stays_with_the_sae(tmp_path):
    assert make(KRON).metadata == {}
    make(KRON).save(tmp_path / "a", {"model": "tiny"})
    kronsae.load(tmp_path / "a").save(tmp_path / "b")
    assert kronsae.load(tmp_path / "b").metadata == {"model": "tiny"}


def test_takes_activations_of_any_floating_dtype():
    sae, x = make(KRON), torch.randn(5, 12)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(sae(x.to(dtype)).x_hat, sae(x.to(dtype).float()).x_hat)


def test_a_flipped_byte_is_noticed(tmp_path):
    file = make(KRON).save(tmp_path / "sae") / "sae.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        kronsae.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f / "sae.safetensors").unlink(), "holds no SAE"),
        (lambda f: (f / "config.json").write_text("{"), "is damaged"),
        (lambda f: _flip_digit(f / "config.json"), "take the 'checksum' out"),
        (lambda f: (f / "config.json").write_text("[]"), "was not written by SAE.save"),
        (lambda f: (f / "config.json").write_text('{"sae": {}}'), "was not written by SAE.save"),
        (lambda f: _edit(f, format_version=99), "version 99"),
        (lambda f: _edit(f, sae={**dataclasses.asdict(KRON), "wings": 2}), "wings"),
        (lambda f: _edit(f, sae={**dataclasses.asdict(KRON), "d_model": 13}), "expected tensors"),
    ],
)
def test_load_refuses(change, words, tmp_path):
    folder = make(KRON).save(tmp_path / "sae")
    change(folder)
    with pytest.raises(InputError, match=words):
        kronsae.load(tmp_path / "sae")


def test_load_of_nothing():
    with pytest.raises(InputError, match="no such folder"):
        kronsae.load("not/there/at/all")


def test_load_from_the_hub_says_what_was_tried():
    with pytest.raises(InputError, match="nobody/nothing.*hub"):
        kronsae.load("nobody/nothing")


def _edit(folder, **changes):
    path = folder / "config.json"
    write_checksummed(path, {**read_checksummed(path), **changes})


def _flip_digit(path):
    text = path.read_text()
    assert '"k": 4' in text
    path.write_text(text.replace('"k": 4', '"k": 5'))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"heads": 4, "m": 2, "n": 2, "dict_size": 20}, "heads \\* m \\* n = 4 \\* 2 \\* 2 = 16"),
        ({"dict_size": 30, "m": 4, "n": 4}, "no multiple"),
        ({"heads": 2, "m": 2, "n": 2, "k": 9}, "k: expected 1 <= k <= dict_size = 8, got 9"),
        ({"heads": 2, "k": 0}, "k: expected"),
        ({}, "needs heads or dict_size"),
        ({"encoder": "dense", "dict_size": 8, "heads": 2, "k": 2}, "heads has no effect"),
        ({"encoder": "dense", "k": 2}, "needs dict_size"),
        ({"encoder": "round", "dict_size": 8}, "encoder: one of"),
        ({"heads": 2, "k": 2, "composition": "max"}, "composition: one of"),
        ({"heads": 2, "k": 2, "eps": float("nan")}, "eps: expected"),
        ({"heads": -2}, "heads: expected >= 0"),
        ({"heads": 2, "k": 2, "composition": "mul", "eps": 1e-5}, "eps has no effect"),
    ],
)
def test_config_refuses(settings, words):
    with pytest.raises(InputError, match=words):
        SAEConfig(d_model=8, **settings)


def test_flops_are_eq_7():
    assert flops_per_token(SAEConfig(d_model=10, heads=3, m=2, n=4, k=5)) == 10 * 18 + 24 + 50
    dense = SAEConfig(d_model=10, encoder="dense", dict_size=24, k=5)
    assert flops_per_token(dense) == 240 + 50


def test_unit_rows_are_refused_before_anything_changes():
    sae = SAE(SAEConfig(d_model=4, heads=2, m=2, n=2, k=2))
    before = sae.W_dec.clone()
    with pytest.raises(InputError, match="'kron' has no encoder row"):
        sae.use_unit_rows_()
    assert torch.equal(sae.W_dec, before)


def test_another_k_shares_the_weights():
    sae, x = SAE(SAEConfig(d_model=6, heads=4, m=2, n=3, k=5)).eval(), torch.randn(7, 6)
    few = sae.with_k(2)
    assert few.config.k == 2 and sae.config.k == 5 and few.W_dec is sae.W_dec
    assert all(map(torch.equal, few.encode(x), sae.encode(x, k=2)))
    assert torch.equal(few(x).x_hat, sae.decode(sae.encode(x, k=2)))
    with pytest.raises(InputError, match="1 <= k <= dict_size = 24, got 25"):
        sae.with_k(25)
    batch = SAE(SAEConfig(d_model=6, heads=4, m=2, n=3, k=5, selection="batchtopk"))
    with pytest.raises(InputError, match="'batchtopk' does not give each token k latents"):
        batch.with_k(2)
