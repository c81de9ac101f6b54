"""Language models that answer: a server's; and the file that keeps what any of them said."""

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import re
import threading
import time
from collections import defaultdict
from concurrent.futures import CancelledError, Future
from email.utils import parsedate_to_datetime
from functools import cache
from html.entities import html5
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.request import getproxies

import httpx2

from kronsae.errors import InputError

Messages = list[dict[str, str]]
"""[{"role": "system" | "user" | "assistant", "content": text}, …]"""

ATTEMPTS = 5
"""How often a request is made before a failing server is given up."""

WAIT_S = 2.0
"""Seconds before the second attempt; doubled before each later one."""

LONGEST_WAIT_S = 60.0
"""A server's Retry-After counts up to here: after a longer one WAIT_S does."""

TIMEOUT_S = 300.0
"""Seconds from the start of a request to the last byte of its reply."""

CONNECT_S = 10.0
"""Seconds of these until there is a connection."""

SLOW_ATTEMPTS = 2
"""How often a request is made that takes longer than TIMEOUT_S."""

REPLY_BYTES = 4 * 2**20
"""Longest reply that is read."""

TOKEN_CHARACTERS = 16
"""An answer is cut after so many characters for each token that it may have."""

SECRET_CHARACTERS = 8
"""A shorter key (EMPTY, x) is no secret, and may be a word of an answer."""

QUOTED_CHARACTERS = 300
"""Longest part of a reply that an error message quotes."""

PASSING = (408, 409, 425, 429, 500, 502, 503, 504)
"""Statuses after which another attempt may work."""

_FAILURES = (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError, ImportError, RecursionError)
"""No connection, no HTTP, no JSON, or one deeper than Python goes; a proxy of a wrong kind."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]+")
"""What can move a terminal's cursor, break or turn a line, or is half a character."""


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

    def abandon(self) -> None:
        """Let answers that are under way, and later ones, raise CancelledError soon."""


def one_line(text: str) -> str:
    """A text of a model or a server as it can be printed: control characters become spaces."""
    return _CONTROL.sub(" ", text).strip()


class ServerChat:
    """A server that speaks OpenAI's chat-completions protocol, greedy.

    url: its base, as http://localhost:8000/v1. The environment variable OPENAI_API_KEY, if there is
    one, is sent to it as the caller's key. The key goes nowhere else: redirects are not followed,
    and where the server repeats it, it is taken out.
    Requests that fail for a passing reason are made ATTEMPTS times, until `stopped` is set.
    Raises InputError if the server refuses, cannot be reached, or answers something else; and for
    a proxy in the environment that is none.
    """

    def __init__(self, url: str, model: str) -> None:
        _check_url(url)
        _check_proxies()
        self.url = url.rstrip("/")
        self.model = model
        self.name = model  # a server may come back at another port
        self._key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise InputError("OPENAI_API_KEY: expected letters, digits and signs of ASCII alone")
        self._secret = _spellings(self._key) if len(self._key) >= SECRET_CHARACTERS else None
        self.stopped = threading.Event()
        self._abandoned = threading.Event()
        self._requests: set[Future[Any]] = set()

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
            text = _text_of(reply["choices"][0]["message"]["content"])
            usage = reply.get("usage")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise InputError(
                f"{self.url} did not answer as the chat-completions protocol says: "
                f"{self._shown(json.dumps(reply, ensure_ascii=False))}"
            ) from None
        # `transformers serve` repeats the prompt, if its chat template is not the family's own.
        if prompt := messages[-1]["content"]:
            text = text.rpartition(prompt)[2]
        text = self._without_key(text)[: max_tokens * TOKEN_CHARACTERS]
        return Reply(text, _count(usage, "prompt_tokens"), _count(usage, "completion_tokens"))

    def abandon(self) -> None:
        self.stopped.set()
        self._abandoned.set()
        for request in tuple(self._requests):
            request.cancel()

    def _post(self, body: dict[str, Any]) -> Any:
        """The JSON value that answers `body`, after as many attempts as that takes."""
        slow = 0
        for attempt in range(ATTEMPTS):
            try:
                return self._attempt(body)
            except _Passing as failure:
                slow += failure.slow
                if attempt == ATTEMPTS - 1 or slow == SLOW_ATTEMPTS:
                    hint = self._hint(not_there=True)
                    raise InputError(
                        f"{self.url} did not answer in {attempt + 1} attempts ({failure}){hint}"
                    ) from None
                wait = WAIT_S * 2**attempt if failure.wait is None else failure.wait
            if self.stopped.wait(wait):
                raise CancelledError

    def _attempt(self, body: dict[str, Any]) -> Any:
        """The JSON value that answers `body`. Raises _Passing where it may come another time."""
        try:
            status, headers, content = self._exchange("chat/completions", TIMEOUT_S, body)
            answered = 200 <= status < 300
            if answered and len(content) <= REPLY_BYTES:
                return json.loads(content)
        except asyncio.TimeoutError:  # before Python 3.11 a class of its own
            raise _Passing(f"no whole reply in {TIMEOUT_S:g} s", slow=True) from None
        except _FAILURES as error:
            raise _Passing(self._shown(f"{type(error).__name__}: {error}")) from None
        if answered:
            raise InputError(f"{self.url} sent a reply of more than {REPLY_BYTES:,} bytes")
        why = self._shown(f"{status} {content.decode(errors='replace')}")
        if status in PASSING:
            raise _Passing(why, _seconds(headers.get("Retry-After")))
        if target := headers.get("Location"):
            why += f" (it points to {self._shown(target)}: is that the server's address?)"
        raise InputError(f"{self.url} refused: {why}{self._hint(status in (404, 405))}")

    def _exchange(self, path: str, seconds: float, body: Any = None) -> tuple[int, Any, bytes]:
        """Status, headers and body of the answer to a GET, or to a POST of a JSON value.

        Of a body longer than REPLY_BYTES only little more is read.
        Raises asyncio.TimeoutError or one of _FAILURES; CancelledError after `abandon`.
        """
        whole = asyncio.wait_for(self._transfer(path, body), seconds)
        request = asyncio.run_coroutine_threadsafe(whole, _loop())
        self._requests.add(request)
        try:
            if self._abandoned.is_set():
                request.cancel()
            return request.result()
        finally:
            self._requests.discard(request)

    async def _transfer(self, path: str, body: Any) -> tuple[int, Any, bytes]:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        method, sent = ("GET", None) if body is None else ("POST", json.dumps(body).encode())
        content = bytearray()
        timeout = httpx2.Timeout(None, connect=CONNECT_S)
        async with (
            httpx2.AsyncClient(timeout=timeout, follow_redirects=False) as client,
            client.stream(method, f"{self.url}/{path}", content=sent, headers=headers) as response,
        ):
            async for part in response.aiter_raw():  # what is compressed has no bounds
                content += part
                if len(content) > REPLY_BYTES:
                    break
        return response.status_code, response.headers, bytes(content)

    def _hint(self, not_there: bool) -> str:
        """End of an error message: the server's models if ours is not one, or a hint at its URL."""
        try:
            _, _, content = self._exchange("models", 5)
            names = [str(model["id"]) for model in json.loads(content)["data"]]
        except (asyncio.TimeoutError, *_FAILURES, KeyError, TypeError):
            usual = self.url.endswith("/v1") or not not_there
            return "" if usual else "; do its addresses begin with …/v1?"
        unknown = names and self.model not in names
        return f"; its models: {self._shown(', '.join(names[:10]))}" if unknown else ""

    def _shown(self, text: str) -> str:
        """What the server said, as a message can quote it."""
        return one_line(self._without_key(text))[:QUOTED_CHARACTERS]

    def _without_key(self, text: str) -> str:
        return self._secret.sub("(the key)", text) if self._secret else text


