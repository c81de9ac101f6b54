"""The served explorer: its answers against `kronsae.language_model`, and whom it refuses."""

import json
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.cookiejar import CookieJar
from urllib.error import HTTPError

import pytest
import torch
from test_features import TEXTS, folder, lm, make, sae  # noqa: F401  # fixtures

from kronsae import InputError
from kronsae.explore.__main__ import work
from kronsae.explore.serve import MAX_BODY, Answers, bound, serve
from kronsae.interventions import ablate, steer
from kronsae.properties.labels import Label, read_labels

PAGE = "<!doctype html><title>served</title>"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("run") / "labels.json"


@pytest.fixture(scope="module")
def address(lm, file):  # noqa: F811
    """The address that `serve` says, of a server that runs until the process ends."""
    pytest.importorskip("uvicorn")
    said: list[str] = []
    there = threading.Event()

    def say(text):
        said.append(text)
        there.set()

    answers = Answers(lm, {5: Label("names", "a model", 0.5)}, file)
    with bound("127.0.0.1", 0) as door:
        args = (PAGE, answers, door, say)
        threading.Thread(target=serve, args=args, daemon=True).start()
        assert there.wait(60)
        yield said[0].splitlines()[-1]


class Visitor:
    """A browser's requests, with cookies."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.base = address.partition("/?")[0]
        jar = urllib.request.HTTPCookieProcessor(CookieJar())
        self.open = urllib.request.build_opener(jar).open

    def visit(self, address=None, **headers):
        request = urllib.request.Request(address or self.address, headers=headers)
        with self.open(request, timeout=60) as response:
            return response.read().decode()

    def post(self, name, value, **headers):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        headers = {"Content-Type": "application/json"} | headers
        with self.open(
            urllib.request.Request(f"{self.base}/{name}", data, headers), timeout=60
        ) as response:
            return json.load(response)

    def refused(self, *args, **kwargs):
        """Status and error of a post that is refused."""
        with pytest.raises(HTTPError) as caught:
            self.post(*args, **kwargs)
        body = caught.value.read().decode()
        return caught.value.code, json.loads(body)["error"] if body.startswith("{") else body


@pytest.fixture
def visitor(address):
    known = Visitor(address)
    assert known.visit() == PAGE
    return known


def test_the_features_of_a_text(visitor, lm):  # noqa: F811
    features = lm.features(TEXTS[0])
    answer = visitor.post("ask", {"text": TEXTS[0]})
    assert answer["tokens"] == features.tokens and answer["kept"] == features.kept.tolist()
    dense = torch.zeros(len(features), 40)
    for token, active in enumerate(answer["features"]):
        values = [value for _, value in active]
        assert values == sorted(values, reverse=True)
        for latent, value in active:
            dense[token, latent] = value
    torch.testing.assert_close(dense, features.to_dense())


def test_generations_side_by_side(visitor, lm):  # noqa: F811
    edits = [
        {"latent": 7, "kind": "steer", "value": 500.0},
        {"latent": 3, "kind": "ablate", "value": 0},
    ]
    asked = {"prompt": TEXTS[0], "edits": edits, "new_tokens": 6}
    answer = visitor.post("generate", asked)
    assert answer["plain"]["text"] == lm.generate(TEXTS[0], 6)
    with lm.edit([steer(7, 500.0), ablate(3)]):
        assert answer["edited"]["text"] == lm.generate(TEXTS[0], 6)
        expected = lm.next_tokens(TEXTS[0], 5)
    token, probability = answer["edited"]["next"][0]
    assert token == expected["token"][0]
    assert probability == pytest.approx(expected["probability"][0])


def test_ablations_of_the_factors(visitor, lm):  # noqa: F811
    latent = int(lm.features(TEXTS[0]).strongest(1).index[0])
    answer = visitor.post("ablate", {"text": TEXTS[0], "latent": latent})
    assert answer["fires"] == pytest.approx(lm.features(TEXTS[0]).of(latent).tolist())
    assert list(answer["next"]) == ["nothing", "base", "extension", "composition"]
    with lm.silence(latent, "base"):
        expected = lm.next_tokens(TEXTS[0], 5)["probability"].tolist()
    assert [p for _, p in answer["next"]["base"]] == pytest.approx(expected)
    assert answer["next"]["base"] != answer["next"]["nothing"]


def test_labels_are_kept(visitor, file):
    before = json.loads(visitor.visit(f"{visitor.base}/labels"))
    assert before == {"5": {"text": "names", "by": "a model", "detection": 0.5}}
    assert visitor.post("labels", {"labels": {"3": "<b>", "4": ""}}) == {"saved": 2}
    assert read_labels(file, 40, None) == {3: Label("<b>"), 5: Label("names", "a model", 0.5)}
    assert visitor.post("labels", {"labels": {"5": ""}}) == {"saved": 1}
    assert json.loads(visitor.visit(f"{visitor.base}/labels")) == {"3": {"text": "<b>"}}
    for labels, message in (
        ({"x": "names"}, "numbers of latents"),
        ({"40": "names"}, "0 to 39"),
        ({"4": 3}, "labels"),
    ):
        code, error = visitor.refused("labels", {"labels": labels})
        assert code == 400 and message in error
    assert read_labels(file, 40, None) == {3: Label("<b>")}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ask", {}, "text"),
        ("ask", {"text": 3}, "text"),
        ("ask", {"text": "w1 " * 30_000}, "characters"),
        ("ask", {"text": "w1 " * 200}, "128"),
        ("ask", b"{", "Expecting"),
        ("ask", b"[" * 100_000, "recursion"),
        ("generate", {"prompt": TEXTS[0], "edits": [], "new_tokens": 10**6}, "new_tokens"),
        ("generate", {"prompt": TEXTS[0], "edits": [{}]}, "edits"),
        (
            "generate",
            {"prompt": TEXTS[0], "edits": [{"latent": 99, "kind": "steer", "value": 1}]},
            "expected 0 to 39",
        ),
        (
            "generate",
            {"prompt": TEXTS[0], "edits": [{"latent": 9, "kind": "eval", "value": 1}]},
            "steer, clamp, ablate",
        ),
        (
            "generate",
            b'{"prompt": "w1 w2", "edits": [{"latent": 1, "kind": "steer", "value": NaN}]}',
            "finite",
        ),
        (
            "generate",
            {"prompt": TEXTS[0], "edits": [{"latent": 9, "kind": "steer", "value": 1e30}]},
            "ten times the latent's own maximum",
        ),
        ("generate", {"prompt": "w1 " * 120, "edits": [], "new_tokens": 9}, "at most 7, got 9"),
        ("ablate", {"text": TEXTS[0], "latent": -1}, "expected 0 to 39"),
        ("ask", {"text": "w1 " * 600}, "expected at most 128 tokens, got 601"),
    ],
)
def test_what_is_refused(visitor, name, value, message):
    code, error = visitor.refused(name, value)
    assert code == 400 and message in error


def test_strangers_are_refused(address, visitor):
    stranger = Visitor(address)
    assert stranger.refused("ask", {"text": TEXTS[0]})[0] == 403
    with pytest.raises(HTTPError, match="403"):
        stranger.visit(f"{stranger.base}/?token=wrong")
    with pytest.raises(HTTPError, match="403"):
        stranger.visit(stranger.base)
    elsewhere = {"Origin": "http://elsewhere.example"}
    assert visitor.refused("ask", {"text": TEXTS[0]}, **elsewhere)[0] == 403
    assert visitor.refused("ask", {"text": TEXTS[0]}, Host="elsewhere.example")[0] == 400
    assert visitor.refused("ask", {"text": "x"}, **{"Content-Type": "text/plain"})[0] == 415
    code, error = visitor.refused("ask", b" " * (2 * MAX_BODY))
    assert code == 413 and "expected at most" in error


def test_an_address_that_is_taken(address):
    """It is said before anything is loaded."""
    port = address.partition("/?")[0].rpartition(":")[2]
    with pytest.raises(InputError, match=f"127.0.0.1, port {port}"):
        work(["nowhere", "--serve", "--port", port])


def test_labels_do_not_wait_for_the_model(visitor, lm, monkeypatch):  # noqa: F811
    computes, go_on, ask = threading.Event(), threading.Event(), lm.features

    def features(text):
        computes.set()
        assert go_on.wait(60)
        return ask(text)

    monkeypatch.setattr(lm, "features", features)
    with ThreadPoolExecutor() as pool:
        asked = [pool.submit(visitor.post, "ask", {"text": text}) for text in TEXTS[:2]]
        try:
            assert computes.wait(60)
            assert visitor.post("labels", {"labels": {}})["saved"] >= 0
            assert not any(answer.done() for answer in asked)
        finally:
            go_on.set()
    assert all(answer.result()["tokens"] for answer in asked)


def test_an_address_for_others(lm, tmp_path, monkeypatch, capsys):  # noqa: F811
    """0.0.0.0 is none: this machine's own is said."""
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: None)
    answers, said = Answers(lm, {}, tmp_path / "labels.json"), []
    with bound("0.0.0.0", 0) as door:
        serve(PAGE, answers, door, said.append)
        port = door.getsockname()[1]
    found = re.search(rf"http://(.+):{port}/\?token=\S+$", said[0])
    assert found and found[1] != "0.0.0.0"
    assert "other machines can connect" in capsys.readouterr().err


