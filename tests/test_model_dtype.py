"""The dtype of the language model: by the checkpoint and the processor, and kept by a run."""

import json

import pytest
import torch
from tiny_models import FAMILIES, WORDS, make_tokenizer

import kronsae
from kronsae.config import DataConfig
from kronsae.data import LanguageModel
from kronsae.harvest import main as harvest
from kronsae.metrics.target_model import load_sae, open_heldout
from kronsae.plan.outline import outline
from kronsae.system import devices
from kronsae.system.devices import model_dtype
from kronsae.train import main as train

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("dtypes")
    for dtype in ("bfloat16", "float32"):
        torch.manual_seed(0)
        FAMILIES["llama"]().to(getattr(torch, dtype)).save_pretrained(root / dtype)
        make_tokenizer("llama").save_pretrained(root / dtype)
    lines = [" ".join(WORDS[(7 * i + 3 * j * j) % 90] for j in range(50)) for i in range(80)]
    (root / "text.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return root


@pytest.fixture(params=[False, True], ids=["without", "with instructions"])
def processor(request, monkeypatch):
    monkeypatch.setattr(devices, "has_bfloat16", lambda: request.param)
    return request.param


def test_auto_goes_by_the_checkpoint_and_the_processor(folders, processor):
    for name, expected in {"bfloat16": processor, "float32": False}.items():
        data = DataConfig(model=str(folders / name), layer=1)
        dtype = torch.bfloat16 if expected else torch.float32
        assert LanguageModel.of(data, "cpu").dtype == dtype
        outlined = outline(data).checkpoint
        assert outlined == getattr(torch, name) and model_dtype("auto", CPU, outlined) == dtype
        assert model_dtype("auto", GPU, outlined) == torch.bfloat16
        assert model_dtype("float16", CPU, outlined) == torch.float16
    assert LanguageModel.load(str(folders / "bfloat16"), layer=1).dtype == torch.float32
    assert LanguageModel.of(DataConfig(), "cpu").dtype == torch.float32  # the embedded one


def test_a_run_goes_on_and_is_judged_in_the_dtype_that_it_began_with(
    folders, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(devices, "has_bfloat16", lambda: False)
    run = tmp_path / "run"
    flags = [
        *("--model", str(folders / "bfloat16"), "--layer", "1"),
        *("--dataset", str(folders / "text.jsonl"), "--context-length", "16"),
        *("--heldout-tokens", "256", "--tokens", "1024", "--batch-size", "128"),
        *("--dict-size", "64", "--k", "4", "--buffer-tokens", "512", "--device", "cpu"),
        *("--checkpoint-every", "4", "--out"),
    ]
    assert train([*flags, str(run)]) == 0
    expected = kronsae.load(run)
    monkeypatch.setattr(devices, "has_bfloat16", lambda: True)
    assert open_heldout(load_sae(str(run), {}), "cpu").model.dtype == torch.float32
    newest = sorted(run.glob("checkpoints/*"))[-1]
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    assert train(["--resume", str(run)]) == 0
    resumed = kronsae.load(run)
    for key, tensor in expected.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], tensor), key
    assert resumed.metadata["metrics"] == expected.metadata["metrics"]
    capsys.readouterr()
    assert train([*flags, str(tmp_path / "now")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "in bfloat16 (auto: on a processor with instructions for it)" in printed
    assert kronsae.load(tmp_path / "now").metadata["data"]["dtype"] == "bfloat16"


def test_a_harvest_goes_on_in_the_dtype_that_it_began_with(folders, monkeypatch, tmp_path):
    flags = [
        *("--model", str(folders / "bfloat16"), "--layer", "1", "--context-length", "16"),
        *("--dataset", str(folders / "text.jsonl"), "--heldout-tokens", "256", "--device", "cpu"),
        *("--shard-tokens", "256", "--contexts-per-batch", "4"),
    ]
    monkeypatch.setattr(devices, "has_bfloat16", lambda: False)
    assert harvest([*flags, "--tokens", "1500", "--out", str(tmp_path / "whole")]) == 0
    assert harvest([*flags, "--tokens", "512", "--out", str(tmp_path / "part")]) == 0
    monkeypatch.setattr(devices, "has_bfloat16", lambda: True)
    assert harvest([*flags, "--tokens", "1500", "--out", str(tmp_path / "part")]) == 0
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "part" / file.name).read_bytes() == file.read_bytes(), file.name
