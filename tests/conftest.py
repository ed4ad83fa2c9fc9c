import ctypes
import gc
import os
import shutil
import signal
import sys
import tempfile
import threading
import zlib
from collections import defaultdict
from importlib.metadata import version
from typing import Any

# Most of the time of small tests goes to compiling: LLVM's optimizations and fused emitters would
# triple it. Set XLA_FLAGS to the first of these alone to test what users run; .ci/run does so for
# the contract's second law.
FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
if tuple(int(n) for n in version("jaxlib").split(".")[:2]) < (0, 11):
    # Newer ones end the process at a flag they do not know.
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
    FLAGS.append("--xla_cpu_parallel_codegen_split_count=1")  # small programs gain nothing by parts
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if (
    os.environ["JAX_PLATFORMS"] != "cpu"
):  # where products of float32 are of fewer bits unless one asks
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")

if threading.current_thread() is threading.main_thread():
    # pytest-xdist's processes ignore Ctrl-C, and what they start would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

MOST = 3_000_000_000  # bytes a process may hold before it forgets what it compiled

# Tracing makes very many objects and few cycles: looking for these less often saves a twentieth.
gc.set_threshold(5_000, 10, 10)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--part",
        default="0/1",
        help="K/N: only the K-th of N parts of the slow tests, counted from 0",
    )


class Strict:
    """Tests promote neither dtypes nor ranks; doctests are what users write, so they may.

    A plugin and no fixture, as those of tests/ are not seen by the doctests of compress_jax/.
    """

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        users = isinstance(item, pytest.DoctestItem)
        jax.config.update("jax_numpy_dtype_promotion", "standard" if users else "strict")
        jax.config.update("jax_numpy_rank_promotion", "allow" if users else "raise")


class OwnNumbers:
    """Every test draws from its module's generators what it would alone, whatever ran before it."""

    def __init__(self) -> None:
        self.states: dict[str, dict[str, Any]] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        module = getattr(item, "module", None)
        made = (
            {
                name: each
                for name, each in vars(module).items()
                if isinstance(each, np.random.Generator)
            }
            if module is not None
            else {}
        )
        if not made:
            return
        start = self.states.setdefault(
            module.__name__, {name: each.bit_generator.state for name, each in made.items()}
        )
        for name, each in made.items():
            each.bit_generator.state = start[name]


@pytest.hookimpl(tryfirst=True)  # before those that are marked are deselected
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    cases = defaultdict(list)
    for item in items:
        if " at 0x" in item.nodeid:
            raise pytest.UsageError(f"{item.nodeid}: an address differs between processes")
        if marker := item.get_closest_marker("wide"):
            cases[item.path, item.originalname, marker.args[0]].append(item)
        if jax.device_count() < 8 and "shard" in item.nodeid:
            item.add_marker(
                pytest.mark.skip(reason=f"needs 8 devices, there are {jax.device_count()}")
            )

    wide: set[str] = set()
    for (_, _, keep), own in cases.items():
        kept = {round(i * len(own) / keep) for i in range(keep)}
        for i, item in enumerate(own):
            if i not in kept:
                item.add_marker(pytest.mark.slow)
                wide.add(item.nodeid)
    leave_to_other_parts(config, items, wide)


def leave_to_other_parts(config: pytest.Config, items: list[pytest.Item], wide: set[str]) -> None:
    """Deselect the slow tests that are of other parts than that of ``--part``."""
    part, parts = map(int, config.getoption("--part").split("/"))
    chosen: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        # Cases of one test stay together, as they share what is expensive; those of tables do not.
        name = item.nodeid if item.nodeid in wide else item.nodeid.split("[")[0]
        own = not item.get_closest_marker("slow") or zlib.crc32(name.encode()) % parts == part
        (chosen if own else others).append(item)
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = chosen


def pytest_collection_finish() -> None:
    gc.freeze()  # what is there before the tests is there to the end


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Strict())
    config.pluginmanager.register(OwnNumbers())
    if sys.dont_write_bytecode:
        # Where no bytecode may lie beside the sources, every process that a test starts would
        # compile all it imports, two of its three seconds. Those of a run share a folder.
        folder = tempfile.mkdtemp(prefix="bytecode-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        os.environ.setdefault("PYTHONPYCACHEPREFIX", folder)
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and getattr(config, "cache", None):
        # What a test has compiled, other tests, the processes that they start and the next run do
        # not compile again.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(config.cache.mkdir("compiled"))
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    # JAX was imported before, and read its environment then.
    jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    # Thousands of tests leave thousands of programs in memory, gigabytes of them.
    if nextitem is not None and nextitem.path != item.path and resident() > MOST:
        jax.clear_caches()
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory goes back, and is not counted


def resident() -> int:
    """Return the bytes of memory that this process holds; 0 where the system has no such file."""
    if sys.platform != "linux":
        return 0
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
