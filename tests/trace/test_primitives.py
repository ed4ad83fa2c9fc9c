"""One table of primitives: it has all of JAX's, and every rule table is made of its classes.

What passes values on changes no answer of any analysis.
"""

import contextlib
import importlib
import itertools
import pkgutil
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core
from jax.sharding import PartitionSpec

import compress_jax as cj
from compress_jax.trace import _cost
from compress_jax.trace._groups import analyze
from compress_jax.trace._jaxpr import evaluate, interpret, origin, primitives
from compress_jax.trace._resize import widths
from compress_jax.trace._statistics import calibrate
from compress_jax.trace._symmetry import affine, exponents, rotation

REGISTERED = {
    each.name for each in vars(core.primitives).values() if isinstance(each, core.Primitive)
}
PASSING = {
    "checkpoint_name": lambda x: checkpoint_name(x, "here"),
    "optimization_barrier": jax.lax.optimization_barrier,
    "barrier of two": lambda x: jax.lax.optimization_barrier((jnp.zeros(3), x))[1],
    "copy": jnp.copy,
    "stop_gradient": jax.lax.stop_gradient,
    "device_put": jax.device_put,
    "sharding_constraint": lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec()),
    "reduce_precision": lambda x: jax.lax.reduce_precision(x, 8, 23),
    "weak": lambda x: jax.lax.convert_element_type(jax.lax.optimization_barrier(x), jnp.float32),
    "reshard": lambda x: jax.sharding.reshard(x, PartitionSpec()),
}
WHOLE = (
    "checkpoint_name",
    "barrier of two",
    "reduce_precision",
)  # with what takes seconds: surgery, rotation, folding
MESHES = {
    "sharding_constraint": jax.sharding.AxisType.Auto,
    "reshard": jax.sharding.AxisType.Explicit,
}


def test_every_primitive_is_in_one_class():
    assert len(REGISTERED) > 100
    unclassified = {name for name in REGISTERED if primitives.class_of(name) is None}
    assert not unclassified, "new primitives: say in trace/_jaxpr/primitives.py what they do"
    for (a, ours), (b, theirs) in itertools.combinations(primitives.CLASSES.items(), 2):
        assert not ours & theirs, (a, b)


# The classes that a table must have as a whole; the interpreter itself passes values on.
HANDLED = {
    "axes": (analyze.RULES, set(primitives.CLASSES) - {"pass-through", "control", "opaque"}),
    "flops": (
        _cost.FREE
        | _cost.PER_ELEMENT
        | _cost.TRANSCENDENTAL
        | _cost.MIXED.keys()
        | _cost.RULES.keys(),
        {
            "pass-through",
            "moves",
            "joins",
            "indexed",
            "updates",
            "sums",
            "signs",
            "comparisons",
            "arithmetic",
            "casts",
            "cumulative",
        }
        | {"creation", "collectives", "debug", "contractions"},
    ),
    "rotation": (
        rotation.RULES,
        {"casts", "moves", "joins", "indexed", "sums", "signs", "contractions"},
    ),
    "scaling": (
        {*exponents.RULES, "split", "unstack"},
        {
            "casts",
            "moves",
            "joins",
            "indexed",
            "sums",
            "signs",
            "comparisons",
            "windows",
            "contractions",
        },
    ),
    "pieces": (
        {*origin.PIECE_RULES, *origin.PIECE_JOINS, "split"},
        {"joins", "indexed"},
    ),
    "padding": (
        {*calibrate.SUMMED, *calibrate.PICKED, *calibrate.REORDERED},
        {"reductions", "index reductions", "indexed"},
    ),
    "biases": (affine.SAME, {"casts", "pass-through"}),
}


@pytest.mark.parametrize("table", HANDLED)
def test_rule_tables_hold_whole_classes_and_nothing_unknown(table):
    names, classes = HANDLED[table]
    for each in classes:
        missing = set(primitives.CLASSES[each]) - set(names) - {"ragged_dot"}  # a name of older JAX
        assert not missing, f"{table} lacks {sorted(missing)} of {each}"
    assert all(primitives.class_of(name) for name in names)
    assert not set(names) & primitives.CONTROL


