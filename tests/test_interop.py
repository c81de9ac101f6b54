"""SAEs in other libraries' folders, read and written without those libraries.

The fixtures were written by the libraries themselves, with what they make of a few activations.
"""

import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import kronsae
from kronsae import SAE, InputError, SAEConfig, TrainConfig
from kronsae.export.__main__ import main as export
from kronsae.interop.formats import recognise
from kronsae.interop.stock import encoder_proxy
from kronsae.model.origin import Origin
from kronsae.registry import FORMATS
from kronsae.system.tensors import dense
from kronsae.train import fit
from kronsae_kernels import SparseCodes

FIXTURES = Path(__file__).parent / "fixtures" / "interop"
FOLDERS = sorted(p.parent for p in FIXTURES.glob("*/*/expected.safetensors"))

DENSE = SAEConfig(encoder="dense", dict_size=64, k=8)
GRID = {
    "topk": DENSE,
    "multi_topk": dataclasses.replace(DENSE, objective="multi_topk"),
    "batchtopk": dataclasses.replace(DENSE, selection="batchtopk"),
    "matryoshka": dataclasses.replace(DENSE, selection="batchtopk", objective="matryoshka"),
    "jumprelu": dataclasses.replace(DENSE, selection="jumprelu"),
    "switch": dataclasses.replace(DENSE, experts=4),
    "kron": SAEConfig(heads=16, m=2, n=4, k=8),
    "kron jumprelu": SAEConfig(heads=16, m=2, n=4, k=8, selection="jumprelu", eps=1e-6),
    "kron batchtopk": SAEConfig(heads=8, m=2, n=4, k=8, selection="batchtopk", composition="mul"),
}
HOLDS = {
    "sae_lens": set(GRID),
    "sparsify": {"topk", "multi_topk"},
    "dictionary_learning": {"topk", "multi_topk", "batchtopk", "matryoshka", "jumprelu"},
}
"""What each library can hold; all else is refused with the reason."""
METADATA = {
    "data": {"name": "EleutherAI/pythia-70m", "hookpoint": "gpt_neox.layers.3", "d_model": 16},
    "config": {"data": {"dataset": "some/text"}, "train": {"tokens": 1000, "batch_size": 300}},
    "metrics": {"explained_variance": 0.5, "l0": 8.0},
}


@pytest.fixture(scope="module")
def activations():
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(16, 16, generator=generator)
    return torch.randn(3000, 16, generator=generator) @ mixed + mixed[0]


@pytest.fixture(scope="module")
def trained(activations):
    """SAEs of the grid, by name, each trained when it is first asked for."""
    saes = {}

    def get(name: str) -> SAE:
        if name not in saes:
            config = TrainConfig(tokens=3000, batch_size=300, lr=3e-3)
            saes[name] = fit(GRID[name], activations, config).sae
            saes[name].metadata = METADATA
        return saes[name]

    return get


def test_dense_adds_unused_slots_to_nothing():
    codes = SparseCodes(torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[3, 1, 3]]))
    assert dense(codes, 5).tolist() == [[0.0, 1.0, 0.0, 2.0, 0.0]]


def test_encoder_proxy_is_the_mean_of_a_latents_two_rows():
    sae = SAE(SAEConfig(d_model=5, heads=3, m=2, n=4, k=2))
    with torch.no_grad():
        sae.b_enc.copy_(torch.randn(3, 6))
    w_enc, b_enc = encoder_proxy(sae)
    head, i, j = 2, 1, 3
    latent = head * 8 + i * 4 + j
    torch.testing.assert_close(w_enc[latent], (sae.W_enc[head, i] + sae.W_enc[head, 2 + j]) / 2)
    torch.testing.assert_close(b_enc[latent], (sae.b_enc[head, i] + sae.b_enc[head, 2 + j]) / 2)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: f"{p.parent.name} {p.name}")
def test_what_other_libraries_wrote(folder, tmp_path):
    """Same latents and the same reconstruction as the library that wrote it."""
    expected = load_file(folder / "expected.safetensors")
    assert recognise(folder) == folder.parent.name
    sae = kronsae.load(folder, allow_pickle=folder.parent.name == "dictionary_learning")
    x_hat, codes, _ = sae(expected["x"])
    torch.testing.assert_close(dense(codes, sae.dict_size), expected["latents"])
    torch.testing.assert_close(x_hat, expected["x_hat"])
    assert expected["latents"].count_nonzero() > len(expected["x"])
    again = kronsae.load(sae.save(tmp_path / "ours"))
    assert again.config == sae.config and torch.equal(again(expected["x"]).x_hat, x_hat)
    origin = Origin.of(sae.metadata)
    assert "pythia-70m" in origin.model
    assert origin.layer == (None if folder.name == "layers.3.mlp" else 3)


