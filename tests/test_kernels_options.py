"""What library authors ask of encoders: k, masks, a scale, a layout, thresholds that learn."""

import implementations
import numpy as np
import pytest
import torch
from torch.func import vmap

from kronsae_kernels import (
    dense_encode,
    expert_encode,
    fused_encode,
    jump,
    nested_decode,
    reference,
    sparse_decode,
    threshold_encode,
)

M, N, H, D, B = 2, 3, 6, 5, 9
F = H * M * N
COMPOSITIONS = ("mand", "relu_mul", "mul")
IMPLS = pytest.mark.parametrize("impl", ["torch", implementations.TRITON])


def kron(composition="mand", **options):
    return lambda x, w, b, **more: fused_encode(
        x, w, b, m=M, composition=composition, **(options | more)
    )


def dense(**options):
    return lambda x, w, b, **more: dense_encode(x, *_dense_weights(w, b), **(options | more))


def _dense_weights(w, b):
    return torch.cat([w.flatten(0, 1)] * 2)[:F], torch.cat([b.flatten()] * 2)[:F]


ENCODERS = [pytest.param(kron(c), id=c) for c in COMPOSITIONS] + [
    pytest.param(dense(), id="dense"),
    pytest.param(dense(relu=False), id="dense without ReLU"),
]


def inputs(grad=False):
    torch.manual_seed(0)
    tensors = torch.randn(B, D), torch.randn(H, M + N, D), torch.randn(H, M + N)
    return [t.requires_grad_(grad) for t in tensors]


def assert_same_codes(got, expected):
    torch.testing.assert_close(got.values, expected.values)
    active = expected.values != 0
    assert torch.equal(got.indices[active], expected.indices[active])


def with_gradients(encode, impl, **options):
    leaves = inputs(grad=True)
    codes = encode(*leaves, impl=impl, **options)
    gradients = torch.autograd.grad(codes.values.square().sum(), leaves)
    return codes, gradients


def assert_as_reference(encode, impl, **options):
    got, gradients = with_gradients(encode, impl, **options)
    expected, of_reference = with_gradients(encode, "reference", **options)
    assert_same_codes(got, expected)
    torch.testing.assert_close(gradients, of_reference, rtol=1e-5, atol=1e-4)
    return got


# k


@IMPLS
@pytest.mark.parametrize("encode", ENCODERS)
def test_k_of_each_token(encode, impl):
    k = torch.tensor([3, 0, 7, 1, 1, 2, 7, 5, 4])
    codes = assert_as_reference(encode, impl, k=k)
    assert codes.values.shape == (B, 7)
    x, w, b = inputs()
    for token, count in enumerate(k.tolist()):
        if count:
            one = encode(x[token], w, b, k=count, impl=impl)
            assert_same_codes(type(one)(*(t[token, :count] for t in codes)), one)
        assert torch.equal(codes.values[token, count:], torch.zeros(7 - count))


@pytest.mark.parametrize("four", [np.int64(4), np.uint8(4), torch.tensor(4), torch.tensor(4).int()])
def test_integers_of_other_kinds(four):
    x, w, b = inputs()
    expected = fused_encode(x, w, b, m=M, k=4)
    assert torch.equal(fused_encode(x, w, b, m=M, k=four).values, expected.values)
    two = type(four)(2) if isinstance(four, np.integer) else four // 2
    assert torch.equal(fused_encode(x, w, b, m=two, k=4).values, expected.values)
    table = torch.randn(F, D)
    nested = nested_decode(expected, [2, 4, F], table)
    for bounds in (torch.tensor([2, 4, F]), np.array([2, 4, F]), (2, four, F), iter([2, 4, F])):
        assert torch.equal(nested_decode(expected, bounds, table), nested)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_indices_of_other_dtypes(dtype):
    codes, table = fused_encode(*inputs(), m=M, k=4), torch.randn(F, D)
    for impl in ("torch", "reference"):
        expected = sparse_decode(codes, w_dec=table, impl=impl)
        narrow = codes.indices.to(dtype)
        assert torch.equal(sparse_decode(codes.values, narrow, table, impl=impl), expected)
        assert torch.equal(sparse_decode(list(codes), w_dec=table, impl=impl), expected)


# Masks and scales


