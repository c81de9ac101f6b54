"""`Learner`: one SAE and all that an optimizer step changes (weights, moments, counters)."""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kronsae.config import SAEConfig, TrainConfig
from kronsae.errors import InputError
from kronsae.model.encoder import add_per_latent_, is_every
from kronsae.model.objectives import (
    VARIANCE_FLOOR,
    auxk_latents,
    auxk_loss,
    auxk_tokens,
    objective,
)
from kronsae.model.ranks import SHARDED
from kronsae.model.sae import SAE
from kronsae.model.selection import Selection
from kronsae.registry import OBJECTIVES, SAE_KINDS, SELECTIONS
from kronsae.system.devices import as_double, compute_dtype
from kronsae.system.documents import Keys, Number, typed
from kronsae.system.parallel import ALONE, Mesh
from kronsae.training import eight_bit
from kronsae_kernels import SparseCodes, rounded
from kronsae_kernels import step as fused
from kronsae_kernels.batch_topk import CANDIDATES_PER_K
from kronsae_kernels.step_arguments import SEEDS

ADAM_BETA1 = 0.9

SKIPS = 8
"""Steps in a row whose gradient is not finite after which an SAE counts as diverged."""
USUAL_LARGEST = 100
"""Up to so many times the usual size, the largest activation of a batch is nothing special."""

UNCONFIRMED = 16
"""Number of batches of BatchTopK or JumpReLU after which the fused step asks the device whether
any of them had too few candidates; it keeps them to repeat their steps."""
MAX_CANDIDATES_PER_K = 8
"""Limit of a token's candidates in multiples of k; only steps that need more go beyond it."""

MAX_GRAPHS = 3
"""Number of kinds of a step that become CUDA graphs: with and without the auxiliary loss, and one
that sets thresholds."""

Metrics = dict[str, float | None]
"""Figures of a step by name. The explained variance of equal activations is None."""


def learning_rate(tokens: int, config: TrainConfig, dict_size: int, batch: int) -> float:
    """Learning rate of the step after `tokens` tokens: linear warm-up, then a cosine to lr_final.

    The schedule counts steps of `batch` tokens, the size of the run's first batch: an iterable's
    batches, whose size may differ from config.batch_size, run through all of it.
    [KronSAE, App. A.1]
    """
    peak = config.lr * (dict_size / 2**15) ** -0.5 if config.lr_scale_by_dict_size else config.lr
    step, steps = tokens / batch, math.ceil(config.tokens / batch)
    warmup = warmup_steps(config, batch)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr_final + (peak - config.lr_final) * cosine


def k_of_step(tokens: int, config: TrainConfig, k: int, batch: int) -> int:
    """k of the step after `tokens` tokens: linear from k_start to k. batch: as for the rate."""
    steps = round(config.k_fraction * math.ceil(config.tokens / batch))
    left = 1 - tokens / (batch * steps) if steps else 0.0
    return k + round(max(0.0, left) * (config.k_start - k)) if config.k_start else k


def with_largest_k(sae: SAEConfig, config: TrainConfig) -> SAEConfig:
    """The SAE with the largest k of its training. Raises InputError if it cannot have that many."""
    try:
        return dataclasses.replace(sae, k=max(sae.k, config.k_start)) if config.k_start else sae
    except InputError as error:
        raise InputError(f"k_start {config.k_start}: {error}") from error


def warmup_steps(config: TrainConfig, batch: int) -> int:
    """Number of steps of `batch` tokens in which the learning rate grows."""
    return round(config.warmup_fraction * math.ceil(config.tokens / batch))