class _Passing(Exception):
    """An attempt failed, and another one may not.  wait: seconds that the server asked for."""

    def __init__(self, why: str, wait: float | None = None, *, slow: bool = False) -> None:
        super().__init__(why)
        self.wait, self.slow = wait, slow


def _spellings(key: str) -> re.Pattern[str]:
    """What matches a key, as it is or escaped, and base64 of texts that hold it.

    Each character may be escaped as in JSON, in a URL or in HTML, also several times.
    """

    def escaped(character: str) -> str:
        code = f"{ord(character):02x}"
        names = [name.rstrip(";") for name, value in html5.items() if value == character]
        references = "|".join([f"#0{{,8}}{ord(character)}", f"#x0{{,8}}{code}", *names])
        return (
            rf"(?:\\{{,8}}{re.escape(character)}|\\{{1,8}}(?:u00|x){code}"
            rf"|%(?:25){{,3}}{code}|&(?:amp;){{,3}}(?:{references});?)"
        )

    def in_base64(start: int) -> str:
        """Base64 of the key, `start` bytes after a multiple of three: what is the key's alone."""
        whole = base64.b64encode(bytes(start) + key.encode()).decode()
        own = whole[-(-start * 8 // 6) : (start + len(key)) * 8 // 6]
        edge = "[a-z0-9+/_-]{,4}"
        url_safe = {"+": f"(?:{escaped('+')}|-)", "/": f"(?:{escaped('/')}|_)"}
        return edge + "".join(url_safe.get(each, each) for each in own) + edge

    plain = "".join(map(escaped, key))
    return re.compile("|".join([plain, *map(in_base64, range(3))]), re.IGNORECASE)


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """An event loop in a thread: only a coroutine can be ended whatever it is waiting for."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="requests", daemon=True).start()
    return loop


def _check_url(url: str) -> None:
    """Raise InputError if this is no server's base URL, without the password that it may hold."""
    example = "server: expected a URL such as http://localhost:8000/v1"
    if set("@?#") & set(url):
        raise InputError(
            f"{example}, without user, password and query; a key goes into OPENAI_API_KEY"
        )
    try:
        parsed = _parsed(url)
    except httpx2.InvalidURL as error:
        raise InputError(f"{example}, got {url!r:.200} ({error})") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InputError(f"{example}, got {url!r}")


def _check_proxies() -> None:
    """Raise InputError if the environment names a proxy that is none, without its password."""
    proxies = getproxies()
    for kind in ("http", "https", "all"):
        if proxy := proxies.get(kind):
            try:
                httpx2.Proxy(_parsed(proxy if "://" in proxy else f"http://{proxy}"))
            except (httpx2.InvalidURL, ValueError):
                raise InputError(
                    f"{kind.upper()}_PROXY: expected a URL such as http://localhost:3128, with a "
                    "port up to 65535; in a password, / ? # @ and : are written as in URLs (%2F …)"
                ) from None


def _parsed(url: str) -> httpx2.URL:
    """The parts of a URL. Raises InvalidURL, also for a port beyond what a socket takes."""
    parsed = httpx2.URL(url)
    if (parsed.port or 0) > 65535:
        raise httpx2.InvalidURL("a port is at most 65535")
    return parsed


def _seconds(retry_after: str | None) -> float | None:
    """Seconds of a Retry-After header, a number or a date; None if it is none or too long."""
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, TypeError, IndexError, OverflowError, OSError):
            return None
    return seconds if 0 <= seconds <= LONGEST_WAIT_S else None


def _text_of(content: Any) -> str:
    """The text of a message, which may be none or in parts. Raises TypeError for anything else."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part["type"] == "text")
    if not isinstance(content, str | None):
        raise TypeError
    return content or ""


def _count(usage: Any, name: str) -> int:
    """A number of tokens, 0 if the server gives none that is one."""
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if type(value) is int and 0 <= value < 2**53 else 0


class Answers:
    """A chat whose answers are kept in a file, so that no question is asked twice.

    Each line of the JSONL file is an answer, under a digest of the model's name and the question.
    Several threads of one process may ask; after `stop` none gets an answer that has still to be
    asked for.
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
        self._asking: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._stopped = threading.Event()
        self._read()

    def ask(self, messages: Messages, max_tokens: int, **about: Any) -> str:
        """The answer to the messages.  about: what else its line shall say (JSON values).

        Raises CancelledError after `stop`, unless the answer is there.
        """
        question = json.dumps([self.chat.name, messages, max_tokens])
        key = hashlib.sha256(question.encode()).hexdigest()
        with self._lock:
            own = self._asking[key]
        with own:  # who asks the same gets the same answer
            reply = self._known.get(key)
            if reply is None:
                reply = self._ask(key, messages, max_tokens, about)
            else:
                with self._lock:
                    self.reused += key not in self.used
            self.used[key] = reply
        return reply.text

    def _ask(self, key: str, messages: Messages, max_tokens: int, about: dict[str, Any]) -> Reply:
        if self._stopped.is_set():
            raise CancelledError
        reply = self.chat.answer(messages, max_tokens)
        # Half a surrogate pair cannot be written.
        reply = reply._replace(text=reply.text.encode(errors="replace").decode())
        line = json.dumps({"key": key, **about, **reply._asdict()}, ensure_ascii=False) + "\n"
        with self._lock:
            self._append(line.encode())
            self.asked += 1
            self._known[key] = reply
        return reply

    def _append(self, line: bytes) -> None:
        """Write a line, or nothing of it. Raises InputError for an error of the disk."""
        try:
            with open(self.path, "ab") as file:
                file.write(line)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, self._size)
            raise InputError(
                f"{self.path} could not be written ({error}); it keeps the answers before"
            ) from error
        self._size += len(line)

    def stop(self) -> None:
        """Ask no more; answers that are under way are still kept."""
        self._stopped.set()
        if isinstance(self.chat, ServerChat):
            self.chat.stopped.set()

    def abandon(self) -> None:
        """Ask no more, and end the answers that are under way."""
        self.stop()
        self.chat.abandon()

    def costs(self) -> dict[str, int]:
        """Calls and tokens: asked this time, found in the file, and both together in tokens."""
        return {
            "calls": self.asked,
            "answers_found": self.reused,
            "prompt_tokens": sum(reply.prompt_tokens for reply in self.used.values()),
            "completion_tokens": sum(reply.completion_tokens for reply in self.used.values()),
        }

    def _read(self) -> None:
        try:
            content = self.path.read_bytes() if self.path.exists() else b""
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {error}") from error
        *lines, unfinished = content.split(b"\n")  # an answer may hold other ends of lines
        for number, line in enumerate(lines, 1):
            try:
                answer = json.loads(line.decode())
                reply = Reply(*(answer[name] for name in Reply._fields))
                if [type(value) for value in (answer["key"], *reply)] != [str, str, int, int]:
                    raise TypeError
            except (ValueError, KeyError, TypeError, RecursionError):
                raise InputError(
                    f"{self.path}, line {number}: expected an answer; without that line the others "
                    "can be read"
                ) from None
            self._known[answer["key"]] = reply
        self._size = len(content) - len(unfinished)
        if unfinished:  # a line that was being written when everything stopped
            os.truncate(self.path, self._size)
