"""The fused training step against autograd and torch's AdamW, and what it promises beside."""

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kronsae_kernels import (
    dense_encode,
    fused_encode,
    hierarchical_loss,
    nested_decode,
    refine_codes,
    sparse_decode,
)
from kronsae_kernels import step as fused
from kronsae_kernels.step import TrainingStep

pytest.importorskip("triton")

D, HEADS, M, N, K, B = 12, 3, 2, 3, 3, 6
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

Weights = dict[str, Tensor]


def new_weights(dense: bool, seed: int = 0, frequent: bool = False) -> Weights:
    """frequent: the latents of one head are on at every token, so that their rows are long."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    size = HEADS * M * N
    w_dec = drawn(size, D)
    w_dec /= w_dec.norm(dim=1, keepdim=True)
    if dense:
        w_enc, b_enc = drawn(size, D) / D**0.5, 0.1 * drawn(size)
        b_enc[:K] += 6.0 * frequent
    else:
        w_enc = drawn(M + N, HEADS, D).transpose(0, 1) / D**0.5
        b_enc = 0.1 * drawn(HEADS, M + N)
        b_enc[1] += 6.0 * frequent
    return {"w_enc": w_enc, "b_enc": b_enc, "w_dec": w_dec, "b_dec": 0.1 * drawn(D)}


def batches(count: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, D, generator=generator).to(DEVICE) for _ in range(count)]


def copy_of(weights: Weights) -> Weights:
    return {name: torch.empty_like(w).copy_(w) for name, w in weights.items()}


def make(weights: Weights, **settings: Any) -> TrainingStep:
    dense = weights["w_enc"].ndim == 2
    given = {name.replace("refine_rate", "refine"): weight for name, weight in weights.items()}
    return TrainingStep(**given, **{"k": K, "m": None if dense else M, **settings})


class Autograd:
    """The same training by loss.backward(), in float64 or another dtype, and torch's AdamW."""

    def __init__(
        self,
        weights: Weights,
        *,
        dtype: torch.dtype = torch.float64,
        composition: str = "mand",
        eps: float = 0.0,
        unit_norm: bool = True,
        weight_decay: float = 0.0,
        encoder_lr_ratio: float = 1.0,
        autocast: bool = False,
    ) -> None:
        self.weights = {n: w.to(dtype, copy=True).requires_grad_() for n, w in weights.items()}
        self.settings = {"composition": composition, "eps": eps}
        self.unit_norm, self.dtype, self.autocast = unit_norm, dtype, autocast
        w_enc, *rest = self.weights.values()
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [w_enc], "weight_decay": weight_decay, "ratio": encoder_lr_ratio},
                {"params": rest, "weight_decay": 0.0, "ratio": 1.0},
            ]
        )

    def backward(
        self,
        x: Tensor,
        *,
        target=None,
        k=K,
        mask=None,
        bias=True,
        weight=1.0,
        bounds=None,
        prefixes=None,
    ) -> Tensor:
        w_enc, b_enc, w_dec, b_dec, *rates = self.weights.values()
        x = x.to(self.dtype)
        target = x if target is None else target.to(self.dtype)
        impl = None if self.autocast else "reference"
        with torch.autocast(x.device.type, torch.bfloat16, self.autocast):
            if w_enc.ndim == 2:
                codes = dense_encode(x, w_enc, b_enc, k=k, mask=mask, impl=impl)
            else:
                codes = fused_encode(
                    x, w_enc, b_enc, m=M, k=k, mask=mask, impl=impl, **self.settings
                )
            b_dec = b_dec if bias else None
            if rates and mask is None:
                codes = refine_codes(codes, target, w_dec, b_dec, rate=rates[0], impl=impl)
            if prefixes is not None:
                loss, _ = hierarchical_loss(codes, prefixes, w_dec, target, b_dec, impl=impl)
                loss = loss / target.numel()
                (weight * loss).backward()
                return loss.detach()
            if bounds is None:
                x_hat = sparse_decode(codes, w_dec=w_dec, b_dec=b_dec, impl=impl)[:, None]
            else:
                x_hat = nested_decode(codes, bounds, w_dec, b_dec, impl=impl)
        loss = (x_hat - target[:, None]).square().mean((0, 2)).sum()
        (weight * loss).backward()
        return loss.detach()

    def apply(self, lr: float, max_norm: float | None = None) -> Tensor:
        """The gradient's norm, before clipping."""
        w_dec = self.weights["w_dec"]
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["ratio"]
        with torch.no_grad():
            for weight in self.weights.values():
                if weight.grad is None:  # as the fused step: a step on a gradient of 0
                    weight.grad = torch.zeros_like(weight)
            if self.unit_norm:
                along = (w_dec.grad * w_dec).sum(1, keepdim=True)
                w_dec.grad.addcmul_(along, w_dec, value=-1)
            norm = torch.nn.utils.clip_grad_norm_(
                self.weights.values(), float("inf") if max_norm is None else max_norm
            )
            self.optimizer.step()
            if self.unit_norm:
                w_dec /= w_dec.norm(dim=1, keepdim=True)
        self.optimizer.zero_grad()
        return norm


def assert_same(step: TrainingStep, truth: Autograd, rtol: float, start: Weights) -> None:
    """Each weight's distance from the truth, relative to its norm; biases', to what they moved."""
    for name, expected in truth.weights.items():
        got, expected = step.weights[name].double(), expected.detach().double()
        scale = expected.norm()
        if name.startswith("b_"):
            scale = torch.maximum(scale, (expected - start[name]).norm())
        error = float((got.detach() - expected).norm() / scale)
        assert error <= rtol, f"{name}: relative error {error:.2e}, expected at most {rtol:.0e}"


