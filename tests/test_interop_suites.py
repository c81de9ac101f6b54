"""Public suites of SAEs: files made up in their layouts, against the formulas of these layouts.

Where SAELens is installed, its own loaders read the same files.
"""

import io
import json
import math
import random
import re
import shutil
import zipfile
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import WORDS, save_model
from torch import Tensor

import kronsae
from kronsae import InputError
from kronsae.__main__ import main as command
from kronsae.export.__main__ import main as export
from kronsae.hub import model_card
from kronsae.interop.formats import recognise
from kronsae.interop.suite import subfolder_of
from kronsae.interpret.chat import Reply
from kronsae.metrics.target_model import data_of
from kronsae.model.origin import Origin
from kronsae.registry import FORMATS
from kronsae.system.tensors import dense

WIDTH, SIZE, OUT, K = 8, 24, 6, 4
X = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(1)) * 1.5
Latents = Callable[[Tensor], Tensor]


def drawn(out: int = WIDTH, seed: int = 0) -> dict[str, Tensor]:
    """W_enc [F, d], W_dec [F, d_out] with rows of several norms, biases, thresholds, a skip."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (SIZE, WIDTH), "W_dec": (SIZE, out), "b_enc": (SIZE,), "b_dec": (out,)}
    w = {name: torch.randn(*shape, generator=generator) / 2 for name, shape in shapes.items()}
    w["threshold"] = torch.rand(SIZE, generator=generator) + 0.1
    w["W_skip"] = torch.randn(out, WIDTH, generator=generator)
    return w


def topk(z: Tensor, k: int = K) -> Tensor:
    values, indices = z.topk(k, dim=-1)
    return torch.zeros_like(z).scatter(-1, indices, values.relu())


def jump(z: Tensor, threshold: Tensor | float) -> Tensor:
    return z.relu() * (z > threshold)


class Made(NamedTuple):
    """A file or folder in a suite's layout, and what it computes."""

    path: Path
    encode: Latents
    decode: Callable[[Tensor, Tensor], Tensor]
    """Of latents and the input."""
    selection: str
    origin: dict[str, Any]
    k: int | None = None
    """Active latents, if that is said."""


def save_npz(path: Path, arrays: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{name: array.numpy() for name, array in arrays.items()})


