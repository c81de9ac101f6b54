"""What the experiments share: the grid of runs and its file, activations, training, tables."""

import dataclasses
import json
import math
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kronsae.config import DataConfig, SAEConfig, TrainConfig, setting
from kronsae.data import ActivationSource
from kronsae.errors import InputError
from kronsae.metrics.heldout import Heldout
from kronsae.sources import open_activations
from kronsae.system.devices import compute_dtype, resolve_device
from kronsae.system.files import write_json, write_text
from kronsae.training.fit import fit
from kronsae.training.session import FitResult
from kronsae_kernels import __version__

Run = dict[str, Any]
"""A cell of the grid with its figures."""

TUNING_SEED = 1000
"""Seed of the runs that choose a learning rate; their figures are not reported."""

FAMILIES: dict[str, dict[str, Any]] = {
    "topk": {},
    "matryoshka": {"objective": "matryoshka"},
    "switch": {"experts": 8},
    "jumprelu": {"selection": "jumprelu"},
}
"""SAEs that the paper gives a Kron encoder, and their settings. [KronSAE, App. A.1, A.6]"""


class Conclusion(NamedTuple):
    """What an experiment says in the end."""

    table: str
    """Markdown."""
    line: str
    """Ours beside the paper's, in a sentence or two."""


class Stopped(Exception):
    """A signal ended a training; what was finished before is in the file."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by signal {number}")
        self.number = number


# The grid


def run_grid(
    experiment: ModuleType,
    settings: Any,
    folder: Path,
    command: str,
    on_run: Callable[[Run, int, int], None],
) -> list[Run]:
    """Run every cell that `folder` does not have yet; its JSON file is whole after each.

    on_run: called with each new run, the cells done and the cells known so far.
    Raises InputError if the file there was made with other settings (but for axes, which may grow)
    or versions.
    """
    name = experiment.__name__.rpartition(".")[2]
    path = folder / f"{name}.json"
    document = {
        "experiment": name,
        "checks": f"[KronSAE, {experiment.FIGURE}]",
        "statement": experiment.STATEMENT,
        "command": command,
        "settings": _plain(settings),
        "made_with": made_with(settings),
        "runs": _earlier_runs(path, settings),
    }
    runs: list[Run] = document["runs"]
    prepared = None
    while missing := missing_cells(cells := experiment.cells(settings, runs), runs):
        if prepared is None:
            prepared = experiment.prepare(settings)
        cell = missing[0]
        began = time.perf_counter()
        values = experiment.run(settings, prepared, cell)
        seconds = round(time.perf_counter() - began, 1)
        runs.append({**cell, **values, "seconds": seconds, "command": command})
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, document)
        on_run(runs[-1], len(cells) - len(missing) + 1, len(cells))
    if not cells:
        raise InputError(f"{name}: with these settings there is nothing to run")
    wanted = [run for run in runs if any(matches(run, cell) for cell in cells)]
    conclusion = experiment.conclude(settings, wanted)
    write_json(path, {**document, "conclusion": conclusion.line})
    write_text(folder / f"{name}.md", page(experiment, command, conclusion))
    experiment.draw(settings, wanted, folder / f"{name}.png")
    return wanted


def matches(run: Run, cell: dict[str, Any]) -> bool:
    """Whether a run is that of the cell: it agrees in every key that the cell has."""
    return all(run.get(key) == value for key, value in cell.items())


def missing_cells(cells: Iterable[dict[str, Any]], runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The cells that no run is of."""
    return [cell for cell in cells if not any(matches(run, cell) for run in runs)]


def made_with(settings: Any) -> dict[str, str]:
    """Versions, device and dtype of the figures."""
    device = resolve_device(settings.device)
    return {
        "kronsae": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": str(compute_dtype("auto", device)).removeprefix("torch."),
    }


def page(experiment: ModuleType, command: str, conclusion: Conclusion) -> str:
    """The Markdown page of one experiment."""
    return (
        f"[KronSAE, {experiment.FIGURE}]: {experiment.STATEMENT}\n\n"
        f"    {command}\n\n{conclusion.table}\n\n{conclusion.line}\n"
    )


