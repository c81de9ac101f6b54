"""A language model that answers, loaded here."""

import threading
from concurrent.futures import CancelledError
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kronsae.data.loading import load_config, load_model, load_tokenizer, quiet
from kronsae.errors import InputError
from kronsae.interpret.chat import Messages, Reply

REPEATED = 32
"""Fewest tokens that make a loop; a list of eight judgements is shorter."""

LONGEST_PERIOD = 64
"""Tokens of the longest piece whose repetition is seen."""


class LocalChat:
    """A `transformers` generation model, greedy. Without a chat template it reads plain text.

    An answer ends where it has begun to repeat itself (`repeats`).
    Raises InputError as `LanguageModel.load` does, and for prompts longer than the model reads.
    """

    def __init__(
        self,
        name: str,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.name = name
        common: dict[str, Any] = {"revision": None, "trust_remote_code": False}
        with quiet():
            config = load_config(name, **common)
            self.tokenizer = load_tokenizer(name, common)
            model, absent = load_model(name, config, dtype, common, device)
        if absent or not hasattr(model, "generate"):
            raise InputError(
                f"model {name!r} cannot generate text: it has no trained head for that"
            )
        self.model: Any = model.eval()
        self._abandoned = threading.Event()

    @torch.no_grad()
    def answer(self, messages: Messages, max_tokens: int) -> Reply:
        with quiet():  # transformers goes by the tokenizer's limit, the check below by the model's
            ids = torch.tensor([self._tokens(messages)], device=self.model.device)
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if longest and ids.shape[1] + max_tokens > longest:
            raise InputError(
                f"model {self.name!r} reads at most {longest} tokens; this prompt and its answer "
                f"need {ids.shape[1] + max_tokens}: take a model with longer contexts, or fewer "
                "examples"
            )
        tokenizer = self.tokenizer
        pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        with quiet():
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                stopping_criteria=[partial(self._ends, ids.shape[1])],
                pad_token_id=next(pad for pad in pads if pad is not None),
                use_cache=True,
            )[0, ids.shape[1] :]
        text = tokenizer.decode(out, skip_special_tokens=True)
        return Reply(text, ids.shape[1], len(out))

    def abandon(self) -> None:
        self._abandoned.set()

    def _ends(self, start: int, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Whether what follows `start` tokens `repeats`, asked after each token: [1]."""
        if self._abandoned.is_set():
            raise CancelledError
        return torch.tensor([repeats(ids[0, start:].tolist())], device=ids.device)

    def _tokens(self, messages: Messages) -> list[int]:
        if getattr(self.tokenizer, "chat_template", None):
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        parts = [f"{part['role'].capitalize()}: {part['content']}" for part in messages]
        return self.tokenizer("\n\n".join([*parts, "Assistant:"]))["input_ids"]


def repeats(tokens: list[int]) -> bool:
    """Whether tokens end in a piece of up to LONGEST_PERIOD, three times, and REPEATED tokens."""

    def has_period(size: int) -> bool:
        end = tokens[-max(REPEATED, 3 * size) :]
        return len(end) >= max(REPEATED, 3 * size) and end[size:] == end[:-size]

    return any(map(has_period, range(1, LONGEST_PERIOD + 1)))
