"""The run folder: what it holds, how it is opened, and the log of its metrics.

config.json       everything needed to repeat the run, with versions and the data's description
metrics.jsonl     a line each logged step ("train"), evaluation ("heldout"), the end ("final")
checkpoints/      step-NNNNNNNN/: complete state, for an exact resume
sae/              sae.safetensors, config.json: what others load
report.html       the run to look at
"""

import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch

import kronsae_kernels
from kronsae import checkpoint
from kronsae.errors import InputError
from kronsae.files import remove_leftovers, write_json

FORMAT_VERSION = 1


class RunFolder:
    """Paths of a run and its metrics file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.sae = path / "sae"
        self.report = path / "report.html"
        self._locked: IO[str] | None = None

    @classmethod
    def create(cls, path: str | Path, settings: dict[str, Any]) -> "RunFolder":
        """A new run. Raises InputError if the folder exists and is not empty."""
        cls.check_free(path)
        run = cls(Path(path))
        try:
            run.checkpoints.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"{run.path} cannot be created: {error}") from error
        document = {
            "format": "kronsae-run",
            "format_version": FORMAT_VERSION,
            **settings,
            "versions": versions(),
            "command": sys.argv,
        }
        write_json(run.config, document)
        return run

    @staticmethod
    def check_free(path: str | Path) -> None:
        """Raise InputError if `path` exists and is not an empty folder."""
        path = Path(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            hint = (
                f"--resume {path} goes on with it, or " if (path / "config.json").exists() else ""
            )
            raise InputError(f"{path} exists already: {hint}choose another --out")

    @classmethod
    def open(cls, path: str | Path) -> tuple["RunFolder", dict[str, Any]]:
        """A run that exists, and its config.json. Raises InputError if it is none."""
        run = cls(Path(path))
        try:
            settings = json.loads(run.config.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{run.path} is no run folder: {run.config} cannot be read ({error})"
            ) from error
        if not isinstance(settings, dict) or not {"config", "data"} <= settings.keys():
            raise InputError(f"{run.config} is not one that a run wrote")
        if settings.get("format") != "kronsae-run" or settings["format_version"] != FORMAT_VERSION:
            raise InputError(
                f"{run.config}: expected a kronsae run of format version {FORMAT_VERSION}, got "
                f"{settings.get('format')!r}, version {settings.get('format_version')!r}"
            )
        return run, settings

    def lock(self) -> None:
        """Keep other processes from training this run, and clear away what a dead one left.

        Raises InputError if another process holds it. (Windows has no flock: no lock there.)
        """
        try:
            import fcntl
        except ImportError:
            fcntl = None
        if fcntl is not None:
            self._locked = open(self.config, encoding="utf-8")
            try:
                fcntl.flock(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                self.release()
                raise InputError(f"{self.path} is being trained by another process") from error
        for folder in (self.path, self.checkpoints):
            remove_leftovers(folder)

    def release(self) -> None:
        """Let others train this run again."""
        if self._locked is not None:
            self._locked.close()
            self._locked = None

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        try:
            with open(self.metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")
        except OSError as error:
            raise InputError(f"{self.metrics} could not be written: {error}") from error

    def save_checkpoint(self, step: int, state: dict[str, Any], keep: int) -> Path:
        """Write the state of `step`, and remove all but the newest `keep` checkpoints."""
        state = {**state, "metrics_bytes": _size(self.metrics)}
        folder = checkpoint.save_state(checkpoint.step_folder(self.checkpoints, step), state)
        checkpoint.prune(self.checkpoints, keep)
        return folder

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The newest checkpoint's state, or None if there is none; later metrics are cut off."""
        found = checkpoint.list_checkpoints(self.checkpoints)
        state = checkpoint.load_state(found[-1]) if found else None
        keep_bytes = state["metrics_bytes"] if state else 0
        if _size(self.metrics) > keep_bytes:
            os.truncate(self.metrics, keep_bytes)
        return state


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    return {
        "kronsae": kronsae_kernels.__version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "numpy", "transformers")},
        "platform": platform.platform(),
        "threads": str(torch.get_num_threads()),
    }


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
