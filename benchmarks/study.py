"""SAEs of a real language model side by side, in all figures: `python -m benchmarks.study`.

It harvests activations, trains all SAEs of `kronsae experiments comparison` (a process a layer, a
thread each), evaluates them on held-out text, and writes the tables of a page. The commands that it
runs are printed, after an estimate of the hours. The same command goes on where it was stopped.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from kronsae.config import TrainConfig
from kronsae.experiments.comparison import Comparison
from kronsae.experiments.isoflop import BASELINE
from kronsae.experiments.report import Spread, grouped
from kronsae.system.files import write_text
from kronsae.system.tables import markdown
from kronsae.training.learner import Learner

VARIANTS = [
    *("topk", "topk-half", "topk-mixed", "m2n4", "m4n4", "m4n8"),
    *("batchtopk", "batchtopk-half", "batchtopk-mixed", "batchtopk-m4n4"),
    *("matryoshka", "matryoshka-m4n4", "topk-refined", "m4n4-refined"),
    *("batchtopk-refined", "batchtopk-m4n4-refined"),
]
FIGURES = {
    "l0": ("L0", 1),
    "explained_variance": ("explained variance", 4),
    "ce_recovered": ("CE recovered", 4),
    "kl_spliced": ("KL divergence", 3),
    "dead_share": ("dead latents", 3),
    "absorbed_share": ("absorption", 3),
    "fully_absorbed_share": ("full absorption", 3),
    "class_accuracy_1": ("class by 1 latent", 3),
    "class_accuracy_5": ("class by 5", 3),
}
"""Figures in the table: heading, and digits. Those that the training has are of more tokens, and
replace the evaluation's."""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "benchmarks.study",
        description=str(__doc__).splitlines()[0],
        epilog="The same command goes on where it was stopped.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    given = parser.add_argument
    given("--model", required=True, help="language model: hub name or folder")
    given("--dataset", required=True, help="hub name, or files")
    given("--bos", default="auto", help="how contexts begin, as for kronsae harvest")
    given("--layer", type=int, nargs="+", required=True, help="residual streams, from 0")
    given("--context-length", type=int, default=256, help="tokens of a context")
    given("--dict-size", type=int, default=8192, help="latents")
    given("--k", type=int, default=32, help="active latents a token")
    given("--tokens", type=int, default=500_000, help="tokens to train each SAE on")
    rates = [0.002, 0.004, 0.008, 0.016]
    given("--learning-rates", type=float, nargs="+", default=rates, help="to choose from")
    given("--seeds", type=int, default=3, help="trainings of each SAE")
    given("--variants", nargs="+", default=VARIANTS, help="SAEs to train")
    given("--heldout-tokens", type=int, default=8192, help="tokens for CE and KL divergence")
    given("--probe", metavar="COLUMN", help="column of the text's class, for sparse probing")
    given("--out", type=Path, required=True, help="folder")
    given("--plan", action="store_true", help="print hours and commands, and stop")
    return parser


def comparison(options: argparse.Namespace, layer: int) -> Comparison:
    """The experiment of a layer."""
    shared = ("dict_size", "k", "tokens", "seeds")
    return Comparison(
        layer=(layer,),
        learning_rates=tuple(options.learning_rates),
        variants=tuple(options.variants),
        **{name: getattr(options, name) for name in shared},
    )


def commands(options: argparse.Namespace, d_model: int) -> list[list[list[str]]]:
    """Commands, those of a stage in a list: to harvest; to train, one a layer; to evaluate."""
    out, layers = options.out, list(map(str, options.layer))
    harvested = comparison(options, options.layer[0]).longest(d_model)
    harvest = ["harvest", "--model", options.model, "--dataset", options.dataset]
    harvest += ["--layer", *layers, "--tokens", str(harvested), "--bos", options.bos]
    harvest += ["--context-length", str(options.context_length), "--out", f"{out}/cache"]
    shared = ["--dict-size", str(options.dict_size), "--k", str(options.k)]
    shared += ["--tokens", str(options.tokens)]
    shared += ["--learning-rates", *map(str, options.learning_rates)]
    shared += ["--seeds", str(options.seeds), "--variants", *options.variants]
    train = [
        ["experiments", "comparison", "--cache", f"{out}/cache", "--layer", layer, *shared]
        + ["--saes", f"{out}/saes", "--out", f"{out}/layer{layer}"]
        for layer in layers
    ]
    probe = [] if options.probe is None else ["--probe", options.probe]
    evaluate = [
        ["evaluate", *sorted(map(str, (out / "saes").glob(f"layer{layer}-*")))]
        + ["--heldout-tokens", str(options.heldout_tokens), "--absorption", *probe]
        + ["--out", f"{out}/evaluation-{layer}"]
        for layer in layers
    ]
    return [[harvest], train, evaluate]


