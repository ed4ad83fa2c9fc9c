"""Grids and the rules that choose their scales."""
