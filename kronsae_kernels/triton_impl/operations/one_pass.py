"""The encoder's product and the selection of heads in one pass: kernels of `triton_impl.gemm`."""

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kronsae_kernels import torch_impl
from kronsae_kernels.triton_impl import gemm
from kronsae_kernels.triton_impl.launch import cdiv, configure, launch, next_power_of_2
from kronsae_kernels.triton_impl.operations.select import (
    MAX_CANDIDATES,
    Selection,
    per_element,
    select_kron,
)


class Lists(NamedTuple):
    """Sizes of the lists of heads that `encode_heads` keeps, and of the tiles that it makes."""

    tokens: int
    """Tokens of a program, as the next two: powers of two."""
    heads: int
    """Heads of a tile."""
    capacity: int
    """Heads that a list has room for."""
    planes: int
    """int32 numbers for each head of a list."""
    splits: int
    """Ranges that the heads are cut into."""
    tiles: int
    """Tiles of a range (the last one may have fewer)."""

    @property
    def bytes_per_token(self) -> int:
        return self.splits * self.capacity * self.planes * 4


def lists_of(x: Tensor, selection: Selection) -> Lists | None:
    """Lists for the encoder in one pass; None if the configuration, or the shape, wants two."""
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
    tiles = cdiv(heads, per_tile)
    tiles_of_program = cdiv(tiles, max(blocks["SPLITS"], blocks["PROGRAMS"] // _blocks_of(x)))
    splits = cdiv(tiles, tiles_of_program)
    if next_power_of_2(splits) * capacity > MAX_CANDIDATES:
        return None
    planes = 2 + cdiv(m, 2) + cdiv(n, 2)
    return Lists(blocks["TOKENS"], per_tile, capacity, planes, splits, tiles_of_program)


def _blocks_of(x: Tensor) -> int:
    """Blocks of tokens that `encode_heads` makes at once of x [B, d]."""
    return max(1, cdiv(x.shape[0], configure("encode_heads", x.device).blocks["TOKENS"]))


def encode_in_one_pass(
    x: Tensor, w_enc: Tensor, b_enc: Tensor | None, selection: Selection, lists: Lists
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """indices, base, extension [b, k] of each chunk of tokens (of 16-bit numbers)."""
    parts, weight, bias = [], torch_impl.i_major(w_enc), torch_impl.i_major_bias(b_enc)
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
    heads, m, n, k, _ = selection
    tokens, programs = len(x), _blocks_of(x) * lists.splits
    storage = x.new_empty(programs, lists.planes, lists.tokens, lists.capacity, dtype=torch.int32)
    shared = {
        "lists": storage,
        "counts": x.new_empty(programs, 2, lists.tokens, dtype=torch.int32),
        "splits": lists.splits,
        "k": k,
        "M": m,
        "N": n,
        "CAPACITY": lists.capacity,
    }
    _encode_heads(x, weight, bias, selection, lists, shared)
    first = x.new_empty(tokens, k, dtype=torch.int32)
    pre = x.new_empty(tokens, (m + n) * k)
    candidates = next_power_of_2(lists.splits) * lists.capacity
    launch(
        gemm.gather_heads,
        (tokens,),
        per_element("gather_heads", candidates, x.device),
        heads=first,
        pre=pre,
        TOKENS=lists.tokens,
        CANDIDATES=candidates,
        **shared,
    )
    return first, pre


def _encode_heads(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    selection: Selection,
    lists: Lists,
    shared: dict[str, Any],
) -> None:
    """Write the lists of heads, one a token and split, which are among the arguments `shared`."""
    heads, m, n, k, signed = selection
    config = configure("encode_heads", x.device)
    sizes = dict(config.blocks)
    cut = max(1, min(lists.tokens, sizes.pop("CUT_ENTRIES") // lists.capacity))
    for name in ("COLUMNS", "ROOM", "SPLITS", "PROGRAMS"):
        del sizes[name]
    padded = {"M_PADDED": next_power_of_2(m), "N_PADDED": next_power_of_2(n)}
    sizes["TMA"] = int(sizes["TMA"] and _aligned(x) and _aligned(weight))
    operands = {"x": x, "p_weight": weight, "q_weight": weight}
    if sizes["TMA"]:
        width, cube = sizes["WIDTH"], weight.view(m + n, heads, -1)
        operands = {
            "x": TensorDescriptor.from_tensor(x, [lists.tokens, width]),
            **{
                name: TensorDescriptor.from_tensor(cube, [rows, lists.heads, width])
                for name, rows in zip(("p_weight", "q_weight"), padded.values(), strict=True)
            },
        }
    of_tiles = bias
    if bias is not None:  # [tiles, m + n, heads of a tile]
        padding = (0, -heads % lists.heads)
        padded_bias = torch.nn.functional.pad(bias.view(m + n, heads), padding)
        of_tiles = padded_bias.unflatten(1, (-1, lists.heads)).transpose(0, 1).contiguous()
    launch(
        gemm.encode_heads,
        (len(shared["lists"]),),
        config._replace(blocks=sizes),
        bias=of_tiles,
        tokens=x.shape[0],
        d=x.shape[1],
        h=heads,
        tiles=lists.tiles,
        cap=k + (lists.capacity - lists.heads - k) // 8,
        SIGNED=signed,
        DTYPE=tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16,
        HEADS=lists.heads,
        CUT=cut,
        **operands,
        **padded,
        **shared,
    )


def _aligned(tensor: Tensor) -> bool:
    """Whether a tensor begins where a descriptor's may."""
    return tensor.is_meta or tensor.data_ptr() % 16 == 0


def _name_latents(indices: Tensor, heads: Tensor, latents: int) -> None:
    """Change latents [b, k] of gathered heads into those of all heads, `latents` a head."""
    launch(
        gemm.name_latents,
        lambda blocks: (cdiv(indices.numel(), blocks["WIDTH"]),),
        indices=indices,
        heads=heads,
        size=indices.numel(),
        k=heads.shape[1],
        LATENTS=latents,
    )
