"""README is short; its Python examples, and those of pages, run as they stand.

The commands and links of all pages exist.
"""

import math
import re
import shlex
from pathlib import Path

import pytest
import torch

from kronsae import SAE, SAEConfig
from kronsae.__main__ import COMMANDS as KRONSAE
from kronsae.evaluate.__main__ import make_parser as evaluate_parser
from kronsae.experiments.__main__ import parse as parse_experiment
from kronsae.harvest import parse as parse_harvest
from kronsae.interpret.__main__ import make_parser as interpret_parser
from kronsae.intervene import make_parser as intervene_parser
from kronsae.training.options import make_parser, parse

ROOT = Path(__file__).parent.parent
README, *PAGES = (
    (ROOT / name).read_text(encoding="utf-8")
    for name in (
        "README.md",
        "docs/training.md",
        "docs/looking.md",
        "docs/libraries.md",
        "docs/claims.md",
    )
)
TEXT = "\n".join([README, *PAGES])
ALL_PAGES = [
    path.relative_to(ROOT)
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("kronsae_kernels/*.md"))
]
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
COMMANDS = re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)


def example(words: str) -> str:
    """The one Python example that holds these words."""
    [found] = [each for each in EXAMPLES if words in each]
    return found


def test_it_is_short():
    assert len(README.splitlines()) <= 120


def test_features_example(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sae = SAE(SAEConfig(d_model=256, heads=150, m=2, n=2, k=8))
    sae.save("runs/MY-RUN", {"data": {"name": "embedded", "layer": 2}})
    exec(example("kronsae.language_model"), {})
    assert "latent" in capsys.readouterr().out


def test_training_example(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(example("result = fit("), names)
    assert 0.3 < float(capsys.readouterr().out) < 1
    assert names["codes"].values.shape == names["codes"].indices.shape == (8, 16)
    assert names["x_hat"].shape == (8, 64)


def test_grid_example():
    names: dict = {}
    exec(example("nested = SAEConfig"), names)
    assert names["sae"].config.experts == 8
    assert names["transcoder"].config.d_target == 32
    assert names["y_hat"].shape == (8, 32)


def test_kernels_example():
    names: dict = {}
    exec(example("topk = dense_encode"), names)
    assert names["x_hat"].shape == (32, 64)
    assert names["w_enc"].grad.any() and names["w_dec"].grad.any()
    assert names["topk"].values.shape == (32, 8)


def test_fused_step_example(capsys):
    """On a GPU as it stands, elsewhere with the kernels in Triton's interpreter."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names: dict = {}
    exec(example("import TrainingStep").replace('"cuda"', f'"{device}"'), names)
    assert 0 < float(capsys.readouterr().out) < 10
    assert names["grad_norm"].isfinite()


def test_interventions_example(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    SAE(SAEConfig(d_model=256, heads=32, m=2, n=2, k=8)).save("runs/MY-RUN")
    names: dict = {}
    exec(example("with intervene("), names)
    assert capsys.readouterr().out.startswith("def read(self, path):")
    exec(example("calibrated("), names)
    assert names["best"].ratio <= 1.5 and capsys.readouterr().out


def test_other_commands_parse():
    """Commands other than training's, each by its own parser."""
    parsers = {
        "evaluate": evaluate_parser,
        "intervene": intervene_parser,
        "interpret": interpret_parser,
    }
    found = set()
    for line in "\n".join(COMMANDS).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["kronsae"] and words[1] in parsers:
            parsers[words[1]]().parse(words[2:])
            found.add(words[1])
    assert found == parsers.keys()


TRAINING = [c for c in COMMANDS if c.startswith("kronsae train")]


@pytest.mark.parametrize("command", [c for c in TRAINING if "--finetune" not in c])
def test_commands_parse(command):
    words = command.replace("\\\n", " ").split()
    request = parse(words[2:])
    if len(request.data) > 1:  # "two SAEs at each of twelve layers"
        assert len(request.members) == 24 and len(request.data) == 12
        return
    if request.sweep:  # "trains twelve": one for every combination
        flags = " ".join(words[2:]).split("--")[1:]
        assert len(request.members) == math.prod(len(flag.split()) - 1 for flag in flags)
        return
    assert request.config.train.tokens == 500_000_000


def test_commands_that_finetune_parse(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/mine", "lens"):
        sae = SAE(SAEConfig(d_model=256, encoder="dense", dict_size=2048, k=32))
        sae.metadata = {"data": {"name": "embedded", "layer": 2}}
        sae.save(folder)
    lines = [line for c in TRAINING if "--finetune" in c for line in c.splitlines()]
    requests = [parse(shlex.split(line)[2:]) for line in lines if line.startswith("kronsae train")]
    assert [len(request.starts) for request in requests] == [1, 0, 3, 0]
    assert {request.config.sae.dict_size for request in requests} == {2048}


def test_harvest_parses():
    for block, expected in zip(
        [c for c in COMMANDS if c.startswith("kronsae harvest")],
        (((3, 6), 10_000_000), ((10, 20), 1_000_000)),
        strict=True,
    ):
        harvested, used = block.replace("\\\n", " ").strip().splitlines()
        config, folder, _ = parse_harvest(shlex.split(harvested)[2:])
        assert (config.layers, config.tokens) == expected
        _, name, *words = shlex.split(used)
        if name == "train":
            flags = vars(make_parser().parse_args(words))
            assert Path(flags["activations"]) == folder
            assert set(flags["layer"]) <= set(config.layers)
        else:
            experiment, _ = parse_experiment(words[0], words[1:])
            assert experiment.cache == str(folder) and experiment.layer == config.layers


def test_commands_of_torchrun_parse():
    joined = [command.replace("\\\n", " ") for command in COMMANDS]
    lines = [line for c in joined for line in c.splitlines() if line.startswith("torchrun")]
    for line in lines:
        _, _, flags = line.partition("-m kronsae.train ")
        assert parse(shlex.split(flags)).config.train.tensor_parallel in (1, 4)
    assert len(lines) == 4


def test_experiments_parse():
    found = [c for c in COMMANDS if c.startswith("kronsae experiments")]
    for command in found:
        name, *flags = shlex.split(command, comments=True)[2:]
        parse_experiment(name, flags)
    assert found


def test_files_named_in_the_tree_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = re.search(r"## Where things are\n\n```\n(.*?)```", text, flags=re.DOTALL).group(1)
    folder, missing = "", []
    for line in tree.splitlines():
        names = re.findall(r"([\w/]+\.py|\w+/)(?=\s|$)", line)
        if not line.startswith(" "):
            folder = names[0] if names else ""
        for name in names:
            places = (Path(folder) / name, Path(name))
            if not any((ROOT / place).exists() for place in places):
                missing.append(name)
    assert not missing


@pytest.mark.parametrize("page", ALL_PAGES, ids=str)
def test_links_lead_somewhere(page):
    """Also to headings of other pages, by the names that GitHub gives them."""
    page = ROOT / page
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text(encoding="utf-8")):
        name, _, heading = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), target
        if heading:
            text = linked.read_text(encoding="utf-8")
            titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
            names = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
            assert heading in names, target


@pytest.mark.parametrize("page", ALL_PAGES, ids=str)
def test_pages_name_commands_that_exist(page):
    """In code: inline, or at the beginning of a line of a block."""
    text = (ROOT / page).read_text(encoding="utf-8")
    code = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    code += re.findall(r"`([^`\n]+)`", text)
    named = re.findall(r"^kronsae (\w+)", "\n".join(code), flags=re.MULTILINE)
    assert set(named) <= {*KRONSAE, "COMMAND"}
