"""Plans: what they count is what is there, and what does not fit is refused."""

import dataclasses
import itertools
import json
import resource
from pathlib import Path

import pytest
import torch
from tiny_models import BLOCKS, FAMILIES, save_model

from benchmarks import plan as against
from benchmarks.memory import Live
from kronsae import DataConfig, InputError, RunConfig, SAEConfig, TrainConfig
from kronsae.config import MOMENTS
from kronsae.data import LanguageModel
from kronsae.metrics.heldout import CONTEXTS_AT_ONCE
from kronsae.model import flops
from kronsae.model.flops import flops_per_token
from kronsae.plan import memory as planning
from kronsae.plan import time as timing
from kronsae.plan.memory import check_memory, make_plan
from kronsae.plan.outline import outline
from kronsae.plan.text import render
from kronsae.plan.time import model_seconds, run_time, short_duration
from kronsae.sources import open_activations
from kronsae.system.devices import _left_in_group, free_bytes
from kronsae.system.progress import duration
from kronsae.train import main
from kronsae.training.learner import Learner

DATA = DataConfig(layer=2, buffer_tokens=5000, heldout_tokens=3000)
TRAIN = TrainConfig(tokens=10_000, batch_size=128, device="cpu", keep_checkpoints=2)
SAES = {
    "kron": SAEConfig(d_model=256, heads=64, m=2, n=4, k=8),
    "dense": SAEConfig(d_model=256, encoder="dense", dict_size=512, k=8),
}
MIB = 2**20


def text_of(plan, members, time="unknown"):
    """What `--plan` prints, in one line."""
    return " ".join(render(plan, members, time).split())


def members(**saes):
    return {name: RunConfig(sae, DATA, TRAIN) for name, sae in saes.items()}


def storage(value):
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    values = value.values() if isinstance(value, dict) else ()
    return sum(storage(each) for each in values)


def test_memory_of_a_sweep_is_the_sum_of_what_stays():
    model = outline(DATA)
    both = make_plan(members(**SAES), model)["memory_mib"]
    alone = [make_plan(members(**{n: s}), model)["memory_mib"] for n, s in SAES.items()]
    assert both["weights and moments"] == sum(each["weights and moments"] for each in alone)
    for name in ("language model", "shuffle buffer", "batches", "held-out activations"):
        assert both[name] == alone[0][name]
    assert list(both)[-1] in {list(each)[-1] for each in alone}  # at most one member at a time
    assert both["held-out activations"] * MIB == 4 * 256 * 3000
    assert both["shuffle buffer"] * MIB == 4 * 256 * 5000


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("name", SAES)
def test_state_and_gradients_are_what_a_learner_has(name, moments):
    """The bytes of a learner's state after a step, and of its gradients."""
    if moments == "8bit":
        pytest.importorskip("bitsandbytes")
    train = dataclasses.replace(TRAIN, moments=moments)
    learner = Learner(SAES[name], train, torch.device("cpu"))
    learner.step(torch.randn(128, 256))
    planned = make_plan({name: RunConfig(SAES[name], DATA, train)}, outline(DATA))
    member = planned["members"][name]
    parameters = list(learner.sae.parameters())
    assert member["parameters"] == sum(p.numel() for p in parameters)
    steps = 4 * len(parameters)  # AdamW counts steps for each
    state = storage(learner.state_dict()) - steps
    assert planned["memory_mib"]["weights and moments"] * MIB == state
    assert planned["passes_mib"]["a step"] * MIB > 4 * member["parameters"]
    assert planned["passes_mib"]["an evaluation"] * MIB > 4 * member["parameters"]
    assert member["flops_per_token"] == flops_per_token(SAES[name])
    assert member["flops_per_token_dense"] == flops.forward(256, 512, 8)


