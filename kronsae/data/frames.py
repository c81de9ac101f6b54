"""Activations from another process, such as a serving engine: frames of safetensors in a stream.

A frame is its length in bytes (8 bytes, little-endian), and so many bytes in safetensors format
with the tensors `activations` [r, d] and, for a transcoder, `target` [r, d_target], one row per
token; others are not used. A frame of length 0 ends the stream. `send` writes one.
"""

import socket
import sys
from collections.abc import Iterator
from itertools import chain
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from kronsae.config import MOST_WIDTH, DataConfig
from kronsae.data.activations import IterableActivations, Pair, split_target
from kronsae.data.buffer import ShuffleBuffer
from kronsae.data.common import as_kept, check_batch_size, digest
from kronsae.errors import InputError, warn
from kronsae.system.documents import Keys, parse_json, typed

MAX_FRAME_BYTES = 2**30
MAX_HEADER_BYTES = 2**16
CONNECT_SECONDS = 10

_TENSOR = Keys({"shape": list[int], "dtype": str})
FLOATING = ("F64", "F32", "F16", "BF16")


class Disconnected(InputError):
    """The sender went away without the frame that ends the stream."""


def send(stream: BinaryIO, activations: Tensor | None, target: Tensor | None = None) -> None:
    """Write a frame of rows [r, d]; None, at the end, ends the stream."""
    tensors = {"activations": activations, "target": target}
    given = {name: x.detach().cpu().contiguous() for name, x in tensors.items() if x is not None}
    data = safetensors.torch.save(given) if given else b""
    stream.write(len(data).to_bytes(8, "little") + data)
    stream.flush()


def connect(address: str) -> BinaryIO:
    """The stream of a sender that listens at HOST:PORT, or at PORT of this computer.

    Raises InputError if nothing listens there.
    """
    host, _, port = address.rpartition(":")
    if not port.isascii() or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(
            f"activations 'socket:{address}': expected socket:HOST:PORT or socket:PORT"
        )
    host = host.removeprefix("[").removesuffix("]") or "127.0.0.1"
    try:
        connection = socket.create_connection((host, int(port)), CONNECT_SECONDS)
    except OSError as error:
        raise InputError(
            f"activations 'socket:{address}': nothing answers there ({error}): start what sends "
            "the activations first"
        ) from error
    connection.settimeout(None)  # a language model may take its time
    with connection:  # the stream keeps it open
        return connection.makefile("rb")


def standard_input() -> BinaryIO:
    """The stream that is piped into this process. Raises InputError for a terminal."""
    if sys.stdin is None or sys.stdin.isatty():
        raise InputError("activations 'stdin:': nothing is piped into this command")
    return sys.stdin.buffer


def read_frames(stream: BinaryIO) -> Iterator[list[Tensor]]:
    """[activations], or [activations, target], of each frame up to the one that ends the stream.

    Raises InputError for a frame of another kind, before memory is allocated for its tensors, and
    Disconnected if the stream ends elsewhere.
    """
    widths: list[int] | None = None
    number = 0
    while size := int.from_bytes(_read(stream, 8, f"frame {number}"), "little"):
        frame = _frame(stream, size, f"frame {number}")
        own = [part.shape[1] for part in frame]
        if widths not in (None, own):
            raise InputError(f"frame {number}: expected widths {widths} as before, got {own}")
        widths = own
        yield frame
        number += 1


def _frame(stream: BinaryIO, size: int, where: str) -> list[Tensor]:
    """The tensors of a frame of `size` bytes, once its header is checked."""
    if not 8 < size <= MAX_FRAME_BYTES:
        raise InputError(
            f"{where}: expected 9 to {MAX_FRAME_BYTES:,} bytes, as its first 8 bytes say, got "
            f"{size:,}: send frames as kronsae.data.frames.send does"
        )
    start = _read(stream, 8, where)
    length = int.from_bytes(start, "little")
    if not 0 < length <= min(MAX_HEADER_BYTES, size - 8):
        raise InputError(f"{where}: expected a header of safetensors, got one of {length:,} bytes")
    header = _read(stream, length, where)
    try:
        names = _check_header(parse_json(header), size - 8 - length)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
    try:
        tensors = safetensors.torch.load(start + header + _read(stream, size - 8 - length, where))
    except SafetensorError as error:
        raise InputError(f"{where}: it is not in safetensors format ({error})") from error
    return [tensors[name] for name in names]


