"""Hookpoints: a module's input or output, sites of a block, and TransformerLens' names for them.

What is read is compared with hand-written hooks on the model, and what is spliced in with its own
modules put together by hand.
"""

import json

import cached
import pytest
import torch
from test_architectures import IDS, LAYER, MODELS, D, made
from tiny_models import CAUSAL, FAMILIES, make_tokenizer, save_model

import kronsae
from kronsae import SAE, InputError, SAEConfig
from kronsae.cache import CacheActivations
from kronsae.config import DataConfig
from kronsae.data import LanguageModel
from kronsae.data.hookpoints import SITES, Site, site_of
from kronsae.interop.lens_format import metadata_of, write
from kronsae.interventions.hooks import clamp, intervene
from kronsae.metrics.splicing import ForwardPasses, spliced
from kronsae.metrics.target_model import load_sae, open_heldout
from kronsae.model.origin import Origin
from kronsae.plan.outline import outline
from kronsae.train import main
from kronsae.training.hookpoints import matches

SEQUENTIAL = {
    "llama": ("self_attn", "mlp"),
    "gpt2": ("attn", "mlp"),
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "opt": ("self_attn", "fc2"),
    "gemma3_text": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "qwen2": ("self_attn", "mlp"),
    "qwen3_moe": ("self_attn", "mlp"),
    "phi3": ("self_attn", "mlp"),
    "mistral3": ("self_attn", "mlp"),
    "mixtral": ("self_attn", "mlp"),
    "gpt_neo": ("attn", "mlp"),
    "gpt_bigcode": ("attn", "mlp"),
    "gpt_oss": ("self_attn", "mlp"),
    "deepseek_v3": ("self_attn", "mlp"),
    "llama4_text": ("self_attn", "feed_forward"),
    "mpt": ("attn", "ffn.down_proj"),
    "modernbert": ("attn", "mlp"),
    "whisper": ("self_attn", "fc2"),
    "llava": ("self_attn", "mlp"),
    "jamba": ("self_attn", "feed_forward"),
}
"""Modules whose outputs are added to the residual stream, by model_type: of attention and MLP."""
PARALLEL = {
    "gpt_neox": ("attention", "mlp"),
    "falcon": ("self_attention", "mlp"),
    "gptj": ("attn", "mlp"),
    "codegen": ("attn", "mlp"),
}
PROJECTIONS = {
    **{"llama": "self_attn.o_proj", "gpt2": "attn.c_proj", "bloom": "self_attention.dense"},
    **{"gemma2": "self_attn.o_proj", "opt": "self_attn.out_proj", "gpt_neox": "attention.dense"},
    **{"falcon": "self_attention.dense", "gptj": "attn.out_proj", "qwen3_moe": "self_attn.o_proj"},
    **{"gpt_neo": "attn.attention.out_proj", "modernbert": "attn.Wo", "bert": None},
}
FEW = ("llama", "gpt2", "bloom", "gemma2", "opt", "gpt_neox", "falcon", "qwen3_moe")


def every(names):
    return [pytest.param(n, marks=() if n in FEW else pytest.mark.long) for n in names]


def load(name, tmp_path, hookpoint=f"{LAYER}.resid_post", **more):
    folder, _ = made(name, tmp_path / name)
    return LanguageModel.load(str(folder), hookpoint=hookpoint, **more)


def by_hand(model, hook, ids=IDS):
    """What `hook(keep)` registers and keeps in a forward pass of the transformers model."""
    kept = []
    handle = hook(lambda x: kept.append(x.detach().clone()))
    with torch.no_grad():
        model.model(input_ids=ids, attention_mask=torch.ones_like(ids))
    handle.remove()
    return kept[0]


def input_of(module):
    def hook(keep):
        def before(_module, args, kwargs):
            keep(args[0] if args else kwargs["hidden_states"])

        return module.register_forward_pre_hook(before, with_kwargs=True)

    return hook


