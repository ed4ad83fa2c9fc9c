"""Names of leaves and the globs that choose among them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from compress_jax.core.errors import NoMatchError
from compress_jax.core.packed import Sparse
from compress_jax.core.paths import flatten, match, matches


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(nn.Dense(3, name="body")(x))


class NnxMlp(nnx.Module):
    def __init__(self, rngs):
        self.body = nnx.Linear(2, 3, rngs=rngs)
        self.head = nnx.Linear(3, 2, rngs=rngs)


NAMES = ["body/bias", "body/kernel", "head/bias", "head/kernel"]


@pytest.mark.slow
def test_linen_nnx_and_plain_dicts_have_the_same_names():
    linen = Mlp().init(jax.random.key(0), jnp.ones((1, 2)))["params"]
    _, state = nnx.split(NnxMlp(nnx.Rngs(0)), nnx.Param)
    plain = {
        layer: {leaf: jnp.ones(1) for leaf in ("kernel", "bias")} for layer in ("head", "body")
    }
    assert list(flatten(linen)[0]) == list(flatten(state)[0]) == list(flatten(plain)[0]) == NAMES


def test_nnx_state_is_rebuilt_and_merges_into_a_working_module():
    graph, state = nnx.split(NnxMlp(nnx.Rngs(0)))
    leaves, rebuild = flatten(state)
    zeroed = rebuild({path: jnp.zeros_like(x) for path, x in leaves.items()})
    assert type(zeroed) is type(state)
    assert nnx.merge(graph, zeroed).body(jnp.ones((1, 2))).tolist() == [[0.0, 0.0, 0.0]]


def test_containers_of_every_kind_nest_and_rebuild_exactly():
    tree = {"blocks": [{"w": 1.0}, ({"w": 2.0}, 3.0)], "none": None, "n": 4}
    leaves, rebuild = flatten(tree)
    assert leaves == {"blocks/0/w": 1.0, "blocks/1/0/w": 2.0, "blocks/1/1": 3.0, "n": 4}
    assert rebuild(leaves) == tree
    assert rebuild({path: -x for path, x in leaves.items()})["blocks"] == [
        {"w": -1.0},
        ({"w": -2.0}, -3.0),
    ]


def test_a_dict_key_named_value_keeps_its_name_and_a_bare_leaf_has_an_empty_one():
    assert list(flatten({"a": {"value": 1.0}})[0]) == ["a/value"]
    assert flatten(7.0)[0] == {"": 7.0}


def test_packed_nodes_are_leaves_in_plain_and_in_nnx_trees():
    node = Sparse.pack(jnp.ones(2), jnp.ones(2, bool))
    assert flatten({"a": {"kernel": node}})[0]["a/kernel"] is node
    _, state = nnx.split(NnxMlp(nnx.Rngs(0)))
    leaves, rebuild = flatten(state)
    assert flatten(rebuild({**leaves, "body/kernel": node}))[0]["body/kernel"] is node


def test_two_leaves_of_one_name_are_refused():
    with pytest.raises(ValueError, match="same name"):
        flatten({"a/b": 1.0, "a": {"b": 2.0}})


def test_matching_nothing_raises_and_lists_every_leaf():
    with pytest.raises(NoMatchError) as error:
        match("**/kernle", NAMES)
    assert all(name in str(error.value) for name in ["**/kernle", *NAMES])
    with pytest.raises(NoMatchError, match="no leaves"):
        match("**", [])


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("**/kernel", ["kernel", "a/kernel", "a/b/kernel"]),
        ("*/kernel", ["a/kernel"]),
        ("a/**", ["a", "a/kernel", "a/b/kernel", "a/x.kernel"]),
        ("a/**/kernel", ["a/kernel", "a/b/kernel"]),
        ("**", ["kernel", "a", "a/kernel", "a/b/kernel", "a/x.kernel", "layer_1/b[0]"]),
        ("**kernel", ["kernel", "a/kernel", "a/b/kernel", "a/x.kernel"]),
        ("a?kernel", []),
        ("a[!x]kernel", []),
        ("a[/]kernel", []),
        ("a/x.kernel", ["a/x.kernel"]),
        ("layer_[0-3]/b[[]0]", ["layer_1/b[0]"]),
        ("layer_[!0]/*", ["layer_1/b[0]"]),
        (("kernel", "a"), ["kernel", "a"]),
    ],
)
def test_globs_on_known_names(pattern, found):
    names = ["kernel", "a", "a/kernel", "a/b/kernel", "a/x.kernel", "layer_1/b[0]"]
    assert [name for name in names if matches(pattern, name)] == found


def glob(pattern: str, text: str) -> bool:
    """Match by trying every split: written from the words of the docstring, without regular
    expressions."""
    if pattern == "/**":
        return text == "" or text[0] == "/"
    if pattern.startswith("**/"):
        return any(
            glob(pattern[3:], text[i:])
            for i in range(len(text) + 1)
            if i == 0 or text[i - 1] == "/"
        )
    if pattern.startswith("**"):
        return any(glob(pattern[2:], text[i:]) for i in range(len(text) + 1))
    if pattern.startswith("*"):
        return any(glob(pattern[1:], text[i:]) for i in range(len(text) + 1) if "/" not in text[:i])
    if not pattern or not text:
        return pattern == text
    cut = pattern.index("]") + 1 if pattern[0] == "[" else 1
    head, rest = pattern[:cut], pattern[cut:]
    one = {"?": text[0] != "/", "[ab]": text[0] in "ab", "[!a]": text[0] not in "a/"}.get(
        head, head == text[0]
    )
    return one and glob(rest, text[1:])


PIECES = ["**/", "/**", "**", "*", "?", "a", "b", "ab", "/", "[ab]", "[!a]"]
pieces = st.lists(st.sampled_from(PIECES), max_size=5).map("".join)
names = st.lists(st.text("ab", min_size=1, max_size=2), min_size=1, max_size=4).map("/".join)


@settings(max_examples=500, deadline=None)
@given(pieces, names)
@example("**/a", "a")
@example("a/**", "a")
@example("a/**/b", "a/b")
@example("*/b", "a/a/b")
@pytest.mark.slow
def test_globs_agree_with_an_independent_matcher(pattern, name):
    assume("***" not in pattern)
    assert matches(pattern, name) == glob(pattern, name)
