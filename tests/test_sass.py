"""A warp's way through machine code: loops, jumps, and what it waits for, counted by hand."""

import linecache

import pytest

from benchmarks import sass
from benchmarks.sass import Latencies, UnknownLoop

LATENCIES = Latencies(
    first_level=40, cached=500, memory=800, shared=33, barrier=10, other=25, read=20
)
FREE = 7


def listing(*rows: tuple) -> str:
    """nvdisasm's output: rows are (text, stall, result, operands, waits), labels, or lines."""
    out, at = [], 0
    for row in rows:
        if isinstance(row, str):
            out.append(f"{row}:")
            continue
        if isinstance(row[0], int):
            out.append(f'\t//## File "kernel.py", line {row[0]}')
            continue
        text, stall, result, operands, waits = row
        control = stall | result << 5 | operands << 8 | sum(1 << 11 + board for board in waits)
        out.append(f"        /*{at:04x}*/       {text} ;   /* 0x{at:016x} */")
        out.append(f"                           /* 0x{control << 41:016x} */")
        at += 16
    return "\n".join(out)


def plain(text: str, stall: int = 1) -> tuple:
    return text, stall, FREE, FREE, ()


@pytest.fixture(autouse=True)
def source(monkeypatch):
    """Lines 1 to 5 of kernel.py."""
    lines = [
        "x = 1\n",
        "for i in range(k):\n",
        "    y = load(a + i)\n",
        "if rare:\n",
        "    z = 2\n",
    ]
    monkeypatch.setattr(linecache, "getlines", lambda file: lines)
    monkeypatch.setattr(linecache, "getline", lambda file, n: lines[n - 1] if 0 < n < 6 else "")
    sass._bodies.cache_clear()
    yield
    sass._bodies.cache_clear()


def time_of(code: sass.Code, order: list[int], level: str = "memory") -> sass.Time:
    return sass.simulate(code, order, LATENCIES, lambda one: level)


def test_fields_of_an_instruction():
    (one,) = sass.parse(listing((3,), ("@!P0 LDG.E.128 R4, [R2]", 2, 1, 0, (3, 5)))).instructions
    assert one == ("@!P0 LDG.E.128 R4, [R2]", "kernel.py", 3, 2, 1, 0, (3, 5))
    assert (one.operation, one.name, one.conditional) == ("LDG", "LDG.E.128", True)
    assert one.source == "y = load(a + i)"


@pytest.mark.parametrize("between, expected", [(0, 800), (300, 800), (900, 901)])
def test_a_load_costs_what_is_left_of_its_latency(between, expected):
    code = sass.parse(
        listing(
            ("LDG.E R4, [R2]", 1, 0, FREE, ()),
            *between * [plain("IADD3 R0, R0, R1")],
            ("FADD R5, R4, R4", 1, FREE, FREE, (0,)),
            plain("EXIT"),
        )
    )
    assert time_of(code, sass.path(code, {})).cycles == expected + 2
    assert time_of(code, sass.path(code, {}), "cached").cycles == max(500, between + 1) + 2


def test_loads_in_flight_together_are_waited_for_once():
    code = sass.parse(
        listing(
            *4 * [("LDG.E R4, [R2]", 1, 0, FREE, ())],
            ("FADD R5, R4, R4", 4, FREE, FREE, (0,)),
            plain("EXIT"),
        )
    )
    time = time_of(code, sass.path(code, {}))
    assert time.cycles == 3 + 800 + 4 + 1
    assert sum(time.waits.values()) == 799


def test_copies_are_waited_for_by_group():
    """With one group allowed in flight, the wait is for the first alone."""
    code = sass.parse(
        listing(
            plain("LDGSTS.E [R1], [R2]"),
            ("LDGDEPBAR", 100, 0, FREE, ()),
            plain("LDGSTS.E [R1], [R2]"),
            ("LDGDEPBAR", 1, 0, FREE, ()),
            plain("DEPBAR.LE SB0, 0x1"),
            plain("EXIT"),
        )
    )
    assert time_of(code, sass.path(code, {})).cycles == 800 + 1 + 1


def test_barrier():
    code = sass.parse(listing(plain("BAR.SYNC.DEFER_BLOCKING 0x0", 2), plain("EXIT")))
    assert time_of(code, sass.path(code, {})).cycles == 10 + 2 + 1


LOOP = listing(
    (1,),
    plain("MOV R0, R1"),
    ".L_1",
    (3,),
    plain("IADD3 R0, R0, R1"),
    (2,),
    plain("@P0 BRA `(.L_1)"),
    (4,),
    plain("@!P1 BRA `(.L_2)"),
    (5,),
    plain("MUFU.RSQ R1, R2"),
    ".L_2",
    (1,),
    plain("EXIT"),
)


def test_loop_runs_as_often_as_its_line_says():
    code = sass.parse(LOOP)
    assert code.loops == [(1, 2)]
    assert sass.path(code, {"for i in": 3}) == [0, 1, 2, 1, 2, 1, 2, 3, 4, 5]
    assert sass.path(code, {"for i in": 1, "if rare": 0}) == [0, 1, 2, 3, 5]
    assert sass.path(code, {"for i in": 0}) == [0, 3, 4, 5]


def test_unknown_loop():
    with pytest.raises(UnknownLoop, match=r"kernel\.py: for i in range"):
        sass.path(sass.parse(LOOP), {"while": 3})


def test_a_loop_is_known_by_any_of_its_lines():
    """Where the compiler turned it, so that neither end has the line that begins it."""
    rows = (".L_1", (3,), plain("IADD3 R0, R0, R1"), (2,), plain("ISETP P0, R0"), (5,))
    rows += (plain("@P0 BRA `(.L_1)"), plain("EXIT"))
    assert sass.path(sass.parse(listing(*rows)), {"for i in": 2}) == [0, 1, 2, 0, 1, 2, 3]


def test_a_path_behind_the_end_is_no_loop():
    rows = (plain("@P0 BRA `(.L_2)"), ".L_1", plain("MOV R0, R1"), plain("EXIT"))
    rows += (".L_2", plain("IADD3 R0, R0, R1"), plain("BRA `(.L_1)"))
    code = sass.parse(listing(*rows))
    assert code.loops == [] and sass.path(code, {}) == [0, 1, 2]


def test_jump_over_a_loop_that_runs_is_not_taken():
    """A guard: `if none: goto end`, written as a jump over the loop."""
    rows = (
        (1,),
        plain("@P0 BRA `(.L_0)"),
        plain("BRA `(.L_2)"),
        ".L_0",
        (2,),
        ".L_1",
        plain("IADD3 R0, R0, R1"),
        plain("@P0 BRA `(.L_1)"),
        ".L_2",
        plain("EXIT"),
    )
    code = sass.parse(listing(*rows))
    assert sass.path(code, {"for i in": 2}) == [0, 1, 2, 3, 2, 3, 4]
    assert sass.path(code, {"for i in": 0}) == [0, 1, 4]
