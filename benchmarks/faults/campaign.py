"""The faults: each is tried so many times, and what came of it is one row of the table."""

import dataclasses
import errno
import functools
import os
import random
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.faults import runs
from benchmarks.faults.injections import (
    Fault,
    Spots,
    limit_file_size,
    print_in,
    print_to,
    refuse_writes,
)
from benchmarks.faults.runs import Ended, Kind

KILLED = -signal.SIGKILL


class Failed(AssertionError):
    """A fault was not survived: what was lost, or which message was wrong."""


@dataclasses.dataclass
class Outcome:
    """A row of the table."""

    fault: str
    kind: str
    tried: int = 0
    hit: int = 0
    """How often the fault came before the run had ended by itself."""
    lost: list[str] = dataclasses.field(default_factory=list)
    """Errors of the attempts that were not survived; empty is what we want."""
    messages: list[str] = dataclasses.field(default_factory=list)
    """Messages that the user saw, without repetitions."""
    note: str = ""


class Campaign:
    """Runs without a fault, which all others are compared with; and the faults."""

    def __init__(self, folder: Path, seed: int, show: Callable[[str], None] = print) -> None:
        self.folder, self.seed, self.show = folder, seed, show
        self.kinds = runs.kinds(runs.make_inputs(folder), folder / "whole harvest")
        self.numbered = 0

    def folder_of(self, kind: Kind) -> Path:
        """Folder of the run that nothing happens to."""
        return self.folder / f"whole {kind.name}"

    @functools.cache  # noqa: B019
    def reference(self, kind: Kind) -> tuple[Any, Ended]:
        """Contents that an uninterrupted run leaves, and how it ended."""
        if kind.name == "cache":
            self.reference(self.kinds["harvest"])
        out = self.folder_of(kind)
        log = out.with_suffix(".log")
        ended = runs.execute(kind, [*kind.flags, "--out", out], log, Fault(spots=Spots()))
        if ended.status != 0:
            raise Failed(f"{kind.name}, without a fault: exit {ended.status}\n{ended.text}")
        return kind.compare(out), ended

    @functools.cache  # noqa: B019
    def another(self, kind: Kind) -> Path:
        """Folder of a run with another seed."""
        out = self.folder / f"another {kind.name}"
        arguments = [*kind.flags, "--seed", "1", "--out", out]
        ended = runs.execute(kind, arguments, out.with_suffix(".log"), Fault())
        if ended.status != 0:
            raise Failed(f"{kind.name}, with another seed: exit {ended.status}\n{ended.text}")
        return out

    def outcome(self, case: "Case", times: int) -> Outcome:
        """Try a fault so many times, each in a folder of its own; what was lost is noted."""
        kind = self.kinds[case.kind]
        outcome = Outcome(case.fault, case.kind)
        drawn = random.Random(f"{self.seed} {case.fault} {case.kind}")
        for _ in range(times):
            self.numbered += 1
            folder = self.folder / f"run-{self.numbered}"
            folder.mkdir()
            try:
                whole = self.reference(kind)
                case.attempt(Attempt(self, kind, outcome, drawn, folder, folder / "out", *whole))
            except (Failed, TimeoutError) as error:
                outcome.lost.append(str(error))
                self.show(f"LOST {outcome.fault}, {outcome.kind}: {error}")
            else:
                shutil.rmtree(folder)
            outcome.tried += 1
        return outcome


