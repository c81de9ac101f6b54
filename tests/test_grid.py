"""Every point of encoder x selection x objective: it learns, it is saved, it resumes."""

import dataclasses
import itertools
import signal

import pytest
import torch
from synthetic import SyntheticActivations

import kronsae
from kronsae import SAE, InputError, SAEConfig, TrainConfig
from kronsae.metrics import Heldout, evaluate
from kronsae.model.massive import rule_of
from kronsae.model.normalizer import Normalizer
from kronsae.model.objectives import auxk_loss, objective
from kronsae.training.fit import fit
from kronsae.training.learner import Learner
from kronsae_kernels import sparse_decode

D, F = 16, 64
ENCODERS = {
    "kron": {"heads": 16, "m": 2, "n": 2},
    "dense": {"encoder": "dense", "dict_size": F},
    "gated": {"encoder": "gated", "dict_size": F},
    "mixed": {
        "encoder": "mixed",
        "dict_size": F,
        "encoder_settings": {"dense_latents": 16, "head_m": 4, "head_n": 2},
    },
}
SELECTIONS = {name: {"selection": name, "k": 4} for name in ("topk", "batchtopk", "jumprelu")}
SELECTIONS["relu"] = {"selection": "relu", "selection_settings": {"l1_coefficient": 0.5}}
OBJECTIVES = {
    "plain": {},
    "matryoshka": {"objective": "matryoshka", "matryoshka_first": 8},
    "multi_topk": {"objective": "multi_topk"},
    "hierarchical": {"objective": "hierarchical"},
}
EXPERTS = {"": {}, "switch": {"experts": 4}}
ILLEGAL = {
    ("jumprelu", "multi_topk"): "needs a selection by k",
    ("matryoshka", "switch"): "experts cannot be nested",
    ("relu", "multi_topk"): "needs a selection by k",
    **{
        (name, "hierarchical"): "does not give each token k: take --selection topk"
        for name in ("batchtopk", "jumprelu", "relu")
    },
    ("jumprelu", "switch"): "no threshold holds for all tokens",
    ("relu", "switch"): "takes all latents above 0",
    ("gated", "switch"): "has no experts",
    ("mixed", "switch"): "has no experts",
}
ALL = {
    names: {name: value for part in parts for name, value in part.items()}
    for names, parts in (
        (names, [axis[name] for axis, name in zip(axes, names, strict=True)])
        for axes in [(ENCODERS, SELECTIONS, OBJECTIVES, EXPERTS)]
        for names in itertools.product(*axes)
    )
}
BARRED = {
    names: [reason for pair, reason in ILLEGAL.items() if set(pair) <= set(names)] for names in ALL
}
POINTS = {"-".join(filter(None, names)): ALL[names] for names in ALL if not BARRED[names]}
TRAIN = TrainConfig(
    tokens=12_000,
    batch_size=200,
    lr=5e-3,
    log_every=1,
    checkpoint_every=10,
    dead_after_tokens=1000,
    auxk=4,
    auxk_fraction=1.0,
    device="cpu",
)


def source():
    return SyntheticActivations(D, num_groups=8, group_density=0.1, batch_size=TRAIN.batch_size)


def heldout_activations():
    """Of the same features, but other tokens."""
    other = source()
    other.generator.manual_seed(99)
    return next(iter(other))


def test_the_grid_is_what_it_should_be():
    """4 x 4 x 4 x 2 points, of which those of ILLEGAL say at once why they are not there."""
    assert len(ALL) == 128 and len(POINTS) == 54
    for names, settings in ALL.items():
        if BARRED[names]:
            with pytest.raises(InputError, match="|".join(BARRED[names])):
                SAEConfig(**settings)


@pytest.fixture(params=POINTS.values(), ids=POINTS)
def config(request):
    return SAEConfig(d_model=D, **request.param)


@pytest.fixture
def train(config):
    """Every second point has bfloat16 moments."""
    number = [SAEConfig(d_model=D, **point) for point in POINTS.values()].index(config)
    return dataclasses.replace(TRAIN, moments=("float32", "bfloat16")[number % 2])


