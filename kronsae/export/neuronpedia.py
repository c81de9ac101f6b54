"""Neuronpedia's import files: MODEL/SOURCE/, as its data sets have them.

model.jsonl release.jsonl sourceset.jsonl source.jsonl   a line each
features/batch-N.jsonl.gz                                rows of the table Neuron
activations/batch-N.jsonl.gz                             of Activation
explanations/batch-N.jsonl.gz                            of Explanation

Facts: hijohnnylin/neuronpedia, apps/webapp/prisma/schema.prisma (names, types and defaults),
apps/webapp/app/api/admin/import/route.ts and lib/db/import.ts (which columns are read: those of a
file's first row), utils/neuronpedia-utils/neuronpedia_utils/export-data.py (files, batches).
"""

import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kronsae.data.loading import load_config, quiet
from kronsae.export.dashboards import Dashboard, Latent, Subject, identity, number
from kronsae.export.sae_dashboard import columns
from kronsae.registry import DASHBOARDS
from kronsae.system.files import replace_directory, write_file

BATCH = 1024
"""Latents of a file, as Neuronpedia exports them."""

CREATOR = "clkht01d40000jv08hvalcvly"
"""Id of the user that a new Neuronpedia has as the creator of what is imported."""


@DASHBOARDS.register("neuronpedia")
class Neuronpedia(Dashboard):
    library = "Neuronpedia"
    how_to_load = (
        "put what is in {out} where its DATASET_BASE_PATH points to, and import model and source "
        "in its admin panel"
    )

    @staticmethod
    def write(subject: Subject, folder: Path) -> Path:
        def write(part: Path) -> None:
            for name, row in _about(subject).items():
                _write(part / f"{name}.jsonl", [row])
            for table in ("features", "activations", "explanations"):
                (part / table).mkdir()
            for count, batch in enumerate(subject.batches(BATCH)):
                for table, rows in (
                    ("features", (_neuron(subject, latent) for latent in batch)),
                    ("activations", _rows(subject, batch, _activations)),
                    ("explanations", _rows(subject, batch, _explanations)),
                ):
                    _write(part / table / f"batch-{count}.jsonl.gz", rows)

        return replace_directory(folder / subject.model / subject.source, write)


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as lines; nothing if there are none. A file .gz has the same bytes each time."""
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
    if lines:
        data = "".join(lines).encode()
        data = gzip.compress(data, 5, mtime=0) if path.suffix == ".gz" else data
        write_file(path, lambda beside: beside.write_bytes(data))


def _rows(subject: Subject, batch: list[Latent], of_latent: Any) -> Iterator[dict[str, Any]]:
    for latent in batch:
        yield from of_latent(subject, latent)


def _about(subject: Subject) -> dict[str, dict[str, Any]]:
    """Rows of the tables Model, SourceRelease, SourceSet and Source, by the names of their files.

    The importer makes those that do not exist yet.
    """
    names, data, properties = subject.names, subject.opened.data, subject.stored.properties
    with quiet():
        config = load_config(
            data.model, data.revision, data.trust_remote_code, data.model_kwargs
        ).get_text_config()
    public = {"creatorId": CREATOR, "visibility": "PUBLIC"}
    return {
        "model": {
            "id": subject.model,
            "displayName": subject.model,
            "displayNameShort": subject.model,
            "owner": data.model.rpartition("/")[0] or names.creator,
            "layers": config.num_hidden_layers,
            "neuronsPerLayer": getattr(config, "intermediate_size", None) or 0,
            "dimension": config.hidden_size,
            **public,
        },
        "release": {
            "name": subject.source_set,
            "description": f"SAEs of {subject.model} by kronsae",
            "descriptionShort": subject.source_set,
            "creatorName": names.creator,
            "creatorNameShort": names.creator,
            "urls": [],
            **public,
        },
        "sourceset": {
            "modelId": subject.model,
            "name": subject.source_set,
            "description": subject.title,
            "creatorName": names.creator,
            "releaseName": subject.source_set,
            "urls": [],
            "hasDashboards": True,
            "allowInferenceSearch": False,
            **public,
        },
        "source": {
            "id": subject.source,
            "modelId": subject.model,
            "setName": subject.source_set,
            "hasDashboards": True,
            "inferenceEnabled": False,
            "dataset": subject.stored.facts["text"]["dataset"],
            "num_prompts": properties.contexts,
            "num_tokens_in_prompt": subject.context_length,
            "notes": f"{subject.title}; {properties.tokens:,} tokens",
            **public,
        },
    }


def _key(subject: Subject, latent: Latent) -> dict[str, str]:
    return {"modelId": subject.model, "layer": subject.source, "index": str(latent.id)}


def _neuron(subject: Subject, latent: Latent) -> dict[str, Any]:
    return {
        **_key(subject, latent),
        "creatorId": CREATOR,
        "sourceSetName": subject.source_set,
        "maxActApprox": number(latent.maximum),
        **columns(subject, latent),
        "topkCosSimIndices": [index for index, _ in latent.nearest],
        "topkCosSimValues": [number(cosine) for _, cosine in latent.nearest],
        "hookName": subject.site.lens,
        "hasVector": False,
        "vector": [],
    }


def _activations(subject: Subject, latent: Latent) -> Iterator[dict[str, Any]]:
    """Rows of its examples. binMin is -1 and binContains null for the strongest ones."""
    for group in latent.groups:
        for place, passage in enumerate(group.passages):
            largest = max(passage.values)
            yield {
                "id": identity(subject.model, subject.source, latent.id, group.low, place),
                **_key(subject, latent),
                "creatorId": CREATOR,
                "dataSource": subject.stored.facts["text"]["dataset"],
                "tokens": list(map(subject.text_of, passage.tokens)),
                "values": list(map(number, passage.values)),
                "maxValue": number(largest),
                "maxValueTokenIndex": passage.values.index(largest),
                "minValue": number(min(passage.values)),
                "binMin": number(group.low),
                "binMax": number(group.high),
                "binContains": None if group.share is None else number(group.share),
                "qualifyingTokenIndex": passage.chosen,
                "dfaValues": [],
                "lossValues": [],
            }


def _explanations(subject: Subject, latent: Latent) -> Iterator[dict[str, Any]]:
    """The row of its explanation. Type and model are null: Neuronpedia has lists of those it knows.

    The model, or that it is a person's label, and the scores are in the notes.
    """
    if latent.explained is None:
        return
    text, model, scores = latent.explained
    by = f"by {model or 'a person'}"
    yield {
        "id": identity(subject.model, subject.source, latent.id, "explanation"),
        **_key(subject, latent),
        "authorId": CREATOR,
        "description": text,
        "typeName": None,
        "explanationModelName": None,
        "notes": "; ".join([by, *(f"{k} {v:.2f}" for k, v in scores.items())]),
    }