@pytest.mark.one_in(4)
@IMPLS
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
@pytest.mark.parametrize("encode", ENCODERS)
def test_mask_of_each_token(encode, share, impl):
    """Also of tokens that have fewer latents than k, or none."""
    mask = torch.rand(B, F, generator=torch.Generator().manual_seed(3)) < share
    mask[4] = False
    codes = assert_as_reference(encode, impl, k=6, mask=mask)
    taken = codes.values != 0
    assert mask.gather(1, codes.indices)[taken].all()
    assert not taken[4].any()
    x, w, b = inputs()
    for token in range(B):
        if mask[token].sum() >= 6:
            one = encode(x[token], w, b, k=6, impl=impl, mask=mask[token])
            assert_same_codes(type(one)(*(t[token] for t in codes)), one)


@IMPLS
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("encode", ENCODERS)
def test_scale_of_each_latent(encode, masked, impl):
    generator = torch.Generator().manual_seed(5)
    scale = torch.rand(F, generator=generator) * 3
    scale[::7] = 0
    mask = torch.rand(F, generator=generator) < 0.6 if masked else None
    codes = assert_as_reference(encode, impl, k=5, scale=scale, mask=mask)
    x, w, b = inputs()
    every = encode(x, w, b, k=F, impl="reference")
    values = torch.zeros(B, F).scatter(1, every.indices, every.values)
    assert torch.equal(values.gather(1, codes.indices), codes.values)  # they are not scaled
    scores = values * scale
    if mask is not None:
        scores = scores.where(mask, -torch.inf)
    expected = scores.sort(dim=1, descending=True).values[:, :5]
    torch.testing.assert_close(scores.gather(1, codes.indices), expected)


def test_scale_as_sae_lens_rescales_by_decoder_norms():
    """topk(hidden_pre * norms), of which the decoder divides by the norms again."""
    x, w, b = inputs()
    w, b = _dense_weights(w, b)
    table = torch.randn(F, D)
    norms = table.norm(dim=1)
    hidden = (x @ w.T + b).relu() * norms
    top = hidden.topk(4)
    expected = torch.zeros_like(hidden).scatter(1, top.indices, top.values) / norms @ table
    codes = dense_encode(x, w, b, k=4, scale=norms)
    torch.testing.assert_close(sparse_decode(codes, w_dec=table), expected)


def test_scores_before_the_relu():
    """The k largest pre-activations, also below 0: auxiliary losses take dead latents' ones."""
    x, w, b = inputs()
    w, b = _dense_weights(w, b - 10)
    dead = torch.arange(F) % 3 == 0
    codes = dense_encode(x, w, b, k=4, mask=dead, relu=False)
    pre = (x @ w.T + b).where(dead, -torch.inf)
    torch.testing.assert_close(codes.values, pre.topk(4).values)
    assert (codes.values < 0).any()


@pytest.mark.parametrize("encode", ENCODERS)
def test_all_options_at_once_in_chunks(encode, monkeypatch):
    from kronsae_kernels import torch_impl

    monkeypatch.setattr(torch_impl, "MIN_CHUNK_TOKENS", 2)
    monkeypatch.setitem(torch_impl.CHUNK_BYTES, "cpu", 1)
    mask = torch.rand(B, F) < 0.7
    options = {"k": torch.arange(B) % 5, "mask": mask, "scale": torch.rand(F)}
    assert_as_reference(encode, "torch", **options)


# Layout


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_row_major_layout(impl):
    """h = m + n: shapes cannot tell the layouts apart."""
    x, w, b = torch.randn(B, D), torch.randn(5, 5, D), torch.randn(5, 5)
    for encode in (fused_encode, threshold_encode):
        options = {"k": 4} if encode is fused_encode else {"threshold": 0.3}
        head_major = encode(x, w, b, m=2, impl=impl, **options)
        rows, bias = w.transpose(0, 1).contiguous(), b.t().contiguous()
        row_major = encode(x, rows, bias, m=2, impl=impl, layout="row-major", **options)
        assert torch.equal(row_major.values, head_major.values)
        other = encode(x, rows, bias, m=2, impl=impl, **options)
        assert other.values.shape != row_major.values.shape or not torch.equal(
            other.values, row_major.values
        )
    rows = rows.requires_grad_()
    fused_encode(x, rows, bias, m=2, k=4, impl=impl, layout="row-major").values.sum().backward()
    assert rows.grad.is_contiguous()
    assert rows.grad.shape == rows.shape


