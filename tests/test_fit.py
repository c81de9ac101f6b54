"""`fit`: learning, seeds, logging, resuming, stopping, and data that cannot be used."""

import dataclasses
import functools
import json
import operator
import re
import shutil
import signal
import threading

import pytest
import torch
from safetensors.torch import load_file
from synthetic import SyntheticActivations

import kronsae
from kronsae import InputError, SAEConfig, TrainConfig, load
from kronsae.config import DataConfig, RunConfig
from kronsae.data import TensorActivations
from kronsae.metrics.heldout import Heldout
from kronsae.registry import LOGS
from kronsae.runs.folder import RunFolder
from kronsae.runs.resume import open_to_resume
from kronsae.system import checkpoint
from kronsae.system.files import read_checksummed, read_log
from kronsae.train import fit, fit_many
from kronsae.training.learner import Learner
from kronsae.training.session import Diverged, Session

KRON = SAEConfig(heads=16, m=2, n=4, k=4)
TRAIN = TrainConfig(
    tokens=4000, batch_size=100, lr=3e-3, log_every=10, eval_every=20, checkpoint_every=15
)
X = SyntheticActivations(24, num_groups=12, batch_size=4000, seed=1).draw()[0]
HELDOUT = SyntheticActivations(24, num_groups=12, batch_size=500, seed=1)
HELDOUT.generator.manual_seed(99)
HELDOUT = HELDOUT.draw()[0]


def weights_equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_it_learns():
    result = fit(KRON, X, TrainConfig(tokens=60_000, batch_size=200, lr=5e-3), heldout=HELDOUT)
    first = result.history[0]["explained_variance"]
    assert result.metrics["explained_variance"] > max(0.75, first + 0.2)
    assert result.metrics["l0"] <= 4 and result.tokens == 60_000


def test_same_seed_same_weights_other_seed_others():
    first, again = (fit(KRON, X, TRAIN).sae for _ in range(2))
    other = fit(KRON, X, TrainConfig(**{**vars(TRAIN), "seed": 1})).sae
    assert weights_equal(first, again) and not weights_equal(first, other)


def test_run_folder(tmp_path):
    result = fit(KRON, X, TRAIN, heldout=HELDOUT, out=tmp_path / "run")
    run, settings = RunFolder.open(tmp_path / "run")
    assert settings["config"]["sae"]["d_model"] == 24
    assert settings["versions"]["torch"] == torch.__version__
    records, damaged = read_log(run.metrics)
    assert (records, damaged) == (result.history, [])
    kinds = [r["kind"] for r in records]
    assert kinds.count("train") == 4 and kinds.count("heldout") == 1 and kinds[-1] == "final"
    names = [p.name for p in checkpoint.list_checkpoints(run.checkpoints)]
    assert names == ["step-00000030", "step-00000040"]
    sae = kronsae.load(run.path)
    assert weights_equal(sae, result.sae)
    assert sae.metadata["metrics"] == result.metrics
    out = sae(HELDOUT)  # raw activations
    variance = (HELDOUT - HELDOUT.mean(0)).square().sum()
    explained = 1 - (out.x_hat - HELDOUT).square().sum() / variance
    assert explained.item() == pytest.approx(result.metrics["explained_variance"], abs=1e-4)


def test_the_budget_is_met_exactly():
    result = fit(KRON, X, TrainConfig(tokens=250, batch_size=100, log_every=1))
    assert [r["tokens"] for r in result.history] == [100, 200, 250]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kind", ["tensor", "synthetic", "iterable"])
