"""Every operation against the truth (see `truth`), at many shapes."""

import zlib

import hypothesis.strategies as st
import pytest
from hypothesis import given, seed, settings
from truth import CHECKS, DTYPES, LAYOUTS, Case

from kronsae_kernels.common import COMPOSITIONS

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SHAPES_A_DTYPE = 40
"""Distinct shapes that each test below must have run at, for each dtype."""
of_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).split(".")[1])
CORNERS = (
    {f"{composition}, mask {mask}" for composition in COMPOSITIONS for mask in (False, True)}
    | {"eps 0.0", "eps 1e-05", "bias False", "bias True"}
    | {f"x {layout}" for layout in ("contiguous", "reversed", "strided")}
    | {f"w {layout}" for layout in LAYOUTS}
    | {f"g {layout}" for layout in ("contiguous", "reversed", "expanded")}
    | {"1-D x", "2-D x", "3-D x", "B = 0", "B = 1", "k = F", "h >= 64 k, k > 1"}
    | {f"{name} = 1" for name in "kmnhd"}
)
"""Every test must have met each of these, or it fails."""


@st.composite
def cases(draw) -> Case:
    small = st.integers(1, 5)
    heads = draw(st.one_of(st.just(1), st.integers(2, 24)))
    m, n, d = draw(small), draw(small), draw(st.one_of(st.just(1), st.integers(2, 12)))
    k_at_most = heads + 3  # k below, at and above the number of heads
    if draw(st.integers(0, 3)) == 0:  # many more heads than k: selected in two rounds
        heads, m, n = draw(st.sampled_from([64, 144, 512])), draw(st.integers(1, 3)), 2
        k_at_most = heads // 64
    size = heads * m * n
    k_of_many = st.integers(1, min(size, k_at_most))
    k = draw(st.one_of(st.just(1), st.just(size), k_of_many) if heads < 64 else k_of_many)
    return Case(
        lead=draw(st.lists(st.integers(0, 4), max_size=2).map(tuple)),
        heads=heads,
        m=m,
        n=n,
        d=d,
        k=k,
        composition=draw(st.sampled_from(COMPOSITIONS)),
        eps=draw(st.sampled_from([0.0, 1e-5])),
        bias=draw(st.booleans()),
        mask=draw(st.booleans()),
        x_layout=draw(st.sampled_from(["contiguous", "reversed", "strided"])),
        w_layout=draw(st.sampled_from(list(LAYOUTS))),
        g_layout=draw(st.sampled_from(["contiguous", "reversed", "expanded"])),
        seed=draw(st.integers(0, 2**31)),
    )


def run_cases(check, name: str, enough: int = SHAPES_A_DTYPE) -> None:
    """check(case) until it was at `enough` distinct shapes and all CORNERS; `name`: a seed."""
    shapes, corners = set(), set()

    @seed(zlib.crc32(name.encode()))
    @settings(max_examples=5 * enough, derandomize=False)
    @given(cases())
    def run(case):
        if len(shapes) < enough or not corners >= CORNERS:
            shapes.add(case.shape)
            corners.update(case.corners())
            check(case)

    run()
    print(f"{name}: {len(shapes)} shapes")
    assert len(shapes) >= enough
    assert corners >= CORNERS, CORNERS - corners


def check(operation, exact, dtype, name, **options) -> None:
    def both(case):
        for impl in ("torch", "reference"):
            CHECKS[operation](case, dtype, exact, impl)

    run_cases(both, name, **options)


@pytest.mark.one_in(3)
@of_dtype
@pytest.mark.parametrize("exact", [True, False], ids=["integers", "normal"])
@pytest.mark.parametrize("operation", CHECKS)
def test_many_shapes(operation, exact, dtype):
    check(operation, exact, dtype, f"{operation} {exact} {dtype}")


@pytest.mark.slow
@of_dtype
@pytest.mark.parametrize("exact", [True, False], ids=["integers", "normal"])
@pytest.mark.parametrize("operation", CHECKS)
def test_very_many_shapes(operation, exact, dtype):
    check(operation, exact, dtype, f"slow {operation} {exact} {dtype}", enough=3000)
