"""A folder for a static host: the page of each member of a sweep or suite, and an index.

index.html    the members by hookpoint, with their figures
NAME.html     the page of a member
"""

from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from kronsae.config import DataConfig, kind_of, with_defaults
from kronsae.errors import InputError
from kronsae.explore.charts import figure_text
from kronsae.explore.write import write_explorer
from kronsae.metrics.figures import MEANING
from kronsae.model.origin import Origin
from kronsae.properties.labels import labels_beside
from kronsae.properties.run import Opened, open_properties, open_run, say
from kronsae.runs.folder import saved_members
from kronsae.runs.sweep import hookpoint_name
from kronsae.system.documents import part_of
from kronsae.system.files import check_writable, write_text
from kronsae.system.templates import render

INDEX = "index.html"

FIGURES = ("explained_variance", "ce_recovered", "l0", "dead_share")
"""Figures of held-out text in the index, of those that the members have."""

_TEMPLATE = Path(__file__).parent / "page" / "site.html.j2"


class Member(NamedTuple):
    """A line of the index."""

    name: str
    hookpoint: str
    layer: int
    """-1 if it is not known."""
    kind: str
    latents: int
    active: str
    fire: int
    """Latents that fire on the text of its page."""
    figures: dict[str, Any]


def write_site(
    sweep: Path, settings: dict[str, Any], text: dict[str, Any], device: str, out: Path
) -> Path:
    """Write the folder `out`; returns its index. The arguments are those of the command line.

    The properties of a member are measured first if they are missing. Raises InputError if that,
    or writing, cannot be done.
    """
    check_writable(out)
    index, runs = saved_members(sweep)
    if INDEX in (f"{name}.html" for name in runs):
        raise InputError(f"{sweep}: a member is named index, as the page that lists them")
    out.mkdir(parents=True, exist_ok=True)
    members, suite = [], sweep.resolve().name
    for name, run in runs.items():
        opened = open_properties(open_run(run, text, device), settings)
        page = out / f"{name}.html"
        digest = opened.stored.facts["sae_sha256"]
        labels = labels_beside(run, opened.sae.dict_size, digest)
        about = run, opened.sae, opened.stored, opened.tokenizer
        write_explorer(*about, page, labels=labels, suite=suite)
        say(f"{page} ({page.stat().st_size / 2**20:.1f} MiB)")
        members.append(_member(name, index["members"][name], opened))
    write_text(out / INDEX, _index(suite, members, opened))
    return out / INDEX


def _member(name: str, entry: dict[str, Any], opened: Opened) -> Member:
    config = opened.sae.config
    data = with_defaults(DataConfig, part_of(entry, "config", "data"))
    site = Origin.of(opened.sae.metadata).site
    return Member(
        name,
        hookpoint_name(data),
        -1 if site is None else site.layer,
        kind_of(vars(config)),
        config.dict_size,
        opened.sae.selection.describe(config),
        opened.stored.facts["summary"]["groups"]["latent"]["fire"],
        entry["metrics"],
    )


def _index(name: str, members: list[Member], last: Opened) -> str:
    """The page that lists the members, those at one hookpoint together."""
    keys = [key for key in FIGURES if any(key in member.figures for member in members)]
    ordered = sorted(members, key=lambda member: (member.layer, member.hookpoint))  # stable
    grouped = groupby(ordered, key=lambda member: member.hookpoint)
    return render(
        _TEMPLATE,
        name=name,
        model=last.data.model,
        dataset=last.stored.facts["text"]["dataset"],
        tokens=last.stored.properties.tokens,
        count=len(members),
        groups=[(hookpoint, list(of)) for hookpoint, of in grouped],
        figures=[(key, *MEANING[key]) for key in keys],
        text=figure_text,
        colours=0,
    )
