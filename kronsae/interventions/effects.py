"""Effects of latents on the model's loss, on chosen logits, and within a Kron head.

The effect of a latent is the change of an objective when the latent is ablated on every token of a
context, measured by a forward pass each (`exact_effects`), or estimated by gradient x activation
with one backward pass for all latents (`attributed_effects`).

Letters: c contexts, t tokens of each, n tokens in the mask, k active latents, F latents, V
vocabulary size, p pairs of a context and a latent.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kronsae.data import LanguageModel
from kronsae.data.packing import PADDING
from kronsae.errors import InputError
from kronsae.interventions.hooks import places_of
from kronsae.metrics.figures import cross_entropy, kl_divergence
from kronsae.metrics.heldout import HeldoutText
from kronsae.metrics.splicing import spliced
from kronsae.metrics.usual import values_of
from kronsae.model.sae import SAE
from kronsae_kernels import SparseCodes

MAX_GATHERED = 2**24
"""Most elements of decoder rows that are gathered at a time."""

MAX_LOGITS = 2**27
"""Most logits of a forward pass, if an objective needs all of them."""

Objective = Callable[[Tensor, Tensor], Tensor]
"""Differentiable function of logits [b, t, V] and token ids [b, t] to [b], one number a context."""


def summed_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Sum of the cross-entropies of a context's next tokens, in nats: [b] float64."""
    losses = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return losses.view(ids.shape[0], -1).sum(1)


def last_logit(token: int) -> Objective:
    """Objective: the logit of `token` after the end of a context, [b] float64."""
    return lambda logits, ids: logits[:, -1, token].double()


class EncodedText(NamedTuple):
    """Contexts, and their codes by an SAE."""

    ids: Tensor
    """[c, t]"""
    mask: Tensor
    """[c, t] bool: the n tokens that the SAE encodes."""
    codes: SparseCodes
    """[n, k], in reading order."""

    def part(self, contexts: slice) -> "EncodedText":
        """Some of the contexts."""
        counts = self.mask.sum(1).cumsum(0).tolist()
        start, stop, _ = contexts.indices(len(self.ids))
        first, last = counts[start - 1] if start else 0, counts[stop - 1] if stop else 0
        codes = SparseCodes(*(part[first:last] for part in self.codes))
        return EncodedText(self.ids[contexts], self.mask[contexts], codes)

    def firings(self, sae: SAE) -> Tensor:
        """[c, F] int64: number of tokens in each context on which each latent fires."""
        context = self.mask.nonzero()[:, :1].expand_as(self.codes.indices)
        fired = sae.fired(self.codes)
        cells = (context * sae.dict_size + self.codes.indices)[fired]
        counts = torch.bincount(cells, minlength=len(self.ids) * sae.dict_size)
        return counts.view(len(self.ids), sae.dict_size)


@torch.no_grad()
def encode_text(sae: SAE, text: HeldoutText) -> EncodedText:
    """Encode all contexts of the text. Memory: n k codes.

    Raises InputError if the model does not predict next tokens.
    """
    if not text.model.has_cross_entropy:
        raise InputError(f"there is no cross-entropy: {text.model.no_cross_entropy}")
    parts, masks = [], []
    for _, mask, x in text.read():
        masks.append(mask)
        parts.append(sae.encode(x.to(sae.W_dec)))
    width = max(codes.values.shape[1] for codes in parts)
    padded = (
        torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in tensors])
        for tensors in zip(*parts, strict=True)
    )
    device = text.model.device
    return EncodedText(text.contexts.to(device), torch.cat(masks), SparseCodes(*padded))


