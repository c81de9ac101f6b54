"""Every setting of a run, in three frozen dataclasses; the command line is made from them.

`SAEConfig` says what the autoencoder is, `DataConfig` where activations come from, `TrainConfig`
how it learns; `RunConfig` holds the three and is what a run folder's config.json stores.
The text of each field's metadata is the help of its flag.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from kronsae.errors import InputError

ENCODERS = ("kron", "dense")
SELECTIONS = ("topk", "batchtopk", "jumprelu")
OBJECTIVES = ("plain", "matryoshka", "multi_topk")
MULTI_TOPK = 4
"""Multi-TopK adds the error with so many times k latents. [Gao et al. 2024]"""
COMPOSITIONS = ("mand", "relu_mul", "mul")
DECODER_NORMS = ("unit", "free")
MOMENTS = ("float32", "bfloat16")
SHARES = ("tokens", "members")
ACTIVATIONS_ORDERS = ("global", "stream")
DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_BANDWIDTH = 0.1

PAPER_DICT_SIZE = 2**15
"""Dictionary size where none is given. [KronSAE, App. A.1]"""

EMBEDDED: dict[str, Any] = {
    "layer": 2,
    "buffer_tokens": 65_536,
    "heldout_tokens": 16_384,
    "dict_size": 4096,
    "m": 4,
    "n": 4,
    "k": 32,
    "tokens": 800_000,
    "batch_size": 1024,
    "lr": 1.6e-2,
    "eval_every": 200,
}
"""Settings that apply with model 'embedded', below a config file and flags."""


def setting(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with the help text of its flag (and `choices`, where there are some)."""
    return field(default=default, metadata={"help": help, **metadata})


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


