"""What an entry of the zoo is: a model as a pure function, and what is known about it by hand."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from compress_jax.core.paths import flatten

Made = tuple[Callable[..., Any], Any, tuple[Any, ...]]
Draw = Callable[[np.random.Generator], Any]


@dataclass(frozen=True)
class Answer:
    """What the architecture says about its contractions; nothing here is traced.

    Contractions are dot_general, convolution and ragged_dot.

    A scan's body runs as often as the scan is long, a shard_map's as often as there are devices;
    each branch of a cond and the body of a while loop count once.

    Attributes:
      contracted: how often each parameter is contracted in one call.
      macs: multiply-accumulates of all contractions of one call: |out| times what is summed over,
        positions on padding included, the zeros that a transposed convolution puts between its
        inputs left out.
      uncontracted: parameters of rank 2 and more that feed no contraction, and why.
      anonymous: how many contractions are between activations only.
      joined: parameters that enter the same contractions together, put side by side; each counts
        for each of them.
    """

    contracted: dict[str, int]
    macs: int
    uncontracted: dict[str, str] = field(default_factory=dict)
    anonymous: int = 0
    joined: tuple[tuple[str, ...], ...] = ()

    @property
    def equations(self) -> int:
        """Contractions of one call; those that several joined parameters feed are one each."""
        again = sum(self.contracted[path] for group in self.joined for path in group[1:])
        return sum(self.contracted.values()) + self.anonymous - again

    def under(self, prefix: str) -> "Answer":
        """Return the answer for the same parameters under a prefix, such as ``"params/"``."""
        contracted = {prefix + path: count for path, count in self.contracted.items()}
        uncontracted = {prefix + path: why for path, why in self.uncontracted.items()}
        joined = tuple(tuple(prefix + path for path in group) for group in self.joined)
        return Answer(contracted, self.macs, uncontracted, self.anonymous, joined)


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
      name: such as ``"resnet/linen"``.
      make: returns ``(fn, variables, inputs)``: ``fn(variables, *inputs)`` is pure, variables are
        float32 arrays.
      answer: returns what must be found in it.
      parameters: its size as published, where it is published.
      reverse: whether JAX can differentiate it backwards (a while loop it can not).
    """

    name: str
    make: Callable[[], Made]
    answer: Callable[[], Answer]
    parameters: int | None = None
    reverse: bool = True

    @property
    def contracted(self) -> dict[str, int]:
        return self.answer().contracted

    @property
    def uncontracted(self) -> dict[str, str]:
        return self.answer().uncontracted

    @property
    def anonymous(self) -> int:
        return self.answer().anonymous

    @property
    def joined(self) -> tuple[tuple[str, ...], ...]:
        return self.answer().joined

    @property
    def macs(self) -> int:
        return self.answer().macs


def answer(
    once: dict[str, int],
    looped: dict[str, int] | None = None,
    loops: int = 1,
    anonymous: Sequence[int] = (),
    **rest: Any,
) -> Answer:
    """Add up an answer from ``{path: multiply-accumulates of one run}``.

    Args:
      once: of parameters contracted once.
      looped: of parameters contracted ``loops`` times.
      loops: see ``looped``.
      anonymous: multiply-accumulates of each contraction without a parameter.
      **rest: ``uncontracted`` and ``joined``, as they stand (what joined parameters do is shared
        out among them).

    Returns:
      The answer.
    """
    looped = looped or {}
    contracted = dict.fromkeys(once, 1) | dict.fromkeys(looped, loops)
    macs = sum(once.values()) + loops * sum(looped.values()) + sum(anonymous)
    return Answer(contracted, macs, anonymous=len(anonymous), **rest)


def randomise(shapes: Any, seed: int = 0) -> Any:
    """Return a tree of float32 arrays without symmetry: no two alike, variances positive.

    Args:
      shapes: a tree of things with a shape.
      seed: of the generator.

    Returns:
      The same tree of arrays.
    """
    rng = np.random.default_rng(seed)
    leaves, rebuild = flatten(shapes)
    return rebuild(
        {
            path: jax.numpy.asarray(_draw(rng, path, leaf.shape), "float32")
            for path, leaf in leaves.items()
        }
    )


def _draw(rng: np.random.Generator, path: str, shape: tuple[int, ...]) -> np.ndarray:
    kind = path.split("/")[-1]
    if kind in ("var", "scale"):
        return rng.uniform(0.5, 1.5, shape)
    if kind in ("bias", "mean") or len(shape) < 2:
        return rng.normal(0, 0.3, shape)
    return rng.normal(0, 1 / math.sqrt(math.prod(shape[-3:-1])), shape)


def plain(
    fn: Callable[..., Any], params: dict[str, tuple[int, ...]], *draws: Draw
) -> Callable[[], Made]:
    """Return the ``make`` of a function, of its parameters' shapes and of its inputs."""
    return lambda: (
        fn,
        randomise({path: np.empty(shape) for path, shape in params.items()}),
        inputs(*draws),
    )


def inputs(*draws: Draw) -> tuple[jax.Array, ...]:
    """Return one input for each draw."""
    rng = np.random.default_rng(1)
    return tuple(jax.numpy.asarray(draw(rng)) for draw in draws)


def normal(*shape: int) -> Draw:
    """Draw float32 activations."""
    return lambda rng: rng.normal(size=shape).astype("float32")


def integers(high: int, *shape: int) -> Draw:
    """Draw int32 tokens or indices below ``high``."""
    return lambda rng: rng.integers(high, size=shape, dtype="int32")


VECTORS, IMAGES, TOKENS = normal(3, 12), normal(2, 16, 16, 3), integers(23, 2, 9)
