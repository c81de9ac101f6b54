"""Errors that say what is wrong, and the choice of the implementation."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nested import nested_tensor

import kronsae_kernels
from kronsae_kernels import (
    SparseCodes,
    backends,
    dense_encode,
    fused_encode,
    jump,
    nested_decode,
    reference,
    sparse_decode,
    threshold_encode,
    torch_impl,
)

X = torch.randn(3, 4)
W_ENC, B_ENC = torch.randn(5, 6, 4), torch.randn(5, 6)  # with m = 2: h = 5, n = 4, F = 40
W_DENSE, B_DENSE = torch.randn(40, 4), torch.randn(40)
MASK = torch.arange(40) < 7
VALUES, INDICES = torch.randn(3, 2), torch.randint(40, (3, 2))
W_DEC, B_DEC = torch.randn(40, 4), torch.randn(4)
JAGGED = nested_tensor([X, W_DENSE], layout=torch.jagged)


def encode(x=X, w_enc=W_ENC, b_enc=B_ENC, **options):
    return fused_encode(x, w_enc, b_enc, **{"m": 2, "k": 3, **options})


def dense(x=X, w_enc=W_DENSE, b_enc=B_DENSE, **options):
    return dense_encode(x, w_enc, b_enc, **{"k": 3, **options})


def above(x=X, w_enc=W_DENSE, b_enc=B_DENSE, **options):
    return threshold_encode(x, w_enc, b_enc, **{"threshold": 0.0, **options})


def decode(values=VALUES, indices=INDICES, w_dec=W_DEC, b_dec=B_DEC, **options):
    return sparse_decode(values, indices, w_dec, b_dec, **options)


def test_the_calls_below_are_right_but_for_one_argument():
    assert encode().values.shape == dense().values.shape == (3, 3)
    assert decode().shape == (3, 4)


# (call, words of the message: the argument, what was expected, what came)
ERRORS = [
    # Not tensors
    (lambda: encode(x=[[1.0]]), ["x:", "tensor", "[[1.0]]"]),
    (lambda: encode(x=None), ["x:", "tensor", "NoneType"]),
    (lambda: encode(w_enc=None), ["w_enc:", "tensor", "NoneType"]),
    (lambda: encode(b_enc=1.0), ["b_enc:", "tensor", "1.0"]),
    (lambda: encode(x=X.numpy()), ["x:", "tensor", "(numpy.ndarray)"]),
    (lambda: encode(mask=[True]), ["mask:", "tensor", "[True]"]),
    (lambda: dense(w_enc=[1.0]), ["w_enc:", "tensor", "[1.0]"]),
    (lambda: decode(values=None), ["values:", "tensor", "NoneType"]),
    (lambda: decode(indices=[1]), ["indices:", "tensor", "[1]"]),
    (lambda: decode(w_dec=[1.0]), ["w_dec:", "tensor", "[1.0]"]),
    (lambda: decode(b_dec=[1.0]), ["b_dec:", "tensor", "[1.0]"]),
    # Dtypes
    (lambda: encode(x=X.long()), ["x:", "float32", "bfloat16", "torch.int64"]),
    (lambda: encode(x=X.bool()), ["x:", "float32", "torch.bool"]),
    (lambda: encode(x=X.to(torch.complex64)), ["x:", "float32", "torch.complex64"]),
    (lambda: encode(w_enc=W_ENC.int()), ["w_enc:", "float32", "torch.int32"]),
    (lambda: encode(b_enc=B_ENC.int()), ["b_enc:", "float32", "torch.int32"]),
    (lambda: encode(x=X.double()), ["same dtype", "x torch.float64", "w_enc torch.float32"]),
    (lambda: encode(b_enc=B_ENC.half()), ["same dtype", "b_enc torch.float16"]),
    (lambda: encode(mask=MASK.float()), ["mask:", "bool", "torch.float32"]),
    (lambda: dense(x=X.long()), ["x:", "float32", "torch.int64"]),
    (lambda: dense(w_enc=W_DENSE.bfloat16()), ["same dtype", "w_enc torch.bfloat16"]),
    (lambda: decode(values=INDICES), ["values:", "float32", "torch.int64"]),
    (lambda: decode(indices=INDICES.bool()), ["indices:", "integers", "torch.bool"]),
    (lambda: decode(indices=VALUES), ["indices:", "integers", "torch.float32"]),
    (lambda: encode(x=X.to_sparse()), ["x:", "dense tensor", "torch.sparse_coo"]),
    (lambda: decode(w_dec=W_DEC.to_sparse_csr()), ["w_dec:", "dense tensor", "torch.sparse_csr"]),
    (lambda: encode(x=JAGGED), ["x:", "dense tensor", "nested"]),
    (lambda: decode(w_dec=JAGGED), ["w_dec:", "dense tensor", "nested"]),
    (lambda: decode(w_dec=W_DEC.long()), ["w_dec:", "float32", "torch.int64"]),
    (lambda: decode(b_dec=B_DEC.double()), ["same dtype", "b_dec torch.float64"]),
    # Ranks and widths
    (lambda: encode(x=torch.tensor(1.0)), ["x:", "[..., d]", "[]"]),
    (lambda: encode(x=torch.randn(3, 5)), ["x:", "d = 4", "[3, 5]"]),
    (lambda: encode(w_enc=W_ENC[0]), ["w_enc:", "[h, m + n, d]", "[6, 4]"]),
    (lambda: encode(w_enc=W_ENC[:0]), ["w_enc:", "no empty dimension", "[0, 6, 4]"]),
    (lambda: encode(w_enc=W_ENC[None]), ["w_enc:", "[h, m + n, d]", "[1, 5, 6, 4]"]),
    (lambda: encode(b_enc=B_ENC.T), ["b_enc:", "[h, m + n] = [5, 6]", "[6, 5]"]),
    (lambda: encode(b_enc=B_ENC.flatten()), ["b_enc:", "[5, 6]", "[30]"]),
    (lambda: encode(mask=MASK[:-1]), ["mask:", "[F] = [40]", "[39]"]),
    (lambda: dense(x=X[:, :2]), ["x:", "d = 4", "[3, 2]"]),
    (lambda: dense(w_enc=W_ENC), ["w_enc:", "[F, d]", "[5, 6, 4]"]),
    (lambda: dense(b_enc=B_DENSE[:-1]), ["b_enc:", "[F] = [40]", "[39]"]),
    (lambda: dense(mask=MASK[None]), ["mask:", "[F], or", "[..., F] = [3, 40]", "[1, 40]"]),
    (lambda: decode(values=torch.tensor(1.0)), ["values:", "[..., k]", "[]"]),
    (lambda: decode(values=VALUES[:1]), ["indices:", "shape of values = [1, 2]", "[3, 2]"]),
    (lambda: decode(w_dec=W_DEC[0]), ["w_dec:", "[F, d]", "[4]"]),
    (lambda: decode(w_dec=W_DEC[:0]), ["w_dec:", "no empty dimension", "[0, 4]"]),
    (lambda: decode(b_dec=B_DEC[:-1]), ["b_dec:", "[d] = [4]", "[3]"]),
    # Devices
    (lambda: encode(w_enc=W_ENC.to("meta")), ["same device", "x cpu", "w_enc meta"]),
    (lambda: encode(mask=MASK.to("meta")), ["same device", "mask meta"]),
    (lambda: dense(b_enc=B_DENSE.to("meta")), ["same device", "b_enc meta"]),
    (lambda: decode(indices=INDICES.to("meta")), ["same device", "indices meta", "w_dec cpu"]),
    # Numbers and options
    (lambda: encode(m=0), ["m:", "[1, 5]", "m + n = 6", "got 0"]),
    (lambda: encode(m=6), ["m:", "[1, 5]", "m + n = 6", "got 6"]),
    (lambda: encode(m=-1), ["m:", "got -1"]),
    (lambda: encode(m=2.0), ["m:", "integer", "got 2.0"]),
    (lambda: encode(m=True), ["m:", "integer", "got True (bool)"]),
    (lambda: encode(k=0), ["k:", "[1, 40]", "F = 5 * 2 * 4 = 40", "got 0"]),
    (lambda: encode(k=41), ["k:", "[1, 40]", "got 41"]),
    (lambda: encode(k=None), ["k:", "integer", "got None"]),
    (lambda: encode(k=8, mask=MASK), ["k:", "7 latents in mask", "got 8"]),
    (lambda: encode(composition="and"), ["composition:", "mand", "relu_mul", "'and'"]),
    (lambda: encode(eps=-1e-5), ["eps:", ">= 0", "-1e-05"]),
    (lambda: encode(eps=float("nan")), ["eps:", "finite", "nan"]),
    (lambda: encode(eps=float("inf")), ["eps:", "finite", "inf"]),
    (lambda: encode(eps="0"), ["eps:", "number", "'0' (str)"]),
    (lambda: encode(eps=True), ["eps:", "number", "True (bool)"]),
    (lambda: dense(k=41), ["k:", "[1, 40]", "got 41"]),
    (lambda: dense(k=0), ["k:", "[1, 40]", "got 0"]),
    (lambda: dense(k=8, mask=MASK), ["k:", "7 latents in mask", "got 8"]),
    (lambda: decode(indices=INDICES - 40), ["indices:", "[0, 40)", "-"]),
    (lambda: decode(indices=torch.full((3, 2), 40)), ["indices:", "[0, 40)", "40]"]),
    # Missing, or given twice
    (lambda: sparse_decode(VALUES, w_dec=W_DEC), ["indices:", "None"]),
    (lambda: sparse_decode(VALUES, INDICES), ["w_dec:", "[F, d]", "None"]),
    (lambda: decode(values=SparseCodes(VALUES, INDICES)), ["indices:", "SparseCodes alone"]),
    (
        lambda: sparse_decode((VALUES, INDICES, B_DEC), w_dec=W_DEC),
        ["codes_or_values:", "(values, indices)", "3 items"],
    ),
    # One a token, a latent
    (lambda: encode(k=torch.tensor([1, 2])), ["k:", "[...] = [3]", "[2]"]),
    (lambda: encode(k=torch.tensor([1.0, 2.0, 3.0])), ["k:", "integers", "torch.float32"]),
    (lambda: encode(k=torch.tensor([1, -2, 3])), ["k:", ">= 0", "got -2"]),
    (lambda: encode(k=torch.tensor([1, 2, 41])), ["k:", "[1, 40]", "got 41"]),
    (lambda: encode(k=torch.tensor(2.0)), ["k:", "integer", "got tensor(2.)"]),
    (lambda: encode(mask=MASK.expand(2, -1)), ["mask:", "[..., F] = [3, 40]", "[2, 40]"]),
    (lambda: encode(scale=torch.ones(39)), ["scale:", "[F] = [40]", "[39]"]),
    (lambda: encode(scale=torch.ones(40).long()), ["scale:", "float32", "torch.int64"]),
    (lambda: encode(scale=-torch.ones(40)), ["scale:", "finite numbers >= 0"]),
    (lambda: encode(scale=torch.full((40,), torch.nan)), ["scale:", "finite numbers >= 0"]),
    (lambda: dense(scale=torch.full((40,), torch.inf)), ["scale:", "finite numbers >= 0"]),
    (lambda: encode(k=np.array([3, 3, 3])), ["k:", "integer", "numpy.ndarray"]),
    (lambda: encode(m=None), ["m:", "integer", "None"]),
    (lambda: above(layout="row-major"), ["layout:", "head-major", "without m"]),
    (lambda: nested_decode(None, [40], W_DEC), ["codes:", "(values, indices)", "None"]),
    (lambda: nested_decode(VALUES, [40], W_DEC), ["codes:", "(values, indices)", "tensor"]),
    (lambda: jump(VALUES, 1.0, 0.0), ["bandwidth:", "> 0"]),
    (lambda: jump(VALUES, 1.0, float("nan")), ["bandwidth:", "finite", "nan"]),
    (lambda: jump(VALUES, 1.0, "1"), ["bandwidth:", "number", "'1'"]),
    (lambda: jump([1.0], 1.0, 1.0), ["values:", "tensor", "[1.0]"]),
    (lambda: jump(VALUES, "1", 1.0), ["threshold:", "number", "'1'"]),
    (lambda: jump(VALUES, 1.0, 1.0, VALUES), ["used:", "bool", "torch.float32"]),
    (lambda: jump(VALUES, 1.0, 1.0, VALUES[:1] > 0), ["used:", "[3, 2]", "[1, 2]"]),
    (lambda: encode(scale=2.0), ["scale:", "tensor", "got 2.0"]),
    (lambda: dense(relu=None), ["relu:", "True", "None"]),
    (lambda: encode(layout="rows"), ["layout:", "head-major", "row-major", "'rows'"]),
    (lambda: encode(w_enc=W_ENC[0], layout="row-major"), ["w_enc:", "[m + n, h, d]", "[6, 4]"]),
    # Implementations
    (lambda: encode(impl="cuda"), ["impl:", "triton", "torch", "reference", "'cuda'"]),
    (lambda: dense(impl=""), ["impl:", "reference", "''"]),
    (lambda: decode(impl=1), ["impl:", "reference", "got 1"]),
    (lambda: decode(impl=["torch"]), ["impl:", "reference", "['torch']"]),
]


@pytest.mark.parametrize(("call", "words"), ERRORS, ids=[" ".join(words) for _, words in ERRORS])
def test_error_says_what_is_wrong(call, words):
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        call()
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"{missing} not in: {error.value}"


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_implementations_check_alike(impl):
    for call in (encode, dense):
        with pytest.raises(ValueError, match="k: expected"):
            call(k=0, impl=impl)
    with pytest.raises(ValueError, match="indices: expected latents"):
        decode(indices=INDICES + 40, impl=impl)


# Choice of the implementation


@pytest.mark.slow
def test_triton_that_cannot_run_says_why():
    """On a CPU, in a process as a user's: without the interpreter that the tests have."""
    script = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from test_kernels_contract import encode, dense, decode\n"
        "for call in (encode, dense, decode):\n"
        "    try:\n"
        "        call(impl='triton')\n"
        "    except RuntimeError as error:\n"
        "        print(error)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    said = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert len(said) == 3
    for line in said:
        assert re.match(r"impl='triton' cannot run on cpu: \w+", line)


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@needs_triton
def test_triton_and_the_interpreter(monkeypatch):
    """With it kernels run on a CPU, but only if they are asked for."""
    monkeypatch.setattr("kronsae_kernels.triton_impl.launch.interpreted", lambda: True)
    cpu = torch.device("cpu")
    assert backends.choose("triton", cpu) == "triton"
    assert backends.choose(None, cpu) == "torch"
    monkeypatch.setattr("kronsae_kernels.triton_impl.launch.interpreted", lambda: False)
    assert "TRITON_INTERPRET=1" in backends.why_not("triton", cpu)


