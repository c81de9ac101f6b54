"""Documents of every kind of file: held-out apart, seeded order, streaming, messages of errors."""

import bz2
import gzip
import json
import os
import shutil
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import datasets
import pandas
import pyarrow.parquet
import pytest

from kronsae.config import DataConfig
from kronsae.data import columns
from kronsae.data import text as text_module
from kronsae.data.activations import set_aside
from kronsae.data.loading import load_tokenizer
from kronsae.data.text import IndexedText, StreamedText, local_files, open_text
from kronsae.errors import InputError, Notice

TEXTS = [f"Document number {i}, with é and ∑." for i in range(7)]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """`datasets` keeps what it reads in a folder of the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def rows(texts, column="text"):
    return [{"id": i, column: text} for i, text in enumerate(texts)]


def jsonl(texts, column="text"):
    return "".join(json.dumps(row) + "\n" for row in rows(texts, column))


def write(path, texts, column="text"):
    """A file of the kind that its suffixes say, with a document (or row) for each text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = [suffix for suffix in path.suffixes if suffix not in (".gz", ".bz2")]
    (kind,) = kinds
    if kind in (".parquet", ".arrow", ".csv", ".tsv"):
        data = datasets.Dataset.from_list(rows(texts, column))
        if kind == ".parquet":
            data.to_parquet(path)
        elif kind == ".arrow":
            shutil.rmtree(path.parent / "saved", ignore_errors=True)
            data.save_to_disk(path.parent / "saved")
            os.replace(next((path.parent / "saved").glob("*.arrow")), path)
            shutil.rmtree(path.parent / "saved")
        else:
            data.to_csv(path, sep="\t" if kind == ".tsv" else ",", index=False)
        return path
    content = {
        ".jsonl": jsonl,
        ".json": lambda texts, column: json.dumps(rows(texts, column)),
        ".txt": lambda texts, column: "\n\n".join(texts) + "\n",
        ".md": lambda texts, column: "\n\n".join(texts) + "\n",
    }[kind](texts, column).encode()
    compress = {".gz": gzip.compress, ".bz2": bz2.compress}.get(path.suffix, bytes)
    path.write_bytes(compress(content))
    return path


IN_ORDER = {"heldout_order": "first", "shuffle_documents": 0}
"""Settings with which streams and held-out text have the order of the rows."""


def config(dataset, **settings):
    return DataConfig(dataset=str(dataset), **{**IN_ORDER, **settings})


def opened(dataset, seed=0, **settings):
    return open_text(config(dataset, **settings), seed)


def test_a_carriage_return_between_values_ends_no_line(tmp_path):
    for name, text in {
        "inside": '{"text": "one",\r"n": 1}\r\n{"text":\r"two"}\n',
        "between": '{"text": "one"}\r{"text": "two"}\r',
    }.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_bytes(text.encode())
        assert list(opened(path)) == ["one", "two"], name


def error(dataset, **settings):
    with pytest.raises(InputError) as caught:
        opened(dataset, **settings)
    return str(caught.value)


def stripped(texts):
    return [text.strip() for text in texts]


KINDS = [
    "a.txt",
    "a.md",
    "a.txt.gz",
    "a.jsonl",
    "a.jsonl.gz",
    "a.jsonl.bz2",
    "a.json",
    "a.parquet",
    "a.arrow",
    "a.csv",
    "a.tsv",
]


@pytest.mark.parametrize("streaming", [False, True], ids=["indexed", "streamed"])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file(tmp_path, name, streaming):
    text = opened(write(tmp_path / name, TEXTS), streaming=streaming)
    assert stripped(text.heldout()) == TEXTS
    assert sorted(stripped(text)) == TEXTS


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.csv"])
def test_another_column(tmp_path, name):
    path = write(tmp_path / name, TEXTS, column="body")
    assert sorted(opened(path, text_column="body")) == TEXTS
    message = error(path)
    assert "no column 'text'" in message and "['id', 'body']" in message
    assert "--text-column" in message


def test_a_folder_without_its_hidden_files(tmp_path):
    write(tmp_path / "sub" / "a.jsonl", TEXTS[:3])
    write(tmp_path / "b.jsonl.gz", TEXTS[3:])
    write(tmp_path / ".cache" / "c.jsonl", ["hidden"])
    write(tmp_path / ".d.jsonl", ["hidden"])
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert sorted(opened(tmp_path)) == TEXTS


