"""Derivatives of every order and mode, and vmap, of every operation: equal to the reference's."""

import itertools

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vmap
from torch.utils._pytree import tree_leaves

from kronsae_kernels import (
    SparseCodes,
    dense_encode,
    fused_encode,
    nested_decode,
    sparse_decode,
    threshold_encode,
)

M, N, H, D, B, K = 2, 3, 3, 4, 3, 5
F = H * M * N
ROWS = H * (M + N)


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def assert_same(got, expected):
    for a, b in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b)


def encoder(kind, impl):
    """x [B, d], w [h, m + n, d], b [h, m + n] to codes; kind: operation, and composition."""
    name, _, composition = kind.partition(" ")
    gate = {"m": M, "composition": composition, "eps": 1e-3}
    threshold = torch.full((F if composition else ROWS,), 0.2, dtype=torch.float64)
    if name == "fused":
        return lambda x, w, b: fused_encode(x, w, b, k=K, impl=impl, **gate)
    if name == "dense":
        return lambda x, w, b: dense_encode(x, w.flatten(0, 1), b.flatten(), k=K, impl=impl)
    if composition:
        return lambda x, w, b: threshold_encode(x, w, b, threshold=threshold, impl=impl, **gate)
    return lambda x, w, b: threshold_encode(
        x, w.flatten(0, 1), b.flatten(), threshold=threshold, impl=impl
    )


COMPOSITIONS = ("mand", "relu_mul", "mul")
ENCODERS = [
    *(f"fused {composition}" for composition in COMPOSITIONS),
    "dense",
    *(f"threshold {composition}" for composition in COMPOSITIONS),
    "threshold",
]
DECODERS = ["sparse", "nested"]


def operation(kind, impl):
    """A function of three tensors, and what to call it with."""
    torch.manual_seed(1)
    if kind in DECODERS:
        indices = torch.randint(F, (B, K))
        inputs = draw(B, K), draw(F, D), draw(D)
        bounds = [3, 7, F - 1]
        if kind == "nested":
            codes = lambda values: SparseCodes(values, indices)  # noqa: E731
            return lambda v, w, b: nested_decode(codes(v), bounds, w, b, impl=impl), inputs
        return lambda v, w, b: sparse_decode(v, indices, w, b, impl=impl), inputs
    encode = encoder(kind, impl)
    table = draw(F, D)
    inputs = draw(B, D), draw(H, M + N, D), draw(H, M + N)
    return lambda x, w, b: sparse_decode(encode(x, w, b), w_dec=table, impl=impl), inputs


def both(kind):
    ours, inputs = operation(kind, "torch")
    return ours, operation(kind, "reference")[0], inputs


def cubed(function):
    return lambda *inputs: (function(*inputs) ** 3).sum()


ALL = pytest.mark.parametrize("kind", ENCODERS + DECODERS)


@ALL
def test_forward_mode(kind):
    """Of each argument alone, and of any of them together."""
    ours, reference, inputs = both(kind)
    tangents = [torch.randn_like(t) for t in inputs]
    for count in (1, 2, 3):
        for places in itertools.combinations(range(3), count):

            def at(function, places=places):
                def call(*given):
                    arguments = list(inputs)
                    for place, tensor in zip(places, given, strict=True):
                        arguments[place] = tensor
                    return function(*arguments)

                primals = tuple(inputs[place] for place in places)
                return jvp(call, primals, tuple(tangents[place] for place in places))

            assert_same(at(ours), at(reference))


@ALL
def test_linearize_and_dual_tensors(kind):
    ours, reference, inputs = both(kind)
    tangents = tuple(torch.randn_like(t) for t in inputs)
    _, expected = jvp(reference, inputs, tangents)
    with forward_ad.dual_level(), torch.no_grad():
        duals = [forward_ad.make_dual(*pair) for pair in zip(inputs, tangents, strict=True)]
        assert_same(forward_ad.unpack_dual(ours(*duals)).tangent, expected)
    if not kind.startswith("threshold"):  # whose width linearize cannot trace
        assert_same(linearize(ours, *inputs)[1](*tangents), expected)


