"""The table of contents of reducers: statistics of the activations at a site.

| Statistic | For |
|---|---|
| `absmax`, `minmax` | static ranges; `absmax("channel")` for SmoothQuant |
| `histogram` (`edges`, `magnitudes`, `percentile`) | ranges by percentile or entropy |
| `gram` | GPTQ, SparseGPT, AdaRound, AWQ: the Hessian of a layer's output error |
| `moments` | bias correction, channel importance |
| `absmean` | AWQ |
| `norm` | Wanda |
| `outliers` | LLM.int8() |
| `per_input` | your own |

Each reducer keeps, for each activation that enters a site (`Site.inputs`), float32 statistics whose
size does not depend on how much data there is, and ``count``, the number of rows, a row being one
vector that is contracted (a token, a pixel). The count is 0 where a site did not run; then
`Reducer.finish` returns NaN. "Per channel" is one number for each entry of a row, ``[*batch, k]``
in the order of ``site.contracting``.
"""

from compress_jax.core.deprecated import renamed
from compress_jax.core.exact import Int64
from compress_jax.trace._statistics.calibration import Gram
from compress_jax.trace._statistics.reducer import Reducer, per_input
from compress_jax.trace._statistics.statistics import (
    AbsMax,
    Histogram,
    MinMax,
    Moments,
    Norm,
    Outliers,
    absmax,
    absmean,
    edges,
    gram,
    histogram,
    magnitudes,
    minmax,
    moments,
    norm,
    outliers,
    percentile,
)

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
    "outliers",
    "per_input",
    "percentile",
]

__getattr__ = renamed({"of_inputs": "per_input", "Counts": "Int64"}, __name__)
