"""The hookpoints that --layer, --hookpoint and --target-hookpoint name: one or several."""

import fnmatch
from collections.abc import Sequence
from typing import Any

from kronsae.cache import CacheIndex
from kronsae.commandline import ALL
from kronsae.config import DataConfig
from kronsae.data.hookpoints import INPUT, SITES, Site
from kronsae.data.language_model import layers_of
from kronsae.data.loading import module_names
from kronsae.errors import InputError
from kronsae.sources import Cache, source_of

Layers = Sequence[int | range | str]
"""What a flag for layers gives (`kronsae.commandline.layers`)."""

NAMES = ("layer", "hookpoint", "target_hookpoint")


def expand(flags: dict[str, Any], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """For each hookpoint that flags name its settings, such as {"layer": 3}; [] if they name none.

    flags: lists of values by name; `settings` say which model, or which cache, it is.
    Raises InputError if there is no such layer or module, or not as many targets as hookpoints.
    """
    given = {name: flags[name] for name in NAMES if flags.get(name)}
    if not given:
        return []
    if "layer" in given and "hookpoint" in given:
        raise InputError("--layer and --hookpoint exclude each other: give one")
    names = {"model", "revision", "activations", "trust_remote_code", "model_kwargs"}
    data = DataConfig(**{name: settings[name] for name in names & settings.keys()})
    values = {
        name: numbers(of, data) if name == "layer" else matches(of, data)
        for name, of in given.items()
    }
    longest = max(map(len, values.values()))
    for name, of in values.items():
        if len(of) not in (1, longest) or len(of) < longest and name != "target_hookpoint":
            counts = ", ".join(f"{len(each)} for {name}" for name, each in values.items())
            raise InputError(
                "expected one target_hookpoint, or one for each layer or hookpoint, got "
                f"{counts} ({of[0]!r}, ...)"
            )
    return [
        {name: of[number % len(of)] for name, of in values.items()} for number in range(longest)
    ]


def numbers(given: Layers, data: DataConfig) -> list[int]:
    """The layers, each once and in the order given. Raises InputError if there is none."""
    found: dict[int, None] = {}
    for each in given:
        if isinstance(each, str):
            found |= dict.fromkeys(_all_layers(data))
        else:
            found |= dict.fromkeys([each] if isinstance(each, int) else each)
    return list(found)


def _all_layers(data: DataConfig) -> Sequence[int]:
    if data.activations is None:
        return layers_of(data)
    if source_of(data.activations) is not Cache:
        raise InputError(f"layer {ALL!r}: {data.activations} does not say which layers it has")
    index = CacheIndex.open(data.activations)
    layers = [point.layer for point in index.hookpoints if point.layer is not None]
    if not layers:
        raise InputError(f"layer {ALL!r}: no layer is in {data.activations}; give --hookpoint")
    return sorted(layers)


def is_pattern(name: str) -> bool:
    """Whether the name of a hookpoint is a pattern, as in a shell."""
    return any(sign in name for sign in "*?[")


def matches(given: Sequence[str], data: DataConfig) -> list[str]:
    """The hookpoints, each once; those that match a pattern in the model's order.

    A pattern matches modules, their inputs if it ends in ":input", or else sites of blocks.
    Raises InputError if none matches.
    """
    found: dict[str, None] = {}
    for name in given:
        if not is_pattern(name):
            found[name] = None
            continue
        known = _known(data)
        if name.endswith(INPUT) and not fnmatch.filter(known, name):
            known = [each + INPUT for each in known]
        matching = fnmatch.filter(known, name) or fnmatch.filter(_sites(data), name)
        if not matching:
            raise InputError(
                f"hookpoint {name!r} matches none of the {len(known):,} that there are, such as "
                f"{', '.join(known[:8])}"
            )
        found |= dict.fromkeys(matching)
    return list(found)


def _sites(data: DataConfig) -> list[str]:
    """The sites that blocks may have, by all their names."""
    if data.activations is not None and source_of(data.activations) is Cache:
        points = CacheIndex.open(data.activations).hookpoints
        sites = [site for point in points if (site := Site.of(point.site)) is not None]
    else:
        sites = [Site(layer, name) for layer in layers_of(data) for name in SITES]
    return [*map(str, sites), *(site.lens for site in sites)]


def _known(data: DataConfig) -> list[str]:
    """The hookpoints of a cache, or the modules of a language model."""
    if data.activations is not None and source_of(data.activations) is Cache:
        return [point.name for point in CacheIndex.open(data.activations).hookpoints]
    return module_names(data)
