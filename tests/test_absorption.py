"""Absorption of first letters, and sparse probing: constructed ones, whose figures are known."""

import dataclasses
import json

import pytest
import torch

from kronsae import SAE, DataConfig, InputError, SAEConfig
from kronsae.data import LanguageModel, open_text
from kronsae.errors import Notice
from kronsae.evaluate.__main__ import main
from kronsae.metrics import absorption, probing
from kronsae.metrics.absorption import FirstLetters, Prompts, Words, absorbed_shares
from kronsae.metrics.figures import MEANING
from kronsae.metrics.logistic import logistic
from kronsae.metrics.probing import ClassProbes, labelled_text
from kronsae_kernels import SparseCodes

LETTERS, OWN, EACH = 3, 200, 20
"""Letters, words of each, and those of them that have a latent of their own, by 2 a latent."""


def test_logistic_regression_has_its_conditions():
    """The gradient of the objective is 0; classes that are rare weigh as much as others."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 200, 3, generator=generator) * torch.tensor([1.0, 30.0, 0.01])
    y = x[..., 0] + torch.randn(2, 200, generator=generator) > 1.5
    weights, biases = logistic(x, y)
    count = y.sum(1, keepdim=True).double()
    balance = torch.where(y, 100 / count, 100 / (200 - count))
    error = balance * (
        torch.sigmoid((x.double() @ weights[..., None])[..., 0] + biases[:, None]) - y.double()
    )
    gradient = (error[..., None] * x.double()).sum(1) + weights
    assert gradient.abs().max() < 1e-3 and error.sum(1).abs().max() < 1e-3
    assert (weights[:, 0] > 0.5).all()


def test_shares_by_hand():
    """A word each: nothing absorbed, half, all, too little, against the direction, too many."""
    values = torch.tensor(
        [[4.0, 0, 0, 0], [2, 2, 0, 0], [0, 3, 1, 0], [0, 1, 0, 0], [3, 1, 0, 0], [0, 1, 1, 1]]
    )
    cosines = torch.tensor([[0.9, 0.5, 0.05, 0.5]] * 6)
    indices = torch.tensor([[7, 1, 2, 3]] * 6)
    whole = torch.full((6,), 4.0)
    shares, full = absorbed_shares(SparseCodes(values, indices), cosines, values > 0, whole, [7, 9])
    # The fourth holds a quarter, which is too little, as does the fifth. Of the last, the one with
    # a small cosine does not count.
    assert shares.tolist() == [0, 0.5, 1, 0, 0, 1]
    assert full.tolist() == [False, False, True, False, False, False]


@pytest.fixture(scope="module")
def made_words():
    """x = 4 e_letter, and 4 t of the pair for a word that has one, in a basis of all e and t."""
    pairs = EACH // 2
    letters = torch.arange(LETTERS).repeat_interleave(OWN)
    x = torch.zeros(LETTERS * OWN, LETTERS * (1 + pairs))
    x[torch.arange(len(x)), letters] = 4
    trained = torch.ones(len(x), dtype=torch.bool)
    for letter in range(LETTERS):
        first = letter * OWN
        for pair in range(pairs):
            words = [first + pair, first + pairs + pair]  # one to train on, one to measure
            x[words, LETTERS + letter * pairs + pair] = 4
        trained[first + pairs : first + OWN // 4] = False
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return Words(x + 0.01 * noise, letters, trained)


def made_sae(absorbing: bool) -> SAE:
    """A latent for each letter, and one for each pair, which takes the letter's place if absorbing.

    The letter's latent is then silent on the pair's words, whose latent writes the letter, too.
    """
    pairs, d = EACH // 2, LETTERS * (1 + EACH // 2)
    sae = SAE(SAEConfig(d_model=d, encoder="dense", dict_size=d, k=2)).eval()
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(d))
        sae.b_enc.fill_(-0.5)
        sae.W_dec.copy_(torch.eye(d))
        for pair in range(LETTERS * pairs if absorbing else 0):
            letter = pair // pairs
            sae.W_enc[letter, LETTERS + pair] = -2
            sae.W_dec[LETTERS + pair, letter] = 1
        sae.normalize_decoder()
    return sae


def test_a_constructed_absorption_is_measured(made_words):
    with pytest.warns(Notice, match="only 3 of 26 first letters"):
        measure = FirstLetters(made_words)
    absorbed, plain = (measure.measure(made_sae(absorbing)) for absorbing in (True, False))
    tests = OWN // 4 - EACH // 2
    for number, letter in enumerate("abc"):
        found = absorbed.letters[letter]
        assert found["latents"] == [number] and found["words"] == tests
        assert found["absorbed"] == found["fully_absorbed"] == pytest.approx(EACH / 2 / tests)
        assert plain.letters[letter] == found | {"f1": 1, "absorbed": 0, "fully_absorbed": 0}
    assert absorbed.metrics["absorbed_share"] == pytest.approx(EACH / 2 / tests)
    assert absorbed.metrics["letter_f1"] < 1 and plain.metrics["absorbed_share"] == 0
    # Scaled latents with scaled decoder rows are the same SAE.
    with torch.no_grad():
        scaled = made_sae(True)
        scaled.W_dec.mul_(0.5)
        scaled.W_enc.mul_(2)
        scaled.b_enc.mul_(2)
    assert measure.measure(scaled).metrics == pytest.approx(absorbed.metrics)
    with torch.no_grad():
        scaled.W_enc.fill_(torch.inf)
    with pytest.raises(InputError, match="latents are not finite"):
        measure.measure(scaled)
    with pytest.raises(InputError, match="expected an SAE of width 33, got 8"):
        measure.measure(SAE(SAEConfig(d_model=8, encoder="dense", dict_size=8, k=2)))


def test_letters_that_no_probe_reads_are_refused(made_words):
    mixed = torch.randn(made_words.x.shape, generator=torch.Generator().manual_seed(1))
    with pytest.raises(InputError, match="no probe reads a first letter"):
        FirstLetters(dataclasses.replace(made_words, x=mixed))


@pytest.fixture(scope="module")
def embedded():
    return LanguageModel.load("embedded")


def test_words_are_read_in_their_prompts(embedded):
    settings = absorption.Settings(words=60, words_per_prompt=3, examples=2)
    words = absorption.read_words(embedded, settings)
    assert len(words.x) == len(words.names) == 60 and int(words.trained.sum()) == 48
    assert all(name.strip().isalpha() for name in words.names)
    letters = [name.strip()[0].lower() for name in words.names]
    assert letters == ["abcdefghijklmnopqrstuvwxyz"[letter] for letter in words.letters]
    ids = dict(map(reversed, absorption.vocabulary_words(embedded)))
    drawn = [(ids[name], name) for name in words.names[:48]]
    # The generator has drawn the words before it draws examples.
    generator = torch.Generator().manual_seed(settings.seed)
    torch.randperm(len(ids), generator=generator)
    tokens, places = Prompts(embedded, settings, "auto")._prompt(drawn, 0, generator)
    assert [tokens[place] for place in places] == [token for token, _ in drawn[:3]]
    written = embedded.tokenizer.decode(tokens)
    assert written.count(" has the first letter: ") == 5
    assert f"{drawn[0][1]} has the first letter: {letters[0].upper()}" in written
    x = embedded.activations(torch.tensor([tokens]))[0, places]
    torch.testing.assert_close(x, words.x[:3], rtol=1e-4, atol=1e-4)


def write_classes(folder, documents: int):
    """JSONL of Python, prose and digits, and one document of a fourth class."""
    texts = {
        "code": "def run(self, value):\n    return self.items[value]\n",
        "prose": "The old man went down to the sea, and looked at it for a while.\n",
        "digits": "1, 22, 333, 4444, 55555, 666666, 7777777, 88888888\n",
    }
    lines = [
        {"text": f"{number} " + text * 2, "kind": kind}
        for number in range(documents)
        for kind, text in texts.items()
    ]
    lines.append({"text": "rare", "kind": "rare"})
    path = folder / "classes.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_classes_are_told_by_the_latents_that_mean_them(embedded, tmp_path):
    path = write_classes(tmp_path, 10)
    data = DataConfig(model="embedded", layer=2, dataset=str(path))
    settings = probing.Settings(documents=10, context_length=20)
    text, labels = labelled_text(embedded, data, "kind", 6, settings)
    assert text.facts["classes"] == sorted(text.facts["classes"], key=labels.index)
    assert len(labels) == 30 and set(labels) == {"code", "prose", "digits"}
    assert text.contexts.shape == (30, 20)
    assert text.facts["measured"] == 6 and 0 < text.facts["measured_of_heldout"] <= 6
    probes = ClassProbes(text, labels, settings)
    means = {
        label: torch.cat([x for x, one in zip(probes.x, labels, strict=True) if one == label]).mean(
            0
        )
        for label in set(labels)
    }
    middle = torch.stack(list(means.values())).mean(0)
    # A latent for each class, along its mean.
    sae = SAE(SAEConfig(d_model=256, encoder="dense", dict_size=8, k=8)).eval()
    order = sorted(means)
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.b_enc.fill_(-1)
        for latent, label in enumerate(order):
            sae.W_enc[latent] = means[label] - middle
            sae.b_enc[latent] = -sae.W_enc[latent] @ middle
    found = probes.measure(sae)
    assert found.metrics["class_accuracy_1"] == found.metrics["class_accuracy_all"] == 1
    assert [found.classes[label]["latents"][0] for label in order] == [0, 1, 2]
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.b_enc.fill_(1)
    silent = probes.measure(sae)
    assert silent.metrics["class_accuracy_5"] == 0.5
    with pytest.raises(InputError, match="two classes or more with 11 documents"):
        labelled_text(embedded, data, "kind", 0, probing.Settings(documents=11))
    with pytest.raises(InputError, match="a column 'kind', in files"):
        labelled_text(embedded, dataclasses.replace(data, dataset="stdlib"), "kind")


def test_from_the_command_line(tmp_path, monkeypatch):
    path = write_classes(tmp_path, 6)
    data = DataConfig(model="embedded", layer=2, dataset=str(path), heldout_tokens=96)
    described = {"text": open_text(data, 0).fingerprint(), "context_length": 32}
    described |= {"name": "embedded", "heldout_contexts": 3}
    metadata = {"config": {"data": dataclasses.asdict(data)}, "data": described}
    SAE(SAEConfig(d_model=256, heads=32, m=2, n=2, k=8)).save(tmp_path / "sae", metadata)
    small = absorption.Settings(words=200, least_f1=0.01)
    monkeypatch.setattr(FirstLetters.of.__func__, "__defaults__", (small, "auto"))
    settings = probing.Settings(documents=6, context_length=20)
    monkeypatch.setattr(labelled_text, "__defaults__", (0, settings))
    monkeypatch.setattr(ClassProbes.__init__, "__defaults__", (settings,))
    flags = ["--context-length", "32", "--absorption", "--probe", "kind"]
    out = tmp_path / "out"
    with pytest.warns(Notice, match="first letters"):
        assert main([str(tmp_path / "sae"), *flags, "--out", str(out)]) == 0
    document = json.loads((out / "evaluation.json").read_text())
    [entry], [text] = document["judged"], document["texts"]
    names = {"absorbed_share", "letter_latents", "class_accuracy_1", "class_accuracy_all"}
    assert names <= entry["metrics"].keys() <= MEANING.keys()
    assert entry["probe"].keys() == {"code", "prose", "digits"}
    assert 0 < len(entry["absorption"]) <= 26
    assert text["absorption"]["words"] == 200 and 0 < text["probe"]["measured_of_heldout"] < 6
    page = (out / "evaluation.md").read_text()
    assert f"| {MEANING['absorbed_share'][0]} | " in page
    held_out = text["probe"]["measured_of_heldout"]
    assert "3 of the column kind, on the first 20 tokens of 18 documents; of 6" in page
    assert f"the run held out {held_out}." in page and "200 words" in page
