"""Kinds from outside: a file of one's own adds a selection that every command knows."""

import ast
import json
import re
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import kronsae
from kronsae import InputError, SAEConfig
from kronsae.__main__ import main as command
from kronsae.config import all_settings
from kronsae.hub import model_card
from kronsae.interop.formats import Format
from kronsae.model.selection import Selection
from kronsae.registry import (
    FORMATS,
    LOGS,
    OBJECTIVES,
    SELECTIONS,
    SOURCES,
    Registry,
    load_plugin,
)
from kronsae.runs.folder import RunFolder
from kronsae.training.options import parse

CONTRIBUTING = Path(__file__).parent.parent / "CONTRIBUTING.md"
TRAIN = (
    *("--tokens", "6000", "--batch-size", "500", "--dict-size", "64", "--heldout-tokens", "512"),
    *("--context-length", "128", "--buffer-tokens", "2048", "--k", "8", "--eval-every", "0"),
    *("--device", "cpu"),
)


@pytest.fixture
def plugin(tmp_path):
    """The example of CONTRIBUTING.md, as a file."""
    [code] = re.findall(r"```python\n# mine.py\n(.*?)```", CONTRIBUTING.read_text(), re.DOTALL)
    path = tmp_path / "mine.py"
    path.write_text(code)
    yield path
    SELECTIONS._kinds.pop("mine", None)


