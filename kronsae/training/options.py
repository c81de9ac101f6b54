"""The command line of `kronsae train`, made from the config dataclasses.

Precedence: defaults < the embedded preset (with model 'embedded') < --config file < flags < entry
of the --sweep file. A sweep has a member for each entry of the file, combined with each combination
of values of flags that have several.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kronsae.commandline import Parser, add_flag, shown
from kronsae.config import (
    EMBEDDED,
    PAPER_DICT_SIZE,
    PARTS,
    DataConfig,
    RunConfig,
    SAEConfig,
    all_settings,
    flag,
    flat,
    from_dict,
    nested,
    stored,
    untrusted,
)
from kronsae.errors import InputError
from kronsae.model.flops import equal_budget, flops_per_token
from kronsae.model.sae import SAE
from kronsae.runs.folder import FORMAT_VERSION, SINGLE, SweepFolder, whole
from kronsae.runs.resume import open_to_resume
from kronsae.runs.sweep import (
    check_names,
    hookpoints_of,
    name_of,
    one_stream,
    own_settings,
    product,
)
from kronsae.sources import source_of
from kronsae.system import parallel
from kronsae.system.checkpoint import list_checkpoints
from kronsae.system.documents import part_of, read_json
from kronsae.system.files import usable_path
from kronsae.system.parallel import Mesh
from kronsae.training.hookpoints import NAMES, expand, is_pattern
from kronsae.training.start import Starts, settings_of

OTHER_NAMES = {
    "--architecture": "--encoder and --selection: 'standard' is --encoder dense --selection relu, "
    "'gated' is --encoder gated --selection relu, 'topk' is --encoder dense --selection topk",
    "--activation": "--selection NAME",
    "--expansion-factor": "--dict-size N, the number of latents: expansion factor times d_model",
    "--d-sae": "--dict-size N",
    "--num-latents": "--dict-size N",
    "--d-in": "taken from the model (--d-model N checks it)",
    "--hook-name": "--layer N (blocks.N.hook_resid_post is --layer N), or --hookpoint NAME: "
    "TransformerLens' name (blocks.N.attn.hook_z), or a module of the transformers model",
    "--hookpoints": "--hookpoint NAME ..., also patterns such as 'model.layers.*.mlp'",
    "--layers": "--layer N ..., also 0-11 or all",
    "--model-name": "--model NAME",
    "--dataset-path": "--dataset NAME",
    "--training-tokens": "--tokens N",
    "--max-tokens": "--tokens N",
    "--train-batch-size-tokens": "--batch-size N, in tokens",
    "--context-size": "--context-length N",
    "--ctx-len": "--context-length N",
    "--auxk-alpha": "--auxk-coefficient X",
    "--dead-feature-threshold": "--dead-after-tokens N",
    "--run-name": "--out DIR",
    "--log-to-wandb": "--wandb PROJECT",
    "--transcode": "--target-hookpoint NAME",
}
"""Flags of SAELens, sparsify and dictionary_learning (also written with _), and ours for each."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A parsed command line."""

    members: dict[str, RunConfig]
    """Configurations to train, by name: several in a sweep, which share one stream."""
    sweep: bool
    out: Path | None
    """Run folder to make; None: a new one under runs/."""
    resume: Path | None
    """Run folder to go on with."""
    plan: bool
    """Only print the plan."""
    memory_check: bool = True
    """Refuse a run that needs far more memory than is free."""
    iso_flops_of: dict[str, SAEConfig] | None = None
    """For each member the autoencoder whose FLOPs on config.train.tokens are its budget."""
    notes: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """For each member the entries of its config.json beside its settings."""
    starts: dict[str, SAE] = dataclasses.field(default_factory=dict)
    """For each member that is fine-tuned the SAE that it starts from."""

    @property
    def config(self) -> RunConfig:
        """Configuration of the first member; what members share is the same in all."""
        return next(iter(self.members.values()))

    @property
    def hookpoints(self) -> dict[str, str]:
        """A name for the hookpoint of each member; "" if all read the same."""
        return hookpoints_of({name: config.data for name, config in self.members.items()})

    @property
    def data(self) -> dict[str, DataConfig]:
        """The settings of the activations of each hookpoint, by its name."""
        hookpoints = self.hookpoints
        return {hookpoints[name]: config.data for name, config in self.members.items()}

    def owners(self, mesh: Mesh) -> dict[str, int]:
        """The rank that trains each member alone, by its name; see `parallel.owners`."""
        layout = mesh.data.size, mesh.heads.size
        return parallel.owners(self.hookpoints, self.config.train.share, layout)

    def receivers(self, mesh: Mesh) -> dict[str, set[int]] | None:
        """The ranks that train on each hookpoint, by its name; None if all do."""
        owners = self.owners(mesh)
        ranks: dict[str, set[int]] = {}
        for name, hookpoint in self.hookpoints.items():
            ranks.setdefault(hookpoint, set()).add(owners.get(name, 0))
        return ranks if owners else None

    @property
    def starts_from(self) -> str:
        """The SAE whose weights training starts from, in words; "" for random weights."""
        notes = [note["finetune"] for note in self.notes.values() if "finetune" in note]
        sources = dict.fromkeys(note.get("source", "an SAE given in Python") for note in notes)
        several = len({note["sha256"] for note in notes}) > 1
        return ", ".join(sources) + (", each member from an SAE of its own" if several else "")

    def starting_from(self, starts: Starts) -> "Request":
        """The request with the SAE that each member starts from, and a note about it."""
        of_members = {}
        for name, config in self.members.items():
            own = flat("sae", dataclasses.asdict(config.sae), "")
            of_members[name] = starts.at(vars(config.data), own)
            starts.check_place(of_members[name], config.data)
        notes = {name: {"finetune": starts.note(sae)} for name, sae in of_members.items()}
        return dataclasses.replace(self, notes=notes, starts=of_members)

    def at_widths(self, widths: Mapping[str, tuple[int, int]]) -> "Request":
        """The request with widths of the activations, and token budgets for --iso-flops-of.

        widths: (d_model, d_target) of each hookpoint.
        Raises InputError if another width is configured, or if the budgets of members differ.
        """
        members, notes, hookpoints = {}, dict(self.notes), self.hookpoints
        for name, config in self.members.items():
            d_model, d_target = widths[hookpoints[name]]
            sae = config.sae.with_widths(d_model, d_target, starts=name in self.starts)
            train = config.train
            if self.iso_flops_of:
                reference = self.iso_flops_of[name].with_widths(d_model, d_target)
                tokens = _equal_flops(train.tokens, reference, sae)
                budget = {"sae": dataclasses.asdict(reference), "tokens": train.tokens}
                notes[name] = {**notes.get(name, {}), "iso_flops_of": budget}
                train = dataclasses.replace(train, tokens=tokens)
            members[name] = dataclasses.replace(config, sae=sae, train=train)
        budgets = {name: config.train.tokens for name, config in members.items()}
        if len(set(budgets.values())) > 1:
            listed = ", ".join(f"{name} {tokens:,}" for name, tokens in budgets.items())
            raise InputError(
                "--iso-flops-of gives the members of the sweep different numbers of tokens "
                f"({listed}), but they learn from one stream: train them one by one"
            )
        return dataclasses.replace(self, members=members, iso_flops_of=None, notes=notes)


