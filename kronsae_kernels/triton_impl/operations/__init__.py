"""The operations of a backend (see `backends`), and of a training step, launched as kernels.

    select     the k first latents of pre-latents       gather     sums of gathered rows
    one_pass   the same, with the encoder's product     gradients  of weights, and AdamW
    threshold  latents above thresholds                 nested     reconstructions from prefixes
    training   what a training step alone asks for      hierarchical  from a token's first codes
    refine     steps on the values of codes, in a training step

Arguments are 2-D, checked by the public functions. Letters as in `common`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kronsae_kernels import torch_impl
from kronsae_kernels.triton_impl.operations.gather import (
    DecodeAndLoss,
    code_gradients,
    combine,
    decode_and_loss,
    describe,
    pair_dots,
)
from kronsae_kernels.triton_impl.operations.gradients import (
    Entries,
    head_gradients,
    row_gradients,
    sum_entries,
    update_heads,
    update_rows,
    update_vector,
)
from kronsae_kernels.triton_impl.operations.hierarchical import (
    hierarchical,
    hierarchical_decode_and_loss,
)
from kronsae_kernels.triton_impl.operations.nested import (
    Grouped,
    nested_decode_and_loss,
    nested_dots,
    nested_sums,
    suffix_sums,
)
from kronsae_kernels.triton_impl.operations.one_pass import encode_in_one_pass, lists_of
from kronsae_kernels.triton_impl.operations.refine import RefinedRows, Refinement
from kronsae_kernels.triton_impl.operations.select import Selection, select_dense, select_kron
from kronsae_kernels.triton_impl.operations.threshold import (
    Jumped,
    jump,
    jump_gradients,
    threshold_encode,
)
from kronsae_kernels.triton_impl.operations.training import (
    finish_update,
    keep_largest,
    note_active,
    prepare_update,
)


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
    """Same as `torch_impl.encode`, which also serves for a scale, masks a token, and no ReLU."""
    signed = m is None and composition == "linear"
    if scale is not None or signed or (mask is not None and mask.ndim > 1):
        return torch_impl.encode(x, w_enc, b_enc, mask, m, k, composition, scale)
    of_mask = None if mask is None else mask.contiguous().view(torch.uint8)
    if m is None:
        dense = [
            select_dense(pre, of_mask, k)
            for pre in torch_impl.projections(x, w_enc, b_enc, scratch=0)
        ]
        indices, values = torch_impl.concatenate(dense, x, k, (torch.int64, torch.float32))
        return indices, values, values.new_empty(0)
    selection = Selection(w_enc.shape[0], m, w_enc.shape[1] - m, k, composition == "mul")
    lists = lists_of(x, selection) if mask is None else None
    if lists is not None:
        parts = encode_in_one_pass(x.contiguous(), w_enc, b_enc, selection, lists)
    else:
        parts = [
            select_kron(pre, of_mask, selection)
            for pre in torch_impl.projections(x, w_enc, b_enc, scratch=0)
        ]
    return torch_impl.concatenate(parts, x, k, (torch.int64, *2 * [torch.float32]))


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
    """Same as `torch_impl.encode_backward`."""
    d_x, d_w, d_b = x.new_empty(0), x.new_empty(0), x.new_empty(0)
    if need_x:
        live = torch_impl.live_pre_latents(d_base, d_extension, indices, w_enc, m)
        d_x = combine(*live, torch_impl.i_major(w_enc), None, x.dtype)
    if not need_w:
        return d_x, d_w, d_b
    if m is None:
        entries = Entries.of(indices, len(w_enc), (d_base,))
        d_w, d_b = x.new_empty(w_enc.shape), x.new_empty(len(w_enc))
        row_gradients(entries, entries.coefficients[0], x, d_w, d_b)
    else:
        heads, rows, d = w_enc.shape
        entries = Entries.of(indices, heads * m * (rows - m), (d_base, d_extension))
        d_w, d_b = x.new_empty(rows, heads, d), x.new_empty(rows, heads)
        of_base, of_extension = entries.coefficients
        head_gradients(entries, of_base, of_extension, x, m, d_w, d_b)
        d_w, d_b = d_w.transpose(0, 1), d_b.t().contiguous()
    return d_x, d_w, d_b


def decode(
    values: Tensor,
    indices: Tensor,
    w_dec: Tensor,
    b_dec: Tensor | None,
    bounds: Sequence[int] | None = None,
) -> Tensor:
    """Same as `torch_impl.decode`."""
    if bounds is None:
        return combine(values, indices, w_dec, b_dec, w_dec.dtype)
    return nested_sums(Grouped.of(indices, bounds, values), w_dec, b_dec, w_dec.dtype)


def decode_backward(
    d_out: Tensor,
    values: Tensor,
    indices: Tensor,
    w_dec: Tensor,
    bounds: Sequence[int] | None,
    need_values: bool,
    need_w: bool,
) -> tuple[Tensor, Tensor]:
    """Same as `torch_impl.decode_backward`."""
    d_values, d_w, rows = values.new_empty(0), w_dec.new_empty(0), None
    if bounds is not None:
        groups = Grouped.of(indices, bounds, rows=True)
        suffixes = suffix_sums(d_out)
        d_out, rows = suffixes.flatten(0, 1), groups.of_slot.flatten()
    if need_values and bounds is None:
        d_values = pair_dots(d_out, indices, w_dec, values.dtype)
    elif need_values:
        d_values = nested_dots(groups, suffixes, w_dec, values.dtype)
    if need_w:
        held = values if bounds is None else values.masked_fill(indices >= bounds[-1], 0)
        entries = Entries.of(indices, len(w_dec), (held,), rows)
        d_w = w_dec.new_empty(w_dec.shape)
        row_gradients(entries, entries.coefficients[0], d_out, d_w, None)
    return d_values, d_w