def why_not_fused(
    sae: SAEConfig, config: TrainConfig, device: torch.device, ranks: tuple[int, int] = (1, 1)
) -> str | None:
    """Reason why training uses autograd and torch's AdamW, not the fused step; None if it does not.

    ranks: along `data` and along `heads` (`kronsae.system.parallel.shape`).
    """
    data, _ = ranks
    if config.fused_step == "off":
        return "fused_step is off"
    if data > 1:
        return (
            f"{data} ranks add up their gradients, which it never writes. With --share members "
            "each rank trains members of a sweep alone"
        )
    if config.moments == "8bit":
        return "bitsandbytes computes 8-bit moments"
    if config.fused_step == "auto" and device.type == "cpu":
        return "the kernels of the fused step are for a GPU"
    if SELECTIONS[sae.selection].learns_thresholds and sae.eps:
        return f"with selection {sae.selection!r} it needs eps 0, and eps is {sae.eps:g}"
    known: dict[str, list[Any]] = {
        part: [name for name in kinds if kinds[name].fused] for part, kinds in SAE_KINDS.items()
    }
    known |= {"experts": [0], "skip": [False]}
    for name, values in known.items():
        if getattr(sae, name) not in values:
            return f"it needs {name} {' or '.join(map(repr, values))}, not {getattr(sae, name)!r}"
    if sae.refine and SELECTIONS[sae.selection].learns_thresholds:
        return f"with selection {sae.selection!r} it needs refine 0, not {sae.refine}"
    prefixes = len(sae.prefixes) if OBJECTIVES[sae.objective].nested else 0
    if prefixes > fused.MAX_PREFIXES:
        return f"{prefixes} prefixes are too many for it (at most {fused.MAX_PREFIXES})"
    width = max(sae.d_model, sae.d_out)
    return fused.why_not(device, width, compute_dtype(config.dtype, device))


def check_step(
    sae: SAEConfig, config: TrainConfig, device: torch.device, ranks: tuple[int, int]
) -> str | None:
    """`why_not_fused`. Raises InputError for settings that need the fused step if it cannot be
    used."""
    with_largest_k(sae, config)
    if config.moments == "8bit":
        eight_bit.check(device, ranks[1])
    reason = why_not_fused(sae, config, device, ranks)
    if reason is None:
        return None
    if config.fused_step == "on":
        raise InputError(f"fused_step 'on': {reason}")
    return reason


class Skipped(NamedTuple):
    """Record of batches that were skipped."""

    reason: str
    largest: float
    """Magnitude of the largest normalised activation in the first of them."""
    batches: int = 1


class _Step(NamedTuple):
    """Results of an optimizer step, on the device."""

    mse: Tensor
    """Mean squared error over tokens and dimensions (scalar)."""
    auxk_loss: Tensor
    """Scalar; 0 if it was not computed."""
    codes: SparseCodes
    """The active latents of each token. After a fused step those held here; -1 for others."""
    selected: SparseCodes
    """The same with the values by which they were selected."""
    grad_norm: Tensor
    losses: dict[str, Tensor]
    """Other losses of the objective, by name (scalars)."""


class _StepKind(NamedTuple):
    """Options of a fused step that decide which kernels it runs."""

    auxk_tokens: int
    """Number of tokens on which the loss of dead latents is measured."""
    prepares: bool
    """True if the batch sets a JumpReLU's thresholds first (`JumpReLU.prepare`)."""
    k: int
    """Active latents per token. While they change, no step becomes a graph."""


