"""All that wants a GPU, within a time: `python -m benchmarks.on_gpu all --out DIR --seconds 520`.

A command, or several, of:

    check        values, gradients and indices at the goals' shapes and at odd ones, the kernels'
                 tests, invalid accesses and races (compute-sanitizer), memory of a step
    profile      each stage and kernel of the step beside its floor and its prediction; what the
                 largest kernels wait for (ncu)
    compare      steps side by side, the goals, other libraries if they are installed; small F
    tune         better configurations of the kernels
    end-to-end   with language models in the shapes of two known ones: alone, the autoencoder alone,
                 both

Kernels are compiled first, in many processes. Each part is a process of its own with its own limit,
and writes as it goes, so that what fails or runs long costs only itself. DIR then holds summary.md,
summary.json and results.tar.gz: raw figures and logs.

Thirty minutes of a card. What `tune` finds better is put into configs.json for what follows:

    python -m benchmarks.on_gpu check profile compare --out DIR/1 --seconds 540
    python -m benchmarks.on_gpu tune --out DIR/2 --seconds 480
    tar -xzf DIR/2/results.tar.gz -C DIR/2
    python -m benchmarks.tune --read DIR/2/results/tune.json --write
    python -m benchmarks.on_gpu compare end-to-end --out DIR/3 --seconds 420

Works from a bare checkout: torch, triton, numpy, pytest, pytest-xdist, hypothesis, transformers.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.flags import positive_seconds
from benchmarks.shapes import GOAL_SHAPES
from kronsae.system.tables import markdown

ROOT = Path(__file__).parents[1]
RESERVE = 20.0
"""Seconds kept for the summary."""
COMMANDS = ("check", "profile", "compare", "tune", "end-to-end")
SECONDS = "{seconds}"
"""Stands in a part's command for the seconds after which it begins nothing new."""
ALONE, TOGETHER = True, False
COMPILED = {
    "check": "G1 G2 --checks",
    "profile": "G1 G2",
    "compare": "G1 G2 S1 S2",
    "tune": "G1 G2 --tuning",
    "end-to-end": "L1 L2",
}
"""Options of benchmarks.precompile for what each command launches."""
LARGEST = "select_heads|decode_and_loss|update_rows|head_gradients"
"""The kernels that take most of a step."""


class Part(NamedTuple):
    """A process."""

    name: str
    of: str
    """The command that it belongs to."""
    command: list[str]
    share: float
    """Share of the time that is left, relative to the shares of the parts that follow."""
    alone: bool = ALONE
    """Whether nothing may run beside it: it measures time, or takes all processors."""
    environment: dict[str, str] = {}


class Done(NamedTuple):
    """How a part ended."""

    name: str
    status: str
    """"ok", "exit status N", "stopped after its N s", or why it was not begun."""
    seconds: float
    tail: str
    """The last lines it printed."""


def tool(name: str) -> str:
    """An NVIDIA tool where a CUDA toolkit puts it, unless it is on the path."""
    there = f"/usr/local/cuda/bin/{name}"
    return there if shutil.which(name) is None and shutil.which(there) else name


