"""Training by the fused step: the same run as by autograd and torch's AdamW."""

from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from kronsae import SAEConfig, TrainConfig
from kronsae.errors import InputError
from kronsae.interop.load import load
from kronsae.model.normalizer import Normalizer
from kronsae.training import learner as learners
from kronsae.training.fit import fit
from kronsae.training.learner import SKIPS, Learner, Skipped, why_not_fused
from kronsae.training.stream import Stream

pytest.importorskip("triton")

from kronsae_kernels import step as fused
from kronsae_kernels.triton_impl import launch
from tests.counted import FREE, counted

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KRON = SAEConfig(d_model=12, heads=3, m=2, n=2, k=3)
DENSE = SAEConfig(d_model=12, encoder="dense", dict_size=12, k=3)
NESTED = SAEConfig(d_model=12, heads=4, m=2, n=2, k=3, objective="matryoshka", matryoshka_first=4)
HIERARCHICAL = replace(KRON, objective="hierarchical")
BATCH = replace(KRON, selection="batchtopk")
BATCHES = {
    "kron": BATCH,
    "dense": replace(DENSE, selection="batchtopk"),
    "mul": replace(BATCH, composition="mul"),
    "eps": replace(BATCH, eps=1e-2),
    "nested": replace(NESTED, selection="batchtopk"),
}
JUMPS = {
    name: replace(config, selection="jumprelu", jumprelu_bandwidth=0.4)
    for name, config in {**BATCHES, "nested": NESTED}.items()
    if name != "eps"
}
TRANSCODERS = {
    name: replace(config, d_target=d_target)
    for name, config, d_target in (("kron", KRON, 7), ("dense", DENSE, 20))
}
SETTINGS = {
    **{"tokens": 60, "batch_size": 6, "lr": 1e-2, "dtype": "float32", "weight_decay": 0.01},
    "encoder_lr_ratio": 0.5,
}


def learner(config: SAEConfig, fused_step: str, **settings) -> Learner:
    return Learner(
        config, TrainConfig(**{**SETTINGS, "fused_step": fused_step, **settings}), DEVICE
    )


def batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 12, generator=generator).to(DEVICE) for _ in range(count)]


def assert_same(one: Learner, other: Learner) -> None:
    for name, parameter in one.sae.named_parameters():
        expected = dict(other.sae.named_parameters())[name]
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-6, msg=name)
    for name, buffer in one.sae.named_buffers():
        expected = dict(other.sae.named_buffers())[name]
        torch.testing.assert_close(buffer, expected, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "config, decoder_norm",
    [
        pytest.param(KRON, "unit", id="kron"),
        pytest.param(DENSE, "unit", id="dense", marks=pytest.mark.slow),
        pytest.param(KRON, "free", id="kron-free", marks=pytest.mark.slow),
        pytest.param(NESTED, "unit", id="nested", marks=pytest.mark.slow),
        pytest.param(HIERARCHICAL, "free", id="hierarchical"),
        pytest.param(
            replace(DENSE, objective="matryoshka", matryoshka_first=3),
            "free",
            id="nested-dense-free",
        ),
        pytest.param(replace(KRON, refine=1), "unit", id="refined", marks=pytest.mark.slow),
        pytest.param(replace(BATCH, refine=2), "unit", id="batchtopk-refined"),
    ],
)
def test_fused_and_torch_steps_give_the_same_run(config, decoder_norm):
    """Metrics and weights, with the auxiliary loss, weight decay and clipping."""
    settings = {"dead_after_tokens": 8, "auxk": 4, "max_grad_norm": 0.5, "auxk_fraction": 0.5}
    settings |= {"adam_beta2": 0.9, "decoder_norm": decoder_norm}
    runs = [learner(config, fused_step, **settings) for fused_step in ("on", "off")]
    for x in batches(4):
        ours, theirs = (run.step(x) for run in runs)
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert ours["auxk_loss"] > 0 and ours["dead_share"] > 0
    assert runs[0].fused is not None and runs[1].fused is None
    assert_same(*runs)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", ["kron", "batchtopk", "jumprelu", "hierarchical"])
