"""Activations from a cache: a stream to train from, and its held-out part.

Letters: B tokens a batch, r rows of a shard or a group of them, d width of all that is read.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kronsae.cache.index import CacheIndex, Shard, check_sizes, read_tensors
from kronsae.cache.model import ModelByName
from kronsae.config import ACTIVATIONS_ORDERS
from kronsae.data.buffer import ShuffleBuffer
from kronsae.data.rows import BatchMemory, gather
from kronsae.errors import InputError

READERS = 4
"""Files that are read at a time: where one waits for the disk, another one's checksum is made."""


class CacheActivations:
    """Batches [B, d_model (+ d_target)] float32 of a cache's tokens, none of them held out.

    order "global": each epoch permutes the shards, takes as many at a time as `buffer_tokens` hold
        (a group, at least one), and permutes the rows of the group. So every epoch reads each shard
        once, as a whole; a row can come anywhere in an epoch, but those of a shard stay within a
        group's length of each other. It is no uniform permutation of all rows: what a batch lacks
        in mixture is made up for by the harvest, which read the documents in a random order.
        A batch goes on into the next group and epoch; only the last one can be smaller. Any
        position is found without reading what lies before it.
    order "stream": shard by shard through the shuffle buffer of live training. The batches are, bit
        for bit, those that the language model would give live with this batch size, seed and
        buffer, if the cache is float32, was harvested with the same seed, and holds all the text
        (or all that the buffer gets to see). Later epochs repeat the order of the shards.

    layer or hookpoint, and target_hookpoint for a transcoder: which of those harvested to read;
    nothing for the only one.  epochs: None repeats for ever.
    verify: hold each file to its SHA-256 when it is first read.
    device: where batches are given, and the language model goes if an evaluation asks for it.

    Threads read ahead: one group waits while another is given out, and a batch while another is
    trained on. So memory is two groups and three batches, whatever the size of the cache (in
    "stream" order two shards and the buffer). Iterate anew after `load_state_dict`.
    Raises InputError if the cache or the choice is unsound; a damaged shard is named when it is
    read.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        layer: int | None = None,
        hookpoint: str | None = None,
        target_hookpoint: str | None = None,
        batch_size: int,
        seed: int = 0,
        epochs: int | None = 1,
        buffer_tokens: int = 131_072,
        order: str = "global",
        verify: bool = True,
        device: torch.device | str = "cpu",
        trust_remote_code: bool = False,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size: expected >= 1, got {batch_size}")
        if order not in ACTIVATIONS_ORDERS:
            raise InputError(f"order: one of {ACTIVATIONS_ORDERS}, not {order!r}")
        self.folder = Path(folder)
        self.index = CacheIndex.open(folder)
        check_sizes(self.folder, self.index)
        self.places = places_of(self.index, layer, hookpoint, target_hookpoint)
        widths = [self.index.hookpoints[place].width for place in self.places]
        self.d_model, self.d_target = widths[0], sum(widths[1:])
        self.batch_size, self.seed, self.epochs = batch_size, seed, epochs
        self.buffer_tokens, self.order = buffer_tokens, order
        self.verify = verify
        self.verified: set[str] = set()
        self.device = torch.device(device)
        self.language_model = ModelByName(self.index, self.places, self.device, trust_remote_code)
        self.together = buffer_tokens if order == "global" else 0
        self.given = 0
        """Rows given out, over all epochs; in stream order, shards that went to the buffer."""
        self.buffer: ShuffleBuffer | None = None
        if order == "stream":
            rows = self._stream()
            self.buffer = ShuffleBuffer(rows, buffer_tokens, batch_size, seed, self.device)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.buffer) if self.buffer is not None else self._global()

    def check_budget(self, tokens: int) -> None:
        """Raise InputError if the cache ends before so many tokens were given."""
        held = self.index.train_rows
        if self.epochs is not None and self.epochs * held < tokens:
            raise InputError(
                f"{self.folder} holds {held:,} tokens to train on, which end before --tokens "
                f"{tokens:,}: give fewer of them, or --epochs {-(-tokens // held)}"
            )

    # In global order

    def _global(self) -> Iterator[Tensor]:
        with closing(self._batches()) as batches, _one_thread("kronsae-batch") as pool:
            ahead = pool.submit(next, batches, None)
            while (batch := ahead.result()) is not None:
                ahead = pool.submit(next, batches, None)
                self.given += len(batch)
                yield batch.to(self.device).float()

    def _batches(self) -> Iterator[Tensor]:
        """Batches [B, d] from the position on, on the CPU, as they go to the device."""
        # What goes to another device goes as it is stored, and is converted there.
        dtype = torch.float32 if self.device.type == "cpu" else getattr(torch, self.index.dtype)
        memory = BatchMemory(self.batch_size, self.d_model + self.d_target, dtype)
        batch, filled = memory.take(self.batch_size), 0
        for order, rows in self._groups():
            while len(order):
                taken = order[: self.batch_size - filled]
                order = order[len(taken) :]
                gather(rows, taken, batch[filled : filled + len(taken)])
                filled += len(taken)
                if filled == self.batch_size:
                    yield batch
                    batch, filled = memory.take(self.batch_size), 0
        if filled:
            yield batch[:filled]

    def _groups(self) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """For each group from the position on: rows left to give, in order, and the group."""
        epoch, skipped = divmod(self.given, self.index.train_rows)
        groups: list[tuple[int, int, int]] = []  # asked for, not yet given, and rows to leave out

        def ask() -> Iterator[list[int]]:
            left = skipped
            for number in count(epoch) if self.epochs is None else range(epoch, self.epochs):
                for place, shards in enumerate(self._grouped(number)):
                    rows = sum(self.index.train[shard].rows for shard in shards)
                    if left >= rows:
                        left -= rows
                        continue
                    groups.append((number, place, left))
                    left = 0
                    yield shards

        for rows in self._read(ask()):
            number, place, before = groups.pop(0)
            drawn = np.random.default_rng([self.seed, number, place])
            order = torch.from_numpy(drawn.permutation(len(rows[0])))
            yield order[before:], rows

    def _grouped(self, epoch: int) -> list[list[int]]:
        """Numbers of the shards of each group of an epoch, in order."""
        drawn = np.random.default_rng([self.seed, epoch])
        shards = drawn.permutation(len(self.index.train)).tolist()
        size = _shards_per_group(self.index, self.together)
        return [shards[i : i + size] for i in range(0, len(shards), size)]

    # In stream order

    def _stream(self) -> Iterator[Tensor]:
        """Rows [r, d] of each shard from the position on."""
        shards = len(self.index.train)
        end = None if self.epochs is None else self.epochs * shards
        asked = count(self.given) if end is None else range(self.given, end)
        for rows in self._read([number % shards] for number in asked):
            self.given += 1
            yield _joined([part.float() for part in rows])

    # Reading

    def _read(self, groups: Iterable[Sequence[int]]) -> Iterator[list[Tensor]]:
        """[r, width] of each hookpoint, for each group; the next one is read meanwhile.

        What was given is valid until the next one is asked for.
        """
        groups = iter(groups)
        slots = [self._new_slot(), self._new_slot()]
        with (
            ThreadPoolExecutor(READERS, "kronsae-shard") as readers,
            _one_thread("kronsae-cache") as pool,
        ):

            def start() -> Future[list[Tensor]] | None:
                group = next(groups, None)
                if group is None:
                    return None
                slots.reverse()
                return pool.submit(self._load, group, slots[0], readers)

            ahead = start()
            while ahead is not None:
                rows = ahead.result()
                ahead = start()
                yield rows

    def _new_slot(self) -> list[Tensor]:
        """Memory for the largest group, which is used again and again: new pages cost time."""
        rows = group_rows(self.index, self.together)
        dtype = getattr(torch, self.index.dtype)
        widths = (self.index.hookpoints[place].width for place in self.places)
        return [torch.empty(rows, width, dtype=dtype) for width in widths]

    def _load(self, group: Sequence[int], slot: list[Tensor], readers: Executor) -> list[Tensor]:
        start, files = 0, []
        for number in group:
            shard = self.index.train[number]
            for place, part in zip(self.places, slot, strict=True):
                files.append((shard, place, part[start : start + shard.rows]))
            start += shard.rows
        for _ in readers.map(self._load_file, *zip(*files, strict=True)):
            pass
        return [part[:start] for part in slot]

    def _load_file(self, shard: Shard, place: int, into: Tensor) -> Tensor:
        """Read a shard's activations [r, width] of the hookpoint `place`."""
        mark = shard.activations[place]
        read_tensors(
            self.folder,
            mark,
            self.index.activations_layout(shard, place),
            into={"activations": into},
            verify=self.verify and mark.file not in self.verified,
        )
        self.verified.add(mark.file)
        return into

    # Held-out text

    def _tokens(self, name: str) -> Tensor:
        parts = [
            read_tensors(self.folder, shard.tokens, self.index.tokens_layout(shard))[name]
            for shard in self.index.heldout
        ]
        return torch.cat(parts)

    def heldout_contexts(self) -> Tensor:
        """Token ids [c, context_length] that were set aside before the harvest."""
        return self._tokens("contexts").long()

    def heldout_mask(self) -> Tensor:
        """Which of them [c, context_length] have activations."""
        return self._tokens("mask")

    def heldout_activations(self) -> Tensor:
        """Rows [t, d_model + d_target] float32 of these, in reading order."""
        parts = []
        for shard in self.index.heldout:
            rows = []
            for place in self.places:
                [(dtype, shape)] = self.index.activations_layout(shard, place).values()
                into = torch.empty(shape, dtype=getattr(torch, dtype))
                rows.append(self._load_file(shard, place, into))
            parts.append(_joined([part.float() for part in rows]))
        return torch.cat(parts)

    # Position

    def state_dict(self) -> dict[str, Any]:
        buffer = {} if self.buffer is None else {"buffer": self.buffer.state_dict()}
        return {"given": self.given, **buffer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind the last batch that was given; in global order nothing is read for it."""
        self.given = state["given"]
        if self.buffer is not None:
            self.buffer.source = self._stream()
            self.buffer.load_state_dict(state["buffer"])

    def describe(self) -> dict[str, Any]:
        return {
            "source": "cache",
            "cache": self.index.fingerprint,
            "hookpoints": [self.index.hookpoints[place].name for place in self.places],
            "text": self.index.text,
            "heldout_contexts": sum(shard.contexts for shard in self.index.heldout),
            "context_length": self.index.context_length,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "epochs": self.epochs,
            "order": self.order,
            "buffer_tokens": self.buffer_tokens,
        }


def places_of(
    index: CacheIndex, layer: int | None, hookpoint: str | None, target_hookpoint: str | None
) -> list[int]:
    """Places in the cache of the hookpoint and, if one is named, the target.

    Raises InputError if they were not harvested, or are the same.
    """
    places = [index.place_of(layer, hookpoint)]
    if target_hookpoint is not None:
        places.append(index.place_of(None, target_hookpoint))
        if places[0] == places[1]:
            raise InputError(
                f"target_hookpoint {target_hookpoint!r} is the hookpoint: an autoencoder predicts "
                "its input, leave it out"
            )
    return places


def group_rows(index: CacheIndex, buffer_tokens: int) -> int:
    """Rows of the largest group that can come together."""
    sizes = sorted((shard.rows for shard in index.train), reverse=True)
    return sum(sizes[: _shards_per_group(index, buffer_tokens)])


def _shards_per_group(index: CacheIndex, buffer_tokens: int) -> int:
    """How many shards are shuffled together: at least one, as many as fit, whichever they are."""
    return max(1, buffer_tokens // max(shard.rows for shard in index.train))


def _one_thread(name: str) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix=name)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
