"""A suite in one pass of the language model, against its parts: `python -m benchmarks.suite`.

A TopK SAE and a KronSAE at each of several layers learn from one stream. Timed in turn: the suite;
the language model alone, up to the last of these layers, as many forward passes on the same text;
and the optimizer steps of all members alone, on activations that are there. The suite's time over
the sum of the two is what shuffling, normalising and copying cost. Evaluations, logs and
checkpoints are off.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.flags import command, positive, save
from benchmarks.measure import describe, spent
from kronsae import SAEConfig, TrainConfig
from kronsae.config import DataConfig
from kronsae.data.activations import HookpointActivations
from kronsae.data.language_model import LanguageModel
from kronsae.sources import open_hookpoints
from kronsae.system.tables import markdown
from kronsae.training.fit import fit_many
from kronsae.training.learner import Learner
from kronsae.training.stream import Stream

GOAL = 1.1


class Case:
    """The members, their settings, and the activations that they read."""

    def __init__(self, options: Any) -> None:
        self.layers = options.layer
        self.saes = {
            "topk": SAEConfig(encoder="dense", dict_size=options.dict_size, k=options.k),
            "kron": SAEConfig(dict_size=options.dict_size, m=4, n=4, k=options.k),
        }
        batch = options.batch_size
        self.train = TrainConfig(
            tokens=options.tokens, batch_size=batch, log_every=10**6, checkpoint_every=0
        )
        data = DataConfig(
            model=options.model,
            dataset=options.dataset,
            layer=0,
            context_length=options.context_length,
            contexts_per_batch=8,
            buffer_tokens=4 * batch,
            heldout_tokens=options.context_length,
            overlap="off",
        )
        self.data = {f"layer{n}": replace(data, layer=n) for n in self.layers}

    def sources(self) -> dict[str, HookpointActivations]:
        return open_hookpoints(
            self.data, batch_size=self.train.batch_size, seed=0, device=torch.device("cpu")
        )

    def suite(self, sources: dict[str, HookpointActivations]) -> None:
        """Train all members."""
        at = [hookpoint for hookpoint in sources for _ in self.saes]
        fit_many(list(self.saes.values()) * len(sources), sources, self.train, hookpoints=at)

    def passes(self, sources: dict[str, HookpointActivations]) -> list[torch.Tensor]:
        """Contexts of as many forward passes as the suite made."""
        made = next(iter(sources.values())).reader.forwards
        again = next(iter(self.sources().values())).reader
        return [ids for ids in (again.next_contexts() for _ in range(made)) if ids is not None]

    def model_alone(self, model: LanguageModel, passes: list[torch.Tensor]) -> None:
        for ids in passes:
            model.activations(ids)

    def batches(self) -> dict[str, list[torch.Tensor]]:
        """All batches of each hookpoint, normalised as in training."""
        device, tokens = torch.device("cpu"), self.train.tokens
        streams = {name: Stream(source, tokens, device) for name, source in self.sources().items()}
        found: dict[str, list[torch.Tensor]] = {name: [] for name in streams}
        for _ in range(self.train.steps):
            for name, stream in streams.items():
                found[name].append(stream.next()[0])
        return found

    def learners(self, width: int) -> dict[str, list[Learner]]:
        """A learner of each member, by hookpoint."""
        return {
            name: [
                Learner(sae.with_widths(width, 0), self.train, torch.device("cpu"))
                for sae in self.saes.values()
            ]
            for name in self.data
        }

    def steps_alone(
        self, learners: dict[str, list[Learner]], batches: dict[str, list[torch.Tensor]]
    ) -> None:
        for step in range(self.train.steps):
            for name, members in learners.items():
                for learner in members:
                    learner.step(batches[name][step], None)
                    learner.optimizer.zero_grad(set_to_none=True)


def measure(options: Any) -> dict[str, Any]:
    """Seconds of the suite and of its parts, and counts of forward passes."""
    case = Case(options)
    count = [0]
    run = LanguageModel._run

    def counted(*given: Any) -> Any:
        count[0] += 1
        return run(*given)

    rounds = []
    for _ in range(options.rounds):
        sources = case.sources()
        model = next(iter(sources.values())).reader.language_model.points[-1]
        LanguageModel._run, count[0] = counted, 0  # type: ignore[method-assign]
        _, suite = spent(partial(case.suite, sources))
        LanguageModel._run = run  # type: ignore[method-assign]
        runs = count[0]
        passes = case.passes(sources)
        _, reading = spent(partial(case.model_alone, model, passes))
        given = case.learners(model.d_model), case.batches()
        _, steps = spent(partial(case.steps_alone, *given))
        rounds.append(
            {
                "suite": suite,
                "language model alone": reading,
                "all steps alone": steps,
                "forward passes": runs,
                "batches of text": len(passes),
                "ratio": {
                    clock: suite[clock] / (reading[clock] + steps[clock])
                    for clock in ("wall", "cpu")
                },
            }
        )
    return {"members": len(case.layers) * len(case.saes), "rounds": rounds}


def table(rounds: list[dict[str, Any]]) -> str:
    """The rounds as a Markdown table."""
    head = [
        "round",
        "suite",
        "language model alone",
        "all steps alone",
        "ratio, wall",
        "ratio, CPU",
    ]
    head += ["forward passes", "batches of text"]
    rows = [
        [
            str(number),
            *(f"{each[name]['wall']:.1f} s" for name in head[1:4]),
            *(f"{each['ratio'][clock]:.3f}" for clock in ("wall", "cpu")),
            *(str(each[name]) for name in head[6:]),
        ]
        for number, each in enumerate(rounds, 1)
    ]
    return markdown(head, rows)


def main(argv: list[str] | None = None) -> int:
    parser = command("suite", __doc__, rounds=3)
    parser.add_argument("--model", default="embedded", help="language model (default: embedded)")
    parser.add_argument("--dataset", default="stdlib", help="text (default: stdlib)")
    parser.add_argument(
        "--layer", nargs="+", type=int, default=[0, 1, 2, 3], help="(default: 0 1 2 3)"
    )
    for name, default in (
        ("tokens", 16_384),
        ("batch-size", 2048),
        ("context-length", 256),
        ("dict-size", 8192),
        ("k", 32),
    ):
        parser.add_argument(
            f"--{name}", type=positive, default=default, metavar="N", help=f"(default: {default})"
        )
    options = parser.parse_args(argv)
    figures = measure(options)
    print(table(figures["rounds"]))
    ratios = [each["ratio"]["wall"] for each in figures["rounds"]]
    print(f"\nLeast ratio on the wall: {min(ratios):.3f} (goal: at most {GOAL})")
    settings = {key: value for key, value in vars(options).items() if key != "json"}
    save(options.json, {**describe(torch.device("cpu")), "settings": settings, **figures})
    return 0 if min(ratios) <= GOAL else 1


if __name__ == "__main__":
    raise SystemExit(main())
