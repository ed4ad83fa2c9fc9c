"""The zoo's own test: its models run, and its answers hold by an independent count."""

import math
from collections import Counter
from functools import cache

import jax
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from compress_jax.core.paths import flatten
from tests.trace.zoo import BIG, ZOO

ENTRIES = {entry.name: entry for entry in (*ZOO, *BIG)}
quick = pytest.mark.parametrize("name", [entry.name for entry in ZOO])
every = pytest.mark.parametrize("name", ENTRIES)
BOTH = [
    name.removesuffix("/nnx")
    for name in ENTRIES
    if name.endswith("/nnx") and name != "recurrent/nnx"
]


@cache
def made(name):
    fn, variables, inputs = ENTRIES[name].make()
    return fn, jax.jit(fn), variables, inputs


def arrays(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def bodies(eqn):
    leaves = jax.tree.leaves(list(eqn.params.values()))
    return [
        getattr(leaf, "jaxpr", leaf) for leaf in leaves if isinstance(leaf, (Jaxpr, ClosedJaxpr))
    ]


def loops(eqn):
    name, p = eqn.primitive.name, eqn.params
    return p["length"] if name == "scan" else p["mesh"].size if name == "shard_map" else 1


def count(jaxpr):
    """Count contractions and their multiply-accumulates in a jaxpr and in all nested ones."""
    found = Counter()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in MACS:
            shapes = [var.aval.shape for var in (*eqn.invars[:2], *eqn.outvars)]
            found += Counter(equations=1, macs=MACS[eqn.primitive.name](eqn.params, *shapes))
        for body in bodies(eqn):
            found += Counter({key: loops(eqn) * value for key, value in count(body).items()})
    return found


MACS = {
    "dot_general": lambda p, lhs, rhs, out: math.prod(
        [*out, *(lhs[axis] for axis in p["dimension_numbers"][0][0])]
    ),
    "ragged_dot_general": lambda p, lhs, rhs, out: math.prod([*lhs, out[-1]]),
    "conv_general_dilated": lambda p, lhs, rhs, out: (
        math.prod([*out, *rhs])
        // rhs[p["dimension_numbers"].rhs_spec[0]]
        // math.prod(p["lhs_dilation"])
    ),
}


@pytest.mark.wide(8)
@quick
def test_it_runs_and_again_gives_the_same(name):
    _, jitted, variables, inputs = made(name)
    first, second = (arrays(jitted(variables, *inputs)) for _ in range(2))
    assert first and all(np.isfinite(x).all() and x.std() > 0 for x in first)
    assert all(map(np.array_equal, first, second))


@pytest.mark.wide(24)
@quick
def test_making_it_again_gives_the_same_variables_and_inputs(name):
    _, _, variables, inputs = made(name)
    again = ENTRIES[name].make()[1:]
    assert jax.tree.structure(again) == jax.tree.structure((variables, inputs))
    assert all(map(np.array_equal, arrays(again), arrays((variables, inputs))))


@quick
def test_variables_have_no_symmetry(name):
    leaves, _ = flatten(made(name)[2])
    assert {str(leaf.dtype) for leaf in leaves.values()} == {"float32"}
    assert not [path for path, leaf in leaves.items() if len(np.unique(leaf)) < 0.99 * leaf.size]
    assert all(
        (np.asarray(leaf) > 0).all() for path, leaf in leaves.items() if path.endswith("/var")
    )


@every
def test_the_table_is_complete(name):
    entry, (leaves, _) = ENTRIES[name], flatten(made(name)[2])
    matrices = {path for path, leaf in leaves.items() if leaf.ndim > 1}
    assert entry.contracted.keys() <= leaves.keys() and entry.uncontracted.keys() <= matrices
    assert not entry.contracted.keys() & entry.uncontracted.keys() and all(
        entry.uncontracted.values()
    )
    assert matrices <= entry.contracted.keys() | entry.uncontracted.keys()


@pytest.mark.wide(5)
@quick
def test_every_contracted_parameter_matters(name):
    _, jitted, variables, inputs = made(name)
    leaves, rebuild = flatten(variables)
    before = arrays(jitted(variables, *inputs))
    for path in ENTRIES[name].contracted:
        after = arrays(jitted(rebuild({**leaves, path: 0 * leaves[path]}), *inputs))
        assert not all(map(np.array_equal, before, after)), path


@pytest.mark.wide(8)
@pytest.mark.parametrize("name", [entry.name for entry in ZOO if entry.reverse])
def test_it_has_gradients(name):
    """Traced only; the values are whatever reads the computation must keep."""
    fn, _, variables, inputs = made(name)
    gradient = jax.eval_shape(
        jax.grad(lambda v: sum(leaf.sum() for leaf in jax.tree.leaves(fn(v, *inputs)))), variables
    )
    assert jax.tree.map(np.shape, gradient) == jax.tree.map(np.shape, variables)


@every
def test_an_independent_count_agrees(name):
    fn, _, variables, inputs = made(name)
    found = count(jax.make_jaxpr(fn)(variables, *inputs).jaxpr)
    assert found == Counter(equations=ENTRIES[name].answer().equations, macs=ENTRIES[name].macs)


@pytest.mark.wide(6)
@pytest.mark.parametrize("model", BOTH)
def test_linen_and_nnx_agree(model):
    """The same variables by name give the same outputs (recurrent cells have other names)."""
    (_, linen, variables, inputs), (_, nnx, state, _) = made(f"{model}/linen"), made(f"{model}/nnx")
    leaves = {path.split("/", 1)[1]: leaf for path, leaf in flatten(variables)[0].items()}
    same = flatten(state)[1](leaves)
    expected, got = (flatten(out)[0] for out in (linen(variables, *inputs), nnx(same, *inputs)))
    expected = {path.replace("batch_stats/", ""): leaf for path, leaf in expected.items()}
    assert expected.keys() == got.keys() and leaves.keys() == flatten(state)[0].keys()
    for path, leaf in expected.items():
        np.testing.assert_allclose(got[path], leaf, rtol=1e-4, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("entry", BIG, ids=lambda entry: entry.name)
def test_published_sizes_and_costs(entry):
    """GMAC as torchvision publishes them: all convolutions and products, attention's too."""
    leaves, _ = flatten(made(entry.name)[2])
    assert (
        sum(leaf.size for path, leaf in leaves.items() if path.startswith("params/"))
        == entry.parameters
    )
    assert (
        round(entry.macs / 1e9, 3) == {"resnet50/linen": 4.089, "vit_b16/linen": 17.564}[entry.name]
    )


def test_contractions_lie_in_every_kind_of_nesting():
    def around(jaxpr):
        for eqn in jaxpr.eqns:
            inside = [chain for body in bodies(eqn) for chain in around(body)]
            yield from (
                [(eqn.primitive.name,)]
                if eqn.primitive.name in MACS
                else [(eqn.primitive.name, *c) for c in inside]
            )

    traces = [
        jax.make_jaxpr(fn)(v, *x).jaxpr for fn, _, v, x in (made(entry.name) for entry in ZOO)
    ]
    chains = {chain for jaxpr in traces for chain in around(jaxpr)}
    names = {name for chain in chains for name in chain}
    assert {
        "jit",
        "scan",
        "while",
        "cond",
        "custom_jvp_call",
        "custom_vjp_call",
        "shard_map",
        *MACS,
    } <= names
    assert names & {"remat", "remat2", "checkpoint"} and ("scan", "scan", "dot_general") in chains
