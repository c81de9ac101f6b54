"""JumpReLU in the fused step: its kernels against torch, and training against float64 autograd."""

import random

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from test_triton_step import (
    DEVICE,
    HEADS,
    Autograd,
    K,
    M,
    N,
    assert_same,
    batches,
    copy_of,
    new_weights,
)
from test_triton_step import make as make_step

from kronsae_kernels import jump as reference_jump
from kronsae_kernels import reference, torch_impl
from kronsae_kernels.step import THRESHOLDS, Thresholds, TrainingStep
from kronsae_kernels.triton_impl import operations
from tests.counted import counted

SIZE = HEADS * M * N
BANDWIDTH, COEFFICIENT = 0.5, 0.3
COMPOSITIONS = ("mand", "relu_mul", "mul", "dense")


def new_log(seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(SIZE, generator=generator) * 1.2).log().to(DEVICE)


def make(weights: dict[str, Tensor], log: Tensor, **settings) -> TrainingStep:
    thresholds = Thresholds(log, BANDWIDTH, COEFFICIENT)
    return make_step(weights, **settings, thresholds=thresholds)


# Kernels


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("part", range(8))
def test_drawn_codes(part):
    """JumpReLU of codes, and the gradient of thresholds by codes: as autograd's, for each code.

    Of numbers that a quarter divides: values lie on thresholds, and on the edges of the bandwidth.
    """
    for seed in range(part, 240, 8):
        draw = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        composition = COMPOSITIONS[seed % 4]
        tokens, width, size = draw.choice([1, 2, 5]), draw.choice([1, 7, 8, 19]), 12

        def drawn(low: int, high: int, *shape: int, numbers: torch.Generator = generator) -> Tensor:
            return torch.randint(low, high, shape, generator=numbers)

        base, extension = drawn(0, 5, tokens, width) / 2, drawn(0, 5, tokens, width) / 2
        if draw.random() < 0.1:
            base[0, 0] = torch.nan
        if draw.random() < 0.1:
            base[-1, -1] = torch.inf
        threshold, bandwidth = drawn(0, 17, size) / 4, draw.choice([0.25, 0.5, 1.0, 3.0])
        indices, counts = drawn(0, size, tokens, width), drawn(0, width + 3, tokens)
        d_values, d_active = drawn(-8, 9, tokens, width) / 4, torch.tensor(draw.choice([-0.5, 2.0]))
        scale = draw.choice([1.0, 0.25, torch.tensor(0.5)])

        values = base
        if composition != "dense":
            values = reference.compose(base * extension, composition, 0.0)
        used = torch.arange(width) < counts[:, None]
        of_code = threshold[indices].requires_grad_()
        z, active = reference_jump(values, of_code, bandwidth, used)
        near = (values - of_code).abs() < bandwidth / 2
        loss = (z.nan_to_num() * d_values * scale).sum() + d_active * active.sum()
        (expected,) = torch.autograd.grad(loss, of_code)

        on = [t.to(DEVICE) for t in (base, extension, indices.clone(), counts, threshold)]
        narrow, of_device = torch.zeros((), device=DEVICE), [t.to(DEVICE) for t in (d_values,)]
        found = operations.jump(*on, bandwidth, composition, narrow)
        where = f"seed {seed}: {composition}"
        above = active.bool()
        assert torch.equal(on[0].cpu(), base.where(above, 0)), where
        if composition != "dense":
            assert torch.equal(on[1].cpu(), extension.where(above, 0)), where
        assert torch.equal(on[2].cpu(), indices.where(above | (near & used), -1)), where
        assert torch.equal(found.active.cpu(), active.sum(1)), where
        assert float(narrow) == float((counts > width).any()), where
        d_log = operations.jump_gradients(
            *(of_device[0], on[2], found),
            scale.to(DEVICE) if isinstance(scale, Tensor) else scale,
            d_active.to(DEVICE),
        )
        torch.testing.assert_close(
            d_log.cpu(), expected * of_code.detach(), rtol=1e-6, atol=0, msg=where
        )


