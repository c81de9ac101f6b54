"""A latent's card: what it shows are the properties, and nothing in it can break out."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
from explorer_pages import EVIL, EvilTokenizer, make_page
from rich.cells import cell_len
from test_explore import Page

from kronsae import SAE, InputError, SAEConfig
from kronsae.config import DataConfig
from kronsae.features import card
from kronsae.features.card import PASSAGES, percent
from kronsae.features.model import Place, TargetModel
from kronsae.properties.labels import Label, write_labels
from kronsae.properties.run import digest_of
from kronsae.properties.store import save_properties
from kronsae.system.files import sha256

LABEL = EVIL[1] + " & $x_1$"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_page(tmp_path_factory.mktemp("cards"))


@pytest.fixture(scope="module")
def busiest(made):
    return int(made.stored.properties.post.count.argmax())


@pytest.fixture(scope="module")
def shown(made, busiest):
    return card(made.sae, made.stored, busiest, EvilTokenizer(), LABEL)


def test_figures_are_the_properties(made, busiest, shown):
    properties, config = made.stored.properties, made.sae.config
    post, pre = properties.post, properties.pre
    assert dict(shown.figures) == {
        "density": percent(post.count[busiest] / properties.tokens),
        "mean": f"{post.mean[busiest]:.3g}",
        "maximum": f"{post.top.scores[busiest, 0]:.3g}",
    }
    assert sum(shown.counts) == post.count[busiest]
    assert shown.end <= 2 * post.top.scores[busiest, 0]
    assert max(shown.heights) == 1
    # Base and extension are those whose product the latent is the root of.
    head, base, extension = np.unravel_index(busiest, (config.heads, config.m, config.n))
    assert shown.place == f"head {head} · base {base} × extension {extension}"
    counts = pre.count.reshape(config.heads, -1)[head]
    both = counts[base], counts[config.m + extension]
    for parent, number, count in zip(shown.parents, (base, extension), both, strict=True):
        assert parent.number == number
        assert dict(parent.figures)["density"] == percent(count / properties.tokens)
    assert percent(properties.both[head, base, extension] / properties.tokens) in shown.gate


def test_passages_are_the_strongest_examples(made, busiest, shown):
    top = made.stored.properties.post.top
    peaks = [passage.peak for passage in shown.passages]
    assert 1 < len(peaks) <= PASSAGES and sorted(peaks, reverse=True) == peaks
    assert peaks[0] == pytest.approx(top.scores[busiest, 0])
    there = top.tokens[busiest, 0] >= 0
    values = top.values[busiest, 0][there]
    assert [value for _, value in shown.passages[0].tokens] == values.clip(0).tolist()
    assert len({passage.tokens for passage in shown.passages}) == len(peaks)
    page = Page(shown._repr_html_())
    marks = [float(attributes["title"]) for tag, attributes in page.elements if tag == "mark"]
    assert marks[: (values > 0).sum()] == [float(f"{value:.3g}") for value in values if value > 0]


def test_printed(made, shown):
    """Short, for a terminal of 80 columns; the whole of its parts is not printed."""
    lines = repr(shown).splitlines()
    assert len(lines) < 25 and max(map(cell_len, lines)) <= 80
    assert lines[0] == f"Latent {shown.latent} · {shown.place}"
    assert LABEL in lines[1:3] and dict(shown.figures)["density"] in repr(shown)
    assert all(bar.shown in repr(shown) for _, _, bars in shown.lists for bar in bars)
    strongest = max(shown.passages[0].tokens, key=lambda token: token[1])[0]
    assert f"«{strongest.strip(' ')[:8]}" in repr(shown)
    never = card(made.sae, made.stored, made.sae.dict_size - 1, None)
    assert "It does not fire here." in repr(never)


def test_the_histogram_is_that_of_the_explorer(made, busiest, shown):
    post = made.stored.properties.post
    assert shown.counts == tuple(post.histogram[busiest])
    assert shown.end == post.histogram_top[busiest] > post.top.scores[busiest, 0]


def test_nothing_breaks_out(shown, tmp_path):
    text = shown.to_html(tmp_path / "new" / "card.html").read_text(encoding="utf-8")
    page = Page(text)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "iframe", "base", "form"}
    names = {name for _, attributes in page.elements for name in attributes}
    assert not [name for name in names if name.startswith("on")]
    assert [label.strip() for label in page.of(**{"class": "label"})] == [LABEL]
    assert not re.findall(r"(?:src|href)=[\"'](?!data:,)", text)
    assert "default-src 'none'" in text


def test_a_latent_that_never_fires(made):
    never = card(made.sae, made.stored, made.sae.dict_size - 1, None)
    assert not never.passages and dict(never.figures)["mean"] == "–"
    assert "It does not fire here." in never._repr_html_()


def test_a_dense_encoder_has_no_bases(tmp_path):
    dense = make_page(tmp_path, "dense")
    latent = int(dense.stored.properties.post.count.argmax())
    shown = card(dense.sae, dense.stored, latent, None)
    assert (shown.place, shown.parents, shown.gate) == ("", (), "")
    assert "by itself" not in shown._repr_html_()


def test_picture(made, shown, tmp_path):
    image = pytest.importorskip("matplotlib.image", reason="needs matplotlib")
    never = card(made.sae, made.stored, made.sae.dict_size - 1, EvilTokenizer())
    full, short = (
        image.imread(each.write(tmp_path / f"{i}.png")) for i, each in enumerate((shown, never))
    )
    assert full.shape[1] == short.shape[1] > 1500 and full.shape[0] > short.shape[0]
    orange = (full[..., 0] > 0.95) & (full[..., 1] > 0.7) & (full[..., 2] < 0.5)
    assert orange.sum() > 1000  # the strongest tokens are shaded


def test_what_is_wrong_is_said(made, shown, tmp_path):
    with pytest.raises(InputError, match="latent: expected 0 to 71, got 72"):
        card(made.sae, made.stored, 72, None)
    with pytest.raises(InputError, match=r"a card is a file .html or .png, not .*card.svg"):
        shown.write(tmp_path / "card.svg")


def test_a_card_in_a_notebook(made, busiest, shown, tmp_path):
    """`feature` takes the properties of the run that the SAE is of, or of a folder."""
    model = SimpleNamespace(model=None, tokenizer=EvilTokenizer())
    lm = TargetModel([Place(made.sae, model, DataConfig())])
    facts = made.stored.facts | {"sae_sha256": digest_of(made.sae)}
    made.sae.save(tmp_path / "run" / "sae")
    assert facts["sae_sha256"] == sha256(tmp_path / "run" / "sae" / "sae.safetensors")
    folder = save_properties(made.stored._replace(facts=facts), tmp_path / "run" / "properties")
    given = lm.feature(busiest, properties=folder, label=LABEL)
    assert given._repr_html_() == shown._repr_html_()
    with pytest.raises(InputError, match="not measured yet"):
        lm.feature(busiest)
    made.sae.source = str(tmp_path / "run")
    assert lm.feature(busiest, label=LABEL)._repr_html_() == shown._repr_html_()
    labels = {busiest: Label(LABEL)}
    write_labels(labels, tmp_path / "run" / "labels.json", facts["sae_sha256"])
    assert lm.feature(busiest)._repr_html_() == shown._repr_html_()
    with pytest.raises(InputError, match="latent: expected"):
        lm.feature(made.sae.dict_size)
    other = SAE(SAEConfig(d_model=6, heads=2, m=2, n=2, k=2))
    with pytest.raises(InputError, match="the properties of another SAE"):
        TargetModel([Place(other, model, DataConfig())]).feature(0, properties=folder)
