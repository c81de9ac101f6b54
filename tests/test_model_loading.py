"""How a language model is loaded: other arguments, rounded to fewer bits, spread over devices."""

import json

import pytest
import torch
from tiny_models import save_model
from torch import nn

from kronsae.cache import CacheIndex
from kronsae.config import DataConfig, untrusted
from kronsae.data import LanguageModel, loading
from kronsae.data.language_model import _changed
from kronsae.errors import InputError
from kronsae.evaluate.__main__ import main as evaluate
from kronsae.harvest import main as harvest
from kronsae.plan.memory import weight_bytes
from kronsae.train import main as train

IDS = torch.tensor([[1, 7, 8, 9, 10, 11], [1, 12, 9, 8, 7, 13]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_model(tmp_path_factory.mktemp("models") / "llama", "llama"))


def flags(out, *more):
    return [
        *("--layer", "1", "--tokens", "2048", "--batch-size", "256", "--eval-every", "0"),
        *("--heldout-tokens", "256", "--context-length", "32", "--dict-size", "64", "--k", "4"),
        *("--contexts-per-batch", "8", "--buffer-tokens", "1024", "--out", str(out), *more),
    ]


def config_of(run):
    return json.loads((run / "config.json").read_text())


# Arguments of from_pretrained


def test_arguments_reach_transformers_and_the_description(folder):
    plain = LanguageModel.load(folder, layer=0)
    other = LanguageModel.load(
        folder, layer=0, model_kwargs={"attn_implementation": "eager", "num_hidden_layers": 1}
    )
    assert other.model.config._attn_implementation == "eager"
    assert len(other.model.model.layers) == 1
    assert torch.allclose(other.activations(IDS), plain.activations(IDS), atol=1e-6)
    assert "model_kwargs" not in plain.describe() and "load_in" not in plain.describe()
    assert other.describe()["model_kwargs"] == {
        "attn_implementation": "eager",
        "num_hidden_layers": 1,
    }


def test_values_of_the_configuration_change_the_activations(folder):
    scaled = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}
    plain, other = (
        LanguageModel.load(folder, layer=1, model_kwargs=kwargs)
        for kwargs in (None, {"rope_scaling": scaled})
    )
    assert not torch.allclose(other.activations(IDS), plain.activations(IDS), atol=1e-4)


def test_layers_are_those_of_the_changed_model(folder):
    with pytest.raises(InputError, match=r"layer 1: .* has 1 blocks"):
        LanguageModel.load(folder, layer=1, model_kwargs={"num_hidden_layers": 1})


