"""The progress of a run on the terminal."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from kronsae.system.progress import Pace
from kronsae.training.learner import USUAL_LARGEST
from kronsae.training.options import Request

MANY = 6
"""Number of members of a sweep from which on a line is about all of them."""


class ProgressBar:
    """Progress of `fit`: a bar on a terminal, elsewhere ten lines.

    Of a sweep each member has its lines, or, of `MANY` members, a line has the lowest and the
    highest figures.
    """

    def __init__(self, console: Console, request: Request) -> None:
        self.console = console
        self.sweep = request.sweep
        self.many = len(request.members) >= MANY
        self.of_step: dict[str, dict[str, Any]] = {}  # records of many members, by name
        self.total = request.config.train.steps
        self.every = max(1, self.total // 10)
        self.printed: dict[str, int] = {}
        self.batch, self.log_every = request.config.train.batch_size, request.config.train.log_every
        self.pace, self.speed = Pace("steps"), _Speed()
        self.bar = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=12),
            # Where they are too long for the terminal, they go on in the next line.
            TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=False)),
            console=console,
            disable=console.quiet or not console.is_terminal,
        )
        self.task = self.bar.add_task("training", total=self.total, figures="")

    def __enter__(self) -> "ProgressBar":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._show_many()
        self.bar.stop()

    def judged(self, done: int, total: int) -> None:
        """Show how much of the held-out text the final evaluation has read."""
        self._show_many()
        figures = f"final evaluation: {done:,} of {total:,} batches of held-out text"
        self.bar.update(self.task, completed=done, total=total, figures=figures)
        if (
            not self.console.is_terminal
            and total > 1
            and done * 4 // total > (done - 1) * 4 // total
        ):
            self.console.print(figures)

    def __call__(self, name: str, record: dict[str, Any]) -> None:
        """Show a record of a member."""
        if self.many and record["kind"] in ("train", "heldout"):
            before = next(iter(self.of_step.values()), record)
            if any(before[key] != record[key] for key in ("step", "kind")):
                self._show_many()
            self.of_step[name] = record
            return
        step, name = record["step"], f"{name}: " if self.sweep else ""
        if record["kind"] == "train":
            explained = record["explained_variance"]  # None if all activations are equal
            ev = "–" if explained is None else f"{explained:.3f}"
            dead = f"{record['dead_share']:.1%}"
            self._show(step, name, f"{name}EV {ev}  dead {dead}  {self._speed(record)}")
        elif record["kind"] == "heldout":
            explained = record["explained_variance"]
            ev = "–" if explained is None else f"{explained:.4f}"
            self.console.print(
                f"step {step:,}: {name}held-out explained variance {ev}, L0 {record['l0']:.1f}"
            )
        elif record["kind"] == "diverged" and self.sweep:  # the others go on
            self.console.print(name + record["reason"], style="red", markup=False)
        elif record["kind"] == "skipped":
            count = record["batches"]
            batches = f"{count} batches up to here " if count > 1 else ""
            largest = "no activation of the batch is unusually large"
            if record["largest"] > USUAL_LARGEST:
                size = f"{record['largest']:.3g} times the usual size"
                largest = f"the largest activation of the batch is {size}"
            self.console.print(
                f"step {step:,}: {name}{batches}skipped, as its {record['reason']} ({largest})",
                style="yellow",
            )

    def _show(self, step: int, name: str, figures: str) -> None:
        """Show figures of training in the bar, or in a line of each tenth of the steps."""
        self.bar.update(self.task, completed=step, figures=figures)
        if not self.console.is_terminal and step // self.every != self.printed.get(name):
            self.printed[name] = step // self.every
            self.console.print(f"step {step:,}/{self.total:,}  {figures}")

    def _speed(self, record: dict[str, Any]) -> str:
        """Tokens a second, the time left, and who waited, in words; all are means."""
        step, speed = record["step"], self.speed
        since = step - speed.step if speed.step else min(step, self.log_every)
        speed.add(record, max(1, since) * self.batch)
        words = [f"{speed.tokens / speed.seconds:,.0f} tokens/s"]
        if step < self.total and (left := self.pace.left(step, self.total)):
            words.append(left)
        words.append(f"waited {speed.waited / speed.seconds:.0%} for activations")
        if "model_wait_share" in record:
            share = speed.model_waited / speed.seconds
            words.append(f"the language model {share:.0%} for room")
        return ", ".join(words)

    def _show_many(self) -> None:
        """Show the records of all members of a step, which are then forgotten."""
        records = list(self.of_step.values())
        self.of_step = {}
        if not records:
            return
        step, kind = records[0]["step"], records[0]["kind"]
        explained = _range("{:.3f}", [record["explained_variance"] for record in records])
        who = f"{len(records)} autoencoders"
        if kind == "heldout":
            self.console.print(f"step {step:,}: {who}: held-out explained variance {explained}")
            return
        dead = _range("{:.1%}", [record["dead_share"] for record in records])
        self._show(step, "", f"{who}: EV {explained}  dead {dead}  {self._speed(records[-1])}")


class _Speed:
    """Means over the run of the rates in records, each of which is of the steps since the last."""

    def __init__(self) -> None:
        self.step = self.tokens = 0
        self.seconds = self.waited = self.model_waited = 0.0

    def add(self, record: dict[str, Any], tokens: int) -> None:
        """A record of `tokens` tokens; of several members of a step, the first counts."""
        if record["step"] == self.step:
            return
        self.step = record["step"]
        seconds = tokens / max(1e-9, record["tokens_per_s"])
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds
        self.waited += seconds * record["wait_share"]
        self.model_waited += seconds * record.get("model_wait_share", 0.0)


def _range(form: str, values: list[float | None]) -> str:
    """The lowest and the highest of the values that there are."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    ends = [form.format(end) for end in (min(known), max(known))]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)
