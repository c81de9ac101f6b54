"""Exports loaded by the libraries they are for, and what these make of them.

Needs sae-lens, eai-sparsify or dictionary-learning (benchmarks/README.md says how to install
them): each test is skipped where its library is missing.
"""

import dataclasses
import importlib

import pytest
import torch
from test_hub import hub, run  # noqa: F401 - a fixture
from test_interop import DENSE, FIXTURES, GRID, HOLDS, activations, trained  # noqa: F401

import kronsae
from benchmarks import peers
from kronsae import SAE, InputError, TrainConfig
from kronsae.export.__main__ import main as export
from kronsae.export.verify import verify
from kronsae.registry import FORMATS
from kronsae.system.tensors import dense
from kronsae.train import fit

SHARDED = [(library, name) for library, names in HOLDS.items() for name in sorted(names)]


def need(library: str) -> None:
    """Skip the test if the library, which has the name of its format, is not there."""
    [name] = [name for name, peer in peers.PEERS.items() if peer.package == library]
    if why := peers.why_not(name):
        pytest.skip(why)


@pytest.mark.parametrize("library, name", SHARDED)
def test_the_library_makes_the_same_of_it(library, name, trained, activations, tmp_path):  # noqa: F811
    need(library)
    sae = trained(name)
    folder = FORMATS[library].write(sae, tmp_path / "out")
    result = verify(sae, folder, library, activations)
    assert result.agrees, result
    assert result.largest_difference < 1e-5
    assert 0.01 < result.after.explained_variance < 1


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("library, selection", [("sparsify", "topk"), ("sae_lens", "jumprelu")])
def test_transcoders(library, selection, skip, activations, tmp_path):  # noqa: F811
    need(library)
    config = dataclasses.replace(DENSE, selection=selection, skip=skip)
    target = activations.relu()
    train = TrainConfig(tokens=1500, batch_size=300, lr=3e-3)
    sae = fit(config, (activations, target), train).sae
    folder = FORMATS[library].write(sae, tmp_path / "out")
    result = verify(sae, folder, library, activations, target)
    assert result.agrees and result.largest_difference < 1e-5, result


@pytest.fixture
def plugin():
    need("sae_lens")
    return importlib.import_module("kronsae.interop.sae_lens")


def test_registering_twice_is_harmless(plugin):
    from sae_lens.registry import get_sae_class

    importlib.reload(plugin)
    plugin.register()
    assert get_sae_class("kronsae")[0] is plugin.KronSAE
    assert get_sae_class("kronsae")[1].architecture() == "kronsae"


@pytest.mark.parametrize("name", ["kron", "kron jumprelu", "kron batchtopk", "switch"])
def test_encode_in_saelens(name, plugin, trained, activations, tmp_path):  # noqa: F811
    """2-D and 3-D activations, to 1e-5; saved by SAELens and loaded here again."""
    import sae_lens

    sae = trained(name)
    folder = FORMATS["sae_lens"].write(sae, tmp_path / "out")
    theirs = sae_lens.SAE.load_from_disk(folder)
    for x in (activations[:64], activations[:64].view(4, 16, 16)):
        latents = dense(sae.encode(x), sae.dict_size)
        torch.testing.assert_close(theirs.encode(x), latents, rtol=0, atol=1e-5)
        torch.testing.assert_close(theirs(x), sae(x).x_hat, rtol=1e-5, atol=1e-5)
    theirs.save_model(tmp_path / "again")
    back = kronsae.load(tmp_path / "again")
    assert back.config == sae.config and back.metadata == sae.metadata
    assert torch.equal(back.W_enc, sae.W_enc) and torch.equal(back.b_dec, sae.b_dec)


def test_hooks_and_metadata_in_saelens(plugin, trained, activations):  # noqa: F811
    sae = plugin.KronSAE.wrap(trained("kron"))
    x = activations[:5]
    _, cache = sae.run_with_cache(x)
    assert {"hook_sae_input", "hook_sae_acts_post", "hook_sae_recons"} <= set(cache)
    torch.testing.assert_close(cache["hook_sae_acts_post"], sae.encode(x))
    ablated = sae.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_post", lambda z, hook: 0 * z)])
    torch.testing.assert_close(ablated, sae.b_dec.expand_as(x))
    assert sae.cfg.metadata.hook_name == "blocks.3.hook_resid_post"
    assert sae.cfg.metadata.model_name == "EleutherAI/pythia-70m"


