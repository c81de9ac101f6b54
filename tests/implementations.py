"""The implementations that run tensors of a CPU, for `pytest.mark.parametrize`."""

import importlib.util
import os

import pytest

_interpreter = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton")
TRITON = pytest.param(
    "triton",
    marks=pytest.mark.skipif(not _interpreter, reason="on a CPU, kernels need the interpreter"),
)
ALL = ["torch", "reference", TRITON]
