"""`batch_topk_encode` and `expert_encode` against the reference, and as parts of compiled SAEs."""

import implementations
import pytest
import torch
from torch.func import grad, jvp, vmap

from kronsae import SAE, SAEConfig
from kronsae_kernels import batch_topk_encode, expert_encode, reference, sparse_decode

M, N, H, D, B = 2, 3, 6, 5, 12
F, E = H * M * N, 3
KINDS = ["mand", "relu_mul", "mul", "dense"]
IMPLS = pytest.mark.parametrize("impl", ["torch", implementations.TRITON])


def inputs(kind, dtype=torch.float32):
    x, w, b = (torch.randn(*s, dtype=dtype) for s in ((B, D), (H, M + N, D), (H, M + N)))
    if kind == "dense":
        return (x, w.flatten(0, 1), b.flatten()), {}
    return (x, w, b), {"m": M, "composition": kind, "eps": 1e-3}


def size_of(kind):
    return H * (M + N) if kind == "dense" else F


def assert_as_reference(encode, tensors, impl, **options):
    results = []
    for name in (impl, "reference"):
        leaves = [t.clone().requires_grad_() for t in tensors]
        codes = encode(*leaves, impl=name, **options)
        gradients = torch.autograd.grad(codes.values.square().sum(), leaves)
        results.append((codes, gradients))
    (got, gradients), (expected, of_reference) = results
    torch.testing.assert_close(got.values, expected.values)
    active = expected.values != 0
    assert torch.equal(got.indices[active], expected.indices[active])
    torch.testing.assert_close(gradients, of_reference, rtol=1e-5, atol=1e-4)
    return got


@pytest.mark.one_in(3)
@IMPLS
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("k", [1, 4, 10, 30])
@pytest.mark.parametrize("kind", KINDS)
def test_batch_topk(kind, k, masked, impl):
    tensors, gate = inputs(kind)
    mask = torch.rand(size_of(kind)) < 0.7 if masked else None
    codes = assert_as_reference(batch_topk_encode, tensors, impl, k=k, mask=mask, **gate)
    assert codes.indices.min() >= 0
    assert codes.indices.max() < size_of(kind)


def test_batch_topk_is_topk_of_all_scores():
    """All of the batch's latents may be on one token, and leading dimensions are one batch."""
    (x, w, b), gate = inputs("relu_mul", torch.float64)
    x[3] *= 100
    codes = batch_topk_encode(x.view(3, 4, D), w, b, k=2, **gate)
    scores = reference.latents(x, w, b, M, "relu_mul")
    top = scores.flatten().topk(2 * B)
    expected = torch.zeros(B * F, dtype=torch.float64)
    expected[top.indices] = top.values
    got = torch.zeros(3, 4, F, dtype=torch.float64)
    got.scatter_add_(-1, codes.indices, codes.values)
    torch.testing.assert_close(got.view(-1), expected)
    assert (codes.values[0, 3] > 0).sum() > 4


def test_batch_topk_of_ties_and_of_nothing():
    w = torch.ones(H, M + N, D)
    codes = batch_topk_encode(torch.ones(B, D), w, m=M, k=3)
    first = codes.values.view(B, -1) > 0
    assert first.sum() == 3 * B  # of equal values the earliest tokens'
    assert first[0].all()
    assert not first[-1].any()
    assert batch_topk_encode(-torch.ones(B, D), w, m=M, k=3).values.tolist() == [[0.0]] * B
    assert batch_topk_encode(torch.ones(0, D), w, m=M, k=3).values.shape == (0, 1)
    for impl in ("torch", "reference"):
        none = torch.zeros(F, dtype=torch.bool)
        codes = batch_topk_encode(torch.ones(B, D), w, m=M, k=3, mask=none, impl=impl)
        assert codes.values.tolist() == [[0.0]] * B


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_batch_topk_of_a_row_that_is_not_finite(kind, number):
    """It gets k values that are not finite, and the others what they get beside an empty row."""
    tensors, gate = inputs(kind)
    x, *weights = (t.abs() for t in tensors)
    others = torch.arange(B) != 2
    x[2] = -1e3
    expected = batch_topk_encode(x, *weights, k=3, **gate).values[others] if kind != "mul" else None
    x[2] = number
    for impl in ("torch", "reference"):
        values = batch_topk_encode(x, *weights, k=3, impl=impl, **gate).values
        assert not values[2, :3].isfinite().any()
        assert (values[2, 3:] == 0).all()
        assert values[others].isfinite().all()
        if expected is not None:
            width = max(values.shape[1], expected.shape[1])
            got, wanted = (
                torch.nn.functional.pad(t, (0, width - t.shape[1]))
                for t in (values[others], expected)
            )
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("overflows", [1, 2, 6])
@pytest.mark.parametrize("impl", ["torch", "reference", implementations.TRITON])
def test_batch_topk_of_a_row_whose_products_overflow(overflows, impl):
    """It gets its k largest, and the others as many as if it had none, however many overflow."""
    w = torch.zeros(6, 2, 6)
    w[range(6), :, range(6)] = 1  # products are the squares of x
    x = torch.tensor([[2.0**40] * 6, [6.0, 5, 4, 3, 2, 1], [0.0] * 6])
    x[0, :overflows] = 2.0**70
    codes = batch_topk_encode(x, w, m=1, k=2, impl=impl)
    assert codes.values[0, :2].tolist() == [torch.inf, torch.inf if overflows > 1 else 2.0**40]
    assert codes.values[1].tolist() == [6.0, 5, 4, 3, 2, 1]
    assert not codes.values[0, 2:].any() and not codes.values[2].any()


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_batch_topk_orders_a_token_by_products_and_knows_its_mask(impl):
    """Unequal products may have one root; allowed latents of -inf come before those left out."""
    w = torch.tensor([[[1.0], [1.0], [1 + 2**-23]]])
    codes = batch_topk_encode(torch.ones(1, 1), w, m=1, k=1, impl=impl)
    assert codes.indices.tolist() == [[1]]
    w = torch.tensor([[[1.0], [-1.0], [-2.0], [3.0]]])
    codes = batch_topk_encode(
        torch.tensor([[1e20], [1.0]]),
        w,
        **{"m": 1, "k": 3, "composition": "mul", "impl": impl},
        mask=torch.tensor([False, True, True]),
    )
    assert codes.values.tolist() == [[torch.inf, -torch.inf], [3.0, 0.0]]
    assert codes.indices[0].tolist() == [2, 1] and codes.indices[1, 0] == 2


