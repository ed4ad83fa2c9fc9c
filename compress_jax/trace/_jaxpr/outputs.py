"""A traced function whose outputs are computed one by one, each from the inputs that it needs."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun

from compress_jax.core.types import Array, PyTree
from compress_jax.trace._jaxpr.evaluate import bind
from compress_jax.trace._jaxpr.same_program import same_program

Run = Callable[..., list[jax.Array]]


class Outputs:
    """A function of trees, traced once; inputs and outputs are numbered as their leaves.

    Outputs that are the same program (the scales of one kernel and of the next) are compiled once.

    Args:
      fn: pure.
      inputs: trees of arrays or shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> made = Outputs(lambda a, b: (a + 1.0, a * b), 2.0, 3.0)
      >>> made.needed([0]), made.needed([1])
      ([0], [0, 1])
      >>> [float(x) for x in made.run([0], {0: 5.0})]
      [6.0]
    """

    def __init__(self, fn: Callable[..., PyTree], *inputs: PyTree) -> None:
        """Trace."""
        self.jaxpr = jax.make_jaxpr(fn)(*inputs)
        self.parts: dict[tuple[int, ...], tuple[list[int], Run]] = {}
        self.known: list[tuple[ClosedJaxpr, Run]] = []

    def needed(self, outputs: Sequence[int]) -> list[int]:
        """Return the numbers of the inputs that some outputs depend on."""
        variables = self._part(outputs)[1]
        return [i for i, var in enumerate(self.jaxpr.jaxpr.invars) if var in variables]

    def run(self, outputs: Sequence[int], inputs: Mapping[int, Array]) -> list[jax.Array]:
        """Compute some outputs from at least the inputs that they need."""
        key = tuple(outputs)
        if key not in self.parts:
            needed = self.needed(outputs)
            self.parts[key] = needed, self._compiled(outputs, needed)
        needed, run = self.parts[key]
        return run(*(inputs[i] for i in needed))

    def _compiled(self, outputs: Sequence[int], needed: Sequence[int]) -> Run:
        invars = self.jaxpr.jaxpr.invars

        def evaluate(*given: jax.Array) -> list[jax.Array]:
            return self._evaluated(outputs, dict(zip(needed, given, strict=True)))

        avals = [invars[i].aval for i in needed]
        own = jax.make_jaxpr(evaluate)(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in avals))
        for other, run in self.known:
            if same_program(own, other):
                return run
        self.known.append((own, jax.jit(jaxpr_as_fun(own))))
        return self.known[-1][1]

    def _evaluated(
        self, outputs: Sequence[int], inputs: Mapping[int, jax.Array]
    ) -> list[jax.Array]:
        jaxpr = self.jaxpr.jaxpr
        env: dict[Var, Array] = dict(zip(jaxpr.constvars, self.jaxpr.consts, strict=True))
        env |= {jaxpr.invars[i]: x for i, x in inputs.items()}

        def read(x: Var | Literal) -> jax.Array:
            return jnp.asarray(x.val if isinstance(x, Literal) else env[x])

        for eqn in self._part(outputs)[0]:
            results = bind(eqn, [read(x) for x in eqn.invars])
            env |= dict(zip(eqn.outvars, results, strict=True))
        return [read(jaxpr.outvars[i]) for i in outputs]

    def _part(self, outputs: Sequence[int]) -> tuple[list[JaxprEqn], set[Var]]:
        """Return the equations that some outputs need, in order, and the variables in them."""
        found = [self.jaxpr.jaxpr.outvars[i] for i in outputs]
        needed = {var for var in found if isinstance(var, Var)}
        eqns = []
        for eqn in reversed(self.jaxpr.jaxpr.eqns):
            if not needed.isdisjoint(eqn.outvars):
                eqns.append(eqn)
                needed.update(var for var in eqn.invars if isinstance(var, Var))
        return eqns[::-1], needed
