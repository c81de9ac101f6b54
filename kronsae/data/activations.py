"""Streams of activations with an exact position: what a trainer eats."""

import dataclasses
import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from kronsae.config import DataConfig
from kronsae.data.ahead import Ahead, Pass
from kronsae.data.buffer import ShuffleBuffer
from kronsae.data.common import digest
from kronsae.data.language_model import LanguageModel
from kronsae.data.packing import Packer, special_ids, token_mask
from kronsae.data.rows import BatchMemory, gather
from kronsae.data.text import TextSource
from kronsae.errors import InputError
from kronsae.system import parallel

if TYPE_CHECKING:
    pass

HASHED_ROWS = 256
"""Rows of a tensor, evenly spaced, by which `describe` tells it from others."""

DEFAULT_CONTEXT = 1024
"""Tokens a context where the configuration leaves it open, if the model reads so many."""

DECISIVE = ("context_length", "contexts_per_batch", "buffer_tokens", "epochs")
"""Settings of `DataConfig` that decide the batches, beside model and text."""


class ActivationSource(Protocol):
    """Batches of activations; after `load_state_dict` it goes on where the state was taken.

    For a transcoder a row is an input and, behind it, its target: [B, d_model + d_target], so that
    the two are shuffled, kept and checked as one. An autoencoder's source has d_target 0, or none.
    """

    d_model: int

    def __iter__(self) -> Iterator[Tensor]:
        """Batches [B, d_model (+ d_target)]; the last one may be smaller."""

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch given out: tensors and JSON values."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def describe(self) -> dict[str, Any]:
        """What the batches depend on (JSON-able); compared when a run is resumed."""


Pair = tuple[Tensor, Tensor]
"""Inputs [..., d_model] and targets [..., d_target], row by row."""


def split_target(rows: Tensor, d_target: int) -> tuple[Tensor, Tensor | None]:
    """Rows [B, d_model + d_target] as inputs [B, d_model] and targets (None if there are none)."""
    if not d_target:
        return rows, None
    return tuple(rows.split([rows.shape[1] - d_target, d_target], 1))