class Learner:
    """Trains one SAE on normalised activations [B, d], with one optimizer step per call of `step`.

    Steps are those of `kronsae_kernels.step` where it can run, else of autograd and torch's AdamW.
    Both change the same weights and moments, and differ by rounding alone. The fused step waits for
    the device only in a `step` that logs. On a GPU, in a process that has all heads, it is a CUDA
    graph for batches of the size of the first (`graph_problem` says why it is not).
    With BatchTopK or JumpReLU a token may turn out to have too few candidates. The device then
    makes no further step, and the learner repeats the missing ones, in order, when it next asks:
    in a `step` that logs, in `settle` and `confirm`, or after UNCONFIRMED steps.
    A transcoder also gets its target [B, d_target], normalised.
    mesh: processes that train it together. Each gets the whole batch, and learns from its part;
        weights, moments and counters are those of the heads that it holds.
    finetunes: whether it starts from a trained SAE (`start_from`). The warm-up then leaves
        thresholds as they are.
    """

    finetunes = False

    def __init__(
        self,
        sae_config: SAEConfig,
        config: TrainConfig,
        device: torch.device,
        mesh: Mesh = ALONE,
    ) -> None:
        self.config = config
        self.device = device
        self.mesh = mesh
        self.dtype = compute_dtype(config.dtype, device)
        self.unit_norm = config.decoder_norm == "unit"
        reason = check_step(sae_config, config, device, (mesh.data.size, mesh.heads.size))
        generator = torch.Generator().manual_seed(config.seed)
        self.sae = SAE(sae_config, generator=generator, mesh=mesh).to(device)
        if self.sae.selection.learns_thresholds:
            self.sae.selection.l0_rate = config.l0_rate
        self.optimizer = self._new_optimizer()
        self.tokens_since_fired = torch.zeros(len(self.sae.W_dec), dtype=torch.int64, device=device)
        self.fused = self._new_fused_step() if reason is None else None
        self._zero = torch.zeros((), device=device)
        self._graphs: dict[_StepKind, fused.GraphedStep] = {}
        self.step_count = 0
        self.tokens = 0
        self.batch = 0  # tokens of the first batch: the schedule's step
        self.skipped = 0  # number of steps skipped in a row, up to the last one
        self._unreported: Skipped | None = None  # by the fused step
        self._width = 0  # candidates of a token; 0 if it always has k
        if self.fused is not None and not self.sae.selection.exact:
            most = with_largest_k(sae_config, config).k
            self._width = min(CANDIDATES_PER_K * most, sae_config.dict_size)
        # Arguments of the last steps, which the device may not have made.
        self._unconfirmed: list[tuple[Tensor, float, Tensor | None, _StepKind]] = []
        # No latent is dead before so many tokens: until then the fused step looks for none.
        self.quiet_until = config.dead_after

    def _new_optimizer(self) -> torch.optim.AdamW:
        """AdamW with weight decay on W_enc alone, and the moments that the fused step shares."""
        config = self.config
        rest = [p for p in self.sae.parameters() if p is not self.sae.W_enc]
        optimizer = torch.optim.AdamW(
            [
                {
                    "params": [self.sae.W_enc],
                    "weight_decay": config.weight_decay,
                    "ratio": config.encoder_lr_ratio,
                },
                {"params": rest, "weight_decay": 0.0, "ratio": 1.0},
            ],
            lr=config.lr,
            betas=(ADAM_BETA1, config.adam_beta2),
            fused=True,
        )
        weights = _by_kernel_name(self.sae)
        short = [name for name in SEEDS if config.moments == "8bit"]
        others = {name: weight for name, weight in weights.items() if name not in short}
        states = fused.new_state(others, config.moments)
        states |= {name: eight_bit.new_state(weights[name].detach()) for name in short}
        for name, weight in weights.items():
            optimizer.state[weight] = states[name]
        return optimizer

    def _new_fused_step(self) -> fused.TrainingStep:
        sae, config = self.sae, self.config
        weights = _by_kernel_name(sae)
        return fused.TrainingStep(
            *(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec),
            k=sae.config.k,
            m=sae.config.m or None,
            composition=sae.config.composition,
            eps=sae.config.eps,
            dtype=self.dtype,
            betas=(ADAM_BETA1, config.adam_beta2),
            unit_norm=self.unit_norm,
            weight_decay=config.weight_decay,
            encoder_lr_ratio=config.encoder_lr_ratio,
            moments=config.moments,
            state={name: self.optimizer.state[weight] for name, weight in weights.items()},
            silent=self.tokens_since_fired,
            thresholds=sae.selection.thresholds(config),
            refine=sae.refine_rate,
            ranks=self.mesh.heads,
        )

    @property
    def _fused(self) -> fused.TrainingStep:
        """The fused step of a learner that has one."""
        assert self.fused is not None
        return self.fused

    @property
    def _warming_up(self) -> bool:
        """True while selections `prepare` for each batch."""
        warm_up = self.batch * max(1, warmup_steps(self.config, self.batch))
        return self.tokens < warm_up and not self.finetunes

    def start_from(self, sae: SAE) -> None:
        """Take the weights of an SAE of normalised activations, of the same kind and shape."""
        heads = self.mesh.heads
        self.sae.load_state_dict(
            {
                name: tensor[heads.share(len(tensor))] if name in SHARDED else tensor
                for name, tensor in sae.state_dict().items()
            }
        )
        self.finetunes = True

    @property
    def dead(self) -> Tensor:
        """Mask (bool [F]) of the latents held here that were silent for config.dead_after."""
        return self.tokens_since_fired >= self.config.dead_after

    def _count_dead(self) -> Tensor:
        """Number of dead latents of the whole dictionary (scalar, on the device)."""
        return self.mesh.heads.sum(self.dead.sum())

    def step(
        self, x: Tensor, target: Tensor | None = None, log: bool = True
    ) -> Metrics | Skipped | None:
        """One optimizer step on normalised activations x [B, d]; returns its metrics.

        log: False if they are not needed. The fused step then does not wait for the device, and
            returns None.
        A batch whose gradient is not finite, as with an enormous activation, is `Skipped`: it
        counts as seen, and changes nothing else. `settle` returns those of steps that did not log.
        Raises FloatingPointError if that happens SKIPS times in a row.
        """
        sae, config = self.sae, self.config
        lr = learning_rate(self.tokens, config, sae.dict_size, self.batch or x.shape[0])
        self.batch = self.batch or x.shape[0]
        sae.selection.k = k_of_step(self.tokens, config, sae.config.k, self.batch)
        if self.fused is not None:
            return self._fused_step(x, target, lr, log)
        part = self.mesh.part
        own, own_target = part(x), None if target is None else part(target)
        if self._warming_up:
            sae.selection.prepare(sae, own)
        try:
            result, dead = self._autograd_step(own, own_target, x.shape[0], lr)
        except FloatingPointError as error:
            return self._skip(x, str(error))
        self.skipped = 0
        sae.selection.update(sae, result.selected)
        fired = sae.fired(result.codes)
        self._count_fired(x.shape[0], sae.own(result.codes))
        self.step_count += 1
        self.tokens += x.shape[0]
        l0 = as_double(fired.sum()) / x.shape[0]
        scalars = [result.mse, result.auxk_loss, l0, *result.losses.values()]
        sums = torch.stack([as_double(scalar) for scalar in scalars])
        mse, auxk_loss, l0, *losses = self.mesh.data.sum(sums).tolist()
        spread = spread_of(x if target is None else target).item()
        numbers = [mse, auxk_loss, spread, l0, dead, result.grad_norm.item(), *losses]
        return self._metrics(numbers, result.losses, lr)

    def _metrics(self, numbers: list[float], losses: Iterable[str], lr: float) -> Metrics:
        """Metrics by name; the last numbers are those of the other losses."""
        mse, auxk_loss, spread, l0, dead, grad_norm, *others = numbers
        return {
            "loss": mse,
            "auxk_loss": auxk_loss,
            "explained_variance": 1 - mse / spread if spread else None,
            "l0": l0,
            "dead_share": dead / self.sae.dict_size,
            "grad_norm": grad_norm,
            "lr": lr,
            **dict(zip(losses, others, strict=True)),
        }

    def settle(self) -> Skipped | None:
        """The batches skipped since the last call, or None; waits for the device.

        Brings step_count and `skipped` up to date. Raises as `step` does.
        """
        if self.fused is None:
            return None
        self.confirm()
        self._note_skips(self.fused.skips.tolist())
        skipped, self._unreported = self._unreported, None
        return skipped

    def confirm(self) -> None:
        """Ensure that the device has made all steps; waits for it if it may not have."""
        if self._unconfirmed:
            missed = int(self._fused.missed[1])
            if missed:
                self._repeat(missed)
            self._unconfirmed.clear()

    def _repeat(self, missed: int) -> tuple[_Step, Tensor]:
        """Make the last steps, which the device did not, each with as many candidates as it needs.

        Returns the result of the last one, and the number of latents that were dead before it. The
        number of candidates depends on the steps before, not on when the device is asked.
        """
        for x, lr, target, kind in self._unconfirmed[-missed:]:
            dead, width = self._count_dead(), self._width
            while True:
                self._fused.missed.zero_()
                result = self._once(x, lr, target, kind=kind, width=width)
                if not int(self._fused.missed[1]):
                    break
                width = min(2 * width, self.sae.dict_size)
            if width > self._width:
                most = max(self._width, MAX_CANDIDATES_PER_K * self.sae.config.k)
                self._width = min(2 * self._width, most, self.sae.dict_size)
                self._graphs.clear()
        return result, dead

    def _note_skips(self, skips: list[float]) -> None:
        """Take over what the device counted. Raises as `step` does."""
        in_a_row, longest, count, largest = skips
        self.skipped = int(in_a_row)
        if count:
            self._fused.skips[1:].zero_()
            self.step_count -= int(count)
            before = self._unreported or Skipped("gradient norm is nan", largest, 0)
            self._unreported = before._replace(batches=before.batches + int(count))
            if longest >= SKIPS:
                raise FloatingPointError(_diverged(before.reason))

    def _skip(self, x: Tensor, reason: str) -> Skipped:
        """Skip a batch x whose gradient is not finite."""
        self.skipped += 1
        if self.skipped == SKIPS:
            raise FloatingPointError(_diverged(reason))
        self.tokens += x.shape[0]
        return Skipped(reason, min(x.abs().max().item(), torch.finfo(x.dtype).max))

    @property
    def is_finite(self) -> bool:
        """Whether all weights are finite, also those of other processes; waits for the device."""
        wrong = not all(bool(torch.isfinite(p).all()) for p in self.sae.parameters())
        return not int(self.mesh.world.max(torch.tensor(int(wrong))))

    def _count_fired(self, tokens: int, own: SparseCodes) -> None:
        """Count for how many tokens each latent has been silent, after a batch of `tokens`."""
        active = self.sae.fired(own)
        if is_every(own):
            fired = active.any(0).to(torch.uint8)
        else:
            fired = torch.zeros_like(self.tokens_since_fired, dtype=torch.uint8)
            fired[own.indices[active]] = 1
        self.tokens_since_fired += tokens
        self.tokens_since_fired[self.mesh.data.max(fired).bool()] = 0

    @property
    def auxk(self) -> int:
        """Dead latents per token in the auxiliary loss, if so many are dead."""
        return auxk_latents(self.sae.config, self.config)

    def _autograd_step(
        self, x: Tensor, target: Tensor | None, tokens: int, lr: float
    ) -> tuple[_Step, int]:
        """A step by loss.backward() and torch's AdamW. x: this rank's part of a batch of `tokens`.

        Also returns how many latents of the whole dictionary were dead before it. Raises
        FloatingPointError, and changes nothing, if the gradient is not finite.
        """
        sae, config, ranks = self.sae, self.config, self.mesh.data
        dead = self.dead
        dead_count = self.mesh.heads.count(int(dead.sum()), self.device)
        measured = auxk_tokens(sae.config, config, tokens) if dead_count else 0
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = lr * parameters["ratio"]
        with torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32):
            progress = self.tokens / config.tokens
            result = objective(sae, x, config, target, tokens, progress)
            decoded, aux = [result.decoded], x.new_zeros(())
            if measured:
                part = slice(len(range(measured)[ranks.rank :: ranks.size]))
                part_of_target = None if target is None else target[part]
                aux, aux_codes = auxk_loss(
                    *(sae, x[part], result.x_hat[part], dead, self.auxk),
                    *(part_of_target, dead_count),
                )
                decoded.append(aux_codes)
        # A rank without a dead latent decodes unused slots alone, which have no gradient.
        decoded = [codes for codes in decoded if codes.values.requires_grad]
        for codes in decoded:
            codes.values.retain_grad()
        self.optimizer.zero_grad(set_to_none=True)
        (result.loss + config.auxk_coefficient * aux).backward()
        if self.unit_norm:
            remove_parallel_component(sae.W_dec, None if sae.config.refine else decoded)
        for gradient in self._gradients().values():
            ranks.sum(gradient)
        norm = self._gradient_norm()
        if not math.isfinite(norm.item()):
            raise FloatingPointError(f"gradient norm is {norm.item()}")
        if config.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(sae.parameters(), config.max_grad_norm, norm)
        self._adamw(lr)
        if self.unit_norm:
            sae.normalize_decoder()
        losses = {name: penalty.loss.detach() for name, penalty in result.penalties.items()}
        if result.loss is not result.mse:
            losses["objective"] = result.loss.detach()
        errors = result.mse.detach(), aux.detach()
        step = _Step(*errors, result.codes, result.selected, norm, losses)
        return step, dead_count

    def _adamw(self, lr: float) -> None:
        """A step of AdamW by the gradients. Those of matrices with short moments are then freed."""
        config, weights = self.config, _by_kernel_name(self.sae)
        step: dict[str, Any] = {"betas": (ADAM_BETA1, config.adam_beta2)}
        for name, seed in SEEDS.items() if config.moments != "float32" else ():
            weight = weights[name]
            assert weight.grad is not None
            encoder = name == "w_enc"
            step["lr"] = lr * config.encoder_lr_ratio if encoder else lr
            step["weight_decay"] = config.weight_decay if encoder else 0.0
            subject = weight, weight.grad, self.optimizer.state[weight]
            if config.moments == "8bit":
                eight_bit.adamw_(*subject, **step)
            else:
                rounded.adamw_(*subject, seed=seed, **step)
            weight.grad = None
        self.optimizer.step()

    def _gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.sae.named_parameters() if p.grad is not None}

    def _gradient_norm(self) -> Tensor:
        """Norm of the gradient of the whole autoencoder (scalar)."""
        gradients = self._gradients()
        sharded = [gradient for name, gradient in gradients.items() if name in SHARDED]
        rest = [gradient for name, gradient in gradients.items() if name not in SHARDED]
        if self.mesh.heads.size == 1:
            return torch.nn.utils.get_total_norm(sharded + rest)
        squares = self.mesh.heads.sum(torch.nn.utils.get_total_norm(sharded).square())
        return (squares + torch.nn.utils.get_total_norm(rest).square()).sqrt()

    def _fused_step(
        self, x: Tensor, target: Tensor | None, lr: float, log: bool
    ) -> Metrics | Skipped | None:
        """A step by kernels that never write a gradient; they change nothing if it is not finite.

        Nothing here depends on values on the device: the loss of dead latents is computed whenever
        some may be dead.
        """
        auxk = 0
        if self.tokens >= self.quiet_until:
            auxk = auxk_tokens(self.sae.config, self.config, x.shape[0])
        dead = self._count_dead() if log else None
        prepares = self._fused.thresholds is not None and self._warming_up
        kind = _StepKind(auxk, prepares, self.sae.selection.k)
        result = self._run(x, target, lr, kind)
        self.step_count += 1
        self.tokens += x.shape[0]
        if self._width:
            self._unconfirmed.append((x, lr, target, kind))
        if dead is not None:
            return self._read(x if target is None else target, lr, result, dead)
        if len(self._unconfirmed) == UNCONFIRMED:
            self.confirm()
        return None

    def _read(self, target: Tensor, lr: float, result: _Step, dead: Tensor) -> Metrics | Skipped:
        """Metrics of a step, in one transfer. dead: number of dead latents before it."""
        heads, step = self.mesh.heads, self._fused
        silent = heads.max(self.tokens_since_fired.max())
        l0 = heads.sum(self.sae.fired(result.codes).sum()).double() / target.shape[0]
        scalars = [result.mse, result.auxk_loss, spread_of(target), l0, dead, result.grad_norm]
        scalars += [*result.losses.values(), silent]
        stacked = torch.stack([scalar.double() for scalar in scalars])
        numbers = torch.cat([stacked, step.skips.double(), step.missed[1:].double()]).tolist()
        longest_silence, *skips, missed = numbers[-6:]
        if missed:
            return self._read(target, lr, *self._repeat(int(missed)))
        self._unconfirmed.clear()
        self.quiet_until = self.tokens + self.config.dead_after - int(longest_silence)
        self._note_skips(skips)
        if self.skipped and self._unreported is not None:
            skipped, self._unreported = self._unreported, None
            return skipped
        return self._metrics(numbers[:-6], result.losses, lr)

    def _run(self, x: Tensor, target: Tensor | None, lr: float, kind: _StepKind) -> _Step:
        """A fused step, as a CUDA graph if possible."""
        once = functools.partial(self._once, kind=kind, width=self._width)
        reason = fused.why_not_graphed(self.device, self.mesh.heads.size)
        changing = kind.k != self.sae.config.k
        if self.config.cuda_graph == "off" or reason is not None or changing:
            return once(x, lr, target)
        graph = self._graphs.get(kind)
        if graph is None and len(self._graphs) < MAX_GRAPHS:
            # Only one of them runs at a time, so they can use the same memory.
            pools = [other.pool for other in self._graphs.values()]
            pool = next(filter(None, pools), None)
            graph = self._graphs[kind] = fused.GraphedStep(self._fused, once=once, pool=pool)
        if graph is None or not graph.fits(x, target):  # the last batch of a run, say
            return once(x, lr, target)
        return graph(x, lr, target)

    @property
    def graph_problem(self) -> str | None:
        """Reason why a step could not become a CUDA graph; None if none failed."""
        problems = [graph.problem for graph in self._graphs.values()]
        return next(filter(None, problems), None)

    def _once(
        self,
        x: Tensor,
        lr: float | Tensor,
        target: Tensor | None = None,
        *,
        kind: _StepKind,
        width: int,
    ) -> _Step:
        """Run the kernels of a step, with `width` candidates per token (BatchTopK, JumpReLU).

        The auxiliary loss is a second pass: on the first tokens, among the dead latents, with the
        residual of the first pass as its target. It is that of `objectives.auxk_loss`, but if fewer
        than `auxk` latents are dead, the missing ones are zeros.
        """
        sae, config, step = self.sae.config, self.config, self._fused
        how = OBJECTIVES[sae.objective].step_arguments(sae, kind.k)
        if kind.prepares:
            step.set_thresholds(x, k=kind.k, width=width)
        out = step.accumulate(x, target=target, k=kind.k, width=width or None, **how)
        aux = self._zero
        if kind.auxk_tokens:
            residual = -out.residual[: kind.auxk_tokens].float()
            variance = residual.var(0, correction=0).mean()
            available = self._count_dead().clamp_(max=self.auxk)
            share = available * (config.auxk_coefficient / self.auxk)
            weight = share / (variance + VARIANCE_FLOOR)
            revival = step.accumulate(
                x[: kind.auxk_tokens],
                target=residual,
                k=min(self.auxk, sae.dict_size),
                mask=self.dead,
                bias=False,
                weight=weight,
            )
            aux = revival.loss * weight / config.auxk_coefficient
        norm = step.apply(lr, max_norm=config.max_grad_norm or None)
        selection = self.sae.selection
        selected = out.selected or out.codes
        if type(selection).update is not Selection.update:
            # A step that was not made has no codes.
            values, indices = selected
            codes = SparseCodes(values.masked_fill(norm.isnan(), 0), indices)
            selection.update(self.sae, codes)
        losses = {"objective": out.loss} if how else {}
        if out.l0_loss is not None:
            loss = out.loss + config.l0_coefficient * out.l0_loss
            losses = {"l0_loss": out.l0_loss, "objective": loss}
        return _Step(out.mse, aux, out.codes, selected, norm, losses)

    def state_dict(self) -> dict[str, Any]:
        """Weights, moments and counters: tensors and JSON values."""
        if self.fused is not None:
            self.confirm()
            self._note_skips(self.fused.skips.tolist())
        named = dict(self.sae.named_parameters()) if self.step_count else {}
        return {
            "weights": self.sae.state_dict(),
            "moments": {name: dict(self.optimizer.state[p]) for name, p in named.items()},
            "step_count": self.step_count,
            "batch": self.batch,
            "tokens": self.tokens,
            "skipped": self.skipped,
            "quiet_until": self.quiet_until,
            "width": self._width or None,
            "tokens_since_fired": self.tokens_since_fired,
            "finetunes": self.finetunes,
        }

    def _state_keys(self) -> Keys:
        """What `state_dict` gives; the last ones are those that older checkpoints lack."""
        tokens = Number(int, 0, self.config.tokens)
        return Keys(
            {
                "weights": Keys(dict.fromkeys(self.sae.state_dict(), Tensor)),
                "moments": dict[str, Any],
                "step_count": tokens,
                "batch": tokens,
                "tokens": tokens,
                "tokens_since_fired": Tensor,
            },
            {
                "skipped": Number(int, 0, SKIPS),
                "quiet_until": Number(int, 0, 2**54),
                "width": Number(int, 1, self.sae.config.dict_size, null=True),
                "finetunes": bool,
            },
        )

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any], name: str = "state") -> None:
        """Go on from a state. Raises InputError, which names the key inside `name`."""
        state = typed(state, self._state_keys(), name)
        self.sae.load_state_dict(state["weights"])
        if state["step_count"]:
            named = dict(self.sae.named_parameters())
            moments = {
                name: Keys(dict.fromkeys(self.optimizer.state[p], Tensor))
                for name, p in named.items()
            }
            read = typed(state["moments"], Keys(moments), f"{name}.moments")
            for parameter, keys in moments.items():
                for key in keys.required:
                    self.optimizer.state[named[parameter]][key].copy_(read[parameter][key])
        self.step_count = state["step_count"]
        self.batch = state["batch"]
        self.tokens = state["tokens"]
        self.skipped = state.get("skipped", 0)  # which older checkpoints lack
        self.quiet_until = state.get("quiet_until", self.config.dead_after)
        self.finetunes = state.get("finetunes", False)
        self.tokens_since_fired.copy_(state["tokens_since_fired"])
        self._unconfirmed.clear()
        if self._width:
            self._width = state.get("width") or self._width
        if self.fused is not None:
            self.fused.missed.zero_()
            self.fused.skips.zero_()
            self.fused.skips[0] = self.skipped