def test_there_are_fixtures_of_each_library():
    written = {name for name, form in FORMATS.items() if form.written}
    assert {folder.parent.name for folder in FOLDERS} == written - {"kronsae"}
    assert len(FOLDERS) == 15


@pytest.mark.parametrize("library", HOLDS)
@pytest.mark.parametrize("name", GRID)
def test_there_and_back(library, name, trained, activations, tmp_path):
    """An SAE that went out comes back as it was: config, metadata, codes."""
    sae, folder = trained(name), tmp_path / "out"
    if name not in HOLDS[library]:
        reason = "products of two|thresholds|no router"
        with pytest.raises(InputError, match=reason):
            FORMATS[library].write(sae, folder)
        assert not folder.exists()
        return
    FORMATS[library].write(sae, folder)
    assert recognise(folder) == library
    back = kronsae.load(folder, allow_pickle=library == "dictionary_learning")
    assert back.config == sae.config
    assert back.metadata == METADATA
    x = activations[:200]
    (x_hat, codes, _), (again, codes_again, _) = sae(x), back(x)
    torch.testing.assert_close(
        dense(codes_again, sae.dict_size), dense(codes, sae.dict_size), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(again, x_hat, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("library, selection", [("sparsify", "topk"), ("sae_lens", "batchtopk")])
def test_transcoders_there_and_back(library, selection, skip, activations, tmp_path):
    config = dataclasses.replace(DENSE, selection=selection, skip=skip)
    pairs = (activations, activations.relu())
    sae = fit(config, pairs, TrainConfig(tokens=1500, batch_size=300, lr=3e-3)).sae
    back = kronsae.load(FORMATS[library].write(sae, tmp_path / "out"))
    assert back.config == sae.config
    x = activations[:50]
    torch.testing.assert_close(back(x).x_hat, sae(x).x_hat, rtol=1e-4, atol=1e-4)


def test_transcoders_that_have_no_place(activations, tmp_path):
    def transcoder(**settings):
        return SAE(SAEConfig(d_model=16, d_target=16, k=4, **settings)).eval()

    dense_topk = transcoder(encoder="dense", dict_size=32)
    with pytest.raises(InputError, match="no transcoder with TopK: use --to sparsify"):
        FORMATS["sae_lens"].write(dense_topk, tmp_path / "out")
    with pytest.raises(InputError, match="has no transcoders"):
        FORMATS["dictionary_learning"].write(dense_topk, tmp_path / "out")
    with pytest.raises(InputError, match="its transcoders are dense"):
        FORMATS["sae_lens"].write(transcoder(heads=4, m=2, n=2), tmp_path / "out")


def test_a_note_that_the_tensors_contradict_is_not_believed(trained, tmp_path):
    """Somebody changed the thresholds that BatchTopK had left: it is a JumpReLU SAE now."""
    from safetensors.torch import save_file

    folder = FORMATS["sae_lens"].write(trained("batchtopk"), tmp_path / "out")
    tensors = load_file(folder / "sae_weights.safetensors")
    tensors["threshold"][3] += 1
    save_file(tensors, folder / "sae_weights.safetensors")
    back = kronsae.load(folder)
    assert back.config.selection == "jumprelu"
    torch.testing.assert_close(back.selection.log_threshold.exp(), tensors["threshold"])


@pytest.mark.parametrize("setting, value", [("refine", 1), ("experts", 2), ("skip", True)])
def test_a_note_of_weights_that_are_not_there_is_not_believed(setting, value, trained, tmp_path):
    folder = FORMATS["sae_lens"].write(trained("topk"), tmp_path / "out")
    path = folder / "cfg.json"
    document = json.loads(path.read_text())
    document["metadata"]["kronsae"]["sae"][setting] = value
    path.write_text(json.dumps(document))
    assert not getattr(kronsae.load(folder).config, setting)


def test_the_smallest_active_value_of_batchtopk_stays_active(trained, activations, tmp_path):
    """Ours are active from the threshold on, theirs above it."""
    sae = kronsae.load(trained("batchtopk").save(tmp_path / "sae"))
    smallest = sae.encode(activations[:1]).values[0, 1]
    sae.selection.threshold.copy_(smallest)
    assert int(sae.fired(sae.encode(activations[:1])).sum()) == 2
    folder = FORMATS["sae_lens"].write(sae, tmp_path / "out")
    threshold = load_file(folder / "sae_weights.safetensors")["threshold"]
    assert (threshold < smallest).all()
    assert torch.equal(torch.nextafter(threshold[0], smallest), smallest.detach())
    assert kronsae.load(folder).selection.threshold == smallest


def test_untrained_batchtopk_has_no_threshold_to_export(tmp_path):
    sae = SAE(dataclasses.replace(GRID["batchtopk"], d_model=16))
    with pytest.raises(InputError, match="no threshold yet"):
        FORMATS["dictionary_learning"].write(sae, tmp_path / "out")


def test_a_pickle_is_read_on_request_alone(tmp_path, capsys):
    folder = FIXTURES / "dictionary_learning" / "AutoEncoderTopK"
    with pytest.raises(InputError, match="is a pickle, which is only read on request"):
        kronsae.load(folder)
    arguments = [str(folder), "--to", "kronsae", "--out", str(tmp_path / "ours")]
    assert export(arguments) == 2
    assert "--allow-pickle" in capsys.readouterr().err
    assert export([*arguments, "--allow-pickle"]) == 0
    assert kronsae.load(tmp_path / "ours").config.k == 3


def test_a_pickle_that_would_run_code_does_not(tmp_path):
    folder = tmp_path / "AutoEncoderTopK"
    shutil.copytree(FIXTURES / "dictionary_learning" / "AutoEncoderTopK", folder)
    mark = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return Path.touch, (mark,)

    for content in (pickle.dumps({"k": Evil()}, protocol=2), b"not a pickle"):
        (folder / "ae.pt").write_bytes(content)
        with pytest.raises(InputError, match="does not hold tensors alone"):
            kronsae.load(folder, allow_pickle=True)
    assert not mark.exists()


@pytest.mark.parametrize(
    "library, file, change, reason",
    [
        ("sae_lens/topk", "cfg.json", {"architecture": "temporal"}, "'temporal' has no counterp"),
        ("sae_lens/topk", "cfg.json", {"normalize_activations": "layer_norm"}, "'layer_norm'"),
        ("sae_lens/topk", "cfg.json", {"k": 17}, "k: expected 1 to 16"),
        ("sae_lens/topk", "cfg.json", {"k": "3"}, "k: expected 1 to 16.*got '3'"),
        ("sae_lens/topk", "cfg.json", {"architecture": "kronsae"}, "encoder 'kron' needs heads"),
        ("sae_lens/topk", "cfg.json", {"architecture": "jumprelu"}, r"tensors \['threshold'\]"),
        ("sparsify/layers.3", "cfg.json", {"activation": "groupmax"}, "got 'groupmax'"),
        ("sparsify/layers.3", "cfg.json", {"k": None}, "has no k"),
        ("dictionary_learning/BatchTopKSAE", "config.json", {"trainer": 3}, "None has no counter"),
    ],
)
def test_what_cannot_be_read_says_why(library, file, change, reason, tmp_path):
    folder = tmp_path / "sae"
    shutil.copytree(FIXTURES / library, folder)
    settings = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(settings | change))
    with pytest.raises(InputError, match=reason):
        kronsae.load(folder, allow_pickle=True)


def test_settings_of_saelens_before_version_6(tmp_path):
    folder = tmp_path / "sae"
    shutil.copytree(FIXTURES / "sae_lens" / "topk", folder)
    old = {
        "architecture": "standard",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 3},
        "apply_b_dec_to_input": False,
        "model_name": "gpt2-small",
        "hook_name": "blocks.7.hook_resid_post",
    }
    (folder / "cfg.json").write_text(json.dumps(old))
    expected = load_file(folder / "expected.safetensors")
    sae = kronsae.load(folder)
    torch.testing.assert_close(sae(expected["x"]).x_hat, expected["x_hat"])
    assert Origin.of(sae.metadata).layer == 7