def tiny(hookpoint, family="llama", **more):
    torch.manual_seed(0)
    model = FAMILIES[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return LanguageModel(model, make_tokenizer(family), hookpoint, **more)


def losses_with(model, make, ids=IDS):
    """Losses of ids with make(x, y) in the place of every activation y."""
    with spliced(model, make, torch.ones(ids.shape, dtype=torch.bool)):
        return model.token_losses(ids)


# Sites


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", every([*SEQUENTIAL, *PARALLEL]))
def test_sites_add_up_to_the_residual_stream(name, tmp_path):
    """On other text than that on which they were found, and the modules are those expected."""
    model = load(name, tmp_path)
    attention, mlp = {**SEQUENTIAL, **PARALLEL}[name]
    block = model.hookpoint
    assert model.hook_at(f"{LAYER}.attn_out").name == f"{block}.{attention}"
    assert model.hook_at(f"{LAYER}.mlp_out").name == f"{block}.{mlp}"
    names = ["resid_pre", "attn_out", "mlp_out", "resid_post"]
    names += ["resid_mid"] if name in SEQUENTIAL else []
    sites = [f"{LAYER}.{site}" for site in names]
    before, attn_out, mlp_out, after, *mid = model.activations_at(sites, IDS)
    assert attn_out.norm() > 1e-2 * before.norm() and mlp_out.norm() > 1e-3 * before.norm()
    if name in PARALLEL:
        torch.testing.assert_close(before + attn_out + mlp_out, after, rtol=1e-4, atol=1e-4)
        with pytest.raises(InputError, match="no resid_mid .* attention and MLP run in parallel"):
            model.hook_at(f"{LAYER}.resid_mid")
        return
    torch.testing.assert_close(before + attn_out, mid[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mid[0] + mlp_out, after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", every(["llama", "gpt2", "gpt_neox", "bert", "opt"]))
def test_streams_are_the_hidden_states_of_transformers(name, tmp_path):
    model = load(name, tmp_path)
    with torch.no_grad():
        mask = torch.ones_like(IDS)
        states = model.model(
            input_ids=IDS, attention_mask=mask, output_hidden_states=True
        ).hidden_states
    before, after = model.activations_at(["1.resid_pre", "1.resid_post"], IDS)
    assert torch.equal(before, states[LAYER]) and torch.equal(after, states[LAYER + 1])


@pytest.mark.parametrize("name", every([n for n, where in PROJECTIONS.items() if where]))
def test_attention_z_and_mlp_in_are_what_a_hook_by_hand_gives(name, tmp_path):
    model = load(name, tmp_path)
    block = model.model.get_submodule(model.hookpoint)
    [z] = model.activations_at([f"blocks.{LAYER}.attn.hook_z"], IDS)
    expected = by_hand(model, input_of(block.get_submodule(PROJECTIONS[name])))
    assert torch.equal(z, expected) and z.shape[:2] == IDS.shape
    mlp = getattr(block, "fc1" if name == "opt" else "mlp")
    [mlp_in] = model.activations_at([f"{LAYER}.mlp_in"], IDS)
    assert torch.equal(mlp_in, by_hand(model, input_of(mlp)).view(*IDS.shape, D))


@pytest.mark.parametrize("family", CAUSAL)
def test_a_module_and_its_site_are_one(family, tmp_path):
    """In both directions, so that what was given by a module's name is exported by the site's."""
    folder = str(save_model(tmp_path / family, family))
    model = LanguageModel.load(folder, layer=1)
    for site in SITES:
        if family == "gpt_neox" and site == "resid_mid":
            continue
        hook = model.hook_at(f"1.{site}")
        again = LanguageModel.load(folder, hookpoint=hook.name)
        assert again.hookpoint == hook.name and again.describe()["site"] == f"1.{site}"
        assert (again.d_model, again.d_target) == (32, 0)


def test_names():
    assert str(Site.of("blocks.6.attn.hook_z")) == "6.attn_z" == str(Site.of("6.attn_z"))
    lens = {site: Site(3, site).lens for site in SITES}
    assert all(Site.of(name) == Site(3, site) for site, name in lens.items())
    for name in (
        "9" * 5000 + ".attn_z",
        "blocks.3.hook_mlp_in",
        "x.3.attn_z",
        "3.attn",
        "blocks.x.hook_resid_pre",
        "",
        None,
    ):
        assert Site.of(name) is None


@pytest.mark.parametrize(
    ("name", "hookpoint", "words"),
    [
        ("gpt_neox", "1.resid_mid", "no resid_mid that can be found: no module reads resid_pre"),
        (
            "bert",
            "1.mlp_out",
            "1.resid_pre, 1.attn_z, 1.resid_post, and its modules attention, inte",
        ),
        ("mamba", "1.attn_z", "has no attn_z .*: expected a module self_attn, attn, "),
        ("llama", "3.attn_z", "has 3 blocks, so expected 0 to 2"),
        (
            "llama",
            "blocks.1.hook_mlp_in",
            "receives is 1.mlp_in, and before the norm is 1.resid_mid",
        ),
        ("llama", "blocks.1.ln2.hook_normalized", "the MLP receives is 1.mlp_in"),
        (
            "llama",
            "blocks.1.attn.hook_q",
            "has no such module; .*block N has N.resid_pre, N.attn_z",
        ),
        ("llama", "model.layers.1.mlp.up:input", "close are model.layers.1.mlp"),
        ("llama", "model:input", r"expected an input \[b, t, d\]"),
        ("albert", "1.resid_pre", "no list of blocks found"),
    ],
)
def test_what_is_refused(name, hookpoint, words, tmp_path):
    with pytest.raises(InputError, match=words):
        load(name, tmp_path, hookpoint)


@pytest.mark.parametrize("scale", ["residual_multiplier", "post-norm"])
def test_a_block_whose_parts_do_not_add_up_has_no_attn_out(scale):
    model = tiny("1.resid_post")
    block = model.model.get_submodule("model.layers.1")
    if scale == "post-norm":
        block.register_forward_hook(lambda _m, _i, out: torch.nn.functional.layer_norm(out, (32,)))
    else:
        block.register_forward_hook(lambda _m, _i, out: 0.9 * out)
    for site in ("attn_out", "mlp_out", "resid_mid"):
        with pytest.raises(InputError, match=f"has no {site} that can be found: no outputs of"):
            model.hook_at(f"1.{site}")


def test_a_module_with_a_sites_name_is_that_module():
    model = tiny("1.resid_post")
    own = torch.nn.Module()
    own.attn_z = torch.nn.Linear(2, 2)
    model.model.add_module("1", own)
    assert model.hook_at("1.attn_z").module is own.attn_z
    assert site_of(model.model, model.hook_at("1.attn_z"), lambda: None) is None


# Inputs


def test_an_input_that_is_given_by_name():
    """Llama gives `hidden_states=` to its attention."""
    model = tiny("model.layers.1.self_attn:input")
    norm = model.model.get_submodule("model.layers.1.input_layernorm")
    expected = by_hand(model, lambda keep: norm.register_forward_hook(lambda _m, _i, y: keep(y)))
    assert torch.equal(model.activations(IDS), expected)
    zeroed = losses_with(model, lambda x, y: torch.zeros_like(y))
    with norm.register_forward_hook(lambda _m, _i, y: torch.zeros_like(y)):
        assert torch.equal(zeroed, model.token_losses(IDS))


def test_the_input_of_a_projection_is_replaced():
    model = tiny("model.layers.1.self_attn.o_proj:input")
    clean = model.token_losses(IDS)
    assert torch.equal(losses_with(model, lambda x, y: y), clean)
    doubled = losses_with(model, lambda x, y: 2 * y)
    projection = model.hook.module
    with projection.register_forward_pre_hook(lambda _m, args: (2 * args[0],)):
        assert torch.equal(doubled, model.token_losses(IDS))
    assert (doubled - clean).abs().max() > 1e-3


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("site", SITES)
def test_nothing_changes_where_nothing_is_replaced(site, family):
    if family == "gpt_neox" and site == "resid_mid":
        return
    model = tiny(f"1.{site}", family)
    clean = model.token_losses(IDS)
    assert torch.equal(losses_with(model, lambda x, y: y), clean)
    assert not torch.equal(losses_with(model, lambda x, y: y + 1), clean)


def test_the_stream_in_the_middle_of_a_block_is_replaced_for_all_that_follows():
    """Not only for the norm that reads it: the sum goes on beside the MLP."""
    model = tiny("1.resid_mid")
    block = model.model.get_submodule("model.layers.1")
    new = torch.randn(*IDS.shape, 32, generator=torch.Generator().manual_seed(1))

    def read(keep):
        return block.register_forward_hook(lambda _m, _i, out: keep(out))

    with spliced(model, lambda x, y: new.flatten(0, 1), torch.ones(IDS.shape, dtype=torch.bool)):
        after = by_hand(model, read)
    expected = new + block.mlp(block.post_attention_layernorm(new))
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("hookpoint", ["2.resid_pre", "2.attn_z", "2.resid_mid", "2.mlp_in"])
def test_blocks_before_an_input_run_once(hookpoint):
    model, ran = tiny(hookpoint), []
    passes = ForwardPasses(model, IDS)
    assert len(passes.skipped) == 2 and passes.resumes

    def make(x, y):
        return 0.5 * y

    mask = torch.ones(IDS.shape, dtype=torch.bool)
    with spliced(model, make, mask):
        expected = model.last_states(IDS).output[0]
    model.model.get_submodule("model.layers.0.mlp").register_forward_hook(lambda *_: ran.append(0))
    assert torch.equal(passes.spliced(make, mask).output[0], expected) and not ran


def test_latents_of_attention_z_are_clamped():
    model = tiny("1.attn_z", "gpt2")
    sae = SAE(SAEConfig(d_model=32, encoder="dense", dict_size=16, k=2)).eval()
    projection = model.hook.module
    added = 3.0 * sae.W_dec[5].detach()
    with torch.no_grad():
        sae.b_enc[5] = -100.0  # it never fires by itself
        with intervene(model, sae, [clamp(5, 3.0)]):
            edited = model.model(input_ids=IDS).logits

        def add(_module, args):
            tokens = torch.ones_like(args[0])
            tokens[:, 0] = 0  # the first position is left as it is
            return (args[0] + tokens * added,)

        with projection.register_forward_pre_hook(add):
            expected = model.model(input_ids=IDS).logits
    torch.testing.assert_close(edited, expected, rtol=1e-4, atol=1e-4)


def test_a_transcoder_of_an_mlp():
    both = tiny("1.mlp_in", target_hookpoint="blocks.1.hook_mlp_out")
    described = both.describe()
    assert (described["site"], described["target_site"]) == ("1.mlp_in", "1.mlp_out")
    assert (described["hookpoint"], both.target_hookpoint) == (
        "model.layers.1.mlp:input",
        "model.layers.1.mlp",
    )
    mlp = both.target.module
    clean = both.token_losses(IDS)
    same = losses_with(both, lambda x, y: mlp.forward(x))
    torch.testing.assert_close(same, clean)
    with pytest.raises(InputError, match="runs before 'model.layers.1.mlp'"):
        tiny("1.mlp_out", target_hookpoint="1.mlp_in")
    with pytest.raises(InputError, match="is the hookpoint 'model.layers.1'"):
        tiny("model.layers.1", target_hookpoint="1.resid_post")


def test_the_input_of_a_module_does_not_depend_on_its_weights():
    """A checkpoint without a head gives what the head would read."""
    model = FAMILIES["llama"]()
    given = {"absent": ("lm_head.weight",), "tokenizer": make_tokenizer("llama")}
    read = LanguageModel(model, hookpoint="lm_head:input", **given)
    with torch.no_grad():
        expected = model.model(input_ids=IDS).last_hidden_state
    assert torch.equal(read.activations(IDS), expected)
    with pytest.raises(InputError, match="lack 1 weights that 'lm_head' depends on"):
        LanguageModel(model, hookpoint="lm_head", **given)


# Rows of tokens


def test_rows_of_all_tokens_are_read_as_positions(tmp_path):
    """OPT gives its MLP [b t, d]."""
    model = load("opt", tmp_path, "model.decoder.layers.1.fc1:input")
    assert model.flattened and model.d_model == D
    rows = by_hand(model, input_of(model.hook.module))
    assert rows.shape == (IDS.numel(), D)
    assert torch.equal(model.activations(IDS), rows.view(*IDS.shape, D))
    clean = model.token_losses(IDS)
    assert torch.equal(losses_with(model, lambda x, y: y), clean)
    new = torch.arange(IDS.numel())[:, None] * torch.ones(D) / 10
    replaced = losses_with(model, lambda x, y: new)
    with model.hook.module.register_forward_pre_hook(lambda _m, _args: (new,)):
        assert torch.equal(replaced, model.token_losses(IDS))


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("qwen3_moe", "mlp.experts"),
        pytest.param("mixtral", "mlp.experts", marks=pytest.mark.long),
        pytest.param("llama4_text", "feed_forward", marks=pytest.mark.long),
        pytest.param("gpt_oss", "mlp.experts", marks=pytest.mark.long),
    ],
)
def test_experts_are_read_and_replaced(name, inside, tmp_path):
    model = load(name, tmp_path, f"model.layers.{LAYER}.{inside}")
    experts, clean = model.hook.module, model.token_losses(IDS)

    def after(keep):
        return experts.register_forward_hook(
            lambda _m, _i, out: keep(out[0] if isinstance(out, tuple) else out)
        )

    rows = by_hand(model, after)
    assert rows.shape == (IDS.numel(), D)
    assert torch.equal(model.activations(IDS), rows.view(*IDS.shape, D))
    assert torch.equal(losses_with(model, lambda x, y: y), clean)
    assert not torch.equal(losses_with(model, lambda x, y: 0 * y), clean)


@pytest.mark.parametrize("order", ["first tokens of all texts", "sorted"])
def test_rows_in_another_order_are_refused(order):
    model = tiny("model.layers.1").model

    def mixed(_module, _inputs, out):
        if order == "sorted":  # as of experts
            rows = out.flatten(0, 1)
            return rows[rows[:, 0].argsort()]
        return out.transpose(0, 1).flatten(0, 1)

    model.model.layers[1].mlp.register_forward_hook(mixed)
    message = "not the tokens of one text after those|another token at position 2"
    with pytest.raises(InputError, match=message):
        LanguageModel(model, make_tokenizer("llama"), "model.layers.1.mlp")


def test_rows_of_some_tokens_are_refused():
    model = tiny("model.layers.1").model
    model.model.layers[1].mlp.register_forward_hook(lambda _m, _i, out: out.flatten(0, 1)[1:])
    with pytest.raises(InputError, match=r"expected an output \[b, t, d\].* got \[9, 32\]"):
        LanguageModel(model, make_tokenizer("llama"), "model.layers.1.mlp")


# Commands


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", every(["llama", "gpt2", "gpt_neox", "gemma2", "opt", "falcon"]))
def test_a_plan_knows_the_widths_without_weights(name, tmp_path):
    folder, _ = made(name, tmp_path / name)
    loaded = LanguageModel.load(str(folder), layer=LAYER)
    for site in SITES:
        if name in PARALLEL and site == "resid_mid":
            with pytest.raises(InputError, match="attention and MLP run in parallel"):
                outline(DataConfig(model=str(folder), hookpoint=f"{LAYER}.{site}"))
            continue
        counted = outline(DataConfig(model=str(folder), hookpoint=f"{LAYER}.{site}"))
        [x] = loaded.activations_at([f"{LAYER}.{site}"], IDS)
        assert counted.d_model == x.shape[2] and counted.flops_per_token > 0
        name_of_module = loaded.hook_at(f"{LAYER}.{site}").name
        again = outline(DataConfig(model=str(folder), hookpoint=name_of_module))
        assert again.d_model == x.shape[2]
    with pytest.raises(InputError, match="has no such module"):
        outline(DataConfig(model=str(folder), hookpoint="1.mlp_z"))


def test_attention_may_be_wider_than_the_stream(tmp_path):
    """As in Gemma and Qwen 3, whose heads together are wider than d."""
    settings = MODELS["llama"][1] | {"head_dim": 24}
    MODELS["wide"] = "LlamaForCausalLM", settings
    try:
        folder, _ = made("wide", tmp_path / "wide")
    finally:
        del MODELS["wide"]
    data = DataConfig(model=str(folder), hookpoint="1.attn_z", target_hookpoint="1.attn_out")
    counted, model = outline(data), LanguageModel.of(data, "cpu")
    assert (counted.d_model, counted.d_target) == (model.d_model, model.d_target) == (48, D)


SMALL = ["--dict-size", "64", "--k", "4", "--batch-size", "256", "--tokens", "2048"]
SMALL += ["--heldout-tokens", "2048", "--buffer-tokens", "2048", "--context-length", "128"]


def test_a_run_at_a_site_and_what_becomes_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*SMALL, "--hookpoint", "1.attn_z"]) == 0
    [run] = (tmp_path / "runs").iterdir()
    sae = kronsae.load(run)
    data = sae.metadata["data"]
    where = "gpt_neox.layers.1.attention.dense:input"
    assert (data["hookpoint"], data["site"]) == (where, "1.attn_z")
    assert (
        json.loads((run / "config.json").read_text())["config"]["data"]["hookpoint"] == "1.attn_z"
    )
    loaded = load_sae(str(run), {})
    text = open_heldout(loaded, "cpu")
    assert text.model.hookpoint == where and text.facts["which"] == "the run's own held-out text"
    assert main(["--resume", str(run)]) == 0
    folder = write(sae, tmp_path / "lens")
    config = json.loads((folder / "cfg.json").read_text())
    assert config["metadata"]["hook_name"] == "blocks.1.attn.hook_z"
    assert config["metadata"]["hf_hook_name"] == where
    assert config["reshape_activations"] == "hook_z"
    assert Origin.of(kronsae.load(folder).metadata).site == Site(1, "attn_z")


