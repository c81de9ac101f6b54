"""Documents of a text: strings, arrays of token ids, or the messages of conversations."""

from array import array
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kronsae.errors import InputError

Message = dict[str, str]
"""A message of a conversation: its "role" and its "content"."""

if TYPE_CHECKING:
    Ids = array[int]
else:  # it cannot be subscripted before Python 3.12
    Ids = array

Document = str | Ids | list[Message]
"""An empty one stands for a row without text. (An array takes a tenth of a list's memory.)"""

TEXT, IDS, MESSAGES = "text", "token ids", "messages"
"""Kinds of documents, in words for messages."""

ID = "i"
"""Type code of an array of token ids: 32 bits."""


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
    try:
        return array(ID, value)
    except (TypeError, OverflowError) as error:
        wrong = next((item for item in value if not _is_id(item)), value)
        raise InputError(f"{where}: expected token ids, got {wrong!r:.40}") from error


def _is_id(item: Any) -> bool:
    return isinstance(item, int) and abs(item) < 2**31


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
    if not document or isinstance(document, array):
        return ""
    return "\n".join(message["content"] for message in document)


def as_bytes(document: Any) -> bytes:
    """Bytes that differ between any two documents, also as rows of a column hold them."""
    if not document or isinstance(document, str):
        return (document or "").encode("utf-8", "surrogatepass")
    parts = [(x.get("role"), x.get("content")) if isinstance(x, Mapping) else x for x in document]
    return repr(parts).encode("utf-8", "surrogatepass")


def sizes(documents: Sequence[Document | None]) -> int:
    """Bytes of texts and conversations; the number of token ids."""
    return sum(_size(document) for document in documents if document)


def _size(document: Document) -> int:
    if isinstance(document, array):
        return len(document)
    texts = [document] if isinstance(document, str) else [x for m in document for x in m.values()]
    return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
