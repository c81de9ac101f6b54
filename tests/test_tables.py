"""Tables, templates and differences: what is in a cell or a value cannot break the document."""

import jinja2
import pytest

from kronsae.errors import differences
from kronsae.system.tables import aligned, markdown
from kronsae.system.templates import render


def test_a_table():
    rows = [("a", 1), ("b", 2.5)]
    assert markdown(("name", "value"), rows) == (
        "| name | value |\n| --- | --- |\n| a | 1 |\n| b | 2.5 |"
    )
    assert markdown(("", "x"), [], numeric=True) == "|  | x |\n| --- | ---: |"


def test_cells_stay_in_their_cell():
    table = markdown(("a|b",), [("one\ntwo | three",)])
    assert table == "| a\\|b |\n| --- |\n| one two \\| three |"


def test_values_are_escaped_in_html_alone(tmp_path):
    for name, expected in (("page.html.j2", "&lt;b&gt;"), ("card.md.j2", "<b>")):
        (tmp_path / name).write_text("{{ text }}\n")
        assert render(tmp_path / name, text="<b>") == f"{expected}\n"


def test_a_missing_value_is_an_error(tmp_path):
    (tmp_path / "page.html.j2").write_text("{{ text }}")
    with pytest.raises(jinja2.UndefinedError):
        render(tmp_path / "page.html.j2")


def test_columns_are_aligned():
    rows = [("a", "1.0"), ("long name", "12.50")]
    assert aligned(("", "value"), rows).splitlines() == [
        "           value",
        "a            1.0",
        "long name  12.50",
    ]


def test_differences():
    was, now = {"lr": 1, "sae": {"k": 3, "m": 2}}, {"lr": 2, "sae": {"k": 4, "m": 2}, "new": 5}
    assert differences(was, now) == [
        "lr: was 1, is 2",
        "new: was not set, is 5",
        "sae.k: was 3, is 4",
    ]
    assert differences(was, now, "config", {"config.sae.k", "config.lr"}) == [
        "config.new: was not set, is 5"
    ]
