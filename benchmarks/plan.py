"""What `--plan` predicts beside what then happens: `python -m benchmarks.plan`.

Each configuration runs in two processes of its own. One trains (`python -m kronsae.train`, with an
evaluation and a checkpoint) and notes by how much its resident memory rose above what it was with
everything imported. The other, in rounds, asks the plan for the time a token and then trains, so
that whatever else the machine does meets both alike; medians are compared.

Whether latents are dead decides whether there is an auxiliary loss, and a plan does not foresee it:
it gives the time without, and with as many dead as that loss takes. Both are measured, the second
by declaring so many dead before every fourth step, which is then left out of the first.

Times are the processor's own (`--clock wall` for the wall clock), with one thread: right also on a
machine that others use.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.flags import output_file, positive, usable_device
from benchmarks.measure import describe, synchronize
from kronsae.config import RunConfig
from kronsae.plan.memory import make_plan, predict_time
from kronsae.plan.outline import outline
from kronsae.plan.time import kill
from kronsae.system.devices import resolve_device
from kronsae.training.learner import Learner
from kronsae.training.options import build
from kronsae.training.stream import Stream

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
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}


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


def measure_time(name: str, device: str, clock: str, rounds: int) -> dict[str, Any]:
    """Microseconds a token: planned and measured, in turns.

    The first batches are learned from before: until they are, a few tokens may have most latents.
    """
    from kronsae.sources import open_activations

    torch.set_num_threads(1)
    config = run_config(name, device)
    where, data, train = resolve_device(device), config.data, config.train
    model = outline(data)
    config = build({**COMMON, **CONFIGURATIONS[name], "device": device, "d_model": model.d_model})
    plan = make_plan({name: config}, model)
    source = open_activations(data, batch_size=train.batch_size, seed=0, device=where)
    stream = Stream(source, 10**15, where)
    # No latent dies but by `kill`.
    learner = Learner(config.sae, dataclasses.replace(train, dead_after_tokens=2**60), where)
    learner.step(*stream.next())
    while stream.pending:  # batches that the normaliser has read already
        learner.step(*stream.next())
    steps = source.buffer.served_at_once // train.batch_size  # from one fill to the next
    now = CLOCKS[clock]
    predictions, planned, measured = [], [], []
    for _ in range(rounds):
        predictions.append(predict_time(plan, {name: config}, model, now))
        reading, learning, reviving = 0.0, [], []
        for number in range(steps):
            began = now()
            batch = stream.next()
            synchronize(where)
            reading += now() - began
            dead = number % 4 == 3
            learner.tokens_since_fired.zero_()
            if dead:
                kill(learner)
            began = now()
            learner.step(*batch)
            synchronize(where)
            (reviving if dead else learning).append(now() - began)
        of_step = 1e6 / train.batch_size
        reading *= of_step / steps
        learning, reviving = (of_step * statistics.mean(each) for each in (learning, reviving))
        measured.append(
            {
                "reading": reading,
                "learning": learning,
                "reviving": reviving,
                "total": reading + learning,
                "reviving_total": reading + reviving,
            }
        )
    for one in predictions:
        parts = one["us_per_token"]
        planned.append(
            {
                "reading": parts["text"] + parts["language model"] + parts["buffer"],
                "learning": parts[name],
                "reviving": one["reviving_us_per_token"][name],
                "total": one["us_per_token_all"],
                "reviving_total": one["reviving_us_per_token_all"],
            }
        )
    return {
        "planned": {**_medians(planned), "bottleneck": predictions[-1]["bottleneck"]},
        "measured": _medians(measured),
    }


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}


def compare(names: list[str], device: str, clock: str, rounds: int) -> list[dict[str, Any]]:
    """Plan and measurement of each configuration, each in processes of their own."""
    found = []
    for name in names:
        memory, times = (_child(part, name, device, clock, rounds) for part in ("memory", "time"))
        found.append({"name": name, "settings": CONFIGURATIONS[name], "memory": memory, **times})
        print(row(found[-1]), flush=True)
    return found


def _child(part: str, name: str, device: str, clock: str, rounds: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.plan", "--child", part, "--only", name]
    command += ["--device", device, "--clock", clock, "--rounds", str(rounds)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if clock == "cpu":  # its threads' waiting would count as work
        environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}, {part}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


HEAD = (
    "| | F, k, batch | memory, MiB: plan | measured | | µs a token: plan | measured | | "
    "latents dead: plan | measured | | bottleneck |\n"
    "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|"
)


def row(one: dict[str, Any]) -> str:
    settings, memory = one["settings"], one["memory"]
    planned, measured = one["planned"], one["measured"]
    sizes = ", ".join(f"{settings[key]:,}" for key in ("dict_size", "k", "batch_size"))
    pairs = [(memory["planned"], memory["measured"], ",.0f")]
    pairs += [(planned[key], measured[key], ",.1f") for key in ("total", "reviving_total")]
    cells = (f"{a:{form}} | {b:{form}} | {a / b - 1:+.0%}" for a, b, form in pairs)
    return f"| {one['name']} | {sizes} | {' | '.join(cells)} | {planned['bottleneck']} |"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("benchmarks.plan", description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=usable_device, default="auto")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default=None)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--only", nargs="+", default=list(CONFIGURATIONS), metavar="NAME")
    parser.add_argument("--json", type=output_file, metavar="FILE")
    parser.add_argument("--child", choices=("memory", "time"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    device = str(options.device)
    clock = options.clock or ("cpu" if device == "cpu" else "wall")
    if options.child:
        [name] = options.only
        if options.child == "memory":
            print(json.dumps(measure_memory(name, device)))
        else:
            print(json.dumps(measure_time(name, device, clock, options.rounds)))
        return
    print(HEAD, flush=True)
    found = compare(options.only, device, clock, options.rounds)
    if options.json:
        where = describe(torch.device(device))
        document = {"where": where, "clock": clock, "rounds": options.rounds, "plans": found}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
