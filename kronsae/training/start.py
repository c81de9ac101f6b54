"""Fine-tuning: training that starts from the weights of an SAE of any format that is read."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch as st

from kronsae.config import SAEConfig, TrainConfig, all_settings, flag, flat, from_dict
from kronsae.errors import InputError
from kronsae.interop.load import load
from kronsae.interop.pretrained import REGISTRY
from kronsae.interop.suite import INDEX_NAME
from kronsae.model.normalizer import Normalizer
from kronsae.model.sae import SAE
from kronsae.registry import SELECTIONS
from kronsae.system.documents import part_of

UNIT_TOLERANCE = 1e-4
"""By how much norms of decoder rows may differ from 1 that are to be 1, but for rounding."""


class Starts:
    """The SAE, or suite of SAEs, that --finetune names.

    sha256: of the weights, if a run has noted them before.
    """

    def __init__(self, source: str, allow_pickle: bool = False, sha256: str | None = None) -> None:
        self.source = source
        self.allow_pickle = allow_pickle
        self.sha256 = sha256
        self._loaded: dict[tuple[int | None, str | None], SAE] = {}

    def at(self, settings: Mapping[str, Any]) -> SAE:
        """The SAE for a member with these flat settings: of a suite the one at its hookpoint.

        Raises InputError if there is none, or if its weights have changed.
        """
        place = settings.get("layer"), settings.get("hookpoint")
        if place not in self._loaded:
            try:
                self._loaded[place] = self._load(*place)
            except InputError as error:
                raise InputError(f"--finetune {self.source}: {error}") from error
            if self.sha256 not in (None, note_of(self._loaded[place])["sha256"]):
                raise InputError(
                    f"--finetune {self.source}: its weights have changed since a run started there"
                )
        return self._loaded[place]

    def _load(self, layer: int | None, hookpoint: str | None) -> SAE:
        def of_suite() -> SAE:
            return load(
                self.source, layer=layer, hookpoint=hookpoint, allow_pickle=self.allow_pickle
            )

        if (Path(self.source) / INDEX_NAME).is_file():
            return of_suite()
        try:
            return self._alone()
        except InputError as error:
            try:
                return of_suite()
            except InputError:
                raise error from None

    def _alone(self) -> SAE:
        """The one SAE at the source, of a repository also OWNER/NAME/SUBFOLDER."""
        source, subfolder = self.source, None
        if not source.startswith((REGISTRY, ".")) and not Path(source).exists():
            owner, *rest = source.split("/", 2)
            if len(rest) == 2 and owner:
                source, subfolder = f"{owner}/{rest[0]}", rest[1]
        return load(source, subfolder=subfolder, allow_pickle=self.allow_pickle)

    def note(self, sae: SAE) -> dict[str, str]:
        """What config.json says of an SAE of these."""
        return {"source": self.source, **note_of(sae)}


def note_of(sae: SAE) -> dict[str, str]:
    """What config.json says of the SAE that a training starts from.

    sha256: of its weights, in the file that `SAE.save` would write.
    """
    weights = {name: tensor.contiguous() for name, tensor in sae.state_dict().items()}
    return {"sha256": hashlib.sha256(st.save(weights)).hexdigest()}


def config_of(sae: SAE) -> SAEConfig:
    """The configuration with which a trained SAE is trained on.

    What matters in training alone, and eps, is that of its own run, in units of normalised
    activations. SAEs of other libraries have none: they get the defaults.
    """
    config = dataclasses.asdict(sae.config)
    run = part_of(sae.metadata, "config", "sae")
    for part in ("encoder", "selection", "objective"):
        own = f"{part}_settings"
        config[own] = run.get(own) if run.get(part) == config[part] else None
    config["jumprelu_bandwidth"] = run.get("jumprelu_bandwidth", 0.0)
    config["eps"] = run.get("eps", config["eps"])
    return from_dict(SAEConfig, config, "the SAE to start from")


def settings_of(sae: SAE, explicit: Mapping[str, Any]) -> dict[str, Any]:
    """Flat settings of `SAEConfig` with which a trained SAE is trained on.

    explicit: settings that the user chose. Raises InputError for one that contradicts the SAE.
    """
    known = all_settings()
    values = flat("sae", dataclasses.asdict(config_of(sae)), "the SAE to start from")
    chosen = {name: value for name, value in explicit.items() if known[name].part == "sae"}
    for name, value in chosen.items():
        if not _is_tuned(name, sae.config) and value != values.get(name, value):
            raise InputError(
                f"{flag(name)} {value}: the SAE that --finetune starts from has {values[name]}: "
                "leave it out"
            )
    defaults = {name: setting.spec.default for name, setting in known.items()}
    together = {**defaults, **values, **chosen}
    return {
        name: value
        for name, value in values.items()
        if name not in chosen
        and (not _is_tuned(name, sae.config) or known[name].no_effect(together) is None)
    }


def _is_tuned(name: str, config: SAEConfig) -> bool:
    """Whether fine-tuning may change this setting of an SAE, which computes the same without it."""
    if name == "k":  # else only training aims at it
        return not SELECTIONS[config.selection].exact
    setting = all_settings()[name]
    return setting.inside is not None or bool(setting.spec.metadata.get("tuned"))


def check_start(start: SAE, config: SAEConfig, train: TrainConfig) -> None:
    """Raise InputError unless the weights of `start` are those of an SAE of this configuration."""
    own, wanted = (flat("sae", dataclasses.asdict(each), "") for each in (start.config, config))
    for name, value in own.items():
        if name not in ("eps", "init_scale") and not _is_tuned(name, start.config):
            if wanted.get(name) != value:
                raise InputError(
                    f"{name}: the SAE to start from has {value}, this training {wanted.get(name)}"
                )
    if _is_rescaled(start, train) and (reason := start.why_no_unit_rows()):
        raise InputError(
            "the SAE to start from has decoder rows that are not of unit norm, and cannot get them "
            f"({reason}): train it with decoder_norm 'free'"
        )


def _is_rescaled(start: SAE, train: TrainConfig) -> bool:
    """Whether training keeps decoder rows at unit norm, and those of `start` have others."""
    if train.decoder_norm != "unit":
        return False
    return bool(((start.decoder_norms() - 1).abs() > UNIT_TOLERANCE).any())


def normalised(
    start: SAE, train: TrainConfig, of_input: Normalizer, of_target: Normalizer | None
) -> SAE:
    """The SAE of normalised activations that computes what `start` does from raw ones."""
    device = start.W_enc.device
    target = None if of_target is None else (of_target.mean.to(device), of_target.scale)
    sae = start.unfolded(of_input.mean.to(device), of_input.scale, target)
    if _is_rescaled(start, train):
        sae.use_unit_rows_()
    return sae
