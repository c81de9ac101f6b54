"""Alternatives to the kernels' configurations, measured: `python -m benchmarks.tune --seconds 200`.

configs.json holds one configuration of each kernel for a card generation; nothing is searched for
in training. This measures a short list of others on the card at hand (warps, stages, block sizes;
the fused encoder product), each checked against what the present one computes, all in turns, the
cache flushed, as CUDA graphs, so that launches cost nothing. A better one is better by more than
the spread at a shape, and worse at none.

--write puts those into configs.json, under the card's generation; `--read FILE --write` does that
on another machine, from what --json wrote here.
"""

import argparse
import functools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.flags import command, save
from benchmarks.floors import graphed
from benchmarks.measure import (
    Timing,
    WrongResult,
    caller,
    describe,
    interleaved,
    reason,
    require_close,
)
from benchmarks.shapes import GOAL_SHAPES, SHAPES, Shape, activations
from benchmarks.steps import EPS, kron_parameters
from kronsae.system.tables import markdown
from kronsae_kernels import backends, torch_impl
from kronsae_kernels.triton_impl import configs, operations
from kronsae_kernels.triton_impl.launch import record

DTYPE = torch.bfloat16
TOLERANCE = 5e-3
"""Sums in another order, rounded to bfloat16: a few numbers differ by 2^-8 of themselves."""
Changes = dict[str, int]
Results = tuple[Tensor, ...]


class Data:
    """Inputs of the kernels in a training step of a shape, in bfloat16."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        w_enc, b_enc, w_dec, b_dec = (p.detach() for p in kron_parameters(shape, device))
        self.shape = shape
        self.x = activations(shape, device).to(DTYPE)
        self.w_enc, self.b_enc = w_enc.to(DTYPE).transpose(0, 1), b_enc.to(DTYPE)
        self.table, self.b_dec = w_dec.to(DTYPE), b_dec
        self.selection = operations.Selection(shape.heads, shape.m, shape.n, shape.k, False)
        weight, bias = torch_impl.i_major(self.w_enc), self.b_enc.t().reshape(-1)
        self.pre = next(torch_impl.projections(self.x, weight, bias, scratch=0))
        """Pre-latents of the first chunk of tokens."""
        self.indices, self.base, self.extension = operations.encode(
            self.x, self.w_enc, self.b_enc, None, shape.m, shape.k, "mand"
        )
        self.decoded = decode_and_loss(self)
        self.entries = group(self)
        self.encoder, self.encoder_bias, self.decoder, self.decoder_bias = (
            (w, torch.zeros_like(w), torch.zeros_like(w)) for w in (w_enc, b_enc, w_dec, b_dec)
        )
        """Each with AdamW's moments."""
        # Rows as in `triton_impl.device`; a step of length 0, so that weights stay as they are.
        self.hyper = torch.tensor(2 * [[1.0, 0.1, 0.999, 1e-3, 0.0, 1.0, 1e-8, 1.0, 1.0, 1.0]])
        self.hyper = self.hyper.to(device)

    def reset(self) -> None:
        """Moments as at first: updates change them."""
        for _, *moments in (self.encoder, self.encoder_bias, self.decoder, self.decoder_bias):
            for moment in moments:
                moment.zero_()


# The calls, each of which launches some of the kernels; what they return is compared.


def encode(data: Data) -> Results:
    shape = data.shape
    _, base, extension = operations.encode(
        data.x, data.w_enc, data.b_enc, None, shape.m, shape.k, "mand"
    )
    return (base * extension,)


def encode_in_one_pass(data: Data) -> Results:
    with configs.override("encode", ONE_PASS=1):
        return encode(data)


def select(data: Data) -> Results:
    return operations.select_kron(data.pre, None, data.selection)


def decode_and_loss(data: Data) -> operations.DecodeAndLoss:
    return operations.decode_and_loss(
        data.x, data.indices, data.base, data.extension, data.table, data.b_dec, "mand", EPS,
        1.0, one_gather=True,
    )  # fmt: skip


def group(data: Data) -> operations.Entries:
    decoded = data.decoded
    coefficients = (decoded.values, decoded.along, decoded.d_base, decoded.d_extension)
    return operations.Entries.of(data.indices, data.shape.dict_size, coefficients)


def grouped(data: Data) -> Results:
    entries = group(data)
    return entries.tokens, entries.offsets, *entries.coefficients