def test_steps_are_the_same_while_k_changes(name):
    configs = {"kron": KRON, "batchtopk": BATCHES["kron"], "jumprelu": JUMPS["kron"]}
    config = (configs | {"hierarchical": HIERARCHICAL})[name]
    settings = {"k_start": 7, "k_fraction": 0.25, "warmup_fraction": 0.1}
    runs = [learner(config, fused_step, **settings) for fused_step in ("on", "off")]
    for x in batches(4):
        ours, theirs = (run.step(x) for run in runs)
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert [run.sae.selection.k for run in runs] == [3, 3]
    assert_same(*runs)


def same_with_few_and_many(
    config: SAEConfig, monkeypatch, **settings: Any
) -> tuple[Learner, Learner, dict[str, float]]:
    """Three steps of autograd, and of fused runs with few and with enough candidates, all the same.

    k candidates a token are too few in every step: all are made again, which is noticed later.
    Returns the run of autograd, that with few candidates, and its last figures.
    """
    monkeypatch.setattr(learners, "UNCONFIRMED", 2)
    settings |= {"dead_after_tokens": 8, "auxk": 4, "max_grad_norm": 0.5, "adam_beta2": 0.9}
    theirs = learner(config, "off", **settings)
    runs = []
    for candidates in (1, 8):
        monkeypatch.setattr(learners, "CANDIDATES_PER_K", candidates)
        runs.append(learner(config, "on", **settings))
    for number, x in enumerate(batches(3)):
        expected = theirs.step(x)
        for run in runs:
            figures = run.step(x, log=number == 2)
            assert figures is None or figures == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for run in runs:
        assert run.fused is not None and not run.fused.missed.any()
        assert_same(run, theirs)
        assert torch.equal(run.tokens_since_fired, theirs.tokens_since_fired)
        assert run.step_count == 3
    assert runs[0]._width > 3 and runs[1]._width == config.dict_size
    return theirs, runs[0], figures


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n != "kron")) for n in BATCHES],
)
def test_batchtopk_gives_the_same_run(name, monkeypatch):
    """Its threshold, too."""
    same_with_few_and_many(BATCHES[name], monkeypatch)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "kron")) for n in JUMPS]
)
def test_jumprelu_gives_the_same_run(name, monkeypatch):
    """Its thresholds, too: set in the warm-up, and learned, by latents below them as well."""
    theirs, ours, figures = same_with_few_and_many(JUMPS[name], monkeypatch, l0_coefficient=0.3)
    assert figures["l0_loss"] > 0 and "objective" in figures
    assert len(theirs.sae.selection.log_threshold.unique()) > 6
    state = ours.state_dict()["moments"]["selection.log_threshold"]
    theirs = theirs.state_dict()["moments"]["selection.log_threshold"]
    assert state["step"] == theirs["step"] == 3
    torch.testing.assert_close(state["exp_avg"], theirs["exp_avg"], rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_batches_with_too_few_candidates_are_made_again_wherever_somebody_looks(monkeypatch):
    """Before a checkpoint, and one by one: the same bits. A spoiled batch is left out as ever."""
    monkeypatch.setattr(learners, "CANDIDATES_PER_K", 1)
    often, seldom = learner(BATCH, "on"), learner(BATCH, "on")
    for run in (often, seldom):
        run.sae.b_enc.data += 2.0  # nearly all latents are active: some tokens have many of them
    xs = batches(3)
    for x in (xs[0], spoiled(xs[1]), xs[1], xs[2]):
        for run in (often, seldom):
            run.step(x, log=False)
        often.confirm()
    assert int(seldom.fused.missed[1]) == 4
    states = [run.state_dict() for run in (often, seldom)]
    assert states[0]["width"] == states[1]["width"] > 3
    for name, weight in states[0]["weights"].items():
        assert torch.equal(weight, states[1]["weights"][name]), name
    for run in (often, seldom):
        assert run.settle().batches == 1 and run.step_count == 3 and run.skipped == 0
    resumed = learner(BATCH, "on")
    resumed.load_state_dict(states[1])
    for run in (often, resumed):
        run.step(xs[0])
    assert torch.equal(resumed.sae.W_enc, often.sae.W_enc)


def targets_of(xs: list[torch.Tensor], width: int) -> list[torch.Tensor]:
    """What a transcoder is to predict: [B, width], not a function of x alone."""
    generator = torch.Generator().manual_seed(2)
    into = torch.randn(12, width, generator=generator).to(DEVICE)
    return [x @ into + torch.randn(len(x), width, generator=generator).to(DEVICE) for x in xs]


@pytest.mark.parametrize("name", TRANSCODERS)
def test_a_transcoder_has_the_same_run(name):
    """Of a target narrower or wider than x; with clipping and the auxiliary loss."""
    config = TRANSCODERS[name]
    settings = {"dead_after_tokens": 8, "auxk": 4, "max_grad_norm": 0.5, "adam_beta2": 0.9}
    runs = [learner(config, fused_step, **settings) for fused_step in ("on", "off")]
    xs = batches(4)
    for x, target in zip(xs, targets_of(xs, config.d_target), strict=True):
        ours, theirs = (run.step(x, target) for run in runs)
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert ours["auxk_loss"] > 0
    assert runs[0].fused is not None and runs[1].fused is None
    assert_same(*runs)


def test_a_transcoder_with_a_linear_skip_trains_by_autograd():
    config = replace(TRANSCODERS["kron"], skip=True)
    assert "skip" in why_not_fused(config, TrainConfig(fused_step="on"), DEVICE)


def test_a_run_goes_on_with_the_other_step():
    whole, first = learner(KRON, "off"), learner(KRON, "on")
    xs = batches(4)
    for x in xs[:2]:
        whole.step(x), first.step(x)
    second, third = learner(KRON, "off"), learner(KRON, "on")
    second.load_state_dict(first.state_dict())
    whole.step(xs[2]), second.step(xs[2])
    third.load_state_dict(second.state_dict())
    whole.step(xs[3]), third.step(xs[3])
    assert_same(third, whole)


def test_not_finite_activations_leave_the_weights_as_they_were():
    subject, (x,) = learner(KRON, "on"), batches(1)
    subject.step(x)
    before = {name: p.detach().clone() for name, p in subject.sae.named_parameters()}
    x[3, 4] = torch.nan
    assert "gradient norm is nan" in subject.step(x).reason
    for name, parameter in subject.sae.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_jumprelu_with_eps_trains_by_autograd():
    config = replace(KRON, selection="jumprelu", eps=1e-3)
    assert "eps is 0.001" in why_not_fused(config, TrainConfig(fused_step="on"), DEVICE)


def test_prefixes_that_no_program_holds_train_by_autograd():
    many = SAEConfig(
        d_model=8, encoder="dense", dict_size=2**33, k=1, objective="matryoshka", matryoshka_first=1
    )
    assert "34 prefixes" in why_not_fused(many, TrainConfig(fused_step="on"), DEVICE)


def test_choice_of_the_step():
    assert "off" in why_not_fused(KRON, TrainConfig(fused_step="off"), DEVICE)
    auto = why_not_fused(KRON, TrainConfig(fused_step="auto"), DEVICE)
    assert auto is None if DEVICE.type == "cuda" else "GPU" in auto
    wide = SAEConfig(d_model=10_000, heads=4, m=2, n=3, k=3)
    with pytest.raises(InputError, match="10000"):
        learner(wide, "on")
    with pytest.raises(InputError, match="fused_step"):
        TrainConfig(fused_step="yes")


# Nothing is asked of the device


def spoiled(x: torch.Tensor, size: float = 1e30) -> torch.Tensor:
    x = x.clone()
    x[3, 4] = size
    return x


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "config, operations_of, kernels_of",
    [
        *((KRON, 14, 12), (DENSE, 16, 12), (NESTED, 16, 15), (BATCH, 32, 14)),
        (JUMPS["kron"], 56, 22),
    ],
    ids=["kron", "dense", "nested", "batchtopk", "jumprelu"],
)
def test_a_step_is_few_operations_and_waits_for_nothing(
    config, operations_of, kernels_of, monkeypatch
):
    """Off log steps; where it logs, it waits once. Prefixes take four kernels for one."""
    monkeypatch.setattr(learners, "CANDIDATES_PER_K", 8)
    subject = learner(config, "on", dtype="bfloat16", dead_after_tokens=10**9)
    for log in (False, False, True):  # the first one makes copies of the weights
        (x,) = batches(1)
        with counted() as counts:
            subject.step(x, log=log)
        assert len(counts.waits) == log, counts.waits
        if not log:
            quiet = counts
    assert sum(quiet.operations.values()) <= operations_of, quiet.operations
    assert len(quiet.kernels) <= kernels_of, quiet.kernels


