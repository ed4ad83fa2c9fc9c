"""What a stage is made of: equal for equal values and code, in any process."""

import functools
import importlib
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import compress_jax as cj
from compress_jax.models import LeNet300100, ResNet
from compress_jax.search._ingredients import ingredients


def pruned() -> cj.Compression:
    return cj.every(10, cj.prune.magnitude(cj.prune.cubic(0.9, 0, 50)))


MAKE = {
    "float": lambda: 0.5, "array": lambda: np.arange(3), "key": lambda: jax.random.key(3),
    "nested": lambda: {"a": [1, (2, {3})]}, "model": lambda: ResNet(depth=8, width=4),
    "partial": lambda: functools.partial(optax.adam, 1e-3, b1=0.8),
    "jitted": lambda: jax.jit(lambda x: x + 1),
    "adam": lambda: optax.adamw(optax.cosine_decay_schedule(0.1, 50), weight_decay=1e-4),
    "uniform": lambda: cj.quantize.uniform(4, granularity="channel"),
    "lsq": lambda: cj.quantize.lsq(3),
    "kmeans": lambda: cj.cluster.kmeans(8), "svd": lambda: cj.lowrank.svd(2),
    "n:m": lambda: cj.prune.magnitude(0.5, cj.prune.n_m(2, 4)),
    "chain": lambda: cj.at("**/kernel", cj.chain(pruned(), cj.quantize.uniform(4))),
    "terms": lambda: (cj.distill.on_logits(cj.distill.kl, temperature=2.0), cj.distill.on_labels()),
    "hinton": lambda: cj.distill.hinton(0.1, 4.0), "rng": lambda: np.random.default_rng(0),
    "type": lambda: jnp.bfloat16,
}  # fmt: skip


@pytest.mark.wide(2)
@pytest.mark.parametrize("which", MAKE)
def test_what_is_made_alike_is_alike_also_after_use(which):
    one = MAKE[which]()
    before = ingredients(it=one)
    assert ingredients(it=MAKE[which]()) == before
    if isinstance(one, cj.Compression):
        params = {"a": {"kernel": jnp.linspace(-1.0, 1.0, 64).reshape(8, 8)}}
        one.pack(
            params,
            one.update(
                params, one.init(params), step=jnp.asarray(10), grads=params, key=jax.random.key(0)
            ),
        )
        assert ingredients(it=one) == before, "using it is no change"


OTHERS = [
    (cj.quantize.uniform(4), cj.quantize.uniform(8), cj.quantize.uniform(4, symmetric=False)),
    (cj.quantize.uniform(4), cj.quantize.uniform(4, scale="mse"), cj.quantize.uniform(4,
        granularity=4)),
    (optax.adam(1e-3), optax.adam(2e-3), optax.adam(1e-3, b1=0.8), optax.adamw(1e-3),
        optax.chain(optax.adam(1e-3))),
    (LeNet300100(3, (8, 4)), LeNet300100(3, (4, 8)), LeNet300100(4, (8, 4)), LeNet300100(3, (8,
        4), jnp.bfloat16)),
    (np.zeros(3), np.zeros(4), np.zeros(3, np.float32), np.array([0, 0, 1e-300])),
    (cj.distill.hinton(0.1, 4.0), cj.distill.hinton(0.1, 5.0), cj.distill.hinton(0.2, 4.0),
        cj.distill.kl),
    (1, 1.0, True, "1", None, [1], (1,), {1}),
]  # fmt: skip


@pytest.mark.parametrize("values", OTHERS, ids=lambda values: type(values[0]).__name__)
def test_what_differs_in_a_value_differs(values):
    found = [tuple(sorted(ingredients(it=value).items())) for value in values]
    assert len(set(found)) == len(values)


HELPERS = '''
"""Helpers of one's own."""
import jax.numpy as jnp
from flax import linen as nn
WIDTH, UNUSED = 8, 3

def scaled(x, by=2.0):
    """Scale."""
    return x * by

def elsewhere(x):
    return x - 1

class Net(nn.Module):
    width: int = 4

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(self.width, name="d")(self.act(x))

    def act(self, x):
        return nn.relu(x)
'''

