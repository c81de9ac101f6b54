"""The shapes that benchmarks run at, and the activations they run on."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from kronsae.model import flops


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
        parts = {"heads": self.heads, "m": self.m, "n": self.n} if encoder == "kron" else {}
        return flops.forward(self.d, self.dict_size, self.k, **parts)

    def rows(self, encoder: str) -> int:
        """Rows of the encoder's weight, each of d numbers."""
        return self.dict_size if encoder == "dense" else self.columns

    def parameters(self, encoder: str) -> int:
        """Weights and biases of encoder and decoder."""
        return self.rows(encoder) * (self.d + 1) + self.dict_size * self.d + self.d

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
        # The paper's: Qwen-2.5-1.5B and Gemma-2-2B, for a GPU. [KronSAE, App. A.1]
        Shape("P1", d=1536, heads=2048, m=4, n=4, k=50, tokens=8192),
        Shape("P2", d=1536, heads=8192, m=2, n=4, k=50, tokens=8192),
        Shape("P3", d=2304, heads=8192, m=4, n=4, k=50, tokens=8192),
        # GOAL_SHAPES, on Gemma-2-2B: the same dictionary, in heads of two forms.
        Shape("G1", d=2304, heads=8192, m=2, n=4, k=50, tokens=8192),
        Shape("G2", d=2304, heads=4096, m=4, n=4, k=50, tokens=8192),
        # As many latents (65,536) for Pythia-160M and Qwen2.5-1.5B.
        Shape("L1", d=768, heads=4096, m=4, n=4, k=50, tokens=8192),
        Shape("L2", d=1536, heads=4096, m=4, n=4, k=50, tokens=8192),
        # A million latents, for one large GPU.
        Shape("P4", d=4096, heads=16384, m=8, n=8, k=64, tokens=8192),
    )
}
GOAL_SHAPES = ["G1", "G2"]
"""Where a GPU's speed is held to the goals of `floors`."""


def activations(shape: Shape, device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
    """[B, d]: sums of k of 4d unit directions with positive coefficients, plus noise."""
    return batches(shape, device, count=1, seed=seed)[0]


def batches(
    shape: Shape, device: torch.device | str = "cpu", count: int = 3, seed: int = 0
) -> list[Tensor]:
    """`count` batches [B, d] of `activations`, so that none is in the cache when it comes again."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(4 * shape.d, shape.d, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)

    def batch() -> Tensor:
        chosen = torch.randint(4 * shape.d, (shape.tokens, shape.k), generator=generator)
        strength = torch.rand(shape.tokens, shape.k, generator=generator)
        x = embedding_bag(chosen, directions, mode="sum", per_sample_weights=strength)
        return (x + 0.1 * torch.randn(x.shape, generator=generator)).to(device)

    return [batch() for _ in range(count)]