def test_a_folder_that_is_hidden_itself(tmp_path):
    write(tmp_path / ".data" / "a.jsonl", TEXTS)
    assert sorted(opened(tmp_path / ".data")) == TEXTS


def test_a_glob(tmp_path):
    write(tmp_path / "x" / "a.jsonl", TEXTS[:3])
    write(tmp_path / "y" / "b.jsonl", TEXTS[3:])
    write(tmp_path / "y" / "c.json", ["another"])
    (tmp_path / "y" / "folder.jsonl").mkdir()
    assert sorted(opened(tmp_path / "**" / "*.jsonl")) == TEXTS


def test_a_comma_list_and_a_file_named_twice(tmp_path):
    first, second = write(tmp_path / "b.jsonl", TEXTS[:3]), write(tmp_path / "a.jsonl", TEXTS[3:])
    text = opened(f"{first}, {second},{tmp_path}/b.*")
    assert list(text.heldout()) == TEXTS


def test_a_comma_in_a_name(tmp_path):
    assert sorted(opened(write(tmp_path / "a, b.jsonl", TEXTS))) == TEXTS


def test_text_files_paragraphs_and_whole_files_together(tmp_path):
    """Of .txt each paragraph is a document, of several others each file."""
    write(tmp_path / "a.txt", TEXTS[:3])
    write(tmp_path / "b.md", TEXTS[3:5])
    write(tmp_path / "c.md", TEXTS[5:])
    expected = sorted([*TEXTS[:3], "\n\n".join(TEXTS[3:5]), "\n\n".join(TEXTS[5:])])
    for streaming in (False, True):
        assert sorted(stripped(opened(tmp_path, streaming=streaming))) == expected


def test_a_text_file_without_blank_lines_has_a_document_a_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(TEXTS), encoding="utf-8")
    assert sorted(stripped(opened(path))) == TEXTS


def test_a_saved_dataset(tmp_path):
    datasets.Dataset.from_list(rows(TEXTS)).save_to_disk(tmp_path / "saved")
    assert sorted(opened(tmp_path / "saved")) == TEXTS


def test_a_saved_dataset_of_several_splits(tmp_path):
    saved = datasets.Dataset.from_list(rows(TEXTS))
    datasets.DatasetDict(train=saved, test=saved).save_to_disk(tmp_path / "saved")
    assert "['test', 'train']" in error(tmp_path / "saved")
    assert sorted(opened(tmp_path / "saved" / "train")) == TEXTS


# Columns beside the text


BESIDE = {
    "a new column": [{"id": 1}, {"id": 2, "url": "x"}],
    "null, then text": [{"note": None}, {"note": "x"}],
    "number, then text": [{"id": 1}, {"id": "x7"}],
    "other keys": [{"meta": {"a": 1}}, {"meta": {"b": ["c"]}}],
}


@pytest.mark.parametrize("streaming", [False, True], ids=["indexed", "streamed"])
@pytest.mark.parametrize("beside", BESIDE.values(), ids=BESIDE)
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "arrow"])
def test_other_columns_may_be_anything(tmp_path, monkeypatch, kind, beside, streaming):
    """They change within a file, in another part of it than the first, and from file to file."""
    monkeypatch.setattr(columns, "JSON_BYTES", 100)
    monkeypatch.setattr(columns, "CSV_ROWS", 2)
    for number, texts in enumerate((TEXTS[:4], TEXTS[4:])):
        changes = number == 0 and kind in ("jsonl", "json", "csv")
        table = [{"text": t, **beside[i > 1 if changes else number]} for i, t in enumerate(texts)]
        path = tmp_path / f"{number}.{kind}"
        if kind == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in table))
        elif kind == "json":
            path.write_text(json.dumps(table))
        elif kind == "csv":
            pandas.DataFrame(table).to_csv(path, index=False)
        elif kind == "parquet":
            datasets.Dataset.from_list(table).to_parquet(path)
        else:
            write_arrow(path, pyarrow.Table.from_pylist(table))
    text = opened(tmp_path / f"*.{kind}", streaming=streaming)
    assert list(text.heldout()) == TEXTS


