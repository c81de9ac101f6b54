"""What comes from others runs no code, reaches no other file, and takes no memory beyond its size.

Models, datasets, caches, runs and SAEs may have been made by anyone. Each claim is tested here, or
in the test that `ELSEWHERE` names. Damage by accident is in the tests of each kind of file.
"""

import ast
import contextlib
import json
import resource
import shutil
import sys
from pathlib import Path

import cached
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from safetensors.torch import load_file
from tiny_models import save_model

import kronsae
import kronsae_kernels
from kronsae import SAE, InputError, SAEConfig
from kronsae.cache import CacheActivations, CacheIndex, Damaged, HarvestConfig, harvest
from kronsae.cache.index import ShardFile, damaged, read_tensors
from kronsae.config import MOST_LATENTS, MOST_WIDTH, DataConfig, RunConfig, TrainConfig
from kronsae.data import LanguageModel, open_text
from kronsae.data.loading import load_tokenizer
from kronsae.export.verify import heldout_tokens
from kronsae.interpret.local import LocalChat
from kronsae.metrics.target_model import load_sae, load_saes, open_heldout
from kronsae.plan.outline import outline
from kronsae.properties.run import open_run
from kronsae.registry import FORMATS
from kronsae.runs.folder import RunFolder, SweepFolder
from kronsae.runs.resume import open_to_resume
from kronsae.sources import open_activations
from kronsae.system.files import sha256
from kronsae.training import options as cli

ELSEWHERE = {
    "weights of a model are read from safetensors alone": (
        "test_data_language_model.py::test_only_safetensors"
    ),
    "a pickle is read on request alone, and then without running anything": (
        "test_interop.py::test_a_pickle_that_would_run_code_does_not"
    ),
    "names in a cache's index are those of shards, in its folder": (
        "test_cache.py::test_an_index_is_not_trusted"
    ),
    "a cache that claims more rows than its files hold takes no memory": (
        "test_cache.py::test_sizes_are_checked_before_memory_is_asked_for"
    ),
    "a harvest's folder cannot have code run when it is resumed": (
        "test_harvest.py::test_code_from_a_hub_is_not_trusted_by_a_file"
    ),
    "a checkpoint names no files but its own": (
        "test_parallel.py::test_a_checkpoint_names_no_files_but_its_own"
    ),
    "text of others is no markup in the pages that we write": (
        "test_report.py::test_everything_is_escaped"
    ),
}

PACKAGES = [Path(package.__file__).parent for package in (kronsae, kronsae_kernels)]
HUGE = 2**50


@pytest.mark.parametrize("test", ELSEWHERE.values(), ids=ELSEWHERE)
def test_what_is_tested_elsewhere_is(test):
    file, name = test.split("::")
    module = ast.parse((Path(__file__).parent / file).read_text(encoding="utf-8"))
    assert name in [node.name for node in module.body if isinstance(node, ast.FunctionDef)]


# No module runs what it reads

RUNS_CODE = {
    *("eval", "exec", "compile", "__import__", "open_code"),
    *("torch.load", "torch.hub.load", "torch.jit.load", "numpy.load", "yaml.load"),
    *("yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen", "runpy.run_path"),
}
MODULES = {"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy"}


def dangers(source):
    """(name, call) of what could run code that comes in a file; call is None for an import."""
    tree, names = ast.parse(source), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {each.asname or each.name.split(".")[0]: each.name for each in node.names}
            yield from ((e.name, None) for e in node.names if e.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}
            if node.module.split(".")[0] in MODULES:
                yield node.module, None
    for node in ast.walk(tree):
        # A reference is as good as a call: it can be handed on.
        if isinstance(node, ast.Name | ast.Attribute):
            name = _name(node, names)
            if name in RUNS_CODE:
                calls = [c for c in ast.walk(tree) if isinstance(c, ast.Call) and c.func is node]
                yield name, calls[0] if calls else None
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            if isinstance(node.value, ast.Constant) and node.value.value is not False:
                yield "trust_remote_code", None
        if isinstance(node, ast.arguments):
            given = [*node.posonlyargs, *node.args]
            pairs = [*zip(given[len(given) - len(node.defaults) :], node.defaults, strict=True)]
            pairs += zip(node.kwonlyargs, node.kw_defaults, strict=True)
            for argument, default in pairs:
                if argument.arg in ("trust_remote_code", "allow_pickle") and default is not None:
                    if not (isinstance(default, ast.Constant) and default.value is False):
                        yield argument.arg, None


