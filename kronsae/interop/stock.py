"""The common form of other libraries' stock SAEs, and conversion to and from ours.

All of them compute
    z = select(relu(W_enc x + b_enc))        x_hat = W_dec^T z + b_dec (+ W_skip x)
where `select` keeps the k largest latents, or those above thresholds. A dense SAE has this form. A
KronSAE has not: its latent is the root of a product of two projections.
"""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kronsae.config import SAEConfig, from_dict, kind_of
from kronsae.data.common import reason
from kronsae.errors import InputError
from kronsae.model.sae import SAE
from kronsae.model.selection import TopK
from kronsae.registry import SELECTIONS
from kronsae.system.documents import read_json, typed
from kronsae.system.files import replace_directory, write_json
from kronsae.system.tensors import check_weights
from kronsae_kernels import __version__

DEFAULT_K = 50
"""k of an SAE with thresholds, if its file does not give one."""


_NO_PENALTY = {"l1_coefficient": 0.0}
"""Settings of a ReLU SAE: files of other libraries do not say how it was trained."""


@dataclass
class Stock:
    """A dense SAE, transcoder or JumpReLU SAE of any library, in the module's common form.

    Tensors are float32, or float64 if they were. Rows of W_dec keep their norm, because rescaling
    them would change which latents TopK selects.
    """

    W_enc: Tensor
    """[F, d]"""
    b_enc: Tensor
    """[F]"""
    W_dec: Tensor
    """[F, d_out]"""
    b_dec: Tensor
    """[d_out]"""
    k: int | None = None
    """Latents per token; None if only thresholds are known."""
    threshold: Tensor | None = None
    """[F]: latents with greater values are active. None: the k largest are."""
    W_skip: Tensor | None = None
    """[d_out, d]"""
    transcoder: bool = False
    multi_topk: bool = False
    gated: bool = False
    """Whether a gate also decides which latents are active."""

    def __post_init__(self) -> None:
        for name in ("W_enc", "W_dec"):
            if getattr(self, name).ndim != 2:
                raise InputError(
                    f"{name}: expected a matrix, got {list(getattr(self, name).shape)}"
                )
        size, d = self.W_enc.shape
        d_out = self.W_dec.shape[1] if self.transcoder else d
        expected = {"W_dec": (size, d_out), "b_enc": (size,), "b_dec": (d_out,)}
        expected |= {"threshold": (size,)} if self.threshold is not None else {}
        expected |= {"W_skip": (d_out, d)} if self.W_skip is not None else {}
        for name, shape in expected.items():
            got = tuple(getattr(self, name).shape)
            if got != shape:
                beside = f" beside W_enc {[size, d]}"
                raise InputError(f"{name}: expected {list(shape)}{beside}, got {list(got)}")
        if self.k is not None and not (type(self.k) is int and 1 <= self.k <= size):
            raise InputError(f"k: expected 1 to {size}, the number of latents, got {self.k!r}")

    def with_decoder_bias_first(self, sign: int) -> "Stock":
        """The same SAE for a library that encodes x - b_dec (sign 1), or from one (-1)."""
        shift = self.W_enc.double() @ self.b_dec.double()
        moved = (self.b_enc.double() + sign * shift).to(self.b_enc.dtype)
        return dataclasses.replace(self, b_enc=moved)

    def of_raw(self, scale: float, target_scale: float) -> "Stock":
        """The same SAE of raw activations x, from one that takes x * scale.

        target_scale: by which the activations are multiplied that it reconstructs.
        """
        ratio = scale / target_scale
        return dataclasses.replace(
            self,
            W_enc=self.W_enc * scale,
            W_dec=self.W_dec / target_scale,
            b_dec=self.b_dec / target_scale,
            W_skip=None if self.W_skip is None else self.W_skip * ratio,
        )

    def with_unit_rows(self) -> "Stock":
        """The same reconstruction, with decoder rows of unit norm and latents times that norm."""
        norms = self.W_dec.norm(dim=1)
        rows = self.W_dec / norms.clamp(min=torch.finfo(norms.dtype).tiny)[:, None]
        return dataclasses.replace(
            self,
            W_enc=self.W_enc * norms[:, None],
            b_enc=self.b_enc * norms,
            W_dec=rows,
            threshold=None if self.threshold is None else self.threshold * norms,
        )

    def to_sae(self, note: Any = None, metadata: dict[str, Any] | None = None) -> SAE:
        """The SAE as a TopK, ReLU or JumpReLU SAE, or as the `note` describes it.

        note: that of `note_of` in the file, if the tensors agree with it.
        metadata: `sae.metadata` if there is no such note.
        """
        size, d = self.W_enc.shape
        d_out = self.W_dec.shape[1]
        selection = self._selection()
        if selection == "topk" and self.k is None:
            raise InputError("k: the file does not say how many latents of a token are active")
        k = self.k or min(DEFAULT_K, size)
        config = SAEConfig(
            d_model=d,
            d_target=d_out if self.transcoder else 0,
            encoder="dense",
            dict_size=size,
            k=k if SELECTIONS[selection].aims_at_k else 0,
            selection=selection,
            selection_settings=_NO_PENALTY if selection == "relu" else None,
            objective="multi_topk" if self.multi_topk else "plain",
            skip=self.W_skip is not None,
        )
        noted = _checked_note(note, config, self.threshold)
        sae = SAE(noted or config, device="meta").to_empty(device=self.W_enc.device)
        tensors = {name: getattr(self, name).float() for name in ("W_enc", "b_enc", "W_dec")}
        tensors["b_dec"] = self.b_dec.float()
        if self.W_skip is not None:
            tensors["W_skip"] = self.W_skip.float()
        if self.threshold is not None:
            tensors |= sae.selection.load_activity_threshold(self.threshold)
        sae.load_state_dict(tensors)
        sae.metadata = note["metadata"] if noted else metadata or {}
        return sae.eval()

    def _selection(self) -> str:
        if self.threshold is None:
            return "topk"
        return "jumprelu" if (self.threshold > 0).any() else "relu"


