"""The stream that all SAEs of a run learn from: normalised batches of activations, and rates."""

import functools
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kronsae.data import ActivationSource, split_target
from kronsae.data.common import is_finite
from kronsae.errors import InputError
from kronsae.model.massive import DEFAULT_MULTIPLE, MassiveTokens
from kronsae.model.normalizer import SAMPLE_TOKENS, Normalizer
from kronsae.system.devices import as_double, of_doubles, random_states, set_random_states
from kronsae.system.documents import Keys, Number, typed


class DataEnded(InputError):
    """The activations ended before the budget was used."""


_STATE = Keys(
    {
        "step": int,
        "tokens": int,
        "seconds": Number(float),
        "normalizer": Any,
        "target_normalizer": Any,
        "source": dict[str, Any],
        "pending": list[Tensor],
        "torch_random_state": Tensor,
    },
    {"seen": Tensor},
)

UNSUMMED = 64
"""Batches whose distances are kept until they are summed, which takes several operations."""


class Seen:
    """Tokens, massive ones, and their parts of the variance; nothing here waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64, device=of_doubles(device))
        self._unsummed: list[tuple[Tensor, list[Tensor], list[float]]] = []

    def add(self, centred: list[Tensor], normalizers: list[Normalizer]) -> Tensor:
        """Mask [B] of the massive tokens of a batch. centred: [B, d] each, minus their mean."""
        distances = [torch.linalg.vector_norm(part, dim=1) for part in centred]
        radii = [math.inf if n.radius is None else n.radius for n in normalizers]
        pairs = zip(distances, radii, strict=True)
        massive = functools.reduce(torch.logical_or, [far > radius for far, radius in pairs])
        self._unsummed.append((massive, distances, [n.scale for n in normalizers]))
        if len(self._unsummed) == UNSUMMED:
            self.sums()
        return massive

    def sums(self) -> Tensor:
        """[4] float64: tokens, massive ones, and the sum of squared normalised distances of both.

        To write to it sets them.
        """
        for massive, distances, scales in self._unsummed:
            massive = massive.to(self._sums.device)
            squares = torch.zeros_like(massive, dtype=torch.float64)
            for part, scale in zip(distances, scales, strict=True):
                squares += (as_double(part) * scale).square()
            ones = torch.ones_like(squares)
            rows = torch.stack([ones, massive * ones, squares, torch.where(massive, squares, 0)])
            self._sums += rows.sum(1)
        self._unsummed.clear()
        return self._sums

    def shares(self) -> dict[str, float]:
        """Shares of massive tokens in number and in variance, since the last call."""
        seen, massive, spread, of_massive = self.sums().tolist()
        self._sums.zero_()
        if not math.isfinite(spread):  # squares of enormous activations
            of_massive = spread = 1.0
        return {
            "massive_share": massive / max(1, seen),
            "massive_variance_share": of_massive / spread if spread else 0.0,
        }


class Stream:
    """Batches of a source up to a budget of tokens, normalised with statistics of the first ones.

    A massive token's place is taken by another token of its batch, so that batches keep their size
    and nothing waits for the device. multiple: see `kronsae.model.massive`.
    steps, tokens: numbers of batches and tokens given so far.  normalizer: None before the first.
    target_normalizer: that of a transcoder's targets; None for an autoencoder.
    """

    def __init__(
        self,
        source: ActivationSource,
        budget: int,
        device: torch.device,
        multiple: float = DEFAULT_MULTIPLE,
    ) -> None:
        self.source = source
        self.budget = budget
        self.device = device
        self.multiple = multiple
        self.steps = 0
        self.tokens = 0
        self.d_target = getattr(source, "d_target", 0)
        self.normalizer: Normalizer | None = None
        self.target_normalizer: Normalizer | None = None
        self.pending: list[Tensor] = []  # batches that were measured, but not yet given
        self.seen = Seen(device)  # since the last call of `rates`
        self.rows = torch.empty(0, dtype=torch.int64, device=device)
        self.batches: Iterator[Tensor] | None = None
        self.largest: Tensor | None = None  # magnitude in the batches on a GPU not yet checked
        self.checked = 0  # batches
        self.seconds = 0.0  # of earlier sessions
        self.started = time.monotonic()
        self.waited = 0.0  # seconds waited for data since the last call of `rates`
        # At that call: time, tokens, and seconds that the language model had waited for room.
        self.rated = (self.started, 0, 0.0)

    @property
    def done(self) -> bool:
        """True when the budget is used."""
        return self.tokens >= self.budget

    def due(self, every: int) -> bool:
        """True after each `every`-th step; never for 0."""
        return every > 0 and self.steps % every == 0

    def next(self) -> tuple[Tensor, Tensor | None]:
        """The next batch [B, d] and its targets, normalised, on the device, cut to the budget.

        Raises DataEnded if there is none, InputError if it is not finite. `check` raises that for
        batches that come from a GPU, as it has to wait for the GPU.
        """
        began = time.monotonic()
        if self.batches is None:
            self.batches = iter(self.source)
        if self.normalizer is None:
            self._measure_normalizer(self.batches)
        x = self.pending.pop(0) if self.pending else next(self.batches, None)
        self.waited += time.monotonic() - began
        if x is None:
            raise DataEnded(
                f"the data ended after {self.tokens:,} of {self.budget:,} tokens: "
                "give more text, more --epochs, or fewer --tokens"
            )
        if x.device.type != "cpu" and self.normalizer is not None:
            largest = torch.linalg.vector_norm(x, torch.inf)
            self.largest = largest if self.largest is None else self.largest.maximum(largest)
        elif not is_finite(x):
            bad = int((~torch.isfinite(x)).any(1).sum())
            raise InputError(
                f"batch {self.steps}: {bad} of {x.shape[0]} activations hold NaN or infinity"
            )
        x = x[: self.budget - self.tokens]
        self.steps += 1
        self.tokens += x.shape[0]
        x, target = split_target(x.to(self.device, torch.float32), self.d_target)
        assert self.normalizer is not None  # else the first batch was not finite
        return self._normalised(x, target)

    @property
    def massive(self) -> MassiveTokens | None:
        """The rule that tells massive tokens; None before the first batch, or if there is none."""
        return self.counted if self.multiple else None

    @property
    def counted(self) -> MassiveTokens | None:
        """The rule by which massive tokens are counted, also where none is left out."""
        if self.normalizer is None:
            return None
        of_target = self.target_normalizer
        return MassiveTokens(
            self.multiple or DEFAULT_MULTIPLE,
            self.normalizer.sphere,
            None if of_target is None else of_target.sphere,
        )

    def _normalised(self, x: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """A batch, normalised, in which the token before takes the place of a massive one.

        For the first ones that is the last that is not massive. If all are, they become the mean.
        """
        parts = [(self.normalizer, x), (self.target_normalizer, target)]
        normalizers, centred = [], []
        scales: list[Any] = []
        for normalizer, part in parts:
            if normalizer is not None and part is not None:
                normalizers.append(normalizer)
                centred.append(part - normalizer.mean)
                scales.append(normalizer.scale)
        if self.multiple:
            massive = self.seen.add(centred, normalizers)
            if x.device.type != "cpu" or massive.any():
                if len(self.rows) != len(x):
                    self.rows = torch.arange(len(x), device=x.device)
                before = torch.where(massive, -1, self.rows).cummax(0).values
                taken = torch.where(before < 0, before[-1], before)
                centred = [part[taken] for part in centred]
                scales = [(before[-1] >= 0) * scale for scale in scales]
        out = [part.mul_(scale) for part, scale in zip(centred, scales, strict=True)]
        return out[0], out[1] if len(out) > 1 else None

    def check(self) -> None:
        """Raise InputError if a batch that came from a GPU since the last call is not finite."""
        largest, self.largest = self.largest, None
        if largest is not None and not is_finite(largest):
            raise InputError(
                f"batches {self.checked} to {self.steps - 1}: some activations are NaN or infinite"
            )
        self.checked = self.steps

    def _measure_normalizer(self, batches: Iterator[Tensor]) -> None:
        """Set the normalizers from the first batches, which then wait to be given.

        They stay None if the first batch is not finite, or if there is none.
        """
        finite: list[Tensor] = []
        while sum(map(len, finite)) < min(SAMPLE_TOKENS, self.budget):
            x = next(batches, None)
            if x is None:
                break
            self.pending.append(x)
            if not is_finite(x):
                break
            finite.append(x)
        if finite:
            x, target = split_target(torch.cat(finite), self.d_target)
            self.normalizer = Normalizer.of(x, self.multiple).to(self.device)
            if target is not None:
                self.target_normalizer = Normalizer.of(target, self.multiple).to(self.device)

    def rates(self) -> dict[str, float]:
        """Rates since the last call.

        tokens_per_s; wait_share: share of the time spent waiting for activations; model_wait_share:
        share of the time in which the language model, if it runs in a thread, waited for room.
        massive_share, massive_variance_share: massive tokens among those seen, and in their
        variance; absent if all tokens are trained on.
        """
        now, (before, tokens, model_waited) = time.monotonic(), self.rated
        elapsed = max(1e-9, now - before)
        rates = {
            "tokens_per_s": (self.tokens - tokens) / elapsed,
            "wait_share": min(1.0, self.waited / elapsed),
        }
        total = getattr(self.source, "model_waited", None)
        if total is not None:
            rates["model_wait_share"] = min(1.0, max(0.0, total - model_waited) / elapsed)
        self.rated, self.waited = (now, self.tokens, total or 0.0), 0.0
        if self.multiple:
            rates |= self.seen.shares()
        return rates

    def interrupt(self) -> None:
        """Make a waiting `next` raise `Interrupted`, if the source can be interrupted.

        Without effect before the first step, when there is nothing to save.
        """
        if self.steps and hasattr(self.source, "interrupt"):
            self.source.interrupt()

    def close(self) -> None:
        """Let the source produce no more batches ahead."""
        if hasattr(self.source, "close"):
            self.source.close()

    def position(self) -> dict[str, Any]:
        """Step, tokens and seconds, as they are logged with every record."""
        return {
            "step": self.steps,
            "tokens": self.tokens,
            "seconds": round(self.seconds + time.monotonic() - self.started, 3),
        }

    def state_dict(self) -> dict[str, Any]:
        """All that determines the batches to come; tensors are views, valid until the next one."""
        return {
            **self.position(),
            "normalizer": self.normalizer and self.normalizer.state_dict(),
            "target_normalizer": self.target_normalizer and self.target_normalizer.state_dict(),
            "source": self.source.state_dict(),
            "pending": self.pending,
            "seen": self.seen.sums(),
            "torch_random_state": torch.get_rng_state(),
            "random_states": random_states(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state. Raises InputError, which names the key that cannot be."""
        state = typed(state, _STATE, "stream")
        tokens = typed(state["tokens"], Number(int, 1, self.budget), "stream.tokens")
        steps = typed(state["step"], Number(int, 1, tokens), "stream.step")
        self.steps, self.tokens, self.seconds = steps, tokens, state["seconds"]
        normalizer = Normalizer.of_state(state["normalizer"], "stream.normalizer")
        self.normalizer = normalizer.to(self.device)
        if self.d_target:
            of_target = Normalizer.of_state(state["target_normalizer"], "stream.target_normalizer")
            self.target_normalizer = of_target.to(self.device)
        self.source.load_state_dict(state["source"])
        self.pending = state["pending"]
        if "seen" in state:  # which older checkpoints lack
            self.seen.sums().copy_(state["seen"])
        torch.set_rng_state(state["torch_random_state"])
        if "random_states" in state:
            set_random_states(state["random_states"])
        self.rated = (self.started, self.tokens, 0.0)