def test_metadata_of_any_shape_is_no_reason_to_fail(tmp_path):
    folder = tmp_path / "sae"
    shutil.copytree(FIXTURES / "sae_lens" / "topk", folder)
    settings = json.loads((folder / "cfg.json").read_text())
    for metadata in (None, [], {"kronsae": {"metadata": {}, "sae": 3}}, {"hook_name": 7}):
        changed = {**settings, "metadata": metadata, "apply_b_dec_to_input": False}
        (folder / "cfg.json").write_text(json.dumps(changed))
        sae = kronsae.load(folder)
        assert sae.config.k == 3 and Origin.of(sae.metadata).layer is None
    sae.metadata = {"data": [1], "config": {"data": "text"}}
    assert Origin.of(sae.metadata) == Origin()


def test_tensors_of_the_wrong_rank(tmp_path):
    from safetensors.torch import save_file

    folder = tmp_path / "sae"
    shutil.copytree(FIXTURES / "sparsify" / "layers.3", folder)
    tensors = load_file(folder / "sae.safetensors")
    for name, reason in (("encoder.weight", "W_enc: expected a matrix"), ("b_dec", "b_dec: exp")):
        changed = {**tensors, name: torch.zeros(2, 2, 2)}
        save_file(changed, folder / "sae.safetensors")
        with pytest.raises(InputError, match=reason):
            kronsae.load(folder)