def test_unknown_arguments_are_named(folder):
    with pytest.raises(InputError, match=r"unexpected keyword argument 'attention_kind'"):
        LanguageModel.load(folder, layer=0, model_kwargs={"attention_kind": "eager"})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dtype": "float16"}, r"dtype cannot be given: give --model-dtype"),
        ({"torch_dtype": "float16"}, r"torch_dtype .*--model-dtype"),
        ({"device_map": "auto"}, r"device_map .*--device-map"),
        ({"revision": "main"}, r"revision .*--revision"),
        ({"load_in_8bit": True}, r"load_in_8bit .*--load-in"),
        ({"trust_remote_code": True}, r"trust_remote_code .*--trust-remote-code"),
        ({"use_safetensors": False}, r"use_safetensors .*unpickling can run code"),
        ({"weights_only": False}, r"weights_only .*unpickling can run code"),
        ({"use_kernels": True}, r"use_kernels .*code from the hub"),
        ({"auto_map": {"AutoModel": "x--y.Z"}}, r"auto_map .*code from the hub"),
        ({"text_config": {"auto_map": {"AutoModel": "x--y.Z"}}}, r"auto_map .*code from the hub"),
        ({"attn_implementation": "someone/kernel"}, r"'someone/kernel' is code from the hub"),
        ({"attn_implementation": {"text_config": "a/b"}}, r"is code from the hub"),
        ({"_attn_implementation": "eager"}, r"internal to transformers"),
        ({"token": "hf_x"}, r"token .*hf auth login"),
        ({"ignore_mismatched_sizes": True}, r"would be random"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_that_kronsae_sets_or_that_run_code_are_refused(folder, kwargs, message):
    with pytest.raises(InputError, match=message):
        DataConfig(model_kwargs=kwargs)
    with pytest.raises(InputError, match=message):
        LanguageModel.load(folder, layer=0, model_kwargs=kwargs)


@pytest.mark.parametrize("text", ["eager", "[1]", '{"a": 1, "a": 2}'])
def test_a_flag_that_is_no_object_is_an_error(text, tmp_path, capsys):
    assert train(flags(tmp_path / "run", "--model-kwargs", text)) == 2
    assert "expected a JSON object" in capsys.readouterr().err


def test_a_run_records_the_arguments_and_is_evaluated_with_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run, kwargs = tmp_path / "run", {"layer_norm_eps": 0.1, "attn_implementation": "eager"}
    assert train(flags(run, "--model-kwargs", json.dumps(kwargs))) == 0
    assert config_of(run)["config"]["data"]["model_kwargs"] == kwargs
    assert config_of(run)["data"]["model_kwargs"] == kwargs
    assert evaluate([str(run), "--heldout-tokens", "256"]) == 0
    capsys.readouterr()
    plain = tmp_path / "plain"
    assert train(flags(plain)) == 0
    assert "model_kwargs" not in config_of(plain)["data"]


@pytest.mark.slow
def test_a_run_of_before_there_were_arguments_resumes(tmp_path):
    run = tmp_path / "run"
    assert train(flags(run)) == 0
    document = config_of(run)
    for name in ("model_kwargs", "load_in", "device_map"):
        del document["config"]["data"][name]
    (run / "config.json").write_text(json.dumps(document))
    assert train(["--resume", str(run)]) == 0


def test_a_cache_fixes_the_arguments(tmp_path):
    made = [
        *("--layer", "1", "--tokens", "4096", "--heldout-tokens", "256", "--context-length", "32"),
        *("--model-kwargs", '{"layer_norm_eps": 0.1}', "--out", str(tmp_path / "cache")),
    ]
    assert harvest(made) == 0
    index = CacheIndex.open(tmp_path / "cache")
    assert index.data.model_kwargs == index.model["model_kwargs"] == {"layer_norm_eps": 0.1}


# Fewer bits


class RoundedLinear(nn.Module):
    """A stand-in for a matrix in 8 bits: integers, and a scale for each row."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight / scale).round().to(torch.int8), False)
        self.register_buffer("scale", scale)

    def forward(self, x):
        return x @ (self.weight * self.scale).T


def rounded(model):
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "layers" in name:
            model.set_submodule(name, RoundedLinear(module))
    return model


def test_a_model_of_integers_is_read(folder):
    plain = LanguageModel.load(folder, layer=1)
    before = plain.activations(IDS)
    read = LanguageModel(rounded(plain.model), plain.tokenizer, plain.hookpoint)
    first = next(p for p in read.model.parameters() if p.dtype == torch.int8)
    assert read.dtype == torch.float32 and not first.is_floating_point()
    assert read.weights != plain.weights and read.parameters == plain.parameters
    assert 0 < (read.activations(IDS) - before).abs().max() < 0.1 * before.abs().max()
    assert read.token_losses(IDS).isfinite().all()


def test_a_model_that_does_not_tell_the_first_tokens_apart_is_read(folder):
    """So do special tokens without training, once their embeddings are rounded."""
    plain = LanguageModel.load(folder, layer=1)
    plain.model.get_input_embeddings().weight[1:7] = 0.5
    read = LanguageModel(plain.model, plain.tokenizer, plain.hookpoint)
    assert read.d_model == plain.d_model


def test_one_massive_number_does_not_hide_that_a_token_has_changed():
    """As of SmolLM2 in 8 bits, whose first ids give activations of 700 in one place."""
    outputs = torch.randn(1, 5, 16).expand(2, -1, -1).clone()
    outputs[..., 0] = 700
    outputs[1, 2:, 1:] += 10
    assert _changed(outputs.bfloat16()).tolist() == [False, False, True, False, False]
    outputs[1, :, 1:] += 1  # rounding elsewhere, and no more of it there
    outputs[1, 2] = outputs[0, 2] + 1
    assert not _changed(outputs.bfloat16()).any()


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_fewer_bits_need_a_package(folder, bits, monkeypatch):
    def require(package, needed_by):
        raise InputError(f"{needed_by} needs the package {package}")

    monkeypatch.setattr(loading, "require", require)
    with pytest.raises(InputError, match=f"--load-in {bits} needs the package bitsandbytes"):
        LanguageModel.load(folder, layer=1, load_in=bits)
    with pytest.raises(InputError, match="--device-map needs the package accelerate"):
        LanguageModel.load(folder, layer=1, device_map="auto")


@pytest.mark.one_in(2)
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_rounded_model_trains_and_is_evaluated(tmp_path, bits, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    run = tmp_path / "run"
    assert train(flags(run, "--load-in", bits)) == 0
    assert config_of(run)["data"]["load_in"] == bits
    plain, read = (
        LanguageModel.load("embedded", layer=1, load_in=load_in) for load_in in ("whole", bits)
    )
    ids = torch.arange(32)[None]
    difference = (read.activations(ids) - plain.activations(ids)).norm()
    assert 0 < difference < 0.2 * plain.activations(ids).norm()
    assert evaluate([str(run), "--heldout-tokens", "256"]) == 0
    assert train(["--resume", str(run)]) == 0
    assert "resume" not in capsys.readouterr().err


# Several devices


def test_where_a_model_computes():
    class Spread(nn.Linear):
        hf_device_map = {"a": 1, "b": 0, "c": "disk"}

    model = Spread(2, 2)
    assert loading.main_device(model) == torch.device("cuda", 1)
    model.hf_device_map = {"a": "cpu", "b": "disk"}
    assert loading.main_device(model) == torch.device("cpu")
    model.hf_device_map = {"": "cpu"}
    assert loading.main_device(model) == torch.device("cpu")


def test_a_model_that_is_partly_on_the_disk_is_the_same(folder, tmp_path):
    pytest.importorskip("accelerate")
    plain = LanguageModel.load(folder, layer=1)
    kwargs = {"max_memory": {"cpu": "20KB"}, "offload_folder": str(tmp_path)}
    spread = LanguageModel.load(folder, layer=1, device_map="auto", model_kwargs=kwargs)
    assert "disk" in spread.model.hf_device_map.values()
    assert spread.device == torch.device("cpu") and spread.weights == plain.weights
    assert torch.equal(spread.activations(IDS), plain.activations(IDS))
    assert torch.equal(spread.token_losses(IDS), plain.token_losses(IDS))
    assert spread.d_model == plain.d_model


def test_a_run_with_a_device_map(tmp_path):
    pytest.importorskip("accelerate")
    plain, spread = tmp_path / "plain", tmp_path / "spread"
    assert train(flags(plain)) == 0
    assert train(flags(spread, "--device-map", "cpu")) == 0
    assert config_of(spread)["data"] == config_of(plain)["data"]
    first, other = ((run / "sae" / "sae.safetensors").read_bytes() for run in (plain, spread))
    assert first[-4096:] == other[-4096:]


def test_a_file_cannot_ask_for_a_device_map():
    """Whoever made it could otherwise name a folder for the weights that do not fit."""
    assert untrusted({"device_map": "auto", "model": "m"}) == {"model": "m"}


def test_two_places_for_a_model_contradict_each_other():
    with pytest.raises(InputError, match="device_map and model_device exclude each other"):
        DataConfig(device_map="auto", model_device="cpu")


def test_the_plan_counts_bytes_of_rounded_weights():
    sizes = [weight_bytes(DataConfig(load_in=bits), 2) for bits in ("whole", "8bit", "4bit")]
    assert sizes == [2, 1, 0.5]
    assert weight_bytes(DataConfig(device_map="auto"), 2) == 0
