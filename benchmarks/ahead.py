"""Compiling a recorded launch ahead of time, for a card that need not be there.

`kronsae_kernels.triton_impl.launch.record` notes launches; `specialise` turns one into what
Triton's JIT would compile at that launch, and `compiled` compiles it. Without TRITON_INTERPRET,
which turns kernels into Python functions.
"""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from kronsae_kernels.triton_impl.launch import FP_FUSION, Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
VERSION = ".".join(triton.__version__.split(".")[:2])
"""Other compilers give other numbers, so golden tables have a part for each minor version."""


@dataclass
class Specialised:
    """All that the compiler is told of a launch; equal keys compile to the same code."""

    source: ASTSource
    options: Any

    @property
    def key(self) -> tuple[str, str, str]:
        """Kernel, types and values, options."""
        return self.source.fn.cache_key, self.source.hash(), str(self.options)


def specialise(launch: Launch, target: str) -> Specialised:
    """A launch as Triton's JIT would see it on a target.

    By Triton's own functions (`JITFunction.run`): pointers by dtype, integers by their width, and
    both by divisibility by 16; 1, None and constexpr parameters become constants.
    """
    kernel = launch.kernel
    backend = make_backend(TARGETS[target])
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    options: dict[str, Any] = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    options["enable_fp_fusion"] = FP_FUSION
    if launch.maxnreg:
        options["maxnreg"] = launch.maxnreg
    bound, specialisation, rest = bind(**launch.arguments, **options)
    parsed, signature, constants, attributes = kernel._pack_args(
        backend, rest, bound, specialisation, None
    )
    return Specialised(ASTSource(kernel, signature, constants, attributes), parsed)


def compiled(special: Specialised, target: str) -> Any:
    """The compiled kernel. Raises what the compiler raises."""
    return triton.compile(special.source, target=TARGETS[target], options=vars(special.options))


def tool(name: str, *arguments: Any) -> str:
    """Output of one of NVIDIA's tools: Triton's own copy, or that of a CUDA toolkit.

    Raises FileNotFoundError if there is neither.
    """
    own = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    path = str(own) if own.exists() else shutil.which(name)
    if path is None:
        raise FileNotFoundError(f"{name}: neither in {own.parent} nor on the path")
    command = [path, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
