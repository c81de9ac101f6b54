"""kronsae's own format, written by `SAE.save`: sae.safetensors and config.json."""

from pathlib import Path

from torch import Tensor

from kronsae.config import SAEConfig, from_dict
from kronsae.errors import InputError
from kronsae.interop.formats import Format, Reader
from kronsae.model.sae import CONFIG_NAME, FORMAT_VERSION, SAE, SAE_FILE, WEIGHTS_NAME, made_of
from kronsae.registry import FORMATS
from kronsae.system.documents import shown, typed
from kronsae.system.files import read_checksummed, read_tensors, sha256


def read(folder: Path) -> SAE:
    """Read the SAE in a folder of `SAE.save`. Raises InputError if it is damaged."""
    advice = (
        "copy the folder again from its source; in a run, --resume writes it from the last "
        "checkpoint"
    )
    try:
        settings = read_checksummed(folder / CONFIG_NAME)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / CONFIG_NAME} is damaged: {error}; {advice}") from error
    if not isinstance(settings, dict) or not {"sae", "sha256", "metadata"} <= settings.keys():
        raise InputError(f"{folder / CONFIG_NAME} was not written by SAE.save")
    if settings.get("format") != "kronsae" or settings.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{folder}: expected format 'kronsae', version {FORMAT_VERSION}, got "
            f"{shown(settings.get('format'))}, version {shown(settings.get('format_version'))}"
        )
    settings = typed(settings, SAE_FILE, str(folder / CONFIG_NAME))
    if unknown := sorted(settings.keys() - SAE_FILE.required.keys()):
        raise InputError(
            f"{folder / CONFIG_NAME}: unknown keys {unknown}: take them out, or put them into "
            "'metadata'"
        )
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        raise InputError(f"{weights} is missing; {advice}")
    if sha256(weights) != settings["sha256"]:
        raise InputError(
            f"{weights} is damaged: its SHA-256 is not the one in {CONFIG_NAME}; {advice}"
        )
    config = from_dict(SAEConfig, settings["sae"], str(folder / CONFIG_NAME))
    sae = made_of(config, read_tensors(weights), weights)
    sae.metadata = settings["metadata"]
    return sae


def write(sae: SAE, folder: str | Path) -> Path:
    return sae.save(folder)


def reader(folder: Path, sae: SAE) -> Reader:
    loaded = read(folder).to(sae.W_dec.device)

    def apply(x: Tensor) -> tuple[Tensor, Tensor]:
        x_hat, codes, _ = loaded(x)
        return loaded.fired(codes).sum(-1), x_hat

    return apply


@FORMATS.register("kronsae")
class Own(Format):
    library = package = "kronsae"
    weights, config = WEIGHTS_NAME, CONFIG_NAME
    how_to_load = 'kronsae.load("{out}")'
    read, write, reader = staticmethod(read), staticmethod(write), staticmethod(reader)