@dataclass(frozen=True)
class SAEConfig:
    """What the autoencoder is: encoder x selection x objective, and whether it has experts.

    With d_target it is a transcoder: it predicts another stream of activations than it reads.

    A Kron encoder has `heads` heads of `m` base and `n` extension pre-latents, so that
    dict_size = heads * m * n. [KronSAE, eq. 2-4] Give `heads`, or `dict_size`, or both if they
    agree. A dense encoder has `dict_size` latents of its own.
    Raises InputError for settings that contradict each other.
    """

    d_model: int = setting(0, "width of the activations (0: taken from the data)")
    d_target: int = setting(
        0,
        "width of what a transcoder predicts from them (0: an autoencoder, or taken from the data)",
    )
    encoder: str = setting("kron", "kind of encoder", choices=ENCODERS)
    heads: int = setting(0, "heads of a Kron encoder (0: dict_size / (m n))")
    m: int = setting(0, "base pre-latents a head (Kron; default 4)")
    n: int = setting(0, "extension pre-latents a head (Kron; default 4)")
    dict_size: int = setting(0, "number of latents F = heads * m * n")
    k: int = setting(
        50, "active latents a token (batchtopk: on average; jumprelu: that training aims at)"
    )
    composition: str = setting("mand", "how base and extension compose", choices=COMPOSITIONS)
    eps: float = setting(0.0, "added under the root of mAND ([KronSAE, App. H] has 1e-5)")
    selection: str = setting("topk", "which latents are active", choices=SELECTIONS)
    objective: str = setting("plain", "what the reconstruction is judged by", choices=OBJECTIVES)
    matryoshka_first: int = setting(
        0,
        "latents of the first Matryoshka group, and of the second; each later one has twice as "
        "many (0: 2048, or dict_size / 16 if less)",
    )
    jumprelu_bandwidth: float = setting(
        0.0,
        "width of the window around a threshold in which latents teach it, in units of activations "
        f"of variance 1 (0: {DEFAULT_BANDWIDTH})",
    )
    experts: int = setting(
        0,
        "a router sends each token to one of so many equal parts of the dictionary (0: no Switch)",
    )
    skip: bool = setting(False, "a transcoder also predicts linearly from its input")
    init_scale: float = setting(
        1.0, "encoder weights start at so many times N(0, 1) / sqrt(2 dict_size)"
    )

    def __post_init__(self) -> None:
        for name, choices in (
            ("encoder", ENCODERS),
            ("composition", COMPOSITIONS),
            ("selection", SELECTIONS),
            ("objective", OBJECTIVES),
        ):
            value = getattr(self, name)
            _require(value in choices, f"{name}: one of {choices}, not {value!r}")
        for name in (
            *("d_model", "d_target", "heads", "m", "n", "dict_size"),
            *("matryoshka_first", "jumprelu_bandwidth", "experts"),
        ):
            _require(getattr(self, name) >= 0, f"{name}: expected >= 0, got {getattr(self, name)}")
        if self.encoder == "kron":
            self._resolve_kron()
        else:
            for name in ("heads", "m", "n"):
                _require(
                    getattr(self, name) == 0,
                    f"{name} has no effect with a dense encoder: leave it out (dict_size alone)",
                )
            _require(
                self.composition == "mand" and self.eps == 0.0,
                "composition and eps have no effect with encoder='dense': leave them out",
            )
            _require(self.dict_size > 0, "encoder='dense' needs dict_size")
        _require(
            1 <= self.k <= self.dict_size,
            f"k: expected 1 <= k <= dict_size = {self.dict_size}, got {self.k}",
        )
        _require(math.isfinite(self.eps) and self.eps >= 0, f"eps: expected >= 0, got {self.eps}")
        _require(
            math.isfinite(self.init_scale) and self.init_scale > 0,
            f"init_scale: expected > 0, got {self.init_scale}",
        )
        _require(
            self.eps == 0 or self.composition == "mand",
            f"eps has no effect with composition {self.composition!r}: leave it out",
        )
        for illegal, reason in self._illegal_points():
            _require(not illegal, reason)
        if self.objective == "matryoshka":
            self._resolve_matryoshka()
        if self.selection == "jumprelu" and not self.jumprelu_bandwidth:
            object.__setattr__(self, "jumprelu_bandwidth", DEFAULT_BANDWIDTH)

    def _illegal_points(self) -> list[tuple[bool, str]]:
        """Which points of the grid are not there, and why; all others are."""
        switch, per_token = self.experts > 0, self.latents_per_token
        multi, matryoshka = self.objective == "multi_topk", self.objective == "matryoshka"
        of_experts = self.heads if self.encoder == "kron" else self.dict_size
        return [
            (
                self.matryoshka_first > 0 and not matryoshka,
                f"matryoshka_first has no effect with objective {self.objective!r}: leave it out",
            ),
            (
                self.jumprelu_bandwidth > 0 and self.selection != "jumprelu",
                f"jumprelu_bandwidth has no effect with selection {self.selection!r}: leave it out",
            ),
            (
                multi and self.selection == "jumprelu",
                "objective 'multi_topk' needs a selection by k: jumprelu selects by thresholds",
            ),
            (
                multi and MULTI_TOPK * self.k > per_token,
                f"objective 'multi_topk' selects {MULTI_TOPK} k = {MULTI_TOPK * self.k} latents, "
                f"more than the {per_token} that a token has",
            ),
            (self.experts == 1, "experts: expected 0 (no Switch) or at least 2, got 1"),
            (
                switch and bool(of_experts % max(1, self.experts)),
                f"experts: {of_experts} {'heads' if self.encoder == 'kron' else 'latents'} cannot "
                f"be spread evenly over {self.experts} experts",
            ),
            (
                switch and self.k > per_token,
                f"k: expected at most the {per_token} latents of one of {self.experts} experts, "
                f"got {self.k}",
            ),
            (
                switch and matryoshka,
                "experts cannot be nested: a prefix of the dictionary would hold the first experts "
                "whole and the last ones not at all. Leave out experts, or objective 'matryoshka'",
            ),
            (
                switch and self.selection == "jumprelu",
                "experts scale latents by the router's probability, another one for each token: "
                "thresholds of latents cannot follow. Leave out experts, or selection 'jumprelu'",
            ),
            (
                switch and self.eps > 0,
                "experts scale latents by the router's probability, so that eps would no longer "
                "tell a silent latent from an active one: leave one of them out",
            ),
            (
                self.skip and self.d_model > 0 and not self.d_target,
                "skip needs a target beside the input (--target-hookpoint, or pairs of inputs and "
                "targets): an autoencoder with a linear skip would copy its input",
            ),
        ]

    def _resolve_kron(self) -> None:
        m, n = self.m or 4, self.n or 4
        heads = self.heads
        if not heads:
            _require(self.dict_size > 0, "encoder='kron' needs heads or dict_size")
            _require(
                self.dict_size % (m * n) == 0,
                f"dict_size {self.dict_size} is no multiple of m * n = {m} * {n}: "
                "heads * m * n = dict_size must hold",
            )
            heads = self.dict_size // (m * n)
        _require(
            self.dict_size in (0, heads * m * n),
            f"heads * m * n = {heads} * {m} * {n} = {heads * m * n}, "
            f"but dict_size = {self.dict_size}: leave one of them out",
        )
        for name, value in (("m", m), ("n", n), ("heads", heads), ("dict_size", heads * m * n)):
            object.__setattr__(self, name, value)

    def _resolve_matryoshka(self) -> None:
        size = self.dict_size
        first = self.matryoshka_first or min(2048, max(1, size // 16))
        object.__setattr__(self, "matryoshka_first", first)
        _require(
            self.prefixes[-1] == size,
            f"matryoshka_first: groups of {first}, {first}, {2 * first}, ... latents cannot sum to "
            f"dict_size = {size}: it must be {first} times a power of two",
        )
        if self.encoder == "kron" and first % (self.m * self.n):
            shapes = [
                f"m {m}, n {n}, heads {size // (m * n)}"
                for m, n in ((self.m, self.n), (2, 4), (4, 4), (4, 8), (2, 2), (1, 2), (1, 1))
                for m, n in ((math.gcd(m, first), math.gcd(n, first)),)
                if first % (m * n) == 0
            ]
            raise InputError(
                f"matryoshka_first: heads of m * n = {self.m * self.n} latents would straddle the "
                f"border of a group of {first}. These would fit: "
                f"{'; '.join(dict.fromkeys(shapes))}"
            )

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Ends of the nested parts of the dictionary that Matryoshka reconstructs from.

        Groups of first, first, 2 first, 4 first, ... latents, so each end is twice the one before.
        [KronSAE, App. A.1]
        """
        ends = [self.matryoshka_first]
        while ends[-1] < self.dict_size:
            ends.append(2 * ends[-1])
        return tuple(ends)

    @property
    def latents_per_token(self) -> int:
        """From how many latents those of a token are selected: the dictionary, or an expert's."""
        return self.dict_size // max(1, self.experts)

    @property
    def d_out(self) -> int:
        """Width of the reconstruction: d_target of a transcoder, else d_model."""
        return self.d_target or self.d_model

    @property
    def encoder_rows(self) -> int:
        """Rows of the encoder matrix: h (m + n), or F for a dense encoder."""
        return self.heads * (self.m + self.n) if self.encoder == "kron" else self.dict_size


def kind_of(settings: Mapping[str, Any]) -> str:
    """What an SAE with these settings of `SAEConfig` is called: "KronSAE", "Switch TopK SAE", …"""
    kron = settings.get("encoder", "kron") == "kron"
    selection = settings.get("selection", "topk")
    objective = settings.get("objective", "plain")
    usual = kron or objective == "multi_topk"
    names = {"topk": "" if usual else "TopK", "batchtopk": "BatchTopK", "jumprelu": "JumpReLU"}
    words = [
        "Switch" if settings.get("experts") else "",
        {"matryoshka": "Matryoshka", "multi_topk": "Multi-TopK"}.get(objective, ""),
        names.get(selection, ""),
        ("Kron transcoder" if kron else "transcoder")
        if settings.get("d_target")
        else ("KronSAE" if kron else "SAE"),
        "with a linear skip" if settings.get("skip") else "",
    ]
    return " ".join(filter(None, words))


@dataclass(frozen=True)
class DataConfig:
    """Where activations come from: a language model that reads text, or a cache of what it gave."""

    model: str = setting("embedded", "language model: hub name or folder; 'embedded' ships with us")
    revision: str | None = setting(None, "revision (branch, tag, commit) of the model on the hub")
    layer: int | None = setting(
        None, "residual stream after this block, counted from 0 (embedded: 2)"
    )
    hookpoint: str | None = setting(None, "name of any module instead of a layer: its output")
    target_hookpoint: str | None = setting(
        None,
        "train a transcoder: predict the output of this module, which runs later, from that of "
        "layer or hookpoint",
    )
    activations: str | None = setting(
        None,
        "train from this cache (a folder that python -m kronsae.harvest wrote) instead of a "
        "language model and text, which it knows; --layer or --hookpoint choose, if it holds "
        "several",
    )
    activations_order: str = setting(
        "global",
        "order in which a cache is read: permuted over all of it, or the stream of live training",
        choices=ACTIVATIONS_ORDERS,
    )
    dataset: str = setting(
        "stdlib",
        "hub name, or text, JSONL, CSV, Parquet or Arrow files, folders and globs, separated by "
        "commas; 'stdlib' is the source text of Python's standard library",
    )
    dataset_config: str | None = setting(None, "configuration name of a hub dataset")
    split: str = setting("train", "split of a hub dataset")
    text_column: str = setting("text", "column that holds the text")
    streaming: bool = setting(
        False, "stream the dataset instead of downloading or indexing it first"
    )
    epochs: int = setting(
        1, "how often the text (or cache) may be read before the data counts as ended"
    )
    context_length: int = setting(
        0, "tokens a packed context (0: 1024, or as many as the model reads if less)"
    )
    contexts_per_batch: int = setting(32, "contexts a forward pass of the language model")
    model_dtype: str = setting(
        "auto",
        "dtype of the language model (auto: bfloat16 on a GPU, float32 on a CPU)",
        choices=("auto", *DTYPES),
    )
    model_device: str | None = setting(
        None, "device of the language model, such as a second GPU (default: that of --device)"
    )
    overlap: str = setting(
        "auto",
        "run the language model in a thread, beside the autoencoder (auto: where it runs on a GPU; "
        "the batches are the same)",
        choices=("auto", "on", "off"),
    )
    buffer_tokens: int = setting(
        131_072, "size of the shuffle buffer, in tokens (of a cache: what is shuffled together)"
    )
    heldout_tokens: int = setting(
        65_536, "tokens of text set aside before shuffling and never trained on"
    )
    trust_remote_code: bool = setting(False, "run code that comes with the model from the hub")

    def __post_init__(self) -> None:
        _require(
            self.layer is None or self.hookpoint is None,
            "layer and hookpoint exclude each other: give one",
        )
        _require(
            self.context_length == 0 or self.context_length >= 2,
            f"context_length: expected 0 or >= 2, got {self.context_length}",
        )
        for name in ("epochs", "contexts_per_batch", "buffer_tokens", "heldout_tokens"):
            _require(getattr(self, name) >= 1, f"{name}: expected >= 1, got {getattr(self, name)}")
        _require(
            self.model_dtype in ("auto", *DTYPES),
            f"model_dtype: one of {('auto', *DTYPES)}, not {self.model_dtype!r}",
        )
        _require(
            self.activations_order in ACTIVATIONS_ORDERS,
            f"activations_order: one of {ACTIVATIONS_ORDERS}, not {self.activations_order!r}",
        )
        _require(
            self.activations is not None or self.activations_order == "global",
            "activations_order has no effect without a cache (activations): leave it out",
        )
        _require(
            self.overlap in ("auto", "on", "off"),
            f"overlap: one of ('auto', 'on', 'off'), not {self.overlap!r}",
        )
        _require(
            self.target_hookpoint is None or self.target_hookpoint != self.hookpoint,
            "target_hookpoint is the hookpoint: an autoencoder predicts its input, leave it out",
        )
        if self.dataset == "stdlib":
            for name in ("dataset_config", "streaming"):
                _require(not getattr(self, name), f"{name} has no effect with dataset='stdlib'")

    def live(self) -> "DataConfig":
        """The model and text that a cache was harvested from, in its place: to look at more."""
        return replace(self, activations=None, activations_order="global")


@dataclass(frozen=True)
class TrainConfig:
    """How the autoencoder learns. Budgets count tokens, schedules count optimizer steps."""

    tokens: int = setting(125_000_000, "training budget, in tokens")
    batch_size: int = setting(8192, "tokens an optimizer step")
    lr: float = setting(8e-4, "peak learning rate of AdamW")
    lr_final: float = setting(1e-6, "learning rate at the end of the cosine")
    lr_scale_by_dict_size: bool = setting(False, "multiply lr by 1 / sqrt(dict_size / 2**15)")
    warmup_fraction: float = setting(0.1, "share of the steps with linear warm-up")
    adam_beta2: float = setting(
        0.999, "how much of AdamW's second moment stays from a step to the next"
    )
    weight_decay: float = setting(0.0, "weight decay of AdamW (on the encoder's weights)")
    decoder_norm: str = setting(
        "unit", "decoder rows are kept at unit norm, or free", choices=DECODER_NORMS
    )
    max_grad_norm: float = setting(
        0.0,
        "clip the gradient's norm to this (0: no clipping); not finite, its batch is skipped",
    )
    auxk_coefficient: float = setting(1 / 32, "weight of the loss that revives dead latents")
    auxk: int = setting(0, "dead latents a token in that loss (0: d_model / 2)")
    auxk_fraction: float = setting(
        0.25,
        "share of each batch on which that loss is measured (k / auxk times that, where it has "
        "more latents a token than the rest of the step)",
    )
    l0_coefficient: float = setting(
        1.0, "jumprelu: weight of the loss (L0 / k - 1)^2 that keeps k latents a token active"
    )
    balance_coefficient: float = setting(
        0.1, "experts: weight of the loss that spreads tokens evenly over them"
    )
    dead_after_tokens: int = setting(
        0,
        "a latent is dead after so many tokens without firing (0: 10 M, or tokens / 10 if less, "
        "but at least 10 batches)",
    )
    seed: int = setting(0, "seed of everything random")
    data_seed: int | None = setting(
        None, "seed of the order of the data (default: the same as --seed)"
    )
    device: str = setting("auto", "cpu, cuda, cuda:1, ... (auto: cuda where there is one)")
    dtype: str = setting(
        "auto",
        "compute dtype of the SAE; weights stay float32 (auto: bfloat16 on a GPU)",
        choices=("auto", *DTYPES),
    )
    fused_step: str = setting(
        "auto",
        "whether gradients and AdamW are fused into kernels that write no gradient (auto: on a "
        "GPU, where they can run; on: an error where they cannot)",
        choices=("auto", "on", "off"),
    )
    cuda_graph: str = setting(
        "auto",
        "whether the fused step is one launch of a CUDA graph (auto: where that works), or of "
        "each of its kernels",
        choices=("auto", "off"),
    )
    moments: str = setting(
        "float32",
        "dtype of AdamW's moments of the two matrices; bfloat16 (fused step alone) halves their "
        "memory, by stochastic rounding",
        choices=MOMENTS,
    )
    tensor_parallel: int = setting(
        1,
        "processes of torchrun that hold the heads of one autoencoder together; the others share "
        "the tokens of each batch",
    )
    share: str = setting(
        "tokens",
        "what processes of torchrun share out: the tokens of each batch, or the members of a "
        "sweep, each of which one process trains alone",
        choices=SHARES,
    )
    rank_timeout: int = setting(
        600, "seconds that a process of torchrun waits for another one before it gives up"
    )
    log_every: int = setting(10, "steps between two lines of metrics")
    eval_every: int = setting(
        200, "steps between two evaluations on held-out tokens (0: at the end)"
    )
    checkpoint_every: int = setting(500, "steps between two checkpoints (0: none but the last)")
    keep_checkpoints: int = setting(2, "how many checkpoints to keep")
    tensorboard: bool = setting(False, "also log to TensorBoard (needs kronsae[tensorboard])")
    wandb: str | None = setting(
        None, "also log to this Weights & Biases project (needs kronsae[wandb])"
    )

    def __post_init__(self) -> None:
        for name in (
            *("tokens", "batch_size", "log_every", "keep_checkpoints"),
            *("tensor_parallel", "rank_timeout"),
        ):
            _require(getattr(self, name) >= 1, f"{name}: expected >= 1, got {getattr(self, name)}")
        for name in ("eval_every", "checkpoint_every", "auxk", "dead_after_tokens"):
            _require(getattr(self, name) >= 0, f"{name}: expected >= 0, got {getattr(self, name)}")
        for name in (
            *("lr", "lr_final", "weight_decay", "max_grad_norm"),
            *("auxk_coefficient", "l0_coefficient", "balance_coefficient"),
        ):
            value = getattr(self, name)
            _require(math.isfinite(value) and value >= 0, f"{name}: expected >= 0, got {value}")
        _require(
            0 <= self.adam_beta2 < 1, f"adam_beta2: expected 0 <= beta < 1, got {self.adam_beta2}"
        )
        _require(
            self.decoder_norm in DECODER_NORMS,
            f"decoder_norm: one of {DECODER_NORMS}, not {self.decoder_norm!r}",
        )
        for name in ("warmup_fraction", "auxk_fraction"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"{name}: expected 0 to 1, got {value}")
        for name in ("seed", "data_seed"):
            value = getattr(self, name) or 0
            _require(0 <= value < 2**40, f"{name}: expected 0 to 2**40 - 1, got {value}")
        _require(
            self.dtype in ("auto", *DTYPES),
            f"dtype: one of {('auto', *DTYPES)}, not {self.dtype!r}",
        )
        _require(
            self.fused_step in ("auto", "on", "off"),
            f"fused_step: one of ('auto', 'on', 'off'), not {self.fused_step!r}",
        )
        _require(
            self.cuda_graph in ("auto", "off"),
            f"cuda_graph: one of ('auto', 'off'), not {self.cuda_graph!r}",
        )
        _require(self.share in SHARES, f"share: one of {SHARES}, not {self.share!r}")
        _require(self.moments in MOMENTS, f"moments: one of {MOMENTS}, not {self.moments!r}")

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole budget; the last batch may be smaller."""
        return math.ceil(self.tokens / self.batch_size)

    @property
    def stream_seed(self) -> int:
        """What the order of the data is drawn from; `seed` draws the weights."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def dead_after(self) -> int:
        """Tokens without firing after which a latent counts as dead; by default >= 10 batches."""
        default = max(min(10_000_000, self.tokens // 10), 10 * self.batch_size)
        return self.dead_after_tokens or default


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run is made from."""

    sae: SAEConfig
    data: DataConfig
    train: TrainConfig

    def to_dict(self) -> dict[str, dict[str, Any]]:
        return {part.name: dataclasses.asdict(getattr(self, part.name)) for part in fields(self)}


def from_dict(cls: type, values: dict[str, Any], where: str) -> Any:
    """`cls(**values)` for a config dataclass; an unknown key or a wrong type is an InputError."""
    known = {f.name: f for f in fields(cls)}
    unknown = sorted(set(values) - set(known))
    _require(not unknown, f"{where}: unknown settings {unknown}; known are {sorted(known)}")
    return cls(**{name: _checked(known[name], value, where) for name, value in values.items()})


def untrusted(data: dict[str, Any]) -> dict[str, Any]:
    """Settings of `DataConfig` that a file holds, without leave to run code from a hub.

    Only who gives the command can give that: a run or an SAE may have been made by anyone.
    """
    return {name: value for name, value in data.items() if name != "trust_remote_code"}


def _checked(spec: dataclasses.Field, value: Any, where: str) -> Any:
    kind, optional = base_type(spec)
    if value is None and optional:
        return None
    if kind is float and type(value) is int:
        value = float(value)
    _require(
        type(value) is kind,
        f"{where}: {spec.name} expects {kind.__name__}, got {value!r}",
    )
    return value


def base_type(spec: dataclasses.Field) -> tuple[type, bool]:
    """(int | float | bool | str, whether None is allowed) of a config field."""
    args = getattr(spec.type, "__args__", None)
    if args is None:
        return spec.type, False
    return next(a for a in args if a is not type(None)), True
