"""`python -m kronsae.train --activations DIR`: runs and sweeps from a cache, also resumed."""

import dataclasses
import json
import shutil
import signal

import cached
import pytest
import torch

import kronsae.train
from kronsae import SAEConfig, TrainConfig
from kronsae.cache import CacheActivations, CacheIndex
from kronsae.data import LanguageModelActivations
from kronsae.errors import InputError, Notice
from kronsae.metrics.target_model import cache_of, load_sae, open_heldout
from kronsae.system.files import read_checksummed, write_checksummed
from kronsae.train import main
from kronsae.training.fit import fit

FLAGS = [
    *("--tokens", "3000", "--batch-size", "64", "--epochs", "2", "--buffer-tokens", "400"),
    *("--dict-size", "64", "--k", "4", "--log-every", "1", "--eval-every", "0"),
    *("--checkpoint-every", "10"),
]
WEIGHTS = "sae/sae.safetensors"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        cached.make(patch, folder)
    return folder


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory):
    """An uninterrupted run from the cache."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(["--activations", str(cache), "--layer", "2", *FLAGS, "--out", str(out)]) == 0
    return out


def records(folder):
    """What does not depend on the clock."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    clocks = ("seconds", "tokens_per_s", "crc32")
    return [{k: v for k, v in x.items() if k not in clocks and "wait" not in k} for x in lines]


def stop_at(monkeypatch, step):
    """SIGTERM comes while the (first) record of a step is shown."""
    show, came = kronsae.train.ProgressBar.__call__, []

    def stopping(self, name, record):
        show(self, name, record)
        if record["step"] == step and not came:
            came.append(step)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(kronsae.train.ProgressBar, "__call__", stopping)


def test_a_run_has_everything_that_a_live_one_has(whole, cache, capsys):
    settings = json.loads((whole / "config.json").read_text())
    data = settings["config"]["data"]
    assert (data["activations"], data["model"], data["layer"]) == (str(cache), "embedded", 2)
    assert data["context_length"] == cached.LENGTH
    assert settings["data"]["cache"] == CacheIndex.open(cache).fingerprint
    final = records(whole)[-1]
    assert final["kind"] == "final" and final["explained_variance"] > 0
    assert final["ce_clean"] < final["ce_zero"] and "ce_recovered" in final
    page = (whole / "report.html").read_text()
    assert "latent " in page and "class" in page  # contexts, in the words of the text


def test_evaluation_is_on_the_held_out_rows(whole, cache):
    sae = kronsae.load(whole)
    heldout = CacheActivations(cache, layer=2, batch_size=1).heldout_activations().double()
    error = (heldout - sae(heldout.float()).x_hat.double()).square().sum()
    expected = 1 - error / (heldout - heldout.mean(0)).square().sum()
    assert records(whole)[-1]["explained_variance"] == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("step", [1, 24, 25, 40])
