"""The memory that `--plan` predicts beside what then happens: `python -m benchmarks.plan`.

Each configuration trains in a process of its own (`kronsae train`, with an evaluation and a
checkpoint) and notes by how much its resident memory rose above what it was with everything
imported; on a GPU, what torch took of its memory.
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.flags import output_file, usable_device
from benchmarks.measure import describe
from kronsae.config import RunConfig
from kronsae.plan.memory import make_plan
from kronsae.plan.outline import outline
from kronsae.system.devices import resolve_device
from kronsae.training.options import build

COMMON = {
    "buffer_tokens": 32_768,
    "heldout_tokens": 4096,
    "context_length": 256,
    "contexts_per_batch": 16,
    "tokens": 100_000,
    "epochs": 100,
}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "kron": {"dict_size": 4096, "m": 4, "n": 4, "k": 32, "batch_size": 1024},
    "dense": {"encoder": "dense", "dict_size": 4096, "k": 32, "batch_size": 1024},
    "small batch": {"encoder": "dense", "dict_size": 1024, "k": 8, "batch_size": 256},
    "large kron": {"dict_size": 32_768, "m": 4, "n": 4, "k": 64, "batch_size": 2048},
    "large dense": {"encoder": "dense", "dict_size": 16_384, "k": 32, "batch_size": 2048},
    "first layer": {"layer": 0, "dict_size": 8192, "m": 2, "n": 4, "k": 64, "batch_size": 4096},
    "matryoshka": {
        **{"objective": "matryoshka", "selection": "batchtopk", "dict_size": 8192},
        **{"m": 2, "n": 4, "k": 32, "batch_size": 1024},
    },
}


def run_config(name: str, device: str) -> RunConfig:
    return build({**COMMON, **CONFIGURATIONS[name], "device": device})


def resident(name: str) -> int:
    """Bytes of this process's memory: "VmRSS" now, "VmHWM" at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[name].split()[0]) * 1024


def flags(settings: dict[str, Any]) -> list[str]:
    return [part for k, v in settings.items() for part in ("--" + k.replace("_", "-"), str(v))]


def measure_memory(name: str, device: str) -> dict[str, float]:
    """MiB planned, and by how much memory rose: the process's, or what torch took of a GPU's."""
    import datasets  # noqa: F401  (all that a run imports belongs to the baseline)
    import transformers  # noqa: F401

    from kronsae.train import main as train

    config = run_config(name, device)
    model = outline(config.data)
    config = build({**COMMON, **CONFIGURATIONS[name], "device": device, "d_model": model.d_model})
    plan = make_plan({name: config}, model)
    where = resolve_device(device)
    tokens = COMMON["buffer_tokens"] + 4 * config.train.batch_size
    settings = COMMON | CONFIGURATIONS[name] | {"tokens": tokens, "device": device}
    # Halfway, as BatchTopK's threshold follows the batches slowly, and until then much is active.
    half = max(1, tokens // config.train.batch_size // 2)
    settings |= {"eval_every": half, "checkpoint_every": half}
    torch.randn(512, 512) @ torch.randn(512, 512)  # threads and their buffers
    before = resident("VmRSS")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        status = train([*flags(settings), "--out", str(Path(folder) / "run")])
    if status:
        raise RuntimeError(f"training ended with status {status}")
    rose = resident("VmHWM") - before
    if where.type == "cuda":
        rose = torch.cuda.max_memory_allocated(where)
    return {"planned": sum(plan["memory_mib"].values()), "measured": rose / 2**20}


def compare(names: list[str], device: str) -> list[dict[str, Any]]:
    """Plan and measurement of each configuration, each in a process of its own."""
    results = []
    for name in names:
        command = [sys.executable, "-m", "benchmarks.plan", "--child", "--only", name]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [*command, "--device", device], capture_output=True, text=True, env=environment
        )
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr.strip()[-2000:]}")
        memory = json.loads(done.stdout.splitlines()[-1])
        results.append({"name": name, "settings": CONFIGURATIONS[name], "memory": memory})
        print(row(results[-1]), flush=True)
    return results


HEAD = "| | F, k, batch | memory, MiB: plan | measured | |\n|---|---|---:|---:|---:|"


def row(one: dict[str, Any]) -> str:
    """A line of the table, in Markdown."""
    settings, planned, measured = one["settings"], *one["memory"].values()
    sizes = ", ".join(f"{settings[key]:,}" for key in ("dict_size", "k", "batch_size"))
    error = f"{planned / measured - 1:+.0%}"
    return f"| {one['name']} | {sizes} | {planned:,.0f} | {measured:,.0f} | {error} |"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("benchmarks.plan", description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=usable_device, default="auto")
    parser.add_argument("--only", nargs="+", default=list(CONFIGURATIONS), metavar="NAME")
    parser.add_argument("--json", type=output_file, metavar="FILE")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    device = str(options.device)
    if options.child:
        print(json.dumps(measure_memory(*options.only, device)))
        return
    print(HEAD, flush=True)
    plans = compare(options.only, device)
    if options.json:
        document = {"where": describe(torch.device(device)), "plans": plans}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
