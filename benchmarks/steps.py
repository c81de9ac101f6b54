"""Training steps to compare: forward, backward, AdamW. Each starts from the same weights.

A step is made by a function of (shape, x) and returns the loss when called. To compare another
one, write such a function and add it to STEPS.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from benchmarks.baselines import KronListing, TopKSAE
from benchmarks.shapes import Shape
from kronsae_kernels import dense_encode, fused_encode, sparse_decode

LEARNING_RATE = 8e-4
Step = Callable[[], Tensor]


def listing(shape: Shape, x: Tensor) -> Step:
    """KronSAE as the paper's listing writes it."""
    model = _listing(shape, x.device)
    return _train(lambda: mse_loss(model(x), x), model.parameters())


def topk(shape: Shape, x: Tensor) -> Step:
    """A TopK SAE in plain PyTorch."""
    model = _topk(shape, x.device)
    return _train(lambda: mse_loss(model(x), x), model.parameters())


def kron(shape: Shape, x: Tensor) -> Step:
    """The listing's model through kronsae_kernels."""
    parameters = kron_parameters(shape, x.device)
    return _train(lambda: kron_loss(shape, x, *parameters), parameters)


def dense(shape: Shape, x: Tensor) -> Step:
    """The TopK SAE through kronsae_kernels."""
    parameters = dense_parameters(shape, x.device)
    return _train(lambda: dense_loss(shape, x, *parameters), parameters)


STEPS = {"listing": listing, "topk": topk, "kron": kron, "dense": dense}
ENCODERS = {"listing": "kron", "topk": "dense", "kron": "kron", "dense": "dense"}
"""Which model a step trains: steps of one model start from the same weights."""


def kron_loss(
    shape: Shape,
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor,
    w_dec: Tensor,
    b_dec: Tensor,
    impl: str | None = None,
) -> Tensor:
    w_enc = w_enc.transpose(0, 1)
    codes = fused_encode(x, w_enc, b_enc, m=shape.m, k=shape.k, eps=1e-5, impl=impl)
    return mse_loss(sparse_decode(codes, w_dec=w_dec, b_dec=b_dec, impl=impl), x)


def dense_loss(
    shape: Shape,
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor,
    w_dec: Tensor,
    b_dec: Tensor,
    impl: str | None = None,
) -> Tensor:
    codes = dense_encode(x, w_enc, b_enc, k=shape.k, impl=impl)
    return mse_loss(sparse_decode(codes, w_dec=w_dec, b_dec=b_dec, impl=impl), x)


def kron_parameters(shape: Shape, device: torch.device) -> tuple[nn.Parameter, ...]:
    """w_enc [m + n, h, d] (row-major over heads), b_enc, w_dec, b_dec of the listing."""
    model, rows = _listing(shape, device), shape.m + shape.n
    w_enc = model.W_enc.detach().T.view(shape.heads, rows, shape.d).transpose(0, 1).contiguous()
    b_enc = model.b_enc.detach().view(shape.heads, rows)
    return nn.Parameter(w_enc), nn.Parameter(b_enc), model.W_dec, model.b_dec


def dense_parameters(shape: Shape, device: torch.device) -> tuple[nn.Parameter, ...]:
    """w_enc [F, d], b_enc, w_dec, b_dec of the TopK SAE."""
    model = _topk(shape, device)
    return model.encoder.weight, model.encoder.bias, model.W_dec, model.b_dec


def _listing(shape: Shape, device: torch.device) -> KronListing:
    torch.manual_seed(0)
    return KronListing(shape.d, shape.heads, shape.m, shape.n, shape.k).to(device)


def _topk(shape: Shape, device: torch.device) -> TopKSAE:
    torch.manual_seed(0)
    return TopKSAE(shape.d, shape.dict_size, shape.k).to(device)


def _train(loss_of_batch: Callable[[], Tensor], parameters: Iterable[nn.Parameter]) -> Step:
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)

    def step() -> Tensor:
        loss = loss_of_batch()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step
