"""Explorer pages of small SAEs on made-up text, for tests; its tokens are what an attacker writes.

A text of words: token t is EVIL[t] or " wordT".
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from kronsae import SAE, RunConfig, SAEConfig, TrainConfig
from kronsae.config import DataConfig
from kronsae.explore.write import write_explorer
from kronsae.properties import (
    Examined,
    Examples,
    MeasureConfig,
    Nearest,
    Properties,
    Stored,
    measure,
    nearest_rows,
    summarise,
)
from kronsae.properties.examples import INTERVALS, WINDOW
from kronsae.properties.geometry import LogitEffects, kinship, mean_cosines

EVIL = (
    "</script><script>window.pwned = 1</script>",
    '<img src=x onerror="window.pwned = 1">',
    "' onfocus=window.pwned=1 autofocus='",
    "\u2028</SCRIPT \u202e",
    "${7*7}{{7*7}}",
    " ",
    "",
)
TOKENS, LENGTH = 30, 40

CONFIGS = {
    "kron": SAEConfig(d_model=6, heads=12, m=2, n=3, k=4),
    "dense": SAEConfig(d_model=6, encoder="dense", dict_size=150, k=4),
    "batchtopk": SAEConfig(d_model=6, heads=12, m=2, n=3, k=4, selection="batchtopk"),
    "matryoshka": SAEConfig(
        d_model=6, heads=12, m=2, n=3, k=4, objective="matryoshka", matryoshka_first=18
    ),
    "experts": SAEConfig(d_model=6, heads=12, m=2, n=3, k=4, experts=2),
    "transcoder": SAEConfig(d_model=6, d_target=5, heads=12, m=2, n=3, k=4),
}


class EvilTokenizer:
    """Tokens without whose text no test of escaping is worth much."""

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [TOKENS - 1]}

    def decode(self, ids, clean_up_tokenization_spaces):
        return "".join(EVIL[i] if i < len(EVIL) else f" word{i}" for i in ids)


class Made(NamedTuple):
    page: Path
    run: Path
    sae: SAE
    stored: Stored


LETTERS = sorted(set("你好😀 é\u202e".encode()))


class ByteTokenizer:
    """Token i is the byte LETTERS[i], or a full stop."""

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [TOKENS - 1]}

    def decode(self, ids, clean_up_tokenization_spaces):
        return self._bytes(ids).decode(errors="replace")

    def convert_ids_to_tokens(self, ids):
        return [f"<0x{byte:02X}>" for byte in self._bytes(ids)]

    def _bytes(self, ids):
        return bytes(LETTERS[i] if i < len(LETTERS) else ord(".") for i in ids)


def byte_ids(text: str) -> torch.Tensor:
    """Contexts of ByteTokenizer's tokens that repeat a text of LETTERS, each from another byte."""
    ids = torch.tensor([LETTERS.index(byte) for byte in text.encode()])
    return torch.stack([ids.roll(shift).repeat(LENGTH)[:LENGTH] for shift in range(12)])


