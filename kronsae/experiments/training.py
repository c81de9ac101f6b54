"""Experiments that train SAEs on a language model's activations."""

import dataclasses
import itertools
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from kronsae.cache.index import DESCRIBED, CacheIndex
from kronsae.commandline import stop_of
from kronsae.config import DataConfig, SAEConfig, TrainConfig, setting
from kronsae.data import ActivationSource
from kronsae.errors import InputError
from kronsae.experiments.activations import Activations, collect
from kronsae.experiments.experiment import Experiment, Run, axis
from kronsae.experiments.grid import matches
from kronsae.experiments.report import (
    TUNING_SEED,
    Across,
    Spread,
    by_column,
    curves,
    explained,
    grouped,
    markdown,
    number,
    picture,
)
from kronsae.experiments.variants import sae_config
from kronsae.metrics.heldout import Heldout
from kronsae.model.sae import SAE
from kronsae.sources import open_activations, source_of
from kronsae.system.devices import resolve_device
from kronsae.training.fit import fit
from kronsae.training.session import FitResult

SMALLEST: dict[str, Any] = {
    "buffer_tokens": 2048,
    "heldout_tokens": 2048,
    "batch_size": 256,
    "k": 8,
    "learning_rates": (1.6e-2,),
    "seeds": 2,
}
"""Settings of a training of less than a second."""

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


