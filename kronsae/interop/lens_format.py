"""Format of SAELens version 6: sae_weights.safetensors and cfg.json.

Dense SAEs become stock architectures: TopK "topk"; BatchTopK (with its threshold, as SAELens saves
its own), JumpReLU, ReLU and gated SAEs "jumprelu"; transcoders with thresholds
"jumprelu_transcoder". Everything else has architecture "kronsae", which SAELens knows after
`import kronsae.interop.sae_lens`.
"""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kronsae.config import SAEConfig, from_dict, kind_of
from kronsae.data.hookpoints import Site
from kronsae.errors import InputError
from kronsae.interop.formats import Format, Reader
from kronsae.interop.stock import (
    NoStockForm,
    Stock,
    note_of,
    read_object,
    source_metadata,
    stock_of,
    take,
    write_folder,
)
from kronsae.model.origin import Origin, layer_of
from kronsae.model.sae import SAE, made_of
from kronsae.registry import FORMATS
from kronsae.system.documents import part_of
from kronsae.system.files import read_tensors

WEIGHTS_NAME = "sae_weights.safetensors"
CONFIG_NAME = "cfg.json"
ARCHITECTURE = "kronsae"
VERSION = "6.54.12"
"""SAELens' version in our tests; it would rewrite a cfg.json of a version below 6.0.0."""

_NAMES: tuple[str, ...] = ("W_enc", "b_enc", "W_dec", "b_dec")
_WITH_THRESHOLD = ("jumprelu", "jumprelu_transcoder", "jumprelu_skip_transcoder")
_OF_RELU = ("standard", "transcoder", "skip_transcoder")
STOCK = ("topk", *_WITH_THRESHOLD, *_OF_RELU, "gated")
"""SAELens' own architectures that `read` knows."""


def write(sae: SAE, folder: str | Path) -> Path:
    """Write `sae` for `sae_lens.SAE.load_from_disk`. Raises InputError if it does not fit."""
    try:
        tensors, settings = _stock(sae)
    except NoStockForm:
        tensors, settings = _own(sae)
    facts = metadata_of(sae)
    config = {
        "d_in": sae.config.d_model,
        "d_sae": sae.config.dict_size,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": reshaping(facts),
        **settings,
        "metadata": facts,
    }
    return write_folder(folder, (WEIGHTS_NAME, tensors), (CONFIG_NAME, config))


def _stock(sae: SAE) -> tuple[dict[str, Tensor], dict[str, Any]]:
    stock = stock_of(sae, "SAELens")
    if stock.transcoder and stock.threshold is None:
        raise InputError(
            "SAELens has no transcoder with TopK: use --to sparsify, or train one with --selection "
            "batchtopk or jumprelu"
        )
    tensors = {name: getattr(stock, name) for name in _NAMES}
    tensors["W_enc"] = stock.W_enc.T
    if stock.threshold is None:
        return tensors, {
            "architecture": "topk",
            "k": stock.k,
            "rescale_acts_by_decoder_norm": False,
        }
    tensors["threshold"] = stock.threshold
    if not stock.transcoder:
        return tensors, {"architecture": "jumprelu"}
    skip = ""
    if stock.W_skip is not None:
        tensors["W_skip"], skip = stock.W_skip, "skip_"
    return tensors, {
        "architecture": f"jumprelu_{skip}transcoder",
        "d_out": stock.W_dec.shape[1],
    }


def _own(sae: SAE) -> tuple[dict[str, Tensor], dict[str, Any]]:
    check_own(sae.config)
    tensors = {name: t.detach().cpu() for name, t in sae.state_dict().items()}
    return tensors, {"architecture": ARCHITECTURE, "kronsae": dataclasses.asdict(sae.config)}


def check_own(config: SAEConfig) -> None:
    """Raise InputError if the architecture "kronsae" cannot hold such an SAE."""
    if config.d_target:
        raise InputError(
            f"a {kind_of(dataclasses.asdict(config))} cannot go to SAELens: its transcoders are "
            "dense. Use --to hub, or kronsae.load(...)"
        )


