"""Models of the zoo shrink twice, to a target; their channels still belong together."""

import jax
import jax.numpy as jnp
import pytest

from compress_jax.core.paths import flatten
from compress_jax.prune import shrink
from compress_jax.trace import groups, verify_groups
from tests.trace.zoo import ZOO

ENTRIES = {entry.name: entry for entry in ZOO}
SLOW = [
    "moe/nnx",
    "resnet_train/linen",
    "mobilenet/linen",
    "tied_lm/linen",
    "unet/nnx",
    "recurrent/nnx",
]


@pytest.mark.parametrize(
    "name", ["mlp/nnx", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_twice_and_checked_by_permutation(name):
    fn, variables, inputs = ENTRIES[name].make()
    names = [group.name for group in groups(fn, variables, *inputs)]
    once = shrink(fn, variables, *inputs, macs=0.7)
    assert once.table.after.macs <= 0.7 * once.table.before.macs
    twice = shrink(once.fn, once.params, *inputs, ratio=0.3, scope="global", max_ratio=0.5)
    assert (
        twice.table.after.macs < once.table.after.macs
        and list(once.kept) == list(twice.kept) == names
    )
    report = verify_groups(twice.fn, twice.params, *inputs)
    assert report.ok and len(report.checks) >= 0.5 * len(names), str(report)
    out = twice.fn(twice.params, *inputs)
    expected = jax.eval_shape(fn, variables, *inputs)
    shrunk = {path: x.shape for path, x in flatten(twice.params)[0].items()}
    if isinstance(out, tuple):  # batch statistics come back as short as they went in
        assert {
            path.split("/", 1)[1]: x.shape
            for path, x in flatten(out)[0].items()
            if "batch_stats" in path
        }.items() <= shrunk.items()
        out, expected = out[0], expected[0]
    assert out.shape == expected.shape and jnp.isfinite(out).all()