@pytest.mark.parametrize("stop_after", [1, 14, 15, 16, 39])
def test_resume_is_bit_for_bit(kind, stop_after, tmp_path):
    """Stopped after any step, by a signal, and resumed: the same weights, metrics and records."""

    def source():
        if kind == "tensor":
            return TensorActivations(X, 100, seed=3)
        if kind == "synthetic":
            return SyntheticActivations(24, batch_size=100)
        return list(X.split(100))

    whole = fit(KRON, source(), TRAIN, heldout=HELDOUT, out=tmp_path / "whole")
    steps = 0

    def interrupt(record):
        nonlocal steps
        if record["kind"] == "train":
            steps = record["step"]
            if steps == stop_after:
                signal.raise_signal(signal.SIGTERM)

    config = TrainConfig(**{**vars(TRAIN), "log_every": 1})
    part = fit(KRON, source(), config, heldout=HELDOUT, out=tmp_path / "run", on_record=interrupt)
    assert part.stopped_by == signal.SIGTERM and part.tokens == 100 * stop_after
    rest = fit(KRON, source(), TRAIN, heldout=HELDOUT, out=tmp_path / "run", resume=True)
    assert rest.stopped_by is None
    assert weights_equal(whole.sae, rest.sae)
    assert rest.metrics == whole.metrics


def test_a_signal_after_the_last_step_is_a_stop_too(tmp_path, monkeypatch):
    """What is left, the evaluation, is made when the run goes on."""
    save = Session.save

    def save_and_be_stopped(session):
        save(session)
        signal.raise_signal(signal.SIGTERM)

    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(Session, "save", save_and_be_stopped)
        config = dataclasses.replace(TRAIN, checkpoint_every=0)
        part = fit(KRON, X, config, heldout=HELDOUT, out=out)
    assert part.stopped_by == signal.SIGTERM and not part.metrics
    rest = fit(KRON, X, config, heldout=HELDOUT, out=out, resume=True)
    assert rest.stopped_by is None and rest.metrics and rest.tokens == part.tokens


def test_resume_without_a_checkpoint_starts_anew(tmp_path):
    whole = fit(KRON, X, TRAIN, out=tmp_path / "whole")
    fit(KRON, X, TRAIN, out=tmp_path / "run")
    for folder in checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    again = fit(KRON, X, TRAIN, out=tmp_path / "run", resume=True)
    assert weights_equal(whole.sae, again.sae)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4


def test_runs_of_before_the_grid_resume_and_load(tmp_path):
    """Their config.json lacks the settings that came later: they had the defaults."""
    fit(KRON, X, TRAIN, out=tmp_path / "run")
    new = {
        "sae": ("d_target", "selection", "objective", "matryoshka_first", "jumprelu_bandwidth")
        + ("experts", "skip"),
        "train": ("l0_coefficient", "balance_coefficient"),
    }
    path = tmp_path / "run" / "config.json"
    settings = read_checksummed(path)
    for part, names in new.items():
        for name in names:
            del settings["config"][part][name]
    path.write_text(json.dumps(settings))
    path = tmp_path / "run" / "sae" / "config.json"
    settings = read_checksummed(path)
    for name in new["sae"]:
        del settings["sae"][name]
    path.write_text(json.dumps(settings))
    loaded = kronsae.load(tmp_path / "run")
    again = fit(KRON, X, TRAIN, out=tmp_path / "run", resume=True)
    assert weights_equal(loaded, again.sae)


def test_resume_with_other_settings(tmp_path):
    fit(KRON, X, TRAIN, out=tmp_path / "run")
    other = TrainConfig(**{**vars(TRAIN), "lr": 1e-3, "log_every": 5})
    with pytest.raises(InputError, match="other settings:\n  config.train.lr: was 0.003, is 0.001"):
        fit(KRON, X, other, out=tmp_path / "run", resume=True)
    with pytest.raises(InputError, match="data.shape"):
        fit(KRON, X[:3000], TRAIN, out=tmp_path / "run", resume=True)


