"""`kronsae doctor`: what this machine can do, which kernels run, and whether they are right.

It lists versions and devices, the kernels that run and why others do not, and compares values and
gradients of the kernels with the reference's. It uses no network.
"""

import importlib.metadata
import json
import platform
import sys
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from kronsae.commandline import Parser, exit_status
from kronsae.system.devices import free_bytes
from kronsae.system.threads import BRIEFLY, processors, waiting
from kronsae_kernels import __version__, backends, dense_encode, fused_encode, sparse_decode
from kronsae_kernels.step import why_not as why_not_fused

NEEDED = {"torch": "2.6", "transformers": "4.48", "datasets": "3.0", "safetensors": "0.4.5"}
"""Oldest versions that work, as in setup.py."""
OTHERS = (
    "triton",
    "huggingface_hub",
    "matplotlib",
    "scipy",
    "tensorboard",
    "wandb",
    "trackio",
    "pillow",
)
"""Packages that kronsae uses if they are there, and the hub's."""


def examine() -> dict[str, Any]:
    """All findings (JSON-able); "problems" is empty if all is well."""
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    findings: dict[str, Any] = {
        "versions": versions(),
        "devices": {str(device): describe(device) for device in devices},
        "kernels": {str(device): kernels(device) for device in devices},
        "checks": [check for device in devices for check in checks(device)],
    }
    return findings | {"problems": problems(findings)}


def versions() -> dict[str, str | None]:
    """Versions of Python, kronsae and packages; None for one that is not installed."""
    numbers: dict[str, str | None] = {"python": platform.python_version(), "kronsae": __version__}
    for name in (*NEEDED, *OTHERS):
        try:
            numbers[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            numbers[name] = None
    return numbers


def describe(device: torch.device) -> dict[str, Any]:
    """Name, free memory (None if the system does not say) and capabilities of a device."""
    if device.type == "cpu":
        return {
            "name": platform.processor() or platform.machine(),
            "processors": processors(),
            "threads": torch.get_num_threads(),
            "waiting": waiting() or "spinning",
            "vectors": torch.backends.cpu.get_cpu_capability(),
            "free_bytes": free_bytes(device),
        }
    facts = torch.cuda.get_device_properties(device)
    return {
        "name": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "bytes": facts.total_memory,
        "free_bytes": free_bytes(device),
    }


def kernels(device: torch.device) -> dict[str, Any]:
    """The default implementation on a device, and why others and the fused step cannot run."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return {
        "default": backends.choose(None, device),
        "why_not": {name: backends.why_not(name, device) for name in backends.NAMES},
        "fused_step_why_not": why_not_fused(device, dtype=dtype),
    }


# Checks of the kernels

IMPLS = ("triton", "torch")
TOKENS, D, HEADS, M, N, K = 8, 20, 9, 2, 3, 5
"""No powers of two, on purpose, and small: kernels are slow in an interpreter."""


def checks(device: torch.device) -> list[dict[str, Any]]:
    """Comparison of each implementation that runs here with the reference: values and gradients.

    The reference computes in float64 from the same (rounded) numbers. An implementation may have
    twice the error of the reference in its dtype, relative to the largest value: it adds in another
    order, with as many roundings.
    """
    results: list[dict[str, Any]] = []
    for dtype in (torch.float32, *([torch.bfloat16] if device.type == "cuda" else [])):
        for encoder in ("kron", "dense"):
            truth = _results(encoder, device, dtype, torch.float64, "reference")
            plain = _results(encoder, device, dtype, dtype, "reference")
            for impl in IMPLS:
                if backends.why_not(impl, device, dtype) is not None:
                    continue
                check: dict[str, Any] = {
                    "device": str(device),
                    "impl": impl,
                    "encoder": encoder,
                    "dtype": str(dtype).removeprefix("torch."),
                }
                try:
                    outputs = _results(encoder, device, dtype, dtype, impl)
                    check |= _compare(outputs, plain, truth)
                except Exception as error:  # of a compiler or a driver, say
                    check["wrong"] = [f"{type(error).__name__}: {error}".splitlines()[0][:300]]
                results.append(check)
    return results


def _results(
    encoder: str, device: torch.device, rounded: torch.dtype, dtype: torch.dtype, impl: str
) -> dict[str, Tensor]:
    """The active latents, their decoded sum, and gradients of all inputs; float64, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    latents = HEADS * M * N
    rows = (HEADS, M + N) if encoder == "kron" else (latents,)
    shapes = {
        "x": (TOKENS, D),
        "w_enc": (*rows, D),
        "b_enc": rows,
        "w_dec": (latents, D),
        "b_dec": (D,),
    }
    inputs = {
        name: torch.randn(*shape, generator=generator)
        .mul(shape[-1] ** -0.5)
        .to(rounded)
        .to(device, dtype)
        .requires_grad_()
        for name, shape in shapes.items()
    }
    x, w_enc, b_enc, w_dec, b_dec = inputs.values()
    if encoder == "kron":
        codes = fused_encode(x, w_enc, b_enc, m=M, k=K, impl=impl)
    else:
        codes = dense_encode(x, w_enc, b_enc, k=K, impl=impl)
    out = sparse_decode(codes, w_dec=w_dec, b_dec=b_dec, impl=impl)
    loss = (out.double() - x.detach().double()).square().sum()
    gradients = torch.autograd.grad(loss, list(inputs.values()))
    results = {"values": codes.values, "decoded": out}
    results |= {f"d {name}": g for name, g in zip(inputs, gradients, strict=True)}
    return {name: tensor.detach().double().cpu() for name, tensor in results.items()}


def _compare(
    outputs: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor]
) -> dict[str, Any]:
    """Errors of outputs against the truth; plain: the reference's outputs in the same dtype."""
    errors, wrong = [], []
    for name, exact in truth.items():
        scale = float(exact.abs().max())
        error, allowed = (float((x[name] - exact).abs().max()) / scale for x in (outputs, plain))
        errors.append(error)
        # The reference may happen to be exact: a rounding error is allowed in any case.
        if not error <= 2 * allowed + 2**-22:
            wrong.append(f"{name} off by {error:.1e}, allowed {2 * allowed:.1e}")
    return {"wrong": wrong, "largest_error": max(errors)}


