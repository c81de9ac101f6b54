"""The benchmark of overlap: it runs, and its shares are those of its own times."""

import json

import pytest

from benchmarks import overlap


def test_it_runs(tmp_path, capsys):
    file = tmp_path / "overlap.json"
    overlap.main(["--device", "cpu", "--smallest", "--rounds", "1", "--json", str(file)])
    found = json.loads(file.read_text())
    medians = found["medians"]
    assert {"language model", "autoencoder", "in turns", "beside"} <= medians.keys()
    a, b = (medians[name]["seconds"] for name in ("language model", "autoencoder"))
    assert found["bounds"]["in turns"] == pytest.approx(a / (a + b))
    for name, share in found["of_the_model_alone"].items():
        assert share == pytest.approx(a / medians[name]["seconds"])
        assert 0 <= medians[name]["wait_share"] <= 1
    assert "model_wait_share" in medians["beside"] and "model_wait_share" not in medians["in turns"]
    assert "of the language model" in capsys.readouterr().out


def test_random_weights_in_a_known_shape(monkeypatch):
    """Read after a middle block; its tokens are those of the embedded model's tokenizer."""
    import torch

    for name, shape in overlap.MODELS.items():
        smaller = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
        smaller |= {"intermediate_size": 16, "vocab_size": 9000}
        monkeypatch.setitem(overlap.MODELS, name, shape | smaller)
        model = overlap.open_model(name, None, torch.device("cpu"))
        assert model.hookpoint.endswith(".1")
        assert model.d_model == 32
        assert len(model.tokenizer) <= 9000
