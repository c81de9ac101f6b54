"""Text from Jinja templates, in which values are escaped by the kind of the document."""

import re
from pathlib import Path
from typing import Any

import jinja2


def render(template: Path, **values: Any) -> str:
    """The text of a template file (NAME.html.j2, NAME.md.j2) with these values.

    In HTML every value is escaped, unless the template marks it as safe; a value that is missing
    is an error (jinja2.UndefinedError). `tojson` makes JSON for a script element, a string of YAML
    or Python; `code` makes Markdown code.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        autoescape=jinja2.select_autoescape(enabled_extensions=["html.j2"], default=False),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    environment.filters["code"] = code
    return environment.get_template(template.name).render(values)


def code(text: str) -> str:
    """A text as code on a line of Markdown, whatever it holds."""
    text = " ".join(text.split()) or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"
