"""Bits a weight of the whole file beside ISO/IEC 15938-17 (nncodec), at equal error of the weights.

    pip install -e '.[bench]'
    python experiments/coding/beside_nncodec.py            # several minutes

LeNet-300-100 is trained on the 8x8 digits of scikit-learn. Ours: `quantize.rate_distortion` with
the one step that `step_for_error` finds, and `quantize.trellis`, on all leaves, biases too, saved
by ``save(coded=True)``.
Theirs: the package's `compress` with its defaults (DeepCABAC, parameter optimization, biases at its
own finer step), uniform and dependent (trellis) quantization, each kernel as it is and transposed,
whichever is smaller, at every quantization parameter; between two parameters, bits are interpolated
over the logarithm of the error. The error is that of all weights together, relative to their norm;
both files are decoded again for it, and for the accuracy on held-out digits.
"""

import argparse
import contextlib
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from nncodec import nnc  # pyright: ignore[reportMissingImports]
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import compress_jax as cj
from compress_jax.core.paths import flatten
from compress_jax.models import LeNet300100

Weights = dict[str, np.ndarray]


class Point(NamedTuple):
    """A compressed network: its whole file in bits a weight, its error, and its accuracy."""

    bits: float
    error: float
    accuracy: float
    encode: float
    decode: float


class Network(NamedTuple):
    """A trained network: its params and what they are measured by."""

    params: Any
    accuracy: Callable[[Any], float]

    @property
    def weights(self) -> Weights:
        """The leaves by path."""
        return {path: np.asarray(x) for path, x in flatten(self.params)[0].items()}

    def point(self, size: int, back: Weights, encode: float, decode: float) -> Point:
        """Measure what a file of a size decodes to."""
        weights = self.weights
        lost = sum(float(np.square(back[path] - x).sum()) for path, x in weights.items())
        norm = sum(float(np.square(x).sum()) for x in weights.values())
        count = sum(x.size for x in weights.values())
        rebuilt = flatten(self.params)[1]({path: jnp.asarray(x) for path, x in back.items()})
        accuracy = self.accuracy(rebuilt)
        return Point(8 * size / count, (lost / norm) ** 0.5, accuracy, encode, decode)


def trained(seed: int, steps: int) -> Network:
    """Return LeNet-300-100, trained on four fifths of the digits."""
    digits: Any = load_digits()
    images, labels = (digits.images[..., None] / 16).astype(np.float32), digits.target
    x, held_x, y, held_y = train_test_split(images, labels, test_size=0.2, random_state=seed)
    model: Any = LeNet300100()
    params = model.init(jax.random.key(seed), x[:1])["params"]
    optimizer = optax.adamw(1e-3, weight_decay=1e-2)

    @jax.jit
    def step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            logits = model.apply({"params": params}, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        batch = rng.integers(0, len(x), 128)
        params, state = step(params, state, x[batch], y[batch])

    def accuracy(params: Any) -> float:
        found = jnp.argmax(model.apply({"params": params}, held_x), -1)
        return 100 * float((np.asarray(found) == held_y).mean())

    return Network(params, accuracy)


def plain(network: Network, error: float) -> Any:
    """Return packed params, rounded by `rate_distortion` to an error."""
    step = cj.quantize.step_for_error(network.params, error)
    c = cj.quantize.rate_distortion(step=step, relative=False)
    return c.pack(network.params, c.init(network.params))


def on_paths(network: Network, error: float) -> Any:
    """Return packed params, rounded by `trellis` to an error."""
    result = cj.quantize.trellis(network.params, error=error)
    return result.compression.pack(result.params, result.state)


def ours(network: Network, packed: Any) -> Point:
    """Return our file of packed params."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        size = cj.save(Path(folder) / "f", packed, coded=True)
        middle = time.perf_counter()
        back = cj.load(Path(folder) / "f")[0]
        end = time.perf_counter()
    leaves = {path: np.asarray(x) for path, x in flatten(cj.unpack(back))[0].items()}
    return network.point(size, leaves, middle - start, end - middle)


def theirs(network: Network, parameter: int, trellis: bool) -> Point:
    """Return the peer's file at a quantization parameter: the smaller of two orientations."""
    found = []
    for turned in (False, True):
        given = {p: x.T.copy() if turned else x.copy() for p, x in network.weights.items()}
        with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            stream = nnc.compress(
                given,
                bitstream_path=f"{folder}/f.nnc",
                qp=parameter,
                use_dq=trellis,
                return_bitstream=True,
                verbose=False,
            )
            middle = time.perf_counter()
            back: Any = nnc.decompress(stream)
            end = time.perf_counter()
        back = {path: x.T if turned else x for path, x in back.items()}
        found.append(network.point(len(stream), back, middle - start, end - middle))
    return min(found)


def at(points: list[Point], error: float) -> Point:
    """Return a curve at an error, interpolated over the logarithm of the error."""
    points = sorted(points, key=lambda point: point.error)
    place = np.log([point.error for point in points])
    if not place[0] <= np.log(error) <= place[-1]:
        raise SystemExit(f"no two quantization parameters enclose the error {error}")
    return Point(
        *(float(np.interp(np.log(error), place, column)) for column in zip(*points, strict=True))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--errors", type=float, nargs="+", default=[0.033, 0.068, 0.146, 0.2, 0.333]
    )
    parser.add_argument("--parameters", type=int, nargs=2, default=[-30, -8], help="first and last")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1500)
    args = parser.parse_args()

    network = trained(args.seed, args.steps)
    first, last = args.parameters
    curves = {
        trellis: [theirs(network, p, trellis) for p in range(first, last + 1)]
        for trellis in (False, True)
    }
    print(f"float32: {network.accuracy(network.params):.2f} % of the held-out digits\n")
    print(
        "| error | ours | ours, trellis | nncodec | nncodec, trellis | ratio of the trellises | "
        "accuracy, ours and theirs | encode, decode ours | theirs |"
    )
    print("|--:|" + "--:|" * 8)
    for error in args.errors:
        own = [ours(network, of(network, error)) for of in (plain, on_paths)]
        peer = [at(curves[kind], each.error) for kind, each in zip((False, True), own, strict=True)]
        bits = " | ".join(f"{point.bits:.3f}" for point in (*own, *peer))
        times = " | ".join(f"{x.encode:.2f}, {x.decode:.2f} s" for x in (own[1], peer[1]))
        print(
            f"| {own[1].error:.4f} | {bits} | {own[1].bits / peer[1].bits:.3f} | "
            f"{own[1].accuracy:.2f}, {peer[1].accuracy:.2f} | {times} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
