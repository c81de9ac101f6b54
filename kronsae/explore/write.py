"""The explorer's page, put together from page/ and a run's data.

Nothing that comes from a run becomes markup: facts are JSON, all else is base64, and the script
makes text of it. A content security policy lets the page run its own script alone, and load
nothing.
"""

import base64
import hashlib
from pathlib import Path
from typing import Any

from kronsae.config import DataConfig
from kronsae.explore.content import make_content
from kronsae.model.sae import SAE
from kronsae.properties import Stored
from kronsae.properties.labels import Labels
from kronsae.system import templates
from kronsae.system.files import write_text

SCRIPTS = (
    *("data.js", "charts.js", "labels.js", "latents.js", "table.js", "search.js"),
    *("views.js", "ask.js", "main.js"),
)
_PAGE = Path(__file__).parent / "page"


def write_explorer(
    run: Path,
    sae: SAE,
    stored: Stored,
    tokenizer: Any | None,
    out: Path,
    data: DataConfig | None = None,
    labels: Labels | None = None,
    suite: str | None = None,
) -> Path:
    """Write the page of a run to `out`. Raises InputError if it cannot be written.

    data: the activations of an SAE that is no run.  suite: whose index.html is beside the page.
    """
    content = make_content(run, sae, stored, tokenizer, data, labels)
    write_text(out, render(content, suite=suite))
    return out


def render(content: dict[str, Any], connect: str = "'none'", suite: str | None = None) -> str:
    """The page as HTML.

    connect: what its script may ask, by the content security policy.  suite: see `write_explorer`.
    """
    style = _read("style.css")
    script = "(() => {\n'use strict';\n" + "\n".join(map(_read, SCRIPTS)) + "\n})();\n"
    policy = (
        f"default-src 'none'; script-src '{_source(script)}'; style-src '{_source(style)}'; "
        f"connect-src {connect}; img-src data:; base-uri 'none'; form-action 'none'"
    )
    return templates.render(
        _PAGE / "explorer.html.j2",
        policy=policy,
        style=style,
        script=script,
        suite=suite,
        **content,
    )


def _source(text: str) -> str:
    """An inline element's name in a content security policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _read(name: str) -> str:
    return (_PAGE / name).read_text(encoding="utf-8")
