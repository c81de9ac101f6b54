"""Texts with the features (latents) of an SAE that are active on each of their tokens.

Letters: t tokens of all texts, one after the other; k active latents of a token; F latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kronsae.data.token_text import chip
from kronsae.errors import InputError
from kronsae.model.sae import SAE
from kronsae.system.documents import Number, typed
from kronsae.system.templates import render
from kronsae.system.tensors import dense
from kronsae_kernels import SparseCodes

if TYPE_CHECKING:
    import pandas as pd

_PAGE = Path(__file__).parent / "text.html.j2"


@dataclass(frozen=True, eq=False)
class Features:
    """The features of each token of one text or several; len() is the number of tokens."""

    sae: SAE
    tokens: list[str]
    """[t] The text of each token: ↵ is a newline."""
    ids: Tensor
    """[t] int64"""
    text: Tensor
    """[t] int64: which text a token is of."""
    codes: SparseCodes
    """values and indices, [t, k]: a latent of value 0 is not active."""
    kept: Tensor
    """[t] bool: False for tokens that the SAE was not trained on, where no feature is active:
    special tokens, the first position of a text, and massive tokens."""

    def __len__(self) -> int:
        return len(self.tokens)

    def to_dense(self) -> Tensor:
        """Values of all latents: [t, F], in the SAE's dtype. It takes t F numbers of memory."""
        return dense(self.codes, self.sae.dict_size)

    def of(self, latent: int) -> Tensor:
        """Values [t] of a latent. Raises InputError for one outside [0, F)."""
        self.sae.check_latents([latent])
        here = self.codes.indices == latent
        return torch.where(here, self.codes.values, 0).sum(-1)

    def to_pandas(self) -> "pd.DataFrame":
        """A row for each token and feature that is active on it, in reading order.

        Columns: text, position (of the token in `tokens`), token (a dot for a space around it),
        latent, value.
        """
        import pandas as pd

        position, slot = self._active
        return pd.DataFrame(
            {
                "text": self.text[position].cpu().numpy(),
                "position": position.cpu().numpy(),
                "token": [chip(self.tokens[at]) for at in position.tolist()],
                "latent": self.codes.indices[position, slot].cpu().numpy(),
                "value": self.codes.values[position, slot].float().cpu().numpy(),
            }
        )

    @cached_property
    def _active(self) -> tuple[Tensor, ...]:
        return self.sae.fired(self.codes).nonzero(as_tuple=True)

    def strongest(
        self, count: int = 10, *, token: int | None = None, text: int | None = None
    ) -> "pd.DataFrame":
        """The features that fire most strongly: in all texts, in one text, or on one token.

        token: its position in `tokens`, or with `text` in that text; negative ones count from the
            end.  text: its number.
        Columns: latent (the index), value (its largest), token (where that is; a dot for a space
        around it), position, and fires_on (on how many tokens); on one token only latent and value.
        Raises InputError for a token or text that there is not.
        """
        count = typed(count, Number(int, 1), "count")
        table = self.to_pandas()
        first, count_of_tokens = 0, len(self)
        if text is not None:
            number = _numbered(text, int(self.text[-1]) + 1, "text")
            table = table[table["text"] == number]
            first = int((self.text < number).sum())
            count_of_tokens = int((self.text == number).sum())
        if token is not None:
            position = first + _numbered(token, count_of_tokens, "token")
            table = table[table["position"] == position]
        ordered = table.sort_values("value", ascending=False, kind="stable")
        best = ordered.drop_duplicates("latent").head(count).set_index("latent")
        if token is not None:
            return best[["value"]]
        best["fires_on"] = table["latent"].value_counts().reindex(best.index)
        return best[["value", "token", "position", "fires_on"]]

    def show(self, latent: int | None = None) -> "Shown":
        """The tokens for a notebook, shaded by a latent, or by the strongest one of each."""
        if latent is not None:
            values = self.of(latent)
            return Shown(self, values, [latent] * len(self), f"latent {latent}")
        values, slots = self.codes.values.max(-1)
        latents = self.codes.indices.gather(1, slots[:, None])[:, 0].tolist()
        return Shown(self, values, latents, "the strongest latent of each token")

    def __repr__(self) -> str:
        texts = int(self.text[-1]) + 1 if len(self) else 0
        words = f"{texts} text" + ("s" if texts != 1 else "")
        return f"Features of {words}, {len(self):,} tokens, by {self.sae!r}\n{self.strongest(5)}"

    def _repr_html_(self) -> str:
        return self.show()._repr_html_() + self.strongest(5).to_html()


def _numbered(number: int, count: int, what: str) -> int:
    if not -count <= typed(number, int, what) < count:
        raise InputError(f"{what}: expected 0 to {count - 1}, got {number}")
    return number % count


class Shown:
    """Tokens of texts, shaded by a value each: HTML in a notebook, else the text alone."""

    def __init__(
        self, features: Features, values: Tensor, latents: Sequence[int], what: str
    ) -> None:
        self.features, self.values, self.latents, self.what = features, values, latents, what

    def _rows(self) -> list[list[tuple[str, float, float, int]]]:
        """The tokens of each text: its text, value, shade from 0 to 1, and latent."""
        f, values = self.features, self.values.float().clamp(min=0)
        shades = (values / values.amax().clamp(min=1e-30)).tolist()
        rows: list[list[Any]] = [[] for _ in range(int(f.text[-1]) + 1 if len(f) else 0)]
        for text, *cell in zip(
            f.text.tolist(), f.tokens, values.tolist(), shades, self.latents, strict=True
        ):
            rows[text].append(cell)
        return rows

    def _repr_html_(self) -> str:
        return render(_PAGE, texts=self._rows(), what=self.what)

    def __repr__(self) -> str:
        return "\n".join("".join(cell[0] for cell in row) for row in self._rows())
