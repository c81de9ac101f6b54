"""A suite on two hosts, which are network namespaces of this machine here."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from test_suite import MEMBERS, SUITE, weights_of
from test_sweep import timeless
from test_train import finish

pytestmark = pytest.mark.slow

HOSTS = {"kronsae-a": "10.211.7.1", "kronsae-b": "10.211.7.2"}


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts():
    """Names of two hosts with a cable between them."""
    first, second = HOSTS
    if not shutil.which("ip"):
        pytest.skip("needs the command ip")
    try:
        ip("netns", "add", first)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespace can be made here: {error.stderr.decode().strip()}")
    try:
        ip("netns", "add", second)
        ip("link", "add", "ka", "netns", first, "type", "veth", "peer", "kb", "netns", second)
        for (host, address), device in zip(HOSTS.items(), ("ka", "kb"), strict=True):
            ip("-n", host, "addr", "add", f"{address}/24", "dev", device)
            ip("-n", host, "link", "set", device, "up")
            ip("-n", host, "link", "set", "lo", "up")
        yield {first: "ka", second: "kb"}
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "del", host], capture_output=True)


def test_members_on_two_hosts_are_those_of_one_process(hosts, tmp_path):
    """Two processes on each."""
    status, _, err = finish(*SUITE, "--out", tmp_path / "alone")
    assert status == 0, err
    address = HOSTS["kronsae-a"]
    started = []
    for rank, (host, device) in enumerate(hosts.items()):
        command = ["ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run"]
        command += ["--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "2"]
        command += ["--master-addr", address, "--master-port", "29517", "-m", "kronsae.train"]
        flags = [*SUITE, "--share", "members", "--out", str(tmp_path / "suite")]
        started.append(
            subprocess.Popen(
                [*command, *flags],
                stdout=(tmp_path / f"log{rank}").open("w"),
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": device},
            )
        )
    for rank, process in enumerate(started):
        assert process.wait(300) == 0, (tmp_path / f"log{rank}").read_text()
    for name in MEMBERS:
        runs = [tmp_path / "suite" / name, tmp_path / "alone" / name]
        assert weights_of(runs[0]) == weights_of(runs[1])
        lines = [(run / "metrics.jsonl").read_text().splitlines() for run in runs]
        of_hosts, alone = (timeless(map(json.loads, each)) for each in lines)
        assert of_hosts == alone
