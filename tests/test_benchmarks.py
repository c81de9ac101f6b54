"""The benchmarks run, at a toy shape, and refuse to time what is wrong."""

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import time
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if name != "TRITON_INTERPRET" and not name.startswith("PYTEST_")
}
"""As a user's: without the interpreter that the tests have, and no worker of pytest-xdist."""


@pytest.fixture(autouse=True)
def root_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def test_benchmarks_run_at_a_toy_shape(tmp_path):
    """Its table says in words what each row is."""
    file = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "--shapes", "toy", "--benchmark-only"]
        + [f"--benchmark-json={file}", "-p", "no:cacheprovider", "--iso-tokens", "4096"],
        cwd=ROOT,
        env={**ENVIRONMENT, "COLUMNS": "100"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    report = json.loads(file.read_text())["benchmarks"]
    operations = [one for one in report if "floor_ms" in one["extra_info"]]
    trainings = [one for one in report if "equal FLOPs" in one["group"]]
    assert len(operations) >= 11 and len(trainings) >= 6
    assert len(operations) + len(trainings) == len(report)
    for one in operations:
        info = one["extra_info"]
        assert info["tokens_per_s"] == pytest.approx(64 / one["stats"]["median"])
        share = info["floor_ms"] / 1e3 / one["stats"]["median"]
        assert info["share_of_ceiling"] == pytest.approx(share)
        assert info["flops"] > 0
        assert info["moved_bytes"] > 0
        assert info["torch"] == torch.__version__
        assert "d 16, F 64, k 4, 64 tokens a call" in one["group"]
    for one in trainings:
        info = one["extra_info"]
        assert info["tokens_per_s"] == pytest.approx(info["tokens"] / one["stats"]["median"])
        assert len(info["explained_variance"]) == one["stats"]["rounds"] == 2
        explained = sum(info["explained_variance"]) / 2
        assert f": explains {explained:.3f}, " in one["name"]
    table = done.stdout.partition("- benchmark ")[2].partition("Legend")[0].splitlines()
    assert any("Median" in line and "IQR" in line for line in table)
    assert max(len(one["name"]) for one in report) <= 60  # of 100 columns, 40 are for seconds
    assert all(any(line.startswith(one["name"]) for line in table) for one in report)


def test_comparison_at_a_toy_shape(capsys, tmp_path):
    from benchmarks import compare

    compare.main(["--shape", "toy", "--rounds", "3", "--json", str(tmp_path / "times.json")])
    printed = capsys.readouterr().out
    for words in (
        "toy: d 16, F 64",
        "| listing / kron |",
        "| topk / kron |",
        "| kron / kron product |",
    ):
        assert words in printed
    (of_shape,) = json.loads((tmp_path / "times.json").read_text())["shapes"]
    times = of_shape["times_ms"]
    assert {len(found) for found in times.values()} == {3}
    ratios = sorted(a / b for a, b in zip(times["listing"], times["kron"], strict=True))
    assert of_shape["ratios"]["listing / kron"] == pytest.approx(ratios[1])


CPU = torch.device("cpu")


def compared(**options):
    from benchmarks import measure
    from benchmarks.shapes import SHAPES

    return measure.compare_steps(SHAPES["toy"], CPU, rounds=1, warmup=0, **options)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--device", "foo"], "argument --device: device 'foo' cannot be used"),
        (["--device", "mps"], "argument --device: device 'mps' cannot be used"),
        (["--seconds", "-5"], "argument --seconds: expected a number of seconds above 0"),
        (["--seconds", "nan"], "argument --seconds: expected a number of seconds above 0"),
        (["--json", "{folder}"], "argument --json: expected a file"),
        (["--json", "{folder}/none/x.json"], "argument --json: expected a file in a folder that"),
    ],
)
@pytest.mark.parametrize("name", ["compare", "profile", "tune", "overlap"])
def test_wrong_arguments_are_said_before_anything_is_timed(
    name, arguments, words, tmp_path, capsys
):
    module = importlib.import_module(f"benchmarks.{name}")
    with pytest.raises(SystemExit) as left:
        module.main([argument.format(folder=tmp_path) for argument in arguments])
    assert left.value.code == 2 and words in capsys.readouterr().err


