"""The shapes that benchmarks run at, and what a step costs at least there."""

from typing import NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    """A dictionary of F = h m n latents, k of them active, and a batch of activations [B, d]."""

    name: str
    d: int
    heads: int
    m: int
    n: int
    k: int
    tokens: int
    """B, a step."""

    @property
    def dict_size(self) -> int:
        return self.heads * self.m * self.n

    @property
    def columns(self) -> int:
        """Pre-latents of a Kron encoder."""
        return self.heads * (self.m + self.n)

    def flops_per_token(self, encoder: str) -> int:
        """Multiply-adds of a forward pass. [KronSAE, eq. 7]"""
        if encoder == "dense":
            return self.d * self.dict_size + self.k * self.d
        return self.d * self.columns + self.m * self.n * self.heads + self.k * self.d

    def step_bytes(self, encoder: str) -> int:
        """Lower bound of a training step's float32 traffic, for a step that writes no [B, F].

        Each parameter is read by the forward pass, its gradient written and read, it and its two
        moments read and written by AdamW: 9 accesses. Each of the B k decoder rows is gathered by
        the forward pass and by the gradients of values and decoder; x is read twice.
        """
        rows = self.dict_size if encoder == "dense" else self.columns
        parameters = rows * (self.d + 1) + self.dict_size * self.d + self.d
        return 4 * (9 * parameters + self.tokens * self.d * (3 * self.k + 2))

    def __str__(self) -> str:
        return (
            f"{self.name}: d {self.d}, F {self.dict_size} = {self.heads} * {self.m} * {self.n}, "
            f"k {self.k}, B {self.tokens}"
        )


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("toy", d=16, heads=8, m=2, n=4, k=4, tokens=64),
        Shape("S1", d=256, heads=512, m=4, n=4, k=32, tokens=1024),
        Shape("S2", d=512, heads=2048, m=4, n=4, k=32, tokens=2048),
        Shape("S3", d=768, heads=4096, m=4, n=4, k=50, tokens=1024),
        # The paper's: Qwen-2.5-1.5B and Gemma-2-2B, for a GPU. [KronSAE, App. A.1]
        Shape("P1", d=1536, heads=2048, m=4, n=4, k=50, tokens=8192),
        Shape("P2", d=1536, heads=8192, m=2, n=4, k=50, tokens=8192),
        Shape("P3", d=2304, heads=8192, m=4, n=4, k=50, tokens=8192),
    )
}


def activations(shape: Shape, device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
    """[B, d]: sums of k of 4d unit directions with positive coefficients, plus noise."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(4 * shape.d, shape.d, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    chosen = torch.randint(4 * shape.d, (shape.tokens, shape.k), generator=generator)
    strength = torch.rand(shape.tokens, shape.k, generator=generator)
    x = torch.nn.functional.embedding_bag(
        chosen, directions, mode="sum", per_sample_weights=strength
    )
    return (x + 0.1 * torch.randn(x.shape, generator=generator)).to(device)
