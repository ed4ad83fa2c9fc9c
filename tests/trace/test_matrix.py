"""Stored parameters as matrices, and their inputs: both give the energy of a layer's output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_jax.core.paths import flatten
from compress_jax.layerwise._problem import MatrixForm, problems, why_not
from compress_jax.trace import calibrate, gram, observe, sites
from tests.trace.zoo import ZOO

# What NNX multiplies by is what Linen does; the kernel that is multiplied by is not the stored one
# under fake quantization.
MODELS = [
    entry for entry in ZOO if "/nnx" not in entry.name and entry.name != "plain/fake_quantized"
]


@pytest.mark.wide(1)
@pytest.mark.parametrize("entry", MODELS, ids=[entry.name for entry in MODELS])
@pytest.mark.slow
def test_gram_and_matrices_give_the_energy_of_every_output(entry):
    r"""sum |X W|^2 = tr(W^T X^T X W) over a parameter's sites; left: from the contractions."""
    fn, variables, inputs = entry.make()

    def energy(site, lhs, rhs):
        return (
            jnp.sum(site.contract(lhs, rhs).astype(jnp.float32) ** 2)
            if site.kind != "ragged_dot"
            else jnp.nan
        )

    _, energies = jax.jit(observe(fn, energy))(variables, *inputs)
    seen = calibrate(fn, gram(), variables, [inputs])
    leaves = flatten(variables)[0]
    tasks, reasons = problems(seen, leaves)
    energy_of, of_group = {}, {}
    for site in seen.sites.values():
        assert site.param is None or site.param in tasks or site.param in reasons
        if site.param in tasks and not site.conditional:
            group = (
                site.param,
                *site.also,
            )  # joined in one product: their columns make its outputs together
            energy_of[group] = energy_of.get(group, 0) + energies[site.name].sum()
    for group in energy_of:
        of_group[group] = sum(energy_by_problems(leaves[path], tasks[path]) for path in group)
    for group, expected in energy_of.items():
        alone = not any(path in other for path in group for other in energy_of if other != group)
        if np.isfinite(expected) and alone:
            rtol = 2e-2 if entry.name == "plain/cast" else 1e-3
            np.testing.assert_allclose(of_group[group], expected, rtol=rtol, err_msg=str(group))


def energy_by_problems(leaf, tasks):
    total = 0.0
    for task in tasks:
        w = task.form.matrices(task.box.take(leaf.astype(jnp.float32)))
        np.testing.assert_array_equal(
            task.box.put(leaf, task.form.stored(w).astype(leaf.dtype)), leaf
        )
        rows = task.rows[:, None, None].astype(jnp.float32)
        total += jnp.einsum("bkn,bkl,bln->", w, task.gram * rows, w, precision="highest")
    return total


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.permutations(range(4)), st.integers(0, 2), st.integers(1, 2), st.sampled_from([1, 2]))
def test_forms_are_inverted(order, batch, summed, groups):
    shape = (2, 3, 4, 5)
    order = (*order[:-1], order[-1])
    kept = [shape[axis] for axis in order[batch + summed :]]
    if np.prod(kept) % groups:
        return
    form = MatrixForm(
        shape,
        order,
        int(np.prod([shape[a] for a in order[:batch]])),
        int(np.prod([shape[a] for a in order[batch : batch + summed]])),
        groups,
    )
    x = jnp.arange(120).reshape(shape)
    assert form.matrices(x).shape[:2] == (form.batch * groups, form.k)
    np.testing.assert_array_equal(form.stored(form.matrices(x)), x)


def test_reasons():
    params = {"layers": jnp.ones((2, 3, 3)), "a": jnp.ones((3, 2)), "b": jnp.ones((3, 2))}

    def fn(p, x):
        sliced = x @ p["layers"][1]
        fused = x @ jnp.concatenate([p["a"], p["b"]], 1)
        mixed = x[:, :2] @ p["a"].reshape(2, 3)
        return sliced, fused, mixed, x @ x.T

    reasons = [why_not(site) for site in sites(fn, params, jnp.ones((4, 3)))]
    assert [reason and reason.split()[0] for reason in reasons] == [None, None, "a", "no"]


@pytest.mark.slow
def test_a_shared_parameter_is_fed_by_all_its_sites():
    params, x = (
        {"w": jnp.ones((3, 3))},
        jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32),
    )
    fn = lambda p, x: jnp.sin(x @ p["w"]) @ p["w"]  # noqa: E731
    tasks, _ = problems(calibrate(fn, gram(), params, [x, x]), params)
    hidden = jnp.sin(x @ params["w"])
    np.testing.assert_allclose(tasks["w"][0].gram[0], (x.T @ x + hidden.T @ hidden) / 12, rtol=1e-5)
    both = lambda p, x: (x @ p["w"]) @ p["w"].T  # noqa: E731
    tasks, reasons = problems(calibrate(both, gram(), params, [x]), params)
    assert not tasks and "different axes" in reasons["w"]
    unseen, _ = problems(calibrate(fn, gram(), params, [x], where="w#2"), params)
    assert jax.tree.all(
        jax.tree.map(
            lambda a, b: bool(jnp.allclose(a, b, rtol=1e-5)),
            unseen["w"][0].gram[0],
            hidden.T @ hidden / 6,
        )
    )
