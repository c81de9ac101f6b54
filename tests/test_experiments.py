"""The experiments run in their smallest form; their formulas hold in cases worked by hand."""

import dataclasses
import json
import math
import shutil
from dataclasses import dataclass
from typing import ClassVar

import cached
import pytest
import torch

from kronsae.config import SAEConfig, TrainConfig, setting
from kronsae.data import TensorActivations
from kronsae.errors import InputError
from kronsae.experiments.__main__ import main
from kronsae.experiments.activations import collect
from kronsae.experiments.convergence import difference
from kronsae.experiments.experiment import EXPERIMENTS, Experiment, axis
from kronsae.experiments.grid import missing_cells, run_grid
from kronsae.experiments.report import TUNING_SEED, Spread, grouped
from kronsae.experiments.training import TrainingExperiment
from kronsae.experiments.variants import sae_config, with_dense_forms
from kronsae.model.flops import flops_per_token
from kronsae.model.sae import SAE
from kronsae.system.files import lock
from kronsae.training.session import FitResult
from kronsae_kernels import SparseCodes

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_smallest_form(name, tmp_path, capsys):
    """Every cell is run; the JSON says with what; a second call runs nothing again."""
    arguments = [name, "--smallest", "--out", str(tmp_path)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    document = json.loads((tmp_path / f"{name}.json").read_text())
    kind = EXPERIMENTS[name]
    cells = kind(**kind.smallest).cells(document["runs"])
    assert len(document["runs"]) == len(cells) >= 2
    assert not missing_cells(cells, document["runs"])
    assert f"[{len(cells)}/{len(cells)}]" in printed
    assert {run["seed"] for run in document["runs"]} == {0, 1}
    assert all(name in run["command"] for run in document["runs"])
    assert document["made_with"]["torch"] == torch.__version__
    assert document["made_with"]["dtype"] in ("float32", "bfloat16")
    assert document["conclusion"] in (tmp_path / f"{name}.md").read_text()
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    before = document["runs"]
    assert main(arguments) == 0
    assert f"/{len(cells)}]" not in capsys.readouterr().out
    assert json.loads((tmp_path / f"{name}.json").read_text())["runs"] == before


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_paper_form_is_a_matter_of_settings(name):
    kind = EXPERIMENTS[name]
    assert kind(**kind.paper).cells([])


# The grid


@dataclass(frozen=True)
class Squares(Experiment):
    """Squares numbers, and remembers which; it stops at the number `ill`."""

    figure = "none"
    statement = "Squares grow."
    seen: ClassVar[list[int]]
    ill: ClassVar[int | None]

    numbers: tuple[int, ...] = axis((1, 2, 3), "to square")
    scale: int = setting(1, "factor")

    def cells(self, runs):
        return [{"number": number} for number in self.numbers]

    def run(self, shared, cell):
        if cell["number"] == self.ill:
            raise KeyboardInterrupt
        self.seen.append(cell["number"])
        return {"square": self.scale * cell["number"] ** 2}

    def conclude(self, runs):
        return "", str(sorted(run["square"] for run in runs))

    def draw(self, runs, path):
        pass


@pytest.fixture
def squares():
    Squares.seen, Squares.ill = [], None
    return Squares


def run(experiment, folder, **settings):
    return run_grid("squares", experiment(**settings), folder, "a command", lambda *_: None)


def test_half_done_grid_goes_on(squares, tmp_path):
    squares.ill = 3
    with pytest.raises(KeyboardInterrupt):
        run(squares, tmp_path)
    assert squares.seen == [1, 2]
    squares.ill = None
    assert [each["square"] for each in run(squares, tmp_path)] == [1, 4, 9]
    assert squares.seen == [1, 2, 3]


def test_an_axis_may_grow_and_shrink(squares, tmp_path):
    run(squares, tmp_path)
    run(squares, tmp_path, numbers=(2, 5))
    assert squares.seen == [1, 2, 3, 5]
    document = json.loads((tmp_path / "squares.json").read_text())
    assert document["conclusion"] == "[4, 25]"  # of what was asked for
    assert len(document["runs"]) == 4  # nothing is thrown away


def test_a_failure_before_the_first_run_leaves_no_folder(squares, tmp_path):
    squares.ill = 1
    with pytest.raises(KeyboardInterrupt):
        run(squares, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_removed_meanwhile_is_made_again(squares, tmp_path):
    out = tmp_path / "out"

    def remove_first(run, done, total):
        if done == 1:
            shutil.rmtree(out)

    runs = run_grid("squares", squares(), out, "a command", remove_first)
    document = json.loads((out / "squares.json").read_text())
    assert document["runs"] == runs and len(runs) == 3


def test_two_processes_do_not_run_in_one_folder(squares, tmp_path):
    """Each would write its own runs over those of the other."""
    held = lock(tmp_path, "")
    with pytest.raises(InputError, match="is in use: another process runs an experiment there"):
        run(squares, tmp_path)
    held.release()
    assert len(run(squares, tmp_path)) == 3 and squares.seen == [1, 2, 3]


def test_other_settings_do_not_mix(squares, tmp_path):
    run(squares, tmp_path)
    with pytest.raises(InputError, match="scale: was 1, is 2"):
        run(squares, tmp_path, scale=2)


def test_settings_that_older_files_lack_had_their_defaults(squares, tmp_path):
    run(squares, tmp_path)
    path = tmp_path / "squares.json"
    document = json.loads(path.read_text())
    del document["settings"]["scale"]
    path.write_text(json.dumps(document))
    run(squares, tmp_path, numbers=(1, 4))
    assert squares.seen == [1, 2, 3, 4]
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match="scale: was 1, is 2"):
        run(squares, tmp_path, scale=2)


def test_a_foreign_file_is_left_alone(squares, tmp_path):
    (tmp_path / "squares.json").write_text("[]")
    with pytest.raises(InputError, match="not one that an experiment wrote"):
        run(squares, tmp_path)
    assert (tmp_path / "squares.json").read_text() == "[]"


@dataclass(frozen=True)
class Rows(TrainingExperiment):
    """Trains nothing."""

    variants: tuple[str, ...] = axis(("a", "b"), "SAEs")

    def rows(self):
        return [{"variant": variant} for variant in self.variants]

    def longest(self, d_model):
        return 1024


def test_learning_rates_are_chosen_on_a_seed_of_their_own():
    experiment = Rows(learning_rates=(0.1, 0.2), seeds=2)
    trials = experiment.cells([])
    assert [(cell["variant"], cell["lr"]) for cell in trials] == [
        (variant, lr) for variant in "ab" for lr in (0.1, 0.2)
    ]
    assert {cell["seed"] for cell in trials} == {TUNING_SEED}
    values = {("a", 0.1): 0.5, ("a", 0.2): 0.6, ("b", 0.1): 0.9, ("b", 0.2): 0.8}
    runs = [{**cell, "explained_variance": values[cell["variant"], cell["lr"]]} for cell in trials]
    chosen = [cell for cell in experiment.cells(runs) if cell not in trials]
    assert [(cell["variant"], cell["lr"], cell["seed"]) for cell in chosen] == [
        ("a", 0.2, 0), ("a", 0.2, 1), ("b", 0.1, 0), ("b", 0.1, 1)
    ]  # fmt: skip
    assert grouped(runs, "variant") == {}
    one = Rows(variants=("a",), learning_rates=(0.1,), seeds=1)
    assert one.cells([]) == [{"variant": "a", "lr": 0.1, "seed": 0}]


def test_activations_that_do_not_fit_are_streamed():
    """The same tokens, held or streamed."""
    experiment = Rows(buffer_tokens=1024, heldout_tokens=512, batch_size=256, memory_gib=1.0)
    held = experiment.activations()
    streamed = dataclasses.replace(experiment, memory_gib=0.0).activations()
    assert streamed.x is None
    assert torch.equal(streamed.heldout, held.heldout)
    batches = iter(streamed.training(512, seed=0))
    assert torch.equal(torch.cat([next(batches), next(batches)]), held.training(512, seed=0))


def test_too_little_text_is_an_error():
    batches = TensorActivations(torch.randn(10, 4), batch_size=4, epochs=1)
    with pytest.raises(InputError, match="10 tokens to train on, of 11"):
        collect(batches, 11)


# The command line


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["toys"], "experiment: one of ('toy', 'correlation',"),
        (["toy", "--token", "3"], "did you mean --tokens?"),
        (["toy", "--seeds", "few"], "--seeds"),
        (["heads", "--smallest", "--paper"], "not allowed with"),
        (["toy", "--seeds", "0"], "nothing to run"),
    ],
)
def test_wrong_command(argv, words, capsys):
    assert main(argv) == 2
    assert words in capsys.readouterr().err