@pytest.mark.parametrize("count", [7, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "dense, unit_norm",
    [
        pytest.param(False, True, id="kron-unit-norm"),
        pytest.param(True, False, id="dense-free-norm"),
        pytest.param(False, False, id="kron-free-norm", marks=pytest.mark.slow),
        pytest.param(True, True, id="dense-unit-norm", marks=pytest.mark.slow),
    ],
)
def test_steps_equal_autograd_and_adamw(dense, unit_norm, count):
    """In float32, with micro-batches and with rows so frequent that they are cut into segments.

    AdamW divides by the root of the second moment, so a relative error of 1e-7 of a gradient stays
    one of the update; 50 of those add up to 5e-6 of what the weights moved.
    """
    weights = new_weights(dense, frequent=True)
    settings = {"unit_norm": unit_norm, "weight_decay": 0.01, "encoder_lr_ratio": 0.5}
    truth, step = Autograd(weights, **settings), make(copy_of(weights), **settings)
    for number, x in enumerate(batches(count)):
        parts = x.split(4) if number % 5 == 0 else [x]
        lr = 1e-2 / (1 + number)
        for part in parts:
            weight = len(part) / len(x)
            loss = step.accumulate(part, weight=weight).loss
            expected = truth.backward(part, weight=weight)
            torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
        norm, expected = step.apply(lr), truth.apply(lr)
        torch.testing.assert_close(norm.double(), expected.double(), rtol=1e-4, atol=0)
    assert_same(step, truth, 1e-5, weights)
    moved = float((weights["w_enc"] - step.weights["w_enc"]).norm())
    assert moved > 0.05  # it did train: thousands of times what may differ
    if unit_norm:
        torch.testing.assert_close(
            step.weights["w_dec"].norm(dim=1), torch.ones(HEADS * M * N, device=DEVICE)
        )


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "dense, steps, bounds",
    [(False, 1, None), (True, 2, None), (False, 2, [6, 18])],
    ids=["kron-one-step", "dense-two-steps", "kron-nested"],
)
def test_refined_steps_equal_autograd_and_adamw(dense, steps, bounds):
    """With micro-batches, and with the auxiliary pass, which is not refined."""
    rates = torch.tensor([0.5, 0.3], device=DEVICE)[:steps]
    weights = {**new_weights(dense), "refine_rate": rates}
    truth, step = Autograd(weights), make(copy_of(weights))
    mask = torch.arange(HEADS * M * N, device=DEVICE) % 2 == 0
    for number, x in enumerate(batches(5)):
        for part in x.split(4) if number == 0 else [x]:
            out, given = step.accumulate(part, bounds=bounds), dict(bounds=bounds)
            torch.testing.assert_close(
                out.loss.double(), truth.backward(part, **given), rtol=1e-5, atol=0
            )
            assert not torch.equal(out.codes.values, out.selected.values)
        if number == 1:
            aux = {"mask": mask, "bias": False, "weight": 0.1}
            step.accumulate(x[:4], **aux), truth.backward(x[:4], **aux)
        norm, expected = step.apply(1e-2), truth.apply(1e-2)
        torch.testing.assert_close(norm.double(), expected.double(), rtol=1e-4, atol=0)
    assert_same(step, truth, 1e-5, weights)
    assert float((step.weights["refine_rate"] - rates).abs().min()) > 1e-3


def test_refine_is_checked():
    weights = new_weights(False)
    for refine, message in [
        (torch.ones(()), "refine: expected float32 .N., N >= 1, got"),
        (torch.ones(1, dtype=torch.float64), "refine: expected float32"),
    ]:
        with pytest.raises(ValueError, match=message):
            TrainingStep(**weights, k=K, m=M, refine=refine.to(DEVICE))


def test_rows_of_the_frequent_latents_are_cut_into_segments():
    """What the test above relies on."""
    from kronsae_kernels.triton_impl import launch

    out = make(new_weights(False, frequent=True)).accumulate(batches(1)[0])
    counts = out.codes.indices.flatten().bincount(minlength=HEADS * M * N)
    assert int((counts == 0).sum()) > 0  # and rows with no entry are there too
    lengths = launch.configure("segments", torch.device("cpu")).blocks
    of_heads = counts.view(HEADS, M * N).sum(1)
    assert int(of_heads.max()) > lengths["HEAD_LENGTH"]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "composition, eps",
    [("mand", 1e-5), pytest.param("relu_mul", 0.0, marks=pytest.mark.slow), ("mul", 0.0)],
    ids=lambda v: str(v),
)
def test_each_composition(composition, eps):
    weights, settings = new_weights(False), {"composition": composition, "eps": eps}
    truth, step = Autograd(weights, **settings), make(copy_of(weights), **settings)
    for x in batches(6):
        step.accumulate(x), truth.backward(x)
        step.apply(1e-2), truth.apply(1e-2)
    assert_same(step, truth, 1e-5, weights)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dense", [False, True], ids=["kron", "dense"])
def test_passes_with_target_mask_and_weight_add_up(dense):
    """As the auxiliary loss makes them: few latents, another target, no b_dec, a weight."""
    weights = new_weights(dense)
    truth, step = Autograd(weights), make(copy_of(weights))
    mask = torch.arange(HEADS * M * N, device=DEVICE) % 3 == 0
    for x in batches(4):
        out = step.accumulate(x)
        truth.backward(x)
        target = -out.residual[:4]
        second = {"target": target, "k": 2, "mask": mask, "bias": False}
        # A weight on the device, as one computed from a batch is.
        loss = step.accumulate(x[:4], **second, weight=torch.tensor(0.3, device=DEVICE)).loss
        expected = truth.backward(x[:4], **second, weight=0.3)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
        step.apply(1e-2), truth.apply(1e-2)
    assert_same(step, truth, 1e-5, weights)


