"""Sources of activations: exact positions, held-out text, and messages of errors."""

import copy
import dataclasses
import json
import warnings

import pytest
import torch
from synthetic import SyntheticActivations

from kronsae.config import DataConfig
from kronsae.data import (
    IterableActivations,
    LanguageModel,
    LanguageModelActivations,
    TensorActivations,
    packing,
)
from kronsae.data.text import IndexedText
from kronsae.errors import InputError
from kronsae.sources import open_activations
from kronsae.system.checkpoint import load_state, save_state

BATCH = 24
LENGTH = 16
WORDS = "def class return import self value for if else None True yield".split()
TEXTS = [
    "".join(f"{WORDS[(7 * i + j * j) % 12]} name_{i * j} = {i}\n" for j in range(1, 4 + i % 5))
    for i in range(24)
]
SETTINGS = DataConfig(
    dataset="given",
    context_length=LENGTH,
    contexts_per_batch=4,
    buffer_tokens=64,
    heldout_tokens=3 * LENGTH - 5,
)


@pytest.fixture(scope="module")
def model():
    return LanguageModel.load("embedded")


@pytest.fixture
def small_model(monkeypatch):
    """Lets open_activations load the embedded model, and counts how often it does."""
    loaded, load = [], LanguageModel.load

    def watched(*names, **settings):
        loaded.append(names)
        return load(*names, **settings)

    monkeypatch.setattr(LanguageModel, "load", watched)
    return loaded


def given(texts, seed=0, epochs=1):
    return IndexedText(texts, None, seed=seed, epochs=epochs, fingerprint="mark", name="given")


def make(model, texts=TEXTS, seed=0, batch_size=BATCH, **settings):
    config = dataclasses.replace(SETTINGS, **settings)
    return LanguageModelActivations(
        model, given(texts, seed, config.epochs), config, batch_size, seed
    )


def jsonl(tmp_path, monkeypatch, texts=TEXTS):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def same(found, expected):
    return len(found) == len(expected) and all(
        a.equal(b) for a, b in zip(found, expected, strict=True)
    )


def take(source, count):
    batches = iter(source)
    return [next(batches) for _ in range(count)]


# Language models


def test_activations_are_those_of_the_text(model):
    """The rows of all batches are those of a direct pass over the packed training text."""
    source = make(model)
    heldout = _heldout_documents(model)
    packer = packing.Packer(model.tokenizer, LENGTH)
    order = torch.randperm(len(TEXTS) - heldout, generator=torch.Generator().manual_seed(0))
    contexts = [c for i in order for c in packer.add(TEXTS[heldout + int(i)])]
    rows = []
    for group in torch.stack(contexts).split(4):
        mask = packing.token_mask(group, model.tokenizer)
        rows.append(model.activations(group)[mask])
    expected = torch.cat(rows)
    found = torch.cat(list(source))
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert not found.equal(expected)  # shuffled
    assert _sorted(found).equal(_sorted(expected))


def _heldout_documents(model):
    packer = packing.Packer(model.tokenizer, LENGTH)
    contexts = 0
    for count, text in enumerate(TEXTS, 1):
        contexts += len(list(packer.add(text)))
        if contexts >= 3:
            return count
    raise AssertionError("the texts are too short for these tests")


