"""How much of the language model's rate training keeps: `python -m benchmarks.overlap`.

One run measures, in interleaved rounds on the same language model: its forward passes alone, the
autoencoder's steps alone on ready batches, and training, in turns and with the language model in a
thread beside it (`--overlap on`). On a CPU also with the cores split between the two.

If neither disturbed the other, training beside it would take the longer of the two times a token,
in turns their sum. Where both want the same cores, or the same GPU, no order of the work can be
faster than the work: what overlap then wins is only what one of them leaves unused.

Times are of the wall clock. CPU seconds a token are listed beside them: other work on the machine
disturbs them less. `--model` also takes the name of one of MODELS: random weights in its shape,
which take as long, and need no download.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.flags import output_file, positive, positive_seconds, usable_device
from benchmarks.measure import describe, synchronize
from kronsae.config import DataConfig, SAEConfig, TrainConfig
from kronsae.data import LanguageModel, LanguageModelActivations
from kronsae.data.language_model import lists_of_blocks
from kronsae.data.text import IndexedText
from kronsae.system.devices import resolve_device
from kronsae.training.learner import Learner
from kronsae.training.stream import Stream

LETTERS = "etaoinshrdlu"
MODELS: dict[str, dict[str, Any]] = {
    "pythia-160m": {
        "model_type": "gpt_neox", "hidden_size": 768, "num_hidden_layers": 12,
        "num_attention_heads": 12, "intermediate_size": 3072, "vocab_size": 50304,
    },
    "qwen2.5-1.5b": {
        "model_type": "qwen2", "hidden_size": 1536, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "intermediate_size": 8960,
        "vocab_size": 151936, "tie_word_embeddings": True,
    },
}  # fmt: skip
"""Configurations of transformers."""


def random_model(
    name: str, layer: int | None, dtype: torch.dtype, device: torch.device
) -> LanguageModel:
    """A model in one of MODELS, with the embedded model's tokenizer, read after a middle block."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**MODELS[name])
    with device:
        model = AutoModelForCausalLM.from_config(config).to(dtype)
    tokenizer = LanguageModel.load("embedded").tokenizer
    block = config.num_hidden_layers // 2 if layer is None else layer
    blocks, _ = lists_of_blocks(model)[0]
    return LanguageModel(model, tokenizer, f"{blocks}.{block}", name=name)


