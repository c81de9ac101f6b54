"""Switch SAEs: a router sends each token to one of E experts, equal parts of the dictionary.

Letters: B tokens, d width, E experts, w width of the codes. Latent indices stay those of the whole
dictionary: expert e owns [e F / E, (e + 1) F / E).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kronsae.system.parallel import ALONE, Group
from kronsae_kernels import SparseCodes


class Router(nn.Module):
    """Probabilities p = softmax(weight x + bias) of experts; a token gets the most probable one.

    Its latents are multiplied by its p, so that the router learns from the reconstruction.
    weight [E, d] ~ N(0, 1) / sqrt(d), bias [E] 0. [Mudide et al. 2025]
    """

    def __init__(self, experts: int, d_model: int, device: torch.device | str | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, d_model, device=device))
        self.bias = nn.Parameter(torch.zeros(experts, device=device))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None) -> None:
        device = None if generator is None else generator.device
        drawn = torch.randn(self.weight.shape, generator=generator, device=device)
        self.weight.copy_(drawn / self.weight.shape[1] ** 0.5)
        self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Probabilities [B, E] of x [B, d], in float32 under autocast too."""
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.linear(x.to(self.weight.dtype), self.weight, self.bias).softmax(-1)

    def dispatch(
        self,
        x: Tensor,
        probability: Tensor,
        expert: Tensor,
        encode: Callable[[int, Tensor], SparseCodes],
    ) -> SparseCodes:
        """Codes [B, w] of x [B, d]: `encode(expert, rows)` of each expert's tokens, times p."""
        order = expert.argsort(stable=True)
        counts = expert.bincount(minlength=self.weight.shape[0]).tolist()
        parts = [encode(e, rows) for e, rows in enumerate(x[order].split(counts))]
        values, indices = (torch.cat(column) for column in zip(*parts, strict=True))
        back = order.argsort()
        return SparseCodes(values[back] * probability[:, None], indices[back])

    def balance_loss(self, x: Tensor, group: Group = ALONE.data) -> Tensor:
        """E sum_e (share of tokens that e gets) (mean p_e): 1 if even, E if one expert gets all.

        group: ranks with the other tokens of the batch; the result is x's part of their loss.
        """
        p = self(x)
        chosen = p.argmax(-1, keepdim=True) == torch.arange(p.shape[1], device=p.device)
        counts = group.sum(chosen.sum(0))
        share = counts / counts.sum()
        return p.shape[1] * (share * p.sum(0) / counts.sum()).sum()
