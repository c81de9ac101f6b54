"""The model of many GPUs: a single card's floors, laws that hold, and the document's tables."""

import pytest

from benchmarks import scale
from benchmarks.shapes import SHAPES, Shape

DESIGN = {"P1": 1.4, "P2": 3.1, "P3": 6.6, "P4": 58.0}
"""Floors of a fused step on one H200, ms, as the design counts them."""


@pytest.mark.parametrize("name", DESIGN)
def test_one_card_is_the_designs_floor(name):
    one = scale.step(SHAPES[name], 1, scale.H200)
    assert one["exchange"] == one["maxima"] == 0
    autoencoder = sum(one.values()) - one["language model"]
    assert autoencoder == pytest.approx(DESIGN[name], rel=0.2)


def test_what_is_split_shrinks_and_what_is_exchanged_stays():
    few, many = (scale.step(scale.SHAPE, ranks, scale.H200) for ranks in (64, 512))
    for name in ("language model", "encode", "optimizer"):
        assert few[name] / many[name] == pytest.approx(8, rel=0.1)
    assert few["exchange"] < many["exchange"] < 1.2 * few["exchange"]
    gathered, counted = zip(
        *(scale.maxima_seconds(scale.SHAPE, ranks, scale.H200) for ranks in (64, 512)), strict=True
    )
    assert gathered[1] > 7 * gathered[0]
    assert counted[1] == pytest.approx(counted[0], rel=0.1)


def test_bytes_of_a_gather_by_hand():
    """8 GB in a node of 8: 7 GB come over the link. In 2 nodes, half of it over the network."""
    machine = scale.H200._replace(link_bytes_per_s=7e9, network_bytes_per_s=1e9)
    assert scale.gather_seconds(8e9, 8, machine) == pytest.approx(1.0)
    assert scale.gather_seconds(8e9, 16, machine) == pytest.approx(4.0)
    assert scale.gather_seconds(8e9, 1, machine) == 0


def test_memory_by_hand():
    """F = 8 of width 2 and two heads (2 + 2): 8 rows and 8 rows, biases, on two ranks."""
    shape = Shape("hand", d=2, heads=2, m=2, n=2, k=1, tokens=10)
    weights = 8 * 3 + 8 * 2 + 2
    expected = weights / 2 * 14 + 8 * 8 / 2 + 2 * 10 * 8 / 2 + 10 * 2 * 8
    assert scale.memory_bytes(shape, 2, "float32") == expected
    assert scale.fits(shape, 2, scale.H200) == "float32"
    assert scale.fits(shape, 2, scale.H200._replace(memory_bytes=expected)) == "bfloat16"
    assert scale.fits(shape, 2, scale.H200._replace(memory_bytes=1)) == "no"


def test_the_documents_tables_are_the_commands():
    document = scale.DOCUMENT.read_text(encoding="utf-8")
    assert scale.put(document, scale.tables()) == document
    gradients = 4 * scale.SHAPE.parameters("kron")  # in bfloat16, there and back
    assert f"{gradients / 1e9:,.0f} GB" in document and f"{gradients / 64e9:.1f} GB" in document
    assert scale.SHAPE.tokens * scale.SHAPE.k / scale.SHAPE.dict_size < 0.032
