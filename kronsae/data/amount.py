"""About how many tokens a text gives to train on, from its bytes and a sample of its documents."""

import dataclasses
import math
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kronsae.config import DataConfig
from kronsae.data.document import Document, as_document, kind_of_value, sizes
from kronsae.data.images import count_patches
from kronsae.data.packing import Packer, left_out_ids, trained_on
from kronsae.data.text import (
    STDLIB,
    IndexedText,
    TextSource,
    check_roles,
    check_text,
    checked_document,
    kind_of_file,
    open_text,
    options_of_file,
    settings_of_files,
)

SAMPLE_DOCUMENTS = 512
"""At most so many documents are sampled, and about as many pieces of them, at most twice."""

SAMPLE_CHARACTERS = 500
"""Characters of a piece of a sampled text. Pieces come from anywhere in it, as its beginning often
has more tokens a character; a longer text gives more of them. Cuts inside words make somewhat too
many tokens, up to about 1 %."""

GOLDEN = (5**0.5 - 1) / 2
"""Its multiples, modulo 1, are spread evenly."""

SAMPLE_FILES = 8

BEGINNING_CHARACTERS = 2**20
"""Characters that are read of a sampled text file."""

MARGIN = 1.03
"""Epochs are advised for 1.03 times the tokens, as an estimate may be too high."""


class Sample(NamedTuple):
    """Some documents of a text."""

    size: float
    """Of the whole text, about: bytes, or the number of token ids."""
    documents: list[Any]
    """As rows of a column hold them."""


def count_tokens(
    config: DataConfig,
    tokenizer: Any,
    context_length: int,
    text: TextSource | None = None,
    vocab_size: int = 0,
) -> int | None:
    """About how many tokens there are to train on, over all epochs; None if it is not known.

    It is known of the standard library, of files, and of a hub dataset that is on the disk, if
    there is a tokenizer.

    text: of `config`, once it is open and documents are held out.
    vocab_size: number of tokens that the model knows; 0 if it is not known.
    Raises InputError if files cannot be read, or if settings do not fit the documents.
    """
    if config.image_column is not None:
        return count_patches(config)
    if tokenizer is None:
        return None
    if config.dataset == STDLIB and text is None:
        text = open_text(config, 0)
    if isinstance(text, IndexedText):
        sample, heldout = _of_indexed(text), 0
    elif files := check_text(config):
        sample, heldout = _of_files(files, config), config.heldout_tokens
    else:
        return None
    for kind in {kind_of_value(x) for x in sample.documents if x}:
        check_roles(config, kind)
    packer = Packer.of(dataclasses.replace(config, context_length=context_length), tokenizer)
    left_out = left_out_ids(tokenizer, config.exclude_tokens, vocab_size)
    documents = [checked_document(x, config.dataset, vocab_size or None) for x in sample.documents]
    characters = sum(len(document) for document in documents if isinstance(document, str))
    if not characters:  # conversations, or token ids: they are read whole
        documents = _spread(documents, SAMPLE_DOCUMENTS // 2)
    size = total = count = contexts = 0.0
    for number, document in enumerate(documents):
        if not document:
            continue
        pieces: Sequence[Document] = [document]
        if isinstance(document, str):
            wanted = max(1, round(SAMPLE_DOCUMENTS * len(document) / characters))
            pieces = _pieces(document, wanted, number * GOLDEN % 1)
        tokens_of_pieces = (tokens for piece in pieces for tokens in packer.tokens(piece))
        ids = torch.tensor([token for tokens in tokens_of_pieces for token in tokens]).long()
        times = len(document) / sum(map(len, pieces))
        size += sizes([document])
        total += times * len(ids)
        count += times * float(trained_on(ids, left_out).sum())
        contexts += math.ceil(times * len(ids) / context_length)
    share = count / max(1.0, total)
    tokens = max(0.0, sample.size * count / max(1.0, size) - heldout * share)
    if not packer.begin:  # the first token of each context is left out
        if config.join_documents:
            contexts = total / context_length
        tokens *= max(0.0, 1 - contexts / max(1.0, total))
    return config.epochs * int(tokens)


def _pieces(text: str, count: int, offset: float) -> list[str]:
    """At most `count` pieces of a text, evenly spaced; its end goes on with its beginning.

    offset: of the pieces in their `count` equal shares of the text, from 0 to 1.
    """
    if len(text) <= count * SAMPLE_CHARACTERS:
        return [text]
    starts = [int((i + offset) / count * len(text)) for i in range(count)]
    around = text + text[:SAMPLE_CHARACTERS]
    return [around[start : start + SAMPLE_CHARACTERS] for start in starts]


def _of_indexed(text: IndexedText) -> Sample:
    rows = _spread(range(len(text.documents)), SAMPLE_DOCUMENTS)
    return Sample(text.size(), [text.documents[row] or "" for row in rows])


def _of_files(files: list[Path], config: DataConfig) -> Sample:
    """A sample from the beginnings of some of the files."""
    sampled = _spread(files, SAMPLE_FILES)
    documents: list[Any] = []
    read = size = 0.0
    for path in sampled:
        beginning, share = _beginning(path, config)
        read += share * path.stat().st_size
        size += sizes([as_document(x, str(path)) for x in beginning])
        documents += _spread(beginning, SAMPLE_DOCUMENTS // len(sampled))
    return Sample(size / max(1, read) * sum(path.stat().st_size for path in files), documents)


def _beginning(path: Path, config: DataConfig) -> tuple[list[Any], float]:
    """Documents at the beginning of a file, and the share of the file that they are, about."""
    from kronsae.data.columns import Settings, open_file, read_beginning

    if kind_of_file(path) != "text":
        options = dict(options_of_file(path, alone=True))
        return read_beginning(path, Settings(**settings_of_files([path], config, options)))
    with open_file(path) as (file, stored):
        reader = TextIOWrapper(file, "utf-8")
        return [reader.read(BEGINNING_CHARACTERS)], stored.tell() / path.stat().st_size


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spaced."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def name_of_text(config: DataConfig) -> str:
    """The name of a text, and how a stream of it is shuffled."""
    if config.image_column is not None:
        return f"images of {config.dataset}"
    if not config.streaming:
        return config.dataset
    if not config.shuffle_documents:
        return f"{config.dataset}, streamed in its own order"
    return f"{config.dataset}, streamed, {config.shuffle_documents:,} documents shuffled at a time"


def about(count: int) -> str:
    """A number with two significant digits: "about 4,600,000"."""
    return f"about {round(count, 2 - len(str(count))):,}"


def in_words(available: int | None, epochs: int) -> str:
    """What follows the name of a text that gives so many tokens; "" if that is not known."""
    if available is None:
        return ""
    return f"; {about(available)} tokens to train on" + (f" in {epochs} epochs" * (epochs > 1))


def too_few(wanted: int, available: int | None, epochs: int = 0) -> str | None:
    """The message for a text that gives fewer tokens than wanted; None if it gives enough.

    epochs: in which it gives them, to advise more; 0 if it can be read only once.
    """
    if available is None or wanted <= available:
        return None
    enough = math.ceil(MARGIN * wanted * epochs / available) if available else 0
    return f"--tokens is {wanted:,}, and the text gives {about(available)}" + (
        f": --epochs {enough} would be enough" if enough else ""
    )