def test_a_suite_of_sites(tmp_path):
    """Patterns match inputs and sites; a layer of the suite is found by its site."""
    out = tmp_path / "suite"
    flags = ["--hookpoint", "[12].attn_z", "gpt_neox.layers.3.mlp:input", "--out", str(out)]
    assert main([*SMALL, *flags, "--no-final-evaluation"]) == 0
    sites = [kronsae.load(out, layer=layer).metadata["data"]["site"] for layer in (1, 2, 3)]
    assert sites == ["1.attn_z", "2.attn_z", "3.mlp_in"]
    data = DataConfig()
    assert matches(["*.mlp:input"], data) == [f"gpt_neox.layers.{n}.mlp:input" for n in range(4)]
    assert matches(["blocks.*.hook_mlp_out"], data)[1] == "blocks.1.hook_mlp_out"
    assert matches(["*.layers.*.mlp"], data) == [f"gpt_neox.layers.{n}.mlp" for n in range(4)]
    with pytest.raises(InputError, match="'[*].mlp_z' matches none"):
        matches(["*.mlp_z"], data)


def test_a_run_of_an_input_has_a_folder_without_a_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*SMALL, "--hookpoint", "gpt_neox.layers.1.mlp:input"]) == 0
    [run] = (tmp_path / "runs").iterdir()
    assert "gpt_neox.layers.1.mlp-input" in run.name
    assert kronsae.load(run).metadata["data"]["site"] == "1.mlp_in"


