"""Contexts that hold one document each, and tokens that the user excludes."""

import json
import os
from array import array

import datasets
import pytest
import torch
from tiny_models import WORDS, make_tokenizer, save_model

from kronsae import SAE, SAEConfig
from kronsae.cache import CacheActivations
from kronsae.config import DataConfig
from kronsae.data import LanguageModel, LanguageModelActivations
from kronsae.data.amount import count_tokens
from kronsae.data.packing import PADDING, Packer, left_out_ids
from kronsae.data.text import IndexedText
from kronsae.errors import InputError
from kronsae.evaluate.__main__ import main as evaluate
from kronsae.evaluate.judge import judge
from kronsae.explore.__main__ import main as explore
from kronsae.harvest import main as harvest
from kronsae.interventions import ablate, intervene
from kronsae.interventions.effects import and_test, encode_text, exact_effects
from kronsae.metrics.heldout import Heldout, HeldoutText
from kronsae.metrics.target_model import load_sae, open_heldout
from kronsae.train import main as train

LENGTH = 8
TEXTS = [" ".join(WORDS[(7 * i + j * j) % 90] for j in range(1 + (5 * i) % 13)) for i in range(80)]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {family: save_model(root / family, family) for family in ("gpt_neox", "bert")}


@pytest.fixture(scope="module")
def models(folders):
    """A causal model, and one that reads both ways."""
    return {family: LanguageModel.load(str(folder), layer=1) for family, folder in folders.items()}


def config(**settings):
    usual = {"dataset": "given", "context_length": LENGTH, "contexts_per_batch": 4}
    usual |= {"heldout_tokens": 100, "buffer_tokens": 64, "join_documents": False}
    return DataConfig(**usual | settings)


def opened(model, seed=0, **settings):
    text = IndexedText(TEXTS, None, seed=seed, epochs=1, fingerprint="mark")
    return LanguageModelActivations(model, text, config(**settings), 8, seed)


def test_each_context_holds_one_document():
    packer = Packer(make_tokenizer("gpt_neox"), 4, join=False)
    of_word = packer.tokenizer.get_vocab()
    words = [array("i", [of_word[w] for w in WORDS[:n]]) for n in (2, 4, 5, 7, 1)]
    contexts = [c.tolist() for ids in words for c in packer.add(ids)]
    a = words[3].tolist()
    assert (
        contexts
        == [
            [*a[:2], PADDING, PADDING],
            a[:4],
            a[:4],  # the one token that follows would be first in its context
            a[:4],
            [*a[4:7], PADDING],
        ]
    )
    assert not packer.waiting
    begun = Packer(make_tokenizer("llama"), 4, join=False)
    assert [c.tolist() for c in begun.add(words[1])] == [[1, *a[:3]], [1, a[3], PADDING, PADDING]]


@pytest.mark.parametrize("family", ["gpt_neox", "bert"])
def test_activations_are_those_of_a_document_by_itself(models, family):
    """Padding is neither read by the model nor trained on."""
    model = models[family]
    source = opened(model)
    contexts, mask = source.heldout_contexts(), source.heldout_mask()
    assert (contexts == PADDING).any() and not mask[contexts == PADDING].any()
    rows = iter(source.heldout_activations())
    for ids, kept in zip(contexts, mask, strict=True):
        alone = ids[ids != PADDING][None]
        for x in model.activations(alone)[0][kept[: alone.shape[1]]]:
            torch.testing.assert_close(next(rows), x.float(), rtol=1e-4, atol=1e-4)
    assert next(rows, None) is None


def test_padding_counts_in_no_loss(models):
    model = models["gpt_neox"]
    source = opened(model)
    contexts, mask = source.heldout_contexts(), source.heldout_mask()
    several = mask.sum(1) > 1  # of one token there is no variance
    contexts, mask = contexts[several], mask[several]
    alone = [model.token_losses(ids[ids != PADDING][None]).double() for ids in contexts]
    tokens = sum(losses.numel() for losses in alone)
    expected = sum(losses.sum().item() for losses in alone) / tokens
    text = HeldoutText(model, contexts, mask, 4)
    make = {"same": lambda: lambda x, y: y}
    found = text.cross_entropies(make)
    assert found["clean"] == pytest.approx(expected, rel=1e-5)
    assert found["same"] == pytest.approx(expected, rel=1e-5)
    torch.manual_seed(0)
    sae = SAE(SAEConfig(d_model=model.d_model, dict_size=32, m=4, n=4, k=4))
    judged = judge({"a": sae}, text)["a"].metrics
    assert judged["ce_clean"] == pytest.approx(expected, rel=1e-5)
    divergences = []
    for ids, kept in zip(contexts, mask, strict=True):
        there = ids != PADDING
        one = HeldoutText(model, ids[None, there], kept[None, there], 1)
        count = int(there.sum()) - 1
        divergences.append(judge({"a": sae}, one)["a"].metrics["kl_spliced"] * count)
    assert judged["kl_spliced"] == pytest.approx(sum(divergences) / tokens, rel=1e-4)
    whole = Heldout(source.heldout_activations(), text=text)
    assert whole.first(20).text.contexts.shape[0] < len(contexts)


