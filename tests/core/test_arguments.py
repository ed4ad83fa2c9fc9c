"""Every constructor of a method refuses what means nothing, naming the argument, its value and
what is accepted."""

import inspect
import typing
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compress_jax as cj
from compress_jax import cluster, lowrank, prune, quantize
from compress_jax.core import ArgumentError, CompressError, ShapeError, identity

KEY = jax.random.key(0)
NUMBERS = (
    ("nan", float("nan")),
    ("a string", "4"),
    ("nothing", None),
    ("a flag", True),
    ("a list", [4]),
    ("infinity", np.inf),
)
PLACES = tuple(
    each for each in NUMBERS if each[0] not in ("a list", "nothing")
)  # an axis may be None
WHOLE = (
    *NUMBERS,
    ("a fraction", 2.5),
    ("a whole float", 4.0),
    ("far below", -1000),
    ("an array", np.array([4, 4])),
)
FLAGS = (("one", 1), ("a string", "yes"), ("a number", 0.0), ("a list", []))
NAMES = (("unknown", "nonsense"), ("a number", 3.5), ("a list", ["absmax"]), ("a flag", True))


def quantizers():
    """Return every public function of `quantize` that makes a Compression, by name."""
    functions = {name: getattr(quantize, name) for name in quantize.__all__}
    found = {
        name: fn
        for name, fn in functions.items()
        if inspect.isfunction(fn) and typing.get_type_hints(fn).get("return") is cj.Compression
    }
    return {**found, "codebook": partial(quantize.codebook, quantize.float_format(2, 1))}


QUANTIZERS = quantizers()
SCORED = {
    "magnitude": lambda sparsity=0.5, **o: prune.magnitude(sparsity, **o),
    "saliency": lambda sparsity=0.5, **o: prune.saliency(sparsity, **o),
    "fisher": lambda sparsity=0.5, **o: prune.fisher(sparsity, **o),
    "movement": lambda sparsity=0.5, **o: prune.movement(sparsity, **o),
    "random": lambda sparsity=0.5, **o: prune.random(sparsity, KEY, **o),
    "scored": lambda sparsity=0.5, **o: prune.scored({}, sparsity, **o),
    "masked": lambda sparsity=0.5, **o: prune.by_score(
        prune.Score(lambda seen: seen.x), sparsity, **o
    ),
}
GROWN = {
    "set": lambda sparsity=0.5, steps=10, key=KEY, **o: prune.sparse_evolution(
        sparsity, steps, key, **o
    ),
    "rigl": lambda sparsity=0.5, steps=10, key=KEY, **o: prune.rigl(sparsity, steps, key, **o),
}


