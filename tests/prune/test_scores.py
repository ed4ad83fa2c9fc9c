"""Scores against the papers' formulas in NumPy float64, and what they ask of their inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compress_jax as cj
from compress_jax.core import ArgumentError, NonFiniteError, ShapeError, StateError
from compress_jax.prune import (
    Score,
    by_score,
    fisher,
    grasp,
    magnitude,
    movement,
    nested,
    normalized,
    random,
    saliency,
    scored,
    snip,
    synflow,
)

SHAPE, N = (6, 8), 48
STEPS = [
    tuple(np.random.default_rng((i, j)).normal(size=SHAPE) for j in range(2)) for i in range(4)
]


def kept(scores, pruned):
    """Mask of all but the lowest scores."""
    mask = np.ones(scores.size, bool)
    mask[np.argsort(scores, axis=None, kind="stable")[:pruned]] = False
    return mask.reshape(scores.shape)


def follow(c):
    """Run the updates as a training loop would, and return the masks after each."""
    state, update, masks = (
        c.init({"w": jnp.asarray(STEPS[0][0], jnp.float32)}),
        jax.jit(c.update),
        [],
    )
    assert np.asarray(mask(state)).all()  # nothing is known of the gradients yet
    for step, (w, g) in enumerate(STEPS):
        params, grads = ({"w": jnp.asarray(x, jnp.float32)} for x in (w, g))
        state = update(params, state, step=jnp.int32(step), grads=grads)
        masks.append(np.asarray(mask(state)))
    return masks


def mask(state):
    return state.fixed["w"]["mask"] if isinstance(state.fixed["w"], dict) else state.fixed["w"]


def running(terms, decay, fresh):
    means, mean = [], 0.0
    for term in terms:
        mean = decay * mean + fresh * term
        means.append(mean)
    return means


SCORES = {
    "saliency": (saliency(0.75), [abs(w * g) for w, g in STEPS]),
    "saliency, averaged": (
        saliency(0.75, decay=0.9),
        running([abs(w * g) for w, g in STEPS], 0.9, 0.1),
    ),
    "fisher": (
        fisher(0.75, decay=0.5),
        [
            w**2 * f / 2
            for (w, _), f in zip(STEPS, running([g**2 for _, g in STEPS], 0.5, 0.5), strict=True)
        ],
    ),
    "fisher, summed": (
        fisher(0.75, decay=1.0),
        [
            w**2 * f / 2
            for (w, _), f in zip(STEPS, running([g**2 for _, g in STEPS], 1.0, 1.0), strict=True)
        ],
    ),
    "movement": (movement(0.75), running([-w * g for w, g in STEPS], 1.0, 1.0)),
}


@pytest.mark.wide(3)
@pytest.mark.parametrize("name", SCORES)
def test_masks_are_those_of_the_formula(name):
    c, scores = SCORES[name]
    for found, score in zip(follow(c), scores, strict=True):
        np.testing.assert_array_equal(found, kept(score, 36))


def test_soft_movement_keeps_what_is_above_the_threshold():
    penalty, rate, scores = 0.5, 0.1, np.zeros(SHAPE)
    for found, (w, g) in zip(
        follow(movement(threshold=-0.02, learning_rate=rate, penalty=penalty)), STEPS, strict=True
    ):
        sigmoid = 1 / (1 + np.exp(-scores))
        scores = scores - rate * (w * g + penalty * sigmoid * (1 - sigmoid))
        np.testing.assert_array_equal(found, scores > -0.02)
        assert 0 < found.sum() < N
    with pytest.raises(ValueError, match="no sparsity and no structure"):
        movement(0.5, threshold=0.0)


def test_between_updates_of_the_mask_scores_go_on():
    masks = follow(movement(0.75, every=3))
    expected = running([-w * g for w, g in STEPS], 1.0, 1.0)
    np.testing.assert_array_equal(masks[1], masks[0])
    np.testing.assert_array_equal(masks[2], kept(expected[0], 36))
    np.testing.assert_array_equal(masks[3], kept(expected[3], 36))


@pytest.mark.parametrize("make", [saliency, fisher, movement])
def test_gradients_are_needed_and_checked(make):
    c, params = make(0.5), {"a": {"w": jnp.ones(4)}}
    state = c.init(params)
    with pytest.raises(ValueError, match="there is none for a/w"):
        c.update(params, state, step=0)
    with pytest.raises(NonFiniteError, match=r"a/w \(its gradient\)"):
        c.update(params, state, step=0, grads={"a": {"w": jnp.array([1.0, jnp.nan, 1.0, 1.0])}})


def test_random_masks_are_exact_stay_and_grow():
    params = {"a": jnp.ones((10, 10)), "b": jnp.ones((10, 10))}
    c = random(lambda step: 0.2 * step, jax.random.key(0))
    state, before = c.init(params), None
    for step in range(1, 5):
        state = c.update(params, state, step=step, key=jax.random.key(step))
        assert [int((~m).sum()) for m in state.fixed.values()] == [20 * step, 20 * step]
        assert before is None or not (state.fixed["a"] & ~before).any()
        before = state.fixed["a"]
    same, other = (random(0.5, jax.random.key(seed)).init(params).fixed for seed in (0, 1))
    assert (same["a"] != same["b"]).any() and (same["a"] != other["a"]).any()
    alone = random(0.5, jax.random.key(0)).init({"b": params["b"]}).fixed["b"]
    np.testing.assert_array_equal(alone, same["b"])  # another leaf does not change the draw


def test_given_scores_are_compared_by_value_and_checked():
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(2)}
    scores = {"a": jnp.array([[-5.0, 1.0, 2.0], [3.0, 4.0, 9.0]]), "b": jnp.array([0.0, 8.0])}
    state = scored(scores, 0.5, scope="global").init(params)
    assert [m["mask"].tolist() for m in state.fixed.values()] == [
        [[False, False, False], [True] * 3],
        [False, True],
    ]
    later = scored(scores, lambda step: 0.25 * step, scope="global")
    assert int((~later.update(params, later.init(params), step=1).fixed["a"]["mask"]).sum()) == 1
    with pytest.raises(StateError, match="leaf 'b' has no scores"):
        scored({"a": scores["a"]}, 0.5).init(params)
    with pytest.raises(ShapeError, match=r"'a' has shape \(2, 3\), its scores have \(3, 2\)"):
        scored({**scores, "a": scores["a"].T}, 0.5).init(params)
    with pytest.raises(NonFiniteError, match=r"b \(its scores\)"):
        scored({**scores, "b": jnp.array([jnp.nan, 1.0])}, 0.5).init(params)


def test_one_mask_at_a_time_under_at():
    params = {"a": {"kernel": jnp.array([1.0, -2.0])}, "bias": jnp.ones(2)}
    c = cj.at("**/kernel", scored(lambda p: jax.tree.map(jnp.abs, p), 0.5))
    assert c.view(params, c.init(params))["a"]["kernel"].tolist() == [0.0, -2.0]


def quadratic(params, x):
    """A loss whose derivatives are known: ``sum(h * (w * x)**2) / 2``."""
    return 0.5 * jnp.sum(jnp.asarray([1.0, 2.0, 4.0]) * (params["w"] * x) ** 2)


def test_snip_and_grasp_are_their_formulas():
    w, x, h = np.array([1.0, -2.0, 0.5]), np.array([3.0, 1.0, -1.0]), np.array([1.0, 2.0, 4.0])
    params = {"w": jnp.asarray(w, jnp.float32), "steps": jnp.array(3)}
    gradient = h * x**2 * w
    np.testing.assert_allclose(
        snip(quadratic, params, jnp.asarray(x, jnp.float32))["w"], abs(w * gradient), rtol=1e-6
    )
    scores = grasp(quadratic, params, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(scores["w"], w * (h * x**2 * gradient), rtol=1e-6)
    assert scores["steps"] == 0


def network(params, x):
    for name in sorted(params):
        x = jax.nn.relu(x @ params[name])
    return x


LAYERS = {
    f"l{i}": jax.random.normal(jax.random.key(i), shape)
    for i, shape in enumerate([(4, 32), (32, 32), (32, 3)])
}


@pytest.mark.slow
def test_synaptic_flow_is_conserved():
    """Theorem 1 of the paper: flow is conserved at hidden neurons, so layers have equal sums."""
    scores = synflow(network, LAYERS, jnp.zeros((1, 4)))
    inward, outward = scores["l0"].sum(0), scores["l1"].sum(1)
    np.testing.assert_allclose(inward, outward, rtol=1e-5)
    total = jnp.ones((1, 4)) @ abs(LAYERS["l0"]) @ abs(LAYERS["l1"]) @ abs(LAYERS["l2"])
    for score in scores.values():
        np.testing.assert_allclose(score.sum(), total.sum(), rtol=1e-5)


@pytest.mark.slow
def test_synflow_in_rounds_leaves_a_path_open_at_the_exact_total():
    scores = synflow(network, LAYERS, jnp.zeros((1, 4)), sparsity=0.97, rounds=8)
    masks = {
        path: each["mask"]
        for path, each in scored(scores, 0.97, scope="global").init(LAYERS).fixed.items()
    }
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(0.97 * (128 + 1024 + 96))
    flow = network(
        {path: mask.astype(jnp.float32) for path, mask in masks.items()}, jnp.ones((1, 4))
    )
    assert flow.sum() > 0
    with pytest.raises(ValueError, match="at least one round"):
        synflow(network, LAYERS, jnp.zeros((1, 4)), rounds=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: saliency(0.5, decay=1.0), "1 not included"),
        (lambda: fisher(0.5, decay=1.1), "between 0 and 1"),
        (lambda: magnitude(None), "give a sparsity"),
    ],
)
def test_impossible_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("regrow", [True, False])
def test_without_regrowth_a_mask_only_shrinks(regrow):
    c = magnitude(lambda step: 0.25 * (step + 1))
    c = c if regrow else nested(c)
    state = c.init({"w": jnp.array([1.0, 2.0, 3.0, 4.0])})
    later = c.update({"w": jnp.array([9.0, 2.0, 3.0, 1.0])}, state, step=1)
    assert later.fixed["w"].tolist() == (
        [True, False, True, False] if regrow else [False, True, True, False]
    )


def test_scores_relative_to_their_leaf_do_not_depend_on_its_size():
    params = {
        name: jnp.asarray(np.random.default_rng(i).normal(size=(7, 9)), jnp.float32)
        for i, name in enumerate("ab")
    }
    scaled, plain = (
        {"a": 2.0**80 * params["a"], "b": 2.0**-80 * params["b"]},
        Score(lambda seen: seen.x),
    )

    def masks(score, params):
        return np.stack(
            [
                mask
                for _, mask in sorted(
                    by_score(score, 0.5, scope="global").init(params).fixed.items()
                )
            ]
        )

    assert np.array_equal(masks(normalized(plain), params), masks(normalized(plain), scaled))
    assert not np.array_equal(masks(plain, params), masks(plain, scaled))
    relative = np.stack([np.abs(x, dtype=np.float64) / np.linalg.norm(x) for x in params.values()])
    np.testing.assert_array_equal(
        masks(normalized(plain), params), relative > np.sort(relative, None)[relative.size // 2 - 1]
    )


def test_a_bare_function_and_scores_of_another_shape_are_refused_by_name():
    params = {"w": jnp.ones((3, 4))}
    for call in (lambda: normalized(jnp.abs), lambda: by_score(jnp.abs, 0.5)):
        with pytest.raises(
            ArgumentError, match=r"wrap a function of ScoreInputs, prune.Score\(fn\)"
        ):
            call()
    rows = Score(lambda seen: seen.x[0])
    for score in (rows, normalized(rows)):
        with pytest.raises(
            ShapeError, match=r"leaf 'w' of shape \(3, 4\) was given scores of shape \(4,\)"
        ):
            by_score(score, 0.5).init(params)


REMEMBERING = {
    "movement": lambda: movement(0.5),
    "soft movement": lambda: movement(threshold=0.0),
    "fisher": lambda: cj.prune.fisher(0.5, decay=1.0),
    "saliency": lambda: cj.prune.saliency(0.5),
    "mean saliency": lambda: cj.prune.saliency(0.5, decay=0.9),
    "rigl": lambda: cj.prune.rigl(0.5, 10, jax.random.key(0), every=1),
    "top kast of every": lambda: cj.every(1, cj.at("*", cj.prune.movement(0.5, every=2))),
}


@pytest.mark.wide(2)
@pytest.mark.parametrize("name", REMEMBERING)
def test_a_step_whose_gradients_are_not_finite_is_skipped_whole(name):
    c, params = (
        REMEMBERING[name](),
        {"w": jax.random.normal(jax.random.key(1), (6, 4)), "v": jnp.arange(1.0, 9.0)},
    )
    update = jax.jit(c.update)
    grads = jax.tree.map(jnp.cos, params)
    state = update(params, c.init(params), step=2, grads=grads)
    for bad in (jnp.nan, jnp.inf):
        skipped = update(params, state, step=4, grads={**grads, "w": grads["w"].at[1, 1].set(bad)})
        both = (jax.tree.leaves(each.fixed) for each in (state, skipped))
        kept = [bool((old == new).all()) for old, new in zip(*both, strict=True)]
        assert all(kept) or name == "rigl"  # of which "grown" is emptied
        assert all(
            bool(jnp.isfinite(x).all())
            for x in jax.tree.leaves(update(params, skipped, step=6, grads=grads).fixed)
        )
        with pytest.raises(NonFiniteError, match="w"):
            c.update(params, state, step=4, grads={**grads, "w": grads["w"].at[1, 1].set(bad)})


@pytest.mark.parametrize("name", ["movement", "fisher", "mean saliency"])
def test_gradients_however_large_never_make_a_score_infinite(name):
    c, params = REMEMBERING[name](), {"w": jnp.array([1e30, -1e20, 0.0, 3.0])}
    state = c.init(params)
    for sign in (1.0, -1.0, 1.0):
        state = jax.jit(c.update)(
            params, state, step=0, grads={"w": jnp.array([3e38, sign * 3e38, 3e38, 1e-30])}
        )
    assert (
        jnp.isfinite(state.fixed["w"]["carried"]).all() and int(state.fixed["w"]["mask"].sum()) == 2
    )


def test_scores_that_are_nan_rank_nothing():
    c = cj.prune.by_score(cj.prune.Score(lambda seen: jnp.log(seen.x)), 0.5)
    good, bad = {"w": jnp.array([1.0, 2.0, 3.0, 9.0])}, {"w": jnp.array([-1.0, 2.0, 3.0, 9.0])}
    for call in (
        lambda: c.init(bad),
        lambda: c.update(bad, c.init(good), step=0),
        lambda: cj.every(1, c).update(bad, c.init(good), step=0),
    ):
        with pytest.raises(NonFiniteError, match="'w'.*1 scores that are NaN"):
            call()
    state = c.init(good)
    assert (jax.jit(c.update)(bad, state, step=0).fixed["w"] == state.fixed["w"]).all()
