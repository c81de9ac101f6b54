"""Files that are whole or not there, and JSON that knows its own checksum."""

import builtins
import errno
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kronsae import InputError
from kronsae.runs.folder import RunFolder, output_folder
from kronsae.system.files import (
    check_writable,
    read_checksummed,
    remove_directory,
    remove_leftovers,
    replace_directory,
    write_checksummed,
    write_text,
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


def read_only(*args, **kwargs):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


@pytest.mark.parametrize(
    "write", [write_text, lambda path, _: replace_directory(path, lambda new: (new / "a").touch())]
)
def test_a_file_system_that_becomes_read_only_is_what_the_message_says(
    write, tmp_path, monkeypatch
):
    """What was half-written cannot be removed any more: that error hid the first one."""
    for name in ("replace", "rename", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, read_only)
    with pytest.raises(InputError, match="new could not be written.*Read-only file system"):
        write(tmp_path / "new", "text")


def test_a_folder_that_cannot_be_removed_is_named(tmp_path, monkeypatch):
    (tmp_path / "old").mkdir()
    monkeypatch.setattr(os, "rename", read_only)
    with pytest.raises(InputError, match="old cannot be removed.*Read-only file system"):
        remove_directory(tmp_path / "old")


def test_a_folder_is_tried_before_the_work_that_is_for_it(tmp_path, monkeypatch):
    check_writable(tmp_path)
    check_writable(tmp_path / "of" / "some" / "folders")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "in it", Path("/proc/here")):
        with pytest.raises(InputError, match="cannot be written to"):
            check_writable(place)
    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    with pytest.raises(InputError, match="Read-only file system"):
        check_writable(tmp_path)
    with pytest.raises(InputError, match="Read-only file system"):
        RunFolder.check_free(tmp_path / "run")


def test_commands_that_start_in_the_same_second_write_to_folders_of_their_own(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda _: "20260101-000000")
    with output_folder(None, "evaluation") as first, output_folder(None, "evaluation") as second:
        assert [first.name, second.name] == [
            "evaluation-20260101-000000",
            "evaluation-20260101-000000-2",
        ]
        RunFolder.check_free(first)
        (first / "evaluation.json").touch()
    assert list((tmp_path / "runs").iterdir()) == [tmp_path / first], "an empty one is removed"
    (tmp_path / first / "evaluation.json").unlink()
    (tmp_path / first).rmdir()
    (tmp_path / "runs").rmdir()
    with output_folder(None, "evaluation"):
        pass
    assert not list(tmp_path.iterdir()), "nor does an empty runs/ stay"
    with output_folder(tmp_path, "evaluation") as given:
        assert given == tmp_path


def test_a_folder_that_cannot_be_made_is_an_input_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs"
    for make in (lambda: runs.symlink_to("nowhere"), lambda: runs.symlink_to("runs"), runs.touch):
        make()
        problem = "runs/run-.* cannot be created: .*runs"
        with pytest.raises(InputError, match=problem), output_folder(None, "run"):
            pass
        runs.unlink()


def test_folders_of_commands_that_come_and_go_are_their_own(tmp_path, monkeypatch):
    """No other command has the folder while one writes in it, whoever clears runs/ away."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda _: "20260101-000000")

    def come_and_go(writer: int) -> None:
        for _ in range(100):
            with output_folder(None, "run") as out:
                mine = out / "mine"
                mine.touch(exist_ok=False)
                mine.unlink()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(come_and_go, range(4)))
    assert not list(tmp_path.iterdir())


def test_a_log_on_a_disk_that_fails_is_an_input_error(tmp_path, monkeypatch):
    run = RunFolder.create(tmp_path / "run", {"config": {}, "data": {}})
    monkeypatch.setattr(builtins, "open", read_only)
    with pytest.raises(InputError, match="metrics.jsonl could not be written.*Read-only"):
        run.log({"step": 1})


def test_files_may_be_read_as_umask_says(tmp_path):
    """Also those of safetensors, which lets the owner alone read what it writes."""
    before = os.umask(0o027)
    try:
        replace_directory(tmp_path / "new", lambda new: save_file({"a": torch.ones(2)}, new / "a"))
    finally:
        os.umask(before)
    assert (tmp_path / "new" / "a").stat().st_mode & 0o777 == 0o640
