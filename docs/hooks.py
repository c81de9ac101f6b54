"""What the site changes of the pages, and of docstrings: links, notebooks, lists of arguments.

mkdocs.yml names this file twice: as a hook of mkdocs, and for `Docstrings`, an extension of griffe.
"""

import dataclasses
import html
import importlib
import json
import posixpath
import re
from pathlib import PurePosixPath
from typing import Any

import griffe

DOCS = "docs"
LINK = re.compile(r"(?<=\]\()(\.\./[^)\s]+)(?=\))")
NOTEBOOK = re.compile(r"(?<=\w)\.ipynb(?=\))")
NAMED = re.compile(r"^(`?[\w.…]+`?(?:, `?[\w.…]+`?)*): (?=\S)")
ANSI = re.compile(r"\x1b\[[0-9;]*m")

# Links out of docs/


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Links to files of the repository that the site does not have, as links to the repository."""
    return outward(markdown, page.file.src_uri, f"{config.extra['repository']}/blob/main")


def outward(markdown: str, page: str, repository: str) -> str:
    """The page with absolute links where they lead out of docs/, and to the pages of notebooks.

    page: its path there.
    """
    folder = posixpath.dirname(f"{DOCS}/{page}")

    def absolute(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[0]))
        return link[0] if target.startswith(f"{DOCS}/") else f"{repository}/{target}"

    return NOTEBOOK.sub(".md", LINK.sub(absolute, markdown))


# Notebooks


def on_files(files: Any, *, config: Any, **_: Any) -> Any:
    """Each notebook is a page, with the outputs that it holds."""
    from mkdocs.structure.files import File

    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        page = str(PurePosixPath(file.src_uri).with_suffix(".md"))
        files.append(File.generated(config, page, content=pages_of(file.content_string)))
    return files


def pages_of(notebook: str) -> str:
    """Markdown of a notebook."""
    return "\n\n".join(map(_cell, json.loads(notebook)["cells"])) + "\n"


def _cell(cell: dict[str, Any]) -> str:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return source
    return "\n\n".join([f"```python\n{source}\n```", *map(_output, cell["outputs"])])


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "text/html" in data:
        inner = "".join(data["text/html"])
        lines = [line.strip() for line in inner.splitlines() if line.strip()]
        return '<div class="output">\n' + "\n".join(lines) + "\n</div>"
    if "image/png" in data:
        picture = "".join(data["image/png"]).replace("\n", "")
        return f'<div class="output"><img alt="" src="data:image/png;base64,{picture}"></div>'
    text = ANSI.sub("", "".join(output.get("text") or data.get("text/plain", [])))
    return f'<pre class="output">{html.escape(text.rstrip())}</pre>'.replace("\n", "&#10;")


# Docstrings


class Docstrings(griffe.Extension):
    """Docstrings as Markdown, and a table of the settings of a config."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown_of(obj.docstring.value)

    def on_package(self, *, pkg: Any, **_: Any) -> None:
        if pkg.name == "kronsae":
            config = importlib.import_module("kronsae.config")
            for name in ("SAEConfig", "DataConfig", "TrainConfig"):
                table = settings_of(getattr(config, name))
                pkg["config"][name].docstring.value += f"\n\n{table}"


def markdown_of(docstring: str) -> str:
    """A docstring whose lines `name: text`, with more lines below them, become a list."""
    lines: list[str] = []
    inside = False  # an item of the list
    for line in docstring.splitlines():
        parts = re.split(r"\s{2,}(?=`?[\w.…]+`?: )", line) if line[:1].strip() else [line]
        if NAMED.match(parts[0]):
            if lines and lines[-1] and not inside:
                lines.append("")
            lines += [NAMED.sub(_item, part) for part in parts]
            inside = True
        elif inside and line.startswith(" "):
            lines.append(line)
        else:
            if inside and line.strip():
                lines.append("")
            lines.append(line)
            inside = False
    return "\n".join(lines)


def _item(match: re.Match[str]) -> str:
    names = ", ".join(f"`{name.strip('`')}`" for name in match[1].split(", "))
    return f"- {names}: "


def settings_of(config: type) -> str:
    """A table of the settings of a config, with their defaults."""
    rows = ["| setting | default | |", "|---|---|---|"]
    for field in dataclasses.fields(config):
        default = "" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
        meaning = str(field.metadata.get("help", "")).replace("|", "\\|")
        choices = field.metadata.get("choices")
        if choices is not None:
            meaning += ": " + ", ".join(f"`{choice}`" for choice in choices)
        rows.append(f"| `{field.name}` | {default} | {html.escape(meaning, quote=False)} |")
    return "\n".join(rows)
