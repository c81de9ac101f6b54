"""Activations that another process sends: frames of safetensors from a socket or standard input."""

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import safetensors.torch
import torch

import kronsae
from kronsae.config import DataConfig
from kronsae.data.frames import (
    MAX_FRAME_BYTES,
    Disconnected,
    FrameActivations,
    connect,
    read_frames,
    send,
)
from kronsae.errors import InputError, Notice
from kronsae.train import main as train

X = torch.randn(3000, 16, generator=torch.Generator().manual_seed(0))


def sent(*frames, end=True):
    stream = io.BytesIO()
    for frame in frames:
        send(stream, *(frame if isinstance(frame, tuple) else (frame,)))
    if end:
        send(stream, None)
    return stream.getvalue()


def framed(data):
    return len(data).to_bytes(8, "little") + data


def with_header(header, size):
    """A frame whose header is a JSON value, before `size` bytes."""
    text = json.dumps(header).encode()
    return framed(len(text).to_bytes(8, "little") + text + bytes(size))


def source(data, heldout=100, **more):
    config = DataConfig(activations="stdin:", heldout_tokens=heldout, buffer_tokens=512)
    return FrameActivations(io.BytesIO(data), config, 64, 0, **more)


@contextmanager
def sender(data, times=1):
    """The port of a server that sends `data` to whoever connects."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            for _ in range(times):
                connection, _ = server.accept()
                with connection:
                    connection.sendall(data)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        thread.join(10)
        assert not thread.is_alive()


def flags(activations, out, *more):
    return [
        *("--activations", activations, "--encoder", "dense", "--dict-size", "64", "--k", "4"),
        *("--batch-size", "200", "--heldout-tokens", "500", "--buffer-tokens", "1000"),
        *("--tokens", "2000", "--device", "cpu", "--out", str(out), *more),
    ]


def test_frames_are_what_was_sent():
    parts = X.split([1000, 1, 1999])
    frames = list(read_frames(io.BytesIO(sent(*(part.bfloat16() for part in parts)))))
    assert torch.equal(torch.cat([x for [x] in frames]), X.bfloat16())
    [[x, y]] = read_frames(io.BytesIO(sent((X, X[:, :5]))))
    assert torch.equal(x, X) and torch.equal(y, X[:, :5])


def test_a_frame_is_a_length_and_a_file():
    data = safetensors.torch.save({"activations": X, "tokens": torch.arange(3000)})
    [[x]] = read_frames(io.BytesIO(len(data).to_bytes(8, "little") + data + bytes(8)))
    assert torch.equal(x, X)


def test_the_first_rows_are_held_out_and_each_other_row_comes_once():
    activations = source(sent(*X.split(70)))
    assert torch.equal(activations.heldout_activations(), X[:100])
    assert (activations.d_model, activations.d_target) == (16, 0)
    batches = [batch.clone() for batch in activations]
    assert {len(batch) for batch in batches[:-1]} == {64}
    rows = torch.cat(batches)
    assert not torch.equal(rows, X[100:])
    assert torch.equal(rows[rows[:, 0].argsort()], X[100:][X[100:, 0].argsort()])


def test_a_target_is_shuffled_with_its_input():
    activations = source(sent((X, 2 * X[:, :3])))
    assert (activations.d_model, activations.d_target) == (16, 3)
    for batch in activations:
        assert torch.equal(batch[:, 16:], 2 * batch[:, :3])


def test_the_order_goes_on_in_the_same_stream_sent_again():
    data = sent(*X.split(70))
    first = source(data)
    batches = iter(first)
    for _ in range(5):
        next(batches)
    state, expected = first.state_dict(), next(batches).clone()
    again = source(data)
    again.load_state_dict(state)
    assert torch.equal(next(iter(again)), expected)
    assert again.describe() == first.describe()
    assert source(sent(X + 1)).describe() != first.describe()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (framed(b"12345678" * 2), r"frame 0: expected a header of safetensors"),
        ((MAX_FRAME_BYTES + 1).to_bytes(8, "little"), r"frame 0: expected 9 to .* bytes"),
        ((2**64 - 1).to_bytes(8, "little"), r"frame 0: expected 9 to .* bytes"),
        (framed(b"\x05" + bytes(7) + b"{{{{{"), r"frame 0"),
        (with_header([], 8), r"frame 0: header"),
        (with_header({"x": {"shape": [1, 1], "dtype": "F32"}}, 8), r"'activations' is missing"),
        (with_header({"activations": {"shape": [2], "dtype": "F32"}}, 8), r"expected \[r, d\]"),
        (with_header({"activations": {"shape": [2, 1], "dtype": "I64"}}, 16), r"expected \[r, d\]"),
        (
            with_header({"activations": {"shape": [2, 2**40], "dtype": "F32"}}, 8),
            r"expected \[r, d\]",
        ),
        (with_header({"activations": {"shape": [-2, 2], "dtype": "F32"}}, 8), r"a row for each"),
        (
            with_header({"activations": {"shape": [2**20, 2**20], "dtype": "F32"}}, 8),
            r"does not fit in 8 bytes",
        ),
        (
            with_header(
                {
                    "activations": {"shape": [2, 1], "dtype": "F32", "data_offsets": [0, 8]},
                    "target": {"shape": [3, 1], "dtype": "F32", "data_offsets": [8, 20]},
                },
                20,
            ),
            r"target: expected a row for each activation",
        ),
        (
            with_header(
                {"activations": {"shape": [2, 1], "dtype": "F32", "data_offsets": [4, 12]}}, 12
            ),
            r"not in safetensors format",
        ),
        (sent(X, X[:, :5]), r"frame 1: expected widths \[16\] as before, got \[5\]"),
    ],
)
def test_frames_of_another_kind_are_refused(data, message):
    with pytest.raises(InputError, match=message):
        list(read_frames(io.BytesIO(data)))


@pytest.mark.parametrize("count", [0, 3, 8, 12, 500, -8])
def test_a_stream_that_breaks_off_is_no_end(count):
    data = sent(X)
    with pytest.raises(Disconnected, match="gone, without a frame of length 0 to end them"):
        list(read_frames(io.BytesIO(data[:count])))


def test_a_sender_that_goes_away_ends_the_data():
    with pytest.raises(Disconnected):
        source(sent(X[:50], end=False))
    with pytest.warns(Notice, match=r"frame 2: the sender of activations is gone"):
        activations = source(sent(*X[:300].split(150), end=False) + b"123")
    assert sum(len(batch) for batch in activations) == 200


def test_too_few_rows_to_hold_out():
    with pytest.raises(InputError, match=r"100 rows came, no more than the 100 to be held out"):
        source(sent(X[:100]))


@pytest.mark.parametrize("address", ["", "9000x", "host", "host:0", "host:70000", "host:²"])
def test_addresses(address):
    with pytest.raises(InputError, match=r"expected socket:HOST:PORT or socket:PORT"):
        connect(address)


def test_nothing_answers():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(InputError, match="nothing answers there .*: start what sends"):
        connect(f"127.0.0.1:{port}")


def test_a_run_from_a_socket_and_its_resume(tmp_path, capsys):
    data, run = sent(*X.split(100)), tmp_path / "run"
    with sender(data, 3) as port:
        whole = flags(f"socket:127.0.0.1:{port}", tmp_path / "whole")
        assert train(whole) == 0
        half = ("--checkpoint-every", "5", "--keep-checkpoints", "3")
        assert train(flags(f"socket:{port}", run, *half)) == 0
        for path in (run / "checkpoints").glob("*10*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert train(["--resume", str(run)]) == 0
    first, other = kronsae.load(tmp_path / "whole"), kronsae.load(run)
    assert torch.equal(first.W_dec, other.W_dec)
    document = json.loads((run / "config.json").read_text())
    assert document["data"]["source"] == "frames" and first.d_model == 16
    capsys.readouterr()
    with sender(sent(X + 1)) as port:
        changed = ("--activations", f"socket:{port}")
        assert train(["--resume", str(run), *changed]) == 2
    assert "heldout: was" in capsys.readouterr().err


def test_a_run_that_outlives_its_sender_saves_what_it_learned(tmp_path, capsys):
    with sender(sent(*X[:1500].split(100), end=False)) as port:
        with pytest.warns(Notice, match="frame 15: the sender of activations is gone"):
            assert train(flags(f"socket:{port}", tmp_path / "run")) == 2
    assert "the data ended after 1,000 of 2,000 tokens" in capsys.readouterr().err
    assert kronsae.load(tmp_path / "run").d_model == 16


class Engine(BaseHTTPRequestHandler):
    """A stand-in for SGLang's server: hidden states [t, 16] of each prompt, by its words."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["return_hidden_states"] is True
        states = [[X[int(word)].tolist() for word in text.split()] for text in body["text"]]
        answers = [{"text": "", "meta_info": {"hidden_states": [of, [0.0]]}} for of in states]
        data = json.dumps(answers).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def test_the_example_sends_an_engines_hidden_states(tmp_path):
    lines = [" ".join(map(str, range(start, start + 30))) for start in range(0, 3000, 30)]
    (tmp_path / "texts.txt").write_text("\n".join(lines))
    script = Path(__file__).parent.parent / "docs" / "send_hidden_states.py"
    with ThreadingHTTPServer(("127.0.0.1", 0), Engine) as engine:
        threading.Thread(target=engine.serve_forever, daemon=True).start()
        server = f"http://127.0.0.1:{engine.server_port}"
        command = [sys.executable, script, tmp_path / "texts.txt", "--server", server]
        command += ["--port", "0", "--once"]
        here = {**os.environ, "PYTHONPATH": str(script.parent.parent)}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=here) as sending:
            port = re.search(r"socket:(\d+)", sending.stdout.readline())[1]
            frames = list(read_frames(connect(port)))
        engine.shutdown()
    kept = [row for row in range(3000) if row % 30]
    assert torch.allclose(torch.cat([x for [x] in frames]), X[kept])


def test_a_run_from_standard_input(tmp_path):
    command = [sys.executable, "-m", "kronsae", "train", *flags("stdin:", tmp_path / "run")]
    done = subprocess.run(command, input=sent(*X.split(100)), capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert kronsae.load(tmp_path / "run").d_model == 16
