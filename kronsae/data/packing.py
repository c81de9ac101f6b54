"""Packing of documents into contexts of token ids.

A packed context [context_length] int64 holds ids. READ_ONLY is added to those that the language
model reads and that nothing is trained on; PADDING stands where a document is too short.
"""

import re
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from kronsae.config import DataConfig
from kronsae.data.chat import ChatTemplate
from kronsae.data.document import Document, Ids, Message
from kronsae.data.loading import quiet
from kronsae.errors import InputError
from kronsae.system.documents import Keys, typed

PIECE_CHARACTERS = 100_000
"""Longer texts are tokenised in pieces, which bounds memory."""

READ_ONLY = 2**32
"""Added to the id of a token that is not trained on, such as the chat template's own."""

PADDING = -100
"""In the place of the id of a token that is not there. `cross_entropy` does not count it."""


class ModelTokens:
    """The special tokens that a model's config names, in place of a tokenizer that it lacks."""

    def __init__(self, config: Any) -> None:
        text = config.get_text_config()
        names = ("bos_token_id", "eos_token_id", "sep_token_id", "pad_token_id")
        ids = [_listed(getattr(text, name, None)) for name in names]
        self.all_special_ids = sorted({token for several in ids for token in several})
        firsts = (next(iter(several), None) for several in ids)
        self.bos_token_id, self.eos_token_id, self.sep_token_id, _ = firsts

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [f"[{token}]" for token in ids]


class ImageTokens(ModelTokens):
    """The positions of images in place of special tokens; see `kronsae.data.images`.

    unread: number of positions before the patches.
    """

    def __init__(self, unread: int) -> None:
        self.all_special_ids: list[int] = []
        self.bos_token_id = self.eos_token_id = self.sep_token_id = None
        self.unread = unread


def _listed(ids: int | list[int] | None) -> list[int]:
    listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
    return [token for token in listed if token >= 0]


