"""Language models that answer: one loaded here, or a server's; and a file of their answers."""

import hashlib
import json
import os
import threading
import urllib.error
import urllib.request
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch

from kronsae.data.loading import load_config, load_model, load_tokenizer, quiet
from kronsae.errors import InputError

Messages = list[dict[str, str]]
"""[{"role": "system" | "user" | "assistant", "content": text}, …]"""

ATTEMPTS = 5
"""How often a request is made before a failing server is given up."""

WAIT_S = 2.0
"""Seconds before the second attempt; doubled before each later one."""

TIMEOUT_S = 300.0

PASSING = (408, 409, 425, 429, 500, 502, 503, 504)
"""Statuses after which another attempt may work."""


class Reply(NamedTuple):
    """An answer, and what it cost."""

    text: str
    prompt_tokens: int
    completion_tokens: int


class Chat(Protocol):
    """A language model that answers messages, the same way each time."""

    name: str
    """Identifies the model in the file of answers."""

    def answer(self, messages: Messages, max_tokens: int) -> Reply: ...


class LocalChat:
    """A `transformers` generation model, greedy. Without a chat template it reads plain text.

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
            model, absent = load_model(name, config, dtype, common)
        if absent or not hasattr(model, "generate"):
            raise InputError(
                f"model {name!r} cannot generate text: it has no trained head for that"
            )
        self.model: Any = cast(Any, model).to(device).eval()

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
                pad_token_id=next(pad for pad in pads if pad is not None),
                use_cache=True,
            )[0, ids.shape[1] :]
        text = tokenizer.decode(out, skip_special_tokens=True)
        return Reply(text, ids.shape[1], len(out))

    def _tokens(self, messages: Messages) -> list[int]:
        if getattr(self.tokenizer, "chat_template", None):
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        parts = [f"{part['role'].capitalize()}: {part['content']}" for part in messages]
        return self.tokenizer("\n\n".join([*parts, "Assistant:"]))["input_ids"]


class ServerChat:
    """A server that speaks OpenAI's chat-completions protocol, greedy.

    url: its base, as http://localhost:8000/v1. The environment variable OPENAI_API_KEY, if there is
    one, is sent as the caller's key, and never written down.
    Requests that fail for a passing reason are made ATTEMPTS times, until `stopped` is set.
    Raises InputError if the server refuses, cannot be reached, or answers something else.
    """

    def __init__(self, url: str, model: str) -> None:
        if not url.startswith(("http://", "https://")):
            raise InputError(
                f"server: expected a URL such as http://localhost:8000/v1, got {url!r}"
            )
        self.url = url.rstrip("/")
        self.model = model
        self.name = model  # a server may come back at another port
        self.key = os.environ.get("OPENAI_API_KEY")
        self.stopped = threading.Event()

    def answer(self, messages: Messages, max_tokens: int) -> Reply:
        body = {
            "model": self.model,
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": False,
        }
        reply = self._post(body)
        try:
            text = reply["choices"][0]["message"]["content"]
            usage = reply.get("usage") or {}
            tokens = [int(usage.get(f"{part}_tokens") or 0) for part in ("prompt", "completion")]
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise InputError(
                f"{self.url} did not answer as the chat-completions protocol says: {reply!r:.300}"
            ) from error
        # `transformers serve` repeats the prompt, if its chat template is not the family's own.
        return Reply((text or "").rpartition(messages[-1]["content"])[2], *tokens)

    def _request(self, path: str, body: Any = None) -> urllib.request.Request:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        return urllib.request.Request(f"{self.url}/{path}", data, headers)

    def _post(self, body: dict[str, Any]) -> Any:
        request = self._request("chat/completions", body)
        for attempt in range(ATTEMPTS):
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                    return json.loads(response.read())
            except urllib.error.HTTPError as error:
                why = f"{error.code} {error.reason}: {error.read()[:300].decode(errors='replace')}"
                if error.code not in PASSING:
                    hint = self._hint(error.code in (404, 405))
                    raise InputError(f"{self.url} refused: {why}{hint}") from error
            except (OSError, ValueError) as error:  # no connection, a timeout, no JSON
                why = f"{type(error).__name__}: {error}"
            if attempt < ATTEMPTS - 1 and self.stopped.wait(WAIT_S * 2**attempt):
                raise CancelledError
        hint = self._hint(not_there=True)
        raise InputError(f"{self.url} did not answer in {ATTEMPTS} attempts ({why}){hint}")

    def _hint(self, not_there: bool) -> str:
        """End of an error message: the server's models if ours is not one, or a hint at its URL."""
        try:
            with urllib.request.urlopen(self._request("models"), timeout=5) as response:
                names = [model["id"] for model in json.loads(response.read())["data"]]
        except (OSError, ValueError, KeyError, TypeError):
            usual = self.url.endswith("/v1") or not not_there
            return "" if usual else "; do its addresses begin with …/v1?"
        unknown = names and self.model not in names
        return f"; its models: {', '.join(names[:10])}" if unknown else ""


class Answers:
    """A chat whose answers are kept in a file, so that no question is asked twice.

    Each line of the JSONL file is an answer, under a digest of the model's name and the question.
    Several threads may ask; after `stop` none gets an answer that has still to be asked for.
    Raises InputError for a file that holds something else.
    """

    def __init__(self, chat: Chat, path: Path) -> None:
        self.chat, self.path = chat, path
        self.asked = self.reused = 0
        """Calls of the model, and answers found in the file."""
        self.used: dict[str, Reply] = {}
        """Answers that were needed, by digest: their tokens are the whole cost."""
        self._known: dict[str, Reply] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._read()

    def ask(self, messages: Messages, max_tokens: int, **about: Any) -> str:
        """The answer to the messages.  about: what else its line shall say (JSON values).

        Raises CancelledError after `stop`, unless the answer is there.
        """
        question = json.dumps([self.chat.name, messages, max_tokens])
        key = hashlib.sha256(question.encode()).hexdigest()
        with self._lock:
            reply = self._known.get(key)
            if reply is not None:
                self.reused += key not in self.used
                self.used[key] = reply
                return reply.text
        if self._stopped.is_set():
            raise CancelledError
        reply = self.chat.answer(messages, max_tokens)
        line = json.dumps({"key": key, **about, **reply._asdict()}, ensure_ascii=False) + "\n"
        with self._lock:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line)
            self.asked += 1
            self._known[key] = self.used[key] = reply
        return reply.text

    def stop(self) -> None:
        """Ask no more; answers that are under way are still kept."""
        self._stopped.set()
        if isinstance(self.chat, ServerChat):
            self.chat.stopped.set()

    def costs(self) -> dict[str, int]:
        """Calls and tokens: asked this time, found in the file, and both together in tokens."""
        return {
            "calls": self.asked,
            "answers_found": self.reused,
            "prompt_tokens": sum(reply.prompt_tokens for reply in self.used.values()),
            "completion_tokens": sum(reply.completion_tokens for reply in self.used.values()),
        }

    def _read(self) -> None:
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):  # a line that was being written when everything stopped
            os.truncate(self.path, whole)
        for number, line in enumerate(content[:whole].decode().splitlines(), 1):
            try:
                answer = json.loads(line)
                self._known[answer["key"]] = Reply(*(answer[name] for name in Reply._fields))
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{self.path}, line {number}: expected an answer") from error