def _equal_flops(tokens: int, reference: SAEConfig, sae: SAEConfig) -> int:
    """Number of tokens on which `sae` spends as many FLOPs as `reference` on `tokens`."""
    of_reference, own = flops_per_token(reference), flops_per_token(sae)
    if of_reference == own:
        raise InputError(f"--iso-flops-of has no effect: both spend {own:,} multiply-adds a token")
    return equal_budget(tokens, of_reference, own)


def make_parser() -> Parser:
    """A parser with a flag for each field of the configs, and those of the run itself."""
    parser = Parser(
        "train",
        "Train a sparse autoencoder on a language model's activations. Without flags it trains on "
        "a small model and text that are on this computer, in two to four minutes.",
        "kronsae train\n"
        "kronsae train --model EleutherAI/pythia-160m --layer 6 --tokens 500M \\\n"
        "    --dataset HuggingFaceFW/fineweb-edu --streaming --dict-size 32768 --k 50",
        OTHER_NAMES,
        usage="%(prog)s [--model NAME --layer N --dataset NAME --tokens N ...]",
        argument_default=argparse.SUPPRESS,
    )
    _add_run_flags(parser.add_argument_group("run"))
    titles = {
        "data": "language model and text",
        "sae": "autoencoder",
        "train": "training",
    }
    groups: dict[str, Any] = {}
    own = own_settings()
    for name, setting in all_settings().items():
        title = setting.spec.metadata.get("group", titles[setting.part])
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        default = _default_of(name, setting.spec)
        add_flag(groups[title], setting.spec, several=name in own, default=default)
    return parser


