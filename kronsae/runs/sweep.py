"""A sweep: several SAEs that learn from one stream of activations. Its members, and their table."""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kronsae.config import (
    DataConfig,
    SAEConfig,
    TrainConfig,
    all_settings,
    from_dict,
    with_defaults,
)
from kronsae.errors import InputError
from kronsae.model.flops import flops_per_token
from kronsae.system import tables
from kronsae.system.documents import part_of
from kronsae.system.files import NOT_FINITE


def own_settings() -> tuple[str, ...]:
    """Settings in which members may differ: the autoencoder, its hookpoint, how it learns."""
    return tuple(
        name
        for name, setting in all_settings().items()
        if setting.spec.metadata.get("own", setting.part != "data")
        and not setting.spec.metadata.get("shared")
    )


def hookpoints_of(configs: Mapping[str, DataConfig]) -> dict[str, str]:
    """A name for the hookpoint of each member, also of a folder; "" if all have the same."""
    names = {name: hookpoint_name(vars(data)) for name, data in configs.items()}
    return names if len(set(names.values())) > 1 else dict.fromkeys(names, "")


def hookpoint_name(data: Mapping[str, Any]) -> str:
    """A name for the hookpoint in settings of `DataConfig`: "layer3", "model.layers.3.mlp"."""
    read = data["hookpoint"] or f"layer{data['layer']}"
    return _as_name("-to-".join(filter(None, (read, data["target_hookpoint"]))))


_RESERVED = ("checkpoints", "streams", "sweep.json", "comparison.md", "report.html")


def one_stream(configs: Sequence[TrainConfig]) -> list[TrainConfig]:
    """The members' settings, with the first one's order of the data in all of them.

    So each also says how to train its SAE alone, on the same batches.
    Raises InputError if they differ in what members share.
    """
    first = configs[0]
    shared = (f.name for f in dataclasses.fields(TrainConfig) if f.metadata.get("shared"))
    for name in shared:
        for other in configs[1:]:
            pair = getattr(first, name), getattr(other, name)
            if name == "data_seed":
                pair = first.stream_seed, pair[1]
                if pair[1] is None:
                    continue
            if pair[0] != pair[1]:
                raise InputError(
                    f"{name}: the members of a sweep learn from one stream of activations, and "
                    f"cannot differ in it (got {pair[0]!r} and {pair[1]!r})"
                )
    seed = first.stream_seed
    return [
        config if config.stream_seed == seed else dataclasses.replace(config, data_seed=seed)
        for config in configs
    ]


def check_names(names: Sequence[str]) -> None:
    """Raise InputError unless the names are folders' names, all different.

    Names that differ in case alone are one folder on some file systems.
    """
    folded = [name.lower() for name in names]
    for name, same in zip(names, folded, strict=True):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._=-]{0,199}", name) or same in _RESERVED:
            raise InputError(
                f"{name!r} cannot be the name of a member of a sweep, and of its folder: expected "
                f"letters, digits and any of . _ = -, and none of {', '.join(_RESERVED)}"
            )
        if folded.count(same) > 1:
            raise InputError(
                f"two members of the sweep have the name {name!r} (capitals count as small "
                "letters): give others"
            )


def name_of(overrides: dict[str, Any]) -> str:
    """A member's name, from the settings that it has of its own: "k16-m2", "dense-lr0.001", ""."""
    parts = []
    for name, value in overrides.items():
        sign = "=" if name[-1].isdigit() else ""
        text = value if isinstance(value, str) else f"{name}{sign}{value:g}".replace("+", "")
        parts.append(_as_name(text))
    return "-".join(parts)


def _as_name(text: str) -> str:
    """A text as a part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9._=-]+", "-", text)


def product(
    entries: Iterable[dict[str, Any]],
    lists: dict[str, list[Any]],
    hookpoints: Sequence[dict[str, Any]] = (),
) -> list[dict[str, Any]]:
    """Each entry at each hookpoint with each combination of the lists' values.

    That is every member's own settings. hookpoints: settings for each of them.
    Raises InputError if an entry has a setting that is also a list, or of the hookpoints.
    """
    members = []
    for entry, hookpoint in itertools.product(entries, hookpoints or [{}]):
        both = sorted(entry.keys() & {*lists, *hookpoint})
        if both:
            raise InputError(
                f"{both[0]} has several values and is in the sweep file, too: leave it out of one"
            )
        for values in itertools.product(*lists.values()):
            members.append({**entry, **hookpoint, **dict(zip(lists, values, strict=True))})
    return members


_SHOWN = {
    "explained_variance": "explained variance",
    "explained_variance_all": "of all tokens",
    "l0": "L0",
    "dead_share": "dead",
    "dead_share_10k": "dead/10k",
    "ce_recovered": "CE recovered",
}
"""Figures of `kronsae.metrics` in the table, and the head of their column."""


def comparison(members: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table of {name: {"config", "tokens", "metrics", "step_ms", "failed"}}."""
    shown = [key for key in _SHOWN if any(key in entry["metrics"] for entry in members.values())]
    if "dead_share_10k" in shown:
        shown.remove("dead_share")
    head = ["member", "encoder", "F", "k", "M mult-adds", "ms a step"]
    places = {}
    for name, entry in members.items():
        if data := part_of(entry, "config", "data"):
            places[name] = hookpoint_name(with_defaults(DataConfig, data))
    several = len(set(places.values())) > 1
    if several:
        head.insert(1, "reads")
    rows = []
    for name, entry in members.items():
        sae = from_dict(SAEConfig, part_of(entry, "config", "sae"), f"member {name}")
        kron = sae.heads
        rows.append(
            [
                name,
                *([places[name]] if several else []),
                f"{sae.heads}x{sae.m}x{sae.n}" if kron else sae.encoder,
                f"{sae.dict_size:,}",
                str(sae.k) if sae.k else "–",
                f"{flops_per_token(sae) / 1e6:,.2f}",
                f"{entry['step_ms']:,.1f}" if entry["step_ms"] else "–",
                *(_figure(entry["metrics"].get(key)) for key in shown),
            ]
        )
        if entry["failed"]:
            rows[-1][0] += f" (diverged after {entry['tokens']:,} tokens)"
    return [*head, *(_SHOWN[key] for key in shown)], rows


def _figure(value: float | None) -> str:
    """A figure in the table; one of weights that diverged may have any size."""
    if value is None:
        return "–"
    return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.1e}"


def markdown(members: dict[str, dict[str, Any]], warning: str | None = None) -> str:
    """The `comparison` as a document, with what its figures are measured on, and a warning."""
    text = tables.markdown(*comparison(members)) + "\n"
    figures: dict[str, float] = next(
        (entry["metrics"] for entry in members.values() if entry["metrics"]), {}
    )
    if "heldout_tokens" in figures:
        text += f"\nMeasured on {figures['heldout_tokens']:,} held-out tokens.\n"
    if warning is not None:
        text += f"\n**Warning**: {warning}.\n"
    for head, said in (
        ("Diverged", {name: entry["failed"] for name, entry in members.items()}),
        ("Not finite", {name: entry["metrics"].get(NOT_FINITE) for name, entry in members.items()}),
    ):
        lines = "".join(f"- {name}: {reason}\n" for name, reason in said.items() if reason)
        text += f"\n{head}:\n\n{lines}" if lines else ""
    return text
