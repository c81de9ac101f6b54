"""Automatic interpretation: what is asked, how replies are read, and that it goes on after a stop.

The model that answers here is a table from each token to the next, so that its replies can be read;
what it says about latents means nothing.
"""

import contextlib
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import CancelledError
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kronsae import SAE, InputError, SAEConfig
from kronsae.data import LanguageModel
from kronsae.data.packing import token_mask
from kronsae.interpret import (
    Answers,
    Example,
    LatentExamples,
    LocalChat,
    Reply,
    ServerChat,
    chat,
    collect,
    encoders,
    examples,
    interpret,
    local,
)
from kronsae.interpret.__main__ import _interpret_all, main
from kronsae.interpret.examples import firing_counts
from kronsae.interpret.scoring import (
    AT_ONCE,
    explanation_prompt,
    parse_explanation,
    parse_judgements,
    render,
    score,
    split,
)
from kronsae.metrics.heldout import HeldoutText
from kronsae.system.files import lock

SAYS = ["EXPLANATION:", "words", "[1,0,1,0,1,0,1,0]"]
ANSWER = " ".join(SAYS)


class Letters:
    """Token i is the i-th letter."""

    def decode(self, ids, clean_up_tokenization_spaces):
        return "".join(chr(ord("a") + i) for i in ids)


