"""Every loss follows one rule for masks; a new loss without a row here fails."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_jax import distill as d
from compress_jax.core.errors import ArgumentError, ShapeError
from compress_jax.distill._masks import fits, fitted
from compress_jax.train import distillation
from tests.distill.test_losses_table import NO_LOSSES

B, T, C = 5, 4, 6
LENGTHS = jnp.array([4, 1, 0, 3, 2])
TOKENS = jnp.arange(T)[None] < LENGTHS[:, None]
ROWS = jnp.array([True, True, False, True, False])
HEAD = jax.random.normal(jax.random.key(9), (C, 7))
LABELS = jax.random.randint(jax.random.key(8), (B, T), 0, C)
UNMASKED = {
    "standardize",
    "virtual_teacher",
    "ensemble",
    "l2_sp",
}  # of logits or of weights: nothing is averaged


def on(loss, **options):
    return lambda name: d.on_features(loss, "mid", "mid", name=name, **options)


def of(loss, **options):
    return lambda name: d.on_logits(loss, name=name, **options)


TERMS = {
    "cross_entropy": lambda name: d.on_labels(name=name),
    "kl": of(d.kl, temperature=2.0),
    "hinton": of(d.hinton(0.5, 2.0), labels=True),
    "mse": of(d.mse),
    "hard_label": of(d.hard_label),
    "reverse_kl": of(d.reverse_kl),
    "jsd": of(d.jsd),
    "total_variation": of(d.total_variation),
    "dkd": of(d.dkd, labels=True),
    "dist": of(d.dist),
    "ensembled": of(lambda s, t: d.ensembled(d.kl)(s, [t, -t])),
    "averaged": of(lambda s, t, *, mask=None: d.averaged(d.dist)(s, [t, -t], mask=mask)),
    "top_k_kl": of(lambda s, t: d.top_k_kl(s, d.top_k(t, 2))),
    "chunked_kl": on(
        lambda s, t, *, mask=None: d.chunked_kl(s, HEAD, t, HEAD[::-1], chunk=4, mask=mask)
    ),
    "chunked_hinton": on(
        lambda s, t, *, mask=None: d.chunked_hinton(
            s, HEAD, t, HEAD, jnp.zeros(s.shape[:-1], jnp.int32), chunk=4, mask=mask
        )
    ),
    "hint": on(d.hint),
    "attention": on(d.attention),
    "fsp": lambda name: d.on_features(d.fsp, ("mid", "end"), ("mid", "end"), name=name),
    "ft": on(d.ft),
    "nst": on(d.nst),
    "vid": on(d.vid, adapter=d.gaussian(2)),
    "ab": on(d.ab),
    "ofd": on(partial(d.ofd, margin=jnp.full(C, -0.5))),
    "review": on(d.review),
    "mgd": on(partial(d.mgd, generate=jnp.sin, key=jax.random.key(4), ratio=0.0)),
    "rkd": on(d.rkd),
    "rkd_distance": on(d.rkd_distance),
    "rkd_angle": on(d.rkd_angle),
    "similarity": on(d.similarity),
    "pkt": on(d.pkt),
    "cc": on(d.cc),
    "ickd": on(d.ickd),
    "cka_loss": on(d.cka_loss),
    "crd": lambda name: d.contrast("mid", "mid", jnp.arange(B), dim=3, negatives=2, name=name),
}
PER_TOKEN = set(TERMS) - set(
    "attention fsp ft nst review rkd rkd_distance rkd_angle similarity pkt cc ickd cka_loss "
    "crd".split()
)


class Given(nn.Module):
    """A student whose outputs are its params: gradients are those to logits and features."""

    @nn.compact
    def __call__(self, x, train=False):
        for name in ("mid", "end"):
            self.sow("intermediates", name, self.param(name, lambda key, name=name: x[name]))
        return self.param("logits", lambda key: x["logits"])


def arrays(seed, batch=B):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        n: jax.random.normal(k, (batch, T, C))
        for n, k in zip(("logits", "mid", "end"), keys, strict=True)
    }


def told(x):
    return {"teacher": x["logits"], "teacher/mid": x["mid"], "teacher/end": x["end"]}


OBJECTIVE = distillation(Given(), [make(name) for name, make in TERMS.items()], inputs="x")
STUDENT, TEACHER = arrays(0), arrays(1)
BATCH = {"x": STUDENT, "label": LABELS, "index": jnp.arange(B), **told(TEACHER)}
PARTS, MEMORY = OBJECTIVE.init(jax.random.key(2), {"params": STUDENT}, BATCH, None)


@jax.jit
def run(params, batch):
    def value(params, parts):
        loss, (_, memory, metrics) = OBJECTIVE.loss(
            params, parts, {}, MEMORY, batch, jax.random.key(3), None, jnp.int32(0)
        )
        return loss, (metrics, memory)

    (_, (metrics, memory)), slopes = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(
        params, PARTS
    )
    return {name: metrics[name] for name in TERMS}, slopes, memory


def dirty(x, mask, padding):
    counts = jnp.broadcast_to(mask if mask.ndim == 2 else mask[:, None], (B, T))[..., None]
    return {name: jnp.where(counts, each, padding) for name, each in x.items()}


def masked(mask, padding=None):
    """Return losses, gradients and memory, after what does not count was overwritten."""
    student, teacher = (
        x if padding is None else dirty(x, mask, padding) for x in (STUDENT, TEACHER)
    )
    counts = jnp.broadcast_to(mask if mask.ndim == 2 else mask[:, None], (B, T))
    labels = LABELS if padding is None else jnp.where(counts, LABELS, -100)
    index = BATCH["index"] if padding is None else jnp.where(counts.any(1), BATCH["index"], 0)
    return run(
        student,
        {**BATCH, "x": student, **told(teacher), "label": labels, "index": index, "mask": mask},
    )


def test_every_loss_has_a_row():
    assert set(TERMS) == set(d.__all__) - NO_LOSSES - UNMASKED


@pytest.mark.slow
@pytest.mark.parametrize("padding", [jnp.nan, jnp.inf, 1e30, 7.0])
@pytest.mark.parametrize("mask", [TOKENS, ROWS], ids=["tokens", "examples"])
def test_padding_changes_no_value_no_gradient_and_no_memory(mask, padding):
    clean, found = masked(mask), masked(mask, padding)
    for name in TERMS:
        np.testing.assert_array_equal(found[0][name], clean[0][name], err_msg=name)
        assert jnp.isfinite(found[0][name]), name
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(clean), strict=True):
        np.testing.assert_array_equal(one, other)
    counts = np.broadcast_to(mask if mask.ndim == 2 else mask[:, None], (B, T))
    for slope in found[1][0].values():
        assert not np.asarray(slope)[~counts].any() and np.asarray(slope)[counts].all(axis=-1).any()


@pytest.mark.slow
def test_a_mask_of_examples_gives_what_the_examples_give_alone():
    kept = np.flatnonzero(ROWS)
    alone = {name: (x if name == "index" else x)[kept] for name, x in BATCH.items() if name != "x"}
    expected = run(
        {name: x[kept] for name, x in STUDENT.items()},
        {**alone, "x": {n: x[kept] for n, x in STUDENT.items()}},
    )
    found = masked(ROWS)
    for name in set(TERMS) - {"crd"}:  # whose negatives are drawn for the shape of the batch
        np.testing.assert_allclose(
            found[0][name], expected[0][name], rtol=2e-5, atol=1e-6, err_msg=name
        )


@pytest.mark.slow
def test_a_mask_of_tokens_gives_what_the_tokens_give_alone():
    def rows(x):  # every token that counts as an example of its own
        return {name: each[TOKENS][:, None] for name, each in x.items()}

    student, teacher = rows(STUDENT), rows(TEACHER)
    batch = {"x": student, "label": LABELS[TOKENS][:, None], **told(teacher)}
    alone = distillation(Given(), [TERMS[name](name) for name in sorted(PER_TOKEN)], inputs="x")
    found = masked(TOKENS)[0]
    expected = jax.jit(
        lambda: alone.loss(student, PARTS, {}, {}, batch, jax.random.key(3), None, jnp.int32(0))[1][
            2
        ]
    )()
    for name in PER_TOKEN:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-5, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_masks_of_other_ranks_are_the_same_mask():
    reference = masked(jnp.broadcast_to(ROWS[:, None], (B, T)))
    for mask in (ROWS, ROWS[:, None, None].astype(jnp.int32)):
        for name, value in run(STUDENT, {**BATCH, "mask": mask})[0].items():
            np.testing.assert_allclose(
                value, reference[0][name], rtol=1e-5, atol=1e-6, err_msg=name
            )


@pytest.mark.wide(17)
@pytest.mark.parametrize("name", TERMS)
def test_a_mask_that_does_not_fit_is_refused_and_the_term_is_named(name):
    alone = distillation(Given(), [TERMS[name](name)], inputs="x")
    parts = {k: v for k, v in PARTS.items() if k == name}
    memory = {k: v for k, v in MEMORY.items() if k == name}
    for shape in ((B, T + 1), (B + 1,), (1, B, T)):
        batch = {**BATCH, "mask": jnp.ones(shape)}
        with pytest.raises(ShapeError, match=f"{name}|predictions"):
            jax.eval_shape(
                lambda p, b=batch: alone.loss(p, parts, {}, memory, b, jax.random.key(0), None, 0)[
                    0
                ],
                STUDENT,
            )


def lossy(term, **changed):
    """Return the error or value of one term under a mask of tokens."""
    objective = distillation(Given(), [term], inputs="x")
    batch = {**BATCH, "mask": TOKENS, **changed}
    return objective.loss(STUDENT, {}, {}, {}, batch, jax.random.key(0), None, jnp.int32(0))[0]


@pytest.mark.slow
def test_a_loss_of_ones_own_cannot_forget_the_mask():
    with pytest.raises(ArgumentError, match="'mine'.*depends on others.*mask="):
        lossy(d.on_features(lambda s, t: d.similarity(s, t), "mid", "mid", name="mine"))
    with pytest.raises(ArgumentError, match="'mine'.*depends on others"):
        lossy(d.on_logits(lambda s, t: d.dist(s, t), name="mine"))
    with pytest.raises((ShapeError, ArgumentError), match="'mine'.*mask="):
        lossy(d.on_features(lambda s, t: d.hint(s, t), "mid", "mid", name="mine"))
    with pytest.raises(ShapeError, match="'mine' gave one number.*mask="):
        lossy(d.Term("mine", lambda seen, parts, memory: (seen.student_logits.mean(), memory)))
    with pytest.raises(ShapeError, match="'mine'.*pool"):
        lossy(
            d.on_features(d.rkd, "mid", "mid", student_transform=lambda x: x.mean(1), name="mine")
        )
    np.testing.assert_allclose(
        lossy(d.on_features(lambda s, t: jnp.square(s - t).mean(-1), "mid", "mid", name="mine")),
        lossy(d.on_features(d.hint, "mid", "mid")),
        rtol=1e-6,
    )


@pytest.mark.slow
def test_a_term_may_have_a_mask_of_its_own_by_name():
    term = d.on_features(d.hint, "mid", "mid", mask="patches")
    found = lossy(term, patches=~TOKENS)
    expected = np.square(np.asarray(STUDENT["mid"] - TEACHER["mid"], np.float64))[
        ~np.asarray(TOKENS)
    ].mean()
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    with pytest.raises(Exception, match="'hint'.*'patches'.*only"):
        lossy(term)


@pytest.mark.slow
def test_pooled_features_know_their_lengths():
    term = d.on_features(
        d.similarity, "mid", "mid", student_transform=d.pool, teacher_transform=d.pool
    )
    real = np.flatnonzero(LENGTHS)
    means = [
        jnp.stack([x["mid"][i, : int(LENGTHS[i])].mean(0) for i in real]) for x in (STUDENT, TEACHER)  # noqa: E501
    ]  # fmt: skip
    np.testing.assert_allclose(lossy(term), d.similarity(*means).mean(), rtol=1e-5)


@pytest.mark.slow
@given(st.data())
@settings(max_examples=60, deadline=None)
def test_what_fits_is_what_the_rule_says(data):
    leading = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    shape = tuple(data.draw(st.lists(st.integers(1, 4), max_size=4)))
    trimmed = shape
    while len(trimmed) > len(leading) and trimmed[-1] == 1:
        trimmed = trimmed[:-1]
    padded = trimmed + (1,) * (len(leading) - len(trimmed))
    right = len(padded) == len(leading) and all(
        n in (1, size) for n, size in zip(padded, leading, strict=True)
    )
    assert fits(jnp.ones(shape), leading) == right
    if right:
        mask = np.arange(np.prod(shape, dtype=int)).reshape(shape) % 2
        np.testing.assert_array_equal(
            fitted(mask, leading), np.broadcast_to(mask.reshape(padded), leading)
        )


def test_weights_are_not_additive_masks_and_not_words():
    assert jnp.isnan(d.masked_mean(jnp.ones(2), jnp.array([0.0, -1e9])))
    with pytest.raises(ArgumentError, match="booleans or weights"):
        d.masked_mean(jnp.ones(2), jnp.ones(2, jnp.complex64))


@pytest.mark.slow
@pytest.mark.parametrize("value", [-jnp.inf, -1e9, -3e38, float(jnp.finfo(jnp.float32).min)])
def test_standardised_logits_leave_masked_classes_out(value):
    there = jnp.array([True, True, False, True, True, False])
    s, t = (jnp.where(there, x["logits"], value) for x in (STUDENT, TEACHER))
    short = [x["logits"][..., np.flatnonzero(there)] for x in (STUDENT, TEACHER)]
    loss, slope = jax.value_and_grad(lambda s: d.kl(d.standardize(s), d.standardize(t), 2.0).sum())(
        s
    )
    expected = d.kl(*map(d.standardize, short), 2.0).sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert expected > 0.1 and jnp.isfinite(slope).all() and not slope[..., ~there].any()
    by_hand = [
        d.standardize(jnp.where(there, x["logits"], -1e4), mask=there) for x in (STUDENT, TEACHER)
    ]
    np.testing.assert_allclose(d.kl(*by_hand, 2.0).sum(), expected, rtol=1e-5)


@pytest.mark.slow
def test_padding_leaves_the_bank_of_contrast_alone():
    bank = d.Bank(jnp.eye(3), jnp.eye(3))
    new = jnp.array([[1.0, 1.0, 0.0], [jnp.nan] * 3])
    after = d.crd_update(bank, new, new, jnp.array([0, 0]), mask=jnp.array([1, 0]))
    expected = d.crd_update(bank, new[:1], new[:1], jnp.array([0]))
    jax.tree.map(np.testing.assert_array_equal, after, expected)
