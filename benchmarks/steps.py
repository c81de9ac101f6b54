"""Training steps to compare: forward, backward, optimizer. Each starts from the same weights.

A step is made by a function of (shape, device); called with a batch [B, d] it trains on it and
returns the loss. To compare another one, write such a function and add it to CONTENDERS.
On a GPU all compute in bfloat16 (autocast) with float32 weights and moments, on a CPU in float32.
"""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from benchmarks import peers
from benchmarks.baselines import KronListing, TopKSAE
from benchmarks.shapes import Shape
from kronsae_kernels import dense_encode, fused_encode, sparse_decode

LEARNING_RATE = 8e-4
EPS = 1e-5
"""Added under the root, as in the listing. [KronSAE, App. H]"""
Step = Callable[[Tensor], Tensor]


class Contender(NamedTuple):
    """A way to train a model."""

    encoder: str
    """"kron" or "dense": which model. Contenders of one model start from the same weights."""
    make: Callable[[Shape, torch.device], Step]
    recipe: str = "AdamW"
    """Contenders of one model and one recipe have the same losses, step by step."""
    why_not: Callable[[torch.device], str | None] = lambda device: None
    """Why it cannot run on a device, or None if it can."""


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU, nothing on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def kron_loss(shape: Shape, x: Tensor, *weights: Tensor, impl: str | None = None) -> Tensor:
    w_enc, b_enc, w_dec, b_dec = weights
    w_enc = w_enc.transpose(0, 1)
    codes = fused_encode(x, w_enc, b_enc, m=shape.m, k=shape.k, eps=EPS, impl=impl)
    return mse_loss(sparse_decode(codes, w_dec=w_dec, b_dec=b_dec, impl=impl), x)


def dense_loss(shape: Shape, x: Tensor, *weights: Tensor, impl: str | None = None) -> Tensor:
    w_enc, b_enc, w_dec, b_dec = weights
    codes = dense_encode(x, w_enc, b_enc, k=shape.k, impl=impl)
    return mse_loss(sparse_decode(codes, w_dec=w_dec, b_dec=b_dec, impl=impl), x)


def kron_parameters(shape: Shape, device: torch.device) -> tuple[nn.Parameter, ...]:
    """w_enc [m + n, h, d] (row-major over heads), b_enc, w_dec, b_dec of the listing."""
    model, rows = _model(KronListing, shape, device), shape.m + shape.n
    w_enc = model.W_enc.detach().T.view(shape.heads, rows, shape.d).transpose(0, 1).contiguous()
    b_enc = model.b_enc.detach().view(shape.heads, rows)
    return nn.Parameter(w_enc), nn.Parameter(b_enc), model.W_dec, model.b_dec


def dense_parameters(shape: Shape, device: torch.device) -> tuple[nn.Parameter, ...]:
    """w_enc [F, d], b_enc, w_dec, b_dec of the TopK SAE."""
    model = _model(TopKSAE, shape, device)
    return model.encoder.weight, model.encoder.bias, model.W_dec, model.b_dec


LOSSES = {"kron": (kron_loss, kron_parameters), "dense": (dense_loss, dense_parameters)}
"""Our operations' loss of a model, and its parameters."""


def plain(model: type[nn.Module], shape: Shape, device: torch.device) -> Step:
    """A model in plain PyTorch."""
    module = _model(model, shape, device)
    return autograd_step(lambda x: mse_loss(module(x), x), module.parameters(), device)


def unfused(encoder: str, shape: Shape, device: torch.device) -> Step:
    """Our operations, differentiated by autograd, and torch's fused AdamW."""
    loss, parameters_of = LOSSES[encoder]
    parameters = parameters_of(shape, device)
    return autograd_step(lambda x: loss(shape, x, *parameters), parameters, device)


def fused(encoder: str, shape: Shape, device: torch.device) -> Step:
    """Our explicit step: AdamW inside the kernels, decoder rows of unit norm."""
    training = training_step(encoder, shape, device)

    def step(x: Tensor) -> Tensor:
        loss = training.accumulate(x).loss
        training.apply(lr=LEARNING_RATE)
        return loss

    return step


