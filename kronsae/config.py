"""Every setting of a run, in three frozen dataclasses; the command line is made from them.

`SAEConfig` says what the autoencoder is, `DataConfig` where activations come from, `TrainConfig`
how it learns; `RunConfig` holds the three and is what a run folder's config.json stores.
What anyone needs to know of a field stands at the field: see `setting`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from types import UnionType
from typing import Any, NamedTuple

from kronsae.errors import InputError
from kronsae.registry import ENCODERS, OBJECTIVES, SAE_KINDS, SELECTIONS, Registry

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


Unless = Callable[[Mapping[str, Any]], str | None]
"""Of flat settings (of all configs, by field): with what a setting has no effect, or None."""


def setting(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | Registry[Any] | None = None,
    unless: Unless | None = None,
    **metadata: Any,
) -> Any:
    """A dataclass field, and what is known of it.

    help: of its flag.  choices: the values that it may have.
    unless: when it has no effect; to give it then is an error.
    metadata: `group`, the title of flags that belong together.
        `free` (DataConfig, TrainConfig): it may change when a run resumes.
        `shared` (TrainConfig, SAEConfig): all members of a sweep have the same.
        `of` (DataConfig): "model", "text" or "reading".
        `harvested` (DataConfig): a cache of activations has decided it.
    """
    metadata |= {"help": help, "unless": unless}
    if choices is not None:  # a registry fills later
        metadata["choices"] = choices
    return field(default=default, metadata=metadata)


def no_effect(spec: dataclasses.Field[Any], settings: Mapping[str, Any]) -> str | None:
    """With what among flat settings that of `spec` has no effect; None if it has one."""
    unless = spec.metadata.get("unless")
    return unless and unless(settings)


def flag(name: str) -> str:
    """The flag of a setting."""
    return "--" + name.replace("_", "-")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def _check_choices(config: Any) -> None:
    for spec in fields(config):
        choices, value = spec.metadata.get("choices"), getattr(config, spec.name)
        if choices is not None and value not in choices:
            raise InputError(f"{spec.name}: one of {tuple(choices)}, not {value!r}")


def _check_effects(config: Any, *names: str) -> None:
    """Raise InputError for a setting that has no effect. names: to look at; by default all."""
    for spec in fields(config):
        reason, value = no_effect(spec, vars(config)), getattr(config, spec.name)
        if names and spec.name not in names:
            continue
        if reason is not None and value not in (spec.default, 0):
            raise InputError(f"{spec.name} has no effect with {reason}: leave it out")


def _unless_factored(settings: Mapping[str, Any]) -> str | None:
    name = settings["encoder"]
    return None if ENCODERS[name].factored else f"encoder {name!r}"


def _unless_mand(settings: Mapping[str, Any]) -> str | None:
    if settings["composition"] != "mand":
        return f"composition {settings['composition']!r}"
    return _unless_factored(settings)


def _unless_thresholds(settings: Mapping[str, Any]) -> str | None:
    name = settings["selection"]
    return None if SELECTIONS[name].learns_thresholds else f"selection {name!r}"


def _unless_by_k(settings: Mapping[str, Any]) -> str | None:
    name = settings["selection"]
    return None if SELECTIONS[name].aims_at_k else f"selection {name!r}"


def _unless_experts(settings: Mapping[str, Any]) -> str | None:
    return None if settings["experts"] else "experts 0"


def _unless_transcoder(settings: Mapping[str, Any]) -> str | None:
    if settings.get("target_hookpoint", "") is not None:  # known of a run alone
        return None
    return "an autoencoder (a transcoder has a --target-hookpoint)"


def _unless_auxk_loss(settings: Mapping[str, Any]) -> str | None:
    return None if settings["auxk_coefficient"] else "auxk_coefficient 0"


def _unless_auxk(settings: Mapping[str, Any]) -> str | None:
    return _unless_auxk_loss(settings) or (None if settings["auxk_fraction"] else "auxk_fraction 0")


def _unless_cached(settings: Mapping[str, Any]) -> str | None:
    if settings["activations"] is not None:
        return None
    return "a language model that is read live (a cache is named by --activations)"


def _unless_live(settings: Mapping[str, Any]) -> str | None:
    if settings["activations"] is None:
        return None
    return "--activations: no language model runs beside the autoencoder"


def _unless_downloaded(settings: Mapping[str, Any]) -> str | None:
    return "model 'embedded'" if settings["model"] == "embedded" else None


def _unless_a_dataset(settings: Mapping[str, Any]) -> str | None:
    return "dataset 'stdlib'" if settings["dataset"] == "stdlib" else None


def _unless_nested(settings: Mapping[str, Any]) -> str | None:
    name = settings["objective"]
    return None if OBJECTIVES[name].nested else f"objective {name!r}"


@dataclass(frozen=True)
class SAEConfig:
    """What the autoencoder is: encoder x selection x objective, and whether it has experts.

    With d_target it is a transcoder: it predicts another stream of activations than it reads.

    A Kron encoder has `heads` heads of `m` base and `n` extension pre-latents, so that
    dict_size = heads * m * n. [KronSAE, eq. 2-4] Give `heads`, or `dict_size`, or both if they
    agree. Other encoders have `dict_size` latents of their own.
    Encoder, selection and objective are registered kinds (`kronsae.registry`). One that has
    settings of its own gets them in `…_settings`: an instance of its dataclass, or a mapping.
    Raises InputError for settings that contradict each other.
    """

    d_model: int = setting(0, "width of the activations (0: taken from the data)", shared=True)
    d_target: int = setting(
        0,
        "width of what a transcoder predicts from them (0: an autoencoder, or taken from the data)",
        unless=_unless_transcoder,
    )
    encoder: str = setting("kron", "kind of encoder", choices=ENCODERS)
    heads: int = setting(
        0, "heads of a Kron encoder (0: dict_size / (m n))", unless=_unless_factored
    )
    m: int = setting(0, "base pre-latents a head (Kron)", unless=_unless_factored)
    n: int = setting(0, "extension pre-latents a head (Kron)", unless=_unless_factored)
    dict_size: int = setting(0, "number of latents F = heads * m * n")
    k: int = setting(
        50,
        "active latents a token (batchtopk: on average; jumprelu: that training aims at)",
        unless=_unless_by_k,
    )
    composition: str = setting(
        "mand",
        "how base and extension compose",
        choices=COMPOSITIONS,
        unless=_unless_factored,
    )
    eps: float = setting(
        0.0, "added under the root of mAND ([KronSAE, App. H] has 1e-5)", unless=_unless_mand
    )
    selection: str = setting("topk", "which latents are active", choices=SELECTIONS)
    objective: str = setting("plain", "what the reconstruction is judged by", choices=OBJECTIVES)
    matryoshka_first: int = setting(
        0,
        "latents of the first Matryoshka group, and of the second; each later one has twice as "
        "many (0: 2048, or dict_size / 16 if less)",
        unless=_unless_nested,
    )
    jumprelu_bandwidth: float = setting(
        0.0,
        "width of the window around a threshold in which latents teach it, in units of activations "
        f"of variance 1 (0: {DEFAULT_BANDWIDTH})",
        unless=_unless_thresholds,
    )
    experts: int = setting(
        0,
        "a router sends each token to one of so many equal parts of the dictionary (0: no Switch)",
    )
    skip: bool = setting(
        False, "a transcoder also predicts linearly from its input", unless=_unless_transcoder
    )
    init_scale: float = setting(
        1.0, "encoder weights start at so many times N(0, 1) / sqrt(2 dict_size)"
    )
    encoder_settings: Any = None
    selection_settings: Any = None
    objective_settings: Any = None

    def __post_init__(self) -> None:
        for part, kinds in SAE_KINDS.items():
            kind, name = kinds[getattr(self, part)], f"{part}_settings"
            given = getattr(self, name)
            object.__setattr__(self, name, _settings_of(kind, given, f"{part} {name!r}"))
        _check_choices(self)
        for name in (
            *("d_model", "d_target", "heads", "m", "n", "dict_size"),
            *("matryoshka_first", "jumprelu_bandwidth", "experts"),
        ):
            _require(getattr(self, name) >= 0, f"{name}: expected >= 0, got {getattr(self, name)}")
        _check_effects(self)
        if ENCODERS[self.encoder].factored:
            self._resolve_heads()
        _require(self.dict_size > 0, f"encoder {self.encoder!r} needs dict_size")
        if SELECTIONS[self.selection].aims_at_k:
            _require(
                1 <= self.k <= self.dict_size,
                f"k: expected 1 <= k <= dict_size = {self.dict_size}, got {self.k}",
            )
        else:
            object.__setattr__(self, "k", 0)
        _require(math.isfinite(self.eps) and self.eps >= 0, f"eps: expected >= 0, got {self.eps}")
        _require(
            math.isfinite(self.init_scale) and self.init_scale > 0,
            f"init_scale: expected > 0, got {self.init_scale}",
        )
        self._check_experts()
        _require(
            not (self.skip and self.d_model > 0 and not self.d_target),
            "skip needs a target beside the input (--target-hookpoint, or pairs of inputs and "
            "targets): an autoencoder with a linear skip would copy its input",
        )
        if OBJECTIVES[self.objective].nested:
            self._resolve_prefixes()
        if SELECTIONS[self.selection].learns_thresholds and not self.jumprelu_bandwidth:
            object.__setattr__(self, "jumprelu_bandwidth", DEFAULT_BANDWIDTH)
        for part, kinds in SAE_KINDS.items():
            kinds[getattr(self, part)].check(self)

    def _check_experts(self) -> None:
        """Raise InputError for a number of experts that the dictionary cannot have."""
        if not self.experts:
            return
        _require(self.experts > 1, "experts: expected 0 (no Switch) or at least 2, got 1")
        factored = ENCODERS[self.encoder].factored
        parts = self.heads if factored else self.dict_size
        _require(
            parts % self.experts == 0,
            f"experts: {parts} {'heads' if factored else 'latents'} cannot be spread evenly over "
            f"{self.experts} experts",
        )
        per_token = self.latents_per_token
        _require(
            self.k <= per_token,
            f"k: expected at most the {per_token} latents of one of {self.experts} experts, "
            f"got {self.k}",
        )
        _require(
            not OBJECTIVES[self.objective].nested,
            "experts cannot be nested: a prefix of the dictionary would hold the first experts "
            f"whole and the last ones not at all. Leave out experts, or objective "
            f"{self.objective!r}",
        )
        _require(
            self.eps == 0,
            "experts scale latents by the router's probability, so that eps would no longer "
            "tell a silent latent from an active one: leave one of them out",
        )

    def _resolve_heads(self) -> None:
        m, n = self.m or 4, self.n or 4
        heads = self.heads
        if not heads:
            _require(self.dict_size > 0, f"encoder {self.encoder!r} needs heads or dict_size")
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

    def _resolve_prefixes(self) -> None:
        size = self.dict_size
        first = self.matryoshka_first or min(2048, max(1, size // 16))
        object.__setattr__(self, "matryoshka_first", first)
        _require(
            self.prefixes[-1] == size,
            f"matryoshka_first: groups of {first}, {first}, {2 * first}, ... latents cannot sum to "
            f"dict_size = {size}: it must be {first} times a power of two",
        )
        if self.heads and first % (self.m * self.n):
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

    def with_widths(self, d_model: int, d_target: int) -> "SAEConfig":
        """The same with the widths of the data. Raises InputError if others are configured."""
        found = {"d_model": d_model, "d_target": d_target}
        for name, width in found.items():
            configured = getattr(self, name)
            _require(
                configured in (0, width),
                f"{name}: {configured} is configured, the data has {width or 'none'}",
            )
        return replace(self, **found)

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
        """Rows of the encoder matrix: h (m + n), or F without heads."""
        return self.heads * (self.m + self.n) or self.dict_size


def _settings_of(kind: Any, given: Any, where: str) -> Any:
    """The settings of its own that a kind has, from an instance, a mapping, or nothing."""
    if kind.Settings is None:
        _require(given is None, f"{where}: it has no settings of its own, got {given!r}")
        return None
    if given is None:
        return kind.Settings()
    if isinstance(given, Mapping):
        return from_dict(kind.Settings, dict(given), where)
    _require(
        isinstance(given, kind.Settings),
        f"{where}: expected a {kind.Settings.__name__}, got {given!r}",
    )
    return given


def kind_of(settings: Mapping[str, Any]) -> str:
    """What an SAE with these settings of `SAEConfig` is called: "KronSAE", "Switch TopK SAE", …"""
    kinds = {}
    for part, registry in SAE_KINDS.items():
        name = settings.get(part) or getattr(SAEConfig, part)
        kinds[part] = registry[name] if name in registry else None
    encoder, selection, objective = kinds.values()
    name = encoder.title if encoder else f"{settings['encoder']} SAE"
    # The usual selection of an encoder need not be said, nor what the objective says.
    silent = selection and (
        encoder
        and encoder.usual_selection == selection.title
        or objective
        and selection.title in objective.title
    )
    words = [
        "Switch" if settings.get("experts") else "",
        objective.title if objective else settings["objective"],
        "" if silent else selection.title if selection else settings["selection"],
        f"{name.removesuffix('SAE').strip()} transcoder" if settings.get("d_target") else name,
        "with a linear skip" if settings.get("skip") else "",
    ]
    return " ".join(filter(None, map(str.strip, words)))


@dataclass(frozen=True)
class DataConfig:
    """Where activations come from: a language model that reads text, or a cache of what it gave."""

    model: str = setting(
        "embedded",
        "language model: hub name or folder; 'embedded' ships with us",
        of="model",
        harvested=True,
    )
    revision: str | None = setting(
        None,
        "revision (branch, tag, commit) of the model on the hub",
        of="model",
        harvested=True,
        unless=_unless_downloaded,
    )
    layer: int | None = setting(
        None, "residual stream after this block, counted from 0", of="model"
    )
    hookpoint: str | None = setting(
        None, "name of any module instead of a layer: its output", of="model"
    )
    target_hookpoint: str | None = setting(
        None,
        "train a transcoder: predict the output of this module, which runs later, from that of "
        "layer or hookpoint",
        of="model",
    )
    activations: str | None = setting(
        None,
        "train from this cache (a folder that kronsae harvest wrote) instead of a "
        "language model and text, which it knows; --layer or --hookpoint choose, if it holds "
        "several",
        free=True,
    )
    activations_order: str = setting(
        "global",
        "order in which a cache is read: permuted over all of it, or the stream of live training",
        choices=ACTIVATIONS_ORDERS,
        unless=_unless_cached,
    )
    dataset: str = setting(
        "stdlib",
        "hub name, or text, JSONL, CSV, Parquet or Arrow files, folders and globs, separated by "
        "commas; 'stdlib' is the source text of Python's standard library",
        of="text",
        harvested=True,
    )
    dataset_config: str | None = setting(
        None,
        "configuration name of a hub dataset",
        of="text",
        harvested=True,
        unless=_unless_a_dataset,
    )
    split: str = setting(
        "train", "split of a hub dataset", of="text", harvested=True, unless=_unless_a_dataset
    )
    text_column: str = setting(
        "text", "column that holds the text", of="text", harvested=True, unless=_unless_a_dataset
    )
    streaming: bool = setting(
        False,
        "stream the dataset instead of downloading or indexing it first",
        of="text",
        harvested=True,
        unless=_unless_a_dataset,
    )
    epochs: int = setting(
        1, "how often the text (or cache) may be read before the data counts as ended"
    )
    context_length: int = setting(
        0,
        "tokens a packed context (0: 1024, or as many as the model reads if less)",
        of="reading",
        harvested=True,
    )
    contexts_per_batch: int = setting(
        32, "contexts a forward pass of the language model", of="reading", harvested=True
    )
    model_dtype: str = setting(
        "auto",
        "dtype of the language model (auto: bfloat16 on a GPU, float32 on a CPU)",
        choices=("auto", *DTYPES),
        of="reading",
        harvested=True,
        free=True,
    )
    model_device: str | None = setting(
        None,
        "device of the language model, such as a second GPU (default: that of --device)",
        free=True,
        unless=_unless_live,
    )
    overlap: str = setting(
        "auto",
        "run the language model in a thread, beside the autoencoder (auto: where it runs on a GPU; "
        "the batches are the same)",
        choices=("auto", "on", "off"),
        free=True,
        unless=_unless_live,
    )
    buffer_tokens: int = setting(
        131_072, "size of the shuffle buffer, in tokens (of a cache: what is shuffled together)"
    )
    heldout_tokens: int = setting(
        65_536,
        "tokens of text set aside before shuffling and never trained on",
        of="reading",
        harvested=True,
    )
    trust_remote_code: bool = setting(
        False,
        "run code that comes with the model from the hub",
        of="model",
        free=True,
        unless=_unless_downloaded,
    )

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
            self.target_hookpoint is None or self.target_hookpoint != self.hookpoint,
            "target_hookpoint is the hookpoint: an autoencoder predicts its input, leave it out",
        )
        _check_choices(self)
        _check_effects(self, "activations_order", "dataset_config", "streaming")

    def live(self) -> "DataConfig":
        """The model and text that a cache was harvested from, in its place: to look at more."""
        return replace(self, activations=None, activations_order="global")


@dataclass(frozen=True)
class TrainConfig:
    """How the autoencoder learns. Budgets count tokens, schedules count optimizer steps."""

    tokens: int = setting(125_000_000, "training budget, in tokens", shared=True)
    batch_size: int = setting(8192, "tokens an optimizer step", shared=True)
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
    auxk_coefficient: float = setting(
        1 / 32,
        "weight of the loss that revives dead latents",
        group="dead latents, and losses beside the error",
    )
    auxk: int = setting(
        0,
        "dead latents a token in that loss (0: d_model / 2)",
        unless=_unless_auxk,
        group="dead latents, and losses beside the error",
    )
    auxk_fraction: float = setting(
        0.25,
        "share of each batch on which that loss is measured (k / auxk times that, where it has "
        "more latents a token than the rest of the step)",
        unless=_unless_auxk_loss,
        group="dead latents, and losses beside the error",
    )
    l0_coefficient: float = setting(
        1.0,
        "jumprelu: weight of the loss (L0 / k - 1)^2 that keeps k latents a token active",
        unless=_unless_thresholds,
        group="dead latents, and losses beside the error",
    )
    balance_coefficient: float = setting(
        0.1,
        "experts: weight of the loss that spreads tokens evenly over them",
        unless=_unless_experts,
        group="dead latents, and losses beside the error",
    )
    dead_after_tokens: int = setting(
        0,
        "a latent is dead after so many tokens without firing (0: 10 M, or tokens / 10 if less, "
        "but at least 10 batches)",
        group="dead latents, and losses beside the error",
    )
    seed: int = setting(0, "seed of everything random")
    data_seed: int | None = setting(
        None, "seed of the order of the data (default: the same as --seed)", shared=True
    )
    device: str = setting(
        "auto",
        "cpu, cuda, cuda:1, ... (auto: cuda where there is one)",
        shared=True,
        free=True,
        group="device and kernels",
    )
    dtype: str = setting(
        "auto",
        "compute dtype of the SAE; weights stay float32 (auto: bfloat16 on a GPU)",
        choices=("auto", *DTYPES),
        group="device and kernels",
    )
    fused_step: str = setting(
        "auto",
        "whether gradients and AdamW are fused into kernels that write no gradient (auto: on a "
        "GPU, where they can run; on: an error where they cannot)",
        choices=("auto", "on", "off"),
        free=True,
        group="device and kernels",
    )
    cuda_graph: str = setting(
        "auto",
        "whether the fused step is one launch of a CUDA graph (auto: where that works), or of "
        "each of its kernels",
        choices=("auto", "off"),
        free=True,
        group="device and kernels",
    )
    moments: str = setting(
        "float32",
        "dtype of AdamW's moments of the two matrices; bfloat16 (fused step alone) halves their "
        "memory, by stochastic rounding",
        choices=MOMENTS,
        group="device and kernels",
    )
    tensor_parallel: int = setting(
        1,
        "processes of torchrun that hold the heads of one autoencoder together; the others share "
        "the tokens of each batch",
        shared=True,
        free=True,
        group="several processes (torchrun)",
    )
    share: str = setting(
        "tokens",
        "what processes of torchrun share out: the tokens of each batch, or the members of a "
        "sweep, each of which one process trains alone",
        choices=SHARES,
        shared=True,
        free=True,
        group="several processes (torchrun)",
    )
    rank_timeout: int = setting(
        600,
        "seconds that a process of torchrun waits for another one before it gives up",
        shared=True,
        free=True,
        group="several processes (torchrun)",
    )
    log_every: int = setting(
        10,
        "steps between two lines of metrics",
        shared=True,
        free=True,
        group="logs and checkpoints",
    )
    eval_every: int = setting(
        200,
        "steps between two evaluations on held-out tokens (0: at the end)",
        shared=True,
        free=True,
        group="logs and checkpoints",
    )
    checkpoint_every: int = setting(
        500,
        "steps between two checkpoints (0: none but the last)",
        shared=True,
        free=True,
        group="logs and checkpoints",
    )
    keep_checkpoints: int = setting(
        2, "how many checkpoints to keep", shared=True, free=True, group="logs and checkpoints"
    )
    tensorboard: bool = setting(
        False,
        "also log to TensorBoard (pip install tensorboard)",
        shared=True,
        free=True,
        group="logs and checkpoints",
    )
    wandb: str | None = setting(
        None,
        "also log to this Weights & Biases project (pip install wandb)",
        shared=True,
        free=True,
        group="logs and checkpoints",
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
        _check_choices(self)
        for name in ("warmup_fraction", "auxk_fraction"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"{name}: expected 0 to 1, got {value}")
        for name in ("seed", "data_seed"):
            value = getattr(self, name) or 0
            _require(0 <= value < 2**40, f"{name}: expected 0 to 2**40 - 1, got {value}")

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


class Setting(NamedTuple):
    """A setting of a run: a field of one of the configs, or of a registered kind's own."""

    spec: dataclasses.Field[Any]
    part: str
    """Of `RunConfig`: "sae", "data" or "train"."""
    inside: str | None = None
    """Field of SAEConfig that holds it, of a kind's own settings."""
    kind: str | None = None
    """Name of that kind."""

    def no_effect(self, settings: Mapping[str, Any]) -> str | None:
        """With what among flat settings it has no effect; None if it has one."""
        if self.inside is not None:
            which = self.inside.removesuffix("_settings")
            if settings[which] != self.kind:
                return f"{which} {settings[which]!r}"
        return no_effect(self.spec, settings)


