"""The sparse autoencoder: an encoder (Kron or dense), a selection, and a sparse decoder.

With TopK it is, on raw activations, two calls of `kronsae_kernels` and nothing else:
    codes = fused_encode(x, W_enc, b_enc, m=m, k=k)
    x_hat = sparse_decode(codes, w_dec=W_dec, b_dec=b_dec)
Training happens on centred and scaled activations; `SAE.folded` takes that out again.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kronsae.config import SAEConfig, from_dict
from kronsae.errors import InputError
from kronsae.files import read_sealed, replace_directory, sha256, write_sealed
from kronsae.parallel import ALONE, Mesh, largest, own_part
from kronsae.selection import SELECTIONS, widened
from kronsae.switch import Router
from kronsae_kernels import (
    SparseCodes,
    dense_encode,
    fused_encode,
    sparse_decode,
    threshold_encode,
)
from kronsae_kernels.reference import compose

FORMAT_VERSION = 1
WEIGHTS_NAME = "sae.safetensors"
CONFIG_NAME = "config.json"

HELD = ("W_enc", "b_enc", "W_dec")
"""Parameters of whose rows each process along `Mesh.heads` holds an equal part, in their order."""


class SAEOutput(NamedTuple):
    """What a forward pass gives."""

    x_hat: Tensor
    """[..., d] reconstruction."""
    codes: SparseCodes
    """The active latents of each token."""
    loss: Tensor | None
    """Mean squared error over tokens and dimensions (scalar). [KronSAE, App. H]
    None for a transcoder that was not given its target."""


class SAE(nn.Module):
    """A sparse autoencoder with parameters

    W_enc: [h, m + n, d] (Kron) or [F, d] (dense)      b_enc: [h, m + n] or [F]
    W_dec: [F, d], rows of unit norm                   b_dec: [d]

    Initialised as in the paper: W_enc ~ N(0, 1) / sqrt(2F), times config.init_scale; decoder row
    (head, i, j) is base row i plus extension row j of that head, scaled to unit norm (dense: the
    encoder's row); biases 0. [KronSAE, App. H] `generator` draws the weights.

    and, where config asks for them,
    selection.…: BatchTopK's threshold, JumpReLU's thresholds (`kronsae.selection`)
    router.weight, router.bias: of experts (`kronsae.switch`)
    W_skip: [d_target, d], of a transcoder with a linear skip; starts at 0 [Paulo et al. 2025]
    A transcoder's W_dec [F, d_target] starts as random rows of unit norm.

    BatchTopK selects over the batch while `sae.training`, and by its threshold after `sae.eval()`,
    as a loaded SAE does.

    mesh: of processes that share it (`kronsae.parallel`). Along `mesh.heads` each holds an equal
    share of the heads, in order, and of the parameters `HELD` 1/R of the rows. All of these have
    to call a method together, with the same x; codes are those of the whole dictionary, with its
    indices, and the same on all.
    """

    def __init__(
        self,
        config: SAEConfig,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        mesh: Mesh = ALONE,
    ) -> None:
        super().__init__()
        if config.d_model < 1:
            raise InputError(f"d_model: expected >= 1, got {config.d_model}")
        mesh.check(config)
        self.config = config
        self.mesh = mesh
        self.metadata: dict[str, Any] = {}
        d, size = config.d_model, config.dict_size // mesh.heads.size
        if config.encoder == "kron":
            # Stored row-major over heads, which the kernels read fastest.
            heads = config.heads // mesh.heads.size
            w_enc = torch.empty(config.m + config.n, heads, d, device=device).transpose(0, 1)
        else:
            w_enc = torch.empty(size, d, device=device)
        self.W_enc = nn.Parameter(w_enc)
        self.b_enc = nn.Parameter(torch.zeros(w_enc.shape[:-1], device=device))
        self.W_dec = nn.Parameter(torch.empty(size, config.d_out, device=device))
        self.b_dec = nn.Parameter(torch.zeros(config.d_out, device=device))
        self.selection = SELECTIONS[config.selection](config).to(device)
        self.router = Router(config.experts, d, device) if config.experts else None
        skip = torch.zeros(config.d_out, d, device=device) if config.skip else None
        self.W_skip = None if skip is None else nn.Parameter(skip)
        if w_enc.device.type != "meta":
            self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new weights (see the class)."""
        drawn = self._drawn(self.W_enc, generator)
        self.W_enc.copy_(drawn * self.config.init_scale / (2 * self.config.dict_size) ** 0.5)
        if self.config.d_target:
            rows = self._drawn(self.W_dec, generator)
        elif self.config.encoder == "kron":
            base, extension = self.W_enc.split([self.config.m, self.config.n], dim=1)
            rows = (base[:, :, None] + extension[:, None, :]).reshape(self.W_dec.shape)
        else:
            rows = self.W_enc
        self.W_dec.copy_(rows)
        self.normalize_decoder()
        self.b_enc.zero_()
        self.b_dec.zero_()
        if self.router is not None:
            self.router.reset_parameters(generator)
        if self.W_skip is not None:
            self.W_skip.zero_()

    def _drawn(self, weight: Tensor, generator: torch.Generator | None) -> Tensor:
        """N(0, 1) for a weight: its rows of what is drawn for the whole dictionary."""
        group, (rows, *columns) = self.mesh.heads, weight.shape
        device = None if generator is None else generator.device
        whole = torch.randn(rows * group.size, *columns, generator=generator, device=device)
        return whole[group.rank * rows : (group.rank + 1) * rows]

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Scale every decoder row to unit norm."""
        norms = torch.linalg.vector_norm(self.W_dec, dim=1, keepdim=True)
        self.W_dec.div_(norms.clamp_(min=torch.finfo(norms.dtype).tiny))

    @property
    def dict_size(self) -> int:
        return self.config.dict_size

    @property
    def d_model(self) -> int:
        return self.config.d_model

    @property
    def latents_per_token(self) -> int:
        return self.config.latents_per_token

    def encode(
        self,
        x: Tensor,
        *,
        k: int | None = None,
        mask: Tensor | None = None,
        impl: str | None = None,
    ) -> SparseCodes:
        """The active latents of x [..., d]; or, with `k` or `mask`, the k largest (see `largest`).

        Unused slots have value 0 (see `kronsae.selection`); TopK has none.
        """
        if k is not None or mask is not None:
            k = self.config.k if k is None else k
            return self.largest(x, k, mask=mask, impl=impl)
        return self.selection(self, x, self.config.k, impl)

    def largest(
        self, x: Tensor, k: int, *, mask: Tensor | None = None, impl: str | None = None
    ) -> SparseCodes:
        """The k largest latents of x [..., d], among `mask` [F] (bool) if given.

        With experts: of the token's expert, times the router's probability; fewer (unused slots)
        where the mask leaves an expert fewer.
        """
        kron = self.config.encoder == "kron"
        encode = functools.partial(fused_encode, **self._gate) if kron else dense_encode
        x = self._as_weights(x)
        if self.mesh.heads.size > 1:
            return self._largest_of_ranks(x, k, mask, impl)
        if self.router is None:
            return encode(x, self.W_enc, self.b_enc, k=k, mask=mask, impl=impl)
        weights, biases = (p.split(len(p) // self.config.experts) for p in (self.W_enc, self.b_enc))
        masks = mask.split(self.latents_per_token) if mask is not None else None

        def of_expert(expert: int, rows: Tensor) -> SparseCodes:
            allowed = masks[expert] if masks else None
            count = k if allowed is None else min(k, int(allowed.sum()))
            if count:
                values, indices = encode(
                    rows, weights[expert], biases[expert], k=count, mask=allowed, impl=impl
                )
            else:
                values = self.W_enc.new_zeros(len(rows), 0)
                indices = values.long()
            return widened(values, indices + expert * self.latents_per_token, k, self.dict_size)

        codes = self.router.dispatch(x.reshape(-1, x.shape[-1]), of_expert)
        shape = (*x.shape[:-1], codes.values.shape[1])
        return SparseCodes(codes.values.view(shape), codes.indices.view(shape))

    def _largest_of_ranks(
        self, x: Tensor, k: int, mask: Tensor | None, impl: str | None
    ) -> SparseCodes:
        """`largest` of a dictionary whose heads are shared out; mask is that of the own latents."""
        config, size = self.config, len(self.W_dec)
        flat = x.reshape(-1, x.shape[-1])
        count = min(k, size if mask is None else int(mask.sum()))
        options = {"k": count, "mask": mask, "impl": impl}
        if not count:
            found = SparseCodes(
                self.W_dec.new_zeros(len(flat), 0), x.new_zeros(len(flat), 0).long()
            )
        elif config.encoder == "dense":
            found = dense_encode(flat, self.W_enc, self.b_enc, **options)
        else:
            # Latents compete by their product: it is composed to their value afterwards.
            product = "mul" if config.composition == "mul" else "relu_mul"
            options |= {"m": config.m, "composition": product}
            found = fused_encode(flat, self.W_enc, self.b_enc, **options)
        values, indices = largest(found, k, self.mesh.heads, size)
        if config.encoder == "kron":
            values = compose(values, config.composition, config.eps)
        return SparseCodes(values.view(*x.shape[:-1], k), indices.view(*x.shape[:-1], k))

    def above(self, x: Tensor, threshold: Tensor, *, impl: str | None = None) -> SparseCodes:
        """Every latent of x [..., d] above its threshold [F], padded (`threshold_encode`)."""
        return threshold_encode(
            self._as_weights(x),
            self.W_enc,
            self.b_enc,
            threshold=threshold,
            impl=impl if impl == "reference" else None,
            **self._gate,
        )

    @property
    def _gate(self) -> dict[str, Any]:
        """How a Kron encoder makes latents, for the kernels; nothing for a dense one."""
        config = self.config
        if config.encoder == "dense":
            return {}
        return {"m": config.m, "composition": config.composition, "eps": config.eps}

    def _as_weights(self, x: Tensor) -> Tensor:
        autocast = torch.is_autocast_enabled(x.device.type)
        return x if autocast else x.to(self.W_enc.dtype)

    def decode(
        self, codes: SparseCodes, x: Tensor | None = None, *, impl: str | None = None
    ) -> Tensor:
        """Reconstruction [..., d] of codes [..., k]; a transcoder with skip needs its input x."""
        return self.with_skip(self.sum_of_rows(self.own(codes), impl=impl), x)

    def own(self, codes: SparseCodes) -> SparseCodes:
        """What this process decodes of codes [..., k]: all, or only the latents that it holds.

        Of these the indices are rows of its own W_dec.
        """
        if self.mesh.heads.size == 1:
            return codes
        shape = codes.values.shape[:-1]
        flat = SparseCodes(*(part.flatten(0, -2) if shape else part[None] for part in codes))
        values, indices = own_part(flat, self.mesh.heads, len(self.W_dec))
        shape = *shape, values.shape[1]
        return SparseCodes(values.view(shape), indices.view(shape))

    def sum_of_rows(
        self, own: SparseCodes, *, bias: bool = True, impl: str | None = None
    ) -> Tensor:
        """Sum of the decoder rows of `own` codes, of all ranks, and of b_dec: [..., d]."""
        group = self.mesh.heads
        inside = self.b_dec if bias and group.size == 1 else None
        x_hat = group.total(sparse_decode(own, w_dec=self.W_dec, b_dec=inside, impl=impl))
        return x_hat + self.b_dec if bias and inside is None else x_hat

    def with_skip(self, x_hat: Tensor, x: Tensor | None) -> Tensor:
        """x_hat [..., d_out] plus what the linear skip makes of x [..., d], where there is one."""
        if self.W_skip is None:
            return x_hat
        if x is None:
            raise ValueError("x: a transcoder with a linear skip decodes codes with their input x")
        return x_hat + nn.functional.linear(self._as_weights(x), self.W_skip)

    def forward(self, x: Tensor, target: Tensor | None = None) -> SAEOutput:
        """Reconstruct x [..., d], of any floating dtype (raw activations for a loaded SAE).

        target: [..., d_target], what a transcoder shall predict.
        """
        codes = self.encode(x)
        x_hat = self.decode(codes, x)
        if target is None and not self.config.d_target:
            target = x
        loss = None if target is None else (x_hat - target).square().mean()
        return SAEOutput(x_hat, codes, loss)

    @property
    def silent_value(self) -> float:
        """Value of a latent whose product is 0."""
        return self.config.eps**0.5 if self.config.composition == "mand" else 0.0

    def fired(self, codes: SparseCodes) -> Tensor:
        """Which of the codes are active latents (bool [..., k]): their product is not 0."""
        return codes.values.abs() > self.silent_value

    @torch.no_grad()
    def folded(
        self, mean: Tensor, scale: float, target: tuple[Tensor, float] | None = None
    ) -> "SAE":
        """This SAE of (x - mean) * scale as an SAE of x: same latents, reconstruction of x itself.

        Latents are divided by `scale`, so decoder rows keep unit norm: with a root the projections
        take 1 / scale, with a product of two 1 / sqrt(scale) each. mean: [d].
        target: mean [d_target] and scale of a transcoder's target (None: those of x), by whose
        scale the latents are then divided.
        """
        config = self.config
        out_mean, out_scale = (mean, scale) if target is None else target
        of_product = config.encoder == "kron" and config.composition != "mand"
        share = out_scale**-0.5 if of_product else 1 / out_scale
        config = dataclasses.replace(
            config,
            eps=config.eps / out_scale**2,
            jumprelu_bandwidth=config.jumprelu_bandwidth / out_scale,
        )
        out = SAE(config, device="meta", mesh=self.mesh).to_empty(device=self.W_enc.device)
        out.load_state_dict(self.state_dict())

        def shift(weight: Tensor) -> Tensor:
            """What a linear map of (x - mean) * scale takes away because of the mean (float64)."""
            return (weight.double() @ mean.double()) * scale

        out.W_enc.mul_(scale * share)
        out.b_enc.copy_((self.b_enc.double() - shift(self.W_enc)) * share)
        bias = self.b_dec.double()
        if self.W_skip is not None:
            out.W_skip.mul_(scale / out_scale)
            bias = bias - shift(self.W_skip)
        out.b_dec.copy_(bias / out_scale + out_mean.double())
        if self.router is not None:
            out.router.weight.mul_(scale)
            out.router.bias.copy_(self.router.bias.double() - shift(self.router.weight))
        out.selection.scale_(1 / out_scale)
        return out.eval()

    def save(self, directory: str | Path, metadata: dict[str, Any] | None = None) -> Path:
        """Write sae.safetensors and config.json to `directory`, replacing it at once.

        `metadata`: JSON-able facts (model, hookpoint, metrics) that `load` gives back as
        `sae.metadata`; by default those it has. Of a mesh the first rank writes the whole SAE.
        Raises InputError if the disk is full, or if the folder holds other files.
        """
        from safetensors.torch import save_file

        state = self.state_dict()
        if self.mesh.data.rank == 0:
            state = {
                name: (self.mesh.heads if name in HELD else ALONE.heads).whole(tensor)
                for name, tensor in state.items()
            }

        def write(folder: Path) -> None:
            tensors = {name: tensor.contiguous() for name, tensor in state.items()}
            save_file(tensors, folder / WEIGHTS_NAME)
            settings = {
                "format": "kronsae",
                "format_version": FORMAT_VERSION,
                "sae": dataclasses.asdict(self.config),
                "sha256": sha256(folder / WEIGHTS_NAME),
                "metadata": self.metadata if metadata is None else metadata,
            }
            write_sealed(folder / CONFIG_NAME, settings)

        with self.mesh.world.together():
            if self.mesh.first:
                replace_directory(Path(directory), write)
        return Path(directory)


def load(
    source: str | Path,
    *,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    subfolder: str | None = None,
    allow_pickle: bool = False,
) -> SAE:
    """An SAE from a run folder, a folder written by `SAE.save`, or a Hugging Face hub id.

    Also from a folder or repository of SAELens, sparsify or dictionary_learning, whose format is
    recognised by its files (`kronsae.interop`).

    It takes raw activations; `sae.metadata` holds what was saved beside it.
    revision: branch, tag or commit on the hub.  subfolder: where in the folder or repository the
        SAE is, as "layers.6".
    allow_pickle: also read dictionary_learning's ae.pt, a pickle, of which tensors alone are taken.
    Raises InputError if there is none there, or if it is damaged or of another format.
    """
    from kronsae.interop import module_of, recognise

    folder = _find_sae(source, revision, subfolder, allow_pickle)
    found = recognise(folder) or "kronsae"
    if found == "dictionary_learning" and not allow_pickle:
        raise InputError(
            f"{folder / 'ae.pt'} is a pickle, which is only read on request: allow_pickle=True "
            "(--allow-pickle) takes tensors from it and runs nothing"
        )
    return (_load_own if found == "kronsae" else module_of(found).read)(folder).to(device)


def _load_own(folder: Path) -> SAE:
    """The SAE in a folder written by `SAE.save`."""
    from kronsae.interop.stock import read_tensors

    advice = (
        "copy the folder anew from where it came, or, in a run, --resume writes it again from the "
        "last checkpoint"
    )
    try:
        settings = read_sealed(folder / CONFIG_NAME)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / CONFIG_NAME} is damaged: {error}; {advice}") from error
    if not isinstance(settings, dict) or not {"sae", "sha256", "metadata"} <= settings.keys():
        raise InputError(f"{folder / CONFIG_NAME} is not one that SAE.save wrote")
    if settings.get("format") != "kronsae" or settings.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{folder}: expected format 'kronsae', version {FORMAT_VERSION}, got "
            f"{settings.get('format')!r}, version {settings.get('format_version')!r}"
        )
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        raise InputError(f"{weights} is missing; {advice}")
    if sha256(weights) != settings["sha256"]:
        raise InputError(
            f"{weights} is damaged: its SHA-256 is not the one in {CONFIG_NAME}; {advice}"
        )
    config = from_dict(SAEConfig, settings["sae"], str(folder / CONFIG_NAME))
    sae = made_of(config, read_tensors(weights), weights)
    sae.metadata = settings["metadata"]
    return sae


def made_of(config: SAEConfig, tensors: dict[str, Tensor], path: Path) -> SAE:
    """The SAE of these tensors, which were read from `path`.

    Raises InputError if they are not those of such an SAE; before it takes memory, whatever sizes
    the configuration names.
    """
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    rows = config.dict_size, config.d_out
    if found.get("W_dec") != rows or found.get("W_enc", ())[-1:] != (config.d_model,):
        raise InputError(
            f"{path}: expected tensors W_enc [..., {config.d_model}] and W_dec {list(rows)}, "
            f"got {found}"
        )
    sae = SAE(config, device="meta")
    expected = {name: tuple(tensor.shape) for name, tensor in sae.state_dict().items()}
    if expected != found:
        raise InputError(f"{path}: expected tensors {expected}, got {found}")
    sae = sae.to_empty(device="cpu")
    sae.load_state_dict(tensors)
    return sae.eval()


def _find_sae(
    source: str | Path, revision: str | None, subfolder: str | None, allow_pickle: bool
) -> Path:
    """The folder, here or downloaded, that holds the SAE. Raises InputError if there is none."""
    from kronsae.interop import known, recognise

    path = Path(source)
    local = path.exists()
    if not local:
        if isinstance(source, Path) or str(source).count("/") != 1 or str(source).startswith("."):
            raise InputError(f"{source}: no such folder")
        from kronsae.hub import download

        path = download(str(source), revision, subfolder, allow_pickle)
    elif revision is not None:
        raise InputError(f"revision {revision!r} has no effect: {source} is a folder here")
    for folder in (path / subfolder,) if subfolder else (path, path / "sae"):
        if recognise(folder) or (folder / WEIGHTS_NAME).exists():
            return folder
    where = f"{source}{f', {subfolder}' if subfolder else ''}"
    hint = (
        "(a run writes it when it ends, or stops on a signal)"
        if local
        else "(if it is in a folder there, name it with subfolder)"
    )
    raise InputError(
        f"{where} holds no SAE: expected {WEIGHTS_NAME} there or in its folder sae/ {hint}. "
        f"Formats that are read: {known()}"
    )