def test_half_precision_in_saelens(plugin, trained, activations):  # noqa: F811
    sae = plugin.KronSAE.wrap(trained("kron")).to(dtype=torch.bfloat16)
    x = activations[:200]
    latents, x_hat = sae.encode(x), sae(x)
    assert latents.dtype == x_hat.dtype == torch.bfloat16
    assert (latents != 0).sum(-1).float().mean() > 7.5
    exact = trained("kron")(x).x_hat
    assert (x_hat - exact).square().mean() < 0.05 * (exact - exact.mean(0)).square().mean()


def test_weights_that_saelens_asks_for(plugin, trained):  # noqa: F811
    """The encoder's proxy has the place of W_enc; nothing is folded into it in silence."""
    sae = plugin.KronSAE.wrap(trained("kron"))
    assert sae.W_enc.shape == (16, 128) and sae.b_enc.shape == (128,)
    assert sae.W_dec.shape == (128, 16) and not sae.W_enc.requires_grad
    for fold in (
        lambda: sae.fold_W_dec_norm(),
        lambda: sae.fold_activation_norm_scaling_factor(2.0),
        lambda: sae.fold_activation_whitening(None, None, None),
    ):
        with pytest.raises(NotImplementedError):
            fold()


def test_training_mode_in_saelens_changes_nothing(plugin, trained, activations):  # noqa: F811
    sae = plugin.KronSAE.wrap(trained("kron batchtopk"))
    x = activations[:50]
    before = sae.encode(x)
    assert torch.equal(sae.train().encode(x), before)


def test_settings_that_contradict_the_weights(plugin):
    own = {"d_model": 4, "heads": 2, "m": 2, "n": 2, "k": 1}
    with pytest.raises(InputError, match="d_sae: 9 disagrees with 8"):
        plugin.KronSAEConfig(d_in=4, d_sae=9, kronsae=own)
    with pytest.raises(InputError, match="takes raw activations"):
        plugin.KronSAEConfig(
            d_in=4,
            d_sae=8,
            apply_b_dec_to_input=True,
            kronsae=own,
        )


def test_export_and_verify_in_saelens(plugin, trained, tmp_path, capsys):  # noqa: F811
    trained("kron").save(tmp_path / "sae", {})
    command = [str(tmp_path), "--to", "sae_lens", "--out", str(tmp_path / "out")]
    assert export([*command, "--verify", "--tokens", "400"]) == 0
    shown = capsys.readouterr().out
    before, after = (line.split()[-2:] for line in shown.splitlines() if "000" in line[-6:])
    assert before == after and "sae-lens 6" in shown


def test_saes_of_saelens_in_saelens_again(plugin, tmp_path):
    """What came from there, and was kept here, goes back as it was."""
    import sae_lens

    folder = FIXTURES / "sae_lens" / "topk_rescaled"
    x = torch.randn(20, 8)
    ours: SAE = kronsae.load(folder)
    again = sae_lens.SAE.load_from_disk(FORMATS["sae_lens"].write(ours, tmp_path / "out"))
    theirs = sae_lens.SAE.load_from_disk(folder)
    torch.testing.assert_close(again.encode(x), theirs.encode(x))
    torch.testing.assert_close(again(x), theirs(x))


def test_from_pretrained(trained, hub, tmp_path):  # noqa: F811
    """From a repository with a folder of ours, by SAELens' own download."""
    need("sae_lens")
    sae = trained("kron")
    folder = FORMATS["sae_lens"].write(sae, tmp_path / "out")
    hub.commits["me/saes"], hub.branches["me/saes"] = {}, {}
    hub.commit("me/saes", "main", {f"kron/{p.name}": p.read_bytes() for p in folder.iterdir()})
    script = """
import sae_lens, torch
import kronsae.interop.sae_lens
sae = sae_lens.SAE.from_pretrained("me/saes", "kron")
print(type(sae).__name__, sae.cfg.kronsae["k"], sae.encode(torch.ones(1, 16)).sum().item())
"""
    name, k, total = run(hub, tmp_path, script)[-1].split()
    expected = sae.encode(torch.ones(1, 16)).values.sum().item()
    assert (name, k) == ("KronSAE", "8") and float(total) == pytest.approx(expected, rel=1e-5)