@pytest.mark.one_in(2)
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("part", range(4))
def test_drawn_sums_of_entries(part):
    """Of whole numbers, so that there is one right sum; with latents of none, and of many."""
    for seed in range(part, 200, 4):
        generator = torch.Generator().manual_seed(seed)
        tokens, k, size = 1 + seed % 5, 1 + seed % 7, 1 + seed * 3 % 20
        indices = torch.randint(-1, size, (tokens, k), generator=generator)
        numbers = torch.randint(-9, 10, (tokens, k), generator=generator).float()
        fields = (numbers, *(-numbers for _ in range(seed % 5)))[: 1 + seed % 5]
        entries = operations.Entries.of(
            indices.to(DEVICE), size, tuple(field.to(DEVICE) for field in fields)
        )
        expected = torch.zeros(size + 1).index_add_(0, indices.flatten() + 1, numbers.flatten())[1:]
        for sign, field in zip((1, -1, -1, -1, -1), entries.coefficients, strict=False):
            got = operations.sum_entries(entries, field)
            assert torch.equal(got.cpu(), sign * expected), seed


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.one_in(4)
@pytest.mark.parametrize("part", range(4))
def test_drawn_widths(part, monkeypatch):
    """With a width the same latents, as far as they fit, and nobody waits for the device."""
    for seed in range(part, 60, 4):
        draw = random.Random(seed)
        torch.manual_seed(seed)
        heads, m, n, tokens = draw.choice([3, 9]), draw.choice([1, 2]), draw.choice([2, 4]), 3
        dense = seed % 3 == 0
        shape = (heads * m * n,) if dense else (heads, m + n)
        x, w_enc, threshold = (
            torch.randint(-2, 3, (tokens, 4)).float().to(DEVICE),
            torch.randint(-2, 3, (*shape, 4)).float().to(DEVICE),
            torch.randint(0, 4, (heads * m * n,)).float().to(DEVICE),
        )
        chunk = draw.choice([1, 2, 100])
        monkeypatch.setattr(torch_impl, "chunk_tokens", lambda *_, size=chunk: size)
        given = x, w_enc, None, threshold, None if dense else m, 0.0, "relu_mul"
        *expected, counts = operations.threshold_encode(*given)
        width = draw.choice([1, 3, max(1, int(counts.max())), heads * m * n])
        with counted() as asked:
            *got, of_token = operations.threshold_encode(*given, width)
        assert not asked.waits and got[0].shape == (tokens, width)
        assert torch.equal(of_token, counts)
        for token in torch.nonzero(counts <= width).flatten().tolist():
            used = int(counts[token])
            for ours, theirs in zip(got, expected, strict=True):
                assert torch.equal(ours[token, :used], theirs[token, :used]), seed


# Training


class Jumping(Autograd):
    """By all values [B, F], of which nothing is selected first."""

    def __init__(self, weights, log, **settings) -> None:
        super().__init__({**weights, THRESHOLDS: log}, **settings)

    def backward(self, x, *, weight=1.0, **_) -> tuple[Tensor, Tensor]:
        w_enc, b_enc, w_dec, b_dec, log = self.weights.values()
        x, composition = x.to(self.dtype), self.settings["composition"]
        if w_enc.ndim == 2:
            values = (x @ w_enc.T + b_enc).relu()
        else:
            product = reference.latents(x, w_enc, b_enc, M, composition)
            values = reference.compose(product, composition, 0.0)
        z, active = reference_jump(values, log.exp(), BANDWIDTH, values > 0)
        mse = (z @ w_dec + b_dec - x).square().mean()
        l0_loss = (active.sum() / len(x) / K - 1).square()
        (weight * (mse + COEFFICIENT * l0_loss)).backward()
        return mse.detach(), l0_loss.detach()


@pytest.mark.parametrize(
    "composition",
    [pytest.param(c, marks=[pytest.mark.slow] * (c != "mand")) for c in COMPOSITIONS],
)
def test_steps_equal_autograd_and_adamw(composition):
    """6 steps, clipped, with weight decay, two passes each; their losses, too."""
    dense = composition == "dense"
    kind = {} if dense else {"composition": composition}
    weights, log = new_weights(dense), new_log()
    step = make(copy_of(weights), log.clone(), weight_decay=0.1, **kind)
    truth = Jumping(weights, log, weight_decay=0.1, **kind)
    for first, second in zip(batches(6), batches(6, seed=2), strict=True):
        for x, weight in ((first, 1.0), (second[:3], torch.tensor(0.5, device=DEVICE))):
            out = step.accumulate(x, width=SIZE, weight=weight)
            mse, l0_loss = truth.backward(x, weight=weight)
            assert float(out.loss) == pytest.approx(float(mse), rel=1e-4)
            assert float(out.l0_loss) == pytest.approx(float(l0_loss), rel=1e-4, abs=1e-6)
        norm, expected = step.apply(1e-3, max_norm=0.5), truth.apply(1e-3, 0.5)
        assert float(norm) == pytest.approx(float(expected), rel=1e-4)
    assert_same(step, truth, 1e-4, {**weights, THRESHOLDS: log})
    assert (step.weights[THRESHOLDS] != log).sum() > SIZE / 2
    assert float(step.state[THRESHOLDS]["step"]) == 6


