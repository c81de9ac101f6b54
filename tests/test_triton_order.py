"""Sums of frequent rows; results that depend on neither the order of programs nor the run."""

import itertools

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from kronsae_kernels import (
    dense_encode,
    fused_encode,
    nested_decode,
    sparse_decode,
    threshold_encode,
)
from kronsae_kernels.triton_impl import configs, operations

pytestmark = pytest.mark.long

B, D, H, M, N, K = 7, 37, 3, 2, 3, 7
F = H * M * N


@pytest.fixture(autouse=True)
def small_blocks():
    with (
        configs.override("select_heads", PER_PROGRAM=16, LANES=16),
        configs.override("segments", ROW_LENGTH=3, HEAD_LENGTH=8),
        configs.override("count_above", HEADS=2),
    ):
        yield


@pytest.fixture
def tensors(device) -> dict[str, Tensor]:
    return {
        name: torch.randn(shape).to(device)
        for name, shape in {
            "x": (B, D),
            "w_enc": (H, M + N, D),
            "b_enc": (H, M + N),
            "w_dense": (F, D),
            "b_dense": (F,),
            "w_dec": (F, D),
            "b_dec": (D,),
        }.items()
    }


def results(tensors: dict[str, Tensor], subset: tuple[str, ...] | None = None) -> dict[str, Tensor]:
    """Codes, reconstructions and gradients of two autoencoders; of `subset` alone, if given."""
    leaves = {
        name: tensor.clone().requires_grad_(subset is None or name in subset)
        for name, tensor in tensors.items()
    }
    x, w_enc, b_enc, w_dense, b_dense, w_dec, b_dec = leaves.values()
    kron = fused_encode(x, w_enc, b_enc, m=M, k=K, eps=1e-5, impl="triton")
    dense = dense_encode(x, w_dense, b_dense, k=K, impl="triton")
    found = {}
    for name, codes in (("kron", kron), ("dense", dense)):
        found[name], found[f"{name} indices"] = codes.values.detach(), codes.indices
        found[f"{name} out"] = sparse_decode(codes, w_dec=w_dec, b_dec=b_dec, impl="triton")
    level = torch.full((F,), 0.9, device=x.device)
    above = threshold_encode(x, w_enc, b_enc, threshold=level, m=M, impl="triton")
    found["above"], found["above indices"] = above.values.detach(), above.indices
    for name, codes in (("kron", kron), ("above", above)):
        found[f"{name} nested"] = nested_decode(codes, [2, 9, F - 3], w_dec, b_dec, impl="triton")
    loss = sum(out.square().sum() for name, out in found.items() if out.requires_grad)
    loss.backward()
    found |= {f"d {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {name: tensor.detach() for name, tensor in found.items()}


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in got.items():
        assert torch.equal(tensor, expected[name]), name


# Order of programs


@triton.jit
def _last(out):
    tl.store(out, tl.program_id(0) * tl.num_programs(1) + tl.program_id(1))


@pytest.fixture
def shuffled(device, monkeypatch):
    """A function; after it was called, every grid runs in another, random order."""
    if device.type != "cpu":
        pytest.skip("the order of programs is the interpreter's to choose")
    from triton.runtime.interpreter import interpreter_builder

    hooks = ("set_grid_dim", "set_grid_idx")
    if not all(hasattr(interpreter_builder, hook) for hook in hooks):
        pytest.skip(f"Triton {triton.__version__}'s interpreter has no {' and '.join(hooks)}")
    set_size, set_index = (getattr(interpreter_builder, hook) for hook in hooks)
    generator = torch.Generator().manual_seed(0)
    order: dict[tuple[int, ...], tuple[int, ...]] = {}

    def shuffle(*size: int) -> None:
        programs = list(itertools.product(*map(range, size)))
        places = torch.randperm(len(programs), generator=generator).tolist()
        order.clear()
        order.update(zip(programs, (programs[place] for place in places), strict=True))
        set_size(*size)

    def start() -> None:
        monkeypatch.setattr(interpreter_builder, "set_grid_dim", shuffle)
        monkeypatch.setattr(interpreter_builder, "set_grid_idx", lambda *at: set_index(*order[at]))

    return start


def test_order_of_programs_is_shuffled(shuffled):
    """What only the last program leaves depends on the order: else the next test says nothing."""
    out, last = torch.zeros(1, dtype=torch.int32), set()
    _last[(3, 2)](out)
    assert out.item() == 5
    shuffled()
    for _ in range(30):
        _last[(3, 2)](out)
        last.add(out.item())
    assert last == set(range(6))


def test_order_of_programs_changes_no_bit(tensors, shuffled):
    expected = results(tensors)
    shuffled()
    assert_equal(results(tensors), expected)


@pytest.mark.slow
def test_runs_agree_to_the_bit(tensors):
    """And all is deterministic in torch's eyes."""
    expected = results(tensors)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert_equal(results(tensors), expected)
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize(
    "subset",
    [
        pytest.param(names, marks=[pytest.mark.slow] * (len(names) != 2), id="-".join(names))
        for names in (("x",), ("w_enc", "w_dec"), ("b_enc", "b_dense", "b_dec"))
    ],
)
def test_any_subset_of_gradients(tensors, subset):
    """The others are not computed, and what is asked for is the same to the bit."""
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    found = results(tensors, subset)
    assert {name for name in found if name.startswith("d ")} == {f"d {name}" for name in subset}
    assert_equal(found, results(tensors))
    assert_equal(tensors, before)


# Frequent rows


def codes_of(counts: list[int], columns: int, device: torch.device) -> Tensor:
    """Indices [B, columns] in which row f comes counts[f] times."""
    rows = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return rows[torch.randperm(len(rows))].view(-1, columns).to(device)


COUNTS = [0, 1, 4, 5, 0, 8, 9, 33, 0, 0, 30, 0]
"""Of rows: none, one segment and several, whole and not; the last has none."""


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("length", [1, 4, 7, 1000])
def test_length_of_segments_changes_no_integer(length, device):
    """Sums of integers are exact: whole rows or segments, the sum is the same."""
    indices = codes_of(COUNTS, 5, device)
    y = torch.randint(-3, 4, (len(indices), D), device=device).float()
    values = torch.randint(-3, 4, indices.shape, device=device).float()
    one_hot = torch.nn.functional.one_hot(indices, len(COUNTS)).double()
    expected = torch.einsum("bkf,bk,bd->fd", one_hot, values.double(), y.double())
    entries = operations.Entries.of(indices, len(COUNTS), (values,))
    out, out_bias = torch.empty(len(COUNTS), D, device=device), torch.empty(12, device=device)
    with configs.override("segments", ROW_LENGTH=length):
        operations.row_gradients(entries, *entries.coefficients, y, out, out_bias)
    assert torch.equal(out.double(), expected)
    assert torch.equal(out_bias.double(), torch.einsum("bkf,bk->f", one_hot, values.double()))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 16, 1000])
