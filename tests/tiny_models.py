"""Tiny models with random weights and their tokenizer, saved to folders, for tests."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

WORDS = [f"w{i}" for i in range(90)]
"""The words that the tokenizer knows; a word is a token."""

WIDTH, LAYERS, POSITIONS = 32, 3, 128

_COMMON = {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": POSITIONS,
}
_GROUPED = {"num_key_value_heads": 1, "head_dim": WIDTH // 2}
FAMILIES = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_COMMON, **_SIZES, num_key_value_heads=1)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**_COMMON, **_SIZES, **_GROUPED)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_COMMON, **_SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(**_COMMON, n_embd=WIDTH, n_layer=LAYERS, n_head=2, n_positions=POSITIONS)
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_COMMON, **_SIZES, **_GROUPED)),
    "bert": lambda: BertForMaskedLM(BertConfig(**_COMMON, **_SIZES)),
}
CAUSAL = [name for name in FAMILIES if name != "bert"]
BLOCKS = {
    "qwen2": "model.layers",
    "gemma2": "model.layers",
    "gpt_neox": "gpt_neox.layers",
    "gpt2": "transformer.h",
    "llama": "model.layers",
    "bert": "encoder.layer",
}


def make_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """One token a word; begins and ends a text as the family's own tokenizers do."""
    special = ["<pad>", "<s>", "</s>", "<unk>", "[CLS]", "[SEP]"]
    vocabulary = {token: i for i, token in enumerate([*special, *WORDS, "a"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    roles = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    if family in ("llama", "gemma2"):
        roles["bos_token"] = "<s>"
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    elif family == "bert":
        roles = {"pad_token": "<pad>", "unk_token": "<unk>"}
        roles |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 4), ("[SEP]", 5)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


def save_model(folder: Path, family: str) -> Path:
    """A new model of the family and its tokenizer, in `folder`."""
    torch.manual_seed(0)
    FAMILIES[family]().save_pretrained(folder)
    make_tokenizer(family).save_pretrained(folder)
    return folder
