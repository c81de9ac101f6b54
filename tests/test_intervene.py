"""`kronsae intervene` on the embedded model, with an SAE that nobody trained."""

import json

import pytest
import torch

from kronsae import SAE, InputError, SAEConfig
from kronsae.data import LanguageModel
from kronsae.intervene import continuation, main
from kronsae.interventions.hooks import clamp, intervene, steer
from kronsae.properties.__main__ import main as properties

PROMPT = "def read(self, path):\n    return self."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = SAEConfig(d_model=256, heads=32, m=2, n=4, k=16)
    sae = SAE(config, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.W_enc.mul_(10)
    data = {"model": "embedded", "layer": 2, "context_length": 48, "heldout_tokens": 192}
    return str(sae.save(tmp_path_factory.mktemp("sae") / "it", {"config": {"data": data}}))


@pytest.fixture(scope="module")
def embedded():
    return LanguageModel.load("embedded")


def test_continuations(folder, embedded):
    from kronsae import load

    sae = load(folder)
    before, clean = continuation(embedded, PROMPT, 8)
    ids = torch.tensor([embedded.tokenizer(PROMPT)["input_ids"]])
    torch.testing.assert_close(clean, embedded.logits(ids)[0, -1].double())
    with intervene(embedded, sae, [clamp(5, 60.0)]):
        after, edited = continuation(embedded, PROMPT, 8)
        again, _ = continuation(embedded, PROMPT, 8)
    assert before != after == again and before
    assert not torch.allclose(clean, edited)
    with intervene(embedded, sae, [steer(5, 0.0)]):
        assert continuation(embedded, PROMPT, 8)[0] == before
    with pytest.raises(InputError, match="two tokens"):
        continuation(embedded, "def", 8)


def test_text_from_the_command_line(folder, capsys):
    flags = [folder, "--latent", "3", "9", "--prompt", PROMPT, "--new-tokens", "4"]
    assert main([*flags, "--set", "40"]) == 0
    printed = capsys.readouterr().out
    assert "latent 3, 9 set to 40 (error kept)" in printed
    assert printed.count("def read(self, path)") == 2 and "next token" in printed
    assert main([*flags, "--reconstruct"]) == 0
    assert "ablated (activations replaced" in capsys.readouterr().out
    assert main([*flags, "--add", "-30"]) == 0
    assert "steered by -30" in capsys.readouterr().out


def test_strengths_of_what_is_usual(folder, tmp_path, capsys):
    """--add 2x adds twice the largest value on the held-out text, and --out keeps it all."""
    out, flags = (
        tmp_path / "out",
        [folder, "--latent", "3", "--prompt", PROMPT, "--new-tokens", "3"],
    )
    assert main([*flags, "--add", "2x", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    document = json.loads((out / "intervention.json").read_text())
    [latent], usual = document["latents"], document["usual"]["3"]
    assert latent["value"] == 2 * usual["maximum"] > 0 and usual["tokens"] < usual["read"] <= 192
    assert f"latent 3 fires on {100 * usual['tokens'] / usual['read']:.3g} % of" in printed
    assert "= 2x its usual maximum (error kept)" in printed and f"In {out}" in printed
    assert [way["what"] for way in document["continuations"]] == ["before", "after"]
    assert main([*flags, "--set", "-1x"]) == 0
    assert "set to -" in capsys.readouterr().out


def test_what_is_usual_of_an_sae_whose_properties_are_kept(folder, tmp_path, monkeypatch):
    """Those of an SAE that is no run lie in runs/explored."""
    monkeypatch.chdir(tmp_path)
    assert properties([folder, "--tokens", "300"]) == 0
    flags = ["--latent", "3", "--prompt", PROMPT, "--new-tokens", "1", "--add", "1x", "--out", "o"]
    assert main([folder, *flags]) == 0
    usual = json.loads((tmp_path / "o" / "intervention.json").read_text())["usual"]
    assert usual["from"] == "its properties" and usual["3"]["read"] >= 300


def test_fluency_beside_the_mean_difference(folder, tmp_path, capsys):
    files = [tmp_path / "with.txt", tmp_path / "without.txt"]
    files[0].write_text("import os\nimport sys\n")
    files[1].write_text("def f(x):\n\n    return x\n")
    out = tmp_path / "out"
    flags = [folder, "--latent", "3", "--prompt", PROMPT, "--new-tokens", "3", "--samples", "2"]
    flags += ["--fluency", "2", "--out", str(out), "--mean-difference"]
    assert main([*flags, *map(str, files)]) == 0
    before, *ways = json.loads((out / "intervention.json").read_text())["continuations"]
    assert [way["what"] for way in ways] == ["after", "mean difference"]
    for way in ways:
        assert way["ratio"] == way["perplexity"] / before["perplexity"] <= 2
        assert way["length"] > 0 and len(way["texts"]) == 2
    printed = capsys.readouterr().out
    assert f"{ways[0]['perplexity']:.2f}" in printed and "distinct pairs" in printed


def test_ablation_of_a_latent_that_does_not_fire(folder, tmp_path, capsys):
    out = tmp_path / "out"
    latents = [str(latent) for latent in range(64)]
    flags = [folder, "--prompt", "import os", "--new-tokens", "1", "--latent", *latents]
    assert main([*flags, "--out", str(out)]) == 0
    document = json.loads((out / "intervention.json").read_text())
    silent = [each["latent"] for each in document["latents"] if not each["fires_on_prompt"]]
    assert 0 < len(silent) < 64
    printed = capsys.readouterr().out
    assert printed.count("does not fire on the prompt") == len(silent)
    assert f"latent {silent[0]} does not fire" in printed


def test_effects_from_the_command_line(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([folder, "--effects", "12", "--contexts-each", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    document = json.loads((out / "effects.json").read_text())
    assert len(document["latents"]) == 12
    assert -1 <= document["spearman"] <= 1 and f"Pearson {document['pearson']:.3f}" in printed
    assert document["unit"].startswith("nats") and document["seed"] == 0
    assert all(each["tokens"] > 0 for each in document["latents"])


def test_effects_on_a_logit(folder, tmp_path):
    out = tmp_path / "out"
    flags = [folder, "--effects", "500", "--prompt", PROMPT, "--target", "path"]
    assert main([*flags, "--out", str(out)]) == 0
    document = json.loads((out / "effects.json").read_text())
    assert document["of"] == "logit of 'path'" and document["unit"] == "logits"
    assert any(each["exact"] for each in document["latents"])


def test_and_test_from_the_command_line(folder, tmp_path, capsys):
    out = tmp_path / "effects"
    assert main([folder, "--effects", "3", "--contexts-each", "1", "--out", str(out)]) == 0
    latent = json.loads((out / "effects.json").read_text())["latents"][0]["latent"]
    capsys.readouterr()
    out = tmp_path / "and"
    assert main([folder, "--and-test", "--latent", str(latent), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    [found] = json.loads((out / "and-test.json").read_text())["latents"]
    assert [each["what"] for each in found["ablated"]] == ["base", "extension", "composition"]
    assert [each["latents"] for each in found["ablated"]] == [4, 2, 1]
    assert found["tokens"] > 0 and f"latent {latent} = head {latent // 8}" in printed
    assert max(map(len, printed.splitlines()[2:6])) <= 80


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "nothing to do"),
        (["--latent", "3"], "nothing to do"),
        (["--latent", "999", "--prompt", PROMPT], "expected 0 to 255"),
        (["--latent", "3", "--prompt", PROMPT, "--target", "x"], "--target has no effect"),
        (["--latent", "3", "--prompt", PROMPT, "--set", "1", "--add", "1"], "not allowed with"),
        (["--effects", "5", "--set", "1"], "no effect here"),
        (["--latent", "3", "--prompt", PROMPT, "--set", "1x2"], "multiple of the latent's"),
        (["--latent", "3", "--prompt", PROMPT, "--mean-difference"], "without --add or --fluency"),
        (["--latent", "3", "--prompt", PROMPT, "--fluency", "1"], "above 1, got 1"),
        (
            ["--latent", "3", "--prompt", PROMPT, "--add", "1", "--mean-difference", "a", "b"],
            "a cannot be read",
        ),
        (["--effects", "1"], "expected >= 2"),
        (["--effects", "5", "--prompt", "x"], "go together"),
        (["--effects", "5", "--prompt", PROMPT, "--target", "no one token"], "expected one token"),
        (["--and-test"], "needs --latent"),
        (["--latents", "3"], "did you mean --latent"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_what_cannot_work_is_said(folder, tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    assert main([folder, *flags]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and words in captured.err
    assert not list(tmp_path.iterdir())
