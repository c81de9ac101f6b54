"""The study of SAEs of a real model: its commands, its hours, and its tables."""

import json
from pathlib import Path

import pytest

import kronsae.embedded
from benchmarks import study
from kronsae.experiments.report import TUNING_SEED

MODEL = Path(kronsae.embedded.__file__).parent / "stdlib-4m"
SMALL = ["--dict-size", "128", "--k", "8", "--tokens", "4096"]
SMALL += ["--variants", "topk", "m2n4", "--learning-rates", "0.01", "--seeds", "2"]


def options(out, *more):
    given = ["--model", str(MODEL), "--dataset", "stdlib", "--layer", "1", "2", *SMALL]
    return study.make_parser().parse_args([*given, "--out", str(out), *more])


def test_the_plan_says_hours_and_commands(tmp_path, capsys):
    given = ["--model", str(MODEL), "--dataset", "stdlib", "--layer", "2", *SMALL]
    study.main([*given, "--probe", "source", "--out", str(tmp_path), "--plan"])
    _, hours, harvest, train, evaluate = capsys.readouterr().out.splitlines()
    assert hours == "about 0.0 hours of a thread to train"
    assert harvest.startswith(f"kronsae harvest --model {MODEL} --dataset stdlib --layer 2")
    assert int(harvest.partition("--tokens ")[2].split()[0]) > 4096  # at equal FLOPs Kron sees more
    assert train.startswith("kronsae experiments comparison") and "--tokens 4096" in train
    assert evaluate.endswith(f"--absorption --probe source --out {tmp_path}/evaluation-2")


def test_a_table_has_means_over_seeds(tmp_path):
    """Of the SAEs that were evaluated, a row for each kind and budget."""
    runs, judged = [], []
    for seed in range(2):
        for variant, equal in (("topk", "tokens"), ("m2n4", "tokens"), ("m2n4", "FLOPs")):
            name = f"{variant}-{equal}-{seed}"
            run = {"variant": variant, "equal": equal, "tokens": 4096, "flops_share": 0.5}
            runs.append({**run, "sae": name, "seed": seed})
            judged.append({"name": name, "metrics": {"explained_variance": 0.5 + seed / 10}})
    runs.append({"variant": "topk", "lr": 0.1, "tokens": 4096, "seed": TUNING_SEED})
    for layer in (1, 2):
        for folder, file, content in (
            (f"layer{layer}", "comparison.json", {"runs": runs}),
            (f"evaluation-{layer}", "evaluation.json", {"judged": judged}),
        ):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / file).write_text(json.dumps(content))
    lines = study.tables(options(tmp_path)).splitlines()
    heads = [line for line in lines if line.startswith("#")]
    assert heads[0] == "### Layer 1, at equal tokens" and heads[-1] == "### Layer 2, at equal FLOPs"
    rows = [line for line in lines if line.startswith(("| topk", "| m2n4"))]
    assert len(rows) == 6
    assert rows[0].startswith("| topk | 4,096 | 0.50 |  | 0.5500 ± 0.0707 |  |")
    assert rows[-1].startswith("| m2n4 | 4,096 | 0.50 |  | 0.5500")


def test_a_command_that_fails_ends_the_study(capfd):
    with pytest.raises(SystemExit) as ended:
        study.run([["evaluate", "/no/such/sae"], ["evaluate", "--help"]], threads=1)
    assert ended.value.code == 2 and "no/such/sae" in capfd.readouterr().err
