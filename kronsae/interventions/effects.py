"""What latents do: to the model's loss, to chosen logits, and, in a Kron head, to each other.

The effect of a latent is what an objective loses when the latent is ablated on every token of a
context (`exact_effects`: a forward pass each), or what its gradient expects
(`attributed_effects`: gradient x activation, one backward pass for all latents).

Letters: c contexts, t tokens of each, n tokens in the mask, k active latents, F latents, V tokens
known, p pairs of a context and a latent.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kronsae.data import LanguageModel
from kronsae.errors import InputError
from kronsae.interventions.hooks import values_of
from kronsae.metrics.figures import cross_entropy, kl_divergence
from kronsae.metrics.heldout import HeldoutText
from kronsae.metrics.splicing import spliced
from kronsae.model.sae import SAE
from kronsae_kernels import SparseCodes

GATHERED = 2**24
"""Elements of decoder rows that are looked up at once."""

LOGITS = 2**27
"""Logits of a forward pass, at most, where an objective needs them all."""

Objective = Callable[[Tensor, Tensor], Tensor]
"""From logits [b, t, V] and token ids [b, t] to a number [b] for each context, differentiably."""


def summed_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Sum of the cross-entropies of a context's next tokens, in nats: [b] float64."""
    losses = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return losses.view(ids.shape[0], -1).sum(1)


def last_logit(token: int) -> Objective:
    """The logit of a token after the end of a context: [b] float64."""
    return lambda logits, ids: logits[:, -1, token].double()


class Read(NamedTuple):
    """Contexts, and what an SAE makes of them."""

    ids: Tensor
    """[c, t]"""
    mask: Tensor
    """[c, t] bool: the n tokens on which the SAE stands for the activations."""
    codes: SparseCodes
    """[n, k], in reading order."""

    def of(self, contexts: slice) -> "Read":
        """Some of the contexts."""
        counts = self.mask.sum(1).cumsum(0).tolist()
        start, stop, _ = contexts.indices(len(self.ids))
        first, last = counts[start - 1] if start else 0, counts[stop - 1] if stop else 0
        codes = SparseCodes(*(part[first:last] for part in self.codes))
        return Read(self.ids[contexts], self.mask[contexts], codes)

    def firings(self, sae: SAE) -> Tensor:
        """[c, F] int64: on how many tokens of each context each latent fires."""
        context = self.mask.nonzero()[:, :1].expand_as(self.codes.indices)
        fired = sae.fired(self.codes)
        places = (context * sae.dict_size + self.codes.indices)[fired]
        counts = torch.bincount(places, minlength=len(self.ids) * sae.dict_size)
        return counts.view(len(self.ids), sae.dict_size)


@torch.no_grad()
def read(sae: SAE, text: HeldoutText) -> Read:
    """All contexts of the text, encoded. Memory: n k codes.

    Raises InputError if the model does not predict next tokens.
    """
    if not text.model.has_cross_entropy:
        raise InputError(f"model {text.model.name!r} has no trained head for the next token")
    parts = []
    for ids, mask in text.batches():
        x = text.model.activations(ids)[..., : sae.d_model][mask]
        parts.append(sae.encode(x.to(sae.W_dec)))
    width = max(codes.values.shape[1] for codes in parts)
    padded = (
        torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in each])
        for each in zip(*parts, strict=True)
    )
    device = text.model.device
    return Read(text.contexts.to(device), text.mask.to(device), SparseCodes(*padded))


@torch.no_grad()
def exact_effects(
    model: LanguageModel,
    sae: SAE,
    found: Read,
    pairs: Tensor,
    objective: Objective = summed_loss,
    batch: int = 16,
) -> Tensor:
    """By how much the objective grows in a context when a latent is ablated there: [p] float64.

    pairs: [p, 2] int64, context and latent.
    batch: contexts a forward pass; fewer where they have more than LOGITS logits.
    The SAE's error stays: activations lose the latent's value times its decoder row.
    """
    batch = _at_most(batch, model, found)
    clean = torch.cat([objective(model.logits(ids), ids) for ids in found.ids.split(batch)])
    effects = []
    for part in pairs.to(found.ids.device).split(batch):
        contexts, latents = part.T
        ids, mask = found.ids[contexts], found.mask[contexts]
        values = torch.cat([_values(sae, found, int(c), int(f)) for c, f in part])  # [n]
        removed = values[:, None] * sae.W_dec[latents].repeat_interleave(mask.sum(1), 0)
        with spliced(model, lambda _, y, removed=removed: y - removed.to(y), mask):
            effects.append(objective(model.logits(ids), ids) - clean[contexts])
    return torch.cat(effects) if effects else torch.zeros(0, dtype=torch.float64)


