"""KronSAE as an architecture of SAELens, for inference.

    import kronsae.interop.sae_lens                     # registers "kronsae"
    sae = sae_lens.SAE.load_from_disk("exported")       # or SAE.from_pretrained("owner/name", id)

or, without a folder, `KronSAE.wrap(kronsae.load("run"))`. There is no training class, because
SAELens trains by dense pre-activations [B, F], which KronSAE avoids: train with `kronsae train`,
export with `kronsae export RUN --to sae_lens`.

From a checkout: `pip install -e '.[sae-lens]'`. Letters: B tokens, d width, F latents.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from sae_lens import SAE, SAEConfig, register_sae_class
from sae_lens.registry import SAE_CLASS_REGISTRY
from torch import Tensor, nn

from kronsae.config import SAEConfig as OwnConfig
from kronsae.config import from_dict
from kronsae.errors import InputError
from kronsae.interop.lens_format import ARCHITECTURE, check_own, metadata_of, reshaping
from kronsae.interop.stock import encoder_proxy
from kronsae.model.sae import SAE as OwnSAE
from kronsae.system.tensors import dense
from kronsae_kernels import SparseCodes

_PREFIX = "sae."


@dataclass
class KronSAEConfig(SAEConfig):
    """SAELens' settings, and those of `kronsae.SAEConfig` in `kronsae`."""

    apply_b_dec_to_input: bool = False
    kronsae: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    def __post_init__(self) -> None:
        super().__post_init__()
        own = from_dict(OwnConfig, self.kronsae, "cfg.kronsae")
        check_own(own)
        for name, value in (("d_in", own.d_model), ("d_sae", own.dict_size)):
            if getattr(self, name) != value:
                raise InputError(
                    f"{name}: {getattr(self, name)} disagrees with {value} in cfg.kronsae"
                )
        if self.normalize_activations != "none" or self.apply_b_dec_to_input:
            raise InputError(
                "a KronSAE takes raw activations: expected normalize_activations 'none' and "
                "apply_b_dec_to_input False"
            )


class KronSAE(SAE[KronSAEConfig]):
    """`kronsae.SAE`, in `self.sae`, behind SAELens' interface: dense latents [..., F].

    encode runs kronsae's kernels and writes their codes into a dense tensor. As there are no
    pre-activations of F latents, `hook_sae_acts_pre` is never called; all other hooks are.
    `W_enc` is a proxy (`kronsae.interop.stock.encoder_proxy`), computed when it is read.
    """

    sae: OwnSAE

    @classmethod
    def wrap(cls, sae: OwnSAE) -> "KronSAE":
        """Convert an SAE. Raises InputError for a transcoder."""
        check_own(sae.config)
        facts = metadata_of(sae)
        settings = {
            "architecture": ARCHITECTURE,
            "d_in": sae.d_model,
            "d_sae": sae.dict_size,
            "kronsae": dataclasses.asdict(sae.config),
            "reshape_activations": reshaping(facts),
            "metadata": facts,
        }
        wrapped = cls(KronSAEConfig.from_dict(settings))
        wrapped.sae.load_state_dict(sae.state_dict())
        return wrapped.to(device=str(sae.W_dec.device))

    def initialize_weights(self) -> None:
        config = from_dict(OwnConfig, self.cfg.kronsae, "cfg.kronsae")
        self.sae = OwnSAE(config, device=self.device).to(self.dtype).eval()

    @property
    def W_dec(self) -> nn.Parameter:
        """[F, d]"""
        return self.sae.W_dec

    @property
    def b_dec(self) -> nn.Parameter:
        """[d]"""
        return self.sae.b_dec

    @property
    def W_enc(self) -> Tensor:
        """[d, F], a proxy."""
        return encoder_proxy(self.sae)[0].T

    @property
    def b_enc(self) -> Tensor:
        """[F], a proxy."""
        return encoder_proxy(self.sae)[1]

    def train(self, mode: bool = True) -> "KronSAE":
        """Set the mode of the hooks; the SAE inside stays in evaluation mode."""
        super().train(mode)
        self.sae.eval()
        return self

    def encode_sparse(self, x: Tensor) -> SparseCodes:
        """Codes of x [..., d], without a dense tensor."""
        return self.sae.encode(self.process_sae_in(x))

    def encode(self, x: Tensor) -> Tensor:
        """Latents [..., F] of x [..., d], in the dtype of the weights."""
        codes = self.encode_sparse(x)
        return self.hook_sae_acts_post(dense(codes, self.cfg.d_sae).to(self.dtype))

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Reconstruction [..., d] of latents [..., F]."""
        out = self.hook_sae_recons(feature_acts @ self.W_dec + self.b_dec)
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(out), self.d_head)

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        for name in list(state_dict):
            state_dict[name.removeprefix(_PREFIX)] = state_dict.pop(name).contiguous()

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        for name in list(state_dict):
            state_dict[_PREFIX + name] = state_dict.pop(name)

    def fold_W_dec_norm(self) -> None:
        raise NotImplementedError(
            "decoder rows of a KronSAE have unit norm already, and a latent of two projections has "
            "no encoder row for the norm"
        )

    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        raise NotImplementedError("a KronSAE takes raw activations: there is no factor to fold")

    def fold_activation_whitening(self, *matrices: Tensor, **named: Tensor) -> None:
        raise NotImplementedError("a KronSAE takes raw activations: there is nothing to fold")


def register() -> None:
    """Register the architecture with SAELens, also if this module is imported again."""
    known = SAE_CLASS_REGISTRY.get(ARCHITECTURE)
    if known is not None and known[0].__module__ == __name__:
        del SAE_CLASS_REGISTRY[ARCHITECTURE]
    register_sae_class(ARCHITECTURE, KronSAE, KronSAEConfig)


register()