def with_auxiliary(shape: Shape, device: torch.device) -> Step:
    """The fused step with the pass that revives dead latents, as if every other one were dead.

    d / 2 of them a token, on so many tokens that it selects a quarter of what the batch does.
    """
    training = training_step("kron", shape, device)
    dead = torch.arange(shape.dict_size, device=device) % 2 == 0
    k = max(1, min(shape.d, shape.dict_size) // 2)
    part = slice(max(2, shape.tokens * shape.k // (4 * k)))

    def step(x: Tensor) -> Tensor:
        out = training.accumulate(x)
        target = -out.residual[part].float()
        weight = 1 / 32 / (target.var(0, correction=0).mean() + 1e-8)
        training.accumulate(x[part], target=target, k=k, mask=dead, bias=False, weight=weight)
        training.apply(lr=LEARNING_RATE)
        return out.loss

    return step


def encoding(shape: Shape, x: Tensor) -> Callable[[], object]:
    """Encode and select as the step does: activations and weights are in compute precision."""
    dtype = torch.bfloat16 if x.device.type == "cuda" else torch.float32
    x = x.to(dtype)
    w_enc, b_enc = (p.detach().to(dtype) for p in kron_parameters(shape, x.device)[:2])
    w_enc = w_enc.transpose(0, 1)
    return lambda: fused_encode(x, w_enc, b_enc, m=shape.m, k=shape.k, eps=EPS)


def training_step(encoder: str, shape: Shape, device: torch.device) -> Any:
    """`kronsae_kernels.step.TrainingStep` of a model, with the weights all contenders start at."""
    from kronsae_kernels.step import TrainingStep

    _, parameters_of = LOSSES[encoder]
    w_enc, b_enc, w_dec, b_dec = (p.detach() for p in parameters_of(shape, device))
    kron = encoder == "kron"
    return TrainingStep(
        w_enc.transpose(0, 1) if kron else w_enc,
        b_enc,
        w_dec,
        b_dec,
        m=shape.m if kron else None,
        k=shape.k,
        eps=EPS,
        dtype=torch.bfloat16,
    )


def graphed(encoder: str, shape: Shape, device: torch.device) -> Step:
    """`fused` as a CUDA graph: kernels follow one another without the launching process."""
    from kronsae_kernels.step import GraphedStep

    replay = GraphedStep(training_step(encoder, shape, device))
    return lambda x: replay(x, LEARNING_RATE)[0].loss


def why_not_fused(device: torch.device) -> str | None:
    """Why the fused step cannot be timed on a device; an interpreted one would be no measure."""
    from kronsae_kernels.step import why_not

    if device.type == "cpu":
        return "its kernels need a GPU"
    return why_not(device)


def _why_not_graphed(device: torch.device) -> str | None:
    from kronsae_kernels.step import why_not_graphed

    return why_not_graphed(device) or why_not_fused(device)


def _model(cls: type[nn.Module], shape: Shape, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    size = (shape.heads, shape.m, shape.n) if cls is KronListing else (shape.dict_size,)
    with torch.device(device):
        return cls(shape.d, *size, shape.k)


def autograd_step(
    loss_of: Callable[[Tensor], Tensor],
    parameters: Iterable[nn.Parameter],
    device: torch.device,
    rates: Iterable[float] = repeat(LEARNING_RATE),
) -> Step:
    """A step of autograd and torch's fused AdamW, at the next of the learning rates."""
    optimizer, following = torch.optim.AdamW(parameters, fused=True), iter(rates)

    def step(x: Tensor) -> Tensor:
        optimizer.param_groups[0]["lr"] = next(following)
        with autocast(device):
            loss = loss_of(x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _peer(name: str) -> Contender:
    def make(shape: Shape, device: torch.device) -> Step:
        parameters = [p.detach() for p in dense_parameters(shape, device)]
        return peers.PEERS[name].make(shape, *parameters).step

    return Contender("dense", make, name, lambda device: peers.why_not(name))


CONTENDERS = {
    "kron fused": Contender("kron", partial(fused, "kron"), "unit norm", why_not_fused),
    "kron graphed": Contender("kron", partial(graphed, "kron"), "unit norm", _why_not_graphed),
    "topk": Contender("dense", partial(plain, TopKSAE)),
    "eai-sparsify": _peer("eai-sparsify"),
    "kron fused + aux": Contender("kron", with_auxiliary, "auxiliary", why_not_fused),
    "dense fused": Contender("dense", partial(fused, "dense"), "unit norm", why_not_fused),
    "dense graphed": Contender("dense", partial(graphed, "dense"), "unit norm", _why_not_graphed),
    "kron": Contender("kron", partial(unfused, "kron")),
    "dense": Contender("dense", partial(unfused, "dense")),
    "listing": Contender("kron", partial(plain, KronListing)),
    **{name: _peer(name) for name in peers.PEERS if name != "eai-sparsify"},
}
"""By name; those that matter most come first, and are measured first."""
LABELS = {
    "listing": "KronSAE, the paper's listing",
    "topk": "TopK SAE, plain PyTorch",
    "kron": "KronSAE, kronsae_kernels",
    "dense": "TopK SAE, kronsae_kernels",
    "kron fused": "KronSAE, kronsae_kernels, fused step",
    "kron fused + aux": "KronSAE, kronsae_kernels, fused step, auxiliary pass",
    "dense fused": "TopK SAE, kronsae_kernels, fused step",
    "kron graphed": "KronSAE, kronsae_kernels, fused step, CUDA graph",
    "dense graphed": "TopK SAE, kronsae_kernels, fused step, CUDA graph",
    **{name: f"TopK SAE, {name}" for name in peers.PEERS},
}
"""Names in tables."""


OURS = ("kron graphed", "kron fused", "kron")
"""Our training steps of a Kron autoencoder, the fastest first."""


def best_of_ours(encoder: str, device: torch.device) -> str:
    """Contender that the trainer runs on a device: the fused step, or autograd where it cannot."""
    return f"{encoder} fused" if why_not_fused(device) is None else encoder
