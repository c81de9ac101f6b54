"""From text to features: `kronsae.language_model` against the parts that it is made of."""

import re

import pytest
import torch
from tiny_models import BLOCKS, WIDTH, WORDS, save_model

import kronsae
from kronsae import SAE, InputError, SAEConfig
from kronsae.data import LanguageModel
from kronsae.interventions import displace, edited, intervene, steer
from kronsae.model.massive import MassiveTokens

TEXTS = ["w1 w2 w3 w4 w5", "w9 w8", "w3 w1 w4 w1 w5 w9 w2 w6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_model(tmp_path_factory.mktemp("model") / "llama", "llama"))


def make(folder, layer=1, seed=0, **settings) -> SAE:
    config = SAEConfig(d_model=WIDTH, k=5, **(settings or {"heads": 10, "m": 2, "n": 2}))
    sae = SAE(config, generator=torch.Generator().manual_seed(seed)).eval()
    with torch.no_grad():
        sae.W_enc.mul_(20)
    sae.metadata = {"data": {"name": folder, "layer": layer}, "tokens": 12_000}
    return sae


@pytest.fixture(scope="module")
def sae(folder):
    return make(folder)


@pytest.fixture(scope="module")
def lm(sae):
    return sae.language_model()


def test_features_are_the_codes_of_each_text(sae, lm):
    features = lm.features(TEXTS)
    start = 0
    for number, text in enumerate(TEXTS):
        alone = lm.features(text)
        ids = torch.tensor([lm.tokenizer(text)["input_ids"]])
        x = lm.places[0].model.activations(ids)[0]
        expected = sae.encode_dense(x)
        expected[0] = 0  # the first position: BOS
        rows = slice(start, start + len(alone))
        torch.testing.assert_close(alone.to_dense(), expected)
        torch.testing.assert_close(features.to_dense()[rows], expected)  # padded in the batch
        assert features.tokens[rows] == alone.tokens
        assert (features.text[rows] == number).all()
        assert alone.kept.tolist() == [False] + [True] * (len(alone) - 1)
        start += len(alone)
    assert start == len(features) == len(features.ids)


def test_tables_agree_with_the_codes(lm):
    features = lm.features(TEXTS)
    dense, table = features.to_dense(), features.to_pandas()
    assert len(table) == int((dense > 0).sum())
    for row in table.itertuples():
        assert dense[row.position, row.latent] == pytest.approx(row.value)
        assert features.tokens[row.position].replace(" ", "·") == row.token
        assert features.text[row.position] == row.text
    best = features.strongest(3)
    assert best.index.tolist() == dense.amax(0).topk(3).indices.tolist()
    assert best["fires_on"].tolist() == [(dense[:, i] > 0).sum() for i in best.index]
    on_one = features.strongest(2, token=-1)
    assert on_one.index.tolist() == dense[-1].topk(2).indices.tolist()
    of_one = features.strongest(1, text=1)
    assert of_one["value"].item() == pytest.approx(dense[features.text == 1].max().item())
    latent = best.index[0]
    assert torch.equal(features.of(latent), dense[:, latent])
    with pytest.raises(InputError, match="token: expected 0 to"):
        features.strongest(token=99)
    with pytest.raises(InputError, match="latent: expected 0 to 39"):
        features.of(40)


def test_a_notebook_shows_text_and_escapes_it(lm):
    features = lm.features("w1 <b> w2")
    html = features._repr_html_()
    assert "<b>" not in html and "rgba(" in html
    assert str(features.strongest(1).index[0]) in repr(features)
    latent = int(features.strongest(1).index[0])
    shown = features.show(latent)._repr_html_()
    assert f"latent {latent}" in shown
    titles = re.findall(r'title="(\d+): ([^"]+)"', shown)
    assert {int(number) for number, _ in titles} == {latent}
    assert [value for _, value in titles] == [f"{x:.3g}" for x in features.of(latent).tolist()]
    assert "w1" in repr(features.show())


def test_several_saes_read_in_one_pass_what_each_reads_alone(folder, sae):
    other = make(folder, layer=0, seed=1, encoder="dense", dict_size=30)
    both = kronsae.language_model(sae, other)
    passes = []
    both.model.register_forward_pre_hook(lambda *_: passes.append(1))
    first, second = both.features_of_each(TEXTS)
    assert len(passes) == 1
    torch.testing.assert_close(first.to_dense(), sae.language_model().features(TEXTS).to_dense())
    alone = other.language_model().features(TEXTS).to_dense()
    torch.testing.assert_close(second.to_dense(), alone)
    assert torch.equal(both.features(TEXTS, other).to_dense(), second.to_dense())
    with pytest.raises(InputError, match=r"one of 2 .*, got none: give sae= one of saes\[0\], at "):
        both.features(TEXTS)
    elsewhere = make("another/model")
    with pytest.raises(InputError, match="same model"):
        kronsae.language_model(sae, elsewhere)


def test_a_loaded_model_of_transformers(folder, sae, lm):
    named = LanguageModel.load(folder, layer=1)
    around = kronsae.language_model(sae, model=named.model, tokenizer=named.tokenizer)
    assert torch.equal(around.features(TEXTS).to_dense(), lm.features(TEXTS).to_dense())
    bare = make(folder)
    bare.metadata = {}
    again = kronsae.language_model(bare, model=named.model, tokenizer=named.tokenizer, layer=1)
    assert torch.equal(again.features(TEXTS).to_dense(), lm.features(TEXTS).to_dense())
    with pytest.raises(InputError, match="tokenizer"):
        kronsae.language_model(sae, model=named.model)


def test_massive_tokens_have_no_features(folder):
    sae = make(folder)
    x = sae.language_model().places[0].model.activations(torch.tensor([[1, 11, 12, 13]]))[0]
    norms = torch.linalg.vector_norm(x[1:] - x[1], dim=1)
    rule = MassiveTokens.of(x[1:2].repeat(4, 1)).facts()
    rule["radius"] = float(norms[1:].min()) / 2  # all but the first are massive
    sae.metadata["massive_tokens"] = rule
    features = sae.language_model().features(torch.tensor([[1, 11, 12, 13]]))
    assert features.kept.tolist() == [False, True, False, False]
    assert (features.to_dense() > 0).any(1).tolist() == features.kept.tolist()


def test_a_text_without_features(folder):
    """Thresholds that nothing exceeds: codes have no slot."""
    sae = make(folder, encoder="dense", dict_size=30, selection="jumprelu")
    sae.selection.log_threshold.data.fill_(20.0)
    features = sae.language_model().features(TEXTS)
    assert not features.to_dense().any() and features.to_pandas().empty
    assert features.strongest().empty and "rgba" in features._repr_html_()


def test_what_cannot_be_read(sae, lm):
    for texts, message in (
        ([], "at least one"),
        (["w1 " * 200], "more than the 128"),
        ([3], "expected text, got int"),
        (None, "expected a text, a list of texts, or token ids"),
        (["w1", "w\ud800"], r"text 1: .*U\+D800\) at 1"),
        (torch.ones(2, 3), "expected token ids"),
        (torch.tensor([[1, 10**6]]), "expected token ids from 0 to"),
    ):
        with pytest.raises(InputError, match=message):
            lm.features(texts)
    for given, model, message in (
        ((), {}, "at least one SAE"),
        (("runs/MY-RUN",), {}, "got 'runs/MY-RUN': load it first"),
        ((sae,), {"device": "foo"}, "'foo' cannot be used: expected cpu, cuda or mps"),
        ((sae,), {"model": torch.nn.Linear(2, 2)}, "a model of transformers, got Linear"),
        ((sae,), {"tokenizer": lm.tokenizer}, "tokenizer has no effect"),
    ):
        with pytest.raises(InputError, match=message):
            kronsae.language_model(*given, **model)
    unknown = make("")
    unknown.metadata = {}
    with pytest.raises(InputError, match="does not name a language model"):
        unknown.language_model()
    narrow = SAE(SAEConfig(d_model=8, heads=4, m=2, n=2, k=2)).eval()
    narrow.metadata = sae.metadata
    with pytest.raises(InputError, match="maps width 8 to 8"):
        narrow.language_model()


def test_steering_changes_what_is_generated_and_read(sae, lm):
    prompt = TEXTS[0]
    ids = torch.tensor([lm.tokenizer(prompt)["input_ids"]])
    plain = lm.generate(prompt, 8)
    out = lm.model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=True)
    assert plain == lm.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    place = lm.places[0]
    with intervene(place.model, sae, [steer(7, 500.0)]):
        expected = lm.model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=True)
    with lm.steer({7: 500.0}):
        assert lm.generate(prompt, 8) == lm.tokenizer.decode(
            expected[0, ids.shape[1] :], skip_special_tokens=True
        )
        changed = lm.next_tokens(prompt, 3)
    after = lm.next_tokens(prompt, 3)
    assert changed["logit"].tolist() != after["logit"].tolist()
    logits = place.model.logits(ids)[0, -1].double()
    assert after["logit"].tolist() == pytest.approx(logits.topk(3).values.tolist())
    assert after["probability"].tolist() == pytest.approx(logits.softmax(0).topk(3).values.tolist())
    latent = int(lm.features(prompt).strongest(1).index[0])
    with lm.ablate(latent):
        ablated = lm.next_tokens(prompt, 3)
    with lm.clamp({latent: 0.0}):
        assert ablated.equals(lm.next_tokens(prompt, 3))
    drawn = [lm.generate(prompt, 8, do_sample=True, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(InputError, match="expected 0 to 39"):
        lm.steer({40: 1.0}).__enter__()


def test_hooks_of_other_libraries_get_the_same_edit(folder, sae, lm):
    """`edited` in a plain forward hook changes logits as `intervene` does."""
    ids = torch.tensor([lm.tokenizer(TEXTS[0])["input_ids"]])
    edits = [steer(7, 50.0), steer(3, -20.0)]
    block = lm.model.get_submodule(f"{BLOCKS['llama']}.1")

    def replace(_module, _inputs, output):
        hidden = output[0] if isinstance(output, tuple) else output
        changed = edited(sae, hidden, edits)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    with block.register_forward_hook(replace), torch.no_grad():
        by_hook = lm.model(ids).logits
    with intervene(lm.places[0].model, sae, edits), torch.no_grad():
        torch.testing.assert_close(by_hook, lm.model(ids).logits)
    one = torch.randn(1, 1, WIDTH)  # a position of generation with a cache
    torch.testing.assert_close(edited(sae, one, [steer(7, 50.0)]), one + 50 * sae.W_dec[7].detach())


def test_what_an_sae_says_of_itself(folder, sae, tmp_path):
    assert "KronSAE: F = 40 latents (10 heads of 2 x 2), 5 active per token, d = 32" in repr(sae)
    assert f"1.resid_post of {folder}; trained on 12,000 tokens" in repr(sae)
    assert "KronSAE" in repr(SAE(SAEConfig(d_model=4, heads=2, m=1, n=1, k=1)))
    assert (sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.k) == (WIDTH, 40, 5)
    assert sae.cfg.hook_name == sae.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    assert sae.cfg.metadata.model_name == folder
    sae.save(tmp_path / "suite" / "l1")
    loaded = SAE.from_pretrained(str(tmp_path / "suite"), "l1")
    assert loaded.source == str(tmp_path / "suite")
    x = torch.randn(3, WIDTH)
    dense = loaded.encode_dense(x)
    codes = loaded.encode(x)
    assert not codes.values.requires_grad
    assert torch.equal(dense.gather(1, codes.indices), codes.values)
    torch.testing.assert_close(loaded.decode(dense), loaded.decode(codes))
    with pytest.raises(InputError, match=r"or \[..., 40\], got \[3, 32\]"):
        loaded.decode(x)
    assert (loaded.device, loaded.dtype, loaded.k) == (loaded.W_dec.device, torch.float32, 5)
    settings = loaded.cfg.to_dict()
    assert settings["d_sae"] == 40 and settings["normalize_activations"] == "none"
    assert settings["metadata"]["hook_layer"] == 1
    again = SAE.load_from_disk(tmp_path / "suite" / "l1")
    assert torch.equal(again.W_enc, loaded.W_enc)
    with pytest.raises(InputError, match="device 'foo' cannot be used"):
        kronsae.load(tmp_path / "suite" / "l1", device="foo")
    for wrong in (lambda: loaded(x) - x, lambda: x - loaded(x)):
        with pytest.raises(InputError, match="the reconstruction is sae"):
            wrong()
    with pytest.raises(AttributeError, match="no 'mean': .* the reconstruction is sae"):
        loaded(x).mean()
    with pytest.raises(AttributeError, match="use sae.dict_size"):
        loaded.d_sae  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        loaded.nothing  # noqa: B018
    assert loaded.requires_grad_().encode(x).values.requires_grad


def test_words_of_the_tokenizer_are_read(lm):
    assert lm.features(WORDS[1]).tokens[-1].strip() == WORDS[1]


def test_what_would_be_answered_wrongly_is_refused(lm):
    for call in (lm.generate, lm.next_tokens):
        with pytest.raises(InputError, match="expected one text, got list"):
            call(TEXTS)
    for values, message in (
        ({3: float("nan")}, "expected a finite one, got nan"),
        ({3: -1e30}, "in size, got -1e.30: one to about ten times"),
        ({3: "x"}, "value of latent 3"),
        ([3], "expected {latent: value}, got list"),
    ):
        for change in (lm.steer, lm.clamp):
            with pytest.raises(InputError, match=message), change(values):
                pass
    features = lm.features(TEXTS)
    for wrong, message in (
        (lambda: lm.generate("w1 w2", seed=1), "seed has no effect without do_sample"),
        (lambda: lm.generate("w1 w2", 127), "3 tokens .* and 127 new ones .* the 128 that"),
        (lambda: lm.generate("w1 w2", 3, speed=1), "generate: .*speed"),
        (lambda: lm.generate("w1 w2", 0), "new tokens: expected a whole number from 1"),
        (lambda: features.strongest(token="w1"), "token: expected a whole number"),
        (lambda: features.strongest(0), "count: expected a whole number from 1"),
        (lambda: lm.silence(3, "head"), "factor: expected base, extension, composition"),
        (lambda: lm.features_of_each(TEXTS, lm.saes[0]), "expected a list of SAEs"),
    ):
        with pytest.raises(InputError, match=message):
            wrong()


def test_logits_that_are_no_numbers_are_said(sae, lm):
    vector = torch.full((WIDTH,), torch.inf)
    for call in (lm.generate, lm.next_tokens):
        with (
            displace(lm.places[0].model, sae, vector),
            pytest.raises(InputError, match="logits are NaN: .*ten times the latent's own maximum"),
        ):
            call(TEXTS[0])


def test_a_token_of_one_of_several_texts(lm):
    features = lm.features(TEXTS)
    of_last = features.strongest(3, token=-1, text=0)
    alone = lm.features(TEXTS[0]).strongest(3, token=-1)
    assert of_last.index.tolist() == alone.index.tolist() and len(alone) == 3
    assert of_last["value"].tolist() == pytest.approx(alone["value"].tolist(), rel=1e-4)
    with pytest.raises(InputError, match="token: expected 0 to 5"):
        features.strongest(token=6, text=0)


def test_architectures_have_the_names_of_saelens(folder):
    assert make(folder).cfg.architecture == "kronsae"
    for selection, name in (("topk", "topk"), ("jumprelu", "jumprelu")):
        sae = make(folder, encoder="dense", dict_size=30, selection=selection)
        assert sae.cfg.architecture == name
