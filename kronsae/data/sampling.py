"""The order in which documents are held out and given, and whether those of a stream are sorted."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kronsae.data.document import Document, as_bytes, as_text

DRAW_SEED = 0
"""Seed of what is held out: one for all runs, so that they are evaluated on the same text."""

DRAWN_BY_TEXT = 2**16
"""Up to so many documents are drawn by their texts, more by their numbers."""

PROFILED_CHARACTERS = 10_000
"""Characters of a document whose bytes are counted."""

LEAST_DOCUMENTS = 32
"""Fewer documents are not compared: their median is a matter of chance."""

LEAST_DIFFERENCE = 0.01
"""Share of a text by which documents differ at least."""


def drawn_rows(documents: Any, order: str) -> Tensor:
    """Rows [n] int64 of the n documents, of which the first ones are held out.

    documents: a sequence of documents (None for no text).
    order: "first" for the order in which they stand; "sample" for one that a fixed seed draws. That
        of up to DRAWN_BY_TEXT documents depends on the texts alone, so that a file and the same
        file sorted are one and the same text.
    """
    count = len(documents)
    if order == "first":
        return torch.arange(count)
    if count > DRAWN_BY_TEXT:
        return torch.randperm(count, generator=torch.Generator().manual_seed(DRAW_SEED))
    keys = [_key(as_bytes(document)) for document in documents]
    return torch.tensor(sorted(range(count), key=keys.__getitem__), dtype=torch.int64)


def _key(document: bytes) -> bytes:
    seed = DRAW_SEED.to_bytes(8, "little")
    return hashlib.blake2b(document, digest_size=8, key=seed).digest()


def shuffled(rows: Tensor, seed: int, epoch: int, before: int = 0) -> Tensor:
    """The rows [n] in an order that the seed draws for an epoch.

    before: documents of the epoch before these.
    """
    seed = (seed * 1_000_003 + epoch + before * 0x9E3779B97F4A7C15) % 2**63
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]


class Difference(NamedTuple):
    """A byte that later documents have more of, or less, than the first ones."""

    byte: int
    first: float
    """Its share of the bytes of a document, in the median of the first ones."""
    later: float

    def __str__(self) -> str:
        name = repr(chr(self.byte)) if 32 <= self.byte < 127 else f"byte 0x{self.byte:02X}"
        return f"{name} makes up {self.later:.1%} of their text, and {self.first:.1%} of the first"


class Beginning:
    """The bytes of the first documents of a text, to compare later ones with.

    Documents of token ids are not compared.
    """

    def __init__(self, documents: Sequence[Document]) -> None:
        self.documents = len(documents)
        self.shares = _byte_shares(documents)

    def difference(self, documents: Sequence[Document]) -> Difference | None:
        """How most of these documents differ from nearly all of the first; None if they do not.

        The share of some byte is in their median higher than in 95 % of the first documents, or
        lower, by LEAST_DIFFERENCE of the text. Kinds of documents that are rare make no difference.
        """
        first, later = self.shares, _byte_shares(documents)
        if min(len(first), len(later)) < LEAST_DOCUMENTS:
            return None
        low, usual, high = first.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=first.dtype), 0)
        median = later.median(0).values
        beyond = torch.maximum(median - high, low - median)
        byte = int(beyond.argmax())
        if beyond[byte] < LEAST_DIFFERENCE:
            return None
        return Difference(byte, usual[byte].item(), median[byte].item())


def _byte_shares(documents: Sequence[Document]) -> Tensor:
    """[n, 256] float64: the share of each byte in each document that has text."""
    texts = map(as_text, documents)
    encoded = [text[:PROFILED_CHARACTERS].encode("utf-8", "replace") for text in texts if text]
    counts = [
        torch.frombuffer(bytearray(data), dtype=torch.uint8).bincount(minlength=256)
        for data in encoded
    ]
    shares = torch.stack(counts).double() if counts else torch.empty(0, 256, dtype=torch.float64)
    return shares / shares.sum(1, keepdim=True)
