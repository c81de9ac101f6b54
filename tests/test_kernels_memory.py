"""Memory of a dictionary of a million latents, forward and backward."""

import subprocess
import sys

import pytest

SCRIPT = """
import re
import torch
from kronsae_kernels import fused_encode, sparse_decode

torch.set_num_threads(1)
B, d, h, m, n, k = 1024, 64, 16384, 8, 8, 64


def mib(field):
    with open("/proc/self/status") as status:
        return int(re.search(rf"{field}:\\s+(\\d+) kB", status.read())[1]) / 1024


# Filled in place: every page is touched, and nothing larger ever was.
w_enc = torch.empty(m + n, h, d).normal_().transpose(0, 1).requires_grad_()
b_enc = torch.empty(h, m + n).normal_().requires_grad_()
w_dec = torch.empty(h * m * n, d).normal_().requires_grad_()
b_dec = torch.empty(d).normal_().requires_grad_()
x = torch.empty(B, d).normal_()
parameters = (w_enc, b_enc, w_dec, b_dec)
before = mib("VmRSS")
codes = fused_encode(x, w_enc, b_enc, m=m, k=k)
loss = (sparse_decode(codes, w_dec=w_dec, b_dec=b_dec) - x).square().mean()
loss.backward()
print(mib("VmHWM") - before, sum(p.grad.numel() for p in parameters) * 4 / 2**20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_a_million_latents():
    """Above the parameters: the gradients, one chunk of pre-latents, and what is O(B k).

    [B, F] in float32 alone would be 4 GiB; B k rows of the decoder are 16 MiB.
    """
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    peak, gradients = (float(word) for word in done.stdout.split())
    print(f"peak {peak:.0f} MiB above the parameters, {gradients:.0f} MiB of it gradients")
    assert gradients > 300  # they were computed
    assert gradients < peak < 1500
