"""`python -m kronsae.doctor`: what this machine can do for a run, and what is amiss.

Versions, devices and their rates (measured in seconds), which kernels run and why others do not,
whether they compute what the reference does, and what is installed. No network is touched.
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
SECONDS = 0.25
"""That a rate is measured for, at least."""
SCRATCH_BYTES = 2**26
"""Written to measure the disk."""
LITTLE_DISK = 2 * GIB


def examine(folder: Path, rates: bool = True) -> dict[str, Any]:
    """All findings (JSON-able); "problems" is empty if all is well.

    folder: where runs would be written.  rates: measure them, too.
    """
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    found: dict[str, Any] = {
        "versions": versions(),
        "devices": {str(device): describe(device) for device in devices},
        "kernels": {str(device): kernels(device) for device in devices},
        "checks": [one for device in devices for one in checks(device)],
        "disk": disk(folder),
        "hub": hub(),
        "extras": {name: version(name) for name in EXTRAS},
    }
    if rates:
        for device in devices:
            found["devices"][str(device)]["rates"] = device_rates(device)
        found["disk"]["written_gb_per_s"] = written_rate(folder) if found["disk"]["writable"] else 0
    found["problems"] = problems(found)
    return found


# What is there


def versions() -> dict[str, str | None]:
    """Of Python and packages (None: not installed), and of what drives a GPU."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    found |= {name: version(name) for name in ("kronsae", *NEEDED, *OTHERS)}
    if torch.version.cuda:
        found["cuda of torch"] = torch.version.cuda
    if torch.version.hip:
        found["rocm of torch"] = torch.version.hip
    if driver := _driver():
        found["driver"] = driver
    return found


def version(name: str) -> str | None:
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
    """Name, memory, and what counts beside them."""
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
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


def kernels(device: torch.device) -> dict[str, Any]:
    """Which implementation is the default here, why others cannot run, and the fused step."""
    return {
        "default": backends.choose(None, device),
        "why_not": {name: backends.why_not(name, device) for name in backends.NAMES},
        "fused_step_why_not": why_not_fused(device, dtype=_step_dtype(device)),
    }


def _step_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def disk(folder: Path) -> dict[str, Any]:
    """Where runs go: room, and whether one may write there."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    usage = shutil.disk_usage(there)
    return {
        "folder": str(folder.absolute()),
        "free_bytes": usage.free,
        "bytes": usage.total,
        "writable": os.access(there, os.W_OK),
    }


def hub() -> dict[str, Any]:
    """What the Hugging Face libraries would do, from settings and files alone."""
    from huggingface_hub import constants, get_token

    cache = Path(constants.HF_HUB_CACHE)
    kept = [path.name for path in cache.iterdir()] if cache.is_dir() else []
    return {
        "offline": bool(constants.HF_HUB_OFFLINE),
        "endpoint": constants.ENDPOINT,
        "logged_in": get_token() is not None,
        "proxy": any(os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY")),
        "cache": str(cache),
        "cached_models": sum(name.startswith("models--") for name in kept),
        "cached_datasets": sum(name.startswith("datasets--") for name in kept),
    }


# What it can do


def device_rates(device: torch.device) -> dict[str, float]:
    """Multiply-adds a second of square products, and bytes a second of a copy (read and written).

    Each the best of the calls that SECONDS hold, three at least.
    """
    gpu = device.type == "cuda"
    found: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16, *([torch.float16] if gpu else [])):
        size = 8192 if gpu else 512  # some processors have no instructions for bfloat16
        a = torch.randn(size, size, device=device).to(dtype)
        out = torch.empty_like(a)
        seconds = _best(lambda a=a, out=out: torch.mm(a, a, out=out), device)
        found[f"{str(dtype).removeprefix('torch.')}_multiply_adds_per_s"] = size**3 / seconds
    source = torch.zeros(2**30 if gpu else 2**26, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    found["bytes_per_s"] = 2 * len(source) / _best(lambda: target.copy_(source), device)
    return found


def _best(call: Callable[[], object], device: torch.device) -> float:
    call()
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(times) < 3 or time.perf_counter() < end:
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times)


def written_rate(folder: Path) -> float:
    """GB a second of a file that is written where runs go, and is on the disk at the end."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    block = os.urandom(SCRATCH_BYTES)
    with tempfile.NamedTemporaryFile(dir=there) as file:
        began = time.perf_counter()
        file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return SCRATCH_BYTES / (time.perf_counter() - began) / 1e9


