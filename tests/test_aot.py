"""Every kernel compiles for every card: no spills, matrix units used, shared memory fits.

`tests/aot.py` compiles, in a process without the interpreter. The golden table lists the kernels;
`python -m tests.aot --update` rewrites it.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from aot import TARGETS, VERSION, Compiled, case_of, differences, problems, read_golden

pytestmark = [pytest.mark.long, pytest.mark.timeout(3700)]

ROOT = Path(__file__).parents[1]
SLOW = ("sm_80", "sm_100", "gfx942")
"""Targets left to the slow tests: all of them together take longer than the other tests."""
SPILLS = {
    "3.6 kron_mul_masked/select_heads/sm_90": 8,
    "3.6 kron_mul_masked/select_latents/sm_90": 8,
    "3.6 one_pass_mul/encode_heads/sm_90": 24,
    "3.6 step_wide/select_heads/sm_90": 16,
    "3.9 kron_1m/select_heads/sm_100": 16,
}
"""Bytes that kernels may spill, by Triton version; all others none."""
GOLDEN = read_golden()
LISTED = GOLDEN.get(VERSION) or max(GOLDEN.items(), default=("", {}))[1]
"""The kernels do not depend on the compiler; its numbers do."""


DAILY = "kron_64k|step_(nested|jump)_64k|step_1m$"
"""Cases compiled by default, for sm_90, beside those of `test_predict`; the others are slow."""


def _marked(target: str, *values: str):
    slow = target in SLOW or any(not re.search(DAILY, case_of(kernel)) for kernel in values)
    return pytest.param(
        *values, target, id="-".join((*values, target)), marks=[pytest.mark.slow] * slow
    )


by_target = pytest.mark.parametrize("target", [_marked(target) for target in TARGETS])
by_kernel = pytest.mark.parametrize(
    "kernel, target",
    [_marked(target, kernel) for kernel, _, target in (key.rpartition("/") for key in LISTED)],
)


@pytest.fixture(scope="module")
def cases(request) -> str:
    """Regular expression of the cases that the chosen tests need."""
    items = [item for item in request.session.items if item.path == Path(__file__)]
    return "" if any(item.get_closest_marker("slow") for item in items) else DAILY


@pytest.fixture(scope="module")
def compiled(request, cases, tmp_path_factory) -> dict[str, Compiled]:
    """All kernels for the targets of the chosen tests, by "case/kernel/target"."""
    items = [item for item in request.session.items if item.path == Path(__file__)]
    targets = {item.callspec.params["target"] for item in items}
    file = tmp_path_factory.mktemp("aot") / "kernels.json"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    command = [sys.executable, "-m", "tests.aot", "--json", str(file), "--cases", cases]
    done = subprocess.run(
        [*command, "--targets", *sorted(targets)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert file.exists(), done.stdout + done.stderr
    found = [Compiled(**one) for one in json.loads(file.read_text(encoding="utf-8"))]
    return {one.key: one for one in found}


@by_target
def test_golden_table_lists_every_kernel(compiled, cases, target):
    """Also where a case cannot even make its calls: that is a kernel "case/(calls)" here."""
    found = {key: one for key, one in compiled.items() if one.target == target}
    listed = {key for key in LISTED if key.endswith(f"/{target}")}
    listed = {key for key in listed if re.search(cases, case_of(key))}
    missing = [f"{key}: gone" for key in sorted(listed - found.keys())]
    unlisted = [
        "\n".join(problems(found[key])) or f"{key}: new" for key in sorted(found.keys() - listed)
    ]
    assert not missing + unlisted, (
        "\n".join(missing + unlisted) + "\nIf this is meant: python -m tests.aot --update"
    )


@by_kernel
def test_kernel_compiles_well(compiled, kernel, target):
    found = compiled.get(f"{kernel}/{target}")
    assert found is not None, f"{kernel}/{target}: no case launches it"
    spills = GOLDEN.get(VERSION, {}).get(found.key, {}).get("spills", 0)
    most = SPILLS.get(f"{VERSION} {found.key}", 0)
    assert spills <= most, f"{found.key}: the golden table has spills of {spills} bytes"
    assert not problems(found, spills), "\n".join(problems(found, spills))


@by_kernel
def test_kernel_is_as_large_as_before(compiled, kernel, target):
    """Registers and instructions are within 10 % of the golden table."""
    if VERSION not in GOLDEN:
        pytest.skip(f"the golden table has Triton {', '.join(GOLDEN)}, not {VERSION}")
    found = compiled.get(f"{kernel}/{target}")
    if found is None or found.error is not None:
        pytest.skip("does not compile: see test_kernel_compiles_well")
    if found.key not in GOLDEN[VERSION]:
        pytest.skip(f"of Triton {VERSION} the golden table has other targets alone")
    lines = differences(found, GOLDEN[VERSION][found.key])
    assert not lines, "\n".join(lines)
