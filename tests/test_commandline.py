"""What command lines share: stops that are never lost, numbers, help that fits a terminal."""

import dataclasses
import errno
import io
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
import weakref
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from kronsae import InputError, SAEConfig, TrainConfig, commandline, harvest, train
from kronsae.__main__ import COMMANDS as ALL_COMMANDS
from kronsae.__main__ import main as kronsae_command
from kronsae.commandline import (
    Enduring,
    Terminated,
    enduring_output,
    exit_status,
    integer,
    stoppable,
)
from kronsae.data import IterableActivations
from kronsae.errors import Notice
from kronsae.experiments.__main__ import main as experiments
from kronsae.system.checkpoint import load_state, save_state
from kronsae.system.devices import random_states, seed_everything, set_random_states
from kronsae.system.parallel import RankLost
from kronsae.train import fit
from kronsae.training.options import make_parser, parse
from kronsae.training.signals import note_signals
from kronsae.training.stream import Stream

WORK = """
import os, signal, sys, time, weakref
from kronsae.commandline import exit_status

class Watched:
    pass

class Last:
    def __del__(self):
        os.kill(os.getpid(), {number})

signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started this may ignore it

def work(argv):
    if {place!r} == "destructor":
        Last()
    else:
        watched = Watched()
        callback = weakref.ref(watched, lambda _: os.kill(os.getpid(), {number}))
        del watched
    print("it went on")
    time.sleep(30)

sys.exit(exit_status(work, []))
"""


@pytest.mark.one_in(3)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("place", ["destructor", "callback of a weak reference"])
def test_a_signal_where_python_drops_what_is_raised_stops_the_process(number, place):
    code = WORK.format(number=int(number), place=place)
    began = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 128 + number, ended.stderr
    assert ended.stdout == "it went on\n"  # what the handler raised was dropped, indeed
    assert ended.stderr == f"Stopped by {number.name}\n"
    assert time.monotonic() - began < 25


class Last:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)


class Watched:
    pass


def test_a_signal_that_python_drops_at_the_end_stops_there():
    with pytest.raises(Terminated), stoppable():
        Last()


def dropped_then_lost(*_):
    Last()
    raise RankLost("another process ended")


COMMANDS = {
    "train": (train, "_train", train.main, ["--no-memory-check"], "start again"),
    "harvest": (
        *(harvest, "harvest", harvest.main),
        *(["--layer", "1", "--tokens", "300"], "resume by"),
    ),
    "experiments": (
        *(sys.modules[experiments.__module__], "run_grid", experiments),
        *(["toy", "--smallest"], "goes on"),
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_an_error_after_a_signal_is_the_stop(name, monkeypatch, tmp_path, capsys):
    """Of every command that has a run in progress: it ends as stopped, with how to go on."""
    module, inner, main, flags, words = COMMANDS[name]
    if name == "experiments":
        pytest.importorskip("matplotlib")
    monkeypatch.setattr(module, inner, dropped_then_lost)
    assert main([*flags, "--out", str(tmp_path / "out")]) == 128 + signal.SIGTERM
    err = capsys.readouterr().err
    assert "Stopped by SIGTERM (after it came RankLost: another process ended)" in err
    assert words in err and "Traceback" not in err


def test_an_error_without_a_signal_is_itself():
    with pytest.raises(RankLost), stoppable():
        raise RankLost("another process ended")


@pytest.fixture
def handlers():
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM)
    before = {number: signal.getsignal(number) for number in numbers}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_rank_that_is_lost_while_a_step_is_finished_is_the_stop(handlers):
    """The others had a second signal, and ended at once: so does this process."""
    with pytest.raises(Terminated), stoppable(), note_signals(lambda: None):
        signal.raise_signal(signal.SIGTERM)
        raise RankLost("another process ended")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN  # torchrun sends another one


def test_handlers_are_given_back_after_a_dropped_stop(handlers):
    hook = sys.unraisablehook
    with pytest.raises(Terminated), stoppable():
        Last()
        time.sleep(10)
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    assert sys.unraisablehook is hook
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_what_others_drop_goes_where_it_went(monkeypatch):
    """Only a stop is raised again."""
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: seen.append(dropped.exc_type))
    with stoppable():
        watched = Watched()
        callback = weakref.ref(watched, lambda _: 1 / 0)
        del watched
    assert callback() is None
    assert seen == [ZeroDivisionError]