def test_damaged_checkpoint(tmp_path):
    fit(KRON, X, TRAIN, out=tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step-00000040"
    (newest / "state.json").write_text("{}")
    with pytest.raises(InputError, match="step-00000040 is damaged.*the checkpoint before it$"):
        fit(KRON, X, TRAIN, out=tmp_path / "run", resume=True)
    shutil.rmtree(newest.with_name("step-00000030"))
    with pytest.raises(InputError, match="to begin again, as there is none before it$"):
        fit(KRON, X, TRAIN, out=tmp_path / "run", resume=True)


def test_a_checkpoint_is_no_run_to_resume(tmp_path):
    """It has a copy of config.json, and stays as it is."""
    run = tmp_path / "run"
    fit(KRON, X, TRAIN, out=run)
    place = run / "checkpoints" / "step-00000030"
    shutil.copytree(place, tmp_path / "kept")
    with pytest.raises(InputError, match="kept is a checkpoint: give the folder of its run, which"):
        fit(KRON, X, TRAIN, out=tmp_path / "kept", resume=True)
    before = {file.name: file.read_bytes() for file in place.iterdir()}
    with pytest.raises(InputError, match=f"30 is a checkpoint: give the folder of its run, {run}"):
        fit(KRON, X, TRAIN, out=place, resume=True)
    with pytest.raises(InputError, match="exists already: choose another --out$"):
        fit(KRON, X, TRAIN, out=place)
    assert {file.name: file.read_bytes() for file in place.iterdir()} == before


def test_a_checkpoint_of_a_sweep_or_a_member_is_no_run_to_resume(tmp_path):
    sweep = tmp_path / "sweep"
    fit_many([KRON, dataclasses.replace(KRON, k=2)], X, TRAIN, names=["a", "b"], out=sweep)
    for place in (sweep, sweep / "a"):
        with pytest.raises(
            InputError, match=f"is a checkpoint: give the folder of its run, {sweep},"
        ):
            open_to_resume(place / "checkpoints" / "step-00000030")


def test_a_run_folder_that_was_removed_is_nothing_to_go_on_with(tmp_path):
    def batches():
        yield from X[:1000].split(100)
        shutil.rmtree(tmp_path / "run")
        raise InputError("the server is gone")

    with pytest.raises(InputError, match="the server is gone") as error:
        fit(KRON, batches(), TRAIN, out=tmp_path / "run")
    assert "go on from" not in str(error.value)


def test_data_that_ends_early_keeps_the_work(tmp_path):
    batches = list(X[:1700].split(100))
    with pytest.raises(InputError, match="ended after 1,700 of 4,000 tokens"):
        fit(KRON, batches, TRAIN, out=tmp_path / "run")
    names = [p.name for p in checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert names == ["step-00000015", "step-00000017"]
    assert kronsae.load(tmp_path / "run").metadata["tokens"] == 1700


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_named(bad, tmp_path):
    batches = [x.clone() for x in X.split(100)]
    batches[22][7, 3] = bad
    with pytest.raises(InputError, match="batch 22: 1 of 100 activations hold NaN or infinity"):
        fit(KRON, batches, TRAIN, out=tmp_path / "run")
    names = [p.name for p in checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert names == ["step-00000015"]
    assert all(p.isfinite().all() for p in kronsae.load(tmp_path / "run").parameters())


@pytest.mark.parametrize(
    ("activations", "words"),
    [
        (torch.zeros(10), "expected a floating tensor"),
        (torch.zeros(10, 4, dtype=torch.int64), "expected a floating tensor"),
        ([], "empty iterable"),
        ([torch.randn(100, 24), torch.randn(100, 25)], r"expected widths .* = \(24, 0\) as before"),
        (torch.ones(5000, 24), "variance 0"),
    ],
)
def test_activations_that_cannot_be_used(activations, words):
    with pytest.raises(InputError, match=words):
        fit(KRON, activations, TRAIN)


@pytest.mark.parametrize(
    ("heldout", "words"),
    [
        (torch.randn(10, 25), "expected floating activations .t, 24."),
        (torch.randn(1, 24), "at least two"),
        (torch.ones(10, 24), "all activations are equal"),
        (torch.full((10, 24), torch.nan), "NaN or infinite"),
        (torch.ones(10, 24, dtype=torch.int64), "floating"),
    ],
)
def test_heldout_is_checked_before_training(heldout, words, tmp_path):
    with pytest.raises(InputError, match=words):
        fit(KRON, X, TRAIN, heldout=heldout, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_heldout_may_have_leading_dimensions():
    flat = fit(KRON, X, TRAIN, heldout=HELDOUT).metrics
    assert fit(KRON, X, TRAIN, heldout=HELDOUT.view(5, 100, 24)).metrics == flat


def test_a_logger_that_is_missing_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(LOGS["wandb"], "package", "not-there")
    with pytest.raises(InputError, match="--wandb needs the package not-there: pip install"):
        fit(KRON, X, TrainConfig(wandb="project"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_width_must_agree():
    with pytest.raises(InputError, match="d_model: 8 is configured, the data has 24"):
        fit(SAEConfig(d_model=8, heads=4, k=2), X, TRAIN)


def test_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    save = checkpoint.save_state

    def sometimes_full(folder, state, *of_ranks):
        if folder.name == "step-00000030":
            raise InputError(f"{folder} could not be written (No space left on device)")
        return save(folder, state, *of_ranks)

    monkeypatch.setattr(checkpoint, "save_state", sometimes_full)
    with pytest.raises(InputError, match="No space left"):
        fit(KRON, X, TRAIN, out=tmp_path / "run")
    monkeypatch.undo()
    whole = fit(KRON, X, TRAIN)
    resumed = fit(KRON, X, TRAIN, out=tmp_path / "run", resume=True)
    assert weights_equal(whole.sae, resumed.sae)


def test_works_outside_the_main_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(fit(KRON, X, TRAIN)))
    thread.start()
    thread.join()
    assert results[0].tokens == 4000


def test_signal_handlers_are_given_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    fit(KRON, X, TrainConfig(tokens=200, batch_size=100))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    fit(KRON, X, TrainConfig(**{**vars(TRAIN), "tensorboard": True}), out=tmp_path / "run")
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


def test_a_path_is_no_activations():
    with pytest.raises(InputError, match="got 'cache': kronsae.cache.CacheActivations reads"):
        fit(KRON, "cache", TRAIN)


def test_settings_of_fit_reach_the_learner():
    """Flags that only matter with dead latents, or rarely, do change the result."""
    plain = fit(KRON, X, TRAIN).sae
    for change in (
        {"auxk_coefficient": 0.0},
        {"auxk": 1},
        {"auxk_fraction": 1.0},
        {"dead_after_tokens": 100},
        {"weight_decay": 0.5},
        {"encoder_lr_ratio": 0.5},
        {"adam_beta2": 0.9},
        {"decoder_norm": "free"},
        {"max_grad_norm": 1e-3},
        {"lr_final": 1e-3},
        {"lr_scale_by_dict_size": True},
        {"warmup_fraction": 0.5},
    ):
        other = fit(KRON, X, TrainConfig(**{**vars(TRAIN), **change})).sae
        assert not weights_equal(plain, other), change


def test_one_token_batches_do_not_spoil_the_batch_form():
    from kronsae.metrics.figures import ReconstructionMetrics, cross_entropy_recovered

    metrics = ReconstructionMetrics(24)
    metrics.update(X[:50], 0.5 * X[:50])
    before = metrics.compute()["explained_variance_batch"]
    metrics.update(X[50:51], X[50:51])
    assert metrics.compute()["explained_variance_batch"] == before
    assert cross_entropy_recovered(2.0, 2.0, 5.0) == 1 and cross_entropy_recovered(2, 5, 5) == 0
    assert cross_entropy_recovered(2.0, 2.0, 2.0) == 1


def test_evaluation_figures_by_hand():
    """Explained variance, L0 and dead share of an SAE whose output is known."""
    from kronsae.metrics.heldout import evaluate
    from kronsae.model.sae import SAE

    sae = SAE(SAEConfig(d_model=2, encoder="dense", dict_size=3, k=1))
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0], [0, 1], [-1, -1]]))
        sae.W_dec.copy_(torch.tensor([[1.0, 0], [0, 1], [-1, 0]]))
    x = torch.tensor([[3.0, 1], [1, 3]])
    found = evaluate(sae, Heldout(x))
    # x_hat = (3, 0) and (0, 3): squared error 2; around the mean (2, 2) the spread is 4.
    assert found["explained_variance"] == pytest.approx(0.5)
    assert found["fvu"] == pytest.approx(0.5)
    assert found["explained_variance_batch"] == pytest.approx(0.5)
    assert found["mse"] == pytest.approx(0.5)
    assert found["l0"] == 1.0 and found["dead_share"] == pytest.approx(1 / 3)


def test_a_token_of_enormous_size_costs_its_batch_alone(tmp_path):
    x = X.clone()
    x[1234] = 1e30
    records = []
    config = TrainConfig(**{**vars(TRAIN), "log_every": 1, "massive_multiple": 0.0})
    result = fit(KRON, x, config, out=tmp_path / "run", on_record=records.append)
    skipped = [record for record in records if record["kind"] == "skipped"]
    assert skipped and all("gradient norm" in record["reason"] for record in skipped)
    assert all(record["largest"] > 1e28 for record in skipped)
    assert result.tokens == TRAIN.tokens and result.failed is None
    assert all(p.isfinite().all() for p in result.sae.parameters())
    usual = [r["explained_variance"] for r in fit(KRON, X, config).history if r["kind"] == "train"]
    found = [r["explained_variance"] for r in records if r["kind"] == "train"]
    assert found[-1] == pytest.approx(usual[-1], abs=0.05)


def test_other_numbers_of_the_language_model_from_here_on(tmp_path):
    """For a run that met a NaN in float16; only if it is asked for."""

    def asking_for(dtype):
        config = RunConfig(sae=KRON, data=DataConfig(model_dtype=dtype), train=TRAIN)
        return {"config": config.to_dict()}

    class Source(TensorActivations):
        taken = "float16"

        def describe(self):
            return {**super().describe(), "dtype": self.taken, "weights": f"of {self.taken}"}

    source = Source(X, TRAIN.batch_size, TRAIN.seed)
    stored = asking_for("float16")
    fit(KRON, source, TRAIN, out=tmp_path / "run", settings=stored)
    source = Source(X, TRAIN.batch_size, TRAIN.seed)
    source.taken = "float32"
    with pytest.raises(InputError, match="data.dtype: was 'float16', is 'float32'"):
        fit(KRON, source, TRAIN, out=tmp_path / "run", resume=True, settings=stored)
    asked = asking_for("float32")
    fit(KRON, source, TRAIN, out=tmp_path / "run", resume=True, settings=asked)
    stored = read_checksummed(tmp_path / "run" / "config.json")  # and holds from now on
    assert stored["config"]["data"]["model_dtype"] == stored["data"]["dtype"] == "float32"
    fit(KRON, source, TRAIN, out=tmp_path / "run", resume=True, settings=asked)


def test_tensors_do_not_go_on_with_a_run_on_text(tmp_path):
    config = RunConfig(sae=KRON, data=DataConfig(), train=TRAIN)
    fit(KRON, X, TRAIN, out=tmp_path / "run", settings={"config": config.to_dict()})
    with pytest.raises(InputError, match="made with other settings:\n.*config.data"):
        fit(KRON, X, TRAIN, out=tmp_path / "run", resume=True)


def test_config_json_may_be_edited_where_a_run_may_change(tmp_path):
    """How often it logs, say; what decides the weights is what the checkpoint was trained with."""
    whole = fit(KRON, X, TRAIN, out=tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    text = path.read_text()
    settings = json.loads(text)
    settings["config"]["train"] |= {"log_every": 5}
    path.write_text(json.dumps(settings))
    other = dataclasses.replace(TRAIN, log_every=5)
    again = fit(KRON, X, other, out=tmp_path / "run", resume=True)
    assert weights_equal(whole.sae, again.sae)
    settings["config"]["train"] |= {"lr": 0.5}
    path.write_text(json.dumps(settings))
    changed = "config.train.lr: was 0.003, is 0.5\nA checkpoint has a copy:\n  cp .*/config.json .*"
    with pytest.raises(InputError, match=changed):
        open_to_resume(tmp_path / "run")


def test_an_edit_of_config_json_and_of_its_copies_is_refused(tmp_path):
    """The copies' checksums are then of other values, so that nothing is left to compare with."""
    run = tmp_path / "run"
    fit(KRON, X, TRAIN, out=run)
    config, copies = run / "config.json", list(run.glob("checkpoints/*/config.json"))
    whole = {path: path.read_text() for path in (config, *copies)}
    for path in copies:
        path.write_text("{")
    open_to_resume(run)  # it is what the checkpoint was written with
    for path, text in whole.items():
        path.write_text(text.replace('"lr": 0.003', '"lr": 0.5'))
    for _ in range(2):
        with pytest.raises(
            InputError, match="config.json was edited.*step-00000040.*Undo the edit"
        ):
            fit(KRON, X, dataclasses.replace(TRAIN, lr=0.5), out=run, resume=True)
        for path in copies:
            path.unlink(missing_ok=True)
    config.write_text(whole[config])
    open_to_resume(run)


OTHER_RUNS = {
    "seed": (KRON, X, {"seed": 1}),
    "lr": (KRON, X, {"lr": 0.004}),
    "k": (dataclasses.replace(KRON, k=KRON.k + 1), X, {}),
    "content": (KRON, X + 1, {}),
}
NEWEST = "step-00000040"


def another_run(what, tmp_path):
    """Folders of a run, and of another of the same shapes."""
    sae, x, settings = OTHER_RUNS[what]
    fit(KRON, X, TRAIN, out=tmp_path / "run")
    fit(sae, x, dataclasses.replace(TRAIN, **settings), out=tmp_path / "other")
    return tmp_path / "run", tmp_path / "other"


@pytest.mark.parametrize(
    "place, value, named",
    [
        ("metrics_bytes", -1, "metrics_bytes"),
        ("stream", None, "stream"),
        ("stream.step", -5, "stream.step: expected a whole number from 1 to 200, got -5"),
        ("stream.step", 5000, "stream.step"),
        ("stream.tokens", 10**15, "stream.tokens"),
        ("stream.seconds", -1.0, "stream.seconds"),
        ("stream.normalizer.scale", -1.0, "stream.normalizer.scale"),
        ("stream.normalizer.radius", -1.0, "stream.normalizer.radius"),
        ("stream.normalizer", {"scale": 1.0}, "stream.normalizer: 'mean' is missing"),
        ("stream.normalizer.mean", {"__tensor__": ".stream.seen"}, "stream.normalizer.mean"),
        ("stream.source", {"text": 5}, "source: 'given' is missing"),
        ("stream.source.given", -1, "source.given"),
        ("stream.pending", [5], r"stream.pending\[0\]"),
        ("stream.random_states.numpy", [], "random_states"),
        ("stream.random_states.numpy", ["00" * 2496, 0, 10**30, 0.0], "random_states"),
        ("members", {}, "members"),
        ("members.sae.step_count", -1, "members.sae.step_count"),
        ("members.sae.tokens", 10**15, "members.sae.tokens"),
        ("members.sae.skipped", 99, "members.sae.skipped"),
        ("members.sae.moments", {}, "members.sae.moments: 'W_enc' is missing"),
        ("members.sae.weights", {}, "members.sae.weights"),
        ("members.sae.hopeless", 5, "members.sae.hopeless"),
    ],
)
def test_a_state_that_was_edited_is_refused(place, value, named, tmp_path):
    """Without its checksum, as the message about that suggests: the key that is wrong is named."""
    fit(KRON, X, dataclasses.replace(TRAIN, tokens=200), out=tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step-00000002" / "state.json"
    document = read_checksummed(path)
    *parents, key = place.split(".")
    functools.reduce(operator.getitem, parents, document["state"])[key] = value
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=f"checkpoint .*step-00000002.*{named}"):
        fit(KRON, X, dataclasses.replace(TRAIN, tokens=200), out=tmp_path / "run", resume=True)


@pytest.mark.parametrize("what", OTHER_RUNS)
def test_a_checkpoint_of_another_run_is_refused(what, tmp_path):
    run, other = another_run(what, tmp_path)
    mine, theirs = (folder / "checkpoints" / NEWEST for folder in (run, other))
    whole = load(run)
    shutil.rmtree(mine)
    shutil.copytree(theirs, mine)
    words = f"step-00000040 is of another run, with other settings:\n.*{what}: was .*, is "
    with pytest.raises(InputError, match=words) as refused:
        fit(KRON, X, TRAIN, out=run, resume=True)
    shutil.rmtree(str(refused.value).split("remove the folder ")[1])
    resumed = fit(KRON, X, TRAIN, out=run, resume=True)  # from the one before
    assert weights_equal(whole, resumed.sae)
    # Whether config.json or the only checkpoint is another's, nobody can tell.
    for place in (run / "checkpoints").iterdir():
        shutil.rmtree(place)
    shutil.copytree(theirs, mine)
    with pytest.raises(InputError, match=rf"{what}: was (.|\n)*copied here, take that folder away"):
        fit(KRON, X, TRAIN, out=run, resume=True)


def test_the_state_of_another_run_beside_our_settings_is_refused(tmp_path):
    run, other = another_run("seed", tmp_path)
    for name in ("state.json", "state.safetensors"):
        shutil.copy(other / "checkpoints" / NEWEST / name, run / "checkpoints" / NEWEST / name)
    with pytest.raises(InputError, match="it is of another checkpoint than config.json beside it"):
        fit(KRON, X, TRAIN, out=run, resume=True)


@pytest.mark.parametrize("change", [{"lr": 0.004}, {}])
def test_what_a_sweep_shares_may_not_be_of_another_sweep(change, tmp_path):
    """The stream's state: of a sweep with another setting of a member, or of other data."""
    saes, names = [KRON, dataclasses.replace(KRON, k=2)], ["a", "b"]
    fit_many(saes, X, TRAIN, names=names, out=tmp_path / "sweep")
    trains = [TRAIN, dataclasses.replace(TRAIN, **change)]
    fit_many(saes, X if change else X + 1, trains, names=names, out=tmp_path / "other")
    mine, theirs = (tmp_path / name / "checkpoints" / NEWEST for name in ("sweep", "other"))
    shutil.rmtree(mine)
    shutil.copytree(theirs, mine)
    words = "b: config.train.lr: was 0.004" if change else "data.content: was"
    with pytest.raises(InputError, match=f"is of another run, with other settings:\n  {words}"):
        fit_many(saes, X, TRAIN, names=names, out=tmp_path / "sweep", resume=True)


# Training that diverges


def strict_records(run):
    """The lines of metrics.jsonl, which have to be JSON as others read it."""

    def refuse(token):
        raise AssertionError(f"{token} is no JSON")

    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_one_enormous_row_of_heldout_text_does_not_end_training(tmp_path):
    """In float32 its reconstruction overflows; the weights have nothing to do with it."""
    enormous = HELDOUT.clone()
    enormous[5] = 1e30
    whole = fit(KRON, X, TRAIN, heldout=HELDOUT)
    for multiple in (10.0, 0.0):  # left out as massive; measured
        train = dataclasses.replace(TRAIN, massive_multiple=multiple)
        out = tmp_path / str(multiple)
        result = fit(KRON, X, train, heldout=enormous, out=out)
        assert result.failed is None and weights_equal(whole.sae, result.sae)
        final = strict_records(out)[-1]
        of_all = "explained_variance_all" if multiple else "explained_variance"
        assert final[of_all] is None and f"{of_all} is nan" in final["not_finite"]
        assert (final["explained_variance"] is None) == (multiple == 0)
        assert result.metrics[of_all] is None and kronsae.load(out).metadata["metrics"] == {
            name: final[name] for name in result.metrics
        }


@pytest.mark.parametrize("heldout", [HELDOUT, None])
def test_training_that_is_hopeless_in_the_end_has_diverged(heldout, tmp_path):
    """Its gradients are finite, and it ends as if nothing was wrong."""
    train = dataclasses.replace(TRAIN, lr=100.0)
    result = fit(KRON, X, train, heldout=heldout, out=tmp_path / "run")
    words = r"step 40: the last batches .*no better than by noise: training has diverged; try a "
    assert re.match(words + "smaller lr than 100$", result.failed)
    assert result.tokens == TRAIN.tokens
    assert strict_records(tmp_path / "run")[-1]["reason"] == result.failed
    assert kronsae.load(tmp_path / "run").metadata["failed"] == result.failed
    again = fit(KRON, X, train, heldout=heldout, out=tmp_path / "run", resume=True)
    assert again.failed == result.failed and weights_equal(again.sae, result.sae)


@pytest.mark.parametrize("steps", [5, 40])
def test_a_rate_that_overflows_has_diverged(steps, tmp_path):
    """Also before eight batches in a row were skipped."""
    train = dataclasses.replace(TRAIN, lr=1e25, tokens=100 * steps, eval_every=3)
    if steps == 40:
        with pytest.raises(Diverged, match="step 9: .*8 batches in a row: training has diverged"):
            fit(KRON, X, train, heldout=HELDOUT, out=tmp_path)
    else:
        failed = fit(KRON, X, train, heldout=HELDOUT, out=tmp_path).failed
        assert "step 5: the last batches and held-out text are explained no better" in failed
    heldout = [r for r in strict_records(tmp_path) if r["kind"] == "heldout"]
    assert heldout[0]["explained_variance"] is None and heldout[0]["not_finite"]


@pytest.mark.parametrize(
    ("sae", "train", "advice"),
    [
        ({"init_scale": 1e30}, {}, "a smaller init_scale than 1e+30, or a smaller lr than 0.003"),
        (
            {},
            {"weight_decay": 1e30},
            "a smaller weight_decay than 1e+30, or a smaller lr than 0.003",
        ),
        (
            {"selection": "relu", "k": 50, "selection_settings": {"l1_coefficient": 1e30}},
            {},
            "a smaller l1_coefficient than 1e+30, or a smaller lr than 0.003",
        ),
        ({"eps": 1e-5}, {"lr": 1e25}, "a smaller lr than 1e+25"),
    ],
)
def test_what_to_try_after_divergence(sae, train, advice):
    config, train = dataclasses.replace(KRON, **sae), dataclasses.replace(TRAIN, **train)
    try:
        said = fit(config, X, train).failed
    except Diverged as error:
        said = str(error)
    assert said.endswith(f"training has diverged; try {advice}")


@pytest.mark.parametrize("saves", [False, True])
def test_a_signal_promises_no_more_than_is_done(saves, tmp_path, capsys):
    def stop(record):
        signal.raise_signal(signal.SIGTERM)

    fit(KRON, X, TRAIN, out=tmp_path / "run" if saves else None, on_record=stop)
    assert ("finishing this step and saving" in capsys.readouterr().err) is saves


@pytest.mark.parametrize("step", [7, 40])
def test_weights_that_are_not_finite_are_not_saved(step, tmp_path, monkeypatch):
    """Of two members one goes wrong, before a checkpoint or at the end: the other goes on."""
    make = Learner.step

    def wrong(self, *args):
        figures = make(self, *args)
        if self.step_count == step and self.config.seed == 1:
            self.sae.b_dec.data[3] = float("inf")
        return figures

    monkeypatch.setattr(Learner, "step", wrong)
    whole = fit(KRON, X, TRAIN, heldout=HELDOUT)
    trains = [TRAIN, dataclasses.replace(TRAIN, seed=1, data_seed=0)]
    names, out = ["good", "bad"], tmp_path / "sweep"
    good, bad = fit_many([KRON] * 2, X, trains, names=names, heldout=HELDOUT, out=out)
    assert good.failed is None and weights_equal(whole.sae, good.sae)
    assert "training has diverged; try a smaller lr than 0.003" in bad.failed and bad.sae is None
    assert not (out / "bad" / "sae").exists()
    saved = [path for path in out.rglob("*.safetensors")]
    assert all(torch.isfinite(x).all() for path in saved for x in load_file(path).values())
    strict_records(out / "bad")
    again = fit_many([KRON] * 2, X, trains, names=names, heldout=HELDOUT, out=out, resume=True)
    assert "has diverged" in again[1].failed and weights_equal(again[0].sae, good.sae)