class TensorActivations:
    """Rows of a tensor [..., d], in another seeded order each epoch.

    A batch goes on into the next epoch, so that only the very last one can be smaller: schedules
    count on full ones.
    x: a tensor, or a pair of them (which is copied into one).  epochs: None repeats for ever.
    Raises InputError unless x is floating, non-empty and at least two-dimensional, and
    batch_size >= 1.
    """

    def __init__(
        self, x: Tensor | Pair, batch_size: int, seed: int = 0, epochs: int | None = None
    ) -> None:
        check_batch_size(batch_size)
        self.x, self.d_target = _rows(x, "activations")
        self.batch_size, self.seed, self.epochs = batch_size, seed, epochs
        self.d_model = self.x.shape[1] - self.d_target
        self.given = 0
        """Rows given out, over all epochs."""
        self.memory = BatchMemory(batch_size, self.x.shape[1], torch.float32)
        self._shuffled: tuple[int, Tensor] | None = None  # epoch, and its order

    def __iter__(self) -> Iterator[Tensor]:
        while len(rows := self._next_rows()):
            self.given += len(rows)
            yield self._batch(rows)

    def _batch(self, rows: Tensor) -> Tensor:
        """The rows [B, d] float32 with these numbers [B]."""
        if self.x.device.type != "cpu":
            return self.x.index_select(0, rows).float()
        return gather([self.x], rows, self.memory.take(len(rows)))

    def _next_rows(self) -> Tensor:
        """Numbers [B] of the rows that follow, on into the next epoch; none at the end."""
        start, count = self.given, self.x.shape[0]
        stop = start + self.batch_size
        if self.epochs is not None:
            stop = min(stop, self.epochs * count)
        parts = [torch.empty(0, dtype=torch.int64, device=self.x.device)]
        while start < stop:
            epoch, row = divmod(start, count)
            parts.append(self._order(epoch)[row : row + stop - start])
            start += len(parts[-1])
        return torch.cat(parts)

    def _order(self, epoch: int) -> Tensor:
        if self._shuffled is None or self._shuffled[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(self.x.shape[0], generator=generator)
            self._shuffled = epoch, order.to(self.x.device)
        return self._shuffled[1]

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.given = state["given"]

    def describe(self) -> dict[str, Any]:
        count = self.x.shape[0]
        chosen = torch.linspace(0, count - 1, min(count, HASHED_ROWS), dtype=torch.float64)
        rows = self.x[chosen.long().to(self.x.device)].float().cpu().contiguous()
        return {
            "source": "tensor",
            "shape": list(self.x.shape),
            "content": digest(rows.numpy().tobytes()),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "epochs": self.epochs,
            **_describe_target(self.d_target),
        }


class IterableActivations:
    """Batches [..., d], or pairs of them, of any iterable, as they come, flattened to [B, d].

    It resumes by skipping as many batches, so the iterable must give the same ones again.
    Raises InputError for a batch that is no floating [..., d], or of another width than the first.
    """

    def __init__(self, batches: Iterable[Tensor | Pair]) -> None:
        self.batches = iter(batches)
        self.given = 0
        self.first = next(self.batches, None)
        if self.first is None:
            raise InputError("activations: expected batches [B, d], got an empty iterable")
        self.first, self.d_target = _rows(self.first, "batch 0")
        self.d_model = self.first.shape[1] - self.d_target

    def __iter__(self) -> Iterator[Tensor]:
        if self.first is not None:
            x, self.first = self.first, None
            self.given += 1
            yield x.float()
        for x in self.batches:
            x, _ = _rows(x, f"batch {self.given}", (self.d_model, self.d_target))
            self.given += 1
            yield x.float()

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.given > state["given"]:
            raise InputError(
                f"the iterable has given {self.given} batches, more than the {state['given']} of "
                "the checkpoint, and cannot go back: make it anew"
            )
        skipped = iter(self)
        while self.given < state["given"]:
            if next(skipped, None) is None:
                raise InputError(
                    f"the iterable ended after {self.given} batches, before the "
                    f"{state['given']} that the checkpoint has seen"
                )

    def describe(self) -> dict[str, Any]:
        return {
            "source": "iterable",
            "d_model": self.d_model,
            **_describe_target(self.d_target),
        }


class LanguageModelActivations:
    """Activations of a language model that reads text: packed, masked, shuffled, in batches.

    With `config.overlap` a thread runs the language model ahead of who takes batches, by as many
    tokens as the shuffle buffer serves between two fills, so that neither waits for the other while
    both have work; batches and states are the same. `close` ends the thread.

    device: where rows wait and batches are given (None: where the language model is).
    The first documents are set aside to evaluate on; a warning tells if they are fewer tokens than
    `config.heldout_tokens`. What does not fill a context at the end of the data is left out.
    Raises InputError if there is not a context of text for each purpose, or if activations are not
    finite.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        text: TextSource,
        config: DataConfig,
        batch_size: int,
        seed: int,
        device: torch.device | None = None,
    ) -> None:
        check_batch_size(batch_size)
        self.device = device or language_model.device
        self.language_model = language_model
        self.text = text
        self.config = config
        self.batch_size, self.seed = batch_size, seed
        self.d_model, self.d_target = language_model.d_model, language_model.d_target
        self.packer = Packer(language_model.tokenizer, config.context_length)
        self.special = special_ids(language_model.tokenizer)
        self.contexts: list[Tensor] = []  # packed, not yet read by the model
        self.forwards = 0
        self._heldout = self._set_aside()
        self.documents = iter(text)
        self._pack(1)
        if not self.contexts:
            raise InputError(
                f"dataset {config.dataset!r}: what is left to train on, after "
                f"{self._heldout.numel():,} held-out tokens, has only {len(self.packer.waiting)} "
                f"tokens, less than one context of {config.context_length}: give more text, fewer "
                "--heldout-tokens or a smaller --context-length"
            )
        self.overlap = overlaps(config, language_model.device)
        self.ahead: Ahead | None = None
        self.position = self.position_dict()
        self.buffer = ShuffleBuffer(
            self._rows(), config.buffer_tokens, batch_size, seed, self.device
        )

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.buffer)

    def _rows(self) -> Iterator[Tensor]:
        """Rows [r, d_model + d_target] float32 of the masked tokens, a forward pass at a time."""
        passes = self._passes()
        if self.overlap:
            devices = (self.device, self.language_model.device)
            passes = self.ahead = Ahead(passes, self.buffer.served_at_once, devices)
        for done in passes:
            self.position = done.position
            yield done.rows

    def _passes(self) -> Iterator[Pass]:
        while (ids := self.next_contexts()) is not None:
            x = self.read(ids, f"forward pass {self.forwards - 1}")
            # A copy to the host must have arrived; one between cards is in order with its streams.
            x = x.to(self.device, non_blocking=self.device.type == "cuda")
            yield Pass(x, self.position_dict())

    def next_contexts(self) -> Tensor | None:
        """Token ids [b, context_length] of the next forward pass; None at the end of the text."""
        size = self.config.contexts_per_batch
        self._pack(size)
        if not self.contexts:
            return None
        ids = torch.stack(self.contexts[:size])
        self.contexts = self.contexts[size:]
        self.forwards += 1
        return ids

    def _pack(self, count: int) -> None:
        """Have `count` contexts waiting, or all that are left."""
        while len(self.contexts) < count:
            document = next(self.documents, None)
            if document is None:
                break
            self.contexts += self.packer.add(document)

    def read(self, ids: Tensor, where: str) -> Tensor:
        """Rows [r, d_model + d_target] float32 of the masked tokens of contexts [b, L].

        Raises InputError, which names `where`, if they are not finite.
        """
        activations = self.language_model.activations(ids)
        x = activations[self.token_mask(ids).to(activations.device)].float()
        if not torch.isfinite(x).all():
            bad = (~torch.isfinite(x)).any(1).double().mean().item()
            raise InputError(
                f"{self.language_model.hookpoint} gave NaN or infinity for {bad:.1%} of the tokens "
                f"of {where}: try --model-dtype float32 or bfloat16 (training can go on with it, "
                "a harvest begins anew)"
            )
        return x

    def token_mask(self, ids: Tensor) -> Tensor:
        """Which tokens [b, t] are trained and evaluated on; see `packing.token_mask`."""
        return token_mask(ids, self.language_model.tokenizer, self.special)

    def _set_aside(self) -> Tensor:
        """Held-out contexts [c, L]: the first that reach config.heldout_tokens."""
        contexts, documents = set_aside(self.text, self.language_model.tokenizer, self.config)
        self.text.hold_out(documents)
        return contexts

    def heldout_contexts(self) -> Tensor:
        """Token ids [c, context_length] that are never trained on; the same for every seed."""
        return self._heldout

    def heldout_mask(self) -> Tensor:
        """Which of them [c, context_length] are evaluated on."""
        return self.token_mask(self._heldout)

    def heldout_activations(self) -> Tensor:
        """Rows [t, d_model + d_target] float32 of their masked tokens, in reading order."""
        parts = self._heldout.split(self.config.contexts_per_batch)
        return torch.cat([self.read(ids, "held-out text") for ids in parts])

    def text_in_order(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Held-out text and then the rest, as it is read: what to look at, not to train on.

        Token ids [b, L], their mask [b, L], and rows [t, d_model + d_target] float32 of the masked
        tokens, a forward pass at a time. It takes from the text that training would take.
        """
        size = self.config.contexts_per_batch
        for ids in self._heldout.split(size):
            yield ids, self.token_mask(ids), self.read(ids, "held-out text")
        while (ids := self.next_contexts()) is not None:
            yield ids, self.token_mask(ids), self.read(ids, "the text")

    def interrupt(self) -> None:
        """Let whoever waits for a batch, or is in a forward pass, have `Interrupted` raised.

        May be called from a signal's handler. States stay whole; `close` ends the interruption.
        """
        self.language_model.interrupt()
        if self.ahead is not None:
            self.ahead.interrupt()

    def close(self) -> None:
        """End the thread; whoever iterates anew goes on behind the last batch given."""
        self.language_model.interrupt()
        if self.ahead is None or self.ahead.close():
            self.ahead = None
            self.language_model.interrupted.clear()
            self.go_to(self.position)

    @property
    def model_waited(self) -> float | None:
        """Seconds that the language model waited for room, since it began; None if in turns."""
        return None if self.ahead is None else self.ahead.waited

    def state_dict(self) -> dict[str, Any]:
        return {**self.position, "buffer": self.buffer.state_dict()}

    def position_dict(self) -> dict[str, Any]:
        """Where text and packer stand: what decides the contexts that come next."""
        length = self.config.context_length
        empty = torch.empty(0, length, dtype=torch.int64)
        return {
            "text": self.text.state_dict(),
            "packer": self.packer.state_dict(),
            "contexts": torch.stack(self.contexts) if self.contexts else empty,
            "forwards": self.forwards,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, also if batches were given already."""
        self.close()
        self.go_to({name: state[name] for name in self.position})
        self.buffer.load_state_dict(state["buffer"])

    def go_to(self, position: dict[str, Any]) -> None:
        """Go on with the contexts that came after `position_dict`."""
        self.position = position
        self.text.load_state_dict(position["text"])
        self.documents = iter(self.text)
        self.packer.load_state_dict(position["packer"])
        self.contexts = list(position["contexts"])
        self.forwards = position["forwards"]
        self.buffer.source = self._rows()

    def describe(self) -> dict[str, Any]:
        return {
            "source": "language model",
            **self.language_model.describe(),
            "text": self.text.fingerprint(),
            "heldout_contexts": self._heldout.shape[0],
            "batch_size": self.batch_size,
            "seed": self.seed,
            **{name: getattr(self.config, name) for name in DECISIVE},
        }


def set_aside(text: TextSource, tokenizer: Any, config: DataConfig) -> tuple[Tensor, int]:
    """Contexts [c, context_length] that reach config.heldout_tokens, and of how many documents.

    They are the text's first documents to evaluate on; a warning tells if they are too few.
    Raises InputError if they do not fill one context.
    """
    packer = Packer(tokenizer, config.context_length)
    contexts: list[Tensor] = []
    wanted = -(-config.heldout_tokens // config.context_length)
    documents = 0
    for document in text.heldout():
        documents += 1
        contexts += islice(packer.add(document), wanted - len(contexts))
        if len(contexts) == wanted:
            break
    if not contexts:
        raise InputError(
            f"dataset {config.dataset!r} has less text than one context of "
            f"{config.context_length} tokens to hold out: give more text, or a smaller "
            "--context-length"
        )
    if len(contexts) < wanted:
        warnings.warn(
            f"dataset {config.dataset!r}: only {len(contexts) * config.context_length:,} of "
            f"{config.heldout_tokens:,} tokens could be held out",
            stacklevel=4,
        )
    return torch.stack(contexts), documents


NO_OVERLAP = "several processes exchange activations and gradients in turns, not in two threads"


def overlaps(config: DataConfig, model_device: torch.device) -> bool:
    """Whether the language model runs in a thread, beside the autoencoder.

    By itself where it runs on a GPU. On a CPU both want the same cores (see benchmarks.overlap).
    Never among several processes (NO_OVERLAP).
    """
    if parallel.ranks() > 1:
        return False
    return config.overlap == "on" or config.overlap == "auto" and model_device.type != "cpu"


def open_model(config: DataConfig, device: torch.device | str) -> tuple[LanguageModel, DataConfig]:
    """The language model that `config` names, and `config` with the context length it gives."""
    device = torch.device(device)
    default = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = default if config.model_dtype == "auto" else getattr(torch, config.model_dtype)
    model = LanguageModel.load(
        config.model,
        layer=config.layer,
        hookpoint=config.hookpoint,
        target_hookpoint=config.target_hookpoint,
        revision=config.revision,
        dtype=dtype,
        device=device,
        trust_remote_code=config.trust_remote_code,
    )
    return model, dataclasses.replace(config, context_length=resolve_context_length(model, config))


def resolve_context_length(model: LanguageModel, config: DataConfig) -> int:
    """Tokens a context: as configured, or (0) DEFAULT_CONTEXT, or all that the model reads."""
    longest = model.max_context
    if longest and config.context_length > longest:
        raise InputError(
            f"context_length: {config.model} reads at most {longest} tokens, "
            f"got {config.context_length}"
        )
    return config.context_length or min(DEFAULT_CONTEXT, longest or DEFAULT_CONTEXT)


def _rows(x: Any, name: str, widths: tuple[int, int] | None = None) -> tuple[Tensor, int]:
    """[..., d] as [B, d], or a pair as [B, d_model + d_target]; and d_target (0 for a tensor)."""
    parts = list(x) if isinstance(x, (tuple, list)) and len(x) == 2 else [x]
    for part in parts:
        floating = isinstance(part, Tensor) and part.ndim >= 2 and part.is_floating_point()
        if not floating or not part.numel():
            what = f"{list(part.shape)} {part.dtype}" if isinstance(part, Tensor) else type(part)
            raise InputError(f"{name}: expected a floating tensor [..., B, d], got {what}")
    if parts[0].shape[:-1] != parts[-1].shape[:-1]:
        raise InputError(
            f"{name}: expected a target for each input, got {list(parts[0].shape)} and "
            f"{list(parts[1].shape)}"
        )
    found = parts[0].shape[-1], parts[1].shape[-1] if len(parts) == 2 else 0
    if widths not in (None, found):
        if widths[1] or found[1]:
            raise InputError(
                f"{name}: expected inputs and targets of widths {widths} as before, got {found}"
            )
        raise InputError(f"{name}: expected width d = {widths[0]} as before, got {found[0]}")
    rows = [part.detach().flatten(0, -2) for part in parts]
    return (rows[0] if len(rows) == 1 else torch.cat(rows, 1)), found[1]


def _describe_target(d_target: int) -> dict[str, int]:
    """For `describe`: nothing for an autoencoder, whose runs may be older than transcoders."""
    return {"d_target": d_target} if d_target else {}


def check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise InputError(f"batch_size: expected >= 1, got {batch_size}")
