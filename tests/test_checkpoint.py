"""Checkpoints and files: complete, atomic, checked, free of pickle."""

import math
import os

import pytest
import torch
from safetensors.torch import save

from kronsae import InputError
from kronsae.runs.folder import RunFolder, SweepFolder
from kronsae.runs.resume import open_to_resume
from kronsae.system import checkpoint, files

STATE = {
    "weights": {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)},
    "shared": [torch.arange(6.0)[::2], torch.zeros(1).expand(3)],
    "generator": torch.Generator().manual_seed(3).get_state(),
    "empty": torch.empty(0, 4),
    "step": 7,
    "rate": 0.1 + 0.2,
    "names": ["x", None, True, {"deep": 1}],
}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b and type(a) is type(b)


def test_round_trip_is_exact(tmp_path):
    loaded = checkpoint.load_state(checkpoint.save_state(tmp_path / "step-00000007", STATE))
    assert same(STATE, loaded)


@pytest.mark.parametrize(
    "value", [object(), {1: 2}, {"f": lambda: 0}, float], ids=["object", "key", "function", "type"]
)
def test_refuses_what_is_neither_tensor_nor_json(value, tmp_path):
    with pytest.raises(TypeError):
        checkpoint.save_state(tmp_path / "step", {"value": value})
    assert list(tmp_path.iterdir()) == []


def _flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def _replace(path, old, new):
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: _flip(f / "state.safetensors", -1),
        lambda f: _flip(f / "state.safetensors", 9),
        lambda f: (f / "state.safetensors").write_bytes(b""),
        lambda f: (f / "state.safetensors").unlink(),
        lambda f: (f / "state.json").unlink(),
        lambda f: (f / "state.json").write_text("[1]"),
        lambda f: (f / "state.json").write_bytes((f / "state.json").read_bytes()[:-20]),
        lambda f: _replace(f / "state.json", '"step": 7', '"step": 6'),
    ],
    ids=[
        "tensor byte",
        "header byte",
        "empty",
        "no tensors",
        "no json",
        "other json",
        "cut json",
        "a digit",
    ],
)
def test_damage_is_noticed(damage, tmp_path):
    folder = checkpoint.save_state(tmp_path / "step-00000001", STATE)
    damage(folder)
    with pytest.raises(InputError, match="damaged.*remove the folder"):
        checkpoint.load_state(folder)


@pytest.mark.parametrize("tensors", [b"not one", save({"other": torch.ones(2)})])
def test_a_file_that_is_whole_but_not_the_right_one(tensors, tmp_path):
    folder = checkpoint.save_state(tmp_path / "step-00000001", STATE)
    (folder / "state.safetensors").write_bytes(tensors)
    document = files.read_checksummed(folder / "state.json")
    digest = files.sha256(folder / "state.safetensors")
    files.write_checksummed(folder / "state.json", document | {"sha256": digest})
    with pytest.raises(InputError, match="damaged.*tensors.*remove the folder"):
        checkpoint.load_state(folder)


def test_other_format_version(tmp_path):
    folder = checkpoint.save_state(tmp_path / "step-00000001", STATE)
    document = files.read_checksummed(folder / "state.json")
    files.write_checksummed(folder / "state.json", document | {"format_version": 4})
    with pytest.raises(InputError, match="expected format version 2 or 3, got 4"):
        checkpoint.load_state(folder)


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    target = tmp_path / "step-00000001"
    checkpoint.save_state(target, {"step": 1})

    def full(path, value):
        (path.parent / "half").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_checksummed", full)
    with pytest.raises(InputError, match="No space left on device.*nothing was left"):
        checkpoint.save_state(target, {"step": 2})
    monkeypatch.undo()
    assert checkpoint.load_state(target) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_message_for_a_text(monkeypatch, tmp_path):
    monkeypatch.setattr(files, "_beside", lambda path: files.Path("/dev/full"))
    monkeypatch.setattr(files.Path, "unlink", lambda self, missing_ok=False: None)
    with pytest.raises(InputError, match="could not be written.*No space left"):
        files.write_text(tmp_path / "report.html", "x")


def test_leftovers_of_a_killed_write_are_ignored_and_removed(tmp_path):
    run = RunFolder.create(tmp_path / "run", {"config": {}, "data": {}})
    run.save_checkpoint(5, {"step": 5}, keep=2)
    leftover = run.checkpoints / ".step-00000006.0a1b2c3d.partial"
    leftover.mkdir()
    (leftover / "state.safetensors").write_bytes(b"half")
    (run.path / ".report.html.0a1b2c3d.partial").write_text("half")
    again, _ = RunFolder.open(run.path)
    again.lock()
    assert again.load_checkpoint()["step"] == 5
    assert not leftover.exists() and not list(run.path.glob(".*.partial"))


def test_an_interrupted_replacement_loses_neither_copy(tmp_path, monkeypatch):
    """The second rename fails, or the process dies before it: the old folder is still there."""
    import os

    folder = checkpoint.save_state(tmp_path / "step-00000001", {"step": 1})
    rename, calls = os.rename, []

    def fail_once(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_once)
    with pytest.raises(InputError, match="Input/output error"):
        checkpoint.save_state(folder, {"step": 2})
    monkeypatch.undo()
    assert checkpoint.load_state(folder) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]
    rename(folder, tmp_path / ".step-00000001.0a1b2c3d.replaced")  # killed between the renames
    files.remove_leftovers(tmp_path)
    assert checkpoint.load_state(folder) == {"step": 1}


