"""Tokens as text to read: on one line, and whole characters where several tokens spell one."""

import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any


def token_texts(
    tokens: Sequence[int], tokenizer: Any | None, fires: Sequence[float] | None = None
) -> list[str]:
    """The text of each token, on one line: ↵ for a newline, ⇥ for a tab or four spaces.

    A character that several tokens spell belongs to the last of them. What the others give to it is
    not shown, or, where a latent is positive on them (fires: [t]), as bytes: ⟨E4 BD⟩. So are bytes
    that end without a character. Without a tokenizer: ids.
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
        spelled, given = _spelled(tokens[start:stop], text[len(before) :], tokenizer)
        texts += spelled
        for place, rest in enumerate(given, start):
            if fires is not None and fires[place] > 0:
                texts[place] += rest
        before = text
    return [_on_one_line(text) for text in texts]


_NO_CHARACTER = "\ufffd"
"""What decoders write for bytes that spell no character."""


def _spelled(tokens: Sequence[int], text: str, tokenizer: Any) -> tuple[list[str], list[str]]:
    """`text` by the tokens that spell it together, their bytes in place of \ufffd if known; and
    what each of them gives to a character of a later one."""
    if len(tokens) == 1 and _NO_CHARACTER not in text:
        return [text], [""]
    pieces = [_bytes(name) for name in tokenizer.convert_ids_to_tokens([int(t) for t in tokens])]
    if pieces[-1] is None:  # no byte token: what follows the bytes that spelled nothing
        pieces[-1] = text.rpartition(_NO_CHARACTER)[2].encode()
    if None in pieces or b"".join(pieces).decode(errors="replace") != text:
        others = len(tokens) - 1
        return [""] * others + [text], [_NO_CHARACTER] * others + [""]
    ends = list(accumulate(map(len, pieces)))
    texts, given, place = [""] * len(tokens), [b""] * len(tokens), 0
    for char in b"".join(pieces).decode(errors="surrogateescape"):
        spelling = char.encode(errors="surrogateescape")
        owners = [bisect_right(ends, place + i) for i in range(len(spelling))]
        place += len(spelling)
        texts[owners[-1]] += char
        for owner, byte in zip(owners, spelling, strict=True):
            if owner != owners[-1]:
                given[owner] += bytes([byte])
    seen = re.compile("[\udc80-\udcff]+")
    texts = [
        seen.sub(lambda found: _hexadecimal(found[0].encode(errors="surrogateescape")), text)
        for text in texts
    ]
    return texts, [_hexadecimal(rest) if rest else "" for rest in given]


def _hexadecimal(data: bytes) -> str:
    return f"⟨{data.hex(' ').upper()}⟩"


def _bytes(name: str | bytes | None) -> bytes | None:
    """The bytes of a token, if its name tells them: in byte-level BPE, or as <0xE4>."""
    if not isinstance(name, str):  # tiktoken's are bytes; ids beyond the vocabulary have none
        return name
    if re.fullmatch("<0x[0-9A-F]{2}>", name):
        return bytes.fromhex(name[3:5])
    return bytes(map(_BYTES.get, name)) if _BYTES.keys() >= set(name) else None


def _byte_of_letter() -> dict[str, int]:
    """Byte-level BPE's names of bytes: visible Latin-1 letters, and from U+0100 on the rest."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = sorted(set(range(256)) - set(visible))
    return {chr(byte): byte for byte in visible} | {chr(256 + i): b for i, b in enumerate(rest)}


_BYTES = _byte_of_letter()


def _on_one_line(text: str) -> str:
    for blank, mark in (("\r\n", "↵"), ("\n", "↵"), ("\t", "⇥"), ("    ", "⇥")):
        text = text.replace(blank, mark)
    return "".join(char if char.isprintable() else _NO_CHARACTER for char in text)
