"""Trains the embedded language model: tokenizer first, then a small GPT-NeoX.

    python -m benchmarks.train_language_model --out DIR --minutes 45 --seed 0

The corpus is the running Python's standard library with its tests, without the files that
`kronsae.data.stdlib.is_heldout` names. DIR gets all that `from_pretrained` needs, and
`training.json`, which says what was trained, on what, and how well it does on the held-out files.

Letters: B windows in a batch, T tokens in a window.
"""

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Iterator
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


def new_model(args: argparse.Namespace, vocab_size: int) -> GPTNeoXForCausalLM:
    """A GPT-NeoX with tied embeddings and freshly drawn weights."""
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=vocab_size,
            hidden_size=args.hidden,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            intermediate_size=4 * args.hidden,
            max_position_embeddings=args.context,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


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


def train(model: GPTNeoXForCausalLM, ids: list[np.ndarray], args: argparse.Namespace) -> dict:
    """Train on documents for so many minutes, or tokens; what was done, and the last losses' mean.

    AdamW, the rate warmed up linearly in tokens, times a cosine in the share that is done.
    """
    rng, parameters = np.random.default_rng(args.seed), list(model.parameters())
    decayed = [p for p in parameters if p.ndim > 1]
    kept = {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": args.weight_decay}, kept], betas=(0.9, 0.95)
    )
    windows = training_windows(ids, args.context, rng)
    tokens, steps, mean_loss = 0, 0, 0.0
    began = time.monotonic()
    while True:
        minutes = (time.monotonic() - began) / 60
        done = tokens / args.tokens if args.tokens else minutes / args.minutes
        if done >= 1:
            return {"tokens_seen": tokens, "steps": steps, "train_loss_nats_per_token": mean_loss}
        batch = torch.from_numpy(np.stack([next(windows) for _ in range(args.batch)]))  # [B, T + 1]
        batch = batch.to(args.device)
        tokens, steps = tokens + batch[:, 1:].numel(), steps + 1
        for group in optimizer.param_groups:
            cosine = 0.5 * (1 + math.cos(math.pi * done))
            group["lr"] = args.lr * min(1.0, tokens / args.warmup_tokens) * cosine
        with torch.autocast(model.device.type, torch.bfloat16, enabled=not args.float32):
            logits = model(batch[:, :-1]).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, args.clip)
        optimizer.step()
        mean_loss += (loss.item() - mean_loss) * max(0.01, 1 / steps)
        if steps % 50 == 0:
            print(f"step {steps}, {done:.1%} done: {mean_loss:.4f} nats/token", flush=True)


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


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--tokens", type=int, help="train on so many tokens instead; this can be repeated exactly"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of torch, on a CPU")
    parser.add_argument("--float32", action="store_true", help="no bfloat16 autocast")
    for name, default, text in (
        ("minutes", 45.0, "wall time of the training"),
        ("seed", 0, "of weights and windows"),
        ("vocab-size", 3072, "of the tokenizer"),
        ("context", 256, "tokens"),
        ("hidden", 256, "width of the residual stream"),
        ("layers", 4, "blocks"),
        ("heads", 4, "of attention"),
        ("batch", 16, "windows in a step"),
        ("lr", 3e-3, "peak learning rate"),
        ("weight-decay", 0.1, "of the matrices"),
        ("warmup-tokens", 500_000, "until the peak"),
        ("clip", 1.0, "largest norm of the gradient"),
    ):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train and write the model; returns what it wrote to `training.json`."""
    args = parse_arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    began = time.monotonic()
    documents, heldout = (stdlib_documents(include_tests=True, heldout=h) for h in (False, True))
    tokenizer = train_tokenizer([d["text"] for d in documents], args.vocab_size, args.context)
    ids, heldout_ids = encode(tokenizer, documents), encode(tokenizer, heldout)
    model = new_model(args, len(tokenizer)).to(args.device).train()
    trained = train(model, ids, args)
    # The loss of the weights as they ship: through float16 and back.
    model.half().float()
    loss, heldout_tokens = heldout_loss(model, heldout_ids, args.context)
    heldout_bytes = sum(len(d["text"].encode("utf-8")) for d in heldout)
    record = {
        "corpus": "source text of the Python standard library, with tests, without held-out files",
        "corpus_python": platform.python_version(),
        "corpus_files": len(documents),
        "corpus_tokens": sum(map(len, ids)),
        "heldout_rule": "kronsae.data.stdlib.is_heldout",
        "heldout_files": len(heldout),
        "heldout_bytes": heldout_bytes,
        "parameters": sum(p.numel() for p in model.parameters()),
        "options": {key: value for key, value in vars(args).items() if key != "out"},
        "versions": {
            library.__name__: library.__version__ for library in (torch, transformers, tokenizers)
        },
        "command": "python -m benchmarks.train_language_model "
        + " ".join(sys.argv[1:] if argv is None else argv),
        **trained,
        "wall_minutes": round((time.monotonic() - began) / 60, 2),
        "heldout_loss_nats_per_token": round(loss, 4),
        "heldout_tokens": heldout_tokens,
        "heldout_bits_per_byte": round(loss * heldout_tokens / math.log(2) / heldout_bytes, 4),
    }
    save(args.out, model, tokenizer, record)
    print(json.dumps(record, indent=2), flush=True)
    return record


if __name__ == "__main__":
    main()
