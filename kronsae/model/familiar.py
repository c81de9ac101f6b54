"""What a user of other SAE libraries types first, and what an SAE says of itself.

Methods here may call rooms above, which nothing else in this room does.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kronsae.config import SAEConfig, kind_of
from kronsae.model.origin import Origin
from kronsae.registry import SELECTIONS

if TYPE_CHECKING:
    from typing_extensions import Self

    from kronsae.features import TargetModel

ELSEWHERE = {
    "d_in": "sae.config.d_model",
    "d_sae": "sae.dict_size",
    "hook_name": "sae.cfg.hook_name",
    "save_model": "sae.save(FOLDER)",
    "save_inference_model": "sae.save(FOLDER)",
    "run_with_cache": "sae.encode(x), or kronsae.language_model(sae).features(TEXT)",
    "hook_sae_acts_post": "sae.encode(x)",
    "fold_W_dec_norm": "sae.use_unit_rows_(), which most SAEs do not need",
    "turn_on_forward_pass_hook_z_reshaping": "x.flatten(-2): activations are [..., d]",
    "use_error_term": "kronsae.interventions.intervene, which keeps the SAE's error",
    "features": "kronsae.language_model(sae).features(TEXT)",
    "steer": "kronsae.language_model(sae).steer({LATENT: STRENGTH})",
}
"""Names of other libraries, and of ours in another place, with what does their job here."""


class Settings(SimpleNamespace):
    """An SAE's settings by SAELens' names."""

    def to_dict(self) -> dict[str, Any]:
        """All of them, those in `metadata` as a dict, too."""
        return vars(self) | {"metadata": vars(self.metadata)}


class Familiar(nn.Module):
    """Methods of `SAE` that hand over to the rest of the package."""

    config: SAEConfig
    metadata: dict[str, Any]
    source: str | None = None
    """What `kronsae.load` loaded it from, as it was given."""

    @classmethod
    def from_pretrained(
        cls, release: str, sae_id: str | None = None, device: str = "cpu", **more: Any
    ) -> "Self":
        """`kronsae.load` under SAELens' name.

        release: what `kronsae.load` takes, such as a folder or "owner/name", with the SAE's folder
            there as sae_id; or a release of SAELens' registry, such as "gpt2-small-res-jb", with
            the SAE's id there (needs sae-lens).
        more: other arguments of `kronsae.load`.
        """
        from kronsae.interop.load import load
        from kronsae.interop.pretrained import REGISTRY

        if sae_id is not None and "/" not in release and not Path(release).exists():
            release, sae_id = f"{REGISTRY}{release}/{sae_id}", None
        return load(release, subfolder=sae_id, device=device, **more)  # type: ignore[return-value]

    @classmethod
    def load_from_disk(cls, path: str | Path, device: str = "cpu", **more: Any) -> "Self":
        """`kronsae.load` under another of SAELens' names. more: other arguments of it."""
        from kronsae.interop.load import load

        return load(path, device=device, **more)  # type: ignore[return-value]

    def language_model(self, **given: Any) -> "TargetModel":
        """The language model that this SAE reads; see `kronsae.language_model`."""
        from kronsae.features import language_model

        return language_model(self, **given)  # type: ignore[arg-type]

    def push_to_hub(self, repo_id: str, **more: Any) -> str:
        """Upload it to the Hugging Face hub; see `kronsae.hub.push`. Returns the URL."""
        from kronsae.hub import push

        return push(self, repo_id, **more)  # type: ignore[arg-type]

    @property
    def device(self) -> torch.device:
        """Of its weights."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return next(self.parameters()).dtype

    @property
    def k(self) -> int:
        """Active latents a token, as `config.k`."""
        return self.config.k

    @property
    def cfg(self) -> Settings:
        """The settings by SAELens' names, to read: architecture, d_in, d_sae, k, hook_name, …

        `config` has all of them, by our names.
        """
        origin = Origin.of(self.metadata)
        source = {
            "model_name": origin.model,
            "hook_name": origin.site.lens if origin.site else origin.hookpoint,
            "hook_layer": origin.layer,
            "context_size": origin.context_length,
            "prepend_bos": origin.prepend_bos,
            "dataset_path": origin.dataset,
        }
        return Settings(
            architecture=self._architecture,
            d_in=self.config.d_model,
            d_sae=self.config.dict_size,
            k=self.config.k,
            dtype=str(self.dtype).removeprefix("torch."),
            device=str(self.device),
            normalize_activations="none",  # it takes raw ones
            apply_b_dec_to_input=False,
            metadata=SimpleNamespace(**source),
            **source,
        )

    @property
    def _architecture(self) -> str:
        """SAELens' name of the kind: "kronsae", "topk", "jumprelu", "gated", "standard", …"""
        config = self.config
        if config.encoder != "dense":
            return "kronsae" if config.heads else config.encoder
        return {"relu": "standard"}.get(config.selection, config.selection)

    def __repr__(self) -> str:
        """What it is, in two lines: kind and size; where it reads, and how long it was trained."""
        config, origin = self.config, Origin.of(self.metadata)
        heads = f" ({config.heads:,} heads of {config.m} x {config.n})" if config.heads else ""
        width = f"{config.d_model}" + (f" to {config.d_target}" if config.d_target else "")
        text = f"{kind_of(vars(config))}: F = {config.dict_size:,} latents{heads}"
        text += f", {SELECTIONS[config.selection].describe(config)}, d = {width}"
        where = origin.site or origin.hookpoint
        known = [f"reads {where} of {origin.model}" if where and origin.model else ""]
        if tokens := self.metadata.get("tokens"):
            known.append(f"trained on {tokens:,} tokens")
        return "\n  ".join(filter(None, (text, "; ".join(filter(None, known)))))

    def __getattr__(self, name: str) -> "Tensor | nn.Module":
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name not in ELSEWHERE:
                raise
            raise AttributeError(f"an SAE has no {name!r}: use {ELSEWHERE[name]}") from error
