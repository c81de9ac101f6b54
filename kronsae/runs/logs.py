"""Where metrics go while a run trains: metrics.jsonl always, TensorBoard, wandb, trackio, and your
own logs.

A log is a class that is registered. One that a plugin registers is used by every run that loads it:

    @LOGS.register("mine")
    class Mine(RunLog):
        def write(self, figures, step, tokens): ...
"""

import contextvars
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from kronsae.config import TrainConfig
from kronsae.errors import InputError, require
from kronsae.registry import LOGS
from kronsae.runs.folder import RunFolder

_NOT_METRICS = ("kind", "step", "tokens", "seconds")


class RunLog(ABC):
    """One of the places that figures go to beside metrics.jsonl.

    folder: the run's.  settings: what its config.json holds.  group: the sweep that the run is a
    member of.
    """

    package: ClassVar[str | None] = None
    """Package that has to be installed."""

    @classmethod
    def wanted(cls, config: TrainConfig) -> bool:
        """Whether a run with these settings writes to it."""
        return True

    def __init__(
        self, folder: Path, config: TrainConfig, settings: dict[str, Any], group: str | None
    ) -> None:
        """Open it, also for a run that is resumed."""

    @abstractmethod
    def write(self, figures: dict[str, float], step: int, tokens: int) -> None:
        """Figures by name, as "train/loss", after so many optimizer steps and tokens."""

    def close(self) -> None:
        """Called when the run has ended, for whatever reason."""


@LOGS.register("tensorboard")
class TensorBoard(RunLog):
    package = "tensorboard"

    @classmethod
    def wanted(cls, config: TrainConfig) -> bool:
        return config.tensorboard

    def __init__(self, folder: Path, *_: Any) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, figures: dict[str, float], step: int, tokens: int) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Tracker(RunLog):
    """A log whose run, which a subclass opens, has `log(figures, step=...)` and `finish()`."""

    run: Any

    def write(self, figures: dict[str, float], step: int, tokens: int) -> None:
        self.run.log({**figures, "tokens": tokens}, step=step)

    def close(self) -> None:
        self.run.finish()


def _name(folder: Path, group: str | None) -> str:
    return folder.name if group is None else f"{group}-{folder.name}"


@LOGS.register("wandb")
class WeightsAndBiases(Tracker):
    package = "wandb"

    @classmethod
    def wanted(cls, config: TrainConfig) -> bool:
        return config.wandb is not None

    def __init__(
        self, folder: Path, config: TrainConfig, settings: dict[str, Any], group: str | None
    ) -> None:
        import wandb

        name = _name(folder, group)
        self.run = wandb.init(
            project=config.wandb,
            name=name,
            id=name,
            group=group,
            dir=folder,
            config=settings,
            resume="allow",
            # The members of a sweep are logged side by side, from one process.
            **({} if group is None else {"reinit": "create_new"}),
        )


@LOGS.register("trackio")
class Trackio(Tracker):
    package = "trackio"

    @classmethod
    def wanted(cls, config: TrainConfig) -> bool:
        return config.trackio is not None

    def __init__(
        self, folder: Path, config: TrainConfig, settings: dict[str, Any], group: str | None
    ) -> None:
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        # A folder with metrics is that of a run that goes on. trackio finishes the run of its
        # context before it opens another one: each member of a sweep gets a context.
        resume = "allow" if (folder / "metrics.jsonl").exists() else "never"
        try:
            self.run = contextvars.copy_context().run(
                trackio.init,
                project=config.trackio,
                name=_name(folder, group),
                group=group,
                config=settings,
                resume=resume,
            )
        except ValueError as error:
            raise InputError(f"--trackio {config.trackio}: {error}") from error
        rows = SQLiteStorage.get_logs(config.trackio, self.run.name, run_id=self.run.id)
        self.known = {(row["step"], name) for row in rows for name in row}

    def write(self, figures: dict[str, float], step: int, tokens: int) -> None:
        """Write what trackio does not know: it keeps the steps after the last checkpoint, too."""
        new = {name: x for name, x in figures.items() if (step, name) not in self.known}
        if new:
            super().write(new, step, tokens)


class Log:
    """Sends each record {"kind", "step", "tokens", ...} to metrics.jsonl and all logs wanted.

    Raises InputError if one of these is not installed, or there is no run folder.
    """

    def __init__(
        self,
        run: RunFolder | None,
        config: TrainConfig,
        settings: dict[str, Any],
        group: str | None = None,
    ) -> None:
        self.run = run
        self.logs: list[RunLog] = []
        for name, kind in LOGS.items():
            if kind.wanted(config):
                if run is None:
                    raise InputError(f"{name} needs a run folder: give `out`")
                self.logs.append(kind(run.path, config, settings, group))

    def __call__(self, record: dict[str, Any]) -> None:
        if self.run is not None:
            self.run.log(record)
        figures = {
            f"{record['kind']}/{name}": value
            for name, value in record.items()
            if name not in _NOT_METRICS and isinstance(value, int | float)
        }
        for log in self.logs:
            log.write(figures, record["step"], record["tokens"])

    def close(self) -> None:
        for log in self.logs:
            log.close()


def check_packages(config: TrainConfig) -> None:
    """Raise InputError if a log that `config` asks for is not installed."""
    for name, kind in LOGS.items():
        if kind.wanted(config) and kind.package:
            require(kind.package, f"--{name}")
