"""Massive tokens: told from the rest, left out of training and figures, unchanged when spliced."""

import json
import random
import re
import signal

import pytest
import torch
from tiny_models import WORDS, save_model
from transformers import GPT2LMHeadModel

import kronsae
from kronsae import InputError, SAEConfig, TrainConfig
from kronsae.data import IterableActivations, TensorActivations
from kronsae.errors import Notice
from kronsae.evaluate.__main__ import main as evaluate_command
from kronsae.explore.report import write_report
from kronsae.export.__main__ import main as export
from kronsae.interventions import clamp, intervene
from kronsae.metrics.figures import massive_warning
from kronsae.metrics.heldout import Heldout, HeldoutText, evaluate
from kronsae.metrics.splicing import spliced
from kronsae.metrics.target_model import load_sae, open_heldout
from kronsae.model.massive import METADATA, MassiveTokens, rule_of, without
from kronsae.properties.__main__ import main as properties
from kronsae.properties.contexts import top_contexts
from kronsae.properties.run import without_massive
from kronsae.train import fit
from kronsae.train import main as train
from kronsae.training.stream import Stream

D, FEATURES = 32, 96
CPU = torch.device("cpu")
KRON = SAEConfig(heads=16, m=2, n=4, k=8)
TRAIN = TrainConfig(tokens=60_000, batch_size=200, lr=4e-3, device="cpu", log_every=1)


