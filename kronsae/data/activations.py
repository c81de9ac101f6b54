"""Sources of training batches: each can save its position and go on from it exactly."""

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

from kronsae.config import DataConfig
from kronsae.data.buffer import ShuffleBuffer
from kronsae.data.common import as_kept, check_batch_size, digest, given, is_finite
from kronsae.data.language_model import LanguageModel
from kronsae.data.packing import (
    PADDING,
    Packer,
    left_out_ids,
    token_ids,
    token_mask,
)
from kronsae.data.prefetch import ForwardPass, Prefetcher
from kronsae.data.rows import BatchMemory, gather
from kronsae.data.text import TextSource
from kronsae.errors import InputError, warn
from kronsae.system import parallel
from kronsae.system.documents import Keys, Number, shown, typed
from kronsae.system.tensors import as_values

HASHED_ROWS = 256
"""Number of evenly spaced rows of a tensor whose hash `describe` gives."""

DEFAULT_CONTEXT = 1024
"""Tokens per context if the configuration gives none (fewer if the model reads fewer)."""

BATCH_SETTINGS = ("context_length", "contexts_per_batch", "buffer_tokens", "epochs")
"""Settings of `DataConfig` that change the batches, apart from the model and the text."""


MASK_SETTINGS = ("chat_roles", "join_documents", "exclude_tokens")
"""Settings of `DataConfig` that change contexts and masks, described where they are given."""


HELDOUT_SETTINGS = ("streaming", "shuffle_documents", "heldout_order")
"""Settings of `DataConfig` that say which documents of a text are held out."""


class ActivationSource(Protocol):
    """Batches of activations; after `load_state_dict` they go on where the state was taken.

    For a transcoder each row is an input followed by its target, [B, d_model + d_target], so that
    both are shuffled together. An autoencoder's source has d_target 0, or no such attribute.
    """

    d_model: int

    def __iter__(self) -> Iterator[Tensor]:
        """Batches [B, d_model (+ d_target)]; the last one may be smaller."""

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch: tensors and JSON values."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def describe(self) -> dict[str, Any]:
        """Everything that the batches depend on (JSON-able); compared when a run resumes."""


Pair = tuple[Tensor, Tensor]
"""Inputs [..., d_model] and targets [..., d_target], row by row."""


def split_target(rows: Tensor, d_target: int) -> tuple[Tensor, Tensor | None]:
    """Split rows [B, d_model + d_target] into inputs [B, d_model] and targets (None without)."""
    if not d_target:
        return rows, None
    inputs, targets = rows.split([rows.shape[1] - d_target, d_target], 1)
    return inputs, targets


class TensorActivations:
    """Rows of a tensor [..., d], shuffled anew (by seed) in each epoch.

    A batch may cross into the next epoch, so that only the very last batch can be smaller:
    learning-rate schedules count on full batches.
    x: a tensor or an array of numpy, or a pair of these. It keeps its memory, and a batch reads its
        own rows alone, so that x may be a `numpy.memmap` of a file larger than memory.
    epochs: None repeats for ever.
    Raises InputError unless x is floating, non-empty and at least two-dimensional, and
    batch_size >= 1.
    """

    def __init__(
        self, x: Tensor | Pair, batch_size: int, seed: int = 0, epochs: int | None = None
    ) -> None:
        check_batch_size(batch_size)
        self.parts = _parts(x, "activations")  # inputs and, for a transcoder, targets
        self.d_model, self.d_target = _widths(self.parts)
        self.count, self.device = self.parts[0].shape[:-1].numel(), self.parts[0].device
        self.batch_size, self.seed, self.epochs = batch_size, seed, epochs
        self.rows_served = 0  # over all epochs
        self.memory = BatchMemory(batch_size, self.d_model + self.d_target, torch.float32)
        self._shuffled: tuple[int, Tensor] | None = None  # epoch, and its order

    def __iter__(self) -> Iterator[Tensor]:
        while len(rows := self._next_rows()):
            self.rows_served += len(rows)
            yield self._batch(rows)

    def _batch(self, rows: Tensor) -> Tensor:
        """The rows [B, d] float32 at indices [B]."""
        if self.device.type == "cpu" and all(part.ndim == 2 for part in self.parts):
            return gather(self.parts, rows, self.memory.take(len(rows)))
        return torch.cat([_at(part, rows).float() for part in self.parts], 1)

    def _next_rows(self) -> Tensor:
        """Indices [B] of the next rows, also across an epoch's end; none after the last epoch."""
        start, count = self.rows_served, self.count
        stop = start + self.batch_size
        if self.epochs is not None:
            stop = min(stop, self.epochs * count)
        parts = [torch.empty(0, dtype=torch.int64, device=self.device)]
        while start < stop:
            epoch, row = divmod(start, count)
            parts.append(self._order(epoch)[row : row + stop - start])
            start += len(parts[-1])
        return torch.cat(parts)

    def _order(self, epoch: int) -> Tensor:
        if self._shuffled is None or self._shuffled[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(self.count, generator=generator)
            self._shuffled = epoch, order.to(self.device)
        return self._shuffled[1]

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.rows_served}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        rows = 2**53 if self.epochs is None else self.epochs * self.count
        self.rows_served = given(state, rows)

    def describe(self) -> dict[str, Any]:
        count = self.count
        chosen = torch.linspace(0, count - 1, min(count, HASHED_ROWS), dtype=torch.float64)
        at = chosen.long().to(self.device)
        rows = torch.cat([_at(part, at) for part in self.parts], 1).float().cpu().contiguous()
        return {
            "source": "tensor",
            "shape": [count, self.d_model + self.d_target],
            "content": digest(rows.numpy().tobytes()),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "epochs": self.epochs,
            **_describe_target(self.d_target),
        }