def test_an_ignored_signal_stays_ignored(handlers):
    """As SIGINT is of a job in the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stoppable():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.parametrize("under_nohup", [False, True])
def test_the_end_of_a_terminal_finishes_the_step(handlers, under_nohup, capsys):
    if under_nohup:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with note_signals(lambda: None) as stop:
        signal.raise_signal(signal.SIGHUP)
    assert stop.received == (None if under_nohup else signal.SIGHUP)
    assert ("SIGHUP: finishing this step" in capsys.readouterr().err) is not under_nohup


# What is printed

PRINTING = """
import sys
from pathlib import Path
from rich.console import Console
from kronsae.commandline import exit_status

def work(argv):
    console = Console()
    for number in range(2000):
        print("a line – of text ┃ é \\udc80", number, flush=number == 7)
        print("an error –", file=sys.stderr)
        console.print("[bold]▁▂▃[/bold]", number)
    Path(argv[0]).write_text("all is done")

sys.exit(exit_status(work, sys.argv[1:]))
"""


@pytest.mark.one_in(8)
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "cp1252", "ascii"])
@pytest.mark.parametrize(
    "where", ["| head -8", "> /dev/full", "> /dev/full 2>&1", ">&- 2>&-", "2>&1 | head -1", ""]
)
def test_nothing_that_is_printed_ends_the_work(where, encoding, tmp_path):
    program, out = tmp_path / "printing.py", tmp_path / "out"
    program.write_text(PRINTING)
    line = f"set -o pipefail; {sys.executable} {program} {out} {where}"
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": os.getcwd()}
    ended = subprocess.run(["bash", "-c", line], capture_output=True, env=environment)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert out.read_text() == "all is done"
    assert b"Traceback" not in ended.stderr and b"ignored" not in ended.stderr
    lost = b"what is printed from here on is lost: [Errno 28] No space left on device"
    assert ended.stderr.count(lost) == (where == "> /dev/full")
    if where in ("| head -8", ""):
        first = ended.stdout.splitlines()[0].decode(encoding)
        assert first.startswith("a line ") and first.endswith("0")


def test_a_stream_without_a_file_that_fails():
    class Failing(io.StringIO):
        def write(self, text):
            raise OSError(errno.EIO, "Input/output error")

    said = []
    stream = Enduring(Failing(), said.append)
    stream.writelines(["one\n", "two\n"])
    print("three", file=stream, flush=True)
    assert [error.errno for error in said] == [errno.EIO]
    closed = io.StringIO()
    closed.close()
    print("nowhere", file=Enduring(closed), flush=True)


def test_streams_are_given_back():
    streams = sys.stdout, sys.stderr
    with enduring_output():
        assert isinstance(sys.stdout, Enduring) and isinstance(sys.stderr, Enduring)
    assert (sys.stdout, sys.stderr) == streams


# Errors of the machine

OUT_OF_MEMORY = """
import resource, sys
import numpy, torch
from kronsae.commandline import exit_status

def work(argv):
    pages = int(open("/proc/self/statm").read().split()[0])
    limit = pages * resource.getpagesize() + 2**27
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    {allocate}

