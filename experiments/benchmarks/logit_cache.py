"""A teacher online against its logits from a cache.

Time of a step, size on disk, and how far the students end up apart.

python experiments/benchmarks/logit_cache.py     # about a minute of two cores

The teacher is a ResNet-8 of width 16 on 28x28 images, the student LeNet-300-100; batch 128, crops
that are a function of the example and the view (two views). Both students see the same crops in the
same order for 40 steps. Steps take turns, reading the batch (and the cache) included; distance is
that of the trained weights, relative to how far they moved.
"""

import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from interleave import interleaved, milliseconds, ratio, report

import compress_jax as cj
from compress_jax import distill as d
from compress_jax.data import batches, random_crop_flip
from compress_jax.models import LeNet300100, ResNet
from compress_jax.train import create, distillation, make_step

EXAMPLES, BATCH, STEPS, CLASSES, VIEWS, ROUNDS = 1_280, 128, 40, 10, 2, 9
HEAD = [
    "teacher",
    "k",
    "stored as",
    "bytes an example and view",
    "ms",
    "ratio of time",
    "ratio of processor time",
    "distance",
]


def crop(key: jax.Array, image: jax.Array) -> jax.Array:
    return random_crop_flip(key, image[None])[0]


def main() -> None:
    rng = np.random.default_rng(0)
    split = {
        "image": rng.normal(size=(EXAMPLES, 28, 28, 1)).astype(np.float32),
        "label": np.arange(EXAMPLES) % CLASSES,
    }
    split["index"] = np.arange(EXAMPLES, dtype=np.int32)
    large, small, view = (
        ResNet(depth=8, width=16, stem_stride=2),
        LeNet300100(),
        d.by_example(crop, seed=0),
    )
    teacher = d.Teacher(large.apply, jax.jit(large.init)(jax.random.key(0), split["image"][:1]))
    variables = jax.jit(small.init)(jax.random.key(1), split["image"][:1])
    feed, optimizer = batches(split, BATCH, seed=0), optax.adam(1e-3)
    folder, who = Path(tempfile.mkdtemp()), d.hexadecimal(d.fingerprint(teacher))

    class Viewed:
        def __getitem__(self, step: int) -> Any:
            batch = feed[step]
            return {**batch, "view": np.full(BATCH, step // feed.steps_per_epoch % VIEWS, np.int32)}

    def written(k: int, dtype: str) -> d.CachedFeed:
        place = folder / f"{k}-{dtype}"
        d.write_cache(
            place,
            teacher,
            split,
            teacher_sha256=who,
            data_sha256="random",
            k=k,
            views=VIEWS,
            augment=view,
            dtype=dtype,
        )
        return d.CachedFeed(
            feed,
            d.open_cache(place, teacher_sha256=who, data_sha256="random"),
            feed.steps_per_epoch,
        )

    forms: dict[Any, tuple[Any, Any, Any]] = {
        ("online", CLASSES, "-"): (Viewed(), d.on_logits(d.kl), teacher)
    }
    for k, dtype in ((CLASSES, "float32"), (CLASSES, "bfloat16"), (4, "bfloat16")):
        forms["cache", k, dtype] = written(k, dtype), d.on_logits(d.top_k_kl), None
    steps, trained = {}, {}
    for form, (source, term, given) in forms.items():
        step = jax.jit(
            make_step(distillation(small, [term], augment=view), optimizer, cj.identity())
        )
        state = create(variables, cj.identity(), optimizer, jax.random.key(2))
        for i in range(STEPS):
            state, _ = step(state, source[i], teacher=given)
        trained[form] = state.params
        steps[form] = lambda step=step, state=state, source=source, given=given: step(
            state, source[0], teacher=given
        )
    runs = interleaved(steps, ROUNDS)
    base, rows = next(iter(forms)), []
    moved = distance(trained[base], variables["params"])
    for form in forms:
        size = (
            form[1] * (4 + (2 if form[2] == "bfloat16" else 4)) + 4 if form[0] == "cache" else "-"
        )
        wall = ratio([r.wall for r in runs[form]], [r.wall for r in runs[base]])
        cpu = ratio([r.cpu for r in runs[form]], [r.cpu for r in runs[base]])
        apart = f"{distance(trained[form], trained[base]) / moved:.1e}"
        rows.append([*form, size, milliseconds(r.wall for r in runs[form]), wall, cpu, apart])
    report("logit_cache", HEAD, rows, rounds=ROUNDS)


def distance(a: Any, b: Any) -> float:
    return float(optax.global_norm(jax.tree.map(jnp.subtract, a, b)))


if __name__ == "__main__":
    main()