def _name(node, names):
    """The full name of a.b.c, where a is what it was imported as; None for other expressions."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        before = _name(node.value, names)
        return before and f"{before}.{node.attr}"
    return None


BAD = [
    *("eval('1')", "f = exec", "import pickle", "from pickle import loads", "import joblib as j"),
    *("import torch as t; t.load('x')", "from torch import load\nload('x')"),
    *("import numpy as np; np.load('x', allow_pickle=True)", "import yaml; yaml.load('x')"),
    *("f(trust_remote_code=True)", "def f(*, trust_remote_code=True): pass"),
    *("def f(a, allow_pickle=1): pass", "def f():\n    import marshal as m"),
]


@pytest.mark.parametrize("source", BAD)
def test_the_search_finds(source):
    assert list(dangers(source))


def test_the_search_takes_nothing_else_for_it():
    calls = "sae.eval(); torch.save; json.load(f); re.compile; f(trust_remote_code=False)"
    assert not list(dangers(f"import torch, re\n{calls}"))


def test_no_module_unpickles_or_runs_what_it_reads():
    """But for pickles of SAEs, on request, where torch takes tensors alone, and arrays of numpy,
    which are refused if they hold objects.
    """
    found = [
        (path.relative_to(package.parent).as_posix(), name, call)
        for package in PACKAGES
        for path in sorted(package.rglob("*.py"))
        for name, call in dangers(path.read_text(encoding="utf-8"))
    ]
    safely = {
        ("kronsae/interop/gemma_scope.py", "numpy.load"): ("allow_pickle", False),
        ("kronsae/interop/stock.py", "torch.load"): ("weights_only", True),
    }
    assert [(path, name) for path, name, _ in found] == list(safely)
    for (*_, call), (argument, value) in zip(found, safely.values(), strict=True):
        [safe] = [word.value for word in call.keywords if word.arg == argument]
        assert safe.value is value


# Code that comes with a model is not run unless asked for


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "plain", "llama")


KINDS = {
    "a config": ("config.json", {"AutoConfig": "code.C"}, {"model_type": "unheard_of"}),
    "a model": ("config.json", {"AutoModelForCausalLM": "code.C"}, {}),
    "a tokenizer": ("tokenizer_config.json", {"AutoTokenizer": ["code.C", "code.C"]}, {}),
}
"""Which file names code, and how."""


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def hostile(request, plain_model, tmp_path, monkeypatch):
    """A model's folder with code that leaves a file `ran`, and that file."""
    file, auto_map, others = request.param
    # transformers copies the code there before it is run, and adds it to the path.
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "model"
    folder.mkdir()
    for path in plain_model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    settings = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**settings, **others, "auto_map": auto_map}))
    mark = tmp_path / "ran"
    (folder / "code.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    return folder, mark


def data(folder, tmp_path, **settings):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"w{i} w{i + 1} w2 w3"}) + "\n" for i in range(80)))
    sizes = {"context_length": 8, "heldout_tokens": 16, "buffer_tokens": 64}
    return DataConfig(model=str(folder), layer=0, dataset=str(text), **sizes, **settings)


def run_of(folder, tmp_path):
    """A run of the model, made by someone who trusts its code; with an SAE, of llama's width."""
    config = RunConfig(
        SAEConfig(d_model=32, heads=4, m=2, n=2, k=2),
        data(folder, tmp_path, trust_remote_code=True),
        TrainConfig(tokens=64, batch_size=16),
    )
    facts = {"config": config.to_dict(), "data": {}}
    run = RunFolder.create(tmp_path / "run", facts)
    SAE(config.sae).save(run.sae, facts)
    return run.path


def harvested(folder, tmp_path):
    harvest(HarvestConfig(data=data(folder, tmp_path), layers=(0,)), tmp_path / "cache")


def of_subject(folder, tmp_path):
    loaded = load_sae(str(run_of(folder, tmp_path)), {})
    open_heldout(loaded, "cpu")


def of_properties(folder, tmp_path):
    config = open_run(run_of(folder, tmp_path), {}, "cpu").data
    open_activations(config, batch_size=4, seed=0, device="cpu")


def of_export(folder, tmp_path):
    heldout_tokens(kronsae.load(run_of(folder, tmp_path)), 16)


def of_resumed(folder, tmp_path):
    config = cli.parse(["--resume", str(run_of(folder, tmp_path))]).config.data
    open_activations(config, batch_size=4, seed=0, device="cpu")


