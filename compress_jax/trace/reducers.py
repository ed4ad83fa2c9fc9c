"""Ready reducers: the statistics that quantization and pruning need of the activations at a site.

Each keeps, for each activation that enters a site (`Site.inputs`), float32 statistics whose size
does not depend on how much data there is, with ``count``: the rows seen, a row being one vector
that is contracted (a token, a pixel). It is 0 where a site did not run; then what `Reducer.finish`
returns is NaN. "Per channel" is one number for each entry of a row, ``[*batch, k]`` as `channels`
orders them.
"""

from compress_jax.core.deprecated import renamed
from compress_jax.core.exact import Int64
from compress_jax.trace._statistics.calibration import Gram
from compress_jax.trace._statistics.moments import (
    Moments,
    Norm,
    Outliers,
    absmean,
    gram,
    moments,
    norm,
    outliers,
)
from compress_jax.trace._statistics.ranges import (
    AbsMax,
    Histogram,
    MinMax,
    absmax,
    edges,
    histogram,
    magnitudes,
    minmax,
    percentile,
)
from compress_jax.trace._statistics.reducer import Reducer, of_inputs

__all__ = [
    "AbsMax",
    "Gram",
    "Histogram",
    "Int64",
    "MinMax",
    "Moments",
    "Norm",
    "Outliers",
    "Reducer",
    "absmax",
    "absmean",
    "edges",
    "gram",
    "histogram",
    "magnitudes",
    "minmax",
    "moments",
    "norm",
    "of_inputs",
    "outliers",
    "percentile",
]

__getattr__ = renamed({"Counts": "Int64"}, __name__)
