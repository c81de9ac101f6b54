"""Kernels compiled ahead: they lie where a launch looks for them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
LAUNCHES = """
import sys

import torch
import triton
from triton.runtime import driver

from benchmarks import ahead, precompile
from benchmarks.shapes import SHAPES
from kronsae_kernels.triton_impl.launch import FP_FUSION

most, target = int(sys.argv[1]), "sm_90"
precompile.main(["--shape", "toy", "--target", target, "--workers", "2", "--most", str(most),
                 "--json", sys.argv[2]])


class Card:
    \"\"\"A card that is not there, as far as a launch that only warms up asks for it.\"\"\"

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return ahead.TARGETS[target]


driver.set_active(Card())
hits = []
triton.knobs.compilation.listener = lambda cache_hit, **_: hits.append(cache_hit)


def real(argument):
    if not isinstance(argument, torch.Tensor):
        return argument
    return torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype)


for work in precompile.WORKS:
    launch = work.launch
    arguments = {name: real(argument) for name, argument in launch.arguments.items()}
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    if launch.maxnreg:
        options["maxnreg"] = launch.maxnreg
    launch.kernel.run(
        grid=launch.grid, warmup=True, **arguments, **options, enable_fp_fusion=FP_FUSION
    )
print("hits", hits)
"""


@pytest.mark.slow
def test_a_launch_finds_what_was_compiled_ahead(tmp_path):
    """By Triton's own launch, on real tensors: each comes from the cache, none is compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHES, "3", str(tmp_path / "compiled.json")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "compiled.json").read_text())
    assert [one["error"] for one in found["compiled"]] == 3 * [None]
    assert "hits [True, True, True]" in done.stdout, done.stdout + done.stderr