class IterableActivations:
    """Batches of any iterable in its own order: tensors [..., d] or pairs, flattened to [B, d].

    It resumes by skipping batches, so the iterable must give the same ones again.
    Raises InputError for a batch that is not a floating-point [..., d], or whose width differs from
    the first batch's.
    """

    def __init__(self, batches: Iterable[Tensor | Pair]) -> None:
        try:
            iterator = iter(batches)
        except TypeError:
            raise InputError(
                "activations: expected a tensor [N, d], an array of numpy, a pair of these, or an "
                f"iterable of batches, got {shown(batches)}"
            ) from None
        try:
            first = next(iterator)
        except StopIteration:
            problem = "activations: expected batches [B, d], got an empty iterable"
            raise InputError(problem) from None
        rows, self.d_target = _rows(first, "batch 0")
        self.d_model = rows.shape[1] - self.d_target
        self.batches = chain([first], iterator)
        self.batches_served = 0

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.batches:
            rows, _ = _rows(batch, f"batch {self.batches_served}", (self.d_model, self.d_target))
            self.batches_served += 1
            yield rows.float()

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.batches_served}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        expected = given(state)
        if self.batches_served > expected:
            raise InputError(
                f"the iterable has given {self.batches_served} batches, more than the {expected} "
                "of the checkpoint, and cannot go back: create a new one"
            )
        batches = iter(self)
        while self.batches_served < expected:
            if next(batches, None) is None:
                raise InputError(
                    f"the iterable ended after {self.batches_served} batches, before the "
                    f"{expected} that the checkpoint has seen"
                )

    def describe(self) -> dict[str, Any]:
        return {
            "source": "iterable",
            "d_model": self.d_model,
            **_describe_target(self.d_target),
        }


_POSITION = Keys({"text": Any, "packer": Any, "contexts": Tensor, "forwards": Number(int)})