def make_page(
    folder: Path, name: str = "kron", ids: torch.Tensor | None = None, tokenizer: Any = None
) -> Made:
    """A page of an untrained SAE with latents that fire and some that never do."""
    config = CONFIGS[name]
    sae = SAE(config, generator=torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        sae.b_enc[-1] = -100.0  # of the last head
    if config.selection == "batchtopk":
        sae.selection.threshold.fill_(0.5)
    generator = torch.Generator().manual_seed(1)
    random = torch.randint(TOKENS, (12, LENGTH), generator=generator)
    ids = random if ids is None else ids
    mask = torch.ones(12, LENGTH, dtype=torch.bool)
    x = torch.randn(TOKENS, 6, generator=generator)[ids][mask]
    x += 0.3 * torch.randn(x.shape, generator=generator)
    found = measure(sae, [(ids, mask, x)], TOKENS, MeasureConfig(tokens=1000, top=8, sample=4))
    nearest = nearest_rows(sae.W_dec.detach(), 4)
    summary = summarise(sae, found)
    if config.encoder == "kron":
        shape = config.heads, config.m, config.n
        summary |= {"cosines": mean_cosines(sae.W_dec.detach(), *shape)}
        summary |= {"nearest": kinship(nearest, config.m, config.n)}
    by = -np.sort(-torch.rand(config.dict_size, 5, generator=generator).numpy())
    words = torch.randint(TOKENS, (2, config.dict_size, 5), generator=generator).numpy()
    logits = LogitEffects(words[0], by, words[1], -by, "final_norm")
    facts = {"summary": summary, "text": {"dataset": EVIL[0]}}
    stored = Stored(found, nearest, logits, facts)
    run = folder / f"run-{name}"
    run.mkdir()
    whole = RunConfig(config, DataConfig(layer=2, dataset=EVIL[1]), TrainConfig(tokens=8000))
    (run / "config.json").write_text(json.dumps({"config": whole.to_dict()}))
    records = [
        {"kind": "train", "step": i, "tokens": 1000 * i, "explained_variance": 1 - 1 / (i + 1)}
        for i in range(8)
    ]
    final = {"explained_variance": 0.8, "l0": 4.0, "dead_share": 0.1, "mse": 0.25}
    records.append({"kind": "final", "step": 8, "tokens": 8000, **final})
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tokenizer = tokenizer or EvilTokenizer()
    page = write_explorer(run, sae, stored, tokenizer, folder / f"{name}.html")
    return Made(page, run, sae, stored)


def make_large_page(folder: Path) -> Path:
    """A page of 2^17 latents with random properties."""
    rng = np.random.default_rng(0)
    config = SAEConfig(d_model=4, heads=8192, m=4, n=4, k=50)
    sae = SAE(config, generator=torch.Generator().manual_seed(0))
    size, words = config.dict_size, 50_000
    text = (words * rng.random((4000, 256), np.float32) ** 4).astype(np.int32)

    def examples(count: int, kept: int) -> Examples:
        out = Examples(count, kept)
        out.scores = -np.sort(-rng.exponential(5.0, (count, kept)))
        out.places = rng.integers(0, text.size, (count, kept))
        out.tokens = (words * rng.random(out.tokens.shape, np.float32) ** 4).astype(np.int32)
        shade = rng.random(out.values.shape, np.float32)
        out.values = np.where(shade < 0.1, 50 * shade, 0)
        out.values[..., WINDOW // 2] = np.where(np.isfinite(out.scores), out.scores, 0)
        return out

    def examined(count: int) -> Examined:
        tokens = rng.integers(0, words, (count, 8))
        shares = -np.sort(-rng.random((count, 8))) / 8
        counts, means = rng.integers(0, 1000, count), rng.exponential(3.0, count)
        histograms, tops = rng.poisson(3.0, (count, 32)), np.full(count, 16.0)
        top, sample = examples(count, 8), examples(count, 4)
        intervals = examples(INTERVALS * count, 2) if count == size else None
        return Examined(
            *(counts, means, means, counts / 1e4, histograms, tops, tokens, shares),
            *(top, sample, intervals),
        )

    post, pre = examined(size), examined(8192 * 8)
    both = rng.integers(1000, 2000, (8192, 4, 4))
    exact = {"post": False, "pre": False}
    found = Properties(10**6, 4000, post, pre, both, None, None, exact, text)
    nearest = Nearest(rng.integers(0, size, (size, 8)), rng.random((size, 8)))
    tokens, by = rng.integers(0, words, (2, size, 10)), rng.random((size, 10))
    logits = LogitEffects(tokens[0], by, tokens[1], -by, "norm")
    summary = summarise(sae, found)
    summary |= {"cosines": mean_cosines(sae.W_dec.detach(), 8192, 4, 4)}
    facts = {"summary": summary, "text": {"dataset": "random"}}
    whole = RunConfig(config, DataConfig(layer=2), TrainConfig(tokens=8000))
    (folder / "config.json").write_text(json.dumps({"config": whole.to_dict()}))
    stored = Stored(found, nearest, logits, facts)
    return write_explorer(folder, sae, stored, None, folder / "large.html")
