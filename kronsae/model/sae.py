"""The sparse autoencoder: an encoder (Kron or dense), a selection, and a sparse decoder.

With TopK it is two calls of `kronsae_kernels` on raw activations:
    codes = fused_encode(x, W_enc, b_enc, m=m, k=k)
    x_hat = sparse_decode(codes, w_dec=W_dec, b_dec=b_dec)
Training happens on centred and scaled activations; `SAE.folded` gives the SAE of raw ones.
"""

import copy
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch as st
import torch
from torch import Tensor, nn

from kronsae.config import SAEConfig, run_settings
from kronsae.errors import InputError
from kronsae.model.encoder import Encoder, is_every
from kronsae.model.familiar import Familiar
from kronsae.model.ranks import SHARDED, own_part
from kronsae.registry import SELECTIONS
from kronsae.system.devices import as_double
from kronsae.system.documents import Keys, shown, to_json, typed
from kronsae.system.files import (
    read_checksummed,
    replace_directory,
    sha256,
    usable_path,
    write_checksummed,
)
from kronsae.system.parallel import ALONE, Mesh
from kronsae.system.tensors import as_values, check_weights, dense
from kronsae_kernels import SparseCodes, refine_codes, sparse_decode
from kronsae_kernels.common import check_tensors

FORMAT_VERSION = 1
WEIGHTS_NAME = "sae.safetensors"
CONFIG_NAME = "config.json"


_TEXT, _NUMBER, _TEXTS = str | None, int | None, list[str] | None
_DESCRIBED = Keys(
    {},
    {
        **{"name": _TEXT, "hookpoint": _TEXT, "target_hookpoint": _TEXT, "revision": _TEXT},
        **{"source": _TEXT, "dtype": _TEXT, "text": _TEXT, "site": _TEXT, "target_site": _TEXT},
        **{"layer": _NUMBER, "context_length": _NUMBER, "prepend_bos": bool | None},
        **{"hookpoints": _TEXTS, "context_begin": _TEXTS, "sites": list[str | None] | None},
    },
)
METADATA = Keys(
    {},
    {
        "config": run_settings(partial=True),
        "data": _DESCRIBED,
        "tokens": _NUMBER,
        "metrics": dict[str, float | str | None],
        "massive_tokens": dict[str, Any] | None,
    },
)
"""Keys of an SAE's metadata that have a meaning; all others are the user's.

config: settings of its run.  data: what describes the activations.  tokens: it was trained on.
"""
SAE_FILE = Keys(
    {
        "format": str,
        "format_version": int,
        "sae": dict[str, Any],
        "sha256": str,
        "metadata": dict[str, Any],
    }
)
"""config.json of a folder of `SAE.save`."""


REFINE_RATE = 0.5
"""Size at which the steps of `SAEConfig.refine` start, in those that would solve for one latent
alone, whose decoder row has unit norm."""

_NO_TENSOR = "sae(x) gives x_hat, codes and loss: the reconstruction is sae(x).x_hat"


class SAEOutput(NamedTuple):
    """Result of a forward pass."""

    x_hat: Tensor
    """[..., d] reconstruction."""
    codes: SparseCodes
    """The active latents of each token."""
    loss: Tensor | None
    """Mean squared error over tokens and dimensions (scalar). [KronSAE, App. H]
    None for a transcoder that was not given its target."""

    def __sub__(self, _other: object) -> Any:
        raise InputError(_NO_TENSOR)

    def __rsub__(self, _other: object) -> Any:
        raise InputError(_NO_TENSOR)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"no {name!r}: {_NO_TENSOR}")


