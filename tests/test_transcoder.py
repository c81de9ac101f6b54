"""Transcoders: input and target are two streams, of two widths."""

import signal

import pytest
import torch
from tiny_models import FAMILIES, make_tokenizer

import kronsae
from kronsae import SAE, InputError, SAEConfig, TrainConfig
from kronsae.data import LanguageModel, split_target
from kronsae.metrics.figures import ReconstructionMetrics
from kronsae.metrics.heldout import Heldout, HeldoutText, evaluate, evaluate_cross_entropy
from kronsae.metrics.splicing import spliced
from kronsae.model.massive import rule_of
from kronsae.model.normalizer import Normalizer
from kronsae.training.fit import fit
from kronsae.training.learner import Learner

D, TARGET = 12, 20
POINTS = {
    "kron": {"heads": 16, "m": 2, "n": 2},
    "kron relu_mul": {"heads": 16, "m": 2, "n": 2, "composition": "relu_mul"},
    "dense": {"encoder": "dense", "dict_size": 64},
    "batchtopk": {"heads": 16, "m": 2, "n": 2, "selection": "batchtopk"},
    "jumprelu": {"encoder": "dense", "dict_size": 64, "selection": "jumprelu"},
    "matryoshka": {"heads": 16, "m": 2, "n": 2, "objective": "matryoshka"},
    "multi_topk": {"encoder": "dense", "dict_size": 64, "objective": "multi_topk"},
    "hierarchical": {"encoder": "dense", "dict_size": 64, "objective": "hierarchical"},
    "switch": {"heads": 16, "m": 2, "n": 2, "experts": 4},
}
TRAIN = TrainConfig(
    tokens=20_000,
    batch_size=200,
    lr=2e-2,
    log_every=1,
    checkpoint_every=10,
    dead_after_tokens=1000,
    auxk=4,
    device="cpu",
)


def pairs(count=4000):
    """Sparse features, written into input and target in other directions."""
    generator = torch.Generator().manual_seed(0)
    strength = torch.rand(count, 16, generator=generator)
    features = strength * (torch.rand(count, 16, generator=generator) < 0.15)
    into_x, into_y = (torch.randn(16, width, generator=generator) for width in (D, TARGET))
    return features @ into_x + 1, 2 * features @ into_y + 3


X, Y = pairs()
HELDOUT = X[:500], Y[:500]


@pytest.fixture(params=POINTS.values(), ids=POINTS)
def config(request):
    return SAEConfig(k=4, **request.param)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "skip", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "skip"]
)
def test_a_transcoder_from_its_start_to_its_file(config, skip, tmp_path):
    config = SAEConfig(**{**vars(config), "skip": skip})
    whole = fit(config, (X, Y), TRAIN, heldout=HELDOUT, out=tmp_path / "whole")
    assert (whole.sae.config.d_model, whole.sae.config.d_target) == (D, TARGET)
    losses = [record["loss"] for record in whole.history if record["kind"] == "train"]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    metrics = ReconstructionMetrics(TARGET)
    metrics.update(HELDOUT[1], whole.sae(HELDOUT[0]).x_hat.detach())
    assert metrics.compute()["explained_variance"] == whole.metrics["explained_variance"] > 0.5

    def interrupt(record):
        if record["step"] == 17:
            signal.raise_signal(signal.SIGTERM)

    fit(config, (X, Y), TRAIN, heldout=HELDOUT, out=tmp_path / "run", on_record=interrupt)
    rest = fit(config, (X, Y), TRAIN, heldout=HELDOUT, out=tmp_path / "run", resume=True)
    loaded = kronsae.load(tmp_path / "run")
    for key, tensor in whole.sae.state_dict().items():
        assert torch.equal(rest.sae.state_dict()[key], tensor), key
        assert torch.equal(loaded.state_dict()[key], tensor), key
    judged_on = Heldout(HELDOUT[0], targets=HELDOUT[1]).leaving_out(rule_of(loaded.metadata))
    assert evaluate(loaded, judged_on) == whole.metrics


@pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])
def test_folded_takes_raw_inputs_and_gives_raw_targets(config, skip):
    config = SAEConfig(**{**vars(config), "d_model": D, "d_target": TARGET, "skip": skip})
    learner = Learner(config, TRAIN, torch.device("cpu"))
    of_x, of_y = Normalizer.of(X), Normalizer.of(Y)
    reached = {name: 0.0 for name, _ in learner.sae.named_parameters()}
    for i in range(10):
        learner.step(of_x(X[100 * i :][:100]), of_y(Y[100 * i :][:100]))
        for name, parameter in learner.sae.named_parameters():
            reached[name] = reached[name] + parameter.grad.abs()
    assert all((sums > 0).double().mean() > 0.9 for sums in reached.values())
    inside = learner.sae.eval()(of_x(X))
    folded = learner.sae.folded(of_x.mean, of_x.scale, (of_y.mean, of_y.scale))
    outside = folded(X)
    expected = inside.x_hat / of_y.scale + of_y.mean
    torch.testing.assert_close(outside.x_hat, expected, rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(folded.W_dec.norm(dim=1), torch.ones(64))
    used = folded.fired(outside.codes)
    assert used.sum() == learner.sae.fired(inside.codes).sum()


def test_a_skip_learns_the_linear_part():
    """A target that is linear in the input: with a skip nothing is left for the latents."""
    y = X @ torch.randn(D, TARGET, generator=torch.Generator().manual_seed(5))
    config = TrainConfig(**{**vars(TRAIN), "tokens": 40_000})
    found = {
        skip: fit(
            SAEConfig(heads=16, m=2, n=2, k=4, skip=skip),
            (X, y),
            config,
            heldout=(X[:500], y[:500]),
        ).metrics["explained_variance"]
        for skip in (False, True)
    }
    assert found[True] > 0.99 > found[False] + 0.03


def test_any_stream_of_pairs_is_the_same():
    config = SAEConfig(heads=16, m=2, n=2, k=4)
    batches = list(zip(X.split(200), Y.split(200), strict=True))
    train = TrainConfig(**{**vars(TRAIN), "tokens": 2000})
    first = fit(config, iter(batches), train).sae
    second = fit(config, [list(pair) for pair in batches], train).sae
    for name, tensor in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor)


