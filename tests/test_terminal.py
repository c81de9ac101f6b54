"""What commands print fits a terminal of 80 columns, and says how long they still take."""

import io

import pytest
from rich.console import Console

from kronsae.system import progress
from kronsae.system.progress import Pace
from kronsae.system.tables import fitted
from kronsae.training.options import parse
from kronsae.training.progress import ProgressBar


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_pace_is_a_mean_since_the_first_report(clock):
    pace = Pace("tokens", rated=True)
    assert pace.words(100, 1100) == "100 of 1,100 tokens"
    clock[0] = 10.0
    assert pace.words(300, 1100) == "300 of 1,100 tokens, 20 tokens/s, about 40 seconds left"
    assert pace.words(300, None) == "300 tokens, 20 tokens/s"
    clock[0] = 20.0
    assert pace.words(1100, 1100) == "1,100 of 1,100 tokens, 50 tokens/s"
    assert Pace("batches").words(1, None) == "1 batches"


def records(*speeds):
    for number, speed in enumerate(speeds, 1):
        rates = {"tokens_per_s": speed, "wait_share": 0.8 if speed < 1000 else 0.0}
        yield {"kind": "train", "step": 10 * number, "explained_variance": 0.9} | rates


def test_training_says_the_mean_speed_and_the_time_left(clock, capsys):
    """One record in two waits for the language model, at a tenth of the speed."""
    request = parse(["--tokens", "40960", "--batch-size", "1024", "--log-every", "10"])
    console = Console(force_terminal=False, width=80, soft_wrap=True)
    with ProgressBar(console, request) as bar:
        for record in records(4000.0, 400.0, 4000.0, 400.0):
            bar("", record | {"dead_share": 0.5})
            clock[0] += 20.0
    lines = capsys.readouterr().out.splitlines()
    speeds = [int(line.split(" tokens/s")[0].split()[-1].replace(",", "")) for line in lines]
    assert speeds == [4000, 727, 1000, 727]  # 3 / (1/4000 + 1/400 + 1/4000)
    assert "left" not in lines[0] and lines[1].endswith(
        "727 tokens/s, about 40 seconds left, waited 73% for activations"
    )
    assert "left" not in lines[3]


def test_the_bar_of_80_columns_loses_nothing(clock):
    request = parse(["--tokens", "40960", "--batch-size", "1024", "--seed", "0", "1"])
    screen = io.StringIO()
    console = Console(force_terminal=True, width=80, file=screen, color_system=None)
    with ProgressBar(console, request) as bar:
        for record in records(4000.0, 400.0):
            bar("a-member-of-a-long-name", record | {"dead_share": 0.5, "model_wait_share": 0.1})
            clock[0] += 20.0
    shown = screen.getvalue()
    assert "…" not in shown
    for words in ("20/40", "a-member-of-a-long-name:", "EV 0.900", "seconds left,", "for room"):
        assert words in shown


HEAD = ["member", "encoder", "explained variance", "CE recovered"]
ROWS = [["topk-lr0.01", "32x4x4", "0.6010", "0.9"], ["topk-lr0.02", "32x4x4", "0.6112", "1.0"]]


def test_a_table_that_is_too_wide_names_what_is_the_same_below():
    assert len(fitted(HEAD, ROWS, 80).splitlines()) == 3
    narrow = fitted(HEAD, ROWS, 40)
    assert narrow.splitlines() == [
        "             explained         CE",
        "member        variance  recovered",
        "topk-lr0.01     0.6010        0.9",
        "topk-lr0.02     0.6112        1.0",
        "the same for all: encoder 32x4x4",
    ]