def test_effects_do_not_see_padding(models):
    model = models["gpt_neox"]
    source = opened(model)
    ids, mask = source.heldout_contexts(), source.heldout_mask()
    torch.manual_seed(0)
    sae = SAE(SAEConfig(d_model=model.d_model, dict_size=32, m=4, n=4, k=4))
    text = HeldoutText(model, ids, mask, 4)
    encoded = encode_text(sae, text)
    latent = int(encoded.firings(sae)[0].argmax())
    effect = exact_effects(model, sae, encoded, torch.tensor([[0, latent]]))
    there = ids[0] != PADDING
    alone = HeldoutText(model, ids[:1, there], mask[:1, there], 1)
    expected = exact_effects(model, sae, encode_text(sae, alone), torch.tensor([[0, latent]]))
    torch.testing.assert_close(effect, expected, rtol=1e-4, atol=1e-6)
    [whole] = [and_test(sae, HeldoutText(model, ids[:1], mask[:1], 1), latent)["ablated"]]
    assert [row["loss"] for row in whole] == pytest.approx(
        [row["loss"] for row in and_test(sae, alone, latent)["ablated"]], rel=1e-3, abs=1e-6
    )


def test_their_amount_is_told(models):
    model = models["gpt_neox"]
    source = opened(model, heldout_tokens=40)
    told = count_tokens(source.config, model.tokenizer, LENGTH, source.text)
    expected = 0
    while (packed := source.next_contexts()) is not None:
        expected += int(source.token_mask(packed).sum())
    assert told == pytest.approx(expected, rel=0.1)


def test_a_run_goes_on_where_it_was(models):
    model = models["gpt_neox"]
    whole, first, second = (opened(model, 1) for _ in range(3))
    whole, batches = list(whole), iter(first)
    for _ in range(5):
        next(batches)
    second.load_state_dict(first.state_dict())
    rest = list(second)
    assert all(a.equal(b) for a, b in zip(whole[5:], rest, strict=True))


def test_old_descriptions_stay(models):
    described = opened(models["gpt_neox"], join_documents=True).describe()
    assert not {"join_documents", "exclude_tokens", "chat_roles"} & described.keys()
    assert opened(models["gpt_neox"]).describe()["join_documents"] is False


FLAGS = [
    *("--layer", "1", "--context-length", str(LENGTH), "--heldout-tokens", "100"),
    *("--no-join-documents", "--contexts-per-batch", "4", "--model-dtype", "float32"),
    *("--exclude-tokens", "w3,10"),
]
TRAIN = [
    *("--tokens", "300", "--batch-size", "32", "--dict-size", "32", "--k", "4", "--eval-every"),
    *("4", "--checkpoint-every", "8", "--buffer-tokens", "64", "--log-every", "1"),
]


def test_from_the_command_line_to_the_explorer(tmp_path, folders, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    flags = ["--model", str(folders["gpt_neox"]), "--dataset", str(path), *FLAGS]
    out, folder = tmp_path / "run", tmp_path / "cache"
    assert train([*flags, *TRAIN, "--out", str(out)]) == 0
    assert evaluate([str(out)]) == 0
    text = open_heldout(load_sae(str(out), {}), "cpu")
    assert (text.contexts == PADDING).any()
    excluded = {text.model.tokenizer.get_vocab()["w3"], 10}
    assert not excluded & set(text.contexts[text.mask].tolist())
    assert excluded & set(text.contexts[~text.mask].tolist())
    assert explore([str(out), "--tokens", "400", "--sample", "2"]) == 0
    assert harvest([*flags, "--shard-tokens", "100", "--out", str(folder)]) == 0
    cached = CacheActivations(folder, batch_size=8)
    assert cached.heldout_contexts().equal(text.contexts)
    assert cached.heldout_mask().equal(text.mask)
    assert cached.heldout_tokens == int((text.contexts != PADDING).sum())
    os.truncate(folder / "train-00000.0.safetensors", 100)
    assert harvest(["--resume", str(folder)]) == 0
    again = tmp_path / "again"
    assert train(["--activations", str(folder), *TRAIN, "--out", str(again)]) == 0
    assert evaluate([str(again)]) == 0


# Excluded tokens


def test_excluded_tokens_are_ids_or_texts():
    tokenizer = make_tokenizer("gpt_neox")
    words = tokenizer.get_vocab()
    special = left_out_ids(tokenizer).tolist()
    found = left_out_ids(tokenizer, "w3, 10,w5").tolist()
    assert sorted({*special, words["w3"], 10, words["w5"]}) == found
    for item in ("unheard", "w1 w2", ""):
        with pytest.raises(InputError, match="exclude_tokens.*expected ids, or texts of one token"):
            left_out_ids(tokenizer, f"w3,{item}")


def test_an_excluded_id_that_the_model_does_not_know(models):
    with pytest.raises(InputError, match=r"exclude_tokens: the model has \d+ tokens.*id 999999"):
        opened(models["gpt_neox"], exclude_tokens="999999")


def test_they_are_never_trained_or_evaluated_on(models):
    model = models["gpt_neox"]
    word = model.tokenizer.get_vocab()["w3"]
    source, usual = (opened(model, exclude_tokens=words) for words in ("w3", ""))
    contexts, mask = source.heldout_contexts(), source.heldout_mask()
    assert contexts.equal(usual.heldout_contexts())
    assert (usual.heldout_mask() & ~mask).equal(usual.heldout_mask() & (contexts == word))
    assert (contexts == word).any() and source.describe()["exclude_tokens"] == "w3"


def test_they_pass_unchanged_where_latents_are_changed(models):
    model = models["gpt_neox"]
    torch.manual_seed(0)
    sae = SAE(SAEConfig(d_model=model.d_model, dict_size=32, m=4, n=4, k=32))
    ids = torch.tensor([[20, 21, 10, 22]])
    clean = model.activations(ids)
    sae.metadata = {"data": {"exclude_tokens": "10"}}
    with intervene(model, sae, [ablate(0)], keep_error=False):
        hidden = model.model(ids, output_hidden_states=True).hidden_states[2]
    same = (hidden == clean).all(-1)[0].tolist()
    assert same == [True, False, True, False]
