"""The explorer's page, read back: its data are the properties, and nothing in it can break out."""

import base64
import dataclasses
import gzip
import hashlib
import json
import re
import shutil
import struct
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from explorer_pages import CONFIGS, EVIL, LENGTH, make_page
from jinja2.utils import htmlsafe_json_dumps

import kronsae
from kronsae import SAEConfig, TrainConfig, load
from kronsae.errors import Notice
from kronsae.explore import __main__ as command
from kronsae.explore.blocks import ALIGN, encode, rounded, smallest
from kronsae.properties import WINDOW, load_properties, save_properties
from kronsae.properties.__main__ import main as measure
from kronsae.properties.examples import INTERVALS
from kronsae.properties.run import open_run
from kronsae.system.files import sha256
from kronsae.train import fit
from kronsae.train import main as train


class Page(HTMLParser):
    """The elements of a page: their tags, attributes and texts."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.texts.append("")

    def handle_data(self, data):
        if self.texts:
            self.texts[-1] += data

    def of(self, **wanted) -> list[str]:
        return [
            text
            for (_, attributes), text in zip(self.elements, self.texts, strict=True)
            if all(attributes.get(key) == value for key, value in wanted.items())
        ]


@pytest.fixture(scope="module", params=["kron", "dense"])
def made(request, tmp_path_factory):
    return make_page(tmp_path_factory.mktemp("pages"), request.param)


def decode(block: str) -> dict[str, np.ndarray]:
    """The arrays of a block."""
    raw = gzip.decompress(base64.b64decode(block))
    (length,) = struct.unpack_from("<I", raw)
    start = 4 + length
    arrays = {}
    for name, dtype, shape, offset in json.loads(raw[4:start]):
        count = int(np.prod(shape, dtype=np.int64))
        kind = np.dtype(dtype).newbyteorder("<")
        array = np.frombuffer(raw, kind, count, start + offset)
        arrays[name] = array.reshape(shape).astype(dtype)
    return arrays


def decode_json(block: str) -> object:
    return json.loads(gzip.decompress(base64.b64decode(block)))


def read(made):
    page = Page(made.page.read_text(encoding="utf-8"))
    [facts], [index], [vocabulary] = (page.of(id=name) for name in ("facts", "index", "vocabulary"))
    index = decode(index)
    details, text, lists = [], *(decode(page.of(id=name)[0].strip()) for name in ("text", "lists"))
    index |= lists
    facts = json.loads(facts) | {"text": text}
    while block := page.of(id=f"details-{len(details)}"):
        details.append(decode(block[0].strip()))
    return page, facts, index, decode_json(vocabulary), details


def test_index_is_the_properties(made):
    _, facts, index, vocabulary, _ = read(made)
    found = made.stored.properties
    assert facts["tokens"] == found.tokens and facts["latents"] == made.sae.dict_size
    for name in ("post", "pre") if found.pre is not None else ("post",):
        examined = getattr(found, name)
        fires = examined.count > 0
        frequency = index[f"{name}.frequency"]
        np.testing.assert_allclose(frequency[fires], examined.count[fires] / found.tokens, 1e-3)
        assert np.isnan(frequency[~fires]).all()
        np.testing.assert_allclose(index[f"{name}.entropy"], examined.entropy, 1e-3, 1e-3)
        peaks = examined.top.scores[fires, 0]
        np.testing.assert_allclose(index[f"{name}.max"][fires], peaks, 1e-3)
        for latent in np.flatnonzero(fires)[:50]:
            numbers = index[f"{name}.tokens"][latent]
            shown = [vocabulary[n] for n in numbers if n < len(vocabulary)]
            assert shown == [text_of(t) for t in examined.top_tokens[latent] if t >= 0]
    assert (~(found.post.count > 0)).any()


def text_of(token):
    """A token as the page shows it, on one line."""
    text = EVIL[token] if token < len(EVIL) else f" word{token}"
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def test_details_are_the_properties(made):
    _, facts, _, vocabulary, details = read(made)
    found, grid = made.stored.properties, facts["grid"]
    assert len(details) == -(-grid["heads"] // facts["perBlock"]) > 1
    width = facts["perBlock"] * grid["m"] * grid["n"]
    seen = 0
    for number, block in enumerate(details):
        for row in range(len(block["post.histogram"])):
            latent = number * width + row
            seen += 1
            np.testing.assert_array_equal(
                block["post.histogram"][row], found.post.histogram[latent]
            )
            assert block["post.histogramTop"][row] == found.post.histogram_top[latent]
            np.testing.assert_array_equal(
                block["nearest"][row], made.stored.nearest.latents[latent]
            )
            raised = [vocabulary[n] for n in block["raised"][row]]
            assert raised == [text_of(t) for t in made.stored.logits.raised[latent].tolist()]
            check_examples(block, row, found, latent, facts["text"], vocabulary)
            check_intervals(block, row, found, latent)
    assert seen == made.sae.dict_size


def check_examples(block, row, found, latent, text, vocabulary):
    """Those on the page are among the strongest, in their order, each with its activations."""
    examples, flat = found.post.top, found.text.ravel()
    contexts = []
    for slot, place in enumerate(block["post.top.places"][row].tolist()):
        if place == NOWHERE:
            continue
        contexts.append(place // LENGTH)
        values = block["post.top.values"][row, slot] / 255 * block["post.top.peaks"][row, slot]
        [kept] = np.flatnonzero(examples.places[latent] == place)
        expected = examples.values[latent, kept]
        np.testing.assert_allclose(values, expected, atol=expected.max() / 200)
        assert vocabulary[text["tokens"].ravel()[place]] == text_of(flat[place])
    assert len(contexts) == len(set(contexts))
    assert bool(contexts) == (examples.places[latent, 0] >= 0)


def check_intervals(block, row, found, latent):
    """Examples of an interval have activations inside it, and all are of different contexts."""
    places = block["post.intervals.places"][row].reshape(INTERVALS, -1)
    top = found.post.histogram_top[latent]
    contexts = []
    for interval, slot in zip(*np.nonzero(places != NOWHERE), strict=True):
        contexts.append(places[interval, slot] // LENGTH)
        at = interval * places.shape[1] + slot
        shade = block["post.intervals.values"][row, at, WINDOW // 2] / 255
        share = shade * block["post.intervals.peaks"][row, at] / top * INTERVALS
        assert interval - 0.01 <= share <= interval + 1.1
    assert len(contexts) == len(set(contexts))
    assert bool(contexts) == bool(found.post.count[latent])


NOWHERE = 2**32 - 1


def test_nothing_breaks_out(made):
    """No element, attribute or script comes from the data, and the policy allows one script."""
    html = made.page.read_text(encoding="utf-8")
    page, facts, _, vocabulary, details = read(made)
    assert facts["dataset"] == EVIL[0] and EVIL[0] in vocabulary and EVIL[1] in vocabulary
    for text in EVIL[:2]:
        html = html.replace(htmlsafe_json_dumps(text)[1:-1], "")
    assert "pwned" not in html
    scripts = [attributes for tag, attributes in page.elements if tag == "script"]
    assert len(scripts) == 7 + len(details)
    running = [a for a in scripts if a.get("type") not in ("text/plain", "application/json")]
    assert running == [{}]
    assert not [tag for tag, _ in page.elements if tag in ("img", "iframe", "object", "base")]
    assert not [k for _, a in page.elements for k in a if k.startswith("on") or k == "style"]
    policy = next(a["content"] for _, a in page.elements if "http-equiv" in a)
    assert policy.startswith("default-src 'none';")
    for tag in ("script", "style"):
        [text] = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.S)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    addresses = re.findall(r"https?://[^\s'\"]+", html)
    assert set(addresses) <= {"http://www.w3.org/2000/svg"}
    assert "innerHTML" not in html and "eval(" not in html


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - {"kron", "dense"}))
def test_every_kind_has_a_page(name, tmp_path):
    made = make_page(tmp_path, name)
    _, facts, index, _, details = read(made)
    assert facts["latents"] == len(index["post.frequency"]) == made.sae.dict_size
    assert np.isfinite(index["post.frequency"]).any()
    assert sum(len(block["post.histogram"]) for block in details) == made.sae.dict_size


def test_blocks():
    arrays = {
        "a": np.arange(7, dtype=np.uint8),
        "empty": np.zeros((0, 3), np.float32),
        "b": np.arange(12, dtype=np.uint16).reshape(3, 4),
        "c": np.float32([[np.nan, -1.5, np.inf]]),
    }
    block = encode(arrays)
    assert block == encode(arrays)  # no date in it
    for name, array in decode(block).items():
        assert array.dtype == arrays[name].dtype
        np.testing.assert_array_equal(array, arrays[name])
    assert ALIGN % 4 == 0
    with pytest.raises(ValueError, match="float64"):
        encode({"x": np.zeros(1)})


def test_smallest_and_rounded():
    np.testing.assert_array_equal(smallest(np.array([3, -1])), np.uint16([3, 65535]))
    np.testing.assert_array_equal(smallest(np.array([65534, -1])), np.uint16([65534, 65535]))
    assert smallest(np.array([65535, -1])).tolist() == [65535, 2**32 - 1]
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    np.testing.assert_allclose(rounded(values), values, rtol=2**-12)
    assert np.isnan(rounded(np.float32([np.nan]))).all()


# The commands, on a run of the embedded model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("explored") / "run"
    flags = "--tokens 2048 --batch-size 512 --heldout-tokens 1024 --buffer-tokens 2048 --k 8"
    assert train([*flags.split(), "--dict-size", "128", "--out", str(out)]) == 0
    return out


def test_command(run, capsys):
    flags = ["--tokens", "3000", "--sample", "4", "--correlation-tokens", "1000"]
    assert command.main([str(run), *flags]) == 0
    assert "explorer.html (" in capsys.readouterr().out
    assert 'href="explorer.html"' in (run / "report.html").read_text(encoding="utf-8")
    stored = load_properties(run / "properties")
    tokens = stored.properties.tokens
    assert 3000 <= tokens < 3256  # whole contexts
    assert 7 * tokens < stored.properties.post.count.sum() <= 8 * tokens
    assert stored.logits.norm == "final_layer_norm"
    assert set(stored.facts["summary"]["groups"]) == {"latent", "base", "extension"}
    # The same properties serve again, others are measured.
    before = (run / "properties" / "properties.json").stat().st_mtime_ns
    out = run.parent / "page.html"
    assert command.main([str(run), "--tokens", "3000", "--out", str(out)]) == 0
    assert out.read_bytes() == (run / "explorer.html").read_bytes()
    assert (run / "properties" / "properties.json").stat().st_mtime_ns == before
    # Nor does a measurement of fewer tokens replace it, or one of more pass for the usual number.
    capsys.readouterr()
    assert command.main([str(run), "--tokens", "1000", "--sample", "4"]) == 0
    assert "its measurement of 3,000 tokens of stdlib is taken" in capsys.readouterr().out
    assert command.main([str(run)]) == 0
    assert (
        "(to measure 200,000 anew, give --tokens 200000 --dataset stdlib)"
        in capsys.readouterr().out
    )
    for other in (["--sample", "5"], ["--dataset", "stdlib", "--top", "3"]):
        assert command.main([str(run), "--tokens", "1000", *other]) == 2
        assert "one of 1,000 would replace it: give --tokens 3000" in capsys.readouterr().err
    assert measure([str(run), "--tokens", "1000"]) == 2
    assert (run / "properties" / "properties.json").stat().st_mtime_ns == before
    assert command.main([str(run), "--tokens", "3001", "--sample", "4"]) == 0
    assert "this replaces the measurement of 3,000 tokens" in capsys.readouterr().out
    assert load_properties(run / "properties").facts["settings"]["tokens"] == 3001
    facts = json.loads(Page(out.read_text(encoding="utf-8")).of(id="facts")[0])
    assert facts["grid"] == {"heads": 8, "m": 4, "n": 4, "kron": True}


def test_another_text_has_its_own_column(tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text(200 * (json.dumps({"body": "import os, sys " * 20}) + "\n"))
    flags = "--text-column body --tokens 1024 --batch-size 512 --heldout-tokens 256 --k 8"
    flags += " --buffer-tokens 1024 --dict-size 128"
    run = tmp_path / "run"
    assert train([*flags.split(), "--dataset", str(text), "--out", str(run)]) == 0
    assert open_run(run, {}, "cpu")[1].text_column == "body"
    other = tmp_path / "other.jsonl"
    other.write_text(text.read_text().replace("body", "text"))
    assert open_run(run, {"dataset": str(other)}, "cpu")[1].text_column == "text"
    assert command.main([str(run), "--dataset", str(other), "--tokens", "300"]) == 0


@pytest.mark.parametrize("value", [1e25, -3e38])
def test_an_sae_whose_outputs_are_not_finite(value, run, tmp_path, capsys, recwarn):
    """One sentence instead of a page: such an SAE is left by training that diverged."""
    wild = tmp_path / "wild"
    shutil.copytree(run, wild, ignore=shutil.ignore_patterns("properties", "explorer.html"))
    sae = load(wild)
    with torch.no_grad():
        sae.W_enc.mul_(value)
    sae.save(wild / "sae")
    assert command.main([str(wild), "--tokens", "1000"]) == 2
    assert "the SAE's outputs are not finite" in capsys.readouterr().err
    assert not (wild / "explorer.html").exists() and not (wild / "properties").exists()
    assert not [one for one in recwarn if one.category is RuntimeWarning]


def test_command_for_a_card(run, tmp_path, capsys):
    out = tmp_path / "card.html"
    assert command.main([str(run), "--tokens", "1000", "--feature", "7", "--out", str(out)]) == 0
    assert f"{out}: the card of latent 7" in capsys.readouterr().out
    assert [text for text in Page(out.read_text()).texts if text.startswith("Latent 7")]
    assert command.main([str(run), "--feature", "128", "--out", str(out)]) == 2
    assert "latent: expected 0 to 127, got 128" in capsys.readouterr().err
    assert command.main([str(run), "--feature", "7", "--out", str(tmp_path / "card.gif")]) == 2
    assert "a card is a file .html or .png" in capsys.readouterr().err


def test_command_says_what_is_wrong(run, tmp_path, capsys):
    def error(*arguments):
        assert command.main([str(argument) for argument in arguments]) == 2
        return capsys.readouterr().err

    assert "holds no SAE" in error(tmp_path)
    assert "did you mean --tokens" in error(run, "--tokns", "3")
    assert "tokens: expected >= 1, got 0" in error(run, "--tokens", 0)
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    assert "is a sweep" in error(tmp_path / "sweep")
    x = torch.randn(300, 6)
    config = SAEConfig(heads=4, m=2, n=2, k=2)
    fit(config, x, TrainConfig(tokens=300, batch_size=100), out=tmp_path / "tensors")
    assert "trained from tensors" in error(tmp_path / "tensors")


def test_a_folder_of_a_suite(tmp_path, capsys):
    suite, out = tmp_path / "suite", tmp_path / "pages"
    flags = "--tokens 1024 --batch-size 512 --heldout-tokens 512 --buffer-tokens 1024 --k 8"
    given = [*flags.split(), "--dict-size", "128", "--layer", "2", "1", "--out", str(suite)]
    assert train(given) == 0
    assert command.main([str(suite)]) == 2
    assert "is a sweep: give --out FOLDER" in capsys.readouterr().err
    few = ["--tokens", "500", "--sample", "2", "--correlation-tokens", "0"]
    assert command.main([str(suite), *few, "--out", str(out)]) == 0
    names = ["layer1", "layer2"]
    page = Page((out / "index.html").read_text(encoding="utf-8"))
    links = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    assert links == [f"./{name}.html" for name in names]
    assert "suite" in map(str.strip, page.texts)
    columns = [text.strip() for text in page.of(scope="col")]
    assert columns[:2] == ["page", "Explained variance"]
    for name in names:  # and each names the suite, and leads back to the index
        member = Page((out / f"{name}.html").read_text(encoding="utf-8"))
        assert [text.strip() for text in member.of(id="to-index")] == ["All of suite"]
        assert json.loads(member.of(id="facts")[0])["run"] == f"suite/{name}"
    assert {path.name for path in out.iterdir()} == {"index.html", *(f"{n}.html" for n in names)}
    assert [text.strip() for text in page.of(scope="rowgroup")] == names


@pytest.mark.slow
def test_a_saved_sae_has_a_page_of_its_own(run, tmp_path, monkeypatch, capsys):
    """Its folder is named after where it is; a run's sae/ is an SAE like any other."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run / "sae", tmp_path / "mine")
    few = ["--tokens", "300", "--sample", "2", "--correlation-tokens", "0", "--dataset", "stdlib"]
    assert command.main(["mine", *few]) == 0
    [home] = Path("runs/explored").iterdir()
    assert home.name == f"mine-{sha256(Path('mine/sae.safetensors'))[:12]}"
    assert f"{home}/explorer.html (" in capsys.readouterr().out
    before = (home / "properties/properties.json").read_bytes()
    # Another SAE has its own measurement, also if both pages are in one folder.
    other = load("mine")
    other.W_dec.data.mul_(-1)
    other.save(tmp_path / "other")
    assert command.main(["other", *few, "--out", "pages/other.html"]) == 0
    assert command.main(["mine", *few, "--out", "pages/mine.html"]) == 0
    assert (home / "properties/properties.json").read_bytes() == before
    # Both are found in Python, and by the other command, wherever the SAE is named from.
    lm = kronsae.language_model(load(tmp_path / "other"), load(tmp_path / "mine"))
    cards = [lm.feature(3, sae) for sae in lm.saes]
    assert cards[0].text == cards[1].text and cards[0].lists != cards[1].lists
    assert measure([str(tmp_path / "mine"), *few, "--top", "3"]) == 0
    assert f"{home}/properties: what was measured" in capsys.readouterr().out


