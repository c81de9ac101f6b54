"""The properties of an SAE: on its run's text, or on another, and where they are kept."""

import argparse
import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from kronsae.commandline import Parser, add_flag, add_place_flags
from kronsae.config import DataConfig
from kronsae.data.activations import split_target
from kronsae.data.images import check_no_images
from kronsae.data.loading import find_tokenizer, load_config, quiet
from kronsae.errors import InputError
from kronsae.interop.load import load
from kronsae.interop.suite import member_of
from kronsae.metrics.target_model import cache_of, data_of, known_data
from kronsae.model.massive import METADATA, MassiveTokens, rule_of, without
from kronsae.model.normalizer import SAMPLE_TOKENS
from kronsae.model.origin import Origin
from kronsae.model.sae import SAE, WEIGHTS_NAME
from kronsae.properties.gather import MeasureConfig, Properties, measure
from kronsae.properties.geometry import (
    Nearest,
    kinship,
    logit_effects,
    mean_cosines,
    nearest_rows,
)
from kronsae.properties.store import FOLDER, Stored, load_properties, save_properties
from kronsae.properties.summary import summarise
from kronsae.runs.folder import RunFolder, whole
from kronsae.system.devices import seed_everything
from kronsae.system.files import check_writable, sha256
from kronsae.system.progress import Pace

EMBEDDED: dict[str, Any] = {"tokens": 200_000, "sample": 32}
"""Settings that apply to the embedded model where none are given."""

EXPLORED = Path("runs", "explored")
"""Folder for the pages and properties of SAEs that are no runs."""

NEAREST, EFFECTS = 8, 10
"""How many nearest rows, and raised and lowered tokens, are kept of each latent."""


class OpenRun(NamedTuple):
    """An SAE with where its activations come from, and where its properties are kept."""

    sae: SAE
    data: DataConfig
    digest: str
    """The SHA-256 of its weights."""
    run: Path
    """As it was named: a run, or any other SAE."""
    folder: Path
    """RUN/properties/; of an SAE that is no run, one in runs/explored/ that it has alone."""
    text: dict[str, Any]
    """Fields of `DataConfig` that name another text than the run's, or trust its model's code."""
    device: str

    def settings(self, given: dict[str, Any]) -> MeasureConfig:
        return MeasureConfig(**((EMBEDDED if self.data.model == "embedded" else {}) | given))


def examine(opened: OpenRun, given: dict[str, Any]) -> Stored:
    """Measure the properties of an SAE's latents and keep them in its folder.

    given: settings of `measure` (`MeasureConfig`), by name.
    Raises InputError if its model or text is gone, or if more tokens of it are measured there.
    """
    sae, data, digest, run, folder, text, device = opened
    settings = opened.settings(given)
    _check_replaced(opened, settings)
    check_writable(folder)
    seed_everything(settings.seed)
    source = _open_text(sae, data, text, settings, device)
    reader = f"the cache {source.folder}" if hasattr(source, "folder") else data.model
    say(f"{run}: reading {settings.tokens:,} tokens of {data.dataset} with {reader}")
    said, pace = 0, Pace("tokens")

    def progress(tokens: int) -> None:
        nonlocal said
        pace.seconds_each(tokens)
        if tokens * 10 // settings.tokens > said:
            said = tokens * 10 // settings.tokens
            say(pace.words(tokens, settings.tokens))

    left_out: list[int] = []
    batches = without_massive(source.text_in_order(), sae, left_out.append)
    properties = measure(sae, batches, _vocabulary(data), settings, progress)
    if massive := sum(left_out):
        say(f"{massive:,} massive tokens are left out, which the SAE was not trained on")
    say("decoder rows: nearest ones, and effects on the next token")
    nearest = nearest_rows(sae.W_dec.detach(), NEAREST)
    facts = {
        "sae_sha256": digest,
        "text": {name: getattr(data, name) for name in (*_TEXT, *_MODEL)},
        "settings": dataclasses.asdict(settings),
        "massive_tokens": massive,
        "summary": _summary(sae, properties, nearest),
    }
    effects = None
    if _in_stream(sae) and getattr(source.language_model, "missing", None) is None:
        effects = logit_effects(sae, source.language_model.model, EFFECTS)
    stored = Stored(properties, nearest, effects, facts)
    save_properties(stored, folder)
    return load_properties(folder)


def _summary(sae: SAE, properties: Properties, nearest: Nearest | None) -> dict[str, Any]:
    """What the properties are on the whole, and where the rows of a head's latents point."""
    config, summary = sae.config, summarise(sae, properties)
    if config.heads:
        cosines = mean_cosines(sae.W_dec.detach(), config.heads, config.m, config.n)
        summary["cosines"] = _finite(cosines)
        if nearest is not None:
            summary["nearest"] = kinship(nearest, config.m, config.n)
    return summary


def _in_stream(sae: SAE) -> bool:
    """Whether decoder rows are directions of the residual stream, as far as is known."""
    origin = Origin.of(sae.metadata)
    site = origin.target_site if sae.config.d_target else origin.site
    return site is None or site.name not in ("attn_z", "mlp_in")


