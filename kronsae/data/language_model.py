"""A transformers language model that is read at one hookpoint, and stops there.

Letters: b contexts, t tokens a context, d width of the hookpoint's output, V tokens known.
"""

import dataclasses
import difflib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kronsae.data.common import Interrupted, digest
from kronsae.data.loading import load_config, load_model, load_tokenizer, quiet
from kronsae.embedded import EMBEDDED_MODEL
from kronsae.errors import InputError
from kronsae.system.parallel import ALONE

EMBEDDED_LAYER = 2
"""Layer of the embedded model where none is given."""

LOGITS_AT_ONCE = 2**25
"""Logits that exist at the same time while losses are taken (128 MiB in float32)."""


class LanguageModel:
    """A frozen language model, its tokenizer, and the module whose output is read.

    model: the transformers model, in evaluation mode.  tokenizer: its tokenizer.
    hookpoint: name of the module in `model.named_modules()`; it must give a tensor [b, t, d], or a
        tuple or ModelOutput that begins with one.
    target_hookpoint: for a transcoder, another one, which runs after the first.
    name, revision: where the model came from, for `describe`.
    absent: names of weights that no checkpoint filled, and that are random.

    Also attributes: d_model and d_target, the widths of the hookpoint's and the target's outputs,
    seen in a tiny forward pass (d_target 0 without a target).
    has_cross_entropy: whether `token_losses` works. It does not for models made to fill in masked
    tokens (BERT), nor where the head that predicts the next token was not in the checkpoint.
    Raises InputError if the hookpoint does not exist, does not run, gives no [b, t, d], or if a
    weight that it depends on is absent.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        hookpoint: str,
        *,
        target_hookpoint: str | None = None,
        name: str = "given",
        revision: str | None = None,
        absent: tuple[str, ...] = (),
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        # Hooks belong to the model, not to the thread that set them: one forward pass at a time.
        self.lock = threading.RLock()
        self.interrupted = threading.Event()
        self.ranks = ALONE.reading
        self.tokenizer = tokenizer
        self.hookpoint = hookpoint
        self.name, self.revision = name, revision
        self.commit: str | None = getattr(model.config, "_commit_hash", None)
        self.weights = _weights_digest(model)
        for config in (model.config, model.config.get_text_config()):
            config.use_cache = False
        self.absent = absent
        self.has_cross_entropy = _is_causal(model) and not absent
        self.module = find_module(model, name, hookpoint)
        self.target_hookpoint = target_hookpoint
        self.target = find_module(model, name, target_hookpoint) if target_hookpoint else None
        self.d_model, self.d_target = self._probe()

    @classmethod
    def load(
        cls,
        name_or_path: str,
        *,
        layer: int | None = None,
        hookpoint: str | None = None,
        target_hookpoint: str | None = None,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        trust_remote_code: bool = False,
    ) -> "LanguageModel":
        """A model from a folder, from the Hugging Face hub, or "embedded", which ships with us.

        layer: reads the residual stream after block `layer`, counted from 0, which is the block's
            output: hidden_states[layer + 1] of transformers, except that many models normalise
            the last of those.  hookpoint: reads the output of any module instead.
            Give one of them; "embedded" has a default layer.
        target_hookpoint: also reads the output of this module, as what a transcoder predicts.
        revision: branch, tag or commit on the hub.

        Only safetensors files are read, so that no code runs that came with the weights.
        Raises InputError if the model cannot be had (no such name, no network, no safetensors, no
        tokenizer, a part of the weights missing), or has no such layer or module.
        """
        if layer is None and hookpoint is None:
            if name_or_path != EMBEDDED_MODEL:
                raise InputError(
                    f"model {name_or_path!r}: which activations? Give --layer N (the residual "
                    "stream after block N, from 0) or --hookpoint MODULE_NAME"
                )
            layer = EMBEDDED_LAYER
        if layer is not None and hookpoint is not None:
            raise InputError(f"layer {layer} and hookpoint {hookpoint!r}: expected one of them")
        with quiet():
            config = load_config(name_or_path, revision, trust_remote_code)
            if layer is not None:
                check_layer(name_or_path, config, layer)
            common = {"revision": revision, "trust_remote_code": trust_remote_code}
            tokenizer = load_tokenizer(name_or_path, common)
            model, absent = load_model(name_or_path, config, dtype, common)
        model = model.to(device)
        facts = {
            "name": name_or_path,
            "revision": revision,
            "absent": absent,
            "target_hookpoint": target_hookpoint,
        }
        if hookpoint is not None:
            return cls(model, tokenizer, hookpoint, **facts)
        return _at_block(cls, model, tokenizer, layer, facts)

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return _num_layers(self.model.config)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def max_context(self) -> int | None:
        """Longest context that the model was made for, in tokens; None if its config has none."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if not isinstance(positions, int) or positions <= 0:
            return None
        # RoBERTa counts positions from padding_idx + 1: two fewer than it has embeddings for.
        usable = getattr(self.tokenizer, "model_max_length", positions)
        return usable if positions - usable in (1, 2) else positions

    def describe(self) -> dict[str, Any]:
        """What identifies the activations, JSON-able; the same on every device."""
        return {
            "name": self.name,
            "revision": self.revision,
            "commit": self.commit,
            "weights": self.weights,
            "hookpoint": self.hookpoint,
            "d_model": self.d_model,
            **({"target_hookpoint": self.target_hookpoint} if self.target_hookpoint else {}),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @torch.no_grad()
    def activations(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The hookpoint's output [b, t, d], in the model's dtype, for token ids [b, t].

        With a target its output follows behind: [b, t, d_model + d_target].
        The forward pass ends there: later blocks and the head never run.
        Where `ranks` share the work, all of them call this with the same contexts: each reads its
        part of them, and gets what the others read.
        Raises InputError if an output is no [b, t, d], or if the target runs before the input;
        Interrupted after `interrupt`.
        """
        with self.lock, self._interruptible():
            return self.ranks.map(self._activations, input_ids, attention_mask)

    def interrupt(self) -> None:
        """Let `activations` raise Interrupted, at the next block, until `interrupted` is cleared.

        May be called from a signal's handler, and while another thread is in a forward pass.
        """
        self.interrupted.set()

    def _activations(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        if self.target is None:
            output = self._run_to(self.module, input_ids, attention_mask)
            return self._hidden(output, input_ids, self.hookpoint)
        with self._reading() as read:
            output = self._run_to(self.target, input_ids, attention_mask)
        if not read:
            raise InputError(
                f"target_hookpoint {self.target_hookpoint!r} of {self.name} runs before "
                f"{self.hookpoint!r}: a transcoder predicts what comes later"
            )
        hidden = self._hidden(read[0], input_ids, self.hookpoint)
        return torch.cat([hidden, self._hidden(output, input_ids, self.target_hookpoint)], -1)

    @torch.no_grad()
    def activations_at(self, hookpoints: Sequence[str], input_ids: Tensor) -> list[Tensor]:
        """The outputs [b, t, d] of several modules, in one forward pass, for token ids [b, t].

        The forward pass ends once all of them have run. A module's first run counts.
        Raises InputError if there is no such module, one does not run, or gives no [b, t, d].
        """
        read: dict[str, Tensor] = {}

        def keep(name: str, output: Any) -> None:
            if name not in read:
                # A copy: later modules may add to it in place.
                read[name] = self._hidden(output, input_ids, name).clone()
            if len(read) == len(set(hookpoints)):
                raise _Stop(output)

        with ExitStack() as stack:
            for name in dict.fromkeys(hookpoints):
                module = find_module(self.model, self.name, name)
                hook = lambda _module, _inputs, output, name=name: keep(name, output)  # noqa: E731
                stack.enter_context(_hook(module, hook))
            try:
                self._run(input_ids, None)
            except _Stop:
                return [read[name] for name in hookpoints]
        silent = next(name for name in hookpoints if name not in read)
        raise InputError(f"hookpoint {silent!r} of {self.name} does not run in a forward pass")

    @torch.no_grad()
    def token_losses(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Cross-entropy of each next token: [b, t - 1] float32, in nats, for token ids [b, t].

        Memory: the model's own for [b, t] tokens, and about LOGITS_AT_ONCE logits.
        Raises InputError if the model does not predict the next token.
        """
        states = self.last_states(input_ids, attention_mask)
        targets = states.ids[:, 1:].flatten()
        losses = torch.empty(targets.shape, device=targets.device)
        for rows, logits in self.next_token_logits(states):
            losses[rows] = _cross_entropy(logits, targets[rows])
        return losses.view(states.ids.shape[0], -1)

    @torch.no_grad()
    def last_states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> "LastStates":
        """What the model makes of token ids [b, t] before its head; for `next_token_logits`.

        Raises InputError if the model does not predict the next token.
        """
        if not self.has_cross_entropy:
            raise InputError(
                f"model {self.name!r} has no trained head for the next token, so there is no "
                "cross-entropy (only models for causal language modelling have one)"
            )
        ids = input_ids.to(self.device)
        body = self.model.base_model
        with self.lock:
            if body is self.model or (self.target or self.module) not in set(body.modules()):
                return LastStates(ids, None, self._run(ids, attention_mask).logits)
            return LastStates(ids, self._run_to(body, ids, attention_mask), None)

    @torch.no_grad()
    def next_token_logits(self, states: "LastStates") -> Iterator[tuple[slice, Tensor]]:
        """Logits [n, V] of each next token, and which of the flattened [b (t - 1)] tokens they are.

        The head, and what the model does to its logits, runs on about LOGITS_AT_ONCE at a time.
        """
        if states.logits is not None:
            logits = states.logits[:, :-1].flatten(0, 1)
            yield slice(0, len(logits)), logits
            return
        hidden = first_tensor(states.output)[:, :-1].flatten(0, 1)
        ids = states.ids[:, 1:].flatten()
        size = max(1, LOGITS_AT_ONCE // self.model.config.get_text_config().vocab_size)
        for start in range(0, len(hidden), size):
            rows = slice(start, min(start + size, len(hidden)))
            output = with_first(states.output, hidden[rows][None])
            with self.lock, _stand_in(self.model.base_model, output):
                # Not by a call: hooks of the model take this for another forward pass.
                logits = self.model.forward(input_ids=ids[rows][None]).logits[0]
            yield rows, logits

    def logits(self, input_ids: Tensor) -> Tensor:
        """All logits [b, t, V] at once, for a few short contexts, differentiably."""
        with self.lock:
            return self._run(input_ids.to(self.device), None).logits

    def _run(self, input_ids: Tensor, attention_mask: Tensor | None) -> Any:
        # Without a mask some models guess one from the padding token, which may end texts as well.
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.model(input_ids=input_ids.to(self.device), attention_mask=mask.to(self.device))

    def _run_to(self, module: nn.Module, input_ids: Tensor, attention_mask: Tensor | None) -> Any:
        """The output of `module` when it first runs; nothing runs after it."""

        def stop(_module: nn.Module, _inputs: Any, output: Any) -> None:
            raise _Stop(output)

        with _hook(module, stop):
            try:
                self._run(input_ids, attention_mask)
            except _Stop as stopped:
                return stopped.output
        raise InputError(
            f"hookpoint {self.hookpoint!r} of {self.name} does not run in a forward pass: it is "
            f"a {type(module).__name__}; name one of the modules in it, or another"
        )

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        def stop(_module: nn.Module, _inputs: Any, _output: Any) -> None:
            if self.interrupted.is_set():
                raise Interrupted

        with ExitStack() as stack:
            for _, blocks in lists_of_blocks(self.model):
                for block in blocks:
                    stack.enter_context(_hook(block, stop))
            yield

    @contextmanager
    def _reading(self) -> Iterator[list[Any]]:
        """Collect what the hookpoint gives, each time it runs."""
        read: list[Any] = []

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            hidden = first_tensor(output)
            # A copy: later modules may add to it in place.
            read.append(hidden.clone() if isinstance(hidden, Tensor) else hidden)

        with _hook(self.module, keep):
            yield read

    def _hidden(self, output: Any, input_ids: Tensor, hookpoint: str) -> Tensor:
        hidden = first_tensor(output)
        if isinstance(hidden, Tensor) and hidden.ndim == 3 and hidden.shape[:2] == input_ids.shape:
            return hidden
        got = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        raise InputError(
            f"hookpoint {hookpoint!r} of {self.name}: expected an output [b, t, d], "
            f"{[*input_ids.shape, 'd']} for this input, got {got}: choose another module"
        )

    def _probe(self) -> tuple[int, int]:
        """d_model and d_target, from a tiny forward pass; fails if it uses an absent weight."""
        used: set[nn.Module] = set()
        hooks = [
            m.register_forward_pre_hook(lambda m, _: used.add(m)) for m in self.model.modules()
        ]
        try:
            ids = torch.arange(1, 7).view(2, 3)
            both = self.activations(ids).shape[2]
            d_model = both
            if self.target is not None:
                output = self._run_to(self.module, ids, None)
                d_model = self._hidden(output, ids, self.hookpoint).shape[2]
        finally:
            for handle in hooks:
                handle.remove()
        names = {id(m): name for name, m in self.model.named_modules()}
        owners = {names[id(m)] for m in used}
        random = [weight for weight in self.absent if weight.rpartition(".")[0] in owners]
        if random:
            raise InputError(
                f"model {self.name!r}: its files lack {len(random)} weights that "
                f"{self.hookpoint!r} depends on, {random[0]!r} for one: they would be random. "
                f"Is this a checkpoint of {type(self.model).__name__}?"
            )
        return d_model, both - d_model


class LastStates(NamedTuple):
    """What a forward pass came to before its head."""

    ids: Tensor
    """[b, t] token ids that it read."""
    output: Any
    """Of the model's body; None where the head cannot be run alone."""
    logits: Tensor | None
    """[b, t, V] in its place."""


class _Stop(Exception):
    """Ends a forward pass, with the output of the module that it got to."""

    def __init__(self, output: Any) -> None:
        self.output = output


@contextmanager
def _hook(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(function)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _stand_in(module: nn.Module, output: Any) -> Iterator[None]:
    """Let `module` give `output` without running."""
    before = module.__dict__.get("forward")
    module.forward = lambda *_args, **_kwargs: output
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def first_tensor(output: Any) -> Any:
    """Hidden states in a module's output: itself, or the first part of a tuple or ModelOutput."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):  # a ModelOutput
        return next(iter(output.values()), None)
    return output[0] if isinstance(output, (tuple, list)) and output else output


def with_first(output: Any, hidden: Tensor) -> Any:
    """`output` with `hidden` in the place of `first_tensor(output)`."""
    if isinstance(output, Tensor):
        return hidden
    if isinstance(output, dict):
        return dataclasses.replace(output, **{next(iter(output)): hidden})
    return type(output)((hidden, *output[1:]))


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """[n] float32 for logits [n, V] and targets [n]."""
    return nn.functional.cross_entropy(logits.float(), targets, reduction="none")


# Looking into a model


def _num_layers(config: Any) -> int:
    return config.get_text_config().num_hidden_layers


def check_layer(name: str, config: Any, layer: int) -> None:
    layers = _num_layers(config)
    if not 0 <= layer < layers:
        raise InputError(
            f"layer {layer}: {name} has {layers} blocks, so expected 0 to {layers - 1} "
            "(layer N is the residual stream after block N)"
        )


def _at_block(
    cls: type[LanguageModel], model: nn.Module, tokenizer: Any, layer: int, facts: dict[str, Any]
) -> LanguageModel:
    """Reads out block `layer` of the first list of blocks that gives hidden states."""
    problem: InputError | None = None
    for name, _ in lists_of_blocks(model):
        try:
            return cls(model, tokenizer, f"{name}.{layer}", **facts)
        except InputError as error:  # the blocks of an image encoder, say, do not run
            problem = problem or error
    if problem is not None:
        raise problem
    raise InputError(
        f"model {facts['name']!r}: no list of {_num_layers(model.config)} blocks found in "
        f"{type(model).__name__}, so --layer has no meaning: name a module with --hookpoint"
    )


def lists_of_blocks(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """The lists of as many modules as the model has blocks, with their names."""
    layers = _num_layers(model.config)
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == layers
    ]


def find_module(model: nn.Module, name: str, hookpoint: str) -> nn.Module:
    modules = dict(model.named_modules())
    if hookpoint in modules:
        return modules[hookpoint]
    close = difflib.get_close_matches(hookpoint, modules, n=4, cutoff=0.5)
    hint = f"close are {', '.join(close)}; " if close else ""
    raise InputError(
        f"hookpoint {hookpoint!r}: {name} has no such module; {hint}to list all: "
        f"print(*dict(LanguageModel.load({name!r}, layer=0).model.named_modules()), sep='\\n')"
    )


def _is_causal(model: nn.Module) -> bool:
    """Whether the model predicts the next token (it was loaded as such, and it is no encoder)."""
    name = type(model).__name__
    return model.get_output_embeddings() is not None and not name.endswith("ForMaskedLM")


def _weights_digest(model: nn.Module) -> str:
    """Identifies the weights by the first few elements of each."""
    return digest(
        *(
            (name, *p.shape, *p.detach().reshape(-1)[:4].float().tolist())
            for name, p in model.named_parameters()
        )
    )
