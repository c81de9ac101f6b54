"""`operator`: an opaque operator of torch with all of its rules.

It is one of `torch.library`, differentiated and mapped over by the rules of an autograd function:
reverse and forward mode of any order, vmap, in eager mode and under torch.compile.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("kronsae", "FRAGMENT")
OPERATORS: dict[str, type["Rules"]] = {}


class Rules(torch.autograd.Function):
    """What `operator` makes an operator of; with setup_context and backward, as any such function.

    The rules call operators, which are differentiated in turn.
    """

    @staticmethod
    def compute(*args: Any) -> Any:
        """The results, of annotated arguments without defaults; they share no memory."""
        raise NotImplementedError

    @staticmethod
    def fake(*args: Any) -> Any:
        """The same without numbers."""
        raise NotImplementedError

    @staticmethod
    def tangents(ctx: Any, saved: Sequence[Any], *tangents: Any) -> Any:
        """Tangents of the results, from the saved tensors and the tangents of all arguments."""
        raise NotImplementedError

    @staticmethod
    def flops(*args: Any) -> int:
        """Floating-point operations of its products, as `torch.utils.flop_counter` counts them."""
        raise NotImplementedError

    @staticmethod
    def rows(*args: Any) -> tuple[int, ...]:
        """Places of arguments [B, ...] whose rows are independent of each other, for `batch`."""
        return ()


def operator(name: str) -> Callable[[type[Rules]], type[Rules]]:
    """Class decorator: make rules the operator torch.ops.kronsae.name."""

    def define(rules: type[Rules]) -> type[Rules]:
        qualified = f"kronsae::{name}"
        schema = torch.library.infer_schema(rules.compute, mutates_args=())
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        function = getattr(torch.ops.kronsae, name).default

        def forward(*args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return function(*args)

        def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
            pairs = zip(args, in_dims, strict=True)
            one = [arg.select(d, 0) if isinstance(d, int) else arg for arg, d in pairs]
            return batch(function, info.batch_size, in_dims, args, rules.rows(*one))

        def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
            # torch switches forward mode off here, for outer levels as well, which then would get a
            # wrong second derivative. So it is on, without the tangents of this level's tensors.
            _check_sizes(ctx.saved_tensors)
            saved = [forward_ad.unpack_dual(t, level=0).primal for t in ctx.saved_tensors]
            with forward_ad._set_fwd_grad_enabled(True):
                return rules.tangents(ctx, saved, *tangents)

        for rule in (forward, vmap, jvp):
            setattr(rules, rule.__name__, staticmethod(rule))
        LIBRARY.impl(name, torch._disable_dynamo(rules.compute), "CompositeExplicitAutograd")
        for key in ("Autograd", "FuncTorchDynamicLayerFrontMode"):
            LIBRARY.impl(name, lambda *args: rules.apply(*args), key)
        torch.library.register_fake(qualified, rules.fake, lib=LIBRARY)
        torch.library.register_vmap(qualified, vmap, lib=LIBRARY)
        OPERATORS[name] = rules
        return rules

    return define


def derived_again() -> bool:
    """Whether the results of a backward rule are differentiated, in either mode."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def total(*terms: Tensor | None) -> Tensor | None:
    """Sum of the terms that are there."""
    given = [term for term in terms if term is not None]
    return sum(given[1:], given[0]) if given else None


def has_values(tensor: Tensor) -> bool:
    """False where numbers cannot be looked at: compiled, traced, fake or meta tensors, vmap."""
    if torch.compiler.is_compiling() or tensor.is_meta or isinstance(tensor, FakeTensor):
        return False
    while torch._C._functorch.is_gradtrackingtensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    traced = torch._C._len_torch_dispatch_stack()
    return not (traced or torch._C._functorch.is_batchedtensor(tensor))


def batch(
    function: Callable,
    size: int,
    in_dims: Sequence[int | None],
    args: Sequence[Any],
    rows: Sequence[int],
) -> tuple[Any, Any]:
    """Results of a function of 2-D tensors for a batch of `size` of them, and where that is: 0.

    in_dims: the dimension of the batch in each argument, or None.
    rows: places of arguments [B, ...] whose rows are independent, as are those of results then: if
        nothing else differs in the batch, it is [size B, ...] in one call; else a call for each.
    """
    dims = [d if isinstance(arg, Tensor) else None for d, arg in zip(in_dims, args, strict=True)]
    if all(dim is None or place in rows for place, dim in enumerate(dims)):
        flat = list(args)
        for place in rows:
            arg, dim = args[place], dims[place]
            arg = arg.expand(size, *arg.shape) if dim is None else arg.movedim(dim, 0)
            flat[place] = arg.flatten(0, 1)
        results, single = _as_tuple(function(*flat))
        _check_sizes(results)
        split = [out.view(size, out.shape[0] // size, *out.shape[1:]) for out in results]
    else:
        each = []
        for place in range(size):
            one = [a if d is None else a.select(d, place) for a, d in zip(args, dims, strict=True)]
            results, single = _as_tuple(function(*one))
            _check_sizes(results)
            each.append(results)
        split = [torch.stack(_same_width(column)) for column in zip(*each, strict=True)]
    return (split[0], 0) if single else (tuple(split), (0,) * len(split))


def _check_sizes(tensors: Sequence[Tensor]) -> None:
    """Raise RuntimeError for a size that only a computation tells, while torch.compile traces."""
    sizes = itertools.chain(*(tensor.shape for tensor in tensors))
    for size in (size for size in sizes if isinstance(size, torch.SymInt)):
        from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

        if free_unbacked_symbols(size):
            raise RuntimeError(
                "torch.compile takes neither forward-mode derivatives nor vmap of codes whose "
                "width depends on the data (threshold_encode, batch_topk_encode): call jvp or vmap "
                "outside torch.compile, of functions that are not compiled"
            )


def _as_tuple(results: Any) -> tuple[tuple[Tensor, ...], bool]:
    single = isinstance(results, Tensor)
    return ((results,) if single else tuple(results)), single


def _same_width(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors [..., w] of different widths, padded with 0 to the largest; scalars as they are."""
    if not tensors[0].ndim:
        return list(tensors)
    widest = max(tensor.shape[-1] for tensor in tensors)
    return [torch.nn.functional.pad(t, (0, widest - t.shape[-1])) for t in tensors]
