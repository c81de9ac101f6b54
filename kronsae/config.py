"""Every setting of a run, in three frozen dataclasses; flags of the command line are their fields.

`SAEConfig` configures the autoencoder, `DataConfig` its activations, `TrainConfig` the training;
`RunConfig` holds the three and is stored in a run folder's config.json. A field carries its help,
choices and conditions: see `setting`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import partial
from types import UnionType
from typing import Any, NamedTuple, get_type_hints

from kronsae.errors import InputError
from kronsae.registry import ENCODERS, OBJECTIVES, SAE_KINDS, SELECTIONS, Registry
from kronsae.system.documents import Keys, typed

COMPOSITIONS = ("mand", "relu_mul", "mul")
DECODER_NORMS = ("unit", "free")
MOMENTS = ("float32", "bfloat16", "8bit")
SHARES = ("tokens", "members")
ACTIVATIONS_ORDERS = ("global", "stream")
BEGINNINGS = ("auto", "bos", "none")
HELDOUT_ORDERS = ("sample", "first")
DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_BANDWIDTH = 0.1

LOAD_IN = ("whole", "8bit", "4bit")

MODEL_KWARGS_REFUSED = {
    **dict.fromkeys(("dtype", "torch_dtype"), "give --model-dtype"),
    **dict.fromkeys(("load_in_8bit", "load_in_4bit"), "give --load-in"),
    "device_map": "give --device-map",
    "revision": "give --revision",
    **dict.fromkeys(("trust_remote_code", "code_revision"), "give --trust-remote-code"),
    **dict.fromkeys(
        ("auto_map", "custom_generate", "use_kernels", "kernel_config", "allow_all_kernels"),
        "it can run code from the hub",
    ),
    **dict.fromkeys(
        ("use_safetensors", "weights_only", "from_tf", "from_flax", "state_dict"),
        "weights are read from safetensors or GGUF alone, as unpickling can run code",
    ),
    **dict.fromkeys(
        ("token", "use_auth_token"), "settings are stored in files: log in with `hf auth login`"
    ),
    **dict.fromkeys(
        ("pretrained_model_name_or_path", "subfolder", "gguf_file", "adapter_kwargs", "cache_dir"),
        "--model names the files (HF_HOME is where downloads are kept)",
    ),
    "ignore_mismatched_sizes": "weights of other shapes would be random",
    **dict.fromkeys(
        ("config", "output_loading_info", "return_unused_kwargs", "use_cache", "return_dict"),
        "kronsae sets it",
    ),
}
"""Arguments of from_pretrained that --model-kwargs cannot have, and why."""

OF_MACHINE = ("trust_remote_code", "device_map")
"""Settings of `DataConfig` that a command takes from its own command line alone."""

LARGEST = 2**53
"""Largest whole number of a setting: every reader of JSON knows it exactly."""
MOST_LATENTS, MOST_WIDTH = 2**35, 2**24
"""Sizes beyond which torch cannot count the bytes of a matrix."""

PAPER_DICT_SIZE = 2**15
"""Default dictionary size. [KronSAE, App. A.1]"""

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
"""Defaults with model 'embedded'; a config file and flags override them."""

Unless = Callable[[Mapping[str, Any]], str | None]
"""From flat settings (of all configs, by field) to the reason why one has no effect, or None."""


def setting(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | Registry[Any] | None = None,
    least: float = 0,
    most: float = math.inf,
    unless: Unless | None = None,
    hash: bool | None = None,
    **metadata: Any,
) -> Any:
    """A dataclass field that is a setting, with its metadata.

    help: of its flag.  choices: the allowed values.  least, most: bounds of a number.
    unless: when it has no effect; giving it then is an error.
    hash: False for values that cannot be hashed.
    metadata: `group`, the title of a group of flags.
        `free` (DataConfig, TrainConfig): it may change when a run resumes.
        `shared` (TrainConfig, SAEConfig): it is the same for all members of a sweep.
        `own` (DataConfig): members of a sweep may differ in it.
        `parse`: how the text of its flag is read (`commandline.PARSERS`).
        `of` (DataConfig): "model", "text" or "reading".
        `before`: its value in files of runs, SAEs and caches that were written before there was
        this setting (`stored`).
        `harvested` (DataConfig): a cache of activations fixes it.
        `tuned` (SAEConfig): fine-tuning may change it, because it matters in training alone.
    """
    metadata |= {"help": help, "least": least, "most": most, "unless": unless}
    if choices is not None:  # a registry, which is filled later, may be empty
        metadata["choices"] = choices
    return field(default=default, hash=hash, metadata=metadata)


def no_effect(spec: dataclasses.Field[Any], settings: Mapping[str, Any]) -> str | None:
    """Why the setting `spec` has no effect among these flat settings; None if it has."""
    unless = spec.metadata.get("unless")
    return unless and unless(settings)


def flag(name: str) -> str:
    """The flag of a setting."""
    return "--" + name.replace("_", "-")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def check_values(config: Any) -> None:
    """Hold the settings of a config dataclass to their types, choices and bounds.

    Values of like types become the type of the field: numpy's numbers, 1e6 for a whole number.
    Raises InputError for others.
    """
    hints = get_type_hints(type(config))
    for spec in fields(config):
        value = _typed(getattr(config, spec.name), spec, hints)
        object.__setattr__(config, spec.name, value)
        choices = spec.metadata.get("choices")
        if choices is not None and value not in choices:
            if isinstance(choices, Registry):
                choices[value]  # says how to register one
            raise InputError(f"{spec.name}: one of {tuple(choices)}, not {value!r}")
        if type(value) in (int, float) and "least" in spec.metadata:
            least, most = spec.metadata["least"], spec.metadata["most"]
            expected = f">= {least}" if most == math.inf else f"{least} to {most}"
            _require(
                least <= value <= most and value < math.inf,
                f"{spec.name}: expected {expected}, got {value}",
            )
            _require(
                type(value) is float or value <= LARGEST,
                f"{spec.name}: expected at most 2**53, got {value}",
            )


def _typed(value: Any, spec: dataclasses.Field[Any], hints: Mapping[str, Any]) -> Any:
    """The value of a field as its type says. Raises InputError otherwise."""
    hint = hints[spec.name]
    if hint is int and isinstance(value, float) and "help" not in spec.metadata:
        # People may write 1e6 for a setting; the fields of other documents no person writes.
        raise InputError(f"{spec.name}: expected a whole number, got {value!r}")
    try:
        return typed(value, hint, spec.name)
    except InputError as error:
        if value is None and spec.default is not MISSING:
            raise InputError(f"{error}: leave it out for its default, {spec.default!r}") from None
        raise


def _check_effects(config: Any, *names: str) -> None:
    """Raise InputError for a setting that has no effect. names: the settings to check (all)."""
    for spec in fields(config):
        reason, value = no_effect(spec, vars(config)), getattr(config, spec.name)
        if names and spec.name not in names:
            continue
        if reason is not None and value not in (spec.default, 0):
            raise InputError(f"{spec.name} has no effect with {reason}: leave it out")


def _unless_kind(part: str, attribute: str) -> Unless:
    """No effect with a kind of `part` (encoder, selection, objective) without this attribute."""

    def unless(settings: Mapping[str, Any]) -> str | None:
        name = settings[part]
        return None if getattr(SAE_KINDS[part][name], attribute) else f"{part} {name!r}"

    return unless


def _unless_nonzero(*names: str) -> Unless:
    """No effect if one of the settings `names` is 0."""

    def unless(settings: Mapping[str, Any]) -> str | None:
        return next((f"{name} 0" for name in names if not settings[name]), None)

    return unless


_unless_factored = _unless_kind("encoder", "factored")
_unless_thresholds = _unless_kind("selection", "learns_thresholds")


def _unless_mand(settings: Mapping[str, Any]) -> str | None:
    if settings["composition"] != "mand":
        return f"composition {settings['composition']!r}"
    return _unless_factored(settings)


def _with(reason: str, is_so: Callable[[Mapping[str, Any]], bool]) -> Unless:
    """No effect, for this reason, with settings of which it `is_so`."""
    return lambda settings: reason if is_so(settings) else None


_unless_transcoder = _with(
    "an autoencoder (a transcoder has a --target-hookpoint)",
    lambda settings: settings.get("target_hookpoint", "") is None,  # an SAEConfig has none
)
_unless_cached = _with(
    "a language model that is read live (a cache is named by --activations)",
    lambda settings: settings["activations"] is None,
)
_unless_live = _with(
    "--activations: no language model runs beside the autoencoder",
    lambda settings: settings["activations"] is not None,
)
_unless_downloaded = _with("model 'embedded'", lambda settings: settings["model"] == "embedded")
_unless_streamed = _with(
    "a dataset that is indexed (--streaming streams it)", lambda settings: not settings["streaming"]
)
_unless_a_dataset = _with("dataset 'stdlib'", lambda settings: settings["dataset"] == "stdlib")
_unless_text = _with(
    "--image-column (each image is a context, by its number in the dataset)",
    lambda settings: settings["image_column"] is not None,
)


def _unless_text_of_a_dataset(settings: Mapping[str, Any]) -> str | None:
    return _unless_a_dataset(settings) or _unless_text(settings)


@dataclass(frozen=True)
class SAEConfig:
    """The autoencoder: its encoder, selection, objective and experts.

    With d_target it is a transcoder, which predicts other activations than it reads.

    A Kron encoder has `heads` heads of `m` base and `n` extension pre-latents, and
    dict_size = heads * m * n. [KronSAE, eq. 2-4] Give `heads`, or `dict_size`, or both if they
    agree. Other encoders have `dict_size` rows.
    Encoder, selection and objective are registered kinds (`kronsae.registry`). A kind's own
    settings are in `…_settings`: an instance of its dataclass, or a mapping.
    Raises InputError for settings that contradict each other.
    """

    d_model: int = setting(
        0, "width of the activations (0: taken from the data)", most=MOST_WIDTH, shared=True
    )
    d_target: int = setting(
        0,
        "width of a transcoder's target (0: an autoencoder, or taken from the data)",
        most=MOST_WIDTH,
        unless=_unless_transcoder,
    )
    encoder: str = setting("kron", "kind of encoder", choices=ENCODERS)
    heads: int = setting(
        0, "heads of a Kron encoder (0: dict_size / (m n))", unless=_unless_factored
    )
    m: int = setting(0, "base pre-latents per head (Kron)", unless=_unless_factored)
    n: int = setting(0, "extension pre-latents per head (Kron)", unless=_unless_factored)
    dict_size: int = setting(0, "number of latents F = heads * m * n", most=MOST_LATENTS)
    k: int = setting(
        50,
        "active latents per token (batchtopk: on average; jumprelu: target of training)",
        unless=_unless_kind("selection", "aims_at_k"),
    )
    composition: str = setting(
        "mand",
        "how base and extension pre-latents are combined",
        choices=COMPOSITIONS,
        unless=_unless_factored,
    )
    eps: float = setting(
        0.0, "added under the root of mAND ([KronSAE, App. H] has 1e-5)", unless=_unless_mand
    )
    selection: str = setting("topk", "how active latents are chosen", choices=SELECTIONS)
    objective: str = setting("plain", "loss of the reconstruction", choices=OBJECTIVES, tuned=True)
    matryoshka_first: int = setting(
        0,
        "latents of the first and of the second Matryoshka group; each later group has twice as "
        "many as the one before (0: 2048, or dict_size / 16 if less)",
        unless=_unless_kind("objective", "nested"),
        tuned=True,
    )
    jumprelu_bandwidth: float = setting(
        0.0,
        "width of the window around a threshold in which latents contribute to its gradient, for "
        f"activations of variance 1 (0: {DEFAULT_BANDWIDTH})",
        unless=_unless_thresholds,
        tuned=True,
    )
    experts: int = setting(
        0,
        "split the dictionary into so many experts; a router gives each token one (0: no Switch)",
    )
    refine: int = setting(
        0,
        "gradient steps on the values of the selected latents, which make the reconstruction "
        "better; their size is learned (0: values are the encoder's)",
        most=16,
    )
    skip: bool = setting(
        False, "add a linear prediction from the input to a transcoder", unless=_unless_transcoder
    )
    init_scale: float = setting(
        1.0, "scale of the encoder's initial weights, times N(0, 1) / sqrt(2 dict_size)"
    )
    encoder_settings: Any = None
    selection_settings: Any = None
    objective_settings: Any = None

    def __post_init__(self) -> None:
        check_values(self)
        for part, kinds in SAE_KINDS.items():
            kind, name = getattr(self, part), f"{part}_settings"
            settings = _settings_of(kinds[kind], getattr(self, name), f"{part} {kind!r}")
            object.__setattr__(self, name, settings)
        _check_effects(self)
        if ENCODERS[self.encoder].factored:
            self._resolve_heads()
            check_values(self)
        _require(self.dict_size > 0, f"encoder {self.encoder!r} needs dict_size")
        if SELECTIONS[self.selection].aims_at_k:
            _require(
                1 <= self.k <= self.dict_size,
                f"k: expected 1 <= k <= dict_size = {self.dict_size}, got {self.k}",
            )
        else:
            object.__setattr__(self, "k", 0)
        _require(self.init_scale > 0, f"init_scale: expected > 0, got {self.init_scale}")
        self._check_experts()
        _require(
            not (self.skip and self.d_model > 0 and not self.d_target),
            "skip needs a target (--target-hookpoint, or pairs of inputs and targets): an "
            "autoencoder with a linear skip would copy its input",
        )
        if self.refine:
            self._check_refine()
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
            "experts cannot be nested: a prefix of the dictionary would hold all of the first "
            f"experts and nothing of the last. Leave out experts, or objective {self.objective!r}",
        )
        _require(
            self.eps == 0,
            "experts scale latents by the router's probability, so that eps could not tell silent "
            "from active latents: leave one of them out",
        )

    def _check_refine(self) -> None:
        """Raise InputError for an SAE whose values cannot be refined."""
        _require(
            not self.d_target,
            "refine: its steps need what is reconstructed, which a transcoder does not read: leave "
            "out refine, or the target",
        )
        _require(
            self.composition != "mul",
            "refine: its steps keep values at 0 or above, and composition 'mul' has negative ones: "
            "leave out refine, or take composition mand",
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

    def with_widths(self, d_model: int, d_target: int, starts: bool = False) -> "SAEConfig":
        """A copy with the widths of the data. Raises InputError if others are configured.

        starts: whether they are those of an SAE that training starts from.
        """
        for name, width in (("d_model", d_model), ("d_target", d_target)):
            configured = getattr(self, name)
            has = f"the SAE to start from has {configured or 'none'}" if starts else None
            _require(
                configured == width or configured == 0 and not starts,
                f"{name}: {has or f'{configured} is configured'}, the data has {width or 'none'}"
                + " (--target-hookpoint names a target)" * (name == "d_target"),
            )
        return replace(self, d_model=d_model, d_target=d_target)

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Ends of the nested prefixes of the dictionary in a Matryoshka SAE. [KronSAE, App. A.1]

        Groups have first, first, 2 first, 4 first, ... latents, so each end is twice the last.
        """
        ends = [self.matryoshka_first]
        while ends[-1] < self.dict_size:
            ends.append(2 * ends[-1])
        return tuple(ends)

    @property
    def latents_per_token(self) -> int:
        """Latents that a token's are selected from: the dictionary's, or one expert's."""
        return self.dict_size // max(1, self.experts)

    @property
    def d_out(self) -> int:
        """Width of the output: d_target of a transcoder, otherwise d_model."""
        return self.d_target or self.d_model

    @property
    def encoder_rows(self) -> int:
        """Rows of the encoder matrix: heads (m + n), or dict_size where each latent has its own."""
        return ENCODERS[self.encoder].rows(self)

    @property
    def matrix_entries(self) -> int:
        """Numbers in the encoder's and the decoder's matrix, which nearly all parameters are."""
        return self.encoder_rows * self.d_model + self.dict_size * self.d_out