def test_a_selection_of_ones_own_from_training_to_export(plugin, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    own = ("--plugin", str(plugin), "--selection", "mine")
    assert command(["train", *own, *TRAIN, "--plan"]) == 0
    assert "Fading TopK" in capsys.readouterr().out
    assert command(["train", *own, *TRAIN, "--half-life", "3", "--out", "run"]) == 0
    _, settings = RunFolder.open("run")
    assert settings["config"]["sae"]["selection_settings"] == {"half_life": 3.0}
    sae = kronsae.load("run")
    assert sae.config.selection_settings.half_life == 3.0
    assert f"Next:\n  kronsae explore run --plugin {plugin}  to look" in capsys.readouterr().out
    assert command(["evaluate", "run", "--out", "judged", "--heldout-tokens", "256"]) == 0
    assert json.loads(Path("judged/evaluation.json").read_text())["judged"][0]["k"] == 8
    dense = ("--encoder", "dense", *own, *TRAIN)
    assert command(["train", *dense, "--half-life", "1", "2", "--out", "sweep"]) == 0
    assert (Path("sweep") / "half_life1" / "sae").is_dir()
    assert command(["export", "sweep/half_life1", "--to", "sae_lens", "--out", "lens"]) == 0
    assert json.loads(Path("lens/cfg.json").read_text())["architecture"] == "kronsae"
    capsys.readouterr()
    for library in ("sparsify", "dictionary_learning"):  # where it would be a plain TopK
        assert command(["export", "sweep/half_life1", "--to", library, "--out", library]) == 2
        assert "selection 'mine' does neither" in capsys.readouterr().err


def test_who_has_not_registered_it_is_told_what_to_do(plugin, tmp_path):
    load_plugin(plugin)
    sae = kronsae.SAE(SAEConfig(d_model=4, dict_size=16, k=2, selection="mine"))
    sae.save(tmp_path / "sae")
    SELECTIONS._kinds.pop("mine")
    with pytest.raises(InputError, match="selection: one of .*, not 'mine'.*--plugin FILE"):
        kronsae.load(tmp_path / "sae")
    settings = {"sae": {"selection": "mine", "selection_settings": {"half_life": 3.0}}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="selection: one of .*, not 'mine'.*--plugin FILE"):
        parse(["--config", str(tmp_path / "config.json")])


@pytest.mark.parametrize(
    "code, words",
    [
        ("import nothing_like_this", "line 1: ModuleNotFoundError"),
        ("x = (", "SyntaxError"),
        ("import json\njson.loads('x')", "line 2: JSONDecodeError"),
        (
            """
            from kronsae.model.selection import TopK
            from kronsae.registry import SELECTIONS
            @SELECTIONS.register("topk")
            class Other(TopK): ...
            """,
            "'topk' is already registered",
        ),
    ],
)
def test_a_plugin_that_cannot_be_run(code, words, tmp_path, capsys):
    path = tmp_path / "broken.py"
    path.write_text(textwrap.dedent(code))
    assert command(["train", "--plugin", str(path)]) == 2
    assert re.search(words, capsys.readouterr().err)


def test_a_plugin_that_is_not_there(capsys):
    assert command(["train", "--plugin", "nowhere.py"]) == 2
    assert "there is no such file" in capsys.readouterr().err
    assert command(["evaluate", "--plugin"]) == 2
    assert "expected one argument" in capsys.readouterr().err


def test_settings_of_kinds_have_names_of_their_own(plugin):
    plugin.write_text(plugin.read_text().replace("half_life", "batch_size"))
    load_plugin(plugin)
    with pytest.raises(InputError, match="batch_size has the name of another one"):
        all_settings()


def test_settings_of_a_kind():
    relu = SAEConfig(dict_size=32, selection="relu", selection_settings={"l1_coefficient": 3})
    assert relu.selection_settings.l1_coefficient == 3.0 and relu.k == 0
    same = SAEConfig(**vars(relu))
    assert same == relu and hash(same) == hash(relu)
    for settings, words in (
        ({"selection": "relu", "k": 5}, "k has no effect with selection 'relu'"),
        ({"selection": "relu", "selection_settings": {"l2": 1}}, "unknown settings"),
        ({"selection": "relu", "selection_settings": {"l1_coefficient": -1}}, "expected >= 0"),
        ({"k": 2, "selection_settings": {"l1_coefficient": 1}}, "no settings of its own"),
        ({"selection": "relu", "selection_settings": 5}, "expected ReLUSettings, got 5"),
    ):
        with pytest.raises(InputError, match=words):
            SAEConfig(dict_size=32, **settings)


def test_a_registry_is_a_mapping():
    kinds: Registry[type] = Registry("kind")
    assert kinds.register("a")(int) is int and kinds.register("a")(int) is int
    assert dict(kinds) == {"a": int} and "b" not in kinds and len(kinds) == 1
    with pytest.raises(InputError, match="already registered"):
        kinds.register("a")(str)
    with pytest.raises(InputError, match=r"kind: one of \('a',\), not \['x'\]"):
        kinds[["x"]]
    assert set(OBJECTIVES) == {"plain", "matryoshka", "multi_topk", "hierarchical"}


def test_a_kind_without_a_method_that_it_has_to_define():
    with pytest.raises(InputError, match="selection 'mine' has to define `forward`"):

        @SELECTIONS.register("mine")
        class Mine(Selection): ...

    assert "mine" not in SELECTIONS
    with pytest.raises(InputError, match="format 'theirs' has to define `read`, `write`"):
        FORMATS.register("theirs")(Format)


def test_gated_latents_are_those_of_the_paper():
    """relu(exp(r) W x + b_mag) where W x + b_gate > 0; folded and exported it stays so."""
    config = SAEConfig(d_model=8, dict_size=32, encoder="gated", selection="relu")
    sae = kronsae.SAE(config, generator=torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        for parameter in (sae.b_enc, sae.kind.b_mag, sae.kind.r_mag):
            parameter.normal_(0, 0.3)
        sae.W_enc.normal_()
    x = torch.randn(64, 8)
    pre = x @ sae.W_enc.T
    expected = (sae.kind.r_mag.exp() * pre + sae.kind.b_mag).relu() * (pre + sae.b_enc > 0)
    for codes in (sae.encode(x), sae.every(x), sae.encode(x, k=32)):
        found = torch.zeros(64, 32).scatter_add(1, codes.indices, codes.values)
        torch.testing.assert_close(found, expected)
    few = sae.encode(x, k=3)
    torch.testing.assert_close(few.values, expected.topk(3).values)


@pytest.mark.parametrize("library", ["sae_lens", "dictionary_learning"])
@pytest.mark.parametrize("encoder", ["dense", "gated"])
def test_relu_and_gated_saes_go_out_as_the_thresholds_that_they_are(encoder, library, tmp_path):
    sae = kronsae.SAE(SAEConfig(d_model=8, dict_size=32, encoder=encoder, selection="relu")).eval()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    FORMATS[library].write(sae, tmp_path / "out")
    back = kronsae.load(tmp_path / "out", allow_pickle=True)
    assert back.config.encoder == "dense"
    assert back.config.selection == ("relu" if encoder == "dense" else "jumprelu")
    x = torch.randn(64, 8)
    ours, theirs = (
        torch.zeros(64, 32).scatter_add(1, codes.indices, codes.values)
        for codes in (sae.encode(x), back.encode(x))
    )
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(back(x).x_hat, sae(x).x_hat, rtol=1e-4, atol=1e-5)


def test_what_has_no_stock_form(tmp_path):
    """A gate and a k together; SAELens gets our own architecture, sparsify a sentence."""
    sae = kronsae.SAE(SAEConfig(d_model=8, dict_size=32, encoder="gated", k=4)).eval()
    with pytest.raises(InputError, match="have to pass a gate and be among the k largest"):
        FORMATS["sparsify"].write(sae, tmp_path / "out")
    FORMATS["sae_lens"].write(sae, tmp_path / "lens")
    assert kronsae.load(tmp_path / "lens").config == sae.config
    relu = kronsae.SAE(SAEConfig(d_model=8, dict_size=32, encoder="dense", selection="relu"))
    with pytest.raises(InputError, match="selection 'relu' has thresholds"):
        FORMATS["sparsify"].write(relu, tmp_path / "out")


@pytest.mark.slow
def test_pages_and_cards_of_a_kind_with_settings_of_its_own(tmp_path, monkeypatch, capsys):
    """No "k = 0", no nested object: the report, the model card, the judgement and --config."""
    monkeypatch.chdir(tmp_path)
    settings = [flag for flag in TRAIN if flag not in ("--k", "8")]
    relu = ("--selection", "relu", "--l1-coefficient", "2.5")
    assert command(["train", *settings, *relu, "--out", "run"]) == 0
    report = Path("run/report.html").read_text()
    assert "&#34;l1_coefficient&#34;: 2.5" in report
    card = model_card(kronsae.load("run"), "me/sae")
    assert "kept sparse by an L1 penalty of 2.5" in card
    assert "| l1_coefficient | 2.5 |" in card and "_settings" not in card
    assert command(["evaluate", "run", "--out", "judged", "--heldout-tokens", "256"]) == 0
    assert "k = 0" not in Path("judged/evaluation.md").read_text() + capsys.readouterr().out
    assert (
        command(["train", "--config", "run/config.json", "--device", "cpu", "--out", "again"]) == 0
    )
    assert kronsae.load("again").config == kronsae.load("run").config
    for value, words in ((5, "expected an object, got 5"), ({"l2": 1}, "has no setting 'l2'")):
        Path("bad.json").write_text(json.dumps({"sae": {"selection_settings": value}}))
        assert command(["train", "--config", "bad.json"]) == 2
        assert words in capsys.readouterr().err


PLUGIN = """
import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from kronsae.data import TensorActivations
from kronsae.interop.formats import Format
from kronsae.interop.stock import Stock, stock_of
from kronsae.registry import FORMATS, LOGS, SOURCES
from kronsae.runs.logs import RunLog
from kronsae.sources import Source


@SOURCES.register("rows")
class Rows(Source):
    @classmethod
    def open(cls, data, *, batch_size, seed, device):
        x = load_file(data.activations.removeprefix("rows:"))["x"]
        source = TensorActivations(x[data.heldout_tokens :], batch_size, seed)
        source.heldout_activations = lambda: x[: data.heldout_tokens]
        return source


@LOGS.register("lines")
class Lines(RunLog):
    def __init__(self, folder, config, settings, group):
        self.file = (folder / "lines.txt").open("a")

    def write(self, figures, step, tokens):
        print(step, tokens, *sorted(figures), file=self.file, flush=True)


@FORMATS.register("plain")
class Plain(Format):
    library = package = "plain"
    weights, config = "plain.safetensors", "plain.json"
    how_to_load = 'plain.load("{out}")'

    @staticmethod
    def write(sae, folder):
        stock = stock_of(sae, "plain")
        folder = Path(folder)
        folder.mkdir()
        names = ("W_enc", "b_enc", "W_dec", "b_dec")
        save_file({n: getattr(stock, n).contiguous() for n in names}, folder / Plain.weights)
        (folder / Plain.config).write_text(json.dumps({"k": stock.k}))
        return folder

    @staticmethod
    def read(folder):
        k = json.loads((folder / Plain.config).read_text())["k"]
        return Stock(**load_file(folder / Plain.weights), k=k).to_sae()
"""


def test_a_source_a_log_and_a_format_of_ones_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(PLUGIN)
    save_file({"x": torch.randn(4000, 16)}, "x.safetensors")
    flags = ("--encoder", "dense", "--dict-size", "64", "--k", "4", "--batch-size", "250")
    flags += ("--tokens", "3000", "--heldout-tokens", "500", "--log-every", "4", "--device", "cpu")
    rows = ("--plugin", "mine.py", "--activations", "rows:x.safetensors")
    torch.manual_seed(1)
    try:
        assert command(["train", *rows, *flags, "--out", "run"]) == 0
        assert torch.initial_seed() == 0  # --seed's default: what a plugin draws is repeated
        printed = capsys.readouterr().out
        assert "rows:x.safetensors (d = 16)" in printed
        assert "Next:" not in printed and "explore" not in printed  # there is no model
        assert "the sizes of rows:x.safetensors are unknown until it is run" in printed
        assert (Path("run") / "lines.txt").read_text().startswith("4 1000 train/auxk_loss ")
        sae = kronsae.load("run")
        assert sae.d_model == 16 and sae.metadata["data"]["source"] == "tensor"
        assert command(["train", *rows, *flags, "--resume", "run", "--tokens", "3500"]) == 2
        assert command(["train", *rows, *flags, "--plan"]) == 2
        assert "the sizes of rows" in capsys.readouterr().err
        monkeypatch.setattr(SOURCES["rows"], "open", lambda data, **_: torch.ones(9, 16))
        assert command(["train", *rows, *flags, "--out", "other"]) == 2
        assert "Rows.open: expected `heldout_activations`, got tensor" in capsys.readouterr().err
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        assert command(["train", "--activations", "columns:x", *flags]) == 2
        assert "no source 'columns' is registered" in capsys.readouterr().err
        assert command(["train", "--activations", "stdin", *flags]) == 2
        assert "'stdin': expected 'stdin:', with a colon" in capsys.readouterr().err
        assert command(["train", *rows, "--model", "gpt2", *flags]) == 2
        assert "--model gpt2 has no effect with --activations" in capsys.readouterr().err
        export = ("export", "run", "--plugin", "mine.py", "--to", "plain", "--out", "plain")
        assert command(export) == 0
        assert 'Load it with: plain.load("plain")' in capsys.readouterr().out
        own = 'my "own" \\'
        export = ("export", "run", "--plugin", "mine.py", "--to", "kronsae", "--out", own)
        assert command([*export, "--verify", "--tokens", "100"]) == 0
        said = capsys.readouterr().out
        assert "On 100 held-out tokens of rows:x.safetensors" in said
        [call] = re.findall(r"Load it with: kronsae.load\((.*)\)", said)
        assert ast.literal_eval(call) == own
        assert command(["evaluate", "run", "--plugin", "mine.py"]) == 2
        printed = capsys.readouterr().err
        assert "was trained on rows:x.safetensors, without a language model: give" in printed
        back = kronsae.load("plain")
        x = torch.randn(8, 16)
        torch.testing.assert_close(back(x).x_hat, sae(x).x_hat)
    finally:
        for registry, name in ((SOURCES, "rows"), (LOGS, "lines"), (FORMATS, "plain")):
            registry._kinds.pop(name, None)