def update_decoder(data: Data) -> Results:
    decoded, entries = data.decoded, data.entries
    squares = operations.update_rows(
        entries, *entries.coefficients[:2], decoded.residual, data.hyper, "update", True,
        data.decoder, data.table,
    )  # fmt: skip
    return squares, data.decoder[1]


def update_encoder(data: Data) -> Results:
    entries, low = data.entries, data.w_enc.transpose(0, 1)
    squares = operations.update_heads(
        entries, *entries.coefficients[2:], data.x, data.shape.m, data.hyper, "update",
        data.encoder, low, data.encoder_bias,
    )  # fmt: skip
    return squares, data.encoder[1], data.encoder_bias[1]


def update_both(data: Data) -> Results:
    return update_decoder(data) + update_encoder(data)


def update_bias(data: Data) -> Results:
    gradient = data.decoded.residual.sum(0, dtype=torch.float32)
    operations.update_vector(gradient, data.decoder_bias, data.hyper[1])
    return (data.decoder_bias[1],)


def changes(text: str) -> list[Changes]:
    """Alternatives, as "WIDTH=256, num_warps=2 WIDTH=64"."""
    pairs = ([pair.split("=") for pair in one.split()] for one in text.split(","))
    return [{name: int(number) for name, number in one} for one in pairs]


KERNELS: dict[str, tuple[Callable[[Data], Results], list[Changes]]] = {
    "update_rows": (update_decoder, changes("ENTRIES=1, ENTRIES=4, PER_WARP=320, PER_WARP=1280")),
    "head_gradients": (
        update_encoder,
        changes(
            "ENTRIES=2, ENTRIES=4, PIECES=1, PIECES=1 ENTRIES=4, PIECES=1 WIDTH=256 num_warps=2"
        ),
    ),
    "decode_and_loss": (
        decode_and_loss,
        changes("BLOCKS=16, BLOCKS=16 TILE=128, STAGES=1, STAGES=3"),
    ),
    "select_heads": (
        select,
        changes(
            "MAX_REGISTERS=0, num_warps=16 LANES=4096, "
            "num_warps=4 LANES=1024 MAX_REGISTERS=255, PER_PROGRAM=4096"
        ),
    ),
    "encode": (encode, changes("ONE_PASS=1, ONE_PASS=0")),
    "encode_heads": (
        encode_in_one_pass,
        changes(
            "num_stages=3, FLATTEN=1 num_stages=3, TMA=0, COLUMNS=128, COLUMNS=128 num_warps=4, "
            "WIDTH=32 num_stages=5, WIDTH=128 num_stages=2, SPLITS=2, SPLITS=8, ROOM=2, ROOM=8"
        ),
    ),
    "gather_heads": (encode_in_one_pass, changes("num_warps=2, num_warps=8")),
    "name_latents": (encode_in_one_pass, changes("WIDTH=512, num_warps=8")),
    "merge_lists": (select, changes("num_warps=4, num_warps=8")),
    "list_keys": (select, changes("TILE=512, TILE=2048")),
    "select_rows": (select, changes("num_warps=4, num_warps=2, num_warps=1")),
    "select_latents": (select, changes("ONE_WARP=512, ONE_WARP=2048, DIRECT=256")),
    "rank_latents": (select, changes("num_warps=2, num_warps=1")),
    "group_entries": (grouped, changes("WIDTH=256, WIDTH=1024")),
    "sum_row_segments": (update_decoder, changes("ENTRIES=16, WIDTH=1024, WIDTH=256")),
    "sum_head_segments": (update_encoder, changes("PIECES=1, ENTRIES=8, ENTRIES=2")),
    "update_vector": (update_bias, changes("WIDTH=256, WIDTH=1024")),
    "segments": (
        update_both,
        changes("ROW_LENGTH=64, ROW_LENGTH=256, HEAD_LENGTH=256, HEAD_LENGTH=1024"),
    ),
}
"""A call that launches the kernel, and the alternatives; what the table has already is left out.

Where most can be won comes first, should time run out.
"""
NOT_TUNED = (
    *("combine", "pair_dots", "code_gradients", "row_gradients", "sum_entries", "code_values"),
    *("group_codes", "nested_sums", "nested_errors", "suffix_sums", "nested_dots"),
    "hierarchical_errors",
    *("keep_first", "prepare_update", "note_active", "finish_update", "product_limits"),
    *("count_above", "write_above", "rank_above", "jump", "jump_gradients"),
)
"""Kernels that a fused step does not launch, or whose time is that of a launch."""
CHOICES = ("encode", "segments")
"""Entries of the table that are no kernels."""
PRESENT = "as it is"


