"""Packing of documents into contexts of token ids without padding."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kronsae.errors import InputError
from kronsae.system.documents import Keys, typed

PIECE_CHARACTERS = 100_000
"""Longer documents are tokenised in pieces, which bounds memory."""


class Packer:
    """Joins tokenised documents and cuts them into contexts of `context_length` tokens.

    Each document is followed by the end-of-text token; each context begins as `bos` says (see
    `context_begin`). Tokens that do not fill a context wait for the next document, so that nothing
    is padded, and less than one context is lost at the end of the data.
    Raises InputError if `bos` leaves no room in a context.
    """

    def __init__(self, tokenizer: Any, context_length: int, bos: str = "auto") -> None:
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.begin = context_begin(tokenizer, bos)
        if len(self.begin) >= context_length:
            raise InputError(
                f"bos {bos!r}: its {len(self.begin)} tokens leave no room in contexts of "
                f"{context_length}"
            )
        ends = (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id)
        self.separator = next((token for token in ends if token is not None), None)
        self.waiting: list[int] = []

    def add(self, text: str) -> Iterator[Tensor]:
        """Contexts [context_length] int64 that this document completes.

        The document is added piece by piece as the iterator advances: iterate to the end.
        """
        if not text:
            return
        for piece in _pieces(text):
            yield from self._cut(self._tokens(piece))
        if self.separator is not None:
            yield from self._cut([self.separator])

    def _cut(self, tokens: list[int]) -> Iterator[Tensor]:
        """The full contexts of waiting + tokens; the rest waits."""
        room = self.context_length - len(self.begin)
        self.waiting += tokens
        while len(self.waiting) >= room:
            ids, self.waiting = self.waiting[:room], self.waiting[room:]
            yield torch.tensor(self.begin + ids)

    def _tokens(self, text: str) -> list[int]:
        # verbose=False: no warning about texts longer than the model's context.
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def state_dict(self) -> dict[str, Any]:
        return {"waiting": torch.tensor(self.waiting, dtype=torch.int64)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = typed(state, Keys({"waiting": Tensor}), "source.packer")
        self.waiting = state["waiting"].tolist()


def token_mask(
    input_ids: Tensor, tokenizer: Any, special: Tensor | None = None, begin: int = 1
) -> Tensor:
    """Mask [b, t] (bool, CPU) of tokens to train on: not special, and not first in a context.

    Models use the first position as an attention sink, with or without a BOS token: its
    activations are orders of magnitude larger than the rest.

    special: `special_ids(tokenizer)` if already known; listing thousands takes milliseconds.
    begin: number of tokens that begin a context without being its text (`context_begin`).
    """
    special = special_ids(tokenizer) if special is None else special
    mask = ~torch.isin(input_ids.cpu(), special)
    mask[:, : max(1, begin)] = False
    return mask


def special_ids(tokenizer: Any) -> Tensor:
    """Special tokens [s] int64, also those without a role (Llama 3 reserves 250 of them)."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ids = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    return torch.tensor(sorted(ids), dtype=torch.int64)


def context_begin(tokenizer: Any, bos: str = "auto") -> list[int]:
    """The tokens that each context begins with.

    bos: "auto" for the token that the tokenizer itself puts before a text (Llama, Gemma; not GPT-2,
        Pythia, Qwen); "bos" for its BOS token in any case; "none"; or the text of one token or
        several, such as "[gMASK]<sop>".
    Raises InputError if the tokenizer has no such token.
    """
    if bos == "none":
        return []
    if bos == "auto":
        token = beginning_token(tokenizer)
        return [] if token is None else [token]
    if bos == "bos":
        if tokenizer.bos_token_id is None:
            raise InputError("bos 'bos': the tokenizer has no BOS token")
        return [tokenizer.bos_token_id]
    tokens = list(tokenizer(bos, add_special_tokens=False)["input_ids"])
    special = special_ids(tokenizer).tolist()
    unknown = getattr(tokenizer, "unk_token_id", None) in tokens
    if not tokens or unknown or _NAMES.fullmatch(bos) and not set(tokens) <= set(special):
        known = ", ".join(tokenizer.convert_ids_to_tokens(special[:SHOWN_TOKENS]))
        raise InputError(
            f"bos {bos!r}: expected auto, bos, none or the text of tokens, but the tokenizer has "
            f"no token of this name; its special tokens are {known}"
        )
    return tokens


def contexts_in_words(length: int, begin: Sequence[str] | None) -> str:
    """Length and beginning of contexts: "contexts of 128 tokens that begin with '<s>'".

    begin: the tokens, if they are known.
    """
    words = f"contexts of {length:,} tokens"
    return f"{words} that begin with {' '.join(map(repr, begin))}" if begin else words


_NAMES = re.compile(r"(<[^<>\s]+>|\[[^\[\]\s]+\])+")
"""Names of special tokens, one after another."""

SHOWN_TOKENS = 20
"""Special tokens that an error lists."""


def prompt_ids(tokenizer: Any, prompt: str, bos: str = "auto") -> list[int]:
    """Token ids of a prompt, which begins as contexts do."""
    if bos == "auto":
        return tokenizer(prompt)["input_ids"]
    return context_begin(tokenizer, bos) + tokenizer(prompt, add_special_tokens=False)["input_ids"]


def beginning_token(tokenizer: Any) -> int | None:
    """The token that the tokenizer itself puts before a text, or None."""
    with_special = tokenizer("a", add_special_tokens=True)["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    first = with_special[0] if with_special else None
    if first in (tokenizer.bos_token_id, tokenizer.cls_token_id) and with_special != plain:
        return first
    return None


def _pieces(text: str) -> Iterator[str]:
    """Pieces of text, cut where white space begins: most tokenizers begin a token there anyway.

    A piece without white space in its second half is cut at PIECE_CHARACTERS.
    """
    start = 0
    while start < len(text):
        limit = stop = start + PIECE_CHARACTERS
        if limit < len(text):
            candidates = range(limit, limit - PIECE_CHARACTERS // 2, -1)
            cuts = (i for i in candidates if text[i].isspace() and not text[i - 1].isspace())
            stop = next(cuts, limit)
        yield text[start:stop]
        start = stop
