"""Where metrics go while a run trains: metrics.jsonl always, the terminal, TensorBoard, wandb."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kronsae.config import TrainConfig
from kronsae.errors import InputError
from kronsae.runs.folder import RunFolder

_NOT_METRICS = ("kind", "step", "tokens", "seconds")


class Log:
    """Sends each record {"kind", "step", "tokens", ...} to every place that the run asks for.

    group: the sweep that the run is a member of.
    Raises InputError if TensorBoard or wandb is asked for and not installed.
    """

    def __init__(
        self,
        run: RunFolder | None,
        config: TrainConfig,
        settings: dict[str, Any],
        group: str | None = None,
    ) -> None:
        self.run = run
        self.tensorboard = _open_tensorboard(run) if config.tensorboard else None
        self.wandb = _open_wandb(run, config.wandb, settings, group) if config.wandb else None

    def __call__(self, record: dict[str, Any]) -> None:
        if self.run is not None:
            self.run.log(record)
        figures = {
            f"{record['kind']}/{name}": value
            for name, value in record.items()
            if name not in _NOT_METRICS and not isinstance(value, str)
        }
        if self.tensorboard is not None:
            for name, value in figures.items():
                self.tensorboard.add_scalar(name, value, record["step"])
        if self.wandb is not None:
            self.wandb.log({**figures, "tokens": record["tokens"]}, step=record["step"])

    def close(self) -> None:
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


def check_packages(config: TrainConfig) -> None:
    """Raise InputError if a logger that `config` asks for is not installed."""
    for wanted, package in ((config.tensorboard, "tensorboard"), (config.wandb, "wandb")):
        if wanted and find_spec(package) is None:
            raise InputError(
                f"--{package} needs the package {package}: pip install 'kronsae[{package}]'"
            )


def _folder(run: RunFolder | None, flag: str) -> Path:
    if run is None:
        raise InputError(f"{flag} needs a run folder: give `out`")
    return run.path


def _open_tensorboard(run: RunFolder | None) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(_folder(run, "tensorboard") / "tensorboard"))


def _open_wandb(
    run: RunFolder | None, project: str, settings: dict[str, Any], group: str | None
) -> Any:
    import wandb

    folder = _folder(run, "wandb")
    name = folder.name if group is None else f"{group}-{folder.name}"
    return wandb.init(
        project=project,
        name=name,
        id=name,
        group=group,
        dir=folder,
        config=settings,
        resume="allow",
        # The members of a sweep are logged side by side, from one process.
        **({} if group is None else {"reinit": "create_new"}),
    )