class SAE(Familiar, Encoder):
    """A sparse autoencoder with parameters

    W_enc: [h, m + n, d] (Kron) or [F, d] (dense)      b_enc: [h, m + n] or [F]
    W_dec: [F, d], rows of unit norm                   b_dec: [d]

    Initialised as in the paper: W_enc ~ N(0, 1) / sqrt(2F), times config.init_scale; decoder row
    (head, i, j) is base row i plus extension row j of that head, scaled to unit norm (dense: the
    encoder's row); biases 0. [KronSAE, App. H] `generator` draws the weights.

    and, where config asks for them,
    selection.…: BatchTopK's threshold, JumpReLU's thresholds (`kronsae.model.selection`)
    router.weight, router.bias: of experts (`kronsae.model.router`)
    refine_rate: [config.refine], sizes of the steps that refine values (`refined`)
    W_skip: [d_target, d], of a transcoder with a linear skip; starts at 0 [Paulo et al. 2025]
    A transcoder's W_dec [F, d_target] starts as random rows of unit norm.

    BatchTopK selects over the batch while `sae.training`, and by its threshold after `sae.eval()`,
    as a loaded SAE does.

    mesh: processes that share it (`kronsae.system.parallel`). Along `mesh.heads` each holds an
    equal share of the heads, in order: 1/R of the rows of the parameters `SHARDED`. They call each
    method together, with the same x, and all get the codes of the whole dictionary.
    """

    def __init__(
        self,
        config: SAEConfig,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        mesh: Mesh = ALONE,
    ) -> None:
        super().__init__(config, device, mesh)
        self.metadata: dict[str, Any] = {}
        self.W_dec = nn.Parameter(torch.empty(self.own_latents, config.d_out, device=device))
        self.b_dec = nn.Parameter(torch.zeros(config.d_out, device=device))
        self.selection = SELECTIONS[config.selection](config).to(device)
        rate = torch.full((config.refine,), REFINE_RATE, device=device) if config.refine else None
        self.refine_rate = None if rate is None else nn.Parameter(rate)
        skip = torch.zeros(config.d_out, config.d_model, device=device) if config.skip else None
        self.W_skip = None if skip is None else nn.Parameter(skip)
        if self.W_enc.device.type != "meta":
            self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new weights (see the class)."""
        drawn = self._drawn(self.W_enc, generator)
        self.W_enc.copy_(drawn * self.config.init_scale / (2 * self.config.dict_size) ** 0.5)
        if self.config.d_target:
            rows = self._drawn(self.W_dec, generator)
        else:
            rows = self.kind.decoder_rows(self.W_enc)
        self.W_dec.copy_(rows)
        self.normalize_decoder()
        self.b_enc.zero_()
        self.b_dec.zero_()
        if self.router is not None:
            self.router.reset_parameters(generator)
        if self.refine_rate is not None:
            self.refine_rate.fill_(REFINE_RATE)
        if self.W_skip is not None:
            self.W_skip.zero_()

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Scale every decoder row to unit norm."""
        norms = self.decoder_norms()[:, None]
        self.W_dec.div_(norms.clamp_(min=torch.finfo(norms.dtype).tiny))

    def decoder_norms(self) -> Tensor:
        """Norms [F] of the decoder's rows."""
        return torch.linalg.vector_norm(self.W_dec, dim=1)

    def encode(
        self,
        x: Tensor,
        *,
        k: int | None = None,
        mask: Tensor | None = None,
        impl: str | None = None,
    ) -> SparseCodes:
        """The active latents of x [..., d]; with `k` or `mask`, the k largest (see `largest`).

        Unused slots have value 0 (see `kronsae.model.selection`); TopK has none. See also
        `encode_dense`.
        """
        if k is None and mask is None:
            codes = self.selection(self, x, self.config.k, impl)
        else:
            codes = self.largest(x, self.config.k if k is None else k, mask=mask, impl=impl)
        if self.refine_rate is None:
            return codes
        values, indices = self.refined(codes, x, impl=impl)
        values, order = values.sort(dim=-1, descending=True, stable=True)
        return SparseCodes(values, indices.gather(-1, order))

    def refined(self, codes: SparseCodes, x: Tensor, *, impl: str | None = None) -> SparseCodes:
        """The selected codes of x [..., d] after the gradient steps that `SAEConfig.refine` asks
        for: the same latents, in the same places, with values that reconstruct x better."""
        if self.refine_rate is None:
            return codes
        x, silent = self._as_weights(x), self.silent_value
        if not is_every(codes):
            weights = self.W_dec, self.b_dec
            return refine_codes(codes, x, *weights, rate=self.refine_rate, silent=silent, impl=impl)
        values, active = codes.values, self.fired(codes)
        for rate in self.refine_rate:
            error = x - self.sum_of_rows(SparseCodes(values, codes.indices))
            values = values.where(~active, (values + rate * (error @ self.W_dec.T)).relu())
        return SparseCodes(values, codes.indices)

    def with_k(self, k: int) -> "SAE":
        """The same SAE with another number of active latents; it shares the weights.

        Raises InputError for a selection that does not give each token k latents, and for a k that
        it cannot have.
        """
        if not SELECTIONS[self.config.selection].exact:
            raise InputError(
                f"selection {self.config.selection!r} does not give each token k latents: only an "
                "SAE that does (topk) can have another k"
            )
        other = copy.copy(self)
        other.config = dataclasses.replace(self.config, k=k)
        return other

    def encode_dense(self, x: Tensor) -> Tensor:
        """Values of all latents [..., F] of x [..., d]: `encode` of other libraries."""
        return dense(self.encode(x), self.dict_size)

    def decode(
        self, codes: SparseCodes | Tensor, x: Tensor | None = None, *, impl: str | None = None
    ) -> Tensor:
        """Reconstruction [..., d] of codes [..., k]; a transcoder with skip needs its input x.

        codes: also the values of all latents, [..., F].
        """
        if isinstance(codes, Tensor):
            check_tensors(codes=codes)
            if codes.shape[-1:] != (self.dict_size,):
                shape = list(codes.shape)
                raise InputError(
                    f"codes: expected SparseCodes, or [..., {self.dict_size}], got {shape}"
                )
            x_hat = torch.nn.functional.linear(self._as_weights(codes), self.W_dec.T, self.b_dec)
            return self.with_skip(x_hat, x)
        if not (isinstance(codes, tuple) and len(codes) == 2):
            raise InputError(f"codes: expected SparseCodes(values, indices), got {shown(codes)}")
        codes = SparseCodes(*codes)
        check_tensors(**codes._asdict())
        return self.with_skip(self.sum_of_rows(self.own(codes), impl=impl), x)

    def check_latents(self, latents: Iterable[int]) -> None:
        """Raise InputError unless all are numbers of latents, in [0, F)."""
        for latent in latents:
            if not 0 <= typed(latent, int, "latent") < self.dict_size:
                raise InputError(f"latent: expected 0 to {self.dict_size - 1}, got {latent}")

    def own(self, codes: SparseCodes) -> SparseCodes:
        """The codes, of [..., k], of the latents that this process holds: rows of its own W_dec."""
        if self.mesh.heads.size == 1:
            return codes
        tokens = codes.values.shape[:-1]
        flat = SparseCodes(*(part.flatten(0, -2) if tokens else part[None] for part in codes))
        values, indices = own_part(flat, self.mesh.heads, len(self.W_dec))
        shape = (*tokens, values.shape[1])
        return SparseCodes(values.view(shape), indices.view(shape))

    def sum_of_rows(
        self, own: SparseCodes, *, bias: bool = True, impl: str | None = None
    ) -> Tensor:
        """Sum of the decoder rows of `own` codes, of all ranks, and of b_dec: [..., d]."""
        group = self.mesh.heads
        if is_every(own):
            x_hat = own.values.to(self.W_dec.dtype) @ self.W_dec
            return x_hat + self.b_dec if bias else x_hat
        inside = self.b_dec if bias and group.size == 1 else None
        x_hat = group.total(sparse_decode(own, w_dec=self.W_dec, b_dec=inside, impl=impl))
        return x_hat + self.b_dec if bias and inside is None else x_hat

    def with_skip(self, x_hat: Tensor, x: Tensor | None) -> Tensor:
        """x_hat [..., d_out] plus the linear skip of x [..., d], if there is one."""
        if self.W_skip is None:
            return x_hat
        if x is None:
            raise ValueError("x: a transcoder with a linear skip decodes codes with their input x")
        return x_hat + nn.functional.linear(self._as_weights(x), self.W_skip)

    def forward(self, x: Tensor, target: Tensor | None = None) -> SAEOutput:
        """Reconstruct x [..., d], of any floating dtype (raw activations for a loaded SAE).

        target: [..., d_target], that of a transcoder.
        """
        x = as_values(x, "x")
        codes = self.encode(x)
        x_hat = self.decode(codes, x)
        if target is None and not self.config.d_target:
            target = x
        if target is not None:
            target = as_values(target, "target")
            if target.shape != x_hat.shape:
                shapes = list(x_hat.shape), list(target.shape)
                raise InputError("target: expected {}, got {}".format(*shapes))
        loss = None if target is None else (x_hat - target).square().mean()
        return SAEOutput(x_hat, codes, loss)

    @torch.no_grad()
    def folded(
        self, mean: Tensor, scale: float, target: tuple[Tensor, float] | None = None
    ) -> "SAE":
        """This SAE of (x - mean) * scale as an SAE of x: same latents, reconstruction of x itself.

        Latents are divided by `scale`, so that decoder rows keep unit norm: projections are divided
        by scale, or, if a latent is a product of two, by sqrt(scale). mean: [d].
        target: mean [d_target] and scale of a transcoder's target (None: those of x), by whose
        scale the latents are then divided.
        """
        config = self.config
        out_mean, out_scale = (mean, scale) if target is None else target
        share = out_scale**-0.5 if self.kind.of_degree_two else 1 / out_scale
        config = dataclasses.replace(
            config,
            eps=config.eps / out_scale**2,
            jumprelu_bandwidth=config.jumprelu_bandwidth / out_scale,
        )
        out = SAE(config, device="meta", mesh=self.mesh).to_empty(device=self.W_enc.device)
        out.load_state_dict(self.state_dict())

        def shift(weight: Tensor) -> Tensor:
            """weight @ mean * scale (float64), by which the mean shifts weight @ (x * scale)."""
            return (as_double(weight) @ as_double(mean)) * scale

        shift_of_rows = shift(self.W_enc)
        out.W_enc.mul_(scale * share)
        out.b_enc.copy_((as_double(self.b_enc) - shift_of_rows) * share)
        out.kind.fold_(shift_of_rows, share)
        bias = as_double(self.b_dec)
        if self.W_skip is not None and out.W_skip is not None:
            out.W_skip.mul_(scale / out_scale)
            bias = bias - shift(self.W_skip)
        out.b_dec.copy_(bias / out_scale + as_double(out_mean))
        if self.router is not None and out.router is not None:
            out.router.weight.mul_(scale)
            out.router.bias.copy_(as_double(self.router.bias) - shift(self.router.weight))
        out.selection.scale_(1 / out_scale)
        return out.eval()

    def unfolded(
        self, mean: Tensor, scale: float, target: tuple[Tensor, float] | None = None
    ) -> "SAE":
        """The inverse of `folded`: this SAE of x as an SAE of (x - mean) * scale."""
        if target is not None:
            target = -target[0] * target[1], 1 / target[1]
        return self.folded(-mean * scale, 1 / scale, target)

    def unrefined(self) -> "SAE":
        """The same SAE with `SAEConfig.refine` 0, which decodes the encoder's values.

        It shares the weights, selects the same latents, and reconstructs less than this SAE.
        """
        other = copy.copy(self)
        other._parameters = {**self._parameters, "refine_rate": None}
        other.config = dataclasses.replace(self.config, refine=0)
        return other

    def why_no_unit_rows(self) -> str | None:
        """Reason why `use_unit_rows_` would change what it computes; None if it would not."""
        config = self.config
        if self.kind.dense_form(self.W_enc, self.b_enc) is None:
            return f"encoder {config.encoder!r} has no encoder row for each decoder row"
        if config.refine:
            return "the steps that refine values would be of other sizes"
        if self.router is not None or not self.selection.is_rowwise:
            selection = "a router" if self.router is not None else f"selection {config.selection!r}"
            return f"{selection} compares latents, which would be scaled"
        return None

    @torch.no_grad()
    def use_unit_rows_(self) -> None:
        """Scale decoder rows to unit norm, and latents by the norms, for the same reconstruction.

        Raises InputError where `why_no_unit_rows` gives a reason.
        """
        if reason := self.why_no_unit_rows():
            raise InputError(f"decoder rows cannot be scaled to unit norm: {reason}")
        norms = self.decoder_norms()
        norms = norms.clamp(min=torch.finfo(norms.dtype).tiny)
        self.W_dec.div_(norms[:, None])
        self.W_enc.mul_(norms[:, None])
        self.b_enc.mul_(norms)
        wide = as_double(norms)
        self.kind.fold_(torch.zeros_like(wide), wide)
        self.selection.scale_(norms)

    def save(self, directory: str | Path, metadata: dict[str, Any] | None = None) -> Path:
        """Write sae.safetensors and config.json to `directory`, which is replaced atomically.

        metadata: JSON-able facts (model, hookpoint, metrics) that `load` gives back as
            `sae.metadata`; by default this SAE's. With a mesh the first rank writes the whole SAE.
        Raises InputError if the disk is full, or if the folder holds other files, and for metadata
        that is no JSON, or that gives another meaning to a key of `METADATA`.
        """
        directory = usable_path(directory, "directory")
        metadata = self.metadata if metadata is None else metadata
        to_json(typed(metadata, METADATA, "metadata"), "metadata")
        state = self.state_dict()
        if self.mesh.data.rank == 0:
            state = {
                name: (self.mesh.heads if name in SHARDED else ALONE.heads).whole(tensor)
                for name, tensor in state.items()
            }

        def write(folder: Path) -> None:
            tensors = {name: tensor.contiguous() for name, tensor in state.items()}
            st.save_file(tensors, folder / WEIGHTS_NAME)
            settings = {
                "format": "kronsae",
                "format_version": FORMAT_VERSION,
                "sae": dataclasses.asdict(self.config),
                "sha256": sha256(folder / WEIGHTS_NAME),
                "metadata": metadata,
            }
            write_checksummed(folder / CONFIG_NAME, settings)

        with self.mesh.world.together():
            if self.mesh.first:
                replace_directory(directory, write)
        return directory


