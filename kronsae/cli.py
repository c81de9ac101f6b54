"""The command line of `python -m kronsae.train`, made from the config dataclasses.

Precedence: defaults < the embedded preset (with model 'embedded') < --config file < flags.
"""

import argparse
import dataclasses
import difflib
import json
from pathlib import Path
from typing import Any, NoReturn

from kronsae.config import (
    DataConfig,
    RunConfig,
    SAEConfig,
    TrainConfig,
    base_type,
    from_dict,
)
from kronsae.errors import InputError
from kronsae.fit import FREE_TO_CHANGE
from kronsae.presets import EMBEDDED, PAPER_DICT_SIZE
from kronsae.run import RunFolder

PARTS: dict[str, type] = {"data": DataConfig, "sae": SAEConfig, "train": TrainConfig}
_PART_OF = {f.name: part for part, cls in PARTS.items() for f in dataclasses.fields(cls)}


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asks for."""

    config: RunConfig
    out: Path | None
    """Run folder to make; None: a new one under runs/."""
    resume: Path | None
    """Run folder to go on with."""
    plan: bool
    """Only say what would run."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def make_parser() -> argparse.ArgumentParser:
    """One flag a field of the configs, and those of the run itself."""
    parser = _Parser(
        prog="python -m kronsae.train",
        description="Train a sparse autoencoder on a language model's activations. Without "
        "arguments: a small model and text that are on this computer, in about two minutes.",
        usage="%(prog)s [--model NAME --layer N --dataset NAME --tokens N ...]",
        epilog="With --model embedded other defaults apply: "
        + ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in EMBEDDED.items()),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    run = parser.add_argument_group("run")
    run.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: under runs/)")
    run.add_argument("--resume", type=Path, metavar="DIR", help="go on with the run in DIR")
    run.add_argument("--config", type=Path, metavar="FILE", help="settings, as in a config.json")
    run.add_argument("--plan", action="store_true", help="say what would run, and stop")
    titles = {"data": "language model and text", "sae": "autoencoder", "train": "training"}
    for part, cls in PARTS.items():
        group = parser.add_argument_group(titles[part])
        for spec in dataclasses.fields(cls):
            _add_flag(group, spec)
    return parser


def _add_flag(group: Any, spec: dataclasses.Field) -> None:
    kind, _ = base_type(spec)
    default = "" if spec.default in (None, 0, False, "") else f" (default: {spec.default})"
    options: dict[str, Any] = {"help": (spec.metadata["help"] + default).replace("%", "%%")}
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["type"] = kind
        options["metavar"] = {int: "N", float: "X", str: "NAME"}[kind]
    if "choices" in spec.metadata:
        options["choices"] = spec.metadata["choices"]
        del options["metavar"]
    group.add_argument(f"--{spec.name.replace('_', '-')}", **options)


def parse(argv: list[str] | None = None) -> Request:
    """The request in `argv`. Raises InputError for anything wrong or without effect."""
    parser = make_parser()
    found, unknown = parser.parse_known_args(argv)
    if unknown:
        raise InputError(_unknown(unknown[0], parser))
    flags = vars(found)
    run = {name: flags.pop(name, None) for name in ("out", "resume", "config", "plan")}
    if run["resume"] is not None:
        return _resumed(run, flags)
    file = _read_config(run["config"]) if run["config"] else {}
    return Request(build(flags, file), run["out"], None, bool(run["plan"]))


def build(flags: dict[str, Any], file: dict[str, Any] | None = None) -> RunConfig:
    """The run that these settings make (flat, by field name): flags win over the file's.

    Raises InputError for settings that contradict each other, or have no effect.
    """
    given = dict(file or {})
    _drop_overruled(given, flags)
    given |= flags
    model = given.get("model", DataConfig.model)
    settings = dict(EMBEDDED) if model == "embedded" else {"dict_size": PAPER_DICT_SIZE}
    _drop_overruled(settings, given)
    settings |= given
    defaults = {f.name: f.default for cls in PARTS.values() for f in dataclasses.fields(cls)}
    explicit = {k: v for k, v in given.items() if k in flags or v != defaults[k]}
    _check_effects({**defaults, **settings}, explicit)
    parts = {
        part: from_dict(cls, {k: v for k, v in settings.items() if _PART_OF[k] == part}, "settings")
        for part, cls in PARTS.items()
    }
    config = RunConfig(**parts)
    if config.data.layer is None and config.data.hookpoint is None:
        raise InputError(
            f"--model {model} needs --layer N (the residual stream after block N, from 0) "
            "or --hookpoint MODULE_NAME"
        )
    return config


