"""The operations of a backend (see `backends`), launched as Triton kernels.

Arguments are 2-D, checked by the public functions. Letters as in `common`.
"""

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kronsae_kernels import reference, torch_impl
from kronsae_kernels.triton_impl import backward, gemm, select
from kronsae_kernels.triton_impl import decode as decode_kernels
from kronsae_kernels.triton_impl.configs import Config, config_of
from kronsae_kernels.triton_impl.launch import generation, launch, next_power_of_2

MAX_CANDIDATES = 16384
"""Keys that one program holds in registers at most; where a cut has more, torch selects."""
MAX_SORTED = 256
"""Latents that one program sorts at most; longer lists are sorted by torch."""


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
        entries = Entries.of(indices, heads * m * (rows - m))
        d_w = x.new_empty(rows, heads, d)
        d_b = x.new_empty(rows, heads)
        head_gradients(entries, entries(d_base), entries(d_extension), x, m, d_w, d_b)
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
        entries = Entries.of(indices, w_enc.shape[0])
        d_w, d_b = x.new_empty(w_enc.shape), x.new_empty(w_enc.shape[0])
        row_gradients(entries, entries(d_values), x, d_w, d_b)
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
        entries = Entries.of(indices, w_dec.shape[0])
        d_w = w_dec.new_empty(w_dec.shape)
        row_gradients(entries, entries(values), d_out, d_w, None)
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
        """Places in the list of heads: a power of two."""
        return next_power_of_2(min(self.k, self.heads))

    @property
    def kept_rows(self) -> int:
        """Places in the list of (head, base) rows: a power of two."""
        return next_power_of_2(min(self.k, self.heads * self.m))

    @property
    def fits(self) -> bool:
        """Whether every cut fits into a program."""
        m, n = next_power_of_2(self.m), next_power_of_2(self.n)
        candidates = max(self.kept_heads * m, self.kept_rows * n)
        return candidates <= MAX_CANDIDATES and self.size < 2**31