def hours(options: argparse.Namespace, d_model: int) -> float:
    """Hours of all trainings, if each has a thread of its own: from steps timed here."""
    experiment, seconds = comparison(options, options.layer[0]), 0.0
    rates = len(options.learning_rates)
    trainings = options.seeds + (rates if rates > 1 else 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x = torch.randn(experiment.batch_size, d_model)
    for row in experiment.rows():
        config = experiment.sae(row).with_widths(d_model, 0)
        train = TrainConfig(batch_size=len(x), device="cpu")
        learner, times = Learner(config, train, torch.device("cpu")), []
        for _ in range(4):
            began = time.perf_counter()
            learner.step(x)
            times.append(time.perf_counter() - began)
        tokens = trainings * experiment.tokens_of(row, d_model)
        seconds += tokens / len(x) * min(times[1:])
    torch.set_num_threads(threads)
    return seconds * len(options.layer) / 3600


def run(stage: Iterable[list[str]], threads: int) -> None:
    """Run commands side by side; exits with the status of one that fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    started = [
        subprocess.Popen([sys.executable, "-m", f"kronsae.{name}", *rest], env=environment)
        for name, *rest in stage
    ]
    statuses = [process.wait() for process in started]
    if any(statuses):
        sys.exit(max(statuses))


def tables(options: argparse.Namespace) -> str:
    """Markdown of all figures of all SAEs, a table each layer and budget: means and deviations over
    the seeds."""
    header = ["SAE", "tokens", f"FLOPs, of {BASELINE}'s", *(name for name, _ in FIGURES.values())]
    parts = []
    for layer in options.layer:
        runs = json.loads((options.out / f"layer{layer}" / "comparison.json").read_text())["runs"]
        evaluation = options.out / f"evaluation-{layer}" / "evaluation.json"
        metrics = {e["name"]: e["metrics"] for e in json.loads(evaluation.read_text())["judged"]}
        trained = [one for one in runs if one.get("sae") in metrics]
        for (equal,), of_budget in grouped(trained, "equal").items():
            rows: list[list[Any]] = []
            for (variant,), group in grouped(of_budget, "variant").items():
                measured = [metrics[one["sae"]] | one for one in group]
                figures = [
                    Spread.of(of_one[name] for of_one in measured).to(digits)
                    if all(name in of_one for of_one in measured)
                    else ""
                    for name, (_, digits) in FIGURES.items()
                ]
                share = f"{group[0]['flops_share']:.2f}"
                rows.append([variant, f"{group[0]['tokens']:,}", share, *figures])
            parts.append(f"### Layer {layer}, at equal {equal}\n\n{markdown(header, rows)}")
    return "\n\n".join(parts)


def main(arguments: list[str] | None = None) -> None:
    from transformers import AutoConfig

    options = make_parser().parse_args(arguments)
    d_model = AutoConfig.from_pretrained(options.model).hidden_size
    print("timing a step of each SAE", flush=True)
    print(f"about {hours(options, d_model):.1f} hours of a thread to train", flush=True)
    if options.plan:
        for stage in commands(options, d_model):
            print("\n".join(shlex.join(["kronsae", *command]) for command in stage))
        return
    for number in range(3):
        stage = commands(options, d_model)[number]
        if number == 2:
            stage = [c for c in stage if not Path(c[-1], "evaluation.json").exists()]
        run(stage, threads=1 if number == 1 else torch.get_num_threads())
    write_text(options.out / "study.md", tables(options))
    print(tables(options))


if __name__ == "__main__":
    main()