def test_many_codes_are_decoded_in_two_gathers(monkeypatch):
    monkeypatch.setattr(fused, "MAX_FUSED_CODES", 2)
    weights = new_weights(False)
    truth, step = Autograd(weights), make(copy_of(weights))
    for x in batches(4):
        step.accumulate(x), truth.backward(x)
        step.apply(1e-2), truth.apply(1e-2)
    assert_same(step, truth, 1e-5, weights)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "dense, one_gather",
    [
        pytest.param(False, True, id="kron-one-gather"),
        pytest.param(True, False, id="dense-two-gathers"),
        pytest.param(False, False, id="kron-two-gathers", marks=pytest.mark.slow),
        pytest.param(True, True, id="dense-one-gather", marks=pytest.mark.slow),
    ],
)
def test_masks_of_fewer_than_k(dense, one_gather, monkeypatch):
    """k stays as it is; what is left over adds nothing, where a silent latent is sqrt(eps), too."""
    monkeypatch.setattr(fused, "MAX_FUSED_CODES", 18 if one_gather else 2)
    weights, settings = new_weights(dense), {} if dense else {"eps": 1e-2}
    truth, step = Autograd(weights, **settings), make(copy_of(weights), **settings)
    for number, x in enumerate(batches(3)):
        allowed = (2, 0, 5)[number]
        mask = torch.zeros(HEADS * M * N, dtype=torch.bool, device=DEVICE)
        mask[torch.arange(allowed) * 5 % (HEADS * M * N)] = True
        step.accumulate(x), truth.backward(x)
        out = step.accumulate(x, k=8, mask=mask, bias=False, weight=0.5)
        assert ((out.codes.indices >= 0).sum(1) == allowed).all()
        assert not out.codes.values[:, allowed:].any()
        if allowed:
            expected = truth.backward(x, k=allowed, mask=mask, bias=False, weight=0.5)
        else:
            expected = x.square().mean().double()
        torch.testing.assert_close(out.loss.double(), expected, rtol=1e-5, atol=0)
        step.apply(1e-2), truth.apply(1e-2)
    assert_same(step, truth, 1e-5, weights)


