"""Selection, by hand: what is selected, in which order, and what a selected latent is worth."""

import pytest
import torch

from kronsae_kernels import fused_encode

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def test_mul_where_all_products_are_negative():
    """The largest product of a head may be that of its largest base and smallest extension."""
    x = torch.ones(1, 1, dtype=torch.float64)
    w = torch.tensor([[-3.0, -1.0, 2.0, 5.0], [-2.0, -2.0, 2.0, 2.0]], dtype=torch.float64)
    codes = fused_encode(x, w[:, :, None], m=2, k=1, composition="mul")
    assert codes.values.item() == -2.0  # of head 0; head 1 holds -4 four times
    assert codes.indices.item() == 2
    codes = fused_encode(x, -w[:, :, None], m=2, k=1, composition="mul")
    assert (codes.values.item(), codes.indices.item()) == (-2.0, 2)