def of_config_file(folder, tmp_path):
    file = run_of(folder, tmp_path) / "config.json"
    config = cli.parse(["--config", str(file)]).config.data
    open_activations(config, batch_size=4, seed=0, device="cpu")


USES = {
    "a language model": lambda folder, tmp_path: LanguageModel.load(str(folder), layer=0),
    "training": lambda folder, tmp_path: open_activations(
        data(folder, tmp_path), batch_size=4, seed=0, device="cpu"
    ),
    "a plan": lambda folder, tmp_path: outline(data(folder, tmp_path)),
    "a harvest": harvested,
    "a chat": lambda folder, tmp_path: LocalChat(str(folder)),
    "a tokenizer": lambda folder, tmp_path: load_tokenizer(str(folder), {}),
    "an SAE's metadata": of_subject,
    "an SAE's metadata, when an export is verified": of_export,
    "a run's settings": of_properties,
    "a run that is resumed": of_resumed,
    "a file of settings": of_config_file,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_code_of_a_model_does_not_run(use, hostile, tmp_path):
    """Whoever wrote it into a run, an SAE or a file of settings; refused, or done without it."""
    folder, mark = hostile
    with contextlib.suppress(InputError):
        use(folder, tmp_path)
    assert not mark.exists()


def test_code_of_a_model_runs_when_asked_for(hostile):
    """Or the test before this one would show nothing."""
    folder, mark = hostile
    with contextlib.suppress(InputError):
        LanguageModel.load(str(folder), layer=0, trust_remote_code=True)
    assert mark.exists()


def test_who_gives_the_command_can_trust_the_code_of_a_run(plain_model, tmp_path):
    run = run_of(plain_model, tmp_path)
    assert not cli.parse(["--resume", str(run)]).config.data.trust_remote_code
    for flags in (["--resume", str(run)], ["--config", str(run / "config.json")]):
        assert cli.parse([*flags, "--trust-remote-code"]).config.data.trust_remote_code
    loaded = load_sae(str(run), {"trust_remote_code": True})
    assert loaded.data.trust_remote_code
    assert open_run(run, {"trust_remote_code": True}, "cpu")[1].trust_remote_code


def test_a_script_beside_a_dataset_does_not_run(tmp_path):
    folder, mark = tmp_path / "words", tmp_path / "ran"
    folder.mkdir()
    (folder / "words.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    (folder / "rows.jsonl").write_text('{"text": "some words"}\n' * 3)
    with contextlib.suppress(InputError):
        open_text(DataConfig(dataset=str(folder)), 0)
    assert list(open_text(DataConfig(dataset=str(folder / "rows.jsonl")), 0))
    assert not mark.exists()


# Files reach no others


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        cached.make(patch, folder, tokens=250)
    return folder


def test_a_shard_that_links_out_of_its_cache_is_refused(cache, tmp_path):
    """When the cache is opened, when it is verified, and when the shard is read."""
    folder = tmp_path / "cache"
    shutil.copytree(cache, folder)
    name, elsewhere = "train-00000.1.safetensors", tmp_path / "private"
    source = CacheActivations(folder, layer=2, batch_size=8)
    (folder / name).rename(elsewhere)
    (folder / name).symlink_to(elsewhere)
    with pytest.raises(Damaged, match=f"{name} is damaged .it is a link out of the cache"):
        CacheActivations(folder, layer=2, batch_size=8)
    with pytest.raises(Damaged, match="it is a link out of the cache"):
        list(source)
    assert damaged(folder, CacheIndex.open(folder))
    linked = tmp_path / "linked"
    linked.symlink_to(cache)  # the whole of it may lie anywhere
    assert list(CacheActivations(linked, layer=2, batch_size=8))


@pytest.mark.parametrize("name", ["../run", "{absolute}"])
def test_members_of_a_sweep_stay_in_its_folder(name, tmp_path):
    """Or going on with it would write to, and clear, other folders."""
    name = name.format(absolute=tmp_path / "run")
    (tmp_path / "sweep").mkdir()
    SweepFolder.create(tmp_path / "sweep", {name: {"config": {}, "data": {}}})
    assert (tmp_path / "run" / "config.json").exists()
    for opened in (open_to_resume, lambda path: load_saes([str(path)], {}, "cpu")):
        with pytest.raises(InputError, match="cannot be the name of a member of a sweep"):
            opened(tmp_path / "sweep")


# Sizes are held to the files before memory is asked for


@contextlib.contextmanager
def little_memory(mib=128):
    """No more than `mib` beyond what this process has."""
    [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmSize" in x]
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (int(line.split()[1]) * 1024 + mib * 2**20, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_memory_is_little():
    with little_memory(), pytest.raises(RuntimeError, match="allocate"):
        torch.empty(2**28)


OF_KRON = {"d_model": 8, "heads": 4, "m": 2, "n": 2, "k": 2}
SIZES = {
    "dict_size": {"heads": MOST_LATENTS // 4},
    "d_model": {"d_model": MOST_WIDTH},
    "both": {"heads": MOST_LATENTS // 4, "d_model": MOST_WIDTH},
    "d_target": {"d_target": MOST_WIDTH},
    "a head": {"heads": 1, "m": 2**17, "n": 2**17},
    "thresholds": {"heads": MOST_LATENTS // 4, "selection": "jumprelu"},
    "experts": {"heads": MOST_LATENTS // 4, "experts": MOST_LATENTS // 4},
    "groups": {"heads": MOST_LATENTS // 4, "objective": "matryoshka", "matryoshka_first": 4},
}


@pytest.mark.parametrize(
    "format, name",
    [("kronsae", name) for name in SIZES]
    + [("sae_lens", name) for name in SIZES if name != "d_target"],  # it has none of these
)
def test_a_configuration_of_any_size_takes_no_memory(format, name, tmp_path):
    """The SHA-256 and all else is that of the folder: only the sizes are not."""
    sae = SAE(SAEConfig(**OF_KRON))
    sae.config = SAEConfig(**OF_KRON | SIZES[name])
    folder = tmp_path / "sae"
    sae.save(folder) if format == "kronsae" else FORMATS[format].write(sae, folder)
    with little_memory(), pytest.raises(InputError, match="expected tensors"):
        kronsae.load(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"heads": HUGE // 4, "dict_size": HUGE},
        {"heads": 10**30},
        {"d_model": 2**62},
        {"d_target": HUGE},
    ],
    ids=str,
)
def test_a_configuration_beyond_any_size_is_refused(changes, tmp_path):
    SAE(SAEConfig(**OF_KRON)).save(tmp_path)
    path = tmp_path / "config.json"
    document = json.loads(path.read_text())
    document["sae"] |= changes
    del document["checksum"]
    path.write_text(json.dumps(document))
    with little_memory(), pytest.raises(InputError, match="expected"):
        kronsae.load(tmp_path)


def lying(tensors, path, *_, **__):
    """A safetensors file whose header claims a tensor of 2^52 bytes."""
    [name, *_] = tensors
    claim = {name: {"dtype": "F32", "shape": [HUGE], "data_offsets": [0, 4 * HUGE]}}
    header = json.dumps(claim).encode()
    Path(path).write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))


def long_header(tensors, path, *_, **__):
    """One whose header would be longer than any file."""
    Path(path).write_bytes((2**62).to_bytes(8, "little") + bytes(64))


LIES = {"a tensor": lying, "the header": long_header}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
@pytest.mark.parametrize("format", ["kronsae", "sae_lens", "sparsify"])
def test_tensors_of_any_claimed_size_take_no_memory(format, lie, tmp_path, monkeypatch):
    sae = SAE(SAEConfig(d_model=8, encoder="dense", dict_size=16, k=2))
    with monkeypatch.context() as patch:
        if format == "kronsae":
            patch.setattr(safetensors.torch, "save_file", lie)
            sae.save(tmp_path / "sae")
        else:
            FORMATS[format].write(sae, tmp_path / "sae")
            [weights] = (tmp_path / "sae").rglob("*.safetensors")
            lie({"W_enc": None}, weights)
    with little_memory(), pytest.raises(InputError, match="cannot be read"):
        kronsae.load(tmp_path / "sae")


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_shard_of_any_claimed_size_takes_no_memory(lie, tmp_path):
    """Also where the index claims the same."""
    path = tmp_path / "train-00000.0.safetensors"
    lie({"activations": None}, path)
    mark = ShardFile(path.name, path.stat().st_size, sha256(path))
    for rows in (2, HUGE):
        layout = {"activations": ("float32", (rows, 1))}
        with little_memory(), pytest.raises(Damaged, match="header"):
            read_tensors(tmp_path, mark, layout)


def test_what_a_cache_holds_is_all_that_is_read(cache):
    """The honest case of the tests before: with little memory it is read."""
    with little_memory():
        rows = torch.cat(list(CacheActivations(cache, layer=2, batch_size=64)))
    marks = [shard.activations[1].file for shard in CacheIndex.open(cache).train]
    assert len(rows) == sum(len(load_file(cache / mark)["activations"]) for mark in marks)
