"""What the stock formats of other libraries hold, and how an SAE of ours goes in and out.

All of them are, up to their own way to write it,
    z = select(relu(W_enc x + b_enc))        x_hat = W_dec^T z + b_dec (+ W_skip x)
with a selection of the k largest, or of those above thresholds. A dense SAE is that; a KronSAE is
not, since a latent of it is the root of a product of two projections, and no stock class can hold
it.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kronsae.config import SAEConfig, from_dict, kind_of
from kronsae.errors import InputError
from kronsae.model.sae import SAE
from kronsae.registry import SELECTIONS
from kronsae_kernels import SparseCodes, __version__

DEFAULT_K = 50
"""k of an SAE with thresholds whose file does not say how many latents it was trained to."""


@dataclass
class Stock:
    """A dense SAE, transcoder or JumpReLU SAE of any library, in the form at the module's top.

    Tensors are float32 (float64 where they came so); rows of W_dec have whatever norm they came
    with: to rescale them would change which latents TopK selects.
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
    """Latents a token; None where thresholds alone are known."""
    threshold: Tensor | None = None
    """[F]: a latent is active if its value is greater. None: the k largest are."""
    W_skip: Tensor | None = None
    """[d_out, d]"""
    transcoder: bool = False
    multi_topk: bool = False
    gated: bool = False
    """Whether a gate decides, beside the selection, which latents are active."""

    def __post_init__(self) -> None:
        for name in ("W_enc", "W_dec"):
            if getattr(self, name).ndim != 2:
                raise InputError(
                    f"{name}: expected a matrix, got {list(getattr(self, name).shape)}"
                )
        size, d = self.W_enc.shape
        d_out = self.W_dec.shape[1]
        expected = {"b_enc": (size,), "W_dec": (size, d_out), "b_dec": (d_out,)}
        expected |= {"threshold": (size,)} if self.threshold is not None else {}
        expected |= {"W_skip": (d_out, d)} if self.W_skip is not None else {}
        for name, shape in expected.items():
            found = tuple(getattr(self, name).shape)
            if found != shape:
                raise InputError(f"{name}: expected {list(shape)}, got {list(found)}")
        if self.k is not None and not (type(self.k) is int and 1 <= self.k <= size):
            raise InputError(f"k: expected 1 to {size}, the number of latents, got {self.k!r}")

    def with_decoder_bias_first(self, sign: int) -> "Stock":
        """The same SAE for a library that encodes x - b_dec (sign 1), or from one (-1)."""
        shift = self.W_enc.double() @ self.b_dec.double()
        moved = (self.b_enc.double() + sign * shift).to(self.b_enc.dtype)
        return dataclasses.replace(self, b_enc=moved)

    def to_sae(self, note: Any = None, metadata: dict[str, Any] | None = None) -> SAE:
        """The SAE, of TopK or JumpReLU; or what `note` says it was before it went out.

        note: what `note_of` left in the file; believed as far as the tensors agree with it.
        metadata: `sae.metadata`, where there is no note.
        """
        size, d = self.W_enc.shape
        d_out = self.W_dec.shape[1]
        config = SAEConfig(
            d_model=d,
            d_target=d_out if self.transcoder else 0,
            encoder="dense",
            dict_size=size,
            k=self.k or min(DEFAULT_K, size),
            selection="topk" if self.threshold is None else "jumprelu",
            objective="multi_topk" if self.multi_topk else "plain",
            skip=self.W_skip is not None,
        )
        noted = _believed(note, config, self.threshold)
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


class NoStockForm(InputError):
    """No stock class of any library gives the latents of such an SAE."""


