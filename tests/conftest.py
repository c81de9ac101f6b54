"""What all tests share: no network, two threads at most, one seed, poisoned memory.

Without a GPU, Triton's interpreter runs the kernels, on CPU tensors. Where several processes test
(pytest -n 2), each has one thread, and so have the processes that it starts.
"""

import dataclasses
import gc
import math
import os
import signal
import sys
import zlib
from collections import defaultdict

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # torch reads it when it is imported

import hypothesis
import pytest
import torch

# The hub's libraries read these when they are imported, which the tests do later.
for _name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ[_name] = "1"
if not torch.cuda.is_available():
    # Triton reads it when it and the kernels are imported: later too.
    os.environ["TRITON_INTERPRET"] = "1"

# Ignored signals, as under nohup and in the background of a script, stay ignored in processes.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

pytest.register_assert_rewrite("truth")


def interpret_faster() -> None:
    """Spare Triton's interpreter two thirds of its time, which none of its results need.

    It wraps all of its language anew for each call of a device function: here what a launch, or an
    earlier call, has wrapped stays as it is. It asks of each sum of integers whether it overflows,
    and asserts the answer only when it debugs. And it makes a table of all dtypes to look one up.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    look_up, found = interpreter._get_np_dtype, {}

    def numpy_dtype(dtype):
        name = dtype.scalar.name
        if name not in found:
            found[name] = look_up(dtype)
        return found[name]

    interpreter._get_np_dtype = numpy_dtype
    wrap, launched, lasting = interpreter._patch_lang, [], set()

    class Nothing:
        def restore(self) -> None:
            pass

    def modules(function) -> tuple[int, ...]:
        languages = (interpreter.tl, interpreter.tl.core)
        return tuple(any(v is one for v in function.__globals__.values()) for one in languages)

    def wrap_once(function):
        if not launched:
            launched.append(modules(function))
            scope = wrap(function)
            restore = scope.restore

            def end() -> None:
                launched.clear()
                restore()

            scope.restore = end
            return scope
        found = modules(function)
        if found != launched[0] and found not in lasting:
            lasting.add(found)  # nobody restores what a device function's call has wrapped
            wrap(function)
        return Nothing()

    interpreter._patch_lang = wrap_once


if "TRITON_INTERPRET" in os.environ:
    interpret_faster()

torch.set_num_threads(min(2, torch.get_num_threads()))

hypothesis.settings.register_profile(
    "kronsae",
    deadline=None,
    derandomize=True,  # the same cases in every run
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("kronsae")


LONGEST = (
    *("test_triton_learner", "test_triton_step", "test_grid", "test_triton_selection"),
    *("test_transcoder", "test_kernels_values", "test_triton_backward", "test_train"),
    *("test_predict", "test_aot", "test_members", "test_parallel"),
    *("test_suite", "test_sweep_train", "test_hookpoints", "test_architectures", "test_tutorials"),
)
"""Files that take longest: they come first, so that no process has one left when all others end."""


def pytest_configure(config):
    """Let xdist keep this order: it puts files of few tests last, and ours are few and long."""
    config.option.loadscopereorder = False


def mark_most_cases_slow(items):
    """Mark all but one in n cases of a test with the mark `one_in(n)` as slow: the same each time.

    A case that is asked for by its name alone is run.
    """
    cases = defaultdict(list)
    for item in items:
        if item.get_closest_marker("one_in") and not item.get_closest_marker("slow"):
            is_long = bool(item.get_closest_marker("long"))
            cases[item.path, item.originalname, is_long].append(item)
    for many in cases.values():
        many.sort(key=lambda item: zlib.crc32(item.name.encode()))
        kept = math.ceil(len(many) / many[0].get_closest_marker("one_in").args[0])
        for item in many[kept:]:
            item.add_marker("slow")


def pytest_collection_modifyitems(config, items):
    """Leave out `slow` and `long` tests unless -m names them; skip `gpu` tests without a GPU."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)  # stable
    mark_most_cases_slow(items)
    if not torch.cuda.is_available():
        reason = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(reason)
    asked = config.option.markexpr or ""
    left_out = () if "slow" in asked else ("slow",) if "long" in asked else ("slow", "long")
    out = [item for item in items if any(map(item.get_closest_marker, left_out))]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if not any(map(item.get_closest_marker, left_out))]


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop():
    """Let the garbage collector pass over what was imported: it takes a twentieth of the time."""
    gc.freeze()
    try:
        return (yield)
    finally:
        gc.unfreeze()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_plugins():
    """A plugin that a test loads is forgotten after it: commands would go on naming its file."""
    yield
    if registry := sys.modules.get("kronsae.registry"):
        registry._loaded_files.clear()


@pytest.fixture
def device() -> torch.device:
    """Where Triton kernels run: a GPU, or a CPU in the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def poisoned_memory():
    """torch.empty gives NaN (integers: their maximum), so that an unwritten element is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    before_fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = before_fill
