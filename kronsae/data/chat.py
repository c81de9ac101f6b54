"""Conversations as the language model's chat template renders them, and whose tokens count.

The template's own tokens are told from those of a message's content by where the content stands in
the rendered text. So any template will do, also one without `{% generation %}` marks.
"""

import re
from functools import lru_cache
from typing import Any

from kronsae.data.common import digest, reason
from kronsae.data.document import Message
from kronsae.errors import InputError, warn

DATE = {"d": "26", "b": "Jul", "B": "July", "m": "07", "Y": "2024", "y": "24", "A": "Friday"}
"""What templates are told of the date, by strftime's letters: a text is the same on every day.

It is the date that Llama's template has where it is told none.
"""

STRFTIME_NOW = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('%{letter}', '{text}')" for letter, text in DATE.items())
    + " }}{% endmacro %}"
)

STAND_IN = "\ue000{}\ue001"
"""Stands for the content of a message, by its number, where a template is rendered without it."""

STAND_INS = re.compile("\ue000([0-9]+)\ue001")

ROLE_SEQUENCES = 1024
"""Sequences of roles whose rendering without contents is kept."""


class ChatTemplate:
    """The chat template of a tokenizer, and the roles whose messages are trained on.

    roles: names, separated by commas; "" for all.
    Raises InputError if there is no template, or if the tokenizer does not say where in a text its
    tokens are.
    """

    def __init__(self, tokenizer: Any, roles: str = "") -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(
                "the model's tokenizer has no chat template, by which messages become text: name a "
                "model that was trained on conversations, or a column of text by --text-column"
            )
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(
                "the model's tokenizer does not say where in a text its tokens are, so the chat "
                "template's own tokens cannot be left out: name a column of text by --text-column"
            )
        self.tokenizer = tokenizer
        template = tokenizer.get_chat_template()
        self.template = STRFTIME_NOW + template if "strftime_now" in template else template
        self.digest = digest(template)
        self.roles = {role.strip() for role in roles.split(",")} if roles else set()
        self.seen: set[str] = set()
        """Roles of all messages so far."""
        self.problem: str | None = None
        """Why the first conversation that was left out was."""
        self._literals = lru_cache(ROLE_SEQUENCES)(self._render_literals)

    def tokens(self, messages: list[Message]) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation, and which of them are content that is trained on.

        None of a conversation that the template refuses: a warning tells of the first one.
        """
        self.seen |= {message["role"] for message in messages}
        try:
            text = self._render(messages)
            spans = self._spans(text, messages)
        except Exception as error:  # of jinja, and whatever the template's code raises
            self._leave_out("is left out", reason(error))
            return [], []
        chosen = bytearray(len(text))
        for start, stop, number in spans:
            if not self.roles or messages[number]["role"] in self.roles:
                chosen[start:stop] = b"\1" * (stop - start)
        encoded = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        # A token that ends in a content is part of it, also if it begins before (with a blank).
        kept = [a < b and chosen[b - 1] == 1 for a, b in encoded["offset_mapping"]]
        return encoded["input_ids"], kept

    def _leave_out(self, what: str, why: str) -> None:
        if self.problem is None:
            self.problem = why
            warn(f"a conversation, or a message of it, {what}, as may be others ({why})")

    def _render(self, messages: list[Message]) -> str:
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.template, tokenize=False
        )

    def _render_literals(self, roles: tuple[str, ...]) -> list[str]:
        """What the template writes before each message: a text, the message's number, a text, …"""
        messages = [
            {"role": role, "content": STAND_IN.format(number)} for number, role in enumerate(roles)
        ]
        return STAND_INS.split(self._render(messages))

    def _spans(self, text: str, messages: list[Message]) -> list[tuple[int, int, int]]:
        """Start, stop and message of each content in a rendered text, in their order.

        A template may trim a content, or cut a part out of it. A message that is not found is not
        trained on.
        """
        literals = self._literals(tuple(message["role"] for message in messages))
        at, spans = 0, []
        for place in range(0, len(literals) - 1, 2):
            literal, number, following = literals[place : place + 3]
            content = messages[int(number)]["content"]
            forms = (content, content.strip(), content.rstrip(), content.lstrip())
            start = stop = -1
            if text.startswith(literal, at):
                start = at + len(literal)
                form = next((form for form in forms if text.startswith(form, start)), None)
                if form is not None:
                    stop = start + len(form)
                elif following:
                    stop = text.find(following, start)
            if stop < 0:  # the template writes something else beside this content
                start = text.find(content.strip(), at)
                stop = start + len(content.strip())
            if start < 0:
                self._leave_out(
                    "is not trained on", "the chat template does not render it as it is"
                )
                continue
            spans.append((start, stop, int(number)))
            at = stop
        return spans