def _settings_of(kind: Any, values: Any, where: str) -> Any:
    """A kind's own settings, from an instance, a mapping, or None (its defaults)."""
    if kind.Settings is None:
        _require(values is None, f"{where}: it has no settings of its own, got {values!r}")
        return None
    if values is None or isinstance(values, Mapping):
        return from_dict(kind.Settings, {} if values is None else values, where)
    typed(values, kind.Settings, where)
    check_values(values)
    return values


def kind_of(settings: Mapping[str, Any]) -> str:
    """Name of an SAE with these settings of `SAEConfig`: "KronSAE", "Switch TopK SAE", …"""
    kinds = {}
    for part, registry in SAE_KINDS.items():
        name = settings.get(part) or getattr(SAEConfig, part)
        kinds[part] = registry[name] if name in registry else None
    encoder, selection, objective = kinds.values()
    name = encoder.title if encoder else f"{settings['encoder']} SAE"
    # The encoder's usual selection is left out, and one that the objective's title names.
    silent = selection and (
        encoder
        and encoder.usual_selection == selection.title
        or objective
        and selection.title in objective.title
    )
    words = [
        "Refined" if settings.get("refine") else "",
        "Switch" if settings.get("experts") else "",
        objective.title if objective else settings["objective"],
        "" if silent else selection.title if selection else settings["selection"],
        f"{name.removesuffix('SAE').strip()} transcoder" if settings.get("d_target") else name,
        "with a linear skip" if settings.get("skip") else "",
    ]
    return " ".join(filter(None, map(str.strip, words)))


