"""Labels of latents: what is read, kept beside a run, and refused."""

import json

import pytest

from kronsae.errors import InputError
from kronsae.explore.__main__ import _labels
from kronsae.properties.labels import FILE, Label, read_labels, write_labels

LABELS = {3: Label("a word"), 10: Label("its end", "a model", 0.75)}


def explanations(folder, **latents):
    folder.mkdir()
    entries = [
        {"latent": int(name[1:]), "explanation": text, "detection": {"score": 0.5}}
        for name, text in latents.items()
    ]
    document = {"format": "kronsae-interpretation", "explainer": "m", "latents": entries}
    (folder / "interpretation.json").write_text(json.dumps(document))
    return folder


def test_what_is_written_is_read(tmp_path):
    write_labels(LABELS, tmp_path / FILE, "abc")
    assert read_labels(tmp_path / FILE, 11, "abc") == read_labels(tmp_path, 11, "abc") == LABELS
    by_hand = {"format": "kronsae-labels", "labels": {"3": "mine"}}
    (tmp_path / FILE).write_text(json.dumps(by_hand))
    assert read_labels(tmp_path, 11, "abc") == {3: Label("mine")}


def test_explanations_become_labels_and_none_of_a_person_is_lost(tmp_path):
    said = explanations(tmp_path / "said", l3="other", l10="newer", l5="new", l6=None)
    write_labels(LABELS, tmp_path / FILE, "abc")
    found = _labels([said], tmp_path, 11, "abc")
    assert found == {
        3: LABELS[3],
        5: Label("new", "m", 0.5),
        10: Label("newer", "m", 0.5),
    }
    assert read_labels(tmp_path / FILE, 11, "abc") == found


def test_says_what_is_wrong(tmp_path):
    write_labels(LABELS, tmp_path / FILE, "abc")
    with pytest.raises(InputError, match="labels of another SAE"):
        read_labels(tmp_path, 11, "def")
    with pytest.raises(InputError, match="expected latents 0 to 9, got 10"):
        read_labels(tmp_path, 10, "abc")
    with pytest.raises(InputError, match="cannot be read.*expected labels.json, or the --out"):
        read_labels(tmp_path / "nowhere", 10, "abc")
    for document, reason in (
        ([], "expected format 'kronsae-labels'"),
        ({"format": "kronsae-labels", "labels": {"x": {"text": "a"}}}, "numbers of latents"),
        ({"format": "kronsae-labels", "labels": {"1": {}}}, "'text' is missing"),
        ({"format": "kronsae-labels", "labels": {"1": 3}}, "expected an object"),
        ({"format": "kronsae-labels", "labels": {"1": {"text": "a", "detection": 2}}}, "0 to 1"),
        ({"format": "kronsae-interpretation", "explainer": "m", "latents": [{}]}, "is missing"),
    ):
        (tmp_path / FILE).write_text(json.dumps(document))
        with pytest.raises(InputError, match=reason):
            read_labels(tmp_path, 10, "abc")