@pytest.mark.one_in(8)
def test_a_point_from_its_start_to_its_file(config, train, tmp_path):
    """It learns; a run that was stopped and resumed is the same; its file says the same."""
    heldout = heldout_activations()
    whole = fit(config, source(), train, heldout=heldout, out=tmp_path / "whole")
    losses = [record["loss"] for record in whole.history if record["kind"] == "train"]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5]), losses
    assert whole.metrics["explained_variance"] > 0.5

    def interrupt(record):
        if record["step"] == 27:
            signal.raise_signal(signal.SIGTERM)

    fit(config, source(), train, heldout=heldout, out=tmp_path / "run", on_record=interrupt)
    rest = fit(config, source(), train, heldout=heldout, out=tmp_path / "run", resume=True)
    assert rest.metrics == whole.metrics
    loaded = kronsae.load(tmp_path / "run")
    assert loaded.config == whole.sae.config and not loaded.training
    for key, tensor in whole.sae.state_dict().items():
        assert torch.equal(rest.sae.state_dict()[key], tensor), key
        assert torch.equal(loaded.state_dict()[key], tensor), key
    judged_on = Heldout(heldout).leaving_out(rule_of(loaded.metadata))
    assert evaluate(loaded, judged_on) == whole.metrics


def test_gradients_reach_every_parameter(config):
    learner, batches = Learner(config, TRAIN, torch.device("cpu")), iter(source())
    x = next(batches)
    normalize = Normalizer.of(x)
    reached = {name: torch.zeros_like(p) for name, p in learner.sae.named_parameters()}
    for _ in range(10):
        learner.step(normalize(next(batches)))
        for name, parameter in learner.sae.named_parameters():
            assert parameter.grad is not None, name
            reached[name] += parameter.grad.abs()
    for name, sums in reached.items():
        assert (sums > 0).double().mean() > 0.9, name
    if config.encoder == "kron":
        for part in reached["W_enc"].split([config.m, config.n], dim=1):
            assert (part > 0).double().mean() > 0.9


def test_folded_is_the_same_of_raw_activations(config):
    learner, batches = Learner(config, TRAIN, torch.device("cpu")), iter(source())
    normalize = Normalizer.of(next(batches))
    for _ in range(5):
        learner.step(normalize(next(batches)))
    x = next(batches)
    inside = learner.sae.eval()(normalize(x))
    folded = learner.sae.folded(normalize.mean, normalize.scale)
    outside = folded(x)
    expected = inside.x_hat / normalize.scale + normalize.mean
    torch.testing.assert_close(outside.x_hat, expected, rtol=1e-3, atol=1e-4)
    assert folded.fired(outside.codes).sum() == learner.sae.fired(inside.codes).sum()


def test_auxk_works_everywhere(config):
    sae, x = SAE(config, generator=torch.Generator().manual_seed(0)), torch.randn(32, D)
    dead = torch.arange(F) % 2 == 0
    loss, codes = auxk_loss(sae, x, torch.zeros_like(x), dead, k=6)
    assert dead[codes.indices[sae.fired(codes)]].all()
    loss.backward()
    rows = sae.W_dec.grad.norm(dim=1)
    assert rows[dead].any() and not rows[~dead].any()
    assert sae.W_enc.grad.any()


# Objectives


def without_penalties(found):
    return found.loss - sum(p.coefficient * p.loss for p in found.penalties.values())


def gradients(loss, parameters):
    """0 where none comes: a gate learns from its penalty alone."""
    return torch.autograd.grad(
        loss, list(parameters), retain_graph=True, allow_unused=True, materialize_grads=True
    )


