"""Language models: which activations are read, what runs for it, splicing, and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import BLOCKS, CAUSAL, FAMILIES, LAYERS, POSITIONS, WIDTH, save_model
from torch import nn

from kronsae import InputError
from kronsae.data import LanguageModel, language_model
from kronsae.metrics.splicing import spliced

IDS = torch.randint(6, 96, (2, 12), generator=torch.Generator().manual_seed(1))
ALL = torch.ones(IDS.shape, dtype=torch.bool)


def losses_with(model, make, mask=ALL):
    """Losses of IDS with make(x, y) in the place of the activations y of tokens in the mask."""
    with spliced(model, make, mask):
        return model.token_losses(IDS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {family: save_model(root / family, family) for family in FAMILIES}


def hooks(model):
    """All but those that transformers leaves in place itself."""
    return [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if not hook.__module__.startswith("transformers.")
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_hidden_states(folders, family):
    for layer in range(LAYERS - 1):  # the last hidden state of many models is normalised
        lm = LanguageModel.load(str(folders[family]), layer=layer)
        assert lm.d_model == WIDTH
        assert lm.hookpoint == f"{BLOCKS[family]}.{layer}"
        expected = lm.model(IDS, output_hidden_states=True).hidden_states[layer + 1]
        assert torch.equal(lm.activations(IDS), expected)
        assert hooks(lm.model) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_runs_after_the_hookpoint(folders, family):
    lm = LanguageModel.load(str(folders[family]), layer=1)
    ran = []
    for name, module in lm.model.named_modules():
        module.register_forward_hook(lambda m, i, o, name=name: ran.append(name))
    lm.activations(IDS)
    blocks = BLOCKS[family]
    assert f"{blocks}.0" in ran and f"{blocks}.1" in ran
    late = (f"{blocks}.2", "lm_head", "cls", "norm", "model.norm", "transformer.ln_f", "pooler")
    assert not [name for name in ran if name.startswith(late)]
    assert lm.model.training is False
    assert not any(p.requires_grad for p in lm.model.parameters())


def test_padding_is_masked(folders):
    lm = LanguageModel.load(str(folders["llama"]), layer=1)
    mask = torch.ones_like(IDS)
    mask[:, 8:] = 0
    other = IDS.clone()
    other[:, 8:] = 0
    bert = LanguageModel.load(str(folders["bert"]), layer=1)
    for model in (lm, bert):
        seen, masked = model.activations(IDS, mask), model.activations(other, mask)
        torch.testing.assert_close(seen[:, :8], masked[:, :8])
    assert not torch.allclose(bert.activations(IDS)[:, :8], bert.activations(other)[:, :8])


def test_without_a_mask_every_token_counts(folders):
    """Also a padding token, which may be the separator of texts: some models would guess."""
    lm = LanguageModel.load(str(folders["bert"]), layer=1)
    masks = []
    lm.model.register_forward_pre_hook(
        lambda m, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    lm.activations(torch.zeros_like(IDS))
    assert masks[0].shape == IDS.shape and masks[0].all()


def test_any_module_by_name(folders):
    for name in ("transformer.h.1.mlp", "transformer.h.1.attn", "transformer.wte", "transformer"):
        lm = LanguageModel.load(str(folders["gpt2"]), hookpoint=name)
        seen = {}
        module = lm.model.get_submodule(name)
        handle = module.register_forward_hook(lambda m, i, o, seen=seen: seen.update(o=o))
        lm.model(IDS)
        handle.remove()
        output = seen["o"] if isinstance(seen["o"], torch.Tensor) else seen["o"][0]
        assert torch.equal(lm.activations(IDS), output)
    lm = LanguageModel.load(str(folders["gpt2"]), hookpoint="lm_head")
    assert lm.d_model == 100


@pytest.mark.parametrize("family", CAUSAL)
def test_losses_and_splicing(folders, family, monkeypatch):
    lm = LanguageModel.load(str(folders[family]), layer=1)
    logits = lm.model(IDS).logits[:, :-1].flatten(0, 1)
    expected = nn.functional.cross_entropy(logits, IDS[:, 1:].flatten(), reduction="none")
    plain = lm.token_losses(IDS)
    assert plain.shape == (2, 11) and plain.dtype == torch.float32
    torch.testing.assert_close(plain.flatten(), expected)
    monkeypatch.setattr(language_model, "LOGITS_AT_ONCE", 500)  # five tokens
    torch.testing.assert_close(lm.token_losses(IDS), plain)

    calls = []

    def same(x, y):
        calls.append(x.shape)
        return y.clone()

    assert torch.equal(losses_with(lm, same), lm.token_losses(IDS))
    assert calls == [(24, WIDTH)]
    zeroed = losses_with(lm, lambda x, y: torch.zeros_like(y))
    assert (zeroed - plain).abs().max() > 1e-4

    # Only what comes after a token depends on it.
    late = (torch.arange(12) >= 6).expand(IDS.shape)
    later = losses_with(lm, lambda x, y: -y, late)
    torch.testing.assert_close(later[:, :6], plain[:, :6])
    assert not torch.allclose(later[:, 6:], plain[:, 6:])
    assert hooks(lm.model) == [] and "forward" not in lm.model.base_model.__dict__


@pytest.mark.parametrize("hookpoint", ["transformer.h.2", "transformer", "lm_head"])
def test_splicing_elsewhere(folders, hookpoint):
    lm = LanguageModel.load(str(folders["gpt2"]), hookpoint=hookpoint)
    elsewhere = LanguageModel.load(str(folders["gpt2"]), layer=0).token_losses(IDS)
    torch.testing.assert_close(lm.token_losses(IDS), elsewhere)
    torch.testing.assert_close(losses_with(lm, lambda x, y: y), elsewhere)
    uniform = losses_with(lm, lambda x, y: torch.zeros_like(y))
    assert not torch.allclose(uniform, lm.token_losses(IDS))
    if hookpoint == "lm_head":
        torch.testing.assert_close(uniform, torch.full((2, 11), torch.tensor(100.0).log()))


def test_a_module_that_runs_twice_is_replaced_once(folders):
    lm = LanguageModel.load(str(folders["gpt2"]), layer=1)
    lm.model.transformer.h[2] = lm.model.transformer.h[1]
    calls = []
    losses_with(lm, lambda x, y: calls.append(1) or y)
    assert len(calls) == 1


def test_a_tuple_keeps_its_other_parts(folders):
    class Pair(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs), "kept"

    lm = LanguageModel.load(str(folders["gpt2"]), layer=1)
    plain, losses = lm.activations(IDS), lm.token_losses(IDS)
    seen = []

    class Unpack(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            hidden, other = self.inner(*args, **kwargs)
            seen.append(other)
            return hidden

    lm.model.transformer.h[1] = Unpack(Pair(lm.model.transformer.h[1]))
    pair = LanguageModel(lm.model, lm.tokenizer, "transformer.h.1.inner")
    assert torch.equal(pair.activations(IDS), plain)
    assert torch.equal(losses_with(pair, lambda x, y: y), losses)
    assert set(seen) == {"kept"}


def test_hooks_go_away_on_errors(folders):
    lm = LanguageModel.load(str(folders["llama"]), layer=1)

    def fail(x, y):
        raise RuntimeError("of the caller")

    with pytest.raises(RuntimeError, match="of the caller"):
        losses_with(lm, fail)
    with pytest.raises(IndexError):
        lm.activations(torch.full((1, 4), 5000))
    assert hooks(lm.model) == [] and "forward" not in lm.model.model.__dict__
    assert lm.token_losses(IDS).isfinite().all()


def test_bert_has_no_cross_entropy(folders):
    lm = LanguageModel.load(str(folders["bert"]), layer=1)
    assert not lm.has_cross_entropy
    with pytest.raises(InputError, match=r"no cross-entropy: .* \(BertModel\) has no head"):
        lm.token_losses(IDS)


def test_description(folders):
    lm = LanguageModel.load(str(folders["llama"]), layer=1, dtype=torch.bfloat16)
    facts = json.loads(json.dumps(lm.describe()))
    assert facts["name"] == str(folders["llama"]) and facts["dtype"] == "bfloat16"
    assert facts["hookpoint"] == "model.layers.1" and facts["d_model"] == WIDTH
    assert lm.dtype == torch.bfloat16 and lm.max_context == POSITIONS
    assert lm.activations(IDS).dtype == torch.bfloat16
    again = LanguageModel.load(str(folders["llama"]), layer=1, dtype=torch.bfloat16)
    assert again.describe() == lm.describe()


def test_other_weights_are_described_otherwise(folders, tmp_path):
    shutil.copytree(folders["llama"], tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] += 0.1
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    one, other = (LanguageModel.load(str(p), layer=1) for p in (folders["llama"], tmp_path / "m"))
    assert one.describe()["weights"] != other.describe()["weights"]


def test_loading_is_quiet(folders, capfd):
    LanguageModel.load(str(folders["bert"]), layer=1)
    LanguageModel.load("embedded")
    assert capfd.readouterr() == ("", "")


def test_embedded():
    lm = LanguageModel.load("embedded")
    assert lm.hookpoint == "gpt_neox.layers.2" and lm.d_model == 256
    assert lm.has_cross_entropy and lm.describe()["name"] == "embedded"
    assert LanguageModel.load("embedded", hookpoint="gpt_neox.embed_in").d_model == 256


# What is refused, and what the message says


def refused(*words, **options):
    options = {"name_or_path": "embedded", **options}
    with pytest.raises(InputError) as caught:
        LanguageModel.load(**options)
    message = str(caught.value)
    assert not [word for word in words if word not in message], message
    assert len(message) < 700


def test_no_such_model(tmp_path):
    refused("no-such-model", "no such folder", "hub", name_or_path="no-such-model", layer=0)
    refused("a/b", "hub", "revision 'v9'", name_or_path="a/b", layer=0, revision="v9")
    refused("./there", "no such folder", name_or_path="./there", layer=0)
    refused("holds no transformers model", name_or_path=str(tmp_path), layer=0)


def test_which_activations():
    refused("'a/b'", "--layer", "--hookpoint", name_or_path="a/b")
    refused("expected one of them", layer=1, hookpoint="gpt_neox")
    for layer in (4, -1):
        refused(f"layer {layer}", "4 blocks", "0 to 3", layer=layer)
    refused("gpt_neox.layer.2", "gpt_neox.layers.2", "named_modules", hookpoint="gpt_neox.layer.2")
    refused("does not run", "ModuleList", hookpoint="gpt_neox.layers")
    refused("[b, t, d]", "[2, 5, 'd']", hookpoint="gpt_neox.rotary_emb")


def test_no_tokenizer(folders, tmp_path):
    for family in ("gpt2", "llama", "bert"):
        folder = tmp_path / family
        shutil.copytree(folders[family], folder)
        for file in folder.glob("tokenizer*"):
            file.unlink()
        refused("no tokenizer", "Save it", name_or_path=str(folder), layer=0)


def test_only_safetensors(folders, tmp_path):
    shutil.copytree(folders["llama"], tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "m" / "pytorch_model.bin")
    refused("safetensors", "convert", "unpickling", name_or_path=str(tmp_path / "m"), layer=0)


def test_code_from_the_hub_is_not_run(folders, tmp_path):
    shutil.copytree(folders["llama"], tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config |= {"model_type": "unheard_of", "auto_map": {"AutoConfig": "code.C"}}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    (tmp_path / "m" / "code.py").write_text("raise SystemExit('it ran')")
    refused("--trust-remote-code", name_or_path=str(tmp_path / "m"), layer=0)


def without(folder, target, *names):
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    for name in names:
        del weights[name]
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)


def test_random_weights_are_not_read(folders, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    folder = without(folders["llama"], tmp_path / "m", name)
    refused("lack 1 weights", name, "random", name_or_path=folder, layer=1)
    lm = LanguageModel.load(folder, layer=0)  # it does not come that far
    assert not lm.has_cross_entropy


def test_without_a_head_there_is_no_cross_entropy(folders, tmp_path):
    folder = without(folders["llama"], tmp_path / "m", "lm_head.weight")
    assert not LanguageModel.load(folder, layer=1).has_cross_entropy
    assert LanguageModel.load(str(folders["llama"]), layer=1).has_cross_entropy


def test_files_that_need_a_package_say_which(tmp_path, monkeypatch):
    from importlib import metadata

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"a GGUF file, needs the package gguf: pip install gguf"):
        LanguageModel.load(str(tmp_path / "model.gguf"), layer=0)
    adapter = tmp_path / "adapter_config.json"
    adapter.write_text('{"base_model_name_or_path": "some/base"}')
    with pytest.raises(InputError, match=r"has no adapter_model.safetensors, .*unpickling"):
        LanguageModel.load(str(tmp_path), layer=0)
    (tmp_path / "adapter_model.safetensors").touch()
    message = r"an adapter of some/base, needs the package peft: pip install peft"
    with pytest.raises(InputError, match=message):
        LanguageModel.load(str(tmp_path), layer=0)
    for broken in ("{}", "[]", "{"):
        adapter.write_text(broken)
        with pytest.raises(InputError, match=r"its adapter_config.json names no base model"):
            LanguageModel.load(str(tmp_path), layer=0)


def test_an_adapter_is_merged_into_its_base(folders, tmp_path):
    peft = pytest.importorskip("peft")
    base = LanguageModel.load(str(folders["llama"]), layer=1)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    from transformers import AutoModelForCausalLM

    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folders["llama"]), config)
    adapted.save_pretrained(tmp_path / "adapter")
    read = LanguageModel.load(str(tmp_path / "adapter"), layer=1)
    with torch.no_grad():
        expected = adapted.eval()(input_ids=IDS, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(read.activations(IDS), expected, rtol=1e-4, atol=1e-5)
    assert not read.activations(IDS).allclose(base.activations(IDS)) and read.has_cross_entropy
