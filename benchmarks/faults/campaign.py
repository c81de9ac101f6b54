"""The faults: each is tried so many times, and what came of it is one row of the table."""

import contextlib
import dataclasses
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults import runs, strikes
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
    struck: int = 0
    """How often the fault hit before the run had ended by itself."""
    lost: list[str] = dataclasses.field(default_factory=list)
    """What was not survived; empty is what we want."""
    messages: list[str] = dataclasses.field(default_factory=list)
    """Different ones, of what the user saw."""
    note: str = ""

    def say(self, text: str) -> None:
        if text and text not in self.messages:
            self.messages.append(text)


class Campaign:
    """Runs without a fault, which all others are compared with; and the faults."""

    def __init__(self, folder: Path, seed: int, show: Callable[[str], None] = print) -> None:
        self.folder = folder
        self.seed = seed
        self.show = show
        inputs = runs.make_inputs(folder)
        self.inputs = inputs
        self.cache = folder / "cache"
        self.kinds = runs.kinds(inputs, self.cache)
        self.whole: dict[str, tuple[Any, Ended]] = {}
        self.numbered = 0
        self.outcomes: list[Outcome] = []

    def reference(self, kind: Kind) -> tuple[Any, Ended]:
        """What an uninterrupted run leaves, and how it went."""
        if kind.name == "cache":
            self.reference(self.kinds["harvest"])
        if kind.name not in self.whole:
            out = self.cache if kind.name == "harvest" else self.folder / f"whole {kind.name}"
            log = self.folder / f"whole {kind.name}.log"
            ended = runs.execute(kind, [*kind.flags, "--out", out], log, spots=strikes.Spots())
            if ended.status != 0:
                raise Failed(f"{kind.name}, without a fault: exit {ended.status}\n{ended.text}")
            self.whole[kind.name] = kind.compare(out), ended
        return self.whole[kind.name]

    def run_of(self, kind: Kind) -> Path:
        """Where the run is that nothing happens to."""
        self.reference(kind)
        return self.cache if kind.name == "harvest" else self.folder / f"whole {kind.name}"

    def new_folder(self) -> Path:
        self.numbered += 1
        place = self.folder / f"run-{self.numbered}"
        place.mkdir()
        return place

    def try_(self, outcome: Outcome, attempt: Callable[[Path], None]) -> None:
        """Make one attempt in a folder of its own, and note what it lost."""
        place = self.new_folder()
        outcome.tried += 1
        try:
            attempt(place)
        except (Failed, TimeoutError) as error:
            outcome.lost.append(str(error))
            self.show(f"LOST {outcome.fault}, {outcome.kind}: {error}")
        else:
            shutil.rmtree(place)

    def go_on(self, kind: Kind, place: Path, *strikes_: dict[str, Any]) -> list[Ended]:
        """A run in place/out to its end: begun or resumed, once for each strike, then in peace.

        Raises Failed unless what it leaves is what an uninterrupted run leaves.
        """
        out = place / "out"
        ended = []
        for strike in (*strikes_, {}):
            if ended and ended[-1].status == 0:
                break
            arguments = runs.first_or_resume(kind, out)
            log = place / f"{len(ended)}.log"
            ended.append(runs.execute(kind, arguments, log, **strike))
            broken = runs.damaged(out)
            if broken:
                raise Failed(f"damaged under its final name: {broken[0]}")
        if ended[-1].status != 0:
            last = "\n".join(ended[-1].text.splitlines()[-12:])
            raise Failed(f"could not go on: exit {ended[-1].status}\n{last}")
        self.same(kind, out)
        return ended

    def same(self, kind: Kind, out: Path) -> None:
        """Raise Failed unless a run is, bit for bit, as one without a fault."""
        expected, found = self.reference(kind)[0], kind.compare(out)
        if found != expected:
            raise Failed(f"other bits than without a fault: {_differing(expected, found)}")
        left = runs.strays(out)
        if left:
            raise Failed(f"temporary files stay: {left}")

    # kill -9

    def kills(self, kind: Kind, times: int, at: str) -> Outcome:
        """kill -9, of all its processes; at: a random "moment", or file "operation"."""
        outcome = Outcome(f"kill -9 at a random {at}", kind.name)
        whole = self.reference(kind)[1]
        drawn = random.Random(f"{self.seed} {at} {kind.name}")

        def strike() -> dict[str, Any]:
            if at == "moment":
                return {"signals": [(drawn.uniform(0, whole.seconds), signal.SIGKILL)]}
            spot = drawn.randrange(1, whole.operations + 1)
            return {"spots": strikes.Spots(spot, after=drawn.random() < 0.5), "seconds": 60}

        def attempt(place: Path) -> None:
            again = [strike()] if drawn.random() < 0.3 else []  # also while it goes on
            ended = self.go_on(kind, place, strike(), *again)
            outcome.struck += sum(KILLED in each.statuses for each in ended)

        for _ in range(times):
            self.try_(outcome, attempt)
        return outcome

    # Signals

    def stops(self, kind: Kind, times: int, numbers: tuple[int, ...]) -> Outcome:
        """Signals at a random moment; if there are two, the second comes a moment later."""
        names = " then ".join(signal.Signals(n).name for n in numbers)
        outcome = Outcome(f"{names} at a random moment", kind.name)
        whole = self.reference(kind)[1]
        drawn = random.Random(f"{self.seed} {names} {kind.name}")

        def attempt(place: Path) -> None:
            moment = drawn.uniform(0.1, 1) * whole.seconds
            later = moment + drawn.uniform(0, 0.2)
            signals = list(zip((moment, later), numbers))  # noqa: B905
            first, *_ = self.go_on(kind, place, {"signals": signals})
            if first.status == 0:
                return
            outcome.struck += 1
            usual = {128 + n for n in numbers} | {-n for n in numbers}
            if first.status not in usual:
                raise Failed(f"exit {first.status} after {names}\n{first.text[-600:]}")
            said = _last_lines(first.text, ("Stopped by", "--resume", "stopped"))
            if first.status > 0 and len(numbers) == 1 and "step" in first.text and not said:
                raise Failed(
                    f"exit {first.statuses}, no word of how to go on:\n{first.text[-600:]}"
                )
            outcome.say(_plain(said or "(none)", place))

        for _ in range(times):
            self.try_(outcome, attempt)
        return outcome

    # A full disk

    def full_disk(self, kind: Kind, times: int) -> Outcome:
        """A small disk that fills up at a random place; then there is room, and it goes on."""
        outcome = Outcome("the disk is full (tmpfs)", kind.name)
        if not can_mount(self.folder):
            outcome.note = "skipped: a tmpfs cannot be mounted here"
            return outcome
        needed = sum(p.stat().st_size for p in self.run_of(kind).rglob("*") if p.is_file())
        drawn = random.Random(f"{self.seed} disk {kind.name}")

        def attempt(place: Path) -> None:
            size = int(drawn.uniform(0.05, 0.95) * needed)
            with mounted(place / "disk", size) as resize:
                out = place / "disk" / "out"
                # Others fill it up later: what is free at the beginning is enough.
                ended = runs.execute(
                    kind,
                    [*kind.flags, "--out", out],
                    place / "0.log",
                    prepare=lambda rank: strikes.see_free(1 << 30),
                )
                broken = runs.damaged(out)
                if broken:
                    raise Failed(f"damaged under its final name: {broken[0]}")
                if ended.status != 0:
                    outcome.struck += 1
                    self.check_error(ended, ("No space left on device",))
                    outcome.say(_plain(_error(ended.text), place))
                resize(64 << 20)
                (place / "out").symlink_to(out)
                if ended.status != 0:
                    self.go_on(kind, place)

        for _ in range(times):
            self.try_(outcome, attempt)
        return outcome

    def no_room(self, kind: Kind, times: int) -> Outcome:
        """No file may grow beyond a random size: the form of a full disk that needs no mount."""
        outcome = Outcome("no file may grow beyond a size (RLIMIT_FSIZE)", kind.name)
        largest = max(p.stat().st_size for p in self.run_of(kind).rglob("*") if p.is_file())
        drawn = random.Random(f"{self.seed} limit {kind.name}")

        def attempt(place: Path) -> None:
            size = int(largest ** drawn.uniform(0.4, 1))
            first, *_ = self.go_on(
                kind, place, {"prepare": lambda rank: strikes.limit_file_size(size)}
            )
            if first.status != 0:
                outcome.struck += 1
                self.check_error(first, ("File too large",))
                outcome.say(_plain(_error(first.text), place))

        for _ in range(times):
            self.try_(outcome, attempt)
        return outcome

    def check_error(self, ended: Ended, words: tuple[str, ...]) -> None:
        """Raise Failed unless it ended with one clear message, which has these words."""
        message = _error(ended.text)
        missing = [word for word in words if word not in message]
        if ended.status != 2 or missing or "Traceback" in ended.text:
            raise Failed(
                f"exit {ended.status}, expected 2 and a message with {words}:\n{ended.text[-1500:]}"
            )

    # Damage

    def damage(self, kind: Kind, pattern: str, how: str, times: int = 1) -> Outcome:
        """A file is truncated or a bit of it flipped after a kill -9; then the run is resumed.

        It goes on to the same bits; or it names the file, and goes on to the same bits when what
        the message says was done.
        """
        outcome = Outcome(f"{how}: {pattern}", kind.name)
        whole = self.reference(kind)[1]
        drawn = random.Random(f"{self.seed} {how} {pattern} {kind.name}")

        def attempt(place: Path) -> None:
            out = place / "out"
            if pattern in LAST:
                runs.execute(kind, [*kind.flags, "--out", out], place / "0.log")
            else:
                _interrupt(kind, place, whole, drawn)
            files = sorted(out.glob(pattern))
            if not files:
                return
            outcome.struck += 1
            path = drawn.choice(files)
            DAMAGES[how](path, drawn)
            ended = runs.execute(kind, runs.first_or_resume(kind, out), place / "1.log")
            if ended.status == 0:
                outcome.say("(none: it goes on)")
                self.same(kind, out)
                return
            self.check_error(ended, (path.name if path.suffix == ".jsonl" else str(out),))
            message = _error(ended.text)
            outcome.say(_plain(message, place))
            self.obey(message, out)
            self.go_on(kind, place)

        for _ in range(times):
            self.try_(outcome, attempt)
        return outcome

    def obey(self, message: str, out: Path) -> None:
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

    def log_damage(self, kind: Kind, how: str, times: int) -> Outcome:
        """Lines of metrics.jsonl are damaged after a kill -9: nothing else depends on them."""
        outcome = Outcome(f"{how}: metrics.jsonl", kind.name)
        expected, whole = self.reference(kind)
        outcome.note = "lines of the log that were damaged; weights and checkpoints are the same"
        drawn = random.Random(f"{self.seed} {how} log {kind.name}")

        def attempt(place: Path) -> None:
            out = place / "out"
            _interrupt(kind, place, whole, drawn)
            outcome.struck += 1
            DAMAGES[how](out / "metrics.jsonl", drawn)
            ended = runs.execute(kind, ["--resume", out], place / "1.log")
            if ended.status != 0:
                raise Failed(f"exit {ended.status}\n{ended.text[-1500:]}")
            outcome.say(_plain(_last_lines(ended.text, ("has lost",)), place))
            found = runs.learned(out)
            if found != {name: expected[name] for name in found}:
                raise Failed(f"other bits than without a fault: {_differing(expected, found)}")
            if not (out / "report.html").exists():
                raise Failed("there is no report")

        for _ in range(times):
            self.try_(outcome, attempt)
        return outcome

    # A rank that is gone

    def lost_rank(self, kind: Kind, times: int) -> Outcome:
        """kill -9 of one of two ranks; the other one has to end by itself, and say so."""
        outcome = Outcome("kill -9 of one of two ranks", kind.name)
        whole = self.reference(kind)[1]
        drawn = random.Random(f"{self.seed} rank {kind.name}")

        def attempt(place: Path) -> None:
            victim = drawn.randrange(2)
            strike = {
                "signals": [(drawn.uniform(0.5, 0.95) * whole.seconds, signal.SIGKILL)],
                "victims": [victim],
                "seconds": 120,
            }
            try:
                first, *_ = self.go_on(kind, place, strike)
            except TimeoutError as error:
                raise Failed(f"the rank that was left did not end: {error}") from error
            if KILLED not in first.statuses:
                return
            outcome.struck += 1
            if first.statuses[1 - victim] != 4:
                raise Failed(f"the rank that was left: exit {first.statuses}\n{first.text[-800:]}")
            outcome.say(_plain(_error(first.text), place))

        for _ in range(times):
            self.try_(outcome, attempt)
        return outcome

    # Sources that fail

    def failing(self, kind: Kind, fault: str, times: int) -> Outcome:
        """The text or the language model raises an exception in the middle; later it does not."""
        outcome = Outcome(fault, kind.name)
        self.reference(kind)
        drawn = random.Random(f"{self.seed} {fault} {kind.name}")

        def attempt(place: Path) -> None:
            at = drawn.randrange(5, 12)
            first, *_ = self.go_on(kind, place, {"prepare": lambda rank: FAILURES[fault](at)})
            if first.status == 0:
                return
            outcome.struck += 1
            said = _last_lines(first.text, ("Go on", "go on", "--resume"))
            if "--resume" not in said:
                raise Failed(f"no word of how to go on:\n{first.text[-1500:]}")
            outcome.say(_plain(_error(first.text) or said, place))

        for _ in range(times):
            self.try_(outcome, attempt)
        return outcome

    def outlier(self, kind: Kind, times: int) -> Outcome:
        """A token of enormous size: its batch is skipped, and the others are learned from."""
        outcome = Outcome("an outlier token of 1e30", kind.name)
        expected = runs.records(self.run_of(kind))[-1]["explained_variance"]
        drawn = random.Random(f"{self.seed} outlier {kind.name}")

        def attempt(place: Path) -> None:
            at = drawn.randrange(5, 9)
            arguments = [*kind.flags, "--out", place / "out"]
            prepare = {"prepare": lambda rank: _model_gives(1e30)(at)}
            ended = runs.execute(kind, arguments, place / "0.log", **prepare)
            if ended.status != 0:
                raise Failed(f"exit {ended.status}\n{ended.text[-1500:]}")
            broken = runs.damaged(place / "out")
            if broken:
                raise Failed(f"damaged under its final name: {broken[0]}")
            found = runs.records(place / "out")
            outcome.struck += any(record["kind"] == "skipped" for record in found)
            outcome.say(_plain(_last_lines(ended.text, ("skipped",)), place))
            if abs(found[-1]["explained_variance"] - expected) > 0.02:
                raise Failed(f"explained variance {found[-1]}, without the token {expected}")

        for _ in range(times):
            self.try_(outcome, attempt)
        return outcome