def test_the_plan_of_members_shared_out_is_that_of_the_largest_process(monkeypatch):
    """Memory and time of two of three members, as of one process; disk, and the list, of all."""
    train = dataclasses.replace(TRAIN, share="members")
    saes = {"one": SAES["kron"], "two": SAES["dense"], "three": SAES["kron"]}
    three = {name: RunConfig(sae, DATA, train) for name, sae in saes.items()}
    two = {name: three[name] for name in ("one", "three")}
    alone, of_two = make_plan(three, outline(DATA)), make_plan(two, outline(DATA))
    monkeypatch.setenv("WORLD_SIZE", "2")
    plan = make_plan(three, outline(DATA))
    assert plan["parts"] == [["one", "three"], ["two"]] and alone["parts"] == [list(three)]
    stays = "weights and moments"
    assert plan["memory_mib"][stays] == of_two["memory_mib"][stays] < alone["memory_mib"][stays]
    assert plan["passes_mib"]["a step"] == of_two["passes_mib"]["a step"]
    assert plan["disk_mib"] == alone["disk_mib"] and plan["members"] == alone["members"]

    seconds = {three["one"].sae: 1.0, three["two"].sae: 5.0}
    monkeypatch.setattr(timing, "step_seconds", lambda config, device: seconds[config.sae])
    monkeypatch.setattr(timing, "model_seconds", lambda *_: 2.0)
    # The slower of two has one of 5 s a step; they share the language model's work.
    token = 5 / train.batch_size + 2 / 2
    assert run_time(plan, three, DATA, outline(DATA)).startswith(
        f"{duration(train.tokens * token)}: a "
    )
    text = text_of(plan, three)
    assert "by 2 processes: each trains autoencoders of its own" in text
    assert "MiB in the largest process" in text
    with pytest.raises(InputError, match="2 processes need at least 2 autoencoders, got 1"):
        make_plan({"one": three["one"]}, outline(DATA))


def test_the_plan_of_several_processes_is_that_of_each(monkeypatch):
    """Weights and moments by those that share the heads, work on tokens by all; disk is whole."""
    alone = make_plan(members(kron=SAES["kron"]), outline(DATA))
    monkeypatch.setenv("WORLD_SIZE", "4")
    train = dataclasses.replace(TRAIN, tensor_parallel=2)
    own = {"kron": RunConfig(SAES["kron"], DATA, train)}
    plan = make_plan(own, outline(DATA))
    memory, before = plan["memory_mib"], alone["memory_mib"]
    b_dec = 12 * 256 / MIB  # which all hold
    assert memory["weights and moments"] == pytest.approx(
        (before["weights and moments"] + b_dec) / 2, abs=b_dec
    )
    assert memory["shuffle buffer"] == before["shuffle buffer"]
    for name in ("a step", "an evaluation"):
        assert plan["passes_mib"][name] < 0.75 * alone["passes_mib"][name]
    assert plan["disk_mib"] == pytest.approx(alone["disk_mib"])
    assert plan["members"]["kron"]["parameters"] == alone["members"]["kron"]["parameters"]
    assert "add up their gradients" in plan["members"]["kron"]["training_step_why"]
    assert (
        run_time(plan, own, DATA, outline(DATA))
        == "not measured: several processes share the heads"
    )
    text = text_of(plan, own)
    assert "4 processes: 2 share the tokens of a batch, 2 the heads" in text
    assert "MiB in each process" in text
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    needed = sum(memory.values())
    assert planning.shortage({**plan, "free_mib": needed}) is not None
    assert planning.shortage({**plan, "free_mib": 4 * needed}) is None


def test_the_plan_of_processes_that_share_heads_has_the_fused_step(monkeypatch):
    """And no CUDA graph keeps its memory."""
    pytest.importorskip("triton")
    monkeypatch.setenv("WORLD_SIZE", "2")
    train = dataclasses.replace(TRAIN, tensor_parallel=2, fused_step="on", moments="bfloat16")
    plan = make_plan({"kron": RunConfig(SAES["kron"], DATA, train)}, outline(DATA))
    assert plan["members"]["kron"]["training_step"] == "fused"
    found = planning._member(SAES["kron"], train, torch.device("cuda"), (1, 2))
    assert not found.graph and found.figures["training_step"] == "fused"
    assert planning._member(SAES["kron"], train, torch.device("cuda"), (1, 1)).graph