def test_a_stopped_run_goes_on_bit_for_bit(step, whole, cache, monkeypatch, tmp_path):
    """Epochs end within a batch, after 24 of 47 steps."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        arguments = ["--activations", str(cache), "--layer", "2", *FLAGS, "--out", str(out)]
        assert main(arguments) == 128 + signal.SIGTERM
    assert main(["--resume", str(out)]) == 0
    assert (out / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert records(out) == records(whole)


def test_stream_order_goes_on_bit_for_bit_and_learns_what_live_training_does(
    cache, monkeypatch, tmp_path
):
    """With the text, batch size and seed of the harvest the weights are those of a live run."""
    train = TrainConfig(tokens=1000, batch_size=64, lr=1e-3, device="cpu", log_every=1)
    sae = SAEConfig(dict_size=64, k=4)
    model = kronsae.data.LanguageModel.load("embedded")
    data = dataclasses.replace(cached.DATA, buffer_tokens=400)
    live = fit(sae, LanguageModelActivations(model, cached.text(data, 0), data, 64, 0), train)

    def source():
        return CacheActivations(cache, layer=2, batch_size=64, buffer_tokens=400, order="stream")

    def stop(record):
        if record["step"] == 7:
            signal.raise_signal(signal.SIGTERM)

    assert fit(sae, source(), train, out=tmp_path / "run", on_record=stop).stopped_by
    again = fit(sae, source(), train, out=tmp_path / "run", resume=True)
    for name, weights in live.sae.state_dict().items():
        assert again.sae.state_dict()[name].equal(weights)


def test_later_looks_read_the_text_that_the_cache_was_made_from(whole, cache, monkeypatch):
    """A run is judged again on the same held-out tokens, without the cache."""
    loaded = load_sae(str(whole), {})
    assert loaded.data.activations is None and loaded.data.dataset == "given"
    monkeypatch.setattr(
        "kronsae.metrics.target_model.open_documents", lambda data, seed: cached.text(data, seed)
    )
    heldout = open_heldout(loaded._replace(cache=None), "cpu")
    expected = CacheActivations(cache, layer=2, batch_size=1).heldout_contexts()
    assert heldout.contexts.equal(expected)
    assert heldout.facts["which"] == "the run's own held-out text"
    more = dataclasses.replace(loaded.data, heldout_tokens=2 * loaded.data.heldout_tokens)
    with pytest.raises(InputError, match="was trained on all of 'given' except 80 held-out tokens"):
        open_heldout(loaded._replace(data=more, cache=None), "cpu")


def test_later_looks_take_activations_from_the_cache(whole, cache, monkeypatch, tmp_path):
    """Held-out ones, and for properties all; with other text, a model reads it."""
    loaded = load_sae(str(whole), {})
    heldout = open_heldout(loaded, "cpu")
    source = CacheActivations(cache, layer=2, batch_size=1)
    assert heldout.contexts.equal(source.heldout_contexts())
    assert heldout.facts["which"] == "the run's own held-out text, from its cache"
    rows = source.heldout_activations()
    every = dataclasses.replace(heldout, massive=None)
    assert torch.cat([x for _, _, x in every.read()]).equal(rows)
    contexts, ends = len(heldout.contexts), heldout.mask.sum(1).cumsum(0).tolist()
    for first, last in ((0, contexts), (1, 2), (1, contexts), (0, 1), (contexts - 1, contexts)):
        part = rows[ends[first - 1] if first else 0 : ends[last - 1]]
        assert source.heldout_rows(first, last).equal(part)
    texts = list(source.text_in_order())
    assert sum(len(ids) for ids, *_ in texts) == sum(
        shard.contexts for shard in (*source.index.heldout, *source.index.train)
    )
    assert all(int(mask.sum()) == len(rows) for _, mask, rows in texts)
    other = {"dataset": "stdlib", "model": "embedded", "layer": 2}
    assert load_sae(str(whole), other).cache is None
    with pytest.warns(Notice, match="the language model will .* holds out only 80 tokens"):
        assert load_sae(str(whole), {"heldout_tokens": 10**6}).cache is None
    sae = kronsae.load(whole)
    sae.metadata["config"]["data"]["activations"] = str(tmp_path)
    with pytest.warns(Notice, match=f"not the run's cache {tmp_path}: .* is not a cache"):
        assert cache_of(sae, {}, "cpu") is None
    sae.metadata["config"]["data"]["activations"] = str(cache)
    sae.metadata["data"]["text"] = "another"
    with pytest.warns(Notice, match="it has another text by now"):
        assert cache_of(sae, {}, "cpu") is None


def test_nothing_is_fetched_from_where_an_sae_says(whole, monkeypatch):
    sae = kronsae.load(whole)
    sae.metadata["config"]["data"]["activations"] = "memory://elsewhere/cache"
    monkeypatch.setattr("kronsae.metrics.target_model.CacheActivations", None)
    with pytest.warns(Notice, match="elsewhere/cache: there is no such folder here"):
        assert cache_of(sae, {}, "cpu") is None


def test_config_file_repeats_the_run(whole, tmp_path):
    out = tmp_path / "run"
    assert main(["--config", str(whole / "config.json"), "--out", str(out)]) == 0
    assert (out / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


def test_a_run_goes_on_from_a_cache_that_was_moved(whole, cache, monkeypatch, tmp_path, capsys):
    run, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(cache, moved)
    stop_at(monkeypatch, 20)
    main(["--activations", str(moved), "--layer", "2", *FLAGS, "--out", str(run)])
    monkeypatch.undo()
    shutil.rmtree(moved)
    assert main(["--resume", str(run)]) == 2
    assert "is not a cache of activations" in capsys.readouterr().err
    assert main(["--resume", str(run), "--activations", str(cache)]) == 0
    assert (run / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        cached.make(patch, tmp_path / "other", seed=5)
    assert main(["--resume", str(run), "--activations", str(tmp_path / "other")]) == 2
    assert "data.cache: was" in capsys.readouterr().err


def test_members_of_a_sweep_learn_what_they_learn_alone(whole, cache, monkeypatch, tmp_path):
    """Also when the sweep was stopped and resumed."""
    out = tmp_path / "sweep"
    with monkeypatch.context() as patch:
        stop_at(patch, 30)
        arguments = ["--activations", str(cache), "--layer", "2", *FLAGS, "--k", "2"]
        assert main([*arguments, "--out", str(out)]) == 128 + signal.SIGTERM
    assert main(["--resume", str(out)]) == 0
    assert (out / "k4" / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert records(out / "k4") == records(whole)


def test_a_transcoder_reads_two_hookpoints_together(cache, tmp_path):
    out = tmp_path / "run"
    target = "gpt_neox.layers.2"
    flags = ["--layer", "1", "--target-hookpoint", target, "--skip", *FLAGS]
    assert main(["--activations", str(cache), *flags, "--out", str(out)]) == 0
    final = records(out)[-1]
    assert final["explained_variance"] > 0.5 and "ce_recovered" in final
    assert kronsae.load(out).config.d_target == 256


def test_without_the_model_all_but_its_parts_is_there(cache, tmp_path, capsys):
    """The cross-entropy and the contexts' words are missing, and the command says why."""
    lonely = shutil.copytree(cache, tmp_path / "cache")
    document = read_checksummed(lonely / "index.json")
    document["data"]["model"] = str(tmp_path / "gone")
    write_checksummed(lonely / "index.json", document)
    out = tmp_path / "run"
    assert main(["--activations", str(lonely), "--layer", "2", *FLAGS, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "Without cross-entropy: " in printed and "gone" in printed
    assert "Without the contexts of latents, as the model's tokenizer is not here" in printed
    final = records(out)[-1]
    assert "ce_clean" not in final and final["explained_variance"] > 0
    assert (out / "report.html").exists()


def test_another_model_of_that_name_is_not_taken_for_it(cache, tmp_path):
    other = shutil.copytree(cache, tmp_path / "cache")
    document = read_checksummed(other / "index.json")
    document["model"]["weights"] = "0" * 16
    document["tokenizer"] = "0" * 16
    write_checksummed(other / "index.json", document)
    model = CacheActivations(other, layer=2, batch_size=8).language_model
    assert "weights of embedded are not those" in model.missing
    assert not model.has_cross_entropy and model.tokenizer is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--layer", "2", "--dataset", "x.txt"], "--dataset x.txt has no effect with"),
        (["--layer", "2", "--model", "embedded"], "--model embedded has no effect with"),
        (["--layer", "2", "--context-length", "64"], "--context-length 64 has no effect with"),
        (["--layer", "2", "--heldout-tokens", "64"], "--heldout-tokens 64 has no effect with"),
        (["--layer", "2", "--overlap", "on"], "--overlap has no effect with --activations"),
        (["--layer", "2", "--streaming"], "--streaming True has no effect with --activations"),
        ([], "which one?: the cache has gpt_neox.layers.1 (layer 1), gpt_neox.layers.2"),
        (["--layer", "0"], "layer 0: the cache has"),
        (["--hookpoint", "gpt_neox"], "hookpoint 'gpt_neox': the cache has"),
        (["--layer", "2", "--epochs", "1"], "fewer than --tokens 3,000"),
    ],
)  # fmt: skip
def test_flags_that_a_cache_rules_out(flags, words, cache, capsys, tmp_path):
    out = tmp_path / "run"
    assert main(["--activations", str(cache), *FLAGS, *flags, "--out", str(out)]) == 2
    assert words in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize("order", ["global", "stream"])
