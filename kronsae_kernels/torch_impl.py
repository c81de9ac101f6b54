"""The operations in torch calls that are fast on a CPU and right on any device.

Selection is exact and never holds [B, F]: a head whose largest product M = max p max q is not
among the k first (by M descending, head ascending) cannot hold one of the k largest latents, since
each of the k heads before it holds a latent that precedes all of its own. So k heads are kept, and
the k largest of their k m n latents are the k largest of all; of those heads' rows k are kept in
the same way. Tokens are taken in chunks, so that the pre-latents of a chunk stay in the cache and
memory does not grow with B.

The rest is three sums over a sparse matrix C [B, N] with r entries a row, given as coefficients
[B, r] and columns [B, r]: C table (`combine`), C^T y (`scatter`), and the derivative of the first
with respect to the coefficients (`pair_dots`). Decoder and encoder, forward and backward, are
these. All three are deterministic.

Arguments are 2-D, checked by the public functions. Letters as in `common`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from kronsae_kernels import reference
from kronsae_kernels.common import accumulate_dtype

CHUNK_BYTES = {"cpu": 8 << 20}
"""Size of the pre-latents of one chunk of tokens, by device type: the cache, on a CPU."""
DEFAULT_CHUNK_BYTES = 1 << 30
FEW_PER_K = 4
"""Up to so many heads times k, choosing k of them first costs more than it saves."""
WHOLE = 2
"""Chunks up to so many times CHUNK_BYTES (dense: twice that) are made at once, in fewer rounds."""
MIN_CHUNK_TOKENS = 256
"""Fewer tokens make the matrix product inefficient."""
TILE_TOKENS = 128
"""Tokens of a tile of the product on a GPU, of which chunks are multiples."""
Tensors = TypeVar("Tensors", bound=tuple[Tensor, ...])
Block = tuple[int, Tensor]
"""Number of the first head, and pre-latents [b, m + n, c] of c heads (dense: [b, 1, c])."""


# Encode


def encode(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None,
    mask: Tensor | None,
    m: int | None,
    k: int,
    composition: str,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k latents with the largest products: indices, and their two factors.

    Returns indices [B, k] int64, base [B, k] and extension [B, k] (ReLU applied, except for
    composition "mul"), float32 (float64 for float64), by product descending, index ascending.
    m None: a dense encoder; its values are the base (composition "linear": without the ReLU), the
    extension is an empty tensor.
    mask [F] or [B, F]: the latents that compete; where a token's are fewer than k, others follow.
    scale [F]: they compete by their product times it.
    """
    dtype = accumulate_dtype(x.dtype)
    if mask is None and scale is None:
        chunks = blocks(x, w_enc, b_enc, k)
        if m is None:
            dense = [_largest_of_dense(chunk, k, composition) for chunk in chunks]
            indices, values = concatenate(dense, x, k, (torch.int64, dtype))
            return indices, values, values.new_empty(0)
        parts = [_largest_of_kron(chunk, m, k, composition) for chunk in chunks]
        return concatenate(parts, x, k, (torch.int64, dtype, dtype))
    if m is None:
        signed = composition == "linear"
        dense = [
            select_dense(pre, allowed, k, scale=scale, signed=signed)
            for pre, allowed in _with_masks(projections(x, w_enc, b_enc, scratch=0), mask)
        ]
        indices, values = concatenate(dense, x, k, (torch.int64, dtype))
        return indices, values, values.new_empty(0)
    heads, rows, _ = w_enc.shape
    n = rows - m
    pres = projections(x, w_enc, b_enc, scratch=min(k, heads) * m * n)
    parts = [
        select_kron(pre.view(-1, rows, heads), allowed, m, n, k, composition, scale=scale)
        for pre, allowed in _with_masks(pres, mask)
    ]
    return concatenate(parts, x, k, (torch.int64, dtype, dtype))