def test_wrong_step_reports_no_time(monkeypatch):
    """A step with another loss, and an operation with another result, are found out."""
    from benchmarks import measure, steps
    from benchmarks.shapes import SHAPES

    kron = steps.CONTENDERS["kron"]
    with monkeypatch.context() as patch:
        other = kron._replace(make=lambda shape, device: kron.make(shape._replace(k=3), device))
        patch.setitem(steps.CONTENDERS, "kron", other)
        found = compared()
    assert "losses of kron and the reference" in found.skipped["kron"]
    assert "kron" not in found.timings
    assert {"dense", "listing", "topk"} <= found.timings.keys()

    def wrong(*arguments, impl):
        return steps.kron_loss(*arguments, impl=impl) * (1 if impl else 1.01)

    monkeypatch.setitem(steps.LOSSES, "kron", (wrong, steps.kron_parameters))
    with pytest.raises(measure.WrongResult, match="toy loss"):
        measure.check_gradients(SHAPES["toy"], "kron", CPU)
    found = compared()
    assert "toy loss" in found.skipped["kron"]
    assert {"dense", "listing", "topk"} <= found.timings.keys()


@pytest.mark.parametrize("one_by_one", [False, True], ids=["in turns", "one by one"])
def test_what_fails_costs_only_itself(monkeypatch, one_by_one):
    """A contender that raises, in the middle: the others are timed, and the reason is kept."""
    from benchmarks import steps

    def planted(shape, device):
        raise RuntimeError("an illegal memory access was encountered")

    dense = steps.CONTENDERS["dense"]._replace(make=planted)
    monkeypatch.setitem(steps.CONTENDERS, "dense", dense)
    told = []
    call = {"call": lambda function, *arguments: function(*arguments)} if one_by_one else {}
    found = compared(tell=lambda found: told.append(dict(found.timings)), **call)
    assert found.skipped["dense"] == "RuntimeError: an illegal memory access was encountered"
    timed = {"topk", "kron", "listing", "kron encode", "kron product", "dense product"}
    assert found.timings.keys() == timed
    assert told[-1].keys() == timed
    assert len(told) == (4 if one_by_one else 1)  # after each, should the process be stopped


def test_a_shape_that_fails_costs_only_itself(monkeypatch, tmp_path, capsys):
    from benchmarks import compare, measure
    from benchmarks.shapes import SHAPES

    broken = SHAPES["toy"]._replace(name="broken", k=10**6)
    monkeypatch.setitem(SHAPES, "broken", broken)
    file = tmp_path / "times.json"
    monkeypatch.setattr(measure, "measure_ceilings", lambda device: compare.Ceilings(1e9, 1e9, 1e9))
    compare.main(["--shape", "broken", "toy", "--rounds", "1", "--json", str(file)])
    first, second = json.loads(file.read_text())["shapes"]
    assert first["failed"] and "median_ms" not in first
    assert "kron" in second["median_ms"]
    out = capsys.readouterr().out
    assert "| kron encode / kron product |" in out and "MISSED" not in out  # goals are a GPU's


def test_another_process_is_replaced_when_it_dies():
    """As a kernel with an invalid access leaves one: what comes next finds a device that works."""
    from benchmarks.measure import Apart, Failed

    call = Apart()
    try:
        assert call(divmod, 7, 2) == (3, 1)
        with pytest.raises(Failed, match="ZeroDivisionError"):
            call(divmod, 7, 0)
        first = call.process.pid
        with pytest.raises(Failed, match="its process died"):
            call(os._exit, 3)
        assert call(divmod, 9, 2) == (4, 1)
        assert call.process.pid != first
        with pytest.raises(Failed, match="not done after 1 s"):
            call(time.sleep, 60, seconds=1)
        assert call(divmod, 9, 4) == (2, 1)
    finally:
        call.close()