# Whether it is right

IMPLS = ("triton", "torch")
SHAPE = {"tokens": 8, "d": 20, "heads": 9, "m": 2, "n": 3, "k": 5}
"""Odd on purpose, and small: kernels in an interpreter take their time."""


def checks(device: torch.device) -> list[dict[str, Any]]:
    """Values and gradients of each implementation that runs here, against the reference.

    The reference computes in float64 from the same (rounded) numbers. An implementation may err by
    twice what the reference does in its dtype, relative to the largest: it adds in another order,
    with as many roundings.
    """
    gpu = device.type == "cuda"
    found = []
    for dtype in (torch.float32, *([torch.bfloat16] if gpu else [])):
        for encoder in ("kron", "dense"):
            truth = _results(encoder, device, dtype, torch.float64, "reference")
            plain = _results(encoder, device, dtype, dtype, "reference")
            for impl in IMPLS:
                if backends.why_not(impl, device, dtype) is not None:
                    continue
                one = {
                    "device": str(device),
                    "impl": impl,
                    "encoder": encoder,
                    "dtype": str(dtype).removeprefix("torch."),
                }
                try:
                    got = _results(encoder, device, dtype, dtype, impl)
                    one |= _judged(got, plain, truth)
                except Exception as error:  # a compiler's, a driver's: whatever it is, say it
                    reason = f"{type(error).__name__}: {error}".splitlines()[0]
                    one |= {"right": False, "wrong": [], "error": reason[:300]}
                found.append(one)
    return found


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
    found = {"values": codes.values, "decoded": out}
    found |= {f"d {name}": g for name, g in zip(inputs, gradients, strict=True)}
    return {name: tensor.detach().double().cpu() for name, tensor in found.items()}


def _judged(
    got: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor]
) -> dict[str, Any]:
    errors, wrong = {}, []
    for name, right in truth.items():
        scale = float(right.abs().max())
        error, allowed = (float((x[name] - right).abs().max()) / scale for x in (got, plain))
        errors[name] = error
        # Rounding to nothing in the reference's favour is no fault of the other's.
        if not error <= 2 * allowed + 2**-22:
            wrong.append(f"{name} off by {error:.1e}, allowed {2 * allowed:.1e}")
    return {"right": not wrong, "wrong": wrong, "largest_error": max(errors.values())}


# What is amiss


def problems(found: dict[str, Any]) -> list[str]:
    """What to mend, in words; empty if all is well."""
    from torch.torch_version import TorchVersion

    lines = []
    for name, oldest in NEEDED.items():
        there = found["versions"][name]
        if there is None or TorchVersion(there) < oldest:
            lines.append(
                f"{name} {oldest} or newer is needed, {there or 'none'} is there: "
                f"pip install -U '{name}>={oldest}'"
            )
    for device, kernel in found["kernels"].items():
        reason = kernel["why_not"]["triton"]
        if device != "cpu" and reason is not None:
            lines.append(f"{device}: the GPU's kernels cannot run, torch's will: {reason}")
    for one in found["checks"]:
        if not one["right"]:
            what = one.get("error") or "; ".join(one["wrong"])
            lines.append(
                f"{one['impl']} on {one['device']} ({one['encoder']}, {one['dtype']}) computes "
                f"something else than the reference: {what}"
            )
    room = found["disk"]
    if not room["writable"]:
        lines.append(f"{room['folder']} cannot be written to: choose another with --out")
    elif room["free_bytes"] < LITTLE_DISK:
        lines.append(
            f"{room['free_bytes'] / GIB:.1f} GiB are free at {room['folder']}: checkpoints of a "
            "large dictionary need more"
        )
    return lines