_of_model = partial(setting, of="model")
_of_text = partial(setting, of="text", harvested=True)
_of_reading = partial(setting, of="reading", harvested=True)


@dataclass(frozen=True)
class DataConfig:
    """Source of activations: a language model that reads text, or a cache of its activations."""

    model: str = _of_model(
        "embedded", "language model: hub name, folder, or 'embedded' (a small one)", harvested=True
    )
    revision: str | None = _of_model(
        None,
        "revision (branch, tag, commit) of the model on the hub",
        harvested=True,
        unless=_unless_downloaded,
    )
    layer: int | None = _of_model(
        None,
        "read the residual stream after this block, counted from 0; several (3 6 9, 0-11, all) "
        "train an autoencoder at each, in one pass of the language model",
        own=True,
        parse="layers",
    )
    hookpoint: str | None = _of_model(
        None,
        "read this instead of a layer: the output of a module (NAME), its input (NAME:input), or a "
        "site of block N (N.resid_pre, N.attn_z, N.attn_out, N.resid_mid, N.mlp_in, N.mlp_out, "
        "N.resid_post, or TransformerLens' name); or several, and all that match a pattern such as "
        "'model.layers.*.mlp' or '*.attn_z'",
        own=True,
    )
    target_hookpoint: str | None = _of_model(
        None,
        "train a transcoder: predict this hookpoint, which is computed later, from the layer or "
        "hookpoint (several: one for each of these)",
        own=True,
    )
    activations: str | None = setting(
        None,
        "train from this cache (a folder that kronsae harvest wrote, or its URL) instead of a "
        "language model and text; if it has several hookpoints, choose one by --layer or "
        "--hookpoint. socket:HOST:PORT and stdin: are activations that another program sends; "
        "NAME:REST is a source that a plugin registers",
        free=True,
    )
    activations_order: str = setting(
        "global",
        "order in which a cache is read: permuted over all of it, or the stream of live training",
        choices=ACTIVATIONS_ORDERS,
        unless=_unless_cached,
    )
    activations_tokens: int = setting(
        0,
        "train on the first so many tokens of a cache (0: on all that it has now, which a run "
        "keeps to when the harvest goes on)",
        before=0,
        unless=_unless_cached,
    )
    dataset: str = _of_text(
        "stdlib",
        "hub name, or text, JSONL, CSV, Parquet or Arrow files, folders and globs, separated by "
        "commas; 'stdlib' is the source of Python's standard library",
    )
    dataset_config: str | None = _of_text(
        None, "configuration name of a hub dataset", unless=_unless_a_dataset
    )
    split: str = _of_text("train", "split of a hub dataset", unless=_unless_a_dataset)
    text_column: str = _of_text(
        "text",
        "column that holds the text: strings, lists of token ids, or lists of messages with role "
        "and content, which the model's chat template renders",
        unless=_unless_text_of_a_dataset,
    )
    image_column: str | None = _of_text(
        None,
        "read the images of this column by a vision model (ViT, CLIP's vision tower, SigLIP, "
        "DINOv2), and train on the activations of their patches; of image files, or a folder of "
        "them, it is 'image'",
        unless=_unless_a_dataset,
        before=None,
    )
    chat_roles: str = _of_text(
        "",
        "train and evaluate on the messages of these roles alone, separated by commas, such as "
        "assistant (default: all; tokens of the chat template itself never are)",
        unless=_unless_text_of_a_dataset,
        before="",
    )
    streaming: bool = _of_text(
        False,
        "stream the dataset instead of downloading or indexing it first",
        unless=_unless_text_of_a_dataset,
    )
    shuffle_documents: int = _of_text(
        10_000,
        "documents of a stream that are shuffled together (0: none are), of which the first ones "
        "give the held-out text",
        unless=_unless_streamed,
        before=0,
    )
    heldout_order: str = _of_text(
        "sample",
        "which documents are held out: drawn from all of them by a fixed seed (sample), or the "
        "first ones",
        choices=HELDOUT_ORDERS,
        unless=_unless_a_dataset,
        before="first",
    )
    epochs: int = setting(1, "how often the text (or cache) may be read", least=1)
    context_length: int = _of_reading(
        0, "tokens per packed context (0: 1024, or as many as the model reads if less)"
    )
    bos: str = _of_reading(
        "auto",
        "how each context begins: as the tokenizer begins a text (auto), with its BOS token (bos), "
        "without a special token (none), or with the tokens of a text, such as '<|im_start|>' or "
        "'[gMASK]<sop>'",
        before="auto",
        unless=_unless_text,
    )
    join_documents: bool = _of_reading(
        True,
        "fill contexts with one document after another; otherwise each holds one document, or a "
        "part of it, and is padded",
        before=True,
        unless=_unless_text,
    )
    exclude_tokens: str = _of_reading(
        "",
        "tokens that are never trained or evaluated on, as special tokens are not: ids, or texts "
        "of one token, separated by commas",
        before="",
        unless=_unless_text,
    )
    contexts_per_batch: int = _of_reading(
        32, "contexts per forward pass of the language model", least=1
    )
    model_dtype: str = _of_reading(
        "auto",
        "dtype of the language model (auto: bfloat16 on a GPU, and on a CPU with instructions for "
        "it if the model's weights are bfloat16; else float32)",
        choices=("auto", *DTYPES),
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
        "run the language model in a thread while the autoencoder trains (auto: if it runs on a "
        "GPU; the batches are the same)",
        choices=("auto", "on", "off"),
        free=True,
        unless=_unless_live,
    )
    buffer_tokens: int = setting(
        131_072,
        "tokens in the shuffle buffer (of a cache: tokens that are shuffled together)",
        least=1,
    )
    heldout_tokens: int = _of_reading(
        65_536, "tokens of text held out before shuffling, for evaluation", least=1
    )
    trust_remote_code: bool = _of_model(
        False,
        "run code that comes with the model from the hub",
        free=True,
        unless=_unless_downloaded,
    )
    model_kwargs: dict[str, Any] | None = _of_model(
        None,
        "more arguments for transformers' from_pretrained, and values that replace those of the "
        'model\'s config.json, as a JSON object: \'{"attn_implementation": "eager"}\'',
        harvested=True,
        parse="json",
        hash=False,
        before=None,
    )
    load_in: str = _of_model(
        LOAD_IN[0],
        "round the model's matrices to 8 or 4 bits, for a half or a quarter of the memory of "
        "bfloat16 (pip install bitsandbytes accelerate)",
        choices=LOAD_IN,
        harvested=True,
        before=LOAD_IN[0],
    )
    device_map: str | None = _of_model(
        None,
        "spread the model over all devices, or leave parts in memory or on the disk: auto, "
        "balanced, balanced_low_0, sequential, or a device (pip install accelerate)",
        free=True,
        unless=_unless_live,
    )

    def __post_init__(self) -> None:
        check_values(self)
        check_model_kwargs(self.model_kwargs or {})
        _require(
            self.device_map is None or self.model_device is None,
            "device_map and model_device exclude each other: give one",
        )
        _require(
            self.layer is None or self.hookpoint is None,
            "layer and hookpoint exclude each other: give one",
        )
        _require(
            self.context_length == 0 or self.context_length >= 2,
            f"context_length: expected 0 or >= 2, got {self.context_length}",
        )
        _require(
            bool(self.bos) and (self.bos in BEGINNINGS or self.bos.lower() not in BEGINNINGS),
            f"bos: expected {', '.join(BEGINNINGS)} or the text of tokens, got {self.bos!r}",
        )
        _require(
            self.target_hookpoint is None or self.target_hookpoint != self.hookpoint,
            "target_hookpoint is the hookpoint: an autoencoder predicts its input, leave it out",
        )
        _check_effects(
            self,
            *("activations_order", "activations_tokens"),
            *("dataset_config", "split", "streaming", "text_column", "shuffle_documents"),
            *("chat_roles", "image_column", "bos", "join_documents", "exclude_tokens"),
        )
        _require(
            not self.streaming or self.shuffle_documents > 0 or self.heldout_order == "first",
            "shuffle_documents 0: the held-out documents of a stream that is not shuffled are its "
            "first ones, so give heldout_order first as well",
        )

    def live(self) -> "DataConfig":
        """A copy that reads the language model and text of a cache instead of the cache.

        Activations of a plugin's source have none: then it is the same.
        """
        if self.activations == self.model:
            return self
        return replace(self, activations=None, activations_order="global", activations_tokens=0)


