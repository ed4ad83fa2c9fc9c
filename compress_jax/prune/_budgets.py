"""The least sparsity that meets a budget of operations or bytes, for any allocation to layers."""

from collections.abc import Callable, Mapping

from compress_jax.core.compression import Compression
from compress_jax.core.deprecated import renamed_arguments
from compress_jax.core.errors import ConfigError
from compress_jax.core.packed import nbytes
from compress_jax.core.types import ModelFn, Params, PyTree
from compress_jax.prune._scores import magnitude
from compress_jax.trace import cost

Allocation = Mapping[str, float]
"""The sparsity by path."""


def for_flops(
    budget: float,
    allocate: Callable[[float], Allocation],
    fn: ModelFn,
    params: Params,
    *inputs: PyTree,
) -> dict[str, float]:
    r"""Return the allocation of least sparsity that meets a budget of multiply-accumulates.

    .. math:: \sum_i M_i (1 - s_i) \le budget \sum_i M_i

    The sum is over the contractions i that `trace.cost` finds in ``fn``, with :math:`M_i`
    multiply-accumulates and weights of sparsity :math:`s_i` (0 if they are not pruned).

    Args:
      budget: the share of the multiply-accumulates that may be left, 0 to 1.
      allocate: ``sparsity -> {path: sparsity}``, such as ``lambda s: erk(params, s)``, or
        ``lambda s: dict.fromkeys(kernels, s)`` for the same share everywhere.
      fn: ``(params, *inputs) -> outputs``.
      params: tree of arrays or shapes.
      inputs: the inputs of ``fn``; the batch size does not matter.

    Returns:
      ``{path: sparsity}``, for the ``sparsity`` of any method.

    Raises:
      ConfigError: if no sparsity meets the budget.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> def fn(p, x): return jnp.repeat(x, 3, axis=0) @ p["a"] @ p["b"]
      >>> params = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 2))}
      >>> cj.prune.for_flops(0.5, lambda s: {"a": s}, fn, params, jnp.ones((1, 4)))
      {'a': 0.75}

    References:
      Evci et al., "Rigging the Lottery: Making All Tickets Winners", 2020, appendix H: FLOPs of
      sparse layers.
    """
    sites = cost(fn, params, *inputs).by_site.values()
    total = sum(site.macs for site in sites)

    def left(allocation: Allocation) -> float:
        # Products without a parameter, such as attention scores, cannot be pruned.
        kept = [site.macs * (1 - allocation.get(site.site.param or "", 0.0)) for site in sites]
        return sum(kept) / max(total, 1)

    return _least(budget, allocate, left, iterations=40)


@renamed_arguments(turns="iterations")
def for_bytes(
    budget: float,
    allocate: Callable[[float], Allocation],
    params: Params,
    *,
    method: Callable[[Allocation], Compression] = magnitude,
    iterations: int = 12,
) -> dict[str, float]:
    """Return the allocation of least sparsity whose packed params meet a budget of bytes.

    The bytes are those of the packed params: values, the bits or gaps of masks, and dense leaves.

    Args:
      budget: the share of the dense bytes that may be left, above 0.
      allocate: ``sparsity -> {path: sparsity}``, see `for_flops`.
      params: tree of arrays.
      method: ``{path: sparsity} -> Compression``.
      iterations: how often the interval of sparsities is halved; each iteration prunes and packs
        once.

    Returns:
      ``{path: sparsity}``, for the ``sparsity`` of the method.

    Raises:
      ConfigError: if no sparsity meets the budget.

    Example:
      >>> import jax
      >>> import compress_jax as cj
      >>> params = {"w": jax.random.normal(jax.random.key(0), (16, 16))}
      >>> cj.prune.for_bytes(0.25, lambda s: {"w": s}, params, iterations=3)["w"]
      0.875
    """
    dense = nbytes(params)

    def left(allocation: Allocation) -> float:
        # Masks are packed too, and their size depends on where the zeros are: there is no formula.
        c = method(allocation)
        return nbytes(c.pack(params, c.init(params))) / dense

    return _least(budget, allocate, left, iterations)


def _least(
    budget: float,
    allocate: Callable[[float], Allocation],
    left: Callable[[Allocation], float],
    iterations: int,
) -> dict[str, float]:
    """Halve the interval of sparsities; its upper end meets the budget throughout."""
    dense = allocate(0.0)
    if left(dense) <= budget:
        return dict(dense)
    best = allocate(1.0)
    if (least := left(best)) > budget:
        raise ConfigError(
            f"no sparsity meets the budget {budget:g}: with every weight of {', '.join(best)} "
            f"pruned, {least:.3g} is left; prune more leaves or raise the budget"
        )
    # ``best`` is that of ``high``. Only allocations that were measured are returned, because counts
    # of weights are rounded and what is left falls in steps.
    low = 0.0
    high = 1.0
    for _ in range(iterations):
        middle = (low + high) / 2
        allocation = allocate(middle)
        if left(allocation) <= budget:
            high = middle
            best = allocation
        else:
            low = middle
    return dict(best)
