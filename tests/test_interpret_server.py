"""A server of chat completions that misbehaves: every request ends soon, in little memory, with an
answer or an InputError; the answers before can be read again; and the key goes to nobody else.
"""

import base64
import contextlib
import email.utils
import gzip
import html
import json
import os
import re
import socket
import threading
import time
import urllib.parse
from concurrent.futures import CancelledError, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from kronsae import InputError
from kronsae.interpret import Answers, Reply, ServerChat, chat

KEY = "sk-SECRET-123"
QUESTION = [{"role": "user", "content": "what is it?"}]
PROTOCOL = "chat-completions protocol"


def completion(content, **more) -> bytes:
    return json.dumps({"choices": [{"message": {"content": content}}], **more}).encode()


class Server(ThreadingHTTPServer):
    """Answers each POST by `behave`, which is given the handler of the request."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave = None
        self.keys: list[str | None] = []
        """The key that came with each request."""
        self.written = 0
        """Bytes of the last `endless` reply that the client took."""
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.keys.append(self.headers["Authorization"])
        self.close_connection = True
        with contextlib.suppress(OSError):  # the client has hung up
            self.server.behave(self)

    def do_GET(self):
        self.server.keys.append(self.headers["Authorization"])
        self.reply(b'{"data": [{"id": "a\\n\\u001b[1m"}, {"id": "%s"}]}' % KEY.encode())

    def reply(self, body: bytes, status: int = 200, **headers: str):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def endless(self, start: bytes, piece: bytes, pause: float):
        """Pieces, for a minute: a client that waits for their end would be seen."""
        self.wfile.write(start)
        self.server.written = 0
        end = time.monotonic() + 60
        while time.monotonic() < end:
            self.wfile.write(piece)
            self.server.written += len(piece)
            time.sleep(pause)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def servers():
    """One that is asked, and another one."""
    both = Server(), Server()
    yield both
    for each in both:
        each.shutdown()
        each.server_close()


@pytest.fixture
def server(servers, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")  # as from a file
    monkeypatch.setattr(chat, "WAIT_S", 0.0)
    monkeypatch.setattr(chat, "TIMEOUT_S", 0.5)
    for each in servers:
        each.keys.clear()
    return servers[0]


def body(content: bytes, status: int = 200, **headers):
    return lambda handler: handler.reply(content, status, **headers)


def raw(content: bytes):
    return lambda handler: handler.wfile.write(content)


HEAD = b"HTTP/1.1 200 OK\r\n"
LONG = HEAD + b"Content-Length: 734003200\r\n\r\n"

ANSWERED = {
    "an answer": (body(completion("fine")), "fine"),
    "other ends of lines": (body(completion("a\u2028b\x85c\x0bd\x1ce\x0cf\rg")), None),
    "half a surrogate pair": (body(completion("x \ud800 y")), "x ? y"),
    "parts": (
        body(completion([{"type": "text", "text": "h"}, {"type": "text", "text": "i"}])),
        "hi",
    ),
    "other parts": (
        body(completion([{"type": "thinking"}, {"type": "text", "text": "hi"}])),
        "hi",
    ),
    "no content": (body(completion(None)), ""),
    "usage that is a list": (body(completion("x", usage=[1])), "x"),
    "usage that is infinite": (
        body(completion("x", usage={"prompt_tokens": 1}).replace(b": 1}", b": 1e999}")),
        "x",
    ),
    "usage of odd types": (
        body(completion("x", usage={"prompt_tokens": "9", "completion_tokens": -3})),
        "x",
    ),
    "usage beyond all tokens": (body(completion("x", usage={"prompt_tokens": 2**80})), "x"),
    "another status of success": (body(completion("x"), 201), "x"),
    "the key": (body(completion(f"It is {KEY}.")), "It is (the key)."),
    "more than was asked for": (
        body(completion("x" * 10**6)),
        "x" * 10 * chat.TOKEN_CHARACTERS,
    ),
}
"""What the server does, and the text that comes of it; None: what was sent."""

REFUSED = {
    "a number for content": (body(completion(5)), PROTOCOL),
    "parts that are none": (body(completion([3])), PROTOCOL),
    "parts in parts": (body(completion([{"type": "text", "text": ["x"]}])), PROTOCOL),
    "null": (body(b"null"), PROTOCOL),
    "a list": (body(b"[]"), PROTOCOL),
    "an error as an answer": (body(json.dumps({"error": KEY}).encode()), r"\(the key\)"),
    "status 400": (body(b"boom \x1b[31m " + KEY.encode(), 400), r"400 boom  \[31m \(the key\)"),
    "status 401": (body(KEY.encode() * 40, 401), r"401 \(the key\)\(the key\)"),
    "status 404": (body(b"boom \x9b31m \x07", 404), "404 boom"),
    "a redirect to another host": (None, "302 .it points to http"),
    "700 MB": (
        lambda handler: handler.endless(LONG, bytes(1 << 20), 0),
        "more than 4,194,304 bytes",
    ),
}
"""What the server does, and what the message says after one request."""

REPEATED = {
    "HTML": (body(b"<html>"), "JSONDecodeError"),
    "deep JSON": (body(b"[" * 200_000 + b"]" * 200_000), "RecursionError"),
    "bytes that are no text": (body(b'{"choices": "\xff\xfe"}'), "UnicodeDecodeError"),
    "a number too long": (body(b'{"choices": %s}' % (b"1" * 5000)), "ValueError"),
    "gzip that was not asked for": (
        body(gzip.compress(completion("x")), Content_Encoding="gzip"),
        "Error",
    ),
    "status 500": (body(b"boom \x1b[31m " + KEY.encode(), 500), r"500 boom  \[31m \(the key\)"),
    "status 429": (body(b"slow down", 429), "429 slow down"),
    "a cut connection": (raw(HEAD + b"Content-Length: 1000\r\n\r\n{"), "RemoteProtocolError"),
    "no reply": (raw(b""), "RemoteProtocolError"),
    "a bad chunk": (raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"), "RemoteProtocolError"),
    "a bad status line": (raw(b"NONSENSE %s\r\n\r\n" % KEY.encode()), r"NONSENSE \(the key\)"),
    "a long header": (raw(HEAD + b"X: " + b"a" * 200_000 + b"\r\n\r\n"), "RemoteProtocolError"),
    **{
        f"Retry-After: {value}": (body(b"slow down", 429, Retry_After=value), "429 slow down")
        for value in (
            *("0", "-1", "nan", "inf", "1e300", "86400", "soon", "1" * 5000),
            "Thu, 01 Jan 1970 00:00:00 GMT",
            *("Fri, 31 Dec 9999 23:59:59 GMT", "Mon, 01 Jan 0001 00:00:00 -2359"),
        )
    },
}
"""What the server does, and what the message says after chat.ATTEMPTS requests."""

SLOW = {
    "a dripping reply": lambda handler: handler.endless(LONG, b" ", 0.02),
    "a dripping header": lambda handler: handler.endless(HEAD + b"X: ", b" ", 0.02),
    "a promise of more": lambda handler: handler.endless(b"", b"HTTP/1.1 100 x\r\n\r\n", 0.02),
    "silence": lambda handler: handler.endless(b"", b"", 0.02),
}


@pytest.fixture
def ask(server, tmp_path):
    """The answer or the message, within five seconds, and that answers can be read again."""

    def ask(behave) -> Reply | str:
        server.behave = behave
        path = tmp_path / "answers.jsonl"
        found = ServerChat(server.url, "m")
        started = time.monotonic()
        try:
            Answers(found, path).ask(QUESTION, 10, latent=1)
        except InputError as error:
            assert str(error).isprintable() and not path.exists()
            result = str(error)
        else:
            again = Answers(Server, path)  # which would fail if it were asked
            again.chat = found
            server.behave = None
            again.ask(QUESTION, 10)
            [result] = again.used.values()
            assert KEY not in path.read_text(encoding="utf-8")
        assert time.monotonic() - started < 5
        assert KEY not in str(result)
        return result

    return ask


@pytest.mark.parametrize("case", ANSWERED)
def test_what_is_an_answer_is_kept(case, ask):
    behave, expected = ANSWERED[case]
    reply = ask(behave)
    assert reply.text == (expected if expected is not None else "a\u2028b\x85c\x0bd\x1ce\x0cf\rg")
    assert reply.prompt_tokens == reply.completion_tokens == 0


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_none_is_said_at_once(case, ask, server, servers):
    behave, words = REFUSED[case]
    elsewhere = f"{servers[1].url}/chat/completions"
    message = ask(behave or body(b"", 302, Location=elsewhere))
    assert re.search(words, message), message
    assert len([key for key in server.keys if key]) <= 2  # the request, and its list of models
    assert not servers[1].keys
    assert server.written < 2**26


@pytest.mark.one_in(4)
@pytest.mark.parametrize("case", REPEATED)
def test_what_may_pass_is_asked_again(case, ask, server):
    behave, words = REPEATED[case]
    message = ask(behave)
    assert f"did not answer in {chat.ATTEMPTS} attempts" in message
    assert re.search(words, message), message
    assert "its models: a [1m, (the key)" in message
    assert server.keys == [f"Bearer {KEY}"] * (chat.ATTEMPTS + 1)


@pytest.mark.parametrize("case", SLOW)
def test_a_reply_that_never_ends_is_given_up(case, ask, server):
    message = ask(SLOW[case])
    assert "did not answer in 2 attempts (no whole reply in 0.5 s)" in message
    assert len(server.keys) == chat.SLOW_ATTEMPTS + 1


def test_after_a_failure_comes_an_answer(server, monkeypatch):
    """It waits as long as the server says, if that is not too long."""
    monkeypatch.setattr(chat, "WAIT_S", 100.0)
    behaviours = [body(b"", 503, Retry_After="0"), body(b"", 429, Retry_After="0.3")]
    behaviours += [body(completion("fine", usage={"prompt_tokens": 7, "completion_tokens": 2}))]
    server.behave = lambda handler: behaviours.pop(0)(handler)
    started = time.monotonic()
    assert ServerChat(server.url, "m").answer(QUESTION, 10) == Reply("fine", 7, 2)
    assert 0.3 <= time.monotonic() - started < 5


def test_abandoned_requests_end_at_once(server, monkeypatch):
    """Whatever they wait for: a silent server, or the list of its models."""
    monkeypatch.setattr(chat, "TIMEOUT_S", 60.0)
    server.behave = SLOW["silence"]
    found = ServerChat(server.url, "m")
    with ThreadPoolExecutor() as pool:
        asked = [pool.submit(found.answer, QUESTION, 10) for _ in range(3)]
        while len(server.keys) < 3:
            time.sleep(0.01)
        started = time.monotonic()
        found.abandon()
        for each in (*asked, pool.submit(found.answer, QUESTION, 10)):
            with pytest.raises(CancelledError):
                each.result()
    assert time.monotonic() - started < 5


def test_dates_and_seconds():
    soon = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 28 < chat._seconds(soon) <= 30
    assert chat._seconds("12.5") == 12.5
    later = email.utils.formatdate(time.time() + 3600)
    before = email.utils.formatdate(time.time() - 3600)
    for value in (None, "", "61", "-1", "inf", "nan", "tomorrow", later, before):
        assert chat._seconds(value) is None, value


def test_nothing_of_a_url_but_its_address(server, monkeypatch):
    for url in (
        *("http://me:hunter2@localhost/v1", "me:hunter2@localhost", "http://h/v1?key=hunter2"),
        *("http://h/v1#hunter2", "ftp://hunter", "http:///v1", "http://[::1", "localhost:80"),
        *("http://h:65536/v1", "https://[::1]:99999999/v1"),
    ):
        with pytest.raises(InputError, match="expected a URL such as") as caught:
            ServerChat(url, "m")
        assert "hunter2" not in str(caught.value)
    monkeypatch.setenv("OPENAI_API_KEY", "secret\nX-Other: 1")
    with pytest.raises(InputError, match="OPENAI_API_KEY: expected") as caught:
        ServerChat(server.url, "m")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["HTTP_PROXY", "https_proxy", "ALL_PROXY"])
def test_a_proxy_that_is_none_is_refused(name, monkeypatch):
    """Before anything is asked, and without its password."""
    monkeypatch.delenv(name.lower(), raising=False)  # which goes before the other
    for proxy in (
        *("http://me:hunter2@127.0.0.1:99999999", "me:hunter2@localhost:65536", "http://[::1"),
        *("http://me:hunter2#3@h:1", "http://me:hunter2/3@h:1", "gopher://me:hunter2@h"),
    ):
        monkeypatch.setenv(name, proxy)
        with pytest.raises(InputError, match=f"{name.upper()}: expected a URL such as") as caught:
            ServerChat("http://localhost:8000/v1", "m")
        assert "hunter2" not in str(caught.value)
    for proxy in ("", "http://me:hunter2@127.0.0.1:65535", "localhost:3128", "socks5h://h:1"):
        monkeypatch.setenv(name, proxy)
        ServerChat("http://localhost:8000/v1", "m")


def spellings(key: str) -> list[str]:
    """A key as servers, proxies and pages of errors repeat it."""
    as_json = json.dumps(key)[1:-1]
    quoted = urllib.parse.quote(key, safe="")
    encoded = [
        encode(f"{before}{key}{after}".encode()).decode()
        for before in ("", "u", "u:", "Bearer ")
        for after in ("", "x", "xy")
        for encode in (base64.b64encode, base64.urlsafe_b64encode)
    ]
    return [
        *(key, repr(key), as_json, as_json.replace("/", "\\/"), json.dumps(as_json)),
        "".join(f"\\u{ord(each):04X}" for each in key),
        *(quoted, quoted.lower(), urllib.parse.quote(quoted, safe="")),
        *(html.escape(key), html.escape(html.escape(key))),
        "".join(f"&#{ord(each)};" for each in key),
        "".join(f"&#x{ord(each):X};" for each in key),
        *encoded,
        *(urllib.parse.quote(each, safe="") for each in encoded),
        *(each.replace("/", "\\/") for each in encoded),
    ]


def test_no_spelling_of_the_key_is_shown_or_kept(server, monkeypatch, tmp_path):
    key = "sk-ab/cd+EF=<&'\"\\?>>~~~zz9=="
    monkeypatch.setenv("OPENAI_API_KEY", key)
    found = ServerChat(server.url, "m")
    for number, spelling in enumerate(spellings(key)):
        server.behave = body(completion(f"[{spelling}]"))
        answers = Answers(found, tmp_path / f"{number}.jsonl")
        text = answers.ask(QUESTION, 100)
        assert re.fullmatch(r"\[.{,8}\(the key\).{,10}\]", text), (spelling, text)
        assert json.loads(answers.path.read_bytes())["text"] == text
    for spelling in spellings(key)[::5]:
        server.behave = body(spelling.encode(), 400, Location=f"/?k={spelling}")
        with pytest.raises(InputError, match=r"400 .*\(the key\).*points to /.k=.*\(the key\)"):
            found.answer(QUESTION, 10)
    text = "a + b / c = d, %2B, &amp; and aGVsbG8gd29ybGQ="
    server.behave = body(completion(text))
    assert found.answer(QUESTION, 100).text == text


def test_a_word_that_is_no_secret_stays(server, monkeypatch):
    """Local servers take any key, and people give x."""
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    server.behave = body(completion("a box"))
    assert ServerChat(server.url, "m").answer(QUESTION, 10).text == "a box"


def test_no_host_answers(server, monkeypatch):
    """A connection that is never made takes CONNECT_S, not TIMEOUT_S."""
    monkeypatch.setattr(chat, "TIMEOUT_S", 60.0)
    monkeypatch.setattr(chat, "CONNECT_S", 0.1)
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        with contextlib.ExitStack() as waiting:  # until the queue takes no more
            for _ in range(3):
                other = waiting.enter_context(socket.socket())
                other.setblocking(False)
                other.connect_ex(full.getsockname())
            time.sleep(0.1)
            with pytest.raises(InputError, match="did not answer in 5 attempts .ConnectTimeout"):
                ServerChat(f"http://127.0.0.1:{full.getsockname()[1]}/v1", "m").answer(QUESTION, 1)


# The file of answers, whoever answers


class Counting:
    """Answers "reply N" to the N-th call, the first of which take longest."""

    name = "counting"

    def __init__(self):
        self.calls = 0
        self._lock = threading.Lock()

    def answer(self, messages, max_tokens):
        with self._lock:
            self.calls += 1
            number = self.calls
        time.sleep(0.05 / number)
        return Reply(f"reply {number}", 1, 1)


def test_who_asks_the_same_at_once_gets_the_same(tmp_path):
    """One answer is paid and kept, whichever thread is first; and the next run has it."""
    answers = Answers(counting := Counting(), tmp_path / "a.jsonl")
    got: list[list[str]] = [[] for _ in range(8)]

    def ask_all(into: list[str]):
        for number in range(5):
            messages = [{"role": "user", "content": f"question {number}"}]
            into.append(answers.ask(messages, 10, latent=number))

    threads = [threading.Thread(target=ask_all, args=(each,)) for each in got]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counting.calls == answers.asked == 5 and answers.reused == 0
    assert all(each == got[0] for each in got)
    again: list[str] = []
    answers = Answers(counting, tmp_path / "a.jsonl")
    ask_all(again)
    assert again == got[0] and (answers.asked, answers.reused) == (0, 5)


def test_a_full_disk_leaves_the_answers_before(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    answers = Answers(Counting(), path)
    answers.ask(QUESTION, 10)
    before = path.read_bytes()

    class Full:
        """Half of what is written gets there."""

        def __init__(self, *_):
            self.file = os.open(path, os.O_WRONLY | os.O_APPEND)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            os.close(self.file)

        def write(self, data):
            os.write(self.file, data[: len(data) // 2])
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(chat, "open", Full, raising=False)
        with pytest.raises(InputError, match="No space left.*keeps the answers before"):
            answers.ask(QUESTION, 11)
    assert path.read_bytes() == before
    answers.ask(QUESTION, 12)
    assert len(Answers(Counting(), path)._known) == 2


@pytest.mark.parametrize(
    "line",
    [
        *(b"\xff", b"[1]", b"5", b"{}", b"[" * 100_000, b'{"key": 1, "text": "x"}'),
        b'{"key": "k", "text": 5, "prompt_tokens": 1, "completion_tokens": 1}',
        b'{"key": "k", "text": "x", "prompt_tokens": 1e999, "completion_tokens": 1}',
        b'{"key": ["k"], "text": "x", "prompt_tokens": 1, "completion_tokens": 1}',
    ],
)
def test_a_line_that_is_no_answer_is_named(line, tmp_path):
    """And nothing is cut off a file that is of another kind."""
    path = tmp_path / "a.jsonl"
    Answers(Counting(), path).ask(QUESTION, 10)
    content = path.read_bytes() + line + b"\nunfinished"
    path.write_bytes(content)
    with pytest.raises(InputError, match="line 2: expected an answer"):
        Answers(Counting(), path)
    assert path.read_bytes() == content
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        Answers(Counting(), folder)
