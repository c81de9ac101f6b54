"""The final evaluation: begun at the hookpoint's block, after the SAEs are saved, and optional."""

import json

import pytest
import torch
from tiny_models import BLOCKS, CAUSAL, LAYERS, WIDTH, save_model

import kronsae
from kronsae import SAE, InputError, SAEConfig, TrainConfig
from kronsae.data import LanguageModel
from kronsae.data.language_model import first_tensor
from kronsae.metrics.heldout import Heldout, HeldoutText, evaluate_cross_entropy
from kronsae.metrics.splicing import ForwardPasses, spliced
from kronsae.train import fit
from kronsae.train import main as train
from kronsae.training import fit as fit_module

IDS = torch.randint(6, 90, (3, 12), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS, dtype=torch.bool)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {family: save_model(root / family, family) for family in CAUSAL}


def half(_: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return y / 2


def hidden(states) -> torch.Tensor:
    return first_tensor(states.logits if states.output is None else states.output)


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("family", CAUSAL)
def test_a_spliced_pass_begins_at_the_block_and_gives_the_same_bits(folders, family, layer):
    model = LanguageModel.load(str(folders[family]), layer=layer)
    with spliced(model, half, MASK):
        whole = model.last_states(IDS)
    passes = ForwardPasses(model, IDS)
    assert hidden(passes.clean).equal(hidden(model.last_states(IDS)))
    passes.spliced(half, MASK)  # tries first whether it may begin there
    ran = []
    blocks = [model.model.get_submodule(f"{BLOCKS[family]}.{i}") for i in range(LAYERS)]
    mlps = [next(m for n, m in block.named_modules() if n.endswith("mlp")) for block in blocks]
    hooks = [m.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, m in enumerate(mlps)]
    try:
        for _ in range(2):
            assert hidden(passes.spliced(half, MASK)).equal(hidden(whole))
    finally:
        for hook in hooks:
            hook.remove()
    assert ran == 2 * list(range(layer, LAYERS)) and (layer == 0 or model.resumes)
    assert not any("forward" in block.__dict__ for block in blocks)


def test_a_hookpoint_inside_a_block_begins_there_too(folders):
    model = LanguageModel.load(str(folders["llama"]), hookpoint="model.layers.2.mlp")
    with spliced(model, half, MASK):
        whole = model.last_states(IDS)
    assert hidden(ForwardPasses(model, IDS).spliced(half, MASK)).equal(hidden(whole))
    assert model.resumes and len(ForwardPasses(model, IDS).skipped) == 2
    outside = LanguageModel.load(str(folders["llama"]), hookpoint="model.norm")
    assert not ForwardPasses(outside, IDS).skipped


@pytest.mark.parametrize("fails", [False, True])
def test_blocks_that_read_earlier_ones_run_all(folders, fails):
    """As where later blocks share the keys of earlier ones, say."""
    model = LanguageModel.load(str(folders["llama"]), layer=2)
    first, last = model.model.model.layers[0].mlp, model.model.model.layers[2].mlp
    seen = {}
    first.register_forward_hook(lambda _m, _i, out: seen.update(out=out))

    def shared(_module, _inputs, out):
        return out + (seen.pop("out") if fails else seen.pop("out", 0))

    last.register_forward_hook(shared)
    with spliced(model, half, MASK):
        whole = model.last_states(IDS)
    assert hidden(ForwardPasses(model, IDS).spliced(half, MASK)).equal(hidden(whole))
    assert model.resumes is False


def an_sae(seed: int) -> SAE:
    config = SAEConfig(d_model=WIDTH, heads=8, m=2, n=2, k=4)
    return SAE(config, generator=torch.Generator().manual_seed(seed)).eval()


def test_several_saes_are_judged_as_each_alone(folders):
    model = LanguageModel.load(str(folders["gpt2"]), layer=1)
    heldout = Heldout(model.activations(IDS)[MASK], text=HeldoutText(model, IDS, MASK, 2))
    saes = {f"{seed}": an_sae(seed) for seed in range(3)} | {"zero": an_sae(9)}
    calls = []
    found = evaluate_cross_entropy(
        {name: lambda sae=sae: sae for name, sae in saes.items()},
        heldout,
        lambda *n: calls.append(n),
    )
    assert calls == [(1, 2), (2, 2)]
    for name, sae in saes.items():
        [alone] = evaluate_cross_entropy({"it": lambda sae=sae: sae}, heldout).values()
        assert found[name] == alone
        with spliced(model, lambda x, _, sae=sae: sae(x).x_hat, MASK):
            losses = model.token_losses(IDS)
        assert alone["ce_spliced"] == pytest.approx(losses.double().mean().item())
    with spliced(model, lambda _, y: torch.zeros_like(y), MASK):
        assert alone["ce_zero"] == pytest.approx(model.token_losses(IDS).double().mean().item())


def test_the_first_contexts(folders):
    model = LanguageModel.load(str(folders["gpt2"]), layer=1)
    mask = MASK.clone()
    mask[:, :2] = False
    heldout = Heldout(model.activations(IDS)[mask], text=HeldoutText(model, IDS, mask, 2))
    assert heldout.first(30) is heldout
    part = heldout.first(29)
    assert len(part.activations) == 20 == part.text.mask.sum() and len(part.text.contexts) == 2
    assert len(heldout.first(3).activations) == 10  # one context at least
    assert len(Heldout(heldout.activations).first(7).activations) == 7


SMALL = [
    *("--tokens", "2000", "--batch-size", "256", "--dict-size", "128", "--k", "4"),
    *("--context-length", "64", "--buffer-tokens", "1024", "--heldout-tokens", "1024"),
]


def final_of(run) -> dict | None:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return next((record for record in records if record["kind"] == "final"), None)


@pytest.mark.slow
def test_its_size_is_a_setting_and_it_can_be_left_out(tmp_path):
    runs = {"all": [], "part": ["--final-tokens", "300"], "none": ["--no-final-evaluation"]}
    for name, flags in runs.items():
        assert train([*SMALL, *flags, "--out", str(tmp_path / name)]) == 0
    whole, part, none = (final_of(tmp_path / name) for name in runs)
    assert whole["heldout_tokens"] > 900 and 200 < part["heldout_tokens"] <= 300
    assert none is None and kronsae.load(tmp_path / "none").metadata["metrics"] == {}
    with pytest.raises(InputError, match="final_tokens"):
        TrainConfig(final_tokens=-1)
    assert train([*SMALL, *runs["part"], *runs["none"], "--out", str(tmp_path / "both")]) == 2


def test_a_finished_run_keeps_its_figures_and_can_get_them_later(tmp_path, capsys):
    run = tmp_path / "run"
    assert train([*SMALL, "--no-final-evaluation", "--out", str(run)]) == 0
    assert train(["--resume", str(run), "--final-tokens", "300"]) == 2
    assert "--final-tokens has no effect with --no-final-eval" in capsys.readouterr().err
    assert train(["--resume", str(run), "--final-evaluation", "--final-tokens", "300"]) == 0
    figures = kronsae.load(run).metadata["metrics"]
    assert 200 < figures["heldout_tokens"] <= 300
    assert final_of(run).items() >= figures.items()
    assert train(["--resume", str(run), "--no-final-evaluation"]) == 0
    assert kronsae.load(run).metadata["metrics"] == figures
    assert final_of(run).items() >= figures.items()


@pytest.mark.slow
def test_a_kill_while_figures_are_added_to_an_sae(tmp_path):
    """It leaves a file that is half written beside the SAE: of a run, and of a sweep's member."""
    sweep = ["--lr", "0.001", "0.002"]
    for name, flags in {"run": [], "sweep": sweep}.items():
        out = tmp_path / name
        assert train([*SMALL, *flags, "--out", str(out)]) == 0
        for sae in out.rglob("sae"):
            (sae / ".config.json.29e4865d.partial").write_text("{")
        assert train(["--resume", str(out)]) == 0
        for sae in out.rglob("sae"):
            assert {path.name for path in sae.iterdir()} == {"config.json", "sae.safetensors"}


@pytest.mark.slow
def test_settings_that_a_resume_changes_are_saved(tmp_path):
    run = tmp_path / "run"
    assert train([*SMALL, "--out", str(run)]) == 0
    before = json.loads((run / "config.json").read_text())
    flags = ["--log-every", "3", "--final-tokens", "300"]
    assert train(["--resume", str(run), *flags]) == 0
    after = json.loads((run / "config.json").read_text())
    changed = {"log_every": 3, "final_tokens": 300}
    assert after["config"]["train"] == before["config"]["train"] | changed
    assert train(["--resume", str(run)]) == 0
    assert final_of(run)["heldout_tokens"] <= 300
    assert kronsae.load(run).metadata["config"]["train"] == after["config"]["train"]


def test_the_saes_are_saved_before_it(tmp_path, monkeypatch):
    x = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0))
    config = TrainConfig(tokens=1000, batch_size=100, device="cpu")

    def fails(*_):
        raise RuntimeError("the language model fails")

    monkeypatch.setattr(fit_module, "evaluate", fails)
    with pytest.raises(RuntimeError, match="fails"):
        fit(SAEConfig(heads=8, m=2, n=2, k=4), x, config, heldout=x[:100], out=tmp_path / "run")
    saved = kronsae.load(tmp_path / "run")
    assert saved.metadata["tokens"] == 1000 and saved.metadata["metrics"] == {}
    monkeypatch.undo()
    result = fit(
        *(SAEConfig(heads=8, m=2, n=2, k=4), x, config),
        **{"heldout": x[:100], "out": tmp_path / "run", "resume": True},
    )
    loaded = kronsae.load(tmp_path / "run")
    assert loaded.metadata["metrics"] == result.metrics and result.metrics
    for key, tensor in saved.state_dict().items():
        assert loaded.state_dict()[key].equal(tensor)
