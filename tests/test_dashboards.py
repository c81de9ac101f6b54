"""What is exported for Neuronpedia and SAEDashboard, held against their schemas field by field.

Names and types are of neuronpedia's apps/webapp/prisma/schema.prisma, and of the dataclasses of
sae-dashboard 0.8.0. Where that library is installed, its own classes read the files, too.
"""

import gzip
import json

import numpy as np
import pytest
from explorer_pages import EVIL, EvilTokenizer, make_page
from test_layout import ROOT

from kronsae import InputError
from kronsae.config import DataConfig
from kronsae.export.__main__ import main
from kronsae.export.dashboards import Explained, Names, Subject, read_explanations
from kronsae.export.neuronpedia import Neuronpedia
from kronsae.export.sae_dashboard import SAEDashboard
from kronsae.properties import load_properties
from kronsae.properties.labels import Label, write_labels
from kronsae.properties.run import Opened
from kronsae.system.files import sha256
from kronsae.train import main as train

STRING, FLOAT, INT, BOOL = "String", "Float", "Int", "Boolean"
STRINGS, FLOATS, INTS = "String[]", "Float[]", "Int[]"

TABLES = {
    "model": {
        **dict.fromkeys(("id", "displayName", "displayNameShort", "creatorId", "owner"), STRING),
        **dict.fromkeys(("layers", "neuronsPerLayer", "dimension"), INT),
        "visibility": STRING,
    },
    "release": {
        **dict.fromkeys(("name", "description", "descriptionShort", "creatorName"), STRING),
        **dict.fromkeys(("creatorNameShort", "creatorId", "visibility"), STRING),
        "urls": STRINGS,
    },
    "sourceset": {
        **dict.fromkeys(("modelId", "name", "description", "creatorName", "creatorId"), STRING),
        **dict.fromkeys(("releaseName", "visibility"), STRING),
        **dict.fromkeys(("hasDashboards", "allowInferenceSearch"), BOOL),
        "urls": STRINGS,
    },
    "source": {
        **dict.fromkeys(("id", "modelId", "setName", "creatorId", "visibility"), STRING),
        **dict.fromkeys(("dataset", "notes"), STRING),
        **dict.fromkeys(("hasDashboards", "inferenceEnabled"), BOOL),
        **dict.fromkeys(("num_prompts", "num_tokens_in_prompt"), INT),
    },
    "features": {
        **dict.fromkeys(("modelId", "layer", "index", "creatorId", "sourceSetName"), STRING),
        **dict.fromkeys(("maxActApprox", "frac_nonzero"), FLOAT),
        **dict.fromkeys(("neg_str", "pos_str"), STRINGS),
        **dict.fromkeys(("neg_values", "pos_values", "vector", "topkCosSimValues"), FLOATS),
        **dict.fromkeys(("neuron_alignment_values", "neuron_alignment_l1"), FLOATS),
        **dict.fromkeys(("correlated_neurons_pearson", "correlated_neurons_l1"), FLOATS),
        **dict.fromkeys(("correlated_features_pearson", "correlated_features_l1"), FLOATS),
        **dict.fromkeys(("freq_hist_data_bar_heights", "freq_hist_data_bar_values"), FLOATS),
        **dict.fromkeys(("logits_hist_data_bar_heights", "logits_hist_data_bar_values"), FLOATS),
        "decoder_weights_dist": FLOATS,
        **dict.fromkeys(("neuron_alignment_indices", "topkCosSimIndices"), INTS),
        **dict.fromkeys(("correlated_neurons_indices", "correlated_features_indices"), INTS),
        "hookName": STRING,
        "hasVector": BOOL,
    },
    "activations": {
        **dict.fromkeys(("id", "modelId", "layer", "index", "creatorId", "dataSource"), STRING),
        "tokens": STRINGS,
        **dict.fromkeys(("values", "dfaValues", "lossValues"), FLOATS),
        **dict.fromkeys(("maxValue", "minValue", "binMin", "binMax", "binContains"), FLOAT),
        **dict.fromkeys(("maxValueTokenIndex", "qualifyingTokenIndex"), INT),
    },
    "explanations": {
        **dict.fromkeys(("id", "modelId", "layer", "index", "authorId", "description"), STRING),
        **dict.fromkeys(("typeName", "explanationModelName", "notes"), STRING),
    },
}
"""Columns of Neuronpedia's tables that are written, with their types."""

