"""Dictionaries whose heads several processes share.

Letters: B tokens, F latents, k selected latents a token, R ranks of a group.
"""

import torch

from kronsae.config import SAEConfig, TrainConfig
from kronsae.errors import InputError
from kronsae.registry import SAE_KINDS
from kronsae.system.parallel import Group, shape
from kronsae_kernels import SparseCodes
from kronsae_kernels.ranks import largest_of_all

SHARDED = ("W_enc", "b_enc", "W_dec")
"""Parameters whose rows are divided equally, in order, among the processes along `Mesh.heads`."""

SHARDED_STATE = (
    *(f"weights.{name}" for name in SHARDED),
    *(f"moments.{name}.{moment}" for name in SHARDED for moment in ("exp_avg", "exp_avg_sq")),
    "tokens_since_fired",
)
"""Entries of `Learner.state_dict` whose rows are divided in the same way."""


def check_heads(config: SAEConfig, ranks: int) -> None:
    """Raise InputError if the heads of an autoencoder cannot be divided among so many ranks."""
    if ranks == 1:
        return
    for part, kinds in SAE_KINDS.items():
        name = getattr(config, part)
        if not kinds[name].shares_heads:
            known = [repr(other) for other in kinds if kinds[other].shares_heads]
            raise InputError(
                f"tensor_parallel {ranks}: {part} {name!r} does not work with several processes "
                f"for one autoencoder (only {' and '.join(known)})"
            )
    for name, does in (("experts", "do"), ("refine", "does")):
        if getattr(config, name):
            raise InputError(
                f"tensor_parallel {ranks}: {name} {does} not work with several processes for one "
                "autoencoder"
            )
    count, unit = (config.heads, "heads") if config.heads else (config.dict_size, "latents")
    if count % ranks:
        raise InputError(
            f"tensor_parallel {ranks}: {count:,} {unit} cannot be divided evenly among {ranks} "
            "processes"
        )


def largest(own: SparseCodes, k: int, group: Group, size: int) -> SparseCodes:
    """The k largest latents of each token [B, k] among those of all ranks, exactly.

    own: [B, w] this rank's k largest, or all that it may take if these are fewer: values to compare
        latents by, largest first and then lowest index first, and indices in [0, size).
    size: latents of a rank; latent f of rank r is r * size + f of the dictionary.
    k: at most as many as all ranks have together in `own`.

    Values of this rank's latents keep their derivative, those of others have none.
    """
    width = min(k, size)
    missing = width - own.values.shape[1]
    values = torch.nn.functional.pad(own.values, (0, missing), value=-torch.inf)
    indices = torch.nn.functional.pad(own.indices, (0, missing))
    candidates, taken = largest_of_all(values.detach(), k, group)
    latents = group.gather(indices.int()).transpose(0, 1).flatten(1)
    rank = taken // width
    local = (taken - group.rank * width).clamp(0, max(0, width - 1))
    chosen = torch.where(rank == group.rank, values.gather(1, local), candidates.gather(1, taken))
    return SparseCodes(chosen, latents.gather(1, taken).long() + rank * size)


def own_part(codes: SparseCodes, group: Group, size: int) -> SparseCodes:
    """The codes [B, w] of this rank's own latents among [B, k], with indices in [0, size).

    As wide as the token with most of them; slots that a token does not use have value 0.
    """
    if group.size == 1:
        return codes
    local = codes.indices - group.rank * size
    own = (local >= 0) & (local < size)
    width = max(1, int(own.sum(1).max()) if len(own) else 0)
    first = (~own).to(torch.uint8).sort(dim=1, stable=True).indices[:, :width]
    own = own.gather(1, first)
    values = codes.values.gather(1, first).where(own, 0)
    # Indices of unused slots are spread out, as in `widened`.
    spread = torch.arange(own.numel(), device=own.device).view_as(own) % size
    return SparseCodes(values, local.gather(1, first).where(own, spread))


def ranks_of_one(config: TrainConfig) -> tuple[int, int]:
    """(R along data, R along heads) of the ranks that train one autoencoder together."""
    return (1, 1) if config.share == "members" else shape(config.tensor_parallel)