@pytest.mark.parametrize(
    ("data", "hook_name", "reshape"),
    [
        (
            {"hookpoint": "model.layers.3", "site": "3.resid_post"},
            "blocks.3.hook_resid_post",
            "none",
        ),
        ({"hookpoint": "model.layers.3"}, "blocks.3.hook_resid_post", "none"),
        ({"hookpoint": "x.3.y:input", "site": "3.attn_z"}, "blocks.3.attn.hook_z", "hook_z"),
        ({"hookpoint": "3.resid_mid", "site": "3.resid_mid"}, "blocks.3.hook_resid_mid", "none"),
        ({"hookpoint": "x.3.mlp:input", "site": "3.mlp_in"}, "blocks.3.mlp.hook_in", "none"),
        ({"hookpoint": "blocks.3.hook_mlp_out"}, "blocks.3.hook_mlp_out", "none"),
        ({"hookpoint": "x.norm"}, "x.norm", "none"),
    ],
)
def test_what_saelens_is_told(data, hook_name, reshape, tmp_path):
    sae = SAE(SAEConfig(d_model=8, encoder="dense", dict_size=16, k=2))
    sae.metadata = {"data": {"name": "gpt2", **data}}
    facts = metadata_of(sae)
    assert (facts["hook_name"], facts["hf_hook_name"]) == (hook_name, data["hookpoint"])
    config = json.loads((write(sae, tmp_path / "out") / "cfg.json").read_text())
    assert config["reshape_activations"] == reshape
    layer = 3 if hook_name.endswith("resid_post") else None
    assert Origin.of(sae.metadata).layer == layer
    back = Origin.of(kronsae.load(tmp_path / "out").metadata)
    assert (back.hookpoint, back.layer) == (data["hookpoint"], layer)


