import os
import signal
import threading
from collections import defaultdict
from importlib.metadata import version

# Most of the time of small tests goes to compiling: LLVM's optimizations and fused emitters would
# triple it. Set XLA_FLAGS to the first of these alone to test what users run; .ci/run does so for
# the contract's second law.
FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
if tuple(int(n) for n in version("jaxlib").split(".")[:2]) < (0, 11):
    FLAGS.append(
        "--xla_cpu_use_fusion_emitters=false"
    )  # newer ones end the process at a flag they do not know
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
import pytest  # noqa: E402


class Strict:
    """Tests promote neither dtypes nor ranks; doctests are what users write, so they may.

    A plugin and no fixture, as those of tests/ are not seen by the doctests of compress_jax/.
    """

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        users = isinstance(item, pytest.DoctestItem)
        jax.config.update("jax_numpy_dtype_promotion", "standard" if users else "strict")
        jax.config.update("jax_numpy_rank_promotion", "allow" if users else "raise")


@pytest.hookimpl(tryfirst=True)  # before those that are marked are deselected
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    cases = defaultdict(list)
    for item in items:
        if marker := item.get_closest_marker("wide"):
            cases[item.path, item.originalname, marker.args[0]].append(item)
        if jax.device_count() < 8 and "shard" in item.nodeid:
            item.add_marker(
                pytest.mark.skip(reason=f"needs 8 devices, there are {jax.device_count()}")
            )

    for (_, _, keep), own in cases.items():
        kept = {round(i * len(own) / keep) for i in range(keep)}
        for i, item in enumerate(own):
            if i not in kept:
                item.add_marker(pytest.mark.slow)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Strict())