class Packer:
    """Cuts tokenised documents into contexts of `context_length` tokens.

    Each context begins as `bos` says (see `context_begin`). A text is followed by the end-of-text
    token, and so are token ids that do not end with it. A conversation ends as its template says.
    Token ids and conversations that begin as contexts do lose this beginning.

    join: tokens that do not fill a context wait for the next document, so that nothing is padded,
        and less than one context is lost at the end of the data. False: each context holds tokens
        of one document, without an end-of-text token, and PADDING after the last of them.
    chat_roles: whose messages of a conversation are trained on; see `ChatTemplate`.
    tokenizer: or `ModelTokens`, which can pack token ids alone.
    Raises InputError if `bos` leaves no room in a context.
    """

    def __init__(
        self,
        tokenizer: Any,
        context_length: int,
        bos: str = "auto",
        *,
        join: bool = True,
        chat_roles: str = "",
    ) -> None:
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.join, self.chat_roles = join, chat_roles
        self.chat: ChatTemplate | None = None
        self.begin = context_begin(tokenizer, bos)
        if len(self.begin) >= context_length:
            raise InputError(
                f"bos {bos!r}: its {len(self.begin)} tokens leave no room in contexts of "
                f"{context_length}"
            )
        ends = (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id)
        self.separator = next((token for token in ends if token is not None), None)
        self.waiting: list[int] = []

    @classmethod
    def of(cls, data: DataConfig, tokenizer: Any) -> "Packer":
        """The packer that `data` configures."""
        if data.image_column is not None:
            return ImagePacker(tokenizer, data.context_length, join=False)
        join, roles = data.join_documents, data.chat_roles
        return cls(tokenizer, data.context_length, data.bos, join=join, chat_roles=roles)

    def add(self, document: Document) -> Iterator[Tensor]:
        """Packed contexts [context_length] that this document completes.

        The document is added piece by piece as the iterator advances: iterate to the end.
        Raises InputError if there is no tokenizer, or no chat template, for it.
        """
        if not document:
            return
        for tokens in self.tokens(document):
            yield from self._cut(tokens)
        if not self.join:
            yield from self._padded()

    def tokens(self, document: Document) -> Iterator[list[int]]:
        """The document's tokens in parts, READ_ONLY added to those that are not trained on."""
        if isinstance(document, str):
            for piece in _pieces(document):
                yield self._tokens(piece)
            if self.separator is not None and self.join:
                yield [self.separator]
        elif isinstance(document, array):
            ids = self._without_beginning(document.tolist())
            yield ids
            if self.separator is not None and self.join and ids[-1:] != [self.separator]:
                yield [self.separator]
        else:
            yield self._without_beginning(self._of_messages(document))

    def _tokens(self, text: str) -> list[int]:
        self._check_tokenizer()
        # verbose=False: no warning about texts longer than the model's context.
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _of_messages(self, messages: list[Message]) -> list[int]:
        self._check_tokenizer()
        if self.chat is None:
            self.chat = ChatTemplate(self.tokenizer, self.chat_roles)
        tokens = zip(*self.chat.tokens(messages), strict=True)
        return [token if trained_on else token + READ_ONLY for token, trained_on in tokens]

    def _check_tokenizer(self) -> None:
        if isinstance(self.tokenizer, ModelTokens):
            raise InputError(
                "the model has no tokenizer, so text cannot be read: save one beside the model, or "
                "name a column of token ids by --text-column"
            )

    def _without_beginning(self, tokens: list[int]) -> list[int]:
        begun = self.begin and [token % READ_ONLY for token in tokens[: len(self.begin)]]
        return tokens[len(self.begin) :] if begun == self.begin else tokens

    def _cut(self, tokens: list[int]) -> Iterator[Tensor]:
        """The full contexts of waiting + tokens; the rest waits."""
        room = self.context_length - len(self.begin)
        self.waiting += tokens
        while len(self.waiting) >= room:
            ids, self.waiting = self.waiting[:room], self.waiting[room:]
            yield torch.tensor(self.begin + ids)

    def _padded(self) -> Iterator[Tensor]:
        """The context of the tokens that wait, if one of them is trained on."""
        ids, self.waiting = self.begin + self.waiting, []
        if len(ids) > max(1, len(self.begin)):
            yield torch.tensor(ids + [PADDING] * (self.context_length - len(ids)))

    def state_dict(self) -> dict[str, Any]:
        return {"waiting": torch.tensor(self.waiting, dtype=torch.int64)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = typed(state, Keys({"waiting": Tensor}), "source.packer")
        self.waiting = state["waiting"].tolist()


class ImagePacker(Packer):
    """Gives each image, whose document is its number, a context of its own."""

    def add(self, document: Document) -> Iterator[Tensor]:
        yield torch.full((self.context_length,), cast(Ids, document)[0])


def token_ids(packed: Tensor) -> Tensor:
    """Token ids of packed contexts, PADDING where there is no token."""
    return torch.where(packed < READ_ONLY, packed, packed - READ_ONLY)


def marked(ids: Tensor, mask: Tensor) -> Tensor:
    """Packed contexts [b, t] of token ids and the mask of those that are trained on."""
    return torch.where(mask | (ids == PADDING), ids, ids + READ_ONLY)


def token_mask(
    packed: Tensor, tokenizer: Any, left_out: Tensor | None = None, begin: int = 1
) -> Tensor:
    """Mask [b, t] (bool, CPU) of tokens to train on, of packed contexts or plain token ids [b, t].

    They are no padding, not READ_ONLY, not special, and not first in a context. Models use the
    first position as an attention sink, with or without a BOS token: its activations are orders of
    magnitude larger than the rest. Of an image they are the patches.

    left_out: tokens [s] that are not trained on (default: `special_ids(tokenizer)`, whose listing
        takes milliseconds where there are thousands).
    begin: number of tokens that begin a context without being its text (`context_begin`).
    """
    left_out = special_ids(tokenizer) if left_out is None else left_out
    mask = trained_on(packed.cpu(), left_out)
    unread = tokenizer.unread if isinstance(tokenizer, ImageTokens) else max(1, begin)
    mask[:, :unread] = False
    return mask


def trained_on(packed: Tensor, left_out: Tensor) -> Tensor:
    """`token_mask` of tokens of any shape, wherever in their contexts they are."""
    return (packed >= 0) & (packed < READ_ONLY) & ~torch.isin(packed, left_out)


def left_out_ids(tokenizer: Any, excluded: str = "", vocab_size: int = 0) -> Tensor:
    """Tokens [s] int64 that are neither trained nor evaluated on: special ones, and the excluded.

    excluded: ids, names or texts of tokens, separated by commas.
    vocab_size: number of tokens that the model knows; 0 if it is not known.
    Raises InputError for one that is not a token.
    """
    ids = special_ids(tokenizer)
    if not excluded:
        return ids
    chosen = [_excluded_id(item, tokenizer) for item in excluded.split(",")]
    if max(chosen) >= vocab_size > 0:
        raise InputError(
            f"exclude_tokens: the model has {vocab_size:,} tokens, and none has the id "
            f"{max(chosen)}"
        )
    return torch.cat([ids, torch.tensor(chosen)]).unique()


def _excluded_id(item: str, tokenizer: Any) -> int:
    if not item:
        raise InputError(
            "exclude_tokens: expected ids, or texts of one token, separated by commas, got an "
            "empty text"
        )
    if item.strip().isdecimal():
        return int(item)
    ids: list[int] = []
    if not isinstance(tokenizer, ModelTokens):
        known = tokenizer.get_vocab()
        if item in known:
            return known[item]
        ids = tokenizer(item, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == getattr(tokenizer, "unk_token_id", None):
        raise InputError(
            f"exclude_tokens: {item!r} is {len(ids) or 'no'} tokens of the model: expected ids, or "
            "texts of one token, separated by commas"
        )
    return ids[0]


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
    if isinstance(tokenizer, ModelTokens):
        raise InputError(f"bos {bos!r}: the model has no tokenizer: expected auto, bos or none")
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
    """Token ids of a prompt, which begins as contexts do; it may be longer than a model reads."""
    with quiet():
        if bos == "auto":
            return tokenizer(prompt)["input_ids"]
        plain = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return context_begin(tokenizer, bos) + plain


def beginning_token(tokenizer: Any) -> int | None:
    """The token that the tokenizer itself puts before a text, or None.

    Of a model without a tokenizer it is the BOS token, unless that ends texts, too (GPT-2, Pythia).
    """
    if isinstance(tokenizer, ModelTokens):
        bos = tokenizer.bos_token_id
        return None if bos == tokenizer.eos_token_id else bos
    with_special = tokenizer("a", add_special_tokens=True)["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    first = with_special[0] if with_special else None
    if first in (tokenizer.bos_token_id, tokenizer.cls_token_id) and with_special != plain:
        return first
    return None


def _pieces(text: str) -> Iterator[str]:
    """Pieces of a text, cut where white space begins: most tokenizers begin a token there anyway.

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
