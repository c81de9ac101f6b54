"""NVIDIA machine code: what a compiled kernel's instructions are, and how long a warp takes them.

`parse` reads the disassembly with its control codes. `path` follows the instructions that a warp
executes, with the trip count of each loop given by the loop's source line. `simulate` walks along
that path as a warp does: in order, each instruction after the stall that its predecessor demands
and the scoreboards that it waits for. So a load that is issued long before its use costs nothing,
and one that is waited for at once costs its whole latency.
"""

import functools
import linecache
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import kronsae_kernels

SCOREBOARDS = 6
NONE = 7
"""A scoreboard field that names none."""


class Instruction(NamedTuple):
    """One machine instruction."""

    text: str
    """With its predicate and operands, as nvdisasm prints it."""
    file: str
    line: int
    """Source line of the innermost function; 0 if unknown."""
    stall: int
    """Cycles until the warp may issue the next one."""
    result: int
    """Scoreboard released when the result is there, or NONE."""
    operands: int
    """Scoreboard released when the operands have been read, or NONE."""
    waits: tuple[int, ...]
    """Scoreboards that must be free before it is issued."""

    @property
    def operation(self) -> str:
        """The name without predicate and modifiers, as "LDG"."""
        return self.name.split(".")[0]

    @property
    def name(self) -> str:
        """The name with its modifiers, as "LDG.E.128"."""
        return re.sub(r"^@!?U?P\w+\s+", "", self.text).split()[0]

    @property
    def conditional(self) -> bool:
        """Whether it has a predicate: on itself, or as an operand (a branch's)."""
        return self.text.startswith("@") or re.match(r"BRA(\.\w+)* !?U?P\d", self.text) is not None

    @property
    def ends(self) -> bool:
        """Whether the warp exits here, whatever came before."""
        return self.operation == "EXIT" and not self.conditional

    @property
    def source(self) -> str:
        """Its source line's text."""
        return linecache.getline(self.file, self.line).strip()


class Code(NamedTuple):
    """A kernel's instructions, and where its jumps go."""

    instructions: list[Instruction]
    jumps: dict[int, int]
    """Position of each branch: that of its target."""

    @property
    def loops(self) -> list[tuple[int, int]]:
        """(first, last) instruction of each loop: a jump back over more than itself.

        One over the program's end comes from a seldom path that the compiler laid behind it.
        """
        ends = [at for at, one in enumerate(self.instructions) if one.ends]
        back = [(to, at) for at, to in self.jumps.items() if to < at]
        return [(to, at) for to, at in back if not any(to <= end < at for end in ends)]


def parse(listing: str) -> Code:
    """Code from the output of `nvdisasm -c -hex -g`."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    branches: dict[int, str] = {}
    file, line, text = "", 0, ""
    for row in listing.splitlines():
        if match := re.match(r'\s*//## File "(.*?)", line (\d+)', row):
            file, line = _here(match[1]), int(match[2])
        elif match := re.match(r"\s*(\.L\w+):", row):
            labels[match[1]] = len(instructions)
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*/\* 0x[0-9a-f]{16} \*/", row):
            text = match[1].strip("{}; ")
        elif (match := re.match(r"\s*/\* 0x([0-9a-f]{16}) \*/", row)) and text:
            if target := re.search(r"\bBRA\b.*?(\.L\w+)", text):
                branches[len(instructions)] = target[1]
            # The upper half of an instruction ends with its control codes, 21 bits.
            control = int(match[1], 16) >> 41
            waits = tuple(i for i in range(SCOREBOARDS) if control >> (11 + i) & 1)
            fields = control & 15, control >> 5 & 7, control >> 8 & 7
            instructions.append(Instruction(text, file, line, *fields, waits))
            text = ""
    return Code(instructions, {at: labels[to] for at, to in branches.items() if to in labels})


def _here(file: str) -> str:
    """Where this checkout has a kernel's source: Triton's cache may hold one that another compiled
    (its key has the text and the line, not the place)."""
    _, ours, rest = file.rpartition(f"/{kronsae_kernels.__name__}/")
    return str(Path(kronsae_kernels.__file__).parent / rest) if ours else file


# The path of a warp


class UnknownLoop(ValueError):
    """A loop whose trip count is not given."""


Trips = Mapping[str, int]
"""A part of the source line that begins a loop: how often its body runs. 0 leaves its body out,
also that of an `if` (a path that is seldom taken)."""


def path(code: Code, trips: Trips) -> list[int]:
    """Positions of the instructions that a warp executes, in order.

    Conditional jumps forward are taken where their line has 0 trips, unconditional ones always,
    except over a loop that runs.
    Raises UnknownLoop for a loop whose line is not among `trips`.
    """
    unreached = [_within(one, trips) for one in code.instructions]
    counts = {loop: _trips_of(code, loop, trips) for loop in code.loops}
    taken: list[int] = []

    def walk(at: int, end: int, inside: frozenset[tuple[int, int]]) -> bool:
        """Append what runs from `at` up to `end`; False once the warp has exited."""
        while at < end:
            starting = [loop for loop in counts if loop[0] == at and loop not in inside]
            outermost = max(starting, default=None)
            if outermost is not None:
                for _ in range(counts[outermost]):
                    if not walk(at, outermost[1] + 1, inside | {outermost}):
                        return False
                at = outermost[1] + 1
                continue
            one = code.instructions[at]
            if not unreached[at]:
                taken.append(at)
                if one.ends:
                    return False
                to = code.jumps.get(at, -1)
                over = any(at < a and b < to and count for (a, b), count in counts.items())
                skips = any(part in one.source for part in _left_out(trips))
                if to > at and (skips if one.conditional else not over):
                    at = to
                    continue
            at += 1
        return True

    walk(0, len(code.instructions), frozenset())
    return taken


def _trips_of(code: Code, loop: tuple[int, int], trips: Trips) -> int:
    first, last = loop
    if last == first:  # padding behind the last exit
        return 1
    within = [(a, b) for a, b in code.loops if first <= a and b <= last and (a, b) != loop]
    own = [at for at in range(last, first, -1) if not any(a <= at <= b for a, b in within)]
    lines = [code.instructions[at].source for at in (last, first, *own)]
    for line in lines:
        for part, count in trips.items():
            if part in line:
                return count
    if _within(code.instructions[last], trips):  # in a path that is left out
        return 0
    raise UnknownLoop(f"loop at {code.instructions[last].file}: {' / '.join(lines[:2])}")


def _within(one: Instruction, trips: Trips) -> bool:
    """Whether an instruction's source line lies in the body of a line with 0 trips."""
    bodies = _bodies(one.file, _left_out(trips))
    return any(head < one.line <= end for head, end in bodies)