def test_an_sae_of_saelens_is_read_where_its_file_says(tmp_path):
    folder = str(save_model(tmp_path / "model", "gpt2"))
    sae = SAE(SAEConfig(d_model=32, encoder="dense", dict_size=16, k=2))
    sae.metadata = {"data": {"name": folder, "hookpoint": "blocks.1.attn.hook_z"}}
    write(sae, tmp_path / "sae")
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    del config["metadata"]["hf_hook_name"], config["metadata"]["kronsae"]  # as it writes itself
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(config))
    loaded = load_sae(str(tmp_path / "sae"), {})
    model = LanguageModel.of(loaded.data, "cpu")
    assert model.hookpoint == "transformer.h.1.attn.c_proj:input"


def test_a_transcoder_tells_saelens_both_ends():
    sae = SAE(SAEConfig(d_model=8, d_target=8, encoder="dense", dict_size=16, k=2))
    sae.metadata = {
        "data": {
            **{"hookpoint": "model.layers.3:input", "site": "3.resid_pre"},
            **{"target_hookpoint": "model.layers.3.mlp", "target_site": "3.mlp_out"},
        }
    }
    facts = metadata_of(sae)
    assert facts["hook_name"] == "blocks.3.hook_resid_pre"
    assert facts["hook_name_out"] == "blocks.3.hook_mlp_out"
    assert facts["hf_hook_name_out"] == "model.layers.3.mlp"