PARTS: dict[str, type] = {"data": DataConfig, "sae": SAEConfig, "train": TrainConfig}


def all_settings() -> dict[str, Setting]:
    """Every setting that a run can have, by name; those of registered kinds among them."""
    found = {
        spec.name: Setting(spec, part)
        for part, cls in PARTS.items()
        for spec in fields(cls)
        if "help" in spec.metadata
    }
    for part, kinds in SAE_KINDS.items():
        for kind in kinds:
            for spec in fields(kinds[kind].Settings) if kinds[kind].Settings else ():
                if spec.name in found:
                    raise InputError(
                        f"{part} {kind!r}: its setting {spec.name} has the name of another one"
                    )
                found[spec.name] = Setting(spec, "sae", f"{part}_settings", kind)
    return found


def data_settings(**metadata: Any) -> tuple[str, ...]:
    """Names of the fields of `DataConfig` with this metadata: `data_settings(of="text")`."""
    return tuple(
        spec.name
        for spec in fields(DataConfig)
        if all(spec.metadata.get(name) == value for name, value in metadata.items())
    )


def without_nesting(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a part of a run, as a file holds them, with those of kinds among the others."""
    plain: dict[str, Any] = {}
    for name, value in values.items():
        if name.removesuffix("_settings") in SAE_KINDS and name not in SAE_KINDS:
            plain |= value if isinstance(value, Mapping) else {}
        else:
            plain[name] = value
    return plain


def nested(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Flat settings, by the part of `RunConfig` that they belong to."""
    known = all_settings()
    parts: dict[str, dict[str, Any]] = {part: {} for part in PARTS}
    for name, value in settings.items():
        inside = known[name].inside
        of_part = parts[known[name].part]
        (of_part if inside is None else of_part.setdefault(inside, {}))[name] = value
    return parts


def flat(part: str, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings of a part as a file holds them, without nesting. Raises InputError."""
    for part_of_sae in SAE_KINDS:
        own = values.get(f"{part_of_sae}_settings")
        if own is not None and not isinstance(own, Mapping):
            raise InputError(f"{where}: {part_of_sae}_settings: expected an object, got {own!r}")
    known, plain = all_settings(), without_nesting(values)
    for name in plain:
        if name not in known or known[name].part != part:
            raise InputError(f"{where}: {part} has no setting {name!r}")
    return plain


def _checked(spec: dataclasses.Field, value: Any, where: str) -> Any:
    kind, optional = base_type(spec)
    if kind is Any or value is None and optional:
        return value
    if kind is float and type(value) is int:
        value = float(value)
    _require(
        type(value) is kind,
        f"{where}: {spec.name} expects {kind.__name__}, got {value!r}",
    )
    return value


def base_type(spec: dataclasses.Field[Any]) -> tuple[Any, bool]:
    """Type of a config field, of one value or a tuple, and whether it may be None."""
    if isinstance(spec.type, UnionType):
        return next(kind for kind in spec.type.__args__ if kind is not type(None)), True
    return spec.type, False
