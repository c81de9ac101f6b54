"""A whole training step whose gradients are never written: forward, backward and AdamW, fused.

    step = TrainingStep(w_enc, b_enc, w_dec, b_dec, m=m, k=k)
    out = step.accumulate(x)       # forward and backward, as often as there are micro-batches
    grad_norm = step.apply(lr=8e-4)

gives what autograd through `fused_encode` and `sparse_decode`, with torch.optim.AdamW, gives. A
gradient row exists in the registers of the program that updates its weights, and nowhere else: the
step moves about half the bytes. Weights and AdamW's state keep torch's own names and forms, so that
a run can go from one to the other at any step. Needs Triton kernels: `why_not` says if they run.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kronsae_kernels import backends
from kronsae_kernels.common import (
    SparseCodes,
    check_choice,
    check_count,
    check_floating,
    check_mask,
    check_number,
    check_same,
    check_tensors,
    require,
    shape_of,
)
from kronsae_kernels.hierarchical import check_ranks_of_codes
from kronsae_kernels.ranks import Ranks, keep_largest_of_all
from kronsae_kernels.reference import compose
from kronsae_kernels.step_arguments import (
    MOMENTS,
    NAMES,
    Thresholds,
    check_bool,
    check_of_latents,
    check_prefixes,
    check_ranks,
    check_refine,
    check_scalar,
    check_settings,
    check_state,
    check_target,
    check_thresholds,
    check_weights,
    new_state,
)

if TYPE_CHECKING:
    from kronsae_kernels.triton_impl.operations import (
        DecodeAndLoss,
        Entries,
        Jumped,
        RefinedRows,
        Refinement,
    )

MAX_WIDTH = 8192
"""d at most, of x and of the target: a program holds a row and both its moments in registers."""
MAX_FUSED_CODES = 128
"""k at most for one gather in decoder and backward; above, rows are gathered twice."""
MAX_PREFIXES = 32
"""Nested prefixes at most: a program holds the errors of all of them in registers."""
THRESHOLDS = "log_threshold"
"""The name of a JumpReLU's thresholds, where they are trained too."""
RATES = "refine_rate"
"""The name of the sizes of the steps that refine values, where there are such."""
BELOW = 1e-6
"""How far below the logarithm of the smallest active value that of a set threshold lies, so that
no rounding makes the threshold larger than the value."""


def why_not(device: torch.device, d: int = 1, dtype: torch.dtype = torch.float32) -> str | None:
    """Why a fused step of width d, computed in `dtype`, cannot run on a device; None if it can."""
    reason = backends.why_not("triton", device, dtype)
    if reason is None and d > MAX_WIDTH:
        reason = f"rows of {d} numbers are too long for one program (at most {MAX_WIDTH})"
    return reason


def why_not_graphed(device: torch.device, ranks: int = 1) -> str | None:
    """Why a step of so many ranks cannot be a CUDA graph on a device; None if it can."""
    if ranks > 1:
        return f"{ranks} ranks exchange numbers within a step, which is not captured"
    return None if device.type == "cuda" else f"a CUDA graph needs a CUDA device, not {device}"


class StepOutput(NamedTuple):
    """Losses and codes of one forward and backward pass."""

    loss: Tensor
    """Mean squared error over tokens and dimensions, not weighted (float32 scalar); with `bounds`
    the sum of those of all prefixes, with `prefixes` their mean."""
    codes: SparseCodes
    """[B, k] values and indices, largest first (-1 in places that a mask leaves over); of a
    selection over the batch [B, width]; with ranks this rank's own, [B, min(k, F)], and -1 in
    places that the latents of others take."""
    residual: Tensor
    """[B, d_target] reconstruction minus target, in the compute dtype."""
    mse: Tensor
    """Mean squared error of the whole reconstruction (float32 scalar)."""
    l0_loss: Tensor | None = None
    """With `Thresholds`: (L0 / k - 1)^2 (float32 scalar), not weighted, no part of `loss`."""
    selected: SparseCodes | None = None
    """With `refine`: the codes with the values by which they were selected."""


class _Part(NamedTuple):
    """Codes of a pass, with gradients of weight * loss, for `apply`."""

    given: Tensor
    """x in the dtype that it came in."""
    codes: SparseCodes | None
    """None if a mask selected them."""
    x: Tensor
    d_rows: Tensor
    """[R, d_target]: the gradient of a decoder row is a sum of these, times values of codes."""
    row: Tensor | None
    """[B, k] int32: row of `d_rows` for each code; None: that of the code's token (R = B)."""
    indices: Tensor
    decoded: "DecodeAndLoss"
    d_log: Tensor | None
    """Gradients by log thresholds, 0 if a mask selected the codes; None without thresholds."""
    refined: "RefinedRows | None" = None
    """What decoder rows get, if the codes were refined."""