def rule_tables():
    """Yield every constant of a module of trace that has primitives' names for keys or entries."""
    shared = {id(value) for value in vars(primitives).values()}
    for info in pkgutil.walk_packages(cj.trace.__path__, "compress_jax.trace."):
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            if not isinstance(value, (dict, frozenset, set, tuple, list)) or id(value) in shared:
                continue
            names = {each for each in value if isinstance(each, str)}
            if module is not primitives and names & REGISTERED:
                yield f"{info.name.removeprefix('compress_jax.trace.')}.{name}", names


TABLES = dict(rule_tables())


def test_every_module_with_rules_is_found():
    expected = {
        "_cost": _cost.RULES,
        "_groups.analyze": analyze.RULES,
        "_jaxpr.evaluate": evaluate.CUSTOM_JVPS,
        "_jaxpr.interpret": interpret.RULES,
        "_jaxpr.origin": origin.MOVE_RULES,
        "_resize.widths": widths.RULES,
        "_statistics.calibrate": calibrate.REORDERED,
        "_symmetry.affine": affine.UNARY,
        "_symmetry.exponents": exponents.RULES,
        "_symmetry.rotation": rotation.RULES,
    }
    for module, names in expected.items():
        assert set(names) in [own for name, own in TABLES.items() if name.startswith(f"{module}.")]


@pytest.mark.parametrize("table", TABLES)
def test_rule_tables_name_only_what_the_one_table_has(table):
    unknown = {name for name in TABLES[table] if primitives.class_of(name) is None}
    assert not unknown, f"{table} has names that trace/_jaxpr/primitives.py lacks"
    if table.startswith(("_jaxpr.evaluate", "_jaxpr.same_program")):
        assert TABLES[table] <= primitives.CALLS.keys()
    else:
        assert not TABLES[table] & primitives.CONTROL


def test_moves_of_origins_keep_entries():
    assert origin.MOVE_RULES.keys() <= primitives.MOVES | primitives.JOINS


def test_what_changes_shape_is_resized():
    """All that have a static shape, size or limit among their parameters."""
    static = {
        "broadcast_in_dim",
        "reshape",
        "slice",
        "split",
        "tile",
        "pad",
        "iota",
        "dynamic_slice",
        "gather",
    }
    assert static <= widths.RULES.keys()


def tagged(fn, tag, start=0, every=1):
    """Return a function whose parameters and results of equations pass through ``tag``.

    Only floating values are counted, and one in ``every`` is passed.
    """

    def run(params, *inputs):
        closed, shape = jax.make_jaxpr(fn, return_shape=True)(params, *inputs)
        counter = itertools.count(start)

        def through(x):
            floating = jnp.issubdtype(jnp.result_type(x), jnp.floating)
            return tag(x) if floating and next(counter) % every == 0 else x

        env = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
        env |= dict(
            zip(closed.jaxpr.invars, map(through, jax.tree.leaves((params, inputs))), strict=True)
        )
        for eqn in closed.jaxpr.eqns:
            args = [
                atom.val if isinstance(atom, core.Literal) else env[atom] for atom in eqn.invars
            ]
            made = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(eqn.params))
            env |= dict(
                zip(
                    eqn.outvars,
                    map(through, made if eqn.primitive.multiple_results else [made]),
                    strict=True,
                )
            )
        return jax.tree.unflatten(
            jax.tree.structure(shape), [env[var] for var in closed.jaxpr.outvars]
        )

    return run