NULL = {"binContains", "typeName", "explanationModelName"}
"""Columns that may be null."""

KINDS = {STRING: str, FLOAT: (int, float), INT: int, BOOL: bool}

SHARED = set(TABLES["features"]) - {
    *("modelId", "layer", "index", "creatorId", "sourceSetName", "maxActApprox", "hookName"),
    *("topkCosSimIndices", "topkCosSimValues", "hasVector"),
}
FEATURE = SHARED | {"feature_index", "n_prompts_total", "n_tokens_in_prompt", "dataset"}
FEATURE |= {"activations"}
"""Arguments of `NeuronpediaDashboardFeature`."""

ACTIVATION = {"bin_min", "bin_max", "bin_contains", "tokens", "values", "qualifying_token_index"}


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    made = make_page(tmp_path_factory.mktemp("dashboards"))
    made.sae.metadata["data"] = {"name": "embedded", "layer": 2, "hookpoint": None}
    data = DataConfig(layer=2, context_length=40)
    opened = Opened(made.sae, data, made.stored, EvilTokenizer())
    return Subject(
        opened, Names(), None, {7: Explained(EVIL[1], "someone/model", {"fuzzing": 0.8})}
    )


@pytest.fixture(scope="module")
def neuronpedia(subject, tmp_path_factory):
    return Neuronpedia.write(subject, tmp_path_factory.mktemp("neuronpedia"))


def rows(folder, table):
    """The rows of a table, as Neuronpedia's importer splits them."""
    paths = sorted((folder / table).glob("batch-*.jsonl.gz"))
    texts = [gzip.decompress(path.read_bytes()).decode() for path in paths]
    if (single := folder / f"{table}.jsonl").is_file():
        texts = [single.read_text(encoding="utf-8")]
    return [json.loads(line) for text in texts for line in text.strip().split("\n")]


@pytest.mark.parametrize("table", TABLES)
def test_rows_are_those_of_neuronpedias_tables(table, neuronpedia):
    found = rows(neuronpedia, table)
    assert found
    for row in found:
        assert row.keys() == TABLES[table].keys()
        for name, value in row.items():
            kind = TABLES[table][name]
            values = value if kind.endswith("[]") else [value]
            kinds = KINDS[kind.removesuffix("[]")]
            assert isinstance(values, list)
            assert all(
                isinstance(each, kinds) or (each is None and name in NULL) for each in values
            )


def test_features_are_the_properties(subject, neuronpedia):
    properties = subject.stored.properties
    features = rows(neuronpedia, "features")
    assert [int(row["index"]) for row in features] == list(range(72))
    assert neuronpedia.parts[-2:] == ("embedded", "2-kronsae-res-72")
    for row in features:
        count = properties.post.count[int(row["index"])]
        assert row["frac_nonzero"] == count / properties.tokens
        assert sum(row["freq_hist_data_bar_heights"]) == count
        assert len(row["pos_str"]) == len(row["pos_values"]) == len(row["neg_values"]) == 5
        assert max(row["pos_values"]) == row["pos_values"][0] > 0 > row["neg_values"][0]
        assert row["layer"] == "2-kronsae-res-72" and row["hookName"] == "blocks.2.hook_resid_post"
        assert len(row["topkCosSimIndices"]) == 4


def test_activations_are_the_examples(subject, neuronpedia):
    post = subject.stored.properties.post
    found = rows(neuronpedia, "activations")
    assert len({row["id"] for row in found}) == len(found)
    strongest = [row for row in found if row["binMin"] == -1]
    assert len(strongest) == (post.top.places >= 0).sum()
    sampled = [row for row in found if row["binMin"] != -1]
    assert 0 < len(sampled) <= (post.sample.places >= 0).sum()
    for row in found:
        assert len(row["tokens"]) == len(row["values"])
        chosen = row["values"][row["qualifyingTokenIndex"]]
        assert row["binMin"] <= chosen <= row["binMax"] * (1 + 1e-4)
        assert row["values"][row["maxValueTokenIndex"]] == row["maxValue"] == max(row["values"])
    for index in np.flatnonzero(post.count)[:9]:
        shares = {
            row["binMax"]: row["binContains"] for row in sampled if row["index"] == str(index)
        }
        density = post.count[index] / subject.stored.properties.tokens
        assert 0 < sum(shares.values()) <= density * (1 + 1e-4)