@pytest.mark.parametrize("streaming", [False, True], ids=["indexed", "streamed"])
@pytest.mark.parametrize("beside", BESIDE.values(), ids=BESIDE)
def test_other_columns_may_change_late_in_a_file(tmp_path, beside, streaming):
    """After the part that `datasets` takes their types from: 10 MiB of JSON, 10,000 rows of CSV."""
    texts = [f"{i} {'z' * 1_200_000}" for i in range(10)]
    table = [{"text": text, **beside[i > 8]} for i, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    assert list(opened(tmp_path / "a.jsonl", streaming=streaming).heldout()) == texts
    texts = [f"text {i}" for i in range(10_001)]
    table = [{"text": text, **beside[i > 9_999]} for i, text in enumerate(texts)]
    pandas.DataFrame(table).to_csv(tmp_path / "a.csv", index=False)
    assert list(opened(tmp_path / "a.csv", streaming=streaming).heldout()) == texts


def write_arrow(path, table):
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as out:
        out.write_table(table)
    return path


@pytest.mark.parametrize("streaming", [False, True], ids=["indexed", "streamed"])
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("dtype", ["string", "large_string", "string_view", "dictionary"])
def test_every_arrow_type_of_text(tmp_path, kind, dtype, streaming):
    texts = pyarrow.array([*TEXTS, None])
    texts = texts.dictionary_encode() if dtype == "dictionary" else texts.cast(dtype)
    path, table = tmp_path / f"a.{kind}", pyarrow.table({"id": range(8), "text": texts})
    if kind == "arrow":
        write_arrow(path, table)
    else:
        pyarrow.parquet.write_table(table, path)
    assert list(opened(path, streaming=streaming).heldout()) == [*TEXTS, ""]


@pytest.mark.parametrize("streaming", [False, True], ids=["indexed", "streamed"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "arrow"])
def test_text_that_begins_with_nulls(tmp_path, monkeypatch, kind, streaming):
    monkeypatch.setattr(columns, "JSON_BYTES", 20)
    monkeypatch.setattr(columns, "CSV_ROWS", 2)
    nulls = [None] * 4
    for number, texts in enumerate((nulls, TEXTS)):
        path = tmp_path / f"{number}.{kind}"
        if kind == "arrow":
            write_arrow(
                path, pyarrow.table({"id": range(len(texts)), "text": pyarrow.array(texts)})
            )
        else:
            write(path, texts)
    if kind in ("jsonl", "csv"):  # in one file, too
        write(tmp_path / f"1.{kind}", [*nulls, *TEXTS])
        nulls *= 2
    text = opened(tmp_path / f"*.{kind}", streaming=streaming)
    assert list(text.heldout()) == [*("" for _ in nulls), *TEXTS]


@pytest.mark.parametrize("streaming", [False, True], ids=["indexed", "streamed"])
@pytest.mark.parametrize(
    "content",
    [
        "\ufeff" + jsonl(TEXTS),
        "\n" + jsonl(TEXTS).replace("\n", "\r\n\r\n"),
        json.dumps(TEXTS),
        " \n" + json.dumps(rows(TEXTS), indent=2),
        "\n".join(json.dumps(row, indent=2) for row in rows(TEXTS)),
        "".join(json.dumps(row) for row in rows(TEXTS)),
        jsonl(TEXTS).replace('"id": 3', '"id": NaN'),
    ],
    ids=["mark", "blank lines", "strings", "indented list", "indented", "one line", "NaN"],
)
def test_every_form_of_json(tmp_path, content, streaming):
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    assert list(opened(tmp_path / "a.json", streaming=streaming).heldout()) == TEXTS


BAD_ROWS = {
    "number": ('{"text": 7}', "line 5, column 'text': expected text, got int 7"),
    "list": ('{"text": ["a"]}', "line 5, column 'text': expected text, got list"),
    "no object": ("7", "line 5: expected a JSON object, got int 7"),
    "cut off": ('{"text": "a', "line 5: it is not JSON"),
    "no UTF-8": (b'{"text": "caf\xe9"}', "line 5: it is not JSON .UnicodeDecodeError"),
    "surrogate": ('{"text": "\\ud800"}', "line 5: UnicodeEncodeError"),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["indexed", "streamed"])
@pytest.mark.parametrize("row, message", BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_named(tmp_path, monkeypatch, row, message, streaming):
    monkeypatch.setattr(columns, "JSON_BYTES", 100)
    path = tmp_path / "a.jsonl"
    row = row if isinstance(row, bytes) else row.encode()
    path.write_bytes(jsonl(TEXTS[:4]).encode() + row + b"\n" + jsonl(TEXTS[4:]).encode())
    with pytest.raises(InputError, match=f"a.jsonl, {message}") as caught:
        list(opened(path, streaming=streaming))
    assert "correct or remove it" in str(caught.value)


def test_a_bad_row_of_other_files_is_named(tmp_path):
    table = pyarrow.table({"text": pyarrow.array([b"a", b"b", b"\xe9"]).cast("string", safe=False)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    write_arrow(tmp_path / "a.arrow", pyarrow.table({"text": pyarrow.array(["a", "b"])}))
    (tmp_path / "a.csv").write_text("id,text\n1,a\n2,b,c,d\n")
    assert "a.parquet, row 3: UnicodeDecodeError" in error(tmp_path / "a.parquet")
    csv = error(tmp_path / "a.csv")
    assert "a.csv could not be read as csv" in csv and "line 3" in csv


@pytest.mark.parametrize("streaming", [False, True], ids=["indexed", "streamed"])
def test_another_column_is_advised_if_there_is_one(tmp_path, streaming):
    (tmp_path / "a.jsonl").write_text('{"text": 7, "body": "a"}')
    with pytest.raises(InputError, match=r"other columns are \['body'\]: name one with --text-col"):
        list(opened(tmp_path / "a.jsonl", streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True], ids=["indexed", "streamed"])
def test_rows_without_the_column_are_told_of(tmp_path, monkeypatch, streaming):
    monkeypatch.setattr(columns, "JSON_BYTES", 100)
    path = tmp_path / "a.jsonl"
    others = '{"text": null}\n{"body": "a"}\n'
    path.write_text(jsonl(TEXTS[:4]) + others + jsonl(TEXTS[4:]) + others)
    with pytest.warns(
        Notice, match=r"a.jsonl: 4 of \d+ rows have no text in the column 'text', and"
    ):
        assert [text for text in opened(path, streaming=streaming).heldout() if text] == TEXTS


@pytest.mark.parametrize("streaming", [False, True], ids=["indexed", "streamed"])
def test_a_file_without_text(tmp_path, streaming):
    for name, rows in {"blank": "\n \n", "empty": '{"text": ""}\n{"text": null}'}.items():
        (tmp_path / f"{name}.jsonl").write_text(rows)
    with pytest.raises(InputError, match=r"blank\.jsonl' is empty"):
        opened(tmp_path / "blank.jsonl", streaming=streaming)
    text = opened(tmp_path / "empty.jsonl", streaming=streaming)
    config = DataConfig(dataset="mine", context_length=8)
    with pytest.raises(InputError, match="dataset 'mine': there is no text in its 2 rows"):
        set_aside(text, load_tokenizer("embedded", {}), config)


def test_a_later_file_without_the_column(tmp_path):
    write(tmp_path / "a.jsonl", TEXTS)
    write(tmp_path / "b.jsonl", TEXTS, column="content")
    message = error(tmp_path / "*.jsonl")
    assert "b.jsonl has no column 'text': it has ['id', 'content']" in message


def test_numbers_are_no_text_in_csv_either(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,text\n1,a\n2,3\n")
    assert sorted(opened(path)) == ["3", "a"]
    assert "column 'id': expected text, got numbers" in error(path, text_column="id")


def test_a_name_with_signs_of_a_glob(tmp_path):
    assert sorted(opened(write(tmp_path / "a[1].jsonl", TEXTS))) == TEXTS


def test_a_changed_file_is_read_again(tmp_path):
    path = write(tmp_path / "a.jsonl", TEXTS)
    assert len(list(opened(path))) == 7
    write(path, TEXTS[:3])
    assert sorted(opened(path)) == TEXTS[:3]


def test_zstandard(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"something")

    def missing(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr("kronsae.errors.metadata.version", missing)
    assert error(path).endswith("a.jsonl.zst' needs the package zstandard: pip install zstandard")
    monkeypatch.undo()
    zstandard = pytest.importorskip("zstandard")
    path.write_bytes(zstandard.compress(jsonl(TEXTS).encode()))
    for streaming in (False, True):
        assert list(opened(path, streaming=streaming).heldout()) == TEXTS


# Held-out documents, order, position


@pytest.mark.parametrize("streaming", [False, True], ids=["indexed", "streamed"])
def test_held_out_documents_are_the_same_for_every_seed_and_never_trained_on(tmp_path, streaming):
    path = write(tmp_path / "a.jsonl", TEXTS)
    for seed in (0, 1):
        text = opened(path, seed=seed, streaming=streaming, epochs=2)
        assert list(text.heldout())[:3] == TEXTS[:3]
        text.hold_out(3)
        assert sorted(text) == sorted(TEXTS[3:] * 2)


def test_every_document_once_an_epoch_in_a_seeded_order(tmp_path):
    path = write(tmp_path / "a.jsonl", [f"{i:03}" for i in range(100)])
    first, again, other = (list(opened(path, seed=seed, epochs=2)) for seed in (0, 0, 1))
    assert first == again != other
    one, two = first[:100], first[100:]
    assert one != sorted(one) and sorted(one) == sorted(two) and one != two


@pytest.mark.parametrize("streaming", [False, True], ids=["indexed", "streamed"])
@pytest.mark.parametrize("empty", [None, "", " \n"], ids=["null", "empty", "white"])
def test_rows_without_text_are_passed_over(tmp_path, empty, streaming):
    path = write(tmp_path / "a.jsonl", ["one", empty, "two", "three", empty])
    text = opened(path, streaming=streaming)
    assert list(text.heldout()) == ["one", "", "two", "three", ""]
    text.hold_out(2)  # rows, so that "two" is the first to train on
    assert sorted(text) == ["three", "two"]


@pytest.mark.parametrize("streaming", [False, True], ids=["indexed", "streamed"])
@pytest.mark.parametrize("name", ["*.jsonl", "*.txt", "*.parquet"])
def test_resume_at_every_document(tmp_path, name, streaming):
    for i in range(3):
        texts = [f"{i} {j}" for j in range(5)]
        texts.insert(2, "" if "txt" in name else None)
        path = tmp_path / name.replace("*", f"{i}")
        write(path, [text or "" for text in texts] if "txt" in name else texts)

    def fresh():
        text = opened(tmp_path / name, streaming=streaming, epochs=2)
        text.hold_out(2)
        return text

    whole = list(fresh())
    assert len(whole) == 26
    for after in range(len(whole) + 1):
        text, resumed = fresh(), fresh()
        documents = iter(text)
        for _ in range(after):
            next(documents)
        resumed.load_state_dict(json.loads(json.dumps(text.state_dict())))
        assert list(resumed) == whole[after:], after
        text.load_state_dict(fresh().state_dict())  # one in use goes back to the beginning
        assert list(text) == whole, after


@pytest.mark.parametrize("indexed", [False, True], ids=["alone", "with an index"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.txt"])
def test_a_stream_goes_on_from_a_position_of_datasets_own_readers(
    tmp_path, monkeypatch, name, indexed
):
    """Earlier versions saved those. They do not depend on whether the files are indexed as well."""
    monkeypatch.setattr(columns, "JSON_BYTES", 100)
    paths = [write(tmp_path / str(i) / name, [f"{i} {j}" for j in range(9)]) for i in range(2)]
    kind, options = text_module.kind_of_file(paths[0]), {"data_files": list(map(str, paths))}
    options |= {"chunksize": 100} if kind == "json" else {}
    options |= {"sample_by": "paragraph"} if kind == "text" else {}
    stream = datasets.load_dataset(kind, split="train", streaming=True, **options)
    if indexed:
        opened(tmp_path / "*" / name)
    expected = [f"{i} {j}" for i in range(2) for j in range(9)][2:]
    for after in range(len(expected)):
        before = StreamedText(stream, "text", epochs=1, fingerprint="")
        before.hold_out(2)
        documents = iter(before)
        read = [next(documents) for _ in range(after)]
        text = opened(tmp_path / "*" / name, streaming=True)
        text.hold_out(2)
        text.load_state_dict(before.state_dict())
        assert stripped([*read, *text]) == expected, after


def test_a_position_is_gone_to_without_reading_what_comes_before():
    read = []

    class Watched(list):
        def __getitem__(self, row):
            read.append(row)
            return super().__getitem__(row)

    text = IndexedText(Watched(TEXTS), None, seed=0, epochs=1, fingerprint="")
    text.load_state_dict({"epoch": 0, "position": 6})
    assert len(list(text)) == len(read) == 1


# Fingerprints


def test_fingerprint_is_of_the_contents_not_of_the_place(tmp_path):
    write(tmp_path / "x" / "a.jsonl", TEXTS)
    shutil.copytree(tmp_path / "x", tmp_path / "y" / "z")
    os.utime(tmp_path / "y" / "z" / "a.jsonl", (1, 1))
    marks = {opened(tmp_path / folder, streaming=s).fingerprint() for folder in ("x", "y/z")
             for s in (False, True)}  # fmt: skip
    assert len(marks) == 1
    write(tmp_path / "x" / "a.jsonl", [*TEXTS[:-1], TEXTS[-1].replace("6", "9")])  # as long
    assert opened(tmp_path / "x").fingerprint() not in marks


def test_fingerprint_of_a_large_file_has_its_size_and_both_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "HASHED_WHOLE_BYTES", 100)
    monkeypatch.setattr(text_module, "HASHED_END_BYTES", 10)

    def mark(content):
        (tmp_path / "a.txt").write_text(content)
        return text_module.content_hash(tmp_path / "a.txt")

    base = "a" * 1000
    others = ["b" + base[1:], base[:-1] + "b", base + "a"]
    assert len({mark(content) for content in (base, *others)}) == 4


def test_fingerprint_of_the_standard_library_is_of_its_texts(monkeypatch):
    def mark(text):
        def documents(heldout):
            return [{"path": "a.py", "text": "held"} if heldout else {"path": "b.py", "text": text}]

        monkeypatch.setattr(text_module, "stdlib_documents", documents)
        return opened("stdlib").fingerprint()

    assert mark("abc") == mark("abc") != mark("abd")


def test_the_standard_library_keeps_its_own_documents_apart():
    text = opened("stdlib")
    heldout = set(text.heldout())
    text.hold_out(1)
    training = set(text)
    assert len(heldout) > 10 and len(training) > 100
    assert not heldout & training


def test_fingerprint_of_a_stream_from_the_hub_is_of_its_beginning(monkeypatch):
    def mark(texts):
        stream = datasets.Dataset.from_list(rows(texts)).to_iterable_dataset()
        monkeypatch.setattr(datasets, "load_dataset", lambda *_args, **_settings: stream)
        text = opened("someone/wiki", streaming=True)
        assert list(text) == texts
        return text.fingerprint()

    assert mark(TEXTS) == mark(TEXTS) != mark(["changed", *TEXTS[1:]])


# Errors


def test_nothing_to_train_on(tmp_path):
    for streaming in (False, True):
        text = opened(write(tmp_path / "a.jsonl", ["one", "two", ""]), streaming=streaming)
        text.hold_out(1)
        assert list(text) == ["two"]
        text = opened(tmp_path / "a.jsonl", streaming=streaming)
        with pytest.raises(InputError, match="nothing left to train on.*fewer --heldout-tokens"):
            text.hold_out(3)


def test_no_such_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for dataset in (tmp_path / "a.jsonl", "./folder", "a.txt", "~/no/such/folder", "a.csv"):
        assert f"there is no file or folder '{dataset}'" in error(dataset)
    write(tmp_path / "here.jsonl", TEXTS)
    assert "'not-here'" in error("here.jsonl,not-here")


def test_a_folder_without_files_is_no_hub_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("wiki").mkdir()
    assert "no file in the folder wiki ends in one of" in error("wiki")
    Path("wiki/.hidden.txt").write_text("hidden")
    Path("wiki/picture.png").write_text("")
    assert ".jsonl" in error("wiki")


def test_a_glob_that_matches_no_file(tmp_path):
    (tmp_path / "folder").mkdir()
    assert "no file matches" in error(tmp_path / "f*")


def test_files_of_several_kinds(tmp_path):
    write(tmp_path / "a.jsonl", TEXTS)
    write(tmp_path / "b.parquet", TEXTS)
    write(tmp_path / "c.parquet", TEXTS)
    message = error(tmp_path)
    assert "1 json (a.jsonl" in message and "2 parquet (b.parquet" in message and "glob" in message


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_empty_files(tmp_path, name):
    (tmp_path / name).write_text("")
    assert "is empty" in error(tmp_path / name)


def test_files_that_are_broken(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    message = error(tmp_path / "a.parquet")
    assert "a.parquet could not be read as parquet" in message and "magic bytes" in message


def test_text_that_is_no_utf_8(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    assert "UnicodeDecodeError" in error(tmp_path / "a.txt")


@pytest.mark.parametrize("streaming", [False, True], ids=["indexed", "streamed"])
@pytest.mark.parametrize(
    "value, kind",
    [({"a": "b"}, "struct|dict"), (["a", "b"], "list"), (3, "int")],
    ids=["struct", "list", "number"],
)
def test_columns_that_are_no_text(tmp_path, value, kind, streaming):
    for name in ("a.jsonl", "a.parquet"):
        path = write(tmp_path / name, [value, value])
        with pytest.raises(InputError, match=f"column 'text': expected text, got ({kind})"):
            opened(path, streaming=streaming)


@pytest.mark.parametrize(
    "settings, flag",
    [({"split": "test"}, "--split"), ({"dataset_config": "en"}, "--dataset-config")],
    ids=["split", "config"],
)
def test_settings_without_effect_on_files(tmp_path, settings, flag):
    message = error(write(tmp_path / "a.jsonl", TEXTS), **settings)
    assert f"{flag} " in message and "no effect on local files" in message


@pytest.mark.parametrize("settings", [{"split": "test"}, {"text_column": "code"}])
def test_settings_without_effect_on_the_standard_library(settings):
    assert "no effect with dataset 'stdlib'" in error("stdlib", **settings)


# The hub


def test_a_hub_name_is_no_file():
    assert local_files("roneneldan/TinyStories") == local_files("wikitext") == []


def test_a_hub_dataset_without_a_network():
    message = error("nobody-at-all/nothing-like-it")
    assert "'nobody-at-all/nothing-like-it' is no local file or folder" in message
    assert "Hugging Face hub" in message


def test_the_list_of_configurations_is_shown(monkeypatch):
    def load_dataset(*_args, **_settings):
        names = [f"config-{i}" for i in range(1000)]
        raise ValueError(
            f"Config name is missing.\nPlease pick one among the available configs: {names}\n"
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = error("someone/wiki")
    assert "Config name is missing" in message and "['config-0', 'config-1', " in message
    assert "--dataset-config" in message
    assert "\n" not in message and len(message) < 1300


def test_a_hub_dataset_whose_other_columns_change_can_be_read_from_its_files(monkeypatch):
    def load_dataset(*_args, **_settings):
        raise ValueError("Couldn't cast\nid: string\nto\n{'id': Value('int64')}")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert "hf download --repo-type dataset NAME" in error("someone/wiki")


def test_a_hub_dataset_takes_its_settings(monkeypatch):
    asked = []

    def load_dataset(*names, **settings):
        asked.append((names, settings))
        return datasets.Dataset.from_list(rows(TEXTS, "body"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    text = opened("someone/wiki", dataset_config="en", split="test", text_column="body")
    assert sorted(text) == TEXTS
    assert asked == [(("someone/wiki", "en"), {"split": "test", "streaming": False})]


def test_a_stream_that_breaks_off(monkeypatch):
    def generate():
        for _ in range(20):
            yield {"text": "one"}
        raise ConnectionError("the network is gone")

    stream = datasets.IterableDataset.from_generator(generate)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_args, **_settings: stream)
    text = opened("someone/wiki", streaming=True)
    with pytest.raises(InputError, match="'someone/wiki'.*the network is gone"):
        list(text)


# What `datasets` does beside


@pytest.mark.parametrize("enabled", [True, False])
def test_progress_bars_are_left_as_they_were(tmp_path, enabled, capsys):
    (datasets.enable_progress_bars if enabled else datasets.disable_progress_bars)()
    opened(write(tmp_path / "a.jsonl", TEXTS))
    assert datasets.are_progress_bars_disabled() is not enabled
    (tmp_path / "b.parquet").write_bytes(b"broken")
    error(tmp_path / "b.parquet")
    assert datasets.are_progress_bars_disabled() is not enabled
    assert not capsys.readouterr().err