def _check_header(header: Any, size: int) -> list[str]:
    """Names of the tensors to read, of a header before `size` bytes of tensors.

    Raises ValueError unless they are rows of floating-point numbers that fit in there.
    """
    header = typed(header, Keys({"activations": _TENSOR}, {"target": _TENSOR}), "header")
    names = [name for name in ("activations", "target") if name in header]
    for name in names:
        shape, dtype = header[name]["shape"], header[name]["dtype"]
        if len(shape) != 2 or not 0 < shape[1] <= MOST_WIDTH or dtype not in FLOATING:
            raise ValueError(
                f"{name}: expected [r, d] of {', '.join(FLOATING)}, got {shape} {dtype}"
            )
        if shape[0] < 1 or shape[0] != header["activations"]["shape"][0]:
            raise ValueError(f"{name}: expected a row for each activation, got {shape}")
        if shape[0] * shape[1] * 2 > size:
            raise ValueError(f"{name}: {shape} {dtype} does not fit in {size:,} bytes")
    return names


def _read(stream: BinaryIO, count: int, where: str) -> bytes:
    """The next `count` bytes. Memory is taken as they arrive. Raises Disconnected without them."""
    try:
        data = stream.read(count)
    except OSError as error:
        raise Disconnected(f"{where}: the sender of activations is gone ({error})") from error
    if len(data) < count:
        raise Disconnected(
            f"{where}: the sender of activations is gone, without a frame of length 0 to end them "
            f"({len(data):,} of {count:,} bytes came)"
        )
    return data


class FrameActivations(IterableActivations):
    """Shuffled batches of the activations that frames bring.

    The first `config.heldout_tokens` rows are held out. Others are shuffled through a buffer of
    `config.buffer_tokens` rows. If the sender goes away later on, a warning says so, and the data
    ends. It resumes by reading the same stream from its beginning.
    Raises InputError if there are not more rows than are held out.
    """

    def __init__(
        self,
        stream: BinaryIO,
        config: DataConfig,
        batch_size: int,
        seed: int,
        device: torch.device | None = None,
    ) -> None:
        check_batch_size(batch_size)
        self.stream = stream
        frames = read_frames(stream)
        self._heldout, first, width = _set_aside(frames, config.heldout_tokens)
        rows = chain([first], map(_joined, _until_gone(frames)))
        size = config.buffer_tokens
        buffer = ShuffleBuffer(([part] for part in rows), size, batch_size, seed, device)
        self.order = {"batch_size": batch_size, "seed": seed, "buffer_tokens": size}
        super().__init__(_pair(batch, width) for [batch] in buffer)

    def heldout_activations(self) -> Tensor:
        """[t, d_model + d_target] float32."""
        return self._heldout

    def close(self) -> None:
        self.stream.close()

    def describe(self) -> dict[str, Any]:
        known = digest(self._heldout.numpy().tobytes())
        return {**super().describe(), "source": "frames", "heldout": known, **self.order}


def _set_aside(frames: Iterator[list[Tensor]], count: int) -> tuple[Tensor, Tensor, int]:
    """The first `count` rows, those after them in the same frame (at least one), and d_target."""
    parts: list[Tensor] = []
    d_target = rows = 0
    for frame in frames:
        d_target = sum(part.shape[1] for part in frame[1:])
        parts.append(_joined(frame))
        rows += len(parts[-1])
        if rows > count:
            heldout, rest = torch.cat(parts).split([count, rows - count])
            return heldout.float(), rest, d_target
    raise InputError(
        f"activations: {rows:,} rows came, no more than the {count:,} to be held out: send more, "
        "or give fewer --heldout-tokens"
    )


def _until_gone(frames: Iterator[list[Tensor]]) -> Iterator[list[Tensor]]:
    """The frames; a warning says if the sender goes away."""
    try:
        yield from frames
    except Disconnected as error:
        warn(str(error))


def _joined(frame: list[Tensor]) -> Tensor:
    """Rows [r, d_model + d_target]."""
    return torch.cat([as_kept(part) for part in frame], 1)


def _pair(rows: Tensor, d_target: int) -> Tensor | Pair:
    inputs, target = split_target(rows, d_target)
    return inputs if target is None else (inputs, target)