def test_only_one_process_trains_a_run(tmp_path):
    run = RunFolder.create(tmp_path / "run", {"config": {}, "data": {}})
    run.lock()
    other, _ = RunFolder.open(run.path)  # to read it is fine
    with pytest.raises(InputError, match="is being trained by another process"):
        other.lock()
    run.release()
    other.lock()
    other.release()


def test_newest_is_loaded_and_old_ones_go(tmp_path):
    run = RunFolder.create(tmp_path / "run", {"config": {}, "data": {}})
    for step in (9, 10, 100_000_000):
        run.log({"step": step})
        run.save_checkpoint(step, {"step": step}, keep=2)
    run.log({"step": 100_000_001})
    names = [p.name for p in checkpoint.list_checkpoints(run.checkpoints)]
    assert names == ["step-00000010", "step-100000000"]
    assert run.load_checkpoint()["step"] == 100_000_000
    assert len(run.metrics.read_text().splitlines()) == 3  # what came later is cut off


def test_run_folder_that_exists(tmp_path):
    run = RunFolder.create(tmp_path / "run", {"config": {}, "data": {}})
    with pytest.raises(InputError, match="exists already: --resume .*run goes on with it"):
        RunFolder.create(run.path, {"config": {}, "data": {}})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="exists already: choose another"):
        RunFolder.create(tmp_path / "other", {"config": {}, "data": {}})
    with pytest.raises(InputError, match="no run folder"):
        RunFolder.open(tmp_path / "other")


def test_a_damaged_config_has_copies(tmp_path):
    run = RunFolder.create(tmp_path / "run", {"config": {"a": 1}, "data": {}})
    whole = run.config.read_bytes()
    run.config.write_text("{")
    with pytest.raises(InputError, match="cannot be read.*begin again"):
        RunFolder.open(run.path)  # nothing was learned yet
    run.config.write_bytes(whole)
    for step in (5, 6):
        run.save_checkpoint(step, {"step": step}, keep=2)
    run.config.write_bytes(whole[:-9])
    with pytest.raises(InputError, match="is damaged.*\n  cp .*step-00000006/config.json .*/run/"):
        RunFolder.open(run.path)
    newest = run.checkpoints / "step-00000006" / "config.json"
    newest.rename(run.path / "kept")
    newest.write_text("{")  # the disk has more such places: the older copy is whole
    with pytest.raises(InputError, match="is damaged.*\n  cp .*step-00000005/config.json .*/run/"):
        RunFolder.open(run.path)
    (run.path / "kept").rename(run.config)
    assert RunFolder.open(run.path)[1]["config"] == {"a": 1}


def test_a_config_that_is_damaged_while_it_runs_is_copied_whole(tmp_path):
    run = RunFolder.create(tmp_path / "run", {"config": {"a": 1}, "data": {}})
    run.config.unlink()
    run.save_checkpoint(5, {"step": 5}, keep=2)
    copy = files.read_checksummed(run.checkpoints / "step-00000005" / "config.json")
    assert copy["config"] == {"a": 1}


def test_a_sweep_without_its_index_has_copies(tmp_path):
    sweep = SweepFolder.create(tmp_path / "sweep", {"a": {"config": {}, "data": {}}})
    sweep.save_checkpoint(5, {"members": {"a": {"step": 5}}}, keep=2)
    sweep.index.unlink()
    with pytest.raises(InputError, match="cp .*step-00000005/sweep.json .*/sweep/sweep.json"):
        open_to_resume(sweep.path)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="does not exist$"):
        open_to_resume(tmp_path / "typo")


def test_only_one_process_makes_a_run(tmp_path, monkeypatch):
    """Both saw a free folder; the second one finds, under the lock, what the first one made."""
    free, first = [], []

    def check(path):
        free.append(path)
        if len(free) == 1:  # between the second one's look and its lock
            first.append(RunFolder.create(path, {"config": {"mine": 1}, "data": {}}))
        original(path)

    original = RunFolder.check_free
    monkeypatch.setattr(RunFolder, "check_free", staticmethod(check))
    with pytest.raises(InputError, match="exists already"):
        RunFolder.create(tmp_path / "run", {"config": {"mine": 2}, "data": {}})
    assert RunFolder.open(tmp_path / "run")[1]["config"] == {"mine": 1}


@pytest.mark.parametrize("name", ["mine/figures/", ".notes.partial", "mine/notes.txt", "metrics"])
def test_what_others_made_is_left_alone(name, tmp_path):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.mkdir() if name.endswith("/") else path.write_text("")
    for kind in (RunFolder, SweepFolder):
        with pytest.raises(InputError, match="exists already"):
            kind.create(tmp_path / "run", {"a": {"config": {}, "data": {}}})
    assert path.exists()