def _sorted(rows):
    return rows[rows[:, 0].argsort()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rows_wait_in_the_dtype_of_the_model(dtype, model, monkeypatch):
    """In half the memory; batches and held-out rows are the same float32 numbers."""
    activations = LanguageModel.activations_of_points

    def given_as(self, ids):
        return [x.to(dtype) for x in activations(self, ids)]

    monkeypatch.setattr(LanguageModel, "activations_of_points", given_as)
    source = make(model)
    batches = list(source)
    kept = torch.float32 if dtype == torch.float64 else dtype
    assert [rows.dtype for rows in source.buffer.rows] == [kept]
    monkeypatch.setattr("kronsae.data.activations.as_kept", torch.Tensor.float)
    before = make(model)
    for found, expected in zip(batches, before, strict=True):
        assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert source.heldout_activations().dtype == torch.float32
    assert torch.equal(source.heldout_activations(), before.heldout_activations())


def test_batches_have_the_size_asked_for(model):
    sizes = [batch.shape for batch in make(model)]
    assert len(sizes) > 8
    assert set(sizes[:-1]) == {(BATCH, model.d_model)} and sizes[-1][0] <= BATCH


def test_held_out_text_is_a_direct_computation(model):
    source = make(model, contexts_per_batch=2)
    ids = source.heldout_contexts()
    joined = "".join(text + model.tokenizer.eos_token for text in TEXTS)
    expected_ids = model.tokenizer(joined, add_special_tokens=False, verbose=False)["input_ids"]
    assert ids.shape == (3, LENGTH)  # as many contexts as reach the tokens asked for
    assert ids.flatten().tolist() == expected_ids[: 3 * LENGTH]
    mask = source.token_mask(ids)
    assert not mask[:, 0].any() and not mask[ids == model.tokenizer.eos_token_id].any()
    found = source.heldout_activations()
    expected = model.activations(ids)[mask]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_held_out_text_is_the_same_for_every_seed(model):
    first, second = make(model, seed=0), make(model, seed=1)
    assert first.heldout_contexts().equal(second.heldout_contexts())
    assert not take(first, 1)[0].equal(take(second, 1)[0])


def test_held_out_documents_are_not_trained_on(model):
    texts = [f"unique_{i} " * 30 for i in range(8)]
    source = make(model, texts)
    source._pack(10**6)
    trained = model.tokenizer.decode(torch.cat(source.contexts).tolist())
    heldout = model.tokenizer.decode(source.heldout_contexts().flatten().tolist())
    names = [f"unique_{i} " for i in range(8)]
    assert any(name in heldout for name in names)
    assert [name in trained for name in names] == [name not in heldout for name in names]


def test_held_out_text_is_tokenised_as_far_as_needed(model, monkeypatch):
    monkeypatch.setattr(packing, "PIECE_CHARACTERS", 500)
    pieces, tokens = [], packing.Packer._tokens
    monkeypatch.setattr(
        packing.Packer, "_tokens", lambda self, text: pieces.append(text) or tokens(self, text)
    )
    make(model, ["value = 1\n" * 100_000, *TEXTS])
    assert sum(map(len, pieces)) < 5000


def test_less_held_out_text_than_asked_for_is_told(model):
    text = IndexedText(TEXTS[4:], TEXTS[:2], seed=0, epochs=1, fingerprint="")
    config = dataclasses.replace(SETTINGS, heldout_tokens=100_000)
    with pytest.warns(UserWarning, match=r"only \d+ of 100,000 tokens could be held out"):
        source = LanguageModelActivations(model, text, config, BATCH, 0)
    assert 0 < source.describe()["heldout_contexts"] < 20
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(model)  # enough


@pytest.mark.parametrize("streaming", [False, True], ids=["indexed", "streamed"])
@pytest.mark.parametrize(
    "texts, words",
    [
        (["short"], "less held-out text than one context of 16 tokens"),
        (["value = 1\n" * 100], "nothing left to train on.*fewer --heldout-tokens"),
        (["value = 1\n" * 100, ""], "nothing left to train on|less than one context"),
        (["value = 1\n" * 100, "short"], r"only \d tokens are left .* less than one context of 16"),
    ],
    ids=["no text", "a single document", "and an empty one", "and a short one"],
)
def test_too_little_text(texts, words, streaming, tmp_path, monkeypatch):
    path = jsonl(tmp_path, monkeypatch, texts)
    config = dataclasses.replace(SETTINGS, dataset=path, streaming=streaming, heldout_order="first")
    with pytest.raises(InputError, match=words):
        open_activations(config, batch_size=BATCH, seed=0, device="cpu")


@pytest.mark.one_in(3)
@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("kind", ["given", "indexed", "streamed", "streamed in its own order"])
def test_resume(model, kind, epochs, tmp_path, monkeypatch):
    """Fresh objects, and states that went through a checkpoint, give the same batches."""
    monkeypatch.setattr(LanguageModel, "load", lambda *_args, **_settings: model)
    if kind != "given":
        path = jsonl(tmp_path, monkeypatch)
        config = dataclasses.replace(
            SETTINGS, dataset=path, streaming=kind == "streamed", epochs=epochs
        )
        if kind == "streamed":  # through several buffers
            config = dataclasses.replace(config, shuffle_documents=9)
        if kind == "streamed in its own order":
            own = {"streaming": True, "shuffle_documents": 0, "heldout_order": "first"}
            config = dataclasses.replace(config, **own)

    def fresh():
        if kind == "given":
            return make(model, epochs=epochs)
        return open_activations(config, batch_size=BATCH, seed=0, device="cpu")

    whole = list(fresh())
    assert len(whole) > 8 * epochs
    for after in (0, 1, 2, 5, len(whole) // 2 + 1, len(whole) - 1, len(whole)):
        source = fresh()
        take(source, after)
        state = load_state(save_state(tmp_path / f"state-{after}", source.state_dict()))
        resumed = fresh()
        resumed.load_state_dict(state)
        assert same(list(resumed), whole[after:]), after


def edited(state):
    """A state without each of its keys, and with each of its counts negative, and their names.

    What is in a dataset's own state, it alone knows.
    """
    for key, value in state.items():
        yield key, {name: x for name, x in state.items() if name != key}
        if type(value) is int:
            yield key, state | {key: -1}
        if isinstance(value, dict):
            yield key, state | {key: 5}
            for name, part in edited(value) if key not in ("start", "stream") else ():
                yield name, state | {key: part}


@pytest.mark.parametrize("kind", ["given", "streamed", "streamed in its own order"])
def test_a_state_that_was_edited_is_refused(model, kind, tmp_path, monkeypatch):
    """That of a source, its text, its packer or its buffer: the key is named."""
    monkeypatch.setattr(LanguageModel, "load", lambda *_args, **_settings: model)
    streaming = {"streaming": True, "shuffle_documents": 9 * (kind == "streamed")}
    config = dataclasses.replace(
        SETTINGS, dataset=jsonl(tmp_path, monkeypatch), heldout_order="first", **streaming
    )
    if kind == "given":
        source = make(model)
    else:
        source = open_activations(config, batch_size=BATCH, seed=0, device="cpu")
    take(source, 3)
    state = copy.deepcopy(source.state_dict())
    count = 0
    for name, wrong in edited(state):
        count += 1
        with pytest.raises(InputError, match=name):
            source.load_state_dict(wrong)
            take(source, 3)
    assert count > 15
    source.load_state_dict(state)


def test_a_source_in_use_goes_back(model):
    source = make(model)
    batches = iter(source)
    next(batches)
    state = copy.deepcopy(source.state_dict())
    rest = [batch.clone() for batch in batches]
    source.load_state_dict(state)
    assert same(list(source), rest)
    source.load_state_dict(state)
    batches = iter(source)
    next(batches)
    source.load_state_dict(state)
    assert same(list(batches), rest)


def test_describe_holds_what_decides_the_batches(model):
    usual = make(model).describe()
    assert json.loads(json.dumps(usual)) == usual
    assert usual == make(model).describe()
    assert not {"transformers", "torch", "datasets", "tokenizers"} & set(usual)  # may be updated
    for changed in (
        make(model, seed=1),
        make(model, batch_size=BATCH + 1),
        make(model, context_length=LENGTH + 1),
        make(model, contexts_per_batch=5),
        make(model, buffer_tokens=65),
        make(model, epochs=2),
        make(model, heldout_tokens=4 * LENGTH),
    ):
        assert changed.describe() != usual


class Broken:
    """A language model whose activations hold NaN from one call on."""

    def __init__(self, model, good_calls):
        self.inner, self.good_calls = model, good_calls
        self.model, self.tokenizer, self.hookpoint = model.model, model.tokenizer, model.hookpoint
        self.d_model, self.device = model.d_model, model.device
        self.d_target, self.points = 0, (self,)
        self.vocabulary, self.vocab_size = model.vocabulary, model.vocab_size

    def activations_of_points(self, ids):
        x = self.inner.activations(ids)
        self.good_calls -= 1
        return [x if self.good_calls >= 0 else torch.full_like(x, torch.nan)]


def test_nan_in_training_text(model):
    with pytest.raises(InputError, match="NaN or infinity for 100.0% .* forward pass 2: try --mod"):
        list(make(Broken(model, 2)))


def test_nan_in_held_out_text(model):
    with pytest.raises(InputError, match="NaN or infinity for 100.0% .* of held-out text: try"):
        make(Broken(model, 0)).heldout_activations()


def test_open_activations_with_the_standard_library():
    config = DataConfig(
        context_length=LENGTH, contexts_per_batch=4, buffer_tokens=64, heldout_tokens=64
    )
    source = open_activations(config, batch_size=BATCH, seed=0, device="cpu")
    assert source.heldout_contexts().shape == (4, LENGTH)
    (batch,) = take(source, 1)
    assert batch.shape == (BATCH, source.d_model) and batch.isfinite().all()


@pytest.mark.parametrize(
    "settings, batch_size, words",
    [
        ({"dataset": "./no-such-folder"}, BATCH, "no file or folder './no-such-folder'"),
        ({"split": "test"}, BATCH, "split has no effect with dataset 'stdlib'"),
        ({}, 0, "batch_size: expected >= 1, got 0"),
    ],
    ids=["files", "settings", "batch size"],
)
def test_what_is_cheap_to_check_comes_before_the_model(settings, batch_size, words, small_model):
    with pytest.raises(InputError, match=words):
        open_activations(DataConfig(**settings), batch_size=batch_size, seed=0, device="cpu")
    assert not small_model


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"model": "./no-such-model", "layer": 0}, "no-such-model"),
        ({"layer": 99}, "99"),
        ({"context_length": 10**6}, "context_length: embedded reads at most"),
    ],
    ids=["model", "layer", "context length"],
)
def test_the_model_is_checked_before_the_text_is_read(settings, words, monkeypatch):
    unread = "kronsae.sources.open_documents"
    monkeypatch.setattr(unread, lambda *_args: pytest.fail("text was read"))
    with pytest.raises(InputError, match=words):
        open_activations(DataConfig(**settings), batch_size=BATCH, seed=0, device="cpu")


