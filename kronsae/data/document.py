"""Documents of a text: strings, lists of token ids, or the messages of conversations."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from kronsae.errors import InputError

Message = dict[str, str]
"""A message of a conversation: its "role" and its "content"."""

Document = str | list[int] | list[Message]
"""An empty one stands for a row without text."""

TEXT, IDS, MESSAGES = "text", "token ids", "messages"
"""Kinds of documents, in words for messages."""

LARGEST_ID = 2**31 - 1


def kind_of_value(value: Any) -> str | None:
    """The kind of a column that holds this value; None if it is no document, or if it is empty."""
    if isinstance(value, str):
        return TEXT
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, Mapping):
        return MESSAGES if {"role", "content"} <= first.keys() else None
    return IDS if type(first) is int else None


def as_document(value: Any, where: str, kind: str | None = None) -> Document:
    """The document that a row of a column holds; "" for null and for white space.

    Of messages only role and content are kept.
    kind: of the column, if it is known.  Raises InputError, which begins with `where`.
    """
    if value is None:
        return ""
    if isinstance(value, str) and kind in (None, TEXT):
        return "" if value.isspace() else value
    if not isinstance(value, list) or kind == TEXT:
        got = f"{type(value).__name__} {value!r:.40}"
        raise InputError(f"{where}: expected {kind or TEXT}, got {got}")
    if (kind or kind_of_value(value)) == MESSAGES:
        return [_message(item, where) for item in value]
    for item in value:
        if type(item) is not int or not 0 <= item <= LARGEST_ID:
            raise InputError(f"{where}: expected token ids, got {item!r:.40}")
    return value


def _message(value: Any, where: str) -> Message:
    role, content = (
        (value.get("role"), value.get("content")) if isinstance(value, Mapping) else (None, None)
    )
    if not isinstance(role, str) or not isinstance(content, str | None):
        raise InputError(
            f"{where}: expected messages with a role and a content that are text, got {value!r:.80}"
        )
    return {"role": role, "content": content or ""}


def as_text(document: Document | None) -> str:
    """The document's text; "" for token ids."""
    if isinstance(document, str):
        return document
    if not document or isinstance(document[0], int):
        return ""
    return "\n".join(message["content"] for message in document)  # type: ignore[index]


def as_bytes(document: Document | None) -> bytes:
    """Bytes that differ between any two documents."""
    text = document or ""
    text = text if isinstance(text, str) else json.dumps(text)
    return text.encode("utf-8", "surrogatepass")


def size_of(document: Document | None) -> int:
    """Bytes of a text or of a conversation; the number of token ids."""
    if not document:
        return 0
    if isinstance(document, str):
        return len(document.encode("utf-8", "surrogatepass"))
    return sum(map(_size_of_item, document))


def _size_of_item(item: int | Message) -> int:
    return 1 if isinstance(item, int) else sum(len(text.encode()) for text in item.values())


def sizes(documents: Sequence[Document | None]) -> int:
    return sum(map(size_of, documents))