def test_overview_lists_all(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in EXPERIMENTS)


PLUGIN = """
from dataclasses import dataclass
from kronsae.experiments.experiment import EXPERIMENTS, Experiment, axis

@EXPERIMENTS.register("cubes")
@dataclass(frozen=True)
class Cubes(Experiment):
    figure = "none"
    statement = "Cubes grow."
    numbers: tuple[int, ...] = axis((1, 2), "to cube")

    def cells(self, runs):
        return [{"number": number} for number in self.numbers]

    def run(self, shared, cell):
        return {"cube": cell["number"] ** 3}

    def conclude(self, runs):
        return "a table", f"Cubes: {[run['cube'] for run in runs]}."

    def draw(self, runs, path):
        pass
"""


def test_an_experiment_of_ones_own(tmp_path, monkeypatch, capsys):
    """One file, named by --plugin."""
    monkeypatch.setattr(EXPERIMENTS, "_kinds", dict(EXPERIMENTS))
    (tmp_path / "cubes.py").write_text(PLUGIN)
    plugin = ["--plugin", str(tmp_path / "cubes.py")]
    assert main([*plugin, "cubes", "--numbers", "3", "2", "--out", str(tmp_path)]) == 0
    assert "Cubes: [27, 8]." in (tmp_path / "cubes.md").read_text()
    assert main([*plugin, "--help"]) == 0
    assert "[none] Cubes grow." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("topk", ("dense", 0, 0, 0, "mand")),
        ("m2n4", ("kron", 8, 2, 4, "mand")),
        ("h8m2n4", ("kron", 8, 2, 4, "mand")),
        ("m2n4-relu_mul", ("kron", 8, 2, 4, "relu_mul")),
        ("matryoshka", ("dense", 0, 0, 0, "mand")),
        ("switch-m2n4-relu_mul", ("kron", 8, 2, 4, "relu_mul")),
    ],
)
def test_variants(variant, expected):
    found = sae_config(variant, dict_size=64, k=4)
    assert (found.encoder, found.heads, found.m, found.n, found.composition) == expected


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("topk", ("topk", "plain", 0)),
        ("matryoshka", ("topk", "matryoshka", 0)),
        ("switch", ("topk", "plain", 8)),
        ("jumprelu", ("jumprelu", "plain", 0)),
    ],
)
def test_families(family, expected):
    """The Kron form of a family differs from its dense form in the encoder alone."""
    for variant in (family, f"{family}-m1n4"):
        found = sae_config(variant, dict_size=64, k=4)
        assert (found.selection, found.objective, found.experts) == expected
        assert (found.encoder == "dense") == (variant == family)