def test_goals_are_judged():
    """At the shapes that they are for, on a GPU."""
    from benchmarks import compare, floors
    from benchmarks.measure import Comparison, Timing
    from benchmarks.shapes import SHAPES

    times = {"kron encode": 3.0, "kron product": 2.0, "kron fused": 5.0, "kron graphed": 4.0}
    times |= {"topk": 20.0}
    found = Comparison({name: Timing([ms]) for name, ms in times.items()}, {}, {})
    assert compare.verdicts(found, floor_ms=3.2) == [
        "kron encode / kron product at most 1.15: 1.50 (kron encode), MISSED",
        "ours / floor at most 1.25: 1.25 (kron graphed), reached",
        "eai-sparsify / ours at least 3.0: not measured",
        "topk / ours at least 4.5: 5.00 (topk), reached",
    ]
    rates = floors.ASSUMED["H200"]
    for name, device, count in (("G1", "cuda", 4), ("S1", "cuda", 0), ("G1", "cpu", 0)):
        one = compare.record(SHAPES[name], found, rates, rates, torch.device(device))
        assert len(one["goals"]) == count, (name, device)


def test_the_goal_of_a_step_is_one_number():
    """That of the comparison, of the prediction, and of the README."""
    from benchmarks import compare, floors
    from benchmarks.shapes import SHAPES

    (goal,) = (goal for goal in compare.GOALS if goal.under == "floor")
    text = " ".join((ROOT / "benchmarks" / "README.md").read_text().split())
    assert f"a step at most {goal.most} times its floor" in text
    if importlib.util.find_spec("triton"):
        from benchmarks import predict

        found = {"shape": SHAPES["G1"]._asdict(), "card": "sm_80", "step_ms": 1, "floor_ms": 1}
        lines = predict.verdicts({**found, "encode_and_select_ms": 1, "product_ms": 1})
        assert lines[0].endswith(f"at most {goal.most}") and goal.most == floors.STEP_GOAL


def test_wrong_index_is_found(monkeypatch):
    from benchmarks import check

    case = check.Case(2, 16, 12, 2, 4, 5, "mand", torch.bfloat16)
    (right,) = check.check_selection(case, CPU)
    assert right["error"] == 0

    encode = check.fused_encode

    def swapped(*arguments, impl=None, **options):
        codes = encode(*arguments, impl=impl, **options)
        if impl is None:
            codes.indices[7, :2] = codes.indices[7, :2].flip(0).clone()
        return codes

    monkeypatch.setattr(check, "fused_encode", swapped)
    (wrong,) = check.check_selection(case, CPU)
    assert wrong["error"] == 2


def test_a_check_that_raises_is_a_finding(monkeypatch, tmp_path):
    from benchmarks import check

    def planted(case, device, encoders=()):
        raise RuntimeError("planted")

    monkeypatch.setattr(check, "check_operations", planted)
    file = tmp_path / "check.json"
    with pytest.raises(SystemExit) as left:
        check.main(["--device", "cpu", "--smallest", "--json", str(file)])
    assert left.value.code == 1
    found = json.loads(file.read_text())
    assert [one["error"] for one in found["wrong"]] == 2 * ["RuntimeError: planted"]
    assert [one["error"] for one in found["checks"]].count(0) == 2  # the indices


def test_predictions_stand_beside_what_was_measured():
    from benchmarks import profile, report
    from benchmarks.shapes import SHAPES

    row = {"kernel": "update_rows", "expected_ms": 1.0, "floor_ms": 0.9, "registers": 64}
    times = {"update_rows": 1.5, "select_heads": 0.3}
    found = profile.beside(times, {"rows": [row]})
    assert found == [{"kernel": "update_rows", "expected_ms": 1.0, "floor_ms": 0.9, "ms": 1.5}]
    assert profile.beside(times, None) == []
    one = {"shape": SHAPES["toy"]._asdict(), "contender": "kron fused", "stages": {}}
    table = report.profile_table({"profiles": [{**one, "step_ms": 2.0, "predicted": found}]})
    assert "| update_rows | 1.500 | 1.000 | 0.900 | ×1.50 |" in table


def test_what_is_read_again_is_read():
    """The kernel that the cache is measured with adds up what it should have read."""
    pytest.importorskip("triton")
    from benchmarks.cached_reads import BLOCK, STEP, read_again

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = torch.randint(0, 255, (4 * BLOCK * 5,), dtype=torch.uint8, device=device)
    blocks = data.view(torch.int32).view(5, BLOCK)
    expected = [sum(blocks[(i + r * STEP) % 5] for r in range(8)) for i in range(5)]
    assert torch.equal(read_again(data, 8), torch.stack(expected).int())


