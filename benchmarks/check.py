"""Whether the operations compute the right thing on a device: `python -m benchmarks.check`.

Needs no test runner. Odd shapes in each dtype: against the reference in float64, an operation may
err at most twice as much as the reference in that dtype does. The fused step against autograd and
torch's AdamW in float32, weight by weight.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.measure import describe, reason
from benchmarks.shapes import Shape, batches
from benchmarks.steps import LOSSES, training_step, why_not_fused
from kronsae_kernels import dense_encode, fused_encode, sparse_decode

STEPS = 50
RATE = 1e-3


class Case(NamedTuple):
    """An encoder [h, m + n, d] or dense [h m n, d], k latents, B tokens."""

    tokens: int
    d: int
    heads: int
    m: int
    n: int
    k: int
    composition: str
    dtype: torch.dtype

    def __str__(self) -> str:
        size = f"{self.heads}*{self.m}*{self.n}"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"B {self.tokens} d {self.d} F {size} k {self.k} {self.composition} {dtype}"


CASES = (
    Case(33, 20, 7, 3, 5, 11, "mand", torch.float32),
    Case(1, 64, 16, 2, 4, 1, "mand", torch.bfloat16),
    Case(130, 96, 33, 1, 4, 132, "relu_mul", torch.float32),
    Case(257, 776, 515, 4, 4, 50, "mand", torch.bfloat16),
    Case(64, 200, 129, 8, 8, 64, "mul", torch.float16),
    Case(300, 1536, 1024, 2, 4, 50, "mand", torch.float32),
)
ODD = Shape("odd", d=104, heads=37, m=3, n=5, k=12, tokens=150)
"""For the fused step."""


def results(case: Case, kron: bool, device: torch.device, impl: str | None, dtype: torch.dtype):
    """Values of the codes, decoded tokens, and gradients of all inputs."""
    generator = torch.Generator().manual_seed(0)
    size = case.heads * case.m * case.n

    def made(*shape: int) -> Tensor:
        numbers = torch.randn(*shape, generator=generator) / shape[-1] ** 0.5
        # Rounded first, so that every dtype computes from the same numbers.
        return numbers.to(case.dtype).to(device, dtype).requires_grad_()

    x = made(case.tokens, case.d)
    w_enc = made(case.heads, case.m + case.n, case.d) if kron else made(size, case.d)
    b_enc = made(*w_enc.shape[:-1])
    w_dec, b_dec = made(size, case.d), made(case.d)
    if kron:
        options = {"m": case.m, "composition": case.composition, "eps": 1e-5}
        codes = fused_encode(x, w_enc, b_enc, k=case.k, impl=impl, **options)
    else:
        codes = dense_encode(x, w_enc, b_enc, k=case.k, impl=impl)
    out = sparse_decode(codes, w_dec=w_dec, b_dec=b_dec, impl=impl)
    loss = (out.double() - x.detach().double()).square().mean()
    inputs = {"x": x, "w_enc": w_enc, "b_enc": b_enc, "w_dec": w_dec, "b_dec": b_dec}
    gradients = torch.autograd.grad(loss, list(inputs.values()))
    named = {f"d {name}": g for name, g in zip(inputs, gradients, strict=True)}
    return {"values": codes.values.detach(), "decoded": out.detach(), **named}


def error(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over norm of the expected."""
    difference = (got.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp_min(1e-30))


def check_operations(case: Case, device: torch.device) -> list[dict[str, Any]]:
    """Each output and gradient of both encoders: {"what", "error", "allowed"}."""
    found = []
    for kron in (True, False):
        truth = results(case, kron, device, "reference", torch.float64)
        same = results(case, kron, device, "reference", case.dtype)
        ours = results(case, kron, device, None, case.dtype)
        found += [
            {
                "what": f"{'kron' if kron else 'dense'} {name}, {case}",
                "error": error(ours[name], expected),
                "allowed": 2 * error(same[name], expected) + 1e-5,
            }
            for name, expected in truth.items()
        ]
    return found


def check_step(encoder: str, unit_norm: bool, device: torch.device) -> list[dict[str, Any]]:
    """Losses and weights of the fused step after STEPS steps, in float32.

    A matrix may differ by 1e-5 of its norm; a bias, which is 0 at first, by 1e-4 of what it moved.
    """
    loss_of, parameters_of = LOSSES[encoder]
    fused = training_step(encoder, ODD, device, torch.float32, unit_norm)
    parameters = parameters_of(ODD, device)
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    losses: dict[str, list[Tensor]] = {"fused": [], "autograd": []}
    for x in batches(ODD, device, count=STEPS):
        losses["fused"].append(fused.accumulate(x).loss.detach().clone())
        fused.apply(lr=RATE)
        loss = loss_of(ODD, x, *parameters)
        losses["autograd"].append(loss.detach())
        loss.backward()
        w_dec = parameters[2]
        with torch.no_grad():
            if unit_norm:
                along = (w_dec.grad * w_dec).sum(1, keepdim=True)
                w_dec.grad.addcmul_(along, w_dec, value=-1)
            optimizer.step()
            if unit_norm:
                w_dec.div_(w_dec.norm(dim=1, keepdim=True))
        optimizer.zero_grad()
    what = f"fused step {encoder}, {'unit norm' if unit_norm else 'free norm'}: "
    pairs = {"loss": tuple(torch.stack(list(found)) for found in losses.values())}
    expected = dict(zip(("w_enc", "b_enc", "w_dec", "b_dec"), parameters, strict=True))
    if encoder == "kron":  # stored [m + n, h, d]
        expected["w_enc"] = expected["w_enc"].transpose(0, 1)
    for name, tensor in expected.items():
        pairs[name] = fused.weights[name].detach(), tensor.detach()
    return [
        {
            "what": what + name,
            "error": error(got, wanted),
            "allowed": 1e-4 if name in ("b_enc", "b_dec") else 1e-5,
        }
        for name, (got, wanted) in pairs.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("benchmarks.check", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all errors here")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    plan: dict[str, Any] = {str(case): (check_operations, case) for case in CASES}
    where, reason_not = describe(device), why_not_fused(device)
    if reason_not is None:
        plan |= {
            f"fused step {encoder} {unit_norm}": (check_step, encoder, unit_norm)
            for encoder in LOSSES
            for unit_norm in (False, True)
        }
    checks: list[dict[str, Any]] = []
    wrong: list[dict[str, Any]] = []
    for name, (check, *settings) in plan.items():
        try:
            found = check(*settings, device)
        except Exception as broken:  # the others still tell something
            found = [{"what": name, "error": reason(broken)}]
        for one in found:
            right = "allowed" in one and one["error"] <= one["allowed"]
            wrong += [] if right else [one]
            print("ok   " if right else "WRONG", one, flush=True)
        checks += found
        if options.json:
            result = {"where": where, "checks": checks, "wrong": wrong, "fused_skipped": reason_not}
            options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{len(checks) - len(wrong)} of {len(checks)} right", reason_not or "", flush=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