def test_kron_forms_stand_behind_their_dense_forms():
    variants = ("topk", "m2n4", "switch-m2n4", "h8m2n4-mul", "switch-half", "batchtopk-half")
    assert with_dense_forms(variants) == (
        "topk", "m2n4", "switch", "switch-m2n4", "h8m2n4-mul", "switch-half", "batchtopk",
        "batchtopk-half",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("variant", "dense", "factor"),
    [("topk-mixed", 320, 0.8), ("topk-mixed448", 448, 0.8), ("batchtopk-mixed512x.65", 512, 0.65)],
)
def test_mixed_encoders_by_their_number_of_dense_latents(variant, dense, factor):
    config = sae_config(variant, 1024, 32)
    own = config.encoder_settings
    assert (config.encoder, own.dense_latents, own.dense_factor) == ("mixed", dense, factor)
    assert sae_config(f"{variant}-refined", 1024, 32) == dataclasses.replace(config, refine=1)
    for wrong in (
        f"{variant}x",
        f"{variant}x1x1",
        "topk-mixedx0.5",
        "topk-mixed0",
        "m2n" + "9" * 5000,
    ):
        with pytest.raises(InputError, match="variant: expected .* topk-mixed3648x0.65"):
            sae_config(wrong, 1024, 32)


def test_a_dense_sae_with_half_of_the_latents_costs_what_m4n4_does():
    half, kron, dense = (
        dataclasses.replace(sae_config(name, 1024, 32), d_model=64)
        for name in ("batchtopk-half-refined", "batchtopk-m4n4-refined", "batchtopk-refined")
    )
    assert (half.encoder, half.dict_size) == ("dense", 512)
    assert dataclasses.replace(half, dict_size=1024) == dense
    products = 1024  # of base and extension pre-latents, on top of the encoder's rows
    assert flops_per_token(kron) - flops_per_token(half) == products