@pytest.mark.parametrize("name", ["eai-sparsify", "sae-lens", "dictionary-learning"])
def test_peer_is_checked_and_trains(name, monkeypatch):
    """It reconstructs what our TopK SAE does, its step changes that; and a wrong one is found."""
    from benchmarks import measure, peers, steps
    from benchmarks.shapes import SHAPES, batches

    if reason := peers.why_not(name):
        pytest.skip(reason)
    shape = SHAPES["toy"]
    xs = batches(shape)
    measure.check_peer(name, shape, xs[0])
    weights = [p.detach() for p in steps.dense_parameters(shape, xs[0].device)]
    peer = peers.PEERS[name].make(shape, *weights)
    with torch.no_grad():
        before = peer.reconstruct(xs[0]).clone()
    for x in xs:
        assert torch.isfinite(peer.step(x))
    with torch.no_grad():
        assert not torch.allclose(peer.reconstruct(xs[0]), before, atol=1e-7)

    library = peers.PEERS[name]
    wrong = library._replace(make=lambda shape, *w: library.make(shape._replace(k=3), *w))
    monkeypatch.setitem(peers.PEERS, name, wrong)
    with pytest.raises(measure.WrongResult, match="reconstruction"):
        measure.check_peer(name, shape, xs[0])


def test_absent_peers_say_how_to_install_them(monkeypatch):
    from benchmarks import peers

    monkeypatch.setattr(peers, "version", lambda name: None)
    found = compared()
    for name in peers.PEERS:
        assert ".[peers]' && pip uninstall -y torchvision" in found.skipped[name]


def test_a_torchvision_of_another_build_is_said(monkeypatch):
    """`import sparsify` fails then, in transformers, with words that do not help."""
    from benchmarks import peers

    def broken(package):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(peers, "version", lambda name: "1.3")
    monkeypatch.setattr(peers.importlib, "import_module", broken)
    why = peers.why_not("eai-sparsify")
    assert "nms does not exist" in why and "-y torchvision" in why


def test_peer_that_cannot_be_imported_costs_only_itself(monkeypatch):
    from benchmarks import peers, steps

    def broken(shape, *weights):
        raise ImportError("torchvision is amiss")

    name = "sae-lens"
    monkeypatch.setitem(peers.PEERS, name, peers.PEERS[name]._replace(make=broken))
    there = steps.CONTENDERS[name]._replace(why_not=lambda device: None)
    monkeypatch.setitem(steps.CONTENDERS, name, there)
    found = compared()
    assert "torchvision is amiss" in found.skipped[name]
    assert {"kron", "topk"} <= found.timings.keys()
    assert name not in found.timings


def test_interpreter_is_never_timed(monkeypatch):
    """Where kernels are interpreted, the fused step could run on a CPU, but is no contender."""
    from benchmarks import steps
    from kronsae_kernels.step import why_not

    launch = pytest.importorskip("kronsae_kernels.triton_impl.launch")
    monkeypatch.setattr(launch, "interpreted", lambda: True)
    cpu = torch.device("cpu")
    assert why_not(cpu) is None
    assert steps.best_of_ours("kron", cpu) == "kron"
    ours = ("kron fused", "dense fused", "kron graphed", "dense graphed", "kron fused + aux")
    for name in ours:
        assert steps.CONTENDERS[name].why_not(cpu) is not None


def test_flops_are_those_of_the_paper():
    """[KronSAE, eq. 7]: d h (m + n) + m n h + k d and d F + k d."""
    from benchmarks.shapes import Shape

    shape = Shape("", d=1536, heads=4096, m=2, n=4, k=50, tokens=1)
    assert shape.dict_size == 32768
    assert shape.flops_per_token("kron") == 1536 * 4096 * 6 + 2 * 4 * 4096 + 50 * 1536
    assert shape.flops_per_token("dense") == 1536 * 32768 + 50 * 1536