def _drop_overruled(lower: dict[str, Any], higher: dict[str, Any]) -> None:
    """Remove from `lower` what a setting in `higher` replaces under another name."""
    size = ("heads", "dict_size")
    if any(higher.get(name) for name in size):
        for name in size:
            if name not in higher:
                lower.pop(name, None)
    elif (higher.get("m") or higher.get("n")) and lower.get("dict_size"):
        lower.pop("heads", None)
    if higher.get("encoder") == "dense":
        for name in ("heads", "m", "n", "composition", "eps"):
            if name not in higher:
                lower.pop(name, None)
    for name, value, dependent in (
        ("selection", "jumprelu", ("jumprelu_bandwidth", "l0_coefficient")),
        ("objective", "matryoshka", ("matryoshka_first",)),
    ):
        if higher.get(name, value) != value:
            for setting in dependent:
                if setting not in higher:
                    lower.pop(setting, None)
    if higher.get("experts") == 0 and "balance_coefficient" not in higher:
        lower.pop("balance_coefficient", None)
    if any(name in higher for name in ("model", "layer", "hookpoint")) and "d_model" not in higher:
        lower.pop("d_model", None)
    if any(name in higher for name in ("model", "target_hookpoint")) and "d_target" not in higher:
        lower.pop("d_target", None)
    for name, other in (("layer", "hookpoint"), ("hookpoint", "layer")):
        if higher.get(name) is not None and other not in higher:
            lower.pop(other, None)


def _check_effects(settings: dict[str, Any], given: dict[str, Any]) -> None:
    """Raise InputError for a setting in `given` that changes nothing beside the others."""
    rules = [
        (
            ("heads", "m", "n", "composition", "eps"),
            settings["encoder"] == "dense",
            "--encoder dense",
        ),
        (
            ("eps",),
            settings["composition"] != "mand",
            f"--composition {settings['composition']}",
        ),
        (
            ("jumprelu_bandwidth", "l0_coefficient"),
            settings["selection"] != "jumprelu",
            f"--selection {settings['selection']}",
        ),
        (("balance_coefficient",), settings["experts"] == 0, "--experts 0"),
        (
            ("d_target", "skip"),
            settings["target_hookpoint"] is None,
            "an autoencoder (a transcoder has a --target-hookpoint)",
        ),
        (
            ("matryoshka_first",),
            settings["objective"] != "matryoshka",
            f"--objective {settings['objective']}",
        ),
        (
            ("auxk", "auxk_fraction"),
            settings["auxk_coefficient"] == 0,
            "--auxk-coefficient 0",
        ),
        (("auxk",), settings["auxk_fraction"] == 0, "--auxk-fraction 0"),
        (
            ("revision", "trust_remote_code"),
            settings["model"] == "embedded",
            "--model embedded",
        ),
        (
            ("dataset_config", "split", "streaming", "text_column"),
            settings["dataset"] == "stdlib",
            "--dataset stdlib",
        ),
    ]
    for names, holds, reason in rules:
        for name in names:
            if holds and name in given and given[name] not in (0, None):
                flag = "--" + name.replace("_", "-")
                raise InputError(f"{flag} has no effect with {reason}: leave it out")


def _resumed(run: dict[str, Any], flags: dict[str, Any]) -> Request:
    if run["out"] is not None or run["config"] is not None:
        raise InputError("--resume takes everything from the run folder: no --out, no --config")
    _, settings = RunFolder.open(run["resume"])
    stored = settings["config"]
    if stored["data"] is None:
        raise InputError(
            f"{run['resume']} was trained from tensors: resume it with kronsae.train.fit"
        )
    for name in flags:
        if f"config.{_PART_OF[name]}.{name}" not in FREE_TO_CHANGE:
            raise InputError(
                f"--{name.replace('_', '-')} cannot change when a run is resumed: "
                "leave it out, or start a new run"
            )
        stored[_PART_OF[name]][name] = flags[name]
    parts = {part: from_dict(cls, stored[part], str(run["resume"])) for part, cls in PARTS.items()}
    return Request(RunConfig(**parts), None, run["resume"], bool(run["plan"]))


def _read_config(path: Path) -> dict[str, Any]:
    """Flat settings from a JSON file: a run's config.json, or {"sae": …, "data": …, "train": …}."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--config {path} cannot be read: {error}") from error
    parts = document.get("config", document) if isinstance(document, dict) else document
    if not isinstance(parts, dict) or not set(parts) <= set(PARTS):
        raise InputError(
            f"--config {path}: expected a JSON object with the parts {list(PARTS)}, "
            f"each an object of settings, got {str(parts)[:80]}"
        )
    flat: dict[str, Any] = {}
    for part, values in parts.items():
        known = {f.name for f in dataclasses.fields(PARTS[part])}
        for name, value in (values or {}).items():
            if name not in known:
                raise InputError(f"--config {path}: {part} has no setting {name!r}")
            flat[name] = value
    return flat


def _unknown(argument: str, parser: argparse.ArgumentParser) -> str:
    name = argument.split("=")[0]
    flags = [option for action in parser._actions for option in action.option_strings]
    close = difflib.get_close_matches(name, flags, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "--help lists all flags"
    return f"unknown argument {argument!r}: {hint}"
