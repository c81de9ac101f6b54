"""Held-out documents, and the order of training, of a text whose rows are sorted."""

import dataclasses
import json
import random
import shutil
import warnings
from itertools import islice
from pathlib import Path

import datasets
import pytest
import torch

import kronsae
from kronsae import InputError
from kronsae.config import DataConfig
from kronsae.data import sampling
from kronsae.data import text as text_module
from kronsae.data.activations import open_model, set_aside
from kronsae.data.sampling import Beginning, drawn_rows, shuffled
from kronsae.data.stdlib import stdlib_documents
from kronsae.data.text import IndexedText, open_text
from kronsae.metrics.target_model import load_sae, open_heldout
from kronsae.train import main

OLD = Path(__file__).parent / "fixtures" / "before_rooms"
POLISH = "zażółć gęślą jaźń świat być może nie tylko wczoraj dzisiaj jutro będzie pięknie".split()
ORDERS = ("sorted", "the other way round", "shuffled")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def two_kinds(count=300, size=3000):
    """Documents of two kinds, in three orders: code, and words at random."""
    drawn = random.Random(0)
    code = [document["text"][:size] for document in stdlib_documents(heldout=False)[:count]]
    words = [" ".join(drawn.choices(POLISH, k=size // 8)) for _ in range(count)]
    mixed = code + words
    drawn.shuffle(mixed)
    return dict(zip(ORDERS, (code + words, words + code, mixed), strict=True))


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def opened(path, seed=0, **settings):
    return open_text(DataConfig(dataset=str(path), **settings), seed)


STREAMED = {"streaming": True, "shuffle_documents": 1000}


# The order of documents


@pytest.mark.parametrize("settings", [{}, STREAMED], ids=["indexed", "streamed"])
def test_the_order_of_rows_makes_no_difference(tmp_path, settings):
    """Neither to what is held out nor to the order of training, if the buffer holds the file."""
    found = []
    for name, texts in two_kinds(40).items():
        text = opened(write(tmp_path / f"{name}.jsonl", texts), epochs=2, **settings)
        heldout = list(islice(text.heldout(), 10))
        text.hold_out(10)
        found.append((heldout, list(text)))
        assert not set(heldout) & set(found[-1][1])
    assert found[0] == found[1] == found[2]
    kinds = ["import" in text or "def " in text for text in found[0][0]]
    assert 2 <= sum(kinds) <= 8  # of both


def test_a_stream_that_fits_into_its_buffer_is_read_like_an_index(tmp_path):
    path = write(tmp_path / "a.jsonl", [f"text {i}" for i in range(50)])
    texts = [opened(path, epochs=2, seed=3, **settings) for settings in ({}, STREAMED)]
    heldout = [list(islice(text.heldout(), 7)) for text in texts]
    for text in texts:
        text.hold_out(7)
    assert heldout[0] == heldout[1] and list(texts[0]) == list(texts[1])


@pytest.mark.parametrize("limit", [5, 2**16], ids=["drawn by number", "drawn by text"])
@pytest.mark.parametrize(
    "settings",
    [{}, STREAMED, {"streaming": True, "shuffle_documents": 7}],
    ids=["indexed", "streamed", "streamed through a small buffer"],
)
def test_every_document_is_held_out_or_trained_on(tmp_path, monkeypatch, limit, settings):
    """For any number that is held out; the same ones for every seed, in an order for each seed."""
    monkeypatch.setattr(sampling, "DRAWN_BY_TEXT", limit)
    texts = [f"text {i}" for i in range(30)]
    path = write(tmp_path / "a.jsonl", [*texts[:9], None, " ", *texts[9:]])
    for count in (0, 1, 5, 9, 20):
        orders = []
        for seed in (0, 1):
            text = opened(path, seed=seed, epochs=2, **settings)
            heldout = list(islice(text.heldout(), count))
            text.hold_out(count)
            trained = list(text)
            one, two = trained[: len(trained) // 2], trained[len(trained) // 2 :]
            assert sorted([*filter(None, heldout), *one]) == sorted(texts)
            assert sorted(one) == sorted(two) and one != two
            orders.append((heldout, one))
        assert orders[0][0] == orders[1][0] and orders[0][1] != orders[1][1]


def test_many_documents_are_drawn_from_all_of_them():
    rows = drawn_rows(range(100_000), "sample")
    assert rows.sort().values.equal(torch.arange(100_000))
    assert rows[:100].double().mean() == pytest.approx(50_000, rel=0.2)
    assert rows.equal(drawn_rows(range(100_000), "sample"))


def test_the_first_documents_may_be_held_out(tmp_path):
    path = write(tmp_path / "a.jsonl", [f"{i:02}" for i in range(20)])
    for settings in ({}, STREAMED, {"streaming": True, "shuffle_documents": 0}):
        text = opened(path, heldout_order="first", **settings)
        assert list(islice(text.heldout(), 3)) == ["00", "01", "02"]
        text.hold_out(3)
        trained = list(text)
        assert sorted(trained) == [f"{i:02}" for i in range(3, 20)]
        assert (trained == sorted(trained)) == (settings.get("shuffle_documents") == 0)


def test_runs_that_were_begun_before_read_the_same_documents():
    """In the order that earlier versions drew."""
    texts = [f"{i:02}" for i in range(20)]
    text = IndexedText(texts, None, seed=3, epochs=2, fingerprint="")
    text.hold_out(4)
    generators = [torch.Generator().manual_seed(3 * 1_000_003 + epoch) for epoch in (0, 1)]
    orders = [torch.randperm(16, generator=generator) for generator in generators]
    assert list(text) == [texts[4 + row] for order in orders for row in order]


def test_orders_are_permutations_that_differ():
    rows, drawn = torch.arange(5, 25), set()
    for seed in (0, 1, 2**40 - 1):
        for epoch, before in ((0, 0), (1, 0), (0, 20), (0, 40)):
            order = shuffled(rows, seed, epoch, before)
            assert order.sort().values.equal(rows)
            drawn.add(tuple(order.tolist()))
    assert len(drawn) == 12


# The buffer of a stream


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", ["*.jsonl", "*.csv", "*.txt", "*.parquet"])
@pytest.mark.parametrize("size", [1, 4, 100])
def test_a_buffered_stream_resumes_at_every_document(tmp_path, name, size):
    for i in range(3):
        texts = [f"{i} {j}" for j in range(5)]
        path, data = (
            tmp_path / name.replace("*", f"{i}"),
            datasets.Dataset.from_dict({"text": texts}),
        )
        if "csv" in name:
            data.to_csv(path)
        elif "parquet" in name:
            data.to_parquet(path)
        else:
            write(path, texts) if "json" in name else path.write_text("\n\n".join(texts))

    def fresh():
        text = opened(tmp_path / name, streaming=True, shuffle_documents=size, epochs=2)
        assert len(list(islice(text.heldout(), 3))) == 3
        text.hold_out(3)
        return text

    whole = list(fresh())
    assert len(whole) == 24
    for after in range(len(whole) + 1):
        text, resumed = fresh(), fresh()
        read = list(islice(text, after))
        resumed.load_state_dict(json.loads(json.dumps(text.state_dict())))
        assert [*read, *resumed] == whole, after
        text.load_state_dict(fresh().state_dict())  # one in use goes back to the beginning
        assert list(text) == whole, after


def test_a_buffer_holds_so_many_documents_or_characters(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [f"{i:02}" for i in range(20)])
    text = opened(path, heldout_order="first", streaming=True, shuffle_documents=8)
    found = list(text)
    assert [sorted(found[i : i + 8]) for i in (0, 8, 16)] == [
        [f"{i:02}" for i in part] for part in (range(8), range(8, 16), range(16, 20))
    ]
    monkeypatch.setattr(text_module, "BUFFER_CHARACTERS", 9)
    found = list(opened(path, heldout_order="first", streaming=True, shuffle_documents=8))
    assert sorted(found[:5]) == [f"{i:02}" for i in range(5)]


def test_a_position_in_a_stream_is_gone_to_without_reading_what_comes_before(tmp_path):
    read = []

    def generate(shards):
        for shard in shards:
            for i in range(10):
                read.append((shard, i))
                yield {"text": f"{shard} {i}"}

    def fresh():
        stream = datasets.IterableDataset.from_generator(generate, gen_kwargs={"shards": [0, 1, 2]})
        text = text_module.BufferedText(
            stream, "text", size=10, heldout_order="sample", seed=0, epochs=1, fingerprint=""
        )
        list(islice(text.heldout(), 2))
        text.hold_out(2)
        return text

    text = fresh()
    list(islice(text, 20))  # of the third shard
    resumed = fresh()
    resumed.load_state_dict(text.state_dict())
    read.clear()
    assert len(list(resumed)) == 8
    assert {shard for shard, _ in read} <= {1, 2}


def test_a_stream_that_broke_off_can_be_read_again():
    broken = [True]

    def generate():
        for i in range(20):
            if broken[0] and i == 15:
                raise ConnectionError("the network is gone")
            yield {"text": f"{i:02}"}

    stream = datasets.IterableDataset.from_generator(generate)
    text = text_module.BufferedText(
        stream, "text", size=10, heldout_order="sample", seed=0, epochs=1, fingerprint=""
    )
    read = list(islice(text, 10))
    for _ in range(2):
        with pytest.raises(InputError, match="reading on failed.*the network is gone"):
            list(text)
    broken[0] = False
    assert sorted(read + list(text)) == [f"{i:02}" for i in range(20)]


def test_settings_of_the_buffer():
    with pytest.raises(InputError, match="shuffle_documents has no effect with a dataset that is"):
        DataConfig(dataset="a.jsonl", shuffle_documents=5)
    with pytest.raises(InputError, match="are its first ones, so give heldout_order first as well"):
        DataConfig(dataset="a.jsonl", streaming=True, shuffle_documents=0)
    with pytest.raises(InputError, match="heldout_order: one of"):
        DataConfig(heldout_order="last")


# A stream that is sorted


@pytest.mark.parametrize("name", ORDERS)
def test_a_sorted_stream_is_told(tmp_path, name):
    """At the start, even if training does not come as far; a shuffled one is not."""
    path = write(tmp_path / "a.jsonl", two_kinds()[name])
    text = opened(path, streaming=True, shuffle_documents=100)
    next(text.heldout())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        text.hold_out(4)
        assert len(list(text)) == 596
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == (name != "shuffled")
    if messages:
        assert "documents 301 to 400 differ from the first 100" in messages[0]
        assert "--shuffle-documents (now 100)" in messages[0]


def test_a_stream_that_changes_later_is_told_then(tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "LOOKED_AT", 200)
    path = write(tmp_path / "a.jsonl", two_kinds()["sorted"])
    text = opened(path, streaming=True, shuffle_documents=100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text.hold_out(4)
        documents = iter(text)
        list(islice(documents, 296))
    with pytest.warns(UserWarning, match="seems to be sorted"):
        next(documents)
    resumed = opened(path, streaming=True, shuffle_documents=100)
    resumed.hold_out(4)
    resumed.load_state_dict(text.state_dict())
    with pytest.warns(UserWarning, match="seems to be sorted"):
        list(resumed)


def test_documents_of_the_same_kinds_do_not_differ():
    """Among buffers of documents of any number, with kinds that are rare."""
    drawn = random.Random(1)
    code, words = (two_kinds()["sorted"][half] for half in (slice(300), slice(300, None)))
    rare = ["0123456789 " * 100, "\n" * 2000, "Ж" * 500]
    for size in (8, 32, 100, 300):
        for rarely in (0.0, 0.02, 0.3):
            beginning = None
            for _ in range(8):
                texts = [
                    drawn.choice(rare if drawn.random() < rarely else code + words)
                    for _ in range(size)
                ]
                beginning = beginning or Beginning(texts)
                assert beginning.difference(texts) is None, (size, rarely)
    assert Beginning(code).difference(words) and Beginning(words).difference(code)
    assert Beginning(code[:4]).difference(words) is None  # too few to tell
    assert Beginning(["", ""]).difference(words) is None


# Runs

SMALL = [
    *("--context-length", "64", "--contexts-per-batch", "8", "--buffer-tokens", "4096"),
    *("--batch-size", "256", "--dict-size", "256", "--k", "8", "--lr", "0.008"),
    *("--eval-every", "0", "--checkpoint-every", "0", "--device", "cpu"),
]


def train(path, out, *more):
    assert main(["--dataset", str(path), "--out", str(out), *SMALL, *more]) == 0


@pytest.mark.slow
def test_explained_variance_does_not_depend_on_the_order_of_rows(tmp_path):
    """Before, it was 0.55, 0.95 or 0.88, as the first documents were held out."""
    found = []
    for (name, texts), more in zip(two_kinds().items(), ([], [], ["--streaming"]), strict=True):
        path, out = write(tmp_path / f"{name}.jsonl", texts), tmp_path / name
        train(path, out, "--tokens", "8000", "--heldout-tokens", "4096", *more)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        found += [line["explained_variance"] for line in lines if line["kind"] == "final"]
    assert len(found) == 3 and max(found) - min(found) < 0.02, found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run, and one of a stream, of the same file."""
    folder = tmp_path_factory.mktemp("runs")
    path = write(folder / "a.jsonl", two_kinds(60)["sorted"])
    sizes = ("--tokens", "1024", "--heldout-tokens", "2048", "--no-final-evaluation")
    train(path, folder / "indexed", *sizes)
    train(path, folder / "streamed", *sizes, "--streaming", "--shuffle-documents", "30")
    return folder


def heldout_of(name, run, **given):
    loaded = load_sae(str(run / name), given)
    text = open_heldout(loaded, "cpu")
    return text.contexts, text.facts["which"]


@pytest.mark.parametrize("name", ["indexed", "streamed"])
def test_an_evaluation_reads_what_its_run_held_out(run, name):
    """Whatever else it is told; and no more than that."""
    contexts, which = heldout_of(name, run)
    settings = {"indexed": {}, "streamed": {"streaming": True, "shuffle_documents": 30}}[name]
    model, data = open_model(
        DataConfig(dataset=str(run / "a.jsonl"), layer=2, context_length=64, heldout_tokens=2048,
                   **settings), "cpu"
    )  # fmt: skip
    assert contexts.equal(set_aside(open_text(data, 5), model.tokenizer, data)[0])
    other = {"streaming": name == "indexed", "heldout_order": "first", "shuffle_documents": 10_000}
    again, of_which = heldout_of(name, run, **other)
    assert contexts.equal(again) and which == of_which == "the run's own held-out text"
    with pytest.raises(InputError, match="give at most as many --heldout-tokens"):
        heldout_of(name, run, heldout_tokens=20_000)


def test_an_sae_of_an_earlier_version_is_evaluated_on_the_first_documents(tmp_path, monkeypatch):
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    loaded = load_sae("run", {})
    assert (loaded.data.heldout_order, loaded.data.shuffle_documents) == ("first", 0)
    contexts = open_heldout(loaded, "cpu").contexts
    first = dataclasses.replace(loaded.data, heldout_order="first")
    model, first = open_model(first, "cpu")
    assert contexts.equal(set_aside(open_text(first, 0), model.tokenizer, first)[0])


def test_an_sae_says_which_documents_were_held_out(run):
    described = kronsae.load(run / "streamed").metadata["data"]
    assert described["heldout_order"] == "sample" and described["shuffle_documents"] == 30


def test_the_buffer_is_said_at_the_start(run, capsys):
    arguments = ["--dataset", str(run / "a.jsonl"), *SMALL, "--streaming", "--tokens", "1000"]
    assert main([*arguments, "--plan", "--shuffle-documents", "55"]) == 0
    assert "streamed, 55 documents shuffled at a time" in " ".join(capsys.readouterr().out.split())
    assert main([*arguments, "--plan", "--shuffle-documents", "0"]) == 2
    assert "give heldout_order first as well" in capsys.readouterr().err
