"""Short runs of every kind, in forked processes of their own, and what they must leave.

A process is forked from one that has imported everything, so that a run takes seconds. Everything
is on the CPU, in one thread.
"""

import json
import os
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets  # noqa: F401  (these four: once here, and not in every process anew)
import safetensors.torch
import torch
import torch.distributed
import transformers
import transformers.models.gpt_neox.modeling_gpt_neox  # noqa: F401

import kronsae
import kronsae.properties.contexts  # noqa: F401
from benchmarks.faults.injections import Fault, wait
from kronsae import harvest, train
from kronsae.data.loading import load_tokenizer
from kronsae.system import checkpoint
from kronsae.system.files import LOCK_NAME

TRAIN = (
    *("--tokens", "2400", "--batch-size", "96", "--heads", "16", "--m", "2", "--n", "4"),
    *("--buffer-tokens", "600", "--log-every", "1", "--eval-every", "7"),
    *("--checkpoint-every", "3", "--no-memory-check", "--device", "cpu"),
)
READ = (
    *("--layer", "1", "--context-length", "32", "--contexts-per-batch", "6"),
    *("--heldout-tokens", "300"),
)


class Kind(NamedTuple):
    """A command that is run, by how many processes."""

    name: str
    main: Callable[[list[str]], int]
    flags: tuple[str, ...]
    compare: Callable[[Path], Any]
    """From its folder in the end, the contents that have to be equal bit for bit."""
    ranks: int = 1


class Ended(NamedTuple):
    """How a run ended, and everything it printed."""

    statuses: tuple[int, ...]
    """Exit statuses of all its processes."""
    text: str
    seconds: float
    """Processor time of the first process' main thread."""
    operations: int

    @property
    def status(self) -> int:
        """Exit status of its first process."""
        return self.statuses[0]


