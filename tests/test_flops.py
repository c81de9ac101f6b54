"""Multiply-adds: the paper's count by hand, and a training step against what torch counts."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from kronsae import InputError, SAEConfig
from kronsae.model import flops
from kronsae.model.flops import flops_per_token
from kronsae.model.sae import SAE


def test_forward_is_eq_7_by_hand():
    """[KronSAE, eq. 7]: d F + k d and d h (m + n) + m n h + k d."""
    assert flops.forward(10, 24, 5) == 10 * 24 + 5 * 10
    assert flops.forward(10, 24, 5, heads=3, m=2, n=4) == 10 * 3 * 6 + 24 + 5 * 10


@pytest.mark.parametrize("encoder", ["kron", "dense"])
def test_configs_and_benchmarks_count_alike(encoder):
    from benchmarks.shapes import SHAPES

    shape = SHAPES["P2"]
    size = {"heads": shape.heads, "m": shape.m, "n": shape.n} if encoder == "kron" else {}
    config = SAEConfig(
        d_model=shape.d, encoder=encoder, dict_size=shape.dict_size, k=shape.k, **size
    )
    assert flops_per_token(config) == shape.flops_per_token(encoder)


@pytest.mark.parametrize("encoder", ["kron", "dense"])
def test_matrix_product_of_a_step_is_what_torch_counts(encoder):
    """The step's only matrix product is the encoder's, forward: no backward product is dense."""
    d, batch, size = 16, 32, {"heads": 12, "m": 2, "n": 4} if encoder == "kron" else {}
    sae = SAE(SAEConfig(d_model=d, encoder=encoder, dict_size=96, k=4, **size))
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiled:
        sae(torch.randn(batch, d)).loss.backward()
    products = ("aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm")
    counted = sum(event.flops for event in profiled.key_averages() if event.key in products)
    step = flops.training_step(d, 96, 4, batch, **size)
    assert counted == 2 * batch * step.encode


def test_training_step_by_hand():
    step = flops.training_step(10, 24, 2, 100, heads=3, m=2, n=4, auxk=5, auxk_fraction=0.5)
    parameters = 18 * 11 + 24 * 10 + 10
    assert step == flops.Step(
        encode=180,
        select=3 + 2 * 8,
        decode=20,
        decoder_backward=40,
        encoder_backward=40,
        auxk=0.5 * (180 + 24 + 5 * 10 * 5),
        optimizer=(8 * parameters + 3 * 240) / 100,
    )
    assert step.total == sum(step)
    dense = flops.training_step(10, 24, 2, 100)
    assert dense.select == dense.auxk == 0 and dense.encoder_backward == 20


def test_equal_budget():
    """A cheaper encoder sees more tokens, for the same product of tokens and FLOPs."""
    assert flops.equal_budget(1000, 300, 200) == 1500
    assert flops.equal_budget(1000, 200, 200) == 1000
    assert flops.equal_budget(1, 1, 100) == 1
    for wrong in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        with pytest.raises(InputError, match="expected >= 1"):
            flops.equal_budget(*wrong)
