"""The notebooks of docs/tutorials run from start to end, and hold what they show."""

from pathlib import Path

import notebooks
import pytest

TUTORIALS = sorted((Path(__file__).parent.parent / "docs" / "tutorials").glob("*.ipynb"))


def kinds(outputs: list[dict]) -> list[tuple[str, list[str]]]:
    return [(each["output_type"], sorted(each.get("data", {}))) for each in outputs]


@pytest.mark.one_in(4)
@pytest.mark.long
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_it_runs_and_shows_the_same_kinds_of_outputs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = notebooks.cells_of(path)
    stored = [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    found = notebooks.run(notebook)
    assert len(TUTORIALS) == 7 and any(stored)
    assert list(map(kinds, found)) == list(map(kinds, stored))


def test_a_cell_shows_what_it_prints_and_its_last_value():
    cell = {"cell_type": "code", "source": ["x = 2\n", "print(x)\n", "x + 1"]}
    [outputs] = notebooks.run({"cells": [{"cell_type": "markdown"}, cell]})
    assert [each.get("text") or each["data"]["text/plain"] for each in outputs] == [["2\n"], ["3"]]


def test_a_command_that_fails_fails_its_cell():
    cell = {"cell_type": "code", "source": ["!kronsae train \\\n", "    --no-such-flag"]}
    with pytest.raises(AssertionError, match="exit status 2"):
        notebooks.run({"cells": [cell]})
