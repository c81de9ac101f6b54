"""How contexts begin, from the command line to the run, the SAE, its cache and its exports."""

import json
import re
from types import SimpleNamespace

import pytest
from tiny_models import WORDS, save_model

import kronsae
from kronsae.cache.index import CacheIndex
from kronsae.data.packing import context_begin
from kronsae.evaluate.__main__ import main as evaluate
from kronsae.evaluate.__main__ import make_parser
from kronsae.export.__main__ import main as export
from kronsae.harvest import main as harvest
from kronsae.hub import model_card
from kronsae.interop.lens_format import metadata_of
from kronsae.metrics.target_model import given_data, load_sae, open_heldout
from kronsae.train import main as train

BEGINS = {
    **{"auto": ["<s>"], "bos": ["<s>"], "none": []},
    **{"<s>": ["<s>"], "<s></s>": ["<s>", "</s>"]},
}
PREPENDS = {"auto": True, "bos": True, "none": False, "<s>": True, "<s></s>": None}
"""What SAELens calls prepend_bos; it has no word for other beginnings."""


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("begin")
    text = folder / "text.jsonl"
    lines = [" ".join(WORDS[(7 * i + 3 * j * j) % 90] for j in range(50)) for i in range(80)]
    text.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    model = save_model(folder / "llama", "llama")
    return [
        *("--model", str(model), "--layer", "1", "--dataset", str(text)),
        *("--context-length", "16", "--heldout-tokens", "256", "--device", "cpu"),
    ]


SMALL = [
    *("--tokens", "1024", "--batch-size", "128", "--dict-size", "64", "--k", "4"),
    *("--buffer-tokens", "512", "--eval-every", "0", "--checkpoint-every", "4"),
]


@pytest.mark.parametrize("bos", BEGINS)
def test_it_is_recorded_in_the_run_the_sae_and_every_export(flags, bos, tmp_path, capsys):
    run = tmp_path / "run"
    assert train([*flags, *SMALL, "--bos", bos, "--out", str(run)]) == 0
    words = f"contexts of 16 tokens that begin with {' '.join(map(repr, BEGINS[bos]))}\n"
    words = words if BEGINS[bos] else "contexts of 16 tokens\n"
    printed = "".join(line.rstrip() + "\n" for line in capsys.readouterr().out.splitlines())
    assert words in printed
    assert re.search(r"tokens\s+of\s+\d+\s+documents\s+held\s+out;", printed)  # broken somewhere
    settings = json.loads((run / "config.json").read_text())
    assert settings["config"]["data"]["bos"] == bos
    assert settings["data"]["context_begin"] == BEGINS[bos]
    sae = kronsae.load(run)
    assert sae.metadata["data"]["prepend_bos"] is PREPENDS[bos]
    text = open_heldout(load_sae(str(run), {}), "cpu")
    begin, first = len(BEGINS[bos]), max(1, len(BEGINS[bos]))
    names = text.model.tokenizer.convert_ids_to_tokens(text.contexts[3, :begin].tolist())
    assert names == BEGINS[bos] and text.facts["context_begin"] == BEGINS[bos]
    assert not text.mask[:, :first].any() and text.mask[:, first].float().mean() > 0.9
    lens = metadata_of(sae)
    assert lens.get("prepend_bos") is PREPENDS[bos] and lens["seqpos_slice"] == [first, None]
    assert lens["exclude_special_tokens"] is True
    assert export([str(run), "--to", "sae_lens", "--out", str(tmp_path / "lens")]) == 0
    cfg = json.loads((tmp_path / "lens" / "cfg.json").read_text())
    assert cfg["metadata"] == lens
    assert kronsae.load(tmp_path / "lens").metadata["data"]["context_begin"] == BEGINS[bos]
    card = " ".join(model_card(sae, "me/mine").split())
    assert all(f"`{token}`" in card for token in BEGINS[bos])
    assert ("without a BOS token" in card) is (bos == "none")


def test_what_a_run_never_said_is_left_out(tmp_path):
    config = kronsae.SAEConfig(d_model=8, encoder="dense", dict_size=16, k=2)
    lens = metadata_of(kronsae.SAE(config))
    assert not {"prepend_bos", "seqpos_slice", "exclude_special_tokens", "model_name"} & lens.keys()