def test_floors_of_the_stages():
    """Formulas by hand: the encoder's product, what is multiplied sparsely, AdamW's traffic."""
    from benchmarks.floors import Ceilings, stages
    from benchmarks.shapes import Shape

    shape = Shape("", d=8, heads=4, m=2, n=4, k=3, tokens=100)
    works = stages(shape, "kron", width=2)
    assert works["encode"].multiply_adds == 100 * 8 * 24
    assert works["encode"].moved_bytes == 2 * (100 * 8 + 24 * 8 + 100 * 24)
    update = works["decoder update"].moved_bytes
    assert update == 26 * 32 * 8 + 2 * 100 * 8 + 12 * 100 * 3
    ceilings = Ceilings(1e6, 1e9, 1e9)
    assert ceilings.floor_ms(works["encode"]) == pytest.approx(19.2)
    assert sum(work.multiply_adds for work in works.values()) == 100 * 8 * (24 + (2 + 1 + 2) * 3)


def test_kernels_are_counted_where_they_belong():
    from benchmarks.profile import stage_of

    found = {
        "select_heads": "select",
        "merge_lists": "select",
        "select_rows": "select",
        "encode_heads": "encode",
        "nvjet_tst_128x256_64x4_coopB_bz_TNT": "encode",
        "decode_and_loss": "decode",
        "sum_head_segments": "encoder update",
        "group_entries": "group",
        "update_rows": "decoder update",
        "void at::native::radixSortKVInPlace<...>": "group",
        "void at::native::vectorized_elementwise_kernel<...>": "other",
    }
    assert {kernel: stage_of(kernel) for kernel in found} == found


@pytest.mark.slow
def test_rehearsal_of_the_script_for_a_gpu(tmp_path, monkeypatch):
    """Parts run on the CPU at a toy shape; one that fails in the middle costs only itself."""
    from benchmarks import on_gpu

    for name in ("TRITON_INTERPRET", *(name for name in os.environ if name.startswith("PYTEST_"))):
        monkeypatch.delenv(name, raising=False)
    real = on_gpu.parts

    def with_a_failure(raw, commands, smallest):
        found = real(raw, commands, smallest)
        fails = [sys.executable, "-c", "1 / 0"]
        place = next(i for i, part in enumerate(found) if part.name == "compare")
        return [*found[:place], on_gpu.Part("planted", "compare", fails, 30), *found[place:]]

    monkeypatch.setattr(on_gpu, "parts", with_a_failure)
    monkeypatch.setattr(on_gpu, "tool", lambda name: "no-such-tool")
    on_gpu.main(
        ["all", "--out", str(tmp_path), "--smallest", "--seconds", "500", "--only"]
        + ["check", "memcheck", "memory", "profile", "planted", "compare"]
    )
    figures = json.loads((tmp_path / "summary.json").read_text())
    status = {run["name"]: run["status"] for run in figures["runs"]}
    assert status.pop("planted") == "exit status 1"
    assert status.pop("memcheck") == "no-such-tool is not on the path"
    assert set(status.values()) == {"ok"} and len(status) == 4
    assert figures["profile"]["profiles"][0]["stages"]["encode"]["ms"] > 0
    assert figures["memory"]["memory"][0]["contender"] == "kron fused"
    text = (tmp_path / "summary.md").read_text()
    words = ["| profile | ok |", "all kernels", "toy: d 16"]
    words += ["checks of values and gradients", "ZeroDivisionError"]
    for found in words:
        assert found in text
    assert {path.name for path in tmp_path.iterdir()} == {
        "summary.json", "summary.md", "results.tar.gz",
    }  # fmt: skip
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        names = set(archive.getnames())
    assert {"results/compare.json", "results/logs/planted.txt", "results/report.md"} <= names


def test_every_command_has_parts(tmp_path):
    """On a GPU and in a rehearsal; and limits are shares of what is left."""
    from benchmarks import on_gpu

    for smallest in (False, True):
        for command in on_gpu.COMMANDS:
            found = on_gpu.parts(tmp_path, [command], smallest)
            assert found[0].name == "compile"
            assert {part.of for part in found[1:]} == {command}
            for part in found:
                module = part.command[part.command.index("-m") + 1]
                assert importlib.util.find_spec(module), module
    part = on_gpu.Part("a", "", [], 30)
    beside = part._replace(alone=False)
    assert on_gpu._shares([beside, beside._replace(share=50), part, part]) == 110