def test_a_run_killed_while_it_was_made_can_be_made_again(tmp_path):
    begun = tmp_path / "run"
    (begun / "checkpoints").mkdir(parents=True)
    (begun / ".begun").touch()
    (begun / ".config.json.0a1b2c3d.partial").write_text("{")
    RunFolder.check_free(begun)
    RunFolder.create(begun, {"config": {}, "data": {}})
    with pytest.raises(InputError, match="exists already: --resume"):
        RunFolder.check_free(begun)
    (begun / ".begun").touch()  # it was killed between its last two files
    run = RunFolder(begun)
    run.lock()
    run.release()
    assert not (begun / ".begun").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    with pytest.raises(InputError, match="exists already: choose another"):
        RunFolder.check_free(tmp_path / "mine")


def test_a_log_that_lost_bytes_keeps_whole_lines(tmp_path):
    run = RunFolder.create(tmp_path / "run", {"config": {}, "data": {}})
    for step in range(3):
        run.log({"step": step})
    run.save_checkpoint(5, {"step": 5}, keep=2)
    run.log({"step": 3})
    first, second, third, _ = run.metrics.read_bytes().splitlines(keepends=True)
    run.metrics.write_bytes(first + second[:5])
    lost = len(second) - 5 + len(third)
    with pytest.warns(UserWarning, match=f"has lost {lost} bytes.*training is not"):
        assert run.load_checkpoint()["step"] == 5
    assert run.metrics.read_bytes() == first
    run.metrics.unlink()
    with pytest.warns(UserWarning, match="has lost"):
        assert run.load_checkpoint()["step"] == 5


CHANGES = {
    "nothing": lambda lines: lines,
    "longer": lambda lines: [lines[0], b"[" * 5000 + b"\n", *lines[1:]],
    "infinite": lambda lines: [lines[0], b'{"kind": "train", "step": 1e999}\n', *lines[1:]],
    "first": lambda lines: [b'{"kind": "train", "step": 1e999}\n', *lines],
    "later": lambda lines: [b'{"kind": "train", "step": 99}\n', *lines],
    "shorter": lambda lines: [*lines[:2], lines[2][:40] + b"\n", *lines[3:]],
    "joined": lambda lines: [*lines[:2], lines[2][:40], *lines[3:]],
    "twice": lambda lines: [*lines[:2], *lines[1:]],
    "removed": lambda lines: [*lines[:2], *lines[3:]],
    "no step": lambda lines: [*lines[:2], files.log_line({"kind": "note"}).encode(), *lines[2:]],
    "half": lambda lines: [*lines[:-1], lines[-1][:9]],
}


@pytest.mark.parametrize("how", CHANGES)
def test_a_log_whose_lines_changed_loses_no_other_line(how, tmp_path):
    """Lines of all lengths; several of the checkpoint's step, and how a training ended in it."""
    run = RunFolder.create(tmp_path / "run", {"config": {}, "data": {}})
    before = [{"kind": "train", "step": step, "loss": 7.0**step} for step in range(5, 31, 5)]
    before += [{"kind": kind, "step": 30, "tokens": 300} for kind in ("heldout", "skipped")]
    for record in before:
        run.log(record)
    run.save_checkpoint(30, {}, keep=2)
    for kind, step in (("diverged", 30), ("final", 30), ("train", 35), ("train", 40)):
        run.log({"kind": kind, "step": step})
    changed = CHANGES[how](run.metrics.read_bytes().splitlines(keepends=True))
    run.metrics.write_bytes(b"".join(changed))
    expected, damaged = files.read_log(run.metrics)
    kinds = ("final", "diverged")
    expected = [
        r for r in expected if r.get("step", 0) in (*range(31), math.inf) and r["kind"] not in kinds
    ]
    assert len(expected) >= len(before) - 2
    run.load_checkpoint()
    assert run.metrics.read_bytes().endswith(b"\n")
    run.log({"kind": "train", "step": 35})
    assert files.read_log(run.metrics) == ([*expected, {"kind": "train", "step": 35}], damaged)


def test_a_setting_that_changes_is_kept_by_the_member_and_the_sweep(tmp_path):
    settings = {name: {"config": {"x": 1}, "data": {"dtype": 1, "d": 2}} for name in "ab"}
    sweep = SweepFolder.create(tmp_path / "sweep", settings)
    sweep.change("a", {"x": 3}, {"dtype": 4})
    again, found = SweepFolder.open(sweep.path)
    assert (found["a"]["config"], found["a"]["data"]) == ({"x": 3}, {"dtype": 4, "d": 2})
    assert found["b"]["config"] == {"x": 1}
    assert [each["config"] for each in again.members().values()] == [{"x": 3}, {"x": 1}]


def test_members_of_a_sweep_stay_in_its_folder(tmp_path):
    sweep = SweepFolder.create(tmp_path / "sweep", {"a": {"config": {}, "data": {}}})
    document = files.read_checksummed(sweep.index)
    document["members"]["../../mine"] = document["members"].pop("a")
    files.write_checksummed(sweep.index, document)
    with pytest.raises(InputError, match=r"sweep.json.*\.\./\.\./mine"):
        SweepFolder.open(sweep.path)
