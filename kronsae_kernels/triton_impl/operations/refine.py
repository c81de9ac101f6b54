"""Steps that refine the values of codes, and their derivatives, in a training step.

A step z <- ReLU(z + rate g), with g = D (target - b - z D), and D the decoder rows of the codes.
Forward and backward are each one gather of these rows, by the kernel that decodes and multiplies
them with the error (`decode_and_loss`).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kronsae_kernels.triton_impl.operations.gather import decode_and_loss, values_of


class RefinedRows(NamedTuple):
    """What decoder rows get from refined codes: sums of `rows`, times coefficients."""

    rows: Tensor
    """[R, d]."""
    row: Tensor
    """[B, w] int32: row of `rows` for each entry."""
    indices: Tensor
    """[B, w] latents of the entries."""
    scaled: Tensor
    """[B, w] float32: coefficients."""
    along: Tensor
    """[B, w] float32: what each entry adds along its latent's own row."""


class _Step(NamedTuple):
    values: Tensor
    """[B, k] before the step."""
    error: Tensor
    """[B, d] reconstruction minus target, in the table's dtype."""
    products: Tensor
    """[B, k] float32: g."""
    passes: Tensor
    """[B, k] bool: where the ReLU lets a derivative through."""


class Refinement:
    """The refined values of a pass, and what its backward pass needs.

    values: [B, k] float32, 0 where a code is unused.
    """

    def __init__(
        self,
        target: Tensor,
        indices: Tensor,
        base: Tensor,
        extension: Tensor,
        table: Tensor,
        bias: Tensor | None,
        composition: str,
        eps: float,
        silent: float,
        rates: Tensor,
        one_gather: bool,
    ) -> None:
        """target: [B, d].  rates: [N].  composition, one_gather, and codes: as of
        `decode_and_loss`."""
        values = values_of(base, extension, composition, eps).masked_fill(indices < 0, 0.0)
        self.selected = values
        self.indices, self.table, self.rates = indices, table, rates
        self.one_gather = one_gather
        active = values > silent
        self.steps: list[_Step] = []
        for rate in rates.unbind():
            error, products = self._error(target, values, bias)
            moved = values + rate * products
            passes = active & (moved > 0)
            self.steps.append(_Step(values, error, products, passes))
            values = torch.where(active, moved.relu(), values)
        self.values = values

    def _error(
        self, target: Tensor, coefficients: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The rows' sum minus target [B, d], and its negative products with the rows [B, k]."""
        codes = target, self.indices, coefficients, coefficients, self.table, bias
        out = decode_and_loss(*codes, "linear", 0.0, 1.0, self.one_gather)
        return out.residual, -out.d_base

    def backward(
        self,
        d_values: Tensor,
        scaled: Tensor,
        along: Tensor,
        rows: Tensor,
        row: Tensor | None,
        scale: float | Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, RefinedRows]:
        """Derivatives by the selected values and by rates, and what decoder rows and b_dec get.

        d_values: [B, k] by the refined values, not yet times `scale`.
        scaled, along, rows, row: what decoder rows get from the decoding of the refined values.
        Returns d_values [B, k], not scaled; d_rates [N] and d_bias [d], scaled; the rows.
        """
        tokens = len(d_values)
        of_token = torch.arange(tokens, dtype=torch.int32, device=rows.device)[:, None]
        of_token = of_token.expand_as(d_values)
        all_rows, start = [rows], len(rows)
        entries = [(of_token if row is None else row, scaled, along)]
        d_bias = torch.zeros(rows.shape[1], device=rows.device)
        d_rates = []
        nothing = torch.zeros_like(self.steps[0].error)
        for rate, step in zip(reversed(self.rates.unbind()), reversed(self.steps), strict=True):
            passed = d_values.where(step.passes, 0.0)
            d_rates.append((passed * step.products).sum() * scale)
            of_products = passed * rate
            d_error, back = self._error(nothing, of_products, None)
            of_product, of_value = of_products * scale, step.values * scale
            entries += [
                (start + of_token, -of_product, of_product * step.products),
                (start + tokens + of_token, -of_value, of_value * back),
            ]
            start += 2 * tokens
            all_rows += [step.error, d_error]
            d_bias -= d_error.sum(0, dtype=torch.float32) * scale
            d_values = passed + back
        row, scaled, along = (torch.cat(parts, 1) for parts in zip(*entries, strict=True))
        decoder = RefinedRows(
            *(torch.cat(all_rows), row, self.indices.repeat(1, len(entries)), scaled, along)
        )
        return d_values, torch.stack(d_rates[::-1]), d_bias, decoder