def _add_run_flags(run: Any) -> None:
    """Add the flags that are no settings."""
    run.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: under runs/)")
    run.add_argument("--resume", type=Path, metavar="DIR", help="go on with the run in DIR")
    run.add_argument("--config", type=Path, metavar="FILE", help="settings, as in a config.json")
    run.add_argument("--plan", action="store_true", help="say what would run, and stop")
    run.add_argument(
        "--sweep",
        type=Path,
        metavar="FILE",
        help="train several autoencoders on one stream of activations: a JSON list with an object "
        'of settings for each, such as {"m": 2, "lr": 0.001, "name": "thin"}. Flags that take '
        "several values (N ...) make a sweep, too: one autoencoder for each combination",
    )
    run.add_argument(
        "--finetune",
        metavar="SAE",
        help="start from the weights of this SAE, which also decides what it is: a run, a folder "
        "or hub repository of any format that is read, or one of the SAEs in it (RUN/NAME); of a "
        "suite each member starts from the SAE at its hookpoint",
    )
    run.add_argument(
        "--allow-pickle",
        action="store_true",
        help="--finetune: read weights that are a pickle, from which only tensors are loaded",
    )
    run.add_argument(
        "--iso-flops-of",
        metavar="CONFIG",
        help="train on as many tokens as cost the FLOPs of another autoencoder on --tokens: the "
        "config.json of a run or an SAE, or 'topk' for a dense one of the same dict_size and k",
    )
    run.add_argument(
        "--no-memory-check",
        action="store_true",
        help="start even if the plan needs far more memory than is free",
    )


def _default_of(name: str, spec: dataclasses.Field[Any]) -> str | None:
    """The default that a help text shows, if it is not the field's own alone."""
    usual = {"dict_size": shown(PAPER_DICT_SIZE), "m": "4", "n": "4"}.get(name)
    usual = usual or (shown(spec.default) if spec.default else "")
    if name not in EMBEDDED or usual == shown(EMBEDDED[name]):
        return usual or None
    of_embedded = f"{shown(EMBEDDED[name])} with --model embedded"
    return f"{usual}; {of_embedded}" if usual else of_embedded


def parse(argv: list[str] | None = None) -> Request:
    """The request in `argv`. Raises InputError for anything wrong or without effect."""
    parser = make_parser()
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        raise InputError(_unknown(unknown[0], parser, sys.argv[1:] if argv is None else argv))
    flags = vars(options)
    names = (
        *("out", "resume", "config", "plan", "sweep", "iso_flops_of", "no_memory_check"),
        *("finetune", "allow_pickle"),
    )
    run = {name: flags.pop(name, None) for name in names}
    places = {name: flags.pop(name) for name in NAMES if name in flags}
    lists = {name: value for name, value in flags.items() if isinstance(value, list)}
    for name, values in lists.items():
        if twice := [value for value in values if values.count(value) > 1]:
            raise InputError(f"{flag(name)}: {twice[0]} is given twice: leave one out")
    flags |= {name: value[0] for name, value in lists.items()}
    lists = {name: value for name, value in lists.items() if len(value) > 1}
    if run["plan"] and run["no_memory_check"]:
        raise InputError("--no-memory-check has no effect with --plan: leave it out")
    common = (bool(run["plan"]), not run["no_memory_check"])
    if run["resume"] is not None:
        return _resumed(run, flags | places, lists, common)
    file = _read_config(run["config"]) if run["config"] else {}
    starts = _starts(run)
    if starts is not None:
        file = starts.place(file | flags | places) | file
    points = expand(places, file | flags)
    if len(points) == 1:
        flags |= points.pop()
    sweep = bool(run["sweep"] or lists or points)
    if sweep:
        flags = {name: value for name, value in flags.items() if name not in lists}
        members = _members(flags, file, run["sweep"], lists, points, starts)
    else:
        members = {SINGLE: build(flags, file, starts)}
    references = None
    if run["iso_flops_of"] is not None:
        if "tokens" not in flags:
            raise InputError(
                "--iso-flops-of needs --tokens, the budget of the autoencoder it compares with"
            )
        references = {n: _reference(run["iso_flops_of"], c.sae) for n, c in members.items()}
    request = Request(members, sweep, run["out"], None, *common, references)
    return request if starts is None else request.starting_from(starts)


