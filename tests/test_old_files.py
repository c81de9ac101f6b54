"""Runs, sweeps and caches that an earlier version wrote still load, resume and train.

`fixtures/before_rooms` is of commit 83d6e56, whose package had all modules in one folder. Each run
ended after 16 steps, and has its checkpoint of step 12:

    python -m kronsae.train --out run --dataset text.txt --tokens 1024 --batch-size 64 --epochs 9 \
        --dict-size 32 --k 4 --log-every 4 --eval-every 0 --heldout-tokens 64 --buffer-tokens 128 \
        --context-length 32 --contexts-per-batch 4 --device cpu --checkpoint-every 12
    python -m kronsae.train --out sweep … --selection topk jumprelu
    python -m kronsae.harvest --out cache --dataset text.txt --tokens 256 --layer 2 \
        --dtype bfloat16 --context-length 32 --contexts-per-batch 4 --heldout-tokens 64
"""

import shutil
from pathlib import Path

import pytest
import torch

import kronsae
from kronsae import harvest
from kronsae.cache import CacheActivations
from kronsae.train import main

OLD = Path(__file__).parent / "fixtures" / "before_rooms"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A copy, so that they can be written; text.txt is named without its folder."""
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["run", "sweep/topk", "sweep/jumprelu"])
def test_an_old_sae_loads(name):
    sae = kronsae.load(OLD / name)
    assert (sae.config.dict_size, sae.config.k, sae.d_model) == (32, 4, 256)
    assert sae.config.selection_settings is None
    assert sae.metadata["tokens"] == 1024 and "explained_variance" in sae.metadata["metrics"]


@pytest.mark.parametrize("name", ["run", "sweep"])
def test_an_old_run_goes_on_to_the_same_weights(name, here):
    """Not to the bit: another processor may sum in another order."""
    members = [name] if name == "run" else ["sweep/topk", "sweep/jumprelu"]
    expected = {member: kronsae.load(member) for member in members}
    for member in members:
        shutil.rmtree(Path(member) / "sae")
    assert main(["--resume", name]) == 0
    for member, before in expected.items():
        after = kronsae.load(member)
        assert after.metadata["tokens"] == 1024
        for key, tensor in before.state_dict().items():
            torch.testing.assert_close(
                after.state_dict()[key], tensor, rtol=1e-3, atol=1e-4, msg=f"{member}: {key}"
            )


def test_an_old_cache_is_trained_from(here):
    sizes = ("--dict-size", "32", "--k", "4", "--tokens", "256", "--batch-size", "64")
    assert main(["--activations", "cache", "--out", "new", "--device", "cpu", *sizes]) == 0
    assert kronsae.load("new").d_model == 256


def test_an_old_cache_is_made_longer(here):
    """By the same command with more tokens; the shard that had room for them is made again."""
    before = CacheActivations("cache", batch_size=64)
    rows = torch.cat(list(before))
    assert harvest.main(["--resume", "cache", "--tokens", "400", "--device", "cpu"]) == 0
    after = CacheActivations("cache", batch_size=64, order="stream", buffer_tokens=1)
    assert after.index.train_rows >= 400 > before.index.train_rows
    first = torch.cat(list(CacheActivations("cache", batch_size=64, tokens=len(rows))))
    torch.testing.assert_close(first, rows, rtol=1e-2, atol=1e-1)


def test_the_command_of_an_old_harvest_verifies_and_repairs_it(here, capsys):
    command = (
        "--out cache --dataset text.txt --tokens 256 --layer 2 --dtype bfloat16 --device cpu "
        "--shard-tokens 256 --context-length 32 --contexts-per-batch 4 --heldout-tokens 64"
    )
    assert harvest.main(command.split()) == 0, capsys.readouterr().err
    assert harvest.main([*command.split(), "--heldout-order", "sample"]) == 2
    assert "heldout_order: was 'first', is 'sample'" in capsys.readouterr().err


def test_an_old_config_is_repeated(here):
    assert main(["--config", "run/config.json", "--out", "again", "--device", "cpu"]) == 0
    torch.testing.assert_close(
        kronsae.load("again").W_dec, kronsae.load("run").W_dec, rtol=1e-3, atol=1e-4
    )