def text(seed: int = 0) -> IndexedText:
    """Documents without end, which take no time to read: what is measured is not tokenisation."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(LETTERS), (64, 2000, 5), generator=generator).tolist()
    documents = [" ".join("".join(LETTERS[i] for i in w) for w in words) for words in drawn]
    return IndexedText(documents, None, seed=seed, epochs=10**9, fingerprint="", name="letters")


def open_source(
    model: LanguageModel, data: DataConfig, batch: int, overlap: str, device: torch.device
) -> LanguageModelActivations:
    data = DataConfig(**{**vars(data), "overlap": overlap})
    source = LanguageModelActivations(model, text(), data, batch, 0, device)
    # The same few texts come again and again: a fast model would wait for their tokenisation.
    source.packer._tokens = functools.lru_cache(4096)(source.packer._tokens)
    return source


def read(source: LanguageModelActivations) -> Iterator[int]:
    """The language model alone, with packing and masks: rows of each forward pass."""
    for done in source._passes():
        yield done.rows.shape[0]


def learn(learner: Learner, batches: list[Tensor]) -> Iterator[int]:
    """The autoencoder alone, on ready batches: tokens of each step."""
    while True:
        for x in batches:
            learner.step(x)
            yield x.shape[0]


def train(learner: Learner, stream: Stream) -> Iterator[int]:
    """Both, as `fit` runs them: tokens of each step."""
    while True:
        x, _ = stream.next()
        learner.step(x)
        yield x.shape[0]


def measure(work: Iterator[int], tokens: int, device: torch.device) -> dict[str, float]:
    """Seconds, and CPU seconds, a token."""
    began, cpu, done = time.perf_counter(), time.process_time(), 0
    while done < tokens:
        done += next(work)
    synchronize(device)
    return {
        "seconds": (time.perf_counter() - began) / done,
        "cpu_seconds": (time.process_time() - cpu) / done,
    }


def compare(
    model: LanguageModel,
    data: DataConfig,
    sae: SAEConfig,
    options: TrainConfig,
    rounds: int,
    device: torch.device,
    seconds: float,
) -> dict[str, Any]:
    """Medians over rounds of each contender's times a token, and who waited for whom."""
    batch = options.batch_size
    fill = max(2 * batch, data.buffer_tokens)
    # A cycle of the buffer: it serves half of itself, and fills up again.
    tokens = fill // 2 // batch * batch
    learner = Learner(sae, options, device)
    sources = {name: open_source(model, data, batch, name, device) for name in ("on", "off")}
    streams = {name: Stream(source, 10**15, device) for name, source in sources.items()}
    ready = [streams["off"].next()[0] for _ in range(4)]
    for stream in streams.values():
        stream.next()
        while stream.pending:  # batches that the normaliser has read already
            stream.next()
        stream.close()
        stream.batches = None
    threads = torch.get_num_threads()
    alone: dict[str, Callable[[], Iterator[int]]] = {
        "language model": lambda: read(open_source(model, data, batch, "off", device)),
        "autoencoder": lambda: learn(learner, ready),
    }
    together = {"in turns": "off", "beside": "on"}
    if device.type == "cpu" and model.device.type == "cpu" and threads > 1:
        together["beside, cores split"] = "on"
    found: dict[str, list[dict[str, float]]] = {name: [] for name in (*alone, *together)}
    end = time.monotonic() + seconds
    for number in range(rounds + 1):
        for name in found:
            split = name.endswith("split")
            if split:
                torch.set_num_threads(threads // 2)  # also of threads that begin from now on
            if name in alone:
                work, stream = alone[name](), None
            else:
                stream = streams[together[name]]
                work = train(learner, stream)
                next(work)  # the buffer is full, the thread has begun
            if stream is not None:
                for _ in range(tokens // batch):  # until the thread is as far ahead as it gets
                    next(work)
                stream.rates()
            times = measure(work, tokens, device)
            if stream is not None:
                times |= {k: v for k, v in stream.rates().items() if k.endswith("wait_share")}
                stream.close()  # nothing runs beside the next one
                stream.batches = None
            torch.set_num_threads(threads)
            if number:  # the first round warms up
                found[name].append(times)
        if time.monotonic() > end and number >= 2:
            break
    medians = {
        name: {key: statistics.median(one[key] for one in each) for key in each[0]}
        for name, each in found.items()
    }
    a, b = (medians[name]["seconds"] for name in alone)
    return {
        "tokens_a_round": tokens,
        "rounds": len(found["beside"]),
        "medians": medians,
        "of_the_model_alone": {
            name: statistics.median(
                reference["seconds"] / one["seconds"]
                for reference, one in zip(found["language model"], found[name], strict=True)
            )
            for name in together
        },
        "bounds": {"in turns": a / (a + b), "beside, undisturbed": a / max(a, b)},
    }


def table(found: dict[str, Any]) -> str:
    """Markdown: tokens a second, shares of the language model alone, and waits."""
    lines = [
        "| | tokens/s | of the language model alone | CPU µs a token | waited for activations | "
        "model waited |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, times in found["medians"].items():
        share = found["of_the_model_alone"].get(name)
        waits = [times.get(key) for key in ("wait_share", "model_wait_share")]
        cells = [f"{x:.0%}" if x is not None else "" for x in (share, *waits)]
        lines.append(
            f"| {name} | {1 / times['seconds']:,.0f} | {cells[0]} | "
            f"{1e6 * times['cpu_seconds']:.1f} | {cells[1]} | {cells[2]} |"
        )
    bounds = ", ".join(f"{name} {share:.0%}" for name, share in found["bounds"].items())
    return "\n".join([*lines, "", f"From the two alone: {bounds} of the language model."])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("benchmarks.overlap", description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=usable_device, default="auto")
    parser.add_argument(
        "--model", default="embedded", help="ours, or one of MODELS, or with --layer N"
    )
    parser.add_argument("--layer", type=int, default=None)
    parser.add_argument("--model-device", default=None, help="as of python -m kronsae.train")
    parser.add_argument("--dict-size", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--context-length", type=int, default=256)
    parser.add_argument("--contexts-per-batch", type=int, default=16)
    parser.add_argument("--buffer-tokens", type=int, default=16_384)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument(
        "--seconds", type=positive_seconds, default=120, help="no new round after these"
    )
    parser.add_argument("--json", type=output_file, metavar="FILE")
    options = parser.parse_args(arguments)
    device = options.device
    model_device = resolve_device(options.model_device or str(device))
    dtype = torch.bfloat16 if model_device.type == "cuda" else torch.float32
    if options.model in MODELS:
        model = random_model(options.model, options.layer, dtype, model_device)
    else:
        model = LanguageModel.load(
            options.model, layer=options.layer, dtype=dtype, device=model_device
        )
    data = DataConfig(
        dataset="letters",
        context_length=options.context_length,
        contexts_per_batch=options.contexts_per_batch,
        buffer_tokens=options.buffer_tokens,
        heldout_tokens=options.context_length,
    )
    sae = SAEConfig(d_model=model.d_model, dict_size=options.dict_size, m=4, n=4, k=options.k)
    train_config = TrainConfig(
        tokens=10**9, batch_size=options.batch_size, device=str(device), warmup_fraction=0.0
    )
    found = compare(model, data, sae, train_config, options.rounds, device, options.seconds)
    settings = {
        name: str(value) if isinstance(value, (Path, torch.device)) else value
        for name, value in vars(options).items()
    }
    found = {"where": describe(device), "settings": settings, **found}
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