# Thresholds


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_a_number_is_every_threshold(impl):
    x, w, b = inputs()
    expected = threshold_encode(x, w, b, m=M, threshold=torch.full((F,), 0.5), impl=impl)
    for threshold in (0.5, torch.tensor(0.5)):
        got = threshold_encode(x, w, b, m=M, threshold=threshold, impl=impl)
        assert torch.equal(got.values, expected.values)
    with pytest.raises(ValueError, match="threshold: expected a finite number"):
        threshold_encode(x, w, b, m=M, threshold="1", impl=impl)
    with pytest.raises(ValueError, match="bandwidth: expected > 0"):
        threshold_encode(x, w, b, m=M, threshold=1.0, bandwidth=0.0, impl=impl)


@pytest.mark.parametrize("kind", ["kron", "dense"])
def test_thresholds_learn(kind):
    """dz/dt = -(t / w) for |v - t| < w / 2, of every latent of every token."""
    x, w, b = inputs()
    gate = {"m": M} if kind == "kron" else {"m": None}
    if kind == "dense":
        w, b = _dense_weights(w, b)
    weight, bandwidth = torch.randn(F), 0.4
    values = reference.latents(x, w, b, gate["m"], "mand")
    values = values if kind == "dense" else reference.compose(values, "mand", 0.0)
    start = torch.rand(F) + 0.1
    near = ((values - start).abs() < bandwidth / 2) & (values > 0)
    expected = -(start / bandwidth) * near.sum(0) * weight
    for impl in ("torch", "reference"):
        threshold = start.clone().requires_grad_()
        codes = threshold_encode(
            x, w, b, threshold=threshold, bandwidth=bandwidth, impl=impl, **gate
        )
        (codes.values * weight[codes.indices]).sum().backward()
        torch.testing.assert_close(threshold.grad, expected)
        assert torch.equal(
            torch.zeros(B, F).scatter_add(1, codes.indices, codes.values.detach()),
            values.where(values > start, 0),
        )
        plain = threshold_encode(x, w, b, threshold=threshold, impl=impl, **gate)
        assert not plain.values.requires_grad


def test_jump_counts_active_latents():
    values, threshold = torch.tensor([0.2, 0.9, 1.05, 3.0]), torch.ones(4, requires_grad=True)
    z, active = jump(values, threshold, 0.4)
    assert z.tolist() == pytest.approx([0.0, 0.0, 1.05, 3.0])
    assert active.tolist() == [0.0, 0.0, 1.0, 1.0]
    (gradient,) = torch.autograd.grad(active.sum(), threshold)
    assert gradient.tolist() == pytest.approx([0.0, -2.5, -2.5, 0.0])
    infinite = torch.full((4,), torch.inf, requires_grad=True)
    assert jump(values, infinite, 0.4)[0].tolist() == [0.0] * 4


@pytest.mark.parametrize("encode", ENCODERS)
def test_a_constant_scale_changes_nothing(encode):
    x, w, b = inputs()
    expected = encode(x, w, b, k=5)
    for scale in (1.0, 1e30, 1e-30):
        codes = encode(x, w, b, k=5, scale=torch.full((F,), scale))
        assert torch.equal(codes.values, expected.values)
        assert torch.equal(codes.indices, expected.indices)


@pytest.mark.parametrize("encode", ENCODERS)
def test_k_of_each_token_and_checks_under_transforms(encode):
    """Only what vmap hides is unknown."""
    x, w, b = inputs()
    k, scale = torch.arange(B) % 4, torch.ones(F)
    loss = lambda x, **options: encode(x, w, b, **options).values.square().sum()  # noqa: E731
    expected = torch.func.grad(lambda x: loss(x, k=k, impl="reference"))(x)
    torch.testing.assert_close(torch.func.grad(lambda x: loss(x, k=k))(x), expected)
    for transform in (torch.func.grad, torch.func.vmap):
        with pytest.raises(ValueError, match="scale: expected finite numbers >= 0"):
            transform(lambda x: loss(x, k=2, scale=-scale))(x)
        with pytest.raises(ValueError, match="k: expected at most the 1 latents in mask"):
            transform(lambda x: loss(x, k=2, mask=torch.arange(F) < 1))(x)
    with pytest.raises(ValueError, match="k: one a token decides how wide the codes are"):
        torch.func.vmap(lambda x, k: loss(x[None], k=k[None]))(x, k)


