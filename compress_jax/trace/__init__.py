"""Seeing inside any function: one interpreter of jaxprs for sites, statistics, rewriting, cost and channel groups."""

from compress_jax.trace import reducers
from compress_jax.trace._calibrate import calibrate
from compress_jax.trace._cost import cost
from compress_jax.trace._gram import gram
from compress_jax.trace._groups import groups
from compress_jax.trace._layouts import bind, layouts
from compress_jax.trace._observe import observe
from compress_jax.trace._resize import resize, resized_numbers
from compress_jax.trace._rewrite import rewrite
from compress_jax.trace._sites import sites, unseen
from compress_jax.trace.calibration import Calibration
from compress_jax.trace.costs import Cost, SiteCost
from compress_jax.trace.group import Group, Groups
from compress_jax.trace.reducer import Reducer
from compress_jax.trace.resized_numbers import Number
from compress_jax.trace.site import Site
from compress_jax.trace.verify import Verification, verify_groups

__all__ = [
    "Calibration",
    "Cost",
    "Group",
    "Groups",
    "Number",
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
    "verify_groups",
]
