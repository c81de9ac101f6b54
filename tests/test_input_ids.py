"""Columns of token ids instead of text, also for models without a tokenizer."""

import json
import shutil
from array import array

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from tiny_models import make_tokenizer, save_model
from transformers import LlamaConfig

from kronsae.cache import CacheActivations, CacheIndex
from kronsae.config import DataConfig
from kronsae.data import LanguageModel, LanguageModelActivations
from kronsae.data.amount import count_tokens
from kronsae.data.packing import ModelTokens, Packer, context_begin
from kronsae.data.text import open_text
from kronsae.errors import InputError
from kronsae.evaluate.__main__ import main as evaluate
from kronsae.explore.__main__ import main as explore
from kronsae.harvest import main as harvest
from kronsae.system.files import read_checksummed
from kronsae.train import main as train

WORDS = "def class return import self value for if else None True yield".split()
TEXTS = [" ".join(WORDS[(7 * i + j * j) % 12] for j in range(5 + i % 40)) for i in range(60)]
IN_ORDER = {"heldout_order": "first", "shuffle_documents": 0}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def model():
    return LanguageModel.load("embedded", layer=1)


@pytest.fixture(scope="module")
def ids(model):
    return [model.tokenizer(text)["input_ids"] for text in TEXTS]


def write(path, rows, column="input_ids", type_=None):
    """A file whose column `column` holds lists; its suffix says of which kind."""
    table = pyarrow.table({"id": range(len(rows)), column: pyarrow.array(rows, type_)})
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=150)
    elif path.suffix == ".arrow":
        with pyarrow.ipc.new_stream(path, table.schema) as out:
            out.write_table(table, max_chunksize=150)
    elif path.suffix == ".json":
        path.write_text(json.dumps(table.to_pylist()))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    return path


def config(path, **settings):
    settings = {"text_column": "input_ids", "context_length": 16, "heldout_tokens": 64} | settings
    settings = {"contexts_per_batch": 4} | settings
    return DataConfig(dataset=str(path), **settings)


LISTS = {
    "int64": pyarrow.list_(pyarrow.int64()),
    "int32": pyarrow.large_list(pyarrow.int32()),
    "uint16": pyarrow.list_(pyarrow.uint16()),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["indexed", "streamed"])
@pytest.mark.parametrize(
    "name, of",
    [("a.jsonl", None), ("a.json", None), *(("a.parquet", x) for x in LISTS)]
    + [("a.arrow", "int64")],
)
def test_ids_are_packed_as_their_text_is(tmp_path, model, ids, name, of, streaming):
    path = write(tmp_path / name, ids, type_=LISTS.get(of))
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    order = {"streaming": streaming, **(IN_ORDER if streaming else {"heldout_order": "first"})}
    found, expected = (
        LanguageModelActivations(model, open_text(data, 3), data, 8, 3)
        for data in (config(path, **order), config(texts, text_column="text", **order))
    )
    assert found.heldout_contexts().equal(expected.heldout_contexts())
    for _ in range(4):
        assert found.next_contexts().equal(expected.next_contexts())


def test_separators_and_beginnings_are_there_once():
    tokenizer = make_tokenizer("llama")
    packer = Packer(tokenizer, 5)
    documents = [array("i", ids) for ids in ([1, 10, 11], [12, 13, 2], [14, 15])]
    contexts = [c.tolist() for document in documents for c in packer.add(document)]
    assert contexts == [[1, 10, 11, 2, 12], [1, 13, 2, 14, 15]] and packer.waiting == [2]


WRONG = {
    "high": ([[5, 6], [7, 99_999]], ["row 2", "token id 99999", "0 to 3,071"]),
    "negative": ([[5, 6], [3], [-4]], ["row 3", "-4"]),
}


