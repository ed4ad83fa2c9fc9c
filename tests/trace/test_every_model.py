"""The interpreter on every model of the zoo.

Sites are complete, observed operands are those of a run by hand, an identity rewrite is the
original.
"""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress_jax.trace import observe, rewrite, sites, unseen
from compress_jax.trace._jaxpr.find_sites import trace
from tests.trace.zoo import BIG, ZOO

# Large models of which another framework's twin, or a relative, is run by default.
SLOW = (
    "resnet/linen",
    "vit/nnx",
    "llama/linen",
    "moe/nnx",
    "mobilenet/linen",
    "unet/nnx",
    "tied_lm/linen",
    "recurrent/nnx",
)
SLOW += ("resnet_train/linen", "resnet_train/nnx")


def over(entries):
    marked = [
        pytest.param(each, id=each.name, marks=[pytest.mark.slow] * (each.name in SLOW))
        for each in entries
    ]
    return pytest.mark.parametrize("entry", marked)


every_model = over(ZOO)
on_one_device = over(
    [e for e in ZOO if e.name != "plain/sharded"]
)  # its pieces are held against rows in test_rewrite


def same(site, lhs, rhs):
    return lhs, rhs


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.wide(7)
@every_model
def test_every_contracted_parameter_is_found(entry):
    fn, variables, inputs = entry.make()
    found, counts = sites(fn, variables, *inputs), Counter()
    for site in found:
        for path in (
            site.param,
            *(path for group in entry.joined if site.param in group for path in site.also),
        ):
            counts[path] += site.count
    assert counts.pop(None, 0) == entry.anonymous
    assert counts == entry.contracted
    assert sum(site.macs for site in found) == entry.macs
    assert len({site.name for site in found}) == len(found)
    left = {
        path
        for path in unseen(fn, variables, *inputs)
        if path not in {site.param for site in found}
    }
    assert left <= set(entry.uncontracted)


@pytest.mark.wide(20)
@on_one_device
def test_stored_axes_are_those_of_the_operand(entry):
    """The stored axes that are summed over have the sizes of the operand's contracting axes."""
    fn, variables, inputs = entry.make()
    traced = trace(fn, variables, *inputs)
    for site in traced.sites.values():
        if site.param is not None and site.param_axes is not None:
            stored = traced.params[site.param].shape
            side = site.operand == "rhs"
            operand = (site.lhs_shape, site.rhs_shape)[side]
            summed = np.prod([operand[axis] for axis in site.contracting[side]])
            assert np.prod([stored[axis] for axis in site.param_axes]) == summed
            assert not set(site.param_axes) & set(site.stack_axes)


def largest(site, lhs, rhs):
    return {"lhs": jnp.abs(lhs).max(), "rhs": jnp.abs(rhs).max()}


def ragged_dot_primitive():
    trace = jax.make_jaxpr(jax.lax.ragged_dot)(
        jnp.ones((2, 2)), jnp.ones((1, 2, 2)), jnp.array([2], jnp.int32)
    )
    return trace.jaxpr.eqns[-1].primitive


def seen_by_hand(fn, variables, inputs, monkeypatch):
    """Run without jit, loops in Python, and note every contraction's concrete operands."""
    seen = []
    for primitive in (
        jax.lax.dot_general_p,
        jax.lax.conv_general_dilated_p,
        ragged_dot_primitive(),
    ):

        def noting(*operands, impl=primitive.impl, **params):
            seen.append(tuple(float(jnp.abs(x).max()) for x in operands[:2]))
            return impl(*operands, **params)

        monkeypatch.setattr(primitive, "impl", noting)
    with jax.disable_jit():
        fn(variables, *inputs)
    return sorted(seen)


@pytest.mark.wide(1)
@on_one_device
@pytest.mark.slow
def test_observed_is_what_a_run_by_hand_sees(entry, monkeypatch):
    fn, variables, inputs = entry.make()
    out, statistics = jax.jit(observe(fn, largest))(variables, *inputs)
    assert_equal(out, jax.jit(fn)(variables, *inputs))
    shapes = {site.name: site.loops for site in sites(fn, variables, *inputs)}
    assert {name: value["lhs"].shape for name, value in statistics.items()} == shapes
    ours = np.concatenate(
        [np.stack([v["lhs"].ravel(), v["rhs"].ravel()], 1) for v in statistics.values()]
    )
    ours = ours[~np.isnan(ours[:, 0])]  # branches that were not taken
    by_hand = seen_by_hand(fn, variables, inputs, monkeypatch)
    if "while" in entry.name:  # only the last turn is kept
        assert all(np.isclose(by_hand, row, rtol=1e-4).all(1).any() for row in ours)
        return
    np.testing.assert_allclose(sorted(map(tuple, ours)), by_hand, rtol=2e-4, atol=1e-6)


def instructions(compiled):
    """Return the kinds and shapes of all instructions of a compiled program."""
    lines = [
        line.split(", metadata=")[0] for line in compiled.as_text().splitlines() if " = " in line
    ]
    return sorted(line.split(" = ")[1].split("(")[0] for line in lines)


@pytest.mark.wide(2)
@every_model
def test_an_identity_rewrite_is_the_original_in_value_and_gradient(entry):
    fn, variables, inputs = entry.make()
    again = rewrite(fn, same)
    ours, original = (jax.jit(each).lower(variables, *inputs).compile() for each in (again, fn))
    assert instructions(ours) == instructions(
        original
    )  # no overhead: the optimised programs are the same
    assert_equal(ours(variables, *inputs), original(variables, *inputs))
    if not entry.reverse:
        return

    def gradient(fn):
        def loss(variables):
            leaves = jax.tree.leaves(fn(variables, *inputs))
            return sum(
                jnp.sum(jnp.sin(x.astype(jnp.float32)))
                for x in leaves
                if jnp.issubdtype(x.dtype, jnp.floating)
            )

        return jax.jit(jax.value_and_grad(loss))(variables)

    assert_equal(gradient(again), gradient(fn))


@pytest.mark.wide(2)
@every_model
def test_a_rule_acts_at_every_site(entry):
    """Zeros for the operands of one site change the output, if its branch is taken."""
    fn, variables, inputs = entry.make()
    out = jax.tree.leaves(jax.jit(fn)(variables, *inputs))
    names = [site.name for site in sites(fn, variables, *inputs) if not site.conditional]
    for name in {names[0], names[-1]} if names else ():
        nothing = rewrite(fn, lambda site, lhs, rhs: (jnp.zeros_like(lhs), rhs), where=name)
        changed = jax.tree.leaves(jax.jit(nothing)(variables, *inputs))
        assert any(
            (np.asarray(a) != np.asarray(b)).any() for a, b in zip(out, changed, strict=True)
        ), name


@pytest.mark.parametrize("entry", BIG, ids=[entry.name for entry in BIG])
def test_big_models(entry):
    fn, variables, inputs = entry.make()
    found = sites(fn, variables, *inputs)
    assert {site.param for site in found} - {None} == set(entry.contracted)
    assert sum(site.macs for site in found) == entry.macs