def test_a_cache_of_sites(tmp_path, monkeypatch):
    """A site is chosen by any of its names, and a run from the cache knows what it read."""
    names = ("2.attn_z", "blocks.1.hook_mlp_out", "gpt_neox.layers.1.mlp:input")
    folder = tmp_path / "cache"
    index = cached.make(monkeypatch, folder, layers=(1,), hookpoints=names)
    assert [(point.name, point.site) for point in index.hookpoints] == [
        ("gpt_neox.layers.1", "1.resid_post"),
        ("gpt_neox.layers.2.attention.dense:input", "2.attn_z"),
        ("gpt_neox.layers.1.mlp", "1.mlp_out"),
        ("gpt_neox.layers.1.mlp:input", "1.mlp_in"),
    ]
    given = ("blocks.2.attn.hook_z", "gpt_neox.layers.1.mlp", "1.mlp_in", "1.resid_post")
    assert [index.number_of(None, name) for name in given] == [1, 2, 3, 0]
    with pytest.raises(InputError, match="hookpoint '2.mlp_in': the cache has"):
        index.number_of(None, "2.mlp_in")
    cache = CacheActivations(
        folder, hookpoint="1.mlp_in", target_hookpoint="1.mlp_out", batch_size=8
    )
    assert cache.describe()["sites"] == ["1.mlp_in", "1.mlp_out"]
    model = LanguageModel.load("embedded", hookpoint="1.mlp_in", target_hookpoint="1.mlp_out")
    described = model.describe()
    assert described.items() <= (cache.language_model.describe() | {"dtype": "float32"}).items()
    rows = model.activations(cache.heldout_contexts())[cache.heldout_mask()]
    assert torch.equal(cache.heldout_activations(), rows)
    flags = ["--activations", str(folder), "--hookpoint", "2.attn_z", "--tokens", "512"]
    flags += ["--dict-size", "64", "--k", "4", "--batch-size", "64", "--out", str(tmp_path / "run")]
    assert main(flags) == 0
    sae = kronsae.load(tmp_path / "run")
    assert metadata_of(sae)["hook_name"] == "blocks.2.attn.hook_z"
    with pytest.raises(InputError, match="'gpt_neox.layers.1.mlp' is named twice"):
        again = ("1.mlp_out", "blocks.1.hook_mlp_out")
        cached.make(monkeypatch, tmp_path / "twice", layers=(), hookpoints=again)