NESTED = {
    "kron": {"bounds": [6, 12, HEADS * M * N], "eps": 1e-2},
    "kron-mul": {"bounds": [1, 2, 3, 15, HEADS * M * N], "composition": "mul"},
    "dense": {"bounds": [HEADS * M * N]},
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", NESTED)
def test_nested_prefixes(name):
    """With passes of other tokens and kinds, and frequent rows that are cut into segments."""
    settings = dict(NESTED[name])
    bounds, dense = settings.pop("bounds"), name == "dense"
    weights = new_weights(dense, frequent=True)
    truth, step = Autograd(weights, **settings), make(copy_of(weights), **settings)
    mask = torch.zeros(HEADS * M * N, dtype=torch.bool, device=DEVICE)
    mask[:2] = True
    for number, x in enumerate(batches(3)):
        out, expected = step.accumulate(x, bounds=bounds), truth.backward(x, bounds=bounds)
        torch.testing.assert_close(out.loss.double(), expected, rtol=1e-5, atol=0)
        w_dec, b_dec = (step.weights[n].detach() for n in ("w_dec", "b_dec"))
        error = sparse_decode(out.codes, w_dec=w_dec, b_dec=b_dec, impl="torch") - x
        torch.testing.assert_close(out.residual, error, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out.mse, error.square().mean(), rtol=1e-5, atol=0)
        if number % 2:
            step.accumulate(x[:2], bias=False, weight=0.5)
            truth.backward(x[:2], bias=False, weight=0.5)
            step.accumulate(x[1:4], bounds=[5, HEADS * M * N])
            truth.backward(x[1:4], bounds=[5, HEADS * M * N])
            # Places that a mask leaves over are in no prefix.
            step.accumulate(x, bounds=bounds, k=5, mask=mask)
            truth.backward(x, bounds=bounds, k=2, mask=mask)
        norm, expected = step.apply(1e-2), truth.apply(1e-2)
        torch.testing.assert_close(norm.double(), expected.double(), rtol=1e-4, atol=0)
    assert_same(step, truth, 1e-5, weights)


HIERARCHICAL = {
    "kron": ([1, 2, 4], {"eps": 1e-2}),
    "kron-mul": ([2, 4], {"composition": "mul"}),
    "dense": ([1, 2, 3, 4], {}),
}


@pytest.mark.parametrize("name", HIERARCHICAL)
def test_prefixes_of_the_codes(name):
    """Beside passes of other kinds."""
    prefixes, settings = HIERARCHICAL[name]
    weights = new_weights(name == "dense", frequent=True)
    truth, step = Autograd(weights, **settings), make(copy_of(weights), **settings)
    mask = torch.zeros(HEADS * M * N, dtype=torch.bool, device=DEVICE)
    mask[:2] = True
    for x in batches(2):
        out = step.accumulate(x, k=4, prefixes=prefixes)
        expected = truth.backward(x, k=4, prefixes=prefixes)
        torch.testing.assert_close(out.loss.double(), expected, rtol=1e-5, atol=0)
        w_dec, b_dec = (step.weights[n].detach() for n in ("w_dec", "b_dec"))
        error = sparse_decode(out.codes, w_dec=w_dec, b_dec=b_dec, impl="torch") - x
        torch.testing.assert_close(out.residual, error, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out.mse, error.square().mean(), rtol=1e-5, atol=0)
        step.accumulate(x[:2], bias=False, weight=0.5)
        truth.backward(x[:2], bias=False, weight=0.5)
        # Places that a mask leaves over add nothing: the last prefixes are the same then.
        step.accumulate(x, prefixes=[1, 3, 4], k=4, mask=mask)
        masked = {"k": 2, "mask": mask}
        truth.backward(x, prefixes=[1, 2], weight=1 / 3 * 2, **masked)
        truth.backward(x, weight=1 / 3, **masked)
        norm, expected = step.apply(1e-2), truth.apply(1e-2)
        torch.testing.assert_close(norm.double(), expected.double(), rtol=1e-4, atol=0)
    assert_same(step, truth, 1e-5, weights)


def test_prefixes_are_of_a_tokens_own_codes():
    step, x = make(new_weights(True)), batches(1)[0]
    for wrong, words in (
        ({"prefixes": [1, 2]}, "prefixes: expected k = 3 as the last"),
        ({"prefixes": [3, 3]}, "prefixes: .* ascending integers"),
        ({"prefixes": [1, 3], "width": 6}, "without bounds or a width"),
    ):
        with pytest.raises(ValueError, match=words):
            step.accumulate(x, **wrong)


@pytest.mark.slow
def test_nested_prefixes_in_bfloat16_are_as_close_as_autocast():
    """As `test_bfloat16_is_as_close_to_float32_as_autocast_is`."""
    bounds, distances = [6, 12, HEADS * M * N], []
    weights = new_weights(False)
    truth, rounded = Autograd(weights), Autograd(weights, dtype=torch.float32, autocast=True)
    step = make(copy_of(weights), dtype=torch.bfloat16)
    for x in batches(6):
        for each in (truth, rounded):
            each.backward(x, bounds=bounds)
            each.apply(1e-2)
        step.accumulate(x, bounds=bounds)
        step.apply(1e-2)
    for found in (step, rounded):
        moved = [found.weights[w].double() - truth.weights[w] for w in fused.NAMES]
        distances.append(torch.cat([m.detach().flatten() for m in moved]).norm())
    assert 0 < distances[0] <= 2 * distances[1], distances


@pytest.mark.parametrize("number", range(12))
def test_largest_of_a_batch(number):
    """With ties, against a stable sort of all values; nothing that is not active is kept."""
    from kronsae_kernels.triton_impl import operations

    generator = torch.Generator().manual_seed(number)
    tokens, width = 1 + number % 4, 1 + 5 * (number % 3)
    count = 1 + number * 7 % (tokens * width)
    composition = ("mand", "mul", "dense")[number % 3]
    base, extension = (
        torch.randint(-1, 3, (tokens, width), generator=generator).float() for _ in range(2)
    )
    if composition == "mand":
        base, extension = base.relu(), extension.relu()
    eps = 0.25 if composition == "mand" else 0.0
    values = base if composition == "dense" else base * extension
    values, order = values.sort(dim=1, descending=True, stable=True)
    base, extension = base.gather(1, order), extension.gather(1, order)
    if composition == "mand":
        values = torch.where(values == 0, eps, values + eps).sqrt()
    indices = torch.randint(40, (tokens, width), generator=generator)
    first = values.flatten().sort(descending=True, stable=True).indices[:count]
    keep = torch.zeros(tokens * width, dtype=torch.bool).index_fill_(0, first, True)
    keep = keep.view(tokens, width) & (values > eps**0.5)
    expected, narrow = indices.where(keep, -1), torch.zeros((), device=DEVICE)
    got, base, extension = (t.to(DEVICE) for t in (indices.clone(), base, extension))
    operations.keep_largest(
        got, base, extension, count, composition, eps, eps**0.5, width + number % 2, narrow
    )
    assert torch.equal(got.cpu(), expected)
    assert float(narrow) == float(number % 2 == 1 and keep[:, -1].any())


def test_no_step_is_made_with_too_few_candidates():
    """Nor after that, until somebody says so; batches given again train as they would have."""
    weights = new_weights(False)
    step, other = make(copy_of(weights)), make(copy_of(weights))
    size, xs = HEADS * M * N, batches(3)
    for x in xs:
        step.accumulate(x, width=K)
        assert step.apply(1e-2).isnan()
    assert step.missed.tolist() == [0, 3] and step.skips.tolist() == [0] * 4
    for name, weight in weights.items():
        assert torch.equal(step.weights[name], weight), name
    step.accumulate(xs[0], width=K)
    step.forget()
    step.missed.zero_()
    for x in xs:
        out = step.accumulate(x, width=size)
        assert int((out.codes.indices >= 0).sum()) == K * B
        assert step.apply(1e-2).isfinite()
        other.accumulate(x, width=size)
        other.apply(1e-2)
    assert not step.missed.any()
    for name, weight in other.weights.items():
        assert torch.equal(step.weights[name], weight), name


def drawn_codes(number: int) -> dict[str, Any]:
    """Arguments of `operations.decode_and_loss`, all drawn: odd sizes, no token, missing places."""
    chance, generator = random.Random(number), torch.Generator().manual_seed(number)
    tokens, d = chance.choice([0, 1, 2]), chance.choice([1, 7, 16, 33, 65])
    k, size = chance.choice([1, 3, 5, 17, 40]), chance.choice([3, 11])
    composition = chance.choice(["mand", "relu_mul", "mul", "dense"])
    dtype = chance.choice([torch.float32, torch.bfloat16, torch.float16])
    base, extension = torch.randn(2, tokens, k, generator=generator)
    if composition != "mul":
        base, extension = base.relu(), extension.relu()
    if composition == "dense":
        extension = base
    indices = torch.randint(-1, size, (tokens, k), generator=generator)
    scale = chance.choice([0.5, torch.tensor(0.25)])
    return {
        "x": torch.randn(tokens, d, generator=generator).to(chance.choice([dtype, torch.float32])),
        "indices": indices,
        "base": base,
        "extension": extension,
        "table": torch.randn(size, d, generator=generator).to(dtype),
        "bias": chance.choice([None, torch.randn(d, generator=generator)]),
        "composition": composition,
        "eps": chance.choice([0.0, 1e-2]),
        "scale": scale.to(DEVICE) if isinstance(scale, Tensor) else scale,
    }


@pytest.mark.one_in(3)
@pytest.mark.parametrize("block", range(10))
@pytest.mark.parametrize("one_gather", [True, False], ids=["one-gather", "two-gathers"])
def test_drawn_codes(one_gather, block):
    """25 each, against autograd in float64."""
    from kronsae_kernels import reference
    from kronsae_kernels.triton_impl import operations

    for number in range(25 * block, 25 * block + 25):
        given = drawn_codes(number)
        given = {n: v.to(DEVICE) if isinstance(v, Tensor) else v for n, v in given.items()}
        found = operations.decode_and_loss(**given, one_gather=one_gather)
        there, scale = given["indices"] >= 0, float(given["scale"])
        p, q = (given[n].double().requires_grad_() for n in ("base", "extension"))
        if given["composition"] == "dense":
            values = p.where(there, 0)
        else:
            values = reference.compose(p * q, given["composition"], given["eps"]).where(there, 0)
        values.retain_grad()
        rows = given["table"].double()[given["indices"].clamp(min=0)]
        error = (values[..., None] * rows).sum(1) - given["x"].double()
        error = error if given["bias"] is None else error + given["bias"].double()
        squares = error.square().sum(1)
        (squares.sum() * scale / 2).backward()
        d_base, d_extension = p.grad, q.grad
        if given["composition"] == "dense":
            d_base = d_extension = p.grad * (p > 0)
        elif given["composition"] != "mul":
            d_base, d_extension = p.grad * (p > 0), q.grad * (q > 0)
        expected = {
            "values": values.detach(),
            "scaled": values.detach() * scale,
            "along": values.detach() * values.grad,
            "d_base": d_base,
            "d_extension": d_extension,
        }
        for name, truth in expected.items():
            got = getattr(found, name)
            assert not got[~there].any(), (number, name)
            bound = 1e-4 * (1 + truth.abs().max()) if truth.numel() else 0
            assert ((got.double() - truth).abs() <= bound).all(), (number, name)
        torch.testing.assert_close(found.sums[0].double(), squares.detach(), rtol=1e-5, atol=1e-6)
        assert not found.sums[1].any(), number
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}
        rtol = tolerance[found.residual.dtype]
        torch.testing.assert_close(found.residual.double(), error.detach(), rtol=rtol, atol=1e-4)