def save(path: Path, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def save_pickle(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)


def gemma_scope(root: Path, release: str = "2b-pt-res") -> Made:
    w = drawn()
    folder = root / f"google/gemma-scope-{release}/layer_20/width_16k/average_l0_7"
    arrays = {name: w[name] for name in ("W_dec", "b_enc", "b_dec", "threshold")}
    save_npz(folder / "params.npz", arrays | {"W_enc": w["W_enc"].T.contiguous()})
    return Made(
        folder,
        lambda x: jump(x @ w["W_enc"].T + w["b_enc"], w["threshold"]),
        lambda z, x: z @ w["W_dec"] + w["b_dec"],
        "jumprelu",
        {"model": "google/gemma-2-2b", "hookpoint": "model.layers.20", "layer": 20},
        7,
    )


def gemma_scope_attention(root: Path) -> Made:
    made = gemma_scope(root, "9b-it-att")
    origin = {"model": "google/gemma-2-9b-it", "layer": None}
    return made._replace(origin=origin | {"hookpoint": "model.layers.20.self_attn.o_proj:input"})


def gemma_scope_transcoder(root: Path) -> Made:
    w = drawn(OUT)
    folder = root / "google/gemma-scope-2b-pt-transcoders/layer_3/width_16k/average_l0_11"
    arrays = {f"w_{end}": w[f"W_{end}"] for end in ("enc", "dec")}
    arrays["w_enc"] = arrays["w_enc"].T.contiguous()
    save_npz(folder / "params.npz", arrays | {n: w[n] for n in ("b_enc", "b_dec", "threshold")})
    return Made(
        folder,
        lambda x: jump(x @ w["W_enc"].T + w["b_enc"], w["threshold"]),
        lambda z, x: z @ w["W_dec"] + w["b_dec"],
        "jumprelu",
        {"model": "google/gemma-2-2b", "hookpoint": None, "layer": None},
        11,
    )


def gemma_scope_2(root: Path, folder: str = "resid_post_all/layer_17_width_16k_l0_small") -> Made:
    w = drawn()
    path = root / "google/gemma-scope-2-270m-pt" / folder
    tensors = {name.lower(): w[name] for name in ("W_dec", "b_enc", "b_dec", "threshold")}
    save(path / "params.safetensors", tensors | {"w_enc": w["W_enc"].T})
    config = {
        "architecture": "jump_relu",
        "model_name": "gemma-v3-270m-pt",
        "l0": 9,
        "hf_hook_point_in": "model.layers.17.output",
        "hf_hook_point_out": "model.layers.17.output",
    }
    (path / "config.json").write_text(json.dumps(config))
    return Made(
        path,
        lambda x: jump(x @ w["W_enc"].T + w["b_enc"], w["threshold"]),
        lambda z, x: z @ w["W_dec"] + w["b_dec"],
        "jumprelu",
        {"model": "google/gemma-3-270m", "hookpoint": "model.layers.17", "layer": 17},
        9,
    )


def gemma_scope_2_affine(root: Path) -> Made:
    """A transcoder with a skip, without a configuration."""
    w = drawn(OUT)
    path = root / "google/gemma-scope-2-1b-it/transcoder_all/layer_5_width_16k_l0_big_affine"
    tensors = {name.lower(): w[name] for name in ("W_dec", "b_enc", "b_dec", "threshold")}
    tensors |= {"w_enc": w["W_enc"].T, "affine_skip_connection": w["W_skip"].T}
    save(path / "params.safetensors", tensors)
    return Made(
        path,
        lambda x: jump(x @ w["W_enc"].T + w["b_enc"], w["threshold"]),
        lambda z, x: z @ w["W_dec"] + w["b_dec"] + x @ w["W_skip"].T,
        "jumprelu",
        {
            "model": "google/gemma-3-1b-it",
            "hookpoint": "model.layers.5.pre_feedforward_layernorm",
            "target_hookpoint": "model.layers.5.post_feedforward_layernorm",
        },
    )


HYPERPARAMETERS = {
    "hook_point_in": "blocks.15.hook_resid_post",
    "hook_point_out": "blocks.15.hook_resid_post",
    "d_model": WIDTH,
    "d_sae": SIZE,
    "act_fn": "jumprelu",
    "jump_relu_threshold": 0.4,
    "norm_activation": "dataset-wise",
    "dataset_average_activation_norm": {"in": 1.5, "out": 1.5},
    "use_decoder_bias": True,
    "apply_decoder_bias_to_pre_encoder": False,
    "sparsity_include_decoder_norm": True,
    "use_glu_encoder": False,
    "top_k": 50,
}


def llama_scope(root: Path, unit: bool = False, out: int = WIDTH, **settings: Any) -> Made:
    w, c = drawn(out), HYPERPARAMETERS | settings
    if unit:
        w["W_dec"] /= w["W_dec"].norm(dim=1, keepdim=True)
    folder = root / "fnlp/Llama3_1-8B-Base-LXR-8x/Llama3_1-8B-Base-L15R-8x"
    tensors = {"encoder.weight": w["W_enc"], "decoder.weight": w["W_dec"].T}
    tensors |= {"encoder.bias": w["b_enc"], "decoder.bias": w["b_dec"]}
    save(folder / "checkpoints" / "final.safetensors", tensors)
    (folder / "hyperparams.json").write_text(json.dumps(c))
    norms = c["dataset_average_activation_norm"]
    scale, target_scale = math.sqrt(WIDTH) / norms["in"], math.sqrt(out) / norms["out"]
    shift = w["b_dec"] if c["apply_decoder_bias_to_pre_encoder"] else 0

    def encode(x: Tensor) -> Tensor:
        z = (x * scale - shift) @ w["W_enc"].T + w["b_enc"]
        # The latents of raw activations: those by which a folded SAE selects.
        raw = z / target_scale * w["W_dec"].norm(dim=1)
        if not c["sparsity_include_decoder_norm"]:
            raw = z / scale
        return z.relu() * (raw > c["jump_relu_threshold"])

    return Made(
        folder,
        encode,
        lambda z, x: (z @ w["W_dec"] + w["b_dec"]) / target_scale,
        "jumprelu",
        {
            "model": "meta-llama/Llama-3.1-8B",
            "hookpoint": c["hook_point_in"],
            "layer": 15 if out == WIDTH else None,
        },
    )


def llama_scope_transcoder(root: Path) -> Made:
    hooks = {"hook_point_in": "blocks.8.ln2.hook_normalized", "hook_point_out": "blocks.8.mlp_out"}
    norms = {"in": 2.8, "out": 0.7}
    return llama_scope(root, out=OUT, dataset_average_activation_norm=norms, **hooks)


def llama_scope_plain(root: Path) -> Made:
    """The settings that change which latents are selected, the other way."""
    settings = {"sparsity_include_decoder_norm": False, "apply_decoder_bias_to_pre_encoder": True}
    return llama_scope(root, **settings)


def llamascopium(root: Path, activation: str = "topk", **settings: Any) -> Made:
    w = drawn()
    hook = "blocks.5.hook_resid_post"
    folder = root / "L5R"
    names = {"W_E": w["W_enc"].T, "b_E": w["b_enc"], "W_D": w["W_dec"], "b_D": w["b_dec"]}
    names |= {f"dataset_average_activation_norm.{hook}": torch.tensor(1.7)}
    if activation == "jumprelu":
        names["activation_function.log_jumprelu_threshold"] = w["threshold"].log()
    save(folder / "sae_weights.safetensors", names)
    config = {"sae_type": "sae", "hook_point_in": hook, "hook_point_out": hook, "top_k": K}
    config |= {"act_fn": activation, "norm_activation": "dataset-wise"} | settings
    (folder / "config.json").write_text(json.dumps(config))
    scale = 1.0 if config["norm_activation"] == "inference" else math.sqrt(WIDTH) / 1.7
    norms = w["W_dec"].norm(dim=1)
    gates = {"topk": topk, "jumprelu": lambda z: jump(z, w["threshold"]), "relu": torch.relu}

    def encode(x: Tensor) -> Tensor:
        z = x * scale @ w["W_enc"].T + w["b_enc"]
        by_norm = gates[activation](z * norms)
        return by_norm if activation == "topk" else by_norm / norms

    def decode(z: Tensor, x: Tensor) -> Tensor:
        z = z / norms if activation == "topk" else z
        return (z @ w["W_dec"] + w["b_dec"]) / scale

    origin = {"model": None, "hookpoint": hook, "layer": 5}
    return Made(folder, encode, decode, activation, origin, K if activation == "topk" else None)


def llamascopium_jumprelu(root: Path) -> Made:
    return llamascopium(root, "jumprelu")


def llamascopium_folded(root: Path) -> Made:
    return llamascopium(root, "relu", norm_activation="inference")


def llamascopium_earlier(root: Path) -> Made:
    """With the tensors' names before version 2, and with thresholds of the latents themselves."""
    made = llamascopium(root, "jumprelu", sparsity_include_decoder_norm=False)
    path = made.path / "sae_weights.safetensors"
    new = kronsae.system.files.read_tensors(path)
    names = {"encoder.weight": new["W_E"].T, "encoder.bias": new["b_E"]}
    names |= {"decoder.weight": new["W_D"].T, "decoder.bias": new["b_D"]}
    threshold = new["activation_function.log_jumprelu_threshold"]
    norms = {name: tensor for name, tensor in new.items() if tensor.ndim == 0}
    save(path, names | norms | {"log_jumprelu_threshold": threshold})
    scale, w = math.sqrt(WIDTH) / 1.7, drawn()

    def encode(x: Tensor) -> Tensor:
        return jump(x * scale @ w["W_enc"].T + w["b_enc"], w["threshold"])

    return made._replace(encode=encode)


def qwen_scope(root: Path) -> Made:
    w = drawn()
    path = root / f"Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}/layer6.sae.pt"
    names = ("W_enc", "b_enc", "b_dec")
    save_pickle(path, {name: w[name] for name in names} | {"W_dec": w["W_dec"].T.contiguous()})
    return Made(
        path,
        lambda x: topk(x @ w["W_enc"].T + w["b_enc"]),
        lambda z, x: z @ w["W_dec"] + w["b_dec"],
        "topk",
        {"model": "Qwen/Qwen3-1.7B-Base", "hookpoint": "model.layers.6", "layer": 6},
        K,
    )


def openai(root: Path) -> Made:
    w = drawn()
    path = root / "gpt2-small/resid_delta_mlp_v4/autoencoders/8.pt"
    content = {
        "pre_bias": w["b_dec"],
        "latent_bias": w["b_enc"],
        "encoder.weight": w["W_enc"],
        "decoder.weight": w["W_dec"].T.contiguous(),
        "stats_last_nonzero": torch.zeros(SIZE, dtype=torch.long),
        "activation": "ReLU",
        "activation_state_dict": {},
    }
    save_pickle(path, content)
    return Made(
        path,
        lambda x: ((x - w["b_dec"]) @ w["W_enc"].T + w["b_enc"]).relu(),
        lambda z, x: z @ w["W_dec"] + w["b_dec"],
        "relu",
        {"model": "openai-community/gpt2", "hookpoint": None, "layer": None},
    )


def goodfire(root: Path, name: str = "Llama-3.1-8B-Instruct-SAE-l19.pth") -> Made:
    w = drawn()
    suffix = "_linear" if name.startswith("Llama") else ""
    content = {f"encoder{suffix}.weight": w["W_enc"], f"encoder{suffix}.bias": w["b_enc"]}
    content |= {f"decoder{suffix}.weight": w["W_dec"].T.contiguous()}
    content |= {f"decoder{suffix}.bias": w["b_dec"]}
    save_pickle(root / name, content)
    return Made(
        root / name,
        lambda x: (x @ w["W_enc"].T + w["b_enc"]).relu(),
        lambda z, x: z @ w["W_dec"] + w["b_dec"],
        "relu",
        {"model": "meta-llama/Llama-3.1-8B-Instruct", "hookpoint": "model.layers.19", "layer": 19},
    )


def deepseek(root: Path) -> Made:
    made = goodfire(root, "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt")
    origin = {"model": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"}
    return made._replace(origin=made.origin | origin)


def hook_z(root: Path) -> Made:
    w = drawn()
    path = (
        root / "gpt2-small_L0_Hcat_z_lr1.20e-03_l11.80e+00_ds24576_bs4096_dc1.00e-06_rsanthropic.pt"
    )
    names = ("W_dec", "b_enc", "b_dec")
    save_pickle(path, {name: w[name] for name in names} | {"W_enc": w["W_enc"].T.contiguous()})
    return Made(
        path,
        lambda x: ((x - w["b_dec"]) @ w["W_enc"].T + w["b_enc"]).relu(),
        lambda z, x: z @ w["W_dec"] + w["b_dec"],
        "relu",
        {"model": "openai-community/gpt2", "hookpoint": "transformer.h.0.attn.c_proj:input"},
    )


def transcoder_set(root: Path) -> Made:
    w = drawn(OUT)
    path = root / "mwhanna/qwen3-0.6b-transcoders-lowl0/layer_7.safetensors"
    save(path, {name: w[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")})
    path.with_name("config.yaml").write_text(
        "model_name: Qwen/Qwen3-0.6B\nfeature_input_hook: mlp.hook_in\n"
        "feature_output_hook: hook_mlp_out\ntranscoders: [a, b]\n"
    )
    return Made(
        path,
        lambda x: (x @ w["W_enc"].T + w["b_enc"]).relu(),
        lambda z, x: z @ w["W_dec"] + w["b_dec"],
        "relu",
        {
            "model": "Qwen/Qwen3-0.6B",
            "hookpoint": "blocks.7.mlp.hook_in",
            "target_hookpoint": "blocks.7.hook_mlp_out",
        },
    )


LAYOUTS = (
    *(gemma_scope, gemma_scope_attention, gemma_scope_transcoder),
    *(gemma_scope_2, gemma_scope_2_affine),
    *(llama_scope, llama_scope_transcoder, llama_scope_plain),
    *(llamascopium, llamascopium_jumprelu, llamascopium_folded, llamascopium_earlier),
    *(qwen_scope, openai, goodfire, deepseek, hook_z, transcoder_set),
)


def check(sae: kronsae.SAE, encode: Latents, decode: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Raise AssertionError unless the SAE computes these latents and reconstructions."""
    with torch.no_grad():
        codes, expected = sae.encode(X), encode(X)
        close = {"rtol": 1e-6, "atol": 2e-6}
        torch.testing.assert_close(dense(codes, sae.dict_size), expected, **close)
        torch.testing.assert_close(sae.decode(codes, X), decode(expected, X), **close)
    assert 0 < expected.count_nonzero() < expected.numel()


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_a_file_of_each_layout(layout, tmp_path):
    made = layout(tmp_path)
    sae = kronsae.load(made.path, allow_pickle=True)
    check(sae, made.encode, made.decode)
    assert (sae.config.encoder, sae.config.selection) == ("dense", made.selection)
    assert sae.config.k == made.k or made.k is None
    origin = Origin.of(sae.metadata)
    assert {name: getattr(origin, name) for name in made.origin} == made.origin
    card = model_card(sae, "me/it")
    assert "L1 penalty" not in card and ("above 0" in card) == (made.selection == "relu")
    again = kronsae.load(sae.save(tmp_path / "ours"))
    check(again, made.encode, made.decode)
    assert again.metadata == sae.metadata


# Origins that are not in a file


def test_folders_of_gemma_scope_2_without_a_configuration(tmp_path):
    for site, hookpoint in (
        ("resid_post_all", "model.layers.17"),
        ("mlp_out_all", "model.layers.17.post_feedforward_layernorm"),
        ("attn_out_all", "model.layers.17.self_attn.o_proj:input"),
    ):
        folder = gemma_scope_2(tmp_path, f"{site}/layer_17_width_16k_l0_small").path
        (folder / "config.json").unlink()
        origin = Origin.of(kronsae.load(folder).metadata)
        assert (origin.model, origin.hookpoint) == ("google/gemma-3-270m", hookpoint)


def test_folders_that_say_nothing(tmp_path):
    """Renamed, they load all the same; only k has to be somewhere."""
    gemma_scope(tmp_path).path.rename(tmp_path / "mine")
    assert Origin.of(kronsae.load(tmp_path / "mine").metadata) == Origin()
    goodfire(tmp_path).path.rename(tmp_path / "mine.pt")
    assert Origin.of(kronsae.load(tmp_path / "mine.pt", allow_pickle=True).metadata) == Origin()
    qwen_scope(tmp_path).path.rename(tmp_path / "layer6.sae.pt")
    with pytest.raises(InputError, match="k is in the name of Qwen-Scope's repositories alone"):
        kronsae.load(tmp_path / "layer6.sae.pt", allow_pickle=True)


def test_hookpoints_of_sparsify(tmp_path):
    """A transcoder goes from a module's input to its output; other names are of the output."""
    w = drawn()
    names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
    run = {"model": "meta-llama/Llama-3.2-1B", "ctx_len": 2048}
    for name, transcode, expected in (
        ("layers.5", False, ("layers.5", None, 5)),
        ("layers.5.mlp", False, ("layers.5.mlp", None, None)),
        ("layers.5.mlp", True, ("layers.5.mlp:input", "layers.5.mlp", None)),
        ("embed_tokens", False, ("embed_tokens", None, None)),
    ):
        folder = tmp_path / str(transcode) / name
        save(folder / "sae.safetensors", {theirs: w[ours] for theirs, ours in names.items()})
        # As the library wrote it before it had the keys "activation" and "transcode".
        config = {"expansion_factor": 3, "normalize_decoder": True, "num_latents": 0, "k": K}
        config |= {"signed": False, "d_in": WIDTH} | ({"transcode": True} if transcode else {})
        (folder / "cfg.json").write_text(json.dumps(config))
        (folder.parent / "config.json").write_text(json.dumps(run))
        sae = kronsae.load(folder)
        shift = 0 if transcode else w["b_dec"]
        check(
            sae,
            lambda x, shift=shift: topk((x - shift) @ w["W_enc"].T + w["b_enc"]),
            lambda z, x: z @ w["W_dec"] + w["b_dec"],
        )
        origin = Origin.of(sae.metadata)
        assert (origin.hookpoint, origin.target_hookpoint, origin.layer) == expected
        assert (origin.model, origin.context_length) == (run["model"], 2048)


def test_a_block_of_dictionary_learning_is_one_of_the_residual_stream(tmp_path):
    fixture = Path(__file__).parent / "fixtures/interop/dictionary_learning/AutoEncoderTopK"
    (tmp_path / "ae.pt").write_bytes((fixture / "ae.pt").read_bytes())
    settings = json.loads((fixture / "config.json").read_text())
    for name, layer in (("resid_post_layer_3", 3), ("mlp_out_layer_3", None), (None, 3)):
        settings["trainer"]["submodule_name"] = name
        (tmp_path / "config.json").write_text(json.dumps(settings))
        sae = kronsae.load(tmp_path, allow_pickle=True)
        assert Origin.of(sae.metadata).layer == layer


def test_settings_of_saelens_before_version_2(tmp_path):
    """As of the first SAEs of GPT-2 small, with a factor of 1 for each latent."""
    w = drawn()
    tensors = {name: w[name] for name in ("W_dec", "b_enc", "b_dec")} | {"W_enc": w["W_enc"].T}
    settings = {
        "model_name": "gpt2-small",
        "hook_point": "blocks.8.hook_resid_post",
        "hook_point_layer": 8,
        "d_in": WIDTH,
        "d_sae": SIZE,
        "normalize_activations": False,
        "finetuning_scaling_factor": True,
    }
    (tmp_path / "cfg.json").write_text(json.dumps(settings))
    save(tmp_path / "sae_weights.safetensors", tensors | {"scaling_factor": torch.ones(SIZE)})
    sae = kronsae.load(tmp_path)
    check(
        sae,
        lambda x: ((x - w["b_dec"]) @ w["W_enc"].T + w["b_enc"]).relu(),
        lambda z, x: z @ w["W_dec"] + w["b_dec"],
    )
    origin = Origin.of(sae.metadata)
    assert (origin.model, origin.layer) == ("gpt2-small", 8)
    save(tmp_path / "sae_weights.safetensors", tensors | {"scaling_factor": w["threshold"]})
    with pytest.raises(InputError, match="finetuning scaling factor are not read"):
        kronsae.load(tmp_path)


# What is refused


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"sae_type": "clt"}, "sae_type 'clt': that has no counterpart"),
        ({"use_glu_encoder": True}, "use_glu_encoder"),
        ({"act_fn": "batchtopk"}, "selects by the batch"),
        ({"act_fn": "gelu"}, "act_fn 'gelu': that has no counterpart"),
        ({"d_model": 99}, "d_model is 99, the weights have"),
        ({"d_sae": 99}, "d_sae is 99, the weights have"),
        ({"norm_activation": "token-wise"}, "another for each token or batch"),
        ({"top_k": None}, "k: the file does not say"),
        ({"top_k": 25}, "k: expected 1 to 24"),
        ({"hook_point_in": 3}, "hook_point_in: expected text"),
        ({"hook_point_in": "blocks.0.hook_resid_post"}, r"expected tensors \['dataset_average"),
        ({"act_fn": "jumprelu"}, r"expected tensors \['log_jumprelu_threshold'\]"),
    ],
)
def test_what_llamascopium_has_and_we_have_not(settings, reason, tmp_path):
    folder = llamascopium(tmp_path).path
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(known | settings))
    with pytest.raises(InputError, match=reason):
        kronsae.load(folder)


def test_a_shape_that_is_wrong_names_the_file(tmp_path):
    made = gemma_scope(tmp_path)
    arrays = dict(np.load(made.path / "params.npz"))
    np.savez(made.path / "params.npz", **arrays | {"b_enc": arrays["b_enc"][:-1]})
    with pytest.raises(
        InputError, match=f"^{made.path}: b_enc: expected .24. beside W_enc .24, 8., got .23."
    ):
        kronsae.load(made.path)


def test_the_file_of_a_folders_weights_will_do(tmp_path):
    made = llama_scope(tmp_path)
    sae = kronsae.load(made.path / "checkpoints" / "final.safetensors")
    check(sae, made.encode, made.decode)
    again = kronsae.load(sae.save(tmp_path / "ours") / "sae.safetensors")
    check(again, made.encode, made.decode)


def test_a_decoder_row_of_zeros(tmp_path):
    """Its latent is never selected where its row's norm counts."""
    for activation in ("topk", "jumprelu"):
        made = llamascopium(tmp_path, activation)
        path = made.path / "sae_weights.safetensors"
        tensors = kronsae.system.files.read_tensors(path)
        tensors["W_D"][5] = 0
        save(path, tensors)
        sae = kronsae.load(made.path)
        assert (dense(sae.encode(X), SIZE)[:, 5] == 0).all() and sae(X).x_hat.isfinite().all()
        assert torch.equal(kronsae.load(sae.save(tmp_path / "ours"))(X).x_hat, sae(X).x_hat)


def test_a_mean_norm_is_positive(tmp_path):
    for norm in (0, -1.0, "3", None):
        made = llama_scope(tmp_path, dataset_average_activation_norm={"in": 1.5, "out": 1.5})
        path = made.path / "hyperparams.json"
        settings = HYPERPARAMETERS | {"dataset_average_activation_norm": {"in": norm, "out": 1}}
        path.write_text(json.dumps(settings))
        with pytest.raises(InputError, match="dataset_average_activation_norm.in: expected"):
            kronsae.load(made.path)


def test_gemma_scope_2_of_several_layers(tmp_path):
    folder = gemma_scope_2(tmp_path).path
    w = drawn()
    tensors = {name.lower(): w[name] for name in ("b_enc", "b_dec", "threshold")}
    tensors |= {"w_enc": w["W_enc"].T, "w_dec": w["W_dec"][:, None].expand(-1, 3, -1)}
    save(folder / "params.safetensors", tensors)
    with pytest.raises(InputError, match="cross-layer transcoders have no counterpart"):
        kronsae.load(folder)
    config = {"architecture": "batch_topk"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="expected architecture 'jump_relu', got 'batch_topk'"):
        kronsae.load(folder)


def test_gemma_scope_with_tensors_of_another_kind(tmp_path):
    folder = gemma_scope(tmp_path / "one").path
    arrays = dict(np.load(folder / "params.npz"))
    np.savez(folder / "params.npz", **arrays, W_skip=arrays["W_enc"])
    folder_2 = gemma_scope_2(tmp_path / "two").path
    tensors = kronsae.system.files.read_tensors(folder_2 / "params.safetensors")
    save(folder_2 / "params.safetensors", tensors | {"W_skip": tensors["w_enc"].clone()})
    for path in (folder, folder_2):
        with pytest.raises(InputError, match=r"tensors \['W_skip'\] have no counterpart"):
            kronsae.load(path)


@pytest.mark.parametrize("layout", [llama_scope, llamascopium, qwen_scope, openai, goodfire])
def test_tensors_that_are_not_known(layout, tmp_path):
    path = layout(tmp_path).path
    file = next(p for p in (path, *path.rglob("*")) if p.suffix in (".pt", ".pth", ".safetensors"))
    extra = {"encoder_glu.weight": torch.ones(3, 3)}
    if file.suffix == ".safetensors":
        save(file, kronsae.system.files.read_tensors(file) | extra)
    else:
        torch.save(torch.load(file) | extra, file)
    with pytest.raises(InputError, match=r"tensors \['encoder_glu.weight'\] have no counterpart"):
        kronsae.load(path, allow_pickle=True)


def test_weights_of_eight_bits(tmp_path):
    path = gemma_scope_2(tmp_path).path / "params.safetensors"
    tensors = kronsae.system.files.read_tensors(path)
    save(path, {name: x.to(torch.float8_e4m3fn) for name, x in tensors.items()})
    rounded = tensors["w_dec"].to(torch.float8_e4m3fn).float()
    assert torch.equal(kronsae.load(path).W_dec, rounded)


def test_openai_with_topk_normalises_each_token(tmp_path):
    path = openai(tmp_path).path
    content = torch.load(path)
    for activation, reason in (("TopK", "a LayerNorm of each token"), ("Identity", "'Identity'")):
        torch.save(content | {"activation": activation}, path)
        with pytest.raises(InputError, match=reason):
            kronsae.load(path, allow_pickle=True)


def test_a_transcoder_with_tensors_of_another_kind(tmp_path):
    path = transcoder_set(tmp_path).path
    w = drawn(OUT)
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip", "threshold")
    save(path, {name: w[name] for name in names})
    check(
        kronsae.load(path),
        lambda x: jump(x @ w["W_enc"].T + w["b_enc"], w["threshold"]),
        lambda z, x: z @ w["W_dec"] + w["b_dec"] + x @ w["W_skip"].T,
    )
    save(path, {name: w[name] for name in names} | {"W_gate": w["W_enc"] + 1})
    with pytest.raises(InputError, match=r"tensors \['W_gate'\] have no counterpart"):
        kronsae.load(path)
    path.with_name("config.yaml").write_text("a: [")
    save(path, {name: w[name] for name in names})
    with pytest.raises(InputError, match="config.yaml cannot be read"):
        kronsae.load(path)


def test_a_pickle_of_no_suite(tmp_path):
    torch.save({"weight": torch.ones(3, 3)}, tmp_path / "model.pt")
    with pytest.raises(InputError, match="no layout that is known has these tensors.*weight"):
        kronsae.load(tmp_path / "model.pt", allow_pickle=True)
    torch.save([torch.ones(3)], tmp_path / "model.pt")
    with pytest.raises(InputError, match="expected a dictionary of tensors"):
        kronsae.load(tmp_path / "model.pt", allow_pickle=True)


PICKLES = (qwen_scope, openai, goodfire, deepseek, hook_z)


@pytest.mark.parametrize("layout", PICKLES, ids=lambda layout: layout.__name__)
def test_pickles_are_read_on_request_alone(layout, tmp_path):
    made = layout(tmp_path)
    with pytest.raises(InputError, match="is a pickle, which is only read on request"):
        kronsae.load(made.path)
    mark = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return Path.touch, (mark,)

    content = torch.load(made.path)
    torch.save(content | {"b_dec": Evil(), "pre_bias": Evil()}, made.path)
    with pytest.raises(InputError, match="does not hold tensors alone"):
        kronsae.load(made.path, allow_pickle=True)
    assert not mark.exists()


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_missing_wrong_and_infinite_weights(layout, tmp_path):
    """Each tensor taken out, of another shape, of integers, and with NaN: it is named."""
    made = layout(tmp_path)
    form = FORMATS[recognise(made.path)]
    path = form.weights_of(made.path)
    kept = path.read_bytes()
    if path.suffix == ".npz":
        tensors = {name: torch.from_numpy(array) for name, array in np.load(path).items()}
        write = save_npz
    elif form.pickle:
        tensors, write = torch.load(path), save_pickle
    else:
        tensors, write = kronsae.system.files.read_tensors(path), save
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.ndim or name == "stats_last_nonzero":
            continue
        wider = torch.cat([tensor, tensor], dim=tensor.shape.index(max(tensor.shape)))
        optional = name == "affine_skip_connection"
        for changed, reason in (
            (tensor[None] if optional else None, "expected|no layout"),
            (wider, "expected"),
            (tensor.reshape(1, 1, *tensor.shape), "expected|several layers"),
            (tensor.long(), "expected floating-point numbers"),
            (tensor * torch.nan, "NaN"),
        ):
            others = {key: value for key, value in tensors.items() if key != name}
            write(path, others if changed is None else others | {name: changed})
            with pytest.raises(InputError, match=reason):
                kronsae.load(made.path, allow_pickle=True)
    path.write_bytes(kept[: len(kept) // 2])
    with pytest.raises(InputError, match="cannot be read|does not hold tensors alone"):
        kronsae.load(made.path, allow_pickle=True)


# Arrays of numpy


def header(shape: tuple[int, ...], descr: str = "<f4") -> bytes:
    """An array's header in the npy format."""
    file = io.BytesIO()
    claim = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, claim)
    return file.getvalue()


def test_arrays_of_objects_are_refused(tmp_path):
    folder = gemma_scope(tmp_path).path
    arrays = dict(np.load(folder / "params.npz")) | {"b_dec": np.array([{}, None], object)}
    np.savez(folder / "params.npz", **arrays)
    with pytest.raises(InputError, match="params.npz cannot be read: .*b_dec"):
        kronsae.load(folder)


@pytest.mark.parametrize("shape", [(2**50,), (2**62, 2**62), (8, 1)], ids=str)
def test_arrays_that_are_not_as_long_as_they_say(shape, tmp_path):
    folder = gemma_scope(tmp_path).path
    with zipfile.ZipFile(folder / "params.npz", "a") as archive:
        archive.writestr("W_more.npy", header(shape) + bytes(64))
    with pytest.raises(InputError, match="W_more.npy does not hold an array"):
        kronsae.load(folder)


def test_a_file_that_grows_in_memory(tmp_path):
    folder = gemma_scope(tmp_path).path
    with zipfile.ZipFile(folder / "params.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("W_enc.npy", header((2**22,)) + bytes(2**24))
    with pytest.raises(InputError, match="16,777,344 bytes come of a file of"):
        kronsae.load(folder)


def test_compressed_arrays(tmp_path):
    made = gemma_scope(tmp_path)
    np.savez_compressed(made.path / "params.npz", **dict(np.load(made.path / "params.npz")))
    check(kronsae.load(made.path), made.encode, made.decode)


# Folders, repositories, commands


def test_a_folder_of_many_files(tmp_path):
    path = transcoder_set(tmp_path).path
    assert kronsae.load(path.parent).config.d_target == OUT  # the one that there is
    path.with_name("layer_8.safetensors").write_bytes(path.read_bytes())
    with pytest.raises(InputError, match="holds 2 SAEs: name one of the files, such as layer_7"):
        kronsae.load(path.parent)
    sae = kronsae.load(path.parent, subfolder="layer_8.safetensors")
    assert Origin.of(sae.metadata).hookpoint == "blocks.8.mlp.hook_in"
    with pytest.raises(InputError, match="holds no SAE"):
        kronsae.load(path.parent, subfolder="layer_9.safetensors")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the hub, whose repositories are folders of hub/; it lists what was fetched."""
    fetched: list[str] = []

    def snapshot_download(repo: str, revision: None, allow_patterns: list[str]) -> str:
        there = tmp_path / "hub" / repo
        cache = tmp_path / "cache" / f"models--{repo.replace('/', '--')}" / "snapshots" / "1a2b"
        for file in there.rglob("*"):
            name = file.relative_to(there).as_posix()
            if file.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                fetched.append(name)
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                (cache / name).write_bytes(file.read_bytes())
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return fetched


@pytest.mark.parametrize(
    ("layout", "files"),
    [
        (gemma_scope, ["params.npz"]),
        (gemma_scope_2, ["config.json", "params.safetensors"]),
        (llama_scope, ["checkpoints/final.safetensors", "hyperparams.json"]),
        (qwen_scope, []),
        (transcoder_set, ["../config.yaml"]),
    ],
)
def test_a_repository_of_a_suite(layout, files, hub, tmp_path):
    """Only the files of one SAE are fetched, and the repository's name says what it is of."""
    made = layout(tmp_path / "hub")
    parts = made.path.relative_to(tmp_path / "hub").parts
    repository, folder = "/".join(parts[:2]), "/".join(parts[2:])
    for sibling in ("other" + made.path.suffix, "layer_99.safetensors", "README.md"):
        (made.path.parent / sibling).write_bytes(b"of no use")
    sae = kronsae.load(repository, subfolder=folder, allow_pickle=True)
    check(sae, made.encode, made.decode)
    assert Origin.of(sae.metadata).model == made.origin["model"]
    of_file = made.path.is_file()
    expected = [folder, *files] if of_file else [f"{folder}/{name}" for name in files]
    assert sorted(hub) == sorted(name.removeprefix("../") for name in expected)


@pytest.mark.parametrize(
    ("layout", "layer", "above", "other"),
    [
        (qwen_scope, 6, 0, "layer7.sae.pt"),
        (llama_scope, 15, 0, "Llama3_1-8B-Base-L16R-8x"),
        (llamascopium, 5, 0, "L6R"),
        (gemma_scope, 20, 2, "layer_21"),
        (gemma_scope_2, 17, 0, "layer_18_width_16k_l0_small"),
        (transcoder_set, 7, 0, "layer_8.safetensors"),
    ],
)
def test_a_layer_of_a_suite(layout, layer, above, other, tmp_path):
    """Found by the names of its files, beside one of the next layer."""
    made = layout(tmp_path)
    place = (made.path, *made.path.parents)[above]
    copy = shutil.copytree if place.is_dir() else shutil.copy
    copy(place, place.with_name(other))
    for number, name in ((layer, place.name), (layer + 1, other)):
        assert subfolder_of(place.parent, number, None, None).split("/")[0] == name
    sae = kronsae.load(place.parent, layer=layer, allow_pickle=True)
    check(sae, made.encode, made.decode)
    with pytest.raises(InputError, match=f"has no SAE at layer {layer + 2}; it has"):
        kronsae.load(place.parent, layer=layer + 2)


def test_a_trainers_folder_is_one_sae_of_a_suite(tmp_path):
    """Its ae.pt is no SAE beside it."""
    fixture = Path(__file__).parent / "fixtures/interop/dictionary_learning/AutoEncoderTopK"
    shutil.copytree(fixture, tmp_path / "resid_post_layer_3/trainer_0")
    assert kronsae.load(tmp_path, layer=3, allow_pickle=True).config.k == 3


def test_a_pickle_of_the_hub_is_not_fetched_unasked(hub, tmp_path):
    qwen_scope(tmp_path / "hub")
    repository = f"Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}"
    with pytest.raises(InputError, match="only downloaded with allow_pickle=True"):
        kronsae.load(repository, subfolder="layer6.sae.pt")
    assert hub == []


def test_a_suite_of_sparsify_names_its_model(hub, tmp_path):
    """config.json lies above the folder of the hookpoint."""
    fixture = Path(__file__).parent / "fixtures/interop/sparsify"
    for name in ("config.json", "layers.3/cfg.json", "layers.3/sae.safetensors"):
        path = tmp_path / "hub/them/saes" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((fixture / name).read_bytes())
    sae = kronsae.load("them/saes", subfolder="layers.3")
    assert Origin.of(sae.metadata).model == "EleutherAI/pythia-70m"


def test_suites_are_not_written(tmp_path, capsys):
    made = gemma_scope(tmp_path)
    command = [str(made.path), "--out", str(tmp_path / "out"), "--to"]
    assert export([*command, "gemma_scope"]) == 2
    assert "invalid choice: 'gemma_scope'" in capsys.readouterr().err
    with pytest.raises(InputError, match="this format is only read: use --to kronsae"):
        FORMATS["gemma_scope"].write(kronsae.load(made.path), tmp_path / "out")
    assert export([*command, "sae_lens"]) == 0
    check(kronsae.load(tmp_path / "out"), made.encode, made.decode)


# SAELens' registry


def test_without_saelens_a_sentence_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(InputError, match="needs SAELens 6 .*: pip install sae-lens, or load the s"):
        kronsae.load("sae_lens:gpt2-small-res-jb/blocks.8.hook_resid_pre")
    with pytest.raises(InputError, match="revision, subfolder, layer and hookpoint have no"):
        kronsae.load("sae_lens:gpt2-small-res-jb/blocks.8.hook_resid_pre", revision="main")


@pytest.fixture
def lens(tmp_path, monkeypatch):
    """SAELens' loaders of public suites, which find their repositories in hub/."""
    loaders = pytest.importorskip("sae_lens.loading.pretrained_sae_loaders")
    root = tmp_path / "hub"

    def download(repo_id: str, filename: str, subfolder: str = "", **_: Any) -> str:
        path = root / repo_id / subfolder / filename
        if not path.is_file():
            raise loaders.EntryNotFoundError(filename)
        return str(path)

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        tensors = kronsae.system.files.read_tensors(root / repo_id / filename)
        return {name: list(tensor.shape) for name, tensor in tensors.items()}

    monkeypatch.setattr(loaders, "hf_hub_download", download)
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", shapes)
    return loaders


def moved(made: Made, root: Path, repository: str) -> Made:
    """A file at the root of a folder, in a repository of that name."""
    path = root / repository / made.path.name
    path.parent.mkdir(parents=True, exist_ok=True)
    return made._replace(path=made.path.rename(path))


GPT2, DEEPSEEK = "ckkissane/attn-saes", "qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19"
GOODFIRE = "Goodfire/Llama-3.1-8B-Instruct-SAE-l19"
CONVERTERS = {
    "gemma_2": gemma_scope,
    "gemma_2_transcoder": gemma_scope_transcoder,
    "gemma_3": gemma_scope_2,
    "gemma_3 affine": gemma_scope_2_affine,
    "llama_scope": lambda root: llama_scope(root, unit=True),
    "llama_scope_r1_distill": lambda root: moved(llamascopium_earlier(root), root, "fnlp/R1"),
    "qwen_scope": qwen_scope,
    "goodfire": lambda root: moved(goodfire(root), root, GOODFIRE),
    "deepseek_r1": lambda root: moved(deepseek(root), root, DEEPSEEK),
    "connor_rob_hook_z": lambda root: moved(hook_z(root), root, GPT2),
    "mwhanna_transcoder": transcoder_set,
}
"""SAELens' converters, by its names, and the layouts that they read."""


@pytest.mark.parametrize("converter", CONVERTERS)
def test_saelens_reads_the_same(converter, lens, tmp_path):
    import sae_lens

    root = tmp_path / "hub"
    root.mkdir()
    made = CONVERTERS[converter](root)
    if converter == "connor_rob_hook_z":
        facts = {"act_size": WIDTH, "dict_size": SIZE, "act_name": "blocks.0.attn.hook_z"}
        made.path.with_name(f"{made.path.stem}_cfg.json").write_text(json.dumps(facts))
    if converter == "mwhanna_transcoder":
        facts = {"d_model": WIDTH, "d_feature": SIZE, "batch_size": 64}
        lines = [f"{name}:\n  value: {value}\n" for name, value in facts.items()]
        made.path.with_name("wandb-config.yaml").write_text("".join(lines))
    if converter == "llama_scope_r1_distill":
        config = json.loads((made.path / "config.json").read_text())
        config |= {"d_model": WIDTH, "expansion_factor": SIZE // WIDTH}
        (made.path / "config.json").write_text(json.dumps(config))
    ours = kronsae.load(made.path, allow_pickle=True)
    owner, name, *folder = made.path.relative_to(root).parts
    sizes = {"d_in": WIDTH, "d_sae": SIZE, "dtype": "float32", "reshape_activations": "none"}
    sizes |= {"d_out": OUT} if ours.config.d_target else {}
    read = lens.NAMED_PRETRAINED_SAE_LOADERS[converter.split()[0]]
    settings, weights, _ = read(f"{owner}/{name}", "/".join(folder), "cpu", False, sizes)
    theirs = sae_lens.SAE.from_dict(lens.handle_config_defaulting(settings))
    theirs.load_state_dict(weights)
    if theirs.cfg.normalize_activations != "none":
        norm = 1.5 if converter == "llama_scope" else 1.7
        theirs.fold_activation_norm_scaling_factor(math.sqrt(WIDTH) / norm)
    skip = getattr(theirs, "W_skip", None)
    check(
        ours,
        theirs.encode,
        lambda z, x: theirs.decode(z) + (0 if skip is None else x @ skip.T),
    )


def test_an_sae_of_saelens_registry(lens, tmp_path):
    """By its release and id; and by its repository and folder."""
    repository, folder = "jbloom/GPT2-Small-SAEs-Reformatted", "blocks.8.hook_resid_pre"
    w = drawn()
    path = tmp_path / "hub" / repository / folder
    tensors = {name: w[name] for name in ("W_dec", "b_enc", "b_dec")} | {"W_enc": w["W_enc"].T}
    save(path / "sae_weights.safetensors", tensors)
    settings = {"d_in": WIDTH, "d_sae": SIZE, "dtype": "float32", "hook_name": folder}
    settings |= {"model_name": "gpt2-small", "context_size": 128}
    (path / "cfg.json").write_text(json.dumps(settings))
    for name in ("gpt2-small-res-jb", repository):
        sae = kronsae.load(f"sae_lens:{name}/{folder}")
        check(
            sae,
            lambda x: ((x - w["b_dec"]) @ w["W_enc"].T + w["b_enc"]).relu(),
            lambda z, x: z @ w["W_dec"] + w["b_dec"],
        )
        origin = Origin.of(sae.metadata)
        assert (origin.model, origin.hookpoint, origin.layer) == ("gpt2-small", folder, None)
    assert kronsae.load(Path(f"sae_lens:gpt2-small-res-jb/{folder}")).config.dict_size == SIZE


def test_an_sae_of_the_registry_with_a_factor(lens, tmp_path):
    """SAELens folds the factor of its own list; the thresholds are in the file's units."""
    from sae_lens.loading.pretrained_saes_directory import get_norm_scaling_factor

    norm = math.sqrt(WIDTH) / get_norm_scaling_factor("llama_scope_lxr_8x", "l15r_8x")
    norms = {"in": norm, "out": norm}
    llama_scope(tmp_path / "hub", unit=True, dataset_average_activation_norm=norms)
    theirs = kronsae.load("sae_lens:llama_scope_lxr_8x/l15r_8x")
    made = llama_scope(tmp_path, unit=True, dataset_average_activation_norm=norms)
    ours = kronsae.load(made.path)
    check(theirs, made.encode, made.decode)
    check(ours, made.encode, made.decode)
    assert Origin.of(theirs.metadata).layer == 15


def test_names_that_the_registry_has_not(lens, tmp_path):
    for name, reason in (
        ("gpt2-small-res-jp/blocks.8.hook_resid_pre", "no release.*it has gpt2-small-res-jb"),
        ("gpt2-small-res-jb/blocks.8", "has no 'blocks.8'; it has blocks"),
        ("nobody/nowhere/blocks.8", "SAELens cannot load it"),
        ("gpt2-small-res-jb", "has no ''; it has blocks"),
    ):
        with pytest.raises(InputError, match=reason):
            kronsae.load(f"sae_lens:{name}")


# Commands on such SAEs


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A tiny model of Gemma 2's architecture, and a text for it."""
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "gemma2", "gemma2")
    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=40)) for _ in range(120)]
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return folder / "gemma2", text