def stock_of(sae: SAE, library: str) -> Stock:
    """The stock form of a dense SAE. Raises NoStockForm, with the reason, if it has none."""
    config = sae.config
    with torch.no_grad():
        form = sae.kind.dense_form(_exact(sae.W_enc), _exact(sae.b_enc))
    if form is None:
        why = f"no dense encoder of {config.dict_size:,} rows gives the same latents"
        if sae.kind.factored:
            why = "its latents are products of two projections"
        raise NoStockForm(
            f"{library}'s stock formats cannot hold a {kind_of(dataclasses.asdict(config))}: "
            f"{why}. What can: --to sae_lens (an architecture of its own there, after `import "
            "kronsae.interop.sae_lens`), --to hub, or, to call it, kronsae.load(...).encode"
        )
    if config.experts:
        raise NoStockForm(
            f"{library}'s stock formats have no router: an SAE with experts stays with --to "
            "kronsae, sae_lens or hub"
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
    """[F] such that a latent is active if its value is greater; None with TopK.

    gate: that of the encoder, if it has one.
    """
    own = sae.selection.activity_threshold()
    if gate is None or own is None:
        if gate is not None:
            raise NoStockForm(
                f"{library}'s stock formats cannot hold a {kind_of(dataclasses.asdict(sae.config))}"
                ": its latents have to pass a gate and be among the k largest. What can: --to "
                "kronsae or hub"
            )
        return None if own is None else _exact(own)
    return torch.maximum(gate, _exact(own))


def note_of(sae: SAE) -> dict[str, Any]:
    """What a file of another library says beside its own settings, for when it comes back."""
    return {
        "version": __version__,
        "sae": dataclasses.asdict(sae.config),
        "metadata": sae.metadata,
    }


def _believed(note: Any, found: SAEConfig, threshold: Tensor | None) -> SAEConfig | None:
    """The config in a note, if the tensors can be those of such an SAE."""
    if not isinstance(note, dict) or not isinstance(note.get("metadata"), dict):
        return None
    try:
        noted = from_dict(SAEConfig, note["sae"], "note")
    except (InputError, KeyError, TypeError):
        return None
    same = ("d_model", "d_target", "encoder", "dict_size", "skip")
    kept = all(getattr(noted, name) == getattr(found, name) for name in same)
    kept &= SELECTIONS[noted.selection].can_have(threshold) and not noted.experts
    if SELECTIONS[noted.selection].exact:
        kept &= noted.k == found.k
    return noted if kept else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises InputError if it is none, or cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def take(tensors: dict[str, Tensor], names: dict[str, str], path: Path) -> dict[str, Tensor]:
    """Tensors by our names for them, in float32 at least. names: ours -> the file's.

    Raises InputError if one is missing.
    """
    missing = sorted(set(names.values()) - set(tensors))
    if missing:
        raise InputError(f"{path}: expected tensors {missing}, got {sorted(tensors)}")
    found = {ours: tensors[theirs] for ours, theirs in names.items()}
    return {name: _exact(tensor) for name, tensor in found.items()}


def _exact(tensor: Tensor) -> Tensor:
    """On the CPU, in float32 at least."""
    return tensor.detach().to("cpu", torch.promote_types(tensor.dtype, torch.float32))


@dataclass(frozen=True)
class Origin:
    """Where an SAE's activations come from, as far as its metadata say."""

    model: str | None = None
    hookpoint: str | None = None
    """Name of the module in `transformers`."""
    target_hookpoint: str | None = None
    layer: int | None = None
    """Of the residual stream after a block; None for another hookpoint."""
    context_length: int | None = None
    dataset: str | None = None

    @classmethod
    def of(cls, metadata: dict[str, Any]) -> "Origin":
        """From what a run writes beside its SAE, or what was read from another library's file."""
        data = part_of(metadata, "data")
        hookpoint = _of(str, data.get("hookpoint"))
        layer = _of(int, data.get("layer"))
        return cls(
            model=_of(str, data.get("name")),
            hookpoint=hookpoint,
            target_hookpoint=_of(str, data.get("target_hookpoint")),
            layer=layer_of(hookpoint) if layer is None else layer,
            context_length=_of(int, data.get("context_length")),
            dataset=_of(str, part_of(metadata, "config", "data").get("dataset")),
        )


def part_of(document: dict[str, Any], *names: str) -> dict[str, Any]:
    """An object inside a JSON object, {} where there is none: files may come from anybody."""
    for name in names:
        found = document.get(name)
        document = found if isinstance(found, dict) else {}
    return document


def _of(kind: type, value: Any) -> Any:
    return value if type(value) is kind else None


def layer_of(hookpoint: str | None) -> int | None:
    """N of a hookpoint `….N`, the output of a block: the residual stream after it. Else None."""
    before, _, last = (hookpoint or "").rpartition(".")
    return int(last) if before and last.isdigit() else None


def dense(codes: SparseCodes, size: int) -> Tensor:
    """Codes [..., k] as a tensor [..., size] of their dtype, zero elsewhere."""
    values, indices = codes
    # Added, not written: an unused slot may name a latent that another slot has (its value is 0).
    out = values.new_zeros(*values.shape[:-1], size)
    return out.scatter_add_(-1, indices, values)


@torch.no_grad()
def encoder_proxy(sae: SAE) -> tuple[Tensor, Tensor]:
    """W_enc [F, d] and b_enc [F] for tools that want an encoder row a latent.

    A latent of a KronSAE has two: (head, i, j) gets the mean of base row i and extension row j, the
    direction in which both grow. Good for cosines and for ordering; encoding with it gives other
    latents. A dense SAE's own rows are no proxy.
    """
    form = sae.kind.dense_form(sae.W_enc, sae.b_enc)
    if form is not None:
        return form[:2]
    m, n = sae.config.m, sae.config.n

    def mean(rows: Tensor) -> Tensor:
        base, extension = rows.split([m, n], dim=1)
        return ((base[:, :, None] + extension[:, None, :]) / 2).flatten(0, 2)

    return mean(sae.W_enc), mean(sae.b_enc)