def check_model_kwargs(kwargs: Mapping[str, Any]) -> None:
    """Raise InputError for arguments of from_pretrained that kronsae sets, or that could run code.

    kwargs: a JSON object; arguments inside of others, such as text_config, are checked, too.
    """
    for name, value in kwargs.items():
        reason = MODEL_KWARGS_REFUSED.get(name)
        if reason is None and name.startswith("_"):
            reason = "it is internal to transformers"
        if reason is None and name.endswith("_implementation") and "/" in str(value):
            reason = f"{value!r} is code from the hub"
        _require(reason is None, f"model_kwargs: {name} cannot be given: {reason}")
        if isinstance(value, Mapping):
            check_model_kwargs(value)


_of_losses = partial(setting, group="dead latents, and losses beside the error")
_of_device = partial(setting, group="device and kernels")
_of_processes = partial(setting, shared=True, free=True, group="several processes (torchrun)")
_of_logs = partial(setting, shared=True, free=True, group="logs and checkpoints")


@dataclass(frozen=True)
class TrainConfig:
    """Training of the autoencoder. Budgets count tokens, schedules count optimizer steps."""

    tokens: int = setting(125_000_000, "training budget, in tokens", shared=True, least=1)
    batch_size: int = setting(8192, "tokens per optimizer step", shared=True, least=1)
    lr: float = setting(8e-4, "peak learning rate of AdamW")
    lr_final: float = setting(1e-6, "learning rate at the end of the cosine")
    encoder_lr_ratio: float = setting(
        1.0,
        "learning rate of the encoder's matrix (not its bias), in multiples of that of all other "
        "parameters (0: it stays as it is)",
    )
    lr_scale_by_dict_size: bool = setting(False, "multiply lr by 1 / sqrt(dict_size / 2**15)")
    warmup_fraction: float = setting(0.1, "share of the steps with linear warm-up", most=1)
    k_start: int = setting(
        0,
        "active latents per token in the first step, from where they go linearly to k (0: k)",
        unless=_unless_kind("selection", "aims_at_k"),
    )
    k_fraction: float = setting(
        0.1, "share of the steps in which they do", most=1, unless=_unless_nonzero("k_start")
    )
    adam_beta2: float = setting(0.999, "AdamW's beta2, the decay of its second moment")
    weight_decay: float = setting(0.0, "weight decay of AdamW (on the encoder's weights)")
    decoder_norm: str = setting(
        "unit", "keep decoder rows at unit norm, or leave them free", choices=DECODER_NORMS
    )
    max_grad_norm: float = setting(
        0.0,
        "clip the gradient's norm to this (0: no clipping), and skip a batch if it is not finite",
    )
    massive_multiple: float = setting(
        10.0,
        "leave tokens out whose activation is farther from the mean than so many times the median "
        "distance, such as attention sinks (2 or more; 0 leaves none out)",
        shared=True,
        before=0.0,
    )
    auxk_coefficient: float = _of_losses(1 / 32, "weight of the loss that revives dead latents")
    auxk: int = _of_losses(
        0,
        "dead latents per token in that loss (0: d_model / 2)",
        unless=_unless_nonzero("auxk_coefficient", "auxk_fraction"),
    )
    auxk_fraction: float = _of_losses(
        0.25,
        "share of each batch on which that loss is computed (times k / auxk where auxk is larger)",
        most=1,
        unless=_unless_nonzero("auxk_coefficient"),
    )
    l0_coefficient: float = _of_losses(
        1.0,
        "jumprelu: weight of the loss (L0 / k - 1)^2 that keeps k latents per token active",
        unless=_unless_thresholds,
    )
    l0_rate: float = _of_losses(
        0.05,
        "jumprelu: after each step all log thresholds move by this times (L0 / k - 1), so that L0 "
        "comes to k",
        most=1,
        unless=_unless_thresholds,
        before=0.0,
    )
    balance_coefficient: float = _of_losses(
        0.1,
        "experts: weight of the loss that spreads tokens evenly over them",
        unless=_unless_nonzero("experts"),
    )
    dead_after_tokens: int = _of_losses(
        0,
        "tokens without firing after which a latent is dead (0: 10 M, or tokens / 10 if less, but "
        "at least 10 batches)",
    )
    seed: int = setting(0, "seed of everything random", most=2**40 - 1)
    data_seed: int | None = setting(
        None, "seed of the order of the data (default: --seed)", shared=True, most=2**40 - 1
    )
    device: str = _of_device(
        "auto",
        "cpu, cuda, cuda:1, ..., or mps (auto: cuda if there is one)",
        shared=True,
        free=True,
    )
    dtype: str = _of_device(
        "auto",
        "compute dtype of the SAE; weights stay float32 (auto: bfloat16 on a GPU)",
        choices=("auto", *DTYPES),
    )
    fused_step: str = _of_device(
        "auto",
        "fuse gradients and AdamW into kernels that write no gradient (auto: on a GPU, if they can "
        "run; on: an error if they cannot)",
        choices=("auto", "on", "off"),
        free=True,
    )
    cuda_graph: str = _of_device(
        "auto",
        "launch the fused step as one CUDA graph (auto: if possible) instead of kernel by kernel",
        choices=("auto", "off"),
        free=True,
    )
    moments: str = _of_device(
        "float32",
        "dtype of AdamW's moments of the two matrices; bfloat16 halves their memory, by stochastic "
        "rounding, and 8bit quarters it, without the fused step (pip install bitsandbytes)",
        choices=MOMENTS,
    )
    tensor_parallel: int = _of_processes(
        1,
        "number of torchrun processes that share the heads of one autoencoder; groups of these "
        "share the tokens of each batch",
        least=1,
    )
    share: str = _of_processes(
        "tokens",
        "whether torchrun processes share the tokens of each batch, or each trains some members of "
        "a sweep alone",
        choices=SHARES,
    )
    rank_timeout: int = _of_processes(
        600,
        "seconds that a torchrun process waits for another one before it gives up",
        least=1,
        most=10**9,
    )
    log_every: int = _of_logs(10, "steps between two lines of metrics", least=1)
    eval_every: int = _of_logs(
        200, "steps between two evaluations on held-out tokens (0: only at the end)"
    )
    final_tokens: int = _of_logs(
        0,
        "held-out tokens of the final evaluation, at least one context (0: all of them)",
        unless=_with(
            "--no-final-evaluation", lambda settings: not settings.get("final_evaluation", True)
        ),
    )
    final_evaluation: bool = _of_logs(True, "evaluate on held-out text at the end")
    checkpoint_every: int = _of_logs(500, "steps between two checkpoints (0: only the last)")
    keep_checkpoints: int = _of_logs(2, "number of checkpoints to keep", least=1)
    tensorboard: bool = _of_logs(False, "also log to TensorBoard (pip install tensorboard)")
    wandb: str | None = _of_logs(
        None, "also log to this Weights & Biases project (pip install wandb)"
    )
    trackio: str | None = _of_logs(None, "also log to this trackio project (pip install trackio)")

    def __post_init__(self) -> None:
        check_values(self)
        _require(
            self.massive_multiple == 0 or self.massive_multiple >= 2,
            f"massive_multiple: expected 0 (none) or >= 2, got {self.massive_multiple}",
        )
        _require(
            self.k_fraction > 0 or not self.k_start,
            f"k_fraction: expected more than 0 beside k_start {self.k_start}, got 0",
        )
        _require(self.adam_beta2 < 1, f"adam_beta2: expected 0 <= beta < 1, got {self.adam_beta2}")

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole budget; the last batch may be smaller."""
        return math.ceil(self.tokens / self.batch_size)

    @property
    def stream_seed(self) -> int:
        """Seed of the order of the data; `seed` is that of the weights."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def dead_after(self) -> int:
        """Tokens without firing after which a latent counts as dead."""
        default = max(min(10_000_000, self.tokens // 10), 10 * self.batch_size)
        return self.dead_after_tokens or default


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run."""

    sae: SAEConfig
    data: DataConfig
    train: TrainConfig

    def to_dict(self) -> dict[str, dict[str, Any]]:
        return {part.name: dataclasses.asdict(getattr(self, part.name)) for part in fields(self)}


def from_dict(cls: type, values: Any, where: str) -> Any:
    """`cls(**values)` for a config dataclass. Raises InputError, which begins with `where`.

    That is so for values that are no mapping, for unknown and missing keys, and for wrong types.
    """
    try:
        values = typed(values, dict, "settings")
        known, hints = {spec.name: spec for spec in fields(cls)}, get_type_hints(cls)
        unknown = sorted(values.keys() - known.keys())
        _require(not unknown, f"unknown settings {unknown}; known are {sorted(known)}")
        for spec in known.values():
            required = spec.default is MISSING and spec.default_factory is MISSING
            _require(not required or spec.name in values, f"{spec.name} is missing")
        config = cls(**{name: _typed(value, known[name], hints) for name, value in values.items()})
        check_values(config)
    except InputError as error:
        raise InputError(f"{where}: {error}" if where else str(error)) from error
    return config


def values_of(cls: type, *required: str, null: bool = False) -> Keys:
    """Type hints of the settings of a config dataclass, as they are in files.

    required: those that no file lacks.  null: whether null may be in their place.
    A kind's own settings are an object.
    """
    hints = get_type_hints(cls) | {f"{part}_settings": dict[str, Any] | None for part in SAE_KINDS}
    return Keys({name: hints[name] for name in required}, hints, null)


def run_settings(partial: bool = False) -> Keys:
    """Type hints of the settings of a run, as they are in its files.

    partial: any of them, and of their parts, may be missing.
    """
    parts = {
        "sae": values_of(SAEConfig, *(() if partial else ("d_model", "dict_size"))),
        "data": values_of(DataConfig, null=True),  # of one that was trained from tensors
        "train": values_of(TrainConfig),
    }
    return Keys({}, parts) if partial else Keys(parts)


def stored(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a config dataclass from a file of a run, an SAE or a cache.

    Files of earlier versions lack some. These get the values that the versions went by.
    """
    known = {s.name: s.metadata["before"] for s in fields(cls) if "before" in s.metadata}
    return {**known, **values}


def with_defaults(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """`stored`, and the defaults of all other settings that the file lacks."""
    return {**{spec.name: spec.default for spec in fields(cls)}, **stored(cls, values)}


def untrusted(data: dict[str, Any]) -> dict[str, Any]:
    """Settings of `DataConfig` from a file, without `OF_MACHINE`.

    Only the user may allow code from the hub, or files of weights in a folder that --model-kwargs
    names: anyone may have made the file.
    """
    return {name: value for name, value in data.items() if name not in OF_MACHINE}


class Setting(NamedTuple):
    """A setting of a run: a field of one of the configs, or of a registered kind's own."""

    spec: dataclasses.Field[Any]
    part: str
    """Part of `RunConfig`: "sae", "data" or "train"."""
    inside: str | None = None
    """For a kind's own setting, the field of SAEConfig that holds it."""
    kind: str | None = None
    """Name of that kind."""
    hint: Any = Any
    """Its type."""

    def no_effect(self, settings: Mapping[str, Any]) -> str | None:
        """Why it has no effect among these flat settings; None if it has."""
        if self.inside is not None:
            which = self.inside.removesuffix("_settings")
            if settings[which] != self.kind:
                return f"{which} {settings[which]!r}"
        return no_effect(self.spec, settings)


PARTS: dict[str, type] = {"data": DataConfig, "sae": SAEConfig, "train": TrainConfig}


def all_settings() -> dict[str, Setting]:
    """Every setting of a run by name, with those of registered kinds."""
    known = {
        spec.name: Setting(spec, part, hint=hint)
        for part, cls in PARTS.items()
        for spec, hint in zip(fields(cls), get_type_hints(cls).values(), strict=True)
        if "help" in spec.metadata
    }
    for part, kinds in SAE_KINDS.items():
        for kind in kinds:
            own = kinds[kind].Settings
            hints = get_type_hints(own) if own else {}
            for spec in fields(own) if own else ():
                if spec.name in known:
                    raise InputError(
                        f"{part} {kind!r}: its setting {spec.name} has the name of another one"
                    )
                hint = hints[spec.name]
                known[spec.name] = Setting(spec, "sae", f"{part}_settings", kind, hint)
    return known


def data_settings(**metadata: Any) -> tuple[str, ...]:
    """Names of the fields of `DataConfig` with this metadata: `data_settings(of="text")`."""
    return tuple(
        spec.name
        for spec in fields(DataConfig)
        if all(spec.metadata.get(name) == value for name, value in metadata.items())
    )


def without_nesting(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a part of a run as in a file, with those of kinds on the same level."""
    plain: dict[str, Any] = {}
    for name, value in values.items():
        if name.removesuffix("_settings") in SAE_KINDS and name not in SAE_KINDS:
            plain |= value if isinstance(value, Mapping) else {}
        else:
            plain[name] = value
    return plain


def nested(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Flat settings by part of `RunConfig`, nested as in a file."""
    known = all_settings()
    parts: dict[str, dict[str, Any]] = {part: {} for part in PARTS}
    for name, value in settings.items():
        inside = known[name].inside
        of_part = parts[known[name].part]
        (of_part if inside is None else of_part.setdefault(inside, {}))[name] = value
    return parts


def flat(part: str, values: Any, where: str) -> dict[str, Any]:
    """Settings of a part as in a file, without nesting.

    Raises InputError for unknown ones, and for wrong types.
    """
    values = typed(values, dict, f"{where}: {part}")
    for part_of_sae, registry in SAE_KINDS.items():
        if part_of_sae in values:
            registry[values[part_of_sae]]  # says how to register one that is not known
        own = f"{part_of_sae}_settings"
        typed(values.get(own), dict | None, f"{where}: {own}")
    known, plain = all_settings(), without_nesting(values)
    for name in plain:
        if name not in known or known[name].part != part:
            raise InputError(f"{where}: {part} has no setting {name!r}")
    return {name: typed(v, known[name].hint, f"{where}: {name}") for name, v in plain.items()}


def base_type(spec: dataclasses.Field[Any]) -> tuple[Any, bool]:
    """Type of a config field, and whether it may be None."""
    if isinstance(spec.type, UnionType):
        return next(kind for kind in spec.type.__args__ if kind is not type(None)), True
    return spec.type, False
