"""The k first latents of a token from its pre-latents: kernels of `triton_impl.select`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kronsae_kernels import torch_impl
from kronsae_kernels.triton_impl import select as kernels
from kronsae_kernels.triton_impl.configs import Config
from kronsae_kernels.triton_impl.launch import cdiv, configure, launch, next_power_of_2

MAX_CANDIDATES = 16384
"""Keys that one program holds in registers at most; where a cut has more, torch selects."""
MAX_SORTED = 256
"""Latents that one program sorts at most; longer lists are sorted by torch."""
MAX_HELD = 4096
"""Candidates whose keys one program makes and cuts; of more, keys are written and read."""
MAX_LIMITED_ROWS = 6
"""m + n up to which `select_heads` needs no more registers than configs.json allows."""
MAX_SPARE = 128
"""k up to which a list of heads has an eighth to spare, so that a cut ends early."""


class Selection(NamedTuple):
    """Sizes of the cuts that find the k first latents of h heads of m x n."""

    heads: int
    m: int
    n: int
    k: int
    signed: bool

    @property
    def size(self) -> int:
        return self.heads * self.m * self.n

    @property
    def kept_heads(self) -> int:
        """Places in the list of heads."""
        return _places(self.k, self.heads)

    @property
    def kept_rows(self) -> int:
        """Places in the list of (head, base) rows: a power of two."""
        return next_power_of_2(min(self.k, self.heads * self.m))

    @property
    def direct(self) -> int:
        """Latents of all listed heads, if a program chooses among these at once."""
        return self.kept_heads * next_power_of_2(self.m) * next_power_of_2(self.n)

    @property
    def fits(self) -> bool:
        """Whether every cut fits into a program."""
        m, n = next_power_of_2(self.m), next_power_of_2(self.n)
        candidates = max(self.kept_heads * m, self.kept_rows * n)
        return candidates <= MAX_CANDIDATES and self.size < 2**31


def _places(k: int, heads: int) -> int:
    """Places in a list of the k first heads: a power of two."""
    return next_power_of_2(min(k + k // 8 if k <= MAX_SPARE else k, heads))


def select_kron(
    pre: Tensor, mask: Tensor | None, selection: Selection
) -> tuple[Tensor, Tensor, Tensor]:
    """indices, base, extension [b, k] from pre-latents [b, (m + n) h] (before the ReLU).

    mask: uint8 [F] or None. Where it allows fewer than k latents, the last places have index -1 and
    factors 0.
    """
    heads, m, n, k, signed = selection
    if not (selection.fits and _splits_fit(heads, k, pre.device)):
        composition = "mul" if signed else "mand"
        allowed = None if mask is None else mask.view(torch.bool)
        selected = torch_impl.select_kron(
            pre.view(-1, m + n, heads), allowed, m, n, k, composition, few=False
        )
        indices, base, extension = _without_masked(allowed, *selected)
        return indices, base, extension
    shape = {"M": m, "N": n, "SIGNED": signed}
    kept_heads, kept_rows = selection.kept_heads, selection.kept_rows
    lists, listed, of_heads = None, kept_heads, True
    if k < heads:
        of_head = None if mask is None else mask.view(heads, m * n).t().contiguous()
        lists = _select_heads(pre, of_head, heads, k, heads, **shape, DENSE=False)
    if selection.direct > configure("select_latents", pre.device).blocks["DIRECT"]:
        lists = _select_rows(pre, mask, lists, selection) if k < heads * m else None
        listed, of_heads = kept_rows, False
    return _select_latents(
        pre, mask, lists, listed, selection.size, k, heads, OF_HEADS=of_heads, DENSE=False, **shape
    )


def select_dense(pre: Tensor, mask: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """indices, values [b, k] from pre-activations [b, F] (before the ReLU).

    mask: uint8 [F] or None. A "head" is a group of consecutive columns. As `select_kron`.
    """
    size = pre.shape[1]
    group = 8 if size >= 16 * k else 4
    groups = cdiv(size, group)
    kept = _places(k, groups)
    if kept * group > MAX_CANDIDATES or size >= 2**31 or not _splits_fit(groups, k, pre.device):
        allowed = None if mask is None else mask.view(torch.bool)
        selected = torch_impl.select_dense(pre, allowed, k, few=False)
        indices, values = _without_masked(allowed, *selected)
        return indices, values
    shape: dict[str, Any] = {"M": 1, "N": group, "SIGNED": False, "DENSE": True}
    list_of_groups = None
    if k < groups:
        list_of_groups = _select_heads(pre, mask, groups, k, size, **{**shape, "M": group})
    indices, values, _ = _select_latents(
        pre, mask, list_of_groups, kept, size, k, groups, OF_HEADS=False, **shape
    )
    return indices, values


def _without_masked(mask: Tensor | None, indices: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
    """Index -1 and factors 0 for latents that are not in a mask [F]."""
    if mask is None:
        return indices, *factors
    gone = ~mask[indices]
    return indices.masked_fill(gone, -1), *(factor.masked_fill(gone, 0) for factor in factors)


def _splits_of(heads: int, device: torch.device) -> tuple[int, int, int]:
    """(splits, chunks, lanes) of `select_heads`: heads a program = chunks * lanes."""
    blocks = configure("select_heads", device).blocks
    lanes = min(blocks["LANES"], next_power_of_2(heads))
    chunks = min(blocks["PER_PROGRAM"] // lanes, next_power_of_2(cdiv(heads, lanes)))
    return cdiv(heads, chunks * lanes), chunks, lanes


def _splits_fit(heads: int, k: int, device: torch.device) -> bool:
    """Whether what the splits leave over can be merged by one program, if anything is cut."""
    splits = _splits_of(heads, device)[0]
    return k >= heads or splits == 1 or splits * _places(k, heads) <= MAX_CANDIDATES


def _select_heads(
    pre: Tensor,
    mask: Tensor | None,
    heads: int,
    k: int,
    size: int,
    **shape: Any,
) -> Tensor:
    """The list of heads [b, `_places`] that hold the k first latents."""
    (tokens, stride), cap = pre.shape, _places(k, heads)
    splits, chunks, lanes = _splits_of(heads, pre.device)
    lists = pre.new_empty(tokens, splits * cap, dtype=torch.int32)
    keys = torch.empty_like(lists) if splits > 1 else None
    config = configure("select_heads", pre.device)
    warps = min(config.num_warps, max(1, chunks * lanes // 256))
    group = min(config.blocks["GROUP"], max(1, lanes // (4 * cap)))
    blocks = {"GROUP": group, "MAX_REGISTERS": config.blocks["MAX_REGISTERS"]}
    if mask is not None or shape["DENSE"] or shape["M"] + shape["N"] > MAX_LIMITED_ROWS:
        blocks["MAX_REGISTERS"] = 0
    launch(
        kernels.select_heads,
        (tokens, splits),
        Config(warps, config.num_stages, blocks),
        pre=pre,
        mask=mask,
        heads=lists,
        keys=keys,
        stride=stride,
        size=size,
        h=heads,
        k=k,
        cap=cap,
        WHOLE=heads == splits * chunks * lanes,
        CAP=cap,
        CHUNKS=chunks,
        LANES=lanes,
        **shape,
    )
    return lists if keys is None else _merged(lists, keys, k, cap)


def _merged(lists: Tensor, keys: Tensor, k: int, cap: int) -> Tensor:
    """The list [b, cap] of the k first ids in lists [b, c] with keys."""
    kept = lists.new_empty(lists.shape[0], cap)
    _merge(lists, keys, k, cap, kept=kept)
    return kept


def _merge(
    lists: Tensor,
    keys: Tensor,
    k: int,
    cap: int,
    *,
    kept: Tensor | None = None,
    ranked: Tensor | None = None,
) -> None:
    """Write what `_merged` gives to `kept`, or the ranks of the k first to `ranked`."""
    tokens, length = lists.shape
    candidates = next_power_of_2(length)
    launch(
        kernels.merge_lists,
        (tokens,),
        per_element("merge_lists", candidates, lists.device),
        lists=lists,
        keys=keys,
        kept=kept,
        ranked=ranked,
        length=length,
        k=k,
        cap=cap,
        CAP=cap,
        CANDIDATES=candidates,
        PART=min(candidates, configure("merge_lists", lists.device).blocks["PART"]),
    )


def _list_keys(
    pre: Tensor, listed: int, of_rows: bool, size: int, **shared: Any
) -> tuple[Tensor, Tensor]:
    """ids and keys [b, c] of what is in lists [b, listed] of heads (of_rows) or rows."""
    tokens = pre.shape[0]
    m_padded, n_padded = next_power_of_2(shared["M"]), next_power_of_2(shared["N"])
    per = m_padded if of_rows else n_padded
    config = configure("list_keys", pre.device)
    entries = min(listed, max(1, config.blocks["TILE"] // per))
    ids = pre.new_empty(tokens, listed * per, dtype=torch.int32)
    keys = torch.empty_like(ids)
    launch(
        kernels.list_keys,
        (tokens, listed // entries),
        Config(config.num_warps, config.num_stages, {"ENTRIES": entries}),
        pre=pre,
        ids=ids,
        keys=keys,
        stride=pre.shape[1],
        size=size,
        M_PADDED=m_padded,
        N_PADDED=n_padded,
        OF_ROWS=of_rows,
        LISTED=listed,
        PER=per,
        **shared,
    )
    return ids, keys


def _select_rows(
    pre: Tensor, mask: Tensor | None, list_of_heads: Tensor | None, selection: Selection
) -> Tensor:
    """The list of rows [b, kept_rows] that hold the k first latents (None: of all heads)."""
    heads, m, n, k, signed = selection
    kept_heads, kept_rows = selection.kept_heads, selection.kept_rows
    m_padded = next_power_of_2(m)
    shared: dict[str, Any] = {"mask": mask, "M": m, "N": n, "SIGNED": signed, "h": heads}
    if kept_heads * m_padded > MAX_HELD:
        ids, keys = _list_keys(
            pre, kept_heads, True, selection.size, lists=list_of_heads, DENSE=False, **shared
        )
        return _merged(ids, keys, k, kept_rows)
    rows = pre.new_empty(pre.shape[0], kept_rows, dtype=torch.int32)
    launch(
        kernels.select_rows,
        (pre.shape[0],),
        per_element("select_rows", kept_heads * m_padded, pre.device),
        pre=pre,
        heads=list_of_heads,
        rows=rows,
        stride=pre.shape[1],
        k=k,
        cap=kept_rows,
        M_PADDED=m_padded,
        N_PADDED=next_power_of_2(n),
        HEADS=kept_heads,
        CAP=kept_rows,
        **shared,
    )
    return rows


def _select_latents(
    pre: Tensor,
    mask: Tensor | None,
    lists: Tensor | None,
    listed: int,
    size: int,
    k: int,
    heads: int,
    **shape: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """indices, base, extension [b, k], first latent first, from lists [b, listed] (None: all)."""
    (tokens, stride), of_heads = pre.shape, shape.pop("OF_HEADS")
    m_padded = next_power_of_2(shape["M"]) if of_heads else 1
    n_padded, k_padded = next_power_of_2(shape["N"]), next_power_of_2(k)
    ranked = pre.new_empty(tokens, k, dtype=torch.int64)
    indices, base = torch.empty_like(ranked), pre.new_empty(tokens, k, dtype=torch.float32)
    extension = base if shape["DENSE"] else torch.empty_like(base)
    shared: dict[str, Any] = {"pre": pre, "h": heads, **shape}
    ranks = {"stride": stride, "k": k, "K_PADDED": k_padded, "indices": indices, "base": base}
    ranks["extension"] = extension
    candidates = listed * m_padded * n_padded
    held = candidates <= MAX_HELD or of_heads
    rank = held and k <= MAX_SORTED
    if held:
        launch(
            kernels.select_latents,
            (tokens,),
            per_element("select_latents", candidates, pre.device),
            ranked=ranked,
            size=size,
            M_PADDED=m_padded,
            N_PADDED=n_padded,
            OF_HEADS=of_heads,
            LISTED=listed,
            RANK=rank,
            mask=mask,
            lists=lists,
            **shared,
            **ranks,
        )
    else:
        ids, keys = _list_keys(
            listed=listed, of_rows=False, size=size, mask=mask, lists=lists, **shared
        )
        _merge(ids, keys, k, k, ranked=ranked)
    if not rank:
        config = per_element("rank_latents", k_padded, pre.device)
        ranked = ranked.sort(dim=1, descending=True).values
        launch(kernels.rank_latents, (tokens,), config, ranked=ranked, **shared, **ranks)
    return indices, base, extension


def per_element(kernel: str, elements: int, device: torch.device) -> Config:
    """Warps for a program that holds so many elements, up to what configs allow."""
    config = configure(kernel, device)
    warps = 1 if elements <= config.blocks["ONE_WARP"] else elements // config.blocks["PER_WARP"]
    return Config(min(config.num_warps, max(1, warps)), config.num_stages, {})
