"""What callers of the Python interface give: used as meant, or refused in a sentence."""

import json
import math
import warnings
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import kronsae
from kronsae import SAE, InputError, SAEConfig, TrainConfig
from kronsae.__main__ import main
from kronsae.config import MOST_LATENTS, DataConfig, from_dict
from kronsae.data import TensorActivations
from kronsae.metrics import evaluate
from kronsae.registry import FORMATS
from kronsae.system import tensors as tensors_module
from kronsae.system.documents import parse_json, typed
from kronsae.system.files import sha256
from kronsae.train import fit
from kronsae.training.fit import fit_many
from kronsae_kernels import SparseCodes

X = torch.randn(400, 16, generator=torch.Generator().manual_seed(0))
KRON = {"heads": 8, "m": 2, "n": 2, "k": 4}
SHORT = {"tokens": 200, "batch_size": 100, "lr": 3e-3}
FOUR = (
    *(4, 4.0, np.int64(4), np.int8(4), np.float32(4), np.array(4), torch.tensor(4)),
    *(torch.tensor(4.0), Fraction(4)),
)
NO_FOUR = (
    *("4", b"4", True, 4.5, math.nan, math.inf, None, [4], (4,), {}, 4 + 0j, ...),
    *(np.array([4]), torch.tensor([4]), torch.tensor(4, device="meta"), np.bool_(True)),
)
HUGE = (10**30, 1e30, 2**53 + 1, np.uint64(2**64 - 1))


def trained(x=X, sae=None, train=None, **arguments):
    config = SAEConfig(**(KRON | (sae or {})))
    return fit(config, x, TrainConfig(**(SHORT | (train or {}))), **arguments)


def same(a, b):
    state = b.sae.state_dict()
    return all(torch.equal(x, state[name]) for name, x in a.sae.state_dict().items())


# Settings


@pytest.mark.parametrize("value", FOUR, ids=repr)
def test_a_whole_number_may_be_written_in_many_ways(value):
    config = SAEConfig(**(KRON | {"k": value}))
    assert config.k == 4 and type(config.k) is int
    assert config == SAEConfig(**KRON)
    assert from_dict(SAEConfig, KRON | {"k": value}, "it") == config


@pytest.mark.parametrize("value", NO_FOUR, ids=repr)
def test_what_is_no_whole_number_is_refused(value):
    with pytest.raises(InputError, match="^k: expected a whole number.*, got "):
        SAEConfig(**(KRON | {"k": value}))
    with pytest.raises(InputError, match="^here: k: expected a whole number.*, got "):
        from_dict(SAEConfig, KRON | {"k": value}, "here")


@pytest.mark.parametrize("value", HUGE, ids=repr)
@pytest.mark.parametrize("name", ["tokens", "batch_size", "dead_after_tokens", "keep_checkpoints"])
def test_whole_numbers_have_an_end(name, value):
    with pytest.raises(InputError, match=f"^{name}: expected at most 2"):
        TrainConfig(**{name: value})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr": "1e-3"}, "lr: expected a number, without quotes, got '1e-3'"),
        ({"lr": None}, "lr: expected a number, got None: leave it out for its default, 0.0008"),
        ({"lr": 10**400}, "lr: expected a number, got 1000"),
        ({"lr": math.nan}, "lr: expected >= 0, got nan"),
        ({"lr": True}, "lr: expected a number, got True"),
        ({"tensorboard": 1}, "tensorboard: expected true or false, got 1"),
        ({"device": 0}, "device: expected text, got 0"),
        ({"device": "c\0pu"}, "device: expected text in UTF-8, without NUL"),
        ({"wandb": "\udcff"}, "wandb: expected text in UTF-8"),
        ({"seed": 1.5}, "seed: expected a whole number, got 1.5"),
        ({"k_start": 64, "k_fraction": 0}, "k_fraction: expected more than 0 beside k_start 64"),
        ({"rank_timeout": 10**10}, "rank_timeout: expected 1 to 1000000000"),
    ],
    ids=repr,
)
def test_other_types_are_refused(settings, words):
    with pytest.raises(InputError) as error:
        TrainConfig(**settings)
    assert str(error.value).startswith(words)


