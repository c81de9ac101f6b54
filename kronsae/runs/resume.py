"""A run or sweep folder that a training goes on with."""

import shlex
from pathlib import Path
from typing import Any

from kronsae.config import PARTS, DataConfig, all_settings, stored, with_defaults
from kronsae.errors import InputError, differences
from kronsae.runs.folder import RUN, SINGLE, SWEEP, RunFolder, SweepFolder
from kronsae.system import checkpoint
from kronsae.system.documents import part_of, typed
from kronsae.system.files import digest_of
from kronsae.system.parallel import Mesh


def open_folder(
    out: str | Path | None,
    resume: bool,
    settings: dict[str, dict[str, Any]],
    sweep: bool,
    mesh: Mesh,
    owned: dict[str, int],
    hookpoints: dict[str, str],
) -> tuple[RunFolder | SweepFolder | None, dict[str, Any] | None]:
    """The folder to train in, locked by the first process, and the state to go on from.

    owned: which rank trains a member alone, and needs its state.  hookpoints: of the members.
    """
    if out is None:
        if resume:
            raise InputError("resume needs the run folder: give `out`")
        return None, None
    folder, state = None, None
    try:
        for turn in (True, False):  # the others find what the first one leaves
            with mesh.world.together():
                if mesh.first is turn:
                    folder = (
                        _claim(out, resume, settings, sweep) if turn else open_to_resume(out)[0]
                    )
                    folder.share(mesh, owned, hookpoints)
                    state = folder.load_checkpoint() if resume else None
    except InputError:
        if folder is not None:
            folder.release()
        raise
    return folder, state


def open_to_resume(
    path: str | Path,
) -> tuple[RunFolder | SweepFolder, dict[str, dict[str, Any]]]:
    """The run or sweep in `path`, and the config.json of each member. Raises InputError."""
    path = Path(path)
    index = path / "sweep.json"
    if index.exists() or checkpoint.copy_of(index, path / "checkpoints"):
        sweep, members = SweepFolder.open(path)
        _check_unchanged(sweep)
        for run in sweep.runs.values():
            _check_unchanged(run)
        return sweep, members
    run, settings = RunFolder.open(path)
    if "sweep" in settings:
        raise InputError(
            f"{path} is a member of a sweep and goes on with all of it: resume {path.parent}"
        )
    _check_unchanged(run)
    return run, {SINGLE: settings}


def _check_unchanged(folder: RunFolder | SweepFolder) -> None:
    """Raise InputError if a checkpoint was written by a run with other settings than this one.

    It may have been copied here; or somebody has edited config.json, which may be done to settings
    that a run may change when it goes on. The newest checkpoint knows the digest of its copy, by
    which config.json is judged if the copy is missing or damaged.
    """
    newest = checkpoint.list_checkpoints(folder.checkpoints)[-1:]
    for name, written in folder.copies().items():
        copies = checkpoint.copies_of(name, folder.checkpoints)
        schema = SWEEP if "members" in written else RUN
        for place in newest:
            digest = None if place in copies else checkpoint.digest_of_copy(place, name)
            # What became of its members is written to a sweep.json later on.
            if schema is RUN and digest not in (None, digest_of(written)):
                raise InputError(
                    f"{folder.path / name} was edited, or is of another run than checkpoint "
                    f"{place}, and the copy there is damaged, so nobody can tell what it was. "
                    f"Undo the edit; if that is not possible, {checkpoint.without(place)}"
                )
        changes = {
            place: _changes(typed(copy, schema, str(place / name)), written)
            for place, copy in copies.items()
        }
        others = [place for place in changes if changes[place]]
        if not others:
            continue
        place, index = others[-1], folder.path / name
        lines = "\n  ".join(changes[place])
        if len(others) < len(changes):  # config.json is that of the others
            raise InputError(
                f"checkpoint {place} is of another run, with other settings:\n  {lines}\n"
                f"To go on without it, remove the folder {place}"
            )
        raise InputError(
            f"{index} has other settings than the run was trained with:\n  {lines}\n"
            f"A checkpoint has a copy:\n  {shlex.join(['cp', str(place / name), str(index)])}\n"
            "If it is the checkpoint of another run, which was copied here, take that folder away"
        )


