"""The run folder: what it holds, how it is opened, and the log of its metrics.

A run:
config.json       everything needed to repeat the run, with versions and the data's description
metrics.jsonl     a line each logged step ("train"), evaluation ("heldout"), the end ("final")
checkpoints/      step-NNNNNNNN/: complete state, for an exact resume
sae/              sae.safetensors, config.json: what others load
report.html       the run to look at

A sweep, which trains several SAEs on one stream of activations:
sweep.json        the members' names and settings, and how each ended
NAME/             a run for each member, with what it alone has in its checkpoints
streams/NAME/     step-NNNNNNNN/ of each hookpoint, of a sweep that reads several (a suite)
checkpoints/      step-NNNNNNNN/: what they share; written last, so it says which step is complete
comparison.md     a table of the members
report.html       the same to look at, and figures over the hookpoints
"""

import copy
import math
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from types import GenericAlias, MappingProxyType
from typing import Any

import torch
from filelock import FileLock

import kronsae_kernels
from kronsae.config import run_settings
from kronsae.errors import InputError, warn
from kronsae.model.ranks import SHARDED_STATE
from kronsae.runs.sweep import check_names
from kronsae.system import checkpoint
from kronsae.system.documents import Keys, Number, read_json, typed
from kronsae.system.files import (
    LOCK_NAME,
    check_writable,
    lock,
    log_line,
    log_lines,
    remove_leftovers,
    sync,
    usable_path,
    write_file,
    write_json,
    write_text,
)
from kronsae.system.parallel import ALONE, Mesh

FORMAT_VERSION = 1

SINGLE = "sae"
"""Name of the one member of a run that is no sweep."""

_BEGUN = ".begun"
"""Name of an empty file in a folder that is being made: if that is interrupted, the same command
makes it again."""


RUN = Keys(
    {"config": run_settings(partial=True), "data": dict[str, Any]},
    {
        **{"versions": dict[str, Any], "command": str | list[str], "sweep": str},
        "finetune": Keys({"sha256": str}, {"source": str}),
    },
)
"""config.json of a run. data: what describes the activations.  sweep: its name in one.
finetune: the SAE from whose weights it started.
"""

_MEMBER = Keys(
    {"config": run_settings(partial=True)},
    {
        "tokens": int,
        "metrics": dict[str, float | str | None],
        "step_ms": float | None,
        "failed": str | None,
    },
)
_NOT_ENDED: dict[str, Any] = {"tokens": 0, "metrics": {}, "step_ms": None, "failed": None}
SWEEP = Keys({"members": GenericAlias(dict, (str, _MEMBER))})
"""sweep.json."""


