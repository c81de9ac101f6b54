"""Tiny random models of many architectures: what is read equals what transformers itself gives.

`EXPECTED` is also the table of docs/models.md.
"""

import json
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import make_tokenizer

from kronsae.config import DataConfig
from kronsae.data import LanguageModel
from kronsae.errors import InputError, Notice
from kronsae.plan.outline import outline

V, D, L, LAYER = 100, 32, 3, 1
SIZES = {
    "hidden_size": D,
    "intermediate_size": 2 * D,
    "num_hidden_layers": L,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}
GROUPED = {**SIZES, "num_key_value_heads": 1}
HEADS = {**GROUPED, "head_dim": D // 2}
GPT = {"n_embd": D, "n_layer": L, "n_head": 2, "n_positions": 128}
MAMBA = {"hidden_size": D, "num_hidden_layers": L, "state_size": 8}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": D}
SSM = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
HALVES = {
    **{"d_model": D, "encoder_layers": L, "decoder_layers": L, "max_position_embeddings": 128},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 2},
    **{"encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
}
IMAGE = {
    **{"hidden_size": 16, "intermediate_size": D, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
}
ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}

MODELS = {
    "albert": ("AlbertForMaskedLM", {**SIZES, "embedding_size": 16}),
    "bart": ("BartForConditionalGeneration", HALVES),
    "bert": ("BertForMaskedLM", SIZES),
    "bloom": ("BloomForCausalLM", {"hidden_size": D, "n_layer": L, "n_head": 2}),
    "codegen": ("CodeGenForCausalLM", {**GPT, "n_head": 4, "rotary_dim": 4}),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {
            **{**SIZES, "num_key_value_heads": 2, "moe_intermediate_size": 16, "kv_lora_rank": 8},
            **{"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
            **{"q_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8},
            "first_k_dense_replace": 1,
        },
    ),
    "esm": ("EsmForMaskedLM", {**SIZES, "mask_token_id": 3, "position_embedding_type": "rotary"}),
    "falcon": (
        "FalconForCausalLM",
        {"hidden_size": D, "num_hidden_layers": L, "num_attention_heads": 2},
    ),
    "falcon_h1": (
        "FalconH1ForCausalLM",
        {**GROUPED, **SSM, "mamba_d_ssm": 64, "mamba_chunk_size": 16},
    ),
    "falcon_mamba": ("FalconMambaForCausalLM", MAMBA),
    "gemma2": ("Gemma2ForCausalLM", HEADS),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {**HEADS, "vocab_size": V},
            "vision_config": IMAGE,
            **{"mm_tokens_per_image": 4, "image_token_index": 99, "boi_token_index": 97},
            "eoi_token_index": 98,
        },
    ),
    "gemma3_text": ("Gemma3ForCausalLM", HEADS),
    "gemma3n_text": (
        "Gemma3nForCausalLM",
        {
            **{**HEADS, "num_hidden_layers": 4, "intermediate_size": [64] * 4, "laurel_rank": 4},
            **{"vocab_size_per_layer_input": V, "hidden_size_per_layer_input": 8},
            **{"num_kv_shared_layers": 0, "altup_num_inputs": 2},
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
            "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
    "gpt2": ("GPT2LMHeadModel", GPT),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", GPT),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {
            **{"hidden_size": D, "num_layers": L, "num_heads": 2, "max_position_embeddings": 128},
            "attention_types": [[["global"], L]],
        },
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", SIZES),
    "gpt_oss": ("GptOssForCausalLM", {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gptj": ("GPTJForCausalLM", {**GPT, "rotary_dim": 8}),
    "jamba": (
        "JambaForCausalLM",
        {
            **{**GROUPED, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
            **{"expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 2},
            **{"num_experts_per_tok": 1, "mamba_d_state": 8, "mamba_dt_rank": 4},
            "use_mamba_kernels": False,
        },
    ),
    "lfm2": ("Lfm2ForCausalLM", {**GROUPED, "layer_types": ["conv", "full_attention", "conv"]}),
    "llama": ("LlamaForCausalLM", HEADS),
    "llama4_text": (
        "Llama4ForCausalLM",
        {**HEADS, "intermediate_size_mlp": 64, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        {
            "text_config": {**HEADS, "model_type": "llama", "vocab_size": V},
            "vision_config": {**IMAGE, "model_type": "clip_vision_model", "projection_dim": 16},
            "image_token_index": 99,
        },
    ),
    "mamba": ("MambaForCausalLM", MAMBA),
    "mamba2": (
        "Mamba2ForCausalLM",
        {**MAMBA, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 16},
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        {
            "text_config": {**HEADS, "model_type": "mistral", "vocab_size": V},
            "vision_config": {**IMAGE, "model_type": "pixtral", "head_dim": 8},
            "image_token_index": 99,
        },
    ),
    "mixtral": ("MixtralForCausalLM", {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "modernbert": ("ModernBertForMaskedLM", {**SIZES, "cls_token_id": 4, "sep_token_id": 5}),
    "mpt": ("MptForCausalLM", {"d_model": D, "n_layers": L, "n_heads": 2, "max_seq_len": 128}),
    "olmo2": ("Olmo2ForCausalLM", GROUPED),
    "openai-gpt": ("OpenAIGPTLMHeadModel", GPT),
    "opt": ("OPTForCausalLM", {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": D}),
    "phi3": ("Phi3ForCausalLM", GROUPED),
    "qwen2": ("Qwen2ForCausalLM", GROUPED),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": {**GROUPED, "vocab_size": V, "rope_parameters": ROPE},
            "vision_config": {"depth": 2, "embed_dim": 16, "hidden_size": D, "num_heads": 2},
            **{"image_token_id": 96, "video_token_id": 97, "vision_start_token_id": 98},
            "vision_end_token_id": 99,
        },
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**HEADS, **MOE}),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        {
            **{**HEADS, **MOE, "shared_expert_intermediate_size": D},
            **{"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16},
            "linear_value_head_dim": 16,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
    ),
    "recurrent_gemma": (
        "RecurrentGemmaForCausalLM",
        {**HEADS, "lru_width": D, "attention_window_size": 64},
    ),
    "roberta": ("RobertaForMaskedLM", {**SIZES, "max_position_embeddings": 130}),
    "rwkv": (
        "RwkvForCausalLM",
        {"hidden_size": D, "attention_hidden_size": D, "num_hidden_layers": L},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {
            **{"d_model": D, "d_ff": 64, "d_kv": 16, "num_layers": L, "num_heads": 2},
            "decoder_start_token_id": 0,
        },
    ),
    "marian": ("MarianMTModel", HALVES | {"decoder_vocab_size": V}),
    "mbart": ("MBartForConditionalGeneration", HALVES),
    "pegasus": ("PegasusForConditionalGeneration", HALVES),
    "prophetnet": (
        "ProphetNetForConditionalGeneration",
        {
            **{"hidden_size": D, "num_encoder_layers": L, "num_decoder_layers": L},
            **{"num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2},
            **{"encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
        },
    ),
    "vit": ("ViTModel", {**IMAGE, "num_hidden_layers": L}),
    "clip": (
        "CLIPModel",
        {
            "text_config": {**SIZES, "vocab_size": V, "max_position_embeddings": 77},
            "vision_config": IMAGE,
            "projection_dim": 16,
        },
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        {
            **{k: v for k, v in HALVES.items() if k != "max_position_embeddings"},
            **{"max_source_positions": 50, "max_target_positions": 128, "suppress_tokens": None},
            "begin_suppress_tokens": None,
        },
    ),
    "xlnet": ("XLNetLMHeadModel", {"d_model": D, "n_layer": L, "n_head": 2, "d_inner": 64}),
}
"""Class in transformers and settings of its configuration, by model_type."""

EXACT, NO_LOSS = "exact, with cross-entropy", "exact, without cross-entropy"
MASKED = f"{NO_LOSS} (it predicts masked tokens)"
ENCODER = f"{NO_LOSS} (the encoder; the decoder by --hookpoint)"
NO_TEXT = "refused: it does not run on text alone"
SPECIAL: dict[str, str] = {
    **dict.fromkeys(["bert", "esm", "modernbert", "roberta"], MASKED),
    **dict.fromkeys(["bart", "marian", "mbart", "pegasus", "prophetnet", "t5"], ENCODER),
    "albert": "refused: one block runs for all layers, so there is no list of blocks",
    "clip": NO_TEXT,
    "gemma3n_text": "refused: a block gives several streams, not an output [b, t, d]",
    "vit": NO_TEXT,
    "whisper": f"{EXACT} (the decoder alone)",
    "xlnet": "refused: a block gives [t, b, d], not an output [b, t, d]",
}
MESSAGES = {
    "albert": "no list of 3 blocks found",
    "gemma3n_text": r"expected an output \[b, t, d\]",
    "xlnet": r"expected an output \[b, t, d\]",
}
"""What the error says, where it is not that a model does not run on text alone."""
FROM_FIRST = ("falcon_mamba", "mamba", "mamba2", "rwkv")
"""Their hidden_states of transformers begin after the first block, not before it."""
EXPECTED = {name: SPECIAL.get(name, EXACT) for name in sorted(MODELS)}

FEW = ("bart", "llama", "llava", "opt", "roberta", "vit")
"""Those of the default set; the others are `long`."""


def made(name: str, folder: Path) -> tuple[Path, torch.nn.Module]:
    """A random model in a folder with its tokenizer, and the model as transformers made it."""
    class_name, settings = MODELS[name]
    cls = getattr(transformers, class_name)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    nested = "text_config" in settings
    common = {**special, **({} if nested else {"vocab_size": V})}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = cls(cls.config_class(**{**common, **settings})).eval()
    unsaved = cls._keys_to_ignore_on_save or ()  # they are computed
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim > 1 and parameter_name not in unsaved:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    make_tokenizer("gpt2").save_pretrained(folder)
    return folder, model


IDS = torch.randint(6, 90, (3, 12), generator=torch.Generator().manual_seed(0))


def every(names):
    return [pytest.param(n, marks=() if n in FEW else pytest.mark.long) for n in names]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", every(MODELS))
def test_what_is_read_is_what_transformers_gives(name, tmp_path):
    folder, reference = made(name, tmp_path / "model")
    if EXPECTED[name].startswith("refused"):
        message = MESSAGES.get(name, "does not run on text alone")
        with pytest.raises(InputError, match=message):
            LanguageModel.load(str(folder), layer=LAYER)
        return
    model = LanguageModel.load(str(folder), layer=LAYER)
    if name == "whisper":
        reference = transformers.WhisperForCausalLM.from_pretrained(folder)
    halves = {"decoder_input_ids": IDS} if model.is_encoder_decoder else {}
    with torch.no_grad():
        out = reference(
            input_ids=IDS,
            attention_mask=torch.ones_like(IDS),
            output_hidden_states=True,
            **halves,
        )
    states = out.encoder_hidden_states if halves else out.hidden_states
    hidden = states[LAYER if name in FROM_FIRST else LAYER + 1]
    torch.testing.assert_close(model.activations(IDS), hidden, rtol=1e-4, atol=1e-4)
    has_loss = EXPECTED[name].startswith(EXACT)
    assert model.has_cross_entropy is has_loss, model.no_cross_entropy
    if not model.has_cross_entropy:
        with pytest.raises(InputError, match="there is no cross-entropy: .* (predicts|is an enc)"):
            model.token_losses(IDS)
        return
    expected = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="none"
    )
    losses = model.token_losses(IDS).flatten()
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["bart", pytest.param("t5", marks=pytest.mark.long)])
def test_a_decoder_reads_the_text_at_its_own_positions(name, tmp_path):
    folder, reference = made(name, tmp_path / "model")
    decoder = {"bart": "decoder.layers.1", "t5": "decoder.block.1"}[name]
    model = LanguageModel.load(str(folder), hookpoint=decoder)
    with torch.no_grad():
        out = reference(input_ids=IDS, decoder_input_ids=IDS, output_hidden_states=True)
    expected = out.decoder_hidden_states[2]
    torch.testing.assert_close(model.activations(IDS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("by", [1, -1])
def test_a_module_one_position_off_is_refused(by, tmp_path):
    folder, _ = made("llama", tmp_path / "model")
    model = LanguageModel.load(str(folder), layer=LAYER).model
    model.model.layers[1].register_forward_hook(lambda _m, _i, out: out.roll(by, 1))
    message = "another token at position 2 changes its output at positions"
    with pytest.raises(InputError, match=message):
        LanguageModel(model, make_tokenizer("gpt2"), "model.layers.1")


def test_roberta_reads_as_many_positions_as_it_has(tmp_path):
    """Its tokenizer here has no model_max_length."""
    folder, _ = made("roberta", tmp_path / "model")
    model = LanguageModel.load(str(folder), layer=LAYER)
    assert model.max_context == 129  # padding_idx 0
    longest = torch.full((1, model.max_context), 7)
    assert model.activations(longest).shape == (1, 129, D)


RUNS = [name for name, what in EXPECTED.items() if what.startswith("exact") and name != "mpt"]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", every(RUNS))
def test_a_plan_counts_the_operations_of_a_run_without_weights(name, tmp_path):
    """Not of all experts, nor of what a warning would say was counted by its parts."""
    folder, _ = made(name, tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"use_cache": False}))
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        counted = outline(DataConfig(model=str(folder), layer=LAYER))
    assert counted.d_model == D and counted.flops_per_token > 0


def test_the_page_has_this_table():
    page = (Path(__file__).parent.parent / "docs" / "models.md").read_text()
    rows = "\n".join(f"| `{name}` | {what} |" for name, what in EXPECTED.items())
    assert rows in page


def test_a_model_that_sees_what_it_predicts_has_no_cross_entropy(tmp_path):
    folder, _ = made("llama", tmp_path / "model")
    model = LanguageModel.load(str(folder), layer=LAYER).model
    model.lm_head.register_forward_hook(lambda _m, _i, out: out + out.mean(1, keepdim=True))
    read = LanguageModel(model, make_tokenizer("gpt2"), "model.layers.1")
    assert "sees the tokens that it predicts" in read.no_cross_entropy


@pytest.mark.parametrize("by", [1, -1])
def test_a_bidirectional_model_one_position_off_is_refused(by, tmp_path):
    folder, _ = made("bert", tmp_path / "model")
    model = LanguageModel.load(str(folder), layer=LAYER).model

    def shift(_module, _inputs, out):
        out = out.roll(by, 1)
        out[:, 0 if by > 0 else -1] = 0
        return out

    model.embeddings.word_embeddings.register_forward_hook(shift)
    with pytest.raises(InputError, match="another token at position 2 changes its output"):
        LanguageModel(model, make_tokenizer("gpt2"), "encoder.layer.1")


@pytest.mark.parametrize("name", ["opt", "llama4_text", "whisper"])
def test_the_head_runs_apart_from_the_part_before_it(name, tmp_path):
    """So that not all logits exist at once."""
    folder, _ = made(name, tmp_path / "model")
    assert LanguageModel.load(str(folder), layer=LAYER)._body is not None


@pytest.mark.parametrize(("name", "longest"), [("whisper", 128), ("mpt", 128), ("gpt2", 128)])
def test_the_longest_context(name, longest, tmp_path):
    folder, _ = made(name, tmp_path / "model")
    assert LanguageModel.load(str(folder), layer=LAYER).max_context == longest


def test_a_model_without_a_number_of_blocks_is_refused(tmp_path):
    config = transformers.ResNetConfig(hidden_sizes=[8], depths=[1])
    transformers.ResNetModel(config).save_pretrained(tmp_path)
    make_tokenizer("gpt2").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="type 'resnet' has no list of blocks"):
        LanguageModel.load(str(tmp_path), layer=0)
