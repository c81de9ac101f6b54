"""`kronsae train`: from the command line to the run folder, and every way to fail."""

import contextlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

import kronsae
from kronsae.errors import InputError
from kronsae.system.checkpoint import list_checkpoints
from kronsae.train import main
from kronsae.training.options import make_parser, parse

SMALL = [
    *("--tokens", "12000", "--batch-size", "256", "--dict-size", "256", "--k", "8"),
    *("--context-length", "64", "--buffer-tokens", "2048", "--heldout-tokens", "1024"),
    *("--log-every", "1", "--eval-every", "8", "--checkpoint-every", "3"),
]


def start(*arguments) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "kronsae.train", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def finish(*arguments) -> tuple[int, str, str]:
    """Exit status, output and errors of the command, in this process: its imports take seconds.

    On one thread, as `start`, so that both give the same bits.
    """
    out, err, threads = io.StringIO(), io.StringIO(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main([str(argument) for argument in arguments])
    finally:
        torch.set_num_threads(threads)
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted small run: its folder and what it printed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    status, printed, err = finish(*SMALL, "--out", out)
    assert status == 0, err
    return out, printed


def test_everything_is_there(whole):
    out, printed = whole
    assert {p.name for p in out.iterdir()} == {
        *(".lock", "config.json", "metrics.jsonl", "checkpoints", "sae", "report.html")
    }
    for words in (
        "Explained variance",
        "Cross-entropy recovered",
        "Dead latents",
        "latent ",
        str(out),
    ):
        assert words in printed
    final = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert final["kind"] == "final" and final["tokens"] == 12000
    assert final["explained_variance"] > 0.3 and final["ce_recovered"] > 0.5
    assert final["ce_clean"] < final["ce_spliced"] < final["ce_zero"]
    assert kronsae.load(out).d_model == 256


def test_config_file_repeats_the_run(whole, tmp_path):
    out, _ = whole
    assert main(["--config", str(out / "config.json"), "--out", str(tmp_path / "run")]) == 0
    weights = "sae/sae.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (out / weights).read_bytes()


@pytest.mark.long
@pytest.mark.parametrize(
    "moment", [*(pytest.param(m, marks=pytest.mark.slow) for m in ("loading", "first")), "second"]
)
def test_kill_9_and_resume(moment, whole, tmp_path):
    """Killed at a random moment, resumed, and the final files are an uninterrupted run's."""
    out = tmp_path / "run"
    process = start(*SMALL, "--out", out)
    wait = random.Random(moment).random()
    if moment != "loading":
        count = {"first": 1, "second": 2}[moment]
        _wait_for(lambda: len(list_checkpoints(out / "checkpoints")) >= count, process)
        wait *= 0.3
    else:
        _wait_for(lambda: (out / "config.json").exists(), process)
    time.sleep(wait)
    process.kill()
    process.communicate()
    process = start("--resume", out)  # another process, which knows nothing but the files
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    _same_result(out, whole[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_signal_saves_and_says_how_to_go_on(number, whole, tmp_path):
    out = tmp_path / "run"
    process = start(*SMALL, "--out", out)
    _wait_for(lambda: (out / "metrics.jsonl").exists(), process)
    process.send_signal(number)
    printed, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number, err
    command = re.search(r"kronsae train (--resume \S+)", printed).group(1).split()
    tokens = kronsae.load(out).metadata["tokens"]
    assert 0 < tokens < 12000
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["tokens"] == tokens
    status, printed, err = finish(*command)
    assert status == 0, err
    assert f"goes on after step {tokens // 256:,}" in " ".join(printed.split())  # lines wrap
    _same_result(out, whole[0])


def _wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.01)


def _same_result(out, expected):
    weights = "sae/sae.safetensors"
    assert (out / weights).read_bytes() == (expected / weights).read_bytes()
    times = ("seconds", "tokens_per_s", "wait_share", "model_wait_share", "crc32")

    def records(folder):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(x).items() if k not in times} for x in lines]

    assert records(out) == records(expected)
    assert not [path for path in out.rglob(".*") if path.name != ".lock"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--heds", "4"], "unknown argument '--heds': did you mean --heads"),
        (["extra"], "unknown argument 'extra'"),
        (["--k", "many"], "argument --k: invalid int value: 'many'"),
        (["--encoder", "round"], "registered by --plugin FILE"),
        (["--k", "5000"], "k: expected 1 <= k <= dict_size = 4096, got 5000"),
        (["--heads", "3", "--m", "2", "--n", "2", "--dict-size", "99"], "3 * 2 * 2 = 12"),
        (["--dict-size", "1000", "--m", "3", "--n", "7"], "no multiple of m * n = 3 * 7"),
        (["--layer", "9"], "0 to 3"),
        (["--layer", "1", "--hookpoint", "gpt_neox"], "exclude each other"),
        (["--hookpoint", "gpt_neox.layer.1"], "gpt_neox.layers.1"),
        (["--model", "no/such-model", "--layer", "1"], "model 'no/such-model'"),
        (["--model", "no/such-model"], "needs --layer N"),
        (["--dataset", "no/such-data"], "dataset 'no/such-data'"),
        (["--dataset", "missing*.jsonl"], "no file matches 'missing*.jsonl'"),
        (["--device", "cuda:7"], "device 'cuda:7' cannot be used"),
        (["--device", "toaster"], "device 'toaster' cannot be used"),
        (["--encoder", "dense", "--m", "4"], "--m has no effect with encoder 'dense'"),
        (["--encoder", "dense", "--composition", "mand"], "--composition has no effect"),
        (["--composition", "mul", "--eps", "1e-5"], "--eps has no effect with composition 'mul'"),
        (["--auxk-coefficient", "0", "--auxk", "9"], "--auxk has no effect"),
        (["--text-column", "body"], "--text-column has no effect with dataset 'stdlib'"),
        (["--l0-coefficient", "2"], "--l0-coefficient has no effect with selection 'topk'"),
        (["--jumprelu-bandwidth", "2"], "jumprelu-bandwidth has no effect with selection 'topk'"),
        (["--balance-coefficient", "2"], "--balance-coefficient has no effect with experts 0"),
        (["--matryoshka-first", "64"], "--matryoshka-first has no effect with objective 'plain'"),
        (["--skip"], "--skip has no effect with an autoencoder"),
        (["--d-target", "9"], "--d-target has no effect with an autoencoder"),
        (["--experts", "7"], "256 heads cannot be spread evenly over 7 experts"),
        (["--objective", "matryoshka", "--experts", "8"], "experts cannot be nested"),
        (["--revision", "v2"], "--revision has no effect with model 'embedded'"),
        (["--resume", "no/run"], "no run folder"),
        (["--config", "no.json"], "--config no.json cannot be read"),
        (["--context-length", "9999"], "256"),
        (["--tokens", "0"], "tokens: expected >= 1, got 0"),
        (["--lr", "nan"], "lr: expected >= 0"),
        (["--seed", "9" * 30], "seed: expected 0 to"),
        (["--device", "meta"], "device 'meta' cannot be used"),
        (["--auxk-fraction", "0", "--auxk", "9"], "--auxk has no effect with auxk_fraction 0"),
    ],
)
def test_bad_input(arguments, words, capsys, tmp_path, monkeypatch):
    """One clear message, exit status 2, and nothing written."""
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert words in message and message.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_folder_that_exists(whole, capsys):
    assert main(["--out", str(whole[0])]) == 2
    assert f"exists already: --resume {whole[0]}" in capsys.readouterr().err


