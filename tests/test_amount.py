"""About how many tokens a text gives: close to their number, and what is said if they are few."""

import gzip
import json
import random
import re

import cached
import datasets
import pandas
import pyarrow.parquet
import pytest

from kronsae import harvest
from kronsae.config import DataConfig
from kronsae.data import LanguageModel, LanguageModelActivations, amount, columns, open_text
from kronsae.data import text as text_module
from kronsae.data.amount import about, count_tokens, in_words, too_few
from kronsae.data.packing import special_ids, token_mask
from kronsae.data.stdlib import stdlib_documents
from kronsae.plan.amount import available_tokens
from kronsae.sources import Source
from kronsae.train import main

LENGTH, HELDOUT = 32, 256


@pytest.fixture(scope="module")
def model():
    return LanguageModel.load("embedded", layer=1)


def documents(count=2000):
    """Of very different lengths, and some rows without text."""
    drawn, words = random.Random(0), "the cat sat on a mat and the dog ran to the house".split()
    lengths = [int(drawn.lognormvariate(3, 1)) for _ in range(count)]
    texts = [" ".join(drawn.choices(words, k=length)) for length in lengths]
    return [None if row % 10 == 3 else text for row, text in enumerate(texts)]


def write(path, texts):
    table = [{"id": i, "note": "beside " * 20, "text": text} for i, text in enumerate(texts)]
    data = "".join(json.dumps(row) + "\n" for row in table).encode()
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path, row_group_size=300)
    elif path.suffix == ".csv":
        pandas.DataFrame(table).to_csv(path, index=False)
    elif path.suffix == ".txt":
        path.write_text("\n\n".join(text or "" for text in texts))
    elif path.suffix == ".arrow":
        arrow = pyarrow.Table.from_pylist(table)
        with pyarrow.ipc.new_stream(path, arrow.schema) as out:
            out.write_table(arrow, max_chunksize=100)
    else:
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def counted(text, model, config):
    """Tokens to train on, one by one."""
    source = LanguageModelActivations(model, text, config, 8, 0)
    special, total = special_ids(model.tokenizer), 0
    while (ids := source.next_contexts()) is not None:
        total += int(token_mask(ids, model.tokenizer, special).sum())
    return total


@pytest.mark.one_in(7)
@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet", "a.arrow", "a.txt", "stdlib"]
)
def test_the_number_is_close(tmp_path, monkeypatch, model, name):
    """Before a text is opened, from the beginnings of its files, and afterwards."""
    if name == "a.jsonl":  # of a compressed file more is read than decompressed
        monkeypatch.setattr(columns, "JSON_BYTES", 100_000)
    monkeypatch.setattr(
        text_module, "stdlib_documents", lambda heldout: stdlib_documents(heldout=heldout)[:40]
    )
    dataset = name if name == "stdlib" else str(write(tmp_path / name, documents()))
    config = DataConfig(dataset=dataset, context_length=LENGTH, heldout_tokens=HELDOUT, epochs=2)
    expected = counted(open_text(config, 0), model, config)
    assert count_tokens(config, model.tokenizer, LENGTH) == pytest.approx(expected, rel=0.1)
    assert available_tokens(config, LENGTH) == count_tokens(config, model.tokenizer, LENGTH)
    text = open_text(config, 0)
    LanguageModelActivations(model, text, config, 8, 0)
    assert count_tokens(config, model.tokenizer, LENGTH, text) == pytest.approx(expected, rel=0.03)


def digits(count):
    """Each is a token."""
    return "".join(random.Random(count).choices("0123456789", k=count))


SENTENCE = " the cat sat on a mat"
UNEVEN = {
    "long ones": [digits(20_000) + SENTENCE * 5_000] * 3 + documents(50),
    "one book": [*documents(299), (digits(3_000) + SENTENCE * 300) * 20],
    "beginnings": [digits(200) + SENTENCE * 40] * 700,
    "both ends": [digits(120) + SENTENCE * 27 + digits(120)] * 700,
    "bytes": ["一二三四五六七八九十" * 100, SENTENCE * 50] * 300,
}


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
@pytest.mark.parametrize("texts", UNEVEN)
def test_documents_that_are_not_the_same_all_through(tmp_path, model, texts, name):
    """Pieces come from all of a document, and more of them from longer ones."""
    path = write(tmp_path / name, UNEVEN[texts])
    config = DataConfig(dataset=str(path), context_length=LENGTH, heldout_tokens=HELDOUT)
    text = open_text(config, 0)
    expected = counted(open_text(config, 0), model, config)
    assert count_tokens(config, model.tokenizer, LENGTH, text) == pytest.approx(expected, rel=0.05)


def test_all_of_a_few_rows_of_token_ids_are_read(tmp_path, model):
    """Of two rows one has special tokens alone, which are not trained on."""
    path = tmp_path / "a.jsonl"
    rows = [[5] * 1_000, special_ids(model.tokenizer)[:1].tolist() * 1_000]
    path.write_text("".join(json.dumps({"ids": row}) + "\n" for row in rows))
    config = DataConfig(
        **{"dataset": str(path), "text_column": "ids", "context_length": LENGTH},
        heldout_tokens=1,
    )
    expected = 1_000 * (1 - 1 / LENGTH)  # without the first token of each context
    assert count_tokens(config, model.tokenizer, LENGTH) == pytest.approx(expected, rel=0.01)


