"""Documents that people edit: every value of each kind, changed in every way, is used or refused.

For each change whatever reads the document either works or raises InputError.
"""

import copy
import json
import shutil
from functools import partial

import cached
import pytest
import torch

import kronsae
from kronsae import InputError, SAEConfig, TrainConfig
from kronsae.cache import CacheIndex, writer
from kronsae.config import DataConfig, RunConfig
from kronsae.data import loading
from kronsae.evaluate.__main__ import _entry
from kronsae.evaluate.judge import Judgement
from kronsae.experiments.grid import _earlier_runs
from kronsae.experiments.toy import Toy
from kronsae.explore.report import write_report
from kronsae.harvest import _of_earlier_version
from kronsae.hub import model_card
from kronsae.metrics.target_model import LoadedSAE, cache_of, data_of
from kronsae.model.massive import rule_of
from kronsae.properties import (
    MeasureConfig,
    Stored,
    load_properties,
    measure,
    save_properties,
)
from kronsae.registry import FORMATS
from kronsae.runs import sweep as sweeps
from kronsae.runs.folder import SweepFolder
from kronsae.train import fit
from kronsae.training.fit import fit_many
from kronsae.training.options import parse

DELETED = object()
LONG = "x" * 5000
VALUES = (DELETED, None, 5, "x", [], {}, True, -1, 10**30, 0.5, "", LONG, "a\0b", [5], {"x": 5})
RAW = ("1e999", "NaN", "-Infinity", "9" * 5000, "[" * 500 + "]" * 500, '"\\ud800"', "{'x': 1}")
"""What Python's own json module takes, and what it does not."""

MARK = "put another value here"


def places(value, path=()):
    """The paths of all values in a document; of a list those of the first two."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for i in range(min(2, len(value))):
            yield from places(value[i], (*path, i))


def changed(document, path, value):
    """A copy of the document with another value at a path, or without it."""
    if not path:
        return value
    new = copy.deepcopy(document)
    parent = new
    for key in path[:-1]:
        parent = parent[key]
    if value is DELETED:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    return new


def texts(document):
    """Name and text of each changed document."""
    for path in places(document):
        name = ".".join(map(str, path))
        for value in VALUES if len(path) < 3 else VALUES[:10]:
            if path or value is not DELETED:
                yield f"{name} = {str(value)[:20]}", json.dumps(changed(document, path, value))
        marked = json.dumps(changed(document, path, MARK))
        for raw in RAW if len(path) < 3 else RAW[:2]:
            yield f"{name} = {raw[:20]}", marked.replace(json.dumps(MARK), raw)
        if path and isinstance(path[-1], str):  # twice, with another value
            key = json.dumps(path[-1])
            twice = marked.replace(f"{key}: {json.dumps(MARK)}", f"{key}: 1, {key}: 2")
            yield f"{name} twice", twice


def check(path, document, read, broken_works=False):
    """`read()` works or raises InputError, for every change of the document at `path`.

    broken_works: whether what is no document may be passed over.
    """
    path.write_text(json.dumps(document))
    read()
    wrong = []
    for name, text in texts(document):
        path.write_text(text)
        try:
            read()
            works = True
        except InputError as error:
            works = False
            if not str(error).strip() or "Traceback" in str(error):
                wrong.append(f"{name}: message {error}")
        except BaseException as error:
            wrong.append(f"{name}: {type(error).__name__}: {str(error)[:100]}")
            continue
        broken = name.endswith(" twice") or any(name.endswith(f"= {raw[:20]}") for raw in RAW)
        if works and broken and not broken_works:
            wrong.append(f"{name}: works")
    path.write_text(json.dumps(document))
    assert not wrong, f"{len(wrong)} of them:\n" + "\n".join(wrong[:40])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run, as one of the embedded model is written."""
    torch.manual_seed(0)
    x = torch.randn(400, 16)
    sae = SAEConfig(d_model=16, heads=8, m=2, n=2, k=4)
    train = TrainConfig(tokens=400, batch_size=100)
    config = RunConfig(sae, DataConfig(layer=2), train).to_dict()
    data = {
        **{"source": "language model", "name": "embedded", "revision": None, "weights": "0"},
        **{"hookpoint": "model.layers.2", "d_model": 16, "dtype": "float32", "text": "0"},
        **{"context_length": 16, "context_begin": ["<s>"], "prepend_bos": True},
    }
    folder = tmp_path_factory.mktemp("runs") / "run"
    settings = {"config": config, "data": data}
    fit(sae, x, train, heldout=x[:50], out=folder, settings=settings)
    return folder


def document_of(path):
    document = json.loads(path.read_text())
    document.pop("checksum", None)
    return document


def use(folder):
    """What commands read in an SAE's configuration and metadata."""
    sae = kronsae.load(folder)
    x = torch.randn(3, sae.d_model)
    assert torch.isfinite(sae(x).x_hat).all()
    if (rule := rule_of(sae.metadata)) is not None:
        rule(x)
    model_card(sae, "me/it")
    loaded = LoadedSAE("it", str(folder), sae, data_of(sae, {}, "it"), cache_of(sae, {}, "cpu"))
    judgement = Judgement({}, torch.zeros(sae.dict_size), 3)
    json.dumps(_entry(loaded, judgement), allow_nan=False)


def test_an_sae(run, tmp_path):
    shutil.copytree(run / "sae", tmp_path / "sae")
    path = tmp_path / "sae" / "config.json"
    check(path, document_of(path), partial(use, tmp_path / "sae"))


def resumed(folder):
    try:
        parse(["--resume", str(folder), "--log-every", "5"])
    finally:
        for lock in folder.rglob(".lock"):
            lock.unlink()


