"""Replacement of the activations of a hookpoint in a language model's forward passes."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from kronsae.data.hookpoints import by_position, first_tensor, lists_of_blocks
from kronsae.data.language_model import LanguageModel, LastStates, replaced_output
from kronsae.data.packing import left_out_ids
from kronsae.model.massive import MassiveTokens

Make = Callable[[Tensor, Tensor], Tensor]
"""Function of the hookpoint's activations x [n, d] and those to replace, y [n, d_out], to new y.

y is x, unless the model has a target hookpoint, which is replaced then.
"""


@contextmanager
def spliced(
    model: LanguageModel,
    make: Make,
    mask: Tensor | None = None,
    massive: MassiveTokens | None = None,
    first: int = 1,
    excluded: str = "",
) -> Iterator[None]:
    """While open, `make` replaces activations in every forward pass of `model.model`.

    mask: [b, t] bool, the n tokens to replace in a forward pass on [b, t]. By default all but
        special tokens, those `excluded` (`left_out_ids`), and the `first` positions of each text,
        on which SAEs are not trained. This works with a key-value cache, padding on either side,
        beams and samples: a token's position comes from the attention mask, or else from the length
        of the cache.
    massive: the rule for tokens in the mask that keep their activations, whatever `make` gives.

    If a module runs several times in a forward pass, its first run counts. The model's lock
    keeps other threads from running it. Gradients flow to the result of `make`.
    """
    left_out = left_out_ids(model.vocabulary, excluded) if mask is None else None
    forward = _Forward(mask, left_out, first)

    def begin(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        forward.begin(args, kwargs)

    def read(hidden: Tensor) -> None:
        if forward.x is None:
            forward.x = forward.by_position(hidden).clone()  # modules may add to it in place

    def replace(hidden: Tensor) -> Tensor:
        if forward.replaced:
            return hidden
        forward.replaced = True
        y = forward.by_position(hidden)
        x = y if forward.x is None else forward.x.to(y.device)
        tokens = forward.tokens(y)
        of_x, of_y = x[tokens], y[tokens]
        made = make(of_x, of_y).to(y)
        if massive is not None:
            kept = massive(of_x, None if model.target is None else of_y)
            made = torch.where(kept[:, None], of_y, made)
        out = y.clone()
        out[tokens] = made
        return out.view_as(hidden)

    with model.lock, ExitStack() as stack:
        stack.enter_context(model.model.register_forward_pre_hook(begin, with_kwargs=True))
        if model.target is not None:
            stack.enter_context(model.hook.reading(read))
        stack.enter_context((model.target or model.hook).replacing(replace))
        yield


class ForwardPasses:
    """Forward passes of a language model over the same contexts: unchanged, then spliced.

    The blocks before that of the hookpoint run once, in the first pass; the others begin after
    them, if that changes no bit (`resumes`).
    clean: hidden states of the unchanged pass; `forget` them to free their memory.
    """

    def __init__(self, model: LanguageModel, ids: Tensor) -> None:
        self.model, self.ids = model, ids
        self.skipped = _blocks_before(model)
        self.output: Any = None  # of the last of these blocks

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if self.output is None:
                self.output = output

        with model.lock, ExitStack() as stack:
            if self.skipped:
                hook = self.skipped[-1].register_forward_hook(keep)
                stack.callback(hook.remove)
            self.clean: LastStates = model.last_states(ids)

    def forget(self) -> None:
        del self.clean

    def spliced(self, make: Make, mask: Tensor, massive: MassiveTokens | None = None) -> LastStates:
        """Hidden states of a pass in which `make` replaces activations; see `spliced`."""
        # Tried before anything is replaced.
        resumed = self._resumed() if self.output is not None and self.resumes else nullcontext()
        with spliced(self.model, make, mask, massive), resumed:
            return self.model.last_states(self.ids)

    @contextmanager
    def _resumed(self) -> Iterator[None]:
        """While open, the blocks before the hookpoint's do not run."""
        with ExitStack() as stack:
            for block in self.skipped:
                stack.enter_context(replaced_output(block, self.output))
            yield

    @property
    def resumes(self) -> bool:
        """Whether a pass that skips the first blocks gives the bits of a whole one.

        It does not where later blocks read something else of them, or add to their output in
        place. Tried once a model, on a few tokens.
        """
        if self.model.resumes is None:
            few = ForwardPasses(self.model, self.ids[:1, :PROBE_TOKENS])
            try:
                with few._resumed():
                    again = [self.model.last_states(few.ids) for _ in range(2)]
                states = [s.logits if s.output is None else s.output for s in (few.clean, *again)]
                clean, *others = map(first_tensor, states)
                self.model.resumes = all(torch.equal(clean, other) for other in others)
            except Exception:  # of the model's code, which expects what it did not get
                self.model.resumes = False
        return self.model.resumes


PROBE_TOKENS = 32


def _blocks_before(model: LanguageModel) -> list[nn.Module]:
    """The blocks before the one in which the hookpoint lies; [] if it is not in a block."""
    for name, blocks in lists_of_blocks(model.model):
        inside = model.hook.module_name.removeprefix(f"{name}.")
        if inside != model.hook.module_name:
            return list(blocks)[: int(inside.partition(".")[0])]
    return []


class _Forward:
    """State of a forward pass: its inputs, and whether activations were replaced.

    mask: the tokens to replace, or None: all but the `left_out` and the first ones.
    """

    def __init__(self, mask: Tensor | None, left_out: Tensor | None, first: int) -> None:
        self.mask, self.left_out, self.first = mask, left_out, first
        self.begin((), {})

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.x: Tensor | None = None
        self.replaced = False
        self.ids = kwargs.get("input_ids", args[0] if args else None)
        given = kwargs.get("inputs_embeds") if self.ids is None else self.ids
        self.shape = None if given is None else given.shape[:2]
        self.attention = kwargs.get("attention_mask")
        # The argument is `past_key_values`, or `cache` in newer transformers.
        caches = (value for value in kwargs.values() if hasattr(value, "get_seq_length"))
        self.seen = max((int(cache.get_seq_length()) for cache in caches), default=0)

    def by_position(self, hidden: Tensor) -> Tensor:
        """Hidden states [b, t, d] of this forward pass, of those or [b t, d]."""
        return hidden if self.shape is None else by_position(hidden, self.shape)

    def tokens(self, y: Tensor) -> Tensor:
        """Mask [b, t] of the activations y [b, t, d] to replace."""
        if self.mask is not None:
            return self.mask.to(y.device)
        length = y.shape[1]
        attention = self.attention
        if torch.is_tensor(attention) and attention.shape == (y.shape[0], self.seen + length):
            attended = attention.bool().to(y.device)
            tokens = attended & (attended.cumsum(1) > self.first)
            tokens = tokens[:, -length:]
        else:
            position = torch.arange(self.seen, self.seen + length, device=y.device)
            tokens = (position >= self.first).expand(y.shape[:2])
        if self.ids is None or self.left_out is None:
            return tokens
        return tokens & ~torch.isin(self.ids.to(y.device), self.left_out.to(y.device))
