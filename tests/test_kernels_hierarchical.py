"""`hierarchical_loss` in torch and in Triton kernels, against the reference.

Integers in [-2, 2] have exact sums, in any order: every output and gradient is then the
reference's to the bit. Of normal numbers those of float64 are the truth.
"""

import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kronsae_kernels import SparseCodes, backends, hierarchical_loss, sparse_decode, torch_impl

B, K, F, D = 9, 5, 24, 7
NAMES = ("loss", "residual", "d values", "d w_dec", "d target", "d b_dec")


def drawn(seed, device):
    """values, w_dec, target, b_dec of a case; indices; prefixes; whether numbers are integers."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    size, d = draw.choice([1, 2, 9, 14]), draw.choice([1, 3, 16, 21])
    tokens, k = draw.choice([0, 1, 2, 5]), draw.choice([1, 2, 7, 20])
    some = draw.sample(range(1, k + 1), draw.randint(1, k))
    exact, dtype = draw.random() < 0.7, draw.choice([torch.float32, torch.bfloat16, torch.float16])

    def numbers(*shape, dtype):
        found = torch.randint(-2, 3, shape) if exact else torch.randn(shape)
        return found.to(device, dtype)

    values = numbers(tokens, k, dtype=torch.float32)  # some are 0, as those of unused slots
    values = values.sort(1, descending=True).values if draw.random() < 0.5 else values
    b_dec = numbers(d, dtype=dtype) if draw.random() < 0.7 else None
    leaves = [values, numbers(size, d, dtype=dtype), numbers(tokens, d, dtype=dtype), b_dec]
    prefixes = list(range(1, k + 1)) if draw.random() < 0.5 else sorted({*some, k})
    return leaves, torch.randint(size, (tokens, k), device=device), prefixes, exact


def results(leaves, indices, prefixes, impl, dtype=None):
    """Loss times the number of prefixes, residual, and all gradients."""
    leaves = [None if t is None else t.to(dtype or t.dtype, copy=True) for t in leaves]
    there = [leaf.requires_grad_() for leaf in leaves if leaf is not None]
    values, w_dec, target, b_dec = leaves
    codes = SparseCodes(values, indices)
    found = hierarchical_loss(codes, prefixes, w_dec, target, b_dec, impl=impl)
    loss = len(prefixes) * found.loss
    assert not found.residual.requires_grad
    gradients = torch.autograd.grad(loss, there)
    return dict(zip(NAMES, (loss.detach(), found.residual, *gradients), strict=False))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.one_in(4)
@pytest.mark.parametrize("part", range(8))
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_drawn_cases(impl, part, device, monkeypatch):
    if impl == "triton":
        pytest.importorskip("triton")
    monkeypatch.setattr(torch_impl, "chunk_tokens", lambda *_: 2)
    for seed in range(part, 80, 8):
        leaves, indices, prefixes, exact = drawn(seed, device)
        got = results(leaves, indices, prefixes, impl)
        truth = results(leaves, indices, prefixes, "reference", torch.float64)
        for name, found in got.items():
            expected = truth[name].to(found.dtype)
            assert found.shape == expected.shape, (seed, name)
            # float16 is too narrow for some sums, and other means are rounded.
            if exact and found.dtype != torch.float16 and len(prefixes).bit_count() == 1:
                assert torch.equal(found, expected), (seed, name)
            unit = torch.finfo(found.dtype).eps
            near = {"rtol": 4 * unit, "atol": 2e-3, "msg": f"{seed} {name}"}
            torch.testing.assert_close(found, expected, **near)


def test_is_the_mean_of_separate_decodes():
    values, indices = torch.randn(B, K, dtype=torch.float64), torch.randint(F, (B, K))
    w_dec, b_dec = torch.randn(F, D, dtype=torch.float64), torch.randn(D, dtype=torch.float64)
    target = torch.randn(B, D, dtype=torch.float64)
    errors = [
        (sparse_decode(values[:, :j], indices[:, :j], w_dec, b_dec) - target).square().sum()
        for j in (2, 3, 5)
    ]
    for impl in ("torch", "reference"):
        loss, residual = hierarchical_loss(
            SparseCodes(values, indices), [2, 3, 5], w_dec, target, b_dec, impl=impl
        )
        torch.testing.assert_close(loss, sum(errors) / 3)
        x_hat = sparse_decode(values, indices, w_dec, b_dec)
        torch.testing.assert_close(residual, x_hat - target)
    cube = SparseCodes(values.view(3, 3, K), indices.view(3, 3, K))
    found = hierarchical_loss(cube, [2, 3, 5], w_dec, target.view(3, 3, D), b_dec)
    torch.testing.assert_close(found.residual, residual.view(3, 3, D))


def test_gradcheck():
    indices = torch.randint(F, (B, K))

    def loss(values, w_dec, target, b_dec):
        return hierarchical_loss(SparseCodes(values, indices), [1, 3, 5], w_dec, target, b_dec).loss

    shapes = (B, K), (F, D), (B, D), (D,)
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(loss, leaves)
    with pytest.raises(NotImplementedError, match="first derivatives"):
        torch.autograd.grad(loss(*leaves), leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives"):
        torch.func.jvp(lambda values: loss(values, *leaves[1:]), (*leaves[:1],), (*leaves[:1],))


@pytest.mark.parametrize("wanted", [(), (0,), (1,), (2,), (0, 3)], ids=str)
def test_any_subset_of_gradients(wanted):
    shapes = (B, K), (F, D), (B, D), (D,)
    leaves, indices = [torch.randn(shape) for shape in shapes], torch.randint(F, (B, K))
    whole = results(leaves, indices, [2, 5], "torch")
    some = [leaf.clone().requires_grad_(at in wanted) for at, leaf in enumerate(leaves)]
    found = hierarchical_loss(SparseCodes(some[0], indices), [2, 5], *some[1:])
    torch.testing.assert_close(2 * found.loss.detach(), whole["loss"])
    if wanted:
        (2 * found.loss).backward()
    for at, (leaf, name) in enumerate(zip(some, NAMES[2:], strict=True)):
        assert (leaf.grad is not None) == (at in wanted)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, whole[name])


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that an operation makes."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.count = max(self.count, tensor.numel())
        return out


def test_memory_does_not_grow_with_tokens_times_codes(monkeypatch):
    monkeypatch.setitem(torch_impl.CHUNK_BYTES, "cpu", 1 << 18)
    tokens, k, size, d = 512, 8, 32, 32
    values, indices = torch.randn(tokens, k), torch.randint(size, (tokens, k))
    w_dec, target = torch.randn(size, d), torch.randn(tokens, d)
    with Largest() as found:
        torch_impl.hierarchical(values, indices, w_dec, target, range(1, k + 1), True)
    assert found.count <= tokens * k * d // 4


def test_autocast_leaves_it_alone():
    leaves, indices = [torch.randn(s) for s in ((B, K), (F, D), (B, D), (D,))], None
    indices = torch.randint(F, (B, K))
    expected = results(leaves, indices, [2, 5], "torch")
    with torch.autocast("cpu", torch.bfloat16):
        found = results(leaves, indices, [2, 5], "torch")
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"prefixes": [1, 2]}, "prefixes: expected k = 5 as the last"),
        ({"prefixes": []}, r"prefixes: .* ascending integers in .1, k. = .1, 5."),
        ({"prefixes": [3, 2, 5]}, "prefixes: .* ascending"),
        ({"prefixes": [5, 6]}, "prefixes: .* ascending"),
        ({"codes": torch.zeros(2)}, "codes: expected .values, indices."),
        ({"target": torch.zeros(B, D + 1)}, r"target: expected .* = \[9, 7\]"),
        ({"codes": (torch.zeros(B, K), torch.full((B, K), F))}, "indices: expected latents in"),
        ({"impl": "cuda"}, "impl"),
    ],
)
def test_arguments_are_checked(changes, words):
    right = {
        "codes": SparseCodes(torch.zeros(B, K), torch.zeros(B, K, dtype=torch.int64)),
        "prefixes": [2, 5],
        "w_dec": torch.zeros(F, D),
        "target": torch.zeros(B, D),
    }
    hierarchical_loss(**right)
    with pytest.raises(ValueError, match=words):
        hierarchical_loss(**right | changes)


def test_rows_too_long_for_a_program_take_torch(monkeypatch):
    pytest.importorskip("triton")
    from kronsae_kernels.triton_impl.operations import hierarchical

    assert backends.why_not("triton", torch.device("cpu")) is None
    leaves = [torch.randn(s) for s in ((B, K), (F, D), (B, D))]
    arguments = leaves[0], torch.randint(F, (B, K)), *leaves[1:], [2, 5], True
    expected = torch_impl.hierarchical(*arguments)
    monkeypatch.setitem(hierarchical.__globals__, "MAX_WIDTH", D - 1)
    assert all(map(torch.equal, hierarchical(*arguments), expected))


def test_vmap_gives_each_its_loss(device):
    values, indices = torch.rand(3, 2, 4, device=device), torch.randint(F, (3, 2, 4), device=device)
    w_dec, target = torch.randn(F, D, device=device), torch.randn(3, 2, D, device=device)

    def loss(values, indices, target):
        return hierarchical_loss(SparseCodes(values, indices), [2, 4], w_dec, target)

    together = torch.vmap(loss)(values, indices, target)
    each = [loss(*one) for one in zip(values, indices, target, strict=True)]
    for found, one_by_one in zip(together, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(one_by_one))
