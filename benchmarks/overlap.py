"""How much of the language model's rate training keeps: `python -m benchmarks.overlap`.

One run measures, in interleaved rounds on the same language model: its forward passes alone, the
autoencoder's steps alone on ready batches, and training, in turns and with the language model in a
thread beside it (`--overlap on`).

If neither disturbed the other, training beside it would take the longer of the two times a token,
in turns their sum. Where both want the same cores, or the same GPU, no order of the work can be
faster than the work: what overlap then wins is only what one of them leaves unused.

Times are of the wall clock. CPU seconds a token are listed beside them: other work on the machine
disturbs them less. `--model` takes the embedded one, or one of MODELS: random weights in its shape,
which take as long, and need no download.
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.flags import command, save
from benchmarks.measure import describe, spent, synchronize
from benchmarks.report import overlap_table
from kronsae.config import DataConfig, SAEConfig, TrainConfig
from kronsae.data import LanguageModel, LanguageModelActivations
from kronsae.data.language_model import lists_of_blocks
from kronsae.data.text import IndexedText
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


class Sizes(NamedTuple):
    """Sizes of the autoencoder, and of what it reads."""

    dict_size: int
    k: int
    batch_size: int
    context_length: int
    contexts_per_batch: int
    buffer_tokens: int


EMBEDDED = Sizes(4096, 32, 1024, 256, 16, 8192)
LARGE = Sizes(65_536, 50, 8192, 256, 128, 131_072)
"""Sizes for MODELS."""
SMALLEST = Sizes(256, 4, 128, 32, 4, 512)


def open_model(name: str, layer: int | None, device: torch.device) -> LanguageModel:
    """The embedded model; or one of MODELS, with its tokenizer. Read after a middle block."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    embedded = LanguageModel.load("embedded", layer=layer, dtype=dtype, device=device)
    if name == "embedded":
        return embedded
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**MODELS[name])
    with device:
        model = AutoModelForCausalLM.from_config(config).to(dtype)
    block = config.num_hidden_layers // 2 if layer is None else layer
    blocks, _ = lists_of_blocks(model)[0]
    return LanguageModel(model, embedded.tokenizer, f"{blocks}.{block}", name=name)


def text(seed: int = 0) -> IndexedText:
    """Documents without end, which take no time to read: what is measured is not tokenisation."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(LETTERS), (64, 2000, 5), generator=generator).tolist()
    documents = [" ".join("".join(LETTERS[i] for i in w) for w in words) for words in drawn]
    return IndexedText(documents, None, seed=seed, epochs=10**9, fingerprint="", name="letters")


def open_source(
    model: LanguageModel, sizes: Sizes, device: torch.device, overlap: str
) -> LanguageModelActivations:
    data = DataConfig(
        dataset="letters",
        context_length=sizes.context_length,
        contexts_per_batch=sizes.contexts_per_batch,
        buffer_tokens=sizes.buffer_tokens,
        heldout_tokens=sizes.context_length,
        overlap=overlap,
    )
    source = LanguageModelActivations(model, text(), data, sizes.batch_size, 0, device)
    # The same few texts come again and again: a fast model would wait for their tokenisation.
    source.packer._tokens = functools.lru_cache(4096)(source.packer._tokens)
    return source


def read(source: LanguageModelActivations) -> Iterator[int]:
    """The language model alone, with packing and masks: rows of each forward pass."""
    for done in source._passes():
        yield len(done.rows[0])


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
    learner: Learner, stream: Stream, tokens: int, device: torch.device
) -> dict[str, float]:
    """`measure` of training, once the thread is as far ahead as it gets; and who waited."""
    work, done = train(learner, stream), 0
    while done <= tokens:
        done += next(work)
    stream.rates()
    times = measure(work, tokens, device)
    times |= {name: x for name, x in stream.rates().items() if name.endswith("wait_share")}
    stop(stream)
    return times


def stop(stream: Stream) -> None:
    """Close a stream, so that nothing runs beside the next one."""
    stream.close()
    stream.batches = None


def contenders(
    model: LanguageModel, sizes: Sizes, tokens: int, device: torch.device
) -> dict[str, Callable[[], dict[str, float]]]:
    """Calls that measure, by name; the first two are the parts alone."""
    opened = partial(open_source, model, sizes, device)
    sae = SAEConfig(d_model=model.d_model, dict_size=sizes.dict_size, m=4, n=4, k=sizes.k)
    config = TrainConfig(
        tokens=10**9, batch_size=sizes.batch_size, device=str(device), warmup_fraction=0.0
    )
    learner = Learner(sae, config, device)
    turns, beside = (Stream(opened(overlap), 10**15, device) for overlap in ("off", "on"))
    ready = [turns.next()[0] for _ in range(4)]
    for stream in (turns, beside):
        stream.next()
        while stream.pending:  # batches that the normaliser has read already
            stream.next()
        stop(stream)
    both = partial(measure_both, learner, tokens=tokens, device=device)
    return {
        "language model": lambda: measure(read(opened("off")), tokens, device),
        "autoencoder": lambda: measure(learn(learner, ready), tokens, device),
        "in turns": partial(both, turns),
        "beside": partial(both, beside),
    }


def compare(
    model: LanguageModel, sizes: Sizes, rounds: int, device: torch.device, seconds: float
) -> dict[str, Any]:
    """Medians over rounds of each contender's times a token, and who waited for whom."""
    # A cycle of the buffer: it serves half of itself, and fills up again.
    batch = sizes.batch_size
    tokens = max(2 * batch, sizes.buffer_tokens) // 2 // batch * batch
    calls = contenders(model, sizes, tokens, device)
    timings: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
    end = time.monotonic() + seconds
    for number in range(rounds + 1):
        for name, call in calls.items():
            times = call()
            if number:  # the first round warms up
                timings[name].append(times)
        if time.monotonic() > end and number >= 2:
            break
    medians = {
        name: {key: statistics.median(one[key] for one in times) for key in times[0]}
        for name, times in timings.items()
    }
    a, b, *_ = (times["seconds"] for times in medians.values())
    return {
        "tokens_a_round": tokens,
        "rounds": len(timings["beside"]),
        "medians": medians,
        "of_the_model_alone": {
            name: a / medians[name]["seconds"] for name in ("in turns", "beside")
        },
        "bounds": {"in turns": a / (a + b), "beside, undisturbed": a / max(a, b)},
    }


def main(arguments: list[str] | None = None) -> None:
    parser = command("overlap", __doc__, device="auto", rounds=5, seconds=120.0)
    parser.add_argument("--model", default="embedded", choices=("embedded", *MODELS))
    parser.add_argument("--smallest", action="store_true", help="a small autoencoder, one block")
    options = parser.parse_args(arguments)
    device = options.device
    sizes = EMBEDDED if options.model == "embedded" else LARGE
    if options.smallest:
        sizes = SMALLEST
    model = open_model(options.model, 0 if options.smallest else None, device)
    result = compare(model, sizes, options.rounds, device, options.seconds)
    result = {"where": describe(device), "model": options.model, **sizes._asdict(), **result}
    save(options.json, result)
    print(overlap_table(result))


if __name__ == "__main__":
    main()