# Measuring


def numbers(kernel: str, device: torch.device) -> Changes:
    """A kernel's warps, stages and block sizes as they are."""
    config = configs.config_of(kernel, configs.generation_of(device))
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, **config.blocks}


def label_of(changes: Changes) -> str:
    return ", ".join(f"{name} {value}" for name, value in changes.items()) or PRESENT


def launches_of(call: Callable[[], Results], device: torch.device) -> list[tuple[Any, ...]]:
    """A call's launches: name, grid, warps, stages and all arguments that are no tensors."""
    with record(configs.generation_of(device)) as launches:
        call()
    return [
        (
            launch.kernel.fn.__name__,
            launch.grid,
            launch.num_warps,
            launch.num_stages,
            {k: v for k, v in launch.arguments.items() if not isinstance(v, Tensor)},
        )
        for launch in launches
    ]


def require_same(results: Results, expected: Results) -> None:
    """Integers are equal, numbers close; else WrongResult."""
    for number, (got, wanted) in enumerate(zip(results, expected, strict=True)):
        if got.is_floating_point():
            require_close(f"result {number}", got.float(), wanted.float(), TOLERANCE)
        elif not torch.equal(got, wanted):
            different = int((got != wanted).sum())
            raise WrongResult(f"result {number}: {different} of {got.numel()} differ")


def configured(kernel: str, changes: Changes, data: Data) -> Callable[[], Results]:
    """The kernel's call, with some numbers of its configuration changed."""

    def run() -> Results:
        with configs.override(kernel, **changes):
            return KERNELS[kernel][0](data)

    return run


def measure(
    kernel: str, data: Data, device: torch.device, rounds: int, end: float
) -> dict[str, Any]:
    """Times of a kernel's call, as it is and with each alternative, or why there is none."""
    present = numbers(kernel, device)
    others = [c for c in KERNELS[kernel][1] if any(present[name] != c[name] for name in c)]
    result = {"kernel": kernel, "shape": data.shape.name, "present": present, "times_ms": {}}
    usual = launches_of(configured(kernel, {}, data), device)
    if kernel not in CHOICES and kernel not in {name for name, *_ in usual}:
        return {**result, "skipped": {PRESENT: "not launched at this shape"}}
    calls: dict[str, Callable[[], Any]] = {}
    skipped: dict[str, str] = {}
    expected: Results | None = None
    for changes in ({}, *others):
        label, call = label_of(changes), configured(kernel, changes, data)
        if changes and time.monotonic() > end:
            skipped[label] = "no time left"
            continue
        if changes and launches_of(call, device) == usual:
            skipped[label] = "launches the same"
            continue
        data.reset()
        try:
            results = tuple(tensor.clone() for tensor in call())
            expected = expected or results
            require_same(results, expected)
            calls[label] = graphed(call) if device.type == "cuda" else call
        except WrongResult as wrong:
            skipped[label] = str(wrong)
        except Exception as broken:  # too many registers, too much shared memory
            if not changes:
                raise
            skipped[label] = reason(broken)
    timings = interleaved(calls, rounds, 2, device)
    return {
        **result,
        "changes": {label_of(changes): changes for changes in others},
        "times_ms": {label: timing.times_ms for label, timing in timings.items()},
        "skipped": skipped,
    }


@functools.lru_cache(maxsize=2)
def data_of(shape: Shape, device: torch.device) -> Data:
    return Data(shape, device)


def measure_at(shape: Shape, kernel: str, device: torch.device, *limits: Any) -> dict[str, Any]:
    """`measure` at a shape, whose `Data` are kept for the next kernel."""
    return measure(kernel, data_of(shape, device), device, *limits)


def gain(one: dict[str, Any], label: str) -> tuple[float, int]:
    """Time of an alternative over the present one's; 1 if it is better by more than the spread.

    -1 if it is worse by more than the spread: quartiles do not overlap.
    """
    present, other = (Timing(one["times_ms"][name]) for name in (PRESENT, label))
    (low, high), (other_low, other_high) = present.quartiles_ms, other.quartiles_ms
    verdict = 1 if other_high < low else -1 if other_low > high else 0
    return other.median_ms / present.median_ms, verdict