def test_a_run_keeps_to_the_tokens_that_it_began_with(order, monkeypatch, tmp_path):
    """Bit for bit, when the harvest has gone on since."""
    folder, whole, out = tmp_path / "cache", tmp_path / "whole", tmp_path / "run"
    cached.make(monkeypatch, folder, tokens=251)
    flags = ["--layer", "2", *FLAGS, "--activations-order", order, "--tokens", "500"]
    flags += ["--checkpoint-every", "3", "--activations", str(folder)]
    assert main([*flags, "--out", str(whole)]) == 0
    data = json.loads((whole / "config.json").read_text())["config"]["data"]
    assert data["activations_tokens"] == CacheIndex.open(folder).train_rows
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        assert main([*flags, "--out", str(out)]) == 128 + signal.SIGTERM
    cached.make(monkeypatch, folder)
    assert CacheIndex.open(folder).train_rows > 700
    assert main(["--resume", str(out)]) == 0
    assert (out / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert records(out) == records(whole)
    again = tmp_path / "again"
    assert main(["--config", str(whole / "config.json"), "--out", str(again)]) == 0
    assert (again / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


def test_an_incomplete_harvest_is_trained_from(monkeypatch, tmp_path, capsys):
    folder, out = tmp_path / "cache", tmp_path / "run"
    held = cached.make(monkeypatch, folder, tokens=400)
    (folder / "index.json").unlink()  # as if it had been killed
    arguments = ["--activations", str(folder), "--layer", "2", *FLAGS, "--tokens", "500"]
    assert main([*arguments, "--out", str(out)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{held.train_rows:,} tokens of gpt_neox.layers.2" in printed
    assert "so far (of 400: the harvest is incomplete)" in printed
    assert main([*arguments, "--activations-tokens", "9999", "--out", str(tmp_path / "x")]) == 2
    assert "not 9,999. Resume it: kronsae harvest --resume" in capsys.readouterr().err


def test_order_has_no_effect_without_a_cache(capsys):
    assert main(["--activations-order", "stream", "--plan"]) == 2
    assert "--activations-order has no effect with a language model" in capsys.readouterr().err


def test_plan_counts_the_buffer_of_a_cache(cache, capsys):
    arguments = ["--activations", str(cache), "--layer", "2", *FLAGS, "--plan"]
    assert main(arguments) == 0
    assert f"from the cache {cache}" in " ".join(capsys.readouterr().out.split())
    request = kronsae.train.parse(arguments)
    plan, *_ = kronsae.train._plan(request)
    source = CacheActivations(cache, layer=2, batch_size=64, buffer_tokens=400)
    slots = 2 * sum(part.numel() * part.itemsize for part in source._new_slot())
    batches = 3 * 64 * source.d_model * 4
    assert plan["memory_mib"]["shuffle buffer"] == pytest.approx((slots + batches) / 2**20)
    assert plan["flops_per_token_model"] == 0
