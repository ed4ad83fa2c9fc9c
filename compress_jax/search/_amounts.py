"""What every option of every leaf takes: stored bytes and bit-operations, without any data."""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp

from compress_jax.core.compression import Compression, bound
from compress_jax.core.errors import ShapeError
from compress_jax.core.packed import is_packed, nbytes
from compress_jax.core.paths import Patterns, flatten, match
from compress_jax.core.types import Leaf, ModelFn, Params, PyTree
from compress_jax.search._budget import byte_budget, work_budget
from compress_jax.trace import SiteCost, cost
from compress_jax.trace._cost import dtype_bits, stored
from compress_jax.trace._jaxpr.find_sites import Traced, layouts_of, trace

Leaves = dict[str, Leaf]
Variants = Mapping[str, Mapping[str, Leaf]]
"""``{path: {option: the leaf, packed or an array}}``."""


class Amounts(NamedTuple):
    """What every option of every leaf takes; see `Sensitivities`.

    Attributes:
      variants: each leaf under each option.
      nbytes: stored bytes.
      bitops: bit-operations of one call.
      macs: multiply-accumulates of that call by leaf.
      refused: options that a leaf cannot take, and why.
      left: leaves that stay as they are, and why.
      left_nbytes: their bytes.
      left_bitops: bit-operations of everything else.
    """

    variants: dict[str, dict[str, Leaf]]
    nbytes: dict[str, dict[str, int]]
    bitops: dict[str, dict[str, int]]
    macs: dict[str, int]
    refused: dict[str, dict[str, str]]
    left: dict[str, str]
    left_nbytes: int
    left_bitops: int

    def check(self, max_bytes: float | None, max_bitops: float | None) -> None:
        """Refuse budgets that no choice meets.

        Raises:
          ConfigError: with the least that can be reached.
        """
        byte_budget(max_bytes, self.nbytes, self.left_nbytes).check()
        work_budget(max_bitops, self.bitops, self.left_bitops).check()


def amounts(
    fn: ModelFn,
    params: Params,
    inputs: tuple[PyTree, ...],
    options: Mapping[str, Compression],
    where: Patterns | None = None,
    activation_bits: int | Mapping[str, int] | None = None,
) -> Amounts:
    """Return what every option of every leaf takes, which needs no data and no trained weights.

    Args:
      fn: see `sensitivities`.
      params: tree of arrays.
      inputs: the arguments of ``fn`` after params, or their shapes.
      options: compressions of one leaf, by name.
      where: a glob, or several, over the leaves that take an option.
      activation_bits: see `sensitivities`.

    Returns:
      The amounts.

    Raises:
      NoMatchError: if ``where`` matches no leaf.

    Example:
      >>> import compress_jax as cj
      >>> fn = lambda params, x: x @ params["head"]
      >>> params, x = {"head": jnp.ones((4, 3))}, jnp.ones((1, 4))
      >>> amounts(fn, params, (x,), {"int4": cj.quantize.uniform(4)}).nbytes
      {'head': {'int4': 11}}
    """
    leaves = flatten(params)[0]
    traced = trace(fn, params, *inputs)
    known = layouts_of(traced)
    options = {name: bound(option, known) for name, option in options.items()}
    chosen, left = _candidates(traced, leaves, where)
    variants, refused = _variants(leaves, chosen, options)
    left |= {path: "no option can take it" for path in chosen if not variants[path]}
    variants = {path: variants[path] for path in chosen if variants[path]}
    by_site = cost(fn, params, *inputs, activation_bits=activation_bits).by_site
    bitops, macs, rest = _work(by_site, leaves, variants)
    sizes = {path: {o: _nbytes(x) for o, x in own.items()} for path, own in variants.items()}
    bytes_left = sum(_nbytes(leaves[path]) for path in left)
    return Amounts(variants, sizes, bitops, macs, refused, left, bytes_left, rest)


def _candidates(
    traced: Traced, leaves: Leaves, where: Patterns | None
) -> tuple[list[str], dict[str, str]]:
    """Return the leaves that take an option, and why the others are skipped."""
    if where is not None:
        found = match(where, leaves)
        return found, {path: "no pattern matches" for path in leaves if path not in found}
    # Weights of products, tables of lookups; a site of several parameters uses all of them.
    used: set[str | None] = set(traced.found.lookups.values())
    for site in traced.sites.values():
        used.update((site.param, *site.also))
    why = {}
    for path in leaves:
        if path not in used:
            why[path] = "no product and no lookup uses it"
            if path in traced.found.otherwise:
                how = traced.found.otherwise[path]
                why[path] = f"{how}; name it in where to decide about it"
    return [path for path in leaves if path in used], why


def _variants(
    leaves: Leaves, chosen: list[str], options: Mapping[str, Compression]
) -> tuple[dict[str, dict[str, Leaf]], dict[str, dict[str, str]]]:
    """Return each leaf under each option, packed, and why it cannot take some."""
    variants: dict[str, dict[str, Leaf]] = {path: {} for path in chosen}
    refused: dict[str, dict[str, str]] = {}
    for path in chosen:
        for name, option in options.items():
            variant, why = _variant(path, leaves[path], option)
            if why is None:
                variants[path][name] = variant
            else:
                refused.setdefault(path, {})[name] = why
    return variants, refused


def _variant(path: str, x: Leaf, option: Compression) -> tuple[Leaf, str | None]:
    """Return one leaf under one option, or why it cannot take it.

    An option that leaves the leaf alone returns the leaf itself.
    """
    part = {path: x}
    try:
        state = option.init(part)
        # `identity` returns its argument; it is an option of its own: the leaf as it is.
        if option.view(part, state) is part:
            return x, None
        why = option.skipped(part).get(path)
        return (None, why) if why else (option.pack(part, state)[path], None)
    except ShapeError as error:  # a group size that does not divide the leaf, say
        return None, str(error)


def _work(
    sites: Mapping[str, SiteCost], leaves: Leaves, variants: Variants
) -> tuple[dict[str, dict[str, int]], dict[str, int], int]:
    """Return bit-operations by leaf and option, MACs by leaf, and what no option changes.

    The work of a product of several parameters is divided among them by size.
    """
    work = {path: dict.fromkeys(options, 0.0) for path, options in variants.items()}
    macs = dict.fromkeys(variants, 0.0)
    rest = 0.0
    # Stored bits of an entry, None where the leaf stays in its own dtype.
    widths: dict[str, dict[str, float | None]] = {path: {} for path in variants}
    for path, own in variants.items():
        for option, variant in own.items():
            widths[path][option] = stored({option: variant}, None, None)[option].bits
    for each in sites.values():
        paths = [path for path in (each.site.param, *each.site.also) if path is not None]
        # A product may have several parameters: of a concatenation, or on both sides.
        held = sum(leaves[path].size for path in paths)
        rest += 0.0 if paths else each.bit_operations
        own = dtype_bits(each.site.lhs_dtype if each.site.operand == "lhs" else each.site.rhs_dtype)
        for path in paths:
            # Bit-operations = MACs x bits of the weight x bits of the activation.
            share = each.macs * leaves[path].size / held
            if path not in variants:
                rest += share * own * each.activation_bits
                continue
            macs[path] += share
            for option, bits in widths[path].items():
                work[path][option] += share * (bits or own) * each.activation_bits
    whole = {path: {o: round(x) for o, x in amounts.items()} for path, amounts in work.items()}
    return whole, {path: round(x) for path, x in macs.items()}, round(rest)


def _nbytes(variant: Leaf) -> int:
    return nbytes(variant) if is_packed(variant) else jnp.asarray(variant).nbytes
