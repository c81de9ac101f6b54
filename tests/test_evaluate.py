"""`kronsae evaluate`: each figure against brute force, and its files."""

import json
import re
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from tiny_models import BLOCKS, CAUSAL, POSITIONS, WIDTH, WORDS, save_model

from kronsae import SAE, InputError, SAEConfig, load
from kronsae.data import LanguageModel
from kronsae.errors import Notice
from kronsae.evaluate import judge
from kronsae.evaluate.__main__ import main
from kronsae.evaluate.show import console_table, draw
from kronsae.metrics.figures import MEANING, cross_entropy_recovered
from kronsae.metrics.heldout import Heldout, HeldoutText, evaluate
from kronsae.metrics.target_model import data_of, load_sae, load_saes, open_heldout
from kronsae.train import main as train

SMALL = [
    *("--tokens", "3000", "--batch-size", "256", "--k", "8", "--context-length", "64"),
    *("--buffer-tokens", "2048", "--heldout-tokens", "1024"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {family: save_model(root / family, family) for family in (*CAUSAL, "bert")}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Two runs on the embedded model."""
    out = tmp_path_factory.mktemp("runs") / "sweep"
    assert train([*SMALL, "--dict-size", "256", "--m", "2", "4", "--out", str(out)]) == 0
    return out


def held_out(model: LanguageModel, contexts: int = 5, length: int = 12, batch: int = 2):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(6, 90, (contexts, length), generator=generator)
    mask = torch.rand(contexts, length, generator=generator) > 0.2
    mask[:, 0] = False
    return HeldoutText(model, ids, mask, batch, {})


def identity(d: int) -> SAE:
    """x = Σ max(x_i, 0) e_i + Σ max(-x_i, 0) (-e_i), exactly."""
    sae = SAE(SAEConfig(d_model=d, encoder="dense", dict_size=2 * d, k=2 * d)).eval()
    with torch.no_grad():
        both = torch.cat([torch.eye(d), -torch.eye(d)])
        sae.W_enc.copy_(both)
        sae.W_dec.copy_(both)
    return sae


def zero(d: int) -> SAE:
    sae = SAE(SAEConfig(d_model=d, encoder="dense", dict_size=2 * d, k=2)).eval()
    with torch.no_grad():
        sae.W_dec.zero_()
    return sae


def random(d: int, d_target: int = 0) -> SAE:
    config = SAEConfig(d_model=d, d_target=d_target, heads=24, m=2, n=3, k=6)
    return SAE(config, generator=torch.Generator().manual_seed(0)).eval()


def test_identity_and_zero_on_the_embedded_model(monkeypatch):
    """Cross-entropy recovered is 1 for an SAE that changes nothing, and 0 for one that gives 0."""
    model = LanguageModel.load("embedded")
    text = "def add(self, other):\n    if other is None:\n        return self\n" * 3
    ids = torch.tensor(model.tokenizer(text)["input_ids"])[:48].view(2, 24)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    saes = {"same": identity(256), "zero": zero(256), "other": random(256)}
    held_out = HeldoutText(model, ids, mask, 1, {})
    found = judge(saes, held_out)
    monkeypatch.setattr(sys.modules["kronsae.evaluate.judge"], "STATES_AT_ONCE", 2)
    assert {name: each.metrics for name, each in judge(saes, held_out).items()} == {
        name: each.metrics for name, each in found.items()
    }
    same, zeroed, other = (found[name].metrics for name in saes)
    assert same["ce_recovered"] == same["ce_recovered_mean"] == same["explained_variance"] == 1
    assert same["kl_spliced"] == 0 and same["ce_spliced"] == same["ce_clean"]
    assert same["cosine"] == pytest.approx(1) and same["relative_norm"] == 1
    assert zeroed["ce_recovered"] == zeroed["cosine"] == zeroed["relative_norm"] == 0
    assert zeroed["ce_spliced"] == zeroed["ce_zero"] and zeroed["kl_spliced"] == zeroed["kl_zero"]
    assert zeroed["kl_zero"] > 0 and same["ce_zero"] > same["ce_clean"]
    assert other["ce_recovered"] not in (0, 1)
    of_massive = {"explained_variance_all", "massive_share", "massive_variance_share"}
    asked_for = {name for name in MEANING if "letter" in name or "absorbed" in name}
    asked_for |= {name for name in MEANING if name.startswith("class_")}
    # There is no rule for massive tokens, and there are 46 tokens.
    assert same.keys() == MEANING.keys() - of_massive - asked_for - {"dead_share_10k"}


@pytest.mark.parametrize("family", CAUSAL)
def test_against_brute_force(folders, family):
    """The same figures from whole [c, L, V] logits, with the block's output replaced by hand."""
    model = LanguageModel.load(str(folders[family]), layer=1)
    text, sae = held_out(model), random(WIDTH)
    [found] = judge({"it": sae}, text).values()
    whole = model.activations(text.contexts)
    x = whole[text.mask]
    out = sae(x)
    block = model.model.get_submodule(f"{BLOCKS[family]}.1")

    def logits(inside: torch.Tensor) -> torch.Tensor:
        put = whole.clone()
        put[text.mask] = inside
        hook = block.register_forward_hook(
            lambda _m, _i, output: put if torch.is_tensor(output) else (put, *output[1:])
        )
        try:
            return model.model(input_ids=text.contexts).logits.double()[:, :-1]
        finally:
            hook.remove()

    targets = text.contexts[:, 1:, None]
    mean = x.double().mean(0).float().expand_as(x)
    clean = logits(x).log_softmax(-1)
    expected = {"ce_clean": -clean.gather(-1, targets).mean().item()}
    for name, inside in {"spliced": out.x_hat, "mean": mean, "zero": torch.zeros_like(x)}.items():
        log_p = logits(inside).log_softmax(-1)
        expected[f"ce_{name}"] = -log_p.gather(-1, targets).mean().item()
        expected[f"kl_{name}"] = (clean.exp() * (clean - log_p)).sum(-1).mean().item()
    for name, baseline in {"ce_recovered": "ce_zero", "ce_recovered_mean": "ce_mean"}.items():
        losses = (expected[key] for key in ("ce_clean", "ce_spliced", baseline))
        expected[name] = cross_entropy_recovered(*losses)
    by_tensors = evaluate(sae, Heldout(x))
    expected |= {k: v for k, v in by_tensors.items() if k != "explained_variance_batch"}
    for name, value in expected.items():
        assert found.metrics[name] == pytest.approx(value, rel=2e-4, abs=2e-6), name
    counts = torch.bincount(out.codes.indices[out.codes.values > 0], minlength=sae.dict_size)
    assert found.counts.tolist() == counts.tolist() and found.tokens == len(x)


def test_a_transcoder_stands_for_its_target(folders):
    family = "qwen2"
    model = LanguageModel.load(
        str(folders[family]),
        hookpoint=f"{BLOCKS[family]}.1.post_attention_layernorm",
        target_hookpoint=f"{BLOCKS[family]}.1.mlp",
    )
    text, transcoder = held_out(model), random(WIDTH, WIDTH)
    [found] = judge({"it": transcoder}, text).values()
    x, y = model.activations(text.contexts)[text.mask].split(WIDTH, -1)
    expected = evaluate(transcoder, Heldout(x, targets=y))
    assert found.metrics["fvu"] == pytest.approx(expected["fvu"], rel=1e-5)
    mlp = model.model.get_submodule(f"{BLOCKS[family]}.1.mlp")

    def put(_module, _inputs, output):
        output = output.clone()
        output[text.mask] = transcoder(x).x_hat
        return output

    hook = mlp.register_forward_hook(put)
    loss = model.token_losses(text.contexts).double().mean().item()
    hook.remove()
    assert found.metrics["ce_spliced"] == pytest.approx(loss, rel=1e-5)
    assert abs(loss - found.metrics["ce_clean"]) > 1e-4


def test_a_model_without_next_tokens_gives_the_rest(folders):
    model = LanguageModel.load(str(folders["bert"]), layer=1)
    text = held_out(model)
    [found] = judge({"it": random(WIDTH)}, text).values()
    expected = evaluate(random(WIDTH), Heldout(model.activations(text.contexts)[text.mask]))
    assert found.metrics.keys() == expected.keys()
    assert found.metrics["fvu"] == pytest.approx(expected["fvu"], rel=1e-5)


def test_nothing_to_judge_on(folders):
    model = LanguageModel.load(str(folders["gpt2"]), layer=1)
    text = held_out(model)
    with pytest.raises(InputError, match="no token"):
        judge({"it": random(WIDTH)}, replace(text, mask=torch.zeros_like(text.mask)))


# Command line


def test_a_sweep_from_the_command_line(sweep, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([str(sweep), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        *("evaluation.json", "evaluation.md", "densities.png", "tradeoff.png")
    }
    document = json.loads((out / "evaluation.json").read_text())
    [text] = document["texts"]
    names = [path.name for path in sorted(sweep.iterdir()) if (path / "sae").is_dir()]
    assert sorted(text["of"]) == names and 900 < text["tokens"] <= 16 * 63
    assert document["command"].startswith("kronsae evaluate ")
    assert document["versions"]["torch"] == torch.__version__
    for entry in document["judged"]:
        log = (sweep / entry["name"] / "metrics.jsonl").read_text().splitlines()
        final = json.loads(log[-1])
        # The same held-out text as in training, so the same figures.
        for name in ("explained_variance", "cosine", "l0", "dead_share", "dense_share"):
            assert entry["metrics"][name] == pytest.approx(final[name], rel=1e-6), name
        for name in ("ce_clean", "ce_spliced", "ce_recovered"):
            assert entry["metrics"][name] == pytest.approx(final[name], rel=1e-4), name
        assert entry["tokens"] == text["tokens"] and entry["seed"] == 0
        assert sum(entry["densities"]["latents"]) + entry["densities"]["dead"] == 256
        assert entry["name"] in printed
    page = (out / "evaluation.md").read_text()
    for name in document["judged"][0]["metrics"]:
        assert f"| {MEANING[name][0]} | " in page


@pytest.fixture(scope="module")
def overflowing(sweep, tmp_path_factory):
    """A run's SAE whose latents are infinite, and its reconstruction NaN."""
    sae = load(sweep / "m2")
    with torch.no_grad():
        sae.W_enc.mul_(1e25)
    return sae.save(tmp_path_factory.mktemp("wild") / "wild")


def test_one_sae_at_several_k(sweep, tmp_path, capsys):
    """Each as an SAE of that k with these weights."""
    run = str(next(path for path in sorted(sweep.iterdir()) if path.name.startswith("m2")))
    short = ["--heldout-tokens", "256", "--out", str(tmp_path / "out")]
    assert main([run, "--ks", "2", "8", "2", *short]) == 0
    document = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    few, own = document["judged"]
    assert [few["k"], own["k"]] == [2, 8] and few["name"].endswith(" k=2")
    loaded = load_sae(run, {"heldout_tokens": 256})
    text = open_heldout(loaded, torch.device("cpu"), None)
    alone = judge({"few": loaded.sae.with_k(2), "own": loaded.sae}, text)
    for entry, judgement in zip((few, own), alone.values(), strict=True):
        assert entry["metrics"] == pytest.approx(judgement.metrics)
    assert few["metrics"]["l0"] == 2 and own["metrics"]["l0"] > 2
    assert main([run, "--ks", "257"]) == 2
    assert "--ks: " in (said := capsys.readouterr().err) and "1 <= k <= dict_size" in said


def test_a_reconstruction_that_is_not_finite(sweep, overflowing, tmp_path, capsys):
    """Its figures are null with the reason; those of the other SAE are as they are alone."""
    out = tmp_path / "out"
    assert main([str(overflowing), str(sweep / "m2"), "--out", str(out)]) == 0
    wild, other = json.loads((out / "evaluation.json").read_text())["judged"]
    of_output = {"explained_variance", "cosine", "mse", "relative_norm", "ce_spliced", "kl_spliced"}
    for name in of_output:
        assert wild["metrics"][name] is None and other["metrics"][name] is not None, name
        assert f"{name} is nan" in wild["metrics"]["not_finite"]
    assert wild["metrics"]["kl_zero"] == other["metrics"]["kl_zero"]
    assert "not_finite" not in other["metrics"]
    assert f"wild: not finite: {wild['metrics']['not_finite']}" in capsys.readouterr().out
    assert (out / "tradeoff.png").is_file()
    draw([wild, wild], tmp_path)
    assert [path.name for path in tmp_path.glob("*.png")] == ["densities.png"]


def test_a_member_without_an_sae_is_left_out(sweep, tmp_path):
    """So training leaves one whose weights are not finite."""
    copy = tmp_path / "sweep"
    shutil.copytree(sweep, copy)
    shutil.rmtree(copy / "m2" / "sae")
    with pytest.warns(Notice, match="sweep: m2 saved no SAE, and is left out"):
        [loaded] = load_saes([str(copy)], {}, "cpu")
    assert loaded.name == "m4"
    shutil.rmtree(copy / "m4" / "sae")
    with pytest.raises(InputError, match="m2 holds no SAE"):
        load_saes([str(copy)], {}, "cpu")


def test_one_run_and_other_text(sweep, tmp_path, capsys):
    run = next(path for path in sorted(sweep.iterdir()) if (path / "sae").is_dir())
    text = tmp_path / "text.txt"
    text.write_text("def other():\n    return 1\n\n" * 400)
    out = tmp_path / "out"
    arguments = [str(run / "sae"), "--dataset", str(text), "--heldout-tokens", "256"]
    assert main([*arguments, "--out", str(out)]) == 0
    [found] = json.loads((out / "evaluation.json").read_text())["texts"]
    assert found["which"].startswith("other") and found["contexts"] == 4
    assert re.search(r"Cross-entropy recovered +-?\d", capsys.readouterr().out)
    assert main([*arguments, "--out", str(out)]) == 2  # it exists
    assert "exists already" in capsys.readouterr().err


def test_no_more_than_was_held_out(sweep, folders, tmp_path):
    """Of text without a side set aside for good, what follows the held-out slice was trained on."""
    text = tmp_path / "text.txt"
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(len(WORDS), (300, 30), generator=generator)
    text.write_text("\n".join(" ".join(WORDS[i] for i in row) for row in rows))
    run = tmp_path / "run"
    flags = ["--model", str(folders["gpt2"]), "--layer", "1", "--dataset", str(text)]
    flags += ["--tokens", "1000", "--batch-size", "100", "--dict-size", "64", "--k", "4"]
    flags += ["--context-length", "32", "--buffer-tokens", "500", "--heldout-tokens", "320"]
    assert train([*flags, "--out", str(run)]) == 0
    loaded = load_sae(str(run), {})
    found = open_heldout(loaded, "cpu")
    assert found.contexts.shape == (10, 32) and "own" in found.facts["which"]
    less = load_sae(str(run), {"heldout_tokens": 100, "context_length": POSITIONS})
    assert open_heldout(less, "cpu").contexts.shape == (1, POSITIONS)
    more = load_sae(str(run), {"heldout_tokens": 640})
    with pytest.raises(InputError, match="320 held-out tokens"):
        open_heldout(more, "cpu")


def test_metadata_and_flags(tmp_path):
    sae = random(WIDTH)
    with pytest.raises(InputError, match="give --model"):
        data_of(sae, {}, "it")
    assert data_of(sae, {"model": "m", "layer": 3}, "it").layer == 3
    run = {"model": "m", "hookpoint": "h", "revision": "r", "dataset": "d", "split": "s"}
    sae.metadata = {"config": {"data": run}}
    assert data_of(sae, {}, "it").split == "s"
    other_text = data_of(sae, {"dataset": "stdlib"}, "it")
    assert (other_text.split, other_text.hookpoint) == ("train", "h")
    other_layer = data_of(sae, {"layer": 1}, "it")
    assert (other_layer.layer, other_layer.hookpoint, other_layer.revision) == (1, None, "r")
    other_model = data_of(sae, {"model": "n", "layer": 1}, "it")
    assert (other_model.revision, other_model.dataset) == (None, "d")
    sae.metadata = {"config": {"data": None}, "data": {"name": "m", "hookpoint": "h"}}
    assert data_of(sae, {}, "it").hookpoint == "h"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "RUN"),
        (["nowhere"], "no such folder"),
        (["RUN", "--datasset", "x"], "did you mean --dataset"),
        (["RUN", "--layer", "1", "--hookpoint", "x"], "exclude each other"),
        (["RUN", "--layer", "9"], "expected 0 to 3"),
        (["RUN", "--model", "embedded", "--hookpoint", "embed_in"], "no such module"),
        (["RUN", "RUN"], "named twice"),
        (["LONELY"], "give --model"),
        (["LONELY", "--model", "embedded"], "width 256"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_work_is_said(sweep, tmp_path, capsys, arguments, words):
    run = next(path for path in sorted(sweep.iterdir()) if (path / "sae").is_dir())
    places = {"RUN": str(run), "LONELY": str(random(WIDTH).save(tmp_path / "lonely"))}
    arguments = [places.get(argument, argument) for argument in arguments]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and words in captured.err
    assert not (tmp_path / "out").exists()


def test_names_are_folded_not_cut(sweep):
    from rich.console import Console

    metrics = dict.fromkeys(MEANING, 0.5)
    judged = [{"name": f"a-very-long-name-of-run-{i}", "metrics": metrics} for i in range(2)]
    console = Console(width=80, record=True)
    console.print(console_table(judged))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text and text.count("0.5000") == 10