def test_nothing_is_learned_with_too_few_places():
    weights, log = new_weights(False), new_log()
    step = make(copy_of(weights), log.clone())
    (x,) = batches(1)
    out = step.accumulate(x, width=2, k=2)
    assert out.codes.indices.shape == (len(x), 2) and step.apply(1e-2).isnan()
    assert step.missed.tolist() == [0, 1] and not step.skips.any()
    assert torch.equal(step.weights[THRESHOLDS], log)
    assert float(step.state[THRESHOLDS]["step"]) == 0
    step.missed.zero_()
    step.accumulate(x, width=SIZE)
    assert step.apply(1e-2).isfinite()


@pytest.mark.parametrize("dense", [False, True], ids=["kron", "dense"])
def test_thresholds_are_set_to_the_smallest_of_the_largest(dense):
    weights, (x,) = new_weights(dense), batches(1)
    step = make(weights, new_log())
    if dense:
        values = (x @ weights["w_enc"].T + weights["b_enc"]).relu()
    else:
        product = reference.latents(x, weights["w_enc"], weights["b_enc"], M, "mand")
        values = reference.compose(product, "mand", 0.0)
    expected = values.flatten().sort(descending=True).values[K * len(x) - 1]
    step.set_thresholds(x, width=SIZE)
    assert (step.weights[THRESHOLDS].exp() < expected).all()  # which is then active, too
    torch.testing.assert_close(step.weights[THRESHOLDS].exp(), expected.expand(SIZE))
    before = step.weights[THRESHOLDS].clone()
    step.set_thresholds(torch.full_like(x, torch.nan), width=SIZE)
    assert torch.equal(step.weights[THRESHOLDS], before)
    assert not step.missed.any()
    step.set_thresholds(x, width=K)
    assert step.missed[0] == 1


# Arguments


@pytest.mark.parametrize(
    "thresholds, settings, words",
    [
        (Thresholds(new_log()[:5], 0.1, 1.0), {}, ["thresholds.log", f"[F] = [{SIZE}]", "[5]"]),
        (Thresholds(new_log().double(), 0.1, 1.0), {}, ["float32", "float64"]),
        (Thresholds(new_log(), 0.0, 1.0), {}, ["thresholds.bandwidth", "> 0"]),
        (Thresholds(new_log(), 0.1, -1.0), {}, ["thresholds.l0_coefficient", ">= 0", "-1.0"]),
        (Thresholds(new_log(), 0.1, 1.0), {"eps": 0.1}, ["eps", "0.1"]),
        ((new_log(), 0.1, 1.0), {}, ["thresholds: expected `Thresholds`", "0.1, 1.0"]),
        (5, {}, ["thresholds: expected `Thresholds`, got 5"]),
    ],
    ids=lambda value: None,
)
def test_errors_of_the_constructor(thresholds, settings, words):
    with pytest.raises(ValueError) as error:
        make_step(new_weights(False), thresholds=thresholds, **settings)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_errors_of_calls():
    x = torch.zeros(3, 12, device=DEVICE)
    with pytest.raises(ValueError, match="width: expected places .* got None"):
        make(new_weights(False), new_log()).accumulate(x)
    with pytest.raises(ValueError, match="width: .*got 2"):
        make(new_weights(False), new_log()).set_thresholds(x, width=2)
    with pytest.raises(ValueError, match=r"x: expected \[B, 12\]"):
        make(new_weights(False), new_log()).set_thresholds(x[0], width=8)
    with pytest.raises(ValueError, match="no thresholds"):
        make_step(new_weights(False)).set_thresholds(x, width=8)
