"""Suites: SAEs at several hookpoints that one pass of the language model feeds."""

import copy
import dataclasses
import itertools
import json
import shutil
import signal

import pytest
import torch
from rich.console import Console
from test_parallel import start as start_ranks
from test_sweep import files, timeless
from test_train import SMALL, _wait_for, finish, start

import kronsae
import kronsae.export.__main__ as export
from kronsae import InputError, SAEConfig, TrainConfig, harvest
from kronsae.config import DataConfig
from kronsae.data.language_model import LanguageModel
from kronsae.errors import Notice
from kronsae.explore.sweep_report import write_sweep_report
from kronsae.interop.suite import subfolder_of
from kronsae.runs.folder import SweepFolder, saved_members
from kronsae.sources import open_hookpoints
from kronsae.system import checkpoint, parallel
from kronsae.train import fit, fit_many
from kronsae.training.options import parse
from kronsae.training.progress import ProgressBar

WIDTHS = {"early": 24, "late": 40}
ROWS = 2000


def rows(width, seed, count=ROWS):
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(64, width, generator=generator)
    active = torch.rand(count, 64, generator=generator) < 0.05
    return (active * torch.rand(count, 64, generator=generator)) @ directions


X = {name: rows(width, width) for name, width in WIDTHS.items()}
HELDOUT = {name: rows(width, width, ROWS + 200)[ROWS:] for name, width in WIDTHS.items()}
TRAIN = TrainConfig(
    tokens=1500, batch_size=100, lr=3e-3, log_every=4, eval_every=8, checkpoint_every=4
)
SAES = {
    "early-kron": SAEConfig(heads=8, m=2, n=4, k=4),
    "late-dense": SAEConfig(encoder="dense", dict_size=96, k=8),
    "early-dense": SAEConfig(encoder="dense", dict_size=64, k=4),
}
AT = {name: name.partition("-")[0] for name in SAES}