def test_length_of_segments_of_heads_changes_no_integer(length, dtype, device):
    """4 heads of 2 x 2 latents, of 10, 50, 30 and no entries."""
    indices = codes_of([*COUNTS, 0, 0, 0, 0], 5, device)
    x = torch.randint(-3, 4, (len(indices), D), device=device).to(dtype)
    d_base, d_extension = torch.randint(-3, 4, (2, *indices.shape), device=device).float()
    head, i, j = indices // 4, indices // 2 % 2, indices % 2
    expected, of_bias = torch.zeros(4, 4, D).double(), torch.zeros(4, 4).double()
    for row, d_pre in ((i, d_base), (2 + j, d_extension)):
        at = (row.flatten().cpu(), head.flatten().cpu())
        term = d_pre.cpu().double()[..., None] * x.cpu().double()[:, None]
        expected.index_put_(at, term.flatten(0, 1), accumulate=True)
        of_bias.index_put_(at, d_pre.cpu().double().flatten(), accumulate=True)
    entries = operations.Entries.of(indices, 16, (d_base, d_extension))
    # Sums of 50 terms of at most 9: exact in float32, rounded to 8 bits at the end alone.
    weight = torch.empty(4, 4, D, device=device, dtype=dtype)
    bias = torch.empty(4, 4, device=device, dtype=dtype)
    with configs.override("segments", HEAD_LENGTH=length):
        operations.head_gradients(entries, *entries.coefficients, x, 2, weight, bias)
    assert torch.equal(weight.cpu(), expected.to(dtype))
    assert torch.equal(bias.cpu(), of_bias.to(dtype))
    assert not weight[:, 3].any()