@pytest.fixture
def flags(language_model):
    """What such an SAE's file does not say."""
    model, text = map(str, language_model)
    return ["--model", model, "--layer", "1", "--dataset", text]


@pytest.fixture
def suite(tmp_path):
    """An SAE of Gemma Scope for the tiny model's width."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(64, 32, generator=generator)
    rows /= rows.norm(dim=1, keepdim=True)
    arrays = {"W_enc": rows.T.contiguous(), "W_dec": rows, "b_dec": torch.zeros(32)}
    arrays |= {"b_enc": torch.zeros(64), "threshold": torch.full((64,), 0.02)}
    folder = tmp_path / "layer_1/width_16k/average_l0_7"
    save_npz(folder / "params.npz", arrays)
    return folder


def test_evaluate(suite, flags, tmp_path, capsys):
    out = tmp_path / "judged"
    assert command(["evaluate", str(suite), *flags, "--out", str(out)]) == 0
    [judged] = json.loads((out / "evaluation.json").read_text())["judged"]
    assert judged["kind"] == "JumpReLU SAE" and judged["metrics"]["l0"] > 1
    assert judged["metrics"]["ce_spliced"] > 0
    assert command(["evaluate", str(suite)]) == 2
    assert "its metadata does not name a language model: give --model" in capsys.readouterr().err


def test_evaluate_a_file_of_a_folder(suite, flags, tmp_path, capsys):
    """A pickle, by the flags that say where it is and that it may be read."""
    arrays = {name: torch.from_numpy(a) for name, a in np.load(suite / "params.npz").items()}
    arrays["W_enc"], arrays["W_dec"] = arrays["W_enc"].T, arrays["W_dec"].T
    del arrays["threshold"]
    folder = tmp_path / f"SAE-Res-Tiny-W1K-L0_{K}"
    save_pickle(folder / "layer1.sae.pt", {name: a.contiguous() for name, a in arrays.items()})
    judge = ["evaluate", str(folder), *flags, "--out", str(tmp_path / "judged")]
    judge += ["--subfolder", "layer1.sae.pt"]
    assert command(judge) == 2
    assert "on request: with allow_pickle=True (--allow-pickle)" in capsys.readouterr().err
    assert command([*judge, "--allow-pickle"]) == 0
    [judged] = json.loads((tmp_path / "judged" / "evaluation.json").read_text())["judged"]
    assert (judged["kind"], judged["k"]) == ("TopK SAE", K)


def test_intervene(suite, flags, tmp_path, capsys):
    prompt = ["--latent", "3", "--prompt", "w1 w2 w3", "--new-tokens", "3", "--set", "4"]
    assert command(["intervene", str(suite), *flags, *prompt]) == 0
    effects = ["--effects", "2", "--out", str(tmp_path / "effects"), "--heldout-tokens", "400"]
    assert command(["intervene", str(suite), *flags, *effects]) == 0


def test_interpret(suite, flags, tmp_path, monkeypatch):
    class Says:
        name = "a stand-in"

        def __init__(self, *_: Any, **__: Any) -> None:
            """Nothing is loaded."""

        def answer(self, messages: list[dict[str, str]], max_tokens: int) -> Reply:
            return Reply("EXPLANATION: words\n1, 0, 1, 0, 1", 1, 1)

    monkeypatch.setattr("kronsae.interpret.__main__.LocalChat", Says)
    words = ["--explainer", "x", "--latents", "2", "--out", str(tmp_path / "said")]
    assert command(["interpret", str(suite), *flags, *words]) == 0
    summary = json.loads((tmp_path / "said" / "interpretation.json").read_text())["summary"]
    assert summary["explained"] == 2


def test_explore(suite, flags, tmp_path, capsys, monkeypatch):
    """Its properties are kept under runs/explored, and serve again for this SAE and place alone."""
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "pages" / "sae.html"
    explore = ["explore", str(suite), *flags, "--tokens", "2000", "--out", str(page)]
    assert command(explore) == 0
    facts = json.loads(re.findall(r'id="facts"[^>]*>(.*?)</script>', page.read_text())[0])
    assert facts["trained"] is None and facts["hookpoint"] == "layer 1"
    assert facts["summary"]["groups"]["latent"]["fire"] > 50
    [home] = Path("runs/explored").iterdir()
    measured = home / "properties" / "properties.json"
    first = measured.read_bytes()
    assert command(explore) == 0 and measured.read_bytes() == first
    assert command([*explore, "--layer", "0"]) == 0 and measured.read_bytes() != first
    assert not (suite / "properties").exists()
    for source in (suite, tmp_path):  # the SAE, and a folder of which --layer names it
        capsys.readouterr()
        assert command(["explore", str(source), *flags, "--tokens", "2000"]) == 0
        assert f"{home}/explorer.html (" in capsys.readouterr().out
    for arguments, reason in (
        ([str(tmp_path / "nowhere")], "no such folder"),
        ([str(suite), "--out", str(page)], "give --model"),
    ):
        assert command(["explore", *arguments]) == 2
        assert reason in capsys.readouterr().err


def test_what_the_file_says_of_its_model_is_used(tmp_path):
    """The block, where it is one; a module else; and flags for what it does not say."""
    made = gemma_scope(tmp_path)
    data = data_of(kronsae.load(made.path), {}, "it")
    assert (data.model, data.layer, data.hookpoint) == ("google/gemma-2-2b", 20, None)
    assert data.bos == "bos"
    attention = data_of(kronsae.load(gemma_scope_attention(tmp_path).path), {}, "it")
    assert attention.hookpoint == "model.layers.20.self_attn.o_proj:input"
    transcoder = kronsae.load(gemma_scope_transcoder(tmp_path).path)
    given = {"hookpoint": "h", "target_hookpoint": "t"}
    assert data_of(transcoder, given, "it").target_hookpoint == "t"