def _earlier_runs(path: Path, settings: Any) -> list[Run]:
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        earlier, versions, runs = found["settings"], found["made_with"], found["runs"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is not one that an experiment wrote: {error!r}") from error
    axes = {spec.name for spec in dataclasses.fields(settings) if spec.metadata.get("axis")}
    given = {**_plain(settings), **made_with(settings)}
    was = {**earlier, **versions}
    differences = [
        f"{name}: was {was.get(name)!r}, is {given.get(name)!r}"
        for name in sorted(given.keys() | was.keys())
        if name not in axes and given.get(name) != was.get(name)
    ]
    if differences:
        raise InputError(
            f"{path} was made otherwise: choose another --out, or remove it\n  "
            + "\n  ".join(differences)
        )
    return runs


def _plain(settings: Any) -> dict[str, Any]:
    """The settings as JSON gives them back."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def axis(default: Any, help: str) -> Any:
    """A setting whose values are in the cells, so that a file's grid may grow along it."""
    return setting(default, help, axis=True)


def require(package: str) -> None:
    """Raises InputError, before anything has run, if a package of an extra is missing."""
    if find_spec(package) is None:
        raise InputError(f"{package} is missing: pip install {package}")


# SAEs on a language model's activations


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """Settings of every experiment that trains on a language model's activations."""

    model: str = setting("embedded", "language model: hub name or folder")
    layer: int = setting(2, "residual stream after this block, counted from 0")
    dataset: str = setting("stdlib", "hub name, or files; 'stdlib': Python's standard library")
    dataset_config: str | None = setting(None, "configuration name of a hub dataset")
    streaming: bool = setting(False, "stream the dataset")
    buffer_tokens: int = setting(65_536, "size of the shuffle buffer, in tokens")
    heldout_tokens: int = setting(32_768, "tokens set aside to judge on")
    memory_gib: float = setting(8.0, "hold activations up to this; more are computed anew each run")
    batch_size: int = setting(1024, "tokens an optimizer step")
    k: int = setting(32, "active latents a token")
    learning_rates: tuple[float, ...] = axis(
        (1.6e-2, 2.4e-2), "rates to choose from, for each row on a seed of its own"
    )
    seeds: int = axis(3, "trainings of each row")
    device: str = setting("auto", "cpu, cuda, cuda:1, ... (auto: cuda where there is one)")


SMALLEST_TRAINING: dict[str, Any] = {
    "buffer_tokens": 2048,
    "heldout_tokens": 2048,
    "batch_size": 256,
    "k": 8,
    "learning_rates": (1.6e-2,),
    "seeds": 2,
}
"""Settings of a training of less than a second, for the smallest form of an experiment."""

QWEN: dict[str, Any] = {
    "model": "Qwen/Qwen2.5-1.5B",
    "layer": 14,
    "dataset": "HuggingFaceFW/fineweb-edu",
    "dataset_config": "sample-10BT",
    "streaming": True,
    "buffer_tokens": 524_288,
    "heldout_tokens": 262_144,
    "batch_size": 8192,
    "k": 50,
    "learning_rates": (8e-4,),
}
"""The paper's recipe on its main model. [KronSAE, App. A.1]"""


class Activations:
    """Activations that all runs of an experiment share: in memory if they fit, else streamed.

    heldout: [t, d] raw activations that nothing trains on.
    """

    def __init__(self, settings: TrainingSettings, layer: int | None = None) -> None:
        """layer: in place of the settings'."""
        self.config = DataConfig(
            model=settings.model,
            layer=settings.layer if layer is None else layer,
            dataset=settings.dataset,
            dataset_config=settings.dataset_config,
            streaming=settings.streaming,
            buffer_tokens=settings.buffer_tokens,
            heldout_tokens=settings.heldout_tokens,
        )
        self.batch_size = settings.batch_size
        self.memory_gib = settings.memory_gib
        self.device = resolve_device(settings.device)
        self.x: Tensor | None = None
        self.first = self._open(seed=0)
        self.d_model = self.first.d_model
        self.heldout = self.first.heldout_activations()

    def _open(self, seed: int) -> ActivationSource:
        return open_activations(
            self.config, batch_size=self.batch_size, seed=seed, device=self.device
        )

    def hold(self, tokens: int) -> "Activations":
        """Compute so many activations once, for all runs, if they fit in memory; returns self."""
        if tokens * self.d_model * 4 <= self.memory_gib * 2**30:
            self.x = collect(self.first, tokens)
        del self.first  # and the language model with it
        return self

    def training(self, tokens: int, seed: int) -> Tensor | ActivationSource:
        """What `fit` takes for so many tokens; in memory the seed is that of their order alone."""
        return self._open(seed) if self.x is None else self.x[:tokens]


def collect(source: ActivationSource, tokens: int) -> Tensor:
    """The first activations [tokens, d]. Raises InputError if there are fewer."""
    x, filled = torch.empty(tokens, source.d_model), 0
    for batch in source:
        taken = min(batch.shape[0], tokens - filled)
        x[filled : filled + taken] = batch[:taken]
        filled += taken
        if filled == tokens:
            return x
    raise InputError(f"the text has {filled:,} tokens to train on, of {tokens:,}: give more text")


def sae_config(variant: str, dict_size: int, k: int) -> SAEConfig:
    """The SAE that a variant's name means.

    "topk", "matryoshka", "switch", "jumprelu": a dense encoder; "m2n4": KronSAE with m = 2, n = 4
    (and as many heads as dict_size takes); "matryoshka-m2n4": the Kron form of another family than
    TopK; "h8m2n4": with its heads, which must agree; "m2n4-relu_mul": another composition than
    mAND. Raises InputError for any other name, and where dict_size does not fit the variant.
    """
    family = dense_form(variant)
    given = {"dict_size": dict_size, "k": k, **FAMILIES[family]}
    if variant == family:
        return SAEConfig(encoder="dense", **given)
    shape = variant.removeprefix(f"{family}-")
    found = re.fullmatch(r"(?:h(\d+))?m(\d+)n(\d+)(?:-(\w+))?", shape)
    if found is None:
        raise InputError(
            f"variant: expected {', '.join(FAMILIES)}, m2n4, h8m2n4, m2n4-relu_mul or "
            f"matryoshka-m2n4, got {variant!r}"
        )
    heads, m, n, composition = found.groups()
    return SAEConfig(
        heads=int(heads or 0),
        m=int(m),
        n=int(n),
        composition=composition or "mand",
        **given,
    )


def dense_form(variant: str) -> str:
    """The variant with a dense encoder that a Kron form is held against (of itself: itself)."""
    family = variant.partition("-")[0]
    return family if family in FAMILIES else "topk"


def with_dense_forms(variants: Iterable[str]) -> tuple[str, ...]:
    """The variants, each family's dense form before its Kron forms, none twice."""
    return tuple(dict.fromkeys(name for kron in variants for name in (dense_form(kron), kron)))


def train(
    config: SAEConfig,
    activations: Activations,
    settings: TrainingSettings,
    cell: dict[str, Any],
    **recipe: Any,
) -> FitResult:
    """Train one SAE on cell's "tokens", "lr" and "seed", and judge it on the held-out activations.

    recipe: settings of `TrainConfig` in place of its defaults. Raises Stopped on a signal.
    """
    return fit_whole(
        config,
        activations.training(cell["tokens"], cell["seed"]),
        TrainConfig(
            tokens=cell["tokens"],
            batch_size=settings.batch_size,
            lr=cell["lr"],
            seed=cell["seed"],
            device=settings.device,
            eval_every=0,
            **recipe,
        ),
        Heldout(activations.heldout),
    )


def fit_whole(
    config: SAEConfig,
    activations: Tensor | ActivationSource,
    train_config: TrainConfig,
    heldout: Heldout,
) -> FitResult:
    """`fit`, which raises Stopped if a signal ended it early."""
    result = fit(config, activations, train_config, heldout=heldout)
    if result.stopped_by is not None:
        raise Stopped(result.stopped_by)
    return result


def quality(result: FitResult) -> dict[str, float]:
    """The figures of a training that experiments keep."""
    return {name: result.metrics[name] for name in ("explained_variance", "dead_share", "l0")}


def tuned_cells(
    rows: Iterable[dict[str, Any]],
    settings: TrainingSettings,
    runs: Sequence[Run],
    merit: Callable[[Run], Any] = itemgetter("explained_variance"),
) -> list[dict[str, Any]]:
    """Cells of each row over its seeds, at the learning rate that is best for it.

    Where there are several rates, each is first tried on TUNING_SEED, and that of the greatest
    merit (what it explains) wins: so call it anew when runs are done.
    """
    cells = []
    for row in rows:
        trials = [{**row, "lr": lr, "seed": TUNING_SEED} for lr in settings.learning_rates]
        if len(trials) > 1:
            cells += trials
            tried = [run for run in runs if any(matches(run, trial) for trial in trials)]
            if len(tried) < len(trials):
                continue
            best = max(tried, key=merit)["lr"]
        else:
            best = trials[0]["lr"]
        cells += [{**row, "lr": best, "seed": seed} for seed in range(settings.seeds)]
    return cells


def reported(runs: Iterable[Run], **row: Any) -> list[Run]:
    """The runs of a row, but for those that chose its learning rate."""
    return [run for run in runs if run["seed"] != TUNING_SEED and matches(run, row)]


# Figures, tables, pictures


class Spread(NamedTuple):
    """Mean and sample standard deviation (nan for one value)."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        values = list(values)
        deviation = statistics.stdev(values) if len(values) > 1 else math.nan
        return cls(statistics.fmean(values), deviation)

    def __str__(self) -> str:
        return self.to(4)

    def to(self, digits: int) -> str:
        """As text, with so many digits."""
        mean = f"{self.mean:.{digits}f}"
        return mean if math.isnan(self.deviation) else f"{mean} ± {self.deviation:.{digits}f}"


def explained(runs: Iterable[Run], **row: Any) -> Spread:
    """Explained variance of a row, over its seeds."""
    return Spread.of(run["explained_variance"] for run in reported(runs, **row))


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def panels(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A matplotlib figure and its axes [rows, columns]; `save` writes and closes it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")


def save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
