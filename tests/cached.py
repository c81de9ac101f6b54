"""A small text, and harvests of the embedded model reading it, for tests of caches."""

import dataclasses
import functools

from kronsae.cache import HarvestConfig, harvest, writer
from kronsae.config import DataConfig
from kronsae.data.many_hookpoints import ManyHookpoints
from kronsae.data.text import IndexedText

LENGTH, PASS = 16, 4
LAYERS = (1, 2)
WORDS = "def class return import self value for if else None True yield".split()
TEXTS = [
    "".join(f"{WORDS[(7 * i + j * j) % 12]} name_{i * j} = {i}\n" for j in range(1, 4 + i % 5))
    for i in range(40)
]
DATA = DataConfig(
    dataset="given", context_length=LENGTH, contexts_per_batch=PASS, heldout_tokens=5 * LENGTH
)
CONFIG = HarvestConfig(data=DATA, layers=LAYERS, shard_tokens=100)


def text(config, seed, texts=TEXTS):
    return IndexedText(texts, None, seed=seed, epochs=1, fingerprint=str(len(texts)), name="given")


def give_text(monkeypatch, texts=TEXTS):
    """Let harvests read `texts`, whatever they ask for."""
    monkeypatch.setattr(writer, "open_documents", lambda config, seed: text(config, seed, texts))


load_at = ManyHookpoints.load_at
load = functools.cache(lambda layers, hookpoints: load_at(DataConfig(), layers, hookpoints))


def give_model(monkeypatch):
    """Let harvests share the embedded model, which is loaded once for each set of hookpoints."""
    monkeypatch.setattr(
        ManyHookpoints, "load_at", lambda data, layers, hookpoints, device: load(layers, hookpoints)
    )


def make(monkeypatch, folder, **settings):
    """A cache of CONFIG with other settings, in `folder`; returns its index."""
    with monkeypatch.context() as patch:
        give_text(patch)
        give_model(patch)
        return harvest(dataclasses.replace(CONFIG, **settings), folder)


def contents(folder):
    """The bytes of every file."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
