"""`kronsae doctor`: a report on this machine, and the problems that a run would have on it.

It lists versions, devices with their measured rates, the kernels that run and why others do not,
checks kernels against the reference, and looks for optional packages. It uses no network.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from kronsae.commandline import Parser, exit_status
from kronsae.system.devices import free_bytes
from kronsae_kernels import backends, dense_encode, fused_encode, sparse_decode
from kronsae_kernels.step import why_not as why_not_fused

GIB = 2**30
NEEDED = {"torch": "2.6", "transformers": "4.48", "datasets": "3.0", "safetensors": "0.4.5"}
"""Oldest versions that work, as in setup.py."""
OTHERS = ("numpy", "huggingface_hub", "rich", "triton")
EXTRAS = {
    "matplotlib": "pictures of experiments and benchmarks",
    "scipy": "experiments",
    "tensorboard": "--tensorboard",
    "wandb": "--wandb",
    "flash_attn": "another attention for language models; torch has one of its own",
}
RATE_SECONDS = 0.25
"""Shortest time in which a rate is measured."""
SCRATCH_BYTES = 2**26
"""Size of the file that measures the disk."""
LITTLE_DISK = 2 * GIB
"""Free space below which the disk counts as a problem."""


def examine(folder: Path, rates: bool = True) -> dict[str, Any]:
    """All findings (JSON-able); "problems" is empty if all is well.

    folder: parent folder of runs.  rates: True to measure them, too.
    """
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    findings: dict[str, Any] = {
        "versions": versions(),
        "devices": {str(device): describe(device) for device in devices},
        "kernels": {str(device): kernels(device) for device in devices},
        "checks": [check for device in devices for check in checks(device)],
        "disk": disk(folder),
        "hub": hub(),
        "extras": {name: version(name) for name in EXTRAS},
    }
    if rates:
        for device in devices:
            findings["devices"][str(device)]["rates"] = device_rates(device)
        writable = findings["disk"]["writable"]
        findings["disk"]["written_gb_per_s"] = written_rate(folder) if writable else 0
    findings["problems"] = problems(findings)
    return findings


# Versions, devices, disk


def versions() -> dict[str, str | None]:
    """Versions of Python and packages (None: not installed), of CUDA or ROCm, and the driver."""
    numbers: dict[str, str | None] = {"python": platform.python_version()}
    numbers |= {name: version(name) for name in ("kronsae", *NEEDED, *OTHERS)}
    optional = {
        "cuda of torch": torch.version.cuda,
        "rocm of torch": torch.version.hip,
        "driver": _driver(),
    }
    return numbers | {name: number for name, number in optional.items() if number}


def version(name: str) -> str | None:
    """Version of a package; "there" if it has none, None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "there" if importlib.util.find_spec(name) else None


def _driver() -> str | None:
    try:
        first = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return None
    number = re.search(r"\d+\.\d+(\.\d+)?", first)
    return number and number.group()


def describe(device: torch.device) -> dict[str, Any]:
    """Name, memory, cores and capabilities of a device."""
    if device.type == "cpu":
        return {
            "name": _processor(),
            "cores": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "vectors": torch.backends.cpu.get_cpu_capability(),
            "free_bytes": free_bytes(device),
        }
    facts = torch.cuda.get_device_properties(device)
    return {
        "name": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "processors": facts.multi_processor_count,
        "bytes": facts.total_memory,
        "free_bytes": free_bytes(device),
    }


def _processor() -> str:
    try:
        name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        name = None
    return name.group(1) if name else platform.processor() or platform.machine()


def kernels(device: torch.device) -> dict[str, Any]:
    """The default implementation on a device, and why others and the fused step cannot run."""
    return {
        "default": backends.choose(None, device),
        "why_not": {name: backends.why_not(name, device) for name in backends.NAMES},
        "fused_step_why_not": why_not_fused(device, dtype=_step_dtype(device)),
    }


def _step_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def disk(folder: Path) -> dict[str, Any]:
    """Space in a folder, and whether it is writable."""
    existing = _existing(folder)
    usage = shutil.disk_usage(existing)
    return {
        "folder": str(folder.absolute()),
        "free_bytes": usage.free,
        "bytes": usage.total,
        "writable": os.access(existing, os.W_OK),
    }


