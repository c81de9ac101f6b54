"""The explorer's page, put together from page/ and a run's data.

Nothing that comes from a run becomes markup: facts are JSON without a "<", all else is base64, and
the script makes text of it. A content security policy lets the page run its own script alone, and
load nothing.
"""

import base64
import hashlib
import json
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from kronsae.explore.content import Content, make_content
from kronsae.model.sae import SAE
from kronsae.properties import Stored
from kronsae.system.files import write_text

SCRIPTS = ("data.js", "charts.js", "latents.js", "views.js", "main.js")
_PAGE = Path(__file__).parent / "page"


def write_explorer(run: Path, sae: SAE, stored: Stored, tokenizer: Any | None, out: Path) -> Path:
    """Write the page of a run to `out`. Raises InputError if it cannot be written."""
    write_text(out, render(make_content(run, sae, stored, tokenizer)))
    return out


def render(content: Content) -> str:
    """The page as HTML."""
    style = _read("style.css")
    script = "(() => {\n'use strict';\n" + "\n".join(map(_read, SCRIPTS)) + "\n})();\n"
    details = "\n".join(
        f'<script type="text/plain" id="details-{number}">{block}</script>'
        for number, block in enumerate(content.details)
    )
    return Template(_read("page.html")).substitute(
        policy=escape(
            f"default-src 'none'; script-src '{_source(script)}'; style-src '{_source(style)}'; "
            "img-src data:; base-uri 'none'; form-action 'none'"
        ),
        title=escape(f"{content.facts['run']}: explorer"),
        style=style,
        facts=json_in_html(content.facts),
        index=content.index,
        vocabulary=content.vocabulary,
        script=script,
        details=details,
    )


def json_in_html(value: Any) -> str:
    """JSON that stays inside its script element whatever the strings in it are."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _source(text: str) -> str:
    """How a content security policy names an inline element."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _read(name: str) -> str:
    return (_PAGE / name).read_text(encoding="utf-8")
