"""Times that a plan predicts: exact where the law holds, and near what then happens."""

import time

import pytest
import torch
from tiny_models import FAMILIES, save_model

from benchmarks import plan as against
from kronsae import DataConfig, SAEConfig, TrainConfig
from kronsae.plan import time as calibrate
from kronsae.plan.outline import outline, time_block
from kronsae.training.learner import Learner

CPU = torch.device("cpu")
LARGE = SAEConfig(d_model=512, heads=8192, m=4, n=4, k=32)
TRAIN = TrainConfig(batch_size=8192)


@pytest.mark.parametrize(
    "sae",
    [
        LARGE,
        SAEConfig(d_model=512, encoder="dense", dict_size=2**17, k=32),
        SAEConfig(d_model=64, heads=8192, m=4, n=4, k=32, objective="matryoshka"),
        SAEConfig(d_model=512, heads=8192, m=4, n=4, k=32, experts=4),
    ],
    ids=["kron", "dense", "matryoshka", "experts"],
)
def test_an_affine_law_is_found(sae, monkeypatch):
    """t = a + b B + c F + e B F in small steps gives t of the large one, whose work is never done.

    (Of experts, and of nested parts, the dictionary may not be divisible: then in B alone.)
    """
    asked = []

    def law(one, rows):
        return 3e-3 + 2e-6 * rows + 5e-9 * one.dict_size + 1e-11 * rows * one.dict_size

    def fake(one, train, device, clock, rows):
        asked.append((one, rows))
        return law(one, rows), 2 * law(one, rows), 0.5 * law(one, rows)

    monkeypatch.setattr(calibrate, "_time_steps", fake)
    plain, reviving, judging = calibrate.step_seconds(sae, TRAIN, CPU, time.process_time)
    assert plain == pytest.approx(law(sae, 8192) / 8192)
    assert reviving == pytest.approx(2 * plain) and judging == pytest.approx(plain / 2)
    for one, rows in asked:
        weights = (one.encoder_rows + one.dict_size) * one.d_model
        assert weights <= calibrate.WEIGHTS["cpu"] and rows < 8192


def test_what_is_small_is_timed_as_it_is(monkeypatch):
    asked = []
    small = SAEConfig(d_model=16, heads=16, m=2, n=2, k=4)
    monkeypatch.setattr(
        calibrate, "_time_steps", lambda *given: asked.append(given) or (1.0, 2.0, 3.0)
    )
    found = calibrate.step_seconds(small, TrainConfig(batch_size=10), CPU, time.process_time)
    assert found == pytest.approx((0.1, 0.2, 0.3))
    assert [(given[0], given[-1]) for given in asked] == [(small, 10)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_runs_as_its_model_calls_it(family, tmp_path):
    """On random numbers, for every kind of model; multiply-adds are a block's of the outline."""
    config = DataConfig(model=str(save_model(tmp_path, family)), layer=1)
    outputs = []

    def timed(call):
        outputs.append(call())
        return 1.0

    block = time_block(config, 3, 16, CPU, torch.float32, timed)
    output = outputs.pop()
    hidden = output if isinstance(output, torch.Tensor) else output[0]
    assert hidden.shape == (3, 16, 32) and hidden.isfinite().all()
    both = outline(config, context_length=16).flops_per_token
    assert block.flops_per_token == pytest.approx(both / 2) and block.contexts == 3
    # As many contexts as training reads at once, if they are not too much work: fewer would lie in
    # the cache.
    work = 2.5 * 16 * block.flops_per_token
    fewer = time_block(config, 3, 16, CPU, torch.float32, timed, work)
    assert fewer.contexts == 2 and fewer.seconds == 1.0


def test_reviving_dead_latents_costs_more():
    sae = SAEConfig(d_model=64, encoder="dense", dict_size=2048, k=4)
    train = TrainConfig(batch_size=512, auxk_fraction=1.0)
    plain, reviving, judging = calibrate.step_seconds(sae, train, CPU, time.process_time)
    assert 0 < judging < plain < reviving
    without = TrainConfig(batch_size=512, auxk_coefficient=0.0)
    plain, reviving, _ = calibrate.step_seconds(sae, without, CPU, time.process_time)
    assert plain == reviving


def test_as_many_latents_are_dead_as_the_auxiliary_loss_takes():
    for size, dead in ((64, 32), (16, 16)):
        sae = SAEConfig(d_model=64, encoder="dense", dict_size=size, k=4)
        learner = Learner(sae, TrainConfig(batch_size=8), CPU)
        calibrate.kill(learner)
        places = learner.dead.nonzero().squeeze(1)
        assert len(places) == dead and places[-1] >= size - size // dead


def test_plan_and_measurement_of_a_small_run():
    """Loosely, as one round is; the processor's own time, in turns."""
    threads = torch.get_num_threads()
    try:
        found = against.measure_time("small batch", "cpu", "cpu", rounds=1)
    finally:
        torch.set_num_threads(threads)
    planned, measured = found["planned"], found["measured"]
    assert planned["total"] == pytest.approx(measured["total"], rel=0.5)
    assert planned["bottleneck"] == "language model" and measured["reading"] > measured["learning"]


@pytest.mark.slow
def test_plan_and_measurement():
    """Memory within 20 % in all configurations, and the right bottleneck.

    Time is within 20 %, too, on a machine that has nothing else to do: `python -m benchmarks.plan`.
    """
    for one in against.compare(list(against.CONFIGURATIONS), "cpu", "cpu", 3):
        planned, measured = one["planned"], one["measured"]
        for key in ("total", "reviving_total"):
            assert planned[key] == pytest.approx(measured[key], rel=0.5), (key, one)
        assert one["memory"]["planned"] == pytest.approx(one["memory"]["measured"], rel=0.2), one
        reading = measured["reading"] > measured["learning"]
        assert planned["bottleneck"] == ("language model" if reading else "autoencoder"), one