CONFIG = """
import functools
import helpers
from helpers import scaled as by_two

def loss(s, t, y):
    return by_two(s).sum(-1)

def late(key, batch):
    from helpers import elsewhere
    return elsewhere(batch)

def named(x):
    return getattr(helpers, "else" + "where")(x)

class Base:
    factor = 3

    def __call__(self, x):
        return helpers.scaled(x, self.factor)

def everything():
    half = helpers.WIDTH / 2
    return {"loss": loss, "late": late, "net": helpers.Net(2), "object": Base(),
        "closure": lambda x: x * half,
            "named": named, "partial": functools.partial(loss, t=None)}
"""

# What is changed in the helpers, and what of `everything` it changes.
EDITS = {
    ("return x * by", "return x / by"): {"loss", "object", "partial"},
    ("by=2.0", "by=3.0"): {"loss", "object", "partial"},
    ("return x - 1", "return x - 2"): {"late"},
    ("WIDTH, UNUSED = 8", "WIDTH, UNUSED = 9"): {"closure"},
    ("nn.relu", "nn.gelu"): {"net"},
    ("UNUSED = 8, 3", "UNUSED = 8, 4"): set(),
    ("    return x - 1", "    # a comment\n\n    return x - 1"): set(),
    ('"""Scale."""', '"""Scale it."""'): set(),
}


def loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, helpers: str
) -> dict[str, dict[str, str]]:
    """Return the ingredients of everything, from files imported anew."""
    folder.mkdir(exist_ok=True)
    (folder / "helpers.py").write_text(helpers)
    (folder / "own.py").write_text(CONFIG)
    monkeypatch.syspath_prepend(str(folder))
    for name in ("helpers", "own"):
        sys.modules.pop(name, None)
    own = importlib.import_module("own")
    return {name: ingredients(it=value) for name, value in own.everything().items()}


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit[1][:20].strip())
def test_code_of_ones_own_counts_by_what_it_does_and_only_where_it_is_used(
    edit, tmp_path, monkeypatch
):
    before = loaded(tmp_path / "before", monkeypatch, HELPERS)
    after = loaded(tmp_path / "after", monkeypatch, HELPERS.replace(*edit))
    assert HELPERS.count(edit[0]) == 1 or edit[0] == "return x - 1"
    assert {name for name in before if before[name] != after[name]} - {"named"} == EDITS[edit]
    if EDITS[edit]:  # a name that is put together may mean anything in the module
        assert before["named"] != after["named"]


def test_another_process_finds_the_same(tmp_path, monkeypatch):
    here = loaded(tmp_path, monkeypatch, HELPERS)
    code = """
        import json, sys
        sys.path.insert(0, sys.argv[1])
        import own
        from compress_jax.search._ingredients import ingredients
        print(json.dumps({name: ingredients(it=value) for name, value in own.everything().items()}))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    assert (
        json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
        == here
    )


def test_what_a_function_keeps_as_it_runs_is_no_setting():
    """Lists, caches and counts that a function changes are no settings; what it reads is one."""
    calls, cache, settings, count = [], {}, {"bits": 4}, 0

    def counted(x):
        nonlocal count
        count += 1
        calls.append(x)
        cache[x] = x * settings["bits"]
        return cache[x]

    before = ingredients(it=counted)
    counted(3)
    assert ingredients(it=counted) == before
    settings["bits"] = 8
    assert ingredients(it=counted) != before


def test_versions_of_what_is_used_are_named():
    found = ingredients(it=optax.sgd(0.1))
    assert {f"version of {name}" for name in ("jax", "flax", "optax", "python")} <= set(found)


def test_cycles_and_what_is_large_end():
    cycle: list = [1]
    cycle.append(cycle)
    assert ingredients(it=cycle) == ingredients(it=cycle)
    assert len(ingredients(it=list(range(300_000)))) <= 100_020
