"""Trained SAEs of a command line, with their language model and held-out text.

A command line names SAEs (a run, a sweep, a folder of `SAE.save`, a hub id). Their model, layer and
text are in their metadata, or given by flags.
"""

import argparse
import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kronsae.cache import CacheActivations
from kronsae.commandline import add_flag, add_place_flags
from kronsae.config import DataConfig, data_settings, from_dict, stored, untrusted
from kronsae.data import split_target
from kronsae.data.activations import HELDOUT_SETTINGS, open_model, set_aside
from kronsae.data.images import open_documents
from kronsae.data.language_model import LanguageModel
from kronsae.data.packing import PADDING, context_begin, left_out_ids, token_ids, token_mask
from kronsae.errors import InputError, warn
from kronsae.interop.load import load
from kronsae.metrics.heldout import HeldoutText
from kronsae.model.massive import DEFAULT_MULTIPLE, METADATA, MassiveTokens, rule_of
from kronsae.model.normalizer import SAMPLE_TOKENS
from kronsae.model.sae import SAE
from kronsae.runs.folder import SweepFolder

OF_MODEL = data_settings(of="model")
OF_TEXT = data_settings(of="text")
HELP = {
    "layer": "read the residual stream after this block, counted from 0",
    "hookpoint": "read this instead of a layer, by its name as for kronsae train",
    "target_hookpoint": "the hookpoint that a transcoder predicts",
    "heldout_tokens": "tokens of text to read (default: as many as the run held out)",
    "dataset": "other text than the run's own held-out slice: hub name, or files; 'stdlib'",
}


class LoadedSAE(NamedTuple):
    """An SAE with its name, its source, and its language model and text."""

    name: str
    source: str
    sae: SAE
    data: DataConfig
    cache: CacheActivations | None = None
    """The cache that its run was trained from, if its held-out text is the one to read."""

    @property
    def trained_on(self) -> dict[str, Any]:
        """Description of the training data by the SAE's run; {} if there is none."""
        return self.sae.metadata.get("data") or {}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add flags that override an SAE's metadata, `add_place_flags`, and the device."""
    add_place_flags(parser)
    group = parser.add_argument_group("language model and text (default: the run's own)")
    for spec in dataclasses.fields(DataConfig):
        if spec.metadata.get("of"):
            add_flag(group, spec, help=HELP.get(spec.name), default="the run's")
    parser.add_argument(
        "--massive-multiple",
        type=float,
        metavar="N",
        help="tokens farther from the mean than N times the median distance are massive: figures "
        "leave them out, and they pass unchanged (0: no token; default: the rule that the SAE was "
        f"trained with, if there is none {DEFAULT_MULTIPLE:g})",
    )
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda, … (auto: cuda if there is one)"
    )


def given_data(request: argparse.Namespace) -> dict[str, Any]:
    """The flags of `add_flags` that the user gave."""
    names = [spec.name for spec in dataclasses.fields(DataConfig) if spec.metadata.get("of")]
    return {name: value for name, value in vars(request).items() if name in names}


def load_sae(source: str, given: dict[str, Any], device: Any = "cpu", **place: Any) -> LoadedSAE:
    """Load an SAE: of a run, or any other that `kronsae.load` takes.

    given: fields of `DataConfig` that override the SAE's metadata.  place: those of `given_place`.
    Raises InputError if there is no SAE, or if its language model is not known.
    """
    sae = load(source, device=device, **place)
    data, cache = data_of(sae, given, source), cache_of(sae, given, device)
    return LoadedSAE(_names([source])[0], source, sae, data, cache)


OF_CACHE = ("heldout_tokens", "contexts_per_batch", "trust_remote_code")
"""Settings that may be given with the held-out text of a cache."""


def cache_of(sae: SAE, given: dict[str, Any], device: Any) -> CacheActivations | None:
    """The cache that an SAE was trained from; None without one, or if other text or model is given.

    A notice says why the cache cannot be used.
    given: fields of `DataConfig` that override the SAE's metadata.
    """
    folder = _data_of_run(sae).get("activations")
    if not isinstance(folder, str) or given.keys() - set(OF_CACHE):
        return None
    try:
        return _open_cache(sae, folder, given, device)
    except InputError as error:
        warn(f"the language model will read the text, not the run's cache {folder}: {error}")
        return None


