"""The model of a step: its formulas are frozen, and the kernels are no worse than they were.

The golden table has what is expected of each kernel at the goals' shapes.
`python -m benchmarks.predict --update` rewrites it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import predict
from benchmarks.floors import Work, stages
from benchmarks.predict import CARDS, Program
from benchmarks.shapes import SHAPES

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
H200 = CARDS["sm_90"]

# The first fused step, compiled by Triton 3.6: (shape, stage, programs, program), and the time in
# milliseconds that was estimated for it by hand before this model existed.
FIRST = [
    ("G1", "select", 8192, Program(8, 168, 65536, 0, 3359, 13571), 0.50),
    ("G1", "decode", 8192, Program(4, 168, 2048, 0, 8926, 48994), 0.65),
    ("G1", "decoder update", 65536, Program(8, 96, 8192, 0, 1379, 9181), 1.50),
    ("G1", "encoder update", 73728, Program(4, 201, 17792, 0, 2169, 10750), 1.75),
    ("G2", "select", 8192, Program(8, 90, 32768, 0, 2514, 11823), 0.22),
    ("G2", "encoder update", 36864, Program(4, 192, 17792, 0, 2774, 14176), 1.15),
]


@pytest.mark.parametrize("shape, stage, programs, program, estimated", FIRST)
def test_formulas_are_frozen(shape, stage, programs, program, estimated):
    """They give the estimates within 10 %. Only a measurement on a card may change this."""
    bytes_ms = H200.ceilings.floor_ms(stages(SHAPES[shape], "kron", 2)[stage])
    expected = predict.together(
        predict.issue_ms(program, programs, H200),
        predict.latency_ms(program, programs, H200),
        bytes_ms,
    )
    assert expected + predict.RAMP_MS == pytest.approx(estimated, rel=0.1)


def test_product():
    """2.57 and 1.71 ms were estimated."""
    chunks = [predict.product_ms(tokens, 49152, 2304, H200) for tokens in (5461, 2731)]
    assert sum(chunks) == pytest.approx(2.57, rel=0.1)
    assert predict.product_ms(8192, 32768, 2304, H200) == pytest.approx(1.71, rel=0.1)


def test_resident_programs():
    """Limited by registers (256 at a time, for each warp), shared memory, warps or blocks."""
    program = Program(warps=4, registers=64, shared=0, spills=0, instructions=1, cycles=1)
    assert predict.resident(program, H200) == 65536 // (64 * 32 * 4)
    assert predict.resident(program._replace(registers=65), H200) == 65536 // (2304 * 4)
    assert predict.resident(program._replace(shared=100 * 1024), H200) == 2
    assert predict.resident(program._replace(registers=16, warps=16), H200) == 4
    assert predict.resident(program._replace(registers=16, warps=1), H200) == 32


def test_floor_is_that_of_the_benchmarks():
    work = Work(multiply_adds=395 * 10**9)
    assert H200.ceilings.floor_ms(work) == pytest.approx(1.0)


@pytest.fixture(scope="module")
def found(request, tmp_path_factory) -> dict:
    """The goals' shapes, compiled now, in a process without the interpreter.

    Without slow tests G2 alone: each takes half a minute.
    """
    file = tmp_path_factory.mktemp("predict") / "predicted.json"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    command = [sys.executable, "-m", "benchmarks.predict", "--auxiliary", "--json", str(file)]
    items = [item for item in request.session.items if item.path == Path(__file__)]
    if not any(item.get_closest_marker("slow") for item in items):
        command += ["--shape", "G2"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(file.read_text())


GOLDEN = predict.read_golden()


each_shape = pytest.mark.parametrize("shape", [pytest.param("G1", marks=pytest.mark.slow), "G2"])


@each_shape
def test_kernels_are_no_worse(found, shape):
    """Each kernel's expected time is at most 3 % over the golden table's, none spills."""
    assert predict.VERSION in GOLDEN or GOLDEN, "python -m benchmarks.predict --update"
    one = next(one for one in found["shapes"] if one["shape"]["name"] == shape)
    assert [row["kernel"] for row in one["rows"] if row["spills"]] == []
    if predict.VERSION not in GOLDEN:
        pytest.skip(f"the golden table has Triton {', '.join(GOLDEN)}, not {predict.VERSION}")
    golden = GOLDEN[predict.VERSION][shape]
    times = {row["kernel"]: row["expected_ms"] for row in one["rows"]}
    assert times.keys() == golden.keys() - {"step"}
    worse = {
        name: (expected, golden[name])
        for name, expected in {**times, "step": one["step_ms"]}.items()
        if expected > 1.03 * golden[name] + 0.001
    }
    assert not worse, f"expected ms, and that of the golden table: {worse}"


@each_shape
def test_auxiliary_pass_is_a_small_part_of_a_step(found, shape):
    """At most 15 %, as training has it by default."""
    one = next(one for one in found["shapes"] if one["shape"]["name"] == shape)
    more = one["auxiliary"]
    assert more["total_ms"] <= 0.15 * one["step_ms"]
    assert [row["kernel"] for row in more["rows"] if row["spills"]] == []
    assert f"### Auxiliary pass: {more['shape']['k']} dead latents" in predict.table(one)


def test_bytes_of_a_weight_by_the_dtype_of_its_moments():
    """26 with float32 moments and a copy in bfloat16, 18 with bfloat16 ones."""
    shape = SHAPES["G1"]
    numbers = shape.dict_size * shape.d
    works = [stages(shape, "kron", 2, moment)["decoder update"] for moment in (4, 2)]
    assert works[0].moved_bytes - works[1].moved_bytes == (26 - 18) * numbers


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--update", "--shape", "toy"], "leave out --shape, --card, --moments and --refine"),
        (["--update", "--card", "sm_80"], "leave out --shape, --card, --moments and --refine"),
        (["--json", "{folder}/none/x.json"], "--json: expected a file in a folder that exists"),
    ],
)
def test_wrong_arguments_are_said_before_anything_is_compiled(
    arguments, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as left:
        predict.main([argument.format(folder=tmp_path) for argument in arguments])
    assert left.value.code == 2 and words in capsys.readouterr().err


def test_every_column_has_a_unit_or_a_line_in_the_legend(found):
    head = predict.table(found["shapes"][0]).splitlines()[2]
    columns = [cell.strip() for cell in head.strip("|").split("|")]
    terms = {term.strip() for line in predict.LEGEND.splitlines() for term in line[:19].split(",")}
    assert {column.removesuffix(", ms").removesuffix(", bytes") for column in columns} == {
        "kernel", *terms,
    }  # fmt: skip


def test_table_names_every_kernel_and_goal(found):
    for one in found["shapes"]:
        text = predict.table(one)
        for row in one["rows"]:
            assert f"| {row['kernel']} |" in text
        assert (
            "of the floor" in text and "as fast as sparsify" in text and "as fast as dense" in text
        )
        other = predict.verdicts({**one, "card": "sm_100"})
        assert "of the floor" in other[0] and not any("as fast as" in line for line in other)
        small = predict.verdicts({**one, "shape": {**one["shape"], "name": "S1"}})
        assert " at most " in other[0] and not any(" at most " in line for line in small)
        for row in one["rows"]:  # what the table shows gives what is expected
            bounds = [row[f"{kind}_ms"] for kind in ("issue", "latency", "bytes")]
            launched = predict.RAMP_MS * row["launches"]
            assert predict.together(*bounds) + launched == pytest.approx(row["expected_ms"])


@pytest.mark.slow
@pytest.mark.parametrize("card", sorted(CARDS))
def test_every_card_has_a_table(card, tmp_path):
    """Compilers turn loops in other ways for each; and nothing spills at these shapes.

    Of 32 keys that a thread of select_heads holds at P4, sm_100 spills 4. What needs no spill takes
    longer there: 0.677 ms with LANES 1024, 1.04 with the loops over a head's rows left as loops,
    and 0.654 as it is.
    """
    file = tmp_path / "predicted.json"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    command = [sys.executable, "-m", "benchmarks.predict", "--card", card]
    command += ["--shape", "G1", "G2", "P3", "P4", "--auxiliary", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for one in json.loads(file.read_text())["shapes"]:
        rows = [*one["rows"], *one["auxiliary"]["rows"]]
        spills = {row["kernel"]: row["spills"] for row in rows if row["spills"]}
        known = {"select_heads": 16} if (card, one["shape"]["name"]) == ("sm_100", "P4") else {}
        assert spills.items() <= known.items(), one["shape"]["name"]