@torch.no_grad()
def exact_effects(
    model: LanguageModel,
    sae: SAE,
    encoded: EncodedText,
    pairs: Tensor,
    objective: Objective = summed_loss,
    batch: int = 16,
    on_batch: Callable[[int], None] = lambda pairs: None,
) -> Tensor:
    """Change of the objective in a context when a latent is ablated there: [p] float64.

    pairs: [p, 2] int64, context and latent.
    batch: contexts per forward pass; fewer if they have more than MAX_LOGITS logits.
    on_batch: called after each pass with how many pairs are done.
    The SAE's error is kept: activations lose the latent's value times its decoder row.
    """
    batch = _limited(batch, model, encoded)
    clean = torch.cat([objective(model.logits(ids), ids) for ids in encoded.ids.split(batch)])
    effects = []
    for part in pairs.to(encoded.ids.device).split(batch):
        contexts, latents = part.T
        ids, mask = encoded.ids[contexts], encoded.mask[contexts]
        values = torch.cat([_values(sae, encoded, int(c), int(f)) for c, f in part])  # [n]
        removed = values[:, None] * sae.W_dec[latents].repeat_interleave(mask.sum(1), 0)
        with spliced(model, partial(_subtract, removed), mask):
            effects.append(objective(model.logits(ids), ids) - clean[contexts])
        on_batch(sum(map(len, effects)))
    return torch.cat(effects) if effects else torch.zeros(0, dtype=torch.float64)


def _subtract(removed: Tensor, _x: Tensor, y: Tensor) -> Tensor:
    return y - removed.to(y)


