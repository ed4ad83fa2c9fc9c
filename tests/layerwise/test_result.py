"""One result type and one grammar for all rewrites, and the names that both had before."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compress_jax as cj
from compress_jax.trace import calibrate, gram, reducers

PARAMS = {"a": jax.random.normal(jax.random.key(0), (8, 6)), "b": jnp.ones(6)}
X = jax.random.normal(jax.random.key(1), (32, 8))
C = cj.at("a", cj.quantize.uniform(bits=3, granularity="channel"))


def fn(p, x):
    return jax.nn.relu(x @ p["a"] + p["b"][None])


GRAMS = calibrate(fn, gram(), PARAMS, [X])
RANGES = calibrate(fn, reducers.absmax("channel"), PARAMS, [X])
MEANS = calibrate(fn, reducers.moments(), PARAMS, [X])
VIEW = C.view(PARAMS, C.init(PARAMS))
REWRITES = {
    "gptq": lambda: cj.quantize.gptq(PARAMS, GRAMS, C),
    "adaround": lambda: cj.quantize.adaround(PARAMS, GRAMS, C, steps=3),
    "signround": lambda: cj.quantize.signround(PARAMS, GRAMS, C, steps=3),
    "clip": lambda: cj.quantize.clip(PARAMS, GRAMS, C),
    "awq": lambda: cj.quantize.awq(fn, PARAMS, X, calibration=GRAMS, compression=C, points=2),
    "sparsegpt": lambda: cj.prune.sparsegpt(PARAMS, GRAMS, 0.5, quantizer=C),
    "wanda": lambda: cj.prune.wanda(PARAMS, GRAMS, 0.5),
    "smooth": lambda: cj.quantize.smooth(fn, PARAMS, X, calibration=RANGES),
    "equalize": lambda: cj.quantize.equalize(fn, PARAMS, X),
    "rotate": lambda: cj.quantize.rotate(fn, PARAMS, X, key=jax.random.key(0)),
    "fold_batch_norm": lambda: cj.quantize.fold_batch_norm(fn, PARAMS, X),
    "correct_bias": lambda: cj.quantize.correct_bias(
        fn, PARAMS, X, compressed=VIEW, calibration=MEANS
    ),
}


# Those that tests/quantize/test_solvers.py sees exact on real data.
SOLVERS = {"gptq", "signround"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SOLVERS)) for name in REWRITES],
)
def test_every_rewrite_is_exact_under_its_compression(name):
    result = REWRITES[name]()
    assert isinstance(result, cj.layerwise.Rewritten)
    view = result.compression.view(result.params, result.state)
    for path, x in view.items():
        assert np.asarray(x).tobytes() == np.asarray(result.params[path]).tobytes()
    assert all(isinstance(paths, tuple) for paths in result.changed.values())
    assert all(result.skipped.values())


def test_arguments_before_the_inputs_may_be_given_by_position():
    def same(one, other):
        assert jax.tree.all(jax.tree.map(jnp.array_equal, one.params, other.params))

    same(cj.quantize.smooth(fn, PARAMS, RANGES, X), REWRITES["smooth"]())
    same(cj.quantize.awq(fn, PARAMS, GRAMS, C, X, points=2), REWRITES["awq"]())
    same(cj.quantize.correct_bias(fn, PARAMS, VIEW, MEANS, X), REWRITES["correct_bias"]())


@pytest.mark.parametrize(
    ("call", "new"),
    [
        (lambda: cj.quantize.smooth(fn, PARAMS, RANGES, X, strength=0.5), "alpha"),
        (lambda: cj.quantize.adaround(PARAMS, GRAMS, C, steps=3, rate=0.1), "learning_rate"),
        (lambda: cj.quantize.adaround(PARAMS, GRAMS, C, steps=3, weight=1.0), "regularization"),
        (lambda: cj.quantize.signround(PARAMS, GRAMS, C, steps=3, rate=0.1), "learning_rate"),
        (lambda: cj.prune.wanda(PARAMS, GRAMS, 0.5, where="a"), "pattern"),
        (lambda: cj.prune.sparsegpt(PARAMS, GRAMS, 0.5, where="a"), "pattern"),
        (lambda: REWRITES["equalize"]().folded, "changed"),
        (lambda: REWRITES["rotate"]().rotated, "changed"),
        (lambda: REWRITES["correct_bias"]().corrected, "changed"),
        (lambda: cj.quantize.Solved, "Rewritten"),
        (lambda: cj.quantize.Folded, "Rewritten"),
        (lambda: cj.quantize.Rotated, "Rewritten"),
        (lambda: cj.quantize.Corrected, "Rewritten"),
        (lambda: cj.prune.Pruned, "Rewritten"),
    ],
)
def test_old_names_still_work_and_say_the_new_one(call, new):
    with pytest.warns(DeprecationWarning, match=new):
        call()


def test_a_corrected_bias_has_its_old_record():
    with pytest.warns(DeprecationWarning):
        assert REWRITES["correct_bias"]().corrected == {"b": "a"}
