"""The operations of a backend (see `backends`), launched as Triton kernels.

Arguments are 2-D, checked by the public functions. Letters as in `common`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

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
    fused = configure("encode", x.device).blocks["FUSED_GEMM"] and x.element_size() == 2
    if fused and mask is None and selection.fits:
        parts = [
            select_kron(pre, None, selection, keys)
            for pre, keys in _fused_projections(x.contiguous(), weight, bias, selection)
        ]
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
        head_gradients(entries, *entries.coefficients, x, m, d_w, d_b)
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
        row_gradients(entries, *entries.coefficients, x, d_w, d_b)
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
        row_gradients(entries, *entries.coefficients, d_out, d_w, None)
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


def _fused_projections(x: Tensor, weight: Tensor, bias: Tensor | None, selection: Selection):
    """(pre-latents, head keys) of a chunk of tokens at a time, by `encode_gemm` (16-bit dtypes)."""
    heads, m, n, _, signed = selection
    m_padded, n_padded = next_power_of_2(m), next_power_of_2(n)
    config = configure("encode_gemm", x.device)
    blocks = config.blocks
    # COLUMNS of a tile: both products need 16 of their own at least.
    per_tile = next_power_of_2(max(blocks["COLUMNS"] // (m_padded + n_padded), 1))
    per_tile = max(per_tile if per_tile * (m_padded + n_padded) <= blocks["COLUMNS"]
                   else per_tile // 2, 16 // min(m_padded, n_padded), 1)  # fmt: skip
    spans = torch_impl.spans(x.shape[0], weight.shape[0] * x.element_size(), x.device)
    most = max((s.stop - s.start for s in spans), default=0)
    buffer = x.new_empty(most, weight.shape[0])
    keys = x.new_empty(most, heads, dtype=torch.int32)
    for span in spans:
        tokens = span.stop - span.start
        tiles = -(-tokens // blocks["TOKENS"]) * -(-heads // per_tile)
        launch(
            gemm.encode_gemm,
            (tiles,),
            Config(config.num_warps, config.num_stages, {}),
            x=x[span],
            weight=weight,
            bias=bias,
            pre=buffer,
            head_keys=keys,
            tokens=tokens,
            d=x.shape[1],
            h=heads,
            M=m,
            N=n,
            M_PADDED=m_padded,
            N_PADDED=n_padded,
            SIGNED=signed,
            HAS_BIAS=bias is not None,
            PRECISION="ieee",
            TOKENS=blocks["TOKENS"],
            HEADS=per_tile,
            WIDTH=blocks["WIDTH"],
            GROUP=blocks["GROUP"],
        )
        yield buffer[:tokens], keys[:tokens]


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

    tokens: Tensor
    """[E] int32."""
    latents: Tensor
    """[E] int32, ascending."""
    offsets: Tensor
    """[F + 1] int32: latent f owns entries offsets[f] to offsets[f + 1]."""
    coefficients: tuple[Tensor, ...]
    """[E] float32 each: those that `of` was given."""

    @classmethod
    def of(
        cls,
        indices: Tensor,
        size: int,
        coefficients: tuple[Tensor, ...] = (),
        tokens: Tensor | None = None,
    ) -> "Entries":
        """From latent indices [B, k] in [0, size) (or [E], with the token of each, int32).

        coefficients: up to 4 numbers of each code, shaped as indices.
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
        one, two, three, four = given + [None] * (4 - len(given))
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
            tokens=of_entry,
            coefficients=sorted_,
            offsets=offsets,
            k=1 if tokens is not None else indices.shape[1],
            size=count,
            rows=size,
            HAS_TOKENS=tokens is not None,
            COUNT=len(given),
        )
        return cls(of_entry, latents, offsets, tuple(sorted_))


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
        LENGTH=length,
        PIECES=-(-d // width),
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