@pytest.mark.slow
def test_a_run(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # with a copy to compare with
    path = tmp_path / "run" / "config.json"

    def read():
        problem = None
        for use in (
            lambda: write_report(path.parent),
            lambda: resumed(path.parent),
            lambda: parse(["--config", str(path)]),
            lambda: parse(["--iso-flops-of", str(path), "--tokens", "1M", "--m", "2"]),
        ):
            try:
                use()
            except InputError as error:
                problem = error
        if problem is not None:
            raise problem

    check(path, document_of(path), read)


@pytest.mark.slow
def test_a_run_beside_its_copy(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    [checkpoint] = (tmp_path / "run" / "checkpoints").iterdir()
    path = tmp_path / "run" / "config.json"
    check(path, document_of(path), lambda: resumed(tmp_path / "run"))
    for name in ("config.json", "state.json"):
        path = checkpoint / name
        check(path, document_of(path), lambda: resumed(tmp_path / "run"), broken_works=True)


def test_a_sweep(run, tmp_path):
    sae = SAEConfig(heads=8, m=2, n=2, k=4)
    train = TrainConfig(tokens=100, batch_size=50)
    fit_many([sae, sae], torch.randn(100, 16), train, out=tmp_path / "sweep")
    shutil.rmtree(tmp_path / "sweep" / "checkpoints")
    path = tmp_path / "sweep" / "sweep.json"

    def read():
        folder, _ = SweepFolder.open(path.parent)
        sweeps.markdown(folder.members())

    check(path, document_of(path), read)


SWEEP = [{"m": 2, "lr": 0.001, "name": "thin"}, {"selection": "relu", "l1_coefficient": 2.0}]
CONFIG = {
    "sae": {"m": 2, "k": 20, "selection": "relu", "selection_settings": {"l1_coefficient": 2.0}},
    "data": {"layer": 2, "dataset": "stdlib"},
    "train": {"tokens": 1e6, "lr": 1, "data_seed": None},
}


@pytest.mark.parametrize("change", [{"format": "x"}, {"format_version": 99}])
def test_settings_of_another_format(change, run, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(document_of(run / "config.json") | change))
    [name] = change
    for flags in (["--config"], ["--tokens", "1M", "--m", "2", "--iso-flops-of"]):
        with pytest.raises(InputError, match=f"config.json: {name}: expected .*, got"):
            parse([*flags, str(path)])


def test_files_of_settings(tmp_path):
    path = tmp_path / "it.json"
    check(path, SWEEP, lambda: parse(["--sweep", str(path)]))
    del CONFIG["sae"]["k"]
    check(path, CONFIG, lambda: parse(["--config", str(path)]))


@pytest.mark.slow
@pytest.mark.parametrize("library", ["sae_lens", "sparsify", "dictionary_learning"])
@pytest.mark.parametrize("kind", ["topk", "jumprelu", "kron"])
def test_other_libraries(library, kind, run, tmp_path):
    config = {
        "topk": SAEConfig(d_model=16, encoder="dense", dict_size=16, k=2),
        "jumprelu": SAEConfig(d_model=16, encoder="dense", dict_size=16, k=2, selection="jumprelu"),
        "kron": SAEConfig(d_model=16, heads=4, m=2, n=2, k=2),
    }[kind]
    sae = kronsae.SAE(config).eval()
    sae.metadata = kronsae.load(run).metadata
    try:
        folder = FORMATS[library].write(sae, tmp_path / "it")
    except InputError:
        pytest.skip(f"{library} cannot hold it")
    path = folder / FORMATS[library].config
    check(path, document_of(path), lambda: kronsae.load(folder, allow_pickle=True))


@pytest.mark.slow
def test_a_cache(monkeypatch, tmp_path):
    cached.make(monkeypatch, tmp_path / "cache")
    path = tmp_path / "cache" / "index.json"
    check(path, document_of(path), lambda: CacheIndex.open(path.parent).json())
    path = path.with_name("harvest.json")
    check(path, document_of(path), lambda: writer.stored_config(path.parent).to_dict())
    path.with_name("index.json").unlink()  # as if the harvest had not ended

    def read():
        _of_earlier_version(path.parent)
        assert CacheIndex.open(path.parent).planned >= 0

    check(path, document_of(path), read, broken_works=True)


def test_a_model_adapter(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "require", lambda *_: None)
    (tmp_path / "adapter_model.safetensors").touch()
    path = tmp_path / "adapter_config.json"
    check(path, {"base_model_name_or_path": "x"}, lambda: loading.source_of_model(str(tmp_path)))


def test_an_experiment(tmp_path):
    path = tmp_path / "toy.json"
    document = {"settings": {"device": "cpu"}, "made_with": {}, "runs": [{"seed": 0}]}

    def read():
        try:
            _earlier_runs(path, Toy(), Toy().recorded())
        except InputError as error:
            if "was made otherwise" not in str(error):
                raise

    check(path, document, read)


def test_properties(tmp_path):
    x = torch.randn(60, 16)
    sae = kronsae.SAE(SAEConfig(d_model=16, heads=4, m=2, n=2, k=4)).eval()
    ids, mask = torch.zeros(2, 30, dtype=torch.int64), torch.ones(2, 30, dtype=torch.bool)
    properties = measure(sae, [(ids, mask, x)], 5, MeasureConfig(tokens=60, sample=4))
    facts = {
        **{"sae_sha256": "0", "text": {"dataset": "stdlib"}, "settings": {"tokens": 60}},
        "summary": {},
    }
    save_properties(Stored(properties, None, None, facts), tmp_path / "it")
    path = tmp_path / "it" / "properties.json"
    check(path, document_of(path), lambda: load_properties(path.parent).examined)