@pytest.mark.parametrize(
    "variant",
    ["dense", "m2", "h4m2n4", "m2n4-xor", "switch-", "m2n4-switch", "matryoshka-m2n4"],
)
def test_wrong_variants(variant):
    with pytest.raises(InputError):
        sae_config(variant, dict_size=64, k=4)


# Formulas


def test_rv_coefficient():
    from kronsae.experiments.toy import rv_coefficient

    s = torch.tensor([[1.0, 0.5], [0.5, 1.0]]).double()
    assert rv_coefficient(s, 3 * s) == pytest.approx(1)
    # tr(S I) = 2, tr(S²) = 2.5, tr(I²) = 2
    assert rv_coefficient(s, torch.eye(2).double()) == pytest.approx(2 / math.sqrt(5))
    other = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).double()
    assert rv_coefficient(s, other) == pytest.approx(1 / math.sqrt(2.5 * 4))


def test_effective_rank():
    from kronsae.experiments.toy import effective_rank

    assert effective_rank(5 * torch.eye(7).double()) == pytest.approx(7)
    assert effective_rank(torch.ones(7, 7).double()) == pytest.approx(1)
    # shares 3/4 and 1/4
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert effective_rank(torch.tensor([[1.0, 0.5], [0.5, 1.0]]).double()) == pytest.approx(
        expected
    )


def test_mean_correlation():
    from kronsae.experiments.toy import mean_correlation

    # correlations 3 / (2 · 3) = 1/2 and -1/4, and 0 of the third with a row of zeros
    c = torch.tensor([[4.0, 3.0, 0.0], [3.0, 9.0, 0.0], [0.0, 0.0, 0.0]]).double()
    assert mean_correlation(c) == pytest.approx(0.5 / 3)
    assert mean_correlation(torch.tensor([[1.0, -0.25], [-0.25, 1.0]]).double()) == 0.25


def test_matching_finds_a_permutation():
    from kronsae.experiments.toy import match

    root = torch.randn(12, 12, dtype=torch.float64)
    target = root @ root.T
    order = torch.randperm(12)
    found = match(target, target[order][:, order])
    torch.testing.assert_close(found, target)


def test_covariances():
    from kronsae.experiments.toy import FEATURES, SETUPS, covariance

    for number, setup in enumerate(SETUPS):
        s = covariance(setup, seed=number)
        assert s.shape == (FEATURES, FEATURES)
        assert torch.equal(s, s.T)
        assert torch.linalg.eigvalsh(s)[0] > 0
        off = s[~torch.eye(FEATURES, dtype=torch.bool)]
        levels = [0.0, setup.within * setup.between, setup.within]
        assert off.unique().tolist() == pytest.approx(levels)


def test_samples_have_so_many_active_features():
    from kronsae.experiments.toy import samples

    x = samples(torch.eye(256), 100, 8, torch.Generator().manual_seed(0))
    assert ((x > 0).sum(1) == 8).all()
    assert (x >= 0).all()


def test_the_control_is_where_training_starts():
    """`initial` has the decoder that a training of that seed begins with."""
    from kronsae.experiments.toy import initial
    from kronsae.training.learner import Learner

    config = SAEConfig(d_model=8, heads=4, m=2, n=4, k=3)
    learner = Learner(config, TrainConfig(seed=5), torch.device("cpu"))
    assert torch.equal(initial(config, 5).W_dec, learner.sae.W_dec)