def _open_cache(sae: SAE, folder: str, given: dict[str, Any], device: Any) -> CacheActivations:
    """The cache in the folder. Raises InputError if it does not hold the text that is needed."""
    if not os.path.isdir(folder):  # nothing is fetched from where an SAE's file says
        raise InputError("there is no such folder here")
    known = _data_of_run(sae)
    cache = CacheActivations(
        folder,
        layer=known.get("layer"),
        hookpoint=known.get("hookpoint"),
        target_hookpoint=known.get("target_hookpoint"),
        batch_size=1,
        device=device,
        trust_remote_code=bool(given.get("trust_remote_code")),
    )
    if cache.index.text != (sae.metadata.get("data") or {}).get("text"):
        raise InputError("it has another text by now")
    if cache.heldout_tokens < given.get("heldout_tokens", 0):
        raise InputError(f"it holds out only {cache.heldout_tokens:,} tokens")
    return cache


def load_saes(
    sources: Sequence[str], given: dict[str, Any], device: Any, **place: Any
) -> list[LoadedSAE]:
    """`load_sae` of several, or of all members of a sweep, with names that are distinct.

    Members that saved no SAE, as their weights were not finite, are left out with a notice.
    """
    paths = [path for source in sources for path in _members(source)]
    names = _names(paths)
    return [
        load_sae(path, given, device, **place)._replace(name=name)
        for name, path in zip(names, paths, strict=True)
    ]


def _members(source: str) -> list[str]:
    if not os.path.exists(os.path.join(source, "sweep.json")):
        return [source]
    sweep, _ = SweepFolder.open(source)
    saved = {name: str(run.path) for name, run in sweep.runs.items() if run.sae.exists()}
    if saved and (without := sorted(sweep.runs.keys() - saved.keys())):
        warn(f"{source}: {', '.join(without)} saved no SAE, and is left out")
    return list(saved.values()) or [str(run.path) for run in sweep.runs.values()]


