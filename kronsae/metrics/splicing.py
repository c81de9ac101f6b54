"""A language model in whose forward passes something stands for the activations of a hookpoint."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kronsae.data.language_model import LanguageModel, first_tensor, with_first
from kronsae.data.packing import special_ids

Make = Callable[[Tensor, Tensor], Tensor]
"""From the hookpoint's activations x [n, d] and those to replace, y [n, d_out]: new ones for y.

y is x, unless the model has a target hookpoint, whose output a transcoder stands for.
"""


@contextmanager
def spliced(model: LanguageModel, make: Make, mask: Tensor | None = None) -> Iterator[None]:
    """While open, `make` replaces activations in every forward pass of `model.model`.

    mask: [b, t] bool, the n tokens to replace in a forward pass on [b, t].  Without one they are
    all but special tokens and the first position of each text, on which SAEs are not trained: also
    with a key-value cache, padding on either side, beams and samples, as a token's position in its
    text is counted from the attention mask, or else from what the cache holds.

    A module that runs several times in a forward pass is replaced the first time. No other thread
    runs the model meanwhile (it has a lock). Gradients reach what `make` gives.
    """
    forward = _Forward(mask, special_ids(model.tokenizer) if mask is None else None)
    replaced = model.module if model.target is None else model.target

    def begin(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        forward.begin(args, kwargs)

    def read(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if forward.x is None:
            forward.x = first_tensor(output).clone()  # later modules may add to it in place

    def replace(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if forward.replaced:
            return output
        forward.replaced = True
        y = first_tensor(output)
        x = y if model.target is None else forward.x
        tokens = forward.tokens(y)
        out = y.clone()
        out[tokens] = make(x[tokens], y[tokens]).to(y)
        return with_first(output, out)

    with model.lock, ExitStack() as stack:
        hooks = [model.model.register_forward_pre_hook(begin, with_kwargs=True)]
        if model.target is not None:
            hooks.append(model.module.register_forward_hook(read))
        hooks.append(replaced.register_forward_hook(replace))
        for hook in hooks:
            stack.callback(hook.remove)
        yield


class _Forward:
    """What one forward pass reads, and what has happened in it."""

    def __init__(self, mask: Tensor | None, special: Tensor | None) -> None:
        self.mask, self.special = mask, special
        self.begin((), {})

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.x: Tensor | None = None
        self.replaced = False
        self.ids = kwargs.get("input_ids", args[0] if args else None)
        self.attention = kwargs.get("attention_mask")
        # Its name is `past_key_values`, or `cache` in newer transformers.
        caches = (value for value in kwargs.values() if hasattr(value, "get_seq_length"))
        self.seen = max((int(cache.get_seq_length()) for cache in caches), default=0)

    def tokens(self, y: Tensor) -> Tensor:
        """[b, t] bool: which of the activations y [b, t, d] to replace."""
        if self.mask is not None:
            return self.mask.to(y.device)
        length = y.shape[1]
        attention = self.attention
        if torch.is_tensor(attention) and attention.shape == (y.shape[0], self.seen + length):
            attended = attention.bool().to(y.device)
            tokens = attended & (attended.cumsum(1) > 1)
            tokens = tokens[:, -length:]
        else:
            position = torch.arange(self.seen, self.seen + length, device=y.device)
            tokens = (position > 0).expand(y.shape[:2])
        if self.ids is None:
            return tokens
        return tokens & ~torch.isin(self.ids.to(y.device), self.special.to(y.device))
