"""The shuffle buffer: nothing lost or doubled, really mixed, and resumable at every batch."""

import copy

import pytest
import torch

from kronsae.data.buffer import ShuffleBuffer
from kronsae.errors import InputError

SETTINGS = {
    "usual": {"rows": 1000, "pass_size": 37, "capacity": 128, "batch_size": 16},
    "capacity below a pass": {"rows": 1000, "pass_size": 300, "capacity": 100, "batch_size": 16},
    "capacity below a batch": {"rows": 500, "pass_size": 37, "capacity": 5, "batch_size": 64},
    "capacity no multiple": {"rows": 700, "pass_size": 50, "capacity": 101, "batch_size": 7},
    "one batch": {"rows": 10, "pass_size": 3, "capacity": 64, "batch_size": 16},
    "single rows": {"rows": 20, "pass_size": 1, "capacity": 8, "batch_size": 1},
}


class Rows:
    """Passes [r, 2] and [r, 3] of the numbers 0, 1, ..., resumable by `next_row`."""

    def __init__(self, rows, pass_size, next_row=0):
        self.rows, self.pass_size, self.next_row = rows, pass_size, next_row

    def __iter__(self):
        while self.next_row < self.rows:
            start, stop = self.next_row, min(self.rows, self.next_row + self.pass_size)
            self.next_row = stop
            numbers = torch.arange(start, stop)[:, None]
            yield [numbers.float().expand(-1, 2), numbers.double().expand(-1, 3)]


def make(settings, seed=0, next_row=0):
    source = Rows(settings["rows"], settings["pass_size"], next_row)
    buffer = ShuffleBuffer(
        iter(source), settings["capacity"], settings["batch_size"], seed, hookpoints=2
    )
    return source, buffer


def numbers(settings, seed=0):
    return [x[:, 0].tolist() for x, _ in make(settings, seed)[1]]


@pytest.fixture(params=SETTINGS.values(), ids=SETTINGS)
def settings(request):
    return request.param


def test_every_row_comes_once(settings):
    rows = [number for batch in numbers(settings) for number in batch]
    assert sorted(rows) == list(range(settings["rows"]))


def test_rows_stay_whole_and_hookpoints_share_their_order(settings):
    for x, y in make(settings)[1]:
        assert x.dtype == torch.float32 and y.dtype == torch.float64
        assert x[:, 0].equal(x[:, 1]) and y.equal(x[:, :1].double().expand(-1, 3))


def test_only_the_last_batch_is_smaller(settings):
    sizes = [len(batch) for batch in numbers(settings)]
    assert all(size == settings["batch_size"] for size in sizes[:-1])
    assert 0 < sizes[-1] <= settings["batch_size"]


def test_the_seed_decides():
    settings = SETTINGS["usual"]
    assert numbers(settings, seed=1) == numbers(settings, seed=1)
    assert numbers(settings, seed=1) != numbers(settings, seed=2)


