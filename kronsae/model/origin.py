"""Where an SAE's activations come from, as its metadata say."""

import re
from dataclasses import dataclass
from typing import Any

from kronsae.data.hookpoints import Site
from kronsae.system.documents import part_of


@dataclass(frozen=True)
class Origin:
    """Origin of an SAE's activations, as far as its metadata say."""

    model: str | None = None
    hookpoint: str | None = None
    """Where `transformers`' model was read; see `kronsae.data.hookpoints`."""
    target_hookpoint: str | None = None
    site: Site | None = None
    """What the hookpoint is to its block, if that is known."""
    target_site: Site | None = None
    layer: int | None = None
    """The block, if the hookpoint is the residual stream after one."""
    context_length: int | None = None
    dataset: str | None = None
    prepend_bos: bool | None = None
    """Whether contexts begin with the tokenizer's BOS token; None: not known, or otherwise."""
    begin: tuple[str, ...] = ()
    """The tokens with which contexts begin."""
    skipped: int | None = None
    """Positions at the start of each context that the SAE was not trained on, as it was not on
    special tokens. None: not known."""

    @classmethod
    def of(cls, metadata: dict[str, Any]) -> "Origin":
        """The origin in the metadata of a run, or of another library's file."""
        data = part_of(metadata, "data")
        settings = part_of(metadata, "config", "data")
        if data.get("source") == "cache":  # its description names the hookpoints alone
            names = _of(list, data.get("hookpoints")) or []
            sites = _of(list, data.get("sites")) or []
            known = dict(zip(("hookpoint", "target_hookpoint"), names, strict=False))
            known |= dict(zip(("site", "target_site"), sites, strict=False))
            data = {"name": settings.get("model"), "layer": settings.get("layer"), **known, **data}
        hookpoint = _of(str, data.get("hookpoint"))
        target = _of(str, data.get("target_hookpoint"))
        layer = _of(int, data.get("layer"))
        layer = layer_of(hookpoint) if layer is None else layer
        site, target_site = (
            Site.of(_of(str, data.get(name))) or Site.of(point)
            for name, point in (("site", hookpoint), ("target_site", target))
        )
        if site is None and layer is not None:
            site = Site(layer, "resid_post")
        begin = _of(list, data.get("context_begin"))
        return cls(
            model=_of(str, data.get("name")),
            hookpoint=hookpoint,
            target_hookpoint=target,
            site=site,
            target_site=target_site,
            layer=layer,
            context_length=_of(int, data.get("context_length")),
            dataset=_of(str, part_of(metadata, "config", "data").get("dataset")),
            prepend_bos=_of(bool, data.get("prepend_bos")),
            begin=tuple(map(str, begin or ())),
            skipped=None if begin is None else max(1, len(begin)),
        )


def _of(kind: type, value: Any) -> Any:
    return value if type(value) is kind else None


_BLOCK = re.compile(r"blocks\.([0-9]{1,9})\.hook_resid_post|.+\.([0-9]{1,9})")


def layer_of(hookpoint: str | None) -> int | None:
    """N of a hookpoint that is the output of a block; None for other hookpoints.

    Its name is `….N`, or `blocks.N.hook_resid_post` in TransformerLens.
    """
    match = _BLOCK.fullmatch(hookpoint or "")
    return int(match[1] or match[2]) if match else None