def test_a_cache_and_what_is_trained_from_it_record_it_too(flags, tmp_path):
    cache, run = tmp_path / "cache", tmp_path / "run"
    assert harvest([*flags, "--tokens", "1500", "--bos", "<s></s>", "--out", str(cache)]) == 0
    assert CacheIndex.open(cache).begin == {
        "context_begin": ["<s>", "</s>"],
        "prepend_bos": None,
    }
    assert train(["--activations", str(cache), *SMALL, "--out", str(run)]) == 0
    settings = json.loads((run / "config.json").read_text())
    assert settings["config"]["data"]["bos"] == "<s></s>"
    assert settings["data"]["context_begin"] == ["<s>", "</s>"]
    lens = metadata_of(kronsae.load(run))
    assert lens["model_name"] == flags[1] and lens["hf_hook_name"] == "model.layers.1"
    assert lens["hook_name"] == "blocks.1.hook_resid_post" and lens["seqpos_slice"] == [2, None]


def test_a_run_of_before_resumes_without_it(flags, tmp_path):
    """Its settings and the description of its data lack what was always so."""
    run = tmp_path / "run"
    assert train([*flags, *SMALL, "--massive-multiple", "0", "--out", str(run)]) == 0
    expected = kronsae.load(run).state_dict()
    for path in (run / "config.json", *run.glob("checkpoints/*/config.json")):
        settings = json.loads(path.read_text())
        settings.pop("checksum", None)
        for part, name in (("data", "bos"), ("train", "massive_multiple")):
            del settings["config"][part][name]
        for name in ("context_begin", "prepend_bos"):
            del settings["data"][name]
        path.write_text(json.dumps(settings))
    for path in run.glob("checkpoints/*/state.json"):
        state = json.loads(path.read_text())
        del state["checksum"], state["copies"]  # of config.json, as it was
        path.write_text(json.dumps(state))
    assert train(["--resume", str(run)]) == 0
    assert all(
        tensor.equal(expected[key]) for key, tensor in kronsae.load(run).state_dict().items()
    )


def test_evaluate_begins_contexts_as_the_file_of_another_library_says(flags, tmp_path, capsys):
    run = tmp_path / "run"
    dense = ["--encoder", "dense", "--bos", "none"]
    assert train([*flags, *SMALL, *dense, "--out", str(run)]) == 0
    own = [*("--hookpoint", "model.layers.1"), *flags[:2], *flags[4:]]
    for prepend in (True, False):
        sae = kronsae.load(run)
        sae.metadata["data"] |= {"prepend_bos": prepend, "context_begin": []}
        del sae.metadata["config"]
        sae.save(tmp_path / "sae")
        lens = tmp_path / f"lens-{prepend}"
        assert export([str(tmp_path / "sae"), "--to", "sae_lens", "--out", str(lens)]) == 0
        settings = json.loads((lens / "cfg.json").read_text())
        settings["metadata"].pop("kronsae", None)
        (lens / "cfg.json").write_text(json.dumps(settings))
        given = given_data(make_parser().parse(["lens", *own]))
        text = open_heldout(load_sae(str(lens), given), "cpu")
        assert text.facts["context_begin"] == (["<s>"] if prepend else [])
    out = tmp_path / "evaluation"
    assert evaluate([str(lens), *own, "--bos", "</s>", "--out", str(out)]) == 0
    assert "in contexts of 16 tokens that begin with '</s>';" in capsys.readouterr().out
    assert (
        "in contexts of 16 tokens that begin with '</s>', read by"
        in (out / "evaluation.md").read_text()
    )


@pytest.mark.parametrize("bos", ["NONE", "Auto", "BOS", ""])
def test_a_setting_in_capitals_is_no_text(bos):
    with pytest.raises(kronsae.InputError, match="bos: expected auto, bos, none or the text"):
        kronsae.DataConfig(bos=bos)


def test_a_tokenizer_without_bos():
    with pytest.raises(kronsae.InputError, match="the tokenizer has no BOS token"):
        context_begin(SimpleNamespace(bos_token_id=None), "bos")


def test_a_name_that_the_tokenizer_does_not_know_is_an_error(flags, tmp_path, capsys):
    assert train([*flags, *SMALL, "--bos", "<|im_start|>", "--out", str(tmp_path / "run")]) == 2
    assert "no token of this name" in " ".join(capsys.readouterr().err.split())