def _by_kernel_name(sae: SAE) -> dict[str, Tensor]:
    """Parameters by the names that the fused step has for them: "w_enc", "log_threshold"."""
    return {name.removeprefix("selection.").lower(): p for name, p in sae.named_parameters()}


def _diverged(reason: str) -> str:
    return f"{reason}, {SKIPS} batches in a row: training has diverged"


@torch.no_grad()
def remove_parallel_component(w_dec: Tensor, decoded: list[SparseCodes] | None) -> None:
    """Remove from each row's gradient the component that only changes the row's (unit) norm.

    decoded: the codes that went through w_dec, their values' gradients retained. A row's gradient
    is the sum of z dL/dx_hat over its entries, so its product with the row itself is the sum of
    z dL/dz: no pass over [F, d] is needed to find it. None if w_dec was used otherwise, too.
    """
    assert w_dec.grad is not None
    if decoded is None:
        along = torch.linalg.vecdot(w_dec.grad, w_dec)
        w_dec.grad.addcmul_(w_dec, along[:, None], value=-1)
        return
    along = w_dec.new_zeros(w_dec.shape[0])
    for codes in decoded:
        assert codes.values.grad is not None
        products = (codes.values * codes.values.grad).to(along.dtype)
        add_per_latent_(along, codes, products)
    w_dec.grad.addcmul_(w_dec, along[:, None], value=-1)


def spread_of(x: Tensor) -> Tensor:
    """Mean squared distance, per dimension, of a batch x [B, d] from its mean (scalar).

    The unexplained variance is a mean squared error divided by it. 0 if all activations are equal.
    """
    return (x - x.mean(0)).square().mean()