def test_forward_of_a_transcoder():
    sae = SAE(SAEConfig(d_model=D, d_target=TARGET, heads=16, m=2, n=2, k=4, skip=True))
    with torch.no_grad():
        sae.W_skip.normal_()
    out = sae(X[:5])
    assert out.loss is None and out.x_hat.shape == (5, TARGET)
    judged = sae(X[:5], Y[:5])
    torch.testing.assert_close(judged.loss, (out.x_hat - Y[:5]).square().mean())
    codes = sae.encode(X[:5])
    torch.testing.assert_close(sae.decode(codes, X[:5]), out.x_hat)
    dense = torch.zeros(5, 64).scatter(1, codes.indices, codes.values)
    expected = dense @ sae.W_dec + sae.b_dec + X[:5] @ sae.W_skip.t()
    torch.testing.assert_close(out.x_hat, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="decodes codes with their input"):
        sae.decode(codes)


KRON = SAEConfig(heads=16, m=2, n=2, k=4)


@pytest.mark.parametrize(
    ("config", "activations", "heldout", "words"),
    [
        (SAEConfig(heads=16, m=2, n=2, k=4, skip=True), X, None, "skip needs a target"),
        (SAEConfig(heads=16, m=2, n=2, k=4, d_target=9), (X, Y), None, "d_target: 9 is configured"),
        (SAEConfig(heads=16, m=2, n=2, k=4, d_target=9), X, None, "the data has none"),
        (
            KRON,
            (X, Y[:100]),
            None,
            "expected a target for each input, got .4000, 12. and .100, 20.",
        ),
        (KRON, [(X, Y), (X, X)], None, "= .12, 20. as before, got .12, 12."),
        (KRON, [(X, Y), X], None, "= .12, 20. as before, got .12, 0."),
        (KRON, (X, Y), X, "heldout: expected inputs with their targets"),
        (KRON, X, HELDOUT, "heldout: expected no targets"),
        (KRON, (X, Y), (X, X), "floating targets .t, 20."),
        (KRON, (X, Y), (X, Y[:9]), "a target for each of 4000 activations, got 9"),
        (KRON, (X, Y), (X, Y * float("nan")), "some targets are NaN"),
    ],
)
def test_what_does_not_fit_is_said(config, activations, heldout, words):
    with pytest.raises(InputError, match=words):
        fit(config, activations, TrainConfig(**{**vars(TRAIN), "tokens": 9000}), heldout=heldout)


# Two hookpoints of a language model


def language_model(hookpoint, target=None):
    torch.manual_seed(0)
    model = FAMILIES["llama"]()
    return LanguageModel(model, make_tokenizer("llama"), hookpoint, target_hookpoint=target)


NORM, MLP = "model.layers.1.post_attention_layernorm", "model.layers.1.mlp"
IDS = torch.randint(6, 90, (3, 11), generator=torch.Generator().manual_seed(0))


def losses_with(model, make):
    """Losses of IDS with make(x, y) in the place of every activation y."""
    with spliced(model, make, torch.ones(IDS.shape, dtype=torch.bool)):
        return model.token_losses(IDS)


def test_both_hookpoints_are_read_in_one_pass():
    both = language_model(NORM, MLP)
    assert (both.d_model, both.d_target) == (32, 32)
    x, y = split_target(both.activations(IDS).flatten(0, 1), 32)
    assert torch.equal(x, language_model(NORM).activations(IDS).flatten(0, 1))
    assert torch.equal(y, language_model(MLP).activations(IDS).flatten(0, 1))
    assert both.describe()["target_hookpoint"] == MLP
    assert "target_hookpoint" not in language_model(NORM).describe()


def test_the_target_must_come_later():
    with pytest.raises(InputError, match="runs before 'model.layers.1.mlp'"):
        language_model(MLP, NORM)
    with pytest.raises(InputError, match="no such module"):
        language_model(NORM, "model.layers.1.mlpp")


def test_a_perfect_transcoder_costs_nothing():
    """Spliced in for its target, with what it reads: the MLP itself changes no loss."""
    model = language_model(NORM, MLP)
    module = model.model.get_submodule(MLP)
    clean = model.token_losses(IDS)
    same = losses_with(model, lambda x, y: module.forward(x))
    torch.testing.assert_close(same, clean)
    zeroed = losses_with(model, lambda x, y: torch.zeros_like(y))
    assert (zeroed - clean).abs().max() > 1e-4
    sae = SAE(SAEConfig(d_model=32, d_target=32, heads=4, m=2, n=2, k=2, skip=True)).eval()
    mask = torch.ones(IDS.shape, dtype=torch.bool)
    rows = model.activations(IDS)[mask]
    x, y = split_target(rows, 32)
    heldout = Heldout(x, y, HeldoutText(model, IDS, mask))
    metrics = evaluate_cross_entropy({"it": lambda: sae}, heldout)["it"]
    assert metrics["ce_clean"] == pytest.approx(clean.double().mean().item())
    assert metrics["ce_zero"] == pytest.approx(zeroed.double().mean().item())
    spliced = losses_with(model, lambda x, y: sae(x).x_hat)
    assert metrics["ce_spliced"] == pytest.approx(spliced.double().mean().item())
