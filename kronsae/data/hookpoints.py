"""Hookpoints: where a language model's activations are read and replaced.

A hookpoint is NAME (the output of a module), NAME:input (its input), or a site of a block, whose
name is the same in all models: `6.attn_z`, or TransformerLens' `blocks.6.attn.hook_z`.

Letters: b contexts, t tokens per context, d width, N number of a block.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from itertools import product
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from kronsae.errors import InputError
from kronsae.system.devices import as_double

INPUT = ":input"
"""The end of a hookpoint that is a module's input."""

ATTENTION = ("self_attn", "attn", "attention", "self_attention")
PROJECTION = ("o_proj", "out_proj", "c_proj", "dense", "wo", "Wo")
MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "fc1")
"""Names that models give to a block's attention, to its output projection, and to its MLP (or to
the first layer of an MLP that is no module)."""

SITES = {
    "resid_pre": "hook_resid_pre",
    "attn_z": "attn.hook_z",
    "attn_out": "hook_attn_out",
    "resid_mid": "hook_resid_mid",
    "mlp_in": "mlp.hook_in",
    "mlp_out": "hook_mlp_out",
    "resid_post": "hook_resid_post",
}
"""Sites of a block, in the order of a forward pass, and TransformerLens' names inside a block."""

_NOT_READ = {
    "hook_mlp_in": "in TransformerLens it comes before or after the norm, depending on the "
    "version; what the MLP receives is {0}.mlp_in, and before the norm is {0}.resid_mid",
    "ln2.hook_normalized": "in TransformerLens it comes before or after the norm's weights, "
    "depending on the model; what the MLP receives is {0}.mlp_in",
}
"""TransformerLens' names that could be mistaken for a site."""

_PARALLEL_TYPES = ("gptj", "codegen", "phi", "cohere", "cohere2")
_PARALLEL_SETTINGS = ("use_parallel_residual", "parallel_attn", "new_decoder_architecture")
"""Types and settings of models whose attention and MLP run in parallel."""

_NO_SUM = (
    "no outputs of its modules, added to resid_pre, give resid_post: it scales them, or a norm "
    "comes after the sum"
)
_WHY_NOT = {
    "attn_z": f"expected a module {', '.join(ATTENTION)}, with one output projection inside "
    f"({', '.join(PROJECTION)})",
    "attn_out": f"{_NO_SUM}, or its attention is not called {', '.join(ATTENTION)}",
    "resid_mid": "no module reads resid_pre + attn_out: attention and MLP run in parallel, or a "
    "norm comes after the sum",
    "mlp_in": f"expected a module {', '.join(MLP)}",
    "mlp_out": f"{_NO_SUM}, or its MLP is not called {', '.join(MLP)}",
}


class Site(NamedTuple):
    """An activation of block `layer` that has one name in all models, such as `6.attn_z`."""

    layer: int
    name: str

    @classmethod
    def of(cls, hookpoint: str | None) -> "Site | None":
        """The site that a hookpoint names, also by TransformerLens' name; None if it names none."""
        parts = re.fullmatch(r"(blocks\.)?(\d{1,9})\.(.+)", hookpoint or "", flags=re.ASCII)
        if parts is None:
            return None
        of_lens, layer, name = parts.groups()
        names = {lens if of_lens else site: site for site, lens in SITES.items()}
        return cls(int(layer), names[name]) if name in names else None

    def __str__(self) -> str:
        return f"{self.layer}.{self.name}"

    @property
    def lens(self) -> str:
        """TransformerLens' name (`mlp.hook_in` is one of its TransformerBridge alone)."""
        return f"blocks.{self.layer}.{SITES[self.name]}"