class LanguageModelActivations:
    """Shuffled batches of the activations of a language model that reads packed text.

    If `overlaps(config, ...)`, a thread runs the language model ahead of the consumer, by as many
    tokens as the shuffle buffer serves between two refills. Batches and states are the same as
    without it. `close` ends the thread.

    language_model: one that is read at a single hookpoint, or `ManyHookpoints`, whose activations
        the `hookpoints` give.
    device: where rows are buffered and batches are given (None: the language model's device).
    own: numbers of the hookpoints whose activations this process wants (None: all).
    Some documents are held out for evaluation; a warning says if they have fewer tokens than
    `config.heldout_tokens`. Tokens at the end of the data that do not fill a context are left out.
    Raises InputError if there is not one context of text for training and one for evaluation, or
    if activations are not finite.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        text: TextSource,
        config: DataConfig,
        batch_size: int,
        seed: int,
        device: torch.device | None = None,
        own: Sequence[int] | None = None,
    ) -> None:
        check_batch_size(batch_size)
        self.device = device or language_model.device
        self.language_model = language_model
        points = language_model.points
        self.own = list(range(len(points)) if own is None else own)
        self.hookpoints = [HookpointActivations(self, number) for number in range(len(points))]
        self.text = text
        self.config = config
        self.batch_size, self.seed = batch_size, seed
        first = points[self.own[0]]
        self.d_model, self.d_target = first.d_model, first.d_target
        vocabulary = language_model.vocabulary
        self.packer = Packer.of(config, vocabulary)
        known = language_model.vocab_size
        self.left_out = left_out_ids(vocabulary, config.exclude_tokens, known)
        self.contexts: list[Tensor] = []  # packed, not yet run through the model
        self.forwards = 0
        text.check_ids(language_model.vocab_size)
        self._heldout, self.heldout_documents = set_aside(text, vocabulary, config)
        self._check_heldout()
        text.hold_out(self.heldout_documents)
        self.documents = iter(text)
        self._pack(1)
        if not self.contexts:
            raise InputError(
                f"dataset {config.dataset!r}: only {len(self.packer.waiting)} tokens are left to "
                f"train on after {self._heldout.numel():,} held-out tokens, less than one context "
                f"of {config.context_length}: give more text, fewer --heldout-tokens or a smaller "
                "--context-length"
            )
        self.overlap = overlaps(config, language_model.device)
        self.prefetcher: Prefetcher | None = None
        self.position = self.position_dict()
        self.buffer = ShuffleBuffer(
            *(self._rows(), config.buffer_tokens, batch_size, seed, self.device),
            hookpoints=len(self.own),
        )
        self._states: dict[int, dict[str, Any]] = {}

    def __iter__(self) -> Iterator[Tensor]:
        """Batches of the only hookpoint."""
        [hookpoint] = self.hookpoints
        return iter(hookpoint)

    def serve(self) -> bool:
        """Give each of the hookpoints that are wanted the next batch; False after the last one."""
        batch = self.buffer.next()
        if batch is None:
            return False
        for number, x in zip(self.own, batch, strict=True):
            self.hookpoints[number].served.append(x)
        return True

    def _rows(self) -> Iterator[list[Tensor]]:
        """Rows [r, d_model + d_target] of the masked tokens, one forward pass at a time, of each
        hookpoint."""
        passes = self._passes()
        if self.overlap:
            devices = (self.device, self.language_model.device)
            passes = self.prefetcher = Prefetcher(passes, self.buffer.rows_per_refill, devices)
        for forward_pass in passes:
            self.position = forward_pass.position
            yield forward_pass.rows

    def _passes(self) -> Iterator[ForwardPass]:
        while (ids := self.next_contexts()) is not None:
            rows = self._read(ids, f"forward pass {self.forwards - 1}")
            # A copy to the host must be complete; one between GPUs is ordered by their streams.
            ordered = self.device.type == "cuda"
            rows = [x.to(self.device, non_blocking=ordered) for x in rows]
            yield ForwardPass(rows, self.position_dict())

    def next_contexts(self) -> Tensor | None:
        """Packed contexts [b, context_length] of the next forward pass; None at the text's end."""
        size = self.config.contexts_per_batch
        self._pack(size)
        if not self.contexts:
            return None
        ids = torch.stack(self.contexts[:size])
        self.contexts = self.contexts[size:]
        self.forwards += 1
        return ids

    def _pack(self, count: int) -> None:
        """Fill `contexts` up to `count`, or to the end of the text."""
        while len(self.contexts) < count:
            document = next(self.documents, None)
            if document is None:
                break
            self.contexts += self.packer.add(document)

    def read(self, packed: Tensor, where: str) -> list[Tensor]:
        """Rows [r, d_model + d_target] float32 of the masked tokens of packed contexts [b, L].

        Of each hookpoint. Raises InputError, which names `where`, if they are not finite.
        """
        return [rows.float() for rows in self._read(packed, where)]

    def _read(self, packed: Tensor, where: str) -> list[Tensor]:
        """`read`, but rows that the language model gives in bfloat16 or float16 stay so."""
        outputs = self.language_model.activations_of_points(token_ids(packed))
        mask = self.token_mask(packed).to(outputs[0].device)
        rows = []
        for number in self.own:
            x = as_kept(outputs[number][mask])
            if not is_finite(x):
                bad = (~torch.isfinite(x)).any(1).float().mean().item()
                hookpoint = self.language_model.points[number].hookpoint
                raise InputError(
                    f"{hookpoint} gave NaN or infinity for {bad:.1%} of the tokens of {where}: try "
                    "--model-dtype float32 or bfloat16 (a training run can resume with it; a "
                    "harvest has to start again)"
                )
            rows.append(x)
        return rows

    def token_mask(self, packed: Tensor) -> Tensor:
        """Mask [b, t] of the tokens to train and evaluate on; see `packing.token_mask`."""
        begin = len(self.packer.begin)
        return token_mask(packed, self.language_model.vocabulary, self.left_out, begin)

    def _check_heldout(self) -> None:
        """Raise InputError if no token of the held-out text is one to evaluate on."""
        roles = self.config.chat_roles
        if not self.heldout_mask().any():
            raise InputError(
                f"dataset {self.config.dataset!r}: no token of its held-out text may be trained on"
                + (f": are there messages of {roles}?" if roles else "")
            )

    def heldout_contexts(self) -> Tensor:
        """Token ids [c, context_length] that are never trained on; the same for every seed."""
        return token_ids(self._heldout)

    def packed_heldout(self) -> Tensor:
        """`heldout_contexts` as `next_contexts` gives others, with the marks of the packer."""
        return self._heldout

    def heldout_mask(self) -> Tensor:
        """Mask [c, context_length] of the held-out tokens to evaluate on."""
        return self.token_mask(self._heldout)

    def heldout_activations(self) -> Tensor:
        """Rows [t, d_model + d_target] float32 of the held-out tokens, in reading order.

        Of the only hookpoint.
        """
        [rows] = self.heldout_rows.values()
        return rows

    @cached_property
    def heldout_rows(self) -> dict[int, Tensor]:
        """`heldout_activations` of each of the `hookpoints`."""
        parts = self.packed_heldout().split(self.config.contexts_per_batch)
        rows = zip(*(self.read(packed, "held-out text") for packed in parts), strict=True)
        return dict(zip(self.own, map(torch.cat, rows), strict=True))

    def text_in_order(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The held-out text and then the rest, unshuffled, for analysis.

        Gives per forward pass the token ids [b, L], their mask [b, L], and rows
        [t, d_model + d_target] float32 of the masked tokens, of the only hookpoint. It moves the
        position in the text.
        """
        size = self.config.contexts_per_batch
        for packed in self._heldout.split(size):
            [rows] = self.read(packed, "held-out text")
            yield token_ids(packed), self.token_mask(packed), rows
        while (contexts := self.next_contexts()) is not None:
            [rows] = self.read(contexts, "the text")
            yield token_ids(contexts), self.token_mask(contexts), rows

    def interrupt(self) -> None:
        """Raise `Interrupted` where a batch is waited for or a forward pass runs.

        May be called from a signal handler. States stay valid; `close` ends the interruption.
        """
        self.language_model.interrupt()
        if self.prefetcher is not None:
            self.prefetcher.interrupt()

    def close(self) -> None:
        """End the thread; a new iterator goes on after the last batch given."""
        self.language_model.interrupt()
        if self.prefetcher is None or self.prefetcher.close():
            self.prefetcher = None
            self.language_model.interrupted.clear()
            self.go_to(self.position)

    @property
    def model_waited(self) -> float | None:
        """Seconds that the language model's thread has waited for room; None without a thread."""
        return None if self.prefetcher is None else self.prefetcher.waited

    def state_dict(self) -> dict[str, Any]:
        [state] = self.state_dicts().values()
        return state

    def state_dicts(self) -> dict[int, dict[str, Any]]:
        """`state_dict` of each of the `hookpoints`, all of which have given as many batches."""
        buffers = zip(self.own, self.buffer.state_dicts(), strict=True)
        return {number: {**self.position, "buffer": buffer} for number, buffer in buffers}

    def position_dict(self) -> dict[str, Any]:
        """The position in the text, and the tokens and contexts that wait."""
        length = self.config.context_length
        empty = torch.empty(0, length, dtype=torch.int64)
        return {
            "text": self.text.state_dict(),
            "packer": self.packer.state_dict(),
            "contexts": torch.stack(self.contexts) if self.contexts else empty,
            "forwards": self.forwards,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, even after batches were given."""
        self.load_state_of(self.own[0], state)

    def load_state_of(self, number: int, state: dict[str, Any]) -> None:
        """Go on from the states of the `hookpoints`, once the last of them is loaded."""
        self._states[number] = typed(state, Keys({"buffer": Any}), "source")
        if len(self._states) < len(self.own):
            return
        self.close()
        self.go_to({name: value for name, value in state.items() if name != "buffer"})
        self.buffer.load_state_dicts([self._states[n]["buffer"] for n in self.own])
        self._states.clear()
        for hookpoint in self.hookpoints:
            hookpoint.served.clear()

    def go_to(self, position: dict[str, Any]) -> None:
        """Go on with the contexts that came after `position_dict`."""
        position = typed(position, _POSITION, "source")
        self.text.load_state_dict(position["text"])
        self.documents = iter(self.text)
        self.packer.load_state_dict(position["packer"])
        self.contexts = list(position["contexts"])
        self.forwards = position["forwards"]
        self.position = position
        self.buffer.source = self._rows()

    def describe(self) -> dict[str, Any]:
        return self.describe_at(self.language_model)

    def describe_at(self, point: LanguageModel) -> dict[str, Any]:
        """`describe` of the batches of one of the hookpoints."""
        return {
            "source": "language model",
            **point.describe(),
            "text": self.text.fingerprint(),
            "heldout_contexts": self._heldout.shape[0],
            "batch_size": self.batch_size,
            "seed": self.seed,
            **{name: getattr(self.config, name) for name in BATCH_SETTINGS + HELDOUT_SETTINGS},
            **describe_begin(self.language_model.vocabulary, self.packer.begin),
            **describe_mask(self.config),
            **({"chat_template": self.packer.chat.digest} if self.packer.chat else {}),
        }


class HookpointActivations:
    """The activations at one of the hookpoints that a `LanguageModelActivations` reads together.

    Batches are those that it would give at this hookpoint alone. All hookpoints are read in turn,
    a batch of each; what some have not been asked for yet waits.
    """

    def __init__(self, reader: LanguageModelActivations, number: int) -> None:
        self.reader, self.number = reader, number
        self.language_model = reader.language_model.points[number]
        self.d_model = self.language_model.d_model
        self.d_target = self.language_model.d_target
        self.served: deque[Tensor] = deque()

    def __iter__(self) -> Iterator[Tensor]:
        while self.served or self.reader.serve():
            yield self.served.popleft()

    def heldout_activations(self) -> Tensor:
        """Rows [t, d_model + d_target] float32 of the held-out tokens, in reading order."""
        return self.reader.heldout_rows[self.number]

    def state_dict(self) -> dict[str, Any]:
        return self.reader.state_dicts()[self.number]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, once each of the hookpoints was given its own."""
        self.reader.load_state_of(self.number, state)

    def describe(self) -> dict[str, Any]:
        return self.reader.describe_at(self.language_model)

    def __getattr__(self, name: str) -> Any:
        """What all hookpoints share: the text, held-out contexts, the thread."""
        return getattr(self.reader, name)


def describe_mask(config: DataConfig) -> dict[str, Any]:
    """The settings of MASK_SETTINGS that are given; old runs were described without them."""
    given = {name: getattr(config, name) for name in MASK_SETTINGS}
    return {name: value for name, value in given.items() if value != getattr(DataConfig, name)}


def describe_begin(tokenizer: Any, begin: list[int]) -> dict[str, Any]:
    """How contexts begin, for `describe`, exports and other libraries.

    prepend_bos: whether that is the tokenizer's BOS token; None if contexts begin otherwise.
    """
    names = tokenizer.convert_ids_to_tokens(begin)
    prepend_bos = True if begin == [tokenizer.bos_token_id] else None if begin else False
    return {"context_begin": names, "prepend_bos": prepend_bos}


def set_aside(text: TextSource, tokenizer: Any, config: DataConfig) -> tuple[Tensor, int]:
    """Packed held-out contexts [c, context_length], and the number of documents that they are of.

    They are the first of `text.heldout()` that reach config.heldout_tokens; a warning says if the
    text has fewer.
    Raises InputError if the text does not fill one context.
    """
    packer = Packer.of(config, tokenizer)
    contexts: list[Tensor] = []
    tokens = documents = empty = 0
    for document in text.heldout():
        documents += 1
        empty += not document
        for context in packer.add(document):
            contexts.append(context)
            tokens += int((context != PADDING).sum())
            if tokens >= config.heldout_tokens:
                break
        if tokens >= config.heldout_tokens:
            break
    if documents == empty:
        raise InputError(f"dataset {config.dataset!r}: there is no text in its {documents:,} rows")
    if not contexts and packer.chat and packer.chat.problem:
        raise InputError(
            f"dataset {config.dataset!r}: its conversations cannot be read ({packer.chat.problem})"
        )
    if not contexts:
        raise InputError(
            f"dataset {config.dataset!r} has less held-out text than one context of "
            f"{config.context_length} tokens: give more text, or a smaller --context-length"
        )
    if tokens < config.heldout_tokens:
        warn(
            f"dataset {config.dataset!r}: only {tokens:,} of {config.heldout_tokens:,} tokens "
            "could be held out"
        )
    return torch.stack(contexts), documents


NO_OVERLAP = "several processes exchange activations and gradients in turns, not in two threads"
"""Why `overlaps` is False among several processes."""


def overlaps(config: DataConfig, model_device: torch.device) -> bool:
    """Whether the language model runs in a thread of its own while the autoencoder trains.

    "auto" means yes on a GPU; on a CPU both would compete for the same cores (see
    benchmarks.overlap). Never among several processes (NO_OVERLAP).
    """
    if parallel.ranks() > 1:
        return False
    return config.overlap == "on" or config.overlap == "auto" and model_device.type == "cuda"


def open_model(config: DataConfig, device: torch.device | str) -> tuple[LanguageModel, DataConfig]:
    """The language model that `config` names, and `config` with the context length resolved."""
    model = LanguageModel.of(config, device)
    return model, dataclasses.replace(config, context_length=resolve_context_length(model, config))


def resolve_context_length(model: LanguageModel, config: DataConfig) -> int:
    """Tokens per context: as configured, or (0) DEFAULT_CONTEXT, at most what the model reads.

    Raises InputError if more is configured than the model reads.
    """
    longest = model.max_context
    if model.images is not None and config.context_length not in (0, longest):
        raise InputError(
            f"context_length: {config.model} gives {longest} positions for an image, "
            f"got {config.context_length}: leave it out"
        )
    if model.images is not None:
        return model.images.positions
    check_context_length(config, longest)
    return config.context_length or min(DEFAULT_CONTEXT, longest or DEFAULT_CONTEXT)


def check_context_length(config: DataConfig, longest: int | None) -> None:
    """Raise InputError for a longer context than a model reads (None: any length)."""
    if longest and config.context_length > longest:
        raise InputError(
            f"context_length: {config.model} reads at most {longest} tokens, "
            f"got {config.context_length}"
        )


def _parts(x: Any, name: str) -> list[Tensor]:
    """A tensor [B, d], or those of a pair, on the memory of what the caller gave.

    They stay [..., d] where their rows are no view of it. Raises InputError, which names `name`.
    """
    parts = list(x) if isinstance(x, (tuple, list)) and len(x) == 2 else [x]
    parts = [as_values(part, name, "[..., B, d]") for part in parts]
    for part in parts:
        if part.ndim < 2 or not part.numel():
            got = f"{list(part.shape)} {part.dtype}"
            raise InputError(f"{name}: expected a floating tensor [..., B, d], got {got}")
    if parts[0].shape[:-1] != parts[-1].shape[:-1]:
        raise InputError(
            f"{name}: expected a target for each input, got {list(parts[0].shape)} and "
            f"{list(parts[1].shape)}"
        )
    return [_flat(part.detach()) for part in parts]


def _flat(x: Tensor) -> Tensor:
    """x [..., d] as rows [B, d], unless that would copy it."""
    try:
        return x.view(-1, x.shape[-1])
    except RuntimeError:  # its strides do not allow it
        return x


def _at(x: Tensor, rows: Tensor) -> Tensor:
    """Rows [B] of x [..., d], counted over all its leading dimensions."""
    if x.ndim == 2:
        return x.index_select(0, rows)
    return x[torch.unravel_index(rows, x.shape[:-1])]


def _widths(parts: list[Tensor]) -> tuple[int, int]:
    """(d_model, d_target) of a tensor or a pair; d_target is 0 without a target."""
    d_model, *d_target = (part.shape[-1] for part in parts)
    return d_model, sum(d_target)


def _rows(x: Any, name: str, widths: tuple[int, int] | None = None) -> tuple[Tensor, int]:
    """Rows [B, d] of a tensor, or [B, d_model + d_target] of a pair; and d_target (0 if none).

    widths: the (d_model, d_target) expected. Raises InputError, which names `name`.
    """
    parts = _parts(x, name)
    found = _widths(parts)
    if widths is not None and widths != found:
        raise InputError(
            f"{name}: expected widths (d_model, d_target) = {widths} as before, got {found}"
        )
    rows = [part.flatten(0, -2) for part in parts]
    return (rows[0] if len(rows) == 1 else torch.cat(rows, 1)), found[1]


def _describe_target(d_target: int) -> dict[str, int]:
    """The entry for `describe`; none for an autoencoder: old runs were described without it."""
    return {"d_target": d_target} if d_target else {}