def test_untied_training_starts_elsewhere():
    """Without a step the decoder is neither the tied one nor of rows alike."""
    from kronsae.experiments.toy import initial, train_untied

    config = SAEConfig(d_model=64, heads=2, m=2, n=4, k=3)
    x = torch.randn(64, 64)
    still = train_untied(config, x, TrainConfig(tokens=64, batch_size=32, lr=0.0, lr_final=0.0))
    tied = initial(config, 0)
    assert torch.equal(still.W_enc, tied.W_enc)
    assert (still.W_dec[0] @ still.W_dec[1]).abs() < 0.4 < tied.W_dec[0] @ tied.W_dec[1]
    torch.testing.assert_close(still.W_dec.norm(dim=1), torch.ones(16))
    trained = train_untied(config, x, TrainConfig(tokens=64, batch_size=32, lr=0.01))
    assert not torch.equal(trained.W_dec, still.W_dec)


def test_mean_correlations_equal_the_whole_matrix():
    """Against torch.corrcoef of the dense latents; one latent never fires."""
    from kronsae.properties.correlation import mean_correlations

    heads, size, tokens, k = 3, 4, 50, 5
    scores = torch.rand(tokens, heads * size, dtype=torch.float64)
    scores[:, 6] = -1
    values, indices = scores.topk(k)
    dense = torch.zeros_like(scores).scatter_(1, indices, values)
    alive = torch.tensor([latent for latent in range(heads * size) if latent != 6])
    matrix = torch.corrcoef(dense[:, alive].T).fill_diagonal_(0)
    own = (alive[:, None] // size == alive // size).double().fill_diagonal_(0)
    found = mean_correlations(SparseCodes(values, indices), heads, size)
    torch.testing.assert_close(found.head, (matrix * own).sum(1) / own.sum(1))
    torch.testing.assert_close(found.others, matrix.sum(1) / (len(alive) - 1))


def test_jumprelu_is_not_chosen_for_more_latents():
    """More latents explain more: rates that meet their L0 go first, then who is nearest to it."""
    merit = EXPERIMENTS["jumprelu"]().merit

    def ranked(*runs):
        runs = [{"k": 100, "l0_training": l0, "explained_variance": ev} for l0, ev in runs]
        return [run["l0_training"] for run in sorted(runs, key=merit, reverse=True)]

    assert ranked((150, 0.9), (102, 0.7), (98, 0.8)) == [98, 102, 150]
    assert ranked((150, 0.9), (80, 0.7)) == [80, 150]
    assert ranked((100, -1e60), (99, None), (150, 0.9)) == [150, 100, 99]  # they diverged


def test_l0_in_training_is_that_of_the_last_fifth(monkeypatch):
    kind = EXPERIMENTS["jumprelu"]
    records = [{"kind": "train", "l0": float(step)} for step in range(1, 12)]
    metrics = {"explained_variance": 0.5, "dead_share": 0.0, "l0": 8.0}
    history = [*records, {"kind": "final", **metrics}]
    result = FitResult(None, 0, metrics, history, None)
    monkeypatch.setattr(kind, "train", lambda *given, log_every: result if log_every == 1 else None)
    cell = {"variant": "jumprelu", "k": 8, "dict_size": 64, "tokens": 0, "lr": 0.1, "seed": 0}
    assert kind().run(None, cell)["l0_training"] == 10  # of 9, 10 and 11


def test_spread_of_what_diverged():
    assert str(Spread.of([-math.inf, 0.5])) == "-inf"
    assert str(Spread.of([0.25, 0.75])) == "0.5000 ± 0.3536"


@pytest.mark.parametrize("name", ["jumprelu", "sparsity"])
def test_a_rate_that_diverges_loses(name, tmp_path):
    kind = EXPERIMENTS[name]
    given = kind.smallest | {"learning_rates": (1e30, 1.6e-2), "seeds": 1}
    if name == "jumprelu":
        given["k"] = (8,)
    runs = run_grid(name, kind(**given), tmp_path, "a command", lambda *_: None)
    assert {run["lr"] for run in runs if run["seed"] != TUNING_SEED} == {1.6e-2}


def test_jumprelu_of_an_older_version_is_refused():
    with pytest.raises(InputError, match="did not keep the L0 in training"):
        EXPERIMENTS["jumprelu"]().cells([{"k": 32, "l0": 32.0, "seed": 0}])


def test_jumprelu_is_judged_at_the_l0_it_has():
    from kronsae.experiments.jumprelu import on_curve

    points = [(64, 0.7), (16, 0.5), (128, 0.9)]
    found = [on_curve(points, l0) for l0 in (8, 16, 32, 64, 128, 256)]
    assert found == pytest.approx([0.4, 0.5, 0.6, 0.7, 0.9, 1.1])
    assert on_curve([(16, 0.5)], 20) == 0.5


def test_equal_flops():
    """Eq. 7 by hand: TopK 64·16 + 4·16; m2n4 with 8 heads 16·8·6 + 64 + 4·16."""
    from kronsae.experiments.isoflop import equal_flops_tokens

    tokens = equal_flops_tokens("m2n4", dict_size=64, k=4, d_model=16, budget=1000)
    assert tokens == round(1000 * (1024 + 64) / (768 + 64 + 64))
    for dense in ("topk", "matryoshka"):
        assert equal_flops_tokens(dense, 64, 4, 16, 1000) == 1000


def test_one_sae_for_all_k_is_judged_at_each():
    """And so is the SAE of the largest k; others at their own alone."""
    from kronsae.experiments.hierarchical import EACH, LARGEST, ONE

    experiment = EXPERIMENTS["hierarchical"](k=(4, 8), learning_rates=(0.1,), seeds=1)
    cells = experiment.cells([])
    assert [(cell["trained"], cell["k"]) for cell in cells] == [(ONE, 8), (EACH, 4), (EACH, 8)]
    assert [experiment.sae(cell).objective for cell in cells] == ["hierarchical", "plain", "plain"]
    explained = [{"4": 0.5, "8": 0.6}, {"4": 0.52}, {"4": 0.3, "8": 0.61}]
    runs = [
        {**cell, "by_k": by_k, "explained_variance": list(by_k.values())[-1]}
        for cell, by_k in zip(cells, explained, strict=True)
    ]
    assert {
        (run["trained"], run["k"]): run["explained_variance"] for run in experiment.points(runs)
    } == {
        **{(ONE, 4): 0.5, (ONE, 8): 0.6, (EACH, 4): 0.52, (EACH, 8): 0.61},
        **{(LARGEST, 4): 0.3, (LARGEST, 8): 0.61},
    }
    table, sentence = experiment.conclude(runs)
    assert "| 4 | 0.5000 | 0.5200 | 0.3000 |" in table
    assert (
        "-0.0200 at k = 4, -0.0100 at k = 8; beside the SAE of the largest k, +0.2000" in sentence
    )
    assert experiment.merit(runs[0]) == pytest.approx(0.55) and experiment.merit(runs[1]) == 0.52


# convergence


@pytest.mark.parametrize(
    "arm, words",
    [
        ("lr_fnal=1", "NAME=VALUE"),
        ("adam_beta2", "NAME=VALUE"),
        ("adam_beta2=fast", "float"),
        ("adam_beta2=2", "adam_beta2"),
        ("eps=-1", "eps"),
    ],
)
def test_arms_are_settings_of_the_trainer(arm, words):
    kind = EXPERIMENTS["convergence"]
    with pytest.raises(InputError, match=words):
        kind(**kind.smallest | {"arms": (arm,)}).cells([])


def test_a_dense_encoder_has_no_gate_to_change():
    kind = EXPERIMENTS["convergence"]
    experiment = kind(**kind.smallest | {"variants": ("m2n4", "topk", "m4n8")})
    arms = {}
    for row in experiment.rows():
        arms.setdefault(row["variant"], []).append(row["arm"])
    assert arms["m2n4"] == arms["m4n8"] == ["recipe", "adam_beta2=0.95", "eps=1e-5"]
    assert arms["topk"] == ["recipe", "adam_beta2=0.95"]
    config = experiment.sae({"variant": "m2n4", "arm": "eps=1e-5", "dict_size": 128})
    assert config.eps == 1e-5 != SAEConfig(dict_size=128).eps
    assert difference("adam_beta2=0.95") == {TrainConfig: {"adam_beta2": 0.95}}


# conversion


def test_latents_are_grouped_into_heads_by_their_rows():
    """Rows that are sums of a head's base and extension rows are found, and fitted exactly."""
    from kronsae.experiments.conversion import additive, converted, grid_of, nearest_groups

    h, m, n, d = 6, 2, 4, 32
    generator = torch.Generator().manual_seed(0)
    centre, base, extension = (
        scale * torch.randn(h, count, d, generator=generator)
        for count, scale in ((1, 8), (m, 3), (n, 1))
    )
    truth = (centre + base)[:, :, None] + extension[:, None]  # [h, m, n, d]
    shuffled = torch.randperm(h * m * n, generator=generator)
    rows = truth.flatten(0, 2)[shuffled]
    groups = nearest_groups(rows, m * n)
    assert groups.flatten().sort().values.tolist() == list(range(len(rows)))
    order = torch.stack([group[grid_of(rows[group], m)] for group in groups])
    fitted = additive(rows[order])
    assert fitted.shape == (h, m + n, d)
    means = (fitted[:, :m, None] + fitted[:, None, m:]) / 2
    torch.testing.assert_close(means, rows[order], atol=1e-4, rtol=1e-4)

    dense, kron = (
        SAE(SAEConfig(d_model=d, k=4, **shape))
        for shape in ({"encoder": "dense", "dict_size": h * m * n}, {"heads": h, "m": m, "n": n})
    )
    with torch.no_grad():  # all latents of a head alike: then both encoders are the same
        dense.W_enc.copy_(centre.expand(h, m * n, d).flatten(0, 1)[shuffled])
        dense.b_enc.fill_(0.5)
    x = torch.randn(50, d, generator=generator)
    values = converted(dense, kron, fitted=True).encode(x).values
    torch.testing.assert_close(values, dense.encode(x).values, atol=1e-4, rtol=1e-4)


def test_a_comparison_tunes_each_budget_on_as_many_tokens_as_it_trains():
    experiment = EXPERIMENTS["comparison"](
        layer=(1, 2), variants=("topk", "m2n4"), learning_rates=(0.1, 0.2), seeds=2, tokens=1000
    )
    trials = experiment.cells([])
    rows = [("tokens", "topk"), ("tokens", "m2n4"), ("FLOPs", "m2n4")]
    assert [(c["layer"], c["equal"], c["variant"], c["lr"]) for c in trials] == [
        (layer, *row, lr) for layer in (1, 2) for row in rows for lr in (0.1, 0.2)
    ]
    assert {c["seed"] for c in trials} == {TUNING_SEED}
    tokens = [experiment.tokens_of(cell, 64) for cell in trials[:6]]
    assert tokens[:4] == [1000] * 4  # a trial is as long as the trainings
    assert 1200 < tokens[4] == tokens[5] < 1350  # 6 rows for 8 latents
    assert experiment.longest(64) == tokens[5]
    # Of m2n4 the larger rate is better on few tokens, the smaller one on more.
    runs = [
        {**c, "explained_variance": c["lr"] if c["equal"] == "tokens" else -c["lr"]} for c in trials
    ]
    cells = [c for c in experiment.cells(runs) if c not in trials and c["layer"] == 1]
    assert [(c["equal"], c["variant"], c["lr"], c["seed"]) for c in cells] == [
        (*row, rate, seed)
        for row, rate in zip(rows, (0.2, 0.2, 0.1), strict=True)
        for seed in (0, 1)
    ]
    single = dataclasses.replace(experiment, learning_rates=(0.2,))
    assert {(c["lr"], c["seed"]) for c in single.cells([])} == {(0.2, 0), (0.2, 1)}
    assert dataclasses.replace(experiment, equal=("tokens",)).longest(64) == 1000


def test_saes_of_a_comparison_know_their_model_and_text(tmp_path):
    from kronsae.metrics.target_model import load_sae

    kind = EXPERIMENTS["comparison"]
    experiment = kind(**kind.smallest | {"saes": str(tmp_path), "layer": (1,)})
    cell = {
        "layer": 1,
        "variant": "m2n4-refined",
        "dict_size": 128,
        "equal": "tokens",
        "budget": 2048,
    }
    figures = experiment.run(experiment.prepare(), {**cell, "lr": 0.01, "seed": 0})
    loaded = load_sae(str(tmp_path / figures["sae"]), {})
    assert figures["tokens"] == loaded.sae.metadata["tokens"] == 2048
    assert (loaded.data.model, loaded.data.layer) == ("embedded", 1)
    assert loaded.trained_on["text"] and loaded.sae.config.refine == 1


def again_at(folder, experiment):
    return run_grid("comparison", experiment, folder / "out", "a command", lambda *_: None)


def test_settings_of_runs_from_a_cache_are_those_of_the_cache(tmp_path, monkeypatch):
    cached.make(monkeypatch, tmp_path / "cache")
    kind = EXPERIMENTS["comparison"]
    few = {"tokens": 256, "batch_size": 64, "seeds": 1}
    given = {"cache": str(tmp_path / "cache"), "layer": (1,), "variants": ("topk",)}
    experiment = kind(**kind.smallest | given | few)
    runs = again_at(tmp_path, experiment)
    assert runs[-1]["tokens"] == 256
    settings = json.loads((tmp_path / "out/comparison.json").read_text())["settings"]
    assert settings["dataset"] == cached.DATA.dataset != experiment.dataset
    assert settings["heldout_tokens"] == cached.DATA.heldout_tokens != experiment.heldout_tokens
    assert again_at(tmp_path, experiment) == runs
    with pytest.raises(InputError, match=r"model 'gpt2': .* was harvested with 'embedded'; leave"):
        again_at(tmp_path, dataclasses.replace(experiment, model="gpt2"))
    path = tmp_path / "out/comparison.json"
    document = json.loads(path.read_text())
    older = {**document["settings"], "dataset": "stdlib", "heldout_tokens": 2048}
    del older["cache_fingerprint"]
    path.write_text(json.dumps({**document, "settings": older}))
    assert again_at(tmp_path, experiment) == runs  # it now has the fingerprint
    shutil.rmtree(tmp_path / "cache")
    data = dataclasses.replace(cached.DATA, context_length=8)
    cached.make(monkeypatch, tmp_path / "cache", data=data)
    with pytest.raises(InputError, match="cache_fingerprint: was"):
        again_at(tmp_path, experiment)


def test_a_cell_reads_the_same_tokens_of_a_cache_beside_longer_ones(tmp_path, monkeypatch):
    cached.make(monkeypatch, tmp_path / "cache")
    given = {"cache": str(tmp_path / "cache"), "layer": 1, "batch_size": 32, "buffer_tokens": 64}
    jumprelu, comparison = EXPERIMENTS["jumprelu"], EXPERIMENTS["comparison"]
    short = jumprelu(**given, tokens=128).activations().x
    assert short.shape[0] == 128
    assert jumprelu(**given, tokens=(128, 256)).activations().x[:128].equal(short)
    longer = comparison(**given | {"layer": (1,)}, tokens=256)
    assert longer.activations(layer=1).x[:128].equal(short)


def test_a_comparison_says_nothing_of_a_budget_without_runs():
    experiment = EXPERIMENTS["comparison"](variants=("topk", "m2n4"), seeds=1)
    run = {"layer": 2, "variant": "topk", "equal": "tokens", "seed": 0, "lr": 0.1}
    run |= {"flops_share": 1.0, "explained_variance": 0.5, "dead_share": 0.0}
    kron = {**run, "variant": "m2n4", "explained_variance": 0.6}
    _, line = experiment.conclude([run, kron])
    assert "at equal tokens m2n4 at 1 of 1 (as many) (paper" in line
    assert "at equal FLOPs" not in line
    _, line = experiment.conclude([run, kron, {**kron, "equal": "FLOPs"}])
    assert "; at equal FLOPs m2n4 at 1 of 1 (as many) (paper" in line
    half = {**kron, "variant": "topk-half", "equal": "FLOPs", "explained_variance": 0.55}
    _, line = experiment.conclude([run, half, {**kron, "equal": "FLOPs"}])
    assert "at equal FLOPs topk-half at 1 of 1, m2n4 at 1 of 1 (as many)" in line
    assert "; at equal FLOPs m2n4 at 1 of 1 (half) (paper" in line
    assert "none to compare" in experiment.conclude([run])[1]