def test_nothing_is_planned_that_training_refuses(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    train = dataclasses.replace(TRAIN, tensor_parallel=2)
    sae = dataclasses.replace(SAES["kron"], selection="batchtopk")
    with pytest.raises(InputError, match="tensor_parallel 2: selection 'batchtopk'"):
        make_plan({"kron": RunConfig(sae, DATA, train)}, outline(DATA))


def test_memory_of_the_language_model_is_what_it_makes():
    """Bytes of the tensors that live at the same time, to read out and for losses."""
    source = open_activations(DATA, batch_size=128, seed=0, device=torch.device("cpu"))
    plan = make_plan(members(kron=SAES["kron"]), outline(DATA))["passes_mib"]
    ids = source.heldout_contexts()[:1].repeat(DATA.contexts_per_batch, 1)
    with Live() as live:
        source.read(ids, "a test")
    reading = plan["a forward pass of the language model"] * MIB
    assert reading == pytest.approx(live.peak_bytes, rel=0.2)
    with Live() as live:
        source.language_model.token_losses(ids[:CONTEXTS_AT_ONCE])
    assert plan["its losses"] * MIB == pytest.approx(live.peak_bytes, rel=0.2)


def test_what_the_allocator_keeps(monkeypatch):
    """Of a step and of a forward pass, but for tensors that are large."""

    data = dataclasses.replace(DATA, contexts_per_batch=4)

    def plan(**own):
        model = outline(data)._replace(**own)
        found = make_plan({"kron": RunConfig(SAES["kron"], data, TRAIN)}, model)
        return found["memory_mib"], found["passes_mib"]

    memory, passes = plan()
    together = passes["a step"] + passes["a forward pass of the language model"]
    assert memory["kept by the allocator"] == pytest.approx(together)
    assert memory["at most beside it (its losses)"] == passes["its losses"]
    wide, passes = plan(hidden_size=2**13)
    reading = passes["a forward pass of the language model"]
    assert wide["kept by the allocator"] == passes["a step"]
    assert wide["at most beside it (a forward pass of the language model)"] == reading
    size = 4 * 512 * 256  # of the decoder, the largest of the gradients
    monkeypatch.setattr(planning, "MMAP_BYTES", size)
    large, passes = plan(hidden_size=2**13)
    assert large["kept by the allocator"] == pytest.approx(passes["a step"] - size / MIB)


def test_a_buffer_takes_the_bytes_of_the_models_dtype():
    """In memory and in checkpoints; batches and held-out rows are float32."""
    plans, short = {}, {"buffer_tokens": 1000, "contexts_per_batch": 1, "context_length": 256}
    for dtype in ("float32", "bfloat16"):
        data = dataclasses.replace(DATA, model_dtype=dtype, **short)
        source = open_activations(data, batch_size=128, seed=0, device=torch.device("cpu"))
        next(iter(source))
        plans[dtype] = make_plan({"kron": RunConfig(SAES["kron"], data, TRAIN)}, outline(data))
        held = sum(storage(rows) for rows in source.buffer.rows)
        assert plans[dtype]["memory_mib"]["shuffle buffer"] * MIB == held
    whole, half = (plan["memory_mib"] for plan in plans.values())
    assert half["shuffle buffer"] == whole["shuffle buffer"] / 2
    assert all(half[part] == whole[part] for part in ("batches", "held-out activations"))
    saved = [plan["disk_mib"]["checkpoints"] for plan in plans.values()]
    copies = TRAIN.keep_checkpoints + 1
    assert saved[0] - saved[1] == pytest.approx(copies * half["shuffle buffer"])


def test_a_suite_holds_the_activations_of_each_hookpoint(monkeypatch):
    """Once for all members at it; of its own hookpoints alone in a process of several."""

    def at(layer, sae):
        return RunConfig(sae, dataclasses.replace(DATA, layer=layer), TRAIN)

    suite = {f"{layer}-{name}": at(layer, sae) for layer in (1, 3) for name, sae in SAES.items()}
    model = outline(dataclasses.replace(DATA, layer=3))
    assert model.flops_per_token > outline(dataclasses.replace(DATA, layer=1)).flops_per_token
    alone = make_plan({name: at(3, sae) for name, sae in SAES.items()}, model)
    plan = make_plan(suite, model)
    for part in ("shuffle buffer", "held-out activations", "weights and moments", "batches"):
        assert plan["memory_mib"][part] == pytest.approx(2 * alone["memory_mib"][part])
    assert plan["disk_mib"]["checkpoints"] == pytest.approx(2 * alone["disk_mib"]["checkpoints"])
    reading = "a forward pass of the language model"
    assert plan["passes_mib"][reading] > alone["passes_mib"][reading]
    text = text_of(plan, suite)
    assert "at 2 hookpoints (layer1, layer3), d = 256" in text and "1-kron and 3-kron" in text
    monkeypatch.setenv("WORLD_SIZE", "2")
    train = dataclasses.replace(TRAIN, share="members")
    shared = {name: dataclasses.replace(config, train=train) for name, config in suite.items()}
    of_two = make_plan(shared, model)["memory_mib"]
    assert of_two["shuffle buffer"] == alone["memory_mib"]["shuffle buffer"]


def test_time_is_that_of_real_steps_and_forward_passes(monkeypatch):
    """In turns on one device; at the same time where the language model has a device of its own."""
    own, model = members(**SAES), outline(DATA)
    plan = make_plan(own, model)
    asked = []
    monkeypatch.setattr(timing, "step_seconds", lambda *given: asked.append(given) or 64.0)
    monkeypatch.setattr(timing, "model_seconds", lambda *_: 3.0)
    text = run_time(plan, own, DATA, model)
    # 10,000 tokens of 3 s, and of 64 s for each of two SAEs and 128 tokens.
    assert text.startswith("about 10 hours: a token takes 3 s in the language model and")
    assert [config.sae for config, _ in asked] == list(SAES.values())
    monkeypatch.setattr(timing, "overlaps", lambda *_: True)
    beside = run_time({**plan, "model_device": "cuda:1"}, own, DATA, model)
    assert beside.startswith("about 8 hours: ")
    # A text that ends before, and one that does not.
    of_fewer = run_time(plan, own, DATA, model, 1000)
    assert of_fewer.startswith("about 1 hour for about 1,000 tokens, all of the text: ")
    assert run_time(plan, own, DATA, model, 10**9) == text
    full = {**plan, "free_mib": 1.0}
    assert run_time(full, own, DATA, model) == "not measured: it does not fit into memory"
    interpreted = {**plan, "kernels": "triton"}
    assert run_time(interpreted, own, DATA, model).startswith("not measured: Triton's interpreter")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0, "about 1 second"),
        (0.3, "about 1 second"),
        (44, "about 40 seconds"),
        (59, "about 1 minute"),
        (100, "about 2 minutes"),
        (3 * 3600, "about 3 hours"),
        (86_400 * 20, "about 3 weeks"),
        (86_400 * 365.25 * 1234, "about 1,000 years"),
    ],
)
def test_durations_have_one_significant_digit(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(3.0, "3 s"), (1234.5, "1,234 s"), (0.0123, "12 ms"), (8.7e-5, "87 us"), (8.5e-7, "0.85 us")],
)
def test_short_durations_have_a_fitting_unit(seconds, words):
    assert short_duration(seconds) == words


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_model_is_timed_without_its_weights(family, tmp_path):
    name = str(save_model(tmp_path, family))
    for safetensors in Path(name).glob("*.safetensors"):
        safetensors.unlink()
    config = DataConfig(model=name, layer=1, contexts_per_batch=2)
    assert model_seconds(config, outline(config, 16), torch.device("cpu")) > 0