@pytest.mark.parametrize("one_gather", [True, False], ids=["one-gather", "two-gathers"])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_what_is_not_finite_is_marked_in_its_token(bad, one_gather):
    from kronsae_kernels.triton_impl import operations

    for spoiled in ("x", "base", "scale"):
        given: dict[str, Any] = {
            "x": torch.ones(3, 5),
            "indices": torch.arange(6).view(3, 2),
            "base": torch.ones(3, 2),
            "extension": torch.ones(3, 2),
            "table": torch.ones(6, 5),
            "scale": torch.ones(()),
        }
        given[spoiled].view(-1)[0] = bad
        given = {name: value.to(DEVICE) for name, value in given.items()}
        found = operations.decode_and_loss(
            **given, bias=None, composition="mul", eps=0.0, one_gather=one_gather
        )
        of_token = found.sums[1].isfinite().tolist()
        assert of_token == ([False] * 3 if spoiled == "scale" else [False, True, True]), spoiled
    # Numbers whose sum would overflow are finite themselves.
    large = {**given, "scale": 1e38 / 3, "base": torch.ones(3, 2).to(DEVICE)}
    found = operations.decode_and_loss(
        **large, bias=None, composition="mul", eps=0.0, one_gather=one_gather
    )
    assert found.d_base.isfinite().all() and not found.sums[1].any()


def test_clipping():
    weights = new_weights(False)
    truth, step = Autograd(weights), make(copy_of(weights))
    norms = []
    for x in batches(4):
        step.accumulate(x), truth.backward(x)
        norms.append(step.apply(1e-2, max_norm=0.1))
        torch.testing.assert_close(norms[-1].double(), truth.apply(1e-2, max_norm=0.1), rtol=1e-4,
                                   atol=0)  # fmt: skip
    assert max(norms) > 0.2  # it was clipped
    assert_same(step, truth, 1e-5, weights)


@pytest.mark.slow
def test_bfloat16_is_as_close_to_float32_as_autocast_is():
    """After 6 steps, weights are at most twice as far from the float32 run's as autocast's are.

    Both round activations, weights and pre-latents to 8 bits before the same products; the fused
    step also reads decoder rows, and writes residuals, in bfloat16, where autocast keeps float32:
    two more roundings of the same size, so a factor of 2 with room. (A bound from the dtype alone
    would say little: where rounding changes which latent is the k-th, a step differs by a whole
    latent.)
    """
    distances: dict[str, list[Tensor]] = {"fused": [], "autocast": []}
    for seed in range(2):
        weights = new_weights(False, seed)
        truth = Autograd(weights)
        step = make(copy_of(weights), dtype=torch.bfloat16)
        rounded = Autograd(weights, dtype=torch.float32, autocast=True)
        for x in batches(6, seed=10 + seed):
            for each in (truth, rounded):
                each.backward(x)
                each.apply(1e-2)
            step.accumulate(x)
            step.apply(1e-2)
        for name, found in (("fused", step), ("autocast", rounded)):
            moved = [found.weights[w].double() - truth.weights[w] for w in fused.NAMES]
            distances[name].append(torch.cat([m.detach().flatten() for m in moved]).norm())
        for name in ("w_enc", "w_dec"):  # the copies that kernels read follow the weights
            copy = step._copies[name]
            stored = step.weights[name].transpose(0, 1) if name == "w_enc" else step.weights[name]
            assert torch.equal(copy, stored.bfloat16())
    ours, theirs = (torch.stack(found).mean() for found in distances.values())
    assert 0 < ours <= 2 * theirs, f"fused {ours:.3e}, autocast {theirs:.3e} from float32"