def chosen(results: list[dict[str, Any]]) -> dict[str, Changes]:
    """For each kernel the best alternative that is better somewhere and worse nowhere, if any."""
    best: dict[str, Changes] = {}
    for kernel in dict.fromkeys(one["kernel"] for one in results):
        mine = [one for one in results if one["kernel"] == kernel and one["times_ms"]]
        ratios = {}
        for label in mine[0]["times_ms"] if mine else ():
            if label == PRESENT or any(label not in one["times_ms"] for one in mine):
                continue
            gains = [gain(one, label) for one in mine]
            if min(verdict for _, verdict in gains) >= 0 and max(v for _, v in gains) == 1:
                ratios[label] = math.prod(ratio for ratio, _ in gains)
        if ratios:
            best[kernel] = mine[0]["changes"][min(ratios, key=ratios.get)]
    return best


def table(one: dict[str, Any]) -> str:
    """Markdown of one kernel at one shape."""
    rows = [(label, "", why, "", "") for label, why in one["skipped"].items()]
    for label, times in one["times_ms"].items():
        timing = Timing(times)
        low, high = timing.quartiles_ms
        ratio, verdict = gain(one, label)
        cells = f"{timing.median_ms:.4f}", f"{low:.4f} … {high:.4f}", f"{ratio:.3f}"
        rows.append((label, *cells, ("worse", "", "better")[verdict + 1]))
    title = f"{one['kernel']}, {one['shape']}: {label_of(one['present'])}"
    return title + "\n\n" + markdown(("", "ms", "quartiles", "ratio", ""), rows) + "\n"


# configs.json


def dumps(table: dict[str, dict[str, Changes]]) -> str:
    """The table as text, a line for each kernel."""
    parts = []
    for generation, kernels in table.items():
        rows = [f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in kernels.items()]
        parts.append(f"  {json.dumps(generation)}: {{\n" + ",\n".join(rows) + "\n  }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def write(generation: str, best: dict[str, Changes], path: Path) -> None:
    """Put changes under a card generation; what equals the default is not written."""
    table = json.loads(path.read_text(encoding="utf-8"))
    of_card = table.setdefault(generation, {})
    for kernel, changes in best.items():
        row = {**of_card.get(kernel, {}), **changes}
        default = table["default"][kernel]
        of_card[kernel] = {name: value for name, value in row.items() if default[name] != value}
        if not of_card[kernel]:
            del of_card[kernel]
    path.write_text(dumps({name: rows for name, rows in table.items() if rows}), encoding="utf-8")


def written(text: str) -> dict[str, Any]:
    """Card generation and better configurations, from a file that --json wrote."""
    try:
        figures = json.loads(Path(text).read_text(encoding="utf-8"))
        return {name: figures[name] for name in ("generation", "better")}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise argparse.ArgumentTypeError(f"{text} is not what --json wrote: {error}") from error


def main(arguments: list[str] | None = None) -> None:
    parser = command("tune", __doc__, shape=GOAL_SHAPES, device="auto", rounds=15, seconds=300.0)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument(
        "--read", type=written, metavar="FILE", help="measure nothing: take what --json wrote"
    )
    parser.add_argument("--write", action="store_true", help="put better ones into configs.json")
    options = parser.parse_args(arguments)
    if options.read:
        result = options.read
    else:
        device = options.device
        if why := backends.why_not("triton", device):
            parser.error(f"cannot run on {device}: {why}")
        result = search(options, device)
    for name, changes in result["better"].items():
        print(f"better: {name}: {label_of(changes)}")
    if not result["better"]:
        print("nothing is better than what configs.json has")
    elif options.write:
        write(result["generation"], result["better"], configs.PATH)
        print(f"written to {configs.PATH}; its kernels are listed by: python -m tests.aot --update")


def search(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measure kernel by kernel; after `options.seconds`, nothing new begins."""
    end = time.monotonic() + options.seconds
    generation = configs.generation_of(device)
    kernels: list[dict[str, Any]] = []
    result = {
        "where": describe(device), "generation": generation, "kernels": kernels, "better": {},
    }  # fmt: skip
    call = caller(device)
    for kernel in options.kernels:
        for name in options.shape:
            if time.monotonic() > end:
                break
            settings = SHAPES[name], kernel, device, options.rounds, end
            try:
                row = call(measure_at, *settings)
            except Exception as broken:  # the others still tell something
                row = {"kernel": kernel, "shape": name, "times_ms": {}}
                row |= {"present": numbers(kernel, device), "skipped": {PRESENT: reason(broken)}}
            kernels.append(row)
            print(table(row), flush=True)
        result["better"] = chosen(kernels)
        save(options.json, result)
    return result


if __name__ == "__main__":
    main()
