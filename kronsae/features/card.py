"""A latent's card: its figures, where it fires, and what it promotes, as HTML and as a picture.

The HTML is a fragment with its own style, no script and nothing to load. Its colours follow the
text around it, so that it fits a light and a dark notebook.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kronsae.data.token_text import chip, continued_texts
from kronsae.errors import InputError, require
from kronsae.features.contents import Bar, Contents, Parent, Passage
from kronsae.features.plain import as_text
from kronsae.model.sae import SAE
from kronsae.properties import WINDOW, Examined, Properties, Stored, gates
from kronsae.properties.contexts import SAME_TOKENS
from kronsae.properties.examples import NO_TOKEN
from kronsae.system import templates
from kronsae.system.files import check_writable, write_file, write_text

PASSAGES = 6
"""Strongest examples on a card."""

TOKENS = 5
"""Tokens in each of a card's lists."""

LOGITS = " Logits: the direct effect of its decoder row on the next token."

_HERE = Path(__file__).parent


class Card(Contents):
    """What is known of a latent, ready to be shown: in Jupyter, as HTML, as a PNG or as text."""

    def __repr__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        """The card as a fragment of HTML, which Jupyter shows."""
        return templates.render(_HERE / "card.html.j2", card=self, heights=self.heights)

    def to_html(self, path: str | Path) -> Path:
        """Write the card as a page of its own. Raises InputError if it cannot be written."""
        path = _place_for(path)
        page = templates.render(
            _HERE / "page.html.j2", title=f"Latent {self.latent}", fragment=self._repr_html_()
        )
        write_text(path, page)
        return path

    def to_png(self, path: str | Path) -> Path:
        """Write the card as a picture. Raises InputError without matplotlib."""
        require("matplotlib", "the picture of a card")
        from kronsae.features.picture import draw

        path = _place_for(path)
        write_file(path, lambda beside: draw(self, beside))
        return path

    def write(self, path: str | Path) -> Path:
        """Write the card as HTML or PNG, by the name of the file. Raises InputError for others."""
        check_file(Path(path))
        return self.to_png(path) if Path(path).suffix == ".png" else self.to_html(path)


def _place_for(path: str | Path) -> Path:
    """The path, whose folder is made. Raises InputError if nothing can be written there."""
    path = Path(path)
    check_writable(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def card(
    sae: SAE, stored: Stored, latent: int, tokenizer: Any | None, label: str | None = None
) -> Card:
    """The card of a latent, from the properties of its SAE.

    tokenizer: of the language model; None shows numbers.  label: what it is said to stand for.
    Raises InputError if there is no such latent.
    """
    sae.check_latents([latent])
    properties = stored.properties
    post = properties.post
    return Card(
        int(latent),
        *_composition(sae, properties, latent, tokenizer),
        label,
        f"On {properties.tokens:,} tokens of {stored.facts['text']['dataset']}."
        + (LOGITS if stored.logits is not None else ""),
        _figures(post, latent, properties.tokens),
        tuple(post.histogram[latent].tolist()),
        float(post.histogram_top[latent]),
        _passages(post, latent, tokenizer),
        _lists(stored, latent, tokenizer),
    )


def _composition(
    sae: SAE, properties: Properties, latent: int, tokenizer: Any | None
) -> tuple[str, tuple[Parent, ...], str]:
    """Where a latent is, its base and extension, and how these decide on it; empty if dense."""
    config, pre = sae.config, properties.pre
    if pre is None:
        return "", (), ""
    head, inside = divmod(latent, config.m * config.n)
    base, extension = divmod(inside, config.n)
    first = head * (config.m + config.n)
    rows = (("base", base, first + base), ("extension", extension, first + config.m + extension))
    parents = tuple(
        Parent(kind, number, _figures(pre, row, properties.tokens), _shares(pre, row, tokenizer))
        for kind, number, row in rows
    )
    shares = gates(sae, properties)
    both, selected = (percent(shares[key][head, base, extension]) for key in ("both", "selected"))
    return (
        f"head {head:,} · base {base} × extension {extension}",
        parents,
        f"Both fire on {both} of tokens; the latent is among the active ones on {selected} of "
        "those.",
    )


def check_file(path: Path) -> None:
    """Raise InputError if a card cannot be written to a file of this name."""
    if path.suffix not in (".html", ".png"):
        raise InputError(f"a card is a file .html or .png, not {path}")
    if path.suffix == ".png":
        require("matplotlib", "the picture of a card")


def percent(share: float) -> str:
    """A share for people: 12.3 %, 0.042 %."""
    value = 100 * share
    return f"{value:.1f} %" if value >= 1 else f"{value:.2g} %"


def short(value: float) -> str:
    """A number of three digits: 0.0123, 1.2, 45.6, 12,345."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _figures(examined: Examined, row: int, tokens: int) -> tuple[tuple[str, str], ...]:
    density = ("density", percent(examined.count[row] / tokens))
    if not examined.count[row]:
        return (density, ("mean", "–"), ("maximum", "–"))
    peak = float(examined.top.scores[row, 0])
    return (density, ("mean", short(float(examined.mean[row]))), ("maximum", short(peak)))


def _passages(examined: Examined, row: int, tokenizer: Any | None) -> tuple[Passage, ...]:
    """The strongest examples that do not repeat the text of a stronger one, up to their middle."""
    middle, known = WINDOW // 2, set()
    passages: list[Passage] = []
    for tokens, values in zip(examined.top.tokens[row], examined.top.values[row], strict=True):
        before = tuple(tokens[middle - SAME_TOKENS + 1 : middle + 1])
        if values[middle] <= 0 or before in known or len(passages) == PASSAGES:
            continue
        known.add(before)
        there = tokens != NO_TOKEN
        fires = values[there].clip(0).tolist()
        texts = continued_texts(tokens[there].tolist(), tokenizer, fires)
        passages.append(Passage(float(values[middle]), tuple(zip(texts, fires, strict=True))))
    return tuple(passages)


def _lists(
    stored: Stored, latent: int, tokenizer: Any | None
) -> tuple[tuple[str, str, tuple[Bar, ...]], ...]:
    lists = [("Fires on", "share", _shares(stored.properties.post, latent, tokenizer))]
    if stored.logits is not None:
        for title, name in (("Positive logits", "raised"), ("Negative logits", "lowered")):
            tokens = getattr(stored.logits, name)[latent]
            by = getattr(stored.logits, f"{name}_by")[latent]
            lists.append(
                (
                    title,
                    name,
                    _bars(tokens, by, [f"{x:+.3g}".replace("-", "−") for x in by], tokenizer),
                )
            )
    return tuple(lists)


def _shares(examined: Examined, row: int, tokenizer: Any | None) -> tuple[Bar, ...]:
    """The tokens that most of its activation lies on."""
    shares = examined.top_shares[row]
    return _bars(examined.top_tokens[row], shares, [percent(x) for x in shares], tokenizer)


def _bars(
    tokens: np.ndarray, values: np.ndarray, shown: Sequence[str], tokenizer: Any | None
) -> tuple[Bar, ...]:
    """The first TOKENS that there are, with bars relative to the longest."""
    longest = float(np.abs(values[:TOKENS]).max(initial=0)) or 1.0
    return tuple(
        Bar(chip(continued_texts([int(token)], tokenizer)[0]), abs(float(value)) / longest, text)
        for token, value, text in zip(tokens[:TOKENS], values[:TOKENS], shown[:TOKENS], strict=True)
        if token != NO_TOKEN
    )
