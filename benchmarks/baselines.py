"""Plain PyTorch, as a user writes it: KronSAE as in the paper's listing, and a TopK SAE.

Both write the [B, F] latents, and autograd differentiates them.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


class KronListing(nn.Module):
    """KronSAE with the facts of the paper's simplified listing. [KronSAE, App. H]

    One encoder matrix with a bias, head by head m base and then n extension columns; ReLU;
    sqrt(p q + 1e-5) of all F pairs; topk, unsorted; scatter; a dense decoder product.
    W_enc: [d, h (m + n)].  W_dec: [F, d].
    """

    def __init__(self, d: int, heads: int, m: int, n: int, k: int) -> None:
        super().__init__()
        self.heads, self.m, self.n, self.k = heads, m, n, k
        size = heads * m * n
        self.W_enc = nn.Parameter(torch.randn(d, heads * (m + n)) / (2 * size) ** 0.5)
        self.b_enc = nn.Parameter(torch.zeros(heads * (m + n)))
        base, extension = self.W_enc.detach().T.view(heads, m + n, d).split([m, n], dim=1)
        rows = (base[:, :, None] + extension[:, None]).reshape(size, d)
        self.W_dec = nn.Parameter(functional.normalize(rows, dim=1).contiguous())
        self.b_dec = nn.Parameter(torch.zeros(d))

    def forward(self, x: Tensor) -> Tensor:
        pre_latents = (x @ self.W_enc + self.b_enc).relu()
        base, extension = pre_latents.view(-1, self.heads, self.m + self.n).split(
            [self.m, self.n], dim=2
        )
        latents = (base[..., :, None] * extension[..., None, :] + 1e-5).sqrt().flatten(1)
        values, indices = latents.topk(self.k, dim=1, sorted=False)
        codes = torch.zeros_like(latents).scatter(1, indices, values)
        return codes @ self.W_dec + self.b_dec


class TopKSAE(nn.Module):
    """A TopK SAE in plain PyTorch, its decoder tied at the start. [Gao et al. 2024]

    The ReLU follows the selection, where it costs k numbers a token, not F.
    encoder.weight: [F, d].  W_dec: [F, d].
    """

    def __init__(self, d: int, size: int, k: int) -> None:
        super().__init__()
        self.k = k
        self.encoder = nn.Linear(d, size)
        nn.init.zeros_(self.encoder.bias)
        self.W_dec = nn.Parameter(functional.normalize(self.encoder.weight.detach(), dim=1))
        self.b_dec = nn.Parameter(torch.zeros(d))

    def forward(self, x: Tensor) -> Tensor:
        latents = self.encoder(x)
        values, indices = latents.topk(self.k, dim=1, sorted=False)
        codes = torch.zeros_like(latents).scatter(1, indices, values.relu())
        return codes @ self.W_dec + self.b_dec
