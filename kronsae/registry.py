"""Registries of the kinds that a configuration names, to which plugins add.

    from kronsae.model.selection import Selection
    from kronsae.registry import SELECTIONS

    @SELECTIONS.register("mine")
    class Mine(Selection): ...

A kind is registered when its module is imported: a file of your own by `--plugin FILE` or
`load_plugin`, a module of an installed package by an entry point of the group "kronsae.plugins".
"""

import importlib.util
import os
import shlex
import sys
import traceback
from abc import ABC
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from kronsae.errors import InputError, warn

Registered = TypeVar("Registered")


class Kind(ABC):
    """Base class of kinds of encoders, selections and objectives."""

    title: ClassVar[str] = ""
    """The part of an SAE's name that says its kind: "KronSAE", "BatchTopK"."""
    Settings: ClassVar[type | None] = None
    """Frozen dataclass of its own `kronsae.config.setting`s, which become flags."""
    fused: ClassVar[bool] = False
    """Whether `kronsae_kernels.step` can train it."""
    shares_heads: ClassVar[bool] = False
    """Whether several processes can share the dictionary."""

    @classmethod
    def check(cls, config: Any) -> None:
        """Raise InputError for an SAEConfig that does not fit it."""


class Registry(Mapping[str, Registered], Generic[Registered]):
    """Registered kinds by name, in the order of registration."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._kinds: dict[str, Registered] = {}

    def register(self, name: str) -> Callable[[Registered], Registered]:
        """Decorator that adds a kind. Raises InputError if it lacks a method that it has to define,
        or if the name is taken.
        """

        def add(kind: Registered) -> Registered:
            if missing := getattr(kind, "__abstractmethods__", ()):
                methods = ", ".join(f"`{method}`" for method in sorted(missing))
                raise InputError(f"{self.what} {name!r} has to define {methods}")
            known = self._kinds.get(name)
            # The same file may run twice, as a plugin and as an imported module.
            if known is not None and _origin(known) != _origin(kind):
                raise InputError(f"{self.what} {name!r} is already registered, by {known!r}")
            self._kinds[name] = kind
            return kind

        return add

    def __getitem__(self, name: str) -> Registered:
        """The kind of that name. Raises InputError if there is none."""
        try:
            return self._kinds[name]
        except (KeyError, TypeError):
            raise InputError(
                f"{self.what}: one of {tuple(self._kinds)}, not {name!r} (register another kind by "
                "--plugin FILE, or by importing its module)"
            ) from None

    def __contains__(self, name: object) -> bool:
        return name in self._kinds

    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds)

    def __len__(self) -> int:
        return len(self._kinds)


def _origin(kind: Any) -> tuple[str | None, str]:
    module = sys.modules.get(kind.__module__)
    return getattr(module, "__file__", None), kind.__qualname__


ENCODERS: Registry[Any] = Registry("encoder")
"""`kronsae.model.encoder.EncoderKind`s."""
SELECTIONS: Registry[Any] = Registry("selection")
"""`kronsae.model.selection.Selection`s."""
OBJECTIVES: Registry[Any] = Registry("objective")
"""`kronsae.model.objectives.Objective`s."""

FORMATS: Registry[Any] = Registry("format")
"""`kronsae.interop.formats.Format`s: folders that hold an SAE."""
DASHBOARDS: Registry[Any] = Registry("dashboard")
"""`kronsae.export.dashboards.Dashboard`s: folders that hold what is shown of latents."""
SOURCES: Registry[Any] = Registry("source of activations")
"""`kronsae.sources.Source`s."""
LOGS: Registry[Any] = Registry("log")
"""`kronsae.runs.logs.RunLog`s."""

SAE_KINDS: dict[str, Registry[Any]] = {
    "encoder": ENCODERS,
    "selection": SELECTIONS,
    "objective": OBJECTIVES,
}
"""Registries by the field of `SAEConfig` that names the kind."""


_loaded_files: list[Path] = []
"""Files that `load_plugin` has run."""


def command_line(*words: str) -> str:
    """A command to type, with the plugins that are loaded: "kronsae explore RUN --plugin FILE"."""
    plugins = [word for path in _loaded_files for word in ("--plugin", str(path))]
    return shlex.join(["kronsae", *words, *plugins])


def load_plugin(path: str | Path) -> None:
    """Run a Python file that registers kinds. Raises InputError if that cannot be done."""
    if not os.path.isfile(path):  # also for a name that no file can have
        raise InputError(f"--plugin {path}: there is no such file")
    path = Path(path).resolve()
    name = f"kronsae_plugin_{path.stem}"
    if getattr(sys.modules.get(name), "__file__", None) == str(path):
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"--plugin {path}: expected a Python file, whose name ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look it up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        calls = traceback.extract_tb(error.__traceback__)
        lines = [call.lineno for call in calls if call.filename == str(path)]
        where = f", line {lines[-1]}" if lines else ""
        raise InputError(f"--plugin {path}{where}: {type(error).__name__}: {error}") from error
    _loaded_files.append(path)


def load_installed_plugins() -> None:
    """Import plugins of installed packages; one that fails is left out with a warning."""
    for point in entry_points(group="kronsae.plugins"):
        try:
            point.load()
        except Exception as error:
            warn(
                f"the plugin {point.name} ({point.value}) of an installed package is left out: "
                f"{type(error).__name__}: {error}"
            )
