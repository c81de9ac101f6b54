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

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.flags import command, positive, save
from benchmarks.measure import describe, spent, synchronize
from benchmarks.report import overlap_table
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
    data = dataclasses.replace(data, overlap=overlap)
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

    def call() -> int:
        done = 0
        while done < tokens:
            done += next(work)
        synchronize(device)
        return done

    done, taken = spent(call)
    return {"seconds": taken["wall"] / done, "cpu_seconds": taken["cpu"] / done}


def measure_both(
    learner: Learner, stream: Stream, tokens: int, device: torch.device, threads: int
) -> dict[str, float]:
    """The same of training, once the thread is as far ahead as it gets; and who waited."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)  # also of threads that begin from now on
    work, done = train(learner, stream), 0
    while done <= tokens:
        done += next(work)
    stream.rates()
    times = measure(work, tokens, device)
    times |= {name: x for name, x in stream.rates().items() if name.endswith("wait_share")}
    stop(stream)
    torch.set_num_threads(before)
    return times


def stop(stream: Stream) -> None:
    """Nothing runs beside the next one."""
    stream.close()
    stream.batches = None


def contenders(
    model: LanguageModel,
    data: DataConfig,
    sae: SAEConfig,
    options: TrainConfig,
    tokens: int,
    device: torch.device,
) -> dict[str, Callable[[], dict[str, float]]]:
    """What is measured; the first two are the parts alone."""
    batch, threads = options.batch_size, torch.get_num_threads()
    opened = partial(open_source, model, data, batch, device=device)
    learner = Learner(sae, options, device)
    turns, beside = (Stream(opened(overlap=name), 10**15, device) for name in ("off", "on"))
    ready = [turns.next()[0] for _ in range(4)]
    for stream in (turns, beside):
        stream.next()
        while stream.pending:  # batches that the normaliser has read already
            stream.next()
        stop(stream)
    both = partial(measure_both, learner, tokens=tokens, device=device, threads=threads)
    found = {
        "language model": lambda: measure(read(opened(overlap="off")), tokens, device),
        "autoencoder": lambda: measure(learn(learner, ready), tokens, device),
        "in turns": partial(both, turns),
        "beside": partial(both, beside),
    }
    if device.type == "cpu" and model.device.type == "cpu" and threads > 1:
        found["beside, cores split"] = partial(both, beside, threads=threads // 2)
    return found


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
    # A cycle of the buffer: it serves half of itself, and fills up again.
    tokens = max(2 * batch, data.buffer_tokens) // 2 // batch * batch
    calls = contenders(model, data, sae, options, tokens, device)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
    end = time.monotonic() + seconds
    for number in range(rounds + 1):
        for name, call in calls.items():
            times = call()
            if number:  # the first round warms up
                found[name].append(times)
        if time.monotonic() > end and number >= 2:
            break
    medians = {
        name: {key: statistics.median(one[key] for one in each) for key in each[0]}
        for name, each in found.items()
    }
    model_alone, sae_alone, *together = found
    a, b = medians[model_alone]["seconds"], medians[sae_alone]["seconds"]
    return {
        "tokens_a_round": tokens,
        "rounds": len(found["beside"]),
        "medians": medians,
        "of_the_model_alone": {
            name: statistics.median(
                alone["seconds"] / one["seconds"]
                for alone, one in zip(found[model_alone], found[name], strict=True)
            )
            for name in together
        },
        "bounds": {"in turns": a / (a + b), "beside, undisturbed": a / max(a, b)},
    }


def main(arguments: list[str] | None = None) -> None:
    parser = command("overlap", __doc__, device="auto", rounds=5, seconds=120.0)
    parser.add_argument(
        "--model", default="embedded", help="ours, or one of MODELS, or with --layer N"
    )
    parser.add_argument("--layer", type=int, default=None)
    parser.add_argument("--model-device", default=None, help="as of python -m kronsae.train")
    sizes = {"dict-size": 4096, "k": 32, "batch-size": 1024, "context-length": 256}
    sizes |= {"contexts-per-batch": 16, "buffer-tokens": 16_384}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=positive, default=size)
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
    settings = {name: str(value) for name, value in vars(options).items()}
    found = {"where": describe(device), "settings": settings, **found}
    save(options.json, found)
    print(overlap_table(found))


if __name__ == "__main__":
    main()
