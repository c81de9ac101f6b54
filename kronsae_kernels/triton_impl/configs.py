"""Block sizes, warps and stages of each kernel: data in configs.json, read once.

"default" holds a configuration of every kernel; a card generation ("sm_80", "sm_90", "gfx942")
overrides what is better there. `python -m benchmarks.tune` measures alternatives on the card at
hand; nothing is searched for unless it is asked to.
"""

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

PATH = Path(__file__).with_name("configs.json")


class Config(NamedTuple):
    """How a kernel is launched."""

    num_warps: int
    num_stages: int
    blocks: dict[str, int]
    """Block sizes, by the kernel's constexpr parameter."""


def generation_of(device: torch.device) -> str:
    """Name of the card generation of a device: "sm_90", "gfx942"; "interpreter" for a CPU."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def config_of(kernel: str, generation: str, **blocks: int) -> Config:
    """The configuration of a kernel for a card generation; `blocks` override its block sizes."""
    table = _table()
    found = {**table["default"][kernel], **table.get(generation, {}).get(kernel, {})}
    found |= _overrides.get(kernel, {})
    warps, stages = found.pop("num_warps"), found.pop("num_stages")
    return Config(warps, stages, {**found, **blocks})


_overrides: dict[str, dict[str, int]] = {}


@contextmanager
def override(kernel: str, **changes: int) -> Iterator[None]:
    """Inside, a kernel has these numbers (warps, stages, block sizes) on every card.

    Raises ValueError for a kernel or a number that the table does not have.
    """
    known = _table()["default"].get(kernel)
    if known is None or not changes.keys() <= known.keys():
        raise ValueError(f"{kernel}: expected changes of {known}, got {changes}")
    before = _overrides.get(kernel, {})
    _overrides[kernel] = {**before, **changes}
    try:
        yield
    finally:
        _overrides[kernel] = before


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads(PATH.read_text(encoding="utf-8"))