@pytest.mark.parametrize("rows, words", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_ids_out_of_the_vocabulary_are_refused_before_training(tmp_path, model, name, rows, words):
    path = tmp_path / name
    data = config(write(path, rows))
    with pytest.raises(InputError) as caught:
        LanguageModelActivations(model, open_text(data, 0), data, 8, 0)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_stream_refuses_them_as_it_reads(tmp_path, model, ids):
    data = config(write(tmp_path / "a.parquet", [*ids, [99_999]]), streaming=True)
    with pytest.raises(InputError, match="token id 99999 is not one of the model's"):
        LanguageModelActivations(model, open_text(data, 0), data, 8, 0)


@pytest.mark.parametrize(
    "rows, words",
    [
        ([[1, 2], [3, 0.5]], ["line 2", "token ids", "0.5"]),
        ([[1, 2], [3, None]], ["line 2", "token ids", "None"]),
        ([[1, 2], "some text"], ["line 2", "expected token ids", "some text"]),
        ([[1, 2], [2**40]], ["line 2", "token ids", str(2**40)]),
        ([{"a": 1}], ["expected text", "dict"]),
    ],
)
def test_what_is_no_list_of_ids_is_refused(tmp_path, rows, words):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    with pytest.raises(InputError) as caught:
        open_text(config(path), 0)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_null_among_the_ids_of_a_table(tmp_path):
    path = write(tmp_path / "a.parquet", [[1, 2], [3, None]])
    with pytest.raises(InputError, match="row 2.*expected token ids, got None"):
        open_text(config(path), 0)


def test_roles_have_no_effect_on_them(tmp_path, ids):
    path = write(tmp_path / "a.jsonl", ids)
    with pytest.raises(InputError, match="--chat-roles assistant has no effect.*token ids"):
        open_text(config(path, chat_roles="assistant"), 0)


def test_a_hub_dataset(tmp_path, model, ids, monkeypatch):
    whole = datasets.Dataset.from_dict({"input_ids": [*ids, None, []]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: whole)
    data = config("someone/tokens")
    source = LanguageModelActivations(model, open_text(data, 0), data, 8, 0)
    assert next(iter(source)).shape == (8, model.d_model)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_their_amount_is_told(tmp_path, model, ids, name):
    data = config(write(tmp_path / name, ids * 10))
    source = LanguageModelActivations(model, open_text(data, 0), data, 8, 0)
    expected = 0
    while (packed := source.next_contexts()) is not None:
        expected += int(source.token_mask(packed).sum())
    assert count_tokens(data, model.tokenizer, 16) == pytest.approx(expected, rel=0.1)
    text = open_text(data, 0)
    LanguageModelActivations(model, text, data, 8, 0)
    assert count_tokens(data, model.tokenizer, 16, text) == pytest.approx(expected, rel=0.03)


# Models without a tokenizer


def test_special_tokens_come_from_the_models_config():
    tokens = ModelTokens(LlamaConfig(bos_token_id=1, eos_token_id=[2, 3], pad_token_id=0))
    assert tokens.all_special_ids == [0, 1, 2, 3]
    assert context_begin(tokens) == [1] and Packer(tokens, 8).separator == 2
    same = ModelTokens(LlamaConfig(bos_token_id=2, eos_token_id=2))
    assert context_begin(same) == [], "it is not known to begin a text"
    assert context_begin(same, "bos") == [2]
    with pytest.raises(InputError, match="no tokenizer"):
        context_begin(same, "<s>")


FLAGS = [
    *("--layer", "1", "--text-column", "input_ids", "--context-length", "16"),
    *("--heldout-tokens", "64", "--model-dtype", "float32", "--contexts-per-batch", "4"),
]
TRAIN = [
    *("--tokens", "1500", "--batch-size", "64", "--dict-size", "64", "--k", "4", "--eval-every"),
    *("0", "--checkpoint-every", "8", "--buffer-tokens", "256", "--log-every", "1"),
]


@pytest.fixture
def without_tokenizer(tmp_path):
    folder = save_model(tmp_path / "llama", "llama")
    for file in folder.glob("*token*"):
        file.unlink()
    return folder


def test_a_model_without_a_tokenizer(tmp_path, without_tokenizer, monkeypatch, capsys):
    """It is trained, judged, explored and harvested; ids stand in the place of texts."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    rows = [generator.integers(6, 96, size).tolist() for size in generator.integers(5, 80, 120)]
    path = write(tmp_path / "a.parquet", rows)
    flags = ["--model", str(without_tokenizer), "--dataset", str(path), *FLAGS]
    out = tmp_path / "run"
    assert train([*flags, *TRAIN, "--out", str(out)]) == 0
    assert "Without the contexts of latents" in capsys.readouterr().out
    assert read_checksummed(out / "config.json")["config"]["data"]["text_column"] == "input_ids"
    assert evaluate([str(out)]) == 0
    assert explore([str(out), "--tokens", "400", "--sample", "2"]) == 0
    folder = tmp_path / "cache"
    assert harvest([*flags, "--out", str(folder)]) == 0
    index = CacheIndex.open(folder)
    assert index.begin == {"context_begin": ["[1]"], "prepend_bos": True}
    assert CacheActivations(folder, batch_size=8).language_model.tokenizer is None
    again = tmp_path / "again"
    assert train(["--activations", str(folder), *TRAIN, "--out", str(again)]) == 0


def test_it_does_not_read_text(tmp_path, without_tokenizer, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"body": "w1 w2"}) + "\n")
    flags = ["--model", str(without_tokenizer), "--dataset", str(path), "--layer", "1"]
    assert train([*flags, "--text-column", "body", "--out", str(tmp_path / "run")]) == 2
    assert "has no tokenizer, so text cannot be read" in capsys.readouterr().err


def test_a_run_on_ids_goes_on_where_it_was(tmp_path, model, ids):
    data = config(write(tmp_path / "a.parquet", ids), buffer_tokens=128)

    def source():
        return LanguageModelActivations(model, open_text(data, 1), data, 32, 1)

    whole = list(source())
    first, second = source(), source()
    batches = iter(first)
    for _ in range(5):
        next(batches)
    second.load_state_dict(first.state_dict())
    rest = list(second)
    assert len(whole) == 5 + len(rest)
    assert all(a.equal(b) for a, b in zip(whole[5:], rest, strict=True))


def test_a_cache_equals_live(tmp_path, ids):
    path = write(tmp_path / "a.parquet", ids)
    flags = ["--dataset", str(path), *FLAGS]
    folder = tmp_path / "cache"
    assert harvest([*flags, "--dtype", "float32", "--out", str(folder)]) == 0
    shutil.rmtree(folder / "progress")
    cached = CacheActivations(folder, batch_size=32, order="stream", buffer_tokens=128)
    data = config(path, buffer_tokens=128, contexts_per_batch=4)
    model = LanguageModel.load("embedded", layer=1)
    live = LanguageModelActivations(model, open_text(data, 0), data, 32, 0)
    assert cached.heldout_contexts().equal(live.heldout_contexts())
    assert cached.heldout_mask().equal(live.heldout_mask())
    assert torch.cat(list(cached)).equal(torch.cat(list(live)))