def test_properties_of_an_older_version(run, monkeypatch):
    """A page is made of them, with windows alone and a notice; the text is that of the windows."""
    folder = run / "properties"
    if not folder.is_dir():
        assert command.main([str(run), "--tokens", "1000", "--sample", "4"]) == 0
    stored = load_properties(folder)
    post = dataclasses.replace(stored.properties.post, intervals=None)
    monkeypatch.setattr("kronsae.properties.store.FORMAT_VERSION", 1)
    facts = {k: stored.facts[k] for k in ("sae_sha256", "text", "settings", "summary")}
    older = stored._replace(
        properties=stored.properties._replace(text=None, post=post), facts=facts
    )
    save_properties(older, folder)
    with pytest.warns(Notice, match="measured by an older version"):
        assert command.main([str(run), "--out", str(run / "older.html")]) == 0
    page = Page((run / "older.html").read_text(encoding="utf-8"))
    facts = json.loads(page.of(id="facts")[0])
    assert facts["contextTokens"] == WINDOW and not facts["intervals"] and not facts["wholeText"]
    text = decode(page.of(id="text")[0].strip())["tokens"]
    places = decode(page.of(id="details-0")[0].strip())["post.top.places"]
    assert (places[places != NOWHERE] < text.size).all() and (places != NOWHERE).any()
    assert (places[places != NOWHERE] % WINDOW == WINDOW // 2).all()
