"""Notebooks without Jupyter: their cells in order, and what each of them shows.

python tests/notebooks.py docs/tutorials/*.ipynb    # runs them here, and writes their outputs anew
"""

import ast
import contextlib
import io
import json
import os
import re
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

COMMAND = re.compile(r"^!kronsae ((?:.*\\\n)*.*)$", re.MULTILINE)


def cells_of(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def run(notebook: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The outputs of each code cell, in the format of notebooks."""
    names: dict[str, Any] = {"__name__": "__main__", "_kronsae": _kronsae}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [_run("".join(cell["source"]), names, count) for count, cell in enumerate(code, 1)]


def _run(source: str, names: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Run a cell. As in Jupyter, its last expression is shown."""
    source = COMMAND.sub(lambda match: f"_kronsae({match[1]!r})", source)
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, f"cell {count}", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), f"cell {count}", "eval"), names)
    outputs: list[dict[str, Any]] = []
    if text := printed.getvalue():
        outputs.append({"name": "stdout", "output_type": "stream", "text": _lines(text)})
    if value is not None:
        data = {"text/plain": _lines(repr(value))}
        if hasattr(value, "_repr_html_"):
            data = {"text/plain": [f"<{type(value).__name__}>"]}
            data["text/html"] = _lines(value._repr_html_())
        outputs.append(
            {
                "data": data,
                "execution_count": count,
                "metadata": {},
                "output_type": "execute_result",
            }
        )
    return outputs


def _kronsae(line: str) -> None:
    """A command of a cell, in this process, which has loaded everything that it needs."""
    from kronsae.__main__ import main

    try:
        status = main(shlex.split(line.replace("\\\n", " ")))
    except SystemExit as end:  # --help
        status = end.code or 0
    assert status == 0, f"kronsae {line}: exit status {status}"


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def _write_outputs(path: Path) -> None:
    notebook = cells_of(path)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        outputs = iter(run(notebook))
    count = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            count += 1
            cell["outputs"], cell["execution_count"] = next(outputs), count
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    os.environ["COLUMNS"] = "100"  # of what commands print
    for name in sys.argv[1:]:
        _write_outputs(Path(name).resolve())
