"""Summary of the properties of all latents: medians, correlations, gates."""

from typing import Any

import numpy as np

from kronsae.model.sae import SAE
from kronsae.properties.gather import Examined, Properties


def of_each(examined: Examined, tokens: int) -> dict[str, np.ndarray]:
    """The four properties of the paper [N] each; nan for latents that never fire."""
    fires = examined.count > 0
    values = {
        "frequency": examined.count / tokens,
        "mean": examined.mean,
        "entropy": examined.entropy,
        "multitoken": examined.multitoken,
    }
    return {name: np.where(fires, value, np.nan) for name, value in values.items()}


def summarise(sae: SAE, properties: Properties) -> dict[str, Any]:
    """JSON-able figures of a run's properties.

    groups: quartiles of each property over the latents that fire, for "latent", "base" and
        "extension"; and how many of them fire.
    correlation: mean over latents of their mean correlation with their head and with all others.
    gate: share of latents whose base blocks more often, and the median of `selected` (see `gates`).
    """
    tokens, pre = properties.tokens, properties.pre
    groups = {"latent": of_each(properties.post, tokens)}
    correlations = {
        "head": properties.head_correlation,
        "others": properties.other_correlation,
    }
    out: dict[str, Any] = {
        "correlation": {k: _mean(v) for k, v in correlations.items() if v is not None}
    }
    if pre is not None:
        parts = split(sae, of_each(pre, tokens))
        groups |= {name: {k: v.ravel() for k, v in part.items()} for name, part in parts.items()}
        out["gate"] = _gate(sae, properties)
    return {"groups": {name: _quartiles(group) for name, group in groups.items()}, **out}


def split(sae: SAE, values: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Values of all pre-latents [P] as those of the "base" [h, m] and "extension" [h, n]."""
    config = sae.config
    shaped = {k: v.reshape(config.heads, config.m + config.n) for k, v in values.items()}
    return {
        "base": {k: v[:, : config.m] for k, v in shaped.items()},
        "extension": {k: v[:, config.m :] for k, v in shaped.items()},
    }


def gates(sae: SAE, properties: Properties) -> dict[str, np.ndarray]:
    """How base and extension decide on each latent, [h, m, n] each, as shares of all tokens.

    both: both fire.  base_blocks: the extension fires and the base is 0.  extension_blocks: the
    other way round.  selected: of the tokens where both fire, those on which the latent is active.
    The gate of a latent is the factor that blocks more often.
    """
    config = sae.config
    pre, both, tokens = properties.pre, properties.both, properties.tokens
    if pre is None or both is None:
        raise ValueError("a dense encoder has no bases and extensions")
    parts = split(sae, {"count": pre.count})
    base, extension = parts["base"]["count"], parts["extension"]["count"]
    shape = config.heads, config.m, config.n
    return {
        "both": both / tokens,
        "base_blocks": (extension[:, None, :] - both) / tokens,
        "extension_blocks": (base[:, :, None] - both) / tokens,
        "selected": properties.post.count.reshape(shape) / both.clip(min=1),
    }


def _gate(sae: SAE, properties: Properties) -> dict[str, float | None]:
    shares = gates(sae, properties)
    fires = properties.post.count.reshape(shares["both"].shape) > 0
    base_decides = shares["base_blocks"][fires] > shares["extension_blocks"][fires]
    selected = shares["selected"][fires]
    return {
        "base_decides": _mean(base_decides),
        "selected": float(np.median(selected)) if len(selected) else None,
    }


def _quartiles(group: dict[str, np.ndarray]) -> dict[str, Any]:
    fires = np.isfinite(group["frequency"])
    out: dict[str, Any] = {"count": len(fires), "fire": int(fires.sum())}
    for name, values in group.items():
        values = values[np.isfinite(values)]
        quartiles = np.quantile(values, (0.25, 0.5, 0.75)) if len(values) else ()
        out[name] = [float(value) for value in quartiles]
    return out


def _mean(values: np.ndarray) -> float | None:
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else None