class Maker(NamedTuple):
    """Makes parts, on a GPU or in a rehearsal; raw: the folder that they write into."""

    raw: Path
    smallest: bool

    def of(self, larger: str, smaller: str) -> list[str]:
        return (smaller if self.smallest else larger).split()

    @property
    def device(self) -> list[str]:
        return ["--device", *self.of("cuda", "cpu")]

    @property
    def goals(self) -> list[str]:
        return ["--shape", *self.of(" ".join(GOAL_SHAPES), "toy")]

    def module(self, name: str, *options: str, file: str = "") -> list[str]:
        file = str(self.raw / f"{file or name}.json")
        return [sys.executable, "-m", f"benchmarks.{name}", "--json", file, *options]

    def timed(self, name: str, *options: str, file: str = "") -> list[str]:
        return self.module(name, *self.device, "--seconds", SECONDS, *options, file=file)

    def watched(self, name: str) -> Part:
        check = self.module("check", *self.device, "--smallest", file=name)
        command = [tool("compute-sanitizer"), "--tool", name, "--error-exitcode", "9", *check]
        every_tensor = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # is an allocation of its own
        return Part(name, "check", command, 90, TOGETHER, every_tensor)

    def compile(self, commands: list[str]) -> Part:
        words = sorted({word for name in commands for word in COMPILED[name].split()})
        flags = [word for word in words if word.startswith("--")]
        larger = [*flags, "--shape", *(word for word in words if word not in flags)]
        smaller = "--shape toy --target sm_90 --most 2 --workers 2"
        options = self.of(" ".join(larger), smaller)
        return Part("compile", "", self.module("precompile", *options), 100)

    def check(self) -> list[Part]:
        workers = min(12, os.cpu_count() or 1)
        check = self.of(f"--workers {max(1, workers // 3)}", "--smallest")
        pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
        if importlib.util.find_spec("xdist"):
            pytest += ["-n", *self.of(str(workers), "0")]
        pytest += sorted(str(path) for path in (ROOT / "tests").glob("test_triton*.py"))
        pytest += self.of("--maxfail=20", "--co")
        memory = self.module("memory", *self.device, *self.goals[:2])
        return [
            Part("check", "check", self.module("check", *self.device, *check), 120, TOGETHER),
            Part("tests", "check", pytest, 120, TOGETHER),
            self.watched("memcheck"),
            self.watched("racecheck"),
            Part("memory", "check", memory, 60, TOGETHER),
        ]

    def profile(self) -> list[Part]:
        contenders = ["kron"] if self.smallest else ["kron fused", "kron fused + aux"]
        predict = self.module("predict", *self.goals, file="logs/predicted")
        predicted = ["--predicted", str(self.raw / "logs" / "predicted.json")]
        profile = self.timed("profile", *self.goals, "--contender", *contenders, *predicted)
        sections = "--section WarpStateStats --section SpeedOfLight --section Occupancy"
        stalls = [tool("ncu"), "--clock-control", "none", *sections.split()]
        stalls += ["--kernel-name", f"regex:^({LARGEST})$", sys.executable]
        stalls += ["-m", "benchmarks.profile", "--once", *self.goals]
        return [
            Part("predict", "profile", predict, 60, TOGETHER),
            Part("profile", "profile", profile, 60),
            Part("stalls", "profile", stalls, 60),
        ]

    def compare(self) -> list[Part]:
        small = self.timed("compare", "--shape", *self.of("S1 S2", "toy"), file="small")
        return [
            Part("compare", "compare", self.timed("compare", *self.goals), 150),
            Part("small", "compare", small, 40),
        ]

    def tune(self) -> list[Part]:
        options = self.of("", "--shape toy --kernels update_vector --rounds 1")
        interpreter = {"TRITON_INTERPRET": "1"} if self.smallest else {}
        return [Part("tune", "tune", self.timed("tune", *options), 400, ALONE, interpreter)]

    def end_to_end(self) -> list[Part]:
        options = self.of("", "--smallest --rounds 1")
        models = {"pythia-160m": "pythia-160m"}
        models |= {"qwen2.5-1.5b": "embedded" if self.smallest else "qwen2.5-1.5b"}
        commands = {
            name: self.timed("overlap", "--model", model, *options, file=name)
            for name, model in models.items()
        }
        return [Part(name, "end-to-end", command, 70) for name, command in commands.items()]


def parts(raw: Path, commands: list[str], smallest: bool) -> list[Part]:
    """The parts of some commands, in order; those that are not alone begin together."""
    make = Maker(raw, smallest)
    of = {name: getattr(make, name.replace("-", "_")) for name in COMMANDS}
    chosen = [part for name in COMMANDS if name in commands for part in of[name]()]
    return [make.compile(commands), *chosen]


def run(part: Part, limit: float, logs: Path) -> Done:
    """Run a part for at most `limit` seconds; what it started ends with it."""
    log, began = logs / f"{part.name}.txt", time.monotonic()
    soft = f"{max(1.0, 0.8 * limit - 5):.0f}"
    command = [soft if word == SECONDS else word for word in part.command]
    if shutil.which(command[0]) is None:
        return Done(part.name, f"{command[0]} is not on the path", 0.0, "")
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **part.environment},
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
            status = "ok" if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            status = f"stopped after its {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    tail = "\n".join(log.read_text(errors="replace").strip().splitlines()[-3:])[-600:]
    return Done(part.name, status, time.monotonic() - began, tail)


def brief(raw: Path, done: list[Done]) -> dict[str, Any]:
    """The figures that matter: how parts ended ("runs"), and each JSON file by its name."""
    figures: dict[str, Any] = {"runs": [one._asdict() for one in done]}
    for path in sorted(raw.glob("*.json")):
        try:
            figures[path.stem] = json.loads(path.read_text())
        except ValueError:  # stopped while it wrote
            continue
    return figures


