"""A transformers language model that is read at one hookpoint, and stops there."""

import difflib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kronsae.embedded import EMBEDDED_MODEL, embedded_model_path
from kronsae.errors import InputError

LOGITS_CHUNK = 2048
"""Tokens whose logits are held at once when losses are taken."""


class _Stop(Exception):
    """Ends a forward pass at the hookpoint: nothing after it is wanted."""


class LanguageModel:
    """A frozen model, its tokenizer, and the module whose output is read.

    model: the transformers model, in evaluation mode.  tokenizer: its tokenizer.
    hookpoint: name of the module in `model.named_modules()`.  num_layers: number of blocks.
    d_model: width of the hookpoint's output.
    has_cross_entropy: whether the model predicts the next token (BERT, say, does not).
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, hookpoint: str, facts: dict[str, Any]
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.hookpoint = hookpoint
        self.facts = facts
        self.num_layers = _num_layers(model)
        self.has_cross_entropy = facts["causal"]
        self.module = dict(model.named_modules())[hookpoint]
        ids = torch.full((1, 2), self._any_token(), dtype=torch.int64)
        self.d_model = self.activations(ids).shape[-1]

    @classmethod
    def load(
        cls,
        name_or_path: str,
        *,
        layer: int | None = None,
        hookpoint: str | None = None,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        trust_remote_code: bool = False,
    ) -> "LanguageModel":
        """A model from a folder, the Hugging Face hub, or "embedded".

        layer: the residual stream after block `layer`, counted from 0.
        hookpoint: any module's name instead. Give one of the two ("embedded": layer 2 by default).
        Only safetensors are loaded. Raises InputError for an unknown model, layer or module.
        """
        if (layer is None) == (hookpoint is None) and name_or_path != EMBEDDED_MODEL:
            raise InputError("give a layer or a hookpoint, one of them")
        if name_or_path == EMBEDDED_MODEL and layer is None and hookpoint is None:
            layer = 2
        model, tokenizer, causal = _load(name_or_path, revision, dtype, trust_remote_code)
        if hookpoint is None:
            hookpoint = _block_name(model, name_or_path, layer)
        else:
            _check_module(model, name_or_path, hookpoint)
        import transformers

        facts = {
            "model": name_or_path,
            "revision": revision,
            "commit": getattr(model.config, "_commit_hash", None),
            "hookpoint": hookpoint,
            "dtype": str(dtype).removeprefix("torch."),
            "causal": causal,
            "transformers": transformers.__version__,
        }
        return cls(model.to(device), tokenizer, hookpoint, facts)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def describe(self) -> dict[str, Any]:
        """What identifies the activations (JSON-able)."""
        return dict(self.facts)

    @torch.no_grad()
    def activations(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Output of the hookpoint [b, t, d] for token ids [b, t]; later modules never run.

        Raises InputError if the module's output is no [b, t, d] tensor (or a tuple that begins
        with one), or if it does not run at all.
        """
        found: list[Tensor] = []

        def read(_module: nn.Module, _inputs: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)
            raise _Stop

        with _hook(self.module, read):
            try:
                self._forward(input_ids, attention_mask)
            except _Stop:
                pass
        if not found:
            raise InputError(f"hookpoint {self.hookpoint!r} does not run in a forward pass")
        if not isinstance(found[0], Tensor) or found[0].shape[:2] != input_ids.shape:
            shape = getattr(found[0], "shape", type(found[0]))
            raise InputError(
                f"hookpoint {self.hookpoint!r}: expected an output [b, t, d] for "
                f"{list(input_ids.shape)} tokens, got {shape}"
            )
        return found[0]

    @torch.no_grad()
    def token_losses(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        replace: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Cross-entropy [b, t - 1], float32, nats, of each next token of input_ids [b, t].

        replace: what to put in the place of the hookpoint's output [b, t, d].
        Raises InputError if the model does not predict the next token.
        """
        if not self.has_cross_entropy:
            raise InputError(f"{self.facts['model']} has no next-token head: no cross-entropy")

        def splice(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (replace(output[0]), *output[1:])
            return replace(output)

        with _hook(self.module, splice if replace else None):
            logits = self._forward(input_ids, attention_mask).logits
        targets = input_ids[:, 1:].to(logits.device)
        losses = [
            nn.functional.cross_entropy(part.float(), target, reduction="none")
            for part, target in zip(
                logits[:, :-1].flatten(0, 1).split(LOGITS_CHUNK),
                targets.flatten().split(LOGITS_CHUNK),
                strict=True,
            )
        ]
        return torch.cat(losses).view(targets.shape)

    def _forward(self, input_ids: Tensor, attention_mask: Tensor | None) -> Any:
        options = {}
        if "use_cache" in inspect.signature(self.model.forward).parameters:
            options["use_cache"] = False
        if attention_mask is not None:
            options["attention_mask"] = attention_mask.to(self.device)
        return self.model(input_ids=input_ids.to(self.device), **options)

    def _any_token(self) -> int:
        return next((t for t in self.tokenizer.all_special_ids), 0)


@contextmanager
def _hook(module: nn.Module, function: Callable[..., Any] | None) -> Iterator[None]:
    handle = module.register_forward_hook(function) if function else None
    try:
        yield
    finally:
        if handle:
            handle.remove()


def _load(
    name: str, revision: str | None, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[nn.Module, Any, bool]:
    """Model, tokenizer, and whether it has a causal language-model head."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    place = str(embedded_model_path()) if name == EMBEDDED_MODEL else name
    common = {"revision": revision, "trust_remote_code": trust_remote_code}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(place, **common)
        causal = _is_causal(config)
        loader = AutoModelForCausalLM if causal else AutoModel
        model = loader.from_pretrained(
            place, config=config, torch_dtype=dtype, use_safetensors=True, **common
        )
        tokenizer = AutoTokenizer.from_pretrained(place, **common)
    except Exception as error:  # transformers raises dozens of kinds
        raise InputError(_why_not_loaded(name, error)) from error
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
    return model, tokenizer, causal


def _is_causal(config: Any) -> bool:
    """Whether `config`'s architecture is made to predict the next token."""
    from transformers import AutoModelForCausalLM

    if type(config) not in AutoModelForCausalLM._model_mapping:
        return False
    names = getattr(config, "architectures", None) or []
    encoder = any(n.endswith(("MaskedLM", "ForPreTraining")) for n in names)
    return not encoder and getattr(config, "model_type", "") not in ("bert", "roberta", "electra")


def _why_not_loaded(name: str, error: Exception) -> str:
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if "safetensors" in str(error) and "trust_remote_code" not in str(error):
        return (
            f"model {name!r} has no safetensors weights, and nothing else is loaded: convert it, "
            f"or choose a revision that has them ({reason})"
        )
    return (
        f"model {name!r} could not be loaded, neither as a folder here nor from the Hugging Face "
        f"hub ({type(error).__name__}: {reason})"
    )


def _blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of the model's blocks: the first ModuleList as long as its config says."""
    layers = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            return name, module
    raise InputError(
        f"the blocks of {type(model).__name__} were not found: name a module with --hookpoint"
    )


def _num_layers(model: nn.Module) -> int:
    return model.config.get_text_config().num_hidden_layers


def _block_name(model: nn.Module, name: str, layer: int) -> str:
    prefix, blocks = _blocks(model)
    if not 0 <= layer < len(blocks):
        raise InputError(
            f"layer {layer}: {name} has {len(blocks)} layers, so expected 0 to {len(blocks) - 1}"
        )
    return f"{prefix}.{layer}"


def _check_module(model: nn.Module, name: str, hookpoint: str) -> None:
    names = [each for each, _ in model.named_modules() if each]
    if hookpoint not in names:
        close = difflib.get_close_matches(hookpoint, names, n=4, cutoff=0.3)
        raise InputError(
            f"hookpoint {hookpoint!r}: {name} has no such module; close are {close} "
            "(all: dict(model.named_modules()))"
        )
