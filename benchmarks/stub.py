"""A driver that launches nothing: the host's part of a step, timed without a card.

Kernels are compiled, their arguments bound and their launches prepared as ever, but the last call,
which a card's driver would make, does nothing. Tensors lie on the CPU and are tiny, so what is left
is the time that a processor takes to issue a step: Python, torch's dispatch, Triton's launcher.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from triton.backends.driver import DriverBase
from triton.runtime import driver

from benchmarks.ahead import TARGETS
from kronsae_kernels import step
from kronsae_kernels.triton_impl import launch


class StubDriver(DriverBase):
    """Stands for a card of a generation (as "sm_90")."""

    def __init__(self, card: str) -> None:
        self.target = TARGETS[card]
        self.utils = SimpleNamespace(
            load_binary=lambda *arguments: (0, 0, 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 2**20},
            unload_module=lambda module: None,
        )

    @classmethod
    def is_active(cls) -> bool:
        return True

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments: None

    def map_python_to_cpp_type(self, name: str) -> str:
        return name

    def get_current_target(self) -> Any:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing runs here")


@contextmanager
def stubbed(card: str) -> Iterator[None]:
    """Inside, Triton launches on this driver, and steps take CPU tensors."""
    before = driver._active
    with (
        mock.patch.object(launch, "_recorded_generation", card),
        mock.patch.object(step, "why_not", lambda *arguments: None),
    ):
        driver.set_active(StubDriver(card))
        try:
            yield
        finally:
            driver._active = before


def host_ms(card: str, rounds: int = 30) -> float:
    """Median milliseconds of processor time that it takes to issue a fused step."""
    torch.set_num_threads(1)
    h, m, n, d, k, tokens = 16, 2, 4, 16, 4, 4
    w_enc, size = torch.randn(m + n, h, d).transpose(0, 1), h * m * n
    with stubbed(card):
        training = step.TrainingStep(
            w_enc,
            torch.zeros(h, m + n),
            torch.randn(size, d),
            torch.zeros(d),
            m=m,
            k=k,
            dtype=torch.bfloat16,
        )
        x, times = torch.randn(tokens, d), []
        for _ in range(rounds + 3):
            begin = time.process_time()
            training.accumulate(x)
            training.apply(lr=1e-3)
            times.append(1e3 * (time.process_time() - begin))
    return statistics.median(times[3:])