def summary(figures: dict[str, Any], tables: str) -> str:
    """Markdown: the goals, what was wrong, how the parts ended, then the tables."""
    lines = ["# Summary", ""]
    for name in ("compare", "small"):
        for one in figures.get(name, {}).get("shapes", []):
            goals = [*one.get("goals", []), *([one["failed"]] if "failed" in one else [])]
            lines += [f"- {one['shape']['name']}: {goal}" for goal in goals]
    check = figures.get("check", {"checks": [], "wrong": []})
    count, wrong = len(check["checks"]), check["wrong"]
    lines.append(f"- {count - len(wrong)} of {count} checks of values and gradients are right")
    lines += [f"- wrong: {one}" for one in wrong[:20]]
    errors = figures.get("precompile", {}).get("errors", {})
    lines += [f"- not compiled: {kernel}: {why}" for kernel, why in errors.items()]
    if better := figures.get("tune", {}).get("better"):
        lines.append(f"- better configurations: {better}")
    rows = [(one["name"], one["status"], f"{one['seconds']:.0f}") for one in figures["runs"]]
    lines += ["", markdown(("part", "", "seconds"), rows)]
    for one in figures["runs"]:
        if one["status"] != "ok" and one["tail"]:
            lines += ["", f"{one['name']}, {one['status']}:", "```", one["tail"], "```"]
    return "\n".join(lines) + "\n\n" + tables.replace("# Benchmarks", "", 1).strip() + "\n"


def keep(out: Path, raw: Path, done: list[Done], tables: str = "") -> None:
    """Write what there is so far: whatever happens next, this is left."""
    figures = brief(raw, done)
    (out / "summary.json").write_text(json.dumps(figures, indent=1) + "\n")
    (out / "summary.md").write_text(summary(figures, tables))
    unfinished = out / "results.tar.gz.part"
    with tarfile.open(unfinished, "w:gz") as archive:
        archive.add(raw, "results")
    unfinished.replace(out / "results.tar.gz")


def report(raw: Path) -> str:
    from benchmarks import report as tables
    from benchmarks.measure import reason

    try:
        return tables.write(raw)
    except Exception as broken:  # the figures are there without tables
        return f"No tables: {reason(broken)}"


def read_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; "all" is all commands, and `only` the parts that are to run."""
    every = parts(Path(), list(COMMANDS), smallest=False)
    names = {of: [part.name for part in every if part.of == of] for of in ("", *COMMANDS)}
    parser = argparse.ArgumentParser(
        "python -m benchmarks.on_gpu",
        description=__doc__,
        epilog="parts, by command:\n\n"
        + "\n".join(f"    {of or 'any':12} {' '.join(listed)}" for of, listed in names.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "commands", nargs="+", choices=(*COMMANDS, "all"), metavar="COMMAND", help="as above"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the results, a new one"
    )
    parser.add_argument(
        "--seconds", type=positive_seconds, default=520.0, metavar="S",
        help="the whole takes at most this long; default: 520",
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts alone, see below")
    parser.add_argument(
        "--smallest", action="store_true", help="a toy shape on the CPU: a rehearsal"
    )
    options = parser.parse_args(arguments)
    if (options.out / "results.tar.gz").exists():
        parser.error(f"--out: {options.out} has results, which would be lost: give another folder")
    if "all" in options.commands:
        options.commands = list(COMMANDS)
    known = [name for of in ("", *options.commands) for name in names[of]]
    if unknown := [name for name in options.only or [] if name not in known]:
        parser.error(f"--only: no part {', '.join(unknown)}; there are {', '.join(known)}")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = read_arguments(arguments)
    end = time.monotonic() + options.seconds - min(RESERVE, 0.2 * options.seconds)
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    done: list[Done] = []
    with tempfile.TemporaryDirectory() as folder:
        raw, logs = Path(folder), Path(folder) / "logs"
        logs.mkdir()
        waiting = parts(raw, options.commands, options.smallest)
        waiting = [part for part in waiting if not options.only or part.name in options.only]
        while waiting:
            count = 1
            while not waiting[0].alone and count < len(waiting) and not waiting[count].alone:
                count += 1
            now, waiting = waiting[:count], waiting[count:]
            share, left = max(part.share for part in now), end - time.monotonic()
            limit = left * share / (share + _shares(waiting))
            if limit < 5:
                finished = [Done(part.name, "no time left", 0.0, "") for part in now]
            else:
                with ThreadPoolExecutor(count) as pool:
                    finished = list(pool.map(partial(run, limit=limit, logs=logs), now))
            for one in finished:
                print(f"{one.name}: {one.status}, {one.seconds:.0f} s\n{one.tail}\n", flush=True)
            done += finished
            keep(out, raw, done)
        keep(out, raw, done, report(raw))
    print((out / "summary.md").read_text())


def _shares(waiting: list[Part]) -> float:
    """Sum of the parts' shares; those that begin together count once."""
    together = [part.share for part in waiting if not part.alone]
    return sum(part.share for part in waiting if part.alone) + max(together, default=0.0)


if __name__ == "__main__":
    main()