@needs_triton
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_triton_does_not_take_float64(kind, monkeypatch):
    monkeypatch.setattr("kronsae_kernels.triton_impl.launch.interpreted", lambda: True)
    device = torch.device(kind)
    assert backends.choose(None, device, torch.float64) == "torch"
    with pytest.raises(RuntimeError, match=f"impl='triton' cannot run on {kind}: .*float64"):
        backends.choose("triton", device, torch.float64)


@needs_triton
def test_triton_elsewhere_absent_or_old(monkeypatch):
    assert "not on mps" in backends.why_not("triton", torch.device("mps"))
    cuda = torch.device("cuda")
    assert backends.choose(None, cuda) == "triton"
    with monkeypatch.context() as patch:
        patch.setattr(backends, "OLDEST_TRITON", "99.0")
        assert "triton 99.0 or newer" in backends.why_not("triton", cuda)
        assert backends.choose(None, cuda) == "torch"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "not installed" in backends.why_not("triton", cuda)
    assert backends.choose(None, cuda) == "torch"


FUNCTIONS = ("encode", "encode_backward", "decode", "decode_backward")


@pytest.fixture
def calls():
    """Names of the functions of the `fake` backend that ran."""
    return []


@pytest.fixture
def fake(calls, monkeypatch):
    """plug(device_types, why_not): a third backend that notes its calls and does as torch does."""

    def noting(name):
        def run(*arguments):
            calls.append(name)
            return getattr(torch_impl, name)(*arguments)

        return run

    def plug(device_types=(), reason=None):
        module = SimpleNamespace(**{name: noting(name) for name in FUNCTIONS})
        monkeypatch.setitem(sys.modules, "fake_operations", module)
        backend = backends.Backend("fake_operations", device_types, lambda *where: reason)
        monkeypatch.setattr(backends, "_BACKENDS", {"fake": backend, **backends._BACKENDS})

    return plug