def _changes(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Differences between two documents of a run, or of a sweep, that decide what is learned."""
    if "members" in now:
        if was["members"].keys() != now["members"].keys():
            return [f"members: were {', '.join(was['members'])}, are {', '.join(now['members'])}"]
        pairs = {name: (was["members"][name], entry) for name, entry in now["members"].items()}
        return [f"{name}: {line}" for name, pair in pairs.items() for line in _changes(*pair)]
    free = _free() | {"data.dtype", "data.weights"}  # which follow model_dtype
    configs = _with_defaults(was["config"]), _with_defaults(now["config"])
    return [
        *differences(*configs, "config", free),
        *differences(was.get("data"), now.get("data"), "data", free),  # a sweep.json has none
    ]


def _with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """A run's config with the settings that it lacks, as it is of an earlier version."""
    return {
        name: values
        if name not in PARTS or values is None  # no language model
        else with_defaults(PARTS[name], values)
        for name, values in config.items()
    }


def _claim(
    out: str | Path, resume: bool, settings: dict[str, dict[str, Any]], sweep: bool
) -> RunFolder | SweepFolder:
    """The new or resumed folder, locked. Raises InputError if it was made with other settings."""
    if not resume:
        new_sweep = SweepFolder.create(out, settings) if sweep else None
        folder = new_sweep or RunFolder.create(out, settings[SINGLE])
        folder.lock()
        return folder
    folder, saved = open_to_resume(out)
    folder.lock()
    try:
        if saved.keys() != settings.keys():
            raise InputError(
                f"{folder.path} has the members {list(saved)}, and cannot go on with "
                f"{list(settings)}"
            )
        for name, document in saved.items():
            _keep_start(folder, document, settings[name])
        changed = {name: _other_dtype(document, settings[name]) for name, document in saved.items()}
        for name, document in saved.items():
            given = settings[name]["data"]
            before = {key: value for key, value in stored(DataConfig, {}).items() if key in given}
            known = {key: given.get(key) for key in _LATER} | before
            document["data"] = known | document["data"] | changed[name]
            document["config"] = _with_defaults(document["config"])
        changes = [
            f"{name}: {line}" if sweep else line
            for name in saved
            for part in ("config", "data")
            for line in differences(saved[name][part], settings[name][part], part, _free())
        ]
        if changes:
            raise InputError(
                f"{folder.path} was made with other settings:\n  " + "\n  ".join(changes)
            )
        for name, data in changed.items():
            if saved[name]["config"] != settings[name]["config"]:
                folder.change(name, settings[name]["config"], data)
        return folder
    except InputError:
        folder.release()
        raise


def _keep_start(
    folder: RunFolder | SweepFolder, saved: dict[str, Any], given: dict[str, Any]
) -> None:
    """Note in the given settings from which SAE a run has started, if a checkpoint goes on from it.

    Raises InputError if it was another one, or if there is no checkpoint yet.
    """
    was = saved.get("finetune")
    if was is not None and "finetune" not in given:
        if not checkpoint.list_checkpoints(folder.checkpoints):
            raise InputError(
                f"{folder.path} has no checkpoint yet, and starts from the weights of an SAE: give "
                "that SAE, in place of a configuration"
            )
        given["finetune"] = was
    shas = [part_of(document, "finetune").get("sha256") for document in (saved, given)]
    if shas[0] != shas[1]:
        started = "random weights" if was is None else "the weights of another SAE"
        raise InputError(f"{folder.path} was started from {started} than this training is")


_LATER = ("context_begin", "prepend_bos", "streaming", "site", "target_site", "sites")
"""Facts about a run's data that earlier versions did not write down."""


def _other_dtype(saved: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Changes to the description of a run's data if it is resumed with another --model-dtype.

    A user changes it after NaN in float16, say. Empty if it is the same.
    """
    was, now = (document["config"].get("data") for document in (saved, given))
    if not was or not now or was.get("model_dtype") == now["model_dtype"]:
        return {}
    if was.get("model_dtype") == "auto" and now["model_dtype"] == saved["data"].get("dtype"):
        return {}  # it goes on with the dtype that it had
    # "weights" is a digest of them in the model's dtype.
    return {name: given["data"][name] for name in ("dtype", "weights") if name in given["data"]}


def _free() -> set[str]:
    """Settings that may change when a run goes on, as `differences` names them."""
    return {
        f"config.{setting.part}.{name}"
        for name, setting in all_settings().items()
        if setting.spec.metadata.get("free")
    }