@pytest.mark.slow
def test_bfloat16_moments_train_as_well():
    """After 200 steps, the explained variance is within 0.002 of float32 AdamW's, by torch."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    data = drawn(4, 2).relu() @ drawn(2, 6) + 0.1 * drawn(4, 6)
    w_dec = drawn(4, 6)
    w_dec /= w_dec.norm(dim=1, keepdim=True)
    weights = {
        "w_enc": drawn(M + 1, 2, 6).transpose(0, 1) / 6**0.5,
        "b_enc": torch.full((2, M + 1), 0.3, device=DEVICE),
        "w_dec": w_dec,
        "b_dec": data.mean(0),
    }
    step = TrainingStep(**copy_of(weights), m=M, k=4, moments="bfloat16")
    truth = Autograd(weights, dtype=torch.float32)
    for number in range(200):
        lr = 1e-2 * (1 - number / 200)
        step.accumulate(data), truth.backward(data, k=4)
        step.apply(lr), truth.apply(lr)
    variance = (data - data.mean(0)).square().mean()
    got = 1 - float(step.accumulate(data).loss / variance)
    expected = 1 - float(truth.backward(data, k=4) / variance)
    assert step.state["w_dec"]["exp_avg_sq"].dtype == torch.bfloat16
    assert step.state["b_enc"]["exp_avg"].dtype == torch.float32
    assert expected > 0.9
    assert got != expected and abs(got - expected) <= 0.002, f"{got}, float32: {expected}"


@pytest.mark.parametrize(
    "dense",
    [pytest.param(False, id="kron"), pytest.param(True, id="dense", marks=pytest.mark.slow)],
)
def test_bfloat16_moments_are_the_same_after_a_resume(dense):
    """To the bit: noise depends on the number of the step alone; and on that it does depend."""
    weights, data = new_weights(dense), batches(4)
    whole = make(copy_of(weights), moments="bfloat16")
    for x in data:
        whole.accumulate(x), whole.apply(1e-2)
    first = make(copy_of(weights), moments="bfloat16")
    for x in data[:2]:
        first.accumulate(x), first.apply(1e-2)
    state = {
        name: {key: torch.empty_like(t).copy_(t) for key, t in of_weight.items()}
        for name, of_weight in first.state.items()
    }
    second = make(copy_of(first.weights), moments="bfloat16", state=state)
    for x in data[2:]:
        second.accumulate(x), second.apply(1e-2)
    for name in fused.NAMES:
        assert torch.equal(second.weights[name], whole.weights[name]), name
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(second.state[name][moment], whole.state[name][moment]), name


def test_state_is_that_of_the_weights():
    """A moment in another layout would be read as another weight's."""
    weights = new_weights(False)

    def changed(name: str, key: str, value: object) -> dict:
        state = fused.new_state(weights)
        return {**state, name: {**state[name], key: value}}

    turned = torch.zeros_like(weights["w_enc"], memory_format=torch.contiguous_format)
    for state, message in (
        (changed("w_enc", "exp_avg", turned.contiguous()), "w_enc: exp_avg: .*shape, strides"),
        (changed("w_dec", "exp_avg_sq", torch.zeros(3, 3)), "w_dec: exp_avg_sq: .*shape, strides"),
        (changed("b_dec", "step", 3), "b_dec: step: expected a float32 scalar tensor on .*got 3"),
        ({}, "state: w_enc: expected a step and both moments"),
    ):
        with pytest.raises(ValueError, match=message):
            make(weights, state=state)


def test_masks_are_bool():
    step, x = make(new_weights(False)), batches(1)[0]
    with pytest.raises(ValueError, match="mask: expected torch.bool, got torch.uint8"):
        step.accumulate(x, mask=torch.ones(step.dict_size, dtype=torch.uint8, device=DEVICE))
    with pytest.raises(ValueError, match="x: expected a tensor"):
        step.accumulate([[1.0]])
    with pytest.raises(ValueError, match="x: expected float64, .* got torch.int64"):
        step.accumulate(x.long())


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"lr": math.nan}, ["lr:", "finite number >= 0", "nan"]),
        ({"lr": -1e-3}, ["lr:", ">= 0", "-0.001"]),
        ({"lr": "1e-3"}, ["lr:", "number", "'1e-3' (str)"]),
        ({"lr": True}, ["lr:", "number", "True (bool)"]),
        ({"lr": torch.ones(2)}, ["lr:", "scalar", "[2]"]),
        ({"max_norm": 0}, ["max_norm:", "> 0, or None", "got 0"]),
        ({"max_norm": -1.0}, ["max_norm:", "> 0", "-1.0"]),
        ({"max_norm": math.inf}, ["max_norm:", "finite", "inf"]),
        ({"max_norm": "1"}, ["max_norm:", "number", "'1' (str)"]),
    ],
    ids=lambda value: None,
)
def test_errors_of_apply(arguments, words):
    """Nothing has changed by then: the same call with right numbers makes the step."""
    step = make(new_weights(False))
    step.accumulate(batches(1)[0])
    with pytest.raises(ValueError) as error:
        step.apply(**{"lr": 1e-3, **arguments})
    assert all(word in str(error.value) for word in words), str(error.value)
    assert step.apply(1e-3).isfinite()


def test_state_has_the_dtype_of_moments():
    weights = new_weights(False)
    with pytest.raises(ValueError, match="w_enc: exp_avg: expected torch.bfloat16.*float32"):
        make(weights, moments="bfloat16", state=fused.new_state(weights))
    with pytest.raises(ValueError, match="moments: expected one of .*got 'int8'"):
        make(weights, moments="int8")


def test_float16():
    weights = new_weights(False)
    step, truth = make(copy_of(weights), dtype=torch.float16), Autograd(weights)
    for x in batches(3):
        step.accumulate(x), truth.backward(x)
        step.apply(1e-3), truth.apply(1e-3)
    assert_same(step, truth, 1e-2, weights)


def test_a_run_can_go_from_torch_to_the_fused_step():
    """Weights and AdamW's state are shared, not copied."""
    weights = new_weights(False)
    truth, other = Autograd(weights), Autograd(weights, dtype=torch.float32)
    first, last = batches(6)[:3], batches(6)[3:]
    for x in first:
        for each in (truth, other):
            each.backward(x)
            each.apply(1e-2)
    detached = {name: w.detach() for name, w in other.weights.items()}
    state = {name: other.optimizer.state[w] for name, w in other.weights.items()}
    step = make(detached, state=state)
    for x in last:
        truth.backward(x), step.accumulate(x)
        truth.apply(1e-2), step.apply(1e-2)
    assert_same(step, truth, 1e-5, weights)
    assert float(other.optimizer.state[other.weights["b_dec"]]["step"]) == 6
    other.backward(last[0])  # and back
    truth.backward(last[0])
    truth.apply(1e-2), other.apply(1e-2)
    assert_same(step, truth, 1e-5, weights)


