"""The progress of a run on the terminal."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kronsae.training.learner import USUAL_LARGEST
from kronsae.training.options import Request


class ProgressBar:
    """Progress of `fit`: a bar on a terminal, elsewhere ten lines."""

    def __init__(self, console: Console, request: Request) -> None:
        self.console = console
        self.sweep = request.sweep
        self.total = request.config.train.steps
        self.every = max(1, self.total // 10)
        self.printed: dict[str, int] = {}
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            disable=console.quiet or not console.is_terminal,
        )
        self.task = self.bar.add_task("training", total=self.total, figures="")

    def __enter__(self) -> "ProgressBar":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def judged(self, done: int, total: int) -> None:
        """Show how much of the held-out text the final evaluation has read."""
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
        step, name = record["step"], f"{name}: " if self.sweep else ""
        if record["kind"] == "train":
            explained = record["explained_variance"]  # None if all activations are equal
            ev = "–" if explained is None else f"{explained:.3f}"
            figures = (
                f"{name}EV {ev}  dead {record['dead_share']:.1%}  "
                f"{record['tokens_per_s']:,.0f} tokens/s, "
                f"waited {record['wait_share']:.0%} for activations"
            )
            if "model_wait_share" in record:
                figures += f", the language model {record['model_wait_share']:.0%} for room"
            self.bar.update(self.task, completed=step, figures=figures)
            if not self.console.is_terminal and step // self.every != self.printed.get(name):
                self.printed[name] = step // self.every
                self.console.print(f"step {step:,}/{self.total:,}  {figures}")
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
