import os
import signal
import threading
from collections import defaultdict
from importlib.metadata import version
from itertools import count

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

# Of these tests one case in so many is run by default, and the others with the slow ones: their
# cases are of a kind.
THINNED = {
    "test_observed_is_what_a_run_by_hand_sees": 3,
    "test_an_identity_rewrite_is_the_original_in_value_and_gradient": 2,
    "test_the_zoo": 2,
    "test_gram_and_matrices_give_the_energy_of_every_output": 2,
    "test_a_whole_model_is_within_two_percent_of_its_entropy": 4,
    "test_integers_give_what_the_simulation_gives": 2,
    "test_every_layer_of_a_model_is_solved_or_listed": 3,
    "test_at_equal_bytes_the_mixed_assignment_beats_the_uniform_one": 3,
    "test_mse_finds_the_least_error_there_is": 3,
    "test_layers_in_a_scan_have_a_range_each": 3,
    "test_jit_vmap_and_remat_agree_with_plain_calls": 3,
    "test_what_is_seen_is_what_the_codes_stand_for_bit_for_bit": 2,
    "test_the_error_on_a_normal_matrix_is_below_the_peer_s": 2,
    "test_degenerate_leaves": 2,
    "test_what_is_packed_is_what_was_trained_compiled_or_not": 2,
    "test_sharded_on_any_axis_is_as_unsharded_bit_for_bit": 2,
    "test_sharded_on_any_axis_is_as_unsharded": 2,
    "test_values_and_gradients_are_those_of_the_naive_form": 2,
    "test_the_key_decides_and_nothing_else": 2,
    "test_ranges_of_sharded_batches": 2,
    "test_quantization_aware_steps": 3,
}


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
    cases = defaultdict(count)
    for item in items:
        name = getattr(item, "originalname", "")
        if name in THINNED and next(cases[item.path, name]) % THINNED[name]:
            item.add_marker(pytest.mark.slow)
        if jax.device_count() < 8 and "shard" in item.nodeid:
            item.add_marker(
                pytest.mark.skip(reason=f"needs 8 devices, there are {jax.device_count()}")
            )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Strict())
