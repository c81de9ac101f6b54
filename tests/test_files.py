"""Files that are whole or not there, and JSON that knows its own checksum."""

import json

import pytest

from kronsae.system.files import (
    read_checksummed,
    remove_directory,
    remove_leftovers,
    write_checksummed,
)

DOCUMENT = {"name": "é", "rates": [0.1, 1e-300, 3], "deep": {"none": None, "on": True}}


def test_checksummed_values_come_back(tmp_path):
    path = tmp_path / "a.json"
    write_checksummed(path, DOCUMENT)
    assert read_checksummed(path) == DOCUMENT
    # Written by another program, in another order: the values count.
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(stored.items()))))
    assert read_checksummed(path) == DOCUMENT


def test_any_flipped_bit_is_noticed_or_changes_nothing(tmp_path):
    path = tmp_path / "a.json"
    write_checksummed(path, DOCUMENT)
    content = path.read_bytes()
    noticed = 0
    for place in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            try:
                values = read_checksummed(path)
            except ValueError:
                noticed += 1
            else:  # blanks; or the word "checksum" itself
                assert {name: values.get(name) for name in DOCUMENT} == DOCUMENT
    assert noticed > 5 * len(content)


def test_what_people_write_has_no_checksum(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[1]")
    assert read_checksummed(path) == [1]
    path.write_text('{"a": 1}')
    assert read_checksummed(path) == {"a": 1}
    path.write_text('{"a": 1, "checksum": "0"}')
    with pytest.raises(ValueError, match="on purpose, take the 'checksum' out"):
        read_checksummed(path)


def test_a_folder_that_is_removed_is_never_half_there(tmp_path, monkeypatch):
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    (folder / "a").write_text("a")

    def killed(path, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("kronsae.system.files.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_directory(folder)
    monkeypatch.undo()
    assert not folder.exists()
    remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())