class Fake:
    """Answers by a function of the messages."""

    name = "fake"

    def __init__(self, function):
        self.function, self.calls = function, []

    def answer(self, messages, max_tokens):
        self.calls.append(messages)
        return Reply(self.function(messages), 10, 2)


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A model of transformers that says ANSWER after "Assistant:"."""
    folder = tmp_path_factory.mktemp("talker")
    words = ["<unk>", "</s>", "Assistant:", *SAYS]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", model_max_length=4096
    )
    made.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}Assistant:"
    size = len(words)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    following = [1, 1, *range(3, size), 1]
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, 8))
        model.lm_head.weight.zero_()
        for token, after in enumerate(following):
            model.lm_head.weight[after, token] += 1
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An SAE of the embedded model that nobody trained."""
    config = SAEConfig(d_model=256, heads=32, m=2, n=4, k=8)
    sae = SAE(config, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.W_enc.mul_(10)
    data = {"model": "embedded", "layer": 2, "context_length": 64, "heldout_tokens": 1024}
    return str(sae.save(tmp_path_factory.mktemp("sae") / "it", {"config": {"data": data}}))


class Server(HTTPServer):
    """Speaks chat completions; `behaviour` may answer otherwise, a status and a body each time."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[dict] = []
        self.headers_seen: list[dict] = []
        self.behaviour: list[tuple[int, dict | bytes]] = []
        self.silent_from: int | None = None
        """Number of the first request that is not answered until `wakes`."""
        self.wakes = threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        assert self.path == "/v1/models"
        data = json.dumps({"data": [{"id": "m"}, {"id": "n"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(body)
        self.server.headers_seen.append(dict(self.headers))
        if len(self.server.seen) == self.server.silent_from:
            self.server.wakes.wait(60)
        status, found = (
            200,
            {
                "choices": [{"message": {"role": "assistant", "content": ANSWER}}],
                "usage": {"prompt_tokens": 20, "completion_tokens": 3},
            },
        )
        if self.path != "/v1/chat/completions":
            status = 404
        elif self.server.behaviour:
            status, found = self.server.behaviour.pop(0)
        data = found if isinstance(found, bytes) else json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Retry-After", "0")
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):  # the client was stopped
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    found = Server()
    yield found
    found.shutdown()
    found.server_close()


# Examples


def test_examples_against_brute_force(monkeypatch):
    """Every context in which a latent fires, and the windows around its strongest tokens."""
    monkeypatch.setattr(examples, "CONTEXT", 40)
    model = LanguageModel.load("embedded")
    ids = torch.randint(1, 3000, (6, 64), generator=torch.Generator().manual_seed(0))
    mask = token_mask(ids, model.tokenizer)
    text = HeldoutText(model, ids, mask, 4, {})
    sae = SAE(SAEConfig(d_model=256, heads=32, m=2, n=4, k=8)).eval()
    x = model.activations(ids)
    with torch.no_grad():
        codes = sae.encode(x[mask])
    z = torch.zeros(6, 64, 256)
    z[mask] = torch.zeros(len(codes.values), 256).scatter(1, codes.indices, codes.values)
    counts = (z > 0).sum((0, 1))
    assert torch.equal(firing_counts(sae, text).counts, counts)
    latents = counts.argsort(descending=True)[:40:8].tolist()
    for found in collect(sae, text, latents):
        expected = []
        for context in range(6):
            for start, stop in ((0, 40), (40, 64)):
                values = z[context, start:stop, found.latent]
                if values.max() > 0:
                    first = max(0, min(int(values.argmax()) - 15, len(values) - 31))
                    window = slice(start + first, min(start + first + 31, stop))
                    expected.append((ids[context, window], z[context, window, found.latent]))
        assert len(found.firing) == len(expected) > 0
        tokens = {tuple(t.tolist()): tuple(v.tolist()) for t, v in expected}
        for each in found.firing:
            assert each.activations == pytest.approx(tokens[each.tokens])
        for each in found.silent:
            assert not any(each.activations)
            rows = ids.unfold(1, len(each.tokens), 1)
            where = (rows == torch.tensor(each.tokens)).all(-1).nonzero()
            assert len(where) and not any(
                z[c, s : s + len(each.tokens), found.latent].any() for c, s in where.tolist()
            )
    # What a latent gets does not depend on the others.
    assert collect(sae, text, latents)[1] == collect(sae, text, latents[1:2])[0]


def test_the_reservoir_is_fair():
    """1,000 times 3 of 10: each about 300 times (standard deviation 14.5)."""
    counts = [0] * 10
    for trial in range(1000):
        reservoir = examples._Reservoir(3, random.Random(trial))
        for item in range(10):
            reservoir.offer(item)
        for item in reservoir.kept:
            counts[item] += 1
    assert sum(counts) == 3000 and all(240 < count < 360 for count in counts)


# Prompts and replies


def example(*activations: float) -> Example:
    return Example(tuple(range(len(activations))), tuple(map(float, activations)))


def test_rendering():
    assert render(example(0, 1, 2, 0, 3), Letters(), marked=True) == "a<<bc>>d<<e>>"
    assert render(example(0, 1, 2, 0, 3), Letters(), marked=False) == "abcde"
    [_, user] = explanation_prompt([example(0, 9, 3), example(0.1, 0, 0)], Letters())
    assert user["content"].splitlines() == [
        *("1. a<<bc>>", "   Strength: 'b' 9, 'c' 3", "2. <<a>>bc", "   Strength: 'a' 1"),
    ]


def test_split():
    firing = [example(0, value) for value in (5, 1, 4, 2, 3)]
    shown, others = split(firing)
    assert [each.peak for each in shown] == [5, 4]  # above the median, 3
    assert [each.peak for each in others] == [1, 2, 3]
    many = [example(0, value) for value in range(1, 201)]
    shown, others = split(many)
    assert [each.peak for each in shown] == list(range(101, 117))
    assert len(others) == 64 and not set(shown) & set(others)
    same = [example(1.0)] * 20
    assert [len(part) for part in split(same)] == [16, 4]
    assert split([]) == ([], [])


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("I think.\nEXPLANATION: names of colours", "names of colours"),
        ("Explanation: a\nEXPLANATION: b ", "b"),
        ("**EXPLANATION:** bold **", "bold"),
        ("**EXPLANATION**: bold", "bold"),
        ("EXPLANATION:\nnext line", None),
        ("EXPLANATION: a\nEXPLANATION: What makes the unit active.", None),
        ("nothing", None),
        ("EXPLANATION: a\x1b[31mb\x9bc\u2028d\u202ee ", "a [31mb c d e"),
        ("", None),
    ],
)
def test_explanations_are_read(reply, expected):
    assert parse_explanation(reply) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("[1, 0, 1]", [True, False, True]),
        ("First [0] and then:\n```json\n[0,0,1]\n```", [False, False, True]),
        ("[1, 0]", None),
        ("[1, 0, 2]", None),
        ("[true, false, true]", None),
        ("[1.0, 0, 1]", None),
        ("[1, 0, 1", None),
        ("[yes, no, yes]", None),
        ("1, 0, 1", None),
        ("", None),
    ],
)
def test_judgements_are_read(reply, expected):
    assert parse_judgements(reply, 3) == expected


def test_score_by_hand():
    found = score([(True, True), (True, True), (True, False), (False, False), (False, True)], 2)
    assert found.true_positive_rate == pytest.approx(2 / 3) and found.true_negative_rate == 0.5
    assert found.score == pytest.approx(7 / 12)
    assert (found.judged, found.discarded) == (5, 2)
    assert score([(True, True)], 0).score is None
    assert score([], 3).score is None


def oracle(messages):
    """Knows that the latent fires on texts that begin with "b", and there on the "b"."""
    if "EXPLANATION" in messages[0]["content"]:
        return "EXPLANATION: texts with b"
    texts = re.findall(r"^\d+\. (.*)$", messages[1]["content"], flags=re.MULTILINE)
    rule = "<<b" if "marked" in messages[0]["content"] else "b"
    return json.dumps([int(text.startswith(rule)) for text in texts])


def latent_examples(firing=30, silent=20) -> LatentExamples:
    fires = [Example((1, 2 + i % 9, 5), (float(i + 1), 0.0, 0.0)) for i in range(firing)]
    return LatentExamples(7, fires, [Example((9, 2 + i % 9, 5), (0.0,) * 3) for i in range(silent)])


def test_an_oracle_scores_one_and_a_stubborn_one_a_half(tmp_path):
    answers = Answers(fake := Fake(oracle), tmp_path / "a.jsonl")
    found = interpret(latent_examples(), Letters(), answers)
    assert found.explanation == "texts with b" and found.firing == 30
    assert found.detection.score == found.fuzzing.score == 1
    # 15 are above the median and shown, so 15 + 20 are judged, in 5 prompts for each task.
    assert found.detection.judged == found.fuzzing.judged == 35
    assert len(fake.calls) == 11 and answers.costs() == {
        **{"calls": 11, "answers_found": 0, "prompt_tokens": 110, "completion_tokens": 22},
    }
    shown = fake.calls[0][1]["content"].count("Strength")
    assert shown == 15
    for messages in fake.calls[1:]:
        assert len(re.findall(r"^\d+\. ", messages[1]["content"], flags=re.M)) <= AT_ONCE

    def always(messages):
        said = oracle(messages)
        return re.sub("0", "1", said) if said.startswith("[") else said

    found = interpret(latent_examples(), Letters(), Answers(Fake(always), tmp_path / "b.jsonl"))
    assert found.detection.score == found.fuzzing.score == 0.5
    assert found.detection.true_negative_rate == 0


def test_fuzzing_marks_as_many_tokens_at_random(tmp_path):
    """Of windows in which the latent is silent, as many as fire in the others, rounded up."""
    fires = [Example((1, 2, 3, 4), (1.0, 1.0, 0.0, 0.0 + i % 2)) for i in range(20)]
    silent = [Example((9, 8, 7, 6), (0.0,) * 4) for _ in range(10)]
    fake = Fake(oracle)
    interpret(LatentExamples(7, fires, silent), Letters(), Answers(fake, tmp_path / "a.jsonl"))
    marked = [m[1]["content"] for m in fake.calls if "marked" in m[0]["content"]]
    lines = [t for t in "\n".join(marked).splitlines() if re.match(r"\d+\. ", t) and "j" in t]
    assert len(lines) == 10
    for line in lines:
        inside = "".join(re.findall(r"<<(.*?)>>", line))
        assert len(inside) == 3
    assert len({line.partition(" ")[2] for line in lines}) > 1


def test_what_cannot_be_read_is_discarded_and_counted(tmp_path):
    def sometimes(messages):
        said = oracle(messages)
        first = "1. b" in messages[1]["content"]
        return "I would rather not." if said.startswith("[") and first else said

    fake = Fake(sometimes)
    found = interpret(latent_examples(), Letters(), Answers(fake, tmp_path / "a.jsonl"))
    sizes = [m[1]["content"].count("\n") for m in fake.calls if "1. b" in m[1]["content"]]
    assert found.detection.discarded > 0 and found.detection.judged < 35 and sizes
    mute = Answers(Fake(lambda _: "no"), tmp_path / "b.jsonl")
    found = interpret(latent_examples(), Letters(), mute)
    assert found.explanation is None and found.detection is None and mute.asked == 1
    found = interpret(LatentExamples(7, [], []), Letters(), mute)
    assert (found.explanation, found.firing, mute.asked) == (None, 0, 1)


# Answers


def test_answers_are_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    first = Answers(Fake(oracle), path)
    whole = interpret(latent_examples(), Letters(), first)
    lines = path.read_bytes().splitlines(keepends=True)
    # Stopped in the middle of the fifth line.
    path.write_bytes(b"".join(lines[:4]) + lines[4][:20])
    second = Answers(fake := Fake(oracle), path)
    assert interpret(latent_examples(), Letters(), second) == whole
    assert len(fake.calls) == second.asked == 7 and second.reused == 4
    assert path.read_bytes() == b"".join(lines)
    assert {**second.costs(), "calls": 11, "answers_found": 0} == first.costs()
    other = Fake(oracle)
    other.name = "another model"
    third = Answers(other, path)
    interpret(latent_examples(), Letters(), third)
    assert third.asked == 11
    path.write_text('{"key": 1}\n')
    with pytest.raises(InputError, match="line 1"):
        Answers(other, path)


def test_results_do_not_depend_on_the_order_of_answers(tmp_path):
    """Eight questions at a time, answered in any order, and a file in any order."""
    latents = [latent_examples(firing=20 + i)._replace(latent=i) for i in range(9)]
    late = random.Random(0)

    def slowly(messages):
        time.sleep(late.random() / 200)
        return oracle(messages)

    def results(name, parallel, function=slowly):
        answers = Answers(Fake(function), tmp_path / name)
        console = Console(quiet=True)
        found = _interpret_all(latents, Letters(), answers, 0, parallel, console)
        return found, sorted((tmp_path / name).read_bytes().split(b"\n"))

    alone = results("alone.jsonl", 1)
    assert results("together.jsonl", 8) == alone
    *lines, _ = (tmp_path / "together.jsonl").read_bytes().split(b"\n")
    late.shuffle(lines)
    (tmp_path / "shuffled.jsonl").write_bytes(b"\n".join([*lines, b""]))
    assert results("shuffled.jsonl", 8, function=None) == alone  # nothing is asked


def test_after_stop_nothing_is_asked(tmp_path):
    def stops(messages):
        answers.stop()  # as Ctrl-C does while a model answers
        return oracle(messages)

    answers = Answers(Fake(stops), tmp_path / "a.jsonl")
    with pytest.raises(CancelledError):
        interpret(latent_examples(), Letters(), answers)
    assert answers.asked == lines(tmp_path, "a.jsonl") == 1  # what was under way is kept


def test_after_stop_no_request_is_repeated(monkeypatch, tmp_path):
    """A server that does not answer is not waited for, four more times."""
    found = ServerChat("http://localhost:9/v1", "m")
    answers = Answers(found, tmp_path / "a.jsonl")

    def refuses(*_, **__):
        answers.stop()
        raise OSError("connection refused")

    monkeypatch.setattr(found, "_exchange", refuses)
    with pytest.raises(CancelledError):
        answers.ask([{"role": "user", "content": "x"}], 3)


# Models that answer


def test_a_local_model_answers(talker):
    found = LocalChat(talker)
    messages = [{"role": "user", "content": "what is it"}]
    assert found.answer(messages, 10) == Reply(ANSWER, 4, 4)  # </s> is written, too
    found.tokenizer.chat_template = None
    assert found.answer(messages, 10) == Reply(ANSWER, 5, 4)
    assert found.answer(messages, 1).text == "EXPLANATION:"
    with pytest.raises(InputError, match="at most 4096"):
        found.answer([{"role": "user", "content": "w " * 4095}], 10)


def test_a_local_model_that_repeats_itself_is_stopped(talker):
    """It says two words in turn, and would go on until it may not."""
    found = LocalChat(talker)
    with torch.no_grad():
        first, second = found.tokenizer.convert_tokens_to_ids(SAYS[:2])
        found.model.lm_head.weight[:, second] = 0
        found.model.lm_head.weight[first, second] = 1
    reply = found.answer([{"role": "user", "content": "what is it"}], 1000)
    assert reply.completion_tokens == local.REPEATED
    assert reply.text.split() == SAYS[:2] * (local.REPEATED // 2)


def test_a_local_model_that_is_abandoned_writes_no_more(talker):
    found = LocalChat(talker)
    found.abandon()
    with pytest.raises(CancelledError):
        found.answer([{"role": "user", "content": "what is it"}], 10)


def test_what_repeats_itself():
    """A piece of any length up to 64 tokens, three times and 32 tokens at least."""
    assert not local.repeats([]) and not local.repeats([1] * 31) and local.repeats([1] * 32)
    for size in (2, 3, 7, 16, 40, 64):
        piece = list(range(size))
        enough = max(32, 3 * size)
        looped = [*range(100, 120), *piece * (32 + 3)][: 20 + enough]
        assert local.repeats(looped) and not local.repeats(looped[:-1]), size
        assert not local.repeats([*looped, -1])
    assert not local.repeats(list(range(65)) * 10)
    judgements = [9, *[1, 5] * 8, 8]  # [1, 1, 1, 1, 1, 1, 1, 1]
    assert not any(local.repeats(judgements[:stop]) for stop in range(len(judgements)))


def test_a_server_answers(server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(chat, "WAIT_S", 0.0)
    found = ServerChat(server.url + "/", "m")
    messages = [{"role": "user", "content": "é"}]
    assert found.answer(messages, 12) == Reply(ANSWER, 20, 3)
    assert server.seen[0]["messages"] == messages
    assert (server.seen[0]["model"], server.seen[0]["max_tokens"]) == ("m", 12)
    assert server.seen[0]["temperature"] == 0 and not server.seen[0]["stream"]
    assert "Authorization" not in server.headers_seen[0]
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    ServerChat(server.url, "m").answer(messages, 12)
    assert server.headers_seen[1]["Authorization"] == "Bearer secret"
    # It recovers from what passes …
    server.behaviour = [(503, {}), (429, {}), (200, b"no json")]
    assert found.answer(messages, 12).text == ANSWER and len(server.seen) == 6
    # … leaves out the prompt that a reply repeats …
    echo = {"choices": [{"message": {"content": "<user>é\n<assistant>é is a letter"}}]}
    server.behaviour = [(200, echo)]
    assert found.answer([{"role": "user", "content": "é\n"}], 12) == Reply(
        "<assistant>é is a letter", 0, 0
    )
    # … gives up in time, and at once on what does not pass.
    server.behaviour = [(500, {"error": "down"})] * chat.ATTEMPTS
    with pytest.raises(InputError, match="5 attempts .*500.*down"):
        found.answer(messages, 12)
    server.behaviour = [(401, {"error": "bad key"})]
    with pytest.raises(InputError, match='401.*bad key"}$'):
        found.answer(messages, 12)
    server.behaviour = [(404, {"error": "no model o"})]
    with pytest.raises(InputError, match='404.*no model o"}; its models: m, n$'):
        ServerChat(server.url, "o").answer(messages, 12)
    server.behaviour = [(200, {"choices": []})]
    with pytest.raises(InputError, match="chat-completions"):
        found.answer(messages, 12)
    with pytest.raises(InputError, match="expected a URL"):
        ServerChat("localhost:8000", "m")


def test_no_server(monkeypatch):
    monkeypatch.setattr(chat, "WAIT_S", 0.0)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        with pytest.raises(
            InputError, match="did not answer in 5 attempts .ConnectError: [^()]*.$"
        ):
            ServerChat(url, "m").answer([], 1)
        with pytest.raises(InputError, match="did not answer .*begin with …/v1"):
            ServerChat(url[:-3], "m").answer([], 1)


def test_encoders_for_delphi(folder):
    x = torch.randn(2, 5, 256)
    [(name, encode)] = encoders({"layers.2": folder}).items()
    dense = encode(x)
    assert name == "layers.2" and dense.shape == (2, 5, 256)
    assert not dense[:, 0].any()
    from kronsae import load

    with torch.no_grad():
        codes = load(folder).encode(x)
    expected = torch.zeros(2, 5, 256).scatter(-1, codes.indices, codes.values)
    torch.testing.assert_close(dense[:, 1:], expected[:, 1:])


# Command line


def test_both_routes_and_a_restart(folder, talker, server, tmp_path, capsys):
    out = tmp_path / "local"
    flags = [folder, "--latents", "3", "--explainer", talker]
    assert main([*flags, "--out", str(out)]) == 0
    capsys.readouterr()
    local = json.loads((out / "interpretation.json").read_text())
    assert local["summary"]["explained"] == 3 and local["summary"]["detection_scored"] == 3
    lines = (out / "answers.jsonl").read_text().splitlines()
    assert len(lines) == local["costs"]["calls"] > 6
    for each in local["latents"]:
        for task in ("detection", "fuzzing"):
            assert 0 <= each[task]["score"] <= 1
            # Replies hold eight judgements: the rest of an uneven number is discarded.
            assert each[task]["judged"] % 8 == 0
    assert main([*flags, "--out", str(out)]) == 0
    again = json.loads((out / "interpretation.json").read_text())
    assert again["latents"] == local["latents"] and again["costs"]["calls"] == 0
    assert again["costs"]["answers_found"] == len(lines)
    assert f"0 calls ({len(lines)} answers were there already)" in capsys.readouterr().out
    assert (out / "answers.jsonl").read_text().splitlines() == lines

    out = tmp_path / "server"
    flags = [folder, "--latents", "3", "--server", server.url, "--server-model", "m"]
    assert main([*flags, "--out", str(out)]) == 0
    found = json.loads((out / "interpretation.json").read_text())
    assert found["latents"] == local["latents"]  # which says the same
    assert found["costs"]["prompt_tokens"] == 20 * len(server.seen) == 20 * len(lines)
    printed = capsys.readouterr().out
    assert "latent  detection  fuzzing  explanation" in printed and "words" in printed
    latents = [str(each["latent"]) for each in found["latents"]]
    flags[1:3] = ["--latent", *latents[:2]]
    assert main([*flags, "--out", str(out)]) == 0
    found = json.loads((out / "interpretation.json").read_text())
    assert found["latents"] == local["latents"][:2] and found["costs"]["calls"] == 0


def test_one_command_at_a_time_writes_to_a_folder(folder, server, tmp_path, capsys):
    """A second one would ask, and pay for, everything again."""
    flags = [folder, "--latents", "1", "--server", server.url, "--server-model", "m", "--out"]
    held = lock(tmp_path, "")
    try:
        assert main([*flags, str(tmp_path)]) == 2
    finally:
        held.release()
    assert "is in use: another process writes" in capsys.readouterr().err
    assert not server.seen and not (tmp_path / "answers.jsonl").exists()
    assert main([*flags, str(tmp_path)]) == 0
    lock(tmp_path, "").release()


@pytest.mark.slow
def test_a_second_stop_does_not_wait_for_a_silent_server(folder, server, tmp_path):
    server.silent_from = 3
    flags = [folder, "--latents", "3", "--server", server.url, "--server-model", "m", "--out"]
    command = [sys.executable, "-m", "kronsae.interpret", *flags, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        while process.poll() is None and (len(server.seen) < 3 or lines(tmp_path) < 2):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said = iter(process.stdout.readline, "")
        assert any("Stopping, once what was asked is answered" in line for line in said)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=20)[0]
    finally:
        process.kill()
        server.wakes.set()
    assert "keeps 2 new answers" in output and "Stopped by SIGTERM" in output
    assert process.returncode == 128 + signal.SIGTERM and lines(tmp_path) == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "give --explainer"),
        (["--explainer", "x", "--server", "http://y"], "give --explainer"),
        (["--server", "http://y"], "go together"),
        (["--explainer", "./none"], "there is no such folder"),
        (["--explainer", "x", "--parallel", "2"], "no effect"),
        (["--explainer", "TALKER", "--latent", "999"], "expected 0 to 255"),
        (["--explainer", "TALKER", "--latent", "1", "--latents", "2"], "not allowed with"),
        (["--explainr", "x"], "did you mean --explainer"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_work_is_said(folder, talker, tmp_path, capsys, flags, words):
    flags = [talker if flag == "TALKER" else flag for flag in flags]
    assert main([folder, *flags, "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and words in captured.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_server_of_transformers(folder, talker, tmp_path):
    """`transformers serve`, as people run it (needs transformers[serving]), and kill -9 midway."""
    for package in ("fastapi", "uvicorn", "openai", "pydantic", "accelerate"):
        pytest.importorskip(package)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", program, "serve", talker, "--port", str(port)]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        for _ in range(120):
            assert process.poll() is None, (tmp_path / "log").read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        flags = [folder, "--latents", "3", "--server", f"http://127.0.0.1:{port}/v1"]
        flags += ["--server-model", talker, "--parallel", "2", "--out"]
        assert main([*flags, str(tmp_path / "whole")]) == 0
        out = tmp_path / "killed"
        command = [sys.executable, "-m", "kronsae.interpret", *flags, str(out)]
        killed = subprocess.Popen(command)
        while lines(out) < 5 and killed.poll() is None:
            time.sleep(0.002)
        killed.kill()
        assert killed.wait(30) == -signal.SIGKILL
        there = lines(out)
        assert not (out / "interpretation.json").exists()
        assert main([*flags, str(out)]) == 0
    finally:
        process.terminate()
        process.wait(30)
    whole, found = (
        json.loads((each / "interpretation.json").read_text()) for each in (tmp_path / "whole", out)
    )
    assert whole["summary"]["explained"] == whole["summary"]["detection_scored"] == 3
    assert found["latents"] == whole["latents"]
    costs, again = whole["costs"], found["costs"]
    assert again["answers_found"] == there and again["calls"] == costs["calls"] - there > 0
    assert again["prompt_tokens"] == costs["prompt_tokens"] > 100
    assert again["completion_tokens"] == costs["completion_tokens"] == 4 * costs["calls"]


def lines(out, name="answers.jsonl") -> int:
    """Whole lines of a folder's answers."""
    path = out / name
    return path.read_bytes().count(b"\n") if path.exists() else 0
