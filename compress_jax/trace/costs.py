"""What a function costs, as numbers: of one contraction, and in total."""

import math
from dataclasses import dataclass, field

from compress_jax.trace.site import Site
from compress_jax.trace.stored import dtype_bits
from compress_jax.trace.table import aligned, units


@dataclass(frozen=True)
class SiteCost:
    """What one contraction costs in one call, all runs of it counted.

    Attributes:
      site: the contraction.
      params: entries of the parameters in it; one that is used at several sites shows at each of them.
      lhs_bits: bits of one number of the first operand; a mean where parameters of different widths are put together.
      rhs_bits: likewise of the second.
      density: share of the weights that are not zero, where a compression is looked at; else 1.
    """

    site: Site
    params: int
    lhs_bits: float
    rhs_bits: float
    density: float = 1.0

    @property
    def macs(self) -> int:
        """Multiply-accumulates, those with pruned weights included."""
        return self.site.macs

    @property
    def flops(self) -> int:
        """Two for each multiply-accumulate."""
        return 2 * self.site.macs

    @property
    def count(self) -> int:
        """How often it runs."""
        return self.site.count

    @property
    def weight_bits(self) -> float | None:
        """Bits of the parameter; None if both operands are activations."""
        return {"lhs": self.lhs_bits, "rhs": self.rhs_bits}.get(self.site.operand or "")

    @property
    def activation_bits(self) -> float:
        """Bits of the other operand; of the first if both are activations."""
        return self.rhs_bits if self.site.operand == "lhs" else self.lhs_bits

    @property
    def bit_operations(self) -> int:
        """``macs * lhs_bits * rhs_bits``."""
        return round(self.macs * self.lhs_bits * self.rhs_bits)

    @property
    def effective_macs(self) -> int:
        """``macs * density``: those whose weight is not zero."""
        return round(self.macs * self.density)

    @property
    def effective_bit_operations(self) -> int:
        """``macs * lhs_bits * rhs_bits * density``."""
        return round(self.macs * self.lhs_bits * self.rhs_bits * self.density)

    @property
    def activation_bytes(self) -> int:
        """Bytes of the results."""
        return -(-self.count * math.prod(self.site.out_shape) * dtype_bits(self.site.out_dtype) // 8)


@dataclass(frozen=True)
class Cost:
    """What one call of a function costs; prints as a table.

    Attributes:
      by_site: the contractions by name, in program order.
      params: number of parameters: entries under the ``"params"`` collection if there is one at the top (running statistics
        are no parameters), else all entries.
      other_flops: operations that are not contractions: one for each result of an operation on elements, ``n - 1`` for a
        sum of ``n``.
      transcendentals: results of exp, log, tanh, rsqrt, ...; not among the FLOPs.
      notes: what is not counted, or not exactly, and why.
      products: multiplications of products that sum over no axis: among the MACs, but no site's.
    """

    by_site: dict[str, SiteCost]
    params: int
    other_flops: int
    transcendentals: int
    notes: dict[str, str] = field(default_factory=dict)
    products: int = 0

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all contractions, those with pruned weights included."""
        return sum(each.macs for each in self.by_site.values()) + self.products

    @property
    def flops(self) -> int:
        """Two for each multiply-accumulate, and the other operations."""
        return 2 * self.macs + self.other_flops

    @property
    def bit_operations(self) -> int:
        """Sum of ``macs * lhs_bits * rhs_bits``, those with pruned weights included."""
        return sum(each.bit_operations for each in self.by_site.values())

    @property
    def effective_macs(self) -> int:
        """Multiply-accumulates whose weight is not zero: what hardware that skips zeros is left with."""
        return sum(each.effective_macs for each in self.by_site.values())

    @property
    def effective_bit_operations(self) -> int:
        """Bit-operations whose weight is not zero."""
        return sum(each.effective_bit_operations for each in self.by_site.values())

    @property
    def activation_bytes(self) -> int:
        """Bytes of the results of all contractions."""
        return sum(each.activation_bytes for each in self.by_site.values())

    def __str__(self) -> str:
        """Return a table of the sites, the total, the other operations and the notes."""
        rows = [HEAD, *(_row(name, each, self.macs) for name, each in self.by_site.items()), self._total()]
        if all(each.density == 1 for each in self.by_site.values()):
            rows = [row[:DENSE] + row[DENSE + 2 :] for row in rows]
        work = (
            f"{units(self.flops)} FLOPs: {units(2 * self.macs)} in these products, {units(self.other_flops)} in other "
            f"operations; {units(self.transcendentals)} transcendental functions"
        )
        return "\n".join([aligned(rows, left=2), work, *(f"{what}: {why}" for what, why in self.notes.items())])

    def _total(self) -> tuple[str, ...]:
        share = "100.0%" if self.macs else ""
        numbers = (self.macs, self.params, self.bit_operations, self.effective_bit_operations, self.activation_bytes)
        macs, params, bits, effective, out = map(units, numbers)
        return "total", "", "", macs, share, params, "", bits, "", effective, out


HEAD = ("site", "product", "runs", "MACs", "share", "params", "bits", "bit-ops", "density", "effective", "bytes out")
DENSE = HEAD.index("density")


def _row(name: str, cost: SiteCost, macs: int) -> tuple[str, ...]:
    lhs, rhs, out = ("x".join(map(str, shape)) for shape in (cost.site.lhs_shape, cost.site.rhs_shape, cost.site.out_shape))
    return (
        name,
        f"{lhs} * {rhs} > {out}",
        f"{cost.count}{'?' if cost.site.conditional else ''}",
        units(cost.macs),
        f"{cost.macs / max(macs, 1):.1%}",
        units(cost.params),
        f"{cost.lhs_bits:.3g} x {cost.rhs_bits:.3g}",
        units(cost.bit_operations),
        f"{cost.density:.1%}",
        units(cost.effective_bit_operations),
        units(cost.activation_bytes),
    )
