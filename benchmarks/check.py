"""Whether the operations compute the right thing on a device: `python -m benchmarks.check`.

Needs no test runner. Odd shapes in each dtype, and the goals' shapes on a few tokens: against the
reference in float64, an operation and the fused step may err at most twice as much as the reference
in that dtype does. Selection index by index, on numbers that no order of sums rounds, full of ties.
(That steps follow torch's AdamW is shown by tests/test_triton_step.py, also on a GPU.)
"""

import multiprocessing
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.flags import command, positive, save
from benchmarks.measure import describe, reason
from benchmarks.shapes import GOAL_SHAPES, SHAPES
from benchmarks.steps import why_not_fused
from kronsae_kernels import dense_encode, fused_encode, sparse_decode
from kronsae_kernels.step import TrainingStep

EPS = 1e-5


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
GOALS = tuple(
    Case(256, shape.d, shape.heads, shape.m, shape.n, shape.k, "mand", dtype)
    for shape in (SHAPES[name] for name in GOAL_SHAPES)
    for dtype in (torch.bfloat16, torch.float32)
)


def inputs(case: Case, kron: bool, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """x, w_enc, b_enc, w_dec and b_dec; the same numbers in each dtype, as the case's rounds them.

    A Kron encoder's weight is stored row-major over heads.
    """
    torch.manual_seed(0)
    size = case.heads * case.m * case.n

    def draw(*shape: int, scale: float | None = None) -> Tensor:
        numbers = torch.randn(*shape, device=device) * (scale or shape[-1] ** -0.5)
        return numbers.to(case.dtype).to(dtype)

    x = draw(case.tokens, case.d, scale=1.0)  # pre-latents are of the size of 1, too
    w_enc = draw(case.m + case.n, case.heads, case.d) if kron else draw(size, case.d)
    w_enc = w_enc.transpose(0, 1) if kron else w_enc
    b_enc, w_dec, b_dec = draw(*w_enc.shape[:-1]), draw(size, case.d), draw(case.d)
    return {"x": x, "w_enc": w_enc, "b_enc": b_enc, "w_dec": w_dec, "b_dec": b_dec}


def results(
    case: Case, kron: bool, device: torch.device, impl: str | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Values of the codes, residual, and gradients of all inputs, by autograd."""
    given = {name: t.requires_grad_() for name, t in inputs(case, kron, device, dtype).items()}
    x, w_enc, b_enc, w_dec, b_dec = given.values()
    if kron:
        options = {"m": case.m, "composition": case.composition, "eps": EPS}
        codes = fused_encode(x, w_enc, b_enc, k=case.k, impl=impl, **options)
    else:
        codes = dense_encode(x, w_enc, b_enc, k=case.k, impl=impl)
    out = sparse_decode(codes, w_dec=w_dec, b_dec=b_dec, impl=impl)
    loss = (out.double() - x.detach().double()).square().mean()
    gradients = torch.autograd.grad(loss, list(given.values()))
    named = {f"d {name}": g for name, g in zip(given, gradients, strict=True)}
    return {"values": codes.values.detach(), "residual": (out - x).detach(), **named}


def results_of_step(case: Case, kron: bool, device: torch.device) -> dict[str, Tensor]:
    """`results` of the fused step, whose first moments are 0.1 of the gradients."""
    x, *weights = inputs(case, kron, device, torch.float32).values()
    step = TrainingStep(
        *weights, m=case.m if kron else None, k=case.k, composition=case.composition, eps=EPS,
        dtype=case.dtype, unit_norm=False,
    )  # fmt: skip
    out = step.accumulate(x)
    step.apply(lr=0.0)
    gradients = {f"d {name}": 10 * state["exp_avg"] for name, state in step.state.items()}
    return {"values": out.codes.values, "residual": out.residual, **gradients}


def error(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over norm of the expected."""
    difference = (got.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp_min(1e-30))


def check_operations(
    case: Case, device: torch.device, encoders: tuple[str, ...] = ("kron", "dense")
) -> list[dict[str, Any]]:
    """Each output and gradient, of operations and fused step: {"what", "error", "allowed"}."""
    rows = []
    for encoder in encoders:
        kron = encoder == "kron"
        truth = results(case, kron, device, "reference", torch.float64)
        same = results(case, kron, device, "reference", case.dtype)
        ours = {"": results(case, kron, device, None, case.dtype)}
        if why_not_fused(device) is None:
            ours["fused step "] = results_of_step(case, kron, device)
        rows += [
            {
                "what": f"{which}{encoder} {name}, {case}",
                "error": error(got[name], truth[name]),
                "allowed": 2 * error(same[name], truth[name]) + 1e-5,
            }
            for which, got in ours.items()
            for name in got
        ]
    return rows


def check_selection(case: Case, device: torch.device) -> list[dict[str, Any]]:
    """Every index of every token, as the reference orders them: by product, then by index.

    Activations and weights are -1, 0 and 1, and of wide activations most are 0: pre-latents are
    integers below 256, exact in every dtype and order, and many of them equal.
    """
    torch.manual_seed(0)
    tokens = 32 * case.tokens
    x = torch.randint(-1, 2, (tokens, case.d), device=device).to(case.dtype)
    x *= torch.rand(tokens, case.d, device=device) < min(1.0, 256 / case.d)
    w_enc = torch.randint(-1, 2, (case.m + case.n, case.heads, case.d), device=device)
    w_enc = w_enc.to(case.dtype).transpose(0, 1)
    options = {"m": case.m, "k": case.k, "composition": case.composition}
    with torch.no_grad():
        got = fused_encode(x, w_enc, **options).indices
        wrong = 0
        for start in range(0, tokens, case.tokens):
            part = slice(start, start + case.tokens)
            wanted = fused_encode(x[part].float(), w_enc.float(), **options, impl="reference")
            wrong += int((got[part] != wanted.indices).sum())
    return [{"what": f"indices of {tokens} tokens, {case}", "error": wrong, "allowed": 0}]


def plan(smallest: bool) -> dict[str, Callable[[torch.device], list[dict[str, Any]]]]:
    """All checks by name, those that take longest first."""
    goals, cases = ((), CASES[:2]) if smallest else (GOALS, CASES)
    return {
        **{f"goal {case}": partial(check_operations, case, encoders=("kron",)) for case in goals},
        **{f"indices {case}": partial(check_selection, case) for case in (*goals, *cases)},
        **{str(case): partial(check_operations, case) for case in cases},
    }


def checked(name: str, device: torch.device, smallest: bool) -> list[dict[str, Any]]:
    """Rows of a check; an exception gives a row as well."""
    try:
        return plan(smallest)[name](device=device)
    except Exception as broken:  # the others still tell something
        return [{"what": name, "error": reason(broken)}]


def main(arguments: list[str] | None = None) -> None:
    parser = command("check", __doc__, device="auto")
    parser.add_argument("--smallest", action="store_true", help="two small cases")
    parser.add_argument(
        "--workers", type=positive, default=1, help="processes, a fresh one a check"
    )
    options = parser.parse_args(arguments)
    device = options.device
    where, reason_not = describe(device), why_not_fused(device)
    names = list(plan(options.smallest))
    check = partial(checked, device=device, smallest=options.smallest)
    checks: list[dict[str, Any]] = []
    wrong: list[dict[str, Any]] = []

    def tell(rows: list[dict[str, Any]]) -> None:
        for one in rows:
            right = "allowed" in one and one["error"] <= one["allowed"]
            wrong.extend([] if right else [one])
            print("ok   " if right else "WRONG", one, flush=True)
        checks.extend(rows)
        result = {"where": where, "checks": checks, "wrong": wrong, "fused_skipped": reason_not}
        save(options.json, result)

    if options.workers == 1:
        for name in names:
            tell(check(name))
    else:  # a process that lost its device loses one check
        with multiprocessing.get_context("spawn").Pool(options.workers, maxtasksperchild=1) as pool:
            for rows in pool.imap_unordered(check, names):
                tell(rows)
    print(f"{len(checks) - len(wrong)} of {len(checks)} right", reason_not or "", flush=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
