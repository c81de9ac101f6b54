"""The operators as torch sees them: opcheck, torch.compile, autocast."""

import implementations
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from kronsae_kernels import dense_encode, fused_encode, sparse_decode

M, N, H, D = 2, 3, 6, 4
F = H * M * N


def randn(*shape, dtype=torch.float32, grad=False):
    return torch.randn(*shape).to(dtype).requires_grad_(grad)


# opcheck: schema, fake tensors (shapes, dtypes, strides), autograd registration, AOT dispatch


def encode_inputs():
    x, w, b = randn(5, D, grad=True), randn(H, M + N, D, grad=True), randn(H, M + N, grad=True)
    i_major = randn(M + N, H, D).transpose(0, 1).requires_grad_()
    mask = torch.arange(F) % 2 == 0
    yield x, w, b, M, "mand", "torch", 3, None, None
    yield x, i_major, None, M, "mul", "torch", 8, mask, None
    yield x, w, b, M, "mand", "torch", 3, torch.rand(5, F) > 0.5, torch.rand(F)
    yield randn(0, D, grad=True), w, b, M, "relu_mul", "torch", F, None, None
    halves = (t.detach().bfloat16() for t in (x, w, b))
    yield *halves, M, "mand", "torch", 3, None, None
    x, w = randn(D, 5).t().double(), w.detach().double()
    yield x, w, None, M, "mand", "torch", 3, None, None


def encode_backward_inputs():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x, w = randn(5, D, dtype=dtype), randn(H, M + N, D, dtype=dtype)
        of_pre = torch.float64 if dtype == torch.float64 else torch.float32
        gradients = randn(5, 3, dtype=of_pre), randn(5, 3, dtype=of_pre)
        for need_x, need_w in ((True, True), (True, False), (False, True)):
            yield *gradients, torch.randint(F, (5, 3)), x, w, M, need_x, need_w, "torch"


def dense_inputs():
    x, w, b = randn(5, D, grad=True), randn(F, D, grad=True), randn(F, grad=True)
    yield x, w, b, None, "", "torch", 3, None, None
    yield x, w, None, None, "", "torch", 8, torch.arange(F) % 2 == 0, None
    yield x, w, b, None, "linear", "torch", 8, None, torch.rand(F)
    yield randn(0, D), w.detach(), b.detach(), None, "", "torch", F, None, None
    yield *(t.detach().half() for t in (x, w, b)), None, "", "torch", 3, None, None
    yield randn(D, 5).t(), randn(D, F).t(), None, None, "", "torch", 1, None, None


def dense_backward_inputs():
    for dtype in (torch.float32, torch.float16):
        x, w = randn(5, D, dtype=dtype), randn(F, D, dtype=dtype)
        for need_x, need_w in ((True, True), (True, False), (False, True)):
            gradients = randn(5, 3), randn(0)
            yield *gradients, torch.randint(F, (5, 3)), x, w, None, need_x, need_w, "torch"


def decode_inputs():
    indices = torch.randint(F, (5, 3))
    values, w, b = randn(5, 3, grad=True), randn(F, D, grad=True), randn(D, grad=True)
    for bounds in (None, [1, 12, F]):
        yield values, indices, w, b, bounds, "torch"
        yield values, indices, w, None, bounds, "torch"
        yield randn(5, 3), indices, randn(F, D, dtype=torch.bfloat16), None, bounds, "torch"
        yield randn(0, 3, grad=True), indices[:0], w, b, bounds, "torch"
        yield randn(3, 5).t(), indices, randn(D, F).t(), b.detach(), bounds, "torch"


def decode_backward_inputs():
    indices = torch.randint(F, (5, 3))
    for dtype in (torch.float32, torch.bfloat16):
        g, w = randn(5, D, dtype=dtype), randn(F, D, dtype=dtype)
        for need_values, need_w in ((True, True), (True, False), (False, True)):
            needs = need_values, need_w, "torch"
            yield g, randn(5, 3), indices, w, None, *needs
            yield g[:, None].repeat(1, 2, 1), randn(5, 3), indices, w, [12, F - 1], *needs


def hierarchical_inputs():
    indices, target = torch.randint(F, (5, 3)), randn(5, D, grad=True)
    values, w = randn(5, 3, grad=True), randn(F, D, grad=True)
    rest = [2, 3], True, "torch"
    yield values, indices, w, target, *rest
    yield values.detach(), indices, w, target, [1, 2, 3], True, "torch"
    yield randn(5, 3), indices, randn(F, D, dtype=torch.bfloat16), target, *rest
    yield randn(0, 3, grad=True), indices[:0], w, randn(0, D), *rest
    yield randn(3, 5).t(), indices, randn(D, F).t(), target.detach(), [3], False, "torch"


