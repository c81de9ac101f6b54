"""Starting kernels: configurations are data that is checked, and launches can be noted only."""

import copy
import json

import pytest
import torch

pytest.importorskip("triton")

from kronsae_kernels import dense_encode, fused_encode, sparse_decode
from kronsae_kernels.triton_impl import (
    backward,
    batch,
    configs,
    counters,
    decode,
    gemm,
    hierarchical,
    launch,
    nested,
    operations,
    select,
    threshold,
)

TABLE = json.loads(configs.PATH.read_text(encoding="utf-8"))
MODULES = (backward, batch, counters, decode, gemm, hierarchical, nested, select, threshold)
DERIVED = {
    "encode": {"ONE_PASS"},
    "segments": {"ROW_LENGTH", "HEAD_LENGTH"},
    "select_heads": {"PER_PROGRAM", "MAX_REGISTERS"},
    "merge_lists": {"ONE_WARP", "PER_WARP"},
    "list_keys": {"TILE"},
    "nested_errors": {"TILE"},
    "select_rows": {"ONE_WARP", "PER_WARP"},
    "select_latents": {"ONE_WARP", "PER_WARP", "DIRECT"},
    "rank_latents": {"ONE_WARP", "PER_WARP"},
    "encode_heads": {"COLUMNS", "ROOM", "CUT_ENTRIES", "SPLITS", "PROGRAMS"},
    "gather_heads": {"ONE_WARP", "PER_WARP"},
    "decode_and_loss": {"TILE"},
    "update_rows": {"PER_WARP", "PER_LOAD", "MAX_REGISTERS"},
}
"""Numbers that a launcher makes block sizes of, by entry; the first two are of no kernel."""


def kernels() -> dict[str, list[str]]:
    """Parameters of each kernel: functions under `triton.jit` with a public name."""
    return {
        name: member.arg_names
        for module in MODULES
        for name, member in vars(module).items()
        if hasattr(member, "arg_names") and member.fn.__module__ == module.__name__
        if not name.startswith("_")
    }


# Configurations


def test_tests_run_where_they_say(device):
    assert launch.interpreted() == (device.type == "cpu")


def test_every_kernel_has_a_default():
    assert kernels().keys() == TABLE["default"].keys() - {"encode", "segments"}


def test_numbers_are_parameters_of_the_kernel():
    for kernel, numbers in TABLE["default"].items():
        known = set(kernels().get(kernel, ())) | DERIVED.get(kernel, set())
        assert numbers.keys() - {"num_warps", "num_stages"} <= known, kernel


@pytest.mark.parametrize("generation", ["interpreter", "sm_80", "sm_90", "sm_123", "gfx942"])
def test_every_generation_has_all_kernels(generation):
    """A card that the table does not know has the defaults."""
    for kernel, default in TABLE["default"].items():
        found = configs.config_of(kernel, generation)
        numbers = {**default, **TABLE.get(generation, {}).get(kernel, {})}
        assert {"num_warps": found[0], "num_stages": found[1], **found.blocks} == numbers


def test_blocks_given_override_those_of_the_table():
    found = configs.config_of("combine", "sm_90", WIDTH=4, OTHER=5)
    default = TABLE["default"]["combine"]
    rest = {"ROWS": default["ROWS"], "STAGES": default["STAGES"]}
    assert found.blocks == {**rest, "WIDTH": 4, "OTHER": 5}
    assert configs.config_of("combine", "sm_90").blocks["WIDTH"] != 4


def test_unknown_kernel():
    with pytest.raises(ValueError, match="decode_all: expected one of .*'combine'"):
        configs.config_of("decode_all", "sm_90")