def run_all(impl):
    x, w_enc, w_dense, w_dec = (t.clone().requires_grad_() for t in (X, W_ENC, W_DENSE, W_DEC))
    codes = encode(x, w_enc, impl=impl), dense(x, w_dense, impl=impl)
    loss = sum(decode(*one, w_dec, impl=impl).sum() for one in codes)
    return loss, *torch.autograd.grad(loss, (x, w_enc, w_dense, w_dec))


def test_backend_by_name(fake, calls):
    expected = run_all("torch")
    fake()
    for got, of_torch in zip(run_all("fake"), expected, strict=True):
        assert torch.equal(got, of_torch)
    assert set(calls) == set(FUNCTIONS)
    calls.clear()
    run_all(None)
    run_all("torch")
    run_all("reference")
    assert not calls


def test_backend_by_device_type(fake, calls):
    fake(device_types=("cpu",))
    run_all(None)
    assert set(calls) == set(FUNCTIONS)
    calls.clear()
    run_all("torch")
    assert not calls


def test_choice_by_device_type(fake):
    fake(device_types=("meta", "cuda"))
    assert backends.choose(None, torch.device("meta")) == "fake"
    assert backends.choose(None, torch.device("cuda", 1)) == "fake"
    assert backends.choose(None, torch.device("cpu")) == "torch"
    assert backends.choose("torch", torch.device("meta")) == "torch"