sys.exit(exit_status(work, []))
"""


@pytest.mark.one_in(3)
@pytest.mark.parametrize("allocate", ["torch.empty(2**30)", "numpy.empty(2**30)", "b' ' * 2**30"])
def test_memory_that_runs_out_is_a_sentence(allocate):
    code = OUT_OF_MEMORY.format(allocate=allocate)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert ended.stderr.startswith("error: there is not enough memory (")


@pytest.mark.parametrize("name", ["EROFS", "ENOSPC", "EDQUOT", "EACCES"])
def test_a_disk_that_fails_is_a_sentence(name, capsys):
    error = OSError(getattr(errno, name), os.strerror(getattr(errno, name)), "a/file")

    def work(argv):
        raise error

    assert exit_status(work, []) == 2
    said = f"error: the disk does not let this command go on: {error}\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), ConnectionError("lost"), KeyError("k")]
)
def test_other_errors_keep_their_traceback(error):
    def work(argv):
        raise error

    with pytest.raises(type(error)):
        exit_status(work, [])


@pytest.mark.parametrize(
    "command",
    [
        *("train", "train --resume /proc/self", "evaluate RUN", "explore RUN"),
        *("experiments toy --smallest", "intervene RUN --effects 2"),
        "interpret RUN --explainer MODEL",
    ],
)
def test_commands_find_that_they_cannot_write_before_they_work(command, monkeypatch, capsys):
    """/proc takes no files. RUN is not there: they do not come as far as to read it."""
    if "experiments" in command:
        pytest.importorskip("matplotlib")
    monkeypatch.setattr(train, "_open", lambda *_: pytest.fail("it loads the model"))
    out = [] if "--resume" in command else ["--out", "/proc/out"]
    if command == "train --resume /proc/self":
        monkeypatch.setattr(train, "parse", lambda argv: resumed_in(Path("/proc/self")))
    assert kronsae_command([*command.split(), *out]) == 2
    err = capsys.readouterr().err
    assert "cannot be written to" in err and "Traceback" not in err


def resumed_in(path):
    request = parse(["--no-memory-check"])
    return dataclasses.replace(request, resume=path)


# Flags and help


@pytest.mark.parametrize(
    "text, value",
    [("4096", 4096), ("4_096", 4096), ("1e6", 10**6), ("500k", 500_000), ("1.5M", 1_500_000)],
)
def test_numbers_as_people_write_them(text, value):
    assert integer(text) == value and integer(f"-{text}") == -value


@pytest.mark.parametrize("text", ["", "k", "few", "1.5", "nan", "inf", "1e999999999", "0x10"])
def test_what_is_no_whole_number(text):
    with pytest.raises(ValueError):
        integer(text)


@pytest.mark.parametrize("command", ["", *ALL_COMMANDS, "experiments toy"])
def test_help_fits_a_terminal_and_opens_with_what_it_does(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    try:
        assert kronsae_command([*command.split(), "--help"]) == 0
    except SystemExit as stop:  # argparse's way to end
        assert stop.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    if command and command != "experiments":
        opening = r"[A-Z\[].*?\n\nExample:\n  kronsae " + command
        assert re.match(opening, text, re.DOTALL), text[:300]
    for word in ALL_COMMANDS if not command else ():
        assert f"  {word} " in text


def test_a_command_that_there_is_none(capsys):
    assert kronsae_command(["trian"]) == 2
    assert "did you mean train?" in capsys.readouterr().err
    assert kronsae_command(["--version"]) == 0 and "kronsae 0." in capsys.readouterr().out


@pytest.mark.parametrize(
    "argument, ours",
    [
        ("--d-sae", "--dict-size N"),
        ("--expansion-factor", "--dict-size N"),
        ("--architecture", "--encoder"),
        ("--hook-name=blocks.6.hook_resid_post", "--layer N"),
        ("--training_tokens", "--tokens N"),
    ],
)
def test_flags_of_other_libraries_are_answered_with_ours(argument, ours, capsys):
    assert kronsae_command(["train", argument, "3"]) == 2
    assert f"here it is {ours}" in capsys.readouterr().err


def test_the_libraries_names_as_people_write_them(tmp_path, capsys):
    for name in ("saelens", "SAE-Lens", "dictionary-learning"):
        assert kronsae_command(["export", "nowhere", "--to", name, "--out", "x"]) == 2
        assert "nowhere: no such folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("train --model ''", "--model: expected a value, got an empty string"),
        ("train --dataset=", "--dataset: expected a value, got an empty string"),
        ("train --lr ''", "--lr: expected a value, got an empty string"),
        ("train --k 4 '' 8", "--k: expected a value, got an empty string"),
        ("train --out ''", "--out: expected a value, got an empty string"),
        ("harvest --out ''", "--out: expected a value, got an empty string"),
        ("evaluate ''", "error: expected a value, got an empty string"),
        ("explore '' --top 3", "error: expected a value, got an empty string"),
        ("intervene a --latent 1 --prompt ''", "--prompt: expected a value, got an empty string"),
        ("export a --to ''", "--to: expected a value, got an empty string"),
        ("train --plugin ''", "--plugin: expected one argument, a Python file"),
    ],
)
def test_an_empty_value_is_refused(line, words, capsys):
    assert kronsae_command(shlex.split(line)) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("parser", "line", "words"),
    [
        (make_parser, "--tokens 1e3 --tokens=2e3", "--tokens is given twice: the last counts"),
        (make_parser, "--streaming --no-streaming", "--streaming and --no-streaming: the last"),
        (make_parser, "--resume a --resume b", "--resume is given twice: the last counts"),
        (make_parser, "--k 4 --k 8", "--k is given twice: the values of both count"),
        (harvest.make_parser, "--out a --out b", "--out is given twice: the last counts"),
    ],
)
def test_a_flag_given_twice_says_so(parser, line, words):
    with pytest.warns(Notice, match=words):
        parser().parse(line.split())


def draws():
    return random.random(), np.random.rand(), torch.rand(1).item()


@pytest.mark.parametrize("seed", [0, 2**40 - 1])
def test_a_seed_decides_whatever_a_model_draws(seed):
    seed_everything(seed)
    first, states, torch_state = draws(), random_states(), torch.get_rng_state()
    later = draws()
    seed_everything(seed)
    assert draws() == first
    draws()
    set_random_states(json.loads(json.dumps(states)))  # as a checkpoint keeps them
    torch.set_rng_state(torch_state)
    assert draws() == later


def test_commands_without_a_seed_draw_the_same():
    drawn = []
    for _ in "12":
        exit_status(lambda argv: drawn.append(draws()), [])
    assert drawn[0] == drawn[1]


def test_a_checkpoint_keeps_what_is_drawn_next(tmp_path):
    source = IterableActivations([torch.randn(50, 8)] * 4)
    stream = Stream(source, 200, torch.device("cpu"))
    stream.next()
    save_state(tmp_path / "step", stream.state_dict())
    expected = draws()
    stream.load_state_dict(load_state(tmp_path / "step"))
    assert draws() == expected


@pytest.mark.parametrize("name", ["a run", "$(touch x)", "it's", "a;b"])
def test_commands_that_are_printed_can_be_pasted(name, tmp_path, capsys):
    out = tmp_path / name
    x = torch.randn(400, 8)
    sae = SAEConfig(d_model=8, heads=4, m=2, n=2, k=2)
    config = TrainConfig(tokens=400, batch_size=50)
    fit(sae, x, config, out=out)
    with pytest.raises(InputError) as refused:
        fit(sae, x, config, out=out)
    command = re.search("(--resume .*) goes on with it", str(refused.value))[1]
    assert shlex.split(command) == ["--resume", str(out)]
    (out / "config.json").write_text("{")
    with pytest.raises(InputError) as refused:
        fit(sae, x, config, out=out, resume=True)
    command = str(refused.value).splitlines()[-1]
    subprocess.run(["bash", "-c", command], check=True, cwd=tmp_path)
    assert fit(sae, x, config, out=out, resume=True).tokens == 400
    assert {path.name for path in tmp_path.iterdir()} == {name}


@pytest.mark.parametrize("command", ["", *ALL_COMMANDS])
def test_every_command_limits_threads(monkeypatch, capsys, command):
    """Also `python -m kronsae.COMMAND`, which does not go through `kronsae`."""
    calls = []

    @contextmanager
    def limited():
        calls.append(command)
        yield

    monkeypatch.setattr(commandline, "limited_threads", limited)
    module = import_module(f"kronsae.{command}".rstrip("."))
    if hasattr(module, "__path__"):
        module = import_module(f"{module.__name__}.__main__")
    with suppress(SystemExit):
        module.main(["--help"])
    assert calls == [command]
    assert "kronsae" in capsys.readouterr().out
