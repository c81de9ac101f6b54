"""One SAE and everything that an optimizer step changes: weights, moments, counters."""

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kronsae.config import SAEConfig, TrainConfig
from kronsae.errors import InputError
from kronsae.model.encoder import add_per_latent_, is_every
from kronsae.model.objectives import (
    VARIANCE_FLOOR,
    Reconstruction,
    auxk_latents,
    auxk_loss,
    auxk_tokens,
    objective,
)
from kronsae.model.ranks import SHARDED
from kronsae.model.sae import SAE
from kronsae.model.selection import CANDIDATES, Selection
from kronsae.registry import OBJECTIVES, SAE_KINDS, SELECTIONS
from kronsae.system.devices import compute_dtype
from kronsae.system.parallel import ALONE, Mesh
from kronsae_kernels import SparseCodes
from kronsae_kernels import step as fused

ADAM_BETA1 = 0.9

SKIPS = 8
"""Steps in a row whose gradient is not finite before an SAE counts as diverged."""

UNCONFIRMED = 16
"""Batches of BatchTopK or JumpReLU that the fused step keeps at most before it asks the device
whether any had too few candidates: it must be able to make their steps again."""
MOST_CANDIDATES = 8
"""So many times k latents of a token are candidates in every step at most; more in those steps
alone that need them."""

GRAPHS = 3
"""Kinds of a step that are CUDA graphs: with and without the auxiliary loss, and one that sets
thresholds."""


def learning_rate(tokens: int, config: TrainConfig, dict_size: int, batch: int) -> float:
    """Rate of the step after `tokens` tokens: linear warm-up, then a cosine to lr_final.

    Counted in steps of `batch` tokens, the size of the run's first batch, so that batches of
    another size than config.batch_size (an iterable's own) still run through the whole schedule.
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


def warmup_steps(config: TrainConfig, batch: int) -> int:
    """Steps with a growing rate, in steps of `batch` tokens."""
    return round(config.warmup_fraction * math.ceil(config.tokens / batch))


def why_not_fused(
    sae: SAEConfig, config: TrainConfig, device: torch.device, ranks: tuple[int, int] = (1, 1)
) -> str | None:
    """Why training takes autograd and torch's AdamW and not the fused step; None if it takes it.

    ranks: along `data` and along `heads` (`kronsae.system.parallel.shape`).
    """
    data, _ = ranks
    if config.fused_step == "off":
        return "fused_step is off"
    if data > 1:
        return (
            f"{data} ranks add up their gradients, and it writes none. With --share members each "
            "rank trains members of a sweep alone"
        )
    if config.fused_step == "auto" and device.type == "cpu":
        return "it is made of kernels for a GPU"
    if SELECTIONS[sae.selection].learns_thresholds and sae.eps:
        return f"eps is {sae.eps:g}, with selection {sae.selection!r} it knows 0 alone"
    known: dict[str, list[Any]] = {
        part: [name for name in kinds if kinds[name].fused] for part, kinds in SAE_KINDS.items()
    }
    known |= {"experts": [0], "skip": [False]}
    for name, values in known.items():
        if getattr(sae, name) not in values:
            return (
                f"{name} is {getattr(sae, name)!r}, it knows {' and '.join(map(repr, values))} "
                "alone"
            )
    prefixes = len(sae.prefixes) if OBJECTIVES[sae.objective].nested else 0
    if prefixes > fused.MAX_PREFIXES:
        return f"{prefixes} prefixes are too many for one program (at most {fused.MAX_PREFIXES})"
    width = max(sae.d_model, sae.d_out)
    return fused.why_not(device, width, compute_dtype(config.dtype, device))


def check_step(
    sae: SAEConfig, config: TrainConfig, device: torch.device, ranks: tuple[int, int]
) -> str | None:
    """`why_not_fused`. Raises InputError for settings that need the fused step where it cannot be
    taken."""
    reason = why_not_fused(sae, config, device, ranks)
    if reason is None:
        return None
    if config.fused_step == "on":
        raise InputError(f"fused_step 'on': {reason}")
    if config.moments != "float32":
        raise InputError(
            f"moments {config.moments!r} needs the fused step, which this run does not take "
            f"({reason}): leave --moments out, for float32"
        )
    return reason


class Pass(NamedTuple):
    """What one optimizer step did."""

    mse: Tensor
    """Mean squared error over tokens and dimensions (scalar)."""
    auxk_loss: Tensor
    """Scalar; 0 where it was not computed."""
    codes: SparseCodes
    """The active latents of each token."""
    grad_norm: float
    more: dict[str, Tensor] = {}
    """Other losses of the objective, by name (scalars)."""


class Skipped(NamedTuple):
    """Of batches that no step was made on."""

    reason: str
    largest: float
    """Magnitude of the largest normalised activation in the first of them: usually 1 to 100."""
    batches: int = 1


class _Made(NamedTuple):
    """What the fused step did: `Pass`, on the device."""

    mse: Tensor
    auxk_loss: Tensor | None
    """None where it was not computed."""
    codes: SparseCodes
    """Those of the latents held here; -1 in other places."""
    grad_norm: Tensor
    more: dict[str, Tensor]
    """Other losses of the objective, by name (scalars)."""


class _Form(NamedTuple):
    """Which kernels a fused step has."""

    reviving: int
    """Tokens of the loss of dead latents."""
    prepares: bool
    """Whether the batch sets a JumpReLU's thresholds first (`JumpReLU.prepare`)."""