def _starts(run: dict[str, Any]) -> Starts | None:
    """What --finetune names, or the --config of a run that was fine-tuned; None for neither."""
    source, note = run["finetune"], {}
    if run["config"] and source is None:
        note = part_of(_read_json(run["config"], "--config"), "finetune")
        source = note.get("source")
        if note and source is None:
            raise InputError(f"--config {run['config']} started from an SAE: give it by --finetune")
    if source is not None:
        return Starts(str(source), bool(run["allow_pickle"]), note.get("sha256"))
    if run["allow_pickle"]:
        raise InputError("--allow-pickle has no effect without --finetune: leave it out")
    return None


def _members(
    flags: dict[str, Any],
    file: dict[str, Any],
    sweep: Path | None,
    lists: dict[str, list[Any]],
    points: list[dict[str, Any]],
    starts: Starts | None,
) -> dict[str, RunConfig]:
    """The members of a sweep: each entry of its file, at each hookpoint, with each combination of
    the lists."""
    entries = [{}] if sweep is None else _read_sweep(sweep)
    configs: dict[str, RunConfig] = {}
    names = []
    for own in product(entries, lists, points):
        entry_name = own.pop("name", None)
        layered = dict(flags)
        _drop_overruled(layered, own)
        try:
            config = build(layered | own, file, starts)
        except InputError as error:
            raise InputError(f"member {entry_name or own} of the sweep: {error}") from error
        if entry_name is not None:  # the members of an entry differ by the lists' values
            several = {*lists, *(points[0] if points else ())}
            own = {name: value for name, value in own.items() if name in several}
        names.append("-".join(filter(None, (entry_name, name_of(own)))) or "base")
        check_names(names)
        configs[names[-1]] = config
    trains = one_stream([config.train for config in configs.values()])
    return {
        name: dataclasses.replace(config, train=train)
        for (name, config), train in zip(configs.items(), trains, strict=True)
    }


def _read_sweep(path: Path) -> list[dict[str, Any]]:
    """The entries of a sweep file. Raises InputError for settings that members must share."""
    document = _read_json(path, "--sweep")
    own = own_settings()
    if not isinstance(document, list) or not document:
        raise InputError(
            f"--sweep {path}: expected a JSON list of objects, one for each autoencoder, "
            f"got {str(document)[:80]}"
        )
    for number, entry in enumerate(document):
        where = f"--sweep {path}, entry {number}"
        if not isinstance(entry, dict):
            raise InputError(f"{where}: expected an object of settings, got {str(entry)[:80]}")
        _check_entry(entry, where)
        for name in entry:
            if name not in (*own, "name"):
                raise InputError(
                    f"{where}: {name} must be the same for all members: give it as a flag"
                    if name in all_settings()
                    else f"{where}: there is no setting {name!r}; known are {', '.join(own)}"
                )
    return document


def _check_entry(entry: dict[str, Any], where: str) -> None:
    """Raise InputError unless an entry of a sweep file has a name and one hookpoint, if any."""
    expected: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "name": ("a string that is not empty", lambda x: isinstance(x, str) and bool(x)),
        "layer": ("the number of one block", lambda x: type(x) is int),
        **dict.fromkeys(
            ("hookpoint", "target_hookpoint"),
            ("the name of one, not a pattern", lambda x: isinstance(x, str) and not is_pattern(x)),
        ),
    }
    for name in entry.keys() & expected.keys():
        words, is_right = expected[name]
        if not is_right(entry[name]):
            raise InputError(f"{where}: {name}: expected {words}, got {entry[name]!r}")