def block(p, x):
    """An RMS norm, a gated and a plain MLP, a folded norm, a table, a loop and a fused kernel."""
    h = p["table"][x] @ p["in"]
    n = h * jax.lax.rsqrt((h * h).mean(-1, keepdims=True) + 1e-6) * p["scale"][None]
    gate, up = jnp.split(n @ p["gate_up"], 2, axis=-1)
    h = h + (jax.nn.silu(gate) * up) @ p["down"]
    y = (h @ p["conv"] - p["mean"][None]) * jax.lax.rsqrt(p["var"][None] + 1e-3) * p["gain"][
        None
    ] + p["shift"][None]
    y = jax.lax.scan(lambda c, w: (jax.nn.relu(c @ w), None), jax.nn.relu(y), p["stack"])[0]
    return jax.nn.relu(y @ p["up"] + p["bias"][None]) @ p["out"]


SHAPES = {
    "table": (11, 5),
    "in": (5, 8),
    "scale": (8,),
    "gate_up": (8, 12),
    "down": (6, 8),
    "conv": (8, 4),
}
SHAPES |= dict.fromkeys(("mean", "var", "gain", "shift"), (4,))
SHAPES |= {"stack": (2, 4, 4), "up": (4, 6), "bias": (6,), "out": (6, 3)}
RNG = np.random.default_rng(0)
P = {name: jnp.asarray(RNG.uniform(0.5, 1.5, shape), jnp.float32) for name, shape in SHAPES.items()}
X = jnp.array([3, 1, 4, 1])


def answers(fn, quick=False):
    """All that the library says of a function, as values that can be compared."""
    sites, found, cost = (
        cj.trace.sites(fn, P, X),
        cj.trace.groups(fn, P, X),
        cj.trace.cost(fn, P, X),
    )
    told = {
        "sites": [
            (s.name, s.param, s.param_axes, s.stack_axes, s.also, s.uses, s.loops) for s in sites
        ],
        "unseen": cj.trace.unseen(fn, P, X),
        "groups": [(g.name, g.size, g.members) for g in found],
        "frozen": found.frozen,
        "unknown": found.unknown,
        "cost": (cost.macs, cost.flops, cost.transcendentals),
    }
    if quick:
        return told
    small = cj.prune.shrink(fn, P, X, ratio=0.5)
    rotated = cj.quantize.rotate(fn, P, X, key=jax.random.key(0))
    equal = cj.quantize.equalize(fn, P, X)
    folded = cj.quantize.fold_batch_norm(fn, P, X)
    cal = cj.trace.calibrate(fn, cj.trace.reducers.absmax("channel"), P, [X])
    smooth = cj.quantize.smooth(fn, P, cal, X)
    c = cj.quantize.uniform(8, granularity="channel")
    integer = cj.quantize.contractions(fn, c.pack(P, c.init(P)), X, how=cj.quantize.dynamic())
    return told | {
        "shrunk": (
            {k: v.tolist() for k, v in small.kept.items()},
            [number[1:5] for number in small.table.numbers],
        ),
        "shrunk params": small.params,
        "shrunk value": small.fn(small.params, X),
        "rotated": (rotated.changed, rotated.skipped),
        "equalized": equal,
        "folded": (
            sorted(folded.changed),
            sorted(folded.skipped),
        ),  # reasons speak of what the last step was
        "integer": str(integer),
        "smoothed": smooth,
    }


@cache
def plain():
    return answers(block)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b), (a, b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if isinstance(x, jax.Array):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
        else:
            assert x == y, (x, y)


@pytest.mark.slow
def test_the_block_has_something_to_find_for_each():
    assert (
        plain()["rotated"][0]
        and plain()["folded"][0]
        and plain()["equalized"].changed
        and plain()["smoothed"].changed
    )
    assert (
        plain()["shrunk"][1]
        and "int8 x int8" in plain()["integer"]
        and plain()["unseen"]
        and plain()["groups"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", PASSING)
def test_what_passes_values_on_changes_no_answer(how):
    mesh = contextlib.nullcontext()
    if how in MESHES:
        mesh = jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(MESHES[how],)))
    with mesh:
        got = answers(tagged(block, PASSING[how]), quick=how not in WHOLE)
    for key, answer in got.items():
        same(answer, plain()[key])