def metadata_of(sae: SAE) -> dict[str, Any]:
    """SAELens' metadata of an SAE."""
    origin = Origin.of(sae.metadata)
    facts = {
        "sae_lens_version": VERSION,
        "sae_lens_training_version": None,
        "model_name": origin.model,
        "hook_name": lens_hook(origin.site, origin.hookpoint),
        "hook_name_out": lens_hook(origin.target_site, origin.target_hookpoint),
        "hf_hook_name": origin.hookpoint,
        "hf_hook_name_out": origin.target_hookpoint,
        "context_size": origin.context_length,
        "prepend_bos": origin.prepend_bos,
        "seqpos_slice": None if origin.skipped is None else [origin.skipped, None],
        "exclude_special_tokens": None if origin.skipped is None else True,
        "dataset_path": origin.dataset,
        "kronsae": note_of(sae),
    }
    return {name: value for name, value in facts.items() if value is not None}


def lens_hook(site: Site | None, hookpoint: str | None) -> str | None:
    """TransformerLens' name of a site; `hookpoint` if the site is not known."""
    return hookpoint if site is None else site.lens


def reshaping(facts: dict[str, Any]) -> str:
    """SAELens' `reshape_activations`. facts: of `metadata_of`.

    TransformerLens has attention z by head, [..., heads, d_head].
    """
    return "hook_z" if str(facts.get("hook_name")).endswith(".hook_z") else "none"


def read(folder: Path) -> SAE:
    """Read an SAE of SAELens. Raises InputError if it is damaged or of an unknown kind."""
    path = folder / WEIGHTS_NAME
    return made_by_lens(read_object(folder / CONFIG_NAME), read_tensors(path), path)