def table():
    """Every constructor with every argument of it that has a type, and values that are none of
    that type or range."""
    rows = []

    def add(of, make, argument, values):
        rows.extend((f"{of} {argument}: {what}", make, argument, value) for what, value in values)

    for name, make in QUANTIZERS.items():
        arguments = inspect.signature(make).parameters
        if "granularity" in arguments:
            add(
                name,
                make,
                "granularity",
                [each for each in WHOLE if each[0] != "a string"] + [("unknown", "row")],
            )
        if "pad" in arguments:
            add(name, make, "pad", FLAGS)
            add(name, make, "axis", [*PLACES, ("floats", (0, 1.0)), ("none", ())])
        if "relative" in arguments:
            add(name, make, "relative", FLAGS)
        if "scale" in arguments:
            unknown = [each for each in NAMES if name != "binary" or each[0] != "a number"]
            add(name, make, "scale", unknown)
    for name in ("ternary", "binary"):
        add(
            name,
            QUANTIZERS[name],
            "clip",
            [each for each in NUMBERS if each[0] != "nothing"] + [("zero", 0), ("less", -1.0)],
        )
    for name, make in (
        ("uniform", quantize.uniform),
        ("lsq", quantize.lsq),
        ("static", quantize.static),
    ):
        add(name, make, "bits", (*WHOLE, ("one", 1), ("nine", 9)))
    for name, make in (
        ("dynamic", quantize.dynamic),
        ("pact", quantize.pact),
        ("lsq_inputs", quantize.lsq_inputs),
    ):
        add(name, make, "bits", (*WHOLE, ("one", 1), ("nine", 9)))
    add("uniform", quantize.uniform, "symmetric", FLAGS)
    add("uniform", quantize.uniform, "narrow", FLAGS)
    add("lsq", quantize.lsq, "narrow", FLAGS)
    add("lsq", quantize.lsq, "start", [("a name", "mse"), ("a number", 0.1)])
    add("lsq_inputs", quantize.lsq_inputs, "offset", FLAGS)
    add("static", quantize.static, "clipped", FLAGS)
    add("static", quantize.static, "range", NAMES)
    add("static", quantize.static, "momentum", (*NUMBERS, ("one", 1.0), ("less", -0.1)))
    add(
        "pact",
        quantize.pact,
        "alpha",
        [each for each in NUMBERS if each[0] != "nothing"] + [("zero", 0)],
    )
    add("float_format", lambda m: quantize.float_format(2, m), "m", WHOLE)
    for name, make in SCORED.items():
        add(
            name,
            make,
            "sparsity",
            [e for e in NUMBERS if (name, e[0]) != ("movement", "a list")]
            + [("much", 1.1), ("less", -1)],
        )
        add(name, make, "every", (*WHOLE, ("zero", 0)))
        add(name, make, "scope", NAMES)
        add(name, make, "structure", [("a name", "channel"), ("a pair", (2, 4)), ("a number", 4)])
    for name, make in GROWN.items():
        add(name, make, "sparsity", [*NUMBERS, ("much", 1.1), ("less", -1)])
        add(name, make, "steps", (*WHOLE, ("zero", 0)))
        add(name, make, "every", (*WHOLE, ("zero", 0)))
        add(name, make, "end_fraction", [*NUMBERS, ("much", 1.5)])
        add(name, make, "drop", [*NUMBERS, ("much", 1.5)])
        add(
            name,
            make,
            "key",
            [("none", None), ("a seed", 0), ("an old key", np.zeros(2, np.uint32))],
        )
    add("fisher", SCORED["fisher"], "decay", [*NUMBERS, ("much", 1.5)])
    add("saliency", SCORED["saliency"], "decay", [*NUMBERS, ("one", 1.0)])
    add("movement", SCORED["movement"], "learning_rate", NUMBERS)
    add("movement", SCORED["movement"], "penalty", NUMBERS)
    add("cubic", lambda end: prune.cubic(0.5, 0, end), "end", (*WHOLE, ("zero", 0)))
    add("cubic", lambda final: prune.cubic(final, 0, 5), "final", (*NUMBERS, ("much", 2)))
    add("n_m", lambda n: prune.n_m(n, 8), "n", (*WHOLE, ("zero", 0), ("much", 9)))
    add("n_m", lambda axis: prune.n_m(2, 4, axis), "axis", (*PLACES[:3], ("twice", (1, 1))))
    add(
        "block",
        prune.block,
        "shape",
        [("a number", 4), ("floats", (2.0, 2)), ("flags", (True, 2)), ("zero", (0, 2))],
    )
    add("channel", lambda reduce: prune.channel(-1, reduce), "reduce", NAMES)
    add(
        "head",
        lambda heads: prune.head(-1, heads),
        "heads",
        [e for e in WHOLE if e[0] != "nothing"] + [("zero", 0)],
    )
    add("rounds", prune.rounds, "share", [*NUMBERS, ("one", 1)])
    add("kmeans", cluster.kmeans, "clusters", (*WHOLE, ("one", 1), ("many", 2**16)))
    add(
        "kmeans",
        lambda iterations: cluster.kmeans(2, iterations=iterations),
        "iterations",
        (*WHOLE, ("zero", 0)),
    )
    add("kmeans", lambda keep_zeros: cluster.kmeans(2, keep_zeros=keep_zeros), "keep_zeros", FLAGS)
    add("svd", lowrank.svd, "rank", (*WHOLE, ("zero", 0)))
    add(
        "svd",
        lambda energy: lowrank.svd(energy=energy),
        "energy",
        (*NUMBERS, ("zero", 0.0), ("much", 1.1)),
    )
    for name, make in {
        "at": lambda p: cj.at(p, identity()),
        "rules": lambda p: cj.rules([(p, identity())]),
    }.items():
        add(
            name,
            make,
            "p",
            [("nothing", None), ("a number", 3), ("no glob", ()), ("numbers", ("a", 1))],
        )
    broken = [
        ("nothing", None),
        ("a function", jnp.round),
        ("a constructor", prune.magnitude),
        ("a number", 4),
    ]
    add("at", lambda c: cj.at("**", c), "c", broken)
    add("chain", lambda c: cj.chain(identity(), c), "c", broken)
    add("every", lambda c: cj.every(2, c), "c", broken)
    add("between", lambda c: cj.between(0, 2, c), "c", broken)
    add("every", lambda n: cj.every(n, identity()), "n", (*WHOLE, ("zero", 0)))
    add(
        "between",
        lambda start: cj.between(start, None, identity()),
        "start",
        [e for e in WHOLE if e[0] != "far below"],
    )
    add(
        "between",
        lambda stop: cj.between(1, stop, identity()),
        "stop",
        [e for e in WHOLE if e[0] != "nothing"],
    )
    return rows


