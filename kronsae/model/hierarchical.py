"""The hierarchical objective: one SAE for every k. [Balagansky et al. 2025, arXiv:2505.24473]"""

from dataclasses import dataclass
from typing import Any

from kronsae.config import SAEConfig, check_values, setting
from kronsae.errors import InputError
from kronsae.model.objectives import Objective, Reconstruction, part_of_mean
from kronsae.registry import OBJECTIVES, SELECTIONS
from kronsae_kernels import hierarchical_loss


@dataclass(frozen=True)
class HierarchicalSettings:
    """Settings of objective "hierarchical"."""

    hierarchical_prefixes: str = setting(
        "all",
        "hierarchical: the numbers of latents that have an error: all up to k, or powers of two "
        "and k",
        choices=("all", "powers"),
    )

    def __post_init__(self) -> None:
        check_values(self)


@OBJECTIVES.register("hierarchical")
class Hierarchical(Objective):
    """The mean over j = 1 to k of the error with the j largest latents of each token.

    Then `SAE.encode(x, k=j)` gives good codes for every j up to k.
    """

    title = "HierarchicalTopK"
    Settings = HierarchicalSettings
    fused = True

    @classmethod
    def check(cls, config):
        selection = SELECTIONS[config.selection]
        if not (selection.by_k and selection.exact):
            raise InputError(
                "objective 'hierarchical' reconstructs each token from its 1, 2, ... k largest "
                f"latents, and selection {config.selection!r} does not give each token k: take "
                "--selection topk"
            )
        if config.refine:
            raise InputError(
                "objective 'hierarchical' trains one set of values for every k, but refine would "
                "change the values for each k: leave one of them out"
            )

    @classmethod
    def prefixes(cls, config: SAEConfig, k: int) -> list[int]:
        """Numbers of latents that have an error, ascending, the last of them k."""
        if config.objective_settings.hierarchical_prefixes == "all":
            return list(range(1, k + 1))
        return [*(2**i for i in range((k - 1).bit_length())), k]

    @classmethod
    def reconstruct(cls, sae, x, target, tokens, config, progress):
        codes, penalties = sae.selection.codes_and_penalties(sae, x, config, progress)
        wanted = target if sae.W_skip is None else -sae.with_skip(-target, x)
        prefixes = cls.prefixes(sae.config, codes.values.shape[1])
        loss, residual = hierarchical_loss(codes, prefixes, sae.W_dec, wanted, sae.b_dec)
        loss, mse = loss / (tokens * target.shape[1]), part_of_mean(residual, tokens)
        return Reconstruction(loss, mse, target + residual, codes, codes, codes, penalties)

    @classmethod
    def step_arguments(cls, config: SAEConfig, k: int) -> dict[str, Any]:
        return {"prefixes": cls.prefixes(config, k)}

    @classmethod
    def step_bytes(cls, config: SAEConfig, k: int, batch: int, on_cpu: bool) -> int:
        decoder = 4 * config.dict_size * config.d_out  # its gradient, before the backward pass
        if on_cpu:
            return decoder
        return decoder + 4 * batch * len(cls.prefixes(config, k)) * config.d_out