def test_a_step_with_dead_latents_waits_for_nothing_either():
    subject = learner(KRON, "on", dtype="bfloat16", dead_after_tokens=8, auxk=4)
    for x in batches(3):
        with counted() as counts:
            subject.step(x, log=False)
        assert not counts.waits
    assert sum(counts.operations.values()) <= 50, counts.operations
    assert len(counts.kernels) <= 16, counts.kernels


def test_a_step_of_the_trainer_is_few_operations():
    """At the shape of the speed goals, with the batch's way to it, where nothing can be read."""

    class Source:
        d_model = 2304

        def __iter__(self):
            while True:
                yield torch.empty(8192, 2304, device="meta")

    config = SAEConfig(d_model=2304, heads=8192, m=2, n=4, k=50)
    settings = TrainConfig(fused_step="on", dtype="bfloat16")
    meta = torch.device("meta")
    with launch.record("sm_90"):
        subject = Learner(config, settings, meta)
        stream = Stream(Source(), settings.tokens, meta)
        stream.batches = iter(Source())
        stream.normalizer = Normalizer(torch.empty(2304, device="meta"), 1.0)
        for _ in range(2):
            with counted() as counts:
                subject.step(*stream.next(), log=False)
    assert not counts.waits
    # Nine of them put other tokens in the place of massive ones.
    assert sum(counts.operations.values()) <= 34, counts.operations