def _reference(of: str, own: SAEConfig) -> SAEConfig:
    """The autoencoder that --iso-flops-of names, of any width."""
    if of == "topk":
        return SAEConfig(encoder="dense", dict_size=own.dict_size, k=own.k)
    path = usable_path(of, "--iso-flops-of")
    path = path / "config.json" if path.is_dir() else path
    document = _read_json(path, "--iso-flops-of")
    if isinstance(document, dict):
        _check_format(document, "--iso-flops-of", path)
        document = document.get("config", document)  # a run has it, an SAE does not
    if not isinstance(document, dict) or not isinstance(document.get("sae"), dict):
        raise InputError(
            f"--iso-flops-of {path}: expected the config.json of a run or an SAE, or 'topk'"
        )
    return from_dict(SAEConfig, document["sae"], f"--iso-flops-of {path}")


def build(
    flags: dict[str, Any], file: dict[str, Any] | None = None, starts: Starts | None = None
) -> RunConfig:
    """The configuration with these settings (flat, by field name): flags win over the file's.

    starts: what it starts from, which decides the settings of the autoencoder.
    Raises InputError for settings that contradict each other, or have no effect.
    """
    chosen = dict(file or {})
    _drop_overruled(chosen, flags)
    chosen |= flags
    defaults = {name: setting.spec.default for name, setting in all_settings().items()}
    explicit = {k: v for k, v in chosen.items() if k in flags or v != defaults[k]}
    if chosen.get("activations") is not None:
        chosen |= _decided(chosen, explicit, flags)
    model = chosen.get("model", DataConfig.model)
    settings = dict(EMBEDDED) if model == "embedded" else {"dict_size": PAPER_DICT_SIZE}
    _drop_overruled(settings, chosen)
    if starts is not None:
        start = starts.at(settings | chosen, explicit)
        chosen |= settings_of(start, explicit)
        starts.check_k(start, explicit)
        _drop_overruled(settings, chosen)
    settings |= chosen
    _check_effects({**defaults, **settings}, explicit)
    parts = nested(settings)
    config = RunConfig(**{part: from_dict(cls, parts[part], "") for part, cls in PARTS.items()})
    if config.data.layer is None and config.data.hookpoint is None:
        raise InputError(
            f"--model {model} needs --layer N (the residual stream after block N, from 0) "
            "or --hookpoint NAME (such as N.attn_z)"
        )
    return config


def _decided(
    chosen: dict[str, Any], explicit: dict[str, Any], flags: dict[str, Any]
) -> dict[str, Any]:
    """Settings that follow from --activations: model, text and hookpoint, for config.json.

    Raises InputError for a setting that contradicts them, or a flag that repeats one.
    """
    decided = source_of(chosen["activations"]).decided(chosen)
    for name in decided.keys() - {"layer", "hookpoint"}:
        if name in flags or explicit.get(name, decided[name]) != decided[name]:
            raise InputError(
                f"{flag(name)} {explicit[name]} has no effect with --activations, "
                f"which was made with {decided[name]}: leave it out"
            )
        explicit.pop(name, None)
    return decided


def _drop_overruled(lower: dict[str, Any], higher: dict[str, Any]) -> None:
    """Remove settings from `lower` that those in `higher` replace or leave without effect."""

    def drop(*names: str) -> None:
        for name in names:
            if name not in higher:
                lower.pop(name, None)

    if higher.get("heads") or higher.get("dict_size"):
        drop("heads", "dict_size")
    elif (higher.get("m") or higher.get("n")) and lower.get("dict_size"):
        lower.pop("heads", None)
    known = all_settings()
    defaults = {name: setting.spec.default for name, setting in known.items()}
    together = {**defaults, **lower, **higher}
    drop(*(name for name in lower if known[name].no_effect(together) is not None))
    if higher.keys() & {"model", "layer", "hookpoint", "activations"}:
        drop("d_model")
    if higher.keys() & {"model", "target_hookpoint"}:
        drop("d_target")
    if higher.get("layer") is not None:
        drop("hookpoint")
    if higher.get("hookpoint") is not None:
        drop("layer")


def _check_effects(settings: dict[str, Any], explicit: dict[str, Any]) -> None:
    """Raise InputError for an explicit setting that has no effect beside the others."""
    for name, setting in all_settings().items():
        reason = setting.no_effect(settings) if explicit.get(name) not in (0, None) else None
        if reason is not None:
            raise InputError(f"{flag(name)} has no effect with {reason}: leave it out")