def make_inputs(folder: Path) -> dict[str, Path]:
    """A tiny language model with random weights, and some text."""
    drawn = random.Random(7)
    words = [f"{a}{b}" for a in ("get", "set", "run", "map", "sum") for b in "abcdefgh"]
    lines = []
    for i in range(160):
        body = " ".join(drawn.choices(words, k=drawn.randrange(5, 60)))
        lines.append(json.dumps({"text": f"def {words[i % 40]}_{i}(): return {body}"}) + "\n")
    text = folder / "text.jsonl"
    text.write_text("".join(lines))
    tokenizer = load_tokenizer("embedded", {})
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        **{"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64},
        **{"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64},
        **{"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id},
    )
    model = folder / "model"
    transformers.utils.logging.disable_progress_bar()
    transformers.GPTNeoXForCausalLM(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    return {"model": model, "text": text}


def kinds(inputs: dict[str, Path], cache: Path) -> dict[str, Kind]:
    """All kinds of runs, by name. cache: a folder of activations, harvested before."""
    text = ("--model", str(inputs["model"]), "--dataset", str(inputs["text"]), *READ)
    harvested = (*text, "--tokens", "2600", "--shard-tokens", "200", "--device", "cpu")
    live = (*text, *TRAIN, "--k", "4")
    cached = ("--activations", str(cache), *TRAIN, "--k", "4")
    shared = (*live, "--tensor-parallel", "2")
    all_kinds = [
        Kind("live", train.main, live, run_contents),
        Kind("streamed", train.main, (*live, "--streaming"), run_contents),
        Kind("sweep", train.main, (*live, "8"), sweep_contents),
        Kind("harvest", harvest.main, harvested, cache_contents),
        Kind("cache", train.main, cached, run_contents),
        Kind("2 ranks", train.main, live, run_contents, ranks=2),
        Kind("2 ranks, heads shared out", train.main, shared, run_contents, ranks=2),
    ]
    return {kind.name: kind for kind in all_kinds}


def execute(kind: Kind, arguments: Sequence[str], log: Path, fault: Fault) -> Ended:
    """Run a command in processes of its own; what it prints goes to `log`, in the end.

    Raises TimeoutError if it does not end in time.
    """
    if kind.ranks > 1:
        (log.parent / "store").unlink(missing_ok=True)
    counted = log.with_suffix(".count")
    counted.unlink(missing_ok=True)
    # Not a file: where no file may grow, a terminal could still be written to.
    reading, writing = os.pipe()
    pids = []
    for rank in range(kind.ranks):
        pid = os.fork()
        if pid == 0:
            _child(kind, arguments, writing, log.parent, rank, fault, counted)
        pids.append(pid)
    os.close(writing)
    printed: list[bytes] = []
    reader = threading.Thread(target=_read_all, args=(reading, printed))
    reader.start()
    statuses = wait(pids, fault)
    reader.join()
    text = b"".join(printed).decode(errors="replace")
    log.write_text(text)
    used, operations = json.loads(counted.read_text()) if counted.exists() else (0.0, 0)
    return Ended(statuses, text, used, operations)


def _read_all(pipe: int, into: list[bytes]) -> None:
    with open(pipe, "rb") as file:
        into.append(file.read())


def _child(
    kind: Kind,
    arguments: Sequence[str],
    output: int,
    meeting: Path,
    rank: int,
    fault: Fault,
    counted: Path,
) -> None:
    """The process that runs the command; never returns."""
    status, spots = 1, fault.spots if rank == 0 else None
    try:
        for stream in (1, 2):
            os.dup2(output, stream)
        sys.stdout = open(1, "w", buffering=1, closefd=False)
        sys.stderr = open(2, "w", buffering=1, closefd=False)
        if kind.ranks > 1:
            _join(rank, kind.ranks, meeting / "store")
        fault.prepare()
        if spots is not None:
            spots.install()
        status = kind.main(list(map(str, arguments)))
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        if spots is not None:
            counted.write_text(json.dumps([time.thread_time(), spots.count]))
        os._exit(status)


def _join(rank: int, ranks: int, store: Path) -> None:
    """Join the process group as under torchrun, but to meet at a file instead of a port."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks
    )


def first_or_resume(kind: Kind, out: Path) -> list[str]:
    """Arguments that begin a run in `out`, or go on with what is there."""
    index = {harvest.main: ("harvest.json",)}.get(kind.main, ("config.json", "sweep.json"))
    if any((out / name).exists() for name in index):
        return ["--resume", str(out)]
    return [*kind.flags, "--out", str(out)]


# What must be equal in the end

_CLOCKS = ("seconds", "tokens_per_s", "wait_share", "model_wait_share", "step_ms", "crc32")


def records(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock says."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in _CLOCKS} for x in lines]


def run_contents(run: Path) -> dict[str, Any]:
    """Contents of a run: all that it `learned`, and its log."""
    return {**learned(run), "metrics": records(run)}


def learned(run: Path) -> dict[str, Any]:
    """Weights, and the tensors of the last checkpoint: data, moments, random state."""
    last = checkpoint.list_checkpoints(run / "checkpoints")[-1]
    tensors = {path.name: path.read_bytes() for path in sorted(last.glob("*.safetensors"))}
    return {
        "weights": (run / "sae" / "sae.safetensors").read_bytes(),
        "checkpoint": (last.name, tensors),
    }


def sweep_contents(sweep: Path) -> dict[str, Any]:
    return {name: run_contents(sweep / name) for name in ("k4", "k8")}


def cache_contents(cache: Path) -> dict[str, bytes]:
    files = (path for path in cache.rglob("*") if path.is_file() and path.name != LOCK_NAME)
    return {str(path.relative_to(cache)): path.read_bytes() for path in files}


def strays(folder: Path) -> list[str]:
    """Temporary files that were left."""
    hidden = (path for path in folder.rglob(".*") if path.name != LOCK_NAME)
    return [str(path.relative_to(folder)) for path in hidden]


def damaged(folder: Path) -> list[str]:
    """Files that have their final name and are not whole. (Temporary names begin with a dot.)"""
    problems = []
    for path in folder.rglob("*"):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        try:
            if path.name.startswith("step-"):
                checkpoint.load_state(path)
            elif path.name == "sae.safetensors":
                kronsae.load(path.parent)
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".safetensors":
                with safetensors.safe_open(path, "pt") as file:
                    for name in file.keys():
                        file.get_tensor(name)
        except Exception as error:
            problems.append(f"{path}: {type(error).__name__}: {error}")
    return problems
