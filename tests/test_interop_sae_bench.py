"""SAEBench's own evaluations run on the adaptor, on a tiny language model made here.

Needs sae-bench 0.6.0, in an environment of its own (pip install -e '.[sae-bench]'). Nothing is
fetched: its loaders of models and data sets give what is made below.
"""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from kronsae import InputError, SAEConfig, TrainConfig
from kronsae.train import fit

pytest.importorskip("sae_bench", reason="sae-bench is not installed")

MODEL = "kronsae-tiny-test"
LAYER, WIDTH, LENGTH = 0, 32, 128
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def made_tokenizer(folder: Path):
    """Words are tokens; each letter begins twelve of them. (TransformerLens loads it again.)"""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    generator = random.Random(0)
    words = {"has", "the", "first", "letter"}
    for letter in LETTERS:
        while len([w for w in words if w[0] == letter]) < 12:
            words.add(letter + "".join(generator.choices(LETTERS, k=4)))
    special = ["<pad>", "<s>", "</s>", "<unk>", ":"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model of one block, whose embeddings tell a word's first letter."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    torch.manual_seed(0)
    tokenizer = made_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    config = HookedTransformerConfig(
        n_layers=1,
        d_model=WIDTH,
        n_ctx=LENGTH,
        d_head=8,
        n_heads=4,
        d_vocab=len(tokenizer),
        act_fn="relu",
        model_name=MODEL,
        seed=0,
    )
    made = HookedTransformer(config, tokenizer=tokenizer, default_padding_side="right")
    with torch.no_grad():
        made.W_E.normal_(std=0.3)
        for word, index in tokenizer.vocab.items():
            if word[0] in LETTERS:
                made.W_E[index, LETTERS.index(word[0])] += 4
    return made.eval()


@pytest.fixture(scope="module")
def texts(model):
    """Two classes of text: words of the first half of the alphabet, and of the second."""
    words = [word for word in model.tokenizer.vocab if word[0] in LETTERS]
    generator = random.Random(1)

    def text(label: str) -> str:
        chosen = [w for w in words if (w[0] < "n") == (label == "0")]
        return " ".join(generator.choices(chosen, k=60))

    return {label: [text(label) for _ in range(80)] for label in ("0", "1")}


@pytest.fixture(scope="module")
def sae(model, texts):
    """A KronSAE of the tiny model's residual stream."""
    tokens = model.to_tokens(texts["0"] + texts["1"])
    hook = f"blocks.{LAYER}.hook_resid_post"
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=[hook])
    x = cache[hook][:, 1:].flatten(0, 1)
    config = SAEConfig(heads=32, m=2, n=4, k=8)
    return fit(config, x, TrainConfig(tokens=40_000, batch_size=500, lr=8e-3)).sae


@pytest.fixture
def adapted(sae, model, monkeypatch, tmp_path):
    """The adaptor; SAEBench gets the tiny model whatever it asks for, and writes to tmp_path."""
    from transformer_lens import HookedTransformer

    from kronsae.interop.sae_bench import adapt

    monkeypatch.chdir(tmp_path)
    loader = staticmethod(lambda name, **options: model)
    monkeypatch.setattr(HookedTransformer, "from_pretrained_no_processing", loader)
    return adapt(sae, model_name=MODEL, layer=LAYER)


def results(folder: Path) -> dict:
    [file] = folder.glob("*_eval_results.json")
    return json.loads(file.read_text())


def test_adaptor_has_what_saebench_asks_for(adapted, sae):
    from dataclasses import asdict

    from sae_bench.sae_bench_utils.general_utils import check_decoder_norms, load_and_format_sae

    identity, same, _ = load_and_format_sae("name", adapted, "cpu")
    assert identity == "custom_sae" and same is adapted
    assert check_decoder_norms(adapted.W_dec.data)
    assert adapted.cfg.hook_layer == LAYER and adapted.cfg.architecture_str == "kronsae"
    assert adapted.cfg.hook_name == "blocks.0.hook_resid_post"
    assert asdict(adapted.cfg)["d_sae"] == sae.dict_size
    assert "proxy" in adapted.cfg.to_dict()["metadata"]["w_enc"]
    latents = adapted.encode(torch.randn(2, 5, WIDTH))
    latents[..., 0] = 1  # what unlearning and SCR do: the tensor is theirs
    assert latents.shape == (2, 5, sae.dict_size) and not latents.requires_grad
    half = adapted.to(device="cpu", dtype=torch.bfloat16)
    assert half is adapted and half.dtype == torch.bfloat16 == half.W_enc.dtype
    assert half.encode(torch.randn(3, WIDTH).bfloat16()).dtype == torch.bfloat16