def test_folder_that_holds_something_else(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("x")
    assert main(["--out", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "choose another --out" in message and "--resume" not in message


def test_config_file_for_another_hookpoint(whole):
    """The width that a run found is no setting for a run that reads elsewhere."""
    other = "gpt_neox.layers.1.mlp.dense_h_to_4h"
    config = parse(["--config", str(whole[0] / "config.json"), "--hookpoint", other]).config
    assert config.sae.d_model == 0 and config.data.hookpoint == other and config.data.layer is None


def test_resume_takes_no_other_settings(whole, capsys):
    assert main(["--resume", str(whole[0]), "--lr", "1"]) == 2
    assert "--lr cannot change when a run is resumed" in capsys.readouterr().err
    assert main(["--resume", str(whole[0]), "--out", "x"]) == 2
    assert "leave out --out" in capsys.readouterr().err


def test_bad_config_files(tmp_path, capsys):
    file = tmp_path / "config.json"
    for content, words in [
        ("[1]", "expected a JSON object"),
        ('{"sae": {"wings": 2}}', "sae has no setting 'wings'"),
        (
            '{"train": {"tokens": "many"}}',
            "tokens: expected a whole number",
        ),
        ('{"train": {"tokens": true}}', "tokens: expected a whole number, got True"),
        ('{"more": {}}', "expected a JSON object with the parts"),
    ]:
        file.write_text(content)
        assert main(["--config", str(file)]) == 2
        assert words in capsys.readouterr().err


def test_data_that_ends_early(tmp_path, capsys):
    text = tmp_path / "text.jsonl"
    text.write_text(
        "".join(json.dumps({"text": f"def f{i}(x): return x"}) + "\n" for i in range(900))
    )
    arguments = [
        *SMALL,
        "--tokens",
        "99999",
        "--dataset",
        str(text),
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert "the data ended after" in message and "--epochs" in message
    assert kronsae.load(tmp_path / "run").metadata["tokens"] > 0
    assert (tmp_path / "run" / "report.html").exists()


def test_column_that_is_not_there(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"body": "x", "id": 1}\n')
    assert main(["--dataset", str(tmp_path / "a.jsonl")]) == 2
    message = capsys.readouterr().err
    assert "no column 'text'" in message and "'body'" in message and "--text-column" in message


def test_a_transcoder_between_two_hookpoints(tmp_path, capsys):
    out = tmp_path / "run"
    hooks = "gpt_neox.layers.2.post_attention_layernorm", "gpt_neox.layers.2.mlp"
    flags = ["--hookpoint", hooks[0], "--target-hookpoint", hooks[1], "--skip"]
    assert main([*SMALL, "--tokens", "2048", *flags, "--out", str(out)]) == 0
    sae = kronsae.load(out)
    assert (sae.config.d_model, sae.config.d_target, sae.config.skip) == (256, 256, True)
    assert sae.metadata["data"]["target_hookpoint"] == hooks[1]
    final = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert final["explained_variance"] > 0.2
    assert final["ce_clean"] < final["ce_spliced"] < final["ce_zero"]
    assert "Kron transcoder with a linear skip" in (out / "report.html").read_text()


def test_precedence_defaults_preset_file_flags(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"train": {"lr": 0.5, "seed": 7}, "sae": {"heads": 32}}')
    config = parse(["--config", str(file), "--seed", "8"]).config
    assert config.train.lr == 0.5 and config.train.seed == 8
    assert config.sae.heads == 32 and config.sae.dict_size == 32 * 16  # not the preset's size
    assert config.data.layer == 2 and config.sae.k == 32  # from the preset
    assert parse([]).config.sae.dict_size == 4096
    paper = parse(["--model", "gpt2", "--layer", "6"]).config
    assert paper.sae.dict_size == 2**15 and paper.sae.k == 50 and paper.train.lr == 8e-4
    dense = parse(["--encoder", "dense"]).config
    assert dense.sae.dict_size == 4096 and dense.sae.heads == 0
    assert parse(["--m", "2"]).config.sae.heads == 4096 // 8
    with pytest.raises(InputError, match="unknown argument"):
        parse(["--tok", "5"])  # no abbreviations


def test_every_flag_has_help():
    for action in make_parser()._actions:
        assert action.help, action.option_strings


def test_flags_replace_a_point_of_the_config_file(tmp_path):
    """A file's choice goes, and what only that choice needs goes with it."""
    file = tmp_path / "config.json"
    found = {"selection": "jumprelu", "objective": "matryoshka", "matryoshka_first": 64}
    file.write_text(json.dumps({"sae": found, "train": {"l0_coefficient": 3.0}}))
    same = parse(["--config", str(file)]).config
    assert same.sae.prefixes[0] == 64 and same.train.l0_coefficient == 3.0
    flags = ["--selection", "batchtopk", "--objective", "plain", "--experts", "8"]
    other = parse(["--config", str(file), *flags]).config
    assert (other.sae.selection, other.sae.objective) == ("batchtopk", "plain")
    assert other.sae.experts == 8 and other.train.l0_coefficient == 1.0


GRID = [
    ["--selection", "batchtopk", "--objective", "matryoshka"],
    ["--selection", "jumprelu"],
    ["--objective", "multi_topk", "--experts", "8"],
    ["--target-hookpoint", "gpt_neox.layers.3.mlp", "--skip"],
]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "arguments",
    [
        *([], ["--encoder", "dense"], ["--device", "cpu", "--k", "7"]),
        *(pytest.param(arguments, marks=pytest.mark.slow) for arguments in GRID),
    ],
)
def test_plan(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--plan", *arguments]) == 0
    printed = " ".join(capsys.readouterr().out.split())  # wherever lines break
    for words in ("F = 4,096", "MiB", "multiply-adds", "kernels", "a token takes", "d = 256"):
        assert words in printed
    assert list(tmp_path.iterdir()) == []


def test_plan_does_not_load_the_model(monkeypatch):
    import transformers

    def refuse(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", refuse)
    assert main(["--plan"]) == 0


def test_plan_refuses_bad_input(capsys):
    assert main(["--plan", "--layer", "4"]) == 2
    assert "0 to 3" in capsys.readouterr().err