def test_weights_that_others_changed_are_read_anew():
    step, x = make(new_weights(False), dtype=torch.bfloat16), batches(1)[0]
    before = step.accumulate(x).loss
    with torch.no_grad():
        step.weights["w_dec"].mul_(0.5)
    assert not torch.equal(step.accumulate(x).loss, before)


@pytest.mark.parametrize(
    "bounds, what",
    [
        pytest.param(None, "x", id="plain-x"),
        pytest.param([6, 18], "target", id="nested-target"),
        pytest.param(None, "target", id="plain-target", marks=pytest.mark.slow),
        pytest.param([6, 18], "x", id="nested-x", marks=pytest.mark.slow),
    ],
)
def test_nothing_changes_where_something_is_not_finite(what, bounds):
    weights = new_weights(False)
    step, (x, good) = make(weights), batches(2)
    step.accumulate(good)
    step.apply(1e-2)
    before = copy_of({**step.weights, **{n: s["exp_avg"] for n, s in step.state.items()}})
    before |= {"step": step.state["w_enc"]["step"].clone()}
    bad = x.clone()
    bad[1, 2] = torch.nan
    step.accumulate(good)
    step.accumulate(bad if what == "x" else x, target=bad, bounds=bounds)
    assert step.apply(1e-2).isnan()
    after = {**step.weights, **{n: s["exp_avg"] for n, s in step.state.items()}}
    after |= {"step": step.state["w_enc"]["step"]}
    for name, expected in before.items():
        assert torch.equal(after[name], expected), name
    step.accumulate(good)  # and training goes on
    assert step.apply(1e-2).isfinite()
    assert not torch.equal(step.weights["w_dec"], before["w_dec"])


def test_everything_is_written(poisoned_memory):
    for dense in (False, True):
        step = make(new_weights(dense), dtype=torch.bfloat16)
        for x in batches(2):
            step.accumulate(x, bounds=[1, 9, HEADS * M * N])
            out = step.accumulate(x)
            assert all(t.isfinite().all() for t in (out.loss, out.codes.values, out.residual))
            assert step.apply(1e-2, max_norm=1.0).isfinite()
        found = [*step.weights.values(), *step._copies.values()]
        found += [t for state in step.state.values() for t in state.values()]
        assert all(t.isfinite().all() for t in found)