# Tensors


def numbers(count=20, d=3):
    return torch.arange(count * d).float().view(count, d)


def test_tensor_rows_come_once_an_epoch_in_another_order():
    source = TensorActivations(numbers(), 6, seed=1, epochs=2)
    batches = list(source)
    assert [len(batch) for batch in batches] == [6] * 6 + [4]  # on across the end of an epoch
    first, second = torch.cat(batches).split(20)
    assert not first.equal(second) and not first.equal(numbers())
    assert _sorted(first).equal(numbers()) and _sorted(second).equal(numbers())
    assert not next(iter(TensorActivations(numbers(), 6, seed=2))).equal(batches[0])


def test_a_batch_may_be_larger_than_the_tensor():
    (batch,) = take(TensorActivations(numbers(4), 10), 1)
    assert len(batch) == 10 and _sorted(batch)[:2].equal(numbers(4)[:1].expand(2, -1))


def test_a_tensor_repeats_for_ever_by_default():
    assert len(take(TensorActivations(numbers(4), 4), 50)) == 50


@pytest.mark.parametrize("shape", [(20, 3), (4, 5, 3), (2, 2, 5, 3)], ids=str)
def test_leading_dimensions_of_a_tensor_are_flattened(shape):
    source = TensorActivations(numbers().view(shape), 20, epochs=1)
    assert source.d_model == 3
    (batch,) = source
    assert _sorted(batch).equal(numbers())