def test_values_of_like_types_are_used():
    config = TrainConfig(tokens=1e6, lr=np.float64(0.25), tensorboard=np.bool_(True), data_seed=3.0)
    assert (config.tokens, config.lr, config.tensorboard, config.data_seed) == (
        10**6,
        0.25,
        True,
        3,
    )
    assert [type(v) for v in (config.tokens, config.lr, config.tensorboard)] == [int, float, bool]
    assert DataConfig(layer=2.0, activations=Path("a") / "b").activations == "a/b"
    json.dumps(vars(config))


@pytest.mark.parametrize("part", ["encoder", "selection", "objective"])
@pytest.mark.parametrize("value", [5, None, ["topk"], {}, "none such"], ids=repr)
def test_kinds_are_named(part, value):
    with pytest.raises(InputError, match=f"^{part}: "):
        SAEConfig(**KRON, **{part: value})


def test_settings_of_kinds_are_checked():
    for value in (5, "x", [1]):
        with pytest.raises(InputError, match="^selection 'relu': expected ReLUSettings, got"):
            SAEConfig(dict_size=32, selection="relu", selection_settings=value)
    with pytest.raises(InputError, match="^selection 'relu': l1_coefficient: expected a number"):
        SAEConfig(dict_size=32, selection="relu", selection_settings={"l1_coefficient": "3"})


def test_dictionaries_have_an_end():
    for heads in (2**36, 2**53, 10**30):
        with pytest.raises(InputError, match="^(dict_size|heads): expected "):
            SAEConfig(heads=heads)
    assert SAEConfig(dict_size=MOST_LATENTS).dict_size == MOST_LATENTS


def test_an_sae_that_memory_cannot_hold_is_refused_before_it_is_made(monkeypatch):
    large = {"heads": 2**27, "m": 4, "n": 4}
    with pytest.raises(InputError, match="weights, AdamW's moments .* MiB of memory or more"):
        trained(sae=large)
    with pytest.raises(InputError, match="a batch would take .* MiB of memory or more"):
        trained(train={"batch_size": 2**50})
    with pytest.raises(InputError, match="the SAE's weights would take"):
        SAE(SAEConfig(**(KRON | large), d_model=16))
    SAE(SAEConfig(**(KRON | large), d_model=16), device="meta")
    with torch.device("meta"):
        SAE(SAEConfig(**(KRON | large), d_model=16))
    monkeypatch.setattr(tensors_module, "free_bytes", lambda device: None)  # it is not known
    trained()
    # Weights and two moments of 8 heads: 3 * 4 * 16 * (8 * 4 + 32) bytes, and a batch.
    needed = 4 * (3 * 16 * (8 * 4 + 32) + 100 * 16)
    monkeypatch.setattr(tensors_module, "free_bytes", lambda device: needed)
    trained()
    monkeypatch.setattr(tensors_module, "free_bytes", lambda device: needed - 1)
    with pytest.raises(InputError, match="take a smaller dict_size"):
        trained()


# Activations


def test_arrays_of_numpy_are_as_good_as_tensors():
    expected = trained(heldout=X)
    read_only = X.numpy().copy()
    read_only.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in (X.numpy(), read_only, X.numpy().astype(">f4"), X.double().numpy()):
            result = trained(x, heldout=x)
            assert same(result, expected) and result.metrics == expected.metrics
            assert evaluate(result.sae, x).items() <= result.metrics.items()
    backwards = X.flip(0).numpy()[::-1]
    assert same(trained(backwards), expected)
    batches = [x.numpy() for x in X.split(100)]
    assert same(trained(iter(batches)), trained(iter(X.split(100))))
    pair = trained((X.numpy(), X[:, :4].numpy()))
    assert same(pair, trained((X, X[:, :4])))