@dataclasses.dataclass(frozen=True)
class Hook:
    """One side of a module of a language model, where activations are read and replaced.

    of_input: its input (the first tensor that it is given, or `hidden_states`), not its output.
    site: what it is to a block, if it was found as that; see `site_of`.
    """

    module_name: str
    module: nn.Module
    of_input: bool = False
    site: Site | None = None

    @property
    def name(self) -> str:
        """The hookpoint, without an alias."""
        return self.module_name + INPUT * self.of_input

    @property
    def declared_width(self) -> int | None:
        """The width by the module's own attribute; None if it has none."""
        return getattr(self.module, "in_features" if self.of_input else "out_features", None)

    def reading(self, keep: Callable[[Any], None]) -> AbstractContextManager[Any]:
        """While open, `keep` is given the hidden states whenever the module runs."""

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            keep(_first_input(args, kwargs))

        def after(_module: nn.Module, _inputs: Any, output: Any) -> None:
            keep(first_tensor(output))

        if self.of_input:
            return self.module.register_forward_pre_hook(before, with_kwargs=True)
        return self.module.register_forward_hook(after)

    def replacing(self, make: Callable[[Tensor], Tensor]) -> AbstractContextManager[Any]:
        """While open, `make(x)`, of the same shape, replaces hidden states x."""

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return _with_input(args, kwargs, make(_first_input(args, kwargs)))

        def after(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            return with_first(output, make(first_tensor(output)))

        if self.of_input:
            return self.module.register_forward_pre_hook(before, with_kwargs=True)
        return self.module.register_forward_hook(after)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Middle(Hook):
    """`resid_mid`: the input of the module that reads the sum of `before` and `added`.

    What that module is given is only a part of the stream's way: the stream goes on beside it. So
    a replacement changes `added`, and with it the sum.
    """

    before: Hook
    added: Hook

    @property
    def name(self) -> str:
        return str(self.site)

    @contextmanager
    def replacing(self, make: Callable[[Tensor], Tensor]) -> Iterator[None]:
        stream: list[Tensor] = []

        def keep(x: Tensor) -> None:
            stream[:] = [x.clone()]

        def changed(added: Tensor) -> Tensor:
            x = stream[0].to(added.device).view_as(added) + added
            return added + (make(x) - x)

        with self.before.reading(keep), self.added.replacing(changed):
            yield


class Reached(Exception):
    """Ends a forward pass at a hookpoint."""


def hooks_at(
    model: nn.Module, name: str, hookpoint: str, run: Callable[[], Any] | None = None
) -> list[Hook]:
    """Where the model `name` has `hookpoint`: in one place, or one for each list of its blocks.

    run: runs the model on a few tokens, which shows what adds up to the residual stream. Without
        it, as on the meta device, a site that only a sum can show is replaced by a place with the
        same width.
    Raises InputError if there is no such module, or the block has no such site.
    """
    modules = dict(model.named_modules())
    module_name = hookpoint.removesuffix(INPUT)
    if module_name in modules:
        hook = Hook(module_name, modules[module_name], hookpoint.endswith(INPUT))
        return [hook]
    site = Site.of(hookpoint)
    if site is None:
        raise InputError(_no_such(name, hookpoint, modules))
    check_layer(name, model.config, site.layer)
    hooks, problems = [], []
    for list_name, blocks in lists_of_blocks(model):
        try:
            block = _Block(list_name, blocks[site.layer], site.layer)
            what = f"hookpoint {hookpoint!r} of {name}"
            hooks.append(block.at(site.name, what, run, _is_parallel(model.config)))
        except InputError as error:  # the blocks of an image encoder, for example, do not run
            problems.append(error)
    if not hooks:
        raise (
            problems[0]
            if problems
            else InputError(
                f"hookpoint {hookpoint!r}: no list of blocks found in {type(model).__name__}, so a "
                f"block's {site.name} has no meaning: name a module"
            )
        )
    return hooks


def _no_such(name: str, hookpoint: str, modules: dict[str, nn.Module]) -> str:
    layer, _, inside = hookpoint.removeprefix("blocks.").partition(".")
    if hookpoint.startswith("blocks.") and inside in _NOT_READ:
        return f"hookpoint {hookpoint!r} is not read: {_NOT_READ[inside].format(layer)}"
    close = difflib.get_close_matches(hookpoint.removesuffix(INPUT), modules, n=4, cutoff=0.5)
    hint = f"close are {', '.join(close)}; " if close else ""
    return (
        f"hookpoint {hookpoint!r}: {name} has no such module; {hint}block N has "
        f"{', '.join(f'N.{site}' for site in SITES)}; to list all modules: "
        f"print(*dict(LanguageModel.load({name!r}, layer=0).model.named_modules()), sep='\\n')"
    )


def site_of(model: nn.Module, hook: Hook, run: Callable[[], Any]) -> Site | None:
    """What a module's side is to its block; None if it is no site of one. run: as in `hooks_at`."""
    if hook.site is not None:
        return hook.site
    try:
        lists = lists_of_blocks(model)
    except InputError:  # there are no blocks
        return None
    for list_name, blocks in lists:
        inside = hook.module_name.removeprefix(f"{list_name}.")
        if inside == hook.module_name:
            continue
        layer = int(inside.partition(".")[0])
        block = _Block(list_name, blocks[layer], layer)
        sites = block.by_name()
        if all(hook.name != known.name for known in sites.values()):
            try:
                sites |= block.by_sum(run)
            except Exception:  # of the model's code: it says so when it is read
                return None
        return next((s.site for s in sites.values() if s.name == hook.name), None)
    return None


class _Block:
    """A block of a language model, whose sites are found by names of its modules and by sums."""

    def __init__(self, list_name: str, module: nn.Module, layer: int) -> None:
        self.name, self.module, self.layer = f"{list_name}.{layer}", module, layer
        self.children = [name for name, _ in module.named_children()]
        self.attention = next((name for name in ATTENTION if name in self.children), None)
        self.mlp = next((name for name in MLP if name in self.children), None)

    def at(self, site: str, what: str, run: Callable[[], Any] | None, parallel: bool) -> Hook:
        """The hook of a site. what: the hookpoint, for InputError if there is none.

        parallel: whether attention and MLP are known to run in parallel.
        """
        sites = self.by_name()
        sites = self._alike(parallel) | sites if run is None else sites | self.by_sum(run)
        if site in sites:
            return sites[site]
        known = ", ".join(f"{self.layer}.{name}" for name in SITES if name in sites)
        reason = "mlp_out" if site == "resid_mid" and "mlp_out" not in sites else site
        raise InputError(
            f"{what}: {type(self.module).__name__} has no {site} that can be found: "
            f"{_WHY_NOT[reason]}. There are {known}, and its modules {', '.join(self.children)}"
        )

    def by_name(self) -> dict[str, Hook]:
        """Sites that the names of modules tell."""
        sites = {"resid_pre": self._hook(of_input=True), "resid_post": self._hook()}
        if self.attention is not None:
            inside = self.module.get_submodule(self.attention).named_modules()
            names = [name for name, _ in inside if name.rpartition(".")[2] in PROJECTION]
            if len(names) == 1:
                sites["attn_z"] = self._hook(f"{self.attention}.{names[0]}", of_input=True)
        if self.mlp is not None:
            sites["mlp_in"] = self._hook(self.mlp, of_input=True)
        return self._named(sites)

    def by_sum(self, run: Callable[[], Any]) -> dict[str, Hook]:
        """attn_out and mlp_out, which are added to resid_pre, and resid_mid, which lies between.

        Raises InputError if the block does not run.
        """
        values = self._values(run)
        before, after = (values.get(self._hook(of_input=side).name) for side in (True, False))
        if before is None or after is None:
            raise InputError(f"{self.name} does not run on text, or has no input [b, t, d]")
        if self.mlp is None:
            return {}
        for attn_out, mlp_out in product(self._outputs(self.attention), self._outputs(self.mlp)):
            attention, mlp = values.get(attn_out.name), values.get(mlp_out.name)
            if attention is None or mlp is None or not _equal([before, attention, mlp], after):
                continue
            sites = {"mlp_out": mlp_out}
            if self.attention is not None:
                sites["attn_out"] = attn_out
            for child in self.children:
                middle = self._hook(child, of_input=True)
                if middle.name in values and _equal([before, attention], values[middle.name]):
                    sites["resid_mid"] = _Middle(
                        *(middle.module_name, middle.module, True),
                        before=self._hook(of_input=True),
                        added=attn_out,
                    )
                    break
            return self._named(sites)
        return {}

    def _alike(self, parallel: bool) -> dict[str, Hook]:
        """Places with the width of the sites that only a sum can show, and about where they are."""
        if self.mlp is None:
            return {}
        end = self._hook()
        middle = end if self.attention is None else self._hook(self.attention)
        alike = {"attn_out": middle, "resid_mid": middle, "mlp_out": end}
        return {name: hook for name, hook in alike.items() if name != "resid_mid" or not parallel}

    def _hook(self, inside: str = "", of_input: bool = False) -> Hook:
        name = f"{self.name}.{inside}".removesuffix(".")
        return Hook(name, self.module.get_submodule(inside), of_input)

    def _named(self, sites: dict[str, Hook]) -> dict[str, Hook]:
        return {
            name: dataclasses.replace(hook, site=Site(self.layer, name))
            for name, hook in sites.items()
        }

    def _outputs(self, part: str | None) -> list[Hook]:
        """What a part of the block may add to the stream.

        Its own output, or that of a module inside it (BLOOM adds within the part), or beside it (in
        Gemma 2 a norm comes after it).
        """
        inside = []
        if part is not None:
            children = self.module.get_submodule(part).named_children()
            inside = [part, *(f"{part}.{name}" for name, _ in children)]
        beside = [name for name in self.children if name not in (self.attention, self.mlp)]
        return [self._hook(name) for name in (*inside, *beside)]

    def _values(self, run: Callable[[], Any]) -> dict[str, Tensor]:
        """Hidden states [b, t, d] of the width of the stream, by name, from a run of the model."""
        values: dict[str, Any] = {}
        end = self._hook()

        def keep(name: str, hidden: Any) -> None:
            if name not in values and isinstance(hidden, Tensor):
                # A copy: later modules may add to it in place, and blocks may lie on many devices.
                values[name] = hidden.to("cpu", copy=True)
            if name == end.name:
                raise Reached

        hooks = [self._hook(of_input=True), end]
        hooks += [self._hook(child, of_input=True) for child in self.children]
        hooks += [*self._outputs(self.attention), *self._outputs(self.mlp)]
        with ExitStack() as stack:
            for name, hook in {hook.name: hook for hook in hooks}.items():
                stack.enter_context(hook.reading(partial(keep, name)))
            try:
                run()
            except Reached:
                pass
        stream = values.get(hooks[0].name)
        if stream is None or stream.ndim != 3:
            return {}
        positions = {name: by_position(x, stream.shape[:2]) for name, x in values.items()}
        return {name: x for name, x in positions.items() if x.shape == stream.shape}


def _equal(terms: Sequence[Tensor], total: Tensor) -> bool:
    """Whether the terms add up to the total, except for the rounding of its dtype."""
    error = (sum(map(as_double, terms)) - as_double(total)).abs()
    size = sum(as_double(tensor).abs() for tensor in (*terms, total))
    return bool((error <= 2 * torch.finfo(total.dtype).eps * size).all())


# What modules are given and give


def first_tensor(output: Any) -> Any:
    """Hidden states of a module's output: itself, or the first part of a tuple or ModelOutput."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):  # a ModelOutput
        return next(iter(output.values()), None)
    return output[0] if isinstance(output, (tuple, list)) and output else output


def with_first(output: Any, hidden: Tensor) -> Any:
    """`output` with `hidden` in the place of `first_tensor(output)`."""
    if isinstance(output, Tensor):
        return hidden
    if isinstance(output, dict):  # a ModelOutput
        return dataclasses.replace(cast(Any, output), **{next(iter(output)): hidden})
    return type(output)((hidden, *output[1:]))


def _first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hidden states that a module is given: its first tensor, or `hidden_states`."""
    return next((x for x in args if isinstance(x, Tensor)), kwargs.get("hidden_states"))


def _with_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with `hidden` in the place of `_first_input`."""
    place = next((i for i, x in enumerate(args) if isinstance(x, Tensor)), None)
    if place is None:
        return args, {**kwargs, "hidden_states": hidden}
    return (*args[:place], hidden, *args[place + 1 :]), kwargs


def by_position(hidden: Any, shape: Sequence[int]) -> Any:
    """Hidden states [b t, d] as [b, t, d], where `shape` is [b, t]; anything else as it is."""
    if isinstance(hidden, Tensor) and hidden.ndim == 2 and len(hidden) == math.prod(shape):
        return hidden.reshape(*shape, -1)
    return hidden


# A model's structure


def num_layers(config: Any) -> int:
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if not isinstance(layers, int):
        raise InputError(
            f"a model of type {config.model_type!r} has no list of blocks that its configuration "
            "counts, so --layer has no meaning: name a module with --hookpoint"
        )
    return layers


def _is_parallel(config: Any) -> bool:
    """Whether attention and MLP of a block both read resid_pre, as far as its config tells."""
    text = config.get_text_config()
    return text.model_type in _PARALLEL_TYPES or any(
        getattr(text, name, False) for name in _PARALLEL_SETTINGS
    )


def check_layer(name: str, config: Any, layer: int) -> None:
    """Raise InputError unless the model `name` with this transformers config has the layer."""
    layers = num_layers(config)
    if not 0 <= layer < layers:
        raise InputError(
            f"layer {layer}: {name} has {layers} blocks, so expected 0 to {layers - 1} "
            "(layer N is the residual stream after block N)"
        )


def lists_of_blocks(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """Every ModuleList with as many modules as the model has blocks, and its name."""
    layers = num_layers(model.config)
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == layers
    ]