def test_many_files_are_sampled(tmp_path, monkeypatch, model):
    monkeypatch.setattr(amount, "SAMPLE_FILES", 3)
    texts = documents()
    for number in range(20):
        write(tmp_path / f"{number:02}.jsonl", texts[number * 100 : number * 100 + 100])
    config = DataConfig(dataset=str(tmp_path), context_length=LENGTH, heldout_tokens=HELDOUT)
    expected = counted(open_text(config, 0), model, config)
    assert count_tokens(config, model.tokenizer, LENGTH) == pytest.approx(expected, rel=0.15)


def test_what_is_not_known_is_not_said(model, monkeypatch):
    config = DataConfig(dataset="someone/wiki", streaming=True)
    assert count_tokens(config, model.tokenizer, LENGTH) is None
    assert available_tokens(DataConfig(model="nowhere/at-all", layer=1), LENGTH) is None
    monkeypatch.setattr("kronsae.plan.amount.source_of", lambda _: Source)
    assert available_tokens(DataConfig(activations="mine:some"), LENGTH) is None
    assert in_words(None, 1) == "" and too_few(10**9, None, 1) is None


@pytest.mark.parametrize("dtype", ["string", "large_string", "string_view"])
def test_a_hub_dataset_on_the_disk_is_counted(monkeypatch, model, dtype):
    texts = pyarrow.array([text or "" for text in documents()]).cast(dtype)
    whole = datasets.Dataset(pyarrow.table({"text": texts}))
    half = whole.shuffle(seed=0).select(range(len(whole) // 2))
    config = DataConfig(dataset="someone/wiki", context_length=LENGTH, heldout_tokens=HELDOUT)
    for chosen in (whole, half):
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, data=chosen, **__: data)
        expected = counted(open_text(config, 0), model, config)
        text = open_text(config, 0)
        found = count_tokens(config, model.tokenizer, LENGTH, text) - config.heldout_tokens
        assert found == pytest.approx(expected, rel=0.05)


def test_a_cache_is_counted(monkeypatch, tmp_path):
    index = cached.make(monkeypatch, tmp_path / "cache", tokens=1000)
    data = DataConfig(activations=str(tmp_path / "cache"), layer=1, epochs=3)
    assert available_tokens(data, cached.LENGTH) == 3 * index.train_rows


def test_words():
    assert about(4_567_890) == "about 4,600,000" and about(7) == "about 7"
    assert in_words(12_345, 1) == "; about 12,000 tokens to train on"
    assert in_words(12_345, 2) == "; about 12,000 tokens to train on in 2 epochs"
    assert too_few(100, 100, 1) is None
    assert too_few(125_000_000, 10_000_000, 2) == (
        "--tokens is 125,000,000, and the text gives about 10,000,000: --epochs 26 would be enough"
    )
    assert too_few(100, 90) == "--tokens is 100, and the text gives about 90"


def test_a_run_says_at_the_start_that_it_will_end_early(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", documents(300))
    arguments = ["--dataset", str(path), "--tokens", "1M", "--context-length", str(LENGTH)]
    arguments += ["--heldout-tokens", str(HELDOUT), "--batch-size", "256", "--dict-size", "64"]
    arguments += ["--k", "4", "--eval-every", "0", "--device", "cpu"]
    assert main([*arguments, "--plan"]) == 0
    planned = " ".join(capsys.readouterr().out.split())
    assert "It would end early: --tokens is 1,000,000, and the text gives about" in planned
    assert re.search(r"time .* for about [\d,]+ tokens, all of the text: a token takes", planned)
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 2
    said, ended = capsys.readouterr()
    assert "It will end early: --tokens is 1,000,000, and the text gives about" in said
    available = int(said.split("the text gives about ")[1].split(":")[0].replace(",", ""))
    trained = int(ended.split("the data ended after ")[1].split()[0].replace(",", ""))
    assert trained == pytest.approx(available, rel=0.05)
    epochs = said.split("--epochs ")[1].split()[0]
    assert main([*arguments, "--plan", "--epochs", epochs]) == 0
    assert "end early" not in capsys.readouterr().out


def test_a_harvest_says_at_the_start_that_it_will_end_early(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", documents(300))
    arguments = ["--dataset", str(path), "--context-length", str(LENGTH), "--device", "cpu"]
    arguments += ["--heldout-tokens", str(HELDOUT), "--out", str(tmp_path / "cache")]
    assert harvest.main([*arguments, "--plan"]) == 0
    planned = " ".join(capsys.readouterr().out.split())
    assert "all of the text (it has about" in planned and "unknown" not in planned
    arguments += ["--tokens", "1M"]
    assert harvest.main([*arguments, "--plan"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "It would end early: --tokens is 1,000,000, and the text gives about" in printed
    assert "--epochs" not in printed
    assert harvest.main(arguments) == 0
    assert "It will end early: --tokens is 1,000,000" in capsys.readouterr().out