def tokens(count: int, seed: int) -> torch.Tensor:
    """Sparse features and a little noise [count, D]."""
    directions = torch.randn(FEATURES, D, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    active = torch.rand(count, FEATURES, generator=generator) < 6 / FEATURES
    strength = torch.rand(count, FEATURES, generator=generator) * active
    noise = 0.3 * torch.randn(count, D, generator=generator)
    return strength @ torch.nn.functional.normalize(directions, dim=1) + noise


def with_sinks(x: torch.Tensor, share: float, times: float, seed: int):
    """x with a share of its tokens moved far in one direction, and the mask of these."""
    generator = torch.Generator().manual_seed(seed)
    sinks = torch.rand(len(x), generator=generator) < share
    direction = torch.zeros(D)
    direction[3] = x.norm(dim=1).median() * times
    return torch.where(sinks[:, None], x + direction, x), sinks


X, HELDOUT = tokens(20_000, 1), tokens(2000, 2)


def explained(x: torch.Tensor, x_hat: torch.Tensor) -> float:
    x, x_hat = x.double(), x_hat.double()
    return (1 - (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()).item()


# The rule


@pytest.mark.parametrize("times", [20, 100, 1e4])
def test_sinks_are_told_from_the_rest_and_do_not_move_the_mean(times):
    x, sinks = with_sinks(X[:8192], 0.005, times, 3)
    rule = MassiveTokens.of(x)
    assert torch.equal(rule(x), sinks)
    mean = x[~sinks].double().mean(0)
    torch.testing.assert_close(rule.of_input.mean, mean)
    median = torch.linalg.vector_norm(x[~sinks].double() - mean, dim=1).median().item()
    assert rule.of_input.radius == pytest.approx(10 * median, rel=1e-2)
    assert not MassiveTokens.of(x, multiple=2 * times)(x).any()


def test_nothing_of_ordinary_activations_is_massive():
    assert not MassiveTokens.of(X)(X).any()
    # Half of the tokens are almost the same, so that the median distance says nothing.
    narrow = torch.cat([X[:1000] * 1e-3, X[:1000]])
    assert not MassiveTokens.of(narrow)(narrow).any()
    assert not MassiveTokens.of(torch.ones(10, D))(torch.ones(10, D)).any()


def test_a_transcoder_s_token_is_massive_by_its_input_or_its_target():
    (x, of_x), (y, of_y) = with_sinks(X, 0.01, 50, 3), with_sinks(X.flip(0), 0.01, 50, 4)
    rule = MassiveTokens.of(x, y)
    assert torch.equal(rule(x, y), of_x | of_y) and torch.equal(rule(x), of_x)
    again = MassiveTokens.from_facts(json.loads(json.dumps(rule.facts())))
    assert torch.equal(again(x, y), of_x | of_y) and again.multiple == 10


@pytest.mark.parametrize(
    "facts", [{}, {"multiple": 10.0}, {"multiple": 1, "mean": ["x"], "radius": 1}, [1], "x", 3]
)
def test_a_damaged_rule_is_an_input_error(facts):
    with pytest.raises(InputError, match=METADATA):
        rule_of({METADATA: facts})


def test_multiples_that_would_leave_ordinary_tokens_out_are_refused():
    with pytest.raises(InputError, match="massive_multiple: expected 0 .* or >= 2, got 1"):
        TrainConfig(massive_multiple=1)


# Training


def test_another_token_of_the_batch_takes_its_place():
    x, sinks = with_sinks(X[:8192], 0.02, 100, 3)
    stream = Stream(TensorActivations(x, 64, seed=0), 8192, CPU)
    plain = iter(TensorActivations(x, 64, seed=0))
    left_out = 0
    while not stream.done:
        batch, _ = stream.next()
        raw = next(plain)
        massive = stream.massive(raw)
        expected = stream.normalizer(raw)
        assert torch.equal(batch[~massive], expected[~massive]) and len(batch) == 64
        known = {tuple(row.tolist()) for row in expected[~massive]}
        assert all(tuple(row.tolist()) in known for row in batch[massive])
        left_out += int(massive.sum())
    rates = stream.rates()
    assert left_out == int(sinks.sum()) and rates["massive_share"] == left_out / 8192
    centred = x - stream.normalizer.mean
    share = centred[sinks].square().sum() / centred.square().sum()
    assert rates["massive_variance_share"] == pytest.approx(share.item(), rel=1e-4)
    assert stream.rates()["massive_share"] == 0  # since the last call


def test_a_batch_of_massive_tokens_alone_becomes_the_mean():
    x = torch.cat([X[:8192], X[8192:8292] + 1e4])
    batches = [*x[:8192].split(128), x[8192:]]
    stream = Stream(IterableActivations(batches), 10**6, CPU)
    batches = [stream.next()[0] for _ in range(65)]
    assert not batches[-1].any() and all(batch.any() for batch in batches[:-1])


@pytest.mark.one_in(4)
@pytest.mark.parametrize("encoder", ["kron", "dense"])
@pytest.mark.parametrize(
    ("share", "times"),
    [(0.001, 20), pytest.param(0.001, 300, marks=pytest.mark.slow), (0.005, 100)],
)
def test_training_and_figures_are_those_of_ordinary_tokens(encoder, share, times):
    config = KRON if encoder == "kron" else SAEConfig(encoder="dense", dict_size=128, k=8)
    without_sinks = fit(config, X, TRAIN, heldout=HELDOUT)
    (x, _), (heldout, sinks) = with_sinks(X, share, times, 3), with_sinks(HELDOUT, share, times, 5)
    assert sinks.any()
    result = fit(config, x, TRAIN, heldout=heldout)
    metrics = result.metrics
    x_hat = result.sae(heldout).x_hat
    plain = explained(heldout[~sinks], x_hat[~sinks])
    assert metrics["explained_variance"] == pytest.approx(plain, abs=1e-6)
    assert metrics["explained_variance_all"] == pytest.approx(explained(heldout, x_hat), abs=1e-6)
    assert plain == pytest.approx(without_sinks.metrics["explained_variance"], abs=0.01)
    assert metrics["massive_share"] == sinks.double().mean()
    variance = [(part - part.mean(0)).square().sum() for part in (heldout[~sinks], heldout)]
    held = 1 - (variance[0] / variance[1]).item()
    assert metrics["massive_variance_share"] == pytest.approx(held, abs=1e-4)
    losses = [r["loss"] for r in result.history if r["kind"] == "train"][TRAIN.steps // 10 :]
    assert max(losses) <= 3 * sorted(losses)[len(losses) // 2]


def test_off_trains_on_all_tokens_and_says_so_in_the_metadata(tmp_path):
    x, _ = with_sinks(X, 0.0005, 100, 3)
    config = TrainConfig(**{**vars(TRAIN), "tokens": 10_000, "massive_multiple": 0.0})
    result = fit(KRON, x, config, heldout=x[:2000], out=tmp_path / "run")
    assert "explained_variance_all" not in result.metrics
    far = MassiveTokens.of(x[: TRAIN.batch_size * 41])(x[:2000])
    assert result.metrics["massive_share"] == far.double().mean().item() > 0
    assert "--massive-multiple 0 leaves them in" in massive_warning(result.metrics)
    assert not any(
        "massive_share" in record for record in result.history if record["kind"] == "train"
    )
    assert kronsae.load(tmp_path / "run").metadata[METADATA] is None
    losses = [r["loss"] for r in result.history if r["kind"] == "train"]
    assert max(losses) > 20 * sorted(losses)[len(losses) // 2]


def test_a_run_resumes_with_its_rule_to_the_bit(tmp_path):
    x, _ = with_sinks(X, 0.01, 100, 3)
    config = TrainConfig(**{**vars(TRAIN), "tokens": 8000, "log_every": 4, "checkpoint_every": 0})
    whole = fit(KRON, x, config, heldout=x[:500], out=tmp_path / "whole")

    def interrupt(record):
        if record["step"] == 12:
            signal.raise_signal(signal.SIGTERM)

    run = {"heldout": x[:500], "out": tmp_path / "run"}
    fit(KRON, x, config, **run, on_record=interrupt)
    rest = fit(KRON, x, config, **run, resume=True)
    for name, tensor in whole.sae.state_dict().items():
        assert torch.equal(rest.sae.state_dict()[name], tensor), name
    assert rest.metrics == whole.metrics
    assert rest.sae.metadata[METADATA] == whole.sae.metadata[METADATA] is not None
    kept = ("step", "loss", "massive_share", "massive_variance_share")
    logs = [
        [
            {k: json.loads(line).get(k) for k in kept}
            for line in open(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("whole", "run")
    ]
    assert logs[0] == logs[1] and any(line["massive_share"] for line in logs[0])


def test_text_of_another_kind_is_an_error_and_what_was_learned_is_kept(tmp_path):
    config = TrainConfig(**{**vars(TRAIN), "tokens": 2000})
    with pytest.raises(InputError, match=r"2,000 of 2,000 tokens are farther .* another kind"):
        fit(KRON, X, config, heldout=HELDOUT + 1e4, out=tmp_path / "run")
    assert kronsae.load(tmp_path / "run").metadata["tokens"] == 2000


# A language model with sinks

SINK = 7
"""The word whose activations are massive."""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("models") / "gpt2", "gpt2")
    model = GPT2LMHeadModel.from_pretrained(folder)
    with torch.no_grad():
        model.transformer.wte.weight[6 + SINK] *= 500  # after six special tokens
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    draw = random.Random(0)
    usual = [word for i, word in enumerate(WORDS) if i != SINK]
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    with path.open("w") as file:
        for _ in range(400):
            words = [draw.choice(usual) for _ in range(60)]
            words[draw.randrange(10, 60)] = WORDS[SINK]
            file.write(json.dumps({"text": " ".join(words)}) + "\n")
    return path


@pytest.fixture(scope="module")
def run(model_folder, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    flags = {
        **{"--model": model_folder, "--layer": 1, "--dataset": text, "--context-length": 64},
        **{"--tokens": 12_000, "--batch-size": 256, "--dict-size": 128, "--k": 4},
        **{"--heldout-tokens": 2048, "--buffer-tokens": 1024, "--device": "cpu", "--out": out},
    }
    assert train([str(part) for pair in flags.items() for part in pair]) == 0
    return out


def read(run) -> tuple[kronsae.SAE, HeldoutText]:
    loaded = load_sae(str(run), {})
    return loaded.sae, open_heldout(loaded, "cpu")


def test_a_run_names_the_sinks(run, capsys):
    """The warning is printed where a sweep or run ends, too; here by evaluate."""
    records = [json.loads(line) for line in open(run / "metrics.jsonl")]
    final = records[-1]
    assert final["massive_variance_share"] > 0.5 and 0.01 < final["massive_share"] < 0.03
    assert evaluate_command([str(run), "--out", str(run / "evaluation")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"warning: Massive tokens ('{WORDS[SINK]}') are" in printed
    page = (run / "evaluation" / "evaluation.md").read_text()
    assert f"**Warning**: Massive tokens ('{WORDS[SINK]}')" in page
    assert "| Explained variance, all tokens |" in page and "| Explained variance |" in page
    report = write_report(run).read_text()
    assert "Massive tokens are" in report and "Explained variance, all tokens" in report
    [judged] = json.loads((run / "evaluation" / "evaluation.json").read_text())["judged"]
    for name in ("explained_variance", "explained_variance_all", "massive_share", "ce_spliced"):
        assert judged["metrics"][name] == pytest.approx(final[name], abs=1e-5), name


def test_no_warning_without_need():
    metrics = {"massive_share": 0.1, "massive_variance_share": 0.05, "explained_variance_all": 0.5}
    assert massive_warning(metrics) is None and massive_warning({}) is None


def test_evaluate_measures_the_rule_of_an_sae_that_has_none(run, tmp_path, capsys):
    sae = kronsae.load(run)
    del sae.metadata[METADATA]
    sae.save(tmp_path / "elsewhere")
    for name, flags in {"known": [], "off": ["--massive-multiple", "0"]}.items():
        out = ["--out", str(tmp_path / name)]
        assert evaluate_command([str(tmp_path / "elsewhere"), *out, *flags]) == 0
    known, off = (
        json.loads((tmp_path / name / "evaluation.json").read_text())["judged"][0]["metrics"]
        for name in ("known", "off")
    )
    final = json.loads(open(run / "metrics.jsonl").readlines()[-1])
    for name in ("explained_variance", "explained_variance_all", "massive_share", "ce_spliced"):
        assert known[name] == pytest.approx(final[name], abs=1e-5), name
    assert off["massive_share"] == known["massive_share"] and "explained_variance_all" not in off
    assert "--massive-multiple 0 leaves them in: the figures say" in " ".join(
        capsys.readouterr().out.split()
    )
    assert off["explained_variance"] == pytest.approx(known["explained_variance_all"], abs=1e-6)


def test_saes_with_several_rules_are_compared_on_the_same_tokens(run, tmp_path, capsys):
    """On those that the strictest rule leaves, in whatever order they are named."""
    saes = {}
    for name, multiple in {"strict": 4, "usual": 10, "none": 0}.items():
        sae = kronsae.load(run)
        rule = rule_of(sae.metadata)
        radius = rule.of_input.radius * multiple / rule.multiple
        facts = rule._replace(multiple=multiple, of_input=rule.of_input._replace(radius=radius))
        sae.metadata[METADATA] = facts.facts() if multiple else None
        sae.save(tmp_path / name)
        saes[name] = str(tmp_path / name)
    tables = []
    for order in (["strict", "usual", "none"], ["none", "usual", "strict"]):
        out = tmp_path / "-".join(order)
        with pytest.warns(Notice, match=f"{order[0]} .*, {order[1]} .*without the tokens that 4 "):
            assert evaluate_command([*(saes[name] for name in order), "--out", str(out)]) == 0
        judged = json.loads((out / "evaluation.json").read_text())["judged"]
        tables.append({entry["name"]: entry["metrics"] for entry in judged})
    assert tables[0] == tables[1]
    shares = {figures["massive_share"] for figures in tables[0].values()}
    assert len(shares) == 1 and shares.pop() > 0


def test_verify_and_properties_leave_them_out(run, tmp_path, capsys):
    out = tmp_path / "exported"
    assert export([str(run), "--to", "kronsae", "--out", str(out), "--verify"]) == 0
    printed = capsys.readouterr().out
    final = json.loads(open(run / "metrics.jsonl").readlines()[-1])
    assert f" {final['explained_variance']:.4f}" in printed
    assert "without massive ones:" in printed
    assert properties([str(run), "--tokens", "3000", "--device", "cpu"]) == 0
    left_out = re.search(r"([\d,]+) massive tokens? .* left out", capsys.readouterr().out)
    stored = json.loads((run / "properties" / "properties.json").read_text())
    assert stored["massive_tokens"] == int(left_out[1].replace(",", "")) > 0


def test_exports_carry_the_rule(run, tmp_path):
    for name in ("kronsae", "sae_lens"):
        assert export([str(run), "--to", name, "--out", str(tmp_path / name)]) == 0
        sae = kronsae.load(tmp_path / name)
        assert rule_of(sae.metadata).facts() == rule_of(kronsae.load(run).metadata).facts()


def test_massive_tokens_pass_unchanged_through_every_splice(run):
    sae, text = read(run)
    model = text.model
    ids, mask = text.contexts[:4], text.mask[:4]
    clean = model.activations(ids)
    massive = (ids == 6 + SINK) & mask
    assert massive.any() and torch.equal(mask & ~without(mask, text.massive(clean[mask])), massive)
    seen = []
    after = model.model.get_submodule("transformer.h.2")
    hook = after.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    try:
        with spliced(model, lambda _, y: torch.zeros_like(y), mask, text.massive):
            model.token_losses(ids)
        with intervene(model, sae, [clamp(3, 10.0)]):
            model.model(input_ids=ids)
    finally:
        hook.remove()
    for changed in seen:
        assert torch.equal(changed[massive], clean[massive])
        assert not (changed[mask & ~massive] == clean[mask & ~massive]).all(1).any()


def test_examples_and_properties_leave_them_out(run):
    sae, text = read(run)
    x = text.model.activations(text.contexts)
    rows = x[text.mask].float()
    massive = text.contexts[text.mask] == 6 + SINK
    [(ids, mask, kept)] = list(without_massive([(text.contexts, text.mask, rows)], sae))
    assert torch.equal(kept, rows[~massive]) and not (ids[mask] == 6 + SINK).any()
    heldout = Heldout(rows, text=text, massive=text.massive)
    peaks = [
        (window.context, window.position)
        for latent in top_contexts(sae, heldout, range(sae.dict_size))
        for window in latent.windows
    ]
    assert peaks and not any(text.contexts[at] == 6 + SINK for at in peaks)
    masks = torch.cat([mask for _, mask, _ in text.read()])
    assert torch.equal(masks, text.mask & (text.contexts != 6 + SINK))
    assert evaluate(sae, heldout)["massive_share"] == massive.double().mean()


@pytest.mark.parametrize("multiple", ["1", "-3", "nan", "inf"])
def test_evaluate_refuses_other_multiples(run, multiple, tmp_path, capsys):
    flags = ["--massive-multiple", multiple, "--out", str(tmp_path / "evaluation")]
    assert evaluate_command([str(run), *flags]) == 2
    assert "expected 0 (none) or >= 2" in " ".join(capsys.readouterr().err.split())
