"""Latents ablated, held and steered in tiny models, against brute force."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny_models import BLOCKS, WIDTH, save_model

from kronsae import SAE, InputError, SAEConfig
from kronsae.data import LanguageModel
from kronsae.data.packing import token_mask
from kronsae.interventions.effects import (
    EncodedText,
    and_test,
    attributed_effects,
    choose_pairs,
    encode_text,
    exact_effects,
    last_logit,
    summed_loss,
    without,
)
from kronsae.interventions.hooks import ablate, change, clamp, intervene, steer, values_of
from kronsae.metrics.heldout import HeldoutText
from kronsae_kernels import SparseCodes

F = 40
KRON = {"heads": 10, "m": 2, "n": 2, "k": 5}
POINTS = {
    "kron": KRON,
    "dense": {"encoder": "dense", "dict_size": F, "k": 5},
    "batchtopk": {**KRON, "selection": "batchtopk"},
    "jumprelu": {"encoder": "dense", "dict_size": F, "k": 5, "selection": "jumprelu"},
    "switch": {"heads": 12, "m": 2, "n": 2, "k": 5, "experts": 2},
}
FAMILIES = ("gpt2", "llama", "gpt_neox")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {family: str(save_model(root / family, family)) for family in FAMILIES}


@pytest.fixture(scope="module")
def gpt2(folders):
    return LanguageModel.load(folders["gpt2"], layer=1)


def make(point: str = "kron", d_target: int = 0, **more) -> SAE:
    config = SAEConfig(d_model=WIDTH, d_target=d_target, **POINTS[point], **more)
    sae = SAE(config, generator=torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        sae.W_enc.mul_(20)
        sae.W_dec.mul_(3)
        sae.b_dec.normal_(generator=torch.Generator().manual_seed(1))
    if point == "batchtopk":
        sae.selection.threshold.fill_(0.5)
    return sae


def tokens(count: int = 3, length: int = 10, seed: int = 0) -> torch.Tensor:
    ids = torch.randint(6, 90, (count, length), generator=torch.Generator().manual_seed(seed))
    ids[0, 4] = 2  # the end of a text
    return ids


def dense(sae: SAE, codes: SparseCodes) -> torch.Tensor:
    return torch.zeros(len(codes.values), sae.dict_size).scatter_add(1, codes.indices, codes.values)


def logits_with(model: LanguageModel, ids, module: str, output) -> torch.Tensor:
    """Logits when `module` gives `output` [b, t, d]."""
    hook = model.model.get_submodule(module).register_forward_hook(
        lambda _m, _i, given: output if torch.is_tensor(given) else (output, *given[1:])
    )
    try:
        with torch.no_grad():
            return model.model(input_ids=ids).logits
    finally:
        hook.remove()


def test_values_by_hand():
    codes = SparseCodes(torch.tensor([[3.0, 2.0], [1.0, 0.0]]), torch.tensor([[7, 1], [1, 7]]))
    found = values_of(codes, [1, 7, 4], 9)
    assert found.tolist() == [[2, 3, 0], [1, 0, 0]]


@pytest.mark.parametrize("keep_error", [True, False], ids=["error", "reconstruction"])
@pytest.mark.parametrize(
    ("family", "point"), [*(("gpt2", p) for p in POINTS), *((f, "kron") for f in FAMILIES[1:])]
)
def test_edits_against_brute_force(folders, family, point, keep_error):
    model, sae, ids = LanguageModel.load(folders[family], layer=1), make(point), tokens()
    x = model.activations(ids)
    mask = token_mask(ids, model.tokenizer)
    assert not mask[:, 0].any() and not mask[0, 4]
    with torch.no_grad():
        codes = sae.encode(x[mask])
    z = dense(sae, codes)
    often = z.count_nonzero(0).argsort(descending=True).tolist()
    silent = next(latent for latent in range(sae.dict_size) if not z[:, latent].any())
    edits = [ablate(often[0]), clamp(often[1], 4.0), steer(often[2], -3.0), clamp(silent, 2.0)]
    edits += [steer(often[1], 1.5)]  # on top of 4
    new = z.clone()
    new[:, often[0]], new[:, often[1]], new[:, silent] = 0, 5.5, 2
    new[:, often[2]] -= 3
    y = x.clone()
    with torch.no_grad():
        inside = x[mask] if keep_error else z @ sae.W_dec + sae.b_dec
        y[mask] = inside + (new - z) @ sae.W_dec
    expected = logits_with(model, ids, f"{BLOCKS[family]}.1", y)
    clean = model.logits(ids)
    with intervene(model, sae, edits, keep_error=keep_error), torch.no_grad():
        torch.testing.assert_close(model.logits(ids), expected, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(expected, clean, atol=1e-2)
    assert torch.equal(model.logits(ids), clean)


def test_what_changes_nothing(gpt2):
    """A latent that is silent, ablated; a latent steered by 0; no edit at all."""
    sae, ids = make(), tokens()
    clean = gpt2.logits(ids)
    with torch.no_grad():
        codes = sae.encode(gpt2.activations(ids).flatten(0, 1))
    silent = next(f for f in range(sae.dict_size) if not dense(sae, codes)[:, f].any())
    for edits in ([], [ablate(silent)], [steer(3, 0.0)]):
        with intervene(gpt2, sae, edits):
            assert torch.equal(gpt2.logits(ids), clean)


def test_a_transcoder_changes_its_target(folders):
    hookpoint, target = "transformer.h.1.ln_2", "transformer.h.1.mlp"
    model = LanguageModel.load(folders["gpt2"], hookpoint=hookpoint, target_hookpoint=target)
    sae, ids = make(d_target=WIDTH, skip=True), tokens()
    with torch.no_grad():
        sae.W_skip.normal_()
    x, y = model.activations(ids).split(WIDTH, -1)
    mask = token_mask(ids, model.tokenizer)
    with torch.no_grad():
        codes = sae.encode(x[mask])
        latent = int(codes.indices[0, 0])
        step = (4 - dense(sae, codes)[:, latent, None]) * sae.W_dec[latent]
        for keep_error in (True, False):
            put = y.clone()
            put[mask] = step + (y[mask] if keep_error else sae(x[mask]).x_hat)
            expected = logits_with(model, ids, target, put)
            with intervene(model, sae, [clamp(latent, 4.0)], keep_error=keep_error):
                torch.testing.assert_close(model.logits(ids), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache(folders, family):
    """Greedy generation token by token is that of whole forward passes with the same edits."""
    model, sae = LanguageModel.load(folders[family], layer=1), make()
    edits = [clamp(3, 6.0), ablate(0)]
    ids = tokens(2, 6)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    attention = torch.ones_like(ids)
    with intervene(model, sae, edits):
        found = model.model.generate(
            ids,
            attention_mask=attention,
            use_cache=True,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
        whole = ids
        with torch.no_grad():
            for step in found.logits:
                logits = model.logits(whole)[:, -1]
                torch.testing.assert_close(step, logits, atol=1e-4, rtol=1e-3)
                whole = torch.cat([whole, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(found.sequences, whole)
    plain = model.model.generate(ids, attention_mask=attention, use_cache=True, **options)
    assert not torch.equal(plain, whole)


def test_padding_on_the_left(gpt2):
    """A text's first token is untouched where padding comes before it."""
    sae, edits = make(), [steer(1, 8.0)]
    short = tokens(1, 5, seed=3)[:, 1:]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), short], 1)
    attention = (torch.arange(7) >= 3).long()[None]
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    with intervene(gpt2, sae, edits), torch.no_grad():
        alone = gpt2.model(input_ids=short).logits
        beside = gpt2.model(
            input_ids=padded, attention_mask=attention, position_ids=positions
        ).logits[:, 3:]
    torch.testing.assert_close(alone, beside, atol=1e-4, rtol=1e-3)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    long = tokens(1, 7, seed=4)
    with intervene(gpt2, sae, edits):
        each = [gpt2.model.generate(ids, **options)[0, -6:] for ids in (short, long)]
        both = gpt2.model.generate(
            torch.cat([padded, long]),
            attention_mask=torch.cat([attention, torch.ones_like(long)]),
            use_cache=True,
            **options,
        )
    assert torch.equal(both[:, -6:], torch.stack(each))