def _names(paths: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that are distinct (a folder sae/ is left out)."""
    parts = [[part for part in Path(path).parts if part != "sae"] or [path] for path in paths]
    if len({tuple(part) for part in parts}) < len(parts):
        raise InputError(f"the same SAE is named twice: {', '.join(paths)}")
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def data_of(sae: SAE, given: dict[str, Any], name: str) -> DataConfig:
    """Language model and text of an SAE: as given, otherwise from its metadata."""
    known = known_data(sae)
    if not known and "model" not in given:
        raise InputError(
            f"{name}: its metadata does not name a language model: give --model, and --layer or "
            "--hookpoint"
        )
    if given.get("model", known.get("model")) != known.get("model"):
        known = {key: value for key, value in known.items() if key not in OF_MODEL}
    if "dataset" in given:
        known = {key: value for key, value in known.items() if key not in OF_TEXT}
    for one, excluded in (("layer", "hookpoint"), ("hookpoint", "layer")):
        if one in given and excluded not in given:
            known.pop(excluded, None)
    data = from_dict(DataConfig, known | given, f"settings of {name}").live()
    if data.activations is not None:
        raise InputError(
            f"{name} was trained on {data.activations}, without a language model: give --model, "
            "--layer or --hookpoint, and --dataset"
        )
    return data


def known_data(sae: SAE) -> dict[str, Any]:
    """Settings of `DataConfig` in an SAE's metadata: of its run, or what another library's file
    says. {} if they do not name a language model."""
    described = sae.metadata.get("data") or {}
    if known := untrusted(_data_of_run(sae)):
        return as_evaluated(stored(DataConfig, known), described)
    if described.get("name", "given") == "given":
        return {}
    # Other libraries' names of modules may be none of the model's; a block's number is one.
    place = next((k for k in ("layer", "hookpoint") if described.get(k) is not None), None)
    names = filter(None, (place, "revision", "target_hookpoint"))
    known = {"model": described["name"]} | {k: described[k] for k in names if k in described}
    if isinstance(prepend := described.get("prepend_bos"), bool):
        known["bos"] = "bos" if prepend else "none"
    return known


def as_evaluated(data: dict[str, Any], described: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run, with the dtype in which its language model ran if that was float32.

    "auto" may mean bfloat16 on this machine, which would give other figures.
    """
    if data.get("model_dtype", "auto") == "auto" and described.get("dtype") == "float32":
        return data | {"model_dtype": "float32"}
    return data


def _data_of_run(sae: SAE) -> dict[str, Any]:
    """Settings of `DataConfig` of the run that trained an SAE; {} if its metadata has none."""
    return (sae.metadata.get("config") or {}).get("data") or {}


def by_text(loaded_saes: Sequence[LoadedSAE]) -> list[list[LoadedSAE]]:
    """Groups of SAEs with the same language model and text, for one pass over it."""
    groups: dict[Any, list[LoadedSAE]] = {}
    for loaded in loaded_saes:
        trained_on = [loaded.trained_on.get(key) for key in ("text", "heldout_contexts")]
        cache = loaded.cache and loaded.cache.index.fingerprint
        groups.setdefault((loaded.data, *trained_on, cache), []).append(loaded)
    return list(groups.values())


def open_heldout(
    loaded: LoadedSAE,
    device: Any,
    massive_multiple: float | None = None,
    beside: Sequence[LoadedSAE] = (),
) -> HeldoutText:
    """The language model of an SAE, and text that the SAE was not trained on.

    From the text of its own run that is the slice that the run held out; other text is all unseen.
    massive_multiple: for another rule than the SAE was trained with (0: no token is massive), whose
        mean and median come from the first tokens of the text. So do those of the default rule, for
        an SAE whose metadata has none or is of other activations.
    beside: other SAEs of this text. The strictest of their rules holds for all, so that they are
        compared on the same tokens; a notice says if the rules differ.
    Raises InputError if more text is needed than the run held out, or if the widths do not fit.
    """
    model, text = _of_cache(loaded) if loaded.cache else _of_text(loaded, device)
    check_widths(model, loaded.sae, loaded.name)
    left_out = "special tokens and the first position of each context pass unchanged"
    if loaded.data.image_column is not None:
        left_out = "the positions of an image before its patches pass unchanged"
    rule, counted = _massive_rules([loaded, *beside], text, massive_multiple)
    if rule is not None:
        left_out += (
            f", as do massive tokens: those farther from the mean than {rule.multiple:g} times the "
            "median distance"
        )
    facts = {
        "dataset": loaded.data.dataset,
        "contexts": len(text.contexts),
        "context_length": text.contexts.shape[1],
        "tokens": int(text.mask.sum()),
        "left_out": left_out,
        **text.facts,
    }
    return dataclasses.replace(text, massive=rule, counted=counted, facts=facts)


def check_widths(model: LanguageModel, sae: SAE, name: str) -> None:
    """Raise InputError unless the SAE is of the widths of the model's hookpoint and target."""
    config = sae.config
    if (model.d_model, model.d_target) != (config.d_model, config.d_target):
        raise InputError(
            f"{name}: the SAE maps width {config.d_model} to {config.d_out}, but "
            f"{model.hookpoint} of {model.name} has width {model.d_model}"
            + (f", and {model.target_hookpoint} {model.d_target}" if model.d_target else "")
        )


def _of_cache(loaded: LoadedSAE) -> tuple[Any, HeldoutText]:
    """The held-out text of the cache, whose activations nothing has to compute again."""
    cache = loaded.cache
    assert cache is not None
    contexts, mask = cache.heldout_contexts(), cache.heldout_mask()
    tokens = (contexts != PADDING).sum(1).cumsum(0)
    count = int((tokens < loaded.data.heldout_tokens).sum()) + 1
    facts = {
        "which": "the run's own held-out text, from its cache",
        "fingerprint": cache.index.text,
        "context_begin": cache.index.begin.get("context_begin"),
    }
    model: Any = cache.language_model
    size = loaded.data.contexts_per_batch
    text = HeldoutText(
        model, contexts[:count], mask[:count], size, facts, stored=cache.heldout_rows
    )
    return model, text


def _of_text(loaded: LoadedSAE, device: Any) -> tuple[LanguageModel, HeldoutText]:
    """Text that the SAE was not trained on, and the model that reads it. Raises InputError."""
    model, data = open_model(loaded.data, device)
    text = open_documents(data, seed=0)
    trained_on = loaded.trained_on
    own = text.fingerprint() == trained_on.get("text")
    of_run = stored(DataConfig, {**trained_on, **_data_of_run(loaded.sae)})
    if own:  # the run's documents are held out as the run did
        read_by_run = dataclasses.replace(
            data, **{name: of_run[name] for name in HELDOUT_SETTINGS if name in of_run}
        )
        if read_by_run != data:
            data, text = read_by_run, open_documents(read_by_run, seed=0)
    text.check_ids(model.vocab_size)
    packed, documents = set_aside(text, model.vocabulary, data)
    if own and getattr(text, "aside", None) is None:
        held_out = _as_held_out(loaded, data)
        tokens = held_out.heldout_tokens
        if documents > set_aside(text, model.vocabulary, held_out)[1]:
            raise InputError(
                f"{loaded.name} was trained on all of {data.dataset!r} except {tokens:,} held-out "
                "tokens: give at most as many --heldout-tokens, or another --dataset"
            )
    begin = context_begin(model.vocabulary, data.bos)
    left_out = left_out_ids(model.vocabulary, data.exclude_tokens)
    mask = token_mask(packed, model.vocabulary, left_out, len(begin))
    facts = {
        "which": "the run's own held-out text" if own else "other text than the run's",
        "fingerprint": text.fingerprint(),
        "context_begin": model.vocabulary.convert_ids_to_tokens(begin),
    }
    return model, HeldoutText(model, token_ids(packed), mask, data.contexts_per_batch, facts)


def _as_held_out(loaded: LoadedSAE, data: DataConfig) -> DataConfig:
    """`data` with the settings by which the SAE's run held documents out of this text."""
    trained_on = loaded.trained_on
    of_run = stored(DataConfig, {**trained_on, **_data_of_run(loaded.sae)})
    length = trained_on["context_length"]
    tokens = length * trained_on["heldout_contexts"]
    if not of_run["join_documents"]:  # contexts are padded
        tokens = min(tokens, of_run.get("heldout_tokens", tokens))
    packing = {name: of_run[name] for name in ("bos", "join_documents", "chat_roles")}
    return dataclasses.replace(data, context_length=length, heldout_tokens=tokens, **packing)


def held_out_by_run(loaded: LoadedSAE, model: LanguageModel) -> int:
    """How many documents of its text an SAE's run held out; 0 if the text is another one."""
    text = open_documents(loaded.data, seed=0)
    if text.fingerprint() != loaded.trained_on.get("text"):
        return 0
    return set_aside(text, model.vocabulary, _as_held_out(loaded, loaded.data))[1]


def _massive_rules(
    saes: Sequence[LoadedSAE], text: HeldoutText, multiple: float | None
) -> tuple[MassiveTokens | None, MassiveTokens | None]:
    """The rule for tokens that figures leave out, or else the rule that counts massive tokens.

    multiple, and which of several rules it is: see `open_heldout`.
    """
    if multiple is not None and multiple != 0 and not 2 <= multiple < float("inf"):
        raise InputError(f"--massive-multiple: expected 0 (none) or >= 2, got {multiple:g}")

    of_text = functools.cache(functools.partial(_rule_of_text, text))  # the model may have to read

    def rule_for(loaded: LoadedSAE) -> MassiveTokens | None:
        if multiple is not None:
            return of_text(multiple) if multiple else None
        known = METADATA in loaded.sae.metadata and _is_read_where_it_was_trained(loaded)
        return rule_of(loaded.sae.metadata) if known else of_text(DEFAULT_MULTIPLE)

    rules = {loaded.name: rule_for(loaded) for loaded in saes}
    multiples = {name: 0 if rule is None else rule.multiple for name, rule in rules.items()}
    strictest = min(filter(None, rules.values()), key=_strictness, default=None)
    if strictest is not None and len(set(multiples.values())) > 1:
        each = ", ".join(f"{name} {of_one:g}" for name, of_one in multiples.items())
        warn(
            f"the SAEs were trained with several --massive-multiple ({each}): all are evaluated "
            f"without the tokens that {strictest.multiple:g} leaves out"
        )
    return strictest, of_text(DEFAULT_MULTIPLE) if strictest is None else None


def _rule_of_text(text: HeldoutText, multiple: float) -> MassiveTokens | None:
    """The rule for the first tokens of a text; None if it has none."""
    rows, tokens = [], 0
    for _, _, of_batch in text.rows():
        rows.append(of_batch.float())
        tokens += len(of_batch)
        if tokens >= SAMPLE_TOKENS:
            break
    if not tokens:
        return None
    x, target = split_target(torch.cat(rows), text.model.d_target)
    return MassiveTokens.of(x, target, multiple)


def _strictness(rule: MassiveTokens) -> tuple[float, float]:
    return rule.multiple, rule.of_input.radius


def _is_read_where_it_was_trained(loaded: LoadedSAE) -> bool:
    """Whether the activations to evaluate on are those of the SAE's run."""
    known = _data_of_run(loaded.sae)
    of_these = ("model", "revision", "layer", "hookpoint", "target_hookpoint")
    return all(getattr(loaded.data, name) == known.get(name) for name in of_these)