class TrainingStep:
    """Trains w_enc, b_enc, w_dec, b_dec in place.

    w_enc: [h, m + n, d] (Kron; m given), stored row-major over heads, so that
        `w_enc.transpose(0, 1)` is contiguous; or [F, d] (dense; m None), contiguous.
    b_enc: [h, m + n] or [F].   w_dec: [F, d_target].   b_dec: [d_target].   All float32, on one
        device. d_target is d, but for a transcoder, which predicts another vector than it reads.
    k, composition, eps: as in `fused_encode` (a dense encoder has neither of the last two).
    dtype: of activations, of matrix products and of the copies of the weights that they read:
        float32, bfloat16 or float16. Sums, weights and moments are float32 in any case.
    betas, adam_eps, weight_decay: AdamW's; the decay is on w_enc alone.
    encoder_lr_ratio: the learning rate of w_enc is so many times that of `apply`.
    unit_norm: decoder rows have unit norm. What would only change a row's norm is taken out of its
        gradient, and rows are scaled to unit norm after the step.
    moments: "float32", or "bfloat16": the moments of w_enc and w_dec take half the bytes. They are
        computed in float32 and rounded stochastically: their mean is right (to the nearest, a
        second moment that changes by 0.1 % a step would stay where it is). The noise depends on
        the number of the step and the place of the element alone: a run that is resumed, or
        replayed from a CUDA graph, has the same bits.
    state: AdamW's, to go on with: for each name of `NAMES`, "step" (float32 scalar), "exp_avg" and
        "exp_avg_sq" (shaped and stored as the weight). Used, and changed, in place; None: new.
    thresholds: of a JumpReLU, which then selects where no mask does; eps must be 0. `state` has
        those of "log_threshold", too.
    refine: float32 [N], sizes of N steps that refine the values of the codes (`refine_codes`),
        where no mask selects them; trained too, and `state` has those of "refine_rate". Not
        together with thresholds or ranks.
    silent: int64 [F], tokens since each latent was active: `apply` keeps count, of passes
        without a mask. None: nobody counts.
    ranks: processes that hold R F latents together, each F of them with their rows of w_enc, b_enc
        and w_dec: rank r those from r F on (of a Kron encoder: whole heads). b_dec is the same on
        all, and stays so to the bit. All ranks call `accumulate` and `apply` together, with the
        same arguments but for the mask, which is of the own latents. They select from all R F
        latents, and add up what they decode (in float32), the gradient's squared norm, and whether
        all is finite: loss, residual and norm are the same bits on all. No gradient is sent. The
        noise of bfloat16 moments depends on an element's place among the rank's own: another R has
        other noise. None: one process has all latents.

    missed: float32 [2] on the device, of selections with a `width` (see `accumulate`): whether what
        is accumulated had too few candidates, and how many calls of `apply` made no step since that
        first was so. Until somebody sets both to 0, no call makes one: the batches of the last
        calls can be given again in their order, with a larger `width`.
    skips: float32 [4] on the device, of calls of `apply` that made no step as something was not
        finite: how many in a row, up to now; the most in a row; all of them; at the first, the
        largest magnitude in what its first `accumulate` took. Whoever reads the last three may set
        them to 0.

    Raises ValueError for wrong shapes, dtypes, devices, layouts or numbers, RuntimeError if it
    cannot run here. Results are deterministic. May be captured in a CUDA graph (see `apply`).
    """

    def __init__(
        self,
        w_enc: Tensor,
        b_enc: Tensor,
        w_dec: Tensor,
        b_dec: Tensor,
        *,
        k: int,
        m: int | None = None,
        composition: str = "mand",
        eps: float = 0.0,
        dtype: torch.dtype = torch.float32,
        betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        weight_decay: float = 0.0,
        encoder_lr_ratio: float = 1.0,
        unit_norm: bool = True,
        moments: str = "float32",
        state: Mapping[str, Mapping[str, Tensor]] | None = None,
        silent: Tensor | None = None,
        thresholds: Thresholds | None = None,
        refine: Tensor | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.weights = dict(zip(NAMES, (w_enc, b_enc, w_dec, b_dec), strict=True))
        check_weights(self.weights, m)
        check_settings(composition, eps, dtype, betas, adam_eps, weight_decay, unit_norm)
        check_number("encoder_lr_ratio", encoder_lr_ratio, 0)
        check_ranks(ranks, thresholds)
        if thresholds is not None:
            check_thresholds(thresholds, w_dec, eps)
            self.weights[THRESHOLDS] = thresholds.log
        if refine is not None:
            check_refine(refine, self.weights, thresholds, ranks)
            self.weights[RATES] = refine
        self.m, self.k, self.composition, self.eps = m, k, composition, float(eps)
        self.d, (self.dict_size, self.d_target) = w_enc.shape[-1], w_dec.shape
        self.device, self.dtype, self.thresholds = w_dec.device, dtype, thresholds
        self.ranks = None if ranks is None or ranks.size == 1 else ranks
        self._check_k(k)
        check_choice("moments", moments, MOMENTS)
        reason = why_not(self.device, max(self.d, self.d_target), dtype)
        if reason is not None:
            raise RuntimeError(f"the fused step cannot run on {self.device}: {reason}")
        self.unit_norm, self.weight_decay, self.moments = unit_norm, float(weight_decay), moments
        self.state = new_state(self.weights, moments) if state is None else state
        check_state(self.state, self.weights, moments)
        if silent is not None:
            check_of_latents("silent", silent, torch.int64, w_dec)
        self.silent = silent
        self._how = "dense" if m is None else composition  # as operations name it
        # Values above it in magnitude are those of active latents.
        self._threshold = eps**0.5 if m is not None and composition == "mand" else 0.0
        self._parts: list[_Part] = []
        self._allocate([*betas, self.weight_decay, float(encoder_lr_ratio)], adam_eps)

    def _allocate(self, adamw: list[float], adam_eps: float) -> None:
        """Counters and AdamW's numbers on the device; and what there is later."""
        self._b_dec_gradient: Tensor | None = None
        self._rate_gradient: Tensor | None = None
        self._sums: Tensor | None = None  # of all parts, as `counters.prepare_update` wants them
        self._copies: dict[str, Tensor] = {}
        self._versions: tuple[int, ...] = ()
        self.missed = torch.zeros(2, device=self.device)
        self.skips = torch.zeros(4, device=self.device)
        # Rows: for w_enc, and for the others; columns as in `triton_impl.device`. The zeros are
        # filled in for each step.
        beta1, beta2, *_ = adamw
        fields = [0.0, 1 - beta1, beta2, 1 - beta2, 0.0, 0.0, adam_eps, 0.0, 0.0, 0.0]
        self._hyper = torch.tensor([[0.0, *fields[1:]], [1.0, *fields[1:]]], device=self.device)
        self._adamw = torch.tensor(adamw, dtype=torch.float64, device=self.device)
        self._lr = torch.zeros((), dtype=torch.float64, device=self.device)

    def accumulate(
        self,
        x: Tensor,
        *,
        target: Tensor | None = None,
        k: int | None = None,
        mask: Tensor | None = None,
        bias: bool = True,
        weight: float | Tensor = 1.0,
        bounds: Sequence[int] | None = None,
        prefixes: Sequence[int] | None = None,
        width: int | None = None,
    ) -> StepOutput:
        """Forward and backward of weight * mean((decode(encode(x)) - target)^2); no weight changes.

        x: [B, d].  target: [B, d_target], by default x.  k: by default that of the step.
        mask: bool [F], which latents may be selected. Where it allows fewer than k, the places left
            over have index -1 and value 0 and take no part, here and in `apply`: k can stay the
            same however many are allowed.  bias: whether b_dec takes part.
        bounds: of nested prefixes, as of `nested_decode`, the last of them F: what is decoded from
            the latents of each prefix has an error, and the sum of all errors is the loss.
        prefixes: numbers of latents, ascending, the last of them k: what is decoded from so many
            of a token's largest latents has an error, and the mean of all errors is the loss (as of
            `hierarchical_loss`).
        width: for a selection over the batch (BatchTopK): of all active latents the k B largest, of
            equal ones the earlier token's, looked for among the `width` >= k largest of each token.
            Codes are [B, width], and places of others have index -1 and value 0. Where a token
            keeps all `width`, more might be among the largest: `apply` then makes no step, and
            `missed` says so. With `Thresholds` and no mask it must be given: of each token, all
            latents that are above their threshold, or so near that it learns from them, which have
            value 0. If they are more than `width`, `apply` makes no step.
        Raises ValueError if shapes, dtypes, devices or numbers do not fit.
        """
        k = self._check_batch(x, k)
        check_target(target, x, self.d_target)
        check_mask(mask, self.dict_size)
        check_bool("bias", bias)
        check_scalar("weight", weight, self.device, low=None)
        check_same("device", x=x, target=target, mask=mask, w_dec=self.weights["w_dec"])
        require(
            self.ranks is None or (bounds is None and prefixes is None and width is None),
            "bounds, prefixes, width: ranks select the k latents of each token, for one "
            f"reconstruction; expected None for all, got {bounds}, {prefixes} and {width}",
        )
        require(
            prefixes is None or (bounds is None and width is None),
            "prefixes: of the k latents of each token, without bounds or a width",
        )
        self._check_width(width, k, mask)
        require(
            prefixes is None or RATES not in self.weights,
            "prefixes: expected None where values are refined, for one reconstruction",
        )
        if bounds is not None:
            bounds = check_prefixes(bounds, self.dict_size, MAX_PREFIXES)
        if prefixes is not None:
            prefixes = check_ranks_of_codes(prefixes, k)
        with torch.no_grad():
            return self._accumulate(x, target, k, mask, bias, weight, bounds, prefixes, width)

    def _check_batch(self, x: Tensor, k: int | None) -> int:
        """k, by default that of the step."""
        k = self.k if k is None else k
        check_tensors(x=x)
        check_floating(x=x)
        require(
            x.ndim == 2 and x.shape[1] == self.d and x.shape[0] > 0,
            lambda: f"x: expected [B, {self.d}] with B >= 1, got {shape_of(x)}",
        )
        check_same("device", x=x, w_dec=self.weights["w_dec"])
        self._check_k(k)
        return k

    def _check_width(self, width: int | None, k: int, mask: Tensor | None) -> None:
        if width is not None:
            check_count("width", width, k, self.dict_size, f"k = {k} to F = {self.dict_size}")
            require(mask is None, "mask: a selection with a width has none")
        require(
            width is not None or mask is not None or self.thresholds is None,
            "width: expected places a token for the latents above their thresholds, got None",
        )

    def _accumulate(
        self,
        x: Tensor,
        target: Tensor | None,
        k: int,
        mask: Tensor | None,
        bias: bool,
        weight: float | Tensor,
        bounds: Sequence[int] | None,
        prefixes: Sequence[int] | None,
        width: int | None,
    ) -> StepOutput:
        from kronsae_kernels.triton_impl import operations

        given, target = x, (x if target is None else target).contiguous()
        x, low = x.to(self.dtype).contiguous(), self._low_precision()
        indices, base, extension, jumped = self._select(x, low["w_enc"], mask, k, width)
        b_dec = self.weights["b_dec"] if bias and self._first else None
        errors = target.numel() * (1 if prefixes is None else len(prefixes))
        scale = weight * (2 / errors)
        table, made = low["w_dec"], (self._how, self.eps, scale)
        factors, how = (base, extension), made
        one_gather = indices.shape[1] <= MAX_FUSED_CODES and jumped is None
        refinement = row = None
        if RATES in self.weights and mask is None:
            rates, silent = self.weights[RATES].detach(), self._threshold
            refinement = operations.Refinement(
                *(target, indices, base, extension, table, b_dec),
                *(*made[:2], silent, rates, one_gather),
            )
            factors, how = (refinement.values, refinement.values), ("linear", 0.0, 1.0)
        codes = target, indices, *factors, table, b_dec, *how
        if bounds is not None:
            decoded, row = operations.nested_decode_and_loss(*codes, bounds)
        elif prefixes is not None:
            decoded, row = operations.hierarchical_decode_and_loss(*codes, prefixes)
        else:
            decoded = operations.decode_and_loss(
                *codes,
                one_gather=one_gather,
                total=None if self.ranks is None else self.ranks.sum,
            )
        d_x_hat = residual = d_rows = decoded.residual
        if row is not None:
            # [:, g] sums the errors of prefixes g to G - 1: all at 0, the whole's alone at -1.
            d_x_hat, residual = d_rows[:, 0], d_rows[:, -1]
            d_rows = d_rows.flatten(0, 1)
        if bias:
            of_bias = d_x_hat.sum(0, dtype=torch.float32) * scale
            earlier = self._b_dec_gradient
            self._b_dec_gradient = of_bias if earlier is None else earlier + of_bias
        refined = None
        if refinement is not None:
            of_codes = indices, base, extension, *made
            decoded, d_rows, refined = self._refined(refinement, decoded, d_rows, row, of_codes)
        sums = decoded.sums.sum(1)
        self._sums = sums[:2] if self._sums is None else self._sums + sums[:2]
        d_log, l0_loss = self._threshold_gradients(jumped, decoded, indices, weight, scale, k)
        selected = SparseCodes(decoded.values, indices)
        noted = selected if mask is None else None
        decoded = decoded._replace(d_values=None)  # it is not needed any more
        self._parts.append(_Part(given, noted, x, d_rows, row, indices, decoded, d_log, refined))
        loss = sums[0] / errors
        mse = loss if row is None else sums[2] / target.numel()
        before = None if refinement is None else SparseCodes(refinement.selected, indices)
        return StepOutput(loss, selected, residual, mse, l0_loss, before)

    def _refined(
        self,
        refinement: "Refinement",
        decoded: "DecodeAndLoss",
        d_rows: Tensor,
        row: Tensor | None,
        made: tuple[Any, ...],
    ) -> tuple["DecodeAndLoss", Tensor, "RefinedRows"]:
        """`decoded` of refined codes with gradients of what was selected, and what rows get.

        decoded: with a scale of 1.  made: how codes were selected, as `describe` takes it.
        """
        from kronsae_kernels.triton_impl import operations

        *_, scale = made
        shares = decoded.scaled * scale, decoded.along * scale
        d_values, d_rates, d_bias, rows = refinement.backward(
            decoded.d_base, *shares, d_rows, row, scale
        )
        if self._b_dec_gradient is not None:
            self._b_dec_gradient += d_bias
        earlier = self._rate_gradient
        self._rate_gradient = d_rates if earlier is None else earlier + d_rates
        of_codes = operations.code_gradients(operations.describe(*made), d_values, decoded.sums)
        of_codes["values"] = refinement.values
        return decoded._replace(**of_codes), rows.rows, rows

    def _select(
        self, x: Tensor, w_enc: Tensor, mask: Tensor | None, k: int, width: int | None
    ) -> tuple[Tensor, Tensor, Tensor, "Jumped | None"]:
        """indices, base, extension [B, `width` or k] of a pass; and which are above thresholds."""
        if self.thresholds is not None and width is not None:
            return self._above(self.thresholds, x, w_enc, width)
        candidates = min(k, self.dict_size) if width is None else width
        indices, base, extension = self._largest(x, w_enc, mask, candidates)
        if width is not None:
            self._keep_largest(indices, base, extension, k * len(x))
        if self.ranks is not None:
            factor = None if self.m is None else extension
            indices = keep_largest_of_all(indices, base, factor, k, self.ranks)
        return indices, base, extension, None

    def _largest(
        self, x: Tensor, w_enc: Tensor, mask: Tensor | None, k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The k largest latents of each token: indices, base, extension [B, k]."""
        from kronsae_kernels.triton_impl import operations

        b_enc = self.weights["b_enc"].to(self.dtype)
        indices, base, extension = operations.encode(
            x, w_enc, b_enc, mask, self.m, k, self.composition
        )
        return indices, base, base if self.m is None else extension

    def _keep_largest(self, indices: Tensor, base: Tensor, extension: Tensor, count: int) -> None:
        """Keep the `count` largest of all candidates: the others get index -1."""
        from kronsae_kernels.triton_impl import operations

        operations.keep_largest(
            indices, base, extension, count, self._how, self.eps, self._threshold,
            self.dict_size, self.missed[0],
        )  # fmt: skip

    def _above(
        self, thresholds: Thresholds, x: Tensor, w_enc: Tensor, width: int
    ) -> tuple[Tensor, Tensor, Tensor, "Jumped"]:
        """Latents above or near their thresholds: indices, base, extension [B, width]; and which
        they are."""
        from kronsae_kernels.triton_impl import operations

        threshold, bandwidth = thresholds.log.detach().exp(), thresholds.bandwidth
        b_enc = self.weights["b_enc"].to(self.dtype)
        base, extension, indices, counts = operations.threshold_encode(
            x, w_enc, b_enc, threshold - bandwidth / 2, self.m, 0.0, self.composition, width
        )
        jumped = operations.jump(
            base, extension, indices, counts, threshold, bandwidth, self._how, self.missed[0]
        )
        return indices, base, extension, jumped

    def _threshold_gradients(
        self,
        jumped: "Jumped | None",
        decoded: "DecodeAndLoss",
        indices: Tensor,
        weight: float | Tensor,
        scale: float | Tensor,
        k: int,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients by the logarithms of thresholds, of each code, and the loss of the L0."""
        if self.thresholds is None:
            return None, None
        if jumped is None or decoded.d_values is None:
            return torch.zeros_like(decoded.values), None
        from kronsae_kernels.triton_impl import operations

        excess = jumped.active.mean() / k - 1
        of_active = weight * self.thresholds.l0_coefficient * 2 / (k * len(indices))
        d_log = operations.jump_gradients(
            decoded.d_values, indices, jumped, scale, excess * of_active
        )
        return d_log, excess.square()

    def set_thresholds(self, x: Tensor, *, k: int | None = None, width: int) -> None:
        """Set all thresholds just below the smallest of the k B largest active values of x [B, d].

        They are looked for as `accumulate` does it for a selection over the batch; if `width` is
        too small, the next call of `apply` makes no step. Where no latent is active, or a number is
        not finite, thresholds stay as they are. Raises ValueError if shapes do not fit.
        """
        if self.thresholds is None:
            raise ValueError("set_thresholds: this step has no thresholds")
        k = self._check_batch(x, k)
        self._check_width(width, k, None)
        with torch.no_grad():
            log = self.thresholds.log.detach()
            self._set_thresholds(log, x.to(self.dtype).contiguous(), k, width)

    def _set_thresholds(self, log: Tensor, x: Tensor, k: int, width: int) -> None:
        indices, base, extension = self._largest(x, self._low_precision()["w_enc"], None, width)
        self._keep_largest(indices, base, extension, k * len(x))
        values = base if self.m is None else compose(base * extension, self.composition, 0.0)
        smallest = values.masked_fill(indices < 0, torch.inf).amin()
        log.copy_((smallest.log() - BELOW).where(smallest.isfinite(), log))

    def apply(self, lr: float | Tensor, *, max_norm: float | None = None) -> Tensor:
        """AdamW step from all that was accumulated; returns the gradient's norm (before clipping).

        lr: for a CUDA graph, a scalar on the device, filled before each replay.
        max_norm: gradients are scaled down to this norm. It must be known before the first weight
            changes, so all sums are made twice.
        If anything accumulated is not finite, or the mean squared error so large that its square is
        not, nothing changes but `skips`, and the norm is NaN; if candidates were too few, nothing
        but `missed`.
        Raises ValueError for numbers that do not fit, RuntimeError if nothing was accumulated.
        """
        if not self._parts:
            raise RuntimeError("apply: nothing was accumulated since the last step")
        check_scalar("lr", lr, self.device, low=0)
        if max_norm is not None:
            check_number("max_norm", max_norm, None)
            require(
                max_norm > 0,
                f"max_norm: expected a number > 0, or None for no limit, got {max_norm!r}",
            )
        with torch.no_grad():
            norm = self._apply(lr, max_norm)
        self._clear()
        return norm

    def forget(self) -> None:
        """Drop what was accumulated."""
        self.missed[0].zero_()
        self._clear()

    def _clear(self) -> None:
        self._parts.clear()
        self._b_dec_gradient = self._rate_gradient = self._sums = None

    def _apply(self, lr: float | Tensor, max_norm: float | None) -> Tensor:
        from kronsae_kernels.triton_impl import operations

        ranks, sums = self.ranks, self._sums
        assert sums is not None
        if ranks is not None:
            ranks.sum(sums[1:])  # if one of them cannot make the step, none does
        x, d_rows = self._all("x"), self._all("d_rows")
        entries, of_decoder, of = self._entries()
        hyper = self._prepared(sums, lr)
        of_bias = self._b_dec_gradient
        vectors = {"b_dec": torch.zeros_like(self.weights["b_dec"]) if of_bias is None else of_bias}
        if self.thresholds is not None:
            vectors[THRESHOLDS] = operations.sum_entries(entries, of["d_log"])
        if RATES in self.weights:
            of_rates = self._rate_gradient
            rates = self.weights[RATES]
            vectors[RATES] = torch.zeros_like(rates) if of_rates is None else of_rates
        counted = [name for name in vectors if self._first or name != "b_dec"]
        decoder = self._of("w_dec"), self._copies.get("w_dec")
        encoder = self._of("w_enc"), self._copies.get("w_enc"), self._of("b_enc")

        def run(mode: str) -> Tensor:
            squares = [vectors[name].square() for name in counted]
            rows = of_decoder, of["scaled"], of["along"], d_rows, hyper, mode
            squares.append(operations.update_rows(*rows, self.unit_norm, *decoder))
            if self.m is None:
                rows = entries, of["d_base"], of["along"], x, hyper, mode
                squares.append(operations.update_rows(*rows, False, *encoder))
            else:
                heads = entries, of["d_base"], of["d_extension"], x, self.m, hyper, mode
                squares.append(operations.update_heads(*heads, *encoder))
            return torch.cat(squares).sum()

        square = run("update" if max_norm is None else "measure")
        square = square if ranks is None else ranks.sum(square)
        if max_norm is not None:
            hyper[:, 7] = (max_norm / (square.sqrt() + 1e-6)).clamp(max=1.0)
            run("update")
        for name, gradient in vectors.items():
            operations.update_vector(gradient, self._of(name), hyper[1])
        return self._finish(square, hyper)

    def _entries(self) -> tuple["Entries", "Entries", dict[str, Tensor]]:
        """Entries of the encoder and of the decoder, from all parts, sorted; and coefficients of
        both, by the name of the field."""
        from kronsae_kernels.triton_impl import operations

        if RATES in self.weights:
            return self._refined_entries()
        names = ["scaled", "along", "d_base"]
        names += [] if self.m is None else ["d_extension"]
        names += [] if self.thresholds is None else ["d_log"]
        entries = operations.Entries.of(
            self._all("indices"),
            self.dict_size,
            tuple(self._all(name) for name in names),
            self._row_of_codes("x"),
            None if all(part.row is None for part in self._parts) else self._row_of_codes("d_rows"),
        )
        of_decoder = entries if entries.rows is None else entries._replace(tokens=entries.rows)
        return entries, of_decoder, dict(zip(names, entries.coefficients, strict=True))

    def _refined_entries(self) -> tuple["Entries", "Entries", dict[str, Tensor]]:
        """`_entries` where decoder rows get more than the codes: two lists, each sorted."""
        from kronsae_kernels.triton_impl import operations

        names = ["d_base"] if self.m is None else ["d_base", "d_extension"]
        of_names = tuple(self._all(name) for name in names)
        indices, row = self._all("indices"), self._row_of_codes("x")
        encoder = operations.Entries.of(indices, self.dict_size, of_names, row)
        start, lists = 0, []
        for part in self._parts:
            refined, decoded = part.refined, part.decoded
            if refined is None:
                row = torch.arange(len(part.indices), dtype=torch.int32, device=self.device)
                row = row[:, None].expand_as(part.indices)
                entries = row, part.indices, decoded.scaled, decoded.along
            else:
                entries = refined.row, refined.indices, refined.scaled, refined.along
            lists.append((entries[0] + start, *entries[1:]))
            start += len(part.d_rows)
        row, indices, *of_rows = (
            torch.cat([each.flatten() for each in column]) for column in zip(*lists, strict=True)
        )
        decoder = operations.Entries.of(indices, self.dict_size, tuple(of_rows), row)
        fields = dict(zip(names, encoder.coefficients, strict=True))
        fields |= dict(zip(("scaled", "along"), decoder.coefficients, strict=True))
        return encoder, decoder, fields

    def _finish(self, square: Tensor, hyper: Tensor) -> Tensor:
        """The gradient's norm, from its square; counts the step, and what was active in it."""
        from kronsae_kernels.triton_impl import operations

        tokens, silent = 0, self.silent
        if silent is not None:
            noted = [part.codes for part in self._parts if part.codes is not None]
            tokens = sum(len(codes.indices) for codes in noted)
            for codes in noted:
                operations.note_active(codes, silent, hyper, tokens, self._threshold)
        given = self._parts[0].given
        return operations.finish_update(
            square, self.skips, self.missed, given, hyper, silent, tokens
        )

    # Parts of a step

    @property
    def _first(self) -> bool:
        """Whether b_dec, which all ranks have, counts here in what they add up."""
        return self.ranks is None or self.ranks.rank == 0

    def _check_k(self, k: int) -> None:
        ranks = 1 if self.ranks is None else self.ranks.size
        most, of = ranks * self.dict_size, "" if ranks == 1 else f" of {ranks} ranks"
        check_count("k", k, 1, most, f"1 <= k <= F = {most}{of}")

    def _prepared(self, sums: Tensor, lr: float | Tensor) -> Tensor:
        """[2, 10] float32: the numbers of this AdamW step, on the device; counts it."""
        from kronsae_kernels.triton_impl import operations

        if not isinstance(lr, Tensor):
            lr = self._lr.fill_(lr)
        size = sum(len(part.x) for part in self._parts) * self.d_target
        steps = [self.state[name]["step"] for name in self.weights]
        operations.prepare_update(sums, self.missed, size, lr, self._adamw, self._hyper, steps)
        return self._hyper

    def _of(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """A weight and its moments, as kernels want them (a Kron encoder's i-major)."""
        state = self.state[name]
        tensors = [
            self.weights[name].detach(),
            state["exp_avg"].detach(),
            state["exp_avg_sq"].detach(),
        ]
        if self.m is not None and name == "w_enc":
            tensors = [tensor.transpose(0, 1) for tensor in tensors]
        weight, first, second = tensors
        return weight, first, second

    def _all(self, name: str) -> Tensor:
        """A field of all parts: x or d_rows, or what belongs to codes, flat."""
        fields = [
            getattr(part if name in _Part._fields else part.decoded, name) for part in self._parts
        ]
        if len(fields) == 1:
            return fields[0]
        return torch.cat(fields if name in ("x", "d_rows") else [f.flatten() for f in fields])

    def _row_of_codes(self, name: str) -> Tensor | None:
        """Row of `_all(name)` (x or d_rows) that each code belongs to, flat int32.

        None for that of its token, in a single part.
        """
        start, rows = 0, []
        for part in self._parts:
            row = part.row if name == "d_rows" else None
            if row is None and len(self._parts) == 1:
                return None
            if row is None:
                count, k = part.indices.shape
                row = torch.arange(start, start + count, dtype=torch.int32, device=self.device)
                row = row[:, None].expand(-1, k)
            elif start:
                row = row + start
            rows.append(row.flatten())
            start += len(getattr(part, name))
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def _low_precision(self) -> dict[str, Tensor]:
        """w_enc and w_dec in the compute dtype: copies that `apply` keeps up to date."""
        self.copy_weights()
        if not self._copies:
            return {name: self.weights[name].detach() for name in ("w_enc", "w_dec")}
        w_enc = self._copies["w_enc"]
        w_enc = w_enc if self.m is None else w_enc.transpose(0, 1)
        return {"w_enc": w_enc, "w_dec": self._copies["w_dec"]}

    def copy_weights(self) -> None:
        """Bring the copies in the compute dtype up to date, if others changed the weights."""
        versions = tuple(self.weights[name]._version for name in ("w_enc", "w_dec"))
        if self.dtype == torch.float32 or versions == self._versions:
            return
        for name in ("w_enc", "w_dec"):
            weight = self._of(name)[0]
            if name not in self._copies:
                self._copies[name] = torch.empty_like(weight, dtype=self.dtype)
            self._copies[name].copy_(weight)  # in place: a CUDA graph goes on reading it
        self._versions = versions


class GraphedStep:
    """A training step, `accumulate` and `apply`, as a CUDA graph: one launch a step.

        replay = GraphedStep(step)
        out, grad_norm = replay(x, lr)

    once: a function of x, lr and (if calls have one) target on the device that makes the whole
        step instead; it calls `accumulate` as often as it likes, and `apply`, and asks nothing of
        the device.
    pool: the memory of another graph (`GraphedStep.pool`), if the two never run at the same time.

    The first WARMUP calls run as they are; then a step is captured, and replayed from then on.
    x and target must have the same shape and dtype in every call. What is returned is overwritten
    by the next call. Other threads may go on using the device during the capture. If it fails,
    `problem` says why, and steps run as they are for good.
    Raises ValueError if x has another shape or dtype, RuntimeError without a CUDA device, or for a
    step of several ranks.
    """

    WARMUP = 3
    """Calls that compile the kernels, and let libraries allocate what they keep."""

    def __init__(
        self,
        step: TrainingStep,
        *,
        max_norm: float | None = None,
        once: Callable[..., Any] | None = None,
        pool: Any = None,
    ) -> None:
        reason = why_not_graphed(step.device, 1 if step.ranks is None else step.ranks.size)
        if reason is not None:
            raise RuntimeError(reason)
        self.step, self.max_norm = step, max_norm
        self.problem: str | None = None
        self._once = self._plain if once is None else once
        self._pool = pool
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._given: tuple[Tensor, ...] = ()  # x and perhaps target
        self._lr = torch.zeros((), dtype=torch.float64, device=step.device)

    @property
    def pool(self) -> Any:
        """Where the graph's memory is; None before there is one."""
        return None if self._graph is None else self._graph.pool()

    def fits(self, x: Tensor, target: Tensor | None = None) -> bool:
        """Whether x and target have the shapes and dtypes of the first call's."""
        return self._calls == 0 or _kinds(self._given) == _kinds(_present(x, target))

    def __call__(self, x: Tensor, lr: float | Tensor, target: Tensor | None = None) -> Any:
        """Train on x [B, d] (and target); gives the pass's output and the gradient's norm, or what
        `once` does.

        lr: a float, or a scalar on the device.
        """
        given = _present(x, target)
        require(
            self.fits(x, target),
            lambda: f"x: expected {_kinds(self._given)} as in the first call, got {_kinds(given)}",
        )
        with _device_of(self.step.device):
            if self._calls == 0:
                self._given = tuple(torch.empty_like(tensor) for tensor in given)
            self._calls += 1
            for kept, tensor in zip(self._given, given, strict=True):
                kept.copy_(tensor)
            self._lr.copy_(lr) if isinstance(lr, Tensor) else self._lr.fill_(lr)
            if self._calls > self.WARMUP and self._graph is None and self.problem is None:
                self._capture()
            if self._graph is None:
                return self._run()
            self.step.copy_weights()
            self._graph.replay()
            return self._result

    def _run(self) -> Any:
        x, *target = self._given
        return self._once(x, self._lr, *target)

    def _capture(self) -> None:
        """Record a step, without running it."""
        device = self.step.device
        self.step.copy_weights()
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(
                graph,
                pool=self._pool,
                stream=torch.cuda.Stream(device),
                capture_error_mode="thread_local",
            ):
                self._result = self._run()
            self._graph = graph
        except RuntimeError as error:
            self.step.forget()
            self.problem = (str(error) or type(error).__name__).splitlines()[0]

    def _plain(
        self, x: Tensor, lr: Tensor, target: Tensor | None = None
    ) -> tuple[StepOutput, Tensor]:
        out = self.step.accumulate(x, target=target)
        return out, self.step.apply(lr, max_norm=self.max_norm)


def _present(x: Tensor, target: Tensor | None) -> tuple[Tensor, ...]:
    return (x,) if target is None else (x, target)


def _kinds(tensors: tuple[Tensor, ...]) -> list[str]:
    """Shapes and dtypes, as "[3, 4] torch.float32"."""
    return [f"{shape_of(tensor)} {tensor.dtype}" for tensor in tensors]


def _device_of(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, a CUDA device is the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