def _at_most(batch: int, model: LanguageModel, found: Read) -> int:
    known = model.model.config.get_text_config().vocab_size
    return max(1, min(batch, LOGITS // (known * found.ids.shape[1])))


def _values(sae: SAE, found: Read, context: int, latent: int) -> Tensor:
    """Values of a latent on the tokens of a context that are in the mask."""
    codes = found.of(slice(context, context + 1)).codes
    column = torch.tensor([latent], device=codes.values.device)
    return values_of(codes, column, sae.dict_size)[:, 0]


def attributed_effects(
    model: LanguageModel,
    sae: SAE,
    found: Read,
    objective: Objective = summed_loss,
    batch: int = 16,
) -> Tensor:
    """First-order estimate of `exact_effects` for every context and latent: [c, F] float64.

    Minus the latent's value times the objective's gradient along its decoder row, over the tokens
    of the context. [Nanda 2023, Syed et al. 2023: attribution patching, to zero]
    """
    parts = []
    batch = _at_most(batch, model, found)
    for start in range(0, len(found.ids), batch):
        part = found.of(slice(start, start + batch))
        gradient = _gradient(model, part.ids, part.mask, objective)
        context = part.mask.nonzero()[:, 0]
        out = torch.zeros(len(part.ids), sae.dict_size, dtype=torch.float64, device=context.device)
        size = max(1, GATHERED // max(1, part.codes.values.shape[1] * sae.config.d_out))
        for rows in range(0, len(context), size):
            values, indices = (each[rows : rows + size] for each in part.codes)
            directions = sae.W_dec.detach()[indices]
            along = torch.einsum(
                "nkd,nd->nk", directions, gradient[rows : rows + size].to(directions)
            )
            places = context[rows : rows + size, None] * sae.dict_size + indices
            out.view(-1).index_add_(
                0, places.flatten(), -(values.detach() * along).double().flatten()
            )
        parts.append(out)
    return torch.cat(parts)


def _gradient(model: LanguageModel, ids: Tensor, mask: Tensor, objective: Objective) -> Tensor:
    """Gradient [n, d_out] of the objective with respect to what the SAE stands for."""
    leaves = []

    def leaf(_: Tensor, y: Tensor) -> Tensor:
        leaves.append(y.detach().requires_grad_())
        return leaves[0]

    with torch.enable_grad(), spliced(model, leaf, mask):
        total = objective(model.logits(ids), ids).sum()
    return torch.autograd.grad(total, leaves[0])[0]


def choose_pairs(
    firings: Tensor, count: int, contexts_each: int, seed: int, latents: Sequence[int] = ()
) -> Tensor:
    """Pairs [p, 2] of `count` latents that fire, drawn at random, with contexts in which they do.

    firings: [c, F].  contexts_each: at most so many contexts a latent, the first ones.
    latents: these instead of drawn ones.  Sorted by latent.
    """
    alive = (firings > 0).any(0).nonzero()[:, 0].cpu()
    if latents:
        chosen = torch.tensor(sorted(set(latents)))
    else:
        generator = torch.Generator().manual_seed(seed)
        chosen = alive[torch.randperm(len(alive), generator=generator)[:count]].sort().values
    pairs = [
        torch.stack([contexts, torch.full_like(contexts, latent)], 1)
        for latent in chosen.tolist()
        for contexts in [(firings[:, latent] > 0).nonzero()[:contexts_each, 0].cpu()]
    ]
    return torch.cat(pairs) if pairs else torch.zeros(0, 2, dtype=torch.int64)


# AND


class Gate(NamedTuple):
    """How base and extension of a latent meet, as shares of the tokens."""

    base: float
    """The base pre-latent is positive."""
    extension: float
    both: float
    fires: float
    """The latent is among the active ones."""


class Ablated(NamedTuple):
    """What happens where a latent fires, on average over these tokens, when something is off."""

    what: str
    """"base", "extension" or "composition"."""
    latents: int
    """How many latents that switches off."""
    head_before: float
    """Summed activation of the head's other latents."""
    head_after: float
    lost: float
    """Other latents of the head that no longer fire, a token."""
    gained: float
    """Latents, anywhere, that fire in their place."""
    loss: float
    """Growth of the next token's cross-entropy, in nats."""
    divergence: float
    """KL divergence of the next token's distribution from the clean one, in nats."""
    loss_elsewhere: float
    """Growth of the cross-entropy on all other tokens of these contexts, in nats a token."""


class AndTest(NamedTuple):
    """A latent of a Kron head, and what it shares with its base and its extension."""

    latent: int
    head: int
    base: int
    extension: int
    tokens: int
    """On which it fires."""
    gate: Gate
    ablated: tuple[Ablated, ...]


def without(sae: SAE, x: Tensor, off: Tensor) -> SparseCodes:
    """Codes of x [n, d] with the latents off [F] (bool) kept from firing.

    TopK then selects others in their place, as it would if their pre-latents were 0; thresholds
    do not.
    """
    if sae.selection.exact:
        k = min(sae.config.k, int((~off).sum()))
        return sae.encode(x, k=k, mask=~off)
    values, indices = sae.encode(x)
    return SparseCodes(values.masked_fill(off[indices], 0.0), indices)


@torch.no_grad()
def and_test(sae: SAE, text: HeldoutText, latent: int) -> AndTest:
    """Ablate a latent's base pre-latent, its extension, and itself alone; see `Ablated`.

    A pre-latent that is off silences all latents that it composes. The SAE's error stays:
    activations change by the difference of the two reconstructions. In one pass over the text.
    Raises InputError for a dense SAE, a latent outside [0, F), or one that never fires there.
    """
    config = sae.config
    if not config.heads:
        raise InputError("an AND-test needs latents composed of base and extension (encoder kron)")
    if not 0 <= latent < sae.dict_size:
        raise InputError(f"latent: expected 0 to {sae.dict_size - 1}, got {latent}")
    head, place = divmod(latent, config.m * config.n)
    base, extension = divmod(place, config.n)
    of_head = torch.arange(head * config.m * config.n, (head + 1) * config.m * config.n)
    grid = of_head.view(config.m, config.n)
    silenced = {
        "base": grid[base],
        "extension": grid[:, extension],
        "composition": grid[base, extension, None],
    }
    off = {}
    for name, latents in silenced.items():
        off[name] = torch.zeros(sae.dict_size, dtype=torch.bool, device=sae.W_dec.device)
        off[name][latents] = True
    inside = torch.zeros_like(off["base"])
    inside[of_head] = True
    inside[latent] = False
    sums = {name: torch.zeros(8, dtype=torch.float64) for name in off}
    gate, firing, tokens, others = torch.zeros(3, dtype=torch.float64), 0, 0, 0
    for ids, mask in text.batches():
        x = text.model.activations(ids)[..., : sae.d_model][mask].to(sae.W_dec)
        codes = sae.encode(x)
        here = ((codes.indices == latent) & sae.fired(codes)).any(-1)  # [n]
        pre = x @ sae.W_enc[head].T + sae.b_enc[head] > 0
        p, q = pre[:, base], pre[:, config.m + extension]
        gate += torch.stack([p.sum(), q.sum(), (p & q).sum()]).cpu()
        tokens += len(x)
        firing += int(here.sum())
        if not here.any():
            continue
        # The rest looks at the contexts where it fires; [b, t] says on which tokens.
        fires = torch.zeros_like(mask)
        fires[mask] = here
        kept = fires.any(1)
        rows = kept.repeat_interleave(mask.sum(1))
        part = Read(ids[kept], mask[kept], SparseCodes(*(each[rows] for each in codes)))
        others += int((~fires[kept][:, :-1]).sum())
        for name in off:
            sums[name] += _ablate(
                sae, text.model, part, x[rows], fires[kept], off[name], inside
            ).cpu()
    if not firing:
        raise InputError(f"latent {latent} never fires on this text: give more --heldout-tokens")
    shares = [value / tokens for value in (*gate.tolist(), firing)]
    return AndTest(
        latent,
        head,
        base,
        extension,
        firing,
        Gate(*shares),
        tuple(
            Ablated(name, int(off[name].sum()), *_means(sums[name], firing, others)) for name in off
        ),
    )


def _means(sums: Tensor, firing: int, others: int) -> Iterator[float]:
    before, after, lost, gained, loss, divergence, elsewhere, predicted = sums.tolist()
    yield from (value / firing for value in (before, after, lost, gained))
    yield from (value / max(1.0, predicted) for value in (loss, divergence))
    yield elsewhere / max(1, others)


def _ablate(
    sae: SAE,
    model: LanguageModel,
    part: Read,
    x: Tensor,
    fires: Tensor,
    off: Tensor,
    inside: Tensor,
) -> Tensor:
    """Sums [8] over tokens where the latent fires (`fires` [b, t]); the last but one: elsewhere."""
    codes = without(sae, x, off)
    here = fires[part.mask]
    before, after = (SparseCodes(*(each[here] for each in both)) for both in (part.codes, codes))
    sums = [(each.values * inside[each.indices]).sum() for each in (before, after)]
    lost = (_only_in(sae, before, after) & inside[before.indices]).sum()
    gained = _only_in(sae, after, before).sum()
    difference = sae.decode(codes, x) - sae.decode(part.codes, x)

    targets = part.ids[:, 1:].flatten()
    at = fires[:, :-1].flatten()  # a token's activations predict the next one
    growth = torch.empty(len(targets), dtype=torch.float64, device=targets.device)
    divergence = growth.new_zeros(())
    clean_states = model.last_states(part.ids)
    with spliced(model, lambda _, y: y + difference.to(y), part.mask):
        states = clean_states, model.last_states(part.ids)
    for (rows, clean), (_, changed) in zip(*map(model.next_token_logits, states), strict=True):
        target, chosen = targets[rows], at[rows]
        growth[rows] = cross_entropy(changed, target) - cross_entropy(clean, target)
        divergence += kl_divergence(clean[chosen], changed[chosen]).sum()
    figures = (*sums, lost, gained, growth[at].sum(), divergence)
    return torch.stack([*(f.double() for f in figures), growth[~at].sum(), at.sum().double()])


def _only_in(sae: SAE, codes: SparseCodes, others: SparseCodes) -> Tensor:
    """Which slots [n, k] of codes fire and are not among those that fire in the other codes."""
    same = (codes.indices[:, :, None] == others.indices[:, None]) & sae.fired(others)[:, None]
    return sae.fired(codes) & ~same.any(-1)
