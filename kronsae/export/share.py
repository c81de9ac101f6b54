"""Export of what is known of a run's latents, for another library to show."""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import kronsae.export.neuronpedia
import kronsae.export.sae_dashboard  # noqa: F401  registers, as the line above
from kronsae.config import DataConfig, with_defaults
from kronsae.errors import InputError
from kronsae.export.dashboards import (
    Explained,
    Names,
    Subject,
    one_name,
    read_explanations,
    with_labels,
)
from kronsae.properties.labels import labels_beside
from kronsae.properties.run import is_run, open_properties, open_run
from kronsae.registry import DASHBOARDS
from kronsae.runs.folder import saved_members
from kronsae.runs.sweep import hookpoint_name
from kronsae.system.documents import part_of

EXPLANATIONS = "explanations"
"""Folder of a run in which explanations are looked for."""


def share(request: argparse.Namespace, is_sweep: bool) -> None:
    """Write what --to shows of a run, or of each member of a sweep. Raises InputError."""
    dashboard, path = DASHBOARDS[request.to], Path(request.source)
    if not is_sweep and not is_run(path):
        raise InputError(
            f"{path} is no run folder: --to {request.to} writes what was measured on a run's text"
        )
    members = _members(path, request.members) if is_sweep else {"": (path, "")}
    if request.explanations is not None and not dashboard.has_explanations:
        raise InputError(f"--to {request.to} holds no explanations: leave --explanations out")
    if request.explanations is not None and len(members) > 1:
        raise InputError("--explanations are of one SAE: choose it by --members")
    given = {} if request.tokens is None else {"tokens": request.tokens}
    trusted = {"trust_remote_code": True} if request.trust_remote_code else {}
    for name, (run, suffix) in members.items():
        source = open_run(run, trusted, "cpu")
        explained = {}
        if dashboard.has_explanations:
            labels = labels_beside(run, source.sae.dict_size, source.digest)
            explained = with_labels(_explanations(run, request.explanations), labels)
        source.sae.check_latents([*explained, *(request.features or ())])
        opened = open_properties(source, given)
        names = Names(request.model_id, request.source_set, request.creator or "kronsae", suffix)
        subject = Subject(opened, names, request.features, explained, name)
        folder = dashboard.write(subject, request.out)
        count = len(request.features or range(opened.sae.dict_size))
        told = _told([explained[f] for f in request.features or explained if f in explained])
        print(f"Wrote {folder}: {count:,} latents for {dashboard.library}{told}")
    print("Load it with:", dashboard.how_to_load.format(out=request.out))


def _members(sweep: Path, wanted: list[str] | None) -> dict[str, tuple[Path, str]]:
    """Runs of a sweep by name, with what tells each from others at its hookpoint ("": nothing)."""
    index, runs = saved_members(sweep, wanted)
    places = {
        name: hookpoint_name(with_defaults(DataConfig, part_of(entry, "config", "data")))
        for name, entry in index["members"].items()
    }
    at = Counter(places.values())
    return {
        name: (run, one_name(name) if at[places[name]] > 1 else "") for name, run in runs.items()
    }


def _told(explained: Sequence[Explained]) -> str:
    """How many latents are explained, and by whom."""
    by_person = sum(not each.model for each in explained)
    people = f" ({by_person:,} by a person)" if by_person else ""
    return f", {len(explained):,} of them explained{people}" if explained else ""


def _explanations(run: Path, given: Path | None) -> dict[int, Explained]:
    folder = run / EXPLANATIONS
    if given is None and not folder.is_dir():
        return {}
    return read_explanations(given or folder)
