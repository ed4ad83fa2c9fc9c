"""The permutation check, on every model of the zoo and on groups that are wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress_jax.core.errors import ShapeError
from compress_jax.core.paths import flatten
from compress_jax.trace._groups.groups import Group, Groups, groups, verify_groups
from tests.trace.zoo import ZOO
from tests.trace.zoo_entry import inputs, normal, randomise

(VECTOR,) = inputs(normal(4, 5))


def shapes(**sizes):
    return randomise({name: np.empty(size) for name, size in sizes.items()})


@pytest.mark.wide(2)
@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_the_zoo(entry):
    """No group's permutation changes the model, leaving out a member does, no axis is missing."""
    fn, variables, inputs = entry.make()
    found = groups(fn, variables, *inputs)
    assert not found.unknown
    every = {
        (path, i)
        for path, leaf in flatten(variables)[0].items()
        for i, size in enumerate(leaf.shape)
        if size > 1
    }
    assert {member for group in found for member in group.members} | found.frozen.keys() == every
    if entry.name == "plain/dropout":
        return  # its noise is not permuted
    report = verify_groups(fn, variables, *inputs, groups=found)
    assert report.ok, report
    for name, missed in report.undetected.items():
        alone = len(found[name].members) == 1
        assert all(alone or path.endswith("key/bias") for path, _ in missed), (
            report
        )  # softmax cancels the keys' bias


def test_the_check_catches_a_wrong_group_and_a_wrong_member():
    fn = lambda p, x: jnp.tanh(x @ p["w"] + p["b"][None]) @ p["v"]  # noqa: E731
    params, places = shapes(w=(5, 6), b=(6,), v=(6, 3)), np.arange(6)
    right, wrong = (("b", 0), ("v", 0), ("w", 1)), (("b", 0), ("w", 1))
    assert groups(fn, params, VECTOR)[0].members == right
    bad = Groups((Group("w:1", 6, wrong, dict.fromkeys(wrong, places)),), {}, {})
    report = verify_groups(fn, params, VECTOR, groups=bad)
    assert not report.ok and report.checks[0].error > 1e-2 and "FAILS" in str(report)
    report = verify_groups(fn, params | {"b": jnp.ones(6)}, VECTOR)
    assert (
        report.ok and report.undetected == {"w:1": (("b", 0),)} and "undetected: b:0" in str(report)
    )


def test_the_check_fails_on_nan_and_needs_arrays():
    fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]  # noqa: E731
    params = shapes(w=(5, 6), v=(6, 3))
    assert not verify_groups(fn, params | {"v": params["v"].at[0, 0].set(jnp.nan)}, VECTOR).ok
    with pytest.raises(ShapeError, match="only a shape"):
        verify_groups(fn, jax.eval_shape(lambda: params), VECTOR)


def test_returned_parameters_go_with_their_own():
    """Gradients too: they have the parameters' paths and shapes."""
    params = shapes(w=(5, 6), v=(6, 3))
    step = jax.grad(lambda p, x: jnp.square(jnp.tanh(x @ p["w"]) @ p["v"]).sum())
    found = groups(step, params, VECTOR)
    assert [group.name for group in found if ("w", 1) in group.members] == ["w:1"]
    assert verify_groups(step, params, VECTOR, groups=found).ok