# How it looks


def render(found: dict[str, Any]) -> Group:
    """The findings as a screen."""
    parts = [
        _section("Versions", [(name, value or "not installed") for name, value in _versions(found)])
    ]
    for device, facts in found["devices"].items():
        parts.append(_section(device, _device_rows(facts, found["kernels"][device])))
    parts.append(_section("Kernels against the reference", map(_check_row, found["checks"])))
    room = found["disk"]
    written = room.get("written_gb_per_s")
    place = f"{room['free_bytes'] / GIB:,.1f} of {room['bytes'] / GIB:,.1f} GiB free"
    place += f", writes {written:.2f} GB/s" if written else ""
    state = found["hub"]
    login = "a token is there" if state["logged_in"] else "no token (gated models need one)"
    network = "offline: only what is cached can be named" if state["offline"] else "may be asked"
    parts.append(
        _section(
            "Disk and hub",
            [
                ("runs", f"{place}, in {room['folder']}"),
                ("Hugging Face hub", f"{network} (not tried); {login}"),
                (
                    "cached",
                    f"{state['cached_models']} models, {state['cached_datasets']} datasets, in "
                    f"{state['cache']}",
                ),
            ],
        )
    )
    extras = [
        (name, _yes(f"{there}  {EXTRAS[name]}") if there else _absent(EXTRAS[name]))
        for name, there in found["extras"].items()
    ]
    parts.append(_section("Optional", extras))
    verdict = Text("\n")
    if found["problems"]:
        verdict.append("Not all is well:\n", style="bold red")
        for line in found["problems"]:
            verdict.append(f"  ✗ {line}\n", style="red")
    else:
        verdict.append("All is well.", style="bold green")
        verdict.append(" Next: python -m kronsae.train --plan")
    return Group(*parts, verdict)


def _section(title: str, rows: Any) -> Group:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True, min_width=18)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(f"  {name}", value if isinstance(value, Text) else Text(str(value)))
    return Group(Text(f"\n{title}", style="bold"), table)


def _versions(found: dict[str, Any]) -> list[tuple[str, str | None]]:
    """Several a line, so that they fit a screen."""
    items = [f"{name} {number or '(none)'}" for name, number in found["versions"].items()]
    return [
        ("packages" if i == 0 else "", ", ".join(items[i : i + 5])) for i in range(0, len(items), 5)
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


def _check_row(one: dict[str, Any]) -> tuple[str, Text]:
    name = f"{one['impl']}, {one['encoder']}"
    where = f"{one['dtype']} on {one['device']}"
    if one["right"]:
        error = one["largest_error"]
        return name, _yes(f"{where}: values and gradients right (to {error:.0e})")
    return name, _no(f"{where}: {one.get('error') or '; '.join(one['wrong'])}")


def _yes(text: str) -> Text:
    return Text.assemble(("✓ ", "green"), text)


def _no(text: str) -> Text:
    """Something is amiss."""
    return Text.assemble(("✗ ", "red"), text)


def _absent(text: str) -> Text:
    """Something is not there, and need not be."""
    return Text.assemble(("– ", "dim"), (text, "dim"))


def main(argv: list[str] | None = None) -> int:
    """Print the findings; returns 0 if all is well, 1 if not, 2 for wrong flags."""
    parser = Parser(
        "doctor",
        "Say what this machine can do, which kernels run, and whether they compute the right "
        "thing.",
        "kronsae doctor",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where runs would go")
    parser.add_argument("--no-rates", action="store_true", help="measure no rates")
    well = True

    def work(arguments: list[str]) -> None:
        nonlocal well
        options = parser.parse(arguments)
        found = examine(options.out, rates=not options.no_rates)
        well = not found["problems"]
        if options.json:
            print(json.dumps(found, indent=1))
        else:
            Console(highlight=False).print(render(found))

    return exit_status(work, argv) or int(not well)


if __name__ == "__main__":
    sys.exit(main())