def made_by_lens(settings: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> SAE:
    """The SAE of settings and tensors of SAELens, which were read from `path`.

    "gated" and "standard" become thresholds: a gated latent is active above
    b_mag - exp(r_mag) b_gate, a ReLU above 0.
    Raises InputError if there is no such SAE here.
    """
    metadata = part_of(settings, "metadata")
    architecture = settings.get("architecture", "standard")
    activation = settings.get("activation_fn", settings.get("activation_fn_str"))
    if architecture == "standard" and activation == "topk":  # in versions before 6
        architecture = "topk"
        settings = {**settings, "k": part_of(settings, "activation_fn_kwargs").get("k")}
    if architecture == ARCHITECTURE:
        return _read_own(settings, tensors, path)
    _check_stock(path.parent, architecture, settings, tensors)
    stock = Stock(
        **_fields_of(architecture, settings, tensors, path),
        k=settings.get("k") if architecture == "topk" else None,
        transcoder="transcoder" in architecture,
    )
    if settings.get("apply_b_dec_to_input", True) and not stock.transcoder:
        stock = stock.with_decoder_bias_first(-1)
    if architecture == "topk" and settings.get("rescale_acts_by_decoder_norm"):
        stock = stock.with_unit_rows()
    return stock.to_sae(metadata.get("kronsae"), _metadata(settings, metadata))


_FACTORS = ("scaling_factor", "finetuning_scaling_factor")
"""Factors of latents that a file may have; those of ones change nothing."""


def _check_stock(
    folder: Path, architecture: str, settings: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    """Raise InputError for an architecture or a setting that has no counterpart here."""
    if architecture not in STOCK:
        raise InputError(
            f"{folder}: SAELens' architecture {architecture!r} has no counterpart here; "
            f"known are {', '.join((*STOCK, ARCHITECTURE))}"
        )
    if settings.get("normalize_activations", "none") not in ("none", False, None):
        raise InputError(
            f"{folder}: the SAE takes activations normalised by "
            f"{settings['normalize_activations']!r}; fold that into its weights in SAELens first, "
            "if possible"
        )
    for name in _FACTORS:
        if name in tensors and not (tensors[name] == 1).all():
            raise InputError(f"{folder}: SAEs with a finetuning scaling factor are not read")


def _fields_of(
    architecture: str, settings: dict[str, Any], tensors: dict[str, Tensor], path: Path
) -> dict[str, Any]:
    """Tensors of a stock architecture, as fields of `Stock`."""
    if architecture == "gated":
        gated = ("W_enc", "W_dec", "b_dec", "r_mag", "b_mag", "b_gate")
        fields = take(tensors, {name: name for name in gated}, path, others=_FACTORS)
        fields["W_enc"], fields["b_enc"], fields["threshold"] = ungated(
            fields["W_enc"].T, fields.pop("r_mag"), fields.pop("b_mag"), fields.pop("b_gate")
        )
        return fields
    names = _NAMES
    names += ("threshold",) if architecture in _WITH_THRESHOLD else ()
    names += ("W_skip",) if "skip" in architecture else ()
    fields = take(tensors, {name: name for name in names}, path, others=_FACTORS)
    fields["W_enc"] = fields["W_enc"].T
    if architecture in _OF_RELU:
        fields["threshold"] = torch.zeros_like(fields["b_enc"])
    return fields


def ungated(
    w_enc: Tensor, r_mag: Tensor, b_mag: Tensor, b_gate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """W_enc [F, d], b_enc [F] and threshold [F] of a gated SAE, whose gate shares its directions.

    A latent is active if w x + b_gate > 0, with value relu(e^r w x + b_mag); so the argument of the
    relu is then above b_mag - e^r b_gate. [Rajamanoharan et al. 2024, Gated SAEs, App. on JumpReLU]
    """
    scale = r_mag.exp()
    return w_enc * scale[:, None], b_mag, b_mag - scale * b_gate


def _read_own(settings: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> SAE:
    config = from_dict(SAEConfig, part_of(settings, "kronsae"), f"{path.parent / CONFIG_NAME}")
    sae = made_of(config, tensors, path)
    sae.metadata = part_of(settings, "metadata", "kronsae", "metadata")
    return sae


def _metadata(settings: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
    facts = {**settings, **metadata}
    hook = str(facts.get("hook_name") or facts.get("hook_point") or "")  # before version 2
    module = str(facts.get("hf_hook_name") or "")
    site, layer = Site.of(hook), layer_of(hook)
    return source_metadata(
        "sae_lens",
        settings,
        name=facts.get("model_name"),
        hookpoint=module or hook or None,
        site=None if site is None else str(site),
        target_hookpoint=facts.get("hf_hook_name_out") or facts.get("hook_name_out"),
        layer=layer_of(module) if layer is None else layer,
        context_length=facts.get("context_size"),
        prepend_bos=facts.get("prepend_bos"),
    )


def reader(folder: Path, sae: SAE) -> Reader:
    import sae_lens

    importlib.import_module("kronsae.interop.sae_lens")  # registers our architecture
    theirs: Any = sae_lens.SAE.load_from_disk(folder)
    theirs.turn_off_forward_pass_hook_z_reshaping()  # x is flat

    def apply(x: Tensor) -> tuple[Tensor, Tensor]:
        latents = theirs.encode(x)
        out = theirs.decode(latents)
        if sae.W_skip is not None:
            out = out + x @ theirs.W_skip.T
        # With eps, TopK may choose latents whose product is 0: they are not active.
        return (latents.abs() > sae.silent_value).sum(-1), out

    return apply


@FORMATS.register("sae_lens")
class SAELens(Format):
    library, package = "SAELens", "sae-lens"
    weights, config = WEIGHTS_NAME, CONFIG_NAME
    how_to_load = 'import kronsae.interop.sae_lens; sae_lens.SAE.load_from_disk("{out}")'

    @staticmethod
    def folder_of(sae: SAE, name: str) -> str:
        """The hookpoint's name in TransformerLens: "blocks.6.hook_resid_post"."""
        origin = Origin.of(sae.metadata)
        return lens_hook(origin.site, origin.hookpoint) or name

    read, write, reader = staticmethod(read), staticmethod(write), staticmethod(reader)
