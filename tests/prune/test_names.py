"""Old public names of pruning: they work for one version, and warn."""

import jax
import jax.numpy as jnp
import pytest

import compress_jax as cj

RENAMED = {
    "Seen": "ScoreInputs",
    "grown": "newly_active",
    "masked": "by_score",
    "set": "sparse_evolution",
    "ste": "straight_through",
}


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_name_is_the_new_one_and_warns(old):
    with pytest.warns(DeprecationWarning, match=rf"prune\.{old} is now .*prune\.{RENAMED[old]}"):
        assert getattr(cj.prune, old) is getattr(cj.prune, RENAMED[old])
    assert old not in dir(cj.prune) and old not in cj.prune.__all__


@pytest.mark.slow
def test_old_arguments_work_and_warn():
    key = jax.random.key(0)
    for call in (
        lambda: cj.prune.sparse_evolution(0.5, 10, key, until=0.5),
        lambda: cj.prune.rigl(0.5, 10, key, until=0.5),
        lambda: cj.prune.movement(0.5, rate=0.1),
        lambda: cj.prune.for_bytes(0.9, lambda s: {"w": s}, {"w": jnp.ones((8, 8))}, turns=2),
    ):
        with pytest.warns(DeprecationWarning, match="is now"):
            call()


def test_importance_lists_its_public_names_only():
    assert dir(cj.prune.importance) == sorted(cj.prune.importance.__all__)