def test_core(adapted, texts, tmp_path):
    """Cross-entropy, KL, L0, explained variance, densities and cosines of the weights."""
    from sae_bench.evals.core.main import multiple_evals

    data = tmp_path / "data"
    data.mkdir()
    rows = [
        json.dumps({"text": text}) for pair in zip(*texts.values(), strict=True) for text in pair
    ]
    (data / "train.jsonl").write_text("\n".join(rows))
    multiple_evals(
        selected_saes=[("kron", adapted)],
        n_eval_reconstruction_batches=2,
        n_eval_sparsity_variance_batches=4,
        eval_batch_size_prompts=4,
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
        exclude_special_tokens_from_reconstruction=True,
        dataset=str(data),
        context_size=32,
        output_folder=str(tmp_path / "core"),
        device="cpu",
    )
    found = results(tmp_path / "core")
    metrics = found["eval_result_metrics"]
    assert 0.3 < metrics["reconstruction_quality"]["explained_variance"] < 1
    assert metrics["sparsity"]["l0"] == pytest.approx(8, abs=0.1)
    assert metrics["model_performance_preservation"]["ce_loss_with_sae"] > 0
    assert 0 < metrics["misc_metrics"]["frac_alive"] <= 1
    assert len(found["eval_result_details"]) == adapted.cfg.d_sae
    cosines = [each["encoder_decoder_cosine_sim"] for each in found["eval_result_details"]]
    assert all(-1 <= cosine <= 1 for cosine in cosines) and max(cosines) > 0.3
    assert "proxy" in found["sae_cfg_dict"]["metadata"]["w_enc"]


def test_absorption(adapted, tmp_path):
    from sae_bench.evals.absorption import common
    from sae_bench.evals.absorption.main import AbsorptionEvalConfig, run_eval

    config = AbsorptionEvalConfig(
        model_name=MODEL,
        max_k_value=2,
        llm_batch_size=32,
        llm_dtype="float32",
        k_sparse_probe_num_epochs=10,
        min_feats_for_eval=2,
        precalc_k_sparse_probe_sae_acts=True,
    )
    folder = tmp_path / "absorption"
    folder.mkdir()
    # Its default folders, in the package, are those of the functions that it calls.
    written = [common.PROBES_DIR / MODEL, *(
        common.RESULTS_DIR / name / "kron_custom_sae"
        for name in ("k_sparse_probing", "feature_absorption")
    )]  # fmt: skip
    try:
        run_eval(config, [("kron", adapted)], "cpu", str(folder), force_rerun=True)
    finally:
        for path in written:
            shutil.rmtree(path, ignore_errors=True)
    mean = results(folder)["eval_result_metrics"]["mean"]
    for name in ("mean_absorption_fraction_score", "mean_full_absorption_score"):
        assert 0 <= mean[name] <= 1
    assert mean["mean_num_split_features"] >= 1
    assert len(results(folder)["eval_result_details"]) >= 2


def test_sparse_probing(adapted, texts, tmp_path, monkeypatch):
    """The two classes of text are told apart by a few latents."""
    from sae_bench.evals.sparse_probing import main as sparse_probing

    from kronsae.interop.sae_bench import without_shape_checks

    train = {label: rows[:60] for label, rows in texts.items()}
    test = {label: rows[60:] for label, rows in texts.items()}
    utils = sparse_probing.dataset_utils
    monkeypatch.setattr(utils, "get_multi_label_train_test_data", lambda *_: (train, test))
    monkeypatch.setitem(
        sparse_probing.dataset_info.chosen_classes_per_dataset, "fancyzhx/ag_news", ["0", "1"]
    )
    config = sparse_probing.SparseProbingEvalConfig(
        model_name=MODEL,
        dataset_names=["fancyzhx/ag_news"],
        probe_train_set_size=60,
        probe_test_set_size=20,
        context_length=32,
        llm_batch_size=32,
        llm_dtype="float32",
        k_values=[1, 2],
    )
    folder = tmp_path / "sparse_probing"
    with without_shape_checks():
        sparse_probing.run_eval(config, [("kron", adapted)], "cpu", str(folder))
    found = results(folder)["eval_result_metrics"]
    assert found["sae"]["sae_test_accuracy"] > 0.9
    assert found["sae"]["sae_top_2_test_accuracy"] > 0.5


def test_command_line(sae, model, monkeypatch, tmp_path, capsys):
    """Two SAEs and the evaluations that are named; the rest is SAEBench's."""
    from kronsae.interop import sae_bench

    called = []

    def fake(*settings):
        return {
            name: lambda saes, device, name=name: called.append((name, settings, dict(saes)))
            for name in sae_bench.NAMES
        }

    monkeypatch.setattr(sae_bench, "evaluations", fake)
    for name in ("a", "b"):
        sae.save(tmp_path / name / "sae", {"data": {"name": MODEL, "hookpoint": "blocks.0"}})
    command = [str(tmp_path / "a"), str(tmp_path / "b" / "sae"), "--evals", "absorption", "core"]
    assert sae_bench.main([*command, "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert [name for name, *_ in called] == ["absorption", "core"]
    for _, settings, saes in called:
        assert settings == (MODEL, "float32", 32, tmp_path / "out") and sorted(saes) == ["a", "b"]
    assert sae_bench.main([command[0], command[0], "--evals", "core"]) == 2
    assert "have the same name" in capsys.readouterr().err


def test_evaluations_that_the_command_line_names(tmp_path):
    from kronsae.interop.sae_bench import NAMES, evaluations

    known = evaluations("gemma-2-2b", "bfloat16", 32, tmp_path)
    assert tuple(known) == NAMES


def test_a_hookpoint_that_saebench_does_not_evaluate(sae):
    from kronsae.interop.sae_bench import adapt

    with pytest.raises(InputError, match="expected a model and a layer, got 'tiny' and None"):
        adapt(sae, model_name="tiny")
