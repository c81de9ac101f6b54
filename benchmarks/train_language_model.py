"""Trains the embedded language model: tokenizer first, then a small GPT-NeoX.

    python -m benchmarks.train_language_model --out DIR --minutes 45 --seed 0

The corpus is the running Python's standard library with its tests, without the files that
`kronsae.data.stdlib.is_heldout` names. DIR gets all that `from_pretrained` needs, and
`training.json`, which says what was trained, on what, and how well it does on the held-out files.

Letters: B windows in a batch, T tokens in a window.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from kronsae.data.stdlib import stdlib_documents

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


def new_model(vocab_size: int, context: int, hidden: int, layers: int, heads: int):
    """A GPT-NeoX with tied embeddings and freshly drawn weights."""
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=vocab_size,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * hidden,
            max_position_embeddings=context,
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
    model: GPTNeoXForCausalLM, documents: list[np.ndarray], context: int, batch: int = 32
) -> tuple[float, int]:
    """Mean loss in nats/token and the number of tokens it is over.

    Each document is cut into windows of T + 1 that share one token, so that every token but the
    leading end-of-text is predicted once, from at most T tokens before it in its own document.

    documents: token ids [length], end-of-text first.
    Raises ValueError if no document has a token to predict.
    """
    windows = [
        torch.from_numpy(ids[start : start + context + 1])
        for ids in documents
        for start in range(0, len(ids) - 1, context)
    ]
    if not windows:
        raise ValueError("no tokens to predict: every document is empty")
    windows.sort(key=len)
    training, device = model.training, model.device
    model.eval()
    nats, count = 0.0, 0
    for i in range(0, len(windows), batch):
        chunk = windows[i : i + batch]
        ids = torch.nn.utils.rnn.pad_sequence(chunk, batch_first=True, padding_value=-100)
        ids = ids.to(device)
        logits = model(ids[:, :-1].clamp(min=0)).logits.float()
        targets = ids[:, 1:].flatten()
        nats += F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum").item()
        count += int((targets >= 0).sum())
    model.train(training)
    return nats / count, count


def learning_rate(progress: float, tokens: int, peak: float, warmup_tokens: int) -> float:
    """Linear warm-up in tokens times a cosine in the share of the run that is done (0 to 1)."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return peak * min(1.0, tokens / warmup_tokens) * cosine


def save(
    out: Path, model: GPTNeoXForCausalLM, tokenizer: PreTrainedTokenizerFast, record: dict
) -> None:
    """Writes the model in float16, the tokenizer and `training.json` to `out`."""
    half = GPTNeoXForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    # transformers 5 writes a name of its own here, which transformers 4 does not know.
    settings = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.pop("backend", None)
    write_json(out / "tokenizer_config.json", settings)
    write_json(out / "training.json", record)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--minutes", type=float, default=45.0, help="wall time of the training")
    parser.add_argument(
        "--tokens", type=int, help="train on so many tokens instead; this can be repeated exactly"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab-size", type=int, default=3072)
    parser.add_argument("--context", type=int, default=256, help="tokens")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16, help="windows in a step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="of the matrices")
    parser.add_argument("--warmup-tokens", type=int, default=500_000)
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    parser.add_argument("--save-minutes", type=float, default=5.0, help="time between two saves")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of torch, on a CPU")
    parser.add_argument("--float32", action="store_true", help="no bfloat16 autocast")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    """Trains and writes the model; returns what it wrote to `training.json`."""
    args = parse_arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    began = time.monotonic()

    train_documents = stdlib_documents(include_tests=True, heldout=False)
    heldout_documents = stdlib_documents(include_tests=True, heldout=True)
    tokenizer = train_tokenizer([d["text"] for d in train_documents], args.vocab_size, args.context)
    train_ids = encode(tokenizer, train_documents)
    heldout_ids = encode(tokenizer, heldout_documents)
    heldout_bytes = sum(len(d["text"].encode("utf-8")) for d in heldout_documents)
    # Short looks during training see the first windows of every held-out file.
    glance_ids = [ids[: 2 * args.context + 1] for ids in heldout_ids]

    model = new_model(len(tokenizer), args.context, args.hidden, args.layers, args.heads)
    model.to(args.device).train()
    device_type = torch.device(args.device).type
    parameters = list(model.parameters())
    optimiser = torch.optim.AdamW(
        [
            {
                "params": [p for p in parameters if p.ndim > 1],
                "weight_decay": args.weight_decay,
            },
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    options = {key: value for key, value in vars(args).items() if key != "out"}
    record = {
        "corpus": "source text of the Python standard library, with tests, without held-out files",
        "corpus_python": platform.python_version(),
        "corpus_files": len(train_documents),
        "corpus_tokens": sum(map(len, train_ids)),
        "heldout_rule": "kronsae.data.stdlib.is_heldout",
        "heldout_files": len(heldout_documents),
        "heldout_bytes": heldout_bytes,
        "parameters": sum(p.numel() for p in parameters),
        "options": options,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "command": "python -m benchmarks.train_language_model "
        + " ".join(sys.argv[1:] if argv is None else argv),
    }
    print(json.dumps(record, indent=2), flush=True)

    def write(loss: float, loss_tokens: int, loss_on: str) -> None:
        # The bytes of the whole held-out set belong only to a loss over all of its tokens.
        whole = loss_on == "all"
        record.update(
            tokens_seen=tokens,
            steps=steps,
            wall_minutes=round((time.monotonic() - began) / 60, 2),
            train_loss_nats_per_token=round(train_loss, 4),
            heldout_loss_nats_per_token=round(loss, 4),
            heldout_tokens=loss_tokens,
            heldout_loss_on=loss_on,
            heldout_bits_per_byte=round(loss * loss_tokens / math.log(2) / heldout_bytes, 4)
            if whole
            else None,
        )
        save(args.out, model, tokenizer, record)

    windows = training_windows(train_ids, args.context, rng)
    tokens, steps, train_loss = 0, 0, math.log(len(tokenizer))
    started = saved = time.monotonic()
    while True:
        elapsed_minutes = (time.monotonic() - started) / 60
        progress = tokens / args.tokens if args.tokens else elapsed_minutes / args.minutes
        if progress >= 1:
            break
        ids = torch.from_numpy(np.stack([next(windows) for _ in range(args.batch)]))  # [B, T + 1]
        ids = ids.to(args.device)
        tokens += ids[:, 1:].numel()
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(progress, tokens, args.lr, args.warmup_tokens)
        with torch.autocast(device_type, torch.bfloat16, enabled=not args.float32):
            logits = model(ids[:, :-1]).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, args.clip)
        optimiser.step()
        steps += 1
        train_loss += (loss.item() - train_loss) * max(0.01, 1 / steps)
        if steps % 50 == 0:
            rate = tokens / (time.monotonic() - started)
            print(
                f"step {steps}  tokens {tokens / 1e6:.2f}M  progress {progress:.3f}  "
                f"train {train_loss:.4f} nats/token  {rate:.0f} tokens/s",
                flush=True,
            )
        if time.monotonic() - saved > 60 * args.save_minutes:
            glance, glance_tokens = heldout_loss(model, glance_ids, args.context)
            write(glance, glance_tokens, "beginnings of files")
            print(f"step {steps}  held-out (beginnings) {glance:.4f} nats/token", flush=True)
            saved = time.monotonic()

    # The loss of the weights as they ship: through float16 and back.
    model.load_state_dict({k: v.half().float() for k, v in model.state_dict().items()})
    write(*heldout_loss(model, heldout_ids, args.context), "all")
    print(json.dumps(record, indent=2), flush=True)
    return record


if __name__ == "__main__":
    main()
