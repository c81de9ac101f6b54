"""Trains the embedded language model: tokenizer first, then a small GPT-NeoX.

    OMP_NUM_THREADS=1 python -m benchmarks.train_language_model --out DIR

The corpus is the running Python's standard library with its tests, without the files that
`kronsae.data.stdlib.is_heldout` names. DIR gets all that `from_pretrained` needs, and
`training.json`, which says what was trained, on what, and how well it does on the held-out files.

Letters: B windows in a batch, T tokens in a window.
"""

import argparse
import json
import math
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from kronsae.data.stdlib import stdlib_documents
from kronsae.system.files import write_json


@dataclass(frozen=True)
class Recipe:
    """Sizes and rates: those of the embedded model."""

    tokens: int = 12_087_296
    """Tokens to train on."""
    seed: int = 0
    """Seed of weights and windows."""
    vocab_size: int = 3072
    context: int = 256
    """T."""
    hidden: int = 256
    """Width of the residual stream."""
    layers: int = 4
    heads: int = 4
    batch: int = 8
    """B."""
    lr: float = 2e-3
    """The highest; it rises linearly over `warmup_tokens`, and falls as a cosine."""
    warmup_tokens: int = 300_000


END_OF_TEXT = "<|endoftext|>"

# A line break takes the indentation that follows it, so that " self" inside a line and "self" at
# its beginning are the only two forms of a word, and one token opens a line at any usual depth.
PRE_TOKENS = "|".join(
    (
        r"(?:[ \t]*\r?\n)+[ \t]*",  # line breaks, blank lines and the next line's indentation
        r" ?[\p{L}\p{M}_]+",  # words; an identifier breaks only at digits
        r" ?\p{N}",  # one digit at a time
        r" ?[^\s\p{L}\p{M}\p{N}_]+",  # operators and brackets
        r"\s+",  # alignment inside a line and whatever else is blank
    )
)


def train_tokenizer(texts: list[str], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; decoding returns the text exactly. Adds no token by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def new_model(recipe: Recipe, vocab_size: int) -> GPTNeoXForCausalLM:
    """A GPT-NeoX with tied embeddings and freshly drawn weights."""
    config = GPTNeoXConfig(
        vocab_size=vocab_size,
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        intermediate_size=4 * recipe.hidden,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return GPTNeoXForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[dict[str, str]]) -> list[np.ndarray]:
    """Each document's token ids [length], end-of-text first."""
    encoded = tokenizer.backend_tokenizer.encode_batch([d["text"] for d in documents])
    return [np.array([tokenizer.bos_token_id, *e.ids], dtype=np.int64) for e in encoded]


def training_windows(
    documents: list[np.ndarray], context: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Windows [T + 1] without end: each epoch shuffles the documents, joins and cuts them.

    Half of the windows get an end-of-text token as their first, as most readers of activations
    put one there, and half do not, as some do not.
    """
    while True:
        stream = np.concatenate([documents[i] for i in rng.permutation(len(documents))])
        first = rng.integers(context)
        starts = np.arange(first, len(stream) - context, context)
        for start in rng.permutation(starts):
            window = stream[start : start + context + 1].copy()
            if rng.random() < 0.5:
                window[0] = documents[0][0]
            yield window


@torch.no_grad()
def heldout_loss(
    model: GPTNeoXForCausalLM, documents: list[np.ndarray], context: int
) -> tuple[float, int]:
    """Mean loss in nats/token and the number of tokens it is over.

    Each document is cut into windows of T + 1 that share one token, so that every token but the
    leading end-of-text is predicted once, from at most T tokens before it in its own document.

    documents: token ids [length], end-of-text first.
    Raises ValueError if no document has a token to predict.
    """
    training, nats, count = model.training, 0.0, 0
    model.eval()
    for ids in documents:
        for start in range(0, len(ids) - 1, context):
            window = torch.from_numpy(ids[start : start + context + 1]).to(model.device)
            logits = model(window[None, :-1]).logits[0].float()
            nats += F.cross_entropy(logits, window[1:], reduction="sum").item()
            count += len(window) - 1
    model.train(training)
    if not count:
        raise ValueError("no tokens to predict: every document is empty")
    return nats / count, count


def train(model: GPTNeoXForCausalLM, documents: list[np.ndarray], recipe: Recipe) -> None:
    """Train on `recipe.tokens` of the documents: AdamW, products in bfloat16."""
    parameters = list(model.parameters())
    decayed, kept = ([p for p in parameters if (p.ndim > 1) is matrix] for matrix in (True, False))
    groups = [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.1)
    windows = training_windows(documents, recipe.context, np.random.default_rng(recipe.seed))
    model.train()
    for tokens in range(0, recipe.tokens, recipe.batch * recipe.context):
        # [B, T + 1]
        batch = torch.from_numpy(np.stack([next(windows) for _ in range(recipe.batch)]))
        warmup = min(1.0, (tokens + batch[:, 1:].numel()) / recipe.warmup_tokens)
        cosine = 0.5 * (1 + math.cos(math.pi * tokens / recipe.tokens))
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * warmup * cosine
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch[:, :-1]).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        print(f"{tokens:,} tokens: {loss.item():.4f} nats/token", flush=True)


def save(
    out: Path, model: GPTNeoXForCausalLM, tokenizer: PreTrainedTokenizerFast, record: dict[str, Any]
) -> None:
    """Write the model in float16, the tokenizer and `training.json` to `out`."""
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    # transformers 5 writes a name of its own here, which transformers 4 does not know.
    settings = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.pop("backend", None)
    write_json(out / "tokenizer_config.json", settings)
    write_json(out / "training.json", record)


def run(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Train and write the model; returns what it wrote to `training.json`."""
    torch.manual_seed(recipe.seed)
    documents, heldout = (stdlib_documents(include_tests=True, heldout=h) for h in (False, True))
    tokenizer = train_tokenizer([d["text"] for d in documents], recipe.vocab_size, recipe.context)
    ids, heldout_ids = encode(tokenizer, documents), encode(tokenizer, heldout)
    model = new_model(recipe, len(tokenizer))
    train(model, ids, recipe)
    # The loss of the weights as they ship: through float16 and back.
    model.half().float()
    loss, heldout_tokens = heldout_loss(model, heldout_ids, recipe.context)
    heldout_bytes = sum(len(d["text"].encode("utf-8")) for d in heldout)
    record = {
        "corpus": "source text of the Python standard library, with tests, without held-out files",
        "corpus_python": platform.python_version(),
        "corpus_files": len(documents),
        "corpus_tokens": sum(map(len, ids)),
        "heldout_files": len(heldout),
        "parameters": sum(p.numel() for p in model.parameters()),
        "options": asdict(recipe),
        "versions": {
            library.__name__: library.__version__ for library in (torch, transformers, tokenizers)
        },
        "heldout_loss_nats_per_token": round(loss, 4),
        "heldout_tokens": heldout_tokens,
        "heldout_bits_per_byte": round(loss * heldout_tokens / math.log(2) / heldout_bytes, 4),
    }
    save(out, model, tokenizer, record)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    print(json.dumps(run(Recipe(), parser.parse_args().out), indent=2))


if __name__ == "__main__":
    main()