STOPPED = """
import threading, types
from kronsae.commandline import exit_status
from kronsae.explore.serve import Answers, bound, serve
class Slow(Answers):
    def __init__(self): self.known = {}
    def ask(self, request): print("computes", flush=True); threading.Event().wait(600)
def work(argv):
    with bound("127.0.0.1", 0) as door:
        serve("page", Slow(), door, lambda text: print(text.splitlines()[-1], flush=True))
exit(exit_status(work, []))
"""


def test_ctrl_c_while_the_model_computes():
    """It ends at once, whoever waits, and without a traceback."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with (
        subprocess.Popen([sys.executable, "-c", STOPPED], **pipes) as process,
        ThreadPoolExecutor() as pool,
    ):
        try:
            visitor = Visitor(process.stdout.readline().strip())
            visitor.visit()
            asked = [pool.submit(visitor.post, "ask", {}) for _ in range(2)]
            assert process.stdout.readline() == "computes\n"
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
        finally:
            process.kill()
        assert process.stderr.read() == "Stopped by SIGINT\n"
    assert all(isinstance(each.exception(), OSError) for each in asked)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--serve", "--out", "page.html"], "--out has no effect with --serve"),
        (["--serve", "--feature", "3"], "--feature has no effect with --serve"),
        (["--port", "8000"], "--port has no effect without --serve"),
        (["--host", "0.0.0.0"], "--host has no effect without --serve"),
    ],
)
def test_flags_that_do_not_go_together(flags, message):
    with pytest.raises(InputError, match=message):
        work(["runs/nowhere", *flags])