@dataclasses.dataclass
class Attempt:
    """A run in a folder of its own, to which a fault happens."""

    campaign: Campaign
    kind: Kind
    outcome: Outcome
    drawn: random.Random
    folder: Path
    """For logs; `out` lies in it."""
    out: Path
    """Folder of the run."""
    expected: dict[str, Any]
    """Contents that the uninterrupted run left."""
    whole: Ended
    """How the uninterrupted run ended."""
    logs: int = 0

    def run(self, fault: Fault = Fault()) -> Ended:  # noqa: B008
        """Begin the run, or go on with what is there."""
        self.logs += 1
        arguments = runs.first_or_resume(self.kind, self.out)
        return runs.execute(self.kind, arguments, self.folder / f"{self.logs}.log", fault)

    def go_on(self, *faults: Fault) -> list[Ended]:
        """The run to its end: begun or resumed, once with each fault, then in peace.

        Raises Failed unless what it leaves is what an uninterrupted run leaves.
        """
        ended: list[Ended] = []
        for fault in (*faults, Fault()):
            if not ended or ended[-1].status != 0:
                ended.append(self.run(fault))
                self.require_whole_files()
        self.require_success(ended[-1])
        self.require_finished()
        return ended

    def hit_by(self, fault: Fault) -> Ended | None:
        """`go_on` with a fault; returns how the run ended, or None if the fault came too late."""
        first, *_ = self.go_on(fault)
        self.outcome.hit += first.status != 0
        return first if first.status != 0 else None

    def require_finished(self) -> None:
        """Raises Failed unless everything is, bit for bit, as without a fault."""
        self.require_same(self.kind.compare(self.out), self.expected)
        if left := runs.strays(self.out):
            raise Failed(f"temporary files stay: {left}")

    def require_whole_files(self) -> None:
        if broken := runs.damaged(self.out):
            raise Failed(f"damaged under its final name: {broken[0]}")

    def require_success(self, ended: Ended) -> None:
        if ended.status != 0:
            raise Failed(f"exit {ended.status}\n{ended.text[-1500:]}")

    def require_same(self, contents: dict[str, Any], expected: dict[str, Any]) -> None:
        if contents != expected:
            raise Failed(f"other bits than without a fault: {differing(expected, contents)}")

    def require_error(self, ended: Ended, word: str) -> None:
        """Raises Failed unless it ended with one clear message, which has this word."""
        if ended.status != 2 or word not in error_of(ended.text) or "Traceback" in ended.text:
            raise Failed(
                f"exit {ended.status}, expected 2 and a message with {word!r}:\n"
                f"{ended.text[-1500:]}"
            )

    def say(self, text: str) -> None:
        """Note a message, without what differs from try to try: places, numbers."""
        text = text.replace(str(self.out), "RUN").replace(str(self.folder), "DIR")
        text = re.sub(r"\S+:\d+: UserWarning", "warning", text)
        text = re.sub(r"[0-9a-f]{8}(?=\.partial)", "…", text)
        text = re.sub(r"step-\d+", "step-N", text)
        text = re.sub(r"\d[\d,.]*\d|\d", "N", text).strip()
        if text and text not in self.outcome.messages:
            self.outcome.messages.append(text)


def error_of(text: str) -> str:
    """The message that a command ended with, which may have several lines."""
    match = re.search(r"^error: .*", text, re.MULTILINE | re.DOTALL)
    return match[0].strip() if match else ""


def lines_with(text: str, *words: str) -> str:
    return "\n".join(line for line in text.splitlines() if any(word in line for word in words))


def differing(expected: Any, got: Any, name: str = "") -> str:
    """The first place where two nested values differ."""
    if isinstance(expected, dict) and isinstance(got, dict):
        for key in sorted(expected.keys() | got.keys(), key=str):
            if expected.get(key) != got.get(key):
                return differing(expected.get(key), got.get(key), f"{name}/{key}")
    if isinstance(expected, bytes):
        size = None if got is None else len(got)
        return f"{name} ({len(expected)} bytes, got {size})"
    return f"{name}: expected {str(expected)[:300]}, got {str(got)[:300]}"


# Kills and signals


def kill(it: Attempt, at: str) -> None:
    """kill -9, of all its processes; at: a random "moment", or file "operation"."""

    def fault() -> Fault:
        if at == "moment":
            return Fault([(it.drawn.uniform(0, it.whole.seconds), signal.SIGKILL)])
        spot = it.drawn.randrange(1, it.whole.operations + 1)
        return Fault(spots=Spots(spot, after=it.drawn.random() < 0.5), seconds=60)

    again = [fault()] if it.drawn.random() < 0.3 else []  # also while it goes on
    it.outcome.hit += sum(KILLED in ended.statuses for ended in it.go_on(fault(), *again))