def test_explanations_go_along(neuronpedia):
    [row] = rows(neuronpedia, "explanations")
    assert (row["index"], row["description"]) == ("7", EVIL[1])
    assert row["notes"] == "by someone/model; fuzzing 0.80"


def test_files_of_sae_dashboard(subject, tmp_path):
    folder = SAEDashboard.write(subject, tmp_path / "out")
    batch = json.loads((folder / "batch-0.json").read_text())
    assert batch.keys() == {"model_id", "layer", "sae_set", "sae_id_suffix", "features"}
    assert [feature["feature_index"] for feature in batch["features"]] == list(range(72))
    for feature in batch["features"]:
        assert feature.keys() == FEATURE
        assert all(activation.keys() == ACTIVATION for activation in feature["activations"])
    vis = json.loads((folder / "sae_vis.json").read_text())
    assert vis.keys() == {"feature_data_dict", "feature_stats"}
    assert len(vis["feature_data_dict"]) == len(vis["feature_stats"]["max"]) == 72
    busiest = vis["feature_data_dict"][str(subject.stored.properties.post.count.argmax())]
    groups = busiest["sequence_data"]["seq_group_data"]
    assert groups[0]["title"].startswith("TOP ACTIVATIONS<br>MAX = ")
    assert all("<br>CONTAINS " in group["title"] for group in groups[1:]) and len(groups) > 1
    read = pytest.importorskip("sae_dashboard.neuronpedia.neuronpedia_dashboard")
    assert read.NeuronpediaDashboardBatch(**batch).to_dict() == batch


def test_sae_without_a_site_is_refused(subject, tmp_path):
    elsewhere = Subject(subject.opened._replace(sae=make_page(tmp_path).sae), Names(), None, {})
    with pytest.raises(InputError, match="is no site of a block"):
        Neuronpedia.write(elsewhere, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_explanations_that_cannot_be_read(tmp_path):
    (tmp_path / "interpretation.json").write_text(
        '{"explainer": "x", "latents": [{"latent": "a"}]}'
    )
    with pytest.raises(InputError, match="expected what kronsae interpret wrote"):
        read_explanations(tmp_path)


def test_command(tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    flags = "--tokens 1024 --batch-size 512 --heldout-tokens 256 --buffer-tokens 1024 --k 8"
    assert train([*flags.split(), "--dict-size", "128", "--out", str(run)]) == 0
    (run / "explanations").mkdir()
    explained = {"latent": 5, "explanation": "words", "detection": {"score": 0.5}, "fuzzing": None}
    document = {"explainer": "model", "latents": [explained, explained | {"latent": 7}]}
    (run / "explanations" / "interpretation.json").write_text(json.dumps(document))

    labels = {5: Label("other words", "another", 0.25), 7: Label("mine"), 8: Label("also mine")}
    write_labels(labels, run / "labels.json", sha256(run / "sae" / "sae.safetensors"))

    def export(library, *more):
        return main([str(run), "--to", library, "--out", str(out / library), *more])

    assert export("neuronpedia", "--tokens", "1000", "--features", "5", "7") == 0
    assert load_properties(run / "properties").properties.tokens >= 1000  # it was measured
    folder = out / "neuronpedia" / "embedded" / "2-kronsae-res-128"
    assert (
        f"Wrote {folder}: 2 latents for Neuronpedia, 2 of them explained (1 by a person)"
        in capsys.readouterr().out
    )
    assert [row["index"] for row in rows(folder, "features")] == ["5", "7"]
    assert rows(folder, "source")[0]["num_tokens_in_prompt"] > 0
    explanations = [(r["description"], r["notes"]) for r in rows(folder, "explanations")]
    assert explanations == [("words", "by model; detection 0.50"), ("mine", "by a person")]

    assert export("sae_dashboard", "--features", "5") == 0
    assert "explained" not in capsys.readouterr().out
    assert export("sae_dashboard", "--explanations", str(run / "explanations")) == 2
    assert "sae_dashboard holds no explanations: leave --explan" in capsys.readouterr().err
    assert export("sae_dashboard", "--features", "128") == 2
    assert "latent: expected 0 to 127, got 128" in capsys.readouterr().err
    assert export("sae_lens", "--features", "5") == 2
    assert "--features has no effect with --to sae_lens" in capsys.readouterr().err
    assert main([str(ROOT), "--to", "neuronpedia", "--out", str(out)]) == 2
    assert "is no run folder" in capsys.readouterr().err