@pytest.mark.one_in(4)
@IMPLS
@pytest.mark.parametrize("k", [1, 4, 10])
@pytest.mark.parametrize("kind", KINDS)
def test_experts(kind, k, impl):
    tensors, gate = inputs(kind)
    expert = torch.randint(E - 1, (B,))  # the last one gets no token
    options = {"expert": expert, "experts": E, "k": k, **gate}
    codes = assert_as_reference(expert_encode, tensors, impl, **options)
    assert torch.equal(codes.indices // (size_of(kind) // E), expert[:, None].expand(B, k))
    wide = options | {"expert": expert.int().view(2, 6)}
    again = expert_encode(tensors[0].view(2, 6, D), *tensors[1:], impl=impl, **wide)
    assert torch.equal(again.values.view(B, k), codes.values)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_experts_that_are_none(impl):
    (x, w, b), gate = inputs("mand")
    expert = torch.zeros(B, dtype=torch.int64)

    def encode(**changes):
        options = {"expert": expert, "experts": E, "k": 2, "impl": impl, **gate}
        return expert_encode(x, w, b, **options | changes)

    for changes, message in [
        ({"expert": expert + E}, r"expert: expected integers in \[0, 3\), got \[3, 3\]"),
        ({"expert": expert - 1}, r"expert: expected integers in \[0, 3\), got \[-1, -1\]"),
        ({"expert": expert[:3]}, r"expert: expected one for each token"),
        ({"expert": expert.float()}, "expert: expected integers"),
        ({"experts": 4}, "experts: expected a divisor of the 6 rows"),
        ({"k": 13}, r"k: expected an integer in \[1, 12\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            encode(**changes)


@pytest.mark.parametrize("kind", ["mand", "dense"])
def test_transforms(kind):
    """Forward mode, second derivatives, and vmap over models."""
    (x, w, b), gate = inputs(kind, torch.float64)
    table = torch.randn(size_of(kind), D, dtype=torch.float64)
    expert = torch.randint(E, (B,))

    def loss(x, w, b, encode, impl):
        options = {"expert": expert, "experts": E} if encode is expert_encode else {}
        codes = encode(x, w, b, k=4, impl=impl, **options, **gate)
        return (sparse_decode(codes, w_dec=table, impl=impl) ** 3).sum()

    for encode in (batch_topk_encode, expert_encode):
        ours = lambda *t, e=encode: loss(*t, e, "torch")  # noqa: E731
        reference_ = lambda *t, e=encode: loss(*t, e, "reference")  # noqa: E731
        for function in (jvp, None):
            got, expected = (
                jvp(f, (x, w, b), (x, w, b))
                if function
                else jvp(grad(f, argnums=(0, 1, 2)), (x, w, b), (x, w, b))
                for f in (ours, reference_)
            )
            torch.testing.assert_close(got, expected)
        models = torch.stack([w, -w])
        got = vmap(ours, (None, 0, None))(x, models, b)
        torch.testing.assert_close(got, torch.stack([reference_(x, w, b), reference_(x, -w, b)]))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "point",
    [
        {"selection": "batchtopk"},
        {"selection": "jumprelu"},
        {"experts": 4},
        {"encoder": "dense", "selection": "batchtopk"},
    ],
    ids=lambda point: "-".join(map(str, point.values())),
)
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_saes_compile_whole(point, training):
    torch._dynamo.reset()
    heads = {"dict_size": 32} if "encoder" in point else {"heads": 8, "m": 2, "n": 2}
    sae, x = SAE(SAEConfig(d_model=D, k=4, **heads, **point)), torch.randn(64, D)
    with torch.no_grad():
        sae.selection.prepare(sae, x)
        sae.selection.update(sae, sae.encode(x))
    sae.train(training)
    compiled = torch.compile(sae, fullgraph=True, backend="aot_eager")
    parameters = [p for p in sae.parameters() if p.requires_grad]
    results = []
    for function in (compiled, sae):
        out = function(x)
        loss = out.x_hat.square().sum()
        results.append([out.x_hat, *torch.autograd.grad(loss, parameters, allow_unused=True)])
    for got, expected in zip(*results, strict=True):
        assert (got is None and expected is None) or torch.equal(got, expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("point", [{}, {"selection": "jumprelu"}, {"experts": 4}], ids=str)
def test_forward_mode_through_an_sae(point):
    """x . J^T J x both ways."""
    sae = SAE(SAEConfig(d_model=D, k=4, heads=8, m=2, n=2, **point)).double()
    x = torch.randn(16, D, dtype=torch.float64)
    with torch.no_grad():
        sae.selection.prepare(sae, x)
    out, tangent = jvp(lambda x: sae(x).x_hat, (x,), (x,))
    assert tangent.abs().sum() > 0
    pulled = grad(lambda x: (sae(x).x_hat * tangent).sum())(x)
    torch.testing.assert_close((pulled * x).sum(), tangent.square().sum())