@dataclasses.dataclass(frozen=True)
class TrainingExperiment(Experiment):
    """SAEs of several rows of settings, each trained over seeds; explained variance is compared.

    A row is a dict: what a cell has but for its learning rate and seed. An experiment gives `rows`,
    `sentence`, and how its table and picture are laid out.
    """

    headings: ClassVar[dict[str, str]] = {}
    """Keys that name a row of the table, with their headings."""
    column: ClassVar[str] = "variant"
    """Key with a column each value."""
    published: ClassVar[Sequence[Sequence[str]]] = ()
    """The paper's rows, below ours."""
    line: ClassVar[str] = "variant"
    """Key with a line each value, in the picture."""
    across: ClassVar[Across]
    """The horizontal axis of the picture."""

    model: str = setting("embedded", "language model: hub name or folder")
    layer: int = setting(2, "residual stream after this block, counted from 0")
    dataset: str = setting("stdlib", "hub name, or files; 'stdlib': Python's standard library")
    dataset_config: str | None = setting(None, "configuration name of a hub dataset")
    streaming: bool = setting(False, "stream the dataset")
    cache: str | None = setting(
        None, "folder of `kronsae harvest` to read activations from, in place of model and text"
    )
    buffer_tokens: int = setting(65_536, "size of the shuffle buffer, in tokens")
    heldout_tokens: int = setting(32_768, "tokens set aside to judge on")
    memory_gib: float = setting(8.0, "hold activations up to this; more are computed anew each run")
    batch_size: int = setting(1024, "tokens an optimizer step")
    k: int = setting(32, "active latents a token")
    learning_rates: tuple[float, ...] = axis(
        (1.6e-2, 2.4e-2), "rates to choose from, for each row on a seed of its own"
    )
    encoder_lr_ratio: float = setting(
        1.0, "learning rate of the encoder's matrix, in multiples of that of all others"
    )
    max_grad_norm: float = setting(0.0, "clip the gradient's norm to this (0: no clipping)")
    seeds: int = axis(3, "trainings of each row")

    @abstractmethod
    def rows(self) -> list[dict[str, Any]]:
        """Rows to compare; most often the `product` of some axes."""

    def cells(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """Each row over its seeds, at the learning rate that is best for it.

        Where there are several rates, each is first tried on TUNING_SEED, and that of the greatest
        merit wins: so call it anew when runs are done.
        """
        cells = []
        for row in self.rows():
            trials, best = self.trials(row, runs)
            cells += trials
            if best is not None:
                cells += [{**row, "lr": best, "seed": seed} for seed in range(self.seeds)]
        return cells

    def trials(
        self, row: dict[str, Any], runs: Sequence[Run]
    ) -> tuple[list[dict[str, Any]], float | None]:
        """A cell each learning rate of a row, and the rate of the greatest merit among their runs.

        The rate is None unless all have run. A single rate is not tried.
        """
        cells = [{**row, "lr": lr, "seed": TUNING_SEED} for lr in self.learning_rates]
        if len(cells) == 1:
            return [], cells[0]["lr"]
        tried = [run for run in runs if any(matches(run, cell) for cell in cells)]
        return cells, max(tried, key=self.merit)["lr"] if len(tried) == len(cells) else None

    def merit(self, run: Run) -> Any:
        """Figure of a run by which its learning rate is chosen: the largest wins."""
        return number(run["explained_variance"])

    def recorded(self) -> dict[str, Any]:
        """Of a cache, its model, text and held-out tokens, and the hash of these.

        The hash stays the same where the cache grows. Raises InputError if a setting was given that
        is not the cache's.
        """
        settings = super().recorded()
        if self.cache is None:
            return settings
        index = CacheIndex.open(self.cache)
        defaults = {spec.name: spec.default for spec in dataclasses.fields(self)}
        for name in (name for name in DESCRIBED if name in settings):
            given, own = settings[name], getattr(index.data, name)
            if given not in (own, *(p.get(name) for p in (defaults, self.smallest, self.paper))):
                raise InputError(
                    f"{name} {given!r}: {self.cache} was harvested with {own!r}; leave it out"
                )
            settings[name] = own
        fingerprint = dataclasses.replace(index, train=()).fingerprint
        return settings | {"cache_fingerprint": f"{fingerprint}, read as a stream"}

    def prepare(self) -> Any:
        return self.activations()

    def data_config(self, **given: Any) -> DataConfig:
        """Where activations come from, by the settings, some of which `given` replaces.

        A cache is read as live training reads its text: a cell gets the same tokens however long
        the other trainings are, and when the cache has grown.
        """
        names = {spec.name for spec in dataclasses.fields(DataConfig)}
        given = {n: value for n, value in vars(self).items() if n in names} | given
        if self.cache is not None:
            given |= {"activations": self.cache, "activations_order": "stream"}
            given |= source_of(self.cache).decided({**given, "hookpoint": None})
        return DataConfig(**given)

    def activations(self, **given: Any) -> Activations:
        """Activations by the settings, some of which `given` replaces."""
        config, device = self.data_config(**given), resolve_device(self.device)
        source = partial(open_activations, config, batch_size=self.batch_size, device=device)
        first = source(seed=0)
        heldout, tokens = first.heldout_activations(), self.longest(first.d_model)
        fit_in_memory = tokens * first.d_model * 4 <= self.memory_gib * 2**30
        x = collect(first, tokens) if fit_in_memory else None
        facts = {"config": dataclasses.asdict(config), "data": first.describe()}
        return Activations(heldout, x, source, facts)

    def longest(self, d_model: int) -> int:
        """Tokens of the longest training."""
        return max(self.tokens_of(row, d_model) for row in self.rows())

    def tokens_of(self, row: dict[str, Any], d_model: int) -> int:
        """Tokens of a row's trainings."""
        return row["tokens"]

    def run(self, shared: Any, cell: dict[str, Any]) -> dict[str, Any]:
        return quality(self.train(self.sae(cell), shared, cell))

    def sae(self, cell: dict[str, Any]) -> SAEConfig:
        """The SAE of a cell; size and k are the settings' unless the cell has its own."""
        given = {**vars(self), **cell}
        return sae_config(self.variant(cell), given["dict_size"], given["k"])

    def variant(self, cell: dict[str, Any]) -> str:
        """Name of the SAE of a cell."""
        return cell["variant"]

    def train(
        self, sae: SAEConfig | SAE, activations: Activations, cell: dict[str, Any], **recipe: Any
    ) -> FitResult:
        """Train at the cell's "lr" and "seed", and judge on the held-out activations.

        sae: a configuration, or an SAE to start from.
        recipe: settings of `TrainConfig` in place of its defaults.
        """
        tokens = self.tokens_of(cell, activations.heldout.shape[1])
        train_config = TrainConfig(
            tokens=tokens,
            batch_size=self.batch_size,
            lr=cell["lr"],
            seed=cell["seed"],
            device=self.device,
            eval_every=0,
            **{
                "encoder_lr_ratio": self.encoder_lr_ratio,
                "max_grad_norm": self.max_grad_norm,
                **recipe,
            },
        )
        x = activations.training(tokens, cell["seed"])
        return fit_whole(sae, x, train_config, Heldout(activations.heldout))

    def conclude(self, runs: Sequence[Run]) -> tuple[str, str]:
        """A table of explained variance, the paper's below ours."""
        spreads = explained(runs, *self.headings, self.column)
        header, rows = by_column(spreads, list(self.headings.values()), self.column)
        return markdown(header, [*rows, *self.published]), self.sentence(spreads)

    def sentence(self, spreads: dict[tuple, Spread]) -> str:
        """Our result beside the paper's; spreads: explained variance by `headings` and `column`."""
        raise NotImplementedError

    def draw(self, runs: Sequence[Run], path: Path) -> None:
        """Explained variance with error bars, a panel each dictionary size."""
        points = (*self.headings, self.column)
        sizes = grouped(runs, "dict_size")
        with picture(path, len(sizes)) as row:
            for axes, ((size,), of_size) in zip(row, sizes.items(), strict=True):
                curves(axes, of_size, self.line, self.across, *points)
                tokens = {run["tokens"] for run in of_size}
                of_tokens = f", {tokens.pop():,} tokens" if len(tokens) == 1 else ""
                axes.set_title(f"{self.subject()}F = {size:,}{of_tokens}")

    def subject(self) -> str:
        """How a picture's title begins: the SAE, where all are of one kind."""
        return ""


@dataclasses.dataclass(frozen=True)
class EqualTokens(TrainingExperiment):
    """SAEs of one dictionary size that all see equally many tokens."""

    smallest = SMALLEST | {"tokens": 2048, "dict_size": 128}
    paper = QWEN | {"tokens": 125_000_000, "dict_size": 32768}

    tokens: int = axis(200_000, "tokens of a training")
    dict_size: int = axis(4096, "dictionary size F")

    def rows(self) -> list[dict[str, Any]]:
        return product(**self.compared(), dict_size=self.dict_size, tokens=self.tokens)

    def compared(self) -> dict[str, Iterable[Any]]:
        """Values by key; rows are all of each with all of the others."""
        raise NotImplementedError


def product(**axes: int | Iterable[Any]) -> list[dict[str, Any]]:
    """Rows of all values of each key with all of the others; the last changes fastest.

    A number stands for itself alone.
    """
    lists = [[value] if isinstance(value, int) else value for value in axes.values()]
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*lists)]


def fit_whole(
    sae: SAEConfig | SAE,
    activations: Tensor | ActivationSource,
    train_config: TrainConfig,
    heldout: Heldout,
) -> FitResult:
    """`fit`, which raises Terminated or KeyboardInterrupt if a signal ended it early."""
    result = fit(sae, activations, train_config, heldout=heldout)
    if result.stopped_by is not None:
        raise stop_of(result.stopped_by)
    return result


def quality(result: FitResult) -> dict[str, float]:
    """The figures of a training that experiments keep."""
    return {name: result.metrics[name] for name in ("explained_variance", "dead_share", "l0")}