def test_backend_that_cannot_run(fake, calls):
    """The default falls back to torch; the name is an error with the reason."""
    fake(device_types=("cpu",), reason="needs three hands")
    run_all(None)
    assert not calls
    with pytest.raises(RuntimeError, match="impl='fake' cannot run on cpu: needs three hands"):
        encode(impl="fake")


def test_default_on_a_cpu_is_torch():
    assert backends.choose(None, torch.device("cpu")) == "torch"


def test_reference_is_the_reference(monkeypatch):
    for name in ("fused_encode", "dense_encode", "sparse_decode"):
        monkeypatch.setattr(reference, name, lambda *a, name=name, **o: SparseCodes(name, name))
    assert encode(impl="reference").values == "fused_encode"
    assert dense(impl="reference").values == "dense_encode"
    assert decode(impl="reference").values == "sparse_decode"


# The package


def test_no_environment_variable_is_read():
    for path in Path(kronsae_kernels.__file__).parent.rglob("*.py"):
        assert not re.search(r"environ|getenv", path.read_text()), path.name


def test_imports_torch_alone():
    """Beyond what torch itself imports."""
    script = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import kronsae_kernels\n"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "kronsae_kernels" in found
    assert not set(found) & {"kronsae", "triton", "transformers", "datasets", "numpy"}, found


def test_public_names():
    assert set(kronsae_kernels.__all__) == {
        "HierarchicalLoss",
        "SparseCodes",
        "__version__",
        "batch_topk_encode",
        "dense_encode",
        "expert_encode",
        "fused_encode",
        "hierarchical_loss",
        "jump",
        "nested_decode",
        "refine_codes",
        "sparse_decode",
        "threshold_encode",
    }
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", kronsae_kernels.__version__)
