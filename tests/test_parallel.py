"""Several processes train as one does: `ranks.py` says what they do, here it is compared.

Four processes are started once, and do everything in five meshes: 2 and 4 ranks that share tokens,
2 and 4 that share heads, and 2 x 2.

Learners run in float64, where a sum in another order errs by about (number of terms) 2^-53, here
at most 1e-13 of the sum of magnitudes. AdamW divides a gradient by its own size, which keeps that
relative error, and multiplies by the learning rate: 1e-10 leaves room for cancellation. `fit` runs
in float32, with 2^-24 in place of 2^-53, through 20 steps: 1e-5.
"""

import os
import signal
import subprocess
import sys
import time

import pytest
import ranks
import torch

import kronsae
from kronsae import InputError, SAEConfig, TrainConfig
from kronsae.model.ranks import check_heads
from kronsae.system import checkpoint, parallel
from kronsae.system.devices import resolve_device
from kronsae.system.files import read_checksummed, read_log, write_checksummed
from kronsae.system.parallel import ALONE, Group, Mesh
from kronsae.train import fit, main
from kronsae.training.learner import why_not_fused

pytestmark = pytest.mark.long

LAYOUTS = list(ranks.LAYOUTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def of_ranks(request, folder):
    """Of the cases that the chosen tests need."""
    given = [getattr(item, "callspec", None) for item in request.session.items]
    asked = [(c.params.get("layout"), c.params.get("point")) for c in given if c is not None]
    return ranks.results(folder, [case for case in CASES if case in asked])


@pytest.fixture(scope="module")
def alone(folder):
    return ranks.run(folder / "alone")


CASES = [
    (layout, point)
    for layout in LAYOUTS
    for point in ranks.POINTS | (ranks.OVER_TOKENS if layout == "4 data" else {})
]


@pytest.fixture(scope="module")
def learned():
    points = ranks.POINTS | ranks.OVER_TOKENS
    return {name: ranks.learn(ALONE, config) for name, config in points.items()}


def test_the_cases_have_dead_latents_clipping_and_tiny_batches(learned):
    """Or equality would say nothing about them."""
    for name, config in ranks.POINTS.items():
        metrics = learned[name]["metrics"]
        assert any(m["grad_norm"] > ranks.TRAIN.max_grad_norm for m in metrics)
        if config.dict_size > 16:
            assert any(m["auxk_loss"] > 0 for m in metrics), name
    assert min(ranks.BATCHES) < 4 and all(b % 2 for b in ranks.BATCHES)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("layout, point", CASES)
def test_ranks_learn_what_one_process_learns(layout, point, of_ranks, learned):
    """Losses and all other metrics, weights, dead latents; the selection exactly, on each rank."""
    truth = learned[point]
    taking_part = [done[layout][point] for done in of_ranks if layout in done]
    assert len(taking_part) == torch.tensor(ranks.LAYOUTS[layout]).numel()
    for got in taking_part:
        for before, after in zip(truth["metrics"], got["metrics"], strict=True):
            assert after == pytest.approx(before, rel=1e-10, abs=1e-10)
        assert all(map(torch.equal, truth["codes"], got["codes"]))
    got = taking_part[0]  # rank 0 has gathered them
    assert torch.equal(got["silent"], truth["silent"])
    assert got["weights"].keys() == truth["weights"].keys()
    for name, weight in truth["weights"].items():
        torch.testing.assert_close(got["weights"][name], weight, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_moments_are_the_same_on_ranks_that_share_tokens(layout, of_ranks):
    """Or weights would drift apart. Ranks that share heads draw other noise than one process."""
    alone = ranks.learn_rounded(ALONE)
    for column in zip(*ranks.LAYOUTS[layout], strict=True):
        first, *others = (of_ranks[rank][layout]["rounded"] for rank in column)
        assert first["losses"] == pytest.approx(alone["losses"], rel=1e-3)
        assert first["W_dec"]["exp_avg_sq"].dtype == torch.bfloat16
        for other in others:
            assert other.pop("losses") == first["losses"]
            for part, tensors in other.items():
                for name, tensor in tensors.items():
                    assert torch.equal(tensor, first[part][name]), (part, name)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_latents_compete_by_their_product(layout, of_ranks):
    """Equal roots, different products: the larger product is selected, on whatever rank it is."""
    selected, values, x_hat = of_ranks[0][layout]["edges"]
    assert selected.tolist() == [[3, 5, 0], [0, 1, 2]]
    assert values.tolist() == x_hat.tolist() == [False, True, False]  # NaN stays in its row
    assert [got.tolist() for got in ranks.edges(ALONE)] == [
        got.tolist() for got in (selected, values, x_hat)
    ]


def figures(record):
    """What of a record does not depend on the clock."""
    clock = ("seconds", "tokens_per_s", "wait_share", "kind", "stopped_by", "crc32")
    return {name: value for name, value in record.items() if name not in clock}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_of_ranks_is_that_of_one_process(layout, of_ranks, alone, folder):
    """Its records, written by rank 0 alone, and the SAE that it leaves."""
    final, *records = of_ranks[0][layout]["run"]
    assert figures(final) == pytest.approx(figures(alone[0]), rel=1e-5)
    assert read_log(folder / layout / "metrics.jsonl") == (records, [])
    for before, after in zip(alone[1:], records, strict=True):
        assert figures(after) == pytest.approx(figures(before), rel=1e-4, abs=1e-6)
    sae, whole = kronsae.load(folder / layout), kronsae.load(folder / "alone")
    assert sae.config == whole.config and sae.metadata["tokens"] == whole.metadata["tokens"]
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(sae.state_dict()[name], weight, rtol=1e-5, atol=1e-5)
    # Nothing half-written is left.
    assert not [path for path in (folder / layout).rglob(".*") if path.name != ".lock"]


def test_a_run_goes_on_with_any_number_of_ranks(of_ranks, alone, folder):
    """Alone, on 2 x 2, by 4 and 2 along heads, by 4 along data, and alone again: one run."""
    for layout, stop_after in ranks.CHAIN.items():
        stopped = of_ranks[0][layout]["chain"]
        assert stopped[0]["stopped_by"] == signal.SIGTERM
        assert stopped[-1]["step"] == stop_after
        # The others have stopped after the same step, though they got no signal.
        others = [done[layout]["chain"] for done in of_ranks[1:] if layout in done]
        assert others and all(o[-1]["step"] == stop_after for o in others)
    final, *_ = ranks.run(folder / "chain", resume=True)
    assert figures(final) == pytest.approx(figures(alone[0]), rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_work_is_shared_out(layout, of_ranks):
    """As the language model's: every rank gets all results, and computes only its part."""
    results = [done[layout]["mapped"] for done in of_ranks if layout in done]
    for *squares, seen in results:
        assert squares == [[0], [0, 1, 4], [0, 1, 4, 9, 16, 25, 36, 49]]
        assert seen == ([1, 2, 4] if len(results) == 2 else [1, 1, 2]) or seen == [1, 1, 4]


def test_what_stops_one_rank_stops_all(of_ranks):
    for done in of_ranks:
        other_data, not_free, diverged = done["refusals"]
        assert "given different activations" in other_data
        assert "exists already" in not_free
        assert "gradient norm is" in diverged


def test_a_sweep_of_ranks_is_that_of_one_process(of_ranks, folder):
    truth = ranks.sweep(folder / "sweep alone")
    for done in of_ranks:
        for got, expected in zip(done["sweep"], truth, strict=True):
            assert got == pytest.approx(expected, rel=1e-5)
    assert "| kron |" in (folder / "sweep" / "comparison.md").read_text()


def test_a_rank_that_waits_for_a_dead_one_says_so(of_ranks):
    for done in of_ranks[:3]:
        assert "another process of this training ended" in done["lost"]
        assert "--resume" in done["lost"]


STATE = {
    "weights": {"W_dec": torch.arange(24.0).view(12, 2), "b_dec": torch.ones(2)},
    "step": 3,
}


class Holder(Group):
    """One of several ranks, without any process: nothing is said between them."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.group = rank, size, None


def sharded(folder, count):
    """A checkpoint of STATE, as so many ranks write it."""
    rows = STATE["weights"]["W_dec"].split(12 // count)
    for rank in reversed(range(count)):
        state = {**STATE, "weights": {**STATE["weights"], "W_dec": rows[rank]}}
        parts = folder / f"rank-{rank}"
        checkpoint.save_state(parts, state, sharded=["weights.W_dec"])
    whole = folder / "rank-0"
    names = ["state.safetensors", *(f"state-{rank}.safetensors" for rank in range(1, count))]
    document = read_checksummed(whole / "state.json")
    for rank, name in enumerate(names):
        (folder / f"rank-{rank}" / "state.safetensors").rename(whole / name)
    digests = {name: checkpoint.sha256(whole / name) for name in names}
    document |= {"format_version": checkpoint.SHARDED_VERSION, "sha256": digests}
    write_checksummed(whole / "state.json", document)
    return whole


@pytest.mark.one_in(4)
@pytest.mark.parametrize("saved", [2, 3, 4, 6])
@pytest.mark.parametrize("loaded", [1, 2, 3, 4, 6])
def test_any_number_of_ranks_finds_its_rows(saved, loaded, tmp_path):
    folder = sharded(tmp_path, saved)
    parts = [
        checkpoint.load_state(folder, Holder(rank, loaded), ["weights.W_dec"])
        for rank in range(loaded)
    ]
    rows = torch.cat([part["weights"]["W_dec"] for part in parts])
    assert torch.equal(rows, STATE["weights"]["W_dec"])
    assert all(torch.equal(part["weights"]["b_dec"], torch.ones(2)) for part in parts)


@pytest.mark.parametrize("name", ["state.safetensors", "state-1.safetensors"])
def test_damage_of_any_part_is_noticed(name, tmp_path):
    folder = sharded(tmp_path, 2)
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=f"damaged.*{name}.*remove the folder"):
        checkpoint.load_state(folder, sharded=["weights.W_dec"])


def test_a_checkpoint_names_no_files_but_its_own(tmp_path):
    folder = sharded(tmp_path, 2)
    document = read_checksummed(folder / "state.json")
    document["sha256"]["../state-1.safetensors"] = document["sha256"].pop("state-1.safetensors")
    write_checksummed(folder / "state.json", document)
    with pytest.raises(InputError, match="damaged.*expected the files"):
        checkpoint.load_state(folder, sharded=["weights.W_dec"])


KRON = {"d_model": 8, "heads": 8, "m": 2, "n": 2, "k": 4}


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"selection": "batchtopk"}, "selection 'batchtopk' does not work .* .only 'topk'."),
        ({"selection": "jumprelu"}, "selection 'jumprelu'"),
        ({"objective": "matryoshka", "matryoshka_first": 16}, "objective 'matryoshka'"),
        ({"objective": "multi_topk"}, "objective 'multi_topk'"),
        ({"objective": "hierarchical"}, "objective 'hierarchical'"),
        ({"experts": 2}, "experts do not work"),
        ({"refine": 1}, "refine does not work"),
        ({"heads": 6}, "6 heads cannot be divided evenly among 4 processes"),
        ({"encoder": "dense", "dict_size": 30, "heads": 0, "m": 0, "n": 0}, "30 latents cannot"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(settings, reason):
    config = SAEConfig(**{**KRON, **settings})
    mesh = Mesh(heads=Holder(1, 4))
    with pytest.raises(InputError, match=f"tensor_parallel 4: {reason}"):
        fit(config, torch.randn(10, 8), mesh=mesh)
    check_heads(config, Mesh(data=Holder(1, 4)).heads.size)  # ranks that share tokens alone


def test_why_the_fused_step_is_off():
    config, train = SAEConfig(**KRON), TrainConfig()
    device = torch.device("cuda")
    assert "add up their gradients" in why_not_fused(config, train, device, (2, 1))
    assert why_not_fused(config, train, device, (1, 2)) is None


def test_tensor_parallel_needs_torchrun(capsys, monkeypatch):
    assert main(["--tensor-parallel", "2"]) == 2
    assert "torchrun --nproc-per-node 2 -m kronsae.train" in capsys.readouterr().err
    assert main(["--tensor-parallel", "2", "--refine", "1"]) == 2
    assert "tensor_parallel 2: refine does not work" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match="3 processes cannot be arranged in groups of 2"):
        parallel.shape(2)
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert parallel.shape(2) == (3, 2)


def test_each_rank_has_a_gpu_of_its_own(monkeypatch):
    made = []
    monkeypatch.setattr(torch, "empty", lambda *_, device: made.append(str(device)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert str(resolve_device("auto")) == str(resolve_device("cuda")) == "cuda:3"
    assert str(resolve_device("cuda:1")) == "cuda:1"
    assert made == ["cuda:3", "cuda:3", "cuda:1"]


@pytest.mark.parametrize("count", [0, 1, 5, 8])
def test_shares_cover_everything_once(count):
    spans = [Holder(rank, 4).share(count) for rank in range(4)]
    assert [i for span in spans for i in range(count)[span]] == list(range(count))


# The command line, under torchrun itself

RUN = (
    *("--tokens", "6000", "--batch-size", "200", "--heads", "16", "--k", "4"),
    *("--buffer-tokens", "1000", "--heldout-tokens", "1000", "--contexts-per-batch", "5"),
    *("--context-length", "64", "--checkpoint-every", "5", "--log-every", "1"),
)


def start(processes, *flags, log):
    """`torchrun -m kronsae.train`, in the background."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]  # a free port
    return subprocess.Popen(
        [*command, "-m", "kronsae.train", *map(str, flags)],
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def after_steps(count, run, process, log):
    """Wait until so many steps are logged."""
    metrics, end = run / "metrics.jsonl", time.monotonic() + 900
    while not metrics.exists() or len(metrics.read_text().splitlines()) < count:
        assert process.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.05)


def workers(process):
    """Process ids of the ranks that torchrun has started."""
    found = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
    )
    return [int(pid) for pid in found.stdout.split()]


@pytest.fixture(scope="module")
def alone_from_text(tmp_path_factory):
    out = tmp_path_factory.mktemp("text") / "alone"
    assert main([*RUN, "--out", str(out)]) == 0
    return out


def close_to(run, alone):
    metrics, truth = (kronsae.load(path).metadata["metrics"] for path in (run, alone))
    assert metrics.keys() == truth.keys()
    # A matrix product of other contexts at once rounds otherwise, from the language model on.
    assert metrics == pytest.approx(truth, rel=1e-2, abs=1e-3)


@pytest.mark.slow
def test_torchrun_stopped_by_a_signal_goes_on_in_one_process(tmp_path, alone_from_text):
    run, log = tmp_path / "run", tmp_path / "log"
    process = start(2, *RUN, "--tensor-parallel", 2, "--out", run, log=log)
    after_steps(7, run, process, log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(900) != 0
    assert "Stopped by SIGTERM after" in log.read_text()
    assert log.read_text().count("Stopped by") == 1  # one speaks for all
    assert main(["--resume", str(run), "--tensor-parallel", "1"]) == 0
    close_to(run, alone_from_text)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_ends_all_and_the_run_goes_on(fault, tmp_path, alone_from_text):
    run, log = tmp_path / "run", tmp_path / "log"
    process = start(3, *RUN, "--out", run, "--rank-timeout", 60, log=log)
    after_steps(7, run, process, log)
    os.kill(workers(process)[-1], fault)
    assert process.wait(900) != 0  # torchrun kills the one that hangs
    words = ["another process of this training ended or did not answer"]
    if fault == signal.SIGKILL:  # torchrun, which sees it die, may end the others before they do
        words.append("Signal 9 (SIGKILL) received")
    assert any(each in log.read_text() for each in words)
    again = start(2, "--resume", run, "--rank-timeout", 600, log=log)
    assert again.wait(900) == 0, log.read_text()
    close_to(run, alone_from_text)