def test_what_cannot_be_edited(gpt2):
    with pytest.raises(InputError, match="expected 0 to 39"), intervene(gpt2, make(), [ablate(40)]):
        pass
    other = SAE(SAEConfig(d_model=8, **KRON))
    with pytest.raises(InputError, match="maps width 8 to 8"), intervene(gpt2, other, []):
        pass


def test_hooks_go_away_on_errors(gpt2):
    ids = tokens()
    clean = gpt2.logits(ids)
    with pytest.raises(KeyError), intervene(gpt2, make(), [clamp(1, 9.0)]):
        raise KeyError
    assert torch.equal(gpt2.logits(ids), clean)


# Effects


@pytest.fixture(scope="module")
def precise(folders):
    """Model and text in float64, so that finite differences are sharp."""
    model = LanguageModel.load(folders["gpt_neox"], layer=1, dtype=torch.float64)
    ids = tokens(4, 12)
    return HeldoutText(model, ids, token_mask(ids, model.tokenizer), 3, {})


OBJECTIVES = {"loss": summed_loss, "logit": last_logit(17)}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_effects_against_brute_force(precise, objective):
    model, sae = precise.model, make().double()
    found = encode_text(sae, precise)
    pairs = choose_pairs(found.firings(sae), 12, 3, seed=0)
    assert len(pairs) > 12
    exact = exact_effects(model, sae, found, pairs, objective, batch=5)
    attributed = attributed_effects(model, sae, found, objective, batch=3)
    for (c, f), effect in zip(pairs.tolist(), exact.tolist(), strict=True):
        ids = precise.contexts[c, None]
        clean = objective(model.logits(ids), ids).item()
        with intervene(model, sae, [ablate(f)]), torch.no_grad():
            assert effect == pytest.approx(objective(model.logits(ids), ids).item() - clean)
        small = 1e-6
        with intervene(model, sae, [ablate(f)._replace(keep=1 - small)]), torch.no_grad():
            slope = (objective(model.logits(ids), ids).item() - clean) / small
        assert attributed[c, f].item() == pytest.approx(slope, rel=1e-3, abs=1e-6)
    assert not attributed[found.firings(sae) == 0].any()