def _existing(folder: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def hub() -> dict[str, Any]:
    """Settings of the Hugging Face hub, and the size of its cache."""
    from huggingface_hub import constants, get_token

    cache = Path(constants.HF_HUB_CACHE)
    names = [path.name for path in cache.iterdir()] if cache.is_dir() else []
    return {
        "offline": bool(constants.HF_HUB_OFFLINE),
        "endpoint": constants.ENDPOINT,
        "logged_in": get_token() is not None,
        "proxy": any(os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY")),
        "cache": str(cache),
        "cached_models": sum(name.startswith("models--") for name in names),
        "cached_datasets": sum(name.startswith("datasets--") for name in names),
    }


# Rates


def device_rates(device: torch.device) -> dict[str, float]:
    """Multiply-adds per second of square products, bytes per second of a copy (read and written).

    Each is the best of the calls in RATE_SECONDS, of three at least.
    """
    gpu = device.type == "cuda"
    rates: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16, *([torch.float16] if gpu else [])):
        size = 8192 if gpu else 512  # some processors have no instructions for bfloat16
        a = torch.randn(size, size, device=device).to(dtype)
        out = torch.empty_like(a)
        seconds = _best(partial(torch.mm, a, a, out=out), device)
        rates[f"{str(dtype).removeprefix('torch.')}_multiply_adds_per_s"] = size**3 / seconds
    source = torch.zeros(2**30 if gpu else 2**26, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    rates["bytes_per_s"] = 2 * len(source) / _best(lambda: target.copy_(source), device)
    return rates


def _best(call: Callable[[], object], device: torch.device) -> float:
    """Shortest time of a call in seconds."""
    call()
    times: list[float] = []
    end = time.perf_counter() + RATE_SECONDS
    while len(times) < 3 or time.perf_counter() < end:
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times)


def written_rate(folder: Path) -> float:
    """GB per second at which a file is written to a folder and synced to the disk."""
    block = os.urandom(SCRATCH_BYTES)
    with tempfile.NamedTemporaryFile(dir=_existing(folder)) as file:
        began = time.perf_counter()
        file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return SCRATCH_BYTES / (time.perf_counter() - began) / 1e9


# Checks of the kernels

IMPLS = ("triton", "torch")
SHAPE = {"tokens": 8, "d": 20, "heads": 9, "m": 2, "n": 3, "k": 5}
"""No powers of two, on purpose, and small: kernels are slow in an interpreter."""


def checks(device: torch.device) -> list[dict[str, Any]]:
    """Comparison of each implementation that runs here with the reference: values and gradients.

    The reference computes in float64 from the same (rounded) numbers. An implementation may have
    twice the error of the reference in its dtype, relative to the largest value: it adds in another
    order, with as many roundings.
    """
    gpu = device.type == "cuda"
    results: list[dict[str, Any]] = []
    for dtype in (torch.float32, *([torch.bfloat16] if gpu else [])):
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
                    reason = f"{type(error).__name__}: {error}".splitlines()[0]
                    check |= {"right": False, "wrong": [], "error": reason[:300]}
                results.append(check)
    return results


def _results(
    encoder: str, device: torch.device, rounded: torch.dtype, dtype: torch.dtype, impl: str
) -> dict[str, Tensor]:
    """The active latents, their decoded sum, and gradients of all inputs; float64, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    heads, m, n, d = (SHAPE[name] for name in ("heads", "m", "n", "d"))
    shapes = {
        "x": (SHAPE["tokens"], d),
        "w_enc": (heads, m + n, d) if encoder == "kron" else (heads * m * n, d),
        "b_enc": (heads, m + n) if encoder == "kron" else (heads * m * n,),
        "w_dec": (heads * m * n, d),
        "b_dec": (d,),
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
        codes = fused_encode(x, w_enc, b_enc, m=m, k=SHAPE["k"], impl=impl)
    else:
        codes = dense_encode(x, w_enc, b_enc, k=SHAPE["k"], impl=impl)
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
    errors, wrong = {}, []
    for name, exact in truth.items():
        scale = float(exact.abs().max())
        error, allowed = (float((x[name] - exact).abs().max()) / scale for x in (outputs, plain))
        errors[name] = error
        # The reference may happen to be exact: a rounding error is allowed in any case.
        if not error <= 2 * allowed + 2**-22:
            wrong.append(f"{name} off by {error:.1e}, allowed {2 * allowed:.1e}")
    return {"right": not wrong, "wrong": wrong, "largest_error": max(errors.values())}


# Problems


def problems(findings: dict[str, Any]) -> list[str]:
    """The problems in the findings, each in a sentence."""
    from torch.torch_version import TorchVersion

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
        if not check["right"]:
            error = check.get("error") or "; ".join(check["wrong"])
            lines.append(
                f"{check['impl']} on {check['device']} ({check['encoder']}, {check['dtype']}) "
                f"does not compute what the reference does: {error}"
            )
    space = findings["disk"]
    if not space["writable"]:
        lines.append(f"{space['folder']} cannot be written to: choose another with --out")
    elif space["free_bytes"] < LITTLE_DISK:
        lines.append(
            f"{space['free_bytes'] / GIB:.1f} GiB are free at {space['folder']}: checkpoints of a "
            "large dictionary need more"
        )
    return lines


# The screen


def render(findings: dict[str, Any]) -> Group:
    """The findings as a screen."""
    parts = [_section("Versions", _version_rows(findings["versions"]))]
    for device, facts in findings["devices"].items():
        parts.append(_section(device, _device_rows(facts, findings["kernels"][device])))
    parts.append(_section("Kernels against the reference", map(_check_row, findings["checks"])))
    parts.append(_section("Disk and hub", _disk_rows(findings["disk"], findings["hub"])))
    extras = [
        (name, _yes(f"{number}  {EXTRAS[name]}") if number else _absent(EXTRAS[name]))
        for name, number in findings["extras"].items()
    ]
    parts.append(_section("Optional", extras))
    verdict = Text("\n")
    if findings["problems"]:
        verdict.append("There are problems:\n", style="bold red")
        for line in findings["problems"]:
            verdict.append(f"  ✗ {line}\n", style="red")
    else:
        verdict.append("All is well.", style="bold green")
        verdict.append(" Next: kronsae train --plan")
    return Group(*parts, verdict)


def _section(title: str, rows: Any) -> Group:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True, min_width=18)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(f"  {name}", value if isinstance(value, Text) else Text(str(value)))
    return Group(Text(f"\n{title}", style="bold"), table)


def _version_rows(versions: dict[str, str | None]) -> list[tuple[str, str]]:
    """Rows of five packages each."""
    items = [f"{name} {number or '(none)'}" for name, number in versions.items()]
    return [
        ("packages" if i == 0 else "", ", ".join(items[i : i + 5])) for i in range(0, len(items), 5)
    ]


def _disk_rows(space: dict[str, Any], state: dict[str, Any]) -> list[tuple[str, str]]:
    written = space.get("written_gb_per_s")
    free = f"{space['free_bytes'] / GIB:,.1f} of {space['bytes'] / GIB:,.1f} GiB free"
    free += f", writes {written:.2f} GB/s" if written else ""
    login = "a token is set" if state["logged_in"] else "no token (gated models need one)"
    network = "offline: only cached files can be used" if state["offline"] else "online"
    cached = f"{state['cached_models']} models, {state['cached_datasets']} datasets"
    return [
        ("runs", f"{free}, in {space['folder']}"),
        ("Hugging Face hub", f"{network} (not tried); {login}"),
        ("cached", f"{cached}, in {state['cache']}"),
    ]


def _device_rows(facts: dict[str, Any], kernel: dict[str, Any]) -> list[tuple[str, Any]]:
    free = facts["free_bytes"]
    memory = "unknown" if free is None else f"{free / GIB:,.1f} GiB free"
    memory += f" of {facts['bytes'] / GIB:,.1f}" if "bytes" in facts else ""
    about = facts["name"]
    if "capability" in facts:
        about += f", compute capability {facts['capability']}, {facts['processors']} processors"
    else:
        about += f", {facts['cores']} cores, {facts['threads']} threads, {facts['vectors']}"
    rows: list[tuple[str, Any]] = [("device", about), ("memory", memory)]
    if "rates" in facts:
        rates = dict(facts["rates"])
        copied = rates.pop("bytes_per_s")
        products = ", ".join(
            f"{name.split('_')[0]} {_rate(2 * rate)}" for name, rate in rates.items()
        )
        rows.append(("measured", f"matrix products {products}; memory {copied / 1e9:,.0f} GB/s"))
    missing = _absent if "capability" not in facts else _no
    for name, reason in kernel["why_not"].items():
        if name == "reference":
            continue
        default = " (the default here)" if name == kernel["default"] else ""
        rows.append((f"{name} kernels", missing(reason) if reason else _yes(f"run{default}")))
    reason = kernel["fused_step_why_not"]
    rows.append(("fused step", missing(reason) if reason else _yes("runs")))
    return rows


def _rate(flops: float) -> str:
    return f"{flops / 1e12:,.0f} TFLOP/s" if flops >= 1e13 else f"{flops / 1e9:,.0f} GFLOP/s"


def _check_row(check: dict[str, Any]) -> tuple[str, Text]:
    name = f"{check['impl']}, {check['encoder']}"
    where = f"{check['dtype']} on {check['device']}"
    if check["right"]:
        error = check["largest_error"]
        return name, _yes(f"{where}: values and gradients right (to {error:.0e})")
    return name, _no(f"{where}: {check.get('error') or '; '.join(check['wrong'])}")


def _yes(text: str) -> Text:
    return Text.assemble(("✓ ", "green"), text)


def _no(text: str) -> Text:
    """A line about a problem."""
    return Text.assemble(("✗ ", "red"), text)


def _absent(text: str) -> Text:
    """A line about something optional that is not there."""
    return Text.assemble(("– ", "dim"), (text, "dim"))


def main(argv: list[str] | None = None) -> int:
    """Print the findings; returns 0 if all is well, 1 if not, 2 for wrong flags."""
    parser = Parser(
        "doctor",
        "Say what this machine can do, which kernels run, and whether their results are right.",
        "kronsae doctor",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of runs")
    parser.add_argument("--no-rates", action="store_true", help="measure no rates")
    well = True

    def work(arguments: list[str]) -> None:
        nonlocal well
        options = parser.parse(arguments)
        findings = examine(options.out, rates=not options.no_rates)
        well = not findings["problems"]
        if options.json:
            print(json.dumps(findings, indent=1))
        else:
            Console(highlight=False).print(render(findings))

    return exit_status(work, argv) or int(not well)


if __name__ == "__main__":
    sys.exit(main())