def test_batches_are_drawn_from_the_whole_buffer():
    """Batches span many passes, and few neighbours in a batch were neighbours in the stream."""
    settings = {"rows": 20_000, "pass_size": 100, "capacity": 4096, "batch_size": 64}
    full = numbers(settings)[:200]
    passes = [len({int(number) // 100 for number in batch}) for batch in full]
    assert min(passes) > 15
    spans = torch.tensor([max(batch) - min(batch) for batch in full])
    assert spans.median() > 3000
    together = sum(b == a + 1 for batch in full for a, b in zip(batch, batch[1:], strict=False))
    assert together < 20  # of 12 600 pairs


def test_memory_is_bounded_by_the_capacity():
    _, buffer = make(SETTINGS["usual"])
    places = set()
    for _ in buffer:
        assert buffer.filled <= buffer.capacity == 128
        assert [rows.shape for rows in buffer.rows] == [(128, 2), (128, 3)]
        places |= {rows.data_ptr() for rows in buffer.rows}
    assert len(places) == 2


def test_resume_at_every_batch(settings):
    whole = numbers(settings)
    for after in range(len(whole) + 1):
        source, buffer = make(settings)
        batches = iter(buffer)
        for _ in range(after):
            next(batches)
        states = copy.deepcopy(buffer.state_dicts())
        _, resumed = make(settings, seed=99, next_row=source.next_row)
        resumed.load_state_dicts(states)
        rest = list(resumed)
        assert [x[:, 0].tolist() for x, _ in rest] == whole[after:], after
        assert [y[:, 2].tolist() for _, y in rest] == whole[after:], after


def test_a_loaded_state_is_not_written_to():
    settings = SETTINGS["usual"]
    source, buffer = make(settings)
    next(iter(buffer))
    states = copy.deepcopy(buffer.state_dicts())
    before = copy.deepcopy(states)
    resumed = make(settings, next_row=source.next_row)[1]
    resumed.load_state_dicts(states)
    list(resumed)
    for was, state in zip(before, states, strict=True):
        for name, value in was.items():
            assert value == state[name] if name == "ended" else value.equal(state[name]), name


def test_one_of_the_hookpoints_goes_on_alone():
    """Its state is that of a buffer of its own."""
    settings = SETTINGS["usual"]
    source, buffer = make(settings)
    for _ in range(5):
        buffer.next()
    states = copy.deepcopy(buffer.state_dicts())
    rest = ([y] for _, y in Rows(settings["rows"], settings["pass_size"], source.next_row))
    alone = ShuffleBuffer(rest, settings["capacity"], settings["batch_size"], 99)
    alone.load_state_dicts(states[1:])
    assert [y[:, 0].tolist() for (y,) in alone] == numbers(settings)[5:]


def test_rows_wait_on_the_device_asked_for():
    buffer = ShuffleBuffer(iter([]), 8, 2, 0, device=torch.device("meta"))
    state = make(SETTINGS["usual"])[1].state_dicts()[0] | {"rows": torch.zeros(4, 2)}
    buffer.load_state_dicts([state])
    assert buffer.rows[0].device.type == "meta"


def as_given(settings, dtype, next_row=0):
    """A source of one hookpoint, and a buffer of its rows in `dtype`, scaled to be inexact."""
    source = Rows(settings["rows"], settings["pass_size"], next_row)
    rows = ([(x / 7).bfloat16().to(dtype)] for x, _ in source)
    return source, ShuffleBuffer(rows, settings["capacity"], settings["batch_size"], 0)


@pytest.mark.parametrize("before", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("after", [torch.float32, torch.bfloat16])
def test_rows_that_go_on_in_another_dtype_stay_the_same_numbers(before, after, settings):
    """From a checkpoint of an earlier version, whose rows are float32, or with --model-dtype."""
    whole = [batch for [batch] in as_given(settings, torch.float32)[1]]
    source, buffer = as_given(settings, before)
    found = [buffer.next()[0] for _ in range(len(whole) // 2)]
    states = copy.deepcopy(buffer.state_dicts())
    assert not buffer.filled or states[0]["rows"].dtype == before
    resumed = as_given(settings, after, source.next_row)[1]
    resumed.load_state_dicts(states)
    found += [batch for [batch] in resumed]
    for batch, expected in zip(found, whole, strict=True):
        assert batch.dtype == torch.float32
        assert torch.allclose(batch, expected, rtol=0, atol=2**-20)  # the smallest of float16
        assert before == torch.float16 or torch.equal(batch, expected)


@pytest.mark.gpu
def test_resume_on_a_gpu_from_a_state_on_the_cpu():
    settings, device = SETTINGS["usual"], torch.device("cuda")
    whole = numbers(settings)
    source, buffer = make(settings)
    batches = iter(buffer)
    for _ in range(3):
        next(batches)
    rows = Rows(settings["rows"], settings["pass_size"], source.next_row)
    rest = ([part.to(device) for part in parts] for parts in rows)
    resumed = ShuffleBuffer(rest, settings["capacity"], settings["batch_size"], 0, device, 2)
    resumed.load_state_dicts(copy.deepcopy(buffer.state_dicts()))
    found = list(resumed)
    assert all(part.device.type == "cuda" for batch in found for part in batch)
    assert [x[:, 0].tolist() for x, _ in found] == whole[3:]


def test_an_empty_stream_gives_no_batch():
    assert list(ShuffleBuffer(iter([]), 8, 2, 0)) == []


def test_batch_size_zero_is_refused():
    with pytest.raises(InputError, match="batch_size: expected >= 1, got 0"):
        ShuffleBuffer(iter([]), 8, 0, 0)