def test_help_lists_the_parts_and_only_takes_no_others(tmp_path, capsys):
    """And results are never written over."""
    from benchmarks import on_gpu

    with pytest.raises(SystemExit):
        on_gpu.main(["--help"])
    text = capsys.readouterr().out
    for part in on_gpu.parts(tmp_path, list(on_gpu.COMMANDS), False):
        assert f" {part.name}" in text.partition("parts, by command:")[2]
    assert "default: 520" in text and "benchmarks.tune --read DIR/2/results/tune.json" in text
    out = tmp_path / "out"
    with pytest.raises(SystemExit):
        on_gpu.main(["check", "--out", str(out), "--only", "profile"])
    assert "no part profile; there are compile, check, tests" in capsys.readouterr().err
    assert not out.exists()
    out.mkdir()
    (out / "results.tar.gz").touch()
    with pytest.raises(SystemExit):
        on_gpu.main(["check", "--out", str(out)])
    assert f"{out} has results, which would be lost" in capsys.readouterr().err


def test_part_that_runs_long_is_stopped(tmp_path):
    from benchmarks.on_gpu import Part, run

    sleep = [sys.executable, "-c", "import time; print('on it'); time.sleep(60)"]
    done = run(Part("sleep", "", sleep, 60), 1.5, tmp_path)
    assert done.status.startswith("stopped")
    assert done.seconds < 10
    fails = Part("fail", "", [sys.executable, "-c", "1 / 0"], 9)
    assert run(fails, 9, tmp_path).status == "exit status 1"


def test_report_makes_tables(tmp_path):
    from benchmarks import compare, report

    compare.main(["--shape", "toy", "--rounds", "2", "--json", str(tmp_path / "steps.json")])
    report.main([str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    assert "| KronSAE, the paper's listing |" in text
    assert "on one token, KronSAE sees 1.21." in text


@pytest.mark.slow
def test_a_sweep_costs_little_more_than_its_steps():
    """Eight SAEs on one stream: 1.5 times the language model's time at most, beside their steps."""
    from benchmarks.measure import spent
    from kronsae import DataConfig, SAEConfig, TrainConfig
    from kronsae.sources import open_activations
    from kronsae.training.fit import fit, fit_many

    kron = partial(SAEConfig, dict_size=4096)
    saes = [kron(m=m, n=n, k=32) for m, n in ((1, 4), (2, 4), (4, 4), (4, 8))]
    saes += [kron(m=4, n=4, k=k) for k in (16, 64)]
    saes += [kron(m=4, n=4, k=32, composition="mul"), kron(encoder="dense", k=32)]
    config = TrainConfig(tokens=30_000, batch_size=1024, device="cpu")
    data = DataConfig(layer=2, buffer_tokens=30_000, heldout_tokens=4096)
    source = partial(open_activations, data, batch_size=1024, seed=0, device="cpu")
    batches, model = spent(lambda: list(islice(source(), 30)))
    _, sweep = spent(lambda: fit_many(saes, source(), config))
    alone = [spent(partial(fit, sae, batches, config))[1]["cpu"] for sae in saes]
    assert sweep["cpu"] < 1.5 * model["cpu"] + sum(alone)


@pytest.mark.slow
def test_busy_processes_are_planted_and_end(tmp_path):
    file = tmp_path / "busy.json"
    cases = ["encode m = n = 32, d = 512", "product m = n = 32, d = 512"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.busy", "--rounds", "1", "--json", file]
        + ["--case", *cases, "--contender", "topk toy"],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"{cases[0]} / its product: " in done.stdout and "step S1" not in done.stdout
    times = json.loads(file.read_text())["times"]
    assert {name: list(of) for name, of in times.items()} == {
        name: [*cases, "topk toy"] for name in ("brief", "spinning", "keeping")
    }
    for of_case in times["brief"].values():
        assert [len(rounds) for rounds in of_case] == [1, 1, 1]  # quiet, one busy, two
