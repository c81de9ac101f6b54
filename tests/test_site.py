"""What docs/hooks.py makes of pages, notebooks and docstrings, and that the site has every name.

`mkdocs build --strict`, in .ci/run, holds all links of the site.
"""

import importlib.util
import json
from pathlib import Path

import pytest

import kronsae
import kronsae_kernels

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def hooks():
    pytest.importorskip("griffe", reason="needs the extra docs")
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_that_leave_docs_lead_to_the_repository(hooks):
    page = "[a](../benchmarks/x.md#b) [c](../limits.md) [d](https://e)"
    shown = "[a](R/benchmarks/x.md#b) [c](R/limits.md) [d](https://e)"
    assert hooks.outward(page, "costs.md", "R") == shown
    assert hooks.outward("[c](../limits.md)", "api/index.md", "R") == "[c](../limits.md)"


def test_arguments_become_a_list(hooks):
    docstring = (
        "Encode.\n\nx: [..., d]  k: a number,\n    say 8.\nm, n: sizes\nRaises InputError: no."
    )
    assert hooks.markdown_of(docstring).splitlines() == [
        *("Encode.", "", "- `x`: [..., d]", "- `k`: a number,", "    say 8.", "- `m`, `n`: sizes"),
        *("", "Raises InputError: no."),
    ]


def test_a_notebook_becomes_a_page(hooks):
    outputs = [
        {"output_type": "stream", "name": "stdout", "text": ["\x1b[1ma < b\x1b[0m\n", "c\n"]},
        {"output_type": "execute_result", "data": {"text/html": ["<b>x</b>\n", "\n", "y"]}},
    ]
    cells = [
        {"cell_type": "markdown", "source": ["# One\n", "two"]},
        {"cell_type": "code", "source": ["1"], "outputs": outputs},
    ]
    assert hooks.pages_of(json.dumps({"cells": cells})).split("\n\n") == [
        "# One\ntwo",
        "```python\n1\n```",
        '<pre class="output">a &lt; b&#10;c</pre>',
        '<div class="output">\n<b>x</b>\ny\n</div>\n',
    ]


def test_settings_are_a_table_with_defaults_and_choices(hooks):
    table = hooks.settings_of(kronsae.SAEConfig)
    assert "| `selection` | `'topk'` | how active latents are chosen: `topk`, `batchtopk`" in table
    assert table.count("\n") == 1 + len(kronsae.SAEConfig.__dataclass_fields__)


@pytest.mark.parametrize("package", [kronsae, kronsae_kernels])
def test_every_name_is_there(package):
    page = {kronsae: "kronsae.md", kronsae_kernels: "kernels.md"}[package]
    text = (DOCS / "api" / page).read_text(encoding="utf-8")
    missing = [name for name in package.__all__ if f"{name}\n" not in text]
    assert missing == ["__version__"]
