"""See inside any function: sites, statistics, rewriting, cost, groups and resizing.

All of it is one interpreter of jaxprs; see README.md beside this file.
"""

from compress_jax.trace import reducers
from compress_jax.trace._cost import Cost, SiteCost, cost
from compress_jax.trace._groups.groups import Group, Groups, Verification, groups, verify_groups
from compress_jax.trace._jaxpr.find_sites import bind, layouts, sites, unseen
from compress_jax.trace._jaxpr.last_product import Product, with_last_product
from compress_jax.trace._jaxpr.rewrite import rewrite
from compress_jax.trace._jaxpr.site import Site
from compress_jax.trace._jaxpr.view_inside import used_inside, view_inside
from compress_jax.trace._resize.counts import Number
from compress_jax.trace._resize.resize import resize, resized_numbers
from compress_jax.trace._statistics.calibrate import calibrate, observe
from compress_jax.trace._statistics.calibration import Calibration
from compress_jax.trace._statistics.reducer import Reducer
from compress_jax.trace._statistics.statistics import gram

__all__ = [
    "Calibration",
    "Cost",
    "Group",
    "Groups",
    "Number",
    "Product",
    "Reducer",
    "Site",
    "SiteCost",
    "Verification",
    "bind",
    "calibrate",
    "cost",
    "gram",
    "groups",
    "layouts",
    "observe",
    "reducers",
    "resize",
    "resized_numbers",
    "rewrite",
    "sites",
    "unseen",
    "used_inside",
    "verify_groups",
    "view_inside",
    "with_last_product",
]


def __dir__() -> list[str]:
    """Show what may be called, and no module that holds it."""
    return sorted(__all__)
