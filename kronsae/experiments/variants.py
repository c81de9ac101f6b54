"""SAEs that experiments compare, by short names: dense ones, and the Kron forms of these."""

import re
from collections.abc import Callable, Iterable
from typing import Any

from kronsae.config import SAEConfig
from kronsae.errors import InputError
from kronsae.experiments.report import Spread

FAMILIES: dict[str, dict[str, Any]] = {
    "topk": {},
    "batchtopk": {"selection": "batchtopk"},
    "matryoshka": {"objective": "matryoshka"},
    "switch": {"experts": 8},
    "jumprelu": {"selection": "jumprelu"},
}
"""SAEs that get a Kron encoder, and their settings. [KronSAE, App. A.1, A.6; BatchTopK: ours]"""

REFINED = "-refined"
"""End of the name of a variant whose values one gradient step refines (`SAEConfig.refine`)."""


def sae_config(variant: str, dict_size: int, k: int) -> SAEConfig:
    """The SAE that a variant's name means.

    "topk", "batchtopk", "matryoshka", "switch", "jumprelu": a dense encoder; "topk-half": one with
    dict_size / 2 latents; "topk-mixed": a mixed encoder; "topk-mixed3648": one with 3,648 dense
    latents; "topk-mixed3648x0.65": one whose `dense_factor` is 0.65 besides; "m2n4": KronSAE with
    m = 2, n = 4 (and as many heads as dict_size takes); "matryoshka-m2n4": the Kron form of another
    family than TopK;
    "h8m2n4": with its heads, which must agree; "m2n4-relu_mul": another composition than mAND;
    "topk-refined", "m2n4-refined": with one step that refines values.
    Raises InputError for any other name, and where dict_size does not fit the variant.
    """
    refine = int(variant.endswith(REFINED))
    variant = variant.removesuffix(REFINED)
    family = dense_form(variant)
    given = {"dict_size": dict_size, "k": k, "refine": refine, **FAMILIES[family]}
    if variant == family:
        return SAEConfig(encoder="dense", **given)
    shape = variant.removeprefix(f"{family}-")
    if shape == "half":
        return SAEConfig(encoder="dense", **given | {"dict_size": dict_size // 2})
    if match := re.fullmatch(r"mixed(?:([1-9][0-9]{0,8})(?:x([0-9]*\.?[0-9]+))?)?", shape):
        dense, factor = match.groups()
        own: dict[str, Any] = {"dense_latents": int(dense or 0)}
        own |= {"dense_factor": float(factor)} if factor else {}
        return SAEConfig(encoder="mixed", encoder_settings=own, **given)
    match = re.fullmatch(r"(?:h([0-9]{1,9}))?m([0-9]{1,9})n([0-9]{1,9})(?:-(\w+))?", shape)
    if match is None:
        raise InputError(
            f"variant: expected {', '.join(FAMILIES)}, topk-half, topk-mixed, "
            f"topk-mixed3648x0.65, m2n4, h8m2n4, m2n4-relu_mul or matryoshka-m2n4, got {variant!r}"
        )
    *widths, composition = match.groups(default="")
    heads, m, n = (int(width or 0) for width in widths)
    return SAEConfig(heads=heads, m=m, n=n, composition=composition or "mand", **given)


def dense_form(variant: str) -> str:
    """The variant with a dense encoder and all latents that another one is held against.

    Of itself: itself.
    """
    family = variant.partition("-")[0]
    family = family if family in FAMILIES else "topk"
    return family + REFINED * variant.endswith(REFINED)


def with_dense_forms(variants: Iterable[str]) -> tuple[str, ...]:
    """The variants, each family's dense form before the others, none twice."""
    return tuple(dict.fromkeys(name for kron in variants for name in (dense_form(kron), kron)))


def half_form(variant: str) -> str:
    """The dense variant with half of the latents that another one is held against."""
    dense = dense_form(variant)
    return dense.removesuffix(REFINED) + "-half" + REFINED * dense.endswith(REFINED)


def wins(
    spreads: dict[tuple, Spread],
    better: Callable[[float, float], bool],
    against: Callable[[str], str] = dense_form,
) -> dict[str, int]:
    """Number of points at which each variant beats another one; keys end with a variant.

    Only where both are; a dense form with all latents is held against none.
    """
    counts: dict[str, int] = {}
    for (*point, variant), spread in spreads.items():
        other = spreads.get((*point, against(variant)))
        if other is not None and variant not in (dense_form(variant), against(variant)):
            counts[variant] = counts.get(variant, 0) + better(spread.mean, other.mean)
    return counts