def test_attribution_is_exact_where_the_rest_is_linear(precise):
    """On the logits of a model without layers in between; here: the head's own input."""
    name = "gpt_neox.final_layer_norm"
    model = LanguageModel(precise.model.model, precise.model.tokenizer, name)
    text = replace(precise, model=model)
    sae = make().double()
    found = encode_text(sae, text)
    pairs = choose_pairs(found.firings(sae), 40, 4, seed=0)
    exact = exact_effects(model, sae, found, pairs, last_logit(7))
    attributed = attributed_effects(model, sae, found, last_logit(7))
    torch.testing.assert_close(exact, attributed[pairs[:, 0], pairs[:, 1]])
    assert exact.any()


def test_parts_of_a_reading(precise):
    sae = make().double()
    found = encode_text(sae, precise)
    counts = torch.zeros(4, sae.dict_size, dtype=torch.int64)
    for context in range(4):
        part: EncodedText = found.part(slice(context, context + 1))
        z = dense(sae, SparseCodes(part.codes.values.float(), part.codes.indices))
        assert len(z) == part.mask.sum()
        counts[context] = (z > 0).sum(0)
    assert torch.equal(found.firings(sae), counts)


def test_pairs_by_hand():
    firings = torch.tensor([[0, 2, 1], [0, 1, 0], [0, 3, 1]])
    assert choose_pairs(firings, 9, 2, seed=0).tolist() == [[0, 1], [1, 1], [0, 2], [2, 2]]
    assert choose_pairs(firings, 9, 1, 0, latents=[2, 0]).tolist() == [[0, 2]]
    assert len(choose_pairs(firings, 1, 9, seed=0)[:, 1].unique()) == 1


# AND


