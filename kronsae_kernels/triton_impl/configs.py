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

    def capped(self, **most: int) -> "Config":
        """The same with block sizes of `most` at most: a small problem needs no larger ones."""
        capped = {name: min(self.blocks[name], size) for name, size in most.items()}
        return self._replace(blocks={**self.blocks, **capped})


def generation_of(device: torch.device) -> str:
    """Name of the card generation of a device: "sm_90", "gfx942"; "interpreter" for a CPU."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def config_of(kernel: str, generation: str, **blocks: int) -> Config:
    """The configuration of a kernel for a card generation; `blocks` override its block sizes.

    Raises ValueError for a kernel that the table does not have, and for a table that is not right.
    """
    table = _table()
    if kernel not in table["default"]:
        raise ValueError(f"{kernel}: expected one of {sorted(table['default'])}")
    numbers = {**table["default"][kernel], **table.get(generation, {}).get(kernel, {})}
    numbers |= _overrides.get(kernel, {})
    warps, stages = numbers.pop("num_warps"), numbers.pop("num_stages")
    return Config(warps, stages, {**numbers, **blocks})


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
def _table() -> dict[str, dict[str, dict[str, int]]]:
    table = json.loads(PATH.read_text(encoding="utf-8"))
    _check(table)
    return table


def _check(table: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Raise ValueError for what is not known of the default, and what is not an integer >= 0."""
    default = table["default"]
    for generation, kernels in table.items():
        for kernel, numbers in kernels.items():
            where = f"{PATH.name}: {generation}: {kernel}"
            if kernel not in default:
                raise ValueError(f"{where}: expected one of {sorted(default)}")
            known = default[kernel].keys()
            if not {"num_warps", "num_stages"} <= known:
                raise ValueError(f"{where}: expected num_warps and num_stages, got {sorted(known)}")
            for name, number in numbers.items():
                if name not in known:
                    raise ValueError(f"{where}: {name}: expected one of {sorted(known)}")
                if type(number) is not int or number < 0:
                    raise ValueError(f"{where}: {name}: expected an integer >= 0, got {number!r}")
