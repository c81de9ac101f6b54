"""A transformers language model whose activations are read at a hookpoint.

Letters: b contexts, t tokens per context, d width of the hookpoint, V vocabulary size.
"""

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kronsae.config import LOAD_IN, DataConfig, check_model_kwargs
from kronsae.data.common import Interrupted, digest
from kronsae.data.common import reason as error_reason
from kronsae.data.hookpoints import (
    INPUT,
    Hook,
    Site,
    by_position,
    check_layer,
    first_tensor,
    hooks_at,
    lists_of_blocks,
    num_layers,
    site_of,
    with_first,
)
from kronsae.data.images import Images
from kronsae.data.loading import (
    checkpoint_dtype,
    config_of,
    find_tokenizer,
    load_config,
    load_model,
    load_tokenizer,
    main_device,
    quiet,
    stored_weight,
)
from kronsae.data.packing import PADDING, ImageTokens, ModelTokens
from kronsae.embedded import EMBEDDED_MODEL
from kronsae.errors import InputError
from kronsae.system.devices import model_dtype
from kronsae.system.parallel import ALONE

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from typing_extensions import Self

EMBEDDED_LAYER = 2
"""The embedded model's layer if none is given."""

PROBE = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 6, 4, 5]])
"""Token ids on which a model is tried: two texts that differ in one token."""
CHANGED = 2
"""The position of that token."""

HEAD_TOLERANCE = 1e-2
"""Largest difference of logits by the head alone from those of the whole model, over the largest.
Rounding in bfloat16 is less, another input of the head more."""

LOGITS_AT_ONCE = 2**25
"""Logits held in memory while losses are computed (128 MiB in float32)."""