@pytest.mark.parametrize("point", ["kron", "batchtopk"])
def test_and_test_against_brute_force(gpt2, point):
    """Pre-latents switched off by their weights, and everything counted token by token."""
    sae, ids = make(point), tokens(5, 12)
    mask = token_mask(ids, gpt2.tokenizer)
    text = HeldoutText(gpt2, ids, mask, 2, {})
    x = gpt2.activations(ids)
    with torch.no_grad():
        z = dense(sae, sae.encode(x[mask]))
    latent = int((z > 0).sum(0).argmax())
    head, i, j = latent // 4, latent // 2 % 2, latent % 2
    found = and_test(sae, text, latent)
    here = z[:, latent] > 0
    assert (found["head"], found["base"], found["extension"]) == (head, i, j)
    assert found["tokens"] == here.sum()
    with torch.no_grad():
        pre = x[mask] @ sae.W_enc[head].T + sae.b_enc[head]
    p, q = pre[:, i] > 0, pre[:, 2 + j] > 0
    shares = (p, q, p & q, here)
    assert list(found["gate"].values()) == pytest.approx(
        [share.double().mean().item() for share in shares]
    )
    assert not (here & ~(p & q)).any()

    fires = torch.zeros_like(mask)
    fires[mask] = here
    kept = fires.any(1)
    clean = gpt2.token_losses(ids).double()
    siblings = [f for f in range(4 * head, 4 * head + 4) if f != latent]
    for result in found["ablated"]:
        changed = copy.deepcopy(sae)
        with torch.no_grad():
            if result["what"] == "composition":
                new = dense(sae, without(sae, x[mask], torch.arange(F) == latent))
                assert not new[:, latent].any()
            else:
                row = i if result["what"] == "base" else 2 + j
                changed.W_enc[head, row] = 0
                changed.b_enc[head, row] = -1
                new = dense(sae, changed.encode(x[mask]))
            y = x.clone()
            y[mask] += (new - z) @ sae.W_dec
            log_p = logits_with(gpt2, ids, "transformer.h.1", y).double().log_softmax(-1)[:, :-1]
            log_q = gpt2.logits(ids).double().log_softmax(-1)[:, :-1]
        growth = -log_p.gather(-1, ids[:, 1:, None])[..., 0] - clean
        divergence = (log_q.exp() * (log_q - log_p)).sum(-1)
        at = fires[:, :-1]
        assert result["latents"] == (1 if result["what"] == "composition" else 2)
        assert result["head_before"] == pytest.approx(z[here][:, siblings].sum(1).mean().item())
        assert result["head_after"] == pytest.approx(new[here][:, siblings].sum(1).mean().item())
        lost = (z > 0) & ~(new > 0)
        assert result["lost"] == pytest.approx(
            lost[here][:, siblings].sum(1).double().mean().item()
        )
        gained = (new > 0) & ~(z > 0)
        assert result["gained"] == pytest.approx(gained[here].sum(1).double().mean().item())
        assert result["loss"] == pytest.approx(growth[at].mean().item(), rel=1e-3, abs=1e-6)
        assert result["divergence"] == pytest.approx(
            divergence[at].mean().item(), rel=1e-3, abs=1e-7
        )
        elsewhere = growth[kept][~at[kept]].mean().item()
        assert result["loss_elsewhere"] == pytest.approx(elsewhere, rel=1e-3, abs=1e-6)
    # TopK fills the place, where another latent is positive; a threshold does not.
    assert (found["ablated"][2]["gained"] > 0.5) == (point == "kron")


def test_and_tests_that_cannot_be(gpt2):
    ids = tokens()
    text = HeldoutText(gpt2, ids, token_mask(ids, gpt2.tokenizer), 2, {})
    with pytest.raises(InputError, match="kron"):
        and_test(make("dense"), text, 0)
    with pytest.raises(InputError, match="expected 0 to 39"):
        and_test(make(), text, 40)
    sae = make()
    with torch.no_grad():
        sae.W_enc[0], sae.b_enc[0] = 0, -1
    with pytest.raises(InputError, match="never fires"):
        and_test(sae, text, 0)


def test_change_by_hand():
    sae = make()
    codes = SparseCodes(torch.tensor([[2.0, 1.0]]), torch.tensor([[5, 8]]))
    with torch.no_grad():
        found = change(sae, codes, [clamp(5, 3.0), steer(5, 1.0), ablate(9), ablate(8)])
        expected = 2 * sae.W_dec[5] - sae.W_dec[8]
    torch.testing.assert_close(found[0], expected)
