"""Rules divide all that belongs to a param as the param is divided, and change no number."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import compress_jax as cj
from compress_jax.core.errors import ArgumentError
from compress_jax.train._parallel import automatic, fitting, unmatched

RULES = (("dense/kernel", P("fsdp", "tensor")),)


def mesh():
    return cj.train.make_mesh(fsdp=2, tensor=2)


def specs(compression, optimizer):
    """Return how each array of a state is divided, by path."""
    variables = {"params": {"dense": {"kernel": jnp.ones((32, 8)), "bias": jnp.ones(8)}}}
    state = cj.train.create(variables, compression, optimizer, jax.random.key(0))
    where = cj.train.shardings(state, mesh(), RULES)
    found = jax.tree_util.tree_leaves_with_path(where)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(each.spec)
        for path, each in found
    }


def entry(found, words):
    """Return how the one array is divided whose path holds these words in this order."""
    pattern = re.compile(".*".join(words.split()))
    (spec,) = (spec for path, spec in found.items() if pattern.match(path))
    return spec


def test_sharded_over_a_mesh_that_is_filled_or_refused():
    assert dict(cj.train.make_mesh(tensor=2).shape) == {"data": 4, "tensor": 2}
    with pytest.raises(ArgumentError, match="data=3, fsdp=2 does not fill 8 devices"):
        cj.train.make_mesh(data=3, fsdp=2)


def test_scales_are_sharded_as_their_channels_and_groups_are():
    learned = cj.at("**/kernel", cj.quantize.lsq(4, granularity="channel"))
    found = specs(learned, optax.adam(0.1))
    assert entry(found, "params dense/kernel") == ("fsdp", "tensor")
    assert entry(found, "learned kernel/scale") == (None, "tensor")
    assert entry(found, "opt_state mu learned kernel/scale") == (None, "tensor")
    assert entry(found, "opt_state mu params dense/kernel") == ("fsdp", "tensor")
    assert entry(found, "params dense/bias") == ()
    groups = cj.at("**/kernel", cj.quantize.lsq(4, granularity=8))
    # [groups, 1, channels]: four groups along the contracted axis.
    found = specs(groups, optax.sgd(0.1))
    assert entry(found, "learned kernel/scale") == ("fsdp", None, "tensor")


def test_factored_moments_are_sharded_along_the_axis_they_keep():
    found = specs(cj.identity(), optax.adafactor(0.1, min_dim_size_to_factor=4))
    assert entry(found, "opt_state v_row params dense/kernel") == ("tensor",)  # [8]
    assert entry(found, "opt_state v_col params dense/kernel") == ("fsdp",)  # [32]


def test_what_is_not_sharded_is_listed_and_rules_that_fit_no_more_are_left_out():
    params = {"dense": {"kernel": jnp.ones((32, 8)), "bias": jnp.ones(8)}}
    assert unmatched(params, RULES) == ["dense/bias"]
    narrow = {"dense": {"kernel": jnp.ones((32, 7)), "bias": jnp.ones(7)}}
    assert fitting(narrow, mesh(), RULES) == ()
    assert fitting(params, mesh(), RULES) == RULES


def experiment(**options):
    rng = np.random.default_rng(0)
    arrays = {
        "image": rng.normal(size=(160, 8, 8, 1)).astype(np.float32),
        "label": rng.integers(0, 4, 160),
    }
    training = cj.search.Training(optax.adam(3e-3), 4, batch_size=16)
    rules = options.pop("rules", ())
    small = cj.chain(cj.prune.magnitude(0.5), cj.quantize.uniform(4, granularity=16))
    return cj.search.Experiment(
        "shared",
        cj.data.Data.from_arrays(arrays),
        cj.search.Network(cj.models.LeNet300100(4, (128, 64)), training, rules=rules),
        (cj.search.Candidate("small", cj.at("dense_*/kernel", small), training),),
        cj.search.Requirement(max_drop=0.9),
        teacher=cj.search.Network(cj.models.LeNet300100(4, (128, 64)), training, rules=rules),
        loss=cj.tasks.classification().distillation(alpha=0.5),
        **options,
    )


DIVIDED = (
    ("dense_*/kernel", P("fsdp", "tensor")),
    ("dense_*/bias", P("tensor")),
    ("head/kernel", P("fsdp", None)),
)


@pytest.mark.slow
def test_a_sharded_run_ends_as_one_that_is_whole(tmp_path):
    # Axes as `jax.make_mesh` makes them by default, explicit ones.
    divided = experiment(rules=DIVIDED, mesh=jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor")))
    lines = []
    ours = cj.search.compress(divided, tmp_path / "divided", log_fn=lines.append)
    assert any("every device holds 1 of its params whole" in line for line in lines)
    whole = cj.search.compress(experiment(), tmp_path / "whole", log_fn=lambda line: None)
    assert [row.nbytes for row in ours.rows] == pytest.approx(
        [row.nbytes for row in whole.rows], rel=0.01
    )
    packed = [cj.unpack(cj.load(result.artifact)[0])["params"] for result in (ours, whole)]
    for a, b in zip(*map(jax.tree.leaves, packed), strict=True):
        # Sums in another order; a code near a tie may flip.
        assert (np.abs(a - b) > 0.02 * np.abs(b).max()).mean() < 0.01


def test_rules_that_match_nothing_are_refused_before_anything_is_sharded(tmp_path):
    wrong = experiment(rules=(("dens_0/kernel", P("fsdp")),), mesh=mesh())
    with pytest.raises(cj.core.NoMatchError, match="teacher: .*dens_0/kernel"):
        cj.search.compress(wrong, tmp_path)
    with pytest.raises(cj.core.ConfigError, match="rules must be a tuple of rules"):
        experiment(rules=[("dense_0/kernel", P("fsdp"))])


def test_explicit_axes_become_automatic_before_anything_is_sharded():
    explicit = jax.make_mesh((8,), ("data",))
    assert explicit.axis_types != (AxisType.Auto,) == automatic(explicit).axis_types
    assert automatic(explicit).devices.tolist() == explicit.devices.tolist()


def test_a_plan_counts_what_each_device_holds_when_sharded():
    plans = {each.stage: each for each in cj.search.plan(experiment(rules=DIVIDED, mesh=mesh()))}
    assert list(plans) == ["teacher", "student", "candidate small"]
    kernels = 64 * 128 + 128 * 64
    rest = (128 + 64) // 2 + 64 * 4 // 2 + 4
    assert plans["student"].arguments["params"] == 4 * (kernels // 4 + rest)
    # Adam's moments of the same shapes, and its counts of steps.
    moments = plans["student"].arguments["optimizer"] - 2 * plans["student"].arguments["params"]
    assert 0 <= moments <= 64
    assert plans["student"].arguments["teacher"] == plans["student"].arguments["params"]
    assert "teacher" not in plans["teacher"].arguments
    assert plans["candidate small"].arguments["compression"] >= kernels // 4  # masks, scales
    assert plans["student"].numbers["all-reduce"] > 0 and plans["student"].flops > 0
    # Teacher and student are the same network: a quarter of the models' FLOPs each forward pass.
    parts = plans["student"].parts
    assert parts.parts["teacher"] == parts.parts["student forward"] == parts.model / 4
    assert plans["student"].flops == parts.total / 8