def stop(it: Attempt, numbers: Sequence[signal.Signals]) -> None:
    """Signals at a random moment; if there are two, the second comes a moment later."""
    moment = it.drawn.uniform(0.1, 1) * it.whole.seconds
    later = moment + it.drawn.uniform(0, 0.2)
    first = it.hit_by(Fault(list(zip((moment, later), numbers, strict=False))))
    if first is None:
        return
    if first.status not in {128 + n for n in numbers} | {-n for n in numbers}:
        raise Failed(f"exit {first.status}\n{first.text[-600:]}")
    said = lines_with(first.text, "Stopped by", "--resume", "stopped")
    if first.status > 0 and len(numbers) == 1 and "step" in first.text and not said:
        raise Failed(f"exit {first.statuses}, no word of how to go on:\n{first.text[-600:]}")
    it.say(said or "(none)")


def lose_rank(it: Attempt) -> None:
    """kill -9 of one of two ranks; the other one has to end by itself, and say so."""
    victim = it.drawn.randrange(2)
    moment = it.drawn.uniform(0.5, 0.95) * it.whole.seconds
    try:
        first, *_ = it.go_on(Fault([(moment, signal.SIGKILL)], [victim], seconds=120))
    except TimeoutError as error:
        raise Failed(f"the rank that was left did not end: {error}") from error
    if KILLED not in first.statuses or first.statuses[1 - victim] == 0:  # it had done its part
        return
    it.outcome.hit += 1
    if first.statuses[1 - victim] != 4:
        raise Failed(f"the rank that was left: exit {first.statuses}\n{first.text[-800:]}")
    it.say(error_of(first.text))


# A full disk


def limit_files(it: Attempt) -> None:
    """No file may grow beyond a random size: writes fail, as on a full disk, and need no mount."""
    files = it.campaign.folder_of(it.kind).rglob("*")
    largest = max(path.stat().st_size for path in files if path.is_file())
    size = int(largest ** it.drawn.uniform(0.4, 1))
    if first := it.hit_by(Fault(prepare=lambda: limit_file_size(size))):
        it.require_error(first, "File too large")
        it.say(error_of(first.text))


# Damage


def damage(it: Attempt, pattern: str, how: str) -> None:
    """A file is truncated or a bit of it flipped after a kill -9; then the run is resumed.

    Either it goes on to the same bits; or it names the file, and goes on to the same bits once the
    user has done what the message says.
    """
    if pattern in LAST:
        it.run()
    else:
        interrupt(it)
    files = sorted(it.out.glob(pattern))
    if not files:
        return
    it.outcome.hit += 1
    path = it.drawn.choice(files)
    DAMAGES[how](path, it.drawn)
    ended = it.run()
    if ended.status == 0:
        it.say("(none: it goes on)")
        it.require_finished()
        return
    it.require_error(ended, path.name if path.suffix == ".jsonl" else str(it.out))
    it.say(error_of(ended.text))
    obey(error_of(ended.text), it.out)
    it.go_on()


def obey(message: str, out: Path) -> None:
    """Do what a message says about a damaged file. Raises Failed if it says nothing."""
    remove = re.search(r"remove (?:the folder )?([^\s,]+)", message)
    copy = re.search(r"^  cp (\S+) (\S+)$", message, re.MULTILINE)
    if remove is not None and Path(remove[1]).is_relative_to(out):
        path = Path(remove[1])
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif copy is not None and all(Path(path).is_relative_to(out) for path in copy.groups()):
        shutil.copyfile(*copy.groups())
    else:
        raise Failed(f"the message does not say what to do: {message}")


def damage_log(it: Attempt, how: str) -> None:
    """Lines of metrics.jsonl are damaged after a kill -9: nothing else depends on them."""
    it.outcome.note = "lines of the log that were damaged; weights and checkpoints are the same"
    interrupt(it)
    it.outcome.hit += 1
    DAMAGES[how](it.out / "metrics.jsonl", it.drawn)
    ended = it.run()
    it.require_success(ended)
    it.say(lines_with(ended.text, "has lost", "are left out"))
    learned = runs.learned(it.out)
    it.require_same(learned, {name: it.expected[name] for name in learned})
    if not (it.out / "report.html").exists():
        raise Failed("there is no report")


def interrupt(it: Attempt) -> None:
    """Begin a run that dies at a file operation when three quarters of them are done."""
    at = round(it.drawn.uniform(0.7, 0.8) * it.whole.operations)
    it.run(Fault(spots=Spots(at), seconds=60))


def truncate(path: Path, drawn: random.Random) -> None:
    with open(path, "r+b") as file:
        file.truncate(drawn.randrange(path.stat().st_size))


