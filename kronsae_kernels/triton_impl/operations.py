"""The operations of a backend (see `backends`), launched as Triton kernels.

Arguments are 2-D, checked by the public functions. Letters as in `common`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kronsae_kernels import reference, torch_impl
from kronsae_kernels.common import SparseCodes
from kronsae_kernels.triton_impl import backward, batch, counters, gemm, nested, select
from kronsae_kernels.triton_impl import decode as decode_kernels
from kronsae_kernels.triton_impl import threshold as threshold_kernels
from kronsae_kernels.triton_impl.configs import Config, config_of
from kronsae_kernels.triton_impl.launch import generation, launch, next_power_of_2

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


def configure(kernel: str, device: torch.device, **blocks: int) -> Config:
    """A kernel's configuration for a device; `blocks` override its block sizes."""
    return config_of(kernel, generation(device), **blocks)


# Encode


def encode(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None,
    mask: Tensor | None,
    m: int,
    k: int,
    composition: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `torch_impl.encode`."""
    heads, rows, d = w_enc.shape
    weight = torch_impl.i_major(w_enc)
    bias = None if b_enc is None else b_enc.t().reshape(-1)
    selection = Selection(heads, m, rows - m, k, composition == "mul")
    if mask is not None:
        mask = mask.contiguous().view(torch.uint8)
    lists = None if mask is not None else _lists_of(x, selection)
    if lists is not None:
        parts = _encode_in_one_pass(x.contiguous(), weight, bias, selection, lists)
    else:
        parts = [
            select_kron(pre, mask, selection)
            for pre in torch_impl.projections(x, weight, bias, scratch=0)
        ]
    return torch_impl.concatenate(parts, x, k, (torch.int64, *2 * [torch.float32]))


def dense_encode(
    x: Tensor, w_enc: Tensor, b_enc: Tensor | None, mask: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    """As `torch_impl.dense_encode`."""
    if mask is not None:
        mask = mask.contiguous().view(torch.uint8)
    parts = [
        select_dense(pre, mask, k) for pre in torch_impl.projections(x, w_enc, b_enc, scratch=0)
    ]
    return torch_impl.concatenate(parts, x, k, (torch.int64, torch.float32))


def encode_backward(
    d_base: Tensor,
    d_extension: Tensor,
    indices: Tensor,
    x: Tensor,
    w_enc: Tensor,
    m: int,
    need_x: bool,
    need_w: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `torch_impl.encode_backward`."""
    heads, rows, d = w_enc.shape
    d_x, d_w, d_b = x.new_empty(0), x.new_empty(0), x.new_empty(0)
    if need_x:
        coefficients, columns = torch_impl.live_pre_latents(
            d_base, d_extension, indices, heads, m, rows - m
        )
        d_x = combine(coefficients, columns, torch_impl.i_major(w_enc), None, x.dtype)
    if need_w:
        entries = Entries.of(indices, heads * m * (rows - m), (d_base, d_extension))
        d_w = x.new_empty(rows, heads, d)
        d_b = x.new_empty(rows, heads)
        of_base, of_extension = entries.coefficients
        head_gradients(entries, of_base, of_extension, x, m, d_w, d_b)
        d_w, d_b = d_w.transpose(0, 1), d_b.t().contiguous()
    return d_x, d_w, d_b


def dense_encode_backward(
    d_values: Tensor, indices: Tensor, x: Tensor, w_enc: Tensor, need_x: bool, need_w: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `torch_impl.dense_encode_backward`."""
    d_x, d_w, d_b = x.new_empty(0), x.new_empty(0), x.new_empty(0)
    if need_x:
        d_x = combine(d_values, indices, w_enc, None, x.dtype)
    if need_w:
        entries = Entries.of(indices, w_enc.shape[0], (d_values,))
        d_w, d_b = x.new_empty(w_enc.shape), x.new_empty(w_enc.shape[0])
        row_gradients(entries, entries.coefficients[0], x, d_w, d_b)
    return d_x, d_w, d_b


# Decode


def decode(values: Tensor, indices: Tensor, w_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    """As `torch_impl.decode`."""
    return combine(values, indices, w_dec, b_dec, w_dec.dtype)


def decode_backward(
    d_out: Tensor, values: Tensor, indices: Tensor, w_dec: Tensor, need_values: bool, need_w: bool
) -> tuple[Tensor, Tensor]:
    """As `torch_impl.decode_backward`."""
    d_values, d_w = values.new_empty(0), w_dec.new_empty(0)
    if need_values:
        d_values = pair_dots(d_out, indices, w_dec, values.dtype)
    if need_w:
        entries = Entries.of(indices, w_dec.shape[0], (values,))
        d_w = w_dec.new_empty(w_dec.shape)
        row_gradients(entries, entries.coefficients[0], d_out, d_w, None)
    return d_values, d_w


# Selection


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
        found = torch_impl.select_kron(
            pre.view(-1, m + n, heads), allowed, m, n, k, composition, few=False
        )
        indices, base, extension = _without_masked(allowed, *found)
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
    groups = -(-size // group)
    kept = _places(k, groups)
    if kept * group > MAX_CANDIDATES or size >= 2**31 or not _splits_fit(groups, k, pre.device):
        allowed = None if mask is None else mask.view(torch.bool)
        found = torch_impl.select_dense(pre, allowed, k, few=False)
        indices, values = _without_masked(allowed, *found)
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
    chunks = min(blocks["PER_PROGRAM"] // lanes, next_power_of_2(-(-heads // lanes)))
    return -(-heads // (chunks * lanes)), chunks, lanes


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
        select.select_heads,
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
        HAS_MASK=mask is not None,
        STORE_KEYS=splits > 1,
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
    candidates, config = next_power_of_2(length), configure("merge_lists", lists.device)
    launch(
        select.merge_lists,
        (tokens,),
        _per_element("merge_lists", candidates, lists.device),
        lists=lists,
        keys=keys,
        kept=kept,
        ranked=ranked,
        length=length,
        k=k,
        cap=cap,
        RANKED=ranked is not None,
        CAP=cap,
        CANDIDATES=candidates,
        PART=min(candidates, config.blocks["PART"]),
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
        select.list_keys,
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
    shared: dict[str, Any] = {"M": m, "N": n, "SIGNED": signed, "h": heads}
    shared |= {"mask": mask, "HAS_MASK": mask is not None, "ALL": list_of_heads is None}
    if kept_heads * m_padded > MAX_HELD:
        found = _list_keys(
            pre, kept_heads, True, selection.size, lists=list_of_heads, DENSE=False, **shared
        )
        return _merged(*found, k, kept_rows)
    rows = pre.new_empty(pre.shape[0], kept_rows, dtype=torch.int32)
    launch(
        select.select_rows,
        (pre.shape[0],),
        _per_element("select_rows", kept_heads * m_padded, pre.device),
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
    tokens, stride = pre.shape
    of_heads = shape.pop("OF_HEADS")
    m_padded = next_power_of_2(shape["M"]) if of_heads else 1
    n_padded, k_padded = next_power_of_2(shape["N"]), next_power_of_2(k)
    ranked = pre.new_empty(tokens, k, dtype=torch.int64)
    indices = torch.empty_like(ranked)
    base = pre.new_empty(tokens, k, dtype=torch.float32)
    extension = base if shape["DENSE"] else torch.empty_like(base)
    held = listed * m_padded * n_padded <= MAX_HELD or of_heads
    shared: dict[str, Any] = {"pre": pre, "h": heads, **shape}
    masked: dict[str, Any] = {
        "mask": mask,
        "HAS_MASK": mask is not None,
        "lists": lists,
        "ALL": lists is None,
    }
    ranks = {"stride": stride, "k": k, "K_PADDED": k_padded, "indices": indices}
    ranks |= {"base": base, "extension": extension}
    rank = held and k <= MAX_SORTED
    if held:
        launch(
            select.select_latents,
            (tokens,),
            _per_element("select_latents", listed * m_padded * n_padded, pre.device),
            ranked=ranked,
            size=size,
            M_PADDED=m_padded,
            N_PADDED=n_padded,
            OF_HEADS=of_heads,
            LISTED=listed,
            RANK=rank,
            **shared,
            **masked,
            **ranks,
        )
    else:
        found = _list_keys(listed=listed, of_rows=False, size=size, **shared, **masked)
        _merge(*found, k, k, ranked=ranked)
    if not rank:
        launch(
            select.rank_latents,
            (tokens,),
            _per_element("rank_latents", k_padded, pre.device),
            ranked=ranked.sort(dim=1, descending=True).values,
            **shared,
            **ranks,
        )
    return indices, base, extension


def _per_element(kernel: str, elements: int, device: torch.device) -> Config:
    """Warps for a program that holds so many elements, up to what configs allow."""
    config = configure(kernel, device)
    warps = 1 if elements <= config.blocks["ONE_WARP"] else elements // config.blocks["PER_WARP"]
    return Config(min(config.num_warps, max(1, warps)), config.num_stages, {})


class Lists(NamedTuple):
    """Sizes of the lists of heads that `encode_heads` keeps, and of the tiles that it makes."""

    tokens: int
    """Tokens of a program, as the next two: powers of two."""
    heads: int
    """Heads of a tile."""
    capacity: int
    """Heads that a list has room for."""
    planes: int
    """int32 numbers for each of these."""
    splits: int
    """Ranges that the heads are cut into."""
    tiles: int
    """Tiles of a range (the last one may have fewer)."""

    @property
    def bytes_per_token(self) -> int:
        return self.splits * self.capacity * self.planes * 4


def _lists_of(x: Tensor, selection: Selection) -> Lists | None:
    """For the encoder in one pass; None where the configuration, or the shape, is for two."""
    heads, m, n, k, _ = selection
    wanted = configure("encode", x.device).blocks["ONE_PASS"] and x.element_size() == 2
    if not (wanted and selection.fits and k < heads):
        return None
    blocks = configure("encode_heads", x.device).blocks
    if blocks["TMA"] and x.shape[1] % 8:  # rows of a descriptor begin at multiples of 16 bytes
        return None
    m_padded, n_padded = next_power_of_2(m), next_power_of_2(n)
    # Both products of a tile need 16 columns of their own at least.
    per_tile = max(blocks["COLUMNS"] // (m_padded + n_padded), 1)
    per_tile = max(next_power_of_2(per_tile + 1) // 2, 16 // min(m_padded, n_padded), 1)
    capacity = next_power_of_2(max(blocks["ROOM"] * k, k + 2 * per_tile))
    tiles = -(-heads // per_tile)
    tiles_of_program = -(-tiles // max(blocks["SPLITS"], blocks["PROGRAMS"] // _blocks_of(x)))
    splits = -(-tiles // tiles_of_program)
    if next_power_of_2(splits) * capacity > MAX_CANDIDATES:
        return None
    planes = 2 + -(-m // 2) + -(-n // 2)
    return Lists(blocks["TOKENS"], per_tile, capacity, planes, splits, tiles_of_program)


def _blocks_of(x: Tensor) -> int:
    """Blocks of tokens that `encode_heads` makes at once of x [B, d]."""
    return max(1, -(-x.shape[0] // configure("encode_heads", x.device).blocks["TOKENS"]))


def _encode_in_one_pass(
    x: Tensor, weight: Tensor, bias: Tensor | None, selection: Selection, lists: Lists
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """indices, base, extension [b, k] of each chunk of tokens (of 16-bit numbers)."""
    parts = []
    for span in torch_impl.spans(x.shape[0], lists.bytes_per_token, x.device):
        heads, pre = _select_in_one_pass(x[span], weight, bias, selection, lists)
        of_heads = selection._replace(heads=selection.k)
        indices, base, extension = select_kron(pre, None, of_heads)
        _name_latents(indices, heads, selection.m * selection.n)
        parts.append((indices, base, extension))
    return parts


def _select_in_one_pass(
    x: Tensor, weight: Tensor, bias: Tensor | None, selection: Selection, lists: Lists
) -> tuple[Tensor, Tensor]:
    """The k first heads of each token [b, k] int32, ascending, and their pre-latents."""
    heads, m, n, k, signed = selection
    (tokens, d), blocks = x.shape, _blocks_of(x)
    config = configure("encode_heads", x.device)
    sizes = dict(config.blocks)
    room = lists.capacity - lists.heads - k
    cut = max(1, min(lists.tokens, sizes.pop("CUT_ENTRIES") // lists.capacity))
    for name in ("COLUMNS", "ROOM", "SPLITS", "PROGRAMS"):
        del sizes[name]
    padded = {"M_PADDED": next_power_of_2(m), "N_PADDED": next_power_of_2(n)}
    of_x, of_p, of_q = x, weight, weight
    sizes["TMA"] = int(sizes["TMA"] and _aligned(x) and _aligned(weight))
    if sizes["TMA"]:
        width, cube = sizes["WIDTH"], weight.view(m + n, heads, d)
        of_x = TensorDescriptor.from_tensor(x, [lists.tokens, width])
        of_p, of_q = (
            TensorDescriptor.from_tensor(cube, [rows, lists.heads, width])
            for rows in padded.values()
        )
    of_tiles = bias
    if bias is not None:  # [tiles, m + n, heads of a tile]
        padding = (0, -heads % lists.heads)
        padded_bias = torch.nn.functional.pad(bias.view(m + n, heads), padding)
        of_tiles = padded_bias.unflatten(1, (-1, lists.heads)).transpose(0, 1).contiguous()
    programs = blocks * lists.splits
    shape = (programs, lists.planes, lists.tokens, lists.capacity)
    found = x.new_empty(shape, dtype=torch.int32)
    counts = x.new_empty(programs, 2, lists.tokens, dtype=torch.int32)
    shared = {"lists": found, "counts": counts, "splits": lists.splits, "k": k, "M": m, "N": n}
    shared["CAPACITY"] = lists.capacity
    launch(
        gemm.encode_heads,
        (programs,),
        Config(config.num_warps, config.num_stages, sizes),
        x=of_x,
        p_weight=of_p,
        q_weight=of_q,
        bias=of_tiles,
        tokens=tokens,
        d=d,
        h=heads,
        tiles=lists.tiles,
        cap=k + room // 8,
        SIGNED=signed,
        HAS_BIAS=bias is not None,
        PRECISION="ieee",
        DTYPE=tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16,
        HEADS=lists.heads,
        CUT=cut,
        **padded,
        **shared,
    )
    first = x.new_empty(tokens, k, dtype=torch.int32)
    pre = x.new_empty(tokens, (m + n) * k)
    candidates = next_power_of_2(lists.splits) * lists.capacity
    launch(
        gemm.gather_heads,
        (tokens,),
        _per_element("gather_heads", candidates, x.device),
        heads=first,
        pre=pre,
        TOKENS=lists.tokens,
        CANDIDATES=candidates,
        **shared,
    )
    return first, pre


def _aligned(tensor: Tensor) -> bool:
    """Whether a tensor begins where a descriptor's may."""
    return tensor.is_meta or tensor.data_ptr() % 16 == 0


def _name_latents(indices: Tensor, heads: Tensor, latents: int) -> None:
    """Change latents [b, k] of gathered heads into those of all heads, `latents` a head."""
    config = configure("name_latents", indices.device)
    launch(
        gemm.name_latents,
        (-(-indices.numel() // config.blocks["WIDTH"]),),
        config,
        indices=indices,
        heads=heads,
        size=indices.numel(),
        k=heads.shape[1],
        LATENTS=latents,
    )


def keep_largest(
    indices: Tensor,
    base: Tensor,
    extension: Tensor,
    count: int,
    composition: str,
    eps: float,
    silent: float,
    size: int,
    narrow: Tensor,
) -> None:
    """Keep `count` of the candidates [B, w], the largest: the index of others becomes -1.

    Of equal values the earlier token's are kept, within a token the first. Values of `silent` or
    less are never kept. composition: as of `decode_and_loss`.  size: latents that there are.
    narrow: float32 scalar, set to 1 where a token has kept all of its w < size candidates.
    """
    values = base
    if composition != "dense":
        values = torch.empty_like(base)
        config = configure("code_values", base.device)
        launch(
            batch.code_values,
            (-(-base.numel() // config.blocks["ENTRIES"]),),
            config,
            base=base,
            extension=extension,
            values=values,
            size=base.numel(),
            eps=eps,
            ROOT=composition == "mand",
        )
    ranked, order = values.flatten().sort(descending=True, stable=True)
    config = configure("keep_first", base.device)
    launch(
        batch.keep_first,
        (-(-base.numel() // config.blocks["ENTRIES"]),),
        config,
        ranked=ranked,
        order=order,
        indices=indices,
        narrow=narrow,
        count=count,
        size=base.numel(),
        width=indices.shape[1],
        silent=silent,
        WHOLE=indices.shape[1] == size,
    )


# Gathers


def combine(
    coefficients: Tensor, columns: Tensor, table: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """C table + bias, [B, d] in `dtype` (see `torch_impl.combine`)."""
    (tokens, r), d = columns.shape, table.shape[1]
    out = table.new_empty(tokens, d, dtype=dtype)
    config = configure("combine", table.device)
    launch(
        decode_kernels.combine,
        (tokens, -(-d // config.blocks["WIDTH"])),
        config,
        coefficients=coefficients.contiguous(),
        columns=columns.contiguous(),
        table=table.contiguous(),
        bias=bias if bias is None else bias.contiguous(),
        out=out,
        r=r,
        d=d,
        HAS_BIAS=bias is not None,
    )
    return out


def pair_dots(y: Tensor, columns: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """out[b, s] = y[b] . table[columns[b, s]], [B, r] in `dtype`."""
    (tokens, r), d = columns.shape, table.shape[1]
    out = table.new_empty(tokens, r, dtype=dtype)
    config = configure("pair_dots", table.device)
    launch(
        decode_kernels.pair_dots,
        (tokens, -(-r // config.blocks["ROWS"])),
        config,
        y=y.contiguous(),
        columns=columns.contiguous(),
        table=table.contiguous(),
        out=out,
        r=r,
        d=d,
    )
    return out


class DecodeAndLoss(NamedTuple):
    """What `decode_and_loss` gives: of L = scale * (squared norm of the residual) / 2."""

    residual: Tensor
    """[B, d] reconstruction minus x, in the table's dtype."""
    sums: Tensor
    """[2, B] float32: its squared norm; and what is 0 if that times scale, and the last two, are
    finite, else NaN."""
    values: Tensor
    """[B, k] float32, as all that follow."""
    scaled: Tensor
    """values times scale."""
    along: Tensor
    """values times dL/dvalues."""
    d_base: Tensor
    """dL by the base's pre-latent (a dense encoder's pre-activation)."""
    d_extension: Tensor
    """dL by the extension's pre-latent (a dense encoder's: d_base)."""
    d_values: Tensor | None = None
    """dL/dvalues / scale, also where a factor is 0; None where rows are gathered once."""


def decode_and_loss(
    x: Tensor,
    indices: Tensor,
    base: Tensor,
    extension: Tensor,
    table: Tensor,
    bias: Tensor | None,
    composition: str,
    eps: float,
    scale: float | Tensor,
    one_gather: bool,
    total: Callable[[Tensor], Tensor] | None = None,
) -> DecodeAndLoss:
    """Decoder, squared error against x [B, d], and its gradients by the codes [B, k].

    indices: -1 for a place without a latent, which takes no part: its numbers are 0.
    composition: one of COMPOSITIONS, or "dense" (base holds the values). scale: a number, or a
    float32 scalar on the device. one_gather: rows are gathered once, for which a chunk of k of them
    must fit into a warp's registers.
    total: adds up [B, d] float32 over processes that decode other codes of the same tokens, of
    which one has the bias; rows are then gathered twice.
    """
    (tokens, k), d, device = indices.shape, table.shape[1], table.device
    sums = table.new_empty(2, tokens, dtype=torch.float32)
    if one_gather and total is None:
        residual, into = table.new_empty(tokens, d), _like_codes(base, composition)
        config = configure("decode_and_loss", device)
        most, tile = config.blocks["BLOCKS"], config.blocks["TILE"]
        rows = next_power_of_2(-(-k // most))
        width = min(max(16, tile // rows), next_power_of_2(d))
        together = min(width, 16 // table.element_size())
        blocks = {
            "BLOCKS": -(-k // rows),
            "ROWS": rows,
            "WIDTH": width,
            "TOGETHER": together,
            "STAGES": config.blocks["STAGES"],
        }
        launch(
            decode_kernels.decode_and_loss,
            (tokens,),
            Config(config.num_warps, config.num_stages, blocks),
            x=x,
            table=table,
            bias=bias,
            residual=residual,
            sums=sums,
            tokens=tokens,
            d=d,
            HAS_BIAS=bias is not None,
            **_codes(indices, base, extension, composition, eps, scale),
            **into,
        )
        return DecodeAndLoss(residual, sums, **into)
    values = base
    if composition != "dense":
        values = reference.compose(base * extension, composition, eps)
    x_hat = combine(values, indices, table, bias, torch.float32)
    error = (x_hat if total is None else total(x_hat)).sub_(x)
    d_values = pair_dots(error, indices, table, torch.float32)
    torch.sum(error.square(), 1, out=sums[0])
    of_codes = code_gradients(indices, base, extension, d_values, sums, composition, eps, scale)
    return DecodeAndLoss(error.to(table.dtype), sums, **of_codes, d_values=d_values)


def code_gradients(
    indices: Tensor,
    base: Tensor,
    extension: Tensor,
    d_values: Tensor,
    sums: Tensor,
    composition: str,
    eps: float,
    scale: float | Tensor,
) -> dict[str, Tensor]:
    """The fields of `DecodeAndLoss` that belong to codes [B, k], from d_values, not yet scaled.

    sums [2 or more, B]: row 0 the squared norms; row 1 is written.
    """
    into = _like_codes(base, composition)
    launch(
        decode_kernels.code_gradients,
        (indices.shape[0],),
        configure("code_gradients", base.device),
        d_values=d_values,
        squares=sums[0],
        finite=sums[1],
        **_codes(indices, base, extension, composition, eps, scale),
        **into,
    )
    return into


def _like_codes(base: Tensor, composition: str) -> dict[str, Tensor]:
    """Memory for the fields of `DecodeAndLoss` that belong to codes [B, k]."""
    into = {name: torch.empty_like(base) for name in ("values", "scaled", "along", "d_base")}
    return into | {
        "d_extension": into["d_base"] if composition == "dense" else torch.empty_like(base)
    }


def _codes(
    indices: Tensor,
    base: Tensor,
    extension: Tensor,
    composition: str,
    eps: float,
    scale: float | Tensor,
) -> dict[str, Any]:
    """Codes [B, k], and how they are made, for the kernels."""
    return {
        "columns": indices,
        "base": base,
        "extension": extension,
        "k": indices.shape[1],
        "scale": scale,
        "ON_DEVICE": isinstance(scale, Tensor),
        "eps": eps,
        "ROOT": composition == "mand",
        "SIGNED": composition == "mul",
        "DENSE": composition == "dense",
    }


# Sums over the entries of a row


class Entries(NamedTuple):
    """The (token, latent) pairs of sparse codes [B, k], sorted by latent (stably)."""

    tokens: Tensor
    """[E] int32."""
    latents: Tensor
    """[E] int32, ascending."""
    offsets: Tensor
    """[F + 1] int32: latent f owns entries offsets[f] to offsets[f + 1]."""
    coefficients: tuple[Tensor, ...]
    """[E] float32 each: those that `of` was given."""
    rows: Tensor | None
    """[E] int32: those that `of` was given."""

    @classmethod
    def of(
        cls,
        indices: Tensor,
        size: int,
        coefficients: tuple[Tensor, ...] = (),
        tokens: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> "Entries":
        """From latent indices [B, k] in [0, size) (or [E], with the token of each, int32).

        coefficients: up to 5 numbers of each code, shaped as indices.
        rows: another number of each code, [E] int32.
        Raises RuntimeError for 2^31 entries or latents: kernels count them in int32.
        """
        count = indices.numel()
        if count >= 2**31 or size >= 2**31:
            raise RuntimeError(
                f"expected fewer than 2^31 codes and latents, got {count} and {size}"
            )
        latents, order = indices.flatten().int().sort(stable=True)
        of_entry, offsets = torch.empty_like(latents), latents.new_empty(size + 1)
        sorted_ = latents.new_empty(len(coefficients), count, dtype=torch.float32)
        config = configure("group_entries", indices.device)
        width = config.blocks["WIDTH"]
        given = [coefficient.contiguous() for coefficient in coefficients]
        one, two, three, four, five = given + [None] * (5 - len(given))
        launch(
            backward.group_entries,
            (-(-count // width) + -(-(size + 1) // width),),
            config,
            order=order,
            latents=latents,
            of_code=tokens,
            one=one,
            two=two,
            three=three,
            four=four,
            five=five,
            tokens=of_entry,
            coefficients=sorted_,
            offsets=offsets,
            k=1 if tokens is not None else indices.shape[1],
            size=count,
            rows=size,
            HAS_TOKENS=tokens is not None,
            COUNT=len(given),
        )
        rows = None if rows is None else rows[order]
        return cls(of_entry, latents, offsets, tuple(sorted_), rows)


def sum_entries(entries: Entries, coefficients: Tensor) -> Tensor:
    """The sum of the coefficients of each latent's entries, [F] float32."""
    rows = len(entries.offsets) - 1
    out = coefficients.new_empty(rows)
    launch(
        backward.sum_entries,
        (rows,),
        configure("sum_entries", out.device),
        coefficients=coefficients,
        offsets=entries.offsets,
        out=out,
    )
    return out


def row_gradients(
    entries: Entries, coefficients: Tensor, y: Tensor, out: Tensor, out_bias: Tensor | None
) -> None:
    """out[f] [rows, d] = sum of coefficient * y[token] over f's entries; out_bias [rows]: of 1."""
    rows, d = out.shape
    y = y.contiguous()
    length, partial = sum_row_segments(entries, coefficients, y, d)
    config = configure("row_gradients", out.device)
    launch(
        backward.row_gradients,
        (rows, -(-d // config.blocks["WIDTH"])),
        config,
        coefficients=coefficients,
        tokens=entries.tokens,
        y=y,
        offsets=entries.offsets,
        partial=partial,
        out=out,
        out_bias=out_bias,
        d=d,
        HAS_BIAS=out_bias is not None,
        LENGTH=length,
    )


def sum_row_segments(
    entries: Entries, coefficients: Tensor, y: Tensor, d: int
) -> tuple[int, Tensor]:
    """Length of segments, and the sums [segments, d] float32 over those that lie in one row."""
    length = configure("segments", y.device).blocks["ROW_LENGTH"]
    segments = entries.tokens.numel() // length
    partial = y.new_empty(max(1, segments), d, dtype=torch.float32)
    config = configure("sum_row_segments", y.device)
    launch(
        backward.sum_row_segments,
        (segments, -(-d // config.blocks["WIDTH"])),
        config,
        coefficients=coefficients,
        tokens=entries.tokens,
        latents=entries.latents,
        y=y,
        partial=partial,
        d=d,
        LENGTH=length,
    )
    return length, partial


MAX_EXTENSIONS = 16
"""Extension rows that one program sums at most, in registers."""
Updated = tuple[Tensor, Tensor, Tensor]
"""A float32 weight and AdamW's two moments of it (of matrices also bfloat16), changed in place."""
SEEDS = {"w_enc": 1, "w_dec": 2}
"""Of the noise that rounds bfloat16 moments."""
MODES = {"gradient": 0, "measure": 1, "update": 2}


def update_rows(
    entries: Entries,
    coefficients: Tensor,
    along: Tensor,
    y: Tensor,
    hyper: Tensor,
    mode: str,
    unit_norm: bool,
    weight: Updated,
    copy: Tensor | None,
    bias: Updated | None = None,
) -> Tensor:
    """AdamW step of weight [rows, d] from `row_gradients`; returns squares that add up to the
    gradient's squared norm.

    mode "measure": only that. copy: the weight in another dtype, kept up to date.
    hyper [2, 10]: with weight decay and without, which rows without a bias (decoders) never have.
    """
    rows, d = weight[0].shape
    length, partial = sum_row_segments(entries, coefficients, y, d)
    squares = y.new_empty(rows, dtype=torch.float32)
    config = configure("update_rows", y.device)
    blocks = dict(config.blocks)
    warps = min(config.num_warps, next_power_of_2(-(-d // blocks.pop("PER_WARP"))))
    width = warps * blocks.pop("PER_LOAD")
    of_bias = (None, None, None) if bias is None else bias
    launch(
        backward.update_rows,
        (rows,),
        Config(warps, config.num_stages, blocks),
        coefficients=coefficients,
        along=along,
        tokens=entries.tokens,
        y=y,
        offsets=entries.offsets,
        partial=partial,
        weight=weight[0],
        shadow=copy,
        first=weight[1],
        second=weight[2],
        bias=of_bias[0],
        bias_first=of_bias[1],
        bias_second=of_bias[2],
        squares=squares,
        hyper=hyper[1 if bias is None else 0],
        bias_hyper=hyper[1],
        d=d,
        MODE=MODES[mode],
        UNIT_NORM=unit_norm,
        HAS_SHADOW=copy is not None,
        HAS_BIAS=bias is not None,
        SEED=SEEDS["w_dec" if bias is None else "w_enc"],
        LENGTH=length,
        PIECES=-(-d // width),
        WIDTH=width,
    )
    return squares.flatten()


def head_gradients(
    entries: Entries,
    d_base: Tensor,
    d_extension: Tensor,
    x: Tensor,
    m: int,
    weight: Tensor,
    bias: Tensor,
) -> None:
    """Write the gradients weight [m + n, h, d] and bias [m + n, h].

    d_base, d_extension [E]: in the order of the entries.
    """
    _head_gradients(
        entries,
        d_base,
        d_extension,
        x,
        m,
        "gradient",
        (weight, None, None),
        bias=(bias, None, None),
    )


def update_heads(
    entries: Entries,
    d_base: Tensor,
    d_extension: Tensor,
    x: Tensor,
    m: int,
    hyper: Tensor,
    mode: str,
    weight: Updated,
    copy: Tensor | None,
    bias: Updated,
) -> Tensor:
    """AdamW step of weight [m + n, h, d] and bias [h, m + n] from `head_gradients`.

    Otherwise as `update_rows`.
    """
    return _head_gradients(
        entries, d_base, d_extension, x, m, mode, weight, copy=copy, bias=bias, hyper=hyper
    )


def _head_gradients(
    entries: Entries,
    d_base: Tensor,
    d_extension: Tensor,
    x: Tensor,
    m: int,
    mode: str,
    weight: tuple[Tensor, Tensor | None, Tensor | None],
    *,
    bias: tuple[Tensor, Tensor | None, Tensor | None],
    copy: Tensor | None = None,
    hyper: Tensor | None = None,
) -> Tensor:
    rows, h, d = weight[0].shape
    n, x = rows - m, x.contiguous()
    length = configure("segments", x.device).blocks["HEAD_LENGTH"]
    segments, extensions = entries.tokens.numel() // length, min(n, MAX_EXTENSIONS)
    shared = {
        "d_base": d_base,
        "d_extension": d_extension,
        "latents": entries.latents,
        "tokens": entries.tokens,
        "x": x,
        "partial": x.new_empty(max(1, segments), 1 + n, d, dtype=torch.float32),
        "d": d,
        "N": n,
        "EXTENSIONS": extensions,
        "LENGTH": length,
    }

    def configured(kernel: str) -> tuple[Config, int]:
        """Its configuration, and how many programs share a head, or a segment."""
        config = configure(kernel, x.device)
        blocks = dict(config.blocks)
        if extensions > 8:
            blocks["PIECES"] = 1
        programs = -(-n // extensions) * -(-d // (blocks["PIECES"] * blocks["WIDTH"]))
        return Config(config.num_warps, config.num_stages, blocks), programs

    config, programs = configured("sum_head_segments")
    launch(backward.sum_head_segments, (segments * programs,), config, **shared)
    config, programs = configured("head_gradients")
    squares = x.new_empty(h * programs, dtype=torch.float32)
    launch(
        backward.head_gradients,
        (h * programs,),
        config,
        offsets=entries.offsets,
        weight=weight[0],
        shadow=copy,
        first=weight[1],
        second=weight[2],
        bias=bias[0],
        bias_first=bias[1],
        bias_second=bias[2],
        squares=squares,
        hyper=None if hyper is None else hyper[0],
        bias_hyper=None if hyper is None else hyper[1],
        h=h,
        M=m,
        MODE=MODES[mode],
        HAS_SHADOW=copy is not None,
        SEED=SEEDS["w_enc"],
        bias_of_row=bias[0].stride(0 if mode == "gradient" else 1),
        bias_of_head=bias[0].stride(1 if mode == "gradient" else 0),
        **shared,
    )
    return squares.flatten()


def update_vector(gradient: Tensor, weight: Updated, hyper: Tensor) -> None:
    """AdamW step of a vector from its gradient; hyper: [10]."""
    config = configure("update_vector", gradient.device)
    launch(
        backward.update_vector,
        (-(-gradient.numel() // config.blocks["WIDTH"]),),
        config,
        gradient=gradient,
        weight=weight[0],
        first=weight[1],
        second=weight[2],
        hyper=hyper,
        size=gradient.numel(),
    )


# Numbers and counters of a step


def prepare_update(
    sums: Tensor,
    missed: Tensor,
    size: int,
    lr: Tensor,
    betas: Tensor,
    hyper: Tensor,
    steps: Sequence[Tensor],
) -> None:
    """Fill hyper [2, 10] for the next AdamW step, and count it: `counters.prepare_update`.

    steps: float32 scalars of w_enc, b_enc, w_dec, b_dec, and perhaps of thresholds.
    """
    w_enc, b_enc, w_dec, b_dec, *rest = steps
    launch(
        counters.prepare_update,
        (1,),
        configure("prepare_update", hyper.device),
        sums=sums,
        missed=missed,
        size=size,
        lr=lr,
        betas=betas,
        hyper=hyper,
        steps_w_enc=w_enc,
        steps_b_enc=b_enc,
        steps_w_dec=w_dec,
        steps_b_dec=b_dec,
        steps_more=rest[0] if rest else None,
        MORE=bool(rest),
    )


def note_active(
    codes: SparseCodes, silent: Tensor, hyper: Tensor, tokens: int, threshold: float
) -> None:
    """Mark the latents of codes [B, k] that are active, above the threshold, in silent [F]."""
    config = configure("note_active", silent.device)
    size = codes.values.numel()
    launch(
        counters.note_active,
        (-(-size // config.blocks["ENTRIES"]),),
        config,
        values=codes.values,
        indices=codes.indices,
        silent=silent,
        hyper=hyper,
        tokens=tokens,
        size=size,
        threshold=threshold,
    )


def finish_update(
    square: Tensor,
    skips: Tensor,
    missed: Tensor,
    x: Tensor,
    hyper: Tensor,
    silent: Tensor | None,
    tokens: int,
) -> Tensor:
    """The norm of a step's gradient (scalar), and its counters: `counters.finish_update`."""
    config, norm = configure("finish_update", x.device), torch.empty_like(square)
    latents = 0 if silent is None else silent.numel()
    launch(
        counters.finish_update,
        (max(1, -(-latents // config.blocks["MANY"])),),
        config,
        square=square,
        norm=norm,
        skips=skips,
        missed=missed,
        x=x,
        silent=silent,
        hyper=hyper,
        size=x.numel(),
        latents=latents,
        tokens=tokens,
        HAS_SILENT=silent is not None,
    )
    return norm


def matmul_precision(dtype: torch.dtype, device: torch.device) -> str:
    """`input_precision` of tl.dot for operands of a dtype.

    float32: as torch's setting for its own matrix products. float16 stands for gradients, for whose
    range it is too small: they are multiplied as float32, with three TF32 products where there are
    any. bfloat16 needs none.
    """
    if dtype == torch.float32:
        return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    if dtype == torch.float16 and not generation(device).startswith("gfx"):
        return "tf32x3"
    return "ieee"


# Nested prefixes


def nested_decode(
    values: Tensor, indices: Tensor, w_dec: Tensor, b_dec: Tensor | None, bounds: Sequence[int]
) -> Tensor:
    """As `torch_impl.nested_decode`."""
    return nested_sums(Grouped.of(indices, bounds, values), w_dec, b_dec, w_dec.dtype)


def nested_decode_backward(
    d_out: Tensor,
    values: Tensor,
    indices: Tensor,
    w_dec: Tensor,
    bounds: Sequence[int],
    need_values: bool,
    need_w: bool,
) -> tuple[Tensor, Tensor]:
    """As `torch_impl.nested_decode_backward`."""
    d_values, d_w = values.new_empty(0), w_dec.new_empty(0)
    groups = Grouped.of(indices, bounds, rows=True)
    suffixes = suffix_sums(d_out)
    if need_values:
        d_values = nested_dots(groups, suffixes, w_dec, values.dtype)
    if need_w:
        held = values.masked_fill(indices >= bounds[-1], 0)
        rows = groups.of_slot.flatten()
        entries = Entries.of(indices, w_dec.shape[0], (held,), rows)
        d_w = w_dec.new_empty(w_dec.shape)
        row_gradients(entries, entries.coefficients[0], suffixes.flatten(0, 1), d_w, None)
    return d_values, d_w


class Grouped(NamedTuple):
    """Codes [B, k] in the order of their groups: latents between two of G bounds are one."""

    starts: Tensor
    """[B, G + 1] int32: group g of a token has places starts[g] to starts[g + 1]."""
    columns: Tensor
    """[B, k] int32: the latents; those from the last bound on come last."""
    weights: Tensor
    """[B, k] float32: their values (empty without values)."""
    slots: Tensor
    """[B, k] int32: where they were among the codes as given."""
    of_slot: Tensor
    """[B, k] int32: row among sums [B G, d] of each code as given (empty without `rows`)."""

    @classmethod
    def of(
        cls,
        indices: Tensor,
        bounds: Sequence[int],
        values: Tensor | None = None,
        extension: Tensor | None = None,
        *,
        root: bool = False,
        eps: float = 0.0,
        rows: bool = False,
    ) -> "Grouped":
        """indices: -1 for a place without a latent, which no prefix holds.

        values: of a Kron encoder either these, or the base, with the extension: they are composed
        (root: to the square root of the product + eps). None: for a backward pass.
        rows: whether `of_slot` is wanted. Raises RuntimeError for 2^31 sums or latents.
        """
        (tokens, k), prefixes = indices.shape, len(bounds)
        if tokens * prefixes >= 2**31:
            raise RuntimeError(f"expected fewer than 2^31 sums, got {tokens} * {prefixes}")
        columns = torch.empty_like(indices, dtype=torch.int32)
        shape = indices.shape
        found = cls(
            columns.new_empty(tokens, prefixes + 1),
            columns.new_empty(shape),
            columns.new_empty(shape if values is not None else 0, dtype=torch.float32),
            columns.new_empty(shape),
            columns.new_empty(shape if rows else 0),
        )
        config = configure("group_codes", indices.device)
        places = min(config.blocks["PLACES"], next_power_of_2(k))
        launch(
            nested.group_codes,
            (tokens,),
            config._replace(blocks={"PLACES": places}),
            values=None if values is None else values.contiguous(),
            extension=extension,
            columns=indices.contiguous(),
            bounds=_edges(tuple(bounds), indices.device),
            starts=found.starts,
            slots=found.slots,
            of_slot=found.of_slot,
            by_group=found.columns,
            weights=found.weights,
            k=k,
            prefixes=prefixes,
            eps=eps,
            VALUES=values is not None,
            PAIRS=extension is not None,
            ROOT=root,
            ROWS=rows,
        )
        return found


@functools.lru_cache(maxsize=64)
def _edges(bounds: tuple[int, ...], device: torch.device) -> Tensor:
    """Bounds [G] int32 on a device: kept, as each copy to a GPU would wait for it."""
    return torch.tensor(bounds, dtype=torch.int32, device=device)


def nested_sums(codes: Grouped, table: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`combine` of the codes in the first 1, ..., G groups: [B, G, d] in `dtype`."""
    (tokens, k), d, prefixes = codes.columns.shape, table.shape[1], codes.starts.shape[1] - 1
    out = table.new_empty(tokens, prefixes, d, dtype=dtype)
    config = configure("nested_sums", table.device)
    launch(
        nested.nested_sums,
        (tokens, -(-d // config.blocks["WIDTH"])),
        config,
        weights=codes.weights,
        by_group=codes.columns,
        starts=codes.starts,
        table=table.contiguous(),
        bias=None if bias is None else bias.contiguous(),
        out=out,
        k=k,
        d=d,
        prefixes=prefixes,
        HAS_BIAS=bias is not None,
    )
    return out


def nested_decode_and_loss(
    x: Tensor,
    indices: Tensor,
    base: Tensor,
    extension: Tensor,
    table: Tensor,
    bias: Tensor | None,
    composition: str,
    eps: float,
    scale: float | Tensor,
    bounds: Sequence[int],
) -> tuple[DecodeAndLoss, Tensor]:
    """`decode_and_loss` of L = scale * (sum of the squared norms of all prefixes' residuals) / 2.

    bounds: of G prefixes (at most `step.MAX_PREFIXES`), the last that of all latents.
    Its residual is [B, G, d]: what decoder rows of each group get, the sum of the residuals of all
    prefixes that hold the group. The last is that of the whole reconstruction. Also returns [B, k]
    int32, the row of each code among these [B G, d]. sums is [3, B]: also the squared norm of the
    whole reconstruction's residual.
    """
    (tokens, k), d, prefixes = indices.shape, table.shape[1], len(bounds)
    dense, root = composition == "dense", composition == "mand"
    groups = Grouped.of(
        indices, bounds, base, None if dense else extension, root=root, eps=eps, rows=True
    )
    sums = table.new_empty(3, tokens, dtype=torch.float32)
    suffixes = table.new_empty(tokens, prefixes, d)
    config = configure("nested_errors", table.device)
    most = max(1, config.blocks["TILE"] // next_power_of_2(prefixes))
    blocks = {"ROWS": config.blocks["ROWS"], "WIDTH": min(config.blocks["WIDTH"], most)}
    launch(
        nested.nested_errors,
        (tokens,),
        config._replace(blocks=blocks),
        weights=groups.weights,
        by_group=groups.columns,
        starts=groups.starts,
        table=table,
        bias=bias,
        x=x,
        suffixes=suffixes,
        sums=sums,
        tokens=tokens,
        k=k,
        d=d,
        HAS_BIAS=bias is not None,
        PREFIXES=prefixes,
    )
    d_values = nested_dots(groups, suffixes, table, torch.float32)
    of_codes = code_gradients(indices, base, extension, d_values, sums, composition, eps, scale)
    return DecodeAndLoss(suffixes, sums, **of_codes, d_values=d_values), groups.of_slot


def suffix_sums(y: Tensor) -> Tensor:
    """out[b, g] = sum of y[b, g'] over g' >= g: [B, G, d] float32."""
    tokens, prefixes, d = y.shape
    out = y.new_empty(y.shape, dtype=torch.float32)
    config = configure("suffix_sums", y.device)
    blocks = {**config.blocks, "PREFIXES": min(config.blocks["PREFIXES"], prefixes)}
    launch(
        nested.suffix_sums,
        (tokens, -(-d // blocks["WIDTH"])),
        config._replace(blocks=blocks),
        d_out=y.contiguous(),
        suffixes=out,
        d=d,
        prefixes=prefixes,
    )
    return out


def nested_dots(codes: Grouped, suffixes: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """out[b, s] = suffixes[b, group of s] . table[latent of s], [B, k] in `dtype`.

    suffixes [B, G, d]: of `suffix_sums`, in any dtype.  0 where no prefix holds the latent.
    """
    (tokens, k), d = codes.columns.shape, table.shape[1]
    out = table.new_empty(tokens, k, dtype=dtype)
    config = configure("nested_dots", table.device)
    blocks = {**config.blocks, "ROWS": min(config.blocks["ROWS"], next_power_of_2(k))}
    launch(
        nested.nested_dots,
        (tokens, -(-k // blocks["ROWS"])),
        config._replace(blocks=blocks),
        suffixes=suffixes,
        by_group=codes.columns,
        slots=codes.slots,
        of_slot=codes.of_slot,
        starts=codes.starts,
        table=table.contiguous(),
        d_values=out,
        k=k,
        d=d,
        prefixes=codes.starts.shape[1] - 1,
    )
    return out


# Thresholds


def threshold_encode(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None,
    threshold: Tensor,
    m: int | None,
    composition: str,
    eps: float,
    width: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `torch_impl.threshold_encode`. The width of each chunk of tokens is read by the host.

    width: unless it is given. Of a token with more latents, which its count shows, some are then
    left out; and the host reads nothing.
    """
    if threshold.shape[0] >= 2**31 and width is None:
        return torch_impl.threshold_encode(x, w_enc, b_enc, threshold, m, composition, eps)
    if m is None:
        weight, bias = w_enc, b_enc
    else:
        weight = torch_impl.i_major(w_enc)
        bias = None if b_enc is None else b_enc.t().reshape(-1)
    limits = Limits.of(threshold, m, w_enc.shape, composition, eps)
    parts, begin = [], 0
    for pre in torch_impl.projections(x, weight, bias, scratch=0):
        counts = count_above(pre, limits)
        widest = max(1, int(counts.sum(1).max())) if width is None else width
        parts.append(select_above(pre, limits, counts, widest, begin))
        begin += len(pre)
    if len(parts) == 1:
        return parts[0]
    if width is not None:
        return torch_impl.concatenate(parts, x, width, ())
    width = max((len(part[0][0]) for part in parts), default=1)
    base = x.new_zeros(x.shape[0], width, dtype=torch.float32)
    spread = torch.arange(base.numel(), device=x.device).remainder_(limits.size)
    whole = base, torch.zeros_like(base), spread.view(base.shape)
    begin = 0
    for *part, _ in parts:
        for into, columns in zip(whole, part, strict=True):
            into[begin : begin + len(columns), : columns.shape[1]] = columns
        begin += len(part[0])
    of_parts = [counts for *_, counts in parts]
    return *whole, torch.cat(of_parts) if of_parts else spread.new_empty(0)


class Jumped(NamedTuple):
    """What `jump` gives."""

    active: Tensor
    """[B] float32: latents of each token above their threshold."""
    slopes: Tensor
    """[B, w] float32: threshold / bandwidth for values near their threshold, else 0."""


def jump(
    base: Tensor,
    extension: Tensor,
    indices: Tensor,
    counts: Tensor,
    threshold: Tensor,
    bandwidth: float,
    composition: str,
    narrow: Tensor,
) -> Jumped:
    """JumpReLU of codes [B, w], counts [B] of them a token: `threshold.jump`, which changes them.

    composition: as of `decode_and_loss`, with eps = 0.
    narrow: float32 scalar, set to 1 where a token has more than w.
    """
    (tokens, width), device = indices.shape, indices.device
    found = Jumped(base.new_empty(tokens), torch.empty_like(base))
    config = configure("jump", device)
    launch(
        threshold_kernels.jump,
        (tokens,),
        config._replace(blocks={"WIDTH": min(config.blocks["WIDTH"], next_power_of_2(width))}),
        base=base,
        extension=extension,
        indices=indices,
        counts=counts,
        threshold=threshold,
        slopes=found.slopes,
        active=found.active,
        narrow=narrow,
        width=width,
        bandwidth=bandwidth,
        ROOT=composition == "mand",
        DENSE=composition == "dense",
    )
    return found


def jump_gradients(
    d_values: Tensor,
    indices: Tensor,
    slopes: Tensor,
    threshold: Tensor,
    scale: float | Tensor,
    d_active: Tensor,
) -> Tensor:
    """dL by the logarithms of thresholds, of each code [B, w]: `threshold.jump_gradients`."""
    out, config = torch.empty_like(slopes), configure("jump_gradients", slopes.device)
    launch(
        threshold_kernels.jump_gradients,
        (-(-out.numel() // config.blocks["ENTRIES"]),),
        config,
        d_values=d_values,
        indices=indices,
        slopes=slopes,
        threshold=threshold,
        scale=scale,
        d_active=d_active,
        out=out,
        size=out.numel(),
        ON_DEVICE=isinstance(scale, Tensor),
    )
    return out


class Limits(NamedTuple):
    """What products of latents must exceed for the latents to be active."""

    of_latent: Tensor
    """[m n, h] float32; of a dense encoder [F]."""
    of_head: Tensor
    """[h] float32: the lowest of each head; of a dense encoder as `of_latent`."""
    shape: dict[str, Any]
    """How latents are made, for the kernels."""

    @property
    def size(self) -> int:
        return self.of_latent.numel()

    @property
    def heads(self) -> int:
        return self.of_head.numel()

    @classmethod
    def of(
        cls, threshold: Tensor, m: int | None, shape: torch.Size, composition: str, eps: float
    ) -> "Limits":
        """From thresholds [F] of the latents' values; shape: that of w_enc."""
        limits = torch.empty_like(threshold, dtype=torch.float32)
        config = configure("product_limits", threshold.device)
        launch(
            threshold_kernels.product_limits,
            (-(-limits.numel() // config.blocks["WIDTH"]),),
            config,
            threshold=threshold.double().contiguous(),
            limits=limits,
            size=limits.numel(),
            eps=float(eps),
            ROOT=m is not None and composition == "mand",
        )
        if m is None:
            return cls(limits, limits, {"M": 1, "N": 1, "SIGNED": False, "DENSE": True})
        heads, n = shape[0], shape[1] - m
        by_head = limits.view(heads, m * n)
        how = {"M": m, "N": n, "SIGNED": composition == "mul", "DENSE": False}
        return cls(by_head.t().contiguous(), by_head.amin(1), how)


def count_above(pre: Tensor, limits: Limits) -> Tensor:
    """Active latents of each split of the heads, [b, splits] int32, from pre-latents of a chunk."""
    tokens, stride = pre.shape
    config = configure("count_above", pre.device)
    splits = -(-limits.heads // config.blocks["HEADS"])
    counts = pre.new_empty(tokens, splits, dtype=torch.int32)
    launch(
        threshold_kernels.count_above,
        (tokens * splits,),
        config,
        pre=pre,
        limits=limits.of_latent,
        lowest=limits.of_head,
        counts=counts,
        stride=stride,
        h=limits.heads,
        splits=splits,
        **limits.shape,
    )
    return counts


def select_above(
    pre: Tensor, limits: Limits, counts: Tensor, width: int, begin: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """base, extension, indices [b, width], counts [b] of a chunk whose first token is `begin`.

    counts: of `count_above`; width: of the token that has most.
    """
    (tokens, stride), splits, heads = pre.shape, counts.shape[1], limits.heads
    starts = counts.new_zeros(tokens, splits + 1)
    torch.cumsum(counts, 1, dtype=torch.int32, out=starts[:, 1:])
    sort = width <= MAX_SORTED
    ranked = pre.new_full((tokens, width), -(2**63), dtype=torch.int64)
    launch(
        threshold_kernels.write_above,
        (tokens * splits,),
        configure("write_above", pre.device, **configure("count_above", pre.device).blocks),
        pre=pre,
        limits=limits.of_latent,
        starts=starts,
        ranked=ranked,
        stride=stride,
        h=heads,
        splits=splits,
        width=width,
        **limits.shape,
    )
    if not sort:
        ranked = ranked.sort(dim=1, descending=True).values
    counts = starts[:, -1].long()
    indices = torch.empty_like(ranked)
    base = pre.new_empty(ranked.shape, dtype=torch.float32)
    extension = torch.empty_like(base)
    config = configure("rank_above", pre.device)
    block = next_power_of_2(width) if sort else MAX_SORTED
    launch(
        threshold_kernels.rank_above,
        (tokens, -(-width // block)),
        config._replace(
            num_warps=min(config.num_warps, max(1, block // 64)), blocks={"WIDTH": block}
        ),
        pre=pre,
        ranked=ranked,
        counts=counts,
        indices=indices,
        base=base,
        extension=extension,
        stride=stride,
        h=heads,
        width=width,
        size=limits.size,
        begin=begin,
        SORT=sort,
        **limits.shape,
    )
    return base, extension.copy_(base) if limits.shape["DENSE"] else extension, indices, counts