class NoStockForm(InputError):
    """Raised for an SAE that no stock class of another library can hold."""


def own_formats(config: SAEConfig) -> str:
    """The formats that hold every SAE of ours, in words. SAELens' takes no transcoder."""
    return "kronsae or hub" if config.d_target else "kronsae, sae_lens or hub"


def stock_of(sae: SAE, library: str) -> Stock:
    """The stock form of a dense SAE. Raises NoStockForm, with the reason, if it has none."""
    config = sae.config
    if config.refine:
        raise NoStockForm(
            f"{library}'s stock formats decode the encoder's values, and this SAE refines them: "
            f"use --to {own_formats(config)}, or export `sae.unrefined()`, which reconstructs less"
        )
    with torch.no_grad():
        form = sae.kind.dense_form(_exact(sae.W_enc), _exact(sae.b_enc))
    if form is None:
        why = f"no dense encoder of {config.dict_size:,} rows gives the same latents"
        if sae.kind.factored:
            why = "its latents are products of two projections"
        lens = (
            "--to sae_lens (an architecture of its own there, after `import "
            "kronsae.interop.sae_lens`), "
        )
        raise NoStockForm(
            f"{library}'s stock formats cannot hold a {kind_of(dataclasses.asdict(config))}: "
            f"{why}. Use {'' if config.d_target else lens}--to hub, or kronsae.load(...).encode"
        )
    if config.experts:
        raise NoStockForm(
            f"{library}'s stock formats have no router: export an SAE with experts --to "
            f"{own_formats(config)}"
        )
    w_enc, b_enc, gate = form
    return Stock(
        W_enc=w_enc,
        b_enc=b_enc,
        W_dec=_exact(sae.W_dec),
        b_dec=_exact(sae.b_dec),
        k=config.k or None,
        threshold=_threshold(sae, gate, library),
        W_skip=None if sae.W_skip is None else _exact(sae.W_skip),
        transcoder=bool(config.d_target),
        multi_topk=config.objective == "multi_topk",
        gated=gate is not None,
    )


def _threshold(sae: SAE, gate: Tensor | None, library: str) -> Tensor | None:
    """Thresholds [F] above which latents are active; None with TopK.

    gate: the encoder's own thresholds, if it has some.
    """
    own = sae.selection.activity_threshold()
    if own is None and not isinstance(sae.selection, TopK):
        raise NoStockForm(
            f"{library}'s stock formats select the k largest latents, or those above thresholds: "
            f"selection {sae.config.selection!r} does neither. Use --to {own_formats(sae.config)}"
        )
    if gate is None or own is None:
        if gate is not None:
            raise NoStockForm(
                f"{library}'s stock formats cannot hold a {kind_of(dataclasses.asdict(sae.config))}"
                ": its latents have to pass a gate and be among the k largest. Use --to kronsae or "
                "hub"
            )
        return None if own is None else _exact(own)
    return torch.maximum(gate, _exact(own))


def note_of(sae: SAE) -> dict[str, Any]:
    """Our configuration and metadata, for a file of another library; read back by `to_sae`."""
    return {
        "version": __version__,
        "sae": dataclasses.asdict(sae.config),
        "metadata": sae.metadata,
    }