class _Dying(NamedTuple):
    """The dead latents before a step, and on what their loss is measured."""

    dead: Tensor
    """Bool [F], of the latents held here."""
    count: int
    """How many are dead in the whole dictionary."""
    part: slice
    """Tokens of this rank on which their loss is measured."""
    measured: bool
    """Whether it is, on any rank."""


class Learner:
    """Trains one SAE on normalised activations [B, d], one optimizer step a call of `step`.

    Steps are made by `kronsae_kernels.step` where it can run, else by autograd and torch's AdamW;
    both change the same weights and moments, and give the same but for rounding. The fused step
    asks nothing of the device but in a `step` that logs; on a GPU it is a CUDA graph that is
    replayed, as long as batches have the size of the first (`graph_problem`: why it is not), and of
    a process that has all heads.
    With BatchTopK or JumpReLU a token may turn out to have too few candidates: the device then
    makes no step from there on, and the learner makes those steps again, in order, when it next
    asks: in a `step` that logs, in `settle` and `confirm`, or after UNCONFIRMED steps.
    A transcoder also gets its target [B, d_target], normalised.
    mesh: of processes that train it together. Each gets the whole batch, and learns from its part;
        weights, moments and counters are those of the heads that it holds.
    """

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
        matrices = [self.sae.W_enc]
        rest = [p for p in self.sae.parameters() if p is not self.sae.W_enc]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": rest, "weight_decay": 0.0},
            ],
            lr=config.lr,
            betas=(ADAM_BETA1, config.adam_beta2),
            fused=True,
        )
        weights = dict(self.sae.named_parameters())
        self.tokens_since_fired = torch.zeros(len(self.sae.W_dec), dtype=torch.int64, device=device)
        # The fused step's names: "w_enc", "log_threshold".
        names = {name: name.split(".")[-1].lower() for name in weights}
        moments = fused.new_state(
            {names[name]: weight for name, weight in weights.items()}, config.moments
        )
        for name, parameter in weights.items():
            self.optimizer.state[parameter] = moments[names[name]]
        self.fused: fused.TrainingStep | None = None
        if reason is None:
            self.fused = fused.TrainingStep(
                **{n: weights[name] for name, n in names.items() if n in fused.NAMES},
                k=sae_config.k,
                m=sae_config.m or None,
                composition=sae_config.composition,
                eps=sae_config.eps,
                dtype=self.dtype,
                betas=(ADAM_BETA1, config.adam_beta2),
                unit_norm=self.unit_norm,
                weight_decay=config.weight_decay,
                moments=config.moments,
                state=moments,
                silent=self.tokens_since_fired,
                thresholds=self.sae.selection.thresholds(config),
                ranks=mesh.heads,
            )
        self._graphs: dict[_Form, fused.GraphedStep] = {}
        self.step_count = 0
        self.tokens = 0
        self.batch = 0  # tokens of the first batch: the schedule's step
        self.skipped = 0  # steps in a row, the last ones, that a gradient made impossible
        self._left_out: Skipped | None = None  # of the fused step, not yet given out
        # Candidates a token (None where there are always k), and the arguments of the last steps,
        # which the device may not have made.
        self._width: int | None = None
        if self.fused is not None and not self.sae.selection.exact:
            self._width = min(CANDIDATES * sae_config.k, sae_config.dict_size)
        self._kept: list[tuple[Tensor, float, Tensor | None, _Form]] = []
        # No latent is dead before so many tokens: until then the fused step looks for none.
        self.quiet_until = config.dead_after

    @property
    def _warming_up(self) -> bool:
        """Whether selections may still prepare themselves."""
        return self.tokens < self.batch * max(1, warmup_steps(self.config, self.batch))

    @property
    def dead(self) -> Tensor:
        """Which latents held here are dead (bool [F]): silent for config.dead_after tokens."""
        return self.tokens_since_fired >= self.config.dead_after

    def _dead_in_all(self) -> Tensor:
        """How many latents of the whole dictionary are dead (scalar); nobody waits for it."""
        return self.mesh.heads.sum(self.dead.sum())

    def step(
        self, x: Tensor, target: Tensor | None = None, log: bool = True
    ) -> dict[str, float] | Skipped | None:
        """One optimizer step on normalised activations x [B, d]; returns its metrics.

        log: whether anybody wants them. If not, the fused step does not wait for the device, and
            returns None.
        A batch whose gradient is not finite, as with an activation of enormous size, is `Skipped`:
        it counts as seen, and changes nothing else. Raises FloatingPointError if that happens
        SKIPS times in a row. Of steps that did not log, `settle` tells it.
        """
        sae, config = self.sae, self.config
        lr = learning_rate(self.tokens, config, sae.dict_size, self.batch or x.shape[0])
        self.batch = self.batch or x.shape[0]
        if self.fused is not None:
            return self._fused_step(x, target, lr, log)
        part = self.mesh.part
        own, own_target = part(x), None if target is None else part(target)
        if self._warming_up:
            sae.selection.prepare(sae, own)
        dead = self.dead
        dead_count = self.mesh.heads.count(int(dead.sum()), self.device)
        # On so many tokens the auxiliary loss is measured: of the batch, and of this rank's part.
        of_batch = auxk_tokens(sae.config, config, x.shape[0]) if dead_count else 0
        dying = _Dying(dead, dead_count, slice(len(part(x[:of_batch]))), of_batch > 0)
        try:
            done = self._autograd_step(own, own_target, x.shape[0], lr, dying)
        except FloatingPointError as error:
            return self._skip(x, str(error))
        self.skipped = 0
        sae.selection.update(sae, done.codes)
        fired = sae.fired(done.codes)
        self._count_fired(x.shape[0], sae.own(done.codes))
        self.step_count += 1
        self.tokens += x.shape[0]
        active = fired.sum().double() / x.shape[0]
        sums = torch.stack([done.mse, done.auxk_loss, active, *done.more.values()]).double()
        mse, auxk_loss, active, *more = self.mesh.data.sum(sums).tolist()
        spread = spread_of(x if target is None else target).item()
        metrics = self._metrics(mse, auxk_loss, spread, active, dead_count, done.grad_norm, lr)
        return metrics | dict(zip(done.more, more, strict=True))

    def _metrics(
        self,
        mse: float,
        auxk_loss: float,
        spread: float,
        active: float,
        dead: float,
        grad_norm: float,
        lr: float,
    ) -> dict[str, float]:
        return {
            "loss": mse,
            "auxk_loss": auxk_loss,
            "explained_variance": 1 - mse / spread if spread else None,
            "l0": active,
            "dead_share": dead / self.sae.dict_size,
            "grad_norm": grad_norm,
            "lr": lr,
        }

    def settle(self) -> Skipped | None:
        """Which batches were skipped since this was last asked (None: none); waits for the device.

        Brings step_count and `skipped` up to date. Raises as `step` does.
        """
        if self.fused is None:
            return None
        self.confirm()
        longest = self._note_skips(self.fused.skips.tolist())
        found, self._left_out = self._left_out, None
        if longest >= SKIPS:
            raise FloatingPointError(_diverged(found.reason))
        return found

    def confirm(self) -> None:
        """See to it that the device has made all steps; waits for it, if it may not have."""
        if self._kept:
            missed = int(self.fused.missed[1])
            if missed:
                self._make_again(missed)
            self._kept.clear()

    def _make_again(self, missed: int) -> tuple["_Made", Tensor]:
        """The last steps, which were not made: each with as many candidates as it needs.

        Gives what the last of them did, and how many latents were dead before it. How many
        candidates a step has depends on the steps before it alone, not on when the device is asked.
        """
        for x, lr, target, form in self._kept[-missed:]:
            dead, width = self._dead_in_all(), self._width
            while True:
                self.fused.missed.zero_()
                made = self._once(x, lr, target, form=form, width=width)
                if not int(self.fused.missed[1]):
                    break
                width = min(2 * width, self.sae.dict_size)
            if width > self._width:
                most = max(self._width, MOST_CANDIDATES * self.sae.config.k)
                self._width = min(2 * self._width, most, self.sae.dict_size)
                self._graphs.clear()
        return made, dead

    def _note_skips(self, skips: list[float]) -> int:
        """Take over what the device counted; returns the most in a row since the last time."""
        in_a_row, longest, count, largest = skips
        self.skipped = int(in_a_row)
        if count:
            self.fused.skips[1:].zero_()
            self.step_count -= int(count)
            before = self._left_out or Skipped("gradient norm is nan", largest, 0)
            self._left_out = before._replace(batches=before.batches + int(count))
        return int(longest)

    def _skip(self, x: Tensor, reason: str) -> Skipped:
        """Leave a batch out, as its gradient is of no use."""
        self.skipped += 1
        if self.skipped == SKIPS:
            raise FloatingPointError(_diverged(reason))
        self.tokens += x.shape[0]
        return Skipped(reason, min(x.abs().max().item(), torch.finfo(x.dtype).max))

    def _count_fired(self, tokens: int, own: SparseCodes) -> None:
        """Count how long each latent has been silent, after a batch of so many tokens."""
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
        """Dead latents a token in the auxiliary loss, if so many are dead."""
        return auxk_latents(self.sae.config, self.config)

    def _autograd_step(
        self, x: Tensor, target: Tensor | None, tokens: int, lr: float, dying: "_Dying"
    ) -> Pass:
        """By loss.backward() and torch's AdamW; x is this rank's part of so many tokens."""
        sae, config = self.sae, self.config
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = lr
        with torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32):
            progress = self.tokens / config.tokens
            found = objective(sae, x, config, target, tokens, progress)
            decoded, aux = [found.decoded], x.new_zeros(())
            if dying.measured:
                part = dying.part
                part_of_target = None if target is None else target[part]
                aux, aux_codes = auxk_loss(
                    *(sae, x[part], found.x_hat[part], dying.dead, self.auxk),
                    *(part_of_target, dying.count),
                )
                decoded.append(aux_codes)
        # A rank without a dead latent decodes unused slots alone, which no gradient reaches.
        decoded = [codes for codes in decoded if codes.values.requires_grad]
        for codes in decoded:
            codes.values.retain_grad()
        self.optimizer.zero_grad(set_to_none=True)
        (found.loss + config.auxk_coefficient * aux).backward()
        if self.unit_norm:
            remove_parallel_component(sae.W_dec, decoded)
        for parameter in sae.parameters():
            self.mesh.data.sum(parameter.grad)
        norm = self._gradient_norm()
        grad_norm = self._finite(norm)
        if config.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(sae.parameters(), config.max_grad_norm, norm)
        self.optimizer.step()
        if self.unit_norm:
            sae.normalize_decoder()
        return Pass(found.mse.detach(), aux.detach(), found.codes, grad_norm, _more(found))

    def _gradient_norm(self) -> Tensor:
        """Norm of the gradient of the whole autoencoder (scalar)."""
        held = [p.grad for name, p in self.sae.named_parameters() if name in SHARDED]
        rest = [p.grad for name, p in self.sae.named_parameters() if name not in SHARDED]
        if self.mesh.heads.size == 1:
            return torch.nn.utils.get_total_norm(held + rest)
        squares = self.mesh.heads.sum(torch.nn.utils.get_total_norm(held).square())
        return (squares + torch.nn.utils.get_total_norm(rest).square()).sqrt()

    def _fused_step(
        self, x: Tensor, target: Tensor | None, lr: float, log: bool
    ) -> dict[str, float] | Skipped | None:
        """By the kernels that never write a gradient; where it is not finite, they change nothing.

        Nothing depends on what the device holds, so that nobody has to ask it: latents that may be
        dead are looked for, whether some are or not.
        """
        reviving = 0
        if self.tokens >= self.quiet_until:
            reviving = auxk_tokens(self.sae.config, self.config, x.shape[0])
        dead = self._dead_in_all() if log else None
        form = _Form(reviving, self.fused.thresholds is not None and self._warming_up)
        made = self._run(x, target, lr, form)
        self.step_count += 1
        self.tokens += x.shape[0]
        if self._width is not None:
            self._kept.append((x, lr, target, form))
        if log:
            return self._read(x if target is None else target, lr, made, dead)
        if len(self._kept) == UNCONFIRMED:
            self.confirm()
        return None

    def _read(
        self, target: Tensor, lr: float, made: _Made, dead: Tensor
    ) -> dict[str, float] | Skipped:
        """Metrics of the step that was made, in one transfer; dead: how many were, before it."""
        heads = self.mesh.heads
        silent = heads.max(self.tokens_since_fired.max())
        active = heads.sum(self.sae.fired(made.codes).sum()).double() / target.shape[0]
        aux = torch.zeros_like(made.mse) if made.auxk_loss is None else made.auxk_loss
        numbers = [made.mse, aux, spread_of(target), active, dead, made.grad_norm]
        usual = len(numbers)
        numbers += [*made.more.values(), silent]
        counters = [self.fused.skips.double(), self.fused.missed[1:].double()]
        numbers = torch.cat([torch.stack([n.double() for n in numbers]), *counters])
        *numbers, silent, in_a_row, longest, count, largest, missed = numbers.tolist()
        if missed:
            return self._read(target, lr, *self._make_again(int(missed)))
        self._kept.clear()
        self.quiet_until = self.tokens + self.config.dead_after - int(silent)
        longest = self._note_skips([in_a_row, longest, count, largest])
        skipped = self._left_out
        if longest >= SKIPS:
            raise FloatingPointError(_diverged(skipped.reason))
        if self.skipped:
            self._left_out = None
            return skipped
        more = dict(zip(made.more, numbers[usual:], strict=True))
        return self._metrics(*numbers[:usual], lr) | more

    def _run(self, x: Tensor, target: Tensor | None, lr: float, form: "_Form") -> _Made:
        """A fused step, as a graph if there can be one."""
        reason = fused.why_not_graphed(self.device, self.mesh.heads.size)
        if self.config.cuda_graph == "off" or reason is not None:
            return self._once(x, lr, target, form=form, width=self._width)
        graph = self._graphs.get(form)
        if graph is None and len(self._graphs) < GRAPHS:
            # Only one of them runs at a time, so they can use the same memory.
            pools = [other.pool for other in self._graphs.values()]
            graph = self._graphs[form] = fused.GraphedStep(
                self.fused,
                once=functools.partial(self._once, form=form, width=self._width),
                pool=next(filter(None, pools), None),
            )
        if graph is None or not graph.fits(x, target):  # the last batch of a run, say
            return self._once(x, lr, target, form=form, width=self._width)
        return graph(x, lr, target)

    @property
    def graph_problem(self) -> str | None:
        """Why a step could not be made a CUDA graph; None if none failed."""
        problems = [graph.problem for graph in self._graphs.values()]
        return next(filter(None, problems), None)

    def _once(
        self,
        x: Tensor,
        lr: float | Tensor,
        target: Tensor | None = None,
        *,
        form: "_Form",
        width: int | None,
    ) -> _Made:
        """Kernels of a step, with `width` candidates a token (BatchTopK, JumpReLU).

        The auxiliary loss is a second pass of it, on the first tokens, among the dead latents,
        whose target is what the first pass leaves over: as `objectives.auxk_loss`, but that where
        there are fewer dead ones than `auxk`, the missing ones are zeros.
        """
        sae, config = self.sae.config, self.config
        bounds = sae.prefixes if OBJECTIVES[sae.objective].nested else None
        if form.prepares:
            self.fused.set_thresholds(x, width=width)
        out, aux = self.fused.accumulate(x, target=target, bounds=bounds, width=width), None
        reviving = form.reviving
        if reviving:
            left_over = -out.residual[:reviving].float()
            variance = left_over.var(0, correction=0).mean()
            taken = self._dead_in_all().clamp_(max=self.auxk)
            share = taken * (config.auxk_coefficient / self.auxk)
            weight = share / (variance + VARIANCE_FLOOR)
            of_dead = self.fused.accumulate(
                x[:reviving],
                target=left_over,
                k=min(self.auxk, sae.dict_size),
                mask=self.dead,
                bias=False,
                weight=weight,
            )
            aux = of_dead.loss * weight / config.auxk_coefficient
        norm = self.fused.apply(lr, max_norm=config.max_grad_norm or None)
        selection = self.sae.selection
        if type(selection).update is not Selection.update:
            # Without a step there is nothing that it has selected.
            values, indices = out.codes
            codes = SparseCodes(values.masked_fill(norm.isnan(), 0), indices)
            selection.update(self.sae, codes)
        more = {} if bounds is None else {"objective": out.loss}
        if out.l0_loss is not None:
            loss = out.loss + config.l0_coefficient * out.l0_loss
            more = {"l0_loss": out.l0_loss, "objective": loss}
        return _Made(out.mse, aux, out.codes, norm, more)

    def _finite(self, norm: Tensor) -> float:
        grad_norm = norm.item()
        if not math.isfinite(grad_norm):
            raise FloatingPointError(f"gradient norm is {grad_norm}")
        return grad_norm

    def state_dict(self) -> dict[str, Any]:
        """Weights, moments and counters: tensors and JSON values."""
        if self.fused is not None:
            self.confirm()
            self._note_skips(self.fused.skips.tolist())
        named = dict(self.sae.named_parameters())
        return {
            "weights": self.sae.state_dict(),
            "moments": {name: dict(self.optimizer.state[p]) for name, p in named.items()}
            if self.step_count
            else {},
            "step_count": self.step_count,
            "batch": self.batch,
            "tokens": self.tokens,
            "skipped": self.skipped,
            "quiet_until": self.quiet_until,
            "width": self._width,
            "tokens_since_fired": self.tokens_since_fired,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sae.load_state_dict(state["weights"])
        for name, parameter in self.sae.named_parameters():
            for key, moment in state["moments"].get(name, {}).items():
                self.optimizer.state[parameter][key].copy_(moment)
        self.step_count = state["step_count"]
        self.batch = state["batch"]
        self.tokens = state["tokens"]
        self.skipped = state.get("skipped", 0)  # which older checkpoints lack
        self.quiet_until = state.get("quiet_until", self.config.dead_after)
        self.tokens_since_fired.copy_(state["tokens_since_fired"])
        self._kept.clear()
        if self._width is not None and state.get("width") is not None:
            self._width = state["width"]
        if self.fused is not None:
            self.fused.missed.zero_()
            self.fused.skips.zero_()
            self.fused.skips[0] = self.skipped


def _diverged(reason: str) -> str:
    return f"{reason}, {SKIPS} batches in a row: training has diverged, try a smaller lr"


def _more(found: Reconstruction) -> dict[str, Tensor]:
    """Penalties, and the loss as a whole where it is more than the error."""
    losses = {name: penalty.loss for name, penalty in found.penalties.items()}
    losses |= {} if found.loss is found.mse else {"objective": found.loss}
    return {name: loss.detach() for name, loss in losses.items()}


@torch.no_grad()
def remove_parallel_component(w_dec: Tensor, decoded: list[SparseCodes]) -> None:
    """Take out of each row's gradient what would only change the row's (unit) norm.

    decoded: the codes that went through w_dec, their values' gradients retained. A row's gradient
    is the sum of z dL/dx_hat over its entries, so its product with the row itself is the sum of
    z dL/dz: no pass over [F, d] is needed to find it.
    """
    along = w_dec.new_zeros(w_dec.shape[0])
    for codes in decoded:
        products = (codes.values * codes.values.grad).to(along.dtype)
        add_per_latent_(along, codes, products)
    w_dec.grad.addcmul_(w_dec, along[:, None], value=-1)


def spread_of(x: Tensor) -> Tensor:
    """Mean square of what a batch x [B, d] differs from its mean by (scalar).

    Of it a mean squared error is the share that is not explained; 0 if all activations are equal.
    """
    return (x - x.mean(0)).square().mean()
