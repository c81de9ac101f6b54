"""Training batches and held-out activations from a cache.

Letters: B tokens per batch, r rows of a shard or a group of shards, d width of all hookpoints read.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kronsae.cache.index import CacheIndex, Shard, check_sizes, read_tensors, so_far
from kronsae.cache.model import ModelByName
from kronsae.cache.remote import Remote, is_url
from kronsae.config import ACTIVATIONS_ORDERS
from kronsae.data.activations import HELDOUT_SETTINGS, describe_mask
from kronsae.data.buffer import ShuffleBuffer
from kronsae.data.common import check_batch_size, given
from kronsae.data.packing import PADDING
from kronsae.data.rows import BatchMemory, gather
from kronsae.errors import InputError
from kronsae.system.documents import Keys, typed

READERS = 4
"""Files read in parallel: while one waits for the disk, another one's checksum is computed."""

ROWS_AT_ONCE = 1024
"""Rows of int8 that are converted at a time, through float32."""


class CacheActivations:
    """Batches [B, d_model (+ d_target)] float32 of the tokens of a cache that are not held out.

    order "global": each epoch permutes the shards, takes as many at a time as `buffer_tokens` hold
        (a group of at least one), and permutes the group's rows. Each epoch reads each shard once.
        This is not a uniform permutation: rows of a shard stay within a group's length of each
        other; but the harvest has read the documents in random order.
        Batches cross into the next group and epoch; only the last one can be smaller. Resuming
        does not read what lies before the position.
    order "stream": shard by shard through the shuffle buffer of live training. The batches equal
        those of live training with the same batch size, seed and buffer bit for bit, if the cache
        is float32, was harvested with the same seed, and holds all the text (or all that the buffer
        takes). Later epochs repeat the order of the shards.

    folder: or a URL, whose files are fetched as they are needed (`kronsae.cache.remote`).
    layer or hookpoint, and target_hookpoint for a transcoder: the harvested hookpoint to read;
    none of them if there is only one.  epochs: None repeats for ever.
    tokens: read the first so many tokens of `train` alone (0: all there are). With the tokens that
        a harvest had at some time, batches are those of that time, also when it has grown since.
    verify: check each file's SHA-256 when it is first read.
    device: of the batches, and of the language model if an evaluation needs it.

    Threads read the next group while one is served, and gather the next batch while one is trained
    on. Memory is two groups and three batches for a cache of any size (in "stream" order two shards
    and the buffer). After `load_state_dict`, make a new iterator.
    Raises InputError if the cache is invalid or has no such hookpoint, and `Damaged` when a damaged
    shard is read.
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
        tokens: int = 0,
        buffer_tokens: int = 131_072,
        order: str = "global",
        verify: bool = True,
        device: torch.device | str = "cpu",
        trust_remote_code: bool = False,
    ) -> None:
        check_batch_size(batch_size)
        if order not in ACTIVATIONS_ORDERS:
            raise InputError(f"order: one of {ACTIVATIONS_ORDERS}, not {order!r}")
        self.folder = Remote(str(folder)) if is_url(folder) else Path(folder)
        self.index = CacheIndex.open(folder)
        if isinstance(self.folder, Remote):
            files = self.index.all_files()
            self.folder.files = {file.file: (file.bytes, file.sha256) for file in files}
        else:
            check_sizes(self.folder, self.index)
        if tokens:
            self.index = self.index.first(tokens, self.folder)
        self.numbers = hookpoint_numbers(self.index, layer, hookpoint, target_hookpoint)
        self.widths = [self.index.hookpoints[number].width for number in self.numbers]
        self.d_model, self.d_target = self.widths[0], sum(self.widths[1:])
        self.batch_size, self.seed, self.epochs = batch_size, seed, epochs
        self.buffer_tokens, self.order = buffer_tokens, order
        self.verify = verify
        self.verified: set[str] = set()
        self.device = torch.device(device)
        self.language_model = ModelByName(self.index, self.numbers, self.device, trust_remote_code)
        self._last_heldout: tuple[int, Tensor, Tensor] | None = None
        self.group_tokens = buffer_tokens if order == "global" else 0
        self.position = 0
        """Rows served, over all epochs; in stream order, shards read into the buffer."""
        self.buffer: ShuffleBuffer | None = None
        if order == "stream":
            rows = self._stream()
            self.buffer = ShuffleBuffer(rows, buffer_tokens, batch_size, seed, self.device)

    def __iter__(self) -> Iterator[Tensor]:
        if self.buffer is None:
            return self._global()
        return (batch for [batch] in self.buffer)

    def check_budget(self, tokens: int) -> None:
        """Raise InputError if the cache has fewer tokens, over all epochs."""
        rows = self.index.train_rows
        if self.epochs is not None and self.epochs * rows < tokens:
            raise InputError(
                f"{self.folder} has {rows:,} tokens to train on{so_far(self.index)}, fewer than "
                f"--tokens {tokens:,}: give fewer --tokens, or --epochs {-(-tokens // rows)}"
            )

    # In global order

    def _global(self) -> Iterator[Tensor]:
        with closing(self._batches()) as batches, _one_thread("kronsae-batch") as pool:
            following = pool.submit(next, batches, None)
            while (batch := following.result()) is not None:
                following = pool.submit(next, batches, None)
                self.position += len(batch)
                yield batch.to(self.device).float()

    def _batches(self) -> Generator[Tensor, None, None]:
        """Batches [B, d] from the position on, on the CPU."""
        # Batches for another device are copied in a short dtype and converted there.
        dtype = torch.float32 if self.device.type == "cpu" else self.index.dtype_in_memory
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
        """Each group from the position on: the shuffled rows still to serve, and the tensors."""
        epoch, skipped = divmod(self.position, self.index.train_rows)
        requested: list[tuple[int, int, int]] = []  # epoch, group, rows of it to skip

        def groups() -> Iterator[list[int]]:
            left = skipped
            for number in count(epoch) if self.epochs is None else range(epoch, self.epochs):
                for group, shards in enumerate(self._grouped(number)):
                    rows = sum(self.index.train[shard].rows for shard in shards)
                    if left >= rows:
                        left -= rows
                        continue
                    requested.append((number, group, left))
                    left = 0
                    yield shards

        for tensors in self._read(groups()):
            number, group, served = requested.pop(0)
            generator = np.random.default_rng([self.seed, number, group])
            order = torch.from_numpy(generator.permutation(len(tensors[0])))
            yield order[served:], tensors

    def _grouped(self, epoch: int) -> list[list[int]]:
        """The shards of each group of an epoch, in order."""
        generator = np.random.default_rng([self.seed, epoch])
        shards = generator.permutation(len(self.index.train)).tolist()
        size = _shards_per_group(self.index, self.group_tokens)
        return [shards[i : i + size] for i in range(0, len(shards), size)]

    # In stream order

    def _stream(self) -> Iterator[list[Tensor]]:
        """Rows [r, d] of each shard from the position on, for `ShuffleBuffer`."""
        shards = len(self.index.train)
        end = None if self.epochs is None else self.epochs * shards
        numbers = count(self.position) if end is None else range(self.position, end)
        for tensors in self._read([number % shards] for number in numbers):
            self.position += 1
            yield [_join(tensors)]

    # Reading

    def _read(self, groups: Iterable[Sequence[int]]) -> Iterator[list[Tensor]]:
        """Tensors [r, width] of each hookpoint, for each group, while the next group is read.

        They are valid until the next group is taken.
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

            following = start()
            while following is not None:
                tensors = following.result()
                following = start()
                yield tensors

    def _new_slot(self) -> list[Tensor]:
        """Memory for the largest group, reused because new pages cost time."""
        rows = group_rows(self.index, self.group_tokens)
        dtype = self.index.dtype_in_memory
        return [torch.empty(rows, width, dtype=dtype) for width in self.widths]

    def _load(self, group: Sequence[int], slot: list[Tensor], readers: Executor) -> list[Tensor]:
        start, files = 0, []
        for shard in (self.index.train[number] for number in group):
            for number, tensor in zip(self.numbers, slot, strict=True):
                files.append((shard, number, tensor[start : start + shard.rows]))
            start += shard.rows
        for _ in readers.map(self._load_file, *zip(*files, strict=True)):
            pass
        return [tensor[:start] for tensor in slot]

    def _load_file(self, shard: Shard, number: int, into: Tensor | None = None) -> Tensor:
        """Read a shard's activations [r, width] of a hookpoint, to `into` if it is given."""
        file = shard.activations[number]
        as_stored = self.index.dtype != "int8"
        tensors = read_tensors(
            self.folder,
            file,
            self.index.activations_layout(shard, number),
            into={"activations": into} if as_stored and into is not None else None,
            verify=self.verify and file.file not in self.verified,
            grown=shard is self.index.train[-1],
        )
        self.verified.add(file.file)
        return tensors["activations"] if as_stored else _scaled(into=into, **tensors)

    # Held-out text

    def _tokens(self, name: str) -> Tensor:
        parts = [
            read_tensors(self.folder, shard.tokens, self.index.tokens_layout(shard))[name]
            for shard in self.index.heldout
        ]
        return torch.cat(parts)

    def heldout_contexts(self) -> Tensor:
        """Token ids [c, context_length] of the held-out text, or PADDING."""
        return self._tokens("contexts").long()

    def heldout_mask(self) -> Tensor:
        """Mask [c, context_length] of the held-out tokens that have activations."""
        return self._tokens("mask")

    def heldout_activations(self) -> Tensor:
        """Rows [t, d_model + d_target] float32 of these tokens, in reading order."""
        return torch.cat(
            [
                _join([self._load_file(shard, number) for number in self.numbers]).float()
                for shard in self.index.heldout
            ]
        )

    @property
    def heldout_tokens(self) -> int:
        """Tokens of the held-out contexts."""
        if not self.index.data.join_documents:  # contexts are padded
            return int((self.heldout_contexts() != PADDING).sum())
        contexts = sum(shard.contexts for shard in self.index.heldout)
        return contexts * self.index.context_length

    def heldout_rows(self, first: int, last: int) -> Tensor:
        """Rows [t, d_model + d_target] float32 of the held-out contexts [first, last).

        Reads the shards that hold them; the last one stays in memory for the next call.
        """
        parts, start = [torch.empty(0, self.d_model + self.d_target)], 0
        for number, shard in enumerate(self.index.heldout):
            stop = start + shard.contexts
            if start < last and stop > first:
                mask, rows = self._heldout_shard(number)
                ends = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
                inside = [int(ends[min(max(at - start, 0), len(mask))]) for at in (first, last)]
                parts.append(rows[inside[0] : inside[1]])
            start = stop
        return torch.cat(parts)

    def _heldout_shard(self, number: int) -> tuple[Tensor, Tensor]:
        """Mask [c, L] and rows [r, d_model + d_target] float32 of a held-out shard."""
        if self._last_heldout is None or self._last_heldout[0] != number:
            self._last_heldout = number, *self._read_whole(self.index.heldout[number])[1:]
        return self._last_heldout[1:]

    def _read_whole(self, shard: Shard) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids [c, L], mask [c, L] and rows [r, d_model + d_target] float32 of a shard."""
        tokens = read_tensors(self.folder, shard.tokens, self.index.tokens_layout(shard))
        rows = _join([self._load_file(shard, number) for number in self.numbers]).float()
        return tokens["contexts"].long(), tokens["mask"], rows

    def text_in_order(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The held-out text and then the rest, unshuffled, for analysis, a shard at a time.

        Gives token ids [c, L], their mask [c, L], and rows [r, d_model + d_target] float32 of the
        masked tokens.
        """
        for shard in (*self.index.heldout, *self.index.train):
            yield self._read_whole(shard)

    # Position

    def state_dict(self) -> dict[str, Any]:
        buffer = {} if self.buffer is None else {"buffer": self.buffer.state_dicts()[0]}
        return {"given": self.position, **buffer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the last batch of a state."""
        most = 2**53 if self.epochs is None else self.epochs * self.index.train_rows
        self.position = given(state, most)
        if self.buffer is not None:
            state = typed(state, Keys({"buffer": Any}), "source")
            self.buffer.source = self._stream()
            self.buffer.load_state_dicts([state["buffer"]])

    def describe(self) -> dict[str, Any]:
        hookpoints = [self.index.hookpoints[number] for number in self.numbers]
        sites = [hookpoint.site for hookpoint in hookpoints]
        return {
            "source": "cache",
            "cache": self.index.fingerprint,
            "hookpoints": [hookpoint.name for hookpoint in hookpoints],
            **({"sites": sites} if any(sites) else {}),
            "text": self.index.text,
            "heldout_contexts": sum(shard.contexts for shard in self.index.heldout),
            "context_length": self.index.context_length,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "epochs": self.epochs,
            "order": self.order,
            "buffer_tokens": self.buffer_tokens,
            **{name: getattr(self.index.data, name) for name in HELDOUT_SETTINGS},
            **self.index.begin,
            **describe_mask(self.index.data),
        }


def hookpoint_numbers(
    index: CacheIndex, layer: int | None, hookpoint: str | None, target_hookpoint: str | None
) -> list[int]:
    """Numbers of the hookpoint and, if one is named, the target among the cache's hookpoints.

    Raises InputError if they were not harvested, or are the same.
    """
    numbers = [index.number_of(layer, hookpoint)]
    if target_hookpoint is not None:
        numbers.append(index.number_of(None, target_hookpoint))
        if numbers[0] == numbers[1]:
            raise InputError(
                f"target_hookpoint {target_hookpoint!r} is the hookpoint: an autoencoder predicts "
                "its input, leave it out"
            )
    return numbers


def group_rows(index: CacheIndex, buffer_tokens: int) -> int:
    """Rows of the largest group of shards that can occur."""
    sizes = sorted((shard.rows for shard in index.train), reverse=True)
    return sum(sizes[: _shards_per_group(index, buffer_tokens)])


def _shards_per_group(index: CacheIndex, buffer_tokens: int) -> int:
    """Shards shuffled together: at least one, otherwise as many as always fit."""
    return max(1, buffer_tokens // max(shard.rows for shard in index.train))


def _one_thread(name: str) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix=name)


def _scaled(scales: Tensor, activations: Tensor, into: Tensor | None) -> Tensor:
    """Rows [r, width] of int8 times their scales [r], as bfloat16."""
    if into is None:
        into = torch.empty(activations.shape, dtype=torch.bfloat16)
    memory = torch.empty(ROWS_AT_ONCE, activations.shape[1])
    blocks = (x.split(ROWS_AT_ONCE) for x in (activations, scales[:, None], into))
    for rows, factors, block in zip(*blocks, strict=True):
        exact = memory[: len(rows)].copy_(rows).mul_(factors)
        block.copy_(exact)
    return into


def _join(tensors: list[Tensor]) -> Tensor:
    """Tensors [r, width] side by side."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, 1)
