"""Documents -> packed contexts of token ids, without padding."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

PIECE_CHARACTERS = 100_000
"""Longer documents are tokenised in pieces, so that memory stays bounded."""


class Packer:
    """Joins tokenised documents and cuts them into contexts of `context_length` tokens.

    Documents are separated by the end-of-text token; each context begins with the beginning-of-text
    token if the tokenizer puts one before a text (Llama, Gemma; not GPT-2, Pythia, Qwen). No token
    is dropped or padded: what does not fill a context waits for the next document.
    """

    def __init__(self, tokenizer: Any, context_length: int) -> None:
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.bos = beginning_token(tokenizer)
        ends = (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id)
        self.separator = next((token for token in ends if token is not None), None)
        self.waiting: list[int] = []

    def add(self, text: str) -> Iterator[Tensor]:
        """Contexts [context_length] int64 that this document completes."""
        room = self.context_length - (self.bos is not None)
        for piece in _pieces(text):
            self.waiting += self._tokens(piece)
            while len(self.waiting) >= room:
                ids, self.waiting = self.waiting[:room], self.waiting[room:]
                yield torch.tensor(ids if self.bos is None else [self.bos, *ids])
        if self.separator is not None:
            self.waiting.append(self.separator)

    def _tokens(self, text: str) -> list[int]:
        # verbose=False: no warning about texts longer than the model's context.
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def state_dict(self) -> dict[str, Any]:
        return {"waiting": torch.tensor(self.waiting, dtype=torch.int64)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.waiting = state["waiting"].tolist()


def pack(documents: Iterable[str], tokenizer: Any, context_length: int) -> Iterator[Tensor]:
    """All full contexts of some documents."""
    packer = Packer(tokenizer, context_length)
    for text in documents:
        yield from packer.add(text)


def token_mask(input_ids: Tensor, tokenizer: Any) -> Tensor:
    """Which tokens of [b, t] an SAE is trained on (bool): no special token, no first position.

    The first position is left out with or without a BOS: models use it as an attention sink, with
    activations orders of magnitude larger than the rest.
    """
    special = torch.tensor(sorted(set(tokenizer.all_special_ids)), dtype=torch.int64)
    mask = ~torch.isin(input_ids.cpu(), special)
    mask[:, 0] = False
    return mask


def beginning_token(tokenizer: Any) -> int | None:
    """The token that the tokenizer itself puts before a text, or None."""
    with_special = tokenizer("a", add_special_tokens=True)["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    first = with_special[0] if with_special else None
    if first in (tokenizer.bos_token_id, tokenizer.cls_token_id) and with_special != plain:
        return first
    return None


def _pieces(text: str) -> Iterator[str]:
    for start in range(0, len(text), PIECE_CHARACTERS):
        yield text[start : start + PIECE_CHARACTERS]