def test_rate_on_the_device_and_deterministic_algorithms():
    """As a CUDA graph wants the rate; the same bits in every run."""
    results = []
    for lr in (1e-2, torch.tensor(1e-2, device=DEVICE), 1e-2):
        torch.use_deterministic_algorithms(len(results) == 2)
        try:
            step = make(new_weights(False))
            for x in batches(2):
                step.accumulate(x)
                step.apply(lr)
        finally:
            torch.use_deterministic_algorithms(False)
        results.append(step.weights)
    for name, expected in results[0].items():
        assert torch.equal(results[2][name], expected), name
        torch.testing.assert_close(results[1][name], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_graph_gives_the_same_bits(dtype):
    weights = new_weights(False)
    eager, graphed = (make(copy_of(weights), dtype=dtype) for _ in range(2))
    replay = fused.GraphedStep(graphed)
    for number, x in enumerate(batches(8)):
        lr = torch.tensor(1e-2 / (1 + number), device=DEVICE)
        expected = eager.accumulate(x)
        norm = eager.apply(lr)
        out, got = replay(x, lr)
        assert torch.equal(out.loss, expected.loss) and torch.equal(got, norm)
        assert torch.equal(out.codes.indices, expected.codes.indices)
    for name in fused.NAMES:
        assert torch.equal(graphed.weights[name], eager.weights[name]), name


# Arguments


def changed(**changes: Any) -> Weights:
    return {**new_weights(False), **changes}


@pytest.mark.parametrize(
    "weights, settings, words",
    [
        (changed(b_dec=torch.zeros(D + 1)), {}, ["b_dec", f"[{D}]", f"[{D + 1}]"]),
        (changed(w_dec=torch.zeros(5, D)), {}, ["w_dec", "18", "5"]),
        (changed(w_dec=torch.zeros(18, D).double()), {}, ["w_dec", "float32", "float64"]),
        (changed(w_enc=torch.zeros(HEADS, M + N, D)), {}, ["row-major over heads"]),
        ({}, {"m": M + N}, ["m:", "5 rows a head"]),
        ({}, {"k": 0}, ["k:", "18", "got 0"]),
        ({}, {"k": 19}, ["k:", "18", "got 19"]),
        ({}, {"composition": "xor"}, ["composition", "'xor'"]),
        ({}, {"eps": -1.0}, ["eps", "-1.0"]),
        ({}, {"eps": "0"}, ["eps:", "number", "'0' (str)"]),
        ({}, {"k": True}, ["k:", "integer in [1, 18]", "True (bool)"]),
        ({}, {"k": torch.tensor(3)}, ["k:", "integer in [1, 18]", "tensor(3) (torch.Tensor)"]),
        ({}, {"unit_norm": "yes"}, ["unit_norm", "'yes' (str)"]),
        ({}, {"ranks": 3}, ["ranks: expected rank, size, sum and gather", "3"]),
        ({}, {"state": 5}, ["state: expected a mapping, got 5"]),
        ({}, {"state": {"w_enc": 3}}, ["state: w_enc: expected a mapping, got 3"]),
        ({}, {"dtype": torch.int8}, ["dtype:", "torch.float32", "torch.int8"]),
        ({}, {"dtype": torch.float64}, ["dtype:", "torch.float32", "got torch.float64"]),
        ({}, {"dtype": "bfloat16"}, ["dtype:", "torch.float32", "'bfloat16' (str)"]),
        ({}, {"betas": 0.9}, ["betas:", "two numbers", "0.9"]),
        ({}, {"betas": (0.9,)}, ["betas:", "two numbers", "(0.9,)"]),
        ({}, {"betas": (1.0, 0.999)}, ["betas[0]:", ">= 0 and < 1", "1.0"]),
        ({}, {"betas": (0.9, -0.1)}, ["betas[1]:", ">= 0 and < 1", "-0.1"]),
        ({}, {"betas": (0.9, math.nan)}, ["betas[1]:", "finite", "nan"]),
        ({}, {"betas": (None, 0.9)}, ["betas[0]:", "number", "None"]),
        ({}, {"adam_eps": -1e-8}, ["adam_eps:", ">= 0", "-1e-08"]),
        ({}, {"adam_eps": math.inf}, ["adam_eps:", "finite", "inf"]),
        ({}, {"weight_decay": -1.0}, ["weight_decay:", ">= 0", "-1.0"]),
        ({}, {"weight_decay": math.nan}, ["weight_decay:", "finite", "nan"]),
        ({}, {"encoder_lr_ratio": -0.5}, ["encoder_lr_ratio:", ">= 0", "-0.5"]),
        ({}, {"silent": torch.zeros(18)}, ["silent:", "int64", "torch.float32"]),
        ({}, {"silent": torch.zeros(5).long()}, ["silent:", "[F] = [18]", "[5]"]),
        ({}, {"silent": torch.zeros(18, 2).long()[:, 0]}, ["silent:", "contiguous", "stride 2"]),
        ({}, {"silent": [0] * 18}, ["silent:", "tensor", "[0, 0, "]),
    ],
    ids=lambda value: None,
)
def test_errors_of_the_constructor(weights, settings, words):
    weights = {n: w.to(DEVICE) for n, w in (weights or new_weights(False)).items()}
    if isinstance(settings.get("silent"), Tensor) and DEVICE.type != "cpu":
        settings = {"silent": settings["silent"].to(DEVICE)}
    if "row-major over heads" not in words:
        weights["w_enc"] = new_weights(False)["w_enc"]
    with pytest.raises(ValueError) as error:
        make(weights, **settings)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"x": torch.zeros(3, D + 1)}, ["x:", f"[B, {D}]", "[3, 13]"]),
        ({"x": None}, ["x: expected a tensor, got None"]),
        ({"x": torch.zeros(3, D).to_sparse()}, ["x: expected a dense tensor", "sparse"]),
        ({"x": torch.zeros(3, D), "bias": "no"}, ["bias", "'no' (str)"]),
        ({"x": torch.zeros(0, D)}, ["x:", "B >= 1"]),
        ({"x": torch.zeros(3, D), "target": torch.zeros(2, D)}, ["target", "[2, 12]"]),
        ({"x": torch.zeros(3, D), "mask": torch.ones(5, dtype=torch.bool)}, ["mask", "18", "5"]),
        ({"x": torch.zeros(3, D), "k": 19}, ["k:", "18", "19"]),
        ({"x": torch.zeros(3, D), "width": 2}, ["width", "k = 3 to F = 18", "2"]),
        ({"x": torch.zeros(3, D), "width": 4, "mask": torch.ones(18).bool()}, ["mask", "width"]),
        ({"x": np.zeros((3, D))}, ["x:", "tensor", "numpy.ndarray"]),
        ({"x": torch.zeros(3, D), "target": [0.0]}, ["target:", "tensor", "[0.0]"]),
        ({"x": torch.zeros(3, D), "mask": np.ones(18, bool)}, ["mask:", "tensor", "numpy.ndarray"]),
        ({"x": torch.zeros(3, D), "k": True}, ["k:", "integer", "True (bool)"]),
        ({"x": torch.zeros(3, D), "width": 4.0}, ["width:", "integer", "4.0"]),
        ({"x": torch.zeros(3, D), "weight": math.nan}, ["weight:", "finite", "nan"]),
        ({"x": torch.zeros(3, D), "weight": "1"}, ["weight:", "number", "'1' (str)"]),
        ({"x": torch.zeros(3, D), "weight": torch.ones(2)}, ["weight:", "scalar", "[2]"]),
        ({"x": torch.zeros(3, D), "weight": torch.tensor(1)}, ["weight:", "floating", "int64"]),
        ({"x": torch.zeros(3, D), "bounds": 18}, ["bounds:", "ascending integers", "18"]),
        ({"x": torch.zeros(3, D), "bounds": [True, 18]}, ["bounds:", "integers", "[True, 18]"]),
        (
            {"x": torch.zeros(3, D), "bounds": torch.tensor([18, 6])},
            ["bounds:", "ascending integers", "[18, 6]"],
        ),
        ({"x": torch.zeros(3, D), "bounds": []}, ["bounds", "ascending", "[]"]),
        ({"x": torch.zeros(3, D), "bounds": [5, 17]}, ["bounds", "F = 18", "[5, 17]"]),
    ],
    ids=lambda value: None,
)
def test_errors_of_accumulate(arguments, words):
    arguments = {
        name: value.to(DEVICE) if isinstance(value, Tensor) and name != "bounds" else value
        for name, value in arguments.items()
    }
    with pytest.raises(ValueError) as error:
        make(new_weights(False)).accumulate(**arguments)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_transcoder_needs_a_target():
    step = make(
        changed(w_dec=torch.zeros(18, D + 2).to(DEVICE), b_dec=torch.zeros(D + 2).to(DEVICE))
    )
    x = torch.zeros(3, D, device=DEVICE)
    for target, words in ((None, rf"target: expected .B, {D + 2}."), (x, r"target: .*\[3, 14\]")):
        with pytest.raises(ValueError, match=words):
            step.accumulate(x, target=target)


def test_apply_needs_something():
    with pytest.raises(RuntimeError, match="nothing was accumulated"):
        make(new_weights(False)).apply(1e-3)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU is here")
def test_cuda_graph_needs_a_gpu():
    with pytest.raises(RuntimeError, match="CUDA"):
        fused.GraphedStep(make(new_weights(False)))


def test_why_not():
    assert fused.why_not(DEVICE, D) is None
    assert "float64" in fused.why_not(DEVICE, D, torch.float64)
    assert "16384" in fused.why_not(DEVICE, 16384)
