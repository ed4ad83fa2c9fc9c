"""The levels of the common formats below eight bits, other than integers."""

from compress_jax.core.arguments import whole
from compress_jax.core.errors import ArgumentError
from compress_jax.core.levels import Float, Table

E4M3 = Float(4, 3, reserved=1)
"""float8_e4m3fn: up to 448. Micikevicius et al., "FP8 Formats for Deep Learning", 2022, table 1."""

E5M2 = Float(5, 2, reserved=4)
"""float8_e5m2: up to 57344; infinities and NaNs are never used. The same table."""

E2M1 = Float(2, 1)
"""float4_e2m1fn: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. OCP MX specification v1.0, table 5."""

NF4 = Table(
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    )
)
"""NormalFloat4: quantiles of a normal distribution. Dettmers et al., "QLoRA", 2023, appendix E."""

TERNARY = Table((-1.0, 0.0, 1.0))
BINARY = Table((-1.0, 1.0))


def float_format(exponent_bits: int, mantissa_bits: int, *, reserved: int = 0) -> Float:
    """Return a floating-point format of a sign, an exponent and a mantissa.

    The exponent bias is ``2**(exponent_bits - 1) - 1``, and an exponent of zeros means a subnormal number, as in IEEE 754.

    Args:
      exponent_bits: 1 to 7.
      mantissa_bits: 0 to 8; 0 leaves powers of two, where the tie between two of them goes to the larger.
      reserved: how many of the largest magnitude codes are kept for infinity and NaN; such codes are never used.

    Returns:
      The format, for `tabled`.

    Raises:
      ArgumentError: if the numbers of bits are out of range, or no magnitude but 0 is left.

    Example:
      >>> import jax.numpy as jnp
      >>> e3m2 = float_format(3, 2)  # MXFP6
      >>> e3m2.bits, e3m2.largest, e3m2.round(jnp.array([0.3, -30.0])).tolist()
      (6, 28.0, [0.3125, -28.0])

    References:
      Open Compute Project, "OCP Microscaling Formats (MX) Specification", v1.0, 2023, section 5.3.
    """
    exponent_bits, mantissa_bits = whole("exponent_bits", exponent_bits), whole("mantissa_bits", mantissa_bits)
    reserved = whole("reserved", reserved)
    if exponent_bits not in range(1, 8) or mantissa_bits not in range(9):
        raise ArgumentError(
            f"a float takes 1 to 7 exponent and 0 to 8 mantissa bits, got {exponent_bits} and {mantissa_bits}"
        )
    magnitudes = 2 ** (exponent_bits + mantissa_bits)
    if reserved not in range(magnitudes - 1):
        raise ArgumentError(f"reserved must leave a number above 0 among {magnitudes} magnitudes, got {reserved}")
    return Float(exponent_bits, mantissa_bits, reserved)