def _checked_note(note: Any, config: SAEConfig, threshold: Tensor | None) -> SAEConfig | None:
    """The configuration in a note, if `config` and threshold of the tensors agree with it."""
    if not isinstance(note, dict) or not isinstance(note.get("metadata"), dict):
        return None
    try:
        noted = from_dict(SAEConfig, note["sae"], "note")
    except (InputError, KeyError, TypeError):
        return None
    same = ("d_model", "d_target", "encoder", "dict_size", "skip", "experts", "refine")
    agrees = all(getattr(noted, name) == getattr(config, name) for name in same)
    agrees &= SELECTIONS[noted.selection].can_have(threshold)
    if SELECTIONS[noted.selection].exact:
        agrees &= noted.k == config.k
    return noted if agrees else None


def source_metadata(format: str, settings: dict[str, Any], **data: Any) -> dict[str, Any]:
    """`sae.metadata` of an SAE of another library. data: what its file says of the activations."""
    known = {name: value for name, value in data.items() if value is not None}
    return {"format": format, "data": known, "settings": settings}


def write_folder(
    folder: str | Path, tensors: tuple[str, dict[str, Tensor]], config: tuple[str, dict[str, Any]]
) -> Path:
    """Write tensors (safetensors) and settings (JSON) to a new folder. Each: file name, content."""
    from safetensors.torch import save_file

    def save(new: Path) -> None:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors[1].items()}
        save_file(contiguous, new / tensors[0])
        write_json(new / config[0], config[1])

    return replace_directory(Path(folder), save)


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises InputError if the file holds none, or cannot be read."""
    try:
        return typed(read_json(path), dict, "")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def take(
    tensors: dict[str, Tensor],
    names: dict[str, str],
    path: Path,
    transposed: Collection[str] = (),
    others: Collection[str] | None = None,
) -> dict[str, Any]:
    """Tensors by our names, in float32 at least, for `Stock`. names: ours -> the file's.

    transposed: our names of those that are transposed in the file.
    others: patterns of what else such a file may have, which changes nothing (None: anything).
    Raises InputError if one is missing, or not of finite floats, or if there are more, which may
    change what the SAE computes.
    """
    there = [name for name, tensor in tensors.items() if isinstance(tensor, Tensor)]
    missing = sorted(set(names.values()) - set(there))
    if missing:
        raise InputError(f"{path}: expected tensors {missing}, got {sorted(there)}")
    more = set() if others is None else set(tensors) - set(names.values())
    unknown = sorted(name for name in more if not any(fnmatch(name, each) for each in others or ()))
    if unknown:
        raise InputError(f"{path}: tensors {unknown} have no counterpart here")
    check_weights({theirs: tensors[theirs] for theirs in names.values()}, path)
    taken = {ours: _exact(tensors[theirs]) for ours, theirs in names.items()}
    for name in transposed:
        if taken[name].ndim != 2:
            shape = list(taken[name].shape)
            raise InputError(f"{path}: {names[name]}: expected a matrix, got {shape}")
        taken[name] = taken[name].T
    return taken


def unpickled(path: Path) -> dict[str, Any]:
    """The dictionary in a pickle of torch: tensors, numbers, text and containers, as nothing else
    is unpickled.

    Raises InputError if it holds anything else, or is damaged.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch raise errors of their own types
        # torch advises to unpickle everything, which would run code.
        why = "" if "weights_only" in str(error) else f" ({reason(error)})"
        raise InputError(
            f"{path} does not hold tensors alone, and nothing else is unpickled{why}"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise InputError(f"{path}: expected a dictionary of tensors")
    return dict(content)


def _exact(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, in float32 at least."""
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return tensor.detach().to("cpu", dtype)


@torch.no_grad()
def encoder_proxy(sae: SAE) -> tuple[Tensor, Tensor]:
    """W_enc [F, d] and b_enc [F] for tools that need one encoder row per latent.

    For a KronSAE, latent (head, i, j) gets the mean of base row i and extension row j, the
    direction in which both grow. It is good for cosines and ordering; encoding with it gives other
    latents. A dense SAE has its own rows.
    """
    form = sae.kind.dense_form(sae.W_enc, sae.b_enc)
    if form is not None:
        return form[:2]
    m, n = sae.config.m, sae.config.n

    def mean(rows: Tensor) -> Tensor:
        base, extension = rows.split([m, n], dim=1)
        return ((base[:, :, None] + extension[:, None, :]) / 2).flatten(0, 2)

    return mean(sae.W_enc), mean(sae.b_enc)