def drawn_codes(generator: torch.Generator) -> tuple[Tensor, int]:
    """Indices [B, k], with empty rows, rows that hold nearly all, or one row alone; and F."""

    def draw(most: int) -> int:
        return int(torch.randint(1, most + 1, (1,), generator=generator))

    size = draw((1, 7, 300)[draw(3) - 1])
    live = torch.randperm(size, generator=generator)[: draw(size)]
    shape = draw(40), draw(9)
    at = torch.rand(shape, generator=generator) ** draw(6) * len(live)
    return live[at.long()], size


@pytest.mark.usefixtures("poisoned_memory")
def test_entries_equal_a_sort(device):
    """200 drawn cases: with the tokens of codes given and not, 0 to 4 coefficients, any dtype."""
    generator = torch.Generator().manual_seed(0)
    for case in range(200):
        indices, size = drawn_codes(generator)
        tokens, k = indices.shape
        given = tuple(
            torch.randn(tokens, k, generator=generator).to(dtype).to(device)
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float32)[: case % 5]
        )
        of_code = torch.randint(0, 99, (tokens * k,), generator=generator).int().to(device)
        named = case % 2 == 0
        found = operations.Entries.of(
            indices.flatten().to(device) if named else indices.to(device),
            size,
            tuple(c.flatten() for c in given) if named else given,
            of_code if named else None,
        )
        latents, order = indices.flatten().sort(stable=True)
        order = order.to(device)
        if not named:
            of_code = torch.arange(tokens, device=device).repeat_interleave(k).int()
        assert found.latents.tolist() == latents.tolist()
        assert torch.equal(found.tokens, of_code[order])
        bounds = torch.searchsorted(latents, torch.arange(size + 1))
        assert found.offsets.tolist() == bounds.tolist()
        assert len(found.coefficients) == len(given)
        for got, coefficient in zip(found.coefficients, given, strict=True):
            assert torch.equal(got, coefficient.flatten()[order].float())


def test_entries_of_no_code(device):
    none = torch.empty(0, 3, dtype=torch.int64, device=device)
    entries = operations.Entries.of(none, 40, (none.float(),))
    assert entries.offsets.tolist() == [0] * 41
    assert entries.tokens.shape == entries.coefficients[0].shape == (0,)


def test_entries_are_sorted_by_latent_and_then_by_token(device):
    indices = codes_of(COUNTS, 5, device)
    entries = operations.Entries.of(indices, len(COUNTS))
    pairs = list(zip(entries.latents.tolist(), entries.tokens.tolist(), strict=True))
    assert pairs == sorted(pairs)
    assert entries.offsets.diff().tolist() == COUNTS


def test_as_many_codes_as_int32_counts():
    """An error, and not a wrong sum. (A meta tensor has no memory.)"""
    with pytest.raises(RuntimeError, match="fewer than 2"):
        operations.Entries.of(torch.empty(2**16, 2**15, device="meta", dtype=torch.int64), 10)
    with pytest.raises(RuntimeError, match="fewer than 2"):
        operations.Entries.of(torch.zeros(1, 1, dtype=torch.int64), 2**31)