def anonymous_mib():
    """Memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 2**10


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_memmap_is_read_row_by_row(tmp_path, dtype):
    """Neither it nor a part of it, nor a pair of them, is ever in memory as a whole."""
    contexts, length, width = (200 << 20) // (256 * 256 * np.dtype(dtype).itemsize), 256, 256
    written = np.memmap(tmp_path / "x.bin", dtype, "w+", shape=(contexts, length, width))
    generator = np.random.default_rng(0)
    for part in np.array_split(np.arange(contexts), 20):
        written[part] = generator.standard_normal((len(part), length, width), np.float32)
    written.flush()
    x = np.memmap(tmp_path / "x.bin", dtype, "r", shape=(contexts, length, width))
    flat = x.reshape(-1, width)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(flat[:256])  # what the first training takes
        before = anonymous_mib()
        for given in (flat, x, x[:, 1:], (x, x), (x[:, 1:, :64], x[:, :-1])):
            source = TensorActivations(given, 4096)
            batches = [source.describe(), *islice(source, 4)]
            del batches
            assert anonymous_mib() - before < 100  # 200 MiB are in the file
        trained(flat, train={"tokens": 8192, "batch_size": 2048})
        assert anonymous_mib() - before < 100
    few = TensorActivations(np.array(x[:2]), 64, seed=1)
    same_few = TensorActivations(x[:2], 64, seed=1)
    assert few.describe() == same_few.describe()
    assert torch.equal(next(iter(few)), next(iter(same_few)))


def test_rows_of_a_part_of_an_array_are_its_rows(tmp_path):
    x, y = torch.randn(5, 6, 3), torch.randn(5, 6, 4)
    for given, whole in (
        (x[:, 1:].numpy(), x[:, 1:].reshape(-1, 3)),
        ((x[:, 1:], y[:, :-1]), torch.cat([x[:, 1:], y[:, :-1]], -1).reshape(-1, 7)),
    ):
        parts, plain = TensorActivations(given, 7, 3, 2), TensorActivations(whole, 7, 3, 2)
        assert torch.equal(torch.cat(list(parts)), torch.cat(list(plain)))
        assert parts.describe()["content"] == plain.describe()["content"]


@pytest.mark.parametrize("dtype", ["uint16", np.dtype("V2")])
def test_bits_of_bfloat16_are_not_taken_for_numbers(dtype):
    bits = X.bfloat16().view(torch.uint16)
    if dtype == "uint16":
        for x in (bits.numpy(), bits):
            with pytest.raises(InputError, match=r"got \[.*uint16.*\.view\(torch.bfloat16\)"):
                trained(x)
        values = torch.from_numpy(bits.numpy()).view(torch.bfloat16)
        assert same(trained(values), trained(X.bfloat16()))
    else:
        with pytest.raises(InputError, match="expected a floating tensor"):
            trained(bits.numpy().view(dtype))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats_are_read_as_float32(dtype):
    x = X.to(dtype)
    result = trained(x, heldout=x)
    assert same(result, trained(x.float()))
    with torch.no_grad():
        assert torch.equal(result.sae(x).x_hat, result.sae(x.float()).x_hat)


BAD = {
    "None": None,
    "int": 5,
    "str": "abc",
    "list": X[:3].tolist(),
    "dict": {},
    "int64": X.long(),
    "bool": X > 0,
    "complex": X.to(torch.complex64),
    "sparse": X.to_sparse(),
    "meta": X.to("meta"),
    "numpy int": X.long().numpy(),
    "numpy object": np.array([None]),
    "numpy masked": np.ma.masked_array(X.numpy(), X.numpy() > 1),
    "longdouble": X.numpy().astype(np.longdouble),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_floating_tensor_is_refused(name, tmp_path):
    x = BAD[name]
    with pytest.raises(InputError, match="expected"):
        trained(x, out=tmp_path / "run")
    with pytest.raises(InputError, match="expected"):
        trained(iter([x, x]), out=tmp_path / "run")
    if x is not None:
        with pytest.raises(InputError, match="^heldout: expected"):
            trained(heldout=x, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    sae = SAE(SAEConfig(**KRON, d_model=16))
    for use in (sae.encode, sae, lambda x: evaluate(sae, x)):
        with pytest.raises(InputError, match="expected"):
            use(x)


@pytest.mark.parametrize("scale", [1e30, 1e37, 1e-30, 1e-43])
def test_activations_whose_products_float32_cannot_hold(scale):
    with pytest.raises(InputError, match="multiply all activations by a constant first"):
        trained(X * scale)
    pair = (X, X * scale)
    with pytest.raises(InputError, match="multiply all activations by a constant first"):
        trained(pair)


@pytest.mark.parametrize("scale", [1e-14, 1e14])
def test_activations_whose_products_float32_can_hold(scale):
    result, usual = trained(X * scale), trained()
    with torch.no_grad():
        x_hat, expected = result.sae(X * scale).x_hat / scale, usual.sae(X).x_hat
    torch.testing.assert_close(x_hat, expected, rtol=1e-3, atol=1e-3)


# Other arguments


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"out": 5}, "out: expected text, got 5"),
        ({"out": "a\0b"}, "out: expected text in UTF-8, without NUL"),
        ({"out": "x" * 300}, "out: 'xxx.*cannot be looked up: File name too long"),
        ({"settings": 5}, "settings: expected an object"),
        ({"settings": {"x": {1, 2}}}, "settings: expected JSON values"),
        ({"settings": {"x": math.nan}}, "settings: expected JSON values"),
        ({"settings": {"config": 5}}, "settings.config: expected an object"),
        ({"mesh": 5}, "mesh: expected Mesh"),
        ({"on_record": 5}, "on_record: expected Callable"),
        ({"resume": True}, "resume needs the run folder"),
    ],
    ids=repr,
)
def test_arguments_of_fit(arguments, words):
    with pytest.raises(InputError, match=words):
        trained(**arguments)


def test_configs_of_fit():
    for config in (None, 5, KRON):
        with pytest.raises(InputError, match="^sae_config: expected SAEConfig, got"):
            fit(config, X)
        with pytest.raises(InputError, match="^config: expected SAEConfig, got"):
            SAE(config)
    config = SAEConfig(**KRON)
    with pytest.raises(InputError, match="^train_config: expected TrainConfig, got"):
        fit(config, X, SHORT)
    for saes, others in (
        (None, {}),
        (config, {}),
        ([5], {}),
        ([], {}),
        ([config], {"names": [1]}),
        ([config], {"names": 5}),
        ([config], {"settings": 5}),
        ([config], {"settings": [5]}),
        ([config], {"train_configs": 5}),
        ([config], {"train_configs": [5]}),
    ):
        with pytest.raises(InputError, match="expected"):
            fit_many(saes, X, **others)


@pytest.mark.parametrize(
    "source", [None, 5, b"x", ["x"], "x" * 300, "/tmp/" + "x" * 300, "a\0b", "\udcff"], ids=repr
)
def test_what_cannot_be_loaded(source):
    with pytest.raises(InputError, match="^source: "):
        kronsae.load(source)


def test_parts_that_cannot_be_loaded(tmp_path):
    for arguments in ({"subfolder": 5}, {"subfolder": "x" * 300}, {"revision": 5}):
        with pytest.raises(InputError, match=f"^{next(iter(arguments))}: "):
            kronsae.load(tmp_path, **arguments)
    with pytest.raises(InputError, match="device 'xyz' cannot be used"):
        SAE(SAEConfig(**KRON, d_model=16), device="xyz")


def test_arguments_of_an_sae(tmp_path):
    sae = SAE(SAEConfig(**KRON, d_model=16))
    codes = sae.encode(X)
    for bad in (None, 5, [1, 2], X, SparseCodes(codes.values.detach().numpy(), codes.indices)):
        with pytest.raises(ValueError, match="expected"):
            sae.decode(bad)
    assert torch.equal(sae.decode(tuple(codes)), sae.decode(codes))
    for target in (X[:3], X[0], X[:, :4], 5, "x"):
        with pytest.raises(InputError, match="^target: expected"):
            sae(X, target)
    assert torch.equal(sae(X, X.numpy()).loss, sae(X).loss)
    for metadata, words in (
        (5, "metadata: expected an object"),
        ({"x": math.nan}, "metadata: expected JSON values"),
        ({"x": object()}, "metadata: expected JSON values"),
        ({"data": "my data"}, "metadata.data: expected an object, got 'my data'"),
        ({"tokens": "1B"}, "metadata.tokens: expected a whole number"),
    ):
        with pytest.raises(InputError, match=words):
            sae.save(tmp_path / "sae", metadata)
    for folder in (None, 5, "x" * 300, "x" * 250, "a\0b"):
        with pytest.raises(InputError):
            sae.save(folder)
    assert not list(tmp_path.iterdir())


# Weights


WEIGHTS = {
    "NaN": lambda x: x * math.nan,
    "infinity": lambda x: torch.full_like(x, math.inf),
    "beyond float32": lambda x: x.double() + 1e60,
    "integers": lambda x: x.long(),
    "bytes": lambda x: x.to(torch.uint8),
    "bools": lambda x: x > 0,
    "complex": lambda x: x.to(torch.complex64),
}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("library", [name for name, form in FORMATS.items() if form.written])
def test_weights_that_no_sae_has(library, kind, tmp_path):
    config = SAEConfig(d_model=16, encoder="dense", dict_size=32, k=4)
    form = FORMATS[library]
    folder = Path(form.write(SAE(config).eval(), tmp_path / "sae"))
    path = folder / form.weights
    read = (lambda: torch.load(path)) if form.pickle else (lambda: load_file(path))
    weights = read()
    for name in weights:
        if not weights[name].is_floating_point() or name == "threshold":
            continue
        changed = weights | {name: WEIGHTS[kind](weights[name])}
        torch.save(changed, path) if form.pickle else save_file(changed, path)
        if library == "kronsae":
            document = json.loads((folder / form.config).read_text())
            document.pop("checksum", None)
            document["sha256"] = sha256(path)
            (folder / form.config).write_text(json.dumps(document))
        with pytest.raises(InputError, match=f"{name}: .*train.* the SAE again"):
            kronsae.load(folder, allow_pickle=True)


def test_a_threshold_that_was_not_learned_yet_is_kept(tmp_path):
    sae = SAE(SAEConfig(**KRON, d_model=16, selection="batchtopk"))
    loaded = kronsae.load(sae.save(tmp_path / "sae"))
    assert loaded.selection.threshold.isnan()


# Documents


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 1}}', "'c' is there twice"),
        ("[NaN]", "NaN is no finite number"),
        ("[-Infinity]", "-Infinity is no finite number"),
        ("[1e999]", "1e999 is no finite number"),
        ("[" + "9" * 400 + "]", "too many digits"),
        ("[" + "9" * 5000 + "]", "too many digits"),
        ("[" * 65 + "]" * 65, "more than 64 levels"),
        ("[" * 100_000 + "]" * 100_000, "more than 64 levels"),
        ('["\\ud800"]', "surrogates not allowed"),
        ('["\\uD800"]', "surrogates not allowed"),
        ("", "Expecting value"),
        ("[1] 2", "Extra data"),
    ],
    ids=lambda text: text[:20],
)
def test_json_that_is_refused(text, words):
    for given in (text, text.encode()):
        with pytest.raises(ValueError, match=words):
            parse_json(given)


def test_json_that_is_read():
    for text in ('{"a": [1, 2.5, "\\u00e4\\ud83d\\ude00", null]}', "9" * 300, "[" * 64 + "]" * 64):
        assert parse_json(text) == json.loads(text)


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        ([1.0, np.int64(2)], list[int], [1, 2]),
        ([1, 2], tuple[int, ...], (1, 2)),
        ({"a": 1}, dict[str, float], {"a": 1.0}),
        (None, int | None, None),
        ("a", list[str] | str, "a"),
        (["a"], str | list[str], ["a"]),
    ],
)
def test_typed(value, hint, expected):
    found = typed(value, hint, "it")
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint", "words"),
    [
        ([1, "2"], list[int], r"it\[1\]: expected a whole number, without quotes, got '2'"),
        ({"a": {"b": "x"}}, dict[str, dict[str, bool]], "it.a.b: expected true or false"),
        ({1: 2}, dict[str, int], "it: expected an object"),
        ("ab", list[str], "it: expected a list"),
        (None, int, "it: expected a whole number, got None"),
        ("x" * 10_000, int, "^.{0,200}$"),
    ],
)
def test_not_typed(value, hint, words):
    with pytest.raises(InputError, match=words):
        typed(value, hint, "it")


@pytest.mark.parametrize(
    "words",
    ["train --out", "train --resume", "train --config", "train --iso-flops-of", "train --plugin"]
    + ["train --dataset", "train --activations", "evaluate", "harvest --out", "explore"],
)
def test_a_path_that_is_too_long(words, capsys):
    assert main([*words.split(), "x" * 300]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error