def _limited(batch: int, model: LanguageModel, encoded: EncodedText) -> int:
    """Contexts per forward pass, so that it has at most MAX_LOGITS logits."""
    vocabulary = model.model.config.get_text_config().vocab_size
    return max(1, min(batch, MAX_LOGITS // (vocabulary * encoded.ids.shape[1])))


def _values(sae: SAE, encoded: EncodedText, context: int, latent: int) -> Tensor:
    """Values of a latent on the masked tokens of a context."""
    codes = encoded.part(slice(context, context + 1)).codes
    return values_of(codes, [latent], sae.dict_size)[:, 0]


def attributed_effects(
    model: LanguageModel,
    sae: SAE,
    encoded: EncodedText,
    objective: Objective = summed_loss,
    batch: int = 16,
) -> Tensor:
    """First-order estimate of `exact_effects` for every context and latent: [c, F] float64.

    It is minus the latent's value times the objective's gradient along its decoder row, summed over
    the tokens of the context. [Nanda 2023, Syed et al. 2023: attribution patching, to zero]
    """
    parts = []
    batch = _limited(batch, model, encoded)
    for start in range(0, len(encoded.ids), batch):
        part = encoded.part(slice(start, start + batch))
        gradient = _gradient(model, part.ids, part.mask, objective)
        context = part.mask.nonzero()[:, 0]
        out = torch.zeros(len(part.ids), sae.dict_size, dtype=torch.float64, device=context.device)
        size = max(1, MAX_GATHERED // max(1, part.codes.values.shape[1] * sae.config.d_out))
        for rows in range(0, len(context), size):
            values, indices = (tensor[rows : rows + size] for tensor in part.codes)
            directions = sae.W_dec.detach()[indices]
            along = torch.einsum(
                "nkd,nd->nk", directions, gradient[rows : rows + size].to(directions)
            )
            cells = context[rows : rows + size, None] * sae.dict_size + indices
            out.view(-1).index_add_(
                0, cells.flatten(), -(values.detach() * along).double().flatten()
            )
        parts.append(out)
    return torch.cat(parts)


def _gradient(model: LanguageModel, ids: Tensor, mask: Tensor, objective: Objective) -> Tensor:
    """Gradient [n, d_out] of the objective by the activations that the SAE reconstructs."""
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
    """Pairs [p, 2] of `count` random latents with contexts in which they fire, sorted by latent.

    firings: [c, F].  contexts_each: most contexts per latent; the first ones are taken.
    latents: these instead of random ones.
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


def without(sae: SAE, x: Tensor, off: Tensor) -> SparseCodes:
    """Codes of x [n, d] with the latents `off` ([F] bool) silenced.

    TopK selects others in their place, as if their pre-latents were 0; thresholds do not.
    """
    if sae.selection.exact:
        k = min(sae.config.k, int((~off).sum()))
        return sae.encode(x, k=k, mask=~off)
    values, indices = sae.encode(x)
    return SparseCodes(values.masked_fill(off[indices], 0.0), indices)


@torch.no_grad()
def and_test(sae: SAE, text: HeldoutText, latent: int) -> dict[str, Any]:
    """Ablate a latent's base pre-latent, its extension, and the latent alone ("composition").

    Returns the latent, its "head", "base" and "extension", the number of "tokens" on which it
    fires, the figures of each ablation ("ablated", see `_figures`), and the "gate": the shares of
    all tokens on which the base, the extension and both are positive, and on which it fires.

    Ablating a pre-latent silences all latents that it composes. The SAE's error is kept:
    activations change by the difference of the two reconstructions. One pass over the text.
    Raises InputError for a dense SAE, a latent outside [0, F), or one that never fires there.
    """
    head, base, extension = _place(sae, latent)
    off, others = _silenced(sae, head, base, extension)
    sums = {name: torch.zeros(8, dtype=torch.float64) for name in off}
    gate, firing, tokens, elsewhere = torch.zeros(3, dtype=torch.float64), 0, 0, 0
    for ids, mask, x in text.read():
        x = x.to(sae.W_dec)
        codes = sae.encode(x)
        here = ((codes.indices == latent) & sae.fired(codes)).any(-1)  # [n]
        positive = x @ sae.W_enc[head].T + sae.b_enc[head] > 0
        p, q = positive[:, base], positive[:, sae.config.m + extension]
        gate += torch.stack([p.sum(), q.sum(), (p & q).sum()]).cpu()
        tokens += len(x)
        firing += int(here.sum())
        if not here.any():
            continue
        # From here on only the contexts in which it fires.
        fires = torch.zeros_like(mask)
        fires[mask] = here
        kept = fires.any(1)
        rows, fires = kept.repeat_interleave(mask.sum(1)), fires[kept]
        part = EncodedText(ids[kept], mask[kept], SparseCodes(*(t[rows] for t in codes)))
        elsewhere += int((~fires[:, :-1] & (part.ids[:, 1:] != PADDING)).sum())
        for name in off:
            sums[name] += _ablate(sae, text.model, part, x[rows], fires, off[name], others).cpu()
    if not firing:
        raise InputError(f"latent {latent} never fires on this text: give more --heldout-tokens")
    names = ("base", "extension", "both", "fires")
    return {
        "latent": latent,
        "head": head,
        "base": base,
        "extension": extension,
        "tokens": firing,
        "gate": {n: x / tokens for n, x in zip(names, (*gate.tolist(), firing), strict=True)},
        "ablated": [
            {"what": name, "latents": int(off[name].sum())}
            | _figures(sums[name], firing, elsewhere)
            for name in off
        ],
    }


@contextmanager
def silence(model: LanguageModel, sae: SAE, off: Tensor) -> Iterator[None]:
    """While open, the latents `off` ([F] bool) are silenced in every forward pass; see `without`.

    The SAE's error is kept: activations change by the difference of the two reconstructions.
    """

    def silenced(x: Tensor, y: Tensor) -> Tensor:
        x = x.to(sae.W_dec)
        return y + (sae.decode(without(sae, x, off), x) - sae.decode(sae.encode(x), x)).to(y)

    with spliced(model, silenced, **places_of(sae)):
        yield


def factors(sae: SAE, latent: int) -> dict[str, Tensor]:
    """What `and_test` silences of a latent: latents ([F] bool) of its "base", of its "extension",
    and it alone ("composition").

    Raises InputError for a dense SAE, or a latent outside [0, F).
    """
    return _silenced(sae, *_place(sae, latent))[0]


def _place(sae: SAE, latent: int) -> tuple[int, int, int]:
    """Head, base and extension of a latent. Raises InputError if it has none."""
    config = sae.config
    if not config.heads:
        raise InputError("an AND-test needs latents composed of base and extension (encoder kron)")
    sae.check_latents([latent])
    head, within = divmod(latent, config.m * config.n)
    return head, *divmod(within, config.n)


def _silenced(sae: SAE, head: int, base: int, extension: int) -> tuple[dict[str, Tensor], Tensor]:
    """Latents that each ablation silences, and the other latents of the head ([F] bool each)."""
    shape = (sae.config.heads, sae.config.m, sae.config.n)
    whole = torch.zeros(4, *shape, dtype=torch.bool, device=sae.W_dec.device)
    whole[0, head, base] = True
    whole[1, head, :, extension] = True
    whole[2, head, base, extension] = True
    whole[3, head] = True
    *off, of_head = whole.flatten(1)
    return dict(zip(("base", "extension", "composition"), off, strict=True)), of_head & ~off[2]


def _figures(sums: Tensor, firing: int, elsewhere: int) -> dict[str, float]:
    """Means of the sums of `_ablate` over the tokens on which the latent fires.

    Summed activation of the head's other latents before and after; those that no longer fire, and
    latents of any head that fire in their place; increase of the next token's cross-entropy, and KL
    divergence from the clean model, in nats; the increase on all other tokens of these contexts.
    """
    before, after, lost, gained, loss, divergence, loss_elsewhere, predicted = sums.tolist()
    predicted = max(1.0, predicted)
    return {
        "head_before": before / firing,
        "head_after": after / firing,
        "lost": lost / firing,
        "gained": gained / firing,
        "loss": loss / predicted,
        "divergence": divergence / predicted,
        "loss_elsewhere": loss_elsewhere / max(1, elsewhere),
    }


def _ablate(
    sae: SAE,
    model: LanguageModel,
    part: EncodedText,
    x: Tensor,
    fires: Tensor,
    off: Tensor,
    others: Tensor,
) -> Tensor:
    """Sums [8] over the tokens where the latent fires, of the figures of `_figures`.

    fires: [b, t].  off: [F] latents to silence.  others: [F] other latents of the head.
    The last but one is the sum over all other tokens, the last the number of predicted tokens.
    """
    codes = without(sae, x, off)
    here = fires[part.mask]
    before, after = (
        SparseCodes(*(tensor[here] for tensor in both)) for both in (part.codes, codes)
    )
    sums = [(values * others[indices]).sum() for values, indices in (before, after)]
    lost = (_only_in(sae, before, after) & others[before.indices]).sum()
    gained = _only_in(sae, after, before).sum()
    difference = sae.decode(codes, x) - sae.decode(part.codes, x)

    targets = part.ids[:, 1:].flatten()
    at = fires[:, :-1].flatten()  # a token's activations predict the next one
    there = targets != PADDING
    increase = torch.zeros(len(targets), dtype=torch.float64, device=targets.device)
    divergence = increase.new_zeros(())
    clean_states = model.last_states(part.ids)
    with spliced(model, lambda _, y: y + difference.to(y), part.mask):
        states = clean_states, model.last_states(part.ids)
    for (rows, clean), (_, changed) in zip(*map(model.next_token_logits, states), strict=True):
        target, chosen = targets[rows], at[rows]
        increase[rows] = cross_entropy(changed, target) - cross_entropy(clean, target)
        divergence += kl_divergence(clean[chosen], changed[chosen]).sum()
    figures = (*sums, lost, gained, increase[at].sum(), divergence, increase[~at].sum())
    return torch.stack([f.double() for f in (*figures, (at & there).sum())])


def _only_in(sae: SAE, codes: SparseCodes, others: SparseCodes) -> Tensor:
    """Slots [n, k] of codes that fire and whose latents do not fire in the other codes."""
    same = (codes.indices[:, :, None] == others.indices[:, None]) & sae.fired(others)[:, None]
    return sae.fired(codes) & ~same.any(-1)
