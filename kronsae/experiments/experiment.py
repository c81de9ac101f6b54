"""The base class of experiments, and their registry."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from kronsae.config import setting
from kronsae.registry import Registry

Run = dict[str, Any]
"""A cell of the grid with its figures."""


def axis(default: Any, help: str) -> Any:
    """A setting whose values are in the cells, so that a file's grid may grow along it."""
    return setting(default, help, axis=True)


@dataclass(frozen=True)
class Experiment(ABC):
    """A check of one statement of the paper: a grid of runs, and what they say of it.

    A frozen dataclass whose fields, each a `kronsae.config.setting` or an `axis`, are its settings
    and its flags. `kronsae.experiments.grid` runs it.
    """

    cited: ClassVar[str] = "KronSAE"
    """The paper."""
    figure: ClassVar[str]
    """Figure, table or section of the paper that it checks."""
    statement: ClassVar[str]
    """Statement of the paper, or the question where the paper's answer is a picture alone."""
    smallest: ClassVar[dict[str, Any]] = {}
    """Settings of a form that takes seconds."""
    paper: ClassVar[dict[str, Any]] = {}
    """Settings of a form of the paper's size."""

    device: str = setting("auto", "cpu, cuda, cuda:1, ... (auto: cuda where there is one)")

    @abstractmethod
    def cells(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """The runs it wants, each a dict of JSON values, as far as `runs` let it know them."""

    def recorded(self) -> dict[str, Any]:
        """Settings by name for the file, as they have an effect, and what else tells runs apart."""
        return asdict(self)

    def prepare(self) -> Any:
        """Objects that all runs share, made once, if there is anything left to run."""
        return None

    @abstractmethod
    def run(self, shared: Any, cell: dict[str, Any]) -> dict[str, Any]:
        """The figures of one run, a dict of JSON values; shared: from `prepare`."""

    @abstractmethod
    def conclude(self, runs: Sequence[Run]) -> tuple[str, str]:
        """A Markdown table, and ours beside the paper's in a sentence or two.

        runs: those of the cells, in their order.
        """

    @abstractmethod
    def draw(self, runs: Sequence[Run], path: Path) -> None:
        """Write a picture of the runs."""


EXPERIMENTS: Registry[type[Experiment]] = Registry("experiment")
