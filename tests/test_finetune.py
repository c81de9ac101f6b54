"""Fine-tuning: training that starts from the weights of an SAE."""

import dataclasses
import json
import signal
import warnings

import pytest
import torch
from test_parallel import start as start_ranks

import kronsae
import kronsae.export.__main__ as export
from kronsae import SAE, DataConfig, InputError, SAEConfig, TrainConfig
from kronsae.errors import Notice
from kronsae.model.normalizer import Normalizer
from kronsae.system.files import sha256
from kronsae.train import fit, fit_many, main
from kronsae.training.options import parse
from kronsae.training.start import Starts, normalised, note_of

D, OUT = 12, 7
KINDS = {
    "kron": {"heads": 8, "m": 2, "n": 3},
    "kron, eps": {"heads": 8, "m": 2, "n": 3, "eps": 0.02},
    "kron, mul": {"heads": 8, "m": 2, "n": 3, "composition": "mul"},
    "kron, batchtopk": {"heads": 8, "m": 2, "n": 3, "selection": "batchtopk"},
    "kron, jumprelu": {"heads": 8, "m": 2, "n": 3, "selection": "jumprelu"},
    "dense": {"encoder": "dense", "dict_size": 48},
    "dense, jumprelu": {"encoder": "dense", "dict_size": 48, "selection": "jumprelu"},
    "dense, relu": {"encoder": "dense", "dict_size": 48, "selection": "relu", "k": 0},
    "gated": {"encoder": "gated", "dict_size": 48, "selection": "relu", "k": 0},
    "experts": {"encoder": "dense", "dict_size": 48, "experts": 4},
    "skip": {"encoder": "dense", "dict_size": 48, "d_target": OUT, "skip": True},
}
UNIT, FREE = TrainConfig(), TrainConfig(decoder_norm="free")
X = torch.randn(900, D, generator=torch.Generator().manual_seed(1)) * 3 + 2
Y = torch.randn(900, OUT, generator=torch.Generator().manual_seed(2)) * 0.2 - 1
TUNE = TrainConfig(tokens=400, batch_size=100, lr=1e-12, lr_final=1e-12, log_every=1, l0_rate=0.0)


def sae_of(name, unit=True):
    """An SAE of raw activations with no weight, bias or threshold at its usual start."""
    generator = torch.Generator().manual_seed(3)
    sae = SAE(SAEConfig(d_model=D, **{"k": 4, **KINDS[name]}), generator=generator)
    with torch.no_grad():
        for parameter in sae.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.add_(drawn * 0.2 if parameter.ndim < 2 else drawn * 0.1)
        sae.normalize_decoder()
        if not unit:
            sae.W_dec.mul_(torch.rand(len(sae.W_dec), 1, generator=generator) + 0.5)
        for buffer in sae.buffers():
            buffer.fill_(0.8)
    return sae.eval()


def data_of(sae):
    return (X, Y) if sae.config.d_target else X


def codes(sae, x):
    """Active latents as a matrix [B, F]."""
    values, indices = sae.encode(x)
    values = values.where(sae.fired(kronsae.model.sae.SparseCodes(values, indices)), 0)
    return torch.zeros(len(x), sae.dict_size).scatter_add_(1, indices, values)


