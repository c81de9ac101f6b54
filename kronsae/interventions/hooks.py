"""Latents switched off, held or pushed inside a language model while it runs, or generates.

    model = LanguageModel.load("EleutherAI/pythia-160m", layer=6)
    with intervene(model, sae, [clamp(17, 5.0), ablate(3)]):
        model.model.generate(...)

An edit changes a latent from z to z' on a token, and the activations y there (of a transcoder: its
target's) to y + (z' - z) W_dec[latent]: what the SAE does not explain stays as it is. Or, with
keep_error=False, its reconstruction takes their place. Special tokens and the first position of a
text are never touched, as SAEs are not trained on them.

Letters: b texts, t tokens of each that a forward pass reads, n tokens, k active latents, e latents
that are edited, d width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kronsae.data import LanguageModel
from kronsae.data.language_model import first_tensor, with_first
from kronsae.data.packing import special_ids
from kronsae.errors import InputError
from kronsae.model.sae import SAE
from kronsae_kernels import SparseCodes


class Edit(NamedTuple):
    """What becomes of a latent's value z on every token: z' = keep * z + add."""

    latent: int
    keep: float
    add: float


def ablate(latent: int) -> Edit:
    """z' = 0."""
    return Edit(latent, 0.0, 0.0)


def clamp(latent: int, value: float) -> Edit:
    """z' = value, also where the latent did not fire."""
    return Edit(latent, 0.0, value)


def steer(latent: int, amount: float) -> Edit:
    """z' = z + amount: adds `amount` times the latent's decoder row."""
    return Edit(latent, 1.0, amount)


def values_of(codes: SparseCodes, latents: Tensor, dict_size: int) -> Tensor:
    """Values [n, e] of some latents [e] on the tokens of codes [n, k]; 0 where one is not active.

    Equal latents have equal columns.
    """
    distinct, place = latents.unique(return_inverse=True)
    column = torch.full((dict_size,), len(distinct), device=codes.indices.device)
    column[distinct] = torch.arange(len(distinct), device=column.device)
    out = codes.values.new_zeros(len(codes.values), len(distinct) + 1)
    return out.scatter_add_(1, column[codes.indices], codes.values)[:, place]


def change(sae: SAE, codes: SparseCodes, edits: Sequence[Edit]) -> Tensor:
    """What the edits add to the reconstruction of codes [n, k]: [n, d_out].

    Several edits of one latent act one after the other.
    """
    latents = torch.tensor([edit.latent for edit in edits], device=codes.indices.device)
    before = values_of(codes, latents, sae.dict_size)
    now: dict[int, Tensor] = {}
    first: dict[int, Tensor] = {}
    for column, edit in enumerate(edits):
        first.setdefault(edit.latent, before[:, column])
        now[edit.latent] = now.get(edit.latent, before[:, column]) * edit.keep + edit.add
    difference = torch.stack([now[latent] - first[latent] for latent in now], 1)
    return difference.to(sae.W_dec) @ sae.W_dec[list(now)]


@contextmanager
def intervene(
    model: LanguageModel, sae: SAE, edits: Sequence[Edit], *, keep_error: bool = True
) -> Iterator[None]:
    """While open, the edits act in every forward pass of `model.model`, generation included.

    sae: of raw activations at the model's hookpoint.  Without edits and with keep_error=False the
    reconstruction is spliced in as it is.
    Raises InputError for a latent outside [0, F), or widths that do not fit.
    """
    for edit in edits:
        if not 0 <= edit.latent < sae.dict_size:
            raise InputError(f"latent: expected 0 to {sae.dict_size - 1}, got {edit.latent}")
    if (model.d_model, model.d_target) != (sae.config.d_model, sae.config.d_target):
        raise InputError(
            f"expected an SAE of widths {(model.d_model, model.d_target)} (hookpoint, target), got "
            f"{(sae.config.d_model, sae.config.d_target)}"
        )

    def edited(x: Tensor, y: Tensor) -> Tensor:
        codes = sae.encode(x.to(sae.W_dec))
        base = y if keep_error else sae.decode(codes, x)
        return base + change(sae, codes, edits).to(base) if edits else base

    with spliced(model, edited):
        yield


Make = Callable[[Tensor, Tensor], Tensor]
"""From the hookpoint's activations x [n, d] and those to replace, y [n, d_out]: new ones for y."""


@contextmanager
def spliced(model: LanguageModel, make: Make) -> Iterator[None]:
    """While open, `make` replaces activations in every forward pass, but for untouched positions.

    With a key-value cache, padding on either side, beams and samples: a token's position in its
    text is counted from the attention mask, or else from what the cache holds. Where the module
    runs several times in a forward pass it is replaced the first time, as in `token_losses`.
    """
    state = _Pass(special_ids(model.tokenizer))
    module = model.module if model.target is None else model.target

    def begin(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state.begin(args, kwargs)

    def read(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if state.x is None:
            state.x = first_tensor(output).clone()  # later modules may add to it in place

    def replace(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if state.replaced:
            return output
        state.replaced = True
        y = first_tensor(output)
        x = y if model.target is None else state.x
        mask = state.mask(y)
        out = y.clone()
        out[mask] = make(x[mask], y[mask]).to(y)
        return with_first(output, out)

    with ExitStack() as stack:
        hooks = [model.model.register_forward_pre_hook(begin, with_kwargs=True)]
        if model.target is not None:
            hooks.append(model.module.register_forward_hook(read))
        hooks.append(module.register_forward_hook(replace))
        for hook in hooks:
            stack.callback(hook.remove)
        yield


class _Pass:
    """What one forward pass reads, and what has happened in it."""

    def __init__(self, special: Tensor) -> None:
        self.special = special
        self.begin((), {})

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.x: Tensor | None = None
        self.replaced = False
        self.ids = kwargs.get("input_ids", args[0] if args else None)
        self.attention = kwargs.get("attention_mask")
        # Its name is `past_key_values`, or `cache` in newer transformers.
        caches = (value for value in kwargs.values() if hasattr(value, "get_seq_length"))
        self.seen = max((int(cache.get_seq_length()) for cache in caches), default=0)

    def mask(self, y: Tensor) -> Tensor:
        """[b, t] bool: tokens of activations y [b, t, d] that SAEs are trained on."""
        length = y.shape[1]
        attention = self.attention
        if torch.is_tensor(attention) and attention.shape == (y.shape[0], self.seen + length):
            attended = attention.bool().to(y.device)
            mask = attended & (attended.cumsum(1) > 1)
            mask = mask[:, -length:]
        else:
            position = torch.arange(self.seen, self.seen + length, device=y.device)
            mask = (position > 0).expand(y.shape[:2])
        if self.ids is None:
            return mask
        return mask & ~torch.isin(self.ids.to(y.device), self.special.to(y.device))
