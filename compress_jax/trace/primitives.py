"""What every primitive does to values, in one place: each rule table names its classes here, so that no two disagree.

A primitive is in one class. What passes a value on is known to the interpreter, which asks no domain about it.
"""

from compress_jax.trace.nested import CALLS

PASSED = frozenset(  # each operand is a result, number for number: they name, place, order or hide values
    "copy copy_p device_put layout_constraint name optimization_barrier pbroadcast pcast pvary reshard"
    " shard_alike sharding_constraint stop_gradient xla_metadata_value".split()
)
CASTS = frozenset("convert_element_type reduce_precision".split())  # the same numbers, in a dtype or with digits of its own
MOVES = frozenset(  # of one value: entries elsewhere, left out or repeated, none changed
    "broadcast_in_dim expand_dims reshape rev slice split squeeze tile transpose unstack".split()
)
JOINS = frozenset("concatenate pad stack".split())  # several values side by side
INDEXED = frozenset("dynamic_slice gather".split())  # entries that indices pick
UPDATES = frozenset("dynamic_update_slice scatter scatter-add scatter-max scatter-min scatter-mul scatter-sub".split())

SUMS = frozenset("add add_any sub".split())
SIGNS = frozenset("neg real".split())  # linear, entry by entry
COMPARISONS = frozenset("eq eq_to ge gt le le_to lt lt_to ne".split())
ARITHMETIC = frozenset(  # one operation an entry, besides those above
    "abs and bitcast_convert_type ceil clamp clz complex conj div floor imag integer_pow is_finite max min mul nextafter not"
    " one_minus_square or population_count rem round select_n shift_left shift_right_arithmetic shift_right_logical sign"
    " square xor".split()
)
TRANSCENDENTAL = frozenset(
    "acos acosh asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt cos cosh digamma erf erf_inv erfc exp exp2 expm1"
    " igamma igamma_grad_a igammac lgamma log log1p log2 logistic polygamma pow regularized_incomplete_beta rsqrt sin sinh"
    " sqrt tan tanh zeta".split()
)
ELEMENTWISE = CASTS | SUMS | SIGNS | COMPARISONS | ARITHMETIC | TRANSCENDENTAL

REDUCTIONS = frozenset(f"reduce_{kind}" for kind in ("sum", "max", "min", "prod", "and", "or", "xor"))
INDEX_REDUCTIONS = frozenset("argmax argmin".split())
RUNNING = frozenset("cumlogsumexp cummax cummin cumprod cumsum".split())
WINDOWS = frozenset("reduce_window_max reduce_window_min reduce_window_sum".split())
ORDERED = frozenset("sort top_k".split())
CONTRACTIONS = frozenset("conv_general_dilated dot_general ragged_dot ragged_dot_general".split())

NUMBERS = frozenset("axis_index create_token empty empty2 iota zeros_like".split())  # from nothing
RANDOM = frozenset(
    "random_bits random_clone random_fold_in random_seed random_split random_unwrap random_wrap rng_bit_generator"
    " rng_uniform threefry2x32".split()
)
COLLECTIVES = frozenset(  # over the devices of a mesh, entry by entry
    "pmax pmin ppermute psum psum2 psum_invariant".split()
)
SILENT = frozenset("debug_callback debug_print".split())  # they look only

CONTROL = frozenset(CALLS) | frozenset("cond scan while".split())  # they run other jaxprs inside

OPAQUE = frozenset(  # whatever they touch is frozen, still and uncounted: named here so that a new one is noticed
    "after_all all_gather all_gather_invariant all_gather_reduced all_to_all approx_top_k cholesky custom_lin"
    " custom_linear_solve eig eigh fft get hessenberg householder_product lu qr ragged_all_to_all random_gamma reduce"
    " reduce_scatter reduce_window schur select_and_gather_add select_and_scatter select_and_scatter_add svd swap"
    " triangular_solve tridiagonal tridiagonal_solve".split()
)

CLASSES: dict[str, frozenset[str]] = {
    "passed": PASSED,
    "casts": CASTS,
    "moves": MOVES,
    "joins": JOINS,
    "indexed": INDEXED,
    "updates": UPDATES,
    "sums": SUMS,
    "signs": SIGNS,
    "comparisons": COMPARISONS,
    "arithmetic": ARITHMETIC,
    "transcendental": TRANSCENDENTAL,
    "reductions": REDUCTIONS,
    "index reductions": INDEX_REDUCTIONS,
    "running": RUNNING,
    "windows": WINDOWS,
    "ordered": ORDERED,
    "contractions": CONTRACTIONS,
    "numbers": NUMBERS,
    "random": RANDOM,
    "collectives": COLLECTIVES,
    "silent": SILENT,
    "control": CONTROL,
    "opaque": OPAQUE,
}


def class_of(name: str) -> str | None:
    """Return the class of a primitive, or None if it is not known here.

    Example:
      >>> class_of("name"), class_of("tanh"), class_of("a primitive of tomorrow")
      ('passed', 'transcendental', None)
    """
    return next((each for each, names in CLASSES.items() if name in names), None)
