"""Mask update: time and memory of bisection on float bits, argsort and top_k, on 1 to 8 devices.

python experiments/benchmarks/mask_update.py                              # 1e6, 1e7, 1e8 weights;
about 5 minutes on 2 cores python experiments/benchmarks/mask_update.py --devices 8 --sizes 1e7
# sharded over emulated devices; about 5 minutes python experiments/benchmarks/mask_update.py
--memory --sizes 1e8                 # nothing runs; seconds python
experiments/benchmarks/mask_update.py --memory --sizes 1e8 --devices 8

Memory is what the compiled program allocates on each device beside the weights: its temporaries and
the mask.
"""

import argparse
import os
from typing import Any


def arguments() -> argparse.Namespace:
    """Parse the command line, before importing jax fixes the number of devices."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes", type=lambda s: int(float(s)), nargs="+", default=[10**6, 10**7, 10**8]
    )
    parser.add_argument("--rounds", type=int, help="default: 11 to 1e6 weights, 5 to 1e7, else 1")
    parser.add_argument("--devices", type=int, default=1, help="emulated CPU devices to shard over")
    every = ["bisection", "argsort", "top_k"]
    parser.add_argument(
        "--methods", nargs="+", choices=every, default=every, help="bisection first"
    )
    parser.add_argument(
        "--memory", action="store_true", help="compile only, and tell what would be allocated"
    )
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


def by_top_k(x: jax.Array) -> jax.Array:
    """Return the mask of all entries at least the n-th largest; ties make it inexact."""
    largest, _ = jax.lax.top_k(jnp.abs(x).ravel(), x.size - int(args.sparsity * x.size + 0.5))
    return jnp.abs(x) >= largest[-1]


def by_bisection(x: jax.Array) -> jax.Array:
    """Return the mask of `magnitude`."""
    return magnitude(args.sparsity).init({"w": x}).fixed["w"]


def sharding() -> jax.sharding.NamedSharding:
    """Return how weights lie on the devices: rows spread over them."""
    mesh = jax.make_mesh((args.devices,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))


def compiled(size: int) -> dict[str, Any]:
    """Compile the methods for a kernel of 1000 columns."""
    x = jax.ShapeDtypeStruct((size // 1000, 1000), jnp.float32, sharding=sharding())
    return {name: jax.jit(fn).lower(x).compile() for name, fn in METHODS.items()}


METHODS = {"bisection": by_bisection, "argsort": by_argsort, "top_k": by_top_k}
METHODS = {name: METHODS[name] for name in args.methods}


def memory(size: int) -> list[Any]:
    """Return the MB that each method allocates on each device beside its arguments."""
    sizes = [program.memory_analysis() for program in compiled(size).values()]
    found = [each.temp_size_in_bytes + each.output_size_in_bytes for each in sizes]
    return [
        f"{size:.0e}",
        args.devices,
        f"{4 * size / args.devices / 1e6:,.0f}",
        *(f"{each / 1e6:,.0f}" for each in found),
    ]


def compare(size: int) -> list[Any]:
    """Time the methods on one size and check that they agree."""
    programs = compiled(size)
    shape = (size // 1000, 1000)
    x = jax.jit(lambda key: jax.random.normal(key, shape), out_shardings=sharding())(
        jax.random.key(0)
    )
    times = interleaved(
        {name: lambda f=f: f(x) for name, f in programs.items()}, args.rounds or rounds(size)
    )
    if "argsort" in programs:
        assert bool((programs["bisection"](x) == programs["argsort"](x)).all()), "the masks differ"
    ours, *others = ([run.wall for run in each] for each in times.values())
    cells = [milliseconds(each) for each in (ours, *others)]
    return [f"{size:.0e}", args.devices, len(ours), *cells, *(ratio(each, ours) for each in others)]


def rounds(size: int) -> int:
    """Return how many rounds are affordable."""
    return 11 if size <= 10**6 else 5 if size <= 10**7 else 1


name = "mask_memory" if args.memory else "mask_update"
name += "" if args.devices == 1 else f"_{args.devices}_devices"
if args.memory:
    head = ["weights", "devices", "weights MB a device", *(f"{method} MB" for method in METHODS)]
    report(name, head, [memory(size) for size in args.sizes], sparsity=args.sparsity)
else:
    head = ["weights", "devices", "rounds", *(f"{method} ms" for method in METHODS)]
    head += [f"{method} / bisection" for method in list(METHODS)[1:]]
    report(name, head, [compare(size) for size in args.sizes], sparsity=args.sparsity)