@torch.no_grad()
def same(one, other):
    if one.config.selection == "batchtopk":  # a running mean, which moves with the batches
        one.selection.threshold.copy_(other.selection.threshold)
    torch.testing.assert_close(codes(one, X), codes(other, X), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(one(X).x_hat, other(X).x_hat, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_normalised_computes_the_same(name):
    sae = sae_of(name)
    of_input = Normalizer(X.mean(0), 0.3)
    of_target = Normalizer(Y.mean(0), 5.0) if sae.config.d_target else None
    with torch.no_grad():
        inner = normalised(sae, UNIT, of_input, of_target)
        x_hat = inner((X - of_input.mean) * of_input.scale).x_hat
        out = of_target or of_input
        torch.testing.assert_close(x_hat / out.scale + out.mean, sae(X).x_hat)
    target = of_target and (of_target.mean, of_target.scale)
    same(inner.folded(of_input.mean, of_input.scale, target), sae)


@pytest.mark.parametrize("name", KINDS)
def test_training_starts_from_what_the_sae_computes(name):
    """Whose thresholds the warm-up leaves alone, and whose eps follows the activations' scale."""
    sae = sae_of(name)
    result = fit(sae, data_of(sae), TUNE)
    same(result.sae, sae)
    first = result.history[0]["explained_variance"]
    if name != "kron, batchtopk":  # which has no threshold in training
        target = Y if sae.config.d_target else X
        with torch.no_grad():
            error = (sae(X).x_hat - target).square().mean()
        expected = 1 - error / target.var(0, correction=0).mean()
        assert first == pytest.approx(expected.item(), abs=0.15, rel=0.05)


@pytest.mark.parametrize("name", ["dense, jumprelu", "dense, relu", "gated"])
def test_rows_become_unit_rows_where_that_is_exact(name):
    sae = sae_of(name, unit=False)
    result = fit(sae, X, TUNE)
    torch.testing.assert_close(result.sae.decoder_norms(), torch.ones(sae.dict_size))
    latents = codes(sae, X) * sae.decoder_norms()
    with torch.no_grad():
        torch.testing.assert_close(codes(result.sae, X), latents, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(result.sae(X).x_hat, sae(X).x_hat, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["dense", "kron", "kron, jumprelu", "experts", "kron, batchtopk"])
def test_other_rows_are_refused_or_stay(name):
    sae = sae_of(name, unit=False)
    with pytest.raises(InputError, match="not of unit norm, .* decoder_norm 'free'"):
        fit(sae, X, TUNE)
    result = fit(sae, X, dataclasses.replace(TUNE, decoder_norm="free"))
    same(result.sae, sae)


def test_it_learns_and_leaves_the_given_one_alone(tmp_path):
    config = SAEConfig(heads=16, m=2, n=2, k=4)
    train = TrainConfig(tokens=9000, batch_size=100, lr=3e-3, eval_every=0)
    sae = fit(config, X, train, out=tmp_path / "run").sae
    before = note_of(sae)
    assert before["sha256"] == sha256(tmp_path / "run" / "sae" / "sae.safetensors")
    assert note_of(kronsae.load(tmp_path / "run")) == before
    tuned = fit(sae, X, train, heldout=X[:300], out=tmp_path / "tuned")
    assert note_of(sae) == before != note_of(tuned.sae)
    with torch.no_grad():
        assert tuned.sae(X).loss < sae(X).loss
    document = json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert document["finetune"] == before
    assert tuned.sae.metadata["finetune"] == before


@pytest.mark.parametrize("name", ["kron, eps", "dense, jumprelu"])
def test_resume_is_bit_for_bit_without_the_original(name, tmp_path):
    train = TrainConfig(tokens=3000, batch_size=100, lr=3e-3, log_every=1, checkpoint_every=10)
    sae = sae_of(name)
    whole = fit(sae, X, train, out=tmp_path / "whole")

    def stop(record):
        if record["step"] == 17:
            signal.raise_signal(signal.SIGTERM)

    part = fit(sae, X, train, out=tmp_path / "part", on_record=stop)
    assert part.stopped_by == signal.SIGTERM
    config = kronsae.training.start.config_of(sae)
    rest = fit(config, X, train, out=tmp_path / "part", resume=True)
    assert note_of(rest.sae) == note_of(whole.sae)
    assert rest.sae.metadata["finetune"] == note_of(sae)
    other = sae_of(name)
    other.b_dec.data += 1
    with pytest.raises(InputError, match="started from the weights of another SAE"):
        fit(other, X, train, out=tmp_path / "part", resume=True)


def test_many_start_from_one_each(tmp_path):
    saes = [sae_of("dense"), sae_of("kron"), SAEConfig(heads=8, m=2, n=2, k=4)]
    results = fit_many(saes, X, TUNE)
    for sae, result in zip(saes[:2], results, strict=False):
        same(result.sae, sae)


SMALL = ["--batch-size", "500", "--heldout-tokens", "500", "--buffer-tokens", "2000"]
SMALL += ["--context-length", "64", "--device", "cpu"]
STILL = [*SMALL, "--tokens", "2000", "--lr", "1e-9"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A suite of two layers, and its first member in SAELens' format."""
    folder = tmp_path_factory.mktemp("runs")
    shape = ["--encoder", "dense", "--dict-size", "128", "--k", "8", "--layer", "1", "2"]
    learning = ["--lr", "1e-2", "--tokens", "6000"]
    assert main([*SMALL, *shape, *learning, "--out", str(folder / "suite")]) == 0
    source, out = str(folder / "suite" / "layer1"), str(folder / "lens")
    assert export.main([source, "--to", "sae_lens", "--out", out]) == 0
    return folder


def explained(run):
    return json.loads((run / "sae" / "config.json").read_text())["metadata"]["metrics"][
        "explained_variance"
    ]


def test_command_line(runs, tmp_path):
    """Of the format of another library, and resumed when that is gone."""
    lens, out = runs / "lens", tmp_path / "tuned"
    arguments = [*STILL, "--layer", "1", "--finetune", str(lens)]
    assert main([*arguments, "--out", str(out)]) == 0
    was = explained(runs / "suite" / "layer1")
    assert explained(out) == pytest.approx(was, abs=2e-4)
    note = json.loads((out / "config.json").read_text())["finetune"]
    assert note == {"source": str(lens), **note_of(kronsae.load(lens))}
    lens.rename(runs / "away")
    try:
        assert main(["--resume", str(out)]) == 0
        for checkpoint in (out / "checkpoints").iterdir():
            checkpoint.rename(tmp_path / checkpoint.name)
        for how in (["--resume", str(out)], ["--config", str(out / "config.json")]):
            with pytest.raises(InputError, match="lens: no such folder"):
                parse(how)
    finally:
        (runs / "away").rename(lens)
    again = parse(["--config", str(out / "config.json")])
    for request in (again, parse(["--resume", str(out)])):
        [sae] = request.starts.values()
        assert note_of(sae) == note_of(kronsae.load(lens))
        assert request.notes["sae"]["finetune"] == note
    document = json.loads((out / "config.json").read_text())
    document["finetune"]["sha256"] = "0" * 64
    (tmp_path / "other.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match="its weights have changed"):
        parse(["--config", str(tmp_path / "other.json")])


def test_a_suite_starts_each_member_at_its_layer(runs, tmp_path):
    out = tmp_path / "tuned"
    suite = str(runs / "suite")
    arguments = [*STILL, "--layer", "1", "2", "--finetune", suite, "--out", str(out)]
    assert main(arguments) == 0
    for name in ("layer1", "layer2"):
        was = kronsae.load(runs / "suite" / name)
        assert explained(out / name) == pytest.approx(explained(runs / "suite" / name), abs=2e-4)
        assert (
            json.loads((out / name / "config.json").read_text())["finetune"]["sha256"]
            == note_of(was)["sha256"]
        )


def test_a_sweep_starts_all_members_from_one(runs):
    request = parse(["--finetune", f"{runs}/suite/layer2", "--lr", "1e-4", "1e-3"])
    assert len(request.members) == 2 == len(request.starts)
    assert {config.sae.dict_size for config in request.members.values()} == {128}


def test_it_goes_on_where_the_sae_was_trained(runs, capsys):
    second = str(runs / "suite" / "layer2")
    request = parse(["--finetune", second])
    assert (request.config.data.layer, request.config.data.model) == (2, "embedded")
    lens = str(runs / "lens")
    assert parse(["--finetune", lens]).config.data.layer == 1
    assert main([*STILL, "--finetune", second, "--plan"]) == 0
    printed = capsys.readouterr().out
    assert f"starts from      {second}\n" in printed
    assert "SAEs to start from" in " ".join(printed.split())
    with pytest.warns(Notice, match="was trained at layer2 of embedded, and goes on at layer1"):
        assert parse(["--finetune", second, "--layer", "1"]).config.data.layer == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parse(["--finetune", second, "--hookpoint", "2.resid_post"])
        for place in (["--layer", "9"], ["--hookpoint", "9.resid_post"]):
            with pytest.raises(InputError, match="layer 9: embedded has 4 blocks"):
                parse(["--finetune", second, *place])
    with pytest.raises(InputError, match=r"several SAEs \(layer1, layer2\): give --layer or"):
        parse(["--finetune", str(runs / "suite")])
    data = parse(["--finetune", str(runs / "suite"), "--hookpoint", "1.resid_post"]).config.data
    assert (data.context_length, data.heldout_tokens) == (64, 500)


def test_it_reads_the_text_of_its_run(tmp_path, monkeypatch):
    text = tmp_path / "text.jsonl"
    text.write_text(
        "\n".join(json.dumps({"body": f"text {n} of some words. " * 30}) for n in range(90))
    )
    out = tmp_path / "run"
    flags = ["--dataset", str(text), "--text-column", "body", "--layer", "1"]
    shape = ["--encoder", "dense", "--dict-size", "64", "--k", "4", "--tokens", "1000"]
    assert main([*SMALL, *flags, *shape, "--out", str(out)]) == 0
    data = parse(["--finetune", str(out), "--tokens", "500"]).config.data
    assert (data.dataset, data.text_column, data.context_length) == (str(text), "body", 64)
    data = parse(["--finetune", str(out), "--dataset", "stdlib"]).config.data
    assert (data.dataset, data.text_column, data.context_length) == ("stdlib", "text", 64)
    data = parse(["--finetune", str(out), "--layer", "2"]).config.data
    assert (data.dataset, data.layer) == (str(text), 2)
    monkeypatch.chdir(tmp_path)
    assert parse(["--finetune", "run"]).notes["sae"]["finetune"]["source"] == str(out)


def test_an_sae_of_unknown_origin_needs_a_hookpoint(tmp_path):
    sae_of("dense").save(tmp_path / "sae")
    with pytest.raises(InputError, match="does not say where it was trained: give --model, and"):
        parse(["--finetune", str(tmp_path / "sae")])
    assert parse(["--finetune", str(tmp_path / "sae"), "--layer", "1"]).config.data.layer == 1


def test_a_vision_model_goes_on_with_images_of_another_dataset(tmp_path):
    data = DataConfig(model="vit", layer=1, dataset="pics", image_column="image")
    sae = sae_of("dense")
    sae.metadata = {"config": {"data": dataclasses.asdict(data)}}
    place = Starts(str(sae.save(tmp_path / "sae"))).place({"dataset"})
    assert (place["model"], place["image_column"]) == ("vit", "image")
    assert "dataset" not in place
    data = dataclasses.replace(data, target_hookpoint="2.mlp_out")
    sae.metadata = {"config": {"data": dataclasses.asdict(data)}}
    starts = Starts(str(sae.save(tmp_path / "transcoder")))
    assert starts.place({})["target_hookpoint"] == "2.mlp_out"
    assert not {"layer", "target_hookpoint"} & starts.place({"layer"}).keys()


def test_a_k_that_the_format_does_not_give_is_named(tmp_path):
    sae = sae_of("dense, jumprelu")
    source = str(sae.save(tmp_path / "sae"))
    with pytest.warns(Notice, match="training aims at 4 active latents a token.*--k chooses"):
        parse(["--finetune", source, "--layer", "1"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parse(["--finetune", source, "--layer", "1", "--k", "9"])


def test_flags_choose_one_of_several_at_a_layer(tmp_path):
    out = tmp_path / "sweep"
    shape = ["--encoder", "dense", "kron", "--dict-size", "64", "--k", "4", "--layer", "1", "2"]
    assert main([*SMALL, *shape, "--tokens", "1000", "--out", str(out)]) == 0
    start = ["--finetune", str(out), "--layer", "1"]
    for encoder in ("dense", "kron"):
        request = parse([*start, "--encoder", encoder])
        assert request.starts["sae"].config.encoder == encoder
    with pytest.raises(InputError, match="has 2 SAEs there, and the other flags fit 2 of them"):
        parse(start)
    with pytest.raises(InputError, match="the other flags fit 0 of them"):
        parse([*start, "--dict-size", "128"])
    again = parse([*start, "--encoder", "dense", "kron"])
    assert {n: s.config.encoder for n, s in again.starts.items()} == {
        "dense": "dense",
        "kron": "kron",
    }


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--k", "9"], "--k 9: the SAE that --finetune starts from has 8: leave it out"),
        (["--dict-size", "256"], "--dict-size 256: .* has 128"),
        (["--encoder", "kron"], "--encoder kron: .* has dense"),
        (["--selection", "relu"], "--selection relu: .* has topk"),
        (["--jumprelu-bandwidth", "1"], "no effect with selection 'topk'"),
        (["--init-scale", "2"], "--init-scale 2.0: .* has 1.0"),
    ],
)
def test_flags_that_contradict_the_sae_are_refused(flags, words, runs):
    with pytest.raises(InputError, match=words):
        parse(["--finetune", str(runs / "lens"), *flags])


def test_flags_that_agree_or_matter_in_training_alone(runs):
    flags = ["--k", "8", "--dict-size", "128", "--objective", "matryoshka", "--lr", "1e-4"]
    config = parse(["--finetune", str(runs / "lens"), *flags]).config
    assert config.sae.objective == "matryoshka" and config.sae.k == 8
    assert config.train.lr == 1e-4


def test_what_cannot_be_started_from_is_refused(runs, tmp_path):
    with pytest.raises(InputError, match=f"--finetune {tmp_path}: .*holds no SAE"):
        parse(["--finetune", str(tmp_path)])
    with pytest.raises(InputError, match="has no SAE at layer 3"):
        parse(["--finetune", str(runs / "suite"), "--layer", "3"])
    with pytest.raises(InputError, match="--allow-pickle has no effect without --finetune"):
        parse(["--allow-pickle"])
    with pytest.raises(InputError, match="--resume takes all settings"):
        parse(["--resume", str(runs / "suite"), "--finetune", "x"])
    with pytest.raises(InputError, match="d_model: the SAE to start from has 12, the data has 5"):
        fit(sae_of("dense"), torch.randn(100, 5), TUNE)
    with pytest.raises(
        InputError, match="d_target: the SAE to start from has 7, the data has none"
    ):
        fit(sae_of("skip"), X, TUNE)


def test_an_sae_of_another_library_gets_the_defaults_of_training():
    """It does not know the penalty and the bandwidth that it was trained with."""
    sae = sae_of("dense, relu")
    sae.config = dataclasses.replace(sae.config, selection_settings={"l1_coefficient": 0.0})
    assert kronsae.training.start.config_of(sae).selection_settings.l1_coefficient == 3.0
    run = {"selection": "relu", "selection_settings": {"l1_coefficient": 0.5}}
    sae.metadata = {"config": {"sae": run}}
    assert kronsae.training.start.config_of(sae).selection_settings.l1_coefficient == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("share", [["--tensor-parallel", "2"], ["--share", "members"], []])
def test_several_processes_start_from_the_same(share, runs, tmp_path):
    """With its heads sharded, its members, or the tokens of its batches."""
    out = tmp_path / "tuned"
    arguments = [*STILL, "--layer", "1", "2", "--finetune", runs / "suite", "--out", out, *share]
    process = start_ranks(2, *arguments, log=tmp_path / "log")
    assert process.wait(300) == 0, (tmp_path / "log").read_text()
    for name in ("layer1", "layer2"):
        assert explained(out / name) == pytest.approx(explained(runs / "suite" / name), abs=2e-4)