def test_steps_are_timed_as_configured(monkeypatch):
    """On the batch and the dictionary of the run, after one that is not timed."""
    given = []
    step = Learner.step
    monkeypatch.setattr(
        timing.Learner,
        "step",
        lambda self, x, target: given.append((x.shape, target.shape)) or step(self, x, target),
    )
    sae = dataclasses.replace(SAES["kron"], d_target=32)
    assert timing.step_seconds(RunConfig(sae, DATA, TRAIN), torch.device("cpu")) > 0
    assert given == (timing.ROUNDS + 1) * [((128, 256), (128, 32))]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("family", FAMILIES)
def test_outline_is_what_the_loaded_model_has(family, tmp_path):
    """Width of every hookpoint that runs in a block, and parameters, without any weight."""
    name = str(save_model(tmp_path, family))
    loaded = LanguageModel.load(name, layer=1)
    found = outline(DataConfig(model=name, layer=1))
    assert found.d_model == loaded.d_model
    assert found.parameters == sum(p.numel() for p in loaded.model.parameters())
    blocks = [n for n in dict(loaded.model.named_modules()) if n.endswith(f"{BLOCKS[family]}.1")]
    inside = [n for n, m in loaded.model.named_modules() if n.startswith(blocks[0] + ".")]
    widths = {}
    for hookpoint in inside:
        try:
            widths[hookpoint] = LanguageModel.load(name, hookpoint=hookpoint).d_model
        except InputError:
            continue
    assert len(set(widths.values())) > 1
    for hookpoint, width in widths.items():
        assert outline(DataConfig(model=name, hookpoint=hookpoint)).d_model == width