@contextmanager
def output_folder(given: Path | None, name: str) -> Iterator[Path]:
    """The folder that a command writes: the given one, otherwise a new one, runs/NAME-TIME.

    The new one is made at once, so that commands that start in the same second do not share it: the
    second one's name ends with -2. If nothing was written in it, it is removed, and an empty runs/.
    Raises InputError if it cannot be made.
    """
    if given is not None:
        yield given
        return
    out = _new_folder(Path("runs"), f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        yield out
    finally:
        with suppress(OSError):
            out.rmdir()
            out.parent.rmdir()


def _new_folder(parent: Path, name: str) -> Path:
    problem: OSError | None = None
    for number in range(1, 1000):
        out = parent / (name if number == 1 else f"{name}-{number}")
        try:
            parent.mkdir(exist_ok=True)
            out.mkdir()
            return out
        except (FileExistsError, FileNotFoundError) as error:  # taken, or runs/ was just removed
            problem = error
        except OSError as error:
            problem = error
            break
    raise InputError(f"{out} cannot be created: {problem}")


class _Folder:
    """A folder that one training at a time happens in, with checkpoints.

    index: the file that makes it one.  mesh: of the processes that train; the first of them makes,
    locks and clears the folder, and all of them call to save and to load.
    """

    mesh: Mesh = ALONE
    owners: Mapping[str, int] = MappingProxyType({})
    """Rank that trains a member alone, by the member's name (`parallel.owners`)."""

    def __init__(self, path: Path, index: str) -> None:
        self.path = path
        self.index = path / index
        self.checkpoints = path / "checkpoints"
        self.document: dict[str, Any] = {}
        """Contents of the index, once it was made or read here."""
        self._locked: FileLock | None = None

    def lock(self) -> None:
        """Keep other processes from training here, and clear away what a dead one left.

        Raises InputError if another process holds it.
        """
        self._locked = lock(self.path, f"{self.path} is being trained by another process")
        try:
            self._clear()
        except OSError as error:
            self.release()
            raise InputError(f"{self.path} cannot be written to: {error}") from error

    def _clear(self) -> None:
        """Clear away what interrupted writes left."""
        for folder in (self.path, self.checkpoints):
            remove_leftovers(folder)
        if self.index.exists():  # it was made, and the process died before it said so
            (self.path / _BEGUN).unlink(missing_ok=True)

    def share(self, mesh: Mesh, owners: Mapping[str, int], hookpoints: Mapping[str, str]) -> None:
        """Let the processes of a mesh train here together, or each its own members.

        hookpoints: of each member, by name; "" if there is one alone.
        """
        self.mesh, self.owners = mesh, owners

    def release(self) -> None:
        """Let others train here again."""
        if self._locked is not None:
            self._locked.release()
            self._locked = None

    @contextmanager
    def _making(self) -> Iterator[None]:
        """Make the folder, of which no other process makes one meanwhile. Raises InputError."""
        self.check_free(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock()
            self.check_free(self.path)  # another one may have been faster
            begun = self.path / _BEGUN
            begun.touch()
            yield
            begun.unlink()
        except OSError as error:
            raise InputError(f"{self.path} cannot be created: {error}") from error
        finally:
            self.release()

    def copies(self) -> dict[str, dict[str, Any]]:
        """Files of settings that each checkpoint has a copy of, by name."""
        return {self.index.name: self.document}

    def _begin(self, kind: str, settings: dict[str, Any]) -> None:
        """Write the index, which makes the folder a run, or a sweep."""
        head = {"format": kind, "format_version": FORMAT_VERSION}
        self._write({**head, **settings, "versions": versions(), "command": sys.argv})

    def _write(self, document: dict[str, Any]) -> None:
        write_json(self.index, document)
        self.document = document

    @staticmethod
    def check_free(path: str | Path) -> None:
        """Raise InputError unless a run can be made in `path`.

        It has to be new, empty, or left by an interrupted `create`, where files can be written.
        """
        path = usable_path(path, "--out")
        check_writable(path)
        names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
        known = not names.isdisjoint(_INDEXES) and not _is_checkpoint(path)
        free = _BEGUN in names or names <= {LOCK_NAME} and (path.is_dir() or not path.exists())
        if known or not free:
            hint = f"--resume {shlex.quote(str(path))} goes on with it, or " if known else ""
            raise InputError(f"{path} exists already: {hint}choose another --out")


class RunFolder(_Folder):
    """Paths of a run and its metrics file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "config.json")
        self.config = self.index
        self.metrics = path / "metrics.jsonl"
        self.sae = path / "sae"
        self.report = path / "report.html"

    @property
    def runs(self) -> dict[str, "RunFolder"]:
        """The runs that are trained together here: this one, as in a `SweepFolder` all members."""
        return {SINGLE: self}

    def _clear(self) -> None:
        super()._clear()
        remove_leftovers(self.sae)  # where the metadata is written again

    @classmethod
    def create(cls, path: str | Path, settings: dict[str, Any]) -> "RunFolder":
        """A new run. Raises InputError if the folder exists and is not empty."""
        run = cls(Path(path))
        with run._making():
            run._fill(settings)
        return run

    def _fill(self, settings: dict[str, Any]) -> None:
        self.checkpoints.mkdir(exist_ok=True)
        self._begin("kronsae-run", settings)

    @classmethod
    def open(cls, path: str | Path) -> tuple["RunFolder", dict[str, Any]]:
        """A run that exists, and its config.json. Raises InputError if it is none."""
        run = cls(Path(path))
        run.document = _read_index(run.index, "kronsae-run", RUN)
        return run, copy.deepcopy(run.document)

    def change(self, name: str, config: dict[str, Any], data: dict[str, Any]) -> None:
        """Save a member's settings, and what describes its data, as they are from now on."""
        self._write(self.document | {"config": config, "data": self.document["data"] | data})

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        try:
            with open(self.metrics, "a", encoding="utf-8") as file:
                file.write(log_line(record))
        except OSError as error:
            raise InputError(f"{self.metrics} could not be written: {error}") from error

    def save_checkpoint(self, step: int, state: dict[str, Any], keep: int) -> None:
        """Write the state of `step`, and remove all but the newest `keep` checkpoints."""
        self._write_checkpoint(step, state)
        if self.mesh.first:
            checkpoint.prune(self.checkpoints, keep)

    def _write_checkpoint(self, step: int, state: dict[str, Any]) -> None:
        with self.mesh.world.together():
            if self.mesh.first:
                self._sync_metrics()
        state = {**state, "metrics_bytes": _size(self.metrics)}
        folder = checkpoint.step_folder(self.checkpoints, step)
        checkpoint.save_state(folder, state, self.mesh, SHARDED_STATE, self.copies())

    def _sync_metrics(self) -> None:
        """See to it that the lines that a checkpoint counts are on the disk."""
        try:
            if self.metrics.exists():
                sync(self.metrics)
        except OSError as error:  # some file systems tell now that the disk is full
            raise InputError(f"{self.metrics} could not be written: {error}") from error

    def load_checkpoint(self, tensors: bool = True) -> dict[str, Any] | None:
        """The newest checkpoint's state, or None if there is none; later metrics are cut off.

        tensors: False leaves None in their place.
        """
        folders = checkpoint.list_checkpoints(self.checkpoints)
        if not folders:
            state, step, length = None, 0, 0
        else:
            state = checkpoint.load_state(folders[-1], self.mesh.heads, SHARDED_STATE, tensors)
            state = _checked(folders[-1], state, {"metrics_bytes": Number(int)})
            step, length = checkpoint.step_of(folders[-1]), state["metrics_bytes"]
        if self.mesh.first:
            self._cut_metrics(step, length)
        return state

    def _cut_metrics(self, step: int, length: int) -> None:
        """Leave the records up to the checkpoint of `step`, whose log had `length` bytes.

        Lines that are damaged, or have no step, stay if they begin among these bytes. A line may
        have changed its length since, so the bytes do not say which records are later ones.
        """
        try:
            content = self.metrics.read_bytes() if self.metrics.exists() else b""
            if len(content) < length:
                warn(
                    f"{self.metrics} has lost {length - len(content):,} bytes: some of what was "
                    "logged before the checkpoint is missing from it, and from the report; "
                    "training is not"
                )
            kept, start = [], 0
            for line, record in log_lines(content):
                is_earlier = _is_logged_by(record, step)
                if start < length if is_earlier is None else is_earlier:
                    kept.append(line)
                start += len(line)
            left = b"".join(kept)
            if not content.startswith(left):
                write_file(self.metrics, lambda beside: beside.write_bytes(left))
            elif left != content:
                os.truncate(self.metrics, len(left))
        except OSError as error:
            raise InputError(f"{self.metrics} could not be cut: {error}") from error


def _is_logged_by(record: dict[str, Any] | None, step: int) -> bool | None:
    """Whether a record was logged before the checkpoint of `step`; None if nobody can tell.

    What is logged in a step comes before its checkpoint, apart from how the training ended.
    """
    at = (record or {}).get("step")
    if record is None or not isinstance(at, int | float) or not -math.inf < at < math.inf:
        return None
    return at < step or at == step and record.get("kind") not in ("final", "diverged")


class SweepFolder(_Folder):
    """Paths of a sweep: the runs of its members, by name, and what they share."""

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        super().__init__(path, "sweep.json")
        self.runs = {name: RunFolder(path / name) for name in names}
        self.comparison = path / "comparison.md"
        self.report = path / "report.html"
        self.streams = path / "streams"
        self.hookpoints: Mapping[str, str] = dict.fromkeys(self.runs, "")

    @classmethod
    def create(cls, path: str | Path, settings: dict[str, dict[str, Any]]) -> "SweepFolder":
        """A new sweep, with a run for each name. Raises InputError if the folder is not empty."""
        sweep = cls(Path(path), settings)
        with sweep._making():
            for begun in sweep.path.iterdir():
                if begun.is_dir():
                    shutil.rmtree(begun)
            for name, run in sweep.runs.items():
                run.path.mkdir()
                run._fill({**settings[name], "sweep": name})
            sweep.checkpoints.mkdir()
            members = {name: {"config": given["config"]} for name, given in settings.items()}
            sweep._begin("kronsae-sweep", {"members": members})
        return sweep

    @classmethod
    def open(cls, path: str | Path) -> tuple["SweepFolder", dict[str, dict[str, Any]]]:
        """A sweep that exists, and the config.json of each member. Raises InputError."""
        index = _read_index(Path(path) / "sweep.json", "kronsae-sweep", SWEEP)
        try:
            check_names(list(index["members"]))  # they are folders, in which files are removed
        except InputError as error:
            raise InputError(f"{Path(path) / 'sweep.json'}: {error}") from error
        sweep = cls(Path(path), index["members"])
        sweep.document, settings = index, {}
        for name, run in sweep.runs.items():
            sweep.runs[name], settings[name] = RunFolder.open(run.path)
        return sweep, settings

    def share(self, mesh: Mesh, owners: Mapping[str, int], hookpoints: Mapping[str, str]) -> None:
        super().share(mesh, owners, hookpoints)
        self.hookpoints = hookpoints
        for run in self.runs.values():
            run.share(mesh, owners, hookpoints)

    def _clear(self) -> None:
        super()._clear()
        for run in self.runs.values():
            run._clear()
        for stream in self.streams.iterdir() if self.streams.is_dir() else ():
            remove_leftovers(stream)

    @property
    def _ranks_of_streams(self) -> dict[str, list[int]]:
        """For each hookpoint of a suite the ranks that have its stream; [] if all have."""
        ranks: dict[str, list[int]] = {}
        for name, hookpoint in self.hookpoints.items():
            if hookpoint:
                own = ranks.setdefault(hookpoint, [])
                own += [self.owners[name]] if name in self.owners else []
        return ranks

    def copies(self) -> dict[str, dict[str, Any]]:
        """Also the first member's config.json, which describes the data that all share."""
        return super().copies() | next(iter(self.runs.values())).copies()

    def members(self) -> dict[str, dict[str, Any]]:
        """Entries of sweep.json, by the member's name."""
        members = _read_index(self.index, "kronsae-sweep", SWEEP)["members"]
        return {name: {**_NOT_ENDED, **entry} for name, entry in members.items()}

    def change(self, name: str, config: dict[str, Any], data: dict[str, Any]) -> None:
        """Change a member's settings, in its run and in sweep.json."""
        self.runs[name].change(name, config, data)
        self.document["members"][name]["config"] = config
        self._write(self.document)

    def note(self, endings: dict[str, dict[str, Any]], comparison: str) -> None:
        """Add to sweep.json how each member ended, and write comparison.md."""
        for name, ending in endings.items():
            self.document["members"][name] |= ending
        self._write(self.document)
        write_text(self.comparison, comparison)

    def save_checkpoint(self, step: int, state: dict[str, Any], keep: int) -> None:
        """Write the state of `step`: state["streams"], state["members"] in their runs, the rest.

        A step counts once the sweep's own part is there, so that one that was interrupted between
        two members never happened. The state of a member that another rank trains alone is None;
        the first rank, which writes, receives one after another.
        """
        members = state["members"]
        for name, ranks in self._ranks_of_streams.items():
            own = state["streams"].get(name)
            if ranks:
                own = checkpoint.state_of(min(ranks), own, self.mesh.world)
            folder = checkpoint.step_folder(self.streams / name, step)
            checkpoint.save_state(folder, own, self.mesh)
        for name, own in members.items():
            if name in self.owners:
                own = checkpoint.state_of(self.owners[name], own, self.mesh.world)
            self.runs[name]._write_checkpoint(step, own)
        shared = {**state, "members": list(members)}
        if "streams" in state:
            shared["streams"] = list(self._ranks_of_streams)
        folder = checkpoint.step_folder(self.checkpoints, step)
        checkpoint.save_state(folder, shared, self.mesh, copies=self.copies())
        if self.mesh.first:
            checkpoint.prune(self.checkpoints, keep)
            for name in self._ranks_of_streams:
                checkpoint.prune(self.streams / name, keep)
            for name in members:
                checkpoint.prune(self.runs[name].checkpoints, keep)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The state of the newest step that is complete, or None; what came later is removed.

        Members that state["members"] leaves out had ended by then: their folders stay as they are.
        The states of members that other ranks train come without tensors.
        """
        state, step = None, -1
        streams = self._ranks_of_streams
        for folder in reversed(checkpoint.list_checkpoints(self.checkpoints)):
            loaded = _checked(folder, checkpoint.load_state(folder), {"members": list[str]})
            if not self.runs.keys() >= set(loaded["members"]):
                reason = f"members: expected some of {list(self.runs)}, got {loaded['members']}"
                raise checkpoint.damaged(folder, reason)
            places = [self.runs[name].checkpoints for name in loaded["members"]]
            places += [self.streams / name for name in streams]
            if all((place / folder.name).is_dir() for place in places):
                state, step = loaded, checkpoint.step_of(folder)
                break
        for checkpoints in (self.checkpoints, *(self.streams / name for name in streams)):
            checkpoint.drop_after(checkpoints, step)
        names = self.runs if state is None else state["members"]
        for name in names:
            checkpoint.drop_after(self.runs[name].checkpoints, step)
        rank = self.mesh.world.rank
        members = {
            name: self.runs[name].load_checkpoint(tensors=self.owners.get(name, rank) == rank)
            for name in names
        }
        if state is None:
            return None
        if streams:
            state["streams"] = {
                name: checkpoint.load_state(
                    checkpoint.step_folder(self.streams / name, step),
                    tensors=not ranks or rank in ranks,
                )
                for name, ranks in streams.items()
            }
        return {**state, "members": members}


def saved_members(
    path: str | Path, wanted: Iterable[str] | None = None
) -> tuple[dict[str, Any], dict[str, Path]]:
    """A sweep's index and the runs of its members by name, of those that have an SAE.

    wanted: names of members; None: all, but for those that diverged, of which a notice tells.
    Raises InputError if a member that is wanted has no SAE, or if none has.
    """
    path = Path(path)
    index = _read_index(path / "sweep.json", "kronsae-sweep", SWEEP)
    members = {name: {**_NOT_ENDED, **entry} for name, entry in index["members"].items()}
    check_names(list(members))
    left_out = {}
    for name, entry in members.items():
        if not (path / name / "sae").is_dir():
            left_out[name] = "has no SAE"
        elif entry["failed"]:
            left_out[name] = f"diverged ({entry['failed']})"
    for name in wanted or ():
        if name not in members:
            raise InputError(f"{path} has no member {name!r}; it has {', '.join(members)}")
        if not (path / name / "sae").is_dir():
            raise InputError(f"{path / name} has no SAE: a run writes it when it ends")
    names = [name for name in members if name not in left_out] if wanted is None else list(wanted)
    if not names:
        raise InputError(f"{path} has no SAE: it has not ended, or all members diverged")
    for name, reason in left_out.items():
        if wanted is None:
            warn(f"{path / name} {reason}: it is left out")
        elif name in names:
            warn(f"{path / name} {reason}")
    kept = {name: entry for name, entry in members.items() if name in names}
    return index | {"members": kept}, {name: path / name for name in kept}


def read_run(path: Path) -> dict[str, Any]:
    """config.json of a run, also of one that another program wrote. Raises InputError."""
    index = path / "config.json"
    try:
        return typed(read_json(index), Keys({"config": run_settings()}, RUN.others), "")
    except (OSError, ValueError) as error:
        raise InputError(f"{index} cannot be read: {error}") from error


def whole(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The settings of a run, read from `path`. Raises InputError if a part is missing."""
    return typed(config, run_settings(), f"{path}: config")


def _read_index(path: Path, kind: str, hint: Any) -> dict[str, Any]:
    """The JSON object that makes a folder a run or a sweep. Raises InputError if it is none.

    hint: `RUN` or `SWEEP`. People may edit it: `kronsae.runs.resume` says what a run can go on
    with.
    """
    path = usable_path(path, "run folder")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} is no run folder: it does not exist")
    if _is_checkpoint(path.parent):
        above = path.parent.resolve().parents[1:3]  # its run, and the sweep that this may be of
        places = [place for name in _INDEXES for place in above if (place / name).exists()]
        run = f", {places[0]}," if places else ","
        raise InputError(
            f"{path.parent} is a checkpoint: give the folder of its run{run} which goes on from "
            "its newest checkpoint"
        )
    try:
        document = typed(read_json(path), hint, "")
        written = document.get("format"), document.get("format_version")
        if written != (kind, FORMAT_VERSION):
            raise ValueError(f"expected {kind!r} of format version {FORMAT_VERSION}, got {written}")
    except (OSError, ValueError) as error:
        whole = checkpoint.copy_of(path, path.parent / "checkpoints")
        is_gone = isinstance(error, FileNotFoundError)
        if whole is not None:
            problem = "is missing" if is_gone else f"is damaged ({error})"
            raise InputError(
                f"{path} {problem}; a checkpoint has a copy:\n"
                f"  {shlex.join(['cp', str(whole), str(path)])}"
            ) from error
        raise InputError(
            f"{path.parent} is no run folder: {path} cannot be read ({error}); begin again, with "
            "another --out or without the folder"
        ) from error
    document.pop("checksum", None)  # which older versions wrote
    return document


_INDEXES = ("sweep.json", "config.json")
"""A file that makes a folder a sweep or a run."""


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint, which has copies of these files."""
    return (folder / checkpoint.VALUES_NAME).exists()


def _checked(folder: Path, state: Any, hints: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's state, with what `hints` names. Raises InputError for another one."""
    try:
        return typed(state, Keys(hints), "state")
    except InputError as error:
        raise checkpoint.damaged(folder, str(error)) from error


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    return {
        "kronsae": kronsae_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,  # with the CUDA that it was built for
        **{name: metadata.version(name) for name in ("numpy", "transformers")},
        "platform": platform.platform(),
        "threads": str(torch.get_num_threads()),
    }


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