def suite(activations=None, train=TRAIN, **options):
    """The results of a suite, by member."""
    results = fit_many(
        list(SAES.values()),
        X if activations is None else activations,
        train,
        names=list(SAES),
        hookpoints=list(AT.values()),
        **options,
    )
    return dict(zip(SAES, results, strict=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an uninterrupted suite."""
    out = tmp_path_factory.mktemp("whole") / "suite"
    suite(heldout=HELDOUT, out=out)
    return out


# From tensors


@pytest.mark.parametrize("name", SAES)
def test_each_member_is_what_it_is_alone(name, whole, tmp_path):
    alone = fit(SAES[name], X[AT[name]], TRAIN, heldout=HELDOUT[AT[name]], out=tmp_path / "run")
    weights, records = files(whole, [name])[name]
    assert (tmp_path / "run" / "sae" / "sae.safetensors").read_bytes() == weights
    assert timeless(alone.history) == records
    assert kronsae.load(whole / name).d_model == WIDTHS[AT[name]]


@pytest.mark.parametrize("stop_after", [1, 6, 14])
def test_a_signal_saves_all_and_resume_is_bit_for_bit(stop_after, whole, tmp_path):
    def interrupt(name, record):
        if record["step"] == stop_after and name == "late-dense":
            signal.raise_signal(signal.SIGTERM)

    every_step = dataclasses.replace(TRAIN, log_every=1)
    part = suite(train=every_step, heldout=HELDOUT, out=tmp_path, on_record=interrupt)
    assert {r.stopped_by for r in part.values()} == {signal.SIGTERM}
    streams = {
        path.name: checkpoint.list_checkpoints(path) for path in (tmp_path / "streams").iterdir()
    }
    assert streams.keys() == WIDTHS.keys()
    assert all(checkpoint.step_of(steps[-1]) == stop_after for steps in streams.values())
    suite(heldout=HELDOUT, out=tmp_path, resume=True)
    for name, (weights, _) in files(tmp_path, SAES).items():
        assert weights == files(whole, [name])[name][0]


def test_a_step_counts_once_all_streams_and_members_have_it(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "suite")
    newest = checkpoint.list_checkpoints(whole / "checkpoints")[-1].name
    shutil.rmtree(tmp_path / "suite" / "streams" / "late" / newest)
    suite(heldout=HELDOUT, out=tmp_path / "suite", resume=True)
    for name, (weights, records) in files(tmp_path / "suite", SAES).items():
        assert (weights, records) == files(whole, [name])[name]


def test_only_the_newest_states_of_streams_are_kept(whole):
    steps = [path.name for path in checkpoint.list_checkpoints(whole / "checkpoints")]
    assert len(steps) == 2
    for stream in (whole / "streams").iterdir():
        assert [path.name for path in checkpoint.list_checkpoints(stream)] == steps


def test_iterables_are_read_in_step():
    """A batch of each hookpoint a step; they resume by being skipped."""

    def batches(name):
        return list(X[name].split(100))

    found = suite({name: batches(name) for name in X})
    alone = fit(SAES["late-dense"], batches("late"), TRAIN)
    assert torch.equal(found["late-dense"].sae.W_dec, alone.sae.W_dec)


def test_sources_that_do_not_give_the_same_tokens_are_refused():
    with pytest.raises(InputError, match="late: the data ended after 1,000 .*others go on"):
        suite({"early": X["early"].split(100), "late": X["late"][:1000].split(100)})
    with pytest.raises(InputError, match="expected batches of the same tokens at each hookpoint"):
        suite({"early": X["early"].split(100), "late": X["late"].split(99)})


def test_bad_mappings_are_refused(tmp_path):
    for activations, words in (
        (
            {"early": X["early"]},
            r"activations: .*\['early', 'late'\].* got one that has \['early'\]",
        ),
        (X["early"], r"activations: expected a mapping .* got no mapping"),
        ({**X, "late": X["late"][:, :0]}, "activations: expected a floating tensor"),
        ({**X, "late": X["late"][:100]}, "as many rows for each hookpoint.* 'late' 100"),
    ):
        with pytest.raises(InputError, match=words):
            suite(activations, out=tmp_path / "suite")
    with pytest.raises(InputError, match="heldout: expected a mapping"):
        suite(heldout=HELDOUT["early"], out=tmp_path / "suite")
    with pytest.raises(InputError, match="none: fit_many names them in `hookpoints`"):
        fit_many([SAES["early-kron"]], X, TRAIN)
    with pytest.raises(InputError, match="'a/b' cannot be the name"):
        fit_many([SAES["early-kron"]], {"a/b": X["early"]}, TRAIN, hookpoints=["a/b"])
    with pytest.raises(InputError, match=r"heldout: expected floating activations \[t, 40\]"):
        suite(heldout={**HELDOUT, "late": HELDOUT["early"]}, out=tmp_path / "suite")
    assert not (tmp_path / "suite").exists()


def test_a_member_may_diverge_and_the_others_go_on():
    wild = dataclasses.replace(TRAIN, lr=1e30)
    results = fit_many(
        [SAES["early-kron"], SAES["late-dense"]], X, [wild, TRAIN], hookpoints=["early", "late"]
    )
    assert results[0].failed and not results[1].failed
    assert results[1].tokens == TRAIN.tokens


# From a language model

TEXTS = [f"word{i} is the name of number {i}, and so on {i % 7}" * 3 for i in range(400)]
DATA = DataConfig(
    **{"layer": 1, "context_length": 32, "contexts_per_batch": 4, "buffer_tokens": 512},
    **{"heldout_tokens": 128, "model_dtype": "float32"},
)
POINTS = {
    "layer1": DATA,
    "layer3": dataclasses.replace(DATA, layer=3),
    "mlp": dataclasses.replace(DATA, layer=None, hookpoint="gpt_neox.layers.2.mlp"),
    "transcoder": dataclasses.replace(
        DATA, layer=None, hookpoint="gpt_neox.layers.0.mlp", target_hookpoint="gpt_neox.layers.2"
    ),
}


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


@pytest.fixture
def points(jsonl):
    return {name: dataclasses.replace(data, dataset=jsonl) for name, data in POINTS.items()}


def opened(points, **settings):
    return open_hookpoints(points, batch_size=64, seed=3, device="cpu", **settings)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("overlap", ["off", "on"])
def test_each_hookpoint_gives_what_it_gives_alone(points, overlap):
    points = {n: dataclasses.replace(data, overlap=overlap) for n, data in points.items()}
    together = opened(points)
    batches = dict(
        zip(together, zip(*zip(*together.values(), strict=True), strict=True), strict=True)
    )
    for name, data in points.items():
        [alone] = opened({name: data}).values()
        assert (together[name].d_model, together[name].d_target) == (alone.d_model, alone.d_target)
        assert together[name].describe() == alone.describe()
        assert together[name].heldout_activations().equal(alone.heldout_activations())
        expected = list(alone)
        assert len(expected) > 20
        for got, truth in zip(batches[name], expected, strict=True):
            assert got.equal(truth)
        alone.close()
    next(iter(together.values())).close()


def test_the_blocks_run_once_a_pass(points, monkeypatch):
    count = []
    run = LanguageModel._run
    monkeypatch.setattr(LanguageModel, "_run", lambda *a: count.append(1) or run(*a))
    together = opened(points)
    count.clear()
    for _ in zip(*together.values(), strict=True):
        pass
    assert len(count) == together["mlp"].forwards > 5


SLOW = pytest.mark.slow


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 7, 20])
def test_hookpoints_go_on_from_any_batch(points, after):
    """Also each alone, from its own state."""
    together = opened(points)
    for _ in itertools.islice(zip(*together.values(), strict=True), after):
        pass
    states = copy.deepcopy({name: source.state_dict() for name, source in together.items()})
    expected = {name: torch.cat(list(source)) for name, source in together.items()}
    again = opened(points)
    for name, state in states.items():
        again[name].load_state_dict(state)
    for name, source in again.items():
        assert torch.cat(list(source)).equal(expected[name])
        [alone] = opened({name: points[name]}).values()
        alone.load_state_dict(states[name])
        assert torch.cat(list(alone)).equal(expected[name])


@pytest.mark.slow
def test_a_process_keeps_rows_of_its_own_hookpoints_alone(points):
    receivers = {"layer1": {1}, "layer3": {0, 1}, "mlp": {0}, "transcoder": {1}}
    sources = opened(points, receivers=receivers)
    assert sources["mlp"].own == [1, 2]
    mine = list(zip(sources["layer3"], sources["mlp"], strict=True))
    [alone] = opened({"mlp": points["mlp"]}).values()
    assert torch.cat([y for _, y in mine]).equal(torch.cat(list(alone)))


def test_the_same_hookpoint_twice_is_refused(points):
    twice = {"a": points["layer1"], "b": points["layer1"]}
    with pytest.raises(InputError, match="gpt_neox.layers.1' is named twice"):
        opened(twice)


# The command line

SUITE = [*SMALL, "--tokens", "3000", "--layer", "0-1", "--encoder", "kron", "dense"]
MEMBERS = ("layer0-kron", "layer0-dense", "layer1-kron", "layer1-dense")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "suite"
    status, printed, err = finish(*SUITE, "--out", out)
    assert status == 0, err
    return out, printed


def test_a_suite_of_layers(trained):
    out, printed = trained
    assert {path.name for path in out.iterdir() if path.is_dir()} == {
        *("checkpoints", "streams", *MEMBERS)
    }
    for name in MEMBERS:
        data = json.loads((out / name / "config.json").read_text())["config"]["data"]
        assert data["layer"] == int(name[5]) and name in printed
        assert (out / name / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["layer0-dense", "layer1-kron"])
def test_a_members_config_repeats_it_alone(name, trained, tmp_path):
    out, _ = trained
    status, _, err = finish("--config", out / name / "config.json", "--out", tmp_path / "run")
    assert status == 0, err
    weights = [(f / "sae" / "sae.safetensors").read_bytes() for f in (out / name, tmp_path / "run")]
    assert weights[0] == weights[1]


def places(arguments):
    members = parse(arguments).members
    return {
        name: (c.data.layer, c.data.hookpoint, c.data.target_hookpoint)
        for name, c in members.items()
    }


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--layer", "0-2"], {f"layer{n}": (n, None, None) for n in range(3)}),
        (["--layer", "3", "1-2", "2"], {f"layer{n}": (n, None, None) for n in (3, 1, 2)}),
        (["--layer", "all"], {f"layer{n}": (n, None, None) for n in range(4)}),
        (["--layer", "2-2"], {"sae": (2, None, None)}),
        (
            ["--hookpoint", "gpt_neox.layers.*.mlp"],
            {
                f"gpt_neox.layers.{n}.mlp": (None, f"gpt_neox.layers.{n}.mlp", None)
                for n in range(4)
            },
        ),
        (
            ["--hookpoint", "*.[01].attention", "--target-hookpoint", "*.[01].mlp"],
            {
                f"gpt_neox.layers.{n}.attention-gpt_neox.layers.{n}.mlp": (
                    *(None, f"gpt_neox.layers.{n}.attention", f"gpt_neox.layers.{n}.mlp"),
                )
                for n in range(2)
            },
        ),
    ],
)
def test_which_hookpoints_flags_name(arguments, expected):
    assert places(arguments) == expected


def test_layers_multiply_a_sweep_and_stand_first_in_names():
    members = parse(["--k", "8", "16", "--layer", "1", "3"]).members
    assert list(members) == ["layer1-k8", "layer1-k16", "layer3-k8", "layer3-k16"]
    assert members["layer3-k8"].data.layer == 3 and members["layer3-k8"].sae.k == 8


def test_a_sweep_file_gives_each_layer_its_own_k_and_size(tmp_path):
    entries = [{"layer": 1, "k": 8}, {"layer": 3, "k": 16, "dict_size": 2048, "name": "top"}]
    (tmp_path / "sweep.json").write_text(json.dumps(entries))
    members = parse(["--sweep", str(tmp_path / "sweep.json")]).members
    found = {n: (c.data.layer, c.sae.k, c.sae.dict_size) for n, c in members.items()}
    assert found == {"layer1-k8": (1, 8, 4096), "top": (3, 16, 2048)}
    with pytest.raises(InputError, match="layer has several values and is in the sweep file"):
        parse(["--sweep", str(tmp_path / "sweep.json"), "--layer", "1", "2"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--layer", "3-1"], "expected the first layer before the last: '3-1'"),
        (["--layer", "one"], r"expected a layer \(3\), several \(0-11\) or all, got 'one'"),
        (["--layer", "-1"], "layer"),
        (
            ["--hookpoint", "gpt_neox.layers.*.nothing"],
            "matches none of the",
        ),
        (["--layer", "1", "2", "--hookpoint", "x"], "--layer and --hookpoint exclude each other"),
        (
            ["--layer", "0-2", "--target-hookpoint", "gpt_neox.layers.[23]"],
            "expected one target_hookpoint, or one for each layer or hookpoint, got 3 for layer, 2",
        ),
    ],
)
def test_bad_hookpoints_are_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        parse(arguments)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"layer": None}, "entry 0: layer: expected the number of one block, got None"),
        ({"layer": "0-2"}, "layer: expected the number of one block, got '0-2'"),
        ({"hookpoint": "gpt_neox.layers.*"}, "hookpoint: expected the name of one, not a pattern"),
        ({"target_hookpoint": 3}, "target_hookpoint: expected the name of one"),
        ({"name": ""}, "name: expected a string that is not empty, got ''"),
    ],
)
def test_bad_entries_of_a_sweep_file_are_refused(entry, words, tmp_path):
    (tmp_path / "sweep.json").write_text(json.dumps([entry]))
    with pytest.raises(InputError, match=words):
        parse(["--sweep", str(tmp_path / "sweep.json")])


def test_what_diverged_or_is_gone_is_left_out(whole, tmp_path):
    out, to = tmp_path / "suite", tmp_path / "to"
    shutil.copytree(whole, out)
    index = json.loads((out / "sweep.json").read_text())
    index["members"]["early-kron"]["failed"] = "its loss was nan"
    (out / "sweep.json").write_text(json.dumps(index))
    shutil.rmtree(out / "late-dense")
    with pytest.warns(Notice) as notices:
        assert export.main([str(out), "--to", "kronsae", "--out", str(to)]) == 0
    said = [str(notice.message) for notice in notices]
    assert f"{out}/early-kron diverged (its loss was nan): it is left out" in said
    assert f"{out}/late-dense has no SAE: it is left out" in said
    assert [path.name for path in to.iterdir() if path.is_dir()] == ["early-dense"]
    assert list(json.loads((to / "sweep.json").read_text())["members"]) == ["early-dense"]
    with pytest.warns(Notice, match="early-kron diverged"):
        arguments = [str(out), "--members", "early-kron", "--to", "kronsae"]
        assert export.main([*arguments, "--out", str(tmp_path / "one")]) == 0
    with pytest.raises(InputError, match="it has early-dense$"):
        kronsae.load(out, layer=9)
    (out / "sweep.json").unlink()
    with pytest.raises(InputError, match=r"sweep.json is missing; a checkpoint has a copy"):
        saved_members(out)


def test_a_layer_of_one_sae_is_refused(whole):
    with pytest.raises(InputError, match="holds one SAE, and not a suite: leave out layer"):
        kronsae.load(whole / "late-dense", layer=1)


def test_a_layer_that_the_model_lacks_is_refused(tmp_path):
    status, _, err = finish(*SMALL, "--layer", "2-6", "--out", tmp_path / "suite")
    assert status == 2 and "layer 4: " in err or "layer 6: " in err
    assert not (tmp_path / "suite").exists()


def test_members_of_a_hookpoint_are_neighbours_on_ranks():
    at = {f"layer{n}-{kind}": f"layer{n}" for n in range(3) for kind in ("a", "b")}
    assert list(parallel.owners(at, "members", (2, 1)).values()) == [0, 0, 0, 1, 1, 1]
    assert list(parallel.owners(at, "members", (3, 1)).values()) == [0, 0, 1, 1, 2, 2]


# What is done with a suite


@pytest.mark.parametrize("order", ["stream", pytest.param("global", marks=SLOW)])
def test_a_suite_from_a_cache(order, trained, tmp_path):
    """In the order of live training it is that of the live model; in any, each as alone."""
    out, _ = trained
    cache, data = tmp_path / "cache", ["--context-length", "64", "--heldout-tokens", "1024"]
    assert harvest.main(["--layer", "all", "--tokens", "8000", *data, "--out", str(cache)]) == 0
    kept = SMALL[: SMALL.index("--context-length")] + SMALL[SMALL.index("--log-every") :]
    flags = [*kept, "--tokens", "3000", "--buffer-tokens", "2048", "--activations", cache]
    flags += ["--activations-order", order]
    status, _, err = finish(
        *flags, "--layer", "0-1", "--encoder", "kron", "dense", "--out", tmp_path / "s"
    )
    assert status == 0, err
    if order == "stream":
        for name in MEMBERS:
            assert weights_of(tmp_path / "s" / name) == weights_of(out / name)
        return
    config = tmp_path / "s" / "layer1-kron" / "config.json"
    status, _, err = finish("--config", config, "--out", tmp_path / "alone")
    assert status == 0, err
    assert weights_of(tmp_path / "alone") == weights_of(tmp_path / "s" / "layer1-kron")


def weights_of(run):
    return (run / "sae" / "sae.safetensors").read_bytes()


@pytest.mark.slow
def test_kill_9_and_resume(trained, tmp_path):
    out = tmp_path / "suite"
    process = start(*SUITE, "--out", out)
    _wait_for(lambda: len(checkpoint.list_checkpoints(out / "checkpoints")) >= 1, process)
    process.kill()
    process.communicate()
    status, _, err = finish("--resume", out)
    assert status == 0, err
    for name in MEMBERS:
        assert weights_of(out / name) == weights_of(trained[0] / name)


@pytest.mark.long
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=SLOW)])
def test_ranks_that_share_the_members_write_the_same(processes, trained, tmp_path):
    """Stopped and gone on with by one process, too."""
    flags = [*SUITE, "--share", "members", "--out", tmp_path / "suite"]
    process = start_ranks(processes, *flags, log=tmp_path / "log")
    assert process.wait(300) == 0, (tmp_path / "log").read_text()
    for name in MEMBERS:
        assert weights_of(tmp_path / "suite" / name) == weights_of(trained[0] / name)
        metrics = [
            timeless(map(json.loads, (f / name / "metrics.jsonl").read_text().splitlines()))
            for f in (tmp_path / "suite", trained[0])
        ]
        assert metrics[0] == metrics[1]
        contexts = [
            (f / name / "report.html").read_text().count("<mark")
            for f in (tmp_path / "suite", trained[0])
        ]
        assert contexts[0] == contexts[1] > 0
    newest = checkpoint.list_checkpoints(tmp_path / "suite" / "checkpoints")[-1]
    for path in (newest, *(f / newest.name for f in (tmp_path / "suite" / "streams").iterdir())):
        shutil.rmtree(path)
    status, _, err = finish("--resume", tmp_path / "suite")
    assert status == 0, err
    for name in MEMBERS:
        assert weights_of(tmp_path / "suite" / name) == weights_of(trained[0] / name)


def test_load_by_layer_and_hookpoint(whole, trained, tmp_path):
    out, _ = trained
    with pytest.raises(
        InputError, match="2 SAEs at layer 1: layer1-kron, layer1-dense; choose one"
    ):
        kronsae.load(out, layer=1)
    with pytest.raises(InputError, match="no SAE at layer 7; it has layer0-kron"):
        kronsae.load(out, layer=7)
    with pytest.raises(InputError, match="give it, or a layer or hookpoint, not both"):
        kronsae.load(out, layer=1, subfolder="layer1-kron")
    with pytest.raises(InputError, match="is a sweep: name one of its runs"):
        kronsae.load(out)
    assert kronsae.load(out, subfolder="layer1-kron").config.encoder == "kron"
    exported = tmp_path / "exported"
    names = ["layer0-dense", "layer1-kron"]
    assert (
        export.main([str(out), "--to", "kronsae", "--members", *names, "--out", str(exported)]) == 0
    )
    assert [kronsae.load(exported, layer=n).config.encoder for n in (0, 1)] == ["dense", "kron"]
    with pytest.raises(InputError, match="no SAE at hookpoint 'model.norm'"):
        kronsae.load(exported, hookpoint="model.norm")


def test_export_of_a_suite(trained, tmp_path, capsys):
    out = str(trained[0])
    to = tmp_path / "sparsify"
    common = [out, "--to", "sparsify", "--out", str(to)]
    assert export.main(common) == 2
    assert "--members layer0-dense layer1-dense writes those that fit" in capsys.readouterr().err
    assert not to.exists()
    assert export.main([*common, "--members", "layer0-dense", "layer1-dense"]) == 0
    assert sorted(path.name for path in to.iterdir()) == ["layers.0", "layers.1"]
    loaded = kronsae.load(to, layer=1)
    assert torch.equal(loaded.W_dec, kronsae.load(trained[0] / "layer1-dense").W_dec)
    assert kronsae.load(to, hookpoint="layers.1").d_model == loaded.d_model
    (to / "layers.1" / "notes.txt").write_text("mine")
    assert export.main([*common, "--members", "layer0-dense", "layer1-dense"]) == 2
    assert "notes.txt" in capsys.readouterr().err and (to / "layers.1" / "notes.txt").exists()
    lens = tmp_path / "lens"
    assert export.main([out, "--to", "sae_lens", "--out", str(lens)]) == 0
    assert {path.name for path in lens.iterdir()} == set(MEMBERS)  # two at each hookpoint
    assert export.main([out, "--to", "sae_lens", "--members", "none", "--out", str(lens)]) == 2
    assert "has no member 'none'; it has layer0-kron" in capsys.readouterr().err
    assert (
        export.main([f"{out}/layer0-kron", "--to", "sae_lens", "--members", "x", "--out", "y"]) == 2
    )
    assert "--members has no effect" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "layer", "folder"),
    [
        (["layers.6/sae.safetensors", "layers.6.mlp/sae.safetensors"], 6, "layers.6"),
        (["layers.5/sae.safetensors", "layers.6.mlp/sae.safetensors"], 6, "layers.6.mlp"),
        (["blocks.6.hook_resid_post/sae_weights.safetensors"], 6, "blocks.6.hook_resid_post"),
        (["layer6.sae.pt", "layer16.sae.pt"], 6, "layer6.sae.pt"),
        (
            [
                "layer_6/width_16k/average_l0_71/params.npz",
                "layer_16/width_16k/average_l0_71/params.npz",
            ],
            *(6, "layer_6/width_16k/average_l0_71"),
        ),
    ],
)
def test_layers_in_the_names_of_other_suites(files, layer, folder, tmp_path):
    for file in (*files, "README.md"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    assert subfolder_of(tmp_path, layer, None, None) == folder


def test_the_report_compares_layers(trained):
    out, _ = trained
    page = (out / "report.html").read_text()
    assert "4 autoencoders at 2 hookpoints of embedded" in page
    for name in MEMBERS:
        assert f'href="{name}/report.html"' in page
    assert page.count("<figure>") == 4 and page.count('class="line line1"') == 4
    table = (out / "comparison.md").read_text()
    assert "| reads |" in table.splitlines()[0].replace("  ", "") and "layer1" in table


def test_what_diverged_is_in_no_chart(trained, tmp_path):
    out = tmp_path / "suite"
    shutil.copytree(trained[0], out)
    index = json.loads((out / "sweep.json").read_text())
    for name in MEMBERS:
        if name.startswith("layer1"):
            index["members"][name]["metrics"]["explained_variance"] = -9.8e13
            index["members"][name]["failed"] = "its loss was nan"
    (out / "sweep.json").write_text(json.dumps(index))
    page = write_sweep_report(SweepFolder.open(out)[0]).read_text()
    assert "-9.8e+13" in page and page.count("e+1") == 2  # in the table, of two members


@pytest.mark.slow
def test_a_sweep_at_one_hookpoint_has_no_charts_of_them(tmp_path):
    status, _, err = finish(*SMALL, "--tokens", "1000", "--k", "4", "--out", tmp_path / "sweep")
    assert status == 0, err
    page = (tmp_path / "sweep" / "report.html").read_text()
    assert "2 autoencoders of embedded" in page and "<figure>" not in page


def test_lines_of_many_members_are_one(capsys):
    request = parse(["--layer", "0-3", "--k", "4", "8"])
    console = Console(force_terminal=False, width=200)
    record = {"kind": "train", "step": 80, "dead_share": 0.5, "tokens_per_s": 10.0, "wait_share": 0}
    with ProgressBar(console, request) as progress:
        for number, name in enumerate(request.members):
            progress(name, {**record, "explained_variance": number / 10})
        progress("layer0-k4", {"kind": "diverged", "step": 80, "reason": "it grew"})
    printed = capsys.readouterr().out
    assert "8 autoencoders: EV 0.000 to 0.700  dead 50.0%  10 tokens/s" in printed
    assert "layer0-k4: it grew" in printed and printed.count("autoencoders") == 1