def test_what_means_nothing_is_refused():
    accepted = []
    for name, make, argument, value in table():
        try:
            make(**{argument: value})
            accepted.append(name)
        except ArgumentError as error:
            shown = str(value) in str(error) or repr(value) in str(error)
            if not shown and not (isinstance(value, float) and "nan" in str(error)):
                accepted.append(f"{name} is refused without its value: {error}")
        except Exception as error:  # what is not raised on purpose is a fault to list
            accepted.append(f"{name} raised {type(error).__name__}: {error}")
    assert not accepted, "\n".join(accepted)


@pytest.mark.slow
def test_numpy_numbers_are_numbers():
    int_, float_ = np.int64, np.float32
    params = {"kernel": jnp.ones((8, 4))}
    made = [
        quantize.uniform(int_(4), np.bool_(True), int_(4), axis=int_(-1)),
        quantize.lsq(int_(3), int_(2)),
        quantize.binary(scale=float_(0.5), clip=float_(1.0)),
        prune.magnitude(float_(0.5), prune.block((int_(2), int_(2))), every=int_(2)),
        prune.magnitude(None, prune.n_m(int_(2), int_(4), int_(0))),
        cluster.kmeans(int_(2)),
        lowrank.svd(int_(1)),
        cj.every(int_(2), cj.between(int_(0), int_(3), prune.saliency(0.5, decay=float_(0.5)))),
        cj.at(["*"], prune.magnitude(jnp.float32(0.5))),
    ]
    for c in made:
        c.init(params)


@pytest.mark.slow
def test_gradients_that_do_not_fit_are_refused():
    params = {"w": jnp.ones((8, 4)), "v": jnp.ones((8, 4))}
    for c in (
        prune.movement(0.5),
        prune.fisher(0.5),
        prune.saliency(0.5),
        prune.rigl(0.5, 10, KEY, every=1),
    ):
        for each in (
            c,
            cj.at("w", c),
            cj.every(1, cj.chain(identity(), c)),
            cj.between(-1, None, c),
        ):
            state = each.init(params)
            for shape in ((4,), (8, 1), (8, 4, 1), ()):
                with pytest.raises(ShapeError, match=r"'w'.*\(8, 4\)"):
                    each.update(
                        params, state, step=1, grads={"w": jnp.ones(shape), "v": jnp.ones((8, 4))}
                    )
            with pytest.raises(ArgumentError, match="gradient"):
                each.update(params, state, step=1)
            with pytest.raises(ArgumentError, match="kernel"):
                each.update(params, state, step=1, grads={"kernel": jnp.ones((8, 4)), **params})
            with pytest.raises((TypeError, CompressError), match="gradients"):
                each.update(params, state, step=1, gradients=params)