def select_kron(
    pre: Tensor, mask: Tensor | None, selection: Selection, head_keys: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """indices, base, extension [b, k] from pre-latents [b, (m + n) h] (before the ReLU).

    mask: uint8 [F] or None.  head_keys: [b, h] int32 from `encode_gemm`, or None.
    """
    heads, m, n, k, signed = selection
    if not (selection.fits and _splits_fit(heads, k, pre.device)):
        composition = "mul" if signed else "mand"
        mask = None if mask is None else mask.view(torch.bool)
        return torch_impl.select_kron(pre.view(-1, m + n, heads), mask, m, n, k, composition)
    tokens, stride = pre.shape
    shared = {"pre": pre, "stride": stride, "h": heads, "M": m, "N": n, "SIGNED": signed}
    masked = {"mask": mask, "HAS_MASK": mask is not None}
    kept_heads, kept_rows = selection.kept_heads, selection.kept_rows
    every_head, every_row = k >= heads, k >= heads * m
    list_of_heads = None
    if not every_head:
        of_head = None if mask is None else mask.view(heads, m * n).t().contiguous()
        list_of_heads = _select_heads(
            pre, of_head, heads, k, heads, head_keys, M=m, N=n, SIGNED=signed, DENSE=False
        )
    list_of_rows = None
    if not every_row:
        list_of_rows = pre.new_empty(tokens, kept_rows, dtype=torch.int32)
        padded = {"M_PADDED": next_power_of_2(m), "N_PADDED": next_power_of_2(n)}
        launch(
            select.select_rows,
            (tokens,),
            _per_element("select_rows", kept_heads * padded["M_PADDED"], pre.device),
            **shared,
            **masked,
            **padded,
            heads=list_of_heads,
            rows=list_of_rows,
            k=min(k, heads * m),
            cap=kept_rows,
            ALL=every_head,
            HEADS=kept_heads,
            CAP=kept_rows,
        )
    ranked = _select_latents(
        pre, mask, list_of_rows, kept_rows, selection.size, k, heads, M=m, N=n, SIGNED=signed,
        DENSE=False,
    )  # fmt: skip
    return _rank(pre, ranked, heads, k, M=m, N=n, SIGNED=signed, DENSE=False)


def select_dense(pre: Tensor, mask: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """indices, values [b, k] from pre-activations [b, F] (before the ReLU).

    mask: uint8 [F] or None. A "head" is a group of consecutive columns.
    """
    size = pre.shape[1]
    group = 8 if size >= 16 * k else 4
    groups = -(-size // group)
    kept = next_power_of_2(min(k, groups))
    if kept * group > MAX_CANDIDATES or size >= 2**31 or not _splits_fit(groups, k, pre.device):
        mask = None if mask is None else mask.view(torch.bool)
        return torch_impl.select_dense(pre, mask, k)
    shape: dict[str, Any] = {"M": 1, "N": group, "SIGNED": False, "DENSE": True}
    list_of_groups = None
    if k < groups:
        list_of_groups = _select_heads(pre, mask, groups, k, size, None, **{**shape, "M": group})
    ranked = _select_latents(pre, mask, list_of_groups, kept, size, k, groups, **shape)
    indices, values, _ = _rank(pre, ranked, groups, k, **shape)
    return indices, values


def _splits_of(heads: int, device: torch.device) -> tuple[int, int, int]:
    """(splits, chunks, lanes) of `select_heads`: heads a program = chunks * lanes."""
    blocks = configure("select_heads", device).blocks
    lanes = min(blocks["LANES"], next_power_of_2(heads))
    chunks = min(blocks["PER_PROGRAM"] // lanes, next_power_of_2(-(-heads // lanes)))
    return -(-heads // (chunks * lanes)), chunks, lanes


def _splits_fit(heads: int, k: int, device: torch.device) -> bool:
    """Whether what the splits leave over can be merged by one program, if anything is cut."""
    return k >= heads or _splits_of(heads, device)[0] * next_power_of_2(k) <= MAX_CANDIDATES


def _select_heads(
    pre: Tensor,
    mask: Tensor | None,
    heads: int,
    k: int,
    size: int,
    head_keys: Tensor | None,
    **shape: Any,
) -> Tensor:
    """The list of heads [b, next power of 2 of k] that hold the k first latents."""
    (tokens, stride), cap = pre.shape, next_power_of_2(k)
    splits, chunks, lanes = _splits_of(heads, pre.device)
    lists = pre.new_empty(tokens, splits * cap, dtype=torch.int32)
    keys = torch.empty_like(lists) if splits > 1 else None
    config = configure("select_heads", pre.device)
    warps = min(config.num_warps, max(1, chunks * lanes // 256))
    launch(
        select.select_heads,
        (tokens, splits),
        Config(warps, config.num_stages, {}),
        pre=pre,
        mask=mask,
        head_keys=head_keys,
        heads=lists,
        keys=keys,
        stride=stride,
        size=size,
        h=heads,
        k=k,
        cap=cap,
        HAS_MASK=mask is not None,
        FROM_KEYS=head_keys is not None,
        STORE_KEYS=splits > 1,
        CAP=cap,
        CHUNKS=chunks,
        LANES=lanes,
        **shape,
    )
    if splits == 1:
        return lists
    merged = pre.new_empty(tokens, cap, dtype=torch.int32)
    candidates = next_power_of_2(splits * cap)
    launch(
        select.merge_heads,
        (tokens,),
        _per_element("merge_heads", candidates, pre.device),
        lists=lists,
        keys=keys,
        heads=merged,
        length=splits * cap,
        k=k,
        cap=cap,
        CAP=cap,
        CANDIDATES=candidates,
    )
    return merged


def _select_latents(
    pre: Tensor,
    mask: Tensor | None,
    rows: Tensor | None,
    kept: int,
    size: int,
    k: int,
    heads: int,
    **shape: Any,
) -> Tensor:
    """The k first latents of a list of rows [b, kept] (None: all), as ranks [b, k] in no order."""
    tokens, stride = pre.shape
    n_padded = next_power_of_2(shape["N"])
    ranked = pre.new_empty(tokens, k, dtype=torch.int64)
    launch(
        select.select_latents,
        (tokens,),
        _per_element("select_latents", kept * n_padded, pre.device),
        pre=pre,
        mask=mask,
        rows=rows,
        ranked=ranked,
        stride=stride,
        size=size,
        h=heads,
        k=k,
        N_PADDED=n_padded,
        HAS_MASK=mask is not None,
        ALL=rows is None,
        ROWS=kept,
        **shape,
    )
    return ranked


def _rank(
    pre: Tensor, ranked: Tensor, heads: int, k: int, **shape: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """indices, base, extension [b, k], first latent first, from `_select_latents`."""
    tokens, stride = pre.shape
    sort = k <= MAX_SORTED
    if not sort:
        ranked = ranked.sort(dim=1, descending=True).values
    k_padded = next_power_of_2(k)
    indices = torch.empty_like(ranked)
    base = pre.new_empty(tokens, k, dtype=torch.float32)
    extension = base if shape["DENSE"] else torch.empty_like(base)
    launch(
        select.rank_latents,
        (tokens,),
        _per_element("rank_latents", k_padded, pre.device),
        pre=pre,
        ranked=ranked,
        indices=indices,
        base=base,
        extension=extension,
        stride=stride,
        h=heads,
        k=k,
        SORT=sort,
        K_PADDED=k_padded,
        **shape,
    )
    return indices, base, extension


def _per_element(kernel: str, elements: int, device: torch.device) -> Config:
    """Warps for a program that holds so many elements: 8 a thread, up to what configs allow."""
    config = configure(kernel, device)
    return Config(min(config.num_warps, max(1, elements // 256)), config.num_stages, {})


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
        scratch=torch.empty_like(counts),
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
    """What `decode_and_loss` gives: of L = squares.sum() / 2."""

    residual: Tensor
    """[B, d] reconstruction minus x, in the table's dtype."""
    squares: Tensor
    """[B] float32: its squared norms."""
    values: Tensor
    """[B, k] float32, as the next three."""
    along: Tensor
    """values times dL/dvalues."""
    d_base: Tensor
    """dL by the base's pre-latent (a dense encoder's pre-activation)."""
    d_extension: Tensor
    """dL by the extension's pre-latent (a dense encoder's: d_base)."""


def decode_and_loss(
    x: Tensor,
    indices: Tensor,
    base: Tensor,
    extension: Tensor,
    table: Tensor,
    bias: Tensor | None,
    composition: str,
    eps: float,
    one_gather: bool,
) -> DecodeAndLoss:
    """Decoder, squared error against x [B, d], and its gradients by the codes [B, k].

    composition: one of COMPOSITIONS, or "dense" (base holds the values). one_gather: rows are
    gathered once, for which k of them must fit into a program's tile.
    """
    (tokens, k), d, device = indices.shape, table.shape[1], table.device
    composed = {
        "eps": eps,
        "ROOT": composition == "mand",
        "SIGNED": composition == "mul",
        "DENSE": composition == "dense",
    }
    into = {name: torch.empty_like(base) for name in ("values", "along", "d_base")}
    into["d_extension"] = into["d_base"] if composed["DENSE"] else torch.empty_like(base)
    if one_gather:
        residual = table.new_empty(tokens, d)
        squares = table.new_empty(tokens, dtype=torch.float32)
        config, rows = configure("decode_and_loss", device), next_power_of_2(k)
        width = min(max(16, config.blocks["TILE"] // rows), next_power_of_2(d))
        launch(
            decode_kernels.decode_and_loss,
            (tokens,),
            Config(config.num_warps, config.num_stages, {"ROWS": rows, "WIDTH": width}),
            x=x,
            columns=indices,
            base=base,
            extension=extension,
            table=table,
            bias=bias,
            residual=residual,
            squares=squares,
            d=d,
            k=k,
            HAS_BIAS=bias is not None,
            **into,
            **composed,
        )
        return DecodeAndLoss(residual, squares, **into)
    values = base
    if composition != "dense":
        values = reference.compose(base * extension, composition, eps)
    error = combine(values, indices, table, bias, torch.float32).sub_(x)
    d_values = pair_dots(error, indices, table, torch.float32)
    config = configure("code_gradients", device)
    launch(
        decode_kernels.code_gradients,
        (-(-base.numel() // config.blocks["WIDTH"]),),
        config,
        base=base,
        extension=extension,
        d_values=d_values,
        size=base.numel(),
        **into,
        **composed,
    )
    return DecodeAndLoss(error.to(table.dtype), error.square().sum(1), **into)


# Sums over the entries of a row


class Entries(NamedTuple):
    """The (token, latent) pairs of sparse codes [B, k], sorted by latent (stably)."""

    order: Tensor
    """[E] int64: position of each entry in the flattened codes."""
    tokens: Tensor
    """[E] int32."""
    latents: Tensor
    """[E] int32, ascending."""
    offsets: Tensor
    """[F + 1] int32: latent f owns entries offsets[f] to offsets[f + 1]."""

    @classmethod
    def of(cls, indices: Tensor, size: int, tokens: Tensor | None = None) -> "Entries":
        """From latent indices [B, k] in [0, size) (or [E], with the token of each).

        Raises RuntimeError for 2^31 entries or latents: kernels count them in int32.
        """
        if indices.numel() >= 2**31 or size >= 2**31:
            raise RuntimeError(
                f"expected fewer than 2^31 codes and latents, got {indices.numel()} and {size}"
            )
        latents, order = indices.flatten().int().sort(stable=True)
        bounds = torch.arange(size + 1, dtype=torch.int32, device=indices.device)
        offsets = torch.searchsorted(latents, bounds, out_int32=True)
        if tokens is None:
            of_entry = torch.div(order, indices.shape[1], rounding_mode="floor").int()
        else:
            of_entry = tokens[order]
        return cls(order, of_entry, latents, offsets)

    def __call__(self, values: Tensor) -> Tensor:
        """[B, k] (or [E]) in the order of the entries, float32."""
        return values.flatten()[self.order].float()


class Segments(NamedTuple):
    """Rows of more than `length` entries, cut into segments of that many."""

    first: Tensor
    """[rows + 1] int32: number of the first segment of each row."""
    length: int
    most: int
    """How many there can be."""

    @classmethod
    def of(cls, offsets: Tensor, length: int, entries: int) -> "Segments":
        """For rows that own entries offsets[i] to offsets[i + 1], of `entries` in all."""
        lengths = offsets.diff()
        pieces = torch.where(lengths > length, (lengths + (length - 1)) // length, 0)
        first = torch.zeros_like(offsets)
        torch.cumsum(pieces, 0, dtype=torch.int32, out=first[1:])
        # A row of L > length entries has at most 2 L / length segments.
        return cls(first, length, 2 * entries // length)


def row_gradients(
    entries: Entries, coefficients: Tensor, y: Tensor, out: Tensor, out_bias: Tensor | None
) -> None:
    """out[f] [rows, d] = sum of coefficient * y[token] over f's entries; out_bias [rows]: of 1."""
    rows, d = out.shape
    y = y.contiguous()
    segments, partial = sum_row_segments(entries, coefficients, y, d)
    config = configure("row_gradients", out.device)
    launch(
        backward.row_gradients,
        (rows, -(-d // config.blocks["WIDTH"])),
        config,
        coefficients=coefficients,
        tokens=entries.tokens,
        y=y,
        offsets=entries.offsets,
        first_segment=segments.first,
        partial=partial,
        out=out,
        out_bias=out_bias,
        d=d,
        HAS_BIAS=out_bias is not None,
    )


def sum_row_segments(
    entries: Entries, coefficients: Tensor, y: Tensor, d: int
) -> tuple[Segments, Tensor]:
    """Segments of frequent latents, and their partial sums [segments, d] float32."""
    length = configure("segments", y.device).blocks["ROW_LENGTH"]
    segments = Segments.of(entries.offsets, length, entries.tokens.numel())
    partial = y.new_empty(max(1, segments.most), d, dtype=torch.float32)
    config = configure("sum_row_segments", y.device)
    launch(
        backward.sum_row_segments,
        (segments.most, -(-d // config.blocks["WIDTH"])),
        config,
        coefficients=coefficients,
        tokens=entries.tokens,
        y=y,
        offsets=entries.offsets,
        first_segment=segments.first,
        partial=partial,
        rows=entries.offsets.numel() - 1,
        length=length,
        d=d,
    )
    return segments, partial


Updated = tuple[Tensor, Tensor, Tensor]
"""A float32 weight and AdamW's two moments of it, changed in place."""
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
    """AdamW step of weight [rows, d] from `row_gradients`; returns the gradient's squared norm.

    mode "measure": only that. copy: the weight in another dtype, kept up to date.
    hyper [2, 9]: with weight decay and without, which rows without a bias (decoders) never have.
    """
    rows, d = weight[0].shape
    segments, partial = sum_row_segments(entries, coefficients, y, d)
    squares = y.new_empty(rows, dtype=torch.float32)
    config, width = configure("update_rows", y.device), max(16, next_power_of_2(d))
    blocks = dict(config.blocks)
    warps = min(config.num_warps, max(1, width // blocks.pop("PER_WARP")))
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
        first_segment=segments.first,
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
        WIDTH=width,
    )
    return squares.sum()


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
    """AdamW step of weight [m + n, h, d] and bias [h, m + n]; returns the squared norm.

    As `update_rows`, from `head_gradients`.
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
    weight: tuple[Tensor | None, ...],
    *,
    bias: tuple[Tensor | None, ...],
    copy: Tensor | None = None,
    hyper: Tensor | None = None,
) -> Tensor:
    rows, h, d = weight[0].shape
    n, x = rows - m, x.contiguous()
    offsets = entries.offsets[:: m * n].contiguous()
    length = configure("segments", x.device).blocks["HEAD_LENGTH"]
    segments = Segments.of(offsets, length, entries.tokens.numel())
    shared = {
        "d_base": d_base,
        "d_extension": d_extension,
        "latents": entries.latents,
        "tokens": entries.tokens,
        "x": x,
        "offsets": offsets,
        "first_segment": segments.first,
        "partial": x.new_empty(max(1, segments.most), rows, d, dtype=torch.float32),
        "partial_bias": x.new_empty(max(1, segments.most), rows, dtype=torch.float32),
        "d": d,
        "M": m,
        "N": n,
        "ROWS": max(16, next_power_of_2(rows)),
        "SPLIT": x.dtype == torch.bfloat16,
        "PRECISION": matmul_precision(x.dtype, x.device),
    }
    config = configure("sum_head_segments", x.device)
    launch(
        backward.sum_head_segments,
        (segments.most, -(-d // config.blocks["WIDTH"])),
        config,
        heads=h,
        length=length,
        **shared,
    )
    config = configure("head_gradients", x.device)
    chunks = -(-d // config.blocks["WIDTH"])
    squares = x.new_empty(h, chunks, dtype=torch.float32)
    launch(
        backward.head_gradients,
        (h, chunks),
        config,
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
        MODE=MODES[mode],
        HAS_SHADOW=copy is not None,
        bias_of_row=bias[0].stride(0 if mode == "gradient" else 1),
        bias_of_head=bias[0].stride(1 if mode == "gradient" else 0),
        **shared,
    )
    return squares.sum()


def update_vector(gradient: Tensor, weight: Updated, hyper: Tensor) -> None:
    """AdamW step of a vector from its gradient; hyper: [9]."""
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