# What is said


def problems(findings: dict[str, Any]) -> list[str]:
    """The problems in the findings, each in a sentence."""
    lines = []
    for name, oldest in NEEDED.items():
        installed = findings["versions"][name]
        if installed is None or TorchVersion(installed) < oldest:
            lines.append(
                f"{name} {oldest} or newer is needed, {installed or 'none'} is installed: "
                f"pip install -U '{name}>={oldest}'"
            )
    for device, kernel in findings["kernels"].items():
        reason = kernel["why_not"]["triton"]
        if device != "cpu" and reason is not None:
            lines.append(f"{device}: the GPU's kernels cannot run, torch's will: {reason}")
    for check in findings["checks"]:
        if check["wrong"]:
            lines.append(
                f"{_name(check)} does not compute what the reference does: "
                + "; ".join(check["wrong"])
            )
    return lines


def _name(check: dict[str, Any]) -> str:
    return f"{check['impl']} on {check['device']} ({check['encoder']}, {check['dtype']})"


def render(findings: dict[str, Any]) -> str:
    """The findings as text for a terminal."""
    numbers = (f"{name} {number or '(none)'}" for name, number in findings["versions"].items())
    lines = ["versions: " + ", ".join(numbers)]
    for device, facts in findings["devices"].items():
        shown = [
            f"{name.replace('bytes', 'memory').replace('_', ' ')} "
            + (f"{value / 2**30:,.1f} GiB" if "bytes" in name and value else str(value))
            for name, value in facts.items()
        ]
        kernel = findings["kernels"][device]
        lines += ["", f"{device}: " + ", ".join(shown), *_on_threads(facts)]
        reasons = kernel["why_not"] | {"fused step": kernel["fused_step_why_not"]}
        for name, reason in reasons.items():
            default = " (the default here)" if name == kernel["default"] else ""
            lines.append(f"  – {name}: {reason}" if reason else f"  ✓ {name} runs{default}")
    lines += ["", "kernels against the reference:"]
    for check in findings["checks"]:
        if not check["wrong"]:
            error = check["largest_error"]
            lines.append(f"  ✓ {_name(check)}: values and gradients right (to {error:.0e})")
    if findings["problems"]:
        lines += ["", "There are problems:", *(f"  ✗ {line}" for line in findings["problems"])]
    else:
        lines += ["", "All is well. Next: kronsae train --plan"]
    return "\n".join(lines)


def _on_threads(facts: dict[str, Any]) -> list[str]:
    """What is to be said of a device's threads, if it is a CPU."""
    if "threads" not in facts:
        return []
    wanted = " ".join(f"{name}={value}" for name, value in BRIEFLY.items())
    busy = "  on a busy processor threads that spin while they wait are 10 times slower: "
    if facts["waiting"] in (wanted, "spinning"):
        advice = f"programs of your own need {wanted} before torch is imported (commands set it)"
    else:
        advice = f"commands set {wanted}, but not here, as you have set {facts['waiting']}"
    lines = [busy + advice]
    if facts["threads"] > facts["processors"]:
        lines.append(
            f"  {facts['threads']} threads share {facts['processors']:g} processors: set "
            f"OMP_NUM_THREADS={max(1, int(facts['processors']))}"
        )
    return lines


def main(argv: list[str] | None = None) -> int:
    """Print the findings; returns 0 if all is well, 1 if not, 2 for wrong flags."""
    parser = Parser(
        "doctor",
        "Say what this machine can do, which kernels run, and whether their results are right.",
        "kronsae doctor",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    well = True

    def work(arguments: list[str]) -> None:
        nonlocal well
        options = parser.parse(arguments)
        findings = examine()
        well = not findings["problems"]
        print(json.dumps(findings, indent=1) if options.json else render(findings))

    return exit_status(work, argv) or int(not well)


if __name__ == "__main__":
    sys.exit(main())