def flip(path: Path, drawn: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[drawn.randrange(len(content))] ^= 1 << drawn.randrange(8)
    path.write_bytes(content)


def half_line(path: Path, drawn: random.Random) -> None:
    """Append half a line, as a kill in the middle of a write leaves it."""
    with open(path, "a") as file:
        file.write('{"kind": "train", "step": 1')


HALF = "half a line at the end"
DAMAGES = {"truncated": truncate, "a bit flipped": flip, HALF: half_line}


# Another run's checkpoint


def swap(it: Attempt, pattern: str) -> None:
    """A checkpoint of another run, of the same shapes, takes the place of one of this run."""
    other = it.campaign.another(it.kind)
    it.run()
    mine = it.drawn.choice(sorted(it.out.glob(pattern)))
    theirs = other / mine.relative_to(it.out)
    shutil.rmtree(mine)
    shutil.copytree(theirs, mine)
    it.outcome.hit += 1
    ended = it.run()
    it.require_error(ended, "is of another run")
    it.say(error_of(ended.text))
    obey(error_of(ended.text), it.out)
    it.go_on()


# A disk that fails


def refuse(it: Attempt, number: int) -> None:
    """All writes fail from a random one on, as on a file system that became read-only, or full."""
    after = it.drawn.randrange(it.whole.operations)
    if first := it.hit_by(Fault(prepare=lambda: refuse_writes(number, after))):
        it.require_error(first, os.strerror(number))
        it.say(error_of(first.text))


# What is printed


def print_badly(it: Attempt, prepare: Callable[[random.Random], None]) -> None:
    """Standard output and error fail; the run must not: it ends as if nothing was wrong."""
    seed = it.drawn.random()
    ended = it.run(Fault(prepare=lambda: prepare(random.Random(seed))))
    it.outcome.hit += 1
    it.require_success(ended)
    it.require_whole_files()
    it.require_finished()


# Training that diverges


def diverge(it: Attempt) -> None:
    """All gradients are NaN from a random step on: the run says so, and can go on without that.

    Of a sweep it is one member, and the other one ends as it would have.
    """
    at = it.drawn.randrange(2, 15)
    is_sweep = it.kind.name == "sweep"
    ended = it.run(Fault(prepare=lambda: gradients_are_nan(at, 4 if is_sweep else None)))
    it.outcome.hit += 1
    it.require_whole_files()
    said = lines_with(ended.text, "training has diverged; try a smaller lr than")
    if ended.status != (3 if is_sweep else 1) or not said or "Traceback" in ended.text:
        raise Failed(f"exit {ended.status}\n{ended.text[-1500:]}")
    it.say(said)
    if is_sweep:
        others = it.kind.compare(it.out)["k8"], it.expected["k8"]
        it.require_same(*others)
    else:
        it.require_success(it.run())
        it.require_whole_files()


def judge_badly(it: Attempt) -> None:
    """Held-out figures are NaN or infinite; what is learned has nothing to do with it."""
    ended = it.run(Fault(prepare=figures_are_nan))
    it.outcome.hit += 1
    it.require_success(ended)
    it.require_whole_files()
    for run in (it.out / "k4", it.out / "k8") if it.kind.name == "sweep" else (it.out,):
        final = runs.records(run)[-1]
        if final["fvu"] is not None or "fvu is inf" not in final["not_finite"]:
            raise Failed(f"the log does not say what was not finite: {final}")
        expected = runs.learned(it.campaign.folder_of(it.kind) / run.relative_to(it.out))
        it.require_same(runs.learned(run), expected)


def gradients_are_nan(at: int, k: int | None) -> None:
    """From step `at` on, of members with this k; None: of all."""
    from kronsae.training.learner import Learner

    step = Learner._autograd_step

    def wrong(self: Any, *args: Any) -> Any:
        if self.step_count >= at and k in (None, self.sae.config.k):
            raise FloatingPointError("gradient norm is nan")
        return step(self, *args)

    Learner._autograd_step = wrong  # type: ignore[method-assign]


def figures_are_nan() -> None:
    from kronsae.metrics.figures import ReconstructionMetrics

    compute = ReconstructionMetrics.compute

    def wrong(self: Any) -> dict[str, float]:
        return compute(self) | {"fvu": float("inf"), "mse": float("nan")}

    ReconstructionMetrics.compute = wrong  # type: ignore[method-assign]


# Sources that fail


def fail(it: Attempt, install: Callable[[int], None]) -> None:
    """The text or the language model raises an exception in the middle; later it does not."""
    at = it.drawn.randrange(5, 12)
    if first := it.hit_by(Fault(prepare=lambda: install(at))):
        said = lines_with(first.text, "Go on", "go on", "--resume")
        if "--resume" not in said:
            raise Failed(f"no word of how to go on:\n{first.text[-1500:]}")
        it.say(error_of(first.text) or said)


def outlier(it: Attempt) -> None:
    """A token of enormous size is massive: it is left out, and all others are learned from."""
    at = it.drawn.randrange(5, 9)
    ended = it.run(Fault(prepare=lambda: model_gives(1e30, at)))
    it.require_success(ended)
    it.require_whole_files()
    records, expected = map(runs.records, (it.out, it.campaign.folder_of(it.kind)))
    it.outcome.hit += any(record.get("massive_share", 0) > 0 for record in records)
    if any(record["kind"] == "skipped" for record in records):
        raise Failed("a batch was skipped, not the token alone left out")
    name = "explained_variance"
    if abs(records[-1][name] - expected[-1][name]) > 0.02:
        raise Failed(f"explained variance {records[-1]}, without the token {expected[-1]}")


def text_fails(at: int) -> None:
    """Reading document number `at` of the text for training fails, as on a lost connection."""
    from kronsae.data import packing

    add, count = packing.Packer.add, [0]

    def failing(self: Any, document: Any) -> Any:
        count[0] += 1
        if count[0] == 2 * at:
            raise ConnectionError("the connection was lost")
        return add(self, document)

    packing.Packer.add = failing


def change_pass(at: int, change: Callable[[torch.Tensor], None]) -> None:
    """Call `change` with what forward pass number `at` of the language model reads out."""
    from kronsae.data.language_model import LanguageModel
    from kronsae.data.many_hookpoints import ManyHookpoints

    count = [0]

    def changed(run: Callable[..., list[torch.Tensor]]) -> Callable[..., list[torch.Tensor]]:
        def activations(self: Any, *args: Any) -> list[torch.Tensor]:
            outputs = run(self, *args)
            count[0] += 1
            if count[0] == at:
                change(outputs[0])
            return outputs

        return activations

    for model in (LanguageModel, ManyHookpoints):
        model.activations_of_points = changed(model.activations_of_points)


def model_fails(at: int) -> None:
    def raise_(x: torch.Tensor) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    change_pass(at, raise_)


def model_gives(value: float, at: int) -> None:
    change_pass(at, lambda x: x[0, 5].fill_(value))


# All of them


class Case(NamedTuple):
    """A fault, and a run that it is tried on."""

    fault: str
    kind: str
    times: int
    attempt: Callable[[Attempt], None]


KILLS = {
    "live": 5,
    "streamed": 3,
    "sweep": 5,
    "harvest": 5,
    "cache": 4,
    "2 ranks": 4,
    "2 ranks, heads shared out": 3,
}
"""Times that each kind is killed at a random moment, and as often at a random file operation."""
DAMAGED = [
    ("live", "checkpoints/step-*/state.safetensors"),
    ("live", "checkpoints/step-*/state.json"),
    ("live", "config.json"),
    ("sweep", "sweep.json"),
    ("sweep", "checkpoints/step-*/state.*"),
    ("sweep", "k4/checkpoints/step-*/state.*"),
    ("harvest", "train-*.safetensors"),
    ("harvest", "progress/step-*/state.*"),
    ("harvest", "harvest.json"),
    ("harvest", "index.json"),
]
LAST = ("index.json",)
"""Files that are there only once all is done."""
FAILURES = {
    "the text fails in the middle": text_fails,
    "the language model raises an exception": model_fails,
    "the language model gives NaN": partial(model_gives, float("nan")),
    "the language model gives infinity": partial(model_gives, float("inf")),
}


PRINTED: dict[str, Callable[[random.Random], None]] = {
    "printed to a pipe that closes": lambda drawn: print_to("| head", drawn.randrange(2000)),
    "printed to a full disk": lambda _: print_to("/dev/full"),
    "printed in latin-1": lambda _: print_in("latin-1"),
    "printed in cp1252": lambda _: print_in("cp1252"),
}
SWAPPED = [
    ("live", "checkpoints/step-*"),
    ("sweep", "k4/checkpoints/step-*"),
    ("sweep", "checkpoints/step-*"),
    ("cache", "checkpoints/step-*"),
]


def outer_cases() -> Iterator[Case]:
    """Faults around a run: divergence, what is printed, other runs' files, disks that fail."""
    for kind, times in {"live": 3, "cache": 2, "2 ranks": 1, "sweep": 3}.items():
        yield Case("gradients are NaN from a step on", kind, times, diverge)
    for kind in ("live", "sweep"):
        yield Case("held-out figures are NaN and infinite", kind, 2, judge_badly)
    for fault, prepare in PRINTED.items():
        for kind, times in {"live": 2, "sweep": 1, "harvest": 2}.items():
            attempt = partial(print_badly, prepare=prepare)
            yield Case(fault, kind, times, attempt)
    for kind in ("live", "sweep", "harvest", "cache", "2 ranks"):
        attempt = partial(stop, numbers=(signal.SIGHUP,))
        yield Case("SIGHUP at a random moment", kind, 2, attempt)
    for kind, pattern in SWAPPED:
        attempt = partial(swap, pattern=pattern)
        yield Case(f"another run's: {pattern}", kind, 2, attempt)
    for number, what in ((errno.EROFS, "read-only"), (errno.ENOSPC, "full")):
        for kind in ("live", "sweep", "harvest", "cache"):
            attempt = partial(refuse, number=number)
            yield Case(f"the file system becomes {what}", kind, 3, attempt)


def cases() -> Iterator[Case]:
    yield from outer_cases()
    for kind, times in KILLS.items():
        for at in ("moment", "operation"):
            yield Case(f"kill -9 at a random {at}", kind, times, partial(kill, at=at))
    term, interrupted = signal.SIGTERM, signal.SIGINT
    for kind in ("live", "sweep", "harvest", "cache", "2 ranks"):
        for numbers in ((term,), (interrupted,), (term, term)):
            names = " then ".join(number.name for number in numbers)
            attempt = partial(stop, numbers=numbers)
            yield Case(f"{names} at a random moment", kind, 2, attempt)
    for kind in ("live", "sweep", "harvest"):
        yield Case("no file may grow beyond a size (RLIMIT_FSIZE)", kind, 5, limit_files)
    for kind in ("2 ranks", "2 ranks, heads shared out"):
        yield Case("kill -9 of one of two ranks", kind, 3, lose_rank)
    for how in ("truncated", "a bit flipped"):
        for kind, pattern in DAMAGED:
            attempt = partial(damage, pattern=pattern, how=how)
            yield Case(f"{how}: {pattern}", kind, 2, attempt)
        yield Case(f"{how}: metrics.jsonl", "live", 2, partial(damage_log, how=how))
    attempt = partial(damage, pattern="metrics.jsonl", how=HALF)
    yield Case(f"{HALF}: metrics.jsonl", "live", 1, attempt)
    for fault, install in FAILURES.items():
        for kind in ("live", "harvest", *(["streamed"] if install is text_fails else [])):
            yield Case(fault, kind, 1, partial(fail, install=install))
    for kind in ("live", "2 ranks"):
        yield Case("an outlier token of 1e30", kind, 2, outlier)


def run_all(
    campaign: Campaign,
    scale: float,
    kinds: Sequence[str] | None = None,
    faults: Sequence[str] | None = None,
) -> list[Outcome]:
    """Try all faults, each `scale` times its `times` (at least once).

    kinds: of runs; None: all.  faults: words, of which a fault's name has one; None: all.
    """
    outcomes = []
    for case in cases():
        named = faults is None or any(word in case.fault for word in faults)
        if named and (kinds is None or case.kind in kinds):
            outcome = campaign.outcome(case, max(1, round(scale * case.times)))
            outcomes.append(outcome)
            campaign.show(
                f"{outcome.fault}, {outcome.kind}: tried {outcome.tried}, hit {outcome.hit}, "
                f"{'lost nothing' if not outcome.lost else 'LOST'} {outcome.note}"
            )
    return outcomes
