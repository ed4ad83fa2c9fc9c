"""The sparsity that just meets a budget of operations or bytes, under any rule that spreads a sparsity over layers."""

from collections.abc import Callable, Mapping

from compress_jax.core.compression import Compression
from compress_jax.core.errors import ConfigError
from compress_jax.core.packed import nbytes
from compress_jax.core.types import ModelFn, Params, PyTree
from compress_jax.prune._scores import magnitude
from compress_jax.trace import cost

Allocation = Mapping[str, float]


def for_flops(
    budget: float,
    allocate: Callable[[float], Allocation],
    fn: ModelFn,
    params: Params,
    *inputs: PyTree,
) -> dict[str, float]:
    r"""Return the allocation of least sparsity whose multiply-accumulates with kept weights are within a share of all.

    .. math:: \sum_i M_i (1 - s_i) \le budget \sum_i M_i

    over the contractions i that `trace.cost` finds in ``fn``, of :math:`M_i` multiply-accumulates
    each; :math:`s_i` is the sparsity of its weights, 0 for what has none.

    Args:
      budget: share of the multiply-accumulates that may be left, 0 to 1.
      allocate: ``sparsity -> {path: sparsity}``, such as ``lambda s: erk(params, s)``, or
        ``lambda s: dict.fromkeys(kernels, s)`` for the same share everywhere.
      fn: ``(params, *inputs) -> outputs``; paths are those within ``params``.
      params: tree of arrays or shapes.
      inputs: of ``fn``; a batch size changes nothing.

    Returns:
      ``{path: sparsity}``, for the ``sparsity`` of any method.

    Raises:
      ConfigError: if no sparsity meets the budget.

    Example:
      >>> import jax.numpy as jnp
      >>> def fn(p, x): return jnp.repeat(x, 3, axis=0) @ p["a"] @ p["b"]
      >>> params = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 2))}
      >>> for_flops(0.5, lambda s: {"a": s}, fn, params, jnp.ones((1, 4)))
      {'a': 0.75}

    References:
      Evci et al., "Rigging the Lottery: Making All Tickets Winners", 2020, appendix H: FLOPs of
      sparse layers.
    """
    sites = [(site.site.param, site.macs) for site in cost(fn, params, *inputs).by_site.values()]
    total = sum(macs for _, macs in sites)

    def left(allocation: Allocation) -> float:
        return sum(macs * (1 - allocation.get(param or "", 0.0)) for param, macs in sites) / max(
            total, 1
        )

    return _least(budget, allocate, left, turns=40)


def for_bytes(
    budget: float,
    allocate: Callable[[float], Allocation],
    params: Params,
    *,
    method: Callable[[Allocation], Compression] = magnitude,
    turns: int = 12,
) -> dict[str, float]:
    """Return the allocation of least sparsity whose packed params are within a share of the dense bytes.

    The bytes are those that `pack` makes: values, the masks' bits or gaps, and what stays dense.

    Args:
      budget: share of the bytes that may be left, above 0.
      allocate: ``sparsity -> {path: sparsity}``, see `for_flops`.
      params: tree of arrays.
      method: ``{path: sparsity} -> Compression``.
      turns: how often the interval of sparsities is halved; each turn prunes and packs once.

    Returns:
      ``{path: sparsity}``, for the ``sparsity`` of the method.

    Raises:
      ConfigError: if no sparsity meets the budget.

    Example:
      >>> import jax
      >>> params = {"w": jax.random.normal(jax.random.key(0), (16, 16))}
      >>> for_bytes(0.25, lambda s: {"w": s}, params, turns=3)["w"]
      0.875
    """
    dense = nbytes(params)

    def left(allocation: Allocation) -> float:
        c = method(allocation)
        return nbytes(c.pack(params, c.init(params))) / dense

    return _least(budget, allocate, left, turns)


def _least(
    budget: float,
    allocate: Callable[[float], Allocation],
    left: Callable[[Allocation], float],
    turns: int,
) -> dict[str, float]:
    """Halve the interval of sparsities; the upper end meets the budget throughout."""
    low, high, best = 0.0, 1.0, allocate(1.0)
    if left(allocate(0.0)) <= budget:
        return dict(allocate(0.0))
    if (least := left(best)) > budget:
        raise ConfigError(
            f"no sparsity meets the budget {budget:g}: with every weight of {', '.join(best)} "
            f"pruned, {least:.3g} is left; "
            "prune more leaves or raise the budget"
        )
    for _ in range(turns):
        middle = (low + high) / 2
        allocation = allocate(middle)
        low, high, best = (
            (low, middle, allocation) if left(allocation) <= budget else (middle, high, best)
        )
    return dict(best)