def threshold_encode_inputs():
    for *first, _, _, _ in encode_inputs():
        yield *first, torch.rand(F), 1e-3 if first[4] == "mand" else 0.0
    for *first, _, _, _ in dense_inputs():
        yield *first, torch.rand(F), 0.0


def encode_batch_inputs():
    for *first, k, mask, _ in (*encode_inputs(), *dense_inputs()):
        if mask is None or mask.ndim == 1:
            yield *first, k, 1e-3 if first[4] == "mand" else 0.0, None, mask
            yield *first, k, 0.0, torch.tensor(0.5), mask


def encode_experts_inputs():
    for x, *rest, k, mask, scale in (*encode_inputs(), *dense_inputs()):
        if k <= F // 3 and mask is None and scale is None:
            yield x, *rest, k, torch.randint(3, (len(x),)), 3


INPUTS = {
    "encode": lambda: (*encode_inputs(), *dense_inputs()),
    "encode_batch": encode_batch_inputs,
    "encode_experts": encode_experts_inputs,
    "encode_backward": lambda: (*encode_backward_inputs(), *dense_backward_inputs()),
    "decode": decode_inputs,
    "decode_backward": decode_backward_inputs,
    "hierarchical": hierarchical_inputs,
    "threshold_encode": threshold_encode_inputs,
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", INPUTS)
def test_opcheck(name):
    operator = getattr(torch.ops.kronsae, name).default
    cases = list(INPUTS[name]())
    assert len(cases) >= 5
    for case in cases:
        torch.library.opcheck(operator, case)


def test_every_operator_is_checked():
    found = {
        name.removeprefix("kronsae::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("kronsae::")
    }
    assert found == set(INPUTS)


def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    import kronsae_kernels.flops  # noqa: F401

    x, weights = randn(7, D), parameters()
    rows, k = H * (M + N), 4
    with FlopCounterMode(display=False) as counter:
        step(autoencoder, x, weights)
    forward = 2 * 7 * D * (rows + k)
    backward = 2 * 7 * D * 2 * (2 * k + k)
    assert counter.get_total_flops() == forward + backward


# torch.compile


def autoencoder(x, w_enc, b_enc, w_dec, b_dec):
    codes = fused_encode(x, w_enc, b_enc, m=M, k=4, eps=1e-5)
    return sparse_decode(codes, w_dec=w_dec, b_dec=b_dec)


def dense_autoencoder(x, w_enc, b_enc, w_dec, b_dec):
    codes = dense_encode(x, w_enc.flatten(0, 1), b_enc.flatten(), k=4)
    return sparse_decode(codes.values, codes.indices, w_dec, b_dec)


def parameters(dtype=torch.float32):
    shapes = (H, M + N, D), (H, M + N), (F, D), (D,)
    return [randn(*shape, dtype=dtype, grad=True) for shape in shapes]


def step(function, x, weights):
    """Output, and gradients of x and of all weights."""
    x = x.detach().requires_grad_()
    out = function(x, *weights)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *weights])]