def test_a_damaged_file_is_an_input_error(tmp_path):
    folder = tmp_path / "sae"
    shutil.copytree(FIXTURES / "sparsify" / "layers.3", folder)
    (folder / "sae.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match="cannot be read"):
        kronsae.load(folder)


def test_a_folder_of_folders_needs_the_one_meant(tmp_path):
    with pytest.raises(InputError, match="holds SAEs in folders of it .layers.3, layers.3.mlp.: "):
        kronsae.load(FIXTURES / "sparsify")
    with pytest.raises(InputError, match="holds no SAE.*dictionary_learning .ae.pt, config.json."):
        kronsae.load(tmp_path)
    sae = kronsae.load(FIXTURES / "sparsify", subfolder="layers.3")
    assert sae.config.k == 3


def test_half_precision_files_are_read_exactly(tmp_path):
    from safetensors.torch import save_file

    folder = tmp_path / "layers.3"
    shutil.copytree(FIXTURES / "sparsify" / "layers.3", folder)
    tensors = {k: t.bfloat16() for k, t in load_file(folder / "sae.safetensors").items()}
    save_file(tensors, folder / "sae.safetensors")
    sae = kronsae.load(folder)
    assert sae.W_enc.dtype == torch.float32
    assert torch.equal(sae.W_enc, tensors["encoder.weight"].float())
    bias = tensors["encoder.bias"].double() - tensors["encoder.weight"].double() @ (
        tensors["b_dec"].double()
    )
    torch.testing.assert_close(sae.b_enc, bias.float(), rtol=1e-6, atol=1e-6)


def test_export_and_verify_its_own_format(trained, tmp_path, capsys):
    """On random vectors, as the SAE is of no run with a language model."""
    sae = trained("kron")
    sae.save(tmp_path / "run" / "sae", {"config": {"data": None}})
    command = [str(tmp_path / "run"), "--to", "kronsae", "--out", str(tmp_path / "out")]
    assert export([*command, "--verify", "--tokens", "500"]) == 0
    shown = capsys.readouterr().out
    assert "a KronSAE for kronsae" in shown and "On 500 random vectors" in shown
    lines = [line.split() for line in shown.splitlines() if line.startswith("kronsae")]
    assert lines[0][1:] == lines[1][2:] == [lines[0][1], "8.0000"]


def test_verify_says_what_is_missing_before_anything_is_written(
    trained, tmp_path, monkeypatch, capsys
):
    trained("topk").save(tmp_path / "sae")
    monkeypatch.setattr(FORMATS["sparsify"], "package", "eai-nowhere")
    command = [str(tmp_path / "sae"), "--to", "sparsify", "--out", str(tmp_path / "out")]
    assert export([*command, "--verify"]) == 2
    reason = (
        "--verify needs eai-nowhere (it is not installed): pip install eai-nowhere, or leave out"
    )
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_verify_notices_another_sae(trained, activations, tmp_path):
    from kronsae.export.verify import verify

    sae = trained("topk")
    other = kronsae.load(sae.save(tmp_path / "sae"))
    with torch.no_grad():
        other.b_dec += 0.5
    other.save(tmp_path / "sae")
    result = verify(sae, tmp_path / "sae", "kronsae", activations[:500])
    assert not result.agrees and result.largest_difference > 0.05
    assert verify(other, tmp_path / "sae", "kronsae", activations[:500]).agrees


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--to", "sparsify"], "needs --out DIR"),
        (["--to", "hub"], "needs --repo OWNER/NAME"),
        (["--to", "hub", "--repo", "a/b", "--verify"], "--verify has no effect with --to hub"),
        (["--to", "kronsae", "--out", "x", "--private"], "--private has no effect"),
        (["--to", "kronsae", "--out", "x", "--tokens", "9"], "--tokens has no effect without"),
        (["--to", "sparsify", "--outt", "x"], "did you mean --out"),
        (["--to", "pickle"], "invalid choice"),
        ([], "required: --to"),
    ],
)
def test_export_refuses(flags, reason, capsys):
    assert export(["nowhere", *flags]) == 2
    assert reason in capsys.readouterr().err


def test_export_says_why_a_kronsae_has_no_place(trained, tmp_path, capsys):
    trained("kron").save(tmp_path / "sae")
    assert export([str(tmp_path), "--to", "sparsify", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "products of two projections" in error and "--to sae_lens" in error
    assert not (tmp_path / "out").exists()