@ALL
def test_jacobians(kind):
    ours, reference, inputs = both(kind)
    for jacobian in (jacrev, jacfwd):
        assert_same(*(jacobian(f, argnums=(0, 1, 2))(*inputs) for f in (ours, reference)))


@pytest.mark.one_in(4)
@ALL
@pytest.mark.parametrize("outer", [jacrev, jacfwd])
@pytest.mark.parametrize("inner", [jacrev, jacfwd])
def test_second_derivatives(kind, outer, inner):
    """Gradient penalties, attribution, Jacobian SAEs."""
    ours, reference, inputs = both(kind)
    second = lambda f: outer(inner(cubed(f), argnums=(0, 1, 2)), argnums=(0, 1, 2))  # noqa: E731
    assert_same(second(ours)(*inputs), second(reference)(*inputs))


def test_third_derivatives():
    ours, reference, inputs = both("fused mand")
    third = lambda f: jacfwd(hessian(cubed(lambda x: f(x, *inputs[1:]))))  # noqa: E731
    assert_same(third(ours)(inputs[0]), third(reference)(inputs[0]))


@pytest.mark.one_in(3)
@ALL
def test_gradcheck_of_all_modes(kind):
    ours, _, inputs = both(kind)
    leaves = [t.clone().requires_grad_() for t in inputs]
    assert gradcheck(
        ours,
        leaves,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )
    assert gradgradcheck(ours, leaves, check_fwd_over_rev=True, check_rev_over_rev=True)


@ALL
def test_per_sample_gradients(kind):
    ours, reference, inputs = both(kind)
    if kind in DECODERS:
        pytest.skip("its indices belong to the batch: see test_vmap_over_codes")
    per_sample = vmap(grad(cubed(ours), argnums=(0, 1, 2)), (0, None, None))(*inputs)
    one = grad(cubed(reference), argnums=(0, 1, 2))
    expected = [one(x, *inputs[1:]) for x in inputs[0]]
    assert_same(per_sample, [torch.stack(t) for t in zip(*expected, strict=True)])


@ALL
def test_vmap_over_models(kind):
    """Also where models differ in the number of latents above a threshold."""
    ours, reference, (first, w, b) = both(kind)
    models = torch.stack([w, 2 * w, -w])
    got = vmap(ours, (None, 0, None))(first, models, b)
    assert_same(got, torch.stack([reference(first, model, b) for model in models]))
    biases = torch.stack([b, 2 * b, -b])
    got = vmap(ours, (None, 0, 0), out_dims=1)(first, models, biases)
    each = [reference(first, *pair) for pair in zip(models, biases, strict=True)]
    assert_same(got, torch.stack(each, 1))


@pytest.mark.parametrize("bounds", [None, [3, 7, F - 1]])
def test_vmap_over_codes(bounds):
    indices, values, w, b = torch.randint(F, (6, B, K)), draw(6, B, K), draw(F, D), draw(D)

    def loss(values, indices, w, impl="torch"):
        if bounds is None:
            out = sparse_decode(values, indices, w, b, impl=impl)
        else:
            out = nested_decode(SparseCodes(values, indices), bounds, w, b, impl=impl)
        return (out**3).sum()

    got = vmap(grad(loss, argnums=(0, 2)), (0, 0, None))(values, indices, w)
    one = grad(lambda *inputs: loss(*inputs, impl="reference"), argnums=(0, 2))
    expected = [one(*codes, w) for codes in zip(values, indices, strict=True)]
    assert_same(got, [torch.stack(t) for t in zip(*expected, strict=True)])


def test_gradient_penalty_with_backward():
    """loss.backward() through autograd.grad(create_graph=True), in float32."""
    gradients = []
    for impl in ("torch", "reference"):
        torch.manual_seed(0)
        x, w, b = (torch.randn(*s).requires_grad_() for s in ((B, D), (H, M + N, D), (H, M + N)))
        values = fused_encode(x, w, b, m=M, k=K, impl=impl).values
        (d_x,) = torch.autograd.grad(values.sum(), x, create_graph=True)
        (values.square().sum() + d_x.square().sum()).backward()
        gradients.append([t.grad for t in (x, w, b)])
    assert_same(*gradients)