def test_override_ends():
    before = configs.config_of("combine", "sm_90")
    with configs.override("combine", WIDTH=16, num_warps=1):
        with configs.override("combine", ROWS=2):
            inside = configs.config_of("combine", "sm_90")
        assert configs.config_of("combine", "interpreter").blocks["ROWS"] != 2
    assert inside == configs.Config(1, before.num_stages, {**before.blocks, "ROWS": 2, "WIDTH": 16})
    assert configs.config_of("combine", "sm_90") == before
    for kernel, numbers in (("combine", {"ROW": 2}), ("decode_all", {"ROWS": 2})):
        with pytest.raises(ValueError, match=f"{kernel}: expected changes of"):
            with configs.override(kernel, **numbers):
                pass


BAD = {
    "unknown kernel": ({"sm_90": {"combin": {"ROWS": 4}}}, ["sm_90", "combin", "'combine'"]),
    "unknown number": ({"sm_90": {"combine": {"ROW": 4}}}, ["sm_90", "combine", "ROW", "WIDTH"]),
    "no number": ({"sm_90": {"combine": {"ROWS": "4"}}}, ["sm_90", "combine", "ROWS", "'4'"]),
    "a fraction": ({"gfx942": {"combine": {"ROWS": 4.0}}}, ["gfx942", "combine", "4.0"]),
    "negative": ({"sm_90": {"combine": {"WIDTH": -8}}}, ["combine", "WIDTH", "-8"]),
    "a truth value": ({"sm_90": {"encode": {"ONE_PASS": True}}}, ["ONE_PASS", "True"]),
    "no warps": ({"default": {"combine": {"num_stages": 1}}}, ["combine", "num_warps"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_entry_is_a_clear_error(name, tmp_path, monkeypatch):
    """A person may add to the file."""
    changes, words = BAD[name]
    table = copy.deepcopy(TABLE)
    for generation, entries in changes.items():
        table[generation] = {**table.get(generation, {}), **entries}
    path = tmp_path / "configs.json"
    path.write_text(json.dumps(table))
    monkeypatch.setattr(configs, "PATH", path)
    configs._table.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"configs\.json: ") as error:
            configs.config_of("pair_dots", "sm_90")
    finally:
        configs._table.cache_clear()
    assert not [word for word in words if word not in str(error.value)], str(error.value)


# Launches


def test_recorded_launches_run_nothing(device):
    """Outputs stay what they were, and the arguments are all that a compiler wants."""
    x, w = torch.ones(3, 5, device=device), torch.ones(4, 5, device=device)
    out = torch.full((3, 4), 7.0, device=device)
    config = configs.Config(2, 3, {"ROWS": 4, "WIDTH": 8, "STAGES": 1})
    columns = torch.zeros(3, 4, dtype=torch.int64, device=device)
    arguments = {"y": x, "columns": columns, "table": w, "out": out, "r": 4, "d": 5}
    with launch.record("sm_90") as launches:
        launch.launch(decode.pair_dots, (3, 1), config, **arguments)
        launch.launch(decode.pair_dots, (3, 0), config, **arguments)  # an empty grid
        assert launch.recording()
    assert not launch.recording()
    (one,) = launches
    blocks = {"ROWS": 4, "WIDTH": 8, "STAGES": 1}
    assert one == launch.Launch(
        decode.pair_dots, (3, 1), {**blocks, **arguments}, num_warps=2, num_stages=3
    )
    assert set(one.arguments) == set(decode.pair_dots.arg_names)
    assert (out == 7).all()
    launch.launch(decode.pair_dots, (3, 0), config, **arguments)
    assert (out == 7).all()
    launch.launch(decode.pair_dots, (3, 1), config, **arguments)
    assert (out == 5).all()


def test_registers_are_an_option_and_no_argument(device):
    x, index = torch.ones(1, 2, device=device), torch.zeros(1, 1, dtype=torch.int64, device=device)
    config = configs.Config(1, 1, {"ROWS": 1, "WIDTH": 2, "STAGES": 1, "MAX_REGISTERS": 64})
    arguments = {"y": x, "columns": index, "table": x, "out": x, "r": 1, "d": 2}
    with launch.record("sm_90") as launches:
        launch.launch(decode.pair_dots, (1, 1), config, **arguments)
        config.blocks["MAX_REGISTERS"] = 0
        launch.launch(decode.pair_dots, (1, 1), config, **arguments)
    assert [one.maxnreg for one in launches] == [64, None]
    assert all(set(one.arguments) == set(decode.pair_dots.arg_names) for one in launches)


def test_recording_is_nested_and_ends_by_an_error(device):
    with pytest.raises(KeyError, match="stop"):
        with launch.record("sm_80"):
            assert launch.generation(device) == "sm_80"
            with launch.record("gfx942") as inner:
                assert launch.generation(device) == "gfx942"
            assert inner == []
            assert launch.generation(device) == "sm_80"
            raise KeyError("stop")
    assert not launch.recording()
    assert launch.generation(device) == configs.generation_of(device)
    assert configs.generation_of(torch.device("cpu")) == "interpreter"


def test_production_shapes_are_recorded_without_memory():
    """On meta tensors: 2^20 latents, forward and backward, with the blocks of the card named."""
    d, heads, m, n, k = 4096, 16384, 8, 8, 64

    def meta(*shape):
        return torch.empty(shape, device="meta", dtype=torch.bfloat16, requires_grad=True)

    x, w_enc, b_enc, w_dec = meta(8192, d), meta(heads, 16, d), meta(heads, 16), meta(2**20, d)
    with launch.record("sm_90") as launches:
        base, extension, indices = torch.ops.kronsae.encode(
            x, w_enc, b_enc, m, "mand", "triton", k, None, None
        )
    assert launches == []  # the fake rule answers for a meta tensor
    assert base.shape == extension.shape == indices.shape == (8192, k)
    with launch.record("sm_90") as launches, torch.no_grad():
        indices, base, extension = operations.encode(x, w_enc, b_enc, None, m, k, "mand")
        operations.encode_backward(base, extension, indices, x, w_enc, m, True, True)
        out = operations.decode(base, indices, w_dec, None)
        operations.decode_backward(out, base, indices, w_dec, None, True, True)
        operations.encode(x, w_dec, None, None, None, k, "")
        operations.encode_backward(base, extension, indices, x, w_dec, None, True, True)
    assert (indices.shape, out.shape, n) == ((8192, k), (8192, d), 8)
    names = [one.kernel.fn.__name__ for one in launches]
    assert set(names) == {
        "select_heads", "merge_lists", "select_rows", "select_latents", "combine",
        "pair_dots", "group_entries", "sum_row_segments", "row_gradients", "sum_head_segments",
        "head_gradients",
    }  # fmt: skip
    for one in launches:
        tensors = [a for a in one.arguments.values() if isinstance(a, torch.Tensor)]
        assert tensors and all(tensor.is_meta for tensor in tensors)
        assert set(one.arguments) == set(one.kernel.arg_names)
    of_combine = configs.config_of("combine", "sm_90").blocks
    combine = launches[names.index("combine")]
    assert combine.arguments["WIDTH"] == of_combine["WIDTH"]
    assert combine.grid == (8192, d // of_combine["WIDTH"])


def test_operations_of_float64_are_not_launched(device):
    x, w = torch.ones(2, 3, device=device).double(), torch.ones(4, 3, device=device).double()
    with launch.record("sm_90") as launches:
        codes = dense_encode(x, w, k=2)
        sparse_decode(codes, w_dec=w)
        fused_encode(x, w.view(2, 2, 3), m=1, k=1)
    assert launches == []


# Rounding


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_is_to_the_nearest_even(dtype, device):
    """Also in the interpreter, which would truncate: as torch rounds, ties and NaN included."""
    normal = torch.randn(100)
    halves = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 65519.0, 3.3e38])
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])
    numbers = torch.cat([normal, normal * 1e-6, halves, -halves, special]).to(device)
    table = numbers[:, None]
    index = torch.arange(len(numbers), device=device)[:, None]
    got = operations.combine(torch.ones_like(table), index, table, None, dtype)
    torch.testing.assert_close(got, table.to(dtype), rtol=0, atol=0, equal_nan=True)