def _with_masks(
    chunks: Iterator[Tensor], mask: Tensor | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Chunks of tokens, and the part of a mask [B, F] that is theirs (or the whole mask [F])."""
    start = 0
    for chunk in chunks:
        if mask is None or mask.ndim == 1:
            yield chunk, mask
        else:
            yield chunk, mask[start : start + len(chunk)]
        start += len(chunk)


def encode_backward(
    d_base: Tensor,
    d_extension: Tensor,
    indices: Tensor,
    x: Tensor,
    w_enc: Tensor,
    m: int | None,
    need_x: bool,
    need_w: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, w_enc, b_enc from those of the selected pre-latents [B, k].

    Only the <= 2k live pre-latents of a token take part. m None: a dense encoder; d_base is by its
    values (0 where the ReLU was 0), d_extension is not used. What is not needed is an empty tensor.
    """
    coefficients, columns = live_pre_latents(d_base, d_extension, indices, w_enc, m)
    d_x, d_w, d_b = x.new_empty(0), x.new_empty(0), x.new_empty(0)
    if need_x:
        d_x = combine(coefficients, columns, i_major(w_enc)).to(x.dtype)
    if need_w:
        d_w, d_b = _scatter_linear(coefficients, columns, x, w_enc.shape[:-1].numel())
        if m is not None:
            heads, rows, d = w_enc.shape
            d_w = d_w.view(rows, heads, d).transpose(0, 1)
            d_b = d_b.view(rows, heads).t().contiguous()
    return d_x, d_w, d_b


def live_pre_latents(
    d_base: Tensor, d_extension: Tensor, indices: Tensor, w_enc: Tensor, m: int | None
) -> tuple[Tensor, Tensor]:
    """The pre-latents behind latents [B, k]: gradients [B, 2k], and i-major rows [B, 2k]."""
    if m is None:
        return d_base, indices
    return torch.cat([d_base, d_extension], 1), torch.cat(rows_of(indices, w_enc, m), 1)


def rows_of(indices: Tensor, w_enc: Tensor, m: int | None) -> tuple[Tensor, ...]:
    """Rows of `i_major(w_enc)` behind latents: a base and an extension row, or (m None) one."""
    if m is None:
        return (indices,)
    heads, rows, _ = w_enc.shape
    head, latent = divide(indices, m * (rows - m))
    base_row, extension_row = divide(latent, rows - m)
    return base_row * heads + head, (m + extension_row) * heads + head


def threshold_encode(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None,
    threshold: Tensor,
    m: int | None,
    eps: float,
    composition: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All latents above their threshold: base, extension, indices [B, w], and counts [B].

    A dense encoder's values are `base` and `extension` both. Slots from a token's count on are
    unused; their indices are spread over the dictionary, as no latent should have a long list of
    entries that mean nothing.
    """
    size, dtype = threshold.shape[0], accumulate_dtype(x.dtype)
    threshold = _without_nan(threshold.to(torch.promote_types(threshold.dtype, dtype)))
    if m is None:
        above = partial(_above, threshold=threshold)
    else:
        limits = threshold.reshape(w_enc.shape[0], m, -1)
        above = partial(_products_above, limits=_Limits(limits, composition, eps))
    parts, begin = [], 0
    for chunk in blocks(x, w_enc, b_enc, k=1):
        for start, block in chunk:
            token, *found = above(block, start)
            parts.append((token + begin, *found))
        begin += len(block)
    dtypes = torch.int64, torch.int64, dtype, dtype
    token, latents, base, extension = concatenate(parts, x, None, dtypes)
    counts = token.bincount(minlength=x.shape[0])
    if len(parts) > 1:
        order = token.argsort(stable=True)
        latents, base, extension = latents[order], base[order], extension[order]
    width = max(1, int(counts.max()) if counts.numel() else 0)
    used = torch.arange(width, device=x.device) < counts[:, None]
    indices = torch.arange(used.numel(), device=x.device).remainder_(size).view(used.shape)
    indices.masked_scatter_(used, latents)
    base, extension = (
        torch.zeros(used.shape, dtype=dtype, device=x.device).masked_scatter_(used, factor)
        for factor in (base, extension)
    )
    # Largest first. Latents are in order so far, and the sort is stable.
    product = base if m is None else base * extension
    order = product.where(used, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    return base.gather(1, order), extension.gather(1, order), indices.gather(1, order), counts


def _without_nan(x: Tensor) -> Tensor:
    """x with infinity for NaN: a threshold that no value exceeds, a product that may hide some."""
    return x.nan_to_num(torch.inf, torch.inf, -torch.inf)


Above = tuple[Tensor, Tensor, Tensor, Tensor]
"""Active latents of a block, token by token and in order: token, latent, and its two factors."""


def _above(block: Tensor, start: int, threshold: Tensor) -> Above:
    """`threshold_encode` of a block [b, 1, c] of a dense encoder's pre-activations."""
    pre = block[:, 0].to(accumulate_dtype(block.dtype))
    limits = threshold[start : start + pre.shape[1]].clamp(min=0)
    token, column = (pre > limits).nonzero().unbind(1)
    values = pre[token, column]
    return token, start + column, values, values


class _Limits(NamedTuple):
    """Thresholds [h, m, n] of the values of products."""

    threshold: Tensor
    composition: str
    eps: float

    def exceeded(self, product: Tensor, threshold: Tensor) -> Tensor:
        """Where a latent with this product is active. Its value grows with the product."""
        values = reference.compose(product, self.composition, self.eps)
        return (values > threshold) & (product > 0)


def _products_above(pre: Tensor, start: int, limits: _Limits) -> Above:
    """`threshold_encode` of a block [b, m + n, c] of a Kron encoder's pre-latents.

    Where a head's largest product does not exceed its lowest threshold, no other does; and so with
    its base rows. Products are formed in the others alone.
    """
    _, m, n = limits.threshold.shape
    dtype, composition = accumulate_dtype(pre.dtype), limits.composition
    threshold = limits.threshold[start : start + pre.shape[2]]
    of_rows = threshold.amin(2)
    scores = _without_nan(_head_scores(pre, None, m, composition, None))
    pairs = limits.exceeded(scores, of_rows.amin(1)).nonzero()
    parts = []
    for span in spans(len(pairs), m * n * dtype.itemsize, pre.device):
        token, head = pairs[span].unbind(1)
        factors = pre[token, :, head].to(dtype)
        if composition != "mul":
            factors = factors.relu_()
        base, extension = factors[:, :m], factors[:, m:]
        scores = _without_nan(_row_scores(base[..., None], extension[..., None], composition))
        scores = scores.squeeze(2)
        pair, row = limits.exceeded(scores, of_rows[head]).nonzero().unbind(1)
        token, head, base, extension = token[pair], head[pair], base[pair, row], extension[pair]
        product = base[:, None] * extension
        place, column = limits.exceeded(product, threshold[head, row]).nonzero().unbind(1)
        latents = (((start + head) * m + row) * n)[place] + column
        parts.append((token[place], latents, base[place], extension[place, column]))
    dtypes = torch.int64, torch.int64, dtype, dtype
    return concatenate(parts, pre, None, dtypes)


# Decode


def decode(
    values: Tensor,
    indices: Tensor,
    w_dec: Tensor,
    b_dec: Tensor | None,
    bounds: Sequence[int] | None = None,
) -> Tensor:
    """Sum of the selected rows of w_dec times their values, plus b_dec: [B, d] in w_dec's dtype.

    bounds: these sums of the latents below each of G bounds: [B, G, d].
    """
    if bounds is None:
        out = combine(values, indices, w_dec)
    else:
        out = _nested_sums(values, indices, w_dec, bounds)
    return (out if b_dec is None else out.add_(b_dec)).to(w_dec.dtype)


def _nested_sums(values: Tensor, indices: Tensor, w_dec: Tensor, bounds: Sequence[int]) -> Tensor:
    """`combine` of the latents below each bound: [B, G, d] at least float32.

    Each group of latents between two bounds is summed, then prefixes of groups: a row is read once.
    """
    tokens, dtype = values.shape[0], accumulate_dtype(w_dec.dtype)
    bags, values = _bags(indices, values, bounds)
    used = values.view(-1).nonzero().squeeze(1)  # nothing is gathered for unused slots
    bags, order = bags.view(-1)[used].sort(stable=True)
    used = used[order]
    starts = torch.searchsorted(bags, torch.arange(tokens * len(bounds), device=bags.device))
    out = embedding_bag(
        indices.reshape(-1)[used],
        w_dec.to(dtype),
        starts,
        mode="sum",
        per_sample_weights=values.view(-1)[used].to(dtype),
    )
    return out.view(tokens, len(bounds), w_dec.shape[1]).cumsum(1)


def decode_backward(
    d_out: Tensor,
    values: Tensor,
    indices: Tensor,
    w_dec: Tensor,
    bounds: Sequence[int] | None,
    need_values: bool,
    need_w: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of values [B, k] and w_dec [F, d]. What is not needed is an empty tensor.

    bounds: d_out is [B, G, d], and a latent of group g is in the prefixes from g on.
    """
    d_values, d_w, rows = values.new_empty(0), w_dec.new_empty(0), None
    y = d_out.to(accumulate_dtype(w_dec.dtype))
    if bounds is not None:
        rows, values = _bags(indices, values, bounds)
        y = y.flip(1).cumsum(1).flip(1).flatten(0, 1)
    if need_values:
        if bounds is None or rows is None:
            d_values = pair_dots(y, indices, w_dec)
        else:
            d_values = _row_dots(y, indices, w_dec.to(y.dtype), rows)
            d_values = d_values.masked_fill(indices >= bounds[-1], 0)
        d_values = d_values.to(values.dtype)
    if need_w:
        d_w = scatter(values, *group(values, indices, w_dec.shape[0]), y, rows).to(w_dec.dtype)
    return d_values, d_w


def hierarchical(
    values: Tensor,
    indices: Tensor,
    w_dec: Tensor,
    target: Tensor,
    prefixes: Sequence[int],
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Squared errors of the sums of the first codes, and their gradients, in one gather of rows.

    Returns the sum of the squared errors over tokens and prefixes, the residual [B, d] of all
    codes, and (empty without `gradients`) the sum's derivatives by values, w_dec and target, all in
    the dtype of target [B, d]: at least float32. Memory: O(B (k + d) + F d), and a chunk of rows.
    """
    (tokens, k), (size, d), dtype = values.shape, w_dec.shape, target.dtype
    weights, loss, residual = values.to(dtype), target.new_zeros(()), torch.empty_like(target)
    left_out = set(range(k)) - {end - 1 for end in prefixes}
    shapes = [(tokens, k), (size, d), (tokens, d)] if gradients else [(0,)] * 3
    d_values, d_w, d_target = (target.new_zeros(shape) for shape in shapes)
    chunks = spans(tokens, 2 * k * d * target.element_size(), target.device, 1)
    most = max((span.stop - span.start for span in chunks), default=0)
    gathered, products = w_dec.new_empty(most * k, d), target.new_empty(most, k, d)
    for span in chunks:
        columns, z = indices[span], weights[span]
        rows = gathered[: columns.numel()]
        torch.index_select(w_dec, 0, columns.reshape(-1), out=rows)
        rows = rows.to(dtype).view(-1, k, d)
        errors = torch.mul(rows, z[..., None], out=products[: len(z)])
        of_slots = errors.unbind(1)
        of_slots[0].sub_(target[span])
        for before, after in pairwise(of_slots):  # faster than cumsum, in place
            after.add_(before)
        residual[span] = of_slots[-1]
        for slot in left_out:
            of_slots[slot].zero_()
        loss += errors.flatten().dot(errors.flatten())
        if gradients:
            for after, before in pairwise(reversed(of_slots)):  # of all prefixes that hold the slot
                before.add_(after)
            d_target[span] = -2 * of_slots[0]
            d_values[span] = 2 * torch.linalg.vecdot(rows, errors)
            _scatter_into(d_w, 2 * z, columns, errors.flatten(0, 1))
    return loss, residual, d_values, d_w, d_target


def _scatter_into(out: Tensor, coefficients: Tensor, columns: Tensor, y: Tensor) -> None:
    """out[f] += sum over entries with column f of coefficient times y's row [b r, d] of the entry.

    Only rows that occur are touched.
    """
    ordered, order = columns.reshape(-1).sort(stable=True)
    latents, counts = ordered.unique_consecutive(return_counts=True)
    weights, starts = coefficients.reshape(-1)[order], counts.cumsum(0) - counts
    sums = embedding_bag(order, y, starts, mode="sum", per_sample_weights=weights)
    out.index_add_(0, latents, sums)  # each latent once: deterministic


def _bags(indices: Tensor, values: Tensor, bounds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Row [B, k] of each latent among B G sums, a token's G groups together; and its value there:
    0 from the last bound on."""
    count = len(bounds)
    edges = torch.tensor(bounds, dtype=indices.dtype, device=indices.device)
    groups = torch.searchsorted(edges, indices.contiguous(), right=True)  # the first that holds it
    token = torch.arange(len(indices), device=indices.device)[:, None]
    return token * count + groups.clamp(max=count - 1), values.masked_fill(groups == count, 0)


def _row_spans(indices: Tensor, table: Tensor) -> list[slice]:
    """Chunks of tokens [B, r] whose rows of the table are held at once.

    A chunk may be of a single token, as each is a product of its own: r has no bound where a
    selection is over the batch.
    """
    row_bytes = indices.shape[1] * table.shape[1] * 4
    return spans(indices.shape[0], row_bytes, table.device, 1)


# The three sparse sums


def combine(coefficients: Tensor, columns: Tensor, table: Tensor) -> Tensor:
    """C table: out[b] = sum_s coefficients[b, s] table[columns[b, s]], [B, d] at least float32."""
    dtype = accumulate_dtype(table.dtype)
    coefficients = coefficients.to(dtype)
    if columns.numel() == 0:
        return table.new_zeros(columns.shape[0], table.shape[1], dtype=dtype)
    if table.dtype == dtype:
        used, starts = coefficients != 0, None
        counts = used.sum(1)
        if 2 * int(counts.sum()) < used.numel():  # codes as wide as one token needs
            columns, coefficients = columns[used], coefficients[used]
            starts = counts.cumsum(0) - counts
        columns, coefficients = columns.contiguous(), coefficients.contiguous()
        return embedding_bag(columns, table, starts, mode="sum", per_sample_weights=coefficients)
    # embedding_bag wants the coefficients in the table's dtype, which would round them.
    out = [
        torch.bmm(coefficients[span, None, :], table[columns[span]].to(dtype)).squeeze(1)
        for span in _row_spans(columns, table)
    ]
    return torch.cat(out)


def pair_dots(y: Tensor, columns: Tensor, table: Tensor) -> Tensor:
    """out[b, s] = y[b] . table[columns[b, s]], [B, r] float32 (float64 for a float64 table)."""
    dtype = accumulate_dtype(table.dtype)
    (tokens, r), y = columns.shape, y.to(dtype)
    if table.dtype == dtype and columns.numel():
        token = torch.arange(tokens, device=y.device)
        return _row_dots(y, columns, table, token[:, None].expand(tokens, r))
    out = [
        torch.bmm(table[columns[span]].to(dtype), y[span, :, None]).squeeze(2)
        for span in _row_spans(columns, table)
    ]
    return torch.cat(out) if out else y.new_empty(tokens, r)


def _row_dots(y: Tensor, columns: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    """out[b, s] = y[rows[b, s]] . table[columns[b, s]], [B, r], all in one dtype."""
    starts = torch.arange(len(columns), device=y.device) * columns.shape[1]
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        y, table, columns.contiguous().view(-1), starts, rows.contiguous().view(-1), 0
    ).view(columns.shape)


def group(coefficients: Tensor, columns: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Entries of [B, r] that are not 0, sorted by column (stably); each column's start [size]."""
    entries, keys = coefficients.reshape(-1).nonzero().squeeze(1), columns.reshape(-1)
    if some := len(entries) < len(keys):
        keys = keys[entries]
    if size < 2**31:
        keys = keys.int()  # half the time of int64
    ordered, order = keys.sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(size, dtype=keys.dtype, device=keys.device))
    return entries[order] if some else order, starts


def scatter(
    coefficients: Tensor, order: Tensor, starts: Tensor, y: Tensor, rows: Tensor | None = None
) -> Tensor:
    """C^T y: out[f] = sum over entries with column f of coefficient times y[its row], [N, d].

    `order`, `starts` from `group`. Sums run in the order of the tokens.
    rows: [B, r] row of y of each entry; by default its token.
    """
    if order.numel() == 0:
        return y.new_zeros(starts.numel(), y.shape[1])
    r = coefficients.shape[1]
    weights = coefficients.reshape(-1)[order].to(y.dtype)
    rows = order // r if rows is None else rows.reshape(-1)[order]
    return embedding_bag(rows, y, starts, mode="sum", per_sample_weights=weights)


def _scatter_linear(
    coefficients: Tensor, columns: Tensor, x: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Gradients [size, d], [size] of a linear layer's weight and bias, in x's dtype."""
    dtype = accumulate_dtype(x.dtype)
    grouped = group(coefficients, columns, size)
    d_w = scatter(coefficients, *grouped, x.to(dtype)).to(x.dtype)
    entries = coefficients.to(dtype).reshape(-1, 1)
    d_b = scatter(torch.ones_like(entries), *grouped, entries).to(x.dtype)
    return d_w, d_b.view(-1)


def divide(numbers: Tensor, divisor: int) -> tuple[Tensor, Tensor]:
    """Quotient and remainder of numbers >= 0. (`%` on tensors is another, slower division.)"""
    if divisor & (divisor - 1) == 0:
        return numbers >> (divisor.bit_length() - 1), numbers & (divisor - 1)
    quotient = numbers // divisor
    return quotient, numbers - quotient * divisor


# Selection


def top(scores: Tensor, k: int, ascending: bool = False) -> Tensor:
    """Numbers [b, k] of the k largest of scores [b, c], of equal ones the lowest.

    Largest first, equal ones in order; or ascending.
    Scores [b, r, c] of r to each of c columns are numbered column by column, as latents are by
    head: that in row i of column j is j r + i.
    """
    _, *inner, _ = scores.shape
    rows, scores = math.prod(inner), scores.flatten(1)
    size = scores.shape[1]
    if k == size:
        if ascending:
            return torch.arange(size, device=scores.device).repeat(len(scores), 1)
        return _sorted_numbers(scores, rows, k)
    ranked, positions, tied = _largest(scores, k)
    numbers = positions
    if rows > 1:
        row, column = divide(positions, size // rows)
        numbers = column.mul_(rows).add_(row)
    if not ascending:  # the right ones, but equal scores are in any order
        equal = (ranked[:, 1:] == ranked[:, :-1]).any(1).nonzero().squeeze(1)
        if equal.numel():  # by number, then stably by score
            by_number, order = numbers[equal].sort(dim=1)
            order = ranked[equal].gather(1, order)
            order = order.sort(dim=1, descending=True, stable=True).indices
            numbers[equal] = by_number.gather(1, order)
    tied = tied.nonzero().squeeze(1)
    if tied.numel():
        numbers[tied] = _sorted_numbers(scores[tied], rows, k)
    return numbers.sort(dim=1).values if ascending else numbers


def _largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k < c largest of scores [b, c], and their positions: [b, k] each, largest first.

    The third: bool [b], whether a tie at a cut leaves open which they are.
    Long rows in two rounds, by the argument above: the k groups with the largest maxima hold the k
    largest scores. A group is {j, j + c/g, j + 2c/g, ...}, so that its maximum is taken over
    contiguous slabs.
    """
    tokens, size = scores.shape
    per_group = _group_size(size, k)
    groups = size // per_group
    slabs = scores.view(tokens, per_group, groups)
    maxima = scores if per_group == 1 else slabs.amax(1)
    ranked, kept = maxima.topk(k + 1, dim=1)
    tied = ranked[:, k] == ranked[:, k - 1]
    ranked, kept = ranked[:, :k], kept[:, :k]
    if per_group == 1:
        return ranked, kept, tied
    candidates = slabs.gather(2, kept[:, None, :].expand(-1, per_group, -1)).flatten(1)
    ranked, positions, tied_inside = _largest(candidates, k)
    member, slot = divide(positions, k)
    return ranked, member * groups + kept.gather(1, slot), tied | tied_inside


def _group_size(size: int, k: int) -> int:
    """Power of two near sqrt(size / k), where both rounds are equally long; 1: one round."""
    per_group = 1
    while size % (2 * per_group) == 0 and max(32, 4 * per_group**2) * k <= size:
        per_group *= 2
    return per_group


def _sorted_numbers(scores: Tensor, rows: int, k: int) -> Tensor:
    """`top` by a stable sort of scores [b, r c]."""
    if rows > 1:
        scores = scores.unflatten(1, (rows, -1)).transpose(1, 2).flatten(1)
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :k]


def select_kron(
    pre: Tensor,
    mask: Tensor | None,
    m: int,
    n: int,
    k: int,
    composition: str,
    few: bool = True,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`encode` of one chunk from its pre-latents [b, m + n, h] (before the ReLU).

    mask: [F] or [b, F].  few: whether latents of a mask [F] are counted (on the host), and scored
    alone if they are few.
    """
    tokens, rows, heads = pre.shape
    dtype = accumulate_dtype(pre.dtype)
    places = _few(mask, k, k * m * n) if few else None
    if places is not None:
        return _select_among(pre, places, m, n, k, composition, scale)
    if mask is None and scale is None:
        return _largest_of_kron([(0, pre)], m, k, composition)
    if k < heads:
        kept = top(_head_scores(pre, mask, m, composition, scale), k, ascending=True)
        pre = pre.gather(2, kept[:, None, :].expand(-1, rows, -1))
    else:
        kept = torch.arange(heads, device=pre.device).expand(tokens, heads)
    factors = pre.transpose(1, 2).to(dtype)  # [b, kept, m + n]
    if composition != "mul":
        factors = factors.clamp(min=0)
    scores = factors[:, :, :m, None] * factors[:, :, None, m:]
    if scale is not None:
        scores = scores * scale.view(heads, m, n)[kept]
    if mask is not None and mask.ndim == 1:
        scores = scores.masked_fill(~mask.view(heads, m, n)[kept], -torch.inf)
    elif mask is not None:
        of_token = torch.arange(tokens, device=pre.device)[:, None]
        scores = scores.masked_fill(~mask.view(tokens, heads, m, n)[of_token, kept], -torch.inf)
    # Heads ascend, so a lower position is a lower latent index.
    position = top(scores.reshape(tokens, -1), k)
    slot, latent = divide(position, m * n)
    base_row, extension_row = divide(latent, n)
    factors = factors.reshape(tokens, -1)
    base = factors.gather(1, slot * rows + base_row)
    extension = factors.gather(1, slot * rows + m + extension_row)
    return kept.gather(1, slot) * (m * n) + latent, base, extension


def _largest_of_kron(
    chunk: Iterable[Block], m: int, k: int, composition: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`select_kron` among all latents: k heads, k base rows of those, k latents of those.

    A head's row i, its n latents with base i, is a group as a head is.
    """
    kept, pre = _largest_columns(
        chunk, k, lambda block: _head_scores(block, None, m, composition, None)
    )
    heads = pre.shape[2]
    base, extension = pre.to(accumulate_dtype(pre.dtype)).tensor_split([m], dim=1)
    row_scores = _row_scores(base, extension, composition)
    # Heads and rows ascend, so a lower number is a lower latent index.
    rows = top(row_scores, min(k, heads * m), ascending=True)
    slot, base_row = divide(rows, m)
    base = base.flatten(1).gather(1, base_row * heads + slot)
    extension = _gather_columns(extension, slot)  # [b, n, rows]
    if composition != "mul":
        base, extension = base.relu_(), extension.relu_()
    number = top(base[:, None, :] * extension, k)
    row, column = divide(number, extension.shape[1])
    indices = (kept.gather(1, slot) * m + base_row).gather(1, row) * extension.shape[1] + column
    extension = extension.flatten(1).gather(1, column * rows.shape[1] + row)
    return indices, base.gather(1, row), extension


def _largest_of_dense(chunk: Iterable[Block], k: int, composition: str) -> tuple[Tensor, Tensor]:
    """`select_dense` among all latents."""
    if isinstance(chunk, list):  # a single block
        return select_dense(chunk[0][1].squeeze(1), None, k, signed=composition == "linear")

    def scores(block: Tensor) -> Tensor:
        return block[:, 0] if composition == "linear" else block[:, 0].relu_()

    kept, values = _largest_columns(chunk, k, scores)
    values = values[:, 0].to(accumulate_dtype(values.dtype))
    order = top(values, k)
    return kept.gather(1, order), values.gather(1, order)


def _largest_columns(
    chunk: Iterable[Block], k: int, scores_of: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The k columns with the largest scores, ascending: their numbers [b, k], and [b, r, k].

    More of them where all are few.
    scores_of: [b, c] of a block [b, r, c]. Of equal scores the first counts, so that a column of a
    later block must exceed the k-th largest score before it, which soon few do.
    """
    held: list[Tensor] = []  # scores [b, k], columns [b, k], and these themselves [b, r, k]
    for start, block in chunk:
        count = block.shape[2]
        if not held and count <= FEW_PER_K * k:  # all there are: leaving some out saves nothing
            return torch.arange(count, device=block.device).expand(len(block), count), block
        scores = scores_of(block)
        if not held:
            columns = top(scores, k, ascending=True)
            held = [scores.gather(1, columns), columns, _gather_columns(block, columns)]
            continue
        columns, used = _exceeding(scores, held[0].amin(1, keepdim=True), k)
        if columns.shape[1]:
            scores = scores.gather(1, columns).masked_fill_(~used, -torch.inf)
            found = scores, columns + start, _gather_columns(block, columns)
            scores, numbers, block = (torch.cat(pair, -1) for pair in zip(held, found, strict=True))
            places = top(scores, k, ascending=True)
            held = [scores.gather(1, places), numbers.gather(1, places)]
            held.append(_gather_columns(block, places))
    return held[1], held[2]


def _exceeding(scores: Tensor, bar: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Columns [b, w] of scores [b, c] above a bar [b, 1] (or NaN), ascending; which are used.

    The k largest of them, if a token has more.
    """
    token, columns = (~(scores <= bar)).nonzero().unbind(1)
    counts = token.bincount(minlength=len(scores))
    width = int(counts.max())
    if width > k:
        columns = top(scores, k, ascending=True)
        return columns, torch.ones_like(columns, dtype=torch.bool)
    used = torch.arange(width, device=scores.device) < counts[:, None]
    return torch.zeros_like(used, dtype=torch.int64).masked_scatter_(used, columns), used


def _gather_columns(block: Tensor, columns: Tensor) -> Tensor:
    """Columns [b, k] of each token of a block [b, r, c]: [b, r, k]."""
    return block.gather(2, columns[:, None, :].expand(-1, block.shape[1], -1))


def _few(mask: Tensor | None, k: int, most: int) -> Tensor | None:
    """The latents of a mask [F] (ascending), if they are k or more, and no more than `most`."""
    if mask is None or mask.ndim > 1:
        return None
    places = mask.nonzero().squeeze(1)
    return places if k <= len(places) <= most else None


def _select_among(
    pre: Tensor,
    latents: Tensor,
    m: int,
    n: int,
    k: int,
    composition: str,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`select_kron` among some latents [c], all of which are scored: as dead ones often are few."""
    heads, dtype = pre.shape[2], accumulate_dtype(pre.dtype)
    head, latent = divide(latents, m * n)
    base_row, extension_row = divide(latent, n)
    rows = base_row * heads + head, (m + extension_row) * heads + head
    base, extension = (pre.flatten(1).index_select(1, row).to(dtype) for row in rows)
    if composition != "mul":
        base, extension = base.relu_(), extension.relu_()
    product = base * extension
    position = top(product if scale is None else product * scale[latents], k)
    return latents[position], base.gather(1, position), extension.gather(1, position)


def _head_scores(
    pre: Tensor, mask: Tensor | None, m: int, composition: str, scale: Tensor | None
) -> Tensor:
    """Largest product of each head, [b, h]: bit for bit that of its largest latent.

    Rounding is monotone, so the product of the maxima is the maximum of the rounded products.
    With a mask (latents outside it count -inf) or a scale all products are formed, pair by pair.
    """
    dtype = accumulate_dtype(pre.dtype)
    if mask is not None or scale is not None:
        pre = pre.to(dtype) if composition == "mul" else pre.to(dtype).clamp(min=0)
        tokens, _, heads = pre.shape
        score = pre.new_full((tokens, heads), -torch.inf)
        by_pair = [
            None if of_latents is None else of_latents.unflatten(-1, (heads, m, -1)).movedim(-3, -1)
            for of_latents in (mask, scale)
        ]
        allowed, weights = by_pair
        for i, u in enumerate(pre[:, :m].unbind(1)):
            for j, v in enumerate(pre[:, m:].unbind(1)):
                product = u * v if weights is None else u * v * weights[i, j]
                if allowed is not None:
                    product = product.where(allowed[..., i, j, :], -torch.inf)
                score = torch.maximum(score, product)
        return score
    base, extension = pre[:, :m], pre[:, m:]
    highest = base.amax(1).to(dtype), extension.amax(1).to(dtype)
    if composition != "mul":
        return highest[0].clamp(min=0).mul_(highest[1].clamp(min=0))
    # u v on a rectangle is largest at a corner: which one, the signs say.
    lowest = base.amin(1).to(dtype), extension.amin(1).to(dtype)
    return torch.maximum(
        torch.maximum(highest[0] * highest[1], lowest[0] * lowest[1]),
        torch.maximum(highest[0] * lowest[1], lowest[0] * highest[1]),
    )


def _row_scores(base: Tensor, extension: Tensor, composition: str) -> Tensor:
    """Largest product [b, m, c] of each base with an extension [b, n, c], as in `_head_scores`.

    Both before the ReLU.
    """
    highest = extension.amax(1, keepdim=True)
    if composition != "mul":
        return base.relu().mul_(highest.relu_())
    return torch.maximum(base * highest, base * extension.amin(1, keepdim=True))


def select_dense(
    pre: Tensor,
    mask: Tensor | None,
    k: int,
    few: bool = True,
    scale: Tensor | None = None,
    signed: bool = False,
) -> tuple[Tensor, Tensor]:
    """`dense_encode` of one chunk from its pre-activations [b, F] (before the ReLU).

    mask, few: as in `select_kron`.  signed: without the ReLU.
    """
    places = None if mask is None or not few else _few(mask, k, mask.shape[-1] // 2)
    if places is not None:
        pre = pre.index_select(1, places)
        mask, scale = None, None if scale is None else scale[places]
    values = pre if signed else pre.relu_()
    scores = values if scale is None else values.to(scale.dtype) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    indices = top(scores, k)
    values = values.gather(1, indices).to(accumulate_dtype(pre.dtype))
    return indices if places is None else places[indices], values


# Chunks of tokens


def i_major(w_enc: Tensor) -> Tensor:
    """[h, m + n, d] as [(m + n) h, d], row i of all heads together: a view if stored so.

    Then the pre-latents of row i are one contiguous slab, and maxima over rows are cheap. A dense
    encoder's [F, d] is left as it is.
    """
    return w_enc if w_enc.ndim == 2 else w_enc.transpose(0, 1).reshape(-1, w_enc.shape[2])


def i_major_bias(b_enc: Tensor | None) -> Tensor | None:
    """[h, m + n] as [(m + n) h], or [F] as it is."""
    return None if b_enc is None else b_enc.t().reshape(-1)


def projections(x: Tensor, w_enc: Tensor, b_enc: Tensor | None, scratch: int) -> Iterator[Tensor]:
    """x w_enc^T + b_enc (i-major), a chunk of tokens at a time in one buffer.

    scratch: other columns that a chunk needs.
    """
    weight, bias = i_major(w_enc), i_major_bias(b_enc)
    columns = weight.shape[0]
    bytes_per_token = max(columns, scratch) * x.element_size()
    chunks = spans(x.shape[0], bytes_per_token, x.device)
    buffer = x.new_empty(max((s.stop - s.start for s in chunks), default=0), columns)
    for span in chunks:
        pre = buffer[: span.stop - span.start]
        if bias is None:
            torch.mm(x[span], weight.t(), out=pre)
        else:
            torch.addmm(bias, x[span], weight.t(), out=pre)
        yield pre


def blocks(x: Tensor, w_enc: Tensor, b_enc: Tensor | None, k: int) -> Iterator[Iterable[Block]]:
    """x w_enc^T + b_enc for each chunk of tokens, a block of heads at a time in one buffer.

    A block has all heads but where those of a chunk are much larger than the cache; then more than
    FEW_PER_K k, as many as fit into it.
    """
    weight = w_enc[None] if w_enc.ndim == 2 else w_enc.transpose(0, 1)
    rows, heads, _ = weight.shape
    chunks = spans(x.shape[0], rows * heads * x.element_size(), x.device)
    tokens = max((span.stop - span.start for span in chunks), default=1)
    budget = CHUNK_BYTES.get(x.device.type, DEFAULT_CHUNK_BYTES)
    width = max(2 * FEW_PER_K * k, budget // (tokens * rows * x.element_size()))
    if heads <= (WHOLE if rows > 1 else 2 * WHOLE) * width:
        for pre in projections(x, w_enc, b_enc, scratch=0):
            yield [(0, pre.view(-1, rows, heads))]
        return
    width = _multiple(math.ceil(heads / math.ceil(heads / width)), 64)
    bias = None if b_enc is None else b_enc.reshape(heads, rows).t()
    buffer = x.new_empty(rows * tokens * width)
    for span in chunks:
        yield _blocks_of_chunk(x[span], weight, bias, buffer, width)


def _blocks_of_chunk(
    x: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor, width: int
) -> Iterator[Block]:
    """The blocks of `width` heads of a chunk x [b, d]. weight: [r, h, d]; bias: [r, h]."""
    for start in range(0, weight.shape[1], width):
        part = weight[:, start : start + width]
        rows, heads, _ = part.shape
        block = buffer[: rows * len(x) * heads].view(rows, len(x), heads)
        own = None if bias is None else bias[:, None, start : start + width]
        if x.dtype == accumulate_dtype(x.dtype):  # all rows at once: fewer waits for threads
            xs, by_row = x.expand(rows, *x.shape), part.transpose(1, 2)
            if own is None:
                torch.bmm(xs, by_row, out=block)
            else:
                torch.baddbmm(own, xs, by_row, out=block)
        else:  # whose batched product is slower, and rounds in another order
            for row in range(rows):
                if own is None:
                    torch.mm(x, part[row].t(), out=block[row])
                else:
                    torch.addmm(own[row, 0], x, part[row].t(), out=block[row])
        yield start, block.transpose(0, 1)


def _multiple(number: int, of: int) -> int:
    """The next multiple."""
    return -(-number // of) * of


def chunk_tokens(bytes_per_token: int, device: torch.device, least: int | None = None) -> int:
    """Tokens of a chunk whose largest tensor takes `bytes_per_token` a token.

    least: how many it has at least; by default MIN_CHUNK_TOKENS.
    """
    budget = CHUNK_BYTES.get(device.type, DEFAULT_CHUNK_BYTES)
    least = MIN_CHUNK_TOKENS if least is None else least
    tokens = max(least, budget // max(1, bytes_per_token))
    if device.type != "cpu" and tokens > TILE_TOKENS:
        tokens -= tokens % TILE_TOKENS
    return tokens


def spans(
    tokens: int, bytes_per_token: int, device: torch.device, least: int | None = None
) -> list[slice]:
    """Chunks of tokens."""
    step = chunk_tokens(bytes_per_token, device, least)
    return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]


def concatenate(
    parts: Sequence[Tensors], x: Tensor, k: int | None, dtypes: tuple[torch.dtype, ...]
) -> Tensors:
    """The results of all chunks as one; k None: their tensors are 1-D."""
    if not parts:
        shape = (0,) if k is None else (0, k)
        joined = [x.new_empty(shape, dtype=dtype) for dtype in dtypes]
    elif len(parts) == 1:
        joined = [part.contiguous() for part in parts[0]]
    else:
        joined = [torch.cat(column) for column in zip(*parts, strict=True)]
    return cast(Tensors, tuple(joined))