@pytest.mark.parametrize(
    "one", [1, np.float32(1), np.float64(1), torch.tensor(1), torch.tensor(1.0)]
)
def test_numbers_of_other_kinds(one):
    x, w, b = inputs()
    expected = threshold_encode(x, w, b, m=M, threshold=1.0, eps=1.0, bandwidth=1.0).values
    got = threshold_encode(x, w, b, m=M, threshold=one, eps=one, bandwidth=one).values
    assert torch.equal(got, expected)
    for a, b in zip(jump(expected, one, one), jump(expected, 1.0, 1.0), strict=True):
        assert torch.equal(a, b)


FEW = torch.arange(20) >= 18


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("hides", ["compile", "vmap"])
@pytest.mark.parametrize("m", [None, 2])
def test_a_mask_of_fewer_than_k_that_nobody_can_look_at(m, hides, impl):
    """As with one mask a token: what follows has value 0."""
    x, w = torch.randn(3, 6).abs(), torch.randn(20, 6) if m is None else torch.randn(5, 4, 6).abs()

    def encode(mask):
        if m is None:
            return dense_encode(x, w, k=4, mask=mask, impl=impl)
        return fused_encode(x, w, m=m, k=4, mask=mask, impl=impl)

    if hides == "compile":
        codes = torch.compile(encode, fullgraph=True, backend="aot_eager")(FEW)
    else:
        codes = vmap(encode)(FEW[None])
    wanted = encode(FEW.expand(3, 20))
    for got, expected in zip(codes, wanted, strict=True):
        assert torch.equal(got.view(3, 4), expected)
    assert (wanted.values[:, 2:] == 0).all()
    with pytest.raises(ValueError, match="at most the 2 latents in mask"):
        encode(FEW)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize(
    "hides", [pytest.param("inductor", marks=pytest.mark.slow), "aot_eager", "vmap"]
)
@pytest.mark.parametrize("expert", [pytest.param(-1, marks=pytest.mark.slow), 5])
def test_no_expert_out_of_range(expert, hides, impl):
    x, w = torch.randn(4, 6), torch.randn(5, 4, 6)

    def encode(x, expert):
        return expert_encode(x, w, m=2, k=2, expert=expert, experts=5, impl=impl)

    if hides == "vmap":
        call = vmap(encode)
    else:
        call = torch.compile(encode, fullgraph=True, backend=hides)
    inside = call(x, torch.tensor([0, 1, 2, 4]))
    assert torch.equal(inside.indices // 4, torch.tensor([0, 1, 2, 4])[:, None].expand(4, 2))
    with pytest.raises(Exception, match="expert|range|bounds"):
        call(x, torch.tensor([0, 1, 2, expert]))


@pytest.mark.parametrize("bad", [-1.0, torch.nan, torch.inf])
def test_a_scale_that_a_graph_hides(bad):
    x, w, scale = torch.randn(4, 6), torch.randn(20, 6), torch.ones(20)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def encode(scale):
        return dense_encode(x, w, k=2, scale=scale)

    assert torch.equal(encode(scale).indices, dense_encode(x, w, k=2).indices)
    scale[3] = bad
    with pytest.raises(Exception, match="scale: expected finite numbers >= 0"):
        encode(scale)


@pytest.mark.parametrize("shape", [(7,), (5, 1, 3), (3, 1)])
def test_a_threshold_of_jump_is_as_values(shape):
    with pytest.raises(ValueError, match="threshold: expected"):
        jump(torch.randn(4, 3), torch.zeros(shape), 0.1)


def test_a_threshold_of_jump_can_be_expanded():
    values = torch.randn(4, 3)
    for threshold in (torch.rand(3), torch.rand(4, 1), torch.rand(1, 3)):
        expanded = jump(values, threshold.expand(4, 3), 0.1)
        for got, expected in zip(jump(values, threshold, 0.1), expanded, strict=True):
            assert torch.equal(got, expected)