def load_metadata(directory: Path) -> dict[str, Any]:
    """The metadata of an SAE that `SAE.save` wrote. Raises InputError if it is damaged."""
    return _read_file(directory)["metadata"]


def save_metadata(directory: Path, metadata: dict[str, Any]) -> None:
    """Replace the metadata of an SAE that `SAE.save` wrote.

    Raises InputError if the disk is full.
    """
    settings = _read_file(directory)
    write_checksummed(directory / CONFIG_NAME, settings | {"metadata": metadata})


def _read_file(directory: Path) -> dict[str, Any]:
    """config.json of a folder of `SAE.save`."""
    path = directory / CONFIG_NAME
    try:
        return typed(read_checksummed(path), SAE_FILE, "")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged: {error}") from error


def made_of(config: SAEConfig, tensors: dict[str, Tensor], path: Path) -> SAE:
    """The SAE with these tensors, which were read from `path`.

    Raises InputError if their names or shapes are not those of such an SAE, before any memory is
    allocated, and if some are not finite floats.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    rows = config.dict_size, config.d_out
    if shapes.get("W_dec") != rows or shapes.get("W_enc", ())[-1:] != (config.d_model,):
        raise InputError(
            f"{path}: expected tensors W_enc [..., {config.d_model}] and W_dec {list(rows)}, "
            f"got {shapes}"
        )
    sae = SAE(config, device="meta")
    expected = {name: tuple(tensor.shape) for name, tensor in sae.state_dict().items()}
    if expected != shapes:
        raise InputError(f"{path}: expected tensors {expected}, got {shapes}")
    check_weights(tensors, path, unset=dict(sae.named_buffers()))
    sae = sae.to_empty(device="cpu")
    sae.load_state_dict(tensors)
    return sae.eval()
