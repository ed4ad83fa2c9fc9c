"""See inside any function: sites, statistics, rewriting, cost, groups and resizing.

All of it is one interpreter of jaxprs; see README.md beside this file.
"""

from compress_jax.trace import reducers
from compress_jax.trace._cost import Cost, SiteCost, cost
from compress_jax.trace._groups.groups import Group, Groups, Verification, groups, verify_groups
from compress_jax.trace._jaxpr.block_spans import Block
from compress_jax.trace._jaxpr.blocks import Blocks, blocks
from compress_jax.trace._jaxpr.find_sites import bind, layouts, sites, unseen
from compress_jax.trace._jaxpr.last_product import Product, with_last_product
from compress_jax.trace._jaxpr.rewrite import rewrite
from compress_jax.trace._jaxpr.segments import Segment, segments
from compress_jax.trace._jaxpr.site import Site
from compress_jax.trace._jaxpr.view_inside import used_inside, view_inside
from compress_jax.trace._products import Scoped, products_by_scope
from compress_jax.trace._resize.counts import Number
from compress_jax.trace._resize.resize import resize, resized_numbers
from compress_jax.trace._statistics.calibrate import calibrate, observe
from compress_jax.trace._statistics.calibration import Calibration
from compress_jax.trace._statistics.reducer import Reducer
from compress_jax.trace._statistics.statistics import gram

__all__ = [
    "Block",
    "Blocks",
    "Calibration",
    "Cost",
    "Group",
    "Groups",
    "Number",
    "Product",
    "Reducer",
    "Scoped",
    "Segment",
    "Site",
    "SiteCost",
    "Verification",
    "bind",
    "blocks",
    "calibrate",
    "cost",
    "gram",
    "groups",
    "layouts",
    "observe",
    "products_by_scope",
    "reducers",
    "resize",
    "resized_numbers",
    "rewrite",
    "segments",
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
