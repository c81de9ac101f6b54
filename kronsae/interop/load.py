"""`load`: an SAE from a folder of any known format, or from the Hugging Face hub."""

from pathlib import Path

import torch

from kronsae.data.common import reason
from kronsae.errors import InputError
from kronsae.interop.formats import known, recognise
from kronsae.model.sae import SAE, WEIGHTS_NAME
from kronsae.registry import FORMATS


def load(
    source: str | Path,
    *,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    subfolder: str | None = None,
    allow_pickle: bool = False,
) -> SAE:
    """An SAE from a run folder, a folder written by `SAE.save`, or a Hugging Face hub id.

    Also from a folder or repository of SAELens, sparsify or dictionary_learning, whose format is
    recognised by its files (`kronsae.interop`).

    It takes raw activations; `sae.metadata` holds what was saved beside it.
    revision: branch, tag or commit on the hub.  subfolder: where in the folder or repository the
        SAE is, as "layers.6".
    allow_pickle: also read dictionary_learning's ae.pt, a pickle, of which tensors alone are taken.
    Raises InputError if there is none there, or if it is damaged or of another format.
    """
    folder = _find_sae(source, revision, subfolder, allow_pickle)
    form = FORMATS[recognise(folder) or "kronsae"]
    if form.pickle and not allow_pickle:
        raise InputError(
            f"{folder / form.weights} is a pickle, which is only read on request: "
            "allow_pickle=True (--allow-pickle) takes tensors from it and runs nothing"
        )
    return form.read(folder).to(device)


def _find_sae(
    source: str | Path, revision: str | None, subfolder: str | None, allow_pickle: bool
) -> Path:
    """The folder, here or downloaded, that holds the SAE. Raises InputError if there is none."""
    path = Path(source)
    local = path.exists()
    if not local:
        if isinstance(source, Path) or str(source).count("/") != 1 or str(source).startswith("."):
            raise InputError(f"{source}: no such folder")
        path = download(str(source), revision, subfolder, allow_pickle)
    elif revision is not None:
        raise InputError(f"revision {revision!r} has no effect: {source} is a folder here")
    for folder in (path / subfolder,) if subfolder else (path, path / "sae"):
        if recognise(folder) or (folder / WEIGHTS_NAME).exists():
            return folder
    where = f"{source}{f', {subfolder}' if subfolder else ''}"
    hint = (
        "(a run writes it when it ends, or stops on a signal)"
        if local
        else "(if it is in a folder there, name it with subfolder)"
    )
    raise InputError(
        f"{where} holds no SAE: expected {WEIGHTS_NAME} there or in its folder sae/ {hint}. "
        f"Formats that are read: {known()}"
    )


def download(repo_id: str, revision: str | None, subfolder: str | None, allow_pickle: bool) -> Path:
    """Folder with what an SAE in a repository consists of. Raises InputError if there is none.

    Weights that are a pickle are left where they are unless `allow_pickle`.
    """
    from huggingface_hub import snapshot_download

    places = [f"{subfolder.strip('/')}/"] if subfolder else ["", "sae/"]
    names = {form.config for form in FORMATS.values()}
    names |= {form.weights for form in FORMATS.values() if allow_pickle or not form.pickle}
    files = [f"{place}{name}" for place in places for name in sorted(names)]
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=files))
    except Exception as error:  # the hub client raises dozens of kinds
        at = f", revision {revision!r}," if revision else ""
        raise InputError(
            f"{repo_id}{at}: neither a folder here nor a repository that could be fetched from the "
            f"Hugging Face hub ({reason(error)})"
        ) from error
