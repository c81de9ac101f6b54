"""Files of SAEDashboard: those of its runner for Neuronpedia, and its pages' data.

batch-N.json           dashboards of BATCH latents, as `neuronpedia-runner` writes them
skipped_indexes.json   latents that are not among them
sae_vis.json           the same for `SaeVisData.load_json`, which makes SAEDashboard's own pages

Facts: sae-dashboard 0.8.0, neuronpedia/neuronpedia_converter.py, sae_vis_data.py, components.py.
"""

import json
from pathlib import Path
from typing import Any, TextIO

from kronsae.export.dashboards import Dashboard, Group, Latent, Passage, Subject, number
from kronsae.registry import DASHBOARDS
from kronsae.system.files import replace_directory, write_file, write_text

BATCH = 128
"""Latents of a file, as `neuronpedia-runner` has them."""

TICKS = 5


@DASHBOARDS.register("sae_dashboard")
class SAEDashboard(Dashboard):
    library = "SAEDashboard"
    has_explanations = False
    how_to_load = (
        "from sae_dashboard.sae_vis_data import SaeVisConfig, SaeVisData; "
        'SaeVisData.load_json("{out}/sae_vis.json", SaeVisConfig(hook_point="", features=[]), '
        "model, None)"
    )

    @staticmethod
    def write(subject: Subject, folder: Path) -> Path:
        def write(part: Path) -> None:
            for count, batch in enumerate(subject.batches(BATCH)):
                write_text(part / f"batch-{count}.json", _json(_batch(subject, batch)))
            write_text(part / "skipped_indexes.json", _json(_skipped(subject)))
            write_file(part / "sae_vis.json", lambda beside: _write_vis(subject, beside))

        return replace_directory(folder / subject.member, write)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _about(subject: Subject) -> dict[str, Any]:
    return {
        "model_id": subject.model,
        "layer": subject.site.layer,
        "sae_set": subject.source_set,
        "sae_id_suffix": subject.names.suffix or None,
    }


def _skipped(subject: Subject) -> dict[str, Any]:
    wanted = subject.latents
    missing = set() if wanted is None else set(range(subject.opened.sae.dict_size)) - set(wanted)
    return {**_about(subject), "skipped_indexes": sorted(missing)}


def _batch(subject: Subject, latents: list[Latent]) -> dict[str, Any]:
    """`NeuronpediaDashboardBatch`."""
    return {**_about(subject), "features": [_feature(subject, latent) for latent in latents]}


def _feature(subject: Subject, latent: Latent) -> dict[str, Any]:
    """`NeuronpediaDashboardFeature`."""
    return {
        "feature_index": latent.id,
        **columns(subject, latent),
        "n_prompts_total": subject.stored.properties.contexts,
        "n_tokens_in_prompt": subject.context_length,
        "dataset": subject.stored.facts["text"]["dataset"],
        "activations": [
            {
                "bin_min": number(group.low),
                "bin_max": number(group.high),
                "bin_contains": -1 if group.share is None else number(group.share),
                "tokens": list(map(subject.text_of, passage.tokens)),
                "values": list(map(number, passage.values)),
                "qualifying_token_index": passage.chosen,
            }
            for group in latent.groups
            for passage in group.passages
        ],
        "vector": [],
    }


def columns(subject: Subject, latent: Latent) -> dict[str, Any]:
    """What the tables of SAEDashboard and of Neuronpedia have under the same names.

    Empty: correlations with neurons and latents, which are not measured, and what is of heads.
    """
    empty = ("correlated_neurons", "correlated_features")
    return {
        "neuron_alignment_indices": [index for index, *_ in latent.aligned],
        "neuron_alignment_values": [number(value) for _, value, _ in latent.aligned],
        "neuron_alignment_l1": [number(share) for *_, share in latent.aligned],
        **{f"{name}_{part}": [] for name in empty for part in ("indices", "pearson", "l1")},
        "neg_str": [subject.text_of(token) for token, _ in latent.lowered],
        "neg_values": [number(by) for _, by in latent.lowered],
        "pos_str": [subject.text_of(token) for token, _ in latent.raised],
        "pos_values": [number(by) for _, by in latent.raised],
        "frac_nonzero": latent.density,
        "freq_hist_data_bar_heights": latent.counts,
        "freq_hist_data_bar_values": [number(centre) for centre in latent.centres],
        "logits_hist_data_bar_heights": [],
        "logits_hist_data_bar_values": [],
        "decoder_weights_dist": [],
    }


def _write_vis(subject: Subject, path: Path) -> None:
    """`_SaeVisData`, a latent at a time."""
    with path.open("w", encoding="utf-8") as file:
        file.write('{"feature_data_dict": {')
        maxima, densities = _write_features(subject, file)
        statistics = {
            "max": maxima,
            "frac_nonzero": densities,
            "skew": [],
            "kurtosis": [],
            "quantile_data": [],
            "quantiles": [],
        }
        file.write('}, "feature_stats": ' + _json(statistics) + "}")


def _write_features(subject: Subject, file: TextIO) -> tuple[list[float], list[float]]:
    maxima: list[float] = []
    densities: list[float] = []
    for latent in subject:
        comma = ", " if maxima else ""
        file.write(f'{comma}"{latent.id}": {_json(_feature_data(latent))}')
        maxima.append(number(latent.maximum))
        densities.append(latent.density)
    return maxima, densities


def _feature_data(latent: Latent) -> dict[str, Any]:
    """`FeatureData`."""
    end = latent.centres[-1] if latent.centres else 0.0
    return {
        "feature_tables_data": {
            "neuron_alignment_indices": [index for index, *_ in latent.aligned],
            "neuron_alignment_values": [number(value) for _, value, _ in latent.aligned],
            "neuron_alignment_l1": [number(share) for *_, share in latent.aligned],
        },
        "acts_histogram_data": {
            "bar_heights": latent.counts,
            "bar_values": [number(centre) for centre in latent.centres],
            "tick_vals": [number(end * tick / TICKS) for tick in range(TICKS + 1)],
            "title": f"ACTIVATIONS<br>DENSITY = {latent.density:.3%}",
        },
        "logits_table_data": {
            "bottom_token_ids": [token for token, _ in latent.lowered],
            "bottom_logits": [number(by) for _, by in latent.lowered],
            "top_token_ids": [token for token, _ in latent.raised],
            "top_logits": [number(by) for _, by in latent.raised],
        },
        "logits_histogram_data": {},
        "sequence_data": {"seq_group_data": [_group(group) for group in latent.groups]},
        "prompt_data": {},
        "dfa_data": {},
        "decoder_weights_data": None,
    }


def _group(group: Group) -> dict[str, Any]:
    """`SequenceGroupData`."""
    if group.share is None:
        title = f"TOP ACTIVATIONS<br>MAX = {group.high:.3f}"
    else:
        title = f"INTERVAL {group.low:.3f} - {group.high:.3f}<br>CONTAINS {group.share:.3%}"
    return {"title": title, "seq_data": [_sequence(passage) for passage in group.passages]}


def _sequence(passage: Passage) -> dict[str, Any]:
    """`SequenceData`, without effects on the loss and on logits at each token."""
    return {
        "original_index": 0,
        "qualifying_token_index": passage.chosen,
        "token_ids": passage.tokens,
        "feat_acts": list(map(number, passage.values)),
        "token_logits": [0] * len(passage.tokens),
    }