def _resumed(
    run: dict[str, Any],
    flags: dict[str, Any],
    lists: dict[str, list[Any]],
    common: tuple[bool, bool],
) -> Request:
    """The request to go on with a run or sweep; `flags` may change settings that are free."""
    for name in ("out", "config", "sweep", "iso_flops_of", "finetune"):
        if run[name] is not None:
            raise InputError(
                f"--resume takes all settings from the run folder: leave out {flag(name)}"
            )
    known = all_settings()
    for name in flags:
        if not known[name].spec.metadata.get("free") or name in lists:
            raise InputError(
                f"{flag(name)} cannot change when a run is resumed: leave it out, or start a new "
                "run"
            )
    folder, documents = open_to_resume(run["resume"])
    members, notes, starts = {}, {}, {}
    for name, document in documents.items():
        saved = whole(document["config"], folder.index)
        if saved["data"] is None:
            raise InputError(
                f"{run['resume']} was trained from tensors: resume it with kronsae.train.fit"
            )
        saved["data"] = untrusted(saved["data"])
        if saved["data"].get("model_dtype") == "auto":  # which depends on the machine
            saved["data"]["model_dtype"] = document["data"].get("dtype", "auto")
        for setting, value in flags.items():
            saved[known[setting].part][setting] = value
        defaults = {name: setting.spec.default for name, setting in known.items()}
        _check_effects(defaults | saved["sae"] | saved["data"] | saved["train"], flags)
        parts = {
            part: from_dict(cls, stored(cls, saved[part]), str(run["resume"]))
            for part, cls in PARTS.items()
        }
        members[name] = RunConfig(**parts)
        if note := document.get("finetune"):
            notes[name] = {"finetune": note}
            if not list_checkpoints(folder.checkpoints):
                start = Starts(note.get("source", ""), bool(run["allow_pickle"]), note["sha256"])
                starts[name] = start.at(saved["data"])
    is_sweep = isinstance(folder, SweepFolder)
    return Request(members, is_sweep, None, run["resume"], *common, None, notes, starts)


def _read_json(path: Path, flag: str) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{flag} {path} cannot be read: {error}") from error


def _check_format(document: dict[str, Any], flag: str, path: Path) -> None:
    """Raise InputError if the config.json of a run or an SAE says that it is of another format."""
    kind = "kronsae-run" if "config" in document else "kronsae"
    expected = {"format": kind, "format_version": FORMAT_VERSION}
    for name, value in expected.items():
        if name in document and document[name] != value:
            raise InputError(
                f"{flag} {path}: {name}: expected {value!r}, got {str(document[name])[:80]}"
            )


def _read_config(path: Path) -> dict[str, Any]:
    """Flat settings from a JSON file: a run's config.json, or {"sae": …, "data": …, "train": …}."""
    document = _read_json(path, "--config")
    of_run = isinstance(document, dict) and "config" in document
    if of_run:
        _check_format(document, "--config", path)
    parts = document["config"] if of_run else document
    for part in document if of_run else ():
        if part in PARTS and part != "data":  # "data" of a run describes its activations
            raise InputError(f"--config {path}: {part!r} is beside 'config': put it inside")
    if not isinstance(parts, dict) or not set(parts) <= set(PARTS):
        raise InputError(
            f"--config {path}: expected a JSON object with the parts {list(PARTS)}, "
            f"each an object of settings, got {str(parts)[:80]}"
        )
    settings: dict[str, Any] = {}
    for part, values in parts.items():
        values = flat(part, {} if values is None else values, f"--config {path}")
        settings |= stored(PARTS[part], values) if of_run else values
    return untrusted(settings)


def _unknown(argument: str, parser: Parser, argv: list[str]) -> str:
    """The error for an argument that the parser does not know."""
    before = [flag for flag in argv[: argv.index(argument)] if flag.startswith("--")]
    name = before[-1].removeprefix("--").replace("-", "_") if before else ""
    if not argument.startswith("-") and name in all_settings() and name not in own_settings():
        return (
            f"unknown argument {argument!r}: {before[-1]} takes one value, which all members of a "
            "sweep share"
        )
    return parser.unknown(argument)