def _interrupt(kind: Kind, place: Path, whole: Ended, drawn: random.Random) -> None:
    """Begin a run that dies at a file operation when three quarters of them are done."""
    at = round(drawn.uniform(0.7, 0.8) * whole.operations)
    start = [*kind.flags, "--out", place / "out"]
    runs.execute(kind, start, place / "0.log", spots=strikes.Spots(at), seconds=60)


def _truncate(path: Path, drawn: random.Random) -> None:
    with open(path, "r+b") as file:
        file.truncate(drawn.randrange(path.stat().st_size))


def _flip(path: Path, drawn: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[drawn.randrange(len(content))] ^= 1 << drawn.randrange(8)
    path.write_bytes(content)


def _half_line(path: Path, drawn: random.Random) -> None:
    """As a kill leaves it that hits in the middle of a write."""
    with open(path, "a") as file:
        file.write('{"kind": "train", "step": 1')


DAMAGES = {
    "truncated": _truncate,
    "a bit flipped": _flip,
    "half a line at the end": _half_line,
}


def _text_fails(at: int) -> None:
    """Reading document number `at` of the text for training fails, as on a lost connection."""
    from kronsae.data import packing

    add, count = packing.Packer.add, [0]

    def failing(self: Any, document: Any) -> Any:
        count[0] += 1
        if count[0] == 2 * at:
            raise ConnectionError("the connection was lost")
        return add(self, document)

    packing.Packer.add = failing


def _change_pass(at: int, change: Callable[[torch.Tensor], None]) -> None:
    """Call `change` with what forward pass number `at` of the language model reads out."""
    from kronsae.cache.model import ManyHookpoints
    from kronsae.data.language_model import LanguageModel

    count = [0]

    def changed(run: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def activations(self: Any, *args: Any) -> torch.Tensor:
            x = run(self, *args)
            count[0] += 1
            if count[0] == at:
                change(x)
            return x

        return activations

    for model in (LanguageModel, ManyHookpoints):
        model.activations = changed(model.activations)


def _model_fails(at: int) -> None:
    def fail(x: torch.Tensor) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    _change_pass(at, fail)


def _model_gives(value: float) -> Callable[[int], None]:
    def install(at: int) -> None:
        def spoil(x: torch.Tensor) -> None:
            x[0, 5] = value

        _change_pass(at, spoil)

    return install


FAILURES = {
    "the text fails in the middle": _text_fails,
    "the language model raises an exception": _model_fails,
    "the language model gives NaN": _model_gives(float("nan")),
    "the language model gives infinity": _model_gives(float("inf")),
}


@contextlib.contextmanager
def mounted(place: Path, size: int) -> Iterator[Callable[[int], None]]:
    """A disk of so many bytes in the folder `place`; gives a function that resizes it."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
    try:
        yield lambda other: subprocess.run(
            ["mount", "-o", f"remount,size={other}", place], check=True
        )
    finally:
        subprocess.run(["umount", place], check=True)


def can_mount(folder: Path) -> bool:
    place = folder / "can-mount"
    try:
        with mounted(place, 1 << 20):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _error(text: str) -> str:
    """The message that a command ended with, which may have several lines."""
    found = re.search(r"^error: .*", text, re.MULTILINE | re.DOTALL)
    return found[0].strip() if found else ""


def _last_lines(text: str, words: tuple[str, ...]) -> str:
    return "\n".join(line for line in text.splitlines() if any(word in line for word in words))


def _plain(text: str, place: Path) -> str:
    """Without what differs from try to try: places, numbers."""
    text = text.replace(str(place / "out"), "RUN").replace(str(place / "disk" / "out"), "RUN")
    text = text.replace(str(place), "DIR")
    text = re.sub(r"\S+:\d+: UserWarning", "warning", text)
    text = re.sub(r"[0-9a-f]{8}(?=\.partial)", "…", text)
    text = re.sub(r"step-\d+", "step-N", text)
    return re.sub(r"\d[\d,.]*\d|\d", "N", text).strip()


def _differing(expected: Any, found: Any, name: str = "") -> str:
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted(expected.keys() | found.keys(), key=str):
            if expected.get(key) != found.get(key):
                return _differing(expected.get(key), found.get(key), f"{name}/{key}")
    if isinstance(expected, bytes):
        size = None if found is None else len(found)
        return f"{name} ({len(expected)} bytes, got {size})"
    return f"{name}: expected {str(expected)[:300]}, got {str(found)[:300]}"


def run_all(
    campaign: Campaign, scale: float, only: str | None = None, names: list[str] | None = None
) -> list[Outcome]:
    """All faults; scale: of how often each is tried.

    only: the group of faults to try.  names: kinds of runs to try them on.
    """
    kinds = campaign.kinds

    def times(count: int) -> int:
        return max(1, round(scale * count))

    plan: list[Callable[[], Outcome]] = []

    def add(what: Callable[..., Outcome], *arguments: Any, word: str) -> None:
        if only in (None, word) and (names is None or arguments[0].name in names):
            plan.append(lambda: what(*arguments))

    for name, count in KILLS.items():
        for at in ("moment", "operation"):
            add(campaign.kills, kinds[name], times(count), at, word="kill")
    for name in ("live", "sweep", "harvest", "cache", "2 ranks"):
        for numbers in ((signal.SIGTERM,), (signal.SIGINT,), (signal.SIGTERM, signal.SIGTERM)):
            add(campaign.stops, kinds[name], times(2), numbers, word="signal")
    for name in ("live", "sweep", "harvest"):
        add(campaign.full_disk, kinds[name], times(5), word="disk")
        add(campaign.no_room, kinds[name], times(3), word="disk")
    for name in ("2 ranks", "2 ranks, heads shared out"):
        add(campaign.lost_rank, kinds[name], times(3), word="rank")
    for name, pattern in DAMAGED:
        for how in ("truncated", "a bit flipped"):
            add(campaign.damage, kinds[name], pattern, how, times(2), word="damage")
    half = "half a line at the end"
    add(campaign.damage, kinds["live"], "metrics.jsonl", half, times(1), word="damage")
    for how in ("truncated", "a bit flipped"):
        add(campaign.log_damage, kinds["live"], how, times(2), word="damage")
    for fault in FAILURES:
        for name in ("live", "harvest"):
            add(campaign.failing, kinds[name], fault, times(1), word="source")
    add(
        *(campaign.failing, kinds["streamed"], "the text fails in the middle", times(1)),
        word="source",
    )
    for name in ("live", "2 ranks"):
        add(campaign.outlier, kinds[name], times(2), word="source")
    for what in plan:
        outcome = what()
        campaign.outcomes.append(outcome)
        campaign.show(
            f"{outcome.fault}, {outcome.kind}: tried {outcome.tried}, struck {outcome.struck}, "
            f"{'lost nothing' if not outcome.lost else 'LOST'} {outcome.note}"
        )
    return campaign.outcomes


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
"""What is there only once all is done."""
