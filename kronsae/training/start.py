"""Fine-tuning: training that starts from the weights of an SAE of any format that is read."""

import dataclasses
import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch as st

from kronsae.config import (
    DataConfig,
    SAEConfig,
    TrainConfig,
    all_settings,
    data_settings,
    flag,
    flat,
    from_dict,
    with_defaults,
)
from kronsae.data import loading
from kronsae.data.hookpoints import Site, check_layer
from kronsae.errors import InputError, warn
from kronsae.interop.load import load
from kronsae.interop.pretrained import REGISTRY
from kronsae.interop.suite import INDEX_NAME, places_of, subfolders_of
from kronsae.metrics.target_model import known_data
from kronsae.model.normalizer import Normalizer
from kronsae.model.sae import SAE
from kronsae.registry import SELECTIONS
from kronsae.runs.sweep import hookpoint_name
from kronsae.sources import Cache, source_of
from kronsae.system.documents import part_of

UNIT_TOLERANCE = 1e-4
"""By how much norms of decoder rows may differ from 1 that are to be 1, but for rounding."""


class Starts:
    """The SAE, or suite of SAEs, that --finetune names.

    sha256: of the weights, if a run has noted them before.
    """

    def __init__(self, source: str, allow_pickle: bool = False, sha256: str | None = None) -> None:
        # Absolute, so that config.json says where it was from everywhere.
        self.source = str(Path(source).absolute()) if Path(source).exists() else source
        self.allow_pickle = allow_pickle
        self.sha256 = sha256
        self._loaded: dict[tuple[int | None, str | None], dict[str, SAE]] = {}

    def place(self, given: Collection[str]) -> dict[str, Any]:
        """Settings of `DataConfig` by which an SAE is trained on where, and as, it was trained.

        That is the model, the hookpoint, the text and how it is read; those that are chosen leave
        out what depends on them.
        given: names of settings that the user chose.
        Raises InputError if a suite is to be read at all its hookpoints, or if the SAE does not
        say where it was trained.
        """
        at_own_place = _PLACE.isdisjoint(given)
        known = self._known(at_own_place)
        place, names = {*_PLACE, "target_hookpoint"}, set()
        if not {"model", "activations"} & set(given):
            names |= {*data_settings(of="model"), *data_settings(of="reading")}
            names.add("image_column")  # what the model reads, on any dataset
            if "dataset" not in given:
                names |= set(data_settings(of="text"))
        names = names | place if at_own_place else names - place
        return {
            name: value
            for name, value in known.items()
            if name in names - set(given) and value is not None
        }

    def _known(self, at_own_place: bool) -> dict[str, Any]:
        """What is known of the activations, without those that no language model gave.

        at_own_place: whether the hookpoint is needed.
        """
        if self._is_sweep:
            places = places_of(Path(self.source))
            if at_own_place:
                raise InputError(
                    f"--finetune {self.source} has several SAEs "
                    f"({', '.join(place.folder for place in places[:20])}): give --layer or "
                    f"--hookpoint, or name one of them, as in {self.source}/NAME"
                )
            known = known_data(load(self.source, subfolder=places[0].folder)) if places else {}
        else:
            try:
                known = known_data(self._found(None, None)[""])
            except InputError:
                if at_own_place:
                    raise
                return {}  # a suite of another library
        if known.get("activations") and source_of(known["activations"]) is not Cache:
            known = {}
        known.pop("activations", None)
        if at_own_place and known.get("layer") is None and known.get("hookpoint") is None:
            raise InputError(
                f"--finetune {self.source}: it does not say where it was trained: give --model, "
                "and --layer or --hookpoint"
            )
        return known

    @property
    def _is_sweep(self) -> bool:
        return (Path(self.source) / INDEX_NAME).is_file()

    def at(self, settings: Mapping[str, Any], explicit: Mapping[str, Any] | None = None) -> SAE:
        """The SAE for a member with these flat settings: of a suite the one at its hookpoint.

        explicit: those that the user chose, which say which of several it is.
        Raises InputError if there is none, or if its weights have changed.
        """
        found = self._found(settings.get("layer"), settings.get("hookpoint"))
        if self.sha256 is not None:
            found = {name: sae for name, sae in found.items() if sha256_of(sae) == self.sha256}
            if not found:
                raise InputError(
                    f"--finetune {self.source}: its weights have changed since a run started there"
                )
        if len(found) > 1:
            fitting = {n: sae for n, sae in found.items() if _agrees(sae, explicit or settings)}
            if len(fitting) != 1:
                which = ", ".join(f"{self.source}/{name}" for name in fitting or found)
                raise InputError(
                    f"--finetune {self.source} has {len(found)} SAEs there, and the other flags "
                    f"fit {len(fitting)} of them: name one ({which}), or give flags that only one "
                    "has, such as --encoder or --dict-size"
                )
            found = fitting
        return next(iter(found.values()))

    def _found(self, layer: int | None, hookpoint: str | None) -> dict[str, SAE]:
        """The SAEs at a hookpoint, by where they are in the source; {"": SAE} of one alone."""
        place = layer, hookpoint
        if place not in self._loaded:
            try:
                self._loaded[place] = self._load(*place)
            except InputError as error:
                raise InputError(f"--finetune {self.source}: {error}") from error
        return self._loaded[place]

    def _load(self, layer: int | None, hookpoint: str | None) -> dict[str, SAE]:
        def of_suite() -> dict[str, SAE]:
            _, folders = subfolders_of(self.source, layer, hookpoint)
            return {
                name: load(self.source, subfolder=name, allow_pickle=self.allow_pickle)
                for name in folders
            }

        if self._is_sweep:
            return of_suite()
        if (None, None) in self._loaded:
            return self._loaded[None, None]
        try:
            return {"": self._alone()}
        except InputError as error:
            if layer is None and hookpoint is None:
                raise
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

    def check_k(self, sae: SAE, explicit: Collection[str]) -> None:
        """Give a notice if training aims at a k that neither the SAE's file nor the user gave."""
        aims = SELECTIONS[sae.config.selection].aims_at_k and not sae.selection.exact
        if aims and not part_of(sae.metadata, "config", "sae") and "k" not in explicit:
            warn(
                f"--finetune {self.source}: training aims at {sae.config.k} active latents a "
                "token, which its format does not give: --k chooses another number"
            )

    def note(self, sae: SAE) -> dict[str, str]:
        """What config.json says of an SAE of these."""
        return {"source": self.source, **note_of(sae)}

    def check_place(self, sae: SAE, data: DataConfig) -> None:
        """Give a notice if an SAE was trained at another hookpoint than `data` names.

        Raises InputError if the model has no such layer.
        """
        known = known_data(sae)
        if known.get("layer") is None and known.get("hookpoint") is None:
            return
        was = with_defaults(DataConfig, known)
        if _site(was) != _site(vars(data)):
            site = Site.of(data.hookpoint)
            layer = site.layer if site else data.layer
            if layer is not None and data.activations is None:
                check_layer(data.model, loading.config_of(data), layer)
            warn(
                f"--finetune {self.source} was trained at {hookpoint_name(was)} of "
                f"{was['model']}, and goes on at {hookpoint_name(vars(data))} of {data.model}"
            )


_PLACE = {"layer", "hookpoint"}


def _site(data: Mapping[str, Any]) -> tuple[Any, Any]:
    """The hookpoint in settings of `DataConfig`, and the target, by one name of several."""
    read, target = (Site.of(data[name]) or data[name] for name in ("hookpoint", "target_hookpoint"))
    read = read or Site(data["layer"], "resid_post")
    if isinstance(read, Site) and read.name == "resid_pre" and read.layer:
        read = Site(read.layer - 1, "resid_post")
    return read, target


def _agrees(sae: SAE, explicit: Mapping[str, Any]) -> bool:
    """Whether settings that the user chose are those of a trained SAE."""
    try:
        settings_of(sae, explicit)
    except InputError:
        return False
    return True


def note_of(sae: SAE) -> dict[str, str]:
    """What config.json says of the SAE that a training starts from.

    sha256: of its weights, in the file that `SAE.save` would write.
    """
    return {"sha256": sha256_of(sae)}


def sha256_of(sae: SAE) -> str:
    """The SHA-256 of an SAE's weights, in the file that `SAE.save` would write."""
    weights = {name: tensor.contiguous() for name, tensor in sae.state_dict().items()}
    return hashlib.sha256(st.save(weights)).hexdigest()


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
