"""Strengths, fluency and the mean difference, on a tiny model, against brute force."""

import dataclasses
import math

import pytest
import torch
from tiny_models import WIDTH, save_model

from kronsae import SAE, InputError, SAEConfig
from kronsae.config import DataConfig
from kronsae.data import LanguageModel
from kronsae.data.packing import PADDING
from kronsae.errors import Notice
from kronsae.features.model import Place, TargetModel
from kronsae.interventions import (
    calibrated,
    continuations,
    difference_of_texts,
    displace,
    intervene,
    mean_difference,
    perplexity,
    steer,
    usual_values,
)
from kronsae.interventions.steering import _distinct_pairs, _largest, _until_the_end
from kronsae.metrics.heldout import HeldoutText

TEXTS = ["w1 w2 w3 w4 w5 w6", "w7 w8 w9", "w2 w2 w80 w4"]
PROMPT = [7, 8, 9]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("it") / "model", "gpt2")
    model = LanguageModel.load(str(folder), layer=1)
    model.model.get_output_embeddings().weight.mul_(30)  # so that some tokens are likelier
    return model


@pytest.fixture(scope="module")
def sae():
    config = SAEConfig(d_model=WIDTH, heads=10, m=2, n=2, k=5)
    sae = SAE(config, generator=torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        sae.W_enc.mul_(20)
    return sae


@pytest.fixture(scope="module")
def rows(model, sae):
    """Activations [n, d] of all tokens of the texts but the first of each, and values [n, F]."""
    x = [model.activations(torch.tensor([model.tokenizer(t)["input_ids"]]))[0, 1:] for t in TEXTS]
    x = torch.cat(x)
    with torch.no_grad():
        values, indices = sae.encode(x)
    return x, torch.zeros(len(x), sae.dict_size).scatter_add(1, indices, values)


def test_usual_values_are_those_of_the_tokens_where_it_fires(model, sae, rows):
    _, z = rows
    text = HeldoutText.of(model, TEXTS)
    often = int((z > 0).sum(0).argmax())
    silent = int((z > 0).sum(0).argmin())
    usual = usual_values(sae, text, [often, silent, often])
    assert not z[:, silent].any() and usual[silent] == (0, len(z), 0.0, 0.0)
    tokens, read, mean, maximum = usual[often]
    fires = z[:, often] > 0
    assert (tokens, read) == (int(fires.sum()), len(z)) and 0 < tokens
    assert mean == pytest.approx(float(z[fires, often].mean()), rel=1e-4)
    assert maximum == pytest.approx(float(z[:, often].max()), rel=1e-4)
    with pytest.raises(InputError, match="expected 0 to 39, got 40"):
        usual_values(sae, text, [40])


def test_a_text_of_strings_is_cut_where_the_model_ends(model):
    text = HeldoutText.of(model, ["w1 " * 500, "w1 w2"])
    assert text.contexts.shape == (2, model.max_context)
    assert text.mask.sum(1).tolist() == [model.max_context - 1, 1]
    assert text.contexts[1, 2:].eq(PADDING).all()
    with pytest.raises(InputError, match="trained on none"):
        HeldoutText.of(model, ["w1"])


def test_mean_difference_is_of_the_tokens_where_a_latent_fires(model, sae, rows):
    x, z = rows
    latents = [int(latent) for latent in (z > 0).sum(0).topk(6).indices[4:]]
    fires = (z[:, latents] > 0).any(1)
    assert 0 < fires.sum() < len(x)
    text = HeldoutText.of(model, TEXTS)
    found = mean_difference(sae, text, latents)
    torch.testing.assert_close(found, x[fires].mean(0) - x[~fires].mean(0), atol=1e-5, rtol=1e-4)
    silent = int((z > 0).sum(0).argmin())
    with pytest.raises(InputError, match="fire on 0 of 10 tokens"):
        mean_difference(sae, text, [silent])
    whole, other = (HeldoutText.of(model, texts) for texts in (TEXTS, TEXTS[1:2]))
    between = difference_of_texts(whole, other)
    torch.testing.assert_close(between, x.mean(0) - x[5:7].mean(0), atol=1e-5, rtol=1e-4)


def test_massive_tokens_are_in_no_difference(model, sae, rows):
    """The rule of the text leaves out its farthest token."""
    x, _ = rows
    farthest = x.norm(dim=1).argmax()
    text = dataclasses.replace(
        HeldoutText.of(model, TEXTS), massive=lambda x, target: x.norm(dim=1) >= x.norm(dim=1).max()
    )
    kept = torch.arange(len(x)) != farthest
    found = difference_of_texts(text, HeldoutText.of(model, TEXTS[1:2]))
    torch.testing.assert_close(found, x[kept].mean(0) - x[5:7].mean(0), atol=1e-5, rtol=1e-4)


def test_to_displace_along_a_row_is_to_steer(model, sae):
    ids = torch.tensor([PROMPT])
    with intervene(model, sae, [steer(3, 2.5)]), torch.no_grad():
        steered = model.logits(ids)
    with displace(model, sae, 2.5 * sae.W_dec[3].detach()), torch.no_grad():
        torch.testing.assert_close(model.logits(ids), steered)
    assert not torch.allclose(model.logits(ids), steered)
    with pytest.raises(InputError, match=r"vector: expected \[32\], got \[3\]"):
        displace(model, sae, torch.ones(3)).__enter__()


def test_perplexity_by_hand(model):
    ids = torch.tensor([[7, 8, 9, 10], [11, 12, 13, PADDING]])
    logs = model.logits(ids.clamp(min=0)).log_softmax(-1).detach()
    losses = [-logs[0, 1, 9], -logs[0, 2, 10], -logs[1, 1, 13]]
    assert perplexity(model, ids, 2) == pytest.approx(math.exp(sum(losses) / 3), rel=1e-4)
    with pytest.raises(InputError, match="from position 4 on"):
        perplexity(model, ids, 4)


def test_continuations_are_drawn_with_the_change_and_judged_without(model, sae):
    draw = {"new_tokens": 6, "samples": 3, "seed": 1}
    before = continuations(model, PROMPT, **draw)
    assert before.ids.shape[0] == 3 and before.ids.shape[1] <= 6
    state = torch.get_rng_state()
    again = continuations(model, PROMPT, intervene(model, sae, [steer(3, 0.0)]), **draw)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(again.ids, before.ids) and again.perplexity == before.perplexity
    after = continuations(model, PROMPT, intervene(model, sae, [steer(3, 400.0)]), **draw)
    whole = torch.cat([torch.tensor([PROMPT] * 3), after.ids], 1)
    assert after.perplexity == perplexity(model, whole, 3) > before.perplexity
    assert len(after.texts(model.tokenizer)) == 3
    with pytest.raises(InputError, match="two tokens at least, got 1"):
        continuations(model, PROMPT[:1], **draw)


def test_a_text_ends_with_the_first_token_that_ends_texts(model):
    ids = torch.tensor([[5, 2, 6, 2], [5, 6, 7, 8]])
    ended = _until_the_end(model, ids)
    assert ended.tolist() == [[5, 2, PADDING, PADDING], [5, 6, 7, 8]]
    # Pairs (5, 2); (5, 6), (6, 5), (5, 6).
    assert _distinct_pairs(torch.tensor([[5, 2, PADDING, PADDING], [5, 6, 5, 6]])) == 3 / 4
    assert _distinct_pairs(ids[:, :1]) == 0


@pytest.mark.parametrize(("limit", "most"), [(1.0, 11), (7.3, 11), (0.02, 11), (0.9, 11)])
def test_the_largest_fluent_strength_is_found(limit, most):
    tried = []

    def fluent(times):
        tried.append(times)
        return times <= limit

    found = _largest(fluent)
    assert found <= limit < found * 1.1 and len(tried) < most and found in tried


def test_no_strength_and_every_strength(model, sae):
    assert _largest(lambda times: False) == 0 and _largest(lambda times: True) == 32

    def change(times):
        return intervene(model, sae, [steer(3, times)])

    draw = {"new_tokens": 2, "samples": 2}
    with pytest.warns(Notice, match="even 32 times"):
        best = calibrated(model, PROMPT, change, 1e6, usual=1e-3, **draw)
    assert best.strength == pytest.approx(0.032) and len(best.tried) == 6
    with pytest.raises(InputError, match="above 1, got 1"):
        calibrated(model, PROMPT, change, 1.0, **draw)
    with pytest.raises(InputError, match="no strength down to"):
        calibrated(model, PROMPT, change, 1.01, usual=1e6, **draw)


def test_calibrated_text_is_within_its_budget(model, sae):
    def change(times):
        return intervene(model, sae, [steer(3, times)])

    best = calibrated(model, PROMPT, change, 1.3, usual=50.0, new_tokens=3, samples=4)
    ratios = dict(best.tried)
    assert best.ratio == ratios[best.strength] <= 1.3 and 0 < best.strength < 50 * 32
    above = [ratio for strength, ratio in best.tried if strength > best.strength]
    assert above and min(above) > 1.3 and len(best.tried) <= 10
    lm = TargetModel([Place(sae, model, DataConfig())])
    text = model.tokenizer.decode(PROMPT)
    same = lm.calibrated(3, text, 1.3, usual=50.0, new_tokens=3, samples=4)
    assert (same.strength, same.ratio) == (best.strength, best.ratio)