@pytest.mark.parametrize("encoder", ENCODERS.values(), ids=ENCODERS)
@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
def test_matryoshka_is_the_sum_over_prefixes(encoder, selection):
    """Loss and gradients of a decode of its own for each prefix."""
    config = SAEConfig(d_model=D, **encoder, **selection, **OBJECTIVES["matryoshka"])
    assert config.prefixes == (8, 16, 32, 64)
    sae, x = SAE(config, generator=torch.Generator().manual_seed(0)), torch.randn(32, D)
    with torch.no_grad():
        sae.b_dec.normal_()
    if config.selection == "jumprelu":
        sae.selection.prepare(sae, x)
    found = objective(sae, x, TrainConfig())
    error = without_penalties(found)
    parameters = dict(sae.named_parameters())
    got = gradients(error, parameters.values())
    codes, expected = sae.encode(x), 0.0
    for end in (8, 16, 32, 64):
        values = codes.values * (codes.indices < end)
        x_hat = sparse_decode(values, codes.indices, sae.W_dec, sae.b_dec)
        expected = expected + (x_hat - x).square().mean()
    torch.testing.assert_close(error, expected)
    torch.testing.assert_close(found.mse, (x_hat - x).square().mean())
    torch.testing.assert_close(found.x_hat, x_hat)
    truth = gradients(expected, parameters.values())
    for name, a, b in zip(parameters, got, truth, strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("encoder", ENCODERS.values(), ids=ENCODERS)
def test_multi_topk_is_two_topk_losses(encoder):
    """The loss with k latents, and an eighth of that with 4 k, each from an encode of its own."""
    config = SAEConfig(d_model=D, k=4, **encoder, objective="multi_topk")
    sae, x = SAE(config, generator=torch.Generator().manual_seed(0)), torch.randn(32, D)
    found = objective(sae, x, TRAIN)
    few, many = ((sae.decode(sae.encode(x, k=k)) - x).square().mean() for k in (4, 16))
    torch.testing.assert_close(found.mse, few)
    error = without_penalties(found)
    torch.testing.assert_close(error, few + many / 8)
    parameters = list(sae.parameters())
    truth = gradients(few + many / 8, parameters)
    for a, b in zip(gradients(error, parameters), truth, strict=True):
        torch.testing.assert_close(a, b)
    assert found.codes.values.shape == (32, 4) and found.decoded.values.shape == (32, 16)


def test_multi_topk_of_a_batch_is_two_batchtopk_selections():
    config = SAEConfig(d_model=D, k=4, **ENCODERS["kron"], objective="multi_topk")
    sae = SAE(dataclasses.replace(config, selection="batchtopk"))
    x = torch.randn(32, D) * torch.linspace(0.1, 3, 32)[:, None]
    found = objective(sae, x, TRAIN)
    for k, codes in ((4, found.codes), (16, found.decoded)):
        expected = sae.selection(sae, x, k)
        torch.testing.assert_close(codes.values, expected.values)
        used = sae.fired(codes)
        assert torch.equal(codes.indices[used], expected.indices[used])


@pytest.mark.parametrize("name", [name for name in POINTS if "hierarchical" in name])
def test_hierarchical_is_the_mean_over_k(name):
    """Of the errors of an encode and a decode of its own for each k; codes are sorted."""
    for prefixes, ks in (("all", range(1, 7)), ("powers", (1, 2, 4, 6))):
        own = {"k": 6, "objective_settings": {"hierarchical_prefixes": prefixes}}
        config = SAEConfig(d_model=D, **POINTS[name] | own)
        sae, x = SAE(config, generator=torch.Generator().manual_seed(0)), torch.randn(32, D)
        with torch.no_grad():
            sae.b_dec.normal_()
        found = objective(sae, x, TRAIN)
        errors = [(sae.decode(sae.encode(x, k=k)) - x).square().mean() for k in ks]
        error = without_penalties(found)
        torch.testing.assert_close(error, sum(errors) / len(errors))
        torch.testing.assert_close(found.mse, errors[-1])
        torch.testing.assert_close(found.x_hat, sae.decode(sae.encode(x)))
        assert (found.codes.values.diff(dim=1) <= 0).all()
        parameters = list(sae.parameters())
        truth = gradients(sum(errors) / len(errors), parameters)
        for a, b in zip(gradients(error, parameters), truth, strict=True):
            torch.testing.assert_close(a, b)


def test_penalties_enter_with_their_coefficients():
    x = torch.randn(32, D)
    for name, settings, coefficient in (
        ("l0_loss", {"selection": "jumprelu"}, "l0_coefficient"),
        ("balance_loss", {"experts": 4}, "balance_coefficient"),
    ):
        sae = SAE(SAEConfig(d_model=D, k=4, **ENCODERS["kron"], **settings))
        found = objective(sae, x, TrainConfig(**{coefficient: 0.7}))
        assert set(found.penalties) == {name}
        torch.testing.assert_close(found.loss, found.mse + 0.7 * found.penalties[name].loss)


def test_decoder_gradients_keep_no_component_along_their_rows(config):
    """What the learner subtracts, from the codes' gradients, is that of the whole [F, d] row."""
    learner, batches = Learner(config, TRAIN, torch.device("cpu")), iter(source())
    normalize = Normalizer.of(next(batches))
    rows = []
    step = learner.optimizer.step
    learner.optimizer.step = lambda: (
        rows.append((learner.sae.W_dec.grad * learner.sae.W_dec).sum(1).abs().max().item()),
        step(),
    )
    for _ in range(8):
        learner.step(normalize(next(batches)))
    assert max(rows) < 1e-6, rows


@pytest.mark.one_in(4)
def test_bfloat16_autocast_learns_everywhere(config):
    train = dataclasses.replace(TRAIN, dtype="bfloat16", dead_after_tokens=1)
    learner, batches = Learner(config, train, torch.device("cpu")), iter(source())
    normalize = Normalizer.of(next(batches))
    losses = [learner.step(normalize(next(batches)))["loss"] for _ in range(25)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5]), losses