def test_batches_are_cut_from_the_graph_that_made_them():
    x = numbers().requires_grad_()
    assert not next(iter(TensorActivations(x, 6))).requires_grad
    assert not next(iter(IterableActivations([x * 2]))).requires_grad


@pytest.mark.parametrize("after", range(8))
def test_resume_of_a_tensor(after):
    whole = list(TensorActivations(numbers(), 6, epochs=2))
    source, resumed = (TensorActivations(numbers(), 6, epochs=2) for _ in range(2))
    take(source, after)
    state = source.state_dict()
    resumed.load_state_dict(state)
    assert same(list(resumed), whole[after:])
    in_use = iter(resumed)
    resumed.load_state_dict({"given": 0})
    next(in_use)
    resumed.load_state_dict(state)
    assert same(list(in_use), whole[after:])


def test_describe_of_a_tensor_tells_it_from_others():
    x = torch.randn(1000, 3)
    usual = TensorActivations(x, 6, epochs=2).describe()
    assert json.loads(json.dumps(usual)) == usual
    assert usual == TensorActivations(x.clone().view(10, 100, 3), 6, epochs=2).describe()
    for changed in (
        TensorActivations(x + 1, 6, epochs=2),
        TensorActivations(x[:-1], 6, epochs=2),
        TensorActivations(x, 7, epochs=2),
        TensorActivations(x, 6, epochs=3),
        TensorActivations(x, 6, seed=1, epochs=2),
    ):
        assert changed.describe() != usual