def assert_same(got, expected, **tolerance):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("function", [autoencoder, dense_autoencoder])
def test_compiled_equals_eager_and_compiles_once(function):
    """The operators are opaque and the backend runs the rest as it is: equal to the bit."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend=counter)
    weights = parameters()
    for _ in range(3):
        x = randn(7, D)
        assert_same(step(compiled, x, weights), step(function, x, weights))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("function", [autoencoder, dense_autoencoder])
def test_compiled_for_any_batch_size(function):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    weights = parameters()
    for tokens in (7, 3, 128, 7):
        x = randn(tokens, D)
        assert_same(step(compiled, x, weights), step(function, x, weights))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_with_mask_and_leading_dimensions():
    mask = torch.arange(F) % 3 > 0

    def encode(x, w_enc):
        return fused_encode(x, w_enc, m=M, k=3, composition="mul", mask=mask)

    compiled = torch.compile(encode, fullgraph=True, backend="aot_eager")
    weight = parameters()[0]
    for shape in ((D,), (2, 3, D), (0, D)):
        x = randn(*shape)
        assert_same(compiled(x, weight), encode(x, weight))


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_by_inductor():
    """Inductor may fuse and reorder what is around the operators: a few float32 roundings."""
    compiled = torch.compile(autoencoder, fullgraph=True)
    weights = parameters()
    with torch.compiler.set_stance("default"):
        for _ in range(2):
            x = randn(7, D)
            tolerance = {"rtol": 1e-5, "atol": 1e-5}
            assert_same(step(compiled, x, weights), step(autoencoder, x, weights), **tolerance)


# Autocast


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


def test_autocast_encodes_in_bfloat16():
    x, (w_enc, b_enc, *_) = randn(9, D, grad=True), parameters()
    with autocast():
        got = fused_encode(x, w_enc, b_enc, m=M, k=5)
        dense = dense_encode(x, w_enc.flatten(0, 1), b_enc.flatten(), k=5)
    assert got.values.dtype == dense.values.dtype == torch.float32
    rounded = [t.detach().bfloat16() for t in (x, w_enc, b_enc)]
    assert_same(got, fused_encode(*rounded, m=M, k=5))
    x_, w_, b_ = rounded
    assert_same(dense, dense_encode(x_, w_.flatten(0, 1), b_.flatten(), k=5))
    for leaf, gradient in zip(
        (x, w_enc, b_enc),
        torch.autograd.grad(got.values.sum() + dense.values.sum(), (x, w_enc, b_enc)),
        strict=True,
    ):
        assert gradient.dtype == leaf.dtype == torch.float32
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0


def test_autocast_takes_mixed_dtypes():
    """A bfloat16 x from a language model and float32 parameters, as for torch's own linear."""
    w_enc, b_enc, w_dec, b_dec = parameters()
    x = randn(9, D, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="same dtype"):
        fused_encode(x, w_enc, b_enc, m=M, k=5)
    with autocast():
        codes = fused_encode(x, w_enc, b_enc, m=M, k=5)
        out = sparse_decode(codes, w_dec=w_dec, b_dec=b_dec)
    assert codes.values.dtype == torch.float32
    assert out.dtype == torch.float32


def test_autocast_leaves_float64_alone():
    tensors = [t.double() for t in (randn(9, D), *parameters()[:2])]
    with autocast():
        got = fused_encode(*tensors, m=M, k=5)
    assert got.values.dtype == torch.float64
    assert_same(got, fused_encode(*tensors, m=M, k=5))


@pytest.mark.parametrize("impl", implementations.ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_round_the_decoder(dtype, impl):
    """It gathers and sums in float32, forward and backward, under autocast too."""
    indices = torch.randint(F, (9, 5))
    leaves = randn(9, 5, grad=True), *(t.detach().to(dtype) for t in parameters()[2:])
    for leaf in leaves:
        leaf.requires_grad_()

    def run(context):
        with context:
            out = sparse_decode(leaves[0], indices, *leaves[1:], impl=impl)
            return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    assert_same(run(autocast()), run(torch.autocast("cpu", enabled=False)))


@pytest.mark.parametrize("impl", implementations.ALL)
def test_autocast_around_backward_changes_nothing(impl):
    leaves = randn(9, D, grad=True), *parameters()[:2]

    def gradients(context):
        with autocast():
            loss = fused_encode(*leaves, m=M, k=5, impl=impl).values.sum()
        with context:
            return torch.autograd.grad(loss, leaves)

    assert_same(gradients(autocast()), gradients(torch.autocast("cpu", enabled=False)))


@pytest.mark.usefixtures("fresh_compiler")
def test_autocast_compiled():
    compiled = torch.compile(autoencoder, fullgraph=True, backend="aot_eager")
    x, weights = randn(7, D), parameters()
    with autocast():
        assert_same(step(compiled, x, weights), step(autoencoder, x, weights))


def test_meta_tensors_have_shapes():
    w_enc, b_enc, w_dec, b_dec = (t.detach().to("meta") for t in parameters())
    codes = fused_encode(torch.empty(2, 7, D, device="meta"), w_enc, b_enc, m=M, k=4)
    assert codes.values.shape == codes.indices.shape == (2, 7, 4)
    out = sparse_decode(codes, w_dec=w_dec, b_dec=b_dec)
    assert out.is_meta
    assert out.shape == (2, 7, D)
    mask = torch.ones(F, dtype=torch.bool, device="meta")
    dense = dense_encode(torch.empty(7, D, device="meta"), w_dec, k=4, mask=mask)
    assert dense.indices.shape == (7, 4)