class LanguageModel:
    """A frozen language model, its tokenizer, and the hookpoint where it is read.

    model: a transformers model; put into evaluation mode.
    tokenizer: None if there is none; then token ids alone can be read.
    hookpoint: NAME (the output of a module in `model.named_modules()`), NAME:input, or a site of a
        block such as `6.attn_z`; see `kronsae.data.hookpoints`. It is a tensor [b, t, d] or
        [b t, d], or the first of a tuple or ModelOutput. The attribute has no alias.
    target_hookpoint: the hookpoint that a transcoder predicts; it runs after the first.
    name, revision: the model's origin, for `describe`.
    images: what a vision model reads in place of text; then ids are numbers of images.
    absent: names of weights that the checkpoint lacks, and that are therefore random.
    changes: what makes it another model than its files, for `describe`.

    d_model, d_target: widths of the two, from a tiny forward pass (d_target 0 without a
        target).
    no_cross_entropy: why `token_losses` does not work, in a sentence; None if it does. It does not
        for masked language models (BERT), encoder-decoder models, or if the checkpoint lacks the
        head that predicts the next token.
    An encoder-decoder model reads the same text in both halves.
    Raises InputError if the hookpoint does not exist, does not run on text, is not [b, t, d], is of
    other positions than those of the text, or depends on an absent weight.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: Any,
        hookpoint: str,
        *,
        target_hookpoint: str | None = None,
        name: str = "given",
        revision: str | None = None,
        images: Images | None = None,
        absent: tuple[str, ...] = (),
        changes: dict[str, Any] | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        # Hooks belong to the model, not to a thread: one forward pass at a time.
        self.lock = threading.RLock()
        self.interrupted = threading.Event()
        self.ranks = ALONE.reading
        self._body: nn.Module | None = None
        self.resumes: bool | None = None  # see `kronsae.metrics.splicing.ForwardPasses`
        self.tokenizer = tokenizer
        self.images, self.probe = images, PROBE
        self.vocabulary = ModelTokens(model.config) if tokenizer is None else tokenizer
        """What knows the special tokens."""
        if images is not None:
            images.measure(model, name)
            self.probe, self.vocabulary = images.probe, ImageTokens(images.others)
        self.name, self.revision = name, revision
        self.commit: str | None = getattr(model.config, "_commit_hash", None)
        self.weights = _weights_digest(model)
        for config in (model.config, model.config.get_text_config()):
            config.use_cache = False
        self.absent, self.changes = absent, changes or {}
        self.is_encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
        self.no_cross_entropy: str | None = None
        self.hooks: dict[str, Hook] = {}
        self.sites: dict[str, Site | None] = {}
        self._move(hookpoint, target_hookpoint)
        with torch.no_grad():
            self.no_cross_entropy = self._why_no_cross_entropy()
        self._body = self._find_body()

    def _move(self, hookpoint: str, target_hookpoint: str | None) -> None:
        """Read other hookpoints from now on. Raises InputError as the class says."""
        self.layer: int | None = None
        self.flattened = False
        self.hook = self.hook_at(hookpoint)
        self.target = self.hook_at(target_hookpoint) if target_hookpoint else None
        self.hookpoint = self.hook.name
        self.target_hookpoint = self.target.name if self.target else None
        if self.target_hookpoint == self.hookpoint:
            raise InputError(
                f"target_hookpoint {target_hookpoint!r} of {self.name} is the hookpoint "
                f"{self.hookpoint!r}: an autoencoder predicts its input, leave it out"
            )
        self.d_model, self.d_target = self._probe()

    def at(
        self,
        *,
        layer: int | None = None,
        hookpoint: str | None = None,
        target_hookpoint: str | None = None,
    ) -> "LanguageModel":
        """The same loaded model, read at another layer or hookpoint; see `load`."""

        def moved(name: str) -> LanguageModel:
            other = copy.copy(self)
            other.resumes = None
            other._move(name, target_hookpoint)
            other._body = other._find_body()
            return other

        if hookpoint is not None:
            return moved(hookpoint)
        assert layer is not None
        check_layer(self.name, self.model.config, layer)
        return at_block(moved, self.model, self.name, layer)

    @classmethod
    def load(
        cls,
        name_or_path: str,
        *,
        layer: int | None = None,
        hookpoint: str | None = None,
        target_hookpoint: str | None = None,
        revision: str | None = None,
        dtype: torch.dtype | str = torch.float32,
        device: torch.device | str = "cpu",
        trust_remote_code: bool = False,
        needs_tokenizer: bool = True,
        model_kwargs: dict[str, Any] | None = None,
        load_in: str = LOAD_IN[0],
        device_map: str | None = None,
        images: Images | None = None,
    ) -> "Self":
        """Load a model from a folder or the Hugging Face hub, or "embedded", which kronsae ships.

        layer: the residual stream after this block (from 0), which is the block's output, or
            hidden_states[layer + 1] of transformers (whose last one is normalised in many models).
        hookpoint: the output of any module instead. Give one of the two; "embedded" has a default
            layer.
        target_hookpoint: the module whose output a transcoder predicts.
        revision: branch, tag or commit on the hub.
        needs_tokenizer: False also loads a model without one.
        dtype: also by name; "auto" as `kronsae.system.devices.model_dtype` says.
        model_kwargs: more arguments of from_pretrained, and values that replace its config.json's.
        load_in: "8bit" or "4bit" rounds its matrices, by bitsandbytes.
        device_map: as in from_pretrained, such as "auto", in place of the device.
        images: what the model reads in place of text, by its vision tower.

        Only safetensors files are read, because unpickling can run code.
        Raises InputError if the model cannot be loaded (no such name, no network, no safetensors,
        no tokenizer, missing weights), or has no such layer or module.
        """
        block_or_name = layer_or_hookpoint(name_or_path, layer, hookpoint)
        with quiet():
            check_model_kwargs(model_kwargs or {})
            named = name_or_path, revision, trust_remote_code, model_kwargs
            config = load_config(*named, images is not None)
            if isinstance(block_or_name, int):
                check_layer(name_or_path, config, block_or_name)
            if isinstance(dtype, str):
                dtype = model_dtype(dtype, torch.device(device), checkpoint_dtype(config))
            common = {"revision": revision, "trust_remote_code": trust_remote_code}
            find = load_tokenizer if needs_tokenizer else find_tokenizer
            tokenizer = None if images is not None else find(name_or_path, common)
            placing: dict[str, Any] = {
                "kwargs": model_kwargs,
                "load_in": load_in,
                "device_map": device_map,
            }
            model, absent = load_model(name_or_path, config, dtype, common, device, **placing)
        changes: dict[str, Any] = {"model_kwargs": model_kwargs} if model_kwargs else {}
        if load_in != LOAD_IN[0]:
            changes["load_in"] = load_in
        if images is not None:
            changes["image_processor"] = images.digest
        at = partial(
            cls,
            model,
            tokenizer,
            name=name_or_path,
            revision=revision,
            images=images,
            absent=absent,
            changes=changes,
            target_hookpoint=target_hookpoint,
        )
        if isinstance(block_or_name, str):
            return at(block_or_name)
        return at_block(at, model, name_or_path, block_or_name)

    @classmethod
    def of(cls, data: DataConfig, device: torch.device | str) -> "Self":
        """Load the model that `data` names, read at its layer or hookpoint; see `load`."""
        device = torch.device(device)
        return cls.load(
            data.model,
            layer=data.layer,
            hookpoint=data.hookpoint,
            target_hookpoint=data.target_hookpoint,
            revision=data.revision,
            dtype=data.model_dtype,
            device=device,
            trust_remote_code=data.trust_remote_code,
            # Another column than that of text may hold token ids.
            needs_tokenizer=data.text_column == DataConfig.text_column,
            model_kwargs=data.model_kwargs,
            load_in=data.load_in,
            device_map=data.device_map,
            images=None if data.image_column is None else Images(data),
        )

    def hook_at(self, hookpoint: str) -> Hook:
        """Where the model has a hookpoint. Raises InputError if it does not have it."""
        if hookpoint not in self.hooks:
            with self._on_text():
                hook = hooks_at(self.model, self.name, hookpoint, self._run_probe)[0]
            self.hooks[hookpoint] = self.hooks.setdefault(hook.name, hook)
        return self.hooks[hookpoint]

    def site_at(self, hookpoint: str) -> str | None:
        """The name of a hookpoint that all models share, such as `6.attn_z`, if it has one."""
        if hookpoint not in self.sites:
            self.sites[hookpoint] = site_of(self.model, self.hook_at(hookpoint), self._run_probe)
        site = self.sites[hookpoint]
        return None if site is None else str(site)

    def _run_probe(self) -> None:
        with torch.no_grad(), self.lock:
            self._run(self.probe, None)

    @property
    def vocab_size(self) -> int:
        """Number of tokens that the model knows, or of images."""
        if self.images is not None:
            return len(self.images)
        embeddings = self.model.get_input_embeddings()
        return getattr(embeddings, "num_embeddings", self.model.config.get_text_config().vocab_size)

    @property
    def has_cross_entropy(self) -> bool:
        """Whether `token_losses` works."""
        return self.no_cross_entropy is None

    def _why_no_cross_entropy(self) -> str | None:
        kind = type(self.model).__name__
        reason = None
        if self.images is not None:
            reason = "reads images, and predicts no next token"
        elif kind.endswith("ForMaskedLM"):
            reason = "predicts masked tokens, not the next one"
        elif self.is_encoder_decoder:
            reason = "is an encoder-decoder model, whose decoder could copy from its encoder"
        elif self.model.get_output_embeddings() is None:
            reason = "has no head that predicts the next token"
        elif self.absent:
            reason = f"has no trained head for the next token (its files lack {self.absent[0]!r})"
        else:
            try:
                logits = self._run(PROBE, None).logits
                first, other = logits[:, :CHANGED].float()
                if logits.shape[:2] != PROBE.shape:
                    reason = f"gives logits {list(logits.shape)} for tokens {list(PROBE.shape)}"
                elif not torch.allclose(first, other, rtol=HEAD_TOLERANCE, atol=HEAD_TOLERANCE):
                    reason = "sees the tokens that it predicts"
            except Exception as error:  # of the model's code
                reason = f"does not run to its end on text alone ({error_reason(error)})"
        return reason and f"{self.name} ({kind}) {reason}"

    @torch.no_grad()
    def _find_body(self) -> nn.Module | None:
        """The part of the model that gives the hidden states for its head.

        None if the head cannot run apart from it: that is tried on a few tokens. Also without
        cross-entropy.
        """
        if self.no_cross_entropy is not None:
            return None
        whole = self._run(PROBE, None).logits[:, :-1].flatten(0, 1)
        parts = self.hook.module_name.split(".")
        around = [".".join(parts[:count]) for count in range(1, len(parts))]
        modules = [self.model.get_submodule(name) for name in around]
        for body in (self.model.base_model, self.model.get_decoder(), *modules):
            read = (self.target or self.hook).module
            inside = body is not None and read in set(body.modules())
            if body is None or body is self.model or not inside:
                continue
            try:
                states = LastStates(PROBE.to(self.device), self._body_output(body, PROBE), None)
                apart = torch.cat([x for _, x in self._logits_of(body, states)])
            except Exception:  # noqa: S112  # of the model's code, which expects more
                continue
            scale = whole.abs().max().clamp(min=1e-6)
            if (apart - whole).abs().max() <= HEAD_TOLERANCE * scale:
                return body
        return None

    @property
    def device(self) -> torch.device:
        """Where token ids go and activations come from, also if parts are on other devices."""
        return main_device(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which it computes; rounded matrices are integers."""
        floating = (p.dtype for p in self.model.parameters() if p.is_floating_point())
        return next(floating, torch.float32)

    @property
    def parameters(self) -> int:
        """Number of its parameters, also of rounded ones."""
        return self.model.num_parameters()

    @property
    def max_context(self) -> int | None:
        """Longest context that the model reads, in tokens; None if its config does not say.

        Of images it is the only length.
        """
        if self.images is not None:
            return self.images.positions
        return max_context(self.model)

    def describe(self) -> dict[str, Any]:
        """Everything that identifies the activations (JSON-able), the same on every device."""
        target = self.target_hookpoint
        known = {
            "site": self.site_at(self.hook.name),
            "target_hookpoint": target,
            "target_site": target and self.site_at(target),
        }
        return {
            "name": self.name,
            "revision": self.revision,
            "commit": self.commit,
            "weights": self.weights,
            "hookpoint": self.hookpoint,
            "d_model": self.d_model,
            **{name: value for name, value in known.items() if value is not None},
            "dtype": str(self.dtype).removeprefix("torch."),
            **self.changes,
        }

    @torch.no_grad()
    def activations(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The hookpoint's hidden states [b, t, d], in the model's dtype, for token ids [b, t].

        With a target, its own are appended: [b, t, d_model + d_target].
        The forward pass ends there: later blocks and the head do not run.
        If several `ranks` share the work, all call this with the same contexts; each runs a part of
        them and receives the rest from the others.
        Raises InputError if they are not [b, t, d], or if the target runs before the input;
        Interrupted after `interrupt`.
        """
        with self.lock, self._interruptible():
            return self.ranks.map(self._activations, input_ids, attention_mask)

    @property
    def points(self) -> tuple["LanguageModel", ...]:
        """Where activations are read: here alone, of `ManyHookpoints` at each hookpoint."""
        return (self,)

    def activations_of_points(self, input_ids: Tensor) -> list[Tensor]:
        """`activations` of each of the `points`."""
        return [self.activations(input_ids)]

    def interrupt(self) -> None:
        """Make `activations` raise Interrupted at the next block, until `interrupted` is cleared.

        May be called from a signal handler, also while another thread runs a forward pass.
        """
        self.interrupted.set()

    def _activations(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        outputs = self._read(self._names, input_ids, attention_mask)
        if next(iter(outputs)) == self.target_hookpoint:
            raise runs_before(self.name, self.target_hookpoint, self.hookpoint)
        return self._joined(outputs)

    @property
    def _names(self) -> list[str]:
        """The hookpoint and, if there is one, the target."""
        return [self.hookpoint] + ([self.target_hookpoint] if self.target_hookpoint else [])

    def _joined(self, outputs: dict[str, Tensor]) -> Tensor:
        """[b, t, d_model + d_target] from the outputs of modules by name."""
        parts = [outputs[name] for name in self._names]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    @torch.no_grad()
    def activations_at(self, hookpoints: Sequence[str], input_ids: Tensor) -> list[Tensor]:
        """Hidden states [b, t, d] at several hookpoints, in one forward pass, for token ids [b, t].

        The forward pass ends once all of them have run; a module's first run counts.
        Raises InputError if a hookpoint does not exist, does not run, or is not [b, t, d].
        """
        outputs = self._read(hookpoints, input_ids, None)
        return [outputs[name] for name in hookpoints]

    def _read(
        self, hookpoints: Sequence[str], input_ids: Tensor, attention_mask: Tensor | None
    ) -> dict[str, Tensor]:
        """`activations_at` by name, in the order in which the modules run."""
        hooks = {name: self.hook_at(name) for name in hookpoints}
        outputs: dict[str, Tensor] = {}

        def keep(name: str, hidden: Any) -> None:
            if name in outputs:
                return
            outputs[name] = self._hidden(hidden, input_ids, name)
            if len(outputs) == len(hooks):
                raise _Stop(hidden)
            outputs[name] = outputs[name].clone()  # later modules may add to it in place

        with ExitStack() as stack:
            for name, hook in hooks.items():
                stack.enter_context(hook.reading(partial(keep, name)))
            try:
                self._run(input_ids, attention_mask)
            except _Stop:
                return outputs
        silent = next(name for name in hookpoints if name not in outputs)
        raise InputError(
            f"hookpoint {silent!r} of {self.name} does not run in a forward pass: it is a "
            f"{type(hooks[silent].module).__name__}; name a module inside it, or another one"
        )

    @torch.no_grad()
    def token_losses(self, input_ids: Tensor) -> Tensor:
        """Cross-entropy of each next token: [b, t - 1] float32, in nats, for token ids [b, t].

        It is 0 where the next token is PADDING.
        Memory: the model's own for [b, t] tokens, and about LOGITS_AT_ONCE logits.
        Raises InputError if the model does not predict the next token.
        """
        states = self.last_states(input_ids)
        targets = states.ids[:, 1:].flatten()
        losses = torch.zeros(targets.shape, device=targets.device)
        for rows, logits in self.next_token_logits(states):
            losses[rows] = cross_entropy(logits.float(), targets[rows], reduction="none")
        return losses.view(states.ids.shape[0], -1)

    @torch.no_grad()
    def last_states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> "LastStates":
        """Hidden states before the head, for token ids [b, t]; pass them to `next_token_logits`.

        Raises InputError if the model does not predict the next token.
        """
        if self.no_cross_entropy is not None:
            raise InputError(f"there is no cross-entropy: {self.no_cross_entropy}")
        ids = input_ids.to(self.device)
        body = self._body
        with self.lock:
            if body is None:
                return LastStates(ids, None, self._run(ids, attention_mask).logits)
            return LastStates(ids, self._body_output(body, ids, attention_mask), None)

    @torch.no_grad()
    def next_token_logits(self, states: "LastStates") -> "Iterator[tuple[Rows, Tensor]]":
        """Logits [n, V] of each next token, with its place in the flattened [b (t - 1)] tokens.

        PADDING is no next token. The head (and scaling of its logits) runs on about LOGITS_AT_ONCE
        logits at a time.
        """
        if states.logits is not None:
            logits = states.logits[:, :-1].flatten(0, 1)
            [rows] = _next_tokens(states.ids, len(logits))
            yield rows, logits[rows]
            return
        assert self._body is not None
        yield from self._logits_of(self._body, states)

    @torch.no_grad()
    def _logits_of(self, body: nn.Module, states: "LastStates") -> "Iterator[tuple[Rows, Tensor]]":
        """`next_token_logits` of the hidden states that `body` gives."""
        hidden = first_tensor(states.output)[:, :-1].flatten(0, 1).to(states.ids.device)
        ids = states.ids[:, 1:].flatten()
        size = max(1, LOGITS_AT_ONCE // self.model.config.get_text_config().vocab_size)
        for rows in _next_tokens(states.ids, size):
            output = with_first(states.output, hidden[rows][None])
            # No name here keeps the logits while others of the text are asked for.
            yield rows, self._head(body, output, ids[rows])

    def _head(self, body: nn.Module, output: Any, ids: Tensor) -> Tensor:
        """Logits [n, V] of hidden states that `body` gave."""
        with self.lock, replaced_output(body, output):
            # Not `self.model(...)`: its hooks would count another forward pass.
            return self.model.forward(input_ids=ids[None]).logits[0]

    def logits(self, input_ids: Tensor) -> Tensor:
        """All logits [b, t, V], differentiable; for a few short contexts."""
        with self.lock:
            return self._run(input_ids.to(self.device), None).logits

    def _run(self, input_ids: Tensor, attention_mask: Tensor | None) -> Any:
        if self.images is not None:
            pixels = self.images.pixels(input_ids[:, 0].tolist())
            return self.model(pixel_values=pixels.to(self.device, self.dtype))
        # Without a mask some models derive one from the padding token, which may also end texts.
        there = input_ids != PADDING
        mask = there.to(input_ids.dtype) if attention_mask is None else attention_mask
        ids, mask = (input_ids * there).to(self.device), mask.to(self.device)
        if not self.is_encoder_decoder:
            return self.model(input_ids=ids, attention_mask=mask)
        # Without these the decoder reads the text from one position further left, or nothing.
        halves = {"decoder_input_ids": ids, "decoder_attention_mask": mask}
        return self.model(input_ids=ids, attention_mask=mask, **halves)

    def _body_output(self, body: nn.Module, input_ids: Tensor, mask: Tensor | None = None) -> Any:
        """The output of the model without its head; the forward pass ends there."""

        def stop(_module: nn.Module, _inputs: Any, output: Any) -> None:
            raise _Stop(output)

        with body.register_forward_hook(stop):
            try:
                self._run(input_ids, mask)
            except _Stop as stopped:
                return stopped.output
        raise InputError(f"the body of {self.name} does not run in a forward pass")

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        def stop(_module: nn.Module, _inputs: Any, _output: Any) -> None:
            if self.interrupted.is_set():
                raise Interrupted

        with ExitStack() as stack:
            for _, blocks in lists_of_blocks(self.model):
                for block in blocks:
                    stack.enter_context(block.register_forward_hook(stop))
            yield

    def _hidden(self, hidden: Any, input_ids: Tensor, hookpoint: str) -> Tensor:
        own, hidden = hidden, by_position(hidden, input_ids.shape)
        self.flattened |= hidden is not own
        if isinstance(hidden, Tensor) and hidden.ndim == 3 and hidden.shape[:2] == input_ids.shape:
            return hidden.to(self.device)
        got = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        raise InputError(
            f"hookpoint {hookpoint!r} of {self.name}: expected an "
            f"{'input' if hookpoint.endswith(INPUT) else 'output'} [b, t, d], "
            f"{[*input_ids.shape, 'd']} for this input, got {got}: choose another module"
        )

    def _probe(self) -> tuple[int, int]:
        """d_model and d_target, from a tiny forward pass.

        Raises InputError if the model does not run on text, uses an absent weight, or gives the
        activations of other positions: a token that changes must change them at its own position,
        and, unless it changes all of them, at none before.
        """
        used: set[nn.Module] = set()
        with ExitStack() as stack:
            for m in self.model.modules():
                stack.enter_context(m.register_forward_pre_hook(lambda m, _: used.add(m)))
            with self._on_text():
                outputs = self.activations(self.probe)
                d_model = width = outputs.shape[2]
                if self.target is not None:
                    [hidden] = self.activations_at([self.hookpoint], self.probe)
                    d_model = hidden.shape[2]
        last = self.target or self.hook
        if last.of_input:  # the forward pass ends before this module
            used.discard(last.module)
        names = {id(m): name for name, m in self.model.named_modules()}
        owners = {names[id(m)] for m in used}
        random = [weight for weight in self.absent if weight.rpartition(".")[0] in owners]
        if random:
            raise InputError(
                f"model {self.name!r}: its files lack {len(random)} weights that "
                f"{self.hookpoint!r} depends on, such as {random[0]!r}: they would be random. "
                f"Is this a checkpoint of {type(self.model).__name__}?"
            )
        self._check_positions(outputs)
        return d_model, width - d_model

    @contextmanager
    def _on_text(self) -> Iterator[None]:
        """Raises InputError for an error of the model's code."""
        try:
            yield
        except (InputError, Interrupted):
            raise
        except Exception as error:
            raise InputError(
                f"model {self.name!r} ({type(self.model).__name__}) does not run on "
                + ("images" if self.images else "text alone")
                + f" ({error_reason(error)}): activations are read as a model reads them"
            ) from error

    def _check_positions(self, outputs: Tensor) -> None:
        """Raise InputError unless outputs [2, t, d] for the probe are those of its positions."""
        if self.images is not None:
            self._check_patches(outputs, self.images.changed)
            return
        changed = _changed(outputs)
        if not changed[CHANGED]:
            # The first ids may be special tokens that no training told apart, so that rounding to 8
            # bits makes them one.
            probe = PROBE.clone()
            probe[1, CHANGED] = self.vocab_size // 2
            changed = _changed(self.activations(probe))
        before = changed[:CHANGED]
        moved = not changed[CHANGED] or before.any() and not before.all()
        if before.all():  # it reads both ways: what a text of one token changes is at its position
            first, other = self.activations(PROBE[:, CHANGED, None]).float()
            moved = torch.equal(first, other)
        if moved:
            raise InputError(
                f"hookpoint {self.hookpoint!r} of {self.name}: another token at position {CHANGED} "
                f"changes its output at positions {changed.nonzero()[:, 0].tolist()}, so it is not "
                "that of the text, position by position. Choose another module"
            )
        if self.flattened and not self._in_order(outputs):
            raise InputError(
                f"hookpoint {self.hookpoint!r} of {self.name}: its rows are not the tokens of one "
                "text after those of another, so they are not read as positions. Choose another "
                "module"
            )

    def _check_patches(self, outputs: Tensor, at: int) -> None:
        """Raise InputError unless the patch that differs, at a position, changes its output."""
        if torch.equal(*outputs[:, at]) or self.flattened and not self._in_order(outputs):
            raise InputError(
                f"hookpoint {self.hookpoint!r} of {self.name}: another patch at position {at} does "
                "not change its output there, so it is not that of the image, patch by patch. "
                "Choose another module"
            )

    def _in_order(self, outputs: Tensor) -> bool:
        """Whether a text alone gives its part of outputs [2, t, d] for PROBE.

        It does not if rows [b t, d] begin with the first tokens of all texts, or are sorted.
        """
        alone = torch.cat([self.activations(text[None]) for text in self.probe]).float()
        tolerance = max(1e-3, 8 * torch.finfo(outputs.dtype).eps)
        return bool(((alone - outputs).abs() <= tolerance * outputs.abs().amax(2, True)).all())


Rows = slice | Tensor
"""Places of tokens: a range, or their indices [n]."""


def _next_tokens(ids: Tensor, size: int) -> Iterable[Rows]:
    """Places in the flattened [b (t - 1)] of the next tokens of ids [b, t], `size` at a time."""
    there = ids[:, 1:].flatten() != PADDING
    if not there.all():
        return there.nonzero()[:, 0].split(size)
    count = len(there)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _changed(outputs: Tensor) -> Tensor:
    """[t] bool: the positions at which outputs [2, t, d] for PROBE differ by more than rounding.

    At `CHANGED`, more than where nothing has to change: one number of a massive activation may hide
    what becomes of all others.
    """
    first, other = outputs.float()
    differences = (first - other).abs().amax(1) / first.abs().amax(1).clamp(min=1e-30)
    # Rounding may differ with the other tokens of a batch (experts), by a few units.
    rounding = 8 * torch.finfo(outputs.dtype).eps
    changed = differences > rounding
    changed[CHANGED] = differences[CHANGED] > differences[:CHANGED].max().clamp(max=rounding)
    return changed


class LastStates(NamedTuple):
    """Hidden states of a forward pass before the head."""

    ids: Tensor
    """[b, t] token ids."""
    output: Any
    """Output of the model without its head; None if the head cannot run separately."""
    logits: Tensor | None
    """[b, t, V], only if `output` is None."""


class _Stop(Exception):
    """Ends a forward pass; holds the output of the last module that ran."""

    def __init__(self, output: Any) -> None:
        self.output = output


@contextmanager
def replaced_output(module: nn.Module, output: Any) -> Iterator[None]:
    """Make `module` return `output` without running."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = lambda *_args, **_kwargs: output
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before


# A model's structure


def max_context(model: Any) -> int | None:
    """Longest context that a model of text reads, in tokens; None if its config does not say."""
    config = model.config.get_text_config()
    names = ("max_position_embeddings", "max_target_positions", "max_seq_len")
    positions = next(filter(None, (getattr(config, name, None) for name in names)), None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    # RoBERTa counts positions from padding_idx + 1, so it reads fewer than it has.
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            return min(positions, module.num_embeddings) - padding - 1
    return positions


def runs_before(model: str, target: str, hookpoint: str) -> InputError:
    """The error for a target that runs before the activations that are to predict it."""
    return InputError(
        f"target_hookpoint {target!r} of {model} runs before {hookpoint!r}: a transcoder predicts "
        "what comes later"
    )


def layer_or_hookpoint(name: str, layer: int | None, hookpoint: str | None) -> int | str:
    """The one that is given, or the embedded model's layer. Raises InputError otherwise."""
    if layer is not None and hookpoint is not None:
        raise InputError(f"layer {layer} and hookpoint {hookpoint!r}: expected one of them")
    if hookpoint is not None:
        return hookpoint
    if layer is None and name != EMBEDDED_MODEL:
        raise InputError(
            f"model {name!r}: which activations? Give --layer N (the residual stream after block "
            "N, from 0) or --hookpoint NAME (such as N.attn_z)"
        )
    return EMBEDDED_LAYER if layer is None else layer


def layers_of(data: DataConfig) -> range:
    """The layers of the model that `data` names, from its configuration. Raises InputError."""
    return range(num_layers(config_of(data)))


Loaded = TypeVar("Loaded", bound=LanguageModel)


def at_block(
    at: Callable[[str], Loaded], model: "PreTrainedModel", name: str, layer: int
) -> Loaded:
    """The model read at block `layer` of the first list of blocks that gives hidden states."""
    problem: InputError | None = None
    for blocks, _ in lists_of_blocks(model):
        try:
            read = at(f"{blocks}.{layer}")
            read.layer = layer
            return read
        except InputError as error:  # the blocks of an image encoder, for example, do not run
            problem = problem or error
    if problem is not None:
        raise problem
    raise InputError(
        f"model {name!r}: no list of {num_layers(model.config)} blocks found in "
        f"{type(model).__name__}, so --layer has no meaning: name a module with --hookpoint"
    )


def _weights_digest(model: nn.Module) -> str:
    """Hash of the first few elements of each weight, wherever it is kept."""

    def begin(name: str) -> tuple[Any, ...]:
        with stored_weight(model, name) as weight:
            return (name, *weight.shape, *weight.detach().reshape(-1)[:4].float().tolist())

    # Where weights are left on the disk, those that are the same are no longer the same tensor.
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    names = [name for name, _ in model.named_parameters() if name not in tied]
    return digest(*map(begin, names))