def test_multiply_adds_of_the_embedded_model_by_hand():
    """Three GPT-NeoX blocks: 12 d^2 weights, and 2 d L for the attention of L tokens."""
    found = outline(DataConfig(layer=2))
    d, length = found.d_model, found.context_length
    assert found.flops_per_token == 3 * (12 * d * d + 2 * d * length)
    assert outline(DataConfig(layer=0)).flops_per_token == found.flops_per_token / 3
    assert found.hidden_size == d


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--hookpoint", "2.mlp_out", "--target-hookpoint", "1.mlp_out"],
            "runs before '2.mlp_out'",
        ),
        (
            ["--layer", "1", "--dataset", "text.jsonl", "--chat-roles", "user"],
            "holds text, not mes",
        ),
        (["--layer", "1", "--dataset", "ids.jsonl"], "token id 9999 is not one of the model's"),
        (["--layer", "1", "--context-length", "9999"], "embedded reads at most 256 tokens, got"),
        (["--layer", "1", "--exclude-tokens", "9999"], "none has the id 9999"),
        (["--layer", "1", "--load-in", "8bit"], "--load-in 8bit needs the package bitsandbytes"),
    ],
)
def test_the_plan_refuses_what_the_run_refuses(flags, words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kronsae.data.loading.require", no_package)
    rows = {"text": ["a text"] * 50, "ids": [[1, 2, 9999] * 9] * 50}
    for name, documents in rows.items():
        lines = (json.dumps({"text": document}) for document in documents)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    for plan in (["--plan"], []):
        assert main([*flags, *plan]) == 2
        assert words in capsys.readouterr().err


def no_package(package, needed_by):
    raise InputError(f"{needed_by} needs the package {package}")


def test_what_does_not_fit_is_refused_before_the_model_is_loaded(monkeypatch, capsys, tmp_path):
    import transformers

    def refuse(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", refuse)
    monkeypatch.setattr(planning, "free_bytes", lambda device: 50 * MIB)
    out = ["--out", str(tmp_path / "run")]
    assert main(out) == 2
    message = capsys.readouterr().err
    assert "50 MiB are free" in message and "weights and moments" in message
    assert "--no-memory-check starts anyway" in message
    assert main(["--plan", *out]) == 0
    assert "It would be refused" in capsys.readouterr().out
    assert main(["--no-memory-check", *out]) == 2
    assert "the model was loaded" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_only_what_is_far_too_much_is_refused(monkeypatch):
    plan = {"memory_mib": {"a": 100.0, "b": 49.0}, "device": "cpu"}
    check_memory({**plan, "free_mib": 100.0})
    check_memory({**plan, "free_mib": None})
    with pytest.raises(InputError, match="149 MiB of memory are needed on cpu, where 99 MiB"):
        check_memory({**plan, "free_mib": 99.0})


def test_free_memory_is_within_the_machines():
    free = planning.free_bytes(torch.device("cpu"))
    assert free is None or 0 < free < 2**50


def test_a_containers_limit_counts(tmp_path):
    assert _left_in_group(tmp_path) is None
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 100\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert _left_in_group(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert _left_in_group(tmp_path) == 400


def test_plan_of_a_sweep(capsys):
    assert main(["--plan", "--k", "16", "32", "--m", "2", "4"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    printed = " ".join(out.split())
    for k, m in itertools.product((16, 32), (2, 4)):
        assert f"k{k}-m{m}" in printed
    for words in ("held-out activations", "MiB are free", "whole training step", "optimizer steps"):
        assert words in printed


def test_plan_of_another_hookpoint(capsys):
    assert main(["--plan", "--hookpoint", "gpt_neox.layers.1.mlp.dense_h_to_4h"]) == 0
    assert "d = 1,024" in capsys.readouterr().out


def test_plans_are_json():
    plan = make_plan(members(**SAES), outline(DATA))
    assert json.loads(json.dumps(plan)) == plan
    wide = dataclasses.replace(SAES["kron"], heads=128, dict_size=0)
    wider = make_plan(members(kron=wide), outline(DATA))
    assert wider["members"]["kron"]["dict_size"] == 1024


def test_what_cuda_graphs_keep(monkeypatch):
    """A card's fused steps have memory of their own, which nothing else finds room in."""
    pytest.importorskip("triton")
    monkeypatch.setattr(planning, "resolve_device", torch.device)
    monkeypatch.setattr(planning, "free_bytes", lambda device: None)
    data = dataclasses.replace(DATA, model_device="cpu")
    memory = {}
    for how in ("auto", "off"):
        train = dataclasses.replace(TRAIN, device="cuda:0", cuda_graph=how)
        runs = {name: RunConfig(SAES["kron"], data, train) for name in ("one", "two")}
        found = make_plan(runs, outline(data))
        memory[how], step = found["memory_mib"], found["passes_mib"]["a step"]
    assert memory["auto"]["kept by CUDA graphs"] == pytest.approx(2 * step)
    assert "kept by CUDA graphs" not in memory["off"]


@pytest.mark.parametrize("fused_step", ["on", "off"])
def test_bfloat16_moments_take_half_the_bytes(fused_step):
    if fused_step == "on":
        pytest.importorskip("triton")

    def state_mib(moments: str) -> float:
        train = dataclasses.replace(TRAIN, moments=moments, fused_step=fused_step)
        own, model = {"one": RunConfig(SAES["kron"], DATA, train)}, outline(DATA)
        plan = make_plan(own, model)
        text = text_of(plan, own)
        assert ("moments in bfloat16" in text) == (moments == "bfloat16")
        return plan["memory_mib"]["weights and moments"]

    sae = SAES["kron"]
    matrices = sae.encoder_rows * sae.d_model + sae.dict_size * sae.d_out
    saved = 2**20 * (state_mib("float32") - state_mib("bfloat16"))
    assert saved == pytest.approx(2 * 2 * matrices)


@pytest.mark.slow
def test_planned_memory_is_what_training_takes():
    """Within 20 % in all configurations."""
    for one in against.compare(list(against.CONFIGURATIONS), torch.device("cpu")):
        memory = one["memory"]
        assert memory["planned"] == pytest.approx(memory["measured"], rel=0.2), one


def test_a_limit_of_addresses_limits_what_is_free(monkeypatch):
    """As `ulimit -v` sets it."""
    free = free_bytes(torch.device("cpu"))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = {resource.RLIMIT_AS: used + 100 * MIB}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limits[which],) * 2)
    assert 50 * MIB <= free_bytes(torch.device("cpu")) <= 100 * MIB < free