@ALL
def test_dual_tensors_through_backward(kind):
    """A Hessian-vector product whose gradients are taken without a graph."""
    ours, reference, inputs = both(kind)
    products = []
    for function in (ours, reference):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t.clone().requires_grad_(), t) for t in inputs]
            gradients = torch.autograd.grad(cubed(function)(*duals), duals)
            products.append([forward_ad.unpack_dual(t).tangent for t in gradients])
    assert_same(*products)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tangents_of_narrow_dtypes(dtype):
    x, w = torch.randn(B, D).to(dtype), torch.randn(H, M + N, D).to(dtype)
    encode = lambda impl: lambda x, w: fused_encode(x, w, m=M, k=K, impl=impl).values  # noqa: E731
    (values, tangent), (_, expected) = (
        jvp(encode(impl), (x, w), (x, w)) for impl in ("torch", "reference")
    )
    assert values.dtype == tangent.dtype == torch.float32
    torch.testing.assert_close(tangent, expected, rtol=0.02, atol=0.02)


# Under torch.compile


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield
    torch._dynamo.reset()


@pytest.mark.one_in(4)
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("kind", ["fused mand", "dense", "threshold mand", "nested"])
@pytest.mark.parametrize("transform", ["jvp", "grad", "vmap", "vmap of grad"])
def test_compiled_transforms(kind, transform):
    """All work, or (where the width of the codes is data) say what does."""
    ours, _, inputs = both(kind)
    if transform == "jvp":
        function = lambda *inputs: jvp(ours, inputs, inputs)[1]  # noqa: E731
    elif transform == "grad":
        function = grad(cubed(ours), argnums=(0, 1, 2))
    elif transform == "vmap":
        if kind == "nested":
            pytest.skip("its indices belong to the batch")
        function = vmap(ours, (0, None, None))
    else:
        function = vmap(grad(cubed(ours)), (None, 0, None))
        inputs = inputs[0], torch.stack([inputs[1], -inputs[1]]), inputs[2]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    if kind == "threshold mand" and transform != "grad":
        with pytest.raises(Exception, match=r"call jvp or vmap outside torch\.compile"):
            compiled(*inputs)
    else:
        assert_same(compiled(*inputs), function(*inputs))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("kind", ["fused mand", "threshold mand"])
def test_transforms_of_a_compiled_function(kind):
    ours, _, inputs = both(kind)
    compiled = torch.compile(ours, backend="aot_eager")
    assert_same(jvp(compiled, inputs, inputs), jvp(ours, inputs, inputs))
    assert_same(grad(cubed(compiled))(*inputs), grad(cubed(ours))(*inputs))


@pytest.mark.one_in(2)
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", ["threshold mand", "threshold"])
def test_threshold_and_decode_compile_whole(kind, dynamic):
    ours, _, inputs = both(kind)
    compiled = torch.compile(ours, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert_same(compiled(*inputs), ours(*inputs))
    leaves = [t.clone().requires_grad_() for t in inputs]
    assert_same(
        *(torch.autograd.grad(cubed(f)(*leaves), leaves) for f in (compiled, ours)),
    )


class Module(torch.nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.function, (_, w, b) = operation(kind, "torch")
        self.w, self.b = torch.nn.Parameter(w), torch.nn.Parameter(b)

    def forward(self, x):
        return self.function(x, self.w, self.b)


@pytest.mark.parametrize("kind", ["fused mand", "dense", "threshold mand", "sparse"])
@pytest.mark.parametrize("strict", [False, True])
def test_export(kind, strict):
    module, (x, *_) = Module(kind), operation(kind, "torch")[1]
    exported = torch.export.export(module, (x,), strict=strict)
    assert_same(exported.module()(x), module(x))


@pytest.mark.parametrize("kind", ["fused mand", "threshold mand", "sparse", "nested"])
def test_fake_tensors(kind):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    function, inputs = operation(kind, "torch")
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()) as mode:
        fakes = [mode.from_tensor(t, static_shapes=True).requires_grad_() for t in inputs]
        out = function(*fakes)
        out.sum().backward()
    assert out.shape[0] == B
    assert [fake.grad.shape for fake in fakes] == [t.shape for t in inputs]
