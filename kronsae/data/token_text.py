"""Readable text of single tokens, also where several tokens encode one character."""

import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any


def token_texts(
    tokens: Sequence[int],
    tokenizer: Any | None,
    fires: Sequence[float] | None = None,
    one_line: bool = True,
) -> list[str]:
    """The text of each token on one line: ↵ for a newline, ⇥ for a tab or four spaces.

    A character that several tokens encode is shown at the last of them. The other tokens' bytes are
    hidden, or, where a latent fires on them (fires: [t], > 0), shown in hexadecimal: ⟨E4 BD⟩. Bytes
    that form no character are shown so, too. Without a tokenizer the texts are ids.
    one_line: False leaves line breaks, tabs and what cannot be printed as they are.
    """
    if tokenizer is None:
        return [f"[{token}]" for token in tokens]
    texts: list[str] = []
    before = ""
    for stop in range(1, len(tokens) + 1):
        text = tokenizer.decode(list(tokens[:stop]), clean_up_tokenization_spaces=False)
        if text.endswith(_NO_CHARACTER) and stop < len(tokens):
            continue  # perhaps the next tokens complete a character
        start = len(texts)
        pieces, bytes_of_later = _split_text(tokens[start:stop], text[len(before) :], tokenizer)
        texts += pieces
        for position, hexadecimal in enumerate(bytes_of_later, start):
            if fires is not None and fires[position] > 0:
                texts[position] += hexadecimal
        before = text
    return [_on_one_line(text) for text in texts] if one_line else texts


def continued_texts(
    tokens: Sequence[int],
    tokenizer: Any | None,
    fires: Sequence[float] | None = None,
    one_line: bool = True,
) -> list[str]:
    """`token_texts` of tokens in the midst of a text, so that none loses the space before it."""
    if tokenizer is None:
        return token_texts(tokens, None)
    before = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    fires = None if fires is None else [0.0] * len(before) + [*fires]
    return token_texts([*before, *tokens], tokenizer, fires, one_line)[len(before) :]


def chip(text: str) -> str:
    """A token by itself: the spaces around it become dots, an empty one ∅."""
    inner = text.strip(" ")
    before = len(text) - len(text.lstrip(" "))
    after = len(text) - len(inner) - before if inner else 0
    return f"{'·' * before}{inner}{'·' * after}" or "∅"


_NO_CHARACTER = "\ufffd"
"""The replacement character, which decoders give for bytes that are no character."""


def _split_text(tokens: Sequence[int], text: str, tokenizer: Any) -> tuple[list[str], list[str]]:
    """Split `text` among the tokens that encode it.

    Gives each token's text, with bytes that are no character in hexadecimal, and each token's bytes
    of a character that a later token completes.
    """
    if len(tokens) == 1 and _NO_CHARACTER not in text:
        return [text], [""]
    names = tokenizer.convert_ids_to_tokens([int(token) for token in tokens])
    known = [_bytes(name) for name in names]
    if known[-1] is None:  # no byte token: the text after the bytes that are no character
        known[-1] = text.rpartition(_NO_CHARACTER)[2].encode()
    pieces = [piece for piece in known if piece is not None]
    data = b"".join(pieces)
    if len(pieces) < len(tokens) or data.decode(errors="replace") != text:
        others = len(tokens) - 1
        return [""] * others + [text], [_NO_CHARACTER] * others + [""]
    ends = list(accumulate(len(piece) for piece in pieces))
    texts, of_later, start = [""] * len(tokens), [b""] * len(tokens), 0
    for char in data.decode(errors="surrogateescape"):
        encoded = char.encode(errors="surrogateescape")
        owners = [bisect_right(ends, start + i) for i in range(len(encoded))]
        start += len(encoded)
        texts[owners[-1]] += char
        for owner, byte in zip(owners, encoded, strict=True):
            if owner != owners[-1]:
                of_later[owner] += bytes([byte])
    no_character = re.compile("[\udc80-\udcff]+")
    texts = [
        no_character.sub(lambda run: _hexadecimal(run[0].encode(errors="surrogateescape")), text)
        for text in texts
    ]
    return texts, [_hexadecimal(piece) if piece else "" for piece in of_later]


def _hexadecimal(data: bytes) -> str:
    return f"⟨{data.hex(' ').upper()}⟩"


def _bytes(name: str | bytes | None) -> bytes | None:
    """The bytes of a token, if its name is of byte-level BPE, or like <0xE4>."""
    if not isinstance(name, str):  # tiktoken's names are bytes; unknown ids have none
        return name
    if re.fullmatch("<0x[0-9A-F]{2}>", name):
        return bytes.fromhex(name[3:5])
    return bytes(_BYTES[char] for char in name) if _BYTES.keys() >= set(name) else None


def _byte_of_letter() -> dict[str, int]:
    """Byte-level BPE's letter for each byte: visible Latin-1 stays, the rest is from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = sorted(set(range(256)) - set(visible))
    return {chr(byte): byte for byte in visible} | {chr(256 + i): b for i, b in enumerate(rest)}


_BYTES = _byte_of_letter()


def _on_one_line(text: str) -> str:
    for blank, mark in (("\r\n", "↵"), ("\n", "↵"), ("\t", "⇥"), ("    ", "⇥")):
        text = text.replace(blank, mark)
    return "".join(char if char.isprintable() else _NO_CHARACTER for char in text)