@pytest.mark.slow
def test_skipped_batches_are_heard_of_where_somebody_asks():
    subject, (x, *_) = learner(KRON, "on"), batches(1)
    assert subject.step(x, log=False) is None and subject.settle() is None
    before = {name: p.detach().clone() for name, p in subject.sae.named_parameters()}
    silent = subject.tokens_since_fired.clone()
    subject.step(spoiled(x), log=False), subject.step(spoiled(x, 1e35), log=False)
    for name, parameter in subject.sae.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert torch.equal(subject.tokens_since_fired, silent)
    reason, largest, count = subject.settle()
    assert reason == "gradient norm is nan" and count == 2
    assert largest == pytest.approx(1e30)
    assert (subject.step_count, subject.tokens, subject.skipped) == (1, 15, 2)
    assert subject.settle() is None
    assert subject.step(spoiled(x)) == Skipped(reason, pytest.approx(1e30))  # asked at once
    assert subject.state_dict()["skipped"] == 3
    resumed = learner(KRON, "on")
    resumed.load_state_dict(subject.state_dict())
    for _ in range(SKIPS - 3):
        resumed.step(spoiled(x), log=False)
    resumed.step(x, log=False)
    with pytest.raises(FloatingPointError, match=f"{SKIPS} batches in a row: .* diverged"):
        resumed.settle()
    assert subject.step(x)["loss"] > 0 and subject.skipped == 0


def test_an_error_whose_square_overflows_is_not_learned_from():
    """Its gradients are finite, and second moments, their squares, would be infinite for good."""
    subject, (x,) = learner(KRON, "on"), batches(1)
    subject.step(spoiled(x, 1e16), log=False)
    assert subject.settle().batches == 1
    subject.step(spoiled(x, 1e6), log=False)
    assert subject.settle() is None
    moments = [moment for state in subject.fused.state.values() for moment in state.values()]
    assert all(moment.isfinite().all() for moment in moments)


class Tape:
    """Stands for `torch.cuda.CUDAGraph`: what was asked for in a capture happens in replays only.

    It holds the tensors that it saw, so that another one, made later, would not be read.
    """

    held: list[torch.Tensor] = []
    made: list["Tape"] = []

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.replays = 0
        self.made.append(self)

    def pool(self) -> str:
        return "pool"

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for call in self.calls:
                call()


