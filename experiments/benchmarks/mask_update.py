"""Mask update: bisection on the float bits against argsort, on one device or on several emulated ones.

python experiments/benchmarks/mask_update.py                              # 1e6, 1e7, 1e8 weights; about 3 minutes on 2 cores
python experiments/benchmarks/mask_update.py --devices 8 --sizes 1e7      # sharded; about 3 minutes
"""

import argparse
import os
from typing import Any


def arguments() -> argparse.Namespace:
    """Read the command line; it is read before jax is imported, which fixes the number of devices."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=lambda s: int(float(s)), nargs="+", default=[10**6, 10**7, 10**8])
    parser.add_argument("--rounds", type=int, help="default: 11 to 1e6 weights, 5 to 1e7, else 1")
    parser.add_argument("--devices", type=int, default=1, help="emulated CPU devices to shard over")
    parser.add_argument("--sparsity", type=float, default=0.9)
    return parser.parse_args()


args = arguments()
if args.devices > 1:
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={args.devices}"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from interleave import interleaved, milliseconds, ratio, report  # noqa: E402

from compress_jax.prune import magnitude  # noqa: E402


def by_argsort(x: jax.Array) -> jax.Array:
    """Return the mask the usual way: sort all magnitudes, drop the first ones."""
    order = jnp.argsort(jnp.abs(x).ravel())
    kept = jnp.ones(x.size, bool).at[order[: int(args.sparsity * x.size + 0.5)]].set(False)
    return kept.reshape(x.shape)


def weights(size: int) -> jax.Array:
    """Return a random kernel of 1000 columns, its rows spread over the devices."""
    mesh = jax.make_mesh((args.devices,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    return jax.jit(lambda key: jax.random.normal(key, (size // 1000, 1000)), out_shardings=rows)(jax.random.key(0))


def compare(size: int) -> list[Any]:
    """Time both on one size and check that they agree."""
    x, c = weights(size), magnitude(args.sparsity)
    bisection: Any = jax.jit(lambda x: c.init({"w": x}).fixed["w"]).lower(x).compile()
    argsort: Any = jax.jit(by_argsort).lower(x).compile()
    runs = {"bisection": lambda: bisection(x), "argsort": lambda: argsort(x)}
    times = interleaved(runs, args.rounds or (11 if size <= 10**6 else 5 if size <= 10**7 else 1))
    assert bool((bisection(x) == argsort(x)).all()), "the masks differ"
    ours, theirs = ([run.wall for run in times[name]] for name in runs)
    return [f"{size:.0e}", args.devices, len(ours), milliseconds(ours), milliseconds(theirs), ratio(theirs, ours)]


head = ["weights", "devices", "rounds", "bisection ms", "argsort ms", "argsort / bisection"]
name = "mask_update" if args.devices == 1 else f"mask_update_{args.devices}_devices"
report(name, head, [compare(size) for size in args.sizes], sparsity=args.sparsity)
