"""`load`: load an SAE from a folder of any known format, or from the Hugging Face hub."""

from pathlib import Path

import torch

from kronsae.data.common import reason
from kronsae.errors import InputError
from kronsae.interop.formats import files_of, known, recognise
from kronsae.interop.pretrained import REGISTRY, of_registry
from kronsae.interop.suite import subfolder_of
from kronsae.model.massive import check_rule
from kronsae.model.sae import METADATA, SAE, WEIGHTS_NAME
from kronsae.registry import FORMATS
from kronsae.system.devices import resolve_device
from kronsae.system.documents import typed
from kronsae.system.files import usable_path


def load(
    source: str | Path,
    *,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    subfolder: str | None = None,
    layer: int | None = None,
    hookpoint: str | None = None,
    allow_pickle: bool = False,
) -> SAE:
    """Load an SAE from a run folder, a folder written by `SAE.save`, or a Hugging Face hub id.

    Folders, files and repositories of other libraries, and of public suites, are recognised by the
    names of their files (`kronsae.interop`). "sae_lens:RELEASE/ID" is an SAE of SAELens' registry,
    which that library loads.

    The SAE takes raw activations; `sae.metadata` holds the metadata saved with it. Its parameters
    need no gradients: `sae.requires_grad_()` lets them learn.
    revision: branch, tag or commit on the hub.  subfolder: of the SAE in the folder or repository,
        such as "layers.6", or its file there, such as "layer6.sae.pt".
    layer, hookpoint: in place of the subfolder, of a suite (`kronsae.interop.suite`), such as the
        folder of a sweep at several hookpoints.
    allow_pickle: also read weights that are a pickle, from which only tensors are loaded.
    Raises InputError if there is no SAE, if it is damaged or of another format, or without such a
    device.
    """
    device = resolve_device(str(device))
    for name, value in (
        ("revision", revision),
        ("subfolder", subfolder),
        ("hookpoint", hookpoint),
    ):
        typed(value, str | None, name)
    if str(source).startswith(REGISTRY):
        given = (revision, subfolder, layer, hookpoint)
        if any(value is not None for value in given):
            raise InputError(
                "revision, subfolder, layer and hookpoint have no effect with "
                f"{source}: leave them out"
            )
        return _loaded(of_registry(str(source)), source, device)
    if layer is not None or hookpoint is not None:
        if subfolder is not None:
            raise InputError(f"subfolder {subfolder!r}: give it, or a layer or hookpoint, not both")
        layer = typed(layer, int | None, "layer")
        subfolder = subfolder_of(usable_path(source, "source"), layer, hookpoint, revision)
    folder = _find_sae(source, revision, subfolder, allow_pickle)
    form = FORMATS[recognise(folder) or "kronsae"]
    if form.pickle and not allow_pickle:
        raise InputError(
            f"{form.weights_of(folder)} is a pickle, which is only read on request: with "
            "allow_pickle=True (--allow-pickle), which loads tensors and runs no code"
        )
    try:
        sae = form.read(folder)
    except InputError as error:  # some say what is wrong alone
        is_named = str(folder) in str(error)
        raise error if is_named else InputError(f"{folder}: {error}") from error
    try:
        typed(sae.metadata, METADATA, "metadata")
        check_rule(sae.metadata, sae.d_model, sae.config.d_target)
    except InputError as error:
        raise InputError(f"{folder / (form.config or '')}: {error}") from error
    return _loaded(sae, source, device)


def _loaded(sae: SAE, source: str | Path, device: torch.device) -> SAE:
    """An SAE to use: on the device, without gradients."""
    sae.source = str(source)
    return sae.to(device).requires_grad_(False)


def _find_sae(
    source: str | Path, revision: str | None, subfolder: str | None, allow_pickle: bool
) -> Path:
    """The local or downloaded folder of the SAE. Raises InputError if there is none."""
    path = usable_path(source, "source")
    local = path.exists()
    if not local:
        if isinstance(source, Path) or str(source).count("/") != 1 or str(source).startswith("."):
            raise InputError(f"{source}: no such folder")
        path = download(str(source), revision, subfolder, allow_pickle)
    elif revision is not None:
        raise InputError(f"revision {revision!r} has no effect: {source} is a local folder")
    if (path / "sweep.json").is_file() and not subfolder:
        raise InputError(
            f"{source} is a sweep: name one of its runs, {source}/NAME, or give layer= or "
            "hookpoint= if that tells which"
        )
    for folder in list(path.parents)[:2] if path.is_file() else ():
        name = recognise(folder)
        if name is not None and FORMATS[name].weights_of(folder) == path:
            return folder  # whose weights these are
    inside = usable_path(path / (subfolder or "sae"), "subfolder")
    folders = (inside, inside / "sae") if subfolder else (path, inside)
    for folder in folders:
        if recognise(folder) or (folder / WEIGHTS_NAME).exists():
            return folder
    where = f"{source}{f', {subfolder}' if subfolder else ''}"
    files = sorted(file for folder in folders for file in folder.glob("*") if file.is_file())
    saes = list(filter(recognise, files))
    if len(saes) > 1:
        raise InputError(
            f"{where} holds {len(saes)} SAEs: name one of the files, such as {saes[0].name}"
        )
    if saes:
        return saes[0]
    below = sorted(inside.glob("*")) if subfolder else sorted(path.glob("*"))
    names = [each.name for each in below if recognise(each) or recognise(each / "sae")]
    if local and names:
        raise InputError(
            f"{where} holds SAEs in folders of it ({', '.join(names[:8])}): name one of them, or "
            "give layer= or hookpoint= if that tells which"
        )
    hint = (
        "(a run writes it when it ends, or stops on a signal)"
        if local
        else "(if it is in another folder there, name that with subfolder; weights that are a "
        "pickle are only downloaded with allow_pickle=True)"
    )
    raise InputError(
        f"{where} holds no SAE: expected {WEIGHTS_NAME} there or in its folder sae/ {hint}. "
        f"Formats that are read: {known()}"
    )


def download(repo_id: str, revision: str | None, subfolder: str | None, allow_pickle: bool) -> Path:
    """Download the files of an SAE in a repository; the folder. Raises InputError if that fails.

    Weights that are a pickle are only downloaded with `allow_pickle`.
    """
    from huggingface_hub import snapshot_download

    above = f"{subfolder.strip('/')}/" if subfolder else ""
    paths = [above.rstrip("/"), f"{above}sae"]
    files = sorted(set().union(*(files_of(path, allow_pickle) for path in paths)))
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=files))
    except Exception as error:  # the hub client raises dozens of types
        at = f", revision {revision!r}," if revision else ""
        raise InputError(
            f"{repo_id}{at}: neither a local folder nor a repository that could be downloaded from "
            f"the Hugging Face hub ({reason(error)})"
        ) from error