def _left_out(trips: Trips) -> tuple[str, ...]:
    return tuple(part for part, count in trips.items() if count == 0)


@functools.cache
def _bodies(file: str, parts: tuple[str, ...]) -> list[tuple[int, int]]:
    """(line, last line of its body) of each line of a file that has one of these parts."""
    lines = linecache.getlines(file)
    return [
        (number, _end_of_body(lines, number))
        for number, line in enumerate(lines, 1)
        if any(part in line for part in parts)
    ]


def _end_of_body(lines: Sequence[str], number: int) -> int:
    def depth(line: str) -> int:
        return len(line) - len(line.lstrip())

    end = number
    while end < len(lines) and (
        not lines[end].strip() or depth(lines[end]) > depth(lines[number - 1])
    ):
        end += 1
    return end


# Its time


class Latencies(NamedTuple):
    """Cycles until a result is there, on a card under load."""

    first_level: int
    """A load that all programs make from the same address."""
    cached: int
    """A load from the L2 cache."""
    memory: int
    shared: int
    barrier: int
    """For the last warp to come, beyond the instruction itself."""
    other: int
    """Shuffles, special functions, special registers."""
    read: int
    """Until a store's or a load's operands have been read."""


class Time(NamedTuple):
    """How a warp spends its time on a path."""

    cycles: int
    waits: Counter[tuple[str, str]]
    """Cycles of waiting, by source line and by the operation that waits."""


LOADS = ("LDG", "LDGSTS", "LD")
SHARED = ("LDS", "LDSM", "STS", "STSM")


def simulate(
    code: Code,
    order: Sequence[int],
    latencies: Latencies,
    level_of: Callable[[Instruction], str],
) -> Time:
    """Time of one warp along a path, from issue to issue.

    level_of: from an Instruction that loads from global memory, the name of its latency.
    """
    now = 0
    pending: list[list[int]] = [[] for _ in range(SCOREBOARDS)]
    copies: list[int] = []
    waits: Counter[tuple[str, str]] = Counter()
    for at in order:
        one = code.instructions[at]
        operation, before = one.operation, now
        for board in one.waits:
            now = max([now, *pending[board]])
            pending[board] = []
        if operation == "DEPBAR" and (match := re.search(r"SB(\d), 0x(\w+)", one.text)):
            board, allowed = int(match[1]), int(match[2], 16)
            ends = sorted(pending[board])
            if len(ends) > allowed:
                now = max(now, ends[len(ends) - allowed - 1])
                pending[board] = ends[len(ends) - allowed :]
        if operation == "BAR":
            now += latencies.barrier
        if now > before:
            waits[one.source, operation] += now - before
        if operation in LOADS:
            latency = getattr(latencies, level_of(one))
        elif operation in SHARED:
            latency = latencies.shared
        else:
            latency = latencies.other
        if operation == "LDGSTS":
            copies.append(now + latency)
        if operation == "LDGDEPBAR":  # closes a group of copies
            pending[0].append(max(copies, default=now))
            copies = []
        elif one.result != NONE:
            pending[one.result].append(now + latency)
        if one.operands != NONE:
            pending[one.operands].append(now + latencies.read)
        now += max(1, one.stall)
    return Time(now, waits)