@contextmanager
def recording(tape: Tape, **options: Any):
    """Stands for `torch.cuda.graph`."""
    assert options["capture_error_mode"] == "thread_local"
    before = [tensor.detach().clone() for tensor in Tape.held]
    started = launch.start

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            found = function(*args, **kwargs)
            if function._schema.is_mutable:
                tape.calls.append(lambda: function(*args, **kwargs))
            elif function.overloadpacket.__name__ not in FREE:
                into = found if isinstance(found, tuple) else (found,)

                def again() -> None:
                    new = function(*args, **kwargs)
                    new = new if isinstance(new, tuple) else (new,)
                    for old, value in zip(into, new, strict=True):
                        old.copy_(value)

                tape.calls.append(again)
            return found

    def noted(one: launch.Launch) -> None:
        tape.calls.append(lambda: started(one))
        with _disable_current_modes():
            started(one)

    launch.start = noted
    try:
        with Mode():
            yield
    finally:
        launch.start = started
        for tensor, value in zip(Tape.held, before, strict=True):
            tensor.copy_(value)


@pytest.fixture
def taped(monkeypatch):
    """CUDA graphs on a CPU: captures are noted, and replayed call by call."""
    monkeypatch.setattr(fused, "why_not_graphed", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(Tape, "held", [])
    monkeypatch.setattr(Tape, "made", [])


def tensors_of(subject: Learner) -> list[torch.Tensor]:
    states = [tensor for state in subject.fused.state.values() for tensor in state.values()]
    weights = [weight.detach() for weight in subject.fused.weights.values()]
    counters = [subject.tokens_since_fired, subject.fused.skips, subject.fused.missed]
    counters += list(subject.sae.buffers())
    return [*weights, *states, *counters, *subject.fused._copies.values()]


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type == "cuda", reason="graphs are real here")
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(KRON, id="plain"),
        pytest.param(NESTED, id="nested", marks=pytest.mark.slow),
        pytest.param(BATCH, id="batchtopk", marks=pytest.mark.slow),
        pytest.param(JUMPS["kron"], id="jumprelu", marks=pytest.mark.slow),
    ],
)
def test_a_step_is_captured_and_replayed(config, taped, monkeypatch):
    """Replays change the same tensors to the same bits; batches of another size are left out."""
    monkeypatch.setattr(learners, "CANDIDATES_PER_K", 8)  # of batchtopk: no step is made again
    monkeypatch.setattr(fused.GraphedStep, "WARMUP", 1)
    settings = {"dtype": "bfloat16", "dead_after_tokens": 15, "auxk": 4, "tokens": 1000}
    runs = [learner(config, "on", **settings, cuda_graph=how) for how in ("auto", "off")]
    for run in runs:
        run.sae.b_enc.data[0] -= 9.0  # these latents are silent from the start
    for number, x in enumerate(batches(8)):
        x = x[:3] if number == 2 else spoiled(x) if number == 6 else x
        Tape.held = tensors_of(runs[0])
        figures = [run.step(x, log=number % 2 == 1) for run in runs]
        assert figures[0] == figures[1]
        for ours, theirs in zip(*map(tensors_of, runs), strict=True):
            assert torch.equal(ours, theirs), number
    assert [tape.replays for tape in Tape.made] == [2, 3]  # without, and with the auxiliary loss
    assert figures[0]["auxk_loss"] > 0
    Tape.held = tensors_of(runs[0])
    for run in runs:  # weights that others change are copied again
        run.load_state_dict(runs[1].state_dict())
        with torch.no_grad():
            run.sae.W_dec.mul_(0.5)
        run.step(x, log=False)
    assert torch.equal(*[run.sae.W_dec for run in runs])
    assert runs[0].graph_problem is None


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type == "cuda", reason="graphs are real here")
def test_a_transcoders_step_is_replayed_with_its_target(taped, monkeypatch):
    monkeypatch.setattr(fused.GraphedStep, "WARMUP", 1)
    config, settings = TRANSCODERS["kron"], {"dead_after_tokens": 10**9}
    runs = [learner(config, "on", **settings, cuda_graph=how) for how in ("auto", "off")]
    xs = batches(4)
    for x, target in zip(xs, targets_of(xs, config.d_target), strict=True):
        Tape.held = tensors_of(runs[0])
        figures = [run.step(x, target) for run in runs]
        assert figures[0] == figures[1]
    for ours, theirs in zip(*map(tensors_of, runs), strict=True):
        assert torch.equal(ours, theirs)
    assert [tape.replays for tape in Tape.made] == [3]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="graphs are real here")
