"""The examples of docs/ run as they stand, and their commands are ones that exist."""

import re
from pathlib import Path

import pytest
import torch

from kronsae import SAE, SAEConfig
from kronsae.export.__main__ import make_parser
from kronsae.intervene import make_parser as intervene_parser
from kronsae.metrics.figures import MEANING
from kronsae.training.options import make_parser as training_parser
from kronsae.training.options import parse
from kronsae_kernels import fused_encode

DOCS = Path(__file__).parent.parent / "docs"


def blocks(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


EXAMPLES = [each for each in blocks("libraries.md", "python") if "print(" not in each][1:]
"""All but the first, and that of the fused step, which tests/test_readme.py runs."""


def run(example: str) -> dict:
    names: dict = {}
    exec(example, names)
    return names


def test_there_are_examples():
    assert len(EXAMPLES) == 6


def test_beside_what_you_have():
    """The plain autoencoder and the one of kernels have the same gradients."""
    gradients = run(EXAMPLES[0])["gradients"]
    plain, sparse = gradients.values()
    for expected, found in zip(plain, sparse, strict=True):
        assert expected.abs().sum() > 0
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_with_your_layout():
    names = run(EXAMPLES[1])
    torch.testing.assert_close(names["x_hat"], names["x_hat_dense"], rtol=1e-4, atol=1e-5)


def test_dead_latents():
    names = run(EXAMPLES[2])
    dead = names["dead"]
    for gradient in (names["w_enc"].grad, names["w_dec"].grad):
        assert gradient[dead].abs().sum() > 0 and gradient[~dead].abs().sum() == 0


def test_a_kron_encoder_in_your_class():
    names = run(EXAMPLES[3])
    assert names["x_hat"].shape == (16, 32) and names["codes"].indices.max() < 512
    for parameter in names["model"].parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any()


def test_that_class_with_what_expects_plain_parameters(tmp_path):
    """Flat vectors, safetensors and FSDP2 take parameters that are contiguous."""
    import safetensors.torch
    from torch import distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.nn.utils import parameters_to_vector, vector_to_parameters

    names = run(EXAMPLES[3])
    model, x = names["model"], torch.randn(16, 32)
    expected = model(x)[0]
    safetensors.torch.save_model(model, tmp_path / "model.safetensors")
    vector_to_parameters(parameters_to_vector(model.parameters()), model.parameters())
    assert torch.equal(model(x)[0], expected)
    again = names["KronAutoencoder"](d=32, heads=64, m=2, n=4, k=8)
    safetensors.torch.load_model(again, tmp_path / "model.safetensors")
    assert torch.equal(again(x)[0], expected)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        sharded = fully_shard(again, mesh=mesh)
        found = sharded(x)[0]
        assert torch.equal(found, expected)
        found.square().mean().backward()
        weight = sharded.w_enc
        assert weight.grad.full_tensor().abs().sum() > 0
        with pytest.raises(ValueError, match=r"w_enc: .* got a DTensor. Give `.to_local\(\)`"):
            fused_encode(x, weight, m=2, k=8, layout="row-major")
    finally:
        dist.destroy_process_group()


def test_a_jumprelu_autoencoder():
    assert run(EXAMPLES[4])["log_threshold"].grad.abs().sum() > 0


def test_derivatives():
    names = run(EXAMPLES[5])
    assert names["moved"].abs().sum() > 0
    assert names["each"].shape == (64, 32)


def test_contract_lists_what_is_exported():
    import kronsae_kernels

    text = (DOCS / "libraries.md").read_text(encoding="utf-8")
    for name in kronsae_kernels.__all__:
        assert name == "__version__" or name in text or name == "SparseCodes", name


COMMANDS = [
    line
    for page in ("interop.md", "../README.md")
    for block in blocks(page, "bash")
    for line in block.splitlines()
]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("kronsae export")])
def test_export_commands_parse(command):
    assert make_parser().parse(command.split()[2:]).source == "RUN"


def test_training_command_of_the_absorption_figures(tmp_path, monkeypatch):
    [command] = [c for c in COMMANDS if "--sweep absorption.json" in c]
    text = (DOCS / "interop.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    Path("absorption.json").write_text(re.search(r"holding `(\[.*?\])`", text).group(1))
    request = parse(command.split()[2:])
    assert len(request.members) == 10
    kinds = {(c.sae.encoder, c.sae.k) for c in request.members.values()}
    assert len(kinds) == 10


def test_reading_names_the_figures_of_an_evaluation():
    text = (DOCS / "reading.md").read_text(encoding="utf-8")
    part = text[text.index("## How well") : text.index("## The explorer")]
    labels = {label for label, _ in MEANING.values()}
    rows = re.findall(r"^\| (\w[^|(]*?) (?:\(.*\) )?\|", part, flags=re.MULTILINE)
    explained = re.findall(r"^- \*\*(.+?)\*\*", part, flags=re.MULTILINE)
    assert len(rows) > 5 and len(explained) > 7
    assert set(rows) | set(explained) <= labels


def test_features_in_python(tmp_path, monkeypatch, capsys):
    """The first lines of a notebook."""
    monkeypatch.chdir(tmp_path)
    sae = SAE(SAEConfig(d_model=256, heads=32, m=2, n=2, k=8))
    sae.save("runs/MY-RUN", {"data": {"name": "embedded", "layer": 2}})
    names = run(blocks("python.md", "python")[0])
    shown = capsys.readouterr().out
    assert shown.lstrip().startswith("value") and len(names["f"]) == len(names["f"].tokens) > 5


SAELENS = (DOCS / "from-saelens.md").read_text(encoding="utf-8")


def test_first_lines_from_saelens(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sae = SAE(SAEConfig(d_model=16, heads=32, m=2, n=2, k=8))
    sae.save("runs/MY-RUN", {"data": {"name": "embedded", "layer": 2}})
    names = run(blocks("from-saelens.md", "python")[0])
    assert "16 128 blocks.2.hook_resid_post" in capsys.readouterr().out
    torch.testing.assert_close(names["sae"].decode(names["acts"]), names["x_hat"])


def test_flags_for_settings_of_saelens_exist():
    parsers = [training_parser(), make_parser(), intervene_parser()]
    flags = {flag for parser in parsers for a in parser._actions for flag in a.option_strings}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", SAELENS))
    assert len(named) > 50 and named <= flags


def test_architectures_of_saelens_can_be_trained():
    commands = re.findall(r"`(--encoder [^`]*)`(?= \||[;:])", SAELENS)
    assert len(commands) == 6
    for command in commands:
        words = command.replace(" K", " 8").replace(" C", " 0.5").split()
        parse([*words, "--dict-size", "1024"])
    [block] = blocks("from-saelens.md", "bash")
    parse(block.replace("\\\n", "").split()[2:])


def test_all_settings_of_saelens_are_explained():
    sae_lens = pytest.importorskip("sae_lens")
    fields = set(sae_lens.LanguageModelSAERunnerConfig.__dataclass_fields__)
    unneeded = {"sae", "logger", "verbose", "model_kwargs", "model_class_name", "hook_eval"}
    unneeded |= {"sae_lens_version", "sae_lens_training_version", "save_final_checkpoint"}
    unneeded |= {"llm_compilation_mode", "sae_compilation_mode"}
    explained = set(re.findall(r"`(\w+)`", SAELENS))
    assert fields - unneeded <= explained