def _open_text(
    sae: SAE, data: DataConfig, text: dict[str, Any], settings: MeasureConfig, device: str
) -> Any:
    """The text with its activations: of the run's cache if it has one, else of the model."""
    from kronsae.sources import open_activations

    cache = cache_of(sae, text, device)
    if cache is not None:
        return cache
    return open_activations(data, batch_size=1, seed=settings.seed, device=device)


def _vocabulary(data: DataConfig) -> int:
    """Tokens that there are."""
    trusted = data.trust_remote_code
    with quiet():
        config = load_config(data.model, data.revision, trusted, data.model_kwargs)
    tokenizer = find_tokenizer(
        data.model, {"revision": data.revision, "trust_remote_code": trusted}
    )
    return max(len(tokenizer or ()), config.get_text_config().vocab_size)


def without_massive(
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    sae: SAE,
    on_massive: Callable[[int], None] = lambda count: None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Token ids [b, L], masks [b, L] and rows [t, d] of a text, without massive tokens.

    They are those that the SAE's training left out. For an SAE that does not say which, mean and
    median come from the text's first tokens.
    on_massive: called with how many there are in each batch.
    """
    batches = iter(batches)
    first: list[tuple[Tensor, Tensor, Tensor]] = []
    rule = rule_of(sae.metadata)
    if METADATA not in sae.metadata:
        while sum(len(rows) for *_, rows in first) < SAMPLE_TOKENS:
            batch = next(batches, None)
            if batch is None:
                break
            first.append(batch)
        sample = torch.cat([rows for *_, rows in first])
        rule = MassiveTokens.of(*split_target(sample, sae.config.d_target))
    for ids, mask, rows in chain(first, batches):
        if rule is not None:
            massive = rule(*split_target(rows, sae.config.d_target))
            on_massive(int(massive.sum()))
            mask, rows = without(mask, massive), rows[~massive]
        yield ids, mask, rows


_TEXT = ("dataset", "dataset_config", "split", "text_column")


_MODEL = ("model", "revision", "layer", "hookpoint", "target_hookpoint")
"""Fields of `DataConfig` that name the activations of an SAE which is no run."""


def kept(folder: Path, digest: str, given: dict[str, Any], text: dict[str, Any]) -> Stored | None:
    """The properties in a folder, if they are of this SAE, these settings and this text.

    Those of more tokens than `given` has serve as well.
    digest: the checksum of the SAE's weights.
    """
    if not folder.is_dir():
        return None
    stored = load_properties(folder)
    facts = stored.examined
    same = {**facts["settings"], **facts["text"]}
    asked = given | {name: value for name, value in text.items() if name in (*_TEXT, *_MODEL)}
    fewer = asked.pop("tokens", 0) > same["tokens"]
    if fewer or facts["sae_sha256"] != digest or any(same.get(k) != v for k, v in asked.items()):
        return None
    return stored


def _check_replaced(opened: OpenRun, settings: MeasureConfig) -> None:
    """Say which measurement a new one will replace. Raises InputError if that has more tokens."""
    folder = opened.folder
    if not folder.is_dir():
        return
    facts = load_properties(folder).examined
    measured, dataset = facts["settings"]["tokens"], facts["text"]["dataset"]
    if facts["sae_sha256"] != opened.digest:
        say(f"{folder} is of other weights than the run has now: it is measured anew")
        return
    if settings.tokens < measured:
        raise InputError(
            f"{folder} holds a measurement of {measured:,} tokens of {dataset}, and one of "
            f"{settings.tokens:,} would replace it: give --tokens {measured} or more, or move the "
            "folder away to measure anew"
        )
    say(f"{folder}: this replaces the measurement of {measured:,} tokens of {dataset}")


def digest_of(sae: SAE) -> str:
    """The SHA-256 of an SAE's weights, as `SAE.save` writes them."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in sae.state_dict().items()}
    return hashlib.sha256(save(tensors)).hexdigest()


def folder_of(source: str | Path, digest: str, subfolder: str | None = None) -> Path:
    """Where the properties of an SAE are kept: RUN/properties/, or runs/explored/NAME/properties/.

    NAME is that of an SAE which is no run, with the first digits of its weights' SHA-256: those of
    different SAEs never share a folder, and the same SAE has one, however its path is written.
    """
    if is_run(Path(source)):
        return Path(source) / FOLDER
    mark = digest[:12]
    name = re.sub(r"[^\w.-]+", "-", "-".join(filter(None, (str(source), subfolder)))).strip("-.")
    there = sorted(EXPLORED.glob(f"*-{mark}"))
    return (there[0] if there else EXPLORED / f"{name}-{mark}") / FOLDER


def open_run(run: Path, text: dict[str, Any], device: str, **place: Any) -> OpenRun:
    """A run's SAE, where its activations come from, and where its properties are kept.

    text: see `OpenRun`.  place: where it is in a repository (`given_place`). RUN may be any other
    SAE, whose model and text the metadata or `text` name.
    Raises InputError if no language model or text is known.
    """
    sae = load(str(run), device=device, **place)
    if not is_run(run):
        # No text is its own: as little as can be is held out of what is given.
        data = dataclasses.replace(data_of(sae, text, str(run)), heldout_tokens=1)
        digest = digest_of(sae)
    else:
        if given := sorted(text.keys() & set(_MODEL)):
            raise InputError(
                f"{', '.join(given)}: {run} is a run, which has its own: leave that out"
            )
        folder, settings = RunFolder.open(run)
        if whole(settings["config"], folder.index)["data"] is None:
            raise InputError(f"{run} was trained from tensors: there is no text to look at")
        data, digest = data_of(sae, text, str(run)), sha256(run / "sae" / WEIGHTS_NAME)
    check_no_images(data, "kronsae explore")
    folder_for = folder_of(run, digest, place.get("subfolder"))
    return OpenRun(sae, data, digest, run, folder_for, text, device)


def member_named(
    run: Path, text: dict[str, Any], place: dict[str, Any]
) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """RUN, `text` and `place` where RUN may be a suite, of which --layer or --hookpoint names one.

    What the SAE's metadata says of its layer then holds, and not the flag.
    """
    where = {name: text[name] for name in ("layer", "hookpoint") if name in text}
    if not where or is_run(run) or place.get("subfolder"):
        return run, text, place
    if (name := member_of(str(run), **where)) is None:
        return run, text, place
    if is_run(run / name):
        return run / name, {k: v for k, v in text.items() if k not in where}, place
    place = place | {"subfolder": name}
    known = known_data(load(str(run), **place))
    if {"layer", "hookpoint"} & known.keys() and text.get("model", known["model"]) == known[
        "model"
    ]:
        text = {k: v for k, v in text.items() if k not in where}
    return run, text, place


class Opened(NamedTuple):
    """An SAE with all that is known of its latents."""

    sae: SAE
    data: DataConfig
    stored: Stored
    tokenizer: Any | None


def open_properties(opened: OpenRun, given: dict[str, Any]) -> Opened:
    """The properties of an SAE; they are measured first if they are not of its text and settings.

    given: see `examine`.
    """
    stored = kept(opened.folder, opened.digest, given, opened.text)
    if stored is None:
        stored = examine(opened, given)
    else:
        _say_what_serves(opened, stored, given)
    data = opened.data
    common = {"revision": data.revision, "trust_remote_code": data.trust_remote_code}
    return Opened(opened.sae, data, stored, find_tokenizer(data.model, common))


def _say_what_serves(opened: OpenRun, stored: Stored, given: dict[str, Any]) -> None:
    """One line if a measurement of other text, or of another number of tokens, serves."""
    facts, asked = stored.examined, opened.settings(given).tokens
    measured, dataset = facts["settings"]["tokens"], facts["text"]["dataset"]
    if (measured, dataset) == (asked, opened.data.dataset):
        return
    more = f"give --tokens {asked} --dataset {opened.data.dataset}"
    say(
        f"{opened.folder}: its measurement of {measured:,} tokens of {dataset} is taken "
        f"(to measure {asked:,} anew, {'move the folder away' if asked < measured else more})"
    )


def is_run(path: Path) -> bool:
    """Whether a path is a run that has an SAE, and no SAE from elsewhere."""
    return (path / "sae" / WEIGHTS_NAME).is_file()


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {name: value if value == value else None for name, value in values.items()}


# The command line, which `python -m kronsae.properties` and `python -m kronsae.explore` share


class PropertiesParser(Parser):
    """Flags of both commands: the run, the settings, the text."""

    def __init__(self, command: str, description: str, example: str) -> None:
        super().__init__(command, description, example, argument_default=argparse.SUPPRESS)
        self.add_argument(
            "run", type=Path, metavar="RUN", help="run folder, or any SAE that kronsae.load takes"
        )
        for spec in dataclasses.fields(DataConfig):
            if spec.name in _MODEL:
                add_flag(self, spec, default="of an SAE that is no run: what its file says")
        add_place_flags(self)
        for spec in dataclasses.fields(MeasureConfig):
            add_flag(self, spec)
        for spec in dataclasses.fields(DataConfig):
            if spec.name in _TEXT:
                add_flag(self, spec, default="the run's")
        self.add_argument(
            "--trust-remote-code",
            action="store_true",
            help="run code that comes with the model from the hub",
        )
        self.add_argument("--device", default="cpu", metavar="NAME", help="cpu (default) or cuda")

    def read(self, argv: list[str]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Settings, text, and the other flags. Raises InputError for anything wrong."""
        flags = vars(self.parse(argv))
        settings = [spec.name for spec in dataclasses.fields(MeasureConfig)]
        text = [*_TEXT, *_MODEL, "trust_remote_code"]
        return _taken(flags, settings), _taken(flags, text), flags


def _taken(flags: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Take the flags with one of the names out of `flags`."""
    return {name: flags.pop(name) for name in names if name in flags}


def say(line: str) -> None:
    print(line, flush=True)