def test_a_capture_that_fails_leaves_steps_as_they_are(taped, monkeypatch):
    @contextmanager
    def fails(*_: Any, **__: Any):
        yield
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "graph", fails)
    monkeypatch.setattr(launch, "start", lambda one: None)
    subject = learner(KRON, "on", dead_after_tokens=10**9)
    for x in batches(5):
        subject.step(x, log=False)
    assert subject.graph_problem == "operation not permitted when stream is capturing"
    assert not subject.fused._parts


@pytest.mark.gpu
@pytest.mark.parametrize(
    "config",
    [KRON, DENSE, NESTED, BATCH, JUMPS["kron"]],
    ids=["kron", "dense", "nested", "batchtopk", "jumprelu"],
)
def test_graphs_on_a_card(config):
    settings = {"dtype": "bfloat16", "dead_after_tokens": 30, "auxk": 4, "tokens": 1000}
    runs = [learner(config, "on", **settings, cuda_graph=how) for how in ("auto", "off")]
    for number, x in enumerate(batches(14)):
        x = x[:3] if number == 4 else spoiled(x) if number == 12 else x
        figures = [run.step(x, log=number % 2 == 1) for run in runs]
        assert figures[0] == figures[1]
    for ours, theirs in zip(*map(tensors_of, runs), strict=True):
        assert torch.equal(ours, theirs)
    assert runs[0].graph_problem is None


# In a run


X = torch.randn(40, 12, generator=torch.Generator().manual_seed(3))
RUN = TrainConfig(
    **SETTINGS | {"tokens": 40, "batch_size": 5, "log_every": 4, "fused_step": "on"},
)


@pytest.mark.slow
def test_a_run_records_what_was_skipped_between_its_lines():
    x, records = X.clone(), []
    x[37] = 1e30
    result = fit(KRON, x, replace(RUN, massive_multiple=0.0), on_record=records.append)
    (skipped,) = [record for record in records if record["kind"] == "skipped"]
    assert skipped["batches"] == 1 and skipped["largest"] > 1e28
    assert skipped["step"] % RUN.log_every == 0 and "nan" in skipped["reason"]
    assert result.tokens == 40 and all(p.isfinite().all() for p in result.sae.parameters())


@pytest.mark.slow
def test_a_run_that_diverges_ends_where_it_is_noticed(tmp_path):
    def batches():
        yield X[:10]
        while True:  # fewer than a tenth of all, so that they do not set the scale
            yield spoiled(X[:10])

    config = replace(RUN, tokens=110, log_every=SKIPS + 2, batch_size=10, massive_multiple=0.0)
    with pytest.raises(InputError, match=f"{SKIPS} batches in a row"):
        fit(KRON, batches(), config, out=tmp_path / "run")
    sae = load(tmp_path / "run" / "sae")
    assert all(p.isfinite().all() for p in sae.parameters())
    assert sae.metadata["tokens"] == 10 * (SKIPS + 1)


@pytest.mark.slow
def test_a_run_with_bfloat16_moments_goes_on_from_its_checkpoint():
    """To the bit, as the rounding of a step depends on its number; and it takes half the bytes."""
    whole, first, second = (learner(KRON, "on", moments="bfloat16") for _ in range(3))
    xs = batches(4)
    for x in xs:
        whole.step(x)
    for x in xs[:2]:
        first.step(x)
    state = first.state_dict()
    assert state["moments"]["W_enc"]["exp_avg_sq"].dtype == torch.bfloat16
    assert state["moments"]["b_dec"]["exp_avg_sq"].dtype == torch.float32
    second.load_state_dict(state)
    for x in xs[2:]:
        second.step(x)
    for name, parameter in second.sae.named_parameters():
        assert torch.equal(parameter, dict(whole.sae.named_parameters())[name]), name


def test_bfloat16_moments_are_rounded_alike_without_the_fused_step():
    """Of the first step, which starts from equal weights: few differ, by gradients' last bits."""
    states = []
    for how in ("on", "off"):
        subject = learner(KRON, how, moments="bfloat16")
        subject.step(batches(1)[0])
        states.append(subject.state_dict()["moments"])
    for name in ("W_enc", "W_dec"):
        for moment in ("exp_avg", "exp_avg_sq"):
            fused, other = (state[name][moment] for state in states)
            assert fused.dtype == other.dtype == torch.bfloat16
            assert (fused != other).float().mean() < 0.02, (name, moment)
