"""The memory that `--plan` predicts beside what then happens: `python -m benchmarks.plan`.

Each configuration trains in a process of its own (`kronsae train`, with an evaluation and a
checkpoint) and notes by how much its resident memory rose above what it was with everything
imported; on a GPU, what torch took of its memory.
"""

import contextlib
import io
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.flags import command, save
from benchmarks.measure import Apart, describe
from kronsae.plan.memory import make_plan
from kronsae.plan.outline import outline
from kronsae.system.tables import markdown
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


def resident(name: str) -> int:
    """Bytes of this process's memory: "VmRSS" now, "VmHWM" at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[name].split()[0]) * 1024


def flags(settings: dict[str, Any]) -> list[str]:
    return [part for k, v in settings.items() for part in ("--" + k.replace("_", "-"), str(v))]


def measure_memory(name: str, device: torch.device) -> dict[str, float]:
    """MiB planned, and by how much memory rose: the process's, or what torch took of a GPU's."""
    import datasets  # noqa: F401  (all that a run imports belongs to the baseline)
    import transformers  # noqa: F401

    from kronsae.train import main as train

    settings = COMMON | CONFIGURATIONS[name] | {"device": str(device)}
    model = outline(build(settings).data)
    config = build({**settings, "d_model": model.d_model})
    plan = make_plan({name: config}, model)
    tokens = COMMON["buffer_tokens"] + 4 * config.train.batch_size
    # Halfway, as BatchTopK's threshold follows the batches slowly, and until then much is active.
    half = max(1, tokens // config.train.batch_size // 2)
    settings |= {"tokens": tokens, "eval_every": half, "checkpoint_every": half}
    torch.randn(512, 512) @ torch.randn(512, 512)  # threads and their buffers
    before = resident("VmRSS")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        status = train([*flags(settings), "--out", str(Path(folder) / "run")])
    if status:
        raise RuntimeError(f"training ended with status {status}")
    rose = resident("VmHWM") - before
    if device.type == "cuda":
        rose = torch.cuda.max_memory_allocated(device)
    return {"planned": sum(plan["memory_mib"].values()), "measured": rose / 2**20}


def compare(names: list[str], device: torch.device) -> list[dict[str, Any]]:
    """Plan and measurement of each configuration, each in a process of its own."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    results = []
    for name in names:
        call = Apart()
        memory = call(measure_memory, name, device, seconds=3600)
        call.close()
        results.append({"name": name, "settings": CONFIGURATIONS[name], "memory": memory})
    return results


def table(results: list[dict[str, Any]]) -> str:
    rows = []
    for one in results:
        settings, planned, measured = one["settings"], *one["memory"].values()
        sizes = ", ".join(f"{settings[key]:,}" for key in ("dict_size", "k", "batch_size"))
        error = f"{planned / measured - 1:+.0%}"
        rows.append((one["name"], sizes, f"{planned:,.0f}", f"{measured:,.0f}", error))
    return markdown(("", "F, k, batch", "memory, MiB: plan", "measured", ""), rows)


def main(arguments: list[str] | None = None) -> None:
    parser = command("plan", __doc__, device="auto")
    parser.add_argument("--only", nargs="+", default=list(CONFIGURATIONS), choices=CONFIGURATIONS)
    options = parser.parse_args(arguments)
    plans = compare(options.only, options.device)
    print(table(plans))
    save(options.json, {"where": describe(options.device), "plans": plans})


if __name__ == "__main__":
    main()