@pytest.mark.parametrize(
    "x", [torch.zeros(3), torch.zeros(3, 2).long(), torch.zeros(0, 3), [[1.0]]], ids=str
)
def test_what_is_no_tensor_of_activations(x):
    with pytest.raises(InputError, match=r"activations: expected a floating tensor \[\.\.\., B, d"):
        TensorActivations(x, 6)


def test_batch_size_zero_is_refused():
    with pytest.raises(InputError, match="batch_size: expected >= 1, got 0"):
        TensorActivations(numbers(), 0)


# Iterables


def test_batches_of_an_iterable_come_as_they_are():
    batches = [numbers(4), numbers(20).view(4, 5, 3), numbers(2).to(torch.bfloat16)]
    source = IterableActivations(batches)
    assert source.d_model == 3
    assert same(list(source), [batches[0], numbers(20), numbers(2)])


def test_resume_of_an_iterable():
    batches = list(numbers(20).split(3))
    for after in range(len(batches) + 1):
        source, resumed = (IterableActivations(iter(batches)) for _ in range(2))
        take(source, after)
        resumed.load_state_dict(source.state_dict())
        assert same(list(resumed), batches[after:])


def test_an_iterable_cannot_go_back():
    source = IterableActivations(numbers(20).split(3))
    take(source, 3)
    with pytest.raises(InputError, match="has given 3 batches, more than the 2"):
        source.load_state_dict({"given": 2})


@pytest.mark.parametrize(
    "batches, words",
    [
        ([], "got an empty iterable"),
        ([None], "batch 0: expected a floating tensor .*, got None"),
        ([torch.zeros(3)], "batch 0: expected a floating tensor"),
        ([torch.zeros(4, 3), torch.zeros(4, 2)], r"batch 1: .* = \(3, 0\) as before, got \(2, 0\)"),
        ([torch.zeros(4, 3), None], "batch 1: expected a floating tensor"),
    ],
    ids=["empty", "none", "shape", "width", "type"],
)
def test_iterables_that_give_no_activations(batches, words):
    with pytest.raises(InputError, match=words):
        list(IterableActivations(batches))


def test_an_iterable_that_ends_before_the_checkpoint():
    with pytest.raises(InputError, match="ended after 2 batches, before the 5"):
        IterableActivations(numbers(6).split(3)).load_state_dict({"given": 5})


# Synthetic


def test_synthetic_activations_are_sums_of_their_features():
    source = SyntheticActivations(16, num_groups=4, group_size=3, batch_size=512)
    x, amplitudes = source.draw()
    assert x.shape == (512, 16) and amplitudes.shape == (512, 12)
    torch.testing.assert_close(x, amplitudes @ source.features)
    torch.testing.assert_close(source.features.norm(dim=1), torch.ones(12))
    on = amplitudes[amplitudes > 0]
    assert 0.5 <= on.min() and on.max() <= 1.5


@pytest.mark.parametrize(
    "settings", [{"batch_size": 0}, {"group_size": 0}, {"within": 1.5}], ids=str
)
def test_synthetic_settings_that_make_no_sense(settings):
    (name,) = settings
    with pytest.raises(InputError, match=f"{name}: expected"):
        SyntheticActivations(8, **settings)


def test_synthetic_features_of_a_group_fire_together():
    source = SyntheticActivations(
        8, num_groups=3, group_size=2, group_density=0.1, within=0.5, batch_size=50_000
    )
    on = (source.draw()[1] > 0).double()
    assert on.mean(0).sub(0.05).abs().max() < 0.01  # 0.1 * 0.5
    together = (on.T @ on) / len(on)
    assert abs(together[0, 1] - 0.025) < 0.005  # 0.1 * 0.5 * 0.5
    assert abs(together[0, 2] - 0.0025) < 0.0015  # 0.05 * 0.05


def test_synthetic_activations_depend_on_their_seed_and_resume():
    make = SyntheticActivations
    first = take(make(8, seed=1, batch_size=4), 5)
    assert same(take(make(8, seed=1, batch_size=4), 5), first)
    assert not same(take(make(8, seed=2, batch_size=4), 5), first)
    source, resumed = make(8, seed=1, batch_size=4), make(8, seed=1, batch_size=4)
    take(source, 2)
    resumed.load_state_dict(source.state_dict())
    assert same(take(resumed, 3), first[2:])
    assert json.loads(json.dumps(resumed.describe())) == source.describe()
    assert make(8, seed=2, batch_size=4).describe() != source.describe()
