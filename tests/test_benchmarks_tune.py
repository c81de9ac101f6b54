"""The search for better configurations: what it measures, refuses, chooses and writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
SEARCH = """
import sys
from benchmarks import shapes, tune

shapes.SHAPES["tiny"] = shapes.Shape("tiny", d=40, heads=4, m=1, n=2, k=2, tokens=3)
tune.KERNELS["group_entries"] = tune.update_bias, [{"WIDTH": 1}]  # that does not launch it
tune.KERNELS["update_vector"][1][:] = [{"WIDTH": 32}, {"WIDTH": 20}]
tune.KERNELS["select_latents"][1][:] = [{"num_warps": 2}]  # it has too little work for two
tune.main(sys.argv[1:])
"""


@pytest.fixture(autouse=True)
def root_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.mark.slow
def test_search_in_the_interpreter(tmp_path):
    """An alternative is measured; one that no kernel can have is passed over, with the reason."""
    file = tmp_path / "tune.json"
    command = ["--shape", "tiny", "--kernels", "update_vector", "group_entries"]
    command += ["select_latents"]
    done = subprocess.run(
        [sys.executable, "-c", SEARCH, *command, "--rounds", "2", "--device", "cpu"]
        + ["--json", str(file)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    vector, group, select_latents = json.loads(file.read_text())["kernels"]
    assert {name: len(times) for name, times in vector["times_ms"].items()} == {
        "as it is": 2,
        "WIDTH 32": 2,
    }
    assert vector["present"]["WIDTH"] == 16
    assert vector["skipped"].keys() == {"WIDTH 20"}  # a block is a power of two
    assert group["skipped"] == {"as it is": "not launched at this shape"}
    assert select_latents["skipped"] == {"num_warps 2": "launches the same"}
    assert "update_vector, tiny: num_warps 4" in done.stdout


def test_without_a_gpu_or_the_interpreter_it_says_why(capsys, monkeypatch):
    from benchmarks import tune

    monkeypatch.setattr("kronsae_kernels.triton_impl.launch.interpreted", lambda: False)
    with pytest.raises(SystemExit):
        tune.main(["--device", "cpu"])
    assert "Triton needs a GPU" in capsys.readouterr().err


def test_wrong_result_is_not_timed(monkeypatch):
    import torch

    from benchmarks import tune
    from benchmarks.shapes import Shape
    from kronsae_kernels.triton_impl import configs, launch

    class Nothing:
        shape = Shape("none", 1, 1, 1, 1, 1, 1)

        def reset(self):
            pass

    class Kernel:
        def fn(self):
            pass

    def call(data):
        config = configs.config_of("segments", "interpreter")
        if launch.recording():
            launch.launch(Kernel, (1,), config)
        return (torch.ones(3) * config.num_stages,)

    alternatives = [{"num_stages": 2}, {"num_warps": 2}]
    monkeypatch.setitem(tune.KERNELS, "segments", (call, alternatives))
    device = torch.device("cpu")
    found = tune.measure("segments", Nothing(), device, rounds=1, end=float("inf"))
    assert found["times_ms"].keys() == {"as it is", "num_warps 2"}
    assert "relative error 1.0" in found["skipped"]["num_stages 2"]
    late = tune.measure("segments", Nothing(), device, rounds=1, end=0.0)
    assert late["times_ms"].keys() == {"as it is"}
    assert late["skipped"]["num_warps 2"] == "no time left"


def test_integers_must_be_equal():
    import torch

    from benchmarks.measure import WrongResult
    from benchmarks.tune import require_same

    indices = torch.arange(100_000)
    other = indices.clone()
    other[7] += 1
    require_same((indices, indices.float()), (indices.clone(), indices + 1e-3))
    with pytest.raises(WrongResult, match="result 1: 1 of 100000 differ"):
        require_same((indices.float(), indices), (indices.float(), other))


def test_alternatives_are_of_the_table():
    """Each kernel has some, or is said to have none; each names numbers that its kernel has."""
    from benchmarks import tune
    from kronsae_kernels.triton_impl import configs

    default = json.loads(configs.PATH.read_text())["default"]
    assert not tune.KERNELS.keys() & set(tune.NOT_TUNED)
    assert tune.KERNELS.keys() | set(tune.NOT_TUNED) == default.keys()
    for kernel, (_, alternatives) in tune.KERNELS.items():
        assert alternatives
        for changes in alternatives:
            with configs.override(kernel, **changes):
                for generation in ("sm_90", "interpreter"):
                    found = configs.config_of(kernel, generation)
                    numbers = {**found._asdict(), **found.blocks}
                    assert {name: numbers[name] for name in changes} == changes
        assert configs.config_of(kernel, "none").num_warps == default[kernel]["num_warps"]
    with pytest.raises(ValueError, match="WARPS"), configs.override("combine", WARPS=4):
        pass


def result(kernel, shape, **times):
    times = {name.replace("_", " "): values for name, values in times.items()}
    changes = {name: {"num_warps": int(name.split()[1])} for name in times if name != "as it is"}
    return {"kernel": kernel, "shape": shape, "times_ms": times, "changes": changes}


def test_what_is_chosen():
    """Better by more than the spread at a shape, worse at none; of these the fastest."""
    from benchmarks.tune import chosen

    present = [1.0, 1.1, 1.2]
    better, best, near, worse = [0.8, 0.8, 0.9], [0.7, 0.7, 0.7], [0.9, 1.0, 1.1], [1.3, 1.3, 1.4]
    one = result("a", "P1", as_it_is=present, warps_2=best, warps_4=better, warps_8=near)
    two = result("a", "P3", as_it_is=present, warps_2=worse, warps_4=near, warps_8=near)
    assert chosen([one]) == {"a": {"num_warps": 2}}
    assert chosen([one, two]) == {"a": {"num_warps": 4}}
    assert chosen([result("b", "P1", as_it_is=present, warps_8=near)]) == {}
    nothing = {"kernel": "c", "shape": "P1", "times_ms": {}, "skipped": {"as it is": "..."}}
    assert chosen([nothing]) == {}


def test_what_is_written(tmp_path, monkeypatch, capsys):
    """A line for each kernel, as in the file; what equals the default is not repeated."""
    from benchmarks import tune
    from kronsae_kernels.triton_impl import configs

    text = configs.PATH.read_text()
    assert tune.dumps(json.loads(text)) == text
    path = tmp_path / "configs.json"
    path.write_text(text)
    monkeypatch.setattr(configs, "PATH", path)
    default = json.loads(text)["default"]["combine"]["num_warps"]
    found = {"generation": "sm_77", "better": {"combine": {"num_warps": 2 * default, "ROWS": 2}}}
    (tmp_path / "tune.json").write_text(json.dumps(found))
    tune.main(["--read", str(tmp_path / "tune.json"), "--write"])
    assert "better: combine: num_warps" in capsys.readouterr().out
    table = json.loads(path.read_text())
    assert table.pop("sm_77") == {"combine": {"num_warps": 2 * default, "ROWS": 2}}
    assert table == json.loads(text)
    tune.write("sm_77", {"combine": {"num_warps": default}}, path)
    assert json.loads(path.read_text())["sm_77"] == {"combine": {"ROWS": 2}}
    tune.write("sm_77", {"combine": {"ROWS": json.loads(text)["default"]["combine"]["ROWS"]}}, path)
    assert path.read_text() == text


@pytest.mark.parametrize(
    "content, words",
    [(None, "No such file"), ("x", "Expecting value"), ("{}", "'generation'"), ("[]", "list")],
)
def test_what_was_not_written_is_not_read(content, words, tmp_path, capsys):
    from benchmarks import tune

    file = tmp_path / "other.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SystemExit):
        tune.main(["--read", str(file), "--write"])
    said = capsys.readouterr().err
    assert f"--read: {file} is not what --json wrote" in said and words in said
