"""Logistic regression on few features, for many problems at once.

Letters: p problems, n rows, k features.
"""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

STEPS = 50
"""Most steps of Newton's method, of which about five to ten are needed."""
HALVINGS = 20
"""Most halvings of a step that would raise the loss."""
TOLERANCE = 1e-9
"""Decrease of a row's loss below which nothing is left to gain."""
FREE = 1e-9
"""Penalty of the bias, which is to be free: it keeps the problem solvable."""


def logistic(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [p, k] and biases [p] that tell y [p, n] bool from features x [p, n, k].

    Both classes weigh the same, and half of the squared weights is added to the sum of losses: the
    LogisticRegression(class_weight="balanced") of scikit-learn. By Newton's method, in float64.
    """
    x, target = torch.cat([x, torch.ones_like(x[..., :1])], -1).double(), y.double()
    count, rows = target.sum(-1, keepdim=True), y.shape[-1]
    balance = rows / 2 / torch.where(y, count, rows - count)
    penalty = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)
    penalty[-1] = FREE

    def loss(w: Tensor) -> Tensor:
        scores = (x @ w[..., None])[..., 0]
        losses = binary_cross_entropy_with_logits(scores, target, balance, reduction="none")
        return losses.sum(-1) + (penalty * w.square()).sum(-1) / 2

    w = x.new_zeros(len(x), x.shape[-1])
    before = loss(w)
    for _ in range(STEPS):
        likely = torch.sigmoid(x @ w[..., None])[..., 0]
        gradient = ((balance * (likely - target))[:, None] @ x)[:, 0] + penalty * w
        curvature = x.mT @ (x * (balance * likely * (1 - likely))[..., None]) + penalty.diag()
        step = torch.linalg.solve(curvature, gradient)
        for _ in range(HALVINGS):
            after = loss(w - step)
            if not (worse := after > before).any():
                break
            step = torch.where(worse[:, None], step / 2, step)
        w, gained, before = w - step, before - after, after
        if gained.max() <= TOLERANCE * rows:
            break
    return w[:, :-1], w[:, -1]
