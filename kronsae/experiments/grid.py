"""The grid of an experiment's runs: its file, which is resumed and may grow, and its results."""

import dataclasses
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from kronsae.errors import InputError, differences
from kronsae.experiments.experiment import Experiment, Run
from kronsae.system.devices import compute_dtype, resolve_device
from kronsae.system.documents import Keys, read_json, typed
from kronsae.system.files import LOCK_NAME, check_writable, lock, write_json, write_text
from kronsae_kernels import __version__

_DOCUMENT = Keys(
    {"settings": dict[str, Any], "made_with": dict[str, Any], "runs": list[dict[str, Any]]}
)
"""NAME.json, as far as it is read."""


def run_grid(
    name: str,
    experiment: Experiment,
    folder: Path,
    command: str,
    on_run: Callable[[Run, int, int], None],
) -> list[Run]:
    """Run every cell that `folder` does not have yet; NAME.json there is whole after each.

    on_run: called with each new run, the cells done and the cells known so far.
    Returns the runs of the cells. Raises InputError if the file there was made with other settings
    (but for axes, which may grow) or versions, if there is nothing to run, and if another process
    runs an experiment in `folder`.
    """
    with _held(folder):
        path = folder / f"{name}.json"
        settings = experiment.recorded()
        document: dict[str, Any] = {
            "experiment": name,
            "checks": f"[{experiment.cited}, {experiment.figure}]",
            "statement": experiment.statement,
            "command": command,
            "settings": settings,
            "made_with": made_with(experiment.device),
            "runs": _earlier_runs(path, experiment, settings),
        }
        runs: list[Run] = document["runs"]
        shared = None
        while missing := missing_cells(cells := experiment.cells(runs), runs):
            if shared is None:
                shared = experiment.prepare()
            cell = missing[0]
            began = time.perf_counter()
            figures = experiment.run(shared, cell)
            seconds = round(time.perf_counter() - began, 1)
            runs.append({**cell, **figures, "seconds": seconds, "command": command})
            folder.mkdir(parents=True, exist_ok=True)  # somebody may have removed it
            write_json(path, document)
            on_run(runs[-1], len(cells) - len(missing) + 1, len(cells))
        if not cells:
            raise InputError(f"{name}: with these settings there is nothing to run")
        wanted = [run for cell in cells for run in runs if matches(run, cell)]
        table, line = experiment.conclude(wanted)
        write_json(path, {**document, "conclusion": line})
        head = f"[{experiment.cited}, {experiment.figure}]: {experiment.statement}\n\n    {command}"
        write_text(folder / f"{name}.md", f"{head}\n\n{table}\n\n{line}\n")
        experiment.draw(wanted, folder / f"{name}.png")
        return wanted


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Keep other processes' experiments out of a folder, which goes if nothing came of this one.

    Raises InputError if another process runs one there.
    """
    check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    held = lock(folder, f"{folder} is in use: another process runs an experiment there")
    try:
        yield
    finally:
        with suppress(OSError):
            if os.listdir(folder) == [LOCK_NAME]:
                shutil.rmtree(folder)
        held.release()


def matches(run: Run, cell: dict[str, Any]) -> bool:
    """Whether a run is that of the cell: it agrees in every key that the cell has."""
    return all(run.get(key) == value for key, value in cell.items())


def missing_cells(cells: Iterable[dict[str, Any]], runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Cells without a run."""
    return [cell for cell in cells if not any(matches(run, cell) for run in runs)]


def made_with(device: str) -> dict[str, str]:
    """Versions, device and dtype of the figures."""
    resolved = resolve_device(device)
    return {
        "kronsae": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(resolved) if resolved.type == "cuda" else "cpu",
        "dtype": str(compute_dtype("auto", resolved)).removeprefix("torch."),
    }


def _earlier_runs(path: Path, experiment: Experiment, settings: dict[str, Any]) -> list[Run]:
    if not path.exists():
        return []
    try:
        document = typed(read_json(path), _DOCUMENT, "")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not one that an experiment wrote: {error}") from error
    now = json.loads(json.dumps({**settings, **made_with(experiment.device)}))  # tuples are lists
    # Older files lack settings, which had their defaults, and have not those that a cache decides.
    since = {spec.name: spec.default for spec in dataclasses.fields(experiment)}
    was = {**now, **json.loads(json.dumps(since)), **document["settings"], **document["made_with"]}
    runs = document["runs"]
    axes = {spec.name for spec in dataclasses.fields(experiment) if spec.metadata.get("axis")}
    given = dataclasses.asdict(experiment)
    decided = {name for name, value in given.items() if settings[name] != value}
    if changes := differences(was, now, ignored=axes | decided):
        where = f"{path} was made otherwise: choose another --out, or remove it"
        raise InputError("\n  ".join([where, *changes]))
    return runs
