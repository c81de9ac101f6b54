"""How many threads there are, and how they wait."""

import os
import sys

import pytest
import torch

from kronsae.system import threads


@pytest.fixture
def fresh(monkeypatch):
    """A program that has not loaded torch, whose user has set nothing."""
    monkeypatch.delitem(sys.modules, "torch")
    for name in (*threads.POLICIES, *threads.COUNTS):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "argv", ["-m"])  # what `python -m kronsae.train` has at first
    return monkeypatch


@pytest.mark.parametrize("argv", [["-m"], ["/usr/bin/kronsae", "train"], ["kronsae.exe"]])
def test_commands_wait_briefly(fresh, argv):
    fresh.setattr(sys, "argv", argv)
    threads.wait_briefly()
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
    assert threads.waiting() == "OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=2000"


@pytest.mark.parametrize("name", threads.POLICIES)
def test_what_the_user_sets_stays(fresh, name):
    fresh.setenv(name, "1")
    threads.wait_briefly()
    assert threads.waiting() == f"{name}=1"


def test_what_is_empty_is_not_set(fresh):
    fresh.setenv("OMP_WAIT_POLICY", "")
    threads.wait_briefly()
    assert threads.waiting() == "OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=2000"


def test_other_programs_are_left_alone(fresh):
    for argv in ([], [""], ["/usr/bin/pytest"], ["train.py", "kronsae"]):
        fresh.setattr(sys, "argv", argv)
        threads.wait_briefly()
    fresh.setattr(sys, "argv", ["-m"])
    fresh.setitem(sys.modules, "torch", torch)  # too late
    threads.wait_briefly()
    assert threads.waiting() == ""


GROUPS = {
    "none": ("", {}, None),
    "no limit": ("0::/", {"cpu.max": "max 100000"}, None),
    "a container": ("0::/", {"cpu.max": "150000 100000"}, 1.5),
    "a group inside": ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "50000 100000"}, 0.5),
    "the tightest": ("0::/a", {"cpu.max": "100000 100000", "a/cpu.max": "90000 100000"}, 0.9),
    "version 1": (
        "5:cpu,cpuacct:/a\n0::/",
        {"cpu/a/cpu.cfs_quota_us": "25000", "cpu/a/cpu.cfs_period_us": "100000"},
        0.25,
    ),
    "version 1, no limit": (
        "5:cpuset:/\n4:cpu:/",
        {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
        None,
    ),
    "nonsense": ("0::/", {"cpu.max": "much"}, None),
}


@pytest.mark.parametrize(("own", "files", "expected"), GROUPS.values(), ids=GROUPS)
def test_quota_of_control_groups(own, files, expected, tmp_path):
    for name, text in {"own": own, **files}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n" * bool(text))
    quotas = list(threads._quotas(tmp_path, tmp_path / "own"))
    assert min(quotas, default=None) == expected


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_affinity():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert threads.processors() <= 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_threads_are_no_more_than_processors(fresh):
    fresh.setitem(sys.modules, "torch", torch)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for count, expected in ((8.0, 2), (2.0, 2), (1.9, 1), (0.3, 1)):
            fresh.setattr(threads, "processors", lambda count=count: count)
            with threads.limited_threads():
                assert torch.get_num_threads() == expected
            assert torch.get_num_threads() == 2
        fresh.setenv("OMP_NUM_THREADS", "2")
        fresh.setattr(threads, "processors", lambda: 1.0)
        with threads.limited_threads():
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
